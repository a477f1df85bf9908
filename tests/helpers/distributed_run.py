"""
One process of `test_distributed.py`. A process starts once and trains several runs, one after the other:

`accelerate launch --config_file CONFIG distributed_run.py JOB.json`

The job is `{"num_processes": 2, "runs": [{"name": "kl", "model": ..., "output": ..., "beta": 0.1}, ...]}`; whatever
`train` does not take from a run is an argument of `SeeUPOConfig`. A run leaves its model, its logs and a note of each
process in `OUTPUT/NAME`.
"""

import json
import os
import random
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from fixed_rollouts import outcome_reward
from peft import LoraConfig
from tiny import ON_CPU, VOCABULARY
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from unkind_rollouts import GROUP_SIZE, NUM_TRAJECTORIES, TURNS, FixedRollouts

from seeupo_trl import MultiTurnEnvironment, MultiTurnRollout, Observation, SeeUPOConfig, SeeUPOTrainer, StepResult
from seeupo_trl.distributed.backends import let_gloo_finish


# Turns of the episodes of an iteration's four prompts. They go to the processes in order.
LENGTHS = [1, 1, 4, 8]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def set_adapter(model: torch.nn.Module) -> None:
    """Give an adapter weights that depend on nothing but their names."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


class Marathon(MultiTurnEnvironment):
    """Ends after as many turns as the task says, and pays for low token numbers."""

    def reset(self, turns: int, word: int, **task) -> Observation:
        self.left, self.word = turns, word
        return Observation(messages=[{"role": "user", "content": f"w{word}"}])

    def step(self, message: dict) -> StepResult:
        self.left -= 1
        words = message["content"].split()
        reward = sum(word.startswith("w") for word in words) / 8
        if self.left == 0:
            return StepResult(messages=[], reward=reward, terminated=True)
        return StepResult(messages=[{"role": "user", "content": f"w{self.word} {self.left}"}], reward=reward)


class Marathons(MultiTurnRollout):
    """Gives each member of a group another word, because all members would play alike: tokens are not drawn here."""

    def __init__(self):
        super().__init__(Marathon)
        self.generations = 0

    def __call__(self, prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        rows = enumerate(trainer.rollout_inputs, start=first)
        trainer.rollout_inputs = [{**row, "word": (row["word"] + 11 * (i % GROUP_SIZE)) % 60} for i, row in rows]
        generate = trainer._generate_single_turn

        def counted(*args, **kwargs):
            self.generations += 1
            return generate(*args, **kwargs)

        trainer._generate_single_turn = counted
        try:
            return super().__call__(prompts, trainer)
        finally:
            trainer._generate_single_turn = generate


class Killer(TrainerCallback):
    """
    Kills one process as a machine failure would: at once, without clean-up.

    Args:
        step (`int`):
            Iterations done before.
        process (`int`):
            Which process.
        note (`Path`):
            Where the time of death is written.
    """

    def __init__(self, step: int, process: int, note: Path):
        self.step, self.process, self.note = step, process, note
        self.optimizer_steps = 0

    def kill(self, args, state) -> None:
        if state.global_step == self.step and args.process_index == self.process:
            self.note.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


class KillerBetweenTurns(Killer):
    """The last turn of the iteration has been updated, the one before has its gradients."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.optimizer_steps = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.optimizer_steps += 1
        if self.optimizer_steps == 2:
            self.kill(args, state)


class KillerWhileSaving(Killer):
    """The other processes have written their parts of the checkpoint."""

    def attach(self, trainer: SeeUPOTrainer) -> None:
        save = trainer._save_rng_state

        def save_or_die(output_dir: str) -> None:
            if trainer.state.global_step == self.step and trainer.args.process_index == self.process:
                time.sleep(2)
                self.kill(trainer.args, trainer.state)
            save(output_dir)

        trainer._save_rng_state = save_or_die


class Precision:
    """Whether all log-probabilities that a trainer scores are bfloat16 numbers."""

    def __init__(self, trainer: SeeUPOTrainer):
        self.is_bfloat16 = True
        self._score = trainer._scorers.policy.score
        trainer._scorers.policy.score = self.score

    def score(self, *args, **kwargs):
        scores, loss = self._score(*args, **kwargs)
        self.is_bfloat16 &= all(torch.equal(s.logps, s.logps.bfloat16().to(s.logps)) for s in scores.values())
        return scores, loss


