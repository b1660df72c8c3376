#!/usr/bin/env bash
# The tables on a rectified flow of docs/results.md: the tiny Stable Diffusion 3 (model=demo_flow) in the domain that it
# was pretrained on, both scores taken, without exclusion and with `evidence` going by each score, over three seeds:
# nine short runs (experiment=demo_noto_table), as many at a time as there are JOBS (default 2), one core each. A run
# that is finished is not made again. Arguments go to every run.  SEEDS="0 1" bash launch/flow_table.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
settings=(
    "none exclusion=none"
    "evidence exclusion=evidence score.rule=anchored"
    "evidence_by_magnitude exclusion=evidence_by_magnitude"
)
"$venv/bin/memtrain" demo "$repo/data/demo_noto_table" pictures=noto num_samples=1196 repeated=6 copies=66
train_settings flow_table experiment=demo_noto_table model=demo_flow score=both callbacks.validation.every=400 "$@"
"$python" -m memtrain.report.table --over-seeds "${runs[@]}" --into docs/results.md --mark flow
separation=("$python" -m memtrain.report.separation runs/flow_table/none_seed*/ --into docs/results.md)
"${separation[@]}" --mark flow-separation
"${separation[@]}" --over-loss --mark flow-separation-over-loss
"$python" -m memtrain.report.table --over-seeds "${runs[@]}"
