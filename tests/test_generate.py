"""Tests of prune.py --expand and --generate: records, requests, checks of replies, resuming and errors."""

import json
import multiprocessing
import random
import shutil
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import eval
import prune
import train
from llava import command_line
from prune import INSTRUCTIONS, check_reply, make_request, read_replies
from tests import toy
from tests.toy import Teacher, write_coco

torch.set_num_threads(1)
real_sleep = time.sleep                      # the fixture `teacher` replaces time.sleep for eval.chat
GOOD_REPLY = "Question:\nWhat is it?\n===\nAnswer:\nIt is red."


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder / "toy", size=40)
    return folder / "toy"


@pytest.fixture
def teacher(monkeypatch):
    """A running toy.Teacher. time.sleep is replaced: it appends the seconds to `waits` and returns."""
    server = Teacher()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.waits = []
    monkeypatch.setattr(eval.time, "sleep", server.waits.append)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def run_program(monkeypatch, program, *flags) -> None:
    """Run one of the programs in this process with these flags."""
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, flags)])
    command_line(program.main)


def generate_flags(coco, out, kind, *flags) -> list:
    """The flags of prune.py --generate."""
    return ["--generate", kind, "--captions", coco / "captions_train2014.json", "--judge-model", "toy",
            "--boxes", coco / "instances_train2014.json", "--out", out, *flags]


def run_generate(monkeypatch, coco, out, kind, *flags) -> None:
    run_program(monkeypatch, prune, *generate_flags(coco, out, kind, *flags))


def read_jsonl(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------
# Naive expansion


@pytest.mark.parametrize("style, count", (("brief", 11), ("detailed", 16)))
def test_expand_gives_each_caption_a_random_instruction(monkeypatch, coco, tmp_path, style, count):
    captions, out = coco / "captions_train2014.json", tmp_path / "a.json"
    flags = ("--expand", captions, "--out", out, "--style", style)
    run_program(monkeypatch, prune, *flags)
    records, content_before = json.loads(out.read_text()), out.read_bytes()
    content = json.loads(captions.read_text())
    assert [(r["id"], r["image"], r["conversations"][1]["value"]) for r in records] == [
        (str(e["image_id"]), f"{e['image_id']:06}.png", e["caption"]) for e in content["annotations"]]
    questions = [r["conversations"][0]["value"] for r in records]
    assert len(set(INSTRUCTIONS[style])) == count
    assert {text.replace("<image>", "").strip() for text in questions} == set(INSTRUCTIONS[style])
    assert 30 < sum(text.startswith("<image>\n") for text in questions) < 90
    assert all(text.startswith("<image>\n") != text.endswith("\n<image>") for text in questions)
    run_program(monkeypatch, prune, *flags)
    assert out.read_bytes() == content_before
    run_program(monkeypatch, prune, *flags, "--seed", 1)
    assert out.read_bytes() != content_before


def test_expand_reads_a_list_of_pairs_and_applies_limit(monkeypatch, tmp_path):
    pairs = [{"image": f"00/{i}.jpg", "caption": f" scene\n{i} "} for i in range(5)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    flags = ("--expand", tmp_path / "pairs.json", "--out", tmp_path / "a.json", "--limit", 2)
    run_program(monkeypatch, prune, *flags)
    records = json.loads((tmp_path / "a.json").read_text())
    assert [(r["id"], r["image"], r["conversations"][1]["value"]) for r in records] == [
        ("00/0", "00/0.jpg", "scene 0"), ("00/1", "00/1.jpg", "scene 1")]


@pytest.mark.parametrize("flags", ["--expand {0} --out {0}", "--generate detail --captions {0} --boxes b "
                                   "--judge-model m --out {0}"])
def test_input_is_not_overwritten(monkeypatch, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as error:
        run_program(monkeypatch, prune, *flags.format(tmp_path / "pairs.json").split())
    assert error.value.code == 2 and "would be overwritten" in capsys.readouterr().err


def test_output_that_is_a_folder_is_named_before_the_work(monkeypatch, tmp_path):
    message = error_of(monkeypatch, "--expand", tmp_path / "missing", "--out", tmp_path)
    assert message == f"prune.py: {tmp_path} is a folder, not the name of a file to write"


def test_expand_leaves_out_captions_that_contain_the_image_token(monkeypatch, tmp_path, capsys):
    pairs = [{"image": "0.jpg", "caption": "A <image> tag."}, {"image": "0.jpg", "caption": "A dog."}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    run_program(monkeypatch, prune, "--expand", tmp_path / "pairs.json", "--out", tmp_path / "a.json")
    assert len(json.loads((tmp_path / "a.json").read_text())) == 1
    assert "left out 1 captions that contain <image>" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# Requests to the teacher


def test_request_has_captions_then_boxes_scaled_to_0_1(tmp_path):
    images = [{"id": 7, "file_name": "7.jpg", "width": 640, "height": 480}]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": [
        {"image_id": 7, "caption": "A dog sits. "}, {"image_id": 7, "caption": "A dog\non a sofa."}]}))
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": [
        {"image_id": 7, "category_id": 3, "bbox": [64.0, 48.5, 320.25, 240.0]},
        {"image_id": 7, "category_id": 9, "bbox": [-0.4, 0.0, 640.8, 480.0]}],
        "categories": [{"id": 3, "name": "dog"}, {"id": 9, "name": "couch"}]}))
    args = SimpleNamespace(captions=tmp_path / "captions.json", boxes=tmp_path / "boxes.json", limit=None,
                           generate="reasoning", judge_model="toy")
    [(image_id, file, _, body)], left_out = prune.read_images(args)
    assert (image_id, file, left_out) == ("7", "7.jpg", [])
    assert body["messages"][-1] == {"role": "user", "content": (
        "A dog sits.\nA dog on a sofa.\n\n"
        "dog: [0.1, 0.101, 0.6, 0.601]\ncouch: [0.0, 0.0, 1.0, 1.0]")}


