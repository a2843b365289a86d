"""The CNI edge: calls parsed, results and errors written, foreign IPAM executed; no decisions.

The executable that runtimes start is ``shim/portwright-cni.c``; it forwards to the daemon in
the shape of :mod:`portwright.cni.wire`.
"""
