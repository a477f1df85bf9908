"""
What a card makes of an update: seconds, tokens a second, memory, and what the plan says beside it.

    python benchmarks/gpu.py                               # all parts, eight minutes at most on an H100 or H200
    python benchmarks/gpu.py --parts update kernel         # some of them
    python benchmarks/gpu.py --dry-run                     # tiny shapes on a CPU, to the last line: do the parts work?

Each part runs in a process of its own; what does not fit into `--minutes` is left out and named. Results go to
`--output` as `gpu.json` and `gpu.md`, the table that `benchmarks/README.md` shows. Weights are random, bfloat16.

- kernel: attention on trees, forward and backward, beside PyTorch's causal attention; with and without telling the
  kernel that lengths are whole blocks.
- head: the head on 4096 positions, with logits in bfloat16, in float32, and in float32 with TensorFloat-32.
- update: one iteration's update of `update_cost.py`'s shapes on Qwen3-0.6B's shape with gradient checkpointing: GRPO's
  own step (`GRPOTrainer`) and GSPO's rows (all turns at once), and this package's rows, trees and blocks of turns.
  Operations are counted without recomputation, as a share of the card's own matrix product.
- rollout: keys and values kept from turn to turn, beside encoding every turn anew (`rollout_cost.py`).
- largest: micro-batches of a 14B shape with LoRA around the largest that `seeupo_trl.plan` says fits.
- iteration: one iteration of that model through `SeeUPOTrainer`, on episodes of BFCL's lengths.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from dry_run_14b import make_tokenizer, reward, stub
from peft import get_peft_model
from scale import Model
from torch.nn.attention.flex_attention import flex_attention
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head
from update_cost import MODELS, make_model
from update_schedules import GROUP_SIZE, SHAPES, OneProcess, Recorder, Shape, config_of, make_episodes, updater_of

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.plan.activations import lora_config
from seeupo_trl.plan.memory import estimate, largest_micro_batch
from seeupo_trl.plan.run import GIB, PlannedRun, Strategy
from seeupo_trl.scoring.token_tree import build_tree
from seeupo_trl.scoring.tree_attention import compiled_attention, tree_block_mask
from seeupo_trl.scoring.trees import TreeScorer
from seeupo_trl.scoring.turn_buffer import TurnBuffer
from seeupo_trl.trajectory import Trajectory, Turn


LORA_RANK = 32
RESERVE = 2 * GIB
SCHEDULES = {"GSPO, rows": "simultaneous", "rows": "rows", "trees": "trees", "trees, 4 updates": "trees, 4 updates"}


class Card:
    """Where the parts run, and how large they are there: a card, or a CPU in a dry run."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.model = "tiny" if dry else "0.6B"

    @property
    def name(self) -> str:
        return "CPU, dry run" if self.dry else torch.cuda.get_device_name()

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 3) -> float:
        """Median time of a call, after one that compiles."""
        run()
        times = []
        for _ in range(repeats):
            self.wait()
            start = perf_counter()
            run()
            self.wait()
            times.append(perf_counter() - start)
        return sorted(times)[len(times) // 2]

    @contextmanager
    def peak(self, row: dict) -> Iterator[None]:
        """Largest memory in use inside the context, in GiB, as `row["peak"]`; a CPU has no allocator to ask."""
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()
        yield
        row["peak"] = None if self.dry else torch.cuda.max_memory_allocated() / GIB

    def matmul_rate(self) -> float:
        """Operations a second of a large matrix product."""
        size = 256 if self.dry else 8192
        one, two = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self.seconds(lambda: one @ two)


# --- Parts -----------------------------------------------------------------------------------------------------------


def kernel(card: Card) -> list[dict]:
    lengths = (256,) if card.dry else (4096, 16384, 32768)
    return [row for heads in ((16, 8), (40, 8)) for length in lengths for row in kernel_rows(card, *heads, length)]


def kernel_rows(card: Card, heads: int, kv_heads: int, length: int) -> list[dict]:
    tensors = [
        torch.randn(1, n, length, 128, device=card.device, dtype=card.dtype) for n in (heads, kv_heads, kv_heads)
    ]
    tree = a_tree(length)
    mask = tree_block_mask(tree.subtree_ends, length, torch.device(card.device))
    backend = "eager" if card.dry else "inductor"
    attend = compiled_attention(backend)
    options = {"block_mask": mask, "enable_gqa": True, "kernel_options": {"IS_DIVISIBLE": True}}
    whole_blocks = torch.compile(flex_attention, fullgraph=True, backend=backend)
    ways = {
        "trees": lambda q, k, v: attend(q, k, v, mask, None),
        "trees, whole blocks": lambda q, k, v: whole_blocks(q, k, v, **options),
        "causal": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }
    on_tree = float((tree.depths + 1).sum())
    pairs = {"trees": on_tree, "trees, whole blocks": on_tree, "causal": length * (length + 1) / 2}

    def measured(name: str) -> dict:
        row = {"heads": f"{heads}/{kv_heads}", "tokens": length, "attention": name}
        row["forward ms"] = 1e3 * card.seconds(lambda: ways[name](*tensors))
        if not card.dry:  # PyTorch has no backward pass of it on CPUs
            row["both ms"] = 1e3 * card.seconds(lambda: with_backward(ways[name], tensors))
        row["forward TFLOP/s"] = 4 * heads * 128 * pairs[name] / row["forward ms"] / 1e9
        return row

    return [measured(name) for name in ways]


def a_tree(length: int):
    """Two thirds of the tokens are shared by eight branches, and it has exactly so many tokens."""
    own = length // 24
    shared = [0] * (length - 8 * own)
    return build_tree([torch.tensor(shared + [i + 1] * own, dtype=torch.int32).numpy() for i in range(8)])


def with_backward(attend: Callable, tensors: list[torch.Tensor]) -> None:
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    attend(*tensors).sum().backward()


def head(card: Card) -> list[dict]:
    positions = 64 if card.dry else 4096
    buffer = TurnBuffer([Trajectory([Turn([5], list(range(6, 6 + positions)))])])
    rows = []
    for name, cast, tf32 in (("bfloat16", False, False), ("float32", True, False), ("TensorFloat-32", True, True)):
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        model = make_model(card.model, card.device, card.dtype, num_layers=1)
        add_fused_lm_head(model, 0.9, cast_lm_head_to_fp32=cast, outputs=("log_probs", "entropy"))
        scorer = TreeScorer(model, 0, 0.9, packing="rows")
        (batch,) = scorer.micro_batches(buffer, [(0, 1)], 1)
        row = {"positions": positions, "logits": name}
        with card.peak(row):
            row["ms"] = 1e3 * card.seconds(lambda s=scorer, m=model, b=batch: step(s, m, b))
        rows.append(row)
    torch.set_float32_matmul_precision("highest")
    return rows


def step(scorer: TreeScorer, model: torch.nn.Module, batch) -> None:
    with scorer.attention(batch):
        sum(score.logps.sum() for score in scorer.score(model, batch)[0].values()).backward()
    model.zero_grad(set_to_none=True)


def update(card: Card) -> list[dict]:
    rate, rows = card.matmul_rate(), []
    for name, shape in SHAPES.items():
        if card.dry:
            shape = replace(shape.scaled(0.02), turns=min(shape.turns, 5), groups=min(shape.groups, 3))
        for schedule, key in (("GRPO's own step", None), *SCHEDULES.items()):
            if key == "trees, 4 updates" and shape.turns <= 4:
                continue
            row = {"shape": name, "schedule": schedule}
            try:
                row |= grpo_step(card, shape) if key is None else our_step(card, shape, key)
                row["share of matmul"] = row.pop("operations") / row["seconds"] / rate
            except torch.OutOfMemoryError:
                row["seconds"] = None
            rows.append(row)
            clear_device_cache(garbage_collection=True)
    return rows


def checkpointed(card: Card) -> Qwen3ForCausalLM:
    model = make_model(card.model, card.device, card.dtype)
    add_fused_lm_head(model, 0.9, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def recorded(shape: Shape, schedule: str, model: Qwen3ForCausalLM) -> Recorder:
    """What a schedule computes, and the host's time for laying it out, without computing it."""
    recorder = Recorder(TreeScorer(model, 0, 0.9, packing=config_of(schedule, shape).packing))
    episodes = make_episodes(shape, model.config.vocab_size)
    updater_of(episodes, config_of(schedule, shape), OneProcess(torch.nn.Linear(1, 1), "cpu"), recorder).run()
    return recorder


def operations(recorder: Recorder, model: Qwen3ForCausalLM) -> float:
    sizes = Model.of(model.config, False)
    return sum(sizes.flops(batch, with_grad) for batch, with_grad in recorder.passes)


def our_step(card: Card, shape: Shape, schedule: str) -> dict:
    model = checkpointed(card)
    lock_step = OneProcess(model, card.device)
    scorer = TreeScorer(model, 0, 0.9, packing=config_of(schedule, shape).packing)
    row: dict = {}

    def run() -> int:
        updater = updater_of(
            make_episodes(shape, model.config.vocab_size), config_of(schedule, shape), lock_step, scorer
        )
        updater.run()
        lock_step.step()
        return sum(updater.record.tokens.values())

    tokens = run()
    with card.peak(row):
        row["seconds"] = card.seconds(run, repeats=1)
    recorder = recorded(shape, schedule, model)
    row |= {"tokens": tokens, "tokens/s": tokens / row["seconds"], "host s": recorder.seconds}
    return row | {"operations": operations(recorder, model)}


class Clock(TrainerCallback):
    """Seconds of the last step, the rollout (which takes no time here) included."""

    def __init__(self, card: Card):
        self.card = card

    def on_step_begin(self, *args, **kwargs):
        self.card.wait()
        self.start = perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.card.wait()
        self.seconds = perf_counter() - self.start


def grpo_step(card: Card, shape: Shape) -> dict:
    """`GRPOTrainer`, token-level ratios and all, on the same episodes as prompts and completions."""
    model = checkpointed(card)
    trajectories = make_episodes(shape, model.config.vocab_size).trajectories

    def fixed(prompts, trainer):
        completions, masks = [], []
        for trajectory in trajectories:
            ids, mask = [], []
            for number, turn in enumerate(trajectory.turns):
                between = 0 if number == 0 else shape.observation
                ids += turn.context_ids[len(turn.context_ids) - between :] if between else []
                ids += turn.action_ids
                mask += [0] * between + [1] * len(turn.action_ids)
            completions.append(ids)
            masks.append(mask)
        prompt_ids = [trajectory.turns[0].context_ids for trajectory in trajectories]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "env_mask": masks, "logprobs": None}

    row, clock = {}, Clock(card)
    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda prompts, **kwargs: [float(index % GROUP_SIZE) for index in range(len(prompts))],
            args=GRPOConfig(
                output_dir=directory,
                per_device_train_batch_size=GROUP_SIZE,
                gradient_accumulation_steps=shape.groups,
                num_generations=GROUP_SIZE,
                max_steps=2,
                optim="sgd",
                bf16=False,
                use_cpu=card.dry,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a"] * GROUP_SIZE * shape.groups}),
            processing_class=make_tokenizer(),
            rollout_func=fixed,
            callbacks=[clock],
        )
        with card.peak(row):
            trainer.train()
    recorder = recorded(shape, "simultaneous", model)
    tokens = sum(batch.num_tokens for batch, _ in recorder.passes)
    row |= {"seconds": clock.seconds, "tokens": tokens, "tokens/s": tokens / clock.seconds}
    return row | {"operations": operations(recorder, model)}


def rollout(card: Card) -> list[dict]:
    script = Path(__file__).with_name("rollout_cost.py")
    rows = []
    for shape in ("bfcl",) if card.dry else ("bfcl", "think"):
        for way in ("anew", "kept"):
            command = [sys.executable, str(script), "--measure", way, "run", "--shapes", shape]
            command += ["--scale", "0.02"] if card.dry else ["--scale", "1", "--run-model", "0.6B"]
            command += ["--device", card.device, "--dtype", str(card.dtype).removeprefix("torch.")]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured = json.loads(output.splitlines()[-1])
            tokens = sum(count * new for count, new, _ in measured.pop("shapes"))
            rows.append({"shape": shape, "keys and values": way, "tokens": tokens} | measured)
    return rows


def large_config(card: Card) -> Qwen3Config:
    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = MODELS["tiny" if card.dry else "14B"]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def large_model(card: Card) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(card.device):
        model = Qwen3ForCausalLM(large_config(card))
    torch.set_default_dtype(before)
    return model


def planned(card: Card, tokens: int) -> PlannedRun:
    memory = GIB // 2 if card.dry else torch.cuda.get_device_properties(0).total_memory
    return PlannedRun(
        config=large_config(card),
        gpus=1,
        gpu_memory=memory,
        reserve=0 if card.dry else RESERVE,
        tokens=tokens,
        prompt=tokens * 4 // 5,
        action=60,
        observation=40,
        generation="vllm-server",  # nothing is generated here
    )


def largest(card: Card) -> list[dict]:
    strategy = Strategy(0, lora_rank=LORA_RANK)
    predicted = 1024 if card.dry else largest_micro_batch(planned(card, 32768), strategy)
    model = get_peft_model(large_model(card), lora_config(LORA_RANK)).train()
    causal_lm = model.get_base_model()
    add_fused_lm_head(causal_lm, 0.9, cast_lm_head_to_fp32=True, outputs=("log_probs", "entropy"))
    causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    causal_lm.enable_input_require_grads()
    scorer = TreeScorer(model, 0, 0.9, packing="tree")
    rows = []
    for share in (0.9, 1.0, 1.1):
        tokens = int(predicted * share) // 128 * 128
        context = [5] * (tokens * 4 // 5)
        scored = planned(card, tokens).scored(tokens)
        filler = [7] * (tokens - len(context) - scored)
        buffer = TurnBuffer([Trajectory([Turn(context + filler, [6] * scored)])])
        (batch,) = scorer.micro_batches(buffer, [(0, 1)], 1)
        row: dict = {"of the plan's largest": share, "tokens": batch.num_tokens}
        row["planned peak"] = estimate(planned(card, batch.num_tokens), strategy).peak / GIB
        try:
            with card.peak(row), torch.autocast(card.device, torch.bfloat16):
                start = perf_counter()
                step(scorer, model, batch)
                card.wait()
                row["seconds"] = perf_counter() - start
            row["fits"] = True
        except torch.OutOfMemoryError:
            row["fits"] = False
        rows.append(row)
        clear_device_cache(garbage_collection=True)
    return rows


def iteration(card: Card) -> list[dict]:
    lengths = {"prompt": 60, "action": 6, "observation": 4, "turns": 3} if card.dry else {}
    episodes = SimpleNamespace(**{"prompt": 5400, "action": 60, "observation": 40, "turns": 10} | lengths)
    clock, row = Clock(card), {"episodes": GROUP_SIZE, "turns": episodes.turns}
    with tempfile.TemporaryDirectory() as directory:
        trainer = SeeUPOTrainer(
            model=large_model(card),
            reward_funcs=reward,
            args=SeeUPOConfig(
                output_dir=directory,
                per_device_train_batch_size=GROUP_SIZE,
                num_generations=GROUP_SIZE,
                max_tokens_per_microbatch=512 if card.dry else 32768,
                max_steps=1,
                learning_rate=1e-5,
                beta=0.002,
                bf16=True,
                use_cpu=card.dry,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a"] * GROUP_SIZE}),
            processing_class=make_tokenizer(),
            rollout_func=stub(episodes, large_config(card).vocab_size),
            peft_config=lora_config(LORA_RANK),
            callbacks=[clock],
        )
        with card.peak(row):
            trainer.train()
    (logs,) = (entry for entry in trainer.state.log_history if "turn_updates" in entry)
    names = ("turn_updates", "tokens/train", "tokens/no_grad", "ratio/noise_floor")
    return [row | {"seconds": clock.seconds} | {name: logs.get(name) for name in names}]


PARTS = {part.__name__: part for part in (kernel, head, update, largest, iteration, rollout)}


# --- Report ----------------------------------------------------------------------------------------------------------


def as_markdown(results: dict) -> str:
    versions = f"{results['card']}, torch {results['torch']}"
    lines = [f"{versions}, bfloat16, {results['seconds']:.0f} s in all."]
    for name, rows in results["parts"].items():
        lines += ["", f"**{name}**", ""]
        if isinstance(rows, str):
            lines.append(rows)
            continue
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines.append("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: object) -> str:
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def run_part(name: str, options: argparse.Namespace, seconds: float) -> list[dict] | str:
    """The rows of a part from a process of its own, or why there are none."""
    command = [sys.executable, __file__, "--measure", name] + ["--dry-run"] * options.dry_run
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"left out: more than the {seconds:.0f} s that were left of {options.minutes:g} minutes"
    if process.returncode:
        print(process.stderr[-4000:], file=sys.stderr)
        return f"failed: {process.stderr.strip().splitlines()[-1]}"
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: do the parts work?")
    parser.add_argument("--minutes", type=float, default=8.0, help="in all; what does not fit is left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--measure", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no NVIDIA GPU; `--dry-run` runs every part with tiny shapes on a CPU.")
    card = Card(options.dry_run)
    if options.measure:
        print(json.dumps(PARTS[options.measure](card)))
        return
    start = perf_counter()
    results: dict = {"card": card.name, "torch": torch.__version__, "parts": {}}
    for name in options.parts:
        left = 60 * options.minutes - (perf_counter() - start)
        print(f"{name} ...", flush=True)
        results["parts"][name] = run_part(name, options, max(left, 1.0))
    results["seconds"] = perf_counter() - start
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps(results, indent=1))
    (options.output / "gpu.md").write_text(as_markdown(results))
    print(as_markdown(results))
    if any(isinstance(rows, str) and rows.startswith("failed") for rows in results["parts"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
