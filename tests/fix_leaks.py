"""Pytest plugin: fails a session that left something behind on the machine.

What is compared, start with end: links, qdiscs, named namespaces, nft tables, pinned BPF objects,
loaded BPF programs of ours, mounts, cgroups, processes, work folders, and this process's own
namespace, BPF and tun descriptors.

Whose is it? A machine has other actors, so a new object is not a leak of *this* session as such:

- **Marked** objects are ours beyond doubt, and fail the session always. The mark is
  ``pwt-<pid>-`` (``MARK``): in the name, alternative name or alias, in the path, or, for processes, in the
  environment, where every process that a test starts inherits it as ``PWT_SESSION``. Objects
  that can't carry it (a representor made by a daemon in the host's namespace) are marked by name:
  ``leaks.record("link pw01234567")``. Recording is not making: a recorded object that is gone at the end, as
  it should be, is nothing.
- **Unmarked** objects that are new fail the session when it ran *alone*. Alone means that no other
  session with this plugin overlapped it: each holds a lock file in ``/tmp/pwt-sessions``, and one that
  starts writes its pid into the files of all that are running. With a neighbour, unmarked objects
  are only printed. CI runs alone, so there nothing escapes.

With workers (pytest-xdist) the session is the process that was started: it alone announces itself and looks
around, when all workers have ended. Each worker has a mark of its own, which is the session's too, and looks
only after its own descriptors; it tells the session the mark, what was recorded, and what it left open.

What it can't know: a program outside pytest (docker, a second shell) that makes links meanwhile is
blamed on a session that ran alone; run it again. An object that a session made *and* that existed
under the same name before is not seen. Objects inside a namespace go with it, so only its name or
a descriptor that keeps it alive is looked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from tests.deadline import wait_until

MARK = f"pwt-{os.getpid()}-"
"""What every name that this session gives to something on the machine begins with."""

SESSIONS = Path("/tmp/pwt-sessions")
SETTLE = 5.0  # seconds that the kernel has to finish what was asked of it (namespaces go asynchronously)

Snapshot = dict[str, str]
"""Object ("link pw0", "netns x") -> the text in which the mark is looked for."""


# --- what there is ------------------------------------------------------------------------------


def links() -> Iterator[tuple[str, str]]:
    """The links of this namespace, with their alternative names and aliases."""
    for link in _json("ip", "-j", "link", "show"):
        words = [link["ifname"], *link.get("altnames", []), link.get("ifalias", "")]
        yield f"link {link['ifname']}", " ".join(words)


def qdiscs() -> Iterator[tuple[str, str]]:
    """The qdiscs that somebody added."""
    for qdisc in _json("tc", "-j", "qdisc", "show"):
        # Handle 0: the kernel's own, made and unmade with the link.
        if qdisc.get("handle", "0:") != "0:":
            name = f"qdisc {qdisc['kind']} {qdisc['handle']} on {qdisc.get('dev', '?')}"
            yield name, name


def namespaces() -> Iterator[tuple[str, str]]:
    """The names in /run/netns."""
    folder = Path("/run/netns")
    for path in folder.iterdir() if folder.is_dir() else ():
        yield f"netns {path.name}", path.name


def nft_tables() -> Iterator[tuple[str, str]]:
    """The nft tables of this namespace."""
    for item in _json("nft", "-j", "list", "tables").get("nftables", []):
        if table := item.get("table"):
            name = f"nft table {table['family']} {table['name']}"
            yield name, name


def pins() -> Iterator[tuple[str, str]]:
    """Files and folders in the machine's bpffs."""
    for folder, folders, files in os.walk("/sys/fs/bpf"):
        for name in (*folders, *files):
            yield f"pin {folder}/{name}", f"{folder}/{name}"


def programs() -> Iterator[tuple[str, str]]:
    """Loaded BPF programs whose name says that they are ours: held by a link, a filter or a descriptor."""
    for program in _json("bpftool", "-j", "prog", "show"):
        if program.get("name", "").startswith(("pw_", "pwt_")):
            yield f"bpf program {program['name']} id {program['id']}", ""


