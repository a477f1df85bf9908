"""
What one iteration logs about its updates. Every name is explained in the README ("Metrics").

Values are collected per block of turns on each process and reduced over processes once, at the end.
"""

import math

import torch

from .engine import UpdateEngine
from .schedule import Block


_SUMS = (
    "loss",
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
        blocks (`list[Block]`):
            Blocks that are updated in this iteration, in update order.
        has_kl (`bool`):
            Whether there is a KL term.
        has_sampler (`bool`):
            Whether sampled probabilities are corrected for the sampler.
    """

    def __init__(self, blocks: list[Block], has_kl: bool, has_sampler: bool):
        self._blocks = blocks
        self._has_kl = has_kl
        self._has_sampler = has_sampler
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
        if not self._blocks:
            return {}
        rows = [
            [*self._sums[block].values(), *self._low[block].values(), *self._high[block].values()]
            for block in self._blocks
        ]
        stacked = engine.gather(torch.tensor(rows, dtype=torch.float32)).double().cpu()  # (P, blocks, columns)
        sums, low, high = stacked.split([len(_SUMS), len(_EXTREMES), len(_EXTREMES)], dim=-1)
        sums, low, high = sums.sum(0), low.amin(0), high.amax(0)  # (blocks, columns)

        metrics: dict[str, float] = {}
        for index, block in enumerate(self._blocks):
            values = self._describe(sums[index], low[index], high[index])
            metrics.update({f"turn_{block.label}/{name}": value for name, value in values.items()})
        total = self._describe(sums.sum(0), low.amin(0), high.amax(0))
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
        if self._has_kl:
            metrics["kl"] = total["kl"]
        if self._has_sampler:
            metrics.update({name: total[name] for name in total if name.startswith("sampling/")})
        return metrics

    def _describe(self, sums: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> dict[str, float]:
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        lowest = dict(zip(_EXTREMES, low.tolist(), strict=True))
        highest = dict(zip(_EXTREMES, high.tolist(), strict=True))
        scored, tokens = max(total["scored"], 1.0), max(total["tokens"], 1.0)
        values = {
            "loss": total["loss"],
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
        if self._has_kl:
            values["kl"] = total["kl"] / tokens
        if self._has_sampler:
            sampler_tokens = max(total["sampler_tokens"], 1.0)
            values["sampling/sampling_logp_difference/mean"] = total["sampler_difference"] / sampler_tokens
            values["sampling/sampling_logp_difference/max"] = highest["sampler_difference"]
            values["sampling/importance_sampling_ratio/mean"] = total["sampler_weight"] / scored
            values["sampling/importance_sampling_ratio/min"] = lowest["sampler_weight"]
            values["sampling/importance_sampling_ratio/max"] = highest["sampler_weight"]
        return values
