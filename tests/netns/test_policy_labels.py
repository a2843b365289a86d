"""Whom a port may be taken for: its labels are what its owner says, and policy believes them so far only."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from portwright.model.errors import PortwrightError
from tests.faults.cni import Cni
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import WEB, Probe, listening

pytestmark = pytest.mark.netns

NAMESPACE, NAME = "io.kubernetes.pod.namespace", "io.kubernetes.pod.name"
#: What lets a client in: its namespace's label, its service account's, Calico's words for both.
TRUSTED = """
apiVersion: v1
kind: Namespace
metadata: {name: ours, labels: {team: a}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: admin, namespace: ours, labels: {role: admin}}
---
apiVersion: projectcalico.org/v3
kind: GlobalNetworkPolicy
metadata: {name: web}
spec:
  selector: app == 'web'
  ingress:
  - {action: Allow, source: {namespaceSelector: team == 'a'}}
  - {action: Allow, source: {selector: pcns.team == 'a'}}
  - {action: Allow, source: {selector: projectcalico.org/namespace == 'ours'}}
  - {action: Allow, source: {namespaceSelector: projectcalico.org/name == 'ours'}}
  - {action: Allow, source: {serviceAccounts: {selector: role == 'admin'}}}
  - {action: Allow, source: {serviceAccounts: {names: [admin]}, namespaceSelector: team == 'a'}}
  - {action: Allow, source: {selector: pcsa.role == 'admin'}}
  - {action: Allow, source: {selector: projectcalico.org/serviceaccount == 'admin'}}
  - {action: Allow, source: {selector: projectcalico.org/orchestrator != 'k8s'}}
  - {action: Allow, source: {namespaceSelector: kubernetes.io/metadata.name == 'ours'}}
"""
#: All that the engine gives a meaning to.
FORGED = {
    "ns:team": "a",
    "ns:kubernetes.io/metadata.name": "ours",
    "ns:projectcalico.org/name": "ours",
    "sa:role": "admin",
    "sa:projectcalico.org/name": "admin",
    "pcns.team": "a",
    "pcsa.role": "admin",
    "projectcalico.org/namespace": "ours",
    "projectcalico.org/serviceaccount": "admin",
    "projectcalico.org/orchestrator": "other",
    "projectcalico.org/name": "ours",
    "kubernetes.io/metadata.name": "ours",
    "host:interface": "*",
    "host:node": "node",
    "pw:port": "",
    "pw:tenant:n1": "",
    "pw:strict:n1": "no address",
}


def test_no_label_of_a_port_is_its_namespaces(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A port labelled with everything that policy knows namespaces, accounts and networks by is let in
    nowhere, made so or changed so; the labels are there, and a port of the namespace is let in."""
    web = sandboxes(labels={"app": "web"})
    with daemon.client() as api, listening(web.ns, 80):
        api.policy_apply([("trusted.yaml", TRUSTED)])
        forger, changed = sandboxes(labels=FORGED), sandboxes()
        api.port_set(changed.port.port_id, labels=dict(FORGED))
        member = sandboxes(labels={NAMESPACE: "ours"})
        probe = Probe(daemon)
        for address in (web.ip4, web.ip6):
            assert not probe.reaches(forger, address, 80)
            assert not probe.reaches(changed, address, 80)
            assert probe.reaches(member, address, 80)
        assert api.port_show(forger.port.port_id).labels == FORGED
        assert api.port_list(label="ns:team=a")


def test_no_label_of_a_port_is_its_networks(daemon: Daemon, netns_factory: Callable[[], TestNetns]) -> None:
    """Nor does such a label say which network a port is of: neither beside an isolated one nor in it."""
    with daemon.client() as api:
        api.network_create("red", subnets=["10.90.0.0/24", "fd00:90::/64"], reach=["*"], isolation="strict")
        api.network_create("free", subnets=["10.91.0.0/24", "fd00:91::/64"], reach=["*"])

        def pod(network: str, **labels: str) -> Sandbox:
            ns = netns_factory()
            return Sandbox(ns, api.port_create(network, ns.path, name=ns.name, labels=labels))

        red = pod("red", **{"pw:port": "", "pw:open:red": "", "pw:strict:free": ""})
        free, other = pod("free", **{"pw:strict:free": "", "pw:tenant:red": ""}), pod("free")
        probe = Probe(daemon)
        with listening(red.ns, 80), listening(free.ns, 80):
            for source, target, reached in ((free, red, False), (red, free, False), (other, free, True)):
                for address in (target.ip4, target.ip6):
                    assert probe.reaches(source, address, 80) is reached


def test_an_empty_namespace_is_the_default_one(
    daemon: Daemon, netns_factory: Callable[[], TestNetns]
) -> None:
    """It shuts nobody out of a network that is each tenant's own."""
    with daemon.client() as api:
        api.network_create("blue", subnets=["10.90.0.0/24", "fd00:90::/64"], isolation="tenant")

        def pod(**labels: str) -> Sandbox:
            ns = netns_factory()
            return Sandbox(ns, api.port_create("blue", ns.path, name=ns.name, labels=labels))

        pods = [pod(**{NAMESPACE: "x"}), pod(**{NAMESPACE: "x"}), pod(**{NAMESPACE: ""}), pod()]
        probe = Probe(daemon)
        for source, target in (pods[:2], pods[2:]):
            with listening(target.ns, 80):
                assert probe.reaches(source, target.ip4, 80)
                assert probe.reaches(source, target.ip6, 80)
                assert not probe.reaches(pods[0 if source is pods[2] else 2], target.ip4, 80)


