"""What one compilation keeps for the next: numbers by what they mean, and what equal input was made into."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from portwright.policy.classes import LabelIndex, Places
from portwright.policy.names import RuleKey
from portwright.policy.numbers import Numbers
from portwright.policy.resolve import Own, Resolution, Resolved, Term, Traits
from portwright.policy.rules import Direction, PolicySet
from portwright.policy.sets import RuleList
from portwright.policy.tables import FIRST_RULE, RuleInfo, SetTable

#: Per tier: its default's rule number, whether it denies, and the numbers of its policies' resolved rules.
SetKey: TypeAlias = tuple[tuple[int, bool, tuple[int, ...]], ...]


class SplitKey(NamedTuple):
    """Sets by stretches of source ports; ``starts`` as a SplitTable's."""

    starts: tuple[int, ...]
    sets: tuple[SetKey, ...]


#: The numbers of the terms that are true of an address, ascending.
ClassKey: TypeAlias = tuple[int, ...]
#: A policy by its identity, in one direction, and an own address that it selects.
Asker: TypeAlias = tuple[int, Direction, Own]
TraitsOf: TypeAlias = dict[tuple[int, Direction], Traits]


class Built(NamedTuple):
    """A set, the rule list that it is of, and how many cells it has."""

    rules: RuleList
    table: SetTable
    cells: int


class Memory:
    """The numbers of a generation, by what they mean, and its sets: what the next one keeps."""

    def __init__(self, policies: PolicySet, old: Memory | None, *, keep_sets: bool = True) -> None:
        """Of ``policies``, after ``old``; ``keep_sets``: whether equal sets keep their numbers."""
        self.rules: Numbers[RuleKey] = Numbers(FIRST_RULE, old.rules if old else None, dense=False)
        self.terms: Numbers[Term] = Numbers(1, old.terms if old else None, dense=False)
        self.lists: Numbers[tuple[Resolved, ...]] = Numbers(1, old.lists if old else None, dense=False)
        self.owners: Numbers[tuple[str, int]] = Numbers(1, old.owners if old else None, dense=False)
        self.classes: Numbers[ClassKey] = Numbers(1, old.classes if old else None, dense=True)
        self.sets: Numbers[SetKey | SplitKey] = Numbers(
            1, old.sets if old else None, dense=True, keep=keep_sets
        )
        #: By rule's number.
        self.infos: dict[int, RuleInfo] = {}
        self.built: dict[SetKey, Built] = {}
        #: Of the world that it was compiled for: whoever is still there has not to be found anew.
        self.labels: LabelIndex
        self.places: Places
        #: The policies, what they ask, and what they are to the addresses that they select, by identity: a
        #: policy that is still there has kept its own.
        self.policies = policies
        self.traits: TraitsOf = {}
        self.resolutions_before: dict[Asker, Resolution] = {}
        self.resolutions: dict[Asker, Resolution] = {}
        if old is not None:
            there = {id(policy) for policy in old.policies.policies}
            kept = there.intersection(map(id, policies.policies))
            self.traits = {asker: found for asker, found in old.traits.items() if asker[0] in kept}
            self.resolutions_before = {a: found for a, found in old.resolutions.items() if a[0] in kept}
