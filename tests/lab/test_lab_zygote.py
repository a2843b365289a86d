"""The lab's way to start ``portwright``: what it forks is what an exec would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from portwright import Client
from tests.deadline import wait_until
from tests.fix_daemon import PORTWRIGHT
from tests.fix_netns import NetnsFactory, TestNetns
from tests.zygote import Process, Zygote

pytestmark = pytest.mark.netns


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    """One of the test's own."""
    made = Zygote()
    yield made
    made.close()


def forked(zygote: Zygote, ns: TestNetns, arguments: Sequence[str], **env: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a start."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        status = zygote.start(ns.path, arguments, os.environ | env, out.fileno(), err.fileno()).wait(30)
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


@pytest.mark.parametrize(
    "arguments", [["--version"], ["port", "list"], ["no-such-command"], ["port", "show"]]
)
def test_a_fork_says_and_ends_as_an_exec_does(
    zygote: Zygote, netns_factory: NetnsFactory, arguments: list[str], tmp_path: Path
) -> None:
    """Output, error and exit status are the same, of success and of failure, with the environment given."""
    env = {"PORTWRIGHT_RUN_DIR": str(tmp_path)}
    done = subprocess.run(
        [str(PORTWRIGHT), *arguments], env=os.environ | env, check=False, capture_output=True, text=True
    )
    for _ in range(2):  # the first leaves nothing behind for the second
        found = forked(zygote, netns_factory(), arguments, **env)
        assert found == (done.returncode, done.stdout, done.stderr)


def test_a_daemon_is_in_its_namespace_and_is_ended_by_signals(
    zygote: Zygote, netns_factory: NetnsFactory
) -> None:
    """It runs where it was asked to, answers under its own pid, and ends by TERM and by KILL as it should."""
    ns = netns_factory()
    with tempfile.TemporaryDirectory(prefix=f"pwt-{os.getpid()}-") as folder:
        env = {"PORTWRIGHT_RUN_DIR": f"{folder}/run", "PORTWRIGHT_STATE_DIR": f"{folder}/state"}

        def start() -> Process:
            with Path(f"{folder}/log").open("ab") as log:
                made = zygote.start(ns.path, ["node", "run"], os.environ | env, log.fileno(), log.fileno())
            wait_until(Path(f"{folder}/run/portwright.sock").exists, 30, "its socket")
            return made

        one = start()
        assert Path(f"/proc/{one.pid}/ns/net").stat().st_ino == os.fstat(ns.fd).st_ino
        assert {p.name for p in Path(f"/proc/{one.pid}/fd").iterdir()} >= {"0", "1", "2"}
        with Client(f"{folder}/run/portwright.sock") as client:
            assert client.node_status().pid == one.pid
        with pytest.raises(subprocess.TimeoutExpired):
            one.wait(0.01)
        assert one.poll() is None
        one.kill()
        assert one.wait(30) == one.returncode == -signal.SIGKILL
        one.kill()  # does nothing: its number may be another's by now
        Path(f"{folder}/run/portwright.sock").unlink()

        two = start()
        two.send_signal(signal.SIGTERM)
        assert two.wait(30) == 0
        assert "ready" in Path(f"{folder}/log").read_text()
