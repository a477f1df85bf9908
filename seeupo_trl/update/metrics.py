"""
What one iteration logs about its updates. Every name is explained in `docs/metrics.md`.

Values are collected by block of turns on each process and reduced over processes once, at the end.
"""

import math
from dataclasses import astuple, dataclass, field, fields

import numpy as np
import torch

from ..distributed.lock_step import LockStep
from ..scoring.turn_buffer import Block
from .loss import Actions, TurnLoss
from .objective import action_of_tokens
from .turn_weights import TurnWeights


# Longest actions of the classes in which those with a sampler weight of 0 are counted.
_LENGTHS = {"to_100": 100, "to_1000": 1000, "to_4000": 4000, "longer": math.inf}
_CLIP_RATIOS = tuple(f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean"))
# what TRL logs of two loss types
GATES = {"cispo": "cispo_clip_ratio", "vespo": "vespo/phi_seq_mean"}


def clip_metrics(loss_type: str) -> tuple[str, ...]:
    """Names of the shares of clipped ratios that a loss type logs."""
    return (*_CLIP_RATIOS, GATES["cispo"]) if loss_type == "cispo" else _CLIP_RATIOS


@dataclass(frozen=True)
class TurnUpdate:
    """
    How one trajectory entered the last optimizer step on one of its turns: the ratio in the loss, whether it was
    clipped there, the turn weight `M`, and `M / A`. The turns of a block share these numbers.
    """

    ratio: float
    is_clipped: bool
    weight: float
    relative_weight: float


@dataclass
class Sums:
    """Sums over the optimizer steps on a block: of trajectories, of tokens, of micro-batches."""

    pool: float = 0.0
    scored: float = 0.0
    loss: float = 0.0
    policy_loss: float = 0.0
    ratio: float = 0.0
    clip_low: float = 0.0
    clip_high: float = 0.0
    weight: float = 0.0
    tokens: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0
    sampler_weight: float = 0.0
    sampler_tokens: float = 0.0
    sampler_difference: float = 0.0
    actions_to_100: float = 0.0
    actions_to_1000: float = 0.0
    actions_to_4000: float = 0.0
    actions_longer: float = 0.0
    masked_to_100: float = 0.0
    masked_to_1000: float = 0.0
    masked_to_4000: float = 0.0
    masked_longer: float = 0.0
    micro_batches: float = 0.0
    aux_loss: float = 0.0
    gate: float = 0.0


@dataclass
class Extremes:
    """Smallest or largest values of single trajectories."""

    ratio: float
    weight: float
    weight_unclipped: float
    clip_low: float
    clip_high: float
    sampler_weight: float
    sampler_difference: float

    @classmethod
    def filled(cls, value: float) -> "Extremes":
        """The same value everywhere."""
        return cls(*[value] * len(fields(cls)))


@dataclass
class BlockMetrics:
    """
    What happened in the optimizer steps on one block (or on all of them).

    Args:
        steps (`int`):
            Their number.
    """

    steps: int
    sums: Sums = field(default_factory=Sums)
    low: Extremes = field(default_factory=lambda: Extremes.filled(math.inf))
    high: Extremes = field(default_factory=lambda: Extremes.filled(-math.inf))

    def add(self, **values: float) -> None:
        """Add to the sums."""
        for name, value in values.items():
            setattr(self.sums, name, getattr(self.sums, name) + value)

    def observe(self, **values: np.ndarray) -> None:
        """Take values of some trajectories into the extremes."""
        for name, value in values.items():
            setattr(self.low, name, min(getattr(self.low, name), float(value.min(initial=math.inf))))
            setattr(self.high, name, max(getattr(self.high, name), float(value.max(initial=-math.inf))))

    def as_row(self) -> list[float]:
        """All numbers in a row that processes can exchange, see [`merged`]."""
        return [*astuple(self.sums), *astuple(self.low), *astuple(self.high)]

    @classmethod
    def merged(cls, steps: int, rows: torch.Tensor) -> "BlockMetrics":
        """The sums and extremes of several rows, shape `(R, columns)`."""
        sizes = [len(fields(Sums)), len(fields(Extremes)), len(fields(Extremes))]
        sums, low, high = rows.split(sizes, dim=-1)
        return cls(
            steps,
            Sums(*sums.sum(0).tolist()),
            Extremes(*low.amin(0).tolist()),
            Extremes(*high.amax(0).tolist()),
        )

    def describe(self, optional: set[str]) -> dict[str, float]:
        """Metrics by name, those of `optional` among them."""
        sums, low, high = self.sums, self.low, self.high
        scored, tokens = max(sums.scored, 1.0), max(sums.tokens, 1.0)
        values = {
            "loss": sums.loss / self.steps,
            "pool": sums.pool,
            "ratio_mean": sums.ratio / scored,
            "ratio_min": low.ratio,
            "ratio_max": high.ratio,
            "clip_low": sums.clip_low / scored,
            "clip_high": sums.clip_high / scored,
            "weight_mean": sums.weight / scored,
            "weight_min": low.weight,
            "weight_max": high.weight,
            "entropy": sums.entropy / tokens,
        }
        if "kl" in optional:
            values["kl"] = sums.kl / tokens
        if "entropy_bonus" in optional:
            values["policy_loss"] = sums.policy_loss / self.steps
        if "aux_loss" in optional:
            values["aux_loss"] = sums.aux_loss / max(sums.micro_batches, 1.0)
        for name in GATES.values():
            if name in optional:
                values[name] = sums.gate / scored
        if "sampler" in optional:
            sampler_tokens = max(sums.sampler_tokens, 1.0)
            values["sampling/sampling_logp_difference/mean"] = sums.sampler_difference / sampler_tokens
            values["sampling/sampling_logp_difference/max"] = high.sampler_difference
            values["sampling/importance_sampling_ratio/mean"] = sums.sampler_weight / scored
            values["sampling/importance_sampling_ratio/min"] = low.sampler_weight
            values["sampling/importance_sampling_ratio/max"] = high.sampler_weight
            for name in _LENGTHS:
                if actions := getattr(sums, f"actions_{name}"):
                    values[f"sampling/masked_{name}"] = getattr(sums, f"masked_{name}") / actions
        return values


class UpdateMetrics:
    """
    Metrics of one iteration, by block of turns.

    Args:
        steps_of (`dict[Block, int]`):
            Blocks that are updated in this iteration, in update order, with their number of optimizer steps.
        optional (`set[str]`):
            Quantities that not every run has, among `"kl"`, `"sampler"`, `"entropy_bonus"`, `"aux_loss"` and the
            values of `GATES`.
    """

    def __init__(self, steps_of: dict[Block, int], optional: set[str]):
        self._optional = optional
        self._blocks = {block: BlockMetrics(steps) for block, steps in steps_of.items()}
        self._without_update = BlockMetrics(1)

    def add_pool(self, block: Block, size: int) -> None:
        """A block begins, with so many trajectories of this process in its pool."""
        self._blocks[block].add(pool=size)

    def add_aux_loss(self, block: Block, value: float, scale: float) -> None:
        """The load-balancing loss of a micro-batch, and what it is multiplied by in the loss of the optimizer step."""
        self._blocks[block].add(aux_loss=value, micro_batches=1, loss=scale * value)

    def add_micro_batch(
        self,
        block: Block | None,
        indices: list[int],
        actions: Actions,
        loss: TurnLoss,
        scale: float,
        weights: TurnWeights,
    ) -> tuple[list[TurnUpdate], float, int]:
        """
        Take in what a micro-batch computed.

        Args:
            block (`Block`, *optional*), indices (`list[int]`):
                The block that is updated (`None` in an iteration without an update), and the trajectories of the
                micro-batch.
            actions ([`~seeupo_trl.update.loss.Actions`]), loss ([`~seeupo_trl.update.loss.TurnLoss`]):
                What went into the loss and came out of it, in the order of `indices`.
            scale (`float`):
                What the losses are multiplied by, 1 / N.
            weights ([`~seeupo_trl.update.turn_weights.TurnWeights`]):
                Turn weights as they were in the loss.

        Returns:
            `tuple[list[TurnUpdate], float, int]`:
                How each trajectory entered, and the sum of entropies of how many tokens.
        """
        columns = {
            "loss": loss.losses * scale,
            "policy_loss": loss.policy_losses * scale,
            "ratio": loss.ratios,
            "clip_low": loss.clipped_low,
            "clip_high": loss.clipped_high,
            "entropy": actions.sums(actions.entropies),
            "tokens": actions.lengths,
        }
        if loss.kl is not None:
            columns["kl"] = loss.kl
        if loss.sampler_weights is not None:
            columns |= {"sampler_weight": loss.sampler_weights, **_sampler_differences(actions)}
        if loss.gates is not None:
            columns["gate"] = loss.gates
        table = dict(zip(columns, _on_host(columns), strict=True))  # name -> (n,)
        largest_difference = table.pop("largest_difference", None)
        table["weight"] = np.array([weights.relative(index) for index in indices])

        metrics = self._without_update if block is None else self._blocks[block]
        metrics.add(scored=len(indices), **{name: float(values.sum()) for name, values in table.items()})
        metrics.observe(weight_unclipped=np.array([weights.unclipped(index) for index in indices]))
        if "sampler_weight" in table:
            metrics.add(**_masked_by_length(table["tokens"], table["sampler_weight"]))
        names = ("ratio", "weight", "clip_low", "clip_high", "sampler_weight")
        metrics.observe(**{name: table[name] for name in names if name in table})
        if largest_difference is not None:
            metrics.observe(sampler_difference=largest_difference[table["sampler_tokens"] > 0])

        is_clipped = (table["clip_low"] + table["clip_high"]) > 0
        rows = zip(indices, table["ratio"].tolist(), is_clipped.tolist(), table["weight"].tolist(), strict=True)
        first = 1 if block is None else block.first
        updates = [
            TurnUpdate(ratio, clipped, weights.of_turn(index, first), weight) for index, ratio, clipped, weight in rows
        ]
        return updates, float(table["entropy"].sum()), int(table["tokens"].sum())

    def reduce(self, lock_step: LockStep) -> dict[str, float]:
        """
        Metrics of the iteration over all processes. Must be called on every process.

        Returns:
            `dict[str, float]`:
                Metric values by name.
        """
        collected = list(self._blocks.values()) or [self._without_update]
        rows = torch.tensor([metrics.as_row() for metrics in collected], dtype=torch.float32)
        rows = lock_step.gather(rows).double().cpu()  # (P, blocks, columns)
        merged_rows = [BlockMetrics.merged(m.steps, rows[:, i]) for i, m in enumerate(collected)]
        total = BlockMetrics.merged(sum(m.steps for m in merged_rows), rows.flatten(0, 1))

        metrics: dict[str, float] = {}
        if total.sums.scored == 0:
            # nobody played a turn
            optional = {"kl": "kl", "entropy_bonus": "policy_loss"} | {name: name for name in GATES.values()}
            names = [name for option, name in optional.items() if option in self._optional]
            return dict.fromkeys(["entropy", *_CLIP_RATIOS, *names], 0.0)
        for block, merged in zip(self._blocks, merged_rows[: len(self._blocks)], strict=True):
            metrics |= {f"turn_{block.label}/{name}": value for name, value in merged.describe(self._optional).items()}
        values = total.describe(self._optional)
        metrics |= {
            "ratio/mean": values["ratio_mean"],
            "ratio/min": values["ratio_min"],
            "ratio/max": values["ratio_max"],
            "clip_ratio/low_mean": values["clip_low"],
            "clip_ratio/high_mean": values["clip_high"],
            "clip_ratio/region_mean": values["clip_low"] + values["clip_high"],
            "clip_ratio/low_min": total.low.clip_low,
            "clip_ratio/high_max": total.high.clip_high,
            "turn_weight/mean": values["weight_mean"],
            "turn_weight/min": values["weight_min"],
            "turn_weight/max": values["weight_max"],
            "turn_weight/unclipped_min": total.low.weight_unclipped,
            "turn_weight/unclipped_max": total.high.weight_unclipped,
            "entropy": values["entropy"],
        }
        alike = ("kl", "policy_loss", "aux_loss", *GATES.values())
        names = [name for name in values if name in alike or name.startswith("sampling/")]
        return metrics | {name: values[name] for name in names}


def _sampler_differences(actions: Actions) -> dict[str, torch.Tensor]:
    """Number, sum and maximum of `|log pi_theta_k - log pi_sampler|` over the tokens that the sampler reported."""
    differences = (actions.start - actions.sampled).abs()  # (S,)
    reported = ~differences.isnan()
    differences = differences.masked_fill(~reported, 0.0)
    action_of = action_of_tokens(actions.lengths, len(differences))
    return {
        "sampler_tokens": actions.sums(reported.to(differences)),
        "sampler_difference": actions.sums(differences),
        "largest_difference": differences.new_zeros(len(actions.lengths)).index_reduce(
            0, action_of, differences, "amax"
        ),
    }


def _masked_by_length(lengths: np.ndarray, sampler_weights: np.ndarray) -> dict[str, float]:
    """Numbers of actions and of those with a sampler weight of 0, by class of length."""
    counts, shortest = {}, 0
    for name, longest in _LENGTHS.items():
        inside = (lengths > shortest) & (lengths <= longest)
        counts[f"actions_{name}"] = float(inside.sum())
        counts[f"masked_{name}"] = float((sampler_weights[inside] == 0).sum())
        shortest = longest
    return counts


def _on_host(columns: dict[str, torch.Tensor]) -> np.ndarray:
    """Columns of `n` values as rows of an array, with one transfer from the device."""
    return torch.stack([column.detach().double() for column in columns.values()]).cpu().numpy()
