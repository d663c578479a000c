"""Choose what to learn from: 1,000 of ScienceQA's 12,726 questions, by rules, by distance or by chance.

    python prune.py --scienceqa data/ScienceQA --method guided --keep 1000 --explain --out guided.json
    python prune.py --scienceqa data/ScienceQA --method maxmin --keep 1000 --out maxmin.json \\
        --model llava-hf/llava-1.5-7b-hf
    python prune.py --scienceqa data/ScienceQA --report guided.json maxmin.json --picture report.png
    python prune.py --scienceqa data/ScienceQA --study runs/study --keep 1000 \\
        --pretrain blip_laion_cc_sft_558k.json --vision openai/clip-vit-large-patch14-336 \\
        --language mistralai/Mistral-7B-v0.1 huggyllama/llama-7b

A choice is written as LLaVA's records, which train.py reads. A report holds choices against the
whole and against each other. A study trains on each, and asks the models the test questions.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from eval import (answer, collate, fingerprint, grade, interval, question, read_answers, read_scienceqa,
                  to_record)
from llava import (IGNORE, TEMPLATES, Llava, Processor, add_model_flags, command_line, farthest_points, open_image,
                   load_model, number, read_json, read_object, atomic_write, write_json, UserError)

WITH_PICTURE = 0.85                          # guided: at least this share, while there are pictures
POINTS = re.compile(r"\b(picture|image|photo|map|diagram|graph|table|figure)s?\b|"
                    r"\b(shown|below|highlighted|marked|labeled|colored|these)\b", re.IGNORECASE)
FIELDS = ("subject", "topic", "grade", "picture", "category", "skill")


# ---------------------------------------------------------------------------------------------
# 1. Choosing k of the problems. Each method gives index -> why it is kept, in order of choice.


def choose_all(problems: list[dict], k: int, args) -> dict[int, str]:
    return dict.fromkeys(range(len(problems)), "everything is kept")


def choose_random(problems: list[dict], k: int, args) -> dict[int, str]:
    chosen = random.Random(args.seed).sample(range(len(problems)), k)
    return dict.fromkeys(chosen, f"by chance, seed {args.seed}")


def stratified(problems: list[dict], k: int, args) -> dict[int, str]:
    """Every (N / k)-th of the shuffled questions, laid out topic by topic: each question has the
    same chance, and each topic its share, give or take one."""
    chance = random.Random(args.seed)
    order = chance.sample(range(len(problems)), len(problems))
    order.sort(key=lambda i: (problems[i]["subject"], problems[i]["topic"]))
    offset = chance.random()
    chosen = [order[int((j + offset) * len(order) / k)] for j in range(k)]
    return dict.fromkeys(chosen, f"by chance within its topic, seed {args.seed}")


def maxmin(problems: list[dict], k: int, args) -> dict[int, str]:
    """The farthest apart in a LLaVA's hidden states."""
    states = measure(problems, args, args.pooling).to(args.device)
    return dict.fromkeys(farthest_points(states, k).tolist(), "the farthest from those before it")


def guided(problems: list[dict], k: int, args) -> dict[int, str]:
    """The seed paper's guidelines (see the picture, cover choose_all, prefer the hard) as rules: a
    proxy for the eyes of its authors.

    One by one: the first of a subject, of a topic, of a skill; then by the square roots of the
    topics' sizes, so that large ones stay larger without crowding out the others. Always with a
    picture where there is one: those without get no more than 15% of k, new topics aside. Within a
    topic one whose words point at the picture, then one asked in words not kept yet; the hardest.
    """
    signs = difficulty_signs(problems, args)
    hard = sum(map(percentiles, signs.values())) / len(signs)             # [N]
    picture = np.array([bool(p["image"]) for p in problems])
    need = picture * [1 + bool(POINTS.search(f"{p['question']} {p['hint']}")) for p in problems]
    group = {field: np.unique([p[field] for p in problems], return_inverse=True)[1]
             for field in ("subject", "topic", "skill", "question")}
    held = {field: np.zeros(len(problems)) for field in group}            # kept of each one's group
    size = np.bincount(group["topic"])[group["topic"]]
    free, kept = np.ones(len(problems), bool), {}
    for _ in range(k):
        spare = picture[list(kept)].sum() + k - len(kept) - 1 >= WITH_PICTURE * k
        first = {"subject": held["subject"] == 0, "topic": held["topic"] == 0,
                 "skill": (held["skill"] == 0) & (picture | spare)}
        level, pool = np.select([*first.values(), picture], [4, 3, 2, 1]), np.flatnonzero(free)
        for key in (level, picture, np.sqrt(size) / (1 + held["topic"]), need, -held["question"], hard):
            pool = pool[key[pool] == key[pool].max()]
        i = int(pool[0])
        news = [f"the first of {field} {problems[i][field]}" for field in first if first[field][i]]
        news.append(f"number {held['topic'][i] + 1:.0f} of the {size[i]} of topic {problems[i]['topic']}")
        sight = ("it has no picture", "it has a picture", "it points at its picture")[need[i]]
        kept[i] = f"{news[0]}; {sight}; harder than {hard[i]:.0%}: " + ", ".join(
            f"{name} {values[i]:.4g}" for name, values in signs.items())
        free[i] = False
        for field in group:
            held[field] += group[field] == group[field][i]
    return kept


