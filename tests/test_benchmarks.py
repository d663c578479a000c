"""The benchmarks' published rules, asking, and a judge over HTTP.

    LLAVA_BENCHMARKS=FOLDER python -m pytest tests/test_benchmarks.py      # with samples of the real files
"""

import json
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import eval
from eval import chat, retry_after
from llava import UserError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which is better? é"}]


class Judge(ThreadingHTTPServer):
    """A local endpoint that answers with `replies`, one for each request, the last one for ever. A reply is a text,
    or (status, headers, body)."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests = list(replies), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        judge, content = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        judge.requests.append((self.path, dict(self.headers), json.loads(content)))
        reply = judge.replies[0] if len(judge.replies) == 1 else judge.replies.pop(0)
        if isinstance(reply, str):
            reply = 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]})
        status, headers, body = reply
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def judge():
    """A function that starts a local judge."""
    started = []

    def start(*replies) -> Judge:
        started.append(Judge(*replies))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that were slept, without sleeping them."""
    waits = []
    monkeypatch.setattr(eval.time, "sleep", waits.append)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return waits


# ---------------------------------------------------------------------------------------------
# Requests to a judge


def test_a_request_is_openais_and_carries_the_key_only_where_there_is_one(judge, monkeypatch):
    server = judge("8 7\nBoth are fine.")
    assert chat(server.url + "/", "gpt-4", MESSAGES) == "8 7\nBoth are fine."
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    chat(server.url, "gpt-4", MESSAGES, temperature=0, max_tokens=9)
    (path, without, body), (_, with_key, other) = server.requests
    assert path == "/v1/chat/completions" and "Authorization" not in without
    assert body == {"model": "gpt-4", "messages": MESSAGES, "temperature": 0.2, "max_tokens": 1024}
    assert with_key["Authorization"] == "Bearer sk-secret" and (other["temperature"], other["max_tokens"]) == (0, 9)


@pytest.mark.parametrize("first", [
    (429, {}, "slow down"), (500, {}, ""), (200, {}, "<html>"), (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"message": {"content": null}}]}'), (200, {"Content-Length": 99}, '{"choices": [{"mes')])
def test_what_fails_once_is_asked_again(judge, waits, first):
    server = judge(first, "1 2")
    assert chat(server.url, "m", MESSAGES) == "1 2"
    assert waits == [1] and len(server.requests) == 2


@pytest.mark.parametrize("reply, kind, complaint", [
    ((503, {}, "busy"), OSError, "answers 503"), ((200, {}, "half a li"), UserError, "does not reply with a chat")])
def test_five_attempts_end_in_one_sentence(judge, waits, reply, kind, complaint):
    server = judge(reply)
    with pytest.raises(kind, match=complaint):
        chat(server.url, "m", MESSAGES)
    assert waits == [1, 2, 4, 8] and len(server.requests) == 5


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_not_sent_again_and_not_printed(judge, waits, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = judge((status, {}, "Incorrect key sk-secret"))
    with pytest.raises(UserError, match="check OPENAI_API_KEY") as error:
        chat(server.url, "m", MESSAGES)
    assert len(server.requests) == 1 and waits == [] and "secret" not in str(error.value)


def test_a_judge_that_is_down_or_silent_is_said(judge, waits):
    server = judge("1 2")
    server.shutdown()
    with pytest.raises(OSError, match="gives no answer .*timed out"):
        chat(server.url, "m", MESSAGES, seconds=0.05)                   # accepts, and never answers
    server.server_close()
    with pytest.raises(OSError, match="gives no answer"):
        chat(server.url, "m", MESSAGES)
    assert waits == [1, 2, 4, 8] * 2


def test_retry_after_is_followed_up_to_a_minute(judge, waits):
    soon = formatdate(eval.time.time() + 30, usegmt=True)
    assert 20 < retry_after(soon, 1) <= 30
    server = judge((429, {"Retry-After": 7}, ""), (503, {"Retry-After": 3600}, ""), (429, {"Retry-After": "?"}, ""), "5")
    assert chat(server.url, "m", MESSAGES) == "5"
    assert waits == [7, 60, 4]
