"""Runs for the page of trajectories, and how a reader uses the page."""

import json

import pytest
from browser import CHROMIUM

from seeupo_trl import Trajectory, Turn
from seeupo_trl.evaluation.outcome import Outcome
from seeupo_trl.trajectory_log import TrajectoryLog
from seeupo_trl.update.metrics import TurnUpdate
from seeupo_trl.view.__main__ import main


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium) or CHROMIUM=/path/to/it"
)

HOSTILE = [
    "</script><script>window.harmed = 1</script>",
    "<!-- <script> --> <img src='http://example.org/x.png' onerror='window.harmed = 1'>",
    "</pre></title></style><svg onload=window.harmed=1>",
    "@data@ @script@ ${window.harmed = 1} `\\u003cscript\\u003e` &lt;b&gt; \\\" ' \u2028 \u2029 \x00 \x1b[31m \x7f",
    "javascript:window.harmed=1 \ud800 lone \udfff \u202e reversed",
]


class Verbatim:
    """A tokenizer whose only token is a text of its own."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, token_ids, **kwargs):
        return "".join(self.texts[i] for i in token_ids)


def outcome(index, task, reward, stop_reason="completed", success=None, turns=1, **kwargs):
    return Outcome(
        index=index,
        group=index // 2,
        task=task,
        category=kwargs.get("category"),
        turns=turns,
        stop_reason=stop_reason,
        success=success,
        reward=reward,
        rewards={"environment_reward": reward, "format": 0.5},
        advantage=-0.25,
    )


def render(run_dir, output, *options):
    main([str(run_dir), "--output", str(output), *options])
    return output


def filter_by(browser, **values):
    """Set filters as a user does; an empty value clears one."""
    for name, value in values.items():
        browser.run(
            f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})"
            f"(document.getElementById({json.dumps(name)}))"
        )
    return browser.run("[...list.children].map(item => [...item.querySelectorAll('span')].map(e => e.textContent))")


def save(run_dir, split, iteration, episodes):
    """
    Save one iteration or evaluation.

    Args:
        episodes (`list[dict]`):
            Those arguments of an outcome that matter, and `updates`: ratio and M / A of each turn that was trained on.
    """
    log = TrajectoryLog(run_dir, Verbatim(["<text>"]))
    outcomes, trajectories, updates = [], [], {}
    for index, episode in enumerate(episodes):
        values = {"task": f"task {index}", "category": None, "stop_reason": "completed", "success": None, **episode}
        of_turns = values.pop("updates", [])
        values = {"group": 0, "turns": max(len(of_turns), 1), "reward": 0.0, **values}
        outcomes.append(Outcome(index=index, **values))
        trajectories.append(Trajectory([Turn([0], [0]) for _ in range(values["turns"])]))
        for turn, (ratio, weight) in enumerate(of_turns, start=1):
            updates[index, turn] = TurnUpdate(ratio, False, weight, weight)
    log.add(outcomes, trajectories, updates)
    return log.write(split, iteration)


def save_state(directory, history):
    """What the trainer writes beside a model."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "trainer_state.json"
    path.write_text(history if isinstance(history, str) else json.dumps({"log_history": history}))
    return path


def page_data(page):
    """The JSON inside a page."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0])
