#!/usr/bin/env bash
# Tests the lowest versions that pyproject.toml allows, on Python 3.10: by hand, once for each change of a floor. It is no
# part of CI. benchmarks/README.md has the results.
#
#   scripts/test_floors.sh [PYTHON]    the interpreter of both environments (default: python3.10 of PATH)
#
# The floors are read from pyproject.toml. There are two environments, because an export needs a newer torch than the
# runtime:
#   export    torch's floor in the extra `export`: the exporter's tests and all others below, which export their bundles
#   runtime   torch's floor in the dependencies: the same tests but the exporter's and those of LoRA files, on those
#             bundles; a test that would export one of its own is skipped
# TensorRT's tests are left out: the floors of polygraphy and tensorrt-rtx are what constraints.txt pins.
# They lie in $FLOORS (default: build/floors), take about 14 GB where pip finds only torch's CUDA builds, and are kept:
# a second run installs nothing. PYTEST_ADDOPTS is passed on to pytest, such as "-n 2 --dist worksteal".
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

PYTHON="${1:-python3.10}"
FLOORS="${FLOORS:-$ROOT/build/floors}"
EXTRAS=serve,hub,control,video,openvino # all that the tests below use and that installs without a GPU
ROOMS=(tests/runtime tests/engines tests/samplers tests/families tests/serve tests/video)
EXPORTER=(tests/export tests/weights tests/test_parity.py) # peft, which tests/weights compare with, fails on torch 2.4
REFERENCE=0.36.0 # the newest diffusers that imports on torch 2.4: the runtime's tests compare with it

# floors EXTRA,EXTRA: the lowest versions of the package with these extras, as constraints of pip; of several floors of a
# distribution the highest. Runs in an environment that has hypersd and packaging.
floors() {
    "$FLOORS/export/bin/python" - "$1" <<'PY'
import importlib.metadata
import sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

floors = {}
for line in importlib.metadata.requires("hypersd"):
    requirement = Requirement(line)
    extras = ["", *sys.argv[1].split(",")]
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
        continue
    for specifier in requirement.specifier:
        if specifier.operator == ">=":
            name, floor = canonicalize_name(requirement.name), Version(specifier.version)
            floors[name] = max(floor, floors.get(name, floor))
print(*(f"{name}=={floor}" for name, floor in sorted(floors.items())), sep="\n")
PY
}

# install ENVIRONMENT REQUIREMENT...: with the constraints ENVIRONMENT.txt, and without any package of another environment.
install() {
    local name="$1"
    shift
    say "Installing the floors into $FLOORS/$name"
    "$FLOORS/$name/bin/python" -m pip install -q --disable-pip-version-check -c "$FLOORS/$name.txt" "$@"
}

# run ENVIRONMENT TEST...
run() {
    local name="$1" status=0
    shift
    say "pytest on the floors of $name: $("$FLOORS/$name/bin/python" --version)," \
        "$(grep -E '^(diffusers|numpy|onnx|onnxruntime|openvino|torch|transformers)==' "$FLOORS/$name.txt" | tr '\n' ' ')"
    CI='' PYTHONPATH='' "$FLOORS/$name/bin/python" -m pytest -q -p no:cacheprovider --ignore tests/engines/tensorrt "$@" || status=$?
    ((status == 0)) || failed+=("$name")
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' ||
    die "$PYTHON is not Python 3.10, the lowest that pyproject.toml allows: name one that is."
mkdir -p "$FLOORS"
for name in export runtime; do
    [[ -e "$FLOORS/$name" ]] || "$PYTHON" -m venv "$FLOORS/$name"
done
"$FLOORS/export/bin/python" -m pip install -q --disable-pip-version-check packaging
"$FLOORS/export/bin/python" -m pip install -q --disable-pip-version-check --no-deps -e .
floors "$EXTRAS,export" >"$FLOORS/export.txt"
{
    floors "$EXTRAS"
    floors export | grep -vE '^(torch|diffusers|huggingface-hub)=='
    echo "diffusers==$REFERENCE"
} >"$FLOORS/runtime.txt"
# The exporter's libraries are what the runtime's tests compare with.
mapfile -t references < <(floors export | sed -n 's/^\([^=]*\)==.*/\1/p')
install export -e ".[$EXTRAS,export,dev]"
install runtime -e ".[$EXTRAS,dev]" "${references[@]}"

failed=()
run export --basetemp "$FLOORS/exported" "${EXPORTER[@]}" "${ROOMS[@]}"
HYPERSD_TEST_BUNDLES="$FLOORS/exported" run runtime "${ROOMS[@]}"
((${#failed[@]} == 0)) || die "failed on the floors of: ${failed[*]}"
