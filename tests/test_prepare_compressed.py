"""Packed files in every way they come: whole, several in one, cut short at any byte, damaged."""

from __future__ import annotations

import errno
import gzip
import io
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_inputs import PACK, outcomes, read, texts

from longpretrain.errors import InputError
from longpretrain.prepare import compressed
from longpretrain.prepare.compressed import CHUNK_BYTES, unpack
from longpretrain.prepare.documents import Document, Problem
from longpretrain.prepare.inputs import COMPRESSIONS
from longpretrain.prepare.unusable import DamagedError, UnusableError

each_format = pytest.mark.parametrize("suffix", sorted(COMPRESSIONS))
# Many blocks of zstd, a part of which is what random bytes are.
LARGE = random.Random(5).randbytes(300_000) + b"a line of text\n" * 50_000


def unpacked(data: bytes, suffix: str) -> bytes:
    return b"".join(unpack(io.BytesIO(data), COMPRESSIONS[suffix]))


class TestWhole:
    @each_format
    @pytest.mark.parametrize("data", [b"", b"a", LARGE], ids=["empty", "small", "large"])
    def test_once(self, suffix, data):
        assert unpacked(PACK[suffix](data), suffix) == data

    @settings(max_examples=50, deadline=None)
    @given(
        suffix=st.sampled_from(sorted(COMPRESSIONS)),
        members=st.lists(st.binary(max_size=50) | st.just(LARGE[:20_000]), min_size=1, max_size=4),
        read_bytes=st.sampled_from([1, 7, 1 << 16]),
    )
    def test_several_in_one(self, suffix: str, members: list[bytes], read_bytes: int) -> None:
        packed = b"".join(PACK[suffix](member) for member in members)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compressed, "_READ_BYTES", read_bytes)
            assert unpacked(packed, suffix) == b"".join(members)

    def test_zeros_after_gzip(self):
        """As on a tape, whose blocks are filled up."""
        packed = gzip.compress(b"abc") + b"\0" * 200_000
        assert unpacked(packed, ".gz") == b"abc"
        assert unpacked(packed + gzip.compress(b"d"), ".gz") == b"abcd"

    @pytest.mark.parametrize(
        "options",
        [{}, {"write_content_size": False}, {"write_checksum": True}, {"level": 19}],
        ids=["plain", "no size", "checksum", "level"],
    )
    @pytest.mark.parametrize("size", [0, 1, 255, 256, 70_000, 1_050_000])
    def test_zstd_of_every_header(self, options, size):
        data = LARGE[:size]
        assert unpacked(zstandard.ZstdCompressor(**options).compress(data), ".zst") == data
        streamed = zstandard.ZstdCompressor(**options).compressobj()
        packed = streamed.compress(data) + streamed.flush()
        assert unpacked(packed, ".zst") == data

    def test_zstd_frames_to_be_skipped(self):
        """As pzstd and seekable files have them."""
        skipped = b"\x5e\x2a\x4d\x18" + (100_000).to_bytes(4, "little") + b"?" * 100_000
        frame = zstandard.compress(b"abc")
        assert unpacked(skipped + frame + skipped + frame, ".zst") == b"abcabc"
        with pytest.raises(DamagedError, match="end early"):
            unpacked(frame + skipped[:-1], ".zst")

    def test_a_window_of_zstd_is_not_larger_than_memory_allows(self):
        for window_log in (27, 28):
            parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
            streamed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
            packed = streamed.compress(b"abc") + streamed.flush()
            if window_log == 27:
                assert unpacked(packed, ".zst") == b"abc"
                continue
            with pytest.raises(UnusableError, match="a window above 128 MiB") as info:
                unpacked(packed, ".zst")
            assert "without --long" in info.value.way_out

    @each_format
    def test_memory_is_bounded(self, suffix):
        """A hundred bytes may stand for a million."""
        packed = PACK[suffix](bytes(10 * CHUNK_BYTES))
        sizes = [len(chunk) for chunk in unpack(io.BytesIO(packed), COMPRESSIONS[suffix])]
        assert sum(sizes) == 10 * CHUNK_BYTES
        assert max(sizes) <= CHUNK_BYTES

    @pytest.mark.parametrize("tool", ["gzip", "bzip2", "zstd"])
    def test_what_the_tool_packs(self, tmp_path, tool):
        if not shutil.which(tool):
            pytest.skip(f"no {tool} on this machine")
        suffix = {"gzip": ".gz", "bzip2": ".bz2", "zstd": ".zst"}[tool]
        (tmp_path / "a.txt").write_bytes(LARGE)
        subprocess.run([tool, "-q", tmp_path / "a.txt"], check=True)
        assert unpacked((tmp_path / f"a.txt{suffix}").read_bytes(), suffix) == LARGE


