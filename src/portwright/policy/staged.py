"""Staged policies (Calico): what would hold if one were enforced, or if what it stages the end of were gone.

A staged policy itself decides nothing. Its dry run is a comparison of two sets of policies, in which all
other staged ones stay so: what is in force, and :func:`enforced`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from msgspec.structs import replace

from portwright.model.errors import InvalidInput, NotFound
from portwright.policy.change import NO_HOSTS, Changes, compare
from portwright.policy.host.render import render
from portwright.policy.host.stages import refuse
from portwright.policy.host.whatif import Hosts
from portwright.policy.parties import State, with_addresses
from portwright.policy.rules import Policy, PolicySet, Snapshot, StagedAction
from portwright.policy.tables import PolicyTooLarge

#: How many dry runs are made at once, and how many rows are told of each.
MOST_AT_ONCE, MOST_ROWS = 16, 100
#: What a staged kind stages.
_KINDS = {
    "StagedNetworkPolicy": "CalicoNetworkPolicy",
    "StagedGlobalNetworkPolicy": "GlobalNetworkPolicy",
    "StagedKubernetesNetworkPolicy": "NetworkPolicy",
}


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a staged policy would do (``effect``, in words), and which pairs would change.

    ``refused``: why it could not be enforced; then nothing would change.
    """

    policy: Policy
    effect: str
    changes: Changes
    refused: str = ""


def dry_runs(
    policies: PolicySet, snapshot: Snapshot, chosen: Iterable[Policy], hosts: Hosts = NO_HOSTS
) -> Iterator[DryRun]:
    """Each of the chosen staged policies for itself, against what is in force. Raises as compile_policies.

    ``hosts``: this node's own interfaces, the same before and after.
    """
    world, _ = with_addresses(snapshot, snapshot)
    before = State(policies, world)
    for policy in chosen:
        done = effect(policies, policy)
        wanted = enforced(policies, policy)
        try:
            after = State(wanted, world)
            refuse(wanted, [each.endpoint for each in hosts.after])
            render(wanted, snapshot, hosts.after)
        except (InvalidInput, PolicyTooLarge) as error:
            yield DryRun(policy=policy, effect=done, changes=Changes(), refused=str(error))
        else:
            found = compare(before, after, hosts=hosts, most_rows=MOST_ROWS)
            yield DryRun(policy=policy, effect=done, changes=found)


def staged(policies: PolicySet) -> Iterator[Policy]:
    """Those that are staged, in order."""
    return (policy for policy in policies.policies if policy.staged)


def chosen(policies: PolicySet, names: Sequence[str]) -> list[Policy]:
    """The staged policies of these names (``shop/web``, or with the kind before it); of none: all.

    Raises NotFound for a name of none, InvalidInput for more than MOST_AT_ONCE.
    """
    found = [p for p in staged(policies) if not names or {p.title, f"{p.kind} {p.title}"} & {*names}]
    for name in names:
        if not any(name in {p.title, f"{p.kind} {p.title}"} for p in found):
            raise NotFound("staged policy", name)
    if len(found) > MOST_AT_ONCE:
        why = f"these are {len(found)} staged policies; name at most {MOST_AT_ONCE} at once"
        raise InvalidInput("names", ", ".join(names) or "all", why)
    return found


def counterpart(policies: PolicySet, policy: Policy) -> Policy | None:
    """The enforced policy of a staged one's kind, namespace and name; None where there is none."""
    wanted = (_KINDS[policy.kind], policy.namespace, policy.name)
    return next((p for p in policies.policies if (p.kind, p.namespace, p.name) == wanted), None)


def enforced(policies: PolicySet, policy: Policy) -> PolicySet:
    """The policies with that staged one done: it stands in its counterpart's place, or that is gone."""
    old = counterpart(policies, policy)
    left = tuple(p for p in policies.policies if p is not policy and p is not old)
    if policy.staged_action is not StagedAction.DELETE:
        done = replace(policy, kind=_KINDS[policy.kind], staged=False, staged_action=StagedAction.SET)
        left = (*left, done)
    return replace(policies, policies=left)


def effect(policies: PolicySet, policy: Policy) -> str:
    """What it would do, in words: ``replaces NetworkPolicy shop/web``."""
    old = counterpart(policies, policy)
    name = f"{_KINDS[policy.kind]} {policy.title}"
    if policy.staged_action is StagedAction.DELETE:
        return f"deletes {name}" if old is not None else f"deletes {name}, which there is not"
    return f"replaces {name}" if old is not None else f"adds {name}"
