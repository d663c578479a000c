"""Tests of prune.py: methods that choose questions, measurements with a model, reports and studies."""

import itertools
import json
import re
import shlex
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import prune
from eval import interval, question, read_scienceqa, to_record
from llava import Llava, Processor, causal_attention, command_line, open_image, rope
from prune import choose_guided, choose_stratified, farthest_points, percentiles
from tests.toy import write_random

torch.set_num_threads(1)
ARGS = SimpleNamespace(seed=0, image_text=None, model=None, method="guided")


def make_problem(i: int, topic="maps", has_image=True, skill="read", solution_words=5, **fields) -> dict:
    """A ScienceQA question; `fields` replaces the defaults."""
    subject = {"maps": "social", "verbs": "language"}.get(topic, "natural") + " science"
    return {"id": str(i), "question": f"What is {i}?", "choices": ["yes", "no"], "answer": 0, "hint": "",
            "image": "image.png" if has_image else None, "grade": "grade5", "subject": subject,
            "topic": topic, "category": topic, "skill": skill, "lecture": "",
            "solution": "so " * solution_words, "split": "train"} | fields


@pytest.fixture(scope="module")
def scienceqa(tmp_path_factory):
    """A folder with 24 training questions, every other one with an image, and four test questions."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = [make_problem(i, ("maps", "verbs", "stars", "maps")[i % 4], i % 2 == 0, f"skill {i % 8}",
                             solution_words=i % 5, question=f"What is {i % 12}?") for i in range(24)]
    problems += [make_problem(i, has_image=i < 26, answer=i % 2) | {"split": "test"} for i in range(24, 28)]
    ids = {split: [p["id"] for p in problems if p["split"] == split] for split in ("train", "test")}
    (folder / "problems.json").write_text(json.dumps({p["id"]: p for p in problems}))
    (folder / "pid_splits.json").write_text(json.dumps(ids))
    for p in problems:
        if p["image"]:
            image_folder = folder / "images" / p["split"] / p["id"]
            image_folder.mkdir(parents=True)
            pixels = np.random.default_rng(int(p["id"])).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(image_folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [write_random(tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]


def run_prune(monkeypatch, *flags) -> None:
    """Run prune.py in this process with these flags."""
    monkeypatch.setattr(sys, "argv", ["prune.py", *map(str, flags)])
    command_line(prune.main)


def choose_ids(monkeypatch, scienceqa, out, *flags) -> list[str]:
    """Run prune.py and return the ids of the chosen questions, in order of choice."""
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--out", out, *flags)
    return [record["id"] for record in json.loads(out.read_text())]


# ---------------------------------------------------------------------------------------------
# Farthest points


def farthest_by_loops(x: torch.Tensor, k: int, start: int) -> list[int]:
    """Farthest-point selection by its definition, one point at a time, in float64."""
    picks, x = [start], x.double()
    while len(picks) < k:
        nearest = torch.stack([(x - x[i]).norm(dim=1) for i in picks]).amin(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks


def smallest_distance(x: torch.Tensor) -> float:
    return float(torch.nn.functional.pdist(x.double()).min())


@pytest.mark.parametrize("seed", range(20))
def test_farthest_points_equal_a_reference_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 16, generator=rng) * torch.rand(16, generator=rng) + 1000 * (seed % 2)
    picks = farthest_points(x, 40, start=seed)
    assert picks.dtype == torch.int64 and picks.tolist() == farthest_by_loops(x, 40, seed)
    assert smallest_distance(x[picks]) == smallest_distance(x[farthest_by_loops(x, 40, seed)])


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_reach_half_the_optimal_distance(seed):
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(seed))
    optimum = max(smallest_distance(x[list(subset)]) for subset in itertools.combinations(range(10), 4))
    assert smallest_distance(x[farthest_points(x, 4)]) >= optimum / 2


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_break_ties_by_index(seed):
    grid = torch.randint(0, 4, (15, 3), generator=torch.Generator().manual_seed(seed)).float()
    assert farthest_points(grid, 15, start=0).tolist() == farthest_by_loops(grid, 15, 0)


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_choose_duplicates_last_and_each_once(seed):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
    picks = farthest_points(x, 12).tolist()
    assert {i % 6 for i in picks[:6]} == set(range(6))
    assert picks[6:] == [i for i in range(12) if i not in picks[:6]]


def test_farthest_points_prefer_close_points_to_duplicates():
    """In float32 the formula alone cannot tell 20 from 0 beside 10,000."""
    x = torch.tensor([[0.0], [0.0], [20.0], *[[10000.0]] * 10])
    assert farthest_points(x, 4).tolist() == farthest_points(x.double(), 4).tolist() == [3, 0, 2, 1]


def test_farthest_points_start_nearest_to_the_mean():
    x = torch.tensor([[9.0], [0], [4], [1], [5]])                         # mean 3.8
    assert farthest_points(x, 2).tolist() == [2, 0] and farthest_points(x, 2, start=3).tolist() == [3, 0]


@pytest.mark.parametrize("k, value, complaint", ((0, 1.0, "0 of 3"), (4, 1.0, "4 of 3"),
                                                 (2, torch.nan, "point 1"), (2, torch.inf, "point 1")))
def test_farthest_points_reject_invalid_input(k, value, complaint):
    x = torch.ones(3, 2)
    x[1, 1] = value
    with pytest.raises(ValueError, match=complaint):
        farthest_points(x, k)


# ---------------------------------------------------------------------------------------------
# Methods without a model


def test_guided_covers_topics_and_skills_and_prefers_images():
    problems = [make_problem(i, "maps", skill=f"skill {i % 3}") for i in range(60)]
    problems += [make_problem(60 + i, "stars", has_image=i == 7, skill="stars") for i in range(30)]
    problems += [make_problem(90 + i, "verbs", has_image=False, skill=f"verb {i}") for i in range(9)]
    problems += [make_problem(99, "ice", has_image=False, skill="stars")]
    kept = [problems[i] for i in choose_guided(problems, 20, ARGS)]
    assert {p["topic"] for p in kept} == {"maps", "stars", "verbs", "ice"}
    assert "67" in {p["id"] for p in kept}
    assert {f"skill {i}" for i in range(3)} <= {p["skill"] for p in kept}
    assert sum(bool(p["image"]) for p in kept) == 17                      # 85% of 20
    assert len([p for p in kept if p["topic"] == "verbs"]) == 2           # the other without image: "ice"


def test_guided_weights_topics_by_square_root_of_size():
    problems = [make_problem(i, "maps" if i < 400 else "stars") for i in range(500)]
    topics = [problems[i]["topic"] for i in choose_guided(problems, 30, ARGS)]
    assert topics.count("maps") == 20 and topics.count("stars") == 10     # 20 : 10 = sqrt(400) : sqrt(100)


@pytest.mark.parametrize("sign", ({"solution_words": 20}, {"choices": list("abcd")},
                                  {"solution": "so 1 + 1 = 2"}, {"grade": "grade9"}),
                         ids=lambda sign: next(iter(sign)))
def test_guided_prefers_each_sign_of_difficulty(sign):
    problems = [make_problem(i) for i in range(30)]
    problems[17] = make_problem(17, **sign)
    assert list(choose_guided(problems, 1, ARGS)) == [17]


def test_guided_prefers_images_with_more_text(tmp_path):
    (tmp_path / "ocr.json").write_text(json.dumps({"captions": {"4": "Exit here", "9": "Exit", "1000": "x"}}))
    args = SimpleNamespace(**vars(ARGS) | {"image_text": tmp_path / "ocr.json"})
    assert list(choose_guided([make_problem(i) for i in range(12)], 2, args)) == [4, 9]


def test_guided_prefers_text_about_the_image_then_new_text():
    problems = [make_problem(i, solution_words=9, question="Who is it?") for i in range(5)]
    problems += [make_problem(5, question="Who else?"), make_problem(6, question="Who is shown?")]
    assert list(choose_guided(problems, 3, ARGS)) == [6, 0, 5]


def test_explain_writes_a_reason_for_each_choice(monkeypatch, scienceqa, tmp_path):
    out, flags = tmp_path / "a.json", ("--keep", 10, "--explain", "--method")
    for method in ("guided", "random", "stratified", "all"):
        ids = choose_ids(monkeypatch, scienceqa, out, *flags, method)
        reasons = json.loads((tmp_path / "a.why.json").read_text())
        assert [r["id"] for r in reasons] == ids and all(r["why"] for r in reasons)
    choose_ids(monkeypatch, scienceqa, out, *flags, "guided")
    first, *_, last = [r["why"] for r in json.loads((tmp_path / "a.why.json").read_text())]
    assert "the first of subject" in first and "it has an image" in first and "options 2" in last


def test_percentiles_count_equal_values_half():
    assert percentiles(np.array([3, 1, 1, 2])).tolist() == [0.875, 0.25, 0.25, 0.625]


def test_stratified_gives_each_topic_its_share():
    problems = [make_problem(i, ("maps", "verbs", "stars")[min(2, i // 40)]) for i in range(100)]
    for seed in range(5):
        kept = choose_stratified(problems, 10, SimpleNamespace(seed=seed))
        topics = [problems[i]["topic"] for i in kept]
        assert len(kept) == 10 and [topics.count(t) for t in ("maps", "verbs", "stars")] == [4, 4, 2]


def test_random_choices_depend_only_on_the_seed(monkeypatch, scienceqa, tmp_path):
    for method in ("random", "stratified"):
        flags = ("--method", method, "--keep", 8, "--seed")
        first, other, repeated = [choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags, seed)
                                  for seed in (1, 2, 1)]
        assert first == repeated != other and len(set(first)) == 8


def test_method_all_writes_the_whole_split_as_records(monkeypatch, scienceqa, tmp_path):
    choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", "--method", "all", "--pictures", "only")
    records = [to_record(p) for p in read_scienceqa(scienceqa, "train", "only")]
    assert json.loads((tmp_path / "a.json").read_text()) == records and len(records) == 12


@pytest.mark.parametrize("entries", ([7, "4"], [{"id": 7}, {"id": "4", "conversations": []}]))
def test_from_list_keeps_the_order_of_the_list(monkeypatch, scienceqa, tmp_path, entries):
    (tmp_path / "list.json").write_text(json.dumps(entries))
    flags = ("--from-list", tmp_path / "list.json")
    assert choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags) == ["7", "4"]


@pytest.mark.parametrize("flags, complaint", (
    ("--method random --keep 25", "--keep 25 is not between 1 and the 24"),
    ("--method maxmin --keep 0", "--keep 0"),
    ("--method guided --keep 2", "too few for 3 subjects"),
    ("--method stratified --keep 2", "too few for 3 subjects"),
    ("--method maxmin --keep 5", "name the --model"),
    ("--from-list {}/unknown.json", "lists 2 questions, such as 99, that are not among the 24"),
    ("--from-list {}/odd.json", "odd.json is neither a list"),
    ("--report {}/unknown.json", "lists 2 questions, such as 99"),
))
def test_bad_input_exits_with_one_sentence(monkeypatch, scienceqa, tmp_path, flags, complaint):
    (tmp_path / "unknown.json").write_text('["1", "99", 1000]')
    (tmp_path / "odd.json").write_text('{"1": "99"}')
    flags = flags.format(tmp_path).split()
    with pytest.raises(SystemExit) as error:
        run_prune(monkeypatch, "--scienceqa", scienceqa, "--out", tmp_path / "a.json", *flags)
    assert complaint in error.value.code and "\n" not in error.value.code
    assert not (tmp_path / "a.json").exists()


# ---------------------------------------------------------------------------------------------
# Measurements with a model


def measure_states(monkeypatch, scienceqa, model, out, *flags) -> np.ndarray:
    """Run --method maxmin and return the hidden states that it measures, one row for each question."""
    choose_ids(monkeypatch, scienceqa, out, "--method", "maxmin", "--keep", 5, "--model", model, *flags)
    pooling = "mean" if "mean" in flags else "last"
    return np.load(out.with_suffix(".cache") / f"{pooling}.npy")


def make_inputs(problem: dict, processor: Processor, with_answer: bool) -> dict:
    """The model's inputs for one question; with its answer, they contain labels."""
    messages = [{"role": "user", "content": question(problem)}]
    if with_answer:
        messages.append({"role": "assistant", "content": prune.target_text(problem)})
    images = [open_image(problem["file"])] if problem["image"] else []
    return processor(messages, images, labels=with_answer)


