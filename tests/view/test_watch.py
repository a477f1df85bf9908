"""Following a run: the page reloads itself, keeps the reader's place, and is for this machine alone."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from urllib.request import urlopen

import pytest
from browser import Browser
from viewed_run import needs_browser, page_data, save, save_state

from seeupo_trl.view.__main__ import main
from seeupo_trl.view.watch import RunServer


@contextmanager
def served(run_dir, **selection):
    with RunServer(run_dir, selection=selection) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server, path="/", method="GET", **headers):
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=True)
        for name, value in ({"Host": f"127.0.0.1:{server.server_port}"} | headers).items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def until(browser, condition):
    """Wait for something in a page that may load anew meanwhile."""
    end = time.monotonic() + 60
    while True:
        try:
            if browser.run(f"document.readyState === 'complete' && ({condition})"):
                return
        except RuntimeError:  # between two pages
            pass
        assert time.monotonic() < end, f"never came true: {condition}"
        time.sleep(0.1)


def test_server_listens_on_loopback_and_answers_its_own_name_only(tmp_path):
    save(tmp_path, "train", 1, [{"task": "a secret"}])
    with served(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        for host in (f"127.0.0.1:{server.server_port}", f"LOCALHOST:{server.server_port}"):
            assert ask(server, Host=host)[0] == 200
        foreign = ["evil.example", f"evil.example:{server.server_port}", "127.0.0.1", "localhost:1", "", None]
        foreign += [f"127.0.0.1:{server.server_port}.evil.example", f"[::1]:{server.server_port}"]
        for host in foreign:
            for path in ("/", "/version"):
                status, _, text = ask(server, path, Host=host)
                assert status == 421
                assert "a secret" not in text and "version" not in text


def test_server_reads_only(tmp_path):
    save(tmp_path, "train", 1, [{"task": "a secret"}])
    with served(tmp_path) as server:
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"):
            status, headers, text = ask(server, method=method)
            assert (status, headers["Allow"]) == (405, "GET")
            assert "a secret" not in text
        for path in ("/trajectories/train/iteration-000001.parquet", "/../../etc/passwd", "/favicon.ico", "//evil"):
            assert ask(server, path)[0] == 404
        assert ask(server, "/?iteration=<b>")[0] == 400
        _, headers, page = ask(server)
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers
        assert "default-src 'none'" in page and "connect-src 'self'" in page


def test_version_changes_with_the_files(tmp_path):
    with served(tmp_path) as server:
        versions = []

        def look():
            state = json.loads(ask(server, "/version")[2])
            versions.append(state["version"])
            assert page_data(ask(server)[2])["watch"] == state
            return state

        assert look()["changed"] is None
        before = time.time() - 5
        path = save(tmp_path, "train", 1, [{}])
        assert before < look()["changed"] < time.time() + 5
        save(tmp_path, "train", 1, [{}, {}])
        look()
        state = save_state(tmp_path / "checkpoint-1", "{")
        look()
        save_state(tmp_path / "checkpoint-1", [{"step": 1, "entropy": 0.5}])
        look()
        assert len(set(versions)) == len(versions)
        (tmp_path / ".iteration-000002.parquet.tmp").write_text("half")
        assert look()["version"] == versions[-2]
        state.unlink()
        path.unlink()
        assert look()["version"] == versions[0]  # nothing is there again


def test_page_says_what_cannot_be_read_and_shows_it_once_it_can(tmp_path):
    with served(tmp_path) as server:
        assert "has no saved trajectories" in page_data(ask(server)[2])["notices"][0]
        path = save(tmp_path, "train", 1, [{}])
        whole = path.read_bytes()
        path.write_bytes(whole[:100])
        assert "cannot be read as saved trajectories" in page_data(ask(server)[2])["notices"][0]
        path.write_bytes(whole)
        assert len(page_data(ask(server)[2])["trajectories"]) == 1
        shutil.rmtree(tmp_path)
        assert "has no saved trajectories" in page_data(ask(server)[2])["notices"][0]
        save(tmp_path, "train", 5, [{}, {}])
        assert len(page_data(ask(server)[2])["trajectories"]) == 2


def test_an_iteration_that_is_not_listed_can_be_asked_for(tmp_path):
    for iteration in (1, 2, 3):
        save(tmp_path, "train", iteration, [{}] * 2)
    with served(tmp_path, max_trajectories=2) as server:
        listed = lambda path: {t["iteration"] for t in page_data(ask(server, path)[2])["trajectories"]}  # noqa: E731
        assert listed("/") == {3}
        assert listed("/?iteration=1") == {1}
        assert listed("/") == {3}


@needs_browser
def test_page_reloads_when_an_iteration_appears_and_keeps_the_readers_place(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, "train", iteration, [{"turns": 12, "reward": n / 30} for n in range(30)])
    with served(tmp_path) as server, Browser() as browser:
        browser.open(server.url)
        assert "last change" in browser.run("document.getElementById('watch').innerText")
        browser.run("input.task.value = 'task 1'; input.task.dispatchEvent(new Event('input', {bubbles: true}))")
        browser.run("goTo('train', 1); select(shown[7]); input.search.focus()")
        browser.run("detail.querySelectorAll('details')[2].open = true")
        browser.run("new Promise(done => setTimeout(done, 50))")
        browser.run("detail.scrollTop = 150; list.scrollTop = 90; window.scrollBy(0, -70)")
        place = (
            "JSON.stringify([fields.map(name => input[name].value), keyOf(current), Math.round(detail.scrollTop),"
            " Math.round(list.scrollTop), Math.round(scrollY), document.activeElement.id,"
            " [...detail.querySelectorAll('details')].findIndex(details => details.open)])"
        )
        before = browser.run(place)
        assert json.loads(before)[0][:4] == ["", "task 1", "train", "1"]
        assert json.loads(before)[2] == 150
        save(tmp_path, "train", 3, [{"reward": 1.0}] * 30)
        until(browser, "trajectories.length === 90 && data.charts[0].series[0].x.length === 3")
        until(browser, f"{place} === {json.dumps(before)}")
        loads = len(browser.names("Page.loadEventFired"))
        time.sleep(5)
        assert len(browser.names("Page.loadEventFired")) == loads  # nothing has changed
        assert browser.names("Runtime.exceptionThrown") == []


@needs_browser
def test_page_survives_a_run_that_is_deleted_and_starts_again(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with served(run_dir) as server, Browser() as browser:
        browser.open(server.url)
        assert "nothing saved yet" in browser.run("document.getElementById('watch').innerText")
        save(run_dir, "train", 7, [{}] * 3)
        until(browser, "trajectories.length === 3")
        shutil.rmtree(run_dir)
        until(browser, "trajectories.length === 0 && curves.innerText.includes('has no saved trajectories')")
        save(run_dir, "train", 1, [{}])
        until(browser, "trajectories.length === 1 && trajectories[0].iteration === 1")
        assert browser.names("Runtime.exceptionThrown") == []


@needs_browser
def test_point_whose_episodes_are_not_listed_leads_to_them(tmp_path):
    for iteration in (1, 2):
        save(tmp_path, "train", iteration, [{}] * 2)
    with served(tmp_path, max_trajectories=2) as server, Browser() as browser:
        browser.open(server.url)
        browser.run("goTo('train', 1)")
        browser.click("#answer a")
        until(browser, "trajectories.every(t => t.iteration === 1)")
        browser.click("#answer a")
        until(browser, "trajectories.every(t => t.iteration === 2)")


@needs_browser
def test_page_says_when_nobody_answers_any_more(tmp_path):
    save(tmp_path, "train", 1, [{}])
    with Browser() as browser:
        with served(tmp_path) as server:
            browser.open(server.url)
        until(browser, "document.getElementById('watch').innerText.includes('No longer following')")
        assert browser.run("trajectories.length") == 1


def test_command_prints_the_address_and_ends_with_a_message(tmp_path):
    save(tmp_path, "train", 1, [{}])
    process = subprocess.Popen(
        [sys.executable, "-m", "seeupo_trl.view", str(tmp_path), "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell has what it runs in the background ignore Ctrl-C, and that is inherited
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
        assert len(page_data(urlopen(url, timeout=60).read().decode())["trajectories"]) == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err, out.strip()) == (0, "", "No longer following.")
    finally:
        process.kill()
        process.wait()


def test_command_explains_what_it_cannot_follow(tmp_path, capsys):
    def says(message, *options):
        with pytest.raises(SystemExit) as end:
            main([*map(str, options)])
        assert end.value.code == 2
        assert message in capsys.readouterr().err

    says("run does not exist", tmp_path / "run", "--watch")
    says("either --watch or --output", tmp_path, "--watch", "--output", "page.html")
    says("add --watch", tmp_path, "--port", 8000)
    says("must be between 0 and 65535", tmp_path, "--watch", "--port", 65536)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says(f"Port {port} of 127.0.0.1 cannot be used", tmp_path, "--watch", "--port", port)
