"""What would change for the host's own interfaces, said before it does; then the packets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portwright.model.port import PortMapping
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import listening
from tests.netns.test_policy_hosts import FORWARD, PRE_DNAT, UNTRACKED, HostProbe, host, policy
from tests.netns.test_policy_whatif import moved, run, written

pytestmark = pytest.mark.netns

PORTS = (22, 80, 81)
#: By what the rows call them.
WORLD, HOST, BOX = "any other address", "host/uplink", "default/box"
ENDPOINT = host(expectedIPs=f"['{HOST4}', '{HOST6}']")
#: By the flags: the flags of the spec, and what a policy says; each denies and allows something.
STAGES = {
    "local": (
        "",
        "types: [Ingress, Egress]\ningress: [{action: Deny, protocol: TCP, destination: {ports: [80]}}]",
    ),
    "forward": (
        FORWARD,
        "types: [Ingress, Egress]\n"
        "ingress: [{action: Allow, protocol: TCP, destination: {ports: [80]}}]\n"
        "egress: [{action: Allow, protocol: TCP, destination: {ports: [81]}}]",
    ),
    "pre-dnat": (
        PRE_DNAT,
        "types: [Ingress]\ningress: [{action: Deny, protocol: TCP, destination: {ports: [81]}}]",
    ),
    "untracked": (
        UNTRACKED,
        "types: [Ingress]\ningress: [{action: Deny, protocol: TCP, destination: {ports: [22, 80]}}]",
    ),
}
OPEN = policy("open", "types: [Ingress, Egress]\ningress: [{action: Allow}]\negress: [{action: Allow}]")


class Lab:
    """The host, the world behind its uplink and a sandbox, which listen; and who of them reaches whom."""

    def __init__(self, daemon: Daemon, world: TestNetns, box: Sandbox) -> None:
        self._probe = HostProbe(daemon)
        self._ns = {WORLD: world, HOST: daemon.host, BOX: box.ns}
        self._addresses = {WORLD: (WORLD4, WORLD6), HOST: (HOST4, HOST6), BOX: (box.ip4, box.ip6)}

    def table(self) -> dict[str, bool]:
        """By ``source > target port/family``, of the pairs that pass the uplink."""
        return {
            f"{source} > {target} {port}/{family}": self._probe.reaches(ns, address, port)
            for source, ns in self._ns.items()
            for target, addresses in self._addresses.items()
            if (source == WORLD) != (target == WORLD)
            for family, address in zip((4, 6), addresses, strict=True)
            for port in PORTS
        }


@contextmanager
def lab(daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory) -> Iterator[Lab]:
    """With their listeners."""
    box = sandboxes(name="box", labels={"app": "box"})
    for address in (HOST4, HOST6):
        world.run(["ip", "route", "add", "default", "via", address])
    with ExitStack() as stack:
        for ns in (world, daemon.host, box.ns):
            for port in PORTS:
                stack.enter_context(listening(ns, port))
        yield Lab(daemon, world, box)


def told(changes: dict[str, Any]) -> dict[str, bool]:
    """What the rows say of these pairs."""
    assert (changes["more_rows"], changes["more_pairs"], changes["counted"]) == (0, 0, True)
    found: dict[str, bool] = {}
    for row in changes["rows"]:
        services = ", ".join(row["services"])
        but = services.startswith("all but ")
        for port in PORTS:
            if services not in {"any", "tcp"} and (f"tcp {port}" in services) == but:
                continue
            for source in {WORLD, HOST, BOX} & {*row["from"]}:
                for target in {WORLD, HOST, BOX} & {*row["to"]}:
                    # Ports' own rows are of other interfaces, where an endpoint has its say.
                    if BOX in (source, target) and row["via"] != HOST:
                        continue
                    found |= {
                        f"{source} > {target} {port}/{family}": row["allowed"] for family in row["families"]
                    }
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_tells_what_then_happens(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, tmp_path: Path, stage: str
) -> None:
    """Of the endpoint itself, of a policy of each stage, and of the end of both: just the pairs whose packets
    then fare otherwise, between the world and the host, and the world and a port, by the endpoint; nothing
    changes before."""
    flags, body = STAGES[stage]
    endpoint = written(
        tmp_path / "host.yaml",
        ENDPOINT
        + policy("open", "types: [Ingress, Egress]\ningress: [{action: Allow}]\negress: [{action: Allow}]"),
    )
    file = written(tmp_path / "policy.yaml", policy(f"a-{stage}", body, flags=flags))
    with lab(daemon, world, sandboxes) as there:
        before = there.table()
        assert all(before.values())
        for args in (
            ("apply", "-f", endpoint),
            ("apply", "-f", file),
            ("delete", "-f", file),
            ("delete", "-f", endpoint),
        ):
            dry = run(daemon, "policy", args[0], "--dry-run", *args[1:])
            assert there.table() == before
            run(daemon, "policy", *args)
            after = there.table()
            assert told(dry["changes"]) == moved(before, after)
            assert moved(before, after) or endpoint in args
            before = after


@pytest.mark.parametrize("stage", STAGES)
def test_a_staged_host_policy(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, tmp_path: Path, stage: str
) -> None:
    """Staged with any of the host's flags it changes no packet, and says what it would change; enforced, that
    is what changes; a staged deletion says the way back."""
    flags, body = STAGES[stage]
    text = policy(f"a-{stage}", body, flags=flags)
    kind = ("kind: GlobalNetworkPolicy", "kind: StagedGlobalNetworkPolicy")
    staged = written(tmp_path / "staged.yaml", text.replace(*kind))
    file = written(tmp_path / "policy.yaml", text)
    deletion = f"apiVersion: projectcalico.org/v3\n{kind[1]}\nmetadata: {{name: a-{stage}}}\n"
    deletion += "spec: {stagedAction: Delete}\n"
    run(daemon, "policy", "apply", "-f", written(tmp_path / "host.yaml", ENDPOINT + OPEN))
    with lab(daemon, world, sandboxes) as there:
        before = there.table()
        run(daemon, "policy", "apply", "-f", staged)
        assert there.table() == before
        [found] = run(daemon, "policy", "staged")["staged"]
        assert (found["effect"], found["refused"]) == (f"adds GlobalNetworkPolicy a-{stage}", "")
        run(daemon, "policy", "apply", "-f", file)
        after = there.table()
        assert told(found["changes"]) == moved(before, after)
        assert moved(before, after)
        run(daemon, "policy", "delete", "-f", staged)
        run(daemon, "policy", "apply", "-f", written(tmp_path / "gone.yaml", deletion))
        [found] = run(daemon, "policy", "staged")["staged"]
        run(daemon, "policy", "delete", "-f", file)
        assert told(found["changes"]) == moved(after, there.table())


def test_what_host_endpoints_cannot_have_is_said_of_a_staged_policy(daemon: Daemon, tmp_path: Path) -> None:
    """A staged policy that `apply` would refuse says why; the endpoint stays as it is."""
    names = policy(
        "names", "types: [Egress]\negress: [{action: Allow, destination: {domains: [example.com]}}]"
    )
    staged = names.replace("kind: Global", "kind: StagedGlobal")
    run(daemon, "policy", "apply", "-f", written(tmp_path / "h.yaml", ENDPOINT + staged))
    [found] = run(daemon, "policy", "staged")["staged"]
    assert "look-ups are not followed" in found["refused"]
    assert found["changes"]["rows"] == []


def test_the_table_for_people(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, tmp_path: Path
) -> None:
    """A column says which endpoint a row is of, where one is, and what a published port is outside."""
    sandboxes(name="box", port_mappings=[PortMapping(host_port=8080, container_port=80)])
    flags, body = STAGES["pre-dnat"]
    file = written(tmp_path / "p.yaml", ENDPOINT + policy("pre", body.replace("81", "8080"), flags=flags))
    table = daemon.cli("policy", "apply", "--dry-run", "-f", file).stdout.partition("\n\n")[2].splitlines()
    assert table[0].split() == ["BECOMES", "FROM", "TO", "VIA", "SERVICES", "IP", "BEFORE", "AFTER"]
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in table[1:]]
    told = {tuple(row[:5]): row[-1] for row in rows}
    rule = next(n for n, line in enumerate(Path(file).read_text().splitlines(), 1) if "action: Deny" in line)
    why = f"pre-dnat ingress pre rule 1 {file}:{rule}"
    assert told["denied", WORLD, BOX, f"{HOST} tcp 8080", "tcp 80"] == why
    assert told["denied", WORLD, BOX, HOST, "tcp 8080"] == why


@pytest.mark.parametrize("stage", ["pre-dnat", "forward"])
def test_a_published_port(
    daemon: Daemon, world: TestNetns, sandboxes: SandboxFactory, tmp_path: Path, stage: str
) -> None:
    """What a dry run says of the number on the host is what its packets then do: denied before translation by
    that, or routed to the sandbox by its own."""
    probe = HostProbe(daemon)
    body = {
        "pre-dnat": STAGES["pre-dnat"][1].replace("81", "8080"),
        "forward": STAGES["forward"][1].replace("[80]", "[82]"),
    }[stage]
    file = written(tmp_path / "p.yaml", policy("closed", body, flags=STAGES[stage][0]))
    box = sandboxes(
        name="box", port_mappings=[PortMapping(host_port=p, container_port=80) for p in (8080, 8081)]
    )
    run(daemon, "policy", "apply", "-f", written(tmp_path / "host.yaml", ENDPOINT + OPEN))
    with listening(box.ns, 80):

        def table() -> dict[str, bool]:
            return {
                f"{HOST} tcp {port}/{family}": probe.reaches(world, address, port)
                for port in (8080, 8081)
                for family, address in ((4, HOST4), (6, HOST6))
            }

        before = table()
        dry = run(daemon, "policy", "apply", "--dry-run", "-f", file)
        run(daemon, "policy", "apply", "-f", file)
        after = table()
    found = {
        f"{row['via']}/{family}": row["allowed"]
        for row in dry["changes"]["rows"]
        if row["to"] == [BOX] and row["services"] == ["tcp 80"] and "tcp" in row["via"]
        for family in row["families"]
    }
    assert found == moved(before, after)
    assert found
