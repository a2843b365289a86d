"""The contract of ``port.migrate``: sandboxes leave a bridge while they run."""

from __future__ import annotations

import msgspec

from portwright.api.methods import Name, Step
from portwright.api.registry import Params, method
from portwright.model.port import Port


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """One bridge. ``ports``: the sandboxes that left it, or would. ``removed``: it is gone, or would be.

    ``plan``: of a dry run, what would be done for them, in order.
    """

    bridge: str
    ports: tuple[Port, ...]
    removed: bool
    plan: tuple[Step, ...] = ()


class Migrated(msgspec.Struct, frozen=True, kw_only=True):
    """Each bridge that a sandbox depended on, or the one that was named."""

    bridges: tuple[Moved, ...]


@method("port.migrate", Migrated)
class PortMigrateParams(Params[Migrated], frozen=True, kw_only=True):
    """Move the sandboxes of a bridge, or of all, off it while they run: each is a port then.

    ``network``: the one to join; None is the one whose ranges hold the addresses. ``addresses``: more of a
    sandbox's, by its MAC. ``remove_bridge``: and the bridge goes; with ``bridge`` also one without ports.
    ``forwarding_accepted``: chains that drop what is forwarded accept the sandboxes' packets by something
    else than the bridge's name.
    """

    bridge: Name | None = None
    network: Name | None = None
    addresses: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    remove_bridge: bool = False
    forwarding_accepted: bool = False
    dry_run: bool = False
