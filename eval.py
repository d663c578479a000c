"""Scores of a LLaVA, or of files of answers, on ScienceQA and six other benchmarks; what a LLaVA costs.

    python eval.py --scienceqa data/ScienceQA --split test --model runs/stage2 --out answers.jsonl
    python eval.py --scienceqa data/ScienceQA --split test --compare a.jsonl b.jsonl
    python eval.py --task pope --questions FILE --annotations FILE FILE FILE --predictions answers.jsonl
    python eval.py --cost

Prompts, the reading of answers and the figures follow the scripts behind LLaVA's published figures; only the
instructions to LLaVA-Bench's judge are worded anew. ScienceQA's folder is as published (Lu et al. 2022).
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
import threading
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from html import escape
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava import (IGNORE, Llava, LlavaConfig, Processor, TextConfig, UserError, VisionConfig,
                   add_model_flags, atomic_write, check_outputs, command_line, config_overrides,
                   count_image_tokens, count_tiles, load_model, number, open_checkpoints, open_image,
                   read_json, require, write_json)

Args = argparse.Namespace
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
# 1. ScienceQA: prompts, records, scores


def read_scienceqa(folder, split: str, pictures: str = "any", wording: str = "qcm") -> list[dict]:
    """The problems of a split in published order, as questions of section 3."""
    problems_file, splits_file = Path(folder, "problems.json"), Path(folder, "pid_splits.json")
    problems, splits = (require(read_json(file), file) for file in (problems_file, splits_file))
    if not isinstance(splits.get(split), list):
        raise UserError(f"{splits_file} has no split {split!r} with a list of ids, only {', '.join(splits)}")
    if repeated := [i for i, n in Counter(map(str, splits[split])).items() if n > 1]:
        raise UserError(f"{splits_file}: split {split!r} has question {repeated[0]} twice")
    selected = []
    for i in splits[split]:
        if not isinstance(i, str) or i not in problems:
            raise UserError(f"{problems_file} lacks question {i} of split {split!r}")
        p = problems[i]
        check_problem(i, p, f"{problems_file}, question {i}")
        if pictures == "only" and not p["image"] or pictures == "none" and p["image"]:
            continue
        prompt = question(p, wording)
        file = Path(folder, "images", p["split"], i, p["image"]) if p["image"] else None
        selected.append(p | {"id": i, "question_id": i, "prompt": prompt, "message": prompt, "file": file})
    return selected


def check_problem(i: str, problem, where: str) -> None:
    """Raise UserError unless a problem has ScienceQA's fields; id, split and image must be file names."""
    types = {"choices": list, "answer": int, "image": str | None} | dict.fromkeys(
        ("question", "hint", "split", "grade", "subject", "lecture", "solution"), str)
    for name, type_ in types.items():
        if not isinstance(problem, dict) or name not in problem or not isinstance(problem[name], type_):
            raise UserError(f"{where}: {name} is missing or of the wrong type")
    if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
        raise UserError(f"{where}: answer {problem['answer']} is not one of at most {len(LETTERS)} choices")
    if not re.fullmatch(r"grade([1-9]|1[0-2])", problem["grade"]):
        raise UserError(f"{where}: grade {problem['grade']!r} is not grade1 to grade12")
    for name in (i, problem["split"], problem["image"]):
        if name is not None and (Path(name).name != name or name in ("", "..")):
            raise UserError(f"{where}: {name!r} is not the name of a file or folder in images")


def question(problem: dict, wording: str = "qcm") -> str:
    """The prompt of a problem: "qcm" (question, context, options) as in training on ScienceQA, "letter" as in
    LLaVA-1.5's evaluation. As in LLaVA's scripts, two spaces become one, and "qcm" drops "Question: "."""
    if wording == "letter":
        image = "<image>\n" if problem["image"] else ""
        hint = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        options = "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, problem["choices"]))
        return f"{image}{hint}{problem['question']}{options}{LETTER_SUFFIX}".replace("  ", " ")
    options = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, problem["choices"]))
    text = (f"Question: {problem['question']}\nContext: {problem['hint'].strip() or 'N/A'}\n"
            f"Options: {options}\n").replace("  ", " ").strip().replace("Question: ", "")
    return text + "\n<image>" if problem["image"] else text


def target_text(problem: dict) -> str:
    """The target text of a training record: lecture, explanation, answer (LEA). As in LLaVA's script,
    "Answer: " is put before it and then dropped, wherever it occurs."""
    text = f"Answer: {problem['lecture']} {problem['solution']} The answer is {LETTERS[problem['answer']]}."
    return text.replace("  ", " ").strip().replace("Answer: ", "")


def to_record(problem: dict) -> dict:
    """A problem as a training record of LLaVA; image paths are relative to the split's folder."""
    image = {"image": f"{problem['id']}/{problem['image']}"} if problem["image"] else {}
    return {"id": problem["id"], **image, "conversations": [
        {"from": "human", "value": question(problem)}, {"from": "gpt", "value": target_text(problem)}]}


def parse_choice(text: str, choices: int) -> int | None:
    """The index of the option that an answer names, as in LLaVA's eval_science_qa.py: a letter alone or
    before ". ", else X if "The answer is X" and one more character of the line (the unescaped dot of its
    pattern) occur once. None if there is none, -1 for a letter that is not an option."""
    found = re.findall(r"The answer is ([A-Z]).", text)
    if re.fullmatch(r"[A-E](\. .*)?", text, re.DOTALL):
        found = [text[0]]
    if len(found) != 1:
        return None
    index = LETTERS.find(found[0])
    return index if index < choices else -1


def are_correct(problems: list[dict], texts: dict[str, str]) -> list[bool]:
    """Whether each problem is answered correctly; missing and unreadable answers are wrong."""
    return [p["id"] in texts and parse_choice(texts[p["id"]], len(p["choices"])) == p["answer"]
            for p in problems]


def score(problems: list[dict], texts: dict[str, str]) -> dict[str, float]:
    """Percent correct in each column, with two decimals, and how many questions there are. Answers that are
    missing or "unread" (unreadable) count as wrong; "elsewhere" counts answers to other questions."""
    table = {}
    for column, belongs in COLUMNS.items():
        correct = are_correct([p for p in problems if belongs(p)], texts)
        table[column] = round(percent(correct), 2) if correct else None
    answered = [p for p in problems if p["id"] in texts]
    return table | {"questions": len(problems), "missing": len(problems) - len(answered),
                    "unread": sum(parse_choice(texts[p["id"]], len(p["choices"])) is None for p in answered),
                    "elsewhere": len(texts) - len(answered)}


def percent(scores: list) -> float | None:
    """The mean of scores from 0 to 1, in percent."""
    return 100 * sum(scores) / len(scores) if scores else None


def print_columns(columns, rows: dict[str, list], form: str = ".2f") -> None:
    """Print the names of the columns and an aligned line for each named row; None is printed as "-"."""
    def cell(x) -> str:
        if x is None:
            return "-"
        return f"{x:,}" if isinstance(x, int) else format(x, form)

    lines = {"": list(columns)} | {name: list(map(cell, row)) for name, row in rows.items()}
    name_width, width = max(map(len, lines)), max(6, *(len(text) for line in lines.values() for text in line))
    for name, line in lines.items():
        print(f"{name:{name_width}}", *(f"{text:>{width}}" for text in line))


def print_table(tables: dict[str, dict]) -> None:
    """Print a row for each named table of `score`, then the number of questions behind each."""
    print_columns(COLUMNS, {name: [table[column] for column in COLUMNS] for name, table in tables.items()})
    for name, table in tables.items():
        print(f"{name}: {table['questions']} questions, {table['unread']} answers could not be read, "
              f"{table['missing']} missing, {table['elsewhere']} to other questions")


