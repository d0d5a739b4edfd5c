#!/usr/bin/env bash
# Checks hypersd on this machine's GPU: images of every backend, the tests marked gpu, latency. Writes a report.
#
#   scripts/gpu_check.sh                             report in benchmarks/gpu-NAME-OF-THE-GPU.md
#   scripts/gpu_check.sh --out FILE.md --bundle DIR  elsewhere; also measures a bundle of your own (may be repeated)
#
# Paths are relative to the repository root. The environment is .venv-gpu, because onnxruntime-gpu would replace .venv's
# onnxruntime. With PYTHON set nothing is installed: that interpreter must have hypersd and the backends to check. Exit
# code 1 if anything failed or no image was generated on the GPU; the report has the reasons.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

GPU_VENV="$ROOT/.venv-gpu"

# Replaces common.sh's function, which makes .venv.
make_venv() {
    local python
    if is_python_310 "$VENV_PYTHON"; then
        return
    fi
    [[ ! -e "$GPU_VENV" ]] || die "$GPU_VENV has no working Python 3.10 or newer; remove it and run again."
    python="$(find_python)"
    say "Making $GPU_VENV with $("$python" --version)"
    if ! "$python" -m venv "$GPU_VENV"; then
        rm -rf -- "$GPU_VENV"
        die "$python could not make a virtual environment (on Debian and Ubuntu: apt install python3-venv)."
    fi
    printf '*\n' >"$GPU_VENV/.gitignore"
}

has_cuda_provider() {
    "$VENV_PYTHON" -c 'import sys, onnxruntime
sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers())' >/dev/null 2>&1
}

# A backend that cannot be installed is reported as not checked.
install_rest() {
    if ! "$VENV_PYTHON" -c 'import tensorrt' >/dev/null 2>&1; then
        say "Installing tensorrt, if pip finds its libraries"
        run_pip -e '.[tensorrt]' || warn "TensorRT was not installed and will not be checked (pip's words: $PIP_LOG)."
    fi
    # Last and alone: it provides the same module as the onnxruntime that hypersd requires.
    if ! has_cuda_provider; then
        say "Installing onnxruntime-gpu"
        "$VENV_PYTHON" -m pip uninstall -q -y onnxruntime >>"$PIP_LOG" 2>&1 || true
        if ! run_pip --no-deps --force-reinstall onnxruntime-gpu; then
            warn "ONNX Runtime has no CUDA provider, which will not be checked (pip's words: $PIP_LOG)."
            run_pip --no-deps onnxruntime || true
        fi
    fi
}

if [[ -z "${PYTHON:-}" ]]; then
    VENV_PYTHON="$GPU_VENV/bin/python"
    PIP_LOG="$GPU_VENV/install.log"
    # shellcheck disable=SC2034 # common.sh reads it
    STAMP="$GPU_VENV/.installed"
    set_up export,dev,tensorrt-rtx,train-demo
    install_rest
    PYTHON="$VENV_PYTHON"
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec "$PYTHON" scripts/gpu_report.py "$@"
