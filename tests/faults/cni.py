"""The CNI plugin as a runtime drives it: the installed executable, its environment, stdin and answer."""

from __future__ import annotations

import json
import subprocess
from typing import Any, NamedTuple

from tests.deadline import PATIENCE
from tests.fix_daemon import Daemon
from tests.fix_netns import TestNetns

REFERENCE = "/usr/lib/cni"
CAPABILITIES = {"portMappings": True, "bandwidth": True}
RANGES = [[{"subnet": "10.66.0.0/24"}], [{"subnet": "fd66::/112"}]]


class Outcome(NamedTuple):
    """What an execution left: exit status 0 and a result, or an error object."""

    status: int
    answer: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.status == 0

    @property
    def addresses(self) -> list[str]:
        """The addresses of a result, without prefix."""
        return [ip["address"].partition("/")[0] for ip in self.answer["ips"]]


class Cni:
    """One network configuration, dual-stack, run in the daemon's host namespace."""

    def __init__(self, daemon: Daemon, name: str = "faults", **conf: object) -> None:
        """Install the plugin for this daemon. ``conf`` is merged into the configuration."""
        daemon.install()
        self._daemon = daemon
        self.conf: dict[str, Any] = {
            "cniVersion": "1.1.0",
            "name": name,
            "type": "portwright",
            "ipMasq": True,
            "capabilities": CAPABILITIES,
            "ipam": {"type": "portwright", "ranges": RANGES},
            **conf,
        }

    def add(
        self,
        container: str,
        ns: TestNetns,
        runtime: dict[str, object] | None = None,
        *,
        host: TestNetns | None = None,
    ) -> Outcome:
        """ADD of eth0; ``runtime`` is the runtimeConfig."""
        return self.run("ADD", container, ns.path, host=host, runtimeConfig=runtime or {})

    def delete(self, container: str, ns: TestNetns, *, host: TestNetns | None = None) -> Outcome:
        """DEL of eth0."""
        return self.run("DEL", container, ns.path, host=host)

    def run(
        self,
        verb: str,
        container: str = "",
        path: str = "",
        *,
        host: TestNetns | None = None,
        cni_args: str = "",
        **more: object,
    ) -> Outcome:
        """One execution; ``more`` is merged into its stdin."""
        env = {
            "CNI_COMMAND": verb,
            "CNI_CONTAINERID": container,
            "CNI_NETNS": path,
            "CNI_IFNAME": "eth0" if container else "",
            "CNI_ARGS": cni_args,
            "CNI_PATH": f"{self._daemon.bin_dir}:{REFERENCE}",
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        where = (host or self._daemon.host).path
        done = subprocess.run(
            ["nsenter", f"--net={where}", "--", str(self._daemon.bin_dir / "portwright")],
            env=env,
            input=json.dumps({**self.conf, **more}).encode(),
            capture_output=True,
            check=False,
            timeout=60 * PATIENCE,
        )
        return Outcome(done.returncode, json.loads(done.stdout) if done.stdout.strip() else {})


def published(port: int) -> dict[str, object]:
    """A runtimeConfig with everything: a mapping in both families, one on the loopback, both limits."""
    return {
        "portMappings": [
            {"hostPort": port, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": port, "containerPort": 53, "protocol": "udp"},
            {"hostPort": port + 1, "containerPort": 81, "protocol": "tcp", "hostIP": "127.0.0.1"},
        ],
        "bandwidth": {
            "ingressRate": 80_000_000,
            "ingressBurst": 8_000_000,
            "egressRate": 80_000_000,
            "egressBurst": 8_000_000,
        },
    }
