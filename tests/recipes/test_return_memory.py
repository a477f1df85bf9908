"""What scripts for a CPU do so that memory does not grow."""

import subprocess
import sys

import pytest
import torch


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


MULTIPLIES = """
import sys
import torch
from seeupo_trl.recipes.training import Config, prepare_cpu

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

config = Config(output_dir=sys.argv[1], use_cpu=True, bf16=False)
if sys.argv[2] == "prepared":
    prepare_cpu(config)
weight, before = torch.randn(1536, 576, dtype=torch.bfloat16), resident()
for length in range(1, 500):
    torch.nn.functional.linear(torch.randn(length, 576, dtype=torch.bfloat16), weight)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this CPU")
def test_kernels_of_few_shapes_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    megabytes = [
        float(subprocess.check_output([sys.executable, "-c", MULTIPLIES, str(tmp_path), how]).splitlines()[-1])
        for how in ("prepared", "as it is")
    ]
    assert megabytes[0] < megabytes[1] - 50
