"""The one ordered rule model that every manifest becomes (reference/policy.md, 1.5).

::

    for tier in the set's order:
        those of its policies that select the endpoint in this direction, in order:
            the first rule that matches: allow, deny -> the verdict; pass -> the next tier; log -> go on
        some selected it, none decided: the tier's default: deny -> the verdict; pass -> the next tier
    no tier decided: allow

A value here knows no manifest's kind but by name, for people. Addresses and nets are strings in canonical
form (``ipaddress``), both families; protocols are IP protocol numbers.
"""

from __future__ import annotations

import enum

import msgspec

from portwright.policy.labels import EVERYTHING, Expr

TCP, UDP, SCTP, ICMP, ICMP6 = 6, 17, 132, 1, 58
#: The protocols that have ports.
PORT_PROTOCOLS = frozenset({TCP, UDP, SCTP})


class Direction(enum.StrEnum):
    """Seen from the endpoint that a policy selects."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Action(enum.StrEnum):
    """What a rule does with what it matches."""

    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"  # noqa: S105 - no password, a verdict
    LOG = "log"


class OnChange(enum.StrEnum):
    """What a change of policy means for flows that are open: nothing, a new decision, an end."""

    KEEP = "keep"
    RECHECK = "recheck"
    RESET = "reset"


class StagedAction(enum.StrEnum):
    """What a staged policy would do to the enforced one of its name: take its place, or take it away.

    LEARN and IGNORE are notes for Calico's user interface, and otherwise as SET.
    """

    SET = "Set"
    DELETE = "Delete"
    LEARN = "Learn"
    IGNORE = "Ignore"


class Where(msgspec.Struct, frozen=True, omit_defaults=True):
    """The place in a manifest: ``file``, ``line`` from 1, and the field's path in its document."""

    file: str = ""
    line: int = 0
    path: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file or self.path


class PortRange(msgspec.Struct, frozen=True, order=True):
    """Inclusive, 0 to 65535."""

    first: int
    last: int

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last


