"""Token reduction beside its controls, on toy data with a tower of 64 patches.

    python tests/reduction.py --out runs/reduction --seeds 3

Trains a LLaVA on all tokens and asks it the image questions of the test split with each method at 1/2,
1/4 and 1/8 of the tokens; then trains both stages with each method at 1/4. Every step is a command
that is printed and not run twice. Writes table.md and table.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

import prune
from eval import read_scienceqa, to_record
from llava import write_json
from tests import toy

METHODS = ("random", "pool", "divprune", "prumerge", "prumerge+")
TRAINED = ("random", "pool", "divprune", "prumerge+")
BUDGETS = (32, 16, 8)                        # of 64


def train(data: Path, folder: Path, seed: int, *flags) -> None:
    prune.run_command("train.py", "--stage", 1, "--vision", data / "clip", "--language", data / "mistral",
                      "--data", data / "pretrain.json", "--images", data / "pretrain", "--seed", seed,
                      "--epochs", 5, "--lr", 6e-3, *flags, "--resume", "--out", folder / "stage1")
    prune.run_command("train.py", "--stage", 2, "--init", folder / "stage1", "--data", data / "train.json",
                      "--images", data / "scienceqa" / "images" / "train", "--seed", seed, "--epochs", 12,
                      "--lr", 1e-3, "--resume", "--out", folder / "stage2")


def ask(data: Path, model: Path, out: Path, *flags) -> None:
    prune.run_command("eval.py", "--scienceqa", data / "scienceqa", "--pictures", "only", "--batch-size", 64,
                      "--max-new-tokens", 48, "--model", model, *flags, "--out", out)


def run(data: Path, out: Path, seeds: int) -> None:
    for seed in range(seeds):
        folder = out / f"none-{seed}"
        train(data, folder, seed)
        ask(data, folder / "stage2", folder / "none.jsonl")
        for method in METHODS:
            for budget in BUDGETS:
                ask(data, folder / "stage2", folder / f"{method}-{budget}.jsonl", "--prune", method,
                    "--keep-tokens", budget)
        for method in TRAINED:
            trained = out / f"{method}-{seed}"
            train(data, trained, seed, "--prune", method, "--keep-tokens", 16)
            ask(data, trained / "stage2", trained / "trained.jsonl")


def summarize(data: Path, out: Path, seeds: int) -> None:
    """Percent of the image questions answered correctly, with 95% intervals over trainings and questions,
    and the lead over random patches at 1/4, paired by seed and question."""
    questions = read_scienceqa(data / "scienceqa", "test", "only")

    def correct(name: str, file: str) -> dict:           # seed -> [N], of the finished runs
        files = {seed: out / f"{name}-{seed}" / file for seed in range(seeds)}
        return {seed: prune.correct(questions, file) for seed, file in files.items()
                if file.with_name(f"{file.name}.done").exists()}

    def accuracy(runs: dict) -> prune.Cell:
        return prune.accuracy_cell(np.stack(list(runs.values()))) if runs else prune.Cell("-")

    columns = ["trainings", "all 64", *(f"{n} of 64" for n in BUDGETS), "trained with 16", "ahead, 16 of 64", "ahead, trained"]
    whole = correct("none", "none.jsonl")
    rows = {"none": [prune.Cell(str(len(whole))), accuracy(whole), *[prune.Cell("-")] * 6]}
    for method in METHODS:
        runs = [correct("none", f"{method}-{n}.jsonl") for n in BUDGETS]
        trained = correct(method, "trained.jsonl")
        rows[method] = [prune.Cell(f"{len(runs[1])}, {len(trained)}"), prune.Cell("-"), *map(accuracy, runs),
                        accuracy(trained)]
        if method == "random":
            at_16, at_16_trained = runs[1], trained
        rows[method] += [prune.difference_cell(runs[1], at_16), prune.difference_cell(trained, at_16_trained)]
    prune.print_cells(columns, rows)
    prune.draw_cells(columns, rows, out / "table.png")
    lines = [["", *columns], ["-"] * (1 + len(columns))]
    lines += [[name, *(cell.text for cell in row)] for name, row in rows.items()]
    (out / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/toy64"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/reduction"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="only the table of what is finished")
    args = parser.parse_args()
    toy.build(args.data, ("scienceqa", "pretrain", "clip", "mistral"), patch_size=8)
    write_json(args.data / "train.json",
               [to_record(p) for p in read_scienceqa(args.data / "scienceqa", "train")])
    if not args.table:
        run(args.data, args.out, args.seeds)
    summarize(args.data, args.out, args.seeds)


if __name__ == "__main__":
    main()
