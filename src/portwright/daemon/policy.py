"""What the node says of policy, in the contract's values; and what would change, found in a thread.

To compare two states of a thousand policies takes a second or more, in which ports have to come and go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec

from portwright.api import policy as pm
from portwright.node.in_force import InForce
from portwright.node.policies import Applied
from portwright.policy.change import Change, Changes, changes
from portwright.policy.host.whatif import Hosts
from portwright.policy.rules import Policy
from portwright.policy.services import services_text
from portwright.policy.staged import DryRun, dry_runs


def policy_state(applied: Applied) -> pm.PolicyState:
    """What is in force, or would be."""
    return pm.PolicyState(
        files=applied.files,
        policies=applied.policies,
        staged=applied.staged,
        tables=msgspec.structs.asdict(applied.size),
        warnings=tuple(
            pm.PolicyWarning(code=w.code, where=str(w.where), text=w.text, fix=w.fix)
            for w in applied.warnings
        ),
    )


async def judged_state(applied: Applied) -> pm.PolicyState:
    """The same, and of a dry run which pairs would change."""
    state = policy_state(applied)
    if applied.states is None:
        return state
    before, after = applied.states
    hosts = Hosts(before.bound, after.bound, before.published or after.published)
    found = await asyncio.to_thread(changes, before[:2], after[:2], hosts=hosts)
    return msgspec.structs.replace(state, changes=_changes(found))


async def staged_policies(state: InForce, chosen: Iterable[Policy]) -> tuple[pm.StagedPolicy, ...]:
    """What each of these staged policies would change of what is in force."""
    policies, snapshot, bound, published = state
    hosts = Hosts(bound, bound, published)
    found = await asyncio.to_thread(lambda: list(dry_runs(policies, snapshot, chosen, hosts)))
    return tuple(map(_staged_policy, found))


def _staged_policy(run: DryRun) -> pm.StagedPolicy:
    return pm.StagedPolicy(
        policy=f"{run.policy.kind} {run.policy.title}",
        where=str(run.policy.where),
        action=run.policy.staged_action.value,
        effect=run.effect,
        changes=_changes(run.changes),
        refused=run.refused,
    )


def _changes(found: Changes) -> pm.PolicyChanges:
    return pm.PolicyChanges(
        rows=tuple(map(_change, found.rows)),
        more_rows=found.more_rows,
        more_pairs=found.more_pairs,
        counted=found.counted,
    )


def _change(row: Change) -> pm.PolicyChange:
    return pm.PolicyChange(
        sources=row.sources,
        targets=row.targets,
        services=services_text(row.services),
        families=row.families,
        allowed=row.allowed,
        before=row.before,
        after=row.after,
        pairs=row.pairs,
        more_from=row.more_sources,
        more_to=row.more_targets,
        via=row.via,
    )
