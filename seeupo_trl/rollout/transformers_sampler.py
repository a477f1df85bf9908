"""
Single requests on the transformers backend: continuous decoding over a tree of keys and values.

All requests are decoded together, one token each in a step. New ones join between two steps, and a row whose response
is whole leaves at once. What contexts have in common is stored once and read once a step; an episode's keys and values
stay until it is forgotten, its own responses included. See [`seeupo_trl.rollout.segment_tree`] for the tree,
[`seeupo_trl.rollout.segment_attention`] for what is computed, [`seeupo_trl.rollout.token_sampling`] for what is
sampled.
"""

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn
from trl.models import unwrap_model_for_generation

from ..scoring.causal_lm import causal_lm_of
from ..scoring.tree_attention import use_attention
from .cached_generation import reason_against_cache
from .key_values import MAX_TOKENS_PER_PASS
from .sampler import Request, Response
from .segment_attention import SEGMENTS, ContextPass, DecodingPass, SharedPart, under_way
from .segment_tree import SegmentTree
from .segments import Segment, Slab, room_for, room_for_all
from .token_sampling import Plan, choose, plan_response
from .turn_ends import TurnEnds


if TYPE_CHECKING:
    from trl import GRPOTrainer


@dataclass(eq=False)
class Row:
    """
    A request that is decoded.

    Args:
        request ([`~seeupo_trl.rollout.sampler.Request`]):
            The request.
        plan ([`~seeupo_trl.rollout.token_sampling.Plan`]):
            How its response is sampled.
        leaf ([`~seeupo_trl.rollout.segments.Segment`]):
            Where its keys and values go.
        action_ids (`list[int]`):
            The response so far.
    """

    request: Request
    plan: Plan
    leaf: Segment
    action_ids: list[int] = field(default_factory=list)

    @property
    def last_token(self) -> int:
        return self.action_ids[-1] if self.action_ids else self.request.context_ids[-1]


