"""The page of saved trajectories, in a real browser: what it shows, how it filters, and that no text can run in it."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Browser
from saved_trajectories import WORDS, make_log
from tiny import tiny_tokenizer
from viewed_run import HOSTILE, Verbatim, filter_by, needs_browser, outcome, page_data, render

from seeupo_trl import Trajectory, Turn
from seeupo_trl.trajectory_log import SCHEMA, TrajectoryLog
from seeupo_trl.update.metrics import TurnUpdate
from seeupo_trl.view.__main__ import main
from seeupo_trl.view.command import write_page
from seeupo_trl.view.run import read_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Two iterations and an evaluation: an agent that thinks, calls and reads; trained on in the second iteration."""
    output = tmp_path_factory.mktemp("run")
    log = TrajectoryLog(output, tiny_tokenizer())
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"n": 12345678901234567890}}}
    messages = [
        {"role": "assistant", "content": "", "reasoning_content": "let me think of w7", "tool_calls": [call]},
        {"role": "tool", "name": "look_up", "content": "nothing found"},
        {"role": "assistant", "content": "the answer is w8"},
    ]
    first = Turn(WORDS[:5], WORDS[5:8], [-0.5, -0.25, None])
    second = Turn(WORDS[:10], WORDS[10:12], reward=0.75)
    for iteration in (1, 2):
        trajectories = [Trajectory([first, second], messages=messages, info={"failure": None}), Trajectory([first])]
        outcomes = [
            outcome(0, "lamp", 1.0, success=True, turns=2),
            outcome(1, "lamp", float(iteration) / 4, "max_turns", False),
        ]
        updates = {(0, 1): TurnUpdate(1.25, True, -0.3, 1.2), (0, 2): TurnUpdate(1.0, False, -0.25, 1.0)}
        log.add(outcomes, trajectories, updates if iteration == 2 else None)
        log.write("train", iteration)
    log.add([outcome(0, "door", None, "env_error", turns=0)], [Trajectory([], info={"error": "the key broke"})])
    log.write("eval_doors", 2)
    return output


@needs_browser
def test_page_shows_filters_and_moves(run_dir, tmp_path):
    page = render(run_dir, tmp_path / "page.html")
    with Browser() as browser:
        browser.open(page)
        assert len(filter_by(browser)) == 5
        assert len(filter_by(browser, task="DOO")) == 1
        assert "the key broke" in browser.run("detail.innerText")
        assert "before the policy wrote anything" in browser.run("detail.innerText")
        assert len(filter_by(browser, task="", stop="max_turns")) == 2
        assert len(filter_by(browser, stop="", low="0.3")) == 3
        assert len(filter_by(browser, high="0.6")) == 1
        shown = filter_by(browser, low="", high="", success="false", iteration="1")
        assert shown == [["lamp", "0.250", "train 1 \u00b7 group 0", "1 turn, max turns"]]
        assert len(filter_by(browser, success="", iteration="", split="eval_doors")) == 1
        assert len(filter_by(browser, split="", search="NOTHING found")) == 2
        assert "nothing found" in browser.run("[...document.querySelectorAll('mark')].map(m => m.textContent)")
        assert filter_by(browser, search="nowhere") == []
        assert "No trajectory matches" in browser.run("detail.innerText")
        browser.click("button[type=reset]")
        browser.run("new Promise(done => setTimeout(done, 50))")
        rewards = [reward for _, reward, *_ in filter_by(browser, sort="reward_up")]
        assert rewards == ["-", "0.250", "0.500", "1", "1"]
        filter_by(browser, sort="", split="train", iteration="2")

        # the first trajectory of iteration 2: both turns with what the update saw
        text = browser.run("detail.innerText")
        for expected in ("let me think of w7", "look_up", '{"n": 12345678901234567890}', "nothing found"):
            assert expected in text
        for expected in ("the answer is w8", "ratio 1.2500, clipped", "M -0.300 (1.2000 A)", "log-prob -0.375"):
            assert expected in text
        assert "Context: 5 tokens" in text
        headings = browser.run("[...detail.querySelectorAll('section.turn h3')].map(h => h.innerText)")
        assert ["reward" in heading for heading in headings] == [False, True] and "reward 0.750" in headings[1]
        assert browser.run("[...detail.querySelectorAll('th')].map(h => h.innerText)").count("Reward") == 1
        assert "Context: 2 new tokens after 8 shared with turn 1" in text
        assert "w8 w9" not in text  # folded
        browser.run("document.querySelectorAll('section.turn[data-turn] summary')[3].click()")
        assert browser.run("detail.querySelectorAll('details[open] pre').length") >= 2

        # without an update there is no ratio; the keys move through the list
        browser.press("ArrowDown")
        assert browser.run("list.querySelector('[aria-current]').innerText.includes('max turns')")
        assert "ratio 1" not in browser.run("detail.innerText")
        browser.press("ArrowDown")
        browser.press("k")
        assert browser.run("shown.indexOf(current)") == 0
        browser.press("e")
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert browser.run("[...detail.querySelectorAll('details')].every(d => d.open && d.children.length === 2)")
        browser.press("/")
        assert browser.run("document.activeElement.id") == "search"
        browser.click("#list li:nth-child(2)")
        assert browser.run("shown.indexOf(current)") == 1
        assert browser.names("Runtime.exceptionThrown") == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_follows_the_colour_scheme(run_dir, tmp_path, dark):
    page = render(run_dir, tmp_path / "page.html")
    with Browser(dark=dark) as browser:
        browser.open(page)
        channels = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (max(channels) < 60) == dark


