"""PTX text -> kernels. Only the shape of a module is understood here; opcodes stay strings."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

TYPE_BYTES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2} | {
    f"{kind}{8 * size}": size for size in (4, 8) for kind in "busf"
}
# Nothing lives at address 0 of a window, so that a lost base address is caught.
WINDOW_BASE = {"shared": 1 << 10, "param": 1 << 12, "const": 1 << 13, "local": 1 << 14}


class PtxError(Exception):
    """What a GPU would do wrong or leave undefined, or what this interpreter does not know."""


@dataclass(frozen=True)
class Instruction:
    line: int
    opcode: str
    operands: tuple[str, ...]
    guard: str | None  # a predicate register: only threads where it holds execute
    guard_negated: bool
    text: str

    def fault(self, what: str) -> PtxError:
        return PtxError(f"PTX line {self.line}: `{self.text}`: {what}")


@dataclass
class Kernel:
    name: str
    params: list[tuple[int, int]] = field(default_factory=list)  # offset and bytes of each
    param_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    symbols: dict[str, int] = field(default_factory=dict)  # variable -> address in its window
    static_bytes: dict[str, int] = field(default_factory=dict)  # of shared and local variables
    max_threads: int | None = None
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index into code


@dataclass
class Module:
    target: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    constants: bytearray = field(default_factory=bytearray)


def parse(text: str) -> Module:
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
    module = Module(target[1] if target else "")
    shared: list[str] = []  # declared outside of kernels: each kernel has its own
    constants = Kernel("")
    statements = _statements(text)
    for line, statement in statements:
        if ".entry" in statement:
            kernel = _entry(line, statement)
            kernel.symbols |= constants.symbols
            _body(kernel, line, statements, shared)
            module.kernels[kernel.name] = kernel
        elif ".shared" in statement:
            shared.append(statement)
        elif ".const" in statement:
            values = _declare(constants, line, statement)
            module.constants.extend(bytes(constants.static_bytes["const"] - len(module.constants)))
            module.constants[len(module.constants) - len(values) :] = values
        elif not re.match(r"\.(version|target|address_size)\b", statement):
            raise PtxError(f"line {line}: not supported outside of kernels: {statement[:80]}")
    return module


_STATEMENT = re.compile(
    r"""\s*(?:
      (?P<directive>\.(?:version|target|address_size)\b[^\n]*)
    | (?P<label>[$%\w]+:)
    | (?P<brace>[{}])
    | (?P<header>(?:\.\w+\s+)*\.(?:entry|func)\b[^;{]*)
    | (?P<plain>(?:[^;{}]|\{[^;{}]*\})+);
    )""",
    re.VERBOSE,
)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Line and statement. A brace is a statement, unless it holds a vector of operands."""
    text = re.sub(r"//[^\n]*|^[ \t]*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    text = re.split(r"^\s*\.section\b", text, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    newlines = [match.start() for match in re.finditer("\n", text)]
    at = 0
    while at < len(text):
        match = _STATEMENT.match(text, at)
        if match is None:
            line = bisect_right(newlines, at) + 1
            raise PtxError(f"line {line}: cannot read: {text[at : at + 80].strip()}")
        line = bisect_right(newlines, match.start(str(match.lastgroup))) + 1
        yield line, " ".join(match[str(match.lastgroup)].split())
        at = match.end()


def _entry(line: int, statement: str) -> Kernel:
    match = re.search(r"\.entry ([$\w]+) ?\((.*?)\)(.*)", statement)
    if not match:
        raise PtxError(f"line {line}: cannot read the head of a kernel: {statement[:80]}")
    kernel = Kernel(match[1])
    for param in split_operands(match[2]):
        _declare(kernel, line, param)
    if threads := re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", match[3]):
        kernel.max_threads = int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1)
    return kernel


_VARIABLE = re.compile(
    r"(?P<extern>\.extern )?(?:\.(?:visible|weak) )?\.(?P<space>param|shared|local|const)"
    r"(?: \.align (?P<align>\d+))? \.(?P<type>\w+) (?P<name>[$\w]+)(?:\[(?P<count>\d*)\])?"
    r"(?: = \{(?P<values>[\d, ]*)\})?$"
)


def _declare(kernel: Kernel, line: int, statement: str) -> bytes:
    """Give a variable its place behind those of its space. Dynamic shared memory comes last."""
    match = _VARIABLE.match(statement)
    if not match or match["type"] not in TYPE_BYTES or (match["values"] and match["type"] != "b8"):
        raise PtxError(f"line {line}: cannot read a declaration: {statement[:80]}")
    space, element = match["space"], TYPE_BYTES[match["type"]]
    align = int(match["align"] or element)
    used = kernel.param_bytes if space == "param" else kernel.static_bytes.get(space, 0)
    offset = -(-used // align) * align
    size = 0 if match["extern"] else element * int(match["count"] or 1)
    kernel.symbols[match["name"]] = WINDOW_BASE[space] + offset
    if space == "param":
        kernel.params.append((offset, size))
        kernel.param_bytes = offset + size
    else:
        kernel.static_bytes[space] = offset + size
    values = bytes(int(x) for x in match["values"].split(",")) if match["values"] else b""
    return values.ljust(size, b"\0")


def _body(
    kernel: Kernel, line: int, statements: Iterator[tuple[int, str]], shared: list[str]
) -> None:
    """Read up to the closing brace. A register of an inner scope gets a name of its own."""
    scopes: list[dict[str, str]] = []  # of each open brace: declared name or prefix -> own name
    variables = [(line, statement) for statement in shared]
    for line, statement in statements:
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
            if not scopes:
                break
        elif statement.startswith(".reg "):
            suffix = "" if len(scopes) == 1 else f"@{line}"
            _registers(kernel, statement, scopes[-1], suffix)
        elif statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.code)
        elif re.match(r"(\.extern )?\.(shared|local)\b", statement):
            variables.append((line, statement))
        elif not statement.startswith(".pragma"):
            kernel.code.append(_instruction(line, statement, scopes))
    for at, statement in sorted(variables, key=lambda x: ".extern" in x[1]):
        _declare(kernel, at, statement)


def _registers(kernel: Kernel, statement: str, scope: dict[str, str], suffix: str) -> None:
    _, kind, names = statement.split(" ", 2)
    for name in split_operands(names):
        prefix, _, count = name.partition("<")
        own = [f"{prefix}{i}" for i in range(int(count[:-1]))] if count else [prefix]
        for register in own:
            kernel.registers[register + suffix] = kind[1:]
            if suffix:
                scope[register] = register + suffix


_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+) )?([a-z][\w.:]*) ?(.*)")


