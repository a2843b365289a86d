"""The CNI verbs on the node's services: translate, ask, translate back.

ADD answers when the port passes packets; DEL, CHECK and GC need the record alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from portwright.cni import attachment, chain, config, delegate, wire
from portwright.cni.errors import CniCode, CniError
from portwright.cni.request import CniRequest, from_record, parse
from portwright.cni.result import Result
from portwright.model.errors import Conflict, InvalidInput, NotFound, PortwrightError
from portwright.model.network import Network
from portwright.model.port import Port, PortState
from portwright.node.chain import Chain
from portwright.node.health import Health
from portwright.node.networks import Networks
from portwright.node.ports import Ports
from portwright.store import Store

log = logging.getLogger(__name__)

_SPOOLED = re.compile(r"\d+-\d+")


class CniHandler:
    """Answers the shim. One request at a time touches the kernel; delegates run beside."""

    def __init__(
        self,
        *,
        store: Store,
        ports: Ports,
        networks: Networks,
        health: Health,
        chained: Chain,
        enter: Callable[[int], contextlib.AbstractContextManager[object]],
        reached: Callable[[str], None],
    ) -> None:
        """``enter``: into the namespace of a descriptor. ``reached``: told of places to die (node.faults)."""
        self._store = store
        self._ports = ports
        self._networks = networks
        self._health = health
        self._chain = chained
        self._enter = enter
        self._reached = reached

    async def answer(self, payload: bytes, fds: list[int]) -> bytes:
        """The reply payload for a request payload; never raises for what the caller sent."""
        version = ""
        try:
            env, stdin = wire.decode_request(payload)
            version = wire.version_hint(stdin)
            request = parse(env, stdin)
            out = await self._dispatch(request, fds)
        except PortwrightError as error:
            return wire.error_reply(error, version)
        except Exception as error:
            log.exception("CNI request failed")
            return wire.error_reply(error, version)
        return wire.encode_reply(out)

    async def _dispatch(self, request: CniRequest, fds: list[int]) -> bytes:
        match request.command:
            case "VERSION":
                return wire.version_json()
            case "ADD":
                return await self._add(request, fds)
            case "DEL":
                await self._delete(request, fds)
            case "CHECK":
                await self._check(request, fds)
            case "GC":
                await self._gc(request, fds)
            case "STATUS":
                await self._status(request, fds)
            case other:
                raise CniError(CniCode.BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {other}")
        return b""

    # -- ADD -------------------------------------------------------------------------------------

    async def _add(self, request: CniRequest, fds: list[int]) -> bytes:
        host_fd, sandbox_fd = _namespaces(request, fds)
        conf = request.config
        prev = conf.prev_result
        if chain.is_chained(request, self._chain.devices(sandbox_fd) if prev is not None else ()):
            return self._add_chained(request, host_fd, sandbox_fd)
        fresh = not self._networks.known(conf.network)
        network = self._networks.for_cni(conf)
        try:
            return await self._add_to(request, network, host_fd, sandbox_fd)
        except BaseException:
            # While a delegate ran, another ADD may have counted on the network: then it stays.
            if fresh and not (conf.ipam is not None and conf.ipam.foreign):
                self._networks.take_back(conf.network)
            raise

    def _add_chained(self, request: CniRequest, host_fd: int, sandbox_fd: int) -> bytes:
        """Taps on the devices of the plugin before us; see :mod:`portwright.cni.chain`."""
        conf = request.config
        wish = chain.wish_of(request)
        if self._networks.known(conf.name) and self._store.get_network(conf.name).isolation != "open":
            why = "is not open, and nothing of ours holds another plugin's device; rename the configuration"
            raise Conflict("network", conf.name, why)
        made = self._chain.add(wish, sandbox_fd, host_fd)
        try:
            held = self._chain.addresses(sandbox_fd)
            return chain.result_of(request, made, held).to_json(conf.cni_version)
        except BaseException:
            for one in made:
                self._chain.delete(one)
            raise

    async def _add_to(self, request: CniRequest, network: Network, host_fd: int, sandbox_fd: int) -> bytes:
        conf = request.config
        if conf.ipam is not None and not conf.ipam.foreign and not (conf.pools or network.pools):
            raise InvalidInput("ipam.ranges", None, "no IP ranges specified")
        foreign: Result | None = None
        if conf.ipam is not None and conf.ipam.foreign:
            foreign = await self._delegate(request, host_fd)
        try:
            spec = attachment.spec_of(request, network, foreign)
            port = self._ports.create(spec, sandbox_fd, host_fd)
            try:
                return attachment.result_of(request, port).to_json(conf.cni_version)
            except BaseException:
                self._ports.delete(port)
                raise
        except BaseException:
            if foreign is not None:
                with contextlib.suppress(PortwrightError):
                    await self._delegate(request, host_fd, command="DEL")
            raise

    async def _delegate(self, request: CniRequest, host_fd: int, command: str | None = None) -> Result | None:
        return await delegate.run(
            request,
            command=command,
            namespace=lambda: self._enter(host_fd),
            log=lambda text: log.info("ipam %s: %s", request.config.ipam, text),
        )

    # -- DEL and GC ------------------------------------------------------------------------------

    async def _delete(self, request: CniRequest, fds: list[int]) -> None:
        for one in self._chain.of(request.owner().key()):
            self._chain.delete(one)
        port = self._store.port_by_owner(request.owner().key())
        if port is None:
            # Never added, or deleted before; a delegate may still hold an address of it.
            ipam = request.config.ipam
            if ipam is not None and ipam.foreign and fds:
                with contextlib.suppress(PortwrightError):
                    await self._delegate(request, fds[0])
            return
        await self.remove(port, fds[0] if fds else None)

    async def remove(self, port: Port, host_fd: int | None) -> None:
        """Deletes a port and what its foreign IPAM holds.

        The kernel's part goes first and whatever the delegate says; the record stays until the delegate
        has let go too, so that a later DEL or GC tries again.
        """
        if port.ipam == config.BUILTIN_IPAM or not port.cni:
            self._ports.delete(port)
            return
        self._ports.clear(port)
        with _namespace(host_fd) as fd:
            await self._delegate(from_record(port.cni), fd)
        self._ports.delete(self._store.get_port(port.port_id))

    async def _gc(self, request: CniRequest, fds: list[int]) -> None:
        conf = request.config
        if conf.valid_attachments is None:
            raise CniError(
                CniCode.INVALID_CONFIG,
                "cni.dev/valid-attachments: an explicit list is required",
                "absent or null would delete the network of every container",
            )
        valid = {(a.container_id, a.ifname) for a in conf.valid_attachments}
        problems: list[str] = []
        for one in self._store.chained():
            owner = one.port.owner
            if owner.network != conf.name or (owner.container_id, owner.ifname) in valid:
                continue
            try:
                self._chain.delete(one)
            except PortwrightError as error:
                problems.append(f"{owner.key()}: {error}")
        for port in list(self._store.ports()):
            owner = port.owner
            if (
                owner.kind != "cni"
                or owner.network != conf.name
                or (owner.container_id, owner.ifname) in valid
            ):
                continue
            try:
                await self.remove(port, fds[0] if fds else None)
            except PortwrightError as error:
                problems.append(f"{owner.key()}: {error}")
        if conf.ipam is not None and conf.ipam.foreign and fds:
            try:
                await self._delegate(request, fds[0])
            except PortwrightError as error:
                problems.append(str(error))
        if problems:
            raise CniError(CniCode.IO, f"GC: {len(problems)} failed", "; ".join(problems)[:4000])

    # -- CHECK and STATUS ------------------------------------------------------------------------

    async def _check(self, request: CniRequest, fds: list[int]) -> None:
        if request.config.prev_result is None:
            raise CniError(CniCode.INVALID_CONFIG, "required prevResult missing")
        host_fd, sandbox_fd = _namespaces(request, fds)
        if chained := self._chain.of(request.owner().key()):
            lacks = [each for one in chained for each in self._chain.lacks(one, sandbox_fd)]
            if lacks:
                raise CniError(CniCode.IO, lacks[0], "; ".join(lacks)[:4000])
            return
        port = self._store.port_by_owner(request.owner().key())
        if port is None:
            raise CniError(CniCode.CONTAINER_UNKNOWN, f"no attachment {request.owner().key()} on record")
        if request.config.ipam is not None and request.config.ipam.foreign:
            await self._delegate(request, host_fd)
        problems = self._health.check_port(port, sandbox_fd)
        if problems:
            raise CniError(CniCode.IO, f"port {port.port_id}: {problems[0]}", "; ".join(problems)[:4000])

    async def _status(self, request: CniRequest, fds: list[int]) -> None:
        conf = request.config
        impaired = self._health.impaired()
        if impaired:
            raise CniError(CniCode.LIMITED, impaired[0], "; ".join(impaired)[:4000])
        with contextlib.suppress(NotFound):
            exhausted = self._networks.exhausted(conf.network)
            if exhausted:
                raise CniError(CniCode.NOT_AVAILABLE, exhausted, "add a range, or release ports")
        if conf.ipam is not None and conf.ipam.foreign and fds:
            await self._delegate(request, fds[0])

    # -- spool -----------------------------------------------------------------------------------

    async def replay(self, spool: Path) -> int:
        """Runs the DELs that the shim left while no daemon was there; returns how many.

        Before any ADD, so that none meets a stale port. A DEL that is older than the attachment it names
        was meant for an earlier one, and is dropped. One that can never succeed becomes ``.bad``; one that
        failed stays for the next time.
        """
        done = 0
        for path in spooled(spool):
            stamp = int(path.name.partition("-")[0]) / 1e9
            try:
                request = parse(*wire.decode_request(path.read_bytes()))
                if request.command != "DEL":
                    raise InvalidInput("CNI_COMMAND", request.command, "only DEL is spooled")
            except (PortwrightError, OSError) as error:
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(f"{path.name}.bad"))
                log.error("spooled request %s is malformed: %s", path.name, error)
                continue
            port = self._store.port_by_owner(request.owner().key())
            try:
                if port is not None and port.created <= stamp:
                    await self.remove(port, None)
                for one in self._chain.of(request.owner().key()):
                    if one.port.created <= stamp:
                        self._chain.delete(one)
            except PortwrightError as error:
                log.error("spooled DEL %s failed and stays: %s", path.name, error)
                continue
            self._reached("replay:done")
            path.unlink(missing_ok=True)
            done += 1
        return done

    async def finish(self) -> int:
        """Ends the ports whose DEL was cut while a foreign IPAM plugin was asked; returns how many.

        What can't be ended now stays, in state deleting, for a later DEL or GC.
        """
        done = 0
        for port in list(self._store.ports(state=PortState.DELETING)):
            try:
                await self.remove(port, None)
                done += 1
            except PortwrightError as error:
                log.error("DEL of %s was cut short and can't be finished: %s", port.owner.key(), error)
        return done


def spooled(spool: Path) -> list[Path]:
    """The shim's files, oldest first: ``<nanoseconds>-<pid>``."""
    try:
        names = [n for n in os.listdir(spool) if _SPOOLED.fullmatch(n)]  # noqa: PTH208 - names, no stat
    except FileNotFoundError:
        return []
    return [spool / name for name in sorted(names)]


@contextlib.contextmanager
def _namespace(fd: int | None) -> Iterator[int]:
    """The caller's namespace, or our own where the caller's is not known."""
    if fd is not None:
        yield fd
        return
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield own
    finally:
        os.close(own)


def _namespaces(request: CniRequest, fds: list[int]) -> tuple[int, int]:
    """(the caller's, the sandbox's). The shim could open the second, or the path names nothing."""
    if len(fds) < 2:
        raise InvalidInput("netns", request.netns, "the network namespace can't be opened")
    same = os.path.sameopenfile(fds[0], fds[1])
    if same and not request.netns_override:
        raise CniError(
            CniCode.INVALID_NETNS,
            f"plugin's netns and netns from CNI_NETNS should not be the same: {request.netns}",
            "a port's device and its representor need two namespaces",
        )
    return fds[0], fds[1]
