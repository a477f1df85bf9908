"""
[`SeeUPOTrainer`]: TRL's GRPO trainer with the turn-by-turn update of SeeUPO (arXiv 2602.06554).

One `global_step` is one iteration k of the paper: sample groups of episodes, score them, update the turns from the
last to the first. Everything around the update (generation, tools, environments, rewards, logging, checkpoints, Hub)
is TRL's. Written against trl 1.16 (and 1.15); `tests/trainer/test_trl_contract.py` names every private hook that is
used.
"""

import copy
import json
import os
import textwrap
from collections import Counter, deque
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id, use_adapter

from .distributed.backends import check_deepspeed, check_first_engine, keep_output_dtype, reference_in_layers
from .distributed.checkpoints import (
    ResumableRepeatSampler,
    agree_on_checkpoint,
    check_checkpoint,
    discard_state,
    save_entropy_state,
)
from .distributed.lock_step import UpdateEngine
from .envs.base import StopReason
from .envs.tools import EMPTY_PROMPT
from .evaluation.outcome import Outcome, describe_outcomes
from .evaluation.summary import Evaluation
from .rollout.checks import checked_rollout
from .rollout.multi_turn import MultiTurnRollout
from .rollout.trl_environments import ToolRollout, tool_rollout_for
from .rollout.vllm import kept_awake
from .scoring.images import SampleScorer
from .scoring.rows import Scorer, score_without_gradient
from .scoring.trees import TreeScorer
from .seeupo_config import SeeUPOConfig
from .trainer_inputs import check_dataset, placeholder_dataset, with_environment_reward
from .trajectory import Trajectory, TurnBuffer, turns_from_mask
from .trajectory_log import TrajectoryLog
from .update.entropy_bonus import EntropyBonus
from .update.objective import center_by_group, k3_divergence, normalize_over_batch
from .update.turn_updater import Reference, TurnUpdater


