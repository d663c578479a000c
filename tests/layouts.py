"""Write tiny random checkpoints in every layout that LLaVA is published in.

    with tempfile.TemporaryDirectory() as folder:
        case = LAYOUTS["liuhaotian v1.6"](Path(folder))
        model = Llava.from_pretrained(**case.source)

Each layout is written from the same tensors, whose names begin with the name of their part (PARTS).
This file does not use llava.py, because its checkpoints test llava.py. The weights are large enough for
every part to change the logits clearly. Sizes differ pairwise where the architecture allows it, so that a
transposed or swapped tensor has the wrong shape.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor

VISION = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 3,
          "image_size": 28, "patch_size": 7, "layer_norm_eps": 1e-5}
MISTRAL = {"model_type": "mistral", "vocab_size": 90, "hidden_size": 40, "intermediate_size": 56,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
           "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 512}
LLAMA = {**MISTRAL, "model_type": "llama", "intermediate_size": 52, "num_key_value_heads": 4,
         "rope_theta": 1e4}
IMAGE_ID = 89                                # id of <image> in llava-hf's files; liuhaotian's have none
GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
# A tensor name here starts with one of PARTS. PREFIXES has what replaces each of them in the published
# layouts, in the same order, or "" if a layout has no such tensor.
PARTS = ("text.", "head.", "newline", "vision.", "projector.1.", "projector.2.")
PREFIXES = {
    "liuhaotian": ("model.", "lm_head.", "model.image_newline",
                   "model.vision_tower.vision_tower.vision_model.",
                   "model.mm_projector.0.", "model.mm_projector.2."),
    "liuhaotian linear": ("model.", "lm_head.", "", "", "model.mm_projector.", ""),
    "old": ("language_model.model.", "language_model.lm_head.", "image_newline", "vision_tower.vision_model.",
            "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    "old without vision_model": (
        "language_model.model.", "language_model.lm_head.", "image_newline", "vision_tower.",
        "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    "new": ("model.language_model.", "lm_head.", "model.image_newline", "model.vision_tower.",
            "model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    "new with vision_model": (
        "model.language_model.", "lm_head.", "model.image_newline", "model.vision_tower.vision_model.",
        "model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    "backbone": ("model.", "lm_head.", "", "vision_model.", "", ""),
}


class Case(NamedTuple):
    """A checkpoint on disk, and the weights of the model that it contains."""
    source: dict[str, str]                   # arguments of Llava.from_pretrained
    text: dict                               # config of the language model
    tensors: dict[str, Tensor]               # no projector if Llava.from_pretrained initializes a new one
    anyres: bool = False


# ---------------------------------------------------------------------------------------------
# Weights


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Random tensors. The recorded results depend on them: RandomState is the same in all numpy versions."""
    generator, tensors = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        tensor = torch.from_numpy(generator.standard_normal(shape).astype(np.float32))
        if "norm" in name:
            tensor = 0.3 * tensor
            if "weight" in name:
                tensor = 1 + tensor
        elif len(shape) > 1 and "embed" not in name:
            tensor = tensor * 1.3 / np.prod(shape[1:]) ** 0.5
        tensors[name] = tensor
    return tensors


