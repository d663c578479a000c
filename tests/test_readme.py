"""Every command of the README runs, in its doll's-house form: the names of published models and data
stand for miniatures of the same layouts. `python train.py` itself and the study take minutes: .ci/run
runs these."""

import json
import re
import runpy
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from llava import Llava
from tests import toy
from tests.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.startswith(("python ", "torchrun "))]
SMALL = {                                    # what a README name stands for in the miniature
    "openai/clip-vit-large-patch14-336": "data/toy/clip",
    "mistralai/Mistral-7B-Instruct-v0.2": "data/toy/mistral",
    "mistralai/Mistral-7B-v0.1": "data/toy/mistral",
    "huggyllama/llama-7b": "data/toy/llama",
    "llava-hf/llava-v1.6-mistral-7b-hf": "runs/toy/stage2",
    "llava-hf/llava-1.5-7b-hf": "runs/toy/stage2",
    "blip_laion_cc_sft_558k.json": "data/toy/pretrain.json",
    "pretrain": "data/toy/pretrain",
    "data/ScienceQA": "data/toy/scienceqa",
    "data/ScienceQA/images/train": "data/toy/scienceqa/images/train",
    "cat.jpg": "data/toy/pretrain/00000.png",
    "data/toy/scienceqa/images/test/1373/image.png": "data/toy/pretrain/00000.png",
    "1000": "8",                             # --keep
}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A doll's house of a few pictures, barely trained, and a LLaVA put together from it."""
    folder, tokenizer = tmp_path_factory.mktemp("house"), toy.make_tokenizer(size=600)
    data = folder / "data/toy"
    toy.write_scienceqa(data / "scienceqa", sizes=(("train", 40), ("val", 4), ("test", 12)))
    toy.write_captions(data / "pretrain", size=64)
    toy.write_clip(data / "clip", steps=2, size=64, batch=8)
    for name, sizes in (("mistral", toy.MISTRAL), ("llama", toy.LLAMA)):
        toy.write_language(data / name, sizes, tokenizer, steps=2, batch=2)
    model = toy.Llava.from_pretrained(vision=data / "clip", language=data / "mistral")
    model.save_pretrained(folder / "runs/toy/stage2")
    toy.Processor.from_pretrained(data / "mistral", model.config).save_pretrained(folder / "runs/toy/stage2")
    return folder


def run(command: str, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "")      # an empty line ends a conversation
    words = [SMALL.get(word, word) for word in shlex.split(command)[1:]]
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{command}: {end.code}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "python train.py" and "--study" not in c])
def test_the_command_runs(command, house, monkeypatch):
    monkeypatch.chdir(house)
    run(command, monkeypatch)


def opens_and_saves() -> str:
    """README's table, from the checkpoints on which tests/test_layouts.py compares with transformers."""
    rows = ["| opens | from files | as | saves, for transformers |", "|---|---|---|---|"]
    for layout, build in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            case = build(Path(folder))
            model = Llava.from_pretrained(**case.source, dtype=torch.float32)
            files = {re.sub(r"-\d+-of-\d+", "-*", file.name) for source in case.source.values()
                     for file in Path(source).iterdir() if file.suffix in (".bin", ".safetensors")}
            model.save_pretrained(Path(folder, "saved"))
            saved = json.loads(Path(folder, "saved/config.json").read_text())["model_type"]
            made = f"{model.config.text.model_type}, {model.config.projector}, {model.config.image_mode}"
            files = ", ".join(f"`{file}`" for file in sorted(files))
            rows.append(f"| {layout} | {files} | {made} | `{saved}` |")
    return "\n".join(rows)


def test_the_table_of_layouts_is_what_opens_and_what_it_saves():
    assert opens_and_saves() in README, "python -m tests.test_readme prints the table as it is now"


def test_the_table_of_files_has_their_lengths():
    for file, lines in re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", README, re.M):
        assert int(lines) == len((ROOT / file).read_text(encoding="utf-8").splitlines()), file


if __name__ == "__main__":
    print(opens_and_saves())
