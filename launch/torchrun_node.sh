#!/usr/bin/env bash
# One node of several: the same line on each, in any order. Edit these three, or set them in the environment:
nodes="${NNODES:-2}"                    # how many
endpoint="${ENDPOINT:-127.0.0.1:29400}" # HOST:PORT of one of them, which all can reach
job="${JOB:-memtrain}"                  # the same on all nodes; another one for another job on the same endpoint
# Unedited it is a node on loopback: started twice, it trains the demo on two. Arguments go to `memtrain train`;
# data.batch_size is a rank's; the shards and runs_dir have the same path on all nodes, and runs_dir is shared:
#   NNODES=2 ENDPOINT=node1:29400 bash launch/torchrun_node.sh experiment=wen2024 trainer=ddp runs_dir=/shared/runs …
# NPROC: processes a node, one a GPU if not said. NCCL_SOCKET_IFNAME=eth0 names the network where there are several.
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
let_ranks_stop
gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
loopback=()
case "$endpoint" in 127.* | localhost:*) loopback=(--local-addr 127.0.0.1) ;; esac
exec "$venv/bin/torchrun" --nnodes="$nodes" --nproc-per-node="${NPROC:-$((gpus ? gpus : 1))}" \
    --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$job" ${loopback[@]+"${loopback[@]}"} \
    -m memtrain.cli.main train "$@"
