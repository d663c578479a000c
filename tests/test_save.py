"""Test saving: shards, whole models from run folders, moved bases; and errors of bad flags and configs."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import llava
from llava import Llava, Processor, UserError, command_line, replace
from tests import toy


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return toy.write_random(tmp_path_factory.mktemp("random") / "model")


def run_llava(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["llava.py", *map(str, arguments)])
    command_line(llava.main)


def assert_same_tensors(one, other) -> None:
    """The models in two folders have the same tensors."""
    a, b = (Llava.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_logits(model, hf_model) -> None:
    ids = torch.randint(5, 300, (1, 12))
    with torch.no_grad():
        expected = hf_model(input_ids=ids).logits[..., :model.config.text.vocab_size]
        torch.testing.assert_close(model(ids), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shard_bytes, shards", [(10**9, 1), (400_000, None), (1, None)])      # more than 3
def test_shards_are_not_too_large_and_have_the_same_tensors(random_model, tmp_path, shard_bytes, shards):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards or (shards is None and len(files) > 3)
    assert_same_tensors(random_model, tmp_path)
    if shards is None:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        largest = max(t.nbytes for t in model.state_dict().values())
        tensors = {file.name: llava.open_file(file) for file in files}
        sizes = [sum(t.nbytes for t in shard.values()) for shard in tensors.values()]
        assert all(size <= max(shard_bytes, 2 * largest) for size in sizes)
        assert {key: file for file, shard in tensors.items() for key in shard} == index["weight_map"]
        assert index["metadata"]["total_size"] == sum(sizes)
    assert not list(tmp_path.glob(".*")), "a temporary file is left"


@pytest.mark.parametrize("first, second", [(400_000, 10**9), (10**9, 400_000)])
def test_a_single_file_and_shards_replace_each_other(random_model, tmp_path, first, second):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=first)
    with torch.no_grad():
        model.projector[0].weight.zero_()
    model.save_pretrained(tmp_path, shard_bytes=second)
    assert not Llava.from_pretrained(tmp_path, dtype=torch.float32).projector[0].weight.any()
    names = {file.name for file in tmp_path.glob("model.safetensors*")}   # only one of the two
    assert names == {"model.safetensors" if second > first else "model.safetensors.index.json"}


def test_saved_tokenizer_has_the_image_token_id_of_a_larger_embedding(random_model, tmp_path):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    processor = Processor.from_pretrained(random_model, model.config)
    original = llava.Tokenizer.from_str(toy.make_tokenizer().to_str())
    config = llava.replace(model.config, image_token_id=original.get_vocab_size() + 5)
    Processor(original.to_str(), config).save_pretrained(tmp_path)
    saved = llava.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.token_to_id("<image>") == config.image_token_id
    ids = saved.encode("What color is it?", add_special_tokens=False).ids
    assert ids == original.encode("What color is it?").ids
    assert processor.tokenizer.token_to_id("<unused0>") is None


def test_save_without_a_tokenizer_writes_nothing(random_model, tmp_path, monkeypatch):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--save", str(tmp_path / "whole")]
    monkeypatch.setattr("sys.argv", ["llava.py", *arguments])
    with pytest.raises(OSError, match="--tokenizer"):
        llava.main()
    assert not (tmp_path / "whole").exists()


def test_transformers_opens_shards(random_model, tmp_path):
    hf = pytest.importorskip("transformers", minversion="5")
    Llava.from_pretrained(random_model, dtype=torch.float32).save_pretrained(tmp_path, shard_bytes=400_000)
    hf_model, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    assert_same_logits(Llava.from_pretrained(random_model, dtype=torch.float32), hf_model)


def write_lora_run(base, folder) -> None:
    """Write a run folder like train.py --lora-rank: an adapter, the projector and the name of the base."""
    model = Llava.from_pretrained(base, dtype=torch.float32)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.save_pretrained(folder, whole=False)
    tensors, prefix = llava.open_file(folder / "model.safetensors"), "base_model.model.model."
    adapter = {prefix + name: t.clone() for name, t in tensors.items()}
    outputs, inputs = model.language_model.layers[0].self_attn.q_proj.weight.shape
    name = f"{prefix}language_model.layers.0.self_attn.q_proj.lora_"
    adapter |= {f"{name}A.weight": torch.randn(4, inputs), f"{name}B.weight": torch.randn(outputs, 4)}
    (folder / "model.safetensors").unlink()
    llava.save_file(adapter, folder / "adapter_model.safetensors")
    llava.write_json(folder / "adapter_config.json",
                     {"r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)})
    Processor.from_pretrained(base, model.config).save_pretrained(folder)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_save_merges_a_lora_run_into_a_whole_model(random_model, tmp_path, monkeypatch, dtype):
    write_lora_run(random_model, tmp_path / "run")
    dtype_flag = ("--dtype", dtype) if dtype else ()
    run_llava(monkeypatch, "--model", tmp_path / "run", "--save", tmp_path / "whole", *dtype_flag)
    saved = llava.open_file(tmp_path / "whole" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {getattr(torch, dtype or "float32")}
    if dtype:
        return
    assert_same_tensors(tmp_path / "run", tmp_path / "whole")
    base = Llava.from_pretrained(random_model, dtype=torch.float32).state_dict()
    merged = Llava.from_pretrained(tmp_path / "whole", dtype=torch.float32).state_dict()
    assert [n for n in base if not torch.equal(base[n], merged[n])] == [
        "language_model.layers.0.self_attn.q_proj.weight"]
    hf = pytest.importorskip("transformers", minversion="5")
    hf_model, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "whole", output_loading_info=True)
    assert not any(report.values()), report
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "whole", use_fast=False)
    assert processor.tokenizer("<image>")["input_ids"][-1] == hf_model.config.image_token_id
    assert_same_logits(Llava.from_pretrained(tmp_path / "run", dtype=torch.float32), hf_model)


def test_save_does_not_overwrite_files(random_model, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        run_llava(monkeypatch, "--model", random_model, "--save", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_saved_files_can_be_read_by_all_whom_the_umask_allows(random_model):
    modes = {file.suffix: file.stat().st_mode & 0o777 for file in random_model.iterdir()}
    assert modes[".safetensors"] == modes[".json"]


def test_show_kept_does_not_overwrite_the_image(random_model, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        run_llava(monkeypatch, "--model", random_model, "--image", "a.png", "--show-kept", "./a.png", "What?")
    assert error.value.code == 2 and "a.png is named by another flag" in capsys.readouterr().err


def test_conversation_goes_on_after_a_mistake_and_warns_of_too_many_tokens(random_model, monkeypatch, capsys):
    questions = ["What?", "And <image>?", "word " * 600, ""]
    monkeypatch.setattr("builtins.input", lambda _: questions.pop(0))
    run_llava(monkeypatch, "--model", random_model, "--max-new-tokens", 2, "--dtype", "float32")
    printed = capsys.readouterr()
    assert not questions and len(printed.out.splitlines()) == 2
    first, second = printed.err.splitlines()
    assert first == "the text has 1 <image>, but 0 images are given"
    assert re.match(r"the conversation has 6\d\d tokens, but the model was made for 512: ", second)


def test_output_to_a_reader_that_has_ended_is_no_error(random_model):
    command = f"{sys.executable} llava.py --model {random_model} --trace What? | head -1"
    folder = llava.Path(llava.__file__).parent
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=folder)
    assert done.stdout.startswith("module") and done.stderr == ""


def test_a_write_follows_links_and_leaves_devices_as_they_are(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    llava.write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "[\n 1\n]"
    os.mkfifo(tmp_path / "device")
    reader = os.open(tmp_path / "device", os.O_RDONLY | os.O_NONBLOCK)
    llava.write_json(tmp_path / "device", [1])
    assert os.read(reader, 99) == b"[\n 1\n]" and not (tmp_path / "device").is_file()
    os.close(reader)


def test_a_moved_base_is_named_and_the_base_flag_gives_its_new_place(random_model, tmp_path, monkeypatch):
    shutil.copytree(random_model, tmp_path / "old")
    write_lora_run(tmp_path / "old", tmp_path / "run")
    expected = Llava.from_pretrained(tmp_path / "run", dtype=torch.float32).state_dict()
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(OSError, match=rf"{tmp_path}/run needs its base {tmp_path}/old.*--base"):
        Llava.from_pretrained(tmp_path / "run")
    model = Llava.from_pretrained(tmp_path / "run", base=[str(tmp_path / "new")], dtype=torch.float32)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())
    run_llava(monkeypatch, "--model", tmp_path / "run", "--base", tmp_path / "new",
              "--save", tmp_path / "whole")
    whole = Llava.from_pretrained(tmp_path / "whole", dtype=torch.float32).state_dict()
    assert whole.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in whole.items())
    with pytest.raises(UserError, match="has 1 bases .* --base names 2"):
        Llava.from_pretrained(tmp_path / "run", base=["a", "b"])


def test_a_base_with_another_model_is_an_error(random_model, tmp_path):
    write_lora_run(random_model, tmp_path / "run")
    shutil.copytree(random_model, tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-3         # the shapes are the same
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="run was trained on a base with another text model than .*/other"):
        Llava.from_pretrained(tmp_path / "run", base=[str(tmp_path / "other")])


@pytest.mark.parametrize(("name", "at"), (("weight", (0, 1)), ("bias", (2,))))
def test_a_trained_second_layer_of_a_linear_projector_is_an_error(random_model, tmp_path, name, at):
    """transformers may have trained the identity that save_pretrained adds."""
    Llava(replace(Llava.from_pretrained(random_model).config, projector="linear")).save_pretrained(tmp_path)
    tensors = llava.open_file(tmp_path / "model.safetensors")
    assert Llava.from_pretrained(tmp_path).config.projector == "linear"
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors[f"multi_modal_projector.linear_2.{name}"][at] = 0.5
    llava.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="the second layer of its linear projector is not the identity"):
        Llava.from_pretrained(tmp_path)


def test_transformers_begins_a_text_of_a_saved_tokenizer_with_bos(random_model, tmp_path):
    hf = pytest.importorskip("transformers", minversion="5")
    tokenizer = hf.AutoTokenizer.from_pretrained(random_model)
    ids = tokenizer("What is it?")["input_ids"]
    assert ids == [1, *Processor.from_pretrained(random_model).encode("What is it?")]


def test_save_says_that_transformers_does_not_reduce_tokens(random_model, tmp_path, monkeypatch, capsys):
    model = Llava.from_pretrained(random_model, prune="prumerge")
    model.save_pretrained(tmp_path / "model")
    Processor.from_pretrained(random_model, model.config).save_pretrained(tmp_path / "model")
    run_llava(monkeypatch, "--model", tmp_path / "model", "--save", tmp_path / "whole")
    assert "transformers has no --prune prumerge" in capsys.readouterr().out


def test_a_moved_base_of_a_base_is_corrected_in_its_config(random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "old")
    write_lora_run(tmp_path / "old", tmp_path / "run1")
    write_lora_run(tmp_path / "run1", tmp_path / "run2")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(OSError, match=r"run1 needs its base .*: correct .*/run1/config.json$"):
        Llava.from_pretrained(tmp_path / "run2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_each_file_is_opened_once(random_model, tmp_path, monkeypatch, dtype):
    Llava.from_pretrained(random_model, dtype=torch.float32).save_pretrained(tmp_path, shard_bytes=400_000)
    opened, open_file = [], llava.open_file

    def record_and_open(file):
        opened.append(file)
        return open_file(file)
    monkeypatch.setattr(llava, "open_file", record_and_open)
    Llava.from_pretrained(tmp_path, dtype=dtype)
    assert len(opened) == len(set(opened)) == len(list(tmp_path.glob("*.safetensors")))


def test_an_index_that_names_a_file_of_another_folder_is_an_error(random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "model")
    llava.write_json(tmp_path / "model" / "model.safetensors.index.json",
                     {"weight_map": {"a": "../model.safetensors"}})
    with pytest.raises(UserError, match="not a file of the same folder"):
        Llava.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("flags, message", [
    (("--top-p", 0), "--top-p"), (("--top-p", 1.5), "--top-p"), (("--temperature", -1), "--temperature"),
    (("--max-new-tokens", 0), "--max-new-tokens"), (("--keep-tokens", 0), "--keep-tokens"),
    (("--keep-tokens", "x"), "--keep-tokens"), (("--save", "d", "What?"), "--save"),
    (("--show-kept", "d", "What?"), "--show-kept")])
def test_an_invalid_flag_is_named(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run_llava(monkeypatch, "--model", "m", *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_last_image_argument_may_be_the_question_but_not_a_missing_file(random_model, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.jpg")
    with pytest.raises(SystemExit, match="there is no image .*dgo.jpg"):
        run_llava(monkeypatch, "--model", random_model, "--image", tmp_path / "cat.jpg", tmp_path / "dgo.jpg")
    args = llava.parse_args(["--model", "m", "--image", str(tmp_path / "cat.jpg"), "What?"])
    assert args.prompt == "What?" and len(args.image) == 1


def test_labels_without_a_supervised_token_are_an_error(random_model):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    with pytest.raises(UserError, match="nothing to learn"):
        model(torch.tensor([[1, 5, 6]]), labels=torch.full((1, 3), -100))


def test_splice_does_not_change_its_arguments(random_model):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    image_id = model.config.image_token_id
    inputs = {"input_ids": torch.tensor([[1, image_id, 7], [1, 9, 0]]),
              "labels": torch.tensor([[1, 2, 3], [4, 5, 6]]),
              "attention_mask": torch.tensor([[True] * 3, [True, True, False]])}
    before = {name: t.clone() for name, t in inputs.items()}
    x, lengths, labels = model.splice(**inputs, images=[torch.randn(1, 3, 32, 32)], image_sizes=[(32, 32)])
    assert lengths.tolist() == [18, 2] and labels[0].tolist() == [1, *[-100] * 16, 3]
    assert all(torch.equal(t, before[name]) for name, t in inputs.items())


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_an_anyres_model_opens_in_another_image_mode_without_newline(random_model, tmp_path, mode):
    Llava.from_pretrained(random_model, dtype=torch.float32, image_mode="anyres").save_pretrained(tmp_path)
    model = Llava.from_pretrained(tmp_path, dtype=torch.float32, image_mode=mode)
    assert not hasattr(model, "image_newline")
    assert len(model.encode_images([torch.randn(1, 3, 32, 32)])[0]) == 16


@pytest.mark.parametrize("field, value, part", [
    ("sliding_window", 0, "text_config"), ("sliding_window", -4, "text_config"),
    ("hidden_size", "big", "text_config"), ("num_attention_heads", 0, "text_config"),
    ("num_key_value_heads", 2, "text_config"), ("num_attention_heads", 3, "vision_config"),
    ("num_hidden_layers", 1.5, "vision_config"), ("rope_theta", -1, "text_config"),
    ("head_dim", 33, "text_config")])
def test_an_invalid_size_in_a_config_is_named(random_model, tmp_path, field, value, part):
    shutil.copytree(random_model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config[part][field] = value
    if field == "rope_theta":
        config[part]["rope_parameters"][field] = value
    llava.write_json(tmp_path / "model/config.json", config)
    with pytest.raises(UserError, match=field):
        Llava.from_pretrained(tmp_path / "model")
