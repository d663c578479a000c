"""Tests of eval.py: prompts, scores and answer files of ScienceQA, and the estimated cost of a model."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import eval
import llava
from eval import (are_correct, compare, costs, count_parameters, generate_answers, interval, language_flops,
                  parse_choice, print_table, question, read_answers, read_scienceqa, score, target_text,
                  to_record, vision_flops)
from llava import Llava, LlavaConfig, Processor, TextConfig, VisionConfig, open_image
from tests.toy import MISTRAL, write_random

torch.set_num_threads(1)
FIELDS = "question choices answer hint image grade subject lecture solution".split()
# id -> values of FIELDS; data_folder changes 2 to "grade2" and "natural" to "natural science".
PROBLEMS = {
    "11": ("What is red?", ["a rose", "snow"], 0, "", "image.png", 2, "natural", "Look.", "Roses are."),
    "12": ("Which way is  up?", ["north", "east", "west"], 0, "A map.", "image.png", 7, "social", "", ""),
    "13": ("Is run a verb?", ["no", "yes"], 1, "", None, 6, "language", "Verbs act.", "To run acts."),
    "14": ("Who? Question: whose?", ["he", "she", "it", "we", "I"], 4, "One.", None, 9, "language", "", "I."),
    "15": ("Is ice hot?", ["yes", "no"], 1, "", None, 1, "natural", "", ""),
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """A ScienceQA folder with four test questions and one training question."""
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = {i: dict(zip(FIELDS, values)) for i, values in PROBLEMS.items()}
    for p in problems.values():
        p |= {"grade": f"grade{p['grade']}", "subject": f"{p['subject']} science", "split": "test"}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["14", "11", "12", "13"], "train": ["15"]}))
    for i, (height, width) in (("11", (40, 30)), ("12", (16, 48))):
        pixels = np.random.default_rng(int(i)).integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / "images" / "test" / i).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "images" / "test" / i / "image.png")
    return folder


@pytest.fixture
def problems(data_folder):
    return read_scienceqa(data_folder, "test")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model_and_processor(model_folder):
    model = Llava.from_pretrained(model_folder, dtype=torch.float32).eval()
    return model, Processor.from_pretrained(model_folder, model.config)


def run_eval(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    eval.main()


def answer_scienceqa(monkeypatch, data_folder, model_folder, out, *more_flags) -> list[dict]:
    """The entries of the answer file `out` after a run of eval.py on the test questions."""
    run_eval(monkeypatch, "--scienceqa", data_folder, "--model", model_folder, "--max-new-tokens", 8,
             "--batch-size", 2, "--device", "cpu", "--dtype", "float32", "--out", out, *more_flags)
    return [json.loads(line) for line in out.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------
# Prompts, parsing of answers, scores


def test_prompt_and_target_are_those_of_llavas_training_data(problems):
    last, first, second, _ = problems
    assert question(first) == "What is red?\nContext: N/A\nOptions: (A) a rose (B) snow\n<image>"
    assert target_text(first) == "Look. Roses are. The answer is A."
    assert question(second).startswith("Which way is up?\nContext: A map.\nOptions: (A) north (B) east (C) ")
    assert target_text(second) == " The answer is A."          # the published target has this space
    assert question(last) == "Who? whose?\nContext: One.\nOptions: (A) he (B) she (C) it (D) we (E) I"
    assert question(first | {"hint": " \n"}) == question(first)       # stripped, as in LLaVA's script
    assert "\nContext: A map.\nOptions" in question(second | {"hint": "A map. "})
    assert to_record(first)["image"] == "11/image.png" and "image" not in to_record(last)


@pytest.mark.parametrize("text, index", [
    ("A", 0), ("A.", None), ("A. cat", 0), ("A.cat", None), ("(A)", None), ("a", None), ("B\n", None),
    ("The answer is B.", 1), ("The answer is B", None), ("The answer is A. The answer is B.", None),
    ("", None), ("The answer is Boron.", 1), ("The answer is A because", 0), ("Ice.\nThe answer is C.", 2),
    ("E", -1), ("D. no", -1), ("The answer is F.", -1), ("F", None)])
def test_parse_choice_follows_llavas_evaluation(text, index):
    assert parse_choice(text, choices=3) == index


def test_table_counts_wrong_unread_missing_and_extra_answers(problems, capsys):
    texts = {"11": "The answer is A.", "12": "north", "14": "E", "15": "The answer is B.", "x": "A"}
    table = score(problems, texts)
    assert table == {"NAT": 100, "SOC": 0, "LAN": 50, "TXT": 50, "IMG": 50, "NO": 0, "G1-6": 50, "G7-12": 50,
                     "Avg": 50, "questions": 4, "unread": 1, "missing": 1, "elsewhere": 2}
    assert are_correct(problems, texts) == [True, True, False, False]
    print_table({"test": table, "one": score(problems[:1], texts)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["one", "-", "-", "100.00", "100.00", "-", "-", "-", "100.00", "100.00"]
    assert lines[3] == "test: 4 questions, 1 answers could not be read, 1 missing, 2 to other questions"


def test_answer_file_may_contain_any_character_and_blank_lines(tmp_path):
    texts = {"1": "a\u2028b\x85c\nd", "2": ""}
    lines = [json.dumps({"question_id": int(i), "text": t}, ensure_ascii=False) for i, t in texts.items()]
    (tmp_path / "a").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_answers(tmp_path / "a") == texts


@pytest.mark.parametrize("line, message", [
    ('{"question_id": 1, "text": "B"}', "question 1 was answered before"), ('{"question_id": 2}', "not"),
    ('{"question_id": 2, "text": null}', "not"), ('{"question_id": 2, "te', "not"), ("[]", "not")])
def test_error_names_the_invalid_line_of_an_answer_file(tmp_path, line, message):
    (tmp_path / "a").write_text('{"question_id": 1, "text": "A"}\n' + line)
    with pytest.raises(ValueError, match=f"line 2: {message}"):
        read_answers(tmp_path / "a")


@pytest.mark.parametrize("paired", [False, True])
def test_interval_equals_that_of_explicit_resampling(paired):
    rng = np.random.default_rng(1)
    correct_a, correct_b = rng.random(60) < 0.8, rng.random(60) < 0.5
    outcomes = correct_a.astype(int)
    if paired:
        outcomes = outcomes - correct_b
    means = [100 * outcomes[rng.integers(0, 60, 60)].mean() for _ in range(20000)]
    mean, *bounds = interval([outcomes])
    assert mean == pytest.approx(100 * outcomes.mean())
    assert bounds == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=100 / 60)


def test_compare_prints_the_lead_in_each_column(problems, tmp_path, capsys):
    files = []
    for name, letters in (("a", "EAAB"), ("b", "EABA")):
        lines = [json.dumps({"question_id": p["id"], "text": letter}) for p, letter in zip(problems, letters)]
        (tmp_path / name).write_text("\n".join(lines))
        files.append(str(tmp_path / name))
    compare(problems, files)
    leads = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("lead")]
    assert [[float(points) for points in line] for line in leads] == [[0, 100, 50, 50, 50, 100, 50, 50, 50]]
    (tmp_path / "b").write_text('{"question_id": "99", "text": "A"}\n')
    message = "questions are answered in one file only, such as"
    with pytest.raises(ValueError, match=f"5 {message} 11 in {files[0]}"):
        compare(problems, files)
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match=f"1 {message} 99 in {files[1]}"):
        compare(problems, files)


# ---------------------------------------------------------------------------------------------
# Answering with a model


def answer_problems(model_and_processor, problems, **options) -> dict[str, str]:
    """id -> answer to each problem, of at most 12 tokens."""
    answers = generate_answers(*model_and_processor, problems, max_new_tokens=12, **options)
    return {p["id"]: text for p, text in answers}


def test_batched_answers_equal_single_answers(model_and_processor, problems):
    single = answer_problems(model_and_processor, problems, batch_size=1)
    assert single == answer_problems(model_and_processor, problems, batch_size=4)
    assert len(set(single.values())) == 4


def test_chosen_option_has_the_highest_probability(model_and_processor, problems):
    """The log-probability of a whole answer is the sum over its tokens."""
    model, processor = model_and_processor
    answers = generate_answers(model, processor, problems, batch_size=4, options=True)
    chosen = {p["id"]: text for p, text in answers}
    for p in problems:
        images, sums = [open_image(p["file"])] if p["image"] else [], []
        for letter in "ABCDE"[:len(p["choices"])]:
            inputs = processor([{"role": "user", "content": question(p)}], images)
            answer_ids = torch.tensor([processor.encode(f"The answer is {letter}")])
            inputs["input_ids"] = torch.cat((inputs["input_ids"], answer_ids), dim=1)
            with torch.no_grad():
                log_probs = model(**inputs)[0, -1 - answer_ids.shape[1]:-1].log_softmax(-1)
            sums.append(float(log_probs.gather(1, answer_ids.T).sum()))
        assert chosen[p["id"]] == f"The answer is {'ABCDE'[int(np.argmax(sums))]}."
        assert parse_choice(chosen[p["id"]], len(p["choices"])) == np.argmax(sums)


def test_blank_replaces_images_by_white_ones(model_and_processor, problems, tmp_path):
    Image.new("RGB", (30, 40), "white").save(tmp_path / "11.png")         # the sizes of the original images
    Image.new("RGB", (48, 16), "white").save(tmp_path / "12.png")
    white_problems = [p | {"file": tmp_path / f"{p['id']}.png"} for p in problems]
    blank = answer_problems(model_and_processor, problems, blank=True)
    normal = answer_problems(model_and_processor, problems)
    assert blank == answer_problems(model_and_processor, white_problems)
    assert blank["11"] != normal["11"] and blank["13"] == normal["13"]


def test_interrupted_run_is_continued(monkeypatch, data_folder, model_folder, tmp_path):
    uninterrupted = answer_scienceqa(monkeypatch, data_folder, model_folder, tmp_path / "whole.jsonl")
    generate_batch, batch_sizes = Llava.generate_batch, []

    def stop_in_second_batch(self, input_ids, *args, **kwargs):
        batch_sizes.append(len(input_ids))
        if len(batch_sizes) == 2:
            raise KeyboardInterrupt
        return generate_batch(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(Llava, "generate_batch", stop_in_second_batch)
    out = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_scienceqa(monkeypatch, data_folder, model_folder, out)
    assert len(out.read_text().splitlines()) == 2                         # only the second batch is missing
    with open(out, "a") as file:
        file.write('{"question_id": "13", "prom')                         # a full disk leaves such a line
    for _ in range(2):                                                    # the second run has nothing to do
        assert answer_scienceqa(monkeypatch, data_folder, model_folder, out) == uninterrupted
        assert batch_sizes == [2, 2, 2]


@pytest.mark.parametrize("changed_flags, setting", [
    (["--blank"], "blank"), (["--answer", "options"], "answer"), (["--prune", "prumerge"], "prune"),
    (["--max-new-tokens", 9], "max_new_tokens"), (["--wording", "letter"], "wording"),
    (["--dtype", "bfloat16"], "dtype")])
def test_answer_file_made_with_other_flags_is_refused(monkeypatch, data_folder, model_folder, tmp_path,
                                                      changed_flags, setting):
    answer_scienceqa(monkeypatch, data_folder, model_folder, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match=f"another {setting}: name another --out"):
        answer_scienceqa(monkeypatch, data_folder, model_folder, tmp_path / "a", *changed_flags)
    assert (tmp_path / "a").read_bytes() == before


def test_answer_file_of_another_model_or_prompt_is_refused(monkeypatch, data_folder, model_folder,
                                                           model_and_processor, tmp_path):
    out, (model, processor) = tmp_path / "a", model_and_processor
    entries = answer_scienceqa(monkeypatch, data_folder, model_folder, out)
    model.projector[0].weight.data += 1e-3
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="another model"):
        answer_scienceqa(monkeypatch, data_folder, tmp_path / "trained", out)
    out.write_text(json.dumps(entries[0] | {"prompt": "Why?"}) + "\n")
    with pytest.raises(ValueError, match="another prompt"):
        answer_scienceqa(monkeypatch, data_folder, model_folder, out)


def test_file_without_answers_is_refused_and_unchanged(monkeypatch, data_folder, model_folder, tmp_path):
    for content in ('{"1": {"question": "Why?"}}', "words\n", "words", '{"1": {"que', '{"question_id": 1}\n',
                    "[" * 100_000, '{"question_id": 1, "text": "A", "metadata": 5}\n'):
        (tmp_path / "a").write_text(content)
        with pytest.raises(ValueError, match="another --out|line 1: not"):
            answer_scienceqa(monkeypatch, data_folder, model_folder, tmp_path / "a")
        assert (tmp_path / "a").read_text() == content


@pytest.mark.parametrize("flags", [[], ["--scienceqa", "x"], ["--model", "x"],
                                   ["--scienceqa", "x", "--model", "x", "--predictions", "y"]])
def test_invalid_flags_exit_with_code_2(monkeypatch, flags):
    with pytest.raises(SystemExit) as error:
        run_eval(monkeypatch, *flags)
    assert error.value.code == 2


def test_options_are_compared_in_float32(model_folder, problems):
    """The logits of A and B differ in float32 and are equal in bfloat16."""
    model = Llava.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    processor = Processor.from_pretrained(model_folder, model.config)
    problem = [p for p in problems if p["id"] == "13"]
    rows = [processor.encode(f"The answer is {letter}")[-1] for letter in "AB"]
    head, states = model.language_model.lm_head, []
    norm = model.language_model.norm
    handle = norm.register_forward_hook(lambda module, args, output: states.append(output))
    list(generate_answers(model, processor, problem, options=True))
    handle.remove()
    hidden = states[0].flatten()
    with torch.no_grad():                    # B's logit is larger by less than the precision of bfloat16
        head.weight[rows] = 10 * hidden / hidden.norm()
        largest = int(hidden.abs().argmax())
        head.weight[rows[1], largest] *= 1 + 2**-7
        a, b = (hidden.to(torch.bfloat16) @ head.weight[rows].T).tolist()
    assert a == b
    answers = generate_answers(model, processor, problem, options=True)
    assert [text for _, text in answers] == ["The answer is B."]


def test_wording_letter_gives_the_prompt_of_llava_1_5(problems):
    assert question(problems[2], "letter") == (
        "<image>\nContext: A map.\nWhich way is up?\nA. north\nB. east\nC. west\n"
        "Answer with the option's letter from the given choices directly.")
    assert question(problems[3], wording="letter").startswith("Is run a verb?\nA. no\nB. yes\nAnswer")


def test_wording_letter_prints_the_accuracy_with_images(monkeypatch, data_folder, tmp_path, capsys):
    texts = {"14": "E", "11": "A", "12": "B", "13": "B"}
    lines = [json.dumps({"question_id": i, "text": text}) for i, text in texts.items()]
    (tmp_path / "a").write_text("\n".join(lines) + "\n")
    run_eval(monkeypatch, "--scienceqa", data_folder, "--predictions", tmp_path / "a", "--wording", "letter",
             "--json", tmp_path / "figures.json")
    assert "published figure is that of the questions with an image: 50.0" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["IMG"], figures["Avg"], figures["missing"], figures["questions"]) == (50, 75, 0, 4)


# ---------------------------------------------------------------------------------------------
# Cost

SMALL = TextConfig(**MISTRAL | {"vocab_size": 50, "head_dim": 24, "sliding_window": 7})
CONFIGS = {
    "mistral": LlavaConfig(VisionConfig(32, 80, 3, 2, 32, 8), SMALL),
    "linear": LlavaConfig(VisionConfig(48, 64, 2, 3, 28), SMALL, vision_feature_layer=-1, projector="linear"),
    "anyres": LlavaConfig(VisionConfig(32, 80, 3, 2, 32, 8), SMALL, image_mode="anyres"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_costs_equal_the_counts_of_torch(name):
    config, cost = CONFIGS[name], costs(CONFIGS[name], text_tokens=11)
    side, text = config.vision.image_size, config.text
    tiles, newlines = (5, 8) if name == "anyres" else (1, 0)
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = Llava(replace(config, text=replace(text, sliding_window=None)))
        model.projector(model.vision_tower(torch.empty(1, 3, side, side), config.vision_feature_layer)[:, 1:])
        tile_flops = counter.get_total_flops()
        hidden = model.language_model(torch.empty(1, cost["tokens, image and text"], text.hidden_size))
        model.language_model.lm_head(hidden[:, -1:])
    flops = tile_flops * (tiles - 1) + counter.get_total_flops()
    assert cost["TFLOPs"] == pytest.approx(flops / 1e12, rel=1e-12)
    assert cost["parameters"] == sum(p.numel() for p in Llava(config).parameters())
    assert cost["TFLOPs, vision_tower"] == pytest.approx(tiles * vision_flops(config.vision, 2) / 1e12)
    assert cost["MiB of keys and values"] == 2 * 2 * 3 * 1 * 24 * 7 / 2**20              # 7: the window
    assert cost["tokens, image and text"] == 11 + config.vision.side**2 * tiles + newlines


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 30])
def test_causal_flops_count_only_pairs_inside_the_window(tokens):
    pairs = sum(0 <= i - j < 7 for i in range(tokens) for j in range(tokens))
    difference = language_flops(SMALL, tokens, causal=False) - language_flops(SMALL, tokens)
    assert difference == SMALL.num_hidden_layers * 4 * SMALL.num_attention_heads * 24 * (tokens**2 - pairs)
    difference = language_flops(SMALL, tokens, logits=5) - language_flops(SMALL, tokens)
    assert difference == 4 * 2 * SMALL.hidden_size * 50


def test_parameter_counts_of_the_published_models():
    parts = [count_parameters(config) for config in eval.PUBLISHED.values()]
    assert [p["language_model"] for p in parts] == [7241732096, 6738415616, 13015864320]
    assert [sum(p.values()) for p in parts] == [7566219264, 7062902784, 13350839296]
    assert {p["vision_tower"] for p in parts} == {303507456}
    mistral, llama_7b, llama_13b = (p["language_model"] for p in parts)
    assert (round(mistral / llama_13b, 3), round(mistral / llama_7b, 3)) == (0.556, 1.075)   # not 7 / 13


def test_cost_prints_and_writes_the_published_models(monkeypatch, capsys, tmp_path):
    run_eval(monkeypatch, "--cost", "--json", tmp_path / "figures.json")
    out = capsys.readouterr().out
    for figure in ("7,566,219,264", "14.093", "5.0336", "0.36603", "0.024159", "75.75"):
        assert figure in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == list(eval.PUBLISHED) and figures["LLaVA-1.5-7B"]["parameters"] == 7062902784


def test_int4_bytes_equals_the_size_of_a_quantized_model():
    text = TextConfig(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    vision = VisionConfig(32, 48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16)
    model, state = Llava(LlavaConfig(vision, text, projector="linear")), {}
    for name, tensor in model.state_dict().items():
        llava.place_tensor(model, state, name, tensor, "int4", "cpu", torch.bfloat16)
    model.load_state_dict(state, assign=True)
    scales_of_lm_head = 2 * 96
    assert llava.count_weights(model)[1] == eval.int4_bytes(model.config) + scales_of_lm_head


def test_language_flops_reproduce_prumerges_table_ii():
    """TFLOPs of the language model for 700 and 70 tokens. The published INT4 figures are FP16 / 4; that of
    the pruned 7B, 0.28, is not."""
    for name, published in eval.TABLE_II.items():
        text = eval.PUBLISHED[name].text
        full, pruned = (language_flops(text, tokens, causal=False) / 1e12 for tokens in (700, 70))
        for theirs, ours in zip(published, (full, pruned, full / 4, pruned / 4)):
            if theirs != 0.28:
                assert ours == pytest.approx(theirs, rel=0.02)
        unpruned = language_flops(text, 30 + 576, causal=False) / 1e12    # 576 image tokens become 40
        assert unpruned / pruned == pytest.approx(8.8, abs=0.05)


def test_cost_needs_only_the_config_of_a_model(monkeypatch, capsys, model_folder, model_and_processor,
                                               tmp_path):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    run_eval(monkeypatch, "--cost", 5, "--model", tmp_path)
    lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines["tokens, image and text"] == "21"
    parameters = sum(p.numel() for p in model_and_processor[0].parameters())
    assert lines["parameters"] == f"{parameters:,}"


def test_cost_counts_only_the_kept_tokens(monkeypatch, tmp_path):
    """The projector gets only kept tokens, except with divprune, which chooses among projected tokens."""
    figures = {}
    for name in ("none", "random", "divprune"):
        keep = () if name == "none" else ("--keep-tokens", 64)
        run_eval(monkeypatch, "--cost", 30, "--prune", name, *keep, "--json", tmp_path / "figures.json")
        figures[name] = json.loads((tmp_path / "figures.json").read_text())["LLaVA-1.5-7B"]
    assert [f["tokens, image and text"] for f in figures.values()] == [606, 94, 94]
    none, random, divprune = (f["TFLOPs, projector"] for f in figures.values())
    assert none == divprune == pytest.approx(9 * random)
