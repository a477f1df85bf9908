"""
[`SeeUPOTrainer`]: TRL's GRPO trainer with the turn-by-turn update of SeeUPO (arXiv 2602.06554).

One `global_step` is one iteration k of the paper: sample groups of episodes, score them, update the turns from the
last to the first. Everything around the update (generation, tools, environments, rewards, logging, checkpoints, Hub)
is TRL's. Written against trl 1.16 (and 1.15); `tests/trainer/test_trl_contract.py` names every private hook that is
used.
"""

import textwrap
from collections import deque
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from .distributed.adapter_sync import sync_without_merging
from .distributed.backends import check_deepspeed, keep_output_dtype, let_gloo_finish, reference_in_layers
from .distributed.checkpoints import (
    ExactResume,
    PlaceInData,
    ResumableRepeatSampler,
    check_moving_reference,
    save_between_iterations,
)
from .distributed.lock_step import IdleStep, LockStep
from .distributed.precision import check_precision, weights_given_back
from .envs.tools import EMPTY_PROMPT
from .episode_batch import (
    EpisodeBatch,
    TurnBatch,
    check_finite,
    checked_batch,
    generated_rows,
    trajectories_from_masks,
    was_cut,
)
from .evaluation.info_metrics import InfoMetrics, numbers_in
from .evaluation.logs import as_logged, completion_metrics, episode_metrics, replace_last, tool_call_metrics
from .evaluation.outcome import Outcome, describe_outcomes
from .evaluation.silence import Silence
from .evaluation.summary import Evaluation
from .grpo_compatibility import (
    FixedValues,
    check_overrides,
    fixed_order,
    fixed_values,
    loss_settings,
    no_advice_on_ratio_level,
    own_methods,
)
from .rollout import environment_reward
from .rollout.ahead import Ahead, PlaysAhead
from .rollout.chat_format import in_one_part
from .rollout.checks import checked_rollout
from .rollout.parsing import BoundedParser
from .rollout.sampler import Sampler
from .rollout.samplers import sampler_of_backend
from .rollout.settings import RolloutSettings
from .rollout.tasks import first_episode
from .rollout.trl_environments import ToolRollout
from .rollout.turn_ends import TurnEnds, replaced
from .rollout.vllm import kept_awake
from .scoring.turn_buffer import Block, TurnBuffer
from .seeupo_config import SeeUPOConfig
from .trainer_inputs import (
    arguments_for_trl,
    check_best_metric,
    check_columns,
    check_dataset,
    check_dropout,
    check_limits,
    check_noise,
    check_optimizer,
    check_resampling,
    check_reward_models,
    check_rollouts_ahead,
    choose_rollout,
    distinct_names,
    placeholder_dataset,
    readable_tool,
    with_environment_processor,
    with_environment_reward,
    with_plain_prompt,
)
from .trajectory_log import TrajectoryLog
from .update.entropy_bonus import EntropyBonus
from .update.evaluation_loss import evaluation_loss
from .update.loss import Actions, LossSettings, turn_surrogate
from .update.metrics import clip_metrics
from .update.objective import batch_advantages
from .update.resampling import fill_with_variance
from .update.scorers import Scorers
from .update.turn_credit import TurnCredit
from .update.turn_updater import TurnUpdater


