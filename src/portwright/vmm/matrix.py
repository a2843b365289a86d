"""What each hypervisor can do with a port, by its model: as data, and as the refusal that names the way out.

Firecracker's rows that depend on its version are its driver's own (firecracker/capabilities.py).
``python -m portwright.vmm.matrix`` prints docs/support-matrix.md.
"""

from __future__ import annotations

import sys
from typing import Final, Literal, NamedTuple, TypeAlias

from portwright.model.errors import NotSupported
from portwright.vmm.firecracker.capabilities import FEATURES, Feature

Vmm: TypeAlias = Literal["qemu", "firecracker"]

VMMS: Final[dict[Vmm, str]] = {"qemu": "QEMU", "firecracker": "Firecracker"}
MODELS: Final = ("tcfilter", "macvtap", "tap")


class Cell(NamedTuple):
    """Whether it can be had. ``since``: from this on, '' for always, None for never; ``instead``: else what.

    ``models``: the models for which that holds; with others it is as with ``since`` None.
    """

    since: str | None = ""
    instead: str = ""
    models: tuple[str, ...] = MODELS


class Row(NamedTuple):
    """A feature, and each hypervisor's cell: that of Firecracker may be one of its driver's own rows."""

    title: str
    qemu: Cell
    firecracker: Cell | str


_YES: Final = Cell()
_NAMED_TAP: Final = "use --model tcfilter, whose tap it opens by name in its own namespace"

#: By model: whether a hypervisor runs on such a port at all.
ON: Final[dict[str, dict[Vmm, Cell]]] = {
    "tcfilter": {"qemu": _YES, "firecracker": _YES},
    "macvtap": {"qemu": _YES, "firecracker": Cell(None, f"it takes no descriptor: {_NAMED_TAP}")},
    "tap": {"qemu": _YES, "firecracker": Cell(None, f"that tap is in the host's namespace: {_NAMED_TAP}")},
}

#: By what `vm run` and the commands on a running guest can be asked for.
ROWS: Final[dict[str, Row]] = {
    "kvm": Row("CPUs by KVM", _YES, _YES),
    "tcg": Row("CPUs in software", _YES, Cell(None, "leave --accel out, or use --vmm qemu")),
    "mtu": Row("the port's MTU told to the guest", _YES, "mtu"),
    "multi-queue": Row("several queues", _YES, "multi-queue"),
    "vhost": Row("vhost-net", _YES, Cell(None, "leave --vhost out: it carries the packets itself")),
    "fd-passing": Row("the tap as a descriptor", _YES, Cell(None, "it opens the tap by name")),
    "link-state": Row("the port's link shown to the guest", _YES, "link-state"),
    "limits": Row("the port's limits in the hypervisor too", Cell(None, "the port's own hold"), "limits"),
    "plug": Row("NICs while it runs (`vm plug`, `vm unplug`)", _YES, "hotplug"),
    "freeze": Row(
        "`vm freeze`, `vm run --incoming`",
        Cell(instead="use --model tcfilter", models=("tcfilter",)),
        Cell(None, "use --vmm qemu, or the driver's snapshots from Python (docs/firecracker.md)"),
    ),
    "jail": Row("`vm run --jail`", _YES, Cell(None, "leave the jail's options out, or use --vmm qemu")),
    "netns": Row("`vm run --netns`", _YES, Cell(None, "leave --netns out, or use --vmm qemu")),
    "metadata": Row("the metadata service (driver)", Cell(None, "use the kernel's command line"), "mmds"),
    "vsock": Row("vsock (driver)", Cell(None, "use the port"), "vsock"),
}


def cell(name: str, vmm: Vmm, model: str) -> Cell:
    """What holds for that feature on a port of that model."""
    on = ON[model][vmm]
    if on.since is None:
        return on
    found = ROWS[name].qemu if vmm == "qemu" else ROWS[name].firecracker
    if isinstance(found, str):
        found = _of(FEATURES[found])
    return found if model in found.models else Cell(None, found.instead)


def require_model(vmm: Vmm, model: str) -> None:
    """Raise NotSupported for a model on whose ports it can't run a guest."""
    if (on := ON[model][vmm]).since is None:
        raise NotSupported(vmm, f"ports of model {model}", on.instead)


def require(name: str, vmm: Vmm, model: str) -> None:
    """Raise NotSupported for what no version of it can do; the others are for its driver to tell."""
    require_model(vmm, model)
    if (found := cell(name, vmm, model)).since is None:
        raise NotSupported(vmm, ROWS[name].title.replace("`", ""), found.instead)


def page() -> str:
    """docs/support-matrix.md."""
    columns = [(vmm, model) for vmm in VMMS for model in MODELS if ON[model][vmm].since is not None]
    lines = [
        "# What works with which hypervisor",
        "",
        "Made by `python -m portwright.vmm.matrix` from the data by which commands refuse what can't be had.",
        "",
        "## Models",
        "",
        f"| model | {' | '.join(VMMS.values())} |",
        "|---|" + "---|" * len(VMMS),
        *(f"| `{model}` | {' | '.join(_said(ON[model][vmm]) for vmm in VMMS)} |" for model in MODELS),
        "",
        "## Features",
        "",
        f"| | {' | '.join(f'{VMMS[vmm]}, {model}' for vmm, model in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for name, row in ROWS.items():
        cells = (_said(cell(name, vmm, model)) for vmm, model in columns)
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    lines += [
        "",
        "`vm run` starts Firecracker without --enable-pci, so its guests keep the NICs that they started",
        "with. What its driver for Python has besides, by version, is in docs/firecracker.md.",
        "",
    ]
    return "\n".join(lines)


def _of(feature: Feature) -> Cell:
    """A row of Firecracker's own, of ports that it runs on at all."""
    if feature.since is None:
        return Cell(None, feature.instead)
    since = str(feature.since) if feature.since.major else ""
    return Cell(since + (", with --enable-pci" if feature.pci else ""), feature.instead)


def _said(found: Cell) -> str:
    if found.since is None:
        return f"no: {found.instead}"
    otherwise = f"; else {found.instead}" if found.since and found.instead else ""
    return f"since {found.since}{otherwise}" if found.since else "yes"


if __name__ == "__main__":
    sys.stdout.write(page())
