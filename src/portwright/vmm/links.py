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
    """Of one running guest: its NICs by their numbers, from the start and as they come and go."""

    def __init__(self, nics: Sequence[Nic]) -> None:
        """``nics`` were connected, and their devices had their carrier, when the guest started."""
        self._nics: dict[int, Nic] = {}
        self._carrier: dict[int, bool] = {}
        for number, nic in enumerate(nics):
            self.add(number, nic)

    def add(self, number: int, nic: Nic) -> None:
        """One more, whose link QEMU has as up. Its device's next news say how it is."""
        self._nics[number], self._carrier[number] = nic, True

    def forget(self, number: int) -> None:
        """It is gone, or about to be: nothing is to be told of it any more."""
        self._nics.pop(number, None)

    def orders(self, event: LinkEvent) -> list[Order]:
        """What to tell QEMU of a link's news.

        A NIC has the carrier of its device. One whose tap was deleted has none, for good: QEMU would find
        the descriptor of a tap that is gone readable without end, so it is made to close it.
        """
        orders: list[Order] = []
        if event.link is None:  # some news were lost: the next one of a device says how it is
            return orders
        for number, nic in list(self._nics.items()):
            if event.link.name == nic.tap and event.kind == "del":
                self.forget(number)
                orders.append(_carrier(number, up=False))
                orders.append(Order("netdev_del", {"id": f"net{number}"}))
            elif event.link.name == nic.device:
                up = event.kind == "new" and event.link.carrier
                if nic.device == nic.tap:  # which keeps its carrier when it is set down
                    up = up and event.link.up
                if up != self._carrier[number]:
                    self._carrier[number] = up
                    orders.append(_carrier(number, up=up))
        return orders


def _carrier(number: int, *, up: bool) -> Order:
    return Order("set_link", {"name": f"nic{number}", "up": up})
