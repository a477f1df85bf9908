"""Whatever the options, a run that is resumed ends with the parameters of the one that was not interrupted."""

import json
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import ON_CPU, load_tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.distributed.checkpoints import REFERENCE_FILE
from seeupo_trl.trajectory_log import read_trajectories


PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(6)]})
LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "beta": 0.5}


def small_tokens(completion_ids, **columns):
    return [-sum(ids) / 100 for ids in completion_ids]


def plain(directory: str) -> dict:
    return {"model": load_tiny_model(directory)}


def in_bfloat16(directory: str) -> dict:
    return {"model": load_tiny_model(directory, torch.bfloat16)}


def adapter_of_the_trainer(directory: str) -> dict:
    return {"model": load_tiny_model(directory), "peft_config": LoraConfig(**LORA)}


def adapter_of_the_script(directory: str) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(load_tiny_model(directory), LoraConfig(**LORA))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return {"model": model}


def make_trainer(
    directory: str,
    output,
    make_model: Callable[[str], dict] = plain,
    reward_funcs=small_tokens,
    train_dataset=None,
    eval_dataset=None,
    callbacks=None,
    trainer_class=SeeUPOTrainer,
    **options,
) -> SeeUPOTrainer:
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return trainer_class(
        args=SeeUPOConfig(**{**ON_CPU, **settings, **options}),
        reward_funcs=reward_funcs,
        train_dataset=PROMPTS if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        processing_class=tiny_tokenizer(),
        **make_model(directory),
    )


