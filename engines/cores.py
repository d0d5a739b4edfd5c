"""Processor cores to compute with. Imports the standard library alone: workers of other interpreters use it."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores(quota: Path = CGROUP_QUOTA) -> int:
    """Cores that this process may use, which in a container are fewer than the machine has.

    ``quota`` is the file with the processor time of the control group (cgroup v2: "MICROSECONDS PERIOD").
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(share) / int(period))))
    except (OSError, ValueError):  # no such file, or "max": no quota
        return cores
