"""What this machine is, for those who read figures that were taken on it."""

from __future__ import annotations

import platform
from pathlib import Path

from ...engines.cores import available_cores
from .memory import total_memory
from .report import Machine

CPUINFO = Path("/proc/cpuinfo")
EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16")


def this_machine(cpuinfo: Path = CPUINFO) -> Machine:
    """Look around."""
    facts = _first_processor(cpuinfo)
    flags = facts.get("flags", "").split()
    return Machine(
        processor=facts.get("model name") or platform.processor() or platform.machine(),
        extensions=[name for name in EXTENSIONS if name in flags],
        cores=available_cores(),
        memory=total_memory(),
        system=platform.platform(),
    )


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    """What the kernel says of the first processor; nothing where it does not."""
    try:
        first = cpuinfo.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