def interval(values) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval of values [S trainings, N questions], in percent: each of 10,000 draws
    takes S trainings and N questions with replacement and averages over both. For a paired difference,
    values[s, n] is the difference between two trainings with seed s on question n. The bootstrap shrinks
    the spread between trainings by the factor sqrt((S - 1) / S), for S = 1 to 0."""
    values, draws = np.asarray(values, int), 10000
    S, N = values.shape
    columns, counts = np.unique(values, axis=1, return_counts=True)       # [S, U], [U]: fewer to draw from
    rng = np.random.default_rng(0)
    trainings = rng.multinomial(S, np.full(S, 1 / S), draws)              # [draws, S]
    questions = rng.multinomial(N, counts / N, draws)                     # [draws, U]
    means = ((trainings @ columns) * questions).sum(1) * 100 / (S * N)
    low, high = np.percentile(means, (2.5, 97.5))
    return 100 * float(values.mean()), float(low), float(high)


def compare(problems: list[dict], files: list[str]) -> dict[str, dict]:
    """Print and return the tables of two files of answers; print by how many points the first leads."""
    a, b = map(read_answers, files)
    if alone := sorted(a.keys() ^ b.keys()):
        file = files[0] if alone[0] in a else files[1]
        raise UserError(f"{len(alone)} questions are answered in one file only, such as {alone[0]} in {file}")
    tables = {file: score(problems, texts) for file, texts in zip(files, (a, b))}
    print_table(tables)
    lead = []
    for belongs in COLUMNS.values():
        group = [p for p in problems if belongs(p)]
        first, second = (np.array(are_correct(group, texts), int) for texts in (a, b))
        lead.append(interval([first - second]) if group else (None, None, None))
    print("\nPoints by which the first file leads, and its 95% interval over 10,000 resampled tests:")
    print_columns(COLUMNS, dict(zip(("lead", "from", "to"), zip(*lead))), "+.2f")
    return tables


# ---------------------------------------------------------------------------------------------
# 2. Files of JSON lines: questions, answers, labels, reviews


def read_lines(file, *needed: str, key=None, content: bytes | None = None) -> dict:
    """{key(object): JSON object} of the lines of a file, or of its `content`; without `key` by line number.
    UserError for a line without the fields `needed`, or whose key is in an earlier line."""
    try:
        content = Path(file).read_bytes() if content is None else content
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
    entries = {}
    for n, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            strings = [entry.get(name, "") for name in ("text", "prompt", "image", "category")]
            if any(name not in entry for name in needed) or not all(isinstance(x, str) for x in strings):
                raise ValueError
            "".join(strings).encode()        # UnicodeEncodeError, a ValueError, for a lone surrogate
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"{file}, line {n}: not a JSON object with {', '.join(needed)}, and text, "
                            "prompt, image and category as strings") from None
        unique = key(entry) if key else n
        if unique in entries:
            raise UserError(f"{file}, line {n}: question {by_id(entry)} was answered before")
        entries[unique] = entry
    return entries


def continue_lines(file: Path, *needed: str, key) -> dict:
    """{key(object): object} of a file to which more will be appended; {} if it is missing. A last line that
    an interrupt cut short is removed from the file; UserError if it is not the beginning of one of ours."""
    content = file.read_bytes() if file.exists() else b""
    lines, newline, last = content.rpartition(b"\n")
    complete, start = lines + newline, b'{"question_id"'     # how each line of answers and reviews starts
    try:
        json.loads(last)
        complete = content + b"\n"           # only the newline is missing
    except (ValueError, RecursionError):     # cut short; or empty, because the file ends with a newline
        if not last.startswith(start) and not start.startswith(last):
            raise UserError(f"{file} holds something else: name another --out or --reviews") from None
    entries = read_lines(file, *needed, key=key, content=complete)
    if complete != content:
        with atomic_write(file) as temporary:
            temporary.write_bytes(complete)
    return entries


def by_id(entry: dict) -> str:
    return str(entry["question_id"])


def by_prompt(entry: dict) -> tuple[str, str | None]:
    """The key of a stored answer; in MME and TextVQA several questions share an id."""
    return by_id(entry), entry.get("prompt")


def read_answers(file) -> dict[str, str]:
    """question_id -> text of a file of answers, in which no question may occur twice."""
    entries = read_lines(file, "question_id", "text", key=by_id)
    return {i: entry["text"] for i, entry in entries.items()}


def append(file: Path, entry: dict) -> None:
    try:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OSError(f"{file} cannot be written ({error.strerror}): after a remedy the same command "
                      "continues it") from None


def write_lines(file: Path, entries: list[dict]) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


# ---------------------------------------------------------------------------------------------
# 3. Asking a model. A question is a dict with "question_id"; "prompt", as in the file of answers; "message",
#    the text that the model gets, with <image>; "image", its name; and "file", its path. Where "file" is
#    None, "image" is the image itself in base64, or None


def generate_answers(model: Llava, processor: Processor, questions: list[dict], batch_size: int = 16,
                     max_new_tokens: int = 1024, blank: bool = False, options: bool = False,
                     ) -> Iterator[tuple[dict, str]]:
    """Each question and the model's greedy answer; questions with images first, then by length: the rows of a
    batch have similar lengths, and a batch that does not fit in memory fails at once. `blank` replaces every
    image by white (control); `options` takes the most probable option instead of generating text."""
    questions = sorted(questions, key=lambda q: (bool(q["image"]), len(q["message"])), reverse=True)
    batches = [questions[start:start + batch_size] for start in range(0, len(questions), batch_size)]
    for batch in tqdm(batches, desc="answering", unit="batch"):
        inputs = []
        for p in batch:
            images = [load_image(p, blank)] if p["image"] else []
            inputs.append(processor([{"role": "user", "content": p["message"]}], images))
        if options:
            texts = score_options(model, processor, batch, inputs)
        else:
            answers = model.generate_batch(**collate(inputs), eos_token_id=processor.eos,
                                           max_new_tokens=max_new_tokens)
            texts = [processor.decode(ids) for ids in answers]
        yield from zip(batch, texts)


def load_image(q: dict, blank: bool) -> Image.Image:
    """The image of a question, or with `blank` a white one of its size."""
    try:
        image = open_image(q["file"] or io.BytesIO(base64.b64decode(q["image"])))
    except (ValueError, OSError) as error:
        raise OSError(f"the image of question {by_id(q)}: {error}") from None
    return Image.new("RGB", image.size, "white") if blank else image


def collate(inputs: list[dict], ending=()) -> dict:
    """Outputs of the processor as one right-padded batch; the token ids `ending` are appended to each row."""
    rows = [torch.cat((i["input_ids"][0], torch.tensor(ending, dtype=torch.int64))) for i in inputs]
    batch = {"input_ids": pad_sequence(rows, batch_first=True),
             "images": [image for i in inputs for image in i["images"]],
             "image_sizes": [size for i in inputs for size in i["image_sizes"]],
             "attention_mask": pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True)}
    if "labels" in inputs[0]:
        batch["labels"] = pad_sequence([i["labels"][0] for i in inputs], True, IGNORE)
    return batch


@torch.inference_mode()
def score_options(model: Llava, processor: Processor, questions: list[dict], inputs: list[dict]) -> list[str]:
    """For each question "The answer is X" with the most probable option X: these texts differ in their last
    token only, so one prefill gives the logits of all options, in float32, because close ones are equal in
    bfloat16. Not comparable with the accuracy of generated answers, which reason before they choose."""
    ids = [processor.encode(f"The answer is {letter}") for letter in LETTERS]
    if any(i[:-1] != ids[0][:-1] for i in ids):
        raise UserError("the tokenizer has no token for each of the letters A to E: use --answer generate")
    x, lengths, _ = model.splice(**collate(inputs, ending=ids[0][:-1]))
    hidden = model.language_model(x, select=(torch.arange(len(x)), lengths - 1))             # [B, C]
    head, letter_ids = model.language_model.lm_head, [i[-1] for i in ids]
    if isinstance(head, torch.nn.Linear):
        logits = hidden.float() @ head.weight[letter_ids].float().T                          # [B, 5]
    else:                                    # quantized
        logits = head(hidden.float())[:, letter_ids]
    best = [row[:len(p["choices"])].argmax() for p, row in zip(questions, logits)]
    return [f"The answer is {LETTERS[option]}." for option in best]


def fingerprint(model: Llava, processor: Processor) -> str:
    """Eight hex digits of a hash of config, tokenizer and the first 16 numbers of each tensor."""
    tensors = [*model.parameters(), *model.buffers()]
    numbers = torch.cat([tensor.detach().flatten()[:16].float() for tensor in tensors]).cpu().numpy()
    text = repr(model.config) + processor.tokenizer_json
    return hashlib.sha256(text.encode() + numbers.tobytes()).hexdigest()[:8]


def resume(file: Path, questions: list[dict], settings: dict) -> dict[tuple, dict]:
    """{by_prompt: answer} of `file`. UserError if one was made with another prompt or other settings."""
    answers = continue_lines(file, "question_id", "text", key=by_prompt)
    ids, keys = set(map(by_id, questions)), set(map(by_prompt, questions))
    for key, entry in answers.items():
        made_with = entry.get("metadata")
        if isinstance(made_with, dict):
            mistakes = [f"another {name}" for name in settings if made_with.get(name) != settings[name]]
        else:
            mistakes = ["unknown settings"]
        if by_id(entry) in ids and key not in keys:
            mistakes.append("another prompt")
        if mistakes:
            raise UserError(f"{file}: the answer to question {by_id(entry)} was made with {mistakes[0]}: "
                            "name another --out")
    return answers


def answer_all(args: Args, questions: list[dict]) -> list[dict]:
    """The answers to all questions in their order, then those in args.out to other questions. A question that
    args.out does not answer is asked, and its answer appended there; at the end the file gets this order."""
    if args.out and not args.out.parent.is_dir():
        raise OSError(f"{args.out} cannot be written: there is no such folder")
    for p in questions:
        if p["file"] and not p["file"].exists():
            raise OSError(f"question {by_id(p)}: there is no image {p['file']}")
        if p["message"].count("<image>") != (1 if p["image"] else 0):
            raise UserError(f"question {by_id(p)}: its text has another number of <image> than it has images")
    model, processor = load_model(args)      # sets args.dtype
    flags = ("wording", "dtype", "quantize", "answer", "max_new_tokens", "blank")
    settings = {name: getattr(args, name) for name in flags}
    settings |= {name: getattr(model.config, name) for name in ("image_mode", "prune", "keep_tokens")}
    settings |= {"task": args.task or "scienceqa", "model": fingerprint(model, processor)}
    answers = resume(args.out, questions, settings) if args.out else {}
    left = [p for p in questions if by_prompt(p) not in answers]
    for p, text in generate_answers(model, processor, left, args.batch_size, args.max_new_tokens, args.blank,
                                    args.answer == "options"):
        answers[by_prompt(p)] = {"question_id": p["question_id"], "prompt": p["prompt"], "text": text,
                                 "model_id": args.model, "metadata": settings}
        if args.out:
            append(args.out, answers[by_prompt(p)])
    entries = [answers.pop(by_prompt(p)) for p in questions] + list(answers.values())
    if args.out:
        write_lines(args.out, entries)
    return entries


# ---------------------------------------------------------------------------------------------
# 4. Short answers, as VQAv2 and TextVQA compare them

CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in    # one apostrophe is missing: dont -> don't
                """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've""".split()
                for i, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"     # the other way round in the official list
NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                   "0 0 1 2 3 4 5 6 7 8 9 10".split()))


@lru_cache(2**17)
def normalize_vqa(text: str) -> str:
    """A short answer as VQAv2's evaluator (vqaEval.py) compares it. A mark that is somewhere beside a space
    is removed everywhere, as are all marks if a comma stands between digits; other marks become spaces. At
    most 32 periods are removed, because the evaluator passes re.UNICODE, 32, as the count."""
    remove_all, result = re.search(r"\d,\d", text) is not None, text
    for mark in ";/[]\"{}()=+\\_-><@`,?!":
        removed = remove_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if removed else " ")
    words = re.sub(r"\.(?!\d)", "", result, count=32).lower().split()
    words = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ("a", "an", "the")]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


@lru_cache(2**17)
def normalize_m4c(text: str) -> str:
    """A short answer as TextVQA's m4c_evaluator.py compares it and as LLaVA sends it to VQAv2's server."""
    return normalize_vqa(strip_lines(text.lower().replace(",", "").replace("?", "").replace("'s", " 's")))


def strip_lines(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(text: str, humans: list[dict]) -> float:
    """The accuracy of an answer: min(1, number of other humans who gave it / 3), averaged over the humans. As
    in the official code, the others are the records that differ, so an id must tell equal answers apart."""
    equal = [human for human in humans if human["answer"] == text]
    return sum(min(1, sum(other != human for other in equal) / 3) for human in humans) / len(humans)


# ---------------------------------------------------------------------------------------------
# 5. The benchmarks. A question to score has the correct answer or annotation in "truth", its answers in
#    "texts", in the order of their file, and the last of them, or None, in "text"


@contextmanager
def expect_format(file, what: str):
    """Raise UserError, saying that `file` is not `what`, where a field is missing or has another type."""
    try:
        yield
    except UserError:                        # it is a ValueError, too
        raise
    except (KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(f"{file} is not {what} ({type(error).__name__}: {error})") from None


def read_questions(file) -> list[dict]:
    """The questions of one of LLaVA's question files, one JSON object a line. Their "text" becomes "prompt",
    because "text" will be the answer; of other keys only "category" is used."""
    questions = read_lines(file, "question_id", "image", "text").values()
    return [{"question_id": q["question_id"], "image": q["image"], "prompt": q["text"],
             "category": q.get("category")} for q in questions]


def read_vqav2(file) -> list[dict]:
    """The questions of one of LLaVA's files, or of an official one (.json), which is one JSON object."""
    if Path(file).suffix != ".json":
        return read_questions(file)
    with expect_format(file, "a question file of VQAv2"):
        raw = read_json(file)
        split = raw["data_subtype"].replace("test-dev", "test")
        return [{"question_id": q["question_id"], "image": f"COCO_{split}_{q['image_id']:012}.jpg",
                 "prompt": q["question"] + SHORT_SUFFIX} for q in raw["questions"]]


def read_humans(args: Args, questions: list[dict]) -> dict:
    """key -> (ten human answers, answer type); key: VQAv2's question id; TextVQA's (image id, question)."""
    textvqa, file, truth = args.task == "textvqa", args.annotations[0], {}
    with expect_format(file, f"the annotation file of {args.task}"):
        for a in read_json(file)["data" if textvqa else "annotations"]:
            key, records = str(a["question_id"]), a["answers"]
            if textvqa:
                key = a["image_id"], a["question"].lower()
                records = [{"answer": text, "id": i} for i, text in enumerate(records)]  # see vqa_accuracy
            if len(records) != 10:
                raise UserError(f"{file}: question {key} has {len(records)} human answers, not ten")
            humans = [record | {"answer": strip_lines(record["answer"])} for record in records]
            truth[key] = humans, a.get("answer_type")
    return truth


def score_vqav2(questions: list[dict]) -> dict:
    """Percent by answer type, rounded to two decimals as officially; a missing answer is ""."""
    accuracies = {"overall": [], "yes/no": [], "number": [], "other": []}
    for q in tqdm(questions, desc="scoring", disable=len(questions) < 10**4):
        (humans, answer_type), text = q["truth"], normalize_m4c(q["text"] or "")
        if len({human["answer"] for human in humans}) > 1:       # ten equal answers are compared as they are
            text = normalize_vqa(text)
            humans = [human | {"answer": normalize_vqa(human["answer"])} for human in humans]
        accuracies["overall"].append(vqa_accuracy(text, humans))
        accuracies.setdefault(answer_type, []).append(accuracies["overall"][-1])
    return {name: round(percent(found), 2) if found else None for name, found in accuracies.items()}


def write_vqav2_upload(file: Path, questions: list[dict]) -> None:
    write_json(file, [{"question_id": q["question_id"], "answer": normalize_m4c(q["text"] or "")}
                      for q in questions])


def textvqa_key(entry: dict) -> tuple[str, str]:
    """Image id (LLaVA's question_id) and question in lower case, from LLaVA's four forms of a prompt."""
    prompt, lines = entry["prompt"], entry["prompt"].split("\n")
    old_form = re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)
    if prompt.startswith("OCR tokens: ") and old_form:
        text = old_form[1]
    elif len(lines) == 3 and "Reference OCR token: " in prompt:
        text = lines[1] if prompt.startswith("Reference OCR token:") else lines[0]
    elif len(lines) == 2:
        text = lines[0]
    else:
        raise UserError(f"the prompt of question {by_id(entry)} has none of TextVQA's four forms")
    return by_id(entry), text.lower()


def score_textvqa(questions: list[dict]) -> dict:
    """The mean over the answers that exist; a question answered twice counts twice, as officially."""
    accuracies = []
    for q in questions:
        humans = [human | {"answer": normalize_m4c(human["answer"])} for human in q["truth"][0]]
        accuracies += [vqa_accuracy(normalize_m4c(text), humans) for text in q["texts"]]
    return {"accuracy": percent(accuracies), "answers": len(accuracies)}


def read_pope(args: Args, questions: list[dict]) -> dict:
    """Question id -> label. The n-th question of a set belongs to the n-th line of that set's label file."""
    truth = {}
    for file in args.annotations:
        labels = read_lines(file, "image", "text", "label").values()
        name = Path(file).stem.removeprefix("coco_pope_")
        asked = [q for q in questions if q["category"] == name]
        texts = [(q["image"], q["prompt"].split("\n")[0]) for q in asked]
        if texts != [(label["image"], label["text"]) for label in labels]:
            raise UserError(f"{file} labels other questions: take the files of POPE's commit e3e39262")
        truth |= {by_id(q): label["label"] for q, label in zip(asked, labels)}
    return truth


def parse_pope(text: str) -> bool:
    """An answer is yes unless one of the words before its first period is "No", "no" or "not"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in words for word in ("No", "no", "not"))


def score_pope(questions: list[dict]) -> dict:
    """Counts and rates of each set over the answers that exist, and 100 x the mean F1."""
    counts, rows = {q["category"]: Counter() for q in questions}, {}
    for q in questions:
        if q["text"] is not None:
            counts[q["category"]][parse_pope(q["text"]), q["truth"] != "no"] += 1
    for name, count in counts.items():
        tp, fp, tn, fn = count[True, True], count[True, False], count[False, False], count[False, True]
        precision, recall, n = tp / max(tp + fp, 1), tp / max(tp + fn, 1), max(count.total(), 1)
        f1 = 2 * precision * recall / (precision + recall) if tp else 0.0
        rows[name] = {"tp": tp, "fp": fp, "tn": tn, "fn": fn, "accuracy": (tp + tn) / n,
                      "precision": precision, "recall": recall, "f1": f1, "yes_ratio": (tp + fp) / n}
    return {"f1": percent([row["f1"] for row in rows.values()])} | rows


COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def mme_key(entry: dict) -> tuple[str, str, str]:
    """Task, file name up to its first period, question without the request for a short answer."""
    parts, text = by_id(entry).split("/"), entry["prompt"].removesuffix(SHORT_SUFFIX).strip()
    return parts[0], parts[-1].split(".")[0], text.removesuffix("Please answer yes or no.").strip()


def read_mme(args: Args, questions: list[dict]) -> dict:
    """MME's key -> yes or no, from the templates (a file per task) or the release folder (one per image)."""
    folder, truth = Path(args.annotations[0]), {}
    if not folder.is_dir():
        raise OSError(f"--annotations {folder} is not a folder")
    for task in {mme_key(q)[0] for q in questions}:
        template = folder / f"{task}.txt"
        files = [template] if template.exists() else (folder / task).glob("**/*.txt")
        lines = [(file, line) for file in files
                 for line in file.read_text("utf-8", "replace").split("\n") if line.strip()]
        for file, line in lines:
            cells = line.split("\t")
            image = cells.pop(0) if file == template else file.name      # 0001.txt is about image 0001
            if len(cells) < 2 or cells[1].strip().lower() not in ("yes", "no"):
                raise UserError(f"{file}: a line holds no question with yes or no: {line}")
            key = mme_key({"question_id": f"{task}/{image}", "prompt": cells[0]})
            truth[key] = cells[1].strip().lower()
    return truth


def parse_mme(text: str) -> str:
    """yes or no, if the first four characters contain it, tried in this order; else other."""
    return next((word for word in ("yes", "no") if word in text.lower()[:4]), "other")


def score_mme(questions: list[dict]) -> dict:
    """Percent per task: acc (of answers), acc_plus (of images with both right), score (their sum); and the
    sums of the scores of perception and cognition."""
    images, tasks = defaultdict(list), defaultdict(list)
    figures = {"perception": 0.0, "cognition": 0.0}
    for q in questions:
        if q["text"] is not None:
            images[q["question_id"]].append(parse_mme(q["text"]) == q["truth"])
    for image, correct in images.items():
        if len(correct) != 2:
            raise UserError(f"MME needs two answers for each image, but {image} has {len(correct)}")
        tasks[image.split("/")[0]].append(correct)
    for task, pairs in tasks.items():
        acc, acc_plus = percent(sum(pairs, [])), percent(list(map(all, pairs)))
        figures[task] = {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus}
        figures["cognition" if task in COGNITION else "perception"] += acc + acc_plus
    return figures


EMPTY_CELLS = ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
               "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")     # for pandas