def difficulty_signs(problems: list[dict], args) -> dict[str, np.ndarray]:
    """What can be measured of how hard each question is: sign -> [N]."""
    signs = {"words of reasoning": [len(p["solution"].split()) for p in problems],
             "options": [len(p["choices"]) for p in problems],
             "numbers in the solution": [len(re.findall(r"\d+", p["solution"])) for p in problems],
             "grade": [int(p["grade"].removeprefix("grade")) for p in problems]}
    if args.captions:                        # {id: text}, or ScienceQA's own {"captions": {id: text}}
        texts = read_object(args.captions)
        texts = texts.get("captions", texts)
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise UserError(f"{args.captions} does not give a text for each question id")
        signs["words in the picture"] = [len(texts.get(p["id"], "").split()) for p in problems]
    if args.method == "guided" and args.model:
        signs["loss"] = measure(problems, args, "loss")[:, 0]
    return {name: np.asarray(values, float) for name, values in signs.items()}


def percentiles(values: np.ndarray) -> np.ndarray:
    """The share of all values that each one exceeds; equals count half."""
    order = np.sort(values)
    return (order.searchsorted(values, "left") + order.searchsorted(values, "right")) / (2 * len(order))


METHODS = {"all": choose_all, "random": choose_random, "stratified": stratified, "maxmin": maxmin,
           "guided": guided}


# ---------------------------------------------------------------------------------------------
# 2. What a LLaVA makes of the questions


def measure(problems: list[dict], args, what: str) -> Tensor:
    """What `look` sees, [N, C] or [N, 1]. Rows go to disk as they come, NaN before: an interrupted
    run goes on, a finished one is only read. Without --model the cache is taken as it is."""
    folder = args.cache or args.out.with_suffix(".cache")
    file, notes, asked = folder / f"{what}.npy", folder / f"{what}.json", [question(p) for p in problems]
    made = {"questions": hashlib.sha256(repr(asked).encode()).hexdigest()[:8]}
    if args.model:
        model, processor = load_model(args)
        made |= {"model": fingerprint(model, processor), "layer": args.layer}
    elif not file.exists():
        raise UserError(f"there is no {file}: name the --model to make it with")
    if file.exists():
        theirs = read_json(notes)
        if other := [name for name in made if theirs.get(name) != made[name]]:
            raise UserError(f"{file} differs in {' and '.join(other)} from this call: name another --cache")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(notes, made)
        width = 1 if what == "loss" else model.config.text.hidden_size
        with atomic_write(file) as part, part.open("wb") as empty:
            np.save(empty, np.full((len(problems), width), np.nan, np.float32))
    rows = np.load(file, mmap_mode="r+")
    left = np.flatnonzero(~np.isfinite(rows).all(1)).tolist()
    if left and not args.model:
        raise UserError(f"{file} is unfinished: name the --model to go on with")
    if left:
        fill(rows, left, problems, model, processor, args, what)
    return torch.from_numpy(np.array(rows))


def fill(rows: np.ndarray, left: list[int], problems: list[dict], model: Llava, processor: Processor,
         args, what: str) -> None:
    """Compute the rows that are left, the longest first: those of a batch are of a length."""
    if what != "loss":
        cut_layers(model, args.layer)
    left = sorted(left, key=lambda i: (bool(problems[i]["image"]), len(question(problems[i]))), reverse=True)
    bar = tqdm(total=len(rows), initial=len(rows) - len(left), desc=f"reading ({what})", unit="question")
    for start in range(0, len(left), args.batch_size):
        batch, inputs = left[start:start + args.batch_size], []
        for p in (problems[i] for i in batch):
            messages = [{"role": "user", "content": question(p)}, {"role": "assistant", "content": answer(p)}]
            images = [open_image(p["file"])] if p["image"] else []
            inputs.append(processor(messages[:1 + (what == "loss")], images, labels=True))
        rows[batch] = look(model, inputs, what).float().cpu()
        if bad := [i for i in batch if not np.isfinite(rows[i]).all()]:
            raise UserError(f"{args.model} makes of question {problems[bad[0]]['id']} what is not finite: "
                             "try --dtype float32")
        bar.update(len(batch))


