"""Operations on taps, the ends that hypervisors open, in a sandbox's namespace."""

from __future__ import annotations

from portwright.model.port import NetnsRef
from portwright.plan.operation import Base, inside


class CreateTap(Base, frozen=True, kw_only=True):
    """A persistent tap in the sandbox's namespace, of ``queues``, for a hypervisor; up, without IPv6.

    ``mac``: the guest's card's; '' for one of the kernel's, as in a journal of a release before.
    """

    tap: str
    mac: str = ""
    mtu: int
    queues: int = 1
    sandbox: NetnsRef
    uid: int | None = None  # who may open it besides root
    gid: int | None = None

    def inverse(self) -> DeleteTap:
        """Deletes it."""
        return DeleteTap(tap=self.tap, sandbox=self.sandbox)

    def render(self) -> str:
        """``ip tuntap add``, without a qdisc, and ``up``."""
        many = " multi_queue" if self.queues > 1 else ""
        many += "".join(
            f" {word} {number}"
            for word, number in (("user", self.uid), ("group", self.gid))
            if number is not None
        )
        address = f" address {self.mac}" if self.mac else ""
        made = (
            f"ip tuntap add {self.tap} mode tap vnet_hdr{many}",
            f"tc qdisc replace dev {self.tap} root noqueue",
            f"ip link set {self.tap}{address} mtu {self.mtu} addrgenmode none up",
        )
        return "; ".join(f"{inside('sandbox')}{command}" for command in made)


class CreateHostTap(Base, frozen=True, kw_only=True):
    """A persistent tap in the host's namespace that is the representor itself; down."""

    rep: str
    gateway_mac: str
    mtu: int
    queues: int = 1
    alias: str

    def render(self) -> str:
        """``ip tuntap add``, and its settings."""
        many = " multi_queue" if self.queues > 1 else ""
        made = f"ip tuntap add {self.rep} mode tap vnet_hdr{many}; ip link set {self.rep}"
        return f"{made} address {self.gateway_mac} mtu {self.mtu} alias {self.alias!r}"


class CreateMacvtap(Base, frozen=True, kw_only=True):
    """A macvtap, up, on the device in the sandbox's namespace, with its MAC and in its stead; goes with it.

    Its own stack hears nothing while no hypervisor has it open either.
    """

    device: str
    tap: str
    mtu: int
    queues: int = 1

    def render(self) -> str:
        """``ip link add``, two sysctls, and ``up``."""
        begin, many = inside("sandbox"), f"numtxqueues {self.queues} numrxqueues {self.queues}"
        made = f"{begin}ip link add link {self.device} name {self.tap} mtu {self.mtu} {many}"
        deaf = f"net.ipv6.conf.{self.tap}.disable_ipv6=1 net.ipv4.conf.{self.tap}.rp_filter=1"
        then = f"{begin}sysctl -w {deaf}; {begin}ip link set {self.tap} allmulticast on up"
        return f"{made} type macvtap mode passthru; {then}"


class DeleteTap(Base, frozen=True, kw_only=True):
    """Deletes the tap, wherever its namespace is found; with the namespace it went anyway."""

    tap: str
    sandbox: NetnsRef

    def render(self) -> str:
        """``ip link delete``."""
        return f"{inside('sandbox')}ip link delete {self.tap}"


class JoinLinks(Base, frozen=True, kw_only=True):
    """What comes in on one device of the sandbox's namespace goes out on the other, both ways.

    By a filter of ours on each, beside those that others have there; it goes with the device. ``join``:
    our program ("bpf"), the same and from the tap to the device's other end ("peer"), or the kernel's own u32
    and mirred ("mirred").
    """

    device: str
    tap: str
    join: str = "bpf"

    def render(self) -> str:
        """``tc filter add``, twice."""
        ways = ((self.device, self.tap), (self.tap, self.device))
        add = f"{inside('sandbox')}tc filter add dev"
        if self.join == "mirred":
            begin = f"{inside('sandbox')}tc qdisc add dev"
            match = "ingress protocol all pref 28791 handle ::77 u32 match u32 0 0"
            return "; ".join(
                f"{begin} {one} clsact; {add} {one} {match} action mirred egress redirect dev {to}"
                for one, to in ways
            )
        programs = ("pw_join", "pw_join_peer" if self.join == "peer" else "pw_join")
        return "; ".join(
            f"{add} {one} ingress bpf da object-file join.bpf.o program {program} classid {to}"
            for (one, to), program in zip(ways, programs, strict=True)
        )


class AdoptLink(Base, frozen=True, kw_only=True):
    """As JoinLinks, with a ``device`` that another plugin made and that stays when the tap goes.

    ``clsact``: it had none before, so that ours goes too if nobody else uses it.
    """

    device: str
    index: int
    tap: str
    clsact: bool
    sandbox: NetnsRef

    def inverse(self) -> PartLinks:
        """Takes our filter off the device; the tap's goes with the tap."""
        return PartLinks(device=self.device, index=self.index, clsact=self.clsact, sandbox=self.sandbox)

    def render(self) -> str:
        """``tc filter add``, twice."""
        return JoinLinks(device=self.device, tap=self.tap).render()


class PartLinks(Base, frozen=True, kw_only=True):
    """Leaves another plugin's device as it was, if it is still that one: no filter of ours, no clsact."""

    device: str
    index: int
    clsact: bool
    sandbox: NetnsRef

    def render(self) -> str:
        """``tc filter del``, and ``tc qdisc del`` of a clsact that we made."""
        delete = f"{inside('sandbox')}tc filter del dev {self.device} ingress bpf"
        made = f"; {inside('sandbox')}tc qdisc del dev {self.device} clsact" if self.clsact else ""
        return delete + made
