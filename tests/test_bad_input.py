"""Invalid input to the four programs and the Python interface: the message is one sentence that names what
is wrong, the exit code is 1 (2 for an invalid flag), and no existing file is changed.

Each case damages a checkpoint, image, record, ScienceQA folder or answer file and gives it to the programs
that read such a file. Programs run in this process through main(); one case of each runs as a command.
"""

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
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
def inputs(tmp_path_factory):
    """A folder with a valid model, records, images, ScienceQA data and answer file. No case may change it."""
    folder = tmp_path_factory.mktemp("inputs")
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
def model_and_processor(inputs):
    model = Llava.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    return model, Processor.from_pretrained(inputs / "model", model.config)


def snapshot(*folders: Path) -> dict[str, str]:
    """Return {path: mode, modification time and hash} of all files and folders inside the folders."""
    states = {}
    for folder in folders:
        for path in folder.rglob("*"):
            states[str(path)] = str(path.lstat().st_mode)
            if path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                states[str(path)] += f" {path.stat().st_mtime_ns} {content}"
    return states


@pytest.fixture
def assert_refused(monkeypatch, capsys):
    """A function that runs a program, which must exit with `code` and one sentence that contains `message`,
    and must not change a file in the folders."""
    def check(program: str, flags, message: str, *folders: Path, code: int = 1) -> None:
        before = snapshot(*folders)
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, flags)])
        monkeypatch.setattr("builtins.input", lambda _: "")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            llava.command_line(PROGRAMS[program].main)
        if code == 2:
            assert error.value.code == 2
            sentence = capsys.readouterr().err.splitlines()[-1]
        else:
            sentence = error.value.code
            assert isinstance(sentence, str), "Python prints a string and exits with 1"
        assert sentence.startswith(f"{program}.py: ") and message in sentence
        assert len(sentence.splitlines()) == 1 and "Traceback" not in sentence
        after = snapshot(*folders)
        assert {path: after.get(path) for path in before} == before, "an existing file was changed"
    return check


def valid_flags(program: str, inputs: Path, out: Path, model=None, data=None, images=None, scienceqa=None):
    """Return flags with which the program opens the model, reads the data and decodes images."""
    model, data = model or inputs / "model", data or inputs / "records.json"
    images, scienceqa = images or inputs / "images", scienceqa or inputs / "scienceqa"
    return {"llava": ["--model", model, "--image", images / "good.png", "--max-new-tokens", 1, "What?"],
            "train": ["--stage", 2, "--init", model, "--data", data, "--images", images,
                      "--out", out / "run", "--epochs", 1, "--batch-size", 2, "--workers", 0],
            "eval": ["--scienceqa", scienceqa, "--model", model, "--out", out / "answers.jsonl",
                     "--max-new-tokens", 1],
            "prune": ["--scienceqa", scienceqa, "--method", "maxmin", "--keep", 2, "--model", model,
                      "--out", out / "set.json"]}[program]


@pytest.mark.parametrize("program", PROGRAMS)
def test_valid_input_is_accepted(program, inputs, tmp_path, monkeypatch):
    """The unchanged flags are accepted, so each case below fails only because of its one change."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, valid_flags(program, inputs, tmp_path))])
    llava.command_line(PROGRAMS[program].main)


# ---------------------------------------------------------------------------------------------
# Checkpoints. Most functions here return a function that damages the files of a folder


def edit_config(section: str = "", **changes):
    """Set fields of config.json, or of a section of it; the value ... removes a field."""
    def damage(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        fields = content[section] if section else content
        fields.update(changes)
        for key, value in changes.items():
            if value is ...:
                del fields[key]
        (folder / "config.json").write_text(json.dumps(content))
    return damage


def replace(name: str, content: str | bytes):
    """Write a file with another content."""
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return damage


def remove(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
    return damage


def truncate(name: str, size: float):
    """Keep only the first bytes of a file: `size` is their number, or below 1 their share."""
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        count = size if size >= 1 else int(size * len(content))
        (folder / name).write_bytes(content[:count])
    return damage


def replace_by_folder(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()
    return damage


def edit_weights(change):
    """Call change({published name: tensor}) and save the result."""
    def damage(folder: Path) -> None:
        content = dict(load_file(folder / "model.safetensors"))
        change(content)
        save_file(content, folder / "model.safetensors")
    return damage


def write_adapter(**fields):
    def damage(folder: Path) -> None:
        save_file({"x.lora_A.weight": torch.ones(1, 1)}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(fields))
    return damage


def replace_by_pickle(content: bytes):
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)
    return damage


def remove_end_token(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["</s>"]
    content["added_tokens"] = content["added_tokens"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def write_liuhaotian_adapter(folder: Path) -> None:
    """LoRA in the layout of liuhaotian's models; neither config names the base model."""
    write_adapter(r=1, lora_alpha=1, base_model_name_or_path=None)(folder)
    (folder / "model.safetensors").unlink()
    content = json.loads((folder / "config.json").read_text())
    config = content["text_config"] | {"model_type": "llava_mistral", "mm_vision_tower": "nobody/clip"}
    llava.write_json(folder / "config.json", config)


