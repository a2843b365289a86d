"""Calico's kinds, drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from portwright.policy.manifests.calico import V3
from tests.policy_random.dice import (
    ICMP_TYPES,
    LABELS,
    NAMES,
    NAMESPACES,
    NETS,
    NODES,
    OTHERS,
    PORTS,
    PROTOCOLS,
    Dice,
    Document,
    document,
    given,
)


class Calico(Dice):
    """Tiers, network sets, and policies whose rules have every field that is enforced."""

    def calico_objects(self) -> Iterator[Document]:
        """Two tiers, one before and one behind those of Kubernetes, network sets, and a host's interface."""
        for name, order in (("first", 10), ("last", 20_000_000)):
            yield document(
                V3, "Tier", name, spec={"order": order, "defaultAction": self.one(("Deny", "Pass"))}
            )
        if self.chance(0.3):
            yield document(
                V3,
                "HostEndpoint",
                "eth0",
                metadata={"labels": self.labels()},
                spec={
                    "node": "there",
                    "expectedIPs": [NODES[4][1], NODES[6][1]],
                    "ports": [{"name": self.one(NAMES), "protocol": "TCP", "port": self.one(PORTS)}],
                },
            )
        both = (*NETS[4], *NETS[6])
        yield document(
            V3,
            "GlobalNetworkSet",
            "partners",
            metadata={"labels": {"app": self.one(LABELS["app"])}},
            spec={"nets": self.some(both)},
        )
        yield document(
            V3,
            "NetworkSet",
            "office",
            "shop",
            metadata={"labels": self.labels()},
            spec={"nets": self.some(both)},
        )

    def expression(self) -> str:
        """A selector of endpoints and network sets."""
        key = self.one(tuple(LABELS))
        value = self.one(LABELS[key])
        return self.one(
            (
                "all()",
                "all()",
                f"has({key})",
                f"!has({key})",
                f"{key} == '{value}'",
                f"{key} != '{value}'",
                f"{key} in {{'{value}', 'none'}}",
                f"{key} not in {{'{value}'}}",
                f"{key} starts with '{value[0]}' || tier == 'front'",
                f"{key} contains '{value[1]}' && !(app ends with 'i')",
            )
        )

    def calico(self, number: int) -> Document:
        """A NetworkPolicy of Calico's, or a global one."""
        namespace = self.maybe(0.5, lambda: self.one(tuple(NAMESPACES))) or ""
        types = self.some(("Ingress", "Egress"), 2)
        rules = {t.lower(): [self.calico_rule(t) for _ in range(self.dice.randint(0, 3))] for t in types}
        spec = given(
            {
                "tier": self.one((None, "default", "first", "last", "kube-admin", "kube-baseline")),
                "order": self.maybe(0.8, lambda: self.one((1, 500, 1000.5, 2000))),
                "selector": self.expression(),
                "namespaceSelector": None if namespace else self.maybe(0.3, self.calico_namespaces),
                "serviceAccountSelector": self.maybe(0.1, lambda: "role == 'cash'"),
                "types": types,
                **rules,
            }
        )
        staged = "Staged" if self.chance(0.04) else ""
        if not namespace and self.chance(0.1):
            # A stage of the host's interfaces, and no word about workloads, but for the last of them.
            spec["applyOnForward"] = True
            untracked = self.one((None, "doNotTrack", None if "Egress" in types else "preDNAT"))
            spec |= {untracked: True} if untracked else {}
        kind = staged + ("NetworkPolicy" if namespace else "GlobalNetworkPolicy")
        return document(V3, kind, f"g{number}", namespace, spec=spec)

    def calico_namespaces(self) -> str:
        """A selector of namespaces."""
        return self.one(("team == 'pay'", "team != 'vault'", "projectcalico.org/name in {'shop', 'lab'}"))

    def calico_rule(self, kind: str) -> dict[str, Any]:
        """A rule whose fields agree on the IP version and on a protocol that has what they ask of it."""
        family = self.one((4, 6))
        echo = {4: "ICMP", 6: "ICMPv6"}[family]
        protocol = self.one((None, None, None, "TCP", "TCP", "UDP", "SCTP", echo, self.one(OTHERS)))
        ports: list[int | str] = list(NAMES)
        ephemeral: list[int | str] = []
        if protocol in PROTOCOLS:
            ports += [*PORTS, "80:8080", "1:52", "443:65535"]
            ephemeral += [49_152, "1024:49151"]
        has_ports = protocol is None or protocol in PROTOCOLS
        other, own = ("source", "destination") if kind == "Ingress" else ("destination", "source")
        entities: dict[str, dict[str, Any]] = {
            other: self.calico_entity(family, 0.3),
            own: self.calico_entity(family, 0.08),
        }
        if has_ports:
            entities["destination"] |= given(
                {
                    "ports": self.maybe(0.4, lambda: self.some(ports)),
                    "notPorts": self.maybe(0.2, lambda: self.some(ports)),
                }
            )
            entities["source"] |= given(
                {
                    "ports": self.maybe(0.12, lambda: self.some([*ports, *ephemeral])),
                    "notPorts": self.maybe(0.08, lambda: self.some([*ports, *ephemeral])),
                }
            )
        return {
            "action": self.one(("Allow", "Allow", "Deny", "Pass", "Log")),
            **given(
                {
                    "protocol": protocol,
                    "notProtocol": self.maybe(0.1, lambda: self.one(("TCP", "UDP", echo))),
                    "ipVersion": self.maybe(0.2, lambda: family),
                    "icmp": self.maybe(0.5, self.calico_icmp) if protocol == echo else None,
                    "notICMP": self.maybe(0.3, self.calico_icmp) if protocol == echo else None,
                }
            ),
            **{side: entity for side, entity in entities.items() if entity},
        }

    def calico_icmp(self) -> dict[str, int]:
        """A type, perhaps with a code."""
        return given({"type": self.one(ICMP_TYPES), "code": self.maybe(0.4, lambda: self.one((0, 1, 255)))})

    def calico_entity(self, family: int, share: float) -> dict[str, Any]:
        """One side of a rule; each field is there in this share of cases."""
        return given(
            {
                "nets": self.maybe(share, lambda: self.some(NETS[family])),
                "notNets": self.maybe(share / 2, lambda: self.some(NETS[family][1:])),
                "selector": self.maybe(share, self.expression),
                "notSelector": self.maybe(share / 2, self.expression),
                "namespaceSelector": self.maybe(
                    share / 3, lambda: self.one((self.calico_namespaces(), "all()", "global()"))
                ),
                "serviceAccounts": self.maybe(share / 4, lambda: {"names": ["teller"]}),
            }
        )
