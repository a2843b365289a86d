"""What generated manifests are made of, and how it is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar

Document: TypeAlias = dict[str, Any]
T = TypeVar("T")

#: By family: where pods may be, each at an end of one of the nets below; then who is no pod.
PODS: Final = {
    4: ("10.1.0.0", "10.1.0.1", "10.1.0.127", "10.1.0.128", "10.1.1.0", "10.1.1.255", "10.1.2.1"),
    6: ("fd00:1::", "fd00:1::1", "fd00:1::7f", "fd00:1::80", "fd00:1:0:1::", "fd00:1::ff", "fd00:1:0:2::1"),
}
#: A pod's second address, by its number.
SECOND: Final = {4: "10.1.3.{}", 6: "fd00:1:0:3::{}"}
NODES: Final = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd00:9::1", "fd00:9::2")}
STRANGERS: Final = {4: ("203.0.113.5", "198.51.100.9"), 6: ("2001:db8::5", "2001:db8:1::9")}
NETS: Final = {
    4: (
        *("0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1", "10.0.0.0/8", "10.1.0.0/16", "10.1.0.0/23", "10.1.0.0/24"),
        *("10.1.0.128/25", "10.1.1.0/24", "10.1.0.1/32", "10.9.0.0/24", "203.0.113.0/24", "203.0.113.4/31"),
    ),
    6: (
        *("::/0", "8000::/1", "fc00::/7", "fd00:1::/32", "fd00:1::/63", "fd00:1::/64", "fd00:1::/121"),
        *("fd00:1::80/121", "fd00:1:0:1::/64", "fd00:1::1/128", "2001:db8::/32", "2001:db8::4/127"),
    ),
}
NAMESPACES: Final = {"shop": {"team": "pay"}, "bank": {"team": "vault"}, "lab": {}}
LABELS: Final = {"app": ("web", "db", "api"), "tier": ("front", "back")}
NAMES: Final = ("http", "dns", "sql")
PORTS: Final = (53, 80, 443, 5432, 8080)
PROTOCOLS: Final = ("TCP", "UDP", "SCTP")
#: What names resolve to: pods, strangers, and one of the addresses that nets end at.
DOMAINS: Final = {
    "api.example.com": ("203.0.113.5", "2001:db8::5"),
    "*.example.com": ("203.0.113.5", "2001:db8::5", "198.51.100.9", "2001:db8:1::9"),
    "inside.example.org": ("10.1.0.1", "fd00:1::1", "10.1.1.255"),
}
#: Protocols without ports or types: GRE, ESP, OSPF, UDP-Lite (its ports are nobody's), one of no meaning.
OTHERS: Final = (47, 50, 89, 136, 253)
#: Types of ICMP. Discovery and its like (5, 9, 130 to 137, 143) are the guard's, not policy's.
ICMP_TYPES: Final = (0, 3, 8, 11, 128, 129, 254)


def document(api: str, kind: str, name: str, namespace: str = "", **fields: Any) -> Document:
    """A manifest, without the fields that are None."""
    metadata = {"name": name, **({"namespace": namespace} if namespace else {}), **fields.pop("metadata", {})}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **given(fields)}


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """Those that are not None."""
    return {key: value for key, value in fields.items() if value is not None}


class Dice:
    """Draws; what is made of them is for those who inherit, each method one production of their grammar."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def chance(self, share: float) -> bool:
        """True in this share of cases."""
        return self.dice.random() < share

    def one(self, values: Sequence[T]) -> T:
        """One of them."""
        return self.dice.choice(values)

    def some(self, values: Sequence[T], most: int = 3) -> list[T]:
        """From one to ``most`` of them, none twice."""
        return self.dice.sample(values, self.dice.randint(1, min(most, len(values))))

    def maybe(self, share: float, make: Callable[[], T]) -> T | None:
        """Made in this share of cases, else None."""
        return make() if self.chance(share) else None

    def several(self, make: Callable[[], T], least: int = 1, most: int = 3) -> list[T]:
        """That many, each made anew."""
        return [make() for _ in range(self.dice.randint(least, most))]

    def labels(self) -> dict[str, str]:
        """Labels of a pod; any may be absent."""
        return {key: self.one(values) for key, values in LABELS.items() if self.chance(0.7)}

    def label_selector(self, keys: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
        """Everything, labels, or expressions."""
        key = self.one(tuple(keys))
        if self.chance(0.25):
            return {}
        if self.chance(0.5):
            return {"matchLabels": {key: self.one(keys[key])}}
        operator = self.one(("In", "NotIn", "Exists", "DoesNotExist"))
        values = {"values": self.some(keys[key], 2)} if operator.endswith("In") else {}
        return {"matchExpressions": [{"key": key, "operator": operator, **values}]}
