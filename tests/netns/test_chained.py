"""Our plugin behind another one, for a microVM: a tap on its device, which stays its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from portwright.kernel import tap
from portwright.model.errors import NotFound, NotSupported
from portwright.model.port import Port, PortAddress
from tests.deadline import wait_until
from tests.faults.cni import Cni
from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox
from tests.fix_netns import NetnsFactory, TestNetns
from tests.netns.chain_lab import Chained, consumers_view
from tests.netns.guest_lab import guest

pytestmark = pytest.mark.netns

POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nothing, namespace: default}
spec: {podSelector: {}, policyTypes: [Ingress]}
"""


@pytest.fixture
def chain(daemon: Daemon, tmp_path: Path) -> Chained:
    """ptp, and ours behind it; its hosts route."""
    daemon.host.run(["sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])
    return Chained(daemon, tmp_path / "ipam")


@contextmanager
def booted(
    daemon: Daemon, ns: TestNetns, inside: TestNetns, prev: dict[str, Any], port_id: str
) -> Iterator[Sandbox]:
    """A guest on a chained tap, set up by what the first plugin answered."""
    with daemon.client() as client:
        port = client.port_show(port_id)
    shown = msgspec.structs.replace(
        port,
        addresses=tuple(
            PortAddress(address=ip["address"].partition("/")[0], gateway=ip["gateway"]) for ip in prev["ips"]
        ),
    )
    with guest(ns, inside, shown):
        yield Sandbox(inside, shown)


def reach(vm: Sandbox, *addresses: str) -> None:
    """The guest has an answer from each; the first plugin's own addresses are tentative at first."""
    for address in addresses:
        wait_until(partial(vm.ping, address), 10, f"{address} to answer")


def ports(daemon: Daemon) -> list[Port]:
    """What ``port list`` has."""
    with daemon.client() as client:
        return list(client.port_list())


def test_a_guest_behind_ptp(
    chain: Chained, daemon: Daemon, netns_factory: NetnsFactory, world: TestNetns
) -> None:
    """The result is ptp's, and what tc-redirect-tap's consumers look for; the guest takes the device's place
    in both families; the device keeps what it had; DEL leaves it as it was."""
    ns, inside = netns_factory(), netns_factory()
    prev = chain.before("ADD", "vm-1", ns)
    before = _state(ns)
    added = chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev)
    assert added.ok, added.answer

    for part in ("interfaces", "ips"):
        assert added.answer[part][: len(prev[part])] == prev[part]
    assert (added.answer["routes"], added.answer["dns"]) == (prev["routes"], prev["dns"])
    device = next(one for one in prev["interfaces"] if one.get("sandbox"))
    ((tap, where, mac, ips),) = consumers_view(added.answer, "vm-1")
    assert (where, mac) == (ns.path, device["mac"])
    assert ips == [ip["address"] for ip in prev["ips"]]

    (port,) = ports(daemon)
    assert (port.rep_name, port.tap, port.ifname) == ("", tap, "eth0")
    assert f"link/ether {mac}" in ns.run(["ip", "link", "show", tap]).stdout
    world.run(["ip", "route", "add", "10.5.0.0/24", "via", "192.0.2.2"])
    world.run(["ip", "-6", "route", "add", "fd00:5::/64", "via", "2001:db8::2"])
    with booted(daemon, ns, inside, prev, port.port_id) as vm:
        reach(vm, *(a.gateway for a in vm.port.addresses), WORLD4, WORLD6)
        for address in (a.address for a in vm.port.addresses):
            assert Sandbox(world, vm.port).ping(address), address
    assert chain.ours.run("CHECK", "vm-1", ns.path, prevResult=added.answer).ok
    for _ in range(2):
        assert chain.ours.delete("vm-1", ns).ok
    assert _state(ns) == before
    chain.before("DEL", "vm-1", ns)
    assert ports(daemon) == []


@pytest.mark.parametrize("plugin", ["bridge", "macvlan"])
def test_behind_other_plugins(
    daemon: Daemon, tmp_path: Path, netns_factory: NetnsFactory, plugin: str
) -> None:
    """A bridge's veth and a macvlan too."""
    more: dict[str, Any] = {"bridge": "br-chain", "isGateway": True}
    if plugin == "macvlan":
        more = {"master": "up0"}
    chain, ns, inside = Chained(daemon, tmp_path, plugin, **more), netns_factory(), netns_factory()
    chain.first["ipam"]["ranges"] = (
        [
            [{"subnet": "192.0.2.0/24", "rangeStart": "192.0.2.100", "gateway": WORLD4}],
            [{"subnet": "2001:db8::/64", "rangeStart": "2001:db8::100", "gateway": WORLD6}],
        ]
        if plugin == "macvlan"
        else chain.first["ipam"]["ranges"]
    )
    prev, added = chain.add("vm-1", ns)
    assert added.ok, added.answer
    with booted(daemon, ns, inside, prev, ports(daemon)[0].port_id) as vm:
        reach(vm, *(a.gateway for a in vm.port.addresses))
    chain.delete("vm-1", ns)
    daemon.host.run(["ip", "link", "del", "br-chain"], check=False)


@pytest.mark.parametrize("said", ["null", "absent", "nowhere"])
def test_addresses_that_name_no_interface(
    chain: Chained, daemon: Daemon, netns_factory: NetnsFactory, said: str
) -> None:
    """Cilium's result names none (github.com/awslabs/tc-redirect-tap, issue 7): with two devices each card
    has the addresses that its device has in the kernel; ``interfaces`` names fewer."""
    ns = netns_factory()
    prev = chain.before("ADD", "vm-1", ns)
    chain.first["ipam"] |= {
        "ranges": [[{"subnet": "10.6.0.0/24"}], [{"subnet": "fd00:6::/64"}]],
        "routes": [],
    }
    more = chain.before("ADD", "vm-1", ns, "net1")
    shift = len(prev["interfaces"])
    both = {
        **prev,
        "interfaces": prev["interfaces"] + more["interfaces"],
        "ips": prev["ips"] + [{**ip, "interface": ip["interface"] + shift} for ip in more["ips"]],
    }
    for ip in both["ips"]:
        if said == "absent":
            del ip["interface"]
        else:
            ip["interface"] = None if said == "null" else -1
    added = chain.ours.run("ADD", "vm-1", ns.path, prevResult=both)
    assert added.ok, added.answer
    cards = consumers_view(added.answer, "vm-1")
    assert [ips for _, _, _, ips in cards] == [[ip["address"] for ip in one["ips"]] for one in (prev, more)]
    assert [p.ifname for p in sorted(ports(daemon), key=lambda p: p.created)] == ["eth0", "net1"]
    assert chain.ours.delete("vm-1", ns).ok

    one = chain.ours.run("ADD", "vm-1", ns.path, prevResult=both, interfaces=["net1"])
    assert [ips for _, _, _, ips in consumers_view(one.answer, "vm-1")] == [
        [i["address"] for i in more["ips"]]
    ]
    assert chain.ours.delete("vm-1", ns).ok
    # A result with addresses and no interfaces at all: the device is CNI_IFNAME.
    bare = {"cniVersion": "1.0.0", "ips": [{"address": ip["address"]} for ip in prev["ips"]]}
    least = chain.ours.run("ADD", "vm-1", ns.path, prevResult=bare)
    assert [ips for *_, ips in consumers_view(least.answer, "vm-1")] == [[i["address"] for i in prev["ips"]]]
    assert chain.ours.delete("vm-1", ns).ok
    chain.before("DEL", "vm-1", ns, "net1")
    chain.before("DEL", "vm-1", ns)


def test_anothers_filters_stay(chain: Chained, netns_factory: NetnsFactory) -> None:
    """A clsact with filters on the device before us is there after us; of one that came after us too."""
    ns, theirs = netns_factory(), ["protocol", "ip", "u32", "match", "u32", "0", "0"]
    for first in (True, False):
        prev = chain.before("ADD", "vm-1", ns)
        if first:
            ns.run(["tc", "qdisc", "add", "dev", "eth0", "clsact"])
            ns.run(["tc", "filter", "add", "dev", "eth0", "ingress", "pref", "5", *theirs])
        assert chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev).ok
        if not first:
            ns.run(["tc", "filter", "add", "dev", "eth0", "egress", "pref", "5", *theirs])
        assert chain.ours.delete("vm-1", ns).ok
        for way in ("ingress", "egress"):
            shown = json.loads(ns.run(["tc", "-j", "filter", "show", "dev", "eth0", way]).stdout)
            assert {f["kind"] for f in shown} == ({"u32"} if (way == "ingress") is first else set()), way
        chain.before("DEL", "vm-1", ns)


