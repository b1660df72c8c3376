#!/usr/bin/env bash
# Installs memtrain and its test extras into .venv and runs the tests, without a network. Arguments go to
# pytest:  bash launch/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain test
cd "$repo"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
exec "$python" -m pytest "$@"
