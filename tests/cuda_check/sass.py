"""Reads nvdisasm's listing of a cubin: what a kernel's loops issue, by instruction.

A loop is a natural loop of the control flow graph: the blocks between a back edge and the block
that it goes back to. One pass through a loop is a path through its blocks. A loop may take tiles
with and without a mask, with and without dropout: then its passes differ in length. Compared are
those that do a whole step's work: the most tensor instructions (or else multiply-adds), of these
the most copies into shared memory, of these the most exponentials. Of them are reported
* the shortest: neither mask nor dropout,
* the masked: the longest of those with the fewest wide unsigned products, which Philox is made of,
* the longest: all there is.
An instruction under a false predicate is issued as well, and counted. A step may take its products
in an inner loop; how often that runs is told by the number of products that the step is known to
have. Any other loop within a loop counts as one pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_\S+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")

_WIDE = re.compile(r"U?IMAD\.(WIDE|HI)\.U32")
_MANY = 1 << 20  # more than any loop has products

_LEAVES = {"EXIT", "RET"}
_TURNS = {"BRA", "JMP"}
# Of a function that returns to what follows, or a turn: so nvcc leaves loops whose lanes may part.
_CALLS = {"CALL"}
# Would leave for a place that is read from a register: no compiler output of ours has one.
_UNKNOWN = {"BRX", "JMX", "BRXU", "JMXU"}


class SassError(ValueError):
    """A listing that this reader does not understand."""


@dataclass(frozen=True)
class Instruction:
    """One line: ``HMMA.16816.F32.BF16 R4, R8, R16, R4`` has the opcode before the blank."""

    opcode: str
    operands: str
    is_predicated: bool

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass
class Block:
    """Instructions that run one after the other, and the blocks that may follow."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """One pass through a loop: how many instructions of each opcode, with modifiers."""

    opcodes: Counter[str]

    @property
    def length(self) -> int:
        """Issue slots."""
        return sum(self.opcodes.values())

    def count(self, *bases: str) -> int:
        """Instructions whose opcode without modifiers is one of these."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.partition(".")[0] in bases)


Work = tuple[int, int, int]
"""Of one pass: counted instructions, copies into shared memory, exponentials."""


@dataclass(frozen=True)
class Loop:
    """The passes of a loop that do the most work, and all instructions that lie in it."""

    header: str
    shortest: Pass
    masked: Pass
    longest: Pass
    everything: Pass


Ways = tuple[Pass, Pass, Pass]
"""The shortest, the masked and the longest of passes that do the same work."""


def read_functions(listing: str) -> dict[str, list[Instruction | str]]:
    """Kernel -> its instructions and, as plain strings, the labels between them."""
    functions: dict[str, list[Instruction | str]] = {}
    lines: list[Instruction | str] | None = None
    for line in listing.splitlines():
        if line.startswith("\t.section"):
            lines = None
        elif found := _FUNCTION.match(line):
            lines = functions.setdefault(found[1], [])
        elif lines is None:
            continue
        elif found := _LABEL.match(line):
            lines.append(found[1])
        elif found := _INSTRUCTION.match(line):
            lines.append(Instruction(found[2], found[3].strip(), found[1] is not None))
    if not functions:
        raise SassError("no function in the listing: is it the output of nvdisasm?")
    return functions


def read_max_threads(listing: str) -> dict[str, int]:
    """Kernel -> threads of its launch bounds."""
    found: dict[str, int] = {}
    kernel = None
    lines = iter(listing.splitlines())
    for line in lines:
        if section := re.match(r"\s+\.section\s+\.nv\.info\.(\w+)", line):
            kernel = section[1]
        elif "EIATTR_MAX_THREADS" in line and kernel is not None:
            words = (re.search(r"\.word\s+(0x[0-9a-f]+)", line) for line in lines)
            found[kernel] = int(next(word for word in words if word is not None)[1], 16)
    return found


