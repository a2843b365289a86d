"""The leftover checker: record against kernel, read independently of the code that wrote either.

``audit(daemon)`` gives a list of problems, in sentences; [] is well. What is *left over*: links, pins, map
entries, nft elements, routes, neighbours, addresses, intents that no port accounts for. What is *lost*:
anything of those that a port on record should have and has not. ``remains(daemon)`` is for a daemon that
has ended with no port: then nothing at all may be there.
"""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from portwright.dataplane import values
from portwright.kernel import clsact, netns
from portwright.kernel.bpf import Map
from portwright.kernel.netlink import NetlinkSocket
from portwright.model.network import GATEWAY_MAC
from portwright.model.port import Port, PortState
from portwright.node.paths import Paths
from portwright.plan import nat, publish
from tests.fix_daemon import Daemon
from tests.fix_netns import TestNetns

REP = re.compile(r"pw[0-9a-f]{8}")
FORWARDING = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
SIDES = {"ingress": "pw_from_port", "egress": "pw_to_port"}


class Record:
    """What a daemon's state file says, read from the file and not from the daemon."""

    def __init__(self, state_dir: Path) -> None:
        with _opened(state_dir) as db:
            self.ports = [
                msgspec.json.decode(body, type=Port) for (body,) in db.execute("SELECT body FROM ports")
            ]
            self.addresses: list[tuple[str, str]] = db.execute(
                "SELECT address, port_id FROM addresses"
            ).fetchall()
            self.pending: list[tuple[str, str]] = db.execute(
                "SELECT kind, port_id FROM journal WHERE state = 'intent'"
            ).fetchall()
            self.owned: list[tuple[str, str]] = db.execute("SELECT kind, name FROM owned").fetchall()

    def plan(self, state_dir: Path, kind: str) -> list[str]:
        """The newest plan of a kind in the journal: the names of its operations."""
        with _opened(state_dir) as db:
            query = "SELECT plan FROM journal WHERE kind = ? ORDER BY id DESC LIMIT 1"
            rows = db.execute(query, (kind,)).fetchall()
        return [operation["type"] for operation in json.loads(rows[0][0])]


def audit(
    daemon: Daemon, *, hosts: Sequence[TestNetns] = (), beside: Sequence[Daemon] = (), inside: bool = True
) -> list[str]:
    """Every difference between the record and the kernel; the daemon must be ready.

    ``hosts``: further namespaces in which it has or had representors. ``beside``: daemons whose ports are in
    the same namespaces. ``inside``: look into the sandboxes too.
    """
    record = Record(daemon.state_dir)
    others = {p.rep_name for other in beside for p in Record(other.state_dir).ports}
    problems = list(_record(record, daemon))
    spaces = {netns.cookie(h.fd): h for h in (daemon.host, *hosts)}
    problems += _folders(record, daemon, netns.cookie(daemon.host.fd))
    for cookie, host in spaces.items():
        attached = [p for p in record.ports if p.state is PortState.ATTACHED and p.host.cookie == cookie]
        problems += _links(host, attached, others)
        problems += _published(daemon, host, attached, needed=cookie == netns.cookie(daemon.host.fd))
        folder = pins(daemon) / f"{cookie:x}"
        if folder.exists():
            problems += _maps(folder / "maps", record.ports, attached)
            problems += _programs(folder, host, attached)
        elif attached:
            problems.append(f"no data path in {host.name}, where ports are attached")
        if inside:
            problems += _sandboxes(attached)
    return problems


def remains(daemon: Daemon, forwarding: str = "0") -> list[str]:
    """What an ended daemon without ports left. ``forwarding``: the sysctls' value before its start."""
    host = daemon.host
    problems = [f"link {name}" for name in _reps(host)]
    problems += [f"nft table {name}" for name in tables(host) if name == table(daemon)]
    if (daemon.run_dir / "bpf").exists():
        problems.append(f"{daemon.run_dir}/bpf")
    problems += [f"mount {line}" for line in _mounts() if str(daemon.run_dir) in line]
    for path in FORWARDING:
        if (now := _sysctl(host, path)) != forwarding:
            problems.append(f"sysctl {path} is {now}, it was {forwarding}")
    record = Record(daemon.state_dir)
    problems += [f"record of port {p.port_id}" for p in record.ports]
    problems += [f"record of address {a}" for a, _ in record.addresses]
    problems += [f"open intent {kind} of {port_id}" for kind, port_id in record.pending]
    problems += [f"record of {kind} {name}" for kind, name in record.owned]
    return problems


def pins(daemon: Daemon) -> Path:
    """Its bpffs, as the daemon's own mount namespace has it."""
    assert daemon.process is not None
    return Path(f"/proc/{daemon.process.pid}/root{daemon.run_dir}/bpf")


def table(daemon: Daemon) -> str:
    """The name of its nft table."""
    return nat.table_name(Paths(daemon.run_dir, daemon.state_dir).instance)


