"""Cases 51 to 58: chains, port mappings, bandwidth, tuning, and CHECK."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from .kit.host import HOST4, HOST6, OUTSIDE4
from .kit.lab import Lab, Sandbox, ips_of, without_empty_dns
from .kit.observe import family_of, links, wait_until
from .kit.plugin import CniFailed, Json
from .kit.traffic import echo, ping, tcp_ask, tcp_refused, udp_ask
from .profile import Breaker

TUNING = {"type": "tuning"}


def test_case_51_later_interfaces_are_appended(lab: Lab) -> None:
    """As a later plugin of a chain, ours hands on what came before, at its old place, and appends its own."""
    network, sandbox = lab.network(before=[{"type": "loopback"}]), lab.sandbox()
    earlier = {
        "cniVersion": network["cniVersion"],
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": sandbox.path}],
        "ips": [{"interface": 0, "address": "127.0.0.1/8"}],
        "dns": {},
    }
    result = lab.add(network, sandbox)
    assert result["interfaces"][0]["name"] == earlier["interfaces"][0]["name"]
    assert result["ips"][0]["address"] == "127.0.0.1/8"
    assert result["ips"][0]["interface"] == 0
    ours = result["ips"][-1]
    assert result["interfaces"][ours["interface"]]["name"] == "eth0"
    lab.check(network, sandbox)


def test_case_51_tuning_with_nothing_to_do(lab: Lab) -> None:
    """A chained plugin with nothing to do leaves our result as it is; CHECK and DEL of the chain succeed."""
    network, sandbox = lab.network(after=[TUNING]), lab.sandbox()
    result = lab.add(network, sandbox)
    assert [one["name"] for one in result["interfaces"]][-1] == "eth0"
    passed = lab.runtime.execute(
        lab.runtime.plugin_config(network, TUNING, {}, result),
        lab.runtime.environment("ADD", sandbox.id, sandbox.path, "eth0"),
    )
    assert without_empty_dns(passed.json()) == without_empty_dns(result)
    lab.check(network, sandbox)
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def _mapping(host_port: int, container_port: int, protocol: str = "tcp", **more: str) -> Json:
    return {"hostPort": host_port, "containerPort": container_port, "protocol": protocol} | more


def _published(lab: Lab, network: Json, sandbox: Sandbox, *mappings: Json) -> list[str]:
    return ips_of(lab.add(network, sandbox, runtime_config={"portMappings": list(mappings)}))


def test_case_52_from_everywhere(lab: Lab, portmap: str) -> None:
    """A published TCP port answers to the host, also on 127.0.0.1, to the outside, a neighbour and itself."""
    network, sandbox, neighbour = lab.network(portmap=portmap, ipMasq=True), lab.sandbox(), lab.sandbox()
    (address,) = _published(lab, network, sandbox, _mapping(9999, 80))
    lab.add(network, neighbour)
    host = lab.host
    with echo(sandbox.ns, address, 80):
        assert tcp_ask(host.ns, "127.0.0.1", 9999) == b"hello"
        assert tcp_ask(host.ns, HOST4, 9999) == b"hello"
        assert tcp_ask(host.outside, HOST4, 9999) == b"hello"
        assert tcp_ask(neighbour.ns, HOST4, 9999) == b"hello"
        assert tcp_ask(sandbox.ns, HOST4, 9999) == b"hello"
    lab.delete(network, neighbour)
    lab.delete(network, sandbox)
    for client, target in ((host.ns, "127.0.0.1"), (host.ns, HOST4), (host.outside, HOST4)):
        assert tcp_refused(client, target, 9999)
    assert lab.leaks(sandbox.id, address) == []


def test_case_52_check(lab: Lab, portmap: str) -> None:
    """CHECK of a network with a published port is content."""
    network, sandbox = lab.network(portmap=portmap), lab.sandbox()
    _published(lab, network, sandbox, _mapping(9992, 80))
    lab.check(network, sandbox)


def test_case_52_ipv6(lab: Lab, portmap: str) -> None:
    """A published port answers over IPv6 as well: to the host, to the outside and to itself."""
    ipam = lab.ipam(lab.subnet4(), lab.subnet6())
    network, sandbox = lab.network(ipam=ipam, portmap=portmap, ipMasq=True), lab.sandbox()
    given = _published(lab, network, sandbox, _mapping(9998, 80))
    (address,) = (one for one in given if family_of(one) == 6)
    with echo(sandbox.ns, address, 80):
        for client in (lab.host.outside, lab.host.ns, sandbox.ns):
            assert tcp_ask(client, HOST6, 9998) == b"hello"
    lab.delete(network, sandbox)
    assert tcp_refused(lab.host.outside, HOST6, 9998)
    assert lab.leaks(sandbox.id, *given) == []


def test_case_52_host_ip_restricts(lab: Lab, portmap: str) -> None:
    """With hostIP the port is published on that address alone."""
    network, sandbox = lab.network(portmap=portmap), lab.sandbox()
    lab.host.ns.ip_batch("addr add 192.0.2.101/24 dev up0")
    try:
        (address,) = _published(lab, network, sandbox, _mapping(9997, 80, hostIP="192.0.2.101"))
        with echo(sandbox.ns, address, 80):
            for client in (lab.host.outside, lab.host.ns):
                assert tcp_ask(client, "192.0.2.101", 9997) == b"hello"
                assert tcp_refused(client, HOST4, 9997)
    finally:
        lab.host.ns.ip_batch("addr del 192.0.2.101/24 dev up0")


def test_case_52_several_mappings(lab: Lab, portmap: str) -> None:
    """TCP and UDP of one number, and a second pair, are separate mappings."""
    network, sandbox = lab.network(portmap=portmap), lab.sandbox()
    mappings = [_mapping(9996, 80), _mapping(9996, 81, "udp"), _mapping(9995, 82)]
    (address,) = _published(lab, network, sandbox, *mappings)
    outside = lab.host.outside
    with (
        echo(sandbox.ns, address, 80),
        echo(sandbox.ns, address, 81, udp=True, tag=b"udp:"),
        echo(sandbox.ns, address, 82),
    ):
        assert tcp_ask(outside, HOST4, 9996) == b"hello"
        assert udp_ask(outside, HOST4, 9996) == b"udp:hello"
        assert tcp_ask(outside, HOST4, 9995) == b"hello"


@pytest.mark.parametrize("client", ["outside", "host"])
def test_case_52_udp_follows_the_new_owner(lab: Lab, portmap: str, client: str) -> None:
    """Two sandboxes in turn on one UDP host port, the client keeping its source port: the second answers."""
    network, one, two = lab.network(portmap=portmap), lab.sandbox(), lab.sandbox()
    where = lab.host.outside if client == "outside" else lab.host.ns
    port = 9994 if client == "outside" else 9993
    (first,) = _published(lab, network, one, _mapping(port, 53, "udp"))
    with echo(one.ns, first, 53, udp=True, tag=b"one:"):
        assert udp_ask(where, HOST4, port, source_port=45678) == b"one:hello"
    lab.delete(network, one)
    (second,) = _published(lab, network, two, _mapping(port, 53, "udp"))
    with echo(two.ns, second, 53, udp=True, tag=b"two:"):
        assert udp_ask(where, HOST4, port, source_port=45678) == b"two:hello"


@pytest.mark.parametrize(
    ("host_port", "container_port"), [(0, 80), (-1, 80), (8080, 0), (8080, -1), (65536, 80), (8080, 65536)]
)
def test_case_53_impossible_ports(lab: Lab, portmap: str, host_port: int, container_port: int) -> None:
    """A port below 1 or above 65535 is refused; nothing is left."""
    network, sandbox = lab.network(portmap=portmap), lab.sandbox()
    failure = lab.refused(network, sandbox, portMappings=[_mapping(host_port, container_port)])
    if host_port < 1:
        assert f"Invalid host port number: {host_port}" in failure.text
    elif container_port < 1:
        assert f"Invalid container port number: {container_port}" in failure.text
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id) == []


def test_case_53_unknown_protocol(lab: Lab, portmap: str) -> None:
    """A protocol that nobody has is refused."""
    network, sandbox = lab.network(portmap=portmap), lab.sandbox()
    lab.refused(network, sandbox, portMappings=[_mapping(8080, 80, "carrier-pigeon")])
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id) == []


RATE, BURST, PAYLOAD = 1_600_000, 160_000, 280_000  # bit/s, bit, byte: 1.3 s at that rate after the burst


@pytest.mark.alone
@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_case_54_rate(lab: Lab, bandwidth: str, direction: str) -> None:
    """A limited sandbox takes at least 0.9 s more than its unlimited neighbour, and gets the rate."""
    network, limited, neighbour = lab.network(bandwidth=bandwidth), lab.sandbox(), lab.sandbox()
    limits = {f"{direction}Rate": RATE, f"{direction}Burst": BURST}
    durations = []
    for sandbox, settings in ((neighbour, {}), (limited, limits)):
        (address,) = ips_of(
            lab.add(network, sandbox, runtime_config={"bandwidth": settings} if settings else {})
        )
        with echo(sandbox.ns, address) as server:
            tcp_ask(lab.host.ns, address, server.port)  # neighbour entries are not what is measured
            start = time.monotonic()
            tcp_ask(lab.host.ns, address, server.port, bytes(PAYLOAD), timeout=20)
            durations.append(time.monotonic() - start)
    lab.check(network, limited)
    assert durations[1] - durations[0] >= 0.9
    assert durations[1] < 6


def test_case_54_two_interfaces(lab: Lab, bandwidth: str) -> None:
    """Two limited interfaces of one sandbox on one network do not collide."""
    ipam = lab.ipam(lab.subnet4())
    network = lab.network(bandwidth=bandwidth, ipam=ipam)
    second = lab.network(bandwidth=bandwidth, ipam=ipam | {"routes": []}, name=network["name"])
    limits = {"bandwidth": {"egressRate": RATE, "egressBurst": BURST}}
    sandbox = lab.sandbox()
    result = lab.add(network, sandbox, runtime_config=limits)
    lab.add(second, sandbox, "net1", runtime_config=limits)
    lab.delete(second, sandbox, "net1")
    lab.check(network, sandbox)
    assert ping(lab.host.ns, ips_of(result)[0])


@pytest.mark.parametrize("half", ["ingressRate", "ingressBurst", "egressRate", "egressBurst"])
def test_case_54_half_a_limit(lab: Lab, bandwidth: str, half: str) -> None:
    """A rate without a burst, or a burst without a rate, is refused."""
    network, sandbox = lab.network(bandwidth=bandwidth), lab.sandbox()
    lab.refused(network, sandbox, bandwidth={half: RATE})
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id) == []


def test_case_56_tuning(lab: Lab) -> None:
    """Chained tuning sets what it is asked to; CHECK of the chain accepts it, and DEL leaves nothing."""
    network, sandbox = lab.network(after=[TUNING | {"promisc": True, "mtu": 1400}]), lab.sandbox()
    result = lab.add(network, sandbox)
    device = links(sandbox.ns)["eth0"]
    assert device["mtu"] == 1400
    assert device["promiscuity"] >= 1
    lab.check(network, sandbox)
    assert ping(lab.host.ns, ips_of(result)[0])
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_56_tuning_sysctl(lab: Lab) -> None:
    """A sysctl of the interface can be set after us (tuning 1.1.1's own CHECK of IFNAME does not work)."""
    sysctl = {"net.ipv4.conf.IFNAME.arp_filter": "1"}
    network, sandbox = lab.network(after=[TUNING | {"sysctl": sysctl}]), lab.sandbox()
    lab.add(network, sandbox)
    assert sandbox.ns.read_sysctl("ipv4/conf/eth0/arp_filter") == "1"


def test_case_56_tuning_changes_the_mac(lab: Lab) -> None:
    """A MAC that tuning has changed is no reason for our CHECK to fail (trap 14)."""
    network, sandbox = lab.network(after=[TUNING | {"mac": "c2:b0:57:49:47:f1"}]), lab.sandbox()
    result = lab.add(network, sandbox)
    assert links(sandbox.ns)["eth0"]["address"] == "c2:b0:57:49:47:f1"
    assert result["interfaces"][-1]["mac"].lower() == "c2:b0:57:49:47:f1"
    lab.check(network, sandbox)


def test_case_56_chain_fails_after_us(lab: Lab) -> None:
    """A later plugin fails (a sysctl that is none of the network's): the DEL that is due frees ours."""
    network = lab.network(after=[TUNING | {"sysctl": {"kernel.sched_rt_runtime_us": "1"}}], ipMasq=True)
    sandbox = lab.sandbox()
    lab.refused(network, sandbox)
    lab.delete(network, sandbox)
    assert set(links(sandbox.ns)) == {"lo"}
    assert lab.leaks(sandbox.id) == []


def _attached(lab: Lab, *routes: str) -> tuple[Json, Sandbox, Json]:
    """A healthy attachment with a default route and further ones."""
    ipam = lab.ipam(lab.subnet4(), routes=[{"dst": dst} for dst in ("0.0.0.0/0", *routes)])
    network, sandbox = lab.network(ipam=ipam, version=lab.profile.chain_version), lab.sandbox()
    result = lab.add(network, sandbox)
    lab.check(network, sandbox)
    return network, sandbox, result


def _check_fails(lab: Lab, network: Json, sandbox: Sandbox) -> CniFailed:
    with pytest.raises(CniFailed) as failed:
        lab.check(network, sandbox)
    failed.value.outcome.error()
    return failed.value


BREAKS = {
    "address": "addr flush dev eth0 scope global",
    "route": "route del default",
    "down": "link set eth0 down",
    "link": "link del eth0",
}


@pytest.mark.parametrize("what", BREAKS)
def test_case_58_broken_in_the_sandbox(lab: Lab, what: str) -> None:
    """CHECK notices what is missing in the sandbox, says so with an error object, and DEL still succeeds."""
    network, sandbox, result = _attached(lab)
    sandbox.ns.ip_batch(BREAKS[what])
    _check_fails(lab, network, sandbox)
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_58_route_of_the_ipam(lab: Lab) -> None:
    """CHECK knows the routes of the configuration, too."""
    network, sandbox, _ = _attached(lab, "198.51.100.0/24")
    sandbox.ns.ip_batch("route del 198.51.100.0/24")
    _check_fails(lab, network, sandbox)


def test_case_58_harmless_changes(lab: Lab) -> None:
    """Further addresses, routes and links in the sandbox are none of CHECK's business."""
    network, sandbox, _ = _attached(lab)
    sandbox.ns.ip_batch(
        "addr add 198.51.100.7/32 dev eth0",
        "route add 203.0.113.0/24 dev eth0",
        "link add other type veth peer name another",
    )
    lab.check(network, sandbox)
    lab.delete(network, sandbox)


def test_case_58_host_end_gone(lab: Lab) -> None:
    """CHECK notices that the host's end of the link is gone, and DEL still succeeds."""
    network, sandbox, result = _attached(lab)
    for one in result["interfaces"]:
        if not one.get("sandbox"):
            lab.host.ns.ip_batch(f"link del {one['name']}")
    wait_until(lambda: "eth0" not in links(sandbox.ns), "the end of the pair")
    _check_fails(lab, network, sandbox)
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id, *ips_of(result)) == []


