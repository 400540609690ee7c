"""fairseq's dict.txt as a tokenizer, and back.

A line is a symbol and a count. Ids 0 to 3 are ``<s> <pad> </s> <unk>``, the lines follow in order,
and the task puts ``<mask>`` at the end. RoBERTa's symbols are GPT-2's token ids in decimal, so the
merges that the package ships say which token a symbol is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from longpretrain.convert.shown import shown
from longpretrain.data.byte_bpe import byte_symbols
from longpretrain.data.tokenizer import ByteLevelBPE, Tokenizer, load_tokenizer
from longpretrain.data.tokenizer_files import Roles
from longpretrain.errors import InputError

DICTIONARY_NAME = "dict.txt"

_FIRST = ("<s>", "<pad>", "</s>", "<unk>")
_MASK = "<mask>"
_ROLES = Roles(bos="<s>", eos="</s>", pad="<pad>", mask=_MASK, unk="<unk>")
_PADDING = re.compile(r"madeupword\d{4,}")
_ANOTHER = "Say --tokenizer DIR: a Hugging Face tokenizer whose ids are the model's."


def gpt2_tokens() -> list[str]:
    """GPT-2's tokens by id: the bytes, what its merges make in their order, and the end mark."""
    joined = [left + right for left, right in _gpt2_merges()]
    return [*byte_symbols(), *joined, "<|endoftext|>"]


def read_dictionary(path: Path, *, rows: int) -> Tokenizer:
    """The tokenizer whose ids are those of a dictionary.

    Args:
        path: dict.txt.
        rows: word embeddings of the model.

    Raises:
        InputError: lines that are none, symbols that are not GPT-2's, tokens that are missing, or
            another number of them than the model has.
    """
    symbols = [*_FIRST, *_symbols(path)]
    if _MASK not in symbols:
        symbols.append(_MASK)
    if len(set(symbols)) != len(symbols):
        twice = Counter(symbols).most_common(1)[0][0]
        raise InputError(
            str(path), got=f"'{shown(twice)}' twice",
            wanted="every symbol once, special ones left out",
            way_out="Get the dictionary that the model was trained with. " + _ANOTHER,
        )  # fmt: skip
    if len(symbols) != rows:
        raise InputError(
            str(path), got=f"{len(symbols)} symbols with the special ones",
            wanted=f"{rows}, the word embeddings of the model",
            way_out="Get the dictionary that the model was trained with. " + _ANOTHER,
        )  # fmt: skip
    tokens = gpt2_tokens()
    special = {*_FIRST, _MASK}
    vocab: dict[str, int] = {}
    for number, symbol in enumerate(symbols):
        if symbol in special or _PADDING.fullmatch(symbol):
            vocab[symbol] = number
        elif re.fullmatch(r"0|[1-9]\d{0,4}", symbol) and int(symbol) < len(tokens):
            vocab[tokens[int(symbol)]] = number
        else:
            raise InputError(
                str(path), got=f"the symbol '{shown(symbol)}'",
                wanted=f"ids of GPT-2's BPE, 0 to {len(tokens) - 1}", way_out=_ANOTHER,
            )  # fmt: skip
    missing = [number for number, token in enumerate(tokens[:-1]) if token not in vocab]
    if missing:
        raise InputError(
            str(path), got=f"no line for {len(missing)} of GPT-2's ids, such as {missing[0]}",
            wanted="all of them: a BPE cannot leave out tokens that its merges make",
            way_out=_ANOTHER,
        )  # fmt: skip
    if vocab == load_tokenizer().vocab:
        return load_tokenizer()
    return ByteLevelBPE(vocab, _gpt2_merges(), _ROLES, special=())


def dictionary_text(tokenizer: Tokenizer, *, rows: int, where: Path) -> str:
    """A dict.txt that gives a model's ids the meaning that they have; fairseq adds ``<mask>``.

    Counts are not known any more: 1 for a token, 0 for a filler.

    Raises:
        InputError: the tokenizer is not GPT-2's BPE, or has tokens beside it.
    """
    tokens = {number: token for token, number in tokenizer.vocab.items()}
    numbers = {token: str(number) for number, token in enumerate(gpt2_tokens())}
    own = isinstance(tokenizer, ByteLevelBPE) and tokenizer.merges == _gpt2_merges()
    wrong = [token for i, token in enumerate(_FIRST) if tokens.get(i) != token]
    other = [token for i, token in tokens.items() if i >= len(_FIRST) and not _has_line(token)]
    wrong += [token for token in other if token not in numbers]
    if not own or wrong:
        got = f"tokens such as '{shown(wrong[0])}'" if own else "another BPE than GPT-2's"
        raise InputError(
            f"tokenizer of {where}", got=got, wanted="GPT-2's BPE with RoBERTa's special tokens",
            way_out="Keep the model as a Hugging Face folder, which has any tokenizer.",
        )  # fmt: skip
    free = (name for i in range(rows) if (name := f"madeupword{i:04d}") not in tokenizer.vocab)
    names = [tokens[i] if i in tokens else next(free) for i in range(len(_FIRST), rows)]
    if names[-1:] == [_MASK]:
        names.pop()
    lines = [f"{numbers[n]} 1" if n in numbers else f"{n} 0" for n in names]
    return "".join(f"{line}\n" for line in lines)


def _has_line(token: str) -> bool:
    return token == _MASK or _PADDING.fullmatch(token) is not None


def _symbols(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeError) as error:
        raise InputError(
            str(path), got=str(error), wanted="fairseq's dictionary in UTF-8", way_out=_ANOTHER
        ) from error
    symbols = []
    for number, line in enumerate(lines, start=1):
        if not line and number == len(lines):
            continue
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not count.isdecimal():
            raise InputError(
                f"{path}, line {number}", got=f"'{shown(line, 40)}'",
                wanted="a symbol and its count",
                way_out="Get the dictionary that the model was trained with. " + _ANOTHER,
            )  # fmt: skip
        symbols.append(symbol)
    return symbols


def _gpt2_merges() -> Sequence[tuple[str, str]]:
    shipped = load_tokenizer()
    assert isinstance(shipped, ByteLevelBPE), "RoBERTa's BPE is byte-level"
    return shipped.merges
