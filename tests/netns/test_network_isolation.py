"""Networks' isolation on real packets: what holds where no policy decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from portwright.model.errors import InvalidInput
from portwright.model.network import Isolation
from tests.faults.cni import Cni
from tests.fix_daemon import HOST4, WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import WEB, Probe, connect, listening
from tests.netns.representor import following

pytestmark = pytest.mark.netns

NAMESPACE = "io.kubernetes.pod.namespace"
PodFactory = Callable[..., Sandbox]


@pytest.fixture
def pods(daemon: Daemon, netns_factory: Callable[[], TestNetns]) -> Iterator[PodFactory]:
    """Make a sandbox that listens on TCP 80: ``pods(network, namespace, **labels)``."""
    with ExitStack() as stack, daemon.client() as api:

        def make(network: str, namespace: str = "default", **labels: str) -> Sandbox:
            ns = netns_factory()
            port = api.port_create(network, ns.path, name=ns.name, labels={NAMESPACE: namespace, **labels})
            stack.enter_context(listening(ns, 80))
            return Sandbox(ns, port)

        yield make


def network(daemon: Daemon, name: str, number: int, isolation: Isolation) -> None:
    """A network of that isolation that may exchange traffic with all others that say so."""
    with daemon.client() as api:
        made = api.network_create(
            name,
            subnets=[f"10.{number}.0.0/24", f"fd00:{number}::/64"],
            masquerade=True,
            reach=["*"],
            isolation=isolation,
        )
        assert made.isolation == isolation


def table(probe: Probe, sandboxes: dict[str, Sandbox]) -> set[str]:
    """``a>b`` for every pair of which a reaches b; both families agree."""
    found = set()
    for one, source in sandboxes.items():
        for other, target in sandboxes.items():
            if one != other:
                verdicts = {probe.reaches(source, address, 80) for address in (target.ip4, target.ip6)}
                assert len(verdicts) == 1, (one, other)
                found |= {f"{one}>{other}"} if verdicts == {True} else set()
    return found


def test_strict(daemon: Daemon, pods: PodFactory, sandboxes: SandboxFactory) -> None:
    """A port that nothing selects neither opens connections nor is reached, but by its own node, whom it
    answers, and it asks its gateway; a policy opens what it says; a restart opens nothing."""
    free = sandboxes()
    assert free.ping(WORLD4)
    network(daemon, "red", 90, "strict")
    web, client = pods("red", app="web"), pods("red", app="client")
    probe = Probe(daemon)
    both = {"web": web, "client": client}
    assert table(probe, both) == set()
    assert not web.ping(WORLD4)
    assert not web.ping(WORLD6)
    assert free.ping(WORLD4)
    assert free.ping(WORLD6)
    for address in (web.ip4, web.ip6):
        with closing(connect(daemon.host, address, 80)):
            pass
    with daemon.client() as api:
        told = "\n".join(s.text for s in api.why(client.port.port_id, web.port.port_id, dport=80).steps)
        assert "network red: isolation strict" in told
        with following(daemon, client) as follower:
            assert not probe.reaches(client, web.ip4, 80)
        assert {e.rule for e in follower.of("policy")} == {"policy: network red: isolation strict egress[0]"}
        api.policy_apply([("web.yaml", WEB)])
        assert table(probe, both) == set()  # nothing lets the client out yet
        let_out = (
            WEB.replace("name: web", "name: out").replace("app: web", "app: client").partition("  policy")
        )
        api.policy_apply([("out.yaml", let_out[0] + "  policyTypes: [Egress]\n  egress: [{}]\n")])
        assert table(probe, both) == {"client>web"}
        daemon.stop()
        daemon.start()
        assert table(probe, both) == {"client>web"}
    with daemon.client() as api:
        api.policy_delete(["web.yaml", "out.yaml"])
        assert table(probe, both) == set()
        rules = {api.network_show(name).network.isolation for name in ("red", "n1")}
        assert rules == {"strict", "open"}


def test_tenant(daemon: Daemon, pods: PodFactory, world: TestNetns) -> None:
    """Ports of one namespace reach each other and the world, on whichever networks they are; no other port
    reaches them, nor they it; and the world does not."""
    network(daemon, "blue", 90, "tenant")
    network(daemon, "free", 91, "open")
    made = {
        "a": pods("blue", "x"),
        "b": pods("blue", "x"),
        "c": pods("blue", "y"),
        "f": pods("free", "x"),
        "g": pods("free", "y"),
    }
    assert table(Probe(daemon), made) == {
        *("a>b", "b>a", "a>f", "b>f", "f>a", "f>b"),
        *("c>g", "g>c", "f>g", "g>f"),
    }
    for name in ("a", "c"):
        assert made[name].ping(WORLD4)
        assert made[name].ping(WORLD6)
        assert made[name].ping(HOST4)
    world.run(["ip", "route", "add", "10.90.0.0/15", "via", HOST4])
    probe = Probe(daemon)
    before = probe.denied()
    with pytest.raises(OSError, match="timed out"):
        connect(world, made["a"].ip4, 80, timeout=0.3)
    assert probe.denied() > before
    with closing(connect(world, made["f"].ip4, 80)):
        pass


def test_each_address_obeys_its_own_network(
    daemon: Daemon, pods: PodFactory, netns_factory: Callable[[], TestNetns]
) -> None:
    """A pod with ports of an open and of a strict network is open by one and shut by the other."""
    network(daemon, "red", 90, "strict")
    network(daemon, "free", 91, "open")
    other = pods("free")
    ns = netns_factory()
    labels = {NAMESPACE: "x", "io.kubernetes.pod.name": "both"}
    with daemon.client() as api, listening(ns, 80):
        free = Sandbox(ns, api.port_create("free", ns.path, name="one", ifname="eth0", labels=labels))
        red = Sandbox(ns, api.port_create("red", ns.path, name="two", ifname="eth1", labels=labels))
        probe = Probe(daemon)
        for address in (free.ip4, free.ip6):
            assert probe.reaches(other, address, 80)
        for address in (red.ip4, red.ip6):
            assert not probe.reaches(other, address, 80)


def test_the_last_one_takes_policy_away(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """Open networks alone put nothing in force; with the last network that is not open it ends."""
    free = sandboxes()
    with daemon.client() as api:

        def judged() -> bool:
            steps = api.why(free.port.port_id, WORLD4).steps
            return any(step.step == "policy" for step in steps)

        assert not judged()
        network(daemon, "red", 90, "strict")
        assert judged()
        assert free.ping(WORLD4)
        api.network_delete("red")
        assert not judged()
        assert free.ping(WORLD4)


def test_by_a_cni_configuration(daemon: Daemon, netns_factory: Callable[[], TestNetns]) -> None:
    """The configuration's word holds from the first ADD on; a later one that says otherwise changes it for
    all ports; one that joins a network made by hand can't."""
    cni, one, two = Cni(daemon, isolation="strict"), netns_factory(), netns_factory()
    addresses = cni.add("one", one).addresses
    cni.add("two", two)
    probe = Probe(daemon)
    with daemon.client() as api, listening(one, 80):
        (source,) = (Sandbox(two, p) for p in api.port_list() if p.owner.container_id == "two")
        assert not any(probe.reaches(source, address, 80) for address in addresses)
        cni.conf["isolation"] = "tenant"
        assert cni.add("three", netns_factory()).ok
        assert all(probe.reaches(source, address, 80) for address in addresses)
        api.network_create("hand", subnets=["10.90.0.0/24"])
        by_hand = Cni(daemon, name="joins", network="hand", ipam={}, isolation="strict")
        refused = by_hand.add("four", netns_factory())
        assert refused.answer["code"] == 7
        assert "network hand is open; drop isolation" in refused.answer["msg"]
        assert api.network_show("hand").network.isolation == "open"


def test_a_wrong_word_is_refused(daemon: Daemon) -> None:
    """By the API and by the command line, which name what there is."""
    with daemon.client() as api, pytest.raises(InvalidInput, match="isolation"):
        api.network_create("red", subnets=["10.90.0.0/24"], isolation="closed")  # type: ignore[arg-type]
    done = daemon.cli("network", "create", "red", "--isolation", "closed", check=False)
    assert done.returncode == 2
    assert "strict" in done.stderr
    daemon.cli("network", "create", "red", "--subnet", "10.90.0.0/24", "--isolation", "tenant")
    assert "tenant" in daemon.cli("network", "list").stdout