class SeeUPOTrainer(ExactResume, PlaysAhead, GRPOTrainer):
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
            `trainer.rollout_inputs`. The rewards of a [`MultiTurnRollout`]'s environments are added to those of
            `reward_funcs`, as with `environment_factory`.
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

    _tool_rollout: ToolRollout | None = None
    _evaluation: Evaluation | None = None
    # set when training begins, where the script has no data loader of its own
    _fixed_order: FixedValues | None = None
    # the episodes of the last evaluation, the same on all processes
    last_evaluation: list[Outcome] | None = None
    # set while the Trainer's own optimizer step is due: the block it belongs to, or that there is no step to take
    _block_of_last_step: Block | None = None
    _is_idle = False
    _grad_norms: tuple[float, ...] = ()  # of the iteration's optimizer steps before the last one
    _opens_conversations = False
    _speaks_in_messages = False  # also where the dataset's prompts are texts
    rollout_round = 0  # above 0 while further tasks are played in place of some, see `zero_variance`

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
        given, args = args, SeeUPOConfig.from_grpo_config(args)
        self._given_config = args
        rollout = choose_rollout(environment_factory, rollout_func, tools)
        trainer_args = arguments_for_trl(args, uses_tools=bool(tools or rollout.environment_factory))
        if rollout.brings_reward:
            reward_funcs = with_environment_reward(reward_funcs, trainer_args, rollout_func is not None)
            reward_processing_classes = with_environment_processor(reward_processing_classes, reward_funcs)
            train_dataset = placeholder_dataset(args) if train_dataset is None else train_dataset
        check_rollouts_ahead(args, rollout, train_dataset)
        check_optimizer(optimizers[0])
        evaluates = ("evaluate", "evaluation_loop", "prediction_step")
        own_evaluation = any(getattr(type(self), name) is not getattr(SeeUPOTrainer, name) for name in evaluates)
        check_best_metric(args, eval_dataset, callbacks or [], own_evaluation)
        check_noise(args)
        check_deepspeed(args)

        with reference_in_layers(), no_advice_on_ratio_level():
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
                tools=tools and [readable_tool(tool, lambda: self._is_vlm) for tool in tools],
                rollout_func=rollout.rollout_func,
                environment_factory=rollout.environment_factory,
            )

        if self.accelerator.num_processes > 1:
            let_gloo_finish()
        save_between_iterations(self.callback_handler.callbacks)
        self._place_in_data = PlaceInData()
        self.callback_handler.add_callback(self._place_in_data)
        check_moving_reference(args, self.accelerator)
        check_resampling(args, self._is_vlm, train_dataset)
        check_precision(self)
        check_dropout(self.model)
        sync_without_merging(self)
        if rollout.tool_rollout is not None:
            self._play_by(rollout.tool_rollout)
        self.reward_func_names = distinct_names(self.reward_func_names)
        if rollout.brings_reward or self._tool_rollout is not None:
            check_columns(self.train_dataset, self.eval_dataset)
        self._check_overrides()
        self._idle_step = IdleStep(self.accelerator)
        self.callback_handler.callbacks.insert(0, self._idle_step)  # before those that step optimizers of their own
        self._scorers = Scorers(self)
        self._turn_credit = TurnCredit(self.reward_funcs, environment_reward, self.args)
        self._silence = Silence()
        self.rollout_inputs: list[dict[str, Any]] = []
        self._batch = EpisodeBatch([])
        processes = self.accelerator.process_index, self.accelerator.num_processes
        saved_in = args.output_dir if args.save_trajectories else None
        self._trajectory_log = TrajectoryLog(saved_in, self._tokenizer, *processes)
        self._fixed_values = fixed_values(self, args, given)
        self._info_metrics = InfoMetrics()
        self._ahead = Ahead()
        self._plays_ahead = rollout.plays_ahead
        self._close_environments = rollout.close
        self._opens_conversations = rollout.brings_reward
        self._speaks_in_messages = rollout.brings_reward and rollout_func is None

    @property
    def reads_sampled_logps(self) -> bool:
        """Whether the update depends on the log-probabilities that a sampler or a rollout function reports."""
        return loss_settings(self).reads_sampled

    def _check_overrides(self) -> None:
        check_overrides(self, _OWN_METHODS, plays_tools=self._tool_rollout is not None)

    @cached_property
    def config(self) -> SeeUPOConfig:
        """
        The configuration that was given. Nothing in here reads it, so that a script may have a `config` of its own.
        """
        return self._given_config

    def close(self) -> None:
        """
        Close the environments that were made by `environment_factory`. Happens by itself when the interpreter exits. A
        trainer that goes on afterwards makes new ones.
        """
        self._close_environments()

    def _play_by(self, tool_rollout: ToolRollout) -> None:
        """Hand the TRL environments over to their rollout, unless there are images: those are for TRL's own loop."""
        if self._is_vlm:
            if self.args.rollouts_ahead:
                raise ValueError(
                    "`rollouts_ahead=1` does not work with a vision model and TRL environments, which TRL's own loop "
                    "plays. Leave it at 0."
                )
            self.environment_factories = tool_rollout.factories
            self._environment_pool = {name: [] for name in tool_rollout.factories}
            tool_rollout.close()
            return
        check_limits(self.args)
        self._tool_rollout = tool_rollout
        self.rollout_func = partial(checked_rollout, tool_rollout)
        self.reward_funcs = tool_rollout.with_its_rewards(self.reward_funcs)

    def get_train_dataloader(self) -> DataLoader:
        self._fixed_order = fixed_order(self)
        return super().get_train_dataloader()

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableRepeatSampler:
        dataset = self.train_dataset if dataset is None else dataset
        # not where the data loader is made: a sampler of the script's own may repeat a few rows
        check_dataset(dataset, self.args.generation_batch_size, self.num_generations)
        return super()._get_train_sampler(dataset)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        keep_output_dtype(self.accelerator)

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
        self._fixed_values.check()
        if self._fixed_order is not None:
            self._fixed_order.check()
        self._check_overrides()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have two modes
            self.optimizer.train()
        batch = self._prepare_inputs(inputs)
        episodes = checked_batch(batch)
        self._metrics["train"]["time/rollout"].append(perf_counter() - start)
        if self.args.rollouts_ahead and self._is_followed_at_once():
            rows = [with_plain_prompt(row) for row in self._ahead.next_rows]
            self._ahead.start(self._plays_ahead, rows, self)

        config = SeeUPOConfig.from_grpo_config(self.args)  # checked: it may have been changed
        updater = TurnUpdater(
            TurnBuffer(episodes.trained),
            batch["advantages"].tolist(),
            episodes.num_trajectories,
            config,
            LockStep(self, model),
            self._scorers.of_policy(batch),
            self.model,
            iteration=self.state.global_step,
            entropy_bonus=EntropyBonus(config, self.entropy_coef, self._last_world_entropy),
            reference=self._scorers.reference(batch),
            aux_loss_coef=self.router_aux_loss_coef if self.aux_loss_enabled else 0.0,
            settings=loss_settings(self),
            surrogate=self.turn_surrogate,
            turn_advantages=episodes.turn_advantages,
        )
        self._is_idle = updater.plan.last_step is None
        loss = updater.run()
        # TRL keeps these two in checkpoints
        self.entropy_coef = updater.entropy_bonus.coef
        self._last_world_entropy = updater.entropy_bonus.last_entropy
        self._add_metrics(updater.logs())
        self._trajectory_log.clear()
        self._trajectory_log.add(episodes.outcomes, episodes.trajectories, updater.record.turns)
        self._trajectory_log.write("train", self.state.global_step + 1)
        if self._is_idle:
            self._idle_step.begin(self.model)
        else:
            self._block_of_last_step = updater.plan.last_step.block
            self._grad_norms = tuple(norm for _, norm in updater.record.grad_norms)

        self._step += 1
        self._metrics["train"]["step_time"].append(perf_counter() - start)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def turn_surrogate(
        self, ratios: torch.Tensor, weights: torch.Tensor, actions: Actions, settings: LossSettings
    ) -> torch.Tensor:
        """
        What is maximised of each action; override it to train with a surrogate of your own. Arguments and result as in
        [`~seeupo_trl.update.loss.turn_surrogate`], which this calls.
        """
        return turn_surrogate(ratios, weights, actions, settings)

    def select_episodes(self, episodes: EpisodeBatch) -> EpisodeBatch:
        """
        The episodes that an iteration trains on; override it to filter or to replay. It is called when the episodes
        have been played and have their rewards, before advantages are computed.

        What it returns has as many episodes as it got, in the same groups: an episode is taken out by an entry in
        `is_left_out`, and replaced by another `trajectory` of the same prompt with its row of `rewards_per_func`.
        """
        return episodes

    def rollout_sampler(self, ends: TurnEnds, settings: RolloutSettings) -> Sampler | None:
        """
        Who answers the requests of a rollout; override it to sample from an engine of your own. Called on every
        process before each rollout. Arguments and result as in
        [`~seeupo_trl.rollout.samplers.sampler_of_backend`], which this calls: with `None`, episodes play in lock step
        through the trainer's `_generate_single_turn`.
        """
        return sampler_of_backend(self, ends, settings)

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        # every step gets a generation batch of its own: nothing to split, nothing to reuse
        return self._generate_and_score_completions(generation_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch, episodes = self._play(inputs)
        played = list(episodes.trajectories)
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        if self.model.training:
            if self.args.zero_variance == "resample":
                fill_with_variance(episodes, self, lambda rows: self._play(rows)[1])
                self._batch, self.rollout_inputs = episodes, episodes.rows
            episodes = batch["episodes"] = self.select_episodes(episodes)
            episodes.show_replaced(batch, played, self._tokenizer.pad_token_id)
            left_out = torch.tensor([episodes.num_left_out], device=self.accelerator.device)
            self._add_metrics([("episodes/left_out", float(self.accelerator.gather(left_out).sum()))])
        rewards_per_func = self.accelerator.gather(episodes.rewards_per_func)  # (N, F)
        advantages = batch_advantages(
            rewards_per_func,
            self.reward_weights,
            group_size,
            normalize=self.args.scale_rewards == "batch",
            per_function=self.multi_objective_aggregation == "normalize_then_sum",
            clip=self.args.advantage_clip,
        )  # (N,)
        first = self.accelerator.process_index * len(inputs)
        local = slice(first, first + len(inputs))
        batch["advantages"] = advantages[local]
        if self.model.training and self.args.turn_credit == "to_go":
            per_function = self.multi_objective_aggregation == "normalize_then_sum"
            turn_advantages = self._turn_credit.advantages(
                episodes.trajectories, rewards_per_func, self.reward_weights, group_size, per_function
            )
            episodes.turn_advantages = turn_advantages[local]
            episodes.advantages = batch["advantages"].clone()
        episodes.num_trajectories = len(advantages)
        # by group, as in GRPO with `scale_rewards="group"`
        without_variance = (advantages.view(-1, group_size) == 0).all(dim=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["frac_reward_zero_std"][-1] = without_variance.double().mean().item()
        replace_last(self._logs["advantages"], advantages.tolist())
        if self.model.training:
            self._silence.hear_advantages(advantages.tolist())
        episodes.outcomes = describe_outcomes(
            episodes.rows,
            episodes.trajectories,
            episodes.rewards_per_func,
            self.reward_func_names,
            self.reward_weights,
            batch["advantages"].tolist(),
            first_index=first_episode(self, len(inputs)),
            group_size=group_size,
            success_threshold=self.args.success_threshold,
        )
        if self._evaluation is not None:
            self._evaluation.add(episodes.outcomes)
            self._trajectory_log.add(episodes.outcomes, episodes.trajectories)
        return batch

    def _play(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], EpisodeBatch]:
        """Play and score the episodes of some dataset rows; TRL's batch, and the episodes as they are."""
        rows = self.rollout_inputs = [with_plain_prompt(row) for row in rows]
        # GRPO's own passes for the reference and the sampler would run over whole padded completions; the update phase
        # makes them by turn, only where they are needed
        hidden = {"beta": 0.0, "vllm_importance_sampling_correction": False, "mask_truncated_completions": False}
        if self._tool_rollout is not None:
            # TRL's own resets and tool calls, in place of which the rollout function is called
            hidden |= {"tools": [], "environment_factories": None}
            self.environments = None
        if self._tool_rollout is not None or self._opens_conversations:
            check_columns(rows)  # they may be of another dataset than the trainer was made with
            rows = [{"prompt": EMPTY_PROMPT, **row} for row in rows]
        # TRL calls the two hooks below, which fill it; to `rows` it adds what the rollout returned
        episodes = self._batch = EpisodeBatch([dict(row) for row in rows])
        if self.args.rollouts_ahead and self.model.training and not self.rollout_round:
            played = self._ahead.take(self.state.global_step)  # before TRL pushes the weights
            self._add_metrics([("rollout/staleness", float(played is not None))])
            if played is not None:
                hidden["rollout_func"] = partial(checked_rollout, lambda prompts, trainer: played.output())
        # what they return is trained on, also where a script overrides or patches them
        hidden["_generate"] = partial(self._take_episodes, self._generate)
        hidden["_calculate_rewards"] = partial(self._take_rewards, self._calculate_rewards)
        with replaced(self, **hidden):
            batch = TurnBatch(super()._generate_and_score_completions(rows))
        batch["episodes"] = episodes
        if self.mask_truncated_completions:
            episodes.mask_cut(batch)
        episodes.remember(batch)
        return batch, episodes

    def _generate(self, prompts: list) -> tuple:
        with kept_awake(self):
            output = list(self._generate_as_text(prompts))
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields = output[:6]
        if self._tool_rollout is not None:
            self.environments = extra_fields.pop("environments")
            prompts[:] = extra_fields.pop("prompts")  # for reward functions and logs, with what `reset` returned
            self._add_metrics(tool_call_metrics(extra_fields.pop("tool_calls"), self.accelerator).items())
        if self._speaks_in_messages:
            check_reward_models(self.reward_funcs, self.reward_func_names, prompts)
        trajectories = extra_fields.pop("trajectories", None)
        if trajectories is None:
            trajectories = trajectories_from_masks(prompt_ids, completion_ids, tool_mask, logprobs, completions)
        elif self._speaks_in_messages or is_conversational({"prompt": prompts[0]}):
            # reward functions may read the last message, also where an environment failed before there was one
            output[3] = [trajectory.messages or [{"role": "assistant", "content": ""}] for trajectory in trajectories]
        self._batch.trajectories = trajectories
        self._batch.generated = generated_rows(output)
        return tuple(output)

    def _take_episodes(self, generate: Callable[[list], tuple], prompts: list) -> tuple:
        """Calls `_generate`, and keeps the episodes that its result says were played."""
        output = generate(prompts)
        _, completion_ids, tool_mask = output[:3]
        self._batch.follow_generated(output)
        trajectories = self._batch.trajectories
        is_end = self._turn_ends().are_in
        self._batch.is_cut = [was_cut(*one, is_end) for one in zip(trajectories, completion_ids, strict=True)]
        lengths = [sum(mask) for mask in tool_mask] if tool_mask is not None else [len(ids) for ids in completion_ids]
        logged = self._metrics["train" if self.model.training else "eval"]
        for name, value in completion_metrics(self._batch.is_cut, lengths, self.accelerator).items():
            logged[name][-1:] = [value]
        if self._evaluation is None:  # which reports the same over all its batches
            metrics = episode_metrics(trajectories, self.accelerator)
            self._add_metrics(metrics.items())
            numbers = [numbers_in(trajectory.info) for trajectory in trajectories if not trajectory.is_quarantined]
            self._add_metrics(self._info_metrics.of(gather_object(numbers)).items())
            if self.model.training:
                self._silence.hear_episodes(metrics, logged["completions/clipped_ratio"][-1])
        return output

    def _generate_as_text(self, prompts: list) -> tuple:
        if self._tool_rollout is None and not self._opens_conversations:
            with replaced(self._tokenizer, parse_response=BoundedParser(self._tokenizer)):
                return super()._generate(prompts)
        # they bring their messages: TRL need not parse whole episodes as one, which what is nested deeply would end
        play = self.rollout_func
        with replaced(self, rollout_func=lambda _, trainer: play(prompts, trainer)):
            return super()._generate([""] * len(prompts))

    def _generate_single_turn(self, *args, **kwargs) -> tuple:
        if self.rollout_func is not None:  # which sees to the ends of its turns
            return super()._generate_single_turn(*args, **kwargs)
        ends = self._turn_ends()
        with ends.applied_to(self):
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        lengths = [ends.length_of(list(ids)) for ids in completion_ids]
        completion_ids = [list(ids[:length]) for ids, length in zip(completion_ids, lengths, strict=True)]
        if logprobs is not None:
            logprobs = [logps[:length] for logps, length in zip(logprobs, lengths, strict=True)]
        return completion_ids, logprobs

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        if not self._is_vlm:  # templates of text models may show nothing of parts
            tool_messages = list(map(in_one_part, tool_messages))
        return super()._get_tool_suffix_ids(tool_messages)

    def _turn_ends(self) -> TurnEnds:
        return TurnEnds.of(RolloutSettings.from_arguments(self.args), self, self._tokenizer)

    def _take_rewards(self, calculate_rewards: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        """Calls `_calculate_rewards`, and keeps its rewards but for those of episodes whose environment failed."""
        rewards = calculate_rewards(*args, **kwargs).clone()  # (N, F)
        trajectories = self._batch.trajectories
        quarantined = torch.tensor([t.is_quarantined for t in trajectories], device=self.accelerator.device)
        rewards[self.accelerator.gather(quarantined)] = torch.nan
        check_finite(rewards, self.reward_func_names)
        first = self.accelerator.process_index * len(trajectories)
        self._batch.rewards_per_func = rewards[first : first + len(trajectories)].clone()
        return rewards

    # ---- The Trainer's own optimizer step: the last one of the iteration ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        return 0.0 if self._is_idle else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        if self._is_idle:
            return 0.0
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._block_of_last_step is not None:
            self._add_metrics([(f"turn_{self._block_of_last_step.label}/grad_norm", float(grad_norm))])
            self._block_of_last_step = None
            self._silence.hear_gradients([*self._grad_norms, float(grad_norm)])
        return grad_norm

    # ---- Evaluation ----

    @property
    def _num_evaluated(self) -> int:
        """Number of episodes of the evaluation that is going on, over all processes; 0 where none is."""
        return 0 if self._evaluation is None else self._evaluation.num_seen

    def evaluation_loop(
        self, dataloader: DataLoader, *args, metric_key_prefix: str = "eval", **kwargs
    ) -> EvalLoopOutput:
        """
        Evaluate as [`~transformers.Trainer.evaluation_loop`] does, and report what
        [`~seeupo_trl.evaluation.summary`] defines over all episodes: success, rewards and stop reasons, with
        confidence intervals and by category. `last_evaluation` has the outcome of each episode
        ([`~seeupo_trl.evaluation.outcome.Outcome`]), the same on all processes;
        [`~seeupo_trl.evaluation.comparison.compare`] compares two evaluations task by task.
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
            with weights_given_back(self):
                output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        except BaseException:
            # the next one shall not report what was measured of this one
            for measured in (self._metrics["eval"], self._pending_metrics, self._pending_extra_logs):
                measured.clear()
            raise
        finally:
            self._evaluation = None
        self.last_evaluation = evaluation.outcomes()
        # TRL averages over batches, whose sizes may differ
        self._metrics["eval"].update({name: [value] for name, value in evaluation.rewards().items()})
        numbers = [outcome.numbers for outcome in self.last_evaluation if not outcome.is_quarantined]
        metrics = evaluation.metrics() | self._info_metrics.of(numbers)
        output.metrics.update({f"{metric_key_prefix}_{n}": value for n, value in metrics.items()})
        split = "eval-train" if metric_key_prefix == "train" else metric_key_prefix  # "train" is what was trained on
        self._trajectory_log.write(split, self.state.global_step, evaluation.num_episodes)
        return output

    def predict(self, *args, **kwargs) -> PredictionOutput:
        is_training = self.model.training
        output = super().predict(*args, **kwargs)
        self._metrics["eval"].clear()  # nothing logs them, and the next evaluation shall not report them
        if self.is_in_train:  # a callback's prediction would keep the iteration's metrics out of the log
            self.model.train(is_training)
        return output

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Loss of an evaluation batch: all turns at once, at a ratio of 1. Training does not go through here."""
        if self.model.training:
            raise TypeError(
                f"{type(self).__name__} calls `compute_loss` in training, in a `training_step` of its own perhaps: "
                "SeeUPOTrainer updates turn by turn, with several optimizer steps. Call `super().training_step(...)`, "
                "and override `turn_surrogate` for another loss."
            )
        episodes = checked_batch(inputs)
        lock_step = LockStep(self, model)
        values = evaluation_loss(
            TurnBuffer(episodes.trained),
            inputs["advantages"].tolist(),
            episodes.num_trajectories,
            lock_step,
            self._scorers.of_policy(inputs),
            self.model,
            self.args.per_device_eval_batch_size,
            self._scorers.reference(inputs),
            self.beta,
        )
        loss = values.pop("loss")
        values |= dict.fromkeys(clip_metrics(self.loss_type), 0.0)  # at a ratio of 1
        self._add_metrics(values.items())
        return torch.tensor(loss, device=lock_step.device)

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.log_completions:
            for name in ("prompt", "completion"):
                conversations = self._logs[name]
                self._logs[name] = deque(map(as_logged, conversations), maxlen=conversations.maxlen)
        super().log(logs, start_time)

    def _add_metrics(self, values: Iterable[tuple[str, float]]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values:
            metrics.setdefault(name, []).append(value)


_OWN_METHODS = own_methods(SeeUPOTrainer)
