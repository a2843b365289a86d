"""Cases 41 to 48: addresses. Held to host-local's behaviour, which users of CNI know."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from .kit.lab import Lab, ips_of
from .kit.observe import bare_addresses, default_routes, routes, wait_until
from .kit.plugin import CniFailed, Json


def _range(subnet: ipaddress.IPv4Network | ipaddress.IPv6Network, first: int, last: int) -> Json:
    return {"subnet": str(subnet), "rangeStart": str(subnet[first]), "rangeEnd": str(subnet[last])}


def test_case_41_first_addresses(lab: Lab) -> None:
    """A range per family: the first sandbox gets .2 and ::2, .1 and ::1 being the gateways' places."""
    subnet4, subnet6 = lab.subnet4(), lab.subnet6()
    network, sandbox = lab.network(ipam=lab.ipam(subnet4, subnet6)), lab.sandbox()
    result = lab.add(network, sandbox)
    assert ips_of(result) == [str(subnet4[2]), str(subnet6[2])]
    assert bare_addresses(sandbox.ns, "eth0") == {str(subnet4[2]), str(subnet6[2])}
    state = lab.host.state_text()
    assert sandbox.id in state
    assert str(subnet4[2]) in state
    assert str(subnet6[2]) in state


def test_case_41_gateway_of_the_range(lab: Lab) -> None:
    """A gateway that the range names is reported, is the default route's, and is never given out."""
    subnet = lab.subnet4()
    one = _range(subnet, 9, 11) | {"gateway": str(subnet[10])}
    network = lab.network(ipam=lab.ipam(ranges=[[one]]))
    first, second = lab.sandbox(), lab.sandbox()
    result = lab.add(network, first)
    assert result["ips"][0]["gateway"] == str(subnet[10])
    assert ips_of(result) == [str(subnet[9])]
    assert ips_of(lab.add(network, second)) == [str(subnet[11])]
    (route,) = default_routes(first.ns, 4)
    assert route["gateway"] == str(subnet[10])
    lab.refused(network, lab.sandbox())


def test_case_42_round_robin(lab: Lab) -> None:
    """The next address follows the last one given, not the lowest free."""
    subnet = lab.subnet4()
    network = lab.network(ipam=lab.ipam(subnet))
    sandboxes = [lab.sandbox() for _ in range(3)]
    assert ips_of(lab.add(network, sandboxes[0])) == [str(subnet[2])]
    assert ips_of(lab.add(network, sandboxes[1])) == [str(subnet[3])]
    lab.delete(network, sandboxes[0])
    assert ips_of(lab.add(network, sandboxes[2])) == [str(subnet[4])]


@pytest.mark.feature("immediate_reuse")
def test_case_42_wraps(lab: Lab) -> None:
    """After the last address of the range comes the first free one."""
    subnet = lab.subnet4()
    network = lab.network(ipam=lab.ipam(ranges=[[_range(subnet, 10, 12)]]))
    sandboxes = [lab.sandbox() for _ in range(3)]
    given = [ips_of(lab.add(network, sandbox))[0] for sandbox in sandboxes]
    assert given == [str(subnet[n]) for n in (10, 11, 12)]
    lab.delete(network, sandboxes[1])
    assert ips_of(lab.add(network, lab.sandbox())) == [str(subnet[11])]


def test_case_42_every_address_once(lab: Lab) -> None:
    """A range gives each of its addresses to one sandbox, and then none."""
    subnet = lab.subnet4()
    network = lab.network(ipam=lab.ipam(ranges=[[_range(subnet, 10, 13)]]))
    given = [ips_of(lab.add(network, lab.sandbox()))[0] for _ in range(4)]
    assert given == [str(subnet[n]) for n in (10, 11, 12, 13)]
    lab.refused(network, lab.sandbox())


def test_case_43_duplicate(lab: Lab) -> None:
    """A second ADD of the same container and interface is refused; another interface of it is fine."""
    network = lab.network()
    one = lab.sandbox()
    lab.add(network, one)
    elsewhere = lab.sandbox()
    with pytest.raises(CniFailed) as refused:
        lab.runtime.add(network, one.id, elsewhere.path, "eth0")
    assert "duplicate allocation is not allowed" in refused.value.text
    assert bare_addresses(one.ns, "eth0"), "the first attachment was harmed"
    result = lab.runtime.add(network, one.id, elsewhere.path, "net1")
    assert set(ips_of(result)) == bare_addresses(elsewhere.ns, "net1")
    lab.runtime.delete(network, one.id, elsewhere.path, "net1")
    assert bare_addresses(one.ns, "eth0")


