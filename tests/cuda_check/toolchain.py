"""Compiles the CUDA sources with nvcc and reads the results; nothing is built twice.

Every product lies in build/cuda_check under the hash of all that it is made from. The flags are
those of CMakeLists.txt.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CUDA = CSRC / "cuda"
BUILD = ROOT / "build" / "cuda_check"

CHIPS = (80, 86, 89, 90)
PTX_FOR_LATER = 90
"""PTX of this version is in the library, for chips that came after it."""
LATER_CHIPS = (100, 120)
OLDEST_NVCC = 12
"""As in CMakeLists.txt: older ones know no C++20."""

FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", f"-I{CSRC}")
# Lines for the PTX interpreter's messages, and objects for its shared library. Neither changes an
# instruction.
WHOLE_FLAGS = ("-lineinfo", "-Xcompiler", "-fPIC", "-Xptxas", "-v")


class ToolError(RuntimeError):
    """A tool is missing or refused its input; the message is for the user."""


class NoNvccError(ToolError):
    """Not a fault: a machine need not have it."""


@dataclass(frozen=True)
class Nvcc:
    """The compiler."""

    path: Path
    version: str


@dataclass(frozen=True)
class Toolchain:
    """nvcc and what reads its output."""

    nvcc: Nvcc
    nvdisasm: Path
    nvdisasm_version: str


def find_nvcc() -> Nvcc:
    """Raises NoNvccError where there is none, or one that is too old to build the library."""
    named = os.environ.get("CUDACXX") or "nvcc"
    found = shutil.which(named)
    if found is None and named != "nvcc":
        raise ToolError(f"CUDACXX: got {named}, which is no program, wanted an nvcc")
    if found is None:
        raise NoNvccError(
            "there is no nvcc on PATH or in CUDACXX; install the CUDA toolkit 13.0 or newer"
        )
    nvcc = Nvcc(Path(found), _version(Path(found)))
    if int(nvcc.version.partition(".")[0]) < OLDEST_NVCC:
        raise NoNvccError(
            f"{found} is nvcc {nvcc.version}, older than {OLDEST_NVCC}; install the CUDA toolkit "
            "13.0 or newer"
        )
    return nvcc


def find_toolchain() -> Toolchain:
    """Raises ToolError naming what is missing and where to get it."""
    nvcc = find_nvcc()
    nvdisasm = _find_nvdisasm(nvcc.path)
    return Toolchain(nvcc, nvdisasm, _version(nvdisasm))


def _find_nvdisasm(nvcc: Path) -> Path:
    beside = nvcc.resolve().with_name("nvdisasm")
    # The package of install/cuda-tools.lock, which `make cuda-check` installs.
    installed = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvdisasm"))
    for candidate in [*installed[-1:], beside]:
        if candidate.exists():
            return candidate
    raise ToolError(
        "there is no nvdisasm, neither beside nvcc nor in this Python; run `make cuda-check`, "
        "which installs install/cuda-tools.lock"
    )


def _version(tool: Path) -> str:
    text = run([str(tool), "--version"])
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    if found is None:
        raise ToolError(f"{tool} --version: no version in its answer: {text.strip()[:200]}")
    return found[1]


def run(command: Sequence[str], *, stdin: str | None = None, cwd: Path | None = None) -> str:
    """Its standard output and error together; ToolError with all of it when it fails."""
    result = subprocess.run(
        command, input=stdin, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False,
    )  # fmt: skip
    if result.returncode:
        shown = " ".join(command)
        raise ToolError(f"{shown}\nended with code {result.returncode}:\n{result.stdout.strip()}")
    return result.stdout


def sources() -> list[Path]:
    """The kernels; host code of csrc/cuda is C++ and not among them."""
    return sorted(CUDA.glob("*.cu"))


def constant(name: str) -> int:
    """A number that a header of csrc/cuda defines: here it has no second home."""
    for header in sorted(CUDA.glob("*.h")):
        text = header.read_text(encoding="utf-8")
        if found := re.search(rf"constexpr \w+ {name} = (\d+)\b", text):
            return int(found[1])
    raise ToolError(f"no header of csrc/cuda says `constexpr ... {name} = ...`")


def _fingerprint(nvcc: Nvcc, source: Path, *more: str) -> str:
    digest = hashlib.sha256("\n".join([nvcc.version, *FLAGS, *more]).encode())
    for path in sorted(with_includes(source)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def with_includes(source: Path) -> set[Path]:
    """The file and all of ours that it includes, at any depth."""
    found, todo = set(), [source.resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text("utf-8"), re.MULTILINE):
            near = [folder / name for folder in (path.parent, CSRC) if (folder / name).exists()]
            todo += [near[0].resolve()] if near else []
    return found


@dataclass(frozen=True)
class Cubin:
    """One source for one chip: the code, and what ptxas said of it."""

    source: Path
    chip: int
    path: Path
    log: str
    is_from_ptx: bool = False


def cubin(tools: Toolchain, source: Path, chip: int) -> Cubin:
    """Compiles for a chip."""
    if chip == CHIPS[0]:
        folder = whole(tools.nvcc, source)
        return Cubin(
            source, chip, folder / f"{source.stem}.cubin", (folder / "log").read_text("utf-8")
        )
    arch = f"arch=compute_{chip},code=sm_{chip}"
    command = [*_nvcc(tools), "-gencode", arch, "-Xptxas", "-v", "-cubin", str(source)]
    made = _made(_fingerprint(tools.nvcc, source, arch), source, f"sm_{chip}.cubin", command)
    return Cubin(source, chip, made, _log(made))


def whole(nvcc: Nvcc, source: Path) -> Path:
    """All of a source for the first of the chips, by one run of nvcc: PTX for its interpreter,
    machine code for the budgets, the host's object to see launches.

    Returns:
        A folder with ``<source>.ptx``, ``<source>.cubin``, ``host.o`` and ptxas' ``log``.
    """
    arch = f"arch=compute_{CHIPS[0]},code=sm_{CHIPS[0]}"
    fingerprint = _fingerprint(nvcc, source, *WHOLE_FLAGS, arch)
    folder = BUILD / f"{source.stem}.{fingerprint}.whole"
    if folder.exists():
        return folder
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{source.stem}.", dir=BUILD) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        command = [str(nvcc.path), *FLAGS, *WHOLE_FLAGS, "-gencode", arch, "--keep", "--keep-dir",
                   str(made), "-c", str(source), "-o", str(made / "host.o")]  # fmt: skip
        (made / "log").write_text(run(command), encoding="utf-8")
        kept = {f"{source.stem}.ptx", f"{source.stem}.cubin", "host.o", "log"}
        for file in made.iterdir():  # preprocessed copies and the like: three times the rest
            if file.name not in kept:
                file.unlink()
        for old in BUILD.glob(f"{source.stem}.*.whole"):
            shutil.rmtree(old, ignore_errors=True)
        made.rename(folder)
    return folder


def _nvcc(tools: Toolchain) -> list[str]:
    return [str(tools.nvcc.path), *FLAGS]


def ptx(tools: Toolchain, source: Path, version: int = PTX_FOR_LATER) -> Path:
    """PTX as the library holds it for later chips."""
    arch = f"-arch=compute_{version}"
    command = [*_nvcc(tools), arch, "-ptx", str(source)]
    return _made(_fingerprint(tools.nvcc, source, arch), source, f"compute_{version}.ptx", command)


def cubin_of_ptx(tools: Toolchain, source: Path, chip: int) -> Cubin:
    """What the driver of a later chip would make of the PTX."""
    text = ptx(tools, source)
    command = [str(tools.nvcc.path), f"-arch=sm_{chip}", "-Xptxas", "-v", "-cubin", str(text)]
    name = f"sm_{chip}.from_ptx.cubin"
    made = _made(text.suffixes[0][1:], source, name, command)
    return Cubin(source, chip, made, _log(made), is_from_ptx=True)


def _made(fingerprint: str, source: Path, kind: str, command: list[str]) -> Path:
    """The product's path; made first if it is not there, and older ones of its kind removed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    product = BUILD / f"{source.stem}.{fingerprint}.{kind}"
    if not product.exists():
        for old in BUILD.glob(f"{source.stem}.*.{kind}*"):
            old.unlink()
        part = product.with_name(f"{product.name}.part")
        output = run([*command, "-o", str(part)])
        product.with_name(f"{product.name}.log").write_text(output, encoding="utf-8")
        part.rename(product)
    return product


