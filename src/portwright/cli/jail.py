"""``portwright jail``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from portwright.cli.main import Settings
from portwright.cli.options import LabelType

if TYPE_CHECKING:
    from portwright.vmm.cell import Cell

Command = TypeVar("Command", bound=Callable[..., Any])


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--uid", type=int, default=65534, show_default=True, help="Whose the command is.")
@click.option("--gid", type=int, help="Its group; the number of its user, if not given.")
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="HOST[:INSIDE][:rw]",
    help="A file or directory that it has, to be read if not rw; a program's libraries come with it.",
)
@click.option("--device", "devices", multiple=True, metavar="PATH", help="A device's node, such as /dev/kvm.")
@click.option(
    "--fd",
    "fds",
    multiple=True,
    metavar="N[:NAME]",
    help="A descriptor of ours that is handed over, same number; {fd:NAME} in COMMAND is that number.",
)
@click.option("--netns", metavar="PATH", help="Its network namespace; a new, empty one, if not given.")
@click.option(
    "--port",
    "networks",
    multiple=True,
    metavar="NETWORK",
    help="A port in its new namespace, again for more: {fd:eth0}, {tap:eth0}, {mac:eth0}, {mtu:eth0}.",
)
@click.option("--label", "labels", multiple=True, type=LabelType(), help="A label of its ports.")
@click.option("--name", help="A name for its ports.")
@click.option(
    "--cgroup",
    "cgroup",
    multiple=True,
    metavar="FILE=VALUE",
    help="A limit, such as memory.max=256M or pids.max=64, in cgroup v1 or v2.",
)
@click.option("--cgroup-parent", default="", metavar="PATH", help="The cgroup below which its own is made.")
@click.option(
    "--rlimit", "rlimits", multiple=True, metavar="NAME=N", help="A resource limit, such as nofile=256."
)
@click.option(
    "--env", "environment", multiple=True, metavar="NAME[=VALUE]", help="A variable; there is no other."
)
@click.option("--hostname", default="jail", show_default=True, help="Its host's name.")
@click.option(
    "--tmp", type=int, default=0, metavar="MIB", help="A /tmp in memory, of that size; none with 0."
)
@click.option("--proc", is_flag=True, help="A /proc with nothing but the jail's own processes.")
@click.option(
    "--allow", multiple=True, metavar="SYSCALL", help="A system call that the seccomp filter lets pass."
)
@click.option("--no-seccomp", is_flag=True, help="No seccomp filter.")
@click.argument("command", nargs=-1, required=True)
@click.pass_obj
def jail(
    settings: Settings,
    /,
    *,
    uid: int,
    gid: int | None,
    files: tuple[str, ...],
    devices: tuple[str, ...],
    fds: tuple[str, ...],
    netns: str | None,
    networks: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    name: str | None,
    cgroup: tuple[str, ...],
    cgroup_parent: str,
    rlimits: tuple[str, ...],
    environment: tuple[str, ...],
    hostname: str,
    tmp: int,
    proc: bool,
    allow: tuple[str, ...],
    no_seccomp: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND with nothing of the host but what is named; its exit status is ours.

    It is in namespaces of its own, sees its own files only, has no privileges, and ends when we do.
    """
    from portwright.jail.run import run
    from portwright.jail.spec import File, Jail
    from portwright.model.errors import InvalidInput, NotFound

    if (labels or name) and not networks:
        raise InvalidInput("name" if name else "label", name or labels[0][0], "there is no --port to have it")
    if cgroup_parent and not cgroup:
        raise InvalidInput("cgroup-parent", cgroup_parent, "there is no --cgroup to put below it")
    program = shutil.which(command[0])
    if program is None:
        raise NotFound("program", command[0])

    def file(text: str) -> File:
        parts = text.split(":")
        writable = len(parts) > 1 and parts[-1] == "rw"
        parts = parts[: len(parts) - writable]
        if len(parts) > 2 or not all(parts):
            raise InvalidInput("file", text, "write it as HOST, HOST:INSIDE, HOST:rw or HOST:INSIDE:rw")
        return File(os.path.abspath(parts[0]), parts[1] if len(parts) > 1 else "", writable)  # noqa: PTH100

    made = Jail(
        command=(os.path.abspath(program), *command[1:]),  # noqa: PTH100 - resolve() would follow links
        uid=uid,
        gid=uid if gid is None else gid,
        files=tuple(map(file, files)),
        devices=devices,
        environment=dict(_variables(environment)),
        cgroup=_pairs("cgroup", cgroup),
        cgroup_parent=cgroup_parent,
        rlimits={key: _number("rlimit", value) for key, value in _pairs("rlimit", rlimits).items()},
        hostname=hostname,
        tmp=tmp,
        proc=proc,
        seccomp=not no_seccomp,
        allow=allow,
    )
    return run(
        made,
        socket=settings.socket,
        name=name or f"jail-{os.urandom(4).hex()}",
        networks=networks,
        labels=dict(labels),
        netns_path=netns or "",
        fds=_descriptors(fds),
    )


