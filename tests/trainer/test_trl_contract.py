"""
What this package relies on inside TRL and transformers, beyond their public interface.

Every failure here means that a new release changed something we override, call or read. The message says what it is
and which module of ours to look at; change that module and this file together, then widen the version range.
"""

import inspect

import accelerate
import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from datasets import Dataset
from tiny import load_tiny_model, tiny_tokenizer
from transformers import DynamicCache, Trainer
from transformers.cache_utils import DynamicLayer
from transformers.trainer_callback import CallbackHandler
from transformers.utils.chat_parsing.response_templates import load_response_template
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    parse_response,
    supports_tool_calling,
)
from trl.data_utils import is_conversational
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import (
    RepeatSampler,
    add_fused_lm_head,
    get_config_model_id,
    split_pixel_values_by_grid,
    start_event_loop_in_daemon,
    unsplit_pixel_values_by_grid,
    use_adapter,
)

from seeupo_trl import SeeUPOConfig, SeeUPOTrainer


PARSES_WITH_TOOLS = not trl.__version__.startswith("1.15")

VERSIONS = f"(trl {trl.__version__}, transformers {transformers.__version__})"


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# (what is called, its arguments in order, who relies on it)
SIGNATURES = [
    (Trainer.create_accelerator_and_postprocess, "self", "seeupo_trainer.py: FSDP2 must not round log-probabilities"),
    (
        Trainer._init_training_state,
        "self max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial",
        "checkpoints.py overrides it to find the place in a stream",
    ),
    (GRPOTrainer._get_train_sampler, "self dataset", "seeupo_trainer.py overrides it to make the order resumable"),
    (GRPOTrainer.training_step, "self model inputs num_items_in_batch", "seeupo_trainer.py: one iteration"),
    (GRPOTrainer._prepare_inputs, "self generation_batch", "seeupo_trainer.py: no splitting, no reuse of batches"),
    (GRPOTrainer._generate_and_score_completions, "self inputs", "seeupo_trainer.py adds trajectories and advantages"),
    (GRPOTrainer._generate, "self prompts", "seeupo_trainer.py reads the turns off its result"),
    (
        GRPOTrainer._generate_single_turn,
        "self prompt_ids images multimodal_fields num_generations has_tool_images",
        "multi_turn.py generates with it",
    ),
    (
        GRPOTrainer._calculate_rewards,
        "self inputs prompts completions completion_ids_list",
        "seeupo_trainer.py keeps the gathered rewards of all functions",
    ),
    (GRPOTrainer._compute_loss, "self model inputs", "seeupo_trainer.py: the evaluation loss"),
    (
        GRPOTrainer.prediction_step,
        "self model inputs prediction_loss_only ignore_keys",
        "evaluation must go through _prepare_inputs and compute_loss",
    ),
    (
        GRPOTrainer._get_per_token_logps_and_entropies,
        "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss pixel_values "
        "image_grid_thw num_images pixel_attention_mask spatial_shapes num_tiles image_sizes token_type_ids "
        "mm_token_type_ids image_position_ids",
        "images.py scores samples with images through it; a new image field belongs in its list",
    ),
    (add_fused_lm_head, "model temperature cast_lm_head_to_fp32 outputs", "rows.py calls the head it installs"),
    (
        RepeatSampler.__init__,
        "self data_source mini_repeat_count batch_size repeat_count shuffle seed",
        "checkpoints.py extends it",
    ),
    (use_adapter, "model adapter_name", "seeupo_trainer.py: the reference policy of an adapter"),
    (disable_gradient_checkpointing, "model gradient_checkpointing_kwargs", "lock_step.py: passes without gradient"),
    (get_config_model_id, "config", "seeupo_trainer.py: the default output directory"),
    (is_conversational, "example", "seeupo_trainer.py: whether completions are messages"),
    (split_pixel_values_by_grid, "batch", "images.py takes samples out of a batch"),
    (unsplit_pixel_values_by_grid, "batch", "images.py puts a batch together"),
    (parse_response, f"tokenizer ids prefix{' tools' * PARSES_WITH_TOOLS}", "chat_format.py reads responses"),
    (load_response_template, "spec", "chat_format.py compiles a response template once"),
    (supports_tool_calling, "processing_class", "chat_format.py checks the chat template"),
    (add_response_schema, "processing_class", "chat_format.py teaches the tokenizer to parse"),
    (get_training_chat_template, "processing_class tokenizer", "chat_format.py: templates that only grow"),
    (start_event_loop_in_daemon, "name", "envs/tools.py: coroutines of environments"),
    (
        Trainer.get_batch_samples,
        "self epoch_iterator num_batches device",
        "rollout/ahead.py looks at the batch after it, in the one iterator of an epoch",
    ),
    (Trainer._clip_grad_norm, "self model", "seeupo_trainer.py and lock_step.py clip inner optimizer steps with it"),
    (Trainer._get_grad_norm, "self model grad_norm", "seeupo_trainer.py and lock_step.py report inner gradient norms"),
    (GRPOTrainer._save_checkpoint, "self model trial", "seeupo_trainer.py: no stale word that a checkpoint is whole"),
    (GRPOTrainer._load_optimizer_and_scheduler, "self checkpoint", "checkpoints.py: dtypes of the optimizer's state"),
    (Trainer._save_rng_state, "self output_dir", "seeupo_trainer.py: processes wait for one another after it"),
    (Trainer._get_output_dir, "self trial", "seeupo_trainer.py: where the next checkpoint goes"),
    (CallbackHandler.on_pre_optimizer_step, "self args state control kwargs", "lock_step.py: inner optimizer steps"),
    (CallbackHandler.on_optimizer_step, "self args state control kwargs", "lock_step.py: inner optimizer steps"),
]


