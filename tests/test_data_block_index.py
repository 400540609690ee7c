"""Index files: built once, shared, not trusted when damaged, private where none can be kept."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_data_blocks import blocks_of, make_corpus

from longpretrain.data import Corpus, block_index
from longpretrain.data.block_index import BlockIndex, IndexWriter, load_index

KEY = {"corpus": "c", "max_tokens": 7}


class Builder:
    """Writes two arrays and counts how often; the first build has ``meanwhile`` done in it."""

    def __init__(self, meanwhile: Callable[[], object] | None = None) -> None:
        self.times = 0
        self._meanwhile = meanwhile

    def __call__(self, writer: IndexWriter) -> dict[str, int]:
        self.times += 1
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile:
            meanwhile()
        writer.append("long", np.arange(5))
        writer.append("short", np.arange(3, dtype=np.int32))
        writer.append("long", np.arange(5, 900))
        writer.append("none", np.zeros(0, np.int64))
        return {"blocks": 4}


def check(index: BlockIndex) -> None:
    assert index["long"].tolist() == list(range(900))
    assert index["short"].tolist() == [0, 1, 2]
    assert len(index["none"]) == 0
    assert index["short"].dtype == np.int32
    assert index.facts == {"blocks": 4}
    assert not index["long"].flags.writeable
    assert index["long"].ctypes.data % 64 == 0


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_built_once(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        check(load_index(tmp_path, KEY, 10, build))
    assert build.times == 1
    (name,) = files(tmp_path)
    assert name.startswith(block_index.PREFIX)


def test_another_key_has_another(tmp_path: Path) -> None:
    build = Builder()
    for key in (KEY, {**KEY, "max_tokens": 8}, {**KEY, "selection": [1, 2]}):
        check(load_index(tmp_path, key, 10, build))
    assert build.times == len(files(tmp_path)) == 3


def test_another_version_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    load_index(tmp_path, KEY, 10, build)
    monkeypatch.setattr(block_index, "VERSION", 2)
    load_index(tmp_path, KEY, 10, build)
    assert build.times == 2


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    """docs/data_format.md, read without our reader."""
    index = load_index(tmp_path, KEY, 10, Builder())
    data = index.path.read_bytes()
    assert hashlib.sha256(data[:-32]).digest() == data[-32:]
    length = int.from_bytes(data[:8], "little")
    tree = json.loads(data[8 : 8 + length])
    assert json.loads(tree["key"]) == {"version": 1, **KEY}
    assert tree["arrays"] == [["long", "<i8", 900], ["short", "<i4", 3], ["none", "<i8", 0]]
    start = 8 + length
    assert start % 64 == 0
    assert np.frombuffer(data, "<i8", 900, start).tolist() == list(range(900))
    assert np.frombuffer(data, "<i4", 3, start + 900 * 8 + 32).tolist() == [0, 1, 2]


def _altered(place: int, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


NO_OBJECT = b"\x02" + bytes(7) + b"[]"


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: b"",
        lambda data: data + b"x",
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: NO_OBJECT + hashlib.sha256(NO_OBJECT).digest(),
        *(partial(_altered, place) for place in (3, 30, 500, 5000, -1)),
    ],
    ids=["cut", "short", "empty", "longer", "zeros", "ones", "no object", *map(str, range(5))],
)
def test_a_damaged_one_is_built_again(
    tmp_path: Path, damage: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    build = Builder()
    path = load_index(tmp_path, KEY, 10, build).path
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    check(load_index(tmp_path, KEY, 10, build))
    assert build.times == 2
    assert path.read_bytes() == whole
    assert capfd.readouterr().err == f"{path}: damaged, so it is built again\n"
    assert files(tmp_path) == [path.name]


def test_a_file_of_another_key_under_its_name(tmp_path: Path) -> None:
    """Two keys whose short hashes are equal, or a file that somebody renamed."""
    build = Builder()
    path = load_index(tmp_path, KEY, 10, build).path
    other = load_index(tmp_path, {**KEY, "max_tokens": 8}, 10, build).path
    path.write_bytes(other.read_bytes())
    check(load_index(tmp_path, KEY, 10, build))
    assert build.times == 3


class TestSeveralAtOnce:
    def test_the_first_to_end_is_kept(self, tmp_path: Path) -> None:
        """A file that others may have mapped is not replaced by its equal."""
        inodes: list[int] = []

        def another_rank() -> None:
            other = load_index(tmp_path, KEY, 10, Builder())
            inodes.append(other.path.stat().st_ino)

        mine = load_index(tmp_path, KEY, 10, Builder(another_rank))
        check(mine)
        assert inodes == [mine.path.stat().st_ino]
        assert files(tmp_path) == [mine.path.name]

    def test_one_that_comes_meanwhile_is_not_called_damaged(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        read = block_index._read

        def slowly(path: Path, key: str) -> BlockIndex | None:
            monkeypatch.setattr(block_index, "_read", read)
            found = read(path, key)
            load_index(tmp_path, KEY, 10, Builder())  # another rank
            return found

        monkeypatch.setattr(block_index, "_read", slowly)
        check(load_index(tmp_path, KEY, 10, Builder()))
        assert capfd.readouterr().err == ""

    def test_ranks(self, tmp_path: Path) -> None:
        """Four that begin together; the bytes do not depend on who wins."""
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: load_index(tmp_path, KEY, 10, Builder()), range(8)))
        for index in found:
            check(index)
        assert files(tmp_path) == [found[0].path.name]


class TestUnwritableFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A corpus on a file system without room for another name: /proc takes no files, whoever
        asks.
        """
        private = tmp_path / "private"
        private.mkdir()
        monkeypatch.setattr(block_index.tempfile, "tempdir", str(private))
        return Path("/proc/self")

    def test_it_is_private_and_goes(
        self, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        index = load_index(folder, KEY, 10, Builder())
        check(index)
        assert index.path.parent == tmp_path / "private"
        said = capfd.readouterr().err
        assert said.startswith(f"{folder}: the index of its blocks cannot be kept there (")
        assert said.count("\n") == 1
        worker = pickle.loads(pickle.dumps(index))
        check(worker)
        long = worker["long"]
        del index, worker
        gc.collect()
        assert files(tmp_path / "private") == []
        assert int(long[899]) == 899

    def test_an_error_leaves_nothing(self, folder: Path, tmp_path: Path) -> None:
        def build(writer: IndexWriter) -> dict[str, int]:
            raise OSError("a shard that cannot be read")

        with pytest.raises(OSError, match="a shard that"):
            load_index(folder, KEY, 10, build)
        assert files(tmp_path / "private") == []


def test_an_error_while_building_leaves_nothing(tmp_path: Path) -> None:
    def build(writer: IndexWriter) -> dict[str, int]:
        writer.append("long", np.arange(5))
        raise KeyError

    with pytest.raises(KeyError):
        load_index(tmp_path, KEY, 10, build)
    assert files(tmp_path) == []


def test_a_long_wait_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_index(tmp_path, KEY, 12_345_678, Builder())
    load_index(tmp_path, KEY, 12_345_678, Builder())
    said = capfd.readouterr().err
    assert said == f"{tmp_path}: indexing the blocks of 12,345,678 documents, once\n"


def test_a_killed_build_leaves_a_whole_corpus(tmp_path: Path) -> None:
    """kill -9 on the way: nothing under the index's name, and the next one builds it."""
    make_corpus(tmp_path, [5, 60, 7])
    code = (
        "import os, signal; from longpretrain.data import Blocks, Corpus, packing\n"
        "packing.pack = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Blocks(Corpus.open({str(tmp_path)!r}), policy='packed', max_tokens=9, bos_id=0, eos_id=2)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not [name for name in files(tmp_path) if name.startswith(block_index.PREFIX)]
    assert len(blocks_of(Corpus.open(tmp_path), "packed", 9)) > 8
