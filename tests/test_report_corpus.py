"""Pictures and pages of a corpus, from plain numbers."""

from __future__ import annotations

import struct
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from longpretrain.errors import InputError
from longpretrain.report.corpus import CorpusSection, draw_corpora


def section(name: str = "train", **changes: object) -> CorpusSection:
    values: dict[str, object] = {
        "name": name, "edges": (4, 8, 16, 32), "documents": (10, 30, 60), "tokens": (60, 340, 1600),
        "facts": {"sources": "2 files"},
    }  # fmt: skip
    return CorpusSection(**values | changes)  # type: ignore[arg-type]


def size(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_picture(tmp_path: Path) -> None:
    for name, sections in (("one", [section()]), ("two", [section(), section("valid")])):
        out = tmp_path / f"{name}.png"
        draw_corpora(out, "data", sections)
        data = out.read_bytes()
        assert data.startswith(b"\x89PNG\r\n")
        assert min(size(data)) > 300
        draw_corpora(out, "data", sections)
        assert out.read_bytes() == data
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


class Page(HTMLParser):
    """Tags that are closed, and the figures' bars."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        for name, value in attributes:
            assert not (name in ("src", "href") and "//" in str(value)), value
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_complete_in_itself(tmp_path: Path) -> None:
    out = tmp_path / "a.HTML"
    one = section(
        filters=[("deduplicate", "of 100 documents 7 dropped")],
        examples=[("deduplicate", "a.jsonl line 3", "peace <b>& trade")],
        problems=[("a.jsonl line 9", "got no JSON")],
        samples=[("17 (12 tokens)", "Fellow <script>alert(1)</script>")],
    )
    draw_corpora(
        out, "data <i>& more", [one, section("valid", edges=(8, 16), documents=(5,), tokens=(50,))]
    )
    page = Page(out.read_text())
    assert page.open == []
    for told in (
        "data <i>& more", "105", "2.0k", "of 100 documents 7 dropped", "a.jsonl line 3",
        "peace <b>& trade", "got no JSON", "Fellow <script>alert(1)</script>", "16-31", "1,600",
    ):  # fmt: skip
        assert told in page.text, told


def test_bars_are_as_high_as_the_shares(tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    draw_corpora(out, "data", [section()])
    text = out.read_text()
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    assert "train, documents: most, 60%, at 16 to 31 tokens." in svg
    assert "#030303" not in svg  # replaced by the page's own colours
    bars = [
        path.attrib["d"]
        for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
        if "--accent-0" in path.attrib.get("style", "")
    ]
    heights, left = [], []
    for bar in bars:
        words = bar.split()
        ys = [float(word) for word in words[2::3]]
        heights.append(max(ys) - min(ys))
        left.append(float(words[1]))
    assert len(heights) == 3
    assert left[1] - left[0] == pytest.approx(left[2] - left[1], rel=0.01)
    assert left[1] > left[0]
    assert heights[1] / heights[0] == pytest.approx(3, rel=0.01)
    assert heights[2] / heights[0] == pytest.approx(6, rel=0.01)


def test_bins_that_only_one_of_two_has(tmp_path: Path) -> None:
    far = section("valid", edges=(1024, 2048), documents=(5,), tokens=(9000,))
    for name in ("a.png", "a.html"):
        draw_corpora(tmp_path / name, "data", [section(), far])
        assert (tmp_path / name).stat().st_size > 5000


def test_another_suffix(tmp_path: Path) -> None:
    for name in ("a.pdf", "a"):
        with pytest.raises(InputError, match=r"got the suffix '.*'; wanted \.png"):
            draw_corpora(tmp_path / name, "data", [section()])
    assert list(tmp_path.iterdir()) == []
