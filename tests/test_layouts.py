"""Test that every published layout opens correctly, and that transformers opens what llava.py saves.

The results are compared with transformers 5 if it is installed, and with those recorded in tests/golden.*.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava
from llava import Llava, Processor
from tests import layouts
from tests.golden import (FAMILIES, HERE, build_hf_model, make_batch, sample_logits, to_hf_batch,
                          token_counts)
from tests.layouts import (IMAGE_ID, LAYOUTS, LLAMA, MISTRAL, llava_hf_config, rename_to_layout,
                           write_checkpoint)

torch.set_num_threads(1)
HF_LAYOUTS = [layout for layout in LAYOUTS if layout.startswith("llava-hf")]


@pytest.fixture(scope="module")
def open_layout(tmp_path_factory):
    """A function that returns the Case and a new model of a layout; each layout is written only once."""
    cases = {}

    def open_(layout: str, **arguments):
        if layout not in cases:
            cases[layout] = LAYOUTS[layout](tmp_path_factory.mktemp("layout"))
        source = cases[layout].source | {"dtype": torch.float32} | arguments
        return cases[layout], Llava.from_pretrained(**source).eval()
    return open_


def with_projector(case, model):
    """The case. If it has no projector, the one that from_pretrained initialized is added."""
    names = "projector.1.weight", "projector.1.bias", "projector.2.weight", "projector.2.bias"
    if "projector.1.weight" in case.tensors:
        return case
    projector = (p.detach() for p in model.projector.parameters())
    return case._replace(tensors=case.tensors | dict(zip(names, projector)))


def compute_logits(model: Llava, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in inputs.items() if key != "labels"})


def save_and_load(model: Llava, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def gradients_or_zeros(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def assert_same_model(one: Llava, other: Llava):
    assert one.config == other.config
    assert_same_tensors(one.state_dict(), other.state_dict())


def assert_same_tensors(one: dict, other: dict):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------
# Opening


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_gradients_are_those_of_transformers(layout, open_layout, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    case, model = open_layout(layout)
    case, inputs = with_projector(case, model), make_batch(model.config.image_token_id, case.anyres)
    hf_model, linear = build_hf_model(case), "projector.2.weight" not in case.tensors
    hf_inputs = to_hf_batch(inputs, token_counts(case.anyres), model.config.image_token_id, case.anyres)
    expected, mask = hf_model(**hf_inputs), hf_inputs["attention_mask"].bool()
    expected.loss.backward()

    logits = compute_logits(model, inputs)
    torch.testing.assert_close(logits[mask], expected.logits[mask], rtol=2e-5, atol=2e-5)
    loss = model(**inputs)
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    gradients = gradients_or_zeros(model)
    for name, p in model.named_parameters():
        p.data = gradients[name]             # saved as if they were weights, they get llava-hf's names
    saved_gradients, hf_gradients = save_and_load(model, tmp_path), gradients_or_zeros(hf_model)
    for part, new, old in zip(layouts.PARTS, layouts.PREFIXES["new"], layouts.PREFIXES["old"]):
        for name, hf_gradient in hf_gradients.items():
            if name.startswith(new) and not (linear and part == "projector.2."):
                gradient = saved_gradients.pop(old + name.removeprefix(new))[:len(hf_gradient)]
                # The gradient of a key bias is zero but for rounding: use the scale of the query bias.
                scale = hf_gradients[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
                assert (gradient - hf_gradient).abs().max() <= 2e-5 * scale, name
    assert all("linear_2" in name for name in saved_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_the_recorded_ones(family, open_layout):
    (case, model), golden = open_layout(family), load_file(HERE / "golden.safetensors")
    inputs = make_batch(model.config.image_token_id, case.anyres)
    counts = [len(tokens) for tokens in model.encode_images(inputs["images"], inputs["image_sizes"])]
    hf_inputs = to_hf_batch(inputs, counts, model.config.image_token_id, case.anyres)
    logits = sample_logits(compute_logits(model, inputs), hf_inputs["attention_mask"])
    torch.testing.assert_close(logits, golden[f"{family}: logits"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model(**inputs).detach(), golden[f"{family}: loss"])


@pytest.mark.parametrize("layout", HF_LAYOUTS)
def test_transformers_opens_the_test_layouts(layout, open_layout):
    """Tests layouts.py: transformers finds every tensor, and no other, in the files written by it."""
    hf = pytest.importorskip("transformers", minversion="5")
    case, _ = open_layout(layout)
    hf_model, report = hf.AutoModelForImageTextToText.from_pretrained(
        case.source["path_or_repo_id"], output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    state, expected = hf_model.state_dict(), rename_to_layout(case.tensors, "new")
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["llava-hf llava, old names", "liuhaotian v1.6"])
def test_a_model_that_transformers_saved_opens(layout, open_layout, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    case, model = open_layout(layout)
    build_hf_model(case).save_pretrained(tmp_path)
    reopened = Llava.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_tensors(model.state_dict(), reopened.state_dict())


def test_weights_are_cast_to_the_requested_dtype(open_layout):
    _, float32_model = open_layout("liuhaotian v1")
    _, bfloat16_model = open_layout("liuhaotian v1", dtype=torch.bfloat16)
    for p, q in zip(float32_model.parameters(), bfloat16_model.parameters(), strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(q, p.bfloat16())


def test_a_layout_is_recognized_by_config_and_keys_not_by_folder_name(tmp_path):
    case = LAYOUTS["liuhaotian v1.6"](tmp_path)
    misleading = tmp_path / "llava-1.5-vicuna-hf"
    shutil.move(case.source["path_or_repo_id"], misleading)
    model = Llava.from_pretrained(misleading, dtype=torch.float32)
    assert model.config.image_mode == "anyres" and model.config.template == "mistral_instruct"
    assert torch.equal(model.image_newline, case.tensors["newline"])


@pytest.mark.parametrize("layout", ["llava-hf llava, .bin shards", "liuhaotian v1.6", "LoRA over vicuna"])
def test_a_hub_id_opens_from_the_cache_without_network(layout, tmp_path, monkeypatch):
    """Every folder of the case becomes a repository in a hub cache; configs name each other by hub id."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    case = LAYOUTS[layout](tmp_path / "work")
    expected = Llava.from_pretrained(**case.source, dtype=torch.float32)
    configs = (tmp_path / "work").rglob("config.json")
    hub_ids = {str(file.parent): f"someone/{file.parent.name}" for file in configs}
    revision = "0123456789" * 4
    for folder, hub_id in hub_ids.items():
        repository = tmp_path / "cache" / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / revision, ignore=shutil.ignore_patterns("clip"))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(revision)
        for file in (repository / "snapshots" / revision).glob("*config.json"):
            for path in sorted(hub_ids, key=len, reverse=True):
                file.write_text(file.read_text().replace(f'"{path}"', f'"{hub_ids[path]}"'))
    shutil.rmtree(tmp_path / "work")
    hub_id = hub_ids[case.source["path_or_repo_id"]]
    for source in (f"{hub_id}@{revision}", hub_id):
        model = Llava.from_pretrained(source, dtype=torch.float32)
        assert_same_model(expected, model)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "run", whole=False)
    assert f"{hub_id}@{revision}" in (tmp_path / "run/config.json").read_text()
    assert_same_model(expected, Llava.from_pretrained(tmp_path / "run", dtype=torch.float32))


