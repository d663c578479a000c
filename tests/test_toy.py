"""Tests of the toy data, the toy models and the toy run of toy.py."""

import random
from collections import Counter

import numpy as np
import pytest

from eval import parse_choice, question, read_scienceqa
from llava import Llava, LlavaConfig, Processor
from tests import toy
from train import parse, read_records


def test_toy_scienceqa_has_the_published_layout(tmp_path):
    toy.write_scienceqa(tmp_path, sizes=(("train", 200), ("val", 8), ("test", 40)))
    problems = read_scienceqa(tmp_path, "train")
    assert {p["subject"] for p in problems} == {"natural science", "social science", "language science"}
    assert 0.35 < np.mean([bool(p["image"]) for p in problems]) < 0.65
    assert all(p["file"].exists() for p in problems if p["image"])
    assert problems[0].keys() >= {"lecture", "solution", "hint", "task", "grade", "topic", "skill"}
    assert all(p["choices"][p["answer"]] in p["solution"] for p in problems)
    answers = Counter((p["skill"], p["answer"]) for p in problems if p["image"])
    assert len(answers) > 12, "each skill has several answers"


def test_text_of_an_image_question_does_not_determine_the_answer():
    rng = random.Random(0)
    problems = [toy.image_problem(toy.make_scene(rng), rng) for _ in range(400)]
    answers = {}
    for p in problems:
        answers.setdefault(question(p), set()).add(p["answer"])
    assert len(answers) == 4, "one text per kind of question"
    assert all(len(answers_of_text) >= 3 for answers_of_text in answers.values())


@pytest.mark.parametrize("shape", toy.SHAPES)
def test_image_shows_the_color_at_the_place_of_the_caption(shape):
    rng = random.Random(1)
    for place, (x, y) in toy.PLACES.items():
        scene = {"count": "one", "color": "red", "shape": shape, "place": place}
        pixels = np.asarray(toy.draw(scene, rng)).astype(int)
        red = (pixels[..., 0] > 180) & (pixels[..., 1] < 90)
        row, column = np.argwhere(red).mean(0)
        assert abs(column - x) < 7 and abs(row - y) < 7, toy.caption(scene)


def test_build_is_bit_identical_and_rebuilds_an_unfinished_part(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "write_scienceqa", lambda folder: toy.write_captions(folder, size=3))
    (tmp_path / "a/unfinished-scienceqa").mkdir(parents=True)
    contents = []
    for name in ("a", "b"):
        toy.build(tmp_path / name, ("scienceqa",))
        contents.append({f.name: f.read_bytes() for f in (tmp_path / name / "scienceqa").iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 3


def test_toy_models_load_and_toy_captions_are_valid_records(tmp_path):
    tokenizer = toy.make_tokenizer(size=600)
    toy.write_captions(tmp_path / "pretrain", size=4)
    toy.write_clip(tmp_path / "clip", steps=1, size=8, batch=4)
    toy.write_language(tmp_path / "mistral", toy.MISTRAL, tokenizer, steps=1, batch=2)
    model = Llava.from_pretrained(vision=tmp_path / "clip", language=tmp_path / "mistral")
    assert isinstance(model.config, LlavaConfig) and model.config.text.sliding_window == 256
    processor = Processor.from_pretrained(tmp_path / "mistral", model.config)
    for record in read_records(tmp_path / "pretrain.json", tmp_path / "pretrain"):
        ids, labels = processor.tokenize(record["messages"])
        assert processor.decode([i for i in labels if i >= 0]) == record["messages"][1]["content"]
        assert ids.count(model.config.image_token_id) == 1
    text = "Which shape? Döner 🥙"
    assert processor.decode(processor.encode(text)) == text


def test_draw_losses_draws_one_panel_per_run(tmp_path):
    for name in ("one", "two"):
        lines = [{"loss": 3 / i} for i in range(1, 40)]
        if name == "two":
            for line in lines[8::9]:
                line["val_loss"] = 1
        toy.write_lines(tmp_path / name / "log.jsonl", lines)
    toy.draw_losses([tmp_path / "one", tmp_path / "two"], tmp_path / "loss.png")
    image = np.asarray(toy.Image.open(tmp_path / "loss.png"))
    assert image.shape == (260, 840, 3)
    blue = (image == (0x20, 0x50, 0xb0)).all(-1)                          # running mean of the losses
    assert blue[:, :420].sum() > 100 and blue[:, 420:].sum() > 100
    red = (image == (0xc0, 0x20, 0x20)).all(-1)                           # validation loss
    assert red[:, :420].sum() == 0 and red[:, 420:].sum() > 100


def test_toy_run_uses_float32_and_validation_records(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "build", lambda *_, **__: toy.write_scienceqa(
        tmp_path / "scienceqa", sizes=(("train", 8), ("val", 8), ("test", 8))))
    monkeypatch.setattr(toy, "draw_losses", lambda *_: 1 / 0)             # end the toy run after both stages
    runs = []
    with pytest.raises(ZeroDivisionError):
        toy.run_and_check(runs.append, parse, tmp_path, tmp_path / "runs")
    assert [args.dtype for args in runs] == ["float32"] * 2 and runs[1].val.exists()


def test_toy_answer_can_be_parsed():
    p = toy.text_problem(random.Random(3))
    assert parse_choice(toy.target_text(p), len(p["choices"])) == p["answer"]
