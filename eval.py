"""Scores of a LLaVA, or of files of answers, on ScienceQA and six other benchmarks; and what a LLaVA costs.

    python eval.py --scienceqa data/ScienceQA --split test --model runs/stage2 --out answers.jsonl
    python eval.py --scienceqa data/ScienceQA --split test --compare a.jsonl b.jsonl
    python eval.py --task pope --questions llava_pope_test.jsonl --annotations coco_pope_*.json --predictions answers.jsonl
    python eval.py --cost

ScienceQA's folder is as published (Lu et al. 2022, github.com/lupantech/ScienceQA): problems.json,
pid_splits.json and images/{split}/{id}/image.png; the other files are those of LLaVA's evaluation guide.
Prompts, the reading of answers and the figures follow the scripts with which LLaVA's published figures
were made: other prompts or other rules move a score by up to 30 points.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http.client import HTTPException
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from llava import (Llava, LlavaConfig, Processor, TextConfig, UserError, VisionConfig, add_model_flags,
                   atomic_write, choose_grid, command_line, count_image_tokens, load_model, open_checkpoint,
                   open_image, read_json, write_json)

LETTERS = "ABCDE"
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
COLUMNS = {                                  # ScienceQA's official table; TXT and IMG overlap
    "NAT": lambda p: p["subject"] == "natural science",
    "SOC": lambda p: p["subject"] == "social science",
    "LAN": lambda p: p["subject"] == "language science",
    "TXT": lambda p: bool(p["hint"]),
    "IMG": lambda p: bool(p["image"]),
    "NO": lambda p: not p["hint"] and not p["image"],
    "G1-6": lambda p: int(p["grade"].removeprefix("grade")) <= 6,
    "G7-12": lambda p: int(p["grade"].removeprefix("grade")) > 6,
    "Avg": lambda p: True,
}


# ---------------------------------------------------------------------------------------------
# 1. ScienceQA: problems, prompts, records


def read_scienceqa(folder, split: str, pictures: str = "any", limit: int | None = None,
                   wording: str = "qcm") -> list[dict]:
    """The problems of a split in published order, each with its "id" and "question_id", its "prompt" and,
    in "file", the path of its image (None without image)."""
    folder = Path(folder)
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if split not in splits:
        raise UserError(f"{folder / 'pid_splits.json'} has no split {split!r}, only {', '.join(splits)}")
    if unknown := [i for i in splits[split] if i not in problems]:
        raise UserError(f"{folder / 'problems.json'} lacks question {unknown[0]} of split {split!r}")
    selected = []
    for i in splits[split]:
        p = problems[i] | {"id": i, "question_id": i, "prompt": question(problems[i], wording), "file": None}
        if p["image"]:
            p["file"] = folder / "images" / p["split"] / i / p["image"]
        if pictures == "any" or (pictures == "only") == bool(p["image"]):
            selected.append(p)
    return selected[:limit]


def question(problem: dict, wording: str = "qcm") -> str:
    """The prompt of a problem.

    "qcm" is question, context, options, with which LLaVA is trained on ScienceQA. "letter" is the form in
    which LLaVA-1.5 is asked without that training. In both, double spaces are halved once, as in LLaVA's
    conversion scripts; in "qcm", "Question: " disappears.
    """
    if wording == "letter":
        text = "<image>\n" if problem["image"] else ""
        if problem["hint"]:
            text += f"Context: {problem['hint']}\n"
        options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, problem["choices"]))
        return (text + problem["question"] + options + LETTER_SUFFIX).replace("  ", " ")
    options = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, problem["choices"]))
    text = (f"Question: {problem['question']}\nContext: {problem['hint'] or 'N/A'}\n"
            f"Options: {options}\n").replace("  ", " ").strip().replace("Question: ", "")
    return text + "\n<image>" if problem["image"] else text


def answer(problem: dict) -> str:
    """The target text of a training record: lecture, explanation, answer (LEA)."""
    text = (f"Answer: {problem['lecture']} {problem['solution']} "
            f"The answer is {LETTERS[problem['answer']]}.")
    return text.replace("  ", " ").strip().replace("Answer: ", "")


def to_record(problem: dict) -> dict:
    """A problem as a training record of LLaVA; image paths are relative to the split's folder."""
    record = {"id": problem["id"]}
    if problem["image"]:
        record["image"] = f"{problem['id']}/{problem['image']}"
    return record | {"conversations": [{"from": "human", "value": question(problem)},
                                       {"from": "gpt", "value": answer(problem)}]}


# ---------------------------------------------------------------------------------------------
# 2. ScienceQA: answers and scores


def parse_choice(text: str, choices: int) -> int | None:
    """The index of the option that an answer names; None where LLaVA's eval_science_qa.py finds none, -1 for
    a letter that is not an option. "The answer is X" must occur exactly once; any character may follow X,
    because the dot in the published pattern matches every character."""
    if text in LETTERS and len(text) == 1:
        letter = text
    elif len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        found = re.findall(r"The answer is ([A-Z]).", text)
        letter = found[0] if len(found) == 1 else None
    if letter is None:
        return None
    index = LETTERS.find(letter)
    return index if index < choices else -1


def grade(problems: list[dict], texts: dict[str, str]) -> list[bool]:
    """Whether each problem is answered correctly; missing and unreadable answers are wrong."""
    return [p["id"] in texts and parse_choice(texts[p["id"]], len(p["choices"])) == p["answer"] for p in problems]


def score(problems: list[dict], texts: dict[str, str]) -> dict[str, float]:
    """Percent correct in each column, with two decimals; the number of questions; how many answers are
    missing or unreadable ("unread"), which both count as wrong; and how many belong to other questions."""
    table = {}
    for column, belongs in COLUMNS.items():
        correct = grade([p for p in problems if belongs(p)], texts)
        table[column] = round(100 * sum(correct) / len(correct), 2) if correct else None
    answered = [p for p in problems if p["id"] in texts]
    return table | {"questions": len(problems), "missing": len(problems) - len(answered),
                    "unread": sum(parse_choice(texts[p["id"]], len(p["choices"])) is None for p in answered),
                    "elsewhere": len(texts) - len(answered)}


def print_columns(rows: dict[str, list[float | None]], form: str = ".2f") -> None:
    """Print ScienceQA's columns and an aligned line for each named row."""
    width = max(map(len, rows))
    print(" " * width, *(f"{column:>6}" for column in COLUMNS))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{'-' if x is None else format(x, form):>6}" for x in row))


def print_table(tables: dict[str, dict]) -> None:
    """Print a row for each named table of `score`, then the number of questions behind each."""
    print_columns({name: [table[column] for column in COLUMNS] for name, table in tables.items()})
    for name, table in tables.items():
        print(f"{name}: {table['questions']} questions, {table['unread']} answers could not be read, "
              f"{table['missing']} missing, {table['elsewhere']} to other questions")


def interval(correct_a: list[bool], correct_b: list[bool] | None = None, draws: int = 10000,
             seed: int = 0) -> tuple[float, float, float]:
    """Percent correct, or with correct_b the percentage points by which a leads on the same questions, and the
    bounds of its 95% bootstrap interval. The number of times a resample draws each outcome is multinomial,
    so the questions need not be drawn one by one."""
    outcomes = np.asarray(correct_a, int)
    if correct_b is not None:
        outcomes = outcomes - np.asarray(correct_b, int)
    values, counts = np.unique(outcomes, return_counts=True)
    n = len(outcomes)
    means = np.random.default_rng(seed).multinomial(n, counts / n, draws) @ values * 100 / n
    low, high = np.percentile(means, (2.5, 97.5))
    return 100 * float(outcomes.mean()), float(low), float(high)


