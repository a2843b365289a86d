"""``policy matrix --live``: the command, on real packets, and that it leaves nothing however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from portwright.cli.live import report
from portwright.live import box
from portwright.policy.matrix import Cell
from tests.deadline import PATIENCE, wait_until
from tests.fix_daemon import PORTWRIGHT

pytestmark = pytest.mark.netns

#: Three pods: of both families, of none in its manifest, and of IPv6; web is for client alone, but for UDP.
WORLD = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  containers:
  - name: c
    ports: [{name: http, containerPort: 80}, {name: dns, containerPort: 53, protocol: UDP},
      {name: sig, containerPort: 9, protocol: SCTP}]
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
spec: {containers: [{name: c, ports: [{name: http, containerPort: 80}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop}
spec: {containers: [{name: c, ports: [{containerPort: 8080}]}]}
status: {podIP: "fd00::3"}
"""
WEB = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: client}}}]
    ports: [{port: http}, {port: 9, protocol: SCTP}]
"""
DENIED = {
    ("shop/other", "shop/web", "TCP", 80),
    ("shop/client", "shop/web", "UDP", 53),
    ("shop/other", "shop/web", "UDP", 53),
    ("shop/other", "shop/web", "SCTP", 9),
}


class Command:
    """``portwright policy matrix --live`` on a folder of manifests; its processes are known by a mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"PW_LIVE_TEST={uuid.uuid4().hex}"

    def start(self, *options: str) -> subprocess.Popen[str]:
        """The process, which is the first of a process group."""
        key, _, value = self.mark.partition("=")
        return subprocess.Popen(
            [str(PORTWRIGHT), "policy", "matrix", "--live", "-f", str(self.folder), *options],
            env={**os.environ, key: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *options: str) -> tuple[int, str, str]:
        """Its exit status, stdout and stderr."""
        with self.start(*options) as process:
            out, err = process.communicate(timeout=60 * PATIENCE)
        return process.returncode, out, err

    def processes(self) -> list[int]:
        """All of its processes that live."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except OSError:
                    continue  # it has ended
        return found


def _traces() -> list[str]:
    """What a run of the command would leave on the machine: links by alias, mounts, files."""
    links = subprocess.run(["ip", "-d", "-o", "link"], check=True, capture_output=True, text=True).stdout
    mounts = Path("/proc/self/mountinfo").read_text()
    return [
        *(line for line in links.splitlines() if "alias live" in line),
        *(line for line in mounts.splitlines() if line.split()[4].startswith(str(box.RUN_DIR))),
        *(str(path) for path in (box.RUN_DIR, box.STATE_DIR, box.NOTIFY) if path.exists()),
    ]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """The command on WORLD and WEB; at the end none of its processes is left."""
    (tmp_path / "world.yaml").write_text(WORLD)
    (tmp_path / "web.yaml").write_text(WEB)
    made = Command(tmp_path)
    yield made
    wait_until(lambda: not made.processes(), 10, "its processes to end")


def test_every_cell_is_tried(command: Command) -> None:
    """Each cell has the verdict of a real packet beside the engine's, by TCP, UDP and SCTP, over IPv4 and
    IPv6, a pod to itself too; they agree, the exit status is 0, and the machine is as it was."""
    status, out, err = command.run("--json")

    cells = json.loads(out)["cells"]
    assert (status, err) == (0, "")
    assert len(cells) == 15
    denied = {(c["from"], c["to"], c["protocol"], c["port"]) for c in cells if not c["live"]}
    assert denied == DENIED
    assert all(c["live"] == c["allowed"] and c["rule"] for c in cells)
    assert _traces() == []


def test_people_see_both_verdicts_and_their_differences(command: Command) -> None:
    """The table has both columns, and how many packets were sent and verdicts differ."""
    status, out, _ = command.run()

    assert status == 0
    assert out.splitlines()[0].split() == ["FROM", "TO", "PORT", "ALLOWED", "LIVE", "RULE"]
    assert "15 packets sent, 0 verdicts differ" in out


@pytest.mark.parametrize("as_json", [True, False])
def test_a_difference_is_shown_and_fails(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells that packets decide otherwise are listed again, and the exit status is 1."""
    cells = [
        Cell(source="a/a", target="a/b", protocol="TCP", port=80, allowed=allowed, rule=rule)
        for allowed, rule in ((True, "fits"), (False, "differs"))
    ]
    status = report([(cell, True) for cell in cells], as_json=as_json)

    out = capsys.readouterr().out
    assert status == 1
    if as_json:
        assert [(c["allowed"], c["live"]) for c in json.loads(out)["cells"]] == [(True, True), (False, True)]
    else:
        assert "2 packets sent, 1 verdict differs:" in out
        assert (out.count("fits"), out.count("differs\n")) == (1, 2)


NAMES = """
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: names}
spec:
  tier: Admin
  priority: 1
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: client}}}}
  egress:
  - {name: x, action: Accept, to: [{domainNames: [example.com]}]}
"""


def test_look_ups_that_are_proxied_are_not_tried(command: Command) -> None:
    """Where the DNS proxy would answer in the receiver's place there is no verdict, and that is said."""
    (command.folder / "names.yaml").write_text(NAMES)
    (command.folder / "web.yaml").unlink()
    status, out, err = command.run("--json")

    cells = json.loads(out)["cells"]
    assert status == 0
    untried = [(c["from"], c["to"], c["protocol"], c["port"]) for c in cells if c["live"] is None]
    assert untried == [("shop/client", "shop/web", "UDP", 53)]
    assert "live: cells not tried, which no packet shows (docs/policy.md): 1" in err
    assert all(c["live"] for c in cells if c["live"] is not None)


def test_what_is_refused_builds_nothing(command: Command) -> None:
    """What the daemon would refuse is the same error here, with file and field; the exit status is 1."""
    (command.folder / "web.yaml").write_text(WEB.replace("ports:", "prots:"))
    status, out, err = command.run("--json")

    assert status == 1
    assert json.loads(out)["error"]["code"] == "invalid"
    assert "web.yaml" in err
    assert "prots" in err


def test_an_address_that_no_sandbox_can_have_is_refused(command: Command) -> None:
    """The error names the address, and the exit status is 1."""
    (command.folder / "world.yaml").write_text(WORLD.replace("10.0.0.1", "127.0.0.1"))
    status, _, err = command.run()

    assert status == 1
    assert "127.0.0.0/8" in err


def test_too_many_cells_are_refused(command: Command) -> None:
    """What is beyond the bound is refused at once, with the number and the way out."""
    pods = (
        f"---\\napiVersion: v1\\nkind: Pod\\nmetadata: {{name: p{n}}}\\n"
        "spec: {containers: [{name: c, ports: [{name: x, containerPort: 1}]}]}\\n"
        for n in range(1_001)
    )
    (command.folder / "world.yaml").write_text("".join(pods).replace("\\n", "\n"))
    status, _, err = command.run()

    assert status == 1
    assert "1,000 at most" in err
    assert "1004" in err or "1001" in err


def _busy(command: Command) -> None:
    """Manifests with enough cells that it says how far it is: 12 pods with 80 ports each."""
    ports = ", ".join(f"{{containerPort: {n}}}" for n in range(1, 81))
    (command.folder / "world.yaml").write_text(
        "".join(
            f"---\napiVersion: v1\nkind: Pod\nmetadata: {{name: p{n}}}\n"
            f"spec: {{containers: [{{name: c, ports: [{ports}]}}]}}\n"
            for n in range(12)
        )
    )


def test_a_lost_process_is_an_error(command: Command) -> None:
    """If the process that does the work is killed, the command says so, and its daemon is gone too."""
    _busy(command)
    with command.start() as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("live: ")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), signal.SIGKILL)
        out, err = process.communicate(timeout=20 * PATIENCE)
    assert (process.returncode, out) == (1, "")
    assert "ended before it was done" in err
    wait_until(lambda: not command.processes(), 10, "its processes to end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_it_ends(command: Command, number: signal.Signals) -> None:
    """Stopped or killed while it works, it takes its daemon, its namespaces and its mounts with it."""
    _busy(command)
    with command.start() as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("live: ")  # sandboxes and a daemon are there
        assert len(command.processes()) == 3
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=20 * PATIENCE)
    assert process.returncode in {1, 128 + number, -number}
    assert out == ""
    wait_until(lambda: not command.processes(), 10, "its processes to end")
    assert _traces() == []
