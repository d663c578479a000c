"""Training data: make it, choose subsets of it, compare the subsets.

    python prune.py --expand captions_train2014.json --out naive.json
    python prune.py --generate detail --captions captions_train2014.json --boxes instances_train2014.json \\
        --judge-model gpt-4o-mini --out detail.json
    python prune.py --scienceqa data/ScienceQA --method guided --keep 1000 --explain --out guided.json
    python prune.py --scienceqa data/ScienceQA --report guided.json maxmin.json --draw report.png
    python prune.py --scienceqa data/ScienceQA --study runs/study --keep 1000 --seeds 8 \\
        --pretrain blip_laion_cc_sft_558k.json --vision openai/clip-vit-large-patch14-336 \\
        --language mistralai/Mistral-7B-v0.1 huggyllama/llama-7b

The results are LLaVA records, which train.py reads. The study asks the question of Miao et al. 2024 (cited
in README.md): which 1,000 of ScienceQA's 12,726 training questions are worth training on?
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

from eval import parse_args as parse_evaluation
from eval import (append, are_correct, chat, collate, expect_format, fingerprint, interval, judge_url,
                  load_image, read_answers, read_scienceqa, target_text, to_record, write_lines)
from llava import (IGNORE, Llava, Processor, UserError, add_model_flags, atomic_write, check_outputs,
                   command_line, farthest_points, is_writable_image, load_model, number, read_json, require,
                   write_json)


# ---------------------------------------------------------------------------------------------
# 1. Choose k of the problems. Each method returns {index: reason} in the order in which it chooses.

IMAGE_SHARE = 0.85       # choose_guided: a new skill without an image only if images can reach this share
IMAGE_WORDS = re.compile(r"\b(picture|image|photo|map|diagram|graph|table|figure)s?\b|"
                         r"\b(shown|below|highlighted|marked|labeled|colored|these)\b", re.IGNORECASE)


def choose_all(problems: list[dict], k: int, args) -> dict[int, str]:
    return dict.fromkeys(range(len(problems)), "everything is kept")


def choose_random(problems: list[dict], k: int, args) -> dict[int, str]:
    chosen = random.Random(args.seed).sample(range(len(problems)), k)
    return dict.fromkeys(chosen, f"at random, seed {args.seed}")


def choose_stratified(problems: list[dict], k: int, args) -> dict[int, str]:
    """Shuffle the questions, sort them by topic, take every (N / k)-th: each question has the same
    probability, and each topic gets its share to within one question."""
    rng = random.Random(args.seed)
    order = rng.sample(range(len(problems)), len(problems))
    order.sort(key=lambda i: (problems[i]["subject"], problems[i]["topic"]))
    offset = rng.random()
    chosen = [order[int((j + offset) * len(order) / k)] for j in range(k)]
    return dict.fromkeys(chosen, f"at random within its topic, seed {args.seed}")


def choose_maxmin(problems: list[dict], k: int, args) -> dict[int, str]:
    """Greedy max-min selection over the hidden states that a LLaVA computes for the prompts."""
    states = measure(problems, args, args.pooling).to(args.device)
    chosen = farthest_points(states, k).tolist()
    return dict.fromkeys(chosen, "the farthest from those chosen before") | {chosen[0]: "nearest to the mean"}


def choose_gain(problems: list[dict], k: int, args) -> dict[int, str]:
    """The k questions whose image lowers a LLaVA's loss of the answer most, see "gain" in measure_batch."""
    gains = measure(problems, args, "gain")[:, 0]
    order = gains.argsort(descending=True, stable=True)[:k].tolist()
    return {i: f"the image lowers the loss of the answer by {gains[i]:.4g}" for i in order}


def choose_guided(problems: list[dict], k: int, args) -> dict[int, str]:
    """The guidelines of Miao et al. 2024, who chose by hand, as rules: prefer questions that need the image,
    cover every subject, prefer difficult questions. One question at a time, by the first of these criteria
    that decides: the first of a subject; of a topic; of a skill, without an image only if IMAGE_SHARE can
    still be reached; any with an image; the topic with the highest sqrt(size) / (1 + chosen so far); a text
    that refers to the image; the question text chosen least often so far; difficulty, a mean percentile."""
    signs = difficulty_signs(problems, args)
    difficulty = sum(percentiles(values) for values in signs.values()) / len(signs)       # [N]
    has_image = np.array([bool(p["image"]) for p in problems])
    refers = np.array([bool(IMAGE_WORDS.search(f"{p['question']} {p['hint']}")) for p in problems])
    need = np.select([has_image & refers, has_image], [2, 1])             # 0 without an image
    group = {field: np.unique([p[field] for p in problems], return_inverse=True)[1]
             for field in ("subject", "topic", "skill", "question")}
    chosen_of = {field: np.zeros(len(problems)) for field in group}       # how many of its group
    topic_size = np.bincount(group["topic"])[group["topic"]]
    kept = {}
    for _ in range(k):
        text_allowed = has_image[list(kept)].sum() + k - len(kept) - 1 >= IMAGE_SHARE * k
        first_of = {"subject": chosen_of["subject"] == 0, "topic": chosen_of["topic"] == 0,
                    "skill": (chosen_of["skill"] == 0) & (has_image | text_allowed)}
        level = np.select([*first_of.values()], [3, 2, 1])    # 0 for the others
        candidates = np.delete(np.arange(len(problems)), list(kept))
        for key in (level, has_image, np.sqrt(topic_size) / (1 + chosen_of["topic"]), need,
                    -chosen_of["question"], difficulty):
            candidates = candidates[key[candidates] == key[candidates].max()]
        i = int(candidates[0])
        topic, count = problems[i]["topic"], chosen_of["topic"][i] + 1
        places = [f"the first of {field} {problems[i][field]}" for field in first_of if first_of[field][i]]
        places.append(f"number {count:.0f} of the {topic_size[i]} of topic {topic}")
        image = ("it has no image", "it has an image", "its text refers to the image")[need[i]]
        values = ", ".join(f"{name} {values[i]:.4g}" for name, values in signs.items())
        kept[i] = f"{places[0]}; {image}; mean percentile of difficulty {100 * difficulty[i]:.0f}: {values}"
        for field in group:
            chosen_of[field][group[field] == group[field][i]] += 1
    return kept


