"""The sources of a recipe: what share budgets come to, what is refused, what is told."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from mix_run import make_sources, mix_words
from test_data_blocks import make_corpus

from longpretrain.data.blocks import Order
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.recipe import load_recipe
from longpretrain.schedule import update_numbers
from longpretrain.tasks.masked_lm import MaskedLMTask
from longpretrain.tasks.sources import Sources


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def sources(small_run: Path, corpora: Path) -> Callable[..., Sources]:
    def make(*words: str, **given: str) -> Sources:
        overrides = mix_words(corpora, **given) if given else []
        config = load_recipe(str(small_run / "recipe.yaml"), [*overrides, *words])
        return Sources(config, "train", load_tokenizer(None), owner="the model")

    return make


def lengths(sources: Sources) -> dict[str, int]:
    return {each.name: len(each.blocks) for each in sources._sources}


class TestShares:
    def test_weights_are_shares_of_samples(self, sources: Callable[..., Sources]) -> None:
        assert sources(a="weight=1", b="weight=0.5").mix.shares(0) == [
            Fraction(2, 3),
            Fraction(1, 3),
        ]

    @pytest.mark.parametrize("policy", ["full_sentences", "document"])
    def test_budgets_are_of_tokens(self, sources: Callable[..., Sources], policy: str) -> None:
        """Also where the samples of one source hold more tokens than the other's."""
        made = sources(f"data.blocks={policy}", a="tokens=3e5", b="tokens=1e5")
        tokens = [
            share * each.blocks.num_tokens / len(each.blocks)
            for share, each in zip(made.mix.shares(0), made._sources, strict=True)
        ]
        assert tokens[0] == 3 * tokens[1]

    def test_epochs_are_passes(self, sources: Callable[..., Sources]) -> None:
        """Over the whole mix, each source is taken so many times, to the sample."""
        made = sources(a="epochs=3", b="epochs=1/2", c="epochs=1")
        size = lengths(made)
        samples = 6 * size["a"] + size["b"] + 2 * size["c"]  # two passes over the mix
        assert made.mix.counts(samples) == [6 * size["a"], size["b"], 2 * size["c"]]

    def test_budgets_and_epochs_side_by_side(self, sources: Callable[..., Sources]) -> None:
        alone = sources(a="epochs=1", b="epochs=1")
        tokens = alone._sources[0].blocks.num_tokens
        assert sources(a=f"tokens={tokens}", b="epochs=1").mix.shares(0) == alone.mix.shares(0)


def test_a_sample_can_be_found_again(sources: Callable[..., Sources], corpora: Path) -> None:
    """What is told of a sample leads to its block: by the folder, whatever the source's name."""
    made = sources(a="weight=1", b="weight=0.5")
    names = set()
    for number in range(12):
        told = made.describe(number)
        names.add(told["source"])
        blocks, epoch, block = made.locate(number)
        assert (told["epoch"], told["block"]) == (epoch, block)
        assert Path(told["folder"]) == blocks.corpus.folder == corpora / told["source"]
    assert names == {"a", "b"}


class TestSelection:
    def test_short_documents_and_other_parts_are_left_out(
        self, sources: Callable[..., Sources]
    ) -> None:
        made = sources(a="weight=1", b="weight=1 min_document_tokens=200 fraction=1/2")
        corpus = made._sources[1].blocks.corpus
        long = sum(len(corpus.document(n)) >= 200 for n in range(corpus.num_documents))
        chosen = made._sources[1].blocks.num_documents
        assert 0 < chosen < long < corpus.num_documents
        assert made._sources[0].blocks.num_documents == 20

    def test_one_corpus_in_two_selections(
        self, sources: Callable[..., Sources], corpora: Path
    ) -> None:
        """Long documents may be taken more often; the same documents twice are a slip."""
        again = f"data.mix.long.path={corpora / 'a'}"
        words = (again, "data.mix.long.weight=1", "data.mix.long.min_document_tokens=200")
        assert len(sources(*words, a="weight=1", b="weight=1")._sources) == 3
        with pytest.raises(InputError, match=r"data\.mix: got the same documents as a and as long"):
            sources(*words[:2], a="weight=1", b="weight=1")


