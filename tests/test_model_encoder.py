"""The model's arithmetic: against transformers, and its own promises on gradients and randomness.

Letters: B sequences, N tokens, G global tokens, M tokens to predict.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch import Tensor

from longpretrain.errors import InputError
from longpretrain.model import LongformerForMaskedLM, ModelConfig
from longpretrain.model.encoder import layer_seed

TINY = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    max_position_embeddings=130, attention_window=(8, 8),
)  # fmt: skip
BASE = ModelConfig(
    vocab_size=50265, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072,
    max_position_embeddings=4098, attention_window=(512,) * 12,
)  # fmt: skip
LARGE = dataclasses.replace(
    BASE, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096,
    attention_window=(512,) * 24,
)  # fmt: skip
COMMON = {"type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)


def hf_sizes(config: ModelConfig) -> dict[str, object]:
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings, **COMMON,
    }  # fmt: skip


def pair(config: ModelConfig) -> tuple[LongformerForMaskedLM, torch.nn.Module]:
    """Ours and transformers' Longformer with the same, well spread weights."""
    hf_config = transformers.LongformerConfig(
        **hf_sizes(config), attention_window=list(config.attention_window)
    )
    theirs = transformers.LongformerForMaskedLM(hf_config).eval()
    ours = LongformerForMaskedLM(config).eval()
    with torch.no_grad():  # at the default 0.02 a tiny model's attention is all but uniform
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(config: ModelConfig, lengths: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    tokens_BN = torch.randint(3, config.vocab_size, (len(lengths), num_tokens))
    padding_BN = torch.arange(num_tokens)[None, :] >= torch.tensor(lengths)[:, None]
    return tokens_BN.masked_fill(padding_BN, config.pad_id), padding_BN


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max())


