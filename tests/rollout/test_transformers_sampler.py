"""Single requests on the transformers backend: the tokens of TRL's generation, whatever else is decoded meanwhile."""

import functools
import math
import random
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer, forced_end, tiny_model
from datasets import Dataset
from generating import ENDS, EOS, GREEDY, make_generating_trainer, small_config, words
from launching import run_on_two_processes
from peft import LoraConfig
from talk import Talk, row, user
from tiny import ON_CPU, VOCABULARY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from trl import GRPOTrainer

from seeupo_trl import MultiTurnRollout, SeeUPOConfig, SeeUPOTrainer
from seeupo_trl.recipes.warm_up import train_last_layers
from seeupo_trl.rollout import transformers_sampler
from seeupo_trl.rollout.sampler import Request
from seeupo_trl.rollout.segment_attention import attend_over_segments, attention, mask_after
from seeupo_trl.rollout.transformers_sampler import TransformersSampler
from seeupo_trl.rollout.turn_ends import TurnEnds
from seeupo_trl.scoring.tree_attention import use_attention


@pytest.fixture
def make_trainer(tiny_dir, tmp_path):
    def make(model=None, dtype=torch.float32, **options):
        return make_generating_trainer(tiny_dir, tmp_path, dtype, model, **options)

    return make


def ends_of(trainer, **options):
    return TurnEnds(trainer.processing_class, trainer.eos_token_ids, **options)


@pytest.fixture
def make_sampler():
    """Samplers that are closed after the test."""
    made = []

    def make(trainer, **options):
        made.append(TransformersSampler(trainer, options.pop("ends", ends_of(trainer)), **options))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


