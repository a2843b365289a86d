"""The direction of imports, as docs/design.md draws it: read from the syntax tree, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "portwright"

PURE = {"model", "policy", "domains", "plan", "ipam", "attach"}

# What each layer may import of Portwright, besides itself.
ALLOWED: dict[str, set[str]] = {
    "model": set(),
    "dataplane": {"model"},  # the Python mirror of the C structs
    "policy": {"model", "dataplane"},
    "domains": {"model", "policy"},  # what names policy asks for, and what an answer says
    "ipam": {"model"},
    "plan": {"model", "policy", "ipam"},
    "attach": {"model", "plan"},
    "store": {"model", "ipam", "plan"},
    "kernel": {"model"},
    "observe": {"model", "kernel", "dataplane", "store", "plan"},
    "node": {
        *("model", "dataplane", "policy", "domains", "ipam", "plan", "attach", "store", "kernel", "observe"),
    },
    # The edges: each translates, none decides, none touches the kernel.
    "api": {"model"},
    "cni": {"model", "api", "node", "attach", "plan", "ipam", "policy", "store"},
    "cli": {"model", "api", "cni"},
    "live": {
        "model",
        "api",
        "policy",
        "domains",
        "kernel",
    },  # plays the sandboxes, and the host that they are on
    "jail": {"model", "api", "kernel"},  # runs a program with nothing of the host but what is named
    "vmm": {"model", "api", "kernel", "jail"},  # runs hypervisors in sandboxes' namespaces
    # The process: hangs the edges onto the node's services.
    "daemon": {"model", "dataplane", "policy", "ipam", "api", "cni", "node", "observe"},
    "": {"api", "model"},  # portwright/__init__.py: the public names
}

# What a layer may import inside a function only.
# `portwright node run` is the daemon's process; `policy matrix` asks the pure engine, with no daemon, and
# with --live it starts one.
LAZY: dict[str, set[str]] = {"cli": {"daemon", "policy", "live", "vmm", "jail"}, "live": {"daemon"}}

# Input, output, the clock, the kernel and chance: what a pure layer has none of.
IMPURE = {
    *("asyncio", "ctypes", "datetime", "fcntl", "glob", "http", "io", "logging", "mmap", "multiprocessing"),
    *("os", "pathlib", "pwd", "random", "resource", "secrets", "select", "selectors", "shutil", "signal"),
    *("socket", "sqlite3", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid"),
}
# Functions of an impure module that are none the less pure.
PURE_NAMES = {"os": {"strerror"}}


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    file: Path
    line: int
    target: str
    name: str
    """The imported name of ``from target import name``; empty for ``import target``."""
    lazy: bool
    """Inside a function, or for the type checker alone: not carried out when the module is imported."""

    @property
    def layer(self) -> str:
        """The package below portwright that the importing file is in; empty for portwright itself."""
        return layer_of(self.file)

    @property
    def imported_layer(self) -> str | None:
        """The package below portwright that is imported; None for another distribution's."""
        parts = [*self.target.split("."), self.name]
        if parts[0] != "portwright":
            return None
        return parts[1] if len(parts) > 1 and (SOURCE / parts[1]).is_dir() else ""

    def __str__(self) -> str:
        return f"{self.file.relative_to(SOURCE)}:{self.line} imports {self.target} {self.name}".rstrip()


def layer_of(file: Path) -> str:
    """The package of a file below portwright; empty for portwright's own modules."""
    parts = file.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports_of(file: Path) -> Iterator[Import]:
    """Every import of one file, wherever it stands."""
    package = ["portwright", *file.relative_to(SOURCE).parts[:-1]]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, alias.name, "", lazy)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                target = ".".join([*base, *filter(None, [child.module])])
                for alias in child.names:
                    yield Import(file, child.lineno, target, alias.name, lazy)
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                yield from walk(child, lazy=True)
            else:
                deeper = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, lazy or deeper)

    yield from walk(ast.parse(file.read_text()), lazy=False)


FILES = sorted(SOURCE.rglob("*.py"))
IMPORTS = [imported for file in FILES for imported in imports_of(file)]


def test_every_package_has_its_place() -> None:
    """A new package under src/portwright is put into the picture before anything may import it."""
    packages = {layer_of(file) for file in FILES}

    assert packages <= set(ALLOWED), f"unknown layers: {packages - set(ALLOWED)}"


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_imports_point_downwards(layer: str) -> None:
    """A layer imports itself and what lies below it, and nothing else of Portwright."""
    wrong = [
        str(found)
        for found in IMPORTS
        if found.layer == layer
        and found.imported_layer is not None
        and found.imported_layer not in {layer, ""} | ALLOWED[layer]
        and not (found.lazy and found.imported_layer in LAZY.get(layer, set()))
    ]

    assert wrong == []


def test_picture_has_no_cycle() -> None:
    """The table above is itself a direction: no layer is below itself."""
    remaining = {layer: set(below) for layer, below in ALLOWED.items()}
    while ready := [layer for layer, below in remaining.items() if not below]:
        for layer in ready:
            del remaining[layer]
        for below in remaining.values():
            below.difference_update(ready)

    assert remaining == {}


@pytest.mark.parametrize("layer", sorted(PURE))
def test_pure_layers_do_no_io(layer: str) -> None:
    """Pure layers import nothing that reads a clock, a file, a socket, chance or the kernel."""
    wrong = []
    for found in IMPORTS:
        module = found.target.split(".")[0]
        if found.layer != layer or module not in IMPURE:
            continue
        used = {found.name} if found.name else attributes_of(found.file, module)
        if not used or used - PURE_NAMES.get(module, set()):
            wrong.append(f"{found} for {', '.join(sorted(used))}")

    assert wrong == []


def test_pure_layers_open_nothing() -> None:
    """Nor do they call what needs no import: open, input, print, exec, eval."""
    wrong = [
        f"{file.relative_to(SOURCE)}:{node.lineno} calls {node.func.id}"
        for file in FILES
        if layer_of(file) in PURE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in {"open", "input", "print", "exec", "eval", "__import__"}
    ]

    assert wrong == []


def attributes_of(file: Path, module: str) -> set[str]:
    """The names that a file takes from an imported module, as ``module.name``."""
    return {
        node.attr
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }
