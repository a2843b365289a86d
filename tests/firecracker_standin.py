"""An executable in Firecracker's place: our statement of its API (firecracker_server.py), as a process.

It takes Firecracker's arguments, opens the kernel's taps by name where it runs, and ends as it does: at
Ctrl-Alt-Del with status 0, by SIGTERM at once, and then its socket is left. What it is to do otherwise is in
its environment: PWT_FC_VERSION, PWT_FC_FAULT (``VERB PATH KIND``; KIND as of Fault, or ``die``), PWT_FC_DEAF
(``guest``: Ctrl-Alt-Del is not heeded, ``both``: nor is SIGTERM). What came is
written to PWT_FC_LOG, a line of JSON for each request.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tests.firecracker_server import Fault, FirecrackerServer, KernelTaps

PROJECT = Path(__file__).resolve().parents[1]
DIED = 7


def write(path: Path) -> Path:
    """Make the executable."""
    lines = [
        f"#!{sys.executable}",
        "import sys",
        f"sys.path.insert(0, {str(PROJECT)!r})",
        "from tests.firecracker_standin import main",
        "main()",
    ]
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return path


class _Process(FirecrackerServer):
    """One that ends as a process does."""

    def __init__(self, path: Path, version: str) -> None:
        super().__init__(path, KernelTaps(contextlib.nullcontext), version=version)
        self.ended = threading.Event()
        self.died_at: tuple[str, str] | None = None

    def answer(self, method: str, path: str, raw: bytes) -> tuple[int, Any]:
        """As Firecracker, with a log, a console, and a keyboard."""
        body = json.loads(raw) if raw else None
        with Path(os.environ["PWT_FC_LOG"]).open("a") as log:
            log.write(json.dumps([method, path, body]) + "\n")
        if self.died_at == (method, path):
            sys.stderr.write("the stand-in dies here\n")
            sys.stderr.flush()
            os._exit(DIED)
        found = super().answer(method, path, raw)
        action = (body or {}).get("action_type") if found[0] < 400 and path == "/actions" else None
        if action == "InstanceStart":
            sys.stdout.write("the guest's console\n")
            sys.stdout.flush()
        if action == "SendCtrlAltDel" and not os.environ.get("PWT_FC_DEAF"):
            self.ended.set()
        return found


def main() -> None:
    """Serve until the end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--api-sock", type=Path, required=True)
    given = parser.parse_args()
    if not all(c.isalnum() or c == "-" for c in given.id) or len(given.id) > 64:
        parser.error(f"invalid --id {given.id}")
    deaf = os.environ.get("PWT_FC_DEAF") == "both"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else signal.SIG_DFL)
    process = _Process(given.api_sock, os.environ.get("PWT_FC_VERSION", "1.16.1"))
    if fault := os.environ.get("PWT_FC_FAULT"):
        verb, path, kind = fault.split()
        if kind == "die":
            process.died_at = verb, path
        else:
            process.faults[verb, path] = Fault(kind)
    with process:
        process.ended.wait()