def test_an_ingress_qdisc_is_a_conflict(chain: Chained, daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """Kata's or tc-redirect-tap's own: named, and nothing is left of the try."""
    ns = netns_factory()
    prev = chain.before("ADD", "vm-1", ns)
    ns.run(["tc", "qdisc", "add", "dev", "eth0", "ingress"])
    before = _state(ns)
    refused = chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev)
    assert refused.answer["code"] == 101
    assert "ingress qdisc that is not ours" in refused.answer["msg"]
    assert (_state(ns), ports(daemon)) == (before, [])
    chain.before("DEL", "vm-1", ns)


@pytest.mark.parametrize(
    ("conf", "field"),
    [
        ({"mtu": 1400}, "mtu"),
        ({"ipMasq": True}, "ipMasq"),
        ({"isolation": "strict"}, "isolation"),
        ({"reach": ["*"]}, "reach"),
        ({"network": "blue"}, "network"),
        ({"mac": "02:00:00:00:00:01"}, "mac"),
        ({"ipam": {"subnet": "10.9.0.0/24"}}, "ipam"),
        ({"runtimeConfig": {"portMappings": [{"hostPort": 80, "containerPort": 80}]}}, "portMappings"),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": 8, "ingressBurst": 8}}}, "bandwidth"),
        ({"model": "veth", "interfaces": ["eth0"]}, "interfaces"),
        ({"interfaces": ["eth9"]}, "eth9"),
        ({"interfaces": ["eth0", "eth0"]}, "interfaces[1]"),
        ({"interfaces": ["lo"]}, "lo"),
        ({"queues": 257}, "queues"),
    ],
)
def test_what_can_not_be_held_is_refused(
    chain: Chained, daemon: Daemon, netns_factory: NetnsFactory, conf: dict[str, Any], field: str
) -> None:
    """By name; the device is another plugin's, and nothing is made."""
    ns = netns_factory()
    prev = chain.before("ADD", "vm-1", ns)
    before = _state(ns)
    refused = chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev, **conf)
    assert not refused.ok
    assert field in refused.answer["msg"]
    assert (_state(ns), ports(daemon)) == (before, [])
    chain.before("DEL", "vm-1", ns)


