"""The network configuration as values of the model."""

from __future__ import annotations

import json

import pytest

from portwright.cni.config import NetConf
from portwright.cni.errors import CniError
from portwright.cni.request import parse
from portwright.model.network import AddressRange, Dns, Route
from portwright.model.port import Limits, PortMapping

ENV = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": "/n", "CNI_IFNAME": "eth0"}


def read(conf: dict[str, object], args: str = "", version: str = "1.1.0") -> NetConf:
    body = {"cniVersion": version, "name": "net", **conf}
    return parse({**ENV, "CNI_ARGS": args}, json.dumps(body).encode()).config


def refused(conf: dict[str, object], args: str = "", version: str = "1.1.0") -> CniError:
    with pytest.raises(CniError) as caught:
        read(conf, args, version)
    return caught.value


def test_defaults() -> None:
    """A bare configuration: veth, network by its own name, no addresses, nothing said about dns."""
    got = read({})

    assert (got.network, got.model, got.mtu, got.ip_masq, got.ipam, got.dns) == (
        "net",
        "veth",
        None,
        False,
        None,
        None,
    )
    assert got.prev_result is None


def test_the_whole() -> None:
    """Every key arrives as a value of the model, and the network it describes has them."""
    got = read(
        {
            "network": "blue",
            "mtu": 1400,
            "ipMasq": True,
            "model": "netkit",
            "reach": ["red", "*"],
            "isolation": "strict",
            "routes": [{"dst": "192.0.2.0/24"}],
            "dns": {"nameservers": ["2001:DB8::53"], "domain": "x", "search": ["a"], "options": ["o"]},
            "ipam": {
                "type": "portwright",
                "subnet": "10.1.2.0/24",
                "rangeStart": "10.1.2.9",
                "gateway": "10.1.2.1",
                "ranges": [[{"subnet": "2001:DB8:1::/64"}]],
                "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.2.1", "mtu": 1300, "priority": 0, "table": 0}],
                "reserved": ["10.1.2.7", "10.1.2.64/26"],
            },
        }
    )
    network = got.as_network(7)

    assert network.name == "blue"
    assert network.net_id == 7
    assert network.pools == (
        (AddressRange(subnet="10.1.2.0/24", start="10.1.2.9", gateway="10.1.2.1"),),
        (AddressRange(subnet="2001:db8:1::/64"),),
    )
    assert network.reserved == ("10.1.2.7", "10.1.2.64/26")
    assert network.routes == (
        Route(dst="192.0.2.0/24"),
        Route(dst="0.0.0.0/0", gw="10.1.2.1", mtu=1300, table=0),
    )
    assert network.dns == Dns(nameservers=("2001:db8::53",), domain="x", search=("a",), options=("o",))
    assert (network.mtu, network.masquerade, network.reach, network.source) == (
        1400,
        True,
        ("red", "*"),
        "cni",
    )
    assert got.model == "netkit"
    assert network.isolation == "strict"
    assert read({}).as_network(7).isolation == "open"


def test_17_keys_in_any_case() -> None:
    """Case 17: keys match in any letter case, at every level, like Go's decoder."""
    canonical = read(
        {
            "mtu": 1400,
            "ipam": {"subnet": "10.0.0.0/24", "rangeStart": "10.0.0.5"},
            "runtimeConfig": {
                "bandwidth": {"ingressRate": 8, "ingressBurst": 9},
                "ipRanges": [[{"subnet": "fd00::/64"}]],
            },
            "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.9/24"}]},
        }
    )
    odd = read(
        {
            "MTU": 1400,
            "IPAM": {"SUBNET": "10.0.0.0/24", "rangestart": "10.0.0.5"},
            "RuntimeConfig": {
                "bandWidth": {"IngressRate": 8, "ingressburst": 9},
                "IPRanges": [[{"SubNet": "fd00::/64"}]],
            },
            "PREVRESULT": {"CNIVersion": "1.0.0", "IPs": [{"Address": "10.0.0.9/24"}]},
        }
    )

    assert odd == canonical
    assert odd.pools[0][0].subnet == "fd00::/64"


@pytest.mark.parametrize("ipam", [None, {}])
def test_37_without_ipam(ipam: object) -> None:
    """Case 37: no ipam, or an empty one, is an attachment without addresses from here."""
    got = read({"ipam": ipam})

    assert got.ipam is None
    assert got.pools == ()


def test_foreign_ipam_is_not_judged() -> None:
    """A foreign type is kept by name; its keys are its own business."""
    got = read({"ipam": {"type": "host-local", "ranges": "whatever", "dataDir": "/x"}})

    assert got.ipam is not None
    assert got.ipam.foreign
    assert got.pools == ()