def vision_tensors(seed: int = 1) -> dict[str, Tensor]:
    C, inner, p = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    norm, modules = {"weight": (C,), "bias": (C,)}, {}
    layer = {f"self_attn.{x}_proj": {"weight": (C, C), "bias": (C,)} for x in ("q", "k", "v", "out")}
    layer |= {"layer_norm1": norm, "layer_norm2": norm, "mlp.fc1": {"weight": (inner, C), "bias": (inner,)},
              "mlp.fc2": {"weight": (C, inner), "bias": (C,)}}
    for i in range(VISION["num_hidden_layers"]):
        modules |= {f"encoder.layers.{i}.{name}": shapes for name, shapes in layer.items()}
    modules |= {"pre_layrnorm": norm, "post_layernorm": norm}
    shapes = {"embeddings.class_embedding": (C,), "embeddings.patch_embedding.weight": (C, 3, p, p),
              "embeddings.position_embedding.weight": ((VISION["image_size"] // p) ** 2 + 1, C)}
    shapes |= {f"{name}.{kind}": shape for name, kinds in modules.items() for kind, shape in kinds.items()}
    return random_tensors({f"vision.{name}": shape for name, shape in shapes.items()}, seed)


def text_tensors(text: dict, seed: int = 2) -> dict[str, Tensor]:
    C, inner, D = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    H, K = text["num_attention_heads"], text["num_key_value_heads"]
    layer = {"input_layernorm": (C,), "post_attention_layernorm": (C,), "self_attn.q_proj": (H * D, C),
             "self_attn.k_proj": (K * D, C), "self_attn.v_proj": (K * D, C), "self_attn.o_proj": (C, H * D),
             "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C), "mlp.down_proj": (C, inner)}
    shapes = {f"text.layers.{i}.{name}.weight": shape for i in range(text["num_hidden_layers"])
              for name, shape in layer.items()}
    embedding = (text["vocab_size"], C)
    shapes |= {"text.embed_tokens.weight": embedding, "text.norm.weight": (C,), "head.weight": embedding}
    return random_tensors(shapes, seed)


def projector_tensors(text: dict, linear=False, newline=False, seed: int = 3) -> dict[str, Tensor]:
    C = text["hidden_size"]
    shapes = {"projector.1.weight": (C, VISION["hidden_size"]), "projector.1.bias": (C,)}
    if not linear:
        shapes |= {"projector.2.weight": (C, C), "projector.2.bias": (C,)}
    if newline:
        shapes |= {"newline": (C,)}
    return random_tensors(shapes, seed)


# ---------------------------------------------------------------------------------------------
# Files


def rename_to_layout(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors with the names of a layout in PREFIXES."""
    return {start + name.removeprefix(part): tensor for name, tensor in tensors.items()
            for part, start in zip(PARTS, PREFIXES[layout]) if name.startswith(part)}


def write_checkpoint(folder: Path, config: dict, tensors: dict, file="model.safetensors", shards=1) -> Path:
    """Write config.json and the weights, in one file or in shards with an index; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, (stem, _, suffix) = [file], file.rpartition(".")
    if shards > 1:
        names = [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
    for name in names:
        shard = {key: tensors[key] for key in weight_map if weight_map[key] == name}
        if suffix == "bin":
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name, {"format": "pt"})
    if shards > 1:
        (folder / f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_clip(folder: Path, file: str = "pytorch_model.bin") -> Path:
    """Write a CLIP as openai publishes it: with its text encoder and an old buffer."""
    shapes = {"text_model.embeddings.token_embedding.weight": (6, 4), "visual_projection.weight": (5, 24),
              "text_projection.weight": (5, 4), "text_model.final_layer_norm.bias": (4,)}
    extra = random_tensors(shapes, 9)
    extra["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    extra["logit_scale"] = torch.tensor(4.6)
    config = {"model_type": "clip", "projection_dim": 5, "text_config": {"model_type": "clip_text_model"},
              "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **VISION}}
    return write_checkpoint(folder, config, rename_to_layout(vision_tensors(), "backbone") | extra, file)


def write_language_model(folder: Path, text: dict, file="model.safetensors", shards=1, config=None) -> Path:
    """Write a language model as mistralai and lmsys publish theirs, with a buffer that old files have."""
    tensors = rename_to_layout(text_tensors(text), "backbone")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(text["head_dim"] // 2)
    return write_checkpoint(folder, config or text | {"hidden_act": "silu"}, tensors, file, shards)


def write_tokenizer(folder: Path, legacy: bool | None = None) -> Path:
    """Write a BPE tokenizer like LLaMA's: bytes, letters, and a few merges such as "▁c" + "at"."""
    letters = sorted(set("▁[]/.:?,!'<>\n" + string.ascii_letters + string.digits))
    merges = "▁ c, a t, ▁c at, ▁ A, ▁ [, ▁ U, S E, ▁U SE, U SE, USE R, I N, IN S, INS T, h at, i s, ▁ i"
    merges = [tuple(merge.split(" ")) for merge in merges.split(", ")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters,
              *dict.fromkeys(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}
    if legacy is not None:
        config["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------------------------
# Layouts: functions that write a checkpoint to a folder and return its Case


def llava_hf_config(text: dict, anyres: bool = False, generation: int = 4) -> dict:
    """llava-hf's config.json as transformers 4 or 5 (`generation`) writes it."""
    text = dict(text)
    if generation == 5:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    image_token = "image_token_index" if generation == 4 else "image_token_id"
    config = {"model_type": "llava_next" if anyres else "llava", image_token: IMAGE_ID,
              "text_config": text, "vision_config": {"model_type": "clip_vision_model", **VISION},
              "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
              "projector_hidden_act": "gelu", "tie_word_embeddings": False}
    return config | {"image_grid_pinpoints": GRIDS} if anyres else config


def llava_hf(names: str, anyres: bool, text: dict, **files) -> Callable[[Path], Case]:
    """A checkpoint of llava-hf; `names`: a key of PREFIXES; `files`: for write_checkpoint."""
    def build(folder: Path) -> Case:
        tensors = vision_tensors() | text_tensors(text) | projector_tensors(text, newline=anyres)
        config = llava_hf_config(text, anyres, generation=4 if names == "old" else 5)
        write_checkpoint(folder, config, rename_to_layout(tensors, names), **files)
        return Case({"path_or_repo_id": str(folder)}, text, tensors, anyres)
    return build


def liuhaotian_config(text: dict, tower: Path, **changes) -> dict:
    """liuhaotian's config.json: the language model's, with mm_ keys added."""
    return {**text, "model_type": f"llava_{text['model_type']}", "mm_vision_tower": str(tower),
            "mm_hidden_size": VISION["hidden_size"], "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
            "use_mm_proj": True, "mm_projector_type": "mlp2x_gelu", **changes}


def liuhaotian(linear=False, tower=False, anyres=False, text=LLAMA, missing=(), **files):
    """A checkpoint of liuhaotian. v1 has a linear projector; v1.5 names its vision tower without storing
    its weights; v1.6 stores them and has a newline. `missing`: keys that config.json does not have."""
    def build(folder: Path) -> Case:
        projector = projector_tensors(text, linear, newline=anyres)
        stored = text_tensors(text) | projector
        if tower:
            stored |= vision_tensors(seed=7)
        changes = {"mm_projector_type": "linear"} if linear else {"image_aspect_ratio": "pad"}
        if anyres:
            changes = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                       "image_grid_pinpoints": GRIDS, "unfreeze_mm_vision_tower": True}
        config = liuhaotian_config(text, write_clip(folder / "clip"), **changes)
        config = {key: value for key, value in config.items() if key not in missing}
        if linear:
            config["model_type"] = "llava"
        names = "liuhaotian linear" if linear else "liuhaotian"
        write_checkpoint(folder / "llava", config, rename_to_layout(stored, names), **files)
        return Case({"path_or_repo_id": str(folder / "llava")}, text, vision_tensors() | stored, anyres)
    return build


def backbones(text: dict, file="model.safetensors", shards=1, missing=()) -> Callable[[Path], Case]:
    """A language model and a CLIP as two checkpoints, without a projector, as before stage 1."""
    def build(folder: Path) -> Case:
        config = {key: value for key, value in text.items() if key not in missing} | {"hidden_act": "silu"}
        source = {"vision": str(write_clip(folder / "clip", "model.safetensors")),
                  "language": str(write_language_model(folder / "text", text, file, shards, config))}
        return Case(source, text, vision_tensors() | text_tensors(text))
    return build


def mm_projector(folder: Path) -> Case:
    """A stage 1 checkpoint of liuhaotian: only the projector; its config names the bases."""
    projector = projector_tensors(LLAMA)
    config = liuhaotian_config(LLAMA, write_clip(folder / "clip"),
                               _name_or_path=str(write_language_model(folder / "vicuna", LLAMA)))
    write_checkpoint(folder / "run", config, rename_to_layout(projector, "liuhaotian"), "mm_projector.bin")
    tensors = vision_tensors() | text_tensors(LLAMA) | projector
    return Case({"path_or_repo_id": str(folder / "run")}, LLAMA, tensors)


def lora(build_base: Callable[[Path], Case], file: str) -> Callable[[Path], Case]:
    """A LoRA run folder of liuhaotian: an adapter and non_lora_trainables.bin over a base."""
    def build(folder: Path) -> Case:
        base = build_base(folder / "base")
        base_folder = Path(base.source.get("language") or base.source["path_or_repo_id"])
        base_config = json.loads((base_folder / "config.json").read_text())
        tower = base.source.get("vision") or base_config["mm_vision_tower"]
        projector = projector_tensors(base.text, seed=5)
        merged, adapter, generator, rank, alpha = dict(base.tensors), {}, np.random.RandomState(6), 3, 6
        stored = text_tensors(base.text) if "language" in base.source else base.tensors
        for name, weight in stored.items():
            if not name.endswith("_proj.weight"):        # the vision tower's layers have this ending, too
                continue
            a = torch.from_numpy(generator.standard_normal((rank, weight.shape[1])).astype(np.float32) / 4)
            b = torch.from_numpy(generator.standard_normal((weight.shape[0], rank)).astype(np.float32) / 4)
            if not name.startswith("text."):             # LoRA of the frozen vision tower is not trained
                b = 0 * b
            (published_name,) = rename_to_layout({name: weight}, "liuhaotian")
            key = "base_model.model." + published_name.removesuffix("weight")
            adapter |= {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b}
            merged[name] = weight + alpha / rank * b @ a
        config = liuhaotian_config(base.text, tower, _name_or_path=str(base_folder))
        if base.anyres:
            config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                       "image_grid_pinpoints": GRIDS}
        write_checkpoint(folder / "run", config, adapter, file)
        (folder / "run/adapter_config.json").write_text(json.dumps({
            "r": rank, "lora_alpha": alpha, "base_model_name_or_path": str(base_folder)}))
        published = rename_to_layout(projector, "liuhaotian")
        projector_file = {f"base_model.model.{name}": tensor for name, tensor in published.items()}
        torch.save(projector_file, folder / "run/non_lora_trainables.bin")
        return Case({"path_or_repo_id": str(folder / "run")}, base.text, merged | projector, base.anyres)
    return build


MISTRAL_V01 = {**MISTRAL, "rope_theta": 1e4, "sliding_window": 12}      # Mistral-7B-v0.1 has a sliding window
LAYOUTS: dict[str, Callable[[Path], Case]] = {
    "llava-hf llava, old names": llava_hf("old", False, LLAMA),
    "llava-hf llava, old names without vision_model": llava_hf("old without vision_model", False, MISTRAL),
    "llava-hf llava, new names": llava_hf("new", False, LLAMA),
    "llava-hf llava, new names with vision_model": llava_hf("new with vision_model", False, MISTRAL),
    "llava-hf llava, .bin shards": llava_hf("old", False, LLAMA, file="pytorch_model.bin", shards=3),
    "llava-hf llava_next, old names": llava_hf("old", True, MISTRAL, shards=2),
    "llava-hf llava_next, old names without vision_model": llava_hf("old without vision_model", True, LLAMA),
    "llava-hf llava_next, new names": llava_hf("new", True, MISTRAL),
    "llava-hf llava_next, new names with vision_model": llava_hf("new with vision_model", True, MISTRAL_V01),
    "liuhaotian v1": liuhaotian(linear=True, file="pytorch_model.bin",
                                missing=("mm_projector_type", "mm_vision_select_feature")),
    "liuhaotian v1.5": liuhaotian(file="pytorch_model.bin", shards=2),
    "liuhaotian v1.6": liuhaotian(tower=True, anyres=True, text=MISTRAL, shards=2),
    "mistral + clip": backbones(MISTRAL_V01, shards=2, missing=("head_dim",)),
    "mistral with wide heads + clip": backbones(MISTRAL | {"head_dim": 14}),
    "vicuna + clip": backbones(LLAMA, file="pytorch_model.bin", missing=("head_dim", "sliding_window")),
    "mm_projector.bin": mm_projector,
    "LoRA over vicuna": lora(backbones(LLAMA), "adapter_model.safetensors"),
    "LoRA over v1.6": lora(liuhaotian(tower=True, anyres=True, text=MISTRAL), "adapter_model.bin"),
}