@pytest.mark.parametrize("layer, pooling", ((-1, "last"), (1, "last"), (-1, "mean"), (-3, "mean")))
def test_batched_states_equal_single_prompts(monkeypatch, scienceqa, models, tmp_path, layer, pooling):
    flags = ("--layer", layer, "--pooling", pooling)
    rows = measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json", *flags)
    model = Llava.from_pretrained(models[0], dtype=torch.float32)
    processor = Processor.from_pretrained(models[0], model.config)
    for i, p in list(enumerate(read_scienceqa(scienceqa, "train")))[::5]:
        with torch.no_grad():
            # the list that transformers calls hidden_states
            states = [model.splice(**make_inputs(p, processor, False))[0]]
            cos_sin = rope(torch.arange(states[0].shape[1]), model.config.text, torch.float32)
            for decoder_layer in model.language_model.layers:
                attend = partial(causal_attention, window=model.config.text.sliding_window)
                states.append(decoder_layer(states[-1], cos_sin, attend))
            states[-1] = model.language_model.norm(states[-1])
        expected = states[layer][0, -1] if pooling == "last" else states[layer][0].mean(0)
        assert torch.allclose(torch.tensor(rows[i]), expected, atol=1e-4), i


def test_maxmin_applies_farthest_points_to_the_states(monkeypatch, scienceqa, models, tmp_path):
    flags = ("--method", "maxmin", "--keep", 6, "--model", models[0])
    ids = choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags)
    states = torch.from_numpy(np.load(tmp_path / "a.cache" / "last.npy"))
    assert ids == [str(i) for i in farthest_points(states, 6).tolist()]


