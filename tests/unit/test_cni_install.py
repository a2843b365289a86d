"""Installing: atomic, only over what is ours, and gone again."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from portwright.cni.install import MARKER, install, is_ours, patched, uninstall
from portwright.model.errors import Conflict, InvalidInput, NotFound

SOURCE = Path(__file__).parents[2] / "src/portwright/cni/shim/portwright-cni.c"
SOCKET = Path("/run/test/pw.sock")
SPOOL = Path("/var/lib/test/spool")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real shim, built as the Makefile builds it."""
    target = tmp_path_factory.mktemp("shim") / "portwright-cni"
    subprocess.run(
        ["cc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(SOURCE)], check=True
    )
    return target


def put(tmp_path: Path, shim: Path, /, **options: object) -> list[Path]:
    given: dict[str, object] = {"network": "web", "socket": SOCKET, "spool": SPOOL, "shim": shim, **options}
    return install(tmp_path / "bin", tmp_path / "conf", **given)  # type: ignore[arg-type]


def test_shim_and_list(tmp_path: Path, shim: Path) -> None:
    """The shim is a regular 0755 file that knows its paths; the list declares what we honour."""
    files = put(tmp_path, shim, extras={"ipam": {"subnet": "10.0.0.0/24"}}, chained=[{"type": "tuning"}])

    assert files == [tmp_path / "bin/portwright", tmp_path / "conf/10-portwright-web.conflist"]
    assert files[0].stat().st_mode == 0o100755
    assert files[0].stat().st_size == shim.stat().st_size
    about = subprocess.run([files[0]], capture_output=True, text=True, env={}, check=True)
    assert str(SOCKET) in about.stderr
    assert json.loads(files[1].read_text()) == {
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "web",
        MARKER: True,
        "plugins": [
            {
                "type": "portwright",
                "capabilities": dict.fromkeys(
                    ["portMappings", "bandwidth", "ips", "ipRanges", "mac", "dns"], True
                ),
                "ipam": {"subnet": "10.0.0.0/24"},
            },
            {"type": "tuning"},
        ],
    }
    assert not [one for one in os.listdir(tmp_path / "bin") if one.startswith(".")]  # noqa: PTH208


def test_again_and_without_network(tmp_path: Path, shim: Path) -> None:
    """A second run replaces our own files, also while the shim is executed; no network, no list."""
    put(tmp_path, shim)
    with (tmp_path / "bin/portwright").open("rb"):
        assert put(tmp_path, shim, network=None, socket=Path("/run/other.sock")) == [
            tmp_path / "bin/portwright"
        ]
    about = subprocess.run([tmp_path / "bin/portwright"], capture_output=True, text=True, env={}, check=True)

    assert "/run/other.sock" in about.stderr


@pytest.mark.parametrize("name", ["bin/portwright", "conf/10-portwright-web.conflist"])
@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_not_ours_stays(tmp_path: Path, shim: Path, name: str, kind: str) -> None:
    """A foreign file, link or directory under our name refuses the whole installation."""
    foreign = tmp_path / name
    foreign.parent.mkdir()
    if kind == "file":
        foreign.write_text("{}")
    elif kind == "link":
        foreign.symlink_to(shim)
    else:
        foreign.mkdir()
    with pytest.raises(Conflict, match="not installed by Portwright"):
        put(tmp_path, shim)

    assert uninstall(tmp_path / "bin", tmp_path / "conf") == []
    found = sorted(str(one.relative_to(tmp_path)) for one in tmp_path.glob("*/*"))
    assert found == [name]


def test_uninstall_takes_all_of_ours(tmp_path: Path, shim: Path) -> None:
    """Every list of ours and the shim go, lists first; other files stay; a second run finds nothing."""
    put(tmp_path, shim)
    put(tmp_path, shim, network="db")
    other = tmp_path / "conf/99-other.conflist"
    other.write_text('{"name":"x"}')

    removed = [one.name for one in uninstall(tmp_path / "bin", tmp_path / "conf")]
    assert removed == ["10-portwright-db.conflist", "10-portwright-web.conflist", "portwright"]
    assert other.exists()
    assert uninstall(tmp_path / "bin", tmp_path / "conf") == []


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"socket": Path("rel")}, "socket"),
        ({"socket": Path("/" + "a" * 107)}, "socket"),
        ({"spool": Path("/" + "a" * 255)}, "spool"),
        ({"network": "a/b"}, "network"),
        ({"network": "-a"}, "network"),
        ({"extras": {"type": "x"}}, "extras"),
        ({"shim": Path("/bin/true")}, "shim"),
    ],
)
def test_refusals(tmp_path: Path, shim: Path, options: dict[str, object], field: str) -> None:
    """Bad input is named and nothing is written."""
    with pytest.raises(InvalidInput) as caught:
        put(tmp_path, shim, **options)

    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_longest_paths_fit(shim: Path) -> None:
    """The limits themselves are usable, and patching twice is patching once."""
    binary = shim.read_bytes()
    long = patched(binary, socket=Path("/" + "s" * 106), spool=Path("/" + "p" * 254))

    assert len(long) == len(binary)
    assert patched(long, socket=SOCKET, spool=SPOOL) == patched(binary, socket=SOCKET, spool=SPOOL)


def test_no_shim(tmp_path: Path) -> None:
    """A shim that was not built is said so."""
    with pytest.raises(NotFound, match="build it"):
        put(tmp_path, tmp_path / "absent")
    assert not is_ours(tmp_path / "absent")
