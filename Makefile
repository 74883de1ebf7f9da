# `make digits` and `make test` need only Python >= 3.11, pip and make. Each recipe is the plain command it stands for.
PYTHON = python3
TORCH = torch==2.13.0
ARGS =
PIP_INSTALL = .venv/bin/python -m pip install -c requirements.lock

.PHONY: digits digits-seeds test test-long test-torch torch lint lock clean

digits: WORKDIR = runs/digits
digits: .venv/installed
	.venv/bin/python -m dimo_jax.main --config=configs/digits.py --workdir=$(WORKDIR) $(ARGS)

digits-seeds: WORKDIR = runs/digits-seeds
digits-seeds: .venv/installed
	for seed in 1 2 3; do \
	  .venv/bin/python -m dimo_jax.main --config=configs/digits.py --config.seed=$$seed \
	    --workdir=$(WORKDIR)/seed$$seed $(ARGS) || exit 1; \
	done
	.venv/bin/python -m dimo_jax.evaluation.summary $(WORKDIR)

test: .venv/installed-test
	.venv/bin/python -m pytest -n 2 --dist loadfile --durations=20 $(ARGS)

test-long: .venv/installed-test
	.venv/bin/python -m pytest -n 2 --dist loadfile --durations=20 -m long $(ARGS)

# pytest exits with 5 when no test carries the marker.
test-torch: torch
	.venv/bin/python -m pytest -n 2 --dist loadfile --durations=20 -m torch $(ARGS) || test $$? -eq 5

torch: .venv/installed-torch

lint: .venv/installed-test
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

# Needs uv. Delete requirements.lock first to move every pin to the newest version.
lock:
	uv pip compile --universal --python-version 3.11 --extra test pyproject.toml \
	  --output-file requirements.lock --custom-compile-command "make lock" --annotation-style line

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find dimo_jax configs tests -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: requirements.lock requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is too old: make PYTHON=python3.11 (or newer)")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP_INSTALL) -e '.[test]'
	touch $@

# Apart from the lock: the build that the package index serves by default brings gigabytes of CUDA libraries.
.venv/installed-torch: .venv/installed-test
	$(PIP_INSTALL) $(TORCH)
	touch $@
