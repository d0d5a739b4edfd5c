#!/usr/bin/env bash
# From a bare clone to images: makes .venv, exports a checkpoint to ONNX and generates images with it, all on the CPU. The
# weights are those of the small demonstration networks in tests/assets/demo, so only packages are downloaded. A second
# run reuses the results of the first.
#
# PYTHON names the interpreter that makes .venv.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

CKPT=Hyper-Demo15-1step-lora
OUT=out/quickstart
BUNDLE=$OUT/$CKPT
IMAGE=$OUT/image.png
SHEET=$OUT/contact-sheet.png

# Shows a command and runs it offline with .venv's programs.
run() {
    local word
    printf '$'
    for word in "$@"; do
        case "$word" in
            *[!A-Za-z0-9_./=-]*) printf ' "%s"' "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    HF_HUB_OFFLINE=1 PATH="$ROOT/.venv/bin:$PATH" "$@"
}

set_up export

# --replace: a bundle of older weights is exported again, a bundle of these weights is kept.
say "Exporting $CKPT to an ONNX bundle"
run hypersd export --ckpt "$CKPT" --precision fp32 --backend none --out "$BUNDLE" --replace

say "Generating an image in one step"
run hypersd generate "$BUNDLE" "a small red star left of a large blue ring, on a green striped background" \
    --steps 1 --seed 0 -o "$IMAGE"

say "Generating images of several prompts in 1, 2, 4 and 8 steps"
run python scripts/contact_sheet.py "$SHEET" "$BUNDLE"

say "Done. Look at"
echo "    $ROOT/$IMAGE"
echo "    $ROOT/$SHEET"
echo "    The small networks know coloured shapes and nothing else: $ROOT/tests/assets/demo"
echo "    With the real weights (several gigabytes from the Hugging Face Hub):"
echo "        source .venv/bin/activate && hypersd export --ckpt Hyper-SDXL-1step-lora"
