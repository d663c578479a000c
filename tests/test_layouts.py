"""Every published layout opens as the model it holds; what is saved opens in transformers.

With transformers 5 installed everything is compared live; without it, with tests/golden.*.
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
from tests.golden import FAMILIES, HERE, batch, expanded, reference, some, token_counts
from tests.layouts import IMAGE_ID, LAYOUTS, LLAMA, MISTRAL, hub_config, named, write

torch.set_num_threads(1)
HUB = [layout for layout in LAYOUTS if layout.startswith("llava-hf")]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Each layout, written once: its case, opened anew for whoever asks."""
    cases = {}

    def open_layout(layout: str, **more):
        if layout not in cases:
            cases[layout] = LAYOUTS[layout](tmp_path_factory.mktemp("layout"))
        source = cases[layout].source | {"dtype": torch.float32} | more
        return cases[layout], Llava.from_pretrained(**source).eval()
    return open_layout


def whole(case, model):
    """The case, with the projector that a pair of backbones got."""
    names = "projector.1.weight", "projector.1.bias", "projector.2.weight", "projector.2.bias"
    if "projector.1.weight" in case.tensors:
        return case
    fresh = (p.detach() for p in model.projector.parameters())
    return case._replace(tensors=case.tensors | dict(zip(names, fresh)))


def read_logits(model: Llava, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**{key: value for key, value in inputs.items() if key != "labels"})


