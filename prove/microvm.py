"""The claims of the third part: microVM ports.

A claim that nothing shows yet is a FAIL that says so: no line is left out to look better.
"""

from __future__ import annotations

from collections.abc import Iterator

from prove.line import Line, Proof
from prove.port import benchmark
from prove.runner import Runner
from prove.suite import shown

_ABSENT = "not built yet"


def guests(runner: Runner) -> Iterator[Line]:
    """Guests on ports, per model."""
    yield shown(
        runner,
        "tcfilter",
        "tcfilter: both families, TCP with offloads, MTU on three ends, CNI's answer, kills; stand-in guest",
        "tests/netns/test_tcfilter.py",
        "tests/faults/test_kill_tap.py",
    )
    claim = "guard, policy and paths of containers' tests with guests in their places"
    yield shown(runner, "semantics", claim, "tests/netns/test_tcfilter_semantics.py")
    yield Line(
        False, "macvtap and direct tap; jumbo MTU in a guest; guests in containerd's namespaces", _ABSENT
    )


def hotplug(runner: Runner) -> Iterator[Line]:
    """Cards that come and go."""
    del runner
    yield Line(False, "hotplug and unplug of a card 100 times under traffic on another", _ABSENT)


def migration(runner: Runner) -> Iterator[Line]:
    """Off the bridge."""
    del runner
    yield Line(False, "port migrate: a guest and a container leave a bridge while they run", _ABSENT)


def others(runner: Runner) -> Iterator[Line]:
    """What somebody else put on the device."""
    test = "tests/netns/test_tcfilter.py::test_what_others_put_on_the_device_stays"
    yield shown(runner, "others", "another owner's clsact filters survive attach and detach", test)


def firecracker(runner: Runner) -> Iterator[Line]:
    """The driver against its contract."""
    yield shown(
        runner,
        "firecracker",
        "Firecracker's driver against a server that enforces its API description and rules, faults included",
        "tests/unit/test_firecracker_*.py",
    )


def performance(runner: Runner) -> Iterator[Line]:
    """Every goal of the benchmark's part."""
    yield from benchmark(runner, "microvm")
    yield Line(False, "end to end with a TCG guest", _ABSENT)


def built(runner: Runner) -> Iterator[Line]:
    """What the issue's list of things to build has besides."""
    claim = "vm run: a QEMU guest on a port in one command, whose end is the port's"
    yield shown(runner, "vm", claim, "tests/guests", env={"PORTWRIGHT_REQUIRE_GUESTS": "1"})
    yield Line(False, "jail: a hypervisor's process that tries every way out", _ABSENT)
    yield Line(False, "snapshot clones told apart by a rewrite at the port", _ABSENT)


PROOFS = (
    Proof("1", "guests", guests),
    Proof("2", "hotplug", hotplug),
    Proof("3", "migration", migration),
    Proof("4", "others' filters", others),
    Proof("5", "Firecracker", firecracker),
    Proof("6", "performance", performance),
    Proof("build", "what else is built", built),
)