def difficulty_signs(problems: list[dict], args) -> dict[str, np.ndarray]:
    """Measurable signs of how difficult each question is: name -> [N]."""
    signs = {"words of reasoning": [len(p["solution"].split()) for p in problems],
             "options": [len(p["choices"]) for p in problems],
             "numbers in the solution": [len(re.findall(r"\d+", p["solution"])) for p in problems],
             "grade": [int(p["grade"].removeprefix("grade")) for p in problems]}
    if args.image_text:                      # {id: text}, or ScienceQA's own {"captions": {id: text}}
        texts = require(read_json(args.image_text), args.image_text)
        texts = texts.get("captions", texts)
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise UserError(f"{args.image_text} does not give a text for each question id")
        signs["words in the image"] = [len(texts.get(p["id"], "").split()) for p in problems]
    if args.method == "guided" and args.model:
        signs["loss"] = measure(problems, args, "loss")[:, 0]
    return {name: np.asarray(values, float) for name, values in signs.items()}


def percentiles(values: np.ndarray) -> np.ndarray:
    """The share of all values that each value exceeds; equal values count half."""
    order = np.sort(values)
    return (order.searchsorted(values, "left") + order.searchsorted(values, "right")) / (2 * len(order))


METHODS = {"all": choose_all, "random": choose_random, "stratified": choose_stratified,
           "maxmin": choose_maxmin, "gain": choose_gain, "guided": choose_guided}


# ---------------------------------------------------------------------------------------------
# 2. Measure the problems with a LLaVA: hidden states, losses, gains

def measure(problems: list[dict], args, what: str) -> Tensor:
    """The measurement `what` (see measure_batch) of every problem, [N, C] or [N, 1]. Each batch is written to
    the cache as soon as it is measured, and rows are NaN before: an interrupted run resumes, and a finished
    one is only read, which does not need --model."""
    folder = args.cache or args.out.with_suffix(".cache")
    file, notes = folder / f"{what}.npy", folder / f"{what}.json"
    texts = repr([(p["prompt"], target_text(p)) for p in problems])
    settings = {"questions": hashlib.sha256(texts.encode()).hexdigest()[:8]}
    if what not in ("loss", "gain"):
        settings["layer"] = args.layer
    if args.model:
        model, processor = load_model(args)
        settings |= {"model": fingerprint(model, processor), "dtype": args.dtype}
        if what not in ("loss", "gain"):
            cut_layers(model, args.layer)
    elif not (file.exists() and np.isfinite(np.load(file)).all()):
        raise UserError(f"{file} is missing or unfinished: name the --model to measure with")
    if file.exists():
        saved = read_json(notes)
        if different := [name for name in settings if saved.get(name) != settings[name]]:
            raise UserError(f"{file} differs in {' and '.join(different)}: name another --cache")
    else:
        write_json(notes, settings)
        width = 1 if what in ("loss", "gain") else model.config.text.hidden_size
        empty = np.full((len(problems), width), np.nan, np.float32)
        if what == "gain":                   # 0 without an image, not measured
            empty[[not p["image"] for p in problems]] = 0
        with atomic_write(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, empty)
    rows = np.load(file, mmap_mode="r+")
    missing = np.flatnonzero(~np.isfinite(rows).all(1)).tolist()
    if missing:                              # then there is a --model
        measure_missing(rows, missing, problems, model, processor, args, what)
    return torch.from_numpy(np.array(rows))  # a copy in memory


def measure_missing(rows: np.ndarray, missing: list[int], problems: list[dict], model: Llava,
                    processor: Processor, args, what: str) -> None:
    """Fill the missing rows; questions with images first, then by length: a batch needs little padding, and
    too little memory shows early."""
    order = sorted(missing, key=lambda i: (not problems[i]["image"], -len(problems[i]["prompt"])))
    for start in tqdm(range(0, len(order), args.batch_size), f"measuring {what}", unit="batch"):
        batch = order[start:start + args.batch_size]
        rows[batch] = measure_batch(model, processor, [problems[i] for i in batch], what).float().cpu()
        if bad := [i for i in batch if not np.isfinite(rows[i]).all()]:
            raise UserError(f"the {what} that {args.model} gives question {problems[bad[0]]['id']} is not "
                            "finite: try --dtype float32")


def cut_layers(model: Llava, layer: int) -> None:
    """Remove the layers after `layer`, counted as in transformers' hidden_states: 0 is the embeddings, -1
    the last layer. Only the last layer's states pass the final norm."""
    layers = model.language_model.layers
    if not -len(layers) - 1 <= layer <= len(layers):
        raise UserError(f"--layer {layer}: the language model has {len(layers)} layers")
    keep = layer % (len(layers) + 1)
    if keep < len(layers):
        model.language_model.layers = layers[:keep]
        model.language_model.norm = nn.Identity()


@torch.inference_mode()
def measure_batch(model: Llava, processor: Processor, problems: list[dict], what: str,
                  white: bool = False) -> Tensor:
    """"last": the hidden state of each prompt's last token [B, C]; "mean": the mean over its tokens
    [B, C]; "loss": the mean loss of the answer's tokens in nats [B, 1]; "gain": that loss with the image
    replaced by white, minus the loss with the image [B, 1], 0 without an image."""
    if what == "gain":
        with_white = measure_batch(model, processor, problems, "loss", white=True)
        return with_white - measure_batch(model, processor, problems, "loss")
    inputs = []
    for p in problems:
        messages = [{"role": "user", "content": p["prompt"]}]
        if what == "loss":
            messages.append({"role": "assistant", "content": target_text(p)})
        images = [load_image(p, white)] if p["image"] else []
        inputs.append(processor(messages, images, labels=True))
    x, lengths, labels = model.splice(**collate(inputs))
    if what == "loss":
        return answer_losses(model, x, labels)[:, None]
    hidden = model.language_model(x)                                      # [B, T', C]
    if what == "last":
        return hidden[torch.arange(len(x), device=x.device), lengths - 1]
    return torch.stack([states[:n].float().mean(0) for states, n in zip(hidden, lengths)])


