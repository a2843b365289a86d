"""Word of addresses that change and of tables that go, and scripts that are checked and change nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from portwright.kernel.monitor import AddressMonitor, TableMonitor
from portwright.kernel.nft import Nft
from portwright.model.errors import InvalidInput, KernelFailed
from tests.deadline import wait_readable
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns


@pytest.fixture
def space(netns_factory: NetnsFactory) -> TestNetns:
    """A namespace of its own."""
    return netns_factory()


@pytest.fixture
def nft(space: TestNetns) -> Iterator[Nft]:
    """A context in it."""
    with space.entered():
        made = Nft()
    with made:
        yield made


def test_addresses_and_links_are_told(space: TestNetns) -> None:
    """Each change by itself; and there is nothing to tell while nothing happens."""
    with space.entered():
        monitor = AddressMonitor()
    with closing(monitor):
        assert not monitor.drain()
        for command in (
            "link set lo mtu 40000",
            "addr add 192.0.2.1/32 dev lo",
            "addr add 2001:db8::1/128 dev lo",
            "addr del 192.0.2.1/32 dev lo",
        ):
            space.run(["ip", *command.split()])
            wait_readable(monitor.fileno(), why=command)
            assert monitor.drain(), command
        assert not monitor.drain()


def test_a_table_that_goes_is_told(space: TestNetns, nft: Nft) -> None:
    """Removed by name or with the whole ruleset; what comes or changes says nothing."""
    with space.entered():
        monitor = TableMonitor()
    with closing(monitor):
        for gone in ("delete table inet a", "flush ruleset"):
            nft.run("add table inet a\nadd chain inet a c\nadd rule inet a c counter")
            wait_readable(monitor.fileno(), why="word of a table that comes")
            assert not monitor.drain()
            nft.run(gone)
            wait_readable(monitor.fileno(), why=gone)
            assert monitor.drain(), gone


@pytest.mark.parametrize("monitor", [AddressMonitor, TableMonitor])
def test_what_was_lost_counts_as_something(
    space: TestNetns, nft: Nft, monkeypatch: pytest.MonkeyPatch, monitor: Callable[[], AddressMonitor]
) -> None:
    """A receive buffer that overflows is a reason to look."""
    monkeypatch.setattr("portwright.kernel.monitor._RECEIVE_BUFFER", 2048)
    with space.entered():
        made = monitor()
    with closing(made):
        space.run(
            ["ip", "-batch", "-"], input="".join(f"addr add 10.0.0.{n} dev lo\n" for n in range(1, 100))
        )
        nft.run("".join(f"add table inet t{n}\n" for n in range(100)))
        wait_readable(made.fileno(), why="an overflow")
        assert made.drain()


def test_a_check_changes_nothing(space: TestNetns) -> None:
    """What is right passes, what nft or the kernel refuses is raised as by a run."""
    with space.entered():
        checks = [Nft() for _ in range(4)]
    try:
        checks[0].check("add table inet a\nadd chain inet a c { type filter hook input priority 0; }")
        with pytest.raises(InvalidInput):
            checks[1].check("add nonsense")
        with pytest.raises(KernelFailed) as refused:
            checks[2].check("delete table inet a")
        assert refused.value.errno == errno.ENOENT
        assert checks[3].run("list ruleset") == ""
    finally:
        for each in checks:
            each.close()


def test_an_answer_that_is_no_json_is_the_kernels_failure(nft: Nft, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libnftables 1.0.6 gives it of a table with an owner."""
    monkeypatch.setattr(Nft, "_run", lambda *_args, **_kwargs: '{"nftables": [{"table": {"flags": \n')
    with pytest.raises(KernelFailed) as failed:
        nft.run_json("list tables")
    assert failed.value.errno == errno.EBADMSG
