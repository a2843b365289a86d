"""What is really there: links, addresses, routes and rules of a namespace, read with iproute2 and nft."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Callable
from typing import Any

from .netns import Netns

Json = dict[str, Any]


def _ip(ns: Netns, *command: str) -> list[Json]:
    text = ns.run(["ip", "-j", "-d", *command])
    # iproute2 prints empty objects for entries that a filter left out.
    return [entry for entry in json.loads(text or "[]") if entry]


def links(ns: Netns) -> dict[str, Json]:
    """Every link of the namespace by name, as ``ip -j -d link`` describes it."""
    return {entry["ifname"]: entry for entry in _ip(ns, "link", "show")}


def addresses(ns: Netns, ifname: str) -> list[Json]:
    """The global addresses of a link: ``local``, ``prefixlen``, ``family``, flags such as ``tentative``."""
    found = _ip(ns, "addr", "show", "dev", ifname)
    return [info for entry in found for info in entry.get("addr_info", []) if info.get("scope") != "link"]


def bare_addresses(ns: Netns, ifname: str) -> set[str]:
    """The global addresses of a link, without prefix lengths."""
    return {info["local"] for info in addresses(ns, ifname)}


def routes(ns: Netns, family: int, table: str = "main") -> list[Json]:
    """The routes of a table; ``dst`` is ``default`` or a prefix (a host's without its length)."""
    return _ip(ns, f"-{family}", "route", "show", "table", table)


def default_routes(ns: Netns, family: int) -> list[Json]:
    """The default routes of the main table."""
    return [route for route in routes(ns, family) if route["dst"] == "default"]


def mac_of(ns: Netns, ifname: str) -> str:
    """The hardware address of a link, in lower case."""
    return str(links(ns)[ifname]["address"]).lower()


def bare(address: str) -> str:
    """An address without its prefix length."""
    return str(ipaddress.ip_interface(address).ip)


def family_of(address: str) -> int:
    """4 or 6."""
    return ipaddress.ip_interface(address).version


def ruleset(ns: Netns) -> str:
    """Everything that nft and both iptables variants show of the namespace, as text."""
    dumps = [ns.run(["nft", "list", "ruleset"], check=False)]
    dumps += [ns.run([tool], check=False) for tool in ("iptables-save", "ip6tables-save")]
    return "\n".join(dumps)


def wait_until(predicate: Callable[[], bool], what: str, timeout: float = 10) -> None:
    """Poll until true; AssertionError naming ``what`` after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.001
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(pause)  # the poll's pause, not a wait for a hoped-for moment
        pause = min(pause * 2, 0.05)
