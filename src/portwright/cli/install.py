"""``portwright install``: put the CNI plugin and its configuration where a runtime looks."""

from __future__ import annotations

from pathlib import Path

import click

from portwright.cli.main import Settings
from portwright.cli.options import dir_options, json_option, merged
from portwright.cli.output import print_json, printable


@click.command()
@click.option(
    "--cni-bin-dir",
    default="/opt/cni/bin",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the runtime looks for plugins.",
)
@click.option(
    "--cni-conf-dir",
    default="/etc/cni/net.d",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where the runtime looks for configuration.",
)
@click.option("--network", help="Write a configuration for this network too.")
@dir_options
@json_option
@click.pass_obj
def install(
    settings: Settings,
    /,
    *,
    cni_bin_dir: Path,
    cni_conf_dir: Path,
    network: str | None,
    run_dir: Path | None,
    state_dir: Path | None,
    as_json: bool,
) -> None:
    """Install the CNI plugin for the daemon of --run-dir and --state-dir."""
    from portwright.cni.install import install as install_files

    where = merged(settings, run_dir, state_dir)
    written = install_files(
        bin_dir=cni_bin_dir,
        conf_dir=cni_conf_dir,
        network=network,
        socket=where.socket.absolute(),
        spool=where.state_dir.absolute() / "spool",
    )
    if as_json:
        print_json({"files": [str(path) for path in written]})
    else:
        for path in written:
            click.echo(printable(str(path)))
