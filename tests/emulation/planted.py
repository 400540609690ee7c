"""Bugs planted in a copy of the real kernels, each by an edit of one line or two."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from emulation.programs import ROOT


@dataclass(frozen=True)
class Edit:
    """Of a file of csrc; the old text must be there once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Bug:
    edit: Edit
    window: int = 40
    dilation: int = 1
    causal: bool = False
    drop_below: int = 0


# One dtype and one head size are enough, and compile in a ninth of the time.
ONE_KERNEL = [
    Edit("cuda/launch.h", f"  if (D == {size}) return body(T{{}}, {kind}{{}});\n", "")
    for size in (64, 128)
    for kind in [f"std::integral_constant<int, {size}>"]
] + [
    Edit(
        "cuda/launch.h",
        f"    case DType::k{dtype}:\n      return with_head_size<{dtype}>(D, body);\n",
        "",
    )
    for dtype in ("BFloat16", "Float16")
]

BUGS = {
    # A tile counts as inside of all windows when its first key is.
    "mask_corner": Bug(
        Edit(
            "cuda/forward.cu",
            "(live == ~0u && all.has(key) && all.has(last))",
            "(live == ~0u && all.has(key))",
        )
    ),
    # The last key of a window is left out where a mask is needed.
    "mask_edge": Bug(
        Edit(
            "cuda/mask.h",
            "~bits_from(ranges.row[x].last + 1 - first_step)",
            "~bits_from(ranges.row[x].last - first_step)",
        ),
        causal=True,
    ),
    # The query's step within its residue class instead of its position: the same without dilation.
    "philox_counter": Bug(
        Edit(
            "cuda/dropout.h",
            "const int32_t query = tokens.position(first_query + static_cast<int32_t>(lane / 2));",
            "const int32_t query = first_query + static_cast<int32_t>(lane / 2);",
        ),
        dilation=3,
        drop_below=64,
    ),
    # A tile is used when one's own copies have arrived, and the next one loaded over it.
    "barrier_of_tiles": Bug(
        Edit(
            "cuda/forward.cu",
            "    copy_wait<0>();\n    __syncthreads();\n",
            "    copy_wait<0>();\n",
        )
    ),
    # The copies waited for are those before the last ones.
    "wait_of_tiles": Bug(
        Edit(
            "cuda/forward.cu",
            "    copy_wait<0>();\n    __syncthreads();\n",
            "    copy_wait<1>();\n    __syncthreads();\n",
        )
    ),
}


def copy_sources(folder: Path) -> Path:
    """csrc as the tests compile it, small enough to be compiled often."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for edit in ONE_KERNEL:
        apply(edit, folder / "csrc")
    return folder / "csrc"


def apply(edit: Edit, csrc: Path) -> None:
    path = csrc / edit.file
    text = path.read_text()
    assert text.count(edit.old) == 1, (
        f"{edit.file} does not have once: {edit.old!r}. Where it is written anew, plant anew."
    )
    path.write_text(text.replace(edit.old, edit.new))
