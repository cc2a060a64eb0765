"""Pages of facts, tables and intervals, written as Markdown and as HTML; what comes from data can't become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

#: Characters that mean something in Markdown, or begin HTML in it.
_MARKDOWN_SIGNS = re.compile(r"([\\`*_{}\[\]<>|#~&!])")
#: What renderers make a link of by themselves, whatever is escaped: addresses of the web and of mail.
_ADDRESS_BEGINNINGS = re.compile(
    r"(?i)(?<=http:)(?=//)|(?<=https:)(?=//)|(?<=www)(?=\.)|(?=@)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)"
)
#: Joins words without being seen.
_WORD_JOINER = "\N{WORD JOINER}"
#: White space, control characters, and marks that turn the direction of text around.
_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")

#: Longest value a page shows.
_CHARACTERS = 600

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881;
  --good: light-dark(#1a7f4b, #4cc38a); --bad: light-dark(#c0392b, #ff7b72); --unknown: light-dark(#9a6700, #d29922); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } h2 { margin: 2rem 0 .5rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); }
p.lead { font-size: 1.1rem; margin-top: 0; } p, dd { overflow-wrap: anywhere; } td { overflow-wrap: anywhere; min-width: 4.5rem; }
dl { display: grid; grid-template-columns: minmax(9rem, max-content) 1fr; gap: .2rem 1.5rem; }
dt { opacity: .7; } dd { margin: 0; }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; display: block; overflow-x: auto; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } svg { display: block; margin: .8rem 0; max-width: 100%; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; } svg line { stroke: currentColor; } svg circle { fill: currentColor; }
.verdict { display: inline-block; border: 1px solid; border-radius: 1rem; padding: 0 .7rem; font-weight: 600; }
.promote, .passed { color: var(--good); } .reject, .failed { color: var(--bad); } .no_verdict, .quarantined { color: var(--unknown); }
@media (max-width: 40rem) {
  body { margin: 1rem auto; } dl { display: block; } dt { margin-top: .5rem; }
  table, tbody, tr, td { display: block; } thead { display: none; } tr { border-bottom: 1px solid var(--line); padding: .4rem 0; }
  td { border: 0; padding: .1rem 0; } td:empty { display: none; }
  td::before { content: attr(data-label) ": "; opacity: .7; }
}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as text.

    :param header: names of the columns.
    :param rows: each as long as the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A number with its interval, drawn as a dot on a line."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One part of a card.

    :param title: its heading.
    :param facts: label and value.
    :param notes: sentences.
    :param tables: title and table.
    :param intervals: drawn in HTML; Markdown has them in a table.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    intervals: tuple[Interval, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.facts or self.notes or self.tables)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """A page, ready to be written. Its texts are plain: both writers escape them.

    :param title: its heading.
    :param lead: what it says, in a sentence.
    :param verdict: shown as a badge; ``None``: there is none.
    :param sections: its parts, the most important first.
    """

    title: str
    lead: str
    verdict: str | None
    sections: tuple[Section, ...]

    def to_markdown(self, maximum: int | None = None) -> str:
        """Write Markdown.

        :param maximum: most characters; whole sections are left out at the end, and it is said.
        """
        parts = [f"# {markdown(self.title)}\n\n{markdown(self.lead)}\n"]
        parts += [section_markdown(section) for section in self.sections]
        text = "\n".join(parts)
        if maximum is None or len(text) <= maximum:
            return text
        rest = "\nThe rest is with the run's artifacts.\n"
        while len(parts) > 1 and len("\n".join(parts)) + len(rest) > maximum:
            parts.pop()
        return ("\n".join(parts)[: maximum - len(rest)] + rest)[:maximum]

    def to_html(self) -> str:
        """Write one HTML page that loads nothing and runs nothing."""
        badge = (
            f'<p><span class="verdict {_html_class(self.verdict)}">{_html(self.verdict)}</span></p>'
            if self.verdict
            else ""
        )
        body = "\n".join(_section_html(section) for section in self.sections)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_html(self.title)}</title>\n<style>{_STYLE}</style></head>\n"
            f'<body><h1>{_html(self.title)}</h1>\n<p class="lead">{_html(self.lead)}</p>\n{badge}\n{body}\n</body></html>\n'
        )


def _plain(text: str) -> str:
    """Bring a text onto one line, without signs that can't be seen, and to a length one can read."""
    line = _UNPRINTABLE.sub(" ", str(text)).strip()
    return line if len(line) <= _CHARACTERS else f"{line[: _CHARACTERS - 1]}…"


