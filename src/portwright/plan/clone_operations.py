"""Operations on clones: ports whose guests all have the same addresses, told apart at their taps."""

from __future__ import annotations

from portwright.plan.operation import Base, inside


class JoinClone(Base, frozen=True, kw_only=True):
    """As JoinLinks, and what the guest has (``inner``) becomes what its port has on the way, and back.

    ``inner`` and ``addresses`` go by pairs, of one family each. The entry of ``index`` in the map of clones,
    which is the filters' class id, says so; it is the port's as long as its device is there.
    """

    port_id: str
    index: int
    device: str
    tap: str
    inner: tuple[str, ...]
    addresses: tuple[str, ...]

    def inverse(self) -> RemoveClone:
        """Removes the entry; the filters go with their devices."""
        return RemoveClone(port_id=self.port_id, index=self.index)

    def render(self) -> str:
        """The map's entry, and ``tc filter add`` twice."""
        pairs = ", ".join(f"{a} = {b}" for a, b in zip(self.inner, self.addresses, strict=True))
        add = f"{inside('sandbox')}tc filter add dev"
        filters = "; ".join(
            f"{add} {one} ingress bpf da object-file clone.bpf.o classid {self.index}"
            for one in (self.device, self.tap)
        )
        return f"bpftool map update name pw_clones key {self.index}  # {pairs}; {filters}"


class RemoveClone(Base, frozen=True, kw_only=True):
    """Removes the entry of a port from the map of clones; another port's under the number stays."""

    port_id: str
    index: int

    def render(self) -> str:
        """``bpftool map delete``."""
        return f"bpftool map delete name pw_clones key {self.index}"
