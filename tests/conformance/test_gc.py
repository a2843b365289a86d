"""Case 59: garbage collection by the list of what is still valid."""

from __future__ import annotations

from typing import Any

import pytest

from .kit.host import OUTSIDE4
from .kit.lab import Lab, Sandbox, ips_of
from .kit.observe import bare_addresses
from .kit.plugin import Json, Outcome
from .kit.traffic import echo, tcp_ask


def _three(lab: Lab) -> tuple[Json, list[Sandbox], list[str]]:
    network = lab.network(ipMasq=True, version="1.1.0")
    sandboxes = [lab.sandbox() for _ in range(3)]
    given = [ips_of(lab.add(network, sandbox))[0] for sandbox in sandboxes]
    lab.runtime.forget()  # a runtime that remembers sends DELs, and GC would have nothing to do
    return network, sandboxes, given


def _gc(lab: Lab, network: Json, *, lists: tuple[str, ...], valid: Any) -> Outcome:
    return lab.raw(lab.config_of(network, **dict.fromkeys(lists, valid)), command="GC")


def _valid(*sandboxes: Sandbox) -> list[Json]:
    return [{"containerID": sandbox.id, "ifname": "eth0"} for sandbox in sandboxes]


def _alive(lab: Lab, sandbox: Sandbox) -> bool:
    if not bare_addresses(sandbox.ns, "eth0"):
        return False
    with echo(lab.host.outside, OUTSIDE4) as server:
        return tcp_ask(sandbox.ns, OUTSIDE4, server.port) == b"hello"


@pytest.mark.parametrize(
    "lists", [("cni.dev/valid-attachments",), ("cni.dev/valid-attachments", "cni.dev/attachments")]
)
def test_case_59_frees_what_is_not_listed(lab: Lab, lists: tuple[str, ...]) -> None:
    """GC frees links, addresses and rules of what is not listed, leaves what is, and can be repeated."""
    network, (one, two, three), given = _three(lab)
    for _ in range(2):
        outcome = _gc(lab, network, lists=lists, valid=_valid(one))
        assert outcome.exit_code == 0, outcome
        assert outcome.stdout == b""
    state = lab.host.state_text()
    assert two.id not in state
    assert three.id not in state
    assert [leak for leak in lab.leaks(two.id, three.id, *given[1:]) if not leak.startswith("link")] == []
    assert len(lab.host.link_names() - lab.links_before) == 1
    assert _alive(lab, one)


def test_case_59_through_the_runtime(lab: Lab) -> None:
    """The runtime's own collection: DEL for what it remembers, GC for the rest."""
    network = lab.network(ipMasq=True, version="1.1.0")
    sandboxes = [lab.sandbox() for _ in range(3)]
    for sandbox in sandboxes:
        lab.add(network, sandbox)
    lab.runtime.gc(network, [(sandboxes[0].id, "eth0")])
    assert _alive(lab, sandboxes[0])
    assert all(sandbox.id not in lab.host.state_text() for sandbox in sandboxes[1:])


@pytest.mark.parametrize(
    "valid", ["absent", None, "nonsense", {}, [{"containerID": 7}], [{"ifname": "eth0"}]]
)
def test_case_59_no_list_deletes_nothing(lab: Lab, valid: object) -> None:
    """A GC without a proper list, as ``cnitool gc`` sends it, must not mean 'delete every one'."""
    network, sandboxes, _ = _three(lab)
    lists = () if valid == "absent" else ("cni.dev/valid-attachments",)
    outcome = _gc(lab, network, lists=lists, valid=valid)
    if outcome.exit_code != 0:
        outcome.error()
    assert all(_alive(lab, sandbox) for sandbox in sandboxes)


def test_case_59_empty_list_frees_all(lab: Lab) -> None:
    """An explicit empty list means what it says."""
    network, sandboxes, given = _three(lab)
    assert _gc(lab, network, lists=("cni.dev/valid-attachments",), valid=[]).exit_code == 0
    assert lab.leaks(*(sandbox.id for sandbox in sandboxes), *given) == []


def test_case_59_other_networks_are_not_touched(lab: Lab) -> None:
    """GC is of one network."""
    network, _, _ = _three(lab)
    other, survivor = lab.network(ipMasq=True), lab.sandbox()
    lab.add(other, survivor)
    assert _gc(lab, network, lists=("cni.dev/valid-attachments",), valid=[]).exit_code == 0
    assert _alive(lab, survivor)
    lab.check(other, survivor)


def test_case_59_interface_is_part_of_the_identity(lab: Lab) -> None:
    """Listing a container's other interface does not keep this one."""
    network, (one, two, _), _ = _three(lab)
    listed = [{"containerID": one.id, "ifname": "net1"}, *_valid(two)]
    assert _gc(lab, network, lists=("cni.dev/valid-attachments",), valid=listed).exit_code == 0
    assert one.id not in lab.host.state_text()
    assert _alive(lab, two)


def test_case_59_broken_one_in_the_middle(lab: Lab) -> None:
    """An attachment whose namespace and links are gone stops nobody else's collection."""
    network, sandboxes, given = _three(lab)
    sandboxes[1].ns.ip_batch("link del eth0")
    sandboxes[1].ns.delete()
    _gc(lab, network, lists=("cni.dev/valid-attachments",), valid=[])
    assert lab.leaks(*(sandbox.id for sandbox in sandboxes), *given) == []


def test_case_59_addresses_come_back(lab: Lab) -> None:
    """After GC the freed addresses no longer count: they are given again, or said to be resting."""
    subnet = lab.subnet4()
    one = {"subnet": str(subnet), "rangeStart": str(subnet[10]), "rangeEnd": str(subnet[12])}
    network = lab.network(ipam=lab.ipam(ranges=[[one]]), version="1.1.0")
    sandboxes = [lab.sandbox() for _ in range(3)]
    given = [ips_of(lab.add(network, sandbox))[0] for sandbox in sandboxes]
    lab.runtime.forget()
    assert (
        _gc(lab, network, lists=("cni.dev/valid-attachments",), valid=_valid(*sandboxes[:2])).exit_code == 0
    )
    late = lab.sandbox()
    if "immediate_reuse" in lab.profile.features:
        assert ips_of(lab.add(network, late)) == given[2:]
    else:
        assert "rest" in lab.refused(network, late).text
