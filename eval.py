"""Grade a LLaVA on ScienceQA, or files of answers without any model; or count what one costs.

    python eval.py --scienceqa data/ScienceQA --split test --model runs/stage2 --out answers.jsonl
    python eval.py --scienceqa data/ScienceQA --split test --predictions answers.jsonl
    python eval.py --scienceqa data/ScienceQA --split test --compare a.jsonl b.jsonl
    python eval.py --cost

The folder is as published (Lu et al. 2022, github.com/lupantech/ScienceQA): problems.json,
pid_splits.json and images/{split}/{id}/image.png. The wording of prompts, the reading of answers
and the columns of the table are those of LLaVA's and ScienceQA's own scripts: accuracy moves by
twenty points when the wording does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import resource
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from llava import (Llava, LlavaConfig, Processor, TextConfig, VisionConfig, add_model_flags, choose_grid,
                   command_line, count_image_tokens, open_checkpoint, open_image, load_model, number, read_object,
                   UserError)

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
    problems, splits = read_object(folder / "problems.json"), read_object(folder / "pid_splits.json")
    if not isinstance(splits.get(split, []), list):
        raise UserError(f"{folder / 'pid_splits.json'}: split {split!r} is not a list of question ids")
    if split not in splits:
        raise UserError(f"{folder / 'pid_splits.json'} has no split {split!r}, only {', '.join(splits)}")
    if unknown := [i for i in splits[split] if str(i) != i or i not in problems]:
        raise UserError(f"{folder / 'problems.json'} lacks question {unknown[0]} of split {split!r}")
    for i in splits[split]:
        check_problem(problems[i], i, folder / "problems.json")
    chosen_ones = [problems[i] | {"id": i} for i in splits[split]]
    for p in chosen_ones:
        p["file"] = folder / "images" / p["split"] / p["id"] / p["image"] if p["image"] else None
    return [p for p in chosen_ones if pictures == "any" or bool(p["image"]) == (pictures == "only")][:limit]


def check_problem(problem, name: str, file: Path) -> None:
    """Raise UserError unless a problem has the fields of ScienceQA, and its image lies in the folder."""
    where = f"{file}, question {name}"
    kinds = {"choices": list, "answer": int, "image": str | None} | dict.fromkeys(
        ("question", "hint", "split", "grade", "subject", "lecture", "solution"), str)
    for key, kind in kinds.items():
        if not isinstance(problem, dict) or not isinstance(problem.get(key, ...), kind):
            raise UserError(f"{where}: {key} is missing or of the wrong type")
    if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
        raise UserError(f"{where}: answer {problem['answer']} is not one of at most {len(LETTERS)} choices")
    if not re.fullmatch(r"grade\d+", problem["grade"]):
        raise UserError(f"{where}: grade {problem['grade']!r} is not grade1 to grade12")
    for part in (problem["split"], name, problem["image"] or "image.png"):
        if Path(part).name != part or part in ("", ".."):
            raise UserError(f"{where}: {part!r} is not the name of a file or folder in images")


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


def parse_choice(text: str, choices: int) -> int | None:
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


def grade(problems: list[dict], texts: dict[str, str]) -> list[bool]:
    """Whether each problem was answered right; an answer that cannot be read or is not there is wrong."""
    return [p["id"] in texts and parse_choice(texts[p["id"]], len(p["choices"])) == p["answer"] for p in problems]


def score(problems: list[dict], texts: dict[str, str]) -> dict[str, float]:
    """Percent right in each column, two decimals; how many answers could not be read or are not
    there, which both count as wrong; and how many belong to none of these problems."""
    table = {}
    for column, belongs in COLUMNS.items():
        right = grade([p for p in problems if belongs(p)], texts)
        table[column] = round(100 * sum(right) / len(right), 2) if right else None
    answered = [p for p in problems if p["id"] in texts]
    return table | {"questions": len(problems), "missing": len(problems) - len(answered),
                    "unread": sum(parse_choice(texts[p["id"]], len(p["choices"])) is None for p in answered),
                    "elsewhere": len(texts) - len(answered)}


def print_columns(rows: dict[str, list[float | None]], form: str = ".2f") -> None:
    """The official columns, and an aligned line for each named row."""
    width = max(map(len, rows))
    print(" " * width, *(f"{column:>6}" for column in COLUMNS))
    for name, row in rows.items():
        print(f"{name:{width}}", *(f"{'-' if x is None else format(x, form):>6}" for x in row))


def print_table(tables: dict[str, dict]) -> None:
    """A row for each named table, and below what is behind it."""
    print_columns({name: [table[column] for column in COLUMNS] for name, table in tables.items()})
    for name, table in tables.items():
        print(f"{name}: {table['questions']} questions, {table['unread']} answers could not be read, "
              f"{table['missing']} missing, {table['elsewhere']} to other questions")


def read_entries(file: Path, content: bytes) -> list[dict]:
    """The lines of a file of answers, one JSON object each."""
    entries = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry = entry | {"question_id": str(entry["question_id"]), "text": "" + entry["text"]}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{file}, line {number}: not {{"question_id": ..., "text": ...}}') from None
        if entry["question_id"] in entries:
            raise UserError(f"{file}, line {number}: question {entry['question_id']} was answered before")
        entries[entry["question_id"]] = entry
    return list(entries.values())


def read_answers(file) -> dict[str, str]:
    """question_id -> text of a file of answers."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise OSError(f"{file} cannot be read: {error.strerror}") from None
    return {entry["question_id"]: entry["text"] for entry in read_entries(file, content)}


