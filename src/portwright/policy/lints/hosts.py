"""Host endpoints of other nodes alone: a name that is spelled otherwise leaves this host open."""

from __future__ import annotations

from portwright.policy.lints.entry import Lint
from portwright.policy.manifests.calico_hosts import HOST_NODE
from portwright.policy.rules import EndpointKind, Snapshot, Where


def nobodys_endpoints(snapshot: Snapshot, node: str) -> Lint | None:
    """The finding that there are host endpoints, and none of this node."""
    hosts = [end for end in snapshot.endpoints if end.kind is EndpointKind.HOST]
    nodes = sorted({end.labels.get(HOST_NODE, "") for end in hosts})
    if not hosts or node in nodes:
        return None
    return Lint(
        Where(path=f"HostEndpoint {hosts[0].name}"),
        f"HostEndpoint {hosts[0].name}",
        "host-endpoints-elsewhere",
        f"All host endpoints are of {', '.join(nodes[:3])}{', ...' if len(nodes) > 3 else ''}, and this node "
        f"is called {node}: none of its interfaces is bound.",
        f"Write node: {node} in the spec of those that are meant, or run the daemon with --node-name.",
    )
