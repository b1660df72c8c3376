#!/usr/bin/env bash
# The second table of docs/results.md: all rules and caption baselines over three seeds, 45 short runs
# (experiment=demo_table), as many at a time as there are JOBS (default 2), one core each; about 85 minutes on two. A
# run that is finished is not made again. Arguments go to every run.  SEEDS="0 1" bash launch/table.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain
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
"$venv/bin/memtrain" demo "$repo/data/demo"
train_settings table experiment=demo_table "$@"
"$python" -m memtrain.report.table --over-seeds "${runs[@]}" --into docs/results.md
"$python" -m memtrain.report.table --over-seeds "${runs[@]}"
