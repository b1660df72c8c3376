#!/usr/bin/env bash
# One machine, all of its GPUs (without one: two processes on the CPU). Edit: nothing. Without arguments it trains
# the demo; they go to `memtrain train`, and data.batch_size is a rank's:
#   NPROC=4 bash launch/local.sh experiment=wen2024 data.shards=/data/laion data.batch_size=2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
cd "$repo"
if [ "$#" -eq 0 ]; then
    "$venv/bin/memtrain" demo data/demo
    set -- experiment=demo data.shards=data/demo data.batch_size=8
fi
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
exec "$venv/bin/torchrun" --standalone --nproc-per-node="${NPROC:-$((gpus ? gpus : 2))}" \
    -m memtrain.cli.main train "$@"
