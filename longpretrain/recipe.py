"""Recipes: YAML files and ``key=value`` overrides, read into a Config.

``load_recipe("demo", ["optim.lr=1e-4"])`` reads a packaged recipe (or a YAML file) and applies the
overrides, later ones winning. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from longpretrain.config import Config, flat, to_tree
from longpretrain.errors import InputError
from longpretrain.mix_config import MixSource, check_name

RECIPES = Path(__file__).parent / "recipes"

_PATHS = ("run.dir", "model.path", "data.train", "data.valid", "zero.config")
"""Keys that hold a path, beside those of data.mix: a leading ~ is the home folder."""
_MIX_KEY = re.compile(r"data\.mix\.([^.]+)\.([^.]+)")
_MOST_DIGITS = 40
"""Of a numerator or denominator: what YAML reads as a number of such a size has fewer."""

# What neighbouring projects call some keys: the suggestion for an unknown one.
_ALSO_CALLED = {
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip_norm",
    "gradient_clipping": "optim.clip_norm",
    "max_steps": "schedule.total_steps",
    "warmup_updates": "schedule.warmup_steps",
    "batch_size": "batch.global_sequences",
    "per_device_train_batch_size": "batch.micro_sequences",
    "max_length": "data.max_tokens",
    "mlm_probability": "masking.probability",
    "output_dir": "run.dir",
    "seed": "run.seed",
}


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe: a YAML file, or the name of a packaged one, with ``key=value`` overrides.

    Raises:
        InputError: no such recipe, not YAML, an unknown key, or a value that does not fit.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise InputError(
            "recipe",
            got=recipe,
            wanted="a .yaml file or a packaged recipe",
            way_out=f"Packaged recipes: {known}.",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"recipe {path}",
            got=error,
            wanted="YAML in UTF-8",
            way_out="Mend the file at that place.",
        ) from error
    if not isinstance(tree, dict):
        raise InputError(
            f"recipe {path}",
            got=type(tree).__name__,
            wanted="sections with keys",
            way_out="See the packaged recipes for the form.",
        )
    tree.setdefault("name", path.stem)
    for override in overrides:
        _override(tree, override)
    _expand_home(tree)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """A Config from nested dictionaries, such as a saved config.yaml."""
    return cast(Config, _build(Config, tree, ""))


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise InputError(
            "override", got=override, wanted="key=value", way_out="For example optim.lr=1e-4."
        )
    value = _override_value(dotted, text)
    *sections, key = dotted.split(".")
    for number, section in enumerate(sections, 1):
        entry: Any = tree.setdefault(section, {})
        if not isinstance(entry, dict):
            upper = ".".join(sections[:number])
            raise InputError(
                f"recipe key {dotted}",
                got=f"{upper} as a section",
                wanted="a section of a recipe",
                way_out=f"{upper} is a single value: write {upper}=VALUE.",
            )
        tree = entry
    tree[key] = value


def _override_value(key: str, text: str) -> Any:
    """What an override says, as YAML. Where a text is wanted it stands as it is, also if YAML would
    read a number or date; quotes around all of it go, and null is the empty text.
    """
    mix_key = _MIX_KEY.fullmatch(key)
    if not text.strip() and (key in _PATHS or (mix_key and mix_key[2] == "path")):
        way_out = "Give one; is a shell variable unset?"
        if key in ("run.dir", "data.valid"):  # the others have to be something
            way_out = f"Is a shell variable unset? For the default write {key}=null."
        raise InputError(f"recipe key {key}", got="nothing", wanted="a path", way_out=way_out)
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if _hint(key) is str and text != "null" and not is_quoted:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"override {key}={text}",
            got=f"a value that is not YAML ({error})",
            wanted="a number, word or [list]",
            way_out="Put a text with YAML's own signs in quotes.",
        ) from error


def _hint(dotted: str) -> Any:
    """The type of a recipe's key; None if there is no such key."""
    hint: Any = Config
    for key in dotted.split("."):
        if hint == tuple[MixSource, ...]:  # the key is a source's own name
            hint = MixSource
        else:
            hint = typing.get_type_hints(hint).get(key) if dataclasses.is_dataclass(hint) else None
    return hint


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where a recipe's tree may hold paths: dotted key, the entries it is in, its name there."""
    for dotted in _PATHS:
        section, key = dotted.split(".")
        if isinstance(tree.get(section), dict):
            yield dotted, tree[section], key
    data = tree.get("data")
    mix = data.get("mix") if isinstance(data, dict) else None
    for name, source in mix.items() if isinstance(mix, dict) else ():
        if isinstance(source, dict):
            yield f"data.mix.{name}.path", source, "path"


