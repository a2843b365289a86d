"""The suite's own tools: the runtime behaves as libcni does, and profiles are read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .kit.plugin import CniFailed, Json
from .kit.runtime import Runtime
from .profile import BUILT_IN, load_profile, parse_profile

STUB = """#!/bin/sh
# Writes one line per call: its name, the verb, stdin. Fails where its configuration says so.
stdin=$(cat)
echo "${0##*/} $CNI_COMMAND $stdin" >> "$(dirname "$0")/log"
case "$stdin" in *"\\"fail\\": \\"$CNI_COMMAND\\""*) echo '{"code": 100, "msg": "as told"}'; exit 1;; esac
[ "$CNI_COMMAND" != ADD ] || echo '{"cniVersion": "1.1.0", "dns": {"domain": "'"${0##*/}"'"}}'
"""


class Stubs:
    """Plugins ``a`` and ``b`` that log their calls, and a runtime for them."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.runtime = Runtime([folder])
        for name in ("a", "b"):
            (folder / name).write_text(STUB)
            (folder / name).chmod(0o755)

    def calls(self) -> list[tuple[str, str, Json]]:
        """(plugin, verb, stdin) of every call so far; forgets them."""
        lines = [line.split(" ", 2) for line in self.log.read_text().splitlines()]
        self.log.unlink()
        return [(name, verb, json.loads(stdin)) for name, verb, stdin in lines]


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    """A folder of stub plugins."""
    return Stubs(tmp_path)


def _list(**more: object) -> Json:
    plugins: list[Json] = [{"type": "a", "capabilities": {"mac": True, "ips": False}}, {"type": "b"} | more]
    return {"cniVersion": "1.1.0", "name": "n", "plugins": plugins}


def test_runtime_injects_what_is_declared(stubs: Stubs) -> None:
    """Each plugin gets name, cniVersion, the previous result, and only the capabilities that it declares."""
    result = stubs.runtime.add(_list(), "c", "/ns", runtime_config={"mac": "m", "ips": ["i"], "dns": {}})
    assert result["dns"] == {"domain": "b"}
    (_, _, first), (_, _, second) = stubs.calls()
    assert first["runtimeConfig"] == {"mac": "m"}
    assert first["name"] == second["name"] == "n"
    assert "prevResult" not in first
    assert second["prevResult"]["dns"] == {"domain": "a"}
    assert "runtimeConfig" not in second


def test_runtime_deletes_in_reverse_with_the_last_result(stubs: Stubs) -> None:
    """DEL goes backwards, CHECK forwards, both with the final result of ADD; after DEL the cache is empty."""
    conflist = _list()
    stubs.runtime.add(conflist, "c", "/ns")
    stubs.calls()
    stubs.runtime.check(conflist, "c", "/ns")
    stubs.runtime.delete(conflist, "c", "/ns")
    calls = stubs.calls()
    assert [call[:2] for call in calls] == [("a", "CHECK"), ("b", "CHECK"), ("b", "DEL"), ("a", "DEL")]
    assert all(stdin["prevResult"]["dns"] == {"domain": "b"} for _, _, stdin in calls)
    assert stubs.runtime.cache == {}


def test_runtime_stops_at_the_first_failure(stubs: Stubs) -> None:
    """A plugin that fails ends ADD and DEL with its error; the cache is kept for the next DEL."""
    with pytest.raises(CniFailed) as failed:
        stubs.runtime.add(_list(fail="ADD"), "c", "/ns")
    assert (failed.value.code, failed.value.msg, failed.value.plugin) == (100, "as told", "b")
    stubs.runtime.add(_list(), "c", "/ns")
    stubs.calls()
    with pytest.raises(CniFailed):
        stubs.runtime.delete(_list(fail="DEL"), "c", "/ns")
    assert [call[:2] for call in stubs.calls()] == [("b", "DEL")]
    assert stubs.runtime.cache


def test_runtime_collects(stubs: Stubs) -> None:
    """GC: DEL for what is cached and not valid, then GC to every plugin, both spellings; failures last."""
    conflist = _list()
    for container_id in ("keep", "drop"):
        stubs.runtime.add(conflist, container_id, "/ns")
    stubs.calls()
    conflist["plugins"][0]["fail"] = "GC"
    with pytest.raises(CniFailed):
        stubs.runtime.gc(conflist, [("keep", "eth0")])
    calls = stubs.calls()
    assert [call[:2] for call in calls] == [("b", "DEL"), ("a", "DEL"), ("a", "GC"), ("b", "GC")]
    listed = [{"containerID": "keep", "ifname": "eth0"}]
    assert calls[-1][2]["cni.dev/valid-attachments"] == calls[-1][2]["cni.dev/attachments"] == listed


@pytest.mark.parametrize("path", sorted(BUILT_IN.glob("*.toml")), ids=lambda path: path.stem)
def test_built_in_profiles_load(path: Path) -> None:
    """Every built-in profile is valid and named like its file."""
    assert load_profile(path.stem).name == path.stem


@pytest.mark.parametrize(
    "data", [{}, {"name": "x", "type": "x"}, {"name": "x", "type": "x", "bin_dirs": [], "x": 1}]
)
def test_profiles_are_read_strictly(data: Json) -> None:
    """A missing or unknown key is an error that names the file."""
    with pytest.raises(ValueError, match="here: "):
        parse_profile(data, "here")
