"""The plugins that every test may use; one topic each."""

from __future__ import annotations

import os
import signal
import sys

# An image that sets this makes every daemon that a test starts compile its modules anew: most of its start.
# Before the plugins are imported, whose own modules are then kept too.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

pytest_plugins = [
    "tests.fix_leaks",
    "tests.fix_netns",
    "tests.fix_bpf",
    "tests.fix_features",
    "tests.fix_daemon",
    "tests.fix_containerd",
]

# A shell that starts us in the background has ^C ignored, and every child inherits that: tests that
# interrupt a command would wait for good.
signal.signal(signal.SIGINT, signal.default_int_handler)