def answer_losses(model: Llava, x: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each row's labels, [B], from embeddings x [B, T', C]."""
    labels = labels.to(x.device)
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)      # positions that predict
    hidden = model.language_model(x, select=(rows, columns))              # [n, C]
    targets, losses = labels[rows, columns + 1], []
    for b in range(len(x)):                  # row by row, because all logits at once need much memory
        logits = model.language_model.lm_head(hidden[rows == b]).float()
        losses.append(F.cross_entropy(logits, targets[rows == b]))
    return torch.stack(losses)


# ---------------------------------------------------------------------------------------------
# 3. Write a subset, compare subsets: rows of cells, printed as a table and drawn as bars

class Cell(NamedTuple):
    text: str
    bar: tuple[float, float] | None = None            # drawn from begin to end, 0 (left) to 1 (right)
    interval: tuple[float, float] | None = None       # drawn as a line, on the same scale


def count_cell(n: int, total: int) -> Cell:
    return Cell(f"{n} {n / total:6.1%}", (0, n / total))


def coverage(sets: dict[str, list[dict]], fields) -> dict[str, list[Cell]]:
    """For each field: how many questions of each set have each value, and how many values occur in it."""
    rows = {}
    for field in fields:
        counts = [Counter(p[field] for p in problems) for problems in sets.values()]
        if field not in ("category", "skill"):                # which have hundreds of values
            for value, _ in sum(counts, Counter()).most_common():
                rows[f"{field}: {value}"] = [count_cell(c[value], c.total()) for c in counts]
        if field != "has image":             # a subset may leave out images, or texts, on purpose
            rows[f"{field}: covered"] = [count_cell(len(c), len(counts[0])) for c in counts]
    return rows


def comparison(sets: dict[str, list[dict]]) -> dict[str, list[Cell]]:
    """How many question texts repeat, and how many questions the sets have in common."""
    counts = [Counter(p["question"] for p in problems) for problems in sets.values()]
    rows = {"repeated questions": [count_cell(c.total() - len(c), c.total()) for c in counts],
            "most repeated": [count_cell(max(c.values()), c.total()) for c in counts]}
    ids = {name: {p["id"] for p in problems} for name, problems in sets.items()}
    for name, these in ids.items():
        rows[f"also in {name}"] = [count_cell(len(these & others), len(others)) for others in ids.values()]
    return rows


def print_cells(columns: list[str], rows: dict[str, list[Cell]]) -> None:
    table = [["", *columns], *([name, *(cell.text for cell in row)] for name, row in rows.items())]
    left, *widths = [max(map(len, texts)) for texts in zip(*table)]
    for name, *texts in table:
        print(f"{name:{left}}", *(f"{text:>{width}}" for text, width in zip(texts, widths)), sep="  ")


def draw_cells(columns: list[str], rows: dict[str, list[Cell]], file: Path) -> None:
    """The table as an image: a bar behind each cell, and a line at its bottom for an interval."""
    table = [[Cell(text) for text in ("", *columns)], *([Cell(name), *row] for name, row in rows.items())]
    text_width = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    width, height = 20 + int(max(text_width(cell.text) for row in table for cell in row)), 24      # in pixels
    image = Image.new("RGB", ((width + 10) * len(table[0]), height * len(table)), "white")
    pen = ImageDraw.Draw(image)
    for i, row in enumerate(table):
        for j, cell in enumerate(row):
            x, top, foot = (width + 10) * j, height * i, height * (i + 1) - 4
            if cell.bar:
                pen.rectangle((x + width * cell.bar[0], top, x + width * cell.bar[1], foot), "#b4cbee")
            if cell.interval:
                pen.line([(x + width * end, foot) for end in cell.interval], "#2050b0", 3)
            pen.text((x + 4, top + 4), cell.text.strip(), "black")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def read_records_by_id(file: Path) -> dict[str, dict]:
    """{id: record} of a JSON list of records, or of ids alone."""
    entries = read_json(file)
    if not isinstance(entries, list) or any(isinstance(e, dict) and "id" not in e for e in entries):
        raise UserError(f"{file} is neither a list of records with ids nor one of ids")
    if not entries:
        raise UserError(f"{file} is an empty list")
    records = [e if isinstance(e, dict) else {"id": e} for e in entries]
    return {str(record["id"]): record for record in records}


def choose_listed(problems: list[dict], file: Path) -> dict[int, str]:
    """{index: reason} of the records or ids that a file lists."""
    index_of, listed = {p["id"]: i for i, p in enumerate(problems)}, read_records_by_id(file)
    if unknown := [key for key in listed if key not in index_of]:
        raise UserError(f"{file} lists {len(unknown)} questions, such as {unknown[0]}, that are not among "
                        f"the {len(index_of)} to choose from")
    return {index_of[key]: f"listed in {file}" for key in listed}


def read_problems(args) -> list[dict]:
    """The problems of --scienceqa. Without it id, question and "has image" from the records of --report."""
    if args.scienceqa:
        problems = read_scienceqa(args.scienceqa, args.split, args.pictures)
        if not problems:
            raise UserError(f"{args.scienceqa}: there are 0 questions of split {args.split!r} to choose from")
        for p in problems:
            if wrong := [f for f in ("topic", "category", "skill") if not isinstance(p.get(f), str)]:
                raise UserError(f"{args.scienceqa}/problems.json, question {p['id']}: {wrong[0]} is missing "
                                "or of the wrong type")
        return [p | {"has image": "yes" if p["image"] else "no"} for p in problems]
    records = {}
    for file in args.report:
        for key, record in read_records_by_id(file).items():
            if not record.get("conversations"):
                raise UserError(f"{file} lists ids alone: name the --scienceqa that they belong to")
            if records.setdefault(key, record)["conversations"] != record["conversations"]:
                raise UserError(f"{file} has another question {key} than the files before it")
    with expect_format("a file of --report", "LLaVA's list of records"):
        return [{"id": key, "has image": "yes" if "image" in record else "no",
                 "question": record["conversations"][0]["value"].split("\nContext: ")[0]}
                for key, record in records.items()]


def choose(args) -> None:
    problems, method, k = read_problems(args), args.method or "from-list", args.keep
    subjects = len({p["subject"] for p in problems})
    if method not in ("all", "from-list") and not 0 < k <= len(problems):
        raise UserError(f"--keep {k} is not between 1 and the {len(problems)} questions to choose from")
    if method in ("stratified", "guided") and k < subjects:
        raise UserError(f"--keep {k} is too few for {subjects} subjects")
    kept = METHODS[method](problems, k, args) if args.method else choose_listed(problems, args.from_list[0])
    write_json(args.out, [to_record(problems[i]) for i in kept])
    sets = {"whole": problems, method: [problems[i] for i in kept]}
    print_cells(list(sets), coverage(sets, ("subject", "topic", "has image")))
    print(f"{args.out}: {len(kept)} of {len(problems)} questions")
    if args.explain:
        reasons = args.out.with_suffix(".why.json")
        write_json(reasons, [{"id": problems[i]["id"], "why": why} for i, why in kept.items()])
        print(f"{reasons}: why each is kept")


def print_report(args) -> None:
    problems, stems = read_problems(args), [file.stem for file in args.report]
    names = stems if len({"whole", *stems}) == 1 + len(stems) else [str(file) for file in args.report]
    indices_of = {"whole": list(range(len(problems)))} if args.scienceqa else {}
    indices_of |= {name: list(choose_listed(problems, file)) for name, file in zip(names, args.report)}
    sets = {name: [problems[i] for i in indices] for name, indices in indices_of.items()}
    fields = ("subject", "topic", "grade", "has image", "category", "skill")
    rows = coverage(sets, fields if args.scienceqa else ("has image",)) | comparison(sets)
    if args.scienceqa:
        for sign, values in difficulty_signs(problems, args).items():
            means = [percentiles(values)[indices].mean() for indices in indices_of.values()]
            rows[f"percentile of {sign}"] = [Cell(f"{mean:.1%}", (0, mean)) for mean in means]
    if args.cache:
        rows |= measured_rows(problems, indices_of, args)
    print_cells(list(sets), rows)
    if args.draw:
        draw_cells(list(sets), rows, args.draw)


def measured_rows(problems: list[dict], indices_of: dict[str, list[int]], args) -> dict[str, list[Cell]]:
    """Rows from --cache: the smallest distance between the hidden states of a subset, its images' gain."""
    rows, has_gain = {}, (args.cache / "gain.npy").exists()
    if not has_gain or (args.cache / f"{args.pooling}.npy").exists():     # unless only gains exist
        states = measure(problems, args, args.pooling)
        rows["smallest distance"] = [        # not of the whole, which has too many pairs
            Cell("-" if name == "whole" or len(indices) < 2 else f"{F.pdist(states[indices]).min():.4g}")
            for name, indices in indices_of.items()]
    if has_gain:
        gains = measure(problems, args, "gain")[:, 0]
        gains = [gains[indices] for indices in indices_of.values()]
        rows["mean gain of the image"] = [Cell(f"{x.mean():.3f}") for x in gains]
        rows["gain above 0"] = [count_cell(int((x > 0).sum()), len(x)) for x in gains]
    return rows


