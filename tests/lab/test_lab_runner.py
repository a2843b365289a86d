"""The lab's runner without a guest: which kernels and tests it picks, and how it words a result."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lab import boot, kernels
from lab.__main__ import main, marked, run_all


def unpacked(folder: Path, *releases: str) -> None:
    """Folders that look like unpacked kernels."""
    for release in releases:
        modules = folder / release / "lib" / "modules" / release
        modules.mkdir(parents=True)
        (modules / "modules.dep").touch()


def test_newest_build_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds are ordered by number, not by letter, and 6.1 is not mistaken for 6.12."""
    monkeypatch.setenv("PORTWRIGHT_LAB_KERNELS", str(tmp_path))
    unpacked(tmp_path, "6.1.0-9-amd64", "6.1.0-56-amd64", "6.12.88+deb12-amd64", "6.12.117+deb12-amd64")

    found = [kernels.fetched(name) for name in ("6.1", "6.12")]

    assert [k and k.release for k in found] == ["6.1.0-56-amd64", "6.12.117+deb12-amd64"]


def test_half_unpacked_kernel_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel counts as there only with its modules.dep, which is made last."""
    monkeypatch.setenv("PORTWRIGHT_LAB_KERNELS", str(tmp_path))
    (tmp_path / "6.1.0-56-amd64" / "lib" / "modules" / "6.1.0-56-amd64").mkdir(parents=True)

    assert kernels.fetched("6.1") is None


def test_unknown_kernel_is_refused() -> None:
    """The error names the kernels that there are."""
    with pytest.raises(kernels.LabError, match=r"no kernel 5\.10: the lab has 6\.1, 6\.12"):
        kernels.fetched("5.10")


def test_marked_files_are_found() -> None:
    """Files that carry the mark are run under other kernels, and files without it are not."""
    chosen = marked("netns")

    assert "tests/lab/test_lab_guest.py" in chosen
    assert "tests/unit/test_layers.py" not in chosen


def test_wrong_test_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped test is refused before anything boots, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["--kernel", "6.1", "tests/netns/no_such_file.py::test_x"])

    assert stopped.value.code == 2
    assert "no such test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "problem", "ok"),
    [(0, "", True), (1, "", False), (None, "the guest died", False), (5, "no test was run", False)],
)
def test_only_tests_that_ran_and_passed_are_a_pass(status: int | None, problem: str, ok: bool) -> None:
    """Failure, death and silence all count as failures, and the summary line says which."""
    kernel = kernels.Kernel("6.1", "6.1.0-56-amd64", Path("/nowhere"))
    outcome = boot.Outcome(kernel, status, passed=3, problem=problem)

    assert outcome.ok is ok
    assert ("PASS" in str(outcome)) is ok
    assert problem in str(outcome)


def test_kernels_run_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No kernel waits for another, outcomes come in the order asked for, and each line says whose it is."""
    both = threading.Barrier(2, timeout=10)

    def run(
        kernel: kernels.Kernel, arguments: object, *, show: Callable[[str], None], **more: object
    ) -> boot.Outcome:
        both.wait()  # breaks unless both are here
        show("a\nb\n")
        return boot.Outcome(kernel, 0, passed=1)

    monkeypatch.setattr(boot, "run", run)
    chosen = [kernels.Kernel(name, f"{name}.0", Path("/nowhere")) for name in ("6.1", "6.12")]

    assert [o.kernel.name for o in run_all(chosen, [], 10)] == ["6.1", "6.12"]
    lines = capsys.readouterr().out.splitlines()
    assert {"6.1  a", "6.1  b", "6.12 a", "6.12 b"} < set(lines)


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_a_guest_that_dies_before_its_tests_is_started_once_more(
    monkeypatch: pytest.MonkeyPatch, deaths: int
) -> None:
    """Once, in the time that is left; and never after pytest began, whatever became of it then."""
    limits: list[float] = []

    def run(kernel: kernels.Kernel, arguments: object, *, limit: float, **more: object) -> boot.Outcome:
        limits.append(limit)
        if len(limits) <= deaths:
            return boot.Outcome(kernel, None, seconds=30, problem="the guest died", began=False)
        return boot.Outcome(kernel, 1, failed=1)

    monkeypatch.setattr(boot, "run", run)
    (outcome,) = run_all([kernels.Kernel("6.1", "6.1.0", Path("/nowhere"))], [], 100)

    assert limits == [100, 70][: 1 + min(deaths, 1)]
    assert outcome.began is (deaths < 2)
    assert not outcome.ok


@pytest.mark.parametrize("broken", ["6.1", "6.12"])
def test_a_kernel_that_can_not_start_stops_the_others(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A LabError of one kernel is raised at once, and the other's guest is told to end."""

    def run(
        kernel: kernels.Kernel, arguments: object, *, stop: threading.Event, **more: object
    ) -> boot.Outcome:
        if kernel.name == broken:
            raise kernels.LabError("no guest")
        assert stop.wait(10), "nobody told this guest to end"
        return boot.Outcome(kernel, None)

    monkeypatch.setattr(boot, "run", run)
    chosen = [kernels.Kernel(name, f"{name}.0", Path("/nowhere")) for name in ("6.1", "6.12")]

    with pytest.raises(kernels.LabError, match="no guest"):
        run_all(chosen, [], 10)
