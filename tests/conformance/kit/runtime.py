"""A container runtime's half of CNI: what libcni does with a network configuration list.

Follows the specification 1.1.0, section 3 ("Execution of network configurations"): name, cniVersion,
prevResult and the runtimeConfig of declared capabilities are injected; ADD and CHECK go in list order, DEL
in reverse; DEL and CHECK get the cached final result; GC first deletes what is cached and not valid.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .netns import Netns
from .plugin import CniFailed, Json, Outcome, invoke


def version_key(version: str) -> tuple[int, ...]:
    """A version as a tuple, for comparison."""
    return tuple(int(part) for part in version.split("."))


@dataclass(frozen=True)
class Attachment:
    """What the runtime remembers about one (network, container, interface)."""

    network: str
    container_id: str
    ifname: str
    netns: str
    conflist: Json
    runtime_config: Json
    args: str
    result: Json


@dataclass
class Runtime:
    """Runs conflists. ``bin_dirs`` is CNI_PATH; ``host`` the namespace plugins are executed in (None: ours).

    Safe to call from several threads for different containers. The cache is in memory: a test that wants
    a rebooted runtime makes a new one, or calls ``forget``.
    """

    bin_dirs: Sequence[Path]
    host: Netns | None = None
    timeout: float = 60
    cache: dict[tuple[str, str, str], Attachment] = field(default_factory=dict)

    def find(self, plugin_type: str) -> Path:
        """The plugin's executable: the first regular file of that name in ``bin_dirs``."""
        for directory in self.bin_dirs:
            if (directory / plugin_type).is_file():
                return directory / plugin_type
        raise FileNotFoundError(f"no CNI plugin {plugin_type!r} in {[str(d) for d in self.bin_dirs]}")

    def environment(
        self, command: str, container_id: str = "", netns: str = "", ifname: str = "", args: str = ""
    ) -> dict[str, str]:
        """The environment of one execution; like libcni, all variables are present even if empty."""
        return {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
            "CNI_PATH": ":".join(str(d) for d in self.bin_dirs),
        }

    def execute(self, config: Mapping[str, Any], env: Mapping[str, str]) -> Outcome:
        """One execution of ``config['type']`` with ``config`` on stdin."""
        return invoke(
            self.find(config["type"]), env, json.dumps(config).encode(), self.host, timeout=self.timeout
        )

    def plugin_config(
        self,
        conflist: Mapping[str, Any],
        plugin: Mapping[str, Any],
        runtime_config: Mapping[str, Any],
        prev_result: Mapping[str, Any] | None,
    ) -> Json:
        """The execution configuration that one plugin of the list gets on stdin."""
        config = dict(plugin, name=conflist["name"], cniVersion=conflist["cniVersion"])
        declared = {key for key, on in plugin.get("capabilities", {}).items() if on}
        chosen = {key: value for key, value in runtime_config.items() if key in declared}
        if chosen:
            config["runtimeConfig"] = chosen
        if prev_result is not None:
            config["prevResult"] = prev_result
        return config

    def add(
        self,
        conflist: Mapping[str, Any],
        container_id: str,
        netns: str | Path,
        ifname: str = "eth0",
        *,
        runtime_config: Mapping[str, Any] | None = None,
        args: str = "",
    ) -> Json:
        """ADD through the list; the final result. CniFailed at the first plugin that fails (a DEL is due)."""
        env = self.environment("ADD", container_id, str(netns), ifname, args)
        result: Json | None = None
        for plugin in conflist["plugins"]:
            config = self.plugin_config(conflist, plugin, runtime_config or {}, result)
            result = self._successful("ADD", plugin, self.execute(config, env)).json()
        assert result is not None, "a conflist needs a plugin"
        attachment = Attachment(
            conflist["name"],
            container_id,
            ifname,
            str(netns),
            dict(conflist),
            dict(runtime_config or {}),
            args,
            result,
        )
        self.cache[attachment.network, container_id, ifname] = attachment
        return result

    def delete(
        self,
        conflist: Mapping[str, Any],
        container_id: str,
        netns: str | Path,
        ifname: str = "eth0",
        *,
        runtime_config: Mapping[str, Any] | None = None,
        args: str | None = None,
        with_result: bool = True,
    ) -> None:
        """DEL in reverse order, with the cached result (``with_result=False``: as after a lost cache).

        ``runtime_config`` and ``args`` default to those of the ADD. CniFailed at the first that fails.
        """
        key = (conflist["name"], container_id, ifname)
        cached = self.cache.get(key)
        remembered = cached.runtime_config if cached else {}
        env = self.environment(
            "DEL", container_id, str(netns), ifname, (cached.args if cached else "") if args is None else args
        )
        since_040 = version_key(conflist["cniVersion"]) >= (0, 4, 0)
        result = cached.result if cached and with_result and since_040 else None
        for plugin in reversed(conflist["plugins"]):
            chosen = remembered if runtime_config is None else runtime_config
            config = self.plugin_config(conflist, plugin, chosen, result)
            self._silent("DEL", plugin, self.execute(config, env))
        self.cache.pop(key, None)

    def check(
        self, conflist: Mapping[str, Any], container_id: str, netns: str | Path, ifname: str = "eth0"
    ) -> None:
        """CHECK in order with the cached result (KeyError without an ADD). CniFailed if one objects."""
        if conflist.get("disableCheck"):
            return
        cached = self.cache[conflist["name"], container_id, ifname]
        env = self.environment("CHECK", container_id, str(netns), ifname, cached.args)
        for plugin in conflist["plugins"]:
            config = self.plugin_config(conflist, plugin, cached.runtime_config, cached.result)
            self._silent("CHECK", plugin, self.execute(config, env))

    def gc(self, conflist: Mapping[str, Any], valid: Iterable[tuple[str, str]]) -> None:
        """DEL what is cached and not valid, then GC to every plugin; raises the first failure at the end."""
        keep = {(container_id, ifname) for container_id, ifname in valid}
        failures: list[CniFailed] = []
        for attachment in list(self.cache.values()):
            identity = (attachment.container_id, attachment.ifname)
            if attachment.network != conflist["name"] or identity in keep:
                continue
            try:
                self.delete(conflist, attachment.container_id, attachment.netns, attachment.ifname)
            except CniFailed as error:
                failures.append(error)
        if version_key(conflist["cniVersion"]) >= (1, 1, 0) and not conflist.get("disableGC"):
            listed = [
                {"containerID": container_id, "ifname": ifname} for container_id, ifname in sorted(keep)
            ]
            extra = {"cni.dev/valid-attachments": listed, "cni.dev/attachments": listed}
            for plugin in conflist["plugins"]:
                config = self.plugin_config(conflist, plugin, {}, None) | extra
                try:
                    self._silent("GC", plugin, self.execute(config, self.environment("GC")))
                except CniFailed as error:
                    failures.append(error)
        if failures:
            raise failures[0]

    def status(self, conflist: Mapping[str, Any]) -> None:
        """STATUS to every plugin; CniFailed (code 50, 51) from the first that is not ready."""
        for plugin in conflist["plugins"]:
            config = self.plugin_config(conflist, plugin, {}, None)
            self._silent("STATUS", plugin, self.execute(config, self.environment("STATUS")))

    def forget(self) -> None:
        """Lose the cache, as a runtime does whose /var/lib/cni was a tmpfs."""
        self.cache.clear()

    def _successful(self, verb: str, plugin: Mapping[str, Any], outcome: Outcome) -> Outcome:
        if outcome.exit_code != 0:
            raise CniFailed(verb, plugin["type"], outcome)
        return outcome

    def _silent(self, verb: str, plugin: Mapping[str, Any], outcome: Outcome) -> None:
        """Success without output: anything on stdout of these verbs corrupts what callers parse."""
        self._successful(verb, plugin, outcome)
        assert not outcome.stdout.strip(), f"{verb} by {plugin['type']} printed {outcome.stdout[:300]!r}"
