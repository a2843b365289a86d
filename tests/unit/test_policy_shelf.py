from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from portwright.model.errors import InvalidInput
from portwright.policy.manifests import read as reader
from portwright.policy.manifests import shelf as shelves
from portwright.policy.manifests.documents import Document, parse
from portwright.policy.manifests.read import read
from portwright.policy.manifests.shelf import Shelf
from tests.fix_policy import CORPORA, corpus, texts
from tests.policy_random.world import make_world

File = tuple[str, str]


def policy(name: str, namespace: str = "x") -> str:
    """A NetworkPolicy as text."""
    return (
        f"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, "
        f"namespace: {namespace}}}\nspec: {{podSelector: {{}}}}\n"
    )


def network_set(namespace: str) -> str:
    """A Calico NetworkSet as text: the one kind whose labels are its namespace's too."""
    return (
        f"apiVersion: projectcalico.org/v3\nkind: NetworkSet\nmetadata: {{name: s, namespace: {namespace}}}\n"
        "spec: {nets: [192.0.2.0/24]}\n"
    )


def namespace(team: str) -> str:
    """Namespace x with a label."""
    return f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: x, labels: {{team: {team}}}}}\n"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are parsed."""
    found: list[str] = []

    def listen(text: str, file: str) -> list[Document]:
        found.append(file)
        return parse(text, file)

    monkeypatch.setattr(shelves, "parse", listen)
    return found


def take(found: list[str]) -> list[str]:
    """What is in the list, which is empty then."""
    taken, found[:] = list(found), []
    return taken


def test_only_what_changed_is_parsed(parsed: list[str]) -> None:
    """A file with the text of last time is not parsed again; another text, or one that was away, is."""
    shelf = Shelf()
    files = {name: policy(name) for name in ("a", "b", "c")}
    read(files.items(), shelf=shelf)
    assert take(parsed) == ["a", "b", "c"]
    read(files.items(), shelf=shelf)
    assert take(parsed) == []
    files["b"] = policy("b", "y")
    assert read(files.items(), shelf=shelf) == read(files.items())
    assert take(parsed) == ["b", "a", "b", "c"]
    kept = shelf.weight
    del files["c"]
    read(files.items(), shelf=shelf)
    assert take(parsed) == []
    assert shelf.weight < kept
    files["c"] = policy("c")
    read(files.items(), shelf=shelf)
    assert take(parsed) == ["c"]
    read([], shelf=shelf)
    assert shelf.weight == 0


def test_a_refused_text_is_refused_again(parsed: list[str]) -> None:
    """The same error each time, and the other files are not read again for it."""
    shelf = Shelf()
    bad = [("a", policy("a")), ("b", "kind: [")]
    with pytest.raises(InvalidInput) as first:
        read(bad, shelf=shelf)
    take(parsed)
    with pytest.raises(InvalidInput) as second:
        read(bad, shelf=shelf)
    assert str(first.value) == str(second.value)
    assert take(parsed) == ["b"]
    assert [
        p.name for p in read([("a", policy("a")), ("b", policy("b"))], shelf=shelf).policy_set.policies
    ] == [
        "a",
        "b",
    ]


def test_another_file_may_change_what_an_unchanged_one_means() -> None:
    """A NetworkSet has the labels of its namespace, which another file gives; what is there twice is told."""
    shelf = Shelf()
    files = {"n": namespace("a"), "s": network_set("x"), "p": policy("p")}
    for team in ("a", "b", "a"):
        files["n"] = namespace(team)
        found = read(files.items(), shelf=shelf)
        assert found == read(files.items())
        [endpoint] = found.snapshot.endpoints
        assert endpoint.labels["ns:team"] == team
    with pytest.raises(InvalidInput, match="it stands in p:1 too"):
        read([*files.items(), ("q", policy("p"))], shelf=shelf)


def test_what_is_kept_is_bounded(parsed: list[str]) -> None:
    """Files beyond the bound are read each time, and mean the same."""
    weight = shelves._weight(policy("a"), parse(policy("a"), "a"))
    shelf = Shelf(2 * weight)
    files = [(name, policy(name)) for name in ("a", "b", "c")]
    for again in (["a", "b", "c"], ["c"], ["c"]):
        found = read(files, shelf=shelf)
        assert take(parsed) == again
        assert shelf.weight <= 2 * weight
    assert found == read(files)
    assert Shelf(0).documents("x" * 0, "a") == []


def test_two_files_of_one_name() -> None:
    """Nothing of the one is taken for the other's."""
    shelf = Shelf()
    files = [("a", policy("a")), ("a", policy("b"))]
    for _ in range(3):
        assert read(files, shelf=shelf) == read(files)


def everything() -> list[list[File]]:
    """The states of all corpora, and generated ones."""
    found = [texts(name, case) for name in CORPORA for case in corpus(name).cases]
    for number in range(40):
        items = {"apiVersion": "v1", "kind": "List", "items": list(make_world(f"shelf {number}").documents)}
        found.append([("world.json", json.dumps(items))])
    return found


def test_what_is_kept_means_what_is_read() -> None:
    """From one state to the next and back, one shelf gives what reading anew gives; no reader changes a
    document, nor does a lint."""
    shelf = Shelf()
    states = everything()
    for files in states:
        expected = read(files)
        for _ in range(2):
            assert read(files, shelf=shelf) == expected
        for name, text in files:
            kept: list[Any] = [msgspec.to_builtins(d.body) for d in shelf.documents(text, name)]
            assert kept == [msgspec.to_builtins(d.body) for d in parse(text, name)]


def test_conversion_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unchanged policy is not converted again unless the labels of its namespace change."""
    converted: list[str] = []
    real = dict(reader._CONVERTERS)

    def listening(kind: tuple[str, str]) -> Any:
        def convert(document: Document, context: Any) -> Any:
            converted.append(document.name)
            return real[kind](document, context)

        return convert

    monkeypatch.setattr(reader, "_CONVERTERS", {kind: listening(kind) for kind in real})
    shelf = Shelf()
    files = {"n": namespace("a"), "p": policy("p"), "q": policy("q", "y")}
    for team, expected in (("a", ["p", "q"]), ("a", []), ("b", ["p"])):
        files["n"] = namespace(team)
        read(files.items(), shelf=shelf)
        assert take(converted) == expected