def small_model(model_type, **options):
    """A model of two layers of width 32."""
    config = small_config(model_type, **{"num_key_value_heads": 2, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def anew(trainer, contexts):
    """TRL's own responses, one context at a time."""
    return [trainer._generate_single_turn([context], None, {}, 1)[0][0] for context in contexts]


def answers(sampler, requests):
    for request in requests:
        sampler.submit(request)
    found = {}
    while len(found) < len(requests):
        found.update((response.key, response.action_ids) for response in sampler.poll(None))
    return [found[request.key] for request in requests]


def respond(sampler, contexts, seed=0):
    return answers(sampler, [Request(key, context, seed + key) for key, context in enumerate(contexts)])


def groups(lengths=(21, 133, 5, 70, 200), seed=1, size=3):
    """Prompts of different length, each for some episodes; the last two begin with the same tokens."""
    rng = random.Random(seed)
    prompts = [words(rng, length) for length in lengths]
    prompts[-2] = prompts[-1][:90] + prompts[-2]
    return [prompt for prompt in prompts for _ in range(size)]


class Counter:
    """Tokens that the forward passes of a model were given."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rewrite", ["nothing", "without first half", "without memory"])
def test_greedy_responses_are_those_of_encoding_every_turn_anew(make_trainer, make_sampler, dtype, rewrite):
    trainer = make_trainer(dtype=dtype)
    sampler = make_sampler(trainer)
    contexts, rng, lengths = groups(), random.Random(0), set()
    for _ in range(4):
        responses = respond(sampler, contexts)
        assert responses == anew(trainer, contexts)
        lengths |= set(map(len, responses))
        for i, response in enumerate(responses):
            if rewrite == "without first half":
                response = response[len(response) // 2 :]
            elif rewrite == "without memory":
                contexts[i] = contexts[i][:75]
            contexts[i] = contexts[i] + response + words(rng, rng.choice([1, 2, 7, 150]))
    assert len(lengths) > 2 and max(lengths) == 9


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen2", "qwen3_moe", "olmo2"])
def test_with_other_models_of_full_attention(make_trainer, make_sampler, model_type):
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    trainer = make_trainer(model=small_model(model_type, **(options if "moe" in model_type else {})))
    trainer.model.eval()
    sampler = make_sampler(trainer)
    contexts = groups()
    for _ in range(2):
        responses = respond(sampler, contexts)
        assert responses == anew(trainer, contexts)
        contexts = [context + response + [EOS, 40] for context, response in zip(contexts, responses, strict=True)]


def test_greedy_responses_are_those_of_the_models_own_generate(make_trainer, make_sampler):
    trainer = make_trainer()
    model = trainer.model
    for context, response in zip(groups(), respond(make_sampler(trainer), groups()), strict=True):
        output = model.generate(
            torch.tensor([context]), do_sample=False, max_new_tokens=9, eos_token_id=ENDS, use_cache=True
        )
        assert output[0, len(context) :].tolist() == response


def test_with_lora(make_trainer, make_sampler):
    trainer = make_trainer(peft_config=LoraConfig(r=4, init_lora_weights=False))
    expected = anew(trainer, groups())
    assert respond(make_sampler(trainer), groups()) == expected
    with trainer.model.disable_adapter():
        assert anew(trainer, groups()) != expected


def test_with_gradient_checkpointing_and_dropout_which_are_on_again_afterwards(make_trainer, make_sampler):
    trainer = make_trainer(peft_config=LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5))
    trainer.model.gradient_checkpointing_enable()
    trainer.model.eval()
    expected = anew(trainer, groups())
    trainer.model.train()
    frozen = trainer.model.get_base_model().lm_head.eval()
    sampler = make_sampler(trainer)
    assert not trainer.model.is_gradient_checkpointing
    assert respond(sampler, groups()) == expected
    assert trainer.model.training and not frozen.training  # also while it is open: trainers look at it
    sampler.close()
    assert trainer.model.is_gradient_checkpointing
    assert all(module.training for module in trainer.model.modules() if "Dropout" in type(module).__name__)


def test_under_autocast(make_trainer, make_sampler):
    """Keys and values are as exact as TRL's, so most greedy responses agree in bfloat16."""
    trainer = make_trainer(bf16=True)
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    expected = anew(trainer, groups())
    sampler = make_sampler(trainer)
    responses = respond(sampler, groups())
    assert sum(map(list.__eq__, responses, expected)) >= 0.8 * len(expected)
    assert {layer[0].dtype for segment in sampler._tree for layer in segment.layers} <= {torch.bfloat16}


@pytest.mark.parametrize("frozen", ["nothing", "layers", "all but an adapter"])
def test_parameters_are_cast_once_a_rollout(make_trainer, make_sampler, frozen):
    class Casts(TorchDispatchMode):
        def __init__(self, shapes):
            super().__init__()
            self.shapes, self.count = shapes, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                self.count += tuple(args[0].shape) in self.shapes
            return func(*args, **(kwargs or {}))

    adapter = LoraConfig(r=4) if frozen == "all but an adapter" else None
    trainer = make_trainer(bf16=True, generation={**GREEDY, "min_new_tokens": 9}, peft_config=adapter)
    if frozen == "layers":
        train_last_layers(trainer.model, 1)
    asked = [parameter.requires_grad for parameter in trainer.model.parameters()]
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    matrices = [tuple(module.weight.shape) for module in trainer.model.modules() if isinstance(module, nn.Linear)]
    for _ in range(2):
        sampler = make_sampler(trainer)
        sampler.submit(Request(0, [EOS, 40, 41], 0))
        with Casts(matrices) as first:
            sampler.poll(0)
        with Casts(matrices) as others:
            sampler.poll(None)
        assert first.count >= len(matrices) and others.count == 0
        assert [parameter.requires_grad for parameter in trainer.model.parameters()] == asked
        sampler.close()


def test_attention_is_that_of_the_definition_on_either_path():
    torch.manual_seed(0)
    query, key = torch.randn(3, 2, 4, 8, dtype=torch.float64), torch.randn(3, 2, 9, 8, dtype=torch.float64)
    mask = mask_after(torch.tensor([9, 1, 5]), 9, torch.float64)
    for value in (torch.randn(3, 2, 9, 8, dtype=torch.float64), torch.randn(3, 2, 9, 5, dtype=torch.float64)):
        output, lse = attention(query, key, value, mask, scale=0.3)
        for i, length in enumerate([9, 1, 5]):
            weights = (0.3 * query[i] @ key[i, :, :length].transpose(1, 2)).exp()
            torch.testing.assert_close(lse[i], weights.sum(-1).log())
            torch.testing.assert_close(output[i], weights / weights.sum(-1, keepdim=True) @ value[i, :, :length])


# --- sampling -------------------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"min_p": 0.1, "repetition_penalty": 1.3},
    {"generation_kwargs": {"forced_eos_token_id": EOS, "no_repeat_ngram_size": 2}},
    {"generation_kwargs": {"min_new_tokens": 3, "sequence_bias": [[[70], 4.0]]}},
    {"generation_kwargs": {"typical_p": 0.8, "suppress_tokens": [70, 71], "bad_words_ids": [[72, 73]]}},
    {"generation_kwargs": {"eos_token_id": [EOS, 70, 71], "begin_suppress_tokens": [74]}},
    {"generation_kwargs": {"max_new_tokens": 1}},
    {"generation_kwargs": {"exponential_decay_length_penalty": (2, 1.5), "encoder_repetition_penalty": 1.2}},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_sampling_options_mean_what_they_mean_to_transformers(make_trainer, make_sampler, monkeypatch, settings):
    """`generate`, for one context after the other, draws the same tokens if it inverts the same distribution there."""
    settings = dict(settings)
    trainer = make_trainer(generation=settings.pop("generation_kwargs", None), **settings)
    contexts = groups(size=2)
    responses = respond(make_sampler(trainer), contexts, seed=5)
    uniforms: list[float] = []

    def multinomial(probabilities, num_samples):
        return torch.tensor(
            [[np.searchsorted(np.cumsum(probabilities[0].double().numpy()), uniforms.pop(0), "right")]]
        )

    for key, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        uniforms[:] = np.random.default_rng(5 + key).random(9).tolist()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "multinomial", multinomial)
            assert anew(trainer, [context]) == [response]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 12}], ids=["plain", "with options"])
