"""A file is whole or as it was, and a working folder belongs to one config."""

import json

import pytest

from dimo_jax.errors import UserError
from dimo_jax.files import atomic_file, atomic_write, claim_workdir


def test_an_interrupted_write_changes_nothing(tmp_path):
    atomic_write(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_workdir_belongs_to_its_config(tmp_path):
    config = {"lr": 0.1, "net": {"depth": 4, "dims": (1, 2)}, "logging": {"every": 10}}
    workdir = tmp_path / "new" / "run"
    claim_workdir(workdir, config)
    claim_workdir(workdir, {**config, "logging": {"every": 20}})
    assert json.loads((workdir / "config.json").read_text())["logging"] == {"every": 20}
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(UserError) as refusal:
        claim_workdir(workdir, {"lr": 0.2, "net": {"dims": (1, 2)}, **{f"z{i}": {} for i in range(4)}})
    assert "lr is 0.1 there and 0.2 now; net.depth is 4 there and 'absent' now; z0 is 'absent'" in str(refusal.value)
    assert "(and 1 more)" in str(refusal.value) and "another --workdir" in str(refusal.value)
    assert [path.read_bytes() for path in workdir.iterdir()] == [before]


def test_workdir_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be written"):
            claim_workdir(workdir, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        claim_workdir(tmp_path, {})
