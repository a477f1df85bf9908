"""
One full iteration of a Qwen3-14B-shaped model - rollout stub, all turn updates, checkpoint, reload - and its memory.

    python benchmarks/dry_run_14b.py CONFIG                                  # the largest that fits
    python benchmarks/dry_run_14b.py CONFIG --shape 8,40,151936              # Qwen3-14B itself

`CONFIG` is a yaml of `accelerate config`, such as `examples/accelerate_configs/zero3.yaml`; `--processes` overrides
its number of processes. A shape is `width,layers,vocabulary` in the proportions of Qwen3-14B: width 8 is its own, with
hidden size 5120, 40 query and 8 key-value heads of 128, and an intermediate size of 17408; width 1 is an eighth of
each but the head size. Without `--shape` it is the largest that `seeupo_trl.plan` says needs no more than `--memory`
over all processes (on a GPU: of each). Weights are random; `--model` takes real ones.

The processes are launched twice: the first ones train and save a checkpoint, the second ones load it, compare what
they loaded bit by bit with what was saved, and train one more iteration. On a CPU every process counts the bytes of
its tensors, on a GPU CUDA's allocator does. The plan's prediction is printed beside that.
"""

import argparse
import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer, Trajectory, Turn
from seeupo_trl.plan.__main__ import from_accelerate_config, parse_bytes
from seeupo_trl.plan.activations import PassMemory, lora_config, trace_pass
from seeupo_trl.plan.live_bytes import LiveBytes
from seeupo_trl.plan.memory import estimate, update_pass
from seeupo_trl.plan.run import GIB, Run, Strategy, model_shape
from seeupo_trl.scoring.rows import MicroBatch


WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)
# vocabularies: Qwen3's, and shares of it where not even width 1 fits with it
CANDIDATES = [(width, 40, 151936) for width in WIDTHS] + [(1, 40, 18992), (1, 20, 18992), (1, 8, 4748)]
GROUP_SIZE = 4
ON_CPU = not torch.cuda.is_available()


def shaped_config(width: int, layers: int, vocabulary: int) -> Qwen3Config:
    """A config in the proportions of Qwen3-14B."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=640 * width,
        intermediate_size=2176 * width,
        num_hidden_layers=layers,
        num_attention_heads=5 * width,
        num_key_value_heads=width,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


def run_of(config: Qwen3Config, options: argparse.Namespace) -> Run:
    episode = options.prompt + options.turns * (options.action + options.observation)
    return Run(
        config=config,
        gpus=options.processes,
        gpu_memory=80 * GIB,
        tokens=GROUP_SIZE // 2 * episode,
        prompt=options.prompt,
        action=options.action,
        observation=options.observation,
        reference=options.beta != 0,
        generation="vllm-server",  # nothing is generated here
    )


def predicted_peak(run: Run, strategy: Strategy, memory: PassMemory | None = None) -> tuple[float, float]:
    """Bytes of a process between iterations, and at most; on a CPU what is offloaded is in the same memory."""
    one = estimate(run, strategy, memory)
    offloaded = sum(value for name, value in one.host.items() if "checkpoint" not in name) / run.gpus
    return sum(one.kept.values()) + offloaded, max(one.peaks["update"], one.peaks["optimizer step"]) + offloaded


def choose_shape(options: argparse.Namespace, strategy: Strategy) -> Qwen3Config:
    if options.shape:
        return shaped_config(*map(int, options.shape.split(",")))
    for shape in CANDIDATES:
        config = shaped_config(*shape)
        peak = predicted_peak(run_of(config, options), strategy)[1]
        if peak * (options.processes if ON_CPU else 1) <= options.memory:
            print("shape", ",".join(map(str, shape)))
            return config
    raise SystemExit(
        f"Not even the smallest shape fits {options.memory / GIB:.1f} GiB; give --shape or more --memory."
    )


def stub(options: argparse.Namespace, vocabulary: int):
    """A rollout that plays fixed trajectories; half of the episodes are shorter."""

    def rollout(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        trajectories, outcome = [], []
        for index in range(first, first + len(prompts)):
            prompt = random.Random(index // GROUP_SIZE).choices(range(3, vocabulary), k=options.prompt)
            rng = random.Random(f"{index} {trainer.state.global_step}")
            context, turns = prompt, []
            for _ in range(options.turns if index % 2 == 0 else (options.turns + 1) // 2):
                action = rng.choices(range(3, vocabulary), k=options.action)
                turns.append(Turn(context, action))
                context = context + action + rng.choices(range(3, vocabulary), k=options.observation)
            trajectories.append(Trajectory(turns))
            outcome.append(float(index % GROUP_SIZE))
        return {
            "prompt_ids": [t.turns[0].context_ids for t in trajectories],
            "completion_ids": [
                t.turns[-1].context_ids[options.prompt :] + t.turns[-1].action_ids for t in trajectories
            ],
            "logprobs": None,
            "trajectories": trajectories,
            "outcome": outcome,
        }

    return rollout


def reward(outcome, **kwargs):
    return outcome


class Memory(TrainerCallback):
    """Bytes in use at most during the last iteration and after it, by CUDA or by counting tensors."""

    def __init__(self, counter: LiveBytes):
        self._counter = counter
        self.kept = self.peak = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        gc.collect()
        if ON_CPU:
            for parameter in model.parameters():
                self._counter.count(parameter)
            self._counter.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        self.peak = self._counter.peak if ON_CPU else torch.cuda.max_memory_allocated()
        gc.collect()
        self.kept = self._counter.live if ON_CPU else torch.cuda.memory_allocated()


class Digest(TrainerCallback):
    """Digest of what a process holds once training begins, after a checkpoint was loaded."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.value = digest(self.trainer)


