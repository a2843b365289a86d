"""The contract's part about policy: manifests in, what is in force out."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from portwright.api.registry import Params, method

FileName = Annotated[str, Meta(min_length=1, max_length=4096, description="as the user knows the file")]


class PolicyFile(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest file: YAML or JSON, as written for clusters."""

    name: FileName
    text: str


class PolicyWarning(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says that was hardly meant: ``where`` is file:line, ``fix`` the exact remedy."""

    code: str
    where: str
    text: str
    fix: str


class PolicyChange(msgspec.Struct, frozen=True, kw_only=True):
    """Connections that become allowed, or denied: from each of these to each of these, but none to itself.

    An endpoint is ``namespace/name``; else it is a net, less what has a row of its own, or "any other
    address". ``services`` are texts (``tcp 80``), ``families`` IP versions, ``pairs`` how many ordered pairs
    that is, ``before`` and ``after`` what decides, with file and line. ``more_from`` and ``more_to``: how
    many are not named. The host is ``host/`` and its endpoint's name. ``via``: the host endpoint by whose
    interfaces it is routed; '' by all that have no policy of forwarded traffic.
    """

    sources: tuple[str, ...] = msgspec.field(name="from")
    targets: tuple[str, ...] = msgspec.field(name="to")
    services: tuple[str, ...]
    families: tuple[int, ...]
    allowed: bool
    before: str
    after: str
    pairs: int
    more_from: int = 0
    more_to: int = 0
    via: str = ""


class PolicyChanges(msgspec.Struct, frozen=True, kw_only=True):
    """Which pairs change. ``more_rows`` rows of ``more_pairs`` pairs were left off.

    ``counted`` is false where there are still more, which nobody counted.
    """

    rows: tuple[PolicyChange, ...] = ()
    more_rows: int = 0
    more_pairs: int = 0
    counted: bool = True


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force, or would be: files, policies, and the number of entries of each table.

    ``folder``: the watched folder, '' if there is none; ``behind``: why what it says is not in force, '' if
    it is. Both of ``policy.list`` alone. ``staged``: those of the policies that are dry runs, and in no
    table. ``changes``: of a dry run alone. ``hosts``: this node's host endpoints and which interfaces they
    are, of ``policy.list`` alone.
    """

    files: tuple[str, ...]
    policies: tuple[str, ...]
    tables: dict[str, int]
    warnings: tuple[PolicyWarning, ...] = ()
    folder: str = ""
    behind: str = ""
    staged: tuple[str, ...] = ()
    changes: PolicyChanges | None = None
    hosts: tuple[str, ...] = ()


@method("policy.apply", PolicyState, large=True)
class PolicyApplyParams(Params[PolicyState], frozen=True, kw_only=True):
    """Add manifest files, each in the place of one of its name, and put all in force at once.

    Raises InvalidInput and PolicyTooLarge; then nothing has changed. ``dry_run`` changes nothing either way,
    and says which pairs would change.
    """

    files: tuple[PolicyFile, ...]
    dry_run: bool = False


@method("policy.list", PolicyState)
class PolicyListParams(Params[PolicyState], frozen=True, kw_only=True):
    """Say what is in force."""


@method("policy.delete", PolicyState)
class PolicyDeleteParams(Params[PolicyState], frozen=True, kw_only=True):
    """Take manifest files away. Raises NotFound for one that was never applied; then nothing has changed.

    ``dry_run`` changes nothing either way, and says which pairs would change.
    """

    files: tuple[FileName, ...]
    dry_run: bool = False


class StagedPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A staged policy: what enforcing it would do, as ``effect`` says, and which pairs that would change.

    ``policy`` is its kind and name, ``where`` file:line. ``refused``: why it could not be enforced, else ''.
    """

    policy: str
    where: str
    action: str
    effect: str
    changes: PolicyChanges
    refused: str = ""


@method("policy.staged", tuple[StagedPolicy, ...])
class PolicyStagedParams(Params[tuple[StagedPolicy, ...]], frozen=True, kw_only=True):
    """Say what each staged policy would change if it were enforced; changes nothing.

    ``names``: which, as ``namespace/name``, or with the kind before that; without any, all of them. Raises
    NotFound for a name of no staged policy, InvalidInput for more than are reported at once.
    """

    names: tuple[FileName, ...] = ()
