"""Recipes: what is read, what is refused, and what a run may change when it goes on."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longpretrain.config import MAY_CHANGE, Config, differences, flat, to_tree
from longpretrain.errors import InputError
from longpretrain.mix_config import MixSource
from longpretrain.recipe import RECIPES, from_tree, load_recipe


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_packaged_recipes_are_read_and_round_trip(recipe: str) -> None:
    config = load_recipe(recipe)
    assert from_tree(yaml.safe_load(yaml.safe_dump(to_tree(config)))) == config


@pytest.mark.parametrize("recipe", ["roberta-base-4096", "roberta-large-4096", "longformer-corpus"])
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
    with pytest.raises(InputError, match="Packaged recipes: demo, demo-512, longformer-corpus"):
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

    from longpretrain import config, mix_config

    nodes = [ast.parse(inspect.getsource(module)).body for module in (config, mix_config)]
    for node in [*nodes[0], *nodes[1]]:
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


MIX = """
data:
  mix:
    wiki: {path: data/wiki, weight: 0.1, min_document_tokens: 1201, fraction: 1/3}
    books: {path: ~/books, weight: 2}
"""


class TestMix:
    @pytest.fixture
    def recipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        monkeypatch.setenv("HOME", "/home/me")
        path = tmp_path / "mix.yaml"
        path.write_text(MIX)
        return str(path)

    def test_a_mix_is_read_exactly(self, recipe: str) -> None:
        """Numbers as they are written, not as binary fractions; sources sorted by name."""
        assert load_recipe(recipe).data.mix == (
            MixSource(name="books", path="/home/me/books", weight=Fraction(2)),
            MixSource(
                name="wiki",
                path="data/wiki",
                weight=Fraction(1, 10),
                min_document_tokens=1201,
                fraction=Fraction(1, 3),
            ),
        )

    @pytest.mark.parametrize("is_sorted", [True, False])
    def test_config_yaml_round_trips(self, recipe: str, is_sorted: bool) -> None:
        config = load_recipe(recipe, ["data.mix.news.path=n", "data.mix.news.weight=2/7"])
        text = yaml.safe_dump(to_tree(config), sort_keys=is_sorted)
        assert from_tree(yaml.safe_load(text)) == config
        assert dict(flat(to_tree(config)))["data.mix.news.weight"] == "2/7"
        assert dict(flat(to_tree(Config())))["data.mix"] == {}

    @given(
        weight=st.floats(1e-9, 1e18)
        | st.fractions(Fraction(1, 10**9), 10**18, max_denominator=10**20)
    )
    def test_any_weight_comes_back(self, weight: float | Fraction) -> None:
        """From config.yaml, without which a run would not go on: 1/300, as a float, is
        6666666666666667/2000000000000000000.
        """
        source = {"path": "a", "weight": weight if isinstance(weight, float) else str(weight)}
        config = from_tree({"data": {"mix": {"a": source}}})
        assert config.data.mix[0].weight == Fraction(str(weight))
        assert from_tree(yaml.safe_load(yaml.safe_dump(to_tree(config)))) == config

    def test_overrides_reach_into_it(self, recipe: str) -> None:
        """A source's numbers, a path that looks like a number, a source less, one more."""
        words = ["wiki=null", "books.path=2024", "books.weight=1e-1", "b-2.path=~/y"]
        words += ["b-2.weight=1/3", "b-2.from_sample=1e3"]
        books, second = sorted(
            load_recipe(recipe, [f"data.mix.{word}" for word in words]).data.mix,
            key=lambda source: source.from_sample,
        )
        assert (books.name, books.path, books.weight) == ("books", "2024", Fraction(1, 10))
        assert (second.path, second.weight) == ("/home/me/y", Fraction(1, 3))
        assert second.from_sample == 1000
        assert load_recipe(recipe, ["data.mix=null", "data.train=x"]).data.mix == ()
        both = ["data.mix.books.weight=null", "data.mix.books.epochs=1.5"]
        both += ["data.mix.wiki.weight=null", "data.mix.wiki.tokens=2.1e9"]
        assert [source.tokens for source in load_recipe(recipe, both).data.mix] == [
            None,
            2100000000,
        ]
        assert load_recipe(recipe, both).data.mix[0].epochs == Fraction(3, 2)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("books.wieght=2", r"got an unknown key; .* Did you mean data\.mix\.books\.weight\?"),
            ("books.name=x", "recipe key data.mix.books.name: got an unknown key"),
            ("books.a.b=x", "recipe key data.mix.books.a: got an unknown key"),
            ("books.tokens=2", "data.mix.books: got weight and tokens; wanted one of weight, tok"),
            ("books.weight=null", "data.mix.books: got no amount; wanted one of weight, tokens"),
            ("books.weight=0", "recipe key data.mix.books.weight: got 0; wanted more than 0"),
            ("books.weight=-1/3", "got -1/3; wanted more than 0"),
            ("books.weight=1e-99999999", "got 0; wanted more than 0"),
            ("books.weight=1/0", "got '1/0'; wanted a number from 1e-9 to 1e18, or a fraction"),
            ("books.weight=1/-3", "wanted a number"),
            ("books.weight=1/" + 41 * "3", "of 40 digits at most"),
            ("books.weight='0." + 5000 * "3" + "'", "of 40 digits at most"),
            ("books.weight=1e19", "wanted a number from 1e-9 to 1e18"),
            ("books.weight=.nan", "got nan; wanted a number"),
            ("books.weight=true", "got True; wanted a number"),
            ("books.weight=2001-01-01", "wanted a number"),
            ("books.weight=[1]", "wanted a number"),
            ("books.fraction=0", "data.mix.books.fraction: got 0; wanted more than 0, at most 1"),
            ("books.fraction=4/3", "got 4/3; wanted more than 0, at most 1"),
            ("books.min_document_tokens=-1", "got -1; wanted 0 or more"),
            ("books.from_sample=-1", "got -1; wanted 0 or more"),
            ("books.from_sample=1.5", "wanted a value of type int"),
            ("books.path=", "recipe key data.mix.books.path: got nothing; wanted a path"),
            ("books.path=null", "recipe key data.mix.books.path: got nothing; wanted a folder"),
            ("books.path=~no-such-user/x", "data.mix.books.path: got ~no-such-user/x, whose home"),
            ("new.weight=1", "recipe key data.mix.new.path: got nothing"),
            ("books=3", "section data.mix.books: got 3; wanted keys and values"),
            ("a b.weight=1", "a source named 'a b'; wanted a name of letters, digits"),
            ("books.weight=null books.epochs=1", "got a weight for wiki and none for books"),
            ("books.weight=null books.tokens=0", "data.mix.books.tokens: got 0; wanted more than"),
            ("books.from_sample=3 wiki.from_sample=4", "no source before sample 3; wanted one"),
        ],
    )
    def test_what_is_no_mix(self, recipe: str, words: str, message: str) -> None:
        overrides = [f"data.mix.{word}" for word in words.replace("a b", "a_b").split()]
        with pytest.raises(InputError, match=message):
            load_recipe(recipe, [word.replace("a_b", "a b") for word in overrides])

    def test_spaces(self, recipe: str) -> None:
        """Around a fraction's stroke they are left out; 1 2 is not 12."""
        spaced = load_recipe(recipe, ["data.mix.books.weight= 1 / 3 "])
        assert spaced.data.mix[0].weight == Fraction(1, 3)
        with pytest.raises(InputError, match="got '1 2'; wanted a number"):
            load_recipe(recipe, ["data.mix.books.weight=1 2"])

    def test_a_mix_stands_alone(self, recipe: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"data\.train: got x, beside data.mix; wanted one of"):
            load_recipe(recipe, ["data.train=x"])
        with pytest.raises(InputError, match=r"section data\.mix: got 3; wanted sources by name"):
            load_recipe(recipe, ["data.mix=3"])
        (tmp_path / "number.yaml").write_text("data: {mix: {2020: {path: a, weight: 1}}}")
        with pytest.raises(InputError, match="a source named 2020; wanted a name"):
            load_recipe(str(tmp_path / "number.yaml"))

    def test_what_it_leaves_to_the_samples(self, recipe: str) -> None:
        """Whether a run may go on with another mix is asked of the samples, not of the keys."""
        one = load_recipe(recipe)
        for word in ("data.mix.wiki=null", "data.mix.books.weight=3", "data.mix=null"):
            assert differences(one, load_recipe(recipe, [word])) == []
            assert differences(load_recipe(recipe, [word]), one) == []

    def test_published_corpus(self) -> None:
        """Longformer, table 13."""
        mix = {source.name: source for source in load_recipe("longformer-corpus").data.mix}
        billions = {name: (source.tokens or 0) / 1e9 for name, source in mix.items()}
        assert billions == {"books": 0.5, "wikipedia": 2.1, "realnews": 1.8, "stories": 2.1}
        thirds = [name for name, source in mix.items() if source.fraction == Fraction(1, 3)]
        assert sorted(thirds) == ["realnews", "stories"]
        assert {s.name: s.min_document_tokens for s in mix.values() if s.min_document_tokens} == {
            "realnews": 1201
        }

    def test_the_published_run_is_the_same_but_for_its_corpus(self) -> None:
        one, other = load_recipe("longformer-corpus"), load_recipe("roberta-large-4096")
        changes = {"name": "x", "data": dataclasses.replace(one.data, mix=(), train="x")}
        same = dataclasses.replace(other, name="x", data=dataclasses.replace(other.data, train="x"))
        assert dataclasses.replace(one, **changes) == same
