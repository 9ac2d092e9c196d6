"""Which machine this is, for tools/gpu_parts.py: what is installed, and a reader card as `minimoe bench` makes it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import types
from collections.abc import Mapping
from typing import Any

from gpu_shared import Report, Trouble

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "psutil", "tqdm", "jinja2", "gguf",
    "llama-cpp-python", "bitsandbytes", "datasets", "matplotlib", "ipywidgets", "nbclient", "ipykernel", "pytest", "hypothesis",
)  # fmt: skip
BENCH = ["--depth", "0,4096", "--batch", "1,8", "--repeats", "3"]  # of `minimoe bench`; the models are the shipped ones
TOY_BENCH = ["--quick", "--threads", "1"]
DEVICE_S = 5.0  # for the device alone in each of its processes; `minimoe bench` takes 10
LONGEST = 2.5  # shares of the time that one process may take: some need a second, others a minute


def versions() -> dict[str, str | None]:
    """Installed versions; None: not there."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine(report: Report) -> None:
    """What every result carries. Raises MinimoeError if the device cannot be used."""
    from minimoe.bench.device import describe, pick_device
    from minimoe.bench.report import commit

    report.put(machine=describe(pick_device(report.args.device)), versions=versions(), commit=commit())


def card(report: Report) -> None:
    """What is here; then the device's rates, and the shipped checkpoint in every runtime that there is."""
    facts(report)
    from minimoe.bench import cards, session

    about = session.ask_device(report.args.device)
    plan = bench_plan(report, about)
    to_do = plan.rounds * (len(plan.devices) + len(plan.variants))

    def say(text: str) -> None:
        """Before each process: its share of what is left, so that the card is whole in time; a row without a turn says so."""
        nonlocal to_do
        left = max(1.0, report.left() - 5)
        plan.timeout = min(left, LONGEST * left / max(1, to_do))
        to_do -= 1
        print(f"{text}: up to {plan.timeout:.0f} s", flush=True)

    found = {"schema": cards.SCHEMA, "name": cards.default_name(about["machine"])} | session.run(plan, about, say)
    report.put(card=found)
    cards.check(found)
    complain(found["rows"], versions())


def facts(report: Report) -> None:
    """What decides which forms are taken here."""
    import torch
    import torch.nn.functional as F

    from minimoe import doctor

    report.put(
        missing=[name for name, version in versions().items() if version is None],
        grouped_mm=hasattr(F, "grouped_mm"), compiler=shutil.which(os.environ.get("CC", "gcc")) is not None,
        triton=importlib.util.find_spec("triton") is not None,
        cuda_archs=torch.cuda.get_arch_list() if report.args.device != "cpu" else [],
        attention={name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "cudnn")},
    )  # fmt: skip
    # the rules of the book's own installation: here a line that says "fix" is a fact, not an error
    report.put(doctor=[{"level": f.level, "topic": f.topic, "text": f.text} for f in doctor.examine()])


def bench_plan(report: Report, about: Mapping[str, Any]) -> Any:
    """The plan of `minimoe bench` for this device, one whose ``timeout`` can be set anew for each process."""
    from minimoe.bench.choose import plan
    from minimoe.commands import bench

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = TOY_BENCH if report.args.quick else BENCH
    chosen = types.SimpleNamespace(**vars(plan(parser.parse_args([*words, "--device", report.args.device]), about)))
    if not report.args.quick:
        chosen.seconds = DEVICE_S
    return chosen


def complain(rows: list[dict[str, Any]], installed: Mapping[str, str | None]) -> None:
    """Trouble if a speed is not there although its program is."""
    from minimoe.bench.worker import PACKAGES as NEEDS

    bad = [row for row in rows if row["unit"] == "tokens/s" and "median" not in row and installed.get(NEEDS[row["runtime"]])]
    if bad:
        first = bad[0]
        raise Trouble(f"{len(bad)} speeds are not on the card; {first['test']} in {first['runtime']}: "
                      f"{first.get('missing') or first.get('refused')}")  # fmt: skip
