#!/usr/bin/env bash
# The tables on a rectified flow of docs/results.md: the tiny Stable Diffusion 3 (model=demo_flow) on the short demo,
# both scores taken, without exclusion and with `evidence` going by each score, over three seeds: nine short runs
# (experiment=demo_table), as many at a time as there are JOBS (default 2), one core each. A run that is finished is not
# made again. Arguments go to every run.  SEEDS="0 1" bash launch/flow_table.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
cd "$repo"
export OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH"
[ -d data/demo_table ] || memtrain demo data/demo_table num_samples=1196 copies=66
settings=(
    "none exclusion=none"
    "evidence exclusion=evidence score.rule=anchored"
    "evidence_by_magnitude exclusion=evidence_by_magnitude"
)
mkdir -p runs/flow_table
commands() {
    local seed setting
    for seed in ${SEEDS:-0 1 2}; do
        for setting in "${settings[@]}"; do
            [ -e "runs/flow_table/${setting%% *}_seed$seed/summary.json" ] ||
                printf '%s run_id=%s_seed%s seed=%s\n' "${setting#* }" "${setting%% *}" "$seed" "$seed"
        done
    done
}
commands | xargs -P "${JOBS:-2}" -I '{}' bash -c \
    'memtrain train experiment=demo_table model=demo_flow score=both name=flow_table logger=csv \
        callbacks.validation.every=400 {} "$@" \
        >>runs/flow_table/log 2>&1' bash "$@"
runs=()
for setting in "${settings[@]}"; do
    runs+=(runs/flow_table/"${setting%% *}"_seed*/)
done
"$python" -m memtrain.report.table --over-seeds "${runs[@]}" --into docs/results.md --mark flow
separation=("$python" -m memtrain.report.separation runs/flow_table/none_seed*/ --into docs/results.md)
"${separation[@]}" --mark flow-separation
"${separation[@]}" --over-loss --mark flow-separation-over-loss
"$python" -m memtrain.report.table --over-seeds "${runs[@]}"
