"""What scripts for a CPU do between rollouts and updates."""

import subprocess
import sys

import pytest


FREES = """
import sys
import torch
from seeupo_trl.recipes.training import return_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

large = torch.ones(4_000_000)  # 16 MB: freed, it makes glibc keep pieces of that size
del large
before, kept, freed = resident(), [], []
for _ in range(20):
    freed.append(torch.ones(2_000_000))
    kept.append(torch.ones(100_000))  # between them, so that the end of the heap stays in use
freed.clear()
if sys.argv[1] == "returned":
    return_memory(torch.device("cpu"))
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_given_back():
    megabytes = [
        float(subprocess.check_output([sys.executable, "-c", FREES, how]).splitlines()[-1])
        for how in ("returned", "as it is")
    ]
    assert megabytes[0] < 20 < 100 < megabytes[1]  # of 160, and 8 that are in use
