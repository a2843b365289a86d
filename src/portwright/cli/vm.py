"""``portwright vm``: run, list, plug, unplug, freeze, initramfs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource

from portwright.cli.jail import cell_of, cell_options
from portwright.cli.main import Settings
from portwright.cli.options import LabelType, RateType, client_of, json_option
from portwright.cli.output import print_json, print_table
from portwright.model.port import MAX_QUEUES, Limits

if TYPE_CHECKING:
    from portwright.api.calls import Call
    from portwright.vmm.contract import NicFacts, Started
    from portwright.vmm.driver import Console, End
    from portwright.vmm.matrix import Vmm
    from portwright.vmm.spec import Accel
    from portwright.vmm.vhost import Vhost

_FILE = click.Path(path_type=Path)
R = TypeVar("R")
#: Seconds that each call to the daemon may take, and a guest's NIC besides the guest's own time.
_CALL_WITHIN, _PLUG_WITHIN = 60.0, 150.0
_MAX_PATIENCE = 600.0  # vmm/contract.py's


@click.group(no_args_is_help=True)
def vm() -> None:
    """Guests: virtual machines on ports."""


@vm.command()
@click.option(
    "--vmm",
    type=click.Choice(["qemu", "firecracker"]),
    default="qemu",
    show_default=True,
    help="The hypervisor.",
)
@click.option(
    "--firecracker", metavar="PATH", help="Firecracker's executable; the one in $PATH, if not given."
)
@click.option("--kernel", type=_FILE, help="The Linux image to boot; for Firecracker the ELF one, vmlinux.")
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
    type=click.IntRange(1, MAX_QUEUES),
    default=1,
    show_default=True,
    help="Of each NIC; no more than CPUs.",
)
@click.option(
    "--model",
    type=click.Choice(["tcfilter", "macvtap", "tap"]),
    default="tcfilter",
    show_default=True,
    help="The attachment model of its ports.",
)
@click.option(
    "--vhost",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Whether the kernel's vhost-net carries its packets; auto: where there is one.",
)
@click.option(
    "--incoming", type=_FILE, help="A guest that `vm freeze` wrote, to go on from there: one of many clones."
)
@click.option(
    "--netns",
    metavar="SANDBOX",
    help="A sandbox that is there, to run on its ports: a path, a name in /run/netns, or pid:N.",
)
@click.option("--name", help="A name for the guest, its port and its host name.")
@click.option("--label", "labels", multiple=True, type=LabelType(), help="A label of its ports.")
@click.option("--egress-rate", type=RateType(), help="What each of its ports may send, in bits per second.")
@click.option("--ingress-rate", type=RateType(), help="What may be sent to each of its ports.")
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
@cell_options
@json_option
@click.pass_obj
def run(
    settings: Settings,
    /,
    *,
    vmm: Vmm,
    firecracker: str | None,
    netns: str | None,
    incoming: Path | None,
    kernel: Path | None,
    initramfs: Path | None,
    root: Path | None,
    memory: int,
    cpus: int,
    networks: tuple[str, ...],
    queues: int,
    model: str,
    vhost: Vhost,
    name: str | None,
    labels: tuple[tuple[str, str], ...],
    egress_rate: int | None,
    ingress_rate: int | None,
    accel: Accel | None,
    console: Path | None,
    append: tuple[str, ...],
    patience: float,
    jailed: bool,
    uid: int | None,
    gid: int | None,
    cgroup: tuple[str, ...],
    cgroup_parent: str,
    rlimits: tuple[str, ...],
    as_json: bool,
) -> int:
    """Run a guest on ports of its own, until it ends or is interrupted. Exit status 1 if it failed."""
    from portwright.vmm import frozen, matrix
    from portwright.vmm.run import absolute
    from portwright.vmm.run import run as run_guest
    from portwright.vmm.spec import GuestSpec
    from portwright.vmm.there import run_there

    if vmm == "firecracker":
        for given, feature in ((incoming, "freeze"), (netns, "netns")):
            if given is not None:
                matrix.require(feature, vmm, "tcfilter")
    elif firecracker is not None:
        raise click.UsageError("--firecracker is for --vmm firecracker")
    if (kernel is None) == (incoming is None):
        raise click.UsageError("name --kernel, or --incoming")
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
    restored = None
    if incoming is not None:
        fixed = ("initramfs", "root", "memory", "cpus", "queues", "model", "append", "accel", "netns")
        _refuse("--incoming goes on with a guest as it was: {} is not to be said", *fixed)
        restored = frozen.read(incoming)
        spec = restored.spec(spec.name, absolute(incoming))
    spec = replace(
        spec,
        cell=cell_of(jailed, uid=uid, gid=gid, cgroup=cgroup, cgroup_parent=cgroup_parent, rlimits=rlimits),
    )

    def started(facts: Started) -> None:
        if as_json:
            print_json(facts, line=True)
        else:
            nics = (" ".join([nic.ifname, nic.mac, *nic.addresses]) for nic in facts.nics)
            vhost_net = "vhost on" if facts.vhost else "vhost off"
            by = [facts.vmm] if facts.vmm != "qemu" else []
            how = (*by, facts.accel, facts.model, vhost_net)
            click.echo("  ".join([facts.name, f"pid {facts.pid}", *nics, *how]))
        sys.stdout.flush()

    if netns is not None:
        theirs = ("networks", "queues", "model", "labels", "egress_rate", "ingress_rate")
        _refuse("--netns runs on the ports that are there: {} is theirs to say", *theirs)
    with _opened(console) as where, client_of(settings, timeout=_CALL_WITHIN) as client:
        if netns is not None:
            end = run_there(client, spec, netns, where, vhost=vhost, patience=patience, started=started)
            return _told(spec.name, end)
        end = run_guest(
            client,
            spec,
            networks,
            where,
            labels=dict(labels),
            model=model,
            queues=queues,
            vhost=vhost,
            patience=patience,
            started=started,
            nics=restored.nics if restored is not None else (),
            limits=Limits(egress_rate=egress_rate or 0, ingress_rate=ingress_rate or 0),
            firecracker=(firecracker or vmm) if vmm == "firecracker" else "",
        )
    return _told(spec.name, end)


def _refuse(why: str, *names: str) -> None:
    """UsageError if one of these options was given; ``why`` with its name in it."""
    ctx = click.get_current_context()
    for name in names:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            given = name.removesuffix("s") if name in {"networks", "labels"} else name.replace("_", "-")
            raise click.UsageError(why.format(f"--{given}"))


def _told(name: str, end: End) -> int:
    """How a guest ended, in words where it was not as it should be; the exit status."""
    if not end.ok or end.reason == "host-qmp-quit":
        click.echo(f"portwright: guest {name!r}: {end}", err=True)
    return 0 if end.ok else 1


@vm.command("list")
@json_option
@click.pass_obj
def list_guests(settings: Settings, /, *, as_json: bool) -> int:
    """List the guests that run, and their NICs. Exit status 1 if one does not answer."""
    import asyncio

    from portwright.vmm.control import show_all

    guests, problems = asyncio.run(show_all(settings.run_dir))
    if as_json:
        print_json(guests)
    else:
        rows = [
            (guest.name, guest.pid, guest.vmm, guest.accel, *nic)
            for guest in guests
            for nic in [_row(nic) for nic in guest.nics] or [("",) * 5]
        ]
        print_table(["NAME", "PID", "VMM", "ACCEL", "IFNAME", "NETWORK", "REP", "MAC", "ADDRESSES"], rows)
    for problem in problems:
        click.echo(f"portwright: {problem}", err=True)
    return 1 if problems else 0


@vm.command()
@click.argument("name")
@click.option("--network", metavar="NAME", help="To be on; the only one there is, if not given.")
@click.option(
    "--queues",
    type=click.IntRange(1, MAX_QUEUES),
    default=1,
    show_default=True,
    help="Of the NIC; no more than CPUs.",
)
@click.option("--label", "labels", multiple=True, type=LabelType(), help="A label of its port.")
@json_option
@click.pass_obj
def plug(
    settings: Settings,
    /,
    *,
    name: str,
    network: str | None,
    queues: int,
    labels: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Give the running guest NAME one more NIC, on a port of its own."""
    from portwright.api.calls import Call
    from portwright.vmm.contract import NicFacts, PlugParams

    params = PlugParams(network=network, queues=queues, labels=dict(labels))
    _say(_asked(settings, name, Call("vm.plug", params, NicFacts), _PLUG_WITHIN), as_json)


