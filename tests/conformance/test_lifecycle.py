"""Cases 20 to 40: an interface comes, works, and goes without a trace."""

from __future__ import annotations

import ipaddress
from concurrent.futures import ThreadPoolExecutor

import pytest

from .kit.host import HOST4, HOST6, OUTSIDE4, OUTSIDE6, Host
from .kit.lab import Lab, Sandbox, assert_works, ips_of, without_empty_dns
from .kit.observe import addresses, bare, bare_addresses, default_routes, links, mac_of, wait_until
from .kit.plugin import CniFailed, Json
from .kit.runtime import Runtime
from .kit.traffic import echo, ping, tcp_ask


def inside_and_host(result: Json, sandbox: Sandbox) -> tuple[Json, list[Json]]:
    """The sandbox's interface of a result, and those on the host's side."""
    inside = [one for one in result["interfaces"] if one.get("sandbox") == sandbox.path]
    assert len(inside) == 1, result["interfaces"]
    return inside[0], [one for one in result["interfaces"] if not one.get("sandbox")]


def test_case_20_point_to_point(lab: Lab) -> None:
    """ADD gives the sandbox the interface, an address of the range and the MTU, and packets flow."""
    subnet = lab.subnet4()
    network = lab.network(ipam=lab.ipam(subnet), mtu=1312)
    sandbox = lab.sandbox()
    result = lab.add(network, sandbox)
    inside, outside = inside_and_host(result, sandbox)
    device = links(sandbox.ns)["eth0"]
    assert inside["name"] == "eth0"
    assert inside["mac"].lower() == device["address"]
    assert device["mtu"] == 1312
    assert "UP" in device["flags"]
    (address,) = bare_addresses(sandbox.ns, "eth0")
    assert ipaddress.ip_address(address) in subnet
    assert [bare(entry["address"]) for entry in result["ips"]] == [address]
    host_links = links(lab.host.ns)
    for entry in outside:
        assert host_links[entry["name"]]["mtu"] == 1312
        assert host_links[entry["name"]]["address"] == entry["mac"].lower()
    assert_works(lab, sandbox, result)


def test_case_20_result_order(lab: Lab) -> None:
    """The host's end comes first with an empty sandbox, the container's second; ips point at the latter."""
    sandbox = lab.sandbox()
    result = lab.add(lab.network(), sandbox)
    assert [entry.get("sandbox", "") for entry in result["interfaces"]] == ["", sandbox.path]
    assert [entry["interface"] for entry in result["ips"]] == [1]


def test_case_20_small_mtu(lab: Lab) -> None:
    """512, the case's own figure, on both ends."""
    sandbox = lab.sandbox()
    result = lab.add(lab.network(mtu=512), sandbox)
    assert links(sandbox.ns)["eth0"]["mtu"] == 512
    _, outside = inside_and_host(result, sandbox)
    assert {links(lab.host.ns)[one["name"]]["mtu"] for one in outside} == {512}


def test_case_20_gateway_answers(lab: Lab) -> None:
    """The gateway that the result names answers an echo request, in both families."""
    sandbox = lab.sandbox()
    result = lab.add(lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6())), sandbox)
    for entry in result["ips"]:
        assert ping(sandbox.ns, entry["gateway"], device="eth0"), entry


def test_case_20_masquerade(lab: Lab) -> None:
    """With ipMasq an outside without a route back answers and sees the host's address, in both families."""
    network = lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6()), ipMasq=True)
    sandbox = lab.sandbox()
    lab.add(network, sandbox)
    for there, here in ((OUTSIDE4, HOST4), (OUTSIDE6, HOST6)):
        with echo(lab.host.outside, there) as server:
            assert tcp_ask(sandbox.ns, there, server.port) == b"hello"
            assert {peer for _, peer in server.received} == {here}


def test_case_20_no_masquerade_unless_asked(lab: Lab) -> None:
    """Without ipMasq the outside sees the sandbox's own address."""
    sandbox = lab.sandbox()
    (address,) = ips_of(lab.add(lab.network(), sandbox))
    lab.host.outside.ip_batch(f"route add {address} via {HOST4}")
    try:
        with echo(lab.host.outside, OUTSIDE4) as server:
            assert tcp_ask(sandbox.ns, OUTSIDE4, server.port) == b"hello"
            assert {peer for _, peer in server.received} == {address}
    finally:
        lab.host.outside.ip_batch(f"route del {address}")


