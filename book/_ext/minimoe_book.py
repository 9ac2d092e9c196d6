"""Small repairs to the pages, plain docstrings in the API reference, and checks that fail the strict build."""

from __future__ import annotations

import re
import textwrap

from sphinx.util import logging

log = logging.getLogger(__name__)
SECTION = re.compile(r"(Args|Arguments|Returns?|Raises|Yields|Parameters|Attributes):$")
ENTRY = re.compile(r"[\w.*]+(, [\w.*]+)*(\s*:\s+.*)?$")
FIELD = re.compile(r"(\w+(?:, \w+)*)\s{2,}(?=\S)")
ITEM = re.compile(r"([-*]|\d+\.) ")


def _inline(line: str) -> str:
    """Prose that only looks like reStructuredText: x_BLD, a * b and |x| are themselves; `code` is code."""
    line = re.sub(r"::$", ":", line)
    parts = re.split(r"(``[^`]+``|:\w+(?::\w+)*:`[^`]+`|`[^`]+`_{0,2})", line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part}`" if re.fullmatch(r"`[^`]+`", part) else part
        else:
            parts[i] = re.sub(r"(?<!\\)([*|`])", r"\\\1", re.sub(r"(\w)_(?=\W|$)", r"\1\\_", part))
    return "".join(parts)


def _entries(lines: list[str]) -> list[str]:
    """`name : text` (or `name: text`), with indented text below, as a definition list."""
    out: list[str] = []
    for line in textwrap.dedent("\n".join(lines)).splitlines():
        if line.startswith(" "):
            out.append("    " + _inline(line.strip()))
            continue
        name, text = (*re.split(r"\s*:\s+", line, maxsplit=1), "")[:2] if ENTRY.match(line) else (None, line)
        out += ["", f"``{name}``"] if name else [""]
        if text or not name:
            out.append(("    " if name else "") + _inline(text))
    return out


def plain_docstring(lines: list[str]) -> list[str]:
    """A docstring as readers of the source see it: paragraphs, lists, sections, indented formulas as they stand.

    Docstrings are plain text; two columns of names and texts, and numpy's and Google's section headings are understood, and a paragraph that starts with
    a directive (`.. math::`) or a table's rule is taken as reStructuredText.
    """
    out: list[str] = []
    in_section = directive = False
    for text in re.split(r"\n\s*\n", "\n".join(lines).strip("\n").expandtabs()):
        para = text.split("\n")
        first = len(para) > 1 and para[1].startswith(" ")
        numpy = len(para) > 1 and re.fullmatch(r"-{3,}", para[1].strip())
        out.append("")
        if para[0].startswith("=="):
            out += para  # a table
        elif para[0].startswith(".. "):
            out += para  # a directive, with what is indented below it
            directive = True
            continue
        elif directive and all(line.startswith(" ") for line in para):
            out += para
            continue
        elif numpy or SECTION.match(para[0]):
            out += [f".. rubric:: {para[0].rstrip(':')}", "", *_entries(para[2 if numpy else 1 :])]
            in_section = True
        elif FIELD.match(para[0]):  # `name    text` in two columns
            out += _entries([line if line.startswith(" ") else FIELD.sub(r"\1 : ", line, count=1) for line in para])
        elif in_section and ENTRY.match(para[0]) and (first or " : " in para[0]):
            out += _entries(para)
        elif all(line.startswith(" ") for line in para):
            out += ["::", "", *para]
            in_section = False
        else:
            in_section = False
            in_list = False
            for i, line in enumerate(para):
                in_list = bool(ITEM.match(line)) or in_list and line.startswith(" ")
                if line.startswith(" ") and not in_list:  # a formula under its sentence
                    if i and not para[i - 1].startswith(" "):
                        out += ["", "::", ""]
                    out.append(line)
                    continue
                before = para[i - 1] if i else ""
                if i and before.startswith(" ") != line.startswith(" ") and not in_list or ITEM.match(line) and before:
                    out.append("")
                mark = ITEM.match(line)
                out.append(mark.group(0) + _inline(line[mark.end() :]) if mark else _inline(line))
        directive = False
    return [*out, ""]


def docstring(app, what, name, obj, options, lines):
    lines[:] = plain_docstring(lines)


def _signature(match: re.Match) -> str:
    text = match.group(0).replace("<dl>", '<span class="mm-params">').replace("</dl>", "</span>")
    return text.replace("<dd>", '<span class="mm-param">').replace("</dd>", "</span>")


def page(app, pagename, templatename, context, doctree):
    body = context.get("body")
    if not body:
        return
    # docutils gives the bibliography a list role without list items, which screen readers stumble over
    body = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')
    body = body.replace(' role="doc-biblioentry"', "")
    # wide output and code scroll in their own box, so the box must be reachable by keyboard
    body = body.replace('<div class="highlight"><pre>', '<div class="highlight"><pre tabindex="0">')
    # a notebook's output links to notebooks, which are pages here
    body = re.sub(r'(<a href="[\w./-]+)\.ipynb"', r'\1.html"', body)
    # a signature over several lines is a list of definitions without terms
    body = re.sub(r'<dt class="sig.*?</dt>', _signature, body, flags=re.S)
    context["body"] = body
    for tag in re.findall(r"<img\b[^>]*>", body):
        alt = re.search(r'alt="([^"]*)"', tag)
        if alt is None or re.search(r"\.(png|svg|jpe?g|gif)$", alt.group(1)):
            log.warning("image without alt: %s", tag[:120], location=pagename, type="minimoe", subtype="alt")
    if "application/vnd.jupyter.widget-view+json" in body:
        log.warning("a widget without a static twin", location=pagename, type="minimoe", subtype="widget")


def setup(app):
    app.connect("html-page-context", page)
    app.connect("autodoc-process-docstring", docstring)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
