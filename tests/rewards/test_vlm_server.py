"""A judge over HTTP against a stub that answers, refuses, hangs, lies and repeats the key."""

import base64
import contextlib
import io
import json
import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from diffalign import media
from diffalign.rewards.vlm import JudgeServer, PairwiseJudge, Question, Rating, YesLogit
from diffalign.rewards.vlm.server import AnswerError, listed_log_probs, spoken_log_probs

pytest.importorskip("openai")

YES_NO = [("Yes", 0.5), ("No", 0.2), (" yes", 0.1), ("Maybe", 0.01), ("nope", 0.005)]
SECRET = "sk-do-not-tell-0123456789"


def completion(text="Yes", top=YES_NO):
    logprobs = None
    if top is not None:
        listed = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in top]
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}]}
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "stub",
        "choices": [choice | {"logprobs": logprobs}],
    }


class Stub:
    """``answer(request, headers) -> (status, headers, body)``; a body that is no string is sent as JSON."""

    def __init__(self):
        self.requests, self.headers, self.answer = [], [], lambda request, headers: (200, {}, completion())
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(request)
                stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                status, headers, body = stub.answer(request, stub.headers[-1])
                kind = "text/html" if isinstance(body, str) else "application/json"
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                with contextlib.suppress(ConnectionError):  # a client that did not wait
                    self.send_response(status)
                    for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def sleeps(monkeypatch):
    """Seconds that the client wanted to wait between attempts; it does not wait."""
    import openai._base_client

    class Clock:
        slept = []
        sleep = slept.append
        time = staticmethod(time.time)

    clock = Clock()
    monkeypatch.setattr(openai._base_client, "time", clock)
    return clock.slept


def images(count=2, seed=0):
    return media.quantise(torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(seed)))


def url_of(request, index=0):
    return request["messages"][0]["content"][index]["image_url"]["url"]


