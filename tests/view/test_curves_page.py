"""The curves on the page, in a real browser: drawn, read out, and a way to the episodes of a point."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Browser
from viewed_run import HOSTILE, filter_by, needs_browser, page_data, render, save, save_state

from seeupo_trl.trajectory_log import SCHEMA


pytestmark = needs_browser
TITLES = [
    "Reward",
    "Success",
    "Turns",
    "Stop reasons, train",
    "Stop reasons, eval",
    "Ratio by turn",
    "M / A by turn",
    "Entropy",
    "Seconds",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Six iterations with an evaluation after every third."""
    run_dir = tmp_path_factory.mktemp("run")
    history = []
    for iteration in range(1, 7):
        rewards = [iteration / 10, iteration / 10 + 0.2]
        updates = [(1 + iteration / 100, 1.0), (1.0, 1 - iteration / 100)]
        episodes = [{"reward": reward, "success": reward > 0.5, "updates": updates} for reward in rewards]
        save(run_dir, "train", iteration, [*episodes, {"stop_reason": "max_turns", "reward": 0.0, "success": False}])
        history.append({"step": iteration, "entropy": 1 / iteration, "time/rollout": 3.0, "time/update": 2.0})
        if iteration % 3 == 0:
            save(run_dir, "eval", iteration, [{"reward": 0.5, "success": True, "task": "an eval task"}])
    save_state(run_dir / "checkpoint-6", history)
    return render(run_dir, run_dir / "page.html", "--max-trajectories", "14")  # iterations 3 to 6


def chart(title):
    return f"[...document.querySelectorAll('figure')].find(f => f.innerText.startsWith({title!r}))"


def test_every_chart_is_drawn_and_named(page):
    with Browser() as browser:
        browser.open(page)
        assert browser.run("[...document.querySelectorAll('figcaption b')].map(e => e.textContent)") == TITLES
        labels = browser.run("[...document.querySelectorAll('svg[role=img]')].map(e => e.getAttribute('aria-label'))")
        assert len(labels) == len(TITLES)
        assert labels[0] == (
            "Reward by iteration. train 0.1333 at iteration 1, 0.4667 at iteration 6; "
            "eval 0.5 at iteration 3, 0.5 at iteration 6."
        )
        # every curve crosses its chart and stays inside it
        boxes = browser.run(
            "[...document.querySelectorAll('.curve, .part-of')].map(e => e.getBBox())"
            ".map(box => [box.x, box.y, box.x + box.width, box.y + box.height])"
        )
        assert len(boxes) == 2 + 2 + 2 + 2 * 2 + 2 * 2 + 1 + 2
        for left, top, right, bottom in boxes:
            assert 40 < left < 200 and 360 < right < 380 and 0 < top <= bottom < 168
        assert browser.run(f"{chart('Stop reasons, train')}.querySelector('.names').innerText.split('\\n')") == [
            "completed",
            "max turns",
        ]
        assert browser.names("Runtime.exceptionThrown") == []


def test_a_click_on_a_point_lists_its_episodes(page):
    with Browser() as browser:
        browser.open(page)
        assert browser.run("scrollY") == 0
        browser.run(f"{chart('Reward')}.querySelectorAll('circle')[3].id = 'point'")
        browser.click("#point")
        assert browser.run("[input.split.value, input.iteration.value]") == ["train", "4"]
        assert browser.run("shown.map(t => [t.split, t.iteration])") == [["train", 4]] * 3
        assert browser.run("explorer.getBoundingClientRect().top") == pytest.approx(0, abs=1)
        # the chosen iteration is marked; a click on the evaluation's curve lists the evaluation
        assert browser.run("document.querySelectorAll('.chosen[visibility=visible]').length") == len(TITLES)
        browser.run(
            f"[...{chart('Success')}.querySelectorAll('circle')].filter(e => e.r.baseVal.value < 3)[7].id = 'eval'"
        )
        browser.click("#eval")
        assert browser.run("shown.map(t => [t.split, t.iteration])") == [["eval", 6]]
        browser.click("button[type=reset]")
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert browser.run("document.querySelectorAll('.chosen[visibility=visible]').length") == 0