def test_interrupted_measurement_resumes(monkeypatch, scienceqa, models, tmp_path):
    expected = measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json", "--batch-size", 5)
    measure_batch, batches = prune.measure_batch, []

    def interrupt_third_batch(model, processor, problems, what):
        batches.append(len(problems))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return measure_batch(model, processor, problems, what)

    monkeypatch.setattr(prune, "measure_batch", interrupt_third_batch)
    with pytest.raises(SystemExit):
        measure_states(monkeypatch, scienceqa, models[0], tmp_path / "b.json", "--batch-size", 5)
    resumed = measure_states(monkeypatch, scienceqa, models[0], tmp_path / "b.json", "--batch-size", 5)
    assert batches == [5, 5, 5, 5, 5, 4] and (resumed == expected).all()
    choose_ids(monkeypatch, scienceqa, tmp_path / "b.json", "--method", "maxmin", "--keep", 9)    # no --model
    assert len(batches) == 6


@pytest.mark.parametrize("flags, complaint", (("--model {1}", "differs in model"),
                                              ("--model {0} --layer 1", "differs in layer"),
                                              ("--layer 1", "differs in layer"),
                                              ("--model {0} --dtype bfloat16", "differs in .*dtype"),
                                              ("--model {0} --pictures only", "differs in questions")))
