"""The prober: what it says of packets that arrive, that policy drops, and that neither happens to."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from contextlib import closing

import pytest

from portwright.api.client import Client
from portwright.kernel import netns
from portwright.live.ears import Place, ProbeFailed, open_socket
from portwright.live.probe import Prober
from portwright.live.sandboxes import Sandboxes
from portwright.model.errors import Conflict, InvalidInput
from portwright.policy.rules import ICMP, ICMP6, SCTP, TCP, UDP, Endpoint, Flow
from tests.fix_daemon import Daemon

pytestmark = pytest.mark.netns

PODS = tuple(
    Endpoint(name=f"p{n}", namespace="default", addresses=(f"10.0.0.{n}", f"fd00::{n}")) for n in (1, 2, 3)
)
ADDRESSES = [address for pod in PODS for address in pod.addresses]
#: p2 takes nothing, whatever it is.
CLOSED = """
apiVersion: v1
kind: Pod
metadata: {name: p2, labels: {closed: "yes"}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {closed: "yes"}}, policyTypes: [Ingress]}
"""
#: For nft: whatever comes in is dropped, and nobody of ours counts it.
EAT = "table inet t { chain c { type filter hook input priority 0; policy drop; }; }"


class Lab:
    """Three sandboxes of a daemon, and a prober between them."""

    def __init__(self, client: Client, within: float) -> None:
        self.client = client
        self.sandboxes = Sandboxes(client, ADDRESSES)
        self.sandboxes.be(PODS)
        self.prober = Prober(self.sandboxes.places, client.drops, within=within)

    def place(self, address: str) -> Place:
        """Where it is."""
        return self.sandboxes.places[address]

    def close(self) -> None:
        """Let go of everything."""
        self.prober.close()
        self.sandboxes.close()


@pytest.fixture
def lab(daemon: Daemon) -> Iterator[Lab]:
    """The sandboxes, and p2's policy in force."""
    with daemon.client() as client, closing(Lab(client, 20)) as made:
        client.policy_apply([("closed.yaml", CLOSED)])
        yield made


def flow(source: str, target: str, protocol: int = TCP, port: int | None = 80) -> Flow:
    """A flow of this protocol."""
    return Flow(source=source, destination=target, protocol=protocol, source_port=50_000, port=port)


def test_every_protocol_and_family_in_one_go(lab: Lab) -> None:
    """All pairs, by TCP, UDP, SCTP, ICMP and another protocol, over both families: what is for p2 is dropped,
    but for its own; the rest arrives, and the answers are in the order of the questions."""
    flows = [
        flow(f"{net}{source}", f"{net}{target}", protocol, port)
        for net in ("10.0.0.", "fd00::")
        for source, target in itertools.product((1, 2, 3), repeat=2)
        for protocol, port in (
            (TCP, 80),
            (UDP, 80),
            (SCTP, 80),
            (ICMP if "." in net else ICMP6, None),
            (47, None),
        )
        # An answer to what p2 has opened would be let in, where no port tells it from a question.
        if port is not None or source != 2
    ]
    told: list[int] = []
    found = lab.prober.send(flows, told.append)

    wanted = [f.destination[-1] != "2" or f.source == f.destination for f in flows]
    assert found == wanted
    assert told[-1] == len(flows)
    assert told == sorted(told)


def test_what_is_neither_is_no_verdict(daemon: Daemon) -> None:
    """A packet that the receiver's own firewall eats neither arrives nor is a drop of ours: an error that
    names it, not a denial; and so is one that a port drops for another reason than policy."""
    with daemon.client() as client, closing(Lab(client, 0.5)) as lab:
        with netns.entered(lab.place("10.0.0.3").netns):
            subprocess.run(["nft", EAT], check=True)
        with pytest.raises(
            ProbeFailed, match=r"10\.0\.0\.1 -> 10\.0\.0\.3 .*neither arrived nor was counted"
        ):
            lab.prober.send([flow("10.0.0.1", "10.0.0.3"), flow("10.0.0.1", "10.0.0.2")])
        client.port_set(lab.place("10.0.0.2").port_id, admin="down")
        with pytest.raises(ProbeFailed, match="not by policy: link_down"):
            lab.prober.send([flow("10.0.0.1", "10.0.0.2", UDP)])
        with pytest.raises(ProbeFailed, match=r"10\.9\.9\.9: nobody has this address"):
            lab.prober.send([flow("10.0.0.1", "10.9.9.9")])


def test_another_listener_is_an_error(lab: Lab) -> None:
    """A port that something else in the sandbox has is named, and no verdict is made up."""
    with closing(open_socket(lab.place("10.0.0.3"), 4, TCP)) as other:
        other.bind(("10.0.0.3", 80))
        with pytest.raises(ProbeFailed, match="port 80: Address already in use"):
            lab.prober.send([flow("10.0.0.1", "10.0.0.3")])


def test_pods_come_and_go(lab: Lab) -> None:
    """Those that are no more wanted are gone with their ports and addresses, those that stay keep theirs, and
    a pod may take another's address; what listened for the old one does not answer for the new."""
    kept = lab.place("10.0.0.1")
    assert lab.prober.send([flow("10.0.0.1", "10.0.0.3")]) == [True]
    heir = Endpoint(name="heir", namespace="default", addresses=("10.0.0.3",))
    lab.sandboxes.be([PODS[0], heir])

    assert lab.place("10.0.0.1") == kept
    assert set(lab.sandboxes.places) == {"10.0.0.1", "fd00::1", "10.0.0.3"}
    assert len(lab.client.port_list()) == 2
    assert lab.prober.send([flow("10.0.0.1", "10.0.0.3"), flow("10.0.0.3", "10.0.0.1")]) == [True, True]


@pytest.mark.parametrize("addresses", [(), ("10.0.0.7", "10.0.0.8"), ("10.0.0.1",)])
def test_a_pod_that_can_not_be_built_is_refused(lab: Lab, addresses: tuple[str, ...]) -> None:
    """Without an address, with two of a family, with one that another has: refused, and nothing is left."""
    before = dict(lab.sandboxes.places)
    with pytest.raises((InvalidInput, Conflict)):
        lab.sandboxes.add(Endpoint(name="odd", namespace="default", addresses=addresses))
    assert lab.sandboxes.places == before
    assert len(lab.client.port_list()) == len(PODS)