def test_a_policy_is_not_pretended_to_hold(
    chain: Chained, daemon: Daemon, netns_factory: NetnsFactory, tmp_path: Path
) -> None:
    """One in force that selects the pod refuses it; one that comes later says for whom it does not hold."""
    ns, manifest = netns_factory(), tmp_path / "policy.yaml"
    manifest.write_text(POLICY)
    prev = chain.before("ADD", "vm-1", ns)
    daemon.cli("policy", "apply", "-f", str(manifest))
    refused = chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev)
    assert refused.answer["code"] == 101
    assert "default/nothing" in refused.answer["msg"]
    daemon.cli("policy", "delete", "-f", str(manifest))

    assert chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev).ok
    said = daemon.cli("policy", "apply", "-f", str(manifest))
    assert "chained-port" in said.stdout + said.stderr
    daemon.cli("policy", "delete", "-f", str(manifest))
    with daemon.client() as client:
        (port,) = client.port_list()
        for refuse in (client.port_link, client.port_unplug, client.stats):
            with pytest.raises(NotSupported, match="another plugin"):
                refuse(port.port_id)
        shown = daemon.cli("port", "show", port.port_id)
        assert port.tap not in shown.stderr
        client.port_delete(port.port_id)
        with pytest.raises(NotFound):
            client.port_show(port.port_id)
    assert port.tap not in _state(ns)
    chain.before("DEL", "vm-1", ns)


