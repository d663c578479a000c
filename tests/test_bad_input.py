"""Bad input to all four programs and to the Python interface: one sentence that names what is wrong,
exit code 1 (2 for an impossible flag), no traceback, and no existing file is changed.

The corpus is generated: damages of a checkpoint, an image, a record, a ScienceQA folder and an answer
file, each given to the programs that read such a file. Programs run in process through their main();
one case of each runs as a command.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import eval as evaluation
import llava
import prune
import train
from llava import Llava, LlavaConfig, Processor, farthest_points
from tests import toy

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"llava": llava, "train": train, "eval": evaluation, "prune": prune}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sound model, records, images, ScienceQA folder and answer file. No case may change them."""
    folder = tmp_path_factory.mktemp("world")
    toy.write_random(folder / "model")
    toy.write_scienceqa(folder / "scienceqa", sizes=(("train", 12), ("test", 6)))
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "images/good.png")
    records = [{"id": str(i), "image": "good.png", "conversations": TURNS} for i in range(4)]
    llava.write_json(folder / "records.json", records)
    llava.write_json(folder / "captions.json", [{"image": "good.png", "caption": "A red wall."}])
    splits = json.loads((folder / "scienceqa/pid_splits.json").read_text())
    lines = [json.dumps({"question_id": name, "prompt": "", "text": "A"}) for name in splits["test"]]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def sound(world):
    model = Llava.from_pretrained(world / "model", dtype=torch.float32).eval()
    return model, Processor.from_pretrained(world / "model", model.config)


def snapshot(*folders: Path) -> dict[str, str]:
    """path -> kind, time and content of everything in the folders."""
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = f"{path.lstat().st_mode} {path.stat().st_mtime_ns if content else ''} {content}"
    return found


def refused(program: str, words, message: str, folders, monkeypatch, capsys, code: int = 1) -> None:
    """Run the program; it must stop with `code` and one sentence that contains `message`."""
    before = snapshot(*folders)
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, words)])
    monkeypatch.setattr("builtins.input", lambda _: "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        llava.command_line(PROGRAMS[program].main)
    if code == 2:
        assert end.value.code == 2
        sentence = capsys.readouterr().err.splitlines()[-1]
    else:
        sentence = end.value.code
        assert isinstance(sentence, str), "a text is what Python prints before it exits with 1"
    assert sentence.startswith(f"{program}.py: ") and message in sentence
    assert len(sentence.splitlines()) == 1 and "Traceback" not in sentence
    after = snapshot(*folders)
    assert {path: after.get(path) for path in before} == before, "an existing file was changed"


def asking(program: str, world: Path, out: Path, model=None, data=None, images=None, scienceqa=None) -> list:
    """Flags with which the program opens the model, reads the data and decodes images."""
    model, images = model or world / "model", images or world / "images"
    scienceqa = scienceqa or world / "scienceqa"
    return {"llava": ["--model", model, "--image", images / "good.png", "--max-new-tokens", 1, "What?"],
            "train": ["--stage", 2, "--init", model, "--data", data or world / "records.json", "--images", images,
                      "--out", out / "run", "--epochs", 1, "--batch-size", 2, "--workers", 0],
            "eval": ["--scienceqa", scienceqa, "--model", model, "--out", out / "answers.jsonl",
                     "--max-new-tokens", 1],
            "prune": ["--scienceqa", scienceqa, "--method", "maxmin", "--keep", 2, "--model", model,
                      "--out", out / "set.json"]}[program]


@pytest.mark.parametrize("program", PROGRAMS)
def test_sound_input_is_accepted(program, world, tmp_path, monkeypatch):
    """The flags of the cases below are wrong in one respect only."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, asking(program, world, tmp_path))])
    llava.command_line(PROGRAMS[program].main)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def config(where: str = "", **changes):
    """A damage: set fields of config.json, or of a part of it; a value of ... removes the field."""
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        part = content[where] if where else content
        part.update(changes)
        for key, value in changes.items():
            if value is ...:
                del part[key]
        (folder / "config.json").write_text(json.dumps(content))
    return damage


def text(name: str, content: str | bytes | None):
    """A damage: replace a file, or remove it."""
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return damage


def cut(name: str, size: float):
    """A damage: keep the first `size` bytes, or that share, of a file."""
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(size if size >= 1 else size * len(content))])
    return damage


def directory(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
    return damage


def tensors(change):
    """A damage: change(tensors by their published names) before they are saved again."""
    def damage(folder: Path) -> None:
        content = dict(load_file(folder / "model.safetensors"))
        change(content)
        save_file(content, folder / "model.safetensors")
    return damage


def index(content):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(
            content if isinstance(content, str) else json.dumps(content))
    return damage


def adapter(**fields):
    def damage(folder: Path) -> None:
        save_file({"x.lora_A.weight": torch.ones(1, 1)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    return damage


def pickled(content):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
    return damage


def tokenizer(change):
    def damage(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return damage


HEAD = "language_model.lm_head.weight"
def liuhaotian_adapter(folder: Path) -> None:
    """LLaVA's own layout of LoRA, whose configs name no base."""
    adapter(r=1, lora_alpha=1, base_model_name_or_path=None)(folder)
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / "config.json").read_text())
    text = content["text_config"] | {"model_type": "llava_mistral", "mm_vision_tower": "nobody/clip"}
    llava.write_json(folder / "config.json", text)