def test_case_44_delete_of_a_stranger(lab: Lab) -> None:
    """DEL of a container that was never added succeeds, on a network that was never seen as well."""
    network, sandbox = lab.network(), lab.sandbox()
    lab.delete(network, sandbox)
    lab.add(network, sandbox)
    lab.delete(network, lab.sandbox())
    lab.check(network, sandbox)


@pytest.mark.feature("host_local_files")
def test_case_44_record_of_the_old_format(lab: Lab) -> None:
    """A record that names the container alone, without its interface, is freed by DEL."""
    network, sandbox = lab.network(), lab.sandbox()
    (address,) = ips_of(lab.add(network, sandbox))
    record = Path(lab.config_of(network)["ipam"]["dataDir"]) / network["name"] / address
    record.write_text(sandbox.id)
    lab.delete(network, sandbox)
    assert not record.exists()


REQUESTS = ["runtimeConfig", "args.cni", "CNI_ARGS"]


def _request(lab: Lab, network: Json, how: str, *ips: str) -> tuple[str, Json]:
    """Ask for addresses in one of the three ways: (CNI_ARGS, runtimeConfig)."""
    if how == "CNI_ARGS":
        return f"IgnoreUnknown=1;IP={','.join(ips)}", {}
    if how == "args.cni":
        network["plugins"][0]["args"] = {"cni": {"ips": list(ips)}}
        return "", {}
    return "", {"ips": list(ips)}


@pytest.mark.parametrize("how", REQUESTS)
def test_case_45_requested_address(lab: Lab, how: str) -> None:
    """An address can be asked for in three ways."""
    subnet = lab.subnet4()
    network, sandbox = lab.network(ipam=lab.ipam(subnet)), lab.sandbox()
    args, runtime_config = _request(lab, network, how, str(subnet[88]))
    result = lab.add(network, sandbox, args=args, runtime_config=runtime_config)
    assert ips_of(result) == [str(subnet[88])] == list(bare_addresses(sandbox.ns, "eth0"))


def test_case_45_requested_with_a_prefix(lab: Lab) -> None:
    """The request may carry a prefix length, as runtimes write it."""
    subnet = lab.subnet4()
    result = lab.add(
        lab.network(ipam=lab.ipam(subnet)), lab.sandbox(), runtime_config={"ips": [f"{subnet[88]}/24"]}
    )
    assert ips_of(result) == [str(subnet[88])]


@pytest.mark.parametrize("what", ["gateway", "network", "outside", "taken", "nonsense"])
def test_case_45_impossible_requests(lab: Lab, what: str) -> None:
    """The gateway, the network's own address, one outside every range, a taken one: refused, nothing left."""
    subnet = lab.subnet4()
    network = lab.network(ipam=lab.ipam(subnet))
    (taken,) = ips_of(lab.add(network, lab.sandbox()))
    wanted = {"gateway": str(subnet[1]), "network": str(subnet[0]), "outside": "203.0.113.9", "taken": taken}
    late = lab.sandbox()
    failure = lab.refused(network, late, ips=[wanted.get(what, "nonsense")])
    if what == "outside":
        assert "failed to allocate all requested IPs: " in failure.text
    lab.delete(network, late)  # without the request: whether DEL minds nonsense is not laid down
    assert late.id not in lab.host.state_text()


def test_case_45_one_request_per_range(lab: Lab) -> None:
    """Two addresses of two range sets can be asked for together."""
    one, two = lab.subnet4(), lab.subnet4()
    result = lab.add(
        lab.network(ipam=lab.ipam(one, two)),
        lab.sandbox(),
        runtime_config={"ips": [str(two[77]), str(one[88])]},
    )
    assert set(ips_of(result)) == {str(one[88]), str(two[77])}


