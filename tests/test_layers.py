"""Values flow down and pure folders do no I/O (docs/DESIGN.md 1.1, 1.2).

Reads every import of every file with `ast`, also those inside functions. An import under
`if TYPE_CHECKING` may name a module that does I/O, for a type does nothing, but it must not
point upwards either.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kdns"

# From low to high; a layer may import itself and the ones before it. What is written in one
# line stands side by side and does not import each other.
LAYERS = (
    ("errors", "logs", "runtime"),
    ("metrics",),
    ("dns",),
    ("registry",),
    ("zone", "proxy"),
    ("corefile_tokens", "plugins.__init__"),  # the latter: the table of words
    ("corefile_keys",),
    ("corefile",),
    ("plugins",),
    ("pipeline",),
    ("source", "server"),
    ("kernel", "api"),  # their HTTP is server/'s
    ("site", "control", "flags"),
    ("app", "agent", "lookup"),
    ("cluster", "node", "worker"),
    ("up", "node_command"),
    ("explain",),
    ("cli",),
    ("__main__", "pytest_plugin"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The package itself: its version, which anybody may read, and what programs import from it.
RANK["__init__"] = -1

PURE = ("registry", "dns", "zone", "plugins", "proxy")
# Modules that read a clock, roll dice, wait, or touch files, sockets and processes.
# `logging` is not among them: a plugin may say something; where it goes is logs.py's. For
# `random` see below.
IMPURE = frozenset(
    "aiohttp asyncio concurrent fcntl glob http io kubernetes multiprocessing os pathlib"
    " prometheus_client secrets select selectors shutil signal socket socketserver ssl"
    " subprocess sys tempfile threading time urllib uuid".split()
)

# What of these does nothing of the kind.
HARMLESS = frozenset({"socket.AF_INET", "socket.inet_pton"})


class Import(NamedTuple):
    """One import: where it stands and what it names."""

    file: str
    line: int
    module: str
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = ("kdns", *path.relative_to(PACKAGE).parent.parts)
    file = str(path.relative_to(PACKAGE.parent))
    return [
        Import(file, line, module, typing_only)
        for line, module, typing_only in _walk(tree, package, False)
    ]


def _walk(
    node: ast.AST, package: tuple[str, ...], typing_only: bool
) -> Iterator[tuple[int, str, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield child.lineno, alias.name, typing_only
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else ()
            module = ".".join([*base, *([child.module] if child.module else [])])
            names = [one.name for one in child.names if f"{module}.{one.name}" not in HARMLESS]
            for name in {_meant(module, name) for name in names}:
                yield child.lineno, name, typing_only
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _walk(ast.Module([part], []), package, True)
            for part in child.orelse:
                yield from _walk(ast.Module([part], []), package, typing_only)
        else:
            yield from _walk(child, package, typing_only)


def _meant(module: str, name: str) -> str:
    """Return what `from module import name` imports: the module in a package, or the module."""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    inside = folder / name
    return f"{module}.{name}" if inside.is_dir() or inside.with_suffix(".py").exists() else module


def _dotted(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def layer_of(module: str) -> str:
    """Return the layer of "kdns.dns.name": "dns"; the package's own names: "__init__"."""
    parts = module.split(".")
    if parts in (["kdns", "plugins"], ["kdns", "plugins", "__init__"]):
        return "plugins.__init__"
    return parts[1] if len(parts) > 1 else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))
ALL = [one for path in FILES for one in imports_of(path)]


def test_every_file_belongs_to_a_layer() -> None:
    found = {layer_of(_dotted(str(path.relative_to(PACKAGE.parent)))) for path in FILES}
    assert found <= set(RANK), "say in LAYERS where these stand"


def test_nothing_imports_what_is_above_it() -> None:
    upwards = []
    for one in ALL:
        if one.module.split(".")[0] != "kdns":
            continue
        here = layer_of(_dotted(one.file))
        there = layer_of(one.module)
        if there not in RANK or here not in RANK:
            continue  # the test above says so
        if here != there and "__init__" not in (here, there) and RANK[there] >= RANK[here]:
            upwards.append(str(one))
    assert upwards == []


def test_pure_folders_do_no_io() -> None:
    impure = [
        str(one)
        for one in ALL
        if one.file.split("/")[1] in PURE
        and one.module.split(".")[0] in IMPURE
        and not one.typing_only
    ]
    assert impure == []


def test_pure_folders_roll_no_dice() -> None:
    """They may name the type random.Random, which is handed to them, and nothing else."""
    rolled = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} uses random.{node.attr}"
        for folder in PURE
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr != "Random"
    ]
    assert rolled == []
    assert [str(one) for one in ALL if one.module.startswith("random.")] == []


def test_pure_folders_open_nothing() -> None:
    opened = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} calls {node.func.id}()"
        for folder in PURE
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("open", "print", "input")
    ]
    assert opened == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os.path", [("os.path", False)]),
        ("def f():\n from time import time", [("time", False)]),
        ("if TYPE_CHECKING:\n import ssl\nelse:\n import time", [("ssl", True), ("time", False)]),
        ("from kdns import app", [("kdns.app", False)]),
        ("from kdns import __version__", [("kdns", False)]),
        ("from . import store", [("kdns.registry.store", False)]),
        ("from ..dns import name", [("kdns.dns.name", False)]),
        ("from kdns.plugins import ORDER", [("kdns.plugins", False)]),
    ],
)
def test_the_reader_of_imports_sees(source: str, expected: list[tuple[str, bool]]) -> None:
    found = _walk(ast.parse(source), ("kdns", "registry"), False)
    assert [(module, typing_only) for _, module, typing_only in found] == expected
