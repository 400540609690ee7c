"""Any cut of the inputs into units reads the documents that the whole files hold."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepare_inputs import PACK, lines, outcomes, read, read_pieces, table

from longpretrain.errors import InputError
from longpretrain.prepare import units as units_module
from longpretrain.prepare.documents import Problem, ReadOptions
from longpretrain.prepare.inputs import Piece, find_inputs
from longpretrain.prepare.units import Unit, plan_units

UNIT_BYTES = st.integers(1, 200)

# What borders are made of, and what is near to them.
SPACES = [b"\n", b"\n\n", b"\r\n", b" ", b"\t\n", b"\x1c\n", "\u00a0\n".encode()]
WORDS = [b"one", b"two ", "é👍".encode(), b"\xef\xbb\xbf", b"\xff", b"\0", b"x" * 70]
TEXT = st.lists(st.sampled_from(SPACES + WORDS), max_size=60).map(b"".join)
LINE = st.one_of(
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=9).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.sampled_from([b"", b" ", b"{", b'{"text": 1}', b'{"text": "\xff"}', b'{"text": "\\ud800"}']),
    st.integers(50, 90).map(lambda n: b'{"text": "%s"}' % (b"x" * n)),
)


def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("units")


class TestAnyCut:
    """Also of bytes that are no text: what is wrong is told the same, but for the place."""

    @settings(max_examples=300, deadline=None)
    @given(data=TEXT, unit_bytes=UNIT_BYTES, on_error=st.sampled_from(["skip", "replace"]))
    @example(data=b"\xef\xbb\xbf\n\na\n\nb", unit_bytes=1, on_error="skip")
    def test_of_text(self, tmp_path_factory, data: bytes, unit_bytes: int, on_error: str) -> None:
        path = folder(tmp_path_factory) / "a.txt"
        path.write_bytes(data)
        options = {"documents": "blank-line", "on_error": on_error, "max_document_bytes": 60}
        assert outcomes(read_pieces(path, unit_bytes, **options)) == outcomes(read(path, **options))

    @pytest.mark.parametrize("look_bytes", [2, 1 << 16])
    def test_of_text_at_every_byte(self, tmp_path, monkeypatch, look_bytes):
        """In the middle of spaces that end a line, and of a line longer than is looked at once."""
        monkeypatch.setattr(units_module, "_LOOK_BYTES", look_bytes)
        path = tmp_path / "a.txt"
        path.write_bytes(b"one    \ntwo\n    three  \n   \n\r\nfour\t\nfive\n\n\nsix\n \n")
        for unit_bytes in range(1, 60):
            found = read_pieces(path, unit_bytes, documents="blank-line")
            assert outcomes(found) == ["one    \ntwo\n    three", "four\t\nfive", "six"]

    def test_a_border_where_it_is_wanted_is_taken(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}, {"text": "b"}, {"text": "c"}))
        first = plan_units(find_inputs([tmp_path]), ReadOptions(), 28)[0]
        assert first.pieces[0].end == 28

    @settings(max_examples=300, deadline=None)
    @given(
        data=st.lists(LINE, max_size=20), end=st.sampled_from([b"", b"\n"]), unit_bytes=UNIT_BYTES,
        on_error=st.sampled_from(["skip", "replace"]),
    )  # fmt: skip
    def test_of_json_lines(
        self, tmp_path_factory, data: list[bytes], end: bytes, unit_bytes: int, on_error: str
    ) -> None:
        path = folder(tmp_path_factory) / "a.jsonl"
        path.write_bytes(b"\n".join(data) + end)
        options = {"on_error": on_error, "max_document_bytes": 80}
        found = read_pieces(path, unit_bytes, **options)
        assert outcomes(found) == outcomes(read(path, **options))

    @settings(max_examples=40, deadline=None)
    @given(
        texts=st.lists(st.one_of(st.none(), st.text(max_size=30)), max_size=20),
        rows=st.integers(1, 7), unit_bytes=UNIT_BYTES,
    )  # fmt: skip
    def test_of_a_table(
        self, tmp_path_factory, texts: list[str | None], rows: int, unit_bytes: int
    ) -> None:
        path = table(folder(tmp_path_factory) / "a.parquet", texts, rows)
        found = read_pieces(path, unit_bytes, on_error="skip")
        assert found == read(path, on_error="skip")  # with their places: rows of the file
        assert len(found) == len(texts)

    @settings(max_examples=40, deadline=None)
    @given(data=st.lists(LINE, max_size=20), suffix=st.sampled_from(sorted(PACK)))
    def test_of_packed_lines(self, tmp_path_factory, data: list[bytes], suffix: str) -> None:
        plain = folder(tmp_path_factory) / "a.jsonl"
        plain.write_bytes(b"\n".join(data))
        packed = plain.with_name("a.jsonl" + suffix)
        packed.write_bytes(PACK[suffix](plain.read_bytes()))
        assert outcomes(read_pieces(packed, 1, on_error="skip")) == outcomes(
            read(plain, on_error="skip")
        )

    def test_pieces_are_as_many_as_the_size_tells(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines(*({"text": "x" * 80} for _ in range(100))))
        [file] = find_inputs([path])
        units = plan_units([file], ReadOptions(), 1000)
        sizes = [unit.pieces[0].end - unit.pieces[0].start for unit in units]
        assert len(units) == 10
        assert all(size >= 1000 for size in sizes[:-1])
        assert max(sizes) <= 1000 + 93

    def test_a_line_longer_than_a_unit(self, tmp_path):
        """Looked through once, however many units it might have been."""
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines({"text": "x" * 500_000}, {"text": "y"}))
        [file] = find_inputs([path])
        first, last = (unit.pieces[0] for unit in plan_units([file], ReadOptions(), 1000))
        assert (first.start, first.end, last.end) == (0, 500_013, file.bytes)


class TestUnits:
    @settings(max_examples=50, deadline=None)
    @given(
        sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=30),
        unit_bytes=st.integers(1, 100_000),
    )
    def test_every_file_once_and_in_order(
        self, tmp_path_factory, sizes: list[int], unit_bytes: int
    ) -> None:
        root = folder(tmp_path_factory)
        for number, size in enumerate(sizes):
            (root / f"{number:02d}.txt").write_bytes(b"x" * size)
        units = plan_units(find_inputs([root]), ReadOptions(), unit_bytes)
        assert [unit.number for unit in units] == list(range(len(units)))
        pieces = [piece for unit in units for piece in unit.pieces]
        assert pieces == [Piece(number, 0, size) for number, size in enumerate(sizes)]
        weights = [sum(piece.end + 4096 for piece in unit.pieces) for unit in units]
        assert all(
            weight <= unit_bytes or len(unit.pieces) == 1
            for weight, unit in zip(weights, units, strict=True)
        )
        assert all(  # and none is cut short
            weight + after.pieces[0].end + 4096 > unit_bytes
            for weight, (_, after) in zip(weights, pairwise(units), strict=False)
        )

    def test_what_is_planned_depends_on_the_inputs_alone(self, tmp_path):
        for number in range(9):
            (tmp_path / f"{number}.jsonl").write_bytes(lines({"text": "x" * 1000 * number}))
        files = find_inputs([tmp_path])
        first = plan_units(files, ReadOptions(), 9000)
        assert first == plan_units(files, ReadOptions(on_error="replace"), 9000)
        assert first != plan_units(files[:5], ReadOptions(), 9000)

    @settings(max_examples=50)
    @given(
        number=st.integers(0),
        pieces=st.lists(
            st.builds(
                Piece,
                st.integers(0),
                st.integers(0),
                st.integers(0),
                st.none() | st.tuples(st.integers(0), st.integers(0)),
            )
        ),
    )
    def test_json(self, number: int, pieces: list[Piece]) -> None:
        unit = Unit(number, tuple(pieces))
        tree: Any = json.loads(json.dumps(unit.to_json()))
        assert Unit.from_json(tree) == unit

    def test_a_text_that_is_one_document_is_not_cut(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"a\n\n" * 100)
        files = find_inputs([tmp_path])
        assert len(plan_units(files, ReadOptions(documents="file"), 10)) == 1
        assert len(plan_units(files, ReadOptions(documents="blank-line"), 10)) > 20

    def test_packed_files_count_for_more(self, tmp_path):
        for number in range(4):
            (tmp_path / f"{number}.txt.gz").write_bytes(PACK[".gz"](b"x"))
            (tmp_path / f"{number}.txt").write_bytes(b"x" * 25)
        files = find_inputs([tmp_path])
        assert [len(unit.pieces) for unit in plan_units(files, ReadOptions(), 33_000)] == [7, 1]


class TestTables:
    def test_row_groups(self, tmp_path):
        texts = ["x" * 3000] * 10
        options = {"use_dictionary": False, "write_statistics": False}
        path = table(tmp_path / "a.parquet", texts, **options)
        [file] = find_inputs([path])
        pieces = [p for unit in plan_units([file], ReadOptions(), 13_000) for p in unit.pieces]
        assert [piece.row_groups for piece in pieces] == [(0, 1), (1, 3), (3, 5)]

    def test_without_rows(self, tmp_path):
        path = table(tmp_path / "a.parquet", [])
        assert read_pieces(path, 1) == []

    def test_what_is_wrong_is_told_before_anything_is_read(self, tmp_path):
        path = table(tmp_path / "a.parquet", ["a"])
        files = find_inputs([path])
        with pytest.raises(InputError, match=r"a\.parquet: got columns id, text, more; wanted"):
            plan_units(files, ReadOptions(field="body"))
        path.write_bytes(b"no table")
        with pytest.raises(InputError, match=r"a\.parquet: got no Parquet that can be read"):
            plan_units(files, ReadOptions())

    def test_or_skipped_when_its_turn_comes(self, tmp_path):
        path = tmp_path / "a.parquet"
        path.write_bytes(b"no table")
        [problem] = read_pieces(path, 1, on_error="skip")
        assert isinstance(problem, Problem)
        assert problem.place == "a.parquet"
