"""The binding's pure parts: logs, enums, stubs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from portwright.kernel.bpf import AttachType, LibbpfTooOld, MapType, _libbpf, features
from portwright.kernel.bpf.features import Feature
from portwright.kernel.bpf.loader import raise_load_failure, summarize
from portwright.model.errors import KernelFailed, KernelTooOld, VerifierRejected

LOG = """\
reg type unsupported for arg#0 function reads_too_far#17
0: R1=ctx(off=0,imm=0) R10=fp0
; __u8 *data = (void *)(long)skb->data;
0: (61) r1 = *(u32 *)(r1 +76)         ; R1_w=pkt(off=0,r=0,imm=0)
; return data[1500];
1: (71) r0 = *(u8 *)(r1 +1500)
invalid access to packet, off=1500 size=1, R1(id=0,off=1500,r=0)
R1 offset is outside of the packet
processed 2 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0
"""


def test_summary_keeps_what_matters() -> None:
    """The summary ends with the verifier's verdict and shows the source line; statistics go."""
    lines = summarize(LOG).splitlines()

    assert lines[-1] == "R1 offset is outside of the packet"
    assert "; return data[1500];" in lines
    assert not any("processed" in line for line in lines)


def test_summary_reaches_back_for_the_source() -> None:
    """When the last lines have no source among them, the nearest one before is kept."""
    log = "; first;\n; second;\n" + "".join(f"{n}: (b7) r0 = 0\n" for n in range(9)) + "too bad\n"

    assert summarize(log).splitlines() == [
        "; second;",
        "6: (b7) r0 = 0",
        "7: (b7) r0 = 0",
        "8: (b7) r0 = 0",
        "too bad",
    ]


def test_load_failure_with_a_log() -> None:
    """What libbpf says around a verifier log becomes the error's fields."""
    said = (
        "libbpf: prog 'p': BPF program load failed: Permission denied\n"
        f"libbpf: prog 'p': -- BEGIN PROG LOAD LOG --\n{LOG}-- END PROG LOAD LOG --\n"
    )
    with pytest.raises(VerifierRejected) as caught:
        raise_load_failure("obj", -13, said)

    assert caught.value.program == "p"
    assert caught.value.log == LOG
    assert "outside of the packet" in str(caught.value)


def test_load_failure_without_a_log() -> None:
    """Without a verifier log it's a failed system call, with libbpf's words as detail."""
    with pytest.raises(KernelFailed) as caught:
        raise_load_failure("obj", -7, "libbpf: map 'm': failed to create: Argument list too long(-7)\n")

    assert caught.value.errno == 7
    assert "failed to create" in caught.value.detail


def test_unknown_numbers_are_shown() -> None:
    """A number from a newer kernel is a member with a name, not an exception."""
    assert MapType(99).name == "TYPE_99"
    assert MapType(99) == 99
    assert AttachType(47).name == "TCX_EGRESS"


def test_absent_function_names_the_version() -> None:
    """A function that libbpf lacks can be bound; calling it says what would have it."""
    absent = _libbpf._bind("bpf_program__no_such_thing", "9.9", None)

    with pytest.raises(LibbpfTooOld) as caught:
        absent(1, 2)

    assert caught.value.need == "libbpf >= 9.9"
    assert _libbpf.LIBBPF_VERSION in str(caught.value)
    assert isinstance(caught.value, KernelTooOld)


def test_without_libbpf() -> None:
    """On a machine without libbpf everything imports, and the first use says what to install."""
    program = (
        "import ctypes\n"
        "real = ctypes.CDLL\n"
        "def without(name, **options):\n"
        "    if name and 'libbpf' in name: raise OSError(name)\n"
        "    return real(name, **options)\n"
        "ctypes.CDLL = without\n"
        "from portwright.kernel import bpf\n"
        "from portwright.kernel.bpf import features\n"
        "print(features.probe('tcx').supported)\n"
        "try: bpf.Map.from_id(1)\n"
        "except bpf.LibbpfTooOld as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    supported, message = done.stdout.splitlines()

    assert supported == "False"
    assert message == (
        "bpf_map_get_fd_by_id needs libbpf >= 1.0; this system has no libbpf.so.1"
        " (Debian: apt install libbpf1)"
    )


def test_feature_requirement() -> None:
    """require() passes for what's there and names need, have and the finding otherwise."""
    there = Feature("tcx", "Linux 6.6", "6.18", supported=True, detail="")
    gone = Feature("tcx", "Linux 6.6", "6.1.0-44", supported=False, detail="EINVAL")

    there.require()
    with pytest.raises(KernelTooOld, match=r"tcx needs Linux 6\.6; this kernel has 6\.1\.0-44: EINVAL"):
        gone.require()
    assert gone.need_version == (6, 6)


def test_probes_are_named() -> None:
    """The names that the rest of Portwright asks for are all there."""
    wanted = "tcx netkit clsact ringbuf prog_test_run redirect_peer btf batch_ops bpffs"

    assert set(wanted.split()) <= set(features.names())
