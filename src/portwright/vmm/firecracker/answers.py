"""What Firecracker answers, as far as we read it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from portwright.vmm.firecracker.parts import Part, RateLimiter

State = Literal["Not started", "Running", "Paused"]


class Version(Part, frozen=True, kw_only=True):
    """The answer to GET /version."""

    firecracker_version: str


class Instance(Part, frozen=True, kw_only=True):
    """The answer to GET /."""

    id: str
    state: State
    vmm_version: str


class NetworkInterface(Part, frozen=True, kw_only=True):
    """A NIC as Firecracker has it."""

    iface_id: str
    host_dev_name: str
    guest_mac: str | None = None
    mtu: int | None = None
    rx_rate_limiter: RateLimiter | None = None
    tx_rate_limiter: RateLimiter | None = None


class MmdsConfig(Part, frozen=True, kw_only=True):
    """Which NICs reach the metadata service."""

    network_interfaces: tuple[str, ...] = ()
    version: Literal["V1", "V2"] = "V1"
    ipv4_address: str = "169.254.169.254"
    imds_compat: bool = False


class Vsock(Part, frozen=True, kw_only=True):
    """The vsock device."""

    guest_cid: int
    uds_path: str


class Config(Part, frozen=True, kw_only=True, rename="kebab"):
    """The answer to GET /vm/config, of which we read what is about networks, and whether it is bare."""

    network_interfaces: tuple[NetworkInterface, ...] = ()
    mmds_config: MmdsConfig | None = None
    vsock: Vsock | None = None
    drives: tuple[dict[str, Any], ...] = ()
    boot_source: dict[str, Any] = msgspec.field(default_factory=dict)

    def nic(self, iface_id: str) -> NetworkInterface | None:
        """The NIC of that id."""
        return next((nic for nic in self.network_interfaces if nic.iface_id == iface_id), None)