def mounts() -> Iterator[tuple[str, str]]:
    """Mounts at, or of, something of ours."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if "portwright" in line or "pwt-" in line:
            fields = line.split()
            yield f"mount {fields[4]}", line


def cgroups() -> Iterator[tuple[str, str]]:
    """Cgroups that are named after us, two levels down: where daemons and tests put them."""
    root = next((p for p in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")) if p.is_dir()), None)
    for pattern in ("*", "*/*") if root else ():
        for path in root.glob(pattern) if root else ():
            if path.is_dir() and ("portwright" in path.name or "pwt-" in path.name):
                yield f"cgroup {path}", str(path)


def processes() -> Iterator[tuple[str, str]]:
    """Daemons, and everything that a test session started."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone meanwhile
        session = next((v for v in environment if v.startswith(b"PWT_SESSION=")), b"").decode()
        # A zombie has no command line: its parent has yet to wait for it, and that may be us.
        if command and (session or "portwright node run" in command):
            yield f"process {folder.name} {command[:120]}", f"{session} {command}"


def folders() -> Iterator[tuple[str, str]]:
    """Work folders, by the convention /tmp/pwt-<pid>-... of the tests."""
    for path in Path("/tmp").glob("pwt-*-*"):
        yield f"folder {path}", path.name


def descriptors() -> Iterator[tuple[str, str]]:
    """This process's descriptors of namespaces, BPF objects and taps: each keeps kernel objects alive."""
    for number in os.listdir("/proc/self/fd"):  # noqa: PTH208 - Path.iterdir holds a descriptor of its own
        try:
            target = str(Path(f"/proc/self/fd/{number}").readlink())
        except OSError:
            continue
        if target.startswith(("net:[", "anon_inode:bpf", "/dev/net/tun", "/run/netns/")):
            # Marked: nobody else can have opened it.
            yield f"descriptor {number} {target}", MARK


KINDS: tuple[Callable[[], Iterator[tuple[str, str]]], ...] = (
    *(links, qdiscs, namespaces, nft_tables, pins, programs),
    *(mounts, cgroups, processes, folders, descriptors),
)


def snapshot() -> Snapshot:
    """Everything that a session could leave behind, as it is now."""
    gc.collect()  # what only a dead cycle still holds is no leak
    return {name: text for kind in KINDS for name, text in kind()}


def judge(
    before: Mapping[str, str],
    after: Mapping[str, str],
    recorded: set[str],
    alone: bool,
    workers: Iterable[str] = (),
) -> tuple[list[str], list[str]]:
    """(what this session left behind, what may be a neighbour's), each sorted. Pure.

    ``workers``: the marks of this session's workers.
    """
    ours = {MARK, *workers}
    new = {name: set(re.findall(r"pwt-\d+-", text)) for name, text in after.items() if name not in before}
    marked = {name for name, marks in new.items() if marks & ours or name in recorded}
    others = {name for name, marks in new.items() if name not in marked and not marks}
    return sorted(marked | others if alone else marked), sorted(set() if alone else others)


# --- the session --------------------------------------------------------------------------------


