"""A Firecracker guest's network, from an empty process to its restored clones.

Whatever can be known to be refused is refused here, by name and before anything is changed. The state is
asked of Firecracker each time, not remembered: another client may have changed it, and a lost answer leaves
it unknown. What it has is read from its own configuration (``GET /vm/config``).
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, Literal

from portwright.model.errors import Conflict, InvalidInput, NotFound, NotSupported
from portwright.model.port import Limits
from portwright.vmm.firecracker import nics
from portwright.vmm.firecracker.answers import Config, Instance, MmdsConfig, NetworkInterface, Version
from portwright.vmm.firecracker.api import (
    CreateSnapshot,
    DeleteNetworkInterface,
    GetConfig,
    GetInstance,
    GetMmds,
    GetVersion,
    PatchDrive,
    PatchMmds,
    PatchVm,
    PutAction,
    PutBootSource,
    PutDrive,
    PutMachineConfig,
    PutMmds,
    PutMmdsConfig,
    PutNetworkInterface,
    PutVsock,
)
from portwright.vmm.firecracker.capabilities import HYPERVISOR, parse, require, warnings
from portwright.vmm.firecracker.client import Client
from portwright.vmm.firecracker.errors import VmmState
from portwright.vmm.firecracker.limits import limits_of
from portwright.vmm.firecracker.nics import Nic, Restore
from portwright.vmm.firecracker.parts import RateLimiter

#: What only a guest that has not started takes, as it is.
BeforeBoot = PutMachineConfig | PutBootSource | PutDrive | PutVsock
#: Memory is written and read here: seconds, where all else takes milliseconds.
SNAPSHOT_TIMEOUT = 120.0


class GuestState(enum.StrEnum):
    """not started -> running <-> paused; a snapshot is loaded into "not started" and is paused then."""

    NOT_STARTED = "not started"
    RUNNING = "running"
    PAUSED = "paused"


class Driver:
    """One Firecracker process. Made by ``connect``; belongs to one event loop.

    Every method raises what ``Client.send`` does, VmmState where the guest's state does not allow it, and
    NotSupported for what this version has not.
    """

    def __init__(self, client: Client, version: str, *, pci: bool) -> None:
        self.client = client
        self.version = parse(version)
        self.pci = pci

    @classmethod
    async def connect(cls, socket: Path | str, *, pci: bool = False, seconds: float = 5.0) -> Driver:
        """The driver of the process that listens on ``socket``.

        ``pci``: it was started with --enable-pci, which its API doesn't tell. ``seconds``: for each request.
        Raises VmmUnavailable, and NotSupported where --enable-pci is newer than the process.
        """
        client = Client(socket, timeout=seconds)
        found = await client.ask(GetVersion(), Version)
        driver = cls(client, found.firecracker_version, pci=pci)
        if pci:
            driver._require("pci")
        return driver

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is known to be wrong with this release."""
        return warnings(self.version)

    async def state(self) -> GuestState:
        """What the guest is now."""
        return GuestState((await self.client.ask(GetInstance(), Instance)).state.lower())

    async def config(self) -> Config:
        """What the guest has now."""
        return await self.client.ask(GetConfig(), Config)

    async def configure(self, *requests: BeforeBoot) -> None:
        """Machine, kernel, drives and vsock, in the order given. Before boot."""
        for request in requests:
            request.check()
        await self._in(GuestState.NOT_STARTED, what=", ".join(request.line for request in requests))
        for request in requests:
            await self.client.send(request)

    async def swap_drive(self, request: PatchDrive) -> None:
        """Another file behind a disk. After boot."""
        request.check()
        await self._in(GuestState.RUNNING, GuestState.PAUSED, what=request.line)
        await self.client.send(request)

    async def add_nic(self, nic: Nic) -> None:
        """A NIC: before boot, or plugged into the running guest, which must then rescan its PCI bus.

        Before boot an id that is taken is replaced. Raises Conflict for an id or a MAC that another NIC of a
        running guest has.
        """
        request = nics.plug(nic, self.version)
        if await self.state() is GuestState.NOT_STARTED:
            await self._put_before_boot(request, mmds=nic.mmds)
            return
        if nic.mmds:
            self._require("hotplug-mmds")
        self._require("hotplug")
        for other in (await self.config()).network_interfaces:
            if other.iface_id == nic.iface_id:
                raise Conflict("NIC", nic.iface_id, "the guest has one of that id; remove it first")
            if nic.mac and (other.guest_mac or "").lower() == nic.mac.lower():
                raise Conflict("NIC", nic.iface_id, f"MAC {nic.mac} is {other.iface_id}'s")
        await self.client.send(request)

    async def remove_nic(self, iface_id: str) -> None:
        """Unplug a NIC that the guest has let go of already: Firecracker doesn't ask it. After boot."""
        self._require("unplug")
        request = DeleteNetworkInterface(iface_id=iface_id)
        request.check()
        await self._in(GuestState.RUNNING, GuestState.PAUSED, what=request.line)
        await self._nic(iface_id)
        await self.client.send(request)

    async def set_limits(self, iface_id: str, limits: Limits) -> None:
        """A NIC's limits, both directions, in any state. Buckets are full afterwards.

        Raises InexactLimit, with nothing changed, for a burst that has no bucket: see ``limits.fitted``.
        """
        request = nics.relimit(iface_id, limits)
        state = await self.state()
        found = await self._nic(iface_id)
        if state is not GuestState.NOT_STARTED:
            await self.client.send(request)
            return
        # PATCH is refused before boot; PUT replaces the NIC, so all of it is said again.
        again = PutNetworkInterface(
            iface_id=iface_id,
            host_dev_name=found.host_dev_name,
            guest_mac=found.guest_mac,
            mtu=found.mtu,
            rx_rate_limiter=_with_ops_of(found.rx_rate_limiter, request.rx_rate_limiter),
            tx_rate_limiter=_with_ops_of(found.tx_rate_limiter, request.tx_rate_limiter),
        )
        await self._put_before_boot(again, mmds=None)

    async def limits(self, iface_id: str) -> Limits:
        """The limits that a NIC has now. Raises InvalidInput for what ours can't say (see ``limits_of``)."""
        found = await self._nic(iface_id)
        return limits_of(found.rx_rate_limiter, found.tx_rate_limiter)

    async def set_mmds(
        self,
        iface_ids: tuple[str, ...],
        *,
        version: Literal["V1", "V2"] = "V2",
        address: str | None = None,
        imds_compat: bool = False,
    ) -> None:
        """Which NICs reach the metadata service: these and no others. Before boot.

        It is never to be trusted as the only guard of the host's 169.254.169.254: the port's policy is that.
        """
        if imds_compat:
            self._require("imds-compat")
        if not iface_ids:
            # vmm_config/mmds.rs refuses an empty list; a process that was never given one has it off.
            raise InvalidInput(
                "iface_ids", "", "names at least one NIC; the service is off until the first call"
            )
        request = PutMmdsConfig(
            network_interfaces=iface_ids,
            version=version,
            ipv4_address=address,
            imds_compat=imds_compat or None,
        )
        request.check()
        await self._in(GuestState.NOT_STARTED, what=request.line)
        found = await self.config()
        for iface_id in iface_ids:
            if found.nic(iface_id) is None:
                raise NotFound("NIC", iface_id)
        await self.client.send(request)

    async def put_metadata(self, contents: dict[str, Any]) -> None:
        """All of the metadata, in place of what is there. In any state."""
        await self.client.send(PutMmds(contents=contents))

    async def patch_metadata(self, changes: dict[str, Any]) -> None:
        """A merge patch of the metadata (RFC 7396): None takes a key away. In any state."""
        await self.client.send(PatchMmds(contents=changes))

    async def metadata(self) -> Any:
        """The metadata that is there."""
        return await self.client.send(GetMmds())

    async def boot(self) -> None:
        """Start the guest. Before boot, once."""
        await self._in(GuestState.NOT_STARTED, what="boot")
        await self.client.send(PutAction(action_type="InstanceStart"))

    async def pause(self) -> None:
        """Stop the CPUs. A guest that is paused stays so."""
        if await self._in(GuestState.RUNNING, GuestState.PAUSED, what="pause") is GuestState.RUNNING:
            await self.client.send(PatchVm(state="Paused"))

    async def resume(self) -> None:
        """Let the CPUs go on. A guest that runs stays so."""
        if await self._in(GuestState.RUNNING, GuestState.PAUSED, what="resume") is GuestState.PAUSED:
            await self.client.send(PatchVm(state="Resumed"))

    async def press_power(self) -> None:
        """Ctrl-Alt-Del, by which a guest shuts itself down. Running, x86 only."""
        await self._in(GuestState.RUNNING, what="Ctrl-Alt-Del")
        await self.client.send(PutAction(action_type="SendCtrlAltDel"))

    async def flush_metrics(self) -> None:
        """Write the metrics now. After boot."""
        await self._in(GuestState.RUNNING, GuestState.PAUSED, what="flushing metrics")
        await self.client.send(PutAction(action_type="FlushMetrics"))

    async def snapshot(self, request: CreateSnapshot) -> None:
        """Write a paused guest into two files, which stay Firecracker's to read while clones run."""
        await self._in(GuestState.PAUSED, what=request.line)
        await self.client.send(request, seconds=SNAPSHOT_TIMEOUT)

    async def restore(self, wanted: Restore) -> None:
        """Load a snapshot, give each NIC its new port's limits, and only then let it run.

        The snapshot's limits, of both directions of every NIC, are gone before the guest is resumed. Needs a
        process in which nothing is configured yet. If it fails after loading the guest is paused, and the
        process is of no use but to be ended; if it fails at loading, Firecracker ends itself. Raises Conflict
        where the snapshot's NICs are not those of ``wanted``: what isn't named would keep the origin's tap.
        """
        request = nics.load(wanted, self.version)
        patches = [nics.relimit(nic.iface_id, nic.limits) for nic in wanted.nics]
        await self._in(GuestState.NOT_STARTED, what=request.line)
        if _configured(await self.config()):
            raise VmmState(request.line, "configured already", "in a process in which nothing was configured")
        await self.client.send(request, seconds=SNAPSHOT_TIMEOUT)
        have = {nic.iface_id for nic in (await self.config()).network_interfaces}
        named = {nic.iface_id for nic in wanted.nics}
        if have != named:
            said = f"has NICs {_listed(have)}, not {_listed(named)}; the guest stays paused"
            raise Conflict("snapshot", wanted.snapshot_path, said)
        for patch in patches:
            await self.client.send(patch)
        if wanted.metadata is not None:
            await self.put_metadata(wanted.metadata)
        if wanted.resume:
            await self.client.send(PatchVm(state="Resumed"))

    async def _put_before_boot(self, request: PutNetworkInterface, *, mmds: bool | None) -> None:
        """Make or replace a NIC, and have it on the metadata service's list, or not; None: as before.

        A NIC that is replaced may lose the service, so the list is looked at again afterwards.
        """
        before = (await self.config()).mmds_config or MmdsConfig()
        had = request.iface_id in before.network_interfaces
        wanted = [iface_id for iface_id in before.network_interfaces if iface_id != request.iface_id]
        if mmds or (mmds is None and had):
            wanted.append(request.iface_id)
        if before.network_interfaces and not wanted:
            what = f"taking {request.iface_id}, the last NIC, off the metadata service"
            raise NotSupported(HYPERVISOR, what, "start another process, or leave it on")
        await self.client.send(request)
        after = (await self.config()).mmds_config or MmdsConfig()
        if set(after.network_interfaces) != set(wanted):
            fresh = not before.network_interfaces
            await self.client.send(
                PutMmdsConfig(
                    network_interfaces=tuple(wanted),
                    version="V2" if fresh else before.version,
                    ipv4_address=None if fresh else before.ipv4_address,
                    imds_compat=before.imds_compat or None,
                )
            )

    async def _nic(self, iface_id: str) -> NetworkInterface:
        found = (await self.config()).nic(iface_id)
        if found is None:
            raise NotFound("NIC", iface_id)
        return found

    async def _in(self, *states: GuestState, what: str) -> GuestState:
        """The state, which is one of these; VmmState otherwise."""
        found = await self.state()
        if found not in states:
            raise VmmState(what, found, " or ".join(states))
        return found

    def _require(self, feature: str) -> None:
        require(feature, self.version, pci=self.pci)


def _with_ops_of(found: RateLimiter | None, wanted: RateLimiter | None) -> RateLimiter:
    """``wanted`` with what somebody else set for operations, which is not ours to take away."""
    bandwidth = wanted.bandwidth if wanted is not None else None
    return RateLimiter(bandwidth=bandwidth, ops=found.ops if found is not None else None)


def _configured(config: Config) -> bool:
    return bool(
        config.network_interfaces
        or config.drives
        or config.vsock
        or config.mmds_config
        or config.boot_source.get("kernel_image_path")
    )


def _listed(ids: set[str]) -> str:
    return ", ".join(sorted(ids)) or "none"