def test_frequencies_of_responses_are_those_of_transformers(make_trainer, make_sampler, settings):
    trainer = make_trainer(generation=None, max_completion_length=2, **settings)
    context, count = groups()[0], 1500
    torch.manual_seed(0)
    stock = trainer._generate_single_turn([context] * count, None, {}, 1)[0]
    ours = respond(make_sampler(trainer), [context] * count)
    table = {}
    for which, responses in enumerate((stock, ours)):
        for response in responses:
            table.setdefault(tuple(response), [0, 0])[which] += 1
    rare = [sum(counts) for counts in zip(*(c for c in table.values() if sum(c) < 10), strict=True)] or [0, 0]
    cells = np.array([counts for counts in table.values() if sum(counts) >= 10] + [rare])
    cells = cells[cells.sum(1) > 0]
    statistic = ((cells[:, 0] - cells[:, 1]) ** 2 / cells.sum(1)).sum()  # chi-squared, both samples of one size
    freedom = len(cells) - 1
    assert freedom > 10 and abs(statistic - freedom) < 3 * math.sqrt(2 * freedom)


def test_a_response_is_a_function_of_its_context_and_seed(make_trainer, make_sampler):
    trainer = make_trainer(generation=None)
    requests = [Request(key, context, 100 + key) for key, context in enumerate(groups())]
    expected = answers(make_sampler(trainer), requests)
    alone = [answers(make_sampler(trainer), [request])[0] for request in requests]
    assert alone == expected
    for max_rows in (None, 1, 4):
        order = random.Random(3).sample(requests, len(requests))
        sampler = make_sampler(trainer, max_rows=max_rows)
        assert answers(sampler, order) == [expected[request.key] for request in order]
    other = [replace(request, seed=request.seed + 1000) for request in requests]
    assert answers(make_sampler(trainer), other) != expected
    same = [Request(key, groups()[0], 7) for key in range(4)]
    assert len(set(map(tuple, answers(make_sampler(trainer), same)))) == 1


