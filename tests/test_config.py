"""Recipes: what is read, what is refused, and what a run may change when it goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from longpretrain.config import MAY_CHANGE, Config, differences, flat, to_tree
from longpretrain.errors import InputError
from longpretrain.recipe import RECIPES, from_tree, load_recipe


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_packaged_recipes_are_read_and_round_trip(recipe: str) -> None:
    config = load_recipe(recipe)
    assert from_tree(yaml.safe_load(yaml.safe_dump(to_tree(config)))) == config


@pytest.mark.parametrize("recipe", ["roberta-base-4096", "roberta-large-4096"])
def test_published_recipe(recipe: str) -> None:
    """Longformer (Beltagy et al. 2020), section 5 and appendix C; the rest as fairseq's RoBERTa."""
    config = load_recipe(recipe)
    assert config.batch.global_sequences * config.data.max_tokens == 2**18
    assert (config.schedule.total_steps, config.schedule.warmup_steps) == (65_000, 500)
    assert (config.schedule.decay, config.schedule.power) == ("polynomial", 3.0)
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (3e-5, (0.9, 0.98), 1e-6)
    assert (config.optim.weight_decay, config.optim.clip_norm) == (0.01, 0.0)
    assert config.optim.decay_excludes == ()
    assert (config.model.dropout, config.model.attention_dropout) == (0.1, 0.1)
    assert (config.model.attention_window, config.model.global_tokens) == ((512,), "none")
    assert (config.masking.probability, config.data.blocks) == (0.15, "full_sentences")


def test_overrides_win_and_take_yaml() -> None:
    config = load_recipe(
        "demo",
        [
            "optim.lr=1e-4",
            "model.attention_window=[8, 16]",
            "optim.lr=2e-4",
            "schedule.total_steps=1e3",
            "zero.config=x.json",
        ],
    )
    assert config.optim.lr == 2e-4
    assert config.model.attention_window == (8, 16)
    assert config.schedule.total_steps == 1000
    assert config.zero.config == "x.json"
    assert load_recipe("demo", ["model.attention_window=8"]).model.attention_window == (8,)
    assert load_recipe("demo", ["model.dropout=null"]).model.dropout is None


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        *((text, text) for text in ("123", "2024-01-01", "yes", "a: b", "[x]", "x #1", "*", "'")),
        ("'a: b'", "a: b"),
        ('"123"', "123"),
        ("null", ""),
    ],
)
def test_a_text_stands_as_it_is(text: str, taken: str) -> None:
    assert load_recipe("demo", [f"run.dir={text}"]).run.dir == taken


@pytest.mark.parametrize(
    "key", ["run.dir", "model.path", "data.train", "data.valid", "zero.config"]
)
def test_home_in_a_path(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not put it there after ``=``, nor does anyone in a file."""
    section, name = key.split(".")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({section: {name: "~/x"}}))
    monkeypatch.setenv("HOME", "/home/me")
    for config in (load_recipe("demo", [f"{key}=~/x"]), load_recipe(str(path))):
        assert dict(flat(to_tree(config)))[key] == "/home/me/x"
    other = load_recipe("demo", [f"{key}=./~x"])
    assert dict(flat(to_tree(other)))[key] == "./~x"
    with pytest.raises(InputError, match=rf"recipe key {key}: got ~no-such-user/x, whose home"):
        load_recipe("demo", [f"{key}=~no-such-user/x"])
    monkeypatch.setenv("HOME", "")
    with pytest.raises(InputError, match="Set HOME, or write the path in full"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.learning_rate=1", "optim.lr"),
        ("schedule.total_step=1", "schedule.total_steps"),
        ("warmup_steps=1", "schedule.warmup_steps"),
        ("data.max_token=1", "data.max_tokens"),
        ("batch.micro_sequence=1", "batch.micro_sequences"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"recipe key .*: got an unknown key; .* {nearest}\?"):
        load_recipe("demo", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "wanted a value of type float"),
        ("schedule.total_steps=1.5", "wanted a value of type int"),
        ("activation_checkpointing=1", "wanted a value of type bool"),
        ("precision=int8", "wanted one of fp32, bf16, fp16"),
        ("batch.micro_sequences=0", "wanted more than 0"),
        ("optim.lr=-1", "wanted 0 or more"),
        ("optim.lr=.inf", "wanted 0 or more"),
        ("optim.lr=.nan", "wanted a value of type float"),
        ("model.dropout=1", "wanted 0 <= x < 1"),
        ("model.attention_dropout=0.9999", "wanted at most 255/256"),
        ("run.dir=", r"Is a shell variable unset\? For the default write run.dir=null"),
        ("zero.config= ", "got nothing; wanted a path"),
        ("name='a'b'", "a value that is not YAML"),
        (f"run.seed=1{'0' * 400}", "wanted a value of type int"),
        ("masking.probability=0", "wanted more than 0"),
        ("optim.betas=[0.9]", "wanted two numbers"),
        ("schedule.warmup_steps=70000", "wanted less than schedule.total_steps"),
        ("data.max_tokens=3", "wanted 4 or more"),
        ("optim=3", "wanted keys and values"),
        ("precision.x=3", "wanted a section of a recipe"),
        ("optim.lr", "wanted key=value"),
        ("optim.lr=[", "a value that is not YAML"),
    ],
)
def test_values_that_do_not_fit(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe("roberta-base-4096", [override])


def test_recipe_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Packaged recipes: demo, demo-512, roberta-base-4096"):
        load_recipe("no-such")
    for text, message in (
        ("a: [", "wanted YAML"),
        ("- a", "wanted sections"),
        ("a: 1", "unknown key"),
        ("run: {dir: 2024-01-01}", "Mend the recipe: there a number or a date .* in quotes"),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_recipe(str(path))


def test_every_field_says_what_it_means() -> None:
    """A sentence under each field: `help` for people who read the recipe's keys in config.py."""
    import ast
    import inspect

    from longpretrain import config as module

    for node in ast.parse(inspect.getsource(module)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            is_section = isinstance(field, ast.AnnAssign) and "default_factory" in ast.unparse(
                field
            )
            if isinstance(field, ast.AnnAssign) and not is_section:
                text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert text, f"{node.name}.{ast.unparse(field.target)}"


def test_what_a_run_may_change() -> None:
    keys = [key for key, _ in flat(to_tree(Config()))]
    assert set(MAY_CHANGE) <= set(keys)
    one = load_recipe("demo")
    assert (
        differences(one, load_recipe("demo", ["precision=bf16", "batch.micro_sequences=2"])) == []
    )
    assert differences(one, load_recipe("demo", ["optim.lr=1", "run.seed=2"])) == [
        ("run.seed", 1, 2),
        ("optim.lr", one.optim.lr, 1.0),
    ]


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("demo").optim.lr = 1.0  # type: ignore[misc]
