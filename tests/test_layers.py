"""Imports point one way, and each heavy package has one owner (docs: CONTRIBUTING.md).

Read with ``ast``: nothing is imported, so a late import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "longpretrain"
FILES = sorted(PACKAGE.rglob("*.py"))

# A part of the package -> the parts it may import. Everyone may import BASE.
BASE = {"errors", "files", "mapped", "safetensors_file"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "mapped": set(),
    "safetensors_file": {"mapped"},
    "mix_config": set(),
    "config": {"mix_config"},
    "recipe": {"config", "mix_config"},
    "mpi": set(),
    "ranks": {"mpi"},
    "schedule": {"config"},
    "attention": set(),
    "nvidia_apex": set(),
    "model": {"config", "attention", "nvidia_apex"},
    "data": {"config", "ranks"},
    "prepare": {"data", "ranks", "mpi"},
    "tasks": {"config", "mix_config", "recipe", "schedule", "model", "data"},
    "report": {"config"},
    "code_version": {"attention"},
    "engine": {"code_version", "config", "recipe", "schedule", "ranks", "report", "nvidia_apex"},
    "convert": {"config", "model", "data"},
    "evaluate": {"config", "convert", "model", "data"},
    "agreement": {"ranks", "terminal"},
    "run_facts": {"agreement", "code_version", "config", "engine", "tasks"},
    "announce": {"config", "engine", "ranks", "report", "run_facts", "tasks"},
    "start": {"agreement", "attention", "config", "data", "engine", "evaluate", "model", "ranks"}
    | {"run_facts", "tasks"},
    "training": {"agreement", "announce", "config", "engine", "model", "ranks", "report", "start"},
    "demo": {"recipe", "report", "evaluate", "data", "model"},
    "cli_prepare": {"data", "prepare", "report", "terminal"},
    "cli_verify": {"convert", "terminal", "verify_run"},
    "verify_run": {"engine", "recipe", "report"},
    "requeue": {"config", "engine", "terminal"},
    "cli": {
        "config",
        "recipe",
        "ranks",
        "convert",
        "data",
        "evaluate",
        "report",
        "start",
        "training",
    }
    | {"cli_prepare", "cli_verify", "requeue", "terminal"},
    "terminal": set(),
    "__main__": {"cli", "terminal"},
    "accelerated": {"attention"},
    "__init__": {"accelerated"},
}
# Of these parts only one module may be seen from outside.
ONLY = {("engine", "report"): "longpretrain.report.metrics"}
OWNERS = {
    "fairseq": ("tasks/",),
    "deepspeed": ("engine/zero.py",),
    "transformers": ("convert/theirs.py",),
    "mpi4py": ("mpi.py",),
    "pyarrow": ("prepare/parquet.py",),
    "zstandard": ("prepare/compressed.py",),
    "sentencepiece": ("data/sentence_piece.py",),
    "apex": ("nvidia_apex.py",),
    "onnx": ("convert/onnx_file.py",),
    "onnxruntime": ("convert/onnx_check.py",),
}
NO_TORCH = ("data/", "prepare/")
# The compiled library is no import: these are the words that reach it.
LIBRARY_WORDS = ("load_library", "_kernels", "torch.ops.", "LONGPRETRAIN_LIBRARY")
LIBRARY_OWNER = "attention/library.py"


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            if node.module in ("longpretrain", "longpretrain.engine"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def part(module: str) -> str:
    """longpretrain.engine.loop -> engine."""
    return module.split(".")[1]


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[own] | BASE | {own}
    for module in imports(path):
        if module.startswith("longpretrain."):
            assert part(module) in allowed, f"{name(path)} imports {module}"
            only = ONLY.get((own, part(module)))
            assert only is None or module == only, f"{name(path)} imports {module}, not {only}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heavy_packages_have_one_owner(path: Path) -> None:
    for module in imports(path):
        owners = OWNERS.get(module.split(".")[0])
        assert owners is None or name(path).startswith(owners), f"{name(path)} imports {module}"
        if name(path).startswith(NO_TORCH):
            assert module.split(".")[0] != "torch", f"{name(path)} imports torch"


def test_the_compiled_library_has_one_owner() -> None:
    for path in FILES:
        found = [word for word in LIBRARY_WORDS if word in path.read_text(encoding="utf-8")]
        wanted = list(LIBRARY_WORDS) if name(path) == LIBRARY_OWNER else []
        assert found == wanted, f"{name(path)} names {found}"


def test_table_covers_the_package() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert parts <= MAY_IMPORT.keys()
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):  # a topological order exists: no cycles
        free = [p for p, uses in MAY_IMPORT.items() if p not in order and uses <= set(order)]
        assert free, f"a cycle among {MAY_IMPORT.keys() - set(order)}"
        order += free


@pytest.mark.parametrize("path", FILES, ids=name)
def test_import_has_no_side_effects(path: Path) -> None:
    """At top level: docstring, imports, definitions, constants, decorated registrations."""
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_main = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        is_registration = isinstance(node, ast.Expr) and "register_" in ast.unparse(node)
        assert isinstance(node, allowed) or is_text or is_main or is_typing or is_registration, (
            f"{name(path)}:{node.lineno}: {ast.unparse(node)[:80]}"
        )
