"""Ports as the store has them, with nothing in the kernel behind them."""

from __future__ import annotations

from portwright.model.port import NetnsRef, Owner, Port, PortAddress, PortState


def port(number: int, labels: dict[str, str], created: float = 0.0) -> Port:
    """An attached port with an address of each family, 10.0.0.``number`` and fd00::``number``."""
    here = NetnsRef(path="", cookie=1, boot_id="")
    return Port(
        port_id=f"{number:016x}",
        network="n1",
        net_id=1,
        owner=Owner(kind="name", name=f"port-{number}"),
        model="veth",
        state=PortState.ATTACHED,
        ifname="eth0",
        rep_name=f"pw{number:08x}",
        mac="02:00:00:00:00:01",
        mtu=1500,
        host=here,
        sandbox=here,
        addresses=tuple(PortAddress(address=f"{net}{number}", gateway="") for net in ("10.0.0.", "fd00::")),
        labels=labels,
        created=created,
    )
