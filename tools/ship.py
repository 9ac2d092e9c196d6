"""Make checkpoints/small from a run of `minimoe train`: bfloat16 weights, a Q8_0 file for llama.cpp, log, recipe, card.

    python tools/ship.py RUN          then experiments/10_checkpoint.py, then
    python tools/ship.py --card       writes the model card again, with that experiment's figures
"""
# ruff: noqa: E501 (the card is a text)
from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HERE = ROOT / "checkpoints" / "small"
FIGURES = ROOT / "results" / "10_checkpoint.json"
GGUF = "small-Q8_0.gguf"
SHARD = 14_000_000  # bytes
LARGEST = 48_000_000  # bytes in all

CARD = """\
---
license: apache-2.0
language: code
library_name: transformers
tags: [nemotron_h, mamba-2, mixture-of-experts, teaching]
---
# checkpoints/small: the model that the chapters work on

A Nemotron-H model of {parameters:.1f} million parameters ({trunk:.1f} million without the multi-token-prediction block). It has
learned the look of Python, little of its meaning, and {tasks} in chat form, with a thought before the answer or
without one. Use it to see how such a model is built, exported, quantized and made fast; for nothing else.

| | |
|---|---|
| architecture | preset `small` of `minimoe`: `MEM*ME`, width 512, 16 latent experts with 4 at work, MTP block `*E`, vocabulary 2,048 |
| weights | bfloat16 (trained in float32 with bfloat16 products), in safetensors files; `{gguf}` for llama.cpp |
{data}
| held out | {held_files} files of the standard library ({held_mb:.2f} MB), and one task question in twenty, by its hash |
| licence of the data | Python Software Foundation License (standard library); MIT, BSD, Apache-2.0 or PSF, package by package, in `src/minimoe/data/package_names.txt`. The texts themselves are not here |
| training | {steps:,} steps of {batch} windows of {length} tokens, {tokens:,} tokens; {hours:.1f} core-hours of CPU time on one thread, in resumed parts |
| held-out loss | {loss:.2f} nats a token, {bits:.2f} bits a byte |
| command | `{command}` |

`recipe.json` has the settings, the hashes of the data and the machine, `log.jsonl` a line a step (loss of a mixture: a window
of tasks costs less than one of code). The code became faster while this model was trained, so the command gives a model like this one and
not the same bits. {notes}To open it:

```python
from minimoe.interop import load_model
model, tokenizer = load_model("checkpoints/small")
```

or `transformers.AutoModelForCausalLM.from_pretrained("checkpoints/small")` (which drops the MTP block), or give `{gguf}`
to llama.cpp.
{figures}
**Limits.** Four kinds of task and no other instruction; no knowledge, no conversation of more than one turn. A context of
{length} tokens was trained, 16,384 is declared. The held-out files are of the same library and style as the training files, so the
loss says nothing about other code. Training was stopped by the clock, not by the loss: more of it would help.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--card", action="store_true", help="only write the card again")
    args = parser.parse_args()
    if not args.card:
        if not args.run or not (args.run / "model").is_dir():
            sys.exit("ship: give the directory of a finished run (it has a model/)")
        ship(args.run)
    (HERE / "README.md").write_text(card(), encoding="utf-8", newline="\n")
    size = sum(path.stat().st_size for path in HERE.iterdir())
    print(f"{HERE}: {size:,} bytes")
    return int(size > LARGEST)


def ship(run: Path) -> None:
    """Replace the checkpoint; it is made beside the old one and takes its place when it is whole."""
    import torch

    from minimoe.interop import load_model, save_gguf, save_hf

    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    if "validation_loss" not in recipe.get("result", {}):
        sys.exit(f"ship: {run} is not finished: its recipe has no validation loss")
    model, tokenizer = load_model(run)
    with tempfile.TemporaryDirectory(dir=HERE.parent, prefix=".small-") as folder:
        new = Path(folder) / "small"
        save_hf(model.to(torch.bfloat16), new, tokenizer, max_shard_bytes=SHARD)
        save_gguf(model.float(), new / GGUF, tokenizer, quant="Q8_0")
        shutil.copy(run / "log.jsonl", new)
        (new / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8", newline="\n")
        shutil.rmtree(HERE, ignore_errors=True)
        shutil.move(new, HERE)


def card() -> str:
    recipe = json.loads((HERE / "recipe.json").read_text(encoding="utf-8"))
    options, result, sources = recipe["options"], recipe["result"], recipe["sources"]
    held = sources[-1]
    return CARD.format(
        **_sizes(), gguf=GGUF, data="\n".join(map(_data_row, sources[:-1])), held_files=held["files"], held_mb=held["bytes"] / 1e6,
        steps=result["steps"], batch=options["batch"], length=options["length"], tokens=result["tokens"],
        hours=result["cpu_seconds"] / 3600, loss=result["validation_loss"], bits=result["bits_per_byte"],
        notes="".join(f"{note} " for note in recipe.get("notes", ())), command=_command(recipe), tasks=_tasks(), figures=_figures(),
    )  # fmt: skip


def _sizes() -> dict[str, float]:
    from minimoe import HybridConfig
    from minimoe.sizing import count_parameters

    config = HybridConfig.from_dict(json.loads((HERE / "config.json").read_text(encoding="utf-8")))
    count = count_parameters(config)
    return {"parameters": (count.total + count.mtp) / 1e6, "trunk": count.total / 1e6}


def _data_row(source: dict[str, Any]) -> str:
    what = f"{source['files']:,} files, {source['bytes'] / 1e6:.1f} MB, " if "files" in source else f"{source['examples']:,} examples, "
    return f"| data, {source['share']:.0%} of windows | {source['name']}: {what}{source['tokens']:,} tokens |"


def _command(recipe: dict[str, Any]) -> str:
    options = recipe["options"]
    data = " ".join(f"--data {source['name']}={source['share']:g}" for source in recipe["sources"][:-1])
    return (f"minimoe train --preset {recipe['preset']} --out run {data} --batch {options['batch']} --length {options['length']} "
            f"--steps {options['steps']} --decay {options['decay']:g} --lr {options['lr']:g} --seed {options['seed']}")


def _results() -> dict[str, Any]:
    if not FIGURES.exists():
        return {}
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def _tasks() -> str:
    shares = _results().get("numbers", {}).get("tasks", {})
    best = [name for name, both in shares.items() if max(both["with"]["share"], both["without"]["share"]) >= 0.8]
    return f"to solve small tasks ({', '.join(best)})" if best else "the form, not the content, of four kinds of task"


def _figures() -> str:
    rows = "\n".join(f"| {label} | {value} |" for label, value in _results().get("card", {}).items())
    return f"\nMeasured by `experiments/10_checkpoint.py`:\n\n| | |\n|---|---|\n{rows}\n" if rows else ""


if __name__ == "__main__":
    sys.exit(main())