def test_conversation_request_has_boxes_only_if_given():
    for boxes, lines in ((None, []), ("boxes.json", ["dog: [0.1, 0.2, 0.3, 0.4]"])):
        args = SimpleNamespace(generate="conversation", judge_model="toy", boxes=boxes)
        messages = make_request(args, ["A dog sits."], lines)[1]["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
        for user_message in messages[1::2]:
            assert (": [" in user_message["content"]) == bool(boxes)


def test_example_replies_pass_check_reply():
    for kind, text in prune.EXAMPLE_REPLIES.items():
        pairs, reason = check_reply(kind, text, [])
        assert not reason and len(pairs) == {"conversation": 2, "detail": 1, "reasoning": 1}[kind]


def test_request_key_depends_on_prompt_model_and_settings(monkeypatch):
    args = SimpleNamespace(generate="conversation", judge_model="toy", boxes=None)
    keys = [make_request(args, ["A dog sits."], [])[0], make_request(args, ["A cat sits."], [])[0]]
    for change in ({"judge_model": "other"}, {"generate": "detail"}):
        keys.append(make_request(SimpleNamespace(**vars(args) | change), ["A dog sits."], [])[0])
    monkeypatch.setitem(prune.SAMPLING, "temperature", 0.7)
    keys.append(make_request(args, ["A dog sits."], [])[0])
    assert len(set(keys)) == 5


# ---------------------------------------------------------------------------------------------
# Generated records and rejected replies


def test_generated_records_are_valid_training_data(monkeypatch, coco, teacher, tmp_path, capsys):
    model = toy.write_random(tmp_path / "model")
    for kind in ("conversation", "detail", "reasoning"):
        out = tmp_path / f"{kind}.json"
        run_generate(monkeypatch, coco, out, kind, "--judge", teacher.url, "--limit", 12)
        records = json.loads(out.read_text())
        assert [r["id"] for r in records] == [str(i) for i in range(1, 13)]
        assert [r["image"] for r in records] == [f"{i:06}.png" for i in range(1, 13)]
        speakers = ["human", "gpt"] * (3 if kind == "conversation" else 1)
        assert all([t["from"] for t in r["conversations"]] == speakers for r in records)
        assert all("".join(t["value"] for t in r["conversations"]).count("<image>") == 1 for r in records)
        assert all("<image>" in r["conversations"][0]["value"] for r in records)
        questions = {r["conversations"][0]["value"].replace("<image>", "").strip() for r in records}
        assert (questions <= set(INSTRUCTIONS["detailed"])) == (kind == "detail")
        assert not out.with_suffix(".rejected.jsonl").read_text()
        flags = ("--stage", 2, "--init", model, "--data", out, "--images", coco / "train2014",
                 "--out", tmp_path / kind, "--epochs", 1, "--batch-size", 4)
        run_program(monkeypatch, train, "--check-data", *flags)
        assert json.loads((tmp_path / kind / "check.json").read_text())["wrong"] == []
        capsys.readouterr()
        run_program(monkeypatch, train, "--show", 0, *flags)
        text = capsys.readouterr().out
        for turn in records[0]["conversations"][1::2]:
            assert "\x1b[32m" in text and turn["value"].split()[-1].rstrip(".") in text
        run_program(monkeypatch, train, *flags)
        assert len((tmp_path / kind / "log.jsonl").read_text().splitlines()) == 3
    assert len(teacher.prompts) == 3 * 12


@pytest.mark.parametrize("kind, text, reason", (
    ("conversation", GOOD_REPLY, ""),
    ("conversation", GOOD_REPLY + "\n===\n" + GOOD_REPLY + "\n===\n", ""),
    ("conversation", GOOD_REPLY + "\n===\nQuestion:\nWhat else?", "an odd number of blocks"),
    ("conversation", "", "an empty reply"),
    ("conversation", "Question:\n\n===\nAnswer:\nIt is red.", "an empty part"),
    ("conversation", "Question:\nWhat is it?\n===\nAnswer:\n", "an empty part"),
    ("conversation", "Question: What is it?\n===\nAnswer: It is red.", "blocks that are not"),
    ("conversation", "Answer:\nRed.\n===\nQuestion:\nWhat is it?", "blocks that are not"),
    ("conversation", "Question:\nWhat is it?\nAnswer:\nRed.\n===\nAnswer:\nBlue.", "blocks that are not"),
    ("conversation", "It is red.\n===\nAnswer:\nIt is red.", "blocks that are not"),
    ("conversation", GOOD_REPLY.replace("It is red.", "A dog on a sofa."), "repeats the prompt"),
    ("conversation", GOOD_REPLY.replace("It is red.", "The caption says red."), "mentions captions"),
    ("conversation", GOOD_REPLY.replace("It is red.", "Its bounding box is large."), "mentions captions"),
    ("conversation", GOOD_REPLY.replace("It is red.", "It is at 0.1, 0.25."), "prints coordinates"),
    ("conversation", GOOD_REPLY.replace("It is red.", "It is at [0, 1, 1, 1]."), "prints coordinates"),
    ("conversation", GOOD_REPLY.replace("It is red.", "<image> shows red."), "contains <image>"),
    ("reasoning", GOOD_REPLY, ""),
    ("reasoning", GOOD_REPLY + "\n===\n" + GOOD_REPLY, "more than one question"),
    ("detail", "It is red.\n\nIt costs 1.50, 2.50 or 12.50, 0.75 more.", ""),
    ("detail", GOOD_REPLY, "blocks in a description"),
    ("detail", " \n", "an empty part"),
    ("detail", None, "no reply"),
))
def test_check_reply_gives_a_reason_for_each_bad_reply(kind, text, reason):
    prompt = [{"role": "system", "content": "Write."},
              {"role": "user", "content": "A dog on a sofa.\nWhat is it?"}]
    pairs, found = check_reply(kind, text, prompt)
    assert found.startswith(reason) and bool(found) == bool(reason)
    if not found:
        assert all(answer for _, answer in pairs)


def test_rejected_replies_are_listed_and_counted(monkeypatch, coco, teacher, tmp_path, capsys):
    teacher.edit = lambda text: text.replace("color", "caption") if "blue" in text else text
    out = tmp_path / "a.json"
    run_generate(monkeypatch, coco, out, "detail", "--judge", teacher.url)
    rejected = read_jsonl(tmp_path / "a.rejected.jsonl")
    kept = json.loads(out.read_text())
    assert len(rejected) > 3 and all("blue" in r["text"] for r in rejected)
    assert {r["reason"] for r in rejected} == {"mentions captions or bounding boxes"}
    assert {r["id"] for r in rejected} | {r["id"] for r in kept} == {str(i) for i in range(1, 41)}
    text = capsys.readouterr().out
    assert f"{len(kept)} records of 40 images; {len(rejected)} rejected" in text
    assert f"{len(rejected):8} mentions captions or bounding boxes" in text


# ---------------------------------------------------------------------------------------------
# Resuming and batch files


def test_rerun_sends_only_requests_without_reply(monkeypatch, coco, teacher, tmp_path):
    out, judge = tmp_path / "a.json", ("--judge", teacher.url)
    run_generate(monkeypatch, coco, out, "detail", *judge, "--limit", 10)
    assert len(teacher.prompts) == 10
    assert {r["finish_reason"] for r in read_jsonl(tmp_path / "a.replies.jsonl")} == {"stop"}
    run_generate(monkeypatch, coco, out, "detail", *judge, "--limit", 15)
    assert len(teacher.prompts) == len(set(teacher.prompts)) == 15
    with (tmp_path / "a.replies.jsonl").open("a") as file:
        file.write('{"key": "cut of')
    run_generate(monkeypatch, coco, out, "detail", *judge, "--limit", 15)
    assert len(teacher.prompts) == 15 and len(read_jsonl(tmp_path / "a.replies.jsonl")) == 15
    run_generate(monkeypatch, coco, out, "reasoning", *judge, "--limit", 15)
    assert len(teacher.prompts) == 30


def test_kill_loses_no_reply_and_repeats_only_requests_in_flight(monkeypatch, teacher, tmp_path):
    kills, workers, rng = 3, 4, random.Random(0)
    write_coco(tmp_path / "coco", size=300, images=False)
    flags = ("detail", "--judge", teacher.url, "--workers", workers)
    run_generate(monkeypatch, tmp_path / "coco", tmp_path / "uninterrupted.json", *flags)
    total = len(teacher.prompts)
    assert total == len(set(teacher.prompts)) > 250
    argv = [str(flag) for flag in generate_flags(tmp_path / "coco", tmp_path / "a.json", *flags)]
    monkeypatch.setattr(sys, "argv", ["prune.py", *argv])
    key_of_prompt = {body["messages"][-1]["content"]: key
                     for *_, key, body in prune.read_images(prune.parse_args(argv))[0]}
    replies = tmp_path / "a.replies.jsonl"
    teacher.prompts.clear()
    for _ in range(kills):
        recorded = read_replies(replies) if replies.exists() else {}
        begin = len(teacher.prompts)
        process = multiprocessing.get_context("fork").Process(target=prune.main)
        process.start()
        end = begin + rng.randint(20, 60)
        while len(teacher.prompts) < end and process.is_alive():
            real_sleep(0.001)
        process.kill()
        process.join()
        real_sleep(0.1)                           # requests sent before the kill may still arrive
        assert process.exitcode == -9
        assert not recorded.keys() & {key_of_prompt[prompt] for prompt in teacher.prompts[begin:]}
    recorded, begin = read_replies(replies), len(teacher.prompts)
    assert begin - kills * workers <= len(recorded) < total
    prune.main()
    assert not recorded.keys() & {key_of_prompt[prompt] for prompt in teacher.prompts[begin:]}
    assert len(set(teacher.prompts)) == total >= len(teacher.prompts) - kills * workers
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "uninterrupted.json").read_bytes()


