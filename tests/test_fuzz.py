"""Seeded fuzzing of every function that reads a file or parses an answer: for any bytes it returns a valid
result or raises UserError or OSError with a message of one line, in bounded time.

    LLAVA_FUZZ_ROUNDS=10000 python -m pytest tests/test_fuzz.py            # the default is 200 rounds each
"""

import json
import os
import random
import shutil
import string
import struct
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import eval as evaluation
import llava
import train
from llava import LlavaConfig, UserError
from tests import toy

ROUNDS = int(os.environ.get("LLAVA_FUZZ_ROUNDS", 200))
SECONDS = 2.0                                # processor time that one round may take
UNUSUAL_VALUES = [
    None, True, False, 0, -1, 1, 2**70, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", " ", "x", "\0",
    "\ud800", "<image>", "<image>" * 3, "../x", "/etc/passwd", "a" * 5000, [], [[]], [None], {}, {"a": 1},
    {"": []}, ["good.png"], [1, 2], "human", "gpt", "grade1", "E"]


def mutate(content, rng: random.Random):
    """Return a copy of a JSON value in which one to three values were replaced, removed or copied."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        places = list(walk(content))
        if not places:
            return deepcopy(rng.choice(UNUSUAL_VALUES))
        parent, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            parent[key] = deepcopy(rng.choice(UNUSUAL_VALUES))
        elif action < 0.8:
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, deepcopy(parent[key]))
        else:
            parent[rng.choice(["image", "x", "", str(key).upper()])] = deepcopy(parent[key])
    return content


def walk(content):
    """Yield (container, key) of every value inside a JSON value."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    else:
        items = ()
    for key, value in items:
        yield content, key
        yield from walk(value)


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return the content with some bytes changed, removed or inserted, or with the end removed."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        position, action = rng.randrange(len(content) + 1), rng.random()
        if action < 0.4 and position < len(content):
            content[position] = rng.randrange(256)
        elif action < 0.6:
            content[position:position] = rng.randbytes(rng.randint(1, 8))
        elif action < 0.8:
            del content[position:position + rng.randint(1, 30)]
        else:
            del content[position:]
    return bytes(content)


def mutated_json(content, rng: random.Random) -> bytes:
    """Return the mutated JSON value as bytes, which are sometimes damaged too."""
    content = json.dumps(mutate(content, rng)).encode()
    return damage(content, rng) if rng.random() < 0.2 else content


def fuzz(read, seed: int, rounds: int = ROUNDS) -> tuple[int, int]:
    """Call read(rng) with a new generator in every round; return the numbers of accepted, refused calls."""
    accepted = refused = 0
    for number in range(rounds):
        rng, start = random.Random(f"{seed} {number}"), time.process_time()
        try:
            read(rng)
            accepted += 1
        except (UserError, OSError) as error:
            refused += 1
            assert str(error) and len(str(error).splitlines()) == 1, str(error)
        assert time.process_time() - start < SECONDS, f"round {number}"
    return accepted, refused


@pytest.mark.parametrize("seed", [0, 1])
def test_record_reader_returns_valid_records_or_refuses(seed, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/good.png").write_bytes(b"an image is not decoded here")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    valid = [{"id": "1", "image": "good.png", "conversations": turns * 2},
             {"id": 2, "conversations": [{"from": "human", "value": "Why?"}, turns[1]]}]
    valid[0]["conversations"][2] = {"from": "human", "value": "And?"}
    file, images = tmp_path / "records.json", tmp_path / "images"

    def read(rng):
        file.write_bytes(mutated_json(valid, rng))
        for record in train.read_records(file, images):
            texts = [message["content"] for message in record["messages"]]
            assert len(texts) >= 2 and all(isinstance(text, str) for text in texts)
            "".join(texts).encode()          # raises if a text contains half of a surrogate pair
            roles = [message["role"] for message in record["messages"]]
            assert set(roles[0::2]) == {"user"} and set(roles[1::2]) == {"assistant"}
            assert sum(text.count("<image>") for text in texts) == len(record["images"])
            assert all(image.resolve().is_relative_to(images) for image in record["images"])

    accepted, refused = fuzz(read, seed)
    assert accepted and refused


