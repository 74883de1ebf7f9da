"""What is saved comes back in the same bits, and what does not fit is refused with one sentence and left alone."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dimo_jax.checkpoint import FORMAT_VERSION, Checkpointer, flatten, load_params, save_params, tree_sha256
from dimo_jax.errors import UserError
from dimo_jax.files import atomic_write

TEACHER = {"teacher_sha256": "a" * 64}


class Net(NamedTuple):
    params: dict
    opt_state: Any


@flax.struct.dataclass
class State:
    generator: Net
    ema: dict
    outer_step: jax.Array


def make_state(step: int, size: int = 1000) -> State:
    weights = jax.random.normal(jax.random.key(step), (8, size))
    params = {"block": {"w": weights, "b": weights[0].astype(jnp.bfloat16)}, "on": weights[1] > 0}
    return State(Net(params, (jnp.int32(step), (), {"mu": weights * 2})), {"w": weights + 1}, jnp.int32(step))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same_bits(one: Any, two: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert tree_sha256(one) == tree_sha256(two)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def checkpointer(tmp_path):
    made = Checkpointer(tmp_path / "checkpoints", metadata=TEACHER)
    yield made
    made.close()


def save_and_wait(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, make_state(step))
    checkpointer.wait()


def test_state_comes_back_in_class_place_and_bits(checkpointer):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    state = make_state(7).replace(ema={"w": jax.device_put(make_state(7).ema["w"], split)})
    checkpointer.save(7, state)
    checkpointer.wait()
    step, restored = checkpointer.restore(abstract(state))
    assert step == 7
    assert_same_bits(restored, state)
    assert restored.ema["w"].sharding == split
    assert restored.generator.params["block"]["b"].dtype == jnp.bfloat16


def test_values_are_those_at_the_call_though_the_buffers_are_donated_next(checkpointer):
    @partial(jax.jit, donate_argnums=0)
    def train_step(state):
        return jax.tree.map(lambda x: x * 3 + 1 if x.dtype != bool else ~x, state)

    for step in range(5):
        state = jax.block_until_ready(make_state(step, size=100_000))
        expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpointer.save(step, state)
        for _ in range(3):
            state = train_step(state)
        jax.block_until_ready(state)
        checkpointer.wait()
        assert_same_bits(jax.tree.map(np.asarray, checkpointer.restore(abstract(state))[1]), expected)


def test_keeps_the_newest_and_leaves_a_step_that_is_there(checkpointer, tmp_path):
    save_and_wait(checkpointer, 1, 2, 3)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    before = files_of(folder)
    checkpointer.save(3, make_state(99))
    resumed = Checkpointer(folder, metadata=TEACHER)
    resumed.save(2, make_state(99))
    resumed.close()
    assert files_of(folder) == before


def test_empty_and_half_written_steps_are_skipped_aloud_and_set_aside(checkpointer, tmp_path, caplog):
    save_and_wait(checkpointer, 1, 2)
    folder = tmp_path / "checkpoints"
    (folder / "4").mkdir()
    (folder / "3").mkdir()
    (folder / "2" / "metadata").rename(folder / "3" / "metadata")
    resumed = Checkpointer(folder, metadata=TEACHER)
    assert resumed.latest() == 1
    assert all(f"checkpoints/{step} IS DAMAGED" in caplog.text for step in (2, 3, 4))
    step, state = resumed.restore(abstract(make_state(0)))
    assert step == 1
    assert_same_bits(state, make_state(1))
    save_and_wait(resumed, 2, 3)
    assert resumed.latest() == 3
    resumed.close()
    assert {path.name for path in folder.iterdir()} == {"2", "3", "2.damaged", "3.damaged", "4.damaged"}


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax still had under way
@pytest.mark.parametrize("damage", [half, Path.unlink])
@pytest.mark.parametrize("largest", [True, False])  # values, or the index to them
def test_damaged_arrays_give_way_to_the_checkpoint_before(checkpointer, tmp_path, caplog, largest, damage):
    save_and_wait(checkpointer, 1, 2)
    data = sorted((tmp_path / "checkpoints" / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    for path in data[-1:] if largest else data[:-1]:
        damage(path)
    resumed = Checkpointer(tmp_path / "checkpoints", metadata=TEACHER)
    step, state = resumed.restore(abstract(make_state(0)))
    assert step == 1
    assert_same_bits(state, make_state(1))
    assert "checkpoints/2 " in caplog.text
    save_and_wait(resumed, 2)
    assert_same_bits(resumed.restore(abstract(make_state(0))), (2, make_state(2)))
    resumed.close()
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()


def test_nothing_to_restore_is_said(checkpointer):
    assert checkpointer.latest() is None
    with pytest.raises(UserError, match="no sound checkpoint"):
        checkpointer.restore(abstract(make_state(0)))


def test_other_metadata_format_and_leaves_are_refused_and_left_alone(checkpointer, tmp_path, monkeypatch):
    save_and_wait(checkpointer, 1)
    folder, wanted = tmp_path / "checkpoints", abstract(make_state(0))
    before = files_of(folder)

    other = Checkpointer(folder, metadata={"teacher_sha256": "b" * 64})
    with pytest.raises(UserError, match='teacher_sha256 "a{64}" and this run has "b{64}"'):
        other.restore(wanted)

    block = {"w": jax.ShapeDtypeStruct((8, 9), jnp.float32), "new": jax.ShapeDtypeStruct((2,), jnp.float32)}
    wrong = wanted.replace(ema={}, generator=wanted.generator._replace(params={"block": block}))
    with pytest.raises(UserError) as refusal:
        checkpointer.restore(wrong)
    assert "missing there: generator/params/block/new;" in str(refusal.value)
    assert "unknown here: ema/w, generator/params/block/b, generator/params/on;" in str(refusal.value)
    assert "generator/params/block/w (float32[8, 1000] there, float32[8, 9] here)" in str(refusal.value)

    monkeypatch.setattr("dimo_jax.checkpoint.FORMAT_VERSION", FORMAT_VERSION + 1)
    with pytest.raises(UserError, match=f"format_version {FORMAT_VERSION} and this run has {FORMAT_VERSION + 1}"):
        Checkpointer(folder, metadata=TEACHER).restore(wanted)
    assert files_of(folder) == before


def test_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        flatten({"a/b": 1, "a": {"b": 2}})


KILLED = """
import sys, jax
from dimo_jax.checkpoint import Checkpointer
made = Checkpointer(sys.argv[1], metadata={})
step = 0
while True:
    step += 1
    made.save(step, {"w": jax.random.normal(jax.random.key(step), (4_000_000,))})
    made.wait() if step == 1 else None
