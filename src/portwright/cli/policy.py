"""``portwright policy``: apply, list, delete, staged, matrix."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from portwright.api.calls import policy_apply
from portwright.api.frames import MAX_LARGE
from portwright.api.policy import PolicyState
from portwright.cli.changes import print_changes
from portwright.cli.live import print_cells
from portwright.cli.main import Settings
from portwright.cli.options import client_of, json_option
from portwright.cli.output import print_facts, print_json, printable
from portwright.model.errors import InvalidInput

#: What a folder's manifests are called.
_SUFFIXES = (".yaml", ".yml", ".json")
#: Seconds: as many manifests as one request holds are read and compiled in less than one minute.
_TIMEOUT = 180.0
#: Most bytes of a request beside its parameters.
_ENVELOPE = 256

_files_option = click.option(
    "-f",
    "--filename",
    "paths",
    multiple=True,
    required=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="A manifest, or a folder of them (*.yaml, *.yml, *.json).",
)


@click.group(no_args_is_help=True)
def policy() -> None:
    """Policies: who may open connections to whom. Manifests as written for clusters."""


@policy.command()
@_files_option
@click.option("--dry-run", is_flag=True, help="Say which pairs would change, and change nothing.")
@json_option
@click.pass_obj
def apply(settings: Settings, /, *, paths: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Put manifests in force, in the place of earlier files of the same name."""
    files = [(str(path), _text(path)) for path in _manifests(paths)]
    _refuse_too_much(paths, files)
    with client_of(settings, timeout=_TIMEOUT) as client:
        state = client.policy_apply(files, dry_run=dry_run)
    _show(state, as_json)


@policy.command()
@_files_option
@click.option(
    "--live", is_flag=True, help="Try it too: sandboxes of their own, a real packet a cell. Needs root."
)
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write it as a picture too.",
)
@json_option
def matrix(paths: tuple[Path, ...], live: bool, svg: Path | None, as_json: bool) -> int:
    """Print who may reach whom on which port, and by which rule. Needs no daemon: the manifests say all.

    With --live the exit status is 1 if the packets say otherwise.
    """
    from portwright.policy.host.matrix import host_cells
    from portwright.policy.manifests.read import read
    from portwright.policy.matrix import matrix as cells_of

    files = [(str(path), _text(path)) for path in _manifests(paths)]
    manifests = read(files)
    if live:
        from portwright.live.matrix import refuse_too_many

        refuse_too_many(manifests.snapshot)
    state = manifests.policy_set, manifests.snapshot
    cells = (*cells_of(*state), *host_cells(*state))
    if not cells:
        why = "no pod with a containerPort; the matrix is of the pods and hosts that the manifests describe"
        raise InvalidInput("filename", " ".join(map(str, paths)), why)
    if svg is not None:
        from portwright.policy.picture import picture

        _write(svg, picture(cells))
    if live:
        from portwright.cli.live import show_live

        return show_live(files, manifests, cells, as_json=as_json)
    if as_json:
        print_json({"cells": msgspec.to_builtins(cells)})  # under its wire names, from and to
        return 0
    print_cells([(cell, ["yes" if cell.allowed else "no"]) for cell in cells], ["ALLOWED"])
    return 0


@policy.command(name="list")
@json_option
@click.pass_obj
def list_(settings: Settings, as_json: bool) -> None:
    """Say what is in force."""
    with client_of(settings) as client:
        state = client.policy_list()
    _show(state, as_json)


@policy.command()
@click.option(
    "-f", "--filename", "names", multiple=True, required=True, metavar="PATH", help="A file as applied."
)
@click.option("--dry-run", is_flag=True, help="Say which pairs would change, and change nothing.")
@json_option
@click.pass_obj
def delete(settings: Settings, names: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Take manifests away. The file itself need not exist any more."""
    with client_of(settings, timeout=_TIMEOUT) as client:
        state = client.policy_delete([str(Path(name).absolute()) for name in names], dry_run=dry_run)
    _show(state, as_json)


@policy.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@json_option
@click.pass_obj
def staged(settings: Settings, names: tuple[str, ...], as_json: bool) -> None:
    """Say what staged policies would change if they were enforced: those of these names, or all."""
    with client_of(settings) as client:
        found = client.policy_staged(names)
    if as_json:
        print_json({"staged": found})
        return
    if not found:
        click.echo("no policy is staged")
    for number, each in enumerate(found):
        if number:
            click.echo()
        click.echo(printable(f"{each.policy} ({each.action}) {each.effect}, {each.where}"))
        if each.refused:
            click.echo(printable(f"can't be enforced: {each.refused}"))
        else:
            print_changes(each.changes)


def _manifests(paths: tuple[Path, ...]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        whole = path.absolute()
        if path.is_dir():
            inside = sorted(p for p in whole.iterdir() if p.suffix in _SUFFIXES and p.is_file())
            if not inside:
                raise InvalidInput("filename", str(path), f"a folder without {', '.join(_SUFFIXES)} files")
            found.update(dict.fromkeys(inside))
        else:
            found[whole] = None
    return list(found)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("filename", str(path), f"can't be read as text: {error}") from error


def _refuse_too_much(paths: tuple[Path, ...], files: list[tuple[str, str]]) -> None:
    """Raises InvalidInput if these are more than one request holds, so more than come into force at once."""
    size = len(msgspec.json.encode(policy_apply(files).params))
    if size > MAX_LARGE - _ENVELOPE:
        why = (
            f"{size:,} bytes of manifests as JSON, {MAX_LARGE:,} are the most at once: apply them in parts, "
            "or have the daemon follow the folder (portwright node run --policy-dir)"
        )
        raise InvalidInput("filename", " ".join(map(str, paths)), why)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput("svg", str(path), f"can't be written: {error.strerror}") from error


def _show(state: PolicyState, as_json: bool) -> None:
    if as_json:
        print_json(state)
        return
    tables = ", ".join(f"{count:,} {name}" for name, count in state.tables.items())
    print_facts(
        [
            ("files", list(state.files)),
            ("policies", list(state.policies)),
            ("staged", list(state.staged)),
            ("tables", tables),
            ("folder", state.folder),
            ("behind", state.behind),
            ("hosts", list(state.hosts)),
            ("failsafe", _failsafes() if state.hosts else []),
        ]
    )
    if state.changes is not None:
        click.echo()
        print_changes(state.changes)
    for warning in state.warnings:
        click.echo(f"warning: {warning.where}: {warning.text} {warning.fix} [{warning.code}]", err=True)


def _failsafes() -> list[str]:
    """The ports that no host endpoint's policy closes."""
    from portwright.policy.host.stages import FAILSAFE_IN, FAILSAFE_OUT

    return [
        f"{way} {name} {' '.join(map(str, ports[number]))}"
        for way, ports in (("in", FAILSAFE_IN), ("out", FAILSAFE_OUT))
        for name, number in (("tcp", 6), ("udp", 17))
    ]