def digest(trainer: SeeUPOTrainer) -> str:
    """SHA-256 of the parameters and of the optimizer's state that a process holds."""
    is_sharded = is_deepspeed_zero3_enabled()
    tensors = [parameter.ds_tensor if is_sharded else parameter for parameter in trainer.model.parameters()]
    optimizer = trainer.optimizer.optimizer
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        optimizer = optimizer.optimizer  # DeepSpeed's own wraps torch's
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            tensors += [parameter, *(state[name] for name in sorted(state) if torch.is_tensor(state[name]))]
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of one word: nothing is generated and nothing is read."""
    tokens = {"<pad>": 0, "<eos>": 1, "a": 2}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def prepare_cpu() -> None:
    """Processes share the cores; without a GPU DeepSpeed would compile a kernel for a minute that changes nothing."""
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_trainer(options: argparse.Namespace, steps: int, callbacks: list) -> SeeUPOTrainer:
    args = SeeUPOConfig(
        output_dir=str(Path(options.directory, "run")),
        per_device_train_batch_size=GROUP_SIZE // 2,
        gradient_accumulation_steps=2,
        num_generations=GROUP_SIZE,
        max_steps=steps,
        save_strategy="no" if options.reload else "steps",
        save_steps=steps,
        learning_rate=1e-6,
        beta=options.beta,
        bf16=True,
        use_cpu=ON_CPU,
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )
    if ON_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards for FSDP only where it sees several GPUs, but FSDP2 itself works on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return SeeUPOTrainer(
        model=options.model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64 * PartialState().num_processes}),
        processing_class=make_tokenizer(),
        rollout_func=stub(options, AutoConfig.from_pretrained(options.model).vocab_size),
        peft_config=lora_config(options.lora_rank) if options.lora_rank else None,
        callbacks=callbacks,
    )


def write_random_model(config: Qwen3Config, directory: str) -> None:
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(previous)
    model.save_pretrained(directory)


def record_largest_batch(trainer: SeeUPOTrainer) -> list[MicroBatch]:
    """A list that holds the largest micro-batch that was laid out so far."""
    micro_batches, largest = trainer._scorers.policy.micro_batches, []

    def recorded(*args, **kwargs):
        batches = micro_batches(*args, **kwargs)
        largest[:] = sorted([*largest, *batches], key=lambda batch: -batch.num_tokens)[:1]
        return batches

    trainer._scorers.policy.micro_batches = recorded
    return largest


def train(options: argparse.Namespace) -> None:
    """What a process does: train, or reload and train on; it leaves a note of what it saw."""
    if ON_CPU:
        prepare_cpu()
    with LiveBytes() if ON_CPU else torch.enable_grad() as counter:
        memory, loaded = Memory(counter), Digest()
        steps = options.iterations + options.reload
        trainer = loaded.trainer = make_trainer(options, steps, [memory, loaded])
        largest = record_largest_batch(trainer)
        trainer.train(resume_from_checkpoint=True if options.reload else None)
    note = {
        "kept": memory.kept,
        "peak": memory.peak,
        "loaded": loaded.value,
        "trained": digest(trainer),
        "turn updates": trainer.state.log_history[0]["turn_updates"],
    }
    rank = trainer.accelerator.process_index
    Path(options.directory, f"{'reload' if options.reload else 'train'}_{rank}.json").write_text(json.dumps(note))
    if rank == 0 and not options.reload:
        torch.save(largest[0], Path(options.directory, "batch.pt"))
    trainer.accelerator.end_training()


def launch(options: argparse.Namespace, *flags: str) -> list[dict]:
    """Start the processes with this script, wait for them, and read their notes."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", options.config]
    command += ["--num_processes", str(options.processes), "--main_process_port", "0", __file__, options.config]
    passed_on = ("prompt", "action", "observation", "turns", "lora_rank", "beta", "iterations", "processes")
    command += [f"--{name}={getattr(options, name)}" for name in (*passed_on, "model", "directory")]
    subprocess.run([*command, *flags], check=True)
    phase = flags[0].removeprefix("--")
    return [
        json.loads(Path(options.directory, f"{phase}_{rank}.json").read_text()) for rank in range(options.processes)
    ]


