"""Firecracker's requests as values: what is sent, and where.

Names and shapes are those of the API description (``firecracker.yaml``), against which
:mod:`portwright.vmm.firecracker.description` holds every request and answer. What the description can't say,
the length of a device's name for one, ``check`` says here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, ClassVar, Literal

import msgspec

from portwright.model.errors import InvalidInput
from portwright.vmm.firecracker.parts import (
    MemoryBackend,
    NetworkOverride,
    RateLimiter,
    VsockOverride,
    check_id,
    check_socket,
    check_tap,
)

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_IN_PATH = re.compile(r"\{(\w+)\}")
_LINK_LOCAL = ipaddress.ip_network("169.254.0.0/16")


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request. Its fields are the body's; a field that TEMPLATE names is put into the path too."""

    METHOD: ClassVar[Literal["GET", "PUT", "PATCH", "DELETE"]]
    TEMPLATE: ClassVar[str]

    @property
    def path(self) -> str:
        """The path, with what the template names filled in."""
        return _IN_PATH.sub(lambda found: str(getattr(self, found[1])), self.TEMPLATE)

    @property
    def body(self) -> Any:
        """What is sent as JSON; None for GET and DELETE (a DELETE with a body is refused)."""
        if self.METHOD in {"GET", "DELETE"}:
            return None
        return msgspec.json.decode(msgspec.json.encode(self))  # to_builtins would leave tuples

    @property
    def line(self) -> str:
        """How errors name the request: ``PUT /network-interfaces/eth0``."""
        return f"{self.METHOD} {self.path}"

    def check(self) -> None:
        """Raise InvalidInput for what the description allows and Firecracker, or the kernel, does not.

        Of every request: the ids in its path.
        """
        for name in _IN_PATH.findall(self.TEMPLATE):
            check_id(name, getattr(self, name))


class GetVersion(Request, frozen=True, kw_only=True):
    """Answered by Version, in any state."""

    METHOD, TEMPLATE = "GET", "/version"


class GetInstance(Request, frozen=True, kw_only=True):
    """Answered by Instance, in any state."""

    METHOD, TEMPLATE = "GET", "/"


class GetConfig(Request, frozen=True, kw_only=True):
    """Answered by Config, in any state: what is there is read here, not remembered."""

    METHOD, TEMPLATE = "GET", "/vm/config"


class PutNetworkInterface(Request, frozen=True, kw_only=True):
    """A NIC on a named, single-queue tap. Before boot; after it a hotplug."""

    METHOD, TEMPLATE = "PUT", "/network-interfaces/{iface_id}"

    iface_id: str
    host_dev_name: str
    guest_mac: str | None = None
    mtu: int | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None

    def check(self) -> None:
        """And the tap's name and the MAC."""
        super().check()
        check_tap("host_dev_name", self.host_dev_name)
        if self.guest_mac is not None and (
            not _MAC.fullmatch(self.guest_mac) or int(self.guest_mac[:2], 16) & 1
        ):
            raise InvalidInput("guest_mac", self.guest_mac, "is a unicast MAC: six bytes in hex with colons")


class PatchNetworkInterface(Request, frozen=True, kw_only=True):
    """Other limits, after boot. MAC, MTU and tap can't be changed."""

    METHOD, TEMPLATE = "PATCH", "/network-interfaces/{iface_id}"

    iface_id: str
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


class DeleteNetworkInterface(Request, frozen=True, kw_only=True):
    """Unplug. The guest must have let go of the device; Firecracker does not ask it."""

    METHOD, TEMPLATE = "DELETE", "/network-interfaces/{iface_id}"

    iface_id: str


class PutMmdsConfig(Request, frozen=True, kw_only=True):
    """Which NICs reach the metadata service, all of them. Before boot only; they must be there."""

    METHOD, TEMPLATE = "PUT", "/mmds/config"

    network_interfaces: tuple[str, ...]
    version: Literal["V1", "V2"] | None = None
    ipv4_address: str | None = None
    imds_compat: bool | None = None

    def check(self) -> None:
        """The NICs' ids and the address."""
        for index, iface_id in enumerate(self.network_interfaces):
            check_id(f"network_interfaces[{index}]", iface_id)
        if self.ipv4_address is not None:
            try:
                fits = ipaddress.IPv4Address(self.ipv4_address) in _LINK_LOCAL
            except ValueError:
                fits = False
            if not fits:
                raise InvalidInput("ipv4_address", self.ipv4_address, "is an address of 169.254.0.0/16")


class PutMmds(Request, frozen=True, kw_only=True):
    """All of the metadata, in place of what is there."""

    METHOD, TEMPLATE = "PUT", "/mmds"

    contents: dict[str, Any]

    @property
    def body(self) -> Any:
        """The contents themselves."""
        return self.contents


