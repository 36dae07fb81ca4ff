"""A report as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from launch.report_plots import Plot

# The page forbids its own reader to fetch anything: pictures are in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f2430; background: #f5f6f8;
       margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1180px; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .15rem; }
p { margin: .2rem 0; } .lead { color: #555b66; max-width: 60em; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .75rem; margin: 1.4rem 0; }
.tile, section { background: #fff; border: 1px solid #e2e5ea; border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; } .tile span { color: #666c77; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: .75rem; }
section p { color: #666c77; font-size: .88rem; } section img { width: 100%; height: auto; display: block; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: .75rem; margin-top: .75rem;
          align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
td { border-top: 1px solid #eceef2; padding: .22rem .4rem; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: #555b66; white-space: nowrap; } td:last-child { font-variant-numeric: tabular-nums; }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What a report says."""

    title: str
    lead: Sequence[str]
    """Sentences under the title."""
    tiles: Mapping[str, str]
    """The numbers one looks for first, by what they are."""
    plots: Sequence[Plot]
    tables: Mapping[str, Mapping[str, Any]]
    """Tables of two columns, by title."""

    def html(self) -> str:
        """Return the whole page."""
        return "\n".join([
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(self.title)}</title><style>{_CSS}</style></head><body>",
            f"<h1>{escape(self.title)}</h1>",
            *(f'<p class="lead">{escape(sentence)}</p>' for sentence in self.lead),
            '<div class="tiles">', *(_tile(name, value) for name, value in self.tiles.items()), "</div>",
            '<div class="plots">', *map(_picture, self.plots), "</div>",
            '<div class="tables">', *(_table(title, rows) for title, rows in self.tables.items()), "</div>",
            "</body></html>\n",
        ])  # fmt: skip


def _tile(name: str, value: str) -> str:
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _picture(plot: Plot) -> str:
    source = f"data:image/svg+xml;base64,{b64encode(plot.svg).decode()}"
    return (
        f'<section id="{escape(plot.name)}"><h2>{escape(plot.title)}</h2><p>{escape(plot.text)}</p>'
        f'<img alt="{escape(plot.title)}" src="{source}"></section>'
    )


def _table(title: str, rows: Mapping[str, Any]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_shown(value))}</td></tr>" for name, value in rows.items())
    return f"<section><h2>{escape(title)}</h2><table>{body}</table></section>"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
