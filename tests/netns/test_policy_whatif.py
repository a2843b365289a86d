"""What would change, said before it does: dry runs and staged policies by the CLI, then the packets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from portwright.model.errors import InvalidInput, NotFound
from tests.fix_daemon import Daemon, Sandbox, SandboxFactory
from tests.netns.policy_lab import WEB, Probe, listening

pytestmark = pytest.mark.netns

NAMES = ("web", "client", "other")
STAGED = """
apiVersion: projectcalico.org/v3
kind: StagedKubernetesNetworkPolicy
metadata: {name: web}
spec:
"""
#: No port is named shop/idle: it is a pod of a manifest alone.
IDLE = """
---
apiVersion: v1
kind: Pod
metadata: {name: idle, namespace: shop, labels: {app: client}}
spec: {containers: [{name: c}]}
"""


class Lab:
    """Three sandboxes that listen on TCP 80 and 81, and who of them reaches whom."""

    def __init__(self, daemon: Daemon, sandboxes: dict[str, Sandbox]) -> None:
        self._probe = Probe(daemon)
        self._sandboxes = sandboxes

    def table(self) -> dict[str, bool]:
        """By ``source > target port/family``."""
        return {
            f"{source} > {target} {port}/{family}": self._probe.reaches(near, address, port)
            for source, near in self._sandboxes.items()
            for target, far in self._sandboxes.items()
            if source != target
            for family, address in ((4, far.ip4), (6, far.ip6))
            for port in (80, 81)
        }


@contextmanager
def lab(daemon: Daemon, sandboxes: SandboxFactory) -> Iterator[Lab]:
    """The sandboxes with their listeners."""
    made = {name: sandboxes(name=name, labels={"app": name}) for name in NAMES}
    with ExitStack() as stack:
        for sandbox in made.values():
            for port in (80, 81):
                stack.enter_context(listening(sandbox.ns, port))
        yield Lab(daemon, made)


def moved(before: dict[str, bool], after: dict[str, bool]) -> dict[str, bool]:
    """What changed, and what it became."""
    return {cell: allowed for cell, allowed in after.items() if before[cell] != allowed}


def told(changes: dict[str, Any]) -> dict[str, bool]:
    """The same, as the rows tell it of the three sandboxes' two ports."""
    assert (changes["more_rows"], changes["more_pairs"], changes["counted"]) == (0, 0, True)
    mine = {f"default/{name}": name for name in NAMES}
    found = {}
    for row in changes["rows"]:
        [services] = row["services"]
        but = services.startswith("all but ")
        for port in (80, 81):
            if services != "any" and (f"tcp {port}" in services) == but:
                continue
            for source in mine.keys() & row["from"]:
                for target in (mine.keys() & row["to"]) - {source}:
                    for family in row["families"]:
                        found[f"{mine[source]} > {mine[target]} {port}/{family}"] = row["allowed"]
    return found


def run(daemon: Daemon, *args: str) -> Any:
    """The JSON that a command prints."""
    return json.loads(daemon.cli(*args, "--json").stdout)


def written(path: Path, text: str) -> str:
    """A manifest's file."""
    path.write_text(text)
    return str(path)


def test_a_dry_run_tells_what_then_happens(daemon: Daemon, sandboxes: SandboxFactory, tmp_path: Path) -> None:
    """``apply --dry-run`` and ``delete --dry-run`` change nothing, and name just the pairs that change once
    it is done, with the rule and its line; a pod that is a manifest's alone is among them."""
    file = written(tmp_path / "web.yaml", WEB + IDLE)
    with lab(daemon, sandboxes) as there:
        before = there.table()
        dry = run(daemon, "policy", "apply", "--dry-run", "-f", file)
        assert there.table() == before
        assert run(daemon, "policy", "list")["policies"] == []

        run(daemon, "policy", "apply", "-f", file)
        after = there.table()
        assert told(dry["changes"]) == moved(before, after)
        assert moved(before, after)
        assert "shop/idle" in {name for row in dry["changes"]["rows"] for name in row["from"]}
        assert {row["before"] for row in dry["changes"]["rows"]} == {"no policy"}
        assert all(f"by default/web {file}:2" in row["after"] for row in dry["changes"]["rows"])

        gone = run(daemon, "policy", "delete", "--dry-run", "-f", file)
        assert there.table() == after
        assert gone["policies"] == []
        run(daemon, "policy", "delete", "-f", file)
        assert told(gone["changes"]) == moved(after, there.table())