def test_any_rank_makes_the_same_samples(small_run: Path, corpora: Path) -> None:
    """A sample of a mix follows from its number, whoever asks, in whatever order; each source's
    samples are masked for the pass over that source.
    """
    words = mix_words(corpora, a="weight=1", b="weight=2", c="weight=3 from_sample=20")
    config = load_recipe(str(small_run / "recipe.yaml"), [*words, "log.sample_ids=true"])
    whole = MaskedLMTask(config, Path(config.model.path))
    samples = [whole.sample(number) for number in range(60)]
    for ranks in (2, 3, 4):
        updates = [
            update_numbers(
                step,
                global_sequences=12,
                micro_sequences=1,
                accumulation=12 // ranks,
                world_size=ranks,
                rank=rank,
            )
            for rank in reversed(range(ranks))
            for step in (5, 1, 3, 2, 4)
        ]
        other = MaskedLMTask(config, Path(config.model.path))
        made = {number: other.sample(number) for groups in updates for (number,) in groups}
        assert sorted(made) == list(range(60))
        for number, sample in made.items():
            assert sample.sample_id == samples[number].sample_id
            assert sample.dropout_seed == samples[number].dropout_seed
            assert np.array_equal(sample.tokens_N, samples[number].tokens_N)
            assert np.array_equal(sample.positions_M, samples[number].positions_M)
    repeated = [s for s in samples if [o.sample_id for o in samples].count(s.sample_id) > 1]
    assert repeated, "c is taken more than once"
    assert len({s.dropout_seed for s in repeated}) == len(repeated)


class TestOneCorpus:
    def test_a_mix_of_one_is_the_plain_run(
        self, small_run: Path, corpora: Path, sources: Callable[..., Sources]
    ) -> None:
        """The same samples, masks, seeds and identities, bit for bit."""

        def task(*words: str) -> MaskedLMTask:
            config = load_recipe(str(small_run / "recipe.yaml"), ["run.seed=3", *words])
            return MaskedLMTask(config, Path(config.model.path))

        plain = task(f"data.train={corpora / 'a'}")
        mix = task(*mix_words(corpora, a="weight=3", b="weight=1 from_sample=1000"))
        order = Order(len(plain.blocks), seed=3)
        for number in (0, 1, 5, 20, 21, 22, 99):
            one, other = plain.sample(number), mix.sample(number)
            for name in ("tokens_N", "positions_M", "targets_M"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
            assert (one.dropout_seed, one.sample_id) == (other.dropout_seed, other.sample_id)
            assert plain.epoch(number) == mix.epoch(number)
            assert one.sample_id == plain.blocks.sample_id(order.locate(number)[1])
        assert plain.identity()["corpus"] == plain.corpus.fingerprint

    def test_no_data_at_all(self, sources: Callable[..., Sources]) -> None:
        with pytest.raises(InputError, match=r"data\.train=DIR, or give data\.mix"):
            sources("data.train=null")


class TestWhatIsSaid:
    def test_table(self, sources: Callable[..., Sources]) -> None:
        """Documents and tokens of what is chosen, shares as they are at the end, passes."""
        made = sources(a="weight=1", b="weight=3", c="weight=4 from_sample=40")
        head, *rows = made.table(120)
        assert " ".join(head.split()) == "source documents tokens from sample share epochs filled"
        cells = {row.split()[0]: row.split() for row in rows}
        assert [cells[name][4] for name in "abc"] == ["12.50%", "37.50%", "50.00%"]
        assert [cells[name][3] for name in "abc"] == ["0", "0", "40"]
        assert cells["a"][1:3] == ["20", f"{made._sources[0].blocks.num_tokens:,}"]
        assert float(cells["c"][5]) == pytest.approx(40 / lengths(made)["c"], abs=0.1)
        assert len({len(row) for row in (head, *rows)}) == 1
        assert "mix of 3 sources" in made.summary
        assert sources().table(120) == []

    def test_epoch_is_that_of_the_most_repeated_source(
        self, sources: Callable[..., Sources]
    ) -> None:
        made = sources(a="weight=1", c="weight=1")
        size = lengths(made)
        assert size["c"] < size["a"]
        epochs = [made.epoch(number) for number in range(6 * size["c"])]
        assert epochs == sorted(epochs)
        assert (epochs[0], epochs[-1]) == (0, 2)

    def test_another_tokenizer(self, sources: Callable[..., Sources], tmp_path: Path) -> None:
        make_corpus(tmp_path, [30, 40])
        words = (f"data.mix.other.path={tmp_path}", "data.mix.other.weight=1")
        with pytest.raises(InputError, match="tokenizer"):
            sources(*words, a="weight=1")