"""


def test_sigkill_during_a_save_leaves_the_checkpoint_before(tmp_path):
    folder = tmp_path / "checkpoints"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while True:  # look at a stopped process, so that the save cannot end between the look and the kill
        child.send_signal(signal.SIGSTOP)
        if list(folder.glob("*tmp*")) and [path for path in folder.glob("*") if path.name.isdecimal()]:
            break
        child.send_signal(signal.SIGCONT)
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()

    resumed = Checkpointer(folder, metadata={})
    array = jax.ShapeDtypeStruct(
        (4_000_000,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    step, state = resumed.restore({"w": array})
    assert step == resumed.latest() >= 1
    assert np.array_equal(state["w"], jax.random.normal(jax.random.key(step), (4_000_000,)))
    resumed.save(step + 10, state)  # not the step that was being saved: its leftover goes all the same
    resumed.close()
    assert resumed.latest() == step + 10
    assert not list(folder.glob("*tmp*"))


def test_params_come_back_with_their_manifest(tmp_path):
    params = {
        "a": {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).T, "n": jnp.int32(3)},
        "empty": np.zeros((0, 4)),
    }
    written = save_params(tmp_path / "params", params, {"name": "digits", "step": 7})
    loaded, manifest = load_params(tmp_path / "params")
    assert_same_bits(loaded, jax.tree.map(np.asarray, params))
    assert manifest == written
    assert manifest["sha256"] == tree_sha256(params)
    assert (manifest["num_arrays"], manifest["num_parameters"], manifest["name"]) == (3, 7, "digits")


def test_params_are_replaced_as_one(tmp_path, monkeypatch):
    save_params(tmp_path, {"w": np.zeros(3)}, {})

    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dimo_jax.checkpoint.atomic_write", killed)
        save_params(tmp_path, {"w": np.ones(3)}, {})
    assert load_params(tmp_path)[0]["w"].sum() == 0
    save_params(tmp_path, {"w": np.ones(3)}, {})
    assert load_params(tmp_path)[0]["w"].sum() == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_hash_sees_names_shapes_dtypes_and_bytes():
    base = {"a": np.zeros(4, np.float32)}
    others = [{"b": base["a"]}, {"a": np.zeros((2, 2), np.float32)}, {"a": np.zeros(4, np.int32)}, {"a": -base["a"]}]
    assert len({tree_sha256(tree) for tree in [base, *others]}) == 5
    assert tree_sha256({"x": 1 * base["a"], "c": base}) == tree_sha256({"c": base, "x": base["a"]})


def test_missing_damaged_and_foreign_params_are_refused(tmp_path):
    with pytest.raises(UserError, match="no parameters in .*manifest.json is missing"):
        load_params(tmp_path / "nowhere")
    manifest = save_params(tmp_path, {"w": np.arange(100.0)}, {})
    arrays, text = tmp_path / manifest["file"], (tmp_path / "manifest.json").read_text()
    whole = arrays.read_bytes()
    for damaged in (b"", whole[:200], whole.replace(np.float64(7).tobytes(), np.float64(8).tobytes())):
        arrays.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be used"):
            load_params(tmp_path)
    arrays.write_bytes(whole)
    for key, value in (("sha256", "0" * 64), ("format_version", 0)):
        atomic_write(tmp_path / "manifest.json", json.dumps({**json.loads(text), key: value}))
        with pytest.raises(UserError, match=key):
            load_params(tmp_path)
