"""One policy, written for each contender: manifests for ours, nft's and iptables' words for the others. Pure.

Who may reach the server grows: ``count`` pairs of (source, service). They come as a user's do, 100 to a
policy: 49 nets of other sites, both families, and one label of pods, each for TCP and UDP of one port. The
last policy's label is the client's, so that who walks through a list finds the client at its end. One more
policy, the same at every size, lets the client open to the server and to DNS: both sides decide on each flow.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from portwright.api.frames import MAX_REQUEST

#: The service that is measured, TCP and UDP; and one that nobody may use.
SERVICE, CLOSED = 7007, 7008
SERVER, CLIENT = "server", "client"
_PER_POLICY, _PER_FILE = 100, 100
#: Other services: neighbours, so that each is a few intervals at most, whatever the number of policies.
_FIRST_PORT, _PORTS = 8000, 50
_PROTOCOLS = ("tcp", "udp")

#: (name, text), as `portwright policy apply` sends it.
File = tuple[str, str]


class Pair(NamedTuple):
    """Who may use what: ``source`` is a net, or the client's label."""

    source: str
    protocol: str
    port: int


def net_of(number: int) -> str:
    """The ``number``-th net of another site; every fifth is of IPv6."""
    if number % 5 == 4:
        return f"2001:db8:{number:x}::/48"
    first = int(ipaddress.ip_address("172.16.0.0")) + 16 * number
    return f"{ipaddress.ip_address(first)}/28"


def policies(count: int) -> list[list[Pair]]:
    """``count`` pairs (even, 2 at least) by policy, the client's at the end of the last."""
    out: list[list[Pair]] = []
    left, nets = count // 2, 0
    while left:
        sources = min(left, _PER_POLICY // 2)
        left -= sources
        names = [net_of(nets + n) for n in range(sources - 1)]
        nets += sources - 1
        names.append(f"app={CLIENT if not left else f'team-{len(out)}'}")
        port = SERVICE if not left else _FIRST_PORT + len(out) % _PORTS
        out.append([Pair(name, protocol, port) for name in names for protocol in _PROTOCOLS])
    return out


def manifests(count: int) -> list[File]:
    """The policies as files of NetworkPolicies, JSON in YAML's clothes, as tools write them."""
    objects = [_ingress(number, pairs) for number, pairs in enumerate(policies(count))]
    files = [objects[at : at + _PER_FILE] for at in range(0, len(objects), _PER_FILE)]
    found = [(f"server-{number:03}.yaml", _yaml(part)) for number, part in enumerate(files)]
    return [*found, ("client.yaml", _yaml([_EGRESS]))]


def requests(files: Iterable[File]) -> Iterator[list[File]]:
    """The files in as few requests as the API's bound allows (api/frames.py)."""
    batch: list[File] = []
    size = 0
    for name, text in files:
        # In JSON a line break is two characters, and a quotation mark too.
        need = len(json.dumps({"name": name, "text": text}).encode()) + 1
        if batch and size + need > MAX_REQUEST - 4096:
            yield batch
            batch, size = [], 0
        batch.append((name, text))
        size += need
    if batch:
        yield batch


def pods(server: Sequence[str], client: Sequence[str]) -> File:
    """The two sandboxes as Pod manifests with their addresses, for whom no daemon says where they are."""
    objects = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "status": {"podIPs": [{"ip": address} for address in addresses]},
        }
        for name, addresses in ((SERVER, server), (CLIENT, client))
    ]
    return "pods.yaml", _yaml(objects)


