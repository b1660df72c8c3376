#!/usr/bin/env bash
# The README's table and pictures: the demo without exclusion, with the paper's rule at two thresholds, and with
# evidence; same seed, same steps. About 25 minutes on two CPU cores. Arguments go to every run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
cd "$repo"
stamp="$(date +%Y%m%d-%H%M%S)"
"$venv/bin/memtrain" demo data/demo
runs=()
for choice in none fixed:1.5 fixed:2.5 evidence; do
    rule="${choice%%:*}"
    run="${choice/:/_at_}"
    threshold=()
    [ "$rule" = "$choice" ] || threshold=("exclusion.threshold=${choice##*:}")
    "$venv/bin/memtrain" train experiment=demo data.shards=data/demo "name=compare/$stamp" "run_id=$run" \
        "exclusion=$rule" ${threshold[@]+"${threshold[@]}"} "$@"
    runs+=("runs/compare/$stamp/$run")
done
"$python" -m memtrain.report.table "${runs[@]}" --into README.md
mkdir -p .github
for run in none evidence; do
    cp "runs/compare/$stamp/$run/curves.png" ".github/curves_$run.png"
    cp "runs/compare/$stamp/$run/samples.png" ".github/samples_$run.png"
done
"$python" -m memtrain.report.table "${runs[@]}"
