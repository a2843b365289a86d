"""Policy in force: the manifests on record, the ports that there are, and the tables in every data path.

All that can be wrong is found before anything changes: the manifests are read and compiled first, then
recorded, then put in force. A crash in between leaves the record ahead of the kernel, whose generation
stays in force until the next start puts the record's in its place. A port passes nothing until a generation
knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

from portwright.domains.ledger import Entry, table_of
from portwright.domains.names import asked, names_of, naming
from portwright.kernel.bpf import features
from portwright.model.errors import InvalidInput, NotFound
from portwright.model.port import Port, PortState
from portwright.node import generations
from portwright.node.endpoints import about, identity, snapshot_of, unheld
from portwright.node.enforcement import DataPath, Enforcement
from portwright.node.faults import Faults
from portwright.node.folder import FolderState, forgotten, is_inside
from portwright.node.hosts import Hosts, Wanted
from portwright.node.in_force import InForce, published_by
from portwright.node.world import Ports, World
from portwright.policy.explain import explain
from portwright.policy.host.stages import local_endpoints
from portwright.policy.isolation import with_isolation
from portwright.policy.lint import Lint
from portwright.policy.lints.hosts import nobodys_endpoints
from portwright.policy.manifests.read import Manifests, read
from portwright.policy.manifests.shelf import Shelf
from portwright.policy.rules import Direction, Flow, Policy, Snapshot
from portwright.policy.staged import chosen, staged
from portwright.policy.tables import Compiled, Size, lookup


class Record(Ports, Protocol):
    """What is needed of the store."""

    def manifests(self) -> list[tuple[str, str]]:
        """(name, text) of every file."""

    def watched_manifests(self) -> set[str]:
        """The names of those that are of the watched folder."""

    def set_manifests(self, files: list[tuple[str, str]], watched: Collection[str] = ()) -> None:
        """Makes these all that there is, durably; ``watched`` are the folder's."""

    def resolved(self) -> list[tuple[str, str, str, float]]:
        """(port_id, name or pattern, address, until) of what domain names stand for."""


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force: the files, which policies they hold, the tables' sizes, and what looks odd.

    ``staged``: those that are dry runs. ``states``: of a dry run, by what would be judged before and after.
    """

    files: tuple[str, ...]
    policies: tuple[str, ...]
    staged: tuple[str, ...] = ()
    size: Size
    warnings: tuple[Lint, ...] = ()
    states: tuple[InForce, InForce] | None = None


class Policies:
    """One for the node. Not for two threads."""

    def __init__(
        self, store: Record, switches: Mapping[int, DataPath], faults: Faults, hosts: Hosts | None = None
    ) -> None:
        """Reads the manifests on record; nothing is put in force yet. ``hosts``: None leaves them alone."""
        self._store = store
        self._world = World(store)
        self.hosts = hosts
        self._faults = faults
        self._enforcement = Enforcement(switches, faults)
        #: of the files on record, which are read again whenever one of them changes
        self._shelf = Shelf()
        self._manifests = read(store.manifests(), shelf=self._shelf)
        self._isolation = self._world.isolating()
        #: kept by whoever follows the folder (:mod:`portwright.node.follow`)
        self.folder = FolderState(error=forgotten(store.watched_manifests()))
        #: addresses by the domain name or pattern that rules ask for
        self._domains = table_of(Entry(*row) for row in store.resolved())
        #: which manifests these are the policies of that name domains
        self._naming: tuple[Manifests | None, tuple[Policy, ...]] = None, ()
        #: taps on other plugins' devices, which no policy can hold
        self.chained: Callable[[], Iterable[Port]] = tuple
        #: called when other policies, or others' labels, are in force
        self.changed: Callable[[], None] = _nobody_asked

    # -- what users ask for ----------------------------------------------------------------------

    def apply(self, files: Iterable[tuple[str, str]], *, dry_run: bool = False) -> Applied:
        """Adds these files (name, text), each in the place of one of its name, and puts all in force.

        Raises InvalidInput or PolicyTooLarge, and then nothing has changed.
        """
        given = dict(files)
        for name in given:
            self._refuse_the_folders(name, "change the file there and it is applied")
        wanted = dict(self._store.manifests()) | given
        return self._change(wanted, self._store.watched_manifests() - given.keys(), dry_run=dry_run)

    def delete(self, names: Iterable[str], *, dry_run: bool = False) -> Applied:
        """Takes these files away. Raises NotFound for one that was never applied."""
        wanted = dict(self._store.manifests())
        for name in names:
            self._refuse_the_folders(name, "remove the file there and it is deleted")
            if wanted.pop(name, None) is None:
                raise NotFound("policy file", name)
        return self._change(wanted, self._store.watched_manifests() & wanted.keys(), dry_run=dry_run)

    def staged(self, names: Iterable[str] = ()) -> tuple[InForce, list[Policy]]:
        """What is in force, and the staged policies of these names, or all, to be held against it.

        Raises NotFound for a name of none, InvalidInput for more than are reported at once.
        """
        state = self._in_force(self._manifests, self.hosts.wanted if self.hosts is not None else Wanted())
        return state, chosen(state.policies, list(names))

    def follow(self, files: list[tuple[str, str]]) -> bool:
        """Makes these the files of the watched folder, beside those that were applied; whether that is news.

        Raises as :meth:`apply`, and then nothing has changed.
        """
        record, watched = dict(self._store.manifests()), self._store.watched_manifests()
        folder, mine = Path(self.folder.path), dict(files)
        # A file that was applied from this folder before it was followed is the folder's from now on.
        kept = {n: t for n, t in record.items() if n not in watched and not is_inside(folder, n)}
        wanted = kept | mine
        if wanted == record and watched == mine.keys() and not self.folder.error:
            return False
        self._change(wanted, mine.keys())
        return True

    def _refuse_the_folders(self, name: str, way_out: str) -> None:
        if self.folder.path and is_inside(Path(self.folder.path), name):
            raise InvalidInput("filename", name, f"is of the watched folder {self.folder.path}: {way_out}")

    def current(self) -> Applied:
        """What is in force."""
        snapshot = self._snapshot(self._manifests)
        compiled = self._enforcement.compiled or self._compile(self._manifests, snapshot)
        applied = _applied(dict(self._store.manifests()), self._manifests, compiled)
        return self._noted(applied, self._manifests)

    def rule_title(self, number: int) -> str:
        """What a rule's number in a drop event stands for, as ``NetworkPolicy shop/web ingress[0]``."""
        compiled = self._enforcement.compiled
        rule = compiled.rules.get(number) if compiled is not None else None
        return f"rule {number}" if rule is None else rule.title

    def explain(self, flow: Flow) -> str:
        """Why policy lets a flow pass or not, in lines for people; '' while none is in force."""
        if not self._active:
            return ""
        snapshot = self._snapshot(self._manifests)
        return str(explain(with_isolation(self._manifests.policy_set, snapshot), snapshot, flow))

    def _change(self, wanted: dict[str, str], watched: Collection[str], *, dry_run: bool = False) -> Applied:
        with self._enforcement.undisturbed():
            return self._changed(wanted, watched, dry_run=dry_run)

    def _changed(self, wanted: dict[str, str], watched: Collection[str], *, dry_run: bool) -> Applied:
        manifests = read(sorted(wanted.items()), shelf=self._shelf)
        _refuse_what_is_not_enforced(manifests)
        snapshot = self._snapshot(manifests)
        compiled = self._compile(manifests, snapshot)
        hosts = self._plan_hosts(manifests, snapshot)
        if dry_run and self.hosts is not None:
            self.hosts.check(hosts)
        if not dry_run:
            self._faults.at("policy:compiled")
            self._record(sorted(wanted.items()), watched, hosts)
            if not self.folder.path:
                self.folder = FolderState(error=forgotten(watched))
            self._faults.at("policy:recorded")
            self._manifests = manifests
            self._install(compiled)
            self._faults.at("policy:installed")
            self.changed()
        applied = self._noted(_applied(wanted, manifests, compiled), manifests)
        if self.hosts is not None and (lint := nobodys_endpoints(manifests.snapshot, self.hosts.node)):
            applied = msgspec.structs.replace(applied, warnings=(*applied.warnings, lint))
        if dry_run:
            in_force = self.hosts.wanted if self.hosts is not None else Wanted()
            states = (self._in_force(self._manifests, in_force), self._in_force(manifests, hosts))
            applied = msgspec.structs.replace(applied, states=states)
        return applied

    def _noted(self, applied: Applied, manifests: Manifests) -> Applied:
        """With a warning for each policy that is about taps on other plugins' devices."""
        lints = unheld(manifests, self.chained())
        return msgspec.structs.replace(applied, warnings=(*applied.warnings, *lints)) if lints else applied

    def _record(self, files: list[tuple[str, str]], watched: Collection[str], hosts: Wanted) -> None:
        """Records a change, the host's interfaces first: then it is known that the kernel takes it."""
        before = self.hosts.wanted if self.hosts is not None else Wanted()
        self._put_hosts(hosts)
        self._faults.at("policy:hosts")
        try:
            self._store.set_manifests(files, watched)
        except BaseException:
            self._put_hosts(before)
            raise

    # -- the host's own interfaces ---------------------------------------------------------------

    def _plan_hosts(self, manifests: Manifests, snapshot: Snapshot) -> Wanted:
        return Wanted() if self.hosts is None else self.hosts.plan(manifests.policy_set, snapshot)

    def _put_hosts(self, wanted: Wanted) -> None:
        if self.hosts is not None:
            self.hosts.put(wanted, anyway=True)  # whoever applies something expects it to be there

    def host_endpoints(self) -> tuple[str, ...]:
        """This node's host endpoints, each with the interfaces that it is now, for people."""
        if self.hosts is None:
            return ()
        where = {b.endpoint.name: ["*"] if b.every else b.interfaces for b in self.hosts.wanted.bound}
        ends = local_endpoints(self._manifests.snapshot, self.hosts.node)
        lines = [f"{end.name}: {', '.join(where.get(end.name, ())) or 'no interface'}" for end in ends]
        return (*lines, *(f"no early drops by XDP: {why}" for why in self.hosts.not_early.values()))

    def routed(self, flow: Flow, interface: str, direction: Direction) -> tuple[bool, str] | None:
        """Whether the interface's host endpoint lets a flow be routed by it, and why; None without one."""
        if self.hosts is None or not self.hosts.wanted.bound:
            return None
        state = (self._manifests.policy_set, self._snapshot(self._manifests))
        found = self.hosts.forwarded(*state, flow, interface, direction)
        return None if found is None else (found[1].allowed, f"{found[0]}: {found[1].text}")

    def addresses_changed(self) -> None:
        """The host's interfaces or their addresses are others now. What can't be is ``hosts.error``."""
        if self.hosts is not None and self.hosts.follows:
            self.hosts.follow(self._manifests.policy_set, self._snapshot(self._manifests))

    # -- the data paths --------------------------------------------------------------------------

    def restore(self) -> None:
        """Puts the record in force in every data path there is: at the start of the daemon."""
        self._faults.stage, before = "recover-", self._faults.stage
        if self.hosts is not None:
            self.hosts.restore(self._manifests.policy_set, self._snapshot(self._manifests))
        if self._active:
            self._sync()
        else:
            self._enforcement.withdraw()
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
            self.changed()

    def resolved(self, domains: dict[str, tuple[str, ...]]) -> None:
        """What the names and patterns that rules ask for stand for now; in force when it returns.

        Raises PolicyTooLarge or KernelFailed; then it is as if nothing had been said.
        """
        before, self._domains = self._domains, domains
        if not self._active or before == domains:
            return
        try:
            self._sync()
        except BaseException:
            self._domains = before
            raise

    def selecting(self, port: Port) -> list[str]:
        """The policies of the record, none that is staged, that are about a port, as ``KIND NAME``."""
        return about(self._manifests, port)

    def asked(self) -> dict[str, tuple[str, ...]]:
        """The names and patterns that rules allow each port (by port_id); ports without any are left out."""
        known, policies = self._naming
        if known is not self._manifests:
            policies = naming(self._manifests.policy_set)
            self._naming = self._manifests, policies
        if not policies:
            return {}
        ports = [p for p in self._store.ports() if p.state is not PortState.DELETING]
        endpoints = snapshot_of(self._manifests, ports).endpoints
        of = {(e.namespace, e.name): asked(policies, e) for e in endpoints if e.addresses}
        return {p.port_id: names for p in ports if (names := of.get(identity(p), ()))}

    def allows(self, flow: Flow) -> bool:
        """Whether both sides' policies in force let a flow pass."""
        compiled = self._enforcement.compiled
        return compiled is None or lookup(compiled, flow).allowed

    def judge(self) -> None:
        """Raises InvalidInput or PolicyTooLarge if what is on record now could not be put in force.

        Changes nothing.
        """
        if self._active:
            self._compile(self._manifests, self._snapshot(self._manifests))

    def networks_changed(self) -> None:
        """The networks are others now: their isolation comes into force, or ends."""
        now = self._world.isolating()
        if now == self._isolation:
            return
        if self._active:
            self._sync()
        else:
            self._enforcement.withdraw()
        self._isolation = now  # last: after a failure the next change tries again

    @property
    def _active(self) -> bool:
        enforced = any(not policy.staged for policy in self._manifests.policy_set.policies)
        return enforced or bool(self._world.isolating())

    def _sync(self, port: Port | None = None, *, without: Port | None = None) -> None:
        snapshot = self._snapshot(self._manifests, port, without)
        compiled = self._compile(self._manifests, snapshot)
        if self.hosts is not None and not self.hosts.error:
            self.hosts.put(self.hosts.plan(self._manifests.policy_set, snapshot))
        self._install(compiled)

    def _compile(self, manifests: Manifests, snapshot: Snapshot) -> Compiled:
        return self._enforcement.compile(with_isolation(manifests.policy_set, snapshot), snapshot)

    def _install(self, compiled: Compiled) -> None:
        if self._active:
            self._enforcement.put(compiled)
        else:
            self._enforcement.withdraw()

    # -- the world -------------------------------------------------------------------------------

    def _in_force(self, manifests: Manifests, hosts: Wanted) -> InForce:
        """What would be judged by, were these the manifests, and those the host's interfaces."""
        snapshot = self._snapshot(manifests)
        published = tuple(published_by(self._store.ports())) if hosts.bound else ()
        return InForce(with_isolation(manifests.policy_set, snapshot), snapshot, hosts.bound, published)

    def _snapshot(
        self, manifests: Manifests, port: Port | None = None, without: Port | None = None
    ) -> Snapshot:
        return self._world.snapshot(manifests, self._domains, port=port, without=without)


def _nobody_asked() -> None:
    """Nobody wants to know."""


def _refuse_what_is_not_enforced(manifests: Manifests) -> None:
    """Raises InvalidInput for what can be read and compiled, and this host's data path does not."""
    for policy in naming(manifests.policy_set):
        tproxy = features.probe("tproxy")
        if not tproxy.supported:
            why = f"needs {tproxy.need}, and {tproxy.have} has it not ({tproxy.detail}); name networks"
            raise InvalidInput(
                f"{policy.where}: {policy.kind} {policy.title}: domain names", names_of(policy), why
            )


def _applied(files: Mapping[str, str], manifests: Manifests, compiled: Compiled) -> Applied:
    return Applied(
        files=tuple(sorted(files)),
        policies=tuple(f"{p.kind} {p.title}" for p in manifests.policy_set.policies if not p.staged),
        staged=tuple(f"{p.kind} {p.title}" for p in staged(manifests.policy_set)),
        size=compiled.size,
        warnings=manifests.warnings,
    )