@pytest.mark.parametrize("windows", [(8, 8), (4, 8), (4, 64)], ids=str)
@pytest.mark.parametrize(
    ("lengths", "global_tokens"),
    [([1], [[]]), ([7], [[]]), ([24], [[0]]), ([37, 30], [[0, 5, 36], [3]]), ([101, 4], [[], [2]])],
    ids=["one-token", "short", "first-global", "ragged-global", "all-but-padding"],
)
def test_logits_equal_transformers_longformer(
    windows: tuple[int, ...], lengths: list[int], global_tokens: list[list[int]]
) -> None:
    ours, theirs = pair(dataclasses.replace(TINY, attention_window=windows))
    num_tokens = max(lengths)
    tokens_BN, padding_BN = batch(TINY, lengths, num_tokens)
    slots = max(len(row) for row in global_tokens)
    index_BG = torch.tensor(
        [row + [-1] * (slots - len(row)) for row in global_tokens], dtype=torch.int32
    )
    global_BN = torch.zeros_like(tokens_BN)
    for row, positions in enumerate(global_tokens):
        global_BN[row, positions] = 1
    got = ours(
        tokens_BN, padding_BN=padding_BN if padding_BN.any() else None,
        global_index_BG=index_BG if slots else None,
    )  # fmt: skip
    wanted = theirs(
        tokens_BN, attention_mask=(~padding_BN).long(), global_attention_mask=global_BN
    ).logits
    assert worst(got[~padding_BN], wanted[~padding_BN]) <= 1e-4
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("num_tokens", [1, 33, 128])
def test_roberta_is_full_attention(num_tokens: int) -> None:
    config = dataclasses.replace(TINY, model_type="roberta", attention_window=())
    hf_config = transformers.RobertaConfig(**hf_sizes(config), attn_implementation="eager")
    theirs = transformers.RobertaForMaskedLM(hf_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    ours = LongformerForMaskedLM(config).eval()
    ours.load_state_dict(
        {name.replace("roberta.", "longformer."): t for name, t in theirs.state_dict().items()}
    )
    lengths = [num_tokens, max(1, num_tokens // 2)]
    tokens_BN, padding_BN = batch(config, lengths, num_tokens)
    wanted = theirs(tokens_BN, attention_mask=(~padding_BN).long()).logits
    got = ours(tokens_BN, padding_BN=padding_BN)
    assert worst(got[~padding_BN], wanted[~padding_BN]) <= 1e-4


def test_logits_equal_transformers_at_base_size() -> None:
    ours = LongformerForMaskedLM(BASE).eval()
    with torch.device("meta"):
        theirs = transformers.LongformerForMaskedLM(
            transformers.LongformerConfig(**hf_sizes(BASE), attention_window=[512] * 12)
        )
    theirs.load_state_dict(ours.state_dict(), assign=True)
    # As long as the window: the band's two edges and its cut at both ends are all in play.
    tokens_BN, _ = batch(BASE, [512], 512)
    index_M = torch.arange(0, 512, 7)
    with torch.no_grad():
        hidden_NC = theirs.eval().longformer(tokens_BN).last_hidden_state[0]
        wanted_MV = theirs.lm_head(hidden_NC[index_M])
        assert worst(ours(tokens_BN, predict_index_M=index_M), wanted_MV) <= 1e-4


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(BASE, 148_711_257, 276), (LARGE, 434_653_273, 540)],
    ids=["base", "large"],
)
def test_published_parameter_counts(config: ModelConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = LongformerForMaskedLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_new_weights_are_drawn_as_transformers_draws_them() -> None:
    wide = dataclasses.replace(TINY, hidden_size=256, initializer_range=0.5)
    model = LongformerForMaskedLM(wide)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight") or name.endswith("layer_norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.5, rel=0.1), name
    embeddings = model.longformer.embeddings
    assert (embeddings.word_embeddings.weight[1] == 0).all()
    assert (embeddings.position_embeddings.weight[1] == 0).all()
    assert model.lm_head.decoder.weight is embeddings.word_embeddings.weight
    assert model.lm_head.decoder.bias is model.lm_head.bias


def gradients(model: LongformerForMaskedLM, **arguments: Tensor | None) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(5)
    model(**arguments).float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("with_global", [False, True], ids=["local", "global"])
def test_activation_checkpointing_changes_no_bit(with_global: bool) -> None:
    config = dataclasses.replace(TINY, hidden_dropout=0.3, attention_dropout=0.3)
    plain = LongformerForMaskedLM(config).train()
    again = LongformerForMaskedLM(config, activation_checkpointing=True).train()
    again.load_state_dict(plain.state_dict())
    tokens_BN, padding_BN = batch(config, [50, 41], 50)
    arguments: dict[str, Tensor | None] = {
        "tokens_BN": tokens_BN, "padding_BN": padding_BN,
        "predict_index_M": torch.tensor([3, 9, 77]), "dropout_seed_B": torch.tensor([7, -9]),
        "global_index_BG": torch.tensor([[0], [4]], dtype=torch.int32) if with_global else None,
    }  # fmt: skip
    wanted, got = gradients(plain, **arguments), gradients(again, **arguments)
    for name, gradient in wanted.items():
        if gradient is None:
            assert not with_global and "_global." in name
            assert got[name] is None
        else:
            assert torch.equal(gradient, got[name]), name


def test_gradients_equal_transformers() -> None:
    ours, theirs = pair(TINY)
    tokens_BN, padding_BN = batch(TINY, [37, 30], 37)
    global_BN = torch.zeros_like(tokens_BN)
    global_BN[0, [0, 5]] = global_BN[1, 3] = 1
    index_BG = torch.tensor([[0, 5], [3, -1]], dtype=torch.int32)
    weight_MV = torch.randn(67, TINY.vocab_size)
    got = ours(tokens_BN, padding_BN=padding_BN, global_index_BG=index_BG)
    (got[~padding_BN] * weight_MV).sum().backward()
    mask_BN = (~padding_BN).long()
    wanted = theirs(tokens_BN, attention_mask=mask_BN, global_attention_mask=global_BN).logits
    (wanted[~padding_BN] * weight_MV).sum().backward()
    gradient = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = float(gradient[name].abs().max())
        assert worst(parameter.grad, gradient[name]) <= 1e-4 * scale + 1e-5, name


def test_frozen_global_projections_have_no_gradient_and_all_others_have() -> None:
    model = LongformerForMaskedLM(TINY).eval()
    model.freeze_global_projections()
    tokens_BN, _ = batch(TINY, [40], 40)
    frozen = {name for name, g in gradients(model, tokens_BN=tokens_BN).items() if g is None}
    assert frozen == {name for name, _ in model.named_parameters() if "_global." in name}
    assert len(frozen) == 6 * TINY.num_layers
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}


