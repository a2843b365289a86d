"""The matrix of manifests on real packets: who reaches whom, as ports and programs have it."""

from __future__ import annotations

from collections.abc import Container, Sequence

from portwright.api.client import Client
from portwright.domains.names import asked, naming
from portwright.live import box, hosts
from portwright.live.hosts import calmly
from portwright.live.probe import Prober
from portwright.live.sandboxes import Sandboxes
from portwright.model.errors import InvalidInput
from portwright.policy.manifests.read import Manifests
from portwright.policy.matrix import addressed, pods_of, questions, services_of
from portwright.policy.rules import TCP, UDP, Endpoint, Flow, Snapshot

#: What a run may be asked: a sandbox each, and a packet each; some 10 ms and 0.3 ms.
MAX_PODS, MAX_CELLS = 1_000, 250_000
_DNS = 53


def refuse_too_many(snapshot: Snapshot) -> None:
    """Raises InvalidInput for more pods or cells than a run may be asked, before any is looked at."""
    pods = pods_of(snapshot)
    cells = len(pods) * sum(len(services_of(pod)) for pod in pods)
    for count, most, what in ((len(pods), MAX_PODS, "pods"), (cells, MAX_CELLS, "cells")):
        if count > most:
            why = f"--live takes {most:,} at most; name fewer files with -f, or leave --live out"
            raise InvalidInput(what, count, why)


def verdicts(
    files: Sequence[tuple[str, str]], manifests: Manifests, progress: box.Progress
) -> list[bool | None]:
    """Whether each cell's packet arrives, in the order of the matrix's cells, host endpoints' last.

    None: it can't be tried.

    ``files`` (name, text) are what ``manifests`` was read from; a daemon of their own applies them, and each
    pod becomes a sandbox. Raises InvalidInput for what the daemon refuses, and as box.run and Prober.send do;
    then nothing is left.
    """
    world = addressed(manifests.snapshot)
    asked_of_hosts = hosts.questions(manifests)
    cells = list(questions(world))
    proxied = {pod.title for pod in pods_of(world) if asked(naming(manifests.policy_set), pod)}
    sent = [at for at, cell in enumerate(cells) if not _is_look_up(*cell, proxied)]
    flows = [cells[at][2] for at in sent]
    arrived = box.run(lambda client, say: _sent(client, files, pods_of(world), flows, calmly(say)), progress)
    found: list[bool | None] = [None] * len(cells)
    for at, verdict in zip(sent, arrived, strict=True):
        found[at] = verdict
    return found + hosts.verdicts(files, manifests, asked_of_hosts, progress)


def _is_look_up(source: Endpoint, target: Endpoint, flow: Flow, proxied: Container[str]) -> bool:
    """Whether the daemon's DNS proxy would take the packet, on its way and answer for its receiver."""
    return (
        source.title in proxied and source is not target and flow.port == _DNS and flow.protocol in {TCP, UDP}
    )


def _sent(
    client: Client,
    files: Sequence[tuple[str, str]],
    pods: Sequence[Endpoint],
    flows: Sequence[Flow],
    progress: box.Progress,
) -> list[bool]:
    client.policy_apply(files, dry_run=True)  # what is refused is refused before anything is built
    sandboxes = Sandboxes.of(client, pods, progress)
    client.policy_apply(files)
    prober = Prober(sandboxes.places, client.drops)
    return prober.send(flows, lambda done: progress(f"{done:,} of {len(flows):,} packets"))
