"""Which of KVM and software emulation (TCG) runs a guest."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import Final

from portwright.model.errors import InvalidInput, NotSupported
from portwright.vmm.spec import Accel

VARIABLE: Final = "PORTWRIGHT_ACCEL"
_DEVICE: Final = "/dev/kvm"
_KVM_GET_API_VERSION, _KVM_CREATE_VM = 0xAE00, 0xAE01  # linux/kvm.h
_API: Final = 12


def choose(asked: Accel) -> Accel:
    """``asked``, or else what $PORTWRIGHT_ACCEL says, or else KVM where it can make a guest, or else TCG.

    Raises NotSupported where KVM was asked for and isn't there, InvalidInput for a variable
    that says neither.
    """
    wanted = asked or os.environ.get(VARIABLE, "")
    if wanted not in ("kvm", "tcg", ""):
        raise InvalidInput(VARIABLE, wanted, "kvm, tcg, or nothing for what works here")
    if wanted == "tcg":
        return "tcg"
    lack = without_kvm()
    if lack and wanted == "kvm":
        raise NotSupported("accel", f"kvm ({lack})", "use --accel tcg")
    return "tcg" if lack else "kvm"


def without_kvm() -> str:
    """Why KVM can't be used here, or ''. That it can make a guest doesn't mean that the guest boots."""
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{_DEVICE}: {error.strerror}"
    try:
        if (version := fcntl.ioctl(fd, _KVM_GET_API_VERSION)) != _API:
            return f"its API is {version}, and not {_API}"
        os.close(fcntl.ioctl(fd, _KVM_CREATE_VM, 0))
    except OSError as error:
        return f"KVM_CREATE_VM: {os.strerror(error.errno or errno.EIO)}"
    finally:
        os.close(fd)
    return ""
