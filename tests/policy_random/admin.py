"""Policies of the admin tiers, drawn: the present kind, and the two before it."""

from __future__ import annotations

from typing import Any

from portwright.policy.manifests.admin import GROUP
from tests.policy_random.dice import DOMAINS, NAMES, NETS, PORTS, PROTOCOLS, Document, document, given
from tests.policy_random.kubernetes import Kubernetes


class Admin(Kubernetes):
    """Ordered rules about the pods of namespaces, and in egress about what is outside."""

    def subject(self) -> dict[str, Any]:
        """Namespaces, or pods of some."""
        return self.one(
            (
                {"namespaces": self.namespace_selector()},
                {"pods": {"namespaceSelector": self.namespace_selector(), "podSelector": self.selector()}},
            )
        )

    def cluster(self, number: int) -> Document:
        """A ClusterNetworkPolicy of either tier."""
        return self.of_admin(
            f"{GROUP}/v1alpha2",
            "ClusterNetworkPolicy",
            f"c{number}",
            ("Accept", "Deny", "Pass"),
            {"tier": self.one(("Admin", "Baseline")), "priority": number},
        )

    def admin(self, number: int) -> Document:
        """An AdminNetworkPolicy, as older clusters have it."""
        actions = ("Allow", "Deny", "Pass")
        return self.of_admin(
            f"{GROUP}/v1alpha1", "AdminNetworkPolicy", f"a{number}", actions, {"priority": number}
        )

    def baseline(self) -> Document:
        """The BaselineAdminNetworkPolicy."""
        return self.of_admin(
            f"{GROUP}/v1alpha1", "BaselineAdminNetworkPolicy", "default", ("Allow", "Deny"), {}
        )

    def of_admin(
        self, api: str, kind: str, name: str, actions: tuple[str, ...], spec: dict[str, Any]
    ) -> Document:
        """Ordered rules in one direction or both."""
        old = api.endswith("1")
        spec = {**spec, "subject": self.subject()}
        for direction, side in self.some((("ingress", "from"), ("egress", "to")), 2):
            spec[direction] = [self.admin_rule(side, actions, old) for _ in range(self.dice.randint(1, 3))]
        return document(api, kind, name, spec=spec)

    def admin_rule(self, side: str, actions: tuple[str, ...], old: bool) -> dict[str, Any]:
        """An action on peers and ports; names of ports are for pods alone."""
        plain = side == "from" or self.chance(0.4)
        resolves = "Pass" in actions  # the baseline of old has no names
        peers = self.several(self.subject if plain else lambda: self.admin_peer(resolves), most=2)
        port = self.old_port if old else self.new_port
        ports = self.maybe(0.6, lambda: self.several(lambda: port(plain), most=2))
        if any("domainNames" in peer for peer in peers):
            actions = actions[:1]  # names are for rules that accept
        return given({"action": self.one(actions), side: peers, "ports" if old else "protocols": ports})

    def admin_peer(self, resolves: bool) -> dict[str, Any]:
        """Networks, nodes or names, which are for egress."""
        if resolves and self.chance(0.15):
            return {"domainNames": self.some(tuple(DOMAINS))}
        if self.chance(0.75):
            return {"networks": self.some((*NETS[4], *NETS[6]))}
        return {"nodes": self.label_selector({"zone": ("a", "b")})}

    def new_port(self, named: bool) -> dict[str, Any]:
        """An item of ``protocols``."""
        if named and self.chance(0.3):
            return {"destinationNamedPort": self.one(NAMES)}
        first = self.one(PORTS)
        port = (
            {"number": first}
            if self.chance(0.5)
            else {"range": {"start": first, "end": first + self.one((1, 100))}}
        )
        return {self.one(("tcp", "udp", "sctp")): {"destinationPort": port}}

    def old_port(self, named: bool) -> dict[str, Any]:
        """An item of ``ports``."""
        if named and self.chance(0.3):
            return {"namedPort": self.one(NAMES)}
        first, protocol = self.one(PORTS), self.one(PROTOCOLS)
        if self.chance(0.5):
            return {"portNumber": {"protocol": protocol, "port": first}}
        return {"portRange": {"protocol": protocol, "start": first, "end": first + self.one((1, 100))}}
