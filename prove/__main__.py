"""``python -m prove PART``: the lines go to stdout, progress and failures' logs to stderr.

Exit status 0 if every line is a PASS, 1 if one is not, 2 for wrong usage. Needs root. Logs of what
was run are in build/prove; on the machine nothing is left, and the last line shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict

from portwright.kernel.signals import terminable
from prove import leftovers, microvm, policy, port
from prove.line import Line, Proof, lines_of
from prove.runner import PROJECT, Runner

PARTS: dict[str, tuple[Proof, ...]] = {
    "port": port.PROOFS,
    "policy": policy.PROOFS,
    "microvm": microvm.PROOFS,
}


def main(argv: list[str] | None = None) -> int:
    """Run a part's proofs, in order; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m prove", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--only", action="append", metavar="N", help="only this number; repeatable")
    parser.add_argument("--json", action="store_true", help="the lines as JSON objects, one a line")
    given = parser.parse_args(argv)
    proofs = [proof for proof in PARTS[given.part] if not given.only or proof.number in given.only]
    if not proofs:
        parser.error(f"no proof of that number; there are {', '.join(p.number for p in PARTS[given.part])}")
    if os.geteuid() != 0:
        parser.error("needs root: it makes network namespaces and loads BPF programs")

    with terminable(signal.SIGTERM, signal.SIGHUP):  # what is run is ended first, as after ^C
        return _prove(proofs, as_json=given.json)


def _prove(proofs: list[Proof], *, as_json: bool) -> int:
    runner = Runner(PROJECT / "build/prove")
    before = leftovers.look()
    failed = 0
    for proof in proofs:
        runner.say(f"{proof.number}. {proof.title}")
        for line in lines_of(proof, runner):
            failed += not line.ok
            _print(line, as_json=as_json)
    left, note = leftovers.left_since(before, runner.pids)
    figure = "; ".join(left[:20]) or "no link, namespace, program, mount, process or folder"
    figure = f"{figure} ({note})" if note else figure
    _print(Line(not left, "nothing is left behind on this machine", figure), as_json=as_json)
    return 1 if failed or left else 0


def _print(line: Line, *, as_json: bool) -> None:
    print(json.dumps(asdict(line)) if as_json else line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
