"""The nftables transport and our table in a real kernel: atomic, bound to its namespace, alone."""

from __future__ import annotations

import errno
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.kernel.netns import entered
from portwright.kernel.nft import Nft
from portwright.model.errors import InvalidInput, KernelFailed
from portwright.model.port import PortMapping
from portwright.plan import nat, publish
from tests.fix_netns import NetnsFactory, TestNetns

pytestmark = pytest.mark.netns

I = "x"  # noqa: E741 - the instance, in every call
ADDRESSES = ["10.88.0.2", "fd88::2"]
MAPPINGS = [
    PortMapping(host_port=8080, container_port=80),
    PortMapping(host_port=53, container_port=5353, protocol="udp", host_ip="192.0.2.1"),
    PortMapping(host_port=9000, container_port=9, protocol="sctp", host_ip="2001:db8::1"),
]
FOREIGN = """
table ip foreign {
  set s {
    type ipv4_addr; flags interval
    elements = { 10.88.0.0/16 }
  }
  map m {
    type inet_proto . inet_service : ipv4_addr . inet_service
    elements = { tcp . 8080 : 10.88.0.2 . 80 }
  }
  chain nat { type nat hook prerouting priority dstnat; policy accept;
    tcp dport 8080 dnat to 10.0.0.9
  }
}
table inet portwright {
  chain c { counter; }
}
"""


@pytest.fixture
def space(netns_factory: NetnsFactory) -> TestNetns:
    """A namespace without rules."""
    return netns_factory()


@pytest.fixture
def nft(space: TestNetns) -> Iterator[Nft]:
    """A context in that namespace, opened from outside of it."""
    with Nft(space.fd) as context:
        yield context


def ruleset(space: TestNetns) -> str:
    """What nft(8) sees, counters left out."""
    return space.run(["nft", "-s", "list", "ruleset"]).stdout


def open_files() -> int:
    """How many descriptors this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_context_belongs_to_its_namespace(netns_factory: NetnsFactory) -> None:
    """A context works on the namespace it was made in, whatever namespace its thread is in later."""
    one, two = netns_factory(), netns_factory()
    with Nft(one.fd) as nft:
        nft.run("add table inet first")
        with entered(two.fd):
            nft.run("add table inet second")
            assert nft.list_table("inet", "second") is not None
    assert ruleset(one).split("\n")[0] == "table inet first {"
    assert "table inet second" in ruleset(one)
    assert ruleset(two) == ""


def test_context_of_the_present_namespace(space: TestNetns) -> None:
    """Without a descriptor the context is bound to the calling thread's namespace."""
    with space.entered():
        nft = Nft()
    with nft:
        nft.run("add table inet here")
    assert "table inet here" in ruleset(space)


def test_a_run_is_one_transaction(nft: Nft, space: TestNetns) -> None:
    """If one command of a script fails, none of the script's commands has happened."""
    nft.run("add table inet t; add set inet t s { type inet_service; }; add element inet t s { 1 }")
    before = ruleset(space)
    with pytest.raises(KernelFailed) as caught:
        nft.run("add element inet t s { 2 }\ncreate element inet t s { 1 }\nadd table inet u")
    assert caught.value.errno == errno.EEXIST
    assert "File exists" in caught.value.detail
    assert ruleset(space) == before


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("delete table inet nowhere", errno.ENOENT),
        ("add element inet nowhere s { 1 }", errno.ENOENT),
        ("list table inet nowhere", errno.ENOENT),
        (
            "add table inet t; add set inet t s { type inet_service; }; delete element inet t s { 7 }",
            errno.ENOENT,
        ),
    ],
)
def test_refusals_carry_the_errno(nft: Nft, script: str, code: int) -> None:
    """What the kernel or nft's view of it refuses is KernelFailed with the errno, and the message kept."""
    with pytest.raises(KernelFailed) as caught:
        nft.run(script)
    assert (caught.value.errno, caught.value.what) == (code, "nft")


@pytest.mark.parametrize(
    "script", ["add tabel inet t", "add element inet t s {", "add table inet t\0x", "{}}"]
)
def test_nonsense_is_invalid_input(nft: Nft, script: str) -> None:
    """What nft can't parse is InvalidInput, and the context goes on working."""
    with pytest.raises(InvalidInput):
        nft.run(script)
    nft.run("add table inet t")
    assert nft.list_table("inet", "t") is not None


def test_messages_do_not_leak_into_the_next_call(nft: Nft, capfd: pytest.CaptureFixture[str]) -> None:
    """A failed call's output is in its own error only, and nothing is ever printed."""
    for _ in range(2):
        with pytest.raises(KernelFailed, match="nowhere"):
            nft.run("list table inet nowhere")
        assert nft.run("add table inet t") == ""
        with pytest.raises(KernelFailed) as caught:
            nft.run("list table inet elsewhere")
        assert "nowhere" not in caught.value.detail
    assert capfd.readouterr() == ("", "")


