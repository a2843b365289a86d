"""Calico's selector language: what a text means, what is no selector, and the canonical form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.policy import selector
from portwright.policy.labels import (
    EVERYTHING,
    NOTHING,
    And,
    Contains,
    EndsWith,
    Expr,
    Has,
    In,
    Not,
    Or,
    StartsWith,
    matches,
)

DATA: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "policy" / "calico_selectors.json").read_text()
)

KEYS = st.sampled_from(
    [
        "app",
        "a.b/c-d_9",
        "in",
        "has",
        "ns:team",
        "sa:role",
        selector.NAMESPACE_KEY,
        selector.CALICO_SERVICE_ACCOUNT,
    ]
)
VALUES = st.text(st.characters(exclude_characters="'\"", codec="utf-8"), max_size=4) | st.sampled_from(
    ["'", '"', "'x"]
)
SETS = st.frozensets(VALUES, max_size=3)
LEAVES: st.SearchStrategy[Expr] = st.one_of(
    st.just(EVERYTHING),
    st.just(NOTHING),
    st.builds(Has, KEYS),
    st.builds(In, KEYS, SETS),
    st.builds(Contains, KEYS, VALUES),
    st.builds(StartsWith, KEYS, VALUES),
    st.builds(EndsWith, KEYS, VALUES),
)


def groups(terms: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """Expressions in which terms occur, none a double negation or a group of one."""
    several = st.lists(terms, min_size=2, max_size=3).map(tuple)
    return st.one_of(terms.map(selector.negate), st.builds(And, several), st.builds(Or, several))


EXPRESSIONS = st.recursive(LEAVES, groups, max_leaves=8)
LABELS = st.dictionaries(KEYS, VALUES, max_size=4)


@pytest.mark.parametrize("case", DATA["truth"], ids=lambda case: case["selector"])
def test_a_selector_holds_of_these_labels_and_not_of_those(case: dict[str, Any]) -> None:
    """A selector, and its canonical form, holds of each of these sets of labels and of none of those."""
    expr = selector.parse(case["selector"])
    again = selector.parse(selector.render(expr))

    assert again == expr
    assert [labels for labels in case["holds"] if not matches(expr, labels)] == []
    assert [labels for labels in case["fails"] if matches(expr, labels)] == []


@pytest.mark.parametrize("case", DATA["namespaces"], ids=lambda case: case["selector"])
def test_a_namespace_selector_reads_the_namespaces_labels(case: dict[str, Any]) -> None:
    """In a namespaceSelector keys are the namespace's, ``all()`` is: in one, ``global()``: in none."""
    expr = selector.parse_namespace(case["selector"])

    assert [labels for labels in case["holds"] if not matches(expr, labels)] == []
    assert [labels for labels in case["fails"] if matches(expr, labels)] == []


@pytest.mark.parametrize("case", DATA["bad"], ids=lambda case: repr(case["selector"]))
def test_a_bad_selector_is_refused_where_its_mistake_stands(case: dict[str, Any]) -> None:
    """The error names the field, and the character from 1, or the end, where the text goes wrong."""
    with pytest.raises(InvalidInput) as raised:
        selector.parse(case["selector"], "spec.selector")
    place = re.match(r"at (?:character (\d+), |its end: )", raised.value.why)

    assert raised.value.field == "spec.selector"
    assert place is not None
    assert (int(place[1]) if place[1] else None) == case["at"]


@pytest.mark.parametrize(("text", "canonical"), DATA["canonical"])
def test_the_canonical_form(text: str, canonical: str) -> None:
    """Of one meaning written in several ways there is one text, which is its own canonical form."""
    assert selector.render(selector.parse(text)) == canonical
    assert selector.render(selector.parse(canonical)) == canonical


@settings(deadline=None)
@given(EXPRESSIONS)
def test_every_expression_survives_its_text(expr: Expr) -> None:
    """Parsing the text of an expression gives that expression back."""
    assert selector.parse(selector.render(expr)) == expr


@settings(deadline=None)
@given(EXPRESSIONS, LABELS)
def test_negation_is_the_opposite(expr: Expr, labels: dict[str, str]) -> None:
    """Whatever the labels, ``!(s)`` holds exactly where ``s`` does not."""
    text = f"!({selector.render(expr)})"

    assert matches(selector.parse(text), labels) is not matches(expr, labels)


@settings(deadline=None)
@given(st.text(st.sampled_from("ab '\"(){},=!&|has()all()in \t\n.é%")) | st.text(max_size=40))
def test_any_text_is_a_selector_or_invalid_input(text: str) -> None:
    """No text makes the parser fail in any other way than by InvalidInput; what it takes, it can write."""
    try:
        expr = selector.parse(text)
    except InvalidInput:
        return

    assert selector.parse(selector.render(expr)) == expr


def test_bounds_are_named() -> None:
    """Length, nesting and names are bounded, the bound itself included; chains are not nesting."""
    deepest = "(" * selector.MAX_DEPTH + "all()" + ")" * selector.MAX_DEPTH
    longest = "a" * selector.MAX_LABEL

    assert selector.parse(deepest) == EVERYTHING
    assert selector.parse(f"has({longest})") == Has(longest)
    assert selector.parse("!" * 8_000 + "has(a)") == Has("a")
    assert selector.parse(" && ".join(["has(a)"] * 800)) == And((Has("a"),) * 800)
    for text, why in (
        (f"({deepest})", "nested more than 64 deep"),
        (f"has({longest}a)", "at most 512 characters"),
        (f"{longest}a == 'x'", "at most 512 characters"),
        (" " * (selector.MAX_LENGTH + 1), "at most 8192 characters"),
    ):
        with pytest.raises(InvalidInput, match=why):
            selector.parse(text)


def test_labels_of_the_namespace_and_account_are_mapped() -> None:
    """``pcns.`` and ``pcsa.`` are the namespace's and the account's, in a plain selector only."""
    assert selector.parse("pcns.team == 'pay'") == In("ns:team", frozenset({"pay"}))
    assert selector.parse("has(pcsa.role)") == Has("sa:role")
    assert selector.parse("has(pcns.)") == Has("pcns.")
    assert selector.parse_namespace("has(pcns.team)") == Has("ns:pcns.team")
    assert selector.parse_service_account("has(role)") == Has("sa:role")
    assert selector.parse_service_account("projectcalico.org/name == 'root'") == In(
        selector.CALICO_SERVICE_ACCOUNT, frozenset({"root"})
    )


def test_all_of_service_accounts_is_what_its_place_says() -> None:
    """``all()`` over service accounts is everything, or what the caller gives; so is no text."""
    named = Has(selector.CALICO_SERVICE_ACCOUNT)

    assert selector.parse_service_account("all()") == EVERYTHING
    assert selector.parse_service_account("!all()", every=named) == Not(named)
    assert selector.parse_service_account(" ", every=named) == named


@pytest.mark.parametrize("text", ["global() && has(a)", "!global()", "has(a) || global( )"])
def test_global_stands_alone(text: str) -> None:
    """``global()`` with anything beside it is refused, even in a namespaceSelector."""
    with pytest.raises(InvalidInput, match="global\\(\\) stands alone") as raised:
        selector.parse_namespace(text, "source.namespaceSelector")

    assert raised.value.field == "source.namespaceSelector"


def test_a_text_with_both_quotes_cannot_be_written() -> None:
    """The language has no escapes, so such a value is InvalidInput and not a wrong text."""
    with pytest.raises(InvalidInput, match="both"):
        selector.render(Contains("app", "'\""))