@pytest.mark.parametrize("seed", [0, 1])
def test_scienceqa_reader_returns_valid_problems_or_refuses(seed, tmp_path):
    toy.write_scienceqa(tmp_path, sizes=(("test", 4),))
    contents = {name: llava.read_json(tmp_path / name) for name in ("problems.json", "pid_splits.json")}

    def read(rng):
        for name, content in contents.items():
            (tmp_path / name).write_text(json.dumps(content))
        name = "problems.json" if rng.random() < 0.8 else "pid_splits.json"
        (tmp_path / name).write_bytes(mutated_json(contents[name], rng))
        problems = evaluation.read_scienceqa(tmp_path, "test")
        scores = evaluation.score(problems, {problem["id"]: "A" for problem in problems})
        assert scores["questions"] == len(problems) and scores["missing"] == 0
        for problem in problems:
            record, file = evaluation.to_record(problem), problem["file"]
            last_line = record["conversations"][0]["value"].splitlines()[-1:]
            assert ("image" in record) == ("<image>" in last_line)
            assert file is None or len(file.relative_to(tmp_path / "images").parts) == 3
            assert ".." not in str(file).split("/")

    accepted, refused = fuzz(read, seed)
    assert accepted and refused


@pytest.mark.parametrize("seed", [0, 1])
def test_answer_reader_returns_texts_or_refuses(seed, tmp_path):
    entries = [{"question_id": str(i), "prompt": "What?", "text": "A"} for i in range(3)]
    file = tmp_path / "a.jsonl"

    def read(rng):
        lines = [mutated_json(entry, rng) if rng.random() < 0.4 else json.dumps(entry).encode()
                 for entry in entries]
        file.write_bytes(b"\n".join(lines))
        texts = evaluation.read_answers(file)
        assert all(isinstance(key, str) and isinstance(text, str) for key, text in texts.items())

    accepted, refused = fuzz(read, seed)
    assert accepted and refused


BENCHMARK_FILES = {                          # questions, then annotations
    "vqav2": ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"),
    "pope": ("llava_pope_test.jsonl", "coco_pope_random.json", "coco_pope_popular.json",
             "coco_pope_adversarial.json"),
    "mmbench": ("mmbench_dev_20230712.tsv",),
    "llavabench": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")}


@pytest.mark.parametrize("task", BENCHMARK_FILES)
def test_benchmark_readers_return_valid_questions_or_refuse(task, tmp_path):
    toy.write_benchmarks(tmp_path, size=2)
    files = [tmp_path / task / name for name in BENCHMARK_FILES[task]]
    contents = {file: file.read_bytes() for file in files}
    images = ["--images", tmp_path] if task != "mmbench" else []
    annotations = ["--annotations", *files[1:]] if files[1:] else []
    flags = ["--task", task, "--questions", files[0], "--model", "m", "--out", "a", *images, *annotations]
    args = evaluation.parse_args([str(flag) for flag in flags])

    def read(rng):
        for file, content in contents.items():
            file.write_bytes(content)
        file = rng.choice(files)
        lines = contents[file].splitlines()
        position = rng.randrange(len(lines))
        if rng.random() < 0.3 or file.suffix == ".tsv":
            file.write_bytes(damage(contents[file], rng))
        elif file.suffix == ".jsonl" or task == "pope":
            lines[position] = mutated_json(json.loads(lines[position]), rng)
            file.write_bytes(b"\n".join(lines))
        else:
            file.write_bytes(mutated_json(json.loads(contents[file]), rng))
        questions = evaluation.read_task(args, evaluation.BENCHMARKS[task])
        assert questions and all(isinstance(question["message"], str) for question in questions)

    accepted, refused = fuzz(read, 0, ROUNDS // 2)
    assert accepted and refused


def random_text(rng: random.Random) -> str:
    pieces = ["The answer is ", "the answer is ", "Answer: ", "A", "B", "E", "Z", "(A)", "A. ", ".", "\n",
              " ", "", "yes", "No", "not", "é", "\0", "\ud800", "中", "1", "-1", "<image>", "</s>",
              string.printable]
    return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 8)))


