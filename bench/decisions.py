"""The figures behind docs/design.md's decisions: ``python -m bench.decisions`` prints them, in a minute.

As root; the links are made in a network namespace of its own, which goes with the process.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
SHIM = PROJECT / "src/portwright/cni/shim/portwright-cni"
OBJECT = PROJECT / "src/portwright/dataplane/portwright.bpf.o"
_INSIDE = "PORTWRIGHT_DECISIONS_INSIDE"


def main() -> int:
    """Measure and print; 0."""
    if os.environ.get(_INSIDE) != "1":
        unshare = shutil.which("unshare") or "unshare"
        command = [unshare, "--net", sys.executable, "-m", "bench.decisions"]
        return subprocess.run(command, env={**os.environ, _INSIDE: "1"}, check=False).returncode
    print(f"kernel {os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    starts()
    attaching()
    links()
    return 0


def starts() -> None:
    """What an executable costs before it does anything: the reason for a shim in C."""
    version = {**os.environ, "CNI_COMMAND": "VERSION"}
    for what, command in (
        ("/bin/true", ["/bin/true"]),
        ("the CNI shim, VERSION", [str(SHIM)]),
        ("python -I -S, nothing imported", [sys.executable, "-I", "-S", "-c", "pass"]),
        ("python -I, json and socket imported", [sys.executable, "-I", "-c", "import json, socket"]),
        ("python, portwright's client imported", [sys.executable, "-c", "import portwright.api.client"]),
    ):
        show(f"start of {what}", lambda command=command: _run(command, version), 40)  # type: ignore[misc]


def attaching() -> None:
    """One program onto one side of a representor: TCX link against a clsact filter."""
    from portwright.kernel import clsact, rtnl  # noqa: PLC0415 - only inside the namespace
    from portwright.kernel.bpf import Collection, CollectionSpec, Link  # noqa: PLC0415
    from portwright.kernel.netlink import NetlinkSocket  # noqa: PLC0415

    with Collection.load(CollectionSpec.load(OBJECT)) as objects, NetlinkSocket() as sock:
        program = objects.programs["pw_from_port"]
        _ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
        link = rtnl.link_by_name(sock, "d0")
        assert link is not None
        taken = []
        for _ in range(15):
            began = time.perf_counter()
            tcx = Link.attach_tcx(program, link.index, "ingress")
            taken.append(time.perf_counter() - began)
            tcx.close()
        _print("attach by TCX (bpf_link_create)", taken)
        clsact.ensure_clsact(sock, link.index)
        handle = iter(range(1, 1000))
        show(
            "attach by clsact (RTM_NEWTFILTER)",
            lambda: clsact.attach_bpf(
                sock, link.index, "ingress", program.fd, name="pw_bench", pref=7, handle=next(handle)
            ),
            15,
        )
        _ip("link", "del", "d0")


def links() -> None:
    """The end of a veth pair: until it is announced, and until the system call returns."""
    from portwright.kernel import rtnl  # noqa: PLC0415
    from portwright.kernel.netlink import NetlinkSocket  # noqa: PLC0415
    from portwright.kernel.reaper import LinkReaper  # noqa: PLC0415

    with NetlinkSocket() as sock:
        reaper = LinkReaper()

        def made() -> int:
            _ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
            link = rtnl.link_by_name(sock, "d0")
            assert link is not None
            return link.index

        slow, quick = [], []
        for _ in range(15):
            index = made()
            slow.append(_seconds(lambda: sock.execute([rtnl.link_del(index)])))  # noqa: B023 - called at once
            index = made()
            quick.append(_seconds(lambda: reaper.delete(index)))  # noqa: B023
        reaper.close()
    _print("delete a veth pair, until RTM_DELLINK answers", slow)
    _print("delete a veth pair, until it is announced", quick)


def show(what: str, run: Callable[[], object], times: int) -> None:
    """Print the median and the middle half of ``times`` runs."""
    run()
    _print(what, [_seconds(run) for _ in range(times)])


def _print(what: str, seconds: Sequence[float]) -> None:
    low, middle, high = (1e3 * value for value in statistics.quantiles(seconds, n=4))
    print(f"{what:52} {middle:7.2f} ms   ({low:.2f} to {high:.2f})", flush=True)


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _run(command: Sequence[str], env: dict[str, str]) -> None:
    subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
