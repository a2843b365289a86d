"""What is measured: sandboxes, joined pair by pair by each contender, each in a host namespace of its own.

Every contender gets the same: a host namespace with an uplink of MTU 1500 to a "world" namespace, and
sandboxes that are plain network namespaces. CNI plugins, ours and the reference ones, are executed in the
host namespace as a runtime does it (specification 1.0.0): environment and stdin in, exit status out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from portwright.kernel import rtnl
from portwright.kernel.bpf import features
from portwright.kernel.netlink import NetlinkSocket
from portwright.kernel.netns import entered
from tests.conformance.kit.netns import Netns
from tests.conformance.kit.plugin import Json, Outcome
from tests.conformance.kit.runtime import Runtime
from tests.fix_daemon import Daemon, make_world
from tests.fix_netns import TestNetns

REFERENCE = Path("/usr/lib/cni")
CNI_VERSION = "1.0.0"  # the newest that Debian 12's reference plugins speak
VETH, BRIDGE_BY_HAND = "bare veth", "Linux bridge"
BRIDGE, PTP, MACVLAN = "cni bridge", "cni ptp", "cni macvlan"
OURS, OURS_TCX = "portwright", "portwright (tcx)"
_subnets = itertools.count(1)


class Sandbox:
    """A namespace and a container id."""

    def __init__(self, tag: str, *, loopback: bool = True) -> None:
        """Make it; ``lo`` is up unless nobody will send in it."""
        self.id = f"{tag}{uuid.uuid4().hex[:12]}"
        path = Path("/run/netns", f"pwt-{os.getpid()}-{self.id}")
        self.ns = Netns.create(path, loopback=False)
        self.path = str(self.ns.path)
        if loopback:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                with NetlinkSocket(netns_fd=fd) as sock:
                    sock.execute([rtnl.link_set(1, up=True)])
            finally:
                os.close(fd)

    def close(self) -> None:
        """Drop it; the kernel frees it later."""
        self.ns.delete()


class QuickRuntime(Runtime):
    """The conformance kit's runtime with the cheapest execution that Python has.

    ``posix_spawn`` from a thread inside the host's namespace, and files in memory for stdin and stdout:
    so that what is timed is the plugin, not the harness.
    """

    def __init__(self, bin_dirs: Sequence[Path], host_fd: int) -> None:
        """``host_fd`` stays the caller's."""
        super().__init__(bin_dirs)
        self._host_fd = host_fd

    def execute(self, config: Mapping[str, Any], env: Mapping[str, str]) -> Outcome:
        """One execution of ``config['type']``."""
        stdin, stdout, stderr = (os.memfd_create(name) for name in ("in", "out", "err"))
        try:
            os.pwrite(stdin, json.dumps(config).encode(), 0)
            path = str(self.find(config["type"]))
            actions = [(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate((stdin, stdout, stderr))]
            with entered(self._host_fd):
                pid = os.posix_spawn(path, [path], dict(env), file_actions=actions)
            _, status = os.waitpid(pid, 0)
            out, err = (os.pread(fd, 1 << 20, 0) for fd in (stdout, stderr))
            return Outcome(os.waitstatus_to_exitcode(status), out, err.decode(errors="replace"))
        finally:
            for fd in (stdin, stdout, stderr):
                os.close(fd)


class Host:
    """A host namespace with an uplink, a work folder, and a runtime that runs plugins in it."""

    def __init__(self, name: str, bin_dirs: Sequence[Path] = (REFERENCE,)) -> None:
        """Make it."""
        self.name = name
        mark = f"pwt-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.base = Path(tempfile.mkdtemp(prefix=f"pwt-{os.getpid()}-"))
        self.world, self.ns = TestNetns(f"{mark}w"), TestNetns(f"{mark}h")
        make_world(self.ns, self.world)
        self.runtime = QuickRuntime(bin_dirs, self.ns.fd)
        self.sandboxes: list[Sandbox] = []

    def sandbox(self) -> Sandbox:
        """A new sandbox, dropped with the host."""
        made = Sandbox("bench")
        self.sandboxes.append(made)
        return made

    def settle(self) -> None:
        """Return once the kernel has ended what a plugin's last call left it to do in the background.

        A deleted device is freed after the call that deleted it, under or beside the lock (RTNL) that the
        next call needs: its debt would be charged to whoever measures next. Making a veth pair and deleting
        it waits for the lock, for the RCU grace periods and for the freeing, in this order.
        """
        with NetlinkSocket(netns_fd=self.ns.fd) as sock:
            name = f"s{uuid.uuid4().hex[:10]}"
            sock.execute([rtnl.veth_create(name, mac="02:00:00:00:00:01", mtu=1500, peer_name=f"{name}p",
                                           peer_mac="02:00:00:00:00:02", peer_netns_fd=self.ns.fd,
                                           peer_mtu=1500)])  # fmt: skip
            link = rtnl.link_by_name(sock, name)
            assert link is not None
            sock.execute([rtnl.link_del(link.index)])

    def close(self) -> None:
        """Drop namespaces and folder."""
        for sandbox in self.sandboxes:
            sandbox.close()
        self.ns.close()
        self.world.close()
        shutil.rmtree(self.base, ignore_errors=True)


class OurHost(Host):
    """A host with a daemon, and our plugin installed."""

    def __init__(self, name: str = OURS) -> None:
        """Start the daemon and install the plugin beside the reference ones."""
        super().__init__(name)
        self.daemon = Daemon(self.ns, self.base)
        try:
            self.daemon.start()
            self.daemon.install()
        except BaseException:
            self.close()
            raise
        self.runtime = QuickRuntime([self.daemon.bin_dir, REFERENCE], self.ns.fd)

    def close(self) -> None:
        """End the ports and the daemon too."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self.daemon.close()
        finally:
            super().close()


@contextlib.contextmanager
def hosts(*names: str) -> Iterator[dict[str, Host]]:
    """A host for each contender; two of ours share nothing but the code."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Host] = {}
        for name in names:
            host = OurHost(name) if name in (OURS, OURS_TCX) else Host(name)
            stack.callback(host.close)
            made[name] = host
        yield made


def able(*names: str) -> tuple[str, ...]:
    """The contenders that this kernel can have."""
    return tuple(name for name in names if name != OURS_TCX or features.probe("tcx").supported)


def conflist(name: str, host: Host, *, chained: bool = False) -> Json:
    """The network configuration list of a contender; ``chained``: masquerading, port mappings, limits."""
    number = next(_subnets)
    subnet = f"10.{100 + number // 256}.{number % 256}.0/24"
    ours = name in (OURS, OURS_TCX)
    ipam: Json = {"type": "portwright" if ours else "host-local", "ranges": [[{"subnet": subnet}]]}
    ipam["routes"] = [{"dst": "0.0.0.0/0"}]
    plugin: Json = {"ipam": ipam}
    if not ours:
        ipam["dataDir"] = str(host.base / "host-local")
    more: list[Json] = []
    match name:
        case str() if ours:
            plugin |= {"type": "portwright", "attach": "tcx" if name == OURS_TCX else "clsact"}
            if chained:
                plugin |= {"masquerade": True, "capabilities": {"portMappings": True, "bandwidth": True}}
        case _ if name == BRIDGE:
            plugin |= {"type": "bridge", "bridge": f"br{number}", "isGateway": True, "ipMasq": chained}
        case _ if name == PTP:
            plugin |= {"type": "ptp", "ipMasq": chained}
        case _ if name == MACVLAN:
            plugin |= {"type": "macvlan", "master": "up0", "mode": "bridge"}
        case _:
            raise ValueError(f"{name} is no CNI contender")
    if chained and not ours:
        more = [
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
            {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        ]
    return {"cniVersion": CNI_VERSION, "name": f"net{number}", "plugins": [plugin, *more]}


def pair(name: str, host: Host) -> tuple[Sandbox, Sandbox, str]:
    """Two sandboxes of a contender that reach each other, and the second one's IPv4 address."""
    a, b = host.sandbox(), host.sandbox()
    if name == VETH:
        a.ns.run(
            ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.ns.path.name]
        )
        _number((a, b))
        return a, b, "10.99.0.2"
    if name == BRIDGE_BY_HAND:
        host.ns.run(["ip", "link", "add", "br0", "type", "bridge"])
        host.ns.run(["ip", "link", "set", "br0", "up"])
        for side, sandbox in (("a", a), ("b", b)):
            command = ["ip", "link", "add", f"v{side}", "type", "veth", "peer", "name", "eth0", "netns"]
            host.ns.run([*command, sandbox.ns.path.name])
            host.ns.run(["ip", "link", "set", f"v{side}", "master", "br0", "up"])
        _number((a, b))
        return a, b, "10.99.0.2"
    conf = conflist(name, host)
    addresses = []
    for sandbox in (a, b):
        result = host.runtime.add(conf, sandbox.id, sandbox.path)
        addresses.append(str(result["ips"][0]["address"]).partition("/")[0])
    # The first packet resolves neighbours; what is measured comes after it.
    a.ns.run(["ping", "-c", "1", "-W", "2", addresses[1]])
    return a, b, addresses[1]


def _number(sandboxes: Sequence[Sandbox]) -> None:
    for last, sandbox in enumerate(sandboxes, 1):
        sandbox.ns.ip_batch(f"addr add 10.99.0.{last}/24 dev eth0", "link set eth0 up")
    sandboxes[0].ns.run(["ping", "-c", "1", "-W", "2", "10.99.0.2"])


def spinning() -> str:
    """The machine's load now, as /proc/loadavg has it: noise that the reader has to know of."""
    return Path("/proc/loadavg").read_text().strip().rpartition(" ")[0]
