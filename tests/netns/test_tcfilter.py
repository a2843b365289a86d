"""The model tcfilter: a guest behind a tap is a port like a container behind a veth."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from portwright.kernel import tap
from portwright.model.errors import Conflict, InvalidInput, NotSupported
from tests.faults.cni import Cni
from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory
from tests.netns.guest_lab import guest
from tests.netns.policy_lab import connect, listening

pytestmark = pytest.mark.netns


@pytest.fixture
def vm(sandboxes: SandboxFactory, netns_factory: NetnsFactory) -> Iterator[Sandbox]:
    """A port of the model in a namespace; ``ns`` is its guest."""
    box = sandboxes(model="tcfilter")
    inside = netns_factory()
    with guest(box.ns, inside, box.port):
        yield Sandbox(inside, box.port)


def test_a_guest_reaches_and_is_reached(vm: Sandbox, sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """Gateway, a container, the world, in both families, both ways, and the port counts it."""
    other = sandboxes()
    for near, far in ((vm, other), (other, vm)):
        for address in (far.ip4, far.ip6):
            assert near.ping(address), f"{near.ns.name} to {address}"
    for address in ("169.254.1.1", WORLD4, WORLD6):
        assert vm.ping(address), address
    with daemon.client() as client:
        totals = client.stats(vm.port.port_id)
    assert totals


@pytest.mark.parametrize("family", [4, 6])
def test_a_guest_carries_tcp_with_offloads(vm: Sandbox, sandboxes: SandboxFactory, family: int) -> None:
    """A megabyte each way arrives whole, of super-packets as of segments."""
    other = sandboxes()
    for near, far in ((vm, other), (other, vm)):
        with listening(far.ns, 80) as server:
            address = far.ip4 if family == 4 else far.ip6
            sock = connect(near.ns, address, 80)
            accepted, _ = server.accept()
            with sock, accepted:
                accepted.settimeout(20)
                sock.settimeout(20)
                said = bytes(range(256)) * 400
                sock.sendall(said)
                heard = b""
                while len(heard) < len(said):
                    heard += accepted.recv(1 << 16)
                assert heard == said


def test_the_namespaces_own_stack_hears_nothing(vm: Sandbox, sandboxes: SandboxFactory) -> None:
    """What is for the guest does not reach the device's own addresses in the namespace: who answers is the
    guest alone."""
    other = sandboxes()
    vm.run(["ip", "addr", "flush", "dev", "eth0"])
    assert not other.ping(vm.ip4)


def test_what_others_put_on_the_device_stays(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """Somebody else's filters on the namespace's device are there with the guest and after it, and see to it
    that nothing of ours is in their place; the tap goes with the port."""
    box = sandboxes(model="tcfilter")
    name, theirs = box.port.ifname, ["protocol", "ip", "u32", "match", "u32", "0", "0"]
    for way in ("ingress", "egress"):
        box.run(["tc", "filter", "add", "dev", name, way, "pref", "5", *theirs])
    with guest(box.ns, inside := netns_factory(), box.port):
        assert Sandbox(inside, box.port).ping("169.254.1.1")
    for way in ("ingress", "egress"):
        found = json.loads(box.run(["tc", "-j", "filter", "show", "dev", name, way]).stdout)
        assert {f["pref"] for f in found if f["kind"] == "u32"} == {5}
    with daemon.client() as client:
        client.port_delete(box.port.port_id)
    assert _links(box) == ["lo"]


def test_unplug_and_plug(sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon) -> None:
    """Without its device the tap is gone too; a new device has one again, in another sandbox as well."""
    box, inside, elsewhere = sandboxes(model="tcfilter"), netns_factory(), netns_factory()
    with daemon.client() as client:
        client.port_unplug(box.port.port_id)
        assert _links(box) == ["lo"]
        port = client.port_plug(box.port.port_id, elsewhere.path)
        moved = Sandbox(elsewhere, port)
        assert port.tap == box.port.tap
        assert sorted(_links(moved)) == sorted(["lo", "eth0", port.tap])
        with guest(elsewhere, inside, port):
            assert Sandbox(inside, port).ping("169.254.1.1")


def test_an_mtu_is_told_to_all_three_ends(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """Representor, device and tap, at the start and when it changes."""
    box = sandboxes(model="tcfilter", mtu=1450)
    assert _mtus(daemon, box) == {1450}
    with daemon.client() as client:
        client.port_set(box.port.port_id, mtu=1400)
    assert _mtus(daemon, box) == {1400}


def _mtus(daemon: Daemon, box: Sandbox) -> set[int]:
    ends = ((box.ns, "eth0"), (box.ns, box.port.tap), (daemon.host, box.port.rep_name))
    return {json.loads(ns.run(["ip", "-j", "link", "show", name]).stdout)[0]["mtu"] for ns, name in ends}


def test_nothing_waits_before_the_guests_own_queue(sandboxes: SandboxFactory) -> None:
    """A tap has no qdisc that packets wait in, whatever the host's default, with several queues too."""
    for queues in (1, 2):
        box = sandboxes(model="tcfilter", queues=queues)
        shown = json.loads(box.run(["tc", "-j", "qdisc", "show", "dev", box.port.tap]).stdout)
        assert [q["kind"] for q in shown if q["kind"] != "clsact"] == ["noqueue"]


