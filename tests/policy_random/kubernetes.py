"""Clusters as Kubernetes describes them, and its NetworkPolicies, drawn."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from tests.policy_random.dice import (
    LABELS,
    NAMES,
    NAMESPACES,
    NETS,
    NODES,
    PODS,
    PORTS,
    PROTOCOLS,
    SECOND,
    Dice,
    Document,
    document,
    given,
)


class Kubernetes(Dice):
    """Pods and whom they belong to; policies in all the forms that mean all or nothing too."""

    def cluster_objects(self) -> Iterator[Document]:
        """Namespaces, nodes, a service account, and pods of either family or both."""
        for name, labels in NAMESPACES.items():
            yield document("v1", "Namespace", name, metadata={"labels": labels})
        yield document("v1", "ServiceAccount", "teller", "bank", metadata={"labels": {"role": "cash"}})
        for index, name in enumerate(("here", "there")):
            addresses = [{"type": "InternalIP", "address": NODES[family][index]} for family in (4, 6)]
            labels = {"zone": self.one(("a", "b"))}
            yield document("v1", "Node", name, metadata={"labels": labels}, status={"addresses": addresses})
        for index in range(self.dice.randint(4, len(PODS[4]))):
            families = self.one(((4,), (6,), (4, 6), (4, 6)))
            mine = [PODS[family][index] for family in families]
            if self.chance(0.3):
                mine += [SECOND[family].format(index + 1) for family in families]
            yield self.pod(f"p{index}", mine)
        if self.chance(0.3):
            yield self.pod("on-node", [NODES[4][self.dice.randint(0, 1)]], hostNetwork=True)

    def pod(self, name: str, addresses: list[str], **spec: Any) -> Document:
        """A pod with named ports; a name may stand for several, under several protocols."""
        ports = [
            {"name": name, "containerPort": self.one(PORTS), "protocol": self.one(PROTOCOLS)}
            for name in self.some(NAMES)
            for _ in range(self.dice.randint(1, 2))
        ]
        spec["containers"] = [{"name": "c", "image": "i", "ports": ports}]
        spec["serviceAccountName"] = self.one(("default", "teller"))
        return document(
            "v1",
            "Pod",
            name,
            self.one(tuple(NAMESPACES)),
            metadata={"labels": self.labels()},
            spec=spec,
            status={"podIPs": [{"ip": address} for address in addresses]},
        )

    # --- policies ---

    def selector(self) -> dict[str, Any]:
        """A label selector of pods."""
        return self.label_selector(LABELS)

    def namespace_selector(self) -> dict[str, Any]:
        """A label selector of namespaces."""
        return self.label_selector(
            {"team": ("pay", "vault"), "kubernetes.io/metadata.name": tuple(NAMESPACES)}
        )

    def kubernetes(self, number: int) -> Document:
        """A NetworkPolicy, in all the forms that mean all or nothing too."""
        types = self.one((None, ["Ingress"], ["Egress"], ["Ingress", "Egress"]))

        def rules(side: str) -> Any:
            return self.maybe(0.75, lambda: self.several(lambda: self.kubernetes_rule(side), least=0))

        spec = given(
            {
                "podSelector": self.selector(),
                "policyTypes": types,
                "ingress": rules("from"),
                "egress": rules("to"),
            }
        )
        return document(
            "networking.k8s.io/v1", "NetworkPolicy", f"k{number}", self.one(tuple(NAMESPACES)), spec=spec
        )

    def kubernetes_rule(self, side: str) -> dict[str, Any]:
        """Peers and ports; either may be absent or empty."""
        return given(
            {
                side: self.maybe(0.8, lambda: self.several(self.kubernetes_peer, least=0)),
                "ports": self.maybe(0.7, lambda: self.several(self.kubernetes_port, least=0)),
            }
        )

    def kubernetes_peer(self) -> dict[str, Any]:
        """Selectors, or a block with holes."""
        if self.chance(0.4):
            cidr = self.one(NETS[self.one((4, 6))])
            whole = ipaddress.ip_network(cidr)
            holes = [n for n in NETS[whole.version] if n != cidr and _inside(n, cidr)]
            except_ = self.maybe(0.7, lambda: self.some(holes)) if holes else None
            return {"ipBlock": given({"cidr": cidr, "except": except_})}
        pods, namespaces = self.one(((1, 0), (0, 1), (1, 1)))
        return {
            **({"podSelector": self.selector()} if pods else {}),
            **({"namespaceSelector": self.namespace_selector()} if namespaces else {}),
        }

    def kubernetes_port(self) -> dict[str, Any]:
        """A protocol with all its ports, one, a name, or a range."""
        protocol = self.maybe(0.7, lambda: self.one(PROTOCOLS))
        port: int | str | None = self.one((None, self.one(PORTS), self.one(PORTS), self.one(NAMES)))
        end = None
        if isinstance(port, int) and self.chance(0.5):
            end = self.one((port, port + 1, port + 100, 65_535))
        return given({"protocol": protocol, "port": port, "endPort": end})


def _inside(net: str, around: str) -> bool:
    inner, outer = ipaddress.ip_network(net), ipaddress.ip_network(around)
    return (
        inner.version == outer.version
        and inner.prefixlen > outer.prefixlen
        and inner.network_address in outer
    )
