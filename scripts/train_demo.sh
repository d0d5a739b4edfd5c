#!/usr/bin/env bash
# Trains the demonstration checkpoints of tests/assets/demo from scratch: about an hour and a half on two cores. An
# interrupted run continues where it stopped; states are kept in out/train_demo. With names of stages, only these run.
# The style LoRAs are trained on the published checkpoints, in minutes, by the stages styles15, stylesxl and publish-styles,
# which run only if they are named.
#
#   scripts/train_demo.sh [--work FOLDER] [--jobs N] [STAGE ...]
#
# A relative FOLDER is taken from the repository root.
# PYTHON names the interpreter that makes .venv.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

set_up export,train-demo

# glibc returns large blocks to the kernel at once, and training asks for them again, which takes half of its time.
for library in /usr/lib/*/libtcmalloc_minimal.so.4 /usr/lib/*/libjemalloc.so.2; do
    if [[ -z "${LD_PRELOAD:-}" && -e "$library" ]]; then
        export LD_PRELOAD="$library"
    fi
done
export HF_HUB_OFFLINE=1 PYTHONPATH="$ROOT/scripts"
exec "$VENV_PYTHON" -m train_demo "$@"
