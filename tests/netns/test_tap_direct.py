"""The model tap: the tap is the device, its host end the representor, and nothing is in the sandbox."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from portwright.kernel import tap
from portwright.model.errors import Conflict, KernelFailed, NotFound
from portwright.model.network import GATEWAY_MAC
from portwright.vmm import vhost
from portwright.vmm.cards import nic_of, open_card
from tests.deadline import wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory, open_fds
from tests.netns.guest_lab import guest, guest_on

pytestmark = pytest.mark.netns


@pytest.fixture
def vm(sandboxes: SandboxFactory, netns_factory: NetnsFactory) -> Iterator[Sandbox]:
    """A port of the model in a namespace; ``ns`` is its guest."""
    with guest_on(sandboxes, netns_factory, "tap") as made:
        yield made


def test_two_guests_on_taps_reach_each_other(
    vm: Sandbox, sandboxes: SandboxFactory, netns_factory: NetnsFactory
) -> None:
    """Neither has an other side to redirect to."""
    box, inside = sandboxes(model="tap"), netns_factory()
    with guest(box.ns, inside, box.port):
        for address in (box.ip4, box.ip6):
            assert vm.ping(address), address


def test_the_representor_is_the_tap(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """Under the representor's name, with its MAC, queues and altnames, and nothing in the sandbox; a port
    that nobody holds is whole, without a carrier, and CHECK has nothing to say."""
    box = sandboxes(model="tap", queues=2)
    port = box.port
    shown = json.loads(daemon.host.run(["ip", "-d", "-j", "link", "show", port.rep_name]).stdout)[0]
    facts = shown["linkinfo"]["info_data"]
    assert (port.tap, shown["address"], facts["type"]) == (port.rep_name, GATEWAY_MAC, "tap")
    assert (facts["multi_queue"], facts["vnet_hdr"], facts["persist"]) == (True, True, True)
    assert f"port-{port.port_id}" in shown["altnames"]
    assert "NO-CARRIER" in shown["flags"]
    assert _links(box) == ["lo"]
    with daemon.client() as client:
        assert client.node_status().problems == ()
    before = open_fds()
    with open_card(nic_of(port), box.ns.fd) as card:
        assert (len(card.fds), card.vhost_fds) == (2, ())
        assert open_fds() == before + 2
    with pytest.raises(Conflict, match=port.tap):
        open_card(replace(nic_of(port), queues=1), box.ns.fd)
    with pytest.raises(NotFound, match="namespace"):
        open_card(replace(nic_of(port), home=1 << 63), box.ns.fd)
    with pytest.raises(NotFound, match=port.tap):  # and none is made
        open_card(replace(nic_of(port), home=0), box.ns.fd)
    assert _links(box) == ["lo"]
    assert open_fds() == before


def test_a_card_with_vhost(sandboxes: SandboxFactory) -> None:
    """It has a descriptor of vhost-net for each queue where there is one; else there is no card, and nothing
    stays open."""
    box = sandboxes(model="tap", queues=2)
    before, nic = open_fds(), nic_of(box.port, vhost=True)
    if vhost.lacking():
        with pytest.raises(KernelFailed, match="vhost-net"):
            open_card(nic, box.ns.fd)
    else:
        with open_card(nic, box.ns.fd) as card:
            assert (len(card.fds), len(card.vhost_fds)) == (2, 2)
    assert open_fds() == before


def test_policy_limits_and_link_hold_on_a_tap(vm: Sandbox, sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """The guard drops what is not the port's, ``admin down`` stops traffic, ``why`` says the way."""
    other = sandboxes()
    vm.run(["ip", "addr", "add", "10.77.0.250/32", "dev", "eth0"])
    ping = ["ping", "-n", "-c1", "-W1", "-I", "10.77.0.250", other.ip4]
    assert vm.run(ping, check=False).returncode != 0
    with daemon.client() as client:
        (carried,) = client.stats(vm.port.port_id)
        assert carried.drops.from_port > 0
        client.port_set(vm.port.port_id, admin="down")
        assert not other.ping(vm.ip4)
        client.port_set(vm.port.port_id, admin="up")
    for address in (vm.ip4, vm.ip6):
        wait_until(lambda a=address: other.ping(a), 10, f"the way back to {address}")  # type: ignore[misc]
    said = daemon.cli("why", other.port.port_id, vm.port.port_id, "--proto", "tcp", "--dport", "80").stdout
    assert "it is for a tap" in said


