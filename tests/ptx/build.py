"""nvcc: the PTX of CUDA sources, and a library of their host code that tells what it launches."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_check.toolchain import NoNvccError, find_nvcc

from ptx.machine import Launch, Program

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++20", "-lineinfo", "-Xcompiler", "-fPIC"]
CUDA = ROOT / "csrc" / "cuda"
KEPT = ROOT / "build" / "ptx" / "kept"  # PTX by the text of its sources
AT_ONCE = 2


@functools.cache
def nvcc() -> str | None:
    """The one that the budgets are read with; None where its tests are skipped."""
    try:
        return str(find_nvcc().path)
    except NoNvccError:
        return None


def compile_sources(sources: list[Path], folder: Path, *, arch: int = 80) -> Built:
    """PTX, object files, and (ptxas reads the same PTX) the machine code in them.

    What ``folder`` holds is used again if neither the sources nor nvcc have changed.
    """
    version = subprocess.run(
        [str(nvcc()), "--version"], check=True, capture_output=True, text=True
    ).stdout
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [
            pool.submit(_compile, source, folder / source.stem, arch, version) for source in sources
        ]
    return Built([job.result() for job in jobs])


def _compile(source: Path, folder: Path, arch: int, version: str) -> Path:
    code = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "--keep", "--keep-dir", str(folder)]
    command = [str(nvcc()), *FLAGS, *code, "-c", str(source), "-o", str(folder / "host.o")]
    stamp, state = folder / "built", _digest(source, f"{version} {command}")
    if stamp.exists() and stamp.read_text() == state:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    stamp.write_text(state)
    return folder


def ptx_of(source: Path, kept: Path, arch: int = 80) -> str:
    """Without the rest: quicker. In the folder ``kept`` is one for each text of the source and its
    headers.
    """
    compiler = subprocess.run([str(nvcc()), "--version"], check=True, capture_output=True)
    flags = [*FLAGS, f"-arch=sm_{arch}", "-ptx"]
    out = kept / f"{source.stem}.{_digest(source, f'{compiler.stdout!r} {flags}')[:16]}.ptx"
    if not out.exists():
        kept.mkdir(parents=True, exist_ok=True)
        made = out.with_suffix(f".{os.getpid()}")
        subprocess.run([str(nvcc()), *flags, str(source), "-o", str(made)], check=True)
        made.rename(out)
    return out.read_text()


def of_one_kind(folder: Path, kind: str, *more: tuple[str, str, str]) -> Path:
    """A copy of csrc/cuda that is quick to compile: for one dtype and heads of 32 numbers.

    ``more``: other changes, each a file's name, a text there and what replaces it.
    """
    cuda = folder / "cuda"
    shutil.copytree(CUDA, cuda)
    shutil.copy(CUDA.parent / "attention.h", folder)
    edits = list(more)
    for size in (64, 128):
        call = f"if (D == {size}) return body(T{{}}, std::integral_constant<int, {size}>{{}});"
        edits.append(("launch.h", call, ""))
    for name in {"Float32", "BFloat16", "Float16"} - {kind}:
        edits.append(("launch.h", f"return with_head_size<{name}>(D, body);", "return;"))
    for name, before, after in edits:
        text = (cuda / name).read_text()
        assert before in text, f"{name} no longer has {before!r}"
        (cuda / name).write_text(text.replace(before, after))
    return cuda


def code_of(text: str) -> list[str]:
    """What a module does: lines without places in sources and what names a file's compilation."""
    text = re.sub(r"//[^\n]*|^[ \t]*\.(loc|file|target)\b[^\n]*", "", text, flags=re.MULTILINE)
    text = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r"(_GLOBAL__N__|_cu_)[0-9a-f]{8}", r"\1", text)
    return [line.strip() for line in text.split("\n") if line.strip()]


def _digest(source: Path, more: str) -> str:
    """Of the source and all headers beside it and above: any of them may be included."""
    headers = sorted(x for folder in source.parents[:2] for x in folder.glob("*.h"))
    found = hashlib.sha256(more.encode())
    for file in (source, *headers):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


@dataclass
class Built:
    folders: list[Path]  # one for each source

    def texts(self) -> list[str]:
        return [next(folder.glob("*.ptx")).read_text() for folder in self.folders]

    def programs(self) -> list[Program]:
        return [Program(text) for text in self.texts()]

    def link(self, more: list[Path]) -> ctypes.CDLL:
        """The host code, with a runtime that only listens."""
        library = self.folders[0].parent / "host.so"
        objects = [str(folder / "host.o") for folder in self.folders]
        sources = [str(x) for x in (HERE / "runtime.cpp", *more)]
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wl,-z,defs", f"-I{ROOT / 'csrc'}"]
        subprocess.run(["g++", *flags, *sources, *objects, "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))


_DIM3 = ctypes.c_uint * 3
_LISTENER = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(_DIM3),
    ctypes.POINTER(_DIM3),
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)


class Recorder:
    """What a call into host code launches."""

    def __init__(self, library: ctypes.CDLL, programs: list[Program]) -> None:
        self.programs = {kernel: x for x in programs for kernel in x.module.kernels}
        self.launches: list[Launch] = []
        self._listener = _LISTENER(self._listen)  # kept: the library calls it
        library.listen_to_launches(self._listener)

    def _listen(self, name, grid, block, shared_bytes, stream, arguments) -> None:  # type: ignore[no-untyped-def]
        kernel = self.programs[name.decode()].module.kernels[name.decode()]
        params = bytearray(kernel.param_bytes)
        for (offset, size), address in zip(
            kernel.params, arguments[: len(kernel.params)], strict=True
        ):
            params[offset : offset + size] = ctypes.string_at(address, size)
        x, y, z = grid[0]
        launch = Launch(kernel.name, (x, y, z), block[0][0], shared_bytes, bytes(params))
        self.launches.append(launch)
