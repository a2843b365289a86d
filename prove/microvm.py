"""The claims of the third part: microVM ports."""

from __future__ import annotations

from collections.abc import Iterator

from prove.line import Line, Proof
from prove.port import benchmark
from prove.runner import Runner
from prove.suite import shown

#: Where QEMU or a kernel for it is missing that is a failure, and no skipped test.
_GUESTS = {"PORTWRIGHT_REQUIRE_GUESTS": "1"}


def guests(runner: Runner) -> Iterator[Line]:
    """Guests on ports, per model."""
    yield shown(
        runner,
        "tcfilter",
        "tcfilter: both families, TCP with offloads, MTU on three ends, CNI's answer, kills; stand-in guest",
        "tests/netns/test_tcfilter.py",
        "tests/netns/test_tcfilter_join.py",
        "tests/netns/test_tcfilter_peer.py",
        "tests/faults/test_kill_tap.py",
    )
    claim = "guard, policy and paths of containers' tests with guests in their places"
    yield shown(runner, "semantics", claim, "tests/netns/test_tcfilter_semantics.py")
    claim = "macvtap, direct tap: what tcfilter's tests show, and the semantics on the tap; stand-in guest"
    yield shown(
        runner,
        "models",
        claim,
        "tests/netns/test_guest_models.py",
        "tests/netns/test_macvtap.py",
        "tests/netns/test_tap_direct.py",
        "tests/netns/test_tap_semantics.py",
    )
    claim = "a QEMU guest per model: ping, HTTP, iperf3 both ways, both families, MTU 9,000, two queues, ends"
    yield shown(
        runner,
        "qemu-models",
        claim,
        "tests/guests/test_models_qemu.py",
        env=_GUESTS,
    )
    claim = "QEMU guests in containerd's namespaces, ours and behind ptp: ping, HTTP, both families; layer 3"
    yield shown(runner, "containerd", claim, "tests/guests/test_vm_there.py", env=_GUESTS)
    claim = "policy's truth table (a sample), containers, guests and the world, each to each"
    yield shown(runner, "truth", claim, "tests/netns/test_policy_guests.py")
    claim = "a namespace's layer 3 in a guest's kernel: generated ones lose nothing, or are refused"
    yield shown(runner, "layer3", claim, "tests/netns/test_layer3.py")
    claim = "CNI behind ptp, bridge, macvlan: tc-redirect-tap's result, dual-stack, several devices; kills"
    yield shown(runner, "chained", claim, "tests/netns/test_chained.py", "tests/faults/test_kill_tap.py")


def hotplug(runner: Runner) -> Iterator[Line]:
    """Cards that come and go."""
    claim = "hotplug and unplug of a card 100 times under traffic on another; kills in the middle; held cards"
    env = {**_GUESTS, "PORTWRIGHT_PLUGS": "100"}
    tests = ("tests/guests/test_hotplug.py", "tests/unit/test_vmm_control.py")
    yield shown(runner, "hotplug", claim, *tests, env=env)


def migration(runner: Runner) -> Iterator[Line]:
    """Off the bridge."""
    yield shown(
        runner,
        "migration",
        "port migrate: containers and guests leave a bridge while they run, whenever it is killed",
        "tests/netns/test_migrate*.py",
        "tests/faults/test_kill_migrate.py",
    )
    claim = (
        "port migrate: the bridge plugin's containers under containerd, and a guest under QEMU, leave theirs"
    )
    yield shown(
        runner,
        "migration-real",
        claim,
        "tests/containers/test_migrate_ctr.py",
        "tests/guests/test_migrate_qemu.py",
        env=_GUESTS,
    )


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
        "tests/netns/test_firecracker_run.py",
        "tests/unit/test_vmm_matrix.py",
    )


def performance(runner: Runner) -> Iterator[Line]:
    """Every goal of the benchmark's part."""
    yield from benchmark(runner, "microvm", "guests")


def built(runner: Runner) -> Iterator[Line]:
    """What the issue's list of things to build has besides."""
    claim = "vm run: a QEMU guest on a port in one command, whose end is the port's"
    tests = ("tests/guests/test_qemu_boot.py", "tests/guests/test_vm_run.py")
    yield shown(runner, "vm", claim, *tests, env=_GUESTS)
    yield shown(
        runner,
        "jail",
        "jail: a hostile process tries every way out; killed at any moment it leaves nothing; QEMU in it",
        "tests/unit/test_jail_parts.py",
        "tests/netns/test_jail_*.py",
        "tests/guests/test_jail_guest.py",
        env=_GUESTS,
    )
    claim = "clones with one MAC and address: TCP, UDP, ARP, ND, errors, policy, hostile packets, kills"
    yield shown(
        runner,
        "clones",
        claim,
        "tests/netns/test_clones.py",
        "tests/netns/test_clones_semantics.py",
        "tests/dataplane/test_clone_rewrite.py",
        "tests/faults/test_kill_clone.py",
    )
    claim = "a QEMU guest frozen and restored twice on clones' ports: three answer, each at its own address"
    yield shown(
        runner,
        "clones-qemu",
        claim,
        "tests/guests/test_clones_qemu.py",
        "tests/guests/test_vm_freeze.py",
        env=_GUESTS,
    )


PROOFS = (
    Proof("1", "guests", guests),
    Proof("2", "hotplug", hotplug),
    Proof("3", "migration", migration),
    Proof("4", "others' filters", others),
    Proof("5", "Firecracker", firecracker),
    Proof("6", "performance", performance),
    Proof("build", "what else is built", built),
)
