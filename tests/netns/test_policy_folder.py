"""The watched folder: a real daemon keeps its manifests in force, whatever way they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from portwright.api.policy import PolicyState
from tests.deadline import wait_until
from tests.fix_daemon import Daemon, SandboxFactory
from tests.netns.policy_lab import WEB, Probe, listening

pytestmark = pytest.mark.netns

T = TypeVar("T")

OTHER = WEB.replace("name: web", "name: other").replace("app: web", "app: none")
BAD = WEB.replace("name: web", "name: bad").replace(
    "podSelector: {matchLabels: {app: web}}", "podSelektor: {}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, watched by every daemon that is started after this."""
    made = tmp_path / "policies"
    made.mkdir(mode=0o755)
    monkeypatch.setenv("PORTWRIGHT_POLICY_DIR", str(made))
    return made


def until(daemon: Daemon, done: Callable[[], T | None], why: str) -> T:
    """As wait_until; its error has the daemon's log of that moment."""
    try:
        return wait_until(done, 10, why)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{listed(daemon)}\n{daemon.tail()}") from None


def listed(daemon: Daemon) -> PolicyState:
    """What the daemon says is in force."""
    with daemon.client() as api:
        return api.policy_list()


def has(daemon: Daemon, *policies: str) -> None:
    """Return once just these policies are in force, and the folder has nothing more to say."""

    def done() -> bool:
        state = listed(daemon)
        return (
            state.policies == tuple(f"NetworkPolicy default/{name}" for name in policies) and not state.behind
        )

    until(daemon, done, f"policies {policies} in force")


def refused(daemon: Daemon, said: str) -> PolicyState:
    """Return once the folder is behind for this reason."""

    def state() -> PolicyState | None:
        found = listed(daemon)
        return found if said in found.behind else None

    return until(daemon, state, f"a refusal that says {said!r}")


