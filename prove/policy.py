"""The claims of the second part: isolation by policy.

A claim that nothing shows yet is a FAIL that says so: no line is left out to look better.
"""

from __future__ import annotations

from collections.abc import Iterator

from prove.line import Line, Proof
from prove.port import benchmark
from prove.runner import Runner
from prove.suite import run_tests, shown

_PACKETS = 100_000  # generated, each judged by all three
_STATES = 674  # every distinct one of the corpora
_TIMES = 1000  # updates under traffic, and ports that start under fire


def truth(runner: Runner) -> Iterator[Line]:
    """The corpora through the engine, the compiled tables, the programs, and real connections."""
    yield shown(
        runner,
        "truth-engine",
        "truth tables through the pure engine",
        "tests/unit/test_policy_corpora.py",
        "tests/unit/test_policy_calico_programs.py",
        "tests/unit/test_policy_selector.py",
    )
    yield shown(
        runner,
        "truth-programs",
        "truth tables through the programs (BPF_PROG_TEST_RUN)",
        "tests/dataplane/test_policy_tables.py",
    )
    report = run_tests(runner, "truth-packets", ["tests/netns/test_policy_states.py"])
    figures = [report.figures.get(name, 0) for name in ("states", "allowed_pairs", "denied_pairs")]
    claim = "each distinct state by real packets, an allowed and a denied pair where it has both"
    yield Line(report.ok and min(figures) >= _STATES, claim, str(report))
    claim = "policy matrix --live sends every cell, and leaves nothing"
    live = ("tests/netns/test_policy_matrix_live.py", "tests/netns/test_policy_matrix_live_hosts.py")
    yield shown(runner, "truth-live", claim, *live)


def mutants(runner: Runner) -> Iterator[Line]:
    """Wrong engines."""
    claim = "at least 60 wrong engines are each caught by the corpora"
    yield shown(runner, "mutants", claim, "tests/unit/test_policy_mutants.py")


def fuzzing(runner: Runner) -> Iterator[Line]:
    """Generated clusters and packets, judged three times; and judges that are wrong, which it must find."""
    report = run_tests(runner, "fuzz", ["tests/dataplane/test_policy_fuzz.py"])
    enough = report.figures.get("packets", 0) >= _PACKETS
    claim = f"engine, data path and nft agree on {_PACKETS:,} generated packets"
    yield Line(report.ok and enough, claim, str(report))
    claim = "engine and compiled tables name the same rule of generated ones"
    yield shown(runner, "fuzz-tables", claim, "tests/unit/test_policy_compile.py")


def atomicity(runner: Runner) -> Iterator[Line]:
    """Updates under traffic, ports that start under fire, and a daemon that dies on the way."""
    for name, claim, test, figure in (
        (
            "atomic-updates",
            "1,000 updates under traffic, no packet with a mixed verdict",
            "test_no_packet_is_judged_by_two_generations",
            "updates",
        ),
        (
            "atomic-starts",
            "1,000 port starts, no packet before its policy",
            "test_no_packet_passes_a_port_before_its_policy",
            "port_starts",
        ),
    ):
        path = f"tests/netns/test_policy_atomic.py::{test}"
        report = run_tests(runner, name, [path], env={"PWT_TIMES": str(_TIMES)})
        yield Line(report.ok and report.figures.get(figure, 0) >= _TIMES, claim, str(report))
    claim = "SIGKILL at every step of apply: old or new, never a third"
    yield shown(runner, "kill-policy", claim, "tests/faults/test_kill_policy.py")


def reasons(runner: Runner) -> Iterator[Line]:
    """Every deny has a reason that mends it."""
    claim = "every deny in the corpora has a reason that, mended, flips the verdict"
    yield shown(runner, "reasons", claim, "tests/unit/test_policy_explain.py")


def evasion(runner: Runner) -> Iterator[Line]:
    """Packets made to slip by."""
    claim = "fragments, extension headers, out-of-state TCP, ICMP, port reuse, odd addresses: as specified"
    yield shown(runner, "evasion", claim, "tests/netns/test_policy_evasion.py")


def performance(runner: Runner) -> Iterator[Line]:
    """Every goal of the benchmark's part about policy."""
    yield from benchmark(runner, "policy")


def built(runner: Runner) -> Iterator[Line]:
    """What the issue's list of things to build has besides, each by its tests on real packets."""
    for name, claim, path in (
        (
            "names",
            "only what a name resolved to, for its time, is reached, whoever means ill",
            "tests/netns/test_policy_dns*.py",
        ),
        (
            "folder",
            "a watched folder is in force whole, or nothing of it has changed",
            "tests/netns/test_policy_folder.py",
        ),
        (
            "on-change",
            "what is open ends as the policy says: keep, recheck, reset",
            "tests/netns/test_policy_on_change.py",
        ),
        (
            "isolation",
            "where no policy decides, a network's isolation does: open, tenant, strict",
            "tests/netns/test_network_isolation.py",
        ),
        (
            "whatif",
            "dry runs and staged policies say which pairs change, and change nothing",
            "tests/netns/test_policy_whatif.py",
        ),
        (
            "source-ports",
            "rules that ask for the sender's port, by both sides, on answers too",
            "tests/netns/test_policy_sources.py",
        ),
        (
            "hosts",
            "host endpoints: untracked, before DNAT, forwarded, local, failsafes; as their judge says",
            "tests/netns/test_policy_hosts*.py",
        ),
        (
            "early",
            "XDP drops what an untracked policy denies all of; never failsafe ports, nor where others are",
            "tests/netns/test_host_early.py",
        ),
    ):
        yield shown(runner, name, claim, path)


PROOFS = (
    Proof("1", "truth tables", truth),
    Proof("2", "the tests are tested", mutants),
    Proof("3", "differential fuzzing", fuzzing),
    Proof("4", "atomicity", atomicity),
    Proof("5", "reasons", reasons),
    Proof("6", "evasion", evasion),
    Proof("7", "performance", performance),
    Proof("build", "what else is built", built),
)
