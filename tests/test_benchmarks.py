"""Tests of eval.py --task: the published scoring rules, answers of a toy model, and the judge over HTTP.

    LLAVA_BENCHMARKS=FOLDER python -m pytest tests/test_benchmarks.py      # with samples of the real files

FOLDER/{task} contains the files that RESULTS.md lists under "Benchmarks", and answers.jsonl. FOLDER/vqav2
also contains upload_expected.json, FOLDER/llavabench also review.jsonl.
"""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval
from eval import (chat, normalize_m4c, normalize_vqa, parse_letter, parse_mme, parse_pope, parse_verdict,
                  retry_after)
from llava import UserError
from tests.toy import write_benchmarks, write_lines, write_random

torch.set_num_threads(1)

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which is better? é"}]


class Judge(ThreadingHTTPServer):
    """A local endpoint that sends `replies` in order and then repeats the last one. A reply is a text, or
    (status, headers, body)."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), JudgeHandler)
        self.replies, self.requests, self.stopped = list(replies), [], threading.Event()
        self.header_delay = self.byte_delay = 0          # seconds between two headers, two bytes of a body
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class JudgeHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        judge, content = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        judge.requests.append((self.path, dict(self.headers), json.loads(content)))
        reply = judge.replies[0] if len(judge.replies) == 1 else judge.replies.pop(0)
        if isinstance(reply, str):
            reply = 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply},
                                                     "finish_reason": "stop"}]})
        status, headers, body = reply
        self.send_response(status)
        try:
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name, str(value))
                if judge.header_delay:
                    self.flush_headers()
                    judge.stopped.wait(judge.header_delay)
            self.end_headers()
            if judge.byte_delay:
                for byte in body.encode():
                    self.wfile.write(bytes([byte]))
                    judge.stopped.wait(judge.byte_delay)
            else:
                self.wfile.write(body.encode())
        except OSError:
            pass                             # the client has closed the connection

    def log_message(self, *_):
        pass


@pytest.fixture
def start_judge():
    """A function that starts a local judge with these replies."""
    servers = []

    def start(*replies) -> Judge:
        server = Judge(*replies)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.stopped.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds passed to time.sleep, which does not wait. The environment names no endpoint and no key."""
    waits = []
    monkeypatch.setattr(eval.time, "sleep", waits.append)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return waits


# ---------------------------------------------------------------------------------------------
# Requests to the judge


def test_request_has_openais_form_and_the_key_if_one_is_set(start_judge, monkeypatch):
    server = start_judge("8 7\nBoth are fine.")
    assert chat(server.url + "/", "gpt-4", MESSAGES) == ("8 7\nBoth are fine.", "stop")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    chat(server.url, "gpt-4", MESSAGES, temperature=0, max_tokens=9)
    (path, headers, body), (_, headers_with_key, body_with_options) = server.requests
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body == {"model": "gpt-4", "messages": MESSAGES, "temperature": 0.2, "max_tokens": 1024}
    assert headers_with_key["Authorization"] == "Bearer sk-secret"
    assert (body_with_options["temperature"], body_with_options["max_tokens"]) == (0, 9)


@pytest.mark.parametrize("first_reply", [
    (429, {}, "slow down"), (500, {}, ""), (200, {}, "<html>"), (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"message": {"content": 5}}]}'), (200, {}, "[" * 100_000),
    (200, {}, '{"choices": [{"message": {"content": []}}]}'),
    (200, {"Content-Length": 99}, '{"choices": [{"mes')])
def test_failed_request_is_repeated(start_judge, waits, first_reply):
    server = start_judge(first_reply, "1 2")
    assert chat(server.url, "m", MESSAGES)[0] == "1 2"
    assert waits == [1] and len(server.requests) == 2


def test_reply_without_text_is_empty_and_is_not_requested_again(start_judge):
    reply = '{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}'
    server = start_judge((200, {}, reply))
    assert chat(server.url, "m", MESSAGES) == ("", "length") and len(server.requests) == 1


@pytest.mark.parametrize("reply, exception, message", [
    ((503, {}, "busy"), OSError, "answers 503"),
    ((200, {}, "half a li"), UserError, "does not reply with a chat")])
def test_request_fails_after_five_attempts(start_judge, waits, reply, exception, message):
    server = start_judge(reply)
    with pytest.raises(exception, match=message):
        chat(server.url, "m", MESSAGES)
    assert waits == [1, 2, 4, 8] and len(server.requests) == 5


