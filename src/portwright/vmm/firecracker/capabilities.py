"""What Firecracker can do, by its version: the matrix as data, and the refusal that names the way out.

Versions are of Firecracker's CHANGELOG and code. "Never" is what its design leaves out: no version has it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from portwright.model.errors import InvalidInput, NotSupported

HYPERVISOR = "firecracker"


class Version(NamedTuple):
    """A release, or what is on its way to it (``1.17.0-dev`` is 1.17.0)."""

    major: int
    minor: int
    patch: int = 0

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + (f".{self.patch}" if self.patch else "")


class Feature(NamedTuple):
    """One row. ``since`` None: no version has it. ``pci``: the process must run with --enable-pci."""

    title: str
    since: Version | None
    pci: bool = False
    instead: str = ""
    """What to use where it can't be had."""


_ALL = Version(0, 0)
_NAMED_TAP = "give it a named, single-queue tap (model tcfilter)"

FEATURES: dict[str, Feature] = {
    "nic": Feature("NICs on named taps, before boot", _ALL),
    "limits": Feature("limits of a NIC, changed while it runs", _ALL),
    "mmds": Feature("the metadata service, switched per NIC before boot", _ALL),
    "vsock": Feature("a vsock device, before boot", _ALL),
    "pause": Feature("pause and resume", _ALL),
    "snapshot": Feature("snapshot and restore", _ALL),
    "nic-mrg-rxbuf": Feature("mergeable receive buffers", Version(1, 10)),
    "network-overrides": Feature(
        "other taps at restore", Version(1, 12), instead="restore onto a tap of the same name"
    ),
    "pci": Feature("virtio over PCI", Version(1, 13)),
    "imds-compat": Feature("the metadata service's answers as EC2's", Version(1, 14)),
    "mtu": Feature("an MTU that the guest is told", Version(1, 16), instead="set the MTU inside the guest"),
    "hotplug": Feature(
        "NICs plugged in while it runs",
        Version(1, 16),
        pci=True,
        instead="put NICs on parked taps before boot",
    ),
    "unplug": Feature(
        "NICs taken out while it runs",
        Version(1, 16),
        pci=True,
        instead="set the port down with `port set --admin down`",
    ),
    "vsock-override": Feature(
        "another vsock path at restore", Version(1, 16), instead="restore in a jail of its own"
    ),
    "clock-realtime": Feature(
        "the guest's clock set at restore", Version(1, 16), instead="set it inside the guest"
    ),
    "hotplug-mmds": Feature(
        "the metadata service on a NIC that was plugged in",
        None,
        instead="switch it on for a NIC before boot",
    ),
    "multi-queue": Feature("taps with several queues", None, instead="use one queue"),
    "fd-passing": Feature("taps handed over as descriptors", None, instead=_NAMED_TAP),
    "macvtap": Feature("macvtap", None, instead=_NAMED_TAP),
    "vhost": Feature("vhost-net", None, instead=_NAMED_TAP),
    "vhost-user": Feature("vhost-user NICs", None, instead=_NAMED_TAP),
    "link-state": Feature("telling the guest that its link is down", None, instead="the port drops instead"),
    "announce": Feature("the guest announcing itself after restore", None, instead="the host announces it"),
    "nic-change": Feature(
        "another MAC, MTU or tap while it runs", None, instead="restore, or plug another NIC"
    ),
}

#: Releases that are known to be bad, from the first to the last of them: what a caller is warned of.
KNOWN_BAD: tuple[tuple[Version, Version, str], ...] = (
    (Version(1, 0), Version(1, 9, 0), "restore does not re-apply a tap's offloads (PR #4826)"),
    (Version(1, 9, 1), Version(1, 9, 1), "vsock connections are not reset after restore (#4796)"),
    (Version(1, 16, 0), Version(1, 16, 0), "vsock can hang for good after restore (#5958)"),
)


def parse(text: str) -> Version:
    """The version that Firecracker names. Raises InvalidInput for what is none."""
    found = re.match(r"v?(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?(?=$|[-+])", text)
    if found is None:
        raise InvalidInput("firecracker_version", text, "is not a version (1.16.1)")
    return Version(int(found[1]), int(found[2]), int(found[3] or 0))


def missing(name: str, version: Version, *, pci: bool) -> str:
    """Why this Firecracker has not that feature; '' if it has."""
    feature = FEATURES[name]
    if feature.since is None:
        return "no version of Firecracker has it"
    if version < feature.since or (feature.pci and not pci):
        flag = " started with --enable-pci" if feature.pci else ""
        have = f"{version}{'' if pci or not feature.pci else ' without it'}"
        return f"needs Firecracker {feature.since} or newer{flag}; this is {have}"
    return ""


def require(name: str, version: Version, *, pci: bool) -> None:
    """Raise NotSupported, with the version needed and what to use instead, for what is not there."""
    why = missing(name, version, pci=pci)
    if why:
        feature = FEATURES[name]
        raise NotSupported(HYPERVISOR, feature.title, f"{why}; {feature.instead}" if feature.instead else why)


def table() -> str:
    """The matrix as the table of docs/firecracker.md."""
    rows = ["| feature | since | otherwise |", "|---|---|---|"]
    for feature in FEATURES.values():
        since = "never" if feature.since is None else "any" if feature.since == _ALL else str(feature.since)
        flag = ", with --enable-pci" if feature.pci else ""
        rows.append(f"| {feature.title} | {since}{flag} | {feature.instead} |")
    return "\n".join(rows)


def warnings(version: Version) -> tuple[str, ...]:
    """What is known to be wrong with this release."""
    return tuple(why for first, last, why in KNOWN_BAD if first <= version <= last)