def _log(product: Path) -> str:
    return product.with_name(f"{product.name}.log").read_text(encoding="utf-8")


def listing(tools: Toolchain, code: Cubin, *, with_data: bool = False) -> str:
    """nvdisasm's listing; of the instructions alone it is a quarter as long."""
    return run([str(tools.nvdisasm), *([] if with_data else ["-c"]), str(code.path)])


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Mangled name -> as in the source, without namespace, result and parameters."""
    if not names:
        return {}
    filt = shutil.which("c++filt")
    if filt is None:
        raise ToolError("there is no c++filt; install binutils (it comes with g++)")
    shown = run([filt], stdin="\n".join(names)).splitlines()
    return dict(zip(names, map(short_name, shown), strict=True))


def short_name(demangled_name: str) -> str:
    """``void longpretrain::cuda::f<longpretrain::cuda::T, 64>(P)`` -> ``f<T, 64>``."""
    name = re.sub(r"\b(\w+::|\(anonymous namespace\)::)+", "", demangled_name)
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and at:
            name = name[:at]
            break
    return name.removeprefix("void ").replace("(int)", "").replace("(bool)1", "true").strip()


T = TypeVar("T")


def in_parallel(jobs: int, tasks: Sequence[Callable[[], T]], what: str) -> list[T]:
    """Results in order; says how far it is, as a build takes minutes."""
    done: list[T] = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(task) for task in tasks]
        for number, future in enumerate(futures, start=1):
            try:
                done.append(future.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            if sys.stderr.isatty():
                print(f"\r{what}: {number} of {len(tasks)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return done
