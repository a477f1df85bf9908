"""Runs an example script; DeepSpeed compiles nothing for the CPU: `python launched_example.py SCRIPT ARGUMENTS`."""

import runpy
import sys
from pathlib import Path

import deepspeed


if __name__ == "__main__":
    # the operation for communication in shared memory takes a minute to compile
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
