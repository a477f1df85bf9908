"""
The sampling settings of a trainer that samples with vLLM, as TRL itself would send them.

TRL puts them together inside one call of its own, together with pushing the weights where they have changed. That call
is made with one throw-away token, and what it would have handed to vLLM is taken there and goes no further. Written
against trl 1.16 (and 1.15).
"""

from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from .turn_ends import TurnEnds, replaced


if TYPE_CHECKING:
    from trl import GRPOTrainer


def sampling_params_of(trainer: "GRPOTrainer", ends: TurnEnds) -> Any:
    """
    Push the trainer's weights to its colocated engine where they have changed, and return the `SamplingParams` of a
    response. A collective operation.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `vllm_mode="colocate"`.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
    """
    taken = []

    def take(prompts: list, *, sampling_params: Any, **kwargs: Any) -> list:
        taken.append(sampling_params)
        return []

    with ends.applied_to(trainer), replaced(trainer.vllm_generation.llm, generate=take):
        trainer._generate_single_turn([[0]], None, {}, 1)
    (params,) = taken
    return params


def payload_of(trainer: "GRPOTrainer", ends: TurnEnds) -> dict[str, Any]:
    """
    Push the trainer's weights to its vLLM server where they have changed, and return what it is asked for a response,
    without the prompt. A collective operation: the main process alone speaks with the server.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            A trainer with `vllm_mode="server"`.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
    """
    taken = [None]
    generation = trainer.vllm_generation

    def take(*, prompts: list, **settings: Any) -> dict[str, list]:
        with replaced(generation.vllm_client, _post=take_payload):
            generate(prompts=prompts, **settings)
        empty = [[] for _ in prompts]
        return {"prompt_ids": prompts, "completion_ids": empty, "logprobs": empty, "logprob_token_ids": empty}

    def take_payload(url: str, json: dict[str, Any]) -> dict[str, Any]:
        taken[0] = {name: value for name, value in json.items() if name != "prompt"}
        logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        choice = {"prompt_token_ids": [], "token_ids": [], "logprobs": logprobs}
        return {"choices": [choice for _ in json["prompt"]]}

    with ends.applied_to(trainer):
        if trainer.accelerator.is_main_process:
            generate = generation.vllm_client.generate
            with replaced(generation.vllm_client, generate=take):
                trainer._generate_single_turn([[0]], None, {}, 1)
        else:
            trainer._generate_single_turn([[0]], None, {}, 1)
    return broadcast_object_list(taken)[0]
