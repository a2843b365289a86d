"""A root image for guests: httpd and iperf3's server, in the network that the initramfs has set up."""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
from pathlib import Path

from portwright.vmm.initramfs import BUSYBOX

_INIT = """\
    #!/bin/busybox sh
    export PATH=/bin
    busybox --install /bin
    httpd -p 80 -h /www
    iperf3 -s -D
    echo "portwright: ready, on a disk"
    while :; do sleep 1000; done
"""


def build(folder: Path) -> Path:
    """The image, of 32 MB, in an empty folder."""
    tree, image = folder / "tree", folder / "image"
    for name in ("bin", "sbin", "tmp", "www"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    iperf3 = shutil.which("iperf3")
    assert iperf3 is not None, "apt-get install iperf3"
    shutil.copy(iperf3, tree / "bin/iperf3")
    listed = subprocess.run(["ldd", iperf3], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        (tree / library.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, tree / library.lstrip("/"))
    (tree / "www/index.html").write_text("from the guest\n")
    (tree / "sbin/init").write_text(textwrap.dedent(_INIT))
    (tree / "sbin/init").chmod(0o755)
    made = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "32M"]
    subprocess.run(made, check=True, capture_output=True)
    return image