@pytest.mark.parametrize(
    ("top", "cni", "args", "runtime", "expected"),
    [
        ("", "", "", "", ""),
        ("02:00:00:00:00:01", "", "", "", "02:00:00:00:00:01"),
        ("02:00:00:00:00:01", "", "02-00-00-00-00-AB", "", "02:00:00:00:00:ab"),
        ("02:00:00:00:00:01", "02:00:00:00:00:03", "02:00:00:00:00:02", "", "02:00:00:00:00:03"),
        ("", "02:00:00:00:00:03", "02:00:00:00:00:02", "02:00:00:00:00:04", "02:00:00:00:00:04"),
    ],
)
def test_38_mac_precedence(top: str, cni: str, args: str, runtime: str, expected: str) -> None:
    """Case 38: configuration < CNI_ARGS < args.cni < runtimeConfig."""
    conf: dict[str, object] = {"mac": top, "args": {"cni": {"mac": cni}}, "runtimeConfig": {"mac": runtime}}

    assert read(conf, f"MAC={args}").requested.mac == expected


@pytest.mark.parametrize(
    ("cni", "args", "runtime", "expected"),
    [
        ([], "10.0.0.1,fd00::1", [], ("10.0.0.1", "fd00::1")),
        (["10.0.0.2/24"], "10.0.0.1", [], ("10.0.0.2",)),
        (["10.0.0.2/24"], "10.0.0.1", ["FD00::3/64", "10.0.0.3"], ("fd00::3", "10.0.0.3")),
    ],
)
def test_requested_ips(cni: list[str], args: str, runtime: list[str], expected: tuple[str, ...]) -> None:
    """Asked addresses come bare and canonical, from the strongest channel that names any."""
    conf: dict[str, object] = {"args": {"cni": {"ips": cni}}, "runtimeConfig": {"ips": runtime}}

    assert read(conf, f"IP={args}").requested.ips == expected


@pytest.mark.parametrize(
    ("conf", "runtime", "expected"),
    [
        (None, None, Dns(nameservers=("9.9.9.9",))),
        ({}, None, Dns(nameservers=("9.9.9.9",))),
        ({"nameservers": []}, None, Dns()),
        ({"nameservers": ["1.1.1.1"]}, None, Dns(nameservers=("1.1.1.1",))),
        (
            {"nameservers": ["1.1.1.1"]},
            {"servers": ["8.8.8.8"], "searches": ["s"]},
            Dns(nameservers=("8.8.8.8",), search=("s",)),
        ),
    ],
)
def test_39_dns(conf: object, runtime: object, expected: Dns) -> None:
    """Case 39: an empty list overrides IPAM's dns, an absent one keeps it; the runtime's is strongest."""
    got = read({"dns": conf, "runtimeConfig": {"dns": runtime}})

    assert got.resolve_dns(Dns(nameservers=("9.9.9.9",))) == expected


@pytest.mark.parametrize("form", [[{"key": "app", "value": "web"}], {"app": "web"}])
def test_labels(form: object) -> None:
    """Labels: the pod's identity from CNI_ARGS, and args.cni.labels in both forms."""
    got = read({"args": {"cni": {"labels": form}}}, "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u")

    assert got.requested.labels == {
        "io.kubernetes.pod.namespace": "ns",
        "io.kubernetes.pod.name": "p",
        "io.kubernetes.pod.uid": "u",
        "app": "web",
    }


@pytest.mark.parametrize("own", [{}, {"app": "web"}])
def test_no_label_is_the_pods_identity(own: dict[str, str]) -> None:
    """What CNI_ARGS says of the pod, all or a part of it, no label says otherwise or adds to; without a word
    there the labels say it."""
    identity = {f"io.kubernetes.pod.{key}": "forged" for key in ("namespace", "name", "uid")}
    for args, told in (
        ("K8S_POD_NAMESPACE=ns", {"io.kubernetes.pod.namespace": "ns"}),
        ("K8S_POD_NAME=p;K8S_POD_UID=u", {"io.kubernetes.pod.name": "p", "io.kubernetes.pod.uid": "u"}),
        ("K8S_POD_NAME=", identity),
        ("", identity),
    ):
        got = read({"args": {"cni": {"labels": identity | own}}}, args)
        assert got.requested.labels == told | own


