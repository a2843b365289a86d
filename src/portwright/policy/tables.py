"""The compiled policy: exactly what stands in the data path's maps, and the reading of it.

A decision is integer arithmetic on four tables (dataplane/policy.h does the same)::

    address        -> AddressEntry(class, set in, set out)   HASH; else class by longest prefix (LPM)
    set, source    -> the set to ask in its place            likewise; only of rules that ask for source ports
    set, service   -> port class                             binary search in the set's interval starts
    set, class, pc -> Verdict                                HASH; only where it differs from the next
    set, pc        -> the set's default Verdict

A *class* is the set of all peers in use that are true of an address; class 0: none is. A *set* is one
effective rule list, shared by all addresses that have the same; set 0: nothing selects, which allows. What a
set, a class and so a cell mean never changes while its number is in use: a table in force may be turned into
the next by puts, then address and prefix entries, then deletes (``diff``), and never decides by a mixture.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from collections.abc import Iterator

import msgspec

from portwright.model.errors import PortwrightError
from portwright.policy.rules import Action, Direction, Flow, OnChange, Policy, Where
from portwright.policy.services import service_of, source_of

#: What the maps of the data path hold. A compile that needs more is refused before anything is written.
MAX_ADDRESSES = 1 << 17
MAX_PREFIXES = 1 << 17
MAX_CLASSES = 1 << 18
MAX_SETS = 65_535
MAX_INTERVALS = 255
MAX_CELLS = 1 << 20

#: Rule numbers that stand for no rule of a policy; 0 is never used. Policies' rules start at FIRST_RULE.
NO_POLICY, OWN_ADDRESS, LOCAL_NODE, ALL_PASSED = 1, 2, 3, 4
FIRST_RULE = 16


class PolicyTooLarge(PortwrightError):
    """The policies need more room than the data path has; nothing was written.

    ``what`` is the table, ``need`` and ``limit`` its entries, ``policy`` who adds most, ``why`` how.
    """

    code = "policy-too-large"

    def __init__(self, what: str, need: int, limit: int, policy: str, why: str) -> None:
        super().__init__(f"the policies need {need:,} {what}, the limit is {limit:,}: {policy} {why}")
        self.what = what
        self.need = need
        self.limit = limit
        self.policy = policy
        self.why = why


class Verdict(msgspec.Struct, frozen=True):
    """``rule``: the number of what decided. ``log``: a log rule matched on the way."""

    allow: bool
    rule: int
    log: bool = False


class RuleInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a rule number stands for, for `why` and drop events.

    A policy's rule has ``policy`` and ``index`` (from 0, of its ``direction``). Else ``implicit`` says what:
    no-policy, own-address, local-node, all-passed, or tier-default, which has ``tier`` and ``direction``.
    """

    implicit: str = ""
    tier: str = ""
    direction: Direction | None = None
    kind: str = ""
    namespace: str = ""
    policy: str = ""
    index: int | None = None
    name: str = ""
    action: Action | None = None
    on_change: OnChange = OnChange.RECHECK
    where: Where = Where()

    @property
    def title(self) -> str:
        """``NetworkPolicy default/web ingress[2]``, or the name of what decided without a rule."""
        if self.implicit:
            return f"{self.implicit} {self.tier} {self.direction}" if self.tier else self.implicit
        owner = f"{self.namespace}/{self.policy}" if self.namespace else self.policy
        return f"{self.kind} {owner} {self.direction}[{self.index}]"


BUILT_IN_RULES = {
    NO_POLICY: RuleInfo(implicit="no-policy"),
    OWN_ADDRESS: RuleInfo(implicit="own-address"),
    LOCAL_NODE: RuleInfo(implicit="local-node"),
    ALL_PASSED: RuleInfo(implicit="all-passed"),
}
NO_POLICY_VERDICT = Verdict(True, NO_POLICY)
OWN_ADDRESS_VERDICT = Verdict(True, OWN_ADDRESS)
LOCAL_NODE_VERDICT = Verdict(True, LOCAL_NODE)


class AddressEntry(msgspec.Struct, frozen=True):
    """An address that is known exactly: an endpoint's, a node's, or one that a domain name resolved to.

    ``owner``: the workload's number, the same for all its addresses; 0: of no workload, which has no side and
    both sets 0. ``local_node``: of the node that the workloads run on.
    """

    class_id: int
    set_in: int = 0
    set_out: int = 0
    owner: int = 0
    local_node: bool = False


#: The cells of one class in one set: (port class, verdict), ascending, where it is not the set's default.
Column = tuple[tuple[int, Verdict], ...]