def test_cache_with_other_settings_is_rejected(monkeypatch, scienceqa, models, tmp_path, flags, complaint):
    measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json")
    with pytest.raises(SystemExit, match=complaint):
        choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", "--method", "maxmin", "--keep", 5,
                   *flags.format(*models).split())


def test_after_an_unknown_layer_the_command_without_it_measures(monkeypatch, scienceqa, models, tmp_path):
    with pytest.raises(SystemExit, match="--layer 9: the language model has"):
        measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json", "--layer", 9)
    assert len(measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json"))


def test_a_run_of_stage_1_reads_the_questions(monkeypatch, scienceqa, models, tmp_path):
    """Its template is "plain", which has no question: all questions without an image would be equal."""
    expected = measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json")
    shutil.copytree(models[0], tmp_path / "stage1")
    config = json.loads((tmp_path / "stage1/config.json").read_text())
    config["llava.py"]["template"] = "plain"
    (tmp_path / "stage1/config.json").write_text(json.dumps(config))
    states = measure_states(monkeypatch, scienceqa, tmp_path / "stage1", tmp_path / "b.json")
    assert (states == expected).all()
    plain = measure_states(monkeypatch, scienceqa, tmp_path / "stage1", tmp_path / "c.json",
                           "--template", "plain")
    assert [len(np.unique(x, axis=0)) for x in (states, plain)] == [20, 13]


def test_error_about_nonfinite_states_names_the_question(monkeypatch, scienceqa, models, tmp_path):
    ids = []

    def measure_nan(model, processor, problems, what):
        values = torch.ones(len(problems), model.config.text.hidden_size)
        values[1, 3] = torch.nan
        ids.append(problems[1]["id"])
        return values

    monkeypatch.setattr(prune, "measure_batch", measure_nan)
    with pytest.raises(SystemExit) as error:
        measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json")
    assert re.search(rf"question {ids[0]}\b.* not finite", str(error.value))


def test_measured_loss_equals_model_loss_and_counts_as_difficulty(monkeypatch, scienceqa, models, tmp_path):
    flags = ("--method", "guided", "--keep", 6, "--model", models[0], "--explain")
    choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags)
    losses = np.load(tmp_path / "a.cache" / "loss.npy")[:, 0]
    model = Llava.from_pretrained(models[0], dtype=torch.float32)
    processor = Processor.from_pretrained(models[0], model.config)
    for i, p in list(enumerate(read_scienceqa(scienceqa, "train")))[::6]:
        with torch.no_grad():
            assert model(**make_inputs(p, processor, True)).item() == pytest.approx(losses[i], rel=1e-5)
    for reason in json.loads((tmp_path / "a.why.json").read_text()):
        assert f"loss {losses[int(reason['id'])]:.4g}" in reason["why"]


