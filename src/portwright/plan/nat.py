r"""NAT and port mappings: the nftables table of ours, as the scripts to send.

Everything lives in one table of family ``inet``, ``portwright`` or ``portwright_<instance>``,
so that daemons work side by side and nobody else's rules are read or written. ``inet`` and not
one table for each of ip and ip6: nat chains exist there since Linux 5.2, the two families share
their chains, and one ``delete table`` removes all there is. A reload of another owner's tables
(firewalld, iptables-restore, docker) leaves it alone; ``flush ruleset`` does not, and
:func:`replace_table` brings it back in one transaction.

Mappings are map elements: the rules never change with the number of ports, lookups are by
hash, and adding one costs the same with ten or ten thousand present.

::

    maps   any4 bound4 any6 bound6     (host address.) protocol . host port : address . port
    sets   hairpin4 hairpin6           address . address, of every published sandbox
           masq4 masq6                 subnets whose traffic to the outside is masqueraded
           local4 local6               all subnets of ours: never translated between them

    guard        raw - 5     nothing from a sandbox may carry a loopback address
    prerouting   dstnat - 5  \ publish: the bound maps first, then, to any local address, the
    output       dstnat - 5  /           others
    postrouting  srcnat - 5  hairpin, then the host's loopback, then masquerading

The priorities put us five ahead of the customary ones, so that the order against other
owners' chains is fixed and not that of registration. Only the first packet of a connection
passes the nat chains.

Three sources have to be translated for a reply to find its way:

- A sandbox that reaches itself through the host (*hairpin*) would answer itself directly. Its
  source becomes the host address that it had dialled (``ct original daddr``): an address it can
  route to, and no choice among the host's addresses to be surprised by. The set holds pairs,
  because an nft rule can compare a field to a set, but not to another field (before 6.13).
- The host's 127.0.0.1 means something else inside. ``masquerade`` would look for an address
  on the representor, has none there, and takes the first one of any other device: nothing works
  on a laptop without a link. So the source becomes the sandbox's gateway 169.254.1.1,
  which is assigned nowhere: conntrack translates the reply back before it is routed.
- ``::1`` likewise. Not to the gateway, for fe80::1 is link-local, and a UDP server that is not
  bound to an address would answer from its own link-local one (RFC 6724, rule 2), which conntrack
  does not expect. So it is the gateway's IPv4 address in the prefix for translation inside a site
  (RFC 8215, 64:ff9b:1::/48). The sandbox needs a route to it, which its default route is.

From sandbox A by a host port to sandbox B, A's address stays: B's policy and logs see A.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence

from portwright.model.errors import InvalidInput
from portwright.model.network import GATEWAY4
from portwright.model.port import PortAddress, PortMapping
from portwright.plan.publish import Element, Publication, elements, missing

#: Whom a sandbox sees when the host's own 127.0.0.1 and ::1 call it.
LOOPBACK_SOURCE4 = GATEWAY4
LOOPBACK_SOURCE6 = "64:ff9b:1::a9fe:101"
#: Every representor's name begins with this (model.port.rep_name).
_REP = '"pw*"'
_SETS = {
    "any4": ("map", "type inet_proto . inet_service : ipv4_addr . inet_service"),
    "any6": ("map", "type inet_proto . inet_service : ipv6_addr . inet_service"),
    "bound4": ("map", "type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"),
    "bound6": ("map", "type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service"),
    "hairpin4": ("set", "type ipv4_addr . ipv4_addr"),
    "hairpin6": ("set", "type ipv6_addr . ipv6_addr"),
    "masq4": ("set", "type ipv4_addr; flags interval"),
    "masq6": ("set", "type ipv6_addr; flags interval"),
    "local4": ("set", "type ipv4_addr; flags interval"),
    "local6": ("set", "type ipv6_addr; flags interval"),
}
# Numbers for the priorities: nft 1.0.6 knows the name dstnat in prerouting only.
_CHAINS = {
    "guard": "type filter hook prerouting priority -305; policy accept",
    "publish": "",
    "prerouting": "type nat hook prerouting priority -105; policy accept",
    "output": "type nat hook output priority -105; policy accept",
    "postrouting": "type nat hook postrouting priority 95; policy accept",
}
#: Destinations that masquerading leaves alone: they stay on their link.
_ON_LINK4 = "{ 169.254.0.0/16, 224.0.0.0/4, 255.255.255.255 }"
_ON_LINK6 = "{ fe80::/10, ff00::/8 }"
#: (chain, comment, rule). The comment is the rule's name, by which verify() finds it.
_RULES = (
    ("guard", "loopback source", f"iifname {_REP} ip saddr 127.0.0.0/8 counter drop"),
    ("guard", "loopback destination", f"iifname {_REP} ip daddr 127.0.0.0/8 counter drop"),
    ("publish", "bound4", "dnat ip to ip daddr . meta l4proto . th dport map @bound4"),
    ("publish", "bound6", "dnat ip6 to ip6 daddr . meta l4proto . th dport map @bound6"),
    ("publish", "any4", "fib daddr type local dnat ip to meta l4proto . th dport map @any4"),
    ("publish", "any6", "fib daddr type local dnat ip6 to meta l4proto . th dport map @any6"),
    ("prerouting", "publish", "jump publish"),
    ("output", "publish", "jump publish"),
    ("postrouting", "hairpin4",
     "ct status dnat ip saddr . ip daddr @hairpin4 snat ip to ct original ip daddr"),
    ("postrouting", "hairpin6",
     "ct status dnat ip6 saddr . ip6 daddr @hairpin6 snat ip6 to ct original ip6 daddr"),
    ("postrouting", "host loopback4",
     f"oifname {_REP} ct status dnat ip saddr 127.0.0.0/8 snat ip to {LOOPBACK_SOURCE4}"),
    ("postrouting", "host loopback6",
     f"oifname {_REP} ct status dnat ip6 saddr ::1 snat ip6 to {LOOPBACK_SOURCE6}"),
    ("postrouting", "masquerade4",
     f"ip saddr @masq4 ip daddr != @local4 ip daddr != {_ON_LINK4} masquerade"),
    ("postrouting", "masquerade6",
     f"ip6 saddr @masq6 ip6 daddr != @local6 ip6 daddr != {_ON_LINK6} masquerade"),
)  # fmt: skip


def table_name(instance: str = "") -> str:
    """The table's name: ``portwright``, or ``portwright_<instance>`` for a daemon beside the first.

    Raises InvalidInput unless ``instance`` is at most 32 letters, digits and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]{0,32}", instance):
        raise InvalidInput("instance", instance, "must be at most 32 letters, digits and underscores")
    return f"portwright_{instance}" if instance else "portwright"


