"""The results as text: tables of times, growth and memory, and the targets."""

from __future__ import annotations

from collections.abc import Sequence

from attention_peers import NET_OF
from attention_results import OPERATIONS, Results
from attention_runs import CALLS, case_labels
from attention_targets import targets


def report(results: Results, *, with_verdicts: bool) -> str:
    """All tables; ``with_verdicts`` says of each target whether it is met."""
    parts = [
        _title(results), _equality(results), _headline(results), _growth(results),
        _memory(results), _targets(results, with_verdicts), _notes(results),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def title_line(results: Results) -> str:
    """Hardware and date in one line."""
    data = results.data
    machine = data["machine"]
    names = {"avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
    widest = [name for flag, name in names.items() if flag in machine["instruction_sets"]]
    sets = f", {widest[0]}" if widest else ""
    level, threads = data["settings"]["cpu_level"], data["settings"]["threads"]
    lowered = f", ours lowered to {level}" if level else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores{sets}{lowered},"
        f" {threads} thread{'s' if threads > 1 else ''}, {data['date'][:10]}"
    )


def _title(results: Results) -> str:
    data = results.data
    lines = [f"longpretrain attention: {title_line(results)}"]
    lines.append(", ".join(f"{name} {version}" for name, version in data["versions"].items()))
    lines += [_ours_line(results), _memory_line(results)]
    if data["resumed"]:
        lines.append("Resumed " + ", ".join(data["resumed"]))
    if data["settings"]["mode"] == "quick":
        lines.append("A quick run: it shows that all parts run; the targets are for other shapes.")
    return "\n".join(lines)


def _ours_line(results: Results) -> str:
    """Which compiled kernels stand for ours, or why none do."""
    data = results.data
    backend, kernels = data["settings"]["backend"], data["kernels"]
    if backend != "fused":
        reason = f": {data['why_no_kernels']}" if data["why_no_kernels"] else ""
        return (
            f"ours: backend {backend}, which stands in for the compiled one{reason}. Its parts are"
            " skipped and no target is judged."
        )
    levels = ", ".join(dict.fromkeys(level for level in data["levels"].values() if level))
    return (
        f"ours: backend fused, compiled by {kernels['compiler']}, instruction sets used: {levels}"
    )


def _memory_line(results: Results) -> str:
    """What malloc and huge pages are set to."""
    machine, kept = results.data["machine"], results.data["conditions"]["kept"]
    pages = ", ".join(f"{name} {x}" for name, x in machine["transparent_huge_pages"].items())
    own = " ".join(f"{name}={x}" for name, x in machine["memory_environment"].items())
    return (
        f"memory: {machine['c_library']}; transparent huge pages: {pages}; caller's settings:"
        f" {own or 'none'}; 'kept' is {' '.join(f'{name}={x}' for name, x in kept.items())}"
    )


def _equality(results: Results) -> str:
    rows = results.data["equality"]
    if not rows:
        return ""
    lines = ["Largest difference from ours on a small shape, as a share of the largest number:"]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        of_peer = [row for row in rows if row["peer"] == peer]
        texts = []
        for dtype in dict.fromkeys(row["dtype"] for row in of_peer):
            of_dtype = [row for row in of_peer if row["dtype"] == dtype]
            worst = max(of_dtype, key=lambda row: row["difference"])
            equal = "" if all(row["is_equal"] for row in of_dtype) else "  NOT THE SAME FUNCTION"
            texts.append(f"{dtype} {worst['difference']:.1e} ({worst['tensor']}){equal}")
        lines.append(f"  {case_labels([peer]).get(peer, peer):28}" + "   ".join(texts))
    return "\n".join(lines)


CONDITION_NAMES = {"default": "malloc as it comes", "kept": "freed memory kept"}


def _headline(results: Results) -> str:
    """A table of times for each condition of memory, and the ratios of both side by side."""
    data = results.data
    shape, dtypes = data["headline_shape"], data["settings"]["dtypes"]
    columns = [(dtype, call) for dtype in dtypes for call in CALLS]
    tables = [_headline_times(results, condition, columns) for condition in CONDITION_NAMES]
    tables = [table for table in tables if table]
    if not tables:
        return ""
    head = (
        f"Headline: batch 1, {shape['heads']} heads of 64, {shape['tokens']:,} tokens,"
        f" attention window {shape['attention_window']}, one global token"
    )
    parts = ["\n".join([head, *tables[0]]), *("\n".join(table) for table in tables[1:])]
    return "\n\n".join([*parts, "\n".join(_side_by_side(results, columns)), _peaks(results)])


def _headline_times(
    results: Results, condition: str, columns: Sequence[tuple[str, str]]
) -> list[str]:
    table = [
        [
            f"median ms (x ours), {CONDITION_NAMES[condition]}",
            *(f"{dtype} {call}" for dtype, call in columns),
        ]
    ]
    for case, label in case_labels(results.data["settings"]["peers"]).items():
        if any(results.row("headline", case, *each, condition=condition) for each in columns):
            table += _times_of(results, condition, case, label, columns)
    for section, level in (("headline", ""), ("avx2", " lowered to AVX2")):
        times = [results.time_ms(section, "ours", *each, condition=condition) for each in columns]
        if section == "avx2" and any(times):
            table.append([f"ours{level}", *(_ms(time_ms) for time_ms in times)])
        for name, recomputed in (("", True), ("; no recomputed product", False)):
            shares = [
                results.peak_share(section, *each, condition=condition, recomputed=recomputed)
                for each in columns
            ]
            if any(shares):
                texts = ("-" if share is None else f"{share:.0%}" for share in shares)
                table.append([f"ours{level}, share of peak{name}", *texts])
    return _aligned(table) if len(table) > 1 else []


def _times_of(
    results: Results, condition: str, case: str, label: str, columns: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """A case's row of the headline; a module has two, as it is and without its projections."""
    whole = [
        _ms(results.time_ms("headline", case, *column, net=False, condition=condition))
        for column in columns
    ]
    if case == "ours" or case in NET_OF.values():
        return [[label, *whole]]
    cells = []
    for column in columns:
        time_ms = _ms(results.time_ms("headline", case, *column, condition=condition))
        ratio = results.ratio("headline", case, *column, condition=condition)
        cells.append(time_ms if ratio is None else f"{time_ms} ({ratio:.2f}x)")
    if case in NET_OF:
        return [[label, *whole], ["  minus projections", *cells]]
    return [[label, *cells]]


def _side_by_side(results: Results, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Peers' times as multiples of ours, under both conditions."""
    table = [["default / kept memory", *(f"{dtype} {call}" for dtype, call in columns)]]
    labels = case_labels(results.data["settings"]["peers"])
    cases = [("headline", case, label) for case, label in labels.items()]
    cases.append(("avx2", "hf", f"{labels.get('hf', 'HF Longformer')}, ours on AVX2"))
    for section, case, label in cases:
        if case == "ours" or case in NET_OF.values():
            continue
        pairs = [
            [results.ratio(section, case, *each, condition=name) for name in CONDITION_NAMES]
            for each in columns
        ]
        if any(ratio is not None for pair in pairs for ratio in pair):
            net = ", minus projections" if case in NET_OF else ""
            table.append([label + net, *(_both(pair) for pair in pairs)])
    return ["Times as multiples of ours, under both conditions of memory:", *_aligned(table)]


def _both(ratios: Sequence[float | None]) -> str:
    if all(ratio is None for ratio in ratios):
        return "-"
    return " / ".join("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)


def _peaks(results: Results) -> str:
    lines = [OPERATIONS]
    for cell, probes in results.data["peak_probes"].items():
        if probes.get("why_not"):
            lines.append(f"Peak not measured: {probes['why_not']}.")
            break
        texts = [
            ", ".join(f"{name} {rate:,.0f}" for name, rate in probes[when].items())
            for when in ("before", "after")
        ]
        lines.append(f"Peak, GFLOP/s, {cell}: {texts[0]} before; {texts[1]} after the timings")
    return "\n".join(lines)


def _growth(results: Results) -> str:
    rows = [row for row in results.data["timings"] if row["section"] == "growth"]
    labels = case_labels(results.data["settings"]["peers"])
    parts = []
    groups = dict.fromkeys(
        (row["heads"], row["attention_window"], row["dtype"], row["call"]) for row in rows
    )
    for heads, window, dtype, call in groups:
        where = {"heads": heads, "attention_window": window}
        tokens = sorted(
            {row["tokens"] for row in rows if all(row[k] == v for k, v in where.items())}
        )
        table = [[f"{dtype} {call}", *(f"{n:,}" for n in tokens)]]
        for case, label in labels.items():
            times = [
                results.time_ms("growth", case, dtype, call, {"tokens": n, **where}) for n in tokens
            ]
            if any(value is not None for value in times) and case not in NET_OF.values():
                net = ", net" if case in NET_OF else ""
                table.append([label + net, *(_ms(value) for value in times)])
        head = (
            f"Median ms against tokens: {heads} heads, attention window {window},"
            f" {CONDITION_NAMES['default']}"
        )
        parts.append("\n".join([head, *_aligned(table)]))
    return "\n\n".join(parts)


def _memory(results: Results) -> str:
    rows = results.data["memory"]
    if not rows:
        return ""
    labels = case_labels(results.data["settings"]["peers"])
    table = [["case", "dtype", "tokens", "growth MiB", "x (q+k+v)", "resident GiB"]]
    for row in rows:
        name = [labels.get(row["case"], row["case"]), row["dtype"], f"{row['tokens']:,}"]
        if "error" in row:
            table.append([*name, row["error"], "", ""])
            continue
        numbers = (f"{row['growth_mib']:,.1f}", f"{row['multiple_of_qkv']:.2f}")
        table.append([*name, *numbers, f"{row['peak_rss_gib']:.2f}"])
    return "\n".join(["Peak memory of forward+backward", *_aligned(table)])


def _targets(results: Results, with_verdicts: bool) -> str:
    head = ["target (ratios: peer's time / ours)", "measured", "with kept memory", "wanted"]
    table = [head]
    verdicts = []
    for target in targets(results):
        *texts, verdict = target.texts()
        table.append([target.name, *texts] + ([verdict] if with_verdicts else []))
        verdicts.append(target.is_met)
    lines = _aligned(table)
    if with_verdicts:
        met, measured = verdicts.count(True), len(verdicts) - verdicts.count(None)
        lines.append(
            f"{met} of {measured} measured targets met, {verdicts.count(None)} not measured;"
            " judged with malloc as it comes, the default"
        )
    return "\n".join(lines)


def _notes(results: Results) -> str:
    data = results.data
    timings = data["timings"]
    kept_all = [row for row in timings if row["is_disturbed"]]
    disturbed = sum(row["disturbed_samples"] for row in timings)
    dropped = disturbed - sum(row["disturbed_samples"] for row in kept_all)
    lines = [
        f"{sum(row['samples'] for row in timings):,} samples count; {dropped:,} were dropped, as"
        " other programs ran meanwhile."
    ]
    if kept_all:
        lines.append(
            f"For {len(kept_all)} of {len(timings)} times too few were undisturbed, so all count:"
            " the machine was busy."
        )
    lines.extend(f"Not measured: {reason}" for reason in data["not_measured"])
    return "\n".join(lines)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, all but the first flush right."""
    columns = max(len(row) for row in table)
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(columns)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        cells[0] = row[0].ljust(widths[0])
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