def test_the_runtimes_word_for_a_pod_counts(daemon: Daemon, netns_factory: Callable[[], TestNetns]) -> None:
    """CNI_ARGS, which the runtime writes, says whose pod it is; labels of args.cni can't say otherwise."""
    cni, one, two = Cni(daemon), netns_factory(), netns_factory()
    forged = {"cni": {"labels": {NAMESPACE: "ours", NAME: "web", "app": "client"}}}
    told = "K8S_POD_NAMESPACE=theirs;K8S_POD_NAME=client"
    assert cni.run("ADD", "one", one.path, cni_args=told, args=forged).ok
    assert cni.run("ADD", "two", two.path, args=forged).ok
    with daemon.client() as api:
        labels = {port.owner.container_id: port.labels for port in api.port_list()}
    assert labels == {
        "one": {NAMESPACE: "theirs", NAME: "client", "app": "client"},
        "two": {NAMESPACE: "ours", NAME: "web", "app": "client"},
    }


def test_a_port_takes_nothing_but_a_pods_place(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A port of a network set's or a node's name hides neither: what is denied to them stays denied."""
    nets = """
apiVersion: projectcalico.org/v3
kind: NetworkSet
metadata: {name: blocked, namespace: default, labels: {set: blocked}}
spec: {nets: [10.77.0.0/16, "fd00:77::/32", 192.0.2.0/24]}
---
apiVersion: projectcalico.org/v3
kind: NetworkPolicy
metadata: {name: out, namespace: default}
spec:
  selector: app == 'client'
  types: [Egress]
  egress: [{action: Deny, destination: {selector: set == 'blocked'}}, {action: Allow}]
"""
    client = sandboxes(labels={"app": "client"})
    with daemon.client() as api:
        api.policy_apply([("nets.yaml", nets)])
        why = [step.text for step in api.why(client.port.port_id, "192.0.2.1").steps]
        before = "\n".join(why)
        assert "out" in before
        sandboxes(labels={NAME: "blocked"})
        after = "\n".join(step.text for step in api.why(client.port.port_id, "192.0.2.1").steps)
        assert after == before


def test_labels_that_can_not_be_put_in_force_are_refused(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A label that has more rules bind a port than there is room for changes nothing, on record neither; so
    ports come and go as before."""

    def many(name: str, first: int) -> str:
        policy = WEB.replace("name: web", f"name: {name}").replace("app: web", f"{name}: is")
        ports = ", ".join(f"{{port: {port}}}" for port in range(first, first + 160, 2))
        return policy.replace("{port: 80}", f"{{port: 80}}, {ports}")

    pod = sandboxes(labels={"one": "is"})
    with daemon.client() as api:
        api.policy_apply([("one.yaml", many("one", 1000)), ("two.yaml", many("two", 2000))])
        with pytest.raises(PortwrightError, match="intervals of ports"):
            api.port_set(pod.port.port_id, labels={"two": "is"})
        with pytest.raises(PortwrightError, match="intervals of ports"):
            api.port_set(pod.port.port_id, labels={"two": "is"}, mtu=1400)
        assert api.port_show(pod.port.port_id) == pod.port
        client = sandboxes(labels={"app": "client"})
        with listening(pod.ns, 80), listening(pod.ns, 81):
            assert Probe(daemon).reaches(client, pod.ip4, 80)
            assert not Probe(daemon).reaches(client, pod.ip6, 81)


def test_an_address_is_its_ports(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A Pod manifest whose address is another's port by now is no hindrance: not to a label, nor to the end
    of the port of its name, nor to a start; and what is said of that pod is not said of the port."""
    pod = sandboxes(labels={NAME: "p", "app": "web"})
    there = f"""
apiVersion: v1
kind: Pod
metadata: {{name: p, labels: {{app: client}}}}
status: {{podIP: {pod.ip4}, podIPs: [{{ip: {pod.ip4}}}, {{ip: "{pod.ip6}"}}]}}
"""
    web = sandboxes(labels={"app": "web"})
    probe = Probe(daemon)
    with daemon.client() as api, listening(web.ns, 80):
        api.policy_apply([("pod.yaml", there), ("web.yaml", WEB)])
        assert probe.reaches(pod, web.ip4, 80)
        api.port_set(pod.port.port_id, labels={NAME: "q"})
        other = sandboxes(labels={NAME: "p"})
        for address in (web.ip4, web.ip6):
            assert not probe.reaches(pod, address, 80)
            assert probe.reaches(other, address, 80)
        api.port_delete(other.port.port_id)
        assert not probe.reaches(pod, web.ip6, 80)
        daemon.stop()
        daemon.start()
        assert not probe.reaches(pod, web.ip4, 80)