def compare(problems: list[dict], files: list[str]) -> None:
    """Print the tables of two files of answers, and by how many points the first leads."""
    a, b = map(read_answers, files)
    if alone := sorted(a.keys() ^ b.keys()):
        raise UserError(f"{' and '.join(files)} answer different questions: {len(alone)} are in one of them "
                        f"only, such as {alone[0]} in {files[0] if alone[0] in a else files[1]}")
    print_table({file: score(problems, texts) for file, texts in zip(files, (a, b))})
    columns = ([p for p in problems if belongs(p)] for belongs in COLUMNS.values())
    lead = [interval(grade(some, a), grade(some, b)) if some else (None,) * 3 for some in columns]
    print("\nPoints by which the first file leads, and its 95% interval over 10,000 resampled tests:")
    print_columns(dict(zip(("lead", "from", "to"), zip(*lead))), "+.2f")


# ---------------------------------------------------------------------------------------------
# 3. Files of JSON lines: answers, questions, labels, reviews


def parse_lines(file, content: bytes, needed: tuple[str, ...], unique: bool = False) -> list[dict]:
    """The JSON object of each line, all with the keys `needed`; `unique` refuses a second line with the same
    question_id. Raises UserError that names the line."""
    entries, seen = [], set()
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if any(key not in entry for key in needed) or not isinstance(entry.get("text", ""), str):
                raise ValueError
        except (ValueError, TypeError, AttributeError):
            keys = ", ".join(f'"{key}": ...' for key in needed)
            raise UserError(f"{file}, line {number}: not {{{keys}}}") from None
        if unique and (key := str(entry["question_id"])) in seen:
            raise UserError(f"{file}, line {number}: question {key} was answered before; remove one of them")
        seen.add(str(entry.get("question_id")))
        entries.append(entry)
    return entries


def read_lines(file, *needed: str, unique: bool = False) -> list[dict]:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
    return parse_lines(file, content, needed, unique)


def read_answers(file) -> dict[str, str]:
    """question_id -> text of a file of answers, in which no question may occur twice."""
    return {str(entry["question_id"]): entry["text"] for entry in read_lines(file, "question_id", "text", unique=True)}


def split_appended(file: Path) -> tuple[bytes, bytes]:
    """The content of a file to which lines are appended: its complete lines, and the rest of a line that an
    interrupt cut short. A last line that lacks only its newline is complete."""
    content = file.read_bytes() if file.exists() else b""
    complete, _, rest = content.rpartition(b"\n")
    try:
        json.loads(rest)
        return content, b""
    except ValueError:
        if not any(start.startswith(rest[:len(start)]) for start in (b'{"question_id"', b'{"id"')):
            raise UserError(f"{file} does not hold lines of this program: name another file with --out or "
                            "--reviews") from None
    return content[:len(content) - len(rest)], rest


def repair(file: Path, complete: bytes, rest: bytes) -> None:
    """Prepare a file for `append`: remove what an interrupt left of a line, or add a missing newline."""
    if rest:
        os.truncate(file, len(complete))
    elif complete and not complete.endswith(b"\n"):
        with open(file, "ab") as lines:
            lines.write(b"\n")


def append(file: Path, entry: dict) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OSError(f"{file} cannot be written ({error.strerror}): make room, then go on from it") from None


# ---------------------------------------------------------------------------------------------
# 4. Asking a model. A question is a dict with "question_id", "prompt" and "image"; "file" is the path of the
# image, and without "file" the image itself is in "image", in base64.


def load_image(problem: dict, blank: bool = False) -> Image.Image:
    """The image of a question, or with `blank` a white image of the same size."""
    if problem.get("file"):
        image = open_image(problem["file"])
    else:
        image = open_image(io.BytesIO(base64.b64decode(problem["image"])))
    return Image.new("RGB", image.size, "white") if blank else image


def generate_answers(model: Llava, processor: Processor, problems: list[dict], batch_size: int = 16,
                     max_new_tokens: int = 512, blank: bool = False, options: bool = False,
                     tally: Counter | None = None,
                     message: Callable[[dict], str] = itemgetter("prompt")) -> Iterator[tuple[dict, str, str]]:
    """Each problem with its prompt and the model's greedy answer, the longest problems first: then the rows of a
    batch have similar lengths, and a batch that does not fit in memory fails at once.

    blank replaces every image by white (control: what is still right does not need the image). options
    answers with the most probable option instead of written text; message(problem) is the user's message, with
    <image> where there is one; tally["tokens"] counts the generated tokens.
    """
    problems = sorted(problems, key=lambda p: (bool(p["image"]), len(message(p))), reverse=True)
    bar = tqdm(total=len(problems), desc="answering", unit="question")
    for start in range(0, len(problems), batch_size):
        batch, inputs = problems[start:start + batch_size], []
        for p in batch:
            images = [load_image(p, blank)] if p["image"] else []
            inputs.append(processor([{"role": "user", "content": message(p)}], images))
        if options:
            texts = score_options(model, processor, batch, inputs)
        else:
            answers = model.generate_batch(**collate(inputs), eos_token_id=processor.eos,
                                           max_new_tokens=max_new_tokens)
            texts = [processor.decode(ids) for ids in answers]
            if tally is not None:
                tally["tokens"] += sum(map(len, answers))
        bar.update(len(batch))
        yield from zip(batch, [p["prompt"] for p in batch], texts)


def collate(inputs: list[dict], ending=()) -> dict:
    """Outputs of the processor as one right-padded batch; the token ids `ending` are appended to each row."""
    rows = [torch.cat((i["input_ids"][0], torch.tensor(ending, dtype=torch.int64))) for i in inputs]
    return {"input_ids": pad_sequence(rows, batch_first=True),
            "images": [image for i in inputs for image in i["images"]],
            "image_sizes": [size for i in inputs for size in i["image_sizes"]],
            "attention_mask": pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True)}


@torch.inference_mode()
def score_options(model: Llava, processor: Processor, problems: list[dict], inputs: list[dict]) -> list[str]:
    """For each problem the text "The answer is X" with the most probable option X.

    These texts differ in their last token only, so one prefill per question gives the logits of all options,
    and no option gains from being short. The logits are computed in float32: in bfloat16 close ones are equal,
    and the first option would win. This asks for an answer without the reasoning that LEA puts before it:
    compare its accuracies with each other, not with those of generated answers.
    """
    ids = [processor.encode(f"The answer is {letter}") for letter in LETTERS]
    if any(i[:-1] != ids[0][:-1] for i in ids):
        raise UserError("the tokenizer has no token for each of the letters A to E: use --answer generate")
    x, lengths, _ = model.splice(**collate(inputs, ending=ids[0][:-1]))
    hidden = model.language_model(x, select=(torch.arange(len(x)), lengths - 1)).float()         # [B, C]
    rows, last = getattr(model.language_model.lm_head, "weight", None), [i[-1] for i in ids]
    logits = hidden @ rows[last].float().T                                                       # [B, 5]
    return [f"The answer is {LETTERS[row[:len(p['choices'])].argmax()]}." for p, row in zip(problems, logits)]


