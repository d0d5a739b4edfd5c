"""Memory of a process and of the machine, in bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")


def peak_host_memory(status: Path = STATUS) -> int | None:
    """The largest resident size of this process so far; pages of mapped weight files are in it. None if not known."""
    return _kibibytes(status, "VmHWM")


def available_memory(meminfo: Path = MEMINFO) -> int | None:
    """What processes can still take without swapping; None if not known."""
    return _kibibytes(meminfo, "MemAvailable")


def total_memory(meminfo: Path = MEMINFO) -> int | None:
    """The machine's; None if not known."""
    return _kibibytes(meminfo, "MemTotal")


def _kibibytes(file: Path, name: str) -> int | None:
    """A line such as ``VmHWM:  1234 kB``."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


class DeviceMemory:
    """What a process takes of its CUDA device, the libraries' own memory besides torch's included.

    It is the device's free memory that is watched: other processes have to hold still meanwhile.
    """

    def __init__(self) -> None:
        self._free: int | None = None
        self._largest = 0

    def begin(self) -> None:
        """From here on what is taken counts, if torch is there and sees a device."""
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            self._free = torch.cuda.mem_get_info()[0]

    def peak(self) -> int | None:
        """The most that was taken so far; None without a device. What torch freed between two calls is not missed."""
        if self._free is None:
            return None
        torch: Any = sys.modules["torch"]
        taken = self._free - torch.cuda.mem_get_info()[0]
        spare = torch.cuda.max_memory_reserved() - torch.cuda.memory_reserved()
        self._largest = max(self._largest, taken + spare)
        return self._largest
