#!/usr/bin/env bash
# Checks hypersd on this machine's GPU: what runs, the tests marked gpu, and latencies. Writes a report.
#
#   scripts/gpu_check.sh                             report in benchmarks/gpu-NAME-OF-THE-GPU.md
#   scripts/gpu_check.sh --out FILE.md --bundle DIR  elsewhere; also times a bundle of your own (may be repeated)
#
# With PYTHON set nothing is installed: that interpreter has to have hypersd and what it should be tested with.
# Exit code 1 if a test failed; the report says which.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
if [[ -z "${PYTHON:-}" ]]; then
    set_up export,dev,tensorrt-rtx
    PYTHON="$VENV_PYTHON"
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec "$PYTHON" scripts/gpu_report.py "$@"