# --- ends -----------------------------------------------------------------------------------------------------------


def test_turns_end_at_further_tokens_and_at_strings(make_trainer, make_sampler):
    trainer = make_trainer()
    whole = anew(trainer, groups())
    tokens = {response[2] for response in whole if len(response) > 4}
    strings = [f" {VOCABULARY[response[3]]} {VOCABULARY[response[4]]}" for response in whole if len(response) > 6][:2]
    ends = ends_of(trainer, token_ids=sorted(tokens)[:2], strings=strings)
    expected = [response[: ends.length_of(response)] for response in whole]
    assert len({*map(tuple, expected)} - {*map(tuple, whole)}) > 1
    assert respond(make_sampler(trainer, ends=ends), groups()) == expected


def test_only_a_string_of_the_response_ends_it(make_trainer, make_sampler):
    trainer = make_trainer()
    context = groups()[0]
    (whole,) = anew(trainer, [context])
    ends = ends_of(trainer, strings=[f"{VOCABULARY[context[-1]]} {VOCABULARY[whole[0]]}"])
    assert respond(make_sampler(trainer, ends=ends), [context]) == [whole]


# --- requests that come and go -------------------------------------------------------------------------------------


def test_episodes_go_on_at_their_own_pace(make_trainer, make_sampler):
    """Requests arrive while others are decoded, in an order and at times that chance decides."""
    trainer = make_trainer()
    chance, sampler = random.Random(0), make_sampler(trainer, max_rows=7)
    contexts = dict(enumerate(groups()))
    idle, turns = list(contexts), dict.fromkeys(contexts, 0)
    checked = 0
    while idle or sampler._rows or sampler._waiting:
        for key in chance.sample(idle, chance.randint(0, len(idle))):
            idle.remove(key)
            sampler.submit(Request(key, contexts[key], key))
        for response in sampler.poll(0):
            key = response.key
            assert [response.action_ids] == anew(trainer, [contexts[key]])
            checked += 1
            turns[key] += 1
            contexts[key] = contexts[key] + response.action_ids + words(chance, chance.choice([1, 5, 80]))
            if turns[key] < 3:
                idle.append(key)
            elif chance.random() < 0.5:
                sampler.forget(key)
    assert checked == 3 * len(contexts)


def test_poll_decodes_at_least_one_token_and_returns_in_time(make_trainer, make_sampler):
    trainer = make_trainer(generation={**GREEDY, "min_new_tokens": 9})
    sampler = make_sampler(trainer)
    assert sampler.poll(None) == sampler.poll(1.0) == []
    sampler.submit(Request(0, groups()[0], 0))
    assert [len(sampler.poll(0)) for _ in range(9)] == [0] * 8 + [1]
    sampler.submit(Request(0, groups()[0], 0))
    sampler.submit(Request(1, groups()[0], 0))
    assert len(sampler.poll(None)) == 2 and sampler.poll(None) == []


def test_an_episode_that_ends_gives_up_its_request(make_trainer, make_sampler):
    trainer = make_trainer(generation={**GREEDY, "min_new_tokens": 9})
    sampler = make_sampler(trainer, max_rows=2)
    expected = anew(trainer, groups()[:4])
    for key, context in enumerate(groups()[:4]):
        sampler.submit(Request(key, context, key))
    sampler.poll(0)
    sampler.forget(1)  # is decoded
    sampler.forget(2)  # waits
    sampler.forget(99)
    found = []
    while len(found) < 2:
        found += sampler.poll(None)
    assert {response.key: response.action_ids for response in found} == {0: expected[0], 3: expected[3]}


