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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/toy64"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/reduction"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: %(default)s)")
    args = parser.parse_args()
    toy.build(args.data, ("scienceqa", "pretrain", "clip", "mistral"), patch_size=8)
    write_json(args.data / "train.json",
               [to_record(p) for p in read_scienceqa(args.data / "scienceqa", "train")])
    run(args.data, args.out, args.seeds)


if __name__ == "__main__":
    main()
