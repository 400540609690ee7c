"""Every error in the source says what, got, wanted and the way out; read with ``ast``, none missed.

Also what would make errors that nobody told: plain exceptions, text files without an encoding.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "longpretrain"
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}

# Raised as they are: (file, exception) -> why no user meets it as a traceback.
MAY_RAISE = {
    ("cli.py", "ArgumentTypeError"): "argparse hands it to Parser.error, which tells it",
    ("terminal.py", "ArgumentTypeError"): "the same",
    ("data/manifest.py", "ValueError"): "Manifest.read tells it as the damage of a manifest",
    ("prepare/chunked.py", "DamagedPartError"): "assemble.py hands on the part, which is remade",
    ("prepare/assemble.py", "DamagedPartError"): "the same",
    ("prepare/rank_crew.py", "ElsewhereError"): "a SystemExit: rank 0 tells the error",
    ("prepare/compressed.py", "DamagedError"): "documents.py tells it, or lists it as a problem",
    ("prepare/compressed.py", "UnusableError"): "the same",
    ("prepare/decode.py", "UnusableError"): "the same",
    ("prepare/decode.py", "_no_utf8"): "the same, in the words for bytes that are no UTF-8",
    ("prepare/documents.py", "UnusableError"): "the same",
    ("prepare/parquet.py", "UnusableError"): "the same",
    ("prepare/parquet.py", "DamagedError"): "the same",
    ("prepare/documents.py", "_above"): "the same, in the words for what is too long",
    ("prepare/documents.py", "told"): "UnusableError.told makes an InputError of it",
    ("prepare/units.py", "told"): "the same",
    ("attention/memory.py", "OutOfMemoryError"): "torch's own, which callers look for",
    ("engine/forensics.py", "FloatingPointError"): "a run that diverges; status.json tells it too",
    ("engine/meeting.py", "RankLostError"): "an InputError; exit_code makes 1 of it, not 2",
    ("engine/update.py", "RuntimeError"): "a fault of the hardware: weights differ between ranks",
    ("engine/complete.py", "OSError"): "saver.py tells it: a save that failed",
    ("engine/saver.py", "FloatingPointError"): "weights overflowed; status.json tells it too",
    ("engine/saver.py", "RuntimeError"): "a bug in our writing of checkpoints: a report for us",
    ("engine/zero.py", "RuntimeError"): "an invariant of DeepSpeed is broken: a report for us",
    ("engine/gather.py", "GatherError"): "mostly a rank is gone; the watchdog's verdict names it",
    ("engine/process_watch.py", "ProcessLookupError"): "as the system does; the callers catch it",
    ("convert/onnx_file.py", "RuntimeError"): "our graph is wrong, onnx says: a report for us",
    ("convert/write.py", "RuntimeError"): "our export is wrong: a report for us, with the table",
    ("demo.py", "RuntimeError"): "the demo's own check of itself",
}
FLOW = {"SystemExit", "KeyboardInterrupt", "IndexError"}
"""End a program or an iteration; they are no errors."""
OPENING = re.compile(r"[A-Z0-9{\[]|longpretrain |pip install |[a-z]+\.[a-z_]+ ")
"""Of a way out: a sentence, a number, a command or a recipe's key."""


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def calls(tree: ast.Module, function: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield node


def shown(node: ast.expr, tree: ast.Module, seen: tuple[str, ...] = ()) -> Iterator[str]:
    """The texts that an expression may give, its computed parts as {}."""
    if isinstance(node, ast.Constant):
        yield str(node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    elif isinstance(node, ast.IfExp):
        yield from shown(node.body, tree, seen)
        yield from shown(node.orelse, tree, seen)
    elif isinstance(node, ast.BinOp):
        for left in shown(node.left, tree, seen):
            yield from (left + right for right in shown(node.right, tree, seen))
    elif isinstance(node, ast.Name) and node.id not in seen:
        yield from named(node.id, tree, (*seen, node.id))
    else:
        yield "{}"


def named(wanted: str, tree: ast.Module, seen: tuple[str, ...]) -> Iterator[str]:
    """What a module gives a name: by assignment, as a default, or where it calls a helper."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            found += [node.value for target in node.targets if ast.unparse(target) == wanted]
        elif isinstance(node, ast.keyword):
            found += [node.value] if node.arg == wanted else []
        elif isinstance(node, ast.FunctionDef):
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            found += [d for argument, d in pairs if argument.arg == wanted and d is not None]
    yield from {text for node in found for text in shown(node, tree, seen)} or {"{}"}


ERRORS = [
    pytest.param(path, call, id=f"{name(path)}:{call.lineno}")
    for path, tree in sorted(TREES.items())
    for call in calls(tree, "InputError")
]


@pytest.mark.parametrize(("path", "call"), ERRORS)
def test_form(path: Path, call: ast.Call) -> None:
    parts = {keyword.arg: keyword.value for keyword in call.keywords}
    assert len(call.args) == 1
    assert parts.keys() == {"got", "wanted", "way_out"}
    for text in shown(call.args[0], TREES[path]):
        assert text.strip(" :") == text != "", "what: the name of the thing"
    for part in ("got", "wanted"):
        for text in shown(parts[part], TREES[path]):
            assert text.strip() == text != "", part
            assert not text.endswith((".", ";", "!")), f"{part} is no sentence: {text}"
    for text in shown(parts["way_out"], TREES[path]):
        assert OPENING.match(text), text
        assert text == "{}" or text.endswith((".", "?")), f"a sentence: {text}"
    for node in (*call.args, *parts.values()):
        for text in shown(node, TREES[path]):
            for word in ("please", "sorry", "!", "oops", "invalid", "error occurred", "\n"):
                assert word not in text.lower(), f"{word!r} in {text}"


def test_all_errors_were_found() -> None:
    assert len(ERRORS) > 130
    texts = {text for tree in TREES.values() for text in named("way_out", tree, ("way_out",))}
    assert len(texts) > 90


@pytest.mark.parametrize("path", sorted(TREES), ids=name)
def test_no_other_exception_is_a_users(path: Path) -> None:
    kinds = {"InputError"} | {kind for file, kind in MAY_RAISE if file == name(path)}
    helpers = set()  # what returns such an error: functions, and arguments that are functions
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef) and node.returns:
            helpers |= {node.name} if ast.unparse(node.returns) in kinds else set()
        elif isinstance(node, ast.arg) and node.annotation:
            helpers |= {node.arg} if "InputError" in ast.unparse(node.annotation) else set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            kind = ast.unparse(node.exc.func).rsplit(".", 1)[-1]
            known = {*FLOW, *helpers, *kinds}
            assert kind in known, f"{name(path)}:{node.lineno} raises {kind}"


def test_the_list_of_exceptions_is_not_stale() -> None:
    for file, kind in MAY_RAISE:
        assert f"raise {kind}" in (text := (PACKAGE / file).read_text()) or f".{kind}(" in text


@pytest.mark.parametrize("path", sorted(TREES), ids=name)
def test_text_has_an_encoding(path: Path) -> None:
    """Else the locale decides what is written and read."""
    for node in ast.walk(TREES[path]):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        words = [ast.unparse(a) for a in node.args] + [f"{k.arg}={k.value}" for k in node.keywords]
        is_text = node.func.attr in ("read_text", "write_text") or (
            node.func.attr in ("open", "fdopen")
            and ast.unparse(node.func.value) not in ("Corpus", "Image", "os")
            and not any("b'" in word or '"b' in word or word.endswith("b'") for word in words)
        )
        if is_text:
            assert any(word.startswith("encoding=") for word in words), (
                f"{name(path)}:{node.lineno}"
            )