def read_mmbench(file) -> list[dict]:
    """The rows of the tsv; the rotations of one question's options have the same index modulo 1,000,000."""
    csv.field_size_limit(2**31 - 1)
    with expect_format(file, "a tsv of MMBench"), open(file, newline="", encoding="utf-8") as lines:
        return [mmbench_question(row) for row in csv.DictReader(lines, delimiter="\t")]


def mmbench_question(row: dict[str, str]) -> dict:
    """A row as a question, as in LLaVA's script: hint, question, options up to the first empty one."""
    if None in row or None in row.values():
        raise ValueError(f"row {row['index']} has another number of cells than the first line")
    row = {name: None if cell in EMPTY_CELLS else cell for name, cell in row.items()}
    given = {name: cell for name, cell in row.items() if str(cell).lower() not in ("none", "nan")}
    options = {letter: row[letter] for letter in takewhile(lambda letter: letter in given, "ABCD")}
    lines = [row["hint"]] if "hint" in given else []
    prompt = "\n".join([*lines, row["question"], *(f"{letter}. {text}" for letter, text in options.items())])
    truth = {"truth": row["answer"]} if row.get("answer") else {}
    return truth | {"question_id": int(row["index"]), "prompt": prompt, "options": options, "row": row,
                    "message": f"<image>\n{prompt}{LETTER_SUFFIX}", "image": row["image"], "file": None}


