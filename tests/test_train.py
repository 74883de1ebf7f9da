"""The host loop on a step that only counts: what it saves, logs and traces, and when it stops."""

from typing import NamedTuple

import numpy as np
import pytest

from dimo_jax import train
from dimo_jax.errors import UserError
from dimo_jax.run_config import Logging


class State(NamedTuple):
    n: int
    finite: bool = True


class Recorder:
    """Stands for the log, the checkpointer and the profiler: remembers what it is told."""

    def __init__(self):
        self.written, self.saved, self.traced = [], [], []

    def write(self, step, values):
        self.written.append((step, values))

    def save(self, step, state):
        self.saved.append(step)

    def wait(self):
        self.saved.append("waited")

    def start(self, folder):
        self.traced.append("start")

    def stop(self):
        assert self.traced.pop() == "start", "stopped without a start"
        self.traced.append("stop")


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(train, "profiler", made)
    return made


def fit(recorder, tmp_path, *, start=0, bad_loss=None, bad_update=None, hooks=(), **logging):
    """Ten steps, logged every third and saved every fourth; state and metrics of the given steps are not finite."""

    def step(state, batch):
        assert state.n == batch
        loss = np.nan if batch == bad_loss else 1.0 / (batch + 1)
        return State(batch + 1, state.finite and batch != bad_update), {"loss": np.float32(loss)}

    return train.fit(
        step, State(start), start=start, num_steps=10, batch=lambda n: n, log=recorder, checkpointer=recorder,
        checkpoint_every=4, logging=Logging(**{"log_every": 3, **logging}), hooks=hooks, folder=tmp_path,
    )  # fmt: skip


def test_logs_saves_and_draws_when_due_and_after_the_last_step(recorder, tmp_path):
    drawn = []
    state = fit(recorder, tmp_path, start=4, hooks=[lambda n, state: drawn.append((n, state.n))], sample_every=5)
    assert state == State(10)
    assert [step for step, _ in recorder.written] == [6, 9, 10]
    assert recorder.written[0][1] == {"loss": pytest.approx(1 / 6)}
    assert recorder.saved == [8, 10, "waited"]
    assert drawn == [(5, 5), (10, 10)]
    assert fit(recorder, tmp_path, start=10) == State(10)  # killed between its last checkpoint and its end


def test_a_metric_that_is_not_finite_stops_with_its_window(recorder, tmp_path):
    with pytest.raises(UserError, match="not finite between the steps 3 and 6: loss = nan; the last sound checkpoint"):
        fit(recorder, tmp_path, bad_loss=5)
    assert recorder.saved == [4] and [step for step, _ in recorder.written] == [3]


@pytest.mark.parametrize("bad", [6, 7])
def test_an_update_that_is_not_finite_is_never_saved_though_no_line_was_logged(recorder, tmp_path, bad):
    with pytest.raises(UserError, match="an update between the steps 6 and 8 was not finite"):
        fit(recorder, tmp_path, bad_update=bad)
    assert recorder.saved == [4]


@pytest.mark.parametrize(
    "start, first, steps, traced",
    [(0, 2, 3, ["stop"]), (0, 8, 5, ["stop"]), (0, -1, 5, []), (5, 2, 4, []), (3, 2, 9, [])],
    ids=["inside", "cut off by the end", "off", "resumed within", "resumed after"],
)
def test_a_trace_that_is_started_is_stopped_and_no_other(recorder, tmp_path, start, first, steps, traced):
    fit(recorder, tmp_path, start=start, profile_start=first, profile_steps=steps)
    assert recorder.traced == traced