def test_predicted_rows_are_those_of_the_full_logits() -> None:
    model = LongformerForMaskedLM(TINY).eval()
    tokens_BN, padding_BN = batch(TINY, [20, 15], 20)
    index_M = torch.tensor([0, 5, 19, 20, 34])
    full = model(tokens_BN, padding_BN=padding_BN).flatten(0, 1)
    rows = model(tokens_BN, padding_BN=padding_BN, predict_index_M=index_M)
    assert rows.shape == (5, TINY.vocab_size)
    torch.testing.assert_close(rows, full[index_M], rtol=0, atol=1e-6)
    nothing = model(tokens_BN, predict_index_M=torch.zeros(0, dtype=torch.int64))
    assert nothing.shape == (0, TINY.vocab_size)


def test_padding_in_the_middle_is_skipped_in_the_count() -> None:
    model = LongformerForMaskedLM(TINY)
    tokens_BN = torch.tensor([[5, 1, 6, 7], [5, 6, 1, 1]])
    positions = model.longformer.embeddings._positions(tokens_BN)
    assert positions.tolist() == [[2, 1, 3, 4], [2, 3, 1, 1]]


@pytest.mark.parametrize("pads_are_masked", [False, True], ids=["pads-seen", "pads-masked"])
@pytest.mark.parametrize("words_are_masked", [False, True], ids=["words-seen", "words-masked"])
def test_positions_count_ids_and_not_the_mask(
    pads_are_masked: bool, words_are_masked: bool
) -> None:
    """<pad> in the text without a mask, and words under one: as transformers does."""
    ours, theirs = pair(TINY)
    tokens_BN, _ = batch(TINY, [30, 30], 30)
    tokens_BN[0, 4:7] = tokens_BN[1, 20:] = TINY.pad_id
    padding_BN = (tokens_BN == TINY.pad_id) & pads_are_masked
    if words_are_masked:
        padding_BN[0, 10:13] = padding_BN[1, :2] = True
    got = ours(tokens_BN, padding_BN=padding_BN if padding_BN.any() else None)
    wanted = theirs(tokens_BN, attention_mask=(~padding_BN).long()).logits
    assert worst(got[~padding_BN], wanted[~padding_BN]) <= 1e-4


def test_packed_documents_equal_their_own_sequences() -> None:
    config = dataclasses.replace(TINY, max_position_embeddings=34)
    model = LongformerForMaskedLM(config).eval()
    first, _ = batch(config, [30], 30)
    second, _ = batch(config, [25], 25)
    packed = model(  # 55 tokens on 32 positions
        torch.cat([first, second], dim=1),
        position_BN=torch.cat([torch.arange(2, 32), torch.arange(2, 27)])[None],
        document_BN=torch.tensor([[0] * 30 + [1] * 25], dtype=torch.int32),
    )
    torch.testing.assert_close(packed[:, :30], model(first), rtol=0, atol=1e-6)
    torch.testing.assert_close(packed[:, 30:], model(second), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change", [{"dilation": (1, 1, 2, 3)}, {"causal": True}], ids=str)
def test_dilation_and_causality_reach_attention(change: dict[str, object]) -> None:
    plain = LongformerForMaskedLM(TINY).eval()
    other = LongformerForMaskedLM(dataclasses.replace(TINY, **change)).eval()
    other.load_state_dict(plain.state_dict())
    tokens_BN, _ = batch(TINY, [40], 40)
    assert worst(plain(tokens_BN), other(tokens_BN)) > 1e-6
    if "causal" in change:
        changed_BN = tokens_BN.clone()
        changed_BN[0, 20:] = 5
        assert torch.equal(other(tokens_BN)[0, :20], other(changed_BN)[0, :20])


def test_attention_dropout_follows_the_seed_of_the_row() -> None:
    config = dataclasses.replace(TINY, hidden_dropout=0.0, attention_dropout=0.5)
    model = LongformerForMaskedLM(config).train()
    tokens_BN = batch(config, [30], 30)[0].repeat(3, 1)
    logits = model(tokens_BN, dropout_seed_B=torch.tensor([11, 12, 11]))
    again = model(tokens_BN[:1], dropout_seed_B=torch.tensor([12]))
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[1], again[0], rtol=0, atol=1e-6)
    assert worst(logits[0], logits[1]) > 1e-4


