"""What is installed: the lock, the extras, the imports of the core, and the wheel."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11.7", "3.12.1", "3.13.0", "3.14.0")
EXTRAS = {"tpu", "cuda", "convert", "hub", "tf", "eval", "test"}


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def pins(python: str) -> dict[str, Version]:
    """Package -> version that the lock gives a Linux machine with this Python."""
    environment = {"python_full_version": python, "python_version": python.rsplit(".", 1)[0], "sys_platform": "linux"}
    chosen = [r for r in requirements("requirements.lock") if r.marker is None or r.marker.evaluate(environment)]
    versions = {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in chosen}
    assert len(versions) == len(chosen), f"a package has two pins for Python {python}"
    return versions


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def run(*command: str | Path) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_python_3_11_takes_the_last_jax_and_flax_that_support_it():
    assert {name: str(pins("3.11.7")[name]) for name in ("jax", "jaxlib", "flax")} == {
        "jax": "0.10.2",
        "jaxlib": "0.10.2",
        "flax": "0.12.8",
    }


@pytest.mark.parametrize("python", PYTHONS[1:])
def test_newer_pythons_take_newer_ones(python):
    old, new = pins("3.11.7"), pins(python)
    assert new["jax"] > old["jax"] and new["flax"] > old["flax"]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_floor_has_a_pin_above_it(python):
    locked = pins(python)
    wanted = requirements("requirements.txt") + [Requirement(line) for line in extras()["test"]]
    for requirement in wanted:
        assert [s.operator for s in requirement.specifier] == [">="], f"{requirement} is not a floor"
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_lock_brings_no_other_framework_and_names_no_host():
    assert not {"torch", "tensorflow", "tensorflow-cpu", "keras"} & set(pins("3.11.7"))
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and "--find-links" not in text and "\n/" not in text


def test_extras():
    assert set(extras()) == EXTRAS


def test_every_import_is_a_declared_dependency():
    declared = requirements("requirements.txt") + [Requirement(line) for lines in extras().values() for line in lines]
    names = {canonicalize_name(requirement.name) for requirement in declared}
    owners = importlib.metadata.packages_distributions()
    for path in [*ROOT.glob("dimo_jax/**/*.py"), *ROOT.glob("configs/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"dimo_jax", "configs"}:
                packages = {canonicalize_name(owner) for owner in owners.get(top, [top])}
                assert packages & names, f"{path.relative_to(ROOT)} imports {top}, which no requirement brings"


def test_core_needs_neither_tensorflow_nor_torch():
    """It imports where neither can be; `tensorboardX` loads torch by itself where torch is installed."""
    script = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import dimo_jax.main
print(*sorted({"tensorflow", "torch"} & set(sys.modules)))
"""
    assert run(sys.executable, "-c", script).strip() == ""


@pytest.mark.long
def test_wheel_installs_with_every_source_file(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("dimo_jax", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    expected = {path.relative_to(source) for path in source.rglob("*/*") if path.is_file()}
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("dimo_jax-*.whl")

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    script = "import importlib.metadata as m; print(*m.files('dimo-jax'), sep='\\n')"
    installed = {Path(line) for line in run(python, "-c", script).splitlines()}
    assert not expected - installed, f"left out of the wheel: {sorted(map(str, expected - installed))}"
    script = "import dimo_jax, importlib.metadata as m; assert dimo_jax.__version__ == m.version('dimo-jax')"
    run(python, "-c", script)
