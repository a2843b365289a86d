"""Ports and policy with guests behind taps in the containers' places: the same tests, word for word."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fix_daemon import Daemon, Networks, SandboxFactory
from tests.fix_netns import NetnsFactory
from tests.netns import test_guard_isolation, test_policy_path, test_port_path, test_representor_paths
from tests.netns.guest_lab import guests_for_sandboxes
from tests.netns.test_representor_counting import (
    test_r04_a_super_packet_counts_as_its_segments,  # noqa: F401 - collected here too
)

pytestmark = pytest.mark.netns

for _module in (test_guard_isolation, test_policy_path, test_port_path, test_representor_paths):
    globals().update({name: value for name, value in vars(_module).items() if not name.startswith("_")})
#: The stand-in for a hypervisor, which is Python, sends less than is to be thinned.
del globals()["test_r18_a_flood_is_thinned_for_each_reason_and_nothing_is_unaccounted"]


@pytest.fixture(params=["bpf", "peer"])
def sandboxes(
    request: pytest.FixtureRequest, daemon: Daemon, netns_factory: NetnsFactory, networks: Networks
) -> Iterator[SandboxFactory]:
    """As fix_daemon's, but each sandbox is the guest of a port of the model tcfilter."""
    with guests_for_sandboxes(daemon, netns_factory, networks, "tcfilter", join=request.param) as made:
        yield made
