"""pytest plugin: real container runtimes beside a real daemon.

The runtimes run in a box (demo/box.py) in the namespace ``host``, where they find the installed plugin and
the reference plugins in /opt/cni/bin, and network lists in /etc/cni/net.d, as on a user's machine. The
daemon is outside of the box: it sees neither the box's mounts nor its process numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from demo.box import Box, make_rootfs, remove_cgroups
from portwright.cni.install import CAPABILITIES
from portwright.model.port import Port, PortState
from tests.deadline import wait_until
from tests.fix_daemon import Daemon
from tests.fix_netns import TestNetns

BIN_DIR, CONF_DIR, ROOTFS = "/opt/cni/bin", "/etc/cni/net.d", "/opt/rootfs"
REFERENCE_PLUGINS = Path("/usr/lib/cni")
SUBNETS = ("10.66.0.0/24", "fd66::/64")
PAGE = "hello from a container"
PAUSE_IMAGE = "registry.k8s.io/pause:3.6"
CONTAINERD_CONFIG = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  sandbox_image = "{PAUSE_IMAGE}"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "native"
"""


class Runtimes:
    """The box, with what the tests do in it. ``name`` marks what it makes outside: cgroups."""

    def __init__(self, daemon: Daemon, host: TestNetns) -> None:
        """Start the box and install the plugin there; containerd is not started."""
        self.daemon = daemon
        self.name = f"pwt-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.work = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self._clients: list[subprocess.Popen[bytes]] = []
        try:
            self.box = Box(self.work, host.path, {"CONTAINERD_NAMESPACE": self.name})
        except BaseException:
            shutil.rmtree(self.work, ignore_errors=True)
            raise
        self.rootfs = make_rootfs(self.box.path(ROOTFS))
        (self.rootfs / "www/index.html").write_text(PAGE)
        self.daemon.cli(
            "install", "--cni-bin-dir", str(self.box.path(BIN_DIR)), "--cni-conf-dir", "/nonexistent"
        )
        for plugin in REFERENCE_PLUGINS.iterdir():
            self.box.path(f"{BIN_DIR}/{plugin.name}").symlink_to(plugin)

    def close(self) -> None:
        """End everything inside, and take away what was made outside."""
        self.box.close()
        for client in self._clients:
            client.wait(10)
        remove_cgroups(self.name)
        shutil.rmtree(self.work, ignore_errors=True)

    # -- commands --------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Run a command in the box; its output. With ``check``, AssertionError if it fails."""
        done = self.box.run(*command, timeout=timeout)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in the box, its output to :meth:`log` of ``name``; it ends with the box."""
        started = self.box.start(*command, log=self.work / f"{name}.log")
        self._clients.append(started)
        return started

    def fails(self, *command: str) -> str:
        """Run a command that must fail; its output and error."""
        done = self.box.run(*command)
        assert done.returncode != 0, f"{command} should have failed\n{done.stdout}"
        return done.stdout + done.stderr

    def http(self, url: str) -> str:
        """Fetch from the host's namespace; '' if there is no answer within two seconds."""
        return self.run("curl", "-s", "--max-time", "2", url, check=False)

    def succeeds(self, *command: str) -> bool:
        """Tell whether a command in the box succeeds."""
        return self.box.run(*command).returncode == 0

    def log(self, name: str) -> str:
        """What a background command has printed."""
        return (self.work / f"{name}.log").read_text()

    def conflist(self, name: str, *plugins: Mapping[str, Any], version: str = "1.0.0") -> None:
        """Write the only network list: ``plugins`` in order, in one step."""
        body = {"cniVersion": version, "name": name, "plugins": list(plugins)}
        folder = self.box.path(CONF_DIR)
        folder.mkdir(exist_ok=True)
        (folder / "new").write_text(json.dumps(body))
        (folder / "new").rename(folder / "10-test.conflist")

    def hide_hybrid_cgroups(self) -> None:
        """In the box, take a cgroup v2 mount beside v1 away, with which crun refuses to start."""
        unified = "/sys/fs/cgroup/unified"
        if self.box.path(unified).is_mount():
            self.run("umount", unified)

    # -- containerd and ctr ----------------------------------------------------------------------

    def start_containerd(self) -> None:
        """Start it and return once it serves. It finds its earlier state if it was killed."""
        config = self.box.path("/etc/containerd/config.toml")
        config.write_text(CONTAINERD_CONFIG)
        self.start("containerd", "containerd")
        wait_until(lambda: self.succeeds("ctr", "version"), 20, "containerd to serve")

    def kill_containerd(self) -> None:
        """SIGKILL to containerd alone; shims and containers stay."""
        pids = self.box.pids("containerd")
        assert len(pids) == 1, pids
        os.kill(pids[0], 9)
        wait_until(lambda: not self.box.pids("containerd"), 10, "containerd to end")

    def ctr_run(self, name: str, *command: str, options: Sequence[str] = ()) -> Port:
        """``ctr run --rm --cni`` in the background; the port, once the container runs."""
        line = ["ctr", "run", "--rm", "--cni", *options, "--env", "PATH=/bin", "--rootfs", ROOTFS, name]
        client = self.start(name, *line, *command)

        def running() -> Port | None:
            assert client.poll() is None, f"ctr ended with {client.returncode}:\n{self.log(name)}"
            # ctr starts the task, which exists already, when the whole chain of plugins is done.
            up = re.search(rf"^{name}\s+\d+\s+RUNNING", self.run("ctr", "task", "list"), re.MULTILINE)
            return self.port_of(f"{self.name}-{name}") if up else None

        found = wait_until(running, 20, f"container {name}")
        assert found is not None
        return found

    def ctr_serve(self, name: str, options: Sequence[str] = ()) -> Port:
        """:meth:`ctr_run` of a web server for PAGE on port 80; its port, once it answers the host."""
        port = self.ctr_run(name, "httpd", "-f", "-h", "/www", options=options)
        self.served(f"http://{addresses(port)[0]}/")
        return port

    def served(self, url: str) -> None:
        """Wait until the page is answered at ``url`` to the host."""
        wait_until(lambda: self.http(url) == PAGE, 10, f"an answer at {url}")

    def ctr_exec(self, name: str, *command: str, check: bool = True) -> str:
        """Run a command in a container; its output."""
        return self.run("ctr", "task", "exec", "--exec-id", uuid.uuid4().hex[:8], name, *command, check=check)

    def ctr_read(self, name: str, *command: str) -> str:
        """What a command in a container says that changes nothing and is never silent.

        ctr 1.6 stops its copying once the process has ended, and may lose all of it: asked again then.
        """
        return next(filter(None, (self.ctr_exec(name, *command) for _ in range(5))), "")

    def ctr_stop(self, name: str) -> None:
        """Kill the container's process, and wait for ``ctr run --rm`` to have cleaned up (CNI DEL too)."""
        self.run("ctr", "task", "kill", "--signal", "SIGKILL", name)
        wait_until(
            lambda: name not in self.run("ctr", "container", "list", "-q").split(), 20, f"{name} to be gone"
        )

    # -- ports -----------------------------------------------------------------------------------

    def ports(self) -> list[Port]:
        """The daemon's ports."""
        with self.daemon.client() as client:
            return list(client.port_list())

    def port_of(self, container_id: str, ifname: str = "eth0") -> Port | None:
        """The attached port of a container; None if it has none (yet)."""
        for port in self.ports():
            owner = port.owner
            if (owner.container_id, owner.ifname, port.state) == (container_id, ifname, PortState.ATTACHED):
                return port
        return None

    def leftovers(self) -> list[str]:
        """What the host's namespace has beside its uplink, and the daemon beside its networks."""
        links = json.loads(self.run("ip", "-json", "link", "show"))
        found = [f"link {one['ifname']}" for one in links if one["ifname"] not in {"lo", "up0"}]
        found += [f"port {port.port_id}" for port in self.ports()]
        with self.daemon.client() as client:
            for network in client.network_list():
                usage = client.network_show(network.name).usage
                found += [f"address in {one.ranges}" for one in usage if one.used]
        rules = self.run("nft", "list", "ruleset")
        found += [f"nft: {port} in\n{rules}" for port in ("8080", "8081") if port in rules]
        return found

    def nothing_left(self) -> None:
        """Wait for :meth:`leftovers` to be empty; AssertionError names what stays."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.leftovers(), 10, "everything to go")
        assert self.leftovers() == []


def own(**more: Any) -> dict[str, Any]:
    """Our plugin's object for a list, with all capabilities, and ``more`` keys."""
    return {"type": "portwright", "capabilities": dict.fromkeys(CAPABILITIES, True), **more}


def addresses(port: Port) -> tuple[str, str]:
    """(IPv4, IPv6) of a dual-stack port."""
    four = next(a.address for a in port.addresses if ":" not in a.address)
    six = next(a.address for a in port.addresses if ":" in a.address)
    return four, six


@pytest.fixture
def runtimes(daemon: Daemon, host: TestNetns) -> Iterator[Runtimes]:
    """A box with the plugin, and a list for network ``n1`` (dual-stack, masquerading)."""
    with daemon.client() as client:
        client.network_create("n1", subnets=list(SUBNETS), masquerade=True)
    made = Runtimes(daemon, host)
    try:
        made.conflist("n1", own())
        yield made
    finally:
        made.close()


@pytest.fixture
def containerd(runtimes: Runtimes) -> Runtimes:
    """The same, with containerd running."""
    runtimes.start_containerd()
    return runtimes
