"""``portwright port migrate``."""

from __future__ import annotations

import click

from portwright.cli.main import Settings
from portwright.cli.options import LabelType, client_of, json_option
from portwright.cli.output import print_json, print_table

#: Seconds; each sandbox takes some 50 ms, and a bridge has at most 1,023.
_PATIENCE = 300.0


@click.command()
@click.option("--bridge", metavar="NAME", help="The bridge to leave; by default all that a sandbox is on.")
@click.option("--network", metavar="NAME", help="The network to join; by default the one with the addresses.")
@click.option(
    "--address",
    "named",
    multiple=True,
    type=LabelType(),
    metavar="MAC=ADDRESS",
    help="An address of a guest that the host has not heard of; again for more.",
)
@click.option(
    "--remove-bridge", is_flag=True, help="Delete the bridge at the end; its addresses stay the host's."
)
@click.option(
    "--forwarding-accepted",
    is_flag=True,
    help="Chains that drop what is forwarded accept the sandboxes' packets without the bridge's name.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, as commands, and do nothing.")
@json_option
@click.pass_obj
def migrate(
    settings: Settings,
    /,
    *,
    bridge: str | None,
    network: str | None,
    named: tuple[tuple[str, str], ...],
    remove_bridge: bool,
    forwarding_accepted: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Move the sandboxes of a bridge off it while they run. Each is a port then."""
    addresses: dict[str, list[str]] = {}
    for mac, address in named:
        addresses.setdefault(mac, []).append(address)
    with client_of(settings, timeout=_PATIENCE) as client:
        done = client.port_migrate(
            bridge,
            network=network,
            addresses=addresses,
            remove_bridge=remove_bridge,
            forwarding_accepted=forwarding_accepted,
            dry_run=dry_run,
        )
    if as_json:
        print_json(done)
        return
    if dry_run:
        for moved in done.bridges:
            for step in moved.plan:
                click.echo(step.command)
            if moved.removed:
                click.echo(f"ip link delete {moved.bridge}")
        return
    print_table(
        ["BRIDGE", "DEVICE", "PORT_ID", "NETWORK", "MAC", "ADDRESSES", "SANDBOX"],
        [
            [
                moved.bridge,
                port.adopted.link if port.adopted else "",
                port.port_id,
                port.network,
                port.mac,
                ",".join(a.address for a in port.addresses),
                port.sandbox.path or "guest",
            ]
            for moved in done.bridges
            for port in moved.ports
        ],
    )
    for moved in done.bridges:
        if moved.removed:
            click.echo(f"removed bridge {moved.bridge}")