def interval(right_a: list[bool], right_b: list[bool] | None = None, draws: int = 10000,
             seed: int = 0) -> tuple[float, float, float]:
    """Percent right, or with right_b the points by which a is ahead on the same questions, and the
    bounds of its 95% bootstrap interval. A draw takes as many questions as there are, with replacement:
    how often it meets each outcome is multinomial, so no question need be drawn by itself."""
    gained = np.asarray(right_a, int) - (0 if right_b is None else np.asarray(right_b, int))
    values, counts = np.unique(gained, return_counts=True)
    n = len(gained)
    means = np.random.default_rng(seed).multinomial(n, counts / n, draws) @ values * 100 / n
    low, high = np.percentile(means, (2.5, 97.5))
    return 100 * float(gained.mean()), float(low), float(high)


def compare(problems: list[dict], files: list[str]) -> None:
    """The tables of two files of answers, and by how many points the first is ahead."""
    a, b = map(read_answers, files)
    if alone := sorted(a.keys() ^ b.keys()):
        raise UserError(f"{' and '.join(files)} answer different questions: {len(alone)} are in one of them "
                         f"only, such as {alone[0]} in {files[alone[0] not in a]}")
    print_table({file: score(problems, texts) for file, texts in zip(files, (a, b))})
    columns = ([p for p in problems if belongs(p)] for belongs in COLUMNS.values())
    ahead = [interval(grade(some, a), grade(some, b)) if some else (None,) * 3 for some in columns]
    print("\nPoints by which the first is ahead, and where 95% of 10,000 resampled tests lie:")
    print_columns(dict(zip(("ahead", "from", "to"), zip(*ahead))), "+.2f")


# ---------------------------------------------------------------------------------------------
# 3. Asking a model


def generate_answers(model: Llava, processor: Processor, problems: list[dict], batch_size: int = 16,
        max_new_tokens: int = 512, blank: bool = False, options: bool = False,
        tally: Counter | None = None) -> Iterator[tuple[dict, str, str]]:
    """Each problem with its prompt and the model's answer, the longest first: the rows of a batch are
    about as long, and what does not fit fails at once.

    blank hides every picture behind a white one: what is still right then was not seen. options
    takes the `likeliest` instead of letting the model write; tally["tokens"] counts what it writes.
    """
    problems = sorted(problems, key=lambda p: (bool(p["image"]), len(question(p))), reverse=True)
    bar = tqdm(total=len(problems), desc="asking", unit="question")
    for start in range(0, len(problems), batch_size):
        batch = problems[start:start + batch_size]
        prompts, inputs = [question(p) for p in batch], []
        for p, prompt in zip(batch, prompts):
            images = [open_image(p["file"])] if p["image"] else []
            images = [Image.new("RGB", image.size, "white") for image in images] if blank else images
            inputs.append(processor([{"role": "user", "content": prompt}], images))
        if options:
            texts = score_options(model, processor, batch, inputs)
        else:
            answers = model.generate_batch(**collate(inputs), eos_token_id=processor.eos,
                                           max_new_tokens=max_new_tokens)
            texts = [processor.decode(ids) for ids in answers]
            if tally is not None:
                tally["tokens"] += sum(map(len, answers))
        bar.update(len(batch))
        yield from zip(batch, prompts, texts)


