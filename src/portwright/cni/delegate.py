"""Executing a foreign IPAM plugin: CNI SPEC 1.1.0, section 4 "Plugin Delegation".

The plugin runs in the *caller's* network namespace, with the caller's CNI variables and the
whole stdin. The thread that starts it enters that namespace itself, for the time of one
``Popen``: no code runs between fork and exec, so the daemon's threads and locks can't hurt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Final

from portwright.cni.errors import CniCode, CniError, map_error
from portwright.cni.fields import Fields, loads
from portwright.cni.request import CniRequest
from portwright.cni.result import Result, from_json
from portwright.model.errors import PortwrightError

#: Bounds on what a plugin may say, in bytes; more is discarded (stderr) or an error (stdout).
MAX_STDOUT: Final = 1 << 20
MAX_STDERR: Final = 16 << 10
#: Seconds a plugin gets. Below the 110 s after which our own caller stops waiting for us.
TIMEOUT: Final = 60.0
#: Reference plugins look for iptables and sysctl; a daemon's PATH may be empty.
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CHUNK: Final = 1 << 16

Namespace = Callable[[], AbstractContextManager[object]]


class _Cancelled(Exception):
    """The caller went away while the plugin ran."""


def find_plugin(name: str, path: Sequence[str]) -> Path:
    """Return the regular, executable file ``name`` in the first directory of ``path`` that has it.

    Raises :class:`CniError`: 4 if ``path`` is empty, 7 for a name with a slash or not found.
    """
    if not path:
        raise CniError(
            CniCode.BAD_ENVIRONMENT,
            "required env variables [CNI_PATH] missing",
            f"needed to find the plugin {name!r}",
        )
    if not name or "/" in name or "\0" in name or name in {".", ".."}:
        raise CniError(CniCode.INVALID_CONFIG, f"ipam.type: invalid plugin name {name!r:.80}")
    for directory in path:
        candidate = Path(directory) / name
        with contextlib.suppress(OSError):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate
    raise CniError(CniCode.INVALID_CONFIG, f"ipam.type: failed to find plugin {name!r} in path {list(path)}")


async def run(
    request: CniRequest,
    *,
    command: str | None = None,
    namespace: Namespace = contextlib.nullcontext,
    timeout_s: float = TIMEOUT,
    log: Callable[[str], None] | None = None,
) -> Result | None:
    """Execute ``request.config.ipam.type`` with ``command`` (default: the request's own).

    Returns the result of ADD, None for other verbs. ``namespace()`` is entered by a worker thread
    around the start of the process. ``log`` gets the plugin's stderr, at most :data:`MAX_STDERR`.
    Raises :class:`CniError`: the plugin's own error unchanged; 4 and 7 see :func:`find_plugin`; 5 if
    it can't be started, crashes or says nothing; 6 if what it says is no result; 11 after
    ``timeout_s`` seconds. The process group is killed on timeout and on cancellation, and is gone
    when this returns or raises. After a failed ADD the caller owes the plugin a DEL.
    """
    ipam = request.config.ipam
    name = ipam.type if ipam else ""
    verb = command or request.command
    job = _Job(
        plugin=find_plugin(name, request.path),
        env={"PATH": os.environ.get("PATH") or _PATH, **request.env, "CNI_COMMAND": verb},
        stdin=request.raw_stdin,
        deadline=time.monotonic() + timeout_s,
    )
    worker = asyncio.ensure_future(asyncio.to_thread(job.execute, namespace))
    try:
        status, stdout, stderr = await asyncio.shield(worker)
    except asyncio.CancelledError:
        # A thread can't be cancelled, but its plugin can be killed; wait until it is gone.
        job.cancel()
        while not worker.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([worker])
        worker.exception()
        raise
    finally:
        job.close()
    text = stderr.decode("utf-8", "replace").strip()
    if text and log is not None:
        log(text)
    if status != 0:
        raise _failure(name, status, stdout, text)
    return _success(name, verb, stdout, request.config.cni_version)


def _success(name: str, verb: str, stdout: bytes, version: str) -> Result | None:
    said = stdout.strip()
    if said in (b"", b"null"):
        if verb == "ADD":
            raise CniError(CniCode.IO, f"IPAM plugin {name} gave no result")
        return None
    if verb != "ADD":
        return None
    try:
        return from_json(said, default_version=version)
    except PortwrightError as error:
        raise CniError(
            CniCode.DECODE, f"IPAM plugin {name} gave no usable result: {map_error(error).msg}"
        ) from error


def _failure(name: str, status: int, stdout: bytes, stderr: str) -> CniError:
    """Return the plugin's own error object, or one that says how it ended."""
    with contextlib.suppress(PortwrightError):
        said = Fields(loads(stdout.strip(), "error"))
        number = said.number("code", 1, (1 << 32) - 1)
        if number is not None:
            return CniError(number, said.text("msg"), said.text("details"))
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
    return CniError(CniCode.IO, f"IPAM plugin {name} {how} and no error object", stderr[-1024:])


class _Job:
    """One execution; all but :meth:`cancel` happens in the worker thread."""

    def __init__(self, *, plugin: Path, env: dict[str, str], stdin: bytes, deadline: float) -> None:
        """Hold the parts; ``deadline`` is of ``time.monotonic()``."""
        self._plugin = plugin
        self._env = env
        self._stdin = stdin
        self._deadline = deadline
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = os.pipe()

    def cancel(self) -> None:
        """Make :meth:`execute` kill the plugin and raise; from any thread."""
        self._stopping.set()
        os.write(self._wake_write, b"x")

    def close(self) -> None:
        """Give the descriptors back, once :meth:`execute` is over."""
        os.close(self._wake_read)
        os.close(self._wake_write)

    def execute(self, namespace: Namespace) -> tuple[int, bytes, bytes]:
        """Run the plugin to its end; returns (return code, stdout, stderr)."""
        try:
            with namespace():
                process = subprocess.Popen(
                    [str(self._plugin)],
                    env=self._env,
                    cwd="/",
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            raise CniError(
                CniCode.IO, f"IPAM plugin {self._plugin} could not be started: {error.strerror}"
            ) from error
        with process:
            try:
                stdout, stderr = self._talk(process)
                process.wait(max(0.0, self._deadline - time.monotonic()))
            except BaseException as error:
                # Not reaped yet, so the group is still its own, and its children go with it.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, (subprocess.TimeoutExpired, TimeoutError)):
                    raise CniError(
                        CniCode.TRY_AGAIN, f"IPAM plugin {self._plugin.name} did not finish in time"
                    ) from None
                raise
        return process.returncode, stdout, stderr

    def _talk(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """Feed stdin and collect both outputs within their bounds, until stdout and stderr end."""
        stdin, stdout, stderr = _pipes(process)
        kept = {stdout.fileno(): bytearray(), stderr.fileno(): bytearray()}
        left = memoryview(self._stdin)
        os.set_blocking(stdin.fileno(), False)
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._wake_read, selectors.EVENT_READ)
            waiting.register(stdin.fileno(), selectors.EVENT_WRITE)
            for output in kept:
                waiting.register(output, selectors.EVENT_READ)
            open_outputs = len(kept)
            while open_outputs:
                ready = waiting.select(max(0.0, self._deadline - time.monotonic()))
                if self._stopping.is_set():
                    raise _Cancelled
                if not ready and time.monotonic() >= self._deadline:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd in kept:
                        if not _collect(key.fd, kept[key.fd], stderr.fileno()):
                            waiting.unregister(key.fd)
                            open_outputs -= 1
                        continue
                    left = _feed(stdin, left)
                    if not left:
                        waiting.unregister(key.fd)
                        stdin.close()
        return bytes(kept[stdout.fileno()]), bytes(kept[stderr.fileno()])


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise RuntimeError
    return process.stdin, process.stdout, process.stderr


def _collect(output: int, kept: bytearray, stderr: int) -> bool:
    """Read once into ``kept``, within the bounds; False at the end of the stream."""
    chunk = os.read(output, _CHUNK)
    if output == stderr:
        kept += chunk[: MAX_STDERR - len(kept)]
    else:
        kept += chunk
        if len(kept) > MAX_STDOUT:
            raise CniError(CniCode.IO, f"the plugin wrote more than {MAX_STDOUT} bytes to stdout")
    return bool(chunk)


def _feed(pipe: IO[bytes], left: memoryview) -> memoryview:
    """Write what fits; a plugin that does not read its stdin to the end is none of our business."""
    try:
        return left[os.write(pipe.fileno(), left[:_CHUNK]) :]
    except BlockingIOError:
        return left
    except BrokenPipeError:
        return left[:0]
