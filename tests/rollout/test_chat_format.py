"""The chat format: what is remembered of renderings, and how much of a context the parser needs."""

import itertools
import random
import re
from types import SimpleNamespace

import pytest
from byte_tokenizer import TEMPLATES, byte_tokenizer
from talk import TOOLS, result, user
from tool_environments import Counter
from trl.chat_template_utils import parse_response

from seeupo_trl.envs import Observation
from seeupo_trl.envs.tools import RowObservation, ToolEnvironment
from seeupo_trl.rollout import chat_format
from seeupo_trl.rollout.chat_format import ChatFormat, shared_length
from seeupo_trl.rollout.observations import check_observation


def make_chat(template, tokenizer=None, **template_kwargs):
    """A chat format; of a trainer it reads nothing but these."""
    tokenizer = tokenizer or byte_tokenizer(template)
    trainer = SimpleNamespace(
        processing_class=tokenizer, eos_token_ids=[tokenizer.eos_token_id], chat_template_kwargs=template_kwargs
    )
    return ChatFormat(trainer)


@pytest.fixture
def renderings(monkeypatch):
    """The conversations that were rendered by the tokenizer, in order."""
    rendered = []
    tokenize = ChatFormat._tokenize

    def watched(self, messages, *args, **kwargs):
        rendered.append(messages)
        return tokenize(self, messages, *args, **kwargs)

    monkeypatch.setattr(ChatFormat, "_tokenize", watched)
    return rendered


def test_the_opening_of_a_group_is_rendered_once(renderings):
    chat = make_chat("qwen2_5")
    renderings.clear()
    openings = [chat.render(Observation([user("Begin.")], tools=TOOLS)) for _ in range(4)]
    assert len(renderings) == 1 and openings[1:] == openings[:1] * 3
    openings[0].append(0)  # contexts grow in place
    assert chat.render(Observation([user("Begin.")], tools=TOOLS)) == openings[1]


def test_openings_that_differ_in_anything_are_told_apart():
    chat = make_chat("qwen2_5")
    other_tools = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": "Something else."}}]
    reordered = [{"function": TOOLS[0]["function"], "type": "function"}]
    observations = [
        Observation([user(text)], tools) for text in ("A.", "B.") for tools in (None, TOOLS, other_tools, reordered)
    ]
    for _ in range(2):
        rendered = [chat.render(observation) for observation in observations]
        assert len({tuple(token_ids) for token_ids in rendered}) == len(observations)


def test_a_reply_renders_its_own_messages_only(renderings):
    chat = make_chat("qwen2_5")
    end = chat.tokenizer.eos_token_id
    renderings.clear()
    suffixes = [chat.render_suffix([result(text)], end) for text in ("a", "b", "a")]
    assert len(renderings) == 4  # the dummy conversation once, and each with its reply
    assert suffixes[0] == suffixes[2] != suffixes[1]


def test_few_renderings_are_remembered(monkeypatch):
    monkeypatch.setattr(chat_format, "REMEMBERED_RENDERINGS", 3)
    chat = make_chat("qwen2_5")
    for number in range(9):
        chat.render(Observation([user(str(number))]))
    assert len(chat._renderings) == 3


@pytest.mark.parametrize("tail_lengths", [chat_format.TAIL_LENGTHS, (32,), (2,)])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "response",
    [
        "Hello.<|im_end|>",
        "<think>\nHm.\n</think>\n\nHello.<|im_end|>",
        '<tool_call>\n{"name": "look", "arguments": {"thing": "sky"}}\n</tool_call><|im_end|>',
        "<|im_start|>assistant\nHello",
    ],
)
def test_the_end_of_a_context_is_all_the_parser_needs(template, thinking, response, tail_lengths, monkeypatch):
    monkeypatch.setattr(chat_format, "TAIL_LENGTHS", tail_lengths)
    chat = make_chat(template, enable_thinking=thinking)
    opening = [
        user("Begin."),
        {"role": "assistant", "content": "<|im_start|>assistant\nA"},
        user("Go on, please." * 9),
    ]
    context = chat.render(Observation(opening, tools=TOOLS))
    action = chat.tokenizer(response)["input_ids"]
    expected = parse_response(chat._parser, action, prefix=context)
    message = chat.parse(action, context, TOOLS)
    message.pop("parse_error", None)
    assert message == expected
    assert (chat._tail(context) == context) == (tail_lengths == (2,))


