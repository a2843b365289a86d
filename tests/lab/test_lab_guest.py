"""What the lab's guest offers to the tests that run in it. Outside a guest these are skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = os.environ.get("PORTWRIGHT_LAB_KERNEL", "")

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(not KERNEL, reason="only inside the kernel lab's guest"),
]


def run(*command: str) -> str:
    """Output of a command that must succeed."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def test_kernel_is_the_one_asked_for() -> None:
    """The running kernel is of the version that the lab was told to boot."""
    assert os.uname().release.startswith(f"{KERNEL}.")


def test_two_cpus() -> None:
    """There is more than one CPU, so per-CPU maps and races are exercised."""
    assert os.cpu_count() == 2


def test_bpffs_and_cgroup2() -> None:
    """Programs can be pinned and attached to cgroups where every tool expects it."""
    assert run("stat", "-f", "-c", "%T", "/sys/fs/bpf").strip() == "bpf_fs"
    assert run("stat", "-f", "-c", "%T", "/sys/fs/cgroup").strip() == "cgroup2fs"


def test_btf() -> None:
    """The kernel describes its types, as CO-RE needs."""
    assert Path("/sys/kernel/btf/vmlinux").stat().st_size > 1_000_000


def test_devices_and_hooks_load_on_demand() -> None:
    """Namespaces, veth, tap, bridge, clsact with cls_bpf, and nft's NAT work without any modprobe."""
    name = f"lab{os.getpid()}"
    run("ip", "netns", "add", name)
    try:
        inside = ("ip", "netns", "exec", name)
        run(*inside, "ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        run(*inside, "ip", "tuntap", "add", "t0", "mode", "tap")
        run(*inside, "ip", "link", "add", "b0", "type", "bridge")
        run(*inside, "tc", "qdisc", "add", "dev", "v0", "clsact")
        run(
            *inside, "nft", "add table inet x; add chain inet x n { type nat hook postrouting priority 100; }"
        )
        run(*inside, "nft", "add rule inet x n fib daddr type local masquerade")
        run(*inside, "nft", "add rule inet x n ct state established counter")
    finally:
        run("ip", "netns", "delete", name)


def test_host_is_out_of_reach(tmp_path: Path) -> None:
    """Tests may write to their temporary folder and copy of the checkout, not to what the host shares."""
    (tmp_path / "x").write_text("x")
    (Path(__file__).parent / "x").write_text("x")

    for shared in (Path(sys.prefix), Path("/usr")):
        with pytest.raises(OSError, match="Read-only"):
            (shared / "x").write_text("x")
