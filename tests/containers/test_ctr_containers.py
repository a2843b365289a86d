"""containerd's own client: ``ctr run --cni``, with runc and with crun."""

from __future__ import annotations

import json

import pytest

from tests.deadline import wait_until
from tests.fix_containerd import PAGE, Runtimes, addresses, own
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.containers


@pytest.mark.parametrize("binary", ["runc", "crun"])
def test_two_containers_talk_over_both_families(containerd: Runtimes, binary: str) -> None:
    """Containers made by runc and by crun ping and fetch from each other, the gateway and the world."""
    option = ("--runc-binary", binary)
    if binary == "crun":
        containerd.hide_hybrid_cgroups()
    web = containerd.ctr_serve("web", options=option)
    containerd.ctr_run("client", "sleep", "600", options=option)

    for address in (*addresses(web), "169.254.1.1", WORLD4, WORLD6):
        containerd.ctr_exec("client", "ping", "-c", "1", "-W", "2", address)
    four, six = addresses(web)
    for url in (f"http://{four}/", f"http://[{six}]/"):
        assert containerd.ctr_read("client", "wget", "-q", "-O", "-", url) == PAGE


def test_a_containers_end_frees_everything(containerd: Runtimes) -> None:
    """After ctr's DEL no port, device, address or rule of the containers is left; a new one works."""
    containerd.conflist("n1", own(portMappings=[{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]))
    containerd.ctr_run("one", "sleep", "600")
    containerd.conflist("n1", own())
    containerd.ctr_run("two", "sleep", "600")
    assert len(containerd.ports()) == 2

    containerd.ctr_stop("one")
    containerd.ctr_stop("two")
    containerd.nothing_left()

    containerd.ctr_run("three", "sleep", "600")
    containerd.ctr_exec("three", "ping", "-c", "1", "-W", "2", WORLD4)


def test_the_result_that_the_runtime_caches_is_what_the_container_has(containerd: Runtimes) -> None:
    """Interfaces, addresses, MAC and MTU in the CNI result are those of the device inside."""
    port = containerd.ctr_run("one", "sleep", "600")
    folder = containerd.box.path("/var/lib/cni/results")
    cached = json.loads((folder / f"n1-{containerd.name}-one-eth0").read_text())["result"]

    host_end, device = cached["interfaces"]
    assert host_end["name"] == port.rep_name
    assert not host_end.get("sandbox")
    assert device["sandbox"].startswith("/proc/")
    inside = containerd.ctr_read("one", "ip", "addr", "show", "eth0")
    assert f"link/ether {device['mac']}" in inside
    assert f"mtu {port.mtu}" in inside
    for ip in cached["ips"]:
        assert f" {ip['address']} " in inside
        assert ip["interface"] == 1
    routes = containerd.ctr_read("one", "ip", "route") + containerd.ctr_read("one", "ip", "-6", "route")
    assert routes.count("default via") == 2


def test_a_published_port_is_answered_from_everywhere(containerd: Runtimes, world: TestNetns) -> None:
    """Mapped in the list: the world, the host, its loopback, a neighbour and the container itself."""
    containerd.conflist("n1", own(portMappings=[{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]))
    containerd.ctr_serve("web")
    containerd.conflist("n1", own())
    containerd.ctr_run("client", "sleep", "600")

    for url in (f"http://{HOST4}:8080/", f"http://[{HOST6}]:8080/"):
        assert world.run(["curl", "-s", "--max-time", "5", url]).stdout == PAGE
        for name in ("client", "web"):
            assert containerd.ctr_read(name, "timeout", "5", "wget", "-q", "-O", "-", url) == PAGE, name
        assert containerd.http(url) == PAGE
    assert containerd.http("http://127.0.0.1:8080/") == PAGE

    containerd.ctr_stop("web")
    assert containerd.http(f"http://{HOST4}:8080/") == ""


def test_a_host_port_that_is_taken_refuses_the_container(containerd: Runtimes) -> None:
    """The second container that wants a host port does not start, and leaves nothing; the first keeps it."""
    containerd.conflist("n1", own(portMappings=[{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]))
    containerd.ctr_serve("web")

    line = ("ctr", "run", "--rm", "--cni", "--env", "PATH=/bin", "--rootfs", "/opt/rootfs", "second", "true")
    said = containerd.fails(*line)
    assert "8080" in said
    assert len(containerd.ports()) == 1
    assert containerd.http(f"http://{HOST4}:8080/") == PAGE


def test_a_device_that_the_container_deletes_detaches_its_port(containerd: Runtimes) -> None:
    """Root with CAP_NET_ADMIN deletes eth0: the port is detached, and DEL at the end still frees all."""
    port = containerd.ctr_run("one", "sleep", "600", options=("--cap-add", "CAP_NET_ADMIN"))
    containerd.ctr_exec("one", "ip", "link", "del", "eth0")

    def state() -> str:
        with containerd.daemon.client() as client:
            return client.port_show(port.port_id).state.value

    wait_until(lambda: state() == "detached", 10, "the port to be detached")
    containerd.ctr_stop("one")
    containerd.nothing_left()
