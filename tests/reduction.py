"""A study of token reduction: each method beside random patches, on toy data with 64 patches an image.

    python tests/reduction.py --out runs/reduction --seeds 3

trains a LLaVA with all tokens and evaluates it on the image questions of the test split, with each method at
1/2, 1/4 and 1/8 of the tokens. It then trains both stages with each method but prumerge at 1/4. Every command
is printed; a finished command is not repeated. The results are written to table.md and table.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import prune
from eval import read_scienceqa, to_record
from llava import command_line, write_json
from tests import toy

METHODS = ("random", "pool", "divprune", "prumerge", "prumerge+")
TRAINED = ("random", "pool", "divprune", "prumerge+")
BUDGETS = (32, 16, 8)                        # tokens an image, of 64


def train_both_stages(data: Path, folder: Path, seed: int, *flags) -> None:
    prune.run_command("train.py", "--stage", 1, "--vision", data / "clip", "--language", data / "mistral",
                      "--data", data / "pretrain.json", "--images", data / "pretrain", "--seed", seed,
                      "--epochs", 5, "--lr", 6e-3, *flags, "--resume", "--out", folder / "stage1")
    prune.run_command("train.py", "--stage", 2, "--init", folder / "stage1", "--data", data / "train.json",
                      "--images", data / "scienceqa" / "images" / "train", "--seed", seed, "--epochs", 12,
                      "--lr", 1e-3, "--resume", "--out", folder / "stage2")


def evaluate(data: Path, model: Path, out: Path, *flags) -> None:
    prune.run_command("eval.py", "--scienceqa", data / "scienceqa", "--pictures", "only", "--batch-size", 64,
                      "--max-new-tokens", 48, "--model", model, *flags, "--out", out)


def run_study(data: Path, out: Path, seeds: int) -> None:
    """Train and evaluate all models: with all tokens in none-SEED, with a method in METHOD-SEED."""
    for seed in range(seeds):
        folder = out / f"none-{seed}"
        train_both_stages(data, folder, seed)
        evaluate(data, folder / "stage2", folder / "none.jsonl")
        for method in METHODS:
            for budget in BUDGETS:
                evaluate(data, folder / "stage2", folder / f"{method}-{budget}.jsonl", "--prune", method,
                         "--keep-tokens", budget)
        for method in TRAINED:
            folder = out / f"{method}-{seed}"
            train_both_stages(data, folder, seed, "--prune", method, "--keep-tokens", 16)
            evaluate(data, folder / "stage2", folder / "trained.jsonl")


def summarize(data: Path, out: Path, seeds: int) -> None:
    """Print and write the table: percent of the image questions answered correctly, with 95% intervals over
    trainings and questions, and the difference from random patches at 1/4, paired by seed and question."""
    questions = read_scienceqa(data / "scienceqa", "test", "only")

    def read_correct(trained_with: str, file: str) -> dict:     # seed -> [N], for the finished trainings
        files = {seed: out / f"{trained_with}-{seed}" / file for seed in range(seeds)}
        return {seed: prune.correct(questions, file) for seed, file in files.items()
                if file.with_name(f"{file.name}.done").exists()}

    def accuracy(correct: dict) -> prune.Cell:
        return prune.accuracy_cell(np.stack(list(correct.values()))) if correct else prune.Cell("-")

    columns = ["trainings with 64, with 16", "all 64", *(f"{n} of 64" for n in BUDGETS), "trained with 16",
               "ahead, 16 of 64", "ahead, trained"]
    all_tokens = read_correct("none", "none.jsonl")
    rows = {"none": [prune.Cell(str(len(all_tokens))), accuracy(all_tokens), *[prune.Cell("-")] * 6]}
    for method in METHODS:
        reduced = {budget: read_correct("none", f"{method}-{budget}.jsonl") for budget in BUDGETS}
        trained = read_correct(method, "trained.jsonl")
        if method == "random":
            random_reduced, random_trained = reduced[16], trained
        rows[method] = [prune.Cell(f"{len(reduced[16])}, {len(trained)}"), prune.Cell("-"),
                        *map(accuracy, reduced.values()), accuracy(trained),
                        prune.difference_cell(reduced[16], random_reduced),
                        prune.difference_cell(trained, random_trained)]
    prune.print_cells(columns, rows)
    prune.draw_cells(columns, rows, out / "table.png")
    lines = [["", *columns], ["-"] * (1 + len(columns))]
    lines += [[name, *(cell.text for cell in row)] for name, row in rows.items()]
    (out / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/toy64"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/reduction"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="only write the table of the finished trainings")
    args = parser.parse_args()
    toy.build(args.data, ("scienceqa", "pretrain", "clip", "mistral"), patch_size=8)
    write_json(args.data / "train.json",
               [to_record(p) for p in read_scienceqa(args.data / "scienceqa", "train")])
    if not args.table:
        run_study(args.data, args.out, args.seeds)
    summarize(args.data, args.out, args.seeds)


if __name__ == "__main__":
    command_line(main)
