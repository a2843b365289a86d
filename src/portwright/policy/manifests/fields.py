"""Reading a document's fields strictly: a value with its path, so that each refusal names its field.

As the API server reads them: ``null`` is absent. Every reader raises InvalidInput with the dotted path.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final

import msgspec

from portwright.model.errors import InvalidInput
from portwright.policy.labels import EVERYTHING, Expr, Has, In, Not, both
from portwright.policy.manifests.documents import Document, Path, dotted
from portwright.policy.rules import SCTP, TCP, UDP, PortRange, Where

#: The protocols that manifests name; the API's spelling.
PROTOCOLS: Final = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
MAX_PORT: Final = 65535

_LABEL = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", re.ASCII)
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9](?:[-a-z0-9]{0,13}[a-z0-9])?", re.ASCII)
_CIDR = re.compile(r"[0-9A-Fa-f:.]{2,45}/(?:0|[1-9][0-9]{0,2})", re.ASCII)
_MAX_SUBDOMAIN = 253
_MAX_VALUES = 10_000


class Field(msgspec.Struct, frozen=True):
    """A value in a document, never null, and its path."""

    document: Document
    path: Path
    value: Any

    @property
    def where(self) -> Where:
        """Its place."""
        return self.document.where(self.path)

    def refuse(self, why: str) -> InvalidInput:
        """The error that says ``why`` this value is not taken."""
        return InvalidInput(dotted(self.path), self.value, why)

    def only(self, *known: str) -> Field:
        """Itself; raises unless it is a mapping of no other fields than these."""
        for name in self.mapping():
            if name not in known:
                wrong = InvalidInput(
                    dotted((*self.path, name)),
                    self.value[name],
                    f"unknown field; known here: {', '.join(known)}",
                )
                raise wrong
        return self

    def mapping(self) -> dict[str, Any]:
        """Its value, which is a mapping."""
        if not isinstance(self.value, dict):
            raise self.refuse("a mapping is needed here")
        return self.value

    def get(self, name: str) -> Field | None:
        """The field of that name; None where it is absent or null."""
        value = self.mapping().get(name)
        return None if value is None else Field(self.document, (*self.path, name), value)

    def need(self, name: str, why: str = "this field is required") -> Field:
        """The field of that name, which must be there."""
        found = self.get(name)
        if found is None:
            raise InvalidInput(dotted((*self.path, name)), None, why)
        return found

    def one_of(self, *names: str) -> Field:
        """The one field of these that is there; raises for none, two, or another."""
        self.only(*names)
        given = [field for name in names if (field := self.get(name)) is not None]
        if len(given) != 1:
            raise self.refuse(f"exactly one of {', '.join(names)} is needed here")
        return given[0]

    def items(self, most: int = _MAX_VALUES, least: int = 0) -> list[Field]:
        """The items of the list that it is. Null items are refused: nobody's rule or peer."""
        if not isinstance(self.value, list):
            raise self.refuse("a list is needed here")
        if not least <= len(self.value) <= most:
            raise InvalidInput(
                dotted(self.path), len(self.value), f"from {least} to {most} items are allowed here"
            )
        for index, value in enumerate(self.value):
            if value is None:
                raise InvalidInput(dotted((*self.path, index)), None, "an empty item: remove it or write {}")
        return [Field(self.document, (*self.path, index), value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        """Its text."""
        if not isinstance(self.value, str):
            raise self.refuse("text is needed here: quote it")
        return self.value

    def choice(self, *values: str) -> str:
        """Its text, one of these."""
        if self.value not in values:
            raise self.refuse(f"one of: {', '.join(values)}")
        return str(self.value)

    def integer(self, low: int, high: int) -> int:
        """Its whole number within these bounds."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not low <= self.value <= high:
            raise self.refuse(f"a whole number from {low} to {high} is needed here")
        return self.value

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.refuse("true or false is needed here")
        return self.value


def root(document: Document) -> Field:
    """The whole document."""
    return Field(document, (), document.body)


def spec_of(document: Document, *known: str) -> Field:
    """A policy's ``spec``, with no unknown field in it or beside it; absent is empty.

    ``status`` is what a cluster wrote; an apply there drops it too.
    """
    found = root(document).only("apiVersion", "kind", "metadata", "spec", "status").get("spec")
    return (found or Field(document, ("spec",), {})).only(*known)


def is_label_key(text: object) -> bool:
    """Whether it is ``name`` or ``prefix/name`` as Kubernetes wants it."""
    if not isinstance(text, str):
        return False
    prefix, slash, name = text.rpartition("/")
    if slash and (len(prefix) > _MAX_SUBDOMAIN or not _SUBDOMAIN.fullmatch(prefix)):
        return False
    return _LABEL.fullmatch(name) is not None


def is_label_value(text: object) -> bool:
    """Whether it is a label's value, which may be empty."""
    return isinstance(text, str) and (not text or _LABEL.fullmatch(text) is not None)


def labels(field: Field | None) -> dict[str, str]:
    """An object's labels; none where absent."""
    if field is None:
        return {}
    for key, value in field.mapping().items():
        _label_key(key, Field(field.document, (*field.path, key), key))
        _label_value(Field(field.document, (*field.path, key), value))
    return dict(field.mapping())


def metadata_labels(document: Document) -> dict[str, str]:
    """``metadata.labels``."""
    return labels(root(document).need("metadata").get("labels"))


def _label_key(key: object, field: Field) -> str:
    if not is_label_key(key):
        raise field.refuse(
            "a label's key is [prefix/]name: letters, digits, - _ . between letters or digits, up to 63"
        )
    return str(key)


def _label_value(field: Field) -> str:
    if not is_label_value(field.value):
        quote = "" if isinstance(field.value, str) else "; quote it"
        raise field.refuse(
            f"a label's value is text of up to 63 letters, digits, - _ . between letters or digits{quote}"
        )
    return str(field.value)


def label_selector(field: Field, prefix: str = "") -> Expr:
    """A LabelSelector as apimachinery reads it, its keys under ``prefix``; an empty one is true of all."""
    field.only("matchLabels", "matchExpressions")
    terms: list[Expr] = []
    if (pairs := field.get("matchLabels")) is not None:
        terms += [In(prefix + key, frozenset({value})) for key, value in sorted(labels(pairs).items())]
    if (expressions := field.get("matchExpressions")) is not None:
        terms += [_requirement(item, prefix) for item in expressions.items()]
    return both(*terms) if terms else EVERYTHING


def _requirement(field: Field, prefix: str) -> Expr:
    field.only("key", "operator", "values")
    key_field = field.need("key")
    key = prefix + _label_key(key_field.value, key_field)
    operator = field.need("operator").choice("In", "NotIn", "Exists", "DoesNotExist")
    values_field = field.get("values")
    values = values_field.items() if values_field is not None else []
    if operator in {"Exists", "DoesNotExist"}:
        if values_field is not None and values:
            raise values_field.refuse(f"{operator} takes no values; use In or NotIn, or leave them out")
        return Has(key) if operator == "Exists" else Not(Has(key))
    if not values:
        raise InvalidInput(
            dotted((*field.path, "values")), None, f"{operator} needs values; Exists and DoesNotExist do not"
        )
    found = In(key, frozenset(_label_value(value) for value in values))
    return found if operator == "In" else Not(found)


def network(field: Field) -> str:
    """A CIDR in canonical form; bits below the prefix are cleared, as the API server's users expect."""
    text = field.text()
    try:
        if not _CIDR.fullmatch(text):
            raise ValueError
        net = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise field.refuse("a network is needed here, like 10.0.0.0/8 or fd00::/8") from None
    if isinstance(net, ipaddress.IPv6Network) and net.subnet_of(ipaddress.IPv6Network("::ffff:0:0/96")):
        raise field.refuse("no packet carries a mapped IPv4 address; write it as IPv4")
    return str(net)


def address(field: Field) -> str:
    """An address in canonical form."""
    try:
        found = ipaddress.ip_address(field.text())
    except ValueError:
        raise field.refuse("an address is needed here, like 10.0.0.1 or fd00::1") from None
    if isinstance(found, ipaddress.IPv6Address) and (found.scope_id or found.ipv4_mapped):
        raise field.refuse("an address without a scope is needed here, IPv4 in its own form")
    return str(found)


def port_number(field: Field) -> int:
    """A port's number, 1 to 65535."""
    return field.integer(1, MAX_PORT)


def port_name(field: Field) -> str:
    """A container port's name (IANA_SVC_NAME)."""
    if not _PORT_NAME.fullmatch(field.text()):
        raise field.refuse(
            "a port's name is 1 to 15 of a-z, 0-9 and single -, with a letter; a number is not quoted"
        )
    return field.text()


def port_range(start: Field, end: Field, least: int) -> PortRange:
    """Both inclusive; ``end`` is at least ``start`` + ``least``."""
    first, last = port_number(start), port_number(end)
    if last < first + least:
        raise end.refuse(f"the end of a range is {first + least} or more here, its start is {first}")
    return PortRange(first, last)
