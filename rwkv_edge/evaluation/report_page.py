"""One HTML page about a family of artifacts: it holds all it shows, and loads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from rwkv_edge.evaluation.report_data import Collected, Row, collect
from rwkv_edge.evaluation.report_plots import (
    Ranges,
    ranges_of_inputs,
    sensitivities,
    size_and_loss,
    speeds,
)
from rwkv_edge.runtime.atomic import require_writable, write_file

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--page:#fff;--line:#d9dee3;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--page:#14171a;--line:#333a41;--card:#1c2126}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p,figcaption{color:var(--soft);margin:.25rem 0;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,td.text,th.text{text-align:left}th{color:var(--soft);font-weight:600}
td.text{white-space:normal;min-width:16rem;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;margin-top:1rem;align-items:start}
figure{margin:0;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
svg{width:100%;height:auto;display:block}
.warning{border-left:.25rem solid #d95f02;padding-left:.75rem;color:var(--ink)}
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser would refuse to load anything


def write_report(
    folder: Path, target: Path | None = None, ranges: Callable[[Path], Ranges] | None = None
) -> tuple[Path, Collected]:
    """Make the page of a folder.

    Args:
        folder: see `rwkv_edge.evaluation.report_data.collect`.
        target: the file; ``report.html`` in the folder where None.
        ranges: reads the histograms of a calibration file.

    Returns:
        The file and what it is made of.

    Raises:
        FileError: there is nothing to report, a file is damaged, or the page cannot be written.
    """
    found = collect(folder)
    target = target or folder / "report.html"
    require_writable(target)
    histograms = ranges(found.calibration) if ranges and found.calibration else {}
    page = page_of(found, histograms)
    write_file(target, page.encode("utf-8", errors="backslashreplace"))
    return target, found


def page_of(found: Collected, ranges: Ranges) -> str:
    """The page's text."""
    plots = [
        ("Size and loss", "Perplexity against the reference's, ± standard error.", size_and_loss(found.rows)),
        ("Speed", "; ".join(found.machines), speeds(found.rows)),
        ("Sensitivity", _sensitivity_note(found), sensitivities(found.sensitivity)),
        ("Ranges", "Inputs of linears over the calibration text.", ranges_of_inputs(ranges)),
    ]
    title = f"{found.folder.resolve().name}: rwkv-edge report"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(found.dimensions)}{' · ' if found.dimensions else ''}"
        f"{datetime.now(timezone.utc).strftime('%Y-%m-%d')}</p>",
        *(f'<p class="warning">{escape(line)}</p>' for line in dict.fromkeys(found.warnings)),
        "<h2>Artifacts</h2>",
        _table(found.rows),
        '<div class="plots">',
        *(_figure(name, note, svg) for name, note, svg in plots if svg),
        "</div>",
        *_kept(found.rows),
        "<h2>How it was measured</h2>",
        *(f"<p>{escape(line)}</p>" for line in (*found.protocol, *found.machines)),
        f"<p>Made of {escape(', '.join(found.used))}.</p>",
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _figure(name: str, note: str, svg: str) -> str:
    return f"<figure><strong>{name}</strong><figcaption>{escape(note)}</figcaption>{svg}</figure>"


def _sensitivity_note(found: Collected) -> str:
    tokens = found.sensitivity["tokens"] if found.sensitivity else 0
    return f"Each group rounded alone, over {tokens:,} tokens of the calibration text, ± standard error."


_COLUMNS: Mapping[str, Callable[[Row, float | None], str | None]] = {
    "form": lambda row, base: row.scheme,
    "MB": lambda row, base: f"{row.nbytes / 1e6:,.2f}" if row.nbytes else None,
    "of float": lambda row, base: f"{100 * row.nbytes / base:.0f} %" if row.nbytes and base else None,
    "perplexity": lambda row, base: _number(row.number("eval", "score", "perplexity"), ".4f"),
    "change": lambda row, base: _changed(row),
    "bits per byte": lambda row, base: _number(row.number("eval", "score", "bits_per_byte"), ".4f"),
    "KL, nats": lambda row, base: _number(row.number("eval", "comparison", "kl_mean"), ".2g"),
    "top-1": lambda row, base: _percent(row.number("eval", "comparison", "top1")),
    "LAMBADA": lambda row, base: _percent(row.number("eval", "lambada", "artifact", "accuracy")),
    "decode, tok/s": lambda row, base: _number(row.number("bench", "decode_tokens_per_second"), ",.0f"),
    "prefill, tok/s": lambda row, base: _number(row.number("bench", "prefill_tokens_per_second"), ",.0f"),
    "p99, ms": lambda row, base: _number(row.number("bench", "latency_ms", "p99"), ".2f"),
    "J/token": lambda row, base: _number(row.number("bench", "joules_per_token"), ".3g"),
}


def _table(rows: Sequence[Row]) -> str:
    """All artifacts; columns that nobody has are left out."""
    base = max((row.nbytes or 0 for row in rows if not row.formats), default=0) or None
    cells = {name: [value(row, base) for row in rows] for name, value in _COLUMNS.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    head = "".join(f"<th>{name}</th>" for name in ("artifact", *cells))
    lines = [
        f"<tr><td>{escape(row.name)}</td>"
        + "".join(f"<td>{escape(column[i] or '–')}</td>" for column in cells.values())
        + "</tr>"
        for i, row in enumerate(rows)
    ]
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _kept(rows: Sequence[Row]) -> list[str]:
    quantized = [row for row in rows if row.formats]
    if not quantized:
        return []
    lines = []
    for row in quantized:
        counts = ", ".join(f"{count} {form}" for form, count in sorted(Counter(row.formats.values()).items()))
        kept = ", ".join(row.kept) or "no linear"
        table = f"embedding {row.facts.get('embedding', 'float')}"
        lines.append(
            f"<tr><td>{escape(row.name)}</td><td class='text'>{escape(counts)}</td>"
            f"<td class='text'>{escape(f'{kept}; {table}')}</td></tr>"
        )
    return [
        "<h2>What was kept in float</h2>",
        "<p>Beside what is listed: norms, token shifts, the recurrence and its state, in every scheme.</p>",
        '<div class="wide"><table><tr><th>artifact</th><th class="text">linears</th><th class="text">in float</th></tr>'
        f"{''.join(lines)}</table></div>",
    ]


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f} %"


def _changed(row: Row) -> str | None:
    change = row.number("eval", "comparison", "perplexity_change")
    error = row.number("eval", "comparison", "perplexity_change_error")
    if change is None:
        return None
    return f"{change:+.3f}{'' if error is None else f' ± {error:.2g}'} %"