def test_case_20_routes_of_the_ipam(lab: Lab) -> None:
    """A route of the ipam section is in the sandbox and in the result."""
    ipam = lab.ipam(lab.subnet4(), routes=[{"dst": "0.0.0.0/0"}, {"dst": "198.51.100.0/24"}])
    sandbox = lab.sandbox()
    result = lab.add(lab.network(ipam=ipam), sandbox)
    assert {"0.0.0.0/0", "198.51.100.0/24"} <= {route["dst"] for route in result["routes"]}
    found = sandbox.ns.run(["ip", "route", "get", "198.51.100.9"])
    assert "dev eth0" in found
    assert "198.51.100.0/24" in sandbox.ns.run(["ip", "route", "show"])


@pytest.mark.feature("any_host_netns")
def test_case_21_the_callers_namespace_is_the_host(lab: Lab) -> None:
    """The host's end appears in the namespace that the plugin was called in, whichever that is."""
    other = lab.host.netns("elsewhere")
    before = set(links(other))
    runtime = Runtime(lab.runtime.bin_dirs, other)
    network, sandbox = lab.network(), lab.sandbox()
    result = runtime.add(network, sandbox.id, sandbox.path)
    _, outside = inside_and_host(result, sandbox)
    assert set(links(other)) - before == {one["name"] for one in outside}
    runtime.delete(network, sandbox.id, sandbox.path)
    assert set(links(other)) == before
    assert lab.leaks(sandbox.id) == []


def test_case_21_not_the_namespace_of_pid_1(lab: Lab) -> None:
    """The host's end is in the namespace of the caller, not in the tests' own."""
    sandbox = lab.sandbox()
    _, outside = inside_and_host(lab.add(lab.network(), sandbox), sandbox)
    assert {one["name"] for one in outside} <= set(links(lab.host.ns))


def test_case_22_interface_exists(lab: Lab) -> None:
    """An interface that is there already is refused, not touched, and no address or link is left for it."""
    network, sandbox = lab.network(), lab.sandbox()
    sandbox.ns.ip_batch(
        "link add eth0 type veth peer name other", "addr add 198.51.100.7/24 dev eth0", "link set eth0 up"
    )
    before = links(sandbox.ns)["eth0"]
    lab.refused(network, sandbox)
    assert lab.leaks(sandbox.id) == []
    after = links(sandbox.ns)["eth0"]
    assert (before["ifindex"], before["address"]) == (after["ifindex"], after["address"])
    assert bare_addresses(sandbox.ns, "eth0") == {"198.51.100.7"}


def test_case_23_no_address_left(lab: Lab) -> None:
    """With the pool exhausted ADD fails and leaves neither end of a link."""
    subnet = lab.subnet4()
    one = {"subnet": str(subnet), "rangeStart": str(subnet[9]), "rangeEnd": str(subnet[9])}
    network = lab.network(ipam=lab.ipam(ranges=[[one]]))
    lab.add(network, lab.sandbox())
    before = lab.host.link_names()
    late = lab.sandbox()
    lab.refused(network, late)
    assert lab.host.link_names() == before
    assert set(links(late.ns)) == {"lo"}


def test_case_23_pool_too_small(lab: Lab) -> None:
    """A /31 has no address to give: refused, nothing left."""
    network, sandbox = lab.network(ipam=lab.ipam(lab.subnet4(31))), lab.sandbox()
    lab.refused(network, sandbox)
    lab.delete(lab.network(name=network["name"]), sandbox)  # a DEL need not understand the range
    assert set(links(sandbox.ns)) == {"lo"}
    assert lab.leaks(sandbox.id) == []


def test_case_24_failure_after_the_address(lab: Lab) -> None:
    """An MTU that the kernel refuses fails the ADD, and the address goes back."""
    sandbox = lab.sandbox()
    lab.refused(lab.network(mtu=10_000_000), sandbox)
    assert set(links(sandbox.ns)) == {"lo"}
    assert lab.leaks(sandbox.id) == []


def test_case_25_delete_leaves_nothing(lab: Lab) -> None:
    """DEL removes both ends, the address and the rules; a second DEL succeeds."""
    network, sandbox = lab.network(ipMasq=True), lab.sandbox()
    result = lab.add(network, sandbox)
    assert lab.leaks(sandbox.id) != [], "the profile's state names no container while it is attached"
    lab.delete(network, sandbox)
    assert set(links(sandbox.ns)) == {"lo"}
    assert lab.leaks(sandbox.id, *ips_of(result)) == []
    lab.delete(network, sandbox)


