"""Which questions are chosen, by which measurements, and what a report and a study show of them."""

import itertools
import json
import shlex
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import prune
from eval import question, read_scienceqa, to_record
from llava import Llava, Processor, causal_attention, command_line, open_image, rope
from prune import choose_guided, choose_stratified, farthest_points, percentiles, two_level_interval
from tests.toy import write_random

torch.set_num_threads(1)
ARGS = SimpleNamespace(seed=0, image_text=None, model=None, method="guided")


def make_problem(i: int, topic="maps", has_image=True, skill="read", words=5, **more) -> dict:
    subject = {"maps": "social", "verbs": "language"}.get(topic, "natural") + " science"
    return {"id": str(i), "question": f"What is {i}?", "choices": ["yes", "no"], "answer": 0, "hint": "",
            "image": "image.png" if has_image else None, "grade": "grade5", "subject": subject,
            "topic": topic, "category": topic, "skill": skill, "lecture": "", "solution": "so " * words,
            "split": "train"} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 training questions, every other one with an image, and four test questions."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = [make_problem(i, ("maps", "verbs", "stars", "maps")[i % 4], i % 2 == 0, f"skill {i % 8}",
                             words=i % 5, question=f"What is {i % 12}?") for i in range(24)]
    problems += [make_problem(i, has_image=i < 26, answer=i % 2) | {"split": "test"} for i in range(24, 28)]
    ids = {split: [p["id"] for p in problems if p["split"] == split] for split in ("train", "test")}
    (folder / "problems.json").write_text(json.dumps({p["id"]: p for p in problems}))
    (folder / "pid_splits.json").write_text(json.dumps(ids))
    for p in (p for p in problems if p["image"]):
        place = folder / "images" / p["split"] / p["id"]
        place.mkdir(parents=True)
        pixels = np.random.default_rng(int(p["id"])).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "image.png")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [write_random(tmp_path_factory.mktemp("model"), seed) for seed in (0, 1)]


def go(monkeypatch, *words) -> None:
    """What the command line does."""
    monkeypatch.setattr(sys, "argv", ["prune.py", *map(str, words)])
    command_line(prune.main)


def kept_by(monkeypatch, folder, out, *words) -> list[str]:
    go(monkeypatch, "--scienceqa", folder, "--out", out, *words)
    return [record["id"] for record in json.loads(out.read_text())]


# ---------------------------------------------------------------------------------------------
# Farthest points


def select_by_loops(x: torch.Tensor, k: int, start: int) -> list[int]:
    """The definition, point by point, in float64."""
    picks, x = [start], x.double()
    while len(picks) < k:
        nearest = torch.stack([(x - x[i]).norm(dim=1) for i in picks]).amin(0)
        nearest[picks] = -1
        picks.append(int(nearest.argmax()))
    return picks


def smallest(x: torch.Tensor) -> float:
    return float(torch.nn.functional.pdist(x.double()).min())


@pytest.mark.parametrize("seed", range(20))
def test_farthest_points_follow_the_definition_also_far_from_the_origin(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 16, generator=rng) * torch.rand(16, generator=rng) + 1000 * (seed % 2)
    picks = farthest_points(x, 40, start=seed)
    assert picks.dtype == torch.int64 and picks.tolist() == select_by_loops(x, 40, seed)
    assert smallest(x[picks]) == smallest(x[select_by_loops(x, 40, seed)])


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_are_at_least_half_as_far_apart_as_can_be(seed):
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(seed))
    best = max(smallest(x[list(some)]) for some in itertools.combinations(range(10), 4))
    assert smallest(x[farthest_points(x, 4)]) >= best / 2


@pytest.mark.parametrize("seed", range(5))
def test_equally_far_points_are_taken_in_their_order(seed):
    grid = torch.randint(0, 4, (15, 3), generator=torch.Generator().manual_seed(seed)).float()
    assert farthest_points(grid, 15, start=0).tolist() == select_by_loops(grid, 15, 0)


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_come_last_and_nothing_comes_twice(seed):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed)).repeat(2, 1)
    picks = farthest_points(x, 12).tolist()
    assert {i % 6 for i in picks[:6]} == set(range(6))
    assert picks[6:] == [i for i in range(12) if i not in picks[:6]]


