#!/usr/bin/env bash
# Installs memtrain and its test extras into .venv and runs the tests, without a network. Arguments go to
# pytest:  bash launch/test.sh -m "not slow"    Two test files at a time, a core each; JOBS=4 for more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain test
cd "$repo"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline OMP_NUM_THREADS=1
exec "$python" -m pytest -n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder "$@"
