"""Bits per masked token: against an independent calculation, at every length, batch and split."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data.manifest import Manifest, dtype_for
from longpretrain.data.shard_writer import ShardWriter
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import ByteLevelBPE, Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.evaluate import (
    HeldOut,
    comparison_table,
    evaluate,
    find_model_folder,
    score,
    token_losses,
)
from longpretrain.files import sha256
from longpretrain.model import LongformerForMaskedLM, ModelConfig, save_model

VOCAB = 261
FAVOURITE = 77
LENGTHS = (700, 30, 1300, 5, 2600, 90, 410)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and special tokens: a vocabulary so small that scoring is quick."""
    shipped = load_tokenizer()
    letters = sorted(name for name in shipped.vocab if len(name) == 1)
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"]
    vocab = {name: number for number, name in enumerate(names)}
    assert len(vocab) == VOCAB
    return ByteLevelBPE(vocab, [], shipped.roles, [])


def make_corpus(
    folder: Path, tokenizer: Tokenizer, lengths: Sequence[int] = LENGTHS, fingerprint: str = ""
) -> Path:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size)
    generator = np.random.default_rng(5)
    for length in lengths:
        writer.add(generator.choice(tokenizer.real_ids, length))
    shards = writer.finish()
    Manifest(
        tokenizer_fingerprint=fingerprint or tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
        dtype=dtype_for(tokenizer.vocab_size).name, documents=len(lengths), tokens=sum(lengths),
        shards=shards,
    ).write(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "valid", tokenizer)


