"""
One full iteration of a Qwen3-14B-shaped model - rollout stub, all turn updates, checkpoint, reload - and its memory.

    accelerate launch --config_file CONFIG benchmarks/dry_run_14b.py                       # the largest that fits
    accelerate launch --config_file CONFIG benchmarks/dry_run_14b.py --shape 8,40,151936   # Qwen3-14B itself

A shape is `width,layers,vocabulary` in the proportions of Qwen3-14B: width 8 is its own, with hidden size 5120, 40
query and 8 key-value heads of 128, and an intermediate size of 17408; width 1 is an eighth of each but the head size.
Without `--shape` it is the largest that `seeupo_trl.plan` says needs no more than `--memory` over all processes (on a
GPU: of each). Weights are random; `--model` takes real ones. On a CPU every process counts the bytes of its tensors,
on a GPU CUDA's allocator does. The plan's prediction is printed beside that, and what was reloaded is compared bit by
bit with what was saved.
"""

import argparse
import gc
import hashlib
import os
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer, Trajectory, Turn
from seeupo_trl.activation_memory import PassMemory, trace_pass
from seeupo_trl.live_bytes import LiveBytes
from seeupo_trl.memory_model import estimate, update_pass
from seeupo_trl.plan import parse_bytes
from seeupo_trl.planned_run import GIB, Run, Strategy, model_shape


WIDTHS = (8, 7, 6, 5, 4, 3, 2, 1)
# vocabularies: Qwen3's, and shares of it where not even width 1 fits with it
CANDIDATES = [(width, 40, 151936) for width in WIDTHS] + [(1, 40, 18992), (1, 20, 18992), (1, 8, 4748)]
GROUP_SIZE = 4


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


def strategy_of(args: SeeUPOConfig) -> Strategy:
    """What the launcher asks for, from DeepSpeed's own configuration."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        return Strategy(0)
    zero = plugin.deepspeed_config["zero_optimization"]
    sizes = {"reduce_bucket_size": "reduce_bucket_size", "max_live_parameters": "stage3_max_live_parameters"}
    return Strategy(
        zero_stage=zero["stage"],
        offload_optimizer=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        offload_param=(zero.get("offload_param") or {}).get("device", "none") != "none",
        **{name: int(zero[key]) for name, key in sizes.items() if key in zero},
    )


def run_of(config: Qwen3Config, options: argparse.Namespace, processes: int) -> Run:
    episode = options.prompt + options.turns * (options.action + options.observation)
    return Run(
        config=config,
        gpus=processes,
        gpu_memory=80 * GIB,
        tokens=GROUP_SIZE // 2 * episode,
        prompt=options.prompt,
        action=options.action,
        observation=options.observation,
        generation="vllm-server",  # nothing is generated here
    )


def predicted_peak(run: Run, strategy: Strategy, memory: PassMemory | None = None) -> tuple[float, float]:
    """Bytes of a process between iterations, and at most; on a CPU what is offloaded is in the same memory."""
    one = estimate(run, strategy, memory)
    offloaded = sum(value for name, value in one.host.items() if "checkpoint" not in name) / run.gpus
    return sum(one.kept.values()) + offloaded, max(one.peaks["update"], one.peaks["optimizer step"]) + offloaded


def choose_shape(options: argparse.Namespace, strategy: Strategy, state: PartialState) -> Qwen3Config:
    on_cpu = state.device.type == "cpu"
    if options.shape:
        return shaped_config(*map(int, options.shape.split(",")))
    for shape in CANDIDATES:
        config = shaped_config(*shape)
        peak = predicted_peak(run_of(config, options, state.num_processes), strategy)[1]
        if peak * (state.num_processes if on_cpu else 1) <= options.memory:
            state.print("shape", ",".join(map(str, shape)))
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

    def __init__(self, counter: LiveBytes, on_cpu: bool):
        self._counter, self._on_cpu = counter, on_cpu
        self.kept = self.peak = 0

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        gc.collect()
        if self._on_cpu:
            for parameter in model.parameters():
                self._counter.count(parameter)
            self._counter.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, args, state, control, **kwargs):
        self.peak = self._counter.peak if self._on_cpu else torch.cuda.max_memory_allocated()
        gc.collect()
        self.kept = self._counter.live if self._on_cpu else torch.cuda.memory_allocated()


class Digest(TrainerCallback):
    """Digest of this process's parameters and optimizer state once training begins, after a checkpoint was loaded."""

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