def test_batch_file_is_written_and_its_results_are_read(monkeypatch, coco, teacher, tmp_path):
    out, batch = tmp_path / "a.json", tmp_path / "batch.jsonl"
    run_generate(monkeypatch, coco, out, "reasoning", "--batch", batch)
    assert not teacher.prompts and not out.exists()
    entries = read_jsonl(batch)
    assert len({e["custom_id"] for e in entries}) == 40
    assert {(e["method"], e["url"]) for e in entries} == {("POST", "/v1/chat/completions")}
    results = []
    for e in entries[1:]:
        text = toy.make_reply(e["body"]["messages"][0]["content"], e["body"]["messages"][-1]["content"])
        body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        results.append({"custom_id": e["custom_id"], "response": {"status_code": 200, "body": body}})
    results.append({"custom_id": entries[0]["custom_id"], "response": None, "error": {"message": "expired"}})
    results[-2]["response"]["body"]["choices"][0]["finish_reason"] = "length"
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))
    replies, retry = ("--replies", tmp_path / "results.jsonl"), tmp_path / "retry.jsonl"
    run_generate(monkeypatch, coco, tmp_path / "c.json", "reasoning", *replies, "--batch", retry)
    assert [e["custom_id"] for e in read_jsonl(retry)] == [entries[0]["custom_id"]]      # the failed request
    run_generate(monkeypatch, coco, out, "reasoning", *replies)
    assert not teacher.prompts
    assert [r["id"] for r in json.loads(out.read_text())] == [str(i) for i in range(2, 40)]
    rejected = read_jsonl(tmp_path / "a.rejected.jsonl")
    assert [(r["id"], r["reason"]) for r in rejected] == [("1", "no reply"), ("40", "cut off at max_tokens")]
    content_before = out.read_bytes()
    run_generate(monkeypatch, coco, out, "reasoning", "--judge", teacher.url)
    assert len(teacher.prompts) == 1                                      # the failed request
    run_generate(monkeypatch, coco, tmp_path / "b.json", "reasoning", "--judge", teacher.url)
    records = json.loads((tmp_path / "b.json").read_text())
    assert json.loads(out.read_text()) == records[:-1] != json.loads(content_before)


