"""What every model for a VM gives its guest, each with the stand-in for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fix_daemon import WORLD4, WORLD6, Daemon, Sandbox, SandboxFactory
from tests.fix_netns import NetnsFactory
from tests.netns.guest_lab import guest_on
from tests.netns.policy_lab import connect, listening

#: A model, and for tcfilter by what the tap is joined with the device.
MODELS = ["tcfilter", "tcfilter-peer", "tcfilter-mirred", "macvtap", "tap"]

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("model", MODELS)]


@pytest.fixture
def vm(sandboxes: SandboxFactory, netns_factory: NetnsFactory, model: str) -> Iterator[Sandbox]:
    """A port of the model in a namespace; ``ns`` is its guest."""
    name, _, join = model.partition("-")
    with guest_on(sandboxes, netns_factory, name, **({"join": join} if join else {})) as made:
        yield made


def test_a_guest_reaches_and_is_reached(
    vm: Sandbox, sandboxes: SandboxFactory, daemon: Daemon, model: str
) -> None:
    """Gateway, a container, the world, in both families and ways; a tap's port counts it as slow_path."""
    other = sandboxes()
    for near, far in ((vm, other), (other, vm)):
        for address in (far.ip4, far.ip6):
            assert near.ping(address), f"{near.ns.name} to {address}"
    for address in ("169.254.1.1", "fe80::1%eth0", WORLD4, WORLD6):
        assert vm.ping(address), address
    with daemon.client() as client:
        (carried,) = client.stats(vm.port.port_id)
    assert carried.from_port.total.packets >= 8
    assert carried.to_port.total.packets >= 8
    assert (carried.to_port.slow_path == carried.to_port.total) == (model == "tap")


@pytest.mark.parametrize("family", [4, 6])
def test_a_guest_carries_tcp_with_offloads(vm: Sandbox, sandboxes: SandboxFactory, family: int) -> None:
    """100 KB each way arrive whole, of super-packets as of segments."""
    other = sandboxes()
    for near, far in ((vm, other), (other, vm)):
        with listening(far.ns, 80) as server:
            sock = connect(near.ns, far.ip4 if family == 4 else far.ip6, 80)
            accepted, _ = server.accept()
            with sock, accepted:
                accepted.settimeout(20)
                sock.settimeout(20)
                said = bytes(range(256)) * 400
                sock.sendall(said)
                heard = b""
                while len(heard) < len(said):
                    heard += accepted.recv(1 << 16)
                assert heard == said
