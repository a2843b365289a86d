"""The figures of docs/performance.md: ``python -m bench [PART ...]`` (``make bench``).

Contenders run side by side in one run, in turn, round by round (bench/figures.py says why). Parts: stream,
latency, verbs, scale, policy, microvm, guests. With ``--doc``, a whole run rewrites docs/performance.md;
``--json FILE`` keeps every sample. The exit status is 0 if everything could be measured, whatever the figures
say; the goals say that.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from bench import costs, guests, microvm, policy, report
from bench.figures import Part
from bench.scale import scale
from bench.traffic import latency, stream
from bench.verbs import verbs

#: part -> (whole, quick): the quick form shows that it works and says nothing about speed
PARTS: dict[str, tuple[Callable[[], Part], Callable[[], Part]]] = {
    "stream": (lambda: stream(31, 300), lambda: stream(1, 20)),
    "latency": (lambda: latency(21, 200), lambda: latency(1, 300)),
    "verbs": (lambda: verbs(40, 15, 10), lambda: verbs(1, 1, 1)),
    "scale": (lambda: scale(10, 1000, 25, 3), lambda: scale(1, 4, 1, 1)),
    "policy": (policy.policy, policy.quick),
    "microvm": (lambda: microvm.microvm(40, 60, 30), microvm.quick),
    "guests": (lambda: guests.guests(7, 2), guests.quick),
}
#: real-time priority of the whole benchmark: above all ordinary processes, below the kernel's threads
_PRIORITY = 10


def main() -> int:
    """Measure what was asked for; print it."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all without")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything as JSON (- for stdout)")
    parser.add_argument("--doc", action="store_true", help=f"write {report.DOC.name} (needs all parts)")
    parser.add_argument("--quick", action="store_true", help="a round of each: does it work, not how fast")
    options = parser.parse_args()
    chosen = options.parts or list(PARTS)
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"no such part: {', '.join(unknown)}")
    if options.doc and (options.quick or set(chosen) != set(PARTS)):
        parser.error("--doc needs a whole run of all parts")
    if os.geteuid() != 0:
        parser.error("needs root, for network namespaces")
    # Plugins, daemons and tools inherit it: what is measured is the network, not the machine's other work.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    begun = time.time()
    result = report.Report(report.machine(), begun, [])
    for name in chosen:
        sys.stderr.write(f"{name} ...\n")
        result.parts.append(PARTS[name][options.quick]())
    result.seconds = time.time() - begun
    body = msgspec.json.format(msgspec.json.encode(result.as_json()), indent=1)
    if options.json == Path("-"):
        sys.stdout.write(body.decode() + "\n")
    else:
        if options.json is not None:
            options.json.write_bytes(body)
        sys.stdout.write(report.text(result))
    if options.doc:
        report.DOC.write_text(report.document(result, costs.section()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
