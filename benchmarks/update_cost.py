"""
What the update phase of one iteration costs, schedule by schedule.

    python benchmarks/update_cost.py                                  # six minutes on one CPU core
    python benchmarks/update_cost.py --no-run --count-model 14B       # FLOPs only, nothing is computed
    python benchmarks/update_cost.py --device cuda --run-model 0.6B --scale 1

Tokens and FLOPs are counted at full lengths, the FLOPs by torch's `FlopCounterMode` on a model without data (`meta`
device) for every forward and backward pass that the schedule makes. Attention is counted as its kernels are called:
query length times key length for each call, causal or not. Seconds and peak memory are measured on a small model with
all lengths multiplied by `--scale`, each schedule in a process of its own; memory is what the update adds to the
process (to the device, on CUDA). Host seconds are those of laying out micro-batches, trees and block masks at full
lengths.

Schedules, all with micro-batches of up to 8 trajectories:

- reference: the authors' code. For each turn an old pass, a training pass and a new pass over all trajectories, in
  rows padded to the longest one; trajectories without that turn or without advantage are computed all the same.
- rows, trees: this package, one update a turn, with `packing="rows"` and `packing="tree"`.
- trees, U updates: the same with `max_turn_updates=U`.
- simultaneous: one update of all turns in rows (`update_order="simultaneous"`): what a GSPO step costs.
- floor: each distinct token of each turn's tree once forward and once backward; a turn's tree ends with the action
  after it, whose new log-probabilities `M` needs.

The last column is what a schedule computes, in tokens, compared with the floor of its own blocks of turns. A token
without backward pass counts as a third.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head
from update_schedules import (
    SHAPES,
    OneProcess,
    Recorder,
    Shape,
    config_of,
    make_episodes,
    reference_passes,
    schedules_of,
    updater_of,
)

from seeupo_trl.scoring.interface import DUMMY_KEY
from seeupo_trl.scoring.rows import RowBatch
from seeupo_trl.scoring.token_tree import tree_size
from seeupo_trl.scoring.tree_attention import RUNS, use_attention
from seeupo_trl.scoring.trees import TreeScorer


# hidden size, intermediate size, layers, heads, key-value heads, head size, vocabulary
MODELS = {
    "tiny": (128, 384, 4, 4, 2, 32, 2048),
    "0.6B": (1024, 3072, 28, 16, 8, 128, 151936),
    "14B": (5120, 17408, 40, 40, 8, 128, 151936),
}


def make_model(name: str, device: str, dtype: torch.dtype, num_layers: int | None = None) -> Qwen3ForCausalLM:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS[name]
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=40960,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).train()
    add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    return model


# --- Counting --------------------------------------------------------------------------------------------------------


class FlopCount:
    """FLOPs of passes on a model without data; equal passes are counted once."""

    def __init__(self, model_name: str):
        self.num_layers = MODELS[model_name][2]
        # in float64 the scorer takes the plain head, which runs on the `meta` device
        models = [make_model(model_name, "meta", torch.float64, layers) for layers in (1, 2)]
        self.scorers = [(TreeScorer(model, 0, 0.9, packing="tree"), model) for model in models]
        self._known: dict[tuple, int] = {}

    def __call__(self, batch, with_grad: bool) -> int:
        if isinstance(batch, RowBatch):
            scored = sum(end - start for row in batch.rows for start, end in row.spans.values())
            signature = (len(batch.rows), batch.length, scored, with_grad)
        else:
            runs = tuple((run.end - run.start, len(run.path)) for run in batch.tree.runs)
            signature = (runs, len(batch.scored()[0]), with_grad)
        if signature not in self._known:
            one, two = (self._count(batch, with_grad, *pair) for pair in self.scorers)
            self._known[signature] = one + (self.num_layers - 1) * (two - one)  # layers are alike
        return self._known[signature]

    @staticmethod
    def _count(batch, with_grad: bool, scorer: TreeScorer, model: torch.nn.Module) -> int:
        # without data there is no telling whether a mask is needed; this implementation does not ask
        attention = use_attention(model.config, RUNS)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_grad), attention:
            scores, _ = scorer.score(model, batch)
            if with_grad:
                sum(score.logps.sum() for score in scores.values()).backward()
        return counter.get_total_flops()


def count(shape: Shape, flop_count: FlopCount) -> dict[str, dict[str, float]]:
    """Tokens and FLOPs of every schedule, and the host's seconds for laying out its micro-batches."""
    results = {}
    for schedule in schedules_of(shape):
        episodes = make_episodes(shape, vocabulary=50000)
        buffer = episodes.buffer
        host = 0.0
        if schedule == "reference":
            passes = [one for turn in reference_passes(episodes.trajectories) for one in turn]
        else:
            recorder = Recorder(
                TreeScorer(flop_count.scorers[0][1], 0, 0.9, packing=config_of(schedule, shape).packing)
            )
            lock_step = OneProcess(torch.nn.Linear(1, 1), "cpu")
            updater_of(episodes, config_of(schedule, shape), lock_step, recorder).run()
            passes, host = recorder.passes, recorder.seconds
        results[schedule] = {
            "train": sum(batch.num_tokens for batch, with_grad in passes if with_grad),
            "no_grad": sum(batch.num_tokens for batch, with_grad in passes if not with_grad),
            "flops": sum(flop_count(*one) for one in passes),
            "host": host,
        }
        if schedule != "reference":
            floor = sum(tree_size([buffer.sequence(key) for key in keys]) for keys in recorder.trained)
            results[schedule]["floor"] = floor
        if schedule == "trees":
            results["reference"]["floor"] = floor
            flops = sum(flop_count(*one) for one in passes if one[1])
            results["floor"] = {"train": floor, "no_grad": 0, "flops": flops, "host": 0.0, "floor": floor}
    return results


