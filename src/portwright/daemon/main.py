"""``portwright node run``: one process, one event loop, one writer.

Order of a start: record, recovery (with the data path already in force from the last run), spooled
DELs, and only then the socket: nobody is answered before what was promised is true again.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from portwright.api.registry import Registry
from portwright.api.request import Request
from portwright.api.server import Server, passed_listener
from portwright.cni.handler import CniHandler
from portwright.daemon import bounded_log
from portwright.daemon.methods import VERSION, Methods
from portwright.model.errors import KernelFailed, PortwrightError
from portwright.node.chain import Chain
from portwright.node.changes import Changes
from portwright.node.core import Core
from portwright.node.domains import Domains
from portwright.node.drops import DropFeed
from portwright.node.faults import Faults
from portwright.node.folder import FolderState
from portwright.node.follow import Follower
from portwright.node.health import Health
from portwright.node.networks import Networks
from portwright.node.paths import Paths
from portwright.node.ports import Ports
from portwright.node.recover import recover
from portwright.node.watch import Watch

log = logging.getLogger("portwright")


def main(
    state_dir: Path | str, run_dir: Path | str, policy_dir: Path | None = None, node_name: str = ""
) -> int:
    """Runs until SIGTERM, SIGINT or ``node stop``. Returns the exit status.

    ``policy_dir``: a folder whose manifests are kept in force. ``node_name``: what HostEndpoints call this
    host, '' for its own name.
    """
    faulthandler.enable()  # if a library ends the process, the log says where
    bounded_log.install()
    paths = Paths(Path(run_dir), Path(state_dir))
    try:
        core = Core.open(paths, Faults.from_environment(), node_name)
    except PortwrightError as error:
        sys.stderr.write(f"portwright: {error}\n")
        return 1
    try:
        asyncio.run(_serve(core, policy_dir and policy_dir.absolute()))
    except PortwrightError as error:
        sys.stderr.write(f"portwright: {error}\n")
        return 1
    finally:
        core.close()
    return 0


async def _serve(core: Core, policy_dir: Path | None) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    ports, networks, health = Ports(core), Networks(core), Health(core)
    core.switch_for()
    changes = Changes(core)
    chained = Chain(core)
    for sentence in (*chained.recover(), *recover(core, ports, changes)):
        log.info("recovery: %s", sentence)
    core.policies.restore()
    follower = _follower(core, policy_dir, loop) if policy_dir is not None else None
    watch, feed = Watch(core, ports, changes, loop), DropFeed(core, loop)
    domains = Domains(core, loop)

    def changed() -> None:
        watch.sync()
        feed.sync()
        domains.sync()

    watch.sync()
    watch.catch_up()
    cni = CniHandler(
        store=core.store,
        ports=ports,
        networks=networks,
        health=health,
        chained=chained,
        enter=core.entered,
        reached=core.faults.at,
    )
    finished = await cni.finish()
    if finished:
        log.info("finished %d DELs that were cut short", finished)
    replayed = await cni.replay(core.paths.spool)
    if replayed:
        log.info("replayed %d spooled DELs", replayed)
    methods = Methods(
        core=core,
        ports=ports,
        changes=changes,
        networks=networks,
        health=health,
        chained=chained,
        feed=feed,
        follower=follower,
        stop=stopping.set,
        changed=changed,
    )

    async def serve_cni(request: Request) -> bytes:
        if await cni.replay(core.paths.spool):
            log.info("replayed DELs that were spooled while the socket was away")
        try:
            return await cni.answer(request.raw, request.fds)
        finally:
            changed()

    registry = Registry(methods, cni=serve_cni, version=VERSION)
    server = Server(core.paths.socket, registry.dispatch, listener=passed_listener(os.environ))
    async with server:
        changed()
        methods.ready = True
        _notify("READY=1\nSTATUS=serving\n")
        log.info("ready: %s", core.paths.socket)
        changes.tell_all()
        await stopping.wait()
        _notify("STOPPING=1\n")
    watch.close()
    feed.close()
    domains.close()
    if follower is not None:
        follower.close()


def _follower(core: Core, folder: Path, loop: asyncio.AbstractEventLoop) -> Follower | None:
    """Follows the folder from now on; or without: the recorded manifests stay in force, with an alarm."""
    try:
        follower = Follower(folder, core.policies, loop)
    except KernelFailed as error:
        core.policies.folder = FolderState(path=str(folder), error=f"{error}; restart the daemon then")
        log.error("%s: is not followed: %s", folder, error)
        return None
    follower.refresh()
    return follower


def _notify(text: str) -> None:
    """sd_notify(3): one datagram to the socket that systemd named, or nothing."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(address)
            sock.sendall(text.encode())
        except OSError as error:
            log.warning("sd_notify to %s: %s", where, error)
