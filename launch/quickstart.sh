#!/usr/bin/env bash
# From a fresh machine to a fine-tuned model: installs memtrain into .venv, makes the demo corpus, encodes it once,
# fine-tunes on it with exclusion. Arguments go to `memtrain train`:  bash launch/quickstart.sh exclusion=none
# MEMTRAIN_DEMO is the folder of the corpus (data/demo), PYTHON the interpreter to make .venv with.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

demo="${MEMTRAIN_DEMO:-$repo/data/demo}"
case "$demo" in /*) ;; *) demo="$PWD/$demo" ;; esac

install_memtrain
cd "$repo"
# Quoted for Hydra too: the path may have spaces, commas, brackets.
shards="data.shards='${demo//\'/\\\'}'"
"$venv/bin/memtrain" demo "$demo"
cache=beside
for word in "$@"; do
  case "$word" in model* | data*) cache=null ;; esac  # another model or other data: encoded as they are trained on
done
[ "$cache" = null ] || "$venv/bin/memtrain" cache model=demo data.resolution=64 dtype=float32 "$shards"
exec "$venv/bin/memtrain" train experiment=demo "data.cache=$cache" "$shards" "$@"