# ---------------------------------------------------------------------------------------------
# config.json files of transformers 4 and 5


def change(config: dict, *removed: str, **changes) -> dict:
    return {key: value for key, value in config.items() if key not in removed} | changes


ROPE_PARAMETERS = {"rope_type": "default", "rope_theta": 5e5}
CONFIGS = {
    "v0.1": change(MISTRAL, "head_dim", sliding_window=4096, rope_theta=10000.0),
    "v0.2": change(MISTRAL, "head_dim", sliding_window=None),
    "window absent": change(MISTRAL, "sliding_window"),
    "theta absent": change(MISTRAL, "rope_theta"),
    "eps absent": change(MISTRAL, "rms_norm_eps"),
    "rope_parameters": change(MISTRAL, "rope_theta", rope_parameters=ROPE_PARAMETERS),
    "rope_scaling null": change(MISTRAL, rope_scaling=None),
    "head_dim null": change(MISTRAL, head_dim=None),
    "head_dim not hidden_size / heads": change(MISTRAL, head_dim=14),
    "v0.3": change(MISTRAL, vocab_size=32768),
    "vicuna": change(LLAMA, "head_dim", "sliding_window", "rope_theta"),
    "llama, heads absent": change(LLAMA, "num_key_value_heads"),
    "llama, eps and theta absent": change(LLAMA, "rms_norm_eps", "rope_theta"),
    "llama, rope_parameters": change(LLAMA, "rope_theta", rope_parameters=ROPE_PARAMETERS),
}


