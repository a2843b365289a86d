"""SIGKILL while a port's settings are changed: before and after every operation, and of the recovery too.

Whatever the record says after the restart is in force: in the maps, at the representor, at the sandbox's
end of it, and a ping gets through or there is no carrier. Then record and kernel agree to the last entry
(tests/faults/audit.py), and the transfers through other ports did not stop.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Literal

import pytest

from portwright import Client
from portwright.api import methods as m
from portwright.dataplane import values
from portwright.dataplane.abi import PwDir, PwLimitKey, PwPort, PwPortFlag, PwTarget
from portwright.kernel.bpf import Map
from portwright.model.port import Limits, Port, PortMapping, PortState
from tests.faults.audit import Record, pins
from tests.faults.conftest import Crash
from tests.faults.points import answered, around, killed_at, recoveries, steps_of, works
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(600)]

Figures = Callable[..., None]
MAPPINGS = (PortMapping(host_port=9090, container_port=80),)


@dataclass(frozen=True)
class Settings:
    """What ``port set`` can set; rates in bits per second."""

    mtu: int
    egress: int
    ingress: int
    admin: Literal["up", "down"]

    def ask(self, client: Client, port_id: str, *, admin: bool) -> Port:
        """Set it; the link's state only with ``admin``."""
        limits = m.LimitsChange(egress_rate=self.egress, ingress_rate=self.ingress)
        state = self.admin if admin else None
        return client.port_set(port_id, admin=state, limits=limits, mtu=self.mtu)


OPEN = Settings(1500, 0, 80_000_000, "up")
OTHER = Settings(1400, 40_000_000, 0, "up")
SHUT = Settings(1400, 40_000_000, 0, "down")


class Subject:
    """The port whose settings are changed, and its sandbox."""

    def __init__(self, crash: Crash, ns: TestNetns, settings: Settings) -> None:
        """Make it."""
        self._crash, self._ns = crash, ns
        limits = Limits(egress_rate=settings.egress, ingress_rate=settings.ingress)
        with crash.daemon.client() as client:
            made = client.port_create(
                "witness", ns.path, name=ns.name, port_mappings=MAPPINGS, limits=limits, mtu=settings.mtu
            )
        self.port_id, self.rep, self.host = made.port_id, made.rep_name, crash.daemon.host
        if settings.admin == "down":
            assert self.set(settings)

    def recorded(self) -> Port:
        """As the state file has it."""
        ports = Record(self._crash.daemon.state_dir).ports
        return next(p for p in ports if p.port_id == self.port_id)

    def set(self, settings: Settings, *, admin: bool = True) -> bool:
        """Whether the daemon answers that it is done."""
        return answered(self._crash, lambda client: settings.ask(client, self.port_id, admin=admin))

    def links(self) -> tuple[str, int, int, bool]:
        """(administrative state, MTU) of the representor, (MTU, carrier) of the sandbox's end."""
        rep, end = (
            json.loads(ns.run(["ip", "-j", "link", "show", name]).stdout)[0]
            for ns, name in ((self.host, self.rep), (self._ns, "eth0"))
        )
        return "up" if "UP" in rep["flags"] else "down", rep["mtu"], end["mtu"], "LOWER_UP" in end["flags"]

    def stands(self, settings: Settings, place: str) -> None:
        """AssertionError unless these settings are on record and in force, each of them."""
        port = self.recorded()
        limits = port.limits
        record = port.mtu, limits.egress_rate, limits.ingress_rate, port.admin
        assert (port.state, *record) == (PortState.ATTACHED, *astuple(settings)), place
        up = settings.admin == "up"
        assert self.links() == (settings.admin, settings.mtu, settings.mtu, up), place
        flags = (PwPortFlag.PF_LIMIT_FROM if settings.egress else 0) | (
            PwPortFlag.PF_LIMIT_TO if settings.ingress else 0
        )
        entry = PwPort.unpack(self._value("pw_ports", port.rep_ifindex.to_bytes(4, sys.byteorder)))
        assert (entry.mtu, entry.flags) == (settings.mtu, flags), place
        flags = flags & PwPortFlag.PF_LIMIT_TO | (0 if up else PwPortFlag.PF_DOWN)
        for address in port.addresses:
            target = PwTarget.unpack(self._value("pw_addrs", values.address(address.address)))
            assert (target.mtu, target.flags) == (settings.mtu, flags), f"{place}: {address.address}"
        for direction, rate in (PwDir.FROM_PORT, settings.egress), (PwDir.TO_PORT, settings.ingress):
            raw = self._value("pw_limits", PwLimitKey(port_id=int(self.port_id, 16), dir=direction).pack())
            assert (values.limit_spec(raw).rate * 8 if raw else 0) == rate, f"{place}: {direction!r}"
        # No ping over a disabled link: for seconds after it the sandbox takes the gateway for unreachable.
        assert not up or works(self._ns), place

    def _value(self, table: str, key: bytes) -> bytes:
        (path,) = pins(self._crash.daemon).glob(f"{self.recorded().host.cookie:x}/maps/{table}")
        with contextlib.closing(Map.from_pin(path)) as opened:
            return opened.lookup(key) or b""