def test_gain_is_loss_with_white_image_minus_loss_with_image(monkeypatch, scienceqa, models, tmp_path):
    flags = ("--method", "gain", "--keep", 6, "--model", models[0], "--batch-size", 5)
    ids = choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags)
    gains = np.load(tmp_path / "a.cache" / "gain.npy")[:, 0]
    model = Llava.from_pretrained(models[0], dtype=torch.float32)
    processor = Processor.from_pretrained(models[0], model.config)
    problems = read_scienceqa(scienceqa, "train")
    for i, p in list(enumerate(problems))[::4]:
        inputs = make_inputs(p, processor, True)
        white = Image.new("RGB", (32, 32), "white")
        white_inputs = processor([{"role": "user", "content": question(p)}], [white])
        with torch.no_grad():
            loss_with_white = model(**inputs | {"images": white_inputs["images"][:1]}).item()
            expected = loss_with_white - model(**inputs).item()
        assert gains[i] == pytest.approx(expected, abs=2e-6) and abs(expected) > 1e-5
    assert all(gains[i] == 0 for i, p in enumerate(problems) if not p["image"])
    assert ids == [str(i) for i in sorted(range(24), key=lambda i: -gains[i])[:6]]


def test_gain_resumes_and_measures_only_questions_with_images(monkeypatch, scienceqa, models, tmp_path):
    flags = ("--method", "gain", "--keep", 6, "--batch-size", 5, "--model", models[0])
    expected = choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags)
    measure_batch, measured = prune.measure_batch, []

    def interrupt_second_batch(model, processor, problems, what, white=False):
        if what == "gain":
            measured.extend(p["id"] for p in problems)
            if len(measured) == 10:
                raise KeyboardInterrupt
        return measure_batch(model, processor, problems, what, white)

    monkeypatch.setattr(prune, "measure_batch", interrupt_second_batch)
    with pytest.raises(SystemExit):
        choose_ids(monkeypatch, scienceqa, tmp_path / "b.json", *flags)
    assert choose_ids(monkeypatch, scienceqa, tmp_path / "b.json", *flags) == expected
    assert len(measured) == 5 + 5 + 7 and set(measured) == {str(i) for i in range(0, 24, 2)}


# ---------------------------------------------------------------------------------------------
# Reports


def row_cells(text: str, name: str) -> list[str]:
    """The cells of the row that starts with `name` in a printed table."""
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_report_counts_coverage_repetition_and_overlap(monkeypatch, scienceqa, tmp_path, capsys):
    for name, ids in (("a", range(8)), ("b", [0, 4, 12, 16])):
        (tmp_path / f"{name}.json").write_text(json.dumps(list(ids)))
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--report", tmp_path / "a.json", tmp_path / "b.json",
              "--draw", tmp_path / "report.png")
    text = capsys.readouterr().out
    assert text.split()[:3] == ["whole", "a", "b"]
    assert row_cells(text, "topic: maps ") == ["12", "50.0%", "4", "50.0%", "4", "100.0%"]
    assert row_cells(text, "topic: covered ") == ["3", "100.0%", "3", "100.0%", "1", "33.3%"]
    assert row_cells(text, "skill: covered ") == ["8", "100.0%", "8", "100.0%", "2", "25.0%"]
    assert row_cells(text, "has image: yes ") == ["12", "50.0%", "4", "50.0%", "4", "100.0%"]
    assert row_cells(text, "repeated questions ") == ["12", "50.0%", "0", "0.0%", "2", "50.0%"]
    assert row_cells(text, "most repeated ") == ["2", "8.3%", "1", "12.5%", "2", "50.0%"]
    assert row_cells(text, "also in a ") == ["8", "33.3%", "8", "100.0%", "2", "50.0%"]
    assert row_cells(text, "percentile of options ") == ["50.0%"] * 3
    width, height = Image.open(tmp_path / "report.png").size
    assert width > 300 and height == 24 * len(text.splitlines())


