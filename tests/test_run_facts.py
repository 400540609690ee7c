"""Weights are told apart by their content in memory; a resume says what code wrote the checkpoint.

That ranks refuse each other by these facts: test_agreement.py, with real ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_run import make_roberta

from longpretrain.engine import checkpoint
from longpretrain.model.folder import load_model
from longpretrain.run_facts import changed_since, hash_of_weights


def test_a_flipped_bit_of_any_tensor_shows(tmp_path: Path, threads: object) -> None:
    make_roberta(tmp_path / "model")
    model = load_model(tmp_path / "model")
    before = hash_of_weights(model)
    torch.set_num_threads(3)
    assert hash_of_weights(model) == before
    assert hash_of_weights(load_model(tmp_path / "model")) == before
    for name, parameter in model.named_parameters():
        bits = parameter.detach().view(torch.int32).flatten()
        bits[-1] ^= 1
        assert hash_of_weights(model) != before, name
        bits[-1] ^= 1
    assert hash_of_weights(model) == before


def test_swapped_tensors_show() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other = torch.nn.Sequential(model[1], model[0])
    assert hash_of_weights(model) != hash_of_weights(other)


def test_a_scalar_and_an_empty_tensor_are_hashed() -> None:
    model = torch.nn.Linear(1, 1)
    before = hash_of_weights(model)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("none", torch.empty(0))
    assert hash_of_weights(model) != before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"commit": "0123"}, ""),
        ({"code": "0123"}, "code 0123 -> "),
        ({"torch": "2.12"}, "torch 2.12 -> 2."),
        ({"apex": "1"}, "apex 1 -> none"),
    ],
    ids=["the same", "another commit of the same files", "code", "package", "package gone"],
)
def test_a_resume_tells_what_changed(changes: dict[str, str], told: str) -> None:
    found = changed_since({"versions": checkpoint.versions() | changes})
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_an_old_checkpoint_that_tells_no_code_is_no_change() -> None:
    known = checkpoint.versions()
    assert changed_since({"versions": {"torch": known["torch"]}}) == changed_since({}) == ""
