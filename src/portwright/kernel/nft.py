"""nftables through libnftables: one script in, one atomic transaction, text or JSON out.

The grammar, the evaluation and the batching are nft's own; this module is the transport
only and knows nothing of what is sent (``plan/nat.py`` renders that). Nothing is executed:
nft(8) as a process costs its start and a fork of a daemon with many mappings, libnftables
costs a function call.

Source: include/nftables/libnftables.h and libnftables(3) of nftables 1.0.6, libnftables.so.1.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import re
import threading
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from portwright.kernel.netns import entered, self_fd
from portwright.model.errors import InvalidInput, KernelFailed

_CTX_DEFAULT = 0
_OUTPUT_JSON = 1 << 4
#: At most this much of nft's message goes into an error.
_MESSAGE_LIMIT = 2000

#: strerror() text to errno, for the numbers that nf_tables answers with. libnftables reports
#: text only; glibc's texts are the C locale's unless the process calls setlocale, which Python
#: does not for LC_MESSAGES.
_ERRNO_BY_TEXT = {
    os.strerror(code): code
    for code in (
        errno.EPERM, errno.ENOENT, errno.EINTR, errno.ENOMEM, errno.EBUSY, errno.EEXIST, errno.EINVAL,
        errno.ENOSPC, errno.ENFILE, errno.EMFILE, errno.EMLINK, errno.ERANGE, errno.EOPNOTSUPP,
        errno.EAFNOSUPPORT, errno.ENOTEMPTY, errno.ELOOP, errno.E2BIG, errno.EOVERFLOW, errno.ENOBUFS,
        errno.EMSGSIZE, errno.ENOSYS, errno.EPROTONOSUPPORT,
    )
}  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    """Load libnftables once; KernelFailed(ENOENT) where it is not installed."""
    try:
        lib = ctypes.CDLL("libnftables.so.1")
    except OSError as exc:
        raise KernelFailed(
            errno.ENOENT, "libnftables.so.1", f"install the package libnftables1 ({exc})"
        ) from exc
    lib.nft_ctx_new.argtypes = (ctypes.c_uint32,)
    lib.nft_ctx_new.restype = ctypes.c_void_p
    lib.nft_ctx_free.argtypes = (ctypes.c_void_p,)
    lib.nft_ctx_free.restype = None
    lib.nft_ctx_output_set_flags.argtypes = (ctypes.c_void_p, ctypes.c_uint)
    lib.nft_ctx_output_set_flags.restype = None  # 1.1 returns the old flags; nobody asks
    lib.nft_ctx_set_dry_run.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    lib.nft_ctx_set_dry_run.restype = None
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(lib, name).argtypes = (ctypes.c_void_p,)
        getattr(lib, name).restype = ctypes.c_int
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(lib, name).argtypes = (ctypes.c_void_p,)
        getattr(lib, name).restype = ctypes.c_char_p
    lib.nft_run_cmd_from_buffer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    lib.nft_run_cmd_from_buffer.restype = ctypes.c_int
    return lib


class Nft:
    """A libnftables context: bound for life to the namespace it was made in.

    Its netlink socket is opened by ``nft_ctx_new``, and a socket stays with the namespace of
    its creation, so ``run`` may be called from any thread in any namespace. The one exception
    is nft's ``iif``/``oif`` with a *name*, which libnftables resolves in the caller's
    namespace: use ``iifname``/``oifname``.

    A transaction that adds or deletes elements of hash sets takes 0.1 to 0.3 ms, with ten or
    10,000 of them present (nftables 1.0.6, our table alone). libnftables reads the *heads* of all
    tables for it, anybody's, and the elements of interval sets: 500 chains of another owner add
    0.3 ms, an interval set of 20,000 addresses 30 ms.

    Making one takes 0.05 ms, the first of a process 1 ms. Keep it for as long as the namespace
    matters, and close it. Safe to use from several threads: calls queue up.

    After a failure, or a check, libnftables 1.0.6 takes what was tried for something that is there: so
    another context goes on. And where it would name the place of a conflict it may end the process (an
    assertion), in a context that has done other things before: use a fresh one where conflicts are likely.
    """

    __slots__ = ("_ctx", "_json", "_lib", "_lock", "_netns")

    def __init__(self, netns_fd: int | None = None) -> None:
        """Open a context in the namespace ``netns_fd``; None is the calling thread's.

        Raises KernelFailed if the library is missing, the namespace can't be entered or the
        context can't be made; nothing is left open then.
        """
        self._ctx: int | None = None
        self._lib = _library()
        self._lock = threading.Lock()
        self._json = False
        self._netns = self_fd() if netns_fd is None else os.dup(netns_fd)
        try:
            self._open()
        except BaseException:
            os.close(self._netns)
            raise

    def _open(self) -> None:
        with entered(self._netns):
            ctx = self._lib.nft_ctx_new(_CTX_DEFAULT)
        if not ctx:
            raise KernelFailed(errno.ENOMEM, "nft_ctx_new", "no context")
        # Unbuffered, libnftables would print to this process's stdout and stderr.
        if self._lib.nft_ctx_buffer_output(ctx) or self._lib.nft_ctx_buffer_error(ctx):
            self._lib.nft_ctx_free(ctx)
            raise KernelFailed(errno.ENOMEM, "nft_ctx_buffer_output", "no buffer")
        self._ctx, self._json = ctx, False

    def run(self, script: str) -> str:
        """Run ``script`` (nft's text grammar, any number of commands) and return its output.

        All changes of one call are one kernel transaction: all of them happen, or none.
        An empty script does nothing.

        Raises InvalidInput (field ``nft``) if nft can't parse or evaluate the script, and
        KernelFailed with the kernel's errno otherwise: ENOENT (no such table, set or element),
        EEXIST (``create`` of what is there), EBUSY, EPERM, EOPNOTSUPP. ``detail`` is nft's
        message, with the offending command.
        """
        return self._run(script, as_json=False)

    def check(self, script: str) -> None:
        """Have nft evaluate ``script`` and the kernel look at it, and change nothing (``nft --check``).

        Raises as :meth:`run` would, but for what the kernel finds out only as it commits.
        """
        self._run(script, as_json=False, dry=True)

    def run_json(self, script: str | dict[str, object]) -> list[dict[str, object]]:
        """Run text or libnftables-json(5) and return the objects of the ``nftables`` array.

        The head object (``metainfo``) is left out; a command without output gives []. Atomic
        and failing like :meth:`run`; and KernelFailed(EBADMSG) for an answer that is no JSON.
        """
        text = script if isinstance(script, str) else json.dumps(script)
        out = self._run(text, as_json=True)
        if not out.strip():
            return []
        try:
            objects = json.loads(out)["nftables"]
        except ValueError as exc:  # so 1.0.6 of a table with an owner
            raise KernelFailed(errno.EBADMSG, "nft", f"libnftables wrote what is no JSON: {exc}") from exc
        return [o for o in objects if "metainfo" not in o]

    def run_each(self, scripts: Iterable[str], *, ignore: Iterable[int] = ()) -> list[KernelFailed]:
        """Run each script in a transaction of its own and return what failed, in order.

        For removal, which goes as far as it can. Failures whose errno is in ``ignore`` are
        not returned. Raises InvalidInput at once, since that is a bug in the script.
        """
        passed = frozenset(ignore)
        failed: list[KernelFailed] = []
        for script in scripts:
            try:
                self.run(script)
            except KernelFailed as exc:
                if exc.errno not in passed:
                    failed.append(exc)
        return failed

    def list_table(self, family: str, name: str) -> list[dict[str, object]] | None:
        """Return the JSON objects of one table with its chains, rules, sets and elements; None if absent.

        Costs time with the table's size: for CHECK and for repair, not for ADD.
        """
        try:
            return self.run_json(f"list table {family} {name}")
        except KernelFailed as exc:
            if exc.errno == errno.ENOENT:
                return None
            raise

    def _run(self, script: str, *, as_json: bool, dry: bool = False) -> str:
        if "\0" in script:
            raise InvalidInput("nft", script[:200], "a script can't hold a NUL byte")
        with self._lock:
            ctx = self._ctx
            if ctx is None:
                raise ValueError("this nft context is closed")
            if as_json != self._json:
                self._lib.nft_ctx_output_set_flags(ctx, _OUTPUT_JSON if as_json else 0)
                self._json = as_json
            if dry:
                self._lib.nft_ctx_set_dry_run(ctx, True)
            failed = self._lib.nft_run_cmd_from_buffer(ctx, script.encode())
            # Both buffers belong to the context and are emptied by being read, so both must be
            # read each time: what a failed call left would come out of the next one.
            out: bytes = self._lib.nft_ctx_get_output_buffer(ctx) or b""
            err: bytes = self._lib.nft_ctx_get_error_buffer(ctx) or b""
            if failed or dry:
                self._open()
                self._lib.nft_ctx_free(ctx)
        if failed:
            raise _error(script, err.decode(errors="replace"))
        return out.decode(errors="replace")

    def close(self) -> None:
        """Free the context, its cache and its socket. Closing twice is fine."""
        with self._lock:
            ctx, self._ctx = self._ctx, None
        if ctx is not None:
            self._lib.nft_ctx_free(ctx)
            os.close(self._netns)

    def __enter__(self) -> Self:
        """Return self; closed on exit."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """Close what was forgotten, and say so."""
        if getattr(self, "_ctx", None) is not None:
            warnings.warn("unclosed nft context", ResourceWarning, stacklevel=2)
            self.close()


def _error(script: str, message: str) -> InvalidInput | KernelFailed:
    """Turn nft's message into ours: a refusal of the kernel has an errno's text in it."""
    message = message.strip()
    # One line for a single error: "Error: Could not process rule: File exists", then the
    # command and a line of carets. Lookups that fail in nft's cache say
    # "Error: No such file or directory; did you mean ..." without having asked the kernel.
    for line in message.splitlines():
        found = re.search(r"Error: (?:(?:Could not|Cannot) [^:]*: )?(.*)$", line)
        if found is None:
            continue
        text = found[1].split(";")[0].strip()
        if (code := _ERRNO_BY_TEXT.get(text)) is not None:
            return KernelFailed(code, "nft", message[:_MESSAGE_LIMIT])
    return InvalidInput("nft", script[:200], message[:_MESSAGE_LIMIT] or "refused without a message")
