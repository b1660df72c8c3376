#!/usr/bin/env bash
# The first table and the pictures of docs/results.md: the demo without exclusion, with the paper's rule, with
# calibrated and with evidence, by either score; same seed, same steps, as many at a time as there are JOBS (default 2),
# one core each. About 25 minutes on two. Arguments go to every run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
cd "$repo"
export OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH"
folder="compare/$(date +%Y%m%d-%H%M%S)"
memtrain demo data/demo
xargs -P "${JOBS:-2}" -I '{}' bash -c 'memtrain train experiment=demo data.shards=data/demo {} "$@"' bash \
    "name=$folder" "$@" <<'END'
run_id=none exclusion=none
run_id=evidence exclusion=evidence
run_id=evidence_by_magnitude exclusion=evidence_by_magnitude
run_id=calibrated exclusion=calibrated exclusion.false_positive_rate=0.01
run_id=fixed_at_2.5 exclusion=fixed exclusion.threshold=2.5
END
runs=(runs/"$folder"/{none,fixed_at_2.5,calibrated,evidence_by_magnitude,evidence})
"$python" -m memtrain.report.table "${runs[@]}" --into docs/results.md
mkdir -p docs/pictures
for run in none evidence; do
    cp "runs/$folder/$run/curves.png" "docs/pictures/curves_$run.png"
    cp "runs/$folder/$run/samples.png" "docs/pictures/samples_$run.png"
done
"$python" -m memtrain.report.table "${runs[@]}"
