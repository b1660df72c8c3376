#!/usr/bin/env bash
# One node of several: run it on each, the same line, in any order. Edit, or set in the environment:
nodes="${NNODES:-2}"                    # how many
endpoint="${ENDPOINT:-127.0.0.1:29400}" # HOST:PORT of one of them, which all can reach
job="${JOB:-memtrain}"                  # the same on all nodes; another one for another job on the same endpoint
# Unedited it is a node on loopback: started twice, it trains the demo on two. Arguments go to `memtrain train`;
# data.batch_size is a rank's. NPROC: processes a node, one a GPU if not said.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if command -v flock >/dev/null; then # two nodes that share this folder
    exec 9<"$repo"
    flock 9
fi
install_memtrain
cd "$repo"
if [ "$#" -eq 0 ]; then
    "$venv/bin/memtrain" demo data/demo
    set -- experiment=demo data.shards=data/demo data.batch_size=8
fi
exec 9<&-
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
loopback=()
case "$endpoint" in 127.* | localhost:*) loopback=(--local-addr 127.0.0.1) ;; esac
exec "$venv/bin/torchrun" --nnodes="$nodes" --nproc-per-node="${NPROC:-$((gpus ? gpus : 1))}" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$job" ${loopback[@]+"${loopback[@]}"} \
    -m memtrain.cli.main train "$@"
