"""A run that is killed and started again ends in the bits of one that was not; what does not fit is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from dimo_jax import tasks
from dimo_jax.checkpoint import load_params, save_params
from dimo_jax.errors import UserError
from dimo_jax.logs import TIMING

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain", "distill", "sample", "evaluate")


class Stop(Exception):
    pass


def outcome(workdir: Path) -> dict:
    """All that must repeat: hashes of the weights, metrics without timing, samples, scores."""
    rows = {}
    for stage in ("pretrain", "distill"):
        lines = map(json.loads, (workdir / stage / "metrics.jsonl").read_text().splitlines())
        rows[stage] = [{k: v for k, v in line.items() if not k.startswith(TIMING)} for line in lines]
        rows[f"{stage} weights"] = json.loads((workdir / stage / "weights" / "manifest.json").read_text())["sha256"]
    results = json.loads((workdir / "report" / "results.json").read_text())
    scores = [(row["name"], row["metrics"]) for row in results["rows"]]
    return {**rows, "grid": (workdir / "sample" / "samples.png").read_bytes(), "scores": scores}


def run(workdir: Path, monkeypatch, stop_at: dict | None = None) -> dict:
    """tasks.run of the tiny config in this process -> final state of each training stage. stop_at: stage -> step."""
    states, fit = {}, tasks.fit
    stop_at = stop_at or {}

    def recording_fit(step, state, *, folder, batch, **kwargs):
        def stopping_batch(n):
            if stop_at.get(folder.name) == n:
                raise Stop
            return batch(n)

        states[folder.name] = fit(step, state, folder=folder, batch=stopping_batch, **kwargs)
        return states[folder.name]

    monkeypatch.setattr(tasks, "fit", recording_fit)
    tasks.run(digits.get_config("tiny").to_dict(), workdir)
    return states


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run; its compiled programs are kept for the runs that follow, here and in other processes."""
    folder = tmp_path_factory.mktemp("reference")
    options = {
        "jax_compilation_cache_dir": (str(folder / "cache"), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_disable_most_optimizations": (True, False),
    }
    for name, (value, _) in options.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as monkeypatch:
        states = run(folder / "run", monkeypatch)
    yield folder, states
    for name, (_, default) in options.items():
        jax.config.update(name, default)


def test_stopped_and_started_again_ends_in_the_same_bits(reference, tmp_path, monkeypatch):
    """Stopped between two checkpoints of each stage: states with optimisers and EMA, metrics, samples and scores."""
    folder, whole = reference
    for stop_at in ({"pretrain": 3}, {"distill": 5}):
        with monkeypatch.context() as patch, pytest.raises(Stop):
            run(tmp_path, patch, stop_at)
    with monkeypatch.context() as patch:
        states = run(tmp_path, patch)
    assert states["distill"].outer_step == whole["distill"].outer_step == 6
    jax.tree.map(np.testing.assert_array_equal, states["distill"], whole["distill"])
    assert outcome(tmp_path) == outcome(folder / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_workdir_of_another_config_is_refused_and_untouched(reference):
    workdir = reference[0] / "run"
    before, config = files(workdir), digits.get_config("tiny")
    config.distill.spec.r_init = 0.5
    with pytest.raises(UserError, match="distill.spec.r_init is 0.8 there and 0.5 now"):
        tasks.run(config.to_dict(), workdir)
    assert files(workdir) == before


def test_another_teacher_is_refused_and_nothing_lost(reference, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0] / "run", workdir)
    (workdir / "distill" / "done.json").unlink()
    params, manifest = load_params(workdir / "pretrain" / "weights")
    params["net"]["tok_emb"] += 1
    save_params(workdir / "pretrain" / "weights", params, {"teacher": manifest["teacher"]})
    before = files(workdir / "distill")
    with pytest.raises(UserError, match="teacher_sha256"):
        tasks.run(digits.get_config("tiny").to_dict(), workdir)
    assert files(workdir / "distill") == before


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    config = digits.get_config("tiny")
    config.pretrain.optimizer.update(learning_rate=1e30, warmup_steps=0, schedule="constant")
    with pytest.raises(UserError, match="not finite between the steps 0 and 2"):
        tasks.run(config.to_dict(), tmp_path)
    assert not list(tmp_path.glob("pretrain/checkpoints/*")) and not (tmp_path / "pretrain" / "done.json").exists()


@pytest.mark.parametrize(
    "argument, sentence",
    [
        (
            "--config.distill.spec.nope=1",
            "unknown config key config.distill.spec.nope: config.distill.spec has the keys",
        ),
        ("--config.distill.spec.divergence=nope", "unknown divergence 'nope': known are alpha, forward_kl"),
    ],
)
def test_the_program_ends_bad_input_in_one_sentence(tmp_path, argument, sentence):
    command = [
        sys.executable,
        "-m",
        "dimo_jax.main",
        "--config=configs/digits.py:tiny",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run([*command, argument], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert [line for line in done.stderr.splitlines() if sentence in line and line.startswith("error: ")]
    assert "Traceback" not in done.stderr


def killed_run(workdir: Path, cache: Path, targets: list[str], rng: random.Random) -> int:
    """Run the program until it ends, killing it once in each of the stages `targets`; -> number of kills.

    A kill comes a random moment (up to 1.5 s) after the stage's folder, or its next checkpoint or log line, appears.
    """
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "dimo_jax.main", "--config=configs/digits.py:tiny", f"--workdir={workdir}"]
    kills = 0
    for target in [*targets, None]:
        before = _progress(workdir, target)
        with open(workdir.with_suffix(".log"), "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            while process.poll() is None and (target is None or _progress(workdir, target) == before):
                time.sleep(0.02)
            if target is not None:
                time.sleep(rng.uniform(0, 1.5))
            kills += process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, workdir.with_suffix(".log").read_text()[-2000:]
    return kills


def _progress(workdir: Path, stage: str | None) -> int:
    return sum(1 for _ in (workdir / stage).rglob("*")) if stage and (workdir / stage).exists() else -1


def test_killed_in_three_stages(reference, tmp_path):
    folder, _ = reference
    kills = killed_run(tmp_path / "run", folder / "cache", ["pretrain", "distill", "evaluate"], random.Random(0))
    assert kills == 3
    assert outcome(tmp_path / "run") == outcome(folder / "run")


@pytest.mark.long
def test_killed_twenty_times(reference, tmp_path):
    folder, _ = reference
    targets = ["pretrain"] * 7 + ["distill"] * 7 + ["sample"] * 3 + ["evaluate"] * 6
    kills = killed_run(tmp_path / "run", folder / "cache", targets, random.Random(1))
    print(f"{kills} kills")
    assert kills >= 20
    assert outcome(tmp_path / "run") == outcome(folder / "run")