def test_case_58_host_route_gone(lab: Lab) -> None:
    """CHECK notices that the host has no way to the sandbox any more."""
    network, sandbox, result = _attached(lab)
    (address,) = ips_of(result)
    found = lab.host.ns.run(["ip", "route", "show", address]).strip()
    assert found, "the host reaches its sandboxes by routes"
    lab.host.ns.ip_batch(f"route del {address}")
    _check_fails(lab, network, sandbox)


def test_case_58_masquerade_gone(own_lab: Lab) -> None:
    """CHECK notices that the rules which masquerade are gone (a firewall's reload flushes them)."""
    lab = own_lab
    network, sandbox = lab.network(ipMasq=True, version=lab.profile.chain_version), lab.sandbox()
    lab.add(network, sandbox)
    lab.check(network, sandbox)
    lab.host.ns.run(["nft", "flush", "ruleset"])
    _check_fails(lab, network, sandbox)


def test_case_58_profile(own_lab: Lab, breaker: Breaker) -> None:
    """CHECK notices what the profile can break: a record, a program, an entry of a map."""
    lab = own_lab
    network, sandbox = lab.network(ipMasq=True, version=lab.profile.chain_version), lab.sandbox()
    result = lab.add(network, sandbox)
    lab.check(network, sandbox)
    host_end = next(one["name"] for one in result["interfaces"] if not one.get("sandbox"))
    lab.host.command(breaker.command, cid=sandbox.id, host_end=host_end, address=ips_of(result)[0])
    _check_fails(lab, network, sandbox)


def test_case_58_disable_check(lab: Lab) -> None:
    """With disableCheck the runtime does not call at all."""
    network, sandbox = lab.network(version=lab.profile.chain_version), lab.sandbox()
    lab.add(network, sandbox)
    sandbox.ns.ip_batch("link del eth0")
    lab.check(network | {"disableCheck": True}, sandbox)


def test_case_58_check_without_result(lab: Lab) -> None:
    """CHECK without a prevResult is refused: it is part of what CHECK gets."""
    network, sandbox = lab.network(), lab.sandbox()
    lab.add(network, sandbox)
    env = {"containerid": sandbox.id, "netns": sandbox.path, "ifname": "eth0"}
    assert lab.raw(lab.config_of(network), command="CHECK", **env).error()["code"] > 0


def test_outside_is_outside(lab: Lab) -> None:
    """The laboratory itself: the host reaches the outside, which has no route to sandboxes."""
    assert ping(lab.host.ns, OUTSIDE4)
    assert "10." not in lab.host.outside.run(["ip", "route"])
    assert Path(lab.host.work).is_dir()
