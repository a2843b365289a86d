"""The doctor: everything worth saying about this host, the kernel and our own state. It changes nothing."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterable
from typing import Literal, NamedTuple

from portwright.kernel import rtnl, sysctl
from portwright.kernel.bpf import features
from portwright.model.errors import KernelFailed, PortwrightError
from portwright.node import bridges
from portwright.node.core import Core
from portwright.node.domains import TROUBLE, summary
from portwright.node.health import Health
from portwright.node.steer import is_steered
from portwright.node.switch import Switch


class Finding(NamedTuple):
    """One check of the doctor."""

    name: str
    ok: bool
    level: Literal["error", "warning", "info"]
    detail: str
    way_out: str


def examine(core: Core, health: Health) -> list[Finding]:
    """All checks, of our own namespace where they are of one."""
    switch = core.switch_for()
    return [
        _forwarding(),
        *_tools(),
        _uplink(switch),
        _data_path(health),
        _policy_folder(core, health),
        _host_endpoints(core, health),
        _journal(core),
        _leaks(health),
        *_pools(core),
        _look_ups(core),
        _bridges(switch),
        *_host_chains(switch, steered=is_steered(core.store, switch)),
    ]


def probed() -> list[features.Feature]:
    """What this kernel can do for us; probed once, then remembered."""
    return features.all()


def _forwarding() -> Finding:
    return Finding(
        "forwarding",
        _read("net/ipv4/ip_forward") == "1" and _read("net/ipv6/conf/all/forwarding") == "1",
        "warning",
        "IPv4 and IPv6 forwarding of the host",
        "it is switched on with the first port; if it stays off, look for a sysctl.d that resets it",
    )


def _read(path: str) -> str:
    try:
        return sysctl.read(path)
    except KernelFailed:
        return ""


def _tools() -> list[Finding]:
    return [
        Finding(
            f"tool {tool}",
            shutil.which(tool) is not None,
            "info",
            "for people, not for the daemon",
            f"apt-get install the package of {tool}",
        )
        for tool in ("nft", "ip", "bpftool")
    ]


def _uplink(switch: Switch) -> Finding:
    uplinks = []
    for name, family in (("IPv4", socket.AF_INET), ("IPv6", socket.AF_INET6)):
        link = rtnl.default_uplink(switch.rtnl, family)
        uplinks.append(f"{name}: {link.name} mtu {link.mtu}" if link else f"{name}: none")
    return Finding(
        "uplink",
        "mtu" in " ".join(uplinks),
        "warning",
        ", ".join(uplinks),
        "add a default route for ports to reach the world",
    )


def _data_path(health: Health) -> Finding:
    impaired = health.impaired()
    return Finding(
        "data path",
        not impaired,
        "error",
        impaired[0] if impaired else "all attached ports have their programs and map entries",
        "portwright port unplug and plug the port",
    )


def _policy_folder(core: Core, health: Health) -> Finding:
    behind = health.policy_folder()
    return Finding(
        "policy folder",
        not behind,
        "error",
        behind[0] if behind else core.policies.folder.path or "none is watched",
        "mend what it names: what was in force before stays in force until then",
    )


def _host_endpoints(core: Core, health: Health) -> Finding:
    unbound = health.host_endpoints()
    bound = core.policies.host_endpoints()
    return Finding(
        "host endpoints",
        not unbound,
        "error",
        unbound[0] if unbound else "; ".join(bound) or "none of this node's is on record",
        "mend what it names: what was in force before stays in force until then",
    )


def _journal(core: Core) -> Finding:
    pending = core.store.pending()
    return Finding(
        "journal",
        not pending,
        "error",
        f"{len(pending)} operations are unfinished",
        "restart the daemon: it finishes or takes them back",
    )


def _leaks(health: Health) -> Finding:
    try:
        leaks = health.leaks()
    except PortwrightError as error:
        return Finding("leaks", False, "error", str(error), "")
    detail = (
        f"{leaks[0].kind} {leaks[0].what}: {leaks[0].why}" if leaks else "record, namespaces and kernel agree"
    )
    return Finding("leaks", not leaks, "warning", detail, "portwright port delete, or CNI GC")


def _pools(core: Core) -> list[Finding]:
    findings = []
    now = time.time()
    for network in core.store.networks():
        for number, usage in enumerate(core.store.usage_by_set(network.name, now=now)):
            free = usage.total - usage.used - usage.resting
            findings.append(
                Finding(
                    f"pool {network.name}[{number}]",
                    free > 0,
                    "error",
                    f"{usage.used} in use, {usage.resting} resting, {free} free",
                    "add a range to the network, or release ports",
                )
            )
    return findings


def _look_ups(core: Core) -> Finding:
    return Finding(
        "look-ups of domain names",
        not any(count for word, count in core.look_ups.items() if word in TROUBLE),
        "info",
        summary(core),
        "docs/policy.md, Domain names, has the bounds; the log says which look-up met which",
    )


def _bridges(switch: Switch) -> Finding:
    depend = bridges.dependants(switch)
    said = "; ".join(
        f"{name}: " + ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in sorted(counts.items()))
        for name, counts in sorted(depend.items())
    )
    first = next(iter(sorted(depend)), "")
    return Finding(
        "bridges",
        not depend,
        "info",
        said or "no sandbox depends on a bridge",
        f"move them while they run: portwright port migrate --bridge {first} --dry-run says how",
    )


def dropping(switch: Switch, hook: str) -> list[str]:
    """Base chains of nftables at a hook (iptables-nft's too) that drop what no rule of theirs accepts."""
    return _dropping(switch.nft.run_json("list chains"), hook)


def _dropping(chains: Iterable[dict[str, object]], hook: str) -> list[str]:
    return [
        f"{c.get('family')} {c.get('table')} {c.get('name')}"
        for entry in chains
        if isinstance(c := entry.get("chain"), dict) and c.get("hook") == hook and c.get("policy") == "drop"
    ]


def _host_chains(switch: Switch, *, steered: bool) -> list[Finding]:
    """A foreign FORWARD chain with policy drop (Docker's) stops all that leaves the host.

    One of INPUT (ufw's) stops look-ups that are steered to the proxy.
    """
    try:
        chains = switch.nft.run_json("list chains")
    except PortwrightError as error:
        return [Finding("nftables", False, "error", str(error), "load nf_tables, or install nftables")]
    bad, closed = (_dropping(chains, hook) for hook in ("forward", "input"))
    refusing = [
        Finding(
            "input policy",
            False,
            "warning",
            f"drops by default: {', '.join(closed)}; ports whose policy names domains look names up here",
            "accept TCP and UDP to port 53 from pw* devices there: we never touch a chain that isn't ours",
        )
    ]
    return [
        *(refusing if steered and closed else ()),
        Finding(
            "forward policy",
            not bad,
            "warning",
            f"drops by default: {', '.join(bad)}" if bad else "no chain drops forwarded packets by default",
            "accept traffic of pw* devices there: we never touch a chain that isn't ours",
        ),
    ]