@pytest.mark.parametrize(
    ("function", "expected", "why"), SIGNATURES, ids=[entry[0].__qualname__ for entry in SIGNATURES]
)
def test_signature(function, expected, why):
    assert parameters(function) == expected.split(), f"{function.__qualname__} changed {VERSIONS}. {why}."


def test_the_constructor_takes_the_same_arguments():
    theirs, ours = parameters(GRPOTrainer.__init__), parameters(SeeUPOTrainer.__init__)
    assert theirs == ours, f"GRPOTrainer takes other arguments {VERSIONS}: pass {set(theirs) ^ set(ours)} through."


@pytest.fixture(scope="module")
def trainer(tiny_dir, tmp_path_factory):
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("contract")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_completion_length=4,
        per_device_train_batch_size=2,
        num_generations=2,
        max_steps=1,
    )
    return GRPOTrainer(
        model=tiny_dir,
        reward_funcs=one_point_each,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["w1 w2"] * 2}),
    )


def one_point_each(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "name",
    [
        *("_tokenizer", "_is_vlm", "_metrics", "_logs", "_step", "model", "ref_model", "accelerator", "beta"),
        *("num_generations", "num_generations_eval", "mask_truncated_completions", "shuffle_dataset"),
        *("reward_weights", "reward_func_names", "multi_objective_aggregation", "environments", "rollout_func"),
        *("entropy_coef", "_last_world_entropy", "aux_loss_enabled", "router_aux_loss_coef", "use_vllm"),
        *("vllm_importance_sampling_correction", "pad_to_multiple_of", "eos_token_ids", "chat_template_kwargs"),
        *("max_tool_calling_iterations", "callback_handler", "control", "state", "optimizer"),
        *("tools", "environment_factories", "chat_template", "max_completion_length", "_has_async_funcs"),
        *("_pending_metrics", "_pending_extra_logs", "is_in_train"),
    ],
)
def test_a_trainer_has_the_attribute(trainer, name):
    assert hasattr(trainer, name), f"GRPOTrainer no longer sets `{name}` {VERSIONS}: see its uses in seeupo_trl."


def test_what_generation_returns(trainer):
    prompts = ["w1 w2", "w1 w2"]
    trainer.model.train()
    output = trainer._generate(prompts)
    assert len(output) == 8, f"_generate returns {len(output)} values {VERSIONS}; SeeUPOTrainer._generate reads 8."
    prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, *_ = output
    assert prompt_ids == trainer._tokenizer(prompts)["input_ids"]
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)
    assert (tool_mask, logprobs, extra_fields) == (None, None, {})
    assert len(completions) == 2