def fingerprint(model: Llava, processor: Processor) -> str:
    """Eight hexadecimal digits that change with the config, the tokenizer or any trained tensor; of each tensor
    the first 16 numbers are used."""
    numbers = torch.cat([p.detach().flatten()[:16].float() for p in model.parameters()]).cpu().numpy()
    text = repr(model.config) + processor.tokenizer_json
    return hashlib.sha256(text.encode() + numbers.tobytes()).hexdigest()[:8]


def by_prompt(entry: dict) -> tuple[str, str]:
    """The key of a question or an answer: its id and its prompt, since MME and TextVQA repeat ids."""
    return str(entry["question_id"]), entry.get("prompt")


def resume(file: Path, problems: list[dict], made: dict, unique: bool = True) -> list[dict]:
    """The answers that `file` already holds. UserError if one of them was made with another prompt or with other
    settings than `made`."""
    complete, rest = split_appended(file)
    prompts = defaultdict(set)
    for p in problems:
        prompts[str(p["question_id"])].add(p["prompt"])
    entries = parse_lines(file, complete, ("question_id", "text"), unique)
    for entry in entries:
        i, metadata = str(entry["question_id"]), entry.get("metadata") or {}
        different = [key for key in made if metadata.get(key) != made[key]]
        if i in prompts and entry.get("prompt") not in prompts[i]:
            different.append("prompt")
        if different:
            raise UserError(f"{file} has an answer to question {i} that was made with another {different[0]}: "
                            "name another --out")
    repair(file, complete, rest)
    return entries


def answer_all(args: argparse.Namespace, problems: list[dict], unique: bool = True,
               message: Callable[[dict], str] = itemgetter("prompt")) -> list[dict]:
    """The answers to all problems: those in args.out, and the model's to the others, each of which is appended there
    at once. When all are there, the file is sorted by question."""
    for p in problems:
        if p.get("file") and not p["file"].exists():
            raise OSError(f"question {p['question_id']}: there is no image {p['file']}")
    model, processor = load_model(args)
    made = {"task": args.task or "scienceqa", "wording": args.wording, "dtype": args.dtype,
            "image_mode": model.config.image_mode, "prune": model.config.prune,
            "keep_tokens": getattr(model.config, "keep_tokens", None),
            "quantize": getattr(args, "quantize", None) or "none", "answer": args.answer,
            "max_new_tokens": args.max_new_tokens, "blank": args.blank, "model": fingerprint(model, processor)}
    entries = resume(args.out, problems, made, unique) if args.out else []
    answered, tally, start = set(map(by_prompt, entries)), Counter(), time.perf_counter()
    left = [p for p in problems if by_prompt(p) not in answered]
    for p, prompt, text in generate_answers(model, processor, left, args.batch_size, args.max_new_tokens,
                                            args.blank, args.answer == "options", tally, message):
        entries.append({"question_id": p["question_id"], "prompt": prompt, "text": text, "model_id": args.model,
                        "metadata": made})
        if args.out:
            append(args.out, entries[-1])
    seconds = time.perf_counter() - start
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters in {args.dtype}, "
          f"{len(left)} questions asked, {len(left) / seconds:.1f} questions/s, "
          f"{tally['tokens'] / seconds:.1f} tokens/s, {peak_memory(args.device) / 2**30:.2f} GiB at the peak")
    if left and args.out:
        order = {by_prompt(p): n for n, p in enumerate(problems)}
        entries.sort(key=lambda entry: order.get(by_prompt(entry), len(order)))
        with atomic_write(args.out) as file:
            file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return entries


def peak_memory(device: str) -> int:
    """Peak bytes: of tensors on a CUDA device, otherwise of the process (0 on Windows, which lacks `resource`)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak        # macOS counts bytes, Linux KiB


# ---------------------------------------------------------------------------------------------
# 5. Short answers as VQAv2 and TextVQA compare them

CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in    # each apostrophe is missing once: dont -> don't
                """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've""".split() for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}
NUMBERS = {word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}


