"""What stands at the head of every page that the tests generate: when, of what, where."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime

from ranks_helper import ROOT


def made_on() -> str:
    """The day, the commit and the machine, such as ``2026-01-31, on 1a2b3c4, 2 CPU cores, ...``."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    commit = described.stdout.strip() or "no commit"
    made = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"{made}, on {commit}, {os.cpu_count()} CPU cores, {platform.machine()}"
