"""Reading JSON the way Go's decoder does, but strictly where silence would be dangerous.

Like Go: a known key matches in any letter case, ``null`` is the same as absent, unknown
keys are ignored. Unlike Go: one key given twice is an error (Go lets the last one win,
and the two readers of a policy label must never disagree), and so is nesting that only
an attacker writes.
"""

from __future__ import annotations

import ipaddress
import json
from typing import Final

from portwright.cni.errors import CniCode, CniError
from portwright.model.errors import InvalidInput

#: Largest configuration read, in bytes (the socket's frame has the same limit).
MAX_BYTES: Final = 1 << 20
#: Deepest nesting of objects and arrays.
MAX_DEPTH: Final = 64
_PREFIX_DIGITS: Final = 3

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r:.80} is given twice")
            seen.add(key)
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _depth(value: object) -> int:
    """Return the nesting of ``value`` without recursion, so that no input can exhaust the stack."""
    level: list[object] = [value]
    depth = 0
    while level:
        below: list[object] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        depth += any(isinstance(item, (dict, list)) for item in level)
        level = below
    return depth


def loads(data: bytes, what: str) -> dict[str, object]:
    """Return the JSON object in ``data``; ``what`` names it in errors.

    Raises :class:`CniError` 6 for anything else: not UTF-8, over :data:`MAX_BYTES` or
    :data:`MAX_DEPTH`, not JSON, not an object, a key twice, a lone surrogate.
    """

    def failed(*why: str) -> CniError:
        return CniError(CniCode.DECODE, f"error unmarshal {what}: {' '.join(why)}")

    too_deep = f"nested deeper than {MAX_DEPTH}"
    if len(data) > MAX_BYTES:
        raise failed(str(len(data)), f"bytes are more than {MAX_BYTES}")
    try:
        text = data.decode()
        value: object = json.loads(text, object_pairs_hook=_refuse_twice, parse_constant=_refuse_constant)
        if "\\u" in text:
            # An escaped lone surrogate is legal for the parser but can't be written again.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise failed(too_deep) from None
    except ValueError as error:
        raise failed(str(error)[:200]) from None
    if not isinstance(value, dict):
        raise failed("not", "a JSON object")
    # A cheap upper bound first: nearly every configuration stays below it.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise failed(too_deep)
    return value


class Fields:
    """One JSON object; ``path`` ('' at the top) prefixes the field named by every error.

    All readers raise :class:`InvalidInput` with the dotted field for a wrong type or value,
    and treat ``null`` as absent.
    """

    def __init__(self, raw: dict[str, object], path: str = "") -> None:
        """Index the keys of ``raw`` without case; ``raw`` is not copied and not changed."""
        self.raw = raw
        self._path = path
        self._keys: dict[str, list[str]] = {}
        for key in raw:
            self._keys.setdefault(key.casefold(), []).append(key)

    def at(self, key: str) -> str:
        """Return the dotted name of ``key`` here."""
        return f"{self._path}.{key}" if self._path else key

    def get(self, key: str) -> object:
        """Return the raw value of ``key`` in any letter case, None if absent.

        Two spellings with different values raise :class:`CniError` 6.
        """
        spellings = self._keys.get(key.casefold())
        if spellings is None:
            return None
        value = self.raw[spellings[0]]
        if any(self.raw[other] != value for other in spellings[1:]):
            raise CniError(
                CniCode.DECODE,
                f"{self.at(key)}: given {len(spellings)} times, as {', '.join(spellings)!r:.200}",
            )
        return value

    def text(self, key: str, default: str = "") -> str:
        """Return a string."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise InvalidInput(self.at(key), value, "must be a string")
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean, False if absent."""
        value = self.get(key)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise InvalidInput(self.at(key), value, "must be true or false")
        return value

    def number(self, key: str, low: int, high: int) -> int | None:
        """Return an integer of ``low``..``high``, None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(self.at(key), value, "must be a whole number")
        if not low <= value <= high:
            raise InvalidInput(self.at(key), value, f"must be {low} to {high}")
        return value

    def child(self, key: str) -> Fields | None:
        """Return an object, None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise InvalidInput(self.at(key), value, "must be an object")
        return Fields(value, self.at(key))

    def array(self, key: str) -> list[tuple[str, object]] | None:
        """Return an array as (dotted name, element) pairs, None if absent."""
        value = self.get(key)
        return None if value is None else elements(self.at(key), value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return an array of strings, () if absent."""
        return tuple(as_text(at, item) for at, item in self.array(key) or ())

    def children(self, key: str) -> list[Fields]:
        """Return an array of objects, [] if absent."""
        return [as_fields(at, item) for at, item in self.array(key) or ()]


def elements(at: str, value: object) -> list[tuple[str, object]]:
    """Return the elements of the array ``value`` with their dotted names."""
    if not isinstance(value, list):
        raise InvalidInput(at, value, "must be an array")
    return [(f"{at}[{index}]", item) for index, item in enumerate(value)]


def as_text(at: str, value: object) -> str:
    """Return ``value`` if it is a string."""
    if not isinstance(value, str):
        raise InvalidInput(at, value, "must be a string")
    return value


def as_fields(at: str, value: object) -> Fields:
    """Return ``value`` for reading if it is an object."""
    if not isinstance(value, dict):
        raise InvalidInput(at, value, "must be an object")
    return Fields(value, at)


def address(at: str, text: str) -> Address:
    """Return an IPv4 or IPv6 address without zone."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidInput(at, text, "must be an IP address") from None
    if isinstance(found, ipaddress.IPv6Address) and found.scope_id is not None:
        raise InvalidInput(at, text, "must be an IP address without zone")
    return found


def interface(at: str, text: str) -> Interface:
    """Return an address with its prefix length (``10.1.2.3/24``), host bits kept."""
    host, slash, length = text.partition("/")
    found = address(at, host)
    plain = bool(slash) and 1 <= len(length) <= _PREFIX_DIGITS and length.isascii() and length.isdigit()
    if not plain or int(length) > found.max_prefixlen:
        raise InvalidInput(at, text, "must be an address with a prefix length, like 10.1.2.3/24")
    return ipaddress.ip_interface(f"{found}/{int(length)}")


def subnet(at: str, text: str) -> str:
    """Return a subnet in canonical form; host bits are refused, with the reference's sentence."""
    found = interface(at, text)
    if found.ip != found.network.network_address:
        raise InvalidInput(
            at,
            text,
            f"Network has host bits set. For a subnet mask of length {found.network.prefixlen} "
            f"the network address is {found.network.network_address}",
        )
    return str(found.network)
