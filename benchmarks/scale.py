"""
How long the update phase of an iteration takes on 8 to 512 GPUs, for episodes of 1 to 40 turns, and what limits it.

    python benchmarks/scale.py                  # Qwen3-14B on H100s, ZeRO-3, a minute or two on a CPU
    python benchmarks/scale.py --calibrate      # the same formula against measured runs on this machine

Every rank's forward and backward passes come from the package itself: `TurnUpdater` runs on BFCL-shaped episodes with
a scorer that lays out micro-batches (the real packer) and computes nothing. Per pass,

    compute   2 (parameters) tokens + 4 (layers x heads x head size) pairs, three times with a backward pass and the
              layers once more under gradient checkpointing, over the peak of a GPU times its utilisation
    gathers   ZeRO-3: the parameters are gathered for the forward and for the backward pass, and their gradients
              reduced and scattered, each `2 bytes x parameters x (n-1)/n` through the narrowest link: NVLink inside
              a node, the node's network cards between nodes
    latency   of that many collectives, one for each layer and direction

and per optimizer step the traffic of parameters, gradients and moments through the GPU's memory, and the latency of
the gradient norm. Communication overlaps with computation (`--no-overlap` adds it). All ranks make the same number of
passes; ranks are alike here. The numbers of the hardware are assumptions, given as options; nothing was measured on a
GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from update_schedules import Episodes, OneProcess, Recorder, Shape, make_episodes, updater_of

from seeupo_trl import SeeUPOConfig
from seeupo_trl.scoring.rows import RowBatch
from seeupo_trl.scoring.trees import TreeScorer


@dataclass(frozen=True)
class Hardware:
    """Rates of one GPU and its links, in FLOP/s and bytes/s, and the latency of a collective in seconds."""

    flops: float = 989e12
    utilisation: float = 0.4
    memory: float = 3.35e12 * 0.7
    nvlink: float = 370e9
    network: float = 400e9 * 0.8  # of a node
    gpus_per_node: int = 8
    latency: float = 20e-6
    latency_per_doubling: float = 5e-6

    def collective(self, size: float, gpus: int) -> tuple[float, float]:
        """Seconds of transfer and of latency of gathering `size` bytes on every GPU."""
        if gpus == 1:
            return 0.0, 0.0
        nodes = -(-gpus // self.gpus_per_node)
        inside = size * (min(gpus, self.gpus_per_node) - 1) / min(gpus, self.gpus_per_node) / self.nvlink
        between = size * (nodes - 1) / nodes / self.network
        return max(inside, between), self.latency + self.latency_per_doubling * np.log2(gpus)


@dataclass(frozen=True)
class Model:
    """Sizes of a model that the formula needs."""

    body: int  # parameters of the layers
    embedding: int
    head: int
    layers: int
    attention: int  # heads x head size
    checkpointing: bool = True

    @classmethod
    def of(cls, config: Qwen3Config, checkpointing: bool = True) -> "Model":
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config)
        table = config.vocab_size * config.hidden_size
        body = sum(parameter.numel() for parameter in model.parameters()) - 2 * table
        attention = config.num_attention_heads * config.head_dim
        return cls(body, table, table, config.num_hidden_layers, attention, checkpointing)

    @property
    def parameters(self) -> int:
        return self.body + self.embedding + self.head

    def flops(self, batch, with_grad: bool) -> float:
        """Operations of one pass."""
        layers = 2 * self.body * batch.num_tokens + 4 * self.layers * self.attention * batch.num_pairs
        head = 2 * self.head * num_scored(batch)
        if not with_grad:
            return layers + head
        # the fused head computes its logits again in the backward pass
        return layers * (4 if self.checkpointing else 3) + head * 4


@dataclass(frozen=True)
class Work:
    """What a rank does in the update phase of one iteration."""

    flops: list[tuple[float, bool]]  # of each pass, and whether it has a backward pass
    optimizer_steps: int
    tokens: int


def num_scored(batch) -> int:
    if isinstance(batch, RowBatch):
        return sum(end - start for row in batch.rows for start, end in row.spans.values())
    return sum(end - start for _, start, end in batch.spans.values())


class Packer(Recorder):
    """Lays out micro-batches and computes nothing."""

    def micro_batches(self, buffer, keys, max_rows, together=True):
        return self.scorer.micro_batches(buffer, keys, max_rows, together)

    def num_tokens(self, buffer, keys):
        return self.scorer.num_tokens(buffer, keys)


def scorer_for(max_tokens: int | None) -> TreeScorer:
    config = Qwen3Config(hidden_size=5120, num_hidden_layers=1, vocab_size=8, num_attention_heads=40)
    with torch.device("meta"):
        return TreeScorer(Qwen3ForCausalLM(config), 0, 0.9, max_tokens=max_tokens)


def work_of(episodes: Episodes, config: SeeUPOConfig, model: Model, scorer: TreeScorer) -> Work:
    """Passes that the update phase makes of a rank's episodes."""
    packer = Packer(scorer)
    updater = updater_of(episodes, config, OneProcess(torch.nn.Linear(1, 1), "cpu"), packer)
    updater.run()
    flops = [(model.flops(batch, with_grad), with_grad) for batch, with_grad in packer.passes]
    return Work(flops, updater.plan.num_steps, sum(batch.num_tokens for batch, _ in packer.passes))


