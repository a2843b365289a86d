"""The plugins that every test may use; one topic each."""

from __future__ import annotations

import signal

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
