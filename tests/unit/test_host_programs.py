"""Calico's programs of host interfaces (tests/data/policy/calico_programs.json), by host endpoints' judge."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from portwright.policy.host.judge import Judge
from portwright.policy.manifests.read import read
from portwright.policy.rules import (
    Action,
    Direction,
    EndpointKind,
    Policy,
    PolicySet,
    Snapshot,
    Tier,
)
from tests.unit.test_policy_calico_programs import DATA, SUBJECT, flow, stage, tier_documents


def together(**parts: list[dict[str, Any]]) -> PolicySet:
    """The policies of several stages in one set; each part's tiers are its own, in the parts' order."""
    flags = {
        "pre_dnat": {"preDNAT": True, "applyOnForward": True},
        "forward": {"applyOnForward": True},
    }
    tiers: list[Tier] = []
    policies: list[Policy] = []
    for part, written in parts.items():
        documents = tier_documents(written, Direction.INGRESS, **flags.get(part, {}))
        found = read([(f"{part}.yaml", "\n---\n".join(documents))]).policy_set
        used = {policy.tier for policy in found.policies}
        for tier in sorted((t for t in found.tiers if t.name in used), key=lambda t: (t.order, t.name)):
            tiers.append(msgspec.structs.replace(tier, name=f"{part} {tier.name}", order=float(len(tiers))))
        policies += [msgspec.structs.replace(p, tier=f"{part} {p.tier}") for p in found.policies]
    return PolicySet(tiers=tuple(tiers), policies=tuple(policies))


@pytest.mark.parametrize("program", DATA["host"], ids=lambda program: program["name"])
def test_host_program_by_the_judge_of_host_endpoints(program: dict[str, Any]) -> None:
    """The judge puts the stages together by itself, and says the same of each packet."""
    host = msgspec.structs.replace(SUBJECT, kind=EndpointKind.HOST)
    own = [*program["own"], {"default": "Pass", "policies": program["profiles"]}]
    local = Judge(together(pre_dnat=program["pre_dnat"], own=own), Snapshot())
    forward = Judge(together(pre_dnat=program["pre_dnat"], forward=program["forward"]), Snapshot())
    first = Judge(together(pre_dnat=program["pre_dnat"]), Snapshot())
    workload = None
    if program["workload"] is not None:
        documents = tier_documents(program["workload"], Direction.INGRESS)
        workload = stage(read([("workload.yaml", "\n---\n".join(documents))]))

    def passes(packet: str) -> bool:
        before, after = flow(packet, before_translation=True), flow(packet)
        if packet.endswith("-host") and workload is None:
            return local.local(host, Direction.INGRESS, after, before).allowed
        ruling = forward.forwarded(host, None, after, before)
        if packet.endswith("-host"):  # a workload's interface: its policies stand for the host's own
            ruling = first.forwarded(host, None, after, before)
        return ruling.allowed and (workload is None or workload(after) is Action.ALLOW)

    assert [p for p in program["allowed"] + program["denied"] if passes(p)] == program["allowed"]