def collate(inputs: list[dict], ending=()) -> dict:
    """What the processor made of some conversations as one right-padded batch, `ending` appended."""
    rows = [torch.cat((i["input_ids"][0], torch.tensor(ending, dtype=torch.int64))) for i in inputs]
    return {"input_ids": pad_sequence(rows, batch_first=True),
            "images": [image for i in inputs for image in i["images"]],
            "image_sizes": [size for i in inputs for size in i["image_sizes"]],
            "attention_mask": pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], True)}


@torch.inference_mode()
def score_options(model: Llava, processor: Processor, problems: list[dict], inputs: list[dict]) -> list[str]:
    """The option X of each problem for which "The answer is X" is the likeliest answer.

    Those answers differ in their last token alone. So all options of a question share one row, and
    their log-probabilities but for a constant stand at its end: one prefill, nothing to parse, and no
    option is favoured for being short, as its own words would be. But it asks for an answer without
    the reasoning that LEA puts before it: compare it with itself, never with written answers.
    """
    ids = [processor.encode(f"The answer is {letter}") for letter in LETTERS]
    if any(i[:-1] != ids[0][:-1] for i in ids):
        raise UserError("the tokenizer has no token for each of the letters A to E: use --answer generate")
    x, lengths, _ = model.splice(**collate(inputs, ending=ids[0][:-1]))
    hidden = model.language_model(x, select=(torch.arange(len(x)), lengths - 1))         # [B, C]
    logits = model.language_model.lm_head(hidden)[:, [i[-1] for i in ids]]               # [B, 5]
    return [f"The answer is {LETTERS[row[:len(p['choices'])].argmax()]}." for p, row in zip(problems, logits)]


def fingerprint(model: Llava, processor: Processor) -> str:
    """Eight digits that another config, tokenizer or training would change: of each tensor a few count."""
    numbers = torch.cat([p.detach().flatten()[:16].float() for p in model.parameters()]).cpu().numpy()
    text = repr(model.config) + processor.tokenizer_json
    return hashlib.sha256(text.encode() + numbers.tobytes()).hexdigest()[:8]


def resume(file: Path, problems: list[dict], made: dict) -> dict[str, str]:
    """The answers that `file` already holds, all `made` as this run makes them; a last line that an
    interrupt cut short is removed."""
    content = file.read_bytes() if file.exists() else b""
    whole, prompts = content.rfind(b"\n") + 1, {p["id"]: question(p) for p in problems}
    entries = read_entries(file, content[:whole])
    if not b'{"question_id"'.startswith(content[whole:][:14]):
        raise UserError(f"{file} is no file of answers: name another --out")
    for entry in entries:
        prompt, metadata = prompts.get(entry["question_id"]), entry.get("metadata") or {}
        differs = [key for key in made if metadata.get(key) != made[key]]
        differs += ["prompt"] * (prompt is not None and entry.get("prompt") != prompt)
        if differs:
            raise UserError(f"{file} has an answer to question {entry['question_id']} that was made with "
                             f"another {differs[0]}: name another --out")
    if whole < len(content):
        os.truncate(file, whole)
    return {entry["question_id"]: entry["text"] for entry in entries}


def append(file: Path, entry: dict) -> None:
    try:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise OSError(f"{file} cannot be written ({error.strerror}): make room, then go on from it") from None


def answer_all(args: argparse.Namespace, problems: list[dict]) -> dict[str, str]:
    """Ask the model what args.out does not answer yet, and append each answer there as it comes."""
    model, processor = load_model(args)
    made = {"dtype": args.dtype, "image_mode": model.config.image_mode, "prune": model.config.prune,
            "answer": args.answer, "max_new_tokens": args.max_new_tokens, "blank": args.blank,
            "model": fingerprint(model, processor)}
    texts = resume(args.out, problems, made) if args.out else {}
    left, tally, began = [p for p in problems if p["id"] not in texts], Counter(), time.perf_counter()
    for p, prompt, text in generate_answers(model, processor, left, args.batch_size, args.max_new_tokens, args.blank,
                               args.answer == "options", tally):
        texts[p["id"]] = text
        if args.out:
            append(args.out, {"question_id": p["id"], "prompt": prompt, "text": text,
                              "model_id": args.model, "metadata": made})
    seconds = time.perf_counter() - began
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters in {args.dtype}, "
          f"{len(left)} questions asked, {len(left) / seconds:.1f} questions/s, "
          f"{tally['tokens'] / seconds:.1f} tokens/s, {peak_memory(args.device) / 2**30:.2f} GiB at the peak")
    return texts


