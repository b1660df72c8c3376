#!/usr/bin/env bash
# One machine, all of its GPUs; without one, two processes on the CPU. Edit: nothing. Without arguments it trains the
# demo; arguments go to `memtrain train`. data.batch_size is a rank's; trainer=ddp asks for GPUs, and bf16:
#   bash launch/local.sh experiment=wen2024 trainer=ddp data.shards=/data/laion data.batch_size=2
#   NPROC=4 bash launch/local.sh …                        four processes
#   CUDA_VISIBLE_DEVICES=2,3 bash launch/local.sh …       these GPUs
# Ctrl-C, SIGTERM and SIGUSR1 end it with a checkpoint, and resume=auto goes on from there; torchrun itself ends with 1.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
cd "$repo"
if [ "$#" -eq 0 ]; then
    "$venv/bin/memtrain" demo data/demo
    set -- experiment=demo data.shards=data/demo data.batch_size=8
fi
let_ranks_stop
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
exec "$venv/bin/torchrun" --standalone --nproc-per-node="${NPROC:-$((gpus ? gpus : 2))}" \
    -m memtrain.cli.main train "$@"