def test_replies_to_other_requests_keep_the_earlier_records(monkeypatch, coco, teacher, tmp_path):
    out = tmp_path / "a.json"
    run_generate(monkeypatch, coco, out, "detail", "--judge", teacher.url, "--limit", 3)
    before = out.read_bytes()
    (tmp_path / "wrong").write_text('{"key": "x", "text": "A dog."}\n')
    message = error_of(monkeypatch, *generate_flags(coco, out, "reasoning", "--replies", tmp_path / "wrong"))
    assert "wrong has no reply to these requests" in message and out.read_bytes() == before


def test_dry_run_prints_the_first_request_and_the_total(monkeypatch, coco, teacher, tmp_path, capsys):
    flags = generate_flags(coco, tmp_path / "a.json", "detail", "--judge", teacher.url)
    run_program(monkeypatch, prune, *flags, "--dry-run")
    first, text = capsys.readouterr().out.split("\n", 1)
    assert first.startswith("40 requests, ") and not teacher.prompts
    body = json.loads(text)
    assert body["model"] == "toy" and ": [" in body["messages"][-1]["content"]
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------
# Bad input


def error_of(monkeypatch, *flags) -> str:
    """Run prune.py, which must exit with a message of one line, and return the message."""
    with pytest.raises(SystemExit) as error:
        run_program(monkeypatch, prune, *flags)
    assert "\n" not in error.value.code
    return error.value.code


