"""Cases 49 and 50: what a kill -9 and a reboot leave behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from .kit.lab import Lab, Sandbox, ips_of
from .kit.observe import bare_addresses, wait_until
from .kit.plugin import CniFailed, Execution, Json
from .kit.traffic import ping


def _set(event: threading.Event, _: object) -> None:
    event.set()


def _kill_points(count: int) -> Iterator[float]:
    """Delays in seconds, spread over the life of an ADD; the seed is fixed, so that a failure repeats."""
    dice = random.Random(49)
    for number in range(count):
        yield dice.uniform(0, 0.004 + 0.036 * number / max(count - 1, 1))


def _deleted_without_a_trace(lab: Lab, network: Json, sandbox: Sandbox, held: set[str], ends: int) -> None:
    """DEL what a kill cut short: no link and no record of it stays, no other ADD gets its address twice."""
    lab.delete(network, sandbox)
    assert len(lab.host.link_names() - lab.links_before) == len(held) * ends
    assert sandbox.id not in lab.host.state_text()
    (fresh,) = ips_of(lab.add(network, late := lab.sandbox()))
    assert fresh not in held
    held.add(fresh)
    lab.check(network, late)


@pytest.mark.feature("daemon")
def test_case_49_daemon_killed_during_add(own_lab: Lab, kills: int) -> None:
    """The daemon killed (-9) at random points of an ADD: no address twice, DEL frees all, others live on."""
    lab = own_lab
    daemon = lab.host.daemon
    assert daemon is not None
    network = lab.network()
    witness = lab.sandbox()
    held = {ips_of(lab.add(network, witness))[0]}
    ends = len(lab.host.link_names() - lab.links_before)  # links on the host for one attachment
    with ThreadPoolExecutor(1) as pool:
        for delay in _kill_points(kills):
            sandbox = lab.sandbox()
            adding = pool.submit(lab.add, network, sandbox)
            done = threading.Event()
            adding.add_done_callback(partial(_set, done))
            done.wait(delay)
            daemon.kill()
            failure = adding.exception(60)
            assert failure is None or isinstance(failure, CniFailed), failure
            daemon.start()
            if failure is None:
                (address,) = ips_of(adding.result())
                assert address not in held
                assert bare_addresses(sandbox.ns, "eth0") == {address}
                lab.check(network, sandbox)
            _deleted_without_a_trace(lab, network, sandbox, held, ends)
            assert ping(lab.host.ns, next(iter(bare_addresses(witness.ns, "eth0"))))
    lab.check(network, witness)


@pytest.mark.feature("no_daemon")
def test_case_49_plugin_killed_during_add(own_lab: Lab, kills: int) -> None:
    """The plugin killed (-9) at random points of an ADD: no address twice, DEL frees all, others live on."""
    lab = own_lab
    network = lab.network()
    witness = lab.sandbox()
    held = {ips_of(lab.add(network, witness))[0]}
    ends = len(lab.host.link_names() - lab.links_before)  # links on the host for one attachment
    for delay in _kill_points(kills):
        sandbox = lab.sandbox()
        env = lab.runtime.environment("ADD", sandbox.id, sandbox.path, "eth0")
        stdin = lab.stdin(lab.config_of(network))
        execution = Execution(lab.runtime.find(lab.profile.type), env, stdin, lab.host.ns)
        timer = threading.Timer(delay, execution.kill)
        timer.start()
        execution.wait(30)
        timer.join()
        _deleted_without_a_trace(lab, network, sandbox, held, ends)
    assert ping(lab.host.ns, next(iter(bare_addresses(witness.ns, "eth0"))))


def test_case_50_reboot(own_lab: Lab) -> None:
    """The records survive a reboot, the namespaces don't: GC with an explicit empty list frees everything."""
    lab = own_lab
    network = lab.network(ipMasq=True, version="1.1.0")
    sandboxes = [lab.sandbox() for _ in range(3)]
    given = [ips_of(lab.add(network, sandbox))[0] for sandbox in sandboxes]
    if lab.host.daemon is not None:
        lab.host.daemon.kill()
    for sandbox in sandboxes:
        sandbox.ns.delete()
    wait_until(lambda: lab.host.link_names() == lab.links_before, "the end of the links")
    if lab.host.daemon is not None:
        lab.host.daemon.start()
    lab.runtime.forget()
    lab.runtime.gc(network, [])
    assert lab.leaks(*(sandbox.id for sandbox in sandboxes), *given) == []