def update_config(max_tokens: int | None, completions: int, max_turn_updates: int | None) -> SeeUPOConfig:
    return SeeUPOConfig(
        output_dir="unused",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=completions,
        num_generations=completions if completions > 1 else 2,
        generation_batch_size=max(completions, 2),
        max_tokens_per_microbatch=max_tokens,
        max_turn_updates=max_turn_updates,
        old_policy="turn",
        use_cpu=True,
        bf16=False,
        report_to="none",
    )


# --- Time ------------------------------------------------------------------------------------------------------------


def update_seconds(work: Work, model: Model, gpus: int, hardware: Hardware, overlap: bool) -> dict[str, float]:
    """Seconds of the update phase: in total, and of each part on its own."""
    size = 2 * model.parameters
    transfer, latency = hardware.collective(size, gpus)
    latency *= model.layers + 2
    parts = {"compute": 0.0, "gathers": 0.0, "latency": 0.0, "optimizer": 0.0}
    total = 0.0
    for flops, with_grad in work.flops:
        compute = flops / (hardware.flops * hardware.utilisation)
        collectives = 3 if with_grad else 1
        communication = collectives * (transfer + latency)
        parts["compute"] += compute
        parts["gathers"] += collectives * transfer
        parts["latency"] += collectives * latency
        total += max(compute, communication) if overlap else compute + communication
    # float32 weights and moments are read and written, gradients read twice, bfloat16 weights written
    step = (12 * 2 + 2 + 8 + 2) * model.parameters / gpus / hardware.memory
    norm = hardware.collective(4, gpus)[1]
    parts["optimizer"] = work.optimizer_steps * (step + norm)
    return {"total": total + parts["optimizer"], **parts}