def blocks_of(lines: list[Instruction | str]) -> dict[str, Block]:
    """The control flow graph, entry first."""
    blocks = [Block("entry")]
    aliases: dict[str, str] = {}
    for line in lines:
        if isinstance(line, str):
            if blocks[-1].instructions:
                blocks.append(Block(line))
            aliases[line] = blocks[-1].label
            continue
        blocks[-1].instructions.append(line)
        if line.base in _LEAVES | _TURNS | _CALLS | _UNKNOWN:
            blocks.append(Block(f"after {line.base} {len(blocks)}"))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        block.successors = list(_successors(block, following, aliases))
    return {block.label: block for block in blocks}


def _successors(block: Block, following: Block | None, aliases: dict[str, str]) -> Iterator[str]:
    last = block.instructions[-1] if block.instructions else None
    if last is not None and last.base in _UNKNOWN:
        raise SassError(f"{last.opcode} {last.operands}: a branch to a computed place")
    may_fall = True
    if last is not None and last.base in _TURNS:
        target = _TARGET.search(last.operands)
        if target is None:
            raise SassError(f"{last.opcode} {last.operands}: a branch without a label")
        yield aliases[target[1]]
        # `BRA P0, label` and `BRA.DIV UR4, label` have their condition among the operands.
        may_fall = last.is_predicated or not last.operands.startswith("`")
    elif last is not None and last.base in _CALLS:
        target = _TARGET.search(last.operands)
        if target is not None and target[1] in aliases:
            yield aliases[target[1]]
    elif last is not None and last.base in _LEAVES:
        may_fall = last.is_predicated
    if may_fall and following is not None:
        yield following.label


def innermost_loops(blocks: dict[str, Block], counted: tuple[str, ...]) -> list[Loop]:
    """All loops that issue a counted instruction which is in no loop within them."""
    bodies, dominators = _bodies(blocks)
    found = []
    for header, body in bodies.items():
        inner = set().union(*(b for h, b in bodies.items() if h != header and b < body))
        if _count(blocks, body - inner, counted):
            found.append(_loop(blocks, header, body, dominators, counted, {}))
    return found


def step_loops(
    blocks: dict[str, Block], counted: tuple[str, ...], of_step: int | None = None
) -> list[Loop]:
    """The outermost loops with counted instructions; inner ones among them run as often as it takes
    to have ``of_step`` in a pass (None: once).
    """
    bodies, dominators = _bodies(blocks)
    with_products = {h: b for h, b in bodies.items() if _count(blocks, b, counted)}
    found = []
    for header, body in with_products.items():
        if any(body < other for other in with_products.values()):
            continue
        inner = set().union(*(b for b in with_products.values() if b < body))
        times = 1
        if of_step is not None and inner:
            # So many turns that the products of inner loops can be told from those around them.
            many = dict.fromkeys(inner, _MANY)
            found_many = _loop(blocks, header, body, dominators, counted, many)
            of_inner, around = divmod(found_many.shortest.count(*counted), _MANY)
            times, rest = divmod(of_step - around, of_inner)
            if rest or times < 1:
                raise SassError(
                    f"a step has {of_step} products, {around} and those of an inner loop with "
                    f"{of_inner}: no number of turns makes up the rest"
                )
        weights = dict.fromkeys(inner, times)
        found.append(_loop(blocks, header, body, dominators, counted, weights))
    return found


def _count(blocks: dict[str, Block], labels: set[str], counted: tuple[str, ...]) -> int:
    return sum(i.base in counted for label in labels for i in blocks[label].instructions)


