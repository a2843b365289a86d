"""``portwright jail``: a command in its jail with its ports, all of which end together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Final

from portwright.api.client import Client
from portwright.jail.launch import check_descriptors, start
from portwright.jail.ports import Handed, created
from portwright.jail.process import Jailed
from portwright.jail.spec import Jail
from portwright.kernel import netns, private
from portwright.kernel.signals import handled, terminable, terminal_kept
from portwright.model.errors import InvalidInput

#: Passed on to the command.
FORWARDED: Final = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


def run(
    jail: Jail,
    *,
    socket: Path,
    name: str,
    networks: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    netns_path: str = "",
    fds: Mapping[str, int] | None = None,
) -> int:
    """Run the jail's command until it ends; its exit status, or 128 and the signal's number that ended it.

    It is in the namespace at ``netns_path``, or in a new one with nothing but ``lo`` and a port on each of
    ``networks`` (of the daemon at ``socket``). ``fds`` are handed over, by the names that its words have for
    them (see ports.Handed). The signals FORWARDED are passed on. For a process with one thread,
    whose end is the jail's. Raises what :func:`start` and the daemon raise.
    """
    jail.check()
    given = dict(fds or {})
    check_descriptors(tuple(given.values()), (0, 1, 2))
    if networks and netns_path:
        why = "a port is for the jail's own namespace; make one in yours by: portwright port create --netns"
        raise InvalidInput("netns", netns_path, why)
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminable(*FORWARDED))  # while there is no command to be told
        namespace = netns.open_netns(netns_path) if netns_path else private.new_netns()
        stack.callback(os.close, namespace)
        ports = []
        if networks:
            client = stack.enter_context(Client(socket))
            ports = stack.enter_context(created(client, namespace, networks, name=name, labels=labels or {}))
        if sys.stdin.isatty():
            stack.enter_context(terminal_kept(sys.stdin.fileno()))
        handed = stack.enter_context(
            contextlib.closing(Handed(namespace, ports, given, uid=jail.uid, gid=jail.gid))
        )
        ready = replace(jail, command=handed.words(jail.command))
        with _held_back():
            jailed = stack.enter_context(start(ready, namespace, fds=handed.fds))
            stack.enter_context(_forwarded(jailed))
        handed.close()
        status = jailed.wait()
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """A signal that comes while the command is started is for the command, as soon as there is one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forwarded(jailed: Jailed) -> contextlib.AbstractContextManager[None]:
    def told(number: int, _frame: FrameType | None) -> None:
        jailed.send_signal(number)

    return handled(FORWARDED, told)
