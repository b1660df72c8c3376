#!/usr/bin/env bash
# One machine, all of its GPUs (without one: two processes on the CPU). Edit: nothing; arguments go to
# `memtrain train`:  NPROC=4 bash launch/local.sh experiment=wen2024 data.shards=/data/laion data.batch_size=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
[ "$#" -gt 0 ] || set -- experiment=demo data.batch_size=8
exec "$venv/bin/torchrun" --standalone --nproc-per-node="${NPROC:-$((gpus ? gpus : 2))}" \
    -m memtrain.cli.main train "$@"