@pytest.mark.parametrize("status", [401, 403])
def test_refused_key_is_neither_sent_again_nor_printed(start_judge, waits, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = start_judge((status, {}, "Incorrect key sk-secret"))
    with pytest.raises(UserError, match="check OPENAI_API_KEY") as error:
        chat(server.url, "m", MESSAGES)
    assert len(server.requests) == 1 and waits == [] and "secret" not in str(error.value)


@pytest.mark.parametrize("status", [308, 404])
def test_rejected_request_is_not_repeated(start_judge, waits, status):
    server = start_judge((status, {}, "no such model"))
    with pytest.raises(UserError, match=f"{status}.*check the name of the model"):
        chat(server.url, "m", MESSAGES)
    assert len(server.requests) == 1 and waits == []


def test_no_attempt_follows_the_end_of_the_program(start_judge):
    server, stop = start_judge((503, {"Retry-After": 60}, "busy")), threading.Event()
    stop.set()
    with pytest.raises(OSError, match="503"):
        chat(server.url, "m", MESSAGES, stop=stop)
    assert len(server.requests) == 1


@pytest.mark.parametrize("key, url, message", [
    ("sk-a\nsk-b", "http://localhost/v1", "OPENAI_API_KEY has a line break"),
    ("“sk-a”", "http://localhost/v1", "not ASCII"), ("", "http://[::1/v1", "name an endpoint"),
    ("", "http:///v1", "name an endpoint"), ("", "http://localhost/é", "name an endpoint")])
def test_wrong_key_or_address_is_refused_before_a_request(monkeypatch, toy, tmp_path, start_judge, key, url,
                                                          message):
    flags = judge_flags(toy, tmp_path, start_judge("1 2"))
    flags[flags.index("--judge") + 1] = url
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=message) as error:
        run_eval(monkeypatch, *flags)
    assert "sk-" not in str(error.value)


def test_error_if_the_judge_is_down_or_does_not_reply(monkeypatch, start_judge, waits):
    server = start_judge("1 2")
    server.shutdown()
    monkeypatch.setattr(eval, "SECONDS", 0.05)
    with pytest.raises(OSError, match="gives no answer .*timed out"):
        chat(server.url, "m", MESSAGES)      # no reply to an open connection
    server.server_close()
    with pytest.raises(OSError, match="gives no answer"):
        chat(server.url, "m", MESSAGES)
    assert waits == [1, 2, 4, 8] * 2


def test_timeout_holds_for_the_whole_reply(monkeypatch, start_judge, waits):
    server, start = start_judge("1 2"), eval.time.monotonic()
    server.byte_delay = 0.05                 # each packet comes within the timeout, the whole reply takes 4 s
    monkeypatch.setattr(eval, "SECONDS", 0.2)
    with pytest.raises(OSError, match="timed out"):
        chat(server.url, "m", MESSAGES)
    assert eval.time.monotonic() - start < 3 and waits == [1, 2, 4, 8]


def test_timeout_holds_for_slow_headers(monkeypatch, start_judge, waits):
    server, start = start_judge((200, {f"X-{i}": "x" for i in range(40)}, "")), eval.time.monotonic()
    server.header_delay = 0.05               # 2 s in all
    monkeypatch.setattr(eval, "SECONDS", 0.2)
    with pytest.raises(OSError, match="timed out"):
        chat(server.url, "m", MESSAGES)
    assert eval.time.monotonic() - start < 3 and waits == [1, 2, 4, 8]


def test_retry_after_is_obeyed_up_to_60_seconds(start_judge, waits):
    assert [retry_after(header, 2) for header in ("7", "-1", "?", None)] == [7, 0, 2, 2]
    server = start_judge((429, {"Retry-After": 7}, ""), (503, {"Retry-After": 3600}, ""),
                         (429, {"Retry-After": "?"}, ""), "5")
    assert chat(server.url, "m", MESSAGES)[0] == "5"
    assert waits == [7, 60, 4]


# ---------------------------------------------------------------------------------------------
# Toy benchmarks: from a model to the figures


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_random(folder / "model")
    write_benchmarks(folder / "data", size=4)
    return folder


