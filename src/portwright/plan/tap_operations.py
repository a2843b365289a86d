"""Operations on taps, the ends that hypervisors open, in a sandbox's namespace."""

from __future__ import annotations

from portwright.model.port import NetnsRef
from portwright.plan.operation import Base, inside


class CreateTap(Base, frozen=True, kw_only=True):
    """A persistent tap in the sandbox's namespace, of ``queues``, for a hypervisor; up, without IPv6."""

    tap: str
    mtu: int
    queues: int = 1
    sandbox: NetnsRef

    def inverse(self) -> DeleteTap:
        """Deletes it."""
        return DeleteTap(tap=self.tap, sandbox=self.sandbox)

    def render(self) -> str:
        """``ip tuntap add``, and ``up``."""
        many = " multi_queue" if self.queues > 1 else ""
        made = f"{inside('sandbox')}ip tuntap add {self.tap} mode tap vnet_hdr{many}"
        return f"{made}; {inside('sandbox')}ip link set {self.tap} mtu {self.mtu} addrgenmode none up"


class DeleteTap(Base, frozen=True, kw_only=True):
    """Deletes the tap, wherever its namespace is found; with the namespace it went anyway."""

    tap: str
    sandbox: NetnsRef

    def render(self) -> str:
        """``ip link delete``."""
        return f"{inside('sandbox')}ip link delete {self.tap}"


class JoinLinks(Base, frozen=True, kw_only=True):
    """What comes in on one device of the sandbox's namespace goes out on the other, both ways.

    By a filter of ours on each, beside those that others have there; it goes with the device.
    """

    device: str
    tap: str

    def render(self) -> str:
        """``tc filter add``, twice."""
        ways = ((self.device, self.tap), (self.tap, self.device))
        add = f"{inside('sandbox')}tc filter add dev"
        return "; ".join(
            f"{add} {one} ingress bpf da object-file join.bpf.o classid {to}" for one, to in ways
        )
