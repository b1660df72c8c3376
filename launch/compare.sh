#!/usr/bin/env bash
# The demo without exclusion and with `evidence`, same seed, same steps, as many at a time as there are JOBS (default 2),
# one core each: a table and the pictures of docs/results.md. Arguments go to every run. The table of all rules over
# seeds is that of `memtrain bench mitigation`.
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
END
runs=(runs/"$folder"/{none,evidence})
"$python" -m memtrain.report.table "${runs[@]}" --into docs/results.md
mkdir -p docs/pictures
for run in none evidence; do
    for picture in samples doses curves; do
        cp "runs/$folder/$run/$picture.png" "docs/pictures/${picture}_$run.png"
    done
done
"$python" -m memtrain.report.table "${runs[@]}"
