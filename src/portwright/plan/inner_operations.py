"""Operations on a bridge in a sandbox's namespace that joins its device with a guest's tap (Kata 1.x)."""

from __future__ import annotations

from portwright.model.port import InnerBridge, NetnsRef
from portwright.plan.operation import Base, inside


class BypassBridge(Base, frozen=True, kw_only=True):
    """Joins device and tap past their bridge, which sees nothing of them from here on."""

    inner: InnerBridge
    sandbox: NetnsRef

    def inverse(self) -> UseBridge:
        """Takes our filters off both."""
        return UseBridge(inner=self.inner, sandbox=self.sandbox)

    def render(self) -> str:
        """``tc filter add``, twice."""
        ways = ((self.inner.device, self.inner.tap), (self.inner.tap, self.inner.device))
        add = f"{inside('sandbox')}tc filter add dev"
        return "; ".join(
            f"{add} {one} ingress bpf da object-file join.bpf.o classid {to}" for one, to in ways
        )


class UseBridge(Base, frozen=True, kw_only=True):
    """Takes our filters off device and tap; nothing where they, or the namespace, are gone."""

    inner: InnerBridge
    sandbox: NetnsRef

    def render(self) -> str:
        """``tc filter del``, twice."""
        delete = f"{inside('sandbox')}tc filter del dev"
        return "; ".join(f"{delete} {one} ingress bpf" for one in (self.inner.device, self.inner.tap))


class DropBridge(Base, frozen=True, kw_only=True):
    """Deletes the bridge, of which both ports are joined past it."""

    inner: InnerBridge
    sandbox: NetnsRef

    def inverse(self) -> MakeBridge:
        """Makes it again."""
        return MakeBridge(inner=self.inner, sandbox=self.sandbox)

    def render(self) -> str:
        """``ip link delete``."""
        return f"{inside('sandbox')}ip link delete {self.inner.bridge}"


class MakeBridge(Base, frozen=True, kw_only=True):
    """Makes the bridge again as Kata does, if it is gone: its MAC, both ports, no snooping, up."""

    inner: InnerBridge
    sandbox: NetnsRef

    def render(self) -> str:
        """``ip link add``, and its ports."""
        begin, inner = inside("sandbox"), self.inner
        made = f"{begin}ip link add {inner.bridge} address {inner.bridge_mac} type bridge mcast_snooping 0"
        ports = "; ".join(
            f"{begin}ip link set {one} master {inner.bridge}" for one in (inner.device, inner.tap)
        )
        return f"{made}; {ports}; {begin}ip link set {inner.bridge} up"
