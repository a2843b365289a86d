"""Pods through containerd's CRI plugin, as a kubelet asks for them."""

from __future__ import annotations

import pytest

from portwright.model.port import Port
from tests.containers.cri_client import Cri, Pod
from tests.fix_containerd import PAGE, Runtimes, addresses
from tests.fix_daemon import HOST4, HOST6, WORLD4, WORLD6
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.containers


def _port(runtimes: Runtimes, pod: Pod) -> Port:
    port = runtimes.port_of(pod.id)
    assert port is not None
    return port


def test_pods_reach_each_other_and_the_runtime_knows_their_addresses(containerd: Runtimes, cri: Cri) -> None:
    """Both addresses of a pod are in its CRI status, and a container in another pod fetches from both."""
    web, client = cri.pod("web"), cri.pod("client")
    web.container("httpd", "-f", "-h", "/www")
    shell = client.container("sleep", "1000")
    port = _port(containerd, web)
    assert sorted(web.ips()) == sorted(addresses(port))

    four, six = addresses(port)
    for url in (f"http://{four}/", f"http://[{six}]/"):
        containerd.served(url)
        assert client.exec(shell, "wget", "-q", "-O", "-", url) == (0, PAGE)
    for address in (WORLD4, WORLD6):
        assert client.exec(shell, "ping", "-c", "1", "-W", "2", address)[0] == 0


def test_a_pods_name_becomes_labels_of_its_port(containerd: Runtimes, cri: Cri) -> None:
    """K8S_POD_NAMESPACE, _NAME and _UID, sent in CNI_ARGS, are labels; ``port list`` shows them."""
    port = _port(containerd, cri.pod("web"))
    assert port.labels["io.kubernetes.pod.namespace"] == "tests"
    assert port.labels["io.kubernetes.pod.name"] == "web"
    assert port.labels.get("io.kubernetes.pod.uid", "uid-web") == "uid-web"  # containerd 1.6.9 and newer
    assert "tests/web" in containerd.daemon.cli("port", "list").stdout


def test_a_pods_host_port_is_answered_until_it_stops(
    containerd: Runtimes, cri: Cri, world: TestNetns
) -> None:
    """A hostPort over IPv4 and IPv6 from outside; hostIP restricts; after StopPodSandbox nobody answers."""
    web = cri.pod(
        "web",
        port_mappings=[
            {"container_port": 80, "host_port": 8080},
            {"container_port": 80, "host_port": 8081, "host_ip": HOST4},
        ],
    )
    web.container("httpd", "-f", "-h", "/www")
    containerd.served(f"http://{HOST4}:8080/")

    def fetch(url: str) -> str:
        return world.run(["curl", "-s", "--max-time", "2", url], check=False).stdout

    assert fetch(f"http://{HOST4}:8080/") == PAGE
    assert fetch(f"http://[{HOST6}]:8080/") == PAGE
    assert fetch(f"http://{HOST4}:8081/") == PAGE
    assert fetch(f"http://[{HOST6}]:8081/") == ""
    web.stop()
    assert fetch(f"http://{HOST4}:8080/") == ""
    web.remove()
    containerd.nothing_left()


def test_bandwidth_annotations_become_limits(containerd: Runtimes, cri: Cri) -> None:
    """kubernetes.io/ingress-bandwidth and egress-bandwidth are the port's limits, in bits per second."""
    pod = cri.pod(
        "slow",
        annotations={"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "5M"},
    )
    limits = _port(containerd, pod).limits
    assert (limits.ingress_rate, limits.egress_rate) == (10_000_000, 5_000_000)


def test_dns_of_a_pod_is_taken(containerd: Runtimes, cri: Cri) -> None:
    """A pod's dnsConfig arrives by the dns capability and is on the port's record."""
    pod = cri.pod("named", dns_config={"servers": ["192.0.2.53"], "searches": ["tests.example"]})
    dns = _port(containerd, pod).dns
    assert (dns.nameservers, dns.search) == (("192.0.2.53",), ("tests.example",))


def test_stop_and_remove_leave_nothing_and_may_be_repeated(containerd: Runtimes, cri: Cri) -> None:
    """StopPodSandbox twice, RemovePodSandbox twice: no error, and nothing of the pod is left."""
    pod = cri.pod("short")
    for _ in range(2):
        pod.stop()
    containerd.nothing_left()
    for _ in range(2):
        pod.remove()
    containerd.nothing_left()


def test_a_pod_that_gets_no_network_leaves_nothing(containerd: Runtimes, cri: Cri) -> None:
    """A host port that another pod holds: RunPodSandbox fails naming it, and the first pod goes on."""
    first = cri.pod("first", port_mappings=[{"container_port": 80, "host_port": 8080}])
    with pytest.raises(Exception, match="8080"):
        cri.pod("second", port_mappings=[{"container_port": 80, "host_port": 8080}])
    assert [p.owner.container_id for p in containerd.ports()] == [first.id]


def test_pods_survive_containerd_killed(containerd: Runtimes, cri: Cri) -> None:
    """SIGKILL to containerd: the pod's traffic goes on; the restarted one stops it, and all is freed."""
    web = cri.pod("web", port_mappings=[{"container_port": 80, "host_port": 8080}])
    web.container("httpd", "-f", "-h", "/www")
    containerd.served(f"http://{HOST4}:8080/")

    containerd.kill_containerd()
    assert containerd.http(f"http://{HOST4}:8080/") == PAGE
    containerd.start_containerd()
    assert sorted(web.ips()) == sorted(addresses(_port(containerd, web)))
    web.stop()
    web.remove()
    containerd.nothing_left()
