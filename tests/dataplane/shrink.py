"""From documents that show something wrong to the fewest and smallest that still show it.

Manifests are trees; what can go from one is a whole document, an item of a list, or a field. Whether the
remainder is still wrong, or no longer valid, is the caller's to say.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from tests.policy_random.dice import Document

Path: TypeAlias = tuple[str | int, ...]
StillWrong: TypeAlias = Callable[[list[Document]], bool]

#: How often a caller is asked at most: each answer costs some ten milliseconds.
MOST_QUESTIONS: Final = 600
#: A document is none without them.
_KEPT: Final[frozenset[Path]] = frozenset({("apiVersion",), ("kind",), ("metadata",), ("metadata", "name")})


class _Enough(Exception):
    """All questions were asked."""


def shrink(
    documents: Sequence[Document], still_wrong: StillWrong, most: int = MOST_QUESTIONS
) -> list[Document]:
    """The smallest that was found to be still wrong; ``documents`` themselves have to be.

    Documents go by halves, quarters and so on; then parts of those that are left, large ones first; again,
    until no single part can go. The same documents give the same result.
    """
    small = _Shrinking(list(documents), still_wrong, most)
    with contextlib.suppress(_Enough):
        small.whole_documents()
        while small.parts():
            small.whole_documents()
    return small.best


class _Shrinking:
    def __init__(self, documents: list[Document], still_wrong: StillWrong, most: int) -> None:
        self.best = documents
        self._still_wrong = still_wrong
        self._left = most

    def _try(self, documents: list[Document]) -> bool:
        if not self._left:
            raise _Enough
        self._left -= 1
        if not self._still_wrong(documents):
            return False
        self.best = documents
        return True

    def whole_documents(self) -> None:
        """Take away runs of documents, as long as one can go."""
        size = len(self.best)
        while size:
            at, gone = 0, False
            while at < len(self.best):
                if self._try(self.best[:at] + self.best[at + size :]):
                    gone = True
                else:
                    at += size
            if size > 1 or not gone:
                size //= 2

    def parts(self) -> bool:
        """Take away every part that can go, once around; whether one did."""
        gone = False
        for index in reversed(range(len(self.best))):
            gone |= self._parts_of(index)
        return gone

    def _parts_of(self, index: int) -> bool:
        gone, at = False, 0
        before, after = self.best[:index], self.best[index + 1 :]
        while at < len(paths := list(_paths(self.best[index]))):
            # Where one went stands the next: those before it in this order keep their places.
            if self._try([*before, _without(self.best[index], paths[at]), *after]):
                gone = True
            else:
                at += 1
        return gone


def _paths(document: Document) -> Iterator[Path]:
    """Every part that might go, the nearest to the root first."""
    layer: list[tuple[Path, Any]] = [((), document)]
    while layer:
        below: list[tuple[Path, Any]] = []
        for path, value in layer:
            if isinstance(value, dict):
                yield from (part for key in value if (part := (*path, key)) not in _KEPT)
                below += [((*path, key), value[key]) for key in value]
            elif isinstance(value, list):
                yield from ((*path, at) for at in reversed(range(len(value))))
                below += [((*path, at), item) for at, item in enumerate(value)]
        layer = below


def _without(document: Document, path: Path) -> Document:
    changed = copy.deepcopy(document)
    parent: Any = changed
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    return changed
