"""What a proof says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prove.runner import Runner


@dataclass(frozen=True, slots=True)
class Line:
    """One claim with what was found: ``figure`` is measured, never copied from a document."""

    ok: bool
    claim: str
    figure: str

    def __str__(self) -> str:
        return f"{'PASS' if self.ok else 'FAIL'}  {self.claim}: {self.figure}"


@dataclass(frozen=True, slots=True)
class Proof:
    """A number of the issue's list, and what runs for it.

    ``run`` yields a line for each claim as soon as it is known. An exception it raises becomes a FAIL.
    """

    number: str
    title: str
    run: Callable[[Runner], Iterable[Line]]


def lines_of(proof: Proof, runner: Runner) -> Iterable[Line]:
    """The lines of a proof, numbered; at least one, and never an exception."""
    said = 0
    try:
        for line in proof.run(runner):
            said += 1
            yield Line(line.ok, f"{proof.number}. {line.claim}", line.figure)
    except Exception as error:  # noqa: BLE001 - a proof that breaks has not shown its claim
        yield Line(False, f"{proof.number}. {proof.title}", f"{type(error).__name__}: {error}")
        return
    if not said:
        yield Line(False, f"{proof.number}. {proof.title}", "nothing was shown")
