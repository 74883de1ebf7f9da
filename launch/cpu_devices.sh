#!/usr/bin/env bash
# Run a config on N fake CPU devices, to try a mesh without the hardware:
#   launch/cpu_devices.sh 8 --config=configs/digits.py --workdir=runs/digits8
# PYTHON names the interpreter (default: the .venv that `make` created).
set -euo pipefail
devices=${1:-}
if ! [[ $devices =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 NUM_DEVICES --config=FILE --workdir=FOLDER ...; NUM_DEVICES was '$devices'" >&2
  exit 2
fi
shift
root=$(cd "$(dirname "$0")/.." && pwd)
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
exec "${PYTHON:-$root/.venv/bin/python}" -m dimo_jax.main "$@"
