"""Generation with keys and values kept from turn to turn: the tokens of encoding every turn anew, at a lower cost."""

import gc
import random
import shutil
import weakref

import pytest
import torch
from generating import ENDS, EOS, GREEDY, make_generating_trainer, small_config, words
from launching import run_on_two_processes
from peft import LoraConfig
from tiny import VOCABULARY
from transformers import AutoModelForCausalLM, GenerationConfig

from seeupo_trl.rollout import key_values
from seeupo_trl.rollout.cached_generation import CachedGeneration, reason_against_cache


@pytest.fixture
def make_trainer(tiny_dir, tmp_path):
    def make(model=None, dtype=torch.float64, **options):
        return make_generating_trainer(tiny_dir, tmp_path, dtype, model, **options)

    return make


def reencode(trainer):
    """Generation as TRL does it, every turn from its first token."""
    return lambda keys, contexts: trainer._generate_single_turn(contexts, None, {}, 1)[0]


class Counter:
    """Tokens that the forward passes of a model were given, padding included, and their number."""

    def __init__(self, model):
        self.tokens = self.passes = 0
        self.shapes = []
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].numel()
        self.passes += 1
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def play(generate, prompts, lengths, rewrite=lambda context, response: context + response, seed=0, forget=None):
    """
    Episodes of the given numbers of turns, all generations in one list. Every turn, what `rewrite` makes of context
    and response is followed by a few tokens of an environment, as many as its random numbers say.
    """
    torch.manual_seed(seed)
    rngs = [random.Random(f"{seed} {key}") for key in range(len(prompts))]
    contexts, generations = dict(enumerate(prompts)), []
    for turn in range(max(lengths)):
        keys = [key for key in contexts if turn < lengths[key]]
        if forget is not None:
            forget(set(contexts) - set(keys))
        contexts = {key: contexts[key] for key in keys}
        responses = generate(keys, [contexts[key] for key in keys])
        for key, response in zip(keys, responses, strict=True):
            generations.append((turn, key, contexts[key], response))
            contexts[key] = rewrite(contexts[key], response) + words(rngs[key], rngs[key].choice([1, 2, 7, 12]))
    return generations


def groups(seed=1, lengths=(21, 33, 5)):
    """Three prompts of different length, each for two episodes."""
    rng = random.Random(seed)
    return [prompt for length in lengths for prompt in [words(rng, length)] * 2]


LENGTHS = [4, 1, 3, 5, 2, 4]


def without_first_half(context, response):
    """What is left of a response whose reasoning is stripped from the history."""
    return context + response[len(response) // 2 :]


def without_memory(context, response):
    """A history of which only the beginning stays."""
    return context[:4] + response


# --- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rewrite", [None, without_first_half, without_memory])
def test_greedy_responses_are_those_of_encoding_every_turn_anew(make_trainer, dtype, rewrite):
    trainer = make_trainer(dtype=dtype)
    options = {} if rewrite is None else {"rewrite": rewrite}
    expected = play(reencode(trainer), groups(), LENGTHS, **options)
    cached = CachedGeneration(trainer)
    assert play(cached.generate, groups(), LENGTHS, forget=cached.forget, **options) == expected
    response_lengths = {len(response) for _, _, _, response in expected}
    assert len(response_lengths) > 2 and max(response_lengths) == 9


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"min_p": 0.1, "repetition_penalty": 1.3},
        {"generation_kwargs": {"forced_eos_token_id": EOS, "no_repeat_ngram_size": 2}},
        {"generation_kwargs": {"min_new_tokens": 3, "sequence_bias": [[[70], 4.0]]}},
        {"generation_kwargs": {"eos_token_id": [EOS, 70, 71]}},
        {"generation_kwargs": {"max_new_tokens": 1}},
    ],
)
def test_the_same_seed_samples_the_same_responses(make_trainer, settings):
    settings = dict(settings)
    trainer = make_trainer(generation=settings.pop("generation_kwargs", None), **settings)
    expected = play(reencode(trainer), groups(), LENGTHS)
    cached = CachedGeneration(trainer)
    assert play(cached.generate, groups(), LENGTHS, forget=cached.forget) == expected
    assert play(reencode(trainer), groups(), LENGTHS, seed=1) != expected


def test_in_float32_sampling_agrees_too(make_trainer):
    trainer = make_trainer(dtype=torch.float32, generation=None)
    assert play(CachedGeneration(trainer).generate, groups(), LENGTHS) == play(reencode(trainer), groups(), LENGTHS)


def test_with_lora(make_trainer):
    trainer = make_trainer(dtype=torch.float32, peft_config=LoraConfig(r=4, init_lora_weights=False))
    expected = play(reencode(trainer), groups(), LENGTHS)
    assert play(CachedGeneration(trainer).generate, groups(), LENGTHS) == expected
    with trainer.model.disable_adapter():
        assert play(reencode(trainer), groups(), LENGTHS) != expected