def _instruction(line: int, statement: str, scopes: list[dict[str, str]]) -> Instruction:
    match = _INSTRUCTION.fullmatch(statement)
    if not match:
        raise PtxError(f"line {line}: cannot read: {statement[:80]}")

    def renamed(text: str) -> str:
        for scope in scopes[:0:-1]:
            if scope:
                return re.sub(r"[%$\w]+", lambda name: _innermost(name[0], scopes), text)
        return text

    operands = tuple(split_operands(renamed(match[4])))
    guard = renamed(match[2]) if match[2] else None
    return Instruction(line, match[3], operands, guard, match[1] == "!", statement)


def _innermost(name: str, scopes: list[dict[str, str]]) -> str:
    return next((scope[name] for scope in reversed(scopes) if name in scope), name)


def source_of(text: str, line: int) -> str:
    """Where in the CUDA sources a line of PTX comes from (nvcc -lineinfo), and through which calls
    it came there.
    """
    files = dict(re.findall(r'^\s*\.file\s+(\d+) "(?:[^"]*/)?([^"/]+)"', text, re.MULTILINE))
    for statement in reversed(text.split("\n")[:line]):
        if match := re.match(r"\s*\.loc\s+(\d+) (\d+) \d+(.*)", statement):
            places = [match.groups()[:2], *re.findall(r"inlined_at (\d+) (\d+)", match[3])]
            return " in ".join(f"{files[file]}:{number}" for file, number in places)
    return "?"


def split_operands(text: str) -> list[str]:
    """Split at commas that are not inside of {...} or [...]."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def vector(operand: str) -> list[str]:
    """The registers of {a, b}, or of a alone."""
    return [part.strip() for part in operand.strip("{}").split(",")]
