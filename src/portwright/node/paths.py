"""Where the daemon keeps what. Two directories, so that several daemons live side by side."""

from __future__ import annotations

import hashlib
from pathlib import Path

DEFAULT_RUN_DIR = Path("/run/portwright")
DEFAULT_STATE_DIR = Path("/var/lib/portwright")


class Paths:
    """All paths of one daemon; nothing is created here."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self.run_dir = run_dir.absolute()
        self.state_dir = state_dir.absolute()
        self.socket = self.run_dir / "portwright.sock"
        self.bpf = self.run_dir / "bpf"
        self.spool = self.state_dir / "spool"

    @property
    def instance(self) -> str:
        """'' for the default run directory, else 8 hex digits of it: a suffix for names on the host."""
        if self.run_dir == DEFAULT_RUN_DIR:
            return ""
        return hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:8]