@pytest.mark.parametrize("other", [OTHER, SHUT], ids=["limits and MTU", "and the link"])
def test_killed_around_every_operation_of_set(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures, other: Settings
) -> None:
    """A set that was cut once its intent is on disk is in force after the next start, all of it: there and
    back, at every place of each way."""
    subject = Subject(crash, netns_factory(), OPEN)
    admin = other is SHUT
    ways: list[list[str]] = []
    for new in (other, OPEN):
        assert subject.set(new, admin=admin)
        subject.stands(new, "unharmed")
        places = around("set", range(len(steps_of(crash, "set"))))
        ways.append(["set:intent", *places, "set:told", "set:commit"])
    places = there_and_back(*ways)
    wanted = itertools.cycle((other, OPEN))
    new = OPEN

    def act() -> bool:
        nonlocal new
        new = next(wanted)
        return subject.set(new, admin=admin)

    for place in killed_at(crash, places, act):
        subject.stands(new, place)
        crash.clean(place)
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def there_and_back(there: list[str], back: list[str]) -> list[str]:
    """One place of each way by turns, each place at least once."""
    length = max(len(there), len(back))
    return [place[n % len(place)] for n in range(length) for place in (there, back)]


def test_killed_in_the_recovery_of_a_set(crash: Crash, netns_factory: NetnsFactory, figures: Figures) -> None:
    """A recovery that finishes a set and is itself killed, around each of its operations, is finished by the
    last."""
    subject = Subject(crash, netns_factory(), SHUT)
    assert subject.set(OPEN)
    steps = range(len(steps_of(crash, "set")))
    assert subject.set(SHUT)
    crash.arm("set:intent")
    assert not subject.set(OPEN)
    crash.died("set:intent")
    recoveries(crash, "set", [*around("set", steps), "set:told"])
    subject.stands(OPEN, "recovery")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_a_refused_set_is_put_back_and_killed_around_that_too(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures
) -> None:
    """Where the kernel refuses the last part of a set, what was done of it is undone, before the error is
    told or by the next start: never a mixture."""
    subject = Subject(crash, netns_factory(), SHUT)
    knob = f"net/ipv6/conf/{subject.rep}/disable_ipv6"
    places = ["undo-set:intent", *around("undo-set", range(5))]

    def refused() -> bool:
        subject.host.run(["sysctl", "-qw", f"{knob}=1"])  # then there can be no IPv6 route over it
        return subject.set(OPEN)

    for place in killed_at(crash, places, refused):
        subject.stands(SHUT, place)
        crash.clean(place)
    assert not refused()
    subject.stands(SHUT, "refused")
    crash.clean("refused")
    subject.host.run(["sysctl", "-qw", f"{knob}=0"])
    assert subject.set(OPEN)
    subject.stands(OPEN, "in the end")
    figures(kill_points=crash.points, witness=crash.witness.sentence())


@pytest.mark.parametrize(("what", "steps"), [("mtu", 2), ("admin", 1)])
def test_killed_while_following_the_operators_change(
    crash: Crash, netns_factory: NetnsFactory, figures: Figures, what: str, steps: int
) -> None:
    """The representor was changed with ``ip link`` and the daemon dies while it follows: the next start
    makes maps and sandbox follow, and leaves the representor as the operator has it."""
    subject = Subject(crash, netns_factory(), OPEN)
    other = replace(OPEN, mtu=1400) if what == "mtu" else replace(OPEN, admin="down")
    wanted = itertools.cycle((other, OPEN))
    new = OPEN

    def act() -> bool:
        nonlocal new
        new = next(wanted)
        change = ["mtu", str(new.mtu)] if what == "mtu" else [new.admin]
        subject.host.run(["ip", "link", "set", subject.rep, *change])
        return False

    told = ["heard:told"] if what == "mtu" else []
    places = ["heard:intent", *around("heard", range(steps)), *told, "heard:commit"]
    for place in killed_at(crash, there_and_back(places, places), act):
        subject.stands(new, place)
        crash.clean(place)
    figures(kill_points=crash.points, witness=crash.witness.sentence())


def test_what_an_interrupted_change_does_not_explain_is_left_to_the_operator(
    crash: Crash, netns_factory: NetnsFactory
) -> None:
    """While no daemon runs, the operator's ``ip link`` on the representor stands and the record follows it;
    a change in the maps, which are ours, is undone."""
    subject = Subject(crash, netns_factory(), OPEN)
    crash.clean("before")
    maps = pins(crash.daemon)
    port = subject.recorded()
    with contextlib.ExitStack() as stack:
        opened = {
            name: stack.enter_context(contextlib.closing(Map.from_pin(path)))
            for name in ("pw_ports", "pw_limits", "pw_addrs")
            for path in maps.glob(f"{port.host.cookie:x}/maps/{name}")
        }
        crash.daemon.kill()
        key = port.rep_ifindex.to_bytes(4, sys.byteorder)
        entry = PwPort.unpack(opened["pw_ports"].lookup(key) or b"")
        opened["pw_ports"].update(key, entry._replace(flags=0, mtu=9000).pack())
        opened["pw_limits"].delete(PwLimitKey(port_id=int(port.port_id, 16), dir=PwDir.TO_PORT).pack())
    crash.arm("")
    subject.stands(OPEN, "maps")
    crash.daemon.kill()
    subject.host.run(["ip", "link", "set", subject.rep, "mtu", "1400"])
    crash.arm("")
    subject.stands(replace(OPEN, mtu=1400), "MTU")
    crash.clean("in the end")
