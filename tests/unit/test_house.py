"""House rules that no linter knows: every test states its property, no test sleeps, modules stay small."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
TESTS = sorted((PROJECT / "tests").rglob("*.py"))
SOURCES = sorted((PROJECT / "src").rglob("*.py"))

LONGEST_PAUSE = 0.1  # seconds between two looks of a poll that has a deadline


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def place(file: Path, line: int) -> str:
    """``tests/unit/test_x.py:12``."""
    return f"{file.relative_to(PROJECT)}:{line}"


def test_every_test_states_its_property() -> None:
    """A test's docstring says what holds, so that a failure can be read without the test's code."""
    silent = [
        f"{place(file, function.lineno)} {function.name}"
        for file in TESTS
        if file.name.startswith("test_")
        for function in functions(file)
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]

    assert silent == []


def test_no_test_sleeps() -> None:
    """Time passes in tests only as the short pause of a poll with a deadline, never inside a test itself."""
    sleeps = []
    for file in TESTS:
        for function in functions(file):
            for node in ast.walk(function):
                if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("sleep")):
                    continue
                pause = node.args[0] if node.args else None
                known = float(str(pause.value)) if isinstance(pause, ast.Constant) else None
                # sleep(0) lets other tasks run, and no time passes.
                if known != 0 and (function.name.startswith("test_") or (known or 0) > LONGEST_PAUSE):
                    sleeps.append(f"{place(file, node.lineno)} {ast.unparse(node)}")

    assert sleeps == []


def test_modules_stay_small() -> None:
    """A module of the product has at most 400 lines; what is generated is exempt."""
    long = {}
    for file in SOURCES:
        lines = file.read_text().splitlines()
        if len(lines) > 400 and "generated" not in "".join(lines[:3]).lower():
            long[place(file, len(lines))] = len(lines)

    assert long == {}


def test_each_ignored_rule_has_its_reason() -> None:
    """Every rule that ruff is told to ignore in pyproject.toml is followed by the reason."""
    text = (PROJECT / "pyproject.toml").read_text()
    ignored = re.findall(r'^    "[A-Z]+\d*",.*$', text, re.MULTILINE)

    assert ignored
    assert [line for line in ignored if not re.search(r"  # \w.{10,}", line)] == []


def test_each_package_has_its_reason() -> None:
    """Every line of packaging/apt.txt names one package, one known use, and why."""
    lines = (PROJECT / "packaging" / "apt.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    shape = re.compile(r"[a-z0-9][a-z0-9.+-]+ +# \[(build|run|test|bench|lint|lab)\] \w.{5,}")

    assert [line for line in packages if not shape.fullmatch(line)] == []
    names = [line.split()[0] for line in packages]
    assert len(names) == len(set(names))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to take the network away")
def test_setup_is_idle_when_all_is_there() -> None:
    """`make setup` on a machine that is set up prints nothing and needs no network, stdin or terminal."""
    stamp = PROJECT / ".venv" / "portwright-dev.stamp"
    if not stamp.exists() or stamp.read_bytes() != (PROJECT / "pyproject.toml").read_bytes():
        pytest.skip("pyproject.toml was changed since `make setup`")
    done = subprocess.run(
        ["unshare", "--net", "packaging/setup.sh"],
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