def test_other_filters_give_way_only_where_they_hide_every_episode_of_the_point(page):
    with Browser() as browser:
        browser.open(page)
        filter_by(browser, stop="max_turns")
        browser.run("goTo('train', 5)")
        assert browser.run("[shown.length, input.stop.value]") == [1, "max_turns"]
        browser.run("goTo('eval', 6)")
        assert browser.run("[shown.length, input.stop.value, input.iteration.value]") == [1, "", "6"]


def test_the_keyboard_reads_points_and_goes_to_their_episodes(page):
    with Browser() as browser:
        browser.open(page)
        browser.press("Tab")
        focused = "document.activeElement.getAttribute"
        assert browser.run(f"{focused}('aria-label')") == "Reward: iteration. Enter goes to its episodes"
        assert browser.run(f"{focused}('aria-valuetext')") == (
            "iteration 6: train 0.4667 (0 to 0.8), eval 0.5 (0.5 to 0.5)"
        )
        first = browser.run("current.iteration")
        for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft"):
            browser.press(key)
        assert browser.run(f"{focused}('aria-valuenow')") == "3"
        assert "Iteration 3" in browser.run("document.querySelector('.tip:not([hidden])').innerText")
        assert browser.run("current.iteration") == first  # the arrow keys are the chart's here
        browser.press("ArrowDown")  # to the evaluation
        browser.press("Enter")
        assert browser.run("shown.map(t => [t.split, t.iteration])") == [["eval", 3]]
        assert browser.run("document.activeElement.id") == "list"


def test_a_point_whose_episodes_are_not_on_the_page_says_how_to_see_them(page):
    with Browser() as browser:
        browser.open(page)
        browser.run(f"{chart('Reward')}.querySelectorAll('circle')[0].id = 'point'")
        browser.click("#point")
        assert "The train episodes of iteration 1 are not on this page" in browser.run(
            "document.getElementById('answer').innerText"
        )
        assert "--iteration 1" in browser.run("document.getElementById('answer').innerText")
        assert browser.run("shown.length") == 14
        browser.run("goTo('train', 6)")
        assert browser.run("document.getElementById('answer').innerText") == ""


def test_the_numbers_can_be_read_as_tables(page):
    with Browser() as browser:
        browser.open(page)
        assert browser.run("document.querySelectorAll('#curves table').length") == 0  # drawn when opened
        browser.click(".numbers summary")
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert browser.run("document.querySelectorAll('#curves table').length") == len(TITLES)
        rows = browser.run("document.querySelector('#curves table').innerText.split('\\n')")
        assert "Iteration\ttrain\teval" in rows
        assert "1\t0.1333 (0 to 0.3)\t-" in rows


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_charts_fit_a_phone_and_follow_the_colour_scheme(page, dark):
    with Browser(width=390, dark=dark) as browser:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        lefts = browser.run("[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().left)")
        assert len(set(lefts)) == 1
        colour = "getComputedStyle(document.querySelector('figure')).backgroundColor.match(/\\d+/g).map(Number)"
        assert (max(browser.run(colour)) < 60) == dark
        stroke = "getComputedStyle(document.querySelector('.curve')).stroke.match(/\\d+/g).map(Number)"
        assert (sum(browser.run(stroke)) > 382) == dark


def test_extreme_values_stay_inside_their_charts(tmp_path):
    for iteration, ratio in enumerate((1e-6, 1.0, 1e9), start=1):
        save(tmp_path, "train", iteration, [{"reward": 1e300 * iteration, "updates": [(ratio, 1.0)]}])
    save_state(tmp_path, [{"step": 2, "entropy": -0.0}, {"step": 3, "entropy": 0}])
    with Browser() as browser:
        browser.open(render(tmp_path, tmp_path / "page.html"))
        paths = browser.run("[...document.querySelectorAll('#curves svg *')].map(e => e.outerHTML).join()")
        assert "NaN" not in paths and "Infinity" not in paths
        boxes = browser.run(
            "[...document.querySelectorAll('.curve')].map(e => e.getBBox()).map(b => [b.y, b.y + b.height])"
        )
        assert all(0 <= top <= bottom <= 168 for top, bottom in boxes)
        assert browser.run(f"{chart('Ratio by turn')}.querySelectorAll('.grid').length") >= 4  # powers of ten
        assert browser.names("Runtime.exceptionThrown") == []


