"""The plugins that every test may use; one topic each."""

from __future__ import annotations

pytest_plugins = [
    "tests.fix_leaks",
    "tests.fix_netns",
    "tests.fix_bpf",
    "tests.fix_features",
    "tests.fix_daemon",
    "tests.fix_containerd",
]