def test_case_45_old_results_hold_one_address(lab: Lab) -> None:
    """Under 0.2.0 two addresses of one family cannot be told, and are refused."""
    network = lab.network(ipam=lab.ipam(lab.subnet4(), lab.subnet4()), version="0.2.0")
    sandbox = lab.sandbox()
    failure = lab.refused(network, sandbox)
    assert "0.2.0" in failure.text
    assert "1 address per family" in failure.text
    lab.delete(lab.network(name=network["name"]), sandbox)
    assert lab.leaks(sandbox.id) == []


def test_case_46_start_and_end_are_given(lab: Lab) -> None:
    """Both rangeStart and rangeEnd are given; network, gateway and broadcast addresses never are."""
    subnet = lab.subnet4(29)
    network = lab.network(ipam=lab.ipam(subnet))
    given = [ips_of(lab.add(network, lab.sandbox()))[0] for _ in range(5)]
    assert given == [str(subnet[n]) for n in (2, 3, 4, 5, 6)]
    lab.refused(network, lab.sandbox())


BAD_RANGES = {
    "too-small": ([[{"subnet": "10.62.0.0/31"}]], "too small to allocate from"),
    "host-bits": ([[{"subnet": "10.62.0.5/24"}]], "Network has host bits set"),
    "sets-overlap": ([[{"subnet": "10.62.0.0/24"}], [{"subnet": "10.62.0.0/25"}]], "overlap"),
    "subnets-overlap": ([[{"subnet": "10.62.0.0/24"}, {"subnet": "10.62.0.0/25"}]], "overlap"),
    "mixed-families": ([[{"subnet": "10.62.0.0/24"}, {"subnet": "fd00:62::/64"}]], "mixed address families"),
    "no-ranges": ([], "no IP ranges specified"),
    "start-outside": ([[{"subnet": "10.62.0.0/24", "rangeStart": "10.63.0.1"}]], ""),
    "end-outside": ([[{"subnet": "10.62.0.0/24", "rangeEnd": "10.63.0.1"}]], ""),
    "backwards": ([[{"subnet": "10.62.0.0/24", "rangeStart": "10.62.0.9", "rangeEnd": "10.62.0.8"}]], ""),
    "nonsense": ([[{"subnet": "nonsense"}]], ""),
}


@pytest.mark.parametrize("what", BAD_RANGES)
def test_case_46_bad_ranges(lab: Lab, what: str) -> None:
    """Ranges that cannot be meant are refused with the field's usual words."""
    ranges, phrase = BAD_RANGES[what]
    network, sandbox = lab.network(ipam=lab.ipam(ranges=ranges)), lab.sandbox()
    failure = lab.refused(network, sandbox)
    assert phrase in failure.text
    lab.delete(lab.network(name=network["name"]), sandbox)  # with a configuration that DEL can read
    assert lab.leaks(sandbox.id) == []


def test_case_46_single_range_form(lab: Lab) -> None:
    """The older form, subnet and rangeStart in the ipam section itself, still works."""
    subnet = lab.subnet4()
    ipam = lab.ipam(ranges=[]) | _range(subnet, 40, 50)
    del ipam["ranges"]
    assert ips_of(lab.add(lab.network(ipam=ipam), lab.sandbox())) == [str(subnet[40])]


def test_case_47_runtime_ranges_first(lab: Lab) -> None:
    """Ranges of the runtime come before those of the configuration."""
    static, dynamic = lab.subnet4(), lab.subnet4()
    result = lab.add(
        lab.network(ipam=lab.ipam(static)),
        lab.sandbox(),
        runtime_config={"ipRanges": [[_range(dynamic, 20, 29)]]},
    )
    assert ips_of(result) == [str(dynamic[20]), str(static[2])]


def _static(lab: Lab, *families: int) -> tuple[Json, list[str]]:
    """An ipam section of the reference plugin ``static``, and its addresses."""
    found: list[Json] = []
    for family in families:
        subnet = lab.subnet4() if family == 4 else lab.subnet6()
        prefix = subnet.prefixlen
        found.append({"address": f"{subnet[7]}/{prefix}", "gateway": str(subnet[1])})
    routes_ = [{"dst": "198.51.100.0/24"}, {"dst": "2001:db8:5::/48"}]
    section = {"type": "static", "addresses": found, "routes": routes_ if 6 in families else routes_[:1]}
    return section, [str(one["address"]).partition("/")[0] for one in found]