def test_a_single_iteration_is_drawn_as_points(tmp_path):
    save(tmp_path, "train", 3, [{"updates": [(1.0, 1.0)]}])
    with Browser() as browser:
        browser.open(render(tmp_path, tmp_path / "page.html"))
        assert browser.run(f"{chart('Reward')}.querySelectorAll('circle').length") == 2  # one follows the pointer
        assert browser.run(f"{chart('Stop reasons')}.querySelector('.part-of').getBBox().width") > 0
        browser.run(f"{chart('Reward')}.querySelector('circle').id = 'point'")
        browser.click("#point")
        assert browser.run("input.iteration.value") == "3"


def test_no_text_of_a_run_runs_in_the_curves(tmp_path):
    for iteration in (1, 2):
        episodes = [{"stop_reason": text, "task": text, "category": text} for text in HOSTILE]
        save(tmp_path, "train", iteration, episodes)
    for text in HOSTILE:
        save(tmp_path, f"eval_{text}"[:60].encode("utf-8", "replace").decode().replace("\0", ""), 2, [{"reward": 0.5}])
    history = [{"step": 1, "entropy": 0.5, text: text, "time/rollout": text} for text in HOSTILE]
    history += [
        {"step": 2, **{f"{text}_entropy": 1.0 for text in HOSTILE}},
        {"step": HOSTILE[0], "entropy": HOSTILE[1]},
    ]
    save_state(tmp_path / "checkpoint-2", history)
    save_state(tmp_path / "checkpoint-3", "</script><script>window.harmed = 1</script>")
    page = render(tmp_path, tmp_path / "page.html")
    assert page.read_bytes().count(b"<script") == 2
    with Browser() as browser:
        browser.open(page)
        assert browser.run("document.querySelectorAll('figure').length") == 9
        assert HOSTILE[0] in browser.run("curves.innerText")
        browser.run("document.querySelector('.numbers').open = true; new Promise(done => setTimeout(done, 50))")
        for position in range(9):
            browser.run(f"document.querySelectorAll('.cover')[{position}].focus()")
            for key in ("ArrowLeft", "ArrowDown", "ArrowRight"):
                browser.press(key)
            browser.press("Enter")
            assert browser.run("shown.length") > 0
        assert (
            browser.run("document.querySelectorAll('#curves :is(script, img, iframe, a, foreignObject)').length") == 0
        )
        assert browser.run("document.querySelectorAll('[onload], [onerror]').length") == 0
        assert browser.run("typeof window.harmed") == "undefined"
        assert len(browser.names("Network.requestWillBeSent")) == 1
        for kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            assert browser.names(kind) == []


@pytest.mark.slow
def test_ten_thousand_episodes_of_five_hundred_iterations(tmp_path):
    updates = [(1.0 + turn / 50, 1.0 + turn / 100) for turn in range(3)]
    episodes = [{"group": n // 4, "reward": n / 20, "success": n > 9, "updates": updates} for n in range(20)]
    table = pq.read_table(save(tmp_path, "train", 1, episodes))
    for iteration in range(2, 501):
        of_iteration = table.set_column(0, SCHEMA.field(0), pa.repeat(pa.scalar(iteration), len(table)))
        pq.write_table(of_iteration, tmp_path / f"trajectories/train/iteration-{iteration:06d}.parquet")
    save_state(tmp_path, [{"step": step, "entropy": 1 / step, "time/rollout": 1.0} for step in range(1, 501)])
    page = render(tmp_path, tmp_path / "page.html")
    data = page_data(page.read_text())
    assert len(data["trajectories"]) == 1000
    assert all(series["x"] == list(range(1, 501)) for chart in data["charts"] for series in chart["series"])
    assert page.stat().st_size < 2_000_000
    everything = render(tmp_path, tmp_path / "everything.html", "--max-trajectories", "10000")
    assert everything.stat().st_size < 20_000_000
    with Browser() as browser:
        browser.open(everything)
        assert browser.run("list.children.length") == 10_000
        assert browser.run("document.querySelectorAll('figure').length") == 8
        browser.run("goTo('train', 7)")
        assert browser.run("shown.length") == 20
