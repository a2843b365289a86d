from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.api import methods as m
from portwright.api.request import Request
from portwright.model.port import Owner, Port
from tests.fake_daemon import FakeDaemon, make_port, serving

COMMAND = [sys.executable, "-m", "portwright.cli.main"]
DAEMON = """
import asyncio, sys
from pathlib import Path
from portwright.api.server import Server
from tests.fake_daemon import FakeDaemon
async def main():
    daemon = FakeDaemon()
    async with Server(Path(sys.argv[1]) / "portwright.sock", daemon.dispatch):
        print("ready", flush=True)
        await daemon.stopping.wait()
asyncio.run(main())
"""


class Endless(FakeDaemon):
    """Streams drops without end; its port has a name that a terminal would obey."""

    async def drops_follow(self, params: m.DropsFollowParams, request: Request):  # type: ignore[no-untyped-def]  # noqa: ANN201
        import asyncio

        while True:
            async for event in super().drops_follow(params, request):
                yield event
            await asyncio.sleep(0.01)

    async def port_list(self, params: m.PortListParams, request: Request) -> list[Port]:
        return [make_port(owner=Owner(kind="name", name="\x1b]0;owned\x07[red]x"))]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    with serving(tmp_path / "portwright.sock", Endless().dispatch):
        yield tmp_path


def spawn(run_dir: Path, *args: str, **options: object) -> subprocess.Popen[bytes]:
    """Start the command with its output piped."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, "--run-dir", str(run_dir), *args], **pipes)  # type: ignore[call-overload,no-any-return]


def test_follow_ends_quietly_on_interrupt(run_dir: Path) -> None:
    """Events come as they happen, unbuffered; ^C ends with status 0 and no traceback."""
    with spawn(run_dir, "drops", "--follow", "--json") as child:
        assert child.stdout is not None
        for _ in range(5):
            assert json.loads(child.stdout.readline())["reason"] == "spoof-ip"
        child.send_signal(signal.SIGINT)
        child.stdout.read()
        assert child.stderr is not None
        assert child.stderr.read() == b""
        assert child.wait(10) == 0


def test_a_reader_that_leaves_ends_the_command(run_dir: Path) -> None:
    """``portwright drops --follow | head -1`` ends by itself, without a traceback."""
    with spawn(run_dir, "drops", "--follow") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert b"spoof-ip" in child.stdout.readline()
        child.stdout.close()
        assert child.wait(10) == 1
        assert child.stderr.read() == b""


def test_watch_prints_again_each_second_without_spinning(run_dir: Path) -> None:
    """One line of JSON a second, little CPU between, ^C ends with status 0."""
    with spawn(run_dir, "stats", "--watch", "--json") as child:
        assert child.stdout is not None
        began = time.monotonic()
        first, second = child.stdout.readline(), child.stdout.readline()
        took = time.monotonic() - began
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 0
    assert json.loads(first) == json.loads(second)
    assert took > 0.9


def test_a_terminal_gets_a_table_and_no_commands(run_dir: Path) -> None:
    """On a terminal the table is drawn, and a hostile name is shown, not obeyed, nor taken for markup."""
    ours, theirs = os.openpty()
    try:
        env = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
        with spawn(run_dir, "port", "list", stdout=theirs, env=env) as child:
            assert child.wait(20) == 0
        shown = b""
        while select.select([ours], [], [], 0)[0]:
            shown += os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    assert b"PORT_ID" in shown
    assert rb"\x1b]0;owned\x07[red]x" in shown
    assert b"\x1b]0" not in shown
    assert b"\x07" not in shown


def test_stop_returns_when_the_process_is_gone(tmp_path: Path) -> None:
    """``node stop`` waits for the daemon's end: what follows it may start the next one."""
    command = [sys.executable, "-c", DAEMON, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        done = subprocess.run(
            [*COMMAND, "--run-dir", str(tmp_path), "node", "stop", "--json"], capture_output=True, check=True
        )
        assert json.loads(done.stdout) == {"pid": daemon.pid, "stopped": True}
        assert daemon.poll() == 0


def test_help_loads_no_command(tmp_path: Path) -> None:
    """``portwright --help`` imports no msgspec, rich or asyncio; a command imports no asyncio, no rich."""
    code = """
import sys
from portwright.cli.main import cli
try:
    cli.main(sys.argv[2:])
finally:
    print({m for m in sys.argv[1].split(",") if m in sys.modules}, file=sys.stderr)
"""
    for heavy, line in (
        ("msgspec,rich,asyncio,portwright.api,portwright.model", "--help"),
        ("rich,asyncio,portwright.api.server", f"--run-dir {tmp_path} port list"),
    ):
        command = [sys.executable, "-I", "-c", code, heavy, *line.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1] == "set()", done.stderr
