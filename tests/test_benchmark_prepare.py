"""The preparation benchmark: its inputs, its arithmetic, and what it says. No time is judged."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import scripts_importable

with scripts_importable():
    import prepare as benchmark
    import prepare_measure
    import prepare_peers
    import prepare_report
    import prepare_runs
    import prepare_texts

TEXTS = ["one\n\ntwo", "three — four", "five"]


def speed(name: str, form: str, cpu_rate: float | None, rate: float | None = 1.0) -> dict[str, Any]:
    return {
        "name": name, "form": form, "input_mb": 500, "tokens": 1000, "wall_s": 2.0, "cpu_s": 2.0,
        "start_wall_s": 1.0, "start_cpu_s": 1.0, "tokens_per_cpu_s": cpu_rate, "tokens_per_s": rate,
    }  # fmt: skip


def results() -> dict[str, Any]:
    """Of an imaginary machine, on which every promise is kept, some exactly."""
    rows = []
    for form, scale in (("speeches", 1.0), ("passages", 0.9)):
        rows += [
            speed("ours 1", form, 6e6 * scale, 6e6 * scale),
            speed("ours 2", form, 6e6 * scale, 11e6 * scale),
            speed("fairseq", form, 5e5 * scale),
            speed("datasets", form, 5e5),
        ]
    long = {"input_mb": 167, "documents": 1, "tokens": 1, "wall_s": 1.0}
    return {
        "date": "2026-01-31T00:00:00", "machine": {"cpu": "X", "cores": 2, "memory_gib": 8},
        "versions": {"python": "3.11"}, "settings": {"quick": False}, "method": "How.",
        "not_measured": ["something: a reason"], "speed": rows,
        "memory": [
            {**long, "long_mb": 0, "is_wide": False, "peaks_mb": [250.0, 100.0]},
            {**long, "long_mb": 67.1, "is_wide": False, "peaks_mb": [300.0]},
            {**long, "long_mb": 67.1, "is_wide": True, "peaks_mb": [90.0, 400.0]},
        ],
        "blocks": {
            "open": {"documents": 10**7, "tokens": 10**9, "open_s": 0.5, "mb": 100.0},
            **{
                name: {"blocks": 9, "build_s": 1, "open_s": 0, "mb": 1, "p99_us": 9}
                | {"median_us": us}
                for name, us in (("full_sentences", 20.0), ("packed", 50.0))
            },
        },
        "round_trip": [
            {"form": "speeches", "documents": 9, "same": 9, "tokens": 9, "blocks": 1, "fill": 0.99},
            {"form": "passages", "documents": 9, "same": 9, "tokens": 9, "blocks": 1, "fill": 0.98},
        ],
    }  # fmt: skip


class TestInputs:
    def test_passages_are_all_of_the_text(self) -> None:
        text = "\n\n".join("x" * length for length in (30, 80, 10, 10, 100, 5))
        found = list(prepare_texts.passages(text, 100))
        assert "\n\n".join(found) == text
        assert [len(passage) for passage in found] == [112, 124, 5]

    def test_each_pass_holds_every_text_once_in_another_order(self) -> None:
        texts = list(map(str, range(50)))
        source = prepare_texts.endless(texts)
        passes = [[next(source) for _ in texts] for _ in range(3)]
        assert all(sorted(one) == sorted(texts) for one in passes)
        assert passes[0] == texts
        assert passes[1] != texts != passes[2] != passes[1]

    def test_jsonl_of_a_size(self, tmp_path: Path) -> None:
        path = tmp_path / "in.jsonl"
        prepare_texts.write_jsonl(path, TEXTS, 0)
        assert [json.loads(line)["text"] for line in path.open(encoding="utf-8")] == TEXTS
        prepare_texts.write_jsonl(path, TEXTS, 10_000)
        assert 10_000 <= path.stat().st_size < 10_100
        assert {json.loads(line)["text"] for line in path.open(encoding="utf-8")} == set(TEXTS)

    @pytest.mark.parametrize("start", ["", prepare_measure.WIDE])
    def test_a_document_at_the_limit(self, tmp_path: Path, start: str) -> None:
        line = prepare_texts.long_document(TEXTS, 5000, start)
        assert 4900 < len(line) <= 5000
        assert json.loads(line)["text"].startswith(start + TEXTS[0])
        prepare_texts.write_jsonl(tmp_path / "a", TEXTS, 6000, long_line=5000, start=start)
        assert (tmp_path / "a").read_bytes().startswith(line)

    def test_text_as_fairseq_takes_it(self, tmp_path: Path) -> None:
        prepare_texts.write_lines(tmp_path / "a", TEXTS)
        assert (tmp_path / "a").read_text() == "one\ntwo\n\nthree — four\n\nfive\n\n"

    def test_a_share_is_spread_over_all(self) -> None:
        texts = [f"{number:03d}" for number in range(100)]
        assert prepare_texts.share(texts, 30) == texts[::10]
        assert prepare_texts.share(texts, 10_000) == texts


class TestRuns:
    def test_time_and_memory_of_a_program_and_its_child(self, tmp_path: Path) -> None:
        child = "x = bytearray(60_000_000); import time; time.sleep(0.3)"
        program = (
            "import subprocess, sys, time; x = bytearray(30_000_000)\n"
            f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
            "end = time.process_time() + 0.2\n"
            "while time.process_time() < end: pass\n"
            "print('done')"
        )
        ran = prepare_runs.run_measured([sys.executable, "-c", program], folder=tmp_path)
        assert ran.output == "done\n"
        assert len(ran.peaks_mb) == 2
        assert 60 < ran.peaks_mb[0] < 100
        assert 30 < ran.peaks_mb[1] < 60
        assert ran.cpu_s >= 0.2
        assert ran.wall_s >= 0.5

    def test_a_program_that_fails(self, tmp_path: Path) -> None:
        with pytest.raises(prepare_runs.FailedError, match=r"code 3: \['oh'\]"):
            prepare_runs.run_measured(["sh", "-c", "echo oh >&2; exit 3"], folder=tmp_path)


class TestPeers:
    def test_fairseq_gets_gpt2s_files(self, tmp_path: Path) -> None:
        prepare_peers.Fairseq(tmp_path / "peer")
        encoder = json.loads((tmp_path / "peer" / "encoder.json").read_text(encoding="utf-8"))
        assert len(encoder) == 50_257
        # As in the files that OpenAI published.
        assert [encoder[t] for t in ("!", "\u0120the", "Hello", "<|endoftext|>")] == [
            0, 262, 15496, 50_256,
        ]  # fmt: skip
        merges = (tmp_path / "peer" / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        assert len(merges) == 1 + 50_000
        assert merges[:2] == ["#version: 0.2", "\u0120 t"]
        dictionary = (tmp_path / "peer" / "dict.txt").read_text().splitlines()
        assert dictionary[0].split()[0] == "13"  # the full stop, RoBERTa's id 4

    def test_another_tokenization_is_no_comparison(self) -> None:
        ran = prepare_runs.Ran(1, 1, (), json.dumps({"documents": 1, "tokens": 2, "first": [[1]]}))
        with pytest.raises(prepare_peers.DifferentError):
            prepare_peers.Datasets._check(ran, ["peace"])


class TestReport:
    def test_a_start_is_left_out_of_rates(self) -> None:
        runs = [{"tokens": 1100, "wall_s": s, "cpu_s": 2 * s} for s in (3.0, 9.0, 5.0)]
        starts = [{"tokens": 100, "wall_s": s, "cpu_s": s} for s in (1.0, 1.0, 4.0)]
        row = prepare_measure.speed_row("x", runs, starts)
        assert (row["wall_s"], row["start_wall_s"]) == (5.0, 1.0)
        assert row["tokens_per_s"] == 1000 / 4
        assert row["tokens_per_cpu_s"] == 1000 / 9
        short = prepare_measure.speed_row("x", runs, runs)
        assert short["tokens_per_s"] is None

    def test_all_promises_kept(self) -> None:
        data = results()
        found = prepare_report.targets(data)
        assert [target.is_met for target in found] == [True] * 11
        assert found[0].measured == 12.0
        assert found[1].measured == pytest.approx(10.8)  # the worse of the two forms
        text = prepare_report.report(data)
        assert "NOT MET" not in text
        assert "Not measured: something: a reason" in text
        assert "ours 12.0x" in text
        assert "1.83x of 1 worker" in text

    @pytest.mark.parametrize(
        ("path", "value", "target"),
        [
            (("speed", 6, "tokens_per_cpu_s"), 6e5, 0),
            (("speed", 3, "tokens_per_cpu_s"), 1.1e6, 1),
            (("speed", 1, "tokens_per_s"), 10e6, 2),
            (("memory", 0, "peaks_mb"), [100.0, 401.0], 3),
            (("memory", 1, "peaks_mb"), [401.0], 4),
            (("memory", 2, "peaks_mb"), [100.0, 401.0], 5),
            (("blocks", "open", "open_s"), 2.1, 6),
            (("blocks", "open", "mb"), 201, 7),
            (("blocks", "packed", "median_us"), 101, 8),
            (("round_trip", 1, "fill"), 0.9799, 9),
            (("round_trip", 0, "same"), 8, 10),
        ],
    )
    def test_one_that_is_not(self, path: tuple[Any, ...], value: Any, target: int) -> None:
        data = copy.deepcopy(results())
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        found = [one.is_met for one in prepare_report.targets(data)]
        assert found == [number != target for number in range(11)]
        assert "NOT MET" in prepare_report.report(data)

    def test_what_was_left_out_is_not_judged(self) -> None:
        data = results()
        data["speed"][3]["tokens_per_cpu_s"] = None
        for part in ("memory", "blocks", "round_trip"):
            del data[part]
        verdicts = [target.is_met for target in prepare_report.targets(data)]
        assert verdicts == [True, None, True] + [None] * 8
        assert "not measured" in prepare_report.report(data)


class TestCommandLine:
    def test_one_part_for_real(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        benchmark.main(["--quick", "--only", "round_trip", "--out", str(tmp_path)])
        data = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert [(row["documents"], row["same"]) for row in data["round_trip"]] == [
            (249, 249), (5113, 5113),
        ]  # fmt: skip
        printed = capsys.readouterr().out
        assert next(tmp_path.glob("*.md")).read_text() in printed
        benchmark.main(["--redraw", str(next(tmp_path.glob("*.json")))])
        assert capsys.readouterr().out in printed

    def test_results_are_kept(self, tmp_path: Path) -> None:
        first = benchmark.fresh_path(tmp_path, "2026-01-31")
        first.touch()
        assert benchmark.fresh_path(tmp_path, "2026-01-31").name == "prepare-2026-01-31-2.json"