@lru_cache(2**17)
def normalize_vqa(text: str) -> str:
    """A short answer as VQA's evaluator (vqaEval.py) compares it, with its three peculiarities: one
    mark beside a space removes all marks of its kind, a comma between digits removes all marks, and at most 32
    periods are removed."""
    remove_all, normalized = re.search(r"\d,\d", text) is not None, text
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        beside_space = f"{mark} " in text or f" {mark}" in text
        normalized = normalized.replace(mark, "" if remove_all or beside_space else " ")
    normalized = re.sub(r"\.(?!\d)", "", normalized, count=32)
    words = (NUMBERS.get(word, word) for word in normalized.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


@lru_cache(2**17)
def normalize_m4c(text: str) -> str:
    """A short answer as TextVQA's evaluator compares it and as LLaVA submits it to VQAv2's server."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(strip_lines(text))


def strip_lines(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out(text: str, humans: list[tuple]) -> float:
    """The accuracy of an answer: the mean over the ten `humans` (who, answer) of min(1, equal answers of the others / 3).
    As in the official code, everyone who equals the one left out as a whole is left out."""
    equal = [human for human in humans if human[1] == text]
    if not equal:
        return 0.0
    return sum(min(1, sum(other != human for other in equal) / 3) for human in humans) / len(humans)


# ---------------------------------------------------------------------------------------------
# 6. The benchmarks. `read` gives the questions, and what scoring needs of the annotations in "truth";
# `score` takes a pair of question and answer texts (in the order of the file) for each question.


def read_questions(args: argparse.Namespace) -> list[dict]:
    """The questions of LLaVA's question files, one JSON object a line, with the path of each image."""
    return [q | {"prompt": q["text"], "file": args.images and args.images / q["image"]}
            for file in args.questions for q in read_lines(file, "question_id", "image", "text")]


def attach_truth(questions: list[dict], truth: dict, key: Callable[[dict], object], file) -> list[dict]:
    """The questions with what `truth` holds under their key in "truth"."""
    for q in questions:
        if key(q) not in truth:
            raise UserError(f"{file} has nothing for question {q['question_id']}: it belongs to other questions")
        q["truth"] = truth[key(q)]
    return questions


def by_id(entry: dict) -> str:
    return str(entry["question_id"])


def require_ten(answers: list, question_id, file) -> list:
    if len(answers) != 10:
        raise UserError(f"{file}: question {question_id} has {len(answers)} human answers, not ten")
    return answers


def read_vqav2(args: argparse.Namespace) -> list[dict]:
    questions = []
    for file in args.questions:
        try:
            raw = json.loads(Path(file).read_bytes())
        except ValueError:
            raw = None                       # not one JSON object: LLaVA's file of lines
        if not isinstance(raw, dict) or "questions" not in raw:
            questions += read_questions(argparse.Namespace(questions=[file], images=args.images))
            continue
        split = raw["data_subtype"].replace("test-dev", "test")
        for q in raw["questions"]:
            image, prompt = f"COCO_{split}_{q['image_id']:012}.jpg", q["question"] + SHORT_SUFFIX
            questions.append({"question_id": q["question_id"], "image": image, "prompt": prompt,
                              "file": args.images and args.images / image})
    if args.annotations:
        raw = read_keys(args.annotations[0], "annotations")["annotations"]
        truth = {str(a["question_id"]): a for a in raw}
        attach_truth(questions, truth, by_id, args.annotations[0])
        for q in questions:
            require_ten(q["truth"]["answers"], q["question_id"], args.annotations[0])
    return questions


def read_keys(file, *needed: str) -> dict:
    """A JSON object that has the keys `needed`."""
    content = read_json(file)
    if not isinstance(content, dict) or any(key not in content for key in needed):
        raise UserError(f"{file} is not a JSON object with {' and '.join(needed)}")
    return content


def score_vqav2(pairs: list[tuple[dict, list[str]]], args: argparse.Namespace) -> dict:
    accuracies = defaultdict(list)
    for q, texts in tqdm(pairs, desc="scoring", disable=len(pairs) < 10000):
        records = q["truth"]["answers"]
        text = normalize_m4c(texts[-1] if texts else "")
        humans = [strip_lines(record["answer"]) for record in records]
        if len(set(humans)) > 1:             # ten equal answers are compared as they are, with upper case
            text, humans = normalize_vqa(text), [normalize_vqa(human) for human in humans]
        who = [{key: value for key, value in record.items() if key != "answer"} for record in records]
        accuracy = leave_one_out(text, list(zip(who, humans)))
        accuracies["overall"].append(accuracy)
        accuracies[q["truth"]["answer_type"]].append(accuracy)
    figures = dict.fromkeys(("overall", "yes/no", "number", "other"))
    return figures | {name: round(100 * sum(some) / len(some), 2) for name, some in accuracies.items()}


def upload_vqav2(file: Path, pairs: list[tuple[dict, list[str]]]) -> None:
    """The server's JSON file; unanswered questions get ""."""
    write_json(file, [{"question_id": q["question_id"], "answer": normalize_m4c(texts[-1] if texts else "")}
                      for q, texts in pairs])


def textvqa_key(entry: dict) -> tuple[str, str]:
    """Image id and question in lower case, which the prompt holds in one of LLaVA's four forms."""
    prompt, lines = entry["prompt"], entry["prompt"].split("\n")
    found = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and found:
        text = found[1]
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        text = lines[1] if prompt.startswith("Reference OCR token:") else lines[0]
    elif len(lines) == 2:
        text = lines[0]
    else:
        raise UserError(f"the prompt of question {entry['question_id']} has none of TextVQA's four forms")
    return str(entry["question_id"]), text.lower()


def read_textvqa(args: argparse.Namespace) -> list[dict]:
    questions = read_questions(args)
    if args.annotations:
        raw = read_keys(args.annotations[0], "data")["data"]
        truth = {(a["image_id"], a["question"].lower()): a["answers"] for a in raw}
        for q in attach_truth(questions, truth, textvqa_key, args.annotations[0]):
            require_ten(q["truth"], q["question_id"], args.annotations[0])
    return questions


def score_textvqa(pairs: list[tuple[dict, list[str]]], args: argparse.Namespace) -> dict:
    accuracies = []
    for q, texts in pairs:
        humans = [(i, normalize_m4c(human)) for i, human in enumerate(q["truth"])]
        accuracies += [leave_one_out(normalize_m4c(text), humans) for text in texts]
    return {"accuracy": 100 * divide(sum(accuracies), len(accuracies)), "answers": len(accuracies)}


def percent(correct: list) -> float | None:
    return 100 * sum(correct) / len(correct) if correct else None


def divide(a: float, b: float) -> float:
    """a / b, and 0 where b is 0."""
    return a / b if b else 0.0


def read_pope(args: argparse.Namespace) -> list[dict]:
    """The n-th question of a set and the n-th line of that set's label file belong together."""
    questions, sets = read_questions(args), defaultdict(list)
    for q in questions:
        sets[q.get("category")].append(q)
    for file in args.annotations or ():
        labels, name = read_lines(file, "image", "text", "label"), Path(file).stem.removeprefix("coco_pope_")
        same = [(q["image"], q["prompt"].split("\n")[0]) == (label["image"], label["text"])
                for q, label in zip(sets[name], labels)]
        if len(sets[name]) != len(labels) or not all(same):
            raise UserError(f"{file} has the labels of another revision of POPE than the question file: take "
                            "coco_pope_*.json of POPE's commit e3e39262")
        for q, label in zip(sets[name], labels):
            q["truth"] = label["label"]
    for name, some in sets.items():
        if args.annotations and some and "truth" not in some[0]:
            raise UserError(f"--annotations lacks coco_pope_{name}.json")
    return questions


def parse_pope(text: str) -> bool:
    """Whether an answer counts as yes: unless "No", "no" or "not" is a word before the first period."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in words for word in ("No", "no", "not"))


def score_pope(pairs: list[tuple[dict, list[str]]], args: argparse.Namespace) -> dict:
    figures = {}
    for name in dict.fromkeys(q["category"] for q, _ in pairs):
        counts = Counter((parse_pope(texts[-1]), q["truth"] != "no")
                         for q, texts in pairs if q["category"] == name and texts)
        tp, fp = counts[True, True], counts[True, False]
        tn, fn = counts[False, False], counts[False, True]
        precision, recall, n = divide(tp, tp + fp), divide(tp, tp + fn), counts.total()
        figures[name] = {"tp": tp, "fp": fp, "tn": tn, "fn": fn, "accuracy": divide(tp + tn, n),
                         "precision": precision, "recall": recall,
                         "f1": divide(2 * precision * recall, precision + recall), "yes_ratio": divide(tp + fp, n)}
    return {"f1": 100 * sum(row["f1"] for row in figures.values()) / len(figures)} | figures


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def mme_key(entry: dict) -> tuple[str, str, str]:
    """Task, name of the image without its ending, question without its request for a short answer."""
    parts = str(entry["question_id"]).split("/")
    text = entry["prompt"].removesuffix(SHORT_SUFFIX).strip().removesuffix("Please answer yes or no.").strip()
    return parts[0], parts[-1].split(".")[0], text


def read_mme(args: argparse.Namespace) -> list[dict]:
    """The truth is in the release folder, or in the templates of the evaluation tool, one file a task."""
    questions, truth = read_questions(args), {}
    folder = Path(args.annotations[0]) if args.annotations else None
    for task in dict.fromkeys(mme_key(q)[0] for q in questions if folder):
        lines = []
        for file in [folder / f"{task}.txt", *sorted((folder / task).glob("**/*.txt"))]:
            if file.exists():
                image = [] if file.parent == folder else [file.name]
                lines += [image + line.split("\t") for line in file.read_text("utf-8").split("\n") if line.strip()]
        for line in lines:
            if len(line) < 3 or line[2].strip().lower() not in ("yes", "no"):
                raise UserError(f"{folder}: a line of {task} is not image, question, yes or no, but {line}")
            truth[mme_key({"question_id": f"{task}/{line[0]}", "prompt": line[1]})] = line[2].strip().lower()
    return attach_truth(questions, truth, mme_key, folder) if folder else questions


def parse_mme(text: str) -> str:
    """yes, no or other: the first of yes and no that the first four characters contain."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score_mme(pairs: list[tuple[dict, list[str]]], args: argparse.Namespace) -> dict:
    images = defaultdict(list)
    for q, texts in pairs:
        if texts:
            images[q["question_id"]].append(parse_mme(texts[-1]) == q["truth"])
    tasks, figures = defaultdict(list), {}
    for image, correct in images.items():
        if len(correct) != 2:
            raise UserError(f"MME asks two questions about each image, but {image} has {len(correct)} answer(s)")
        tasks[image.split("/")[0]].append(correct)
    for task in [*PERCEPTION, *COGNITION, *tasks]:
        if task in tasks:
            acc = 100 * sum(map(sum, tasks[task])) / (2 * len(tasks[task]))
            acc_plus = 100 * sum(map(all, tasks[task])) / len(tasks[task])
            figures[task] = {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus}
    totals = {name: sum(figures[task]["score"] for task in group if task in figures)
              for name, group in (("perception", PERCEPTION), ("cognition", COGNITION))}
    return totals | figures


MISSING = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
           "NA", "NULL", "NaN", "None", "n/a", "nan", "null")        # cells that pandas, the official reader, drops


