"""Runs pytest in a guest that has another kernel and this machine's file system, read-only.

What is guaranteed: nothing on the host is written to but one folder below ``build/lab``, which is
deleted unless the run failed; no process is left, whatever happens; and a guest that hangs, panics
or does not boot is reported as a failure, with the end of its console, never as silence.

virtme-ng does the booting. It exports the host's root over 9p. Results come back through a second
share and not by the guest's exit status, so that a guest that died is told from one that failed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import disk
from lab.kernels import Kernel, LabError

PROJECT = Path(__file__).resolve().parent.parent
GUEST = Path(__file__).with_name("guest.sh")

NO_TESTS = 5
"""pytest's exit status when nothing was collected."""

NOT_COPIED = {".venv", ".git", "build/lab", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
"""What of the checkout the guest's copy is without; .venv is there all the same, shared."""

FASTER = "mitigations=off norandmaps no5lvl"
"""Kernel parameters for emulation: a process starts in a third of the time without retpolines, which
defend against other guests' readers, random addresses, for which code is translated anew, and a fifth
level of page tables, which few machines have."""

CONSOLE_TAIL = 40
"""Lines of the console that are shown of a guest that died: the last, and above them the first reason."""
_REASON = re.compile(r"Kernel panic|BUG:|Oops:")

_POLL = 0.2  # seconds between looks at the guest's output


@dataclass(frozen=True)
class Outcome:
    """How one kernel's run ended."""

    kernel: Kernel
    status: int | None
    """pytest's exit status; None when the guest did not live to say it."""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""
    """Why there is no status, or no test; empty otherwise."""
    kept: Path | None = None
    """The run's folder (output, console, junit.xml), kept because it failed."""
    began: bool = True
    """Whether pytest said anything: a guest that died before is no verdict on any test."""

    @property
    def ok(self) -> bool:
        """Whether tests ran, and all of them passed or were skipped with a reason."""
        return self.status == 0 and not self.problem

    def __str__(self) -> str:
        """The summary line."""
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        text = f"lab: {'PASS' if self.ok else 'FAIL'} {self.kernel.name:<5} ({self.kernel.release}) "
        text += f"{counts} in {self.seconds:.0f} s"
        if self.problem:
            text += f": {self.problem}"
        if self.kept is not None:
            text += f"; see {self.kept}"
        return text


def run(
    kernel: Kernel,
    pytest_args: Sequence[str],
    *,
    limit: float,
    show: Callable[[str], object] = sys.stdout.write,
    stop: threading.Event | None = None,
) -> Outcome:
    """Boot ``kernel``, run pytest with ``pytest_args`` in it, and say how that ended.

    ``limit``: seconds for everything, boot included. ``show`` gets pytest's output as it comes, in
    whole lines. Once ``stop`` is set the guest is ended as if its time were over. Raises LabError when no
    guest can be started here at all.
    """
    folder = PROJECT / "build" / "lab" / f"{kernel.name}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_job(folder, kernel, pytest_args)
    _copy_project(folder / "project.tar")
    disk.make(PROJECT, folder / "disk")
    began = time.monotonic()
    with (folder / "console").open("wb") as console:
        try:
            guest = subprocess.Popen(
                _command(kernel, folder),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                cwd=PROJECT,
                env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                start_new_session=True,  # so that QEMU, its grandchild, can be ended with it
            )
        except FileNotFoundError as exc:
            raise LabError("virtme-ng is missing: run packaging/setup.sh lab") from exc
        try:
            in_time = _follow(guest, folder / "output", began + limit, show, stop or threading.Event())
        finally:
            _end(guest)
            for large in ("project.tar", "disk"):
                (folder / large).unlink()
    seconds = time.monotonic() - began
    outcome = _outcome(kernel, folder, seconds, None if in_time else min(limit, seconds))
    if outcome.ok:
        shutil.rmtree(folder)
    return outcome


def _command(kernel: Kernel, folder: Path) -> list[str]:
    """The virtme-ng command line."""
    mount = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,access=any lab-result /run/lab"
    shares = (
        # multidevs=remap: the host's root may span file systems whose inode numbers overlap.
        f"-fsdev local,id=lab-root,path=/,security_model=none,readonly=on,multidevs=remap "
        f"-device virtio-9p-pci,fsdev=lab-root,mount_tag=lab-root "
        f"-fsdev local,id=lab-result,path={folder},security_model=none "
        f"-device virtio-9p-pci,fsdev=lab-result,mount_tag=lab-result "
        f"-drive file={folder}/disk,if=virtio,format=raw,readonly=on"
    )
    return [
        "vng",
        f"--run={kernel.image}",
        "--disable-kvm",  # software emulation everywhere: a result never depends on the machine
        f"--append={FASTER}",
        "--memory=1G",
        "--cpus=2",  # more than one: per-CPU maps and races have to show
        "--user=root",
        "--verbose",  # or the kernel is told to be quiet, even about its panic
        "--force-9p",
        "--cwd=/",
        f"--qemu-opts={shares}",
        f"--exec=mkdir -p /run/lab && {mount} && bash /run/lab/guest.sh /run/lab",
    ]


def _write_job(folder: Path, kernel: Kernel, pytest_args: Sequence[str]) -> None:
    """What guest.sh reads, as shell variables; and guest.sh itself."""
    shutil.copy(GUEST, folder / "guest.sh")
    # Parents before children, or binding the parent would hide the child.
    folders = sorted({"/usr", "/opt", sys.base_prefix} - {"/"})
    folders = [f for f in folders if Path(f).is_dir() and not f.startswith("/usr/")]
    pytest = [*pytest_args, "--junitxml=/run/lab/junit.xml"]
    (folder / "job").write_text(
        f"PROJECT={shlex.quote(str(PROJECT))}\n"
        f"KERNEL={shlex.quote(kernel.name)}\n"
        f"MODULES={shlex.quote(str(kernel.modules))}\n"
        f"DISK=({shlex.join(str(f) for f in disk.folders(PROJECT))})\n"
        f"FOLDERS=({shlex.join(folders)})\n"
        f"PYTEST=({shlex.join(pytest)})\n"
    )


def _copy_project(tar: Path) -> None:
    """Pack the checkout as it is now; what is ignored by git goes along, but for the largest of it."""

    def wanted(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if entry.name in NOT_COPIED else entry

    for attempt in range(3):
        try:
            with tarfile.open(tar, "w") as file:
                for path in sorted(PROJECT.iterdir()):
                    file.add(path, path.name, filter=wanted)
        except OSError:  # a file was saved just now: it was gone, or shorter than it had been
            if attempt == 2:
                raise
        else:
            return


def _follow(
    guest: subprocess.Popen[bytes],
    output: Path,
    deadline: float,
    show: Callable[[str], object],
    stop: threading.Event,
) -> bool:
    """Show ``output`` as it grows, until the guest is gone (True), the time is over or we stop (False)."""
    shown = 0
    while True:
        try:
            guest.wait(timeout=_POLL)
        except subprocess.TimeoutExpired:
            gone = False
        else:
            gone = True
        if output.exists():
            with output.open("rb") as file:
                file.seek(shown)
                new = file.read()
            # Whole lines only, or a character could be cut in two.
            end = len(new) if gone else new.rfind(b"\n") + 1
            show(new[:end].decode(errors="replace"))
            shown += end
        if gone:
            return True
        if time.monotonic() > deadline or stop.is_set():
            return False


def _end(guest: subprocess.Popen[bytes]) -> None:
    """End all of virtme-ng's process group, QEMU included, and return once it is empty."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 3
        try:
            os.killpg(guest.pid, how)
            while time.monotonic() < deadline:
                guest.poll()  # reaps virtme-ng; its children are reaped by whoever inherits them
                os.killpg(guest.pid, 0)
                time.sleep(0.02)
        except ProcessLookupError:
            break
    guest.wait()


def _outcome(kernel: Kernel, folder: Path, seconds: float, over_limit: float | None) -> Outcome:
    """Read what the guest left in ``folder``."""
    status: int | None = None
    problem = ""
    try:
        status = int((folder / "status").read_text())
    except (FileNotFoundError, ValueError):
        console = (folder / "console").read_text(errors="replace")
        problem = "the guest died" if over_limit is None else f"not done after {over_limit:.0f} s"
        problem += ", its console ended:\n    " + "\n    ".join(last_words(console)) + "\n   "
    passed, failed, skipped = _counts(folder / "junit.xml")
    if status == NO_TESTS:
        problem = "no test was run"
    ok = status == 0 and not problem
    kept = None if ok else folder
    output = folder / "output"
    began = over_limit is not None or (output.exists() and output.stat().st_size > 0)
    return Outcome(kernel, status, passed, failed, skipped, seconds, problem, kept, began)


def last_words(console: str) -> list[str]:
    """The end of a dead guest's console; where the kernel's reason stands further above, its line too.

    The trace below a reason may be longer than any tail, and the closing line, which repeats it, may
    not have left the serial line when the guest was gone.
    """
    lines = [line for line in console.replace("\r", "").splitlines() if line.strip()]
    tail = lines[-CONSOLE_TAIL:]
    reasons = [line for line in lines[:-CONSOLE_TAIL] if _REASON.search(line)]
    return [*reasons[:1], "...", *tail] if reasons else tail


def _counts(junit: Path) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a junit file; zeroes when there is none."""
    try:
        suites = ET.parse(junit).getroot().iter("testsuite")  # noqa: S314 - pytest wrote it, just now
    except (FileNotFoundError, ET.ParseError):
        return 0, 0, 0
    tests = failed = skipped = 0
    for suite in suites:
        tests += int(suite.get("tests", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped += int(suite.get("skipped", 0))
    return tests - failed - skipped, failed, skipped
