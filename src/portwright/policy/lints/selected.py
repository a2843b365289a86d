"""Who is selected: selectors that are true of nobody, or of whom no policy holds."""

from __future__ import annotations

from collections.abc import Iterator

from portwright.policy.lints.entry import PROTOCOL_NAMES, SIDES, Entry, Lint, field_of, rules_of
from portwright.policy.manifests.documents import Document, Path
from portwright.policy.population import Population, describe
from portwright.policy.rules import Direction, Peer, Rule, StagedAction


def nobody(entry: Entry, world: Population, on_host: Population) -> Iterator[Lint]:
    """Selectors that are true of nobody in ``world``; subjects that are, but of pods ``on_host`` networks."""
    policy = entry.policy
    if not world.workloads or policy.staged_action is StagedAction.DELETE:
        return
    if not world.of(policy.subject) & world.subjects:
        yield _no_subject(entry, world, on_host)
    for direction, index, rule in rules_of(policy):
        for number, peer in enumerate(rule.peers or ()):
            if peer.selector is not None and not world.of(peer.selector):
                yield entry.lint(
                    field_of(entry, rule, SIDES[direction], number),
                    "peer-matches-nothing",
                    f"{direction} rule {index + 1} is for {describe(peer.selector)}, which nothing is",
                    world.mend(peer.selector),
                )


def _no_subject(entry: Entry, world: Population, on_host: Population) -> Lint:
    subject = entry.policy.subject
    if pods := on_host.names(on_host.of(subject)):
        return entry.lint(
            _subject(entry.document),
            "host-network",
            f"only pods on their host's network are selected ({', '.join(pods[:3])}): no policy holds there",
            "Take hostNetwork from them, or filter their node's address with an ipBlock or a HostEndpoint.",
        )
    return entry.lint(
        _subject(entry.document),
        "selects-nothing",
        f"no pod is selected by {describe(subject)}, so the policy does nothing",
        world.mend(subject),
    )


def named_ports(entry: Entry, world: Population) -> Iterator[Lint]:
    """Names that no destination has under the rule's protocol."""
    for direction, index, rule, names in entry.once(_naming):
        if direction is Direction.INGRESS:
            targets = world.of(entry.policy.subject)
        else:
            peers = rule.peers if rule.peers is not None else (Peer(),)
            targets = world.any_of(peer.selector for peer in peers if peer.nets is None)
        ports = [port for end in world.at(targets) for port in end.named_ports]
        for name in names:
            asked = {part.protocol for part in rule.traffic or () if name in part.names}
            if not targets or any(port.name == name and port.protocol in asked for port in ports):
                continue
            others = sorted({PROTOCOL_NAMES.get(port.protocol, "?") for port in ports if port.name == name})
            known = sorted({port.name for port in ports})
            if others:
                fix = f"Say protocol: {others[0]}, under which there is one."
            elif known:
                fix = f"Use one of the names that they have ({', '.join(known[:5])}), or the number."
            else:
                fix = "Name it under the pod's containers[].ports, or use the number."
            yield entry.lint(
                field_of(entry, rule, "ports"),
                "named-port",
                f"no destination of {direction} rule {index + 1} has a port called {name} "
                f"({'/'.join(sorted(PROTOCOL_NAMES.get(number or 0, 'any') for number in asked))})",
                fix,
            )


def _naming(entry: Entry) -> list[tuple[Direction, int, Rule, list[str]]]:
    """The rules for ports by name, each with the names."""
    found = [
        (*each, sorted({name for part in each[2].traffic or () for name in part.names}))
        for each in rules_of(entry.policy)
    ]
    return [each for each in found if each[3]]


def _subject(document: Document) -> Path:
    spec = document.body.get("spec") or {}
    for name in ("podSelector", "subject", "selector"):
        if name in spec:
            return ("spec", name)
    return ("spec",)
