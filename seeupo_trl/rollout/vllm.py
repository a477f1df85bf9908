"""
What episodes of many turns need of TRL's vLLM backend: the length that the engine takes, and one wake-up an iteration.

Generation, the weight sync (once an iteration, because an iteration is one `global_step`) and sleep mode are TRL's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list


if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(frozen=True)
class EngineLimits:
    """
    Lengths that a vLLM engine takes, in tokens.

    Args:
        total (`int`):
            Most tokens of a context and its response together.
        context (`int`):
            Most tokens of a context from which it generates at all.
    """

    total: int
    context: int


def engine_limits(trainer: "GRPOTrainer") -> EngineLimits:
    """
    Limits of the engine that a trainer samples from. To be called on every process.

    A colocated engine ends a response where its length does. A server refuses a request whose context and
    `max_completion_length` exceed its length, however short the response would have been.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `use_vllm=True`.

    Raises:
        `ValueError`:
            When the server's length leaves no room for any context.
    """
    vllm = trainer.vllm_generation
    if vllm.mode == "colocate":
        total = vllm.llm.llm_engine.model_config.max_model_len
        return EngineLimits(total, total - 1)
    shared = [None]
    if trainer.accelerator.is_main_process:  # the only one with a client
        client = vllm.vllm_client
        shared[0] = client.session.get(f"{client.base_url}/v1/models").json()["data"][0]["max_model_len"]
    total = broadcast_object_list(shared)[0]
    response = vllm.generation_kwargs.get("max_tokens", vllm.max_completion_length)
    if response >= total:
        raise ValueError(
            f"The vLLM server takes {total} tokens of context and response together, and `max_completion_length` is "
            f"{response}, so there is no room for a context. Restart the server with `--max-model-len` at least "
            "`max_context_length + max_completion_length`, or lower `max_completion_length`."
        )
    return EngineLimits(total, total - response)


@contextmanager
def kept_awake(trainer: "GRPOTrainer") -> Iterator[None]:
    """
    Keep a colocated engine with `vllm_enable_sleep_mode` awake for a whole rollout.

    TRL puts it to sleep after every call, which discards its weights and its cache of prefixes, and pushes all weights
    again at the next call: once a turn. In here they are pushed once, and every turn finds the cache of the turn
    before. Without sleep mode this does nothing.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose rollout it is.
    """
    vllm = trainer.vllm_generation if trainer.use_vllm else None
    if vllm is None or vllm.mode != "colocate" or not vllm.enable_sleep_mode:
        yield
        return
    vllm.sync_weights()  # wakes the engine's weights too
    trainer._last_loaded_step = trainer.state.global_step
    vllm.llm.wake_up(tags=["kv_cache"])
    vllm.enable_sleep_mode = False
    try:
        yield
    finally:
        vllm.enable_sleep_mode = True
        vllm.llm.sleep(level=2)
        vllm._llm_weights_sleeping = True