def test_case_26_namespace_gone(lab: Lab) -> None:
    """A sandbox that is gone can be deleted: the path does not exist, the address is free."""
    network, sandbox = lab.network(ipMasq=True), lab.sandbox()
    result = lab.add(network, sandbox)
    sandbox.ns.delete()
    wait_until(lambda: lab.host.link_names() == lab.links_before, "the kernel's removal of the host's end")
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_27_delete_without_namespace(lab: Lab) -> None:
    """DEL with an empty CNI_NETNS, the sandbox still alive: all that is on the host is freed."""
    network, sandbox = lab.network(ipMasq=True), lab.sandbox()
    result = lab.add(network, sandbox)
    lab.delete(network, sandbox, netns="")
    found = [leak for leak in lab.leaks(sandbox.id, *ips_of(result)) if not leak.startswith("link ")]
    assert found == []
    sandbox.ns.delete()
    wait_until(lambda: lab.host.link_names() == lab.links_before, "the end of the host's link")


def test_case_28_delete_without_result(lab: Lab) -> None:
    """DEL with no prevResult frees everything."""
    network, sandbox = lab.network(ipMasq=True), lab.sandbox()
    result = lab.add(network, sandbox)
    lab.delete(network, sandbox, with_result=False)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_28_delete_after_the_configuration_changed(lab: Lab) -> None:
    """DEL with another subnet, and without the masquerading of before, frees what was really made."""
    network, sandbox = lab.network(ipMasq=True), lab.sandbox()
    result = lab.add(network, sandbox)
    changed = lab.network(name=network["name"], ipMasq=False)
    lab.delete(changed, sandbox, with_result=False)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_29_fifty_at_once(lab: Lab) -> None:
    """Fifty parallel ADDs give fifty addresses and no error; fifty parallel DELs free them all."""
    network = lab.network()
    sandboxes = [lab.sandbox() for _ in range(50)]
    with ThreadPoolExecutor(50) as pool:
        results = list(pool.map(lambda sandbox: lab.add(network, sandbox), sandboxes))
        given = [address for result in results for address in ips_of(result)]
        assert len(set(given)) == 50
        assert all(
            bare_addresses(sandbox.ns, "eth0") == set(ips_of(result))
            for sandbox, result in zip(sandboxes, results, strict=True)
        )
        assert_works(lab, sandboxes[0], results[0])
        assert_works(lab, sandboxes[49], results[49])
        list(pool.map(lambda sandbox: lab.delete(network, sandbox), sandboxes))
    assert lab.leaks(*(sandbox.id for sandbox in sandboxes), *given) == []


def test_case_30_same_network_twice(lab: Lab) -> None:
    """One sandbox joins a network twice; both interfaces work, and deleting one leaves the other."""
    ipam = lab.ipam(lab.subnet4())
    first = lab.network(ipam=ipam)
    second = lab.network(ipam=ipam | {"routes": []}, name=first["name"])
    sandbox = lab.sandbox()
    result = lab.add(first, sandbox, "eth0")
    other = lab.add(second, sandbox, "net1")
    assert set(ips_of(result)).isdisjoint(ips_of(other))
    assert {"eth0", "net1"} <= set(links(sandbox.ns))
    assert bare_addresses(sandbox.ns, "net1") == set(ips_of(other))
    assert_works(lab, sandbox, result)
    lab.delete(second, sandbox, "net1")
    assert "net1" not in links(sandbox.ns)
    assert_works(lab, sandbox, result)
    lab.delete(first, sandbox, "eth0")
    assert lab.leaks(sandbox.id) == []


def test_case_31_dual_stack(lab: Lab) -> None:
    """A range per family: one address and one default route of each, none tentative when ADD returns."""
    network, sandbox = lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet6())), lab.sandbox()
    result = lab.add(network, sandbox)
    found = addresses(sandbox.ns, "eth0")
    assert sorted(info["family"] for info in found) == ["inet", "inet6"]
    assert not any(info.get("tentative") or info.get("dadfailed") for info in found)
    for family in (4, 6):
        (route,) = default_routes(sandbox.ns, family)
        assert route["dev"] == "eth0"
    assert_works(lab, sandbox, result)


def test_case_31_ipv6_only(lab: Lab) -> None:
    """A network with an IPv6 range alone gives no IPv4 and works."""
    sandbox = lab.sandbox()
    result = lab.add(lab.network(ipam=lab.ipam(lab.subnet6())), sandbox)
    assert [info["family"] for info in addresses(sandbox.ns, "eth0")] == ["inet6"]
    assert_works(lab, sandbox, result)


