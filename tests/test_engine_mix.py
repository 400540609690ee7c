"""Runs on a mix, through the real loop: stopped, moved to other ranks, joined by a source; and the
packaged recipe of the published corpus.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from mix_run import make_sources, mix_words
from ranks_helper import drive
from told import check_form, disk, exit_code

from longpretrain.convert.card import _training_sections
from longpretrain.engine import checkpoint, run_folder
from longpretrain.recipe import load_recipe
from longpretrain.report.html import write_report
from longpretrain.report.metrics import read_metrics
from longpretrain.tasks.masked_lm import MaskedLMTask

STEPS = 8
SEQUENCES = 4
STOPS = 3
"""The update after which runs are stopped: 12 samples seen, or 16 if the signal came a bit late."""
SHORT = ("log.sample_ids=true", "evaluate.every_steps=0", "checkpoint.every_steps=0")
A_AND_B = {"a": "weight=1", "b": "weight=1/2"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def stopped(small_run: Path, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs of two ranks, stopped by a signal: on a mix, and on one corpus."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = yaml.safe_load((small_run / "recipe.yaml").read_text())
    recipe["schedule"]["total_steps"] = STEPS
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = {"mix": mix_words(corpora, **A_AND_B), "plain": [f"data.train={corpora / 'a'}"]}
    commands = [
        {
            "arguments": [str(folder / "recipe.yaml"), f"run.dir={folder / name}", *SHORT, *more],
            "stop_after": STOPS,
        }
        for name, more in words.items()
    ]
    finished = drive(folder / "drive", 2, commands)
    assert finished.exit_codes == [75, 75], finished.output[-3000:]
    return folder


def copied(stopped: Path, tmp_path: Path, name: str) -> Path:
    import shutil

    return Path(shutil.copytree(stopped / name, tmp_path / name))


def go_on(stopped: Path, run_dir: Path, *words: str) -> int:
    return exit_code("train", stopped / "recipe.yaml", f"run.dir={run_dir}", *SHORT, *words)


def seen(run_dir: Path) -> list[int]:
    """Ids of all samples that a run took, in the order of its updates."""
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [identity for line in lines for identity in line["sample_ids"]]


def events(run_dir: Path) -> str:
    return "\n".join(
        line["event"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "event"
    )


def task(stopped: Path, *words: str) -> MaskedLMTask:
    config = load_recipe(str(stopped / "recipe.yaml"), words)
    return MaskedLMTask(config, Path(config.model.path))


def numbered(task: MaskedLMTask, last: int) -> list[int]:
    return [task.sample(number).sample_id for number in range(last)]


def samples_done(run_dir: Path) -> int:
    folder = checkpoint.latest(run_dir)
    assert folder
    return int(checkpoint.read_state(folder)["samples_done"])


@pytest.mark.usefixtures("process_group")
class TestGoingOn:
    def test_with_other_ranks_as_if_never_stopped(
        self, stopped: Path, corpora: Path, tmp_path: Path
    ) -> None:
        """Two ranks, then one with a process that makes its batches: the samples are those of the
        numbers, in their order.
        """
        run_dir = copied(stopped, tmp_path, "mix")
        words = mix_words(corpora, **A_AND_B)
        assert 0 < samples_done(run_dir) < STEPS * SEQUENCES
        assert go_on(stopped, run_dir, *words, "data.loader_workers=1") == 0
        assert seen(run_dir) == numbered(task(stopped, *words), STEPS * SEQUENCES)
        assert "source  documents  tokens" in events(run_dir)
        assert "33.33%" in events(run_dir)

    @pytest.mark.parametrize("name", ["mix", "plain"])
    def test_a_source_joins(self, name: str, stopped: Path, corpora: Path, tmp_path: Path) -> None:
        """From the first sample not yet seen: none is seen twice, none is left out, and its share
        holds from there on. Folders may have moved, and a run on one corpus becomes a mix.
        """
        run_dir = copied(stopped, tmp_path, name)
        done = samples_done(run_dir)
        given = {"mix": A_AND_B, "plain": {"a": "weight=3"}}[name]
        moved = tmp_path / "moved"
        moved.symlink_to(corpora)
        words = mix_words(moved, **given, c=f"weight=3/2 from_sample={done}")
        assert go_on(stopped, run_dir, *words) == 0
        ids = seen(run_dir)
        joined = task(stopped, *words)
        assert ids == numbered(joined, STEPS * SEQUENCES)
        before = mix_words(corpora, **given) if name == "mix" else [f"data.train={corpora / 'a'}"]
        assert ids[:done] == numbered(task(stopped, *before), done)
        counts = joined.sources.mix.counts(STEPS * SEQUENCES)
        share = {"mix": 1 / 2, "plain": 1 / 3}[name]
        assert counts[-1] == pytest.approx((STEPS * SEQUENCES - done) * share, abs=1)
        last = checkpoint.latest(run_dir)
        assert last
        assert checkpoint.read_state(last)["mix_version"] == 1
        assert len(set(ids)) == len(ids), "no source is through yet"

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"c": "weight=1 from_sample=8"}, "c from sample 8, which has passed"),
            (
                {"a": "weight=2"},
                "a with relative weight 4/5, not 2/3; b with relative weight 1/5, not 1/3",
            ),
            ({"b": "weight=1/2 min_document_tokens=100"}, "b with other documents"),
            ({"b": "weight=1/2 from_sample=4"}, "b from sample 4, not 0"),
        ],
        ids=["joins in the past", "a weight", "other documents", "another start"],
    )
    def test_another_past_is_refused(
        self,
        given: dict[str, str],
        named: str,
        stopped: Path,
        corpora: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run_dir = copied(stopped, tmp_path, "mix")
        before = disk(run_dir)
        words = mix_words(corpora, **(A_AND_B | given))
        for more in ([], ["--check"]):
            assert go_on(stopped, run_dir, *words, *more) == 2
            told = check_form(capsys.readouterr().err, "train")
            assert f"data.mix of the run: got {named}" in told
            assert f"may join with from_sample={samples_done(run_dir)} or more" in told
        assert disk(run_dir) == before

    def test_fresh_does_not_move_a_source(
        self, stopped: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import shutil

        run_dir = copied(stopped, tmp_path, "mix")
        shutil.copytree(corpora / "a", run_dir / "a")
        words = ["data.train=null", f"data.mix.a.path={run_dir / 'a'}", "data.mix.a.weight=1"]
        assert go_on(stopped, run_dir, *words, "--fresh") == 2
        assert "recipe key data.mix.a.path: got" in check_form(capsys.readouterr().err, "train")


@pytest.mark.usefixtures("process_group")
def test_an_altered_source_is_refused(
    stopped: Path, corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first update every byte of every source is read."""
    import shutil

    shutil.copytree(corpora, tmp_path / "own")
    tokens = tmp_path / "own" / "b" / "tokens-00000.bin"
    data = bytearray(tokens.read_bytes())
    data[-1] ^= 1
    tokens.write_bytes(data)
    assert go_on(stopped, tmp_path / "new", *mix_words(tmp_path / "own", **A_AND_B)) == 2
    assert f"altered shard {tokens}: got" in check_form(capsys.readouterr().err, "train")
    assert not (tmp_path / "new").exists()


