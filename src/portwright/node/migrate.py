"""``port migrate``: sandboxes leave a bridge while they run.

All of a bridge, or none. Each sandbox is taken over while it is still on the bridge; then each leaves; then
all are on record as ports. At every step packets have a way: who is on the bridge is reached by it, who is a
port by its entry, and our programs see a packet before the bridge does. What fails, or is killed, before all
are on record is taken back, to the bridge as it was; so a sandbox is on the bridge or a port, never neither.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import time
from collections.abc import Iterator, Sequence

import msgspec

from portwright.attach import adopt
from portwright.ipam import Pools
from portwright.kernel import rtnl
from portwright.model.errors import Conflict, InvalidInput, NotSupported
from portwright.model.network import GATEWAY4, GATEWAY6, Network
from portwright.model.port import Adopted, NetnsRef, Owner, Port, PortAddress, PortState, rep_name
from portwright.node import bridges, translated
from portwright.node.apply import Applier
from portwright.node.bridges import Bridge, Seat
from portwright.node.core import Core
from portwright.node.doctor import dropping
from portwright.node.moved import keep_addresses
from portwright.node.switch import Switch, attach_mode
from portwright.plan.operations import Operation, encode

#: Of one sandbox: each is a route, a neighbour and an entry of the data path.
MOST_ADDRESSES = 64
#: Kind of the journal's entries, one for each sandbox.
MIGRATE = "migrate"


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller asks for. ``bridge`` '': all. ``network`` '': the one that holds the addresses.

    ``addresses``: of guests, by MAC, besides those that are known. ``forwarding``: chains that drop what is
    forwarded are known to accept the sandboxes' packets by something else than the bridge's name.
    """

    bridge: str = ""
    network: str = ""
    addresses: dict[str, tuple[str, ...]] = {}
    remove_bridge: bool = False
    forwarding: bool = False


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One bridge: who leaves it, as ports, and whether it goes then."""

    bridge: Bridge
    ports: tuple[Port, ...]
    remove: bool


class Migration:
    """Used by the one writer's thread, like ``Ports``."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._store = core.store

    def plan(self, wish: Wish) -> list[Move]:
        """What would be done; nothing is changed. Raises what says why a bridge can't be left."""
        switch = self._core.switch_for()
        found = bridges.look(switch, wish.bridge, wish.addresses)
        known = {seat.mac for bridge in found for seat in bridge.seats}
        for mac in wish.addresses:
            if mac not in known:
                raise InvalidInput("address", mac, "no sandbox on these bridges has this MAC")
        moves = [self._judged(switch, bridge, wish) for bridge in found]
        if any(move.ports for move in moves) and not wish.forwarding:
            self._check_forwarding(switch, moves)
        return moves

    def steps(self, move: Move) -> tuple[Operation, ...]:
        """The operations of a move of all its sandboxes, in their order."""
        over = tuple(step for port in move.ports for step in adopt.take_over(port))
        return (*over, *(step for port in move.ports for step in adopt.leave(port)))

    def move(self, move: Move) -> tuple[Port, ...]:
        """Carries it out; returns the ports. What raises leaves all of them on the bridge."""
        switch = self._core.switch_for()
        made = self._moved(switch, move.ports) if move.ports else ()
        if move.remove:
            self._remove(switch, move.bridge)
        return made

    def roll_back(self, port: Port, entry: int) -> None:
        """A move that failed or was cut short: on the bridge as before, and no port."""
        switch = self._core.switch_of(port)
        if switch is not None:
            with Applier(switch, None, self._core.faults) as applier:
                applier.take_back(adopt.give_back(port), f"undo-{MIGRATE}")
        with self._store.transaction(durable=True):
            self._store.release(port.port_id, now=time.time(), rest=False)
            self._store.delete_port(port.port_id)
            self._store.finish(entry, "failed")
        self._core.dismiss(switch, port)

    # -- steps -----------------------------------------------------------------------------------

    def _moved(self, switch: Switch, ports: Sequence[Port]) -> tuple[Port, ...]:
        self._core.prepare(switch, self._store.get_network(ports[0].network))
        with self._store.transaction(durable=True):
            entries = [self._begin(port) for port in ports]
        self._core.faults.at(f"{MIGRATE}:intent")
        try:
            translated.note(switch, self._addresses(switch, ports))
            for port in ports:
                self._core.admit(switch, port)
                self._apply(switch, adopt.take_over(port), MIGRATE)
            for port in ports:
                self._apply(switch, adopt.leave(port), "leave")
            # What is answered for on the bridge is so in IPv6 only with this.
            self._core.set_sysctl(switch, f"net/ipv6/conf/{adopt.of(ports[0]).bridge}/proxy_ndp", "1")
        except BaseException:
            for port, entry in reversed(list(zip(ports, entries, strict=True))):
                with contextlib.suppress(Exception):  # the entry stays open: the next start takes it back
                    self.roll_back(port, entry)
            raise
        made = tuple(msgspec.structs.replace(port, state=PortState.ATTACHED) for port in ports)
        with self._store.transaction(durable=False):
            for port, entry in zip(made, entries, strict=True):
                self._store.put_port(port)
                self._store.finish(entry, "done")
        self._core.faults.at(f"{MIGRATE}:commit")
        return made

    def _addresses(self, switch: Switch, more: Sequence[Port]) -> set[str]:
        here = [p for p in self._store.ports() if p.host.cookie == switch.ref.cookie]
        return {a.address for port in (*here, *more) for a in port.addresses}

    def _begin(self, port: Port) -> int:
        self._store.put_port(port)
        self._store.hold(port.network, port.port_id, [a.address for a in port.addresses])
        return self._store.begin(port.port_id, MIGRATE, encode((*adopt.take_over(port), *adopt.leave(port))))

    def _apply(self, switch: Switch, plan: Sequence[Operation], kind: str) -> None:
        with Applier(switch, None, self._core.faults) as applier:
            applier.apply(plan, kind, undo=False)

    def _remove(self, switch: Switch, bridge: Bridge) -> None:
        """The bridge goes; the host keeps its addresses, which sandboxes have for their gateways'."""
        links = rtnl.links(switch.rtnl, stats=False)
        left = [link.name for link in links if link.master == bridge.link.index]
        if left:
            why = f"{', '.join(left[:4])} came onto it meanwhile; it stays"
            raise Conflict("bridge", bridge.link.name, why)
        keep_addresses(self._store, switch, [a.partition("/")[0] for a in bridge.addresses])
        self._core.faults.at(f"{MIGRATE}:kept")
        switch.rtnl.execute([rtnl.link_del(bridge.link.index)])
        self._core.faults.at(f"{MIGRATE}:removed")

    # -- judging ---------------------------------------------------------------------------------

    def _judged(self, switch: Switch, bridge: Bridge, wish: Wish) -> Move:
        """Raises Conflict or NotSupported, naming who is in the way, and InvalidInput."""
        name = bridge.link.name
        stuck = [seat for seat in bridge.seats if seat.trouble]
        if stuck:
            first = f"{stuck[0].link.name}: {stuck[0].trouble}"
            more = f" (and {len(stuck) - 1} more)" if len(stuck) > 1 else ""
            raise Conflict("bridge", name, f"all of it is moved, or nothing; {first}{more}")
        if bridge.filters_vlans and bridge.seats:
            why = f"{name} keeps VLANs apart, and ports have none yet; switch that off first"
            raise NotSupported(adopt.MODEL, "vlan_filtering", why)
        if not bridge.seats:
            return Move(bridge=bridge, ports=(), remove=wish.remove_bridge and bool(wish.bridge))
        network = self._network(bridge, wish.network)
        if network.isolation == "open" and any(seat.settings.get("isolated") for seat in bridge.seats):
            why = f"ports of {name} are isolated from each other, and those of {network.name} are not"
            raise Conflict("network", network.name, f"{why}; use one with --isolation")
        self._check_claims(switch, bridge)
        ports = tuple(self._port(switch, bridge, seat, network) for seat in bridge.seats)
        return Move(bridge=bridge, ports=ports, remove=wish.remove_bridge)

    def _network(self, bridge: Bridge, wanted: str) -> Network:
        addresses = [a for seat in bridge.seats for a in seat.addresses]
        choice = [self._store.get_network(wanted)] if wanted else list(self._store.networks())
        for network in choice:
            pools = self._store.pools(network.name)
            if all(pools.range_of(address) for address in addresses):
                self._check_own(bridge, network, pools)
                return network
        which = f"network {wanted} has" if wanted else "no network has"
        why = f"{which} all addresses of its sandboxes; make one: {suggestion(bridge, wanted)}"
        raise Conflict("bridge", bridge.link.name, why)

    def _check_claims(self, switch: Switch, bridge: Bridge) -> None:
        """Sandboxes say themselves what they have: nobody gets what another, or the host, has too.

        And nobody's way out may be another sandbox, as the host routes for all of them from now on.
        """
        holders = {a.address: "the host" for a in rtnl.addresses(switch.rtnl)}
        own = {a.partition("/")[0] for a in bridge.addresses}
        for seat in bridge.seats:
            if len(seat.addresses) > MOST_ADDRESSES:
                why = f"{seat.link.name} has {len(seat.addresses)} addresses; {MOST_ADDRESSES} at most"
                raise Conflict("bridge", bridge.link.name, why)
            for gateway in set(seat.gateways) - own:
                why = f"{seat.link.name} is routed by {gateway}: not the bridge's own, it would be passed by"
                raise Conflict("bridge", bridge.link.name, why)
            for address in seat.addresses:
                other = holders.setdefault(address, seat.link.name)
                if other != seat.link.name:
                    why = f"{seat.link.name} claims {address}, which {other} has; take it off one of them"
                    raise Conflict("bridge", bridge.link.name, why)

    def _check_own(self, bridge: Bridge, network: Network, pools: Pools) -> None:
        """The bridge's own addresses stay the host's: no port may get one."""
        for address in (a.partition("/")[0] for a in bridge.addresses):
            ip = ipaddress.ip_address(address)
            found = pools.find(ip.version, int(ip))
            given = found is not None and any(lo <= int(ip) <= hi for lo, hi in found[0].pieces)
            if given and (ip.version, int(ip)) not in pools.gateways:
                why = f"it would give {address}, which is {bridge.link.name}'s own, to a port"
                raise Conflict("network", network.name, f"{why}; make one with --reserved {address}")

    def _port(self, switch: Switch, bridge: Bridge, seat: Seat, network: Network) -> Port:
        port_id = secrets.token_hex(8)
        sources = tuple(a.partition("/")[0] for a in bridge.addresses)
        # A guest on the host is in no namespace of its own; its ports share their addresses with nobody's.
        alone = NetnsRef(path="", cookie=int(port_id, 16), boot_id=self._core.boot_id)
        return Port(
            port_id=port_id,
            network=network.name,
            net_id=network.net_id,
            owner=Owner(kind="name", name=f"{bridge.link.name}-{seat.link.name}"),
            model=adopt.MODEL,
            state=PortState.CREATING,
            ifname=seat.ifname,
            attach=attach_mode(),
            rep_name=rep_name(port_id),
            rep_ifindex=seat.link.index,
            tap=seat.inner.tap if seat.inner else "",
            mac=seat.mac,
            mtu=seat.mtu,
            host=switch.ref,
            sandbox=seat.sandbox or alone,
            addresses=tuple(PortAddress(address=a, gateway=_gateway(a, sources)) for a in seat.addresses),
            adopted=Adopted(
                link=seat.link.name,
                bridge=bridge.link.name,
                bridge_mac=bridge.link.mac,
                sources=sources,
                tap=seat.kind == "guest",
                clsact=seat.clsact,
                settings=seat.settings,
                inner=seat.inner,
            ),
            created=time.time(),
        )

    def _check_forwarding(self, switch: Switch, moves: Sequence[Move]) -> None:
        """Chains that drop what is forwarded accept a bridge's packets by its name, which they lose."""
        chains = dropping(switch, "forward")
        if chains:
            names = ", ".join(move.bridge.link.name for move in moves if move.ports)
            why = (
                f"forwarded packets are dropped by default ({', '.join(chains)}), and what accepts those of "
                f"{names} names the bridge: accept them by their subnets, say so by --forwarding-accepted"
            )
            raise Conflict("bridge", names, why)


