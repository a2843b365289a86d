"""Runs a command for a proof: its output into a log, its progress to stderr, its end made sure of."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).resolve().parents[1]
_SAY_EVERY = 10.0  # seconds between two lines of progress where stderr is no terminal
_LAST_WORDS = 20  # lines of a failed command's log
_END_WITHIN = 30.0  # seconds from SIGINT to SIGKILL


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended: its status (negative: the signal), seconds, all its output, its log."""

    status: int
    seconds: float
    output: str
    log: Path


class Runner:
    """Runs one command at a time. ``logs`` is a folder for their outputs, made at first use."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.pids: set[int] = set()  # of everything that was run
        self._tty = sys.stderr.isatty()

    @property
    def logs(self) -> Path:
        """The folder, made if need be."""
        self._logs.mkdir(parents=True, exist_ok=True)
        return self._logs

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        timeout: float,
        counting: str = "",
        env: Mapping[str, str] | None = None,
        cwd: Path = PROJECT,
    ) -> Done:
        """Run to the end, or end it after ``timeout`` seconds (status -9).

        Lines that match ``counting`` are counted for the progress. stdin is empty. The command is a
        session of its own and is interrupted as a whole, so that what it started can clean up.
        """
        log = self.logs / f"{name}.log"
        began = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.pids.add(process.pid)
            try:
                self._follow(name, process, file, re.compile(counting or r"(?!)"), began + timeout)
            finally:
                status = _end(process)
                if process.stdout is not None:
                    process.stdout.close()
                self._erase()
        seconds = time.monotonic() - began
        output = log.read_text(errors="replace")
        if status:
            words = "\n".join(f"    {line}" for line in output.splitlines()[-_LAST_WORDS:])
            self.say(f"{name}: exit status {status} after {seconds:.0f} s; {log}:\n{words}")
        return Done(status, seconds, output, log)

    def say(self, text: str) -> None:
        """Print a line of progress."""
        self._erase()
        print(f"prove: {text}", file=sys.stderr, flush=True)

    def _follow(
        self,
        name: str,
        process: subprocess.Popen[bytes],
        log: IO[bytes],
        counting: re.Pattern[str],
        deadline: float,
    ) -> None:
        assert process.stdout is not None  # noqa: S101 - asked for above
        began = said = time.monotonic()
        count, rest = 0, ""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while (now := time.monotonic()) < deadline:
                if now - said >= (0.5 if self._tty else _SAY_EVERY):
                    said = now
                    self._progress(f"{name}: {now - began:.0f} s{f', {count} done' if count else ''}")
                if not selector.select(0.5):
                    continue
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    return
                log.write(data)
                *lines, rest = (rest + data.decode(errors="replace")).split("\n")
                count += sum(1 for line in lines if counting.search(line))

    def _progress(self, text: str) -> None:
        if self._tty:
            print(f"\r\x1b[Kprove: {text}", end="", file=sys.stderr, flush=True)
        else:
            self.say(text)

    def _erase(self) -> None:
        if self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _end(process: subprocess.Popen[bytes]) -> int:
    """The status of a process that has ended, or that is made to."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(1)
    for number, within in ((signal.SIGINT, _END_WITHIN), (signal.SIGKILL, _END_WITHIN)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(within)
            break
    return -signal.SIGKILL
