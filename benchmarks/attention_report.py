"""The results as text: tables of times, growth and memory, and the targets."""

from __future__ import annotations

from collections.abc import Sequence

from attention_peers import NET_OF
from attention_results import Results
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
    backend = data["settings"]["backend"]
    stand_in = "" if backend == "fused" else "  (a stand-in: not the compiled one)"
    lines.append(f"ours: backend {backend}{stand_in}")
    if data["settings"]["mode"] == "quick":
        lines.append("A quick run: it shows that all parts run; the targets are for other shapes.")
    return "\n".join(lines)


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


def _headline(results: Results) -> str:
    data = results.data
    shape, dtypes = data["headline_shape"], data["settings"]["dtypes"]
    columns = [(dtype, call) for dtype in dtypes for call in CALLS]
    table = [["median ms (x ours)", *(f"{dtype} {call}" for dtype, call in columns)]]
    for case, label in case_labels(data["settings"]["peers"]).items():
        if any(results.row("headline", case, *column) for column in columns):
            table += _times_of(results, case, label, columns)
    if len(table) == 1:
        return ""
    for section, level in (("headline", ""), ("avx2", " lowered to AVX2")):
        times = [results.time_ms(section, "ours", *column) for column in columns]
        shares = [results.peak_share(section, *column) for column in columns]
        if section == "avx2" and any(times):
            table.append([f"ours{level}", *(_ms(time_ms) for time_ms in times)])
        if any(shares):
            texts = ("-" if share is None else f"{share:.0%}" for share in shares)
            table.append([f"ours{level}, share of peak", *texts])
    head = (
        f"Headline: batch 1, {shape['heads']} heads of 64, {shape['tokens']:,} tokens,"
        f" attention window {shape['attention_window']}, one global token"
    )
    return "\n".join([head, *_aligned(table), *_peak_lines(results)])


def _times_of(
    results: Results, case: str, label: str, columns: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """A case's row of the headline; a module has two, as it is and without its projections."""
    whole = [_ms(results.time_ms("headline", case, *column, net=False)) for column in columns]
    if case == "ours" or case in NET_OF.values():
        return [[label, *whole]]
    cells = []
    for column in columns:
        time_ms = _ms(results.time_ms("headline", case, *column))
        ratio = results.ratio("headline", case, *column)
        cells.append(time_ms if ratio is None else f"{time_ms} ({ratio:.2f}x)")
    if case in NET_OF:
        return [[label, *whole], ["  minus projections", *cells]]
    return [[label, *cells]]


def _peak_lines(results: Results) -> list[str]:
    probes = results.data["peak_probes"]
    lines = []
    if probes.get("why_not"):
        lines.append(f"Peak not measured: {probes['why_not']}.")
    for when in ("before", "after"):
        rates = probes.get(when)
        if rates:
            texts = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            lines.append(f"Peak {when} the timings, GFLOP/s: {texts}")
    return lines


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
        head = f"Median ms against tokens: {heads} heads, attention window {window}"
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
    table = [["target (ratios: peer's time / ours)", "measured", "wanted"]]
    verdicts = []
    for target in targets(results):
        value, limit, verdict = target.texts()
        table.append([target.name, value, limit] + ([verdict] if with_verdicts else []))
        verdicts.append(target.is_met)
    lines = _aligned(table)
    if with_verdicts:
        met, measured = verdicts.count(True), len(verdicts) - verdicts.count(None)
        lines.append(
            f"{met} of {measured} measured targets met, {verdicts.count(None)} not measured"
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
