"""The NICs that a guest is to have, and the requests that give it those."""

from __future__ import annotations

from typing import Any

import msgspec

from portwright.model.errors import InvalidInput
from portwright.model.port import Limits
from portwright.vmm.firecracker.api import LoadSnapshot, PatchNetworkInterface, PutNetworkInterface
from portwright.vmm.firecracker.capabilities import Version, require
from portwright.vmm.firecracker.limits import limiters
from portwright.vmm.firecracker.parts import MemoryBackend, NetworkOverride, VsockOverride


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC on a port's tap. ``mac``, ``mtu``: the port's; '' and 0 leave them to Firecracker and the guest.

    ``queues``, ``fds``, ``vhost`` and ``backend`` are what other hypervisors take: each is refused by name.
    """

    iface_id: str
    tap: str
    mac: str = ""
    mtu: int = 0
    limits: Limits = Limits()
    mmds: bool = False
    queues: int = 1
    fds: tuple[int, ...] = ()
    vhost: bool = False
    backend: str = "tap"


class RestoredNic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC of a snapshot on its new port. ``tap`` '' keeps the name that the snapshot has."""

    iface_id: str
    tap: str = ""
    limits: Limits = Limits()


class Restore(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot to load. ``nics`` names every NIC that it has; ``vsock_path`` '' keeps the snapshot's.

    ``metadata`` is the clone's own: a snapshot has none. ``resume``: whether the guest runs on at once.
    """

    snapshot_path: str
    memory: MemoryBackend
    nics: tuple[RestoredNic, ...] = ()
    vsock_path: str = ""
    metadata: dict[str, Any] | None = None
    resume: bool = True
    track_dirty_pages: bool = False
    clock_realtime: bool = False


def plug(nic: Nic, version: Version) -> PutNetworkInterface:
    """The request for a NIC.

    Raises NotSupported for what no version or only a newer one has, InvalidInput and InexactLimit.
    """
    kinds = {"macvtap": "macvtap", "vhost": "vhost", "vhost-user": "vhost-user"}
    if nic.backend in kinds:
        require(kinds[nic.backend], version, pci=False)
    if nic.backend != "tap":
        raise InvalidInput("nic.backend", nic.backend, "is tap")
    if nic.queues < 1:
        raise InvalidInput("nic.queues", nic.queues, "is 1")
    for asked, feature in (
        (nic.queues > 1, "multi-queue"),
        (bool(nic.fds), "fd-passing"),
        (nic.vhost, "vhost"),
        (bool(nic.mtu), "mtu"),
    ):
        if asked:
            require(feature, version, pci=False)
    rx, tx = limiters(nic.limits)
    request = PutNetworkInterface(
        iface_id=nic.iface_id,
        host_dev_name=nic.tap,
        guest_mac=nic.mac or None,
        mtu=nic.mtu or None,
        rx_rate_limiter=rx if nic.limits.ingress_rate else None,
        tx_rate_limiter=tx if nic.limits.egress_rate else None,
    )
    request.check()
    return request


def relimit(iface_id: str, limits: Limits) -> PatchNetworkInterface:
    """The request for other limits: of both directions, since PATCH leaves alone what it doesn't name."""
    rx, tx = limiters(limits)
    request = PatchNetworkInterface(iface_id=iface_id, rx_rate_limiter=rx, tx_rate_limiter=tx)
    request.check()
    return request


def load(wanted: Restore, version: Version) -> LoadSnapshot:
    """The request that loads a snapshot and leaves the guest paused: its limits are not ours yet."""
    for asked, feature in (
        (any(nic.tap for nic in wanted.nics), "network-overrides"),
        (bool(wanted.vsock_path), "vsock-override"),
        (wanted.clock_realtime, "clock-realtime"),
    ):
        if asked:
            require(feature, version, pci=False)
    overrides = tuple(
        NetworkOverride(iface_id=nic.iface_id, host_dev_name=nic.tap) for nic in wanted.nics if nic.tap
    )
    request = LoadSnapshot(
        snapshot_path=wanted.snapshot_path,
        mem_backend=wanted.memory,
        track_dirty_pages=wanted.track_dirty_pages or None,
        resume_vm=False,
        network_overrides=overrides or None,
        vsock_override=VsockOverride(uds_path=wanted.vsock_path) if wanted.vsock_path else None,
        clock_realtime=wanted.clock_realtime or None,
    )
    request.check()
    return request
