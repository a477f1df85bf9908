"""Configuration of [`SeeUPOTrainer`]: only the fields SeeUPO adds to GRPO's, or whose default differs."""

import copy
import inspect
import math
import warnings
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any

from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames
from trl import GRPOConfig

from .envs.plain import is_whole
from .rollout.contexts import HISTORIES
from .rollout.settings import DefaultSeconds, DefaultTurns, RolloutSettings, as_limit, is_limit, values_of


UPDATE_ORDERS = ("reverse", "forward", "random", "simultaneous")
OLD_POLICIES = ("iteration", "turn")
TURN_CREDITS = ("episode", "to_go")
RATIOS = ("geometric", "product")
PACKINGS = ("auto", "tree", "rows")
ZERO_VARIANCE = ("keep", "resample")
SAMPLER_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")

LOSS_TYPES = ("seeupo", "luspo", "cispo", "sapo", "vespo")
# Loss types of GRPO that only say how token losses are averaged: no surrogate of a whole turn depends on that.
_AVERAGING_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
# what the Trainer runs with underneath differs from what the user gave in these
_BATCH_FIELDS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "num_iterations",
)


# What the published runs have in common, paper and code.
_PUBLISHED = {"beta": 0.002, "temperature": 0.9, "learning_rate": 1e-6, "lr_scheduler_type": "constant"}
_PLAIN_PRODUCTS = {
    "old_policy": "iteration",
    "surrogate_ratio": "product",
    "turn_ratio": "product",
    "turn_weight_clip": None,
    "advantage_clip": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {**_PUBLISHED, **_PLAIN_PRODUCTS, "surrogate_ratio": "geometric", "update_order": "reverse"},
    "authors": {
        **_PUBLISHED,
        "update_order": "reverse",
        "old_policy": "turn",
        "surrogate_ratio": "geometric",
        "turn_ratio": "geometric",
        "turn_weight_clip": 0.2,
        "advantage_clip": 3.0,
    },
    "products": {**_PLAIN_PRODUCTS, "update_order": "reverse"},
    "simultaneous_products": {**_PLAIN_PRODUCTS, "update_order": "simultaneous"},
}


def steps_in_backward(optimizer: str) -> str:
    """Why an optimizer that steps each layer during the backward pass is refused."""
    return (
        f"{optimizer} steps each layer during the backward pass, but the gradient of a turn is the sum of several "
        "backward passes. Use an optimizer that steps after them, for example `optim='adamw_torch'` or 'adafactor'."
    )


def _warn_of_shared_names(owner: type) -> None:
    """Warn where a class of the user's has a field that SeeUPO has added to GRPO's, perhaps for something else."""
    added = {f.name for f in fields(SeeUPOConfig)} - {f.name for f in fields(GRPOConfig)}
    theirs, ours = inspect.get_annotations(owner), inspect.get_annotations(SeeUPOConfig)
    for name in sorted(added & theirs.keys()):
        as_text = inspect.formatannotation(ours[name])
        if issubclass(owner, SeeUPOConfig) and theirs[name] in (ours[name], as_text):
            continue  # ours with another default
        warnings.warn(
            f"{owner.__name__} has a field `{name}`, and so has SeeUPOConfig: its value is read as SeeUPOConfig's "
            "option of that name. Give yours another name if it means something else; in a subclass of SeeUPOConfig, "
            f"the type `{as_text}` says that it does not.",
            stacklevel=3,
        )