def simulate(args: argparse.Namespace) -> list[dict]:
    """One row for each number of turns, blocks and GPUs."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
    )
    model, scorer, rows = Model.of(config), scorer_for(args.max_tokens), []
    hardware = Hardware(args.flops, args.mfu, nvlink=args.nvlink, network=args.network)
    for turns in args.turns:
        for updates in dict.fromkeys([None, *(u for u in args.max_turn_updates if u < turns)]):
            known: dict[int, Work] = {}  # by episodes of a rank
            for gpus in args.gpus:
                episodes = args.completions_per_gpu or max(args.episodes // gpus, 1)
                if episodes not in known:
                    shape = Shape(args.prompt, args.action, args.observation, turns)
                    played = episodes_of(shape, episodes)
                    known[episodes] = work_of(played, update_config(args.max_tokens, episodes, updates), model, scorer)
                work = known[episodes]
                seconds = update_seconds(work, model, gpus, hardware, args.overlap)
                rows.append({"turns": turns, "updates": updates, "gpus": gpus, "episodes": episodes, **seconds})
                rows[-1] |= {"passes": len(work.flops), "tokens": work.tokens}
    return rows


def episodes_of(shape: Shape, count: int, vocabulary: int = 50000) -> Episodes:
    """A rank's episodes: whole groups of eight where it has that many, else a part of one."""
    whole = make_episodes(Shape(**{**shape.__dict__, "groups": -(-count // 8)}), vocabulary)
    return Episodes(whole.trajectories[:count], whole.advantages[:count])


def bottleneck(row: dict) -> str:
    return max(("compute", "gathers", "latency", "optimizer"), key=lambda name: row[name])


def print_table(rows: list[dict], gpus: list[int]) -> None:
    print("| turns | updates | " + " | ".join(f"{number} GPUs" for number in gpus) + " |")
    print("|---:|---:|" + "---:|" * len(gpus))
    for turns, updates in dict.fromkeys((row["turns"], row["updates"]) for row in rows):
        line = [row for row in rows if (row["turns"], row["updates"]) == (turns, updates)]
        cells = [f"{row['total']:.1f} s, {bottleneck(row)} ({row['passes']})" for row in line]
        print(f"| {turns} | {updates or turns} | " + " | ".join(cells) + " |")


# --- Against measured runs -------------------------------------------------------------------------------------------

# (turns, max_turn_updates, prompt, micro-batch tokens): one iteration each; every other one is predicted
MEASURED = [
    (1, None, 200, 512),
    (2, None, 200, 512),
    (3, None, 200, 1024),
    (2, None, 400, 512),
    (6, None, 200, 512),
    (4, None, 300, 512),
    (6, 2, 200, 512),
    (3, None, 100, 256),
    (1, None, 400, 512),
    (8, 4, 200, 512),
    (8, None, 100, 384),
    (5, None, 250, 1024),
]
ACTION, OBSERVATION, EPISODES = 12, 8, 4


def measured_shape(number: int) -> tuple[Shape, int | None, int]:
    turns, updates, prompt, tokens = MEASURED[number]
    return Shape(prompt, ACTION, OBSERVATION, turns), updates, tokens


def measured_model() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=4748,
        hidden_size=320,
        intermediate_size=1088,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=False,
    )


def measure(output: str) -> None:
    """One process of a training run whose iterations have the shapes in `MEASURED`; CPU seconds of each update."""
    from datasets import Dataset
    from dry_run_14b import make_tokenizer, prepare_cpu

    from seeupo_trl import SeeUPOTrainer

    prepare_cpu()
    vocabulary = measured_model().vocab_size
    rank = int(os.environ.get("RANK", "0"))

    def rollout(prompts, trainer):
        # the first iteration warms up
        shape, updates, tokens = measured_shape(max(trainer.state.global_step - 1, 0))
        trainer.args.max_turn_updates = updates
        trainer._scorers.policy._max_tokens = tokens
        trajectories = episodes_of(shape, len(prompts), vocabulary).trajectories
        return {
            "prompt_ids": [t.turns[0].context_ids for t in trajectories],
            "completion_ids": [t.turns[-1].action_ids for t in trajectories],
            "logprobs": None,
            "trajectories": trajectories,
        }

    class Seconds(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.start = process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(process_time() - self.start)

    args = SeeUPOConfig(
        output_dir=str(Path(output).with_suffix("")),
        per_device_train_batch_size=EPISODES,
        num_generations=EPISODES,
        max_steps=len(MEASURED) + 1,
        max_tokens_per_microbatch=512,
        old_policy="turn",
        packing="tree",
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    trainer = SeeUPOTrainer(
        model=Qwen3ForCausalLM(measured_model()),
        reward_funcs=lambda prompts, **kwargs: [float(index) for index in range(len(prompts))],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 100}),
        processing_class=make_tokenizer(),
        rollout_func=rollout,
        callbacks=[Seconds()],
    )
    trainer.train()
    if rank == 0:
        Path(output).write_text(json.dumps(Seconds.seconds[1:]))
    trainer.accelerator.end_training()


LAUNCHER = """\
compute_environment: LOCAL_MACHINE
deepspeed_config:
  deepspeed_multinode_launcher: standard
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: false
  zero3_save_16bit_model: true
  zero_stage: 3
distributed_type: DEEPSPEED
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""


def calibrate() -> None:
    """
    Fit the formula to half of the measured iterations and predict the other half. Two processes of ZeRO-3 on this CPU
    share nothing but the formula with a cluster: what is fitted are its three rates, FLOP/s, seconds for the gathers
    of a pass, and seconds of an optimizer step.
    """
    with tempfile.TemporaryDirectory() as directory:
        launcher, output = Path(directory, "launcher.yaml"), Path(directory, "seconds.json")
        launcher.write_text(LAUNCHER)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
        command += ["--main_process_port", "0", __file__, "--measure", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = np.array(json.loads(output.read_text()))
    model = Model.of(measured_model())
    rows = []
    for number in range(len(MEASURED)):
        shape, updates, tokens = measured_shape(number)
        work = work_of(
            episodes_of(shape, EPISODES), update_config(tokens, EPISODES, updates), model, scorer_for(tokens)
        )
        gathers = sum(3 if with_grad else 1 for _, with_grad in work.flops)
        rows.append([sum(flops for flops, _ in work.flops) / 1e9, gathers, work.optimizer_steps])
    features = np.array(rows, dtype=float)
    fitted = slice(0, None, 2)
    # relative errors are fitted, so that short iterations count as much as long ones
    rates = np.linalg.lstsq(features[fitted] / seconds[fitted, None], np.ones(len(seconds[fitted])), rcond=None)[0]
    predicted = features @ rates
    print(f"1 GFLOP {rates[0]:.4f} s, a gather {rates[1]:.4f} s, an optimizer step {rates[2]:.4f} s (CPU seconds)\n")
    print(
        "| turns | updates | prompt | GFLOP | gathers | steps | measured | formula | error | |\n|"
        + "---:|" * 9
        + "---|"
    )
    for number, (turns, updates, prompt, _) in enumerate(MEASURED):
        flops, gathers, steps = features[number]
        error = predicted[number] / seconds[number] - 1
        role = "fitted" if number % 2 == 0 else "**predicted**"
        cells = [turns, updates or turns, prompt, f"{flops:.0f}", f"{gathers:.0f}", f"{steps:.0f}"]
        cells += [f"{seconds[number]:.2f}", f"{predicted[number]:.2f}", f"{error:+.0%}", role]
        print("| " + " | ".join(map(str, cells)) + " |")
    errors = np.abs(predicted / seconds - 1)[1::2]
    print(f"\npredicted iterations: mean error {errors.mean():.0%}, largest {errors.max():.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 5, 10, 20, 40])
    parser.add_argument("--max-turn-updates", type=int, nargs="*", default=[4], help="beside one update a turn")
    parser.add_argument("--episodes", type=int, default=256, help="of an iteration, over all GPUs (at least one each)")
    parser.add_argument(
        "--completions-per-gpu", type=int, help="in place of --episodes: the batch grows with the GPUs"
    )
    parser.add_argument("--prompt", type=int, default=5400)
    parser.add_argument("--action", type=int, default=60)
    parser.add_argument("--observation", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=24576, help="`max_tokens_per_microbatch`")
    parser.add_argument("--flops", type=float, default=Hardware.flops, help="peak of a GPU, FLOP/s (H100, bf16)")
    parser.add_argument("--mfu", type=float, default=Hardware.utilisation, help="share of it that is reached")
    parser.add_argument("--nvlink", type=float, default=Hardware.nvlink, help="bytes/s of a collective inside a node")
    parser.add_argument("--network", type=float, default=Hardware.network, help="bytes/s of a node's network cards")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true", help="print the parts of every cell")
    parser.add_argument("--calibrate", action="store_true", help="compare with measured runs on this machine")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
    elif args.calibrate:
        calibrate()
    else:
        rows = simulate(args)
        print(json.dumps(rows, indent=1)) if args.json else print_table(rows, args.gpus)


if __name__ == "__main__":
    main()
