"""``portwright node``: run, status, stop."""

from __future__ import annotations

import os
import select
from pathlib import Path

import click

from portwright.cli.main import Settings
from portwright.cli.options import client_of, dir_options, json_option, merged
from portwright.cli.output import print_facts, print_json

#: How long ``stop`` waits for the daemon's end, in seconds.
_STOP_WITHIN = 30.0


@click.group(no_args_is_help=True)
def node() -> None:
    """Run, question and stop the daemon."""


@node.command()
@dir_options
@click.option(
    "--policy-dir",
    type=click.Path(path_type=Path),
    envvar="PORTWRIGHT_POLICY_DIR",
    help="A folder whose manifests are kept in force, as they change.",
)
@click.option(
    "--node-name",
    default="",
    envvar="PORTWRIGHT_NODE_NAME",
    help="What HostEndpoints call this host in spec.node; its host name, if not given.",
)
@click.pass_obj
def run(
    settings: Settings,
    /,
    *,
    run_dir: Path | None,
    state_dir: Path | None,
    policy_dir: Path | None,
    node_name: str,
) -> int:
    """Run the daemon in the foreground, until it is stopped. Ports keep working without it."""
    from portwright.daemon.main import main

    where = merged(settings, run_dir, state_dir)
    return main(state_dir=where.state_dir, run_dir=where.run_dir, policy_dir=policy_dir, node_name=node_name)


@node.command()
@json_option
@click.pass_obj
def status(settings: Settings, as_json: bool) -> int:
    """Say how the daemon is. Exit status 1 if it is away or not ready."""
    with client_of(settings) as client:
        found = client.node_status()
    if as_json:
        print_json(found)
    else:
        ports = [f"{count} {state}" for state, count in sorted(found.ports.items()) if count]
        print_facts(
            [
                ("ready", "yes" if found.ready else "no"),
                ("version", found.version),
                ("pid", found.pid),
                ("uptime", f"{found.uptime_s:.0f} s"),
                ("node_name", found.node_name),
                ("run_dir", found.run_dir),
                ("state_dir", found.state_dir),
                ("attach", found.attach),
                ("networks", found.networks),
                ("ports", ", ".join(ports) or "none"),
                ("problems", found.problems),
                ("alarms", found.alarms),
            ]
        )
    return 0 if found.ready else 1


@node.command()
@json_option
@click.pass_obj
def stop(settings: Settings, as_json: bool) -> int:
    """Stop the daemon and wait for its end. Ports keep their traffic and policy."""
    with client_of(settings) as client:
        pid = client.node_status().pid
        handle = _pidfd(pid) if client.server_pid() == pid else -1
        try:
            client.node_stop()
            # The closed connection says that it has let go of its socket; its process's end, of all else.
            gone = client.wait_closed(_STOP_WITHIN) and _ended(handle)
        finally:
            if handle >= 0:
                os.close(handle)
    if not gone:
        raise click.ClickException(f"the daemon (pid {pid}) has not ended within {_STOP_WITHIN:g} s")
    if as_json:
        print_json({"pid": pid, "stopped": True})
    else:
        click.echo(f"stopped (pid {pid})")
    return 0


def _pidfd(pid: int) -> int:
    """Return a handle on the process, or -1 if it can't be had (another PID namespace)."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _ended(handle: int) -> bool:
    """Wait for the process's end."""
    if handle < 0:
        return True
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    return bool(poller.poll(_STOP_WITHIN * 1000))