# --- Measuring -------------------------------------------------------------------------------------------------------


@contextmanager
def peak_memory(device: str, result: dict[str, float]) -> Iterator[None]:
    """Largest memory in use inside the context beyond what is in use at its start, in MiB, as `result["memory"]`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        result["memory"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return

    def resident(name):
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) / 2**10

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    yield
    result["memory"] = resident("VmHWM") - before


def measure(schedule: str, shape: Shape, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and peak memory of one iteration's update, in this process."""
    model = make_model(args.run_model, args.device, getattr(torch, args.dtype))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    lock_step = OneProcess(model, args.device)
    scorer = TreeScorer(model, 0, 0.9, packing=config_of(schedule, shape).packing)
    result: dict[str, float] = {}

    def run():
        episodes = make_episodes(shape, model.config.vocab_size)
        if schedule != "reference":
            updater_of(episodes, config_of(schedule, shape), lock_step, scorer).run()
            lock_step.step()
            return
        for passes in reference_passes(episodes.trajectories):
            for batch, with_grad in passes:
                with torch.set_grad_enabled(with_grad):
                    scores, _ = scorer.score(model, batch)
                if with_grad:
                    lock_step.backward(sum(score.logps.sum() for score in scores.values()) * 0.0)
            lock_step.step()

    if args.device == "cuda":
        run()  # compiles kernels
        torch.cuda.synchronize()
    else:
        lock_step.backward(scorer.score(model, scorer.dummy_batch())[0][DUMMY_KEY].logps.sum())  # loads libraries
    with peak_memory(args.device, result):
        start = perf_counter()
        run()
        if args.device == "cuda":
            torch.cuda.synchronize()
        result["seconds"] = perf_counter() - start
    return result


def measure_in_own_process(schedule: str, name: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", schedule, "--shapes", name, "--scale", str(args.scale)]
    command += ["--run-model", args.run_model, "--device", args.device, "--dtype", args.dtype]
    command += ["--gradient-checkpointing"] * args.gradient_checkpointing
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


# --- Report ----------------------------------------------------------------------------------------------------------


def print_table(name: str, counted: dict[str, dict[str, float]], measured: dict[str, dict[str, float]]) -> None:
    print(f"\n**{name}**\n")
    header = ["schedule", "tokens trained", "tokens no grad", "PFLOP", "x reference", "x simultaneous", "x floor"]
    header += ["seconds", "MiB", "host s"]
    print("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
    for schedule, row in counted.items():
        cells = [
            schedule,
            f"{row['train']:,}",
            f"{row['no_grad']:,}",
            f"{row['flops'] / 1e15:.2f}",
            f"{row['flops'] / counted['reference']['flops']:.3f}",
            f"{row['flops'] / counted['simultaneous']['flops']:.2f}",
            f"{(row['train'] + row['no_grad'] / 3) / row['floor']:.2f}",
        ]
        run = measured.get(schedule)
        cells += ["", ""] if run is None else [f"{run['seconds']:.1f}", f"{run['memory']:.0f}"]
        cells.append(f"{row['host']:.2f}" if row["host"] else "")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--count-model", choices=MODELS, default="0.6B", help="model whose FLOPs are counted")
    parser.add_argument("--no-run", action="store_true", help="only count")
    parser.add_argument("--run-model", choices=MODELS, default="tiny", help="model that is run")
    parser.add_argument("--scale", type=float, default=0.1, help="factor of all lengths in the runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, SHAPES[args.shapes[0]].scaled(args.scale), args)))
        return
    flop_count = FlopCount(args.count_model)
    for name in args.shapes:
        counted = count(SHAPES[name], flop_count)
        schedules = [] if args.no_run else schedules_of(SHAPES[name])
        print_table(name, counted, {one: measure_in_own_process(one, name, args) for one in schedules})


if __name__ == "__main__":
    main()
