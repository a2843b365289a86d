"""SIGKILL at every step of a change of policy: packets obey the old policies or the new, never a third."""

from __future__ import annotations

from functools import partial

import pytest

from portwright.api.errors import ConnectionLost
from tests.fix_daemon import Daemon, SandboxFactory
from tests.fix_netns import TestNetns
from tests.netns.policy_lab import WEB, Probe, connect, listening

pytestmark = [pytest.mark.netns, pytest.mark.slow]

#: Of a change that is made in place, as one workload alone is found otherwise; and of one that is not.
IN_PLACE = ("compiled", "recorded", "amend-cells", "amend-peers", "installed")
WHOLE = ("pw_peers", "pw_bounds", "pw_sets", "pw_cells", "swept")
#: (port 80, port 81) are open to the client under each.
FIRST, SECOND, NONE = (True, False), (False, True), (True, True)


def opens(ns: TestNetns, address: str, port: int) -> bool:
    """Whether a connection is made within the first SYN's time; no daemon is asked."""
    try:
        connect(ns, address, port, timeout=0.3).close()
    except TimeoutError:
        return False
    return True


def second(place: str) -> str:
    """WEB with another port; where it is to be installed whole, with a net beside."""
    other = WEB.replace("port: 80", "port: 81")
    if place not in WHOLE:
        return other
    return other.replace("from: [", "from: [{ipBlock: {cidr: 192.0.2.0/24}}, ")


def test_a_change_is_whole_or_not_there(daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """Dead or started again, both ports' verdicts are those of one set of policies; after the start they are
    the old one's if it died before the record, else the new one's. The same when the last policy goes."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    probe = Probe(daemon)
    with listening(web.ns, 80), listening(web.ns, 81):

        def verdicts() -> tuple[bool, bool]:
            return probe.reaches(client, web.ip4, 80), probe.reaches(client, web.ip4, 81)

        with daemon.client() as api:
            api.policy_apply([("web.yaml", WEB)])
        now = FIRST
        for place in [*IN_PLACE, *WHOLE, "withdrawn"]:
            last = place == "withdrawn"
            new = NONE if last else SECOND if now == FIRST else FIRST
            texts = {FIRST: WEB, SECOND: second(place)}
            daemon.kill()
            daemon.start(PORTWRIGHT_DIE_AT=f"policy:{place}")
            assert verdicts() == now, place
            with daemon.client() as api:
                change = partial(api.policy_apply, [("web.yaml", texts.get(new, ""))])
                if last:
                    change = partial(api.policy_delete, ["web.yaml"])
                with pytest.raises(ConnectionLost):
                    change()
            assert daemon.wait() == -9, place
            assert tuple(opens(client.ns, web.ip4, port) for port in (80, 81)) in {now, new}, place
            daemon.start()
            now = now if place == "compiled" else new
            assert verdicts() == now, place
            with daemon.client() as api:
                assert api.node_status().ready
