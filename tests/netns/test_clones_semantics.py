"""Ports and policy with clones in the containers' places, all with the same addresses inside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.fix_daemon import Daemon, Networks, Sandbox, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns import test_guard_isolation, test_policy_path, test_port_path
from tests.netns.clone_lab import CLONE, frozen
from tests.netns.guest_lab import guest

pytestmark = pytest.mark.netns

for _module in (test_guard_isolation, test_policy_path, test_port_path):
    globals().update({name: value for name, value in vars(_module).items() if not name.startswith("_")})
#: They bind a socket to the port's address, which no clone has (test_clones.py has fragments of its own).
for _name in ("test_what_may_answer_may_not_open", "test_fragments_go_the_way_of_their_datagram"):
    del globals()[_name]


@pytest.fixture
def sandboxes(
    daemon: Daemon, netns_factory: Callable[[], TestNetns], networks: Networks
) -> Iterator[SandboxFactory]:
    """As fix_daemon's, but each sandbox is a clone."""
    with contextlib.ExitStack() as guests:

        def make(network: str = "n1", **options: object) -> Sandbox:
            networks(network)
            box, inside = netns_factory(), netns_factory()
            options = {"name": box.name, **CLONE, **options}
            with daemon.client() as client:
                port = client.port_create(network, box.path, **options)  # type: ignore[arg-type]
            guests.enter_context(guest(box, inside, frozen(port)))
            return Sandbox(inside, port)

        yield make
