"""The benchmarks' published rules, asking, and a judge over HTTP.

    LLAVA_BENCHMARKS=FOLDER python -m pytest tests/test_benchmarks.py      # with samples of the real files

FOLDER/{task} has the files that RESULTS.md lists under "Benchmarks", answers.jsonl, and for llavabench review.jsonl.
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
    """A local endpoint that answers with `replies`, one for each request, and then with the last one. A reply
    is a text, or (status, headers, body)."""

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.drip, self.stopped = list(replies), [], 0, threading.Event()
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
        try:
            for byte in body.encode() if judge.drip else ():
                self.wfile.write(bytes([byte]))
                judge.stopped.wait(judge.drip)
            if not judge.drip:
                self.wfile.write(body.encode())
        except OSError:
            pass                             # the client does not wait any longer

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
        server.stopped.set()
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
    assert with_key["Authorization"] == "Bearer sk-secret"
    assert (other["temperature"], other["max_tokens"]) == (0, 9)


@pytest.mark.parametrize("first", [
    (429, {}, "slow down"), (500, {}, ""), (200, {}, "<html>"), (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"message": {"content": null}}]}'),
    (200, {"Content-Length": 99}, '{"choices": [{"mes')])
def test_what_fails_once_is_asked_again(judge, waits, first):
    server = judge(first, "1 2")
    assert chat(server.url, "m", MESSAGES) == "1 2"
    assert waits == [1] and len(server.requests) == 2


@pytest.mark.parametrize("reply, kind, complaint", [
    ((503, {}, "busy"), OSError, "answers 503"),
    ((200, {}, "half a li"), UserError, "does not reply with a chat")])
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


def test_a_request_that_the_endpoint_rejects_is_not_sent_again(judge, waits):
    server = judge((404, {}, "no such model"))
    with pytest.raises(UserError, match="404.*check the name of the model"):
        chat(server.url, "m", MESSAGES)
    assert len(server.requests) == 1 and waits == []


def test_a_judge_that_is_down_or_silent_is_said(judge, waits):
    server = judge("1 2")
    server.shutdown()
    with pytest.raises(OSError, match="gives no answer .*timed out"):
        chat(server.url, "m", MESSAGES, seconds=0.05)                   # accepts, and never answers
    server.server_close()
    with pytest.raises(OSError, match="gives no answer"):
        chat(server.url, "m", MESSAGES)
    assert waits == [1, 2, 4, 8] * 2


def test_a_reply_that_comes_byte_by_byte_is_given_up_in_time(judge, waits):
    server, start = judge("1 2"), eval.time.monotonic()
    server.drip = 0.05                       # a packet long before each timeout, but 4 s in all
    with pytest.raises(OSError, match="timed out"):
        chat(server.url, "m", MESSAGES, seconds=0.2)
    assert eval.time.monotonic() - start < 3 and waits == [1, 2, 4, 8]


def test_retry_after_is_followed_up_to_a_minute(judge, waits):
    assert [retry_after(header, 2) for header in ("7", "-1", "?", None)] == [7, 0, 2, 2]
    server = judge((429, {"Retry-After": 7}, ""), (503, {"Retry-After": 3600}, ""),
                   (429, {"Retry-After": "?"}, ""), "5")
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
        "pope": ("llava_pope_test.jsonl", "coco_pope_random.json", "coco_pope_popular.json",
                 "coco_pope_adversarial.json"),
        "mme": ("llava_mme.jsonl", "Your_Results" if (folder / "mme/Your_Results").exists() else "."),
        "mmbench": ("mmbench_dev_20230712.tsv",),
        "llavabench": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")}[task]
    questions, *annotations = [folder / task / name for name in files]
    words = ["--task", task, "--questions", questions, "--images",
             folder / ("mme" if task == "mme" else "val2014")]
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
    assert one == many and one["missing"] == 0
    assert one["questions"] == {"pope": 24, "mme": 16, "mmbench": 8}.get(task, 4)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "many.jsonl").read_text()
    assert run(monkeypatch, *words, "--predictions", tmp_path / "many.jsonl") == one
    assert "missing 0, questions" in capsys.readouterr().out
    keys = {"vqav2": {"overall", "yes/no", "number", "other"}, "textvqa": {"accuracy", "answers"},
            "pope": {"f1", "random", "popular", "adversarial"},
            "mme": {"perception", "cognition", "color", "code_reasoning"},
            "mmbench": {"circular", "one_pass", "categories"},
            "llavabench": {"all", "conv", "detail", "complex", "reviews"}}
    assert set(one) == keys[task] | {"missing", "questions"}
    if task == "llavabench":
        assert one["all"] == 50.0 and one["reviews"] == [50.0] and len(server.requests) == 4


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
def test_short_answers_are_normalized_as_both_evaluators_do(text, m4c, vqa):
    assert (normalize_m4c(text), normalize_vqa(text)) == (m4c, vqa)


def test_the_contraction_table_has_the_published_size():
    capital_and_unchanged = 6                # keys that can never match, and two that map to themselves
    assert len(eval.CONTRACTIONS) + capital_and_unchanged == 120


def write_vqa(folder, humans, answers: list[str]) -> list:
    write_lines(folder / "q.jsonl", [{"question_id": 7, "image": "x.jpg", "text": "Is it?"},
                                     {"question_id": 8, "image": "x.jpg", "text": "Who?"}])
    records = [{"answer": text, "answer_id": i} for i, text in enumerate(humans)]
    (folder / "a.json").write_text(json.dumps({"annotations": [
        {"question_id": i, "answer_type": "yes/no", "answers": records} for i in (7, 8)]}))
    write_lines(folder / "p.jsonl", [{"question_id": 7, "text": text} for text in answers])
    return ["--task", "vqav2", "--questions", folder / "q.jsonl", "--annotations", folder / "a.json",
            "--predictions", folder / "p.jsonl", "--json", folder / "f.json", "--upload", folder / "u.json"]


@pytest.mark.parametrize("humans, answers, overall", [
    (["yes"] * 10, ["Yes"], 50.0),           # the prediction is lower-cased; the other question is missing
    (["Yes"] * 10, ["Yes"], 0.0),            # ten equal human answers are compared with their case
    (["Yes"] * 9 + ["no"], ["yes"], 50.0), (["yes"] + ["no"] * 9, ["yes"], 15.0),
    (["a"] * 3 + ["no"] * 7, ["the"], 90.0),
    (["2"] * 2 + ["no"] * 8, ["no", "two"], 30.0)])
def test_vqav2_scores_by_the_official_rule(monkeypatch, tmp_path, capsys, humans, answers, overall):
    figures = run(monkeypatch, *write_vqa(tmp_path, humans, answers))
    assert figures == {"overall": overall, "yes/no": overall, "number": None, "other": None, "missing": 1,
                       "questions": 2}
    uploaded = json.loads((tmp_path / "u.json").read_text())
    assert uploaded == [{"question_id": 7, "answer": normalize_m4c(answers[-1])},
                        {"question_id": 8, "answer": ""}]
    assert ("the last one counts" in capsys.readouterr().out) == (len(answers) == 2)


def test_textvqa_averages_every_answer_that_is_there(monkeypatch, toy, tmp_path):
    words = flags(toy / "data", "textvqa")
    questions = [json.loads(line) for line in open(words[3])]
    right = json.loads(open(words[-1]).read())["data"][0]["answers"][0]
    prompt = questions[0]["text"].split("\n")[0]
    forms = (questions[0]["text"], f"{prompt}\nAnswer.", f"OCR tokens: x. Question: {prompt} Short answer:",
             "Reference OCR token: x\n" + prompt + "\nAnswer.")
    write_lines(tmp_path / "p", [{"question_id": questions[0]["question_id"], "prompt": form, "text": text}
                                 for form, text in zip(forms, (right, "x", "The " + right, "y"))])
    figures = run(monkeypatch, *words, "--predictions", tmp_path / "p", "--json", tmp_path / "f")
    assert figures == {"accuracy": 50.0, "answers": 4, "missing": 3, "questions": 4}


@pytest.mark.parametrize("text, yes", [
    ("No", False), ("no, it is", False), ("There is, I am not sure", False), ("No\n", True), ("NO", True),
    ("none", True),
    ("cannot", True), ("", True), (". No", True), ("Yes. No.", True), ("Well,no", True), ("a no", False)])
def test_pope_reads_answers_by_its_rule(text, yes):
    assert parse_pope(text) == yes


@pytest.mark.parametrize("text, word", [
    ("Yes.", "yes"), ("eyes", "yes"), ("know", "no"), ("not sure", "no"), ("I no", "no"), ("maybe no", "other"),
    ("", "other"), (" yes", "yes"), ("  yes", "other")])
def test_mme_reads_the_first_four_characters(text, word):
    assert parse_mme(text) == word


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("B.", "B"), ("(C) a dog", "C"), ("b", None), ("A or B", None),
    ("The answer is B because they are all red", "B"), ("Option B I think it may well be", None),
    ("a red dog", "C"), ("It is a cat", "A"), ("cat or dog", None),
    ("D", None), ("Z", None), ("Cannot determine the answer, B", None), ("A" + " x" * 9, None),
    ("cat" + " x" * 60, None)])
def test_mmbench_reads_letters_as_vlmevalkit_does(text, letter):
    assert parse_letter(text, {"A": "cat", "B": "Mouse or hare", "C": "dog"}) == letter


@pytest.mark.parametrize("content, pair", [
    ("8 7\nok", [8, 7]), ("8,7", [8, 7]), ("1e1 5", [10, 5]), ("8, 7", [-1, -1]), ("8 7 ", [-1, -1]),
    ("8/10 7/10", [-1, -1]),
    ("8\t7", [-1, -1]), ("Assistant 1: 8", [-1, -1]), ("", [-1, -1]), ("8.5 7", [8.5, 7])])
def test_verdicts_are_read_as_the_official_script_does(content, pair):
    assert parse_verdict(content) == pair


def perfect(folder, task: str) -> list[dict]:
    """Correct answers to a toy benchmark, in the order of its questions."""
    words = flags(folder, task)
    args = eval.parse_args([*map(str, words), "--predictions", "x"])
    benchmark = eval.BENCHMARKS[task]
    questions = benchmark.read(args.questions)
    truth = benchmark.read_truth(args, questions) if benchmark.read_truth else {}
    return [{"question_id": q["question_id"], "prompt": q["prompt"],
             "text": truth.get(benchmark.key(q)) or q["truth"]}
            for q in questions]


def test_pope_pairs_by_set_and_id_and_leaves_missing_answers_out(monkeypatch, toy, tmp_path, capsys):
    answers = perfect(toy / "data", "pope")
    answers[0]["text"], answers[8]["text"] = "No", "yes and no"          # adversarial, random: yes -> no
    doubled = [answers[1] | {"text": "Yes"}, *answers[::-1][:-3], answers[1],
               answers[0]]     # question 3 is missing
    write_lines(tmp_path / "p", doubled)
    figures = run(monkeypatch, *flags(toy / "data", "pope"), "--predictions", tmp_path / "p", "--json",
                  tmp_path / "f")
    assert figures["adversarial"] == {"tp": 2, "fp": 0, "tn": 4, "fn": 1, "accuracy": 6 / 7, "precision": 1.0,
                                      "recall": 2 / 3, "f1": 0.8, "yes_ratio": 2 / 7}
    assert [figures["random"][key] for key in ("tp", "fp", "tn", "fn")] == [3, 0, 4, 1]
    assert figures["popular"]["f1"] == 1 and figures["missing"] == 1
    assert figures["f1"] == pytest.approx(100 * (0.8 + 6 / 7 + 1) / 3, abs=1e-9)
    assert "1 questions have more than one answer; the last one counts" in capsys.readouterr().out


def test_mme_scores_images_and_questions(monkeypatch, toy, tmp_path):
    answers = perfect(toy / "data", "mme")
    answers[0]["text"], answers[1]["text"], answers[2]["text"] = "Maybe yes", "Know", "Eyes"
    write_lines(tmp_path / "p", [answers[5], *answers[:5], *answers[6:14]])
    figures = run(monkeypatch, *flags(toy / "data", "mme"), "--predictions", tmp_path / "p", "--json",
                  tmp_path / "f")
    assert figures["color"] == {"acc": 87.5, "acc_plus": 75.0,
                                "score": 162.5} and figures["perception"] == 162.5
    assert figures["code_reasoning"]["score"] == 200 == figures["cognition"] and figures["missing"] == 2
    write_lines(tmp_path / "p", answers[:-1])
    with pytest.raises(UserError, match="two answers for each image, but code_reasoning/.* has 1"):
        run(monkeypatch, *flags(toy / "data", "mme"), "--predictions", tmp_path / "p")


def test_mme_takes_its_truth_from_templates_as_well(monkeypatch, toy, tmp_path):
    templates = tmp_path / "mme" / "Your_Results"
    templates.mkdir(parents=True)
    questions = [json.loads(line) for line in open(toy / "data/mme/llava_mme.jsonl")]
    write_lines(tmp_path / "mme/llava_mme.jsonl", questions)
    answers = perfect(toy / "data", "mme")
    for q, answer in zip(questions, answers):
        task, image = q["image"].split("/")
        with open(templates / f"{task}.txt", "a") as lines:
            text = q["text"].split("\n")[0] + "  Please answer yes or no."
            lines.write(f"{image}\t{text}\t{answer['text'].upper()}\n")
    assert perfect(tmp_path, "mme") == answers


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(monkeypatch, toy, tmp_path):
    answers = perfect(toy / "data", "mmbench")
    answers[1]["text"] = "Z"
    write_lines(tmp_path / "p", [answers[7] | {"text": "E"}, *answers[:6], answers[7]])
    words = [*flags(toy / "data", "mmbench"), "--predictions", tmp_path / "p", "--json", tmp_path / "f"]
    figures = run(monkeypatch, *words, "--upload", tmp_path / "u.xlsx")
    assert figures == {"circular": 50.0, "one_pass": 75.0, "categories": {"coarse": 50.0, "fine": 50.0},
                       "missing": 1, "questions": 8}
    openpyxl = pytest.importorskip("openpyxl")
    header, *rows = openpyxl.load_workbook(tmp_path / "u.xlsx").active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert [row[0] for row in rows] == [i + k for i in (1, 2, 3, 4) for k in (0, 10**6)]
    assert [row[6] for row in rows] == [a["text"] for a in answers[:6]] + [None, answers[7]["text"]]


def test_mmbench_cells_keep_every_character_and_empty_cells(monkeypatch, tmp_path):
    (tmp_path / "t.tsv").write_text("index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
                                    '3\t"a ""b"" <c> & d\n e"\tNA\t one\ttwo\tNone\tthree\tB\tAAAA\n')
    (q,) = eval.read_mmbench([tmp_path / "t.tsv"])
    assert q["prompt"] == 'a "b" <c> & d\n e\nA.  one\nB. two' and q["question_id"] == 3
    eval.write_mmbench_upload(tmp_path / "u.xlsx", [q | {"text": "x\x01\ry"}])
    openpyxl = pytest.importorskip("openpyxl")
    row = list(openpyxl.load_workbook(tmp_path / "u.xlsx").active.iter_rows(values_only=True))[1]
    assert row == (3, 'a "b" <c> & d\n e', " one", "two", None, "three", "x\ry", "B")


# ---------------------------------------------------------------------------------------------
# LLaVA-Bench and its judge


def review(i: int, pair: list, category: str | None = "llava_bench_conv") -> dict:
    return {"question_id": i, "tuple": pair} | ({"category": category} if category else {})


def test_reviews_are_scored_with_the_official_roundings(monkeypatch, tmp_path):
    write_lines(tmp_path / "a", [review(0, [9, 7]), review(1, [8, -1], "detail"), review(2, [7, 5.5])])
    write_lines(tmp_path / "b", [review(0, [3, 1]), {"question_id": 1, "score": [1, 1]}])
    figures = run(monkeypatch, "--task", "llavabench", "--reviews", tmp_path / "a", tmp_path / "b", "--json",
                  tmp_path / "f")
    assert figures == {"all": (47.9 + 50) / 2, "conv": (78.1 + 33.3) / 2, "detail": -12.5,
                       "reviews": [47.9, 50.0],
                       "missing": 1, "questions": 3}


def judging(toy, tmp_path, server, name="m") -> list:
    words = flags(toy / "data", "llavabench")
    questions = [json.loads(line) for line in open(words[3])]
    write_lines(tmp_path / "p", [{"question_id": q["question_id"], "prompt": q["text"],
                                  "text": "An answer."} for q in questions])
    return [*words, "--predictions", tmp_path / "p", "--judge", server.url, "--judge-model", name,
            "--reviews", tmp_path / "reviews", "--json", tmp_path / "f"]


def test_the_judge_gets_the_official_request(monkeypatch, toy, tmp_path, judge):
    server = judge("8 4\nBecause.")
    run(monkeypatch, *judging(toy, tmp_path, server))
    content = server.requests[1][2]["messages"][1]["content"]
    context = json.loads((toy / "data/llavabench/context.jsonl").read_text().split("\n")[1])
    described = context["caption"]           # which the toy form also takes as the reference answer
    assert content.startswith(f"[Context]\n{described}\n\n[Question]\nDescribe this image.\n\n[Assistant 1]\n"
                              f"{described}\n\n[End of Assistant 1]\n\n[Assistant 2]\nAn answer.\n\n"
                              "[End of Assistant 2]\n\n[System]\n")
    stored = [json.loads(line) for line in (tmp_path / "reviews").read_text().splitlines()]
    assert stored[1]["category"] == "llava_bench_detail"
    assert stored[1]["tuple"] == [8, 4] and stored[1]["id"] == 2


def test_coco_contexts_list_captions_and_boxes(tmp_path):
    context = {"captions": ["A dog.", "One dog."], "instances": [{"category": "dog",
                                                                  "bbox": [0.1, 0.2, 0.3, 0.4]}]}
    write_lines(tmp_path / "c", [context | {"image": "x.jpg"}])
    write_lines(tmp_path / "r", [{"question_id": 1, "text": "A dog."}])
    q = {"question_id": 1, "prompt": "What?", "image": "x.jpg", "category": "conv"}
    truth = eval.read_llavabench(eval.Args(annotations=[tmp_path / "c", tmp_path / "r"]), [q])["1"]
    content = eval.judge_messages(q | {"truth": truth}, "Cat.")[1]["content"]
    assert content.startswith("[Context]\nA dog.\nOne dog.\n\ndog: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\n")
    assert "fractions" in content and truth["category"] == "conv"


def test_judging_goes_on_after_a_failure_and_refuses_other_answers(monkeypatch, toy, tmp_path, judge):
    server = judge("8 4", "nonsense", *[(500, {}, "")] * 5, "6 6")
    words = judging(toy, tmp_path, server)
    with pytest.raises(OSError, match="answers 500"):
        run(monkeypatch, *words)
    stored = (tmp_path / "reviews").read_text()
    assert [json.loads(line)["tuple"] for line in stored.splitlines()] == [[8, 4], [-1, -1]]
    with open(tmp_path / "reviews", "a") as file:
        file.write('{"question_id": 2, "id')
    figures = run(monkeypatch, *words)
    assert len(server.requests) == 9 and (tmp_path / "reviews").read_text().startswith(stored)
    assert figures["reviews"] == [round(100 * 3.75 / 4.75, 1)] and figures["missing"] == 0
    assert run(monkeypatch, *words) == figures and len(server.requests) == 9
    with pytest.raises(UserError, match="by another judge or of another answer"):
        run(monkeypatch, *judging(toy, tmp_path, server, "another"))


# ---------------------------------------------------------------------------------------------
# Bad input


def entry(i, text="yes", **more) -> dict:
    return {"question_id": i, "text": text} | more


@pytest.mark.parametrize("task, answers, complaint", [
    ("pope", [entry(99)], "answers question 99, which --questions lacks"),
    ("pope", [{"question_id": 1}], "line 1: not"), ("mme", [entry("color/x.jpg", prompt="?")], "color/x.jpg"),
    ("mme", [entry("color/x.jpg")], "has no prompt"),
    ("textvqa", [entry("x", prompt="one\ntwo\nthree")], "none of TextVQA's four forms")])
def test_answers_to_other_questions_are_refused(monkeypatch, toy, tmp_path, task, answers, complaint):
    write_lines(tmp_path / "p", answers)
    with pytest.raises(UserError, match=complaint):
        run(monkeypatch, *flags(toy / "data", task), "--predictions", tmp_path / "p")


def test_doubled_answers_to_llavabench_are_refused(monkeypatch, toy, tmp_path, judge):
    words = judging(toy, tmp_path, judge("1 2"))
    write_lines(tmp_path / "p", [entry(0), entry(0)])
    with pytest.raises(UserError, match="line 2: question 0 was answered before"):
        run(monkeypatch, *words)


def test_labels_of_another_revision_are_refused(monkeypatch, toy, tmp_path):
    words = flags(toy / "data", "pope")
    lines = [json.loads(line) for line in open(words[-1])]
    for changed in (lines[:-1], [lines[1], lines[0], *lines[2:]]):
        write_lines(tmp_path / "coco_pope_adversarial.json", changed)
        write_lines(tmp_path / "p", [entry(1)])
        with pytest.raises(UserError, match="labels other questions"):
            run(monkeypatch, *words[:-1], tmp_path / "coco_pope_adversarial.json", "--predictions",
                tmp_path / "p")
    with pytest.raises(UserError, match="lacks question"):
        run(monkeypatch, *words[:-1], "--predictions", tmp_path / "p")


def test_other_than_ten_human_answers_are_refused(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="question 7 has 9 human answers"):
        run(monkeypatch, *write_vqa(tmp_path, ["yes"] * 9, ["yes"]))


def test_a_question_without_its_image_is_named_before_the_model_opens(monkeypatch, toy, tmp_path):
    words = flags(toy / "data", "pope")
    words[words.index("--images") + 1] = tmp_path
    with pytest.raises(OSError, match="question 1: there is no image"):
        run(monkeypatch, *words, "--model", "nowhere", "--out", tmp_path / "a")


def test_answers_to_another_task_are_not_continued(monkeypatch, toy, tmp_path):
    asking = ["--model", toy / "model", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 2,
              "--limit", 2,
              "--out", tmp_path / "a"]
    run(monkeypatch, *flags(toy / "data", "pope"), *asking)
    with pytest.raises(UserError, match="another task"):
        run(monkeypatch, *flags(toy / "data", "mme"), *asking)
    with pytest.raises(UserError, match="another blank"):
        run(monkeypatch, *flags(toy / "data", "pope"), *asking, "--blank")


@pytest.mark.parametrize("words", [
    ["--task", "pope"], ["--task", "pope", "--scienceqa", "x"], ["--task", "pope", "--cost"],
    ["--task", "pope", "--questions", "q", "--predictions", "p"],
    ["--task", "pope", "--questions", "q", "--model", "m"],
    ["--task", "pope", "--questions", "q", "--predictions", "p", "--annotations", "a", "--upload", "u"],
    ["--task", "llavabench", "--questions", "q", "--predictions", "p"],
    ["--task", "llavabench", "--questions", "q", "--predictions", "p", "--judge-model", "m", "--reviews",
     "a", "b"],
    ["--task", "vqav2", "--questions", "q", "--predictions", "p", "--annotations", "a", "--reviews", "r"],
    ["--task", "vqav2", "--questions", "q", "--predictions", "p", "--annotations", "a", "--split", "val"],
    ["--task", "llavabench", "--questions", "q", "--model", "m", "--reviews", "r"],
    ["--scienceqa", "d", "--predictions", "p", "--upload", "u"], ["--cost", "--wording", "letter"]])
def test_misuse_exits_with_2(monkeypatch, words):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    assert stopped.value.code == 2


# ---------------------------------------------------------------------------------------------
# Samples of the real files, with the figures of the official scorers

SAMPLES = os.environ.get("LLAVA_BENCHMARKS")
FIGURES = {
    "vqav2": {"overall": 50.93, "number": 64.71, "other": 49.17},
    "textvqa": {"accuracy": 62.10, "answers": 200},
    "pope": {"f1": 84.6860}, "mme": {"cognition": 42.5, "perception": 480.0},
    "mmbench": {"circular": 72.5, "one_pass": 81.25},
    "llavabench": {"all": 64.7, "complex": 77.6, "conv": 59.3, "detail": 47.7}}


@pytest.mark.skipif(not SAMPLES, reason="LLAVA_BENCHMARKS names no folder with samples")
@pytest.mark.parametrize("task", TASKS)
def test_the_samples_get_the_official_figures(monkeypatch, tmp_path, task):
    folder = Path(SAMPLES)
    words = [*flags(folder, task), "--predictions", folder / task / "answers.jsonl", "--json", tmp_path / "f"]
    if task == "llavabench":
        words += ["--reviews", folder / task / "review.jsonl"]
    if task == "vqav2":
        words += ["--upload", tmp_path / "u"]
    figures = run(monkeypatch, *words)
    assert {key: figures[key] for key in FIGURES[task]} == pytest.approx(FIGURES[task], abs=1e-4)
    if task == "vqav2":
        expected = json.loads((folder / task / "upload_expected.json").read_text())
        assert json.loads((tmp_path / "u").read_text()) == expected


def test_a_file_without_reviews_is_refused(monkeypatch, tmp_path):
    (tmp_path / "reviews.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no review"):
        run(monkeypatch, "--task", "llavabench", "--reviews", tmp_path / "reviews.jsonl")


def test_images_outside_of_their_folder_are_refused(monkeypatch, toy, tmp_path):
    for name in ("../a.jpg", str(tmp_path / "a.jpg")):
        write_lines(tmp_path / "q.jsonl", [{"question_id": 1, "image": name, "text": "Is it?", "category": "random"}])
        with pytest.raises(UserError, match="is outside of"):
            run(monkeypatch, "--task", "pope", "--questions", tmp_path / "q.jsonl", "--model", "none", "--images",
                tmp_path)


def test_mistakes_show_before_the_model_opens(monkeypatch, toy, tmp_path):
    words = flags(toy / "data", "pope")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(eval, "load_model", lambda args: pytest.fail("the model opens"))
    ask = ["--model", "none", "--images", tmp_path]
    with pytest.raises(UserError, match="name an endpoint"):
        run(monkeypatch, *flags(toy / "data", "llavabench"), *ask, "--judge-model", "m", "--reviews", tmp_path / "r")
    write_lines(tmp_path / "q", [{"question_id": 7, "image": "a.png", "text": "Is <image> one?", "category": "random"}])
    with pytest.raises(UserError, match="question 7: its text has another number of <image>"):
        run(monkeypatch, "--task", "pope", "--questions", tmp_path / "q", *ask)
    with pytest.raises(OSError, match="there is no such folder"):
        run(monkeypatch, *words[:4], *ask, "--out", tmp_path / "none/a.jsonl")


def test_half_of_a_surrogate_pair_in_a_line_is_refused(tmp_path):
    (tmp_path / "p").write_text('{"question_id": 1, "text": "\\ud83d"}\n')
    with pytest.raises(UserError, match="line 1"):
        eval.read_lines(tmp_path / "p", "question_id", "text")


def test_an_upload_gets_a_folder_and_cells_that_a_file_lacks_stay_empty(tmp_path):
    row = {"index": "1", "question": "Which?", "A": "one", "B": "two", "answer": "A", "image": "x"}
    questions = [eval.mmbench_question(r) | {"text": "A"} for r in (row, {k: v for k, v in row.items() if k != "answer"})]
    eval.write_mmbench_upload(tmp_path / "new/u.xlsx", questions)
    assert (tmp_path / "new/u.xlsx").exists()