def read_mmbench(args: argparse.Namespace) -> list[dict]:
    """The rows of the tsv: rotations of one question's options have the same index modulo 1,000,000."""
    csv.field_size_limit(2**31 - 1)
    questions = []
    for file in args.questions:
        try:
            with open(file, newline="", encoding="utf-8") as lines:
                questions += map(mmbench_question, csv.DictReader(lines, delimiter="\t"))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(f"{file} is not a tsv of MMBench ({type(error).__name__}: {error})") from None
    return questions


def mmbench_question(row: dict[str, str]) -> dict:
    row, options = {key: None if cell in MISSING else cell for key, cell in row.items()}, {}
    for letter in "ABCD":
        if str(row[letter]).lower() in ("none", "nan"):
            break
        options[letter] = row[letter]
    lines = [row["question"], *(f"{letter}. {text}" for letter, text in options.items())]
    if str(row["hint"]).lower() not in ("none", "nan"):
        lines.insert(0, row["hint"])
    q = {"question_id": int(row["index"]), "prompt": "\n".join(lines), "image": row["image"], "options": options, "row": row}
    return q | {"truth": row["answer"]} if row.get("answer") else q


REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def parse_letter(text: str, options: dict[str, str]) -> str | None:
    """The option letter that an answer names by the rules of VLMEvalKit without its judge, or None: the only letter
    among the words, and near the end; "answer is X"; or the only option whose text the answer contains."""
    if any(refusal in text for refusal in REFUSALS):
        return None
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return None
    found = re.search(r"answer\s+is\s+\**([ABCD])", text, re.IGNORECASE)
    if found and found[1].upper() in options:
        return found[1].upper()
    if len(text) > 2 * sum(map(len, options.values())):
        return None
    contained = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return contained[0] if len(contained) == 1 else None


def score_mmbench(pairs: list[tuple[dict, list[str]]], args: argparse.Namespace) -> dict:
    """circular: percent of the questions that are right in every rotation; one_pass: percent of the rows."""
    rotations, categories = defaultdict(list), defaultdict(list)
    for q, texts in pairs:
        correct = bool(texts) and parse_letter(texts[-1], q["options"]) == q["truth"]
        rotations[q["question_id"] % 10**6].append((q, correct))
    for rows in rotations.values():
        main = min((q for q, _ in rows), key=lambda q: q["question_id"])
        categories[main["row"].get("l2-category")].append(all(correct for _, correct in rows))
    every, rows = sum(categories.values(), []), [correct for group in rotations.values() for _, correct in group]
    return {"circular": percent(every), "one_pass": percent(rows),
            "categories": {str(name): percent(some) for name, some in categories.items()}}


XLSX = {                                     # the parts of a workbook with one sheet, without the sheet itself
    "[Content_Types].xml": """<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Override PartName="/book.xml"
 ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>
<Override PartName="/sheet.xml"
 ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>""",
    "_rels/.rels": """<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Id="r1" Target="book.xml"
 Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"/></Relationships>""",
    "book.xml": """<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"
 xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships">
<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>""",
    "_rels/book.xml.rels": """<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">
<Relationship Id="r1" Target="sheet.xml"
 Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet"/></Relationships>"""}
SHEET = '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>{}</sheetData></worksheet>'


def upload_mmbench(file: Path, pairs: list[tuple[dict, list[str]]]) -> None:
    """The server's xlsx: a row for each row of the tsv, without images and categories, with the answers as the
    column "prediction" at position 6."""
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    names = [name for name in pairs[0][0]["row"] if name not in dropped]
    rows = [names[:6] + ["prediction"] + names[6:]]
    for q, texts in pairs:
        cells = [q["question_id"] if name == "index" else q["row"][name] for name in names]
        rows.append(cells[:6] + [texts[-1] if texts else None] + cells[6:])
    sheet = SHEET.format("".join(f"<row>{''.join(map(xlsx_cell, row))}</row>" for row in rows))
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (XLSX | {"sheet.xml": sheet}).items():
            archive.writestr(name, '<?xml version="1.0" encoding="UTF-8"?>\n' + content)


def xlsx_cell(value: int | str | None) -> str:
    """One cell; control characters, which XML cannot hold, are dropped."""
    if value is None:
        return "<c/>"
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    text = escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", value), {"\r": "&#13;"})
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'


# ---------------------------------------------------------------------------------------------
# 7. LLaVA-Bench: a judge compares the model's answers with GPT-4's reference answers

def judge_url(args: argparse.Namespace) -> str:
    """The address that --judge or, without it, OPENAI_BASE_URL names."""
    url = (args.judge or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise UserError("name the judge with --judge URL or OPENAI_BASE_URL, such as http://localhost:8000/v1"
                        + (f", not {url}" if url else ""))
    return url


def chat(url: str, model: str, messages: list[dict], temperature: float = 0.2, max_tokens: int = 1024,
         seconds: float = 60) -> str:
    """The text with which the endpoint {url}/chat/completions replies to messages
    [{"role": "system" | "user" | "assistant", "content": text}, ...].

    OPENAI_API_KEY is sent where it is set. At most 5 attempts, each at most `seconds` long, are made; the waits
    between them are 1, 2, 4 and 8 s, or what the server's Retry-After says, at most 60 s. Raises UserError for a
    refused key and for replies that are no chat completion, OSError where the endpoint cannot be reached or fails.
    """
    body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY holds characters that a key cannot have")
        request.add_unredirected_header("Authorization", f"Bearer {key}")      # for this server alone
    for wait in (1, 2, 4, 8, None):
        try:
            return read_reply(request, seconds)
        except urllib.error.HTTPError as response:
            if response.code in (401, 403):
                raise UserError(f"{url} refuses the request ({response.code}): check OPENAI_API_KEY") from None
            failure = OSError(f"{url} answers {response.code} {response.reason}: try again later")
            wait = wait and retry_after(response.headers.get("Retry-After"), wait)
        except UserError as error:
            failure = UserError(f"{url} {error}")
        except (OSError, HTTPException) as error:
            failure = OSError(f"{url} gives no answer ({getattr(error, 'reason', error)}): is it running?")
        if wait is not None:
            time.sleep(wait)
    raise failure from None


def read_reply(request: urllib.request.Request, seconds: float) -> str:
    """The text of one chat completion, all of it within `seconds`."""
    deadline, content = time.monotonic() + seconds, b""
    with urllib.request.urlopen(request, timeout=seconds) as response:
        while part := response.read1():
            content += part
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
    try:
        return "" + json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError("does not reply with a chat completion: is it an OpenAI-compatible endpoint?") from None


def retry_after(header: str | None, default: float) -> float:
    """The seconds, at most 60, of a Retry-After header: a number, a date, or nothing that can be read."""
    try:
        seconds = float(header)
    except (TypeError, ValueError):
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(timezone.utc)).total_seconds()
        except (TypeError, ValueError):
            return default
    return min(60, max(0, seconds))


JUDGE = "You rate the answers of two assistants to questions about images. You are exact and impartial."
RULE = """The question above is about an image that you cannot see; the context describes it{detail}. Rate the answers of \
{role} 1 and {role} 2: are they helpful, relevant, correct, and as detailed as the question asks for? Give each a number \
from 1 to 10; a better answer gets a higher number.
The first line of your reply holds these two numbers only, that of {role} 1 first, with a space between them. Explain \
them in the lines after it. The order in which the answers stand must not influence you."""
BOXES = """: first come captions, one a line, then objects, each as category: [left, top, right, bottom] in fractions of the \
image's width and height"""


