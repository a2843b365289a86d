"""What rule numbers stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from portwright.policy.numbers import Numbers
from portwright.policy.rules import Direction, OnChange, Policy, Tier
from portwright.policy.tables import BUILT_IN_RULES, RuleInfo

#: (kind, namespace, name, direction, index, on change); a tier's default: ("", "", tier, direction, -1, …).
RuleKey: TypeAlias = tuple[str, str, str, Direction, int, OnChange]


class RuleNames:
    """Numbers rules and tiers' defaults; ``infos``: what each number that was asked for means."""

    def __init__(self, numbers: Numbers[RuleKey], before: Mapping[int, RuleInfo]) -> None:
        self._numbers = numbers
        self._before = before
        self.infos: dict[int, RuleInfo] = dict(BUILT_IN_RULES)

    def again(self, policy: Policy, direction: Direction, index: int) -> None:
        """As of_rule, of a policy that is the same object as when what was ``before`` was found."""
        number = self._number(policy, direction, index)
        self.infos[number] = self._before[number]

    def _number(self, policy: Policy, direction: Direction, index: int) -> int:
        return self._numbers.of(
            (policy.kind, policy.namespace, policy.name, direction, index, policy.on_change)
        )

    def of_rule(self, policy: Policy, direction: Direction, index: int) -> int:
        """The number of the rule at ``index`` of a policy's rules of that direction."""
        number = self._number(policy, direction, index)
        if number not in self.infos:
            rule = (policy.rules(direction) or ())[index]
            self.infos[number] = RuleInfo(
                tier=policy.tier,
                direction=direction,
                kind=policy.kind,
                namespace=policy.namespace,
                policy=policy.name,
                index=index,
                name=rule.name,
                action=rule.action,
                on_change=policy.on_change,
                where=rule.where,
            )
        return number

    def of_default(self, tier: Tier, direction: Direction, policies: tuple[Policy, ...]) -> int:
        """The number of a tier's default, where these of its policies select.

        What it means for open flows is what they say: a reset if one asks for it, and keeping them if all do.
        """
        asked = {policy.on_change for policy in policies}
        on_change = OnChange.RESET if OnChange.RESET in asked else OnChange.RECHECK
        if asked == {OnChange.KEEP}:
            on_change = OnChange.KEEP
        number = self._numbers.of(("", "", tier.name, direction, -1, on_change))
        if number not in self.infos:
            self.infos[number] = RuleInfo(
                implicit="tier-default",
                tier=tier.name,
                direction=direction,
                action=tier.default,
                on_change=on_change,
            )
        return number
