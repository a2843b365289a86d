"""What our own process does at a signal, and what its terminal is like, for as long as some work lasts."""

from __future__ import annotations

import contextlib
import signal
import termios
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def handled(numbers: Iterable[int], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """``handler`` hears of these signals; who did before does again afterwards. For the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def terminable(*numbers: int) -> contextlib.AbstractContextManager[None]:
    """These signals end the work in order, as ^C does, with the status that a shell gives for them."""

    def ended(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    return handled(numbers, ended)


@contextlib.contextmanager
def terminal_kept(fd: int) -> Iterator[None]:
    """Give the terminal its modes back, whatever was done to it meanwhile."""
    modes = termios.tcgetattr(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, modes)
