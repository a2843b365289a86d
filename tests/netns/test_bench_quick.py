"""The benchmark's shape: it runs, it judges, it is written down. Its speed is nobody's business here."""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import policy_fleet, policy_rules, report
from bench.figures import Goal, Part, Series, at_least, at_most, spread
from portwright.api import calls
from portwright.api.frames import HEADER, MAX_REQUEST
from portwright.api.wire import request_frame
from portwright.policy.compile import compile_policies
from portwright.policy.manifests.read import read
from portwright.policy.rules import TCP, UDP, Flow
from portwright.policy.tables import Tables
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


@pytest.mark.parametrize("count", [2, 100, 250])
def test_every_contender_of_policy_has_the_same_pairs(count: int) -> None:
    """What nft and iptables are told, as sets and as lists, is what the manifests say, pair by pair; and
    compiled they let each of them in, and nobody to the service that is closed."""
    server, client = "10.0.0.3", "10.0.0.2"
    pairs = [pair for policy in policy_rules.policies(count) for pair in policy]
    assert len(pairs) == count
    named = {pair for pair in pairs if pair.source.startswith("app=")}
    expected = {(pair.source, pair.protocol, pair.port) for pair in pairs if pair not in named}
    expected |= {(client, protocol, policy_rules.SERVICE) for protocol in ("tcp", "udp")}

    as_set = policy_rules.nft(count, server, client, linear=False)
    found = re.findall(r"([\w.:/]+) \. (tcp|udp) \. (\d+)", as_set)
    assert typed(found) == expected
    as_list = policy_rules.nft(count, server, client, linear=True)
    assert typed(re.findall(r"saddr (\S+) (tcp|udp) dport (\d+) return", as_list)) == expected
    sets = policy_rules.ipset(count, client)
    assert typed(re.findall(r"add in[46] (\S+),(tcp|udp):(\d+)", sets)) == expected
    lists = "".join(policy_rules.iptables(count, server, client, linear=True).values())
    assert typed(re.findall(r"server_in -s (\S+) -p (tcp|udp) -m \w+ --dport (\d+)", lists)) == expected

    pods = policy_rules.pods([server, "fd00::3"], [client, "fd00::2"])
    manifests = read([*policy_rules.manifests(count), pods])
    tables = Tables(compile_policies(manifests.policy_set, manifests.snapshot))
    for source, protocol, port in expected:
        net = ipaddress.ip_network(source)
        to = server if net.version == 4 else "fd00::3"
        number = {"tcp": TCP, "udp": UDP}[protocol]
        for asked, allowed in ((port, True), (policy_rules.CLOSED, False)):
            flow = Flow(source=str(net[0]), destination=to, protocol=number, source_port=5000, port=asked)
            assert tables.lookup(flow).allowed is allowed, flow


def typed(rows: list[tuple[str, str, str]]) -> set[tuple[str, str, int]]:
    """Pairs out of the words of a tool; none stands there twice."""
    assert len(set(rows)) == len(rows)
    return {(source, protocol, int(port)) for source, protocol, port in rows}


def test_a_great_policy_comes_in_requests_that_the_daemon_takes() -> None:
    """100,000 rules are more than one request holds; each of them is within the API's bound, none is lost."""
    files = policy_rules.manifests(100_000)
    batches = list(policy_rules.requests(files))
    assert 1 < len(batches) < 5
    assert [file for batch in batches for file in batch] == files
    for batch in batches:
        call = calls.policy_apply(batch)
        assert len(request_frame(1, call.method, call.params)) - HEADER.size <= MAX_REQUEST


def test_a_fleet_has_as_many_policies_as_it_says() -> None:
    """1,000 policies over 20 teams; every one selects some of the ports, and nothing in them looks odd."""
    found = read([*policy_fleet.manifests(1_000), policy_fleet.everybody("Deny"), policy_fleet.one_app(80)])
    assert len(found.policy_set.policies) == 1_002
    assert not found.warnings
    labels = {tuple(sorted(policy_fleet.labels_of(n).items())) for n in range(1_000)}
    assert len(labels) == 1_000


@pytest.mark.netns
@pytest.mark.alone
@pytest.mark.parametrize(
    "part",
    ["stream", "latency", "verbs", "scale", "microvm", pytest.param("policy", marks=pytest.mark.slow)],
)
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
