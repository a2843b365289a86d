"""Other CNI plugins, with ours behind them: as a runtime drives a list."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.deadline import PATIENCE
from tests.faults.cni import REFERENCE, Cni, Outcome
from tests.fix_daemon import Daemon
from tests.fix_netns import TestNetns

RANGES = [[{"subnet": "10.5.0.0/24"}], [{"subnet": "fd00:5::/64"}]]


class Chained:
    """A list of a reference plugin and ours, in the daemon's host namespace."""

    def __init__(self, daemon: Daemon, folder: Path, plugin: str = "ptp", **conf: object) -> None:
        """``conf`` is merged into the first plugin's configuration; ``folder`` is host-local's."""
        self._daemon = daemon
        ipam = {
            "type": "host-local",
            "ranges": RANGES,
            "dataDir": str(folder),
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        }
        self.first: dict[str, Any] = {
            "cniVersion": "1.0.0",
            "name": "vms",
            "type": plugin,
            "ipam": ipam,
            "dns": {"nameservers": ["192.0.2.53"]},
            **conf,
        }
        self.ours = Cni(daemon, "vms", cniVersion="1.0.0", model="tcfilter")
        for key in ("ipam", "ipMasq", "capabilities"):
            del self.ours.conf[key]

    def before(self, verb: str, container: str, ns: TestNetns, ifname: str = "eth0") -> dict[str, Any]:
        """One execution of the first plugin; its result. It must not fail."""
        done = subprocess.run(
            ["nsenter", f"--net={self._daemon.host.path}", "--", f"{REFERENCE}/{self.first['type']}"],
            env={
                "CNI_COMMAND": verb,
                "CNI_CONTAINERID": container,
                "CNI_NETNS": ns.path,
                "CNI_IFNAME": ifname,
                "CNI_PATH": REFERENCE,
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            },
            input=json.dumps(self.first).encode(),
            capture_output=True,
            check=False,
            timeout=60 * PATIENCE,
        )
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def add(self, container: str, ns: TestNetns, **more: Any) -> tuple[dict[str, Any], Outcome]:
        """ADD of both; the first one's result, and how ours ended."""
        prev = self.before("ADD", container, ns)
        return prev, self.ours.run("ADD", container, ns.path, prevResult=prev, **more)

    def delete(self, container: str, ns: TestNetns) -> None:
        """DEL of both, the last one first. It must not fail."""
        assert self.ours.delete(container, ns).ok
        self.before("DEL", container, ns)


def consumers_view(result: dict[str, Any], container: str) -> list[tuple[str, str, str, list[str]]]:
    """What a consumer of tc-redirect-tap finds: (tap, its namespace, the card's MAC, its addresses).

    As firecracker-go-sdk's vmconf looks (cni/vmconf, cni/internal), which takes one card with one address.
    """
    interfaces = result["interfaces"]
    assert all(0 <= ip["interface"] < len(interfaces) for ip in result["ips"] if "interface" in ip)
    found = []
    for index, card in enumerate(interfaces):
        if card.get("sandbox") != container:
            continue
        (tap,) = [one for one in interfaces if one["name"] == card["name"] and one is not card]
        ips = [ip["address"] for ip in result["ips"] if ip.get("interface") == index]
        found.append((tap["name"], tap["sandbox"], card["mac"], ips))
    return found
