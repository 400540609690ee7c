"""What the build makes of the C++ sources: with small sources in a copy, and the library at hand.

The copies are built through the same hooks that pip calls, into folders of their own.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build/editable/CMakeFiles"  # of `make setup`
LIBRARY = "longpretrain/attention/_kernels.so"

# One function per level that says what the compiler was told, and one that calls them all.
LEVEL = """
namespace longpretrain::LONGPRETRAIN_LEVEL {{
int {name}() {{
#if defined(__AVX512BF16__)
    return 8;
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \\
    defined(__AVX512VL__)
    return 4;
#elif defined(__AVX2__) && defined(__FMA__)
    return 2;
#else
    return 1;
#endif
}}
}}  // namespace longpretrain::LONGPRETRAIN_LEVEL
"""
SOURCES = {
    "bindings.cpp": """
#include <torch/csrc/stable/library.h>
#if TORCH_TARGET_VERSION != 0x020d000000000000ULL
#error "another torch"
#endif
int memory();
int plan();
int levels();
int all() { return memory() + plan() + levels(); }
extern "C" __attribute__((visibility("default"))) int built() { return all(); }
extern "C" __attribute__((visibility("default"))) const char* file() { return __FILE__; }
""",
    "memory.cpp": "int memory() { return 1000; }\n",
    "cpu/plan.cpp": "int plan() { return 100; }\n",
    "cpu/operator.cpp": """
#if __has_include(<torch/csrc/stable/library.h>)
#error "torch's headers are for bindings.cpp alone"
#endif
#define ADD(level) namespace longpretrain::level { int forward(); int backward(); }
ADD(plain) ADD(avx2) ADD(avx512) ADD(avx512_bf16)
#undef ADD
#define ADD(level) + longpretrain::level::forward() + longpretrain::level::backward()
int levels() {
    return 0 ADD(plain)
#ifdef LONGPRETRAIN_X86
        ADD(avx2) ADD(avx512)
#ifdef LONGPRETRAIN_HAS_AVX512_BF16
        ADD(avx512_bf16)
#endif
#endif
        ;
}
""",
    "cpu/forward.cpp": LEVEL.format(name="forward"),
    "cpu/backward.cpp": LEVEL.format(name="backward"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkout with small C++ sources."""
    place = tmp_path / "check out"
    hidden = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "longpretrain", place / "longpretrain", ignore=hidden)
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, place)
    for name, text in SOURCES.items():
        path = place / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place


def build(place: Path, kind: str = "wheel", **variables: str) -> tuple[int, str]:
    """Exit code and output of a build; the wheel is left in ``place/dist``."""
    unset = ("CXX", "CXXFLAGS", "CUDACXX", "CMAKE_PREFIX_PATH", "CMAKE_PROGRAM_PATH", "CMAKE_ARGS")
    unset += ("LONGPRETRAIN_COMPILE", "LONGPRETRAIN_CUDA")
    code = f"from scikit_build_core.build import build_{kind} as build; build('dist')"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place,
        env={name: value for name, value in os.environ.items() if name not in unset} | variables,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return finished.returncode, finished.stdout


def unpacked(place: Path) -> Path:
    """The only wheel of ``place/dist``, unpacked."""
    (wheel,) = (place / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "unpacked")
    return place / "unpacked"


def files(folder: Path) -> set[str]:
    """What lies in a folder, as slashed paths from it; Python's caches apart."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts}


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and mangled name of each symbol of an object file, as ``nm`` shows them."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    lines = subprocess.check_output(["nm", *options, path], text=True).splitlines()
    return [(line.split()[-2], line.split()[-1]) for line in lines]


def check_library(path: Path) -> None:
    """It names no folder of the machine it was built on, and of torch only the stable functions."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf, of binutils")
    dynamic = subprocess.check_output(["readelf", "--dynamic", path], text=True)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    wanted = {name.split("@")[0] for _, name in symbols(path, "-D", "--undefined-only")}
    # C++ of torch would tie the library to one version: at::, c10::, torch::.
    assert not [name for name in wanted if name.startswith("_Z") and not name.startswith("_ZNSt")
                and any(space in name for space in ("2at", "3c10", "5torch"))]  # fmt: skip


