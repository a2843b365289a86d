"""Host endpoints of the matrix on real packets: by interfaces of the names that they say, on private hosts.

A host for each node that HostEndpoints name, whose daemon takes itself for that node; and there one
endpoint's interface after the other.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from portwright.api.client import Client
from portwright.domains.names import asked, naming
from portwright.live import box
from portwright.live.probe import Prober
from portwright.live.sandboxes import Sandboxes
from portwright.live.uplinks import Uplink
from portwright.model.errors import InvalidInput
from portwright.policy.host.matrix import Question, host_questions, own_addresses
from portwright.policy.host.rulings import Rulings
from portwright.policy.host.stages import Stage
from portwright.policy.manifests.calico_hosts import HOST_NODE
from portwright.policy.manifests.read import Manifests
from portwright.policy.matrix import addressed, pods_of
from portwright.policy.rules import TCP, Endpoint

#: They go one by one, some 20 ms each.
MAX_CELLS = 20_000
#: Seconds between two words about how far it is; what takes less says nothing.
_SAY_EVERY = 1.0
_DNS = 53
#: Around a pod's address: what sandboxes' networks may be (sandboxes.py).
_NEAR = {4: 8, 6: 16}


def questions(manifests: Manifests) -> list[Question]:
    """What is asked of host endpoints. Raises InvalidInput for more than a run may be asked."""
    found = list(host_questions(manifests.policy_set, addressed(manifests.snapshot)))
    if len(found) > MAX_CELLS:
        why = (
            f"--live takes {MAX_CELLS:,} of host endpoints at most; name fewer files with -f, or leave it out"
        )
        raise InvalidInput("cells", len(found), why)
    return found


def verdicts(
    files: Sequence[tuple[str, str]],
    manifests: Manifests,
    cells: Sequence[Question],
    progress: box.Progress,
) -> list[bool | None]:
    """Whether each question's packet arrives; None: it can't be tried. Raises as matrix.verdicts."""
    found: list[bool | None] = [None] * len(cells)
    pods = pods_of(addressed(manifests.snapshot))
    tried = _Tried(manifests, pods)
    by_node: dict[str, list[int]] = {}
    for at, cell in enumerate(cells):
        if tried.can_be(cell):
            by_node.setdefault(cell.endpoint.labels[HOST_NODE], []).append(at)
    for node, those in by_node.items():
        sent = [cells[at] for at in those]

        def work(client: Client, say: box.Progress, sent: Sequence[Question] = sent) -> list[bool]:
            return _sent(client, files, pods, sent, calmly(say))

        for at, verdict in zip(those, box.run(work, progress, node), strict=True):
            found[at] = verdict
    return found


class _Tried:
    """What a packet can show."""

    def __init__(self, manifests: Manifests, pods: Sequence[Endpoint]) -> None:
        world = addressed(manifests.snapshot)
        self._rulings = Rulings(manifests.policy_set, world)
        named = naming(manifests.policy_set)
        self._proxied = {pod.title for pod in pods if asked(named, pod)}
        self._pods = {a for pod in pods for a in pod.addresses}
        self._near = {
            ipaddress.ip_network((address, _NEAR[ipaddress.ip_address(address).version]), strict=False)
            for address in self._pods
        }

    def can_be(self, cell: Question) -> bool:
        """Not what the DNS proxy takes, nor an address that nobody has or that sandboxes' networks have.

        Nor a TCP connection that an untracked policy lets in: its answers are judged by themselves, and may
        be dropped for a while after its verdict.
        """
        flow = cell.flow
        if cell.source in self._proxied and flow.port == _DNS:
            return False
        if not all(self._is_someones(address) for address in (flow.source, flow.destination)):
            return False
        if flow.protocol != TCP or cell.way is None:
            return True
        ruling = self._rulings.ruling(cell.endpoint, cell.way, flow)
        return not ruling.allowed or ruling.stage is not Stage.UNTRACKED

    def _is_someones(self, text: str) -> bool:
        if text in self._pods:
            return True
        address = ipaddress.ip_address(text)
        if address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local:
            return False
        return not any(address in net for net in self._near if net.version == address.version)


def _sent(
    client: Client,
    files: Sequence[tuple[str, str]],
    pods: Sequence[Endpoint],
    cells: Sequence[Question],
    progress: box.Progress,
) -> list[bool]:
    client.policy_apply(files, dry_run=True)  # what is refused is refused before anything is built
    sandboxes = Sandboxes.of(client, pods, progress)
    found: list[bool] = []
    for _, group in groupby(cells, key=lambda cell: cell.endpoint.name):
        those = list(group)
        end = those[0].endpoint
        own = own_addresses(end)
        with Uplink(end, own, _outside(those, {*own, *sandboxes.places})) as uplink:
            client.policy_apply(files)
            prober = Prober({**sandboxes.places, **uplink.places}, client.drops)
            try:
                found += prober.send(
                    [cell.flow for cell in those], _further(progress, len(found), len(cells))
                )
            finally:
                prober.close()
    return found


def _further(progress: box.Progress, done: int, of: int) -> Callable[[int], None]:
    return lambda more: progress(f"{done + more:,} of {of:,} packets at hosts")


def _outside(cells: Iterable[Question], known: set[str]) -> list[str]:
    """The addresses that are nobody's yet."""
    addresses = {a for cell in cells for a in (cell.flow.source, cell.flow.destination)}
    return sorted(addresses - known)


def calmly(progress: box.Progress) -> box.Progress:
    """Said once a second at most."""
    last = time.monotonic()

    def say(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _SAY_EVERY:
            last = time.monotonic()
            progress(text)

    return say
