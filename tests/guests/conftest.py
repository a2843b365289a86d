"""Fixtures of the tests that boot guests: a kernel, and an initramfs for it.

Kernels are the lab's (lab/kernels.py), and no test downloads one. Where QEMU or a kernel is missing these
tests are skipped, and the reason is said; with PORTWRIGHT_REQUIRE_GUESTS=1 (CI) they fail.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import kernels
from portwright.vmm import initramfs
from tests.deadline import wait_until

#: Seconds for a boot: three on a quiet machine.
BOOT_WITHIN = 90.0


@dataclass(frozen=True)
class Image:
    """What a guest boots."""

    kernel: Path
    initramfs: Path


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The newest kernel that the lab has here, and an initramfs made for it."""
    if shutil.which("qemu-system-x86_64") is None:
        _lacking("qemu-system-x86_64 is missing: packaging/setup.sh lab installs it")
    kernel = kernels.fetched("6.12") or kernels.fetched("6.1")
    if kernel is None:
        _lacking(f"no kernel in {kernels.store()}: python -m lab, or make lab KERNEL=6.12, downloads one")
    assert kernel is not None
    made = tmp_path_factory.mktemp("guests") / "initramfs"
    made.write_bytes(initramfs.build(kernel.modules))
    return Image(kernel.image, made)


@pytest.fixture
def console(tmp_path: Path) -> Path:
    """A file for what the guest says."""
    return tmp_path / "console"


def booted(console: Path) -> None:
    """Wait until the guest is set up. AssertionError shows the end of its console if it never is."""
    try:
        wait_until(lambda: console.exists() and "portwright: ready" in console.read_text(), BOOT_WITHIN)
    except AssertionError:
        said = console.read_text()[-3000:] if console.exists() else "nothing"
        raise AssertionError(f"the guest was not ready in {BOOT_WITHIN:g} s; it said:\n{said}") from None


def _lacking(why: str) -> None:
    if os.environ.get("PORTWRIGHT_REQUIRE_GUESTS") == "1":
        pytest.fail(why)
    pytest.skip(why)
