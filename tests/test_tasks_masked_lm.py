"""The task: a sample is what its number says, whoever asks; batches hold what the loss needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.evaluate.held_out import HeldOut
from longpretrain.model import read_config, read_tensors, save_model
from longpretrain.recipe import load_recipe
from longpretrain.tasks.masked_lm import MaskedLMTask, Sample


@pytest.fixture(scope="module")
def make_task(small_run: Path):
    def make(*overrides: str) -> MaskedLMTask:
        config = load_recipe(str(small_run / "recipe.yaml"), overrides)
        return MaskedLMTask(config, Path(config.model.path))

    return make


def test_a_sample_follows_from_its_number(make_task) -> None:
    """Asked in any order, by any task object, twice: the same tokens, masks, seed, identity."""
    one, other = make_task(), make_task()
    numbers = list(range(0, 3 * len(one.blocks), 7))
    backwards = {number: other.sample(number) for number in reversed(numbers)}
    for number in numbers:
        left, right = one.sample(number), backwards[number]
        for name in ("tokens_N", "positions_M", "targets_M"):
            assert np.array_equal(getattr(left, name), getattr(right, name)), name
        assert (left.dropout_seed, left.sample_id) == (right.dropout_seed, right.sample_id)


def test_identity_is_the_blocks_and_the_mask_is_the_epochs(make_task) -> None:
    task = make_task()
    size = len(task.blocks)
    first, second = ([task.sample(n) for n in range(e * size, (e + 1) * size)] for e in (0, 1))
    assert sorted(s.sample_id for s in first) == sorted(s.sample_id for s in second)
    assert [s.sample_id for s in first] != [s.sample_id for s in second]
    assert len({s.sample_id for s in first}) == size
    again = {s.sample_id: s for s in second}
    for sample in first:
        twin = again[sample.sample_id]
        assert not np.array_equal(sample.positions_M, twin.positions_M)
        assert sample.dropout_seed != twin.dropout_seed


def test_batch_tells_which_samples_it_holds(make_task) -> None:
    task = make_task()
    samples = [task.sample(number) for number in (3, 1, 3)]
    batch = task.collate(samples)
    assert task.sample_ids(batch) == [sample.sample_id for sample in samples]
    assert max(task.sample_ids(batch)) < 2**64
    assert task.count(batch) == sum(len(sample.targets_M) for sample in samples)
    assert task.tokens(batch) == sum(len(sample.tokens_N) for sample in samples)


def test_every_trained_parameter_has_a_gradient_in_every_batch(make_task, small_run: Path) -> None:
    """Also where no token of a batch is global: ZeRO 1 to 3 would decay a parameter without a
    gradient, stage 0 would not.
    """
    task = make_task("model.global_tokens=ids_50000")
    model = task.build_model(Path(task.config.model.path))
    batch = task.collate([task.sample(0), task.sample(1)])
    assert (batch["global_index_BG"] == -1).all(), "the id was chosen because nobody says it"
    task.loss(model, batch).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("query_global" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or "global" in name or ".key.bias" in name, name


@pytest.mark.parametrize("policy", ["ids_{full_stop}", "sentence_ends"])
def test_a_masked_token_does_not_tell_what_it_was(make_task, policy: str) -> None:
    """Global are the full stops that the model reads: not those that it has to guess."""
    full_stop = make_task().tokenizer.vocab["."]
    task = make_task(
        f"model.global_tokens={policy.format(full_stop=full_stop)}", "masking.probability=0.5"
    )
    held_out = HeldOut(
        task.corpus, task.tokenizer, max_tokens=128, probability=0.5,
        global_tokens=task.config.model.global_tokens,
    )  # fmt: skip
    for scored in (held_out[block] for block in range(len(held_out))):
        assert task.tokenizer.mask_id not in scored.inputs_N[scored.global_G]
    hidden = 0
    for number in range(3 * len(task.blocks)):
        sample = task.sample(number)
        targets = dict(zip(sample.positions_M.tolist(), sample.targets_M.tolist(), strict=True))
        read = sample.tokens_N[sample.global_G]
        assert full_stop in read or not (sample.tokens_N == full_stop).any()
        assert task.tokenizer.mask_id not in read
        hidden += sum(token == full_stop for token in targets.values())
    assert hidden > 10


def test_what_sentence_ends_means_is_told(make_task) -> None:
    assert make_task("model.global_tokens=first").global_summary == ""
    said = make_task("model.global_tokens=sentence_ends").global_summary
    assert said.startswith("global tokens: 119 of the tokenizer end a sentence: ")
    assert {".", "?", "!"} <= set(said.split())
    assert said.endswith(" ...")


class TestPacked:
    """Packed documents: each is to the model what it is alone."""

    @pytest.mark.parametrize(
        ("model", "global_tokens"),
        [("long", "none"), ("long", "first"), ("long", "every_7"), ("short", "none")],
    )
    def test_hidden_states_are_those_of_each_document_alone(
        self, make_task, small_run: Path, model: str, global_tokens: str
    ) -> None:
        """By the real encoder, fp32; rows of different lengths, so one is padded."""
        path = small_run / "models" / model
        task = make_task(
            f"model.path={path}", f"model.global_tokens={global_tokens}",
            "data.blocks=packed", f"data.max_tokens={128 if model == 'long' else 64}",
        )  # fmt: skip
        encoder = task.build_model(path).eval().longformer
        batch, rows = _packed_batch(task)
        inputs = (
            "padding_BN",
            "position_BN",
            "document_BN",
            "global_index_BG",
        )
        with torch.no_grad():
            packed = encoder(
                batch["tokens_BN"], **{name: batch[name] for name in inputs if name in batch}
            )
            documents = 0
            for row, sample in enumerate(rows):
                for document in np.unique(sample.document_N):
                    at = torch.from_numpy(np.flatnonzero(sample.document_N == document))
                    tokens_BN = batch["tokens_BN"][row, at][None]
                    places = torch.arange(len(at))[None].int()
                    chosen = {"none": None, "first": places[:, :1], "every_7": places[:, ::7]}
                    alone = encoder(tokens_BN, global_index_BG=chosen[global_tokens])
                    torch.testing.assert_close(packed[row, at], alone[0], rtol=0, atol=1e-5)
                    documents += 1
        assert documents > len(rows)

    def test_a_batch_says_where_documents_are(self, make_task) -> None:
        task = make_task("data.blocks=packed", "model.global_tokens=first")
        batch, rows = _packed_batch(task)
        pad = task.tokenizer.pad_id
        for row, sample in enumerate(rows):
            length = len(sample.tokens_N)
            documents = batch["document_BN"][row]
            assert documents[:length].tolist() == sample.document_N.tolist()
            assert set(documents[length:].tolist()) <= {int(sample.document_N[-1])}
            positions = batch["position_BN"][row]
            assert (positions[:length] == torch.from_numpy(sample.position_N) + pad + 1).all()
            assert (positions[length:] == pad).all()
            starts = np.flatnonzero(sample.position_N == 0).tolist()
            assert len(starts) == sample.document_N[-1] + 1
            found = batch["global_index_BG"][row]
            assert found[found >= 0].tolist() == starts
            assert set(sample.targets_M) & task.tokenizer.special_ids == set()

    @pytest.mark.parametrize("blocks", ["full_sentences", "document"])
    def test_other_batches_do_not(self, make_task, blocks: str) -> None:
        task = make_task(f"data.blocks={blocks}")
        batch = task.collate([task.sample(number) for number in range(3)])
        assert not {"document_BN", "position_BN"} & batch.keys()

    def test_it_trains_and_documents_matter(self, make_task) -> None:
        task = make_task("data.blocks=packed", "model.dropout=0", "model.attention_dropout=0")
        model = task.build_model(Path(task.config.model.path))
        batch, _ = _packed_batch(task)
        loss = task.loss(model, batch)
        loss.backward()
        for name in ("document_BN", "position_BN"):
            without = {key: x for key, x in batch.items() if key != name}
            assert abs(float(task.loss(model, without).detach() - loss.detach())) > 1e-4, name
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)

    def test_held_out_text_is_not_packed(self, make_task) -> None:
        """A packed run is scored by document (start.py); HeldOut knows no other way."""
        task = make_task("data.blocks=packed")
        with pytest.raises(
            InputError, match=r"blocks of held-out text: got packed; .*Say document"
        ):
            HeldOut(task.corpus, task.tokenizer, max_tokens=100, blocks="packed")

    def test_fairseq_carries_it(self, make_task) -> None:
        """Its micro-batch holds what the loss reads, documents and positions included."""
        from longpretrain.tasks.fairseq_batches import NumberedSamples

        task = make_task("data.blocks=packed")
        _, rows = _packed_batch(task)
        carried = NumberedSamples(task).collater(rows)["inputs"]
        right = task.collate(rows)
        assert carried.keys() == right.keys() >= {"document_BN", "position_BN"}
        assert all(torch.equal(carried[name], right[name]) for name in right)


def _packed_batch(task: MaskedLMTask) -> tuple[dict[str, torch.Tensor], list[Sample]]:
    """A few samples, one of them shorter and all with more than one document."""
    samples = [task.sample(number) for number in range(len(task.blocks))]
    several = sorted(
        (s for s in samples if s.document_N[-1]), key=lambda sample: len(sample.tokens_N)
    )
    rows = [several[0], several[-1], several[len(several) // 2]]
    batch = task.collate(rows)
    assert "padding_BN" in batch
    return batch, rows


def test_a_model_without_a_head_is_not_trained(make_task, small_run: Path, tmp_path: Path) -> None:
    """And is refused before anything starts."""
    folder = small_run / "models" / "long"
    config = dataclasses.replace(read_config(folder), has_lm_head=False)
    save_model((config, read_tensors(folder)), tmp_path / "bare")
    load_tokenizer(folder).save(tmp_path / "bare", max_tokens=128)
    with pytest.raises(InputError, match=r"got no masked-LM head; .* DST --new-head"):
        make_task(f"model.path={tmp_path / 'bare'}")
