from __future__ import annotations

from typing import Literal

from portwright.kernel.monitor import LinkEvent
from portwright.kernel.rtnl_parse import LinkInfo
from portwright.vmm.links import Links
from portwright.vmm.spec import Nic

NICS = (
    Nic(tap="tap0", mac="02:00:00:00:00:01", mtu=1500, device="eth0"),
    Nic(tap="tap1", mac="02:00:00:00:00:02", mtu=1500, device="eth1"),
)
UP, DOWN = {"up": True}, {"up": False}


def news(name: str, kind: Literal["new", "del"] = "new", *, carrier: bool = True) -> LinkEvent:
    return LinkEvent(kind=kind, link=LinkInfo(index=7, name=name, carrier=carrier))


def test_carrier_is_passed_on_when_it_changes() -> None:
    """A NIC's link follows its device's carrier, is told of each change once, and of nobody else's."""
    links = Links(NICS)

    assert links.orders(news("eth0")) == []
    assert links.orders(news("eth1", carrier=False)) == [("set_link", {"name": "nic1", **DOWN})]
    assert links.orders(news("eth1", carrier=False)) == []
    assert links.orders(news("eth1")) == [("set_link", {"name": "nic1", **UP})]
    assert links.orders(news("lo", carrier=False)) == []
    assert links.orders(LinkEvent(kind="overflow")) == []


def test_deleted_tap_cuts_its_nic_for_good() -> None:
    """The NIC of a deleted tap loses its link and QEMU its descriptor, and no later news revives it."""
    links = Links(NICS)

    assert links.orders(news("tap0", carrier=False)) == []
    assert links.orders(news("tap0", "del")) == [
        ("set_link", {"name": "nic0", **DOWN}),
        ("netdev_del", {"id": "net0"}),
    ]
    assert links.orders(news("tap0", "del")) == []
    assert links.orders(news("eth0")) == []
    assert links.orders(news("eth1", "del")) == [("set_link", {"name": "nic1", **DOWN})]


def test_a_taps_own_link_is_up_and_has_a_carrier() -> None:
    """A tap that is the host end too keeps its carrier when it is set down, and the guest loses its own."""
    links = Links([Nic(tap="pw0", mac="02:00:00:00:00:01", mtu=1500, device="pw0", home=7)])

    def of(*, up: bool, carrier: bool = True) -> LinkEvent:
        return LinkEvent(kind="new", link=LinkInfo(index=7, name="pw0", up=up, carrier=carrier))

    assert links.orders(of(up=True)) == []
    assert links.orders(of(up=False)) == [("set_link", {"name": "nic0", **DOWN})]
    assert links.orders(of(up=True)) == [("set_link", {"name": "nic0", **UP})]
    assert links.orders(of(up=True, carrier=False)) == [("set_link", {"name": "nic0", **DOWN})]
    assert links.orders(news("pw0", "del"))[-1] == ("netdev_del", {"id": "net0"})


def test_cards_come_and_go() -> None:
    """A card that came later has its device's carrier from its first news on; of one that went, and of what
    had its number before, nothing is told."""
    links = Links(NICS[:1])

    assert links.orders(news("eth1", carrier=False)) == []
    links.add(5, NICS[1])
    assert links.orders(news("eth1")) == []
    assert links.orders(news("eth1", carrier=False)) == [("set_link", {"name": "nic5", **DOWN})]
    links.forget(5)
    assert links.orders(news("eth1")) == []
    assert links.orders(news("tap1", "del")) == []
    links.add(5, NICS[1])
    assert links.orders(news("eth1", carrier=False)) == [("set_link", {"name": "nic5", **DOWN})]
    assert links.orders(news("tap1", "del"))[1] == ("netdev_del", {"id": "net5"})
