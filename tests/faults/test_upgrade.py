"""Another release's data path takes over under running transfers; and SIGTERM under load.

The other release is a copy of the package with one line of its C changed and the object compiled anew: it
does not answer IPv4 echo requests to the gateway, so which one is in force can be seen from a sandbox.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import portwright
from portwright.dataplane.abi import PwAbi, PwState
from portwright.kernel.bpf import Map
from tests.faults.audit import Record, pins, remains
from tests.faults.cni import Cni
from tests.faults.conftest import Crash
from tests.fix_daemon import Daemon
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns

Figures = Callable[..., None]
PACKAGE = Path(portwright.__file__).parent
ECHO = re.compile(r"asked = v4 \? 8 : 128\b")


@pytest.fixture(scope="module")
def other_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH with the changed package in it."""
    tree = tmp_path_factory.mktemp("release")
    package = tree / "portwright"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.o"))
    dataplane = package / "dataplane"
    source = dataplane / "answer.h"
    changed, count = ECHO.subn("asked = v4 ? 250 : 128", source.read_text())
    assert count == 1, "the line that this test changes is not there any more"
    source.write_text(changed)
    include = f"/usr/include/{platform.machine()}-linux-gnu"
    flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-fms-extensions", "-w"]
    flags += ["-I", str(dataplane), "-I", include]
    build = ["clang", *flags, "-c", str(dataplane / "portwright.bpf.c")]
    subprocess.run([*build, "-o", str(dataplane / "portwright.bpf.o")], check=True)
    return tree


def digest(package: Path) -> str:
    """The name under which a package's object is pinned."""
    data = (package / "dataplane" / "portwright.bpf.o").read_bytes()
    return f"object-{hashlib.sha256(data).hexdigest()[:16]}"


def objects(daemon: Daemon) -> list[str]:
    """The objects pinned, whatever namespace they are for."""
    return sorted(p.name for p in pins(daemon).glob("*/object-*"))


def answers(box: TestNetns) -> bool:
    """Whether the gateway answers IPv4 echo requests."""
    return box.run(["ping", "-n", "-c1", "-W1", "169.254.1.1"], check=False).returncode == 0


@pytest.mark.alone
def test_an_upgrade_replaces_the_programs_under_a_running_transfer(
    crash: Crash, cni: Cni, netns_factory: NetnsFactory, other_release: Path, figures: Figures, attach: str
) -> None:
    """Every attached port runs the new object's programs, counters go on, the old object is gone, and the
    transfers did not stop; then back again; also when the takeover is cut between load and update."""
    daemon = crash.daemon
    crash.env = {"PORTWRIGHT_ATTACH": attach}
    crash.arm("")
    box = netns_factory()
    added = cni.add("box", box)
    assert added.ok, f"{added}\n{daemon.tail()}"
    assert answers(box)
    assert objects(daemon) == [digest(PACKAGE)]
    before = _carried(crash)

    daemon.stop()
    crash.env["PYTHONPATH"] = str(other_release)
    crash.arm("")
    assert objects(daemon) == [digest(other_release / "portwright")]
    assert not answers(box), "the old program is still in force"
    crash.clean("upgrade")
    assert all(after > before[port_id] for port_id, after in _carried(crash).items() if before[port_id])

    del crash.env["PYTHONPATH"]
    crash.dies_starting("load:programs")
    assert not answers(box), "nothing was switched yet"
    crash.arm("")
    assert answers(box)
    assert objects(daemon) == [digest(PACKAGE)]
    crash.clean("back again, in two attempts")
    assert cni.delete("box", box).ok
    crash.clean("DEL")
    figures(witness=crash.witness.sentence())


