# shellcheck shell=bash
# Sourced by the scripts beside it. `install_memtrain [EXTRA]` makes .venv and installs memtrain into it with
# the versions of constraints.txt; where that was done before, it does nothing. A Linux machine without a GPU gets the
# wheel of torch for CPUs, where pip finds it (MEMTRAIN_TORCH=default: pip's own choice; cpu: that one). Afterwards
# $repo is this repository and $python the interpreter of its .venv. `let_ranks_stop` sets what torchrun reads. `train_settings` makes
# the runs of a table.

unset CDPATH
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$repo/.venv"
python="$venv/bin/python"
# Present from the first file written into .venv until the last: a .venv that has it is half made.
unfinished="$venv/memtrain-unfinished"

die() {
    printf '%s\n' "$*" >&2
    exit 1
}

# "3.11.7", or nothing where the interpreter does not run.
version_of() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null |
        grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1 || true
}

at_least_3_10() {
    local major minor rest
    IFS=. read -r major minor rest <<<"$1"
    [ "$major" -gt 3 ] || { [ "$major" -eq 3 ] && [ "$minor" -ge 10 ]; }
}

# Prints the interpreter to make .venv with.
find_python() {
    local candidate path version problem=""
    local need="memtrain needs Python >= 3.10"
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3.10 python3; do
        path="$(command -v "$candidate" || true)"
        version=""
        [ -z "$path" ] || version="$(version_of "$path")"
        if [ -n "$version" ] && ! at_least_3_10 "$version"; then
            problem="$need, found $version ($path); set PYTHON=/path/to/python3.11"
        elif [ -n "$version" ] && ! "$path" -c 'import ensurepip, venv' 2>/dev/null; then
            problem="memtrain needs Python's modules venv and ensurepip, which $path ($version) lacks;"
            problem="$problem install them (Debian, Ubuntu: python${version%.*}-venv) or set PYTHON=/path/to/python3.11"
        elif [ -n "$version" ]; then
            printf '%s\n' "$path"
            return
        fi
        if [ -n "${PYTHON:-}" ]; then
            die "${problem:-$need, but PYTHON=$PYTHON does not run}"
        fi
    done
    die "${problem:-$need, found none; install it or set PYTHON=/path/to/python3.11}"
}

# A .venv that was interrupted, moved with the repository, or whose interpreter is gone, is not usable.
venv_is_usable() {
    local stamp root version
    [ ! -e "$unfinished" ] || return 1
    for stamp in "$venv"/memtrain-installed*; do
        [ -e "$stamp" ] || continue
        read -r root <"$stamp" || true
        [ "$root" = "$repo" ] || return 1
    done
    version="$(version_of "$python")"
    [ -n "$version" ] && at_least_3_10 "$version" || return 1
    "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null 2>&1
}

make_venv() {
    local base have want
    if venv_is_usable; then
        [ -n "${PYTHON:-}" ] || return 0
        have="$(version_of "$python")"
        want="$(version_of "$PYTHON")"
        [ "${have%.*}" = "${want%.*}" ] ||
            die "$venv has Python $have, PYTHON=$PYTHON is ${want:-not runnable}; remove .venv to change it"
        return 0
    fi
    base="$(find_python)"
    printf 'making %s with Python %s (%s)\n' "$venv" "$(version_of "$base")" "$base"
    rm -rf "$venv"
    mkdir "$venv"
    touch "$unfinished"
    "$base" -m venv "$venv" >"$venv/install.log" 2>&1 ||
        die "could not make $venv: $(tail -n 1 "$venv/install.log") (log: $venv/install.log)"
}

# Why the registry cannot be reached, in a few words; nothing where it can. pip's own last words do not tell: with
# constraints, a package that it found nowhere is "conflicting dependencies". So ask for one package more.
registry_problem() {
    local log="$1" probe="$venv/memtrain-probe"
    local reasons='Connection refused|Connection reset by peer|Connection aborted|Name or service not known'
    reasons="$reasons|nodename nor servname provided|Temporary failure in name resolution|Network is unreachable"
    reasons="$reasons|No address associated with hostname|No route to host|Tunnel connection failed|ProxyError"
    reasons="$reasons|[Tt]imed out|certificate verify failed|SSLError|[45][0-9]{2} (Client|Server) Error|IncompleteRead"
    mkdir -p "$probe" || return 0
    "$python" -m pip download -vv --retries 0 --no-input --no-deps -d "$probe" setuptools \
        >"$probe/log" 2>&1 </dev/null || true
    {
        grep -E '^ *ERROR: ' "$log" || true
        grep -E 'Could not fetch URL|^ *ERROR: ' "$probe/log" | grep -v '404 Client Error' || true
    } | grep -oE "$reasons" | tail -n 1 || true
    rm -rf "$probe"
}