def train(run: dict, num_processes: int) -> None:
    options = dict(run)
    output = Path(options.pop("output")) / options.pop("name")
    model = options.pop("model")
    lora = options.pop("lora", False)
    frozen = options.pop("frozen", ())
    plays = options.pop("plays", False)
    kill, kill_while_saving = options.pop("kill", None), options.pop("kill_while_saving", None)
    resume = options.pop("resume", False)
    fsdp = options.pop("fsdp", False)
    refused = options.pop("refused", False)
    evaluates_first = options.pop("evaluates_first", False)
    strip = options.pop("strip", False)
    if plays:
        options = {"max_turns": max(LENGTHS), "max_completion_length": 4, "top_k": 1, **options}
        # a response that is cut off would end the episode
        options["generation_kwargs"] = {"forced_eos_token_id": VOCABULARY.index("<|im_end|>")}
    rows = NUM_TRAJECTORIES // num_processes
    options.setdefault("gradient_accumulation_steps", rows // 2)
    args = SeeUPOConfig(
        **{
            **ON_CPU,
            "output_dir": str(output),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": rows,
            "num_generations": GROUP_SIZE,
            "shuffle_dataset": False,
            "max_steps": len(TURNS),
            "optim": "sgd",
            "learning_rate": 0.005,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            **options,
        }
    )
    if fsdp:
        # accelerate shards for FSDP only where it sees several GPUs, but FSDP2 itself works on CPUs with gloo
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prompts = [f"w{i}" for i in range(NUM_TRAJECTORIES // GROUP_SIZE * len(TURNS))]
    rollouts = {"rollout_func": FixedRollouts(strip), "reward_funcs": outcome_reward}
    dataset = {"prompt": prompts}
    if plays:
        rollouts = {"rollout_func": Marathons()}
        dataset = {
            "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
            "turns": LENGTHS * len(TURNS),
            "word": [5 * i for i in range(len(prompts))],
        }
    train_dataset = Dataset.from_dict(dataset)
    trainer = SeeUPOTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=train_dataset.select(range(NUM_TRAJECTORIES // GROUP_SIZE)) if evaluates_first else None,
        peft_config=LoraConfig(**LORA) if lora else None,
        callbacks=[KillerBetweenTurns(**kill, note=output / "killed")] if kill else None,
        **rollouts,
    )
    if kill_while_saving:
        KillerWhileSaving(**kill_while_saving, note=output / "killed").attach(trainer)
    if lora:
        set_adapter(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if any(name.startswith(prefix) for prefix in frozen):
            parameter.requires_grad_(False)
    note, precision = {}, Precision(trainer)
    if evaluates_first:
        trainer.evaluate()
    if refused:
        try:
            trainer.train(resume_from_checkpoint=resume or None)
        except ValueError as error:
            note["error"] = str(error)
    else:
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model(str(output / "final"))
        note["distributed_type"] = str(trainer.accelerator.distributed_type.value)
        note["log-probabilities are bfloat16"] = precision.is_bfloat16
        if trainer.ref_model is not None:
            note["units of the reference"] = sum(isinstance(m, FSDPModule) for m in trainer.ref_model.modules())
        note["num_processes"] = trainer.accelerator.num_processes
        note["lets Gloo finish"] = bool(let_gloo_finish.cache_info().currsize)
        if plays:
            note["generations"] = rollouts["rollout_func"].generations
        note["model"] = [base.__name__ for base in type(trainer.model_wrapped).__mro__]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"process_{args.process_index}.json").write_text(json.dumps(note))
    if trainer.accelerator.is_main_process:
        (output / "logs.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["num_processes"] > 1:
        import deepspeed
        import deepspeed.ops

        # compiling this kernel takes a minute and it changes nothing here: gloo is used without it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    random.seed(0)
    if job["init_deepspeed"]:
        # with `use_cpu` the Trainer leaves this to the launcher, and ZeRO-3 would take the world for one process
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for run in job["runs"]:
        train(run, job["num_processes"])
    # the threads of gloo abort the interpreter's exit now and then
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