def cut_layers(model: Llava, layer: int) -> None:
    """Let the language model end after `layer`, counted like transformers' hidden_states: 0 is the
    embeddings, -1 the last layer, whose states alone are normed."""
    blocks = model.language_model.layers
    if not -len(blocks) - 1 <= layer <= len(blocks):
        raise UserError(f"--layer {layer}: the language model has {len(blocks)} layers")
    if layer % (len(blocks) + 1) < len(blocks):
        model.language_model.layers = blocks[:layer % (len(blocks) + 1)]
        model.language_model.norm = nn.Identity()


@torch.inference_mode()
def look(model: Llava, inputs: list[dict], what: str) -> Tensor:
    """"last": the state of each prompt's last token, from which the answer would begin, [B, C];
    "mean": that of all its tokens; "loss": the mean loss of the answer's tokens, [B, 1]."""
    labels = pad_sequence([i["labels"][0] for i in inputs], batch_first=True, padding_value=IGNORE)
    x, lengths, labels = model.splice(**collate(inputs), labels=labels)
    hidden = model.language_model(x)                                      # [B, T', C]
    if what == "last":
        return hidden[torch.arange(len(x)), lengths - 1]
    if what == "mean":
        return torch.stack([states[:n].float().mean(0) for states, n in zip(hidden, lengths)])
    hidden, labels, learned = hidden[:, :-1], labels[:, 1:], labels[:, 1:] != IGNORE
    return torch.stack([F.cross_entropy(model.language_model.lm_head(states[some]).float(), row[some])
                        for states, row, some in zip(hidden, labels, learned)])[:, None]


# ---------------------------------------------------------------------------------------------
# 3. A choice and reports: rows of cells, printed as a table and drawn as bars


class Cell(NamedTuple):
    text: str
    share: float = 0.0                       # of the full length of its bar
    between: tuple[float, float] | None = None       # an interval, in shares


def count(n: int, of: int) -> Cell:
    return Cell(f"{n} {n / of:6.1%}", n / of)


def coverage(sets: dict[str, list[dict]], fields) -> dict[str, list[Cell]]:
    """How the questions of each set fall on each subject, topic, ..., and how many of those of the
    first set, the whole, are there at all; categories and skills are hundreds, and only counted."""
    rows = {}
    for field in fields:
        counts = [Counter(p[field] for p in problems) for problems in sets.values()]
        for value, _ in counts[0].most_common() if field not in ("category", "skill") else ():
            rows[f"{field}: {value}"] = [count(c[value], c.total()) for c in counts]
        if field != "picture":               # of two kinds, either may be missing on purpose
            rows[f"{field}: covered"] = [count(len(c), len(counts[0])) for c in counts]
    return rows


def comparison(sets: dict[str, list[dict]]) -> dict[str, list[Cell]]:
    """How often the same is asked in the same words, and what the sets have in common."""
    rows = {"repeated questions": [], "most repeated": []}
    for problems in sets.values():
        texts = Counter(p["question"] for p in problems)
        rows["repeated questions"].append(count(len(problems) - len(texts), len(problems)))
        rows["most repeated"].append(count(max(texts.values()), len(problems)))
    ids = {name: {p["id"] for p in problems} for name, problems in sets.items()}
    for name, these in ids.items():
        rows[f"also in {name}"] = [count(len(these & others), len(others)) for others in ids.values()]
    return rows


def print_cells(columns: list[str], rows: dict[str, list[Cell]]) -> None:
    left = max(map(len, rows))
    table = [columns, *([cell.text for cell in row] for row in rows.values())]
    widths = [max(map(len, texts)) for texts in zip(*table)]
    for name, texts in zip(("", *rows), table):
        print(f"{name:{left}}", *(f"{text:>{width}}" for text, width in zip(texts, widths)), sep="  ")


