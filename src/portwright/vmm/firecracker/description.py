"""Firecracker's published API description as the judge of what is sent and of what comes back.

The description is Swagger 2.0, whose schemas are those of JSON Schema draft 4 but for a few words that none
of its definitions uses (``discriminator``, ``xml``), so ``jsonschema`` checks them as they are. Three things
are done first: the errata are applied; the range of ``format: int64`` becomes a minimum and a maximum; and
for requests every object is closed, since we send no key that the description doesn't name, while an answer
may have keys of a newer release.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft4Validator
from jsonschema.exceptions import ValidationError, best_match

from portwright.model.errors import InvalidInput
from portwright.vmm.firecracker.errata import ERRATA

FILE = Path(__file__).with_name("firecracker.yaml")
_RANGES = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}


class Misfit(Exception):
    """An answer is not what the description promises; the text says where and why."""


@dataclass(frozen=True)
class Operation:
    """One verb of one path. A schema is None where there is no body."""

    method: str
    template: str
    body: Mapping[str, Any] | None
    body_required: bool
    answers: Mapping[int | str, Mapping[str, Any] | None]


class _Loader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]  # either
    """Words of YAML 1.2: the level ``Off`` is a string, and only true and false are booleans."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in found if tag != "tag:yaml.org,2002:bool"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))


class Description:
    """The description with the errata applied. ``version`` is the release that it describes."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        patched = _patched(document)
        self.version: str = patched["info"]["version"]
        self.operations: dict[tuple[str, str], Operation] = {
            (found.method, found.template): found for found in _operations(patched["paths"])
        }
        self._open: dict[str, Any] = {"definitions": _ranged(patched["definitions"])}
        self._closed: dict[str, Any] = _closed(self._open)
        self._paths = [
            (re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))), template)
            for template in sorted({template for _, template in self.operations}, key=lambda t: "{" in t)
        ]
        self._validators: dict[tuple[str, str, int | str | None], Draft4Validator] = {}

    def operation(self, method: str, path: str) -> Operation | None:
        """What the description has for a request; None for nothing."""
        for pattern, template in self._paths:
            if pattern.fullmatch(path):
                return self.operations.get((method, template))
        return None

    def check_request(self, method: str, path: str, body: Any) -> None:
        """Raise InvalidInput, with the path of the field, for what the description does not allow."""
        found = self.operation(method, path)
        if found is None:
            raise InvalidInput("request", f"{method} {path}", "is not in Firecracker's API")
        if found.body is None:
            if body is not None:
                raise InvalidInput("body", body, f"{method} {path} has none")
            return
        if body is None:
            if found.body_required:
                raise InvalidInput("body", None, f"{method} {path} needs one")
            return
        error = best_match(self._validator(found, None).iter_errors(body))
        if error is not None:
            raise InvalidInput(_where(error), error.instance, error.message)

    def check_answer(self, method: str, path: str, status: int, body: Any) -> Any:
        """The body of an answer without its nulls, which stand for what is not set.

        Raises Misfit where it isn't what the description promises for that status.
        """
        found = self.operation(method, path)
        if found is None:
            raise Misfit(f"{method} {path} is not in the description")
        key: int | str = status if status in found.answers else "default"
        if key == "default" and status < 400:
            raise Misfit(f"status {status} is none of {', '.join(str(s) for s in found.answers)}")
        schema = found.answers.get(key)
        if schema is None:
            if body is not None:
                raise Misfit(f"status {status} has no body")
            return None
        if body is None:
            raise Misfit(f"status {status} needs a body")
        # MMDS is the only answer of any shape, and there a null is the user's.
        plain = body if found.template == "/mmds" else _without_nulls(body)
        error = best_match(self._validator(found, key).iter_errors(plain))
        if error is not None:
            raise Misfit(f"{_where(error)}: {error.message[:200]}")
        return plain

    def _validator(self, found: Operation, answer: int | str | None) -> Draft4Validator:
        key = (found.method, found.template, answer)
        if key not in self._validators:
            if answer is None:
                assert found.body is not None  # noqa: S101 - check_request looked; mypy can't see it
                self._validators[key] = Draft4Validator({**self._closed, **found.body})
            else:
                self._validators[key] = Draft4Validator({**self._open, **(found.answers[answer] or {})})
        return self._validators[key]


@functools.cache
def load() -> Description:
    """The description that we ship, read once."""
    return Description(yaml.load(FILE.read_text(), Loader=_Loader))  # noqa: S506 - derived from the safe loader


def _patched(document: Mapping[str, Any]) -> dict[str, Any]:
    patched: dict[str, Any] = copy.deepcopy(dict(document))
    for erratum in ERRATA:
        place = patched
        for step in erratum.where[:-1]:
            place = place[step]
        place[erratum.where[-1]] = erratum.value
    return patched


def _operations(paths: Mapping[str, Any]) -> Iterator[Operation]:
    for template, verbs in paths.items():
        for verb, facts in verbs.items():
            body = next((p for p in facts.get("parameters", ()) if p["in"] == "body"), None)
            yield Operation(
                method=verb.upper(),
                template=template,
                body=body["schema"] if body else None,
                body_required=bool(body and body.get("required")),
                answers={status: answer.get("schema") for status, answer in facts["responses"].items()},
            )


def _ranged(schema: Any) -> Any:
    """The schema with the ranges of its number formats as numbers."""
    if isinstance(schema, list):
        return [_ranged(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _ranged(part) for key, part in schema.items()}
    if isinstance(made.get("format"), str) and made["format"] in _RANGES and made.get("type") == "integer":
        low, high = _RANGES[made["format"]]
        made = {"minimum": low, "maximum": high, **made}
    return made


def _closed(schema: Any) -> Any:
    """The schema with every object closed that lists its properties and does not say that it is open."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(part) for key, part in schema.items()}
    if made.get("type") == "object" and "properties" in made:
        made.setdefault("additionalProperties", False)
    return made


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _where(error: ValidationError) -> str:
    """``network_overrides[0].iface_id``; a key that is missing or unknown stands in the message."""
    path = ""
    for step in error.absolute_path:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path or "body"