# ---------------------------------------------------------------------------------------------
# 4. The study: train on each subset with several seeds, evaluate, compare

# Variant: (method, additional flags of train.py). "all, one epoch" reads as many records as 12 epochs (toy
# study; train.py's default is 15) on a twelfth. The template "plain" drops the question, as Miao et al. do.
VARIANTS = {"all": ("all", ()), "all, one epoch": ("all", ("--epochs", 1)), "random": ("random", ()),
            "stratified": ("stratified", ()), "maxmin": ("maxmin", ()), "guided": ("guided", ()),
            "guided, plain": ("guided", ("--template", "plain")), "gain": ("gain", ())}


def study(args) -> None:
    """Train each language model on each variant with each seed, and evaluate each with the images and with
    white images. Every step is a printed command; a finished one is not repeated, so a study can be
    interrupted, split with --variants, and extended. The table shows all finished trainings of --seeds."""
    llms = [Path(language.partition("@")[0]).name for language in args.language]
    if len(set(llms)) < len(llms):
        raise UserError(f"two of --language are named {llms[-1]}, and so would be their folders: rename one")
    check_settings(args)
    variants = dict(VARIANTS)
    for file in args.from_list or []:
        if file.stem in variants:
            raise UserError(f"--from-list {file}: there is a variant {file.stem!r} already: rename the file")
        variants[file.stem] = file, ()
    if unknown := [name for name in args.variants or [] if name not in variants]:
        raise UserError(f"--variants {unknown[0]!r} is none of {', '.join(map(repr, variants))}")
    shared = []
    for flag in ("tokenizer", "image_mode", "device", "dtype"):
        if getattr(args, flag):
            shared += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
    for llm, language in zip(llms, args.language):
        run_command("train.py", "--stage", 1, "--vision", args.vision, "--language", language,
                    "--data", args.pretrain, "--images", args.pretrain.with_suffix(""), *shared,
                    *shlex.split(args.stage1), "--resume", "--out", args.study / llm / "stage1")
    for seed in range(args.seeds):
        for variant in args.variants or variants:
            method, recipe = variants[variant]
            records = make_subset(args, method, seed, args.study / llms[-1], shared)
            for llm in llms:
                train_and_evaluate(args, run_folder(args, llm, variant, seed), records, seed, recipe, shared)
    summarize(args, llms, list(variants))


def check_settings(args) -> None:
    """Write the settings of a study to study.json; UserError if it was begun with others."""
    names = "scienceqa keep pretrain vision model tokenizer image_mode dtype stage1 stage2 eval".split()
    settings, file = {name: str(getattr(args, name)) for name in names}, args.study / "study.json"
    begun = read_json(file) if file.exists() else settings
    if changed := [name for name in names if begun.get(name) != settings[name]]:
        raise UserError(f"{args.study} was begun with --{changed[0].replace('_', '-')} "
                        f"{begun.get(changed[0])}: name another --study")
    write_json(file, settings)


def run_folder(args, llm: str, variant: str, seed: int) -> Path:
    return args.study / llm / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"


def make_subset(args, method: str | Path, seed: int, runs: Path, shared: list[str]) -> Path:
    """Write the records of a method or a published list. Without --model, maxmin measures with stage 1 of the
    last of --language (in `runs`), and gain with its training random-0, which must be there by then."""
    name, flags = method, ["--method", method, "--keep", args.keep]
    if isinstance(method, Path):
        name, flags = method.stem, ["--from-list", method]
    elif method in ("random", "stratified"): # the others do not depend on the seed
        name, flags = f"{method}-{seed}", [*flags, "--seed", seed]
    elif method in ("maxmin", "gain"):
        model = args.model or runs / {"maxmin": "stage1", "gain": "random-0"}[method]
        if method == "gain" and not args.model and not model.exists():
            raise UserError("gain measures with the first training on random: put random before gain")
        flags += ["--model", model, *shared]
    records = args.study / "sets" / f"{name}.json"
    run_command("prune.py", "--scienceqa", args.scienceqa, *flags, "--out", records)
    return records