def test_an_episode_has_one_request_at_a_time(make_trainer, make_sampler):
    sampler = make_sampler(make_trainer())
    sampler.submit(Request(3, [EOS], 0))
    with pytest.raises(ValueError, match="Episode 3 has a request already"):
        sampler.submit(Request(3, [EOS], 0))
    with pytest.raises(ValueError, match="context of episode 4 is empty"):
        sampler.submit(Request(4, [], 0))


def test_contexts_that_are_known_in_full_or_in_part_or_not_at_all(make_trainer, make_sampler):
    """The same context again, a shorter one, one that continues another episode's, one of a single token."""
    trainer = make_trainer()
    sampler = make_sampler(trainer)
    rng = random.Random(3)
    first, other = words(rng, 130), words(rng, 17)
    (response,) = respond(sampler, [first])
    rounds = [
        {0: first, 1: other},
        {0: first + response, 1: other},
        {0: first[:71], 2: first + response + other},
        {2: first[:1], 0: first[:72]},
        {3: [EOS], 4: [EOS], 1: other + [EOS]},
        {5: first[:80] + other, 6: first[:68]},
        {2: first, 0: first, 5: first},
    ]
    for contexts in rounds:
        found = answers(sampler, [Request(key, context, 0) for key, context in contexts.items()])
        assert found == anew(trainer, contexts.values())


class Jittery(Talk):
    """Answers after a while that has nothing to do with its task."""

    def step(self, message):
        time.sleep(random.random() / 20)
        return super().step(message)


