"""ScienceQA: prompts, the official table, answers on disk; the cost of an image."""

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
KEYS = "question choices answer hint image grade subject lecture solution"
PROBLEMS = {
    "11": ("What is red?", ["a rose", "snow"], 0, "", "image.png", 2, "natural", "Look.", "Roses are."),
    "12": ("Which way is  up?", ["north", "east", "west"], 0, "A map.", "image.png", 7, "social", "", ""),
    "13": ("Is run a verb?", ["no", "yes"], 1, "", None, 6, "language", "Verbs act.", "To run acts."),
    "14": ("Who? Question: whose?", ["he", "she", "it", "we", "I"], 4, "One.", None, 9, "language", "", "I."),
    "15": ("Is ice hot?", ["yes", "no"], 1, "", None, 1, "natural", "", ""),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scienceqa")
    problems = {i: dict(zip(KEYS.split(), p)) for i, p in PROBLEMS.items()}
    for p in problems.values():
        p |= {"grade": f"grade{p['grade']}", "subject": f"{p['subject']} science", "split": "test"}
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["14", "11", "12", "13"], "train": ["15"]}))
    for i, size in (("11", (40, 30)), ("12", (16, 48))):
        pixels = np.random.default_rng(int(i)).integers(0, 256, (*size, 3), dtype=np.uint8)
        (folder / "images" / "test" / i).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "images" / "test" / i / "image.png")
    return folder


@pytest.fixture
def problems(folder):
    return read_scienceqa(folder, "test")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model"))


@pytest.fixture
def opened(model_folder):
    model = Llava.from_pretrained(model_folder, dtype=torch.float32).eval()
    return model, Processor.from_pretrained(model_folder, model.config)


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    eval.main()


def ask(monkeypatch, folder, model_folder, out, *more) -> list[dict]:
    run(monkeypatch, "--scienceqa", folder, "--model", model_folder, "--max-new-tokens", 8, "--batch-size", 2,
        "--device", "cpu", "--dtype", "float32", "--out", out, *more)
    return [json.loads(line) for line in out.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------
# Wording, reading, counting


def test_a_prompt_is_that_of_llavas_training_data(problems):
    last, first, second, _ = problems
    assert question(first) == "What is red?\nContext: N/A\nOptions: (A) a rose (B) snow\n<image>"
    assert target_text(first) == "Look. Roses are. The answer is A."
    assert question(second).startswith("Which way is up?\nContext: A map.\nOptions: (A) north (B) east (C) ")
    assert target_text(second) == " The answer is A."          # with its space, as published
    assert question(last) == "Who? whose?\nContext: One.\nOptions: (A) he (B) she (C) it (D) we (E) I"
    assert to_record(first)["image"] == "11/image.png" and "image" not in to_record(last)


@pytest.mark.parametrize("text, index", [
    ("A", 0), ("A.", None), ("A. cat", 0), ("A.cat", None), ("(A)", None), ("a", None), ("B\n", None),
    ("The answer is B.", 1), ("The answer is B", None), ("The answer is A. The answer is B.", None),
    ("", None), ("The answer is Boron.", 1), ("The answer is A because", 0), ("Ice.\nThe answer is C.", 2),
    ("E", -1), ("D. no", -1), ("The answer is F.", -1), ("F", None)])
def test_answers_are_read_as_the_benchmark_reads_them(text, index):
    assert parse_choice(text, choices=3) == index


def test_the_table_counts_wrong_unread_missing_and_foreign_answers(problems, capsys):
    texts = {"11": "The answer is A.", "12": "north", "14": "E", "15": "The answer is B.", "x": "A"}
    table = score(problems, texts)
    assert table == {"NAT": 100, "SOC": 0, "LAN": 50, "TXT": 50, "IMG": 50, "NO": 0, "G1-6": 50, "G7-12": 50,
                     "Avg": 50, "questions": 4, "unread": 1, "missing": 1, "elsewhere": 2}
    assert are_correct(problems, texts) == [True, True, False, False]
    print_table({"test": table, "one": score(problems[:1], texts)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["one", "-", "-", "100.00", "100.00", "-", "-", "-", "100.00", "100.00"]
    assert lines[3] == "test: 4 questions, 1 answers could not be read, 1 missing, 2 to other questions"


def test_a_file_of_answers_may_hold_any_character_and_blank_lines(tmp_path):
    texts = {"1": "a\u2028b\x85c\nd", "2": ""}
    lines = [json.dumps({"question_id": int(i), "text": t}, ensure_ascii=False) for i, t in texts.items()]
    (tmp_path / "a").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_answers(tmp_path / "a") == texts


@pytest.mark.parametrize("line, complaint", [
    ('{"question_id": 1, "text": "B"}', "question 1 was answered before"), ('{"question_id": 2}', "not"),
    ('{"question_id": 2, "text": null}', "not"), ('{"question_id": 2, "te', "not"), ("[]", "not")])
def test_a_bad_line_of_answers_is_named(tmp_path, line, complaint):
    (tmp_path / "a").write_text('{"question_id": 1, "text": "A"}\n' + line)
    with pytest.raises(ValueError, match=f"line 2: {complaint}"):
        read_answers(tmp_path / "a")


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_is_that_of_resampling_question_by_question(paired):
    rng = np.random.default_rng(1)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.5
    gained = a.astype(float) - b if paired else a.astype(float)
    means = [100 * gained[rng.integers(0, 60, 60)].mean() for _ in range(20000)]
    middle, *bounds = interval(list(a), list(b) if paired else None)
    assert middle == pytest.approx(100 * gained.mean())
    assert bounds == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=100 / 60)


def test_two_files_of_answers_are_compared_question_by_question(problems, tmp_path, capsys):
    files = []
    for name, letters in (("a", "EAAB"), ("b", "EABA")):
        files.append(str(tmp_path / name))
        (tmp_path / name).write_text("\n".join(json.dumps({"question_id": p["id"], "text": letter})
                                               for p, letter in zip(problems, letters)))
    compare(problems, files)
    ahead = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("lead")]
    assert [[float(points) for points in line] for line in ahead] == [[0, 100, 50, 50, 50, 100, 50, 50, 50]]
    (tmp_path / "b").write_text('{"question_id": "99", "text": "A"}\n')
    with pytest.raises(ValueError, match=f"5 questions are answered in one file only, such as 11 in {files[0]}"):
        compare(problems, files)
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match=f"1 questions are answered in one file only, such as 99 in {files[1]}"):
        compare(problems, files)