class SetTable(msgspec.Struct, frozen=True, kw_only=True):
    """One policy set. Interval ``i`` is ``[starts[i], starts[i + 1])`` with port class ``port_classes[i]``.

    ``starts[0]`` is 0. ``defaults`` are by port class, ``columns`` by peer class.
    """

    starts: tuple[int, ...]
    port_classes: tuple[int, ...]
    defaults: tuple[Verdict, ...]
    columns: dict[int, Column]

    def port_class(self, service: int) -> int:
        """The port class of a service."""
        return self.port_classes[bisect_right(self.starts, service) - 1]


class SplitTable(msgspec.Struct, frozen=True, kw_only=True):
    """A set that is another one for each stretch of source ports: ``sets[i]`` from ``starts[i]`` on.

    ``starts[0]`` is 0; these are numbers of services, with the sender's port in them (services.source_of).
    """

    starts: tuple[int, ...]
    sets: tuple[int, ...]

    def at(self, source: int) -> int:
        """The set for packets from there."""
        return self.sets[bisect_right(self.starts, source) - 1]


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How many entries each table has; ``intervals`` over all sets."""

    addresses: int
    prefixes: int
    classes: int
    sets: int
    intervals: int
    cells: int
    rules: int


class Compiled(msgspec.Struct, frozen=True, kw_only=True):
    """A generation of the tables. ``prefixes`` are classes by CIDR; ``owners`` endpoints' titles by number.

    A set's number is one of ``sets`` or of ``splits``.

    ``host_policies``: policies that the host interfaces' own stages enforce (untracked, before DNAT, on
    forwarded traffic); of these only the last is in the tables here too, as any policy of a workload.
    """

    addresses: dict[str, AddressEntry]
    prefixes: dict[str, int]
    sets: dict[int, SetTable]
    splits: dict[int, SplitTable]
    rules: dict[int, RuleInfo]
    owners: dict[int, str]
    host_policies: tuple[Policy, ...]
    size: Size
    #: What recompile continues from; opaque, and no part of the tables.
    memory: object = None

    def cells(self) -> Iterator[tuple[tuple[int, int, int], Verdict]]:
        """((set, class, port class), verdict) of each cell."""
        for set_id, table in self.sets.items():
            for class_id, column in table.columns.items():
                for port_class, verdict in column:
                    yield (set_id, class_id, port_class), verdict


class Answer(msgspec.Struct, frozen=True):
    """Both sides' verdicts, None where the address is no workload's, and whether both allow."""

    egress: Verdict | None
    ingress: Verdict | None
    allowed: bool


class Tables:
    """A generation, ready to be asked: the data path's lookup, step by step."""

    def __init__(self, compiled: Compiled) -> None:
        self._compiled = compiled
        self._lpm: dict[int, dict[int, dict[int, int]]] = {4: {}, 6: {}}
        for cidr, class_id in compiled.prefixes.items():
            net = ipaddress.ip_network(cidr)
            bits = net.max_prefixlen - net.prefixlen
            self._lpm[net.version].setdefault(bits, {})[int(net.network_address) >> bits] = class_id
        self._lpm = {version: dict(sorted(found.items())) for version, found in self._lpm.items()}

    def entry(self, address: str) -> AddressEntry:
        """The address's own entry, or one with the class of the longest prefix around it."""
        known = self._compiled.addresses.get(address)
        if known is not None:
            return known
        parsed = ipaddress.ip_address(address)
        number = int(parsed)
        for bits, nets in self._lpm[parsed.version].items():
            class_id = nets.get(number >> bits)
            if class_id is not None:
                return AddressEntry(class_id)
        return AddressEntry(0)

    def verdict(self, set_id: int, class_id: int, service: int, source: int) -> Verdict:
        """What a set says of a peer's class and a service, asked for from a source port."""
        if set_id == 0:
            return NO_POLICY_VERDICT
        split = self._compiled.splits.get(set_id)
        if split is not None:
            set_id = split.at(source)
        table = self._compiled.sets[set_id]
        port_class = table.port_class(service)
        for at, verdict in table.columns.get(class_id, ()):
            if at == port_class:
                return verdict
        return table.defaults[port_class]

    def lookup(self, flow: Flow) -> Answer:
        """Both sides of a new connection."""
        source, destination = self.entry(flow.source), self.entry(flow.destination)
        if source.owner and source.owner == destination.owner:
            return Answer(OWN_ADDRESS_VERDICT, OWN_ADDRESS_VERDICT, True)
        service, port = service_of(flow), source_of(flow)
        egress = ingress = None
        if source.owner:
            egress = self.verdict(source.set_out, destination.class_id, service, port)
        if destination.owner:
            ingress = (
                LOCAL_NODE_VERDICT
                if source.local_node
                else self.verdict(destination.set_in, source.class_id, service, port)
            )
        allowed = (egress is None or egress.allow) and (ingress is None or ingress.allow)
        return Answer(egress, ingress, allowed)


def lookup(compiled: Compiled, flow: Flow) -> Answer:
    """One flow; who asks often keeps Tables."""
    return Tables(compiled).lookup(flow)
