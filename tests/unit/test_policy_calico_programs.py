"""Calico's policy programs (tests/data/policy/calico_programs.json) through manifests and the engine.

Each program is written as Calico manifests, read as a user's would be, and asked about each of its packets,
once for ingress and once for egress: a rule's source and destination are the packet's, whichever of them is
the selected side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from portwright.policy.engine import Decision, Engine, Implicit
from portwright.policy.manifests.calico import V3
from portwright.policy.manifests.read import Manifests, read
from portwright.policy.rules import Action, Direction, Endpoint, EndpointKind, Flow, Snapshot

DATA: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "data" / "policy" / "calico_programs.json").read_text()
)

#: The endpoint that every policy of a program selects. It has no address, so that no built-in rule speaks.
SUBJECT: Final = Endpoint(name="subject", labels={"role": "subject"})
#: What no policy decided. A program without a profile denies it.
UNDECIDED: Final = frozenset({Implicit.NO_POLICY, Implicit.ALL_PASSED})

PACKET = re.compile(
    r"(?P<protocol>tcp|udp|icmp|[0-9]+) (?:(?P<type>[0-9]+)/(?P<code>[0-9]+) )?"
    r"(?P<source>\S+) > (?P<target>\S+)"
    r"(?: was (?P<before>\S+))?(?: (?P<host>to-host|from-host))?"
)
PROTOCOLS: Final = {"tcp": 6, "udp": 17, "icmp": 1}


def socket_address(text: str) -> tuple[str, int | None]:
    """(address, port) of ``10.0.0.1:80``, ``[fd00::1]:80`` or an address alone."""
    found = re.fullmatch(r"\[(.+)\]:([0-9]+)|([0-9.]+):([0-9]+)|(\S+)", text)
    assert found is not None
    address, port = found[1] or found[3] or found[5], found[2] or found[4]
    return address, int(port) if port else None


def flow(text: str, *, before_translation: bool = False) -> Flow:
    """The packet that a line of the corpus is; ``before_translation``: to what its sender meant."""
    found = PACKET.fullmatch(text)
    assert found is not None, text
    source, source_port = socket_address(found["source"])
    target = found["before"] if before_translation and found["before"] else found["target"]
    destination, port = socket_address(target)
    return Flow(
        source=source,
        destination=destination,
        protocol=PROTOCOLS.get(found["protocol"]) or int(found["protocol"]),
        source_port=source_port,
        port=port,
        icmp_type=int(found["type"]) if found["type"] else None,
        icmp_code=int(found["code"]) if found["code"] else None,
    )


def document(kind: str, name: str, spec: dict[str, Any], labels: dict[str, str] | None = None) -> str:
    """One manifest of Calico's."""
    return json.dumps(
        {"apiVersion": V3, "kind": kind, "metadata": {"name": name, "labels": labels or {}}, "spec": spec}
    )


def tier_documents(tiers: list[dict[str, Any]], direction: Direction, **flags: bool) -> list[str]:
    """Tiers in order, each with its policies in order, for the subject in one direction."""
    documents: list[str] = []
    for place, tier in enumerate(tiers):
        spec = {"order": place, "defaultAction": tier["default"]}
        documents.append(document("Tier", f"tier-{place}", spec))
        for order, rules in enumerate(tier["policies"]):
            spec = {
                "tier": f"tier-{place}",
                "order": order,
                "selector": "role == 'subject'",
                "types": [direction.capitalize()],
                direction.value: rules,
                **flags,
            }
            documents.append(document("GlobalNetworkPolicy", f"policy-{place}-{order}", spec))
    return documents


def load(program: dict[str, Any], direction: Direction) -> Manifests:
    """The program's manifests, as read."""
    documents = tier_documents(program["tiers"], direction)
    for name, nets in program.get("sets", {}).items():
        documents.append(document("GlobalNetworkSet", name, {"nets": nets}, {"set": name}))
    for number, port in enumerate(program.get("named_ports", [])):
        named = {key: port[key] for key in ("name", "protocol", "port")}
        spec = {"node": "n", "expectedIPs": [port["address"]], "ports": [named]}
        documents.append(document("HostEndpoint", f"host-{number}", spec))
    return read([("program.yaml", "\n---\n".join(documents))])


def verdicts(program: dict[str, Any], judge: Callable[[Flow], Decision]) -> tuple[list[str], list[str]]:
    """(the packets that pass, those that don't); a packet that no policy decides passes by the profile."""
    passed: list[str] = []
    stopped: list[str] = []
    for packet in program.get("allowed", []) + program.get("denied", []):
        decision = judge(flow(packet))
        undecided = decision.implicit in UNDECIDED
        allowed = program.get("profile", True) if undecided else decision.allowed
        (passed if allowed else stopped).append(packet)
    return passed, stopped


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("program", DATA["programs"], ids=lambda program: program["name"])
def test_program(program: dict[str, Any], direction: Direction) -> None:
    """Exactly the packets pass that the corpus says, seen from either side."""
    manifests = load(program, direction)
    engine = Engine(manifests.policy_set, manifests.snapshot)

    passed, stopped = verdicts(program, lambda packet: engine.decide(SUBJECT, direction, packet))

    assert (passed, stopped) == (program.get("allowed", []), program.get("denied", []))