def test_json_in_and_out(nft: Nft) -> None:
    """JSON commands run like text, and the two may be mixed on one context."""
    nft.run_json({"nftables": [{"add": {"table": {"family": "inet", "name": "j"}}}]})
    assert "table inet j" in nft.run("list tables")
    assert [o["table"]["name"] for o in nft.run_json("list tables") if isinstance(o["table"], dict)] == ["j"]
    assert nft.run("list tables").strip() == "table inet j"
    assert nft.list_table("inet", "k") is None


def test_run_each_goes_as_far_as_it_can(nft: Nft, space: TestNetns) -> None:
    """Each script is a transaction of its own; failures are returned, but for those to ignore."""
    scripts = ["add table inet a", "delete table inet none", "create table inet a", "add table inet b"]
    assert [e.errno for e in nft.run_each(scripts, ignore=[errno.ENOENT])] == [errno.EEXIST]
    assert "table inet b" in ruleset(space)


def test_close_gives_everything_back(space: TestNetns) -> None:
    """A closed context holds no descriptor; closing twice is fine, using it is not, forgetting it warns."""
    Nft(space.fd).close()  # what the library opens once for all
    before = open_files()
    contexts = [Nft(space.fd) for _ in range(20)]
    for context in contexts:
        context.run("list tables")
        context.close()
        context.close()
        with pytest.raises(ValueError, match="closed"):
            context.run("list tables")
    assert open_files() == before
    with pytest.warns(ResourceWarning, match="unclosed"):
        Nft(space.fd)  # CPython counts references: gone when the statement ends
    assert open_files() == before


def test_base_table_is_idempotent(nft: Nft, space: TestNetns) -> None:
    """Run again, the base table has one copy of each rule and keeps its elements."""
    nft.run(nat.base_table(I))
    nft.run(nat.port_elements_add(I, MAPPINGS, ADDRESSES, holder="0123456789abcdef"))
    nft.run(nat.subnets(I, ["10.0.0.0/8"], ["10.88.0.0/16", "fd88::/64"]))
    before = ruleset(space)
    nft.run(nat.base_table(I))
    assert ruleset(space) == before
    assert before.count("masquerade comment") == 2


def test_verify_sees_each_thing_that_is_missing(nft: Nft) -> None:
    """CHECK finds nothing wrong with what was installed, and names the one element or rule taken away."""
    local, hidden = ["10.0.0.0/8", "192.0.2.1/32"], ["10.88.0.0/16", "fd88::/64"]
    assert nat.verify(I, MAPPINGS, ADDRESSES, nft.list_table("inet", "portwright_x")) == [
        "nftables table inet portwright_x is missing"
    ]
    nft.run(nat.base_table(I) + nat.subnets(I, local, hidden) + nat.port_elements_add(I, MAPPINGS, ADDRESSES))
    table = nft.list_table("inet", "portwright_x")
    assert nat.verify(I, MAPPINGS, ADDRESSES, table) == []
    assert nat.verify_subnets(I, local, hidden, table) == []
    assert nat.verify_subnets(I, local, [], table) != []

    nft.run("delete element inet portwright_x bound4 { 192.0.2.1 . udp . 53 }")
    nft.run("flush chain inet portwright_x output")
    assert nat.verify(I, MAPPINGS, ADDRESSES, nft.list_table("inet", "portwright_x")) == [
        "rule 'publish' is missing in chain inet portwright_x output",
        "element { 192.0.2.1 . udp . 53 : 10.88.0.2 . 5353 } is missing in inet portwright_x bound4",
    ]


def test_first_writer_keeps_the_host_port(nft: Nft, space: TestNetns) -> None:
    """A second mapping of a host port is refused whole, and the old record can't delete the new holder's."""
    nft.run(nat.base_table(I))
    nft.run(nat.port_elements_add(I, MAPPINGS[:1], ["10.88.0.2"]))
    before = ruleset(space)
    for script in (
        nat.port_elements_add(I, [MAPPINGS[1], MAPPINGS[0]], ["10.88.0.3"]),
        nat.port_elements_delete(I, MAPPINGS[:1], ["10.88.0.3"]),
    ):
        with pytest.raises(KernelFailed) as caught:
            nft.run(script)
        assert caught.value.errno == errno.EEXIST
    assert ruleset(space) == before


