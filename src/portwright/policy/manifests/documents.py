"""Text to documents: YAML or JSON, as users have it for clusters, from anybody.

The text may be hostile. PyYAML gives events, which are built into plain values here, by a loop and not by
recursion, within bounds (:data:`MAX_BYTES`, :data:`MAX_NODES`, :data:`MAX_DEPTH`), aliases counted at their
full size. Plain scalars mean what they mean to Kubernetes' reader, not to PyYAML's, where these differ:
``1:30`` is text (a Calico port range), not ninety, and so is a date.

A field's line is kept, so that every later error and every rule can say where it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import msgspec
import yaml

from portwright.model.errors import InvalidInput
from portwright.policy.rules import Where

#: Largest text of one file, in bytes of UTF-8.
MAX_BYTES: Final = 8 << 20
#: Most values (scalars, lists, mappings, keys) of one file, each alias counted as what it stands for.
MAX_NODES: Final = 500_000
#: Deepest nesting.
MAX_DEPTH: Final = 64

Path: TypeAlias = tuple[str | int, ...]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.?[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII)
#: A JSON escape of a character beyond 16 bits, in two halves, which YAML writes in one.
_SURROGATES = re.compile(r"(?<!\\)((?:\\\\)*)\\u([dD][89abAB]\w\w)\\u([dD][c-fC-F]\w\w)", re.ASCII)
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")


class _Form(msgspec.Struct, frozen=True):
    """How a name is written. Nothing else gets in, so that names can be printed as they are."""

    pattern: re.Pattern[str]
    most: int
    example: str
    rule: str


_WORD = "[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_VERSION = _Form(re.compile(r"[-a-z0-9./]+"), 317, "networking.k8s.io/v1", "group/version")
_KIND = _Form(re.compile("[A-Za-z][A-Za-z0-9]*"), 63, "NetworkPolicy", "letters")
_NAME = _Form(
    re.compile(rf"{_WORD}(?:\.{_WORD})*"), 253, "web-1.example", "a-z, 0-9, - and . between letters or digits"
)
_NAMESPACE = _Form(re.compile(_WORD), 63, "my-team", "a-z, 0-9 and - between letters or digits")


class Node(msgspec.Struct, gc=False):
    """A value with the lines of what is in it. ``below``: the same for its fields or items.

    A tree and never a ring, since an alias is of what is finished: the collector need not walk through it.
    """

    value: Any
    line: int
    below: dict[str | int, Node]
    nodes: int
    height: int


class Document(msgspec.Struct, kw_only=True):
    """One object of a manifest. ``namespace`` is '' where it gives none; ``body`` is all, as plain values."""

    api_version: str
    kind: str
    name: str
    namespace: str
    body: dict[str, Any]
    file: str
    root: Node

    @property
    def title(self) -> str:
        """``Kind namespace/name``, for people."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"

    def line(self, path: Path) -> int:
        """The line, from 1, where the field at ``path`` stands; of what is absent, where its parent does."""
        node = self.root
        for step in path:
            below = node.below.get(step)
            if below is None:
                break
            node = below
        return node.line

    def where(self, path: Path) -> Where:
        """The place of the field at ``path``."""
        return Where(self.file, self.line(path), dotted(path))


def dotted(path: Path) -> str:
    """``spec.ingress[0].from`` of ``("spec", "ingress", 0, "from")``."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def steps(text: str) -> Path:
    """The path of a dotted name. A key that has a dot itself is taken apart, so only its parent is found."""
    return tuple(int(index) if index else key for key, index in _STEP.findall(text)[:MAX_DEPTH])


def parse(text: str, file: str) -> list[Document]:
    """The documents of a file in their order; ``kind: List`` and ``...List`` become their items.

    Empty documents are left out. Raises InvalidInput, and nothing else, for whatever is no such text: over a
    bound, not YAML, a key twice or not text, a tag, a merge key, no ``apiVersion``, ``kind`` or name.
    """
    found: list[Document] = []
    for root in _roots(text, file):
        if root.value is not None:
            found += _objects(root, file, "", "")
    return found


def _objects(root: Node, file: str, version: str, kind: str) -> Iterator[Document]:
    """The object itself, or a list's items, for which the list may say what they are."""
    body = root.value
    if not isinstance(body, dict):
        raise InvalidInput(f"{file}:{root.line}", body, "a manifest is a mapping with apiVersion and kind")
    version = _text(root, file, body.get("apiVersion", version), "apiVersion", _VERSION)
    kind = _text(root, file, body.get("kind", kind), "kind", _KIND)
    if kind.endswith("List") and isinstance(body.get("items"), list):
        item_kind = kind.removesuffix("List")
        for index in range(len(body["items"])):
            item = root.below["items"].below[index]
            yield from _objects(item, file, version if item_kind else "", item_kind)
        return
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        raise InvalidInput(f"{file}:{root.line}: metadata", metadata, f"a {kind} needs metadata with a name")
    place = root.below["metadata"]
    name = _text(place, file, metadata.get("name"), "metadata.name", _NAME)
    namespace = metadata.get("namespace")
    if namespace is not None:
        namespace = _text(place, file, namespace, "metadata.namespace", _NAMESPACE)
    yield Document(
        api_version=version, kind=kind, name=name, namespace=namespace or "", body=body, file=file, root=root
    )


def _text(node: Node, file: str, value: object, field: str, form: _Form) -> str:
    if not isinstance(value, str) or len(value) > form.most or not form.pattern.fullmatch(value):
        line = node.below.get(field.rpartition(".")[2], node).line
        why = f"needed here, like {form.example}: {form.rule}, at most {form.most} characters"
        raise InvalidInput(f"{file}:{line}: {field}", value, why)
    return value