def test_whole_rollouts_are_those_of_lock_step_and_sampled_ones_repeat(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer("qwen2_5")
    rows = [row(*[[user("Go on.")]] * n, number=n) for n in (0, 2, 5)]

    def play(lock_step, **generation):
        torch.manual_seed(0)
        trainer = SeeUPOTrainer(
            model=tiny_model(tokenizer),
            args=SeeUPOConfig(
                str(tmp_path),
                num_generations=2,
                per_device_train_batch_size=6,
                max_completion_length=6,
                lock_step_rollouts=lock_step,
                generation_kwargs={**forced_end(), **generation},
                **ON_CPU,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            environment_factory=Jittery,
        )
        trainer.rollout_inputs = [task for task in rows for _ in range(2)]
        output = MultiTurnRollout(Jittery)([None] * 6, trainer)
        return [[(turn.context_ids, turn.action_ids) for turn in t.turns] for t in output["trajectories"]]

    monkeypatch.setattr(
        SeeUPOTrainer,
        "rollout_sampler",
        lambda trainer, ends, settings: TransformersSampler(trainer, ends),
        raising=False,
    )
    greedy = play(False, do_sample=False)
    assert [len(turns) for turns in greedy] == [1, 1, 3, 3, 6, 6]
    assert greedy == play(True, do_sample=False)
    assert play(False) == play(False) != greedy


# --- at a low cost --------------------------------------------------------------------------------------------------


def numbers_kept(sampler):
    """Numbers in the keys and values of all episodes, room ahead included."""
    slabs = [tensor for slab in sampler._slabs.values() for layer in slab.layers for tensor in layer]
    own = [tensor for segment in sampler._tree for layer in segment.layers for tensor in layer]
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in slabs + own)


PER_TOKEN = 2 * 2 * 2 * 8  # layers, keys and values, heads, head size


def test_the_prompt_of_a_group_is_stored_and_computed_once(make_trainer, make_sampler):
    trainer = make_trainer(generation={**GREEDY, "min_new_tokens": 9})
    counter, sampler = Counter(trainer.model), make_sampler(trainer)
    prompt = words(random.Random(0), 1025)
    for key in range(8):
        sampler.submit(Request(key, prompt, key))
    sampler.poll(0)
    assert counter.shapes == [(1, 1024), (8, 1)]
    assert numbers_kept(sampler) == PER_TOKEN * (1024 + 8 * 128)
    sampler.poll(None)
    sampler.forget(0)
    sampler._place()
    assert numbers_kept(sampler) == PER_TOKEN * (1024 + 7 * 9)  # nothing waits for a response: no room ahead
    for key in range(1, 4):
        sampler.submit(Request(key, prompt, key))
    sampler.poll(0)
    sampler.forget(1)
    sampler.forget(2)
    sampler.poll(0)
    assert numbers_kept(sampler) == PER_TOKEN * (1024 + 4 * 9 + 128)
    for key in range(8):
        sampler.forget(key)
    assert numbers_kept(sampler) == 0 and not list(sampler._tree)


def test_a_late_episode_of_a_group_shares_what_an_earlier_one_is_decoding_on(make_trainer, make_sampler):
    trainer = make_trainer(generation={**GREEDY, "min_new_tokens": 9})
    counter, sampler = Counter(trainer.model), make_sampler(trainer)
    prompt = words(random.Random(0), 513)
    expected = anew(trainer, [prompt, prompt[:450] + [EOS]])
    counter.shapes.clear()
    sampler.submit(Request(0, prompt, 0))
    sampler.poll(0)
    sampler.submit(Request(1, prompt, 0))
    sampler.poll(0)
    sampler.submit(Request(2, prompt[:450] + [EOS], 0))
    sampler.poll(0)
    assert counter.shapes == [(1, 512), (1, 1), (2, 1), (3, 1)]
    found = {}
    while len(found) < 3:
        found.update((response.key, response.action_ids) for response in sampler.poll(None))
    assert found == {0: expected[0], 1: expected[0], 2: expected[1]}


def test_a_turn_computes_its_new_tokens_only(make_trainer, make_sampler):
    trainer = make_trainer()
    counter, sampler = Counter(trainer.model), make_sampler(trainer)
    rng = random.Random(0)
    contexts = [words(rng, 150), words(rng, 170)]
    respond(sampler, contexts)
    assert counter.shapes[0] == (1, 149 + 169)
    for _ in range(3):
        responses = respond(sampler, contexts)
        contexts = [context + response + words(rng, 10) for context, response in zip(contexts, responses, strict=True)]
        counter.shapes.clear()
        respond(sampler, contexts)
        # the last token of each response, which was never an input, and the reply but for its last token
        assert counter.shapes[0] == (1, 2 * 10) and counter.shapes[1] == (2, 1)


def test_a_response_that_is_whole_costs_nothing_more(make_trainer, make_sampler):
    trainer = make_trainer(generation=None, max_completion_length=40)
    counter, sampler = Counter(trainer.model), make_sampler(trainer)
    responses = respond(sampler, [[EOS, key] for key in range(40, 60)])
    decoded = [rows for rows, new in counter.shapes if new == 1]
    assert sum(decoded) == sum(map(len, responses)) and len(decoded) == max(map(len, responses))


def test_forward_passes_are_bounded_in_size(make_trainer, make_sampler, monkeypatch):
    monkeypatch.setattr(transformers_sampler, "MAX_TOKENS_PER_PASS", 100)
    trainer = make_trainer()
    expected = anew(trainer, groups())
    counter = Counter(trainer.model)
    assert respond(make_sampler(trainer), groups()) == expected
    contexts = [new for rows, new in counter.shapes if rows == 1]
    assert max(contexts) == 100 and sum(contexts) < 1.2 * (20 + 132 + 4 + 90 + 70 + 110)


def test_rows_may_be_as_different_in_length_as_they_are(make_trainer, make_sampler):
    """Rows move to larger places while they are decoded, and an episode's history is read in one of its own."""
    trainer = make_trainer(generation={**GREEDY, "min_new_tokens": 200}, max_completion_length=200)
    contexts = [words(random.Random(length), length) for length in (1, 3, 100, 127, 128, 129, 260)]
    sampler = make_sampler(trainer)
    assert respond(sampler, contexts) == anew(trainer, contexts)


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_answer_their_own_requests_under_zero3(tiny_dir, tmp_path):
    """One has two requests, the other eleven; parameters are gathered once for all of them."""
    pytest.importorskip("deepspeed")
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    GenerationConfig(eos_token_id=ENDS, pad_token_id=VOCABULARY.index("<pad>")).save_pretrained(model)
    found = run_on_two_processes("generation_run.py", tmp_path, str(model), backend="zero3")
    assert [len(process["gathered=True"]["asked"]) for process in found] == [2, 11]
    for process in found:
        assert process["gathered=True"]["asked"] == process["gathered=True"]["anew"]
        assert "collective" in process["gathered=False"]["reason"]


# --- errors, and where it cannot be used ----------------------------------------------------------------------------


def test_errors_get_through_and_close_leaves_the_model_as_it_was(make_trainer, make_sampler):
    trainer = make_trainer()
    trainer.model.train()
    attention = trainer.model.config._attn_implementation
    sampler = make_sampler(trainer)
    sampler.submit(Request(0, [len(VOCABULARY) + 5], 0))
    with pytest.raises(IndexError):
        sampler.poll(None)
    assert all(module.training for module in trainer.model.modules())
    sampler.close()
    assert trainer.model.config._attn_implementation == attention
    assert not sampler._rows and not list(sampler._tree) and not sampler._slabs
    assert "generate" not in vars(trainer.model)


class Stubborn(LlamaForCausalLM):
    """Computes its attention in one way only, whatever its class says."""

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, **inputs):
        with use_attention(self.config, "sdpa"):
            return super().forward(**inputs)


