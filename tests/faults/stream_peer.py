"""One end of a TCP stream, as a process of its own: ``stream_peer.py serve|send ADDRESS PORT``.

``serve`` prints ``ready``, takes one connection and checks each byte against its place in the stream. A line
on stdin asks for a report, one line of JSON. ``send`` writes a chunk every ``PACE`` seconds. Both end with
stdin. Run with ``python -I -S``: it imports little, for eight of them share two cores with what is tested.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time

PERIOD = bytes(range(251))  # a prime: no buffer's size is a multiple of it
PATTERN = PERIOD * 600
CHUNK, PACE = 4096, 0.005


def serve(address: str, port: int) -> int:
    """Receive until stdin ends; exit 1 if a byte was not the one due."""
    with socket.create_server((address, port), family=_family(address)) as listener:
        print("ready", flush=True)
        conn, _ = listener.accept()
    total, longest, closed = 0, 0.0, False
    last = time.monotonic()
    while True:
        readable = select.select([sys.stdin] if closed else [conn, sys.stdin], [], [])[0]
        now = time.monotonic()
        if conn in readable:
            data = conn.recv(65536)
            longest, last = max(longest, now - last), now
            start = total % len(PERIOD)
            if data != PATTERN[start : start + len(data)]:
                return 1
            closed = not data
            total += len(data)
        if sys.stdin in readable:
            if not sys.stdin.readline():
                return 0
            report = {"octets": total, "gap": max(longest, now - last), "closed": closed}
            print(json.dumps(report), flush=True)
            longest = 0.0


def send(address: str, port: int) -> int:
    """Send until stdin ends."""
    with socket.create_connection((address, port), timeout=10) as conn:
        conn.settimeout(None)
        total, due = 0, time.monotonic()
        while True:
            due = max(due + PACE, time.monotonic())
            while (left := due - time.monotonic()) > 0:
                if select.select([sys.stdin], [], [], left)[0]:
                    # tcpi_total_retrans of struct tcp_info (include/uapi/linux/tcp.h)
                    info = conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
                    print(struct.unpack_from("=I", info, 100)[0], flush=True)
                    return 0
            start = total % len(PERIOD)
            conn.sendall(PATTERN[start : start + CHUNK])
            total += CHUNK


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


if __name__ == "__main__":
    sys.exit({"serve": serve, "send": send}[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
