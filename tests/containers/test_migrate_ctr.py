"""``port migrate`` with containers that containerd and the reference bridge plugin made."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import cast

import pytest

from portwright.kernel import netns
from tests.deadline import wait_until
from tests.fix_containerd import PAGE, ROOTFS, Runtimes
from tests.fix_daemon import WORLD4
from tests.fix_netns import TestNetns
from tests.netns import bridge_lab as lab

pytestmark = pytest.mark.containers

GATEWAY4, GATEWAY6 = "10.87.0.1", "fd87::1"
PLUGIN = {
    "type": "bridge",
    "bridge": "cni0",
    "isGateway": True,
    "ipMasq": True,
    "hairpinMode": True,
    "ipam": {
        "type": "host-local",
        "ranges": [[{"subnet": "10.87.0.0/24"}], [{"subnet": "fd87::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    },
}


class Inside:
    """A container's namespace, as far as tests.netns.bridge_lab asks for one."""

    def __init__(self, path: str) -> None:
        """By a path that leads there now."""
        self.fd = netns.open_netns(path)
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"

    def entered(self) -> netns.entered:
        """This thread inside."""
        return netns.entered(self.fd)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)


def _started(containerd: Runtimes, name: str, *command: str) -> dict[int, str]:
    """A running container; its addresses by family."""
    line = ["ctr", "run", "--rm", "--cni", "--env", "PATH=/bin", "--rootfs", ROOTFS, name]
    containerd.start(name, *line, *command)
    up = re.compile(rf"^{name}\s+\d+\s+RUNNING", re.MULTILINE)
    wait_until(lambda: up.search(containerd.run("ctr", "task", "list")), 20, containerd.log(name))
    said = containerd.ctr_read(name, "ip", "addr", "show", "eth0")
    found = re.findall(r"inet6? (\S+)/\d+ ", said)
    return {6 if ":" in a else 4: a for a in found if not a.startswith("fe80:")}


def _pings(containerd: Runtimes, address: str) -> bool:
    said = containerd.ctr_exec("client", "ping", "-c", "1", "-W", "1", address, check=False)
    return "1 packets received" in said


def test_the_bridge_plugins_containers_leave_it(
    containerd: Runtimes, world: TestNetns, record_property: Callable[[str, object], None]
) -> None:
    """They reach each other, the host and the world (by the plugin's own masquerading) during and after it,
    the bridge is gone; containerd ends them as if nothing had been, and what is left is ours to delete."""
    daemon, host = containerd.daemon, containerd.daemon.host
    containerd.conflist("cni", PLUGIN)
    web = _started(containerd, "web", "httpd", "-f", "-h", "/www")
    client = _started(containerd, "client", "sleep", "600")
    tasks = sorted(containerd.run("ctr", "task", "list").splitlines())
    for address in (f"{web[4]}", f"[{web[6]}]"):
        containerd.served(f"http://{address}/")
    wait_until(lambda: _pings(containerd, GATEWAY6), 10, "the bridge to be sure of its own address")
    daemon.cli("network", "create", "cni0", "--subnet", "10.87.0.0/24", "--subnet", "fd87::/64")
    with daemon.client() as api, ExitStack() as stack:
        (planned,) = api.port_migrate("cni0", dry_run=True).bridges
        inside = {
            p.addresses[0].address: stack.enter_context(closing(Inside(p.sandbox.path)))
            for p in planned.ports
        }
        a, b = (cast("TestNetns", inside[addresses[4]]) for addresses in (client, web))
        idle = [
            stack.enter_context(lab.idle(a, b, web[6], 22)),
            stack.enter_context(lab.idle(b, world, WORLD4, 23)),
        ]
        running = stack.enter_context(
            lab.streams(
                ("control", world, world, "127.0.0.1", 5000),
                ("container to container", a, b, web[4], 5001),
                ("container to the world, masqueraded", b, world, WORLD4, 5002),
                ("container to host", a, host, GATEWAY6, 5003),
            )
        )
        assert api.port_migrate("cni0", remove_bridge=True).bridges[0].removed
        noise, *gaps = [stream.advance() for stream in running]
        for connection in idle:
            connection.alive()
    lab.judge(noise, gaps, record_property)
    assert "cni0" not in lab.names(host)
    for url in (f"http://{web[4]}/", f"http://[{web[6]}]/"):
        assert containerd.ctr_read("client", "wget", "-q", "-O", "-", url) == PAGE
        assert containerd.http(url) == PAGE
    for address in (WORLD4, GATEWAY4, GATEWAY6, web[6]):
        containerd.ctr_exec("client", "ping", "-c", "1", "-W", "2", address)
    assert sorted(containerd.run("ctr", "task", "list").splitlines()) == tasks
    held = {a.address for port in containerd.ports() for a in port.addresses}
    assert held == {*web.values(), *client.values()}

    for name in ("web", "client"):
        containerd.ctr_stop(name)
    wait_until(lambda: {p.state for p in containerd.ports()} == {"detached"}, 10, "the ports to be detached")
    with daemon.client() as api:
        for port in api.port_list():
            api.port_delete(port.port_id)
    assert [one for one in lab.names(host) if one not in {"lo", "up0"}] == []