def test_unplug_and_plug_of_a_tap(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """Without its device a port keeps its addresses; a new tap is again the representor, until deleted."""
    box, inside, elsewhere = sandboxes(model="tap"), netns_factory(), netns_factory()
    with daemon.client() as client:
        detached = client.port_unplug(box.port.port_id)
        assert (detached.state, detached.addresses) == ("detached", box.port.addresses)
        assert box.port.rep_name not in _host_links(daemon)
        port = client.port_plug(box.port.port_id, elsewhere.path)
        with guest(elsewhere, inside, port):
            assert Sandbox(inside, port).ping("169.254.1.1")
            client.port_delete(port.port_id)  # while it is held
            assert box.port.rep_name not in _host_links(daemon)


def test_a_tap_that_another_deletes_is_a_port_detached(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """As with a device that a sandbox deletes; and it can be plugged again."""
    box = sandboxes(model="tap")
    daemon.host.run(["ip", "link", "del", box.port.tap])
    with daemon.client() as client:
        wait_until(lambda: client.port_show(box.port.port_id).state == "detached", 10, "the port detached")
        assert client.port_plug(box.port.port_id, box.ns.path).state == "attached"


def test_an_mtu_is_told_to_a_tap(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """At the start and when it changes."""
    box = sandboxes(model="tap", mtu=1450)
    assert _mtu(daemon, box) == 1450
    with daemon.client() as client:
        client.port_set(box.port.port_id, mtu=9000)
    assert _mtu(daemon, box) == 9000


def test_a_second_tap_of_a_sandbox_has_its_networks_routes(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """As nothing in the namespace says that there is a default route already, the record does."""
    box = sandboxes(model="tap")
    with daemon.client() as client:
        second = client.port_create("n1", box.ns.path, ifname="eth1", name="second", model="tap")
        with pytest.raises(Conflict, match=box.port.port_id):
            client.port_create("n1", box.ns.path, name="third", model="tap")
    assert {route.dst for route in box.port.routes} == {"0.0.0.0/0", "::/0"}
    assert {route.dst for route in second.routes} == {"10.77.0.0/24", "fd00:77::/64"}


def test_a_dry_run_shows_the_tap(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """As a command; and makes nothing."""
    box, before = sandboxes(), _host_links(daemon)
    with daemon.client() as client:
        plan = client.port_plan("n1", box.ns.path, ifname="eth1", model="tap").plan
    assert plan[0].command.startswith("ip tuntap add pw")
    assert not [step for step in plan if "SANDBOX" in step.command or step.op == "AwaitLink"]
    assert _host_links(daemon) == before


def test_a_restarted_daemon_finds_its_taps(vm: Sandbox, sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """Traffic goes on without it and after it; nothing is mended that was whole."""
    other = sandboxes()
    daemon.kill()
    assert other.ping(vm.ip4)
    daemon.start()
    with daemon.client() as client:
        assert client.port_show(vm.port.port_id).state == "attached"
        assert client.node_status().problems == ()
    assert other.ping(vm.ip6)


def test_cni_answers_with_a_tap(daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """The tap is the representor, on the host; the guest's card is "in" the container, with the addresses."""
    ns = netns_factory()
    cni = Cni(daemon, "vms", model="tap")
    added = cni.add("vm-1", ns)
    assert added.ok, added
    tap_there, card = added.answer["interfaces"]
    assert (tap_there["name"], "sandbox" in tap_there) == (card["name"], False)
    assert card["sandbox"] == "vm-1"
    assert {ip["interface"] for ip in added.answer["ips"]} == {1}
    assert cni.run("CHECK", "vm-1", ns.path, prevResult=added.answer).ok
    daemon.host.run(["ip", "link", "set", card["name"], "down"])
    found = cni.run("CHECK", "vm-1", ns.path, prevResult=added.answer)
    assert not found.ok
    assert cni.delete("vm-1", ns).ok
    assert card["name"] not in _host_links(daemon)


def test_a_tap_outlives_its_sandbox_and_that_is_told(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """Nothing of the port is in the namespace, so nothing ends with it: it is for ``port delete``."""
    box = sandboxes(model="tap")
    box.ns.close()
    assert box.port.rep_name in _host_links(daemon)
    said = daemon.cli("doctor", check=False).stdout
    assert f"port-without-sandbox {box.port.port_id}" in said
    with daemon.client() as client:
        client.port_delete(box.port.port_id)
    assert box.port.rep_name not in _host_links(daemon)


def test_a_tap_is_ours_from_its_first_moment(netns_factory: NetnsFactory) -> None:
    """It has the MAC by which it is known as ours before it is made to stay."""
    ns = netns_factory()
    tap.create(ns.fd, "pw0", mac=GATEWAY_MAC)
    assert json.loads(ns.run(["ip", "-j", "link", "show", "pw0"]).stdout)[0]["address"] == GATEWAY_MAC
    with ExitStack() as opened:
        opened.callback(os.close, tap.open_queue(ns.fd, "pw0"))


def _mtu(daemon: Daemon, box: Sandbox) -> int:
    shown = json.loads(daemon.host.run(["ip", "-j", "link", "show", box.port.tap]).stdout)[0]
    return int(shown["mtu"])


def _links(box: Sandbox) -> list[str]:
    return [link["ifname"] for link in json.loads(box.run(["ip", "-j", "link", "show"]).stdout)]


def _host_links(daemon: Daemon) -> list[str]:
    return [link["ifname"] for link in json.loads(daemon.host.run(["ip", "-j", "link", "show"]).stdout)]
