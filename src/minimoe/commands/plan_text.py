"""What ``minimoe plan`` says, for people: the answer, the quants, what goes where, the command, the files."""
from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..catalog import GGUFFile
from ..catalog.hardware import GIB
from ..sizing.fit import HOST_RESERVE, Plan
from .plan_machine import Machine

WIDTH = 104
LABELS = {
    "weights": "weights", "kv": "keys and values", "states": "recurrent states",
    "compute": "compute buffer (estimate)", "reserve": "reserve (estimate)", "experts": "routed experts",
    "embedding": "embedding",
}  # fmt: skip


def text(
    made: Sequence[Plan], chosen: Plan | None, machine: Machine, files: Sequence[GGUFFile], context: int | None, claimed: int | None
) -> str:
    """The whole answer, at most 104 columns wide; ``context``: the longest that the model declares, or its makers claim."""
    shown = chosen or made[-1]
    parts = [_heading(made[0], machine), _answer(made, chosen), _table(made, chosen), _places(shown), _speed(shown, machine)]
    if chosen:
        parts.append(_command(chosen))
    if files:
        parts.append(_files(files))
    notes = [*machine.notes, *(machine.ram_notes if any(one.ram_blocks for one in made) else ())]
    parts.append("\n".join(_wrap(note) for note in (*notes, *_legend(made, context, claimed))))
    return "\n\n".join(part for part in parts if part)


def _heading(one: Plan, machine: Machine) -> str:
    device, kind = machine.device, "memory" if machine.device.unified else "VRAM"
    ram = f", {_gb(machine.ram_bytes)} of RAM" if machine.ram_bytes else ""
    batch = f"{one.batch} sequences of " if one.batch > 1 else "a context of "
    size = f"{device.memory_bytes / GIB:.4g} GiB of {kind} ({_gb(device.memory_bytes)}){ram}"
    return f"{one.model} on {device.name}: {size}, {batch}{one.context:,} tokens"


def _answer(made: Sequence[Plan], chosen: Plan | None) -> str:
    lines = []
    if chosen is None:
        lines.append(f"It does not fit. {_needed(made)}")
    elif chosen.fits == "whole":
        lines.append(f"It fits: {chosen.quant}, {_gb(chosen.weights.total)}, with {_gb(chosen.headroom)} to spare{_most(chosen)}.")
    else:
        lines.append(
            f"It runs split between GPU and RAM: {chosen.quant}, {_gb(chosen.weights.total)}, of which "
            f"{_gb(chosen.vram['weights'])} go to VRAM and {_gb(sum(chosen.ram.values()))} to RAM{_most(chosen)}."
        )
        if chosen.ram_bytes is None:
            needed = _gb(sum(chosen.ram.values()) + HOST_RESERVE)
            lines.append(f"With {_gb(HOST_RESERVE)} for the system (an estimate) that takes {needed} of RAM; --ram GIB checks yours.")
    if chosen and chosen.weights.bits_per_weight < 4 and len(made) > 1:
        lines.append(f"Nothing of four bits a weight or more fits. {_needed(made, smallest=False)}")
    return "\n".join(_wrap(line) for line in lines + _small(made))


def _most(one: Plan) -> str:
    return f"; at most {_pace(one)} tokens/s" if one.ceiling else ""


def _needed(made: Sequence[Plan], smallest: bool = True) -> str:
    """What it would take: for the smallest quant of all, and for the smallest of four bits or more."""
    wanted = {min(made, key=lambda one: one.weights.total).quant: "the smallest"} if smallest else {}
    four = [one for one in made if one.weights.bits_per_weight >= 4]
    if four and len(made) > 1:
        wanted.setdefault(min(four, key=lambda one: one.weights.total).quant, "the smallest of four bits")
    said = []
    for one in made:
        if one.quant not in wanted:
            continue
        label = f"{one.quant} ({wanted[one.quant]}, {_gb(one.weights.total)})" if len(made) > 1 else one.quant
        if one.device.unified or not one.expert_blocks:
            said.append(f"{label} needs {_gb(sum(one.vram.values()))}")
        else:
            said.append(f"{label} needs {_gb(sum(one.vram.values()))} of VRAM with the experts of {len(one.ram_blocks)} of "
                        f"{len(one.expert_blocks)} blocks in RAM, and {_gb(sum(one.ram.values()) + HOST_RESERVE)} of RAM")  # fmt: skip
    return "; ".join(reversed(said)) + "."


