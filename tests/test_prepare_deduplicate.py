"""Duplicates found by sorting buckets of hashes are those that a dictionary finds."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.prepare import deduplicate as deduplicate_module
from longpretrain.prepare.deduplicate import Duplicates, document_hash, find_duplicates

# Hashes that begin alike for no, some and all but one of their bytes, and that differ at the end.
HASHES = st.builds(
    lambda start, byte, end: bytes(start) + bytes([byte]) + bytes([end]) * (15 - start),
    st.sampled_from([0, 1, 7, 8, 14, 15]),
    st.integers(0, 3),
    st.integers(0, 2),
)


def write(folder: Path, parts: list[list[bytes]]) -> list[Path]:
    paths = [folder / f"unit-{number:06d}.hash" for number in range(len(parts))]
    for path, hashes in zip(paths, parts, strict=True):
        path.write_bytes(b"".join(hashes))
    return paths


def twin(parts: list[list[bytes]]) -> list[list[bool]]:
    seen: set[bytes] = set()
    found = []
    for hashes in parts:
        found.append([])
        for hash_ in hashes:
            found[-1].append(hash_ in seen)
            seen.add(hash_)
    return found


def find(folder: Path, parts: list[list[bytes]], max_records: int) -> Duplicates:
    work = folder / "work"
    work.mkdir()
    return find_duplicates(write(folder, parts), work, max_records)


class TestFind:
    @settings(max_examples=60, deadline=None)
    @given(
        parts=st.lists(st.lists(HASHES, max_size=30), max_size=6), max_records=st.integers(2, 40)
    )
    def test_as_a_dictionary_does(
        self, tmp_path_factory, parts: list[list[bytes]], max_records: int
    ) -> None:
        folder = tmp_path_factory.mktemp("hashes")
        found = find(folder, parts, max_records)
        right = twin(parts)
        assert [found.of(number).tolist() for number in range(len(parts))] == right
        assert found.count == sum(map(sum, right))
        # The work is tidied up.
        assert [path.name for path in (folder / "work").iterdir()] == ["duplicates.bin"]

    def test_one_text_everywhere(self, tmp_path):
        """Its bucket would never become small enough, were it not for the chunks."""
        same = document_hash("the same")
        parts = [[same] * 500, [document_hash("another")], [same] * 500]
        found = find(tmp_path, parts, 2)
        assert found.count == 999
        assert found.of(0).tolist() == [False] + [True] * 499
        assert found.of(2).all()

    @pytest.mark.parametrize("parts", [[], [[]], [[], []]])
    def test_of_nothing(self, tmp_path, parts):
        found = find(tmp_path, parts, 2)
        assert (found.count, [len(found.of(i)) for i in range(len(parts))]) == (0, [0] * len(parts))

    def test_is_read_by_another_process(self, tmp_path):
        found = find(tmp_path, [[b"a" * 16] * 2, [b"b" * 16, b"a" * 16]], 1000)
        other = pickle.loads(pickle.dumps(found))
        assert [other.of(i).tolist() for i in (0, 1)] == [[False, True], [False, True]]

    def test_memory_is_flat(self, tmp_path):
        """Ten times the documents, of which half are duplicates, take no more of it."""
        peaks = []
        for size in (40_000, 400_000):
            folder = tmp_path / str(size)
            folder.mkdir()
            numbers = np.random.default_rng(0).integers(0, size // 2, size)
            hashes = np.frombuffer(
                hashlib.shake_128(b"").digest(16 * (size // 2)), "V16"
            )[numbers]  # fmt: skip
            path = folder / "a.hash"
            path.write_bytes(hashes.tobytes())
            (folder / "work").mkdir()
            tracemalloc.start()
            found = find_duplicates([path], folder / "work", 1 << 12)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert found.count == size - len(np.unique(numbers))
        assert peaks[1] < 1.2 * peaks[0]
        assert peaks[1] < 120 * (1 << 12) + (1 << 20)


class TestHash:
    def test_is_blake2b_of_the_text(self, monkeypatch):
        monkeypatch.setattr(deduplicate_module, "_SLICE_CHARS", 3)
        for text in ("", "a", "abc", "abcd é👍 and more"):
            assert document_hash(text) == hashlib.blake2b(text.encode(), digest_size=16).digest()