def parameters(trainer: SeeUPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


OPTIONS = {
    "moving-reference": SYNC,
    "adapter-of-the-trainer": {"make_model": adapter_of_the_trainer, "beta": 0.5},
    "adapter-of-the-script": {"make_model": adapter_of_the_script, "beta": 0.5},
    "adaptive-entropy": {"use_adaptive_entropy": True, "entropy_target": 100.0, "entropy_coef_delta": 0.1},
    "minibatches-and-passes": {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "num_iterations": 2},
    "random-order": {"update_order": "random", "max_turn_updates": 2, "old_policy": "turn"},
    "adafactor": {"make_model": in_bfloat16, "optim": "adafactor", "learning_rate": 1e-2},
    "schedule-and-weight-decay": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_resumed_run_ends_where_the_uninterrupted_one_does(options, tiny_dir, tmp_path):
    whole = make_trainer(tiny_dir, tmp_path, **options)
    whole.train()
    resumed = make_trainer(tiny_dir, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, actual = parameters(whole), parameters(resumed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    last, reference = (
        next(log for log in reversed(trainer.state.log_history) if "loss" in log) for trainer in (resumed, whole)
    )
    for name in {"loss", "reward", "kl", "entropy", "entropy_coef"} & reference.keys():
        assert last[name] == reference[name], name


BY_EPOCH = {"save_strategy": "epoch", "eval_strategy": "epoch"}


@pytest.mark.parametrize(
    ("rows", "step", "strategies"),
    [
        *((6, 2, {}), (6, 3, {}), (6, 5, {}), (5, 5, {})),
        *((6, 3, BY_EPOCH), (6, 3, {"eval_strategy": "epoch"}), (6, 2, {"eval_strategy": "epoch"})),
    ],
)
def test_a_stream_goes_on_where_it_was_also_in_a_later_pass(rows, step, strategies, tiny_dir, tmp_path):
    seen, others = [], Dataset.from_dict({"prompt": ["w8 w9", "w9 w8"]})

    def reward(prompts, completion_ids, **columns):
        if prompts[0] not in others["prompt"]:
            seen.append(prompts)
        return small_tokens(completion_ids)

    class Evaluating(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if strategies and state.global_step == 2:
                control.should_evaluate = True  # in the middle of a pass

    def trainer(output, max_steps):
        stream = PROMPTS.select(range(rows)).to_iterable_dataset()
        options = {"max_steps": max_steps, "save_steps": step, "lr_scheduler_type": "constant", **strategies}
        given = {"reward_funcs": reward, "train_dataset": stream, "eval_dataset": others}
        given["callbacks"] = [Evaluating()]
        return make_trainer(tiny_dir, output, **given, **options)

    def evaluated(trainer):
        return [log["step"] for log in trainer.state.log_history if "eval_reward" in log]

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    trainer(tmp_path / "begun", step).train()
    resumed = trainer(tmp_path / "begun", 8)
    resumed.train(resume_from_checkpoint=True)
    assert seen[:8] == seen[8:]
    assert evaluated(resumed) == evaluated(whole)
    expected, actual = parameters(whole), parameters(resumed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert resumed.state.epoch == whole.state.epoch


@pytest.mark.parametrize(
    ("has_length", "stops", "step"),
    [(True, False, 3), (True, False, 7), (False, True, 4), (False, True, 5)],
)
def test_a_stream_goes_on_where_it_was_behind_a_loader_of_its_own_and_where_passes_are_ended(
    has_length, stops, step, tiny_dir, tmp_path
):
    seen = []

    def reward(prompts, completion_ids, **columns):
        seen.append(prompts)
        return small_tokens(completion_ids)

    class OwnLoader(SeeUPOTrainer):
        def get_train_dataloader(self):
            if not has_length:
                return super().get_train_dataloader()
            rows = [row for row in self.train_dataset for _ in range(self.num_generations)]
            return DataLoader(rows, batch_size=self.args.generation_batch_size, collate_fn=list)

    class EndsPasses(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = stops and state.global_step % 2 == 0
            control.should_training_stop = state.global_step == self.last

    def trainer(output, last):
        callback = EndsPasses()
        callback.last = last
        stream = PROMPTS.select(range(6)).to_iterable_dataset()
        options = {"max_steps": 9, "save_steps": step, "lr_scheduler_type": "constant"}
        given = {"reward_funcs": reward, "train_dataset": stream, "callbacks": [callback]}
        return make_trainer(tiny_dir, output, trainer_class=OwnLoader, **given, **options)

    whole = trainer(tmp_path / "whole", 9)
    whole.train()
    trainer(tmp_path / "begun", step).train()
    resumed = trainer(tmp_path / "begun", 9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "begun" / f"checkpoint-{step}"))
    assert seen[:9] == seen[9:]
    assert resumed.state.global_step == 9


def test_a_checkpoint_that_says_nothing_of_passes_is_resumed_and_followed_by_others(tiny_dir, tmp_path):
    make_trainer(tiny_dir, tmp_path).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["PlaceInData"]  # as GRPO's
    path.write_text(json.dumps(state))
    resumed = make_trainer(tiny_dir, tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert (
        "PlaceInData"
        in json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    )


def test_resuming_in_the_same_process_leaves_one_file_for_an_iteration(tiny_dir, tmp_path):
    trainer = make_trainer(tiny_dir, tmp_path, save_trajectories=True)
    trainer.train()
    before = read_trajectories(tmp_path).to_pylist()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert read_trajectories(tmp_path).to_pylist() == before


def test_moving_reference_that_the_checkpoint_lacks_is_refused(tiny_dir, tmp_path):
    make_trainer(tiny_dir, tmp_path, max_steps=2, beta=0.5).train()
    assert not (tmp_path / "checkpoint-2" / REFERENCE_FILE).exists()
    with pytest.raises(ValueError, match=f"it holds no {REFERENCE_FILE}"):
        make_trainer(tiny_dir, tmp_path, **SYNC).train(resume_from_checkpoint=True)


def test_a_finished_run_that_is_resumed_stays_as_it_ended(tiny_dir, tmp_path):
    make_trainer(tiny_dir, tmp_path, max_steps=2).train()
    trainer = make_trainer(tiny_dir, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    saved = load_tiny_model(str(tmp_path / "checkpoint-2")).state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert not (tmp_path / "checkpoint-3").exists()
