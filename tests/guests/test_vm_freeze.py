"""``portwright vm freeze`` and ``vm run --incoming``: one guest, and copies of it on ports of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.deadline import wait_until
from tests.fix_daemon import PORTWRIGHT, Daemon, Networks, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.guests.conftest import Run, RunFactory, booted
from tests.netns.clone_lab import entries

pytestmark = [pytest.mark.guests, pytest.mark.slow, pytest.mark.timeout(300)]

HEARD_WITHIN = 20.0
Restored = Callable[[Path, str], Run]


@pytest.fixture
def restored(daemon: Daemon, vm_run: RunFactory, tmp_path: Path) -> Iterator[Restored]:
    """Start ``vm run --incoming`` by the file and a name; gone before ``vm_run``'s."""
    del vm_run
    with ExitStack() as stack:

        def start(file: Path, name: str) -> Run:
            command = ["nsenter", f"--net={daemon.host.path}", "--", str(PORTWRIGHT), "vm", "run", "--json"]
            errors = tmp_path / f"errors of {name}"
            with errors.open("wb") as err:
                process = subprocess.Popen(
                    [*command, "--incoming", str(file), "--name", name],
                    env=daemon.env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=err,
                    text=True,
                )
            stack.enter_context(process)
            stack.callback(process.kill)
            run = Run(process, errors)
            stack.callback(run.close)
            return run

        yield start


@contextmanager
def full(folder: Path) -> Iterator[Path]:
    """A folder whose file system has room for no guest."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "pwt-full", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def answers(daemon: Daemon, near: Sandbox, run: Run) -> None:
    """AssertionError unless the guest does, at every address of its ports, as the one that was frozen: on the
    first to the host, on the second to a neighbour of that network."""
    for nic, asking in zip(run.facts["nics"], (daemon.host, near.ns), strict=True):
        for address in nic["addresses"]:
            wait_until(partial(_pings, asking, address), HEARD_WITHIN, f"{run.facts['name']} at {address}")
            url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
            assert asking.run(["curl", "-s", "--max-time", "10", url]).stdout == "g1\n"


def _pings(asking: TestNetns, address: str) -> bool:
    return asking.run(["ping", "-n", "-c1", "-W2", address], check=False).returncode == 0


def test_a_guest_is_frozen_and_runs_many_times(
    daemon: Daemon,
    networks: Networks,
    sandboxes: SandboxFactory,
    vm_run: RunFactory,
    restored: Restored,
    console: Path,
) -> None:
    """It goes on after it is frozen; two copies run beside it, each at the addresses of its port; a copy of a
    copy too. What a file, a name or an option can't be is refused."""
    networks("n1")
    near = sandboxes("n2")
    first = vm_run("--name", "g1", "--append", "portwright.httpd=80", "--network", "n2")
    booted(console)
    file = console.with_name("frozen")
    said = json.loads(daemon.cli("vm", "freeze", "g1", str(file), "--json").stdout)
    assert (said["file"], said["bytes"]) == (str(file), file.stat().st_size)
    assert file.stat().st_mode & 0o777 == 0o600
    again = daemon.cli("vm", "freeze", "g1", str(file), check=False)
    assert again.returncode == 1
    assert "is there already" in again.stderr
    with full(console.with_name("full")) as there:
        failed = daemon.cli("vm", "freeze", "g1", str(there / "frozen"), check=False)
        assert failed.returncode == 1
        assert "could not be frozen" in failed.stderr
        assert list(there.iterdir()) == []
    answers(daemon, near, first)

    copies = [restored(file, name) for name in ("left", "right")]
    with daemon.client() as client:
        ports = [client.port_show(run.facts["nics"][0]["port_id"]) for run in copies]
        assert {port.mac for port in ports} == {first.facts["nics"][0]["mac"]}
        assert [list(port.inner_addresses) for port in ports] == [first.addresses()] * 2
    assert len({address for run in (first, *copies) for address in run.addresses()}) == 6
    for run in (first, *copies):
        answers(daemon, near, run)

    second = console.with_name("second")
    daemon.cli("vm", "freeze", "left", str(second))
    copies.append(restored(second, "third"))
    for run in (first, *copies):
        answers(daemon, near, run)
    assert len(entries(daemon)) == 6

    head = console.with_name("odd")
    head.write_bytes(b"no guest")
    for arguments, why in (
        (["--incoming", str(head)], "is no guest that `vm freeze` wrote"),
        (["--incoming", str(file), "--memory", "256"], "--memory is not to be said"),
        (["--incoming", str(file), "--network", "n1"], "the guest has 2 NICs"),
        ([], "name --kernel, or --incoming"),
    ):
        refused = daemon.cli("vm", "run", *arguments, check=False)
        assert refused.returncode, arguments
        assert why in refused.stderr.replace("\n", " "), refused.stderr
    cut = console.with_name("cut")
    cut.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    failed = daemon.cli("vm", "run", "--incoming", str(cut), check=False)
    assert failed.returncode == 1
    assert "QEMU did not start it" in failed.stderr
    assert len(entries(daemon)) == 6
