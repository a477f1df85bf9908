"""The estimate of an iteration's improvement: from the oracle's ratios, computed anew."""

import math

import pytest
from against_oracle import load_model, run_oracle, train
from fixed_rollouts import as_groups, ragged_rollouts

from seeupo_trl.update.turn_updater import TurnUpdater


@pytest.fixture
def logged(monkeypatch):
    """What the update logs in each iteration."""
    iterations, logs = [], TurnUpdater.logs

    def remember(self):
        iterations.append(dict(logs(self)))
        return list(iterations[-1].items())

    monkeypatch.setattr(TurnUpdater, "logs", remember)
    return iterations


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"max_turn_updates": 2, "num_iterations": 2}, {"turn_weight_clip": 0.01}], ids=str
)
def test_improvement_is_the_mean_of_advantages_times_the_products_of_all_ratios_but_the_last(
    settings, rows, tiny_dir, tmp_path, logged
):
    model = load_model(tiny_dir)
    groups = [as_groups(episodes) for episodes in ragged_rollouts()]
    results = run_oracle(model, groups, turn_ratio="product", **settings)
    config = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 12 // rows}
    train(model, ragged_rollouts(), tmp_path, turn_ratio="product", **settings, **config)
    for result, values, played in zip(results, logged, groups, strict=True):
        learning = [i for i, (turns, _) in enumerate(sum(played, [])) if turns and abs(result.advantages[i]) > 1e-9]
        weights = {i: math.prod(block.factors.get(i, 1.0) for block in result.blocks[:-1]) for i in learning}
        mean = sum(result.advantages[i] * (weights[i] - 1) for i in learning) / len(result.advantages)
        assert values["iteration/improvement"] == pytest.approx(mean, rel=1e-5)
        size = sum(weights.values()) ** 2 / sum(weight**2 for weight in weights.values())
        assert values["iteration/improvement_ess"] == pytest.approx(size, rel=1e-5)
        assert mean > 0.01


@pytest.mark.parametrize(
    "settings",
    [{"update_order": "forward"}, {"update_order": "simultaneous"}, {"old_policy": "turn"}],
    ids=["forward", "simultaneous", "old-turn"],
)
def test_where_the_ratios_do_not_make_an_estimate_there_is_none(settings, tiny_dir, tmp_path, logged):
    train(load_model(tiny_dir), ragged_rollouts(), tmp_path, **settings)
    assert not any(name.startswith("iteration/") for values in logged for name in values)