def read_config(config: dict, folder: Path):
    """The config as llava.py reads it, and as transformers reads it."""
    hf = pytest.importorskip("transformers", minversion="5")
    layouts.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return Processor.from_pretrained(folder).config, hf.AutoConfig.from_pretrained(folder)


def assert_same_text_config(text, hf_text):
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(text, name) == getattr(hf_text, name), name
    assert text.sliding_window == getattr(hf_text, "sliding_window", None)
    assert text.rope_theta == hf_text.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_model_config_is_read_as_transformers_reads_it(name, tmp_path):
    config, hf_config = read_config(CONFIGS[name], tmp_path)
    assert_same_text_config(config.text, hf_config)
    assert config.template == ("mistral_instruct" if hf_config.model_type == "mistral" else "v1")


NESTED_CONFIGS = {
    "llava-1.5-7b-hf": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064,
                        "max_position_embeddings": 4096},
    "llava-v1.6-mistral-7b-hf": {
        "model_type": "mistral", "intermediate_size": 14336, "rms_norm_eps": 1e-5, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064},
    "mistral with defaults": {"model_type": "mistral"},
    "llama with defaults": {"model_type": "llama"},
    "no model_type": {"vocab_size": 32064},
    "fewer heads": {"model_type": "llama", "num_attention_heads": 16, "hidden_size": 2048},
}


@pytest.mark.parametrize("name", NESTED_CONFIGS)
def test_missing_keys_of_a_nested_config_get_the_defaults_of_transformers(name, tmp_path):
    text = {"rope_theta": 1e4} | NESTED_CONFIGS[name]
    config, hf_config = read_config(llava_hf_config(text, anyres=True), tmp_path)
    assert_same_text_config(config.text, hf_config.text_config)
    assert config.image_token_id == hf_config.image_token_index == IMAGE_ID
    assert config.vision_feature_layer == hf_config.vision_feature_layer == -2
    without_grids = llava_hf_config(text, anyres=True)
    del without_grids["image_grid_pinpoints"]
    config, hf_config = read_config(without_grids, tmp_path / "2")
    assert list(config.grids) == [(w, h) for h, w in hf_config.image_grid_pinpoints]
    for field, value in vars(config.vision).items():
        assert value == getattr(hf_config.vision_config, field), field


def test_image_mode_projector_and_grids_are_read_from_the_config(tmp_path):
    case = LAYOUTS["liuhaotian v1"](tmp_path / "1")
    config = Llava.from_pretrained(**case.source).config
    assert (config.projector, config.image_mode, config.template) == ("linear", "crop", "v1")
    config = Llava.from_pretrained(**LAYOUTS["liuhaotian v1.5"](tmp_path / "2").source).config
    assert (config.projector, config.image_mode, config.template) == ("mlp2x_gelu", "pad", "v1")
    config = Llava.from_pretrained(**LAYOUTS["liuhaotian v1.6"](tmp_path / "3").source).config
    assert (config.image_mode, config.grids[0], config.grids[3]) == ("anyres", (28, 56), (84, 28))
    config = Llava.from_pretrained(**LAYOUTS["llava-hf llava_next, old names"](tmp_path / "4").source).config
    assert (config.image_mode, config.grids[0], config.grids[3]) == ("anyres", (56, 28), (28, 84))