def test_the_shared_length_is_that_of_a_loop():
    rng = random.Random(0)
    for _ in range(300):
        first, second = ([rng.randrange(2) for _ in range(rng.randrange(9))] for _ in range(2))
        common = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        assert shared_length(first, second) == len(list(common))


DATED = """\
{{ '<|im_start|>system\\nToday is ' ~ strftime_now('%d %b %Y %H:%M') ~ '<|im_end|>\\n' }}
{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_a_template_that_prints_the_time_can_be_continued_at_another_one(monkeypatch):
    """Midnight passes between two turns: Llama 3, Mistral Small 3, SmolLM3 and Granite print the date."""
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template = DATED
    times = iter([])
    apply = type(tokenizer).apply_chat_template

    def at_some_time(self, messages, **kwargs):
        text = self.chat_template.replace("strftime_now('%d %b %Y %H:%M')", repr(next(times, "24 Dec 2026 23:59")))
        return apply(self, messages, **{**kwargs, "chat_template": text})

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", at_some_time)
    trainer = SimpleNamespace(
        processing_class=tokenizer, eos_token_ids=[tokenizer.eos_token_id], chat_template_kwargs={}
    )
    chat = ChatFormat(trainer)
    expected = chat.render_suffix([user("Go on.")], tokenizer.eos_token_id)
    assert tokenizer.decode(expected) == "\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    for later in (["25 Dec 2026 00:00"] * 9, ["24 Dec 2026 23:59", "25 Dec 2026 00:00", "25 Dec 2026 00:00"]):
        times = iter(later)
        assert chat.render_suffix([user("Go on.")], tokenizer.eos_token_id) == expected


WITH_IDS = """\
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if m.tool_call_id is not defined or m.tool_call_id|length != 9 %}{{ raise_exception('no id') }}{% endif %}
{{- '<|im_start|>tool ' ~ m.tool_call_id ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}
{%- for call in m.tool_calls or [] %}
{%- if call.id is not defined or call.id|length != 9 %}{{ raise_exception('no id') }}{% endif %}
{{- call.function.name ~ call.id }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def test_calls_have_the_ids_that_the_environment_gave():
    """Mistral's templates refuse calls and results without them."""
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template = WITH_IDS
    trainer = SimpleNamespace(
        processing_class=tokenizer, eos_token_ids=[tokenizer.eos_token_id], chat_template_kwargs={}
    )
    results = [{**result(text), "tool_call_id": name} for text, name in (("a", "abcdefghi"), ("b", "123456789"))]
    suffix = ChatFormat(trainer).render_suffix(results, tokenizer.eos_token_id)
    assert tokenizer.decode(suffix) == (
        "\n<|im_start|>tool abcdefghi\na<|im_end|>\n<|im_start|>tool 123456789\nb<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", ["llama3_1", "llama3_2"])
def test_results_with_ids_may_follow_where_the_template_takes_one_call_in_a_message(template):
    chat = make_chat(template)
    results = [{**result(text), "tool_call_id": text} for text in ("first", "second")]
    suffix, alone = (chat.tokenizer.decode(chat.render_suffix(some, 0)) for some in (results, results[1:]))
    assert "first" in suffix and suffix.endswith(alone)


@pytest.mark.parametrize("ids", [{}, {"first": "1", "second": "2"}, {"first": "1"}], ids=["none", "all", "some"])
def test_results_of_one_reply_have_the_names_of_their_own_tools(ids):
    """Gemma 4's template looks for the name in the calls."""
    results = [{**result(""), "name": name} for name in ("first", "second")]
    for found in results:
        if found["name"] in ids:
            found["tool_call_id"] = ids[found["name"]]
    chat = make_chat("gemma4")
    suffix = chat.tokenizer.decode(chat.render_suffix(results, chat.tokenizer.eos_token_id))
    assert re.findall(r"response:(\w+)", suffix) == ["first", "second"]


def test_what_the_policy_writes_can_be_encoded():
    chat = make_chat("qwen2_5")
    call = '<tool_call>\n{"name": "look", "arguments": {"thing": "\\ud83d"}}\n</tool_call><|im_end|>'
    action = chat.tokenizer(call)["input_ids"]
    message = chat.parse(action, chat.render(Observation([user("Begin.")], tools=TOOLS)), TOOLS)
    assert message["tool_calls"][0]["function"]["arguments"] == {"thing": "?"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_in_parts_is_read_whatever_the_template_makes_of_lists(template):
    chat = make_chat(template)
    parts = [{"type": "text", "text": "Bring me "}, {"type": "text", "text": "the lamp."}]
    opening = [user("Begin."), {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": parts}]
    text = chat.tokenizer.decode(chat.render(Observation(opening)))
    assert "Bring me " in text and "the lamp." in text
    suffix = chat.tokenizer.decode(chat.render_suffix([opening[-1]], chat.tokenizer.eos_token_id))
    assert "Bring me " in suffix and "the lamp." in suffix
    assert parts[0]["text"] == "Bring me "  # the environment's message is left as it was


def with_template(text):
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template = text
    return tokenizer


CHATML = """\
{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_message_whose_role_the_template_does_not_know_is_refused(template):
    chat = make_chat(template)
    unknown = {"role": "environment", "content": "Look."}
    for _ in range(2):
        with pytest.raises(ValueError, match="shows nothing of a message with the role 'environment' after"):
            chat.render_suffix([user("Go on."), unknown], chat.tokenizer.eos_token_id)
        with pytest.raises(ValueError, match="shows nothing of a message with the role 'environment'. Give"):
            chat.render(Observation([unknown, user("Begin.")]))
    everywhere = [{"role": "system", "content": ""}, user(""), result("")]
    chat.render(Observation(everywhere))
    chat.render_suffix(everywhere[1:], chat.tokenizer.eos_token_id)
    make_chat("", with_template(CHATML)).render(Observation([unknown]))  # knows all roles


def opening_of_row(*messages):
    return check_observation(ToolEnvironment(Counter).reset(prompt=list(messages), start=3))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_message_of_a_rows_own_prompt_is_left_out_with_one_warning_where_the_template_does_not_know_its_role(
    template, caplog
):
    chat = make_chat(template)
    unknown = {"role": "environment", "content": "Look."}
    for _ in range(2):
        opening = opening_of_row(unknown, user("Begin."))
        assert chat.render(opening) == chat.render(opening_of_row(user("Begin.")))
    (warning,) = caplog.messages
    assert "the role 'environment' in the dataset's `prompt`" in warning


def test_a_content_that_is_no_text_is_the_rows_where_its_prompt_has_it():
    number = {"role": "user", "content": 5}
    chat = make_chat("", with_template(CHATML))
    assert "user\n5<|im_end|>" in chat.tokenizer.decode(chat.render(RowObservation([number])))
    with pytest.raises(ValueError, match="cannot render the dataset's `prompt`: can only concatenate str"):
        make_chat("qwen2_5").render(opening_of_row(number, user("Begin.")))
    with pytest.raises(TypeError, match="content of a message must be a text"):
        check_observation(Observation([number]))


def test_tools_that_the_template_does_not_show_are_refused():
    chat = make_chat("", with_template(CHATML))
    chat.render(Observation([user("Begin.")]))
    with pytest.raises(ValueError, match="shows nothing of `Observation.tools`"):
        chat.render(Observation([user("Begin.")], TOOLS))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_in_parts_may_have_tools(template):
    opening = [{"role": "user", "content": [{"type": "text", "text": "Begin."}]}]
    chat = make_chat(template)
    assert "look" in chat.tokenizer.decode(chat.render(Observation(opening, TOOLS)))


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        make_chat("", with_template(None))


def test_reasoning_that_does_not_end_is_without_the_end_of_the_message():
    chat = make_chat("qwen3")
    action = chat.tokenizer("<think>\nabc<|im_end|>")["input_ids"]
    message = chat.parse(action, chat.render(Observation([user("Begin.")])), None)
    assert message["reasoning_content"] == "abc" and message["content"] == ""


ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("template", "response", "content"),
    [
        ("gptoss", f"{ANALYSIS}abc<|end|><|start|>assistant<|channel|>final<|message|>d<|im_end|>", "d"),
        ("gptoss", f"{ANALYSIS}abc<|im_end|>", ""),
        ("lfm2_2_5_v2", "<think>abc</think>d<|im_end|>", "d"),
        ("lfm2_2_5", "<think>abc<|im_end|>", ""),
    ],
    ids=["gpt-oss", "gpt-oss, no end", "LFM2.5", "LFM2.5, no end"],
)
def test_reasoning_has_one_name_beside_that_of_the_template(template, response, content):
    chat = make_chat(template)
    context = chat.render(Observation([user("Begin.")]))
    message = chat.parse(chat.tokenizer(response)["input_ids"], context, None)
    assert message["reasoning_content"] == message["thinking"] == "abc" and message["content"] == content
