"""Writes ``abi.py`` from the BTF of the compiled data path: C is the one source of the shapes.

    python -m portwright.dataplane.generate > src/portwright/dataplane/abi.py

Every ``struct pw_*`` whose size abi.h asserts becomes a ``NamedTuple`` with ``pack``, ``unpack``
and ``SIZE``; every ``enum pw_*`` an ``IntEnum``. Rules: ``pw_addr``, byte arrays, arrays of structs
and fields in network order (``be_``) become ``bytes``; other integers ``int``; a nested struct is
flattened (``from_total_packets``; one without a name leaves no trace); ``pad`` fields vanish.
``bpftool`` reads the BTF.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

OBJECT = Path(__file__).with_name("abi.bpf.o")
HEADER = Path(__file__).with_name("abi.h")

_ANONYMOUS = "(anon)"  # bpftool's word for a member without a name
_INT = {(1, False): "B", (2, False): "H", (4, False): "I", (8, False): "Q", (8, True): "q", (4, True): "i"}


class Btf:
    """The types of one object, by id."""

    def __init__(self, path: Path) -> None:
        out = subprocess.run(
            ["bpftool", "-j", "btf", "dump", "file", str(path)],
            check=True,
            capture_output=True,
        ).stdout
        self.types: dict[int, dict[str, Any]] = {t["id"]: t for t in json.loads(out)["types"]}

    def strip(self, type_id: int) -> dict[str, Any]:
        """The type behind typedefs and qualifiers."""
        kind = self.types[type_id]
        while kind["kind"] in {"TYPEDEF", "CONST", "VOLATILE"}:
            kind = self.types[kind["type_id"]]
        return kind

    def size(self, type_id: int) -> int:
        """Bytes of a type; of an array, all its elements."""
        kind = self.strip(type_id)
        if kind["kind"] == "ARRAY":
            return int(kind["nr_elems"]) * self.size(kind["type_id"])
        return int(kind["size"])

    def fields(self, struct: dict[str, Any], prefix: str = "") -> list[tuple[str, str, str, int]]:
        """(name, struct code, Python type, offset) of each member, flattened."""
        out: list[tuple[str, str, str, int]] = []
        for member in struct["members"]:
            name, offset = prefix + member["name"], member["bits_offset"] // 8
            kind = self.strip(member["type_id"])
            size = self.size(member["type_id"])
            if member["name"].startswith("pad"):
                out.append(("", f"{size}x", "", offset))
            elif kind["kind"] == "STRUCT" and kind["name"] != "pw_addr":
                within = prefix if member["name"] == _ANONYMOUS else name + "_"
                out.extend((n, c, t, offset + o) for n, c, t, o in self.fields(kind, within))
            elif kind["kind"] in {"ARRAY", "STRUCT"} or member["name"].startswith("be_"):
                out.append((name, f"{size}s", "bytes", offset))
            else:
                signed = kind["encoding"] == "SIGNED"
                out.append((name, _INT[size, signed], "int", offset))
        return out


def camel(name: str) -> str:
    """``pw_drop_key`` -> ``PwDropKey``."""
    return "".join(part.capitalize() for part in name.split("_"))


def render(btf: Btf, header: str) -> str:
    """The text of abi.py."""
    lines = [
        '"""Generated from abi.h by portwright.dataplane.generate: do not edit."""',
        "",
        "from __future__ import annotations",
        "",
        "import enum",
        "import struct",
        "from typing import NamedTuple",
        "",
    ]
    enums = [t for t in btf.types.values() if t["kind"] == "ENUM" and t["name"].startswith("pw_")]
    for kind in sorted(enums, key=lambda t: str(t["name"])):
        if f"enum {kind['name']} {{" not in header:
            continue
        lines += ["", f"class {camel(kind['name'])}(enum.IntEnum):"]
        lines += [f'    """``enum {kind["name"]}`` of abi.h, without the prefix."""', ""]
        lines += [f"    {v['name'].removeprefix('PW_')} = {v['val']}" for v in kind["values"]]
        lines.append("")
    structs = [t for t in btf.types.values() if t["kind"] == "STRUCT" and t["name"].startswith("pw_")]
    for kind in sorted(structs, key=lambda t: str(t["name"])):
        if f"struct {kind['name']} {{ /* {kind['size']} bytes */" not in header or kind["name"] == "pw_addr":
            continue
        fields = btf.fields(kind)
        code = "=" + "".join(c for _, c, _, _ in fields)
        named = [(n, t) for n, _, t, _ in fields if n]
        cls = camel(kind["name"])
        lines += ["", f"_{kind['name']} = struct.Struct({code!r})".replace("'", '"')]
        lines += [f"assert _{kind['name']}.size == {kind['size']}  # noqa: S101 - the generator's own check"]
        lines += ["", "", f"class {cls}(NamedTuple):", f'    """``struct {kind["name"]}`` of abi.h."""', ""]
        lines += [f"    {n}: {t}" for n, t in named]
        lines += [
            "",
            "    def pack(self) -> bytes:",
            f'        """Its {kind["size"]} bytes, as C lays them out."""',
        ]
        lines += [f"        return _{kind['name']}.pack(*self)", ""]
        lines += ["    @classmethod", f"    def unpack(cls, data: bytes) -> {cls}:"]
        lines += [f'        """The inverse of ``pack``; ``struct.error`` unless of {kind["size"]} bytes."""']
        lines += [f"        return cls._make(_{kind['name']}.unpack(data))", ""]
    sizes = {
        camel(k["name"]): k["size"]
        for k in structs
        if f"struct {k['name']} {{ /* {k['size']} bytes */" in header and k["name"] != "pw_addr"
    }
    lines += ["", "#: Bytes of each struct, as the compiler laid it out."]
    lines += ["SIZES: dict[str, int] = {"]
    lines += [f'    "{name}": {size},' for name, size in sorted(sizes.items())]
    lines += ["}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render(Btf(OBJECT), HEADER.read_text()))