def test_the_first_point_is_the_nearest_to_the_mean():
    x = torch.tensor([[9.0], [0], [4], [1], [5]])                         # mean 3.8
    assert farthest_points(x, 2).tolist() == [2, 0] and farthest_points(x, 2, start=3).tolist() == [3, 0]


@pytest.mark.parametrize("k, value, complaint", ((0, 1.0, "0 of 3"), (4, 1.0, "4 of 3"),
                                                 (2, torch.nan, "point 1"), (2, torch.inf, "point 1")))
def test_farthest_points_refuse_what_has_no_answer(k, value, complaint):
    x = torch.ones(3, 2)
    x[1, 1] = value
    with pytest.raises(ValueError, match=complaint):
        farthest_points(x, k)


# ---------------------------------------------------------------------------------------------
# Rules and random choices


def test_guided_covers_subjects_topics_and_skills_with_images_first():
    problems = [make_problem(i, "maps", skill=f"skill {i % 3}") for i in range(60)]
    problems += [make_problem(60 + i, "stars", has_image=i == 7, skill="stars") for i in range(30)]
    problems += [make_problem(90 + i, "verbs", has_image=False, skill=f"verb {i}") for i in range(9)]
    problems += [make_problem(99, "ice", has_image=False, skill="stars")]
    kept = [problems[i] for i in choose_guided(problems, 20, ARGS)]
    assert {p["topic"] for p in kept} == {"maps", "stars", "verbs", "ice"} and "67" in {p["id"] for p in kept}
    assert {f"skill {i}" for i in range(3)} <= {p["skill"] for p in kept}
    assert sum(bool(p["image"]) for p in kept) == 17                      # 85% of 20; the other three
    assert len([p for p in kept if p["topic"] == "verbs"]) == 2           # are new skills, and the ice


def test_guided_keeps_more_of_larger_topics_by_their_square_roots():
    problems = [make_problem(i, "maps" if i < 400 else "stars") for i in range(500)]
    topics = [problems[i]["topic"] for i in choose_guided(problems, 30, ARGS)]
    assert topics.count("maps") == 20 and topics.count("stars") == 10     # 20 : 10 = sqrt(400) : sqrt(100)


@pytest.mark.parametrize("sign", ({"words": 20}, {"choices": list("abcd")}, {"solution": "so 1 + 1 = 2"},
                                  {"grade": "grade9"}), ids=lambda sign: next(iter(sign)))
def test_guided_prefers_each_sign_of_difficulty(sign):
    problems = [make_problem(i) for i in range(30)]
    problems[17] = make_problem(17, **sign)
    assert list(choose_guided(problems, 1, ARGS)) == [17]


def test_guided_prefers_images_with_more_to_read_where_that_is_known(tmp_path):
    (tmp_path / "ocr.json").write_text(json.dumps({"captions": {"4": "Exit here", "9": "Exit", "1000": "x"}}))
    known = SimpleNamespace(**vars(ARGS) | {"image_text": tmp_path / "ocr.json"})
    assert list(choose_guided([make_problem(i) for i in range(12)], 2, known)) == [4, 9]


def test_guided_prefers_words_that_point_at_the_image_then_words_not_kept_yet():
    problems = [make_problem(i, words=9, question="Who is it?") for i in range(5)]
    problems += [make_problem(5, question="Who else?"), make_problem(6, question="Who is shown?")]
    assert list(choose_guided(problems, 3, ARGS)) == [6, 0, 5]