def peak_memory(device: str) -> int:
    """Bytes: on a GPU what the tensors took there, otherwise what the process took."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------
# 4. A judge: any endpoint that speaks OpenAI's chat protocol


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


# ---------------------------------------------------------------------------------------------
# 5. Cost. A multiply-add is two FLOPs; norms, softmax and activations are left out (below 0.1%)


def count_parameters(config: LlavaConfig) -> dict[str, int]:
    """How many numbers each part of a LLaVA holds: vision_tower, projector, language_model, and with
    AnyRes image_newline."""
    with torch.device("meta"):
        model = Llava(config)
    parts = Counter()
    for name, p in model.named_parameters():
        parts[name.split(".")[0]] += p.numel()
    return dict(parts)


def language_flops(text: TextConfig, tokens: int, logits: int = 1, causal: bool = True) -> int:
    """FLOPs of reading one row of `tokens`, with the logits of `logits` positions. `causal` counts
    the pairs of query and key that see each other; without it, as papers and torch's counter do,
    every pair."""
    C, D, H, K = text.hidden_size, text.head_dim, text.num_attention_heads, text.num_key_value_heads
    window = min(tokens, text.sliding_window or tokens)
    pairs = window * (window + 1) // 2 + (tokens - window) * window if causal else tokens**2
    linear = 2 * C * H * D + 2 * C * K * D + 3 * C * text.intermediate_size
    layer = 2 * tokens * linear + 4 * H * D * pairs
    return text.num_hidden_layers * layer + 2 * logits * C * text.vocab_size


def vision_flops(vision: VisionConfig, blocks: int) -> int:
    """FLOPs of one tile through the patch embedding and `blocks` blocks of the tower; LLaVA runs all
    but the last."""
    C, patches = vision.hidden_size, vision.side**2
    linear, tokens = 4 * C * C + 2 * C * vision.intermediate_size, 1 + patches
    return 2 * patches * 3 * vision.patch_size**2 * C + blocks * (2 * tokens * linear + 4 * C * tokens**2)


def projector_flops(config: LlavaConfig, patches: int) -> int:
    C = config.text.hidden_size
    return 2 * patches * C * (config.vision.hidden_size + C * (config.projector == "mlp2x_gelu"))


def cache_bytes(text: TextConfig, tokens: int, bytes_per_number: int = 2) -> int:
    """Keys and values of one row; past the window they grow no more."""
    slots = min(tokens, text.sliding_window or tokens)
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * slots * bytes_per_number


def counted_flops(config: LlavaConfig, tokens: int) -> tuple[int, int]:
    """What torch counts for the features of one tile, and for `tokens` read by the language model: on
    the meta device, where shapes are real and numbers are not. Without window, whose band it would pad."""
    config, S = replace(config, text=replace(config.text, sliding_window=None)), config.vision.image_size
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model = Llava(config)
        model.projector(model.vision_tower(torch.empty(1, 3, S, S), config.vision_feature_layer)[:, 1:])
        tile = counter.get_total_flops()
        hidden = model.language_model(torch.empty(1, tokens, config.text.hidden_size))
        model.language_model.lm_head(hidden[:, -1:])
    return tile, counter.get_total_flops() - tile


def costs(config: LlavaConfig, words: int) -> dict[str, float]:
    """Parameters, and the price of reading one picture and `words` tokens of text. FLOPs by the
    formulas and as torch counts them take every pair of tokens, those "causal" the pairs needed."""
    side, tiles = config.vision.image_size, 1
    if config.image_mode == "anyres":        # a square picture of twice the tower's size
        side *= 2
        tiles += math.prod(choose_grid((side, side), config.grids)) // config.vision.image_size**2
    tokens, parts = count_image_tokens(config, (side, side)) + words, count_parameters(config)
    blocks = config.vision.num_hidden_layers + 1 + config.vision_feature_layer
    flops = {"vision_tower": tiles * vision_flops(config.vision, blocks),
             "projector": projector_flops(config, tiles * config.vision.side**2),
             "language_model": language_flops(config.text, tokens, causal=False)}
    tile, language = counted_flops(config, tokens)
    hidden_pairs = flops["language_model"] - language_flops(config.text, tokens)
    total, size = sum(flops.values()), sum(parts.values())
    return {**{f"parameters, {part}": n for part, n in parts.items()},
            "parameters": size, "GiB in 16 bits": 2 * size / 2**30, "tokens, picture and text": tokens,
            **{f"TFLOPs, {part}": n / 1e12 for part, n in flops.items()}, "TFLOPs": total / 1e12,
            "TFLOPs, as torch counts": (tiles * tile + language) / 1e12,
            "TFLOPs, causal": (total - hidden_pairs) / 1e12,
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


def print_costs(configs: dict[str, LlavaConfig], words: int) -> None:
    columns = [costs(config, words) for config in configs.values()]
    print(" " * 26, *(f"{name:>19}" for name in configs))
    for key in columns[0]:
        form = "19," if isinstance(columns[0][key], int) else "19.5g"
        print(f"{key:26}", *(format(column[key], form) for column in columns))


def print_published() -> None:
    """Two published figures that deserve a second look: PruMerge's speed-up and Mistral's size."""
    print("""