def test_with_gradient_checkpointing(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable()
    counter = Counter(trainer.model)
    expected = play(reencode(trainer), groups(), LENGTHS)
    before = counter.tokens
    assert play(CachedGeneration(trainer).generate, groups(), LENGTHS) == expected
    assert counter.tokens - before < before / 2
    assert trainer.model.is_gradient_checkpointing and trainer.model.training


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_with_other_models_of_full_attention(make_trainer, model_type):
    config = small_config(model_type, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    torch.manual_seed(0)
    trainer = make_trainer(model=AutoModelForCausalLM.from_config(config).eval())
    trainer.model.eval()
    expected = play(reencode(trainer), groups(), LENGTHS, rewrite=without_first_half)
    assert play(CachedGeneration(trainer).generate, groups(), LENGTHS, rewrite=without_first_half) == expected


def test_contexts_that_are_known_in_full_or_in_part_or_not_at_all(make_trainer):
    """The same context again, a shorter one, one that continues another episode's, one of a single token."""
    trainer = make_trainer()
    cached = CachedGeneration(trainer)
    rng = random.Random(3)
    first, other = words(rng, 30), words(rng, 17)
    (response,) = cached.generate([0], [first])
    rounds = [
        ([0, 1], [first, other]),
        ([0, 1], [first + response, other]),
        ([0, 2], [first[:11], first + response + other]),
        ([2, 0], [first[:1], first[:12]]),
        ([None, None, 1], [[EOS], [EOS], other + [EOS]]),
        ([5], [[EOS]]),
    ]
    for keys, contexts in rounds:
        assert cached.generate(keys, contexts) == reencode(trainer)(keys, contexts)


def test_an_episode_whose_environment_takes_longer_joins_a_later_batch(make_trainer):
    trainer = make_trainer()
    prompts = groups()[:4]
    expected = {(turn, key): r for turn, key, _, r in play(reencode(trainer), prompts, [3] * 4)}
    cached = CachedGeneration(trainer)
    rngs = [random.Random(f"0 {key}") for key in range(4)]
    contexts, turns = list(map(list, prompts)), [0] * 4
    for keys in ([0, 1, 2], [1, 3], [0, 3, 1], [2], [3, 2, 0]):
        for key, response in zip(keys, cached.generate(keys, [contexts[key] for key in keys]), strict=True):
            assert response == expected[turns[key], key]
            turns[key] += 1
            contexts[key] = contexts[key] + response + words(rngs[key], rngs[key].choice([1, 2, 7, 12]))


def test_contexts_are_padded_to_the_multiple_that_was_asked_for(make_trainer):
    trainer = make_trainer(generation=None, pad_to_multiple_of=16)
    expected = play(reencode(trainer), groups(), LENGTHS)
    assert play(CachedGeneration(trainer).generate, groups(), LENGTHS) == expected
    cached = CachedGeneration(trainer)
    assert len(cached.generate([0, 1], [[EOS], [EOS]])) == 2


# --- at a lower cost ------------------------------------------------------------------------------------------------


def test_the_prompt_of_a_group_is_computed_once(make_trainer):
    trainer = make_trainer()
    counter = Counter(trainer.model)
    prompt = words(random.Random(0), 200)
    CachedGeneration(trainer).generate(list(range(8)), [prompt] * 8)
    assert counter.shapes[0] == (1, 199) and set(counter.shapes[1:]) == {(8, 1)}


def test_what_the_prompts_of_different_tasks_begin_with_is_computed_once(make_trainer):
    trainer = make_trainer()
    rng = random.Random(0)
    documents, others = words(rng, 150), words(rng, 120)
    prompts = [documents + words(rng, 20) for _ in range(3)] + [others + words(rng, 9) for _ in range(2)]
    prompts = [prompt for prompt in prompts for _ in range(2)]
    expected = reencode(trainer)(None, prompts)
    counter = Counter(trainer.model)
    assert CachedGeneration(trainer).generate(list(range(10)), prompts) == expected
    prefill = counter.shapes[: counter.shapes.index((10, 1))]
    assert prefill == [(2, 150), (3, 19), (2, 8)]


def test_a_turn_computes_its_new_tokens_only(make_trainer):
    trainer = make_trainer()
    counter = Counter(trainer.model)
    cached = CachedGeneration(trainer)
    rng = random.Random(0)
    contexts = [words(rng, 150), words(rng, 170)]
    for _ in range(3):
        counter.shapes.clear()
        responses = cached.generate([0, 1], contexts)
        steps = max(map(len, responses))
        new = [context + response + words(rng, 10) for context, response in zip(contexts, responses, strict=True)]
        # the prompts first; in later turns the last token of each response, which was never an input, and the reply
        assert counter.shapes[1:] == [(2, 1)] * steps
        contexts = new
    assert counter.shapes[0][1] <= 10 + 9


def test_rows_of_very_different_length_are_not_padded_to_one_another(make_trainer):
    trainer = make_trainer()
    counter = Counter(trainer.model)
    rng = random.Random(0)
    lengths = [300, 160, 140, 40, 25, 3]
    CachedGeneration(trainer).generate(list(range(6)), [words(rng, length) for length in lengths])
    prefill = counter.shapes[: counter.shapes.index((6, 1))]
    assert prefill == [(2, 299), (1, 139), (2, 39), (1, 2)]


def test_forward_passes_are_bounded_in_size(make_trainer, monkeypatch):
    monkeypatch.setattr(key_values, "MAX_TOKENS_PER_PASS", 250)
    trainer = make_trainer()
    expected = reencode(trainer)(None, groups(lengths=(300, 110, 100, 90)))
    counter = Counter(trainer.model)
    assert CachedGeneration(trainer).generate(list(range(8)), groups(lengths=(300, 110, 100, 90))) == expected
    assert counter.shapes[:3] == [(1, 299), (2, 109), (1, 89)]


def test_what_is_kept_has_no_padding_and_goes_with_its_episode(make_trainer):
    trainer = make_trainer()
    cached = CachedGeneration(trainer)
    prompts = groups()
    responses = cached.generate(list(range(6)), prompts)
    longest = max(map(len, responses))
    sizes, references = [], []
    for key, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        keys, values = cached._sequences[key].layers[0]
        tokens = len(prompt) + min(len(response), longest - 1)
        assert keys.shape == values.shape == (2, tokens, 8)
        sizes.append((keys.untyped_storage().nbytes(), tokens * 2 * 8 * 8))
        references.append(weakref.ref(keys))
        del keys, values
    assert all(size == wanted for size, wanted in sizes)
    cached.forget([0, 3, "unknown"])
    gc.collect()
    assert [reference() is None for reference in references] == [True, False, False, True, False, False]


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_with_unequal_work_run_equally_many_forward_passes_under_zero3(tiny_dir, tmp_path):
    """Without the parameters gathered for generation every forward pass is a collective operation, and hangs alone."""
    pytest.importorskip("deepspeed")
    model = tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    GenerationConfig(eos_token_id=ENDS, pad_token_id=VOCABULARY.index("<pad>")).save_pretrained(model)
    first, second = run_on_two_processes("generation_run.py", tmp_path, str(model), backend="zero3")
    for found in (first, second):
        for played in found.values():
            assert played["kept"] == played["anew"]
    assert [len(found["gathered=False"]["kept"]) for found in (first, second)] == [2, 11]


# --- where it cannot be used ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 16},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_generation_options_with_a_cache_of_their_own_are_left_to_trl(make_trainer, options):
    trainer = make_trainer(generation={**GREEDY, **options})
    assert next(iter(options)) in reason_against_cache(trainer)
    with pytest.raises(ValueError, match=next(iter(options))):
        CachedGeneration(trainer)


def test_models_with_sliding_windows_are_left_to_trl_and_the_log_says_so_once(make_trainer, caplog):
    trainer = make_trainer(model=AutoModelForCausalLM.from_config(small_config("mistral", sliding_window=8)))
    assert not CachedGeneration.supports(trainer) and not CachedGeneration.supports(trainer)
    assert sum("sliding window" in record.message for record in caplog.records) == 1


def test_other_backends_are_left_to_trl(make_trainer, caplog):
    trainer = make_trainer()
    assert CachedGeneration.supports(trainer)
    trainer.use_vllm = True
    assert not CachedGeneration.supports(trainer) and not caplog.records
    trainer.use_vllm, trainer.use_transformers_continuous_batching = False, True
    assert not CachedGeneration.supports(trainer)


def test_trainers_that_generate_by_other_means_keep_nothing(make_trainer):
    trainer = make_trainer()
    trainer._generate_single_turn = lambda contexts, *args: ([[40, EOS] for _ in contexts], None)
    cached = CachedGeneration(trainer)
    assert cached.generate([0, 1], [[30], [31, 32]]) == [[40, EOS]] * 2


def test_a_trainer_that_generates_in_parts_is_told_so(make_trainer):
    trainer = make_trainer()
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda contexts, *args: (
        [generate([context], *args)[0][0] for context in contexts],
        None,
    )
    with pytest.raises(RuntimeError, match="calls `model.generate` once, for all 2 contexts"):
        CachedGeneration(trainer).generate([0, 1], [[30], [31, 32]])


def test_the_models_own_generate_is_back_afterwards_also_after_an_error(make_trainer):
    trainer = make_trainer()
    cached = CachedGeneration(trainer)
    cached.generate([0], [[EOS]])
    with pytest.raises(ValueError):
        cached.generate([0, 1], [[EOS]])
    assert "generate" not in vars(trainer.model)