def base_table(instance: str) -> str:
    """A script that makes the table with its sets, chains and rules, or renews the rules.

    Idempotent: run again, it leaves one copy of each rule and every element in place, without
    a moment in between (one transaction). It fails with EEXIST or EOPNOTSUPP where a table
    of this name has chains or sets of another shape, of an older release: then
    :func:`replace_table`.
    """
    table = table_name(instance)
    lines = [f"add table inet {table}"]
    lines += [f"add {kind} inet {table} {name} {{ {spec}; }}" for name, (kind, spec) in _SETS.items()]
    lines += [
        f"add chain inet {table} {name} {{ {spec}; }}" if spec else f"add chain inet {table} {name}"
        for name, spec in _CHAINS.items()
    ]
    lines += [f"flush chain inet {table} {name}" for name in _CHAINS]
    lines += [f'add rule inet {table} {chain} {rule} comment "{name}"' for chain, name, rule in _RULES]
    return _script(lines)


def remove_table(instance: str) -> str:
    """A script that removes the table and all in it. No error if there is none.

    Connections that were translated stay so until conntrack forgets them.
    """
    table = table_name(instance)
    return _script([f"add table inet {table}", f"delete table inet {table}"])


def replace_table(
    instance: str,
    publications: Iterable[Publication],
    local: Iterable[str] = (),
    masquerade: Iterable[str] = (),
) -> str:
    """A script that makes the table anew with everything in it, whatever was there before.

    For a start after a crash, an upgrade, or a ``flush ruleset`` by someone else. One
    transaction: no packet meets a table that is half there. Arguments as of :func:`subnets`.
    """
    lines = [remove_table(instance), base_table(instance), subnets(instance, local, masquerade)]
    lines += [port_elements_add(instance, p.mappings, p.addresses, holder=p.holder) for p in publications]
    return "".join(lines)