def markdown(text: str) -> str:
    r"""Escape for Markdown, also in a table; an address stays text.

    >>> markdown("<b>[x](y)|")
    '\\<b\\>\\[x\\](y)\\|'
    """
    return _ADDRESS_BEGINNINGS.sub(_WORD_JOINER, _MARKDOWN_SIGNS.sub(r"\\\1", _plain(text)))


def _html(text: str) -> str:
    """Escape for HTML, also in an attribute.

    >>> _html("<b title='x'>")
    '&lt;b title=&#x27;x&#x27;&gt;'
    """
    return html.escape(_plain(text), quote=True)


def link_address(url: str) -> str:
    """Escape an address for a Markdown link."""
    return quote(_plain(url), safe=":/?#[]@!$&*+,;=%~")


def _html_class(verdict: str) -> str:
    return verdict if re.fullmatch(r"[a-z_]+", verdict) else "no_verdict"


def section_markdown(section: Section) -> str:
    """Write a section as Markdown."""
    lines = [f"## {markdown(section.title)}", ""]
    lines += [f"* {markdown(label)}: {markdown(value)}" for label, value in section.facts]
    lines += [f"* {markdown(note)}" for note in section.notes]
    for title, table in section.tables:
        lines += [*([""] if lines[-1] else []), f"**{markdown(title)}**", ""]
        lines += [_row(table.header), _row(["---"] * len(table.header), raw=True)]
        lines += [_row(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    return f"| {' | '.join(cell if raw else markdown(cell) for cell in cells)} |"


def _section_html(section: Section) -> str:
    parts = [f"<section><h2>{_html(section.title)}</h2>"]
    if section.facts:
        parts.append(
            f"<dl>{''.join(f'<dt>{_html(label)}</dt><dd>{_html(value)}</dd>' for label, value in section.facts)}</dl>"
        )
    parts.append(_drawing(section.intervals))
    if section.notes:
        parts.append(f"<ul>{''.join(f'<li>{_html(note)}</li>' for note in section.notes)}</ul>")
    for title, table in section.tables:
        header = "".join(f"<th>{_html(cell)}</th>" for cell in table.header)
        rows = "".join(f"<tr>{_cells(table.header, row)}</tr>" for row in table.rows)
        parts.append(
            f"<h3>{_html(title)}</h3><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
        )
    return "".join([*parts, "</section>"])


def _cells(header: Sequence[str], row: Sequence[str]) -> str:
    """Write a row; on a phone, where a table has no room, each cell says itself what it is."""
    return "".join(
        f'<td data-label="{_html(label)}">{_html(cell)}</td>' for label, cell in zip(header, row, strict=True)
    )


def _drawing(intervals: Sequence[Interval]) -> str:
    """Draw each interval as a line with a dot, on one scale."""
    if not intervals:
        return ""
    low, high = min(item.low for item in intervals), max(item.high for item in intervals)
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(130 + 380 * (value - low) / width, 1)

    rows = "".join(
        f'<text x="0" y="{y + 5}">{_html(item.label)}</text>'
        f'<line x1="{place(item.low)}" x2="{place(item.high)}" y1="{y}" y2="{y}" stroke-width="2"/>'
        f'<circle cx="{place(item.value)}" cy="{y}" r="4"/>'
        f'<text x="530" y="{y + 5}">{_html(f"{item.value:.4g}")}</text>'
        for y, item in ((16 + 24 * index, item) for index, item in enumerate(intervals))
    )
    height = 24 * len(intervals) + 8
    return f'<svg role="img" aria-label="Intervals" viewBox="0 0 620 {height}" width="620" height="{height}">{rows}</svg>'
