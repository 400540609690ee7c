"""``python -m longpretrain VERB`` is ``longpretrain VERB``."""

from __future__ import annotations

from typing import NoReturn

from longpretrain.cli import main
from longpretrain.terminal import leave


def run() -> NoReturn:
    """The program."""
    leave(main())


if __name__ == "__main__":
    run()
