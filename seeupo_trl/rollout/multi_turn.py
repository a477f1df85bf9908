"""
Rollouts: environments and the policy play episodes together, turn by turn, for a whole batch at once.

Tokens are the truth. The chat template renders the opening conversation once; from there on a context grows by the
tokens the policy generated (never tokenised again) and by the rendering of the environment's new messages, unless
`history` says otherwise. Each turn keeps the exact context it was sampled from, and that is what is trained on.

Templates that rewrite history when messages are appended (Qwen3 drops earlier reasoning) cannot be continued that way;
for those TRL's training template is used instead, which keeps the history as it was.

Generation goes through the trainer's own backend (transformers, continuous batching, vLLM) with the trainer's sampling
settings.

An environment may raise, hang, or return garbage; none of that reaches the policy. See [`MultiTurnRollout`].

[`~seeupo_trl.rollout.batch.RolloutBatch`] plays the episodes. It is given what differs between message-level
environments ([`MultiTurnRollout`]) and those of TRL ([`~seeupo_trl.rollout.trl_environments.ToolRollout`]): who plays,
and the limits.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..envs.base import MultiTurnEnvironment
from .batch import RolloutBatch
from .chats import Chats
from .contexts import History
from .limits import EpisodeLimits
from .message_environments import MessageEnvironments
from .schedule import play
from .settings import RolloutSettings
from .tasks import Tasks


if TYPE_CHECKING:
    from trl import GRPOTrainer


class MultiTurnRollout:
    """
    Plays one episode of an environment for each prompt, with the trainer's policy. It is a rollout function of TRL:
    pass it as `rollout_func` to [`SeeUPOTrainer`] or to a stock [`~trl.GRPOTrainer`].

    Environments reset and step at the same time, in threads (or on one event loop, where `reset` and `step` are
    coroutines), and are reused: at the end of an episode they go back to a pool.

    An option that is not given is as the trainer says: its argument of the same name, see [`SeeUPOConfig`]. For a
    trainer that has none (a stock `GRPOConfig`), the defaults of [`~seeupo_trl.rollout.settings.RolloutSettings`]
    hold, which are the same. `math.inf` sets no limit.

    Args:
        environment_factory (`Callable[[], MultiTurnEnvironment]`):
            A [`~seeupo_trl.envs.MultiTurnEnvironment`] class, or anything callable that returns an instance
            (`functools.partial(BfclEnvironment, tools="brief")`).
        tasks (`Dataset` or `Iterable[dict]`, *optional*):
            The dataset rows, for trainers that hand a rollout function nothing but prompts, as [`~trl.GRPOTrainer`]
            does. A row is looked up by its `prompt`, so different rows need different prompts. Give the rows of the
            evaluation dataset too. Not needed with [`SeeUPOTrainer`], to whose rows it adds the columns that only
            those here with the same prompts have.
        history (`str` or `Callable`, *optional*):
            What the policy is shown of earlier turns. `"append"`: everything as it was. `"strip_reasoning"`: without
            the reasoning of the turns before the last user message, as the chat templates of reasoning models do. Or a
            function that takes the messages so far (`list[dict]`, the opening ones included) and returns those to
            show, rendered with the tokenizer's own chat template. Each turn is trained on in the exact context it was
            sampled from. Anything but `"append"` needs [`SeeUPOTrainer`].
        max_turns (`int`, *optional*):
            Most assistant messages in an episode.
        max_context_length (`int`, *optional*):
            Most tokens of context and response together, in place of the model's number of positions; never more than
            vLLM takes. The length of one response is limited by the trainer's `max_completion_length`; a vLLM server
            takes no context that leaves less room than that.
        max_episode_tokens (`int`, *optional*):
            Most tokens of everything that follows the opening conversation, actions and the environment's messages
            together, as they stand in the context. An episode that has used them ends with `context_overflow`.
        max_concurrent_envs (`int`, *optional*):
            Most environments that exist at once on a process; further episodes begin when others end. Without a limit
            all episodes of a batch play at once.
        env_timeout (`float`, *optional*):
            Seconds a `reset` or a `step` may take.
        env_reset_retries (`int`, *optional*):
            How often a `reset` that raised or took too long is tried again, each time with another environment.
        max_env_failure_rate (`float`, *optional*):
            Largest fraction of the episodes of a batch, over all processes, that may end by a fault of their
            environment.
        max_observation_tokens (`int`, *optional*):
            Longer messages from `step` are cut to so many tokens, with a note at the cut. The opening messages are
            never cut.
        stop_strings (`Sequence[str]`, *optional*):
            Texts that end a turn, besides the end of a message: as soon as a response contains one (`"</search>"`),
            the environment reads the message up to and including it. The turn keeps the tokens that were sampled, up
            to the one that completes the text. Those in the trainer's `generation_kwargs` (`stop_strings`, vLLM's
            `stop`) end turns, too.
        stop_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a turn, besides those that end a message. The environment reads the text of such a token,
            unless it is a special one.
        lock_step_rollouts (`bool`, *optional*):
            Whether the episodes of a batch take their turns together: one call generates all responses of a turn, then
            all environments step. Without it an episode waits for no other, where the backend answers single
            requests.
        request_timeout (`float`, *optional*):
            Seconds that a vLLM server has for a response; then the request is sent again, three times in all.

    Calling it with `(prompts, trainer)` returns a dict of lists with one item per prompt:

    - `prompt_ids`: tokens of the opening conversation.
    - `completion_ids`: everything after it up to the end of the last action, or one end-of-sequence token if there was
      no action. Where a context was rewritten, what it does not share with the turn before stands for the whole.
    - `env_mask`: 1 for tokens of the policy, 0 for tokens of the environment.
    - `logprobs`: log-probabilities of the completion under the sampler, 0.0 at environment tokens; `None` where the
      backend reports none.
    - `trajectories`: [`~seeupo_trl.trajectory.Trajectory`], with the turns, the conversation and the reward.
    - `environment_reward`: return of the episode, `None` after a fault of the environment. Read it with the reward
      function [`environment_reward`].
    - `stop_reason`: a [`~seeupo_trl.envs.StopReason`] as a string.

    A fault of an environment (an exception, no answer in time, an answer that is none) ends its episode without a
    reward, with stop reason `env_error` or `env_timeout` and the text in the trajectory's `info["error"]`. Other
    episodes go on.

    It logs what episodes waited for, see [`~seeupo_trl.rollout.progress.Progress.metrics`], and `env/resets_retried`
    and `env/observations_cut`, counts of this process.

    Raises:
        `RuntimeError`:
            On all processes, when more episodes of a batch fail than `max_env_failure_rate` allows, or all of them.

    Example:

    ```python
    trainer = GRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=GRPOConfig(max_completion_length=512),
        train_dataset=dataset,
        rollout_func=MultiTurnRollout(MyEnvironment, tasks=dataset),
        reward_funcs=environment_reward,
    )
    ```
    """

    def __init__(
        self,
        environment_factory: Callable[[], MultiTurnEnvironment],
        *,
        tasks: Iterable[dict[str, Any]] | None = None,
        history: History | None = None,
        max_turns: int | None = None,
        max_context_length: int | None = None,
        max_episode_tokens: int | None = None,
        max_concurrent_envs: int | None = None,
        env_timeout: float | None = None,
        env_reset_retries: int | None = None,
        max_env_failure_rate: float | None = None,
        max_observation_tokens: int | None = None,
        stop_strings: Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        lock_step_rollouts: bool | None = None,
        request_timeout: float | None = None,
    ):
        if not callable(environment_factory):
            raise TypeError(
                f"environment_factory is a {type(environment_factory).__name__}; give a MultiTurnEnvironment class or "
                "a function without arguments that returns an instance."
            )
        self.environment_factory = environment_factory
        self._options = {
            "history": history,
            "max_turns": max_turns,
            "max_context_length": max_context_length,
            "max_episode_tokens": max_episode_tokens,
            "max_concurrent_envs": max_concurrent_envs,
            "env_timeout": env_timeout,
            "env_reset_retries": env_reset_retries,
            "max_env_failure_rate": max_env_failure_rate,
            "max_observation_tokens": max_observation_tokens,
            "stop_strings": stop_strings,
            "stop_token_ids": stop_token_ids,
            "lock_step_rollouts": lock_step_rollouts,
            "request_timeout": request_timeout,
        }
        RolloutSettings(**{name: value for name, value in self._options.items() if value is not None})  # checks them
        self._tasks = Tasks(tasks)
        self.environments = MessageEnvironments(environment_factory)
        self._chats = Chats()

    def close(self) -> None:
        """Close all environments. Happens by itself when the object is deleted and when the interpreter exits."""
        self.environments.close()

    def __call__(self, prompts: list[Any], trainer: "GRPOTrainer") -> dict[str, list[Any] | None]:
        rows = getattr(trainer, "rollout_inputs", None)  # set by SeeUPOTrainer only
        history = RolloutSettings.of(self._options, trainer.args).history
        if rows is None and history != "append":
            raise ValueError(
                f"history={history!r} rewrites contexts, and {type(trainer).__name__} trains on an "
                "episode as one sequence: it would train on contexts that the policy never saw. Use history='append', "
                "or SeeUPOTrainer."
            )
        batch = self.prepare(self._tasks.of(prompts) if rows is None else rows, trainer)
        play(batch)
        return batch.output()

    def prepare(self, rows: list[dict[str, Any]], trainer: "GRPOTrainer", steps_ahead: int = 0) -> RolloutBatch:
        """
        A batch that is ready to be played, with the policy as it is now. A collective operation.

        Args:
            rows (`list[dict]`):
                Dataset rows of this process, one for each episode.
            trainer ([`~trl.GRPOTrainer`]):
                The trainer whose policy plays.
            steps_ahead (`int`, *optional*, defaults to `0`):
                1 for the batch of the iteration after the one that the trainer is at, which may be played in another
                thread.
        """
        settings = RolloutSettings.of(self._options, trainer.args)
        chat = self._chats.of(trainer, in_thread=bool(steps_ahead))
        limits = EpisodeLimits.of(settings, trainer)
        batch = RolloutBatch(self.environments, settings, limits, chat, trainer, steps_ahead)
        batch.prepare(self._tasks.added_to(rows))
        return batch


def environment_reward(environment_reward: list[float | None], **kwargs: Any) -> list[float | None]:
    """
    Reward function that reads the return of the episodes which [`MultiTurnRollout`] played.

    Args:
        environment_reward (`list[float]`):
            Returns of the episodes; `None` where the environment failed, which TRL leaves out of the group's mean.
        kwargs (`Any`):
            Everything else TRL passes to reward functions; not used.
    """
    return environment_reward
