"""The claims of the second part: isolation by policy.

A claim that nothing shows yet is a FAIL that says so: no line is left out to look better.
"""

from __future__ import annotations

from collections.abc import Iterator

from prove.line import Line, Proof
from prove.runner import Runner
from prove.suite import run_tests

_ABSENT = "not built yet"


def truth(runner: Runner) -> Iterator[Line]:
    """The corpora through the engine, the compiled tables, the programs, and real connections."""
    for name, claim, paths in (
        (
            "truth-engine",
            "truth tables through the pure engine",
            [
                "tests/unit/test_policy_corpora.py",
                "tests/unit/test_policy_calico_programs.py",
                "tests/unit/test_policy_selector.py",
            ],
        ),
        (
            "truth-programs",
            "truth tables through the programs (BPF_PROG_TEST_RUN)",
            ["tests/dataplane/test_policy_tables.py"],
        ),
    ):
        report = run_tests(runner, name, paths)
        yield Line(report.ok, claim, str(report))
    report = run_tests(runner, "truth-packets", ["tests/netns/test_policy_path.py"])
    figure = f"a few policies only ({report}); the corpora's states by real packets: {_ABSENT}"
    yield Line(False, "each distinct state by real packets", figure)


def mutants(runner: Runner) -> Iterator[Line]:
    """Wrong engines."""
    report = run_tests(runner, "mutants", ["tests/unit/test_policy_mutants.py"])
    yield Line(report.ok, "at least 60 wrong engines are each caught by the corpora", str(report))


def fuzzing(runner: Runner) -> Iterator[Line]:
    """Generated policies: the engine against the compiled tables; nft and the programs are to come."""
    report = run_tests(runner, "fuzz", ["tests/unit/test_policy_compile.py"])
    figure = f"engine against compiled tables ({report}); the programs and nft: {_ABSENT}"
    yield Line(False, "engine, data path and nft agree on 100,000 generated packets", figure)


def atomicity(runner: Runner) -> Iterator[Line]:
    """Updates under traffic."""
    report = run_tests(runner, "atomic", ["tests/netns/test_policy_atomic.py"])
    yield Line(report.ok, "updates under traffic, no packet with a mixed verdict", str(report))
    yield Line(False, "1,000 port starts, no packet before its policy", _ABSENT)
    report = run_tests(runner, "kill-policy", ["tests/faults/test_kill_policy.py"])
    yield Line(report.ok, "SIGKILL at every step of apply: old or new, never a third", str(report))


def reasons(runner: Runner) -> Iterator[Line]:
    """Every deny has a reason that mends it."""
    report = run_tests(runner, "reasons", ["tests/unit/test_policy_explain.py"])
    claim = "every deny in the corpora has a reason that, mended, flips the verdict"
    yield Line(report.ok, claim, str(report))


def evasion(_runner: Runner) -> Iterator[Line]:
    """Packets made to slip by."""
    yield Line(False, "evasion", f"fragments, port reuse and fake replies have tests; the list: {_ABSENT}")


def performance(_runner: Runner) -> Iterator[Line]:
    """The figures against nftables and ipset."""
    yield Line(False, "policy's performance goals", _ABSENT)


PROOFS = (
    Proof("1", "truth tables", truth),
    Proof("2", "the tests are tested", mutants),
    Proof("3", "differential fuzzing", fuzzing),
    Proof("4", "atomicity", atomicity),
    Proof("5", "reasons", reasons),
    Proof("6", "evasion", evasion),
    Proof("7", "performance", performance),
)
