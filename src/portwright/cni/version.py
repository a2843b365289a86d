"""CNI specification versions: which are spoken, and what each of them allows.

Source: CNI SPEC 1.1.0, "Version considerations"; the sentences are those of the Go
library's ``pkg/skel``, because runtimes and their tests match on them.
"""

from __future__ import annotations

from typing import Final

from portwright.cni.errors import CniCode, CniError

#: Every version whose configuration is read and whose result can be written, oldest first.
SUPPORTED: Final = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")

#: The version of errors and of VERSION's answer when the caller's is unknown.
CURRENT: Final = SUPPORTED[-1]

#: A configuration without ``cniVersion`` is one from before the key existed.
UNNAMED: Final = "0.1.0"

#: Verbs that appeared after 0.1.0, with the version they appeared in.
SINCE: Final = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}


def at_least(version: str, floor: str) -> bool:
    """Tell whether ``version`` is ``floor`` or newer; both must be in :data:`SUPPORTED`."""
    return SUPPORTED.index(version) >= SUPPORTED.index(floor)


def require(version: str, command: str) -> None:
    """Refuse, with code 1, an unknown ``version`` or one that has no verb ``command``."""
    if version not in SUPPORTED:
        known = " ".join(f'"{one}"' for one in SUPPORTED)
        raise CniError(
            CniCode.INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f'config is "{version}", plugin supports [{known}]',
        )
    floor = SINCE.get(command)
    if floor is not None and not at_least(version, floor):
        raise CniError(CniCode.INCOMPATIBLE_VERSION, f"config version does not allow {command}")