def test_port_mappings() -> None:
    """Port mappings become model values; the runtime's replace the configuration's."""
    static = [{"hostPort": 1, "containerPort": 2}]
    runtime = [
        {"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "::1"},
        {"hostPort": 8080, "containerPort": 80, "protocol": "udp"},
    ]

    assert read({"portMappings": static}).requested.port_mappings == (
        PortMapping(host_port=1, container_port=2),
    )
    assert read(
        {"portMappings": static, "runtimeConfig": {"portMappings": runtime}}
    ).requested.port_mappings == (
        PortMapping(host_port=8080, container_port=80, host_ip="::1"),
        PortMapping(host_port=8080, container_port=80, protocol="udp"),
    )


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"hostPort": 0, "containerPort": 80}, "Invalid host port number: 0"),
        ({"hostPort": -1, "containerPort": 80}, "Invalid host port number: -1"),
        ({"hostPort": 65536, "containerPort": 80}, "Invalid host port number: 65536"),
        ({"containerPort": 80}, "Invalid host port number: 0"),
        ({"hostPort": 80}, "Invalid container port number: 0"),
        ({"hostPort": "80", "containerPort": 80}, "must be a whole number"),
        ({"hostPort": True, "containerPort": 80}, "must be a whole number"),
        ({"hostPort": 80, "containerPort": 80, "protocol": "icmp"}, "must be one of tcp, udp, sctp"),
        ({"hostPort": 80, "containerPort": 80, "hostIP": "localhost"}, "must be an IP address"),
        ({"hostPort": 80, "containerPort": 80, "hostIP": "fe80::1%eth0"}, "without zone"),
    ],
)
def test_53_bad_port_mappings(mapping: dict[str, object], text: str) -> None:
    """Case 53: bad ports, protocols and host addresses are code 7 and name field and value."""
    error = refused({"runtimeConfig": {"portMappings": [mapping]}})

    assert error.number == 7
    assert text in error.msg
    assert "runtimeConfig.portMappings[0]." in error.msg


def test_empty_capabilities_say_nothing() -> None:
    """CRI runtimes send empty capabilities for pods that ask for nothing; the configuration's stay."""
    static: dict[str, object] = {
        "portMappings": [{"hostPort": 1, "containerPort": 2}],
        "bandwidth": {"egressRate": 1, "egressBurst": 1},
        "dns": {"domain": "x"},
    }
    empty = {
        "portMappings": [],
        "bandwidth": {},
        "dns": {"servers": [], "searches": None, "options": []},
        "ips": [],
        "ipRanges": [],
        "mac": "",
        "deviceID": "",
    }

    assert read({**static, "runtimeConfig": empty}) == read(static)


def test_one_host_port_twice() -> None:
    """The same host port twice in one request is refused."""
    twice = [{"hostPort": 80, "containerPort": 1}, {"hostPort": 80, "containerPort": 2, "protocol": "tcp"}]

    assert "mapped twice" in refused({"portMappings": twice}).msg


def test_bandwidth() -> None:
    """Rates keep the sandbox's view and CNI's units; the runtime's replace the configuration's."""
    conf = {
        "bandwidth": {"ingressRate": 1, "ingressBurst": 1},
        "runtimeConfig": {"bandwidth": {"egressRate": 8000, "egressBurst": 16000}},
    }

    assert read(conf).requested.limits == Limits(egress_rate=8000, egress_burst=16000)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"ingressRate": 8000}, "if rate is set, burst must also be set"),
        ({"egressBurst": 8000}, "if burst is set, rate must also be set"),
        ({"egressRate": -1, "egressBurst": 1}, "must be 0 to"),
        ({"egressRate": 1 << 64, "egressBurst": 1}, "must be 0 to"),
        ({"egressRate": 1.5, "egressBurst": 1}, "must be a whole number"),
    ],
)
def test_bad_bandwidth(value: object, text: str) -> None:
    """Case 54: a rate without burst and out-of-range numbers are code 7."""
    error = refused({"runtimeConfig": {"bandwidth": value}})

    assert error.number == 7
    assert text in error.msg


