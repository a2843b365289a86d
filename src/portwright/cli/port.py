"""``portwright port``: create, list, show, delete, set, plug, unplug."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from portwright.cli.main import Settings
from portwright.cli.migrate import migrate
from portwright.cli.network import route_text
from portwright.cli.options import LabelType, PublishType, RateType, client_of, json_option
from portwright.cli.output import full, print_facts, print_json, print_table, rate
from portwright.model.port import MAX_QUEUES, Limits, Port, PortMapping, PortState

if TYPE_CHECKING:
    from portwright.api.methods import DirectionStats

Command = TypeVar("Command", bound=Callable[..., Any])

_NETNS = "The sandbox: a path, a name in /run/netns, or pid:N."
_LIMITS = ("egress_rate", "egress_burst", "ingress_rate", "ingress_burst")


def _limit_options(command: Command) -> Command:
    for name in reversed(_LIMITS):
        side = "the sandbox may send" if name.startswith("egress") else "may be sent to the sandbox"
        text = (
            f"What {side}, in bits per second" if name.endswith("rate") else f"The burst that {side}, in bits"
        )
        option = click.option(f"--{name.replace('_', '-')}", type=RateType(), help=f"{text}; 0 is unlimited.")
        command = option(command)
    return command


@click.group(no_args_is_help=True)
def port() -> None:
    """Ports: a sandbox's device, and its representor in the host.

    PORT is a port_id, the beginning of one, a name or a representor.
    """


@port.command()
@click.option("--network", required=True, metavar="NAME", help="The network to join.")
@click.option("--netns", required=True, metavar="SANDBOX", help=_NETNS)
@click.option("--ifname", default="eth0", show_default=True, help="The device's name in the sandbox.")
@click.option("--name", help="A name for the port.")
@click.option("--mac", help="The device's MAC address.")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="An address to have.")
@click.option("--label", "labels", multiple=True, type=LabelType(), help="A label.")
@click.option(
    "-p", "--publish", "mappings", multiple=True, type=PublishType(), help="A host port to publish."
)
@_limit_options
@click.option("--mtu", type=click.IntRange(68, 65535), help="The device's MTU.")
@click.option(
    "--attach",
    type=click.Choice(["clsact", "tcx"]),
    help="How the programs sit on the representor; tcx leaves its ingress qdisc to others.",
)
@click.option(
    "--queues", type=click.IntRange(1, MAX_QUEUES), default=1, show_default=True, help="Of a model's tap."
)
@click.option(
    "--join",
    type=click.Choice(["bpf", "peer", "mirred"]),
    help="What joins a tcfilter's device and tap: bpf unless said; peer goes past the device's egress.",
)
@click.option(
    "--inner-address",
    "inner_addresses",
    multiple=True,
    metavar="ADDRESS",
    help="What the guest has instead: one of many restored from a snapshot. Once for each family.",
)
@click.option(
    "--model", default="veth", show_default=True, help="The attachment model: veth, tcfilter, macvtap, tap."
)
@click.option("--dry-run", is_flag=True, help="Print what would be done, as commands, and do nothing.")
@json_option
@click.pass_obj
def create(
    settings: Settings,
    /,
    *,
    network: str,
    netns: str,
    ifname: str,
    name: str | None,
    mac: str | None,
    ips: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    mappings: tuple[PortMapping, ...],
    mtu: int | None,
    attach: str | None,
    model: str,
    queues: int,
    join: Literal["bpf", "peer", "mirred"] | None,
    inner_addresses: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Create a port, and its device in the sandbox."""
    wanted: dict[str, Any] = {
        "ifname": ifname,
        "name": name,
        "mac": mac,
        "ips": ips,
        "labels": dict(labels),
        "port_mappings": mappings,
        "limits": Limits(**{key: value or 0 for key, value in limits.items()}),
        "mtu": mtu,
        "attach": attach,
        "model": model,
        "queues": queues,
        "join": join,
        "inner_addresses": inner_addresses,
    }
    with client_of(settings) as client:
        if dry_run:
            plan = client.port_plan(network, netns, **wanted)
            if as_json:
                print_json(plan)
            else:
                for step in plan.plan:
                    click.echo(step.command)
            return
        made = client.port_create(network, netns, **wanted)
    _print_port(made, as_json)


@port.command(name="list")
@click.option("--network", metavar="NAME", help="Only those of this network.")
@click.option(
    "--state", type=click.Choice([state.value for state in PortState]), help="Only those in this state."
)
@click.option("--label", metavar="KEY[=VALUE]", help="Only those with this label.")
@json_option
@click.pass_obj
def list_(
    settings: Settings, network: str | None, state: str | None, label: str | None, as_json: bool
) -> None:
    """List the ports."""
    with client_of(settings) as client:
        found = client.port_list(network=network, state=state, label=label)
    if as_json:
        print_json(found)
        return
    print_table(
        ["PORT_ID", "REP", "STATE", "NETWORK", "MODEL", "IFNAME", "ADDRESSES", "NAME"],
        [
            [
                each.port_id,
                each.rep_name or "-",
                each.state.value,
                each.network,
                each.model,
                each.ifname,
                ",".join(a.address for a in each.addresses),
                workload(each),
            ]
            for each in found
        ],
    )


