"""Processes that have done their work end with exit code 0, whatever the threads of Gloo are at."""

import sys

from launching import HELPERS, run_command


def test_a_collective_whose_thread_still_holds_tensors_neither_aborts_nor_blocks_the_process():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = run_command([*launcher, str(HELPERS / "gloo_exit_run.py")], timeout=60)  # it takes 5
    assert finished.returncode == 0, finished.stderr[-4000:]