def test_what_one_call_of_the_sampler_returns(trainer):
    completion_ids, logprobs = trainer._generate_single_turn([[20, 21], [20, 21, 22]], None, {}, 1)
    assert logprobs is None, f"transformers generation now reports log-probabilities {VERSIONS}: see multi_turn.py."
    assert [len(ids) <= 4 for ids in completion_ids] == [True, True]


def test_the_sampler_calls_the_models_generate_once(trainer, monkeypatch):
    """cached_generation.py takes the place of that call, inside of all that TRL wraps around it."""
    model, calls = trainer.accelerator.unwrap_model(trainer.model_wrapped), []
    generate = model.generate

    def watched(**inputs):
        calls.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    trainer._generate_single_turn([[30, 31], [32]], None, {}, 1)
    ((input_ids, attention_mask, config),) = [tuple(call.values()) for call in calls]
    assert list(calls[0]) == ["input_ids", "attention_mask", "generation_config"], VERSIONS
    assert input_ids[:, -1].tolist() == [31, 32] and attention_mask.tolist() == [[1, 1], [0, 1]], VERSIONS
    assert config is trainer.generation_config, VERSIONS


def test_keys_and_values_lie_in_plain_tensors_of_a_dynamic_cache():
    cache = DynamicCache()
    cache.update(torch.ones(2, 3, 4, 5), torch.zeros(2, 3, 4, 6), 0)
    (layer,) = cache.layers
    assert type(layer) is DynamicLayer and cache.get_seq_length() == 4, VERSIONS
    assert layer.keys.shape == (2, 3, 4, 5) and layer.values.shape == (2, 3, 4, 6), VERSIONS


def test_what_a_scored_batch_holds(trainer):
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * 2)
    expected = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"}
    missing = expected - batch.keys()
    assert not missing, f"A generation batch lacks {missing} {VERSIONS}: see images.py."
    assert "old_per_token_logps" not in batch, f"TRL scores the sampler's policy {VERSIONS}: a wasted pass."
    assert len(trainer._logs["advantages"]) == 2, f"SeeUPOTrainer replaces the logged advantages, one each {VERSIONS}."


def test_prompts_that_generation_changes_reach_reward_functions_and_logs(trainer, monkeypatch):
    class Ends(Exception):
        pass

    def generate(prompts):
        generated = GRPOTrainer._generate(trainer, prompts)
        prompts[:] = ["w5", "w6"]
        return generated

    def calculate(inputs, prompts, completions, completion_ids):
        raise Ends(prompts)

    monkeypatch.setattr(trainer, "_generate", generate)
    monkeypatch.setattr(trainer, "_calculate_rewards", calculate)
    with pytest.raises(Ends) as ended:
        trainer._generate_and_score_completions([{"prompt": "w1 w2"}] * 2)
    assert ended.value.args == (["w5", "w6"],), f"TRL copies the prompts {VERSIONS}: see SeeUPOTrainer._generate."


def test_an_environment_is_probed_for_its_methods(tiny_dir, tmp_path):
    """One instance of each kind, and a reward function behind the others for each class with `get_reward`."""
    made = []

    class Probed:
        def __init__(self):
            made.append(self)

        def reset(self, **row):
            return None

        def get_reward(self):
            return 2.0

    trainer = GRPOTrainer(
        model=load_tiny_model(tiny_dir),
        processing_class=tiny_tokenizer(),
        args=GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1),
        reward_funcs=one_point_each,
        environment_factory=Probed,
    )
    message = f"TRL sets environments up differently {VERSIONS}: see SeeUPOTrainer._play_by and trl_environments.py."
    assert trainer._environment_pool == {None: made} and len(made) == 1, message
    assert trainer.reward_func_names == ["one_point_each", "Probed"], message
    assert trainer.reward_funcs[1](environments=[*made, None]) == [2.0, None], message