class TransformersSampler:
    """
    A [`~seeupo_trl.rollout.sampler.Sampler`] on the transformers backend.

    With ZeRO-3, making and closing it are collective operations, in which parameters are gathered and given back; all
    else concerns one process only. While it decodes, the policy is in evaluation mode: a response depends on the
    policy, the context and its seed, and not on dropout.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose policy and sampling settings are used. Its parameters must not change while the object
            is in use.
        ends ([`~seeupo_trl.rollout.turn_ends.TurnEnds`]):
            Where turns end.
        max_rows (`int`, *optional*):
            Most requests that are decoded at once; the others wait. All by default.

    Raises:
        ValueError: If the trainer's setup is not supported, see [`reason_against`].
    """

    def __init__(self, trainer: "GRPOTrainer", ends: TurnEnds, max_rows: int | None = None):
        reason = self.reason_against(trainer)
        if reason is not None:
            raise ValueError(f"Single requests cannot be answered by transformers, because {reason}.")
        self.trainer = trainer
        self._ends = ends
        self._max_rows = max_rows
        self._waiting: dict[int, Request] = {}
        self._rows: dict[int, Row] = {}
        self._tree = SegmentTree()
        self._slabs: dict[tuple[bool, int], Slab] = {}
        self._pass: DecodingPass | None = None  # as long as the same rows are decoded where they are
        self._ordered: list[Row] = []  # as in the pass
        self._stack = ExitStack()
        self._stack.enter_context(_casts_are_kept())
        self._policy = self._stack.enter_context(
            unwrap_model_for_generation(
                trainer.model_wrapped,
                trainer.accelerator,
                gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
                generation_kwargs=trainer.generation_kwargs,
                **_checkpointing_options(trainer),
            )
        )
        self._model = causal_lm_of(self._policy)
        self._modules = list(self._policy.modules())
        # those that autocast casts, if it does
        parameters = self._policy.parameters() if trainer.accelerator.native_amp else ()
        self._frozen = [p for p in parameters if p.dtype == torch.float32 and not p.requires_grad]
        accepted = inspect.signature(self._model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @staticmethod
    def reason_against(trainer: "GRPOTrainer") -> str | None:
        """
        Why single requests cannot be answered, as far as a trainer's setup tells.

        Args:
            trainer ([`~trl.GRPOTrainer`]):
                The trainer.

        Returns:
            `str`, *optional*:
                The reason; `None` where they can.
        """
        reason = reason_against_cache(trainer)
        if reason is not None:
            return reason
        if trainer.accelerator.is_fsdp2:
            return "a forward pass under FSDP 2 is a collective operation"
        deepspeed = trainer.accelerator.state.deepspeed_plugin
        if deepspeed is not None and deepspeed.zero_stage == 3 and not trainer.args.ds3_gather_for_generation:
            return "a forward pass under ZeRO-3 is a collective operation with `ds3_gather_for_generation=False`"
        model = causal_lm_of(trainer.accelerator.unwrap_model(trainer.model_wrapped))
        for owner, name in ((trainer, "_generate_single_turn"), (model, "generate")):
            if is_overridden(owner, name):
                return f"`{name}` of {type(owner).__name__} has been overridden"
        if trainer.args.torch_compile:
            return "the model is compiled"
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            return "the model lies on several devices"
        if model.device.type == "mps":
            return "MPS has no float64, in which tokens are drawn"
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return "the model takes no positions"
        rope_type = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
        if rope_type in ("dynamic", "longrope"):
            return f"rotary positions of the type {rope_type!r} depend on the longest context of a batch"
        if trainer.generation_config.max_time is not None:
            return "`max_time` counts for a whole batch"
        return None

    def submit(self, request: Request) -> None:
        """
        Hand in a request.

        Args:
            request ([`~seeupo_trl.rollout.sampler.Request`]):
                The request, of an episode that has none.
        """
        if request.key in self._waiting or request.key in self._rows:
            raise ValueError(f"Episode {request.key} has a request already; forget it or wait for its response.")
        if not request.context_ids:
            raise ValueError(f"The context of episode {request.key} is empty; give at least one token.")
        self._waiting[request.key] = request

    @torch.no_grad()
    def poll(self, timeout: float | None) -> list[Response]:
        """
        Decode until a response is whole or the time is over, at least one token of each row.

        Args:
            timeout (`float`, *optional*):
                Seconds; `None` for no limit.

        Returns:
            `list[Response]`:
                Responses that have become whole; none without requests.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        responses: list[Response] = []
        with (
            # the base of an adapter is called itself, and not through the forward that Accelerate wrapped
            self.trainer.accelerator.autocast(),
            use_attention(self._model.config, SEGMENTS),
            _in_evaluation_mode(self._modules),
            _casts_of_all_are_kept(self._frozen),
        ):
            while (self._waiting or self._rows) and not responses:
                self._admit()
                responses = self._decode()
                if time.monotonic() >= end:
                    break
        return responses

    def forget(self, key: int) -> None:
        """
        Give up an episode's request and free its keys and values.

        Args:
            key (`int`):
                The episode; an unknown one is ignored.
        """
        self._waiting.pop(key, None)
        if self._rows.pop(key, None) is not None:
            self._pass = None
        self._tree.forget(key)
        self._slabs = {name: slab for name, slab in self._slabs.items() if slab.segments}

    def close(self) -> None:
        """Give up all requests, free all memory and leave the model as it was."""
        self._waiting, self._rows, self._slabs, self._pass = {}, {}, {}, None
        self._tree = SegmentTree()
        self._ordered = []
        self._stack.close()
        # what keys and values of all sizes leave behind is too small for an update's activations
        clear_device_cache()

    def _admit(self) -> None:
        """Make rows of waiting requests, and compute what their contexts have that is new."""
        room = len(self._waiting) if self._max_rows is None else self._max_rows - len(self._rows)
        for key in list(self._waiting)[:room]:
            request = self._waiting[key]
            plan = plan_response(self._policy, self.trainer, self._ends, request.context_ids, request.seed)
            leaf = self._tree.put(key, np.array(request.context_ids[:-1], dtype=np.int64))
            self._rows[key] = Row(self._waiting.pop(key), plan, leaf)
            self._pass = None
        if self._pass is None:
            self._compute_contexts()

    def _compute_contexts(self) -> None:
        while True:
            batch, left = [], MAX_TOKENS_PER_PASS
            for segment in self._tree:
                above = segment.parent.num_missing
                if segment.num_missing and not above and left:
                    batch.append((segment, min(left, segment.num_missing)))
                    left -= batch[-1][1]
            if not batch:
                return
            tokens = [s.tokens[s.num_computed : s.num_computed + count] for s, count in batch]
            positions = [np.arange(count) + s.depth + s.num_computed for s, count in batch]
            context_pass = ContextPass(batch)
            self._forward(context_pass, np.concatenate(tokens)[None], np.concatenate(positions)[None])
            context_pass.store()

    def _decode(self) -> list[Response]:
        """Decode one token of every row."""
        if self._pass is None:
            self._place()
        rows = self._ordered
        lasts = [row.last_token for row in rows]
        positions = [len(row.request.context_ids) + len(row.action_ids) - 1 for row in rows]
        self._pass.begin_step()
        logits = self._forward(self._pass, np.array(lasts)[:, None], np.array(positions)[:, None])
        self._pass.end_step()
        tokens = choose(logits[:, -1].to(dtype=torch.float32, copy=True), [row.plan for row in rows])
        for row, last, token in zip(rows, lasts, tokens, strict=True):
            row.leaf.generated.append(last)
            row.action_ids.append(token)
        have_string = self._ends.have_just_ended([row.action_ids for row in rows])
        responses = []
        for row, ended in zip(rows, have_string, strict=True):
            if ended or row.action_ids[-1] in row.plan.eos_token_ids or len(row.action_ids) == row.plan.max_tokens:
                del self._rows[row.request.key]
                responses.append(Response(row.request.key, row.action_ids))
        if responses or self._pass.is_full:
            self._pass = None
        return responses

    def _forward(
        self, forward_pass: ContextPass | DecodingPass, tokens: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        device = self.trainer.accelerator.device
        with under_way(forward_pass):
            logits = self._model(
                input_ids=torch.from_numpy(tokens).to(device),
                position_ids=torch.from_numpy(positions).to(device),
                use_cache=False,
                **self._options,
            ).logits
        if forward_pass.num_layers == 0:
            raise RuntimeError(
                f"{type(self._model).__name__} does not compute its attention by a function that can be exchanged. "
                "Play with `lock_step_rollouts=True`."
            )
        return logits

    def _place(self) -> None:
        """Put what the rows read into slabs, and take out what they do not."""
        device = self.trainer.accelerator.device
        paths = [(row, row.leaf.path()[:-1]) for row in self._rows.values()]
        wanted: dict[Segment, tuple[bool, int]] = {}
        for row, path in paths:
            for segment in path:
                wanted[segment] = (False, room_for_all(len(segment.tokens)))
            wanted[row.leaf] = (True, room_for(row.leaf.num_computed))
        for name, slab in list(self._slabs.items()):
            for segment in list(slab.segments):
                if wanted.get(segment) != name:
                    segment.leave_slab()
            if slab.segments:
                slab.shrink()
            else:
                del self._slabs[name]
        new: dict[tuple[bool, int], list[Segment]] = {}
        for segment, name in wanted.items():
            if segment.slab is None:
                new.setdefault(name, []).append(segment)
        for name, segments in new.items():
            self._slabs.setdefault(name, Slab(name[1])).add(segments)

        leaves = [slab for (is_leaf, _), slab in self._slabs.items() if is_leaf]
        order = {segment: i for i, segment in enumerate(segment for slab in leaves for segment in slab.segments)}
        self._ordered = sorted(self._rows.values(), key=lambda row: order[row.leaf])
        readers: dict[Segment, list[int]] = {}
        for row, path in paths:
            for segment in path:
                readers.setdefault(segment, []).append(order[row.leaf])
        shared = [
            SharedPart.of(slab, [readers[segment] for segment in slab.segments], len(order), device)
            for (is_leaf, _), slab in self._slabs.items()
            if not is_leaf
        ]
        self._pass = DecodingPass(leaves, shared, device)


def is_overridden(owner: Any, name: str) -> bool:
    """Whether a method is somebody's own, of the object or of its class, and not the libraries' or ours."""
    libraries = ("seeupo_trl", "trl", "transformers")
    return name in vars(owner) or getattr(type(owner), name).__module__.split(".")[0] not in libraries


def _checkpointing_options(trainer: "GRPOTrainer") -> dict[str, Any]:
    """How gradient checkpointing is switched on again; trl 1.15 does not ask."""
    asked = "gradient_checkpointing_kwargs" in inspect.signature(unwrap_model_for_generation).parameters
    return {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs} if asked else {}


@contextmanager
def _in_evaluation_mode(modules: list[nn.Module]) -> Iterator[None]:
    """
    Have modules in evaluation mode, and as they were afterwards. Trainers take the model's mode for their own: between
    polls it has to be what it was.
    """
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _casts_are_kept() -> Iterator[None]:
    """
    Have parameters that autocast casts for one forward pass stay cast for the next ones, as if all passes were in one
    autocast context. Casting them anew took a fifth of a decode step of 32 rows on a CPU.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


@contextmanager
def _casts_of_all_are_kept(frozen: list[nn.Parameter]) -> Iterator[None]:
    """
    Have frozen parameters cast once, too: autocast keeps the casts of those alone that ask for a gradient, as these
    then do while there is none to compute. The base of an adapter is frozen, and may be all of the model.
    """
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
