"""Manifests with something strange in each of their places."""

from __future__ import annotations

import json
from typing import Any

from portwright.model.errors import InvalidInput
from portwright.policy.manifests.read import read


def paths(value: Any, above: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, part in inner for path in paths(part, (*above, key)))]


def changed(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """A copy with another value at that place."""
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    "",
    "x",
    "é",
    [],
    [None],
    [[]],
    {},
    {"a": None},
    [{}],
    {"key": []},
]


def survives_anything(*documents: dict[str, Any]) -> int:
    """Put strange values everywhere; give how many of the results were refused."""
    refusals = 0
    for place, document in enumerate(documents):
        for path in paths(document):
            for strange in STRANGE:
                items = [*documents[:place], changed(document, path, strange), *documents[place + 1 :]]
                try:
                    read([("f", json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))])
                except InvalidInput:
                    refusals += 1
    return refusals