@pytest.mark.parametrize(
    ("windows", "beyond"),
    [
        ((8, 8), ()),
        ((8, 4), ()),
        ((6, 8), ("windows [6] that do not divide the largest, 8",)),
    ],
    ids=str,
)
def test_windows_that_transformers_cannot_run(
    windows: tuple[int, ...], beyond: tuple[str, ...]
) -> None:
    """What the property says is what transformers does, at every length."""
    config = dataclasses.replace(TINY, attention_window=windows)
    assert config.beyond_hugging_face == beyond
    ours, theirs = pair(config)
    failures = 0
    for num_tokens in range(1, 41):
        tokens_BN, _ = batch(config, [num_tokens], num_tokens)
        got = ours(tokens_BN)
        try:
            wanted = theirs(tokens_BN).logits
        except (RuntimeError, AssertionError):
            failures += 1
            continue
        assert worst(got, wanted) <= 1e-4
    assert (failures > 0) == bool(beyond)


def splitmix64(seed: int, steps: int) -> int:
    """The published generator: state after ``steps`` increments, mixed."""
    z = (seed + steps * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_layer_seeds_are_splitmix64() -> None:
    assert (
        splitmix64(0, 1) == 0xE220A8397B1DCDAF
    )  # the generator's published first output of seed 0
    seeds = [0, 1, 2**63 - 1, -1, -(2**63), 1234567890123456789]
    for layer in (0, 1, 23):
        got = layer_seed(torch.tensor(seeds), layer).tolist()
        assert [g % 2**64 for g in got] == [splitmix64(s % 2**64, layer + 1) for s in seeds]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_window": (7, 8)}, r"attention_window: got \[7, 8\]; wanted even"),
        ({"attention_window": (0, 8)}, r"attention_window: got \[0, 8\]; wanted even"),
        ({"attention_window": (8, -2)}, "wanted even"),
        ({"attention_window": (8,) * 3}, r"got 3 windows \[8, 8, 8\]; wanted 2 windows"),
        ({"attention_window": ()}, r"got 0 windows \[\]; wanted 2 windows"),
        ({"model_type": "roberta"}, "RoBERTa's attention is full"),
        ({"num_heads": 5}, "hidden_size: got 32; wanted a multiple of the 5 heads"),
        ({"dilation": (1, 2)}, "one for each of 4 heads"),
        ({"dilation": (1, 2, 0, 1)}, "numbers of 1 or more"),
        ({"hidden_dropout": 1.0}, "hidden_dropout"),
        ({"max_position_embeddings": 2}, "max_position_embeddings"),
        ({"pad_id": 67}, "pad_id"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)


def test_inputs_that_cannot_be() -> None:
    model = LongformerForMaskedLM(TINY).eval()
    model(torch.full((1, 128), 5))
    with pytest.raises(InputError, match="got 129; wanted at most 128"):
        model(torch.full((1, 129), 5))
    with pytest.raises(InputError, match="token ids: got 5 to 67; wanted 0 to 66"):
        model(torch.tensor([[5, 67]]))
    with pytest.raises(InputError, match="positions: got 2 to 130; wanted 0 to 129"):
        model(torch.tensor([[5, 6]]), position_BN=torch.tensor([[2, 130]]))
    with pytest.raises(InputError, match="one seed per row"):
        model.train()(torch.tensor([[5, 6]]))
    full = LongformerForMaskedLM(
        dataclasses.replace(TINY, model_type="roberta", attention_window=())
    )
    with pytest.raises(InputError, match="global tokens"):
        full.eval()(torch.tensor([[5, 6]]), global_index_BG=torch.tensor([[0]], dtype=torch.int32))
