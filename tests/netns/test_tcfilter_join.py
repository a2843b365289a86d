"""A tcfilter whose device and tap u32 and mirred join: the same to a guest, to CHECK and to others."""

from __future__ import annotations

import json

import pytest

from portwright.kernel import clsact, rtnl, u32
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.errors import Conflict, InvalidInput, NotSupported
from tests.faults.cni import Cni
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory
from tests.netns.guest_lab import guest

pytestmark = pytest.mark.netns


def test_it_is_the_kernels_own_filter_in_our_slot(sandboxes: SandboxFactory, daemon: Daemon) -> None:
    """On a clsact, at our preference, with no program; and the port says so, where it is not the default."""
    box, usual, container = (
        sandboxes(model="tcfilter", join="mirred"),
        sandboxes(model="tcfilter"),
        sandboxes(),
    )
    for name, to in (("eth0", box.port.tap), (box.port.tap, "eth0")):
        kinds = [q["kind"] for q in json.loads(box.run(["tc", "-j", "qdisc", "show", "dev", name]).stdout)]
        assert "clsact" in kinds
        assert "ingress" not in kinds
        found = json.loads(box.run(["tc", "-j", "filter", "show", "dev", name, "ingress"]).stdout)
        assert {(f["kind"], f["pref"]) for f in found} == {("u32", clsact.OUR_PREF)}
        shown = box.run(["tc", "filter", "show", "dev", name, "ingress"]).stdout
        assert f"Egress Redirect to device {to}" in shown
    with daemon.client() as client:
        assert [client.port_show(b.port.port_id).join for b in (box, usual, container)] == [
            "mirred",
            "bpf",
            "",
        ]


