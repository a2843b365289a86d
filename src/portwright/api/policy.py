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


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """What is in force, or would be: files, policies, and the number of entries of each table."""

    files: tuple[str, ...]
    policies: tuple[str, ...]
    tables: dict[str, int]
    warnings: tuple[PolicyWarning, ...] = ()


@method("policy.apply", PolicyState)
class PolicyApplyParams(Params[PolicyState], frozen=True, kw_only=True):
    """Add manifest files, each in the place of one of its name, and put all in force at once.

    Raises InvalidInput and PolicyTooLarge; then nothing has changed. ``dry_run`` changes nothing either way.
    """

    files: tuple[PolicyFile, ...]
    dry_run: bool = False


@method("policy.list", PolicyState)
class PolicyListParams(Params[PolicyState], frozen=True, kw_only=True):
    """Say what is in force."""


@method("policy.delete", PolicyState)
class PolicyDeleteParams(Params[PolicyState], frozen=True, kw_only=True):
    """Take manifest files away. Raises NotFound for one that was never applied; then nothing has changed."""

    files: tuple[FileName, ...]