def test_report_names_a_file_with_the_name_of_the_whole_by_its_path(monkeypatch, scienceqa, tmp_path, capsys):
    (tmp_path / "whole.json").write_text("[0, 4]")
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--report", tmp_path / "whole.json")
    text = capsys.readouterr().out
    assert text.split()[:2] == ["whole", str(tmp_path / "whole.json")]
    assert row_cells(text, "topic: maps ") == ["12", "50.0%", "2", "100.0%"]


def test_report_shows_the_smallest_distance_in_a_cache(monkeypatch, scienceqa, models, tmp_path, capsys):
    states = measure_states(monkeypatch, scienceqa, models[0], tmp_path / "a.json")
    distance = smallest_distance(torch.from_numpy(states[:4]))
    (tmp_path / "b.json").write_text("[0, 1, 2, 3]")
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--report", tmp_path / "b.json",
              "--cache", tmp_path / "a.cache")
    assert row_cells(capsys.readouterr().out, "smallest distance ") == ["-", f"{distance:.4g}"]


def test_report_on_one_question_has_no_smallest_distance(monkeypatch, scienceqa, models, tmp_path, capsys):
    (tmp_path / "one.json").write_text('["4"]')
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--report", tmp_path / "one.json",
              "--cache", tmp_path / "cache", "--model", models[0])
    assert row_cells(capsys.readouterr().out, "smallest distance")[-2:] == ["-", "-"]


def test_report_shows_the_gain_of_the_images(monkeypatch, scienceqa, models, tmp_path, capsys):
    flags = ("--method", "gain", "--keep", 3, "--model", models[0])
    choose_ids(monkeypatch, scienceqa, tmp_path / "a.json", *flags)
    gains = np.load(tmp_path / "a.cache" / "gain.npy")[:, 0]
    (tmp_path / "b.json").write_text("[0, 1, 2, 3]")
    capsys.readouterr()
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--report", tmp_path / "b.json",
              "--cache", tmp_path / "a.cache")
    text = capsys.readouterr().out
    assert row_cells(text, "mean gain of the image ") == [f"{gains.mean():.3f}", f"{gains[:4].mean():.3f}"]
    assert row_cells(text, "gain above 0 ")[::2] == [str((gains > 0).sum()), str((gains[:4] > 0).sum())]
    assert "smallest distance" not in text