class _Frame(msgspec.Struct):
    """A list or mapping that is being read. ``key``: a mapping's key that waits for its value."""

    node: Node
    anchor: str | None
    key: Node | None = None


class _Builder:
    """Events of one document to one Node."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.nodes = 0
        self.open: list[_Frame] = []
        self.anchors: dict[str, Node] = {}
        self.root: Node | None = None

    def refuse(self, line: int, value: object, why: str) -> InvalidInput:
        return InvalidInput(f"{self.file}:{line}", value, why)

    def count(self, nodes: int, depth: int, line: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise self.refuse(line, self.nodes, f"more than {MAX_NODES} values (aliases at full size)")
        if depth > MAX_DEPTH:
            raise self.refuse(line, depth, f"nested deeper than {MAX_DEPTH}")

    def begin(self, event: Any, value: Any) -> None:
        """A list or mapping opens."""
        line = event.start_mark.line + 1
        self.untagged(event, line)
        self.count(1, len(self.open) + 1, line)
        if self.open and isinstance(self.open[-1].node.value, dict) and self.open[-1].key is None:
            raise self.refuse(line, type(value).__name__, "a key is text, not a list or mapping")
        self.open.append(_Frame(Node(value, line, {}, 1, 1), event.anchor))

    def end(self) -> None:
        """It closes."""
        frame = self.open.pop()
        self.add(frame.node, frame.anchor)

    def scalar(self, event: Any) -> None:
        """A plain or quoted value, or a key."""
        line = event.start_mark.line + 1
        # An explicit tag, not the "!" that marks a quoted scalar.
        self.untagged(event, line)
        self.count(1, len(self.open) + 1, line)
        plain = event.style is None or event.style == ""
        value = self.resolve(event.value, line) if plain else event.value
        self.add(Node(value, line, {}, 1, 1), event.anchor)

    def alias(self, event: Any) -> None:
        """What an anchor stands for, once more."""
        line = event.start_mark.line + 1
        node = self.anchors.get(event.anchor)
        if node is None:
            raise self.refuse(line, f"*{event.anchor}", "no finished anchor of that name stands before it")
        self.count(node.nodes, len(self.open) + node.height, line)
        self.add(Node(node.value, line, node.below, node.nodes, node.height), None)

    def untagged(self, event: Any, line: int) -> None:
        if event.tag not in {None, "!"}:
            raise self.refuse(line, event.tag, "tags are not read; leave it out")

    def resolve(self, text: str, line: int) -> object:
        """A plain scalar's value."""
        if text in _NULL:
            return None
        if text in _BOOL:
            return _BOOL[text]
        if _INT.fullmatch(text) and len(text) <= 20:
            return int(text)
        if len(text) <= 40 and _FLOAT.fullmatch(text) and not _INT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                raise self.refuse(line, text, "no such number; quote it if it is text")
            # 0123 is octal to one reader and decimal to another: nobody's number, so text.
            leading_zero = text.lstrip("+-").startswith("0") and text.lstrip("+-")[1:2].isdigit()
            return text if leading_zero else number
        return text

    def add(self, node: Node, anchor: str | None) -> None:
        """A finished value goes where it belongs."""
        if anchor is not None:
            self.anchors[anchor] = node
        if not self.open:
            self.root = node
            return
        frame = self.open[-1]
        parent = frame.node
        if isinstance(parent.value, list):
            parent.below[len(parent.value)] = node
            parent.value.append(node.value)
        elif frame.key is None:
            self.key(node, parent)
            frame.key = node
        else:
            # A field stands where its key does: `ingress:` and not the first dash below.
            parent.below[frame.key.value] = Node(
                node.value, frame.key.line, node.below, node.nodes, node.height
            )
            parent.value[frame.key.value] = node.value
            frame.key = None
        parent.nodes += node.nodes
        parent.height = max(parent.height, node.height + 1)

    def key(self, node: Node, parent: Node) -> None:
        if not isinstance(node.value, str):
            raise self.refuse(node.line, node.value, "a key is text: quote it")
        if node.value == "<<":
            raise self.refuse(node.line, "<<", "merge keys are not read; write the fields out")
        if node.value in parent.value:
            raise self.refuse(node.line, node.value, "this key is given twice in one mapping; keep one")


def _roots(text: str, file: str) -> Iterator[Node]:
    """The documents' values. Raises InvalidInput only."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput(file, ascii(text[error.start]), "the text has half a surrogate pair") from None
    if size > MAX_BYTES:
        raise InvalidInput(file, size, f"more than {MAX_BYTES} bytes; split it into several files")
    if text.lstrip()[:1] in {"{", "["}:
        text = _SURROGATES.sub(_joined, text)
    builder = _Builder(file)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            match event:
                case yaml.ScalarEvent():
                    builder.scalar(event)
                case yaml.AliasEvent():
                    builder.alias(event)
                case yaml.MappingStartEvent():
                    builder.begin(event, {})
                case yaml.SequenceStartEvent():
                    builder.begin(event, [])
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    builder.end()
                case yaml.DocumentEndEvent():
                    if builder.root is not None:
                        yield builder.root
                    builder.root = None
                    builder.anchors.clear()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        why = " ".join(filter(None, (error.problem, error.context)))
        raise InvalidInput(f"{file}:{line}", _line_of(text, line), f"not YAML: {why}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InvalidInput(file, text[:40], f"not YAML: {error}".splitlines()[0]) from None


def _joined(found: re.Match[str]) -> str:
    high, low = int(found[2], 16), int(found[3], 16)
    return f"{found[1]}\\U{0x10000 + ((high - 0xD800) << 10) + low - 0xDC00:08x}"


def _line_of(text: str, line: int) -> str:
    lines = text.split("\n", line)
    return lines[line - 1].strip() if line <= len(lines) else ""
