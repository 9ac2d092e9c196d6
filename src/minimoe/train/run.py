"""A run in a directory: its log, its recipe, its checkpoints, and in the end its model.

    DIR/recipe.json     what was asked for, and in the end what came of it
    DIR/log.jsonl       a line a step
    DIR/checkpoints/    what --resume goes on from
    DIR/model/          the weights, for transformers, minimoe generate and minimoe export
    DIR/.lock           held by the process that writes here, and by no process that is gone
"""
from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .checkpoint import Checkpoints
from .interrupt import between_steps
from .loop import Training
from .options import Step, TrainError
from .world import World

LOG, RECIPE, MODEL, CHECKPOINTS, LOCK = "log.jsonl", "recipe.json", "model", "checkpoints", ".lock"
FIXED = ("tokenizer", "sources")  # parts of a recipe that a continued run must share


class Run:
    """The files of one run, which one process at a time may write.

    world  the processes that train together; all of them call each method but finish(), and the first one writes

    Raises TrainError if the directory holds something else, or without ``resume`` anything at all.
    """

    def __init__(self, out: Path, resume: bool = False, keep: int = 2, world: World | None = None) -> None:
        self.out, self.resume, self.world = out, resume, world or World()
        self.checkpoints = Checkpoints(out / CHECKPOINTS, keep)
        self.result: dict[str, Any] | None = None  # of the run that is continued, if it came to its end
        self._recipe: dict[str, Any] = {}
        self._lock = FileLock(out / LOCK, timeout=0)
        self._saved_at: int | None = None  # step of the newest checkpoint on disk
        self._made = False
        self.world.on_first(self._check)

    def start(self, training: Training, recipe: dict[str, Any], say: Callable[[str], object] = warnings.warn) -> str:
        """Take the directory and, if there is a checkpoint, go back to it; what to tell the reader.

        say  called with what is wrong with checkpoints that are skipped

        Raises TrainError if another process has the directory, or if the run in it is of other data or options.
        """
        self._recipe = recipe
        self.world.check_same("text or tokenizers", {key: recipe[key] for key in FIXED})
        self.result = self.world.on_first(self._take)
        found = self.checkpoints.load(say=say)
        self.world.check_same("checkpoints", found and found[1].name)
        if found:
            training.restore(found[0]["training"])
            self._saved_at = training.next_step
        self.world.on_first(lambda: self._tidy(found and found[1]))
        return f"going on from step {training.next_step} ({found[1].name})" if found else "starting from the beginning"

    def go(
        self, training: Training, save_every: int = 100, on_step: Callable[[Step], None] | None = None,
        progress: bool = False,
    ) -> bool:
        """Do the steps that are left, a line of the log and now and then a checkpoint for each.

        Ctrl-C and SIGTERM let the step that is under way come to its end. Returns whether all steps were done.
        """
        self.world.on_first(lambda: self._begin(training.next_step))
        log_path = self.out / LOG if self.world.first else os.devnull
        last = training.options.steps
        bar = tqdm(total=last, initial=training.next_step, desc="training", unit="step", disable=not progress, leave=False)
        with bar, between_steps() as asked_to_stop, open(log_path, "ab", buffering=0) as log:
            while training.next_step < last:
                if self.world.any(asked_to_stop()):
                    return False
                step = training.step()
                self._append(log, step)
                bar.update()
                bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
                if step.note and self.world.first:
                    tqdm.write(f"step {step.step}: {step.note}", file=sys.stderr)
                if on_step:
                    on_step(step)
                if save_every and training.next_step % save_every == 0 and training.next_step < last:
                    if self.world.first:
                        os.fsync(log.fileno())  # a checkpoint must not outlive the lines before it
                    self.save(training)
        return True

    def save(self, training: Training) -> None:
        """A checkpoint from which the run can go on, unless there is one of this step."""
        if training.next_step != self._saved_at:
            content = {"training": training.state()}
            self.world.on_first(lambda: self.checkpoints.save(training.next_step, content))
            self._saved_at = training.next_step

    def finish(self, result: dict[str, Any]) -> None:
        """Note in the recipe what came of it."""
        self._write_recipe(self._recipe | {"result": result})

    def steps(self) -> list[dict[str, Any]]:
        """The log as it is on disk."""
        return _read_lines(self.out / LOG)

    def close(self) -> None:
        """Let another process have the directory."""
        self._lock.release()

    def discard(self) -> None:
        """Take away what :meth:`start` and :meth:`go` have written, for a run that did not come to its first step."""
        self.world.on_first(self._discard)

    def _discard(self) -> None:
        for name in (RECIPE, LOG, LOCK):
            (self.out / name).unlink(missing_ok=True)
        if self._made and not any(self.out.iterdir()):
            self.out.rmdir()

    # ------------------------------------------------------------------ what is there already
    def _take(self) -> dict[str, Any] | None:
        """Make the directory this run's; the result of the run that is continued."""
        self._made = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise TrainError(f"{self.out}: another process is training there now; wait for its end, or choose a new "
                             "directory") from None
        self._check()  # again, because another run may have come and gone since
        self._compare()
        return self.result

    def _tidy(self, used: Path | None) -> None:
        """Drop what was written after the checkpoint that is gone on from."""
        if used:
            self.checkpoints.drop_newer(used)
        for left_over in self.out.glob(f".{MODEL}-*"):  # of a process that was killed while it wrote the model
            shutil.rmtree(left_over, ignore_errors=True)

    def _check(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir() or {path.name for path in self.out.iterdir()} - {LOCK, _temporary(self.out / RECIPE).name}:
            if not self.resume:
                raise TrainError(f"{self.out} is there already; choose a new directory, delete it, or go on with --resume")
            if not (self.out / RECIPE).is_file():
                raise TrainError(f"{self.out} is no run that can be continued: it has no {RECIPE}; choose a new directory")

    def _compare(self) -> None:
        """Refuse a run of other sources or another tokenizer than this one's."""
        path = self.out / RECIPE
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            self.result = saved.get("result")
        except (OSError, ValueError, AttributeError):
            raise TrainError(f"{self.out} is no run that can be continued: its {RECIPE} cannot be read; choose a new "
                             "directory") from None
        for key in FIXED:
            if saved.get(key) != self._recipe[key]:
                raise TrainError(f"{self.out} was trained with other {key} than are given now; give the same ones "
                                 f"(see {path}), or choose a new directory")

    # ------------------------------------------------------------------ files
    def _append(self, log: BinaryIO, step: Step) -> None:
        line = (json.dumps({key: _short(value) for key, value in step.to_dict().items()}) + "\n").encode()
        try:
            while line:  # a disk that gets full takes a part, and only then says so
                line = line[log.write(line) :]
        except OSError as error:
            raise _not_written(self.out / LOG, error) from None

    def _begin(self, next_step: int) -> None:
        self._write_recipe(self._recipe)  # first, because a directory without it cannot be continued
        self._cut_log(next_step)

    def _write_recipe(self, recipe: dict[str, Any]) -> None:
        _write(self.out / RECIPE, json.dumps(recipe, indent=1) + "\n")

    def _cut_log(self, next_step: int) -> None:
        """Drop lines of steps that will be done again, and a line that a crash left half-written."""
        kept = [line for line in self.steps() if line["step"] < next_step]
        _write(self.out / LOG, "".join(json.dumps(line) + "\n" for line in kept))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # the line that was being written
            break
        if not isinstance(line, dict) or line.get("step") != len(lines):
            break
        lines.append(line)
    return lines


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")  # one name, because one process writes: a later one tidies up


def _write(path: Path, text: str) -> None:
    temporary = _temporary(path)
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(path, error) from None


def _not_written(path: Path, error: OSError) -> TrainError:
    return TrainError(f"{path} could not be written ({error.strerror}); make room and go on with --resume")