def draw_cells(columns: list[str], rows: dict[str, list[Cell]], file: Path, height: int = 24) -> None:
    """The same, a bar behind each cell, and a line along its foot where there is an interval."""
    measured = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    left = 20 + int(max(map(measured, rows)))
    full = 20 + int(max(measured(t) for t in [*columns, *(c.text for row in rows.values() for c in row)]))
    picture = Image.new("RGB", (left + (full + 10) * len(columns), height * (len(rows) + 1)), "white")
    pen = ImageDraw.Draw(picture)
    for y, (name, row) in enumerate({"": map(Cell, columns), **rows}.items()):
        top, foot = height * y, height * (y + 1) - 4
        pen.text((10, top + 4), name, "black")
        for i, cell in enumerate(row):
            x = left + (full + 10) * i
            if cell.share > 0:
                pen.rectangle((x, top, x + full * cell.share, foot), "#b4cbee")
            if cell.between:
                pen.line([(x + full * share, foot) for share in cell.between], "#2050b0", 3)
            pen.text((x + 4, top + 4), cell.text.strip(), "black")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def read_id_list(file: Path) -> dict[str, dict]:
    """id -> record, of a JSON list of records or of ids alone."""
    entries = read_json(file)
    if not isinstance(entries, list) or any(isinstance(e, dict) and "id" not in e for e in entries):
        raise UserError(f"{file} is neither a list of records with ids nor one of ids")
    entries = [e if isinstance(e, dict) else {"id": e} for e in entries]
    return {str(e["id"]): e for e in entries}


def listed(problems: list[dict], file: Path) -> dict[int, str]:
    """A published choice: index -> why."""
    where = {p["id"]: i for i, p in enumerate(problems)}
    names = read_id_list(file)
    if lost := [name for name in names if name not in where]:
        raise UserError(f"{file} lists {len(lost)} questions, such as {lost[0]}, that are not among the "
                         f"{len(where)} to choose from")
    return {where[name]: f"listed in {file}" for name in names}


def read_problems(args) -> list[dict]:
    """Those of --scienceqa; without it what the records of --report tell of theirs."""
    if args.scienceqa:
        problems = read_scienceqa(args.scienceqa, args.split, args.pictures)
        return [p | {"picture": "yes" if p["image"] else "no"} for p in problems]
    records = {}
    for file in args.report:
        for name, record in read_id_list(file).items():
            if "conversations" not in record:
                raise UserError(f"{file} lists ids alone: name the --scienceqa that they belong to")
            if records.setdefault(name, record)["conversations"] != record["conversations"]:
                raise UserError(f"{file} has another question {name} than the files before it")
    return [{"id": name, "picture": "yes" if "image" in record else "no",
             "question": record["conversations"][0]["value"].split("\nContext: ")[0]}
            for name, record in records.items()]


def choose(args) -> None:
    problems, method = read_problems(args), args.method or "from-list"
    k = 1000 if args.keep is None else args.keep
    subjects = len({p["subject"] for p in problems})
    if method not in ("all", "from-list") and not 0 < k <= len(problems):
        raise UserError(f"--keep {k} is not between 1 and the {len(problems)} questions to choose from")
    if method in ("stratified", "guided") and k < subjects:
        raise UserError(f"--keep {k} is too few for {subjects} subjects")
    kept = METHODS[method](problems, k, args) if args.method else listed(problems, args.from_list)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, [to_record(problems[i]) for i in kept])
    sets = {"whole": problems, method: [problems[i] for i in kept]}
    print_cells(list(sets), coverage(sets, ("subject", "topic", "picture")))
    print(f"{args.out}: {len(kept)} of {len(problems)} questions")
    if args.explain:
        reasons = args.out.with_suffix(".why.json")
        write_json(reasons, [{"id": problems[i]["id"], "why": why} for i, why in kept.items()])
        print(f"{reasons}: why each is kept")


def print_report(args) -> None:
    problems, stems = read_problems(args), [file.stem for file in args.report]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in args.report]
    kept = {"whole": list(range(len(problems)))} if args.scienceqa else {}
    kept |= {name: list(listed(problems, file)) for name, file in zip(names, args.report)}
    sets = {name: [problems[i] for i in some] for name, some in kept.items()}
    rows = coverage(sets, FIELDS if args.scienceqa else ("picture",)) | comparison(sets)
    for sign, values in (difficulty_signs(problems, args) if args.scienceqa else {}).items():
        means = [percentiles(values)[some].mean() for some in kept.values()]
        rows[f"percentile of {sign}"] = [Cell(f"{mean:.1%}", mean) for mean in means]
    if args.cache:
        states = measure(problems, args, args.pooling)
        least = [float(F.pdist(states[kept[name]]).min()) for name in names]
        cells = [Cell(f"{distance:.4g}", distance / max(1e-9, *least)) for distance in least]
        rows["smallest distance"] = [Cell("-")] * (len(kept) - len(cells)) + cells
    print_cells(list(sets), rows)
    if args.picture:
        draw_cells(list(sets), rows, args.picture)


