"""The attachment model ``tcfilter``: a veth whose end in the sandbox's namespace is joined with a tap.

For a hypervisor in a namespace that a container runtime made. The device there keeps its name, MAC and
addresses, as runtimes look at them; what arrives on it goes out on the tap, to the guest, and what the guest
sends leaves by it, to the representor. The namespace's own stack sees none of it. The guest's card has the
device's MAC, so the guard holds the guest to what is recorded of the port.
"""

from __future__ import annotations

from portwright.attach import clone, veth
from portwright.model.errors import InvalidInput, NotSupported
from portwright.model.port import Port
from portwright.plan.clone_operations import RemoveClone
from portwright.plan.operations import DeleteLink, NameLink, Operation
from portwright.plan.tap_operations import CreateTap, DeleteTap, JoinLinks

MODEL = "tcfilter"
#: What joins device and tap: our program; the same, but that what the guest sends goes past the device to its
#: other end; or for comparison the kernel's own filter and action.
BPF, PEER, MIRRED = "bpf", "peer", "mirred"


def judge_join(join: str, model: str, *, clone: bool) -> str:
    """How a port's device and tap are joined, '' for none. Raises InvalidInput, NotSupported; pure."""
    if join not in ("", BPF, PEER, MIRRED):
        raise InvalidInput("join", join, f"must be {BPF}, {PEER} or {MIRRED}")
    if join and model != MODEL:
        raise NotSupported(
            model, f"join {join}", f"it joins no device with a tap: use {MODEL}, or leave it out"
        )
    if join in (PEER, MIRRED) and clone:
        why = f"it rewrites no addresses, as inner addresses need: use {BPF}, or leave them out"
        raise NotSupported(model, f"join {join}", why)
    return join or (BPF if model == MODEL else "")


def attach(port: Port) -> tuple[Operation, ...]:
    """As ``veth.attach``; joined before either end is up, so that the namespace's stack hears nothing."""
    made = CreateTap(tap=port.tap, mac=port.mac, mtu=port.mtu, queues=port.queues, sandbox=port.sandbox)
    by = port.join or BPF
    joined = clone.join(port) if port.clone else JoinLinks(device=port.ifname, tap=port.tap, join=by)
    return behind(NameLink, veth.attach(port), made, joined)


def detach(port: Port) -> tuple[Operation, ...]:
    """As ``veth.detach``, and the tap goes."""
    gone: list[Operation] = [DeleteTap(tap=port.tap, sandbox=port.sandbox)]
    if port.clone:
        gone.append(RemoveClone(port_id=port.port_id, index=port.clone))
    return behind(DeleteLink, veth.detach(port), *gone)


def behind(kind: type[Operation], plan: tuple[Operation, ...], *more: Operation) -> tuple[Operation, ...]:
    """The plan, with more behind its one operation of a kind."""
    (place,) = (at for at, operation in enumerate(plan, 1) if isinstance(operation, kind))
    return (*plan[:place], *more, *plan[place:])