class Leaks:
    """The check of one session; registered as the plugin "leaks"."""

    def __init__(self) -> None:
        self.recorded: set[str] = set()
        self._before: Snapshot = {}
        self._lock: IO[str] | None = None
        self._met = False
        self._workers: set[str] = set()
        self._told: list[str] = []

    def record(self, *objects: str) -> None:
        """Mark objects that can't carry the mark themselves: ``record("link pw01234567")``."""
        self.recorded.update(objects)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Announce this session, mark its children, and look around."""
        os.environ["PWT_SESSION"] = MARK
        SESSIONS.mkdir(exist_ok=True, mode=0o777)
        # One at a time, or a file that is opened and not yet locked would look like a dead session's.
        with (SESSIONS / "door").open("a") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            # Opened to append, because others write to it too.
            self._lock = (SESSIONS / f"{os.getpid()}").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._met = self._greet()
        self._before = snapshot()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker told at its end. One that crashed told nothing, and fails the run."""
        if told := getattr(node, "workeroutput", {}).get("leaks"):
            self._workers.add(told["mark"])
            self.recorded.update(told["recorded"])
            self._told += told["left"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Look again, until nothing is left or it is clear that something stays."""
        if workers := session.config.pluginmanager.get_plugin("dsession"):
            workers.pytest_sessionfinish()  # they wait to be ended; its own call will find none
        left, doubtful = self._settle()
        left += self._told
        assert self._lock is not None
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()
        if doubtful:
            text = "new on this machine, ours or another session's:\n  " + "\n  ".join(doubtful)
            session.config.stash[NOTE] = text
        if left:
            report = pytest.CollectReport(
                nodeid="leak check",
                outcome="failed",
                longrepr="left behind by this session:\n  " + "\n  ".join(left),
                result=[],
            )
            # As an error of collection it is counted in the closing line and in junit's file.
            session.config.hook.pytest_collectreport(report=report)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what can't be told to be ours."""
        if note := terminalreporter.config.stash.get(NOTE, ""):
            terminalreporter.section("leak check")
            terminalreporter.line(note)

    def _settle(self) -> tuple[list[str], list[str]]:
        verdict: tuple[list[str], list[str]] = ([], [])

        def nothing_left() -> bool:
            nonlocal verdict
            verdict = self._judge()
            return not verdict[0]

        with contextlib.suppress(AssertionError):  # the verdict says what stayed
            wait_until(nothing_left, SETTLE, "the session's objects to go")
        return verdict

    def _judge(self) -> tuple[list[str], list[str]]:
        return judge(self._before, snapshot(), self.recorded, self._alone(), self._workers)

    def _greet(self) -> bool:
        """Tell every running session of this one; whether there was any."""
        met = False
        for path in SESSIONS.iterdir():
            if path.name in {str(os.getpid()), "door"}:
                continue
            try:
                with path.open("a+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink(missing_ok=True)  # its session died without cleaning up
            except BlockingIOError:
                met = True
                with path.open("a") as file:
                    file.write(f"{os.getpid()}\n")
            except FileNotFoundError:
                continue
        return met

    def _alone(self) -> bool:
        """Whether no other session overlapped this one up to now."""
        assert self._lock is not None
        self._lock.seek(0)
        return not self._met and not self._lock.read().strip()


class WorkerLeaks(Leaks):
    """A worker's part of the check: what only the process itself knows."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Mark this worker's children."""
        os.environ["PWT_SESSION"] = MARK
        self._before = dict(descriptors())

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Tell the session."""
        left, _ = self._settle()
        told = {"mark": MARK, "recorded": sorted(self.recorded), "left": left}
        session.config.workeroutput["leaks"] = told  # type: ignore[attr-defined]  # pytest-xdist adds it

    def _judge(self) -> tuple[list[str], list[str]]:
        gc.collect()
        return judge(self._before, dict(descriptors()), set(), alone=False)


NOTE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the check: only for root, who alone can leave things behind in the kernel."""
    if os.geteuid() == 0 and not config.option.collectonly:
        is_worker = hasattr(config, "workerinput")
        config.pluginmanager.register(WorkerLeaks() if is_worker else Leaks(), "leaks")


@pytest.fixture(scope="session")
def leaks(request: pytest.FixtureRequest) -> Leaks:
    """The session's check, to record objects that can't carry the mark."""
    found = request.config.pluginmanager.get_plugin("leaks")
    return found if isinstance(found, Leaks) else Leaks()


def _json(*command: str) -> Any:
    """Output of a command that prints JSON; an empty object when there is none or no such command."""
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return {}
    try:
        return json.loads(done.stdout) if done.returncode == 0 and done.stdout.strip() else {}
    except json.JSONDecodeError:
        return {}
