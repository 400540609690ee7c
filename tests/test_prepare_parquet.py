"""The text column of a table: every type that holds text, nulls, and tables that are none."""

from __future__ import annotations

import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_inputs import PACK, outcomes, read, table, texts
from pyarrow import parquet

from longpretrain.errors import InputError
from longpretrain.prepare import parquet as parquet_module
from longpretrain.prepare.documents import Document, Problem
from longpretrain.prepare.parquet import row_groups

TEXTS = ["one", "", "é 👍\n", " \n", "x" * 5000]
TYPES = [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()]
TYPES += [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.binary_view()]


def column(path, array):
    parquet.write_table(pa.table({"text": array}), path)
    return path


class TestTypes:
    @pytest.mark.parametrize("type_", TYPES, ids=str)
    def test_text(self, tmp_path, type_):
        array = pa.array(TEXTS).cast(pa.binary()) if "binary" in str(type_) else pa.array(TEXTS)
        path = column(tmp_path / "a.parquet", array.cast(type_))
        assert read(path) == [
            Document("one", "a.parquet row 1"),
            Document("", "a.parquet row 2"),
            Document("é 👍\n", "a.parquet row 3"),
            Document("", "a.parquet row 4"),
            Document("x" * 5000, "a.parquet row 5"),
        ]

    @settings(max_examples=40, deadline=None)
    @given(
        cells=st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=1, max_size=30),
        rows=st.integers(1, 40),
        compression=st.sampled_from(["snappy", "zstd", "none"]),
        dictionary=st.booleans(),
    )
    def test_any_texts(self, tmp_path_factory, cells, rows, compression, dictionary):
        path = tmp_path_factory.mktemp("t") / "a.parquet"
        table(path, cells, rows, compression=compression, use_dictionary=dictionary)
        found = read(path, on_error="replace")
        assert [item.place for item in found] == [
            f"a.parquet row {1 + i}" for i in range(len(cells))
        ]
        for item, cell in zip(found, cells, strict=True):
            if cell is None:
                assert isinstance(item, Problem)
            else:
                assert isinstance(item, Document)
                text = cell.replace("\0", "\ufffd")
                assert item.text == ("" if not text.strip() else text)
                assert item.mended == ("\0" in cell)

    def test_of_another_type(self, tmp_path):
        path = table(tmp_path / "a.parquet", TEXTS)
        with pytest.raises(InputError, match=r"a\.parquet: got int64 in column 'id'; wanted str"):
            read(path, field="id")
        column(path, pa.array([["a"]]))
        with pytest.raises(InputError, match=r"got list<\w+: string> in column 'text'; wanted"):
            read(path)

    def test_without_the_column(self, tmp_path):
        path = table(tmp_path / "a.parquet", TEXTS)
        with pytest.raises(InputError, match=r"got columns id, text, more; wanted a column 'body'"):
            read(path, field="body")
        assert outcomes(read(path, field="body", on_error="skip")) == [
            "[got columns id, text, more; wanted a column 'body']"
        ]

    def test_beside_columns_of_many_parts(self, tmp_path):
        """A stored column's number is not its place among the fields."""
        path = tmp_path / "a.parquet"
        many = [{"a": 1, "text": "no"}] * 3
        parquet.write_table(pa.table({"s": many, "l": [[1]] * 3, "text": ["a", "b", "c"]}), path)
        assert texts(read(path)) == ["a", "b", "c"]

    def test_sizes_are_those_of_the_text(self, tmp_path):
        path = tmp_path / "a.parquet"
        columns = {"s": [{"a": 1, "b": "no"}] * 2, "text": ["x" * 9000, "y" * 9000]}
        parquet.write_table(pa.table(columns), path, write_statistics=False, row_group_size=1)
        starts, sizes = zip(
            *((g.start, g.text_bytes) for g in row_groups(path, "text")), strict=True
        )
        assert all(9000 <= size < 9100 for size in sizes)
        assert 0 == starts[0] < starts[1]

    @pytest.mark.parametrize("type_", TYPES, ids=str)
    def test_a_part_of_a_column(self, type_):
        """As a batch may be."""
        values = [b"0", b"one", None, b"", b"four", b"5"]
        array = pa.array(values, pa.binary())
        array = array if "binary" in str(type_) else array.cast(pa.string())
        cells = list(parquet_module._cells(array.cast(type_).slice(1, 4)))
        assert [None if cell is None else bytes(cell) for cell in cells] == values[1:5]


