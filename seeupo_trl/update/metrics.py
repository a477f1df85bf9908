"""
What one iteration logs about its updates. Every name is explained in `docs/metrics.md`.

Values are collected per block of turns on each process and reduced over processes once, at the end.
"""

import math

import torch

from ..distributed.lock_step import UpdateEngine
from .schedule import Block


_SUMS = (
    "loss",
    "policy_loss",
    "aux_loss",
    "micro_batches",
    "pool",
    "scored",
    "ratio",
    "clip_low",
    "clip_high",
    "weight",
    "tokens",
    "entropy",
    "kl",
    "sampler_tokens",
    "sampler_difference",
    "sampler_weight",
)
_EXTREMES = ("ratio", "weight", "weight_unclipped", "clip_low", "clip_high", "sampler_weight", "sampler_difference")


class IterationStatistics:
    """
    Sums and extremes by block of turns.

    Args:
        steps_of_block (`dict[Block, int]`):
            Blocks that are updated in this iteration, in update order, with their number of optimizer steps.
        optional (`set[str]`):
            Quantities that not every run has, among `"kl"`, `"sampler"`, `"entropy_bonus"` and `"aux_loss"`.
    """

    def __init__(self, steps_of_block: dict[Block, int], optional: set[str]):
        blocks = list(steps_of_block)
        self._steps_of_block = steps_of_block
        self._optional = optional
        self._sums = {block: dict.fromkeys(_SUMS, 0.0) for block in blocks}
        self._low = {block: dict.fromkeys(_EXTREMES, math.inf) for block in blocks}
        self._high = {block: dict.fromkeys(_EXTREMES, -math.inf) for block in blocks}

    def add(self, block: Block, **values: float) -> None:
        """Add to the sums of a block."""
        for name, value in values.items():
            self._sums[block][name] += value

    def observe(self, block: Block, **values: float) -> None:
        """Take values into the extremes of a block."""
        for name, value in values.items():
            self._low[block][name] = min(self._low[block][name], value)
            self._high[block][name] = max(self._high[block][name], value)

    def reduce(self, engine: UpdateEngine) -> dict[str, float]:
        """
        Metrics of the iteration over all processes. Must be called on every process.

        Returns:
            `dict[str, float]`:
                Metric values by name.
        """
        if not self._steps_of_block:
            return {}
        rows = [
            [*self._sums[block].values(), *self._low[block].values(), *self._high[block].values()]
            for block in self._steps_of_block
        ]
        stacked = engine.gather(torch.tensor(rows, dtype=torch.float32)).double().cpu()  # (P, blocks, columns)
        sums, low, high = stacked.split([len(_SUMS), len(_EXTREMES), len(_EXTREMES)], dim=-1)
        sums, low, high = sums.sum(0), low.amin(0), high.amax(0)  # (blocks, columns)

        metrics: dict[str, float] = {}
        for index, (block, steps) in enumerate(self._steps_of_block.items()):
            values = self._describe(sums[index], low[index], high[index], steps)
            metrics.update({f"turn_{block.label}/{name}": value for name, value in values.items()})
        num_steps = sum(self._steps_of_block.values())
        total = self._describe(sums.sum(0), low.amin(0), high.amax(0), num_steps)
        metrics.update(
            {
                "ratio/mean": total["ratio_mean"],
                "ratio/min": total["ratio_min"],
                "ratio/max": total["ratio_max"],
                "clip_ratio/low_mean": total["clip_low"],
                "clip_ratio/high_mean": total["clip_high"],
                "clip_ratio/region_mean": total["clip_low"] + total["clip_high"],
                "clip_ratio/low_min": low[:, _EXTREMES.index("clip_low")].amin().item(),
                "clip_ratio/high_max": high[:, _EXTREMES.index("clip_high")].amax().item(),
                "turn_weight/mean": total["weight_mean"],
                "turn_weight/min": total["weight_min"],
                "turn_weight/max": total["weight_max"],
                "turn_weight/unclipped_min": low[:, _EXTREMES.index("weight_unclipped")].amin().item(),
                "turn_weight/unclipped_max": high[:, _EXTREMES.index("weight_unclipped")].amax().item(),
                "entropy": total["entropy"],
            }
        )
        names = [name for name in total if name in ("kl", "policy_loss", "aux_loss") or name.startswith("sampling/")]
        return metrics | {name: total[name] for name in names}

    def _describe(self, sums: torch.Tensor, low: torch.Tensor, high: torch.Tensor, steps: int) -> dict[str, float]:
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        lowest = dict(zip(_EXTREMES, low.tolist(), strict=True))
        highest = dict(zip(_EXTREMES, high.tolist(), strict=True))
        scored, tokens = max(total["scored"], 1.0), max(total["tokens"], 1.0)
        values = {
            "loss": total["loss"] / steps,
            "pool": total["pool"],
            "ratio_mean": total["ratio"] / scored,
            "ratio_min": lowest["ratio"],
            "ratio_max": highest["ratio"],
            "clip_low": total["clip_low"] / scored,
            "clip_high": total["clip_high"] / scored,
            "weight_mean": total["weight"] / scored,
            "weight_min": lowest["weight"],
            "weight_max": highest["weight"],
            "entropy": total["entropy"] / tokens,
        }
        if "kl" in self._optional:
            values["kl"] = total["kl"] / tokens
        if "entropy_bonus" in self._optional:
            values["policy_loss"] = total["policy_loss"] / steps
        if "aux_loss" in self._optional:
            values["aux_loss"] = total["aux_loss"] / max(total["micro_batches"], 1.0)
        if "sampler" in self._optional:
            sampler_tokens = max(total["sampler_tokens"], 1.0)
            values["sampling/sampling_logp_difference/mean"] = total["sampler_difference"] / sampler_tokens
            values["sampling/sampling_logp_difference/max"] = highest["sampler_difference"]
            values["sampling/importance_sampling_ratio/mean"] = total["sampler_weight"] / scored
            values["sampling/importance_sampling_ratio/min"] = lowest["sampler_weight"]
            values["sampling/importance_sampling_ratio/max"] = highest["sampler_weight"]
        return values