def test_packets_obey_the_folder(folder: Path, daemon: Daemon, sandboxes: SandboxFactory) -> None:
    """A file that comes, changes or goes decides who connects, in both families; a restart changes nothing,
    and neither does what happens while the daemon is away once it is back."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    probe = Probe(daemon)
    with listening(web.ns, 80), listening(web.ns, 81):

        def verdicts() -> tuple[bool, ...]:
            return tuple(probe.reaches(client, to, port) for port in (80, 81) for to in (web.ip4, web.ip6))

        assert verdicts() == (True,) * 4
        file = folder / "web.yaml"
        file.write_text(WEB)
        has(daemon, "web")
        assert verdicts() == (True, True, False, False)
        file.write_text(WEB.replace("port: 80", "port: 81"))
        until(daemon, lambda: verdicts() == (False, False, True, True), "the changed file in force")
        daemon.stop()
        file.write_text(WEB)
        daemon.start()
        assert verdicts() == (True, True, False, False)
        file.unlink()
        has(daemon)
        assert verdicts() == (True,) * 4


def _in_place(file: Path, text: str) -> None:
    file.write_text(text)


def _renamed_over(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    temporary.rename(file)


def _as_vim(file: Path, text: str) -> None:
    """A swap file beside it, a probe, the old one moved away, the new one written, all else removed."""
    swap, probe, old = (file.with_name(name) for name in (f".{file.name}.swp", "4913", f"{file.name}~"))
    swap.write_bytes(b"b0VIM")
    probe.touch()
    probe.unlink()
    file.rename(old)
    file.write_text(text)
    old.unlink()
    swap.unlink()


def _linked(file: Path, text: str) -> None:
    """The file is a link to one elsewhere, which is written in place."""
    elsewhere = file.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "x").write_text(text)
    if not file.is_symlink():
        file.unlink()
        file.symlink_to(elsewhere / "x")


@pytest.mark.parametrize("write", [_in_place, _renamed_over, _as_vim, _linked])
def test_every_way_to_write(folder: Path, daemon: Daemon, write: Callable[[Path, str], None]) -> None:
    """However a file is written, what it says in the end is in force; and again for the next change."""
    file = folder / "web.yaml"
    file.write_text(WEB)
    has(daemon, "web")
    write(file, OTHER)
    has(daemon, "other")
    write(file, WEB)
    has(daemon, "web")


def test_a_mounted_configmap(folder: Path, daemon: Daemon) -> None:
    """The swap of ``..data`` swaps all files at once."""
    for number, text in ((1, WEB), (2, OTHER)):
        (folder / f"..{number}").mkdir()
        (folder / f"..{number}" / "p.yaml").write_text(text)
    (folder / "..data").symlink_to("..1")
    (folder / "p.yaml").symlink_to("..data/p.yaml")
    has(daemon, "web")
    (folder / "..tmp").symlink_to("..2")
    (folder / "..tmp").rename(folder / "..data")
    has(daemon, "other")
    assert listed(daemon).files == (str(folder / "p.yaml"),)


def test_a_bad_file_changes_nothing(folder: Path, daemon: Daemon) -> None:
    """While one file is bad no other change counts either; list, status, doctor and one line of the log say
    why, and all is in force once it is mended."""
    (folder / "web.yaml").write_text(WEB)
    has(daemon, "web")
    (folder / "bad.yaml").write_text(BAD)
    refused(daemon, "podSelektor")
    (folder / "web.yaml").write_text(OTHER)
    (folder / "bad.yaml").write_text(BAD.replace("podSelektor", "podSelectr"))
    state = refused(daemon, "podSelectr")
    with daemon.client() as api:
        assert state.policies == ("NetworkPolicy default/web",)
        assert state.folder == str(folder)
        assert any("bad.yaml" in alarm for alarm in api.node_status().alarms)
        assert api.node_status().ready
        (check,) = (c for c in api.doctor().checks if c.name == "policy folder")
        assert not check.ok
        assert "podSelectr" in check.detail
    assert "podSelectr" in daemon.cli("policy", "list").stdout
    (folder / "bad.yaml").unlink()
    has(daemon, "other")
    assert daemon.log.read_text().count("podSelektor") == 1
    with daemon.client() as api:
        assert api.node_status().alarms == ()


def test_others_cant_write_policy(folder: Path, daemon: Daemon) -> None:
    """A file or folder that others could write is refused with the remedy, and taken once that is done."""
    (folder / "web.yaml").write_text(WEB)
    has(daemon, "web")
    for path, mode in ((folder / "web.yaml", 0o644), (folder, 0o755)):
        path.chmod(0o777)
        state = refused(daemon, "chmod go-w it")
        assert str(path) in state.behind
        assert state.policies == ("NetworkPolicy default/web",)
        path.chmod(mode)
        has(daemon, "web")


def test_half_a_file_is_not_taken(folder: Path, daemon: Daemon) -> None:
    """A file that is cut and still open counts only when it is closed; until then what was in force stays."""
    file = folder / "web.yaml"
    file.write_text(WEB + "---" + OTHER)
    has(daemon, "other", "web")
    with file.open("w") as writer:
        writer.write(OTHER)
        writer.flush()
        state = refused(daemon, "still being written")
        assert len(state.policies) == 2
    has(daemon, "other")


def test_constant_change_starves_nobody(folder: Path, daemon: Daemon) -> None:
    """A file that never stops changing delays the others by a bounded time only."""
    (folder / "web.yaml").write_text(WEB)
    busy = folder / "busy.yaml"

    def done() -> bool:
        busy.write_text(f"# {os.urandom(4).hex()}\n")
        return bool(listed(daemon).policies)

    until(daemon, done, "the other file in force")


def test_beside_what_is_applied(folder: Path, daemon: Daemon, tmp_path: Path) -> None:
    """Applied files stay beside the folder's; the folder's own can't be applied or deleted by hand; and one
    that contradicts an applied file is taken when that one goes."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(OTHER)
    inside = folder / "web.yaml"
    inside.write_text(WEB)
    has(daemon, "web")
    daemon.cli("policy", "apply", "-f", str(mine))
    has(daemon, "other", "web")
    for command in (
        ["apply", "-f", str(inside)],
        ["delete", "-f", str(folder / ".." / "policies" / "web.yaml")],
    ):
        done = daemon.cli("policy", *command, check=False)
        assert done.returncode == 1
        assert "is of the watched folder" in done.stderr
    (folder / "other.yaml").write_text(OTHER)
    refused(daemon, "keep one")
    with daemon.client() as api:
        api.policy_delete([str(mine)])
    has(daemon, "other", "web")
    assert listed(daemon).files == (str(folder / "other.yaml"), str(inside))