@needs_browser
def test_no_text_of_a_model_or_an_environment_runs(tmp_path):
    log = TrajectoryLog(tmp_path, Verbatim(HOSTILE))
    trajectories, outcomes = [], []
    for index, text in enumerate(HOSTILE):
        call = {"function": {"name": text, "arguments": {text: [text]}}}
        message = {"role": "assistant", "content": text, "reasoning_content": text, "tool_calls": [call, text, 3]}
        answers = [{"role": text, "name": text, "content": text}, {"role": "tool", "content": [{"text": text}]}]
        turns = [Turn([index], [index]), Turn([index, index], [index])]
        trajectories.append(Trajectory(turns, messages=[message, *answers, message], info={text: text}))
        outcomes.append(outcome(index, text, 1.0, text, category=text, turns=2))
    log.add(outcomes, trajectories)
    log.write("eval_</script>", 0)
    run_dir = tmp_path / "<script>window.harmed = 1<" / "@data@"
    run_dir.mkdir(parents=True)
    (tmp_path / "trajectories").rename(run_dir / "trajectories")
    page = render(run_dir, tmp_path / "page.html")
    source = page.read_bytes()
    assert source.count(b"<script") == 2
    assert source.isascii() or source.decode("utf-8")

    with Browser() as browser:
        browser.open(page)
        assert browser.run("list.children.length") == len(HOSTILE)
        for position in range(len(HOSTILE)):
            browser.run(f"select(shown[{position}])")
            browser.press("e")
            browser.run("new Promise(done => setTimeout(done, 50))")
            shown = browser.run("detail.innerText")
            assert shown.count(browser.run("visible(current.task)").split("\u2028")[0].strip()) >= 10
            assert browser.run("detail.querySelectorAll('script, img, svg, iframe, a[href^=javascript]').length") == 0
        filter_by(browser, search="</SCRIPT>")
        assert browser.run("document.querySelectorAll('mark').length") > 0
        assert browser.run("typeof window.harmed") == "undefined"
        # the page alone was fetched, and nothing was blocked or thrown
        assert len(browser.names("Network.requestWillBeSent")) == 1
        for kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            assert browser.names(kind) == []