PruMerge's Table II: TFLOPs of the language model as published and (by the formula) for 700 tokens,
pruned to 70; both in INT4, which is FP16 / 4: no operation is saved. Below it the honest row: all
576 tokens of the picture, then 40, with the same 30 of text.""")
    for name, (text, published) in TABLE_II.items():
        config = LlavaConfig(text=text)
        full, pruned, honest = (language_flops(text, n, causal=False) / 1e12 for n in (700, 70, 606))
        print(f"{name:10} 700 -> 70 ", *(
            f"{there:5} ({here:.3g})" + " <- looks wrong" * (abs(here / there - 1) > 0.05)
            for there, here in zip(published, (full, pruned, full / 4, pruned / 4))))
        before, after = ((vision_flops(config.vision, 23) + projector_flops(config, n)) / 1e12
                         for n in (576, 40))
        print(f"{name:10} 606 -> 70  {honest:5.3g} -> {pruned:.3g}, {honest / pruned:.1f} times fewer; with "
              f"the tower and the projector {(honest + before) / (pruned + after):.1f}")
    parts = [count_parameters(config) for config in PUBLISHED.values()]
    mistral, small, large, _ = (part["language_model"] for part in parts)
    whole = 1 - sum(parts[0].values()) / sum(parts[3].values())
    print(f"""
"46 percent smaller": Mistral-7B has {1 - mistral / large:.1%} fewer parameters than LLaMA-13B, the LLaVA
on it {whole:.1%} fewer than LLaVA-13B; 46% is 1 - 7/13, the names. Beside LLaMA-7B it has
{mistral / small - 1:.1%} more.""")


# ---------------------------------------------------------------------------------------------
# 6. The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scienceqa", metavar="DIR", help="folder with problems.json")
    add("--split", default="test", help="default: %(default)s")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--model", metavar="ID", help="folder, run or hub id of the LLaVA to ask")
    who.add_argument("--predictions", metavar="FILE", help="answers to score, as --out writes them")
    who.add_argument("--compare", nargs=2, metavar=("A", "B"), help="answers to score side by side")
    add("--cost", nargs="?", type=number(int, 1), const=30, metavar="N",
        help="size, FLOPs and memory for a picture and N tokens (%(const)s): of --model, or as published")
    add("--answer", default="generate", choices=("generate", "options"),
        help="let it write, or take the likeliest option (default: %(default)s)")
    add("--pictures", default="any", choices=("any", "only", "none"),
        help="questions with or without pictures (default: %(default)s)")
    add("--blank", action="store_true", help="hide every picture: what is right then is guessed")
    add("--out", type=Path, metavar="FILE", help="keep the answers, one JSON line each, and go on from those")
    add("--batch-size", type=number(int, 1), default=16, metavar="N", help="questions at once (%(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N questions")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N", help="default: %(default)s")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.cost is None and not (args.scienceqa and (args.model or args.predictions or args.compare)):
        parser.error("--scienceqa with --model, --predictions or --compare is needed, or --cost")
    return args


def main() -> None:
    args = parse_args()
    if args.cost is not None:
        print_costs({args.model: LlavaConfig(**open_checkpoint(args.model, weights=False)[0])}
                    if args.model else PUBLISHED, args.cost)
        return None if args.model else print_published()
    problems = read_scienceqa(args.scienceqa, args.split, args.pictures, args.limit)
    if not problems:
        raise UserError(f"{args.scienceqa}: no question of split {args.split!r} is left to ask")
    if args.compare:
        return compare(problems, args.compare)
    texts = read_answers(args.predictions) if args.predictions else answer_all(args, problems)
    print_table({args.split: score(problems, texts)})
    print("Avg {:.2f}, and in 95% of 10,000 resampled tests from {:.2f} to {:.2f}".format(
        *interval(grade(problems, texts))))


if __name__ == "__main__":
    command_line(main)
