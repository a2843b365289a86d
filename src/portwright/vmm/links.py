"""What happens to a guest's taps and devices, as what QEMU is to be told of it. Pure, but for its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from portwright.kernel.monitor import LinkEvent
from portwright.vmm.spec import Nic


class Order(NamedTuple):
    """A command of QMP, with its arguments."""

    command: str
    arguments: dict[str, object]


class Links:
    """Of one running guest, whose NICs were connected and whose devices had their carrier when it started."""

    def __init__(self, nics: Sequence[Nic]) -> None:
        self._nics = nics
        self._carrier = [True] * len(nics)
        self._cut: set[int] = set()

    def orders(self, event: LinkEvent) -> list[Order]:
        """What to tell QEMU of a link's news.

        A NIC has the carrier of its device. One whose tap was deleted has none, for good: QEMU would find
        the descriptor of a tap that is gone readable without end, so it is made to close it.
        """
        orders: list[Order] = []
        if event.link is None:  # some news were lost: the next one of a device says how it is
            return orders
        for index, nic in enumerate(self._nics):
            if index in self._cut:
                continue
            if event.link.name == nic.tap and event.kind == "del":
                self._cut.add(index)
                orders.append(_carrier(index, up=False))
                orders.append(Order("netdev_del", {"id": f"net{index}"}))
            elif event.link.name == nic.device:
                up = event.kind == "new" and event.link.carrier
                if up != self._carrier[index]:
                    self._carrier[index] = up
                    orders.append(_carrier(index, up=up))
        return orders


def _carrier(index: int, *, up: bool) -> Order:
    return Order("set_link", {"name": f"nic{index}", "up": up})