def _small(made: Sequence[Plan]) -> list[str]:
    """Why no small quant exists, if none does: rows that no block divides."""
    smallest = min(made, key=lambda one: one.weights.total)
    fell = smallest.fallback
    if fell.bytes < 1.15 * fell.intended_bytes:
        return []
    rows = " and ".join(f"{columns:,}" for columns in _main_rows(smallest))
    because = (f"because {fell.share:.0%} of its bytes are in tensors with rows of {rows} numbers. The small types come in blocks "
               "of 256, which do not divide these rows, so llama.cpp falls back to wider types.")  # fmt: skip
    bits = f"{_gb(fell.bytes)} ({smallest.weights.bits_per_weight:.1f} bits a weight)"
    intended = f"instead of {_gb(fell.intended_bytes)}"
    if len(made) > 1 and smallest.weights.bits_per_weight >= 4:
        return [f"No small quant exists: even {smallest.quant}, the smallest, is {bits} {intended}, {because}"]
    word = "The small quants are larger than their names say: " if len(made) > 1 else ""
    return [f"{word}{smallest.quant} is {bits} {intended}, {because}"]


def _main_rows(one: Plan) -> list[int]:
    """Row lengths that hold most of what fell back, in the order of their bytes."""
    sizes: dict[int, int] = {}
    for tensor in one.weights.fallbacks:
        sizes[tensor.columns] = sizes.get(tensor.columns, 0) + tensor.bytes
    return sorted((rows for rows in sizes if sizes[rows] > 0.1 * sum(sizes.values())), key=lambda rows: -sizes[rows])


def _table(made: Sequence[Plan], chosen: Plan | None) -> str:
    speed = any(one.ceiling for one in made)
    unified = made[0].device.unified
    unit, size = _unit(made[0])
    lines = [f"  {'quant':<11}{unit:>8}{'bits a':>8}  {'':<27}{'memory' if unified else 'VRAM':>8}{'' if unified else 'RAM':>8}"
             f"{'longest':>11}{'at most' if speed else '':>9}{'fell':>7}",
             f"  {'':<11}{'':>8}{'weight':>8}  {'fits':<27}{unit:>8}{'' if unified else unit:>8}{'context':>11}"
             f"{'t/s' if speed else '':>9}{'back':>7}"]  # fmt: skip
    for one in made:
        fits = {"whole": "yes", "no": "no", "split": f"{len(one.ram_blocks)} of {len(one.expert_blocks)} MoE blocks in RAM"}[one.fits]
        ram = "" if unified else f"{sum(one.ram.values()) / size:.1f}"
        most = _pace(one) if one.ceiling and one.fits != "no" else ""
        fell = f"{one.fallback.share:.0%}" if one.fallback.share >= 0.005 else ""
        longest = f"{one.max_context:,}" if one.max_context and one.fits != "no" else ""
        lines.append(
            f"{'*' if one is chosen else ' '} {one.quant + ('†' if one.weights.needs_importance else ''):<11}"
            f"{one.weights.total / size:>8.2f}{one.weights.bits_per_weight:>8.2f}  {fits:<27}"
            f"{sum(one.vram.values()) / size:>8.1f}{ram:>8}{longest:>11}{most:>9}{fell:>7}".rstrip()
        )
    return "\n".join(lines)


def _places(one: Plan) -> str:
    lines = [f"{one.quant}, what goes where" + ("" if one.fits != "no" else ", if it had the room"), *map(_wrap, one.why)]
    unit = _unit(one)
    tokens = f"{f'{one.batch} x ' if one.batch > 1 else ''}{one.context:,} tokens, {one.kv_dtype}"
    lines += _parts("memory" if one.device.unified else "VRAM", _merged(one.vram), {"kv": tokens}, unit)
    lines.append(f"{'':9}{'free' if one.headroom >= 0 else 'missing':<30}{abs(one.headroom) / unit[1]:>8,.2f} {unit[0]}")
    lines += _parts("RAM", one.ram, {"experts": f"blocks {', '.join(map(str, one.ram_blocks))}"}, unit)
    if one.fits != "no":
        longest = f"The longest context that fits: {one.max_context:,} tokens"
        if one.ram_blocks and one.longest_context > one.max_context:
            longest += f" with this split, {one.longest_context:,} with the routed experts of all blocks in RAM"
        lines.append(_wrap(longest + "."))
    return "\n".join(lines)