# ---------------------------------------------------------------------------------------------
# Asking


def test_a_batch_gives_the_answers_of_one_question_at_a_time(opened, problems):
    def answers(**how):
        return {p["id"]: text for p, text in generate_answers(*opened, problems, max_new_tokens=12, **how)}

    alone = answers(batch_size=1)
    assert alone == answers(batch_size=4) and len(set(alone.values())) == 4


def test_the_option_taken_is_the_most_probable_whole_answer(opened, problems):
    model, processor = opened
    taken = {p["id"]: text for p, text in generate_answers(model, processor, problems, batch_size=4,
                                                              options=True)}
    for p in problems:
        images, sums = [open_image(p["file"])] if p["image"] else [], []
        for letter in "ABCDE"[:len(p["choices"])]:
            inputs = processor([{"role": "user", "content": question(p)}], images)
            words = torch.tensor([processor.encode(f"The answer is {letter}")])
            inputs["input_ids"] = torch.cat((inputs["input_ids"], words), dim=1)
            with torch.no_grad():
                logits = model(**inputs)[0, -1 - words.shape[1]:-1].log_softmax(-1)
            sums.append(float(logits.gather(1, words.T).sum()))
        assert taken[p["id"]] == f"The answer is {'ABCDE'[int(np.argmax(sums))]}."
        assert parse_choice(taken[p["id"]], len(p["choices"])) == np.argmax(sums)


