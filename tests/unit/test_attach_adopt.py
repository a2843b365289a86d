"""What is done to a sandbox on a bridge, read as commands; and that all of it can be taken back."""

from __future__ import annotations

import pytest

from portwright.attach import adopt, models
from portwright.model.errors import InternalError, NotSupported
from portwright.model.port import Adopted, InnerBridge, NetnsRef, Owner, Port, PortAddress, PortState
from portwright.plan.operations import decode, encode

HOST = NetnsRef(path="", cookie=1, boot_id="b")
BOX = NetnsRef(path="/run/netns/s1", cookie=2, boot_id="b")
INNER = InnerBridge(
    bridge="br0_kata",
    bridge_mac="02:00:00:00:00:0b",
    device="eth0",
    device_index=2,
    tap="tap0_kata",
    tap_index=3,
)


def port(*, inner: InnerBridge | None = None) -> Port:
    """One of Docker's containers."""
    return Port(
        port_id="0123456789abcdef",
        network="docker",
        net_id=7,
        owner=Owner(kind="name", name="docker0-veth12"),
        model=adopt.MODEL,
        state=PortState.CREATING,
        ifname="eth0",
        rep_name="pw01234567",
        rep_ifindex=12,
        mac="02:42:ac:11:00:02",
        mtu=1500,
        host=HOST,
        sandbox=BOX,
        addresses=(PortAddress(address="172.17.0.2", gateway="172.17.0.1"),),
        adopted=Adopted(
            link="veth12",
            bridge="docker0",
            bridge_mac="02:42:00:00:00:01",
            sources=("172.17.0.1",),
            settings={"hairpin": 1},
            inner=inner,
        ),
    )


def test_a_container_leaves_its_bridge_last() -> None:
    """Names, entry, programs, the host's way and the others' before; then it leaves, and is answered for."""
    subject = port()
    assert [step.render() for step in (*adopt.take_over(subject), *adopt.leave(subject))] == [
        "ip link set docker0 address 02:42:00:00:00:01; ip link property add dev veth12 altname pw01234567 "
        "altname port-0123456789abcdef altname docker0-veth12-0123",
        "bpftool map update name pw_ports key ifindex(pw01234567) value port 0123456789abcdef net 7",
        "tc filter add dev pw01234567 ingress bpf da pinned progs/pw_from_port",
        "tc filter add dev pw01234567 egress bpf da pinned progs/pw_to_port",
        "ip route replace 172.17.0.2 dev pw01234567 src 172.17.0.1; "
        "ip neighbour replace 172.17.0.2 lladdr 02:42:ac:11:00:02 dev pw01234567 nud permanent",
        "bpftool map update name pw_addrs key 172.17.0.2 value port 0123456789abcdef",
        "ip link set pw01234567 nomaster",
        "ip neigh add proxy 172.17.0.2 dev docker0",
    ]


def test_taken_back_it_is_on_the_bridge_before_anything_else_goes() -> None:
    """The bridge carries it again before its entry, programs, ways and names are taken away."""
    assert [step.render() for step in adopt.give_back(port())] == [
        "ip neigh del proxy 172.17.0.2 dev docker0",
        "ip link set pw01234567 master docker0; bridge link set dev pw01234567 hairpin 1",
        "bpftool map delete name pw_addrs key 172.17.0.2",
        "ip route del 172.17.0.2 dev pw01234567; ip neighbour del 172.17.0.2 dev pw01234567",
        "rm links/0123456789abcdef_egress; tc filter del dev pw01234567 egress",
        "rm links/0123456789abcdef_ingress; tc filter del dev pw01234567 ingress",
        "bpftool map delete name pw_ports key ifindex(pw01234567)",
        "tc qdisc del dev pw01234567 clsact; ip link property del dev pw01234567 "
        "altname port-0123456789abcdef altname docker0-veth12-0123 altname pw01234567",
    ]


def test_deleted_it_is_closed_before_it_is_unguarded() -> None:
    """The link goes down before the programs go."""
    steps = [step.render() for step in models.delete(port())]
    assert steps.index("ip link set pw01234567 down") < min(
        place for place, step in enumerate(steps) if "tc filter del" in step
    )
    assert not any("master" in step or "ip link delete" in step for step in steps)


def test_katas_bridge_is_bypassed_before_and_deleted_after_the_hosts_is_left() -> None:
    """And taken back it is made before it is used again."""
    subject = port(inner=INNER)
    steps = [type(step).__name__ for step in (*adopt.take_over(subject), *adopt.leave(subject))]
    order = ["BypassBridge", "PutTargets", "LeaveBridge", "DropBridge"]
    assert [step for step in steps if step in order] == order
    back = [type(step).__name__ for step in adopt.give_back(subject)]
    assert back.index("MakeBridge") < back.index("EnterBridge") < back.index("UseBridge")
    assert "UseBridge" in [type(step).__name__ for step in adopt.detach(subject)]


@pytest.mark.parametrize("inner", [None, INNER])
def test_plans_survive_the_journal(inner: InnerBridge | None) -> None:
    """Encoded and decoded they are the same."""
    subject = port(inner=inner)
    for plan in ((*adopt.take_over(subject), *adopt.leave(subject)), adopt.give_back(subject)):
        assert decode(encode(plan)) == plan


def test_nobody_can_ask_for_one() -> None:
    """Neither a new port nor a plugged one; and a port of another model has no such device."""
    with pytest.raises(NotSupported, match="port migrate"):
        models.attach(port())
    with pytest.raises(InternalError):
        adopt.of(
            Port(**{name: getattr(port(), name) for name in Port.__struct_fields__ if name != "adopted"})
        )