explain_failure() {
    local log="$1" reason
    if ! grep -qE 'No space left|Disk quota|Permission denied|Read-only file system' "$log"; then
        reason="$(registry_problem "$log")"
        [ -z "$reason" ] || die "could not install: the package registry cannot be reached ($reason);" \
            "check the network or PIP_INDEX_URL (log: $log)"
    fi
    reason="$(grep -E '^ *(ERROR|error): ' "$log" | grep -v ResolutionImpossible | tail -n 1 |
        sed -E 's/^ *(ERROR|error): //' || true)"
    die "could not install: ${reason:-$(tail -n 1 "$log")} (log: $log)"
}

# The installed state is a function of these: where it lies, the interpreter, what is asked for.
fingerprint() {
    { "$python" --version && cat "$repo/pyproject.toml" "$repo/launch/constraints.txt"; } |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

has_gpu() {
    [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || command -v nvidia-smi >/dev/null 2>&1
}

wants_cpu_torch() {
    case "${MEMTRAIN_TORCH:-auto}" in
    auto) [ "$(uname -s)" = Linux ] && ! has_gpu || return 1 ;;
    cpu) ;;
    default) return 1 ;;
    *) die "MEMTRAIN_TORCH must be auto, cpu or default, got $MEMTRAIN_TORCH" ;;
    esac
    ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'
}

# On Linux the default wheel of torch brings CUDA: 5 GB with what it asks for, where that for CPUs takes 200 MB.
# pip looks for it where it looks for everything (PIP_EXTRA_INDEX_URL, pip.conf); else the default one will do.
install_cpu_torch() {
    local wheel log="$venv/install-torch.log"
    wheel="$(grep -oE '^torch==[0-9.]+' "$repo/launch/constraints.txt")+cpu"
    "$python" -m pip install --no-input --no-deps "$wheel" >"$log" 2>&1 </dev/null ||
        printf 'pip knows no wheel of torch for CPUs (log: %s): installing the default one, gigabytes\n' "$log"
}

install_memtrain() {
    local extra="${1:-}" log="$venv/install.log" state stamp status=0 began=$SECONDS
    make_venv
    # An extra only adds, so its stamp also stands for the installation without one.
    state="$repo"$'\n'"$(fingerprint)"
    for stamp in "$venv/memtrain-installed"${extra:+"-$extra"} "$venv/memtrain-installed-test"; do
        if [ -x "$venv/bin/memtrain" ] && [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then
            return 0
        fi
    done

    printf 'installing memtrain%s into %s: minutes the first time (log: %s)\n' "${extra:+[$extra]}" "$venv" "$log"
    rm -f "$venv"/memtrain-installed*
    touch "$unfinished"
    if wants_cpu_torch; then
        install_cpu_torch
    fi
    # Relative paths, because pip splits the variables at spaces. They hold for the build environments, which
    # -c does not reach: PIP_CONSTRAINT up to pip 26.1, PIP_BUILD_CONSTRAINT from 25.3.
    (
        cd "$repo"
        export PIP_CONSTRAINT="launch/constraints.txt" PIP_BUILD_CONSTRAINT="launch/constraints.txt"
        export PIP_DISABLE_PIP_VERSION_CHECK=1
        "$python" -m pip install --no-input -c launch/constraints.txt -e ".${extra:+[$extra]}"
    ) >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        # A pip that fails before it installs leaves .venv as it was; killed or later, half changed.
        if [ "$status" -lt 128 ] && ! grep -q '^Installing collected packages' "$log"; then
            rm -f "$unfinished"
        fi
        explain_failure "$log"
    fi
    printf '%s\n' "$state" >"$venv/memtrain-installed${extra:+-$extra}"
    rm -f "$unfinished"
    printf 'installed in %d s\n' "$((SECONDS - began))"
}

# torchrun would pass SIGUSR1 on to nobody, and kill ranks 30 s after a signal, a large checkpoint half written.
let_ranks_stop() {
    export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-60}"
}

# Short runs of the demo for a table: one of every setting, "NAME WORDS…" in the array `settings`, and every seed of
# SEEDS (0 1 2), as runs/FOLDER/NAME_seedN; JOBS (2) at a time, a core each. A run that is finished is not made again.
# Arguments: FOLDER, then what every run is told. Afterwards the array `runs` names the folders of all.
train_settings() {
    local folder="$1" seed setting
    shift
    cd "$repo"
    export OMP_NUM_THREADS=1 PATH="$venv/bin:$PATH"
    mkdir -p "runs/$folder"
    for seed in ${SEEDS:-0 1 2}; do
        for setting in "${settings[@]}"; do
            [ -e "runs/$folder/${setting%% *}_seed$seed/summary.json" ] ||
                printf '%s run_id=%s_seed%s seed=%s\n' "${setting#* }" "${setting%% *}" "$seed" "$seed"
        done
    done | xargs -P "${JOBS:-2}" -I '{}' bash -c \
        'log="$1"; shift; memtrain train logger=csv {} "$@" >>"$log" 2>&1' \
        bash "runs/$folder/log" "name=$folder" "$@"
    runs=()
    for setting in "${settings[@]}"; do
        runs+=(runs/"$folder"/"${setting%% *}"_seed*/)
    done
}