def report(options: argparse.Namespace, strategy: Strategy, trained: list[dict], reloaded: list[dict]) -> None:
    config = AutoConfig.from_pretrained(options.model)
    batch = torch.load(Path(options.directory, "batch.pt"), weights_only=False)
    run = replace(run_of(config, options), tokens=batch.num_tokens)
    memory = trace_pass(config, update_pass(run, strategy), batch if ON_CPU else None)
    equal = [one["trained"] == two["loaded"] for one, two in zip(trained, reloaded, strict=True)]
    print(
        f"{model_shape(config).total / 1e6:.0f}M parameters, {strategy.name}, {run.gpus} processes, "
        f"{trained[0]['turn updates']:.0f} turn updates,"
    )
    print(f"largest micro-batch {run.tokens} tokens; checkpoint reloaded bit by bit: {all(equal)}")
    print("| GiB a process | measured | predicted | ratio |\n|---|---:|---:|---:|")
    for name, prediction in zip(("kept", "peak"), predicted_peak(run, strategy, memory), strict=True):
        largest = max(note[name] for note in trained)
        print(f"| {name} | {largest / GIB:.3f} | {prediction / GIB:.3f} | {prediction / largest:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="yaml of `accelerate config`")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--shape", help="width,layers,vocabulary")
    parser.add_argument("--model", help="directory of a real model, in place of a shape with random weights")
    parser.add_argument("--memory", type=parse_bytes, default="6GiB", help="over all processes; on a GPU, of each")
    parser.add_argument("--prompt", type=int, default=270)
    parser.add_argument("--action", type=int, default=12)
    parser.add_argument("--observation", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--lora_rank", type=int, default=0, help="of adapters that are trained instead of the model")
    parser.add_argument("--beta", type=float, default=0.0, help="of the KL term; other than 0, there is a reference")
    parser.add_argument("--iterations", type=int, default=1, help="before the checkpoint; the last one is measured")
    # for the processes themselves
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train or options.reload:
        train(options)
        return
    fields, strategy = from_accelerate_config(options.config)
    options.processes = options.processes or fields["gpus"]
    strategy = replace(strategy, lora_rank=options.lora_rank or None)
    with tempfile.TemporaryDirectory() as options.directory:
        if options.model is None:
            options.model = str(Path(options.directory, "model"))
            write_random_model(choose_shape(options, strategy), options.model)
        report(options, strategy, launch(options, "--train"), launch(options, "--reload"))


if __name__ == "__main__":
    main()
