from __future__ import annotations

import pytest
import torch

from longpretrain.attention import philox

MASK = 0xFFFFFFFF


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor(word) for word in words(counter))
    k0, k1 = (torch.tensor(word) for word in words(key))
    found = philox.philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in found] == words(expected)


def byte_in_plain_python(seed: int, head: int, query: int, key: int, dilation: int) -> int:
    """The byte of one attention weight, written from the contract and the paper's definition."""
    c = [head, query, key % dilation, key // dilation // 16]
    k = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(10):
        low, high = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(high >> 32) ^ c[1] ^ k[0], high & MASK, (low >> 32) ^ c[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return b"".join(word.to_bytes(4, "little") for word in c)[key // dilation % 16]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF], ids=hex)
@pytest.mark.parametrize("dilation", [1, 3, 16])
def test_bytes_follow_the_contract(seed: int, dilation: int) -> None:
    head, query, keys = philox.GLOBAL_ROW + 5, 4094, 16 * dilation * 3
    expected = [byte_in_plain_python(seed, head, query, key, dilation) for key in range(keys)]
    one_by_one = philox.dropout_byte(
        torch.tensor(seed),
        torch.tensor(head),
        torch.tensor(query),
        torch.arange(keys),
        dilation=torch.tensor(dilation),
    )
    assert one_by_one.tolist() == expected
    by_sixteens = philox.dropout_bytes(
        torch.tensor(seed),
        torch.tensor(head),
        torch.tensor(query),
        torch.arange(dilation)[:, None],
        torch.arange(3),
    )
    assert by_sixteens.mT.flatten().tolist() == expected


def test_bytes_are_uniform() -> None:
    found = philox.dropout_bytes(
        torch.arange(4)[:, None, None],
        torch.tensor(0),
        torch.arange(256)[:, None],
        torch.tensor(0),
        torch.arange(64),
    )
    counts = torch.bincount(found.flatten().long(), minlength=256).double()
    expected = counts.sum() / 256
    # 255 degrees of freedom: a chi-square above 330 has a probability of about 1 in 1,000.
    assert ((counts - expected) ** 2 / expected).sum() < 330


def test_blocks_are_cut_as_the_bits_are() -> None:
    """The portable backend draws whole calls: its rows of keys are filled to the keys of one."""
    from longpretrain.attention.softmax import SIXTEEN

    assert philox.KEYS_PER_CALL == SIXTEEN
