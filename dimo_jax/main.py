"""python -m dimo_jax.main --config=configs/digits.py --workdir=runs/digits: run the stages of a config in a folder."""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from clu import platform
from ml_collections import ConfigDict, config_flags

from dimo_jax import tasks
from dimo_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file: configs/digits.py, or configs/digits.py:paper.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, report. The same command resumes."
)


def main(argv):
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells a story of every save; --verbosity=0 shows it
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    platform.work_unit().set_task_status(f"host {jax.process_index()} of {jax.process_count()}: {jax.devices()}")
    try:
        tasks.run(CONFIG.value.to_dict(), Path(WORKDIR.value))
    except UserError as error:
        _refuse(str(error))


def parse(argv: list[str]) -> list[str]:
    """absl's flag parser, with one sentence for an override of a key that the config does not have."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError, TypeError):
        overrides = [arg for arg in argv if arg.startswith("--config.")]
        sys.argv = [arg for arg in argv if arg not in overrides]  # where ml_collections looks for overrides
        app.parse_flags_with_usage(sys.argv)
        for override in overrides:
            _check_key(override.removeprefix("--").partition("=")[0])
        raise


def _check_key(dotted: str) -> None:
    node, (place, *keys) = CONFIG.value, dotted.split(".")
    for key in keys:
        known = list(node) if isinstance(node, ConfigDict) else []
        if key not in known:
            _refuse(f"unknown config key {dotted}: {place} has the keys {', '.join(known) or 'none, it is a value'}")
        node, place = node[key], f"{place}.{key}"


def _refuse(sentence: str):
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse)