def parse_letter(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names by the rules of VLMEvalKit without its judge: the only letter among the
    words, if it is one of the last four; else X of "answer is X"; else the only option whose text a short
    answer contains. None if there is none, for a refusal, and for "Z", the letter for no option."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    refusals = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
                "I'm sorry, but without the image provided", "Cannot determine the answer")
    if ("Z" in words and not letters) or any(refusal in text for refusal in refusals):
        return None
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    found = re.search(r"answer\s+is\s+\**([ABCD])", text, re.IGNORECASE)
    if found and found[1].upper() in options:
        return found[1].upper()
    contained = [letter for letter, option in options.items() if option.lower() in text.lower()]
    short = len(text) <= 2 * sum(map(len, options.values()))
    return contained[0] if short and len(contained) == 1 else None


def score_mmbench(questions: list[dict]) -> dict:
    """Percent correct: "circular" of questions, right if every row (rotation) is; "categories" the same by
    l2-category; "one_pass" of rows."""
    groups, categories = defaultdict(list), defaultdict(list)
    for q in sorted(questions, key=lambda q: q["question_id"]):           # the unrotated row first
        q["correct"] = q["text"] is not None and parse_letter(q["text"], q["options"]) == q["truth"]
        groups[q["question_id"] % 10**6].append(q)
    for group in groups.values():
        category = str(group[0]["row"].get("l2-category"))
        categories[category].append(all(q["correct"] for q in group))
    return {"circular": percent(sum(categories.values(), [])),
            "one_pass": percent([q["correct"] for q in questions]),
            "categories": {name: percent(found) for name, found in categories.items()}}


FORMATS, MIME = "http://schemas.openxmlformats.org", "application/vnd.openxmlformats-"
SHEETS, LINKS = f"{FORMATS}/spreadsheetml/2006/main", f"{FORMATS}/officeDocument/2006/relationships"
LINK = (f'<Relationships xmlns="{FORMATS}/package/2006/relationships"><Relationship Id="r1" '
        f'Target="{{}}.xml" Type="{LINKS}/{{}}"/></Relationships>')
XLSX = {                                     # the parts of the smallest workbook, without its sheet
    "[Content_Types].xml": f'<Types xmlns="{FORMATS}/package/2006/content-types">'
    f'<Default Extension="rels" ContentType="{MIME}package.relationships+xml"/>'
    f'<Override PartName="/book.xml" ContentType="{MIME}officedocument.spreadsheetml.sheet.main+xml"/>'
    f'<Override PartName="/sheet.xml" ContentType="{MIME}officedocument.spreadsheetml.worksheet+xml"/>'
    '</Types>',
    "_rels/.rels": LINK.format("book", "officeDocument"),
    "_rels/book.xml.rels": LINK.format("sheet", "worksheet"),
    "book.xml": f'<workbook xmlns="{SHEETS}" xmlns:r="{LINKS}"><sheets><sheet name="Sheet1" sheetId="1" '
    'r:id="r1"/></sheets></workbook>'}


def write_mmbench_upload(file: Path, questions: list[dict]) -> None:
    """The server's xlsx: the tsv without the columns `dropped`, and the answers as its seventh column."""
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    names = [name for name in questions[0]["row"] if name not in dropped]
    names.insert(6, "prediction")
    rows = [names]
    for q in questions:
        row = q["row"] | {"index": q["question_id"], "prediction": q["text"]}
        rows.append([row.get(name) for name in names])
    cells = "".join(f"<row>{''.join(map(xlsx_cell, row))}</row>" for row in rows)
    sheet = f'<worksheet xmlns="{SHEETS}"><sheetData>{cells}</sheetData></worksheet>'
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (XLSX | {"sheet.xml": sheet}).items():
            archive.writestr(name, content)


def xlsx_cell(value: int | str | None) -> str:
    if value is None:
        return "<c/>"
    if isinstance(value, int):
        return f"<c><v>{value}</v></c>"
    text = escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "", value), quote=False)
    return f'<c t="inlineStr"><is><t xml:space="preserve">{text}</t></is></c>'.replace("\r", "&#13;")


# ---------------------------------------------------------------------------------------------
# 6. LLaVA-Bench: a judge compares the model's answers with GPT-4's reference answers

JUDGE = "You rate the answers of two assistants to questions about images. You are exact and impartial."
RULE = """The question is about an image that you cannot see; the context describes it{}. Rate the answers of
Assistant 1 and Assistant 2: are they helpful, relevant, correct and detailed? Give each a number from 1 to
10; a better answer gets a higher number. The first line of your reply holds these two numbers only, that of
Assistant 1 first, with a space between them. Explain them in the lines after it. The order of the answers
must not influence you."""
BOXES = ": captions, one a line, then objects, each as category: [left, top, right, bottom] in fractions of 1"
SECONDS = 60                                 # timeout of a request to a judge or teacher


def read_llavabench(args: Args, questions: list[dict]) -> dict:
    """Question id -> the description of its image, its reference answer, and the name of its category."""
    contexts = {c["image"]: c for c in read_lines(args.annotations[0], "image").values()}
    references = read_lines(args.annotations[1], "question_id", "text", key=by_id)
    files, truth = " ".join(map(str, args.annotations)), {}
    for q in questions:
        category, detail = str(q.get("category")), ""
        with expect_format(files, f"context and reference of question {by_id(q)}"):
            context = contexts[q["image"]]
            if "caption" in context:         # in the wild: one text or a list of texts
                lines, category = context["caption"], f"llava_bench_{category}"
                lines = [lines] if isinstance(lines, str) else lines
            else:                            # COCO
                boxes, detail = [f"{box['category']}: {box['bbox']}" for box in context["instances"]], BOXES
                lines = [*context["captions"], "", *boxes]
            truth[by_id(q)] = {"context": "\n".join(lines), "detail": detail, "category": category,
                               "reference": references[by_id(q)]}
    return truth


def judge_messages(q: dict) -> list[dict]:
    """The request to the judge about an answer, in the official form."""
    content = (f"[Context]\n{q['truth']['context']}\n\n[Question]\n{q['prompt']}\n\n"
               f"[Assistant 1]\n{q['truth']['reference']['text']}\n\n[End of Assistant 1]\n\n"
               f"[Assistant 2]\n{q['text']}\n\n[End of Assistant 2]\n\n"
               f"[System]\n{RULE.format(q['truth']['detail'])}\n\n")
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": content}]