def test_a_folder_that_is_gone_closes_nothing_and_opens_nothing(folder: Path, daemon: Daemon) -> None:
    """Gone while the daemon runs, or at its start, or forgotten by it: the recorded manifests stay in force,
    and an alarm says so; the folder is taken again when it is back."""
    (folder / "web.yaml").write_text(WEB)
    has(daemon, "web")
    away = folder.with_name("away")
    folder.rename(away)
    assert refused(daemon, "No such file").policies == ("NetworkPolicy default/web",)
    daemon.stop()
    daemon.start()
    assert refused(daemon, "No such file").policies == ("NetworkPolicy default/web",)
    away.rename(folder)
    has(daemon, "web")
    (folder / "web.yaml").write_text(OTHER)
    has(daemon, "other")
    daemon.stop()
    daemon.start(PORTWRIGHT_POLICY_DIR="")
    state = refused(daemon, "no longer watched")
    assert state.policies == ("NetworkPolicy default/other",)
    with daemon.client() as api:
        api.policy_delete(list(state.files))
    has(daemon)


def test_files_that_were_applied_from_it_are_its_own(folder: Path, daemon: Daemon) -> None:
    """Who applied the folder's files by hand before it was watched loses nothing, and keeps nothing that the
    folder has no more."""
    daemon.stop()
    daemon.start(PORTWRIGHT_POLICY_DIR="")
    for name, text in (("web", WEB), ("other", OTHER)):
        (folder / f"{name}.yaml").write_text(text)
    daemon.cli("policy", "apply", "-f", str(folder))
    has(daemon, "other", "web")
    daemon.stop()
    (folder / "other.yaml").unlink()
    daemon.start()
    has(daemon, "web")
    (folder / "web.yaml").unlink()
    has(daemon)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["compiled", "recorded", "installed"])
def test_killed_in_the_middle(folder: Path, daemon: Daemon, sandboxes: SandboxFactory, place: str) -> None:
    """SIGKILL at a step of a change from the folder: packets obey the old file or the new, and after the
    start the new."""
    web, client = (sandboxes(labels={"app": app}) for app in ("web", "client"))
    probe = Probe(daemon)
    file = folder / "web.yaml"
    file.write_text(WEB)
    has(daemon, "web")
    with listening(web.ns, 80), listening(web.ns, 81):
        reaches = partial(probe.reaches, client)
        daemon.stop()
        daemon.start(PORTWRIGHT_DIE_AT=f"policy:{place}")
        assert (reaches(web.ip4, 80), reaches(web.ip6, 81)) == (True, False)
        _renamed_over(file, WEB.replace("port: 80", "port: 81"))
        assert daemon.wait() == -9
        daemon.start()
        has(daemon, "web")
        assert (reaches(web.ip4, 80), reaches(web.ip6, 81)) == (False, True)


def test_a_name_that_is_no_text_is_refused_and_told(folder: Path, daemon: Daemon) -> None:
    """A file whose name is no UTF-8 is one clear refusal, that everybody who asks is told; without it all
    is well."""
    (folder / "web.yaml").write_text(WEB)
    has(daemon, "web")
    path = os.fsencode(folder) + b"/\xff.yaml"
    Path(os.fsdecode(path)).write_text(OTHER)
    state = refused(daemon, "UTF-8")
    assert state.policies == ("NetworkPolicy default/web",)
    for command in (("policy", "list"), ("policy", "list", "--json"), ("node", "status"), ("doctor",)):
        assert "UTF-8" in daemon.cli(*command, check=False).stdout
    os.unlink(path)  # noqa: PTH108 - a name that is no text
    has(daemon, "web")