@dataclass
class SeeUPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`SeeUPOTrainer`].

    This class includes only the parameters that SeeUPO adds to [`~trl.GRPOConfig`], or whose default value differs.
    For all others please refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the turn-by-turn update

        update_order (`str`, *optional*, defaults to `"reverse"`):
            Order in which the turns are updated. `"reverse"` (last turn first) is SeeUPO; `"forward"` and `"random"`
            (one seeded permutation an iteration, the same on all processes) are ablations; `"simultaneous"` updates
            all turns at once with the ratio of the whole trajectory, which is GSPO with the advantages of Eq. 9.
        max_turn_updates (`int`, *optional*):
            Largest number of sequential updates an iteration makes. Longer episodes merge consecutive turns into this
            many blocks; a block acts as one turn whose action is the concatenation of its turns' tokens. `None`
            updates every turn on its own; 1 equals `update_order="simultaneous"`.
        old_policy (`str`, *optional*, defaults to `"iteration"`):
            Policy in the denominator of the importance ratios. `"iteration"`: the policy that sampled, as in the
            paper. `"turn"`: the policy just before the turn's own update, as in the authors' code.
        turn_credit (`str`, *optional*, defaults to `"episode"`):
            What the advantage of a turn is made of. `"episode"`: the reward of the episode, the same for all of its
            turns, as in the paper. `"to_go"`: the rewards from that turn on, relative to the trajectories of the group
            that have that turn, on the scale of the episodes' advantages. Environments give rewards of steps
            ([`~seeupo_trl.envs.StepResult`]); those of reward functions count as arriving at the last turn. A block of
            merged turns has the credit of its first one.
        surrogate_ratio (`str`, *optional*, defaults to `"geometric"`):
            Ratio in the surrogate of a turn. `"geometric"` is Eq. 6, normalised by the number of tokens as in GSPO.
            `"product"` is the ratio of the probabilities of the whole response, which the method's guarantees speak
            of; it leaves the clipping range the sooner the longer a response is.
        turn_ratio (`str`, *optional*, defaults to `"geometric"`):
            Ratio that enters the turn weight `M` (Eq. 8). `"geometric"` is normalised by the number of tokens;
            `"product"` is the plain product over tokens.
        turn_weight_clip (`float`, *optional*, defaults to `0.2`):
            Each ratio inside `M` and their running product are bounded to `[1 - c, 1 + c]`. `None` leaves the plain
            product of Eq. 8, which can grow without limit when the steps are large (only e^-20 and e^20 bound a
            ratio then, so that it stays a number).
        advantage_clip (`float`, *optional*):
            Bound of the absolute value of the normalised advantages. The authors' code uses 3.

        > Parameters that control how the update is computed; none of them changes a gradient

        packing (`str`, *optional*, defaults to `"auto"`):
            Layout of a forward pass. `"tree"`: what the turns of a micro-batch have in common (the prompt of a group,
            the history of a trajectory) is computed once. `"rows"`: one padded row for each sequence. `"auto"`:
            trees where an estimate of the cost says that they save something. Models in which not every layer attends
            to all earlier positions (sliding windows, state spaces, linear attention), multimodal models, models with
            a load-balancing loss and adapters with virtual tokens are computed in rows whatever is asked for. The
            first tree is compared with rows; should they disagree, a warning is given and the run goes on in rows.
        max_tokens_per_microbatch (`int`, *optional*):
            Largest number of tokens of one forward and backward pass, padding included. It takes the place of
            `per_device_train_batch_size` as the limit of a micro-batch. A trajectory whose turns that are trained
            together do not fit is an error. `None` limits a micro-batch to `per_device_train_batch_size` rows, or to
            the tree of that many trajectories with no more tokens than that many rows of the longest sequence.

        > Parameters that control the episodes; `None` is no limit

        max_turns (`int`, *optional*, defaults to `10`):
            Largest number of assistant messages in an episode that [`MultiTurnRollout`] drives. TRL's own tools and
            environments have no limit, as in GRPO, unless `max_turns` is given (10 given counts, too): it then sets
            `max_tool_calling_iterations` to `max_turns - 1` where that is not given. Episodes of your own
            `rollout_func` are never cut.
        max_context_length (`int`, *optional*):
            Largest number of tokens of a context together with its response in [`MultiTurnRollout`], in place of the
            model's number of positions. With vLLM never more than its engine takes (`vllm_max_model_length`, or the
            server's `--max-model-len`). A server also refuses contexts that leave less than `max_completion_length`
            of its length; episodes end there.
        history (`str`, *optional*, defaults to `"append"`):
            What the policy is shown of earlier turns in [`MultiTurnRollout`]. `"append"`: everything as it was.
            `"strip_reasoning"`: without the reasoning of the turns before the last user message, as the chat templates
            of reasoning models do. A function of the messages can be given to [`MultiTurnRollout`] itself.
        max_episode_tokens (`int`, *optional*):
            Most tokens of everything that follows the opening conversation of an episode in [`MultiTurnRollout`],
            actions and the environment's messages together. TRL environments have `max_completion_length` for that.
        max_concurrent_envs (`int`, *optional*):
            Most environments of [`MultiTurnRollout`] that exist at once on a process; further episodes begin when
            others end. Without a limit all episodes of a generation batch play at once.
        zero_variance (`str`, *optional*, defaults to `"keep"`):
            What becomes of groups whose rewards are all equal, from which nothing is learned. `"keep"`: nothing.
            `"resample"`: groups of further tasks are played in their place, see [`seeupo_trl.update.resampling`].
        max_resampling_rounds (`int`, *optional*, defaults to `3`):
            How often further tasks are drawn in an iteration with `zero_variance="resample"`, each time as many as
            there are groups without variance.
        rollouts_ahead (`int`, *optional*, defaults to `0`):
            With 1, the next batch of environments is played while this one is updated, by the policy that the update
            starts from. It needs a sampler with weights of its own (a vLLM server) and
            `vllm_importance_sampling_correction`, see [`seeupo_trl.rollout.ahead`].
        lock_step_rollouts (`bool`, *optional*, defaults to `False`):
            Whether all episodes of a batch take their turns together in [`MultiTurnRollout`]. Without it an episode
            waits for no other, where the backend answers single requests.
        request_timeout (`float`, *optional*, defaults to `1800.0`):
            Seconds that a vLLM server has for a response in [`MultiTurnRollout`]; then the request is sent again,
            three times in all.
        env_timeout (`float`, *optional*, defaults to `120.0`):
            Seconds that a call of an environment may take; then its episode ends with `env_timeout`. Where it is not
            given, TRL environments (`environment_factory` of a [`~trl.GRPOTrainer`]) have no limit, as there.
        env_reset_retries (`int`, *optional*, defaults to `2`):
            How often [`MultiTurnRollout`] tries a failed `reset` again, each time with another environment.
        max_env_failure_rate (`float`, *optional*, defaults to `0.5`):
            Largest fraction of the episodes of a generation batch, over all processes, that may end by a fault of
            their environment; the run stops with an error where more do.
        max_observation_tokens (`int`, *optional*, defaults to `32768`):
            Longer messages of an environment are cut to so many tokens.
        stop_strings (`list[str]`, *optional*):
            Texts that end a turn, besides the end of a message: as soon as a response contains one (`"</search>"`),
            the environment reads the message up to and including it. The turn keeps the tokens that were sampled, up
            to the one that completes the text. Works with all backends; transformers' continuous batching cannot stop
            there and generates what is then dropped. `stop_strings` (with vLLM: `stop`) in `generation_kwargs` end a
            turn as well. Your own `rollout_func` sees to the ends of its turns itself.
        stop_token_ids (`list[int]`, *optional*):
            Tokens that end a turn, besides those that end a message: the tokenizer's end-of-sequence token, those of
            the model's `generation_config`, and in episodes the token that ends a message in the chat template.

        > Parameters that control evaluations and saved trajectories

        success_threshold (`float`, *optional*):
            Smallest reward (the weighted sum of the reward functions) of an episode that counts as a success in
            evaluations. It speaks for episodes whose environment does not report `success` in the trajectory's
            `info`. `None`: such episodes have a reward, but no success.
        save_trajectories (`bool`, *optional*, defaults to `False`):
            Whether to save the trajectories of every iteration and every evaluation as parquet files, one row a turn,
            in `output_dir/trajectories` (see [`~seeupo_trl.trajectory_log`]). `python -m seeupo_trl.view OUTPUT_DIR`
            renders them as a page.

        > Parameters inherited from GRPO that work differently

        max_completion_length (`int`, *optional*, defaults to `512`):
            In [`MultiTurnRollout`], the largest number of tokens of **one** response. With TRL's own tools it bounds
            the whole completion, as in GRPO.
        per_device_train_batch_size (`int`, *optional*, defaults to `8`):
            Largest number of rows in one forward and backward pass, or of trajectories whose tokens form the tree of
            one, unless `max_tokens_per_microbatch` is set. A generation batch has
            `per_device_train_batch_size x steps_per_generation x number of processes` completions, as in GRPO.
        steps_per_generation (`int`, *optional*):
            Together with `gradient_accumulation_steps`, which must divide it: each turn's pool is split into
            `steps_per_generation / gradient_accumulation_steps` mini-batches with one optimizer step each. By default
            the two are equal and a turn takes one optimizer step.
        num_iterations (`int`, *optional*, defaults to `1`):
            Number of passes over each turn's pool.
        scale_rewards (`str` or `bool`, *optional*, defaults to `"batch"`):
            `"batch"` divides the group-relative advantages by their standard deviation over the whole batch (Eq. 9);
            `"none"` or `False` does not, and has no effect on `multi_objective_aggregation="normalize_then_sum"`.
            `"group"` or `True` would weigh tasks by their variance, and can unlearn the one that matters: it warns and
            means `"batch"`.
        importance_sampling_level (`str`, *optional*, defaults to `"sequence"`):
            Only `"sequence"`: the ratio of SeeUPO is one number per turn. `"token"` warns and means `"sequence"`.
        loss_type (`str`, *optional*, defaults to `"seeupo"`):
            Surrogate of a turn: `"seeupo"` (clipped, Eq. 6), `"luspo"` (the same times the number of tokens), or the
            turn-level forms of `"cispo"`, `"sapo"` and `"vespo"` (see [`~seeupo_trl.update.loss.turn_surrogate`]). The
            averaging schemes of GRPO (`"grpo"`, `"bnpo"`, `"dr_grpo"`, `"dapo"`) have no counterpart here: they warn
            and mean `"seeupo"`.
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"sequence_mask"`):
            The modes are GRPO's, applied to each turn (each block of turns, where they are merged): a sequence is the
            tokens of one action, and a token-level correction enters as its mean over the action's tokens.
        vllm_enable_sleep_mode (`bool`, *optional*, defaults to `False`):
            A colocated engine is awake for a whole rollout, not for one turn, and asleep during the updates.
        cast_lm_head_to_fp32 (`bool`, *optional*):
            `None`: where the model computes in 16 bits, the update computes its logits in float32 from the weights of
            the head as they are, because rounded ones drown the ratios of small steps; generation is left alone.
            `True` is GRPO's: the head's weights are float32, for generation as well. `False`: logits are computed in
            16 bits.
        use_bias_correction_kl (`bool`, *optional*, defaults to `False`):
            Whether to multiply the KL term by the turn's ratio. Off by default, as in the published setup.
        mask_truncated_completions (`bool`, *optional*, defaults to `False`):
            Whether to leave out episodes whose last response was cut before its end token, as in GRPO: none of their
            turns is trained on, and their reward still counts in the advantages of the group. The metric
            `episodes/left_out` counts them.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"normalize_then_sum"` normalises the advantages of each reward function over the batch before they are
            weighted and added, and then their sum, whatever `scale_rewards` says, as in GRPO. (GRPO divides those of a
            function by their standard deviation in the group.)

    An error is raised for `top_entropy_quantile < 1` (a token-level filter of a turn-level surrogate).
    """

    update_order: str = field(
        default="reverse",
        metadata={
            "help": "Order in which the turns are updated: 'reverse' (SeeUPO), 'forward', 'random' or 'simultaneous' "
            "(all turns at once: GSPO with batch-level normalisation).",
            "choices": UPDATE_ORDERS,
        },
    )
    max_turn_updates: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of sequential updates an iteration makes; longer episodes merge consecutive turns "
            "into this many blocks. Unset: every turn is updated on its own."
        },
    )
    old_policy: str = field(
        default="iteration",
        metadata={
            "help": "Policy in the denominator of the importance ratios: 'iteration' (the policy that sampled) or "
            "'turn' (the policy just before the turn's own update).",
            "choices": OLD_POLICIES,
        },
    )
    turn_credit: str = field(
        default="episode",
        metadata={
            "help": "What the advantage of a turn is made of: 'episode' (the reward of the whole episode) or 'to_go' "
            "(the rewards from that turn on).",
            "choices": TURN_CREDITS,
        },
    )
    surrogate_ratio: str = field(
        default="geometric",
        metadata={
            "help": "Ratio in the surrogate: 'geometric' (normalised by the number of tokens, as in GSPO) or "
            "'product'.",
            "choices": RATIOS,
        },
    )
    turn_ratio: str = field(
        default="geometric",
        metadata={
            "help": "Ratio that enters the turn weight M: 'geometric' (normalised by the number of tokens) or "
            "'product'.",
            "choices": RATIOS,
        },
    )
    turn_weight_clip: float | None = field(
        default=0.2,
        metadata={
            "help": "Each ratio inside the turn weight M and their running product are bounded to [1 - c, 1 + c]. "
            "Null (in a yaml config) leaves the plain product."
        },
    )
    advantage_clip: float | None = field(
        default=None,
        metadata={"help": "Bound of the absolute value of the normalised advantages. Unset: no bound."},
    )
    packing: str = field(
        default="auto",
        metadata={
            "help": "Layout of the update's forward passes: 'tree' (common prefixes are computed once), 'rows', or "
            "'auto' (what an estimate of the cost says is cheaper; rows for models without full causal attention).",
            "choices": PACKINGS,
        },
    )
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens of one forward and backward pass, in place of "
            "`per_device_train_batch_size`. Unset: `per_device_train_batch_size` rows or the tree of that many "
            "trajectories."
        },
    )
    # Defaults of the episodes stand in `RolloutSettings`, where no limit is `math.inf`; for JSON and yaml it is null.
    max_turns: int | None = field(
        default=DefaultTurns(RolloutSettings.max_turns),
        metadata={
            "help": "Largest number of assistant messages in an episode. Null (in a yaml config) sets no limit. TRL's "
            "own tools have no limit unless it is given."
        },
    )
    max_context_length: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens of a context together with its response in message-level environments. "
            "Unset: the model's number of positions."
        },
    )
    history: str = field(
        default=RolloutSettings.history,
        metadata={
            "help": "What the policy is shown of earlier turns: 'append' (everything) or 'strip_reasoning' (without "
            "the reasoning of the turns before the last user message).",
            "choices": HISTORIES,
        },
    )
    max_episode_tokens: int | None = field(
        default=None,
        metadata={"help": "Most tokens of an episode after its opening conversation. Unset: no limit."},
    )
    max_concurrent_envs: int | None = field(
        default=None,
        metadata={"help": "Most environments that exist at once on a process. Unset: one for each episode."},
    )
    zero_variance: str = field(
        default="keep",
        metadata={
            "help": "What becomes of groups whose rewards are all equal: they stay, or further tasks are played.",
            "choices": ZERO_VARIANCE,
        },
    )
    max_resampling_rounds: int = field(
        default=3,
        metadata={"help": "How often further tasks are drawn in an iteration with zero_variance='resample'."},
    )
    rollouts_ahead: int = field(
        default=0,
        metadata={"help": "1: the next batch is played while this one is updated. Needs a vLLM server."},
    )
    lock_step_rollouts: bool = field(
        default=RolloutSettings.lock_step_rollouts,
        metadata={"help": "Whether all episodes of a batch take their turns together, each waiting for the slowest."},
    )
    request_timeout: float | None = field(
        default=RolloutSettings.request_timeout,
        metadata={"help": "Seconds that a vLLM server has for a response. Null (in a yaml config) sets no limit."},
    )
    env_timeout: float | None = field(
        default=DefaultSeconds(RolloutSettings.env_timeout),
        metadata={"help": "Seconds that a call of an environment may take. Null (in a yaml config) sets no limit."},
    )
    env_reset_retries: int = field(
        default=RolloutSettings.env_reset_retries,
        metadata={"help": "How often a failed reset is tried again, with another environment."},
    )
    max_env_failure_rate: float = field(
        default=RolloutSettings.max_env_failure_rate,
        metadata={"help": "Largest fraction of a batch's episodes that may end by a fault of their environment."},
    )
    max_observation_tokens: int | None = field(
        default=RolloutSettings.max_observation_tokens,
        metadata={
            "help": "Longer messages of an environment are cut to so many tokens. Null (in a yaml config) sets no "
            "limit."
        },
    )
    stop_strings: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts that end a turn, besides the end of a message; the environment reads the message up to and "
            "including them."
        },
    )
    stop_token_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens that end a turn, besides those that end a message."},
    )
    success_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Smallest reward of an episode that counts as a success in evaluations, where the environment "
            "does not report `success` itself. Unset: such episodes have no success."
        },
    )
    save_trajectories: bool = field(
        default=False,
        metadata={
            "help": "Whether to save the trajectories of every iteration and evaluation in "
            "`output_dir/trajectories`, for `python -m seeupo_trl.view`."
        },
    )

    # Fields of GRPOConfig whose default differs
    scale_rewards: str = field(
        default="batch",
        metadata={
            "help": "'batch' divides the group-relative advantages by their standard deviation over the whole batch; "
            "'none' does not.",
        },
    )
    importance_sampling_level: str = field(
        default="sequence", metadata={"help": "Only 'sequence': the ratio of SeeUPO is one number per turn."}
    )
    loss_type: str = field(
        default="seeupo",
        metadata={"help": "Surrogate of a turn: 'seeupo', 'luspo', 'cispo', 'sapo' or 'vespo'."},
    )
    cast_lm_head_to_fp32: bool | None = field(
        default=None,
        metadata={
            "help": "Unset: the update computes logits in float32 from the head's weights as they are. True: the "
            "head's weights are float32, for generation as well. False: logits are computed in 16 bits.",
            # without a value it is True, as on GRPO's command line
            "nargs": "?",
            "const": True,
        },
    )
    use_bias_correction_kl: bool = field(
        default=False, metadata={"help": "Whether to multiply the KL term by the turn's importance ratio."}
    )

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _warn_of_shared_names(cls)

    def __post_init__(self):
        super().__post_init__()
        self._validate()

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "SeeUPOConfig":
        """
        A configuration by name. With one network for all turns only `"simultaneous_products"` has a guarantee;
        `docs/guarantees.md` has the conditions, and what was measured where they are not met.

        | preset | settings | where no iteration makes the policy worse that does not lower its surrogate |
        |---|---|---|
        | `"paper"` | Eq. 6 to 9 as published: `surrogate_ratio="geometric"`, `turn_ratio="product"`, no bound on `M`, denominators of the iteration; its learning rate, KL term and temperature | turns with parameters of their own, actions of one token, no KL term |
        | `"authors"` | the published code: geometric ratios, `M` within 0.2 of 1, advantages within 3, denominators at the turn's start; the same learning rate, KL term and temperature | nowhere; with parameters of their own and actions of one token no fall was found |
        | `"products"` | product ratios in the surrogate and in `M`, nothing bounded but by the clip | turns with parameters of their own, any number of tokens |
        | `"simultaneous_products"` | the same, all turns at once | any parameters, those of one network too |

        Args:
            name (`str`):
                Name of the preset.
            overrides:
                Other fields, and those of the preset that are to differ from it.

        Returns:
            [`SeeUPOConfig`]

        Example:

        ```python
        >>> from seeupo_trl import SeeUPOConfig

        >>> config = SeeUPOConfig.preset("paper", output_dir="paper", use_cpu=True, bf16=False)
        ```

        Raises:
            `ValueError`:
                Where there is no such preset.
        """  # noqa: E501
        if name not in PRESETS:
            raise ValueError(f"There is no preset {name!r}; there are {', '.join(map(repr, PRESETS))}.")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "SeeUPOConfig":
        """
        The SeeUPO configuration of a script written for GRPO.

        Args:
            config ([`~trl.GRPOConfig`]):
                Configuration to upgrade; left as it is. A [`SeeUPOConfig`] is copied, as it was given (see
                [`OneStepConfig`]), and checked again: it may have been changed since it was made.

        Returns:
            [`SeeUPOConfig`]:
                A configuration with the same values, also an instance of the class of `config`. A field that holds
                GRPO's default where SeeUPO has another one takes SeeUPO's.
        """
        if isinstance(config, cls):
            upgraded = config.as_given() if isinstance(config, OneStepConfig) else copy.copy(config)
        else:
            upgraded = _upgraded(cls, config)
        upgraded._validate()
        return upgraded

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, see [`~transformers.TrainingArguments.to_dict`]."""
        values = super().to_dict()
        # plain numbers, which every log and file format knows
        seconds = None if self.env_timeout is None else float(self.env_timeout)
        turns = None if self.max_turns in (None, math.inf) else int(self.max_turns)
        return values | {"max_turns": turns, "env_timeout": seconds}

    def for_one_step_per_iteration(self) -> "SeeUPOConfig":
        """
        The arguments with which the Trainer runs underneath: one step and one batch an iteration.

        The Trainer must not accumulate over steps, split the generation batch or repeat it, because the update phase
        does so by turn.

        Returns:
            [`SeeUPOConfig`]:
                A copy. This configuration keeps what the user gave.
        """
        given = {name: getattr(self, name) for name in _BATCH_FIELDS}
        args = _made(_one_step_class(type(self)), values_of(self) | {"_given": given})
        args.per_device_train_batch_size = self.per_device_train_batch_size * self.steps_per_generation
        args.gradient_accumulation_steps = args.steps_per_generation = args.num_iterations = 1
        return args

    def _validate(self) -> None:
        # as TRL does when a configuration is made, after which it may have been changed
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        for name, allowed in (
            ("update_order", UPDATE_ORDERS),
            ("old_policy", OLD_POLICIES),
            ("turn_credit", TURN_CREDITS),
            ("surrogate_ratio", RATIOS),
            ("turn_ratio", RATIOS),
            ("packing", PACKINGS),
            ("history", HISTORIES),
            ("zero_variance", ZERO_VARIANCE),
            ("scale_rewards", ("batch", "none", "group")),
            ("importance_sampling_level", ("sequence", "token")),
            ("loss_type", LOSS_TYPES + _AVERAGING_LOSS_TYPES),
            ("vllm_importance_sampling_mode", SAMPLER_CORRECTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is not one of {', '.join(map(repr, allowed))}.")

        for f in fields(SeeUPOConfig):
            value = getattr(self, f.name)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"`{f.name}` is {value}, which is not a number; give one.")
        limits = ("max_turn_updates", "max_turns", "max_context_length", "max_tokens_per_microbatch")
        for name in (*limits, "max_episode_tokens", "max_concurrent_envs", "max_observation_tokens"):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_limit(value):
                raise ValueError(f"`{name}` must be at least 1 and whole, or `None` for no limit; got {value!r}.")
            setattr(self, name, as_limit(value))
        RolloutSettings.from_arguments(self)
        rounds = self.max_resampling_rounds
        if not is_whole(rounds) or rounds < 1:
            raise ValueError(
                f"`max_resampling_rounds` is {rounds!r}; give a whole number, at least 1, or `zero_variance='keep'`."
            )
        if self.rollouts_ahead:
            self._check_rollouts_ahead()
        if self.turn_weight_clip is not None and not 0 < self.turn_weight_clip < 1:
            raise ValueError(
                f"`turn_weight_clip` must lie between 0 and 1, or be `None` for the plain product; got "
                f"{self.turn_weight_clip}."
            )
        if self.advantage_clip is not None and self.advantage_clip <= 0:
            raise ValueError(f"`advantage_clip` must be positive, or `None` for no bound; got {self.advantage_clip}.")
        if self.turn_credit == "to_go" and (self.update_order == "simultaneous" or self.max_turn_updates == 1):
            raise ValueError(
                "`turn_credit='to_go'` gives turns advantages of their own, but `update_order='simultaneous'` and "
                "`max_turn_updates=1` update all of them as one. Use another order, or `turn_credit='episode'`."
            )
        if self.turn_credit == "to_go" and self.zero_variance == "resample":
            raise ValueError(
                "`zero_variance='resample'` replaces groups whose returns are all equal. With `turn_credit='to_go'` "
                "they may teach something, where their rewards of steps differ. Choose one of the two."
            )
        if self.steps_per_generation % self.gradient_accumulation_steps != 0:
            raise ValueError(
                f"`gradient_accumulation_steps` ({self.gradient_accumulation_steps}) must divide "
                f"`steps_per_generation` ({self.steps_per_generation}): each turn takes `steps_per_generation / "
                "gradient_accumulation_steps` optimizer steps on one generation batch, and turn t may only be updated "
                "when turn t + 1 is done, so no step can accumulate over two batches as GRPO's would. Leave "
                "`steps_per_generation` unset for one step a turn."
            )
        batch = self.per_device_train_batch_size * self.steps_per_generation * self.world_size
        if self.generation_batch_size != batch:
            raise ValueError(
                f"`per_device_train_batch_size` ({self.per_device_train_batch_size}) x `steps_per_generation` "
                f"({self.steps_per_generation}) x {self.world_size} processes is not `generation_batch_size` "
                f"({self.generation_batch_size}): one of them was changed after the configuration was made. Give them "
                "when it is made."
            )
        if ((self.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps") or 1) > 1:
            raise ValueError(
                "`num_steps` in `accelerator_config.gradient_accumulation_kwargs` would accumulate over iterations: "
                "turn t may only be updated when turn t + 1 is done. Use `gradient_accumulation_steps`, which "
                "accumulates within a turn."
            )
        optim = OptimizerNames(self.optim).value
        if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
            raise ValueError(steps_in_backward(f"`optim={optim!r}`"))
        if self.top_entropy_quantile < 1.0:
            raise ValueError(
                f"`top_entropy_quantile={self.top_entropy_quantile}` selects single tokens, but SeeUPO's surrogate is "
                "one term per turn. Leave it at 1.0."
            )
        self._translate_grpo_values()

    def _check_rollouts_ahead(self) -> None:
        if self.rollouts_ahead != 1:
            raise ValueError(
                f"`rollouts_ahead` is {self.rollouts_ahead}; give 0, or 1 to play the next batch while this one is "
                "updated. A sampler that is older still would be too far from the policy."
            )
        if not self.vllm_importance_sampling_correction:
            raise ValueError(
                "`rollouts_ahead=1` trains on samples of the policy before, which is right only with "
                "`vllm_importance_sampling_correction=True`."
            )
        if self.lock_step_rollouts:
            raise ValueError("`rollouts_ahead=1` and `lock_step_rollouts=True` exclude each other; choose one.")
        if self.save_strategy == SaveStrategy.STEPS and self.save_steps == 1:
            raise ValueError(
                "`rollouts_ahead=1` has no effect with `save_steps=1`: no batch outlives a checkpoint. Save less "
                "often, or leave `rollouts_ahead` at 0."
            )

    def _translate_grpo_values(self) -> None:
        """Values that GRPO has by default, or that only say how it averages, mean SeeUPO's own and warn."""
        if self.scale_rewards == "group":
            warnings.warn(
                "`scale_rewards='group'` divides by a standard deviation that depends on the task, so tasks sharing "
                "parameters are no longer weighed by their rewards. Using `scale_rewards='batch'` (Eq. 9).",
                stacklevel=4,
            )
            self.scale_rewards = "batch"
        if self.importance_sampling_level == "token":
            warnings.warn(
                "`importance_sampling_level='token'` has no effect: the ratio of SeeUPO is one number per turn. Using "
                "`importance_sampling_level='sequence'`.",
                stacklevel=4,
            )
            self.importance_sampling_level = "sequence"
        if self.loss_type in _AVERAGING_LOSS_TYPES:
            warnings.warn(
                f"`loss_type={self.loss_type!r}` has no effect: it says how GRPO averages over tokens, while SeeUPO's "
                "surrogate has one term per turn and averages over trajectories. Remove it to silence this warning.",
                stacklevel=4,
            )
            self.loss_type = "seeupo"
        if self.delta is not None and self.loss_type not in ("seeupo", "luspo"):
            raise ValueError(
                f"`delta={self.delta}` bounds the ratio of a clipped surrogate, and `loss_type={self.loss_type!r}` "
                "has none. Leave `delta` unset."
            )
        if self.loss_type == "vespo" and self.surrogate_ratio != "geometric":
            raise ValueError(
                "`loss_type='vespo'` has its own ratio, which is a product over tokens always: leave "
                "`surrogate_ratio` unset."
            )
        samples_apart = self.use_vllm or self.rollouts_ahead
        if self.loss_type == "vespo" and samples_apart and self.vllm_importance_sampling_correction:
            if not self.vllm_importance_sampling_mode.startswith("token"):
                raise ValueError(
                    "`loss_type='vespo'` needs `vllm_importance_sampling_mode='token_truncate'` or `'token_mask'`; "
                    f"got {self.vllm_importance_sampling_mode!r}."
                )


class OneStepConfig(SeeUPOConfig):
    """
    Arguments with which the Trainer runs underneath, see [`SeeUPOConfig.for_one_step_per_iteration`]. Whoever saves or
    logs them gets the batch arguments that the user gave. Their class has the user's class of configuration as a base.
    """

    _given_class: type[SeeUPOConfig]

    def as_given(self) -> SeeUPOConfig:
        """These arguments with the batch arguments that the user gave, in the user's class."""
        values = values_of(self)
        return _made(self._given_class, values | values.pop("_given"))

    def to_dict(self) -> dict[str, Any]:
        """What the user gave, for logs."""
        return self.as_given().to_dict()

    def __reduce__(self) -> tuple:
        # `training_args.bin` holds what the user gave
        return copy.copy, (self.as_given(),)

    def __copy__(self) -> "OneStepConfig":
        return _made(type(self), values_of(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> "OneStepConfig":
        return _made(type(self), copy.deepcopy(values_of(self), memo))


class _Upgraded:
    """What an upgraded configuration of a user's own class is pickled as: by that class, which can be imported."""

    _classes: tuple[type[SeeUPOConfig], type[GRPOConfig]]

    def __reduce__(self) -> tuple:
        return _new_upgraded, self._classes, (None, values_of(self))


def _made(config_class: type[SeeUPOConfig], values: dict[str, Any]) -> Any:
    """A configuration that holds some values, on which `__post_init__` must not run a second time."""
    config = object.__new__(config_class)
    for name, value in values.items():
        setattr(config, name, value)
    return config


@cache
def _one_step_class(given: type[SeeUPOConfig]) -> type[OneStepConfig]:
    return type(f"OneStep{given.__name__}", (OneStepConfig, given), {"_given_class": given})


@cache
def _upgraded_class(seeupo: type[SeeUPOConfig], given: type[GRPOConfig]) -> type[SeeUPOConfig]:
    """A class with the fields and methods of both; the user's come first."""
    if issubclass(seeupo, given):
        return seeupo
    for owner in given.__mro__:
        if owner not in GRPOConfig.__mro__:
            _warn_of_shared_names(owner)
    made = type(f"SeeUPO{given.__name__}", (_Upgraded, given, seeupo), {"_classes": (seeupo, given)})
    return dataclass(init=False, repr=False, eq=False)(made)


def _new_upgraded(seeupo: type[SeeUPOConfig], given: type[GRPOConfig]) -> SeeUPOConfig:
    return object.__new__(_upgraded_class(seeupo, given))


def _upgraded(seeupo: type[SeeUPOConfig], config: GRPOConfig) -> SeeUPOConfig:
    upgraded = _made(_upgraded_class(seeupo, type(config)), values_of(config))
    known = {f.name for f in fields(config)}
    grpo_defaults = {f.name: f.default for f in fields(GRPOConfig)}
    for f in fields(seeupo):
        if f.default is MISSING or f.default == grpo_defaults.get(f.name, MISSING):
            continue
        if f.name not in known or getattr(config, f.name) == grpo_defaults.get(f.name, MISSING):
            setattr(upgraded, f.name, f.default)
    return upgraded
