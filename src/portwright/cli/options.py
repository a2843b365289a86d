"""Options and argument types that several commands share, and the client for a command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from portwright.cli.main import Settings
from portwright.model.network import AddressRange, Route
from portwright.model.port import PortMapping

if TYPE_CHECKING:
    from portwright.api.client import Client

    ParamType = click.ParamType[Any]  # generic in click >= 8.4, and only there
else:
    ParamType = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def client_of(settings: Settings, *, timeout: float = 30.0) -> Client:
    """Return a client for the daemon of these settings, which waits ``timeout`` seconds for each answer."""
    from portwright.api.client import Client

    return Client(settings.socket, timeout=timeout)


def dir_options(command: Command) -> Command:
    """Add --run-dir and --state-dir to a command that people look for them on; see merged()."""
    for name, text in (
        ("state", "Where the daemon keeps its state."),
        ("run", "Where its socket and pins are."),
    ):
        option = click.option(f"--{name}-dir", type=click.Path(path_type=Path), help=text)
        command = option(command)
    return command


def merged(settings: Settings, run_dir: Path | None, state_dir: Path | None) -> Settings:
    """Return the settings with a command's own --run-dir and --state-dir."""
    return Settings(run_dir or settings.run_dir, state_dir or settings.state_dir)


class RateType(ParamType):
    """Bits per second (or bits): a number with k, M, G or T (powers of 1000), and bit or bps if one likes."""

    name = "rate"
    _FORM = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)(?:bit|bps|bits)?")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bits."""
        if isinstance(value, int):
            return value
        found = self._FORM.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is not a rate; write it like 100M or 1.5G (bits per second)", param, ctx)
        exact = float(found[1]) * 10.0 ** (3 * "kmgt".find(found[2].lower()) + 3 if found[2] else 0)
        return round(exact)


class LabelType(ParamType):
    """``key=value``, and with ``removable`` also ``key-`` (value None)."""

    name = "key=value"

    def __init__(self, *, removable: bool = False) -> None:
        self._removable = removable

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str | None]:
        """Return key and value."""
        if isinstance(value, tuple):
            return value[0], value[1]
        key, equals, rest = str(value).partition("=")
        if equals and key:
            return key, rest
        if self._removable and len(key) > 1 and key.endswith("-"):
            return key[:-1], None
        more = " or key- to remove it" if self._removable else ""
        return self.fail(f"{value!r}: write it as key=value{more}", param, ctx)


class PublishType(ParamType):
    """``[host_ip:]host_port:container_port[/protocol]``, an IPv6 host_ip in brackets."""

    name = "[ip:]host:container[/proto]"
    _FORM = re.compile(r"(?:(?:\[([^\]]+)\]|([^:\[\]]+)):)?(\d{1,5}):(\d{1,5})(?:/(\w+))?")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> PortMapping:
        """Return the mapping."""
        if isinstance(value, PortMapping):
            return value
        found = self._FORM.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r}: write it as {self.name}", param, ctx)
        return PortMapping(
            host_ip=found[1] or found[2] or "",
            host_port=int(found[3]),
            container_port=int(found[4]),
            protocol=(found[5] or "tcp").lower(),
        )


class RangeSetType(ParamType):
    """A range set: ranges joined by ``;``, each ``SUBNET[,start=A][,end=A][,gateway=A]``."""

    name = "subnet[,start=][,end=][,gateway=]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[AddressRange, ...]:
        """Return the ranges."""
        if isinstance(value, tuple):
            return value
        ranges = []
        for text in str(value).split(";"):
            keys = _keys(text, "subnet", ("start", "end", "gateway"))
            if keys is None:
                self.fail(f"{text!r}: write it as {self.name}", param, ctx)
            ranges.append(AddressRange(**keys))
        return tuple(ranges)


class RouteType(ParamType):
    """A route: ``DST[,gw=A][,mtu=N][,advmss=N][,priority=N][,table=N][,scope=N]``."""

    name = "dst[,gw=][,mtu=][,priority=]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Route:
        """Return the route."""
        if isinstance(value, Route):
            return value
        numbers = ("mtu", "advmss", "priority", "table", "scope")
        keys = _keys(str(value), "dst", ("gw", *numbers))
        if keys is None or any(not keys[n].isdecimal() for n in numbers if n in keys):
            self.fail(f"{value!r}: write it as {self.name}", param, ctx)
        counts = {name: int(keys[name]) for name in numbers if name in keys}
        return Route(dst=keys["dst"], gw=keys.get("gw"), **counts)


def _keys(text: str, first: str, others: tuple[str, ...]) -> dict[str, str] | None:
    """Return the parts of ``FIRST[,key=value]...``, or None if it isn't one."""
    head, *rest = text.strip().split(",")
    head = head.removeprefix(f"{first}=")
    if "=" in head:  # the first part is missing
        return None
    found = {first: head}
    for part in rest:
        key, equals, value = part.partition("=")
        if key not in others or key in found or not equals or not value:
            return None
        found[key] = value
    return found if found[first] else None