def _merged(sizes: dict[str, int]) -> dict[str, int]:
    """SSM states and convolution windows in one line: neither grows with the context."""
    merged: dict[str, int] = {}
    for name, size in sizes.items():
        key = "states" if name in ("ssm", "conv") else name
        merged[key] = merged.get(key, 0) + size
    return merged


def _unit(one: Plan) -> tuple[str, float]:
    """GB, or MB for models as small as this book's own."""
    return ("GB", 1e9) if one.weights.total >= 5e8 else ("MB", 1e6)


def _parts(place: str, sizes: dict[str, int], remarks: dict[str, str], unit: tuple[str, float]) -> list[str]:
    lines = []
    for name, size in sizes.items():
        if size:
            remark = f"  {remarks[name]}" if name in remarks else ""
            line = f"  {place if not lines else '':<7}{LABELS[name]:<30}{size / unit[1]:>8,.2f} {unit[0]}{remark}"
            lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 52, drop_whitespace=True, replace_whitespace=False)
    return lines


def _speed(one: Plan, machine: Machine) -> str:
    """The ceiling, taken apart."""
    ceiling = one.ceiling
    if ceiling is None:
        return ""
    device, (unit, size) = one.device, _unit(one)

    def moved(name: str, place: str, rate: float, origin: str) -> str:
        much = sum(getattr(ceiling.traffic, name).values()) / size
        return f"{much:.3g} {unit}{place} at {rate / 1e9:.4g} GB/s ({origin}): {1000 * ceiling.parts[name]:.3g} ms"

    said = moved("vram", "", device.bytes_per_second or 0, device.origin)
    if ceiling.parts.get("ram", 0) * 100 > ceiling.seconds and machine.ram:
        said += ", and " + moved("ram", " from RAM", machine.ram.bytes_per_second, f"{machine.ram.name}, {machine.ram.origin}")
    step = "a token" if one.batch == 1 else f"a step of {one.batch} tokens"
    return _wrap(f"Speed: {step} moves {said}. That makes at most {_pace(one)} tokens/s: a "
                 "ceiling, not a prediction, since no program reaches these bandwidths.")  # fmt: skip


def _command(one: Plan) -> str:
    lines = [f"llama-server -m FILE {' '.join(one.flags)}"]
    if one.n_cpu_moe and "--n-cpu-moe" in one.flags:
        lines += ["", _wrap(f"--n-cpu-moe {one.n_cpu_moe} counts blocks 0 to {one.n_cpu_moe - 1}, of which {len(one.ram_blocks)} have "
                            "routed experts. A lower -ngl would take whole blocks off the GPU instead, Mamba among them.")]  # fmt: skip
    return "\n".join(lines)


def _files(files: Sequence[GGUFFile]) -> str:
    lines = ["published files"]
    for file in files:
        size = f"{file.size / 1e9:.2f} GB" if file.size else "size unknown"
        what = {"only": ", MTP block only", True: ", with MTP block"}.get(file.mtp, "")
        recipe = "" if file.recipe == "default" else f", {file.recipe} recipe"
        lines.append(f"  {file.quant:<12}{size:>13}  {file.repo}{what}{recipe}")
    return "\n".join(lines)


def _legend(made: Sequence[Plan], context: int | None, claimed: int | None) -> list[str]:
    lines = []
    if context:
        said = f"{context:,} tokens" + (f" (its makers claim {claimed:,})" if claimed and claimed > context else "")
        lines.append(f"The longest contexts are what memory allows; the model declares {said}.")
    lines.append("GB are 1e9 bytes, MB 1e6; of files, the tensors without the header (some MB). *: to begin with. Fell back: share "
                 "of the bytes in another type than the quant's, because of their rows.")  # fmt: skip
    if any(one.weights.needs_importance for one in made):
        lines.append("†: llama.cpp makes it with an importance matrix only.")
    return lines


def _gb(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _pace(one: Plan) -> str:
    """Tokens a second, in three digits."""
    rate = one.ceiling.tokens_per_second if one.ceiling else 0.0
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _wrap(line: str) -> str:
    return textwrap.fill(line, WIDTH, break_on_hyphens=False, break_long_words=False)