def saved(model: Llava, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------
# In


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_every_gradient_are_those_of_transformers(layout, opened, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    case, ours = opened(layout)
    case, inputs = whole(case, ours), batch(ours.config.image_token_id, case.anyres)
    theirs, linear = reference(case), "projector.2.weight" not in case.tensors
    stretched = expanded(inputs, token_counts(case.anyres), ours.config.image_token_id, case.anyres)
    wanted, real = theirs(**stretched), stretched["attention_mask"].bool()
    wanted.loss.backward()

    torch.testing.assert_close(read_logits(ours, inputs)[real], wanted.logits[real], rtol=2e-5, atol=2e-5)
    loss = ours(**inputs)
    torch.testing.assert_close(loss, wanted.loss)
    loss.backward()
    for p in ours.parameters():              # saved as if they were weights, gradients get llava-hf's names
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    found = saved(ours, tmp_path)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    for part, new, old in zip(layouts.PARTS, layouts.FROM_PUBLISHED["new"], layouts.FROM_PUBLISHED["old"]):
        for name, gradient in gradients.items():
            if name.startswith(new) and not (linear and part == "projector.2."):
                error = found.pop(old + name.removeprefix(new))[:len(gradient)] - gradient
                like = gradients[name.replace("k_proj.bias", "q_proj.bias")]     # keys' have only rounding
                assert error.abs().max() <= 2e-5 * like.abs().max(), name
    assert all("linear_2" in name for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_are_the_recorded_ones(family, opened):
    (case, model), golden = opened(family), load_file(HERE / "golden.safetensors")
    inputs = batch(model.config.image_token_id, case.anyres)
    counts = [len(f) for f in model.encode_images(inputs["images"], inputs["image_sizes"])]
    stretched = expanded(inputs, counts, model.config.image_token_id, case.anyres)
    found = some(read_logits(model, inputs), stretched["attention_mask"])
    torch.testing.assert_close(found, golden[f"{family}: logits"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model(**inputs).detach(), golden[f"{family}: loss"])


@pytest.mark.parametrize("layout", HUB)
def test_the_layouts_are_written_as_transformers_reads_them(layout, opened):
    """A test of the helper: transformers finds every tensor and no other in what LAYOUTS writes."""
    hf = pytest.importorskip("transformers", minversion="5")
    case, _ = opened(layout)
    theirs, report = hf.AutoModelForImageTextToText.from_pretrained(
        case.source["path_or_repo_id"], output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in named(case.tensors, "new").items())


@pytest.mark.parametrize("layout", ["llava-hf llava, old names", "liuhaotian v1.6"])
def test_what_transformers_saves_opens(layout, opened, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    case, ours = opened(layout)
    reference(case).save_pretrained(tmp_path)
    again = Llava.from_pretrained(tmp_path, dtype=torch.float32)
    mine, other = ours.state_dict(), again.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_weights_are_cast_to_the_type_asked_for(opened):
    (_, exact), (_, short) = opened("liuhaotian v1"), opened("liuhaotian v1", dtype=torch.bfloat16)
    for p, q in zip(exact.parameters(), short.parameters(), strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(q, p.bfloat16())


def test_a_checkpoint_is_known_by_its_config_and_keys_not_by_its_folder(tmp_path):
    case = LAYOUTS["liuhaotian v1.6"](tmp_path)
    misleading = tmp_path / "llava-1.5-vicuna-hf"
    shutil.move(case.source["path_or_repo_id"], misleading)
    model = Llava.from_pretrained(misleading, dtype=torch.float32)
    assert model.config.image_mode == "anyres" and model.config.template == "mistral_instruct"
    assert torch.equal(model.image_newline, case.tensors["newline"])


@pytest.mark.parametrize("layout", ["llava-hf llava, .bin shards", "liuhaotian v1.6", "LoRA over vicuna"])
def test_a_hub_id_opens_from_the_cache_without_network(layout, tmp_path, monkeypatch):
    """Every folder of the case becomes a repository in a cache; configs name each other by id."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    case = LAYOUTS[layout](tmp_path / "work")
    exact = Llava.from_pretrained(**case.source, dtype=torch.float32)
    configs = (tmp_path / "work").rglob("config.json")
    folders = {str(file.parent): f"someone/{file.parent.name}" for file in configs}
    revision = "0123456789" * 4
    for folder, name in folders.items():
        repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / revision, ignore=shutil.ignore_patterns("clip"))
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text(revision)
        for file in (repository / "snapshots" / revision).glob("*config.json"):
            for path in sorted(folders, key=len, reverse=True):
                file.write_text(file.read_text().replace(f'"{path}"', f'"{folders[path]}"'))
    shutil.rmtree(tmp_path / "work")
    name = folders[case.source["path_or_repo_id"]]
    for source in (f"{name}@{revision}", name):
        model = Llava.from_pretrained(source, dtype=torch.float32)
        same_model(exact, model)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "run", whole=False)
    assert f"{name}@{revision}" in (tmp_path / "run/config.json").read_text()
    same_model(exact, Llava.from_pretrained(tmp_path / "run", dtype=torch.float32))


# ---------------------------------------------------------------------------------------------
# Configs of both generations


def without(sizes: dict, *names: str, **more) -> dict:
    return {key: value for key, value in sizes.items() if key not in names} | more


TURNS = {"rope_type": "default", "rope_theta": 5e5}
CONFIGS = {
    "v0.1": without(MISTRAL, "head_dim", sliding_window=4096, rope_theta=10000.0),
    "v0.2": without(MISTRAL, "head_dim", sliding_window=None),
    "window absent": without(MISTRAL, "sliding_window"),
    "theta absent": without(MISTRAL, "rope_theta"),
    "eps absent": without(MISTRAL, "rms_norm_eps"),
    "rope_parameters": without(MISTRAL, "rope_theta", rope_parameters=TURNS),
    "rope_scaling null": without(MISTRAL, rope_scaling=None),
    "head_dim null": without(MISTRAL, head_dim=None),
    "head_dim of its own": without(MISTRAL, head_dim=14),
    "v0.3": without(MISTRAL, vocab_size=32768),
    "vicuna": without(LLAMA, "head_dim", "sliding_window", "rope_theta"),
    "llama, heads absent": without(LLAMA, "num_key_value_heads"),
    "llama, eps and theta absent": without(LLAMA, "rms_norm_eps", "rope_theta"),
    "llama, rope_parameters": without(LLAMA, "rope_theta", rope_parameters=TURNS),
}


def read_config(config: dict, folder: Path):
    """What we read and what transformers reads."""
    hf = pytest.importorskip("transformers", minversion="5")
    layouts.write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return Processor.from_pretrained(folder).config, hf.AutoConfig.from_pretrained(folder)


def same_text(ours, theirs):
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_models_config_is_read_as_transformers_reads_it(name, tmp_path):
    ours, theirs = read_config(CONFIGS[name], tmp_path)
    same_text(ours.text, theirs)
    assert ours.template == ("mistral_instruct" if theirs.model_type == "mistral" else "v1")


NESTED = {
    "llava-1.5-7b-hf": {"model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064,
                        "max_position_embeddings": 4096},
    "llava-v1.6-mistral-7b-hf": {
        "model_type": "mistral", "intermediate_size": 14336, "rms_norm_eps": 1e-5, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064},
    "silent mistral": {"model_type": "mistral"},
    "silent llama": {"model_type": "llama"},
    "no model_type": {"vocab_size": 32064},
    "fewer heads": {"model_type": "llama", "num_attention_heads": 16, "hidden_size": 2048},
}


@pytest.mark.parametrize("name", NESTED)
def test_a_nested_config_may_be_incomplete_as_transformers_allows(name, tmp_path):
    ours, theirs = read_config(hub_config({"rope_theta": 1e4} | NESTED[name], anyres=True), tmp_path)
    same_text(ours.text, theirs.text_config)
    assert ours.image_token_id == theirs.image_token_index == IMAGE_ID
    assert ours.vision_feature_layer == theirs.vision_feature_layer == -2
    for field, value in vars(ours.vision).items():
        assert value == getattr(theirs.vision_config, field), field


def test_liuhaotians_config_tells_mode_projector_and_grids(tmp_path):
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
def test_the_processors_config_is_the_models_though_the_language_model_is_gone(layout, name, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    folder = Path(case.source["path_or_repo_id"])
    config = Llava.from_pretrained(folder).config
    edit(folder / "config.json", "_name_or_path", **({"_name_or_path": name} if name else {}))
    assert Processor.from_pretrained(layouts.write_tokenizer(folder)).config == config


# ---------------------------------------------------------------------------------------------
# Out


@pytest.mark.parametrize("layout", ["llava-hf llava, new names", "llava-hf llava_next, fresh names",
                                    "liuhaotian v1", "liuhaotian v1.6", "mistral + clip", "LoRA over v1.6"])
def test_what_is_saved_opens_in_transformers_without_a_missing_or_unexpected_key(layout, opened, tmp_path):
    hf = pytest.importorskip("transformers", minversion="5")
    case, ours = opened(layout)
    ours.save_pretrained(tmp_path)
    theirs, report = hf.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    inputs, image_id = batch(ours.config.image_token_id, case.anyres), theirs.config.image_token_index
    stretched = expanded(inputs, token_counts(case.anyres), ours.config.image_token_id, case.anyres)
    stretched["input_ids"] = stretched["input_ids"].masked_fill(stretched["input_ids"] == IMAGE_ID, image_id)
    del stretched["labels"]
    with torch.no_grad():
        wanted, real = theirs.eval()(**stretched).logits, stretched["attention_mask"].bool()
    found = read_logits(ours, inputs)[real]
    torch.testing.assert_close(found, wanted[real][:, :found.shape[1]], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("layout", ["llava-hf llava_next, new names", "liuhaotian v1.6"])
def test_transformers_chooses_the_same_grids_from_what_is_saved(layout, opened, tmp_path):
    utilities = pytest.importorskip("transformers.image_processing_utils")
    model = opened(layout)[1]
    model.save_pretrained(tmp_path)
    words = layouts.write_tokenizer(tmp_path / "words")
    Processor.from_pretrained(words, model.config).save_pretrained(tmp_path)
    for file in ("config.json", "preprocessor_config.json"):
        grids = json.loads((tmp_path / file).read_text())["image_grid_pinpoints"]
        for size in ((100, 200), (200, 100), (30, 300), (20, 20)):
            height, width = utilities.select_best_resolution(size, grids)
            assert llava.choose_grid(size, model.config.grids) == (width, height), (file, size)


@pytest.mark.parametrize("layout", ["llava-hf llava_next, old names", "liuhaotian v1", "liuhaotian v1.6",
                                    "mistral with wide heads + clip"])
def test_saved_and_opened_again_is_the_same_config_and_the_same_tensors(layout, opened, tmp_path):
    _, model = opened(layout)
    first = saved(model, tmp_path / "1")
    again = Llava.from_pretrained(tmp_path / "1", dtype=torch.float32)
    V = model.config.text.vocab_size         # only the words' rows may have grown
    for name, p in model.state_dict().items():
        assert torch.equal(again.state_dict()[name][:V] if len(p) == V else again.state_dict()[name], p), name
    assert json.dumps(vars(again.config), default=vars).replace(
        f'"vocab_size": {again.config.text.vocab_size}', f'"vocab_size": {V}') == json.dumps(
        vars(model.config), default=vars)
    second, third = saved(again, tmp_path / "2"), Llava.from_pretrained(tmp_path / "2", dtype=torch.float32)
    assert third.config == again.config
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["mistral + clip", "llava-hf llava, old names",
                                    "liuhaotian v1", "liuhaotian v1.6"])
def test_a_run_folder_stores_what_was_trained_and_opens_over_its_bases(layout, opened, tmp_path):
    _, model = opened(layout)
    model.requires_grad_(False).projector.requires_grad_(True)
    with torch.no_grad():
        for p in model.projector.parameters():
            p.add_(1)
    model.save_pretrained(tmp_path / "stage1", whole=False)
    assert all("projector" in name for name in load_file(tmp_path / "stage1/model.safetensors"))
    second = Llava.from_pretrained(tmp_path / "stage1", dtype=torch.float32)
    same_model(model, second)

    second.vision_tower.requires_grad_(False)                   # a second run over the first
    with torch.no_grad():
        second.language_model.lm_head.weight.mul_(2)
    second.save_pretrained(tmp_path / "stage2", whole=False)
    same_model(second, Llava.from_pretrained(tmp_path / "stage2", dtype=torch.float32))
    assert not any("vision" in name for name in load_file(tmp_path / "stage2/model.safetensors"))


def same_model(one: Llava, other: Llava):
    assert one.config == other.config
    state = other.state_dict()
    assert all(torch.equal(p, state.pop(name)) for name, p in one.state_dict().items()) and not state


def test_a_save_that_fails_leaves_the_old_checkpoint_as_it_was(opened, tmp_path, monkeypatch):
    _, model = opened("liuhaotian v1")
    before = saved(model, tmp_path)

    def full(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(llava, "save_file", full)
    with torch.no_grad():
        model.projector[0].weight.zero_()
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ---------------------------------------------------------------------------------------------
# Bad input: one sentence that names what is wrong


def refused(*words: str, **source) -> str:
    with pytest.raises((OSError, ValueError)) as error:
        Llava.from_pretrained(**source)
    for word in words:
        assert word in str(error.value), (word, str(error.value))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize("layout, shard", [("liuhaotian v1.5", "llava/pytorch_model-00001-of-00002.bin"),
                                           ("liuhaotian v1.6", "llava/model-00002-of-00002.safetensors")])
@pytest.mark.parametrize("keep", [None, 0, 0.001, 0.5])
def test_a_shard_that_is_absent_empty_or_cut_is_named(layout, shard, keep, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    file = tmp_path / shard
    content = file.read_bytes()
    file.unlink() if keep is None else file.write_bytes(content[:int(len(content) * keep)])
    refused(file.name, **case.source)


@pytest.mark.parametrize("layout", ["llava-hf llava_next, old names", "liuhaotian v1.6"])
def test_an_index_that_forgets_a_shard_is_found_out(layout, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    index = next(tmp_path.rglob("*.index.json"))
    listed = json.loads(index.read_text())["weight_map"]
    forgotten = {key: file for key, file in listed.items() if "00002-of" not in file}
    index.write_text(json.dumps({"weight_map": forgotten}))
    assert refused("missing", **case.source).count("missing") > 10
    index.write_text("{}")
    refused(index.name, **case.source)
    index.write_text('{"weight_map"')
    refused(index.name, **case.source)


class Burglar:
    def __reduce__(self):
        return os.mkdir, ("burgled",)


@pytest.mark.parametrize("content", [{"a": Burglar()}, [1, 2], {"a": 3}, {"a": {"b": torch.ones(2)}}, "x"],
                         ids=["code", "list", "number", "nested", "string"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "mm_projector.bin"])
def test_a_pickle_that_is_not_tensors_is_refused_and_never_executed(content, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = "liuhaotian v1" if file == "pytorch_model.bin" else "mm_projector.bin"
    case = LAYOUTS[layout](tmp_path)
    torch.save(content, Path(case.source["path_or_repo_id"]) / file)
    refused(file, **case.source)
    assert not Path("burgled").exists()


def test_missing_misshapen_and_extra_tensors_are_all_listed_in_one_error(tmp_path):
    case = LAYOUTS["llava-hf llava, old names"](tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"]
    del tensors["vision_tower.vision_model.pre_layrnorm.bias"]
    tensors["multi_modal_projector.linear_2.weight"] = torch.ones(40, 41)
    tensors["language_model.model.layers.7.mlp.up_proj.weight"] = torch.ones(3)
    tensors["qformer.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    refused("layers.1.mlp.up_proj.weight", "pre_layrnorm.bias", "[40, 41]", "[40, 40]",
            "layers.7.mlp.up_proj.weight", "qformer.weight", str(tmp_path), **case.source)


def edit(file: Path, *absent: str, **more) -> None:
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in absent}
    file.write_text(json.dumps(content | more))


@pytest.mark.parametrize("layout, absent, more, word", [
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
def test_a_config_that_lacks_a_field_or_asks_for_more_is_refused(layout, absent, more, word, tmp_path):
    case = LAYOUTS[layout](tmp_path)
    edit(Path(case.source["path_or_repo_id"]) / "config.json", absent, **more)
    refused(word, **case.source)


@pytest.mark.parametrize("content", ["", "{", "[]", "7"])
def test_a_config_that_is_no_json_object_is_named(content, tmp_path):
    case = LAYOUTS["llava-hf llava, old names"](tmp_path)
    (tmp_path / "config.json").write_text(content)
    refused("config.json", **case.source)


def test_a_lora_run_that_is_not_whole_is_refused(tmp_path):
    case = LAYOUTS["LoRA over vicuna"](tmp_path)
    run = Path(case.source["path_or_repo_id"])
    adapter, config = load_file(run / "adapter_model.safetensors"), (run / "adapter_config.json").read_text()
    layers = "base_model.model.model.layers."
    b, far = layers + "1.mlp.down_proj.lora_B.weight", layers + "9.mlp.up_proj.lora_"
    pair = {far + "A.weight": torch.ones(3, 40), far + "B.weight": torch.ones(56, 3)}
    for change, word in (({b: None}, "down_proj"), ({b: torch.ones(7, 3)}, "down_proj"), (pair, "layers.9")):
        tensors = {key: tensor for key, tensor in (adapter | change).items() if tensor is not None}
        save_file(tensors, run / "adapter_model.safetensors")
        refused(word, **case.source)
    save_file(adapter, run / "adapter_model.safetensors")
    for absent, more in (("r", {}), ("lora_alpha", {}), ("", {"use_rslora": True})):
        edit(run / "adapter_config.json", absent, **more)
        refused(absent or "rslora", "adapter_config.json", **case.source)
        (run / "adapter_config.json").write_text(config)
    (run / "adapter_config.json").unlink()
    refused("adapter_config.json", **case.source)


def test_half_a_model_is_refused(tmp_path):
    clip, text = layouts.write_clip(tmp_path / "clip"), layouts.write_language(tmp_path / "text", layouts.V01)
    refused("text", path_or_repo_id=clip)
    refused("vision", path_or_repo_id=text)
    refused("vision", vision=clip)
    refused("vision", path_or_repo_id=text, vision=clip)


def test_a_run_whose_base_is_gone_names_it(tmp_path):
    case = LAYOUTS["llava-hf llava, old names"](tmp_path / "base")
    model = Llava.from_pretrained(**case.source)
    model.requires_grad_(False).projector.requires_grad_(True)
    model.save_pretrained(tmp_path / "run", whole=False)
    shutil.rmtree(tmp_path / "base")
    refused(str(tmp_path / "base"), path_or_repo_id=tmp_path / "run")


def test_without_network_a_repository_is_one_sentence_and_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["llava.py", "--model", "nobody/no-such-model", "Hello"])
    with pytest.raises(SystemExit) as end:
        llava.command_line(llava.main)
    assert "nobody/no-such-model" in end.value.code and len(end.value.code.splitlines()) == 1


@pytest.mark.parametrize("arguments, word", [
    (["--image", "none.png", "What?"], "none.png"), (["--image", "words.png", "What?"], "words.png"),
    (["--image", "cut.png", "What?"], "cut.png"),
    (["--image", "sound.png", "<image><image> What?"], "<image>"),
    (["<image>\nWhat?"], "<image>")], ids=["absent", "no picture", "cut", "two marks", "no pictures"])
def test_a_bad_picture_or_a_wrong_number_of_marks_is_one_sentence_and_exit_code_1(
        arguments, word, tmp_path, monkeypatch, capsys):
    from PIL import Image
    case = LAYOUTS["llava-hf llava, old names"](tmp_path)
    layouts.write_tokenizer(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("words.png").write_text("no picture")
    Image.effect_noise((60, 60), 50).save("sound.png")
    Path("cut.png").write_bytes(Path("sound.png").read_bytes()[:900])
    monkeypatch.setattr(sys, "argv", ["llava.py", "--model", case.source["path_or_repo_id"], *arguments])
    with pytest.raises(SystemExit) as end:
        llava.command_line(llava.main)
    assert word in end.value.code and len(end.value.code.splitlines()) == 1      # a text: exit code 1


def test_names_without_a_meaning_are_dropped_and_others_are_not(tmp_path):
    """Old buffers and CLIP's text half may be in a file; a stranger may not."""
    tensors = layouts.vision_tensors() | layouts.text_tensors(LLAMA) | layouts.projector_tensors(LLAMA)
    old = named(tensors, "old")
    buffers = {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
               "language_model.model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    write(tmp_path, hub_config(LLAMA), old | buffers)
    Llava.from_pretrained(tmp_path)
    stranger = {"language_model.model.layers.1.self_attn.q_proj.bias": torch.ones(40)}
    write(tmp_path, hub_config(LLAMA), old | stranger)
    refused("q_proj.bias", path_or_repo_id=tmp_path)