class Traffic(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a packet is, whoever sends it. The fields are ANDed; one that is absent says nothing.

    ``ports`` and ``names`` together are one field: the destination's port is in a range, or is what the
    *destination* endpoint calls so under this protocol. A packet without ports (a protocol that has none)
    matches no field of ports.
    """

    protocol: int | None = None
    ports: tuple[PortRange, ...] = ()
    names: tuple[str, ...] = ()
    source_ports: tuple[PortRange, ...] = ()
    source_names: tuple[str, ...] = ()
    icmp_type: int | None = None
    icmp_code: int | None = None
    ip_version: int | None = None


class Peer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Addresses. The fields are ANDed; one that is absent says nothing, so ``Peer()`` is anybody.

    - ``selector``: the address is one of an endpoint, or lies in a network set, of which it is true.
    - ``not_selector``: and of none of which this is true; an address of no endpoint passes it.
    - ``nets``: it lies in one of these; ``not_nets``: and in none of these.
    - ``nodes``: it is a node's, of whose labels this is true.
    - ``domains``: it is what one of these names resolved to, and still is (its TTL, or a connection to it):
      for any endpoint of this node whose rules have that same name, not for who asked alone (docs/policy.md).
      ``*.example.com`` is one label or more before it, never the apex.
    """

    selector: Expr | None = None
    not_selector: Expr | None = None
    nets: tuple[str, ...] | None = None
    not_nets: tuple[str, ...] = ()
    nodes: Expr | None = None
    domains: tuple[str, ...] | None = None


class Rule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Matches a packet if one of ``peers`` and one of ``traffic`` do, and none of ``not_traffic``.

    ``peers`` is the other side; None is anybody, () nobody (a rule that fails closed, which says why in
    ``note``). ``local``: what must hold of the selected side, which Calico lets a rule narrow. ``traffic``:
    None is all of it, () none.
    """

    action: Action
    peers: tuple[Peer, ...] | None = None
    local: Peer | None = None
    traffic: tuple[Traffic, ...] | None = None
    not_traffic: tuple[Traffic, ...] = ()
    name: str = ""
    note: str = ""
    where: Where = Where()


class Policy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Rules in order for the endpoints that ``subject`` is true of.

    ``ingress`` and ``egress``: None where the policy says nothing of that direction (it does not isolate
    there), else its rules, perhaps none. ``order`` then ``name`` sort within a tier; two K8s policies are of
    equal order, which their meaning allows (a union).
    The host flags are Calico's. ``staged``: reported, never enforced (see staged.py).
    """

    kind: str
    name: str
    namespace: str = ""
    tier: str
    order: float
    subject: Expr = EVERYTHING
    ingress: tuple[Rule, ...] | None = None
    egress: tuple[Rule, ...] | None = None
    on_change: OnChange = OnChange.RECHECK
    staged: bool = False
    staged_action: StagedAction = StagedAction.SET
    apply_on_forward: bool = False
    pre_dnat: bool = False
    do_not_track: bool = False
    where: Where = Where()

    def rules(self, direction: Direction) -> tuple[Rule, ...] | None:
        """Its rules of that direction; None where it says nothing."""
        return self.ingress if direction is Direction.INGRESS else self.egress

    @property
    def title(self) -> str:
        """``namespace/name``, or the name of one that has no namespace."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Tier(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``default`` (DENY or PASS) holds for endpoints that a policy of the tier selects in the direction."""

    name: str
    order: float
    default: Action = Action.DENY


#: Kubernetes' two admin tiers around its own, and Calico's ``default``, which shares its place: Calico
#: converts Kubernetes policies at order 1000 into it (reference/policy.md, 1.4).
ADMIN = Tier(name="kube-admin", order=1_000.0, default=Action.PASS)
DEFAULT = Tier(name="default", order=1_000_000.0, default=Action.DENY)
BASELINE = Tier(name="kube-baseline", order=10_000_000.0, default=Action.PASS)
BUILT_IN_TIERS = (ADMIN, DEFAULT, BASELINE)
#: Of a Kubernetes NetworkPolicy in DEFAULT.
KUBERNETES_ORDER = 1_000.0


class NamedPort(msgspec.Struct, frozen=True):
    """A container port's name, per protocol."""

    name: str
    protocol: int
    port: int


class EndpointKind(enum.StrEnum):
    """What an address belongs to."""

    WORKLOAD = "workload"
    HOST = "host"
    NODE = "node"
    NETWORK_SET = "network-set"


class Endpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whom policies select, and what peers are made of.

    ``labels`` are the effective ones (see labels). A workload has ``addresses``, a network set ``nets``.
    ``unnamed_ports`` are (protocol, port) of containers' ports that no rule can name.
    ``host_network``: a pod on its node's address: never selected, and no selector finds it. A node has
    kind NODE and its own labels.
    """

    name: str
    namespace: str = ""
    kind: EndpointKind = EndpointKind.WORKLOAD
    labels: dict[str, str] = {}
    addresses: tuple[str, ...] = ()
    nets: tuple[str, ...] = ()
    named_ports: tuple[NamedPort, ...] = ()
    unnamed_ports: tuple[tuple[int, int], ...] = ()
    host_network: bool = False
    local_node: bool = False

    @property
    def title(self) -> str:
        """``namespace/name``, or the name."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class PolicySet(msgspec.Struct, frozen=True, kw_only=True):
    """All that is in force: tiers by (order, name), policies of each as Calico sorts them.

    That is by (order, name, namespace, kind).
    """

    tiers: tuple[Tier, ...] = BUILT_IN_TIERS
    policies: tuple[Policy, ...] = ()


class Flow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The first packet of a connection. Ports are None where the protocol has none."""

    source: str
    destination: str
    protocol: int
    source_port: int | None = None
    port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The world at one moment: whom there is to select, and what was resolved.

    ``domains``: addresses by the name or pattern that a rule asks for (``Peer.domains``).
    """

    endpoints: tuple[Endpoint, ...] = ()
    domains: dict[str, tuple[str, ...]] = {}
