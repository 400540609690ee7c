"""Files and folders that appear whole or not at all, and never at the cost of others' files."""

from __future__ import annotations

from pathlib import Path

import pytest

from longpretrain.errors import InputError
from longpretrain.files import fresh_folder, read_json_object, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def always(folder: Path) -> bool:
    return True


def never(folder: Path) -> bool:
    return False


def test_a_folder_and_its_parents_appear_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with fresh_folder(target, belongs=never) as fresh:
        (fresh / "file").write_text("text")
        assert not target.exists()
        assert fresh.parent == target.parent
    assert names(target) == ["file"]
    assert names(target.parent) == ["b"]


def test_an_empty_folder_is_taken_and_one_of_ours_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for text, belongs in (("first", never), ("second", always)):
        with fresh_folder(tmp_path / "a", belongs=belongs) as fresh:
            (fresh / text).touch()
        assert names(tmp_path / "a") == [text]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_does_not_belong_to_us_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("text")
    else:
        target.mkdir()
        (target / "file").touch()
    with (
        pytest.raises(InputError, match=r"a file|other files"),
        fresh_folder(target, belongs=never),
    ):
        pytest.fail("nothing must be written")
    assert names(tmp_path) == ["a"]


def test_what_arrives_while_we_write_is_kept(tmp_path: Path) -> None:
    """Asked again just before the rename: another process may have been quicker."""
    target = tmp_path / "a"
    with (
        pytest.raises(InputError, match="a folder with other files"),
        fresh_folder(target, belongs=never) as fresh,
    ):
        (fresh / "ours").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert names(target) == ["theirs"]
    assert names(tmp_path) == ["a"]


def test_two_writers_do_not_touch_each_others_work(tmp_path: Path) -> None:
    """As on two hosts, where process numbers are the same."""
    with fresh_folder(tmp_path / "a", belongs=always) as one:
        (one / "one").touch()
        with fresh_folder(tmp_path / "a", belongs=always) as two:
            (two / "two").touch()
            assert names(one) == ["one"]
        assert names(tmp_path / "a") == ["two"]
    assert names(tmp_path / "a") == ["one"]
    assert names(tmp_path) == ["a"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "real").mkdir(parents=True)
    (disk / "real" / "old").touch()
    link = tmp_path / "link"
    link.symlink_to(disk / "real")
    with fresh_folder(link, belongs=always) as fresh:
        assert fresh.parent == disk.resolve()
        (fresh / "new").touch()
    assert link.is_symlink()
    assert names(disk / "real") == names(link) == ["new"]
    assert (names(disk), names(tmp_path)) == (["real"], ["disk", "link"])


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt, SystemExit, OSError):
        with pytest.raises(error), fresh_folder(tmp_path / "a", belongs=never) as fresh:
            (fresh / "file").touch()
            raise error
    assert names(tmp_path) == []


def test_a_text_is_replaced_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    for text in ("one\n", "two\r\né"):
        write_atomically(tmp_path / "a", text)
        assert (tmp_path / "a").read_bytes() == text.encode()
    assert names(tmp_path) == ["a"]


def test_an_error_names_the_path_that_a_user_knows(tmp_path: Path) -> None:
    """Also of the rename at the end, which knows two names."""
    path = tmp_path / "a"
    path.mkdir()
    with pytest.raises(IsADirectoryError) as refused:
        write_atomically(path, "text")
    assert (refused.value.filename, refused.value.filename2) == (str(path), None)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "got no such file; wanted a JSON object"),
        (b"{", "got Expecting"),
        (b"[]", "got a list"),
        (b"null", "got a NoneType"),
        (b'{"a": "\xff"}', "got 'utf-8' codec"),
        (b"[" * 100_000, "got maximum recursion|got Stack overflow|got .*recursion"),
    ],
    ids=["absent", "cut", "list", "null", "not-utf8", "deep"],
)
def test_what_is_no_json_object_is_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.json: (?:{message}).*Ask again\."):
        read_json_object(tmp_path / "a.json", way_out="Ask again.")
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path / "a.json") == {"a": 1}
