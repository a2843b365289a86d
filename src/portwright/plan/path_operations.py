"""Operations on the data path: its programs on a representor, and what its maps know of a port."""

from __future__ import annotations

from portwright.model.port import Limits
from portwright.plan.operation import Base


class AttachProgram(Base, frozen=True, kw_only=True):
    """``direction`` of the representor: ingress = from the sandbox. It outlives the daemon either way."""

    rep: str
    port_id: str
    direction: str
    how: str = "clsact"
    lent: bool = False  # the device is somebody else's, and stays when the port goes

    def inverse(self) -> DetachProgram:
        """Detaches it."""
        rep = self.rep if self.lent else ""
        return DetachProgram(port_id=self.port_id, direction=self.direction, rep=rep)

    def render(self) -> str:
        """``tc filter add`` or ``bpftool net attach``, by ``how``."""
        program = "pw_from_port" if self.direction == "ingress" else "pw_to_port"
        if self.how == "clsact":
            return f"tc filter add dev {self.rep} {self.direction} bpf da pinned progs/{program}"
        return f"bpftool net attach tcx_{self.direction} pinned progs/{program} dev {self.rep}"


class DetachProgram(Base, frozen=True, kw_only=True):
    """Removes the pin of a TCX link; a clsact filter went with its device, or is taken off ``rep``."""

    port_id: str
    direction: str
    rep: str = ""

    def render(self) -> str:
        """``rm`` of the pin, and ``tc filter del``."""
        unpin = f"rm links/{self.port_id}_{self.direction}"
        return f"{unpin}; tc filter del dev {self.rep} {self.direction}" if self.rep else unpin


class PutPort(Base, frozen=True, kw_only=True):
    """The port's entry in pw_ports, its limits and, if absent, its counters."""

    rep: str
    port_id: str
    net_id: int
    mac: str
    gateway_mac: str
    mtu: int
    sandbox: int  # cookie of the sandbox's namespace
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]
    limits: Limits
    tap: bool = False  # the representor is a tap, which the sandbox's hypervisor holds
    onlink: bool = False  # the sandbox takes itself for one of a segment, as it came off a bridge

    def inverse(self) -> RemovePort:
        """Takes the entry away; counters that were made stay until ``ForgetPort``."""
        return RemovePort(rep=self.rep, port_id=self.port_id)

    def render(self) -> str:
        """``bpftool map update``; the value in words."""
        value = f"port {self.port_id} net {self.net_id}"
        return f"bpftool map update name pw_ports key ifindex({self.rep}) value {value}"


class RemovePort(Base, frozen=True, kw_only=True):
    """Takes the device's entry and limits away; counters stay until ``ForgetPort``.

    ``ifindex`` as recorded, 0 when the record never got to know it.
    """

    rep: str
    port_id: str
    ifindex: int = 0

    def render(self) -> str:
        """``bpftool map delete``."""
        return f"bpftool map delete name pw_ports key ifindex({self.rep})"


class ForgetPort(Base, frozen=True, kw_only=True):
    """Drops the counters of a port that is deleted."""

    port_id: str

    def render(self) -> str:
        """``bpftool map delete``."""
        return f"bpftool map delete name pw_counters key {self.port_id}"


class PutTargets(Base, frozen=True, kw_only=True):
    """Makes the addresses reachable on the fast path: the last step of an attach."""

    rep: str
    port_id: str
    net_id: int
    mac: str
    gateway_mac: str
    mtu: int
    sandbox: int
    addresses: tuple[str, ...]
    limited: bool
    down: bool = False  # the link is disabled: packets for it are dropped, with that reason
    tap: bool = False

    def inverse(self) -> RemoveTargets:
        """Takes the addresses away."""
        return RemoveTargets(port_id=self.port_id, addresses=self.addresses)

    def render(self) -> str:
        """``bpftool map update``; one for all addresses."""
        return f"bpftool map update name pw_addrs key {','.join(self.addresses)} value port {self.port_id}"


class RemoveTargets(Base, frozen=True, kw_only=True):
    """Takes the addresses off the fast path where they are the port's; another's entries stay."""

    port_id: str
    addresses: tuple[str, ...]

    def render(self) -> str:
        """``bpftool map delete``; one for all addresses."""
        return f"bpftool map delete name pw_addrs key {','.join(self.addresses)}"
