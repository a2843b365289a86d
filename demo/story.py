"""How the demo talks and judges: a step, the command as a person would type it, its output, a check."""

from __future__ import annotations

import select
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from demo.box import Box

T = TypeVar("T")
_WIDTH = 100


class Failed(Exception):
    """A check did not hold; its text says which and what was seen."""


class Story:
    """Tells and checks what happens in ``box``. Colours only on a terminal."""

    def __init__(self, box: Box) -> None:
        """Nothing is printed yet."""
        self.box = box
        self.checks = 0
        self._step = 0

    def step(self, title: str, text: str = "") -> None:
        """Begin a step: its number, its title, and what a newcomer should know."""
        self._step += 1
        print(f"\n{_style('1', f'{self._step}. {title}')}")
        if text:
            print(
                textwrap.fill(" ".join(text.split()), _WIDTH, initial_indent="   ", subsequent_indent="   ")
            )
        sys.stdout.flush()

    def run(self, command: str, *, fails: bool = False, show: bool = True, timeout: float = 20) -> str:
        """Show and run a command (shell words, no shell), show its output, and return it.

        Raises Failed if its exit status is not the expected: 0, or with ``fails`` anything else.
        """
        if show:
            self.say_command(command)
        done = self.box.run(*shlex.split(command), timeout=timeout)
        out = (done.stdout + done.stderr).rstrip()
        if show and out:
            print(textwrap.indent(out, "     "))
            sys.stdout.flush()
        if bool(done.returncode) != fails:
            self.fail(f"{command}: exit status {done.returncode}{'' if show else f', {out}'}")
        return out

    def say_command(self, command: str) -> None:
        """Show a command that is run in another way."""
        print(f"   {_style('36', f'$ {command}')}")
        sys.stdout.flush()

    def check(self, holds: bool, claim: str, seen: str = "") -> None:
        """Print that ``claim`` holds; raise Failed with what was seen if it does not."""
        if not holds:
            self.fail(f"{claim}; seen: {seen}")
        self.checks += 1
        print(f"   {_style('32', 'ok')} {claim}")
        sys.stdout.flush()

    def fail(self, text: str) -> NoReturn:
        """Raise Failed."""
        raise Failed(f"step {self._step}: {text}")

    def wait(self, what: str, predicate: Callable[[], T | None], seconds: float = 15) -> T:
        """Poll until ``predicate`` returns something true, and return that; Failed after ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            late = time.monotonic() >= deadline
            if found := predicate():
                return found
            if late:
                self.fail(f"waited {seconds:g} s for {what}")
            select.select([], [], [], 0.05)

    def succeeds(self, command: str) -> Callable[[], bool]:
        """A predicate for :meth:`wait`: the command's exit status is 0."""

        def tried() -> bool:
            try:
                return self.box.run(*shlex.split(command), timeout=10).returncode == 0
            except subprocess.TimeoutExpired:
                return False

        return tried


def _style(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() else text