@port.command()
@click.argument("port")
@json_option
@click.pass_obj
def show(settings: Settings, port: str, as_json: bool) -> None:
    """Show PORT and what it carried."""
    with client_of(settings) as client:
        found = client.port_show(port)
        if not found.rep_name:  # a tap on another plugin's device
            _print_port(found, as_json)
            return
        stands = client.port_link(found.port_id)
        carried = next(iter(client.stats(found.port_id)), None)
    if as_json:
        counters = {
            name: getattr(carried, name) if carried else None for name in ("from_port", "to_port", "drops")
        }
        link = {name: getattr(stands, name) for name in ("admin", "link", "opstate", "ends")}
        print_json({**full(found), **link, **counters})
        return
    facts = _facts(found)
    facts[3:3] = [("admin", stands.admin), ("link", stands.link), ("opstate", stands.opstate)]
    if carried is not None:
        facts.append(("from_port", _direction(carried.from_port, carried.drops.from_port)))
        facts.append(("to_port", _direction(carried.to_port, carried.drops.to_port)))
    print_facts(facts)
    if stands.ends:
        click.echo()
        print_table(
            ["END", "NAME", "MAC", "MTU", "QUEUES", "VNET_HDR", "OFFLOADS"],
            [
                [
                    each.end,
                    each.name,
                    each.mac,
                    each.mtu,
                    each.queues,
                    {None: "", True: "yes", False: "no"}[each.vnet_hdr],
                    "" if each.offloads is None else ",".join(each.offloads) or "none",
                ]
                for each in stands.ends
            ],
        )


@port.command()
@click.argument("port")
@json_option
@click.pass_obj
def delete(settings: Settings, port: str, as_json: bool) -> None:
    """Delete PORT: its device, its addresses and its record."""
    with client_of(settings) as client:
        gone = client.port_delete(port)
    if as_json:
        print_json(gone)
    else:
        click.echo(f"deleted port {gone.port_id}")


@port.command(name="set")
@click.argument("port")
@click.option("--admin", type=click.Choice(["up", "down"]), help="Let traffic through, or none.")
@_limit_options
@click.option("--mtu", type=click.IntRange(68, 65535), help="The device's MTU.")
@click.option(
    "--label", "labels", multiple=True, type=LabelType(removable=True), help="Set a label; KEY- removes it."
)
@json_option
@click.pass_context
def set_(
    ctx: click.Context,
    /,
    *,
    port: str,
    admin: Literal["up", "down"] | None,
    mtu: int | None,
    labels: tuple[tuple[str, str | None], ...],
    as_json: bool,
    **limits: int | None,
) -> None:
    """Change PORT. What is not named stays as it is."""
    from portwright.api.methods import LimitsChange

    limited = any(value is not None for value in limits.values())
    if admin is None and mtu is None and not labels and not limited:
        ctx.fail("nothing to change: name at least one option")
    with client_of(ctx.obj) as client:
        changed = client.port_set(
            port,
            admin=admin,
            limits=LimitsChange(**limits) if limited else None,
            mtu=mtu,
            labels=dict(labels) if labels else None,
        )
    _print_port(changed, as_json)


@port.command()
@click.argument("port")
@click.option("--netns", required=True, metavar="SANDBOX", help=_NETNS)
@click.option("--ifname", help="The device's name in the sandbox; by default the one that it had.")
@json_option
@click.pass_obj
def plug(settings: Settings, port: str, netns: str, ifname: str | None, as_json: bool) -> None:
    """Give PORT, which is detached, a device in a sandbox."""
    with client_of(settings) as client:
        plugged = client.port_plug(port, netns, ifname=ifname)
    _print_port(plugged, as_json)


@port.command()
@click.argument("port")
@json_option
@click.pass_obj
def unplug(settings: Settings, port: str, as_json: bool) -> None:
    """Take PORT's device out of its sandbox. The port stays, detached."""
    with client_of(settings) as client:
        unplugged = client.port_unplug(port)
    _print_port(unplugged, as_json)


port.add_command(migrate)


def workload(shown: Port) -> str:
    """Return who owns the port, in a word: its name, or the CNI container's id (12 characters)."""
    if shown.owner.kind == "cni":
        pod = shown.labels.get("io.kubernetes.pod.name")
        space = shown.labels.get("io.kubernetes.pod.namespace")
        return f"{space}/{pod}" if pod and space else shown.owner.container_id[:12]
    return shown.owner.name


def _direction(carried: DirectionStats, dropped: int) -> str:
    return (
        f"{carried.total.packets} packets, {carried.total.bytes} bytes; "
        f"{carried.slow_path.packets} by the slow path; {dropped} dropped"
    )


def _mapping(mapping: PortMapping) -> str:
    host = (
        f"[{mapping.host_ip}]:"
        if ":" in mapping.host_ip
        else f"{mapping.host_ip}:"
        if mapping.host_ip
        else ""
    )
    return f"{host}{mapping.host_port}:{mapping.container_port}/{mapping.protocol}"


def _print_port(shown: Port, as_json: bool) -> None:
    if as_json:
        print_json(shown)
    else:
        print_facts(_facts(shown))


def _facts(shown: Port) -> list[tuple[str, object]]:
    limits = [
        f"{name} {rate(getattr(shown.limits, name))}" for name in _LIMITS if getattr(shown.limits, name)
    ]
    return [
        ("port_id", shown.port_id),
        ("name", workload(shown)),
        ("state", shown.state.value),
        ("network", shown.network),
        ("model", shown.model),
        ("join", shown.join),
        ("representor", shown.rep_name),
        ("ifname", shown.ifname),
        ("sandbox", shown.sandbox.path),
        ("mac", shown.mac),
        ("mtu", shown.mtu),
        ("addresses", [f"{a.address} via {a.gateway}" for a in shown.addresses]),
        ("inner", list(shown.inner_addresses)),
        ("routes", [route_text(route) for route in shown.routes]),
        ("published", [_mapping(mapping) for mapping in shown.port_mappings]),
        ("limits", limits),
        ("labels", [f"{key}={value}" for key, value in sorted(shown.labels.items())]),
    ]
