"""The log repeats bit for bit over a resume, survives a torn line, and says the same on the console."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from dimo_jax.images import grid
from dimo_jax.logs import TIMING, RunLog


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(folder) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith(TIMING)} for line in lines(folder)]


def events(folder) -> list[Event]:
    """Every event in the folder: records of [length 8, checksum 4, payload, checksum 4] bytes."""
    found = []
    for path in sorted(folder.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def write_steps(folder, first: int, last: int, start_step: int = 0) -> None:
    log = RunLog(folder, start_step=start_step, num_steps=50, name="pretrain")
    for step in range(first, last + 1, 10):
        log.write(step, {"loss": jnp.float32(1) / step, "num_tokens": step})
    log.close()


def test_scalars_go_to_file_events_and_console(tmp_path, capsys):
    log = RunLog(tmp_path / "new", num_steps=50, name="pretrain", console=("loss", "lr"))
    log.write(10, {"loss": jnp.float32(0.1), "count": np.int32(3), "lr": 1e-3, "half": jnp.bfloat16(0.5)})
    log.close()
    (line,) = lines(tmp_path / "new")
    assert untimed(tmp_path / "new") == [
        {"step": 10, "loss": float(np.float32(0.1)), "count": 3, "lr": 1e-3, "half": 0.5}
    ]
    assert line["time/steps_per_s"] > 0
    assert line["time/left_s"] == pytest.approx(40 / line["time/steps_per_s"])
    logged = {v.tag: v.simple_value for event in events(tmp_path / "new") for v in event.summary.value}
    assert logged["loss"] == np.float32(0.1) and logged["count"] == 3 and "time/left_s" in logged
    out, err = capsys.readouterr()
    assert out.startswith("pretrain   10/50  loss        0.1  lr      0.001  ")
    assert "steps/s" in out and "left" in out and "half" not in out and out.count("\n") == 1
    assert err == ""  # no bar: stderr is no terminal here


def test_resume_ends_in_the_lines_of_one_run(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    write_steps(whole, 10, 50)
    write_steps(resumed, 10, 40)
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')  # a kill in the middle of a line
    write_steps(resumed, 30, 50, start_step=20)
    assert untimed(resumed) == untimed(whole)
    assert [line["step"] for line in untimed(whole)] == [10, 20, 30, 40, 50]
    restarts = [e for e in events(resumed) if e.WhichOneof("what") == "session_log"]
    assert restarts[-1].step == 21  # TensorBoard drops what the killed run had logged from there on


def test_a_run_that_starts_anew_keeps_no_old_line(tmp_path):
    write_steps(tmp_path, 10, 30)
    write_steps(tmp_path, 10, 20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]


def test_speed_is_that_since_the_step_before(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0, 110.0, 111.0])
    monkeypatch.setattr("dimo_jax.logs.time.perf_counter", lambda: next(clock))
    log = RunLog(tmp_path, start_step=10, num_steps=50, name="pretrain")
    for step in (20, 40, 40):
        log.write(step, {})
    log.close()
    assert [line["time/steps_per_s"] for line in lines(tmp_path)] == [5.0, 2.5, 2.5]
    assert [line["time/left_s"] for line in lines(tmp_path)] == [6.0, 4.0, 4.0]


def test_bar_shows_in_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    write_steps(tmp_path, 10, 50)
    err = capsys.readouterr().err
    assert "pretrain: 100%" in err and "50/50" in err


def test_other_processes_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write_steps(tmp_path, 10, 50)
    RunLog(tmp_path, num_steps=1, name="x").images(1, "a", np.zeros((2, 2, 3), np.uint8))
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_images_become_png_and_events(tmp_path):
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    log = RunLog(tmp_path, num_steps=50, name="distill")
    log.images(20, "samples/one_step", picture)
    log.images(20, "grey", picture[..., :1])
    log.close()
    np.testing.assert_array_equal(Image.open(tmp_path / "samples" / "samples_one_step_0000020.png"), picture)
    np.testing.assert_array_equal(Image.open(tmp_path / "samples" / "grey_0000020.png"), picture[..., 0])
    shown = {v.tag: v.image for e in events(tmp_path) for v in e.summary.value}
    assert (shown["samples/one_step"].height, shown["samples/one_step"].width) == (2, 3)


def test_grid_places_every_pixel():
    images = np.stack([np.full((2, 3, 1), value, np.float32) for value in (-1, -2, 0, 1, 5)])
    sheet = grid(images, columns=3, scale=4)
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * (2 * 4 + 2) + 2, 3 * (3 * 4 + 2) + 2, 3)
    tiles = [sheet[2 + 10 * (n // 3) : 10 + 10 * (n // 3), 2 + 14 * (n % 3) : 14 + 14 * (n % 3)] for n in range(6)]
    assert [np.unique(tile).tolist() for tile in tiles] == [[0], [0], [128], [255], [255], [128]]
    colours = np.random.default_rng(0).uniform(-1, 1, (1, 4, 5, 3)).astype(np.float32)
    np.testing.assert_allclose(grid(colours, columns=1)[2:-2, 2:-2] / 127.5 - 1, colours[0], atol=1 / 255 + 1e-6)