def _expand_home(tree: dict[str, Any]) -> None:
    """Shells leave the ~ of ``run.dir=~/x`` alone."""
    for dotted, entries, key in _paths(tree):
        path = entries.get(key)
        if not isinstance(path, str) or not path.startswith("~"):
            continue
        # An empty HOME would make /x of ~/x.
        home = os.path.expanduser(path) if os.environ.get("HOME") != "" else path  # noqa: PTH111
        if home.startswith("~"):
            raise InputError(
                f"recipe key {dotted}",
                got=f"{path}, whose home folder nobody knows",
                wanted="a path",
                way_out="Set HOME, or write the path in full; ./~ begins a name with that sign.",
            )
        entries[key] = home


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise InputError(
            f"section {prefix.rstrip('.')}" if prefix else "recipe",
            got=repr(tree),
            wanted="keys and values",
            way_out=f"Write {prefix}KEY=VALUE, or mend the recipe.",
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise _unknown_key(f"{prefix}{key}")
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            values[key] = _build(cast(type, hint), value, f"{prefix}{key}.")
        elif hint == tuple[MixSource, ...]:
            values[key] = _build_mix(value, f"{prefix}{key}.")
        else:
            values[key] = _value(f"{prefix}{key}", hint, value)
    return cls(**values)


def _build_mix(tree: Any, prefix: str) -> tuple[MixSource, ...]:
    """The sources of a mix; one that is null is left out, so that an override can take it away."""
    sources = {} if tree is None else tree
    if not isinstance(sources, dict):
        raise InputError(
            f"section {prefix.rstrip('.')}",
            got=repr(tree),
            wanted="sources by name",
            way_out=f"Write {prefix}NAME.path=DIR and {prefix}NAME.weight=1 for each.",
        )
    built = []
    for name, entries in sources.items():
        if entries is None:
            continue
        if isinstance(entries, dict) and "name" in entries:
            raise _unknown_key(f"{prefix}{check_name(name)}.name")
        named = entries | {"name": check_name(name)} if isinstance(entries, dict) else entries
        built.append(_build(MixSource, named, f"{prefix}{name}."))
    return tuple(sorted(built, key=lambda source: source.name))  # the listing's order has no say


def _unknown_key(key: str) -> InputError:
    known = [name for name, _ in flat(to_tree(Config()))]
    if in_mix := _MIX_KEY.fullmatch(key):
        own = [field.name for field in dataclasses.fields(MixSource) if field.name != "name"]
        known = [f"data.mix.{in_mix[1]}.{name}" for name in own]
    # A key in the wrong section (lr, train.lr) is as common a slip as a misspelt one.
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    if key.rsplit(".", 1)[-1] in _ALSO_CALLED:
        last[key.rsplit(".", 1)[-1]] = _ALSO_CALLED[key.rsplit(".", 1)[-1]]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.8)
    nearest = last[leaf[0]] if leaf else (near[0] if near else None)
    way_out = f"Did you mean {nearest}?" if nearest else f"Known keys: {', '.join(known)}."
    return InputError(
        f"recipe key {key}", got="an unknown key", wanted="a known one", way_out=way_out
    )


def _value(key: str, hint: Any, value: Any) -> Any:
    """The value in the field's type, or an InputError. Integers may be written 1e5, windows as
    one number.
    """
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value in choices and isinstance(value, str):
            return value
        raise InputError(
            f"recipe key {key}",
            got=repr(value),
            wanted=f"one of {', '.join(choices)}",
            way_out="Pick one.",
        )
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        return _value(
            key, next(choice for choice in choices if choice is not types.NoneType), value
        )
    if typing.get_origin(hint) is tuple:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(key, choices[0], entry) for entry in entries)
    return _scalar(key, hint, value)


def _fraction(key: str, value: Any) -> Fraction:
    """A number exactly as it is written: 0.1 is 1/10, 1/3 is a third. What config.yaml says of it,
    numerator/denominator, is read in the same way.
    """
    text = re.sub(r"\s*/\s*", "/", str(value).strip())
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    number = float("nan")
    if is_number and len(text) < 2 * _MOST_DIGITS + 10:
        with contextlib.suppress(ValueError, ZeroDivisionError):
            number = float(Fraction(text) if "/" in text else text)
    if number == 0:  # also of a text with so small an exponent that Fraction would not come back
        return Fraction(0)
    if 1e-9 <= abs(number) <= 1e18:
        found = Fraction(text)
        if max(abs(found.numerator), found.denominator) < 10**_MOST_DIGITS:
            return found
    raise InputError(
        f"recipe key {key}",
        got=repr(value),
        wanted=f"a number from 1e-9 to 1e18, or a fraction such as 1/3, of {_MOST_DIGITS} digits "
        "at most",
        way_out=f"Write {key}=VALUE or mend the recipe.",
    )


def _scalar(key: str, kind: type, value: Any) -> Any:
    if kind is Fraction:
        return _fraction(key, value)
    if kind is str and (value is None or (isinstance(value, str) and "\0" not in value)):
        return value or ""  # key= on the command line means empty
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and not isinstance(value, bool) and value is not None:
        try:  # YAML 1.1 reads 1e-4 as a string
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if kind is float and not math.isnan(number):
            return number
        if kind is int and math.isfinite(number) and number.is_integer():
            return int(number)
    way_out = f"Write {key}=VALUE or mend the recipe."
    if kind is str:
        way_out = "Mend the recipe: there a number or a date that is meant as text goes in quotes."
    raise InputError(
        f"recipe key {key}",
        got=repr(value),
        wanted=f"a value of type {kind.__name__}",
        way_out=way_out,
    )