def tiny_model(model_type: str = "longformer", max_tokens: int = 1024, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    window = {"attention_window": (8, 16)} if model_type == "longformer" else {}
    config = ModelConfig(
        model_type=model_type, vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2,
        intermediate_size=32, max_position_embeddings=max_tokens + 2, initializer_range=0.3,
        **window,
    )  # fmt: skip
    return LongformerForMaskedLM(config)


def model_folder(folder: Path, tokenizer: Tokenizer, model: Any) -> Path:
    save_model(model, folder)
    tokenizer.save(folder, model.config.max_tokens)
    return folder


def position_model(**arguments: torch.Tensor) -> torch.Tensor:
    """Logits from the place in the sequence alone: FAVOURITE gets log(1 + position), others 0."""
    tokens_BN, index_M = arguments["tokens_BN"], arguments["predict_index_M"]
    logits_MV = torch.zeros(len(index_M), VOCAB)
    logits_MV[:, FAVOURITE] = torch.log1p(index_M.double() % tokens_BN.shape[1]).float()
    return logits_MV


# -- the number itself ---------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["longformer", "roberta"])
def test_bits_equal_those_that_transformers_gives(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer, model_type: str
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = model_folder(tmp_path / "model", tokenizer, tiny_model(model_type, 160))
    evaluation = evaluate(folder, corpus, max_tokens=[96, 160], batch=3)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    held_outs = [
        HeldOut(Corpus.open(corpus), tokenizer, max_tokens=length, seed=1) for length in (96, 160)
    ]
    for result, held_out in zip(evaluation.results, held_outs, strict=True):
        bits = []
        for block in range(len(held_out)):
            sequence = held_out[block]
            labels_N = np.full(len(sequence.inputs_N), -100)
            labels_N[sequence.positions_M] = sequence.targets_M
            tokens_1N, labels_1N = (torch.tensor(x)[None] for x in (sequence.inputs_N, labels_N))
            with torch.no_grad():
                loss = theirs(input_ids=tokens_1N, labels=labels_1N).loss
            bits += [loss.item() / math.log(2)] * len(sequence.targets_M)
        assert result.count == len(bits) > 700
        assert result.bits == pytest.approx(np.mean(bits), abs=2e-5)
        assert 8 < result.bits < 20


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary(
    corpus: Path, tokenizer: Tokenizer
) -> None:
    model = tiny_model(max_tokens=128)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    evaluation = evaluate(model, corpus, max_tokens=[128], tokenizer=tokenizer)
    assert evaluation.bits == {128: pytest.approx(math.log2(VOCAB), rel=1e-6)}


def test_a_model_that_knows_all_needs_none(corpus: Path, tokenizer: Tokenizer) -> None:
    held_out = HeldOut(Corpus.open(corpus), tokenizer, max_tokens=300)
    seen = iter(range(len(held_out)))

    def oracle(*, tokens_BN: torch.Tensor, predict_index_M: torch.Tensor) -> torch.Tensor:
        targets_M = torch.from_numpy(held_out[next(seen)].targets_M)
        return 100.0 * torch.nn.functional.one_hot(targets_M, VOCAB).float()

    nats, count = score(oracle, held_out, range(len(held_out)))
    assert count == sum(len(held_out[block].targets_M) for block in range(len(held_out)))
    assert nats == pytest.approx(0, abs=1e-6)


def test_dropout_is_off_and_the_mode_comes_back(corpus: Path, tokenizer: Tokenizer) -> None:
    held_out = HeldOut(Corpus.open(corpus), tokenizer, max_tokens=64)
    model = tiny_model(max_tokens=64)
    wanted = score(model.eval(), held_out, range(9))
    assert not model.training
    assert score(model.train(), held_out, range(9)) == wanted
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# -- the same tokens for everyone ------------------------------------------------------------------


def test_same_numbers_again_and_in_another_order(corpus: Path, tokenizer: Tokenizer) -> None:
    held_out = HeldOut(Corpus.open(corpus), tokenizer, max_tokens=128)
    model = tiny_model(max_tokens=128)
    losses = {}
    for numbers in (range(12), range(11, -1, -1)):
        for part in token_losses(model, held_out, numbers):
            block = int(part.block_M[0])
            assert (losses.setdefault(block, part.nats_M) == part.nats_M).all()
    assert len(losses) == 12


def test_masks_follow_from_seed_length_and_block_alone(corpus: Path, tokenizer: Tokenizer) -> None:
    opened = Corpus.open(corpus)
    one, same, other = (HeldOut(opened, tokenizer, max_tokens=256, seed=seed) for seed in (1, 1, 2))
    backwards = {block: same[block] for block in reversed(range(len(same)))}
    changed = 0
    for block in range(len(one)):
        mask = one[block]
        assert (mask.inputs_N == backwards[block].inputs_N).all()
        assert (mask.positions_M == backwards[block].positions_M).all()
        changed += not np.array_equal(mask.positions_M, other[block].positions_M)
        assert not set(mask.targets_M) & tokenizer.special_ids
    assert changed == len(one)
    assert len({tuple(one[block].positions_M) for block in range(len(one))}) == len(one)
    longer = HeldOut(opened, tokenizer, max_tokens=257, seed=1)
    assert not np.array_equal(one[0].positions_M, longer[0].positions_M)
    share = sum(len(one[b].positions_M) for b in range(len(one))) / opened.num_tokens
    assert share == pytest.approx(0.15, abs=0.005)


@pytest.mark.parametrize("policy", ["full_sentences", "document"])
@pytest.mark.parametrize("batch", [2, 5, 100])
def test_batches_change_nothing_but_rounding(
    corpus: Path, tokenizer: Tokenizer, policy: Any, batch: int
) -> None:
    model = tiny_model(max_tokens=128)
    one, many = (
        evaluate(model, corpus, max_tokens=[128], batch=size, blocks=policy, tokenizer=tokenizer)
        for size in (1, batch)
    )
    assert many.results[0].count == one.results[0].count
    assert many.bits[128] == pytest.approx(one.bits[128], rel=1e-6)


def test_parts_of_ranks_add_up(corpus: Path, tokenizer: Tokenizer) -> None:
    held_out = HeldOut(Corpus.open(corpus), tokenizer, max_tokens=64)
    model, numbers = tiny_model(max_tokens=64), range(len(held_out))
    whole = score(model, held_out, numbers)
    parts = [score(model, held_out, numbers[rank::3]) for rank in range(3)]
    assert sum(count for _, count in parts) == whole[1]
    assert sum(nats for nats, _ in parts) == pytest.approx(whole[0], rel=1e-12)


def test_bf16_is_near_fp32(corpus: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model(max_tokens=128)
    bits = [
        evaluate(model, corpus, max_tokens=[128], precision=p, tokenizer=tokenizer).bits[128]
        for p in ("fp32", "bf16")
    ]
    assert bits[0] != bits[1]
    assert bits[1] == pytest.approx(bits[0], rel=0.01)


def test_global_tokens_reach_the_model(corpus: Path, tokenizer: Tokenizer) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def watch(**arguments: torch.Tensor) -> torch.Tensor:
        seen.append(arguments)
        return torch.zeros(len(arguments["predict_index_M"]), VOCAB)

    opened = Corpus.open(corpus)
    for policy in ("none", "every_100"):
        held_out = HeldOut(
            opened, tokenizer, max_tokens=256, global_tokens=policy, blocks="document"
        )
        score(watch, held_out, [1, 3], batch=2)
    assert "global_index_BG" not in seen[0]
    assert seen[1]["global_index_BG"].tolist() == [[0, 100, 200], [0, -1, -1]]
    lengths = [len(held_out[block].inputs_N) for block in (1, 3)]
    assert lengths[0] == 256 > lengths[1]
    assert seen[1]["padding_BN"].sum(1).tolist() == [0, 256 - lengths[1]]


# -- buckets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full_sentences", "document"])
def test_buckets_add_up_to_the_whole(corpus: Path, tokenizer: Tokenizer, policy: Any) -> None:
    model = tiny_model(max_tokens=1300)
    result = evaluate(model, corpus, max_tokens=[1300], blocks=policy, tokenizer=tokenizer).results[
        0
    ]
    assert [(b.first, b.last) for b in result.by_position] == [(0, 511), (512, 1023), (1024, 1299)]
    groups = [result.by_position] + ([result.by_document_tokens] if policy == "document" else [])
    for buckets in groups:
        assert sum(bucket.count for bucket in buckets) == result.count
        assert sum(bucket.nats for bucket in buckets) == pytest.approx(result.nats, rel=1e-12)
    if policy == "document":
        counts = [bucket.count for bucket in result.by_document_tokens]
        share = {512: 30 + 5 + 90 + 410, 1024: 700, 2048: 1300, 4096: 2600}
        assert [b.last for b in result.by_document_tokens] == [*share, 8192, None]
        for count, tokens in zip(counts, [*share.values(), 0, 0], strict=True):
            assert count == pytest.approx(0.15 * tokens, abs=5)
    else:
        assert result.by_document_tokens == ()


def test_a_document_of_512_tokens_is_in_the_bucket_to_512(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    corpus = make_corpus(tmp_path / "c", tokenizer, [512, 513, 8192, 8193])
    result = evaluate(
        tiny_model(max_tokens=600), corpus, max_tokens=[600], blocks="document", tokenizer=tokenizer
    ).results[0]
    counts = {bucket.last: bucket.count for bucket in result.by_document_tokens}
    wanted = {512: 512, 1024: 513, 2048: 0, 4096: 0, 8192: 8192, None: 8193}
    assert counts == {last: pytest.approx(0.15 * size, abs=20) for last, size in wanted.items()}
    assert sum(counts.values()) == result.count


def test_losses_lie_at_their_positions(corpus: Path, tokenizer: Tokenizer) -> None:
    held_out = HeldOut(Corpus.open(corpus), tokenizer, max_tokens=700, blocks="document")
    losses = list(token_losses(position_model, held_out, [0, 1, 2], batch=3))
    assert len(losses) == 1
    block_M, place_M = losses[0].block_M, losses[0].position_M
    wanted_M = np.log(VOCAB - 1 + 1.0 + place_M)
    targets_M = np.concatenate([held_out[block].targets_M for block in range(3)])
    wanted_M -= np.where(targets_M == FAVOURITE, np.log1p(place_M), 0)
    assert losses[0].nats_M == pytest.approx(wanted_M, rel=1e-5)
    for block in range(3):
        assert (place_M[block_M == block] == held_out[block].positions_M).all()


# -- which text is scored ------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    tokens=st.integers(10, 60_000),
    sequences=st.integers(1, 20),
    policy=st.sampled_from(["full_sentences", "document"]),
)
def test_a_subset_is_the_same_text_at_every_length(
    tokens: int,
    sequences: int,
    policy: Any,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = make_corpus(tmp_path_factory.mktemp("text") / "c", tokenizer, [tokens])
    opened = Corpus.open(folder)
    covered = []
    for length in (512, 1024, 4096):
        held_out = HeldOut(opened, tokenizer, max_tokens=length, blocks=policy)
        numbers = held_out.numbers(sequences)
        assert numbers == sorted(set(numbers))
        assert 0 <= numbers[0] <= numbers[-1] < len(held_out)
        is_in = np.zeros(tokens, bool)
        for block in numbers:
            is_in[block * (length - 2) : (block + 1) * (length - 2)] = True
        covered.append(is_in)
        if sequences * 4094 >= tokens:
            assert is_in.all()
    for is_in, length in zip(covered[:-1], (512, 1024), strict=True):
        # The borders of a stretch may lie one block off at either end.
        assert np.count_nonzero(is_in != covered[-1]) <= sequences * 2 * length
        assert abs(int(is_in.sum()) - int(covered[-1].sum())) <= sequences * length


def test_sequences_are_spread_over_the_corpus(corpus: Path, tokenizer: Tokenizer) -> None:
    held_out = HeldOut(Corpus.open(corpus), tokenizer, max_tokens=128)
    assert held_out.numbers(None) == list(range(len(held_out)))
    assert held_out.numbers(99) == list(range(len(held_out)))
    assert held_out.numbers(1) == list(range(4094 // 126))
    with pytest.raises(InputError, match="sequences to score: got 0"):
        held_out.numbers(0)


# -- folders, files and tables -------------------------------------------------------------------


def test_a_run_folder_means_its_latest_checkpoint(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for number in (1, 2):
        folder = checkpoints / f"step-00000{number}"
        model_folder(folder, tokenizer, tiny_model(max_tokens=64, seed=number))
        (folder / "state.json").write_text(json.dumps({"global_tokens": "first", "step": number}))
    (checkpoints / "latest").write_text("step-000002\n")
    assert find_model_folder(tmp_path / "run") == checkpoints / "step-000002"
    by_run = evaluate(tmp_path / "run", corpus, max_tokens=[64])
    by_step = evaluate(checkpoints / "step-000002", corpus, max_tokens=[64])
    plain = evaluate(tmp_path / "run", corpus, max_tokens=[64], global_tokens="none")
    assert by_run.results == by_step.results
    assert (by_run.global_tokens, plain.global_tokens) == ("first", "none")
    assert by_run.bits != plain.bits


def test_a_flipped_bit_of_a_checkpoint_is_no_score(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    folder = model_folder(tmp_path / "step-000001", tokenizer, tiny_model(max_tokens=128))
    weights = folder / "model.safetensors"
    (folder / "state.json").write_text(json.dumps({"files": {weights.name: sha256(weights)}}))
    evaluate(folder, corpus, max_tokens=[64], sequences=1)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors: got sha256 .*older checkpoint"):
        evaluate(folder, corpus, max_tokens=[64], sequences=1)


@pytest.mark.parametrize(
    ("max_tokens", "wanted"), [(600, [512]), (96, [96]), (4096, [512, 4096])], ids=str
)
def test_lengths_by_default_are_those_of_the_paper_that_fit(
    tmp_path: Path, tokenizer: Tokenizer, max_tokens: int, wanted: list[int]
) -> None:
    corpus = make_corpus(tmp_path / "c", tokenizer, [200])
    evaluation = evaluate(tiny_model(max_tokens=max_tokens), corpus, tokenizer=tokenizer)
    assert list(evaluation.bits) == wanted


def test_results_are_written_whole_and_tell_how_they_were_made(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    path, calls = tmp_path / "new" / "evaluation.json", []
    evaluation = evaluate(
        tiny_model(), corpus, max_tokens=[1024, 64], batch=4, tokenizer=tokenizer, json_path=path,
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    tree = json.loads(path.read_text())
    assert [entry.name for entry in path.parent.iterdir()] == ["evaluation.json"]
    assert tree["seed"] == 1
    assert tree["data_fingerprint"] == Corpus.open(corpus).fingerprint
    assert [result["max_tokens"] for result in tree["results"]] == [64, 1024]
    assert {result["max_tokens"]: result["bits"] for result in tree["results"]} == evaluation.bits
    buckets = tree["results"][1]["by_position"]
    assert [bucket["bits"] for bucket in buckets] == [
        bucket.bits for bucket in evaluation.results[1].by_position
    ]
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1] == sum(result.sequences for result in evaluation.results)
    lines = evaluation.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[0].split()) == "tokens positions bits per masked token masked tokens"
    assert lines[1].split() == [
        "64",
        "all",
        f"{evaluation.bits[64]:.4f}",
        f"{tree['results'][0]['count']:,}",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["64", "1,024", "0-511", "512-1,023"]


def test_results_that_are_not_finite_are_null(
    tmp_path: Path, corpus: Path, tokenizer: Tokenizer
) -> None:
    model = tiny_model(max_tokens=64)
    with torch.no_grad():
        model.lm_head.bias.fill_(math.nan)
    path = tmp_path / "evaluation.json"
    evaluation = evaluate(model, corpus, max_tokens=[64], tokenizer=tokenizer, json_path=path)
    assert math.isnan(evaluation.bits[64])
    assert json.loads(path.read_text())["results"][0]["bits"] is None


def test_comparison_table_is_markdown_with_gaps() -> None:
    table = comparison_table(
        [("short", {512: 3.25}), ("long | copied", {512: 3.5, 4096: 3.0}), ("", {4096: 10.125})]
    )
    assert table == (
        "| model         | bits at 512 | bits at 4,096 |\n"
        "| ------------- | ----------: | ------------: |\n"
        "| short         |      3.2500 |             - |\n"
        "| long / copied |      3.5000 |        3.0000 |\n"
        "|               |           - |       10.1250 |"
    )


# -- bad input -----------------------------------------------------------------------------------


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = model_folder(tmp_path / "model", tokenizer, tiny_model(max_tokens=64))
    corpus = make_corpus(tmp_path / "c", tokenizer, fingerprint="0123456789abcdef" * 4)
    with pytest.raises(InputError, match=r"corpus .*got ids of tokenizer 0123456789ab.*model"):
        evaluate(folder, corpus, json_path=tmp_path / "evaluation.json")
    assert not (tmp_path / "evaluation.json").exists()
    with pytest.raises(InputError, match="0123456789ab"):
        HeldOut(Corpus.open(corpus), tokenizer, max_tokens=64)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"max_tokens": [64, 65]}, r"max_tokens: got 65; wanted at most 64.*convert"),
        ({"max_tokens": []}, "no length"),
        ({"max_tokens": [3]}, "max_tokens: got 3"),
        ({"sequences": 0}, "sequences to score: got 0"),
        ({"global_tokens": "second"}, "global_tokens"),
        ({"probability": 0}, "probability: got 0"),
    ],
    ids=["too-long", "no-length", "too-short", "no-sequences", "global-tokens", "nothing-masked"],
)
def test_bad_arguments_are_refused(
    corpus: Path, tokenizer: Tokenizer, options: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(InputError, match=wanted):
        evaluate(tiny_model(max_tokens=64), corpus, tokenizer=tokenizer, **options)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(
    corpus: Path, tokenizer: Tokenizer
) -> None:
    config = ModelConfig(
        vocab_size=100, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8,
        max_position_embeddings=66, attention_window=(4,),
    )  # fmt: skip
    with pytest.raises(InputError, match="vocabulary: got 100 ids"):
        evaluate(LongformerForMaskedLM(config), corpus, tokenizer=tokenizer)


@pytest.mark.parametrize("case", ["missing", "empty", "dangling"])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, corpus: Path, case: str) -> None:
    folder = tmp_path / "run"
    if case != "missing":
        folder.mkdir()
    if case == "dangling":
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text("step-000009\n")
    wanted = {"missing": "no such folder", "empty": "neither", "dangling": "step-000009"}[case]
    with pytest.raises(InputError, match=wanted):
        evaluate(folder, corpus)


def test_altered_text_is_not_scored(tmp_path: Path, corpus: Path, tokenizer: Tokenizer) -> None:
    copy = tmp_path / "c"
    shutil.copytree(corpus, copy)
    path = copy / "tokens-00000.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"altered shard .*tokens-00000\.bin"):
        evaluate(tiny_model(max_tokens=64), copy, tokenizer=tokenizer)


@pytest.mark.parametrize("case", ["missing", "no-tokens"])
def test_a_missing_or_empty_corpus_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, case: str
) -> None:
    if case == "no-tokens":
        make_corpus(tmp_path / "c", tokenizer, [])
    with pytest.raises(InputError, match="corpus"):
        evaluate(tiny_model(max_tokens=64), tmp_path / "c", tokenizer=tokenizer)