class TestCheckpoint:
    def test_holds_the_mix_and_its_version(self, stopped: Path) -> None:
        folder = checkpoint.latest(stopped / "mix")
        assert folder
        state = checkpoint.read_state(folder)
        assert state["mix_version"] == 0
        weights = {key: json.loads(text) for key, text in state["task"].items() if "source" in key}
        assert {key: found["weight"] for key, found in weights.items()} == {
            "source a": "2/3",
            "source b": "1/3",
        }

    def test_of_one_corpus_is_as_it_always_was(self, stopped: Path) -> None:
        """So that runs go on with older checkpoints, and older versions with these."""
        folder = checkpoint.latest(stopped / "plain")
        assert folder
        assert sorted(checkpoint.read_state(folder)["task"]) == ["corpus", "tokenizer"]


@pytest.mark.usefixtures("process_group")
def test_the_published_corpus_trains(small_run: Path, corpora: Path, tmp_path: Path) -> None:
    """The packaged recipe, its four sources stood in for by small ones, a few updates."""
    small = yaml.safe_load((small_run / "recipe.yaml").read_text())
    path = {"books": "a", "wikipedia": "b", "realnews": "c", "stories": "b"}
    words = [f"data.mix.{name}.path={corpora / source}" for name, source in path.items()]
    words += [f"data.valid={small['data']['valid']}", f"model.path={small['model']['path']}"]
    words += ["model.attention_window=16", "data.max_tokens=128", "batch.global_sequences=13"]
    words += ["schedule.total_steps=5", "schedule.warmup_steps=1", "precision=fp32"]
    words += ["data.mix.realnews.min_document_tokens=90", "evaluate.batches=1"]
    words += [
        f"run.dir={tmp_path / 'run'}",
        "log.tensorboard=false",
        "data.mix.realnews.fraction=1",
    ]
    assert exit_code("train", "longformer-corpus", *words) == 0
    assert run_folder.read_status(tmp_path / "run")["state"] == "done"
    rows = {line.split()[0]: line.split() for line in events(tmp_path / "run").splitlines()}
    shares = {name: float(rows[name][4].rstrip("%")) for name in path}
    # Samples are all of one length, but for the last of each source: shares are those of tokens.
    wanted = {"books": 0.5, "wikipedia": 2.1, "realnews": 1.8, "stories": 2.1}
    for name, tokens in wanted.items():
        assert shares[name] == pytest.approx(100 * tokens / 6.5, abs=1.5)
    page = write_report(tmp_path / "run").read_text()
    assert f"books: {corpora / 'a'}, realnews: {corpora / 'c'}" in page
    last = checkpoint.latest(tmp_path / "run")
    assert last
    card = "".join(_training_sections(checkpoint.read_state(last)))
    assert "| books data | 20 documents" in card
    assert "tokens: 500000000" in card
    losses = [
        line["loss"]
        for line in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if line["kind"] == "train"
    ]
    assert len(losses) == 5
