"""The documents name what there is: commands, options, error codes, reasons, and each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from portwright.cli.main import cli
from portwright.cni.errors import CniCode
from portwright.cni.requested import POD_LABELS
from portwright.cni.version import SUPPORTED
from portwright.dataplane.abi import PwReason

PROJECT = Path(__file__).resolve().parents[2]
DOCS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]


def text(name: str) -> str:
    return (PROJECT / "docs" / name).read_text()


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Every command that is no group, with its name in full."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_command_and_option_is_documented() -> None:
    """docs/cli.md names each command, and each long option but --json and --help."""
    said = text("cli.md")
    for name, command in commands(cli):
        assert f"`{name}" in said or f"| `{name.split()[-1]}" in said, name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                options = [o for o in parameter.opts if o not in ("--json", "--help")]
                assert not options or any(o in said for o in options), (name, options)


def test_every_error_code_is_documented() -> None:
    """docs/cni.md has a row for each code, and the versions and labels that are read."""
    said = text("cni.md")
    for code in CniCode:
        assert f"| {int(code)} |" in said, code
    for word in (*SUPPORTED, *POD_LABELS, *POD_LABELS.values()):
        assert word in said, word


def test_every_key_that_is_read_is_documented() -> None:
    """Each literal key that the CNI code asks of a configuration stands in docs/cni.md."""
    said = text("cni.md")
    asked = re.compile(r"\.(?:text|texts|number|flag|child|children|get|array|at)\(\s*f?\"([A-Za-z./-]+)\"")
    for module in ("config.py", "requested.py"):
        for key in asked.findall((PROJECT / "src/portwright/cni" / module).read_text()):
            assert key.removeprefix("cni.dev/") in said, (module, key)


def test_every_reason_of_a_drop_is_documented() -> None:
    """docs/operations.md says what each reason means."""
    said = text("operations.md")
    for reason in PwReason:
        name = reason.name.lower().removeprefix("r_")
        if name not in ("none", "max"):
            assert f"`{name}`" in said, name


@pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)
def test_links_and_paths_lead_somewhere(doc: Path) -> None:
    """Every relative link, and every path of the project in backticks, exists."""
    said = doc.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", said):
        # Written by `make bench`, on a quiet machine.
        assert target == "docs/performance.md" or (doc.parent / target).exists(), target
    for path in re.findall(r"`((?:src|tests|docs|bench|prove|demo|lab|packaging)/[\w./-]+)`", said):
        assert (PROJECT / path).exists() or path == "docs/performance.md", path
