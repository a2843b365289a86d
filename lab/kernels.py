"""The lab's kernels: Debian's own packages, downloaded and unpacked, never installed.

An installed kernel would change what a developer's machine boots next and build an initramfs for
it. An unpacked one changes nothing: its folder is the whole of it, and deleting that folder undoes
it. The folder lies outside the checkout, so that a fresh clone (CI) finds the kernels that the last
one fetched: ``$PORTWRIGHT_LAB_KERNELS``, by default ``/var/lib/portwright-lab``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

META_PACKAGES = {
    "6.1": "linux-image-amd64",  # Debian 12's kernel: the floor. No TCX, no netkit.
    "6.12": "linux-image-6.12-amd64",  # Debian 12's newer one: TCX and netkit.
}
"""The package that names the newest build of each kernel."""


class LabError(Exception):
    """The lab can't do what was asked; the text says why and what would help."""


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel."""

    name: str
    """As it was asked for: ``6.1``."""
    release: str
    """What ``uname -r`` says in the guest: ``6.1.0-56-amd64``."""
    root: Path
    """Holds ``boot/vmlinuz-<release>`` and ``lib/modules/<release>``, with modules.dep."""

    @property
    def image(self) -> Path:
        """The file to boot."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def modules(self) -> Path:
        """The folder of its modules."""
        return self.root / "lib" / "modules" / self.release


def store() -> Path:
    """The folder of unpacked kernels."""
    return Path(os.environ.get("PORTWRIGHT_LAB_KERNELS", "/var/lib/portwright-lab"))


def fetched(name: str) -> Kernel | None:
    """The newest kernel of that name that is on this machine, or None."""
    if name not in META_PACKAGES:
        raise LabError(f"no kernel {name}: the lab has {', '.join(META_PACKAGES)}")
    found = [
        Kernel(name=name, release=folder.name, root=folder)
        for folder in store().glob(f"{name}.*")
        if (folder / "lib" / "modules" / folder.name / "modules.dep").is_file()
    ]
    return max(found, key=lambda kernel: _version(kernel.release), default=None)


def fetch(name: str) -> Kernel:
    """The kernel of that name, downloaded (70 to 110 MB) if this machine has none.

    An older build that is here already is kept as it is: tests want the same kernel each time. After a
    failure nothing half unpacked is left, and a second process that fetches the same one does no harm.
    """
    if (kernel := fetched(name)) is not None:
        return kernel
    package = _package(META_PACKAGES[name])
    release = package.removeprefix("linux-image-")
    store().mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that a rename puts all of it there at once.
    work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=store()))
    try:
        # apt's own user could not write into a folder of root's; root may.
        _run("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package, cwd=work)
        (deb,) = work.glob("*.deb")
        root = work / "root"
        _run("dpkg-deb", "--extract", str(deb), str(root))
        _run("depmod", "--basedir", str(root), release)
        try:
            root.rename(store() / release)
        except OSError:
            # Somebody else was quicker; theirs is as good.
            if fetched(name) is None:
                raise
    finally:
        shutil.rmtree(work)
    return Kernel(name=name, release=release, root=store() / release)


def _package(meta: str) -> str:
    """The package of the kernel itself: the meta-package's newest version depends on exactly one."""
    for attempt in ("known", "updated"):
        if attempt == "updated":
            _run("apt-get", "-qq", "update")
        shown = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", meta], capture_output=True, text=True, check=False
        )
        for line in shown.stdout.splitlines():
            if line.startswith("Depends: linux-image-"):
                return line.removeprefix("Depends: ").split()[0]
    raise LabError(f"apt knows no package {meta}: the lab needs Debian 12 with its security archive")


def _run(*command: str, cwd: Path | None = None) -> None:
    """Run to success, or LabError with what the command said."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as exc:
        raise LabError(f"{command[0]} is missing: run packaging/setup.sh lab") from exc
    if done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _version(release: str) -> tuple[int, ...]:
    """``6.12.117+deb12-amd64`` -> (6, 12, 117, 12), to sort by."""
    digits = "".join(c if c.isdigit() else " " for c in release.removesuffix("-amd64"))
    return tuple(int(part) for part in digits.split())