def cell_options(command: Command) -> Command:
    """Add --jail, and what belongs to it, to a command that starts a guest; see cell_of()."""
    for option in (
        click.option(
            "--rlimit", "rlimits", multiple=True, metavar="NAME=N", help="A resource limit of QEMU's."
        ),
        click.option("--cgroup-parent", default="", metavar="PATH", help="The cgroup that QEMU's is below."),
        click.option("--cgroup", multiple=True, metavar="FILE=VALUE", help="A limit, such as memory.max=1G."),
        click.option("--gid", type=int, help="The jailed QEMU's group; its user's number, if not given."),
        click.option("--uid", type=int, help="Whose the jailed QEMU is; nobody's (65534), if not given."),
        click.option("--jail", "jailed", is_flag=True, help="Run QEMU in a jail, as `portwright jail` does."),
    ):
        command = option(command)
    return command


def cell_of(
    jailed: bool,
    *,
    uid: int | None,
    gid: int | None,
    cgroup: Sequence[str],
    cgroup_parent: str,
    rlimits: Sequence[str],
) -> Cell | None:
    """The jail that these options ask for, or None. UsageError for one of them without --jail."""
    if not jailed:
        given = {"uid": uid, "gid": gid, "cgroup": cgroup, "cgroup-parent": cgroup_parent, "rlimit": rlimits}
        for name, value in given.items():
            if value is not None and value not in ((), ""):
                raise click.UsageError(f"--{name} is of a jail: add --jail")
        return None
    from portwright.jail.spec import NOBODY
    from portwright.vmm.cell import Cell

    user = NOBODY if uid is None else uid
    return Cell(
        uid=user,
        gid=user if gid is None else gid,
        cgroup=_pairs("cgroup", cgroup),
        cgroup_parent=cgroup_parent,
        rlimits={key: _number("rlimit", value) for key, value in _pairs("rlimit", rlimits).items()},
    )


def _pairs(field: str, texts: Sequence[str]) -> dict[str, str]:
    from portwright.model.errors import InvalidInput

    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise InvalidInput(field, text, "write it as NAME=VALUE")
        if key in found:
            raise InvalidInput(field, text, f"{key} is given twice")
        found[key] = value
    return found


def _variables(texts: Sequence[str]) -> list[tuple[str, str]]:
    """NAME is passed on from our own environment, where there must be one."""
    from portwright.model.errors import InvalidInput

    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals and name not in os.environ:
            raise InvalidInput("env", name, "is not set here; write NAME=VALUE")
        found.append((name, value if equals else os.environ[name]))
    return found


def _descriptors(texts: Sequence[str]) -> dict[str, int]:
    from portwright.model.errors import InvalidInput

    found: dict[str, int] = {}
    for text in texts:
        number, _, name = text.partition(":")
        key = name or number
        if key in found:
            raise InvalidInput("fd", text, f"{key} is given twice")
        found[key] = _number("fd", number)
    return found


def _number(field: str, text: str) -> int:
    from portwright.model.errors import InvalidInput

    try:
        return int(text)
    except ValueError:
        raise InvalidInput(field, text, "a number") from None
