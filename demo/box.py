"""A box: a private view of this machine in which real container runtimes run with their defaults.

Runtimes have paths that nothing can change (``ctr run --cni`` reads /etc/cni/net.d and /opt/cni/bin,
containerd's shims write to /run/containerd). So the runtimes get namespaces of their own:

- mounts: /etc, /opt, /run, /root and /var are copy-on-write over the machine's, and what belongs to a
  runtime or to Portwright (``EMPTY``) begins empty. Nothing that is written there reaches the machine.
- processes: the box's first process is its init, so that closing the box ends all that ran in it,
  shims and containers too. It ends when its stdin ends: a killed owner leaves nothing running.
- network: one that is given, or a new one.

What is not private: cgroups (``close`` removes the folders that are named after the box) and the kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

COPIED = ("etc", "opt", "root", "run", "var")
EMPTY = (
    *("/etc/cni", "/etc/containerd", "/etc/containers", "/opt/cni"),
    *("/run/containerd", "/run/containers", "/run/crun", "/run/libpod", "/run/netns", "/run/portwright"),
    *("/run/runc", "/var/lib/cni", "/var/lib/containerd", "/var/lib/containers", "/var/lib/portwright"),
)
_READY = b"ready\n"
_START_WITHIN = 20.0  # seconds
_EXIT_WITHIN = 20.0


class Box:
    """A running box. ``work`` is a directory that its owner makes and takes away; root is needed."""

    def __init__(self, work: Path, netns: str | None = None, env: Mapping[str, str] | None = None) -> None:
        """Start it in the network namespace at path ``netns``, or in a new one.

        ``env`` is added to the environment of all that runs inside. Raises RuntimeError and leaves nothing
        if the kernel refuses.
        """
        self.work = work
        self.env = {**os.environ, **(env or {})}
        # What systemd told *us* is not for a daemon inside.
        for name in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"):
            self.env.pop(name, None)
        self._mounts = work / "box"
        self._mounts.mkdir(parents=True)
        enter = ["nsenter", f"--net={netns}", "--"] if netns else []
        fresh = [] if netns else ["--net"]
        with (work / "box.log").open("wb") as log:
            self._init = subprocess.Popen(
                [
                    *(*enter, "unshare", "--mount", "--propagation", "private", "--pid", "--fork"),
                    *("--kill-child", "--mount-proc", "--uts", "--ipc", *fresh, "--"),
                    *(sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(self._mounts)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.env,
            )
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> None:
        assert self._init.stdout is not None  # noqa: S101 - for mypy: it is a pipe
        ready, _, _ = select.select([self._init.stdout], [], [], _START_WITHIN)
        if not ready or self._init.stdout.readline() != _READY:
            raise RuntimeError(f"the box did not start: {(self.work / 'box.log').read_text()}")

    @property
    def pid(self) -> int:
        """A process that is in the box's mount and network namespaces."""
        return self._init.pid

    def enter(self, *command: str) -> list[str]:
        """The command line that runs ``command`` in the box, from outside."""
        proc = f"/proc/{self.pid}/ns"
        return [
            *("nsenter", f"--mount={proc}/mnt", f"--net={proc}/net", f"--pid={proc}/pid_for_children"),
            *(f"--uts={proc}/uts", f"--ipc={proc}/ipc", "--", *command),
        ]

    def run(
        self,
        *command: str,
        input: str | None = None,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, to its end; the result, with text captured. A failure is in the result."""
        return subprocess.run(
            self.enter(*command),
            check=False,
            capture_output=True,
            text=True,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            timeout=timeout,
            env={**self.env, **(env or {})},
        )

    def start(
        self, *command: str, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command inside, its output to ``log``.

        The process returned is nsenter's; to signal what runs inside, use :meth:`pids` or the runtime.
        """
        with log.open("ab") as out:
            return subprocess.Popen(
                self.enter(*command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**self.env, **(env or {})},
            )

    def path(self, inside: str) -> Path:
        """Where a file of the box is found from outside: readable and writable while the box lives."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def pids(self, word: str) -> list[int]:
        """The processes (as numbered outside) in the box whose program's name is ``word``."""
        space = _link(f"/proc/{self.pid}/ns/pid_for_children")
        return [
            pid
            for pid in _processes()
            if _name(pid) == word and _link(f"/proc/{pid}/ns/pid") == space and not _zombie(pid)
        ]

    def close(self) -> None:
        """End everything in it; a second time does nothing. Its mounts and namespaces go with it."""
        if self._init.stdin is not None and not self._init.stdin.closed:
            with contextlib.suppress(OSError):
                self._init.stdin.close()
        try:
            self._init.wait(_EXIT_WITHIN)
        except subprocess.TimeoutExpired:
            self._init.send_signal(signal.SIGKILL)  # unshare's; --kill-child takes the init with it
            self._init.wait()
        if self._init.stdout is not None:
            self._init.stdout.close()
        with contextlib.suppress(OSError):
            self._mounts.rmdir()


def remove_cgroups(name: str) -> None:
    """Remove the cgroups named ``name`` at the top of every hierarchy, and what is empty below them."""
    for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")):
        found = top / name
        if not found.is_dir():
            continue
        for folder, _, _ in os.walk(found, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # noqa: PTH106 - a cgroup's files are not removed, only folders


def make_rootfs(path: Path, busybox: Path = Path("/bin/busybox")) -> Path:
    """A root file system for a container, of one static busybox under all its names; returns ``path``."""
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "www"):
        (path / name).mkdir(parents=True)
    (path / "bin/busybox").write_bytes(busybox.read_bytes())
    (path / "bin/busybox").chmod(0o755)
    listed = subprocess.run([str(busybox), "--list"], check=True, capture_output=True, text=True).stdout
    for applet in listed.split():
        if applet != "busybox":
            (path / "bin" / applet).symlink_to("busybox")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (path / "etc/group").write_text("root:x:0:\n")
    return path


def _processes() -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            yield int(folder.name)


def _name(pid: int) -> str:
    try:
        return Path(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0])).name
    except OSError:
        return ""


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


# --- inside -------------------------------------------------------------------------------------


def _init(work: str) -> None:
    """The box's first process: makes the mounts, says that it is ready, stays until stdin ends."""
    _mount("tmpfs", work, "tmpfs", "mode=755")
    for name in COPIED:
        if not os.path.isdir(f"/{name}"):  # noqa: PTH112 - starts in 30 ms without pathlib's helpers
            continue
        upper, under = f"{work}/{name}", f"{work}/.{name}"
        os.mkdir(upper)  # noqa: PTH102
        os.mkdir(under)  # noqa: PTH102
        _mount("overlay", f"/{name}", "overlay", f"lowerdir=/{name},upperdir={upper},workdir={under}")
    for path in EMPTY:
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
        _mount("tmpfs", path, "tmpfs", "mode=755")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what becomes ours
    os.write(1, _READY)
    while os.read(0, 4096):
        pass


def _mount(source: str, target: str, kind: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), 0, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, f"mount {kind} at {target}: {os.strerror(code)}")


if __name__ == "__main__":
    _init(sys.argv[1])