def test_rewards_are_gathered_with_one_column_a_function(trainer):
    rewards = trainer._calculate_rewards([{"prompt": "w1"}] * 2, ["w1", "w1"], ["w2", "w3"], [[22], [23]])
    assert rewards.shape == (2, 1), f"Rewards have another shape {VERSIONS}: see batch_advantages."


def test_the_sampler_repeats_prompts_and_exposes_its_state():
    sampler = RepeatSampler(range(4), mini_repeat_count=2, batch_size=2, shuffle=True, seed=7)
    assert len(list(sampler)) == len(sampler) == 8
    for name in ("shuffle", "generator", "seed", "num_samples", "batch_size"):
        assert hasattr(sampler, name), f"RepeatSampler has no `{name}` {VERSIONS}: see checkpoints.py."
    order = torch.randperm(4, generator=torch.Generator().manual_seed(7)).tolist()
    sampler = RepeatSampler(range(4), mini_repeat_count=1, batch_size=1, shuffle=True, seed=7)
    assert list(sampler) == order, f"RepeatSampler draws its order differently {VERSIONS}: see checkpoints.py."


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="the fused head of trl 1.15 needs a GPU")
def test_the_fused_head_scores_shifted_labels(tiny_dir):
    model = load_tiny_model(tiny_dir)
    ids = torch.tensor([[20, 21, 22, 23]])
    expected = torch.log_softmax(model(ids).logits / 0.5, dim=-1)
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    labels = torch.tensor([[21, 22, -100, 24]])
    output = model(input_ids=ids, shift_labels=labels, fused_lm_head=True)
    message = f"The fused head changed {VERSIONS}: see RowScorer in rows.py."
    chosen = expected.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0.0)
    torch.testing.assert_close(output.log_probs, chosen, msg=message)
    entropy = -(expected.exp() * expected).sum(-1).masked_fill(labels == -100, 0.0)
    torch.testing.assert_close(output.entropy, entropy, msg=message)
    assert "aux_loss" in type(output).__dataclass_fields__, message


@pytest.mark.skipif(trl.__version__.startswith("1.15"), reason="the fused head of trl 1.15 needs a GPU")
def test_the_fused_head_takes_the_hidden_states_that_a_hook_left(tiny_dir):
    model = load_tiny_model(tiny_dir)
    add_fused_lm_head(model)

    def keep_the_last_two(module, args, output):
        output.last_hidden_state = output.last_hidden_state[:, -2:]
        return output

    ids, labels = torch.tensor([[20, 21, 22, 23]]), torch.tensor([[23, 24]])
    whole = model(input_ids=ids, shift_labels=torch.tensor([[-100, -100, 23, 24]]), fused_lm_head=True).log_probs
    model.base_model.register_forward_hook(keep_the_last_two)
    some = model(input_ids=ids, shift_labels=labels, fused_lm_head=True).log_probs
    message = f"The fused head does not run on what a hook left of the backbone's output {VERSIONS}: see rows.py."
    torch.testing.assert_close(some, whole[:, 2:], msg=message)


def test_the_trainer_puts_the_fused_head_on_policy_and_reference():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert source.count("add_fused_lm_head(") == 2, (
        f"GRPOTrainer.__init__ no longer installs the fused head on the policy and on the reference model {VERSIONS}: "
        "rows.py calls both models with `fused_lm_head=True`."
    )


def test_the_loss_is_not_divided_behind_our_back():
    message = (
        f"The Trainer no longer lets GRPOTrainer scale its loss itself {VERSIONS}: one training step is one iteration "
        "and must not be divided or multiplied."
    )
    assert GRPOTrainer.loss_is_scaled_for_ga is True, message


def test_the_state_file_is_written_after_everything_else_of_a_checkpoint():
    source = inspect.getsource(Trainer._save_checkpoint)
    calls = ["self.save_model(", "self._save_optimizer_and_scheduler(", "self._save_rng_state(", "save_to_json("]
    calls.append("rotate_checkpoints(")
    positions = [source.find(call) for call in calls]
    assert -1 not in positions and positions == sorted(positions), (
        f"Trainer._save_checkpoint no longer writes the state file after the states of the random generators, or "
        f"removes older checkpoints before {VERSIONS}: see SeeUPOTrainer._save_rng_state and checkpoints.py."
    )


