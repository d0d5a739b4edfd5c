# Sourced by quickstart.sh, test.sh and others: goes to the repository root and makes .venv. Not a program of its own.
# shellcheck shell=bash

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$ROOT" || exit 1
VENV_PYTHON="$ROOT/.venv/bin/python"
PIP_LOG="$ROOT/.venv/install.log"
STAMP="$ROOT/.venv/.installed"

say() { printf '==> %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_python_310() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# The interpreter that makes .venv: $PYTHON, else python3, else the newest of the others.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_python_310 "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.10 or newer; name one that is."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if is_python_310 "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.10 or newer on PATH; install one, or name it: PYTHON=/path/to/python $0"
}

make_venv() {
    local python
    if [[ -e .venv ]]; then
        is_python_310 "$VENV_PYTHON" || die ".venv has no working Python 3.10 or newer; remove $ROOT/.venv and run again."
        return
    fi
    python="$(find_python)"
    say "Making .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
        rm -rf .venv
        die "$python could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)."
    fi
}

# One hash of all that an installed environment depends on.
fingerprint() {
    "$VENV_PYTHON" - "$ROOT" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
parts = [sys.version, str(root), *((root / name).read_text("utf-8") for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

# is_installed FINGERPRINT EXTRAS: the stamp, written after an install, has this fingerprint and all of these extras.
is_installed() {
    local fingerprint extras extra
    [[ -f "$STAMP" ]] || return 1
    read -r fingerprint extras <"$STAMP"
    [[ "$fingerprint" == "$1" ]] || return 1
    for extra in ${2//,/ }; do
        [[ ",$extras," == *",$extra,"* ]] || return 1
    done
}

run_pip() { "$VENV_PYTHON" -m pip install -q --disable-pip-version-check -c constraints.txt "$@" >>"$PIP_LOG" 2>&1; }

# PyTorch goes first, in the one version of constraints.txt. On Linux pip's default index serves the build with CUDA, of
# several gigabytes. For the small CPU build tell pip of PyTorch's CPU index (PIP_EXTRA_INDEX_URL, or extra-index-url in
# pip.conf): pip reads those here as anywhere.
install_packages() {
    local torch
    torch="$(grep -E '^torch==' constraints.txt)"
    : >"$PIP_LOG"
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || "$VENV_PYTHON" -m ensurepip >>"$PIP_LOG" 2>&1 || return 1
    say "Installing $torch and hypersd[$1] (the first time this takes minutes)"
    run_pip "$torch" || return 1
    run_pip -e ".[$1]"
}

# set_up EXTRAS: makes sure that .venv holds the package with these extras. Once it does, this needs no network.
set_up() {
    local extras="$1" fingerprint
    make_venv
    fingerprint="$(fingerprint)"
    if is_installed "$fingerprint" "$extras"; then
        return
    fi
    if install_packages "$extras"; then
        printf '%s %s\n' "$fingerprint" "$extras" >"$STAMP"
    elif [[ -f "$STAMP" && "${CI:-}" != true ]]; then
        warn "could not bring .venv up to date (offline? pip's words: $PIP_LOG); going on with what it has."
    else
        grep -v '^WARNING' "$PIP_LOG" | tail -n 20 >&2 || true
        die "the packages could not be installed; the first run needs the network (pip's words: $PIP_LOG)."
    fi
}