def test_delete_tolerates_what_is_gone(nft: Nft, space: TestNetns) -> None:
    """Deleting mappings that are there, half there or not there leaves none of them, and others alone."""
    nft.run(nat.base_table(I))
    other = [PortMapping(host_port=81, container_port=80)]
    nft.run(nat.port_elements_add(I, other, ["10.88.0.9"]))
    empty = ruleset(space)
    for gone in ("", "any6 { tcp . 8080 }", "hairpin4 { 10.88.0.2 . 10.88.0.2 }"):
        nft.run(nat.port_elements_add(I, MAPPINGS, ADDRESSES))
        nft.run(f"delete element inet portwright_x {gone}" if gone else "")
        nft.run(nat.port_elements_delete(I, MAPPINGS, ADDRESSES))
        assert ruleset(space) == empty
    nft.run(nat.port_elements_delete(I, MAPPINGS, ADDRESSES))
    assert nft.run_each(nat.each(nat.port_elements_delete(I, MAPPINGS, ADDRESSES))) == []
    assert ruleset(space) == empty


def test_partial_delete_keeps_the_hairpin(nft: Nft) -> None:
    """While one mapping of a port remains, its address stays a hairpin."""
    nft.run(nat.base_table(I) + nat.port_elements_add(I, MAPPINGS, ADDRESSES))
    nft.run(nat.port_elements_delete(I, MAPPINGS[:2], ADDRESSES, remaining=MAPPINGS[2:]))
    table = nft.list_table("inet", "portwright_x")
    assert nat.verify(I, MAPPINGS[2:], ADDRESSES, table) == []
    assert table is not None
    assert {e.identity() for e in nat.observed_elements(table)} == {
        e.identity() for e in publish.elements(MAPPINGS[2:], ADDRESSES)
    }


def test_replace_and_stale_elements_restore_the_record(nft: Nft, space: TestNetns) -> None:
    """From any state of the table, the record's elements and subnets come back, and leftovers go."""
    wanted = [publish.Publication(holder="p1", mappings=tuple(MAPPINGS), addresses=tuple(ADDRESSES))]
    script = nat.replace_table(I, wanted, ["10.0.0.0/8"], ["10.88.0.0/16"])
    nft.run(script)
    good = ruleset(space)
    leftover = nat.port_elements_add(I, [PortMapping(host_port=1, container_port=1)], ["10.9.9.9"])
    for damage in ("flush ruleset", "flush map inet portwright_x any4", leftover, nat.remove_table(I)):
        nft.run(damage)
        nft.run(script)
        assert ruleset(space) == good
    nft.run(leftover)
    nft.run(nat.stale_elements(I, wanted, nft.list_table("inet", "portwright_x") or []))
    assert ruleset(space) == good
    assert nat.stale_elements(I, wanted, nft.list_table("inet", "portwright_x") or []) == ""


def test_other_owners_stay_untouched(nft: Nft, space: TestNetns) -> None:
    """Tables of others, another instance and iptables-nft among them, are the same after our life."""
    nft.run(FOREIGN)
    space.run(["iptables-nft", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8080",
               "-j", "DNAT", "--to-destination", "172.17.0.2:80"])  # fmt: skip
    space.run(["iptables-nft", "-t", "filter", "-P", "FORWARD", "DROP"])
    nft.run(nat.base_table("other") + nat.port_elements_add("other", MAPPINGS, ADDRESSES))
    before = ruleset(space)
    nft.run(nat.base_table(I))
    nft.run(nat.subnets(I, ["10.88.0.0/16"], ["10.88.0.0/16"]))
    nft.run(nat.port_elements_add(I, MAPPINGS, ADDRESSES))
    nft.run(nat.port_elements_delete(I, MAPPINGS, ADDRESSES))
    nft.run(nat.replace_table(I, []))
    nft.run(nat.remove_table(I))
    assert ruleset(space) == before


def test_nothing_is_left_after_remove(nft: Nft, space: TestNetns) -> None:
    """Removing the table leaves an empty ruleset, and doing it again is no error."""
    published = publish.Publication(holder="p", mappings=tuple(MAPPINGS), addresses=tuple(ADDRESSES))
    nft.run(nat.replace_table(I, [published], ["10.0.0.0/8"]))
    nft.run(nat.remove_table(I))
    nft.run(nat.remove_table(I))
    assert ruleset(space) == ""


@pytest.mark.alone
def test_cost_does_not_grow_with_the_number_of_mappings(nft: Nft) -> None:
    """Adding and deleting a port's elements costs about the same with 10 and with 10,000 of them present."""
    nft.run(nat.base_table(I))
    cost = {}
    for present, first in ((10, 20_000), (10_000, 20_010)):
        more = [PortMapping(host_port=first + i, container_port=80) for i in range(present)]
        nft.run(nat.port_elements_add(I, more, ["10.88.9.9"]))
        times = []
        for _ in range(15):
            start = time.perf_counter()
            nft.run(nat.port_elements_add(I, MAPPINGS, ADDRESSES))
            nft.run(nat.port_elements_delete(I, MAPPINGS, ADDRESSES))
            times.append((time.perf_counter() - start) * 1000)
        cost[present] = statistics.median(times)
    print(f"add + delete of {len(MAPPINGS)} mappings, ms by number present: {cost}")
    assert cost[10_000] < cost[10] * 5 + 1
