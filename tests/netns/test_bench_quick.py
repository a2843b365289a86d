"""The benchmark's shape: it runs, it judges, it is written down. Its speed is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.figures import Goal, Part, Series, at_least, at_most, spread
from tests.deadline import PATIENCE

HERE = Path(__file__).parents[2]


def series(ours: list[float], theirs: list[float], *, more: bool = True) -> Series:
    """A series of two contenders."""
    return Series("x", "s", {"portwright": ours, "other": theirs}, "more" if more else "less")


def test_a_spread_is_the_median_between_its_quartiles() -> None:
    """Quartiles interpolate, and one wild sample moves none of the three far."""
    found = spread([5, 1, 2, 3, 4])
    assert (found.low, found.median, found.high) == (2, 3, 4)
    assert spread([1, 2, 3, 4, 1000]).high == 4
    assert spread([2]).low == spread([2]).high == 2


def test_a_ratio_compares_within_a_round() -> None:
    """A machine that slows down for both halfway through does not change the ratio at all."""
    drifting = series([10, 10, 5, 5], [20, 20, 10, 10])
    found = drifting.ratio("portwright", "other")
    assert (found.low, found.median, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("ours", "met"), [(97.0, True), (96.0, False)])
def test_a_goal_of_speed_is_met_from_its_limit_on(ours: float, met: bool) -> None:
    """At least 0.97 of the other."""
    goal = at_least("g", series([ours], [100]), "portwright", "other", 0.97)
    assert goal.met is met


def test_a_goal_of_speed_turns_a_latency_round() -> None:
    """Twice the other's latency is half as good."""
    goal = at_least("g", series([20], [10], more=False), "portwright", "other", 0.95)
    assert not goal.met
    assert goal.figure.startswith("0.5 ")


@pytest.mark.parametrize(("ours", "met"), [(50.0, True), (51.0, False)])
def test_a_goal_of_time_is_met_up_to_its_limit(ours: float, met: bool) -> None:
    """At most half of the other."""
    assert at_most("g", series([ours], [100], more=False), "portwright", "other", 0.5).met is met


def test_the_document_names_every_figures_command_and_every_missed_goal() -> None:
    """A part's table stands below the command that makes it, and a missed goal can't be overlooked."""
    part = Part("stream", [series([1], [2])], [Goal("fast", False, "0.5"), Goal("small", True, "1")])
    text = report.document(report.Report(report.machine(), 0.0, [part]))
    assert "`python -m bench stream`" in text
    assert "| fast | 0.5 | **missed** |" in text
    assert "| small | 1 | met |" in text
    assert text.index("bench stream") < text.index("| other |")


@pytest.mark.netns
@pytest.mark.parametrize("part", ["stream", "latency", "verbs", "scale"])
def test_each_part_runs_and_leaves_nothing(part: str, tmp_path: Path) -> None:
    """A round of everything: samples of every contender, goals with figures, and a clean machine."""
    result = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench", "--quick", "--json", str(result), part]
    done = subprocess.run(
        command, cwd=HERE, check=False, capture_output=True, text=True, timeout=110 * PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.loads(result.read_text())
    (found,) = body["parts"]
    assert found["name"] == part
    for one in found["series"]:
        assert one["samples"]
        for samples in one["samples"].values():
            assert samples
            assert all(value > 0 for value in samples)
    assert body["goals"] == found["goals"] != []
    for goal in body["goals"]:
        assert set(goal) == {"name", "met", "figure"}
        assert goal["name"] in done.stdout


def test_unknown_parts_and_half_documents_are_refused(tmp_path: Path) -> None:
    """A typing error is exit status 2, and a document is never written from some of the parts."""
    for arguments in (["nonsense"], ["--doc", "stream"], ["--doc", "--quick"]):
        done = subprocess.run(
            [sys.executable, "-m", "bench", *arguments],
            cwd=HERE,
            check=False,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 2, arguments
