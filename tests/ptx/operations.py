"""Every instruction that is known, by its full form: what is not in OPERATIONS is an error.

An expression is Python over the operands {0}, {1}, ... that sees what arithmetic.py defines.
"""

from __future__ import annotations

from dataclasses import dataclass

# The numpy type that holds numbers of a PTX type
DTYPE = {"pred": "b1", "f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4"}
DTYPE |= {f"{kind}{8 * n}": f"u{n}" for n in (1, 2, 4, 8) for kind in "bu"}
DTYPE |= {f"s{8 * n}": f"i{n}" for n in (1, 2, 4, 8)} | {"f32": "f4", "f64": "f8"}

# Generic addresses of shared and local memory: no global buffer lies there.
GENERIC = {"shared": 1 << 60, "local": 1 << 61, "param": 1 << 62}


@dataclass(frozen=True)
class Value:
    """One result from operands alone."""

    result: str
    sources: tuple[str, ...]
    expression: str
    # Instead, where the last operand is a number below the width of the first; all of one type then
    with_literal: str | None = None
    divides: bool = False  # by the last operand


@dataclass(frozen=True)
class Memory:
    """``kind``: load, store or atomic. ``count`` numbers of ``type`` side by side."""

    kind: str
    space: str
    type: str
    count: int = 1
    function: str = ""  # of an atomic one


@dataclass(frozen=True)
class Special:
    """``kind``: move, branch, exit, barrier, warp_barrier, shuffle, vote, active, ldmatrix, mma,
    copy, commit or wait."""

    kind: str
    detail: str = ""
    type: str = ""


Operation = Value | Memory | Special
OPERATIONS: dict[str, Operation] = {}