def test_wheel(place: Path) -> None:
    status, output = build(place, LONGPRETRAIN_CUDA="1")  # no CUDA sources: nothing to ask of nvcc
    assert status == 0, output
    assert "no CUDA kernels: there are no sources in csrc/cuda" in output
    wheel = unpacked(place)
    package = {name for name in files(wheel) if name.startswith("longpretrain/")}
    assert package == {f"longpretrain/{name}" for name in files(place / "longpretrain")} | {LIBRARY}
    assert {"longpretrain/py.typed", "longpretrain/recipes/demo.yaml"} < package
    check_library(wheel / LIBRARY)
    assert str(place).encode() not in (wheel / LIBRARY).read_bytes()

    library = ctypes.CDLL(str(wheel / LIBRARY))
    levels = 1
    if "CPU kernels: plain;avx2;avx512" in output:
        levels += 2 + 4 + 8 * ("avx512_bf16" in output.split("CPU kernels:")[1].splitlines()[0])
    assert library.built() == 1100 + 2 * levels
    library.file.restype = ctypes.c_char_p
    assert library.file() == b"csrc/bindings.cpp"


def test_editable_install(place: Path) -> None:
    """The checkout itself is what is imported, the library in it."""
    status, output = build(place, "editable")
    assert status == 0, output
    wheel = unpacked(place)
    assert (wheel / "longpretrain.pth").read_text() == f"{place}\n"
    assert not (wheel / "longpretrain").exists()
    assert (place / LIBRARY).exists()
    status, output = build(place, "editable", LONGPRETRAIN_COMPILE="0")
    assert status == 0, output
    assert not (place / LIBRARY).exists()


