"""``{results-table}``: what stands under results/, and the machine, versions and commit behind each file."""
from __future__ import annotations

import json
import pathlib

from docutils import nodes
from docutils.parsers.rst import Directive


class ResultsTable(Directive):
    """A row for each committed experiment."""

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        files = sorted(pathlib.Path(env.srcdir, "results").glob("*.json"))
        if not files:
            return [self.state.document.reporter.warning("results/ holds no experiments", line=self.lineno)]
        body = nodes.tbody()
        for path in files:
            env.note_dependency(str(path))
            record = json.loads(path.read_text(encoding="utf-8"))
            machine = record.get("machine", {})
            name = machine.get("device_name", "unknown")
            cells = (path.stem, str(name), f"torch {machine.get('torch', '?')}", record.get("commit", "?"),
                     f"{record.get('wall_s', 0) / 60:.1f} min")
            body += nodes.row("", *(nodes.entry("", nodes.paragraph("", cell)) for cell in cells))
        titles = ("experiment", "machine", "with", "commit", "took")
        head = nodes.thead("", nodes.row("", *(nodes.entry("", nodes.paragraph("", t)) for t in titles)))
        group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in titles), head, body, cols=len(titles))
        return [nodes.table("", group)]


def setup(app) -> dict[str, object]:
    app.add_directive("results-table", ResultsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
