"""Where Firecracker's published API description and its code differ, as data, and what we make of it.

``firecracker.yaml`` is kept as it was published. A change here names the file of Firecracker that it was read
from; a new release's description is compared with this list before it replaces the old one.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Erratum(NamedTuple):
    """One difference. ``value`` is what belongs at the place ``where`` of the description."""

    where: tuple[str, ...]
    value: Any
    why: str


def _delete(kind: str, parameter: str) -> Erratum:
    operation = {
        "summary": f"Removes a {kind}. Post-boot, with --enable-pci, since 1.16. A body is refused.",
        "parameters": [{"name": parameter, "in": "path", "required": True, "type": "string"}],
        "responses": {
            204: {"description": "Removed"},
            400: {"description": "Refused", "schema": {"$ref": "#/definitions/Error"}},
            "default": {"description": "Internal server error", "schema": {"$ref": "#/definitions/Error"}},
        },
    }
    path = {"drive": "/drives/{drive_id}", "pmem": "/pmem/{id}"}.get(kind, "/network-interfaces/{iface_id}")
    return Erratum(
        ("paths", path, "delete"), operation, "api_server/parsed_request.rs routes it; the file has no delete"
    )


def _hotplug(path: str, thing: str) -> Erratum:
    return Erratum(
        ("paths", path, "put", "summary"),
        f"Creates a {thing}. Pre-boot; post-boot with --enable-pci, since 1.16.",
        "docs/device-hotplug.md; the file says 'Pre-boot only'",
    )


_LINK_LOCAL = (
    r"^169\.254\.([1-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-4])"
    r"\.([0-9]|[1-9][0-9]|1[0-9][0-9]|2[0-4][0-9]|25[0-5])$"
)

ERRATA: tuple[Erratum, ...] = (
    _delete("drive", "drive_id"),
    _delete("pmem", "id"),
    _delete("network interface", "iface_id"),
    _hotplug("/drives/{drive_id}", "drive"),
    _hotplug("/pmem/{id}", "pmem device"),
    _hotplug("/network-interfaces/{iface_id}", "network interface"),
    Erratum(
        ("definitions", "TokenBucket", "properties", "one_time_burst", "description"),
        "Credit on top of size that is used first and never comes back.",
        "rate_limiter/mod.rs; the file calls it the initial size",
    ),
    Erratum(
        ("definitions", "MmdsConfig", "properties", "ipv4_address", "pattern"),
        _LINK_LOCAL,
        "the file puts this expression into 'format', where no validator looks for one",
    ),
    Erratum(
        ("definitions", "NetworkInterface", "properties", "host_dev_name", "maxLength"),
        15,
        "devices/virtio/net/tap.rs: IFNAMSIZ; the file calls it a path",
    ),
    Erratum(
        ("definitions", "NetworkOverride", "properties", "host_dev_name", "maxLength"),
        15,
        "devices/virtio/net/tap.rs: IFNAMSIZ",
    ),
)
