from __future__ import annotations

import contextlib
import json

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from portwright.model.errors import InvalidInput
from portwright.policy.manifests import documents
from portwright.policy.manifests.documents import Document, dotted, parse, steps

HEAD = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"


def one(text: str) -> Document:
    """The one document of a text."""
    (document,) = parse(text, "f.yaml")
    return document


def value(text: str) -> object:
    """What a reader sees of ``x: text``."""
    return one(f"{HEAD}x: {text}\n").body["x"]


def test_documents_are_split_in_their_order() -> None:
    """Every document of a text is given once, in order, empty ones left out, each with its header's facts."""
    text = (
        "---\n# nothing\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n---\n---\n"
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  name: p\n  namespace: x\n...\n"
    )

    found = [(d.api_version, d.kind, d.namespace, d.name, d.file, d.title) for d in parse(text, "f.yaml")]

    assert found == [
        ("v1", "Namespace", "", "x", "f.yaml", "Namespace x"),
        ("networking.k8s.io/v1", "NetworkPolicy", "x", "p", "f.yaml", "NetworkPolicy x/p"),
    ]
    assert parse("", "f.yaml") == parse("# only this\n---\n~\n", "f.yaml") == []


def test_a_field_knows_its_line() -> None:
    """A field's line is its key's, an item's its dash's, what is absent has the line of what is around it."""
    text = (
        "# a comment\napiVersion: v1\nkind: Pod\nmetadata:\n  name: a\nspec:\n  ingress:\n  - from:\n"
        "    - x: 1\n    -\n      y: [1,\n        2]\n"
    )
    document = parse("---\n" + text, "f.yaml")[0]

    lines = {
        (): 3,
        ("spec",): 7,
        ("spec", "ingress"): 8,
        ("spec", "ingress", 0): 9,
        ("spec", "ingress", 0, "from"): 9,
        ("spec", "ingress", 0, "from", 0, "x"): 10,
        ("spec", "ingress", 0, "from", 1, "y"): 12,
        ("spec", "ingress", 0, "from", 1, "y", 1): 13,
        ("spec", "ingress", 0, "ports"): 9,
        ("spec", "egress", 0, "to"): 7,
        ("metadata", "name"): 6,
        ("nothing",): 3,
    }

    assert {path: document.line(path) for path in lines} == lines
    assert str(document.where(("spec", "ingress", 0))) == "f.yaml:9"
    assert document.where(("spec", "ingress", 0)).path == "spec.ingress[0]"


@pytest.mark.parametrize("path", [(), ("spec",), ("a", 0, "b", 12, 3), ("a", "b", 1)])
def test_a_dotted_path_reads_back(path: documents.Path) -> None:
    """A path, dotted for people, is the same path when it is read back."""
    assert steps(dotted(path)) == path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", 80),
        ("-1", -1),
        ("+7", 7),
        ("100.5", 100.5),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("yes", True),
        ("off", False),
        ("True", True),
        ("~", None),
        ("", None),
        ("Null", None),
        # Text to Kubernetes' reader, a number or a date to PyYAML's.
        ("1:30", "1:30"),
        ("80:90", "80:90"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        ("0x1f", "0x1f"),
        # Octal to one reader, decimal to another.
        ("0123", "0123"),
        ("01.5", "01.5"),
        (".inf", ".inf"),
        ("9" * 400, "9" * 400),
        ('"80"', "80"),
        ("'yes'", "yes"),
        ("y", "y"),
        ('""', ""),
        ("|\n  a\n  b", "a\nb\n"),
        ("{}", {}),
        ("[]", []),
    ],
)
def test_scalars_mean_what_kubernetes_reads(text: str, expected: object) -> None:
    """A plain scalar is what a cluster's reader makes of it; a quoted one is text."""
    found = value(text)

    assert found == expected
    assert type(found) is type(expected)


