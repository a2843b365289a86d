"""``policy matrix`` with HostEndpoints: as the judge says it, and on real packets, of every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deadline import PATIENCE, wait_until
from tests.netns.test_policy_matrix_live import Command

pytestmark = pytest.mark.netns

#: Three endpoints: of a name and both addresses; found by an address; of another node, all interfaces.
ENDPOINTS = """
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: uplink, labels: {role: edge}}
spec:
  node: one
  interfaceName: eth0
  expectedIPs: [192.0.2.2, "2001:db8::2"]
  ports: [{name: web, protocol: TCP, port: 80}, {name: dns, protocol: UDP, port: 53}]
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: found, labels: {role: edge}}
spec: {node: one, expectedIPs: ["2001:db8:1::9"]}
---
apiVersion: projectcalico.org/v3
kind: HostEndpoint
metadata: {name: other, labels: {role: inner}}
spec: {node: two, interfaceName: "*"}
"""
PODS = """
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, ports: [{containerPort: 80}, {containerPort: 81}]}]}
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress, Egress]
  ingress: [{ports: [{port: 80}]}]
  egress: [{ports: [{port: 53, protocol: UDP}]}]
"""
POLICIES = """
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: local}
spec:
  selector: role == 'edge'
  types: [Ingress, Egress]
  ingress:
  - {action: Allow, protocol: TCP, source: {nets: [198.51.100.0/24]}, destination: {ports: [80]}}
  - {action: Allow, protocol: UDP, destination: {ports: [53]}}
  egress:
  - {action: Allow, protocol: TCP, destination: {ports: [443], nets: ["2001:db8:9::/48"]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: way}
spec:
  selector: role == 'edge'
  applyOnForward: true
  types: [Ingress, Egress]
  ingress:
  - {action: Allow, protocol: TCP, source: {nets: [198.51.100.0/24]}, destination: {ports: [80, 81]}}
  egress:
  - {action: Allow, protocol: UDP, destination: {ports: [53]}}
  - {action: Deny, protocol: UDP, destination: {ports: [54]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: pre}
spec:
  selector: role == 'edge'
  applyOnForward: true
  preDNAT: true
  types: [Ingress]
  ingress:
  - {action: Deny, protocol: TCP, source: {nets: [198.51.100.7/32]}, destination: {ports: [80]}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: raw}
spec:
  selector: role == 'inner'
  applyOnForward: true
  doNotTrack: true
  types: [Ingress]
  ingress:
  - {action: Deny, source: {nets: [203.0.113.0/24]}}
  - {action: Allow, protocol: UDP, destination: {ports: [53]}}
  - {action: Allow, protocol: TCP, destination: {ports: [8000]}}
"""


def cells(out: str) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """By from, to, via and port."""
    return {
        (c["from"], c["to"], c.get("via", ""), f"{c['protocol']}/{c['port']}"): c
        for c in json.loads(out)["cells"]
    }


def test_every_cell_of_hosts_is_as_its_packet_fares(tmp_path: Path) -> None:
    """The endpoint's own services, what it sends, pods to it and it to pods, what is routed by its interface:
    each denied by the stage that the rule says, each allowed one arrives; nothing is left of it."""
    (tmp_path / "w.yaml").write_text(ENDPOINTS + PODS + POLICIES)
    status, out, err = (command := Command(tmp_path)).run("--json")
    assert status == 0, out + err
    found = cells(out)
    net, one, rest = "198.51.100.0/24", "198.51.100.7/32", "any other address"
    told = {key: (cell["allowed"], cell["rule"].split(" rule ")[0]) for key, cell in found.items()}
    assert told[net, "host/uplink", "", "TCP/80"] == (True, "local ingress local")
    assert told[one, "host/uplink", "", "TCP/80"] == (False, "pre-dnat ingress pre")
    assert not told[rest, "host/uplink", "", "TCP/80"][0]
    assert told["host/uplink", "2001:db8:9::/48", "", "TCP/443"] == (True, "local egress local")
    assert told["shop/web", "host/uplink", "", "UDP/53"][0]
    assert not told["shop/web", "host/uplink", "", "TCP/80"][0]
    assert told["host/other", "shop/web", "", "TCP/80"] == (True, "ingress local-node")
    assert told[one, "shop/web", "host/uplink", "TCP/80"] == (False, "pre-dnat ingress pre")
    assert told[net, "shop/web", "host/uplink", "TCP/80"][0]
    assert not told[net, "shop/web", "host/uplink", "TCP/81"][0]
    assert told["203.0.113.0/24", "shop/web", "host/other", "TCP/80"] == (False, "untracked ingress raw")
    untried = {key for key, cell in found.items() if cell["live"] is None}
    # By TCP what an untracked policy lets in has no verdict of its own, as its answers have theirs.
    others = (rest, "host/uplink", "host/found")
    assert untried == {(each, "host/other", "", "TCP/8000") for each in others}
    assert {cell["allowed"] for cell in found.values()} == {True, False}
    assert all(cell["live"] == cell["allowed"] for key, cell in found.items() if key not in untried)
    assert command.processes() == []


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    """A column says by which endpoint a row is routed; the picture has a column of its own for each."""
    (tmp_path / "w.yaml").write_text(ENDPOINTS + PODS + POLICIES)
    picture = tmp_path / "m.svg"
    status, out, _ = Command(tmp_path).run("--svg", str(picture))
    assert status == 0
    assert out.splitlines()[0].split() == ["FROM", "TO", "VIA", "PORT", "ALLOWED", "LIVE", "RULE"]
    svg = picture.read_text()
    assert "host/uplink" in svg
    assert "shop/web via host/uplink" in svg
    assert "198.51.100.7/32 to shop/web via host/uplink TCP/80: denied" in svg


def test_manifests_without_pods(tmp_path: Path) -> None:
    """Of host endpoints alone there is a matrix too."""
    (tmp_path / "w.yaml").write_text(ENDPOINTS + POLICIES)
    status, out, err = Command(tmp_path).run("--json")
    assert status == 0, out + err
    assert {key[1] for key in cells(out)} >= {"host/uplink", "host/found", "host/other"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    """Stopped or killed while it sends to a host endpoint, it takes all of it with it."""
    ports = ", ".join(f"{{name: p{n}, protocol: TCP, port: {n}}}" for n in range(1000, 3000))
    (tmp_path / "w.yaml").write_text(ENDPOINTS.replace("ports: [", f"ports: [{ports}, "))
    command = Command(tmp_path)
    with command.start() as process:
        assert process.stderr is not None
        assert "packets at hosts" in process.stderr.readline()
        assert len(command.processes()) == 3
        os.kill(process.pid, number)
        process.communicate(timeout=20 * PATIENCE)
    assert process.returncode in {128 + number, -number}
    wait_until(lambda: not command.processes(), 10, "its processes to end")
    links = subprocess.run(["ip", "-o", "link"], check=True, capture_output=True, text=True).stdout
    assert "live0" not in links


def test_what_the_daemon_refuses_is_refused(tmp_path: Path) -> None:
    """An interface that no host endpoint can be: the error is the daemon's, and nothing is built."""
    (tmp_path / "w.yaml").write_text(ENDPOINTS.replace("eth0", "'eth*'"))
    status, _, err = Command(tmp_path).run()
    assert status == 1
    assert "HostEndpoint uplink" in err
    assert "a pattern is none" in err
