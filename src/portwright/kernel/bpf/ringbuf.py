"""Events from programs: a ring buffer read from an event loop.

Give :attr:`RingBuffer.epoll_fd` to ``loop.add_reader`` and call :meth:`RingBuffer.consume`
when it is readable.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from typing import Final, Self

from portwright.kernel.bpf import _libbpf
from portwright.kernel.bpf._fd import failed
from portwright.kernel.bpf.maps import Map

_STOP: Final = -4096
"""What our callback returns to stop libbpf's loop: outside of errno's range, so nobody else's."""


class RingBuffer:
    """The reading end of a RINGBUF map. There must be only one, and one thread may read at a time.

    It maps the buffer and keeps its own reference: ``map`` may be closed meanwhile.
    """

    def __init__(self, map: Map) -> None:
        """Map the buffer of ``map``; KernelFailed(EINVAL) when it isn't a ring buffer."""
        self._name = map.name
        self._consumer: Callable[[bytes], None] | None = None
        self._error: BaseException | None = None
        self._left = 0
        self._count = 0
        self._sample = _libbpf.RingSampleFn(self._on_sample)
        with _libbpf.captured_messages() as said:
            self._ring: int | None = _libbpf.ring_buffer_new(map.fd, self._sample, None, None)
        if not self._ring:
            failed(-ctypes.get_errno(), f"read the ring buffer {map.name}", "".join(said).strip())

    @property
    def epoll_fd(self) -> int:
        """Readable while there are records. Belongs to the ring buffer: don't close it."""
        fd: int = _libbpf.ring_buffer_epoll_fd(self._open())
        return fd

    def consume(self, callback: Callable[[bytes], None], limit: int = 4096) -> int:
        """Give the records that are there to ``callback``, oldest first; the number that it took.

        Returns after ``limit`` records at the latest, so that a flood can't hold the event
        loop; :attr:`epoll_fd` stays readable then. When ``callback`` raises, its exception comes
        out of here, its record counts as read, and the records after it are still there.
        """
        ring = self._open()
        if self._consumer is not None:
            raise RuntimeError(f"ring buffer {self._name}: consume() inside of consume()")
        self._consumer, self._error, self._left, self._count = callback, None, limit, 0
        try:
            ret = _libbpf.ring_buffer_consume(ring) if limit > 0 else 0
        finally:
            self._consumer = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        if ret < 0 and ret != _STOP:
            failed(ret, f"read the ring buffer {self._name}")
        return self._count

    def _on_sample(self, _ctx: int | None, data: int, size: int) -> int:
        """Called from C for each record: nothing may escape, or ctypes would print and lose it."""
        try:
            assert self._consumer is not None  # noqa: S101 -- set for as long as C can call
            self._consumer(ctypes.string_at(data, size))
        except BaseException as error:  # noqa: BLE001 -- consume() raises it again
            self._error = error
            return _STOP
        self._count += 1
        self._left -= 1
        return 0 if self._left > 0 else _STOP

    def close(self) -> None:
        """Unmap the buffer. Closing twice is fine; RuntimeError from inside of a callback."""
        if self._consumer is not None:
            raise RuntimeError(f"ring buffer {self._name}: close() inside of consume()")
        ring, self._ring = getattr(self, "_ring", None), None
        if ring:
            _libbpf.ring_buffer_free(ring)

    def _open(self) -> int:
        if not self._ring:
            raise ValueError(f"ring buffer {self._name} is closed")
        return self._ring

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        # __init__ may have failed before there was anything to free.
        if getattr(self, "_ring", None):
            self._consumer = None
            self.close()
            warnings.warn(f"unclosed ring buffer {self._name}", ResourceWarning, stacklevel=2, source=self)
