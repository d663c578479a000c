"""Grade a LLaVA on ScienceQA, or a file of answers without any model.

    python eval.py --scienceqa data/ScienceQA --split test --model runs/stage2 --out answers.jsonl
    python eval.py --scienceqa data/ScienceQA --split test --predictions answers.jsonl

The folder is as published (Lu et al. 2022, github.com/lupantech/ScienceQA): problems.json,
pid_splits.json and images/{split}/{id}/image.png. The wording of prompts, the reading of answers
and the columns of the table are those of LLaVA's and ScienceQA's own scripts: accuracy moves by
twenty points when the wording does.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from llava import (Llava, Processor, add_model_flags, command_line, open_image, open_model,
                   read_json, replacing)

LETTERS = "ABCDE"
COLUMNS = {                                  # the official table; TXT and IMG overlap
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
# 1. ScienceQA: problems, wording, records


def read_scienceqa(folder, split: str, pictures: str = "any", limit: int | None = None) -> list[dict]:
    """The problems of a split in published order, each with its "id" and, in "file", its picture."""
    folder = Path(folder)
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    if split not in splits:
        raise ValueError(f"{folder / 'pid_splits.json'} has no split {split!r}, only {', '.join(splits)}")
    if unknown := [i for i in splits[split] if i not in problems]:
        raise ValueError(f"{folder / 'problems.json'} lacks question {unknown[0]} of split {split!r}")
    chosen_ones = [problems[i] | {"id": i} for i in splits[split]]
    for p in chosen_ones:
        p["file"] = folder / "images" / p["split"] / p["id"] / p["image"] if p["image"] else None
    return [p for p in chosen_ones if pictures == "any" or bool(p["image"]) == (pictures == "only")][:limit]


def question(problem: dict) -> str:
    """A problem in the wording QCM, in which LLaVA is trained and asked: question, context, options.

    Double spaces are halved once and "Question: " disappears, as in LLaVA's conversion script.
    """
    options = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, problem["choices"]))
    text = (f"Question: {problem['question']}\nContext: {problem['hint'] or 'N/A'}\n"
            f"Options: {options}\n").replace("  ", " ").strip().replace("Question: ", "")
    return text + "\n<image>" if problem["image"] else text


def answer(problem: dict) -> str:
    """What it is to learn, in the wording LEA: lecture, explanation, answer."""
    text = (f"Answer: {problem['lecture']} {problem['solution']} "
            f"The answer is {LETTERS[problem['answer']]}.")
    return text.replace("  ", " ").strip().replace("Answer: ", "")


def to_record(problem: dict) -> dict:
    """A problem as a training record of LLaVA; pictures are relative to the split's folder."""
    picture = {"image": f"{problem['id']}/{problem['image']}"} if problem["image"] else {}
    return {"id": problem["id"], **picture, "conversations": [
        {"from": "human", "value": question(problem)}, {"from": "gpt", "value": answer(problem)}]}


# ---------------------------------------------------------------------------------------------
# 2. Answers: read them, count them


def chosen(text: str, choices: int) -> int | None:
    """The option an answer settles on; None where LLaVA's eval_science_qa.py finds none, -1 for a
    letter that is no option. Exactly one "The answer is X" must stand there; X may be followed by
    any character, since the dot in the published pattern is a wildcard."""
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


def score(problems: list[dict], texts: dict[str, str]) -> dict[str, float]:
    """Percent right in each column, two decimals, and how many answers could not be read or are
    not there; both count as wrong."""
    read = {p["id"]: chosen(texts[p["id"]], len(p["choices"])) for p in problems if p["id"] in texts}
    table = {}
    for column, belongs in COLUMNS.items():
        right = [read.get(p["id"]) == p["answer"] for p in problems if belongs(p)]
        table[column] = round(100 * sum(right) / len(right), 2) if right else None
    return table | {"questions": len(problems), "unread": sum(index is None for index in read.values()),
                    "missing": len(problems) - len(read)}


def print_table(tables: dict[str, dict]) -> None:
    """One aligned line per named table, the official columns above."""
    width = max(map(len, tables))
    print(" " * width, *(f"{column:>6}" for column in COLUMNS))
    for name, table in tables.items():
        cells = (f"{'-' if table[c] is None else format(table[c], '.2f'):>6}" for c in COLUMNS)
        print(f"{name:{width}}", *cells)
    for name, table in tables.items():
        print(f"{name}: {table['questions']} questions, {table['unread']} answers could not be read, "
              f"{table['missing']} missing")


def read_answers(file) -> dict[str, str]:
    """question_id -> text of a file of answers, one JSON object per line."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
    texts = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            texts[str(entry["question_id"])] = entry["text"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{file}, line {number}: not {{"question_id": ..., "text": ...}}') from None
    return texts


# ---------------------------------------------------------------------------------------------
# 3. Asking a model


def ask(model: Llava, processor: Processor, problems: list[dict], batch_size: int = 16,
        max_new_tokens: int = 512, blank: bool = False) -> Iterator[tuple[dict, str, str]]:
    """Each problem with its prompt and the model's answer. `blank` hides every picture behind a
    white one: what is still right then was not seen."""
    bar = tqdm(total=len(problems), desc="asking", unit="question")
    for start in range(0, len(problems), batch_size):
        batch = problems[start:start + batch_size]
        prompts, inputs = [question(p) for p in batch], []
        for p, prompt in zip(batch, prompts):
            images = [open_image(p["file"])] if p["image"] else []
            images = [Image.new("RGB", image.size, "white") for image in images] if blank else images
            inputs.append(processor([{"role": "user", "content": prompt}], images))
        rows = [i["input_ids"][0] for i in inputs]
        answers = model.generate_batch(
            pad_sequence(rows, batch_first=True), [x for i in inputs for x in i["images"]],
            [x for i in inputs for x in i["image_sizes"]],
            pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True),
            eos_token_id=processor.eos, max_new_tokens=max_new_tokens)
        bar.update(len(batch))
        yield from zip(batch, prompts, map(processor.decode, answers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scienceqa", required=True, metavar="DIR", help="folder with problems.json")
    add("--split", default="test", help="default: %(default)s")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", metavar="ID", help="folder, run or hub id of the LLaVA to ask")
    who.add_argument("--predictions", metavar="FILE", help="answers to score, as --out writes them")
    add("--pictures", default="any", choices=("any", "only", "none"),
        help="questions with or without pictures (default: %(default)s)")
    add("--blank", action="store_true", help="hide every picture: what is right then is guessed")
    add("--out", type=Path, metavar="FILE", help="keep the answers, one JSON line each")
    add("--batch-size", type=int, default=16, metavar="N", help="questions at once (%(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N questions")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    add_model_flags(parser)
    args = parser.parse_args()
    problems = read_scienceqa(args.scienceqa, args.split, args.pictures, args.limit)
    if not problems:
        raise ValueError(f"{args.scienceqa}: no question of split {args.split!r} is left to ask")
    if args.predictions:
        texts = read_answers(args.predictions)
    else:
        model, processor = open_model(args)
        answers = list(ask(model, processor, problems, args.batch_size, args.max_new_tokens, args.blank))
        texts = {p["id"]: text for p, _, text in answers}
        if args.out:
            with replacing(args.out) as file:
                file.write_text("".join(json.dumps({"question_id": p["id"], "prompt": prompt,
                                                    "text": text}) + "\n" for p, prompt, text in answers))
    print_table({args.split: score(problems, texts)})


if __name__ == "__main__":
    command_line(main)