def parse_verdict(content: str) -> list[float]:
    """[reference's, model's rating] in a reply's first line; else [-1, -1], as officially also for "8, 7"."""
    try:
        first, second = map(float, content.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:
        return [-1, -1]
    return [first, second] if math.isfinite(first + second) else [-1, -1]


def judge_answers(args: Args, questions: list[dict]) -> None:
    """Append a review of each answer to args.reviews[0], unless it is there."""
    file, url, left = args.reviews[0], judge_url(args), []
    stored = continue_lines(file, "question_id", key=by_id)
    refuse_foreign(file, stored, questions)  # before a request is sent
    for q in questions:
        if q["text"] is None:
            continue
        texts = {"answer": q["text"], "request": json.dumps(judge_messages(q))}
        digests = {name: hashlib.sha256(text.encode()).hexdigest()[:8] for name, text in texts.items()}
        q["settings"] = {"judge_model": args.judge_model} | digests
        if by_id(q) not in stored:
            left.append(q)
        elif stored[by_id(q)].get("metadata", q["settings"]) != q["settings"]:
            raise UserError(f"{file} has a review of question {by_id(q)} by another judge or of another "
                            "answer or reference: name another --reviews")
    for n, q in enumerate(tqdm(left, desc="judging", unit="answer"), len(stored) + 1):
        content, _ = chat(url, args.judge_model, judge_messages(q))
        append(file, {"question_id": q["question_id"], "id": n, "category": q["truth"]["category"],
                      "answer1_id": q["truth"]["reference"].get("answer_id"),
                      "answer2_id": q["settings"]["answer"], "content": content,
                      "tuple": parse_verdict(content), "metadata": q["settings"]})


def score_reviews(args: Args, questions: list[dict]) -> dict:
    """100 x the model's mean rating / the reference's, by the official roundings; the mean over the files."""
    ratios, reviewed = defaultdict(list), []
    for file in args.reviews:
        ratings, reviews = defaultdict(list), read_lines(file, "question_id", key=by_id)
        for question_id, review in reviews.items():
            rating = review.get("tuple", review.get("score"))
            if not isinstance(rating, list) or [type(x) in (int, float) for x in rating] != [True, True]:
                raise UserError(f"{file}: the review of question {question_id} has no two ratings")
            ratings["all"].append(rating)
            if "category" in review:
                ratings[str(review["category"]).removeprefix("llava_bench_")].append(rating)
        unreadable = ratings["all"].count([-1, -1])
        if unreadable == len(reviews):
            raise UserError(f"{file} has no review with two ratings in its first line: is the model a judge?")
        print(f"{file}: {len(reviews)} reviews; {unreadable} without two ratings count as -1 -1")
        for name, pairs in ratings.items():
            reference, model = (round(mean, 3) for mean in np.asarray(pairs, float).mean(0).tolist())
            ratios[name].append(round(model / reference * 100, 1) if reference else 0.0)
        reviewed.append(set(reviews))
        if questions:
            refuse_foreign(file, reviews, questions)
    asked = set(map(by_id, questions)) or set.union(*reviewed)
    figures = {name: sum(found) / len(found) for name, found in sorted(ratios.items())}
    missing = len(asked - set.intersection(*reviewed))
    return figures | {"reviews": ratios["all"], "missing": missing, "questions": len(asked)}


def refuse_foreign(file: Path, reviewed: Iterable[str], questions: list[dict]) -> None:
    if foreign := set(reviewed) - set(map(by_id, questions)):
        raise UserError(f"{file} has a review of question {min(foreign)}, which is not asked: name another "
                        "--reviews, or ask all questions")


def judge_url(args: Args) -> str:
    """The address of the endpoint: --judge, or OPENAI_BASE_URL."""
    url = args.judge or os.environ.get("OPENAI_BASE_URL", "")
    try:
        valid = url.isascii() and urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname
    except ValueError:                       # such as http://[::1/v1
        valid = False
    if not valid:
        raise UserError("name an endpoint such as http://localhost:8000/v1 with --judge or OPENAI_BASE_URL")
    return url


def api_key() -> str:
    """OPENAI_API_KEY, or "" without one."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("OPENAI_API_KEY has a line break or a character that is not ASCII: copy it again")
    return key


def chat(url: str, model: str, messages: list[dict], temperature: float = 0.2, max_tokens: int = 1024,
         stop: threading.Event | None = None) -> tuple[str, str | None]:
    """The reply of the OpenAI-compatible endpoint {url}/chat/completions to [{"role", "content"}, ...], and
    why it ends: "stop", or "length" if max_tokens cut it off. `stop` ends the attempts. UserError for
    a refused request or a reply of another form, OSError where the endpoint is not reached or fails."""
    body = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
    request = Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(),
                      {"Content-Type": "application/json"})
    if key := api_key():
        request.add_unredirected_header("Authorization", f"Bearer {key}")      # for this server only
    for wait in (1, 2, 4, 8, 0):
        try:
            return call_in_time(read_reply, request)
        except HTTPError as error:
            if error.code in (401, 403):
                raise UserError(f"{url} refuses the request ({error.code}): check OPENAI_API_KEY") from None
            if 300 <= error.code < 500 and error.code not in (408, 409, 425, 429):
                raise UserError(f"{url} refuses the request ({error.code} {error.reason}): check the name of "
                                "the model and the endpoint") from None
            failure = OSError(f"{url} answers {error.code} {error.reason}: try again later")
            if wait:
                wait = retry_after(error.headers.get("Retry-After"), wait)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            failure = UserError(f"{url} does not reply with a chat completion: is it OpenAI-compatible?")
        except (OSError, HTTPException) as error:
            failure = OSError(f"{url} gives no answer ({getattr(error, 'reason', error)}): is it running?")
        if wait:
            pause(wait, stop)
        if stop and stop.is_set():
            break
    raise failure


def pause(seconds: float, stop: threading.Event | None) -> None:
    """Wait; with `stop` in steps of 0.1 s, until it is set."""
    if stop is None:
        return time.sleep(seconds)
    for _ in range(round(10 * seconds)):
        if not stop.is_set():
            time.sleep(0.1)


def call_in_time(function: Callable, *args):
    """function(*args) in a thread; TimeoutError after SECONDS. A timeout of urlopen holds for each packet."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():                    # it is left behind
        raise TimeoutError("timed out")
    return future.result()


def read_reply(request: Request) -> tuple[str, str | None]:
    """The text and the finish_reason of a chat completion."""
    with urlopen(request, timeout=SECONDS) as response:
        choice = json.loads(response.read())["choices"][0]
    text = choice["message"]["content"]
    text = "" if text is None else "" + text             # null: a refusal; TypeError for other types
    return text, choice.get("finish_reason")


def retry_after(header: str | None, default: float) -> float:
    """The seconds in a Retry-After header, at most 60; default if it is missing or holds a date."""
    try:
        return min(60, max(0, float(header)))
    except (TypeError, ValueError):
        return default


# ---------------------------------------------------------------------------------------------
# 7. The table of benchmarks


@dataclass
class Benchmark:
    """The functions and constants of one benchmark."""
    read: Callable[[str], list[dict]]        # the questions in a file of --questions
    read_truth: Callable[[Args, list[dict]], dict] | None    # key -> what scoring needs of --annotations
    score: Callable[[list[dict]], dict] | None           # the figures
    key: Callable[[dict], object] = by_id    # the same for a question and its answers
    repeated: str = "the last one counts"    # printed if a question has several answers
    upload: Callable[[Path, list[dict]], None] | None = None
    max_new_tokens: int = 128


BENCHMARKS = {
    "vqav2": Benchmark(read_vqav2, read_humans, score_vqav2, upload=write_vqav2_upload),
    "textvqa": Benchmark(read_questions, read_humans, score_textvqa, key=textvqa_key, repeated="each counts"),
    "pope": Benchmark(read_questions, read_pope, score_pope),
    "mme": Benchmark(read_questions, read_mme, score_mme, key=mme_key),
    "mmbench": Benchmark(read_mmbench, None, score_mmbench, upload=write_mmbench_upload, max_new_tokens=1024),
    "llavabench": Benchmark(read_questions, read_llavabench, None, max_new_tokens=1024),
}


def run_task(args: Args) -> dict:
    """Ask the model or read its answers, write the upload file, print and return the figures."""
    benchmark, entries = BENCHMARKS[args.task], []
    questions = read_task(args, benchmark) if args.questions else []
    if args.judge_model:                     # mistakes in these show before the model is asked
        judge_url(args)
        api_key()
        if not args.reviews[0].parent.is_dir():
            raise OSError(f"{args.reviews[0]} cannot be written: there is no such folder")
    if args.model:
        asked = questions[:args.limit]
        entries = answer_all(args, asked)[:len(asked)]       # without those to other question files
    elif args.predictions:
        key = by_id if args.task == "llavabench" else None   # its judge refuses several answers to a question
        entries = read_lines(args.predictions, "question_id", "text", key=key).values()
    add_answers(benchmark, questions, entries, args.predictions or args.out)
    questions = questions[:args.limit]       # only now, because the files may also answer later questions
    if args.judge_model:
        judge_answers(args, questions)
    if args.upload:
        benchmark.upload(args.upload, questions)
    figures = {"missing": sum(q["text"] is None for q in questions), "questions": len(questions)}
    if args.reviews:
        figures |= score_reviews(args, questions)            # its "missing" are questions without a review
    elif benchmark.score and all("truth" in q for q in questions):
        figures |= benchmark.score(questions)
    print_figures(figures)
    return figures


def read_task(args: Args, benchmark: Benchmark) -> list[dict]:
    """The questions with all that asking and scoring need: message, image file, truth."""
    questions = [q for file in args.questions for q in benchmark.read(file)]
    if not questions or len(set(map(benchmark.key, questions))) < len(questions):
        raise UserError(f"{' '.join(args.questions)}: no question, or one question twice")
    without = [by_id(q) for q in questions if "truth" not in q]
    if 0 < len(without) < len(questions):
        raise UserError(f"{' '.join(args.questions)}: row {without[0]} has no answer, but others have one")
    truth = benchmark.read_truth(args, questions) if args.annotations and benchmark.read_truth else None
    for q in questions:
        q.setdefault("message", f"<image>\n{q['prompt']}")
        if "file" not in q:
            if args.images and (os.path.isabs(q["image"]) or ".." in Path(q["image"]).parts):
                raise UserError(f"question {by_id(q)}: image {q['image']} is outside of {args.images}")
            q["file"] = args.images and args.images / q["image"]
        if truth is not None:
            if benchmark.key(q) not in truth:
                raise UserError(f"{' '.join(args.annotations)} lacks question {by_id(q)}: is it another set?")
            q["truth"] = truth[benchmark.key(q)]
    return questions


def add_answers(benchmark: Benchmark, questions: list[dict], entries: list[dict], file) -> None:
    """Put the texts of its answers into each question. UserError for answers to other questions."""
    texts = {benchmark.key(q): [] for q in questions}
    for entry in entries:
        if "prompt" not in entry and benchmark.key is not by_id:
            raise UserError(f"{file}: the answer to question {by_id(entry)} has no prompt")
        if benchmark.key(entry) not in texts:
            raise UserError(f"{file} answers question {by_id(entry)}, which --questions lacks")
        texts[benchmark.key(entry)].append(entry["text"])
    if several := sum(len(found) > 1 for found in texts.values()):
        print(f"{file}: {several} questions have more than one answer; {benchmark.repeated}")
    for q in questions:
        q["texts"] = texts[benchmark.key(q)]
        q["text"] = q["texts"][-1] if q["texts"] else None


def print_figures(figures: dict) -> None:
    """Print the single figures in one line, and those of sets, tasks or categories as a table below."""
    print(", ".join(f"{name} {round(x, 4) if isinstance(x, float) else x}" for name, x in figures.items()
                    if not isinstance(x, dict)))
    rows = {name: x for name, x in figures.items() if isinstance(x, dict)}
    if "categories" in rows:
        rows = {name: {"circular": x} for name, x in rows["categories"].items()}
    if rows:
        columns = next(iter(rows.values()))
        print_columns(columns, {name: list(row.values()) for name, row in rows.items()}, ".4f")


# ---------------------------------------------------------------------------------------------
# 8. Cost. A multiply-add is two FLOPs; norms, softmax and activations are left out (below 0.1%)


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """The number of parameters of vision_tower, projector, language_model and, with AnyRes, image_newline."""
    with torch.device("meta"):
        parts = Counter()
        for name, p in Llava(config).named_parameters():
            parts[name.split(".")[0]] += p.numel()
    return dict(parts)


def int4_bytes(config: LlavaConfig) -> float:
    """Bytes of all weights with --quantize int4: layers in 4 bits and 1 bit of scales, lm_head in 8 bits,
    the rest in 16."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Llava(config).named_parameters()}
    layers = sum(n for name, n in sizes.items() if re.match(r"language_model\.layers\..*_proj\.", name))
    head = sizes["language_model.lm_head.weight"]
    return 5 / 8 * layers + head + 2 * (sum(sizes.values()) - layers - head)


def language_flops(text: TextConfig, tokens: int, logits: int = 1, causal: bool = True) -> int:
    """FLOPs of one row of `tokens` through the decoder, with logits at `logits` positions. Attention counts
    the pairs of query and key inside mask and window or, if not causal, all pairs, as papers and torch do."""
    C, D, H, K = text.hidden_size, text.head_dim, text.num_attention_heads, text.num_key_value_heads
    window = min(tokens, text.sliding_window or tokens)
    pairs = window * (window + 1) // 2 + (tokens - window) * window if causal else tokens**2
    weights = 2 * C * H * D + 2 * C * K * D + 3 * C * text.intermediate_size
    layer = 2 * tokens * weights + 4 * H * D * pairs
    return text.num_hidden_layers * layer + 2 * logits * C * text.vocab_size


def vision_flops(vision: VisionConfig, layers: int) -> int:
    """FLOPs of one tile through the patch embedding and `layers` layers of the tower (LLaVA: all but one)."""
    C, patches = vision.hidden_size, vision.side**2
    weights, tokens = 4 * C * C + 2 * C * vision.intermediate_size, 1 + patches
    return 2 * patches * 3 * vision.patch_size**2 * C + layers * (2 * tokens * weights + 4 * C * tokens**2)


def projector_flops(config: LlavaConfig, patches: int) -> int:
    C = config.text.hidden_size
    second = C if config.projector == "mlp2x_gelu" else 0
    return 2 * patches * C * (config.vision.hidden_size + second)


def costs(config: LlavaConfig, text_tokens: int) -> dict[str, float]:
    """Parameters, and the cost of the prefill of one image and `text_tokens`; attention counts all pairs of
    tokens. The image is a square, with AnyRes of twice the tower's size."""
    side = config.vision.image_size * (2 if config.image_mode == "anyres" else 1)
    tiles, image_tokens = count_tiles(config, (side, side)), count_image_tokens(config, (side, side))
    tokens, parts, text = image_tokens + text_tokens, count_parameters(config), config.text
    layers = config.vision.num_hidden_layers + 1 + config.vision_feature_layer     # that LLaVA evaluates
    cached = min(tokens, text.sliding_window or tokens) * text.num_hidden_layers * text.num_key_value_heads
    reduced = config.prune not in ("none", "divprune")       # before the projector
    flops = {"vision_tower": tiles * vision_flops(config.vision, layers),
             "projector": projector_flops(config, image_tokens if reduced else tiles * config.vision.side**2),
             "language_model": language_flops(text, tokens, causal=False)}
    return {**{f"parameters, {part}": n for part, n in parts.items()}, "parameters": sum(parts.values()),
            "GiB in 16 bits": 2 * sum(parts.values()) / 2**30,
            "GiB with --quantize int4": int4_bytes(config) / 2**30, "tokens, image and text": tokens,
            **{f"TFLOPs, {part}": n / 1e12 for part, n in flops.items()},
            "TFLOPs": sum(flops.values()) / 1e12,
            "MiB of keys and values": 2 * cached * text.head_dim * 2 / 2**20}        # 2 tensors of 2 bytes


LLAMA_7B = TextConfig("llama", intermediate_size=11008, num_key_value_heads=32, rope_theta=1e4,
                      max_position_embeddings=4096)
LLAMA_13B = replace(LLAMA_7B, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                    num_attention_heads=40, num_key_value_heads=40)
PUBLISHED = {
    "LLaVA on Mistral-7B": LlavaConfig(),
    "LLaVA-1.5-7B": LlavaConfig(text=LLAMA_7B),
    "LLaVA-1.5-13B": LlavaConfig(text=LLAMA_13B),
}

TABLE_II = {                                 # TFLOPs of 700 tokens, of 70, of both in INT4
    "LLaVA-1.5-7B": (9.3, 0.91, 2.3, 0.28),
    "LLaVA-1.5-13B": (18.2, 1.80, 4.6, 0.45),
}


def print_table_ii() -> None:
    """Print PruMerge's Table II beside the formula; its prompts have 700 tokens, with PruMerge 70."""
    print("\nPruMerge's Table II: TFLOPs of the language model, published (by formula), for 700 tokens, 70,"
          "\n700 in INT4, 70 in INT4. Its INT4 is FP16 / 4 (except 0.28), but only the bytes are a quarter.")
    for name, published in TABLE_II.items():
        full, pruned = (language_flops(PUBLISHED[name].text, n, causal=False) / 1e12 for n in (700, 70))
        formula = (full, pruned, full / 4, pruned / 4)
        print(f"{name:14}", *(f"{theirs:5} ({ours:.3g})" for theirs, ours in zip(published, formula)))


def run_cost(args: Args) -> dict[str, dict]:
    """Print and return the costs of --model, or of the published models."""
    configs = PUBLISHED
    if args.model:
        fields, _, _ = open_checkpoints([args.model], weights=False, moved=args.base)
        configs = {args.model: LlavaConfig(**fields)}
    models = {name: costs(replace(config, **config_overrides(args)), args.cost)
              for name, config in configs.items()}
    first, *_ = models.values()
    print_columns(models, {row: [model[row] for model in models.values()] for row in first}, ".5g")
    if not args.model:
        print_table_ii()
    return models


# ---------------------------------------------------------------------------------------------
# 9. The command line


def parse_args(argv: list[str] | None = None) -> Args:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=form)
    add, mode = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--scienceqa", metavar="DIR", help="folder with problems.json")
    mode.add_argument("--task", choices=BENCHMARKS, help="one of the other benchmarks")
    mode.add_argument("--cost", nargs="?", type=number(int, 1), const=30, metavar="N",
                      help="cost of an image and N tokens (%(const)s): of --model, or of published models")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--model", metavar="ID", help="folder, run or hub id of the LLaVA to ask")
    who.add_argument("--predictions", metavar="FILE", help="answers to score, as --out writes them")
    who.add_argument("--compare", nargs=2, default=[], metavar=("A", "B"), help="ScienceQA: compare answers")
    add("--out", type=Path, metavar="FILE", help="append the answers, one JSON line each; continues the file")
    add("--json", type=Path, metavar="FILE", help="write the figures there")
    add("--blank", action="store_true", help="replace every image by a white one of its size (control)")
    add("--batch-size", type=number(int, 1), default=16, metavar="N", help="questions at once (%(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N questions")
    add("--max-new-tokens", type=number(int, 1), metavar="N", help="default: 1024; short answers 128")
    add("--split", default="test", help="ScienceQA: default %(default)s")
    add("--pictures", default="any", choices=("any", "only", "none"), help="ScienceQA: only or no images")
    add("--wording", default="qcm", choices=("qcm", "letter"), help="ScienceQA: its prompt (%(default)s)")
    add("--answer", default="generate", choices=("generate", "options"),
        help="ScienceQA: generated text, or the most probable option (default: %(default)s)")
    add("--questions", nargs="+", default=[], metavar="FILE", help="question files, see tests/RESULTS.md")
    add("--annotations", nargs="+", default=[], metavar="FILE", help="files or folder of correct answers")
    add("--images", type=Path, metavar="DIR", help="folder of the images")
    add("--upload", type=Path, metavar="FILE", help="write the file for the server of VQAv2 or MMBench")
    add("--reviews", nargs="+", type=Path, default=[], metavar="FILE",
        help="LLaVA-Bench: reviews to score; with --judge-model one file that is continued")
    add("--judge-model", metavar="NAME", help="LLaVA-Bench: the model that rates the answers")
    add("--judge", metavar="URL", help="its OpenAI-compatible endpoint (default: $OPENAI_BASE_URL)")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    check_args(parser, args)
    if args.max_new_tokens is None:
        args.max_new_tokens = BENCHMARKS[args.task].max_new_tokens if args.task else 1024
    return args


