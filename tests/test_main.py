"""What is wrong ends in one sentence and a non-zero exit, and costs nothing that was there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs import digits
from dimo_jax import checkpoint, main, sharding, tasks
from dimo_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("little_optimization")
ROOT = Path(__file__).parents[1]
AXES = ("data", "fsdp", "tensor")


def config(*stages: str, **teacher) -> dict:
    tiny = digits.get_config("tiny")
    tiny.stages = stages
    tiny.teacher.update(teacher)
    return tiny.to_dict()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, little_optimization):
    """The folder of a finished pre-training."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    tasks.run(config("pretrain"), workdir)
    return workdir


@pytest.fixture
def unfinished(pretrained, tmp_path):
    """A copy of it whose stage is not marked as done: the next run goes on from its checkpoint."""
    workdir = shutil.copytree(pretrained, tmp_path / "run")
    (workdir / "pretrain" / "done.json").unlink()
    return workdir


def refused(workdir: Path, asked: dict, said: str):
    """tasks.run says it in one line and leaves the checkpoints, weights and metrics of the folder as they were."""
    before = files(workdir / "pretrain")
    with pytest.raises(UserError, match=said) as refusal:
        tasks.run(asked, workdir)
    assert "\n" not in str(refusal.value)
    assert files(workdir / "pretrain") == before


def test_a_finished_stage_is_not_run_again(pretrained, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "pretrain", lambda *_: pytest.fail("ran again"))
    tasks.run(config("pretrain"), pretrained)


def test_a_checkpoint_of_another_format_version(unfinished, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    refused(unfinished, config("pretrain"), "has format_version 1 and this run has 99: resume with what it was made")


def test_a_checkpoint_of_another_shape(unfinished):
    (unfinished / "config.json").unlink()
    said = "is not of this run's shape .of another shape or dtype: ema/blocks/mlp/fc1/bias .float32.2, 32. there, "
    refused(unfinished, config("pretrain", mlp_dim=64), said)


def test_weights_of_another_teacher_and_no_weights(pretrained, tmp_path):
    asked = config("distill", width=32)
    asked["distill"]["teacher"] = str(pretrained / "pretrain" / "weights")
    refused(tmp_path / "run", asked, "are of the teacher .*'width': 16.* the config asks for .*'width': 32")
    refused(tmp_path / "other", config("distill"), "there are no parameters in .*manifest.json is missing")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    refused(tmp_path / "file" / "run", config("pretrain"), "cannot be written .*give another --workdir")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_batch_that_does_not_divide_is_refused_if_the_stage_is_to_run(stage, monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: jax.sharding.AbstractMesh((4, 4, 1), AXES))
    with pytest.raises(UserError, match="batch_size 8 does not divide over 16 devices .*take a multiple of 16"):
        tasks.check(tasks.from_dict(config(stage)))
    tasks.check(tasks.from_dict(config("sample", "evaluate")))


def test_the_program_ends_in_one_sentence_on_eight_devices(tmp_path):
    arguments = ["--config=configs/digits.py:tiny", "--config.pretrain.batch_size=12", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "dimo_jax.main", *arguments]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: batch_size 12 does not divide over 8 devices")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "key, said",
    [
        ("nope", "config has the keys data, distill"),
        ("distill.spec.nope", "config.distill.spec has the keys adaptive_cfg, auxiliary_cfg_scale"),
        ("seed.nope", "config.seed has the keys none, it is a value"),
        ("data.name.nope", "config.data.name has the keys none, it is a value"),
    ],
)
def test_an_override_of_no_key_is_named(key, said, monkeypatch, capsys):
    path = f"{ROOT / 'configs' / 'digits.py'}:tiny"
    monkeypatch.setattr(sys, "argv", ["main", f"--config={path}", "--workdir=run", f"--config.{key}=1"])
    with pytest.raises(SystemExit) as end:
        main.parse(sys.argv)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: unknown config key config.{key}: {said}")
