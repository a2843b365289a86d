"""``portwright network``: create, list, show, delete."""

from __future__ import annotations

import click

from portwright.cli.main import Settings
from portwright.cli.options import RangeSetType, RouteType, client_of, json_option
from portwright.cli.output import print_facts, print_json, print_table
from portwright.model.network import AddressRange, Dns, Isolation, Network, Route


@click.group(no_args_is_help=True)
def network() -> None:
    """Networks: what ports join. Routed (layer 3); nothing crosses between networks unasked."""


@network.command()
@click.argument("name")
@click.option(
    "--subnet", "subnets", multiple=True, metavar="CIDR", help="A subnet; one address of each per port."
)
@click.option(
    "--range", "ranges", multiple=True, type=RangeSetType(), help="A range set; join ranges by ';'."
)
@click.option("--mtu", type=click.IntRange(68, 65535), help="MTU of its ports.")
@click.option("--masquerade", is_flag=True, help="Hide its ports behind the host towards the outside.")
@click.option(
    "--reach", multiple=True, metavar="NETWORK", help="A network to exchange traffic with; '*' is all."
)
@click.option(
    "--isolation",
    type=click.Choice(["open", "tenant", "strict"]),
    default="open",
    help="What holds for its ports where no policy decides: all passes (open), only the same namespace's "
    "ports and the way out do (tenant), or nothing (strict).",
)
@click.option("--route", "routes", multiple=True, type=RouteType(), help="A route of its sandboxes.")
@click.option("--dns-server", "nameservers", multiple=True, metavar="ADDRESS", help="A name server.")
@click.option("--dns-search", "search", multiple=True, metavar="DOMAIN", help="A search domain.")
@click.option("--dns-option", "dns_options", multiple=True, metavar="OPTION", help="A resolver option.")
@click.option("--dns-domain", "domain", default="", help="The sandboxes' domain.")
@click.option("--reserved", multiple=True, metavar="ADDRESS", help="An address or CIDR never to give out.")
@json_option
@click.pass_obj
def create(
    settings: Settings,
    /,
    *,
    name: str,
    subnets: tuple[str, ...],
    ranges: tuple[tuple[AddressRange, ...], ...],
    mtu: int | None,
    masquerade: bool,
    reach: tuple[str, ...],
    isolation: Isolation,
    routes: tuple[Route, ...],
    nameservers: tuple[str, ...],
    search: tuple[str, ...],
    dns_options: tuple[str, ...],
    domain: str,
    reserved: tuple[str, ...],
    as_json: bool,
) -> None:
    """Create network NAME."""
    dns = Dns(nameservers=nameservers, domain=domain, search=search, options=dns_options)
    with client_of(settings) as client:
        made = client.network_create(
            name,
            subnets=subnets,
            ranges=ranges,
            mtu=mtu,
            masquerade=masquerade,
            reach=reach,
            isolation=isolation,
            routes=routes,
            dns=dns,
            reserved=reserved,
        )
    if as_json:
        print_json(made)
    else:
        print_facts(_facts(made))


@network.command(name="list")
@json_option
@click.pass_obj
def list_(settings: Settings, as_json: bool) -> None:
    """List the networks."""
    with client_of(settings) as client:
        found = client.network_list()
    if as_json:
        print_json(found)
        return
    print_table(
        ["NAME", "RANGES", "MTU", "MASQUERADE", "REACH", "ISOLATION"],
        [
            [
                each.name,
                " ".join(range_set(ranges) for ranges in each.pools),
                each.mtu,
                "yes" if each.masquerade else "no",
                " ".join(each.reach),
                each.isolation,
            ]
            for each in found
        ],
    )


@network.command()
@click.argument("name")
@json_option
@click.pass_obj
def show(settings: Settings, name: str, as_json: bool) -> None:
    """Show network NAME and how much of it is in use."""
    with client_of(settings) as client:
        found = client.network_show(name)
    if as_json:
        print_json(found)
        return
    usage = [f"{u.ranges}: {u.used} of {u.size} in use, {u.resting} resting" for u in found.usage]
    print_facts([*_facts(found.network), ("ports", found.ports), ("usage", usage)])


@network.command()
@click.argument("name")
@json_option
@click.pass_obj
def delete(settings: Settings, name: str, as_json: bool) -> None:
    """Delete network NAME. Refused while a port is on it."""
    with client_of(settings) as client:
        gone = client.network_delete(name)
    if as_json:
        print_json(gone)
    else:
        click.echo(f"deleted network {gone.name}")


def range_set(ranges: tuple[AddressRange, ...]) -> str:
    """Return a range set as --range takes it."""
    texts = []
    for each in ranges:
        more = (("start", each.start), ("end", each.end), ("gateway", each.gateway))
        texts.append(",".join([each.subnet, *(f"{key}={value}" for key, value in more if value is not None)]))
    return ";".join(texts)


def route_text(route: Route) -> str:
    """Return a route as --route takes it."""
    names = ("gw", "mtu", "advmss", "priority", "table", "scope")
    more = [f"{name}={getattr(route, name)}" for name in names if getattr(route, name) is not None]
    return ",".join([route.dst, *more])


def _facts(shown: Network) -> list[tuple[str, object]]:
    return [
        ("name", shown.name),
        ("ranges", [range_set(ranges) for ranges in shown.pools]),
        ("reserved", " ".join(shown.reserved)),
        ("mtu", shown.mtu),
        ("masquerade", "yes" if shown.masquerade else "no"),
        ("reach", " ".join(shown.reach)),
        ("isolation", shown.isolation),
        ("routes", [route_text(route) for route in shown.routes]),
        ("name servers", " ".join(shown.dns.nameservers)),
        ("search", " ".join(shown.dns.search)),
    ]
