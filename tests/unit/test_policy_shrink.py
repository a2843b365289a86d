"""What shrinking leaves: all that something wrong needs, and nothing else."""

from __future__ import annotations

from typing import Any

from tests.dataplane.shrink import shrink
from tests.policy_random.dice import Document, document


def pods(count: int) -> list[Document]:
    """So many documents, with a list and a mapping each."""
    return [
        document("v1", "Pod", f"p{n}", spec={"a": [1, 2, {"deep": [3, 4]}], "b": {"c": n}})
        for n in range(count)
    ]


def names(documents: list[Document]) -> list[Any]:
    """What the documents are called."""
    return [one["metadata"]["name"] for one in documents]


def test_what_matters_is_left() -> None:
    """Two of many documents, one by a value deep inside, one by being there, each as small as can be."""

    def wrong(documents: list[Document]) -> bool:
        deep = any(
            "3" in str(d.get("spec", {}).get("a")) and d["metadata"]["name"] == "p5" for d in documents
        )
        return deep and "p11" in names(documents)

    left = shrink(pods(17), wrong)

    assert left == [
        document("v1", "Pod", "p5", spec={"a": [{"deep": [3]}]}),
        document("v1", "Pod", "p11"),
    ]


def test_a_document_goes_once_nothing_needs_it() -> None:
    """One that only a part of another needed goes with that part."""

    def wrong(documents: list[Document]) -> bool:
        by_name = {one["metadata"]["name"]: one for one in documents}
        return "p1" in by_name and ("b" not in by_name["p1"].get("spec", {}) or "p0" in by_name)

    assert shrink(pods(2), wrong) == [document("v1", "Pod", "p1")]


def test_questions_are_bounded() -> None:
    """It asks no more often than it may, and gives the smallest that it has seen."""
    asked: list[int] = []

    def wrong(documents: list[Document]) -> bool:
        asked.append(len(documents))
        return len(documents) >= 3

    assert len(shrink(pods(64), wrong, most=9)) == min(n for n in asked if n >= 3)
    assert len(asked) == 9