def read_llavabench(args: argparse.Namespace) -> list[dict]:
    """With --annotations, each question gets the context of its image and its reference answer as "truth"."""
    questions = read_questions(args)
    if args.annotations:
        contexts, references = args.annotations
        described = {c["image"]: c for c in read_lines(contexts, "image")}
        answers = {str(r["question_id"]): r for r in read_lines(references, "question_id", "text", unique=True)}
        for q in questions:
            if q["image"] not in described or by_id(q) not in answers:
                raise UserError(f"{contexts} or {references} has nothing for question {q['question_id']}")
            q["truth"] = described[q["image"]], answers[by_id(q)]
    return questions


def judge_messages(q: dict, text: str) -> list[dict]:
    """The request to the judge, in the official form; the texts of the rules are ours."""
    context, reference = q["truth"]
    described, detail = context.get("caption"), ""
    if described is None:                    # LLaVA-Bench (COCO)
        boxes = [f"{box['category']}: {box['bbox']}" for box in context["instances"]]
        described, detail = [*context["captions"], "", *boxes], BOXES
    if isinstance(described, list):
        described = "\n".join(described)
    role = "Assistant"
    content = (f"[Context]\n{described}\n\n[Question]\n{q['prompt']}\n\n"
               f"[{role} 1]\n{reference['text']}\n\n[End of {role} 1]\n\n"
               f"[{role} 2]\n{text}\n\n[End of {role} 2]\n\n"
               f"[System]\n{RULE.format(role=role, detail=detail)}\n\n")
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": content}]


def parse_verdict(content: str) -> list[float]:
    """The two numbers of a reply's first line, the reference's first; [-1, -1] where the official script finds none."""
    numbers = content.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, numbers)
        return [first, second]
    except ValueError:
        return [-1, -1]


def judge_answers(args: argparse.Namespace, pairs: list[tuple[dict, list[str]]], file: Path) -> None:
    """Append a review of each answer to `file`, unless it is there."""
    complete, rest = split_appended(file)
    reviews = parse_lines(file, complete, ("question_id",), unique=True)
    url, prepared = judge_url(args), []
    stored = {by_id(review): review.get("metadata") for review in reviews}
    for q, texts in pairs:
        if not texts:
            continue
        digest = hashlib.sha256(texts[-1].encode()).hexdigest()[:8]
        made = {"judge_model": args.judge_model, "answer": digest}
        if by_id(q) not in stored:
            prepared.append((q, texts[-1], made))
        elif stored[by_id(q)] not in (None, made):
            raise UserError(f"{file} has a review of question {q['question_id']} by another judge or of another "
                            "answer: name another --reviews")
    repair(file, complete, rest)
    for n, (q, text, made) in enumerate(tqdm(prepared, desc="judging", unit="answer"), len(reviews) + 1):
        content = chat(url, args.judge_model, judge_messages(q, text))
        category = f"llava_bench_{q['category']}" if "caption" in q["truth"][0] else q["category"]
        append(file, {"id": n, "question_id": q["question_id"], "answer1_id": q["truth"][1].get("answer_id"),
                      "answer2_id": made["answer"], "category": category, "content": content,
                      "tuple": parse_verdict(content), "metadata": made})


def score_llavabench(pairs: list[tuple[dict, list[str]]], args: argparse.Namespace) -> dict:
    """100 x the model's mean rating / the reference's, by the official roundings; the mean over review files."""
    if args.judge_model:
        judge_answers(args, pairs, args.reviews[0])
    ratios, reviewed, questions = defaultdict(list), [], {by_id(q) for q, _ in pairs}
    for file in args.reviews:
        ratings, reviews = defaultdict(list), read_lines(file, "question_id", unique=True)
        reviewed.append({by_id(review) for review in reviews})
        for review in reviews:
            rating = review.get("tuple", review.get("score"))
            if not isinstance(rating, list) or len(rating) != 2:
                raise UserError(f"{file}: the review of question {by_id(review)} has no two ratings")
            ratings["all"].append(rating)
            if "category" in review:
                ratings[review["category"].removeprefix("llava_bench_")].append(rating)
        if unread := sum(rating == [-1, -1] for rating in ratings["all"]):
            print(f"{file}: {unread} reviews have no two numbers in the first line and count as -1 -1, as officially")
        for name, some in ratings.items():
            reference, model = (round(mean, 3) for mean in np.asarray(some, float).mean(0).tolist())
            ratios[name].append(round(100 * divide(model, reference), 1))
    questions = questions or set.union(*reviewed)
    if foreign := set.union(*reviewed) - questions:
        raise UserError(f"{args.reviews[0]} has a review of question {min(foreign)}, which --questions lacks")
    return {name: sum(some) / len(some) for name, some in sorted(ratios.items())} | {
        "reviews": ratios["all"], "missing": len(questions - set.intersection(*reviewed)),
        "questions": len(questions)}


class Benchmark(NamedTuple):
    """What a benchmark differs in. Adding one is adding an entry to BENCHMARKS."""
    read: Callable[[argparse.Namespace], list[dict]]
    score: Callable[[list, argparse.Namespace], dict]
    message: Callable[[dict], str] = lambda q: f"<image>\n{q['prompt']}"
    key: Callable[[dict], object] = by_id    # what an answer and its question have in common
    doubled: str = "the last one counts"     # if a question has two answers
    upload: Callable[[Path, list], None] | None = None
    max_new_tokens: int = 128


BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, score_vqav2, upload=upload_vqav2),
    "textvqa": Benchmark(read_textvqa, score_textvqa, key=textvqa_key, doubled="each counts"),
    "pope": Benchmark(read_pope, score_pope),
    "mme": Benchmark(read_mme, score_mme, key=by_prompt),
    "mmbench": Benchmark(read_mmbench, score_mmbench, lambda q: f"<image>\n{q['prompt']}{LETTER_SUFFIX}",
                         upload=upload_mmbench, max_new_tokens=1024),
    "llavabench": Benchmark(read_llavabench, score_llavabench, doubled="refused", max_new_tokens=1024),
}


def pair_answers(benchmark: Benchmark, questions: list[dict], entries: list[dict], file) -> list[tuple[dict, list[str]]]:
    """Each question with the texts of its answers, in the order of the file. UserError for answers to other questions."""
    texts = {benchmark.key(q): [] for q in questions}
    if len(texts) < len(questions):
        raise UserError("a question stands twice in the files of --questions")
    for entry in entries:
        if "prompt" not in entry and benchmark.key is not by_id:
            raise UserError(f"{file}: the answer to question {entry['question_id']} has no prompt")
        if benchmark.key(entry) not in texts:
            raise UserError(f"{file} answers question {entry['question_id']}, which --questions lacks: are these the "
                            "answers to other questions?")
        texts[benchmark.key(entry)].append(entry["text"])
    if doubled := sum(len(some) > 1 for some in texts.values()):
        print(f"{file}: {doubled} questions have more than one answer; {benchmark.doubled}")
    return [(q, texts[benchmark.key(q)]) for q in questions]