ONLY_FOR = {                                 # flags that only some tasks have
    **dict.fromkeys(("compare", "split", "pictures", "wording", "answer"), ("scienceqa",)),
    **dict.fromkeys(("questions", "annotations", "images"), tuple(BENCHMARKS)),
    **dict.fromkeys(("reviews", "judge", "judge_model"), ("llavabench",)), "upload": ("vqav2", "mmbench")}


def check_args(parser: argparse.ArgumentParser, args: Args) -> None:
    """Exit with code 2 for the first mistake in the combination of flags."""
    task = args.task or ("scienceqa" if args.scienceqa else "cost")
    for name, tasks in ONLY_FOR.items():
        if getattr(args, name) != parser.get_default(name) and task not in tasks:
            parser.error(f"--{name.replace('_', '-')} is for {', '.join(tasks)}")
    answers = args.model or args.predictions
    only_reviews = args.reviews and not (args.judge_model or answers)
    if task == "scienceqa" and not (answers or args.compare):
        parser.error("--scienceqa needs --model, --predictions or --compare")
    if args.task and not only_reviews and not (args.questions and answers):
        parser.error("--task needs --questions, and --model or --predictions")
    if args.task and task != "mmbench":      # whose questions contain the images and the correct answers
        if args.model and not args.images:
            parser.error("--model needs --images")
        if args.model and not (args.out or args.upload or args.annotations):
            parser.error("--model needs --out, or its answers are lost")
        if args.predictions and task != "llavabench" and not (args.annotations or args.upload):
            parser.error(f"{task} needs --annotations to score answers")
    if task == "llavabench":
        if args.judge_model and len(args.reviews) != 1:
            parser.error("--judge-model needs one --reviews FILE")
        if len(args.annotations) != 2 and (args.annotations or args.judge_model):
            parser.error("llavabench needs --annotations CONTEXT REFERENCE")
        if args.predictions and not args.reviews:
            parser.error("llavabench needs --reviews to score answers")
    inputs = [args.predictions, *args.compare, *args.questions, *args.annotations, *args.reviews]
    check_outputs(parser, (args.out, args.json, args.upload), inputs)


def run_scienceqa(args: Args) -> dict:
    """Print and return ScienceQA's table."""
    problems = read_scienceqa(args.scienceqa, args.split, args.pictures, args.wording)[:args.limit]
    if not problems:
        raise UserError(f"{args.scienceqa}: no question of split {args.split!r} is left to ask")
    if args.compare:
        return compare(problems, args.compare)
    if args.predictions:
        texts = read_answers(args.predictions)
    else:
        texts = {by_id(entry): entry["text"] for entry in answer_all(args, problems)}
    table, average = score(problems, texts), interval([are_correct(problems, texts)])
    print_table({args.split: table})
    print("Avg {:.2f}, and in 95% of 10,000 resampled tests from {:.2f} to {:.2f}".format(*average))
    if args.wording == "letter":
        print(f"LLaVA-1.5's published figure is that of the questions with an image: {table['IMG']}")
    return table


def main() -> None:
    args = parse_args()
    if args.cost:
        figures = run_cost(args)
    else:
        figures = run_task(args) if args.task else run_scienceqa(args)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    command_line(main)