def without_compiler(folder: Path) -> str:
    """A PATH of the build's own tools alone, wherever they and the compilers lie."""
    folder.mkdir()
    for name in ("cmake", "ninja"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize(
    ("why", "has_compiler"),
    [("there is no C++ compiler", False), ("LONGPRETRAIN_COMPILE=0", True)],
    ids=["no compiler", "not wanted"],
)
def test_without_the_library(place: Path, tmp_path: Path, why: str, has_compiler: bool) -> None:
    variables = {"LONGPRETRAIN_COMPILE": "0"}
    if not has_compiler:
        variables = {"PATH": without_compiler(tmp_path / "tools")}
    (place / LIBRARY).write_text("of an earlier editable install")
    status, output = build(place, **variables)
    assert status == 0, output
    (notice,) = [line for line in output.splitlines() if "without the compiled library" in line]
    assert why in notice
    assert LIBRARY not in files(unpacked(place))


@pytest.mark.parametrize(
    ("variables", "broken", "says"),
    [
        ({}, "cpu/forward.cpp", "a slip of the pen"),
        ({"CXX": "no-such-compiler"}, None, "no-such-compiler"),
        ({"LONGPRETRAIN_CUDA": "yes"}, None, "LONGPRETRAIN_CUDA: got yes, wanted auto, 1 or 0"),
        (
            {"LONGPRETRAIN_CUDA": "1", "CUDACXX": "no-such-nvcc"},
            "cuda/attention.cu",
            "LONGPRETRAIN_CUDA: got 1 and no working nvcc",
        ),
    ],
    ids=["compile error", "compiler", "switch", "nvcc"],
)
def test_what_fails_the_install(
    place: Path, variables: dict[str, str], broken: str | None, says: str
) -> None:
    """A library that was to be built and could not be is an error, never left out in silence."""
    if broken is not None:
        (place / "csrc" / broken).parent.mkdir(exist_ok=True)
        (place / "csrc" / broken).write_text('#error "a slip of the pen"\n')
    status, output = build(place, **variables)
    assert status != 0
    assert says in output
    assert not (place / "dist").exists() or not files(place / "dist")


def torch_with_cuda(folder: Path) -> str:
    """A path of Python on which torch is the one at hand, and looks as if it had been built with
    CUDA: that is what makes LONGPRETRAIN_CUDA=auto look for nvcc.
    """
    (found,) = importlib.util.find_spec("torch").submodule_search_locations
    (folder / "torch/lib").mkdir(parents=True)
    (folder / "torch/__init__.py").touch()
    (folder / "torch/include").symlink_to(Path(found) / "include")
    (folder / "torch/lib/libtorch_cpu.so").symlink_to(Path(found) / "lib/libtorch_cpu.so")
    (folder / "torch/lib/libtorch_cuda.so").touch()
    version = importlib.metadata.version("torch")
    (folder / f"torch-{version}.dist-info").mkdir()
    (folder / f"torch-{version}.dist-info/METADATA").write_text(
        f"Name: torch\nVersion: {version}\n"
    )
    return str(folder)


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_nvcc_without_the_rest_of_its_toolkit(place: Path, tmp_path: Path, wish: str) -> None:
    """As some packages of it come: a reason to go without its kernels, if nobody asked for them."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    (place / "csrc/cuda").mkdir()
    (place / "csrc/cuda/attention.cu").write_text('#error "there is no runtime to link with"\n')
    status, output = build(
        place,
        LONGPRETRAIN_CUDA=wish,
        CMAKE_ARGS="-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON",
        PYTHONPATH=torch_with_cuda(tmp_path / "torch"),
    )
    output = " ".join(output.split())
    assert "without the rest of its toolkit, wanted the CUDA runtime beside it too" in output
    if wish == "auto":
        assert status == 0, output
        assert output.count("longpretrain: no CUDA kernels: nvcc ") == 1
        assert LIBRARY in files(unpacked(place))
    else:
        assert status != 0
        assert "LONGPRETRAIN_CUDA: got 1 and nvcc " in output


def test_only_the_bindings_know_torch() -> None:
    """Everything else can be compiled and tested without it, for the sanitizers as well."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert sources
    including = {path.name for path in sources if "include <torch" in path.read_text()}
    assert including <= {"bindings.cpp", "devices.h"}
    users = [path.name for path in sources if '"devices.h"' in path.read_text()]
    assert users in ([], ["bindings.cpp"])


def test_launches_are_named_after_their_kernels() -> None:
    """So that an error, the emulator and a profiler name one thing by one name."""
    launched = 0
    for path in (ROOT / "csrc/cuda").glob("*.cu"):
        text = path.read_text()
        for name in re.findall(r'\blaunch(?:_window<.*>)?\("([^"]*)"', text):
            assert f" {name}(const Problem p" in text, f"{path.name}: {name}"
            launched += 1
    assert launched == 11


def test_levels_share_no_function() -> None:
    """Of an inline function or a template that several objects hold the linker keeps one copy.

    One that was compiled for AVX-512 would then run on processors without it, in the name of all.
    So each level's functions are its own: local, or in its namespace and not inline.
    """
    objects = sorted(
        path
        for level in ("plain", "avx2", "avx512", "avx512_bf16")
        for path in (TREE / f"{level}.dir").rglob("*.o")
    )
    if not objects:
        pytest.skip("there is no build/editable: the library was not built by make setup")
    for path in objects:
        shared = [name for kind, name in symbols(path) if kind == "W"]
        assert not shared, f"{path.relative_to(TREE)}: {shared}"


def test_the_library_at_hand() -> None:
    found = importlib.util.find_spec("longpretrain.attention._kernels")
    if found is None or found.origin is None:
        pytest.skip("longpretrain was installed without the compiled library")
    check_library(Path(found.origin))