def test_gc_a_dead_namespace_and_owners(chain: Chained, daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """GC deletes what its list has not; DEL after the namespace's end needs the record alone; a device has
    one tap; a tap may have a name and an owner, as for a jailed Firecracker."""
    ns = netns_factory()
    prev = chain.before("ADD", "vm-1", ns)
    named = "IgnoreUnknown=1;TC_REDIRECT_TAP_NAME=vmtap;TC_REDIRECT_TAP_UID=1234;TC_REDIRECT_TAP_GID=77"
    added = chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev, cni_args=named)
    assert consumers_view(added.answer, "vm-1")[0][0] == "vmtap"
    shown = json.loads(ns.run(["ip", "-j", "-d", "link", "show", "vmtap"]).stdout)[0]["linkinfo"]["info_data"]
    assert (shown["user"], shown["group"]) in ((1234, 77), ("1234", "77"))
    again = chain.ours.run("ADD", "vm-2", ns.path, prevResult=prev)
    assert again.answer["code"] == 101
    assert "DEL that first" in again.answer["msg"]
    ns.run(["ip", "link", "set", "eth0", "name", "renamed"])
    again = chain.ours.run("ADD", "vm-2", ns.path, prevResult=prev, interfaces=["renamed"])
    assert "our slot" in again.answer["msg"]
    ns.run(["ip", "link", "set", "renamed", "name", "eth0"])

    gc: dict[str, Any] = {
        "cniVersion": "1.1.0",
        "cni.dev/valid-attachments": [{"containerID": "vm-1", "ifname": "eth0"}],
    }
    assert chain.ours.run("GC", **gc).ok
    assert len(ports(daemon)) == 1
    assert chain.ours.run("GC", **{**gc, "cni.dev/valid-attachments": []}).ok
    assert ports(daemon) == []
    assert "vmtap" not in _state(ns)

    assert chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev).ok
    chain.before("DEL", "vm-1", ns)
    (port,) = ports(daemon)
    lacks = chain.ours.run("CHECK", "vm-1", ns.path, prevResult=prev)
    assert "is gone from the sandbox" in lacks.answer["msg"]
    assert chain.ours.run("DEL", "vm-1", "").ok
    assert (port.tap in _state(ns), ports(daemon)) == (False, [])


def _state(ns: TestNetns) -> str:
    """Links, qdiscs, addresses and routes of a namespace, as text.

    But the length of a queue that a device has not: the kernel sets it with any qdisc (sch_api.c).
    """
    said = [ns.run(["tc", "qdisc", "show"]).stdout]
    for words in (["-o", "link"], ["-o", "addr"], ["route", "show", "table", "all"], ["-6", "route"]):
        lines = ns.run(["ip", *words]).stdout.splitlines()
        said += [line.partition("valid_lft")[0].replace("default qlen 1000", "default ") for line in lines]
    return "\n".join(said)


def test_a_restart_knows_what_is_left(
    chain: Chained, daemon: Daemon, netns_factory: NetnsFactory, world: TestNetns
) -> None:
    """A tap outlives the daemon and its kill, and its guest's traffic goes on; one whose sandbox ended
    meanwhile is detached, and DEL ends it."""
    ns, inside, other = netns_factory(), netns_factory(), netns_factory()
    prev, added = chain.add("vm-1", ns)
    assert added.ok, added.answer
    assert chain.add("vm-2", other)[1].ok
    (port,) = [p for p in ports(daemon) if p.owner.container_id == "vm-1"]
    with booted(daemon, ns, inside, prev, port.port_id) as vm:
        reach(vm, vm.port.addresses[0].gateway)
        daemon.kill()
        other.close()
        reach(vm, vm.port.addresses[0].gateway)
        daemon.start()
        reach(vm, vm.port.addresses[0].gateway)
    states = {p.owner.container_id: p.state.value for p in ports(daemon)}
    assert states == {"vm-1": "attached", "vm-2": "detached"}
    assert chain.ours.run("DEL", "vm-2", "").ok
    chain.delete("vm-1", ns)
    assert ports(daemon) == []


def test_queues_and_versions(chain: Chained, daemon: Daemon, netns_factory: NetnsFactory) -> None:
    """A tap has as many queues as ``queues`` says, ours and behind another plugin; a model without a tap has
    none to give, and a version without interfaces in its result no place for one."""
    ns, own = netns_factory(), Cni(daemon, "own", queues=2)
    refused = own.add("box", ns)
    assert (refused.answer["code"], "queues" in refused.answer["msg"]) == (7, True)
    own.conf["model"] = "tcfilter"
    assert own.add("box", ns).ok
    assert [p.queues for p in ports(daemon)] == [2]
    assert own.delete("box", ns).ok

    prev = chain.before("ADD", "vm-1", ns)
    old = {"cniVersion": "0.2.0", "ip4": {"ip": prev["ips"][0]["address"]}}
    said = chain.ours.run("ADD", "vm-1", ns.path, prevResult=old, cniVersion="0.2.0")
    assert "0.3.0 or newer" in said.answer["msg"]
    assert chain.ours.run("ADD", "vm-1", ns.path, prevResult=prev, queues=2).ok
    (port,) = ports(daemon)
    fd = os.open(ns.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for opened in [tap.open_queue(fd, port.tap, multi_queue=True) for _ in range(2)]:
            os.close(opened)
    finally:
        os.close(fd)
    chain.delete("vm-1", ns)
