#!/usr/bin/env bash
# The second table of docs/results.md: all rules and caption baselines over three seeds, 45 short runs
# (experiment=demo_table), as many at a time as there are JOBS (default 2), one core each; about 85 minutes on two. A
# run that is finished is not made again. Arguments go to every run.  SEEDS="0 1" bash launch/table.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
cd "$repo"
export OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH"
[ -d data/demo_table ] || memtrain demo data/demo_table num_samples=1196 copies=66
settings=(
    "none exclusion=none"
    "evidence exclusion=evidence"
    "evidence_by_magnitude exclusion=evidence_by_magnitude"
    "z_scores exclusion=z_scores"
    "calibrated exclusion=calibrated"
    "quantile exclusion=quantile"
    "fixed exclusion=fixed exclusion.threshold=2.5"
    "normalized exclusion=normalized exclusion.threshold=0.047"
    "iet_agc exclusion=iet_agc"
    "several_captions exclusion=none method=several_captions"
    "random_caption exclusion=none method=random_caption"
    "random_tokens_added exclusion=none method=random_tokens_added"
    "random_tokens_replaced exclusion=none method=random_tokens_replaced"
    "words_repeated exclusion=none method=words_repeated"
    "embedding_noise exclusion=none method=embedding_noise"
)
mkdir -p runs/table
commands() {
    local seed setting
    for seed in ${SEEDS:-0 1 2}; do
        for setting in "${settings[@]}"; do
            [ -e "runs/table/${setting%% *}_seed$seed/summary.json" ] ||
                printf '%s run_id=%s_seed%s seed=%s\n' "${setting#* }" "${setting%% *}" "$seed" "$seed"
        done
    done
}
commands | xargs -P "${JOBS:-2}" -I '{}' bash -c \
    'memtrain train experiment=demo_table name=table logger=csv {} "$@" >>runs/table/log 2>&1' bash "$@"
runs=()
for setting in "${settings[@]}"; do
    runs+=(runs/table/"${setting%% *}"_seed*/)
done
"$python" -m memtrain.report.table --over-seeds "${runs[@]}" --into docs/results.md
"$python" -m memtrain.report.table --over-seeds "${runs[@]}"
