"""A frozen guest as a file: what has to be the same to restore it, on a first line, and then QEMU's state.

The line is JSON, filled with spaces to the size of a page. The state is that of QEMU's ``migrate``, which its
next version reads too, and a machine that is built otherwise does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from portwright.model.errors import Conflict, InvalidInput, KernelFailed, NotSupported
from portwright.model.port import Port
from portwright.vmm.spec import GuestSpec

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

_FORMAT: Final = "portwright-guest-1"
_HEAD: Final = 4096
_NO_SUCH: Final = errno.EOPNOTSUPP
_AS_FAST_AS_IT_GOES: Final = 1 << 40  # bytes a second; QEMU's own limit spares a network
#: Seconds: for a state to be written, and between two looks whether it is.
_WRITTEN_WITHIN, _LOOK_EVERY = 120.0, 0.05


class NotFrozen(Exception):
    """QEMU did not write a state, or did not take one."""


class FrozenNic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC as the guest knows it: ``addresses`` are those that it has inside."""

    network: str
    mac: str
    mtu: int
    queues: int
    addresses: tuple[str, ...]


class FrozenGuest(msgspec.Struct, frozen=True, kw_only=True):
    """What a restored guest has to be started with."""

    name: str
    kernel: str
    initramfs: str
    memory: int
    cpus: int
    accel: str
    nics: tuple[FrozenNic, ...]
    format: str = _FORMAT

    def spec(self, name: str, path: str) -> GuestSpec:
        """A guest that goes on from the file at ``path``, without its NICs."""
        return GuestSpec(
            name=name,
            kernel=self.kernel,
            initramfs=self.initramfs,
            memory=self.memory,
            cpus=self.cpus,
            accel="kvm" if self.accel == "kvm" else "tcg",
            incoming=path,
        )


def describe(spec: GuestSpec, ports: list[Port]) -> FrozenGuest:
    """That of a guest on these ports, in their order. Raises NotSupported for what copies could not share."""
    if spec.root:
        why = "its copies would all write to it: boot from an initramfs alone"
        raise NotSupported("a frozen guest", "a root image", why)
    for port in ports:
        if port.model != "tcfilter":
            raise NotSupported(
                port.model, "freezing its guest", "clones are told apart at taps of the model tcfilter"
            )
    return FrozenGuest(
        name=spec.name,
        kernel=spec.kernel,
        initramfs=spec.initramfs,
        memory=spec.memory,
        cpus=spec.cpus,
        accel=spec.accel,
        nics=tuple(
            FrozenNic(
                network=port.network,
                mac=port.mac,
                mtu=port.mtu,
                queues=port.queues,
                addresses=port.inner_addresses or tuple(a.address for a in port.addresses),
            )
            for port in ports
        ),
    )


@contextlib.contextmanager
def written(path: Path, guest: FrozenGuest) -> Iterator[int]:
    """A descriptor for the state, behind the first line. The file is there once the block is left, and whole.

    Raises Conflict where there is one, KernelFailed where it can't be written. After a failure there is none.
    """
    if path.exists():  # the guest need not stand still to find out; link() is the one that decides
        raise Conflict("file", str(path), "is there already: name another one")
    head = msgspec.json.encode(guest)
    if len(head) >= _HEAD:
        raise NotSupported("a frozen guest", f"{len(guest.nics)} NICs with these addresses", "use fewer")
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC  # without a name until it is whole, should we be killed
    try:
        fd = os.open(path.parent, flags, 0o600)
    except OSError as error:
        why = "its file system has no files without a name: use another" if error.errno == _NO_SUCH else ""
        raise KernelFailed(error.errno or 0, f"write {path}", why) from error
    try:
        os.write(fd, head.ljust(_HEAD - 1) + b"\n")
        yield fd
        os.fsync(fd)
        # With a folder's descriptor Python calls linkat(2), which follows, and without one link(2).
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.link(f"/proc/self/fd/{fd}", path.name, dst_dir_fd=folder)
        finally:
            os.close(folder)
    except FileExistsError as error:
        raise Conflict("file", str(path), "is there already: name another one") from error
    except OSError as error:
        raise KernelFailed(error.errno or 0, f"write {path}") from error
    finally:
        os.close(fd)


def read(path: Path) -> FrozenGuest:
    """What the file's first line says. Raises InvalidInput for another file, KernelFailed for none."""
    with _opened(path) as fd:
        return _head(path, fd)


@contextlib.contextmanager
def state(path: Path) -> Iterator[int]:
    """A descriptor that stands at the state. Raises as :func:`read`."""
    with _opened(path) as fd:
        _head(path, fd)
        os.lseek(fd, _HEAD, os.SEEK_SET)
        yield fd


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelFailed(error.errno or 0, f"read {path}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _head(path: Path, fd: int) -> FrozenGuest:
    try:
        guest = msgspec.json.decode(os.pread(fd, _HEAD, 0), type=FrozenGuest)
    except (msgspec.MsgspecError, OSError) as error:
        raise InvalidInput("incoming", str(path), "is no guest that `vm freeze` wrote") from error
    if guest.format != _FORMAT:
        raise InvalidInput("incoming", str(path), f"is of the format {guest.format!r}, not {_FORMAT!r}")
    return guest


# -- by QMP ----------------------------------------------------------------------------------------


async def freeze(qmp: QMPClient, fd: int) -> None:
    """The guest's state to ``fd``; it runs on afterwards, whatever came of it. Raises NotFrozen."""
    from qemu.qmp import QMPError  # noqa: PLC0415 - of the extra: see qemu.py

    try:
        await qmp.execute("stop")
        try:
            qmp.send_fd_scm(fd)
            await qmp.execute("getfd", {"fdname": "frozen"})
            await qmp.execute("migrate-set-parameters", {"max-bandwidth": _AS_FAST_AS_IT_GOES})
            await qmp.execute("migrate", {"uri": "fd:frozen"})
            async with asyncio.timeout(_WRITTEN_WITHIN):
                while (said := await _status(qmp, "query-migrate")) != "completed":
                    if said in ("failed", "cancelled"):
                        raise NotFrozen("QEMU could not write its state: is the disk full?")
                    await asyncio.sleep(_LOOK_EVERY)
        except BaseException:
            with contextlib.suppress(QMPError):
                await qmp.execute("migrate_cancel")
            raise
        finally:
            await qmp.execute("cont")
    except TimeoutError:
        raise NotFrozen(f"its state was not written in {_WRITTEN_WITHIN:g} s") from None
    except QMPError as error:
        raise NotFrozen(str(error)) from error


async def thawed(qmp: QMPClient, gone: asyncio.Event) -> None:
    """Returns once QEMU has read the state. Raises NotFrozen if it ended over it."""
    while await _status(qmp, "query-status") == "inmigrate":
        if gone.is_set():
            raise NotFrozen("the state does not fit")
        await asyncio.sleep(_LOOK_EVERY)


async def _status(qmp: QMPClient, command: str) -> str:
    said: Any = await qmp.execute(command)
    return str(said.get("status", ""))