def test_blank_answers_equal_those_to_white_images(opened, folder, problems, tmp_path):
    def answers(problems, **how):
        return {p["id"]: text for p, text in generate_answers(*opened, problems, max_new_tokens=12, **how)}

    Image.new("RGB", (30, 40), "white").save(tmp_path / "11.png")         # as large as they were
    Image.new("RGB", (48, 16), "white").save(tmp_path / "12.png")
    white = [p | {"file": tmp_path / f"{p['id']}.png"} for p in problems]
    blank, normal = answers(problems, blank=True), answers(problems)
    assert blank == answers(white) and blank["11"] != normal["11"] and blank["13"] == normal["13"]


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, folder, model_folder, tmp_path):
    whole = ask(monkeypatch, folder, model_folder, tmp_path / "whole.jsonl")
    generate, calls = Llava.generate_batch, []

    def stop_at_the_second(self, input_ids, *rest, **more):
        calls.append(len(input_ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, input_ids, *rest, **more)

    monkeypatch.setattr(Llava, "generate_batch", stop_at_the_second)
    out = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ask(monkeypatch, folder, model_folder, out)
    assert len(out.read_text().splitlines()) == 2                         # a batch was lost, no more
    with open(out, "a") as file:
        file.write('{"question_id": "13", "prom')                         # as a full disk leaves it
    assert ask(monkeypatch, folder, model_folder, out) == whole
    assert calls == [2, 2, 2]
    assert ask(monkeypatch, folder, model_folder, out) == whole and calls == [2, 2, 2]


@pytest.mark.parametrize("change, difference", [
    (["--blank"], "blank"), (["--answer", "options"], "answer"), (["--prune", "prumerge"], "prune"),
    (["--max-new-tokens", 9], "max_new_tokens"), (["--wording", "letter"], "wording"),
    (["--dtype", "bfloat16"], "dtype")])
def test_answers_by_other_flags_are_refused(monkeypatch, folder, model_folder, tmp_path, change, difference):
    ask(monkeypatch, folder, model_folder, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(ValueError, match=f"another {difference}: name another --out"):
        ask(monkeypatch, folder, model_folder, tmp_path / "a", *change)
    assert (tmp_path / "a").read_bytes() == before


def test_answers_of_another_model_or_prompt_are_refused(monkeypatch, folder, model_folder, opened, tmp_path):
    out, (model, processor) = tmp_path / "a", opened
    entries = ask(monkeypatch, folder, model_folder, out)
    model.projector[0].weight.data += 1e-3
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="another model"):
        ask(monkeypatch, folder, tmp_path / "trained", out)
    out.write_text(json.dumps(entries[0] | {"prompt": "Why?"}) + "\n")
    with pytest.raises(ValueError, match="another prompt"):
        ask(monkeypatch, folder, model_folder, out)


def test_a_file_that_holds_no_answers_is_left_alone(monkeypatch, folder, model_folder, tmp_path):
    for content in ('{"1": {"question": "Why?"}}', "words\n", "words", '{"1": {"que', '{"question_id": 1}\n',
                    "[" * 100_000, '{"question_id": 1, "text": "A", "metadata": 5}\n'):
        (tmp_path / "a").write_text(content)
        with pytest.raises(ValueError, match="another --out|line 1: not"):
            ask(monkeypatch, folder, model_folder, tmp_path / "a")
        assert (tmp_path / "a").read_text() == content


@pytest.mark.parametrize("words", [[], ["--scienceqa", "x"], ["--model", "x"],
                                   ["--scienceqa", "x", "--model", "x", "--predictions", "y"]])
def test_misuse_exits_with_2(monkeypatch, words):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    assert stopped.value.code == 2


def test_equal_logits_in_bfloat16_are_told_apart_in_float32(model_folder, problems):
    model = Llava.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    processor = Processor.from_pretrained(model_folder, model.config)
    problem = [p for p in problems if p["id"] == "13"]
    rows = [processor.encode(f"The answer is {letter}")[-1] for letter in "AB"]
    head, states = model.language_model.lm_head, []
    handle = model.language_model.norm.register_forward_hook(lambda *a: states.append(a[-1]))
    list(generate_answers(model, processor, problem, options=True))
    handle.remove()
    hidden = states[0].flatten()
    with torch.no_grad():                    # B's logit is larger by less than bfloat16 shows
        head.weight[rows] = 10 * hidden / hidden.norm()
        largest = int(hidden.abs().argmax())
        head.weight[rows[1], largest] *= 1 + 2**-7
        a, b = (hidden.to(torch.bfloat16) @ head.weight[rows].T).tolist()
    assert a == b
    assert [text for _, text in generate_answers(model, processor, problem,
                                                  options=True)] == ["The answer is B."]


def test_wording_letter_is_the_prompt_of_llava_1_5(problems):
    assert question(problems[2], "letter") == (
        "<image>\nContext: A map.\nWhich way is up?\nA. north\nB. east\nC. west\n"
        "Answer with the option's letter from the given choices directly.")
    assert question(problems[3], wording="letter").startswith("Is run a verb?\nA. no\nB. yes\nAnswer")


def test_wording_letter_prints_the_accuracy_with_images(monkeypatch, folder, tmp_path, capsys):
    texts = {"14": "E", "11": "A", "12": "B", "13": "B"}
    (tmp_path / "a").write_text("".join(json.dumps({"question_id": i, "text": t}) + "\n" for i,
                                        t in texts.items()))
    run(monkeypatch, "--scienceqa", folder, "--predictions", tmp_path / "a", "--wording", "letter",
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
def test_the_formulas_give_what_torch_counts(name):
    config, cost = CONFIGS[name], costs(CONFIGS[name], text_tokens=11)
    tiles, side = 5 if name == "anyres" else 1, config.vision.image_size
    unlimited = replace(config, text=replace(config.text, sliding_window=None))
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = Llava(unlimited)
        model.projector(model.vision_tower(torch.empty(1, 3, side, side), config.vision_feature_layer)[:, 1:])
        tile = counter.get_total_flops()
        hidden = model.language_model(torch.empty(1, cost["tokens, image and text"], config.text.hidden_size))
        model.language_model.lm_head(hidden[:, -1:])
    assert cost["TFLOPs"] == pytest.approx((tile * (tiles - 1) + counter.get_total_flops()) / 1e12, rel=1e-12)
    assert cost["parameters"] == sum(p.numel() for p in Llava(CONFIGS[name]).parameters())
    assert cost["TFLOPs, vision_tower"] == pytest.approx(tiles * vision_flops(CONFIGS[name].vision, 2) / 1e12)
    assert cost["MiB of keys and values"] == 2 * 2 * 3 * 1 * 24 * 7 / 2**20              # the window
    assert cost["tokens, image and text"] == 11 + CONFIGS[name].vision.side**2 * tiles + 8 * (tiles == 5)


@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 30])
def test_causal_flops_count_the_pairs_inside_the_window(tokens):
    pairs = sum(0 <= i - j < 7 for i in range(tokens) for j in range(tokens))
    less = language_flops(SMALL, tokens, causal=False) - language_flops(SMALL, tokens)
    assert less == SMALL.num_hidden_layers * 4 * SMALL.num_attention_heads * 24 * (tokens**2 - pairs)
    head = language_flops(SMALL, tokens, logits=5) - language_flops(SMALL, tokens)
    assert head == 4 * 2 * SMALL.hidden_size * 50