def test_lists_of_objects_become_their_items() -> None:
    """``kind: List`` and ``PodList`` are their items, with their own lines; a typed list says their kind."""
    plain = (
        "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n"
        "- apiVersion: networking.k8s.io/v1\n  kind: NetworkPolicy\n  metadata: {name: b}\n"
    )
    typed = "apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n"

    assert [(d.kind, d.name, d.line(())) for d in parse(plain, "f")] == [
        ("Pod", "a", 4),
        ("NetworkPolicy", "b", 7),
    ]
    assert [(d.api_version, d.kind, d.name) for d in parse(typed, "f")] == [
        ("v1", "Pod", "a"),
        ("v1", "Pod", "b"),
    ]
    assert parse("{apiVersion: v1, kind: List, items: []}", "f") == []
    with pytest.raises(InvalidInput, match="f:1: apiVersion"):
        parse("{apiVersion: v1, kind: List, items: [{kind: Pod, metadata: {name: a}}]}", "f")


def test_aliases_are_what_they_stand_for() -> None:
    """An alias is the anchor's value with the anchor's lines, in its own document only."""
    document = one(HEAD + "spec:\n  a: &x\n    k: 1\n  b: *x\n")

    assert document.body["spec"] == {"a": {"k": 1}, "b": {"k": 1}}
    assert document.line(("spec", "b", "k")) == 6
    with pytest.raises(InvalidInput, match="no finished anchor"):
        parse(HEAD + "a: &x 1\n---\n" + HEAD + "b: *x\n", "f")


LAUGHS = "\n".join(
    [
        HEAD + "l0: &l0 [a, a, a, a, a, a, a, a, a, a]",
        *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)),
    ]
)
DEEP_ALIASES = "\n".join(
    [HEAD + "l0: &l0 [a]", *(f"l{n}: &l{n} [*l{n - 1}]" for n in range(1, documents.MAX_DEPTH + 1))]
)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param(LAUGHS, r"more than 500000 values", id="billion-laughs"),
        pytest.param(DEEP_ALIASES, "nested deeper than 64", id="deep-aliases"),
        pytest.param(HEAD + "x: &x [*x]\n", "no finished anchor", id="recursive-alias"),
        pytest.param(HEAD + "x: " + "[" * 65 + "]" * 65, "nested deeper than 64", id="deep-lists"),
        pytest.param("[" * 100_000, "nested deeper than 64", id="deep-open-lists"),
        pytest.param("{a: " * 100_000, "nested deeper than 64", id="deep-open-mappings"),
        pytest.param("- " * 100_000, "nested deeper than 64", id="deep-dashes"),
        pytest.param("# " + "x" * (8 << 20), "more than 8388608 bytes", id="bytes"),
        pytest.param(HEAD + "x: 1\nx: 2\n", "f:5: .*given twice", id="key-twice"),
        pytest.param(HEAD + "x: {a: 1, a: 1}\n", "f:4: .*given twice", id="key-twice-flow"),
        pytest.param(HEAD + "1: 2\n", "f:4: a key is text: quote it", id="number-key"),
        pytest.param(HEAD + "yes: 2\n", "f:4: a key is text: quote it", id="bool-key"),
        pytest.param(HEAD + "~: 2\n", "a key is text", id="null-key"),
        pytest.param(HEAD + "? [a]\n: 2\n", "a key is text", id="list-key"),
        pytest.param(HEAD + "x: {<<: {a: 1}}\n", "merge keys are not read", id="merge-key"),
        pytest.param(HEAD + "x: !!str 1\n", "f:4: tags are not read", id="tag"),
        pytest.param(HEAD + "x: !!python/object:os.system {}\n", "tags are not read", id="python-tag"),
        pytest.param(HEAD + "x: !mine [1]\n", "tags are not read", id="own-tag"),
        pytest.param(HEAD + "x: 1e999\n", "no such number", id="infinite"),
        pytest.param(HEAD + "x: a\0b\n", "not YAML", id="nul"),
        pytest.param(HEAD + "x: \ud800\n", "half a surrogate", id="lone-surrogate"),
        pytest.param(HEAD + "x: [1\n", "not YAML", id="unclosed"),
        pytest.param(HEAD + "x: }\n", "f:4: not YAML", id="stray"),
        pytest.param(HEAD + "x: %a\n", "not YAML", id="directive"),
        pytest.param("just text\n", "a manifest is a mapping", id="text"),
        pytest.param("- a\n", "a manifest is a mapping", id="list"),
        pytest.param("kind: Pod\nmetadata: {name: a}\n", "f:1: apiVersion", id="no-version"),
        pytest.param("apiVersion: v1\nmetadata: {name: a}\n", "f:1: kind", id="no-kind"),
        pytest.param("apiVersion: v1\nkind: Pod\n", "f:1: metadata", id="no-metadata"),
        pytest.param("apiVersion: v1\nkind: Pod\nmetadata: [a]\n", "f:1: metadata", id="metadata-list"),
        pytest.param("apiVersion: v1\nkind: Pod\nmetadata:\n  x: y\n", r"f:3: metadata\.name", id="no-name"),
        pytest.param("apiVersion: v1\nkind: [Pod]\nmetadata: {name: a}\n", "f:2: kind", id="kind-list"),
        pytest.param(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: 12}\n", "f:3: metadata.name", id="name-number"
        ),
        pytest.param(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: A_b}\n", "metadata.name", id="name-letters"
        ),
        pytest.param(
            'apiVersion: v1\nkind: Pod\nmetadata: {name: "a\\e[2J"}\n', "metadata.name", id="escape"
        ),
        pytest.param(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: " + "a" * 254 + "}\n", "at most 253", id="name-long"
        ),
        pytest.param(
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: a.b}\n",
            "metadata.namespace",
            id="ns-dot",
        ),
        pytest.param("apiVersion: v1\nkind: List\nitems: [1]\n", "f:3", id="item-number"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, why: str) -> None:
    """Each malformed or hostile text is InvalidInput that says what is wrong, and where."""
    with pytest.raises(InvalidInput, match=why):
        parse(text, "f")


