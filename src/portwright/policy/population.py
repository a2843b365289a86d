"""Sets of endpoints by label expression, quickly; and what expressions say of each other and to people.

A set is a whole number, its bit ``i`` the endpoint ``i``. An expression costs as many operations as it has
terms, however many endpoints there are, so that every selector of a thousand policies can be looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from portwright.policy.labels import (
    NAMESPACE_NAME,
    NAMESPACE_PREFIX,
    SERVICE_ACCOUNT_PREFIX,
    And,
    Contains,
    EndsWith,
    Everything,
    Expr,
    Has,
    In,
    Not,
    Or,
    StartsWith,
)
from portwright.policy.rules import Endpoint, EndpointKind

#: A term that pods' selectors carry so as to be true of pods alone; of no interest to people.
_KIND_KEY = "projectcalico.org/orchestrator"


class Population:
    """Endpoints to choose from.

    ``workloads``: the set of those that are pods; ``subjects``: of those that policies can select, hosts'
    interfaces too.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.all = (1 << len(self.endpoints)) - 1
        self.workloads = 0
        self.subjects = 0
        self._known: dict[Expr, int] = {}
        self._values: dict[str, dict[str, int]] = defaultdict(dict)
        for place, endpoint in enumerate(self.endpoints):
            bit = 1 << place
            if endpoint.kind is EndpointKind.WORKLOAD:
                self.workloads |= bit
            if endpoint.kind in {EndpointKind.WORKLOAD, EndpointKind.HOST}:
                self.subjects |= bit
            for key, value in endpoint.labels.items():
                values = self._values[key]
                values[value] = values.get(value, 0) | bit

    def of(self, expr: Expr) -> int:
        """The set of which ``expr`` is true, as :func:`portwright.policy.labels.matches` says."""
        found = self._known.get(expr)
        if found is None:
            found = self._known[expr] = self._of(expr)
        return found

    def _of(self, expr: Expr) -> int:
        match expr:
            case Everything():
                return self.all
            case Has(key):
                return union(self._values.get(key, {}).values())
            case In(key, values):
                known = self._values.get(key, {})
                return union(known[value] for value in values if value in known)
            case Contains(key, text):
                return union(bits for value, bits in self._values.get(key, {}).items() if text in value)
            case StartsWith(key, text):
                known = self._values.get(key, {})
                return union(bits for value, bits in known.items() if value.startswith(text))
            case EndsWith(key, text):
                known = self._values.get(key, {})
                return union(bits for value, bits in known.items() if value.endswith(text))
            case Not(term):
                return self.all & ~self.of(term)
            case And(terms):
                bits = self.all
                for term in terms:
                    bits &= self.of(term)
                return bits
            case Or(terms):
                return union(self.of(term) for term in terms)

    def any_of(self, exprs: Iterable[Expr | None]) -> int:
        """The set of which one of them is true; None is true of all."""
        return union(self.all if expr is None else self.of(expr) for expr in exprs)

    def at(self, bits: int) -> Iterator[Endpoint]:
        """The endpoints of a set, in order."""
        while bits:
            low = bits & -bits
            yield self.endpoints[low.bit_length() - 1]
            bits ^= low

    def names(self, bits: int) -> list[str]:
        """Their titles."""
        return [endpoint.title for endpoint in self.at(bits)]

    def mend(self, expr: Expr) -> str:
        """What to change in an expression that is true of nobody: the label that is nobody's, the nearest."""
        for term in terms_of(expr):
            if self.of(term):
                continue
            if not isinstance(term, In):
                return f"Nobody has it that {describe(term)}: mend the selector or label the pods."
            known = self._values.get(term.key, {})
            if not known:
                near = get_close_matches(term.key, self._values, 1)
                return f"Nobody has a label {_key(term.key)}" + (
                    f"; is {_key(near[0])} meant?" if near else ": label the pods or mend the selector."
                )
            wanted = min(term.values)
            near = get_close_matches(wanted, known, 1) or sorted(known)[:3]
            return f"Of {_key(term.key)} there is {', '.join(near)}, not {wanted}: mend the one or the other."
        return "Each label is somebody's, but nobody has all of them: mend the selector or label the pods."


def union(sets: Iterable[int]) -> int:
    """Who is in any of the sets."""
    bits = 0
    for part in sets:
        bits |= part
    return bits


def terms_of(expr: Expr) -> list[Expr]:
    """The terms of a conjunction, those within it too; itself if it is none."""
    if isinstance(expr, Everything):
        return []
    if isinstance(expr, And):
        return [part for term in expr.terms for part in terms_of(term)]
    return [expr]


def covers(wide: Expr, narrow: Expr) -> bool:
    """Whether ``wide`` is surely true where ``narrow`` is, for all labels there could be."""
    left = terms_of(narrow)
    return all(any(_implies(term, wanted) for term in left) for wanted in terms_of(wide))


def _implies(term: Expr, wanted: Expr) -> bool:
    if term == wanted:
        return True
    match term, wanted:
        case In(key, values), In(other, more):
            return key == other and values <= more
        case In(key, _), Has(other):
            return key == other
        case _:
            return False


def may_overlap(left: Expr, right: Expr) -> bool:
    """False if no labels could make both true, as far as single terms show it; else True."""
    return not any(_exclude(a, b) or _exclude(b, a) for a in terms_of(left) for b in terms_of(right))


def _exclude(term: Expr, other: Expr) -> bool:
    match term, other:
        case In(key, values), In(again, more):
            return key == again and not values & more
        case In(key, _) | Has(key), Not(Has(again)):
            return key == again
        case In(key, values), Not(In(again, more)):
            return key == again and values <= more
        case _:
            return False


def describe(expr: Expr) -> str:
    """An expression in words: ``app=web and namespace team=a``."""
    terms = [term for term in terms_of(expr) if not (isinstance(term, In) and term.key == _KIND_KEY)]
    return " and ".join(_term(term) for term in terms) or "every pod"


def _term(term: Expr) -> str:
    match term:
        case In(key, values) if key == NAMESPACE_PREFIX + NAMESPACE_NAME:
            return f"namespace {_several(values)}"
        case In(key, values):
            return f"{_key(key)}={_several(values)}"
        case Not(In(key, values)):
            return f"{_key(key)}!={_several(values)}"
        case Has(key):
            return f"with {_key(key)}"
        case Not(Has(key)):
            return f"without {_key(key)}"
        case Contains(key, text):
            return f"{_key(key)} contains {text}"
        case StartsWith(key, text):
            return f"{_key(key)} starts with {text}"
        case EndsWith(key, text):
            return f"{_key(key)} ends with {text}"
        case Not(inner):
            return f"not ({describe(inner)})"
        case Or(terms):
            return " or ".join(f"({describe(part)})" for part in terms) or "nobody"
        case And() | Everything():
            return describe(term)


def _several(values: frozenset[str]) -> str:
    return "|".join(sorted(value or "''" for value in values))


def _key(key: str) -> str:
    """The label's name, and whose it is if not the pod's."""
    if key.startswith(NAMESPACE_PREFIX):
        return f"namespace label {key.removeprefix(NAMESPACE_PREFIX)}"
    if key.startswith(SERVICE_ACCOUNT_PREFIX):
        return f"service account label {key.removeprefix(SERVICE_ACCOUNT_PREFIX)}"
    return key
