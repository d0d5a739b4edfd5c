"""Record the API of TensorRT's Python bindings, version by version, for the tests of engines/tensorrt.

PyPI has the wheels with the bindings of ``tensorrt``, but not the libraries that they load. Classes, methods, their
arguments and enums are all in the bindings: with empty libraries in place of the real ones they can be imported and
inspected, although nothing can be built or run. ``tensorrt_rtx`` is recorded as it is installed.

    python scripts/record_tensorrt_api.py                         all versions, into tests/assets/tensorrt_api/
    python scripts/record_tensorrt_api.py --version 11.5.0.1      one more
    python scripts/record_tensorrt_api.py --module tensorrt_rtx   print an installed module's API

It requires Linux, pip, a C compiler and binutils. Add a class to ``CLASSES`` when the package begins to use it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unpacked_wheels import output, run_beside, unpacked_wheel

OUT = Path(__file__).parents[1] / "tests" / "assets" / "tensorrt_api"
DISTRIBUTION = "tensorrt-cu12-bindings"
# The oldest that is supported (of JetPack 6), one that streams no plans either, the last without attention and the
# first with it, the last 10 and both ends of 11.
VERSIONS = ("10.3.0", "10.8.0.43", "10.13.3.9", "10.14.1.48.post1", "10.16.1.11", "11.0.0.114", "11.4.0.106")

# The API that engines/tensorrt uses, and Polygraphy where engines/tensorrt calls it.
CLASSES = (
    "Builder",
    "Dims",
    "IAttention",
    "IAttentionInputLayer",
    "IBuilderConfig",
    "IConstantLayer",
    "IConvolutionLayer",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILayer",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IRuntimeCache",
    "IRuntimeConfig",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
    "Weights",
)
ENUMS = (
    "AttentionNormalizationOp",
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "ExecutionContextAllocationStrategy",
    "LayerType",
    "NetworkDefinitionCreationFlag",
    "ProfilingVerbosity",
    "TensorIOMode",
)
SPECIAL = ("__init__", "__len__", "__getitem__", "__iter__")


# asking a module


def record(module: Any) -> dict[str, Any]:
    """The part of ``CLASSES`` and ``ENUMS`` that a module has."""
    return {
        "version": module.__version__,
        "enums": {name: members(getattr(module, name)) for name in ENUMS if hasattr(module, name)},
        "classes": {name: describe(getattr(module, name)) for name in CLASSES if hasattr(module, name)},
    }


def members(enum: Any) -> dict[str, int]:
    """An enum's members with their values; some have two names for one value."""
    return {name: int(getattr(member, "value", member)) for name, member in enum.__members__.items()}


def describe(cls: type) -> dict[str, Any]:
    """A class's bases, properties (``"r"`` or ``"rw"``), methods with their signatures, and enums inside it."""
    found: dict[str, Any] = {"bases": [base.__name__ for base in cls.__mro__[1:-2]], "properties": {}, "methods": {}}
    for name in sorted(dir(cls)):
        if name.startswith("_") and name not in SPECIAL:
            continue
        value = getattr(cls, name)
        if isinstance(value, property):
            found["properties"][name] = "r" if value.fset is None else "rw"
        elif isinstance(value, type) and hasattr(value, "__members__"):
            found.setdefault("enums", {})[name] = members(value)
        elif lines := list(signatures(name, value.__doc__ or "")):
            found["methods"][name] = lines
    return found


def signatures(name: str, doc: str) -> Iterator[str]:
    """The lines of a docstring that pybind11 wrote: one, or one for each overload after its number."""
    first, *rest = doc.strip().splitlines() or [""]
    overloads = [line.partition(". ")[2] for line in rest if re.match(rf"\d+\. {name}\(", line)]
    for line in overloads or [first]:
        if line.startswith(f"{name}(self"):
            line = re.sub(r"\b\w+_bindings\.\w+\.", "", line)
            # Python 3.12 and 3.13 have names of their own for what older ones take from typing_extensions.
            line = re.sub(r"\b(?:collections\.abc|types)\.(Buffer|CapsuleType)\b", r"typing_extensions.\1", line)
            yield re.sub(rf"^{name}\(self(: \w+)?(, )?", "(", line)


# bindings without libraries


def record_wheel(version: str) -> dict[str, Any]:
    """Record the bindings wheel of a version, with empty libraries beside it."""
    with unpacked_wheel(DISTRIBUTION, version) as root:
        write_empty_libraries(root / "tensorrt_bindings" / "tensorrt.so", root)
        return json.loads(run_beside(root, sys.executable, __file__, "--module", "tensorrt_bindings"))


def write_empty_libraries(bindings: Path, folder: Path) -> None:
    """Write the libraries that ``bindings`` load, with every function that is missing there: it does nothing."""
    needed = re.findall(r"NEEDED.*\[(libnv[^]]+)]", output("readelf", "-d", bindings))
    undefined = [line.split()[-1] for line in output("nm", "-D", "--undefined-only", bindings).splitlines()]
    here = ctypes.CDLL(None)  # what this process has, the bindings will find too
    missing = {symbol for symbol in undefined if symbol.isidentifier() and not hasattr(here, symbol)}
    code = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in sorted(missing))
    for library in needed:
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{library}", "-o", folder / library],
            input=code if library.startswith("libnvinfer.") else "",
            text=True,
            check=True,
        )


# the program


def write(package: str, recorded: dict[str, Any]) -> None:
    """Write a recording, one line for each class and enum."""
    recorded = {"package": package, **recorded}
    parts = []
    for key, value in recorded.items():
        if isinstance(value, dict):
            lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n }")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{package}-{recorded['version']}.json"
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size / 1e3:.0f} KB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what the Python bindings of TensorRT offer.")
    parser.add_argument("--version", help=f"of {DISTRIBUTION}; by default {', '.join(VERSIONS)}")
    parser.add_argument("--module", help="print what this installed module offers, and write nothing")
    arguments = parser.parse_args()
    if arguments.module:
        json.dump(record(importlib.import_module(arguments.module)), sys.stdout)
        return
    for version in [arguments.version] if arguments.version else VERSIONS:
        write("tensorrt", record_wheel(version))
    if not arguments.version:
        write("tensorrt_rtx", record(importlib.import_module("tensorrt_rtx")))


if __name__ == "__main__":
    main()