class SeeUPOTrainer(GRPOTrainer):
    """
    Trainer for Sequence-level Sequential Update Policy Optimization (SeeUPO), introduced in the paper [SeeUPO:
    Sequence-Level Agentic-RL with Convergence Guarantees](https://huggingface.co/papers/2602.06554).

    Each turn of an episode is a virtual agent whose action is the whole response. An iteration samples groups of
    episodes and then updates the turns one after another, by default from the last to the first, each against the
    already updated continuation. It takes the arguments of [`~trl.GRPOTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from seeupo_trl import SeeUPOTrainer
    >>> from trl.rewards import accuracy_reward

    >>> trainer = SeeUPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     reward_funcs=accuracy_reward,
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()
    ```

    Args:
        model, reward_funcs, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, optimizers, quantization_config, peft_config, tools:
            As in [`~trl.GRPOTrainer`].
        args ([`SeeUPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration for this trainer. A `GRPOConfig` is upgraded, see [`SeeUPOConfig.from_grpo_config`].
        rollout_func (`Callable`, *optional*):
            As in [`~trl.GRPOTrainer`]: takes the prompts and the trainer, returns `"prompt_ids"`, `"completion_ids"`,
            `"logprobs"` and, for episodes of several turns, `"env_mask"`; each maximal run of ones is a turn. It may
            also return `"trajectories"`, a list with one [`Trajectory`] per prompt, which then says what the turns
            are; their contexts need not extend one another. The dataset rows of the prompts are in
            `trainer.rollout_inputs`.
        environment_factory (`Callable` or `dict[str, Callable]`, *optional*):
            As in [`~trl.GRPOTrainer`]; [`~seeupo_trl.rollout.trl_environments.ToolRollout`] plays the episodes. Or a
            [`MultiTurnEnvironment`] class (or a callable that returns one), which [`MultiTurnRollout`] drives; its
            rewards are added to those of `reward_funcs`, with weight 1.

    Raises:
        `ValueError`:
            When the configuration, the dataset or what a rollout or reward function returned cannot be trained on.
    """  # noqa: E501

    _tag_names = ["trl", "seeupo"]
    _name = "SeeUPO"
    _paper = {
        "title": "SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees",
        "id": "2602.06554",
        "citation": textwrap.dedent("""\
            @article{hu2026seeupo,
                title        = {{SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees}},
                author       = {Hu and Fu and Chen and Liu and Ding},
                year         = 2026,
                eprint       = {arXiv:2602.06554},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        reward_funcs: str | PreTrainedModel | Callable | list | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Callable | dict[str, Callable] | None = None,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SeeUPOConfig(f"{model_name.split('/')[-1]}-SeeUPO")
        elif not isinstance(args, SeeUPOConfig):
            args = SeeUPOConfig.from_grpo_config(args)
        self.config = args
        trainer_args = args.for_one_step_per_iteration()

        tool_rollout = None if environment_factory is None else tool_rollout_for(environment_factory, tools or [])
        if tool_rollout is not None and rollout_func is None:
            environment_factory = tool_rollout.factory_for_trl
        elif environment_factory is not None and tool_rollout is None:
            if rollout_func is not None or tools:
                raise ValueError(
                    "A `MultiTurnEnvironment` is driven by `MultiTurnRollout` and brings its own tools (in "
                    "`Observation.tools`): pass it without `rollout_func` and `tools`."
                )
            rollout_func, environment_factory = MultiTurnRollout(environment_factory), None
        if isinstance(rollout_func, MultiTurnRollout):
            reward_funcs = with_environment_reward(reward_funcs, trainer_args)
            if train_dataset is None:
                train_dataset = placeholder_dataset(args)
        if rollout_func is not None:
            rollout_func = partial(checked_rollout, rollout_func)
        if (tools or environment_factory) and args.max_tool_calling_iterations is None and args.max_turns is not None:
            trainer_args.max_tool_calling_iterations = args.max_turns - 1
        check_dataset(train_dataset, args)
        check_deepspeed(args)

        with reference_in_layers():
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=trainer_args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )

        self._tool_rollout: ToolRollout | None = None
        if tool_rollout is not None and rollout_func is None:
            self._play_by(tool_rollout)

        pad_token_id = self._tokenizer.pad_token_id
        options = {
            "temperature": args.temperature,
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "max_tokens": args.max_tokens_per_microbatch,
            "packing": args.packing,
        }
        self._scorer = TreeScorer(self.model, pad_token_id, aux_loss=self.aux_loss_enabled, **options)
        if self.ref_model is not None:
            ref_model = self.accelerator.unwrap_model(self.ref_model)
            self._ref_scorer = TreeScorer(ref_model, pad_token_id, **options)
        self.rollout_inputs: list[dict[str, Any]] = []
        self._trajectories: list[Trajectory] = []
        self._outcomes: list[Outcome] = []
        self._rewards_per_func = torch.empty(0)
        self._evaluation: Evaluation | None = None
        processes = self.accelerator.process_index, self.accelerator.num_processes
        saved_in = args.output_dir if args.save_trajectories else None
        self._trajectory_log = TrajectoryLog(saved_in, self._tokenizer, *processes)
        # set while the Trainer's own optimizer step is due: label of the block it belongs to, or None for no step
        self._block_of_last_step: str | None = None
        self._is_idle = False

    def _play_by(self, tool_rollout: ToolRollout) -> None:
        """Hand the TRL environments over to their rollout, unless there are images: those are for TRL's own loop."""
        if self._is_vlm:
            self.environment_factories = tool_rollout.factories
            self._environment_pool = {name: [] for name in tool_rollout.factories}
            tool_rollout.close()
            return
        self._tool_rollout = tool_rollout
        self.rollout_func = partial(checked_rollout, tool_rollout)
        self.reward_funcs = tool_rollout.with_its_rewards(self.reward_funcs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_output_dtype(self.accelerator)

    # ---- Data and checkpoints ----

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableRepeatSampler:
        return ResumableRepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            state_of_run=lambda: self.state,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Main training entry point, see [`~transformers.Trainer.train`]. With `resume_from_checkpoint=True` it resumes
        from the newest checkpoint that was written to its end. A checkpoint that was not, one without the state of
        every process (`save_only_model=True`), and one of another number of processes are refused.
        """
        check_first_engine(self)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = agree_on_checkpoint(self.args.output_dir, self.accelerator)
        if resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.accelerator)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            discard_state(
                os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            )
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.use_adaptive_entropy and self.args.should_save:
            save_entropy_state(output_dir, self.entropy_coef, self._last_world_entropy)
        # the state file, which is written next, says that the checkpoint is whole: on every process
        self.accelerator.wait_for_everyone()

    # ---- One iteration ----

    def training_step(
        self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        One iteration of Algorithm 1: sample, score, update the turns one block at a time.

        Returns:
            `torch.Tensor` of shape `()`:
                Mean of `-J_t` over the optimizer steps of the iteration (this process's share of it).
        """
        start = perf_counter()
        model.train()
        batch = self._prepare_inputs(inputs)
        self._metrics["train"]["time/rollout"].append(perf_counter() - start)

        buffer = TurnBuffer(
            batch["trajectories"],
            batch["advantages"].tolist(),
            batch["num_trajectories"],
            self.config.turn_weight_clip,
        )
        updater = TurnUpdater(
            buffer,
            self.config,
            UpdateEngine(self, model),
            self._scorer_of(batch),
            self.model,
            iteration=self.state.global_step,
            entropy_bonus=EntropyBonus(self.config, self.entropy_coef, self._last_world_entropy),
            reference=self._reference(batch),
            aux_loss_coef=self.router_aux_loss_coef if self.aux_loss_enabled else 0.0,
        )
        self._is_idle = not updater.steps
        loss = updater.run()
        # TRL keeps these two in checkpoints
        self.entropy_coef = updater.entropy_bonus.coef
        self._last_world_entropy = updater.entropy_bonus.last_entropy
        self._log_update(updater)
        self._trajectory_log.clear()
        self._trajectory_log.add(self._outcomes, self._trajectories, updater.turn_updates)
        self._trajectory_log.write("train", self.state.global_step + 1)
        if self._is_idle:
            # no gradient, no step: momentum and weight decay must not move the parameters either
            self.accelerator.gradient_state._set_sync_gradients(False)
        else:
            self._block_of_last_step = updater.steps[-1].block.label

        self._step += 1
        self._metrics["train"]["step_time"].append(perf_counter() - start)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        # every step gets a generation batch of its own: nothing to split, nothing to reuse
        return self._generate_and_score_completions(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self.rollout_inputs = inputs
        if self._tool_rollout is not None:
            inputs = [{"prompt": EMPTY_PROMPT, **row} for row in inputs]
        with self._without_token_level_passes(), self._without_tool_loop():
            batch = super()._generate_and_score_completions(inputs)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        advantages = self._group_relative_advantages(self._rewards_per_func, group_size)  # (N,)
        first = self.accelerator.process_index * len(inputs)
        local = slice(first, first + len(inputs))
        batch["advantages"] = advantages[local]
        batch["num_trajectories"] = len(advantages)
        # TRL empties the mask of a completion that `mask_truncated_completions` leaves out
        kept = batch["completion_mask"].any(dim=1).tolist()
        batch["trajectories"] = [
            trajectory if keep and not trajectory.is_quarantined else Trajectory(turns=[])
            for trajectory, keep in zip(self._trajectories, kept, strict=True)
        ]
        logged = self._logs["advantages"]  # GRPO's
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        self._outcomes = describe_outcomes(
            inputs,
            self._trajectories,
            self._rewards_per_func[local],
            self.reward_func_names,
            self.reward_weights,
            advantages[local].tolist(),
            first_index=first + (0 if self._evaluation is None else self._evaluation.num_seen),
            group_size=group_size,
            success_threshold=self.config.success_threshold,
        )
        if self._evaluation is not None:
            self._evaluation.add(self._outcomes)
            self._trajectory_log.add(self._outcomes, self._trajectories)
        return batch

    @contextmanager
    def _without_token_level_passes(self):
        # GRPO's own passes for the reference and the sampler would run over whole padded completions; the update
        # phase makes them by turn, only where they are needed
        saved = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction = 0.0, False
        try:
            yield
        finally:
            self.beta, self.vllm_importance_sampling_correction = saved

    @contextmanager
    def _without_tool_loop(self):
        # TRL's own resets and tool calls, in place of which the rollout function is called
        if self._tool_rollout is None:
            yield
            return
        saved = self.tools, self.environment_factories
        self.tools, self.environment_factories, self.environments = [], None, None
        try:
            yield
        finally:
            self.tools, self.environment_factories = saved

    def _generate(self, prompts: list) -> tuple:
        with kept_awake(self):
            output = list(super()._generate(prompts))
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields = output[:6]
        if self._tool_rollout is not None:
            self.environments = extra_fields.pop("environments")
            prompts[:] = extra_fields.pop("prompts")  # for reward functions and logs, with what `reset` returned
            self._log_tool_calls(extra_fields.pop("tool_calls"))
        trajectories = extra_fields.pop("trajectories", None)
        if trajectories is None:
            masks = tool_mask or [None] * len(prompt_ids)
            logps = logprobs or [None] * len(prompt_ids)
            trajectories = [
                Trajectory(turns=turns_from_mask(*sample), messages=messages if isinstance(messages, list) else [])
                for *sample, messages in zip(prompt_ids, completion_ids, masks, logps, completions, strict=True)
            ]
        elif is_conversational({"prompt": prompts[0]}):
            # reward functions may read the last message, also where an environment failed before there was one
            output[3] = [trajectory.messages or [{"role": "assistant", "content": ""}] for trajectory in trajectories]
        self._trajectories = trajectories
        self._log_episodes(trajectories)
        return tuple(output)

    def _calculate_rewards(self, *args, **kwargs) -> torch.Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        quarantined = torch.tensor([t.is_quarantined for t in self._trajectories], device=self.accelerator.device)
        self._rewards_per_func[self.accelerator.gather(quarantined)] = torch.nan
        if self._rewards_per_func.isinf().any():
            name = self.reward_func_names[self._rewards_per_func.isinf().any(dim=0).nonzero()[0].item()]
            raise ValueError(
                f"The reward function '{name}' returned an infinite reward. Rewards must be finite numbers, or `None` "
                "for a completion that cannot be scored."
            )
        return self._rewards_per_func

    def _group_relative_advantages(self, rewards_per_func: torch.Tensor, group_size: int) -> torch.Tensor:
        """Normalised advantages of all processes (Eq. 9), 0 for a trajectory that no reward function scored."""
        rewards_per_func = rewards_per_func.double()  # (N, F)
        weights = self.reward_weights.to(rewards_per_func)
        unscored = rewards_per_func.isnan().all(dim=1)
        if self.multi_objective_aggregation == "normalize_then_sum":
            objectives = [self._normalize(center_by_group(r, group_size)) for r in rewards_per_func.T]
            advantages = (torch.stack(objectives, dim=1) * weights).nansum(dim=1)
            advantages = advantages.masked_fill(unscored, torch.nan)
        else:
            rewards = (rewards_per_func * weights).nansum(dim=1).masked_fill(unscored, torch.nan)
            advantages = center_by_group(rewards, group_size)
        advantages = self._normalize(advantages).nan_to_num(nan=0.0)
        clip = self.config.advantage_clip
        return advantages if clip is None else advantages.clamp(-clip, clip)

    def _normalize(self, advantages: torch.Tensor) -> torch.Tensor:
        return normalize_over_batch(advantages) if self.config.scale_rewards == "batch" else advantages

    def _scorer_of(self, batch: dict[str, Any]) -> Scorer:
        if self._is_vlm:
            return self._sample_scorer(batch, aux_loss=self.aux_loss_enabled)
        return self._scorer

    def _sample_scorer(self, batch: dict[str, Any], **options) -> SampleScorer:
        options["max_tokens"] = self.config.max_tokens_per_microbatch
        return SampleScorer(batch, self._get_per_token_logps_and_entropies, **options)

    def _reference(self, batch: dict[str, Any]) -> Reference | None:
        if self.beta == 0.0:
            return None
        if self.ref_model is not None:
            scorer = self._ref_scorer
            if self._is_vlm:
                scorer = self._sample_scorer(batch, entropy=False)
            return Reference(scorer, self.ref_model, nullcontext)
        policy = self.accelerator.unwrap_model(self.model)
        adapter_name = "ref" if "ref" in policy.peft_config else None
        return Reference(self._scorer_of(batch), self.model, partial(use_adapter, policy, adapter_name))

    # ---- The Trainer's own optimizer step: the last one of the iteration ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        return 0.0 if self._is_idle else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        if self._is_idle:
            return 0.0
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._block_of_last_step is not None:
            self._metrics["train"][f"turn_{self._block_of_last_step}/grad_norm"].append(float(grad_norm))
            self._block_of_last_step = None
        return grad_norm

    # ---- Evaluation ----

    def evaluation_loop(
        self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        """
        Evaluate as [`~transformers.Trainer.evaluation_loop`] does, and report what
        [`~seeupo_trl.evaluation.summary`] defines over all episodes: success, rewards and stop reasons, with
        confidence intervals and by category.
        """
        self._evaluation = evaluation = Evaluation(
            dataloader.dataset,
            self.num_generations_eval,
            self.args.eval_batch_size,
            self.accelerator.num_processes,
            self.args.seed,
        )
        self._trajectory_log.clear()
        try:
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._evaluation = None
        # TRL averages over batches, whose sizes may differ
        self._metrics["eval"].update({name: [value] for name, value in evaluation.rewards().items()})
        output.metrics.update({f"{metric_key_prefix}_{n}": value for n, value in evaluation.metrics().items()})
        self._trajectory_log.write(metric_key_prefix, self.state.global_step, evaluation.num_episodes)
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Loss of an evaluation batch: all turns at once, at a ratio of 1. Training does not go through here."""
        buffer = TurnBuffer(inputs["trajectories"], inputs["advantages"].tolist(), inputs["num_trajectories"])
        engine = UpdateEngine(self, model)
        keys = {(index, turn) for index, t in enumerate(buffer.trajectories) for turn in range(1, len(t.turns) + 1)}
        max_rows = self.args.per_device_eval_batch_size
        scores, _ = score_without_gradient(buffer, keys, self._scorer_of(inputs), self.model, engine, max_rows)
        totals = torch.zeros(4, dtype=torch.float64)  # loss, tokens, entropy, kl
        totals[0] = -sum(buffer.advantages[index] for index in {index for index, _ in keys})
        totals[1] = sum(len(score.logps) for score in scores.values())
        totals[2] = sum(score.entropies.sum().item() for score in scores.values())
        reference = self._reference(inputs)
        if reference is not None:
            with reference.active():
                ref_scores, _ = score_without_gradient(
                    buffer, keys, reference.scorer, reference.model, engine, max_rows
                )
            for index in {index for index, _ in keys}:
                turns = [key for key in keys if key[0] == index]
                kl = torch.cat([k3_divergence(scores[key].logps, ref_scores[key].logps) for key in turns])
                totals[0] += self.beta * kl.mean().item()
                totals[3] += kl.sum().item()
        loss, tokens, entropy, kl = engine.gather(totals.float()).sum(0).tolist()
        self._metrics["eval"]["entropy"].append(entropy / max(tokens, 1.0))
        if reference is not None:
            self._metrics["eval"]["kl"].append(kl / max(tokens, 1.0))
        return torch.tensor(loss / buffer.num_trajectories, device=engine.device)

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.log_completions:
            for name in ("prompt", "completion"):
                conversations = self._logs[name]
                self._logs[name] = deque(map(_with_plain_arguments, conversations), maxlen=conversations.maxlen)
        super().log(logs, start_time)

    def _log_episodes(self, trajectories: list[Trajectory]) -> None:
        if self._evaluation is not None:
            return  # which reports the same over all its batches
        metrics = self._metrics["train" if self.model.training else "eval"]
        turns = torch.tensor([float(len(t.turns)) for t in trajectories], device=self.accelerator.device)
        turns = self.accelerator.gather(turns)
        values = {"turns/mean": turns.mean(), "turns/min": turns.min(), "turns/max": turns.max()}
        reasons = Counter(filter(None, gather_object([t.stop_reason for t in trajectories])))
        if reasons:
            # a reason that did not occur counts as 0, or its mean over several iterations would be too high
            values |= {f"stop_reason/{reason}": reasons[reason] / len(turns) for reason in StopReason}
        for name, value in values.items():
            metrics.setdefault(name, []).append(float(value))

    def _log_tool_calls(self, tool_calls: list[tuple[int, int]]) -> None:
        counts = self.accelerator.gather(torch.tensor(tool_calls, device=self.accelerator.device))  # (N, 2)
        calls, failures = counts.sum(dim=0)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["tools/call_frequency"].append((calls / len(counts)).item())
        metrics["tools/failure_frequency"].append((failures / calls).item() if calls > 0 else 0.0)

    def _log_update(self, updater: TurnUpdater) -> None:
        values = updater.statistics.reduce(updater.engine)
        values["turn_updates"] = len(updater.blocks)
        values["optimizer_steps"] = len(updater.steps)
        if updater.entropy_bonus.is_enabled:
            values["entropy_coef"] = updater.entropy_bonus.coef
        values |= {f"time/{name}": seconds for name, seconds in updater.seconds.items()}
        tokens = updater.engine.gather(torch.tensor(list(updater.tokens.values()), dtype=torch.float32)).sum(0)
        values |= {f"tokens/{name}": count for name, count in zip(updater.tokens, tokens.tolist(), strict=True)}
        for name, value in values.items():
            self._metrics["train"][name].append(value)
        for block, grad_norm in updater.grad_norms:
            self._metrics["train"][f"turn_{block.label}/grad_norm"].append(grad_norm)


def _with_plain_arguments(conversation: Any) -> Any:
    """The conversation with tool-call arguments as JSON text: their types differ by call, those of a column cannot."""
    if not isinstance(conversation, list):
        return conversation
    messages = []
    for message in conversation:
        calls = message.get("tool_calls")
        if calls:
            calls = copy.deepcopy(calls)
            for call in calls:
                function = call.get("function", call)
                if not isinstance(function.get("arguments", ""), str):
                    function["arguments"] = json.dumps(function["arguments"])
            message = {**message, "tool_calls": calls}
        messages.append(message)
    return messages
