"""Freed memory stays with the process where the allocator can be told so."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from course_lib.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()

def steps(count):
    for _ in range(count):
        blocks = [torch.ones(2_000_000) for _ in range(12)]  # 8 MB each

steps(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    """Pages that four steps asked the system for, after four others."""
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_step_does_not_pay_again_for_the_memory_of_the_last():
    assert faults("keep") < faults("leave") / 10