def test_case_37_no_ipam(lab: Lab) -> None:
    """Without an ipam section there is an interface and no address, and CHECK is content."""
    network, sandbox = lab.network(ipam={}), lab.sandbox()
    result = lab.add(network, sandbox)
    assert not result.get("ips")
    assert "eth0" in links(sandbox.ns)
    assert bare_addresses(sandbox.ns, "eth0") == set()
    lab.check(network, sandbox)
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id) == []


MACS = ["c2:11:22:33:44:01", "c2:11:22:33:44:02", "c2:11:22:33:44:03"]


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_case_38_mac(lab: Lab, sources: int) -> None:
    """CNI_ARGS < args.cni < runtimeConfig: the strongest MAC wins, in the sandbox and in the result."""
    network, sandbox = lab.network(), lab.sandbox()
    args = f"IgnoreUnknown=1;MAC={MACS[0]}"
    if sources > 1:
        network["plugins"][0]["args"] = {"cni": {"mac": MACS[1]}}
    result = lab.add(
        network, sandbox, args=args, runtime_config={"mac": MACS[2].upper()} if sources > 2 else {}
    )
    inside, _ = inside_and_host(result, sandbox)
    assert mac_of(sandbox.ns, "eth0") == MACS[sources - 1]
    assert inside["mac"].lower() == MACS[sources - 1]
    assert_works(lab, sandbox, result)


@pytest.mark.parametrize("mac", ["nonsense", "01:00:5e:00:00:01", "00:00:00:00:00:00"])
def test_case_38_impossible_mac(lab: Lab, mac: str) -> None:
    """A MAC that no device can have (none, a group's, zero) is refused."""
    sandbox = lab.sandbox()
    lab.refused(lab.network(), sandbox, mac=mac)
    assert lab.leaks(sandbox.id) == []


def _static(lab: Lab, **more: object) -> Json:
    subnet = lab.subnet4()
    return {"type": "static", "addresses": [{"address": f"{subnet[5]}/24", "gateway": str(subnet[1])}]} | more


def test_case_39_dns_of_the_ipam(lab: Lab) -> None:
    """Without a dns of its own the plugin hands on its IPAM's."""
    ipam = _static(lab, dns={"nameservers": ["192.0.2.53"], "search": ["a.example"]})
    result = lab.add(lab.network(ipam=ipam, version=lab.profile.chain_version), lab.sandbox())
    assert result["dns"]["nameservers"] == ["192.0.2.53"]
    assert result["dns"]["search"] == ["a.example"]


@pytest.mark.parametrize("nameservers", [["192.0.2.54"], []], ids=["other", "empty"])
def test_case_39_own_dns_wins(lab: Lab, nameservers: list[str]) -> None:
    """A dns in the configuration, even an empty list, replaces that of the IPAM."""
    ipam = _static(lab, dns={"nameservers": ["192.0.2.53"]})
    network = lab.network(ipam=ipam, version=lab.profile.chain_version, dns={"nameservers": nameservers})
    result = lab.add(network, lab.sandbox())
    assert (result.get("dns") or {}).get("nameservers", []) == nameservers


def test_case_40_loopback_in_the_chain(lab: Lab) -> None:
    """The reference loopback plugin, chained, brings lo up and hands our result on unchanged."""
    bare_network = lab.network(version=lab.profile.chain_version)
    sandbox = lab.sandbox()
    sandbox.ns.ip_batch("link set lo down")
    result = lab.add(bare_network, sandbox)
    passed = lab.runtime.execute(
        lab.runtime.plugin_config(bare_network, {"type": "loopback"}, {}, result),
        lab.runtime.environment("ADD", sandbox.id, sandbox.path, "lo"),
    )
    assert without_empty_dns(passed.json()) == without_empty_dns(result)
    assert "UP" in links(sandbox.ns)["lo"]["flags"]
    lab.check(bare_network, sandbox)


def test_two_hosts_side_by_side(lab: Lab, shared_host: Host) -> None:
    """Two sandboxes of one id on two networks are two attachments."""
    sandbox = lab.sandbox()
    one, two = lab.network(), lab.network(ipam=lab.ipam(lab.subnet4(), routes=[]))
    lab.add(one, sandbox, "eth0")
    lab.add(two, sandbox, "net1")
    lab.delete(one, sandbox, "eth0")
    assert "net1" in links(sandbox.ns)
    with pytest.raises(CniFailed):
        lab.add(two, sandbox, "net1")
    assert "net1" in links(sandbox.ns)
    assert sandbox.id in shared_host.state_text()
