"""A collection as Markdown, LaTeX and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from rsb_cluster.collect.cells import COLUMNS, WORDS, cells, remarks
from rsb_cluster.collect.groups import Collection

# What a page of a paper has room for.
LATEX_COLUMNS = ("recipe", "model", "n", "top-1", "min–max", "seed 0", "paper", "timm", "delta", "verdict", "GPU-hours")

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
}


def markdown(collection: Collection) -> str:
    """Return a table of GitHub's Markdown, and lists."""

    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"

    lines = [line(COLUMNS), line([":--" if name in WORDS else "--:" for name in COLUMNS])]
    lines += [line([cells(group)[name] for name in COLUMNS]) for group in collection.groups]
    for heading, below in remarks(collection).items():
        lines += ["", f"{heading}:", "", *(f"- {remark}" for remark in below)]
    return "\n".join(lines) + "\n"


def latex(collection: Collection) -> str:
    r"""Return a ``tabular`` that needs ``\usepackage{booktabs}`` (and textcomp's signs), and lists."""
    columns = "".join("l" if name in WORDS else "r" for name in LATEX_COLUMNS)
    lines = [
        r"% \usepackage{booktabs}  \usepackage[T1]{fontenc}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_tex, LATEX_COLUMNS)) + r" \\",
        r"\midrule",
    ]
    for group in collection.groups:
        texts = {name: _tex(text) for name, text in cells(group).items()}
        texts["delta"] = f"${texts['delta']}$" if texts["delta"] else ""  # a minus, and no hyphen
        lines.append(" & ".join(texts[name] for name in LATEX_COLUMNS) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    for heading, below in remarks(collection).items():
        lines += ["", rf"\paragraph{{{_tex(heading)}}}", r"\begin{itemize}"]
        lines += [rf"  \item {_tex(remark)}" for remark in below]
        lines += [r"\end{itemize}"]
    return "\n".join(lines) + "\n"


def html(collection: Collection) -> str:
    """Return a page of its own without scripts."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files(__package__) / "table.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        columns=COLUMNS,
        words=WORDS,
        groups=[(group, cells(group)) for group in collection.groups],
        remarks=remarks(collection),
    )
    return page.rstrip("\n") + "\n"


def _tex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)
