"""``portwright vm``: run, initramfs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portwright.cli.main import Settings
from portwright.cli.options import LabelType, client_of, json_option
from portwright.cli.output import print_json

if TYPE_CHECKING:
    from portwright.vmm.qemu import Console
    from portwright.vmm.run import Started
    from portwright.vmm.spec import Accel

_FILE = click.Path(path_type=Path)
#: Seconds that each call to the daemon may take.
_CALL_WITHIN = 60.0


@click.group(no_args_is_help=True)
def vm() -> None:
    """Guests: virtual machines on ports."""


@vm.command()
@click.option("--kernel", type=_FILE, required=True, help="The Linux image to boot.")
@click.option("--initramfs", type=_FILE, help="The first root file system; `vm initramfs` makes one.")
@click.option("--root", type=_FILE, help="A raw disk image, which is /dev/vda and the root.")
@click.option("--memory", type=int, default=256, show_default=True, help="In MiB.")
@click.option("--cpus", type=int, default=1, show_default=True, help="How many CPUs.")
@click.option(
    "--network",
    "networks",
    multiple=True,
    metavar="NAME",
    help="A network to be on, again for more NICs; the only one there is, if not given.",
)
@click.option(
    "--queues",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Of each NIC; no more than CPUs.",
)
@click.option("--name", help="A name for the guest, its port and its host name.")
@click.option("--label", "labels", multiple=True, type=LabelType(), help="A label of its ports.")
@click.option(
    "--accel",
    type=click.Choice(["kvm", "tcg"]),
    help="KVM or software emulation; $PORTWRIGHT_ACCEL or what works here, if not given.",
)
@click.option(
    "--console",
    type=click.Path(path_type=Path, allow_dash=True),
    help="A file for what the guest's console says, or - for this terminal; nowhere, if not given.",
)
@click.option("--append", multiple=True, metavar="WORDS", help="Words for the kernel's command line.")
@click.option(
    "--patience",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds that the guest has to shut down in.",
)
@json_option
@click.pass_obj
def run(
    settings: Settings,
    /,
    *,
    kernel: Path,
    initramfs: Path | None,
    root: Path | None,
    memory: int,
    cpus: int,
    networks: tuple[str, ...],
    queues: int,
    name: str | None,
    labels: tuple[tuple[str, str], ...],
    accel: Accel | None,
    console: Path | None,
    append: tuple[str, ...],
    patience: float,
    as_json: bool,
) -> int:
    """Run a guest on ports of its own, until it ends or is interrupted. Exit status 1 if it failed."""
    from portwright.vmm.run import absolute
    from portwright.vmm.run import run as run_guest
    from portwright.vmm.spec import GuestSpec

    spec = GuestSpec(
        name=name or f"vm-{os.urandom(4).hex()}",
        kernel=absolute(kernel),
        initramfs=absolute(initramfs),
        root=absolute(root),
        append=" ".join(append),
        memory=memory,
        cpus=cpus,
        accel=accel or "",
    )

    def started(facts: Started) -> None:
        if as_json:
            print_json(facts, line=True)
        else:
            nics = (" ".join([nic.ifname, nic.mac, *nic.addresses]) for nic in facts.nics)
            click.echo("  ".join([facts.name, f"pid {facts.pid}", *nics, facts.accel]))
        sys.stdout.flush()

    with _opened(console) as where, client_of(settings, timeout=_CALL_WITHIN) as client:
        end = run_guest(
            client,
            spec,
            networks,
            where,
            labels=dict(labels),
            queues=queues,
            patience=patience,
            started=started,
        )
    if not end.ok or end.reason == "host-qmp-quit":
        click.echo(f"portwright: guest {spec.name!r}: {end}", err=True)
    return 0 if end.ok else 1


@vm.command()
@click.option(
    "--modules", type=_FILE, required=True, metavar="DIR", help="The kernel's: /lib/modules/VERSION."
)
@click.option("--output", type=_FILE, required=True, help="The file to write.")
@json_option
def initramfs(modules: Path, output: Path, as_json: bool) -> None:
    """Make a small initramfs for `vm run`: busybox, virtio, and the network as its port has it."""
    from portwright.vmm.initramfs import build

    data = build(modules)
    try:
        output.write_bytes(data)
    except OSError as error:
        raise click.ClickException(f"can't write {output}: {error.strerror}") from None
    if as_json:
        print_json({"output": str(output), "bytes": len(data)})
    else:
        click.echo(f"wrote {output} ({len(data)} bytes)")


@contextmanager
def _opened(console: Path | None) -> Iterator[Console]:
    from portwright.vmm.qemu import Console

    if console is not None and str(console) == "-":
        both = sys.stdin.isatty() and sys.stdout.isatty()
        yield Console(sys.stdin.fileno(), sys.stdout.fileno(), terminal=both)
        return
    path = console or Path(os.devnull)
    try:
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise click.ClickException(f"can't write {path}: {error.strerror}") from None
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Console(nothing, out)
    finally:
        os.close(nothing)
        os.close(out)
