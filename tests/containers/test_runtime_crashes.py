"""The daemon dies while real containers run: they keep their network, and their end is not lost."""

from __future__ import annotations

import re

import pytest

from tests.deadline import wait_until
from tests.fix_containerd import PAGE, ROOTFS, Runtimes, addresses, own
from tests.fix_daemon import HOST4, WORLD4
from tests.fix_netns import TestNetns

pytestmark = pytest.mark.containers


@pytest.mark.alone
def test_containers_keep_their_network_while_the_daemon_is_killed_and_restarted(
    containerd: Runtimes,
) -> None:
    """Not one of a stream of echo requests is lost over SIGKILL and restart; DEL works afterwards."""
    web = containerd.ctr_serve("web")
    containerd.ctr_run("client", "sleep", "600")
    four, six = addresses(web)
    line = ("ctr", "task", "exec", "--exec-id", "stream", "client", "ping", "-q", "-i", "0.02", four)
    containerd.start("stream", *line)
    wait_until(lambda: containerd.succeeds("pidof", "ping"), 10, "the stream")

    before = containerd.ports()
    containerd.daemon.kill()
    assert containerd.ctr_read("client", "wget", "-q", "-O", "-", f"http://[{six}]/") == PAGE
    containerd.daemon.start()

    containerd.run("kill", "-INT", *containerd.run("pidof", "ping").split())
    wait_until(lambda: "packet loss" in containerd.log("stream"), 10, "the stream's summary")
    sent, received = (
        int(re.search(rf"(\d+) packets {word}", containerd.log("stream")).group(1))  # type: ignore[union-attr]
        for word in ("transmitted", "received")
    )
    assert sent > 5
    assert sent - received in {0, 1}  # the last one's answer may have been on its way when ping was ended
    assert containerd.ports() == before
    for name in ("web", "client"):
        containerd.ctr_stop(name)
    containerd.nothing_left()


def test_a_container_that_ends_while_the_daemon_is_down(containerd: Runtimes) -> None:
    """Its DEL is spooled, the runtime sees success, and the daemon's next start frees everything."""
    containerd.ctr_run("one", "sleep", "600")
    containerd.daemon.kill()
    containerd.ctr_stop("one")
    spool = containerd.daemon.state_dir / "spool"
    assert len(list(spool.iterdir())) == 1
    assert "network remove" not in containerd.log("one")  # what ctr logs when DEL fails

    containerd.daemon.start()
    wait_until(lambda: not list(spool.iterdir()), 10, "the replay")
    containerd.nothing_left()


def test_a_container_is_refused_while_the_daemon_is_down(containerd: Runtimes) -> None:
    """ADD fails at once, saying what to do; another works when the daemon is back."""
    containerd.daemon.kill()
    line = ("ctr", "run", "--rm", "--cni", "--env", "PATH=/bin", "--rootfs", ROOTFS, "early", "sleep", "600")
    assert "portwright node run" in containerd.fails(*line)
    containerd.daemon.start()
    containerd.nothing_left()
    containerd.ctr_run("one", "sleep", "600")
    containerd.ctr_exec("one", "ping", "-c", "1", "-W", "2", WORLD4)


def test_a_killed_container_leaves_nothing(containerd: Runtimes) -> None:
    """The whole task killed from outside, its namespace gone before DEL: DEL needs the record alone."""
    containerd.ctr_run("one", "sleep", "600")
    containerd.run("kill", "-KILL", *containerd.run("pidof", "sleep").split())
    containerd.nothing_left()


def test_a_host_port_passes_to_the_next_container(containerd: Runtimes, world: TestNetns) -> None:
    """After the daemon's death and restart, a published port is still answered, and freed by its DEL."""
    mapping = [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]
    containerd.conflist("n1", own(portMappings=mapping))
    fetch = ["curl", "-s", "--max-time", "3", f"http://{HOST4}:8080/"]
    for name in ("first", "second"):
        containerd.ctr_serve(name)
        assert world.run(fetch).stdout == PAGE
        containerd.daemon.kill()
        assert world.run(fetch).stdout == PAGE
        containerd.daemon.start()
        assert world.run(fetch).stdout == PAGE
        containerd.ctr_stop(name)
        assert world.run(fetch, check=False).returncode != 0
    containerd.nothing_left()
