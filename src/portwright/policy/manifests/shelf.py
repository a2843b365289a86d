"""What files said when they were last read, so that one of a thousand that changes is all that is read again.

Nothing is kept that depends on another file: the documents of a text, and what each became in its context.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final, NamedTuple

import msgspec

from portwright.policy.lints.entry import Entry
from portwright.policy.manifests.convert import Context, Converted
from portwright.policy.manifests.documents import Document, parse

#: Most that is kept, in bytes, by :func:`_weight`. Files beyond are read each time.
MAX_WEIGHT: Final = 64 << 20
#: Of one value with its line, and of its part in what the document becomes.
VALUE_WEIGHT: Final = 256


class _Kept(NamedTuple):
    """What a document became, with the document, which so keeps its id."""

    document: Document
    context: Context
    found: Converted
    entries: tuple[Entry, ...]


class _File(msgspec.Struct):
    text: str
    documents: list[Document]
    weight: int
    #: by the document's id
    converted: dict[int, _Kept] = {}


class Shelf:
    """Belongs to whoever reads the same files again and again. Its documents are not to be changed."""

    def __init__(self, most: int = MAX_WEIGHT) -> None:
        self._most = most
        self._files: dict[str, _File] = {}
        self.weight = 0

    def keep(self, names: Collection[str]) -> None:
        """Forget all files but these."""
        for name in [name for name in self._files if name not in names]:
            self._drop(name)

    def documents(self, text: str, file: str) -> list[Document]:
        """As :func:`portwright.policy.manifests.documents.parse`, whose errors are not kept."""
        known = self._files.get(file)
        if known is not None:
            if known.text == text:
                return known.documents
            self._drop(file)
        found = parse(text, file)
        weight = _weight(text, found)
        if self.weight + weight <= self._most:
            self._files[file] = _File(text, found, weight)
            self.weight += weight
        return found

    def converted(self, document: Document, context: Context, convert: Callable[[], Converted]) -> Converted:
        """What ``convert`` gives for this document in this context, or gave."""
        file = self._files.get(document.file)
        if file is None:
            return convert()
        known = file.converted.get(id(document))
        if known is not None and known.document is document and known.context == context:
            return known.found
        found = convert()
        file.converted[id(document)] = _Kept(document, context, found, _entries(document, found))
        return found

    def entries(self, document: Document, found: Converted) -> tuple[Entry, ...]:
        """The policies that a document became, for lints: the same each time, if what it became is kept."""
        file = self._files.get(document.file)
        known = file.converted.get(id(document)) if file is not None else None
        return known.entries if known is not None and known.found is found else _entries(document, found)

    def _drop(self, name: str) -> None:
        self.weight -= self._files.pop(name).weight


def _entries(document: Document, found: Converted) -> tuple[Entry, ...]:
    return tuple(Entry(document, policy) for policy in found.policies)


def _weight(text: str, documents: list[Document]) -> int:
    """What these take in memory, more or less: no alias takes as much as it is counted for."""
    return 2 * len(text.encode()) + VALUE_WEIGHT * sum(document.root.nodes for document in documents)
