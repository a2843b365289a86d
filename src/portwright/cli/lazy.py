"""Command groups that import a command's module only when it is run.

``portwright --help`` and every single command have to start in a fraction of the time that
importing all of Portwright takes, so a group knows its commands by name, home and one line of help.
"""

from __future__ import annotations

import difflib
from importlib import import_module

import click


class LazyGroup(click.Group):
    """A group of commands that live elsewhere.

    ``lazy`` maps a command's name to (module, attribute, help in one line), in the order of help.
    """

    def __init__(self, *, lazy: dict[str, tuple[str, str, str]], name: str | None = None, help: str) -> None:
        super().__init__(name=name, help=help, no_args_is_help=True)
        self._lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """The names of the commands, in the order of the table."""
        return list(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command; None if there is none of that name."""
        if cmd_name not in self._lazy:
            return None
        module, attribute, _help = self._lazy[cmd_name]
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)  # noqa: S101 - the table is ours
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest name in the error."""
        if args and args[0] not in self._lazy and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self._lazy, 1)
            hint = f" Did you mean {near[0]}?" if near else f" There are: {', '.join(self._lazy)}."
            ctx.fail(f"no such command: {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in self._lazy.items()])
