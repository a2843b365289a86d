"""The kernel lab: this checkout's tests under other kernels, on this machine's own file system.

See docs/lab.md. ``python -m lab`` is the command, ``make lab`` its usual caller.
"""