def _bodies(blocks: dict[str, Block]) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Header of a loop -> its blocks, and the dominators of all blocks."""
    dominators = _dominators(blocks)
    bodies: dict[str, set[str]] = {}
    for label in dominators:
        for successor in blocks[label].successors:
            if successor in dominators[label]:
                bodies.setdefault(successor, set()).update(_body(blocks, successor, label))
    return bodies, dominators


def _dominators(blocks: dict[str, Block]) -> dict[str, set[str]]:
    """Reachable block -> the blocks that every way to it passes, itself among them."""
    order = _order(blocks, "entry", lambda _from, _to: True)
    sources: dict[str, list[str]] = {label: [] for label in order}
    for label in order:
        for successor in blocks[label].successors:
            sources[successor].append(label)
    dominators = {label: set(order) for label in order}
    dominators["entry"] = {"entry"}
    changed = True
    while changed:
        changed = False
        for label in order[1:]:
            new = set.intersection(*(dominators[s] for s in sources[label])) | {label}
            changed |= new != dominators[label]
            dominators[label] = new
    return dominators


def _order(blocks: dict[str, Block], start: str, follow: Callable[[str, str], bool]) -> list[str]:
    """Reverse postorder of the blocks that can be reached over edges that ``follow`` lets pass."""
    seen, order = {start}, []
    stack = [(start, iter(blocks[start].successors))]
    while stack:
        label, successors = stack[-1]
        for successor in successors:
            if successor not in seen and follow(label, successor):
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            order.append(label)
            stack.pop()
    return order[::-1]


def _body(blocks: dict[str, Block], header: str, latch: str) -> set[str]:
    sources: dict[str, list[str]] = {}
    for block in blocks.values():
        for successor in block.successors:
            sources.setdefault(successor, []).append(block.label)
    body, todo = {header}, [latch]
    while todo:
        label = todo.pop()
        if label not in body:
            body.add(label)
            todo += sources.get(label, [])
    return body


def _loop(
    blocks: dict[str, Block],
    header: str,
    body: set[str],
    dominators: dict[str, set[str]],
    counted: tuple[str, ...],
    weights: dict[str, int],
) -> Loop:
    """The ways from the header to an edge back to it, kept for each amount of work on the way; a
    block with a weight runs so many times.
    """

    def forward(label: str, successor: str) -> bool:
        return successor in body and successor not in dominators[label]

    ways: dict[str, dict[Work, Ways]] = {}
    ends: dict[Work, Ways] = {}
    sources: dict[str, list[str]] = {}
    for label in _order(blocks, header, forward):
        opcodes = Counter(i.opcode for i in blocks[label].instructions)
        for opcode in opcodes:
            opcodes[opcode] *= weights.get(label, 1)
        own = _work(Pass(opcodes), counted)
        before: dict[Work, Ways] = {}
        for source in sources.get(label, []):
            _merge(before, ways[source])
        if label == header:
            before = {(0, 0, 0): (Pass(Counter()),) * 3}
        ways[label] = {
            (work[0] + own[0], work[1] + own[1], work[2] + own[2]): (
                Pass(shortest.opcodes + opcodes),
                Pass(masked.opcodes + opcodes),
                Pass(longest.opcodes + opcodes),
            )
            for work, (shortest, masked, longest) in before.items()
        }
        for successor in blocks[label].successors:
            if successor == header:
                _merge(ends, ways[label])
            elif forward(label, successor):
                sources.setdefault(successor, []).append(label)
    everything = Counter(i.opcode for label in body for i in blocks[label].instructions)
    return Loop(header, *ends[max(ends)], Pass(everything))


def _work(found: Pass, counted: tuple[str, ...]) -> Work:
    exponentials = sum(n for opcode, n in found.opcodes.items() if opcode.startswith("MUFU.EX2"))
    return found.count(*counted), found.count("LDGSTS"), exponentials


def _merge(into: dict[Work, Ways], more: dict[Work, Ways]) -> None:
    for work, ways in more.items():
        known = [*ways, *into.get(work, ())]
        into[work] = (
            min(known, key=_length),
            min(known, key=lambda way: (_wide_products(way), -way.length)),
            max(known, key=_length),
        )


def _length(way: Pass) -> int:
    return way.length


def _wide_products(way: Pass) -> int:
    return sum(n for opcode, n in way.opcodes.items() if _WIDE.match(opcode))
