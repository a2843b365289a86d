"""Skip a test on an old kernel; fail it where the kernel is new enough to have the feature.

A skip that never ends hides a broken probe. So a test that needs a feature asks here, and a
missing feature is only an excuse for a kernel from before it, or for one whose own
configuration says that it was built without.
"""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path

import pytest

from portwright.kernel.bpf import features


@functools.cache
def kernel_config() -> str | None:
    """The running kernel's build configuration, or None when it doesn't say."""
    packed, installed = Path("/proc/config.gz"), Path(f"/boot/config-{os.uname().release}")
    if packed.exists():
        return gzip.decompress(packed.read_bytes()).decode()
    return installed.read_text() if installed.exists() else None


def built_without(option: str) -> bool:
    """Whether the configuration is known and doesn't have ``option`` as y or m."""
    config = kernel_config()
    return config is not None and not {f"{option}=y", f"{option}=m"} & set(config.splitlines())


def require_for_test(name: str) -> None:
    """Return when the feature is there; skip or fail the test otherwise (see the module)."""
    found = features.probe(name)
    if found.supported:
        return
    why = f"{name} needs {found.need}; {found.have}: {found.detail}"
    if found.supported is None:
        pytest.fail(f"cannot probe: {why}")
    if features.running_version() < found.need_version:
        pytest.skip(why)
    for option in features.options(name):
        if built_without(option):
            pytest.skip(f"{why}; this kernel was built without {option}")
    pytest.fail(f"this kernel should have it: {why}")
