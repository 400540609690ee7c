"""Code is told by its content: every file that runs counts, and the commit is git's own answer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from longpretrain import code_version
from longpretrain.code_version import _commit, _hash_of_sources


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "recipes").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1\n", encoding="utf-8")
    (folder / "b.py").write_text("", encoding="utf-8")
    (folder / "recipes" / "base.yaml").write_text("optim: {lr: 1}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.py", "x = 2\n"), ("recipes/base.yaml", "optim: {lr: 2}\n"), ("recipes/new.py", "")],
)
def test_a_change_of_any_source_shows(package: Path, name: str, text: str) -> None:
    before = _hash_of_sources(package)
    (package / name).write_text(text, encoding="utf-8")
    assert _hash_of_sources(package) != before


def test_names_and_borders_of_files_count(package: Path) -> None:
    before = _hash_of_sources(package)
    (package / "a.py").rename(package / "c.py")
    renamed = _hash_of_sources(package)
    (package / "c.py").write_text("", encoding="utf-8")
    (package / "b.py").write_text("x = 1\n", encoding="utf-8")
    assert len({before, renamed, _hash_of_sources(package)}) == 3


def test_what_python_makes_of_sources_does_not_count(package: Path, tmp_path: Path) -> None:
    before = _hash_of_sources(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"\0")
    assert _hash_of_sources(package) == before
    assert _hash_of_sources(package.rename(tmp_path / "elsewhere")) == before


def test_the_library_that_is_loaded_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def library() -> str:
        code_version.code_version.cache_clear()
        return code_version.code_version()["library"]

    built = library()
    named = tmp_path / "kernels.so"
    monkeypatch.setenv("LONGPRETRAIN_LIBRARY", str(named))
    assert library() == "none"
    named.write_bytes(b"\x7fELF")
    assert library() not in ("none", built)
    monkeypatch.undo()
    assert library() == built


def git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=n", "-c", "user.email=n@n", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *name, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_what_git_says(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    assert _commit(checkout) == "", "no repository"
    git(checkout, "init")
    assert _commit(checkout) == "", "no commit yet"
    git(checkout, "commit", "--allow-empty", "-m", "one")
    first = git(checkout, "rev-parse", "HEAD")
    assert _commit(checkout) == first
    git(checkout, "pack-refs", "--all")
    assert _commit(checkout) == first, "packed"
    git(checkout, "worktree", "add", "-b", "beside", str(tmp_path / "tree"))
    git(tmp_path / "tree", "commit", "--allow-empty", "-m", "two")
    second = git(tmp_path / "tree", "rev-parse", "HEAD")
    assert (_commit(checkout), _commit(tmp_path / "tree")) == (first, second)
    git(checkout, "checkout", "--detach", second)
    assert _commit(checkout) == second, "no branch"
