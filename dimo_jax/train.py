"""The one host loop: run a jitted step, log, sample, checkpoint, stop on what is not finite. Knows no algorithm."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from clu import profiler

from dimo_jax.errors import UserError
from dimo_jax.run_config import Logging


def fit(
    step: Callable,
    state,
    *,
    start: int,
    num_steps: int,
    batch: Callable[[int], object],
    log,
    checkpointer,
    checkpoint_every: int,
    logging: Logging,
    hooks: Sequence[Callable] = (),
    folder: Path,
):
    """Run steps start .. num_steps - 1 and return the last state.

    Args:
      step: (state, batch) -> (state, metrics); may donate the state. The state has the scalars `finite` and `skipped`.
      batch: n -> the batch of step n, a pure function.
      log: RunLog; checkpointer: Checkpointer. Metrics go to the log every logging.log_every steps.
      hooks: called as hook(n, state) every logging.sample_every steps and after the last.
      folder: where a profiler trace goes.

    Raises:
      UserError: a metric or the state is not finite; nothing not finite is ever saved.
    """
    checked, tracing = start, False
    for n in range(start, num_steps):
        if n == logging.profile_start:
            profiler.start(str(folder / "profile"))
            tracing = True
        state, metrics = step(state, batch(n))
        done, last = n + 1, n + 1 == num_steps
        if tracing and (last or done == logging.profile_start + logging.profile_steps):
            jax.block_until_ready(state)
            profiler.stop()
            tracing = False
        if done % logging.log_every == 0 or last:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            check_finite(values, checked, done)
            log.write(done, values)
            checked = done
        if hooks and logging.sample_every and (done % logging.sample_every == 0 or last):
            for hook in hooks:
                hook(done, state)
        if done % checkpoint_every == 0 or last:
            if not bool(state.finite):
                raise UserError(f"an update between the steps {checked} and {done} was not finite: {REMEDY}")
            checkpointer.save(done, state)
    checkpointer.wait()
    return state


REMEDY = (
    "the last sound checkpoint is kept; lower the learning rate or clip the gradient in a new workdir, or set "
    "spec.nonfinite to 'skip' to skip and count such updates"
)


def check_finite(values: dict[str, float], since: int, step: int) -> None:
    """UserError naming the metrics that are not finite and the steps between which it happened."""
    bad = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"not finite between the steps {since} and {step}: {', '.join(bad)}; {REMEDY}")