def test_a_reference_that_is_sharded_already_stays_as_it_is():
    called, prepares = inspect.getsource(GRPOTrainer.__init__), inspect.getsource(grpo_trainer.prepare_fsdp)
    assert "prepare_fsdp(self.ref_model, self.accelerator)" in called and "FSDPModule)):" in prepares, (
        f"TRL prepares a reference model for FSDP2 in another way {VERSIONS}: see reference_in_layers in backends.py."
    )


def test_without_synchronised_gradients_accelerate_makes_no_step():
    accelerator = Accelerator(cpu=True)
    layer = torch.nn.Linear(2, 1)
    optimizer = accelerator.prepare(torch.optim.SGD(layer.parameters(), lr=1.0))
    layer(torch.ones(1, 2)).sum().backward()
    before = layer.weight.detach().clone()
    accelerator.gradient_state._set_sync_gradients(False)
    try:
        optimizer.step()
    finally:
        accelerator.gradient_state._set_sync_gradients(True)
    message = (
        f"accelerate {accelerate.__version__} steps all the same: see SeeUPOTrainer.training_step and lock_step.py."
    )
    assert torch.equal(layer.weight, before), message


def test_message_level_rollouts_read_these_settings():
    fields = SeeUPOConfig.__dataclass_fields__
    for name in ("use_vllm", "vllm_max_model_length", "max_completion_length", "max_turns", "max_context_length"):
        assert name in fields, f"The configuration has no `{name}` {VERSIONS}: see settings.py."


def test_what_is_used_of_the_vllm_backend():
    backend, client = inspect.getsource(VLLMGeneration), inspect.getsource(VLLMClient)
    for name in ("mode", "llm", "vllm_client", "enable_sleep_mode", "max_completion_length", "generation_kwargs"):
        assert f"self.{name} = " in backend, f"VLLMGeneration sets no `{name}` {VERSIONS}: see vllm.py."
    for use in ("self.llm.sleep(level=2)", "self._llm_weights_sleeping = True", 'wake_up(tags=["kv_cache"])'):
        assert use in backend, f"VLLMGeneration handles sleep mode differently {VERSIONS}: see kept_awake."
    for use in ("self._iter_named_params()", "model.merge_adapter()", "model.unmerge_adapter()"):
        assert use in backend, f"VLLMGeneration reads adapters differently {VERSIONS}: see adapter_sync.py."
    assert parameters(VLLMGeneration._fix_param_name_to_vllm) == ["self", "name", "extra_prefixes"], VERSIONS
    for use in ("self.session = ", "self.base_url = ", "/v1/models"):
        assert use in client, f"VLLMClient has no {use!r} {VERSIONS}: see engine_limits."
    trainer = inspect.getsource(GRPOTrainer)
    assert trainer.count("self.state.global_step != self._last_loaded_step") == 2, (
        f"GRPOTrainer pushes the weights to vLLM at other times {VERSIONS}: once a `global_step` is once an iteration."
    )


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("loss_type", "dapo"),
        ("scale_rewards", "group"),
        ("importance_sampling_level", "token"),
        ("num_iterations", 1),
        ("steps_per_generation", None),
        ("top_entropy_quantile", 1.0),
        ("beta", 0.0),
        ("use_bias_correction_kl", None),
    ],
)
def test_defaults_that_an_upgraded_grpo_config_is_told_by(name, default):
    field = GRPOConfig.__dataclass_fields__.get(name)
    assert field is not None, f"GRPOConfig has no `{name}` {VERSIONS}: see SeeUPOConfig.from_grpo_config."
    if default is not None or name == "steps_per_generation":
        assert field.default == default, (
            f"The default of GRPOConfig.{name} is {field.default!r} {VERSIONS}: SeeUPOConfig.from_grpo_config takes a "
            "field that holds GRPO's default as not given."
        )
