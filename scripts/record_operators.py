"""Record which operators ONNX Runtime's CUDA provider and TensorRT-RTX's parser take, version by version.

Neither is asked on a GPU. TensorRT-RTX's parser answers by itself. ONNX Runtime's wheels list their kernels once the
CUDA provider is loaded, and with empty libraries in place of CUDA's it can be.

    python scripts/record_operators.py                    all of them, into tests/assets/operators/
    python scripts/record_operators.py --version 1.32.0   one more version of onnxruntime-gpu

It requires Linux, pip, a C compiler and binutils. The lists of TensorRT's parser in the same folder come from
onnx-tensorrt's docs/operators.md; each names the commit.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from unpacked_wheels import output, run_beside, unpacked_wheel

OUT = Path(__file__).parents[1] / "tests" / "assets" / "operators"
DISTRIBUTION = "onnxruntime-gpu"
# The last for Python 3.10, the last without Attention, the first and the last with it but without Sin and Cos, the
# first with all, and the newest.
VERSIONS = ("1.23.2", "1.24.4", "1.25.0", "1.26.0", "1.27.0", "1.31.1")
CC = ("cc", "-shared", "-fPIC", "-w", "-x", "c", "-")
LAST = 2**31 - 1  # the end of a range of opsets that has none
NEEDED_SINCE = 18  # opsets before it are never asked for

ASK = """
import json
from onnxruntime.capi import onnxruntime_pybind11_state as ort
kernels = [k for k in ort.get_all_opkernel_def() if not k.domain]
print("KERNELS" + json.dumps([(k.op_name, k.provider, k.version_range, k.type_constraints) for k in kernels]))
"""


def record_wheel(version: str) -> dict[str, Any]:
    """The kernels of a version's wheel, for operators of ONNX's own domain."""
    with unpacked_wheel(DISTRIBUTION, version) as root:
        libraries = write_empty_libraries(root / "onnxruntime" / "capi", root)
        kernels = json.loads(run_beside(root, sys.executable, "-c", ASK).partition("KERNELS")[2])
    return {
        "runtime": DISTRIBUTION,
        "version": version,
        "cuda": next(int(version) for version in re.findall(r"libcudart\.so\.(\d+)", " ".join(libraries))),
        "source": "onnxruntime_pybind11_state.get_all_opkernel_def() of the wheel",
        "cpu": sorted({name for name, provider, *_ in kernels if provider == "CPUExecutionProvider"}),
        "operators": merged(entry for entry in kernels if entry[1] == "CUDAExecutionProvider"),
    }


def merged(kernels: Any) -> dict[str, list[list[Any]]]:
    """By operator: the first and the last opset of a kernel (None if it has no end), and its first input's types."""
    found: dict[str, dict[tuple[int, int], set[str]]] = {}
    for name, _, (first, last), constraints in kernels:
        if last >= NEEDED_SINCE:
            types = next((constraints[key] for key in ("T", "T1", *sorted(constraints)) if key in constraints), [])
            found.setdefault(name, {}).setdefault((first, last), set()).update(types)
    return {
        name: [
            [first, None if last == LAST else last, " ".join(sorted(re.findall(r"tensor\((\w+)\)", " ".join(types))))]
            for (first, last), types in sorted(ranges.items())
        ]
        for name, ranges in sorted(found.items())
    }


def write_empty_libraries(capi: Path, folder: Path) -> list[str]:
    """Write the libraries of CUDA and TensorRT that the providers load: each of their functions does nothing.

    Returns:
        The names of the libraries, as the providers ask for them.
    """
    providers = [capi / f"libonnxruntime_providers_{name}.so" for name in ("cuda", "tensorrt")]
    needed = sorted(
        {name for path in providers for name in re.findall(r"\[(lib(?:cu|nv)[^]]+)]", output("readelf", "-d", path))}
    )
    symbols = sorted({symbol for path in providers for symbol in undefined(path)})
    for library in needed:
        own = [symbol.partition("@")[0] for symbol in symbols if symbol.endswith(f"@{library}")]
        if library.startswith("libcudart"):  # any library will do for functions without a version
            own += [symbol for symbol in symbols if re.match(r"(cu[A-Z]|create|get|initLib)\w+$", symbol)]
        versions = folder / f"{library}.map"  # the loader checks the versions that the providers ask for
        versions.write_text(f"{library} {{ global: *; }};\n")
        subprocess.run(
            [*CC, f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}", "-o", str(folder / library)],
            input="".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in own),
            text=True,
            check=True,
        )
    return needed


def undefined(library: Path) -> list[str]:
    return [line.split()[-1] for line in output("nm", "-D", "--undefined-only", library).splitlines()]


def record_rtx() -> dict[str, Any]:
    """The operators that the installed TensorRT-RTX's parser says it takes; it lists no types."""
    import onnx
    import tensorrt_rtx

    logger = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    network = tensorrt_rtx.Builder(logger).create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, logger)
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain})
    return {
        "parser": "TensorRT-RTX",
        "release": tensorrt_rtx.__version__,
        "source": "OnnxParser.supports_operator() of the installed package",
        "operators": {name: "" for name in names if parser.supports_operator(name)},
    }


def write(name: str, recorded: dict[str, Any]) -> None:
    """Write a list, one line for each operator."""
    lines = (f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in recorded.pop("operators").items())
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in recorded.items()]
    parts.append(' "operators": {\n' + ",\n".join(lines) + "\n }")
    path = OUT / f"{name}.json"
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the operators that runtimes take.")
    parser.add_argument("--version", help=f"of {DISTRIBUTION}; by default {', '.join(VERSIONS)}, and TensorRT-RTX")
    arguments = parser.parse_args()
    for version in [arguments.version] if arguments.version else VERSIONS:
        write(f"onnxruntime-gpu-{version}", record_wheel(version))
    if not arguments.version:
        recorded = record_rtx()
        write(f"tensorrt_rtx-{recorded['release']}", recorded)


if __name__ == "__main__":
    main()
