#!/usr/bin/env bash
# From a bare clone to a picture: makes .venv, exports a checkpoint to ONNX and draws with it, all on the CPU. The weights
# are tiny stand-ins made here, so nothing is downloaded but the packages. A second run keeps what the first one made.
#
# PYTHON names the interpreter that makes .venv.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

CKPT=Hyper-SD15-1step-lora
OUT=out/quickstart
REPOS=$OUT/repos
BUNDLE=$OUT/$CKPT
PICTURE=$OUT/cat.png

# Shows a command and runs it with .venv's programs; nothing that it needs comes from the network.
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

# Stand-ins written by an older script are remade, and what was exported from them with them.
make_repos() {
    if [[ -d "$REPOS" && ! scripts/make_tiny_repos.py -nt "$REPOS" ]]; then
        say "Tiny random weights: already in $REPOS"
        return
    fi
    say "Making tiny random weights in place of the real ones"
    rm -rf "$REPOS" "$REPOS.partial" "$BUNDLE"
    mkdir -p "$OUT"
    TRANSFORMERS_VERBOSITY=error "$VENV_PYTHON" scripts/make_tiny_repos.py "$REPOS.partial" >/dev/null
    mv "$REPOS.partial" "$REPOS"
    touch "$REPOS"
}

set_up export
make_repos

say "Exporting $CKPT to an ONNX bundle"
run hypersd export --ckpt "$CKPT" \
    --base "$REPOS/stable-diffusion-v1-5/stable-diffusion-v1-5" \
    --lora "$REPOS/ByteDance/Hyper-SD/$CKPT.safetensors" \
    --precision fp32 --engine none --out "$BUNDLE"

say "Drawing in one step"
run hypersd generate "$BUNDLE" "a photo of a cat" --steps 1 --seed 0 -o "$PICTURE"

say "Done: $ROOT/$PICTURE"
echo "    The weights are tiny and random, so the picture is noise: it shows that every step runs."
echo "    With the real weights (several gigabytes from the Hugging Face Hub):"
echo "        source .venv/bin/activate && hypersd export --ckpt Hyper-SDXL-1step-lora"
