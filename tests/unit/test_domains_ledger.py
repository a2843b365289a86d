"""The bookkeeping of what is resolved: times, bounds, and what is nobody's any more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portwright.domains.ledger import (
    MAX_IN_ALL,
    MAX_PER_ANSWER,
    MAX_PER_PORT,
    Entry,
    Ledger,
    TooMany,
    table_of,
)


def many(count: int, start: int = 0) -> tuple[str, ...]:
    """So many addresses."""
    return tuple(f"2001:db8::{number:x}" for number in range(start, start + count))


def test_an_address_is_new_once_and_then_prolonged() -> None:
    """A second answer makes nothing new and never shortens what an earlier one promised."""
    ledger = Ledger()

    assert ledger.learn("p", ["a.example"], ("192.0.2.1",), 10) == (Entry("p", "a.example", "192.0.2.1", 10),)
    assert ledger.learn("p", ["a.example"], ("192.0.2.1",), 20) == ()
    assert ledger.learn("p", ["a.example"], ("192.0.2.1",), 5) == ()
    assert ledger.due(19) == ()
    assert [entry.until for entry in ledger.due(20)] == [20]


def test_names_of_two_ports_are_two_entries_and_one_address() -> None:
    """The table that policy gets has each address once for each name, whoever asked."""
    ledger = Ledger()
    ledger.learn("p", ["a.example", "*.example"], ("192.0.2.1",), 10)
    ledger.learn("q", ["*.example"], ("192.0.2.1", "192.0.2.2"), 30)

    assert ledger.table() == {"*.example": ("192.0.2.1", "192.0.2.2"), "a.example": ("192.0.2.1",)}
    ledger.forget(ledger.due(10))
    assert ledger.table() == {"*.example": ("192.0.2.1", "192.0.2.2")}
    assert ledger.next_due() == 30


def test_what_no_rule_asks_for_is_found() -> None:
    """Entries of ports that are gone, and of names that no rule has any more."""
    ledger = Ledger()
    ledger.learn("p", ["a.example", "b.example"], ("192.0.2.1",), 10)
    ledger.learn("q", ["a.example"], ("192.0.2.1",), 10)

    gone = ledger.unasked({"p": ("b.example",)})

    assert {(entry.port_id, entry.pattern) for entry in gone} == {("p", "a.example"), ("q", "a.example")}
    ledger.forget(gone)
    assert ledger.table() == {"b.example": ("192.0.2.1",)}


def test_each_bound_refuses_and_changes_nothing() -> None:
    """An answer with too many addresses, a port with too many, and all ports together."""
    ledger = Ledger()
    with pytest.raises(TooMany, match="an answer has 65 addresses"):
        ledger.learn("p", ["a.example"], many(MAX_PER_ANSWER + 1), 10)
    for start in range(0, MAX_PER_PORT, MAX_PER_ANSWER):
        ledger.learn("p", ["a.example"], many(MAX_PER_ANSWER, start), 10)
    with pytest.raises(TooMany, match="port p has 1024"):
        ledger.learn("p", ["a.example"], ("192.0.2.1",), 10)
    assert ledger.learn("p", ["a.example"], many(1), 20) == ()
    for number in range(1, MAX_IN_ALL // MAX_PER_PORT):
        for start in range(0, MAX_PER_PORT, MAX_PER_ANSWER):
            ledger.learn(f"p{number}", ["a.example"], many(MAX_PER_ANSWER, start), 10)
    with pytest.raises(TooMany, match="all ports together"):
        ledger.learn("q", ["a.example"], ("192.0.2.1",), 10)
    assert len(ledger) == MAX_IN_ALL


_ENTRIES = st.builds(
    Entry,
    st.sampled_from(["p", "q"]),
    st.sampled_from(["a.example", "*.example"]),
    st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1"]),
    st.integers(0, 9).map(float),
)


@given(st.lists(_ENTRIES), st.integers(0, 9))
def test_the_table_is_what_is_not_due(entries: list[Entry], now: int) -> None:
    """After forgetting what is due, the table has exactly the addresses of those that have time left."""
    ledger = Ledger()
    latest: dict[tuple[str, str, str], float] = {}
    for entry in entries:
        ledger.learn(entry.port_id, [entry.pattern], (entry.address,), entry.until)
        latest[entry[:3]] = max(entry.until, latest.get(entry[:3], 0))
    ledger.forget(ledger.due(now))

    left = [Entry(*key, until) for key, until in latest.items() if until > now]
    assert ledger.table() == table_of(left)
    assert set(ledger) == set(left)
    assert Ledger(left).table() == ledger.table()
    assert ledger.next_due() == min((entry.until for entry in left), default=None)
