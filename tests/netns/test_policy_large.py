"""More manifests than other requests may be long: through the command and a real daemon, all or none."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path

import pytest

from portwright.api import frames
from tests.fix_daemon import Daemon, SandboxFactory
from tests.netns.policy_lab import Probe, listening

pytestmark = pytest.mark.netns

FILES = 30
POLICY = """apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: p{number}
  annotations: {{note: "{note}"}}
spec:
  podSelector: {{matchLabels: {{app: web}}}}
  ingress:
  - ports: [{{protocol: TCP, port: {port}}}]
"""


def write(folder: Path, first_port: int) -> None:
    """3 MB of manifests: each opens a port of app=web, from ``first_port`` on."""
    for number in range(FILES):
        text = POLICY.format(number=number, note="why " * 25_000, port=first_port + number)
        (folder / f"{number:02}.yaml").write_text(text)
    assert sum(file.stat().st_size for file in folder.iterdir()) > 3_000_000


def test_a_folder_of_three_megabytes_is_applied_whole_or_not_at_all(
    daemon: Daemon, sandboxes: SandboxFactory, tmp_path: Path
) -> None:
    """Every one of its policies holds after one command; if its last file is wrong, none of the others."""
    web, client = sandboxes(labels={"app": "web"}), sandboxes(labels={"app": "client"})
    probe = Probe(daemon)
    ports = (100, 100 + FILES - 1, 200, 200 + FILES - 1)

    with contextlib.ExitStack() as stack:
        for port in ports:
            stack.enter_context(listening(web.ns, port))

        def reached() -> set[int]:
            found = {
                port: {probe.reaches(client, address, port) for address in (web.ip4, web.ip6)}
                for port in ports
            }
            assert {len(families) for families in found.values()} == {1}
            return {port for port, families in found.items() if families == {True}}

        write(tmp_path, 100)
        daemon.cli("policy", "apply", "-f", str(tmp_path))
        assert reached() == {100, 100 + FILES - 1}

        write(tmp_path, 200)
        last = tmp_path / "zz.yaml"
        last.write_text("apiVersion: v1\nkind: Service\nmetadata: {name: s}\n")
        failed = daemon.cli("policy", "apply", "-f", str(tmp_path), check=False)
        assert failed.returncode
        assert f"{last}:2: Service s: kind" in failed.stderr
        assert reached() == {100, 100 + FILES - 1}

        last.unlink()
        daemon.cli("policy", "apply", "-f", str(tmp_path))
        assert reached() == {200, 200 + FILES - 1}
        with daemon.client() as api:
            assert len(api.policy_list().files) == FILES


def test_too_much_is_one_error(daemon: Daemon, tmp_path: Path) -> None:
    """More than a large request holds is refused by the command, with the bound and the way out."""
    for number in range(3):
        (tmp_path / f"{number}.yaml").write_text(f"# {'x' * 6_000_000}\n")
    failed = daemon.cli("policy", "apply", "-f", str(tmp_path), check=False)
    assert failed.returncode
    assert failed.stderr.count("\n") == 1
    for words in ("18,000,", f"{frames.MAX_LARGE:,}", "apply them in parts", "--policy-dir"):
        assert words in failed.stderr
    with daemon.client() as api:
        assert api.policy_list().files == ()


def resident(daemon: Daemon) -> int:
    """The daemon's memory, in bytes."""
    with daemon.client() as api:
        pid = api.node_status().pid
    [line] = [li for li in Path(f"/proc/{pid}/status").read_text().splitlines() if li.startswith("VmRSS:")]
    return int(line.split()[1]) << 10


def test_large_requests_that_never_end_take_bounded_memory(daemon: Daemon) -> None:
    """Of 50 connections that each begin one, two are read and the rest are told; the daemon goes on."""
    header = struct.pack(">IB", frames.MAX_LARGE, frames.LARGE_REQUEST)
    before = resident(daemon)
    refused = 0
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.settimeout(10)
            sock.connect(str(daemon.run_dir / "portwright.sock"))
            try:
                sock.sendall(header + b" " * (frames.MAX_LARGE - 1))
            except (BrokenPipeError, ConnectionResetError):
                refused += 1
                assert b'"busy"' in sock.recv(1 << 16)
        after = resident(daemon)
    assert refused == 48
    assert after - before < 4 * frames.MAX_LARGE
