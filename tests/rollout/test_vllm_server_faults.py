"""A vLLM server that answers slowly, wrongly, twice, not at all, or was started anew: a stand-in that does it all."""

import asyncio
import logging
import math
import threading
import time

import pytest
from byte_tokenizer import byte_tokenizer

from seeupo_trl.rollout import vllm_server
from seeupo_trl.rollout.sampler import Request
from seeupo_trl.rollout.turn_ends import TurnEnds
from seeupo_trl.rollout.vllm_server import ServerError, VllmServerSampler


web = pytest.importorskip("aiohttp.web")

EOS = 7
CONTEXT = [20, 21, 22]


def response(prompt, ids=(30, 31, EOS)):
    """What vLLM returns for a prompt of token ids, with `return_token_ids` and `return_tokens_as_token_ids`."""
    names = [f"token_id:{i}" for i in ids]
    logprobs = [-0.5 - n for n in range(len(ids))]
    top = [{name: logp} for name, logp in zip(names, logprobs, strict=True)]
    choice = {
        "prompt_token_ids": prompt,
        "token_ids": list(ids),
        "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top},
    }
    return {"choices": [choice]}


class Server:
    """Does what its `deeds` say with one completion after another, and answers well when there are none left."""

    def __init__(self):
        self.deeds, self.seen, self.aborted, self.start_time = [], [], 0, 1000.5
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result()

    async def _start(self):
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/v1/completions", self._complete)
        self.runner = web.AppRunner(app, handler_cancellation=True)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def _metrics(self, request):
        return web.Response(text=f"# HELP x\nprocess_start_time_seconds {self.start_time}\n")

    async def _complete(self, request):
        asked = await request.json()
        self.seen.append(asked)
        deed = self.deeds.pop(0) if self.deeds else "answer"
        if isinstance(deed, tuple):
            status, text = deed
            return web.Response(status=status, text=text)
        if isinstance(deed, dict):
            return web.json_response(deed)
        if deed == "hang up":
            request.transport.close()
        if deed == "start anew":
            self.start_time += 100
            request.transport.close()
        if deed in ("hang", "slow"):
            try:
                await asyncio.sleep(30 if deed == "hang" else 0.3)
            except asyncio.CancelledError:
                self.aborted += 1
                raise
        return web.json_response(response(asked["prompt"]))

    def stop(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def sampler(server, monkeypatch):
    monkeypatch.setattr(vllm_server, "PAUSE", 0.01)
    sampler = VllmServerSampler(server.url, {"temperature": 0.9}, TurnEnds(byte_tokenizer("qwen3"), [EOS]), 0.5, 2.0)
    yield sampler
    sampler.close()


def ask(sampler, key=0, seed=11):
    sampler.submit(Request(key, CONTEXT, seed))
    return sampler.poll(None)


def test_a_request_is_answered(server, sampler):
    (answer,) = ask(sampler, key=4)
    assert (answer.key, answer.action_ids, answer.logps) == (4, [30, 31, EOS], [-0.5, -1.5, -2.5])
    assert server.seen == [{"temperature": 0.9, "prompt": CONTEXT, "seed": 11}]


NONE = {
    "no JSON": (200, "<html>"),
    "an empty answer": {},
    "no choice": {"choices": []},
    "an error of the server": (503, "too busy"),
    "another context": response([1, 2]),
    "more tokens than log-probabilities": {
        "choices": [{**response(CONTEXT)["choices"][0], "token_ids": [30, 31, 32, EOS]}]
    },
    "log-probabilities of other tokens": {"choices": [{**response(CONTEXT)["choices"][0], "token_ids": [5, 6, EOS]}]},
    "no log-probabilities": {"choices": [{**response(CONTEXT)["choices"][0], "logprobs": None}]},
    "no number": {
        "choices": [
            {
                **response(CONTEXT)["choices"][0],
                "logprobs": {
                    **response(CONTEXT)["choices"][0]["logprobs"],
                    "token_logprobs": [math.nan] * 3,
                    "top_logprobs": [{}] * 3,
                },
            }
        ]
    },
}


@pytest.mark.parametrize("deed", NONE.values(), ids=NONE)
def test_an_answer_that_is_none_is_asked_for_again_with_the_same_seed(server, sampler, deed, caplog):
    server.deeds = [deed]
    (answer,) = ask(sampler)
    assert answer.action_ids == [30, 31, EOS]
    assert len(server.seen) == 2 and server.seen[0] == server.seen[1]
    assert "is sent again" in caplog.text


@pytest.mark.parametrize("deed", NONE.values(), ids=NONE)
def test_a_server_that_goes_on_answering_wrongly_ends_the_run(server, sampler, deed):
    server.deeds = [deed] * 5
    with pytest.raises(ServerError, match="did not answer a request in 3 attempts"):
        ask(sampler)
    assert len(server.seen) == 3


def test_a_request_that_was_lost_is_sent_again(server, sampler, caplog):
    server.deeds = ["hang"]
    (answer,) = ask(sampler)
    assert answer.action_ids == [30, 31, EOS] and len(server.seen) == 2
    assert "no response within 0.5 seconds (`request_timeout`)" in caplog.text


def test_a_slow_server_is_waited_for(server, sampler, caplog):
    server.deeds = ["slow"]
    with caplog.at_level(logging.WARNING):
        (answer,) = ask(sampler)
    assert answer.action_ids == [30, 31, EOS] and len(server.seen) == 1 and not caplog.records


def test_a_connection_that_breaks_is_made_again(server, sampler):
    server.deeds = ["hang up", "hang up"]
    (answer,) = ask(sampler)
    assert answer.action_ids == [30, 31, EOS] and len(server.seen) == 3


def test_a_server_that_was_started_anew_is_not_asked_again(server, sampler):
    """It has the weights that it was started with."""
    server.deeds = ["start anew"]
    with pytest.raises(ServerError, match="was started anew during the run, so it has lost the trainer's weights"):
        ask(sampler)
    assert len(server.seen) == 1


def test_a_server_that_is_gone_ends_the_run(server, sampler):
    server.deeds = ["hang up"]
    start = time.monotonic()
    server.stop()
    with pytest.raises(ServerError, match="cannot be reached any more.*resume the run from its last checkpoint"):
        ask(sampler)
    assert 2.0 <= time.monotonic() - start < 20


def test_a_refused_request_ends_the_run_with_what_the_server_said(server, sampler):
    server.deeds = [(400, "This model's maximum context length is 80 tokens.")]
    with pytest.raises(ServerError, match="refused a request of 3 tokens with status 400: This model's maximum"):
        ask(sampler)


def test_many_requests_are_in_flight_at_once_and_answers_come_as_they_come(server, sampler):
    server.deeds = ["slow"] * 40
    start = time.monotonic()
    for key in range(40):
        sampler.submit(Request(key, [key + 1], key))
    answers = []
    while len(answers) < 40:
        answers += sampler.poll(None)
    assert sorted(answer.key for answer in answers) == list(range(40))
    assert time.monotonic() - start < 5  # one after another they take 12


def test_a_request_that_is_given_up_is_aborted_and_its_answer_dropped(server, sampler):
    server.deeds = ["slow", "answer"]
    sampler.submit(Request(0, CONTEXT, 1))
    while not server.seen:
        time.sleep(0.01)
    sampler.forget(0)
    assert [answer.key for answer in ask(sampler, key=1)] == [1]
    assert sampler.poll(0.5) == [] and server.aborted == 1


def test_a_poll_ends_when_its_time_is_over(server, sampler):
    server.deeds = ["slow"]
    sampler.submit(Request(0, CONTEXT, 1))
    start = time.monotonic()
    assert sampler.poll(0.05) == [] and time.monotonic() - start < 0.25
    assert [answer.key for answer in sampler.poll(None)] == [0]
    assert sampler.poll(None) == []  # nothing is asked
