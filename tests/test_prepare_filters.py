"""Filters by name: what each changes or drops, in which order, and what it says of it."""

from __future__ import annotations

import itertools
import json
import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.errors import InputError
from longpretrain.prepare import filters as filters_module
from longpretrain.prepare.documents import Document
from longpretrain.prepare.filters import Example, FilterReport, Filters, merge_reports

WORDS = st.lists(st.sampled_from(["a", "é", "e\u0301", "ﬁ", "①", "가", "\u1100\u1161"]), max_size=8)


def run(names, texts):
    """The texts that stay, a token a character, and the reports."""
    work = Filters.parse(names).start()
    kept = []
    for number, text in enumerate(texts):
        document = work.clean(Document(text, f"line {number}"))
        if work.keep(document, len(document.text)):
            kept.append(document.text)
    return kept, work.reports


class TestParse:
    def test_names_come_in_the_order_of_work(self):
        given = ["deduplicate", "max_tokens=9", "unicode=nfc", "min_tokens=2"]
        filters = Filters.parse(given)
        assert filters.names == ("unicode=nfc", "max_tokens=9", "min_tokens=2", "deduplicate")
        assert filters.deduplicate
        assert pickle.loads(pickle.dumps(filters)) == filters
        assert Filters.parse(filters.names) == filters

    def test_none(self):
        assert Filters.parse([]) == Filters()
        assert run([], ["", "a"]) == (["", "a"], [])

    @pytest.mark.parametrize(
        ("names", "match"),
        [
            (["unicode=nfd"], "filter unicode=nfd: got 'unicode=nfd'; wanted unicode=nfc, "),
            (["unicode"], "got 'unicode'; wanted"),
            (["lowercase"], "got 'lowercase'; wanted"),
            ([""], "got ''; wanted"),
            (["deduplicate=yes"], "got 'deduplicate=yes'; wanted"),
            (["min_tokens=0"], "min_tokens=0: got '0'; wanted a number of tokens above 0"),
            (["min_tokens=-1"], "got '-1'; wanted"),
            (["max_tokens=1e3"], "got '1e3'; wanted"),
            (["max_tokens=²"], "got '²'; wanted"),
            (["max_tokens"], "got 'max_tokens'; wanted"),
            (["min_tokens=1", "min_tokens=2"], "got min_tokens twice; wanted each filter once"),
            (["unicode=nfc", "unicode=nfkc"], "got unicode twice"),
            (["min_tokens=9", "max_tokens=8"], "min_tokens: got 9, above max_tokens; wanted at m"),
        ],
    )
    def test_refused(self, names, match):
        with pytest.raises(InputError, match=match) as info:
            Filters.parse(names)
        assert info.value.way_out == "Correct --filter."


class TestUnicode:
    def test_changes_are_counted_and_shown_where_they_are(self):
        long = "plain " * 100 + "e\u0301 and on"
        kept, [report] = run(["unicode=nfc"], ["plain", "e\u0301", long, "é", "ﬁ"])
        assert kept == ["plain", "é", "plain " * 100 + "é and on", "é", "ﬁ"]
        assert (report.seen, report.changed, report.dropped) == (5, 2, 0)
        assert report.examples[0] == Example("line 1", "e\u0301")
        assert report.examples[1].text.startswith("ain plain ")
        assert report.examples[1].text.endswith("e\u0301 and on")

    def test_nfkc(self):
        assert run(["unicode=nfkc"], ["ﬁ ①"])[0] == ["fi 1"]

    @settings(max_examples=200)
    @given(text=st.one_of(st.text(max_size=60), WORDS.map("".join)), form=st.sampled_from("ck"))
    def test_in_parts_as_in_one(self, text, form):
        name = {"c": "nfc", "k": "nfkc"}[form]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(filters_module, "_PART_CHARS", 2)
            kept, _ = run([f"unicode={name}"], [text])
        assert kept == [unicodedata.normalize(name.upper(), text)]

    def test_what_is_normal_is_not_copied(self, monkeypatch):
        monkeypatch.setattr(filters_module, "_PART_CHARS", 2)
        document = Document("é plain \U0001f600", "p")
        text = document.text
        work = Filters.parse(["unicode=nfkc"]).start()
        assert work.clean(document).text is text
        assert work.reports[0].changed == 0

    def test_the_first_change_is_shown_of_a_text_in_parts(self, monkeypatch):
        monkeypatch.setattr(filters_module, "_PART_CHARS", 4)
        text = "plain é " * 100 + "e\u0301 and on, e\u0301 too"
        kept, [report] = run(["unicode=nfc"], [text])
        assert kept == [unicodedata.normalize("NFC", text)]
        [example] = report.examples
        assert example.text == text[760:840]

    def test_no_ascii_character_joins_what_is_before_it(self):
        """What the cut into parts rests on: no pair of this Unicode that composes ends with one."""
        composing = [
            parts
            for code in range(0x110000)
            if "<" not in (parts := unicodedata.decomposition(chr(code))) and " " in parts
        ]
        assert len(composing) > 900
        assert all(int(parts.split()[-1], 16) > 0x7F for parts in composing)
        assert not any(unicodedata.combining(chr(code)) for code in range(0x80))

    def test_a_document_that_was_mended_stays_so(self):
        work = Filters.parse(["unicode=nfc"]).start()
        assert work.clean(Document("e\u0301\ufffd", "p", True)) == Document("é\ufffd", "p", True)


