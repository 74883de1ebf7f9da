"""python -m dimo_jax.main --config=configs/digits.py --workdir=runs/digits: run the stages of a config in a folder."""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from clu import platform
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/digits.py or configs/digits.py:paper."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, logs, report. The same command resumes."
)


def main(argv):
    from dimo_jax import tasks
    from dimo_jax.errors import UserError

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells a story of every save; --verbosity=0 shows it
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    platform.work_unit().set_task_status(f"host {jax.process_index()} of {jax.process_count()}: {jax.devices()}")
    try:
        tasks.run(CONFIG.value.to_dict(), Path(WORKDIR.value))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
