"""
The main command's rollouts, by this checkout and by another one, in turns.

    git worktree add /tmp/before 482f864    # 0.1.0
    python benchmarks/demo_rollouts.py --before /tmp/before

Both play the first batch of `examples/train_bfcl.py`: 64 episodes, 8 tasks with 8 episodes each, with the model after
the supervised warm-up. They sample, so that episodes are as alike as two samples are; times are also given by token.
Each time a process of its own plays the batch twice, and the second one counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
TASKS, GROUP = 8, 8


def prepare(directory: Path) -> None:
    """The warmed-up model and the ids of its training tasks, made as the main command makes them."""
    sys.path.insert(0, str(ROOT))
    from functools import partial

    from transformers import AutoTokenizer
    from trl import ModelConfig, TrlParser

    from seeupo_trl.envs.bfcl import BfclEnvironment
    from seeupo_trl.recipes.arguments import BfclArguments
    from seeupo_trl.recipes.bfcl import choose_tasks, warmed_up
    from seeupo_trl.recipes.cache import default_cache_dir
    from seeupo_trl.recipes.smollm2 import smollm2
    from seeupo_trl.recipes.training import Config

    parser = TrlParser((BfclArguments, Config, ModelConfig))
    config = ROOT / "examples" / "configs" / "smollm2_bfcl.yaml"
    script_args, _, _ = parser.parse_args_and_config(["--config", str(config)])
    base_model = str(smollm2(default_cache_dir()))
    options = {name: getattr(script_args, name) for name in ("tools", "tool_list", "max_user_turns")}
    make_environment = partial(BfclEnvironment, **options)
    train, _ = choose_tasks(script_args, AutoTokenizer.from_pretrained(base_model), make_environment())
    model = warmed_up(base_model, default_cache_dir(), train, make_environment(), script_args)
    job = {"model": str(model), "ids": train["id"][:TASKS], "environment": options}
    (directory / "job.json").write_text(json.dumps(job))


def play(directory: Path) -> None:
    """Play the batch twice with the package that is found first, and print what the second time took."""
    from functools import partial

    import torch

    from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer
    from seeupo_trl.envs.bfcl import BfclEnvironment, load_bfcl

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    job = json.loads((directory / "job.json").read_text())
    everything = load_bfcl(["multi_turn_base"], "train", split_scheme="stratified")

    class Timed(MultiTurnRollout):
        def __call__(self, prompts, trainer):
            super().__call__(prompts, trainer)
            start = time.perf_counter()
            trajectories = super().__call__(prompts, trainer)["trajectories"]
            seconds = time.perf_counter() - start
            tokens = sum(len(turn.action_ids) for one in trajectories for turn in one.turns)
            turns = sum(len(one.turns) for one in trajectories)
            print(json.dumps({"seconds": seconds, "tokens": tokens, "turns": turns, "episodes": len(trajectories)}))
            sys.stdout.flush()
            os._exit(0)  # there is nothing to be trained

    config = SeeUPOConfig(
        output_dir=str(directory / "out"),
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=TASKS,
        num_generations=GROUP,
        max_steps=1,
        max_turns=3,
        max_completion_length=64,
        bf16=True,
        use_cpu=True,
        report_to="none",
        seed=1,
    )
    SeeUPOTrainer(
        model=job["model"],
        args=config,
        train_dataset=everything.filter(lambda row: row["id"] in job["ids"]),
        rollout_func=Timed(partial(BfclEnvironment, **job["environment"])),
    ).train()


def measure(checkout: Path, directory: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, "--play", str(directory)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{checkout} played nothing:\n{process.stderr[-3000:]}")
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        play(args.play)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        prepare(directory)
        checkouts = {"this": ROOT, **({"before": args.before.resolve()} if args.before else {})}
        measured = {name: [] for name in checkouts}
        for _ in range(args.times):
            for name, checkout in checkouts.items():
                measured[name].append(measure(checkout, directory))
                print(name, json.dumps(measured[name][-1]), flush=True)
    print("\n| | s a rollout | turns | tokens | ms a token |\n|---|---:|---:|---:|---:|")
    for name, runs in measured.items():
        seconds, turns, tokens = (statistics.median(run[k] for run in runs) for k in ("seconds", "turns", "tokens"))
        each = statistics.median(1000 * run["seconds"] / run["tokens"] for run in runs)
        print(f"| {name} | {seconds:.1f} | {turns:.0f} | {tokens:.0f} | {each:.1f} |")


if __name__ == "__main__":
    main()
