"""Firecracker's API as far as our driver goes, by a real HTTP server on a Unix socket.

There is no Firecracker where the tests run, so this is our statement of its contract: the published
description (the yaml that we ship) is enforced by a validator of its own, and each rule that the description
lacks cites its line in reference/microvm.md (``:36``). HTTP is the standard library's, not the client's h11.
Faults are armed one by one (``server.faults``) and are used up by the request that they are for.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.server
import json
import os
import re
import socket
import socketserver
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml
from jsonschema import Draft4Validator

import portwright.vmm.firecracker as package

_DOCUMENT = yaml.safe_load(Path(package.__file__).with_name("firecracker.yaml").read_text())
_NOT_STARTED, _RUNNING, _PAUSED = "Not started", "Running", "Paused"

# Which release brought a key of a body: before it, the key is unknown and the request refused.
_SINCE: dict[tuple[str, str], tuple[int, int]] = {
    ("/network-interfaces/{iface_id}", "mtu"): (1, 16),  # :30
    ("/snapshot/load", "network_overrides"): (1, 12),  # :93
    ("/snapshot/load", "vsock_override"): (1, 16),  # :93
    ("/snapshot/load", "clock_realtime"): (1, 16),  # :93
}
# Only before boot: :30 (NICs, but for hotplug), :63, :70, and the summaries of the description.
_BEFORE_BOOT = {
    *("/mmds/config", "/vsock", "/machine-config", "/boot-source"),
    *("/drives/{drive_id}", "/network-interfaces/{iface_id}", "/snapshot/load"),
}


class Refused(Exception):
    """Answered by 400 and a fault_message (:23)."""


class Fault(NamedTuple):
    """What goes wrong with one request. ``done``: after it was carried out.

    ``kind``: refuse (400), hang (no answer), close (no answer, socket closed), cut (half an answer), trickle
    (a byte now and then), garbage (no HTTP), no-json, wrong (JSON that the description excludes), huge,
    endless (a head without end), plain (400 without a fault_message).
    """

    kind: str
    done: bool = False


class Taps(Protocol):
    """Where taps come from."""

    def open(self, name: str) -> Callable[[], None]:
        """Attach to a tap as Firecracker does, and return what lets go of it; OSError."""


class DeclaredTaps:
    """Taps that are only said to exist: name -> whether it has several queues."""

    def __init__(self, **taps: bool) -> None:
        self._taps = taps
        self._held: set[str] = set()

    def open(self, name: str) -> Callable[[], None]:
        """Errors as the kernel's: EPERM (:39), EINVAL (:38), EBUSY (:334)."""
        number = 0
        if name not in self._taps:
            number = errno.EPERM
        elif self._taps[name]:
            number = errno.EINVAL
        elif name in self._held:
            number = errno.EBUSY
        if number:
            raise OSError(number, os.strerror(number))
        self._held.add(name)
        return lambda: self._held.remove(name)


class KernelTaps:
    """The kernel's, in a network namespace: TUNSETIFF with Firecracker's own flags (:36)."""

    def __init__(self, inside: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._inside = inside

    def open(self, name: str) -> Callable[[], None]:
        """One queue, no packet information, a virtio-net header; it must be there (:39)."""
        tap, no_pi, vnet_hdr, set_iff = 0x2, 0x1000, 0x4000, 0x400454CA
        with self._inside():
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, set_iff, struct.pack("16sH22x", name.encode(), tap | no_pi | vnet_hdr))
            except OSError:
                os.close(fd)
                raise
        return lambda: os.close(fd)


