"""Policy in force: the manifests on record, the ports that there are, and the tables in every data path.

All that can be wrong is found before anything changes: the manifests are read and compiled first, then
recorded, then put in force. A crash in between leaves the record ahead of the kernel, whose generation
stays in force until the next start puts the record's in its place. A port passes nothing until a generation
knows it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import msgspec

from portwright.kernel.bpf import Map
from portwright.model.errors import InvalidInput, NotFound
from portwright.model.port import Port, PortState
from portwright.node import generations
from portwright.node.faults import Faults
from portwright.policy.compile import compile_policies, recompile
from portwright.policy.difference import CellKey, Remains, diff
from portwright.policy.explain import explain
from portwright.policy.lint import Lint
from portwright.policy.manifests.cluster import workload_labels
from portwright.policy.manifests.read import DEFAULT_NAMESPACE, Manifests, read
from portwright.policy.rules import Endpoint, EndpointKind, Flow, Rule, Snapshot
from portwright.policy.tables import Compiled, Size

#: Labels that CNI's Kubernetes arguments become (docs/cni.md).
POD_NAME, POD_NAMESPACE = "io.kubernetes.pod.name", "io.kubernetes.pod.namespace"


class DataPath(Protocol):
    """What is needed of a switch."""

    @property
    def maps(self) -> Mapping[str, Map]:
        """By name in the source."""


class Record(Protocol):
    """What is needed of the store."""

    def ports(self) -> Iterator[Port]:
        """All of them."""

    def manifests(self) -> list[tuple[str, str]]:
        """(name, text) of every file."""

    def set_manifests(self, files: list[tuple[str, str]]) -> None:
        """Makes these all that there is, durably."""


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force: the files, how many policies they hold, the tables' sizes, and what looks odd."""

    files: tuple[str, ...]
    policies: tuple[str, ...]
    size: Size
    warnings: tuple[Lint, ...] = ()


class Policies:
    """One for the node. Not for two threads."""

    def __init__(self, store: Record, switches: Mapping[int, DataPath], faults: Faults) -> None:
        """Reads the manifests on record; nothing is put in force yet."""
        self._store = store
        self._faults = faults
        self._switches = switches
        self._manifests = read(store.manifests())
        self.compiled: Compiled | None = None
        #: The generation, by data path, of which the tables are those of ``compiled``.
        self._installed: dict[int, int] = {}
        #: What changes of the present generation left behind in its tables.
        self._remains = Remains()

    # -- what users ask for ----------------------------------------------------------------------

    def apply(self, files: Iterable[tuple[str, str]], *, dry_run: bool = False) -> Applied:
        """Adds these files (name, text), each in the place of one of its name, and puts all in force.

        Raises InvalidInput or PolicyTooLarge, and then nothing has changed.
        """
        wanted = dict(self._store.manifests()) | dict(files)
        return self._change(wanted, dry_run=dry_run)

    def delete(self, names: Iterable[str]) -> Applied:
        """Takes these files away. Raises NotFound for one that was never applied."""
        wanted = dict(self._store.manifests())
        for name in names:
            if wanted.pop(name, None) is None:
                raise NotFound("policy file", name)
        return self._change(wanted)

    def current(self) -> Applied:
        """What is in force."""
        snapshot = self._snapshot(self._manifests)
        compiled = self.compiled or compile_policies(self._manifests.policy_set, snapshot)
        return _applied(dict(self._store.manifests()), self._manifests, compiled)

    def rule_title(self, number: int) -> str:
        """What a rule's number in a drop event stands for, as ``NetworkPolicy shop/web ingress[0]``."""
        rule = self.compiled.rules.get(number) if self.compiled is not None else None
        return f"rule {number}" if rule is None else rule.title

    def explain(self, flow: Flow) -> str:
        """Why policy lets a flow pass or not, in lines for people; '' while none is in force."""
        if not self._active:
            return ""
        return str(explain(self._manifests.policy_set, self._snapshot(self._manifests), flow))

    def _change(self, wanted: dict[str, str], *, dry_run: bool = False) -> Applied:
        gc.unfreeze()
        manifests = read(sorted(wanted.items()))
        _refuse_what_is_not_enforced(manifests)
        compiled = self._compile(manifests, self._snapshot(manifests))
        if not dry_run:
            self._faults.at("policy:compiled")
            self._store.set_manifests(sorted(wanted.items()))
            self._faults.at("policy:recorded")
            self._manifests = manifests
            self._install(compiled)
            self._faults.at("policy:installed")
        return _applied(wanted, manifests, compiled)

    # -- the data paths --------------------------------------------------------------------------

    def restore(self) -> None:
        """Puts the record in force in every data path there is: at the start of the daemon."""
        self._faults.stage, before = "recover-", self._faults.stage
        if self._active:
            self._sync()
        else:
            self._withdraw()
        self._faults.stage = before

    def admit(self, switch: DataPath, port: Port) -> None:
        """Returns once the port's policy is in force; its data path may be a new one."""
        if self._active or generations.in_force(switch.maps):
            self._sync(port)

    def dismiss(self, port: Port) -> None:
        """A port is gone: nobody's policy speaks of its addresses any more."""
        if self._active:
            self._sync(without=port)

    def relabelled(self) -> None:
        """A port's labels are others now: who is selected is found anew."""
        if self._active:
            self._sync()

    @property
    def _active(self) -> bool:
        return bool(self._manifests.policy_set.policies)

    def _sync(self, port: Port | None = None, *, without: Port | None = None) -> None:
        self._install(self._compile(self._manifests, self._snapshot(self._manifests, port, without)))

    def _compile(self, manifests: Manifests, snapshot: Snapshot) -> Compiled:
        """Numbered as before where it means the same, so that events of the moment keep their rules."""
        if self.compiled is None:
            return compile_policies(manifests.policy_set, snapshot)
        return recompile(self.compiled, manifests.policy_set, snapshot)

    def _install(self, compiled: Compiled) -> None:
        if not self._active:
            self._withdraw()
            return
        change = diff(self.compiled, compiled) if self.compiled is not None else None
        installed, self._installed = self._installed, {}  # of a failure half way nothing is known
        remains: tuple[CellKey, ...] | None = None
        if change is not None and self._remains.hinder(change):
            remains, self._remains = tuple(self._remains.cells), Remains()
        entries: generations.Entries | None = None
        done: dict[int, int] = {}
        for cookie, switch in list(self._switches.items()):
            number: int | None = None
            known = installed.get(cookie, 0)
            if change is not None and change.atomic and known and known == generations.in_force(switch.maps):
                number = generations.amend(
                    switch.maps, change, compiled.rules, remains=remains, faults=self._faults
                )
            if number is None:
                entries = entries or generations.entries_of(compiled)
                number = generations.install(switch.maps, entries, self._faults)
            done[cookie] = number
        if change is None or not change.atomic:
            self._remains = Remains()
        else:
            self._remains.add(change)
        self.compiled, self._installed = compiled, done
        # A hundred thousand objects of which the next change makes few others: else every few changes the
        # collector looks through all of them, for longer than a change takes.
        gc.freeze()

    def _withdraw(self) -> None:
        for switch in list(self._switches.values()):
            if generations.in_force(switch.maps):
                generations.withdraw(switch.maps, self._faults)
        self.compiled = None
        self._installed, self._remains = {}, Remains()

    # -- the world -------------------------------------------------------------------------------

    def _snapshot(
        self, manifests: Manifests, port: Port | None = None, without: Port | None = None
    ) -> Snapshot:
        ports = {p.port_id: p for p in self._store.ports() if p.state is not PortState.DELETING}
        if port is not None:
            ports[port.port_id] = port
        if without is not None:
            ports.pop(without.port_id, None)
        return snapshot_of(manifests, list(ports.values()))