def train_and_evaluate(args, folder: Path, records: Path, seed: int, recipe, shared: list[str]) -> None:
    run_command("train.py", "--stage", 2, "--init", folder.parent / "stage1", "--data", records,
                "--images", Path(args.scienceqa, "images", "train"), "--seed", seed, *shared,
                *shlex.split(args.stage2), *recipe, "--resume", "--out", folder)
    for answers, flags in (("test.jsonl", ()), ("blank.jsonl", ("--pictures", "only", "--blank"))):
        run_command("eval.py", "--scienceqa", args.scienceqa, "--model", folder, *flags, *shared,
                    *shlex.split(args.eval), "--out", folder / answers)


def run_command(program: str, *flags) -> None:
    """Run one of the project's programs unless its --out, the last flag, is finished already."""
    out, words = flags[-1], [str(flag) for flag in flags]
    done, line = done_file(out), shlex.join(["python", program, *words])
    if done.exists():
        if (made := done.read_text()) != line:
            raise UserError(f"{out} was made by another command, {made}: name another --study")
        return
    print(f"\n$ {line}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, Path(__file__).with_name(program), *words])
    try:
        process.wait()
    finally:
        process.wait()                       # after Ctrl-C, which the program received too: it may be saving
    if process.returncode:
        raise UserError(f"{program} failed, see above; the same command continues the study from here")
    done.write_text(line)


def done_file(out: Path) -> Path:
    return out.with_name(f"{out.name}.done")


def summarize(args, llms: list[str], variants: list[str]) -> None:
    """Print, draw and write as Markdown: percent correct of all finished trainings with 95% intervals, and
    differences paired by seed and question."""
    test, runs, rows = read_scienceqa(args.scienceqa, "test"), {}, {}
    with_image = [i for i, p in enumerate(test) if p["image"]]
    columns = ["trainings", "all questions", "with image", "image replaced by white", "ahead of random",
               f"ahead of {llms[0]}"]
    for variant in dict.fromkeys(["random", *variants]):     # random first: others are compared with it
        for llm in llms:
            folders = [run_folder(args, llm, variant, seed) for seed in range(args.seeds)]
            run = {seed: correct(test, folder / "test.jsonl") for seed, folder in enumerate(folders)
                   if done_file(folder / "blank.jsonl").exists()}         # which is written last
            if not run:
                continue
            runs[llm, variant] = run         # seed -> [N]
            white = [correct([test[i] for i in with_image], folders[seed] / "blank.jsonl") for seed in run]
            scores = np.stack(list(run.values()))                         # [S, N]
            rows[f"{llm}: {variant}"] = [
                Cell(str(len(run))), accuracy_cell(scores), accuracy_cell(scores[:, with_image]),
                accuracy_cell(np.stack(white)), difference_cell(run, runs.get((llm, "random"), {})),
                difference_cell(run, runs.get((llms[0], variant), {}))]
    print_cells(columns, rows)
    draw_cells(columns, rows, args.study / "study.png")
    lines = [["", *columns], ["-"] * (1 + len(columns))]
    lines += [[name, *(cell.text for cell in row)] for name, row in rows.items()]
    with atomic_write(args.study / "study.md") as file:
        file.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def correct(problems: list[dict], file: Path) -> np.ndarray:
    """Which problems a file answers correctly, [N] of 0 and 1."""
    texts = read_answers(file)
    if texts.keys() != {p["id"] for p in problems}:
        raise UserError(f"{file} answers other questions: remove it and its .done, and run the study again")
    return np.array(are_correct(problems, texts), int)


def accuracy_cell(scores: np.ndarray) -> Cell:
    x, low, high = interval(scores)
    return Cell(f"{x:.1f} ({low:.1f} to {high:.1f})", (0, x / 100), (low / 100, high / 100))


def difference_cell(mine: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> Cell:
    """Points by which `mine` leads on the seeds that both have; as a bar, -50 is left, 0 middle, 50 right."""
    seeds = [seed for seed in mine if seed in other]
    if not seeds or mine is other:
        return Cell("-")
    x, low, high = interval(np.stack([mine[seed] - other[seed] for seed in seeds]))
    end, left, right = np.clip(0.5 + np.array([x, low, high]) / 100, 0, 1)
    return Cell(f"{x:+.1f} ({low:+.1f} to {high:+.1f})", (min(0.5, end), max(0.5, end)), (left, right))


# ---------------------------------------------------------------------------------------------
# 5. Make records: expand captions, or ask a text-only language model (the teacher) about captions and boxes

INSTRUCTIONS = {}
INSTRUCTIONS["brief"] = (
    "Describe this image in one sentence.", "What does this image show? Answer briefly.",
    "Give a short description of the image.", "Sum up the image in a few words.",
    "Say in one line what is visible here.", "Write a compact description of the photo.",
    "In brief, what can be seen here?", "Name the main content of this image.",
    "Tell me shortly what this image is about.", "State the subject of the image concisely.",
    "Provide a one-sentence summary of what you see.")
INSTRUCTIONS["detailed"] = (
    "Describe this image in detail.", "What can be seen in this image? Be thorough.",
    "Write a long and complete description of the image.", "Give a full account of this scene.",
    "Walk me through everything that the image shows.", "Analyse this image part by part.",
    "Explain the content of the image with all its details.", "Tell me as much as you can about this image.",
    "Describe the objects here and how they are arranged.", "Depict the scene as precisely as possible.",
    "Report carefully what is visible in the image.", "Compose a detailed paragraph about this image.",
    "Describe the foreground and the background fully.", "Explain in full sentences what the image contains.",
    "What is happening here? Include every detail.", "Describe all of this to someone who cannot see it.")
RULES = """The user sends a text that stands for one image: sentences that describe it and sometimes a
list of objects, each with the corners [left, top, right, bottom] of its box as fractions of the image.
Write as if you saw the image itself. State only what the text makes certain. Never mention these
sentences, captions, bounding boxes or coordinates: put positions and sizes into words.
"""
FORM = """
Write a line "Question:", then the question, a line "===", a line "Answer:", then the answer; a line
"===" separates one pair from the next. Write nothing else."""
SYSTEM_MESSAGES = {
    "conversation": RULES + """Write a conversation between someone who asks about the image and an
assistant who sees it. Ask about kinds, numbers, colors, actions, places and relations of things, and only
questions with a definite answer. One question may need background knowledge.""" + FORM,
    "detail": RULES + """Write one detailed description: what is there, how many of it, where, and how the
things relate to each other. Write only the description, in plain paragraphs.""",
    "reasoning": RULES + """Write one question that needs reasoning about the image (why, what may happen
next, what is advisable) without revealing what the image shows, and an answer that reasons step by step
from what is visible.""" + FORM}
EXAMPLE = ("A woman rides a bicycle along a wet street.\nA cyclist in a yellow coat passes two parked cars.",
           "person: [0.412, 0.215, 0.583, 0.742]\nbicycle: [0.391, 0.48, 0.61, 0.866]\n"
           "car: [0.02, 0.38, 0.21, 0.61]\ncar: [0.215, 0.39, 0.352, 0.58]\ndog: [0.8, 0.66, 0.93, 0.88]")
EXAMPLE_REPLIES = {
    "conversation": """Question:\nWhat is the woman doing?\n===\nAnswer:
She is riding a bicycle along a street.
===\nQuestion:\nWhy is her bright coat useful in this weather?\n===\nAnswer:
Drivers see less in the rain. A bright coat makes a cyclist visible from farther away.""",
    "detail": """A woman in a yellow coat cycles along a street that is wet with rain. To her left two cars
are parked one behind the other. On the right, close to the viewer, a dog watches her pass.""",
    "reasoning": """Question:\nWhat should this person be careful about in the next moments?\n===\nAnswer:
The street is wet, so braking takes longer. A door of one of the parked cars on the left could open, and
the dog on the right could run into her way. She should slow down and keep a distance from both."""}
MARKS = {"Question:", "Answer:", "==="}
SAMPLING = {"temperature": 0.2, "max_tokens": 1024}
UNWANTED = {                                 # reason to reject a reply: what it contains
    "mentions captions or bounding boxes": re.compile(r"\bcaptions?\b|\bbounding[ -]box", re.IGNORECASE),
    "prints coordinates": re.compile(r"(?<![\d.])[01]?\.\d+\s*,\s*[01]?\.\d+|\[\s*[\d.]+\s*,"),
    "contains <image>": re.compile("<image>")}


def expand(args) -> None:
    """Naive expansion: each image-caption pair becomes a record that begins with a random instruction."""
    images = list(read_captions(args.expand).items())[:args.limit]
    pairs = [(image_id, file, i, text) for image_id, (file, texts) in images for i, text in enumerate(texts)]
    records = [make_record(image_id, file, [("", text)], args.style, f"{args.seed} {image_id} {i}")
               for image_id, file, i, text in pairs if "<image>" not in text]
    write_json(args.out, records)
    print(f"{args.out}: {len(records)} records of {len(images)} images")
    if left_out := len(pairs) - len(records):
        print(f"left out {left_out} captions that contain <image>, which stands for an image in a record")


def make_record(image_id: str, file: str, pairs: list[tuple[str, str]], style: str, seed: str) -> dict:
    """A LLaVA record of (question, answer) pairs. The seed alone decides which instruction replaces an
    empty question, and whether <image> comes before or after the first question."""
    rng, turns = random.Random(seed), []
    for asked, answered in pairs:
        asked = asked or rng.choice(INSTRUCTIONS[style])
        if not turns:                        # the first question
            asked = rng.choice((f"<image>\n{asked}", f"{asked}\n<image>"))
        turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return {"id": image_id, "image": file, "conversations": turns}


def read_captions(file: Path) -> dict[str, tuple[str, list[str]]]:
    """{image id: (file name, captions)} in the file's order, of a COCO captions file or of a list of
    {"image", "caption"}, where the id is the file name without its suffix."""
    content = read_json(file)
    with expect_format(file, "a COCO captions file or a list of {image, caption}"):
        if isinstance(content, list):
            images = {str(Path(e["image"]).with_suffix("")): (e["image"], []) for e in content}
            captions = [(str(Path(e["image"]).with_suffix("")), e["caption"]) for e in content]
            if len(images) < len({e["image"] for e in content}):
                raise ValueError("two images differ in their suffix only")
        else:
            images = {str(e["id"]): (e["file_name"], []) for e in content["images"]}
            captions = [(str(e["image_id"]), e["caption"]) for e in content["annotations"]]
        for image_id, text in captions:
            if text := " ".join(text.split()):
                images[image_id][1].append(text)
    return images


def read_boxes(file: Path) -> dict[str, list[str]]:
    """{image id: lines "category: [left, top, right, bottom]", as fractions with three decimals} of a COCO
    instances file, whose bbox is [left, top, width, height] in pixels and may stick out by one pixel."""
    content = read_json(file)
    with expect_format(file, "a COCO instances file"):
        sizes = {e["id"]: (e["width"], e["height"]) for e in content["images"]}
        names, boxes = {e["id"]: e["name"] for e in content["categories"]}, {str(i): [] for i in sizes}
        for e in content["annotations"]:
            (x, y, w, h), (width, height) = e["bbox"], sizes[e["image_id"]]
            if min(x, y, w, h) < -1 or x + w > width + 1 or y + h > height + 1 or 0 in (width, height):
                raise ValueError(f"box {e['bbox']} is not inside image {e['image_id']}, {width} x {height}")
            corners = (x / width, y / height, (x + w) / width, (y + h) / height)
            corners = [round(min(1.0, max(0.0, c)), 3) for c in corners]
            boxes[str(e["image_id"])].append(f"{names[e['category_id']]}: {corners}")
    return boxes


def read_images(args) -> tuple[list[tuple], list[dict]]:
    """[(image id, file name, key, request)] and [{"id", "reason"}] of the images left out."""
    captions, images, left_out = read_captions(args.captions), [], []
    boxes = read_boxes(args.boxes) if args.boxes else dict.fromkeys(captions, [])
    for image_id, (file, texts) in list(captions.items())[:args.limit]:
        if texts and image_id in boxes:
            images.append((image_id, file, *make_request(args, texts, boxes[image_id])))
        else:
            left_out.append({"id": image_id, "reason": "no boxes" if texts else "no captions"})
    left_out += [{"id": image_id, "reason": "no captions"} for image_id in boxes if image_id not in captions]
    return images, left_out


def make_request(args, captions: list[str], boxes: list[str]) -> tuple[str, dict]:
    """(key, request) of one image: its captions, one a line; then, if given, an empty line and the boxes."""
    example = EXAMPLE if args.boxes else EXAMPLE[:1]
    parts = ["\n".join(lines) for lines in (captions, boxes) if lines]
    messages = [{"role": "system", "content": SYSTEM_MESSAGES[args.generate]},
                {"role": "user", "content": "\n\n".join(example)},
                {"role": "assistant", "content": EXAMPLE_REPLIES[args.generate]},
                {"role": "user", "content": "\n\n".join(parts)}]
    body = {"model": args.judge_model, "messages": messages, **SAMPLING}
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()[:32], body


def read_replies(file: Path) -> dict[str, dict]:
    """{key: {"key", "text", "finish_reason"}} of the replies received so far, or of the results of OpenAI's
    batch interface. Prints how many lines have no reply, such as those that failed in the batch."""
    replies, unreadable = {}, 0
    for line in file.read_bytes().splitlines():
        try:
            entry = json.loads(line)
            if "custom_id" in entry:
                choice = entry["response"]["body"]["choices"][0]
                entry = {"key": entry["custom_id"], "text": choice["message"]["content"],
                         "finish_reason": choice.get("finish_reason")}
            entry["text"] = entry["text"].strip()        # None has no strip
            replies[entry["key"]] = entry
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            unreadable += 1
    if unreadable:
        print(f"{file}: {unreadable} lines without a reply")
    return replies


def ask_teacher(url: str, requests: dict[str, dict], workers: int, file: Path) -> None:
    """Send the requests from several threads and append each reply as it arrives. After the first failure
    no request is sent, and the replies to those already sent are still appended."""
    lock, stop = threading.Lock(), threading.Event()

    def ask(key: str, body: dict) -> None:
        try:
            if not stop.is_set():
                text, finish_reason = chat(url, **body, stop=stop)
                with lock:
                    append(file, {"key": key, "text": text, "finish_reason": finish_reason})
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        replies = pool.map(ask, requests, requests.values())
        try:                                 # list() raises what a thread raised
            list(tqdm(replies, "asking the teacher", len(requests), unit="request"))
        finally:
            stop.set()                       # also after Ctrl-C


def generate(args) -> None:
    """Ask the teacher about every image that has no reply yet, then write the good replies as records."""
    images, left_out = read_images(args)
    file = args.out.with_suffix(".replies.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    replies = {}
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)     # a kill may have cut off the last line
        replies = read_replies(file)
    if args.replies:
        for key, reply in read_replies(args.replies).items():
            if key not in replies:
                append(file, reply)
                replies[key] = reply
        if args.out.exists() and not any(key in replies for *_, key, _ in images):
            raise UserError(f"{args.replies} has no reply to these requests, so {args.out} is kept")
    requests = {key: body for *_, key, body in images if key not in replies}     # equal prompts share one
    if args.dry_run or args.batch:
        size = sum(len(json.dumps(body["messages"])) for body in requests.values())
        print(f"{len(requests)} requests, {size:,} characters, about {size // 4:,} tokens")
    if args.dry_run:
        for body in list(requests.values())[:1]:             # none if all have a reply
            print(json.dumps(body, indent=1))
    elif args.batch:
        write_lines(args.batch, [{"custom_id": key, "method": "POST", "url": "/v1/chat/completions",
                                  "body": body} for key, body in requests.items()])
    else:
        if requests and not args.replies:
            ask_teacher(judge_url(args), requests, args.workers, file)
            replies = read_replies(file)
        write_generated(args, images, left_out, replies)


def write_generated(args, images: list[tuple], left_out: list[dict], replies: dict[str, dict]) -> None:
    """Write the records, and beside them the rejected replies with the reason; print a summary."""
    records, rejected = [], list(left_out)
    for image_id, file, key, body in images:
        reply = replies.get(key, {})
        pairs, reason = check_reply(args.generate, reply.get("text"), body["messages"])
        if reply.get("finish_reason") == "length":
            reason = "cut off at max_tokens"
        if reason:
            rejected.append({"id": image_id, "reason": reason, "text": reply.get("text")})
        else:
            records.append(make_record(image_id, file, pairs, "detailed", f"{args.seed} {image_id}"))
    write_json(args.out, records)
    write_lines(args.out.with_suffix(".rejected.jsonl"), rejected)
    n = len(images) + len(left_out)
    print(f"{args.out}: {len(records)} records of {n} images; {len(rejected)} rejected")
    for reason, n in Counter(entry["reason"] for entry in rejected).most_common():
        print(f"{n:8} {reason}")
    answers = [turn["value"].split() for record in records for turn in record["conversations"][1::2]]
    if answers:
        print(f"{len(answers) / len(records):.1f} questions a record, "
              f"{sum(map(len, answers)) / len(answers):.1f} words an answer")


def check_reply(kind: str, text: str | None, messages: list[dict]) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) pairs, with question "" for a description; the reason to reject the reply or ""."""
    if text is None:
        return [], "no reply"
    pairs, reason = ([("", text.strip())], "") if kind == "detail" else parse_blocks(text)
    if reason:
        return [], reason
    prompt = {line.strip() for m in messages for line in m["content"].splitlines()} - MARKS - {""}
    lines = [line.strip() for line in text.splitlines()]
    checks = {
        "blocks in a description": kind == "detail" and MARKS & set(lines),
        "an empty part": any(not answered or (not asked and kind != "detail") for asked, answered in pairs),
        "more than one question": kind == "reasoning" and len(pairs) > 1,
        # The example's question may also be asked about this image.
        "repeats the prompt": any(line in prompt and not line.endswith("?") for line in lines),
        **{reason: pattern.search(text) for reason, pattern in UNWANTED.items()}}
    return pairs, next((reason for reason, found in checks.items() if found), "")


def parse_blocks(text: str) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) pairs in the form that FORM describes, and what is wrong with the text or ""."""
    text = re.sub(r"\n===\Z", "", text.strip())       # a last === may stand at the end
    blocks = [block.strip().partition("\n") for block in re.split(r"(?m)^===[ \t]*$", text)]
    heads, bodies = [head.strip() for head, _, _ in blocks], [body.strip() for _, _, body in blocks]
    if not text:
        return [], "an empty reply"
    if len(blocks) % 2:
        return [], "an odd number of blocks"
    head_inside = re.search(r"(?m)^(Question|Answer):", "\n".join(bodies))
    if head_inside or heads != ["Question:", "Answer:"] * (len(blocks) // 2):
        return [], "blocks that are not Question: and Answer: in turn"
    return list(zip(bodies[::2], bodies[1::2])), ""


# ---------------------------------------------------------------------------------------------
# 6. The command line

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group()
    mode.add_argument("--method", choices=METHODS, help="choose questions")
    mode.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="compare subsets")
    mode.add_argument("--study", type=Path, metavar="DIR", help="compare trainings on subsets")
    mode.add_argument("--expand", type=Path, metavar="FILE", help="make records of image-caption pairs")
    mode.add_argument("--generate", choices=SYSTEM_MESSAGES, help="make records with a text-only teacher")
    add("--from-list", type=Path, nargs="+", metavar="FILE", help="published subsets, of records or of ids")
    add("--scienceqa", metavar="DIR", help="folder with problems.json")
    add("--split", default="train", help="default: %(default)s")
    add("--pictures", default="any", choices=("any", "only", "none"), help="questions with or without images")
    add("--keep", type=int, metavar="K", help="how many to choose (default: 1000; in a study a twelfth)")
    add("--seed", type=int, default=0, help="of random choices (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="for the records")
    add("--explain", action="store_true", help="write beside --out why each question is kept")
    add("--image-text", type=Path, metavar="FILE", help="guided: {id: text that is visible in the image}")
    add("--model", metavar="ID", help="the LLaVA that maxmin and gain measure with; guided: adds its loss")
    add("--layer", type=int, default=-1, metavar="L", help="maxmin: 0 the embeddings, -1 the last (default)")
    add("--pooling", default="last", choices=("last", "mean"), help="maxmin: the prompt's last token or mean")
    add("--batch-size", type=number(int, 1), default=16, metavar="N", help="questions at once (%(default)s)")
    add("--cache", type=Path, metavar="DIR", help="for states, losses and gains (default: beside --out)")
    add("--draw", type=Path, metavar="FILE", help="draw the report")
    add_task_flags(add)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    if args.keep is None:
        args.keep = len(read_scienceqa(args.scienceqa, "train")) // 12 if args.study else 1000
    return args


def add_task_flags(add) -> None:
    add("--pretrain", type=Path, metavar="FILE", help="study: captions; images in a folder of that name")
    add("--vision", metavar="ID", help="study: the CLIP")
    add("--language", nargs="+", metavar="ID", help="study: the language models")
    add("--seeds", type=number(int, 1), default=2, metavar="N", help="study: how many seeds (%(default)s)")
    add("--variants", nargs="+", metavar="NAME", help=f"study: some of {', '.join(map(repr, VARIANTS))}")
    for name, program in (("stage1", "train.py"), ("stage2", "train.py"), ("eval", "eval.py")):
        add(f"--{name}", default="", metavar="FLAGS",
            help=f"study: more flags for {program}, in quotes and after =, as in --{name}=\"--batch-size 8\"")
    add("--style", default="brief", choices=INSTRUCTIONS, help="expand: instructions (default: %(default)s)")
    add("--captions", type=Path, metavar="FILE", help="generate: COCO captions, or [{image, caption}]")
    add("--boxes", type=Path, metavar="FILE", help="generate: COCO instances")
    add("--judge-model", metavar="NAME", help="generate: the teacher")
    add("--judge", metavar="URL", help="generate: its OpenAI-compatible endpoint (default: OPENAI_BASE_URL)")
    add("--limit", type=number(int, 1), metavar="N", help="expand, generate: only the first N images")
    add("--workers", type=number(int, 1), default=8, metavar="N", help="generate: parallel requests (8)")
    add("--dry-run", action="store_true", help="generate: print the first request and the size of all")
    add("--batch", type=Path, metavar="FILE", help="generate: write the requests in OpenAI's batch format")
    add("--replies", type=Path, metavar="FILE", help="generate: read the results of --batch, ask nothing")


TASKS = {                                    # flag: (function, the flags that it needs)
    "method": (choose, ("scienceqa", "out")), "report": (print_report, ()),
    "study": (study, ("scienceqa", "pretrain", "vision", "language")), "expand": (expand, ("out",)),
    "generate": (generate, ("captions", "judge_model", "out")), "from_list": (choose, ("scienceqa", "out"))}


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Set args.task, one of TASKS; exit with code 2 unless the other flags fit it."""
    named = [task for task in TASKS if getattr(args, task)]
    if not named:
        parser.error("name --method, --from-list, --report, --study, --expand or --generate")
    if len(named) > 1 and named != ["study", "from_list"]:
        parser.error("--from-list goes alone or with --study")
    args.task = named[0]
    if args.task == "from_list" and len(args.from_list) > 1:
        parser.error("several lists need --study")
    needed = TASKS[args.task][1]
    if args.generate in ("detail", "reasoning"):
        needed += ("boxes",)
    if args.report and args.cache:
        needed += ("scienceqa",)             # the cache has a row for each of its questions
    for flag in needed:
        if not getattr(args, flag):
            parser.error(f"--{args.task} needs --{flag}".replace("_", "-"))
    if args.task == "study":
        check_study(parser, args)
    if args.draw and not is_writable_image(args.draw):
        parser.error("--draw needs the name of an image file, such as report.png")
    inputs = [args.expand, args.captions, args.boxes, args.replies, args.pretrain, args.image_text,
              *(args.report or ()), *(args.from_list or ())]
    if args.scienceqa:
        inputs += [Path(args.scienceqa, name) for name in ("problems.json", "pid_splits.json")]
    check_outputs(parser, (args.out, args.draw, args.batch), inputs)


def check_study(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with code 2 for flags that a study or its programs do not take, or that the study sets itself."""
    from train import parse as parse_training            # here, because the import takes a second

    for name in ("prune", "keep_tokens", "template", "base", "quantize", "split", "pictures", "seed",
                 "image_text", "layer", "pooling", "batch_size"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"a study does not take --{name.replace('_', '-')}: give flags of its trainings "
                         "within --stage1, --stage2 and --eval, and subsets of your own with --from-list")
    if args.tokenizer and len(args.language) > 1:
        parser.error("--tokenizer would replace that of every --language: leave it out")
    training = "--init i --data d --out o"
    for name, parse, needed, own in (
            ("stage1", parse_training, f"--stage 1 {training}", ""),
            ("stage2", parse_training, f"--stage 2 {training}", "--seed"),
            ("eval", parse_evaluation, "--scienceqa d --model m", "--limit --split --pictures")):
        try:
            words = shlex.split(getattr(args, name))
        except ValueError as error:
            parser.error(f"--{name}: {error}")
        if wrong := {word.split("=")[0] for word in words} & set(own.split()):
            parser.error(f"--{name} takes no {min(wrong)}, which the study sets")
        parse([*needed.split(), *words])     # the program's own parser, now and not after hours


def main() -> None:
    args = parse_args()
    TASKS[args.task][0](args)


if __name__ == "__main__":
    command_line(main)