def test_every_choice_can_say_why(monkeypatch, folder, tmp_path):
    for method in ("guided", "random", "stratified", "all"):
        ids = kept_by(monkeypatch, folder, tmp_path / "a.json", "--method", method, "--keep", 10, "--explain")
        reasons = json.loads((tmp_path / "a.why.json").read_text())
        assert [r["id"] for r in reasons] == ids and all(r["why"] for r in reasons)
    kept_by(monkeypatch, folder, tmp_path / "a.json", "--method", "guided", "--keep", 10, "--explain")
    first, *_, last = [r["why"] for r in json.loads((tmp_path / "a.why.json").read_text())]
    assert "the first of subject" in first and "it has an image" in first and "options 2" in last


def test_percentiles_count_equals_half():
    assert percentiles(np.array([3, 1, 1, 2])).tolist() == [0.875, 0.25, 0.25, 0.625]


def test_stratified_gives_each_topic_its_share():
    problems = [make_problem(i, ("maps", "verbs", "stars")[min(2, i // 40)]) for i in range(100)]
    for seed in range(5):
        kept = choose_stratified(problems, 10, SimpleNamespace(seed=seed))
        topics = [problems[i]["topic"] for i in kept]
        assert len(kept) == 10 and [topics.count(t) for t in ("maps", "verbs", "stars")] == [4, 4, 2]


def test_random_choices_depend_on_the_seed_alone(monkeypatch, folder, tmp_path):
    for method in ("random", "stratified"):
        a, b, again = (kept_by(monkeypatch, folder, tmp_path / "a.json", "--method", method, "--keep", 8,
                               "--seed", seed) for seed in (1, 2, 1))
        assert a == again != b and len(set(a)) == 8


def test_all_is_the_split_as_records(monkeypatch, folder, tmp_path):
    kept_by(monkeypatch, folder, tmp_path / "a.json", "--method", "all", "--pictures", "only")
    records = [to_record(p) for p in read_scienceqa(folder, "train", "only")]
    assert json.loads((tmp_path / "a.json").read_text()) == records and len(records) == 12


@pytest.mark.parametrize("entries", ([7, "4"], [{"id": 7}, {"id": "4", "conversations": []}]))
def test_a_published_list_is_kept_in_its_order(monkeypatch, folder, tmp_path, entries):
    (tmp_path / "list.json").write_text(json.dumps(entries))
    flags = ("--from-list", tmp_path / "list.json")
    assert kept_by(monkeypatch, folder, tmp_path / "a.json", *flags) == ["7", "4"]


@pytest.mark.parametrize("words, complaint", (
    ("--method random --keep 25", "--keep 25 is not between 1 and the 24"),
    ("--method maxmin --keep 0", "--keep 0"),
    ("--method guided --keep 2", "too few for 3 subjects"),
    ("--method stratified --keep 2", "too few for 3 subjects"),
    ("--method maxmin --keep 5", "name the --model"),
    ("--from-list {}/unknown.json", "lists 2 questions, such as 99, that are not among the 24"),
    ("--from-list {}/odd.json", "odd.json is neither a list"),
    ("--report {}/unknown.json", "lists 2 questions, such as 99"),
))
def test_bad_input_ends_in_one_sentence(monkeypatch, folder, tmp_path, words, complaint):
    (tmp_path / "unknown.json").write_text('["1", "99", 1000]')
    (tmp_path / "odd.json").write_text('{"1": "99"}')
    words = words.format(tmp_path).split()
    with pytest.raises(SystemExit) as stop:
        go(monkeypatch, "--scienceqa", folder, "--out", tmp_path / "a.json", *words)
    assert complaint in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "a.json").exists()


# ---------------------------------------------------------------------------------------------
# Measurements with a model


def states_of(monkeypatch, folder, model, out, *words) -> np.ndarray:
    kept_by(monkeypatch, folder, out, "--method", "maxmin", "--keep", 5, "--model", model, *words)
    return np.load(out.with_suffix(".cache") / f"{'mean' if 'mean' in words else 'last'}.npy")


def inputs_of(problem: dict, processor: Processor, answered: bool) -> dict:
    messages = [{"role": "user", "content": question(problem)}]
    messages += [{"role": "assistant", "content": prune.target_text(problem)}] * answered
    return processor(messages, [open_image(problem["file"])] if problem["image"] else [], labels=answered)


@pytest.mark.parametrize("layer, pooling", ((-1, "last"), (1, "last"), (-1, "mean"), (-3, "mean")))
def test_states_are_those_of_each_prompt_alone(monkeypatch, folder, models, tmp_path, layer, pooling):
    flags = ("--layer", layer, "--pooling", pooling)
    rows = states_of(monkeypatch, folder, models[0], tmp_path / "a.json", *flags)
    model = Llava.from_pretrained(models[0], dtype=torch.float32)
    processor = Processor.from_pretrained(models[0], model.config)
    for i, p in list(enumerate(read_scienceqa(folder, "train")))[::5]:
        with torch.no_grad():
            after = [model.splice(**inputs_of(p, processor, False))[0]]    # transformers' hidden_states
            angles = rope(torch.arange(after[0].shape[1]), model.config.text, torch.float32)
            for block in model.language_model.layers:
                attend = partial(causal_attention, window=model.config.text.sliding_window)
                after.append(block(after[-1], angles, attend))
            after[-1] = model.language_model.norm(after[-1])
        wanted = after[layer][0, -1] if pooling == "last" else after[layer][0].mean(0)
        assert torch.allclose(torch.tensor(rows[i]), wanted, atol=1e-4), i


def test_the_choice_is_that_of_farthest_points_over_the_states(monkeypatch, folder, models, tmp_path):
    flags = ("--method", "maxmin", "--keep", 6, "--model", models[0])
    ids = kept_by(monkeypatch, folder, tmp_path / "a.json", *flags)
    states = torch.from_numpy(np.load(tmp_path / "a.cache" / "last.npy"))
    assert ids == [str(i) for i in farthest_points(states, 6).tolist()]


def test_an_interrupted_measurement_resumes(monkeypatch, folder, models, tmp_path):
    whole = states_of(monkeypatch, folder, models[0], tmp_path / "a.json", "--batch-size", 5)
    measure_batch, batches = prune.measure_batch, []

    def stopping(model, processor, problems, what):
        batches.append(len(problems))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return measure_batch(model, processor, problems, what)

    monkeypatch.setattr(prune, "measure_batch", stopping)
    with pytest.raises(SystemExit):
        states_of(monkeypatch, folder, models[0], tmp_path / "b.json", "--batch-size", 5)
    again = states_of(monkeypatch, folder, models[0], tmp_path / "b.json", "--batch-size", 5)
    assert batches == [5, 5, 5, 5, 5, 4] and (again == whole).all()
    kept_by(monkeypatch, folder, tmp_path / "b.json", "--method", "maxmin", "--keep", 9)   # without a model
    assert len(batches) == 6


@pytest.mark.parametrize("words, other", (("--model {1}", "differs in model"),
                                          ("--model {0} --layer 1", "differs in layer"),
                                          ("--model {0} --pictures only", "differs in questions")))
def test_a_cache_of_something_else_is_refused(monkeypatch, folder, models, tmp_path, words, other):
    states_of(monkeypatch, folder, models[0], tmp_path / "a.json")
    with pytest.raises(SystemExit, match=other):
        kept_by(monkeypatch, folder, tmp_path / "a.json", "--method", "maxmin", "--keep", 5,
                *words.format(*models).split())


def test_states_that_are_not_finite_name_their_question(monkeypatch, folder, models, tmp_path):
    def broken(model, processor, problems, what):
        values = torch.ones(len(problems), model.config.text.hidden_size)
        values[1, 3] = torch.nan
        return values

    monkeypatch.setattr(prune, "measure_batch", broken)
    with pytest.raises(SystemExit, match="question .* not finite"):
        states_of(monkeypatch, folder, models[0], tmp_path / "a.json")


def test_the_loss_is_the_models_own_and_counts_as_difficulty(monkeypatch, folder, models, tmp_path):
    flags = ("--method", "guided", "--keep", 6, "--model", models[0], "--explain")
    kept_by(monkeypatch, folder, tmp_path / "a.json", *flags)
    losses = np.load(tmp_path / "a.cache" / "loss.npy")[:, 0]
    model = Llava.from_pretrained(models[0], dtype=torch.float32)
    processor = Processor.from_pretrained(models[0], model.config)
    for i, p in list(enumerate(read_scienceqa(folder, "train")))[::6]:
        with torch.no_grad():
            assert model(**inputs_of(p, processor, True)).item() == pytest.approx(losses[i], rel=1e-5)
    for reason in json.loads((tmp_path / "a.why.json").read_text()):
        assert f"loss {losses[int(reason['id'])]:.4g}" in reason["why"]


def test_the_gain_is_the_loss_with_a_white_image_minus_the_loss_with_the_image(monkeypatch, folder, models,
                                                                                tmp_path):
    flags = ("--method", "gain", "--keep", 6, "--model", models[0], "--batch-size", 5)
    ids = kept_by(monkeypatch, folder, tmp_path / "a.json", *flags)
    gains = np.load(tmp_path / "a.cache" / "gain.npy")[:, 0]
    model = Llava.from_pretrained(models[0], dtype=torch.float32)
    processor = Processor.from_pretrained(models[0], model.config)
    problems = read_scienceqa(folder, "train")
    for i, p in list(enumerate(problems))[::4]:
        inputs = inputs_of(p, processor, True)
        white = Image.new("RGB", (32, 32), "white")
        white = [processor([{"role": "user", "content": question(p)}], [white])["images"][0]]
        with torch.no_grad():
            expected = model(**inputs | {"images": white}).item() - model(**inputs).item()
        assert gains[i] == pytest.approx(expected, abs=2e-6) and abs(expected) > 1e-5
    assert all(gains[i] == 0 for i, p in enumerate(problems) if not p["image"])
    assert ids == [str(i) for i in sorted(range(24), key=lambda i: -gains[i])[:6]]


def test_measuring_the_gain_resumes_and_reads_only_questions_with_an_image(monkeypatch, folder, models,
                                                                          tmp_path):
    flags = ("--method", "gain", "--keep", 6, "--batch-size", 5, "--model", models[0])
    whole = kept_by(monkeypatch, folder, tmp_path / "a.json", *flags)
    measure_batch, measured = prune.measure_batch, []

    def stopping(model, processor, problems, what, white=False):
        if what == "gain":
            measured.extend(p["id"] for p in problems)
            if len(measured) == 10:
                raise KeyboardInterrupt
        return measure_batch(model, processor, problems, what, white)

    monkeypatch.setattr(prune, "measure_batch", stopping)
    with pytest.raises(SystemExit):
        kept_by(monkeypatch, folder, tmp_path / "b.json", *flags)
    assert kept_by(monkeypatch, folder, tmp_path / "b.json", *flags) == whole
    assert len(measured) == 5 + 5 + 7 and set(measured) == {str(i) for i in range(0, 24, 2)}


# ---------------------------------------------------------------------------------------------
# Reports


def cells(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()


def test_a_report_counts_coverage_repetition_and_overlap(monkeypatch, folder, tmp_path, capsys):
    for name, ids in (("a", range(8)), ("b", [0, 4, 12, 16])):
        (tmp_path / f"{name}.json").write_text(json.dumps(list(ids)))
    go(monkeypatch, "--scienceqa", folder, "--report", tmp_path / "a.json", tmp_path / "b.json",
       "--draw", tmp_path / "report.png")
    text = capsys.readouterr().out
    assert text.split()[:3] == ["whole", "a", "b"]
    assert cells(text, "topic: maps ") == ["12", "50.0%", "4", "50.0%", "4", "100.0%"]
    assert cells(text, "topic: covered ") == ["3", "100.0%", "3", "100.0%", "1", "33.3%"]
    assert cells(text, "skill: covered ") == ["8", "100.0%", "8", "100.0%", "2", "25.0%"]
    assert cells(text, "has image: yes ") == ["12", "50.0%", "4", "50.0%", "4", "100.0%"]
    assert cells(text, "repeated questions ") == ["12", "50.0%", "0", "0.0%", "2", "50.0%"]
    assert cells(text, "most repeated ") == ["2", "8.3%", "1", "12.5%", "2", "50.0%"]
    assert cells(text, "also in a ") == ["8", "33.3%", "8", "100.0%", "2", "50.0%"]
    assert cells(text, "percentile of options ") == ["50.0%"] * 3
    width, height = Image.open(tmp_path / "report.png").size
    assert width > 300 and height == 24 * len(text.splitlines())


def test_a_report_measures_the_smallest_distance_in_a_cache(monkeypatch, folder, models, tmp_path, capsys):
    states = torch.from_numpy(states_of(monkeypatch, folder, models[0], tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("[0, 1, 2, 3]")
    go(monkeypatch, "--scienceqa", folder, "--report", tmp_path / "b.json", "--cache", tmp_path / "a.cache")
    assert cells(capsys.readouterr().out, "smallest distance ") == ["-", f"{smallest(states[:4]):.4g}"]


def test_a_report_on_one_question_has_no_smallest_distance(monkeypatch, folder, models, tmp_path, capsys):
    list_ = tmp_path / "one.json"
    list_.write_text('["4"]')
    go(monkeypatch, "--scienceqa", folder, "--report", list_, "--cache", tmp_path / "cache", "--model", models[0])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("smallest distance"))
    assert line.split()[-2:] == ["-", "-"]


def test_a_report_shows_how_much_the_images_help(monkeypatch, folder, models, tmp_path, capsys):
    kept_by(monkeypatch, folder, tmp_path / "a.json", "--method", "gain", "--keep", 3, "--model", models[0])
    gains = np.load(tmp_path / "a.cache" / "gain.npy")[:, 0]
    (tmp_path / "b.json").write_text("[0, 1, 2, 3]")
    capsys.readouterr()
    go(monkeypatch, "--scienceqa", folder, "--report", tmp_path / "b.json", "--cache", tmp_path / "a.cache")
    text = capsys.readouterr().out
    assert cells(text, "mean gain of the image ") == [f"{gains.mean():.3f}", f"{gains[:4].mean():.3f}"]
    assert cells(text, "gain above 0 ")[::2] == [str((gains > 0).sum()), str((gains[:4] > 0).sum())]
    assert "smallest distance" not in text


def test_published_records_are_compared_without_the_data_set(monkeypatch, folder, tmp_path, capsys):
    for seed, name in enumerate("ab"):
        flags = ("--method", "random", "--keep", 12, "--seed", seed)
        kept_by(monkeypatch, folder, tmp_path / f"{name}.json", *flags)
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    capsys.readouterr()
    go(monkeypatch, "--report", tmp_path / "a.json", tmp_path / "b.json")
    text, common = capsys.readouterr().out, {r["id"] for r in a} & {r["id"] for r in b}
    assert cells(text, "also in a ")[2] == str(len(common)) and 0 < len(common) < 12
    assert cells(text, "has image: yes ")[0] == str(sum("image" in r for r in a))
    b[[r["id"] in common for r in b].index(True)]["conversations"][0]["value"] = "What else?"
    (tmp_path / "b.json").write_text(json.dumps(b))
    with pytest.raises(SystemExit, match="b.json has another question"):
        go(monkeypatch, "--report", tmp_path / "a.json", tmp_path / "b.json")


# ---------------------------------------------------------------------------------------------
# The study


@pytest.fixture
def program(monkeypatch, tmp_path):
    """A train.py that records that it ran and exits with its first argument."""
    code = "import sys\nopen(sys.argv[3], 'a').write('ran')\nsys.exit(int(sys.argv[1]))"
    (tmp_path / "train.py").write_text(code)
    monkeypatch.setattr(prune, "__file__", str(tmp_path / "prune.py"))
    return tmp_path / "runs" / "out"


def test_a_study_runs_each_command_once(program):
    for _ in range(2):
        prune.run_command("train.py", 0, "--out", program)
    assert program.read_text() == "ran"


def test_a_study_runs_again_what_failed(program):
    for _ in range(2):
        with pytest.raises(ValueError, match="train.py failed"):
            prune.run_command("train.py", 3, "--out", program)
    assert program.read_text() == "ranran"


def test_a_study_does_not_take_over_what_another_command_made(program):
    prune.run_command("train.py", 0, "--out", program)
    with pytest.raises(ValueError, match="another command"):
        prune.run_command("train.py", 1, "--out", program)


def pretend(commands: list[str], wrong: str = ""):
    """Stands for run_command: a model trained on all answers everything that it sees; the others answer
    only question 25, and with seed 1 also question 24."""
    def run(name, *flags):
        words = dict(zip(map(str, flags), map(str, flags[1:])))
        out = flags[-1]
        if prune.done_file(out).exists():
            return
        commands.append(shlex.join([name, *map(str, flags)]))
        out.parent.mkdir(parents=True, exist_ok=True)
        if name == "train.py":
            out.mkdir()
            (out / "config.json").write_text('{"text_config": {"model_type": "llama"}}')
        if name == "eval.py":
            known = {25, 24} if out.parent.name.endswith("-1") and "mistral" in str(out) else {25}
            known = {24, 25, 26, 27} if "all" in out.parent.name and "--blank" not in words else known
            ids = [24, 25] if "--blank" in words else [24, 25, 26, 27]
            entries = [{"question_id": i, "text": "AB"[i % 2] if i in known else "C"} for i in ids]
            entries = entries[:3] if wrong and wrong in str(out) else entries
            out.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        prune.done_file(out).write_text("")
    return run


def start_study(monkeypatch, folder, out, *flags) -> dict[str, list[str]]:
    """The rows of the study's table."""
    go(monkeypatch, "--scienceqa", folder, "--study", out, "--pretrain", "captions.json", "--vision", "clip",
       "--language", "parts/mistral", "parts/llama@main", "--stage2", "--epochs 4 --lr 1e-3", *flags)
    lines = (out / "study.md").read_text().splitlines()[2:]
    return {name: row for name, *row in (line.strip("| ").split(" | ") for line in lines)}


def test_a_study_trains_every_variant_and_shows_how_far_they_differ(monkeypatch, folder, tmp_path):
    commands, out = [], tmp_path / "study"
    monkeypatch.setattr(prune, "run_command", pretend(commands))
    rows = start_study(monkeypatch, folder, out, "--seeds", 2)
    assert sum(c.startswith("train.py --stage 1") for c in commands) == 2
    assert sum(c.startswith("train.py --stage 2") for c in commands) == 2 * 2 * len(prune.VARIANTS)
    assert sum("--blank" in c for c in commands) == sum(c.startswith("eval.py") for c in commands) / 2
    plain = next(c for c in commands if f"{out}/llama/guided-plain-1" in c)
    assert "--template plain" in plain and "--epochs 4" in plain and f"{out}/sets/guided.json" in plain
    assert "--keep 2" in next(c for c in commands if "--method maxmin" in c)         # a twelfth of 24
    assert f"--model {out}/llama/random-0" in next(c for c in commands if "--method gain" in c)
    once = next(c for c in commands if "all-one-epoch-0" in c)
    assert once.index("--epochs 4") < once.index("--epochs 1")                       # the last one counts
    assert len(rows) == 2 * len(prune.VARIANTS)
    assert Image.open(out / "study.png").height == 24 * (1 + len(rows))
    assert rows["mistral: all"][:3] == ["2", "100.0 (100.0 to 100.0)", "100.0 (100.0 to 100.0)"]
    assert rows["llama: guided"][2:4] == ["50.0 (0.0 to 100.0)"] * 2
    value, low, high = two_level_interval(np.array([[1, 0, 1, 1], [0, 0, 1, 1]]))
    assert rows["mistral: all"][4:] == [f"{value:+.1f} ({low:+.1f} to {high:+.1f})", "-"]
    assert rows["llama: all"][5] == "+0.0 (+0.0 to +0.0)" and rows["llama: random"][4] == "-"


def test_a_study_trains_what_variants_names_and_shows_what_is_finished(monkeypatch, folder, tmp_path):
    commands, out = [], tmp_path / "study"
    monkeypatch.setattr(prune, "run_command", pretend(commands))
    rows = start_study(monkeypatch, folder, out, "--variants", "guided")
    assert list(rows) == ["mistral: guided", "llama: guided"]
    rows = start_study(monkeypatch, folder, out, "--variants", "random", "--seeds", 1)
    assert sum(c.startswith("train.py --stage 2") for c in commands) == 2 * 2 + 2
    assert len(rows) == 4 and rows["mistral: guided"][4] == "+0.0 (+0.0 to +0.0)"     # on seed 0 alone
    rows = start_study(monkeypatch, folder, out, "--variants", "random", "--seeds", 3)
    assert sum(c.startswith("train.py --stage 2") for c in commands) == 2 * 2 + 2 * 3
    assert rows["llama: guided"][0] == "2" and rows["llama: random"][0] == "3"
    with pytest.raises(SystemExit, match="'best' is none of 'all', "):
        start_study(monkeypatch, folder, out, "--variants", "best")


def test_published_lists_are_variants_of_a_study(monkeypatch, folder, tmp_path):
    commands, out = [], tmp_path / "study"
    monkeypatch.setattr(prune, "run_command", pretend(commands))
    lists = [tmp_path / "hand.json", tmp_path / "l2.json"]
    rows = start_study(monkeypatch, folder, out, "--from-list", *lists, "--variants", "l2", "hand", "random")
    assert [name for name in rows if "llama" in name] == ["llama: random", "llama: hand", "llama: l2"]
    made = next(c for c in commands if f"--from-list {lists[0]}" in c)
    assert made.endswith(f"--out {out}/sets/hand.json") and "--keep" not in made
    assert any(f"--data {out}/sets/l2.json" in c and f"{out}/mistral/l2-1" in c for c in commands)


def test_a_study_refuses_answers_to_other_questions(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(prune, "run_command", pretend([], wrong="maxmin-1/test"))
    with pytest.raises(SystemExit, match="maxmin-1/test.jsonl answers other questions"):
        start_study(monkeypatch, folder, tmp_path / "study")


# ---------------------------------------------------------------------------------------------
# Intervals


def loop_interval(values: np.ndarray, draws: int) -> np.ndarray:
    """The definition: draw trainings, then questions, one draw at a time."""
    rng, (S, N) = np.random.default_rng(1), values.shape
    means = [values[rng.integers(S, size=S)][:, rng.integers(N, size=N)].mean() for _ in range(draws)]
    return 100 * np.percentile(means, (2.5, 97.5))


def test_intervals_draw_trainings_and_questions():
    rng = np.random.default_rng(0)
    values = (rng.random((5, 80)) < rng.random((5, 1)) * rng.random(80)).astype(int)
    values[:, 40:] -= rng.random((5, 40)) < 0.3                           # paired differences: -1, 0, 1
    mean, *bounds = two_level_interval(values)
    assert mean == pytest.approx(100 * values.mean())
    assert np.allclose(bounds, loop_interval(values, 10000), atol=1)


def test_trainings_that_differ_widen_the_interval():
    same = np.tile(np.arange(100) % 2, (4, 1))
    differing = np.repeat([[0], [0], [1], [1]], 100, axis=1)
    assert two_level_interval(same)[1:] == pytest.approx((40, 60), abs=1)  # 50 +- 1.96 sqrt(0.25 / 100)
    assert two_level_interval(differing)[1:] == (0, 100)