CHECKPOINTS = {                              # name -> (damage, words of the sentence)
    "no config": (text("config.json", None), "config.json is missing"),
    "empty config": (text("config.json", ""), "config.json is not valid JSON"),
    "cut config": (cut("config.json", 0.5), "config.json is not valid JSON"),
    "config in UTF-16": (text("config.json", b"\xff\xfe{\x00"), "config.json is not valid JSON"),
    "deep config": (text("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "config is a list": (text("config.json", "[]"), "config.json is not a JSON object"),
    "config is null": (text("config.json", "null"), "config.json is not a JSON object"),
    "config is a folder": (directory("config.json"), "config.json"),
    "type of another model": (config(model_type="gpt2"), "model_type 'gpt2'"),
    "type is a list": (config(model_type=["llava"]), "model_type is ['llava']"),
    "no type": (config(model_type=...), "model_type"),
    "text is a list": (config(text_config=[]), "text_config"),
    "text is null": (config(text_config=None), "text_config"),
    "no text": (config(text_config=...), "model_type 'llava'"),
    "vision is a text": (config(vision_config="clip"), "vision_config"),
    "no vision": (config(vision_config=...), "vision_config"),
    "language of another type": (config("text_config", model_type="qwen2"), "type 'qwen2'"),
    "language's type is a number": (config("text_config", model_type=7), "model_type is 7"),
    "another activation": (config("text_config", hidden_act="relu"), "hidden_act is 'relu'"),
    "another activation in the tower": (config("vision_config", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "scaled rotation": (config("text_config", rope_parameters=..., rope_scaling={"type": "linear"}), "'linear'"),
    "rotation is a number": (config("text_config", rope_parameters=7), "rope"),
    "tower to its end": (config(vision_feature_layer=5), "vision_feature_layer is 5"),
    "tower's layer is a list": (config(vision_feature_layer=[-2]), "vision_feature_layer is [-2]"),
    "CLS token too": (config(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'"),
    "image id is a text": (config(image_token_index="32000"), "image_token_i"),
    "image id is null": (config(image_token_index=None), "image_token_i"),
    "grids are a number": (config(image_grid_pinpoints=5), "grid"),
    "grids of one side": (config(image_grid_pinpoints=[[336]]), "grid"),
    "grids in ours of three": (config("llava.py", grids=[[1, 2, 3]]), "grid"),
    "grids in ours of texts": (config("llava.py", grids=["ab"]), "grid"),
    "anyres grids that no tile divides": (config("llava.py", image_mode="anyres", grids=[[33, 64]]), "grid"),
    "an unknown field of ours": (config("llava.py", colour="red"), "colour"),
    "ours is a number": (config(**{"llava.py": 3}), "llava.py"),
    "unknown template": (config("llava.py", template="chatml"), "chatml"),
    "unknown image mode": (config("llava.py", image_mode="blur"), "blur"),
    "unknown projector": (config("llava.py", projector="mlp9x"), "mlp9x"),
    "unknown reduction": (config("llava.py", prune="half"), "half"),
    "reduction is a list": (config("llava.py", prune=[]), "--prune []"),
    "budget is a text": (config("llava.py", prune="random", keep_tokens="4"), "keep"),
    "base is gone": (config(bases=["/no/such/base"]), "/no/such/base"),
    "base is a text": (config(bases="/no/such/base"), "bases"),
    "base is a number": (config(bases=[7]), "base 7"),
    "width of another model": (config("text_config", hidden_size=192), "does not contain the model"),
    "layers of another model": (config("text_config", num_hidden_layers=3), "layers.2"),
    "fewer layers": (config("vision_config", num_hidden_layers=2), "layers.2"),
    "no weights": (text("model.safetensors", None), "is missing"),
    "empty weights": (text("model.safetensors", b""), "model.safetensors is damaged"),
    "weights of four bytes": (cut("model.safetensors", 4), "model.safetensors is damaged"),
    "weights without their end": (cut("model.safetensors", 0.9), "model.safetensors is damaged"),
    "weights cut in their header": (cut("model.safetensors", 200), "model.safetensors is damaged"),
    "header of 2^62 bytes": (text("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "is damaged"),
    "header is no JSON": (text("model.safetensors", struct.pack("<Q", 8) + b"{'a': 1}"), "is damaged"),
    "weights are a text": (text("model.safetensors", "version https://git-lfs"), "is damaged"),
    "weights are a folder": (directory("model.safetensors"), "model.safetensors"),
    "a tensor is missing": (tensors(lambda t: t.pop(HEAD)), "language_model.lm_head.weight is missing"),
    "a tensor too many": (tensors(lambda t: t.update(extra=torch.ones(1))), "extra is not part"),
    "a tensor transposed": (tensors(lambda t: t.update({HEAD: t[HEAD].T.contiguous()})), "instead of"),
    "index is cut": (index("{"), "index.json is not valid JSON"),
    "index without a map": (index({}), "index.json has no weight_map"),
    "index with a list": (index({"weight_map": ["model.safetensors"]}), "index.json"),
    "index with numbers": (index({"weight_map": {"a": 5}}), "index.json"),
    "index of an absent shard": (index({"weight_map": {"a": "gone.safetensors"}}), "gone.safetensors is missing"),
    "index of another folder": (index({"weight_map": {"a": "../model.safetensors"}}), "same folder"),
    "adapter without its config": (text("adapter_model.safetensors", b""), "adapter_config.json is missing"),
    "adapter of unknown rank": (adapter(lora_alpha=1), "adapter_config.json has no r"),
    "adapter of rank 0": (adapter(r=0, lora_alpha=1, base_model_name_or_path="b"), "adapter_config.json"),
    "adapter of rank x": (adapter(r="x", lora_alpha=1, base_model_name_or_path="b"), "adapter_config.json"),
    "adapter in pairs without partner": (adapter(r=1, lora_alpha=1, base_model_name_or_path="b"), "lora_A"),
    "adapter with ranks of its own": (adapter(r=1, lora_alpha=1, base_model_name_or_path="b",
                                              rank_pattern={"q_proj": 2}), "rank_pattern"),
    "adapter without a base": (liuhaotian_adapter, "_name_or_path"),
    "adapter with DoRA": (adapter(r=1, lora_alpha=1, base_model_name_or_path="b", use_dora=True), "use_dora"),
    "pickle of an object": (pickled(pickle.dumps(SimpleNamespace())), "pytorch_model.bin"),
    "pickle of a list": (pickled(pickle.dumps([1, 2])), "pytorch_model.bin"),
    "empty pickle": (pickled(b""), "pytorch_model.bin is damaged"),
    "no tokenizer": (text("tokenizer.json", None), "has no tokenizer.json"),
    "empty tokenizer": (text("tokenizer.json", ""), "tokenizer.json: the tokenizer cannot be read"),
    "tokenizer is an object": (text("tokenizer.json", "{}"), "tokenizer.json: the tokenizer cannot be read"),
    "tokenizer in UTF-16": (text("tokenizer.json", b"\xff\xfe"), "tokenizer.json"),
    "tokenizer without end": (tokenizer(lambda t: (t["model"]["vocab"].pop("</s>"),
                                                   t.update(added_tokens=t["added_tokens"][:2]))), "</s>"),
    "tokenizer's settings are a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "tokenizer's settings are cut": (text("tokenizer_config.json", "{"), "tokenizer_config.json"),
}


@pytest.mark.parametrize("number, name", [*enumerate(CHECKPOINTS)], ids=CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused(number, name, world, tmp_path, monkeypatch, capsys):
    """The programs take turns, so that each meets every kind of damage."""
    damage, message = CHECKPOINTS[name]
    shutil.copytree(world / "model", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    program = list(PROGRAMS)[number % 4]
    words = asking(program, world, tmp_path, model=tmp_path / "damaged")
    refused(program, words, message, (world, tmp_path), monkeypatch, capsys)
    assert {file.name for file in tmp_path.iterdir()} == {"damaged"}, "nothing is written before the model opens"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["/no/such/model", "nobody/no-such-model", "a file"])
def test_a_model_that_is_not_there_is_named(program, name, world, tmp_path, monkeypatch, capsys):
    model = world / "records.json" if name == "a file" else name
    refused(program, asking(program, world, tmp_path, model=model), f"{model} is not a local folder", (world,),
            monkeypatch, capsys)


def test_a_run_that_names_itself_as_its_base_is_refused(world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "model", tmp_path / "loop")
    config(bases=[str(tmp_path / "loop")])(tmp_path / "loop")
    refused("llava", asking("llava", world, tmp_path, model=tmp_path / "loop"), "loop", (tmp_path,), monkeypatch,
            capsys)


# ---------------------------------------------------------------------------------------------
# Images


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and that has no pixels."""
    import zlib
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)


IMAGES = {
    "missing": None, "empty": b"", "text": b"no image", "html": b"<html><body>404</body></html>",
    "cut": 0.5, "bomb": png_of(60_000, 60_000), "long": (1, 40_000), "wide": (14_000, 100),
    "no pixels": png_of(0, 0), "no data": png_of(50, 50),
    "jpeg without an image": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "gif without a frame": b"GIF89a\x05\x00\x05\x00",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "folder": "folder"}


def damage_image(file: Path, content) -> None:
    sound = file.read_bytes()
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif isinstance(content, tuple):
        Image.new("RGB", content).save(file)
    elif isinstance(content, float):
        file.write_bytes(sound[:int(content * len(sound))])
    elif content is not None:
        file.write_bytes(content)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("program", ["llava", "train", "check-data", "eval", "prune"])
def test_a_damaged_image_is_refused(program, name, world, tmp_path, monkeypatch, capsys):
    for part in ("images", "scienceqa"):
        shutil.copytree(world / part, tmp_path / part)
    if program in ("eval", "prune"):
        file = sorted(tmp_path.glob(f"scienceqa/images/{'test' if program == 'eval' else 'train'}/*/*.png"))[0]
    else:
        file = tmp_path / "images/good.png"
    damage_image(file, IMAGES[name])
    more = ["--check-data"] if program == "check-data" else []
    program = "train" if more else program
    words = asking(program, world, tmp_path, images=tmp_path / "images", scienceqa=tmp_path / "scienceqa")
    refused(program, words + more, str(file), (world, tmp_path), monkeypatch, capsys)


@pytest.mark.parametrize("name", ["bomb", "empty", "cut", "long"])
def test_a_damaged_image_is_refused_where_its_size_alone_is_read(name, world, tmp_path, monkeypatch, capsys):
    """With AnyRes the number of tokens depends on the image's size."""
    shutil.copytree(world / "images", tmp_path / "images")
    damage_image(tmp_path / "images/good.png", IMAGES[name])
    words = asking("train", world, tmp_path, images=tmp_path / "images")
    refused("train", [*words, "--image-mode", "anyres"], "good.png", (world, tmp_path), monkeypatch, capsys)


# ---------------------------------------------------------------------------------------------
# Records, ScienceQA folders, answer files


def record(**changes) -> str:
    kept = {key: value for key, value in
            ({"id": "bad", "image": "good.png", "conversations": TURNS} | changes).items() if value is not ...}
    return json.dumps([{"id": "0", "image": "good.png", "conversations": TURNS}, kept])


HUMAN, GPT = TURNS
RECORDS = {
    "empty": ("", "not valid JSON"), "cut": ('[{"id": 1', "not valid JSON"), "object": ("{}", "is not a list"),
    "empty list": ("[]", "is not a list"), "null": ("null", "is not a list"), "number": ("[3]", "record 0"),
    "lists": ("[[]]", "record 0"), "JSON lines": ('{"id": 1}\n{"id": 2}', "not valid JSON"),
    "no conversations": (record(conversations=...), "record bad"), "null conversations": (
        record(conversations=None), "record bad"), "conversations are a text": (
        record(conversations="Hello"), "record bad"), "conversations are an object": (
        record(conversations={"from": "human"}), "record bad"), "no turns": (
        record(conversations=[]), "record bad"), "no answer": (record(conversations=[HUMAN]), "it has no answer"),
    "empty answer": (record(conversations=[HUMAN, {"from": "gpt", "value": ""}]), "an answer is empty"),
    "null answer": (record(conversations=[HUMAN, {"from": "gpt", "value": None}]), "record bad"),
    "answer is a number": (record(conversations=[HUMAN, {"from": "gpt", "value": 3}]), "record bad"),
    "question is null": (record(conversations=[{"from": "human", "value": None}, GPT]), "record bad"),
    "question is a list": (record(conversations=[{"from": "human", "value": ["<image>"]}, GPT]), "record bad"),
    "two questions": (record(conversations=[HUMAN, HUMAN]), "turn 2 is from 'human'"),
    "system turn": (record(conversations=[{"from": "system", "value": "x"}, *TURNS]), "turn 1 is from 'system'"),
    "a first answer": (record(conversations=[TURNS[1], HUMAN, HUMAN]), "turn 3 is from 'human'"),
    "no speaker": (record(conversations=[{"value": "x"}, GPT]), "record bad"),
    "roles of another format": (record(conversations=[{"role": "user", "content": "x"}]), "record bad"),
    "mark without an image": (record(image=...), "1 <image> in the text, but 0 images"),
    "two images": (record(image=["good.png"] * 2), "but 2 images"),
    "image is a number": (record(image=5), "record bad"), "image is a list of numbers": (
        record(image=[5]), "record bad"), "image is an object": (record(image={"file": "good.png"}), "record bad"),
    "absent image": (record(image="none.png"), "none.png"), "parent folder": (
        record(image="../records.json"), "../records.json is outside"), "absolute path": (
        record(image="/etc/passwd"), "/etc/passwd is outside"), "image with a zero byte": (
        record(image="a\0b.png"), "record bad"),
    "mark in the answer": (record(conversations=[HUMAN, {"from": "gpt", "value": "<image>"}]), "2 <image>"),
    "lone surrogate": (record(conversations=[HUMAN, {"from": "gpt", "value": "\ud800"}]), "record bad"),
    "ids of a list": (record(id=["a"], conversations=[]), "record ['a']")}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("more", [(), ("--check-data",)], ids=["train", "check-data"])
def test_bad_records_are_refused(more, name, world, tmp_path, monkeypatch, capsys):
    content, message = RECORDS[name]
    (tmp_path / "records.json").write_text(content)
    words = asking("train", world, tmp_path, data=tmp_path / "records.json")
    refused("train", [*words, *more], message, (world, tmp_path), monkeypatch, capsys)


def problem(**changes):
    """A damage: change the first problem of each split; a value of ... removes the field."""
    def damage(folder: Path) -> None:
        problems, splits = (json.loads((folder / name).read_text()) for name in ("problems.json", "pid_splits.json"))
        for names in splits.values():
            chosen = problems[names[0]] | changes
            problems[names[0]] = {key: value for key, value in chosen.items() if value is not ...}
        (folder / "problems.json").write_text(json.dumps(problems))
    return damage


def twice(folder: Path) -> None:
    splits = json.loads((folder / "pid_splits.json").read_text())
    (folder / "pid_splits.json").write_text(json.dumps({name: [*ids, ids[0]] for name, ids in splits.items()}))


def named(name: str):
    """A damage: a question with this id in every split."""
    def damage(folder: Path) -> None:
        problems = json.loads((folder / "problems.json").read_text())
        (folder / "problems.json").write_text(json.dumps(problems | {name: next(iter(problems.values()))}))
        (folder / "pid_splits.json").write_text(json.dumps({"train": [name], "test": [name]}))
    return damage


SCIENCEQA = {
    "no folder": (shutil.rmtree, "problems.json is missing"),
    "no problems": (text("problems.json", None), "problems.json is missing"),
    "no splits": (text("pid_splits.json", None), "pid_splits.json is missing"),
    "cut problems": (cut("problems.json", 0.5), "problems.json is not valid JSON"),
    "problems are a list": (text("problems.json", "[]"), "problems.json"),
    "problems are numbers": (text("problems.json", '{"1": 5, "13": 5}'), "problems.json"),
    "splits are a list": (text("pid_splits.json", "[]"), "pid_splits.json"),
    "split is a number": (text("pid_splits.json", '{"test": 5, "train": 5}'), "pid_splits.json"),
    "split of numbers": (text("pid_splits.json", '{"test": [5], "train": [5]}'), "5"),
    "no such split": (text("pid_splits.json", '{"val": []}'), "pid_splits.json has no split"),
    "empty split": (text("pid_splits.json", '{"test": [], "train": []}'), "0 questions|no question"),
    "question above the folder": (text("pid_splits.json", '{"test": [".."], "train": [".."]}'), "question .."),
    "split above the folder": (problem(split=".."), "'..' is not the name"),
    "no name of a split": (problem(split=""), "'' is not the name"),
    "unknown question": (text("pid_splits.json", '{"test": ["x"], "train": ["x"]}'), "lacks question x"),
    "question twice": (twice, " twice"),
    "id above the folder": (named(".."), "'..' is not the name"),
    **{f"no {field}": (problem(**{field: ...}), "problems.json")
       for field in ("question", "choices", "answer", "hint", "image", "split", "grade", "subject")},
    **{f"{field} is a list": (problem(**{field: []}), "problems.json")
       for field in ("question", "answer", "grade", "choices")},
    "answer out of range": (problem(answer=9), "problems.json"),
    "answer is negative": (problem(answer=-1), "problems.json"),
    "answer is a letter": (problem(answer="A"), "problems.json"),
    "six choices": (problem(choices=list("abcdef"), answer=5), "problems.json"),
    "grade of another kind": (problem(grade="high school"), "problems.json"),
    "image outside": (problem(image="../../../../secret.png"), "secret.png"),
    "split outside": (problem(split="../..", image="secret.png"), "problems.json"),
    "image absolute": (problem(image="/etc/passwd"), "/etc/passwd")}


@pytest.mark.parametrize("name", SCIENCEQA)
@pytest.mark.parametrize("program", ["eval", "prune"])
def test_a_damaged_scienceqa_folder_is_refused(program, name, world, tmp_path, monkeypatch, capsys):
    damage, message = SCIENCEQA[name]
    shutil.copytree(world / "scienceqa", tmp_path / "scienceqa")
    damage(tmp_path / "scienceqa")
    task = {"eval": ["--predictions", world / "answers.jsonl"],
            "prune": ["--method", "guided", "--keep", 5, "--out", tmp_path / "set.json"]}[program]
    message = message.split("|")[program == "eval"] if "|" in message else message
    refused(program, ["--scienceqa", tmp_path / "scienceqa", *task], message, (world, tmp_path), monkeypatch, capsys)


@pytest.mark.parametrize("field", ["topic", "category", "skill"])
def test_a_question_without_a_field_that_only_prune_reads_is_refused(field, world, tmp_path, monkeypatch, capsys):
    shutil.copytree(world / "scienceqa", tmp_path / "scienceqa")
    problem(**{field: ...})(tmp_path / "scienceqa")
    refused("prune", ["--scienceqa", tmp_path / "scienceqa", "--method", "guided", "--keep", 5, "--out",
                      tmp_path / "set.json"], f"has no {field}", (world, tmp_path), monkeypatch, capsys)


LINE = '{"question_id": "13", "text": "A"}'
ANSWERS = {
    "missing": (None, "cannot be read"), "no JSON": (b"A\n", "line 1"), "cut": (LINE[:-5].encode(), "line 1"),
    "list": (b"[1]", "line 1"), "number": (b"7", "line 1"), "null": (b"null", "line 1"),
    "no id": (b'{"text": "A"}', "line 1"), "no text": (b'{"question_id": "13"}', "line 1"),
    "text is a number": (b'{"question_id": "13", "text": 4}', "line 1"),
    "text is null": (b'{"question_id": "13", "text": null}', "line 1"),
    "second line": (f"{LINE}\n{{".encode(), "line 2"), "twice": (f"{LINE}\n{LINE}".encode(), "answered before"),
    "binary": (b"\xff\xfe\x00", "line 1"), "deep": (b"[" * 100_000, "line 1"), "folder": ("folder", "cannot be read")}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("task", ["--predictions", "--compare", "--out"])
def test_a_bad_answer_file_is_refused(task, name, world, tmp_path, monkeypatch, capsys):
    if (task, name) in (("--out", "missing"), ("--out", "cut")):
        pytest.skip("a new file, and one that an interrupt cut short, are continued")
    content, message = ANSWERS[name]
    file = tmp_path / "answers.jsonl"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if name == "cut" else content + b"\n")
    more = {"--predictions": [file], "--compare": [world / "answers.jsonl", file],
            "--out": [file, "--model", world / "model"]}[task]
    refused("eval", ["--scienceqa", world / "scienceqa", task, *more],
            message if task != "--out" else "answers.jsonl", (world, tmp_path), monkeypatch, capsys)


@pytest.mark.parametrize("content, message", [
    ("{}", "neither a list"), ("[{}]", "neither a list"), ('["x"]', "lists 1 questions"), ("[", "not valid JSON"),
    ("[[]]", "list"), ("[null]", "list"), ("[]", "is an empty list")])
@pytest.mark.parametrize("task", ["--from-list", "--report"])
def test_a_bad_list_of_ids_is_refused(task, content, message, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "list.json").write_text(content)
    words = ["--scienceqa", world / "scienceqa", task, tmp_path / "list.json", "--out", tmp_path / "set.json"]
    refused("prune", words, message, (world, tmp_path), monkeypatch, capsys)


@pytest.mark.parametrize("conversations", ['"text"', '[{"role": "user", "content": "x"}]', "[5]"])
def test_a_report_on_records_of_another_format_is_refused(conversations, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.json").write_text(f'[{{"id": "1", "conversations": {conversations}}}]')
    refused("prune", ["--report", tmp_path / "r.json"], "not LLaVA's", (tmp_path,), monkeypatch, capsys)


@pytest.mark.parametrize("content", ["[", "[]", "7", '{"1": 5}', '{"captions": 3}'])
def test_bad_captions_are_refused(content, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "captions.json").write_text(content)
    words = ["--scienceqa", world / "scienceqa", "--method", "guided", "--keep", 5, "--out", tmp_path / "set.json",
             "--image-text", tmp_path / "captions.json"]
    refused("prune", words, "captions.json", (world, tmp_path), monkeypatch, capsys)


CAPTIONS = {                                 # files of captions, for --expand and --generate
    "missing": (None, "is missing"), "cut": ("[", "not valid JSON"), "number": ("7", "neither a COCO captions file"),
    "null": ("null", "neither"), "list of numbers": ("[3]", "neither"), "no caption": ('[{"image": "a.png"}]', "neither"),
    "no name": ('[{"image": "", "caption": "x"}]', "neither"), "name is a number": (
        '[{"image": 5, "caption": "x"}]', "neither"), "caption is a list": (
        '[{"image": "a.png", "caption": []}]', "neither"), "COCO without images": ('{"annotations": []}', "neither"),
    "COCO of an unknown image": ('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "neither"),
    "COCO images are numbers": ('{"images": [1], "annotations": []}', "neither"), "equal but for the suffix": (
        '[{"image": "a.png", "caption": "x"}, {"image": "a.jpg", "caption": "y"}]', "differ in their suffix only")}
COCO = '{"images": [{"id": 1, "width": 10, "height": %s}], "categories": [{"id": 1, "name": "cat"}], "annotations": [%s]}'
BOXES = {
    "missing": (None, "is missing"), "cut": ("{", "not valid JSON"), "list": ("[]", "not a COCO instances file"),
    "box of two": (COCO % (10, '{"bbox": [1, 2], "image_id": 1, "category_id": 1}'), "not a COCO instances file"),
    "box of texts": (COCO % (10, '{"bbox": "abcd", "image_id": 1, "category_id": 1}'), "not a COCO instances file"),
    "box outside": (COCO % (10, '{"bbox": [5, 5, 9, 9], "image_id": 1, "category_id": 1}'), "is not inside image 1"),
    "unknown category": (COCO % (10, '{"bbox": [1, 1, 1, 1], "image_id": 1, "category_id": 9}'), "not a COCO"),
    "unknown image": (COCO % (10, '{"bbox": [1, 1, 1, 1], "image_id": 9, "category_id": 1}'), "not a COCO"),
    "no height": (COCO % (0, '{"bbox": [0, 0, 0, 0], "image_id": 1, "category_id": 1}'), "not a COCO")}


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("task", ["--expand", "--generate"])
def test_bad_caption_files_are_refused(task, name, world, tmp_path, monkeypatch, capsys):
    content, message = CAPTIONS[name]
    file = tmp_path / "captions.json"
    if content is not None:
        file.write_text(content)
    words = [task, file] if task == "--expand" else [task, "conversation", "--captions", file, "--judge-model", "m",
                                                     "--dry-run"]
    refused("prune", [*words, "--out", tmp_path / "out.json"], message, (world, tmp_path), monkeypatch, capsys)


@pytest.mark.parametrize("name", BOXES)
def test_bad_box_files_are_refused(name, world, tmp_path, monkeypatch, capsys):
    content, message = BOXES[name]
    (tmp_path / "captions.json").write_text('[{"image": "1.png", "caption": "A cat."}]')
    if content is not None:
        (tmp_path / "boxes.json").write_text(content)
    words = ["--generate", "detail", "--captions", tmp_path / "captions.json", "--boxes", tmp_path / "boxes.json",
             "--judge-model", "m", "--dry-run", "--out", tmp_path / "out.json"]
    refused("prune", words, message, (world, tmp_path), monkeypatch, capsys)


# ---------------------------------------------------------------------------------------------
# Flags


IMPOSSIBLE = [                               # program, flags, words of argparse's line; exit code 2
    ("llava", "", "--model"), ("llava", "--model m --nonsense", "--nonsense"),
    ("llava", "--model m --temperature warm", "--temperature"), ("llava", "--model m --temperature nan", "--temp"),
    ("llava", "--model m --temperature -1", "--temperature"), ("llava", "--model m --top-p 0", "--top-p"),
    ("llava", "--model m --max-new-tokens 0", "--max-new-tokens"), ("llava", "--model m --seed x", "--seed"),
    ("llava", "--model m --seed 99999999999999999999", "--seed"),
    ("llava", "--model m --image i --show-kept k.psd", "--show-kept"),
    ("prune", "--report r.json --draw chart.psd", "--draw"),
    *[("prune", f"--study s --scienceqa d --pretrain p --vision v --language l {flags}", flags.split()[0])
      for flags in ("--seed 3", "--pooling mean", "--layer 2", "--batch-size 4", "--split val", "--pictures only",
                    "--image-text t", "--base b", "--quantize int8")],
    ("train", "--stage 2 --data d --out o --init i --lora-rank 4 --lora-alpha 0", "--lora-alpha"),
    ("llava", "--model m --max-new-tokens 1.5", "--max-new-tokens"), ("llava", "--model m --dtype int8", "--dtype"),
    ("llava", "--model m --prune most", "--prune"), ("llava", "--model m --image-mode big", "--image-mode"),
    ("llava", "--model m --template x", "--template"), ("llava", "--model m --keep-tokens -3", "--keep-tokens"),
    ("llava", "--model m --save d What?", "--save"), ("llava", "--model m --show-kept f", "--show-kept"),
    ("llava", "--model m --device gpu", "--device"), ("llava", "--model m --image i --show-kept k.docx", "--show-kept"),
    *[("llava", "--model m --device cuda", "--device") for _ in range(not torch.cuda.is_available())],
    ("eval", "--scienceqa d --model m --device tpu", "--device"),
    ("llava", "--model m --quantize int3", "--quantize"), ("prune", "--method maxmin --quantize 4", "--quantize"),
    ("train", "--data d --out o --init i", "--stage"), ("train", "--stage 3 --data d --out o --init i", "--stage"),
    ("train", "--stage 1 --out o --init i", "--data"), ("train", "--stage 1 --data d --init i", "--out"),
    ("train", "--stage 1 --data d --out o", "--init"), ("train", "--stage 1 --data d --out o --vision v", "--init"),
    *[("train", f"--stage 2 --data d --out o --init i {flags}", flags.split()[0]) for flags in (
        "--epochs 0", "--epochs x", "--batch-size 0", "--batch-size -1", "--micro-batch-size 0", "--lr -1",
        "--lr nan", "--max-length 0", "--lora-rank -1", "--card a100", "--workers -1",
        "--save-every 0", "--clip -1", "--dtype int4", "--template x", "--checkpoint-blocks -1",
        "--device gpu")],
    ("train", "--stage 2 --data d --out o --init i --lora-alpha 3", "--lora-... needs --lora-rank"),
    ("train", "--stage 1 --data d --out o --init i --lora-rank 4", "--lora-rank"),
    ("train", "--stage 1 --data d --out o --init i --val-every 4", "--val"),
    ("train", "--stage 1 --data d --out o --init i --val v --val-every 0", "--val-every"),
    ("prune", "--generate conversation --out o --captions c", "--judge-model"),
    ("prune", "--generate detail --out o --captions c --judge-model m", "--boxes"),
    ("prune", "--expand c", "--out"), ("prune", "--expand c --out o --style long", "--style"),
    ("prune", "--expand c --out o --limit 0", "--limit"), ("prune", "--expand c --out o --workers 0", "--workers"),
    ("eval", "", "--scienceqa"), ("eval", "--scienceqa d", "--model"), ("eval", "--model m", "--scienceqa"),
    ("eval", "--scienceqa d --model m --predictions p", "--predictions"),
    ("eval", "--scienceqa d --model m --batch-size 0", "--batch-size"),
    ("eval", "--scienceqa d --model m --max-new-tokens 0", "--max-new-tokens"),
    ("eval", "--scienceqa d --model m --limit 0", "--limit"), ("eval", "--scienceqa d --model m --limit -1", "--limit"),
    ("eval", "--scienceqa d --compare a", "--compare"), ("eval", "--cost -5", "--cost"),
    ("eval", "--scienceqa d --model m --pictures some", "--pictures"),
    ("prune", "", "--method"), ("prune", "--method random --scienceqa d", "--out"),
    ("prune", "--method random --out o", "--scienceqa"), ("prune", "--method best --scienceqa d --out o", "--method"),
    ("prune", "--method random --report r --scienceqa d", "--report"), ("prune", "--study s --scienceqa d", "--pretrain"),
    ("prune", "--study s --scienceqa d --pretrain p --vision v --language l --prune pool", "--stage1"),
    ("prune", "--method maxmin --scienceqa d --out o --model m --batch-size 0", "--batch-size"),
    ("prune", "--method random --scienceqa d --out o --keep x", "--keep"),
    ("eval", "--task llavabench --model m --images d --reviews r", "--questions"),
    ("prune", "--report r.json --draw chart.docx", "--draw"), ("prune", "--report r.json --cache c", "--scienceqa")]


@pytest.mark.parametrize("program, flags, message", IMPOSSIBLE, ids=[f"{p} {f}" for p, f, _ in IMPOSSIBLE])
def test_an_impossible_flag_is_refused_by_name(program, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if program == "train" and not flags:
        pytest.skip("runs the toy data")
    refused(program, flags.split(), message, (tmp_path,), monkeypatch, capsys, code=2)
    assert not list(tmp_path.iterdir())


def mistakes(world: Path, out: Path) -> dict[str, tuple[str, list, str]]:
    """name -> (program, flags, words of the sentence): flags that only contradict the data."""
    llava_, train_, eval_, prune_ = (asking(program, world, out) for program in PROGRAMS)
    random = ["--scienceqa", world / "scienceqa", "--method", "random", "--out", out / "set.json"]
    return {
        "an image too few": ("llava", [*llava_[:-1], "<image> <image> What?"], "2 <image> in|has 2 <image>"),
        "no image": ("llava", ["--model", world / "model", "<image> What?"], "has 1 <image>"),
        "a budget without a method": ("llava", [*llava_, "--keep-tokens", 3], "--keep-tokens"),
        "a method without a budget": ("llava", [*llava_, "--prune", "random"], "--keep-tokens"),
        "a budget above all patches": ("eval", [*eval_, "--prune", "pool", "--keep-tokens", 99], "99"),
        "kept patches of none": ("llava", [*llava_, "--show-kept", out / "kept.png"], "--show-kept"),
        "4 bits of odd rows": ("llava", [*llava_, "--quantize", "int4"], "use --quantize int8"),
        "8 bits in float16": ("eval", [*eval_, "--quantize", "int8", "--dtype", "float16"], "--dtype bfloat16"),
        "two bases of none": ("llava", [*llava_, "--base", "a", "--base", "b"], "--base"),
        "save over the model": ("llava", ["--model", world / "model", "--save", world / "model"], "is not empty"),
        "save over a file": ("llava", ["--model", world / "model", "--save", world / "records.json"], "records.json"),
        "another tokenizer": ("llava", [*llava_, "--tokenizer", world / "images"], "has no tokenizer.json"),
        "run in a file": ("train", [*train_, "--out", world / "records.json"], "records.json"),
        "records are a folder": ("train", [*train_, "--data", world], str(world)),
        "no validation records": ("train", [*train_, "--val", out / "none.json"], "none.json is missing"),
        "no validation images": ("train", [*train_, "--val", world / "records.json", "--val-images", out / "none"],
                                 "there is no image"),
        "no teacher": ("prune", ["--generate", "conversation", "--captions", world / "captions.json", "--judge-model",
                                 "m", "--judge", "ftp://x", "--out", out / "out.json"], "--judge"),
        "no images": ("train", [*train_, "--images", out / "none"], "there is no image"),
        "no room for an answer": ("train", [*train_, "--max-length", 5], "within --max-length 5"),
        "a record too many": ("train", [*train_, "--show", 99], "--show 99"),
        "a record below 0": ("train", [*train_, "--show", -1], "--show -1"),
        "cost of a part": ("eval", ["--cost", "--model", out / "clip"], "is not a LLaVA"),
        "another split": ("eval", [*eval_, "--split", "holdout"], "has no split 'holdout'"),
        "answers in no folder": ("eval", [*eval_, "--out", out / "none/answers.jsonl"], "none/answers.jsonl"),
        "answers of another kind": ("eval", [*eval_, "--out", world / "answers.jsonl"], "was made with another"),
        "records as answers": ("eval", [*eval_, "--out", world / "records.json"], "records.json"),
        "nothing to keep": ("prune", [*random, "--keep", 0], "--keep 0"),
        "more than there are": ("prune", [*random, "--keep", 99], "--keep 99"),
        "fewer than subjects": ("prune", [*random, "--method", "guided", "--keep", 1], "--keep 1"),
        "no model": ("prune", ["--scienceqa", world / "scienceqa", "--method", "maxmin", "--keep", 2, "--out",
                               out / "set.json"], "--model"),
        "no such layer": ("prune", [*prune_, "--layer", 9], "--layer 9"),
        "set in a file": ("prune", [*random, "--keep", 2, "--out", world / "records.json/set.json"], "records.json"),
        "report on nothing": ("prune", ["--report", world / "none.json"], "none.json is missing"),
    }


@pytest.mark.parametrize("name", mistakes(Path("."), Path(".")))
def test_flags_that_contradict_the_data_are_refused(name, world, tmp_path, monkeypatch, capsys):
    program, words, message = mistakes(world, tmp_path)[name]
    llava.write_json(tmp_path / "clip/config.json", llava.hf_config(LlavaConfig(), True)["vision_config"])
    refused(program, words, message.split("|")[-1], (world, tmp_path), monkeypatch, capsys)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Each program as a process with flags that name what does not exist, and its working directory."""
    started = {}
    for program, flags in {
            "llava": "--model none --image none.png What?", "prune": "--report none.json",
            "train": "--stage 2 --init none --data none.json --out run",
            "eval": "--scienceqa none --predictions none.jsonl"}.items():
        folder = tmp_path_factory.mktemp(program)
        command = [sys.executable, ROOT / f"{program}.py", *flags.split()]
        started[program] = folder, subprocess.Popen(
            command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return started


@pytest.mark.parametrize("program", PROGRAMS)
def test_as_a_command_it_prints_one_line_and_exits_with_1(program, commands):
    folder, process = commands[program]
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 1 and stdout == "" and "none" in stderr
    assert len(stderr.splitlines()) == 1 and not list(folder.iterdir())


# ---------------------------------------------------------------------------------------------
# The Python interface

IMAGE = torch.zeros(1, 3, 32, 32)


def ids(model, *row) -> torch.Tensor:
    return torch.tensor([[model.config.image_token_id if token == "i" else token for token in row]])


PYTHON = {                                   # name -> (call of (model, processor, world), words of the sentence)
    "no source": (lambda m, p, w: Llava.from_pretrained(), "name one LLaVA"),
    "half a pair": (lambda m, p, w: Llava.from_pretrained(vision=w / "model"), "name one LLaVA"),
    "three sources": (lambda m, p, w: Llava.from_pretrained(w, vision=w, language=w), "name one LLaVA"),
    "unknown bits": (lambda m, p, w: Llava.from_pretrained(w / "model", quantize="int3"), "int3"),
    "unknown template": (lambda m, p, w: Llava.from_pretrained(w / "model", template="chatml"), "chatml"),
    "unknown image mode": (lambda m, p, w: Llava.from_pretrained(w / "model", image_mode="blur"), "blur"),
    "no folder for a processor": (lambda m, p, w: Processor.from_pretrained(w / "none"), "none"),
    "a folder without a tokenizer": (lambda m, p, w: Processor.from_pretrained(w / "images", m.config), "tokenizer.json"),
    "a budget of too many": (lambda m, p, w: LlavaConfig(prune="random", keep_tokens=9999), "9999"),
    "an image too few": (lambda m, p, w: p([{"role": "user", "content": "<image>"}]), "1 <image>"),
    "an image too many": (lambda m, p, w: p([{"role": "user", "content": "x"}], [Image.new("RGB", (9, 9))]), "0 <image>"),
    "half of a surrogate pair": (lambda m, p, w: p([{"role": "user", "content": "\ud83d"}]), "surrogate"),
    "two users": (lambda m, p, w: p([{"role": "user", "content": "x"}] * 2), "alternate"),
    "assistant first": (lambda m, p, w: p([{"role": "assistant", "content": "x"}]), "alternate"),
    "a system message": (lambda m, p, w: p([{"role": "system", "content": "x"}]), "role system"),
    "no image for an id": (lambda m, p, w: m(ids(m, 1, "i", 5)), "1 <image>"),
    "no id for an image": (lambda m, p, w: m(ids(m, 1, 5), [IMAGE], [(32, 32)]), "0 <image>"),
    "nothing to learn": (lambda m, p, w: m(ids(m, 1, 5), labels=torch.full((1, 2), -100)), "nothing to learn"),
    "no image in generate": (lambda m, p, w: list(m.generate(ids(m, 1, "i"))), "1 <image>"),
    "no image in generate_batch": (lambda m, p, w: m.generate_batch(ids(m, 1, "i")), "1 <image>"),
    "unknown reduction": (lambda m, p, w: m.encode_images([IMAGE], [(32, 32)], prune="half"), "half"),
    "reduction without a budget": (lambda m, p, w: m.encode_images([IMAGE], [(32, 32)], prune="random"), "--keep-tokens"),
    "no points": (lambda m, p, w: farthest_points(torch.ones(3, 2), 0), "0 of 3 points"),
    "too many points": (lambda m, p, w: farthest_points(torch.ones(3, 2), 4), "4 of 3 points"),
    "points that are not numbers": (lambda m, p, w: farthest_points(torch.tensor([[1.0], [float("nan")]]), 1), "point 1"),
    "image that is not there": (lambda m, p, w: llava.open_image(w / "none.png"), "there is no image"),
    "a JSON file that is not there": (lambda m, p, w: llava.read_json(w / "none.json"), "none.json is missing"),
    "a split that is not there": (lambda m, p, w: evaluation.read_scienceqa(w / "scienceqa", "x"), "no split 'x'"),
    "records that are not there": (lambda m, p, w: train.read_records(w / "none.json", w), "none.json is missing"),
}


@pytest.mark.parametrize("name", PYTHON)
def test_the_python_interface_raises_one_sentence(name, sound, world, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    call, message = PYTHON[name]
    before = snapshot(world)
    with pytest.raises((llava.UserError, OSError)) as error:
        call(*sound, world)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert snapshot(world) == before


@pytest.mark.parametrize("error, message", [(torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
                                            (llava.SafetensorError("No space left"), "No space left")])
def test_a_full_device_ends_in_one_sentence(error, message, monkeypatch):
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit, match=f"eval.py: .*{message}"):
        llava.command_line(main)


def test_a_download_that_breaks_off_ends_in_one_sentence(monkeypatch):
    def download(*_, **__):
        raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(llava, "snapshot_download", download)
    with pytest.raises(OSError, match="nobody/model is not a local folder .* connection reset$"):
        llava.fetch("nobody/model")