def test_bounds_are_not_met_from_below() -> None:
    """What is exactly as deep as the bound is read."""
    inner = documents.MAX_DEPTH - 1

    assert value("[" * inner + "]" * inner) is not None
    with pytest.raises(InvalidInput, match="nested deeper"):
        value("[" * (inner + 1) + "]" * (inner + 1))


def test_json_escapes_beyond_sixteen_bits() -> None:
    """JSON's two-part escapes are one character, and an escaped backslash before a u is none of them."""
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a"},
        "x": ["😀é", "\\ud83d\\ude00", "\\"],
    }

    assert one(json.dumps(body)).body == body
    assert one(json.dumps(body, indent="\t")).body == body


plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tree = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, width=32) | plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(plain.filter(lambda k: k != "<<"), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(tree.filter(lambda value: "Infinity" not in json.dumps(value)))
def test_json_reads_as_json(content: object) -> None:
    """Whatever JSON says is read as what JSON says, as text of any kind too."""
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "x": content}

    assert one(json.dumps(body)).body == body


# PyYAML writes the text 1e3 without quotes (YAML 1.1 wants a dot in a float); Kubernetes reads a number then.
words = plain.filter(lambda text: text != "<<" and text[:1] not in set("+-.0123456789"))


@settings(deadline=None)
@given(st.dictionaries(words, words | st.integers(0, 70000), max_size=5))
def test_yaml_reads_as_yaml(content: dict[str, object]) -> None:
    """What a YAML writer writes of text and numbers is read as the same text and numbers."""
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "x": content}

    assert one(yaml.safe_dump(body)).body == body


yaml_like = st.text(st.sampled_from("-:?[]{}&*!|>'\"%@`#,~ab1 \n\t\\"), max_size=60)


@settings(deadline=None)
@given(st.text() | yaml_like | st.binary(max_size=80).map(lambda data: data.decode("latin-1")))
@example("? " * 2000)
@example("&a " * 50)
@example("\ufeff---\n")
@example("%YAML 9.9\n---\na")
@example("!<tag:yaml.org,2002:int> " + "9" * 5000)
def test_hostile_text_is_refused_in_one_way(text: str) -> None:
    """Any text is documents or InvalidInput, never another exception; so is any below a sound header."""
    for whole in (text, HEAD + text, HEAD + "x: " + text, '{"apiVersion": ' + text):
        with contextlib.suppress(InvalidInput):
            assert all(document.name and document.line(()) > 0 for document in parse(whole, "f"))
