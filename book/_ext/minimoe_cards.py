"""``{reader-cards}``: the machines under results/cards/, the newest first. A card that cannot be read fails the build."""
from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from docutils import nodes
from minimoe_results import table
from sphinx.util.docutils import SphinxDirective

from minimoe.bench import cards
from minimoe.bench.table import value

MEMORY = ("memory_gpu_process", "memory_cuda_reserved", "memory_resident")  # the first one that a card has
Card = Mapping[str, Any]
Row = Mapping[str, Any]


class ReaderCards(SphinxDirective):
    """A sentence that says how many there are, a table of the devices, and a section for each card."""

    def run(self) -> list[nodes.Node]:
        folder = pathlib.Path(self.env.srcdir, "results", "cards")
        try:
            found = [cards.read(path) for path in sorted(folder.glob("*.json"))]
        except cards.CardError as error:
            raise self.error(f"results/cards: {error}") from None
        for path in folder.glob("*.json"):
            self.env.note_dependency(str(path))
        found.sort(key=lambda card: card["date"], reverse=True)
        counted = ("There is no card yet: yours would be the first." if not found else
                   "There is one card so far: yours would be the second." if len(found) == 1 else
                   f"There are {len(found)} cards.")  # fmt: skip
        made: list[nodes.Node] = [nodes.paragraph("", counted)]
        if len(found) > 1:
            made.append(overview(found))
        return made + [self.section(card) for card in found]

    def section(self, card: Card) -> nodes.section:
        title = f"{device_name(card)}, {card['date']}"
        made = nodes.section("", nodes.title("", title), ids=[ident(card)], names=[nodes.fully_normalize_name(ident(card))])
        self.state.document.note_explicit_target(made, made)
        made += [nodes.paragraph("", about(card)), device(card)]
        if card["rows"]:
            made += rates(card)
        made += nodes.paragraph("", "", nodes.Text("The file: "), nodes.literal("", f"results/cards/{card['name']}.json"))
        return made


def ident(card: Card) -> str:
    return nodes.make_id(f"card-{card['name']}")


def device_name(card: Card) -> str:
    return str(card["machine"].get("device_name") or card["machine"].get("device") or card["name"])


def about(card: Card) -> str:
    """The machine and the versions, in a sentence each."""
    machine = card["machine"]
    parts = [machine.get("os"), machine.get("cpu") if machine.get("device") != "cpu" else None,
             f"{machine['cores']} cores" if machine.get("cores") else None,
             f"{machine['memory_bytes'] / 1e9:.0f} GB of memory" if machine.get("memory_bytes") else None,
             f"driver {machine['driver']}" if machine.get("driver") else None]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    rounds, repeats = card["settings"].get("rounds"), card["settings"].get("repeats")
    often = f" Rounds: {rounds}, repeats in each: {repeats}." if rounds and repeats else ""
    return f"{', '.join(map(str, filter(None, parts)))}. Measured with {versions}, commit {card['commit']}.{often}"


def overview(found: Iterable[Card]) -> nodes.table:
    """A row a machine, with a link to its section."""
    rows = []
    for card in found:
        link = nodes.reference("", device_name(card), internal=True, refid=ident(card))
        best = max((rate.get("flop_per_second") or 0 for rate in card["matmul"].values()), default=0)
        rows.append((link, card["date"], *bandwidths(card), flops(best or None), *fastest(card)))
    return table(("machine", "date", "reads", "copies", "multiplies", "writes at most"), rows)


def fastest(card: Card) -> tuple[str]:
    """The highest rate at which a model wrote single tokens, and which model that was."""
    best = max((row for row in card["rows"] if row["test"].startswith("tg") and "median" in row and row["batch"] == 1),
               key=lambda row: row["median"], default=None)  # fmt: skip
    return (f"{value(best['median'], best['unit'])} ({best['model']}, {best['runtime']})" if best else "-",)


def device(card: Card) -> nodes.table:
    """Bandwidths and products; on a CPU a row for each number of threads."""
    parts: dict[str, Card] = {device_name(card): card}
    if card["machine"].get("device") == "cpu" and card["cpu_threads"]:
        parts = {threads(int(number)): rates for number, rates in card["cpu_threads"].items()}
    elif card["cpu_threads"]:
        number, rates_ = list(card["cpu_threads"].items())[-1]
        parts[f"its CPU, {threads(int(number))}"] = rates_
    dtypes = list(dict.fromkeys(dtype for part in parts.values() for dtype in part["matmul"]))
    rows = []
    for name, part in parts.items():
        products = (flops(part["matmul"].get(dtype, {}).get("flop_per_second")) for dtype in dtypes)
        launch = part["launch_latency_s"]
        rows.append((name, *bandwidths(part), *products, f"{launch * 1e6:.3g} µs" if launch else "-"))
    return table(("on", "reads", "copies", *dtypes, "smallest call"), rows)


def rates(card: Card) -> nodes.table:
    """A row for each model in each program: what it read and wrote in a second, and its share of the ceiling."""
    names = ("model", "format", "runtime", "threads", "gpu_layers", "cpu_moe", "depth", "batch")
    speeds = [row for row in card["rows"] if row["unit"] == "tokens/s"]
    tests = list(dict.fromkeys(row["test"] for row in speeds))
    rows = []
    for key in dict.fromkeys(tuple(row.get(name) for name in names) for row in speeds):
        found = {row["test"]: row for row in speeds if tuple(row.get(name) for name in names) == key}
        has = dict(zip(names, key))
        what = [f"{has['model']} {has['format']}" if has["format"] not in has["model"] else has["model"]]
        what += [f"experts of {has['cpu_moe']} blocks in RAM"] if has["cpu_moe"] else []
        what += [f"after {has['depth']:,} tokens"] if has["depth"] else []
        what += [f"{has['batch']} at once"] if has["batch"] > 1 else []
        cells = (speed(found[test]) if test in found else "" for test in tests)
        rows.append((", ".join(what), has["runtime"], str(has["threads"]), *cells, memory(card, has)))
    return table(("model", "program", "threads", *tests, "most memory"), rows)


def speed(row: Row) -> str:
    if "median" not in row:
        return "refused" if "refused" in row else "not measured"
    share = f", {row['share']:.0%}" if row.get("share", 0) >= 0.1 else f", {row['share']:.1%}" if "share" in row else ""
    return value(row["median"], row["unit"]) + share


def memory(card: Card, has: Mapping[str, Any]) -> str:
    same = [row for row in card["rows"] if "median" in row
            and all(row.get(name) == has[name] for name in ("model", "format", "runtime", "threads", "cpu_moe"))]  # fmt: skip
    found = {row["test"]: row for row in same}
    return next((value(found[name]["median"], "bytes") for name in MEMORY if name in found), "")


def bandwidths(rates_: Mapping[str, Any]) -> tuple[str, str]:
    found = rates_["bandwidth"]
    names = ("read_bytes_per_second", "copy_bytes_per_second")
    return tuple("not measured" if "missing" in found else f"{found[name] / 1e9:,.1f} GB/s" for name in names)


def flops(rate: float | None) -> str:
    if not rate:
        return "-"
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:,.0f} GFLOP/s"


def threads(number: int) -> str:
    return f"{number} thread{'s' * (number != 1)}"


def setup(app) -> dict[str, object]:
    app.add_directive("reader-cards", ReaderCards)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