def test_published_sizes_are_those_of_the_published_files():
    parts = [count_parameters(config) for config in eval.PUBLISHED.values()]
    assert [p["language_model"] for p in parts] == [7241732096, 6738415616, 13015864320]
    assert [sum(p.values()) for p in parts] == [7566219264, 7062902784, 13350839296]
    assert {p["vision_tower"] for p in parts} == {303507456}
    mistral, llama_7b, llama_13b = (p["language_model"] for p in parts)
    assert (round(mistral / llama_13b, 3), round(mistral / llama_7b, 3)) == (0.556, 1.075)   # not 0.54 = 7/13


def test_cost_prints_and_writes_the_published_models(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--cost", "--json", tmp_path / "figures.json")
    out = capsys.readouterr().out
    assert all(figure in out for figure in ("7,566,219,264", "14.093", "5.0336", "0.36603", "0.024159", "75.75"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == list(eval.PUBLISHED) and figures["LLaVA-1.5-7B"]["parameters"] == 7062902784


def test_the_size_in_4_bits_is_that_of_quantized_layers():
    text = TextConfig(vocab_size=96, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    vision = VisionConfig(32, 48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16)
    model, state = Llava(LlavaConfig(vision, text, projector="linear")), {}
    for name, tensor in model.state_dict().items():
        llava.place_tensor(model, state, name, tensor, "int4", "cpu", torch.bfloat16)
    model.load_state_dict(state, assign=True)
    scales_of_lm_head = 2 * 96
    assert llava.count_weights(model)[1] == eval.int4_bytes(model.config) + scales_of_lm_head


def test_the_formula_gives_prumerges_table_ii():
    """TFLOPs of the language model for 700 and 70 tokens. The published INT4 figures are FP16 / 4; that of
    the pruned 7B, 0.28, looks wrong."""
    for name, published in eval.TABLE_II.items():
        text = eval.PUBLISHED[name].text
        full, pruned = (language_flops(text, tokens, causal=False) / 1e12 for tokens in (700, 70))
        for there, here in zip(published, (full, pruned, full / 4, pruned / 4)):
            assert here == pytest.approx(there, rel=0.02) or there == 0.28
        before = language_flops(text, 30 + 576, causal=False) / 1e12      # 576 image tokens become 40
        assert before / pruned == pytest.approx(8.8, abs=0.05)


def test_cost_needs_no_more_of_a_model_than_its_config(monkeypatch, capsys, model_folder, opened, tmp_path):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    run(monkeypatch, "--cost", 5, "--model", tmp_path)
    lines = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines["tokens, image and text"] == "21"
    assert lines["parameters"] == f"{sum(p.numel() for p in opened[0].parameters()):,}"


def test_cost_counts_the_tokens_that_a_reduction_keeps(monkeypatch, tmp_path):
    """Before the projector, but divprune chooses among projected tokens."""
    costs = {}
    for name in ("none", "random", "divprune"):
        keep = () if name == "none" else ("--keep-tokens", 64)
        run(monkeypatch, "--cost", 30, "--prune", name, *keep, "--json", tmp_path / "figures.json")
        costs[name] = json.loads((tmp_path / "figures.json").read_text())["LLaVA-1.5-7B"]
    assert [c["tokens, image and text"] for c in costs.values()] == [606, 94, 94]
    whole, random, divprune = (c["TFLOPs, projector"] for c in costs.values())
    assert whole == divprune == pytest.approx(9 * random)
