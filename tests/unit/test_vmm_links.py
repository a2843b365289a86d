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
