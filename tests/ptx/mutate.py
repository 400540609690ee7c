"""How much cases.py sees: one random instruction of a kernel is changed,
and all cases run. By hand: PYTHONPATH=tests python -m ptx.mutate 100 [seed]

A survivor is a change that does no harm, or one that no case notices: worth a look. MUTATION.md
tells of the last long run. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from kernel_cases import BF16, right_of
from torch import Tensor

from ptx.build import HERE, ROOT
from ptx.calls import Call, Operator, operator, stable_name
from ptx.cases import cases, with_a_name_twice
from ptx.machine import Program
from ptx.parse import Instruction, PtxError, vector

HEAD_SIZE = 32
KERNELS = f"INS0_8BFloat16ELi{HEAD_SIZE}E"
OTHER_OPCODE = [
    (r"^add\.", "sub."), (r"^sub\.", "add."), (r"^max\.", "min."), (r"^min\.", "max."),
    (r"^and\.b", "or.b"), (r"^or\.b", "xor.b"), (r"^shl\.", "shr."),
    (r"^setp\.lt\.", "setp.le."), (r"^setp\.le\.", "setp.lt."), (r"^setp\.gt\.", "setp.ge."),
    (r"^setp\.ge\.", "setp.gt."), (r"^setp\.eq\.", "setp.ne."), (r"^setp\.ne\.", "setp.eq."),
]  # fmt: skip
ORDERED = re.compile(r"^(sub|div|setp\.[lg]|selp|shl|shr|shfl|cvt\.rn\.bf16x2)\b")
DELETABLE = re.compile(r"^(st\.|bar\.sync|bar\.warp|cp\.async)")


def mutants(instruction: Instruction) -> list[tuple[str, Instruction | None]]:
    """Kind of change and what the instruction becomes."""
    opcode, operands = instruction.opcode, list(instruction.operands)
    found: list[tuple[str, Instruction | None]] = []

    def add(kind: str, at: int, operand: str) -> None:
        changed = (*operands[:at], operand, *operands[at + 1 :])
        found.append((kind, replace(instruction, operands=changed)))

    for pattern, other in OTHER_OPCODE:
        if re.match(pattern, opcode):
            found.append(("opcode", replace(instruction, opcode=re.sub(pattern, other, opcode))))
    if ORDERED.match(opcode) and len(operands) > 2 and operands[1] != operands[2]:
        swapped = (operands[0], operands[2], operands[1], *operands[3:])
        found.append(("order of operands", replace(instruction, operands=swapped)))
    if DELETABLE.match(opcode):
        found.append(("deleted", None))
    if instruction.guard:
        negated = not instruction.guard_negated
        found.append(("guard", replace(instruction, guard_negated=negated)))
    for at, operand in enumerate(operands):
        is_memory = opcode.startswith(("ld.", "st."))
        if (
            at
            and re.fullmatch(r"-?\d+", operand)
            and not opcode.startswith(("bar.", "shfl", "cp."))
        ):
            add("number", at, str(int(operand) + 1))
        elif is_memory and (match := re.fullmatch(r"(\[.*\+)(\d+)\]", operand)):
            add("offset", at, f"{match[1]}{int(match[2]) + 8}]")
        elif operand.startswith("{") and opcode.startswith(("mma", "ldmatrix", "ld.", "st.")):
            first, second, *rest = vector(operand)
            add("fragment", at, "{" + ",".join([second, first, *rest]) + "}")
    return found


def changed_kernel(program: Program, kernel: str, at: int, new: Instruction | None) -> Program:
    found = copy.copy(program)
    found.translators, found.runs = {}, Counter()
    found.module = replace(program.module, kernels=dict(program.module.kernels))
    old = program.module.kernels[kernel]
    nothing = Instruction(old.code[at].line, "mov.u32", ("_", "0"), None, False, "deleted")
    code = [*old.code[:at], new or nothing, *old.code[at + 1 :]]
    found.module.kernels[kernel] = replace(old, code=code)
    return found


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: (found[name].double() - x)[x.isfinite()].abs().max().nan_to_num(torch.inf).item()
        for name, x in right.items()
    } | {"not finite": float((~found["lse"].isfinite() != ~right["lse"].isfinite()).sum())}


def verdict(
    changed: Operator, rights: list[tuple[Call, dict[str, Tensor], dict[str, float]]]
) -> str:
    for call, right, usual in rights:
        try:
            found = Call(changed, call.case, call.layout).run()
        except (PtxError, AssertionError) as error:
            return "refused: " + re.sub(r"\d+", "#", str(error).split("`: ")[-1])[:60]
        if any(error > 2 * usual[name] for name, error in errors(found, right).items()):
            return "wrong results"
    return "survived"


def candidates(program_list: list[Program]) -> list[tuple[Program, str, int]]:
    """Instructions of the kernels: program, kernel, index."""
    return [
        (program, kernel, at)
        for program in program_list
        for kernel, parsed in program.module.kernels.items()
        if KERNELS in kernel
        for at in range(len(parsed.code))
    ]


def drawn(clean: Operator, seed: int) -> Iterator[tuple[Operator, str]]:
    """Operators with one change each, and what it is."""
    draw, places = random.Random(seed), candidates(clean.programs)
    while True:
        program, kernel, at = draw.choice(places)
        instruction = program.module.kernels[kernel].code[at]
        if not (choices := mutants(instruction)):
            continue
        kind, new = draw.choice(choices)
        other = Operator(clean.programs, clean.library)
        other.kernels[stable_name(kernel)] = changed_kernel(program, kernel, at, new), kernel
        became = f"{new.opcode} {', '.join(new.operands)}" if new else "nothing"
        if new and new.guard_negated != instruction.guard_negated:
            became = f"not {new.guard}: {became}"
        name = re.sub(r".*?([a-z_]+_kernel|sum_rows).*", r"\1", stable_name(kernel))
        where = program.source_of(instruction.line)
        yield other, f"{kind}: {name}: {instruction.text} -> {became} ({where})"


def record_of(clean: Operator, seed: int) -> Path:
    """Of this PTX, these cases and this seed: a line of JSON for each mutant, in turn."""
    state = hashlib.sha256("\0".join(x.text for x in clean.programs).encode())
    state.update((HERE / "cases.py").read_bytes())
    return ROOT / "build" / "ptx" / f"mutants-{state.hexdigest()[:12]}-{seed}.jsonl"


def main(count: int, seed: int) -> None:
    clean, rights = operator(), []
    record = record_of(clean, seed)
    found = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    for layout, case in cases(HEAD_SIZE, BF16).values():
        call, right = Call(clean, with_a_name_twice(case), layout), right_of(case)
        rights.append((call, right, errors(call.run(), right)))
    with record.open("a") as file:
        for changed, what in itertools.islice(drawn(clean, seed), len(found), count):
            found.append([verdict(changed, rights), what])
            file.write(json.dumps(found[-1]) + "\n")
            file.flush()
    print(f"{len(found)} mutants, seed {seed}; all of them: {record}")
    for ending, times in Counter(ending for ending, _ in found).most_common():
        print(f"{times:5} {ending}")
    for ending, what in found:
        if ending == "survived":
            print(f"survived: {what}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