def tables(host: TestNetns) -> list[str]:
    """All inet tables of a namespace."""
    listed = json.loads(host.run(["nft", "-j", "list", "tables", "inet"]).stdout)["nftables"]
    return [entry["table"]["name"] for entry in listed if "table" in entry]


# --- the record ---------------------------------------------------------------------------------


def _record(record: Record, daemon: Daemon) -> Iterator[str]:
    for kind, port_id in record.pending:
        yield f"the journal has an open intent: {kind} of {port_id}"
    for port in record.ports:
        if port.state not in (PortState.ATTACHED, PortState.DETACHED):
            yield f"port {port.port_id} is {port.state.value}"
    held = {(a.address, p.port_id) for p in record.ports for a in p.addresses if p.ipam == "portwright"}
    yield from _differences("address on record", held, set(record.addresses))
    given = [a.address for p in record.ports for a in p.addresses]
    yield from (f"address {a} is of {given.count(a)} ports" for a in {*given} if given.count(a) > 1)
    if list((daemon.state_dir / "spool").glob("*")):
        yield "the spool is not empty"
    mapped = {p.host.cookie for p in record.ports if p.state is PortState.ATTACHED}
    for cookie in mapped:
        if cookie == netns.cookie(daemon.host.fd):
            for path in FORWARDING:
                if _sysctl(daemon.host, path) != "1":
                    yield f"sysctl {path} is off with ports attached"
    for kind, name in record.owned:
        if kind == "sysctl" and int(name.partition(":")[0], 16) not in {
            *mapped,
            netns.cookie(daemon.host.fd),
        }:
            yield f"sysctl {name} is on record, its namespace has no port"


def _folders(record: Record, daemon: Daemon, own: int) -> Iterator[str]:
    wanted = {f"{p.host.cookie:x}" for p in record.ports if p.state is PortState.ATTACHED} | {f"{own:x}"}
    found = {path.name for path in pins(daemon).iterdir() if path.is_dir()}
    # A detached port keeps the counters that are in the namespace of its last device.
    kept = {f"{p.host.cookie:x}" for p in record.ports}
    yield from (f"data path of namespace {name}, which has no port" for name in found - wanted - kept)
    yield from (f"no data path of namespace {name}" for name in wanted - found)


# --- a namespace --------------------------------------------------------------------------------


def _links(host: TestNetns, attached: list[Port], others: set[str]) -> Iterator[str]:
    links = {name: link for name, link in _reps(host).items() if name not in others}
    yield from (
        f"link {name} of no port in {host.name}" for name in links.keys() - {p.rep_name for p in attached}
    )
    for port in attached:
        link = links.get(port.rep_name)
        if link is None:
            yield f"representor {port.rep_name} is missing"
            continue
        facts = (link["ifindex"], link["address"], link["mtu"], "UP" in link["flags"])
        wanted = (port.rep_ifindex, GATEWAY_MAC, port.mtu, port.admin == "up")
        if facts != wanted:
            yield f"representor {port.rep_name} is {facts}, not {wanted}"
        if f"port-{port.port_id}" not in link.get("altnames", ()):
            yield f"representor {port.rep_name} lacks its alternative name"
    up = [p for p in attached if p.admin == "up"]
    routes = {(a.address, p.rep_name) for p in up for a in p.addresses}
    yield from _differences("host route", routes, set(_routes(host, others)))
    neighbours = {(a.address, p.rep_name, p.mac) for p in up for a in p.addresses}
    yield from _differences("neighbour", neighbours, set(_neighbours(host, others)))


def _routes(host: TestNetns, others: set[str]) -> Iterator[tuple[str, str]]:
    for family in ("-4", "-6"):
        for route in _ip(host, family, "route", "show", "table", "all"):
            dev = route.get("dev", "")
            local = route.get("table") == "local" or route["dst"].startswith(("fe80:", "ff00:", "multicast"))
            if REP.fullmatch(dev) and dev not in others and not local:
                yield route["dst"], dev


def _neighbours(host: TestNetns, others: set[str]) -> Iterator[tuple[str, str, str]]:
    for entry in _ip(host, "neigh", "show", "nud", "permanent"):
        if REP.fullmatch(entry["dev"]) and entry["dev"] not in others:
            yield entry["dst"], entry["dev"], entry.get("lladdr", "")


def _published(daemon: Daemon, host: TestNetns, attached: list[Port], *, needed: bool) -> Iterator[str]:
    name = table(daemon)
    if name not in tables(host):
        if attached:
            yield f"nft table {name} is missing in {host.name}"
        return
    if not attached and not needed:
        yield f"nft table {name} is in {host.name}, which has no port"
    listed = json.loads(host.run(["nft", "-j", "list", "table", "inet", name]).stdout)["nftables"]
    found = {
        e.identity()
        for e in nat.observed_elements(listed)
        if e.set_name.rstrip("46") not in ("local", "masq")
    }
    wanted = {e.identity() for p in attached for e in publish.elements(p.port_mappings, p.addresses)}
    yield from _differences("nft element", wanted, found)


