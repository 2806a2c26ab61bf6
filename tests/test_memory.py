"""Freed memory stays with the process where the allocator can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

HELD = """
import os, sys
import torch
from course_lib.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def resident_mib():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20

torch.ones(1)
before = resident_mib()
blocks = [torch.ones(2_000_000) for _ in range(12)]  # 8 MB each
used = resident_mib() - before
del blocks
print(used, resident_mib() - before)
"""


def used_and_held(mode: str) -> tuple[float, float]:
    """MiB that twelve blocks take, and what of it is still the process's when they are freed.

    Counted in pages held, not in page faults: how many pages a fault brings is the system's choice.
    """
    command = [sys.executable, "-c", HELD, mode]
    used, held = subprocess.run(command, capture_output=True, check=True).stdout.split()
    return float(used), float(held)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_what_a_step_frees_is_there_for_the_next():
    used, held = used_and_held("keep")
    assert used > 80 and held > 0.9 * used


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_without_being_told_it_would_be_given_back():
    """What makes the test above one that can fail."""
    used, held = used_and_held("leave")
    assert used > 80 and held < 0.1 * used