def port_elements_add(
    instance: str,
    mappings: Iterable[PortMapping],
    addresses: Iterable[PortAddress | str],
    *,
    holder: str = "",
) -> str:
    """A script that publishes the mappings; '' if there are none.

    ``create`` and not ``add``: where a host port is taken after all, the kernel refuses the
    whole transaction with EEXIST, and the first writer keeps it. Raises InvalidInput as
    :func:`~portwright.plan.publish.elements`. ``holder`` becomes the elements' comment.
    """
    table = table_name(instance)
    return _script(
        # A hairpin pair is shared by all mappings of its address, so it may be there.
        f"{'create' if e.data else 'add'} element inet {table} {e.set_name} {{ {e.text(comment=True)} }}"
        for e in elements(mappings, addresses, holder=holder)
    )


def port_elements_delete(
    instance: str,
    mappings: Iterable[PortMapping],
    addresses: Iterable[PortAddress | str],
    *,
    remaining: Iterable[PortMapping] = (),
) -> str:
    """A script that removes the mappings; elements that are gone already are no error.

    ``remaining`` are the port's mappings that stay. Each element is added and deleted again in
    the same transaction: added, so that it is there to be deleted (``destroy`` needs Linux
    6.3); and since adding one that leads elsewhere is refused (EEXIST), nobody can delete
    another holder's mapping by an old record. Where that refusal has to be survived, send
    :func:`each` of the script by itself and ignore EEXIST. ENOENT means that the table is gone,
    and the mappings with it.
    """
    table = table_name(instance)
    mappings, addresses = tuple(mappings), tuple(addresses)
    kept = {e.identity() for e in elements(remaining, addresses)}
    return _script(
        line
        for e in elements(mappings, addresses)
        if e.identity() not in kept
        for line in (
            f"add element inet {table} {e.set_name} {{ {e.text()} }}",
            # By its key alone: a delete that gives data ignores it (nf_tables_api.c).
            f"delete element inet {table} {e.set_name} {{ {e.text()} }}",
        )
    )


def each(script: str) -> list[str]:
    """Cut what :func:`port_elements_delete` gave into one script for each element."""
    lines = script.splitlines(keepends=True)
    return ["".join(lines[i : i + 2]) for i in range(0, len(lines), 2)]


def subnets(instance: str, local: Iterable[str], masquerade: Iterable[str]) -> str:
    """A script that sets which subnets are ours, and which of them are masqueraded.

    ``local`` and ``masquerade`` are *all* the subnets, in canonical CIDR, of all networks; what
    is masqueraded is local by itself. Declared as a whole, because networks may share a subnet
    or nest: an interval set holds no overlaps, so taking one network's interval out would need
    to know the others anyway. One transaction: nothing goes out untranslated meanwhile.

    Raises InvalidInput for text that is no subnet.
    """
    table = table_name(instance)
    lines: list[str] = []
    for name, blocks in _subnet_sets(local, masquerade).items():
        lines.append(f"flush set inet {table} {name}")
        if blocks:
            lines.append(f"add element inet {table} {name} {{ {', '.join(blocks)} }}")
    return _script(lines)


def commands(script: str) -> list[str]:
    """The script as the commands that a person would have typed, for --dry-run and the journal.

    One after the other they have the script's effect, but not its atomicity.
    """
    return [f"nft {_shell_quoted(line)}" for line in script.splitlines() if line]


def observed_elements(observed: Sequence[Mapping[str, object]]) -> list[Element]:
    """The elements in libnftables' JSON objects of the table (``Nft.list_table``), comments included.

    Elements of sets that this release does not know are left out. Raises InvalidInput if an object does not
    have libnftables-json(5)'s shape.
    """
    found: list[Element] = []
    for entry in observed:
        for kind in ("set", "map"):
            body = entry.get(kind)
            if not isinstance(body, dict) or body.get("name") not in _SETS:
                continue
            found += [_element(str(body["name"]), kind, item) for item in body.get("elem", ())]
    return found