@vm.command()
@click.argument("name")
@click.argument("ifname")
@click.option(
    "--patience",
    type=click.FloatRange(0, _MAX_PATIENCE),
    default=10.0,
    show_default=True,
    help="Seconds that the guest has to let go of it.",
)
@json_option
@click.pass_obj
def unplug(settings: Settings, /, *, name: str, ifname: str, patience: float, as_json: bool) -> None:
    """Take the NIC IFNAME away from the running guest NAME, and delete its port."""
    from portwright.api.calls import Call
    from portwright.vmm.contract import NicFacts, UnplugParams

    params = UnplugParams(ifname=ifname, patience=patience)
    _say(_asked(settings, name, Call("vm.unplug", params, NicFacts), patience + _PLUG_WITHIN), as_json)


@vm.command()
@click.argument("name")
@click.argument("file", type=_FILE)
@json_option
@click.pass_obj
def freeze(settings: Settings, /, *, name: str, file: Path, as_json: bool) -> None:
    """Write the running guest NAME to FILE, for `vm run --incoming`. It goes on after it."""
    from portwright.api.calls import Call
    from portwright.vmm.contract import FreezeParams, Frozen

    call = Call("vm.freeze", FreezeParams(file=str(file.absolute())), Frozen)
    frozen = _asked(settings, name, call, _PLUG_WITHIN)
    if as_json:
        print_json(frozen)
    else:
        click.echo(f"wrote {frozen.file} ({frozen.bytes} bytes), {frozen.seconds:g} s")


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


def _asked(settings: Settings, name: str, call: Call[R], within: float) -> R:
    import asyncio

    from portwright.vmm.control import ask

    return asyncio.run(ask(settings.run_dir, name, call, within=within))


def _row(nic: NicFacts) -> tuple[str, ...]:
    return nic.ifname, nic.network, nic.rep, nic.mac, ",".join(nic.addresses)


def _say(nic: NicFacts, as_json: bool) -> None:
    if as_json:
        print_json(nic)
    else:
        click.echo("  ".join([nic.ifname, nic.mac, *nic.addresses]))


@contextmanager
def _opened(console: Path | None) -> Iterator[Console]:
    from portwright.vmm.driver import Console

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