def test_case_48_static_addresses(lab: Lab) -> None:
    """A foreign IPAM plugin is called: three static addresses and two routes arrive, and CHECK agrees."""
    section, want = _static(lab, 4, 6, 4)
    network, sandbox = lab.network(ipam=section, version=lab.profile.chain_version), lab.sandbox()
    result = lab.add(network, sandbox)
    assert set(ips_of(result)) == set(want) == bare_addresses(sandbox.ns, "eth0")
    assert "198.51.100.0/24" in {route["dst"] for route in routes(sandbox.ns, 4)}
    assert "2001:db8:5::/48" in {route["dst"] for route in routes(sandbox.ns, 6)}
    lab.delete(network, sandbox)
    assert lab.leaks(sandbox.id) == []


def test_case_48_check_of_static_routes(lab: Lab) -> None:
    """CHECK is content with the routes that a foreign IPAM gave without a gateway."""
    section, _ = _static(lab, 4)
    network, sandbox = lab.network(ipam=section, version=lab.profile.chain_version), lab.sandbox()
    lab.add(network, sandbox)
    lab.check(network, sandbox)


def test_case_48_runtime_replaces_static(lab: Lab) -> None:
    """runtimeConfig.ips replaces the addresses of a foreign static IPAM; CNI_ARGS add to them. No gateway."""
    section, (configured,) = _static(lab, 4)
    other = lab.subnet4()[9]
    network, sandbox = lab.network(ipam=section, version=lab.profile.chain_version), lab.sandbox()
    result = lab.add(network, sandbox, runtime_config={"ips": [f"{other}/24"]})
    assert ips_of(result) == [str(other)]
    result = lab.add(network, lab.sandbox(), args=f"IgnoreUnknown=1;IP={other + 1}/24")
    assert ips_of(result) == [configured, str(other + 1)]


def test_case_48_foreign_host_local(lab: Lab) -> None:
    """With the reference host-local for IPAM, its record is there while attached and gone after DEL."""
    subnet = lab.subnet4()
    folder = lab.host.work / "foreign-ipam"
    section = {
        "type": "host-local",
        "dataDir": str(folder),
        "ranges": [[{"subnet": str(subnet)}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    network, sandbox = lab.network(ipam=section, version=lab.profile.chain_version), lab.sandbox()
    assert ips_of(lab.add(network, sandbox)) == [str(subnet[2])]
    record = folder / network["name"] / str(subnet[2])
    assert record.read_text().split() == [sandbox.id, "eth0"]
    lab.check(network, sandbox)
    away = record.rename(folder / "away")
    with pytest.raises(CniFailed):
        lab.check(network, sandbox)
    away.rename(record)
    sandbox.ns.delete()
    lab.delete(network, sandbox)
    assert not record.exists(), "a DEL without a living namespace must reach the IPAM plugin, too"
    wait_until(lambda: lab.host.link_names() == lab.links_before, "the end of the host's link")


def test_case_48_foreign_ipam_released_on_failure(lab: Lab) -> None:
    """An ADD that fails after a foreign IPAM has given an address calls its DEL (SPEC, Delegated Plugins)."""
    folder = lab.host.work / "foreign-ipam"
    section = {"type": "host-local", "dataDir": str(folder), "ranges": [[{"subnet": str(lab.subnet4())}]]}
    network = lab.network(ipam=section, mtu=10_000_000, version=lab.profile.chain_version)
    lab.refused(network, lab.sandbox())
    records = [one.name for one in (folder / network["name"]).glob("[0-9a-f]*")]
    assert records == []


def test_case_48_unknown_ipam(lab: Lab) -> None:
    """An IPAM plugin that is nowhere in CNI_PATH is an error that names it; nothing is left."""
    network, sandbox = lab.network(ipam={"type": "no-such-ipam"}), lab.sandbox()
    assert "no-such-ipam" in lab.refused(network, sandbox).text
    lab.delete(lab.network(name=network["name"]), sandbox)
    assert lab.leaks(sandbox.id) == []
