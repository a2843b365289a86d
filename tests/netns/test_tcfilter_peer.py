"""A tcfilter by ``--join peer``: what the guest sends goes from its tap straight to the representor."""

from __future__ import annotations

import json

import pytest

from tests.fix_daemon import WORLD4, Daemon, Networks, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.guest_lab import guest, guest_on

pytestmark = pytest.mark.netns


def test_the_devices_egress_is_passed_by(
    daemon: Daemon, netns_factory: NetnsFactory, networks: Networks
) -> None:
    """A filter that somebody has on the device's egress sees what a guest sends by our other join, and none
    of it by this one. The representor's own counter, and the port's, count both.
    """
    networks("n1")
    seen = {}
    for join in ("bpf", "peer"):
        box, inside = netns_factory(), netns_factory()
        with daemon.client() as client:
            port = client.port_create("n1", box.path, name=box.name, model="tcfilter", join=join)
        assert port.join == join
        box.run(["tc", "filter", "add", "dev", "eth0", "egress", "pref", "5", *_COUNTING])
        with guest(box, inside, port):
            assert Sandbox(inside, port).ping(WORLD4)
            before = _received(daemon, port.rep_name)
            for _ in range(5):
                assert Sandbox(inside, port).ping(WORLD4)
            assert _received(daemon, port.rep_name) - before >= 5
        seen[join] = _counted(box.run(["tc", "-s", "-j", "filter", "show", "dev", "eth0", "egress"]).stdout)
        with daemon.client() as client:
            (carried,) = client.stats(port.port_id)
        assert carried.from_port.total.packets >= 6
    assert seen["bpf"] >= 6
    assert seen["peer"] == 0


def test_the_next_device_is_joined_so_too(
    daemon: Daemon, netns_factory: NetnsFactory, networks: Networks
) -> None:
    """After unplug and plug, and after the daemon was killed in between, it is the same program."""
    networks("n1")
    box, inside, elsewhere = netns_factory(), netns_factory(), netns_factory()
    with daemon.client() as client:
        port = client.port_create("n1", box.path, name=box.name, model="tcfilter", join="peer")
    assert _programs(box, "eth0", port.tap) == {"eth0": "pw_join", port.tap: "pw_join_peer"}
    with daemon.client() as client:
        client.port_unplug(port.port_id)
    daemon.kill()
    daemon.start()
    with daemon.client() as client:
        port = client.port_plug(port.port_id, elsewhere.path)
    assert port.join == "peer"
    assert _programs(elsewhere, "eth0", port.tap) == {"eth0": "pw_join", port.tap: "pw_join_peer"}
    with guest(elsewhere, inside, port):
        assert Sandbox(inside, port).ping("169.254.1.1")


def test_nothing_passes_a_representor_that_is_down(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """As with a cable that is pulled, though the way there is by no device that has one."""
    other = sandboxes()
    with guest_on(sandboxes, netns_factory, "tcfilter", join="peer") as vm, daemon.client() as client:
        assert vm.ping(other.ip4)
        client.port_set(vm.port.port_id, admin="down")
        assert not vm.ping(other.ip4)
        client.port_set(vm.port.port_id, admin="up")
        assert vm.ping(other.ip4)


#: Counted as it is copied to where nobody takes it, and left to the next filter.
_COPY = "action mirred egress mirror dev lo continue"
_COUNTING = f"protocol ip u32 match u32 0 0 {_COPY}".split()


def _counted(shown: str) -> int:
    """Packets that the action of the one u32 filter counted."""
    (copy,) = (a for f in json.loads(shown) for a in f.get("options", {}).get("actions", []))
    return int(copy["stats"]["packets"])


def _received(daemon: Daemon, rep: str) -> int:
    (link,) = json.loads(daemon.host.run(["ip", "-s", "-j", "link", "show", rep]).stdout)
    return int(link["stats64"]["rx"]["packets"])


def _programs(box: TestNetns, *names: str) -> dict[str, str]:
    """The name of the program that each device's filter of ours runs."""
    found = {}
    for name in names:
        (ours,) = json.loads(box.run(["tc", "-j", "filter", "show", "dev", name, "ingress"]).stdout)[-1:]
        found[name] = ours["options"]["prog"]["name"]
    return found
