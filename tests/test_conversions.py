"""docs/conversions.md lists the tests that prove a conversion, all of them and nothing else.

`make matrix` runs them under both transformers; here they are only collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conversions.__main__ import MARK, PAGE, TESTS, marked_files, run_marked
from conversions.page import Key, keys, keys_of_page, lines, markdown
from conversions.record import FAILED, NOT_RUN, PASSED, Proof, Record, proofs_of, read_record

pytest_plugins = ["pytester"]

WAY_OUT = "run `make matrix`, which writes the page"


def proof(test: str, outcome: str = PASSED, **more: object) -> Proof:
    texts = {"family": "RoBERTa", "direction": "HF -> Longformer", "checked": "logits"}
    return Proof(f"tests/test_a.py::{test}", **texts, outcome=outcome, **more)  # type: ignore[arg-type]


def test_the_page_lists_exactly_the_marked_tests(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    record = run_marked(tmp_path / "record.json", "--collect-only", "-q")
    collected = {one.test for one in record.proofs}
    assert collected
    # A mark that the words in the files do not tell of, if this run has collected such a test.
    here = {item.nodeid for item in request.session.items if proofs_of(item)}
    assert here <= collected, f"{sorted(here - collected)}: write {MARK} in the test's own file"
    on_page = keys_of_page(PAGE.read_text(encoding="utf-8"))
    assert on_page == keys(record.proofs), WAY_OUT


def test_marks_are_looked_for_where_tests_are() -> None:
    assert str(TESTS / "test_accelerated.py") in marked_files()


def test_a_line_is_ok_only_if_all_its_tests_passed() -> None:
    key = Key("RoBERTa", "HF -> Longformer", "logits", "2 of test_a.py")
    for second, cell in (
        (proof("y", reported={"cosine": "0.98"}), "ok: cosine 0.98"),
        (proof("y", FAILED), "**FAILED** (1 of 2)"),
        (proof("y", NOT_RUN, why="needs | weights"), "**not run** (1 of 2): needs / weights"),
        (proof("y", NOT_RUN), "**not run** (1 of 2)"),
    ):
        record = Record("5.23.0", [proof("x"), second])
        assert [(line.key, line.cells) for line in lines([record])] == [(key, [cell])]
        assert keys_of_page(f"# Head\n\nWords.\n\n{markdown([record])}") == [key]


def test_figures_of_several_tests_are_a_range() -> None:
    proofs = [
        proof("x", reported={"difference": "2e-06", "kept": "yes"}),
        proof("y", reported={"difference": "1e-05", "kept": "yes"}),
        proof("z", reported={"difference": "3e-07", "kept": "no"}),
    ]
    (line,) = lines([Record("5.23.0", proofs)])
    assert line.cells == ["ok: difference 3e-07 to 1e-05, kept yes, no"]


def test_families_have_a_section_each() -> None:
    families = ("XLM-RoBERTa", "BERT (no head)", "RoBERTa", "BERT, real", "BERT")
    proofs = [Proof(f"tests/test_a.py::{f}", f, "A -> B", "bits") for f in families]
    text = markdown([Record("5.23.0", proofs)])
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == ["## BERT", "## RoBERTa", "## XLM-RoBERTa"]
    assert keys_of_page(text) == keys(proofs)
    assert [key.family for key in keys(proofs)][:3] == ["BERT", "BERT (no head)", "BERT, real"]


def test_a_test_that_one_version_lacks_is_not_run_there() -> None:
    first, second = Record("5.23.0", [proof("x"), proof("y")]), Record("4.57.1", [proof("x")])
    assert lines([first, second])[0].cells == ["ok", "**not run** (1 of 2)"]
    assert lines([second, first])[0].cells == ["**not run** (1 of 2)", "ok"]


def test_the_plugin_writes_how_each_marked_test_came_out(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    conversion: as in the project")
    pytester.makepyfile(
        test_b="""
        import pytest

        pytestmark = pytest.mark.conversion(family="{name}", direction="A -> B", checked="bits")

        @pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
        def test_passes(name, request):
            request.node.user_properties.append(("conversion", ("cosine", "0.98")))

        @pytest.mark.parametrize("name", ["no"])
        def test_fails(name):
            raise AssertionError

        @pytest.mark.parametrize("name", ["late"])
        def test_breaks_at_its_end(name, request):
            request.addfinalizer(lambda: 1 / 0)

        @pytest.mark.parametrize("name", ["away"])
        def test_is_skipped(name):
            pytest.skip("there is no file")
        """
    )
    record = pytester.path / "record.json"
    run = pytester.runpytest_inprocess("-p", "conversions.record", "--conversions", str(record))
    run.assert_outcomes(passed=3, failed=1, errors=1, skipped=1)
    found = {one.family: (one.outcome, one.why, one.reported) for one in read_record(record).proofs}
    assert found == {
        "BERT": (PASSED, "", {"cosine": "0.98"}),
        "RoBERTa": (PASSED, "", {"cosine": "0.98"}),
        "no": (FAILED, "", {}),
        "late": (FAILED, "", {}),
        "away": (NOT_RUN, "there is no file", {}),
    }


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('family="BERT", direction="A -> B"', "wants"),
        ('"BERT", direction="A -> B", checked="bits"', "wants"),
        ('family="BERT", direction="A -> B", checked=""', "wants"),
        ('family="BERT", direction="A | B", checked="bits"', "no cell of a table"),
    ],
)
def test_a_mark_that_makes_no_line_is_refused(
    pytester: pytest.Pytester, mark: str, said: str
) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    conversion: as in the project")
    pytester.makepyfile(
        test_b=f"import pytest\n@pytest.mark.conversion({mark})\ndef test_x(): pass\n"
    )
    run = pytester.runpytest_inprocess("-p", "conversions.record", "--conversions", "record.json")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"*test_b.py::test_x: *{said}*"])
