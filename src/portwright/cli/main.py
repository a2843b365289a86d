"""The entry point, the global options, and how every error ends.

Exit status: 0 done; 1 refused or failed, with one line ``portwright: ...`` on stderr; 2 usage. With
``--json`` an error is a JSON object on stdout too: ``{"error": {"code", "message", "facts"}}``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from portwright import __version__
from portwright.cli.lazy import LazyGroup

_DEFAULT_RUN_DIR = "/run/portwright"
_DEFAULT_STATE_DIR = "/var/lib/portwright"


@dataclass(frozen=True, slots=True)
class Settings:
    """The global options."""

    run_dir: Path
    state_dir: Path

    @property
    def socket(self) -> Path:
        """The daemon's socket."""
        return self.run_dir / "portwright.sock"


class Root(LazyGroup):
    """The root command: turns every way to fail into an exit status and one line."""

    def main(  # type: ignore[override]  # always ends the process, as click's standalone mode does
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> None:
        """Run the command that ``args`` (default: sys.argv) say, and exit."""
        given = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        sys.exit(self._guarded(given, prog_name or "portwright", extra))

    def _guarded(self, args: list[str], prog_name: str, extra: dict[str, Any]) -> int:
        as_json = "--json" in args
        try:
            status = super().main(list(args), prog_name, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx is not None else prog_name
            message = error.format_message().rstrip(".")
            return _report("usage", f"{message} (see: {where} --help)", {}, 2, as_json)
        except click.ClickException as error:
            return _report("failed", error.format_message(), {}, 1, as_json)
        except (click.Abort, KeyboardInterrupt):
            return 1
        except BrokenPipeError:
            # Whoever read our output has gone. Leave no second failure to the interpreter's flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            from portwright.model.errors import PortwrightError

            if not isinstance(error, PortwrightError):
                raise
            return _report(error.code, str(error), error.facts(), 1, as_json)
        return status if isinstance(status, int) else 0


def _report(code: str, message: str, facts: dict[str, object], status: int, as_json: bool) -> int:
    from portwright.cli.output import printable

    if as_json:
        import json

        error = {"error": {"code": code, "message": message, "facts": facts}}
        click.echo(json.dumps(error, default=repr))
    click.echo(f"portwright: {printable(message, keep=chr(10))}", err=True)
    return status


_NODE = "portwright.cli.node"
_OBSERVE = "portwright.cli.observe"

cli = Root(
    name="portwright",
    help="The network of a sandbox host: managed ports for containers and microVMs.",
    lazy={
        "node": (_NODE, "node", "Run, question and stop the daemon."),
        "install": ("portwright.cli.install", "install", "Install the CNI plugin and its configuration."),
        "network": ("portwright.cli.network", "network", "Networks: what ports join."),
        "port": ("portwright.cli.port", "port", "Ports: a sandbox's device and its representor."),
        "vm": ("portwright.cli.vm", "vm", "Guests: virtual machines on ports."),
        "jail": ("portwright.cli.jail", "jail", "Run a hypervisor, or any program, apart from the host."),
        "policy": ("portwright.cli.policy", "policy", "Policies: who may open connections to whom."),
        "why": (_OBSERVE, "why", "Explain what happens to a packet."),
        "stats": (_OBSERVE, "stats", "What the ports carried."),
        "drops": (_OBSERVE, "drops", "What was dropped, and for which reason."),
        "doctor": (_OBSERVE, "doctor", "Check the host, the kernel and the daemon."),
    },
)


def _settings(ctx: click.Context, run_dir: str, state_dir: str) -> None:
    ctx.obj = Settings(Path(run_dir), Path(state_dir))


cli.callback = click.pass_context(_settings)
cli.params = [
    click.Option(
        ["--run-dir"],
        default=_DEFAULT_RUN_DIR,
        show_default=True,
        envvar="PORTWRIGHT_RUN_DIR",
        show_envvar=True,
        help="Where the daemon's socket and pins are.",
    ),
    click.Option(
        ["--state-dir"],
        default=_DEFAULT_STATE_DIR,
        show_default=True,
        envvar="PORTWRIGHT_STATE_DIR",
        show_envvar=True,
        help="Where the daemon keeps its state.",
    ),
    click.version_option(__version__, prog_name="portwright")(lambda: None).__click_params__[0],  # type: ignore[attr-defined]
]


def main() -> None:
    """Run the command line and exit."""
    cli.main()


if __name__ == "__main__":
    main()