def nft(count: int, server: str, client: str, *, linear: bool) -> str:
    """The same policy for `nft -f`: established flows first, then each side's chain by its address.

    A set of (source, protocol, port) with intervals for each family, or with ``linear`` a rule for each pair.
    """
    lines = ["table inet sites {"]
    if not linear:
        for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
            elements = [
                f"{source} . {protocol} . {port}"
                for source, protocol, port in _resolved(count, client)
                if (":" in source) == (version == 6)
            ]
            filled = f"elements = {{ {', '.join(elements)} }}" if elements else ""
            lines.append(
                f"  set in{version} {{ type {kind} . inet_proto . inet_service; flags interval; {filled} }}"
            )
    lines.append("  chain server_in {")
    if linear:
        for source, protocol, port in _resolved(count, client):
            family = "ip6" if ":" in source else "ip"
            lines.append(f"    {family} saddr {source} {protocol} dport {port} return")
    else:
        lines += [
            f"    {family} saddr . meta l4proto . th dport @in{version} return"
            for family, version in (("ip", 4), ("ip6", 6))
        ]
    lines += ["    drop", "  }", "  chain client_out {"]
    lines += [f"    ip daddr {server} {protocol} dport {SERVICE} return" for protocol in _PROTOCOLS]
    lines += [f"    {protocol} dport 53 return" for protocol in _PROTOCOLS]
    lines += [
        "    drop",
        "  }",
        "  chain forward {",
        "    type filter hook forward priority filter; policy accept;",
        "    ct state vmap { established : accept, related : accept, invalid : drop }",
        f"    ip saddr vmap {{ {client} : jump client_out }}",
        f"    ip daddr vmap {{ {server} : jump server_in }}",
        "  }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def ipset(count: int, client: str) -> str:
    """For `ipset restore`: a set of (net, protocol:port) for each family."""
    lines = [
        f"create in{version} hash:net,port family {family} maxelem {max(count, 65536)}"
        for version, family in ((4, "inet"), (6, "inet6"))
    ]
    lines += [
        f"add in{6 if ':' in source else 4} {source},{protocol}:{port}"
        for source, protocol, port in _resolved(count, client)
    ]
    return "\n".join(lines) + "\n"


def iptables(count: int, server: str, client: str, *, linear: bool) -> dict[str, str]:
    """For `iptables-restore` and `ip6tables-restore`, by command; without ``linear`` for ipset's sets."""
    out = {}
    for command, version in (("iptables-restore", 4), ("ip6tables-restore", 6)):
        lines = ["*filter", ":FORWARD ACCEPT [0:0]", ":server_in - [0:0]", ":client_out - [0:0]"]
        lines += [
            "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
        ]
        if version == 4:
            lines += [f"-A FORWARD -s {client} -j client_out", f"-A FORWARD -d {server} -j server_in"]
            lines += [
                f"-A client_out -d {server} -p {p} -m {p} --dport {SERVICE} -j RETURN" for p in _PROTOCOLS
            ]
        lines += [f"-A client_out -p {p} -m {p} --dport 53 -j RETURN" for p in _PROTOCOLS]
        lines.append("-A client_out -j DROP")
        if linear:
            lines += [
                f"-A server_in -s {source} -p {p} -m {p} --dport {port} -j RETURN"
                for source, p, port in _resolved(count, client)
                if (":" in source) == (version == 6)
            ]
        else:
            lines.append(f"-A server_in -m set --match-set in{version} src,dst -j RETURN")
        out[command] = "\n".join([*lines, "-A server_in -j DROP", "COMMIT"]) + "\n"
    return out


def _resolved(count: int, client: str) -> Iterator[Pair]:
    """The pairs as addresses; a label that no pod has is of nobody."""
    for pairs in policies(count):
        for pair in pairs:
            if pair.source == f"app={CLIENT}":
                yield pair._replace(source=client)
            elif not pair.source.startswith("app="):
                yield pair


def _ingress(number: int, pairs: Sequence[Pair]) -> object:
    sources = [
        {"podSelector": {"matchLabels": {"app": source.removeprefix("app=")}}}
        if source.startswith("app=")
        else {"ipBlock": {"cidr": source}}
        for source in dict.fromkeys(pair.source for pair in pairs)
    ]
    ports = [{"protocol": protocol.upper(), "port": pairs[0].port} for protocol in _PROTOCOLS]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"site-{number:04}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": SERVER}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": sources, "ports": ports}],
        },
    }


_EGRESS = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "client"},
    "spec": {
        "podSelector": {"matchLabels": {"app": CLIENT}},
        "policyTypes": ["Egress"],
        "egress": [
            {
                "to": [{"podSelector": {"matchLabels": {"app": SERVER}}}],
                "ports": [{"protocol": p.upper(), "port": SERVICE} for p in _PROTOCOLS],
            },
            {"ports": [{"protocol": p.upper(), "port": 53} for p in _PROTOCOLS]},
        ],
    },
}


def _yaml(objects: Iterable[object]) -> str:
    return "---\n".join(f"{json.dumps(one)}\n" for one in objects)
