"""pytest plugin: a real daemon in a host namespace of its own, with a world behind an uplink.

    world (192.0.2.1, 2001:db8::1) --- up0 (192.0.2.2, 2001:db8::2) [host namespace: daemon] --- ports

The daemon's process is in the host namespace (``nsenter --net``), so its sysctls, nft tables and
routes are that namespace's and the machine's stay as they are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from portwright import Client
from portwright.model.errors import DaemonUnavailable
from portwright.model.port import Port
from tests.deadline import PATIENCE, wait_until
from tests.fix_features import require_for_test
from tests.fix_netns import TestNetns
from tests.zygote import Process, Zygote

PORTWRIGHT = Path(sys.executable).with_name("portwright")
WORLD4, WORLD6 = "192.0.2.1", "2001:db8::1"
HOST4, HOST6 = "192.0.2.2", "2001:db8::2"
LAB = "PORTWRIGHT_LAB_KERNEL" in os.environ
#: Seconds.
START_WITHIN = 30.0
_zygote = Zygote()


@pytest.fixture(scope="session", autouse=True)
def _zygote_ends() -> Iterator[None]:
    """End it before the session looks for what it left behind."""
    yield
    _zygote.close()


#: Signals by which a library, or the interpreter, ends a process.
_BROKEN = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)


class Daemon:
    """One daemon: ``run_dir`` and ``state_dir`` in a directory of its own, in namespace ``host``."""

    def __init__(self, host: TestNetns, base: Path) -> None:
        """Nothing is started yet."""
        self.host = host
        self.base = base
        self.run_dir, self.state_dir = base / "run", base / "state"
        self.bin_dir, self.conf_dir = base / "bin", base / "net.d"
        self.log = base / "log"
        self.process: Process | None = None

    @property
    def env(self) -> dict[str, str]:
        """The environment in which the CLI finds this daemon."""
        return {
            **os.environ,
            "PORTWRIGHT_RUN_DIR": str(self.run_dir),
            "PORTWRIGHT_STATE_DIR": str(self.state_dir),
        }

    def start(self, **extra: str) -> None:
        """Start it and return once it is ready; ``extra`` goes into its environment."""
        self.launch(**extra)
        wait_until(self.ready, START_WITHIN, f"the daemon to be ready; its log:\n{self.tail()}")

    def launch(self, **extra: str) -> None:
        """Start the process only."""
        with self.log.open("ab") as log:
            self.process = self._portwright(
                ["node", "run"], {**self.env, **extra}, log.fileno(), log.fileno()
            )

    def _portwright(self, args: Sequence[str], env: dict[str, str], stdout: int, stderr: int) -> Process:
        """Start ``portwright ARGS`` in the host namespace; in the lab by a fork (tests/zygote.py)."""
        # Another release has to be imported anew.
        if LAB and env.get("PYTHONPATH") == os.environ.get("PYTHONPATH"):
            return _zygote.start(self.host.path, args, env, stdout, stderr)
        return subprocess.Popen(
            ["nsenter", f"--net={self.host.path}", "--", str(PORTWRIGHT), *args],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def ready(self) -> bool:
        """Does it answer that it is ready? Raises AssertionError if the process has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.tail()}")
        with contextlib.suppress(DaemonUnavailable), self.client() as client:
            return bool(client.node_status().pid)
        return False

    def client(self) -> Client:
        """A new client of this daemon; close it."""
        return Client(self.run_dir / "portwright.sock", timeout=START_WITHIN * PATIENCE)

    def cli(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``portwright ARGS`` against this daemon, in its host namespace."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self._portwright(args, self.env, out.fileno(), err.fileno())
            try:
                status = process.wait(60 * PATIENCE)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            result = subprocess.CompletedProcess(["portwright", *args], status, out.read(), err.read())
        if check and status:
            raise AssertionError(
                f"portwright {' '.join(args)}: exit {status}\n{result.stdout}{result.stderr}"
            )
        return result

    def install(self) -> None:
        """Install the CNI plugin into ``bin_dir``, with the reference plugins beside it by CNI_PATH."""
        self.cli("install", "--cni-bin-dir", str(self.bin_dir), "--cni-conf-dir", str(self.conf_dir))

    def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.wait()

    def kill(self) -> None:
        """SIGKILL, and wait for the end: no handler of the daemon runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        self.wait()

    def wait(self, timeout: float = 20) -> int:
        """Wait for the process to end by itself; its exit status."""
        if self.process is None:
            return 0
        return self.process.wait(timeout * PATIENCE)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    def close(self) -> None:
        """End it and take away what it would keep for its next start: ports, mount, directory.

        Raises AssertionError if it was ended by a signal that no test sends.
        """
        status = self.process.poll() if self.process is not None else None
        died = f"ended with {status}, see its log" if status in {-n for n in _BROKEN} else ""
        print(f"the daemon's log:\n{self.tail()}")  # pytest shows it if the test failed
        try:
            if self.process is None or self.process.poll() is not None:
                self.start()
            with self.client() as client:
                for port in client.port_list():
                    client.port_delete(port.port_id)
            self.stop()
            mounts = [m for m in Path("/proc/mounts").read_text().splitlines() if str(self.base) in m]
            assert not mounts, f"left mounted: {mounts}"
            assert not died, died
        finally:
            self.kill()
            bpf = self.run_dir / "bpf"
            if bpf.is_mount():
                subprocess.run(["umount", "-l", str(bpf)], check=False)
            shutil.rmtree(self.base, ignore_errors=True)


DaemonFactory = Callable[[], Daemon]


def _ip(ns: TestNetns, *commands: str) -> None:
    """Several commands of ``ip`` by one process: in the lab each exec counts."""
    ns.run(["ip", "-batch", "-"], input="".join(f"{command}\n" for command in commands))


def _transmits(ns: TestNetns, dev: str) -> bool:
    return "state UP" in ns.run(["ip", "-o", "link", "show", dev]).stdout


def make_world(host: TestNetns, world: TestNetns, mtu: int = 1500) -> None:
    """Join ``host`` to ``world`` by a veth pair ``up0``/``w0``, dual-stack, with default routes."""
    _ip(host, f"link add up0 mtu {mtu} type veth peer name w0 mtu {mtu} netns {world.name}")
    for ns, dev, a4, a6 in ((host, "up0", HOST4, HOST6), (world, "w0", WORLD4, WORLD6)):
        _ip(
            ns,
            f"addr add {a4}/24 dev {dev}",
            f"addr add {a6}/64 dev {dev} nodad",
            f"link set {dev} up",
        )
    # The end that was opened first transmits only after the kernel's link watch saw its carrier.
    for ns, dev in ((host, "up0"), (world, "w0")):
        wait_until(partial(_transmits, ns, dev), 5, f"{dev} to transmit")
    _ip(host, f"route add default via {WORLD4}", f"route add default via {WORLD6}")


@pytest.fixture
def world(netns_factory: Callable[[], TestNetns]) -> TestNetns:
    """What is outside of the host."""
    return netns_factory()


@pytest.fixture
def host(netns_factory: Callable[[], TestNetns], world: TestNetns) -> TestNetns:
    """The daemon's host namespace, with its uplink to ``world``."""
    made = netns_factory()
    make_world(made, world)
    return made


@pytest.fixture(params=["clsact", "tcx"])
def each_attach(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test under clsact and, where the kernel has it, TCX. Use it by ``usefixtures``."""
    way: str = request.param
    require_for_test(way)
    monkeypatch.setenv("PORTWRIGHT_ATTACH", way)
    return way


@contextlib.contextmanager
def started(host: TestNetns) -> Iterator[Daemon]:
    """A started daemon; at the end its ports are deleted, it is stopped, and nothing is left."""
    made = Daemon(host, Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-")))
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
def daemon(host: TestNetns) -> Iterator[Daemon]:
    """A started daemon in the host's namespace, as of :func:`started`."""
    with started(host) as made:
        yield made


class Sandbox:
    """A namespace with a port of the daemon: what most tests need two of."""

    def __init__(self, ns: TestNetns, port: Port) -> None:
        """Holds both."""
        self.ns = ns
        self.port = port

    @property
    def ip4(self) -> str:
        """The port's IPv4 address."""
        return next(a.address for a in self.port.addresses if ":" not in a.address)

    @property
    def ip6(self) -> str:
        """The port's IPv6 address."""
        return next(a.address for a in self.port.addresses if ":" in a.address)

    def run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return self.ns.run(command, check=check, timeout=timeout)

    def ping(self, address: str, count: int = 1) -> bool:
        """Whether ``count`` echo requests all get their answers, each within a second."""
        done = self.run(["ping", "-n", "-c", str(count), "-i", "0.05", "-W", "1", address], check=False)
        return done.returncode == 0


SandboxFactory = Callable[..., Sandbox]
Networks = Callable[[str], None]


@pytest.fixture
def networks(daemon: Daemon) -> Networks:
    """Make a network at its first use: 10.N.0.0/24 and fd00:N::/64 with masquerading, N from 77 on."""
    made: dict[str, int] = {}

    def need(name: str) -> None:
        if name not in made:
            number = made[name] = 77 + len(made)
            with daemon.client() as client:
                client.network_create(
                    name, subnets=[f"10.{number}.0.0/24", f"fd00:{number}::/64"], masquerade=True
                )

    return need


@pytest.fixture
def sandboxes(daemon: Daemon, netns_factory: Callable[[], TestNetns], networks: Networks) -> SandboxFactory:
    """Make a sandbox with a port: ``sandboxes(network="n1", **port_create's keywords)``."""

    def make(network: str = "n1", **options: object) -> Sandbox:
        networks(network)
        ns = netns_factory()
        options.setdefault("name", ns.name)
        with daemon.client() as client:
            return Sandbox(ns, client.port_create(network, ns.path, **options))  # type: ignore[arg-type]

    return make
