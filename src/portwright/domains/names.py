r"""Which names a port's rules ask for, and which addresses a name may open.

Names are compared label by label and never as text: ``a\.example.com`` is one label below ``com``, and no
name below ``example.com``.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable
from typing import TypeAlias

from portwright.policy.labels import matches
from portwright.policy.rules import Endpoint, Policy, PolicySet
from portwright.policy.selection import is_enforced, is_workload

#: A name without the root, in lower case (RFC 4343): the label next to the root is the last.
Labels: TypeAlias = tuple[bytes, ...]

_WILDCARD = "*."
_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
#: What lies here is the host's, a link's or nobody's, whatever an answer says: names don't open it.
_NEVER = tuple(
    ipaddress.ip_network(net)
    for net in (
        *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
        # ::/96 has ::, ::1 and IPv4 in IPv6's clothes; ::ffff:0:0/96 is IPv4 itself (RFC 4291, 2.5.5)
        *("::/96", "::ffff:0:0/96", "fe80::/10", "fec0::/10", "ff00::/8"),
    )
)
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


@functools.lru_cache(maxsize=4096)
def labels_of(text: str) -> Labels:
    """The labels of a name as manifests write it."""
    return tuple(label.encode() for label in text.lower().removesuffix(".").split("."))


def covers(pattern: str, name: Labels) -> bool:
    """Whether a rule's name or pattern means ``name``; ``*.`` is one label or more, never the apex."""
    if not pattern.startswith(_WILDCARD):
        return name == labels_of(pattern)
    below = labels_of(pattern.removeprefix(_WILDCARD))
    return len(name) > len(below) and name[-len(below) :] == below


def naming(policies: PolicySet) -> tuple[Policy, ...]:
    """The policies that workloads feel and that name domains in a rule."""
    return tuple(p for p in policies.policies if is_enforced(p) and names_of(p))


def asked(policies: Iterable[Policy], endpoint: Endpoint) -> tuple[str, ...]:
    """The names and patterns that these policies' egress rules allow an endpoint, each once, in order."""
    if not is_workload(endpoint):
        return ()
    found = (name for p in policies if matches(p.subject, endpoint.labels) for name in names_of(p))
    return tuple(dict.fromkeys(found))


def foreign(domains: dict[str, tuple[str, ...]], endpoints: Iterable[Endpoint]) -> dict[str, tuple[str, ...]]:
    """``domains`` without the addresses of endpoints: a name opens nobody's port, only a selector does."""
    if not domains:
        return domains
    ours = {address for endpoint in endpoints for address in endpoint.addresses}
    return {name: tuple(a for a in found if a not in ours) for name, found in domains.items()}


def names_of(policy: Policy) -> list[str]:
    """The names and patterns of a policy's egress rules, in order."""
    return [name for rule in policy.egress or () for peer in rule.peers or () for name in peer.domains or ()]


def may_open(address: str) -> bool:
    """Whether an answer may open this address; not so loopback, link-local, multicast and the like.

    Private addresses (RFC 1918, RFC 4193) may: a site's own names have them. Whose addresses are this
    host's and its ports' is for the caller to know.
    """
    parsed = [ipaddress.ip_address(face) for face in faces(address)]
    return not any(one.version == net.version and one in net for net in _NEVER for one in parsed)


def faces(address: str) -> tuple[str, ...]:
    """An address, and the IPv4 one that it leads to where the site translates or tunnels.

    NAT64's well-known and local nets (RFC 6052, RFC 8215: as a /96, the common way) and 6to4 (RFC 3056).
    """
    parsed: _Address = ipaddress.ip_address(address)
    if parsed.version == 4:
        return (address,)
    if any(parsed in net for net in _NAT64):
        return address, str(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
    return (address, str(parsed.sixtofour)) if parsed.sixtofour is not None else (address,)