def test_all_ports_share_one_program(sandboxes: SandboxFactory) -> None:
    """What joins them is loaded once, however many ports there are."""
    loaded = set()
    for box in (sandboxes(model="tcfilter"), sandboxes(model="tcfilter")):
        for name in ("eth0", box.port.tap):
            listed = json.loads(box.run(["tc", "-j", "filter", "show", "dev", name, "ingress"]).stdout)
            loaded |= {f["options"]["prog"]["id"] for f in listed if "prog" in f.get("options", {})}
    assert len(loaded) == 1


def test_a_tap_has_the_queues_that_it_was_made_with(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory
) -> None:
    """One, as Firecracker takes it and no other; or several, each of which may be opened, and a guest on the
    first of which is reached. A model without a tap has none to give."""
    one, two = sandboxes(model="tcfilter"), sandboxes(model="tcfilter", queues=2)
    for box, multi in ((one, False), (two, True)):
        with box.ns.entered(), ExitStack() as opened:
            fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            with pytest.raises(Conflict, match=box.port.tap):
                tap.open_queue(fd, box.port.tap, multi_queue=not multi)
            for _ in range(box.port.queues):
                opened.callback(os.close, tap.open_queue(fd, box.port.tap, multi_queue=multi))
    with guest(two.ns, inside := netns_factory(), two.port):
        assert Sandbox(inside, two.port).ping("169.254.1.1")
    with pytest.raises(InvalidInput, match="queues"):
        sandboxes(queues=2)


def test_models_that_are_not_there_are_refused(sandboxes: SandboxFactory) -> None:
    """By name, with those that are; a bridge with what is wrong with it, and what to use."""
    with pytest.raises(NotSupported, match="veth, tcfilter, macvtap, tap"):
        sandboxes(model="sriov")
    with pytest.raises(NotSupported, match="everyone sees everyone; use tcfilter"):
        sandboxes(model="bridge")


def _links(box: Sandbox) -> list[str]:
    done: subprocess.CompletedProcess[str] = box.run(["ip", "-j", "link", "show"])
    return [link["ifname"] for link in json.loads(done.stdout)]


def test_cni_answers_as_consumers_of_a_tap_read(daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """The guest's card is the interface "in" the container: of the tap's name, with the port's MAC and
    addresses; the tap of that name is in the namespace (github.com/awslabs/tc-redirect-tap). CHECK sees it
    go, and its filter."""
    ns = netns_factory()
    cni = Cni(daemon, "vms", model="tcfilter")
    added = cni.add("vm-1", ns)
    assert added.ok, added
    representor, device, tap, card = added.answer["interfaces"]
    assert "sandbox" not in representor
    assert (device["name"], device["sandbox"]) == ("eth0", ns.path)
    assert (tap["name"], tap["sandbox"]) == (card["name"], ns.path)
    assert (card["mac"], card["sandbox"]) == (device["mac"], "vm-1")
    assert {ip["interface"] for ip in added.answer["ips"]} == {3}
    assert sorted(ip["address"].partition("/")[2] for ip in added.answer["ips"]) == ["128", "32"]

    def check() -> str:
        found = cni.run("CHECK", "vm-1", ns.path, prevResult=added.answer)
        return "" if found.ok else f"{found.answer['msg']} {found.answer.get('details', '')}"

    assert check() == ""
    ns.run(["tc", "filter", "del", "dev", tap["name"], "ingress"])
    assert f"{tap['name']} is not joined" in check()
    ns.run(["ip", "link", "del", tap["name"]])
    assert f"tap {tap['name']} is gone" in check()
    assert cni.delete("vm-1", ns).ok
    cni.conf["model"] = "bridge"
    assert "use tcfilter" in cni.add("vm-2", ns).answer["msg"]