@pytest.mark.parametrize(
    ("conf", "code", "text"),
    [
        ({"mtu": 67}, 7, "mtu: must be 0"),
        ({"mtu": -1}, 7, "mtu: must be 0 to 65535"),
        ({"mtu": "1500"}, 7, "mtu: must be a whole number"),
        ({"ipMasq": 1}, 7, "ipMasq: must be true or false"),
        ({"model": "warp"}, 2, "unsupported field model"),
        ({"reach": ["-x"]}, 7, "reach: invalid characters"),
        ({"isolation": "closed"}, 7, "isolation: must be open, tenant or strict"),
        ({"network": "a b"}, 7, "network: invalid characters"),
        ({"mac": "01:00:5e:00:00:01"}, 7, "mac: must be a unicast"),
        ({"runtimeConfig": {"mac": "02:00"}}, 7, "runtimeConfig.mac: must be a MAC address"),
        ({"runtimeConfig": {"mac": "02:00-00:00:00:01"}}, 7, "must be a MAC address"),
        ({"runtimeConfig": {"ips": ["10.0.0"]}}, 7, "runtimeConfig.ips[0]: must be an IP address"),
        ({"runtimeConfig": {"ips": ["10.0.0.1", "10.0.0.1/8"]}}, 7, "twice"),
        ({"runtimeConfig": {"deviceID": "0000:00:01.0"}}, 2, "runtimeConfig.deviceID"),
        ({"runtimeConfig": []}, 7, "runtimeConfig: must be an object"),
        ({"ipam": {"ranges": [[]]}}, 7, "no IP ranges specified"),
        ({"ipam": {"ranges": [{"subnet": "10.0.0.0/24"}]}}, 7, "ipam.ranges[0]: must be an array"),
        ({"ipam": {"ranges": [[{}]]}}, 7, "ipam.ranges[0][0].subnet"),
        ({"ipam": {"rangeStart": "10.0.0.1"}}, 7, "no IP ranges specified"),
        ({"ipam": {"subnet": "10.1.2.3/24"}}, 7, "the network address is 10.1.2.0"),
        ({"ipam": {"subnet": "10.1.2.0"}}, 7, "with a prefix length"),
        ({"ipam": {"subnet": "10.1.2.0/33"}}, 7, "with a prefix length"),
        ({"ipam": {"subnet": "10.1.2.0/24", "rangeEnd": "fd00::1"}}, 7, "mixed address families"),
        (
            {"ipam": {"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}]]}},
            7,
            "mixed address families",
        ),
        ({"ipam": {"reserved": ["10.0.0.1/24"]}}, 7, "ipam.reserved[0]: must be an address or a subnet"),
        ({"ipam": {"resolvConf": "/etc/resolv.conf"}}, 2, "ipam.resolvConf"),
        ({"ipam": {"addresses": [{"address": "10.0.0.1/24"}]}}, 2, "ipam.addresses"),
        ({"routes": [{"dst": "10.0.0.1/24"}]}, 7, "routes[0].dst: has host bits set"),
        ({"routes": [{"dst": "10.0.0.0/24", "gw": "fd00::1"}]}, 7, "routes[0].gw: must be of the family"),
        ({"routes": [{}]}, 7, "routes[0].dst"),
        ({"dns": {"nameservers": ["one.one"]}}, 7, "dns.nameservers[0]: must be an IP address"),
        ({"args": {"cni": {"labels": [{"value": "x"}]}}}, 7, "a label needs a key"),
        ({"args": {"cni": {"labels": {"a": 1}}}}, 7, "args.cni.labels.a: must be a string"),
        ({"prevResult": {"ips": [{"address": "10.0.0.1"}]}}, 7, "prevResult.ips[0].address"),
        ({"prevResult": {"cniVersion": "7"}}, 1, "incompatible CNI versions"),
    ],
)
def test_refusals_name_the_field(conf: dict[str, object], code: int, text: str) -> None:
    """A known key with a wrong value is refused by its dotted name, never ignored."""
    error = refused(conf)

    assert error.number == code
    assert text in str(error)


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_45_old_versions_have_one_address_per_family(version: str) -> None:
    """Case 45: two addresses of a family don't fit below 0.3.0; one of each does."""
    two: dict[str, object] = {"ipam": {"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.0.1.0/24"}]]}}
    both: dict[str, object] = {"ipam": {"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/64"}]]}}

    assert (
        f"CNI version {version} does not support more than 1 address per family"
        in refused(two, version=version).msg
    )
    assert len(read(both, version=version).pools) == 2
    assert len(read(two, version="0.3.0").pools) == 2


def test_47_runtime_ranges_come_first() -> None:
    """Case 47: runtimeConfig.ipRanges precede the static ones and are not part of the network."""
    got = read(
        {"ipam": {"subnet": "10.0.0.0/24"}, "runtimeConfig": {"ipRanges": [[{"subnet": "10.9.0.0/24"}]]}}
    )

    assert [one[0].subnet for one in got.pools] == ["10.9.0.0/24", "10.0.0.0/24"]
    assert [one[0].subnet for one in got.as_network(1).pools] == ["10.0.0.0/24"]