def test_what_others_put_on_the_device_stays(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """Somebody's u32 on the same clsact keeps its hash table and its filters, with the guest and after it."""
    box = sandboxes(model="tcfilter", join="mirred")
    name, theirs = box.port.ifname, ["protocol", "ip", "u32", "match", "u32", "0", "0"]
    for way in ("ingress", "egress"):
        box.run(["tc", "filter", "add", "dev", name, way, "pref", "5", *theirs])
    with guest(box.ns, inside := netns_factory(), box.port):
        assert Sandbox(inside, box.port).ping("169.254.1.1")
    for way, prefs in (("ingress", {5, clsact.OUR_PREF}), ("egress", {5})):
        found = json.loads(box.run(["tc", "-j", "filter", "show", "dev", name, way]).stdout)
        assert {f["pref"] for f in found} == prefs
    with daemon.client() as client:
        client.port_delete(box.port.port_id)
    assert _links(box) == ["lo"]


def test_unplug_and_plug(sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon) -> None:
    """The next device is joined in the same way, in another sandbox as well."""
    box, inside, elsewhere = sandboxes(model="tcfilter", join="mirred"), netns_factory(), netns_factory()
    with daemon.client() as client:
        client.port_unplug(box.port.port_id)
        assert _links(box) == ["lo"]
        port = client.port_plug(box.port.port_id, elsewhere.path)
        assert port.join == "mirred"
        shown = elsewhere.run(["tc", "filter", "show", "dev", "eth0", "ingress"]).stdout
        assert f"Egress Redirect to device {port.tap}" in shown
        with guest(elsewhere, inside, port):
            assert Sandbox(inside, port).ping("169.254.1.1")


def test_check_sees_it_go(daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """By CNI's key; gone from either end, or led elsewhere by somebody, it is not joined."""
    ns = netns_factory()
    cni = Cni(daemon, "vms", model="tcfilter", join="mirred")
    added = cni.add("vm-1", ns)
    assert added.ok, added
    tap = added.answer["interfaces"][2]["name"]

    def check() -> str:
        found = cni.run("CHECK", "vm-1", ns.path, prevResult=added.answer)
        return "" if found.ok else f"{found.answer['msg']} {found.answer.get('details', '')}"

    assert check() == ""
    ns.run(["tc", "filter", "del", "dev", "eth0", "ingress"])
    assert "eth0 is not joined" in check()
    slot = ["ingress", "protocol", "all", "pref", str(clsact.OUR_PREF), "handle", "::77"]
    match = ["u32", "match", "u32", "0", "0", "action", "mirred", "egress", "redirect", "dev"]
    ns.run(["tc", "filter", "add", "dev", "eth0", *slot, *match, "eth0"])
    assert "eth0 is not joined" in check()
    ns.run(["tc", "filter", "del", "dev", "eth0", "ingress"])
    ns.run(["tc", "filter", "add", "dev", "eth0", *slot, *match, tap])
    assert check() == ""
    ns.run(["tc", "filter", "del", "dev", tap, "ingress"])
    assert f"{tap} is not joined" in check()
    assert cni.delete("vm-1", ns).ok


def test_a_slot_that_is_taken_is_left(netns_factory: NetnsFactory) -> None:
    """At our preference nobody's filter is replaced, and none is put beside it."""
    ns = netns_factory()
    ns.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other"])
    slot = {"pref": clsact.OUR_PREF, "handle": clsact.OUR_HANDLE}
    theirs = ["pref", str(clsact.OUR_PREF), "handle", "::77", "u32", "match", "u32", "0", "0"]
    ns.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"])
    ns.run(["tc", "filter", "add", "dev", "eth0", "ingress", "protocol", "all", *theirs, "flowid", "1:1"])
    show = ["tc", "filter", "show", "dev", "eth0", "ingress"]
    before = ns.run(show).stdout
    with NetlinkSocket(netns_fd=ns.fd) as sock:
        device, other = (rtnl.link_by_name(sock, name) for name in ("eth0", "other"))
        assert device is not None
        assert other is not None
        with pytest.raises(Conflict, match="u32"):
            u32.attach_redirect(sock, device.index, other.index, **slot)
        assert u32.redirect(sock, device.index, **slot) == 0
    assert ns.run(show).stdout == before


def test_a_dry_run_renders_what_makes_it(
    sandboxes: SandboxFactory, netns_factory: NetnsFactory, daemon: Daemon
) -> None:
    """The commands, typed, join two devices as we join them: CHECK would take them for ours."""
    box, ns = sandboxes(), netns_factory()
    with daemon.client() as client:
        plan = client.port_plan(box.port.network, ns.path, model="tcfilter", join="mirred").plan
    (joined,) = (step.command for step in plan if step.op == "JoinLinks")
    tap = joined.rsplit(" dev ", 3)[1].split(" ")[0]
    ns.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", tap])
    for command in joined.split("; "):
        ns.run(command.removeprefix("ip netns exec SANDBOX ").split())
    for name, to in (("eth0", tap), (tap, "eth0")):
        shown = ns.run(["tc", "filter", "show", "dev", name, "ingress"]).stdout
        assert f"Egress Redirect to device {to}" in shown


def test_who_joins_nothing_has_no_join(
    sandboxes: SandboxFactory, daemon: Daemon, netns_factory: NetnsFactory
) -> None:
    """Refused by name for models without a join, for clones and behind another plugin; as is another word."""
    for model in ("veth", "macvtap", "tap"):
        for join in ("mirred", "peer", "bpf"):
            with pytest.raises(NotSupported, match=f"join {join}.*use tcfilter"):
                sandboxes(model=model, join=join)
    for join in ("mirred", "peer"):
        with pytest.raises(NotSupported, match="inner addresses"):
            sandboxes(model="tcfilter", join=join, inner_addresses=("198.51.100.2",))
    with pytest.raises(InvalidInput, match="join"):
        sandboxes(model="tcfilter", join="bridge")
    ns = netns_factory()
    refused = Cni(daemon, "vms", model="tcfilter", join="u32").add("vm-1", ns)
    assert "join" in refused.answer["msg"]
    assert "bpf, peer or mirred" in refused.answer["msg"]
    ns.run(["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other"])
    chained = Cni(daemon, "vms", model="tcfilter", join="mirred")
    for key in ("ipam", "ipMasq", "capabilities"):
        del chained.conf[key]
    prev = {"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": ns.path}]}
    answer = chained.run("ADD", "vm-2", ns.path, prevResult=prev).answer
    assert "join" in answer["msg"], answer
    assert _names(ns.run(["ip", "-j", "link", "show"]).stdout) == ["lo", "other", "eth0"]


def _links(box: Sandbox) -> list[str]:
    return _names(box.run(["ip", "-j", "link", "show"]).stdout)


def _names(shown: str) -> list[str]:
    return [link["ifname"] for link in json.loads(shown)]
