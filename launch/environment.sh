# shellcheck shell=bash
# Sourced by the launch scripts, not started. Makes sure that this machine can run mage_ds, then puts its environment
# first on the PATH: the active virtual environment, or .venv of the checkout. What is finished is not done again.
#
# Gives the scripts: ROOT (the checkout), stage TITLE TIME, fail MESSAGE, free_port, find_accelerators; and stops them at
# the first error with one line.

set -Eeuo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
SETUP_LOG=$ROOT/.setup.log

stage() { printf '\n== %s (expected: %s)\n' "$1" "$2"; }

fail() {
    trap - ERR
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}

# A subshell leaves the message to the script.
trap '[ "$BASH_SUBSHELL" -gt 0 ] || fail "line $LINENO failed: $BASH_COMMAND"' ERR

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

# Debian packages: a C++ compiler and Python's headers (DeepSpeed and torch compile small extensions when they are
# first used), and what makes a virtual environment.
missing_packages() {
    local python=$1
    command -v g++ >/dev/null || echo g++
    if [ -z "$python" ]; then
        echo python3 python3-venv python3-dev
        return
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())' || echo python3-dev
}

install_packages() {
    local missing
    missing=$(missing_packages "$1" | xargs)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "missing: $missing. As root on Debian or Ubuntu: apt-get install $missing"
    fi
    # shellcheck disable=SC2086  # a list of words
    apt_install $missing
}

apt_install() {
    stage "installing Debian packages: $*" "1 minute"
    if ! { apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@"; } \
        >"$SETUP_LOG" 2>&1; then
        fail "apt-get could not install $*: $(tail -n 1 "$SETUP_LOG") (all of it: $SETUP_LOG)"
    fi
}

# Exit 0 where everything that mage_ds needs can be found, and mage_ds is this checkout.
complete() {
    (cd / && python - "$ROOT") <<'PYTHON'
import importlib.util, pathlib, sys

def place(name):
    try:
        return importlib.util.find_spec(name)
    except ImportError:
        return None

needed = """torch torchvision deepspeed timm numpy scipy PIL yaml pydantic safetensors tensorboard matplotlib ffmpeg
sklearn skimage torch_fidelity lpips pytest xdist ruff nvidia.dali mage_ds""".split()
found = {name: place(name) for name in needed}
here = found["mage_ds"] and pathlib.Path(found["mage_ds"].origin).is_relative_to(sys.argv[1])
sys.exit(not (here and all(found.values())))
PYTHON
}

install_python_packages() {
    local stamp=$VIRTUAL_ENV/mage_ds.stamp wanted extras=test,cuda13
    wanted="$ROOT $(sha256sum <"$ROOT/setup.py")"
    if complete && [ "$(cat "$stamp" 2>/dev/null || echo "$wanted")" = "$wanted" ]; then
        return
    fi
    # Two DALI wheels would overwrite each other: one that is there stays.
    if (cd / && python -c 'import nvidia.dali') 2>/dev/null; then extras=test; fi
    stage "installing Python packages into $VIRTUAL_ENV" "3 minutes, 6 GB"
    if ! python -m pip install -e "$ROOT[$extras]" >"$SETUP_LOG" 2>&1; then
        fail "pip could not install the packages: $(grep -i error "$SETUP_LOG" | tail -n 1) (all of it: $SETUP_LOG)"
    fi
    printf '%s\n' "$wanted" >"$stamp"
}

# A port that nothing uses now.
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# ACCELERATORS: the number of this machine's GPUs; without any, of two ranks on the CPU's cores (DS_ACCELERATOR=cpu).
find_accelerators() {
    ACCELERATORS=0
    if [ "${DS_ACCELERATOR:-cuda}" = cuda ] && command -v nvidia-smi >/dev/null; then
        ACCELERATORS=$(python -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null) || ACCELERATORS=0
    fi
    if [ "$ACCELERATORS" = 0 ]; then
        export DS_ACCELERATOR=cpu
        ACCELERATORS=$(python -c 'import os; print(min(2, len(os.sched_getaffinity(0))))')
    fi
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    base_python=$(find_python)
    install_packages "$base_python"
    [ -n "$base_python" ] || base_python=$(find_python)
    [ -n "$base_python" ] || fail "no Python 3.10 or newer is installed: install one, or activate an environment of it"
    VIRTUAL_ENV=$ROOT/.venv
    if ! "$VIRTUAL_ENV/bin/python" -c '' 2>/dev/null; then
        stage "making the virtual environment .venv" "10 seconds"
        "$base_python" -m venv --clear "$VIRTUAL_ENV"
    fi
    export VIRTUAL_ENV
else
    install_packages "$VIRTUAL_ENV/bin/python"
fi
PATH=$VIRTUAL_ENV/bin:$PATH
install_python_packages
