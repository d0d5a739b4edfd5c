"""Ray without a word to the network, a dashboard, or a memory monitor that kills on a machine that others use, too."""

from __future__ import annotations

import os

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",  # nothing is written into the home folder
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_memory_monitor_refresh_ms="0",
)