@pytest.mark.parametrize("status, complaint", ((401, "refuses the request"), (429, "answers 429")))
def test_endpoint_errors_keep_earlier_replies(monkeypatch, coco, teacher, tmp_path, status, complaint):
    flags = generate_flags(coco, tmp_path / "a.json", "detail", "--judge", teacher.url, "--workers", 1)

    def fail_after_seven_requests(text):
        teacher.status = 200 if len(teacher.prompts) <= 7 else status
        return text

    teacher.edit = fail_after_seven_requests
    assert complaint in error_of(monkeypatch, *flags)
    assert len(teacher.prompts) == (7 + 1 if status == 401 else 7 + 5), "401 is not repeated"
    assert len(read_replies(tmp_path / "a.replies.jsonl")) == 7 and not (tmp_path / "a.json").exists()


def test_truncated_reply_or_missing_endpoint_exits_with_one_sentence(monkeypatch, coco, teacher, tmp_path):
    class TruncatedReply(str):
        def encode(self, *_):
            return b'{"choices": [{"mess'

    def truncate_replies(value, original_dumps=json.dumps, **options):
        if "choices" in str(value)[:20]:
            return TruncatedReply()
        return original_dumps(value, **options)

    monkeypatch.setattr(toy.json, "dumps", truncate_replies)
    flags = generate_flags(coco, tmp_path / "a.json", "detail", "--limit", 1, "--judge")
    assert "does not reply with a chat completion" in error_of(monkeypatch, *flags, teacher.url)
    assert "is it running?" in error_of(monkeypatch, *flags, "http://127.0.0.1:9/v1")
    assert "OPENAI_BASE_URL" in error_of(monkeypatch, *flags[:-1])


