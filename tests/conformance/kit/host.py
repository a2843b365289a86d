"""A host to test on: a namespace with an uplink, an outside world behind it, and the plugin's daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..profile import DaemonSpec, Profile, expand, places
from .netns import MNT_DETACH, Netns, _call
from .observe import links, ruleset, wait_until
from .runtime import Runtime

HOST4, HOST6 = "192.0.2.1", "2001:db8:ffff::1"
OUTSIDE4, OUTSIDE6 = "192.0.2.2", "2001:db8:ffff::2"
REFERENCE_PLUGINS = Path("/usr/lib/cni")


class Daemon:
    """The daemon of the plugin under test, run inside the host's namespace; its output goes to ``log``."""

    def __init__(self, spec: DaemonSpec, where: dict[str, str], host: Netns, log: Path) -> None:
        self._command = [str(part) for part in expand(spec.command, where)]
        self._socket: str = expand(spec.socket, where)
        self._timeout = spec.start_timeout
        self._host = host
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """True while the process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it (nothing happens if it runs); returns when its socket accepts.

        RuntimeError with the end of its log if it ended instead, or is not ready in time.
        """
        if self.running:
            return
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._host.argv(self._command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_until(lambda: self._accepts() or not self.running, "the daemon's socket", self._timeout)
            if not self.running:
                raise RuntimeError(f"the daemon ended by itself:\n{self.tail()}")
        except AssertionError as late:
            self.kill()
            raise RuntimeError(f"the daemon is not ready: {late}\n{self.tail()}") from late

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(self._socket) == 0

    def stop(self) -> None:
        """SIGTERM, and wait for its end; RuntimeError (and SIGKILL) if it ignores that for 15 s."""
        if self._process is None:
            return
        if self.running:
            self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"the daemon ignored SIGTERM:\n{self.tail()}") from None
        self._process = None

    def kill(self) -> None:
        """SIGKILL to the daemon and what it started, at once."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def tail(self, since: int = 0) -> str:
        """The end of the log, at most 4,000 characters, from byte ``since`` on."""
        return self.log.read_bytes()[since:].decode(errors="replace")[-4000:] if self.log.exists() else ""


class Host:
    """A host namespace with an uplink to an outside one, the installed plugin and a runtime that calls it.

    ``work`` is a folder of its own, gone with ``close``. Outside has no route back to any sandbox: what
    gets an answer from there was masqueraded.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.work = Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-conf-"))
        self.where = places(self.work)
        self._counter = 0
        self._undo = contextlib.ExitStack()
        self._undo.callback(self._remove_work)
        self.daemon: Daemon | None = None
        try:
            self._build()
        except BaseException:
            self._undo.close()
            raise

    def _build(self) -> None:
        self.outside = self.netns("outside")
        self.ns = self.netns("host")
        self.ns.ip_batch(
            f"link add up0 type veth peer name up0 netns {self.outside.path}",
            f"addr add {HOST4}/24 dev up0",
            f"addr add {HOST6}/64 dev up0 nodad",
            "link set up0 up",
        )
        self.outside.ip_batch(
            f"addr add {OUTSIDE4}/24 dev up0", f"addr add {OUTSIDE6}/64 dev up0 nodad", "link set up0 up"
        )
        self.ns.ip_batch(f"route add default via {OUTSIDE4}", f"route add default via {OUTSIDE6}")
        bin_dirs = [Path(p) for p in expand(self.profile.bin_dirs, self.where)]
        if REFERENCE_PLUGINS not in bin_dirs:
            bin_dirs.append(REFERENCE_PLUGINS)
        self.runtime = Runtime(bin_dirs, self.ns)
        for command in self.profile.install:
            self.command(command)
        if self.profile.daemon is not None:
            log = self.work / "daemon.log"
            self.daemon = Daemon(self.profile.daemon, self.where, self.ns, log)
            self._undo.callback(self.daemon.kill)
            self.daemon.start()

    def netns(self, name: str) -> Netns:
        """Another namespace, gone with the host at the latest."""
        self._counter += 1
        ns = Netns.create(self.work / f"{name}-{self._counter}.net")
        self._undo.callback(ns.delete)
        return ns

    def command(self, command: Sequence[str], **more: str) -> str:
        """Run a profile's command in the host's namespace, placeholders (and ``more``) filled in."""
        return self.ns.run([str(part) for part in expand(command, self.where | more)])

    def link_names(self) -> set[str]:
        """The names of the host's links."""
        return set(links(self.ns))

    def state_text(self) -> str:
        """All that the plugin has recorded, by the profile's files and commands, names included."""
        parts = []
        for pattern in expand(self.profile.state_files, self.where):
            for path in sorted(Path("/").glob(pattern.lstrip("/"))):
                if path.is_file():
                    parts.append(f"{path}: {path.read_text(errors='replace')}")
        if self.daemon is None or self.daemon.running:
            parts += [self.command(command) for command in self.profile.state_commands]
        return "\n".join(parts)

    def ruleset(self) -> str:
        """All netfilter rules of the host's namespace."""
        return ruleset(self.ns)

    def close(self) -> None:
        """Stop the daemon in order, then remove everything. May be called twice."""
        try:
            if self.daemon is not None:
                self.daemon.stop()
        finally:
            self._undo.close()

    def _remove_work(self) -> None:
        # A daemon may have mounted a bpffs for its pins below its run folder, to outlive a restart.
        mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((m for m in mounted if m.startswith(f"{self.work}/")), reverse=True):
            with contextlib.suppress(OSError):
                _call("umount2", mount.encode(), MNT_DETACH)
        shutil.rmtree(self.work, ignore_errors=True)