class TestDamaged:
    @each_format
    def test_cut_short_at_any_byte(self, suffix):
        """Of two pieces; where the first ends nobody can tell that there was another."""
        first = PACK[suffix](b"one\n" * 50)
        packed = first + PACK[suffix](b"two\n" * 50)
        for end in range(len(packed)):
            if end == len(first):
                assert unpacked(packed[:end], suffix) == b"one\n" * 50
                continue
            with pytest.raises(DamagedError, match="data that end early"):
                unpacked(packed[:end], suffix)

    @each_format
    def test_cut_short_far_inside(self, suffix):
        packed = PACK[suffix](LARGE)
        for part in (0.3, 0.7, 0.99):
            with pytest.raises(DamagedError, match=r"data that end early, after \d+ bytes"):
                unpacked(packed[: int(part * len(packed))], suffix)

    @each_format
    @pytest.mark.parametrize("data", [b"plain text\n", b"{}", b"\x1f\x8b..........", b"PK\3\4...."])
    def test_no_such_format(self, suffix, data):
        with pytest.raises(DamagedError, match=r"no \w+ data"):
            unpacked(data + b"?" * 20, suffix)

    @each_format
    def test_more_bytes_after_the_end(self, suffix):
        """They may be documents, packed in another way."""
        with pytest.raises(DamagedError, match=r"damaged \w+ data"):
            unpacked(PACK[suffix](b"abc") + b"no packed piece", suffix)

    @each_format
    def test_another_byte_inside(self, suffix):
        """Each format sums up its text (zstd where it was asked to)."""
        packed = bytearray(PACK[suffix](LARGE))
        packed[len(packed) // 2] ^= 1
        with pytest.raises(DamagedError, match=rf"{'no|' if suffix == '.bz2' else ''}damaged"):
            unpacked(bytes(packed), suffix)

    @each_format
    def test_a_disk_that_fails_is_no_damage(self, suffix):
        """What the system says is told as such, and not skipped."""

        class Failing(io.BytesIO):
            def read(self, most=-1):
                data = super().read(most)
                if not data:
                    raise OSError(errno.EIO, "Input/output error")
                return data

        with pytest.raises(OSError, match="Input/output error"):
            list(unpack(Failing(PACK[suffix](LARGE)[:-20]), COMPRESSIONS[suffix]))

    @each_format
    def test_that_stops_or_is_skipped_with_what_follows(self, tmp_path, suffix):
        numbers = random.Random(3).sample(range(10**12), 30_000)
        data = b"".join(b'{"text": "%d ............................"}\n' % n for n in numbers)
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(PACK[suffix](data)[:-2000])
        with pytest.raises(InputError, match=rf"a\.jsonl\{suffix}: got \w+ data that end early"):
            read(path)
        *documents, problem = read(path, on_error="skip")
        assert isinstance(problem, Problem)
        assert problem.place == path.name
        assert "data that end early" in problem.reason
        # The last line in part is no document.
        assert 0 < len(documents) < len(numbers)
        assert documents[-1] == Document(
            f"{numbers[len(documents) - 1]} {'.' * 28}", f"{path.name} line {len(documents)}"
        )

    @each_format
    def test_a_text_cut_short_is_no_document(self, tmp_path, suffix):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACK[suffix](LARGE)[:-9])
        assert [type(item) for item in read(path, documents="file", on_error="skip")] == [Problem]

    @each_format
    def test_a_plain_file_with_its_suffix(self, tmp_path, suffix):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(b"plain text, which nobody packed\n")
        with pytest.raises(InputError, match=rf"a\.txt\{suffix}: got no \w+ data") as info:
            read(path, documents="file")
        assert "Get it again" in info.value.way_out
        assert [item.place for item in read(path, on_error="skip")] == [f"a.txt{suffix}"]

    @pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.txt.bz2", "a.parquet.gz"])
    def test_an_empty_file_is_cut_short(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=r"got .* data that end early, after 0 bytes"):
            read(tmp_path / name)


class TestRead:
    @settings(max_examples=60, deadline=None)
    @given(
        suffix=st.sampled_from(sorted(COMPRESSIONS)),
        name=st.sampled_from(["a.txt", "b.txt", "a.jsonl"]),
        data=st.text(st.sampled_from("a\n é{}\r\x00"), max_size=80),
    )
    def test_packing_changes_no_document(
        self, tmp_path_factory, suffix: str, name: str, data: str
    ) -> None:
        path: Path = tmp_path_factory.mktemp("packed") / name
        path.write_bytes(data.encode())
        packed = path.with_name(name + suffix)
        packed.write_bytes(PACK[suffix](data.encode()))
        documents = "blank-line" if name == "b.txt" else "file"
        plain, same = (
            outcomes(read(which, documents=documents, on_error="skip")) for which in (path, packed)
        )
        assert plain == same

    def test_two_members_make_one_line(self, tmp_path):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"text": "ab') + gzip.compress(b'c"}\n{"text": "d"}'))
        assert texts(read(path)) == ["abc", "d"]