def test_report_compares_records_without_scienceqa(monkeypatch, scienceqa, tmp_path, capsys):
    for seed, name in enumerate("ab"):
        flags = ("--method", "random", "--keep", 12, "--seed", seed)
        choose_ids(monkeypatch, scienceqa, tmp_path / f"{name}.json", *flags)
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    capsys.readouterr()
    run_prune(monkeypatch, "--report", tmp_path / "a.json", tmp_path / "b.json")
    text = capsys.readouterr().out
    common = {r["id"] for r in a} & {r["id"] for r in b}
    assert row_cells(text, "also in a ")[2] == str(len(common)) and 0 < len(common) < 12
    assert row_cells(text, "has image: yes ")[0] == str(sum("image" in r for r in a))
    changed = next(r for r in b if r["id"] in common)
    changed["conversations"][0]["value"] = "What else?"
    (tmp_path / "b.json").write_text(json.dumps(b))
    with pytest.raises(SystemExit, match="b.json has another question"):
        run_prune(monkeypatch, "--report", tmp_path / "a.json", tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------
# Studies


@pytest.fixture
def out_file(monkeypatch, tmp_path):
    """The --out of a fake train.py, which appends "ran" to it and exits with its first argument."""
    code = "import sys\nopen(sys.argv[3], 'a').write('ran')\nsys.exit(int(sys.argv[1]))"
    (tmp_path / "train.py").write_text(code)
    monkeypatch.setattr(prune, "__file__", str(tmp_path / "prune.py"))
    return tmp_path / "runs" / "out"


def test_study_runs_each_command_once(out_file):
    for _ in range(2):
        prune.run_command("train.py", 0, "--out", out_file)
    assert out_file.read_text() == "ran"


def test_study_reruns_failed_commands(out_file):
    for _ in range(2):
        with pytest.raises(ValueError, match="train.py failed"):
            prune.run_command("train.py", 3, "--out", out_file)
    assert out_file.read_text() == "ranran"


def test_study_rejects_output_of_another_command(out_file):
    prune.run_command("train.py", 0, "--out", out_file)
    with pytest.raises(ValueError, match="another command"):
        prune.run_command("train.py", 1, "--out", out_file)


def fake_run_command(commands: list[str], truncated: str = ""):
    """Return a replacement for run_command that only records each command and writes its output.

    A model trained on all questions answers all of them correctly if it gets the images. Otherwise only
    question 25 is correct, with Mistral and seed 1 also question 24. Answer files with `truncated` in their
    path end after 3 answers.
    """
    def run_command(name, *flags):
        out = flags[-1]
        if prune.done_file(out).exists():
            return
        commands.append(shlex.join([name, *map(str, flags)]))
        out.parent.mkdir(parents=True, exist_ok=True)
        if name == "train.py":
            out.mkdir()
            (out / "config.json").write_text('{"text_config": {"model_type": "llama"}}')
        if name == "eval.py":
            blank = "--blank" in flags
            if "all" in out.parent.name and not blank:
                known = {24, 25, 26, 27}
            elif out.parent.name.endswith("-1") and "mistral" in str(out):
                known = {24, 25}
            else:
                known = {25}
            ids = [24, 25] if blank else [24, 25, 26, 27]
            entries = [{"question_id": i, "text": "AB"[i % 2] if i in known else "C"} for i in ids]
            if truncated and truncated in str(out):
                entries = entries[:3]
            out.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        prune.done_file(out).write_text("")
    return run_command


def run_study(monkeypatch, scienceqa, out, *flags) -> dict[str, list[str]]:
    """Run a study and return the rows of its table."""
    run_prune(monkeypatch, "--scienceqa", scienceqa, "--study", out, "--pretrain", "captions.json",
              "--vision", "clip", "--language", "parts/mistral", "parts/llama@main",
              "--stage2", "--epochs 4 --lr 1e-3", *flags)
    lines = (out / "study.md").read_text().splitlines()[2:]
    return {name: row for name, *row in (line.strip("| ").split(" | ") for line in lines)}


def test_study_trains_all_variants_and_tabulates_differences(monkeypatch, scienceqa, tmp_path):
    commands, out = [], tmp_path / "study"
    monkeypatch.setattr(prune, "run_command", fake_run_command(commands))
    rows = run_study(monkeypatch, scienceqa, out, "--seeds", 2)
    assert sum(c.startswith("train.py --stage 1") for c in commands) == 2
    assert sum(c.startswith("train.py --stage 2") for c in commands) == 2 * 2 * len(prune.VARIANTS)
    assert sum("--blank" in c for c in commands) == sum(c.startswith("eval.py") for c in commands) / 2
    plain = next(c for c in commands if f"{out}/llama/guided-plain-1" in c)
    assert "--template plain" in plain and "--epochs 4" in plain and f"{out}/sets/guided.json" in plain
    assert not any("--template" in c for c in commands if c.startswith("eval.py"))     # see load_model
    assert "--keep 2" in next(c for c in commands if "--method maxmin" in c)         # 1/12 of 24
    assert f"--model {out}/llama/random-0" in next(c for c in commands if "--method gain" in c)
    one_epoch = next(c for c in commands if "all-one-epoch-0" in c)
    assert one_epoch.index("--epochs 4") < one_epoch.index("--epochs 1")             # the last flag wins
    assert len(rows) == 2 * len(prune.VARIANTS)
    assert Image.open(out / "study.png").height == 24 * (1 + len(rows))
    assert rows["mistral: all"][:3] == ["2", "100.0 (100.0 to 100.0)", "100.0 (100.0 to 100.0)"]
    assert rows["llama: guided"][2:4] == ["50.0 (0.0 to 100.0)"] * 2
    value, low, high = interval(np.array([[1, 0, 1, 1], [0, 0, 1, 1]]))
    assert rows["mistral: all"][4:] == [f"{value:+.1f} ({low:+.1f} to {high:+.1f})", "-"]
    assert rows["llama: all"][5] == "+0.0 (+0.0 to +0.0)" and rows["llama: random"][4] == "-"


def test_study_trains_named_variants_and_shows_all_finished(monkeypatch, scienceqa, tmp_path):
    commands, out = [], tmp_path / "study"
    monkeypatch.setattr(prune, "run_command", fake_run_command(commands))
    rows = run_study(monkeypatch, scienceqa, out, "--variants", "guided")
    assert list(rows) == ["mistral: guided", "llama: guided"]
    rows = run_study(monkeypatch, scienceqa, out, "--variants", "random", "--seeds", 1)
    assert sum(c.startswith("train.py --stage 2") for c in commands) == 2 * 2 + 2
    assert len(rows) == 4 and rows["mistral: guided"][4] == "+0.0 (+0.0 to +0.0)"     # seed 0 only
    rows = run_study(monkeypatch, scienceqa, out, "--variants", "random", "--seeds", 3)
    assert sum(c.startswith("train.py --stage 2") for c in commands) == 2 * 2 + 2 * 3
    assert rows["llama: guided"][0] == "2" and rows["llama: random"][0] == "3"
    with pytest.raises(SystemExit, match="'best' is none of 'all', "):
        run_study(monkeypatch, scienceqa, out, "--variants", "best")
    with pytest.raises(SystemExit, match="put random before gain"):
        run_study(monkeypatch, scienceqa, tmp_path / "new", "--variants", "gain", "random")
    with pytest.raises(SystemExit, match="study was begun with --keep 2: name another --study"):
        run_study(monkeypatch, scienceqa, out, "--keep", 3)
    with pytest.raises(SystemExit, match="two of --language are named llama"):
        run_study(monkeypatch, scienceqa, tmp_path / "new", "--language", "a/llama", "b/llama")


@pytest.mark.parametrize("flag, words", [("--stage1", "--lr '1"), ("--eval", "--limit 4"),
                                         ("--stage2", "--lr 1 --seed=5"), ("--tokenizer", "parts/mistral")])
def test_study_rejects_unfit_flags_for_its_programs(monkeypatch, scienceqa, tmp_path, capsys, flag, words):
    monkeypatch.setattr(prune, "run_command", fake_run_command(commands := []))
    with pytest.raises(SystemExit) as error:
        run_study(monkeypatch, scienceqa, tmp_path / "study", flag, words)
    assert error.value.code == 2 and not commands and f"error: {flag}" in capsys.readouterr().err


def test_study_uses_published_lists_as_variants(monkeypatch, scienceqa, tmp_path):
    commands, out = [], tmp_path / "study"
    monkeypatch.setattr(prune, "run_command", fake_run_command(commands))
    lists = [tmp_path / "hand.json", tmp_path / "l2.json"]
    rows = run_study(monkeypatch, scienceqa, out, "--from-list", *lists, "--variants", "l2", "hand", "random")
    assert [name for name in rows if "llama" in name] == ["llama: random", "llama: hand", "llama: l2"]
    command = next(c for c in commands if f"--from-list {lists[0]}" in c)
    assert command.endswith(f"--out {out}/sets/hand.json") and "--keep" not in command
    assert any(f"--data {out}/sets/l2.json" in c and f"{out}/mistral/l2-1" in c for c in commands)


def test_study_rejects_answers_to_other_questions(monkeypatch, scienceqa, tmp_path):
    monkeypatch.setattr(prune, "run_command", fake_run_command([], truncated="maxmin-1/test"))
    with pytest.raises(SystemExit, match="maxmin-1/test.jsonl answers other questions"):
        run_study(monkeypatch, scienceqa, tmp_path / "study")


# ---------------------------------------------------------------------------------------------
# Intervals


def interval_by_loops(values: np.ndarray, draws: int) -> np.ndarray:
    """The bootstrap interval by its definition: draw trainings, then questions, one draw at a time."""
    rng = np.random.default_rng(1)
    S, N = values.shape
    means = [values[rng.integers(S, size=S)][:, rng.integers(N, size=N)].mean() for _ in range(draws)]
    return 100 * np.percentile(means, (2.5, 97.5))


def test_interval_equals_bootstrap_of_trainings_and_questions():
    rng = np.random.default_rng(0)
    values = (rng.random((5, 80)) < rng.random((5, 1)) * rng.random(80)).astype(int)
    values[:, 40:] -= (rng.random((5, 40)) < 0.3).astype(int)             # paired differences: -1, 0, 1
    mean, *bounds = interval(values)
    assert mean == pytest.approx(100 * values.mean())
    assert np.allclose(bounds, interval_by_loops(values, 10000), atol=1)


def test_interval_is_wider_if_trainings_differ():
    same = np.tile(np.arange(100) % 2, (4, 1))
    differing = np.repeat([[0], [0], [1], [1]], 100, axis=1)
    assert interval(same)[1:] == pytest.approx((40, 60), abs=1)           # 50 +- 1.96 sqrt(0.25 / 100)
    assert interval(differing)[1:] == (0, 100)
