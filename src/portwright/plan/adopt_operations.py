"""Operations on devices that somebody else made and that are a port's representor while the port is.

They stay when the port goes, so what a port puts on them has to be taken off by itself, step by step.
"""

from __future__ import annotations

from portwright.plan.operation import Base


class BorrowLink(Base, frozen=True, kw_only=True):
    """Makes a port of a bridge findable as a representor, ``rep``; it keeps its name, and its bridge for now.

    The bridge keeps its MAC when its ports leave: sandboxes have it for their gateway's.
    """

    link: str
    ifindex: int
    bridge: str
    bridge_mac: str
    rep: str
    altnames: tuple[str, ...]
    clsact: bool

    def inverse(self) -> ReturnLink:
        """Takes the names off."""
        return ReturnLink(rep=self.rep, altnames=self.altnames, clsact=self.clsact)

    def render(self) -> str:
        """``ip link property add``, and the bridge's own MAC set on it."""
        names = "".join(f" altname {name}" for name in (self.rep, *self.altnames))
        pinned = f"ip link set {self.bridge} address {self.bridge_mac}"
        return f"{pinned}; ip link property add dev {self.link}{names}"


class ReturnLink(Base, frozen=True, kw_only=True):
    """Takes our names off a link, and a ``clsact`` qdisc that came with us and holds nothing any more."""

    rep: str
    altnames: tuple[str, ...]
    clsact: bool  # it had one before us

    def render(self) -> str:
        """``ip link property del``."""
        names = "".join(f" altname {name}" for name in (*self.altnames, self.rep))
        qdisc = "" if self.clsact else f"tc qdisc del dev {self.rep} clsact; "
        return f"{qdisc}ip link property del dev {self.rep}{names}"


class AddWay(Base, frozen=True, kw_only=True):
    """The host's way to an address of the sandbox, by a permanent neighbour.

    The host speaks from ``source``, as it did by the bridge. An IPv4 route goes with its source's address,
    so a second one stands behind it.
    """

    rep: str
    address: str
    mac: str
    source: str = ""

    def inverse(self) -> DropWay:
        """Takes the routes and the neighbour away."""
        return DropWay(rep=self.rep, address=self.address)

    def render(self) -> str:
        """``ip route replace`` and ``ip neighbour replace``."""
        source = f" src {self.source}" if self.source else ""
        return (
            f"ip route replace {self.address} dev {self.rep}{source}; "
            f"ip neighbour replace {self.address} lladdr {self.mac} dev {self.rep} nud permanent"
        )


class DropWay(Base, frozen=True, kw_only=True):
    """Takes them away, of this device alone."""

    rep: str
    address: str

    def render(self) -> str:
        """``ip route del`` and ``ip neighbour del``."""
        return f"ip route del {self.address} dev {self.rep}; ip neighbour del {self.address} dev {self.rep}"


class LeaveBridge(Base, frozen=True, kw_only=True):
    """Takes a link off its bridge. From here on the host routes what it sends."""

    rep: str
    bridge: str
    settings: dict[str, int]

    def inverse(self) -> EnterBridge:
        """Back onto it, set as it was."""
        return EnterBridge(rep=self.rep, bridge=self.bridge, settings=self.settings)

    def render(self) -> str:
        """``ip link set nomaster``."""
        return f"ip link set {self.rep} nomaster"


class EnterBridge(Base, frozen=True, kw_only=True):
    """Puts a link on a bridge; nothing where one of the two is gone, or it is there."""

    rep: str
    bridge: str
    settings: dict[str, int]

    def render(self) -> str:
        """``ip link set master`` and ``bridge link set``."""
        words = "".join(f" {word} {value}" for word, value in self.settings.items())
        return f"ip link set {self.rep} master {self.bridge}; bridge link set dev {self.rep}{words}"


class AnswerFor(Base, frozen=True, kw_only=True):
    """Who still is on the bridge, or comes onto it, asks there for who left: the host answers, and routes."""

    bridge: str
    addresses: tuple[str, ...]

    def inverse(self) -> AnswerNoMore:
        """Ends it."""
        return AnswerNoMore(bridge=self.bridge, addresses=self.addresses)

    def render(self) -> str:
        """``ip neigh add proxy``, of each."""
        return "; ".join(f"ip neigh add proxy {one} dev {self.bridge}" for one in self.addresses)


class AnswerNoMore(Base, frozen=True, kw_only=True):
    """Ends it; nothing where the bridge is gone."""

    bridge: str
    addresses: tuple[str, ...]

    def render(self) -> str:
        """``ip neigh del proxy``, of each."""
        return "; ".join(f"ip neigh del proxy {one} dev {self.bridge}" for one in self.addresses)


class CloseLink(Base, frozen=True, kw_only=True):
    """Takes a link down if it is there: its sandbox has no carrier any more, and no way out."""

    rep: str

    def render(self) -> str:
        """``ip link set down``."""
        return f"ip link set {self.rep} down"
