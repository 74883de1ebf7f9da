"""The five laws of the floor plan, read off the sources: what may import what, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a unit (a file or a folder of dimo_jax) imports its own floor and the floors named for it.
MATHEMATICS = ("errors", "registry", "rng", "nets", "divergences", "corruption", "guidance", "categorical")
ALGORITHMS = ("spec", "state", "mdm", "objective", "dimo_state", "dimo", "samplers")
NETWORKS = ("models",)
SUBSTRATE = ("optim", "sharding", "checkpoint", "files", "data", "datasets", "logs", "images")
PLAIN = ("errors", "registry")  # all that a floor which is usable alone takes from below
BELOW_ASSEMBLY = MATHEMATICS + ALGORITHMS + NETWORKS + SUBSTRATE
ASSEMBLY = BELOW_ASSEMBLY + ("teachers", "run_config", "sample")
MAY_IMPORT = {
    **dict.fromkeys(MATHEMATICS, MATHEMATICS),
    **dict.fromkeys(ALGORITHMS, MATHEMATICS + ALGORITHMS),
    **dict.fromkeys(NETWORKS, MATHEMATICS + NETWORKS),
    **dict.fromkeys(SUBSTRATE, PLAIN + SUBSTRATE),
    "teachers": (*BELOW_ASSEMBLY, "teachers"),
    "evaluation": (*PLAIN, "files", "evaluation"),
    "run_config": BELOW_ASSEMBLY,
    "sample": (*BELOW_ASSEMBLY, "teachers"),
    "evaluate": (*ASSEMBLY, "evaluation"),
    "train": (*SUBSTRATE, *PLAIN, "run_config"),
    "tasks": (*ASSEMBLY, "evaluate", "train"),
    "main": ("tasks", "errors"),
}
PURE = {*MATHEMATICS, *ALGORITHMS, *NETWORKS}
FRAMEWORKS = {"tensorflow", "torch"}
OUTSIDE = {"os", "sys", "io", "pathlib", "shutil", "tempfile", "logging", "absl", "warnings", "time", "random"}


def imports(tree: ast.Module) -> list[str]:
    """Dotted names, `from a import b` as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
    return names


def breaches(path: str, source: str) -> list[str]:
    """What breaks a law in a file at `path`, relative to the repository."""
    tree, parts = ast.parse(source), Path(path).with_suffix("").parts
    found = [f"{path} has {n} lines" for n in [source.count("\n")] if n > 400]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            found += [f"{path}: {node.name} has {length} lines"] if length > 60 else []
    if parts[0] == "configs":
        allowed = ("ml_collections.", "configs.", "ml_collections", "configs")
        found += [f"{path} imports {name}" for name in imports(tree) if not name.startswith(allowed)]
    if parts[0] == "dimo_jax" and parts[1] != "__init__":
        found += unit_breaches(path, parts[1], tree)
    return found


def unit_breaches(path: str, unit: str, tree: ast.Module) -> list[str]:
    if unit not in MAY_IMPORT:
        return [f"{path} stands on no floor: add {unit} to MAY_IMPORT"]
    found = []
    for name in imports(tree):
        top, _, rest = name.partition(".")
        config = top == "ml_collections" or name.startswith("absl.flags")
        if (
            (top == "dimo_jax" and rest.split(".")[0] not in MAY_IMPORT[unit])
            or top in ("", "configs", *FRAMEWORKS)
            or (config and unit not in ("tasks", "main"))
            or (top in OUTSIDE and unit in PURE)
            or (top == "flax" and unit in MATHEMATICS)
        ):
            found.append(f"{path} imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("ConfigDict", "FLAGS") and unit not in ("tasks", "main"):
            found.append(f"{path}:{node.lineno} knows {node.id}")
        if isinstance(node, ast.Name) and node.id in ("print", "open", "input") and unit in PURE:
            found.append(f"{path}:{node.lineno} calls {node.id}")
        if isinstance(node, ast.Global):
            found.append(f"{path}:{node.lineno} changes a global")
    return found


def sources() -> list[str]:
    folders = ("dimo_jax", "configs", "tests", "launch")
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in ROOT.glob(f"{folder}/**/*.py"))


@pytest.mark.parametrize("path", sources())
def test_laws_hold(path):
    assert breaches(path, (ROOT / path).read_text()) == []


LONG = "def f():\n" + "    x = 1\n" * 60
BREACHES = [
    ("dimo_jax/divergences.py", "import flax", "imports flax"),
    ("dimo_jax/rng.py", "from dimo_jax import spec", "imports dimo_jax.spec"),
    ("dimo_jax/dimo.py", "from dimo_jax.models.maskgit import init", "imports dimo_jax.models.maskgit.init"),
    ("dimo_jax/dimo.py", "def f():\n    import dimo_jax.logs", "imports dimo_jax.logs"),
    ("dimo_jax/samplers/new.py", "from ..optim import x", "imports ..optim.x"),
    ("dimo_jax/models/new.py", "from dimo_jax.objective import Step", "imports dimo_jax.objective.Step"),
    ("dimo_jax/checkpoint.py", "from dimo_jax.state import NetState", "imports dimo_jax.state.NetState"),
    ("dimo_jax/evaluation/new.py", "from dimo_jax.tasks import run", "imports dimo_jax.tasks.run"),
    ("dimo_jax/teachers/new.py", "from dimo_jax import run_config", "imports dimo_jax.run_config"),
    ("dimo_jax/train.py", "from dimo_jax.dimo import train_step", "imports dimo_jax.dimo.train_step"),
    ("dimo_jax/tasks.py", "from configs import digits", "imports configs.digits"),
    ("dimo_jax/logs.py", "import torch.nn", "imports torch.nn"),
    ("dimo_jax/main.py", "from tensorflow import io", "imports tensorflow.io"),
    ("dimo_jax/sample.py", "from ml_collections import ConfigDict", "imports ml_collections.ConfigDict"),
    ("dimo_jax/sample.py", "x = FLAGS.y", ":1 knows FLAGS"),
    ("dimo_jax/models/layers.py", "print(1)", ":1 calls print"),
    ("dimo_jax/state.py", "x = open('y').read()", ":1 calls open"),
    ("dimo_jax/guidance.py", "import os", "imports os"),
    ("dimo_jax/data.py", "def f():\n    global x\n    x = 1", ":2 changes a global"),
    ("dimo_jax/nowhere.py", "", "stands on no floor: add nowhere to MAY_IMPORT"),
    ("configs/new.py", "import jax", "imports jax"),
    ("tests/test_new.py", LONG, ": f has 61 lines"),
    ("launch/new.py", "\n" * 401, "has 401 lines"),
]


@pytest.mark.parametrize("path, source, said", BREACHES, ids=[said for *_, said in BREACHES])
def test_the_checker_sees_a_breach(path, source, said):
    (breach,) = breaches(path, source)
    assert breach.startswith(path) and breach.endswith(said)


def test_every_unit_stands_on_a_floor():
    units = {path.split("/")[1].removesuffix(".py") for path in sources() if path.startswith("dimo_jax/")}
    assert units == {*MAY_IMPORT, "__init__"}
