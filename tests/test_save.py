"""Saving in shards, whole models from run folders, bases that moved, and each file opened once."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

import llava
from llava import Llava, Processor, UserError, command_line
from tests import toy


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return toy.write_random(tmp_path_factory.mktemp("random") / "model")


def main(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["llava.py", *map(str, words)])
    command_line(llava.main)


def same_tensors(one, other) -> None:
    a, b = (Llava.from_pretrained(folder, dtype=torch.float32).state_dict() for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("shard_bytes, shards", [(10**9, 1), (400_000, None), (1, None)])
def test_shards_hold_at_most_their_size_and_open_as_the_same_model(random_model, tmp_path, shard_bytes, shards):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards or (shards is None and len(files) > 3)
    same_tensors(random_model, tmp_path)
    if shards is None:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        largest = max(t.nbytes for t in model.state_dict().values())
        tensors = [llava.open_file(file) for file in files]
        assert all(sum(t.nbytes for t in some.values()) <= max(shard_bytes, 2 * largest) for some in tensors)
        assert {k: f.name for f, some in zip(files, tensors) for k in some} == index["weight_map"]
        assert index["metadata"]["total_size"] == sum(t.nbytes for some in tensors for t in some.values())
    assert not list(tmp_path.glob(".*")), "no temporary file stays"


@pytest.mark.parametrize("first, second", [(400_000, 10**9), (10**9, 400_000)])
def test_one_file_replaces_shards_and_shards_replace_one_file(random_model, tmp_path, first, second):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    model.save_pretrained(tmp_path, shard_bytes=first)
    with torch.no_grad():
        model.projector[0].weight.zero_()
    model.save_pretrained(tmp_path, shard_bytes=second)
    assert not Llava.from_pretrained(tmp_path, dtype=torch.float32).projector[0].weight.any()
    names = {file.name for file in tmp_path.glob("model.safetensors*")}   # transformers takes the first of both
    assert names == {"model.safetensors" if second > first else "model.safetensors.index.json"}


def test_image_has_the_models_id_where_the_embedding_is_longer_than_the_tokenizer(random_model, tmp_path):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    processor = Processor.from_pretrained(random_model, model.config)
    plain = llava.Tokenizer.from_str(toy.make_tokenizer().to_str())
    config = llava.replace(model.config, image_token_id=plain.get_vocab_size() + 5)
    Processor(plain.to_str(), config).save_pretrained(tmp_path)
    saved = llava.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert saved.token_to_id("<image>") == config.image_token_id
    assert saved.encode("What color is it?").ids == plain.encode("What color is it?").ids
    assert processor.tokenizer.token_to_id("<unused0>") is None


def test_save_without_a_tokenizer_writes_nothing(random_model, tmp_path, monkeypatch):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    model.save_pretrained(tmp_path / "bare")
    monkeypatch.setattr("sys.argv", ["llava.py", "--model", str(tmp_path / "bare"), "--save", str(tmp_path / "whole")])
    with pytest.raises(OSError, match="--tokenizer"):
        llava.main()
    assert not (tmp_path / "whole").exists()


def test_transformers_opens_shards(random_model, tmp_path):
    hf = pytest.importorskip("transformers", minversion="5")
    Llava.from_pretrained(random_model, dtype=torch.float32).save_pretrained(tmp_path, shard_bytes=400_000)
    theirs, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    one = Llava.from_pretrained(random_model, dtype=torch.float32)
    ids = torch.randint(5, 300, (1, 12))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        torch.testing.assert_close(one(ids), wanted[..., :one.config.text.vocab_size], rtol=2e-5, atol=2e-5)


def lora_run(base, folder) -> None:
    """A run folder as train.py --lora-rank writes it: an adapter and the projector, with its base."""
    model = Llava.from_pretrained(base, dtype=torch.float32)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.save_pretrained(folder, whole=False)
    tensors, prefix = llava.open_file(folder / "model.safetensors"), "base_model.model.model."
    adapter = {prefix + name: t.clone() for name, t in tensors.items()}
    q = model.language_model.layers[0].self_attn.q_proj.weight
    name = f"{prefix}language_model.layers.0.self_attn.q_proj.lora_"
    adapter |= {f"{name}A.weight": torch.randn(4, q.shape[1]), f"{name}B.weight": torch.randn(q.shape[0], 4)}
    (folder / "model.safetensors").unlink()
    llava.save_file(adapter, folder / "adapter_model.safetensors")
    llava.write_json(folder / "adapter_config.json",
                     {"r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)})
    Processor.from_pretrained(base, model.config).save_pretrained(folder)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_save_writes_the_whole_model_of_a_lora_run_for_transformers(random_model, tmp_path, monkeypatch, dtype):
    lora_run(random_model, tmp_path / "run")
    main(monkeypatch, "--model", tmp_path / "run", "--save", tmp_path / "whole",
         *(("--dtype", dtype) if dtype else ()))
    saved = llava.open_file(tmp_path / "whole" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {getattr(torch, dtype or "float32")}
    if dtype:
        return
    same_tensors(tmp_path / "run", tmp_path / "whole")
    base = Llava.from_pretrained(random_model, dtype=torch.float32).state_dict()
    merged = Llava.from_pretrained(tmp_path / "whole", dtype=torch.float32).state_dict()
    assert [n for n in base if not torch.equal(base[n], merged[n])] == [
        "language_model.layers.0.self_attn.q_proj.weight"]
    hf = pytest.importorskip("transformers", minversion="5")
    theirs, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "whole", output_loading_info=True)
    assert not any(report.values()), report
    processor = hf.AutoProcessor.from_pretrained(tmp_path / "whole", use_fast=False)
    assert processor.tokenizer("<image>")["input_ids"][-1] == theirs.config.image_token_id
    one, ids = Llava.from_pretrained(tmp_path / "run", dtype=torch.float32), torch.randint(5, 300, (1, 12))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        torch.testing.assert_close(one(ids), wanted[..., :one.config.text.vocab_size], rtol=2e-5, atol=2e-5)


def test_save_overwrites_nothing(random_model, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty"):
        main(monkeypatch, "--model", random_model, "--save", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_moved_base_is_named_and_base_gives_its_new_place(random_model, tmp_path, monkeypatch):
    shutil.copytree(random_model, tmp_path / "old")
    lora_run(tmp_path / "old", tmp_path / "run")
    wanted = Llava.from_pretrained(tmp_path / "run", dtype=torch.float32).state_dict()
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(OSError, match=rf"{tmp_path}/run needs its base {tmp_path}/old.*--base"):
        Llava.from_pretrained(tmp_path / "run")
    found = Llava.from_pretrained(tmp_path / "run", base=[str(tmp_path / "new")], dtype=torch.float32)
    assert all(torch.equal(t, wanted[name]) for name, t in found.state_dict().items())
    main(monkeypatch, "--model", tmp_path / "run", "--base", tmp_path / "new", "--save", tmp_path / "whole")
    same_tensors(tmp_path / "whole", tmp_path / "whole")
    with pytest.raises(UserError, match="has 1 bases .* --base names 2"):
        Llava.from_pretrained(tmp_path / "run", base=["a", "b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_each_file_is_opened_once(random_model, tmp_path, monkeypatch, dtype):
    Llava.from_pretrained(random_model, dtype=torch.float32).save_pretrained(tmp_path, shard_bytes=400_000)
    opened, real = [], llava.open_file
    monkeypatch.setattr(llava, "open_file", lambda file: opened.append(file) or real(file))
    Llava.from_pretrained(tmp_path, dtype=dtype)
    assert len(opened) == len(set(opened)) == len(list(tmp_path.glob("*.safetensors")))


def test_an_index_cannot_name_a_file_of_another_folder(random_model, tmp_path):
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
def test_impossible_flags_are_refused_by_name(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--model", "m", *flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_misspelt_second_image_is_an_error_and_a_question_is_the_question(random_model, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.jpg")
    with pytest.raises(SystemExit, match="there is no image .*dgo.jpg"):
        main(monkeypatch, "--model", random_model, "--image", tmp_path / "cat.jpg", tmp_path / "dgo.jpg")
    args = llava.parse_args(["--model", "m", "--image", str(tmp_path / "cat.jpg"), "What?"])
    assert args.prompt == "What?" and len(args.image) == 1


def test_labels_that_are_all_ignored_are_an_error(random_model):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    with pytest.raises(UserError, match="nothing to learn"):
        model(torch.tensor([[1, 5, 6]]), labels=torch.full((1, 3), -100))


def test_splice_does_not_write_into_the_callers_tensors(random_model):
    model = Llava.from_pretrained(random_model, dtype=torch.float32)
    image_id = model.config.image_token_id
    given = {"input_ids": torch.tensor([[1, image_id, 7], [1, 9, 0]]), "labels": torch.tensor([[1, 2, 3], [4, 5, 6]]),
             "attention_mask": torch.tensor([[True] * 3, [True, True, False]])}
    before = {name: t.clone() for name, t in given.items()}
    x, lengths, labels = model.splice(**given, images=[torch.randn(1, 3, 32, 32)], image_sizes=[(32, 32)])
    assert lengths.tolist() == [18, 2] and labels[0].tolist() == [1, *[-100] * 16, 3]
    assert all(torch.equal(t, before[name]) for name, t in given.items())


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_an_anyres_model_works_in_another_image_mode_without_its_newline(random_model, tmp_path, mode):
    Llava.from_pretrained(random_model, dtype=torch.float32, image_mode="anyres").save_pretrained(tmp_path)
    model = Llava.from_pretrained(tmp_path, dtype=torch.float32, image_mode=mode)
    assert not hasattr(model, "image_newline")
    assert len(model.encode_images([torch.randn(1, 3, 32, 32)])[0]) == 16


@pytest.mark.parametrize("field, value, where", [
    ("sliding_window", 0, "text_config"), ("sliding_window", -4, "text_config"), ("hidden_size", "big", "text_config"),
    ("num_attention_heads", 0, "text_config"), ("num_key_value_heads", 2, "text_config"),
    ("num_attention_heads", 3, "vision_config"), ("num_hidden_layers", 1.5, "vision_config"),
    ("rope_theta", -1, "text_config"), ("head_dim", 33, "text_config")])
def test_an_impossible_size_in_a_config_is_named(random_model, tmp_path, field, value, where):
    shutil.copytree(random_model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config[where][field] = value
    if field == "rope_theta":
        config[where]["rope_parameters"][field] = value
    llava.write_json(tmp_path / "model/config.json", config)
    with pytest.raises(UserError, match=field):
        Llava.from_pretrained(tmp_path / "model")
