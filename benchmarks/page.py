"""One HTML page of the stored rows that needs nothing else: images as data, sortable and filterable tables."""

import base64
import html
import json
from pathlib import Path

from diffmas.benchmarks.goals import BAR
from diffmas.benchmarks.measure import OURS
from diffmas.benchmarks.result import COLOUR, MARK, Result, bytes_text, ratio_text, results, time_text

__all__ = ["page"]


def page(rows: list[dict], plots: dict[str, Path]) -> str:
    """One HTML file that needs nothing else: images as data, sortable and filterable tables."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    images = "".join(
        f'<figure><img alt="{name}" src="data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for name, path in plots.items()
    )
    done = results(rows)
    whole = [r for r in done if r.whole]
    compared = [r for r in whole if r.best]
    ahead = sum(r.best[1] >= 1 for r in compared)
    behind = [r for r in whole if r.judgement[0] is False]
    counts = {
        "cases": str(len(whole)), "faster than every peer": f"{ahead} of {len(compared)}",
        f"below {BAR}x or failed": str(len(behind)), "rows in the CSV": str(len(rows)),
    }  # fmt: skip
    facts = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in counts.items())
    same = ("op", "regime", "phase", "shape")
    head = (*same, "diffmas", "% of roofline", "best peer", "ratio", "plain way", "memory", "verdict")
    body = [_cells(r) for r in whole]
    parts = [_cells(r) for r in done if not r.whole]
    every = [_provider_cells(r, row) for r in done for row in r.rows.values()]
    wide = (*same, "provider", "time", "spread", "ratio", "peak memory", "% of roofline", "error", "note")
    return (
        template.replace("{{machine}}", _machine(rows[0]))
        .replace("{{facts}}", facts)
        .replace("{{images}}", images)
        .replace("{{cases}}", _html_table(head, body))
        .replace("{{parts}}", _html_table(head, parts))
        .replace("{{rows}}", _html_table(wide, every))
        .replace("{{bar}}", str(BAR))
        .replace("{{sample}}", json.dumps(rows[0]["commit"])[1:-1])
    )


def _machine(row: dict) -> str:
    giga = lambda name: f"{row[name] / 1e9:.3g}"
    facts = (
        ("machine", row["machine"]), ("threads", row["threads"]), ("last-level cache", bytes_text(row["cache_bytes"])),
        ("read, measured", f"{giga('read')} GB/s ({giga('read_cached')} in cache)"),
        ("copy, measured", f"{giga('copy')} GB/s ({giga('copy_cached')} in cache)"),
        ("matmul, measured", f"{giga('matmul')} GFLOP/s float32, {giga('matmul_16bit')} bfloat16"),
        ("versions", f"torch {row['torch']}, transformers {row['transformers']}, diffmas {row['diffmas']}"),
        ("commit", row["commit"]), ("date", row["date"]),
    )  # fmt: skip
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts)


def _cells(r: Result) -> list[tuple[str, object, str]]:
    """(text, sort key, class) of each cell."""
    good, words = r.judgement
    percent = r.ours.get("roofline_percent")
    best, plain = r.best or ("", None), r.plain or ("", None)
    seconds, shape = r.ours.get("seconds"), r.shape + (f" ({r.note})" if r.note else "")
    return [
        (r.op, r.op, ""), (r.regime, r.regime, ""), (r.phase, r.phase, ""), (shape, shape, "shape"),
        (time_text(seconds), seconds or 0, "number"), (f"{percent:.0f}" if percent else "", percent or 0, "number"),
        (best[0], best[0], ""), (ratio_text(best[1]), best[1] or 0, f"number {COLOUR[good]}"),
        (ratio_text(plain[1]), plain[1] or 0, "number"), (ratio_text(r.memory), r.memory or 0, "number"),
        (f"{MARK[good]} {words}", words, COLOUR[good]),
    ]  # fmt: skip


def _provider_cells(r: Result, row: dict) -> list[tuple[str, object, str]]:
    spread, percent, wrong = row.get("spread"), row.get("roofline_percent"), row.get("error")
    return [
        (r.op, r.op, ""), (r.regime, r.regime, ""), (r.phase, r.phase, ""), (r.shape, r.shape, "shape"),
        (row["provider"], row["provider"], "ours" if row["provider"] == OURS else ""),
        (time_text(row.get("seconds")), row.get("seconds") or 0, "number"),
        (f"±{100 * spread:.0f} %" if spread is not None else "", spread or 0, "number"),
        (ratio_text(row.get("ratio")), row.get("ratio") or 0, "number"),
        (bytes_text(row.get("peak_bytes")), row.get("peak_bytes") or 0, "number"),
        (f"{percent:.0f}" if percent else "", percent or 0, "number"),
        (f"{wrong:.0e}" if wrong is not None else "", wrong or 0, "number"),
        (row.get("why") or "", row.get("why") or "", ""),
    ]  # fmt: skip


def _html_table(head, body) -> str:
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{c}" data-key="{html.escape(str(k))}">{html.escape(t)}</td>' for t, k, c in cells)
        + "</tr>"
        for cells in body
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"