def verify(
    instance: str,
    mappings: Iterable[PortMapping],
    addresses: Iterable[PortAddress | str],
    observed: Sequence[Mapping[str, object]] | None,
) -> list[str]:
    """What these mappings need and ``observed`` (``Nft.list_table``) lacks, for CHECK; [] is well.

    Each entry is a sentence with the table in it. Covers the rules, and of the elements those
    of these mappings only.
    """
    table = table_name(instance)
    if observed is None:
        return [f"nftables table inet {table} is missing"]
    rules = {
        (rule.get("chain"), rule.get("comment"))
        for rule in (entry.get("rule") for entry in observed)
        if isinstance(rule, dict)
    }
    absent = [
        f"rule {name!r} is missing in chain inet {table} {chain}"
        for chain, name, _ in _RULES
        if (chain, name) not in rules
    ]
    wanted = elements(mappings, addresses)
    return absent + [
        f"element {{ {e.text()} }} is missing in inet {table} {e.set_name}"
        for e in missing(wanted, observed_elements(observed))
    ]


def verify_subnets(
    instance: str,
    local: Iterable[str],
    masquerade: Iterable[str],
    observed: Sequence[Mapping[str, object]] | None,
) -> list[str]:
    """Where the subnet sets in ``observed`` differ from what :func:`subnets` would make; [] is well."""
    table = table_name(instance)
    if observed is None:
        return [f"nftables table inet {table} is missing"]
    there: dict[str, set[str]] = {}
    for e in observed_elements(observed):
        there.setdefault(e.set_name, set()).add(e.key[0])
    return [
        f"set inet {table} {name} holds {sorted(there.get(name, ()))}, not {blocks}"
        for name, blocks in _subnet_sets(local, masquerade).items()
        if there.get(name, set()) != set(blocks)
    ]


def stale_elements(
    instance: str, publications: Iterable[Publication], observed: Sequence[Mapping[str, object]]
) -> str:
    """A script that deletes the mapping elements that no publication accounts for; '' if none.

    For GC and for a start after a crash, where the record is the truth. Subnet sets are not
    touched (:func:`subnets` declares them).
    """
    table = table_name(instance)
    wanted = {e.identity() for p in publications for e in elements(p.mappings, p.addresses)}
    return _script(
        f"delete element inet {table} {e.set_name} {{ {e.text()} }}"
        for e in observed_elements(observed)
        if not e.set_name.startswith(("masq", "local")) and e.identity() not in wanted
    )


def _subnet_sets(local: Iterable[str], masquerade: Iterable[str]) -> dict[str, list[str]]:
    """Set name to its blocks, collapsed: sorted, without overlaps, neighbours joined."""
    hidden = [_subnet("masquerade", text) for text in masquerade]
    ours = [_subnet("local", text) for text in local] + hidden
    return {
        f"{name}{version}": [
            # nft writes a block of one address without its prefix length.
            str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)
            for net in _collapsed(nets, version)
        ]
        for name, nets in (("local", ours), ("masq", hidden))
        for version in (4, 6)
    }


_Net = ipaddress.IPv4Network | ipaddress.IPv6Network


def _collapsed(nets: Iterable[_Net], version: int) -> list[_Net]:
    if version == 4:
        return [*ipaddress.collapse_addresses(n for n in nets if isinstance(n, ipaddress.IPv4Network))]
    return [*ipaddress.collapse_addresses(n for n in nets if isinstance(n, ipaddress.IPv6Network))]


def _subnet(field: str, text: str) -> _Net:
    try:
        return ipaddress.ip_network(text)
    except ValueError as exc:
        raise InvalidInput(field, text, f"not a subnet in canonical form: {exc}") from exc


def _element(name: str, kind: str, item: object) -> Element:
    """One entry of ``elem``: a key, or for a map a pair, each perhaps wrapped to carry a comment."""
    key, data = item if kind == "map" and isinstance(item, list) else (item, None)
    comment = ""
    if isinstance(key, dict) and isinstance(wrapped := key.get("elem"), dict):
        comment, key = str(wrapped.get("comment", "")), wrapped.get("val")
    return Element(set_name=name, key=_parts(key), data=() if data is None else _parts(data), comment=comment)


def _parts(value: object) -> tuple[str, ...]:
    """A concatenation, a prefix, a range or a plain value as canonical texts."""
    if isinstance(value, (str, int)):
        return (str(value),)
    if isinstance(value, dict):
        if isinstance(concat := value.get("concat"), list):
            return tuple(str(part) for part in concat)
        if isinstance(prefix := value.get("prefix"), dict):
            return (f"{prefix.get('addr')}/{prefix.get('len')}",)
        if isinstance(bounds := value.get("range"), list):
            return ("-".join(str(b) for b in bounds),)
    raise InvalidInput("nftables json", repr(value), "not an element")


def _script(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _shell_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
