"""``python -m lab [--kernel 6.1]… [--limit SECONDS] [--fetch] [TEST]… [-- PYTEST-ARGUMENTS]``.

Without TEST, all tests that carry the mark ``netns``; with ``--fetch`` none: it ends with the kernels here.
Several kernels run at the same time, each line of theirs behind its kernel's name. Exit status: 0 if they
passed under every kernel, 1 if not, 2 for a wrong command line. The last line is ``N passed, N failed``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from lab import boot, kernels


def marked(mark: str) -> list[str]:
    """The test files that mention ``mark``, relative to the project.

    Chosen here and not by the guest's ``-m`` alone: collecting all tests imports all that they use,
    which takes emulated minutes.
    """
    files = sorted((boot.PROJECT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(boot.PROJECT)) for f in files if f"mark.{mark}" in f.read_text()]


def main(arguments: list[str]) -> int:
    """Run the command; its exit status."""
    extra: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, extra = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m lab", description="Tests under other kernels.")
    parser.add_argument(
        "--kernel", action="append", choices=list(kernels.META_PACKAGES), help="once or more; default: all"
    )
    parser.add_argument("--limit", type=float, default=5400.0, help="seconds for each kernel, boot included")
    parser.add_argument("--fetch", action="store_true", help="download what kernels are missing, and end")
    parser.add_argument("test", nargs="*", help="file or file::test; default: all marked netns")
    options = parser.parse_args(arguments)
    if options.fetch and options.test:
        parser.error("--fetch runs no tests")
    for test in options.test:
        if not (boot.PROJECT / test.partition("::")[0]).exists():
            parser.error(f"no such test: {test}")

    selection = options.test or ["-m", "netns", *marked("netns")]
    # Emulation is five to ten times slower than the machine that the tests' own limits were set on.
    pytest_args = ["-v", "--color=no", "--durations=10", "-o", "timeout=600", *extra, *selection]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by an exception, which ends the guests
    try:
        if os.geteuid() != 0:
            raise kernels.LabError("the lab needs root: the guest's root reads what only root may")
        chosen = [kernels.fetch(name) for name in dict.fromkeys(options.kernel or kernels.META_PACKAGES)]
        if options.fetch:
            print("\n".join(f"{kernel.name}: {kernel.image}" for kernel in chosen))
            return 0
        outcomes = run_all(chosen, pytest_args, options.limit)
    except kernels.LabError as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 1
    print("\nlab: summary")
    for outcome in outcomes:
        print(outcome)
    failed = sum(max(outcome.failed, 0 if outcome.ok else 1) for outcome in outcomes)
    print(f"{sum(outcome.passed for outcome in outcomes)} passed, {failed} failed")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def run_all(chosen: Sequence[kernels.Kernel], pytest_args: Sequence[str], limit: float) -> list[boot.Outcome]:
    """Run the tests under all of the kernels at once, each a guest of its own; the outcomes in that order.

    Raises LabError as boot.run does. However it ends, all guests are gone then.
    """
    stop = threading.Event()

    def one(kernel: kernels.Kernel) -> boot.Outcome:
        show = shower(f"{kernel.name:<5}" if len(chosen) > 1 else "")
        show(f"lab: booting {kernel.release}\n")
        outcome = boot.run(kernel, pytest_args, limit=limit, show=show, stop=stop)
        if not outcome.began and not stop.is_set():
            # Debian's kernel now and then dies under emulation while it patches itself at boot.
            show(f"{outcome}\nlab: it died before any test; once more\n")
            left = limit - outcome.seconds
            outcome = boot.run(kernel, pytest_args, limit=left, show=show, stop=stop)
        show(f"{outcome}\n")
        return outcome

    with ThreadPoolExecutor(len(chosen)) as pool:
        try:
            running = [pool.submit(one, kernel) for kernel in chosen]
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    return [future.result() for future in running]


def shower(prefix: str) -> Callable[[str], None]:
    """A function that passes whole lines on at once, each behind ``prefix``."""

    def show(text: str) -> None:
        if text:
            sys.stdout.write("".join(f"{prefix}{line}" for line in text.splitlines(keepends=True)))
            sys.stdout.flush()

    return show


if __name__ == "__main__":
    # So that the tree is found when the command is run from elsewhere by its path.
    os.chdir(Path(__file__).resolve().parent.parent)
    sys.exit(main(sys.argv[1:]))
