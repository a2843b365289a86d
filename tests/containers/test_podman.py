"""podman with its CNI back end, with runc and with crun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from portwright.model.port import Port
from tests.deadline import wait_until
from tests.fix_containerd import BIN_DIR, CONF_DIR, PAGE, ROOTFS, Runtimes, addresses, own
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.containers

CONFIG = f"""
[containers]
default_ulimits = ["nofile=1024:20000", "nproc=1000:1000"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
[network]
network_backend = "cni"
cni_plugin_dirs = ["{BIN_DIR}"]
network_config_dir = "{CONF_DIR}"
"""


class Podman:
    """podman in the box of ``runtimes``."""

    def __init__(self, runtimes: Runtimes) -> None:
        """Write its configuration, and policy files that it insists on."""
        self.runtimes = runtimes
        runtimes.box.path("/etc/containers/containers.conf").write_text(CONFIG)
        policy = {"default": [{"type": "insecureAcceptAnything"}]}
        runtimes.box.path("/etc/containers/policy.json").write_text(json.dumps(policy))

    def __call__(self, *words: str, check: bool = True) -> str:
        """``podman WORDS``; its output."""
        return self.runtimes.run("podman", "--storage-driver", "vfs", *words, check=check).strip()

    def start(self, name: str, *command: str, options: tuple[str, ...] = (), runtime: str = "runc") -> Port:
        """``podman run -d`` on network n1; its port."""
        words = [
            *("--runtime", runtime, "run", "-d", "--name", name, "--network", "n1", "--env", "PATH=/bin"),
            *("--cap-add", "NET_RAW", "--cgroup-parent", f"/{self.runtimes.name}"),
            *(*options, "--rootfs", ROOTFS),
        ]
        port = self.runtimes.port_of(self(*words, *command))
        assert port is not None
        return port


@pytest.fixture
def podman(runtimes: Runtimes) -> Iterator[Podman]:
    """podman, its containers removed at the end (a failed test's too)."""
    made = Podman(runtimes)
    yield made
    made("rm", "-f", "-t", "0", "-a", check=False)


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_containers_of_podman_talk(podman: Podman, runtime: str) -> None:
    """Containers reach each other over both families, and the world, whatever the OCI runtime."""
    if runtime == "crun":
        podman.runtimes.hide_hybrid_cgroups()
    web = podman.start("web", "httpd", "-f", "-h", "/www", runtime=runtime)
    podman.start("client", "sleep", "1000", runtime=runtime)
    four, six = addresses(web)
    for url in (f"http://{four}/", f"http://[{six}]/"):
        podman.runtimes.served(url)
        assert podman("--runtime", runtime, "exec", "client", "wget", "-q", "-O", "-", url) == PAGE
    for address in (WORLD4, WORLD6):
        podman("--runtime", runtime, "exec", "client", "ping", "-c", "1", "-W", "2", address)


def test_a_port_published_by_podman(podman: Podman, world: TestNetns) -> None:
    """``podman run -p`` is answered from outside over both families, and ``podman port`` lists it."""
    podman.start("web", "httpd", "-f", "-h", "/www", options=("-p", "8080:80"))

    def fetch(url: str) -> str:
        return world.run(["curl", "-s", "--max-time", "2", url], check=False).stdout

    wait_until(lambda: fetch(f"http://{HOST4}:8080/") == PAGE, 10, "an answer")
    assert fetch(f"http://[{HOST6}]:8080/") == PAGE
    assert "8080" in podman("port", "web")
    podman("rm", "-f", "-t", "0", "web")
    assert fetch(f"http://{HOST4}:8080/") == ""
    podman.runtimes.nothing_left()


def test_inspect_shows_what_the_port_has(podman: Podman) -> None:
    """Addresses, MAC and gateway in ``podman inspect`` are the port's."""
    port = podman.start("one", "sleep", "1000")
    shown: Any = json.loads(podman("inspect", "one"))[0]["NetworkSettings"]["Networks"]["n1"]
    four, six = addresses(port)
    assert (shown["IPAddress"], shown["GlobalIPv6Address"]) == (four, six)
    assert shown["MacAddress"] == port.mac


def test_an_address_and_a_mac_asked_for(podman: Podman) -> None:
    """``podman run --ip --mac-address`` arrive as the ips and mac capabilities, and the port has them."""
    port = podman.start(
        "one", "sleep", "1000", options=("--ip", "10.66.0.77", "--mac-address", "02:00:00:00:00:77")
    )
    assert addresses(port)[0] == "10.66.0.77"
    assert port.mac == "02:00:00:00:00:77"


def test_stop_start_and_remove(podman: Podman) -> None:
    """``podman stop`` frees the port, ``start`` makes a new one that works, ``rm`` leaves nothing."""
    podman.start("one", "sleep", "1000")
    podman("stop", "-t", "0", "one")
    podman.runtimes.nothing_left()
    podman("start", "one")
    podman("exec", "one", "ping", "-c", "1", "-W", "2", WORLD4)
    podman("rm", "-f", "-t", "0", "one")
    podman.runtimes.nothing_left()


def test_a_second_network_is_plugged_into_a_running_container(podman: Podman) -> None:
    """``podman network connect`` adds a port, with its own address and a route; ``disconnect`` takes it."""
    runtimes = podman.runtimes
    with runtimes.daemon.client() as client:
        client.network_create("n2", subnets=["10.67.0.0/24"])
    body = {"cniVersion": "1.0.0", "name": "n2", "plugins": [own()]}
    runtimes.box.path(f"{CONF_DIR}/20-n2.conflist").write_text(json.dumps(body))
    podman.start("one", "sleep", "1000")
    podman("network", "connect", "n2", "one")
    (second,) = [p for p in runtimes.ports() if p.network == "n2"]
    inside = podman("exec", "one", "ip", "addr", "show", second.ifname)
    assert f"inet {second.addresses[0].address}/" in inside
    podman("exec", "one", "ping", "-c", "1", "-W", "2", WORLD4)  # the default route is still the first's
    podman("network", "disconnect", "n2", "one")
    assert [p.network for p in runtimes.ports()] == ["n1"]