def test_a_dry_run_for_people(daemon: Daemon, sandboxes: SandboxFactory, tmp_path: Path) -> None:
    """The table has a row for each change, and a dry run of what is in force says that nothing changes."""
    file = written(tmp_path / "web.yaml", WEB)
    sandboxes(name="web", labels={"app": "web"})
    table = daemon.cli("policy", "apply", "--dry-run", "-f", file).stdout.partition("\n\n")[2].splitlines()

    assert table[0].split() == ["BECOMES", "FROM", "TO", "SERVICES", "IP", "BEFORE", "AFTER"]
    assert [line.split("  ")[0] for line in table[1:]] == ["denied"]
    assert (
        f"any other address  default/web  any       4+6  no policy  ingress tier-default of default, by \
default/web {file}:2"
        in table[1]
    )

    daemon.cli("policy", "apply", "-f", file)
    again = daemon.cli("policy", "apply", "--dry-run", "-f", file).stdout
    assert again.endswith("\nno pair changes: every verdict stays\n")


def test_a_staged_policy_binds_nobody(daemon: Daemon, sandboxes: SandboxFactory, tmp_path: Path) -> None:
    """A staged policy changes no verdict and no table, is listed as staged, and ``policy staged`` names the
    pairs that change when it is enforced; one that stages a deletion names those that change with that."""
    spec = WEB.partition("spec:\n")[2]
    staged = written(tmp_path / "staged.yaml", STAGED + spec)
    deletion = written(tmp_path / "deletion.yaml", STAGED + "  stagedAction: Delete\n")
    file = written(tmp_path / "web.yaml", WEB)
    with lab(daemon, sandboxes) as there:
        before = there.table()
        state = run(daemon, "policy", "apply", "-f", staged)
        assert (state["policies"], state["staged"]) == ([], ["StagedKubernetesNetworkPolicy default/web"])
        assert there.table() == before
        [adds] = run(daemon, "policy", "staged")["staged"]
        assert (adds["action"], adds["effect"]) == ("Set", "adds NetworkPolicy default/web")

        run(daemon, "policy", "apply", "-f", file)
        after = there.table()
        assert told(adds["changes"]) == moved(before, after)
        assert moved(before, after)
        [same] = run(daemon, "policy", "staged", "default/web")["staged"]
        assert (same["effect"], same["changes"]["rows"]) == ("replaces NetworkPolicy default/web", [])

        run(daemon, "policy", "delete", "-f", staged)
        run(daemon, "policy", "apply", "-f", deletion)
        assert there.table() == after
        [ends] = run(daemon, "policy", "staged")["staged"]
        assert (ends["action"], ends["effect"]) == ("Delete", "deletes NetworkPolicy default/web")
        run(daemon, "policy", "delete", "-f", file)
        assert told(ends["changes"]) == moved(after, there.table())


def test_a_dry_run_keeps_nobody_waiting(daemon: Daemon) -> None:
    """While the daemon works out what hundreds of policies would change, it answers others."""
    docs = []
    for number in range(600):
        name = {"name": f"p{number}", "namespace": "shop"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**name, "labels": {"n": str(number)}}}
        docs.append({**pod, "spec": {"containers": [{"name": "c"}]}})
        peer = {"podSelector": {"matchLabels": {"n": str(number + 1)}}}
        spec = {"podSelector": {"matchLabels": {"n": str(number)}}, "ingress": [{"from": [peer]}]}
        docs.append(
            {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": name, "spec": spec}
        )
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": docs})
    with ThreadPoolExecutor(1) as pool, daemon.client() as asking, daemon.client() as other:
        asked = pool.submit(asking.policy_apply, [("many.json", text)], dry_run=True)
        answers = 0
        while not asked.done():
            other.node_status()
            answers += 1
        changes = asked.result().changes

    assert changes is not None
    assert (len(changes.rows), changes.counted) == (500, True)
    print(f"{answers} answers meanwhile")
    assert answers > 20


def test_staged_policies_outlive_the_daemon(daemon: Daemon, tmp_path: Path) -> None:
    """They are on record as all manifests are, with the file and line that they stand in."""
    file = written(tmp_path / "staged.yaml", STAGED + "  podSelector: {}\n")
    with daemon.client() as api:
        api.policy_apply([(file, Path(file).read_text())])
    daemon.kill()
    daemon.start()

    with daemon.client() as api:
        assert api.policy_list().staged == ("StagedKubernetesNetworkPolicy default/web",)
        assert [each.where for each in api.policy_staged()] == [f"{file}:2"]


def test_bad_requests_for_staged_policies(daemon: Daemon, tmp_path: Path) -> None:
    """An unknown name and too many at once are errors that name what is wrong."""
    many = "\n---".join(STAGED.replace("web", f"w{number}") + "  podSelector: {}\n" for number in range(17))
    with daemon.client() as api:
        api.policy_apply([("many.yaml", many)])
        with pytest.raises(NotFound, match="nobody"):
            api.policy_staged(["default/w1", "nobody"])
        with pytest.raises(InvalidInput, match="17 staged policies; name at most 16"):
            api.policy_staged()
        assert len(api.policy_staged(["default/w1", "StagedKubernetesNetworkPolicy default/w2"])) == 2