def make_trainer(model: str, options, args: SeeUPOConfig, callbacks: list) -> SeeUPOTrainer:
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    return SeeUPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64 * PartialState().num_processes}),
        processing_class=make_tokenizer(),
        rollout_func=stub(options, vocabulary),
        callbacks=callbacks,
    )


def arguments(output_dir: str, options: argparse.Namespace, steps: int) -> SeeUPOConfig:
    return SeeUPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=GROUP_SIZE // 2,
        gradient_accumulation_steps=2,
        num_generations=GROUP_SIZE,
        max_steps=steps,
        save_strategy="steps",
        save_steps=options.iterations,
        learning_rate=1e-6,
        beta=0.0,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": "bfloat16"},
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="width,layers,vocabulary")
    parser.add_argument("--model", help="directory of a real model, in place of a shape with random weights")
    parser.add_argument("--memory", type=parse_bytes, default="6GiB", help="over all processes; on a GPU, of each")
    parser.add_argument("--prompt", type=int, default=270)
    parser.add_argument("--action", type=int, default=12)
    parser.add_argument("--observation", type=int, default=8)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=1, help="the last one is measured")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        prepare_cpu()
    directory = [tempfile.mkdtemp()]
    args = arguments(directory[0], options, options.iterations)
    state = PartialState()
    broadcast_object_list(directory)
    args.output_dir = str(Path(directory[0], "run"))
    on_cpu = state.device.type == "cpu"
    strategy = strategy_of(args)

    model = options.model
    if model is None:
        model = str(Path(directory[0], "model"))
        if state.is_main_process:
            write_random_model(choose_shape(options, strategy, state), model)
    state.wait_for_everyone()
    config = AutoConfig.from_pretrained(model)
    run = run_of(config, options, state.num_processes)

    with LiveBytes() if on_cpu else torch.enable_grad() as counter:
        memory = Memory(counter, on_cpu)
        trainer = make_trainer(model, options, args, [memory])
        largest = record_largest_batch(trainer)
        trainer.train()
        saved = digest(trainer)
        steps = trainer.state.log_history[0]["optimizer_steps"]
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()

        reloaded = Digest()
        again = make_trainer(model, options, arguments(args.output_dir, options, options.iterations + 1), [reloaded])
        reloaded.trainer = again
        again.args.save_strategy = "no"
        again.train(resume_from_checkpoint=True)
    equal = gather_object([saved == reloaded.value])

    measured = gather_object([(memory.kept, memory.peak)])
    if state.is_main_process:
        report(
            config, replace(run, tokens=largest[0].num_tokens), strategy, largest[0], measured, steps, equal, on_cpu
        )
    again.accelerator.end_training()


def write_random_model(config: Qwen3Config, directory: str) -> None:
    """Save a randomly initialised model; the process that writes it is not part of a ZeRO-3 initialisation."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(previous)
    model.save_pretrained(directory)


def record_largest_batch(trainer: SeeUPOTrainer) -> list:
    """A list that holds the largest micro-batch that was laid out so far."""
    micro_batches, largest = trainer._scorer.micro_batches, []

    def recorded(*args, **kwargs):
        batches = micro_batches(*args, **kwargs)
        largest[:] = sorted([*largest, *batches], key=lambda batch: -batch.num_tokens)[:1]
        return batches

    trainer._scorer.micro_batches = recorded
    return largest


def report(config, run, strategy, batch, measured, steps, equal, on_cpu) -> None:
    one = update_pass(run, strategy)
    # the launcher's ZeRO-3 initialisation would partition the model that is traced
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    memory = trace_pass(config, one, batch if on_cpu else None)
    kept, peak = predicted_peak(run, strategy, memory)
    shape = model_shape(config)
    print(f"{shape.total / 1e6:.0f}M parameters, {strategy.name}, {run.gpus} processes, {steps:.0f} turn updates,")
    print(f"largest micro-batch {run.tokens} tokens; checkpoint reloaded bit by bit: {all(equal)}")
    print("| GiB a process | measured | predicted | ratio |\n|---|---:|---:|---:|")
    for name, values, prediction in zip(("kept", "peak"), zip(*measured, strict=True), (kept, peak), strict=True):
        largest = max(values)
        print(f"| {name} | {largest / GIB:.3f} | {prediction / GIB:.3f} | {prediction / largest:.2f} |")


if __name__ == "__main__":
    main()
