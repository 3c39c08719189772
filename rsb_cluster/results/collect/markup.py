"""A collection as Markdown, LaTeX and HTML."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from rsb_cluster.results.collect.cells import COLUMNS, TEXT_COLUMNS, cells, remarks
from rsb_cluster.results.collect.collection import Collection
from rsb_cluster.results.collect.evaluation_cells import (
    EVALUATION_COLUMNS,
    EVALUATION_TEXT_COLUMNS,
    evaluation_cells,
    evaluation_remarks,
)

# The columns that fit a page of a paper.
LATEX_COLUMNS = (
    *("recipe", "weights", "model", "data", "labels", "metric", "n", "top-1", "%", "min–max", "seed 0"),
    *("paper", "published", "timm", "delta", "verdict", "GPU-hours"),
)

LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\dots{}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",  # after the end of a row it would belong to that
}
# What GitHub's Markdown would take for an emphasis, code, a link, HTML, mathematics or the end of a cell. An underscore
# within a word is none of these.
_MARKDOWN = re.compile(r"[\\`*<\[|~$]|&(?=#?\w+;)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


@dataclass(frozen=True)
class _Part:
    """A table: its columns, which of them are text (left-aligned), its rows, and the remarks below it."""

    columns: Sequence[str]
    text_columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    remarks: Mapping[str, Sequence[str]]


def _parts(collection: Collection) -> list[_Part]:
    """Return the table of runs, and that of evaluations if there are any."""
    parts = [_Part(COLUMNS, TEXT_COLUMNS, [cells(group) for group in collection.groups], remarks(collection))]
    below = evaluation_remarks(collection)
    if collection.evaluations or below:
        rows = [evaluation_cells(line) for line in collection.evaluations]
        parts.append(_Part(EVALUATION_COLUMNS, EVALUATION_TEXT_COLUMNS, rows, below))
    return parts


def markdown(collection: Collection) -> str:
    """Return tables in GitHub's Markdown, and lists of remarks."""

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(map(_md, texts))} |"

    lines: list[str] = []
    for part in _parts(collection):
        columns = part.columns
        lines += ["", line(columns), line([":--" if name in part.text_columns else "--:" for name in columns])]
        lines += [line([row[name] for name in columns]) for row in part.rows]
        for heading, below in part.remarks.items():
            lines += ["", f"{heading}:", "", *(f"- {_md(remark)}" for remark in below)]
    return "\n".join(lines[1:]) + "\n"


def latex(collection: Collection) -> str:
    r"""Return a ``tabular`` that needs ``\usepackage{booktabs}`` (and textcomp's symbols), and lists of remarks."""
    lines = [r"% \usepackage{booktabs}  \usepackage[T1]{fontenc}"]
    for part in _parts(collection):
        columns = [name for name in part.columns if name in LATEX_COLUMNS]
        lines += [
            *([""] if len(lines) > 1 else []),
            rf"\begin{{tabular}}{{{''.join('l' if name in part.text_columns else 'r' for name in columns)}}}",
            r"\toprule",
            " & ".join(map(_tex, columns)) + r" \\",
            r"\midrule",
        ]
        for row in part.rows:
            texts = {name: _tex(text) for name, text in row.items()}
            texts["delta"] = f"${texts['delta']}$" if texts["delta"] else ""  # a minus sign instead of a hyphen
            lines.append(" & ".join(texts[name] for name in columns) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        for heading, below in part.remarks.items():
            lines += ["", rf"\paragraph{{{_tex(heading)}}}", r"\begin{itemize}"]
            lines += [rf"  \item {_tex(remark)}" for remark in below]
            lines += [r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def html(collection: Collection) -> str:
    """Return a self-contained page without scripts."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "table.html.jinja").read_text(encoding="utf-8"))
    page = template.render(parts=_parts(collection))
    return page.rstrip("\n") + "\n"


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


def _tex(text: str) -> str:
    # Two hyphens would become a dash, as in '--mean'; the dashes of the text are signs of their own.
    pairs = itertools.zip_longest(text, text[1:])
    return "".join("-{}" if sign == after == "-" else LATEX.get(sign, sign) for sign, after in pairs)