def run_eval(monkeypatch, *flags) -> dict:
    """Run eval.py and return the figures that --json writes, or {} without this flag."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    eval.main()
    if "--json" not in flags:
        return {}
    return json.loads(Path(flags[flags.index("--json") + 1]).read_text())


def task_flags(folder, task: str) -> list:
    """--task, --questions, --images and --annotations of a toy benchmark, or of the real samples."""
    files = {
        "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
        "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"),
        "pope": ("llava_pope_test.jsonl", "coco_pope_random.json", "coco_pope_popular.json",
                 "coco_pope_adversarial.json"),
        "mme": ("llava_mme.jsonl", "Your_Results" if (folder / "mme/Your_Results").exists() else "."),
        "mmbench": ("mmbench_dev_20230712.tsv",),
        "llavabench": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")}[task]
    questions, *annotations = [folder / task / name for name in files]
    images = folder / ("mme" if task == "mme" else "val2014")
    flags = ["--task", task, "--questions", questions, "--images", images]
    if annotations:
        flags += ["--annotations", *annotations]
    return flags


def read_jsonl(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


TASKS = ("vqav2", "textvqa", "pope", "mme", "mmbench", "llavabench")


@pytest.mark.parametrize("task", TASKS)
def test_toy_benchmark_from_the_model_to_the_figures(monkeypatch, toy, tmp_path, start_judge, capsys, task):
    model_flags = ["--model", toy / "model", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 6]
    flags = [*task_flags(toy / "data", task), "--json", tmp_path / "figures.json"]
    if task == "llavabench":
        server = start_judge("8 4\nThe first one is better.")
        flags += ["--judge", server.url, "--judge-model", "m", "--reviews", tmp_path / "reviews.jsonl"]
    single, batched = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    figures = run_eval(monkeypatch, *flags, *model_flags, "--out", single, "--batch-size", 1)
    assert figures == run_eval(monkeypatch, *flags, *model_flags, "--out", batched, "--batch-size", 5)
    assert figures["questions"] == {"pope": 24, "mme": 16, "mmbench": 8}.get(task, 4)
    assert figures["missing"] == 0 and single.read_text() == batched.read_text()
    assert run_eval(monkeypatch, *flags, "--predictions", batched) == figures
    assert "missing 0, questions" in capsys.readouterr().out
    keys = {"vqav2": {"overall", "yes/no", "number", "other"}, "textvqa": {"accuracy", "answers"},
            "pope": {"f1", "random", "popular", "adversarial"},
            "mme": {"perception", "cognition", "color", "code_reasoning"},
            "mmbench": {"circular", "one_pass", "categories"},
            "llavabench": {"all", "conv", "detail", "complex", "reviews"}}
    assert set(figures) == keys[task] | {"missing", "questions"}
    if task == "llavabench":
        assert figures["all"] == 50.0 and figures["reviews"] == [50.0] and len(server.requests) == 4


# ---------------------------------------------------------------------------------------------
# The published rules


@pytest.mark.parametrize("text, m4c, vqa", [
    ("A cat.", "cat", "cat"), ("The U.S.A.", "usa", "usa"), ("2,000", "2000", "2000"), ("3.5", "3.5", "3.5"),
    ("2,000-3,000", "2000 3000", "20003000"), ("3,a", "3a", "3"), ("red/blue", "red blue", "red blue"),
    ("well-known", "well known", "well known"), ("it's", "it 's", "it's"), ("dont", "don't", "don't"),
    ("none", "0", "0"), ("two dogs", "2 dogs", "2 dogs"), ("12:30", "12:30", "12:30"), ("a an the", "", ""),
    ("a@b.com", "bcom", "bcom"), ("somebody'd", "somebodyd", "somebodyd"), ("lets", "lets", "lets"),
    ("Ive", "ive", "ive"), ("y'alld've", "y'all'd've", "y'all'd've"), ("." * 40, "." * 8, "." * 8),
    ("red, blue", "red blue", "red blue"), ("yes ?", "yes", "yes"), ("a -b-c", "bc", "bc"),
    ("É Ü\u2003x", "é ü x", "é ü x"), ("it’s", "it’s", "it’s"), ("itll\n10", "it'll 10", "it'll 10")])
def test_normalization_equals_that_of_both_evaluators(text, m4c, vqa):
    assert (normalize_m4c(text), normalize_vqa(text)) == (m4c, vqa)


def test_contraction_table_has_the_published_size():
    without_effect = 6                       # official entries that never match or map to themselves
    assert len(eval.CONTRACTIONS) + without_effect == 120


def write_vqav2(folder, humans: list[str], answers: list[str]) -> list:
    """Write two questions with the same human answers and `answers` to the first one; return the flags."""
    write_lines(folder / "q.jsonl", [{"question_id": 7, "image": "x.jpg", "text": "Is it?"},
                                     {"question_id": 8, "image": "x.jpg", "text": "Who?"}])
    records = [{"answer": text, "answer_id": i} for i, text in enumerate(humans)]
    (folder / "a.json").write_text(json.dumps({"annotations": [
        {"question_id": i, "answer_type": "yes/no", "answers": records} for i in (7, 8)]}))
    write_lines(folder / "p.jsonl", [{"question_id": 7, "text": text} for text in answers])
    return ["--task", "vqav2", "--questions", folder / "q.jsonl", "--annotations", folder / "a.json",
            "--predictions", folder / "p.jsonl", "--json", folder / "f.json", "--upload", folder / "u.json"]


@pytest.mark.parametrize("humans, answers, overall", [
    (["yes"] * 10, ["Yes"], 50.0),           # answers are lower-cased; the second question has none
    (["Yes"] * 10, ["Yes"], 0.0),            # ten equal ones are compared as they are
    (["Yes"] * 9 + ["no"], ["yes"], 50.0), (["yes"] + ["no"] * 9, ["yes"], 15.0),
    (["a"] * 3 + ["no"] * 7, ["the"], 90.0),
    (["2"] * 2 + ["no"] * 8, ["no", "two"], 30.0)])
def test_vqav2_follows_the_official_rule(monkeypatch, tmp_path, capsys, humans, answers, overall):
    figures = run_eval(monkeypatch, *write_vqav2(tmp_path, humans, answers))
    assert figures == {"overall": overall, "yes/no": overall, "number": None, "other": None, "missing": 1,
                       "questions": 2}
    uploaded = json.loads((tmp_path / "u.json").read_text())
    assert uploaded == [{"question_id": 7, "answer": normalize_m4c(answers[-1])},
                        {"question_id": 8, "answer": ""}]
    assert ("the last one counts" in capsys.readouterr().out) == (len(answers) == 2)


def test_textvqa_averages_over_the_existing_answers(monkeypatch, toy, tmp_path):
    flags = task_flags(toy / "data", "textvqa")
    questions_file, annotations_file = flags[3], flags[-1]
    q = read_jsonl(questions_file)[0]
    correct = json.loads(annotations_file.read_text())["data"][0]["answers"][0]
    prompt = q["text"].split("\n")[0]
    forms = (q["text"], f"{prompt}\nAnswer.", f"OCR tokens: x. Question: {prompt} Short answer:",
             "Reference OCR token: x\n" + prompt + "\nAnswer.")
    write_lines(tmp_path / "p", [{"question_id": q["question_id"], "prompt": form, "text": text}
                                 for form, text in zip(forms, (correct, "x", "The " + correct, "y"))])
    figures = run_eval(monkeypatch, *flags, "--predictions", tmp_path / "p", "--json", tmp_path / "f")
    assert figures == {"accuracy": 50.0, "answers": 4, "missing": 3, "questions": 4}


@pytest.mark.parametrize("text, is_yes", [
    ("No", False), ("no, it is", False), ("There is, I am not sure", False), ("No\n", True), ("NO", True),
    ("none", True), ("cannot", True), ("", True), (". No", True), ("Yes. No.", True), ("Well,no", True),
    ("a no", False)])
def test_parse_pope_follows_the_official_rule(text, is_yes):
    assert parse_pope(text) == is_yes


@pytest.mark.parametrize("text, word", [
    ("Yes.", "yes"), ("eyes", "yes"), ("know", "no"), ("not sure", "no"), ("I no", "no"),
    ("maybe no", "other"), ("", "other"), (" yes", "yes"), ("  yes", "other")])
def test_parse_mme_reads_the_first_four_characters(text, word):
    assert parse_mme(text) == word


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(C) a dog", "C"), ("b", None), ("A or B", None),
    ("The answer is B because they are all red", "B"), ("Option B I think it may well be", None),
    ("a red dog", "C"), ("It is a cat", "A"), ("cat or dog", None),
    ("D", None), ("Z", None), ("Cannot determine the answer, B", None),
    ("A" + " x" * 9, None), ("cat" + " x" * 60, None)])
def test_parse_letter_follows_vlmevalkit(text, letter):
    assert parse_letter(text, {"A": "cat", "B": "Mouse or hare", "C": "dog"}) == letter


@pytest.mark.parametrize("content, ratings", [
    ("8 7\nok", [8, 7]), ("8,7", [8, 7]), ("1e1 5", [10, 5]), ("8, 7", [-1, -1]), ("8 7 ", [-1, -1]),
    ("8/10 7/10", [-1, -1]), ("8\t7", [-1, -1]), ("Assistant 1: 8", [-1, -1]), ("", [-1, -1]),
    ("8.5 7", [8.5, 7]), ("nan 5", [-1, -1])])           # officially NaN, which is not JSON
def test_parse_verdict_follows_the_official_script(content, ratings):
    assert parse_verdict(content) == ratings


def correct_answers(folder, task: str) -> list[dict]:
    """Correct answers to a toy benchmark, in the order of its questions."""
    args = eval.parse_args([*map(str, task_flags(folder, task)), "--predictions", "x"])
    benchmark = eval.BENCHMARKS[task]
    questions = [q for file in args.questions for q in benchmark.read(file)]
    truth = benchmark.read_truth(args, questions) if benchmark.read_truth else {}
    return [{"question_id": q["question_id"], "prompt": q["prompt"],
             "text": truth[benchmark.key(q)] if truth else q["truth"]} for q in questions]


def test_pope_scores_each_set_and_ignores_missing_answers(monkeypatch, toy, tmp_path, capsys):
    answers = correct_answers(toy / "data", "pope")
    answers[0]["text"], answers[8]["text"] = "No", "yes and no"          # adversarial, random: yes -> no
    duplicate = answers[1] | {"text": "Yes"}                              # the last answer counts
    without_third = [*reversed(answers[3:]), answers[1], answers[0]]
    write_lines(tmp_path / "p", [duplicate, *without_third])
    figures = run_eval(monkeypatch, *task_flags(toy / "data", "pope"), "--predictions", tmp_path / "p",
                       "--json", tmp_path / "f")
    assert figures["adversarial"] == {"tp": 2, "fp": 0, "tn": 4, "fn": 1, "accuracy": 6 / 7, "precision": 1.0,
                                      "recall": 2 / 3, "f1": 0.8, "yes_ratio": 2 / 7}
    assert [figures["random"][key] for key in ("tp", "fp", "tn", "fn")] == [3, 0, 4, 1]
    assert figures["popular"]["f1"] == 1 and figures["missing"] == 1
    assert figures["f1"] == pytest.approx(100 * (0.8 + 6 / 7 + 1) / 3, abs=1e-9)
    assert "1 questions have more than one answer; the last one counts" in capsys.readouterr().out


def test_mme_scores_images_and_questions(monkeypatch, toy, tmp_path):
    answers = correct_answers(toy / "data", "mme")
    answers[0]["text"], answers[1]["text"], answers[2]["text"] = "Maybe yes", "Know", "Eyes"
    write_lines(tmp_path / "p", [answers[5], *answers[:5], *answers[6:14]])
    flags = [*task_flags(toy / "data", "mme"), "--predictions", tmp_path / "p", "--json", tmp_path / "f"]
    figures = run_eval(monkeypatch, *flags)
    assert figures["color"] == {"acc": 87.5, "acc_plus": 75.0, "score": 162.5}
    assert figures["perception"] == 162.5
    assert figures["code_reasoning"]["score"] == 200 == figures["cognition"] and figures["missing"] == 2
    write_lines(tmp_path / "p", answers[:-1])
    with pytest.raises(UserError, match="two answers for each image, but code_reasoning/.* has 1"):
        run_eval(monkeypatch, *flags)


def test_mme_also_reads_the_truth_from_templates(monkeypatch, toy, tmp_path):
    templates = tmp_path / "mme" / "Your_Results"
    templates.mkdir(parents=True)
    questions = read_jsonl(toy / "data/mme/llava_mme.jsonl")
    write_lines(tmp_path / "mme/llava_mme.jsonl", questions)
    answers = correct_answers(toy / "data", "mme")
    for q, answer in zip(questions, answers):
        task, image = q["image"].split("/")
        text = q["text"].split("\n")[0] + "  Please answer yes or no."
        with open(templates / f"{task}.txt", "a") as file:
            file.write(f"{image}\t{text}\t{answer['text'].upper()}\n")
    assert correct_answers(tmp_path, "mme") == answers


def test_missing_folder_of_mme_is_named(monkeypatch, toy, tmp_path):
    flags = task_flags(toy / "data", "mme")
    flags[flags.index("--annotations") + 1] = tmp_path / "none"
    write_lines(tmp_path / "p", correct_answers(toy / "data", "mme"))
    with pytest.raises(OSError, match="none is not a folder"):
        run_eval(monkeypatch, *flags, "--predictions", tmp_path / "p")


def test_mmbench_counts_a_question_only_if_all_rotations_are_correct(monkeypatch, toy, tmp_path):
    answers = correct_answers(toy / "data", "mmbench")
    answers[1]["text"] = "Z"
    write_lines(tmp_path / "p", [answers[7] | {"text": "E"}, *answers[:6], answers[7]])
    flags = [*task_flags(toy / "data", "mmbench"), "--predictions", tmp_path / "p", "--json", tmp_path / "f"]
    figures = run_eval(monkeypatch, *flags, "--upload", tmp_path / "u.xlsx")
    assert figures == {"circular": 50.0, "one_pass": 75.0, "categories": {"coarse": 50.0, "fine": 50.0},
                       "missing": 1, "questions": 8}
    openpyxl = pytest.importorskip("openpyxl")
    header, *rows = openpyxl.load_workbook(tmp_path / "u.xlsx").active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert [row[0] for row in rows] == [i + k for i in (1, 2, 3, 4) for k in (0, 10**6)]
    assert [row[6] for row in rows] == [a["text"] for a in answers[:6]] + [None, answers[7]["text"]]


def test_mmbench_upload_keeps_all_characters_and_empty_cells(monkeypatch, tmp_path):
    (tmp_path / "t.tsv").write_text("index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
                                    '3\t"a ""b"" <c> & d\n e"\tNA\t one\ttwo\tNone\tthree\tB\tAAAA\n')
    (q,) = eval.read_mmbench(tmp_path / "t.tsv")
    assert q["prompt"] == 'a "b" <c> & d\n e\nA.  one\nB. two' and q["question_id"] == 3
    eval.write_mmbench_upload(tmp_path / "u.xlsx", [q | {"text": "x\x01\ry"}])
    openpyxl = pytest.importorskip("openpyxl")
    row = list(openpyxl.load_workbook(tmp_path / "u.xlsx").active.iter_rows(values_only=True))[1]
    assert row == (3, 'a "b" <c> & d\n e', " one", "two", None, "three", "x\ry", "B")


# ---------------------------------------------------------------------------------------------
# LLaVA-Bench and its judge


def review(question_id: int, ratings: list, category: str = "llava_bench_conv") -> dict:
    return {"question_id": question_id, "tuple": ratings, "category": category}


def test_ratio_of_ratings_is_rounded_in_the_official_order(monkeypatch, tmp_path):
    write_lines(tmp_path / "r", [review(i, [6, 6 if i < 9 else 5]) for i in range(17)])
    figures = run_eval(monkeypatch, "--task", "llavabench", "--reviews", tmp_path / "r",
                       "--json", tmp_path / "f")
    assert figures["all"] == 92.2            # round(100 * 5.529 / 6, 1) is 92.1


def test_reviews_are_scored_with_the_official_roundings(monkeypatch, tmp_path):
    write_lines(tmp_path / "a", [review(0, [9, 7]), review(1, [8, -1], "detail"), review(2, [7, 5.5])])
    write_lines(tmp_path / "b", [review(0, [3, 1]), {"question_id": 1, "score": [1, 1]}])
    figures = run_eval(monkeypatch, "--task", "llavabench", "--reviews", tmp_path / "a", tmp_path / "b",
                       "--json", tmp_path / "f")
    assert figures == {"all": (47.9 + 50) / 2, "conv": (78.1 + 33.3) / 2, "detail": -12.5,
                       "reviews": [47.9, 50.0], "missing": 1, "questions": 3}


def judge_flags(toy, tmp_path, server, judge_model="m") -> list:
    """Write an answer to each toy question of LLaVA-Bench; return the flags that have them judged."""
    flags = task_flags(toy / "data", "llavabench")
    write_lines(tmp_path / "p", [{"question_id": q["question_id"], "prompt": q["text"], "text": "An answer."}
                                 for q in read_jsonl(flags[3])])          # the file of --questions
    return [*flags, "--predictions", tmp_path / "p", "--judge", server.url, "--judge-model", judge_model,
            "--reviews", tmp_path / "reviews", "--json", tmp_path / "f"]


def test_judge_receives_the_official_request(monkeypatch, toy, tmp_path, start_judge):
    server = start_judge("8 4\nBecause.")
    run_eval(monkeypatch, *judge_flags(toy, tmp_path, server))
    content = server.requests[1][2]["messages"][1]["content"]
    caption = read_jsonl(toy / "data/llavabench/context.jsonl")[1]["caption"]     # also the reference answer
    assert content.startswith(f"[Context]\n{caption}\n\n[Question]\nDescribe this image.\n\n[Assistant 1]\n"
                              f"{caption}\n\n[End of Assistant 1]\n\n[Assistant 2]\nAn answer.\n\n"
                              "[End of Assistant 2]\n\n[System]\n")
    stored = read_jsonl(tmp_path / "reviews")
    assert stored[1]["category"] == "llava_bench_detail"
    assert stored[1]["tuple"] == [8, 4] and stored[1]["id"] == 2


def test_coco_contexts_list_captions_and_boxes(tmp_path):
    write_lines(tmp_path / "c", [{"captions": ["A dog.", "One dog."], "image": "x.jpg",
                                  "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}]}])
    write_lines(tmp_path / "r", [{"question_id": 1, "text": "A dog."}])
    q = {"question_id": 1, "prompt": "What?", "image": "x.jpg", "category": "conv"}
    truth = eval.read_llavabench(eval.Args(annotations=[tmp_path / "c", tmp_path / "r"]), [q])["1"]
    content = eval.judge_messages(q | {"truth": truth, "text": "Cat."})[1]["content"]
    assert content.startswith("[Context]\nA dog.\nOne dog.\n\ndog: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\n")
    assert "fractions" in content and truth["category"] == "conv"


def test_interrupted_judging_continues_only_with_the_same_judge(monkeypatch, toy, tmp_path, start_judge):
    server = start_judge("8 4", "nonsense", *[(500, {}, "")] * 5, "6 6")
    flags = judge_flags(toy, tmp_path, server)
    with pytest.raises(OSError, match="answers 500"):
        run_eval(monkeypatch, *flags)
    stored = (tmp_path / "reviews").read_text()
    assert [json.loads(line)["tuple"] for line in stored.splitlines()] == [[8, 4], [-1, -1]]
    with open(tmp_path / "reviews", "a") as file:
        file.write('{"question_id": 2, "id')                              # a line that an interrupt cut short
    figures = run_eval(monkeypatch, *flags)
    assert len(server.requests) == 9 and (tmp_path / "reviews").read_text().startswith(stored)
    assert figures["reviews"] == [round(100 * 3.75 / 4.75, 1)] and figures["missing"] == 0
    assert run_eval(monkeypatch, *flags) == figures and len(server.requests) == 9
    with pytest.raises(UserError, match="by another judge or of another answer"):
        run_eval(monkeypatch, *judge_flags(toy, tmp_path, server, "another"))
    reference = toy / "data/llavabench/answers_gpt4.jsonl"
    (tmp_path / "other").write_text(reference.read_text().replace('"text": "', '"text": "Not '))
    flags[flags.index(reference)] = tmp_path / "other"
    with pytest.raises(UserError, match="or of another answer or reference"):
        run_eval(monkeypatch, *flags)
    assert len(server.requests) == 9


# ---------------------------------------------------------------------------------------------
# Bad input


def make_answer(question_id, text="yes", **fields) -> dict:
    return {"question_id": question_id, "text": text} | fields


@pytest.mark.parametrize("task, answers, message", [
    ("pope", [make_answer(99)], "answers question 99, which --questions lacks"),
    ("pope", [{"question_id": 1}], "line 1: not"),
    ("mme", [make_answer("color/x.jpg", prompt="?")], "color/x.jpg"),
    ("mme", [make_answer("color/x.jpg")], "has no prompt"),
    ("textvqa", [make_answer("x", prompt="one\ntwo\nthree")], "none of TextVQA's four forms")])
def test_answers_to_other_questions_are_refused(monkeypatch, toy, tmp_path, task, answers, message):
    write_lines(tmp_path / "p", answers)
    with pytest.raises(UserError, match=message):
        run_eval(monkeypatch, *task_flags(toy / "data", task), "--predictions", tmp_path / "p")


def test_second_answer_to_a_llavabench_question_is_refused(monkeypatch, toy, tmp_path, start_judge):
    flags = judge_flags(toy, tmp_path, start_judge("1 2"))
    write_lines(tmp_path / "p", [make_answer(0), make_answer(0)])
    with pytest.raises(UserError, match="line 2: question 0 was answered before"):
        run_eval(monkeypatch, *flags)


def test_pope_labels_of_another_revision_are_refused(monkeypatch, toy, tmp_path):
    *flags, adversarial_file = task_flags(toy / "data", "pope")
    labels, changed_file = read_jsonl(adversarial_file), tmp_path / "coco_pope_adversarial.json"
    write_lines(tmp_path / "p", [make_answer(1)])
    for changed_labels in (labels[:-1], [labels[1], labels[0], *labels[2:]]):
        write_lines(changed_file, changed_labels)
        with pytest.raises(UserError, match="labels other questions"):
            run_eval(monkeypatch, *flags, changed_file, "--predictions", tmp_path / "p")
    with pytest.raises(UserError, match="lacks question"):
        run_eval(monkeypatch, *flags, "--predictions", tmp_path / "p")


def test_vqav2_needs_ten_human_answers(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="question 7 has 9 human answers"):
        run_eval(monkeypatch, *write_vqav2(tmp_path, ["yes"] * 9, ["yes"]))


def test_missing_image_is_reported_before_the_model_is_loaded(monkeypatch, toy, tmp_path):
    flags = task_flags(toy / "data", "pope")
    flags[flags.index("--images") + 1] = tmp_path
    with pytest.raises(OSError, match="question 1: there is no image"):
        run_eval(monkeypatch, *flags, "--model", "nowhere", "--out", tmp_path / "a")


def test_answer_file_with_another_task_or_blank_setting_is_refused(monkeypatch, toy, tmp_path):
    model_flags = ["--model", toy / "model", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 2,
                   "--limit", 2, "--out", tmp_path / "a"]
    run_eval(monkeypatch, *task_flags(toy / "data", "pope"), *model_flags)
    with pytest.raises(UserError, match="another task"):
        run_eval(monkeypatch, *task_flags(toy / "data", "mme"), *model_flags)
    with pytest.raises(UserError, match="another blank"):
        run_eval(monkeypatch, *task_flags(toy / "data", "pope"), *model_flags, "--blank")


@pytest.mark.parametrize("flags", [
    ["--task", "pope"], ["--task", "pope", "--scienceqa", "x"], ["--task", "pope", "--cost"],
    ["--task", "pope", "--questions", "q", "--predictions", "p"],
    ["--task", "pope", "--questions", "q", "--model", "m"],
    ["--task", "pope", "--questions", "q", "--predictions", "p", "--annotations", "a", "--upload", "u"],
    ["--task", "llavabench", "--questions", "q", "--predictions", "p"],
    ["--task", "llavabench", "--questions", "q", "--predictions", "p", "--judge-model", "m",
     "--reviews", "a", "b"],
    ["--task", "vqav2", "--questions", "q", "--predictions", "p", "--annotations", "a", "--reviews", "r"],
    ["--task", "vqav2", "--questions", "q", "--predictions", "p", "--annotations", "a", "--split", "val"],
    ["--task", "llavabench", "--questions", "q", "--model", "m", "--reviews", "r"],
    ["--task", "pope", "--questions", "q", "--model", "m", "--images", "d"],
    ["--scienceqa", "d", "--model", "m", "--out", "a", "--json", "./a"],
    ["--scienceqa", "d", "--predictions", "p", "--json", "p"],
    ["--scienceqa", "d", "--predictions", "p", "--upload", "u"], ["--cost", "--wording", "letter"]])
def test_invalid_flags_exit_with_code_2(monkeypatch, flags):
    with pytest.raises(SystemExit) as error:
        run_eval(monkeypatch, *flags)
    assert error.value.code == 2


def test_reviews_without_any_ratings_are_refused(monkeypatch, tmp_path):
    write_lines(tmp_path / "r", [review(i, [-1, -1]) for i in range(3)])
    with pytest.raises(UserError, match="has no review with two ratings .* is the model a judge"):
        run_eval(monkeypatch, "--task", "llavabench", "--reviews", tmp_path / "r")


def test_review_file_without_reviews_is_refused(monkeypatch, tmp_path):
    (tmp_path / "reviews.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no review"):
        run_eval(monkeypatch, "--task", "llavabench", "--reviews", tmp_path / "reviews.jsonl")


def test_images_outside_the_image_folder_are_refused(monkeypatch, toy, tmp_path):
    for name in ("../a.jpg", str(tmp_path / "a.jpg")):
        q = {"question_id": 1, "image": name, "text": "Is it?", "category": "random"}
        write_lines(tmp_path / "q.jsonl", [q])
        with pytest.raises(UserError, match="is outside of"):
            run_eval(monkeypatch, "--task", "pope", "--questions", tmp_path / "q.jsonl", "--model", "none",
                     "--images", tmp_path, "--out", tmp_path / "a")


def test_mistakes_are_reported_before_the_model_is_loaded(monkeypatch, toy, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(eval, "load_model", lambda args: pytest.fail("the model is loaded"))
    model_flags = ["--model", "none", "--images", tmp_path, "--out", tmp_path / "a"]
    with pytest.raises(UserError, match="name an endpoint"):
        run_eval(monkeypatch, *task_flags(toy / "data", "llavabench"), *model_flags, "--judge-model", "m",
                 "--reviews", tmp_path / "r")
    with pytest.raises(OSError, match="none/r cannot be written: there is no such folder"):
        run_eval(monkeypatch, *task_flags(toy / "data", "llavabench"), *model_flags, "--judge-model", "m",
                 "--judge", "http://localhost:1/v1", "--reviews", tmp_path / "none/r")
    q = {"question_id": 7, "image": "a.png", "text": "Is <image> one?", "category": "random"}
    write_lines(tmp_path / "q", [q])
    with pytest.raises(UserError, match="question 7: its text has another number of <image>"):
        run_eval(monkeypatch, "--task", "pope", "--questions", tmp_path / "q", *model_flags)
    task_and_questions = task_flags(toy / "data", "pope")[:4]
    with pytest.raises(OSError, match="there is no such folder"):
        run_eval(monkeypatch, *task_and_questions, *model_flags, "--out", tmp_path / "none/a.jsonl")


def test_review_of_another_question_is_refused_before_a_request(monkeypatch, toy, tmp_path, start_judge):
    server = start_judge("1 2")
    write_lines(tmp_path / "reviews", [review(77, [1, 2])])
    with pytest.raises(UserError, match="reviews has a review of question 77, which is not asked"):
        run_eval(monkeypatch, *judge_flags(toy, tmp_path, server))
    assert not server.requests


def test_other_keys_of_a_question_file_are_not_used(tmp_path):
    write_lines(tmp_path / "q", [{"question_id": 7, "image": "a.png", "text": "Is it?", "truth": "yes",
                                  "prompt": "Else?", "file": "b.png", "message": 5}])
    assert eval.read_questions(tmp_path / "q") == [
        {"question_id": 7, "image": "a.png", "prompt": "Is it?", "category": None}]


@pytest.mark.parametrize("changed, message", [
    ("2\tWhich?\tone\ttwo\tA\tx\tmore", "row 2 has another number of cells"),
    ("2\tWhich?\tone\ttwo", "row 2 has another number of cells"),
    ("2\tWhich?\tone\ttwo\t\tx", "row 2 has no answer, but others have one")])
def test_unequal_rows_of_mmbench_are_refused(monkeypatch, tmp_path, changed, message):
    head = "index\tquestion\tA\tB\tanswer\timage\n1\tWhich?\tone\ttwo\tA\tx\n"
    (tmp_path / "m.tsv").write_text(head + changed + "\n")
    with pytest.raises(UserError, match=message):
        run_eval(monkeypatch, "--task", "mmbench", "--questions", tmp_path / "m.tsv", "--predictions", "p")


def test_answer_with_half_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "p").write_text('{"question_id": 1, "text": "\\ud83d"}\n')
    with pytest.raises(UserError, match="line 1"):
        eval.read_lines(tmp_path / "p", "question_id", "text")


def test_upload_creates_its_folder_and_allows_missing_columns(tmp_path):
    row = {"index": "1", "question": "Which?", "A": "one", "B": "two", "answer": "A", "image": "x"}
    without_answer = {name: cell for name, cell in row.items() if name != "answer"}
    questions = [eval.mmbench_question(r) | {"text": "A"} for r in (row, without_answer)]
    eval.write_mmbench_upload(tmp_path / "new/u.xlsx", questions)
    assert (tmp_path / "new/u.xlsx").exists()


# ---------------------------------------------------------------------------------------------
# Samples of the real files, with the figures of the official scorers

SAMPLES = os.environ.get("LLAVA_BENCHMARKS")
OFFICIAL_FIGURES = {
    "vqav2": {"overall": 50.93, "number": 64.71, "other": 49.17},
    "textvqa": {"accuracy": 62.10, "answers": 200},
    "pope": {"f1": 84.6860}, "mme": {"cognition": 42.5, "perception": 480.0},
    "mmbench": {"circular": 72.5, "one_pass": 81.25},
    "llavabench": {"all": 64.7, "complex": 77.6, "conv": 59.3, "detail": 47.7}}


@pytest.mark.skipif(not SAMPLES, reason="LLAVA_BENCHMARKS names no folder with samples")
@pytest.mark.parametrize("task", TASKS)
def test_real_samples_get_the_official_figures(monkeypatch, tmp_path, task):
    folder, expected = Path(SAMPLES), OFFICIAL_FIGURES[task]
    flags = [*task_flags(folder, task), "--predictions", folder / task / "answers.jsonl",
             "--json", tmp_path / "f"]
    if task == "llavabench":
        flags += ["--reviews", folder / task / "review.jsonl"]
    if task == "vqav2":
        flags += ["--upload", tmp_path / "u"]
    figures = run_eval(monkeypatch, *flags)
    assert {key: figures[key] for key in expected} == pytest.approx(expected, abs=1e-4)
    if task == "vqav2":
        upload = json.loads((tmp_path / "u").read_text())
        assert upload == json.loads((folder / task / "upload_expected.json").read_text())
