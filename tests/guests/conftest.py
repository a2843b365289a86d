"""Fixtures of the tests that boot guests: a kernel, and an initramfs for it.

Kernels are the lab's (lab/kernels.py), and no test downloads one. Where QEMU or a kernel is missing these
tests are skipped, and the reason is said; with PORTWRIGHT_REQUIRE_GUESTS=1 (CI) they fail.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lab import kernels
from portwright.kernel import netns
from portwright.vmm import initramfs
from tests.deadline import wait_readable, wait_until
from tests.fix_daemon import PORTWRIGHT, Daemon
from tests.fix_netns import TestNetns

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


class Run:
    """A running ``portwright vm run --json``: its process, and what it printed when the guest ran."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self._errors = errors
        assert process.stdout is not None
        wait_readable(process.stdout.fileno(), 60, "vm run to say that the guest runs")
        line = process.stdout.readline()
        assert line, self.errors()
        self.facts: dict[str, Any] = json.loads(line)
        self.qemu = os.pidfd_open(self.facts["pid"])

    def addresses(self) -> list[str]:
        """Those of its first NIC."""
        return list(self.facts["nics"][0]["addresses"])

    def errors(self) -> str:
        """What it wrote to stderr."""
        return self._errors.read_text()

    def close(self) -> None:
        """Let go of QEMU, ended if it lives still."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.qemu, signal.SIGKILL)
        os.close(self.qemu)


RunFactory = Callable[..., Run]


@pytest.fixture
def vm_run(daemon: Daemon, host: TestNetns, image: Image, console: Path) -> Iterator[RunFactory]:
    """Start ``vm run`` on the network n1, in the daemon's host namespace; ``options`` are added."""
    errors = console.with_name("errors")
    command = [
        *("nsenter", f"--net={host.path}", "--", str(PORTWRIGHT), "vm", "run", "--json"),
        *("--kernel", str(image.kernel), "--initramfs", str(image.initramfs), "--console", str(console)),
        *("--memory", "128", "--accel", "tcg", "--network", "n1"),
    ]
    with ExitStack() as stack:
        # The guard deletes them a moment after us.
        stack.callback(wait_until, partial(no_port, daemon), 10, "the guests' ports to be gone")

        def start(*options: str) -> Run:
            with errors.open("wb") as err:
                process = subprocess.Popen(
                    [*command, *options],
                    env=daemon.env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    text=True,
                )
            stack.enter_context(process)  # waits for its end
            stack.callback(process.kill)
            run = Run(process, errors)
            stack.callback(run.close)
            return run

        yield start


def no_port(daemon: Daemon) -> bool:
    with daemon.client() as client:
        return not [port for port in client.port_list() if port.model != "veth"]


def gone(daemon: Daemon, cookie: int) -> bool:
    """Whether neither a port nor the namespace is left."""
    found = netns.find_by_cookie(cookie)
    if found is not None:
        os.close(found)
    return found is None and no_port(daemon)


def cookie_of(run: Run) -> int:
    namespace = netns.open_netns(f"/proc/{run.facts['pid']}/ns/net")
    try:
        return netns.cookie(namespace)
    finally:
        os.close(namespace)


def _lacking(why: str) -> None:
    if os.environ.get("PORTWRIGHT_REQUIRE_GUESTS") == "1":
        pytest.fail(why)
    pytest.skip(why)
