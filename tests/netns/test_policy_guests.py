"""Policy's truth table with guests and containers side by side: each to each, to the world and from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.guest_lab import guest
from tests.netns.policy_lab import WEB, Probe, listening

pytestmark = pytest.mark.netns

#: Pods with app=client open TCP 80, to app=web and to the world, and nothing else.
FENCED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: fenced}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 80}]
  - to: [{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: "2001:db8::/64"}}]
    ports: [{port: 80}]
"""
APPS = ("client", "web", "other")
PORTS = (80, 81)


def allowed(source: str, destination: str, port: int) -> bool:
    """What the two policies say of an app, or the world, to another."""
    out = source != "client" or (destination in {"web", "world"} and port == 80)
    into = destination != "web" or (source == "client" and port == 80)
    return out and into


def test_who_reaches_whom(
    daemon: Daemon,
    world: TestNetns,
    sandboxes: SandboxFactory,
    netns_factory: Callable[[], TestNetns],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """A container and a guest of each app: whichever of the two stands on a side, the verdict is the same."""
    with ExitStack() as stack:
        parties: dict[tuple[str, str], Sandbox] = {}
        for app in APPS:
            parties[app, "container"] = sandboxes(labels={"app": app})
            box, inside = sandboxes(labels={"app": app}, model="tcfilter"), netns_factory()
            stack.enter_context(guest(box.ns, inside, box.port))
            parties[app, "guest"] = Sandbox(inside, box.port)
        for route in ("10.77.0.0/24 via 192.0.2.2", "fd00:77::/64 via 2001:db8::2"):
            world.run(["ip", "route", "add", *route.split()])
        ends = {key: (party.ip4, party.ip6) for key, party in parties.items()}
        ends["world", "world"] = (WORLD4, WORLD6)
        parties["world", "world"] = Sandbox(world, parties["other", "container"].port)
        for party, port in itertools.product(parties.values(), PORTS):
            stack.enter_context(listening(party.ns, port))
        for number, text in enumerate((WEB, FENCED)):
            file = tmp_path / f"{number}.yaml"
            file.write_text(text)
            daemon.cli("policy", "apply", "-f", str(file))

        probe, wrong, asked = Probe(daemon), [], 0
        for (source, destination), port in itertools.product(itertools.permutations(parties, 2), PORTS):
            for address in ends[destination]:
                asked += 1
                said = probe.reaches(parties[source], address, port)
                if said != allowed(source[0], destination[0], port):
                    wrong.append(f"{source} to {destination} {address}:{port} is {said}")
    record_property("verdicts", asked)
    assert asked == 168
    assert not wrong, "\n".join(wrong)