# --- the data path ------------------------------------------------------------------------------


def _maps(folder: Path, ports: list[Port], attached: list[Port]) -> Iterator[str]:
    def entries(name: str) -> set[tuple[str, str]]:
        with _map(folder / name) as table_:
            return {(key.hex(), values.port_text(value)) for key, value in table_.items()}

    def holders(name: str) -> set[str]:
        with _map(folder / name) as table_:
            return set(map(values.port_text, table_.keys()))

    indexes = {(p.rep_ifindex.to_bytes(4, sys.byteorder).hex(), p.port_id) for p in attached}
    yield from _differences("entry of pw_ports", indexes, entries("pw_ports"))
    targets = {(values.address(a.address).hex(), p.port_id) for p in attached for a in p.addresses}
    yield from _differences("entry of pw_addrs", targets, entries("pw_addrs"))
    if (folder / "pw_clones").exists():  # from the first clone on
        numbers = {(p.clone.to_bytes(4, sys.byteorder).hex(), p.port_id) for p in attached if p.clone}
        yield from _differences("entry of pw_clones", numbers, entries("pw_clones"))
    known = {p.port_id for p in ports}
    counted, limited = holders("pw_counters"), holders("pw_limits")
    yield from (f"counters of {one}, which is no port" for one in counted - known)
    yield from (f"no counters of port {p.port_id}" for p in attached if p.port_id not in counted)
    yield from (f"drop counters of {one}, which is no port" for one in holders("pw_drops") - known)
    wanted = {p.port_id for p in attached if p.limits.egress_rate or p.limits.ingress_rate}
    yield from _differences("limit", wanted, limited)


def _programs(folder: Path, host: TestNetns, attached: list[Port]) -> Iterator[str]:
    objects = list(folder.glob("object-*"))
    if len(objects) != 1 or {p.name for p in objects[0].iterdir()} != set(SIDES.values()):
        yield f"objects in {folder}: {[o.name for o in objects]}"
    wanted = {f"{p.port_id}_{side}" for p in attached if p.attach == "tcx" for side in SIDES}
    yield from _differences("link pin", wanted, {p.name for p in (folder / "links").iterdir()})
    with NetlinkSocket(netns_fd=host.fd) as sock:
        for port in (p for p in attached if p.attach == "clsact"):
            for side, name in SIDES.items():
                found = [f.name for f in clsact.list_filters(sock, port.rep_ifindex, side)]  # type: ignore[arg-type]
                if found != [name]:
                    yield f"filters of {port.rep_name} {side}: {found}, not {name}"


# --- the sandboxes ------------------------------------------------------------------------------


def _sandboxes(attached: list[Port]) -> Iterator[str]:
    for port in attached:
        enter = ["nsenter", f"--net={port.sandbox.path}", "--"]
        done = subprocess.run(
            [*enter, "ip", "-j", "addr", "show", "dev", port.ifname], check=False, capture_output=True
        )
        links = json.loads(done.stdout or "[]")
        if done.returncode or not links:
            yield f"port {port.port_id}: no {port.ifname} in {port.sandbox.path}"
            continue
        found = {a["local"] for a in links[0]["addr_info"] if a["scope"] == "global"}
        yield from _differences(f"address in {port.sandbox.path}", {a.address for a in port.addresses}, found)


# --- reading ------------------------------------------------------------------------------------


def _differences(what: str, wanted: Iterable[Any], found: Iterable[Any]) -> Iterator[str]:
    wanted, found = set(wanted), set(found)
    yield from (f"{what} left over: {one}" for one in sorted(found - wanted))
    yield from (f"{what} missing: {one}" for one in sorted(wanted - found))


class _opened:
    def __init__(self, state_dir: Path) -> None:
        self._db = sqlite3.connect(f"file:{state_dir}/state.db?mode=ro", uri=True, timeout=5)

    def __enter__(self) -> sqlite3.Connection:
        return self._db

    def __exit__(self, *_: object) -> None:
        self._db.close()


class _map:
    def __init__(self, path: Path) -> None:
        self._map = Map.from_pin(path)

    def __enter__(self) -> Map:
        return self._map

    def __exit__(self, *_: object) -> None:
        self._map.close()


def _ip(host: TestNetns, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.run(["ip", "-j", *words]).stdout or "[]")
    return found


def _reps(host: TestNetns) -> dict[str, dict[str, Any]]:
    return {link["ifname"]: link for link in _ip(host, "link", "show") if REP.fullmatch(link["ifname"])}


def _sysctl(host: TestNetns, path: str) -> str:
    with host.entered():
        return Path("/proc/sys", path).read_text().strip()


def _mounts() -> list[str]:
    return Path("/proc/self/mounts").read_text().splitlines()


Audit = Callable[..., list[str]]
