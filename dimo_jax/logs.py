"""What a run says while it runs: metrics.jsonl, TensorBoard events, pictures, a console line and a progress bar."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from dimo_jax.files import atomic_file, atomic_write

TIMING = "time/"  # scalars under this prefix differ from run to run; all others repeat bit for bit
_SHOWN = 4  # scalars on the console line when none are chosen


class RunLog:
    """The log of one stage of a run; on a resume it is cut back to the step that the checkpoint holds.

    Only process 0 writes; on the others every method does nothing.
    """

    def __init__(
        self, folder: str | Path, *, start_step: int = 0, num_steps: int, name: str, console: Sequence[str] = ()
    ):
        """
        Args:
          folder: gets `metrics.jsonl`, `samples/` and the event files.
          start_step: the step of the state that the run goes on from; all that was logged after it is dropped.
          num_steps: the step at which the stage ends.
          name: of the stage, for the console.
          console: the scalars to show there; by default the first few.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._folder, self._name, self._console = Path(folder), name, tuple(console)
        self._num_steps, self._step, self._rate = num_steps, start_step, 0.0
        self._time = time.perf_counter()
        self._folder.mkdir(parents=True, exist_ok=True)
        truncate_metrics(self._folder / "metrics.jsonl", start_step)
        self._metrics = open(self._folder / "metrics.jsonl", "a")
        self._events = SummaryWriter(str(self._folder), purge_step=start_step + 1)
        bar = {"initial": start_step, "total": num_steps, "desc": name, "unit": "step", "dynamic_ncols": True}
        self._bar = tqdm(**bar, disable=not sys.stderr.isatty(), leave=False)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs scalars (numbers, or arrays of one element) of a step, and the speed since the step logged before."""
        if not self._active:
            return
        self._measure(step)
        timing = {"time/steps_per_s": self._rate, "time/left_s": self._seconds_left()} if self._rate else {}
        values = {key: np.asarray(value).item() for key, value in {**scalars, **timing}.items()}
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for key, value in values.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()
        self._bar.update(step - self._bar.n)
        self._bar.write(self._line(step, values))
        sys.stdout.flush()  # a pipe would keep the line back

    def images(self, step: int, tag: str, image: np.ndarray) -> None:
        """Logs a picture [H, W, C] uint8, also as `samples/<tag>_<step>.png`."""
        if not self._active:
            return
        self._events.add_image(tag, image, step, dataformats="HWC")
        self._events.flush()
        path = self._folder / "samples" / f"{tag.replace('/', '_')}_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_file(path) as file:
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, format="PNG")

    def close(self) -> None:
        if self._active:
            self._bar.close()
            self._events.close()
            self._metrics.close()

    def _measure(self, step: int) -> None:
        now = time.perf_counter()
        if step > self._step:
            self._rate = (step - self._step) / (now - self._time)
            self._step, self._time = step, now

    def _seconds_left(self) -> float:
        return (self._num_steps - self._step) / self._rate

    def _line(self, step: int, values: Mapping[str, Any]) -> str:
        shown = self._console or [key for key in values if not key.startswith(TIMING)][:_SHOWN]
        width = len(str(self._num_steps))
        parts = [f"{self._name:<10} {step:>{width}}/{self._num_steps}"]
        parts += [f"{key} {values[key]:>10.4g}" for key in shown if key in values]
        if self._rate:
            parts += [f"{self._rate:7.2f} steps/s", f"{tqdm.format_interval(self._seconds_left())} left"]
        return "  ".join(parts)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step`, and a last line that a kill has torn; the file changes at once."""
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    atomic_write(path, "".join(line for line in whole if json.loads(line)["step"] <= last_step))
