"""``portwright stats``, ``drops``, ``why`` and ``doctor``: what happened, and why."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import click

from portwright.cli.main import Settings
from portwright.cli.options import client_of, json_option
from portwright.cli.output import print_json, print_table, printable
from portwright.model.errors import DaemonUnavailable, InvalidInput

if TYPE_CHECKING:
    from portwright.api.doctor import Check, Diagnosis
    from portwright.api.methods import DropEvent, PortStats

_STATS = [
    "PORT_ID",
    "REP",
    "FROM_PORT_PKTS",
    "FROM_PORT_BYTES",
    "FROM_PORT_SLOW",
    "FROM_PORT_DROPS",
    "TO_PORT_PKTS",
    "TO_PORT_BYTES",
    "TO_PORT_SLOW",
    "TO_PORT_DROPS",
    "NAME",
]


@click.command()
@click.argument("port", required=False)
@click.option("--watch", is_flag=True, help="Print them again every second, until ^C.")
@json_option
@click.pass_obj
def stats(settings: Settings, port: str | None, watch: bool, as_json: bool) -> None:
    """Show what every port, or PORT, carried; the slow path is what went through the host's stack."""
    with client_of(settings) as client:
        if not watch:
            _print_stats(client.stats(port), as_json, line=False)
            return
        due = time.monotonic()
        try:
            while True:
                found = client.stats(port)
                if sys.stdout.isatty() and not as_json:
                    click.echo("\x1b[H\x1b[J", nl=False)  # home, clear: a redraw that doesn't scroll
                _print_stats(found, as_json, line=True)
                sys.stdout.flush()
                due = max(due + 1.0, time.monotonic())
                time.sleep(due - time.monotonic() if due > time.monotonic() else 1.0)
        except KeyboardInterrupt:
            return


def _print_stats(found: Iterable[PortStats], as_json: bool, *, line: bool) -> None:
    if as_json:
        print_json(tuple(found), line=line)
        return
    rows = [
        [
            each.port_id,
            each.rep,
            each.from_port.total.packets,
            each.from_port.total.bytes,
            each.from_port.slow_path.packets,
            each.drops.from_port,
            each.to_port.total.packets,
            each.to_port.total.bytes,
            each.to_port.slow_path.packets,
            each.drops.to_port,
            each.name,
        ]
        for each in found
    ]
    print_table(_STATS, rows)


@click.command()
@click.argument("port", required=False)
@click.option("--follow", is_flag=True, help="Print each dropped packet as it happens, until ^C.")
@click.option(
    "--logged", is_flag=True, help="With --follow: also connections that pass and that a policy's rule logs."
)
@json_option
@click.pass_obj
def drops(settings: Settings, /, *, port: str | None, follow: bool, logged: bool, as_json: bool) -> None:
    """Show what was dropped at every port, or at PORT, and for which reason."""
    if logged and not follow:
        raise InvalidInput("--logged", "without --follow", "what passes is not counted: add --follow")
    with client_of(settings) as client:
        if follow:
            try:
                for event in client.drops_follow(port, logged=logged):
                    if as_json:
                        print_json(event, line=True)
                    else:
                        click.echo(drop_line(event))
                    sys.stdout.flush()
            except KeyboardInterrupt:
                pass
            return
        found = client.drops(port)
    if as_json:
        print_json(found)
        return
    header = ["PORT_ID", "REP", "DIRECTION", "REASON", "PACKETS", "BYTES"]
    rows = [[d.port_id, d.rep, d.direction, d.reason, d.packets, d.bytes] for d in found]
    if any(d.rule for d in found):  # host endpoints', by rule
        header.append("RULE")
        rows = [[*row, printable(d.rule)] for row, d in zip(rows, found, strict=True)]
    print_table(header, rows)


def drop_line(event: DropEvent) -> str:
    """Return one line for a dropped packet, in local time."""
    when = datetime.fromtimestamp(event.time).astimezone().strftime("%H:%M:%S.%f")
    where = f"{event.port_id} {event.rep}" if event.port_id.startswith("host:") else event.rep
    parts = [when, where, event.direction, event.reason]
    if event.rule:
        parts.append(f"rule={event.rule}")
    if event.summary:
        parts.append(event.summary)
    if event.lost:
        parts.append(f"({event.lost} lost before this)")
    return printable(" ".join(parts))


@click.command()
@click.argument("src")
@click.argument("dst")
@click.option("--proto", type=click.Choice(["tcp", "udp", "sctp", "icmp"]), default="tcp", show_default=True)
@click.option("--sport", type=click.IntRange(0, 65535), help="Source port.")
@click.option("--dport", type=click.IntRange(0, 65535), help="Destination port.")
@click.option("-4", "family", type=int, flag_value=4, help="IPv4 (preferred, where there are both).")
@click.option("-6", "family", type=int, flag_value=6, help="IPv6.")
@json_option
@click.pass_obj
def why(
    settings: Settings,
    /,
    *,
    src: str,
    dst: str,
    proto: Literal["tcp", "udp", "sctp", "icmp"],
    sport: int | None,
    dport: int | None,
    family: Literal[4, 6] | None,
    as_json: bool,
) -> None:
    """Explain what happens to a packet from SRC to DST: each a port, an address or ``host``."""
    with client_of(settings) as client:
        found = client.why(src, dst, proto=proto, sport=sport, dport=dport, family=family)
    if as_json:
        print_json(found)
        return
    for number, step in enumerate(found.steps, 1):
        detail = f" ({step.detail})" if step.detail else ""
        click.echo(printable(f"{number:2}. {step.step}: {step.text}{detail}"))
    to = f", delivered to {found.delivered_to}" if found.delivered_to else ""
    path = f" by the {found.path} path" if found.path else ""
    click.echo(printable(f"verdict: {found.verdict}{to}{path}"))


@click.command()
@json_option
@click.pass_obj
def doctor(settings: Settings, as_json: bool) -> int:
    """Check the host, the kernel and the daemon. Exit status 1 if something is broken."""
    try:
        with client_of(settings) as client:
            found = client.doctor()
    except DaemonUnavailable as error:
        found = _no_daemon(error)
    if as_json:
        print_json(found)
    else:
        for check in found.checks:
            _print_check(check)
        if found.features:
            click.echo()
            print_table(
                ["FEATURE", "PRESENT", "DETAIL"],
                [[f.name, "yes" if f.present else "no", f.detail] for f in found.features],
            )
    return 1 if any(not check.ok and check.level == "error" for check in found.checks) else 0


def _no_daemon(error: DaemonUnavailable) -> Diagnosis:
    """Return the diagnosis when nobody is there to ask: that is the finding."""
    from portwright.api.doctor import Check, Diagnosis

    detail = f"nothing answers on {error.socket}: {error.why}"
    return Diagnosis(checks=(Check(name="daemon", ok=False, detail=detail, way_out="portwright node run"),))


def _print_check(check: Check) -> None:
    mark = "ok" if check.ok else {"error": "FAIL", "warning": "warn", "info": "note"}[check.level]
    detail = f": {check.detail}" if check.detail else ""
    click.echo(printable(f"{mark:<5} {check.name}{detail}"))
    if check.way_out and not check.ok:
        click.echo(printable(f"      do: {check.way_out}"))