def suggestion(bridge: Bridge, name: str) -> str:
    """The command that makes a network for the sandboxes of a bridge."""
    words = [f"portwright network create {name or bridge.link.name}"]
    blocks = dict.fromkeys(_blocks(bridge))
    words += [f"--subnet {block}" for block in blocks]
    words += [f"--reserved {address.partition('/')[0]}" for address in bridge.addresses]
    return " ".join(words)


def _blocks(bridge: Bridge) -> Iterator[str]:
    found = [ipaddress.ip_network(p, strict=False) for p in bridge.addresses]
    found += [ipaddress.ip_network(p) for seat in bridge.seats for p in seat.prefixes]
    for address in (ipaddress.ip_address(a) for seat in bridge.seats for a in seat.addresses):
        if not any(address in block for block in found if block.prefixlen < block.max_prefixlen):
            found.append(ipaddress.ip_network((address, 24 if address.version == 4 else 64), strict=False))
    for block in found:
        larger = any(b != block and b.version == block.version and block.subnet_of(b) for b in found)  # type: ignore[arg-type]  # same version
        if not larger and block.prefixlen < block.max_prefixlen:
            yield str(block)


def _gateway(address: str, known: Sequence[str]) -> str:
    same = [g for g in known if (":" in g) == (":" in address)]
    return same[0] if same else GATEWAY6 if ":" in address else GATEWAY4