def _refuse_what_is_not_enforced(manifests: Manifests) -> None:
    """Raises InvalidInput for what can be read and compiled, and no data path does yet."""
    for end in manifests.snapshot.endpoints:
        if end.kind is EndpointKind.HOST:
            why = "host endpoints are not enforced by this release; leave it out"
            raise InvalidInput("HostEndpoint", end.title, why)
    for policy in manifests.policy_set.policies:
        place = f"{policy.where}: {policy.kind} {policy.title}"
        if policy.staged:
            raise InvalidInput(
                place, "staged", "staged policies are not reported on by this release; leave it out"
            )
        if policy.do_not_track or policy.pre_dnat or policy.apply_on_forward:
            why = "policy on the host's own interfaces is not enforced by this release; leave it out"
            raise InvalidInput(f"{place}: spec", "doNotTrack, preDNAT or applyOnForward", why)
        for rule in (*(policy.ingress or ()), *(policy.egress or ())):
            if any(peer.domains is not None for peer in rule.peers or ()):
                why = "domain names are not resolved by this release; use ipBlock or networks"
                raise InvalidInput(f"{rule.where}: {policy.title}: domainNames", list(_domains(rule)), why)


def _domains(rule: Rule) -> Iterator[str]:
    for peer in rule.peers or ():
        yield from peer.domains or ()


def snapshot_of(manifests: Manifests, ports: Iterable[Port]) -> Snapshot:
    """Whom there is: an endpoint for each pod or sandbox that has ports, and what else manifests describe.

    A Pod manifest of the name of one that has ports lends it its labels and named ports; the addresses are
    the ports'.
    """
    described = {
        (e.namespace, e.name): e
        for e in manifests.snapshot.endpoints
        if e.kind is EndpointKind.WORKLOAD and not e.host_network
    }
    running: dict[tuple[str, str], Endpoint] = {}
    for port in ports:
        key = identity(port)
        known = running.get(key) or described.get(key) or _endpoint(port, manifests)
        before = known.addresses if key in running else ()
        mine = (*(a.address for a in port.addresses), *before)
        running[key] = msgspec.structs.replace(known, addresses=tuple(dict.fromkeys(mine)))
    rest = (e for e in manifests.snapshot.endpoints if (e.namespace, e.name) not in running)
    return msgspec.structs.replace(manifests.snapshot, endpoints=(*running.values(), *rest))


def identity(port: Port) -> tuple[str, str]:
    """(namespace, name) of the pod that a port belongs to, or of the port's owner."""
    name = port.labels.get(POD_NAME) or port.owner.name or port.owner.container_id
    return port.labels.get(POD_NAMESPACE, DEFAULT_NAMESPACE), name


def _endpoint(port: Port, manifests: Manifests) -> Endpoint:
    namespace, name = identity(port)
    labels = workload_labels(port.labels, namespace, manifests.namespaces.get(namespace, {}))
    return Endpoint(name=name, namespace=namespace, labels=labels)


def _applied(files: Mapping[str, str], manifests: Manifests, compiled: Compiled) -> Applied:
    return Applied(
        files=tuple(sorted(files)),
        policies=tuple(f"{p.kind} {p.title}" for p in manifests.policy_set.policies),
        size=compiled.size,
        warnings=manifests.warnings,
    )
