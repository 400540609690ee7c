"""Compiles and runs programs on the emulator: the C++ compiler is all they need, no torch."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++").split()
COMMON = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-pthread"]
# As CMakeLists.txt compiles kernels for the emulator.
OF_KERNELS = ["-O1", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-x", "c++"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]
RACE, LEAK_OF_MEMORY, COMPLAINT = 66, 1, 9  # exit codes: thread, address sanitizer, valgrind
WRONG = 3  # of the programs themselves: an exception


@dataclass(frozen=True)
class Unit:
    """One source and how it is compiled."""

    source: Path
    flags: tuple[str, ...] = ()


def emulator(*flags: str) -> list[Unit]:
    """The emulator's runtime, of which one build serves all sanitizers."""
    sources = sorted((ROOT / "csrc/emulation").glob("*.cpp"))
    return [Unit(source, ("-O3", *flags)) for source in sources]


def kernels(sources: Sequence[Path], *flags: str) -> list[Unit]:
    return [Unit(source, (*OF_KERNELS, *flags)) for source in sources]


def compile_units(units: Sequence[Unit], folder: Path, include: Path = ROOT / "csrc") -> list[Path]:
    """Objects, compiled two at a time; a warning of the compiler is an error."""

    def compile_one(unit: Unit) -> Path:
        name = unit.source.name + "".join(flag for flag in unit.flags if flag.startswith("-f"))
        made = folder / f"{name.replace('/', '_')}.o"
        command = [*CXX, *COMMON, f"-I{include}", f"-I{HERE}", *unit.flags]
        run = subprocess.run(
            [*command, "-c", str(unit.source), "-o", str(made)],
            check=False,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0 and not run.stderr, run.stderr
        return made

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, units))


@functools.cache
def runtime(folder: Path) -> list[Path]:
    """The emulator's objects, compiled once in a folder."""
    return compile_units(emulator(), folder / "runtime")


def link(program: Path, objects: Sequence[Path], *flags: str) -> Path:
    subprocess.run([*CXX, "-pthread", *map(str, objects), *flags, "-o", str(program)], check=True)
    return program


@dataclass(frozen=True)
class Result:
    code: int
    output: bytes
    errors: str


def run(
    program: Path,
    part: str,
    *arguments: int,
    data: bytes = b"",
    seed: int = 0,
    threads: int = 0,
    within: Sequence[str] = (),
) -> Result:
    """One part of a program; seed and threads are the emulator's, 0 as it likes."""
    settings = {
        "LONGPRETRAIN_EMULATION_SEED": str(seed),
        "LONGPRETRAIN_EMULATION_THREADS": str(threads),
    }
    done = subprocess.run(
        [*within, str(program), part, *map(str, arguments)],
        check=False,
        input=data,
        capture_output=True,
        env={**os.environ, **settings},
        timeout=120,
    )
    # A signal is told as by a shell, as valgrind and setarch do.
    code = 128 - done.returncode if done.returncode < 0 else done.returncode
    return Result(code, done.stdout, done.stderr.decode(errors="replace"))


def fixed_addresses() -> list[str]:
    """For the thread sanitizer: with addresses drawn from too wide a range it does not start."""
    if shutil.which("setarch") is None:
        return []
    tried = subprocess.run(["setarch", "-R", "true"], check=False, capture_output=True)
    return [] if tried.returncode else ["setarch", "-R"]