class PatchMmds(Request, frozen=True, kw_only=True):
    """A merge patch of the metadata (RFC 7396): null takes a key away."""

    METHOD, TEMPLATE = "PATCH", "/mmds"

    contents: dict[str, Any]

    @property
    def body(self) -> Any:
        """The patch itself."""
        return self.contents


class GetMmds(Request, frozen=True, kw_only=True):
    """The metadata as JSON."""

    METHOD, TEMPLATE = "GET", "/mmds"


class PutVsock(Request, frozen=True, kw_only=True):
    """The one vsock device, before boot. Its CID need not be unique on the host."""

    METHOD, TEMPLATE = "PUT", "/vsock"

    guest_cid: int
    uds_path: str

    def check(self) -> None:
        """The path."""
        check_socket("uds_path", self.uds_path)


class PutMachineConfig(Request, frozen=True, kw_only=True):
    """CPUs and memory, before boot. What is not given goes back to its default."""

    METHOD, TEMPLATE = "PUT", "/machine-config"

    vcpu_count: int
    mem_size_mib: int
    smt: bool | None = None
    track_dirty_pages: bool | None = None
    huge_pages: Literal["None", "2M"] | None = None

    def check(self) -> None:
        """What only sentences of the description say."""
        if self.mem_size_mib < 1:
            raise InvalidInput("mem_size_mib", self.mem_size_mib, "must be at least 1")
        if self.smt and self.vcpu_count > 1 and self.vcpu_count % 2:
            raise InvalidInput("vcpu_count", self.vcpu_count, "is 1 or even with smt")
        if self.huge_pages == "2M" and self.mem_size_mib % 2:
            raise InvalidInput("mem_size_mib", self.mem_size_mib, "is even with pages of 2M")


class PutBootSource(Request, frozen=True, kw_only=True):
    """The kernel, before boot."""

    METHOD, TEMPLATE = "PUT", "/boot-source"

    kernel_image_path: str
    initrd_path: str | None = None
    boot_args: str | None = None


class PutDrive(Request, frozen=True, kw_only=True):
    """A disk backed by a file, before boot."""

    METHOD, TEMPLATE = "PUT", "/drives/{drive_id}"

    drive_id: str
    is_root_device: bool
    path_on_host: str
    is_read_only: bool
    partuuid: str | None = None
    cache_type: Literal["Unsafe", "Writeback"] | None = None
    rate_limiter: RateLimiter | None = None
    io_engine: Literal["Sync", "Async"] | None = None


class PatchDrive(Request, frozen=True, kw_only=True):
    """Another file behind a disk, after boot."""

    METHOD, TEMPLATE = "PATCH", "/drives/{drive_id}"

    drive_id: str
    path_on_host: str | None = None
    rate_limiter: RateLimiter | None = None


class PutAction(Request, frozen=True, kw_only=True):
    """Boot, write the metrics now, or press Ctrl-Alt-Del."""

    METHOD, TEMPLATE = "PUT", "/actions"

    action_type: Literal["InstanceStart", "FlushMetrics", "SendCtrlAltDel"]


class PatchVm(Request, frozen=True, kw_only=True):
    """Pause or resume."""

    METHOD, TEMPLATE = "PATCH", "/vm"

    state: Literal["Paused", "Resumed"]


class CreateSnapshot(Request, frozen=True, kw_only=True):
    """Of a paused guest, into two files."""

    METHOD, TEMPLATE = "PUT", "/snapshot/create"

    snapshot_path: str
    mem_file_path: str
    snapshot_type: Literal["Full", "Diff"] | None = None


class LoadSnapshot(Request, frozen=True, kw_only=True):
    """Into a fresh process. Whatever goes wrong in it ends the process."""

    METHOD, TEMPLATE = "PUT", "/snapshot/load"

    snapshot_path: str
    mem_backend: MemoryBackend
    track_dirty_pages: bool | None = None
    resume_vm: bool | None = None
    network_overrides: tuple[NetworkOverride, ...] | None = None
    vsock_override: VsockOverride | None = None
    clock_realtime: bool | None = None

    def check(self) -> None:
        """Names and paths; one tap serves one NIC."""
        taps: set[str] = set()
        ids: set[str] = set()
        for index, override in enumerate(self.network_overrides or ()):
            where = f"network_overrides[{index}]"
            check_id(f"{where}.iface_id", override.iface_id)
            check_tap(f"{where}.host_dev_name", override.host_dev_name)
            if override.host_dev_name in taps:
                raise InvalidInput(f"{where}.host_dev_name", override.host_dev_name, "serves another NIC")
            if override.iface_id in ids:
                raise InvalidInput(f"{where}.iface_id", override.iface_id, "is named twice")
            taps.add(override.host_dev_name)
            ids.add(override.iface_id)
        if self.vsock_override is not None:
            check_socket("vsock_override.uds_path", self.vsock_override.uds_path)
