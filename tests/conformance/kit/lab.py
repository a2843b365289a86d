"""What one test works with: sandboxes, networks with subnets of their own, and a leak check at its end."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..profile import NEEDS, Profile, expand
from .host import HOST4, HOST6, Host
from .netns import Netns
from .observe import bare
from .plugin import CniFailed, Json, Outcome, invoke
from .runtime import Runtime
from .traffic import echo, tcp_ask


@dataclass(frozen=True)
class Sandbox:
    """A container's namespace and its id."""

    ns: Netns
    id: str

    @property
    def path(self) -> str:
        """CNI_NETNS."""
        return str(self.ns.path)


def ips_of(result: Mapping[str, Any]) -> list[str]:
    """The addresses of a result of any version, without prefix lengths."""
    if "ips" in result:
        return [bare(entry["address"]) for entry in result["ips"]]
    return [bare(result[key]["ip"]) for key in ("ip4", "ip6") if key in result]


def without_empty_dns(result: Mapping[str, Any]) -> Json:
    """A result to compare: Go's plugins add an empty ``dns``, which means the same as none (trap 17)."""
    return {key: value for key, value in result.items() if key != "dns" or value}


class Lab:
    """A test's view of a host. ``close`` deletes all that it made, and looks for leaks."""

    _subnets = 0

    def __init__(self, host: Host) -> None:
        self.host = host
        self.profile: Profile = host.profile
        self.runtime: Runtime = host.runtime
        self._tag = uuid.uuid4().hex[:8]
        self._sandboxes: list[Sandbox] = []
        self._attempted: dict[tuple[str, str, str], tuple[Json, Sandbox, Json, str]] = {}
        self._networks = 0
        self._seen: set[str] = set()
        self._rules_touched = False
        self.links_before = host.link_names()

    # -- what to attach, and to what ------------------------------------------------------------------

    def sandbox(self) -> Sandbox:
        """A new, empty sandbox."""
        sandbox = Sandbox(self.host.netns("sandbox"), f"ct{self._tag}{len(self._sandboxes):04d}")
        self._sandboxes.append(sandbox)
        return sandbox

    def subnet4(self, prefix: int = 24) -> ipaddress.IPv4Network:
        """An IPv4 subnet that no other test uses: a plugin may keep a network after its last port."""
        Lab._subnets += 1
        base = ipaddress.ip_address("10.64.0.0") + Lab._subnets * 256
        return ipaddress.IPv4Network(f"{base}/{prefix}")

    def subnet6(self) -> ipaddress.IPv6Network:
        """An IPv6 /64 that no other test uses."""
        Lab._subnets += 1
        return ipaddress.IPv6Network(f"fd00:c0:{Lab._subnets:x}::/64")

    def ipam(self, *subnets: object, ranges: Sequence[Sequence[Json]] | None = None, **more: object) -> Json:
        """The profile's ipam section with a range set per subnet (or ``ranges``) and default routes."""
        sets = [[{"subnet": str(subnet)}] for subnet in subnets] if ranges is None else ranges
        families = {
            ipaddress.ip_network(one["subnet"], strict=False).version
            for group in sets
            for one in group
            if _is_network(one.get("subnet"))
        }
        routes = [{"dst": "0.0.0.0/0" if family == 4 else "::/0"} for family in sorted(families)]
        base: Json = expand(self.profile.ipam, self.host.where)
        return base | {"ranges": sets, "routes": routes} | more

    def network(
        self,
        *,
        ipam: Json | None = None,
        name: str = "",
        version: str = "",
        before: Sequence[Json] = (),
        after: Sequence[Json] = (),
        portmap: str = "",
        bandwidth: str = "",
        ingress_policy: str = "",
        **plugin: object,
    ) -> Json:
        """A conflist with the plugin under test.

        ``ipam``: a whole section (default: one new IPv4 subnet; ``{}``: none at all). ``portmap``,
        ``bandwidth``, ``ingress_policy`` name a variant of the profile. ``plugin``: further keys of its own.
        """
        self._networks += 1
        capabilities = dict(self.profile.config.get("capabilities", {}))
        chained: list[Json] = []
        for need, variant in zip(NEEDS, (portmap, bandwidth, ingress_policy), strict=True):
            if variant:
                chain = self.profile.needs[need][variant]
                capabilities |= chain.capabilities
                plugin = chain.config | plugin
                chained += chain.plugins
        self._rules_touched |= bool(portmap or plugin.get("ipMasq"))
        config: Json = expand(self.profile.config, self.host.where) | {
            "type": self.profile.type,
            "capabilities": capabilities,
        }
        section = self.ipam(self.subnet4()) if ipam is None else ipam
        if section:
            config["ipam"] = section
        plain = version or (
            self.profile.chain_version if before or after or chained else self.profile.version
        )
        return {
            "cniVersion": plain,
            "name": name or f"conf-{self._tag}-{self._networks}",
            "plugins": [*before, config | plugin, *chained, *after],
        }

    # -- verbs ----------------------------------------------------------------------------------------

    def add(
        self,
        network: Json,
        sandbox: Sandbox,
        ifname: str = "eth0",
        *,
        runtime_config: Json | None = None,
        args: str = "",
        netns: str = "",
    ) -> Json:
        """ADD; remembered, so that ``close`` sends the DEL that is due even after a failure."""
        key = (network["name"], sandbox.id, ifname)
        self._attempted.setdefault(key, (network, sandbox, runtime_config or {}, args))
        result = self.runtime.add(
            network, sandbox.id, netns or sandbox.path, ifname, runtime_config=runtime_config, args=args
        )
        self._seen.update(ips_of(result))
        return result

    def refused(
        self,
        network: Json,
        sandbox: Sandbox,
        ifname: str = "eth0",
        *,
        args: str = "",
        **runtime_config: object,
    ) -> CniFailed:
        """An ADD that has to fail; its error. AssertionError if it succeeds or prints no error object."""
        try:
            result = self.add(network, sandbox, ifname, runtime_config=dict(runtime_config), args=args)
        except CniFailed as failure:
            failure.outcome.error()
            return failure
        raise AssertionError(f"ADD was not refused: {result}")

    def delete(
        self,
        network: Json,
        sandbox: Sandbox,
        ifname: str = "eth0",
        *,
        netns: str | None = None,
        with_result: bool = True,
    ) -> None:
        """DEL with all that the runtime remembers (less the result); ``netns=""`` as after a reboot."""
        path = sandbox.path if netns is None else netns
        self.runtime.delete(network, sandbox.id, path, ifname, with_result=with_result)
        self._attempted.pop((network["name"], sandbox.id, ifname), None)

    def check(self, network: Json, sandbox: Sandbox, ifname: str = "eth0") -> None:
        """CHECK with the cached result."""
        self.runtime.check(network, sandbox.id, sandbox.path, ifname)

    def raw(self, config: Mapping[str, Any] | bytes, **env: str | None) -> Outcome:
        """One execution of the plugin under test, by hand; ``env`` gives CNI_* (None: leave it out)."""
        whole = self.runtime.environment("")
        for key, value in env.items():
            name = f"CNI_{key.upper()}"
            whole.pop(name, None)
            if value is not None:
                whole[name] = value
        stdin = config if isinstance(config, bytes) else self.stdin(config)
        return invoke(self.runtime.find(self.profile.type), whole, stdin, self.host.ns)

    @staticmethod
    def stdin(config: Mapping[str, Any]) -> bytes:
        """A configuration as a plugin reads it."""
        return json.dumps(config).encode()

    def config_of(self, network: Json, **more: object) -> Json:
        """The execution configuration of the plugin under test in ``network``, as if it were called first."""
        plugin = next(one for one in network["plugins"] if one["type"] == self.profile.type)
        return self.runtime.plugin_config(network, plugin, {}, None) | more

    # -- what is left ---------------------------------------------------------------------------------

    def leaks(self, *needles: str) -> list[str]:
        """What the host still holds of ``needles`` (ids, addresses), and links that were not there before."""
        found = [f"link {name}" for name in sorted(self.host.link_names() - self.links_before)]
        state = self.host.state_text()
        rules = self.host.ruleset() if self._rules_touched else ""
        for needle in needles:
            word = re.compile(rf"(?<![\w.:]){re.escape(needle)}(?![\w.:])")
            found += [f"record: {line}" for line in state.splitlines() if word.search(line)]
            found += [f"rule: {line.strip()}" for line in rules.splitlines() if word.search(line)]
        return found

    def close(self) -> None:
        """Delete all attachments and sandboxes; AssertionError listing what DEL refused and what leaked."""
        problems: list[str] = []
        if self.host.daemon is not None:
            self.host.daemon.start()
        for (name, _, ifname), (network, sandbox, runtime_config, args) in reversed(self._attempted.items()):
            try:
                self.runtime.delete(
                    network, sandbox.id, sandbox.path, ifname, runtime_config=runtime_config, args=args
                )
            except (CniFailed, AssertionError) as failure:
                problems.append(f"DEL of {name} {sandbox.id} {ifname}: {failure}")
        # Before the sandboxes go: the kernel would tidy up after a DEL that left its links.
        problems += self.leaks(*(sandbox.id for sandbox in self._sandboxes), *sorted(self._seen))
        for sandbox in self._sandboxes:
            with contextlib.suppress(OSError):
                sandbox.ns.delete()
        assert not problems, "left over: " + "\n".join(problems)


def assert_works(lab: Lab, sandbox: Sandbox, result: Json) -> None:
    """The host reaches the sandbox on each of its addresses, and the sandbox reaches the host."""
    for address in ips_of(result):
        here = HOST4 if ipaddress.ip_address(address).version == 4 else HOST6
        with echo(sandbox.ns, address) as inside:
            assert tcp_ask(lab.host.ns, address, inside.port) == b"hello"
        with echo(lab.host.ns, here) as outside:
            assert tcp_ask(sandbox.ns, here, outside.port, source=address) == b"hello"


def _is_network(text: object) -> bool:
    try:
        ipaddress.ip_network(str(text), strict=False)
    except ValueError:
        return False
    return True