# ---------------------------------------------------------------------------------------------
# 4. The study

VARIANTS = {                                 # what to learn from, what to do differently
    "all": ("all", ()),
    "all, one epoch": ("all", ("--epochs", 1)),      # about as many steps as a twelfth has in 12
    "random": ("random", ()),
    "stratified": ("stratified", ()),
    "maxmin": ("maxmin", ()),
    "guided": ("guided", ()),
    "guided, plain": ("guided", ("--template", "plain")),    # the seed paper's: never sees a question
}


def study(args) -> None:
    """Train each backbone on each choice, several times; ask all the test questions, with their
    pictures and with white ones. Everything runs as a command that is printed first and may as
    well be typed; what has ended well is not run again."""
    names = [Path(language.partition("@")[0]).name for language in args.language]
    shared = [word for flag in ("tokenizer", "image_mode", "device", "dtype") if getattr(args, flag)
              for word in (f"--{flag.replace('_', '-')}", getattr(args, flag))]
    for name, language in zip(names, args.language):
        run_command("train.py", "--stage", 1, "--vision", args.vision, "--language", language,
            "--data", args.pretrain, "--images", args.pretrain.with_suffix(""), *shared,
            *shlex.split(args.stage1), "--resume", "--out", args.study / name / "stage1")
    reader, runs = args.model or args.study / names[-1] / "stage1", {}
    for seed in range(args.seeds):
        for variant, (method, recipe) in VARIANTS.items():
            chance = method in ("random", "stratified")
            records = args.study / "sets" / f"{method}{f'-{seed}' * chance}.json"
            run_command("prune.py", "--scienceqa", args.scienceqa, "--method", method, "--keep", args.keep,
                *("--seed", seed) * chance, *("--model", reader, *shared) * (method == "maxmin"),
                "--out", records)
            for name in names:
                folder = args.study / name / f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}"
                runs.setdefault((name, variant), []).append(folder)
                train_and_ask(args, folder, records, seed, recipe, shared)
    summarize(args, names, runs)


def train_and_ask(args, folder: Path, records: Path, seed: int, recipe, shared: list[str]) -> None:
    run_command("train.py", "--stage", 2, "--init", folder.parent / "stage1", "--data", records,
        "--images", Path(args.scienceqa, "images", "train"), "--seed", seed, *shared,
        *shlex.split(args.stage2), *recipe, "--resume", "--out", folder)
    chat = TEMPLATES[read_json(folder / "config.json")["text_config"]["model_type"]]
    for control, flags in (("test", ()), ("blank", ("--pictures", "only", "--blank"))):
        run_command("eval.py", "--scienceqa", args.scienceqa, "--model", folder, "--template", chat, *flags,
            *shared, *shlex.split(args.eval), "--out", folder / f"{control}.jsonl")
    shutil.rmtree(folder / "trainer", ignore_errors=True)                 # 60 GB at 7B; the weights stay


