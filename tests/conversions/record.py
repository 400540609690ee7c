"""pytest's plugin of `make matrix`: writes down how each test came out that proves a conversion.

    python -m pytest -m conversion -p conversions.record --conversions FILE

Such a test is marked; ``{name}`` in a text stands for the test's own parameter of that name:

    @pytest.mark.conversion(
        family="{family}", direction="HF -> Longformer", checked="logits within 1e-4 at 7 tokens"
    )

What it measured it hands to the fixture ``conversion_report``, as a name and a figure.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

KEYS = {"family", "direction", "checked"}
PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"


@dataclass
class Proof:
    """One mark of one test, and how the test came out."""

    test: str
    family: str
    direction: str
    checked: str
    outcome: str = NOT_RUN
    why: str = ""
    """Of one that was skipped."""
    reported: dict[str, str] = field(default_factory=dict)
    """What it measured: name -> figure."""

    @property
    def file(self) -> str:
        """test_x.py, without the folder."""
        return Path(self.test.partition("::")[0]).name


@dataclass
class Record:
    """Of one run of pytest, under one transformers."""

    transformers: str
    proofs: list[Proof] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Record:
    """What ``Record.write`` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Record(found["transformers"], [Proof(**proof) for proof in found["proofs"]])


def proofs_of(item: pytest.Item) -> list[Proof]:
    """What a test says that it proves.

    Raises:
        pytest.UsageError: a mark that lacks one of its texts.
    """
    found = []
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("conversion"):
        texts = {name: str(text).format_map(parameters) for name, text in mark.kwargs.items()}
        if mark.args or texts.keys() != KEYS or not all(texts.values()):
            raise pytest.UsageError(f"{item.nodeid}: conversion(...) wants {sorted(KEYS)}")
        bad = [text for text in texts.values() if "|" in text or "\n" in text]
        if bad:
            raise pytest.UsageError(f"{item.nodeid}: no cell of a table: {bad}")
        found.append(Proof(item.nodeid, **texts))
    return found


class Plugin:
    """Of one run of pytest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = Record(importlib.metadata.version("transformers"))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All that is going to run."""
        self.record.proofs = [proof for item in session.items for proof in proofs_of(item)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Set-up, test and tear-down come one after the other: what failed stays so."""
        for proof in self.record.proofs:
            if proof.test != report.nodeid or proof.outcome == FAILED:
                continue
            if report.failed:
                proof.outcome = FAILED
            elif report.skipped:
                proof.why = _why_skipped(report)
            elif report.when == "call":
                proof.outcome = PASSED
                proof.reported = dict(
                    value for name, value in report.user_properties if name == "conversion"
                )

    def pytest_sessionfinish(self) -> None:
        """Also after failures: the page shows them."""
        self.record.write(self.path)


def _why_skipped(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return getattr(report, "wasxfail", "") or "skipped"


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--conversions FILE``."""
    parser.addoption("--conversions", type=Path, required=False, help="where the record goes")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin if it is asked for."""
    path = config.getoption("--conversions")
    if path is not None:
        config.pluginmanager.register(Plugin(path.absolute()))
