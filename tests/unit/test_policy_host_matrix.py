"""Host endpoints in the matrix: which cells there are, and that each is what judge and engine say."""

from __future__ import annotations

import pytest

from portwright.api.policy import PolicyChange, PolicyChanges
from portwright.cli.changes import print_changes
from portwright.live import hosts
from portwright.model.errors import InvalidInput
from portwright.policy.host import whatif
from portwright.policy.host.matrix import host_cells
from portwright.policy.manifests.read import read
from portwright.policy.matrix import Cell, matrix
from portwright.policy.picture import picture
from portwright.policy.rules import PolicySet, Snapshot

HOSTS = """
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: up, labels: {role: host}}
spec:
  {node: one, interfaceName: eth0, expectedIPs: [192.0.2.2], ports: [{name: web, protocol: TCP, port: 80}]}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: down}
spec: {node: one, interfaceName: eth1}
---
"""
POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, ports: [{containerPort: 8080}]}]}
---
"""
POLICY = """
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: p}
spec:
  selector: role == 'host'
  applyOnForward: true
  types: [Ingress, Egress]
  ingress:
  - action: Allow
    protocol: TCP
    source: {nets: [198.51.100.0/24]}
    destination: {ports: [443, "1000:2000"]}
  egress:
  - {action: Allow, protocol: UDP, destination: {ports: [53]}}
"""
REST = "any other address"


def cells(text: str) -> dict[tuple[str, str, str, str], Cell]:
    """Host endpoints' cells by (from, to, via, port)."""
    found = read([("f.yaml", text)])
    return {
        (c.source, c.target, c.via, f"{c.protocol}/{c.port}"): c
        for c in host_cells(found.policy_set, found.snapshot)
    }


def test_the_cells_of_an_endpoint() -> None:
    """From outside to the ports that it declares and rules name alone, its own ways out, pods, and what is
    routed by one that a forward policy selects; an endpoint of no policy says nothing of what is routed."""
    found = cells(HOSTS + POD + POLICY)
    told = {key: (cell.allowed, cell.rule.split(" f.yaml")[0]) for key, cell in found.items()}
    net = "198.51.100.0/24"
    assert told == {
        (net, "host/up", "", "TCP/80"): (False, "local ingress tier-default of default, by p"),
        (REST, "host/up", "", "TCP/80"): (False, "local ingress tier-default of default, by p"),
        (net, "host/up", "", "TCP/443"): (True, "local ingress p rule 1"),
        (REST, "host/up", "", "TCP/443"): (False, "local ingress tier-default of default, by p"),
        ("shop/web", "host/up", "", "TCP/80"): (True, "egress no-policy"),
        ("shop/web", "host/up", "", "TCP/443"): (True, "egress no-policy"),
        ("host/up", net, "", "UDP/53"): (True, "egress failsafe"),
        ("host/up", REST, "", "UDP/53"): (True, "egress failsafe"),
        ("host/up", "shop/web", "", "TCP/8080"): (True, "ingress local-node"),
        ("host/down", "shop/web", "", "TCP/8080"): (True, "ingress local-node"),
        (net, "shop/web", "host/up", "TCP/8080"): (False, "forward ingress tier-default of default, by p"),
        (REST, "shop/web", "host/up", "TCP/8080"): (False, "forward ingress tier-default of default, by p"),
        ("shop/web", net, "host/up", "UDP/53"): (True, "egress no-policy; forward egress p rule 1"),
        ("shop/web", REST, "host/up", "UDP/53"): (True, "egress no-policy; forward egress p rule 1"),
    }


def test_without_host_endpoints_nothing_is_added() -> None:
    """The matrix is of pods then, and a cell's JSON has no field for what it has not."""
    found = read([("f.yaml", POD + POLICY)])
    assert host_cells(found.policy_set, found.snapshot) == ()
    assert {cell.via for cell in matrix(found.policy_set, found.snapshot)} == {""}
    assert host_cells(PolicySet(), Snapshot()) == ()


def test_a_picture_has_a_column_for_each_endpoint_that_routes() -> None:
    """A port by an endpoint is another column than the port by others; the host is a row and a column."""
    found = read([("f.yaml", HOSTS + POD + POLICY)])
    state = found.policy_set, found.snapshot
    drawn = picture((*matrix(*state), *host_cells(*state)))
    assert "shop/web via host/up TCP/8080: denied" in drawn
    assert "host/up to shop/web TCP/8080: allowed" in drawn
    assert drawn.count("<title>host/up</title>") == 2


def test_more_nets_than_it_shows_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """That names the endpoint, and what to use."""
    monkeypatch.setattr(whatif, "MOST_PLACES", 1)
    with pytest.raises(InvalidInput, match=r"HostEndpoint down.*--dry-run"):
        cells(HOSTS + POD + POLICY)


def test_more_packets_than_a_run_may_send_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built, with the number and the way out."""
    monkeypatch.setattr(hosts, "MAX_CELLS", 3)
    with pytest.raises(InvalidInput, match=r"3 of host endpoints at most.*got 14"):
        hosts.questions(read([("f.yaml", HOSTS + POD + POLICY)]))


def test_what_is_nearly_everything_is_cut_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """By the first of the services that it lacks, with how many more there are."""
    lacks = "all but tcp 22, tcp 179, tcp 443, tcp 2379-2380, tcp 5473, udp 68"
    row = PolicyChange(
        sources=(REST,),
        targets=("host/up",),
        services=(lacks,),
        families=(4,),
        allowed=False,
        before="no host endpoint",
        after="local ingress host-default",
        pairs=1,
    )
    print_changes(PolicyChanges(rows=(row,)))
    assert "all but tcp 22, tcp 179, tcp 443, tcp 2379-2380 and 2 more  4 " in capsys.readouterr().out
