"""BFCL: whatever a model passes as arguments, a call ends soon, in text."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


pytest.importorskip("bfcl_eval", reason="BFCL's package is optional")

from seeupo_trl.envs.bfcl import MAX_RESULT_CHARACTERS, BfclEnvironment
from seeupo_trl.envs.bfcl.checks import check_trajectory
from seeupo_trl.envs.bfcl.data import load_entries, load_function_docs
from seeupo_trl.envs.bfcl.services import Services, service_class


ANSWER = {"role": "assistant", "content": "Done."}
CLASSES = sorted({name for entry in load_entries("multi_turn_base").values() for name in entry["involved_classes"]})
SECONDS_A_CALL = 5.0  # measured: under 0.5


def task_with(class_name, category="multi_turn_base"):
    return next(e for e in load_entries(category).values() if class_name in e["involved_classes"])


def timed(services, name, arguments):
    start = time.thread_time()
    result = services.call(name, arguments)
    assert time.thread_time() - start < SECONDS_A_CALL, (name, str(arguments)[:200])
    assert isinstance(result, str)
    return result


def nested(depth, value=None):
    for _ in range(depth):
        value = [value]
    return value


def cyclic():
    value = []
    value.append(value)
    return value


NASTY = [
    10**400, -(10**4299), 10**5000, -1, 10**7, 10**9, 2**63, 1e308, -1e308, 5e-324, float("inf"), float("nan"),
    "1e999999999", "-1e999999999", "1e-999999999", "1/3", "1+1j", "9" * 4000, "9" * 20_000, "1" * 50_000 + "xj",
    "100000000", "1_000_000", "x" * 50_000, "x (" * 5000, "\ud800", "\x00", "'\"\\\n", "", ".", "..", "/",
    nested(150), nested(300), nested(3000), cyclic(), [1.5] * 5000, ["x"] * 5000, [[]] * 3, [10**4000] * 50,
    {str(i): i for i in range(1000)}, {"a": {"b": nested(50)}}, {1: 2}, {"self": 1}, True, None, object(),
    b"x", (1, 2),
]  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("class_name", CLASSES)
def test_every_argument_of_every_function_may_be_anything(class_name):
    entry = task_with(class_name, "multi_turn_long_context")
    services = Services(entry)
    for doc in load_function_docs(class_name):
        names = list(doc["parameters"]["properties"])
        for value in NASTY:
            timed(services, doc["name"], dict.fromkeys(names, value))
        for changed in names:
            plain = {"string": "a", "integer": 3, "float": 2.5, "boolean": True, "array": ["a"], "dict": {}}
            for value in NASTY[:: 1 if class_name == "MathAPI" else 4]:
                types = {name: schema["type"] for name, schema in doc["parameters"]["properties"].items()}
                usual = {name: plain.get(kind, "a") for name, kind in types.items()}
                timed(services, doc["name"], {**usual, changed: value})


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.integers(10**15, 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["a", "b", "temp", "document", "NVDA", "USR001", ".", "..", "driver", "1e400", "10000"]),
    st.sampled_from([10**300, "9" * 3000, "1e999999999", "\udfff"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def call_sequences(draw, class_name):
    """Calls that build on one another: small names make them meet."""
    docs = load_function_docs(class_name)
    calls = []
    for _ in range(draw(st.integers(1, 12))):
        doc = draw(st.sampled_from(docs))
        arguments = {}
        for name, schema in doc["parameters"]["properties"].items():
            usual = {
                "string": st.sampled_from(["a", "b", "c", ".", "temp", "document"]),
                "integer": st.integers(-5, 5000),
                "float": st.floats(-1e6, 1e6) | st.integers(-5, 5000),
                "boolean": st.booleans(),
            }.get(schema["type"], st.lists(st.sampled_from(["a", "b", "driver", 1.5, 7]), max_size=5))
            arguments[name] = draw(st.one_of(usual, usual, usual, values))
        if draw(st.integers(0, 9)) == 0:
            arguments[draw(st.text(max_size=5))] = draw(values)
        calls.append((doc["name"], arguments))
    return calls


@pytest.mark.timeout(300)
@pytest.mark.parametrize("class_name", CLASSES)
def test_sequences_of_calls_end_soon_and_leave_a_state_that_can_be_checked(class_name):
    task_id = task_with(class_name)["id"]
    turns = len(load_entries("multi_turn_base")[task_id]["ground_truth"])

    @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(call_sequences(class_name))
    def play(calls):
        environment = BfclEnvironment()
        environment.reset(id=task_id)
        start = time.thread_time()
        tool_calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
        results = environment.step({"role": "assistant", "content": "", "tool_calls": tool_calls}).messages
        assert len(results) == len(calls)
        for result in results:
            result["content"].encode("utf-8")
        for _ in range(turns):
            last = environment.step(ANSWER)
        assert last.terminated and not last.info["success"]
        assert check_trajectory(task_id, [[calls]] + [[]] * (turns - 1)) is not None
        assert time.thread_time() - start < SECONDS_A_CALL

    play()


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files():
    return Services(task_with("GorillaFileSystem"))


@pytest.fixture
def official_files():
    """The services of the checks, where a directory may contain itself."""
    return Services(task_with("GorillaFileSystem"), circles=True)


def test_a_copy_of_a_directory_into_itself_ends_in_an_error(files):
    timed(files, "mkdir", {"dir_name": "a"})
    before = timed(files, "find", {})
    assert timed(files, "cp", {"source": "a", "destination": "a"}).startswith("Error during execution: cp: 'a' cannot")
    assert timed(files, "find", {}) == before
    timed(files, "mkdir", {"dir_name": "."})  # now officially a name of the current directory
    for function in ("cp", "mv"):
        assert "into itself" in timed(files, function, {"source": ".", "destination": "b"})
    assert timed(files, "cp", {"source": "a", "destination": "b"}) == """{"result": "'a' copied to 'b'"}"""


def test_a_directory_that_copies_share_cannot_be_put_into_itself(files):
    for call in ("mkdir a", "cd a", "mkdir s", "cd ..", "cp a b", "mv b a", "cd a"):
        name, *words = call.split()
        keys = {"mkdir": ["dir_name"], "cd": ["folder"]}.get(name, ["source", "destination"])
        assert "error" not in timed(files, name, dict(zip(keys, words, strict=True)))
    for function in ("cp", "mv"):  # b/s is s
        assert "into itself" in timed(files, function, {"source": "b", "destination": "s"})
    assert "matches" in timed(files, "find", {"path": "/"})


def test_a_search_in_a_directory_that_contains_itself_ends_in_an_error(official_files):
    files = official_files
    name = "long name " * 1000
    timed(files, "mkdir", {"dir_name": name})
    assert "copied" in timed(files, "cp", {"source": name, "destination": name})
    for function in ("find", "du"):
        assert timed(files, function, {}).startswith("Error during execution: maximum recursion depth exceeded")
    assert timed(files, "rm", {"file_name": name}).endswith('removed"}')
    assert "matches" in timed(files, "find", {}) and "bytes" in timed(files, "du", {})


def test_a_search_in_copies_of_copies_of_copies_ends_in_an_error(files):
    """Each round doubles the tree: 60 rounds would take longer than the universe exists."""
    timed(files, "mkdir", {"dir_name": "a0"})
    for i in range(60):
        timed(files, "mkdir", {"dir_name": f"a{i + 1}"})
        timed(files, "cp", {"source": f"a{i}", "destination": "other"})
        timed(files, "mv", {"source": f"a{i}", "destination": f"a{i + 1}"})
        timed(files, "mv", {"source": "other", "destination": f"a{i + 1}"})
    for function in ("find", "du"):
        assert "maximum recursion depth" in timed(files, function, {})
    assert "current_directory_content" in timed(files, "ls", {})


def test_what_is_copied_in_a_circle_and_removed_again_does_no_harm():
    task_id = "multi_turn_base_0"
    environment = BfclEnvironment()
    environment.reset(id=task_id)
    truth, turns = [], len(load_entries("multi_turn_base")[task_id]["ground_truth"])
    circle = [
        ("cd", {"folder": "document"}),
        ("mkdir", {"dir_name": "x"}),
        ("cp", {"source": "x", "destination": "x"}),
        ("rm", {"file_name": "x"}),
        ("cd", {"folder": ".."}),
    ]
    for turn in range(turns):
        calls = environment.ground_truth_calls()
        steps = [[(c["function"]["name"], c["function"]["arguments"]) for c in calls]]
        truth.append([circle, *steps] if turn == 0 else steps)
        environment.step(ANSWER)
    assert check_trajectory(task_id, truth) is None


# --- texts ----------------------------------------------------------------------------------------------------------


def test_long_results_are_shown_cut_and_checked_whole():
    environment = BfclEnvironment()
    environment.reset(id="multi_turn_base_0")
    text = "x" * (MAX_RESULT_CHARACTERS + 1000)
    call = {"type": "function", "function": {"name": "echo", "arguments": {"content": text}}}
    (message,) = environment.step({"role": "assistant", "content": "", "tool_calls": [call]}).messages
    assert len(message["content"]) < MAX_RESULT_CHARACTERS + 100 and "more characters" in message["content"]


def test_results_can_be_encoded_whatever_the_model_wrote():
    environment = BfclEnvironment()
    environment.reset(id="multi_turn_base_0")
    calls = [("\ud800", {}), ("cd", {"\udfff": 1}), ("cd", {"folder": "\ud83d"}), ("cat", {"file_name": "\udc00"})]
    calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    for message in environment.step({"role": "assistant", "content": "", "tool_calls": calls}).messages:
        json.dumps(message, ensure_ascii=False).encode("utf-8")


def test_numbers_that_are_not_finite_are_refused_as_by_the_official_executor():
    services = Services(task_with("MathAPI"))
    for value in (float("inf"), float("-inf"), float("nan")):
        name = str(value).removeprefix("-")
        assert services.call("add", {"a": 1, "b": value}) == f"Error during execution: name '{name}' is not defined"
        assert "is not defined" in services.call("mean", {"numbers": [1, value]})


@pytest.mark.parametrize("depth", [198, 199, 200])
def test_nesting_is_limited_where_python_cannot_parse_it(depth):
    source = f"f(x={nested(depth)!r})"
    try:
        eval(source, {"f": lambda x: None})
        parses = True
    except (SyntaxError, MemoryError):
        parses = False
    services = Services(task_with("VehicleControlAPI"))
    assert services.call("display_log", {"messages": nested(depth)}).startswith("Error during") is not parses


def test_the_packages_modules_stay_as_they_were():
    """Default arguments and long-context dicts of the package are copied for each episode."""
    services = Services(load_entries("multi_turn_base")["multi_turn_base_147"])
    services.call("authenticate_twitter", {"username": "x", "password": "y"})
    services.instances["TwitterAPI"].authenticated = True
    tweet = json.loads(services.call("post_tweet", {"content": "hello"}))
    services.call("mention", {"tweet_id": tweet["id"], "mentioned_usernames": ["@a"]})
    assert '"mentions": ["@a"]' in services.call("get_tweet", {"tweet_id": tweet["id"]})
    assert service_class("TwitterAPI").post_tweet.__defaults__ == ([], [])
    assert json.loads(services.call("post_tweet", {"content": "again"}))["mentions"] == ["@a"]  # as officially
    fresh = Services(load_entries("multi_turn_base")["multi_turn_base_147"])
    fresh.instances["TwitterAPI"].authenticated = True
    assert json.loads(fresh.call("post_tweet", {"content": "hello"}))["mentions"] == []