def test_answer_parser_returns_an_option_or_none():
    found = set()

    def parse(rng):
        choices = rng.randint(1, 5)
        option = evaluation.parse_choice(random_text(rng), choices)
        assert option is None or option in range(-1, choices)
        found.add(option)

    accepted, refused = fuzz(parse, 0, 5 * ROUNDS)
    assert refused == 0 and found >= {None, -1, 0, 1, 4}


def configs() -> dict[str, dict]:
    """Return a config.json for every layout that llava.py reads; the liuhaotian one needs the folder clip."""
    text, vision = asdict(llava.TextConfig(**toy.MISTRAL)), asdict(toy.VISION)
    config = LlavaConfig(toy.VISION, llava.TextConfig(**toy.MISTRAL), image_mode="anyres")
    saved = llava.hf_config(config, whole=True)
    hf = {name: value for name, value in saved.items() if name != "llava.py"}
    liuhaotian = text | {
        "model_type": "llava_mistral", "mm_vision_tower": "clip", "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": [[64, 128], [128, 64]]}
    return {"ours": saved | {"bases": []}, "llava-hf": hf, "liuhaotian": liuhaotian,
            "mistral": text | {"rope_scaling": None}, "clip": {"model_type": "clip", "vision_config": vision}}


@pytest.mark.parametrize("layout", configs())
def test_config_reader_returns_a_configuration_or_refuses(layout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    raw = configs()[layout]
    llava.write_json(Path("clip/config.json"), configs()["clip"])
    Path("model").mkdir()

    def read(rng):
        Path("model/config.json").write_bytes(mutated_json(raw, rng))
        parts, stored, _ = llava.open_checkpoint("model", weights=False)
        if {"text", "vision"} <= parts.keys():
            config = LlavaConfig(**parts)
            assert config.vision.hidden_size > 0 and config.template in ("mistral_instruct", "v1", "plain")
        assert not stored

    accepted, refused = fuzz(read, seed=2)
    assert accepted and refused


def test_safetensors_reader_returns_tensors_or_refuses(tmp_path):
    content = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8:header_end]), content[header_end:]
    file = tmp_path / "model.safetensors"

    def read(rng):
        kind = rng.random()
        text = json.dumps(mutate(header, rng) if kind < 0.5 else header).encode()
        length = len(text)
        if kind >= 0.7:
            length = rng.choice([0, 1, 8, len(text) - 1, 10**8, 2**31, 2**63, 2**64 - 1])
        content = struct.pack("<Q", length) + text + data
        if kind > 0.85:
            content = damage(content, rng)
        file.write_bytes(content)
        tensors = llava.open_file(file)
        assert all(t.numel() >= 0 and t.clone() is not None for t in tensors.values())
        del tensors                          # unmaps the file before the next one is written

    accepted, refused = fuzz(read, seed=3)
    assert accepted and refused


def test_damaged_checkpoint_opens_or_is_refused(tmp_path):
    """In every round one file of a model folder is damaged."""
    toy.write_random(tmp_path / "valid")

    def read(rng):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(tmp_path / "valid", tmp_path / "model")
        file = rng.choice(["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
        content = (tmp_path / "model" / file).read_bytes()
        (tmp_path / "model" / file).write_bytes(damage(content[:2000], rng) + content[2000:])
        model = llava.Llava.from_pretrained(tmp_path / "model", dtype=torch.float32)
        llava.Processor.from_pretrained(tmp_path / "model", model.config)

    _, refused = fuzz(read, 4, ROUNDS // 10)
    assert refused