@pytest.mark.parametrize("name", [None, "nobody/gone"])
@pytest.mark.parametrize("layout", ["liuhaotian v1.5", "liuhaotian v1.6", "LoRA over v1.6"])
def test_the_processor_reads_the_same_config_without_the_language_model(layout, name, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    folder = Path(case.source["path_or_repo_id"])
    config = Llava.from_pretrained(folder).config
    changes = {"_name_or_path": name} if name else {}
    edit_json(folder / "config.json", "_name_or_path", **changes)
    assert Processor.from_pretrained(layouts.write_tokenizer(folder)).config == config


# ---------------------------------------------------------------------------------------------
# Saving


@pytest.mark.parametrize("layout", [
    "llava-hf llava, new names", "llava-hf llava_next, old names without vision_model", "liuhaotian v1",
    "liuhaotian v1.6", "mistral + clip", "LoRA over v1.6"])
def test_transformers_opens_a_saved_model_and_computes_the_same_logits(layout, open_layout, tmp_path):
    hf = pytest.importorskip("transformers", minversion="5")
    case, model = open_layout(layout)
    model.save_pretrained(tmp_path)
    hf_model, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report            # no missing and no unexpected key
    inputs, image_id = make_batch(model.config.image_token_id, case.anyres), hf_model.config.image_token_index
    hf_inputs = to_hf_batch(inputs, token_counts(case.anyres), model.config.image_token_id, case.anyres)
    hf_inputs["input_ids"] = hf_inputs["input_ids"].masked_fill(hf_inputs["input_ids"] == IMAGE_ID, image_id)
    del hf_inputs["labels"]
    with torch.no_grad():
        expected, mask = hf_model.eval()(**hf_inputs).logits, hf_inputs["attention_mask"].bool()
    logits = compute_logits(model, inputs)[mask]
    torch.testing.assert_close(logits, expected[mask][:, :logits.shape[1]], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["llava-hf llava_next, new names", "liuhaotian v1.6"])
def test_transformers_chooses_the_same_grids_from_the_saved_files(layout, open_layout, tmp_path):
    utilities = pytest.importorskip("transformers.image_processing_utils")
    model = open_layout(layout)[1]
    model.save_pretrained(tmp_path)
    tokenizer_folder = layouts.write_tokenizer(tmp_path / "tokenizer")
    Processor.from_pretrained(tokenizer_folder, model.config).save_pretrained(tmp_path)
    for file in ("config.json", "preprocessor_config.json"):
        grids = json.loads((tmp_path / file).read_text())["image_grid_pinpoints"]
        for size in ((100, 200), (200, 100), (30, 300), (20, 20)):
            height, width = utilities.select_best_resolution(size, grids)
            assert llava.choose_grid(size, model.config.grids) == (width, height), (file, size)


@pytest.mark.parametrize("layout", ["llava-hf llava_next, old names", "liuhaotian v1", "liuhaotian v1.6",
                                    "mistral with wide heads + clip"])
def test_saving_and_opening_keeps_config_and_tensors(layout, open_layout, tmp_path):
    _, model = open_layout(layout)
    first = save_and_load(model, tmp_path / "1")
    reopened = Llava.from_pretrained(tmp_path / "1", dtype=torch.float32)
    V = model.config.text.vocab_size         # saving may add rows to the embedding and to the lm_head
    for name, p in model.state_dict().items():
        q = reopened.state_dict()[name]
        if len(p) == V:
            q = q[:V]
        assert torch.equal(q, p), name
    config, new_config = (json.dumps(vars(m.config), default=vars) for m in (model, reopened))
    new_size = f'"vocab_size": {reopened.config.text.vocab_size}'
    assert new_config.replace(new_size, f'"vocab_size": {V}') == config
    second = save_and_load(reopened, tmp_path / "2")
    assert Llava.from_pretrained(tmp_path / "2", dtype=torch.float32).config == reopened.config
    assert_same_tensors(first, second)


@pytest.mark.parametrize("layout", ["mistral + clip", "llava-hf llava, old names",
                                    "liuhaotian v1", "liuhaotian v1.6"])
def test_a_run_folder_has_the_trained_tensors_and_opens_with_its_bases(layout, open_layout, tmp_path):
    _, model = open_layout(layout)
    model.requires_grad_(False).projector.requires_grad_(True)
    with torch.no_grad():
        for p in model.projector.parameters():
            p.add_(1)
    model.save_pretrained(tmp_path / "stage1", whole=False)
    assert all("projector" in name for name in load_file(tmp_path / "stage1/model.safetensors"))
    second = Llava.from_pretrained(tmp_path / "stage1", dtype=torch.float32)
    assert_same_model(model, second)

    second.vision_tower.requires_grad_(False)          # a second run whose base is the first run
    with torch.no_grad():
        second.language_model.lm_head.weight.mul_(2)
    second.save_pretrained(tmp_path / "stage2", whole=False)
    assert_same_model(second, Llava.from_pretrained(tmp_path / "stage2", dtype=torch.float32))
    assert not any("vision" in name for name in load_file(tmp_path / "stage2/model.safetensors"))


def test_a_failed_save_keeps_the_old_checkpoint(open_layout, tmp_path, monkeypatch):
    _, model = open_layout("liuhaotian v1")
    before = save_and_load(model, tmp_path)

    def save_to_full_disk(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(llava, "save_file", save_to_full_disk)
    with torch.no_grad():
        model.projector[0].weight.zero_()
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------------------------
# Bad input: one sentence that names the mistake


def assert_error(*expected: str, **source) -> str:
    """Opening fails with an error of one line that contains all of `expected`; return the line."""
    with pytest.raises((OSError, ValueError)) as error:
        Llava.from_pretrained(**source)
    message = str(error.value)
    for text in expected:
        assert text in message, (text, message)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("layout, shard", [("liuhaotian v1.5", "llava/pytorch_model-00001-of-00002.bin"),
                                           ("liuhaotian v1.6", "llava/model-00002-of-00002.safetensors")])
@pytest.mark.parametrize("fraction", [None, 0, 0.001, 0.5])
def test_a_missing_empty_or_truncated_shard_is_named(layout, shard, fraction, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    file = tmp_path / shard
    content = file.read_bytes()
    if fraction is None:
        file.unlink()
    else:
        file.write_bytes(content[:int(len(content) * fraction)])
    assert_error(file.name, **case.source)


@pytest.mark.parametrize("layout", ["llava-hf llava_next, old names", "liuhaotian v1.6"])
def test_an_incomplete_or_invalid_index_is_an_error(layout, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    index = next(tmp_path.rglob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    incomplete = {key: file for key, file in weight_map.items() if "00002-of" not in file}
    index.write_text(json.dumps({"weight_map": incomplete}))
    assert assert_error("missing", **case.source).count("missing") > 10
    index.write_text("{}")
    assert_error(index.name, **case.source)
    index.write_text('{"weight_map"')
    assert_error(index.name, **case.source)


class Payload:
    """An object whose pickle creates a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content", [{"a": Payload()}, [1, 2], {"a": 3}, {"a": {"b": torch.ones(2)}}, "x"],
    ids=["code", "list", "number", "nested", "string"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "mm_projector.bin"])
def test_a_pickle_with_more_than_tensors_is_an_error_and_not_executed(content, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = "liuhaotian v1" if file == "pytorch_model.bin" else "mm_projector.bin"
    case = LAYOUTS[layout](tmp_path)
    torch.save(content, Path(case.source["path_or_repo_id"]) / file)
    assert_error(file, **case.source)
    assert not Path("executed").exists()


def test_one_error_lists_all_missing_misshapen_and_unexpected_tensors(tmp_path):
    case = LAYOUTS["llava-hf llava, old names"](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    del tensors["vision_tower.vision_model.pre_layrnorm.bias"]
    tensors["multi_modal_projector.linear_2.weight"] = torch.ones(40, 41)
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.ones(3)
    tensors["qformer.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_error("layers.1.mlp.up_proj.weight", "pre_layrnorm.bias", "[40, 41]", "[40, 40]",
                 "layers.7.mlp.up_proj.weight", "qformer.weight", str(tmp_path), **case.source)


def edit_json(file: Path, *removed: str, **changes) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text()), *removed, **changes)))


@pytest.mark.parametrize("layout, removed, changes, expected", [
    ("liuhaotian v1.6", "hidden_size", {}, "hidden_size"),
    ("liuhaotian v1.6", "num_attention_heads", {}, "num_attention_heads"),
    ("liuhaotian v1.6", "", {"mm_projector_type": "resampler"}, "projector"),
    ("liuhaotian v1.6", "", {"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
    ("liuhaotian v1.6", "", {"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ("llava-hf llava, old names", "vision_config", {}, "vision_config"),
    ("llava-hf llava, old names", "text_config", {}, "config.json"),
    ("llava-hf llava, old names", "model_type", {}, "model_type"),
    ("llava-hf llava, old names", "", {"text_config": {"model_type": "qwen2"}}, "qwen2"),
    ("llava-hf llava, old names", "", {"text_config": LLAMA | {"hidden_act": "gelu"}}, "hidden_act"),
    ("llava-hf llava, old names", "", {"text_config": {"rope_scaling": {"type": "linear"}}}, "linear"),
    ("llava-hf llava, old names", "", {"projector_hidden_act": "relu"}, "projector_hidden_act"),
    ("llava-hf llava, old names", "", {"vision_feature_select_strategy": "full"}, "select_strategy"),
    ("llava-hf llava, old names", "", {"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
    ("mm_projector.bin", "_name_or_path", {}, "_name_or_path"),
])
def test_a_missing_key_or_unsupported_value_is_named(layout, removed, changes, expected, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    edit_json(Path(case.source["path_or_repo_id"]) / "config.json", removed, **changes)
    assert_error(expected, **case.source)


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_config_that_is_not_a_json_object_is_named(content, tmp_path):
    case = LAYOUTS["llava-hf llava, old names"](tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert_error("config.json", **case.source)


def test_an_incomplete_lora_run_folder_is_an_error(tmp_path):
    case = LAYOUTS["LoRA over vicuna"](tmp_path)
    run = Path(case.source["path_or_repo_id"])
    adapter, config = load_file(run / "adapter_model.safetensors"), (run / "adapter_config.json").read_text()
    layers = "base_model.model.model.layers."
    lora_b, layer_9 = layers + "1.mlp.down_proj.lora_B.weight", layers + "9.mlp.up_proj.lora_"
    no_weight = {layer_9 + "A.weight": torch.ones(3, 40), layer_9 + "B.weight": torch.ones(56, 3)}
    without_b = {key: tensor for key, tensor in adapter.items() if key != lora_b}
    for tensors, expected in ((without_b, "down_proj"), (adapter | {lora_b: torch.ones(7, 3)}, "down_proj"),
                              (adapter | no_weight, "layers.9"),
                              (adapter | {"x.lora_B.weight": torch.ones(1, 1)}, "x.lora_B.weight is not"),
                              (adapter | {"x.lora_embedding_A": torch.ones(1)}, "x.lora_embedding_A is not")):
        save_file(tensors, run / "adapter_model.safetensors")
        assert_error(expected, **case.source)
    save_file(adapter, run / "adapter_model.safetensors")
    for removed, changes in (("r", {}), ("lora_alpha", {}), ("", {"use_rslora": True})):
        edit_json(run / "adapter_config.json", removed, **changes)
        assert_error(removed or "rslora", "adapter_config.json", **case.source)
        (run / "adapter_config.json").write_text(config)
    (run / "adapter_config.json").unlink()
    assert_error("adapter_config.json", **case.source)
    (run / "adapter_model.safetensors").rename(run / "model.safetensors")
    assert_error("with adapter_config.json", **case.source)


def test_a_model_without_vision_tower_or_language_model_is_an_error(tmp_path):
    clip = layouts.write_clip(tmp_path / "clip")
    text = layouts.write_language_model(tmp_path / "text", layouts.MISTRAL_V01)
    assert_error("text", path_or_repo_id=clip)
    assert_error("vision", path_or_repo_id=text)
    assert_error("vision", vision=clip)
    assert_error("vision", path_or_repo_id=text, vision=clip)
    whole = LAYOUTS["llava-hf llava, old names"](tmp_path / "whole").source["path_or_repo_id"]
    assert_error("is a whole LLaVA", vision=clip, language=whole)
    assert_error("is a whole LLaVA", vision=whole, language=text)


def test_a_missing_base_is_named(tmp_path):
    case = LAYOUTS["llava-hf llava, old names"](tmp_path / "base")
    model = Llava.from_pretrained(**case.source)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "run", whole=False)
    shutil.rmtree(tmp_path / "base")
    assert_error(str(tmp_path / "base"), path_or_repo_id=tmp_path / "run")


def test_a_hub_id_without_network_ends_with_one_sentence_and_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["llava.py", "--model", "nobody/no-such-model", "Hello"])
    with pytest.raises(SystemExit) as stop:
        llava.command_line(llava.main)
    assert "nobody/no-such-model" in stop.value.code and len(stop.value.code.splitlines()) == 1


@pytest.mark.parametrize("arguments, expected", [
    (["--image", "none.png", "What?"], "none.png"), (["--image", "words.png", "What?"], "words.png"),
    (["--image", "cut.png", "What?"], "cut.png"),
    (["--image", "sound.png", "<image><image> What?"], "<image>"),
    (["<image>\nWhat?"], "<image>")],
    ids=["missing file", "no image file", "truncated", "too many <image>", "no images"])
def test_a_bad_image_or_image_count_ends_with_one_sentence_and_exit_code_1(
        arguments, expected, tmp_path, monkeypatch, capsys):
    from PIL import Image
    case = LAYOUTS["llava-hf llava, old names"](tmp_path)
    layouts.write_tokenizer(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("words.png").write_text("no picture")
    Image.effect_noise((60, 60), 50).save("sound.png")
    Path("cut.png").write_bytes(Path("sound.png").read_bytes()[:900])
    monkeypatch.setattr(sys, "argv", ["llava.py", "--model", case.source["path_or_repo_id"], *arguments])
    with pytest.raises(SystemExit) as stop:
        llava.command_line(llava.main)
    message = stop.value.code                # a string as code means exit code 1
    assert expected in message and len(message.splitlines()) == 1


def test_old_buffers_are_ignored_but_unknown_tensors_are_an_error(tmp_path):
    tensors = layouts.vision_tensors() | layouts.text_tensors(LLAMA) | layouts.projector_tensors(LLAMA)
    old_names = rename_to_layout(tensors, "old")
    buffers = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
               "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    write_checkpoint(tmp_path, llava_hf_config(LLAMA), old_names | buffers)
    Llava.from_pretrained(tmp_path)
    unknown = {"language_model.model.layers.1.self_attn.q_proj.bias": torch.ones(40)}
    write_checkpoint(tmp_path, llava_hf_config(LLAMA), old_names | unknown)
    assert_error("q_proj.bias", path_or_repo_id=tmp_path)
