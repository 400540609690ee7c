"""The folder of an unfinished corpus: one writer at a time, no room on the disk, what is left."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks_helper import rank_environment
from told import check_form, exit_code

from longpretrain.errors import InputError
from longpretrain.prepare import prepare
from longpretrain.prepare.work_folder import open_work, work_path

UNITS = {"unit_bytes": 2000}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    texts = (f"Document {i} with a few more words in it." for i in range(1000))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def nothing(text):
    raise AssertionError(text)


class TestOneWriter:
    def test_the_second_is_refused_and_told_who_the_first_is(self, source, tmp_path):
        """The first is another process, which holds the lock of a real preparation."""
        out = tmp_path / "out"
        script = (
            "import sys; from longpretrain.prepare import prepare\n"
            "def wait(done, total):\n"
            "    print(done, flush=True)\n"
            "    sys.stdin.read()\n"
            f"prepare([{str(source)!r}], {str(out)!r}, progress=wait, unit_bytes=2000)\n"
        )
        first = subprocess.Popen(
            [sys.executable, "-c", script], env=rank_environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert first.stdout.readline()
        who = rf"\({socket.gethostname()}, process {first.pid}, since 20\d\d-.*\)"
        with pytest.raises(InputError, match=f"got another prepare at work on it {who}; wanted"):
            prepare([source], out, **UNITS)
        with pytest.raises(InputError, match="got another prepare at work"):
            prepare([source], out, restart=True, **UNITS)
        first.communicate(b"")
        assert first.returncode == 0
        before = contents(out)
        prepare([source], out, **UNITS)
        assert contents(out) == before

    def test_a_lock_goes_with_its_process(self, tmp_path):
        """What a killed process left says who it was, and hinders nobody."""
        path = work_path(tmp_path / "out")
        path.mkdir()
        (path / "lock").write_text("elsewhere, process 1, since yesterday\n")
        with open_work(tmp_path / "out", restart=False, say=nothing) as work:
            assert work.path == path
            assert f"process {os.getpid()}," in (path / "lock").read_text()
            with (
                pytest.raises(InputError, match="another prepare at work"),
                open_work(tmp_path / "out", restart=False, say=nothing),
            ):
                pass
        assert not path.exists()

    def test_a_file_system_without_locks(self, source, tmp_path, monkeypatch):
        def refuse(*given):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
        said = []
        prepare([source], tmp_path / "out", say=said.append)
        (line,) = said
        assert "no locks here (Function not implemented)" in line
        assert f"{tmp_path / 'out'}" in line

    def test_long_names_have_a_folder_each(self, source, tmp_path):
        names = [f"{'n' * 230}{number}" for number in (1, 2)]
        folders = {work_path(tmp_path / name) for name in names}
        assert len(folders) == 2
        assert all(len(folder.name) < 256 for folder in folders)
        assert prepare([source], tmp_path / names[0]).documents == 1000


@contextlib.contextmanager
def largest_file(limit):
    """The system refuses to make a file longer, in this process and those it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", place],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


class TestNoRoom:
    """What was finished stays; with room again the same command goes on to the same bytes."""

    @pytest.fixture
    def wanted(self, source, tmp_path):
        prepare([source], tmp_path / "wanted", **UNITS)
        return contents(tmp_path / "wanted")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_full_disk(self, source, small_disk, wanted, workers):
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(1_300_000))
        out = small_disk / "out"
        with pytest.raises(OSError, match="No space left") as caught:
            prepare([source], out, workers=workers, **UNITS)
        assert str(caught.value.filename).startswith(str(out)), "the name that the user knows"
        work = work_path(out)
        parts = {path.name: path.stat().st_ino for path in (work / "parts").glob("[!.]*")}
        assert parts
        assert not out.exists()
        ballast.unlink()
        said = []
        prepare([source], out, say=said.append, **UNITS)
        assert contents(out) == wanted
        assert said == []
        assert [path.name for path in small_disk.iterdir()] == ["out"]

    def test_a_file_that_may_not_grow(self, source, tmp_path, wanted):
        """Of all files the shard is the largest: its parts are finished then."""
        out = tmp_path / "out"
        limit = max(map(len, wanted.values())) - 100
        said = []
        with largest_file(limit), pytest.raises(OSError, match="too large"):
            prepare([source], out, say=said.append, **UNITS)
        assert f"parts are finished and kept in {work_path(out)}" in said[0]
        assert not out.exists()
        prepare([source], out, **UNITS)
        assert contents(out) == wanted
        assert not work_path(out).exists()

    def test_it_is_told_in_one_line(self, source, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        with largest_file(100):
            assert exit_code("prepare", "in", "--out", "out") == 1
        assert "writing" in check_form(capsys.readouterr().err, "prepare")
        assert not Path("out").exists()
        assert not work_path(tmp_path / "out").exists()