class TestTokens:
    def test_both_ends_are_kept(self):
        texts = ["x" * n for n in range(1, 8)]
        kept, [least, most] = run(["min_tokens=3", "max_tokens=5"], texts)
        assert [len(text) for text in kept] == [3, 4, 5]
        assert (least.seen, least.dropped, least.tokens_dropped) == (7, 2, 3)
        assert (most.seen, most.dropped, most.tokens_dropped) == (5, 2, 13)
        assert least.examples == [Example("line 0", "x"), Example("line 1", "xx")]

    def test_three_examples_of_eighty_characters(self):
        _, [report] = run(["max_tokens=1"], ["y" * n for n in range(100, 110)])
        assert report.dropped == 10
        assert report.examples == [Example(f"line {n}", "y" * 80) for n in range(3)]

    @settings(max_examples=100)
    @given(
        texts=st.lists(WORDS.map("".join), max_size=12),
        names=st.permutations(["unicode=nfkc", "min_tokens=2", "max_tokens=6", "deduplicate"]),
        count=st.integers(0, 4),
    )
    def test_together_they_are_one_after_another(self, texts, names, count):
        """In any order given: as runs of one filter each, first those of text, as documented."""
        names = names[:count]
        kept, reports = run(names, texts)
        left = texts
        for name in Filters.parse(names).names:
            seen = len(left)
            left, [report] = run([name], left)
            together = next(report for report in reports if report.name == name)
            assert (together.seen, report.seen) == (seen, seen)
            assert together.dropped == report.dropped == seen - len(left)
            assert together.changed == report.changed
            assert together.tokens_dropped == report.tokens_dropped
        assert kept == left


class TestReports:
    @settings(max_examples=100)
    @given(
        texts=st.lists(st.text("xyz", min_size=1, max_size=6), max_size=20),
        cuts=st.lists(st.integers(0, 20), max_size=4),
    )
    def test_of_units_are_those_of_the_whole(self, texts, cuts):
        names = ["min_tokens=2", "max_tokens=4", "deduplicate"]
        documents = [Document(text, str(number)) for number, text in enumerate(texts)]

        def reports(some):
            work = Filters.parse(names).start()
            for document in some:
                if work.keep(document, len(document.text)) and document.text == "xx":
                    work.reports[-1].drop(document.place, document.text, 2)
            return [
                FilterReport.from_json(json.loads(json.dumps(r.to_json()))) for r in work.reports
            ]

        ends = [0, *sorted(min(cut, len(texts)) for cut in cuts), len(texts)]
        units = [reports(documents[start:end]) for start, end in itertools.pairwise(ends)]
        assert merge_reports(units) == reports(documents)

    def test_of_no_unit(self):
        assert merge_reports([]) == []