def run_command(program: str, *flags) -> None:
    """One of the project's programs, unless its --out, the last flag, is there already."""
    out, words = flags[-1], [str(flag) for flag in flags]
    done, line = out.with_name(f"{out.name}.done"), shlex.join(["python", program, *words])
    if done.exists() and done.read_text() != line:
        raise UserError(f"{out} was made by another command: remove it and {done}, or name another --study; "
                         f"it was {done.read_text()}")
    if done.exists():
        return
    print(f"\n$ {line}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen([sys.executable, Path(__file__).with_name(program), *words])
    try:
        failed = process.wait()
    except KeyboardInterrupt:                # the program got it too, and may have something to save
        process.wait()
        raise
    if failed:
        raise UserError(f"{program} failed, see above; the study goes on from here when it is run again")
    done.write_text(line)


def summarize(args, names: list[str], runs: dict[tuple[str, str], list[Path]]) -> None:
    """Percent right, and points ahead of others on the same questions, as a table and a picture.
    Intervals come from drawing the questions anew; the seeds' answers to one are drawn together."""
    test = read_scienceqa(args.scienceqa, "test")
    pictured = [p for p in test if p["image"]]
    right = {key: count_right(test, folders, "test") for key, folders in runs.items()}
    rows, columns = {}, ["all questions", "with picture", "picture blanked", "ahead of random",
                         f"ahead of {names[0]}"]
    for (name, variant), folders in runs.items():
        mine, blank = right[name, variant], count_right(pictured, folders, "blank")
        seen = mine[[bool(p["image"]) for p in test]]
        others = right[name, "random"], right[names[0], variant]
        rows[f"{name}: {variant}"] = []
        for counts in ((mine,), (seen,), (blank,), *((mine, other) for other in others)):
            x, low, high = (value / args.seeds for value in interval(*counts))
            bar = (x / 100, (low / 100, high / 100)) if len(counts) == 1 else ()
            sign = "" if bar else "+"
            text = f"{x:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
            rows[f"{name}: {variant}"].append(Cell(text, *bar))
    print_cells(columns, rows)
    draw_cells(columns, rows, args.study / "study.png")
    lines = [["", *columns], ["-"] * 6, *([name, *(cell.text for cell in row)] for name, row in rows.items())]
    with atomic_write(args.study / "study.md") as file:
        file.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def count_right(problems: list[dict], folders: list[Path], control: str) -> np.ndarray:
    """How many of the runs answer each problem right, [N]."""
    total = np.zeros(len(problems), int)
    for folder in folders:
        texts = read_answers(folder / f"{control}.jsonl")
        if texts.keys() != {p["id"] for p in problems}:
            raise UserError(f"{folder / control}.jsonl answers other questions than the {len(problems)} of "
                             "this study: remove it and its .done, and run the study again")
        total += grade(problems, texts)
    return total


# ---------------------------------------------------------------------------------------------
# 5. The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, task = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--method", choices=METHODS, help="choose")
    task.add_argument("--from-list", type=Path, metavar="FILE", help="choose as listed: records or ids")
    task.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="compare choices")
    task.add_argument("--study", type=Path, metavar="DIR", help="compare what is learned from them")
    add("--scienceqa", metavar="DIR", help="folder with problems.json")
    add("--split", default="train", help="default: %(default)s")
    add("--pictures", default="any", choices=("any", "only", "none"),
        help="questions with or without pictures (default: %(default)s)")
    add("--keep", type=int, metavar="K", help="how many to choose (default: 1000; in a study a twelfth)")
    add("--seed", type=int, default=0, help="of what is left to chance (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="for the records")
    add("--explain", action="store_true", help="write beside --out why each is kept")
    add("--captions", type=Path, metavar="FILE", help="guided: {id: words to be read in the picture}")
    add("--model", metavar="ID", help="maxmin: the LLaVA to read states of; guided: whose loss counts, too")
    add("--layer", type=int, default=-1, metavar="L", help="maxmin: 0 the embeddings, -1 the end (default)")
    add("--pooling", default="last", choices=("last", "mean"), help="maxmin: the prompt's last token or mean")
    add("--batch-size", type=number(int, 1), default=16, metavar="N", help="questions at once (default: %(default)s)")
    add("--cache", type=Path, metavar="DIR", help="for states and losses (default: beside --out)")
    add("--picture", type=Path, metavar="FILE", help="draw the report")
    add("--pretrain", type=Path, metavar="FILE", help="study: captions; pictures in a folder of that name")
    add("--vision", metavar="ID", help="study: the CLIP")
    add("--language", nargs="+", metavar="ID", help="study: the language models")
    add("--seeds", type=int, default=2, metavar="N", help="study: runs of each kind (default: %(default)s)")
    for name, program in (("stage1", "train.py"), ("stage2", "train.py"), ("eval", "eval.py")):
        add(f"--{name}", default="", metavar="FLAGS", help=f"study: more flags for {program}, in quotes")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if not (args.scienceqa or args.report):
        parser.error("--scienceqa is needed")
    if args.picture and args.picture.suffix not in Image.registered_extensions():
        parser.error("--picture needs the name of an image file, such as report.png")
    if (args.method or args.from_list) and not args.out:
        parser.error("--out is needed")
    if args.study and not (args.pretrain and args.vision and args.language):
        parser.error("--study needs --pretrain, --vision and --language")
    if args.study and not args.keep:
        args.keep = len(read_scienceqa(args.scienceqa, "train")) // 12
    return args


def main() -> None:
    args = parse_args()
    (study if args.study else print_report if args.report else choose)(args)


if __name__ == "__main__":
    command_line(main)
