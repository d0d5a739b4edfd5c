"""Facts about the machine of a measurement, and memory of a process in bytes."""

from __future__ import annotations

import dataclasses
import platform
import sys
from pathlib import Path
from typing import Any

from ...engines.cores import available_cores

STATUS, MEMINFO, CPUINFO = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/cpuinfo")
EXTENSIONS = (  # as the kernel names them: of x86, then of Arm
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "svebf16", "svei8mm", "sve2"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """A machine.

    Attributes:
        processor: its name.
        extensions: its instruction sets that matter to networks, as the kernel names them; empty if not known.
        cores: the number that the process may use.
        memory: in bytes; None if not known.
        system: the operating system.
    """

    processor: str
    extensions: list[str]
    cores: int
    memory: int | None
    system: str


def this_host(cpuinfo: Path = CPUINFO) -> Host:
    """The machine of this process."""
    facts = _first_processor(cpuinfo)
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return Host(
        processor=facts.get("model name") or platform.processor() or platform.machine(),
        extensions=[name for name in EXTENSIONS if name in flags],
        cores=available_cores(),
        memory=_kibibytes(MEMINFO, "MemTotal"),
        system=platform.platform(),
    )


def peak_host_memory(status: Path = STATUS) -> int | None:
    """The largest resident size of this process so far, pages of mapped weight files included. None if not known."""
    return _kibibytes(status, "VmHWM")


def resident_host_memory(status: Path = STATUS) -> int | None:
    """The resident size of this process now, pages of mapped weight files included. None if not known."""
    return _kibibytes(status, "VmRSS")


def mapped_host_memory(status: Path = STATUS) -> int | None:
    """The part of it that are pages of mapped files, which the system may take back. None if not known."""
    return _kibibytes(status, "RssFile")


def available_memory(meminfo: Path = MEMINFO) -> int | None:
    """Memory that processes can still take without swapping; None if not known."""
    return _kibibytes(meminfo, "MemAvailable")


def _first_processor(cpuinfo: Path) -> dict[str, str]:
    """The kernel's facts about the first processor; empty without any."""
    try:
        first = cpuinfo.read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _kibibytes(file: Path, name: str) -> int | None:
    """The value of a line such as ``VmHWM:  1234 kB``, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class DeviceMemory:
    """Memory of a CUDA device that this process takes, also through libraries that allocate without torch.

    It is measured by the device's free memory: no other process may allocate there at the same time.
    """

    def __init__(self) -> None:
        self._free: int | None = None
        self._largest = 0

    def begin(self) -> None:
        """Count from here on, if torch is loaded and sees a device."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            self._free = torch.cuda.mem_get_info()[0]

    def peak(self) -> int | None:
        """The largest amount so far, with memory that torch freed between two calls; None without device."""
        if self._free is None:
            return None
        torch: Any = sys.modules["torch"]
        taken = self._free - torch.cuda.mem_get_info()[0]
        spare = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        self._largest = max(self._largest, taken + spare)
        return self._largest
