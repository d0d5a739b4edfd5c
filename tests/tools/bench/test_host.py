"""Facts about a machine, from the files of its kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypersd.tools.bench.host import mapped_host_memory, peak_host_memory, resident_host_memory, this_host

X86 = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 avx512_unheard_of

processor\t: 1
model name\t: another
flags\t\t: amx_tile
"""
ARM = """processor\t: 0
Features\t: fp asimd evtstrm asimdhp asimddp sve bf16 i8mm
CPU part\t: 0xd40
"""


@pytest.mark.parametrize(
    ("text", "extensions"),
    [
        (X86, ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"]),
        (ARM, ["asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve"]),
        ("", []),
    ],
)
def test_instruction_sets_are_the_first_processors(text: str, extensions: list[str], tmp_path: Path) -> None:
    """In one order, whatever the kernel's is; a file without them gives none."""
    (tmp_path / "cpuinfo").write_text(text)
    host = this_host(tmp_path / "cpuinfo")
    assert host.extensions == extensions
    assert host.processor
    assert this_host(tmp_path / "none").extensions == []


def test_peak_and_resting_memory(tmp_path: Path) -> None:
    """The kernel writes kibibytes; a system without the file has no figures."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssFile:\t     512 kB\n")
    assert (peak_host_memory(status), resident_host_memory(status)) == (2 << 20, 1 << 20)
    assert mapped_host_memory(status) == 1 << 19
    assert (peak_host_memory(tmp_path / "none"), resident_host_memory(tmp_path / "none")) == (None, None)