def run_task(args: argparse.Namespace) -> dict:
    """Ask the model or read its answers, write the upload file, and return the figures."""
    benchmark, entries, file = BENCHMARKS[args.task], [], args.predictions or args.out
    questions, unique = benchmark.read(args) if args.questions else [], benchmark.doubled == "refused"
    if args.questions and not questions:
        raise UserError(f"{args.questions[0]} has no questions")
    if args.model:
        entries = answer_all(args, questions[:args.limit], unique, benchmark.message)
    elif args.predictions:
        entries = read_lines(args.predictions, "question_id", "text", unique=unique)
    pairs = pair_answers(benchmark, questions, entries, file)[:args.limit]
    if args.upload:
        benchmark.upload(args.upload, pairs)
    figures = {"missing": sum(not texts for _, texts in pairs), "questions": len(pairs)}
    if args.reviews if args.task == "llavabench" else all("truth" in q for q in questions):
        figures |= benchmark.score(pairs, args)
    return figures


def print_figures(figures: dict) -> None:
    """Print single figures as one row, and figures that are dicts as a table below."""
    def cell(value) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"
        return "-" if value is None else str(value)

    single = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    print("  ".join(f"{name} {cell(value)}" for name, value in single.items()))
    tables = {name: value for name, value in figures.items() if isinstance(value, dict)}
    if "categories" in tables:
        tables = {name: {"circular": value} for name, value in tables["categories"].items()}
    columns = list(next(iter(tables.values()), {}))
    if columns:
        width = max(map(len, tables))
        print(" " * width, *(f"{column:>9}" for column in columns))
    for name, row in tables.items():
        print(f"{name:{width}}", *(f"{cell(row[column]):>9}" for column in columns))


# ---------------------------------------------------------------------------------------------
# 8. Cost. A multiply-add is two FLOPs; norms, softmax and activations are left out (below 0.1%)


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """The number of parameters of each part: vision_tower, projector, language_model, with AnyRes image_newline."""
    with torch.device("meta"):
        model = Llava(config)
    parts = Counter()
    for name, p in model.named_parameters():
        parts[name.split(".")[0]] += p.numel()
    return dict(parts)


def language_flops(text: TextConfig, tokens: int, logits: int = 1, causal: bool = True) -> int:
    """FLOPs of one row of `tokens` through the decoder, with the logits of `logits` positions. `causal` counts
    the pairs of query and key inside mask and window; without it all pairs, as papers and torch's counter do."""
    C, D, H, K = text.hidden_size, text.head_dim, text.num_attention_heads, text.num_key_value_heads
    window = min(tokens, text.sliding_window or tokens)
    pairs = window * (window + 1) // 2 + (tokens - window) * window if causal else tokens**2
    linear = 2 * C * H * D + 2 * C * K * D + 3 * C * text.intermediate_size
    layer = 2 * tokens * linear + 4 * H * D * pairs
    return text.num_hidden_layers * layer + 2 * logits * C * text.vocab_size


def vision_flops(vision: VisionConfig, layers: int) -> int:
    """FLOPs of one tile through the patch embedding and `layers` layers of the tower (LLaVA: all but the last)."""
    C, patches = vision.hidden_size, vision.side**2
    linear, tokens = 4 * C * C + 2 * C * vision.intermediate_size, 1 + patches
    return 2 * patches * 3 * vision.patch_size**2 * C + layers * (2 * tokens * linear + 4 * C * tokens**2)


def projector_flops(config: LlavaConfig, patches: int) -> int:
    C = config.text.hidden_size
    second = C if config.projector == "mlp2x_gelu" else 0
    return 2 * patches * C * (config.vision.hidden_size + second)


def cache_bytes(text: TextConfig, tokens: int, bytes_per_number: int = 2) -> int:
    """Bytes of the keys and values of one row; they do not grow past the sliding window."""
    slots = min(tokens, text.sliding_window or tokens)
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * slots * bytes_per_number


def counted_flops(config: LlavaConfig, tokens: int) -> tuple[int, int]:
    """FLOPs that torch counts on the meta device for the features of one tile, and for `tokens` in the language
    model; without sliding window, because the windowed kernel computes padded blocks."""
    config, S = replace(config, text=replace(config.text, sliding_window=None)), config.vision.image_size
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = Llava(config)
        model.projector(model.vision_tower(torch.empty(1, 3, S, S), config.vision_feature_layer)[:, 1:])
        tile = counter.get_total_flops()
        hidden = model.language_model(torch.empty(1, tokens, config.text.hidden_size))
        model.language_model.lm_head(hidden[:, -1:])
    return tile, counter.get_total_flops() - tile


def costs(config: LlavaConfig, text_tokens: int) -> dict[str, float]:
    """Parameters, and the cost of the prefill of one image and `text_tokens`. "TFLOPs" by the formulas and as torch
    counts include all pairs of tokens, "TFLOPs, causal" only the needed ones."""
    side, tiles = config.vision.image_size, 1
    if config.image_mode == "anyres":        # a square image of twice the tower's size
        side *= 2
        tiles += math.prod(choose_grid((side, side), config.grids)) // config.vision.image_size**2
    tokens, parts = count_image_tokens(config, (side, side)) + text_tokens, count_parameters(config)
    layers = config.vision.num_hidden_layers + 1 + config.vision_feature_layer
    flops = {"vision_tower": tiles * vision_flops(config.vision, layers),
             "projector": projector_flops(config, tiles * config.vision.side**2),
             "language_model": language_flops(config.text, tokens, causal=False)}
    tile, language = counted_flops(config, tokens)
    masked = flops["language_model"] - language_flops(config.text, tokens)
    total, size = sum(flops.values()), sum(parts.values())
    return {**{f"parameters, {part}": n for part, n in parts.items()},
            "parameters": size, "GiB in 16 bits": 2 * size / 2**30, "tokens, image and text": tokens,
            **{f"TFLOPs, {part}": n / 1e12 for part, n in flops.items()}, "TFLOPs": total / 1e12,
            "TFLOPs, as torch counts": (tiles * tile + language) / 1e12, "TFLOPs, causal": (total - masked) / 1e12,
            "MiB of keys and values": cache_bytes(config.text, tokens) / 2**20}


LLAMA_7B = TextConfig("llama", intermediate_size=11008, num_key_value_heads=32, rope_theta=1e4,
                      max_position_embeddings=4096)
LLAMA_13B = replace(LLAMA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                    num_attention_heads=40, num_key_value_heads=40)
PUBLISHED = {
    "LLaVA on Mistral-7B": LlavaConfig(),
    "LLaVA-1.5-7B": LlavaConfig(text=LLAMA_7B),
    "LLaVA-1.5-13B": LlavaConfig(text=LLAMA_13B),
    "LLaVA-13B, 224 px": LlavaConfig(VisionConfig(image_size=224), LLAMA_13B, projector="linear"),
}
TABLE_II = {                                 # PruMerge: TFLOPs in FP16, pruned, in INT4, pruned
    "Vicuna-7B": (LLAMA_7B, (9.3, 0.91, 2.3, 0.28)),
    "Vicuna-13B": (LLAMA_13B, (18.2, 1.80, 4.6, 0.45)),
}


def print_costs(configs: dict[str, LlavaConfig], text_tokens: int) -> None:
    columns = [costs(config, text_tokens) for config in configs.values()]
    print(" " * 26, *(f"{name:>19}" for name in configs))
    for key, first in columns[0].items():
        form = "19," if isinstance(first, int) else "19.5g"
        print(f"{key:26}", *(format(column[key], form) for column in columns))


