"""The benchmarks' published rules, asking, and a judge over HTTP.

    LLAVA_BENCHMARKS=FOLDER python -m pytest tests/test_benchmarks.py      # with samples of the real files
"""

import json
import os
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import eval
from eval import chat, normalize_m4c, normalize_vqa, parse_letter, parse_mme, parse_pope, parse_verdict, retry_after
from llava import UserError
from tests.toy import write_benchmarks, write_lines, write_random

torch.set_num_threads(1)

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


# ---------------------------------------------------------------------------------------------
# Every benchmark from a model to its figures, on toy files


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_random(folder / "model")
    write_benchmarks(folder / "data", size=4)
    return folder


def run(monkeypatch, *words) -> dict:
    """The figures that eval.py writes with these flags; {} if it writes none."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    eval.main()
    figures = Path(words[words.index("--json") + 1]) if "--json" in words else None
    return json.loads(figures.read_text()) if figures else {}


def flags(folder, task: str) -> list:
    """--task, --questions, --annotations and --images of a toy benchmark, or of the real samples."""
    files = {
        "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"),
        "pope": ("llava_pope_test.jsonl", *(f"coco_pope_{name}.json" for name in ("random", "popular", "adversarial"))),
        "mme": ("llava_mme.jsonl", "Your_Results" if (folder / "mme/Your_Results").exists() else "."),
        "mmbench": ("mmbench_dev_20230712.tsv",),
        "llavabench": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")}[task]
    questions, *annotations = [folder / task / name for name in files]
    words = ["--task", task, "--questions", questions, "--images", folder / ("mme" if task == "mme" else "val2014")]
    return words + ["--annotations", *annotations] if annotations else words


TASKS = ("vqav2", "textvqa", "pope", "mme", "mmbench", "llavabench")


@pytest.mark.parametrize("task", TASKS)
def test_a_toy_benchmark_runs_from_a_model_to_its_figures(monkeypatch, toy, tmp_path, judge, capsys, task):
    asking = ["--model", toy / "model", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6]
    words = [*flags(toy / "data", task), "--json", tmp_path / "figures.json"]
    if task == "llavabench":
        server = judge("8 4\nThe first one is better.")
        words += ["--judge", server.url, "--judge-model", "m", "--reviews", tmp_path / "reviews.jsonl"]
    one = run(monkeypatch, *words, *asking, "--out", tmp_path / "one.jsonl", "--batch-size", 1)
    many = run(monkeypatch, *words, *asking, "--out", tmp_path / "many.jsonl", "--batch-size", 5)
    assert one == many and one["missing"] == 0 and one["questions"] == {"pope": 24, "mme": 16, "mmbench": 8}.get(task, 4)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "many.jsonl").read_text()
    assert run(monkeypatch, *words, "--predictions", tmp_path / "many.jsonl") == one
    assert "missing 0, questions" in capsys.readouterr().out
    keys = {"vqav2": {"overall", "yes/no", "number", "other"}, "textvqa": {"accuracy", "answers"},
            "pope": {"f1", "random", "popular", "adversarial"}, "mme": {"perception", "cognition", "color", "code_reasoning"},
            "mmbench": {"circular", "one_pass", "categories"}, "llavabench": {"all", "conv", "detail", "complex", "reviews"}}
    assert set(one) == keys[task] | {"missing", "questions"}
    if task == "llavabench":
        assert one["all"] == 50.0 and one["reviews"] == [50.0] and len(server.requests) == 4