def _integers() -> None:
    for bits in (16, 32, 64):
        plain, unsigned, signed, twice = f"b{bits}", f"u{bits}", f"s{bits}", f"{2 * bits}"
        for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
            _value(f"{name}.{plain}", plain, (plain, plain), f"{{0}} {sign} {{1}}")
        _value(f"not.{plain}", plain, (plain,), "~{0}")
        _value(f"shl.{plain}", plain, (plain, "u32"), "shl({0}, {1})", "{0} << {1}")
        for kind in (unsigned, signed):
            # The lower half of sums and products is that of unsigned numbers.
            _value(f"add.{kind}", plain, (plain, plain), "{0} + {1}")
            _value(f"sub.{kind}", plain, (plain, plain), "{0} - {1}")
            _value(f"mul.lo.{kind}", plain, (plain, plain), "{0} * {1}")
            _value(f"mad.lo.{kind}", plain, (plain, plain, plain), "{0} * {1} + {2}")
            for name in ("min", "max"):
                _value(f"{name}.{kind}", kind, (kind, kind), f"np.{name}imum({{0}}, {{1}})")
            for name in ("div", "rem"):
                expression = f"{name}({{0}}, {{1}})"
                OPERATIONS[f"{name}.{kind}"] = Value(kind, (kind, kind), expression, divides=True)
            if bits < 64:
                wide = kind[0] + twice
                product = f"{{0}}.astype({DTYPE[wide]}) * {{1}}"
                _value(f"mul.wide.{kind}", wide, (kind, kind), product)
                _value(f"mad.wide.{kind}", wide, (kind, kind, wide), product + " + {2}")
            if bits > 16:
                high = "mul_hi({0}, {1})"
                _value(f"mul.hi.{kind}", kind, (kind, kind), high)
                _value(f"mad.hi.{kind}", kind, (kind, kind, kind), high + " + {2}")
        _value(f"neg.{signed}", plain, (plain,), "np.negative({0})")
        _value(f"abs.{signed}", signed, (signed,), "np.abs({0})")
        for kind in (plain, unsigned, signed):
            _value(f"shr.{kind}", kind, (kind, "u32"), "shr({0}, {1})", "{0} >> {1}")
            _value(f"selp.{kind}", plain, (plain, plain, "pred"), "where({2}, {0}, {1})")
            _compare(kind, {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="})
        _compare(unsigned, {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="})


def _value(
    opcode: str, result: str, sources: tuple[str, ...], expression: str, literal: str | None = None
) -> None:
    OPERATIONS[opcode] = Value(result, sources, expression, literal)


def _compare(kind: str, signs: dict[str, str]) -> None:
    for name, sign in signs.items():
        test = sign if "{" in sign else f"{{0}} {sign} {{1}}"
        _value(f"setp.{name}.{kind}", "pred", (kind, kind), test)
        for join, joined in (("and", "&"), ("or", "|"), ("xor", "^")):
            expression = f"({test}) {joined} {{2}}"
            _value(f"setp.{name}.{join}.{kind}", "pred", (kind, kind, "pred"), expression)


def _bits() -> None:
    for name, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        _value(f"{name}.pred", "pred", ("pred", "pred"), f"{{0}} {sign} {{1}}")
    _value("not.pred", "pred", ("pred",), "~{0}")
    _value("popc.b32", "u32", ("b32",), "np.bitwise_count({0}).astype(u4)")
    _value("clz.b32", "u32", ("b32",), "clz({0})")
    for way, shift in (("", "u4(31) - "), ("shiftamt.", "")):  # no bit at all: -1
        found = f"where({{0}} == 0, u4(0xFFFFFFFF), {shift}clz({{0}}))"
        _value(f"bfind.{way}u32", "u32", ("u32",), found)
    _value("brev.b32", "b32", ("b32",), "brev({0})")
    for kind in ("u32", "s32"):
        _value(f"bfe.{kind}", kind, (kind, "u32", "u32"), "bfe({0}, {1}, {2})")
    _value("bfi.b32", "b32", ("b32", "b32", "u32", "u32"), "bfi({0}, {1}, {2}, {3})")
    _value("prmt.b32", "b32", ("b32", "b32", "b32"), "prmt({0}, {1}, {2})")
    _value("lop3.b32", "b32", ("b32", "b32", "b32", "literal"), "lop3({0}, {1}, {2}, {3})")
    for way, mode in ((way, mode) for way in "lr" for mode in ("wrap", "clamp")):
        flags = f"left={way == 'l'}, wrap={mode == 'wrap'}"
        _value(
            f"shf.{way}.{mode}.b32",
            "b32",
            ("b32", "b32", "u32"),
            f"shf({{0}}, {{1}}, {{2}}, {flags})",
        )


def _floats() -> None:
    pair = ("f32", "f32")
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*")):
        for opcode in (f"{name}.f32", f"{name}.rn.f32"):
            _value(opcode, "f32", pair, f"{{0}} {sign} {{1}}")
    for rounding in ("rn", "full", "approx"):
        _value(f"div.{rounding}.f32", "f32", pair, "{0} / {1}")
    _value("fma.rn.f32", "f32", ("f32", "f32", "f32"), "fma({0}, {1}, {2})")
    _value("neg.f32", "f32", ("f32",), "np.negative({0})")
    _value("abs.f32", "f32", ("f32",), "np.abs({0})")
    _value("min.f32", "f32", pair, "fmin({0}, {1})")
    _value("max.f32", "f32", pair, "fmax({0}, {1})")
    _value("copysign.f32", "f32", pair, "np.copysign({1}, {0})")
    _value("rcp.rn.f32", "f32", ("f32",), "rcp({0})")
    _value("sqrt.rn.f32", "f32", ("f32",), "np.sqrt({0})")
    for name in ("ex2", "lg2", "rcp", "rsqrt"):
        _value(f"{name}.approx.f32", "f32", ("f32",), f"{name}({{0}})")
        _value(f"{name}.approx.ftz.f32", "f32", ("f32",), f"flush({name}(flush({{0}})))")
    _value("selp.f32", "f32", ("f32", "f32", "pred"), "where({2}, {0}, {1})")
    ordered = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    # With NaN: numpy's comparisons are false, but for !=; the forms with u are true.
    opposite = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
    unordered = {name: f"~({{0}} {sign} {{1}})" for name, sign in opposite.items()}
    both = "({0} < {1}) | ({0} > {1})"
    nan = "np.isnan({0}) | np.isnan({1})"
    _compare("f32", ordered | unordered | {"ne": both, "equ": f"~({both})", "neu": "{0} != {1}"})
    _compare("f32", {"nan": nan, "num": f"~({nan})"})


def _conversions() -> None:
    integers = [f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)]
    for source in integers:
        for result in integers:
            _value(f"cvt.{result}.{source}", result, (source,), f"{{0}}.astype({DTYPE[result]})")
        _value(f"cvt.rn.f32.{source}", "f32", (source,), "{0}.astype(f4)")
    for name, function in (("rzi", "trunc"), ("rni", "rint"), ("rmi", "floor"), ("rpi", "ceil")):
        for result in integers:
            expression = f"to_int({{0}}, {DTYPE[result]}, np.{function})"
            _value(f"cvt.{name}.{result}.f32", result, ("f32",), expression)
        _value(f"cvt.{name}.f32.f32", "f32", ("f32",), f"np.{function}({{0}})")
    for half in ("bf16", "f16"):
        _value(f"cvt.f32.{half}", "f32", (half,), f"from_{half}({{0}})")
        _value(f"cvt.rn.{half}.f32", half, ("f32",), f"to_{half}({{0}})")
        # The first operand goes to the upper half.
        pair = f"to_{half}({{0}}).astype(u4) << u4(16) | to_{half}({{1}})"
        _value(f"cvt.rn.{half}x2.f32", f"{half}x2", ("f32", "f32"), pair)
    for way, sign in (("", "+"), ("to.", "-")):
        _value(f"cvta.{way}global.u64", "u64", ("u64",), "{0}")
        for space, base in GENERIC.items():
            _value(f"cvta.{way}{space}.u64", "u64", ("u64",), f"{{0}} {sign} u8({base})")


def _memory() -> None:
    types = [f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)] + ["f32", "f64"]
    vectors = (("", 1), (".v2", 2), (".v4", 4))
    for kind in types:
        for text, count in vectors:
            for space in ("global", "global.nc", "shared", "local", "param", "const"):
                load = Memory("load", space.split(".")[0], kind, count)
                OPERATIONS[f"ld.{space}{text}.{kind}"] = load
            for space in ("global", "shared", "local"):
                OPERATIONS[f"st.{space}{text}.{kind}"] = Memory("store", space, kind, count)
    # Integers only: the sum of floats would depend on the order.
    functions = {
        "add": "us",
        "min": "us",
        "max": "us",
        "and": "b",
        "or": "b",
        "xor": "b",
        "exch": "b",
    }
    for space in ("global", "shared"):
        for function, kinds in functions.items():
            for kind in (f"{k}{bits}" for k in kinds for bits in (32, 64)):
                operation = Memory("atomic", space, kind, function=function)
                OPERATIONS[f"atom.{space}.{function}.{kind}"] = operation
                OPERATIONS[f"red.{space}.{function}.{kind}"] = operation


def _specials() -> None:
    for kind in ("pred", *(f"{k}{bits}" for k in "bus" for bits in (16, 32, 64)), "f32"):
        OPERATIONS[f"mov.{kind}"] = Special("move", type=kind)
    OPERATIONS.update({"bra": Special("branch"), "bra.uni": Special("branch")})
    OPERATIONS.update({"ret": Special("exit"), "exit": Special("exit")})
    OPERATIONS.update({"bar.sync": Special("barrier"), "barrier.sync": Special("barrier")})
    for function, kind in (("and", "pred"), ("or", "pred"), ("popc", "u32")):
        OPERATIONS[f"bar.red.{function}.{kind}"] = Special("barrier", function, kind)
    OPERATIONS["bar.warp.sync"] = Special("warp_barrier")
    for mode in ("idx", "bfly", "up", "down"):
        OPERATIONS[f"shfl.sync.{mode}.b32"] = Special("shuffle", mode)
    for mode, kind in (("ballot", "b32"), ("any", "pred"), ("all", "pred")):
        OPERATIONS[f"vote.sync.{mode}.{kind}"] = Special("vote", mode, kind)
    OPERATIONS["activemask.b32"] = Special("active")
    for count, way in ((count, way) for count in (1, 2, 4) for way in ("", ".trans")):
        operation = Special("ldmatrix", f"{count}{way}")
        for space in ("shared", "shared::cta"):
            OPERATIONS[f"ldmatrix.sync.aligned.m8n8.x{count}{way}.{space}.b16"] = operation
    for half in ("bf16", "f16"):
        opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32"
        OPERATIONS[opcode] = Special("mma", f"from_{half}")
    for size in ("", ".L2::64B", ".L2::128B", ".L2::256B"):
        for space in ("shared", "shared::cta"):
            OPERATIONS[f"cp.async.cg.{space}.global{size}"] = Special("copy", "16")
            OPERATIONS[f"cp.async.ca.{space}.global{size}"] = Special("copy", "4 8 16")
    OPERATIONS["cp.async.commit_group"] = Special("commit")
    OPERATIONS["cp.async.wait_group"] = Special("wait")
    OPERATIONS["cp.async.wait_all"] = Special("wait", "all")


for _fill in (_integers, _bits, _floats, _conversions, _memory, _specials):
    _fill()
