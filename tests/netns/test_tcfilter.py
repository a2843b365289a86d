"""The model tcfilter: a guest behind a tap is a port like a container behind a veth."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from portwright.kernel import tap
from portwright.model.errors import Conflict, InvalidInput, NotSupported
from tests.deadline import wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory
from tests.netns.guest_lab import guest, guest_on, switch_off

pytestmark = pytest.mark.netns


@pytest.fixture
def vm(sandboxes: SandboxFactory, netns_factory: NetnsFactory) -> Iterator[Sandbox]:
    """A port of the model in a namespace; ``ns`` is its guest."""
    with guest_on(sandboxes, netns_factory, "tcfilter") as made:
        yield made


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


@pytest.mark.parametrize("model", ["tcfilter", "macvtap", "tap"])
def test_what_the_ends_have_is_shown(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon, model: str
) -> None:
    """The guest's card as it is to be, the others as the kernel has them at that moment: MTU, MAC, queues,
    of a tap the open ones, and offloads, of a tap what its guest takes. Without tap or device there is none.
    """
    box, container = sandboxes(model=model, mtu=1450), sandboxes()

    def ends() -> dict[str, dict[str, Any]]:
        done = daemon.cli("port", "show", box.port.port_id, "--json")
        return {each["end"]: each for each in json.loads(done.stdout)["ends"]}

    shown = ends()
    assert list(shown) == ["guest", *(["tap", "device"] if model != "tap" else []), "representor"]
    assert {each["mtu"] for each in shown.values()} == {1450}
    card = shown["guest"]
    assert (card["mac"], card["queues"], card["vnet_hdr"]) == (box.port.mac, 1, True)
    if model != "tap":
        assert shown["device"]["mac"] == box.port.mac
        assert shown["device"]["offloads"] == ["checksum", "tso"]
        assert shown["tap"]["name"] == box.port.tap
    if model != "macvtap":  # which says so for each descriptor, and nowhere else
        name = "tap" if model == "tcfilter" else "representor"
        assert (shown[name]["queues"], shown[name]["vnet_hdr"]) == (0, True)
        with guest(box.ns, netns_factory(), box.port):
            assert ends()[name]["queues"] == 1
            assert ends()[name]["offloads"] == ["checksum", "tso"]
    many = sandboxes(model="tcfilter", queues=2)
    with guest(many.ns, netns_factory(), many.port), daemon.client() as client:
        assert [each.queues for each in client.port_link(many.port.port_id).ends][:2] == [2, 1]
    told = daemon.cli("port", "show", box.port.port_id).stdout
    assert "END" in told
    assert "representor" in told
    if model != "tap":
        switch_off(box.ns, "eth0", "tso")
        assert ends()["device"]["offloads"] == ["checksum"]
    with daemon.client() as client:
        assert client.port_link(container.port.port_id).ends == ()
        client.port_unplug(box.port.port_id)
        assert client.port_link(box.port.port_id).ends == ()


@pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
@pytest.mark.parametrize("end", ["representor", "device", "tap"])
def test_an_mtu_of_one_end_is_the_others(
    sandboxes: SandboxFactory, daemon: Daemon, model: str, end: str
) -> None:
    """Set with ``ip link`` on any of them, the record and the two others follow."""
    box = sandboxes(model=model)
    ns, name = {
        "representor": (daemon.host, box.port.rep_name),
        "device": (box.ns, "eth0"),
        "tap": (box.ns, box.port.tap),
    }[end]
    for mtu in (1400, 1300):
        ns.run(["ip", "link", "set", name, "mtu", str(mtu)])
        wait_until(lambda: _mtus(daemon, box) == {mtu}, why="the others to follow")  # noqa: B023 - at once
        with daemon.client() as client:
            assert client.port_show(box.port.port_id).mtu == mtu


def test_an_mtu_that_the_port_can_not_have_is_put_back(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """One that costs IPv6, set inside: every end has the port's again, and it is told."""
    box = sandboxes(model="tcfilter")
    box.run(["ip", "link", "set", "eth0", "mtu", "1000"])
    wait_until(lambda: _mtus(daemon, box) == {1500}, why="the MTU to be put back")
    with daemon.client() as client:
        assert any("eth0 was given an MTU" in alarm for alarm in client.node_status().alarms)


def test_an_mtu_inside_is_followed_after_the_daemon_was_away(
    sandboxes: SandboxFactory, daemon: Daemon
) -> None:
    """As the representor's is."""
    box = sandboxes(model="tcfilter")
    daemon.kill()
    box.run(["ip", "link", "set", "eth0", "mtu", "1400"])
    daemon.start()
    wait_until(lambda: _mtus(daemon, box) == {1400}, why="the others to follow")


def test_others_noise_hides_nothing(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """However much a container does to its links, be it with the names of ours, an MTU is followed."""
    box, noisy = sandboxes(model="tcfilter"), sandboxes()
    noise = [f"link add {box.port.tap} type veth peer name other"]
    noise += [f"link set {box.port.tap} mtu {1300 + number % 2}" for number in range(3000)]
    noisy.ns.run(["ip", "-batch", "-"], input="\n".join(noise))
    box.run(["ip", "link", "set", "eth0", "mtu", "1400"])
    wait_until(lambda: _mtus(daemon, box) == {1400}, why="the others to follow")
    with daemon.client() as client:
        assert client.port_show(noisy.port.port_id).mtu == 1500


def test_a_sandbox_that_is_heard_is_not_held(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """With its namespace the port's device goes, though the daemon hears what happens there."""
    box = sandboxes(model="tcfilter")
    box.ns.close()
    with daemon.client() as client:
        wait_until(
            lambda: client.port_show(box.port.port_id).state == "detached", why="the port to be detached"
        )


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
