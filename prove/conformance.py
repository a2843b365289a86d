"""Which of the sixty black-box cases of tests/conformance/README.md a run of the suite has shown."""

from __future__ import annotations

import re

from prove.line import Line
from prove.suite import Report

CASES = 60
#: Cases of a model or a feature that comes later, and the part (issue) that brings it.
LATER = {
    32: "VLAN access ports (tenant)",
    33: "VLAN trunk ports (tenant)",
    57: "source-based routing (tenant)",
    60: "Multus (tenant)",
}
_CASE = re.compile(r"test_case_(\d+)_")


def judge(report: Report) -> Line:
    """One line: every case that is not of a later issue has tests, and all of them pass."""
    seen: dict[int, bool] = {}
    for name in report.passed:
        if found := _CASE.match(name):
            seen.setdefault(int(found[1]), True)
    failed = {int(m[1]) for m in map(_CASE.match, (*report.failed, *report.skipped)) if m}
    for case in failed:
        seen[case] = False
    passed = {case for case, ok in seen.items() if ok}
    missing = set(range(1, CASES + 1)) - set(seen) - set(LATER)
    said = [f"{len(passed)} of {CASES} cases", str(report)]
    if failed:
        said.append(f"failed: {_list(failed)}")
    if missing:
        said.append(f"without a test: {_list(missing)}")
    said.append(
        "with a later part: "
        + "; ".join(f"{case} {why}" for case, why in LATER.items() if case not in passed)
    )
    return Line(report.ok and not missing, "the black-box CNI cases, driven as by a runtime", ", ".join(said))


def _list(cases: set[int]) -> str:
    return " ".join(str(case) for case in sorted(cases))