def pixels_of(request, index=0):
    data = base64.b64decode(url_of(request, index).removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return media.from_pil(image)[0]


def test_the_three_rewards_over_http(stub):
    x = images()
    judge = JudgeServer("stub", stub.url, concurrency=1)
    score = YesLogit(judge)(x, ["a cat", "a dog"])
    torch.testing.assert_close(score.value, torch.tensor([0.6, 0.6]))
    assert not YesLogit(judge).differentiable
    torch.testing.assert_close(YesLogit(judge, score="logit")(x, ["a"] * 2).value, torch.tensor([math.log(3.0)] * 2))
    request = stub.requests[0]
    assert {key: request[key] for key in ("model", "temperature", "max_tokens", "logprobs", "top_logprobs")} == {
        "model": "stub",
        "temperature": 0.0,
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert request["messages"][0]["content"][1]["text"] == 'Does this figure show "a cat"? Please answer Yes or No.'
    assert torch.equal(pixels_of(request), x[0])  # not a level lost on the way
    stub.answer = lambda request, headers: (
        200,
        {},
        completion("4", [("4", 0.6), ("5", 0.3), ("1", 0.1), ("2", 1e-6), ("3", 1e-6)]),
    )
    torch.testing.assert_close(Rating(judge)(x, ["a"] * 2).value, torch.tensor([4.0] * 2), rtol=1e-4, atol=0)


def test_pairs_over_http(stub):
    def brighter(request, headers):
        first, second = (float(pixels_of(request, i).mean()) for i in (0, 1))
        p = 0.9 if first > second else 0.3
        return 200, {}, completion("1", [("1", p), ("2", 1 - p - 1e-6), ("3", 1e-6)])

    stub.answer = brighter
    x = torch.tensor([0.2, 0.6, 0.4])[:, None, None, None].expand(-1, 3, 4, 4)
    score = PairwiseJudge(JudgeServer("stub", stub.url))(x, ["a cat"] * 3)
    # the brighter of two wins 0.9 in the first place and 0.7 in the second
    torch.testing.assert_close(score.value, torch.tensor([0.2, 0.8, 0.5]), rtol=0, atol=1e-5)
    assert len(stub.requests) == 6


def test_busy_servers_are_asked_again_more_and_more_slowly(stub, sleeps):
    states = iter([429, 500, 503, 200])
    stub.answer = lambda request, headers: (next(states), {}, completion())
    score = YesLogit(JudgeServer("stub", stub.url))(images(1), ["a"])
    assert score.valid.all()
    assert len(stub.requests) == 4
    for attempt, seconds in enumerate(sleeps):  # doubled each time, less up to a quarter
        assert 0.75 * 0.5 * 2**attempt <= seconds <= 0.5 * 2**attempt
    states = iter([429, 200])
    stub.answer = lambda request, headers: (next(states), {"Retry-After": "7"}, completion())
    sleeps.clear()
    assert YesLogit(JudgeServer("stub", stub.url))(images(1), ["a"]).valid.all()
    assert sleeps == [7.0]


def test_failures_cost_their_own_item_and_say_why(stub, sleeps):
    def answer(request, headers):
        kind = request["messages"][0]["content"][1]["text"]
        return {
            "good": (200, {}, completion()),
            "bad": (400, {}, {"error": {"message": "this image is too large"}}),
            "busy": (429, {}, {"error": {"message": "slow down"}}),
            "page": (200, {}, "<html>Welcome to the hotel</html>"),
            "empty": (200, {}, {"choices": []}),
            "silent": (200, {}, completion(top=None)),
            "neither": (200, {}, completion("Maybe", [("Maybe", 0.9), ("Sure", 0.05)])),
        }[kind]

    stub.answer = answer
    judge = JudgeServer("stub", stub.url, retries=2)
    prompts = ["good", "bad", "busy", "page", "empty", "silent", "neither", "good"]
    score = YesLogit(judge, "{prompt}")(images(8), prompts)
    assert score.valid.tolist() == [True] + [False] * 6 + [True]
    assert score.value[score.valid].tolist() == pytest.approx([0.6, 0.6])
    assert score.value[~score.valid].isnan().all()  # never 0
    for index, words in {
        1: "this image is too large",
        2: "slow down",
        3: "no chat completion: '<html>Welcome",
        4: "no chat completion",
        5: "no log-probabilities",
        6: "none of yes, no is among the 2 most likely tokens ('Maybe', 'Sure', ...)",
    }.items():
        assert words in score.reasons[index]
    asked = [request["messages"][0]["content"][1]["text"] for request in stub.requests]
    assert asked.count("busy") == 3
    assert asked.count("bad") == 1  # what is wrong stays wrong


def test_a_slow_answer_costs_its_own_item(stub, sleeps):
    def slow(request, headers):
        if request["messages"][0]["content"][1]["text"] == "slow":
            time.sleep(1)
        return 200, {}, completion()

    stub.answer = slow
    judge = JudgeServer("stub", stub.url, timeout=0.4, retries=0, concurrency=1)
    score = YesLogit(judge, "{prompt}")(images(3), ["quick", "slow", "quick"])
    assert score.valid.tolist() == [True, False, True]
    assert "timed out" in score.reasons[1]


def test_a_server_that_is_gone_is_not_asked_a_thousand_times(sleeps):
    stub = Stub()
    stub.close()
    started = time.monotonic()
    score = YesLogit(JudgeServer("stub", stub.url, retries=1, concurrency=2))(images(40), ["a"] * 40)
    assert not score.valid.any()
    assert sum("cannot be reached: Connection error" in reason for reason in score.reasons.values()) <= 2
    assert all(stub.url in reason for reason in score.reasons.values())
    assert time.monotonic() - started < 20


def test_requests_are_sent_together_but_not_too_many(stub):
    together, most, running, lock = threading.Barrier(3, timeout=20), [0], [0], threading.Lock()

    def answer(request, headers):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait()  # passes when three are there at once
        with lock:
            running[0] -= 1
        return 200, {}, completion()

    stub.answer = answer
    assert YesLogit(JudgeServer("stub", stub.url, concurrency=3))(images(9), ["a"] * 9).valid.all()
    assert most[0] == 3


def test_answers_are_kept_and_failures_are_not(stub, tmp_path, sleeps):
    down = [True]

    def answer(request, headers):
        bad = down[0] and request["messages"][0]["content"][1]["text"] == "b"
        return (400, {}, {"error": {"message": "not now"}}) if bad else (200, {}, completion())

    stub.answer = answer
    x, prompts = images(3), ["a", "b", "c"]

    def score(images=x, **changes):
        settings = {"model": "stub", "base_url": stub.url, "cache": tmp_path / "answers"} | changes
        before = len(stub.requests)
        found = YesLogit(JudgeServer(**settings), "{prompt}")(images, prompts)
        return found.valid.tolist(), len(stub.requests) - before

    assert score() == ([True, False, True], 3)
    assert score() == ([True, False, True], 1)
    down[0] = False
    assert score() == ([True, True, True], 1)
    assert score() == ([True, True, True], 0)
    other = Stub()
    assert score(base_url=other.url) == ([True, True, True], 0)  # the address is no part of the question
    other.close()
    files = sorted((tmp_path / "answers").rglob("*.*"))
    assert [file.suffix for file in files] == [".json"] * 3
    files[0].write_text('{"top": [')  # what a full disk may leave
    files[1].write_text('{"top": 3}')
    assert score() == ([True, True, True], 2)
    changed = x.clone()
    changed[2, 0, 0, 0] = 1 - changed[2, 0, 0, 0].round()
    assert score(changed) == ([True, True, True], 1)
    assert score(model="other") == ([True, True, True], 3)
    assert score(extra_body={"seed": 1}) == ([True, True, True], 3)
    assert stub.requests[-1]["seed"] == 1


def test_the_key_is_in_the_request_and_nowhere_else(stub, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_JUDGE_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    told = iter(["good", "bad", "bad"])

    def repeats(request, headers):
        if next(told) == "good":
            return 200, {}, completion()
        return 401, {}, {"error": {"message": f"no such key: {headers['authorization']}"}}

    stub.answer = repeats
    judge = JudgeServer("stub", stub.url, api_key_env="MY_JUDGE_KEY", cache=tmp_path / "c", concurrency=1)
    score = YesLogit(judge)(images(2), ["a", "b"])
    assert stub.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert score.valid.tolist() == [True, False]
    assert "no such key: Bearer ***" in score.reasons[1]
    with pytest.raises(RuntimeError, match=r"no such key: Bearer \*\*\*") as error:
        judge.log_probs([Question((images()[0],), "c")], ["yes"])
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    files = [file.read_text() for file in (tmp_path / "c").rglob("*.json")]
    assert len(files) == 1
    assert len(caplog.records) > 2
    seen = [*files, caplog.text, repr(judge), repr(vars(judge)), repr(score), str(error.value)]
    assert not any(SECRET in text for text in seen)
    monkeypatch.delenv("MY_JUDGE_KEY")
    with pytest.raises(ValueError, match="MY_JUDGE_KEY"):
        JudgeServer("stub", stub.url, api_key_env="MY_JUDGE_KEY")


def test_answers_read_as_text(stub):
    said = iter(["Yes.", " no\n", "**Yes**, clearly", "Not at all", ""])
    stub.answer = lambda request, headers: (200, {}, completion(next(said), top=None))
    judge = JudgeServer("stub", stub.url, read="text", concurrency=1)
    score = YesLogit(judge)(images(5), ["a"] * 5)
    assert score.value[:3].tolist() == [1.0, 0.0, 1.0]
    assert score.valid.tolist() == [True, True, True, False, False]
    assert "'Not at all' begins with none of yes, no" in score.reasons[3]
    assert "logprobs" not in stub.requests[0]
    said = iter(["5", "Two"])
    rating = Rating(judge)(images(2), ["a"] * 2)
    assert rating.valid.tolist() == [True, False]
    assert rating.value[0] == 5
    assert spoken_log_probs("2", ["1", "2"]) == [-math.inf, 0.0]


def test_a_word_that_is_not_listed_gets_a_bound():
    def probabilities(top, words=("yes", "no")):
        return [math.exp(x) for x in listed_log_probs([(token, math.log(p)) for token, p in top], words)]

    assert probabilities([("Yes", 0.9), ("No", 0.05)]) == pytest.approx([0.9, 0.05])
    # "no" has at most what the least listed token has
    assert probabilities([("Yes", 0.9), ("Sure", 0.04), ("Ok", 0.003)]) == pytest.approx([0.9, 0.003])
    # or what the listed ones leave
    assert probabilities([("Yes", 0.999), ("Sure", 0.0008)]) == pytest.approx([0.999, 0.0002], rel=1e-6)
    # OpenAI's mark of a token that it knows nothing of is no probability
    assert listed_log_probs([("Yes", math.log(0.999)), ("No", -9999.0)], ["yes", "no"])[1] == pytest.approx(
        math.log(1e-3)
    )
    with pytest.raises(AnswerError, match="no is not among the 2 listed tokens"):
        probabilities([("Yes", 0.6), ("Sure", 0.2)])
    with pytest.raises(AnswerError, match="none of yes, no"):
        probabilities([("Sure", 0.999)])


def test_settings_that_are_wrong():
    with pytest.raises(ValueError, match="read is 'logits'"):
        JudgeServer("m", "http://localhost:1/v1", read="logits")
    with pytest.raises(ValueError, match="concurrency is 0"):
        JudgeServer("m", "http://localhost:1/v1", concurrency=0)