class Bucket:
    """Firecracker's token bucket, in a time of its own that counts milliseconds."""

    def __init__(self, size: int, refill_time: int, one_time_burst: int = 0) -> None:
        self.size, self.refill_time = size, refill_time
        self.budget, self.burst = size, one_time_burst  # :50
        self._last = 0
        self._carry = 0

    def passed(self, frame: int, duration: int) -> int:
        """The bytes that a sender of frames of that size gets through, from a full bucket."""
        now = sent = 0
        while now < duration:
            sent += self._take(frame)
            # :51, filled only now that a frame does not fit, and the remainder carried on
            tokens, self._carry = divmod((now - self._last) * self.size + self._carry, self.refill_time)
            self._last = now
            self.budget = min(self.size, self.budget + tokens)
            sent += self._take(frame)
            now += 100  # :52, blocked, whatever the refill time
        return sent

    def _take(self, frame: int) -> int:
        """As many frames as there is budget for, the burst first (:50): their bytes."""
        first, then = self.burst // frame, self.budget // frame
        self.burst -= first * frame
        self.budget -= then * frame
        return (first + then) * frame


class FirecrackerServer:
    """One Firecracker process: a context manager; all is gone when it ends, but for the files of snapshots.

    ``requests``: what came, as (verb, path, body). ``at_once``: the most requests that were open together;
    with ``linger`` each is held for so many seconds, or until a second one comes.
    """

    def __init__(
        self,
        path: Path,
        taps: Taps,
        *,
        version: str = "1.16.1",
        pci: bool = False,
        max_payload: int = 51_200,
    ) -> None:
        self.path = path
        self.errors: list[BaseException] = []
        self.version = version
        self.faults: dict[tuple[str, str], Fault] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.at_once = 0
        self.state = _NOT_STARTED
        self.nics: dict[str, dict[str, Any]] = {}
        self.mmds: dict[str, Any] | None = None
        self.mmds_config: dict[str, Any] | None = None
        self.released = threading.Event()
        self.hanging = threading.Event()
        self.linger = 0.0
        self._second = threading.Event()
        self.max_payload = max_payload
        self._taps, self._pci = taps, pci
        self._release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
        self._opened: dict[str, Callable[[], None]] = {}
        self._plain: dict[str, Any] = {}
        self._drives: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._open = 0
        self._http: _Listener | None = None

    def __enter__(self) -> FirecrackerServer:
        """Listen."""
        self._http = _Listener(str(self.path), self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and let go of whoever hangs."""
        self.released.set()
        assert self._http is not None
        self._http.shutdown()
        self._thread.join(10)
        self._http.hang_up()
        self._http.server_close()  # waits for the threads of its connections
        self._close_taps()
        self.path.unlink(missing_ok=True)
        assert self.errors == []

    @property
    def fresh(self) -> bool:
        """Whether nothing is configured but logger and metrics (:93)."""
        return not (self.nics or self._plain or self._drives or self.mmds_config)

    def die(self) -> None:
        """The process ends: nobody listens any more."""
        assert self._http is not None
        self._http.socket.shutdown(socket.SHUT_RDWR)
        self._http.shutdown()
        self._close_taps()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """One more request is open."""
        with self._lock:
            self._open += 1
            self.at_once = max(self.at_once, self._open)
            if self._open > 1:
                self._second.set()
        self._second.wait(self.linger)
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1

    def answer(self, method: str, path: str, raw: bytes) -> tuple[int, Any]:
        """Carry out one request: status and body."""
        body = json.loads(raw) if raw else None
        with self._lock:
            self.requests.append((method, path, body))
            try:
                template, parameter = _routed(method, path)
                self._check(method, template, parameter, body, raw)
                found = self._do(method, template, parameter, body)
            except Refused as refused:
                return 400, {"fault_message": str(refused)}
        status = 200 if method == "GET" else 204
        if method == "GET":
            schema = _DOCUMENT["paths"][template]["get"]["responses"][200]["schema"]
            # Firecracker writes null for what isn't set, which the description has no word for.
            assert not list(_validator(schema).iter_errors(_without_nulls(found))), found
        return status, found

    def _check(self, method: str, template: str, parameter: str, body: Any, raw: bytes) -> None:
        if method in {"GET", "DELETE"}:
            if raw:
                raise Refused("GET and DELETE requests cannot have a body.")  # :19
            return
        (schema,) = (
            p["schema"]
            for p in _DOCUMENT["paths"][template][method.lower()]["parameters"]
            if p["in"] == "body"
        )
        if body is None:
            raise Refused("Empty request.")
        for error in _validator(schema).iter_errors(body):
            raise Refused(f"An error occurred when deserializing the json body of a request: {error.message}")
        known = _DOCUMENT["definitions"][schema["$ref"].rsplit("/", 1)[1]].get("properties")
        for key in body if known is not None else ():
            if key not in known or self._release < _SINCE.get((template, key), (0, 0)):
                raise Refused(f"unknown field `{key}`")
        named = next((body[key] for key in ("iface_id", "drive_id") if key in body and parameter), parameter)
        if named != parameter:
            raise Refused("The id from the path does not match the id from the body!")

    def _do(self, method: str, template: str, parameter: str, body: Any) -> Any:
        started = self.state != _NOT_STARTED
        if method == "PUT" and template in _BEFORE_BOOT and started:
            if template != "/network-interfaces/{iface_id}":
                raise Refused("The requested operation is not supported after starting the microVM.")
            self._hotplug(parameter, body)
            return None
        if (method in {"PATCH", "DELETE"} and template != "/mmds" and not started) or (
            template == "/snapshot/create" and not started
        ):  # :31, :32, :79, :93
            raise Refused("The requested operation is not supported before starting the microVM.")
        match method, template:
            case "GET", _:
                return self._got(template)
            case "PUT", "/network-interfaces/{iface_id}":
                self._plug(parameter, body)
            case "PATCH", "/network-interfaces/{iface_id}":
                self._patch(parameter, body)
            case "DELETE", "/network-interfaces/{iface_id}":
                if not self._pci:
                    raise Refused("PciNotEnabled")  # :32, :85
                if parameter not in self.nics:
                    raise Refused(f"DeviceNotFound: {parameter}")
                del self.nics[parameter]
                self._opened.pop(parameter)()
            case "PUT", "/mmds/config":
                self._bind_mmds(body)
            case "PUT", "/mmds":
                self.mmds = body
            case "PATCH", "/mmds":
                if self.mmds is None:
                    raise Refused("The MMDS data store is not initialized.")
                self.mmds = _merged(self.mmds, body)  # :63, RFC 7396
            case "PUT", "/vsock":
                if len(body["uds_path"].encode()) > 107:  # :73
                    raise Refused("Cannot bind the vsock socket: path must be shorter than SUN_LEN")
                self._plain["vsock"] = body
            case "PUT", "/machine-config" | "/boot-source":
                self._plain[template[1:]] = body
            case "PUT" | "PATCH", "/drives/{drive_id}":
                self._drives[parameter] = {**self._drives.get(parameter, {}), **body}
            case "PUT", "/actions":
                self._act(body["action_type"])
            case "PATCH", "/vm":
                self.state = _PAUSED if body["state"] == "Paused" else _RUNNING
            case "PUT", "/snapshot/create":
                self._save(body)
            case "PUT", "/snapshot/load":
                self._load(body)
            case _:
                raise Refused(f"Invalid request method and/or path: {method} {template}")
        return None

    def _got(self, template: str) -> Any:
        if template == "/version":
            return {"firecracker_version": self.version}
        if template == "/":
            return {
                "id": "anonymous-instance",
                "state": self.state,
                "vmm_version": self.version,
                "app_name": "Firecracker",
            }
        if template == "/mmds":
            return self.mmds or {}
        return {
            "boot-source": self._plain.get("boot-source", {"kernel_image_path": "", "boot_args": None}),
            "machine-config": self._plain.get("machine-config", {"vcpu_count": 1, "mem_size_mib": 128}),
            "drives": list(self._drives.values()),
            "network-interfaces": list(self.nics.values()),
            "mmds-config": self.mmds_config,
            "vsock": self._plain.get("vsock"),
            "balloon": None,
        }

    def _plug(self, iface_id: str, body: dict[str, Any]) -> None:
        for other in self.nics.values():
            if other["iface_id"] != iface_id and body.get("guest_mac") in {other.get("guest_mac")} - {None}:
                raise Refused(f"The MAC address is already in use: {body['guest_mac']}")  # :85
        if iface_id in self._opened:  # before boot the same id is replaced, and loses the metadata service
            self._opened.pop(iface_id)()
            self._unbind_mmds(iface_id)
        self._opened[iface_id] = self._tap(body["host_dev_name"])
        self.nics[iface_id] = body

    def _hotplug(self, iface_id: str, body: dict[str, Any]) -> None:
        if self._release < (1, 16):  # :30
            raise Refused("The requested operation is not supported after starting the microVM.")
        if not self._pci:
            raise Refused("PciNotEnabled")  # :30, :85
        if iface_id in self.nics:
            raise Refused(f"DeviceIdInUse: {iface_id}")  # :85
        self._plug(iface_id, body)

    def _tap(self, name: str) -> Callable[[], None]:
        if len(name.encode()) > 15:  # :40
            raise Refused("Open tap device failed: Invalid interface name")
        try:
            return self._taps.open(name)
        except OSError as error:  # :36 to :39
            raise Refused(
                f"Open tap device failed: Error while creating ifreq structure: {error.strerror} "
                f"(os error {error.errno}). Invalid TUN/TAP Backend provided by {name}."
            ) from error

    def _patch(self, iface_id: str, body: dict[str, Any]) -> None:
        if iface_id not in self.nics:
            raise Refused(f"DeviceNotFound: {iface_id}")
        nic = dict(self.nics[iface_id])
        for side in ("rx_rate_limiter", "tx_rate_limiter"):
            if side in body:  # :57, bucket by bucket; what isn't named stays
                kept = {**(nic.get(side) or {}), **body[side]}
                # :49, a bucket without size or time is none
                kept = {name: b for name, b in kept.items() if b["size"] and b["refill_time"]}
                nic[side] = kept or None
        self.nics[iface_id] = {key: value for key, value in nic.items() if value is not None}

    def _bind_mmds(self, body: dict[str, Any]) -> None:
        for iface_id in body["network_interfaces"]:
            if iface_id not in self.nics:
                raise Refused(f"The list of network interface IDs is not valid: {iface_id}")  # :63
        defaults = {"version": "V1", "ipv4_address": "169.254.169.254", "imds_compat": False}  # :63
        self.mmds_config = {**defaults, **body}

    def _unbind_mmds(self, iface_id: str) -> None:
        if self.mmds_config is not None:
            left = [other for other in self.mmds_config["network_interfaces"] if other != iface_id]
            self.mmds_config = {**self.mmds_config, "network_interfaces": left} if left else None

    def _act(self, action: str) -> None:
        started = self.state != _NOT_STARTED
        if action == "InstanceStart":
            if started:
                raise Refused("The requested operation is not supported after starting the microVM.")
            if "boot-source" not in self._plain:
                raise Refused("Cannot start microvm without kernel configuration.")
            self.state = _RUNNING
        elif not started:
            raise Refused("The requested operation is not supported before starting the microVM.")

    def _save(self, body: dict[str, Any]) -> None:
        if self.state != _PAUSED:
            raise Refused("Cannot save the microVM: it must be paused.")  # :93
        # :66: which NICs reach the metadata, and not the metadata. :58: the limiters as they are.
        kept = {"nics": self.nics, "mmds_config": self.mmds_config, "vsock": self._plain.get("vsock")}
        Path(body["snapshot_path"]).write_text(json.dumps(kept))
        Path(body["mem_file_path"]).write_bytes(b"memory")

    def _load(self, body: dict[str, Any]) -> None:
        if not self.fresh:  # :93
            raise Refused("Loading a microVM snapshot not allowed after configuring boot-specific resources.")
        try:
            self._restore(body)
        except (Refused, OSError, ValueError) as error:  # :94, any error of a load ends the process
            self.die()
            raise Refused(f"Load snapshot error: {error}") from error

    def _restore(self, body: dict[str, Any]) -> None:
        if ("mem_file_path" in body) == ("mem_backend" in body):
            raise Refused("exactly one of mem_backend and mem_file_path")  # the description's sentence
        Path(body["mem_backend"]["backend_path"]).read_bytes()
        kept = json.loads(Path(body["snapshot_path"]).read_text())
        for override in body.get("network_overrides", ()):
            if override["iface_id"] not in kept["nics"]:
                raise Refused(f"Unknown Network Device: {override['iface_id']}")  # :94
            kept["nics"][override["iface_id"]]["host_dev_name"] = override[
                "host_dev_name"
            ]  # and nothing else
        for iface_id, nic in kept["nics"].items():
            self._opened[iface_id] = self._tap(nic["host_dev_name"])  # :95
        self.nics, self.mmds_config = kept["nics"], kept["mmds_config"]
        if kept["vsock"]:
            self._plain["vsock"] = {**kept["vsock"], **body.get("vsock_override", {})}  # :74
        self.state = _RUNNING if body.get("resume_vm") else _PAUSED

    def _close_taps(self) -> None:
        while self._opened:
            self._opened.popitem()[1]()


class _Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 16

    def __init__(self, path: str, process: FirecrackerServer) -> None:
        self.process = process
        self._connections: set[socket.socket] = set()
        super().__init__(path, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        self._connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End every connection that a client has left open, whose thread would wait for its next request."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep what went wrong for the end of the test; a client that left is no error."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.process.errors.append(error)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def do_GET(self) -> None:
        process = self.server.process
        # A client that has read the answer may be here again before we know that it left.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            with process.counted():
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = process.faults.pop((self.command, self.path), None)
                found: tuple[int, Any] = (400, {"error": "Request payload is too large."})  # :65
                if len(raw) <= process.max_payload and (fault is None or fault.done):
                    found = process.answer(self.command, self.path, raw)
            if fault is None:
                self._send(*found)
            else:
                self._fail(fault.kind)

    do_PUT = do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _send(self, status: int, body: Any) -> None:
        raw = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        if raw:
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _fail(self, kind: str) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.close_connection = True
        released = self.server.process.released
        match kind:
            case "refuse":
                self._send(400, {"fault_message": "as the test asked"})
            case "plain":
                self._send(400, {"error": "as the test asked"})
            case "hang":
                self.server.process.hanging.set()
                released.wait()
            case "cut":
                self.wfile.write(head % 100 + b'{"state": ')
            case "trickle":
                for byte in head % 1000:
                    if released.wait(0.02):
                        break
                    self.wfile.write(bytes([byte]))
                released.wait()
            case "garbage":
                self.wfile.write(bytes(range(256)) * 4)
            case "no-json":
                self.wfile.write(head % 9 + b"not JSON!")
            case "wrong":
                raw = b'{"state": "Dancing", "firecracker_version": 7}'
                self.wfile.write(head % len(raw) + raw)
            case "huge":
                self.wfile.write(head % (64 << 20))
                for _ in range(1024):
                    self.wfile.write(b" " * (64 << 10))
            case "endless":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for number in range(100_000):
                    self.wfile.write(b"X-%d: x\r\n" % number)


def _routed(method: str, path: str) -> tuple[str, str]:
    """The template of a path and what it has in place of its name."""
    for template, verbs in _DOCUMENT["paths"].items():
        found = re.fullmatch(re.sub(r"\{\w+\}", "([^/]+)", template), path)
        # :19, the three that the description leaves out
        deletes = template.split("/")[1] in {"drives", "pmem", "network-interfaces"}
        if found and (method.lower() in verbs or (method == "DELETE" and deletes)):
            return template, found[1] if found.groups() else ""
    raise Refused(f"Invalid request method and/or path: {method} {path}.")


def _validator(schema: Any) -> Draft4Validator:
    return Draft4Validator({"definitions": _DOCUMENT["definitions"], **schema})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = _merged(found.get(key), value)
    return found
