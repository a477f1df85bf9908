"""
One process of `test_gloo_exit.py`: a thread of Gloo waits for the interpreter's lock when the script ends.

`torchrun --nproc_per_node 2 gloo_exit_run.py`
"""

import sys
import time

import torch
from torch.nn.parallel import DistributedDataParallel

from seeupo_trl.distributed.backends import let_gloo_finish


torch.distributed.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(2, 2))  # keeps the threads alive
let_gloo_finish()
sys.setswitchinterval(1000)  # no thread gets the lock that this one does not give up
gathered = [torch.ones(4) for _ in range(2)]
torch.distributed.all_gather(gathered, torch.ones(4), async_op=True)
end = time.monotonic() + 1
while time.monotonic() < end:
    pass