def test_images_without_captions_or_boxes_are_rejected(monkeypatch, coco, teacher, tmp_path, capsys):
    folder = shutil.copytree(coco, tmp_path / "coco")
    for name, field, removed in (("captions", "annotations", 3), ("instances", "images", 5),
                                 ("captions", "images", 8)):
        file = folder / f"{name}_train2014.json"
        content = json.loads(file.read_text())
        content["annotations"] = [e for e in content["annotations"] if e["image_id"] != removed]
        if field == "images":
            content["images"] = [e for e in content["images"] if e["id"] != removed]
        file.write_text(json.dumps(content))
    run_generate(monkeypatch, folder, tmp_path / "a.json", "detail", "--judge", teacher.url)
    rejected = [(r["id"], r["reason"]) for r in read_jsonl(tmp_path / "a.rejected.jsonl")]
    assert rejected == [("3", "no captions"), ("5", "no boxes"), ("8", "no captions")]
    assert len(json.loads((tmp_path / "a.json").read_text())) == 37
    text = capsys.readouterr().out
    assert f"{2:8} no captions" in text and f"{1:8} no boxes" in text


@pytest.mark.parametrize("name, change, complaint", (
    ("instances", {"annotations": [{"image_id": 4, "category_id": 0, "bbox": [50, 3, 20, 9]}]}, "image 4"),
    ("instances", {"annotations": [{"image_id": 99, "category_id": 0, "bbox": [5, 3, 2, 9]}]}, "instances"),
    ("instances", {"categories": []}, "not a COCO instances file"),
    ("captions", {"annotations": [{"image_id": 99, "caption": "x"}]}, "not a COCO captions file"),
    ("captions", {"images": None}, "not a COCO captions file")))
def test_bad_coco_files_exit_with_one_sentence(monkeypatch, coco, tmp_path, name, change, complaint):
    folder = shutil.copytree(coco, tmp_path / "coco")
    file = folder / f"{name}_train2014.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    flags = generate_flags(folder, tmp_path / "a.json", "detail", "--judge", "http://x/v1")
    sentence = error_of(monkeypatch, *flags)
    assert complaint in sentence and file.name in sentence


@pytest.mark.parametrize("flags, complaint", (
    ("--generate detail --captions a.json --judge-model toy --out b.json", "needs --boxes"),
    ("--generate conversation --judge-model toy --out b.json", "needs --captions"),
    ("--generate conversation --captions a.json --out b.json", "--judge-model"),
    ("--expand a.json", "--out"), ("--expand a.json --out b.json --limit 0", "argument --limit"),
    ("--expand a.json --out b.json --workers 0", "argument --workers"),
    ("--study a --scienceqa b --pretrain c --vision d --language e --keep 9 --seeds 0", "argument --seeds")))
def test_invalid_flags_exit_with_code_2(capsys, flags, complaint):
    with pytest.raises(SystemExit) as error:
        prune.parse_args(flags.split())
    assert error.value.code == 2 and complaint in capsys.readouterr().err


def test_batch_results_without_replies_reject_every_image(monkeypatch, coco, tmp_path):
    failed = {"custom_id": "x", "response": None, "error": {"message": "expired"}}
    (tmp_path / "results.jsonl").write_text(json.dumps(failed) + "\n")
    out = tmp_path / "a.json"
    run_generate(monkeypatch, coco, out, "reasoning", "--replies", tmp_path / "results.jsonl")
    assert json.loads(out.read_text()) == []
    assert {r["reason"] for r in read_jsonl(tmp_path / "a.rejected.jsonl")} == {"no reply"}