def test_models_whose_attention_is_not_what_was_put_in_its_place_are_told_so(make_trainer, make_sampler):
    config = small_model("llama").config
    sampler = make_sampler(make_trainer(model=Stubborn(config)))
    sampler.submit(Request(0, [EOS, 40], 0))
    with pytest.raises(RuntimeError, match="Stubborn does not compute its attention .*lock_step_rollouts=True"):
        sampler.poll(None)
    tensor = torch.zeros(1, 1, 1, 8)
    for own in ({"attention_mask": tensor}, {"attention_mask": None, "softcap": 30.0}):
        with pytest.raises(NotImplementedError, match=f"Identity has a `{list(own)[-1]}` of its own"):
            attend_over_segments(nn.Identity(), tensor, tensor, tensor, **own)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}, {"max_time": 3.0}],
    ids=lambda options: next(iter(options)),
)
def test_generation_options_that_it_cannot_honour_are_named(make_trainer, options):
    trainer = make_trainer(generation={**GREEDY, **options})
    with pytest.raises(ValueError, match=next(iter(options))):
        TransformersSampler(trainer, ends_of(trainer))


def test_models_that_it_cannot_decode_are_named(make_trainer):
    mistral = make_trainer(model=small_model("mistral", sliding_window=8))
    assert "sliding window" in TransformersSampler.reason_against(mistral)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    llama = make_trainer(model=small_model("llama", rope_parameters=rope, max_position_embeddings=64))
    assert "longest context of a batch" in TransformersSampler.reason_against(llama)


def test_other_backends_and_overridden_methods_stay_in_force(make_trainer):
    trainer = make_trainer()
    assert TransformersSampler.reason_against(trainer) is None
    trainer.use_transformers_continuous_batching = True
    assert "continuous batching" in TransformersSampler.reason_against(trainer)
    trainer.use_transformers_continuous_batching, trainer.use_vllm = False, True
    assert "vLLM" in TransformersSampler.reason_against(trainer)
    trainer.use_vllm = False

    class Mine(GRPOTrainer):
        def _generate_single_turn(self, *args, **kwargs):
            return super()._generate_single_turn(*args, **kwargs)

    trainer.__class__ = Mine
    assert "`_generate_single_turn` of Mine" in TransformersSampler.reason_against(trainer)
    trainer.__class__ = GRPOTrainer
    trainer._generate_single_turn = lambda *args: None
    assert "`_generate_single_turn`" in TransformersSampler.reason_against(trainer)
    del trainer._generate_single_turn
    trainer.model.generate = lambda **inputs: None
    assert "`generate`" in TransformersSampler.reason_against(trainer)
