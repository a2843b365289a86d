"""Profiles: what the suite has to know about a plugin that it has never seen. A TOML file each."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ALL_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

BUILT_IN = Path(__file__).parent / "profiles"


NEEDS = ("portmap", "bandwidth", "ingress_policy")
"""What a profile may serve in ways of its own; of ``ingress_policy`` each policy is one."""


@dataclass(frozen=True)
class Chain:
    """One way to get a need served: capabilities of the plugin itself, or plugins chained after it.

    ``config`` are keys that the plugin itself needs for that.
    """

    capabilities: Json = field(default_factory=dict)
    config: Json = field(default_factory=dict)
    plugins: tuple[Json, ...] = ()


@dataclass(frozen=True)
class DaemonSpec:
    """How the plugin's daemon is started; ``socket`` accepts once it is ready."""

    command: tuple[str, ...]
    socket: str
    start_timeout: float = 15


@dataclass(frozen=True)
class Breaker:
    """Something that CHECK must notice: a command, run in the host's namespace after an ADD."""

    name: str
    command: tuple[str, ...]
    needs: str = ""


@dataclass(frozen=True)
class Profile:
    """The plugin under test. Strings may hold ``{work}`` (a private folder), ``{venv}``, ``{repo}``.

    ``features`` are claims: a case that needs a claim which is not made is not run (see README).
    ``prefix``: ``"range"`` if addresses carry their subnet's length, ``"host"`` for /32 and /128.
    ``gateway``: ``"first"`` for the first address of the range, else a mapping of "4" and "6" to addresses.
    ``needs``: for each of ``NEEDS``, the ways (variants) in which it is served.
    ``state``: files (globs) and commands which show what the plugin has recorded: what they print must name a
    container while it is attached, and not after DEL.
    """

    name: str
    type: str
    bin_dirs: tuple[str, ...]
    versions: tuple[str, ...] = ALL_VERSIONS
    chain_version: str = "1.0.0"
    config: Json = field(default_factory=dict)
    ipam: Json = field(default_factory=lambda: {"type": "host-local"})
    prefix: str = "range"
    gateway: str | Mapping[str, str] = "first"
    features: frozenset[str] = frozenset()
    needs: Mapping[str, Mapping[str, Chain]] = field(default_factory=dict)
    install: tuple[tuple[str, ...], ...] = ()
    daemon: DaemonSpec | None = None
    state_files: tuple[str, ...] = ()
    state_commands: tuple[tuple[str, ...], ...] = ()
    breakers: tuple[Breaker, ...] = ()
    expected_failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The highest version that the plugin claims: what ordinary cases use."""
        return self.versions[-1]


def expand(value: Any, places: Mapping[str, str]) -> Any:
    """``value`` with the ``{placeholders}`` in its strings filled in, at every depth."""
    if isinstance(value, str):
        for key, text in places.items():
            value = value.replace("{" + key + "}", text)
        return value
    if isinstance(value, Mapping):
        return {key: expand(item, places) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [expand(item, places) for item in value]
    return value


def places(work: Path) -> dict[str, str]:
    """The placeholders of every profile."""
    repo = Path(__file__).resolve().parents[2]
    return {"work": str(work), "venv": str(Path(sys.executable).parent), "repo": str(repo)}


def load_profile(name: str) -> Profile:
    """A built-in profile by name, or one by its path (a name with a ``/`` or ``.toml``).

    ``extends`` names a built-in profile whose top-level keys hold where this one has none.

    Raises FileNotFoundError, tomllib.TOMLDecodeError, or ValueError naming an unknown or missing key.
    """
    path = Path(name) if "/" in name or name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    data = tomllib.loads(path.read_text())
    if "extends" in data:
        base = BUILT_IN / f"{data.pop('extends')}.toml"
        data = tomllib.loads(base.read_text()) | data
    return parse_profile(data, str(path))


def parse_profile(data: Mapping[str, Any], origin: str) -> Profile:
    """The profile that a TOML document describes; ``origin`` is named in errors."""
    known = {"name", "type", "bin_dirs", "versions", "chain_version", "config", "ipam", "prefix", "gateway"}
    known |= {"features", "needs", "install", "daemon", "state", "breakers", "expected_failures"}
    if unknown := set(data) - known:
        raise ValueError(f"{origin}: unknown keys {sorted(unknown)}")
    if missing := {"name", "type", "bin_dirs"} - set(data):
        raise ValueError(f"{origin}: missing keys {sorted(missing)}")
    plain = {
        key: data[key]
        for key in (
            "name",
            "type",
            "chain_version",
            "config",
            "ipam",
            "prefix",
            "gateway",
            "expected_failures",
        )
        if key in data
    }
    state = data.get("state", {})
    return Profile(
        **plain,
        bin_dirs=tuple(data["bin_dirs"]),
        versions=tuple(data.get("versions", ALL_VERSIONS)),
        features=frozenset(data.get("features", ())),
        needs={
            need: {
                variant: Chain(
                    way.get("capabilities", {}), way.get("config", {}), tuple(way.get("plugins", ()))
                )
                for variant, way in ways.items()
            }
            for need, ways in data.get("needs", {}).items()
        },
        install=tuple(tuple(command) for command in data.get("install", {}).get("commands", ())),
        daemon=_daemon(data["daemon"]) if "daemon" in data else None,
        state_files=tuple(state.get("files", ())),
        state_commands=tuple(tuple(command) for command in state.get("commands", ())),
        breakers=tuple(
            Breaker(one["name"], tuple(one["command"]), one.get("needs", ""))
            for one in data.get("breakers", ())
        ),
    )


def _daemon(data: Mapping[str, Any]) -> DaemonSpec:
    return DaemonSpec(tuple(data["command"]), data["socket"], float(data.get("start_timeout", 15)))
