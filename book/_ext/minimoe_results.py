"""``{results-table}``: what stands under results/, and the machine, versions and commit behind each file."""
from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Sequence

from docutils import nodes
from docutils.parsers.rst import Directive


def table(titles: Sequence[str], rows: Iterable[Sequence[str | nodes.Node]]) -> nodes.table:
    """A table of texts, or of nodes that stand in a paragraph."""
    body = nodes.tbody()
    for row in rows:
        cells = (nodes.paragraph("", "", nodes.Text(cell) if isinstance(cell, str) else cell) for cell in row)
        body += nodes.row("", *(nodes.entry("", cell) for cell in cells))
    head = nodes.thead("", nodes.row("", *(nodes.entry("", nodes.paragraph("", title)) for title in titles)))
    return nodes.table("", nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in titles), head, body, cols=len(titles)))


class ResultsTable(Directive):
    """A row for each committed experiment."""

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        files = sorted(pathlib.Path(env.srcdir, "results").glob("*.json"))
        if not files:
            return [self.state.document.reporter.warning("results/ holds no experiments", line=self.lineno)]
        rows = []
        for path in files:
            env.note_dependency(str(path))
            record = json.loads(path.read_text(encoding="utf-8"))
            machine = record.get("machine", {})
            name = machine.get("device_name", "unknown")
            rows.append((path.stem, str(name), f"torch {machine.get('torch', '?')}", record.get("commit", "?"),
                         f"{record.get('wall_s', 0) / 60:.1f} min"))
        return [table(("experiment", "machine", "with", "commit", "took"), rows)]


def setup(app) -> dict[str, object]:
    app.add_directive("results-table", ResultsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