def test_programs_behind_a_tier_that_passes() -> None:
    """A tier of rules that match nothing, and one that passes, changes no verdict of any program."""
    idle = [
        {
            "action": action,
            "protocol": "TCP",
            "source": {"selector": "set == 'none'"},
            "destination": {"ports": [f"1:{port}"]},
        }
        for port, action in enumerate(("Allow", "Deny", "Pass") * 20, start=1000)
    ]
    before = {"default": "Deny", "policies": [idle, [*idle, {"action": "Pass"}]]}

    def wrong(program: dict[str, Any]) -> bool:
        manifests = load({**program, "tiers": [before, *program["tiers"]]}, Direction.INGRESS)
        engine = Engine(manifests.policy_set, manifests.snapshot)
        passed, _ = verdicts(program, lambda packet: engine.decide(SUBJECT, Direction.INGRESS, packet))
        expected: list[str] = program.get("allowed", [])
        return passed != expected

    assert [program["name"] for program in DATA["programs"] if wrong(program)] == []


def test_the_corpus_is_whole(record_property: Callable[[str, object], None]) -> None:
    """85 programs of one endpoint, 3 untracked and 9 of host interfaces, with at least 500 verdicts."""
    counts = {part: len(DATA[part]) for part in ("programs", "untracked", "host")}
    packets = sum(
        len(program.get(kind, []))
        for part in counts
        for program in DATA[part]
        for kind in ("allowed", "denied", "unmatched")
    )
    record_property("calico_program_verdicts", packets)

    assert counts == {"programs": 85, "untracked": 3, "host": 9}
    assert packets >= 500


@pytest.mark.parametrize("program", DATA["untracked"], ids=lambda program: program["name"])
def test_untracked_program(program: dict[str, Any]) -> None:
    """An untracked policy allows, denies, or says nothing of a packet, which then goes on."""
    documents = tier_documents(program["tiers"], Direction.INGRESS, doNotTrack=True, applyOnForward=True)
    manifests = read([("untracked.yaml", "\n---\n".join(documents))])
    assert [policy.do_not_track for policy in manifests.policy_set.policies] == [True]
    judge = stage(manifests)
    found: dict[str, list[str]] = {"allowed": [], "denied": [], "unmatched": []}

    for packet in (packet for kind in found for packet in program.get(kind, [])):
        decided = judge(flow(packet))
        found["unmatched" if decided is None else "allowed" if decided is Action.ALLOW else "denied"].append(
            packet
        )

    assert found == {kind: program.get(kind, []) for kind in found}


def stage(manifests: Manifests) -> Callable[[Flow], Action | None]:
    """What the rules of one stage of a host's interface say of a packet; None if no rule decides.

    The flags that put a policy in its stage are taken off here, since a stage is judged by itself.
    """
    policies = tuple(
        msgspec.structs.replace(policy, do_not_track=False, pre_dnat=False, apply_on_forward=False)
        for policy in manifests.policy_set.policies
    )
    host = msgspec.structs.replace(SUBJECT, kind=EndpointKind.HOST)
    engine = Engine(msgspec.structs.replace(manifests.policy_set, policies=policies), Snapshot())

    def judge(packet: Flow) -> Action | None:
        decision = engine.judge(host, Direction.INGRESS, packet)
        return decision.verdict if decision.rule or decision.implicit is Implicit.TIER_DEFAULT else None

    return judge


def host_verdict(program: dict[str, Any]) -> Callable[[str], bool]:
    """The verdict on a line of the corpus: the stages in Calico's order, each decided by the engine.

    Pre-DNAT policies see the target before translation, and what they allow is allowed. Then traffic of the
    host itself is subject to its own policies, then its profiles, then denied; forwarded traffic to those
    that apply to it. At a workload's interface the workload's policies come in place of the host's own.
    """

    def of(tiers: list[dict[str, Any]], **flags: bool) -> Callable[[Flow], Action | None]:
        documents = tier_documents(tiers, Direction.INGRESS, **flags)
        return stage(read([("host.yaml", "\n---\n".join(documents))]))

    pre_dnat = of(program["pre_dnat"], preDNAT=True, applyOnForward=True)
    forward = of(program["forward"], applyOnForward=True)
    own = of([*program["own"], {"default": "Pass", "policies": program["profiles"]}])
    workload = None if program["workload"] is None else of(program["workload"])

    def verdict(packet: str) -> bool:
        before = pre_dnat(flow(packet, before_translation=True))
        after = flow(packet)
        if before is Action.DENY:
            return False
        if before is None:
            local = packet.endswith("-host")
            if local and workload is None:
                return own(after) is Action.ALLOW
            if not local and forward(after) is Action.DENY:
                return False
        return workload is None or workload(after) is Action.ALLOW

    return verdict


@pytest.mark.parametrize("program", DATA["host"], ids=lambda program: program["name"])
def test_host_program(program: dict[str, Any]) -> None:
    """At a host's interface, stage by stage, exactly the packets pass that the corpus says."""
    verdict = host_verdict(program)
    packets = program["allowed"] + program["denied"]

    passed = [packet for packet in packets if verdict(packet)]

    assert passed == program["allowed"]