@pytest.mark.parametrize(("abi", "is_taken"), [(PwAbi.ABI_VERSION - 1, True), (PwAbi.ABI_VERSION + 1, False)])
def test_maps_of_another_release(
    daemon: Daemon, netns_factory: NetnsFactory, other_release: Path, abi: int, is_taken: bool
) -> None:
    """Maps of the ABI before are taken over; those of a later one are refused by name, and stay in force."""
    cni = Cni(daemon)
    box = netns_factory()
    assert cni.add("box", box).ok
    (pin,) = pins(daemon).glob("*/maps/pw_state")
    other = {"PYTHONPATH": str(other_release)}  # of which nothing is loaded yet
    with closing(Map.from_pin(pin)) as state:
        now = PwState.unpack(state.lookup(bytes(4)) or b"")
        state.update(bytes(4), now._replace(abi=abi).pack())
        daemon.kill()
        if is_taken:
            daemon.start(**other)
            assert state.lookup(bytes(4)) == now.pack()
            assert not answers(box)
            daemon.stop()
        else:
            daemon.launch(**other)
            assert daemon.wait() == 1
            assert "its maps are of another version" in daemon.tail()
            assert state.lookup(bytes(4)) == now._replace(abi=abi).pack()
            assert answers(box)
            state.update(bytes(4), now.pack())
    daemon.start()
    assert cni.delete("box", box).ok


def test_a_first_load_that_was_cut_is_begun_anew(daemon: Daemon) -> None:
    """Killed with half of a new data path pinned, or all of it: the next start makes a whole one."""
    for place in ("load:maps", "load:programs"):
        daemon.stop()
        assert remains(daemon) == []
        daemon.launch(PORTWRIGHT_DIE_AT=place)
        assert daemon.wait() == -9
        daemon.start()
        assert objects(daemon) == [digest(PACKAGE)]


@pytest.mark.parametrize("place", ["close:table", "close:sysctl", "close:pins"])
def test_an_end_without_ports_that_was_cut_is_done_again(
    daemon: Daemon, netns_factory: NetnsFactory, place: str
) -> None:
    """Killed while the last traces are removed: the next start works, and its end leaves nothing."""
    cni = Cni(daemon)
    box = netns_factory()
    daemon.kill()
    daemon.start(PORTWRIGHT_DIE_AT=place)
    added = cni.add("box", box)
    assert added.ok, f"{added}\n{daemon.tail()}"
    assert cni.delete("box", box).ok
    daemon.stop()
    assert daemon.wait() == -9
    daemon.start()
    added = cni.add("box", box)
    assert added.ok, f"{added}\n{daemon.tail()}"
    assert answers(box)
    assert cni.delete("box", box).ok
    daemon.stop()
    assert remains(daemon) == []


def test_killed_before_any_port_leaves_nothing_at_its_next_end(
    daemon: Daemon, netns_factory: NetnsFactory
) -> None:
    """A table and sysctls that a killed run made for a port that it never had go with the next run's end."""
    cni = Cni(daemon)
    daemon.kill()
    daemon.start(PORTWRIGHT_DIE_AT="add:intent")
    assert not cni.add("box", netns_factory()).ok
    assert daemon.wait() == -9
    daemon.start()
    daemon.stop()
    assert remains(daemon) == []


def test_sigterm_under_load(crash: Crash, cni: Cni, netns_factory: NetnsFactory, figures: Figures) -> None:
    """SIGTERM in the midst of 20 ADDs: it ends with status 0; each ADD that answered is there after the
    restart, the others left nothing, and the transfers did not stop."""
    daemon = crash.daemon
    boxes = [netns_factory() for _ in range(20)]
    first = threading.Event()

    def add(box: TestNetns) -> bool:
        outcome = cni.add(box.name, box)
        first.set()
        return outcome.ok

    with ThreadPoolExecutor(len(boxes)) as pool:
        adding = {box.name: pool.submit(add, box) for box in boxes}
        assert first.wait(30)
        daemon.stop()
        answered = {name for name, one in adding.items() if one.result()}
    assert daemon.wait() == 0
    daemon.start()
    there = {p.owner.container_id for p in Record(daemon.state_dir).ports} - {""}
    assert answered <= there
    crash.clean("SIGTERM")
    for box in boxes:
        assert cni.delete(box.name, box).ok
    crash.clean("DEL")
    figures(answered=len(answered), of=len(boxes), witness=crash.witness.sentence())


def _carried(crash: Crash) -> dict[str, int]:
    with crash.daemon.client() as client:
        return {s.port_id: s.from_port.total.packets for s in client.stats()}
