"""One execution of a CNI plugin: environment and stdin in, exit status, stdout and stderr out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .netns import Netns

Json = dict[str, Any]


class CniFailed(Exception):
    """A plugin said no. ``code``, ``msg``, ``details`` are the error object's (code -1: it was not JSON)."""

    def __init__(self, verb: str, plugin: str, outcome: Outcome) -> None:
        error = outcome.error_or_empty()
        self.verb = verb
        self.plugin = plugin
        self.outcome = outcome
        self.code = int(error.get("code", -1))
        self.msg = str(error.get("msg", ""))
        self.details = str(error.get("details", ""))
        super().__init__(
            f"{verb} by {plugin}: exit {outcome.exit_code}, code {self.code}: {self.msg} {self.details} "
            f"[stdout {outcome.stdout[:500]!r}, stderr {outcome.stderr[-1500:]!r}]"
        )

    @property
    def text(self) -> str:
        """``msg`` and ``details`` as one string: plugins differ in how they divide it."""
        return f"{self.msg} {self.details}"


@dataclass(frozen=True)
class Outcome:
    """What an execution left: ``exit_code`` (negative: killed by that signal), stdout, stderr."""

    exit_code: int
    stdout: bytes
    stderr: str

    def json(self) -> Json:
        """The one JSON object that stdout holds; ValueError if it holds anything else."""
        value = json.loads(self.stdout)
        if not isinstance(value, dict):
            raise ValueError(  # noqa: TRY004  # the bytes are wrong, not the caller's type
                f"stdout is not a JSON object: {self.stdout[:200]!r}"
            )
        return value

    def error(self) -> Json:
        """The error object; AssertionError unless exit status and stdout are those of a failed plugin."""
        assert self.exit_code != 0, f"exit 0, stdout {self.stdout[:300]!r}"
        value = self.json()
        assert isinstance(value.get("code"), int), f"no error code: {value}"
        assert value["code"] > 0, f"code must be positive: {value}"
        assert isinstance(value.get("msg"), str), f"no msg: {value}"
        assert value["msg"], f"empty msg: {value}"
        return value

    def error_or_empty(self) -> Json:
        """The error object, or ``{}`` if stdout holds none."""
        try:
            return self.json()
        except ValueError:
            return {}


class Execution:
    """A plugin that runs; ``kill`` it, or ``wait`` for its outcome."""

    def __init__(self, binary: Path, env: Mapping[str, str], stdin: bytes, host: Netns | None) -> None:
        argv = [str(binary)] if host is None else host.argv([str(binary)])
        self._process = subprocess.Popen(
            argv,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._stdin = stdin

    def wait(self, timeout: float) -> Outcome:
        """Feed stdin and collect the outcome; kills everything it started after ``timeout`` seconds."""
        try:
            stdout, stderr = self._process.communicate(self._stdin, timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            stdout, stderr = self._process.communicate()
            stderr += f"\n[killed by the test after {timeout} s]".encode()
        return Outcome(self._process.returncode, stdout, stderr.decode(errors="replace"))

    def kill(self) -> None:
        """SIGKILL to the plugin and whatever it has exec'd."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def invoke(
    binary: Path, env: Mapping[str, str], stdin: bytes, host: Netns | None, timeout: float = 60
) -> Outcome:
    """Execute a plugin inside ``host`` with exactly this environment."""
    return Execution(binary, env, stdin, host).wait(timeout)