HEAD = "language_model.lm_head.weight"
INDEX = "model.safetensors.index.json"
ADAPTER = {"r": 1, "lora_alpha": 1, "base_model_name_or_path": "b"}
CHECKPOINTS = {                              # case -> (damage, part of the message)
    "no config": (remove("config.json"), "config.json is missing"),
    "empty config": (replace("config.json", ""), "config.json is not valid JSON"),
    "truncated config": (truncate("config.json", 0.5), "config.json is not valid JSON"),
    "config in UTF-16": (replace("config.json", b"\xff\xfe{\x00"), "config.json is not valid JSON"),
    "deeply nested config": (replace("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "config is a list": (replace("config.json", "[]"), "config.json is not a JSON object"),
    "config is null": (replace("config.json", "null"), "config.json is not a JSON object"),
    "config is a folder": (replace_by_folder("config.json"), "config.json"),
    "other model type": (edit_config(model_type="gpt2"), "model_type 'gpt2'"),
    "model type is a list": (edit_config(model_type=["llava"]), "model_type is ['llava']"),
    "no model type": (edit_config(model_type=...), "model_type"),
    "text_config is a list": (edit_config(text_config=[]), "text_config"),
    "text_config is null": (edit_config(text_config=None), "text_config"),
    "no text_config": (edit_config(text_config=...), "model_type 'llava'"),
    "vision_config is a string": (edit_config(vision_config="clip"), "vision_config"),
    "no vision_config": (edit_config(vision_config=...), "vision_config"),
    "other type of text_config": (edit_config("text_config", model_type="qwen2"), "model_type is 'qwen2'"),
    "type of text_config is a number": (edit_config("text_config", model_type=7), "model_type is 7"),
    "other activation": (edit_config("text_config", hidden_act="relu"), "hidden_act is 'relu'"),
    "other vision activation": (edit_config("vision_config", hidden_act="gelu"), "hidden_act is 'gelu'"),
    "scaled RoPE": (
        edit_config("text_config", rope_parameters=..., rope_scaling={"type": "linear"}), "'linear'"),
    "RoPE parameters are a number": (edit_config("text_config", rope_parameters=7), "rope"),
    "vision layer out of range": (edit_config(vision_feature_layer=5), "vision_feature_layer is 5"),
    "vision layer is a list": (edit_config(vision_feature_layer=[-2]), "vision_feature_layer is [-2]"),
    "CLS token selected": (
        edit_config(vision_feature_select_strategy="full"), "vision_feature_select_strategy is 'full'"),
    "image token id is a string": (edit_config(image_token_index="32000"), "image_token_i"),
    "image token id is null": (edit_config(image_token_index=None), "image_token_i"),
    "grids are a number": (edit_config(image_grid_pinpoints=5), "grid"),
    "grid with one side": (edit_config(image_grid_pinpoints=[[336]]), "grid"),
    "llava.py: grid with three sides": (edit_config("llava.py", grids=[[1, 2, 3]]), "grid"),
    "llava.py: grid is a string": (edit_config("llava.py", grids=["ab"]), "grid"),
    "llava.py: grid is no multiple of a tile": (
        edit_config("llava.py", image_mode="anyres", grids=[[33, 64]]), "grid"),
    "llava.py: unknown field": (edit_config("llava.py", colour="red"), "colour"),
    "llava.py is a number": (edit_config(**{"llava.py": 3}), "llava.py"),
    "unknown template": (edit_config("llava.py", template="chatml"), "chatml"),
    "unknown image mode": (edit_config("llava.py", image_mode="blur"), "blur"),
    "unknown projector": (edit_config("llava.py", projector="mlp9x"), "mlp9x"),
    "unknown reduction": (edit_config("llava.py", prune="half"), "half"),
    "reduction is a list": (edit_config("llava.py", prune=[]), "prune is []"),
    "keep_tokens is a string": (edit_config("llava.py", prune="random", keep_tokens="4"), "keep"),
    "base does not exist": (edit_config(bases=["/no/such/base"]), "/no/such/base"),
    "bases are a string": (edit_config(bases="/no/such/base"), "bases"),
    "base is a number": (edit_config(bases=[7]), "base 7"),
    "other hidden size": (edit_config("text_config", hidden_size=192), "does not contain the model"),
    "more layers": (edit_config("text_config", num_hidden_layers=3), "layers.2"),
    "fewer layers": (edit_config("vision_config", num_hidden_layers=2), "layers.2"),
    "no weights": (remove("model.safetensors"), "is missing"),
    "empty weights": (replace("model.safetensors", b""), "model.safetensors is damaged"),
    "weights with 4 bytes": (truncate("model.safetensors", 4), "model.safetensors is damaged"),
    "truncated weights": (truncate("model.safetensors", 0.9), "model.safetensors is damaged"),
    "weights truncated in the header": (truncate("model.safetensors", 200), "model.safetensors is damaged"),
    "header of 2^62 bytes": (replace("model.safetensors", struct.pack("<Q", 2**62) + b"{}"), "is damaged"),
    "header is not JSON": (replace("model.safetensors", struct.pack("<Q", 8) + b"{'a': 1}"), "is damaged"),
    "weights are a Git LFS pointer": (replace("model.safetensors", "version https://git-lfs"), "is damaged"),
    "weights are a folder": (replace_by_folder("model.safetensors"), "model.safetensors"),
    "missing tensor": (edit_weights(lambda t: t.pop(HEAD)), "language_model.lm_head.weight is missing"),
    "unknown tensor": (edit_weights(lambda t: t.update(extra=torch.ones(1))), "extra is not part"),
    "transposed tensor": (edit_weights(lambda t: t.update({HEAD: t[HEAD].T.contiguous()})), "instead of"),
    "truncated index": (replace(INDEX, "{"), "index.json is not valid JSON"),
    "index without weight_map": (replace(INDEX, '{}'), "index.json has no weight_map"),
    "weight_map is a list": (replace(INDEX, '{"weight_map": ["model.safetensors"]}'), "index.json"),
    "weight_map with a number": (replace(INDEX, '{"weight_map": {"a": 5}}'), "index.json"),
    "missing shard": (
        replace(INDEX, '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors is missing"),
    "shard in another folder": (
        replace(INDEX, '{"weight_map": {"a": "../model.safetensors"}}'), "same folder"),
    "adapter: no config": (replace("adapter_model.safetensors", b""), "adapter_config.json is missing"),
    "adapter without rank": (write_adapter(lora_alpha=1), "adapter_config.json has no r"),
    "adapter rank is 0": (write_adapter(**ADAPTER | {"r": 0}), "adapter_config.json"),
    "adapter rank is a string": (write_adapter(**ADAPTER | {"r": "x"}), "adapter_config.json"),
    "lora_A without lora_B": (write_adapter(**ADAPTER), "lora_A"),
    "adapter with rank_pattern": (write_adapter(**ADAPTER, rank_pattern={"q_proj": 2}), "rank_pattern"),
    "adapter without base": (write_liuhaotian_adapter, "_name_or_path"),
    "adapter with DoRA": (write_adapter(**ADAPTER, use_dora=True), "use_dora"),
    "pickle of an object": (replace_by_pickle(pickle.dumps(SimpleNamespace())), "pytorch_model.bin"),
    "pickle of a list": (replace_by_pickle(pickle.dumps([1, 2])), "pytorch_model.bin"),
    "empty pickle": (replace_by_pickle(b""), "pytorch_model.bin is damaged"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer.json"),
    "empty tokenizer": (replace("tokenizer.json", ""), "tokenizer.json: the tokenizer cannot be read"),
    "tokenizer is {}": (replace("tokenizer.json", "{}"), "tokenizer.json: the tokenizer cannot be read"),
    "tokenizer in UTF-16": (replace("tokenizer.json", b"\xff\xfe"), "tokenizer.json"),
    "tokenizer without </s>": (remove_end_token, "</s>"),
    "tokenizer config is a list": (replace("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "truncated tokenizer config": (replace("tokenizer_config.json", "{"), "tokenizer_config.json"),
    "CLIP as text_config": (edit_config("text_config", model_type="clip"), "model_type is 'clip'"),
}


@pytest.mark.parametrize("number, name", [*enumerate(CHECKPOINTS)], ids=CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_checkpoint_is_refused(number, name, inputs, tmp_path, assert_refused):
    """The programs take turns, so that every program gets every kind of damage."""
    damage, message = CHECKPOINTS[name]
    shutil.copytree(inputs / "model", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    program = list(PROGRAMS)[number % 4]
    flags = valid_flags(program, inputs, tmp_path, model=tmp_path / "damaged")
    assert_refused(program, flags, message, inputs, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"damaged"}, "no file is written before the error"


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", ["/no/such/model", "nobody/no-such-model", "a file"])
def test_model_that_does_not_exist_is_named(program, name, inputs, tmp_path, assert_refused):
    model = inputs / "records.json" if name == "a file" else name
    flags = valid_flags(program, inputs, tmp_path, model=model)
    assert_refused(program, flags, f"{model} is not a local folder", inputs)


def test_run_that_is_its_own_base_is_refused(inputs, tmp_path, assert_refused):
    shutil.copytree(inputs / "model", tmp_path / "loop")
    edit_config(bases=[str(tmp_path / "loop")])(tmp_path / "loop")
    flags = valid_flags("llava", inputs, tmp_path, model=tmp_path / "loop")
    assert_refused("llava", flags, "loop", tmp_path)


# ---------------------------------------------------------------------------------------------
# Images


def make_png(width: int, height: int) -> bytes:
    """Return a PNG whose header states a size and that has no pixel data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, b"IDAT" + zlib.compress(b""), b"IEND"):
        png += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png


IMAGES = {                                   # case -> content, size of a valid image, or share to keep
    "missing": None, "empty": b"", "text": b"no image", "html": b"<html><body>404</body></html>",
    "truncated": 0.5, "bomb": make_png(60_000, 60_000), "tall": (1, 40_000), "wide": (14_000, 100),
    "no pixels": make_png(0, 0), "no data": make_png(50, 50),
    "jpeg without an image": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    "gif without a frame": b"GIF89a\x05\x00\x05\x00", "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "folder": "folder"}


def damage_image(file: Path, content) -> None:
    valid = file.read_bytes()
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif isinstance(content, tuple):
        Image.new("RGB", content).save(file)
    elif isinstance(content, float):
        file.write_bytes(valid[:int(content * len(valid))])
    elif content is not None:
        file.write_bytes(content)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("program, more_flags", [
    ("llava", []), ("train", []), ("train", ["--check-data"]), ("eval", []), ("prune", [])])
def test_damaged_image_is_refused(program, more_flags, name, inputs, tmp_path, assert_refused):
    images, scienceqa = tmp_path / "images", tmp_path / "scienceqa"
    shutil.copytree(inputs / "images", images)
    shutil.copytree(inputs / "scienceqa", scienceqa)
    file = images / "good.png"
    if program in ("eval", "prune"):
        split = "test" if program == "eval" else "train"
        file = sorted(scienceqa.glob(f"images/{split}/*/*.png"))[0]
    damage_image(file, IMAGES[name])
    flags = valid_flags(program, inputs, tmp_path, images=images, scienceqa=scienceqa) + more_flags
    assert_refused(program, flags, str(file), inputs, tmp_path)


@pytest.mark.parametrize("name", ["bomb", "empty", "truncated", "tall"])
def test_damaged_image_is_refused_when_only_its_size_is_read(name, inputs, tmp_path, assert_refused):
    """With AnyRes the number of tokens depends on the image's size."""
    shutil.copytree(inputs / "images", tmp_path / "images")
    damage_image(tmp_path / "images/good.png", IMAGES[name])
    flags = valid_flags("train", inputs, tmp_path, images=tmp_path / "images") + ["--image-mode", "anyres"]
    assert_refused("train", flags, "good.png", inputs, tmp_path)


# ---------------------------------------------------------------------------------------------
# Records, ScienceQA folders, answer files


def make_records(**changes) -> str:
    """Return JSON of a valid record and of one with changed fields; the value ... removes a field."""
    fields = {"id": "bad", "image": "good.png", "conversations": TURNS} | changes
    bad = {key: value for key, value in fields.items() if value is not ...}
    return json.dumps([{"id": "0", "image": "good.png", "conversations": TURNS}, bad])


HUMAN, GPT = TURNS
RECORDS = {                                  # case -> (content of the file, part of the message)
    "empty": ("", "not valid JSON"), "truncated": ('[{"id": 1', "not valid JSON"),
    "object": ("{}", "is not a list"), "empty list": ("[]", "is not a list"),
    "null": ("null", "is not a list"), "number": ("[3]", "record 0"), "list": ("[[]]", "record 0"),
    "JSON lines": ('{"id": 1}\n{"id": 2}', "not valid JSON"),
    "no conversations": (make_records(conversations=...), "record bad"),
    "conversations are null": (make_records(conversations=None), "record bad"),
    "conversations are a string": (make_records(conversations="Hello"), "record bad"),
    "conversations are an object": (make_records(conversations={"from": "human"}), "record bad"),
    "no turns": (make_records(conversations=[]), "record bad"),
    "no answer": (make_records(conversations=[HUMAN]), "it has no answer"),
    "empty answer": (make_records(conversations=[HUMAN, GPT | {"value": ""}]), "an answer is empty"),
    "answer is null": (make_records(conversations=[HUMAN, GPT | {"value": None}]), "record bad"),
    "answer is a number": (make_records(conversations=[HUMAN, GPT | {"value": 3}]), "record bad"),
    "question is null": (make_records(conversations=[HUMAN | {"value": None}, GPT]), "record bad"),
    "question is a list": (make_records(conversations=[HUMAN | {"value": ["<image>"]}, GPT]), "record bad"),
    "two questions": (make_records(conversations=[HUMAN, HUMAN]), "turn 2 is from 'human'"),
    "system turn": (
        make_records(conversations=[{"from": "system", "value": "x"}, *TURNS]), "turn 1 is from 'system'"),
    "answer first": (make_records(conversations=[GPT, HUMAN, HUMAN]), "turn 3 is from 'human'"),
    "no role": (make_records(conversations=[{"value": "x"}, GPT]), "record bad"),
    "roles of another format": (make_records(conversations=[{"role": "user", "content": "x"}]), "record bad"),
    "<image> without an image": (make_records(image=...), "1 <image> in the text, but 0 images"),
    "two images": (make_records(image=["good.png"] * 2), "but 2 images"),
    "image is a number": (make_records(image=5), "record bad"),
    "image is a list of numbers": (make_records(image=[5]), "record bad"),
    "image is an object": (make_records(image={"file": "good.png"}), "record bad"),
    "image does not exist": (make_records(image="none.png"), "none.png"),
    "image in the parent folder": (make_records(image="../records.json"), "../records.json is outside"),
    "absolute path": (make_records(image="/etc/passwd"), "/etc/passwd is outside"),
    "image with a zero byte": (make_records(image="a\0b.png"), "record bad"),
    "<image> in both": (make_records(conversations=[HUMAN, GPT | {"value": "<image>"}]), "2 <image>"),
    "<image> in the answer": (make_records(conversations=[
        HUMAN | {"value": "Is it?"}, GPT | {"value": "<image>"}]), "an answer contains <image>"),
    "half a surrogate pair": (make_records(conversations=[HUMAN, GPT | {"value": "\ud800"}]), "record bad"),
    "id is a list": (make_records(id=["a"], conversations=[]), "record ['a']")}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("more_flags", [[], ["--check-data"]], ids=["train", "check-data"])
def test_bad_records_are_refused(more_flags, name, inputs, tmp_path, assert_refused):
    content, message = RECORDS[name]
    (tmp_path / "records.json").write_text(content)
    flags = valid_flags("train", inputs, tmp_path, data=tmp_path / "records.json") + more_flags
    assert_refused("train", flags, message, inputs, tmp_path)


def edit_problem(**changes):
    """Change fields of the first problem of each split; the value ... removes a field."""
    def damage(folder: Path) -> None:
        problems = json.loads((folder / "problems.json").read_text())
        splits = json.loads((folder / "pid_splits.json").read_text())
        for ids in splits.values():
            fields = problems[ids[0]] | changes
            problems[ids[0]] = {key: value for key, value in fields.items() if value is not ...}
        (folder / "problems.json").write_text(json.dumps(problems))
    return damage


def repeat_question(folder: Path) -> None:
    splits = json.loads((folder / "pid_splits.json").read_text())
    repeated = {name: [*ids, ids[0]] for name, ids in splits.items()}
    (folder / "pid_splits.json").write_text(json.dumps(repeated))


def use_id(question_id: str):
    """Make a question with this id the only one of each split."""
    def damage(folder: Path) -> None:
        problems = json.loads((folder / "problems.json").read_text())
        problems[question_id] = next(iter(problems.values()))
        (folder / "problems.json").write_text(json.dumps(problems))
        (folder / "pid_splits.json").write_text(json.dumps({"train": [question_id], "test": [question_id]}))
    return damage


SCIENCEQA = {                                # case -> (damage, part of the message)
    "no folder": (shutil.rmtree, "problems.json is missing"),
    "no problems": (remove("problems.json"), "problems.json is missing"),
    "no splits": (remove("pid_splits.json"), "pid_splits.json is missing"),
    "truncated problems": (truncate("problems.json", 0.5), "problems.json is not valid JSON"),
    "problems are a list": (replace("problems.json", "[]"), "problems.json"),
    "problems are numbers": (replace("problems.json", '{"1": 5, "13": 5}'), "problems.json"),
    "splits are a list": (replace("pid_splits.json", "[]"), "pid_splits.json"),
    "split is a number": (replace("pid_splits.json", '{"test": 5, "train": 5}'), "pid_splits.json"),
    "id is a number": (replace("pid_splits.json", '{"test": [5], "train": [5]}'), "5"),
    "missing split": (replace("pid_splits.json", '{"val": []}'), "pid_splits.json has no split"),
    "empty split": (replace("pid_splits.json", '{"test": [], "train": []}'),
                    {"prune": "0 questions", "eval": "no question"}),
    "question in the parent folder": (
        replace("pid_splits.json", '{"test": [".."], "train": [".."]}'), "question .."),
    "split in the parent folder": (edit_problem(split=".."), "'..' is not the name"),
    "empty name of a split": (edit_problem(split=""), "'' is not the name"),
    "unknown question": (replace("pid_splits.json", '{"test": ["x"], "train": ["x"]}'), "lacks question x"),
    "repeated question": (repeat_question, " twice"),
    "id in the parent folder": (use_id(".."), "'..' is not the name"),
    **{f"no {field}": (edit_problem(**{field: ...}), "problems.json")
       for field in ("question", "choices", "answer", "hint", "image", "split", "grade", "subject")},
    **{f"{field} is a list": (edit_problem(**{field: []}), "problems.json")
       for field in ("question", "answer", "grade", "choices")},
    "answer out of range": (edit_problem(answer=9), "problems.json"),
    "answer is negative": (edit_problem(answer=-1), "problems.json"),
    "answer is a letter": (edit_problem(answer="A"), "problems.json"),
    "six choices": (edit_problem(choices=list("abcdef"), answer=5), "problems.json"),
    "unknown grade": (edit_problem(grade="high school"), "problems.json"),
    "image outside the folder": (edit_problem(image="../../../../secret.png"), "secret.png"),
    "split outside the folder": (edit_problem(split="../..", image="secret.png"), "problems.json"),
    "image with an absolute path": (edit_problem(image="/etc/passwd"), "/etc/passwd")}


@pytest.mark.parametrize("name", SCIENCEQA)
@pytest.mark.parametrize("program", ["eval", "prune"])
def test_damaged_scienceqa_folder_is_refused(program, name, inputs, tmp_path, assert_refused):
    damage, message = SCIENCEQA[name]
    shutil.copytree(inputs / "scienceqa", tmp_path / "scienceqa")
    damage(tmp_path / "scienceqa")
    flags = ["--scienceqa", tmp_path / "scienceqa"]
    if program == "eval":
        flags += ["--predictions", inputs / "answers.jsonl"]
    else:
        flags += ["--method", "guided", "--keep", 5, "--out", tmp_path / "set.json"]
    if isinstance(message, dict):
        message = message[program]
    assert_refused(program, flags, message, inputs, tmp_path)


@pytest.mark.parametrize("value", [..., None, 3])
@pytest.mark.parametrize("field", ["topic", "category", "skill"])
def test_question_without_a_field_of_prune_is_refused(field, value, inputs, tmp_path, assert_refused):
    """Only prune.py reads these fields. Without them: `...`."""
    shutil.copytree(inputs / "scienceqa", tmp_path / "scienceqa")
    edit_problem(**{field: value})(tmp_path / "scienceqa")
    flags = ["--scienceqa", tmp_path / "scienceqa", "--method", "guided", "--keep", 5,
             "--out", tmp_path / "set.json"]
    assert_refused("prune", flags, f"{field} is missing or of the wrong type", inputs, tmp_path)


LINE = '{"question_id": "13", "text": "A"}'
ANSWERS = {                                  # case -> (content of the file, part of the message)
    "missing": (None, "cannot be read"), "folder": ("folder", "cannot be read"),
    "truncated": (LINE[:-5].encode(), "line 1"), "no JSON": (b"A\n", "line 1"),
    "list": (b"[1]", "line 1"), "number": (b"7", "line 1"), "null": (b"null", "line 1"),
    "no id": (b'{"text": "A"}', "line 1"), "no text": (b'{"question_id": "13"}', "line 1"),
    "text is a number": (b'{"question_id": "13", "text": 4}', "line 1"),
    "text is null": (b'{"question_id": "13", "text": null}', "line 1"),
    "second line": (f"{LINE}\n{{".encode(), "line 2"),
    "repeated": (f"{LINE}\n{LINE}".encode(), "answered before"),
    "binary": (b"\xff\xfe\x00", "line 1"), "deeply nested": (b"[" * 100_000, "line 1")}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("flag", ["--predictions", "--compare", "--out"])
def test_bad_answer_file_is_refused(flag, name, inputs, tmp_path, assert_refused):
    if flag == "--out" and name in ("missing", "truncated"):
        pytest.skip("eval.py creates a missing file and continues one that an interrupt truncated")
    content, message = ANSWERS[name]
    file = tmp_path / "answers.jsonl"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if name == "truncated" else content + b"\n")
    arguments = [file]
    if flag == "--compare":
        arguments = [inputs / "answers.jsonl", file]
    elif flag == "--out":
        arguments, message = [file, "--model", inputs / "model"], "answers.jsonl"
    assert_refused("eval", ["--scienceqa", inputs / "scienceqa", flag, *arguments], message, inputs, tmp_path)


@pytest.mark.parametrize("content, message", [
    ("{}", "neither a list"), ("[{}]", "neither a list"), ('["x"]', "lists 1 questions"),
    ("[", "not valid JSON"), ("[[]]", "list"), ("[null]", "list"), ("[]", "is an empty list")])
@pytest.mark.parametrize("flag", ["--from-list", "--report"])
def test_bad_list_of_ids_is_refused(flag, content, message, inputs, tmp_path, assert_refused):
    file, out = tmp_path / "list.json", tmp_path / "set.json"
    file.write_text(content)
    flags = ["--scienceqa", inputs / "scienceqa", flag, file, "--out", out]
    assert_refused("prune", flags, message, inputs, tmp_path)


@pytest.mark.parametrize("conversations", ['"text"', '[{"role": "user", "content": "x"}]', "[5]"])
def test_report_on_records_of_another_format_is_refused(conversations, tmp_path, assert_refused):
    (tmp_path / "r.json").write_text(f'[{{"id": "1", "conversations": {conversations}}}]')
    assert_refused("prune", ["--report", tmp_path / "r.json"], "not LLaVA's", tmp_path)


@pytest.mark.parametrize("content", ["[", "[]", "7", '{"1": 5}', '{"captions": 3}'])
def test_bad_image_text_is_refused(content, inputs, tmp_path, assert_refused):
    (tmp_path / "captions.json").write_text(content)
    flags = ["--scienceqa", inputs / "scienceqa", "--method", "guided", "--keep", 5,
             "--out", tmp_path / "set.json", "--image-text", tmp_path / "captions.json"]
    assert_refused("prune", flags, "captions.json", inputs, tmp_path)


CAPTIONS = {                                 # case -> (content of the file, part of the message)
    "missing": (None, "is missing"), "truncated": ("[", "not valid JSON"),
    "number": ("7", "not a COCO captions file"), "null": ("null", "not a COCO"),
    "list of numbers": ("[3]", "not a COCO"), "no caption": ('[{"image": "a.png"}]', "not a COCO"),
    "no name": ('[{"image": "", "caption": "x"}]', "not a COCO"),
    "name is a number": ('[{"image": 5, "caption": "x"}]', "not a COCO"),
    "caption is a list": ('[{"image": "a.png", "caption": []}]', "not a COCO"),
    "COCO without images": ('{"annotations": []}', "not a COCO"),
    "COCO with an unknown image": (
        '{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "not a COCO"),
    "COCO images are numbers": ('{"images": [1], "annotations": []}', "not a COCO"),
    "names differ only in the suffix": (
        '[{"image": "a.png", "caption": "x"}, {"image": "a.jpg", "caption": "y"}]',
        "differ in their suffix only")}


@pytest.mark.parametrize("name", CAPTIONS)
@pytest.mark.parametrize("flag", ["--expand", "--generate"])
def test_bad_captions_are_refused(flag, name, inputs, tmp_path, assert_refused):
    content, message = CAPTIONS[name]
    file = tmp_path / "captions.json"
    if content is not None:
        file.write_text(content)
    flags = ["--expand", file]
    if flag == "--generate":
        flags = ["--generate", "conversation", "--captions", file, "--judge-model", "m", "--dry-run"]
    assert_refused("prune", [*flags, "--out", tmp_path / "out.json"], message, inputs, tmp_path)


def coco(height: int, **annotation) -> str:
    """Return a COCO instances file with one image and one box."""
    image, category = {"id": 1, "width": 10, "height": height}, {"id": 1, "name": "cat"}
    return json.dumps({"images": [image], "categories": [category], "annotations": [annotation]})


BOXES = {                                    # case -> (content of the file, part of the message)
    "missing": (None, "is missing"), "truncated": ("{", "not valid JSON"),
    "list": ("[]", "not a COCO instances file"),
    "two numbers": (coco(10, bbox=[1, 2], image_id=1, category_id=1), "not a COCO instances file"),
    "string": (coco(10, bbox="abcd", image_id=1, category_id=1), "not a COCO instances file"),
    "outside": (coco(10, bbox=[5, 5, 9, 9], image_id=1, category_id=1), "is not inside image 1"),
    "unknown category": (coco(10, bbox=[1, 1, 1, 1], image_id=1, category_id=9), "not a COCO"),
    "unknown image": (coco(10, bbox=[1, 1, 1, 1], image_id=9, category_id=1), "not a COCO"),
    "height is 0": (coco(0, bbox=[0, 0, 0, 0], image_id=1, category_id=1), "not a COCO")}


@pytest.mark.parametrize("name", BOXES)
def test_bad_boxes_are_refused(name, inputs, tmp_path, assert_refused):
    content, message = BOXES[name]
    captions, boxes = tmp_path / "captions.json", tmp_path / "boxes.json"
    captions.write_text('[{"image": "1.png", "caption": "A cat."}]')
    if content is not None:
        boxes.write_text(content)
    flags = ["--generate", "detail", "--captions", captions, "--boxes", boxes, "--judge-model", "m",
             "--dry-run", "--out", tmp_path / "out.json"]
    assert_refused("prune", flags, message, inputs, tmp_path)


# ---------------------------------------------------------------------------------------------
# Flags

TRAIN = "--stage 2 --data d --out o --init i"
STUDY = "--study s --scienceqa d --pretrain p --vision v --language l"
INVALID_FLAGS = {                            # program -> [(flags, part of the message)]; the exit code is 2
    "llava": [
        ("", "--model"), ("--model m --nonsense", "--nonsense"), ("--model m --temp 1", "--temp"),
        ("--model m --temperature warm", "--temperature"), ("--model m --temperature nan", "--temp"),
        ("--model m --temperature -1", "--temperature"), ("--model m --top-p 0", "--top-p"),
        ("--model m --max-new-tokens 0", "--max-new-tokens"), ("--model m --seed x", "--seed"),
        ("--model m --seed 99999999999999999999", "--seed"),
        ("--model m --image i --show-kept k.psd", "--show-kept"),
        ("--model m --max-new-tokens 1.5", "--max-new-tokens"), ("--model m --dtype int8", "--dtype"),
        ("--model m --prune most", "--prune"), ("--model m --image-mode big", "--image-mode"),
        ("--model m --template x", "--template"), ("--model m --keep-tokens -3", "--keep-tokens"),
        ("--model m --save d What?", "--save"), ("--model m --show-kept f", "--show-kept"),
        ("--model m --device gpu", "--device"), ("--model m --image i --show-kept k.docx", "--show-kept"),
        ("--model m --quantize int3", "--quantize")],
    "train": [
        (f"{TRAIN} --lora-rank 4 --lora-alpha 0", "--lora-alpha"),
        ("--data d --out o --init i", "--stage"), ("--stage 3 --data d --out o --init i", "--stage"),
        ("--stage 1 --out o --init i", "--data"), ("--stage 1 --data d --init i", "--out"),
        ("--stage 1 --data d --out o", "--init"), ("--stage 1 --data d --out o --vision v", "--init"),
        *[(f"{TRAIN} {flags}", flags.split()[0]) for flags in (
            "--epochs 0", "--epochs x", "--batch-size 0", "--batch-size -1", "--micro-batch-size 0",
            "--lr -1", "--lr nan", "--max-length 0", "--lora-rank -1", "--card a100", "--workers -1",
            "--save-every 0", "--clip -1", "--dtype int4", "--template x", "--checkpoint-blocks -1",
            "--device gpu", "--see 5")],
        (f"{TRAIN} --lora-alpha 3", "--lora-... needs --lora-rank"),
        ("--stage 1 --data d --out o --init i --lora-rank 4", "--lora-rank"),
        ("--stage 1 --data d --out o --init i --val-every 4", "--val"),
        ("--stage 1 --data d --out o --init i --val v --val-every 0", "--val-every")],
    "eval": [
        ("--scienceqa d --model m --device tpu", "--device"), ("", "--scienceqa"),
        ("--scienceqa d", "--model"), ("--model m", "--scienceqa"),
        ("--scienceqa d --model m --predictions p", "--predictions"),
        ("--scienceqa d --model m --batch-size 0", "--batch-size"),
        ("--scienceqa d --model m --max-new-tokens 0", "--max-new-tokens"),
        ("--scienceqa d --model m --limit 0", "--limit"), ("--scienceqa d --model m --limit -1", "--limit"),
        ("--scienceqa d --compare a", "--compare"), ("--cost -5", "--cost"), ("--cost --bas b", "--bas"),
        ("--scienceqa d --model m --pictures some", "--pictures"),
        ("--task llavabench --model m --images d --reviews r", "--questions")],
    "prune": [
        *[(f"{STUDY} {flags}", flags.split()[0]) for flags in (
            "--seed 3", "--pooling mean", "--layer 2", "--batch-size 4", "--split val", "--pictures only",
            "--image-text t", "--base b", "--quantize int8")],
        *[(f"{STUDY} {flags}", flags.split("=", 1)[1]) for flags in (
            "--stage1=--epoch=1", "--stage2=--epoch=1", "--stage2=--nonsense", "--eval=--lim=4")],
        ("--report r.json --draw chart.psd", "--draw"), ("--method maxmin --quantize 4", "--quantize"),
        ("--generate conversation --out o --captions c", "--judge-model"),
        ("--generate detail --out o --captions c --judge-model m", "--boxes"), ("--expand c", "--out"),
        ("--expand c --out o --style long", "--style"), ("--expand c --out o --limit 0", "--limit"),
        ("--expand c --out o --workers 0", "--workers"), ("", "--method"),
        ("--expand c --out o --lim 3", "--lim"),
        ("--method random --scienceqa d", "--out"), ("--method random --out o", "--scienceqa"),
        ("--method best --scienceqa d --out o", "--method"),
        ("--method random --report r --scienceqa d", "--report"), ("--study s --scienceqa d", "--pretrain"),
        (f"{STUDY} --prune pool", "--stage1"),
        ("--method maxmin --scienceqa d --out o --model m --batch-size 0", "--batch-size"),
        ("--method random --scienceqa d --out o --keep x", "--keep"),
        ("--report r.json --draw chart.docx", "--draw"), ("--report r.json --cache c", "--scienceqa")]}
if not torch.cuda.is_available():
    INVALID_FLAGS["llava"].append(("--model m --device cuda", "--device"))


@pytest.mark.parametrize("program, flags, message", [
    pytest.param(program, flags, message, id=f"{program} {flags}")
    for program, cases in INVALID_FLAGS.items() for flags, message in cases])
def test_invalid_flag_is_refused_by_name(program, flags, message, tmp_path, monkeypatch, assert_refused):
    monkeypatch.chdir(tmp_path)
    assert_refused(program, flags.split(), message, tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def contradictions(inputs: Path, out: Path) -> dict[str, tuple[str, list, str]]:
    """Return {case: (program, flags, part of the message)}: valid flags that contradict the data."""
    llava_flags, train_flags, eval_flags, prune_flags = (
        valid_flags(program, inputs, out) for program in PROGRAMS)
    model, scienceqa, records = inputs / "model", inputs / "scienceqa", inputs / "records.json"
    random_flags = ["--scienceqa", scienceqa, "--method", "random", "--out", out / "set.json"]
    generate_flags = ["--generate", "conversation", "--captions", inputs / "captions.json",
                      "--judge-model", "m", "--out", out / "out.json"]
    return {
        "more <image> than images": ("llava", [*llava_flags[:-1], "<image> <image> What?"], "has 2 <image>"),
        "<image> without an image": ("llava", ["--model", model, "<image> What?"], "has 1 <image>"),
        "keep_tokens without prune": ("llava", [*llava_flags, "--keep-tokens", 3], "--keep-tokens"),
        "prune without keep_tokens": ("llava", [*llava_flags, "--prune", "random"], "--keep-tokens"),
        "keep_tokens is too large": ("eval", [*eval_flags, "--prune", "pool", "--keep-tokens", 99], "99"),
        "show_kept without prune": ("llava", [*llava_flags, "--show-kept", out / "kept.png"], "--show-kept"),
        "int4 with unsuitable shapes": ("llava", [*llava_flags, "--quantize", "int4"], "use --quantize int8"),
        "int8 in float16": (
            "eval", [*eval_flags, "--quantize", "int8", "--dtype", "float16"], "--dtype bfloat16"),
        "bases of a model without bases": ("llava", [*llava_flags, "--base", "a", "--base", "b"], "--base"),
        "save to the model": ("llava", ["--model", model, "--save", model], "is not empty"),
        "save to a file": ("llava", ["--model", model, "--save", records], "records.json"),
        "no tokenizer": ("llava", [*llava_flags, "--tokenizer", inputs / "images"], "has no tokenizer.json"),
        "run folder is a file": ("train", [*train_flags, "--out", records], "records.json"),
        "records are a folder": ("train", [*train_flags, "--data", inputs], str(inputs)),
        "missing validation file": (
            "train", [*train_flags, "--val", out / "none.json"], "none.json is missing"),
        "no validation images": (
            "train", [*train_flags, "--val", records, "--val-images", out / "none"], "there is no image"),
        "judge URL is not HTTP": ("prune", [*generate_flags, "--judge", "ftp://x"], "--judge"),
        "no images": ("train", [*train_flags, "--images", out / "none"], "there is no image"),
        "answer beyond max_length": ("train", [*train_flags, "--max-length", 5], "within --max-length 5"),
        "show: index too large": ("train", [*train_flags, "--show", 99], "--show 99"),
        "show: negative index": ("train", [*train_flags, "--show", -1], "--show -1"),
        "cost of a vision tower": ("eval", ["--cost", "--model", out / "clip"], "there is no text model in"),
        "unknown split": ("eval", [*eval_flags, "--split", "holdout"], "has no split 'holdout'"),
        "answers in a missing folder": (
            "eval", [*eval_flags, "--out", out / "none/answers.jsonl"], "none/answers.jsonl"),
        "answers with other settings": (
            "eval", [*eval_flags, "--out", inputs / "answers.jsonl"], "was made with unknown settings"),
        "records as answers": ("eval", [*eval_flags, "--out", records], "records.json"),
        "keep 0": ("prune", [*random_flags, "--keep", 0], "--keep 0"),
        "keep more than all": ("prune", [*random_flags, "--keep", 99], "--keep 99"),
        "keep fewer than subjects": ("prune", [*random_flags, "--method", "guided", "--keep", 1], "--keep 1"),
        "no model": ("prune", [*random_flags, "--method", "maxmin", "--keep", 2], "--model"),
        "unknown layer": ("prune", [*prune_flags, "--layer", 9], "--layer 9"),
        "set inside a file": (
            "prune", [*random_flags, "--keep", 2, "--out", records / "set.json"], "records.json"),
        "missing report": ("prune", ["--report", inputs / "none.json"], "none.json is missing"),
    }


@pytest.mark.parametrize("name", contradictions(Path("."), Path(".")))
def test_flags_that_contradict_the_data_are_refused(name, inputs, tmp_path, assert_refused):
    program, flags, message = contradictions(inputs, tmp_path)[name]
    llava.write_json(tmp_path / "clip/config.json", llava.hf_config(LlavaConfig(), True)["vision_config"])
    assert_refused(program, flags, message, inputs, tmp_path)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{program: (working directory, process)}; the flags name files that do not exist."""
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
def test_command_prints_one_line_and_exits_with_1(program, processes):
    folder, process = processes[program]
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 1 and stdout == "" and "none" in stderr
    assert len(stderr.splitlines()) == 1 and not list(folder.iterdir())


# ---------------------------------------------------------------------------------------------
# The Python interface

IMAGE = torch.zeros(1, 3, 32, 32)


def ids(model, *tokens) -> torch.Tensor:
    return torch.tensor([[model.config.image_token_id if token == "<image>" else token for token in tokens]])


PYTHON = {                                   # case -> (call(model, processor, inputs), part of the message)
    "no source": (lambda m, p, f: Llava.from_pretrained(), "name one LLaVA"),
    "vision without language": (lambda m, p, f: Llava.from_pretrained(vision=f / "model"), "name one LLaVA"),
    "three sources": (lambda m, p, f: Llava.from_pretrained(f, vision=f, language=f), "name one LLaVA"),
    "unknown quantization": (lambda m, p, f: Llava.from_pretrained(f / "model", quantize="int3"), "int3"),
    "unknown template": (lambda m, p, f: Llava.from_pretrained(f / "model", template="chatml"), "chatml"),
    "unknown image mode": (lambda m, p, f: Llava.from_pretrained(f / "model", image_mode="blur"), "blur"),
    "missing processor": (lambda m, p, f: Processor.from_pretrained(f / "none"), "none"),
    "folder without a tokenizer": (
        lambda m, p, f: Processor.from_pretrained(f / "images", m.config), "tokenizer.json"),
    "keep_tokens too large": (lambda m, p, f: LlavaConfig(prune="random", keep_tokens=9999), "9999"),
    "processor: missing image": (lambda m, p, f: p([{"role": "user", "content": "<image>"}]), "1 <image>"),
    "processor: unused image": (
        lambda m, p, f: p([{"role": "user", "content": "x"}], [Image.new("RGB", (9, 9))]), "0 <image>"),
    "half of a surrogate pair": (lambda m, p, f: p([{"role": "user", "content": "\ud83d"}]), "surrogate"),
    "two user messages": (lambda m, p, f: p([{"role": "user", "content": "x"}] * 2), "alternate"),
    "assistant first": (lambda m, p, f: p([{"role": "assistant", "content": "x"}]), "alternate"),
    "system message": (lambda m, p, f: p([{"role": "system", "content": "x"}]), "role system"),
    "forward: missing image": (lambda m, p, f: m(ids(m, 1, "<image>", 5)), "1 <image>"),
    "forward: unused image": (lambda m, p, f: m(ids(m, 1, 5), [IMAGE], [(32, 32)]), "0 <image>"),
    "no supervised token": (
        lambda m, p, f: m(ids(m, 1, 5), labels=torch.full((1, 2), -100)), "nothing to learn"),
    "generate: missing image": (lambda m, p, f: list(m.generate(ids(m, 1, "<image>"))), "1 <image>"),
    "generate_batch: missing image": (lambda m, p, f: m.generate_batch(ids(m, 1, "<image>")), "1 <image>"),
    "unknown reduction": (lambda m, p, f: m.encode_images([IMAGE], [(32, 32)], prune="half"), "half"),
    "reduction without keep_tokens": (
        lambda m, p, f: m.encode_images([IMAGE], [(32, 32)], prune="random"), "--keep-tokens"),
    "select 0 points": (lambda m, p, f: farthest_points(torch.ones(3, 2), 0), "0 of 3 points"),
    "select too many points": (lambda m, p, f: farthest_points(torch.ones(3, 2), 4), "4 of 3 points"),
    "points with NaN": (lambda m, p, f: farthest_points(torch.tensor([[1.0], [float("nan")]]), 1), "point 1"),
    "missing image file": (lambda m, p, f: llava.open_image(f / "none.png"), "there is no image"),
    "missing JSON file": (lambda m, p, f: llava.read_json(f / "none.json"), "none.json is missing"),
    "unknown split": (lambda m, p, f: evaluation.read_scienceqa(f / "scienceqa", "x"), "no split 'x'"),
    "missing records": (lambda m, p, f: train.read_records(f / "none.json", f), "none.json is missing"),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_interface_raises_one_sentence(name, model_and_processor, inputs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    call, message = PYTHON[name]
    before = snapshot(inputs)
    with pytest.raises((llava.UserError, OSError)) as error:
        call(*model_and_processor, inputs)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert snapshot(inputs) == before


@pytest.mark.parametrize("error, message", [(torch.OutOfMemoryError("CUDA out of memory"), "--batch-size"),
                                            (llava.SafetensorError("No space left"), "No space left")])
def test_full_memory_or_disk_is_reported_in_one_sentence(error, message, monkeypatch):
    def main() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit, match=f"eval.py: .*{message}"):
        llava.command_line(main)


def test_interrupted_download_is_reported_in_one_sentence(monkeypatch):
    def download(*_, **__):
        raise RuntimeError("connection reset\nby peer")

    monkeypatch.setattr(llava, "snapshot_download", download)
    with pytest.raises(OSError, match="nobody/model is not a local folder .* connection reset$"):
        llava.fetch("nobody/model")
