#!/usr/bin/env bash
# Builds the pages of docs/ and the API into build/site, without a network once installed; a warning is an error.
# Arguments go to mkdocs:  bash launch/docs.sh serve    shows them, and what changes, on port 8000
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

install_memtrain docs
cd "$repo"
export NO_MKDOCS_2_WARNING=1 # the range in pyproject.toml says 1
if [ "$#" -gt 0 ]; then
    exec "$python" -m mkdocs "$@"
fi
"$python" -m mkdocs build --strict
printf 'built %s\n' "$repo/build/site/index.html"