@needs_browser
@pytest.mark.parametrize(
    ("column", "value", "shown"),
    [
        ("info", "[" * 200_000, {"info": "[" * 200_000}),
        ("info", "{nope", {"info": "{nope"}),
        ("info", None, {"info": None}),
        ("rewards", "[1]", {"rewards": {}}),
        ("rewards", '{"a": NaN}', {"rewards": {"a": "nan"}}),
        ("observations", '["text"]', {"observations": [{"role": "", "content": "text"}]}),
        ("observations", "{nope", {"observations": [{"role": "", "content": "{nope"}]}),
        ("tool_calls", '{"a": 1}', {"calls": [{"name": "", "arguments": '{"a": 1}'}]}),
        ("tool_calls", "[" * 200_000, {"calls": [{"name": "", "arguments": "[" * 200_000}]}),
        ("context_ids", None, {"context_tokens": 0}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_record_of_a_trainer_is_shown_as_it_is(column, value, shown, tmp_path):
    path = make_log(tmp_path, num_trajectories=1, num_turns=1)
    rows = [{**row, column: value} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    data = page_data(render(tmp_path, tmp_path / "page.html").read_text())

    def text(value):  # a long one stands once, under its number
        return data["texts"][value] if isinstance(value, int) else value

    (trajectory,) = data["trajectories"]
    (turn,) = trajectory["turns"]
    trajectory["info"] = text(trajectory["info"])
    for call in turn["calls"]:
        call["arguments"] = text(call["arguments"])
    found = {**trajectory, **turn}
    assert {name: found[name] for name in shown} == shown


def test_a_file_with_gaps_is_named(tmp_path):
    path = make_log(tmp_path, num_trajectories=1, num_turns=1)
    rows = [{**row, "turn": None} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    with pytest.raises(ValueError, match=f"{path} cannot be read as saved trajectories: turn is missing"):
        read_run(tmp_path)


def test_policy_of_the_page_stops_a_script_that_came_in_all_the_same(run_dir, tmp_path):
    page = render(run_dir, tmp_path / "page.html")
    page.write_text(page.read_text().replace("<main>", "<script>window.harmed = 1</script><main>"))
    with Browser() as browser:
        browser.open(page)
        assert browser.run("typeof window.harmed") == "undefined"
        assert browser.run("list.children.length") == 5


@needs_browser
def test_a_thousand_trajectories_are_shown_at_once(tmp_path):
    make_log(tmp_path, num_trajectories=1000, num_turns=8)
    page = render(tmp_path, tmp_path / "page.html")
    with Browser() as browser:
        browser.open(page)
        assert browser.run("list.children.length") == 1000
        milliseconds = browser.run(
            "(start => { move(1); update(); return performance.now() - start })(performance.now())"
        )
        assert milliseconds < 3000  # measured: 0.25 s beside other programs
        assert len(filter_by(browser, search="w59")) <= 1000


def test_texts_that_trajectories_share_are_written_once(tmp_path):
    make_log(tmp_path, num_trajectories=50, num_turns=2, prompt=WORDS * 20)
    page = render(tmp_path, tmp_path / "page.html").read_text()
    assert page.count("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11") == 20


def test_the_latest_iterations_are_kept(run_dir, tmp_path, capsys):
    page = render(run_dir, tmp_path / "page.html", "--max-trajectories", "3")
    assert "2 more are not on this page" in page.read_text()
    assert "2 more are not on this page" in capsys.readouterr().out
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert {t["iteration"] for t in data["trajectories"]} == {2}
    assert len(data["trajectories"]) == 3


def test_splits_and_iterations_can_be_chosen(run_dir, tmp_path):
    page = render(run_dir, tmp_path / "page.html", "--split", "train", "--iteration", "1")
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert [(t["split"], t["iteration"]) for t in data["trajectories"]] == [("train", 1)] * 2


def test_command_line_explains_what_it_cannot_show(run_dir, tmp_path, capsys):
    def fails(*options):
        command = [sys.executable, "-m", "seeupo_trl.view", *map(str, options)]
        process = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert process.returncode == 2
        assert "Traceback" not in process.stderr
        return process.stderr

    def says(message, *options):
        with pytest.raises(SystemExit) as end:
            main([str(run_dir), *map(str, options)])
        assert end.value.code == 2
        assert message in capsys.readouterr().err

    assert "has no saved trajectories" in fails(tmp_path)
    says("is of split test and any iteration", "--split", "test")
    says("must be at least 1; got 0", "--max-trajectories", 0)
    says(f"--output {tmp_path} is a directory", "--output", tmp_path)
    (tmp_path / "file").touch()
    says("page.html cannot be written: ", "--output", tmp_path / "file" / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not tmp_path.with_name(f".{tmp_path.name}.tmp").exists()


def test_a_page_goes_through_pipes_and_links_but_through_no_link_of_a_run(run_dir, tmp_path):
    published, link, pipe = tmp_path / "published.html", tmp_path / "link.html", tmp_path / "pipe"
    published.write_text("old")
    link.symlink_to(published)
    render(run_dir, link)
    assert link.is_symlink() and published.read_text().startswith("<!doctype html>")

    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        render(run_dir, pipe)
        assert read.result(timeout=60) == published.read_text()
    assert pipe.is_fifo()

    published.write_text("not of this run")
    page = run_dir / "trajectories.html"
    page.symlink_to(published)
    assert write_page(run_dir) == page
    assert not page.is_symlink() and published.read_text() == "not of this run"
    page.unlink()