class TestCells:
    def test_null(self, tmp_path):
        path = table(tmp_path / "a.parquet", ["a", None, "b"])
        with pytest.raises(InputError, match=r"a\.parquet row 2: got null in column 'text'"):
            read(path)
        assert read(path, on_error="skip")[1] == Problem(
            "a.parquet row 2", "got null in column 'text'; wanted text"
        )

    def test_nothing_but_null(self, tmp_path):
        path = table(tmp_path / "a.parquet", [None, None])
        assert [type(item) for item in read(path, on_error="skip")] == [Problem, Problem]

    def test_text_that_is_not_utf8(self, tmp_path):
        """Arrow trusts who wrote it."""
        array = pa.array([b"a\xe9", b"b\0", b"c"]).view(pa.string())
        path = column(tmp_path / "a.parquet", array)
        with pytest.raises(InputError, match=r"row 1: got byte 0xe9 at offset 1; wanted UTF-8"):
            read(path)
        assert outcomes(read(path, on_error="skip")) == [
            "[got byte 0xe9 at offset 1; wanted UTF-8 text]",
            "[got a NUL byte at offset 1; wanted text]", "c",
        ]  # fmt: skip
        assert texts(read(path, on_error="replace")) == ["a\ufffd", "b\ufffd", "c"]

    def test_many_rows_in_a_group(self, tmp_path):
        """More than a batch holds, of sizes that differ."""
        numbers = random.Random(4)
        cells = [f"{i} " * numbers.choice([1, 9, 900]) for i in range(5000)]
        path = table(tmp_path / "a.parquet", cells, 3000)
        assert texts(read(path)) == cells


class TestFiles:
    def test_that_are_none(self, tmp_path):
        path = tmp_path / "a.parquet"
        for data in (b"", b"PAR1", b"PAR1" + b"?" * 99, b'{"text": "a"}\n' * 9):
            path.write_bytes(data)
            with pytest.raises(InputError, match=r"a\.parquet: got no Parquet that can be read"):
                read(path)
            assert [item.place for item in read(path, on_error="skip")] == ["a.parquet"]

    def test_cut_short(self, tmp_path):
        path = table(tmp_path / "a.parquet", TEXTS)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match=r"a\.parquet: got no Parquet that can be read"):
            read(path)

    def test_damaged_pages(self, tmp_path):
        """What was read before them is kept."""
        cells = [f"{i} {random.Random(i).random()}" for i in range(4000)]
        path = table(tmp_path / "a.parquet", cells, 1000, compression="zstd")
        data = bytearray(path.read_bytes())
        group = parquet.ParquetFile(path).metadata.row_group(2).column(1)
        start = group.dictionary_page_offset or group.data_page_offset
        end = start + group.total_compressed_size
        data[start + 99 : end - 99] = b"?" * (end - start - 198)
        path.write_bytes(data)
        *documents, problem = read(path, on_error="skip")
        assert texts(documents) == cells[:2000]
        assert problem.place == "a.parquet"
        with pytest.raises(InputError, match=r"a\.parquet: got no Parquet that can be read"):
            read(path)

    @pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2"])
    def test_packed(self, tmp_path, suffix):
        plain = table(tmp_path / "a.parquet", TEXTS)
        data = PACK[suffix](plain.read_bytes())
        packed = tmp_path / f"a.parquet{suffix}"
        packed.write_bytes(data)
        assert outcomes(read(packed)) == outcomes(read(plain))
        packed.write_bytes(data[:-5])
        with pytest.raises(InputError, match=r"got \w+ data that end early"):
            read(packed)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([plain.name, packed.name])
