"""Long lists of names, in one line that says all of them."""

from __future__ import annotations

from longpretrain.model.listing import listed, printable


def test_layers_are_told_together() -> None:
    names = [f"a.layer.{i}.b" for i in (0, 1, 2, 5, 11)] + ["x", "a.layer.7.c", "e.layers.3.f"]
    assert listed(names) == "a.layer.[0-2,5,11].b; x; a.layer.7.c; e.layers.3.f"
    assert listed([f"no {name}" for name in names], ", ").startswith("no a.layer.[0-2,5,11].b, no")
    assert listed(["e.layers.3.f", "e.layers.2.f"]) == "e.layers.[2-3].f"
    assert listed([]) == ""


def test_names_of_somebody_do_no_harm() -> None:
    assert listed(["a\x1b[2J\nb", "{}.layer.1.{}", "c" * 1000]) == (
        f"a?[2J?b; 1.layer.{{}}.{{}}; {'c' * 157}..."
    )
    assert listed([f"layer.layer.{'9' * 5000}.x"]).endswith("...")
    assert printable("é ü") == "é ü"
    assert listed([f"name{i}" for i in range(10_000)]).endswith("; name199; and 9800 more")