def print_published() -> None:
    """Two published claims beside the formulas: PruMerge's saving and the size of Mistral."""
    print("\nPruMerge's Table II, TFLOPs of the language model, published and (by formula): 700 tokens, pruned to 70, "
          "both in INT4.\nIts INT4 FLOPs are FP16 / 4: the operations are the same, the bytes are a quarter. Below: "
          "30 text tokens and 576 image tokens, pruned to 40.")
    for name, (text, published) in TABLE_II.items():
        config = LlavaConfig(text=text)
        full, pruned, real = (language_flops(text, n, causal=False) / 1e12 for n in (700, 70, 606))
        cells = []
        for there, here in zip(published, (full, pruned, full / 4, pruned / 4)):
            cells.append(f"{there:5} ({here:.3g})")
            if abs(here / there - 1) > 0.05:
                cells[-1] += " <- looks wrong"
        print(f"{name:10} 700 -> 70 ", *cells)
        before, after = ((vision_flops(config.vision, 23) + projector_flops(config, n)) / 1e12 for n in (576, 40))
        print(f"{name:10} 606 -> 70  {real:5.3g} -> {pruned:.3g}, {real / pruned:.1f} times fewer; with "
              f"the tower and the projector {(real + before) / (pruned + after):.1f}")
    sizes = [count_parameters(config) for config in PUBLISHED.values()]
    mistral, small, large, _ = (parts["language_model"] for parts in sizes)
    whole = 1 - sum(sizes[0].values()) / sum(sizes[3].values())
    print(f'\n"46 percent smaller" is 1 - 7/13, from the names: Mistral-7B has {1 - mistral / large:.1%} fewer '
          f"parameters than LLaMA-13B,\nthe LLaVA on it {whole:.1%} fewer than LLaVA-13B; Mistral-7B has "
          f"{mistral / small - 1:.1%} more than LLaMA-7B.")


# ---------------------------------------------------------------------------------------------
# 9. The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--scienceqa", metavar="DIR", help="folder with problems.json")
    mode.add_argument("--task", choices=BENCHMARKS, help="one of the other benchmarks")
    mode.add_argument("--cost", nargs="?", type=int, const=30, metavar="N",
                      help="size, FLOPs and memory for an image and N tokens (%(const)s): of --model, or as published")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--model", metavar="ID", help="folder, run or hub id of the LLaVA to ask")
    who.add_argument("--predictions", metavar="FILE", help="answers to score, as --out writes them")
    who.add_argument("--compare", nargs=2, metavar=("A", "B"), help="ScienceQA: answers to score side by side")
    add("--out", type=Path, metavar="FILE", help="append the answers, one JSON line each; an existing file is continued")
    add("--json", type=Path, metavar="FILE", help="write the figures, not rounded for print")
    add("--blank", action="store_true", help="replace every image by white: what is still right does not need it")
    add("--batch-size", type=int, default=16, metavar="N", help="questions at once (%(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    add("--max-new-tokens", type=int, metavar="N",
        help="default: ScienceQA 512, MMBench and LLaVA-Bench 1024, others 128")
    add = parser.add_argument_group("ScienceQA").add_argument
    add("--split", default="test", help="default: %(default)s")
    add("--pictures", default="any", choices=("any", "only", "none"),
        help="questions with or without images (default: %(default)s)")
    add("--wording", default="qcm", choices=("qcm", "letter"),
        help="prompt as in training on ScienceQA, or as LLaVA-1.5 is asked (default: %(default)s)")
    add("--answer", default="generate", choices=("generate", "options"),
        help="generated text, or the most probable option (default: %(default)s)")
    add = parser.add_argument_group("the other benchmarks").add_argument
    add("--questions", nargs="+", metavar="FILE", help="question files; the README lists the files of each task")
    add("--annotations", nargs="+", metavar="FILE", help="files or folder with the correct answers")
    add("--images", type=Path, metavar="DIR", help="folder of the images")
    add("--upload", type=Path, metavar="FILE", help="write the file that the server of VQAv2 or MMBench takes")
    add("--reviews", nargs="+", type=Path, metavar="FILE",
        help="LLaVA-Bench: reviews to score; with --judge-model one file that is continued")
    add("--judge-model", metavar="NAME", help="LLaVA-Bench: the model that rates the answers, such as gpt-4-0314")
    add("--judge", metavar="URL", help="its OpenAI-compatible endpoint (default: $OPENAI_BASE_URL)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if mistake := find_misuse(args):
        parser.error(mistake)
    if args.max_new_tokens is None:
        args.max_new_tokens = BENCHMARKS[args.task].max_new_tokens if args.task else 512
    return args


def find_misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with a combination of flags, if anything is."""
    if args.scienceqa and not (args.model or args.predictions or args.compare):
        return "--scienceqa needs --model, --predictions or --compare"
    if not args.task:
        return "--upload, --reviews and --judge-model need --task" if args.upload or args.reviews or args.judge_model else None
    reviews_only = args.reviews and not args.judge_model
    if args.compare or args.answer == "options" or args.wording == "letter":
        return "--compare, --answer and --wording are for --scienceqa"
    if (args.reviews or args.judge_model) and args.task != "llavabench":
        return "--reviews and --judge-model are for --task llavabench"
    if args.judge_model and len(args.reviews or ()) != 1:
        return "--judge-model needs exactly one --reviews FILE"
    if args.judge_model and len(args.annotations or ()) != 2:
        return "--judge-model needs --annotations CONTEXT REFERENCE"
    if not reviews_only and not (args.questions and (args.model or args.predictions)):
        return f"--task {args.task} needs --questions, and --model or --predictions"
    if args.model and not args.images and args.task != "mmbench":
        return f"--task {args.task} with --model needs --images"
    if args.upload and not BENCHMARKS[args.task].upload:
        return "--upload is for --task vqav2 and --task mmbench"
    if args.predictions and not (args.annotations or args.upload or args.reviews or args.task == "mmbench"):
        return f"--task {args.task} needs {'--reviews' if args.task == 'llavabench' else '--annotations'} to score answers"
    return None


def run_scienceqa(args: argparse.Namespace) -> dict | None:
    """Print and return ScienceQA's table; print the interval of its average."""
    problems = read_scienceqa(args.scienceqa, args.split, args.pictures, args.limit, args.wording)
    if not problems:
        raise UserError(f"{args.scienceqa}: no question of split {args.split!r} is left to ask")
    if args.compare:
        return compare(problems, args.compare)
    if args.predictions:
        texts = read_answers(args.predictions)
    else:
        texts = {str(entry["question_id"]): entry["text"] for entry in answer_all(args, problems)}
    table, correct = score(problems, texts), grade(problems, texts)
    print_table({args.split: table})
    print("Avg {:.2f}, and in 95% of 10,000 resampled tests from {:.2f} to {:.2f}".format(*interval(correct)))
    with_image = [right for p, right in zip(problems, correct) if p["image"]]
    if args.wording == "letter" and with_image:
        print(f"with image: {100 * sum(with_image) / len(with_image):.2f} ({sum(with_image):,} of "
              f"{len(with_image):,}), which LLaVA-1.5 publishes as its ScienceQA accuracy")
    return table


def main() -> None:
    args = parse_args()
    if args.cost is not None:
        if args.model:
            print_costs({args.model: LlavaConfig(**open_checkpoint(args.model, weights=False)[0])}, args.cost)
        else:
            print_costs(PUBLISHED, args.cost)
            print_published()
        return
    figures = run_task(args) if args.task else run_scienceqa(args)
    if args.task:
        print_figures(figures)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    command_line(main)
