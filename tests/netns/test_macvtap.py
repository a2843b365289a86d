"""The model macvtap: the guest's card is the device in the sandbox's namespace, by a macvtap on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from portwright.kernel import macvtap
from portwright.model.errors import InvalidInput, NotFound
from tests.deadline import wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, open_fds
from tests.netns.guest_lab import guest, guest_on

pytestmark = pytest.mark.netns


@pytest.fixture
def vm(sandboxes: SandboxFactory, netns_factory: NetnsFactory) -> Iterator[Sandbox]:
    """A port of the model in a namespace; ``ns`` is its guest."""
    with guest_on(sandboxes, netns_factory, "macvtap") as made:
        yield made


def test_the_stack_beneath_a_macvtap_hears_nothing(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory
) -> None:
    """What is for the guest is answered by the guest alone: not by the namespace's own addresses, with a
    hypervisor and without."""
    box, other = sandboxes(model="macvtap"), sandboxes()
    for address in (box.ip4, box.ip6):
        assert not other.ping(address), address
    with guest(box.ns, inside := netns_factory(), box.port):
        inside.run(["ip", "addr", "flush", "dev", "eth0"])
        for address in (box.ip4, box.ip6):
            assert not other.ping(address), address


def test_multicasts_reach_a_guest_behind_a_macvtap(vm: Sandbox, daemon: Daemon) -> None:
    """Of groups that the guest is in and the namespace is not."""
    daemon.host.run(["ip", "addr", "add", "fe80::77/64", "dev", vm.port.rep_name, "nodad"])
    vm.run(["ip", "addr", "add", "ff02::7777/128", "dev", "eth0", "autojoin"])
    vm.run(["sysctl", "-qw", "net.ipv6.icmp.echo_ignore_multicast=0"])
    ping = ["ping", "-n", "-c1", "-W2", "-I", vm.port.rep_name, "ff02::7777"]
    wait_until(lambda: daemon.host.run(ping, check=False).returncode == 0, 10, "the guest's answer")


def test_the_guard_holds_a_guest_behind_a_macvtap(
    vm: Sandbox, sandboxes: SandboxFactory, daemon: Daemon
) -> None:
    """Another address of its own making gets it nowhere, and the drop is told."""
    other = sandboxes()
    vm.run(["ip", "addr", "add", "10.77.0.250/32", "dev", "eth0"])
    ping = ["ping", "-n", "-c1", "-W1", "-I", "10.77.0.250", other.ip4]
    assert vm.run(ping, check=False).returncode != 0
    with daemon.client() as client:
        (carried,) = client.stats(vm.port.port_id)
    assert carried.drops.from_port > 0


def test_unplug_and_plug_of_a_macvtap(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """Without its device there is no macvtap; a new device has one again, in another sandbox as well."""
    box, inside, elsewhere = sandboxes(model="macvtap"), netns_factory(), netns_factory()
    with daemon.client() as client:
        client.port_unplug(box.port.port_id)
        assert _links(box) == ["lo"]
        port = client.port_plug(box.port.port_id, elsewhere.path)
        moved = Sandbox(elsewhere, port)
        assert port.tap == box.port.tap
        assert sorted(_links(moved)) == sorted(["lo", "eth0", port.tap])
        with guest(elsewhere, inside, port):
            assert Sandbox(inside, port).ping("169.254.1.1")
        client.port_delete(port.port_id)
    assert _links(moved) == ["lo"]


def test_an_mtu_is_told_to_a_macvtap(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """Representor, device and macvtap, at the start and when it changes, to less and to more."""
    box = sandboxes(model="macvtap", mtu=1450)
    assert _mtus(daemon, box) == {1450}
    for mtu in (1400, 9000):
        with daemon.client() as client:
            client.port_set(box.port.port_id, mtu=mtu)
        assert _mtus(daemon, box) == {mtu}


def test_a_macvtap_has_the_devices_mac_and_its_queues(sandboxes: SandboxFactory) -> None:
    """Its queues can all be opened; nothing stays open of them, and no name of the device is needed."""
    box = sandboxes(model="macvtap", queues=2)
    shown = json.loads(box.run(["ip", "-d", "-j", "link", "show", box.port.tap]).stdout)[0]
    assert (shown["address"], shown["num_tx_queues"]) == (box.port.mac, 2)
    assert (shown["num_rx_queues"], shown["linkinfo"]["info_data"]["mode"]) == (2, "passthru")
    before = open_fds()
    with ExitStack() as opened:
        for fd in macvtap.open_queues(box.ns.fd, box.port.tap, 2):
            opened.callback(os.close, fd)
        assert open_fds() == before + 2
    for name in ("eth0", "nothing", "../lo"):
        with pytest.raises(NotFound, match=name):
            macvtap.open_queues(box.ns.fd, name, 1)
    assert open_fds() == before
    with pytest.raises(InvalidInput, match="queues"):
        sandboxes(queues=2)


def test_a_dry_run_shows_the_macvtap(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """As commands; and makes nothing."""
    box = sandboxes()
    with daemon.client() as client:
        plan = client.port_plan("n1", box.ns.path, ifname="eth1", model="macvtap")
    (step,) = [step for step in plan.plan if step.op == "CreateMacvtap"]
    assert "type macvtap mode passthru" in step.command
    assert sorted(_links(box)) == ["eth0", "lo"]


def test_cni_answers_with_a_macvtap(daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """In the shape of tcfilter's answer. CHECK sees it go, and a MAC that is not the device's."""
    ns = netns_factory()
    cni = Cni(daemon, "vms", model="macvtap")
    added = cni.add("vm-1", ns)
    assert added.ok, added
    _representor, device, tap, card = added.answer["interfaces"]
    assert (device["name"], device["sandbox"]) == ("eth0", ns.path)
    assert (tap["name"], tap["sandbox"]) == (card["name"], ns.path)
    assert (card["mac"], card["sandbox"]) == (device["mac"], "vm-1")
    assert {ip["interface"] for ip in added.answer["ips"]} == {3}

    def check() -> str:
        found = cni.run("CHECK", "vm-1", ns.path, prevResult=added.answer)
        return "" if found.ok else f"{found.answer['msg']} {found.answer.get('details', '')}"

    assert check() == ""
    ns.run(["ip", "link", "set", tap["name"], "down"])
    assert f"macvtap {tap['name']} is down" in check()
    ns.run(["ip", "link", "del", tap["name"]])
    assert f"macvtap {tap['name']} is gone from eth0" in check()
    assert cni.delete("vm-1", ns).ok
    assert ns.run(["ip", "-o", "link"]).stdout.count("\n") == 1


def _mtus(daemon: Daemon, box: Sandbox) -> set[int]:
    ends = ((box.ns, "eth0"), (box.ns, box.port.tap), (daemon.host, box.port.rep_name))
    return {json.loads(ns.run(["ip", "-j", "link", "show", name]).stdout)[0]["mtu"] for ns, name in ends}


def _links(box: Sandbox) -> list[str]:
    return [link["ifname"] for link in json.loads(box.run(["ip", "-j", "link", "show"]).stdout)]
