#!/usr/bin/env bash
# Lints, type-checks and tests the package. Makes .venv the first time; later runs need no network.
#
#   scripts/test.sh                     ruff, pyright, codespell, shellcheck, the documentation and the whole suite
#   scripts/test.sh tests/runtime -x    pytest alone, with these arguments; paths are from the repository root
#
# PYTHON names the interpreter that makes .venv. With CI=true a check that cannot run is a failure.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# pyright runs on Node: the one on PATH, else one that its Python package downloads.
type_check() {
    local log=".venv/pyright.log"
    export PYRIGHT_PYTHON_IGNORE_WARNINGS=1
    if "$VENV_PYTHON" -m pyright --version >"$log" 2>&1; then
        "$VENV_PYTHON" -m pyright
    elif [[ "${CI:-}" == true ]]; then
        tail -n 20 "$log" >&2
        return 1
    else
        warn "types were not checked: pyright found no Node and could not fetch one (its words: $ROOT/$log)."
    fi
}

# actionlint is no Python package with a binary: it runs where it is installed.
check_workflows() {
    local actionlint
    actionlint="$(command -v actionlint || true)"
    [[ -z "$actionlint" ]] || "$actionlint"
}

check_shell() { git ls-files -z '*.sh' .ci/run | xargs -0 .venv/bin/shellcheck -x; }

# The tests start a few hundred processes: without bytecode each of them would compile the package anew.
unset PYTHONDONTWRITEBYTECODE
set_up export,dev,tensorrt-rtx,openvino,train-demo,ray,video,docs

if (($# == 0)); then
    failed=()
    say "ruff check"
    "$VENV_PYTHON" -m ruff check . || failed+=("ruff check")
    say "ruff format --check"
    "$VENV_PYTHON" -m ruff format --check . || failed+=("ruff format --check")
    say "pyright"
    type_check || failed+=("pyright")
    say "codespell, shellcheck, actionlint"
    .venv/bin/codespell || failed+=("codespell")
    check_shell || failed+=("shellcheck")
    check_workflows || failed+=("actionlint")
    say "mkdocs build --strict"
    NO_MKDOCS_2_WARNING=1 "$VENV_PYTHON" -m mkdocs build --strict --quiet || failed+=("mkdocs build")
    if ((${#failed[@]})); then
        die "failed: $(printf '%s; ' "${failed[@]}")tests were not run."
    fi
    say "pytest"
    set -- -n 2 --dist worksteal # exporting is one thread's work; what is exported is shared (tests/conftest.py)
fi
exec "$VENV_PYTHON" -m pytest "$@"
