"""Tiny random checkpoints in every layout that LLaVA is published in.

    with tempfile.TemporaryDirectory() as folder:
        case = LAYOUTS["liuhaotian v1.6"](Path(folder))
        model = Llava.from_pretrained(**case.source)

Each layout is written from the same plain tensors, whose names begin with the name of their part
(PARTS); nothing here knows how llava.py calls or reads them. Weights are loud: every part changes
the logits visibly. Sizes differ pairwise where the architecture allows it, so that no transposed or
swapped tensor fits by accident.
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
IMAGE_ID = 89                                # of llava-hf's <image>; liuhaotian's files have none
GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
PARTS = ("text.", "head.", "newline", "vision.", "projector.1.", "projector.2.")
FROM_PUBLISHED = {
    "liuhaotian": ("model.", "lm_head.", "model.image_newline",
                   "model.vision_tower.vision_tower.vision_model.",
                   "model.mm_projector.0.", "model.mm_projector.2."),
    "liuhaotian linear": ("model.", "lm_head.", "", "", "model.mm_projector.", ""),
    "old": ("language_model.model.", "language_model.lm_head.", "image_newline", "vision_tower.vision_model.",
            "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    "fresh": ("language_model.model.", "language_model.lm_head.", "image_newline", "vision_tower.",
              "multi_modal_projector.linear_1.", "multi_modal_projector.linear_2."),
    "new": ("model.language_model.", "lm_head.", "model.image_newline", "model.vision_tower.",
            "model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    "newer": ("model.language_model.", "lm_head.", "model.image_newline", "model.vision_tower.vision_model.",
              "model.multi_modal_projector.linear_1.", "model.multi_modal_projector.linear_2."),
    "backbone": ("model.", "lm_head.", "", "vision_model.", "", ""),
}


class Case(NamedTuple):
    """A checkpoint on disk, and the model it should open as."""
    source: dict[str, str]                   # arguments of Llava.from_pretrained
    text: dict                               # the language model's sizes
    tensors: dict[str, Tensor]               # by part; without a projector where it starts afresh
    anyres: bool = False


# ---------------------------------------------------------------------------------------------
# Weights


def draw(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """RandomState's numbers are the same for ever: golden numbers may depend on them."""
    noise, tensors = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        tensor = torch.from_numpy(noise.standard_normal(shape).astype(np.float32))
        if "norm" in name:
            tensor = ("weight" in name) + 0.3 * tensor
        elif len(shape) > 1 and "embed" not in name:
            tensor = tensor * 1.3 / np.prod(shape[1:]) ** 0.5
        tensors[name] = tensor
    return tensors


def vision_tensors(seed: int = 1) -> dict[str, Tensor]:
    C, inner, p = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    norm, block = {"weight": (C,), "bias": (C,)}, {}
    layer = {f"self_attn.{x}_proj": {"weight": (C, C), "bias": (C,)} for x in ("q", "k", "v", "out")}
    layer |= {"layer_norm1": norm, "layer_norm2": norm, "mlp.fc1": {"weight": (inner, C), "bias": (inner,)},
              "mlp.fc2": {"weight": (C, inner), "bias": (C,)}}
    for i in range(VISION["num_hidden_layers"]):
        block |= {f"encoder.layers.{i}.{name}": shapes for name, shapes in layer.items()}
    block |= {"pre_layrnorm": norm, "post_layernorm": norm}
    shapes = {"embeddings.class_embedding": (C,), "embeddings.patch_embedding.weight": (C, 3, p, p),
              "embeddings.position_embedding.weight": ((VISION["image_size"] // p) ** 2 + 1, C)}
    shapes |= {f"{name}.{kind}": shape for name, kinds in block.items() for kind, shape in kinds.items()}
    return draw({f"vision.{name}": shape for name, shape in shapes.items()}, seed)


def text_tensors(text: dict, seed: int = 2) -> dict[str, Tensor]:
    C, inner, D = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    H, K = text["num_attention_heads"], text["num_key_value_heads"]
    layer = {"input_layernorm": (C,), "post_attention_layernorm": (C,), "self_attn.q_proj": (H * D, C),
             "self_attn.k_proj": (K * D, C), "self_attn.v_proj": (K * D, C), "self_attn.o_proj": (C, H * D),
             "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C), "mlp.down_proj": (C, inner)}
    shapes = {f"text.layers.{i}.{name}.weight": shape for i in range(text["num_hidden_layers"])
              for name, shape in layer.items()}
    words = (text["vocab_size"], C)
    shapes |= {"text.embed_tokens.weight": words, "text.norm.weight": (C,), "head.weight": words}
    return draw(shapes, seed)


def projector_tensors(text: dict, linear=False, newline=False, seed: int = 3) -> dict[str, Tensor]:
    C = text["hidden_size"]
    shapes = {"projector.1.weight": (C, VISION["hidden_size"]), "projector.1.bias": (C,)}
    shapes |= {} if linear else {"projector.2.weight": (C, C), "projector.2.bias": (C,)}
    return draw(shapes | ({"newline": (C,)} if newline else {}), seed)


# ---------------------------------------------------------------------------------------------
# Files


def named(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    return {start + name.removeprefix(part): tensor for name, tensor in tensors.items()
            for part, start in zip(PARTS, FROM_PUBLISHED[layout]) if name.startswith(part)}


def write(folder: Path, config: dict, tensors: dict[str, Tensor], form="model.safetensors", shards=1) -> Path:
    """config.json and the weights: in one file, or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, _, end = form.rpartition(".")
    files = [form] if shards == 1 else [f"{stem}-{i + 1:05}-of-{shards:05}.{end}" for i in range(shards)]
    where = {key: files[i % shards] for i, key in enumerate(sorted(tensors))}
    for file in files:
        part = {key: tensors[key] for key in where if where[key] == file}
        torch.save(part, folder / file) if end == "bin" else save_file(part, folder / file, {"format": "pt"})
    if shards > 1:
        (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_clip(folder: Path, form: str = "pytorch_model.bin") -> Path:
    """As openai publishes it: the text model's half and an old buffer are in the file, too."""
    extra = draw({"text_model.embeddings.token_embedding.weight": (6, 4), "visual_projection.weight": (5, 24),
                  "text_projection.weight": (5, 4), "text_model.final_layer_norm.bias": (4,)}, 9)
    extra["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    extra["logit_scale"] = torch.tensor(4.6)
    config = {"model_type": "clip", "projection_dim": 5, "text_config": {"model_type": "clip_text_model"},
              "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", **VISION}}
    return write(folder, config, named(vision_tensors(), "backbone") | extra, form)


def write_language(folder: Path, text: dict, form="model.safetensors", shards=1, config=None) -> Path:
    """As mistralai and lmsys publish theirs, with a buffer that old files have."""
    tensors = named(text_tensors(text), "backbone")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(text["head_dim"] // 2)
    return write(folder, config or text | {"hidden_act": "silu"}, tensors, form, shards)


def write_tokenizer(folder: Path, legacy: bool | None = None) -> Path:
    """A BPE of LLaMA's kind: bytes, the letters of a few words, and merges that make "▁cat" of them."""
    letters = sorted(set("▁[]/.:?,!'<>\n" + string.ascii_letters + string.digits))
    merges = "▁ c, a t, ▁c at, ▁ A, ▁ [, ▁ U, S E, ▁U SE, U SE, USE R, I N, IN S, INS T, h at, i s, ▁ i"
    merges = [tuple(merge.split(" ")) for merge in merges.split(", ")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters,
              *dict.fromkeys(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>"} | ({} if legacy is None else {"legacy": legacy})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------------------------
# Layouts: folder -> Case


def hub_config(text: dict, anyres: bool = False, generation: int = 4) -> dict:
    """llava-hf's config.json as transformers 4 or 5 writes it."""
    text = dict(text)
    if generation == 5:
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    image_token = "image_token_index" if generation == 4 else "image_token_id"
    return {"model_type": "llava_next" if anyres else "llava", image_token: IMAGE_ID,
            "text_config": text, "vision_config": {"model_type": "clip_vision_model", **VISION},
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            **({"image_grid_pinpoints": GRIDS} if anyres else {})}


def hub(names: str, anyres: bool, text: dict, **files) -> Callable[[Path], Case]:
    def build(folder: Path) -> Case:
        tensors = vision_tensors() | text_tensors(text) | projector_tensors(text, newline=anyres)
        config = hub_config(text, anyres, generation=4 if names == "old" else 5)
        write(folder, config, named(tensors, names), **files)
        return Case({"path_or_repo_id": str(folder)}, text, tensors, anyres)
    return build


def flat_config(text: dict, tower: Path, **more) -> dict:
    """liuhaotian's config.json: the language model's, with mm_ keys added."""
    return {**text, "model_type": f"llava_{text['model_type']}", "mm_vision_tower": str(tower),
            "mm_hidden_size": VISION["hidden_size"], "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "use_mm_proj": True,
            "mm_projector_type": "mlp2x_gelu", **more}


def liuhaotian(linear=False, tower=False, anyres=False, text=LLAMA, missing=(), **files):
    """v1: linear; v1.5: the tower named, not stored; v1.6: its own tower and a newline."""
    def build(folder: Path) -> Case:
        projector = projector_tensors(text, linear, newline=anyres)
        own = text_tensors(text) | projector | (vision_tensors(seed=7) if tower else {})
        more = {"mm_projector_type": "linear"} if linear else {"image_aspect_ratio": "pad"}
        if anyres:
            more = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                    "image_grid_pinpoints": GRIDS, "unfreeze_mm_vision_tower": True}
        config = flat_config(text, write_clip(folder / "clip"), **more)
        config = {key: value for key, value in config.items() if key not in missing}
        config |= {"model_type": "llava"} if linear else {}
        write(folder / "llava", config, named(own, "liuhaotian linear" if linear else "liuhaotian"), **files)
        return Case({"path_or_repo_id": str(folder / "llava")}, text, vision_tensors() | own, anyres)
    return build


def backbones(text: dict, form="model.safetensors", shards=1, missing=()) -> Callable[[Path], Case]:
    """A language model and a CLIP as their publishers left them, not yet joined."""
    def build(folder: Path) -> Case:
        config = {key: value for key, value in text.items() if key not in missing} | {"hidden_act": "silu"}
        source = {"vision": str(write_clip(folder / "clip", "model.safetensors")),
                  "language": str(write_language(folder / "text", text, form, shards, config))}
        return Case(source, text, vision_tensors() | text_tensors(text))
    return build


def mm_projector(folder: Path) -> Case:
    """Stage 1 of liuhaotian's code: the projector alone, over the bases that its config names."""
    projector = projector_tensors(LLAMA)
    config = flat_config(LLAMA, write_clip(folder / "clip"),
                         _name_or_path=str(write_language(folder / "vicuna", LLAMA)))
    write(folder / "run", config, named(projector, "liuhaotian"), "mm_projector.bin")
    tensors = vision_tensors() | text_tensors(LLAMA) | projector
    return Case({"path_or_repo_id": str(folder / "run")}, LLAMA, tensors)


def lora(over: Callable[[Path], Case], form: str) -> Callable[[Path], Case]:
    """A LoRA run of liuhaotian's code: adapter and non_lora_trainables.bin over a base."""
    def build(folder: Path) -> Case:
        base = over(folder / "base")
        base_folder = Path(base.source.get("language") or base.source["path_or_repo_id"])
        inner = json.loads((base_folder / "config.json").read_text())
        tower = base.source.get("vision") or inner["mm_vision_tower"]
        projector = projector_tensors(base.text, seed=5)
        merged, adapter, noise, rank, alpha = dict(base.tensors), {}, np.random.RandomState(6), 3, 6
        stored = base.tensors if "language" not in base.source else text_tensors(base.text)
        targets = [name for name in stored if name.endswith("_proj.weight")]  # by suffix: the tower's, too
        for name in targets:
            a, b = (torch.from_numpy(noise.standard_normal(shape).astype(np.float32) / 4)
                    for shape in ((rank, stored[name].shape[1]), (stored[name].shape[0], rank)))
            b = b * name.startswith("text.")             # in the tower they never got a gradient
            key = "base_model.model." + next(iter(named({name: a}, "liuhaotian"))).removesuffix("weight")
            adapter |= {f"{key}lora_A.weight": a, f"{key}lora_B.weight": b}
            merged[name] = stored[name] + alpha / rank * b @ a
        config = flat_config(base.text, tower, _name_or_path=str(base_folder))
        if base.anyres:
            config |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                       "image_grid_pinpoints": GRIDS}
        write(folder / "run", config, adapter, form)
        (folder / "run/adapter_config.json").write_text(json.dumps({
            "r": rank, "lora_alpha": alpha, "base_model_name_or_path": str(base_folder)}))
        trained = named(projector, "liuhaotian")
        torch.save({f"base_model.model.{name}": tensor for name, tensor in trained.items()},
                   folder / "run/non_lora_trainables.bin")
        return Case({"path_or_repo_id": str(folder / "run")}, base.text, merged | projector, base.anyres)
    return build


V01 = {**MISTRAL, "rope_theta": 1e4, "sliding_window": 12}      # as Mistral-7B-v0.1: it slides
LAYOUTS: dict[str, Callable[[Path], Case]] = {
    "llava-hf llava, old names": hub("old", False, LLAMA),
    "llava-hf llava, fresh names": hub("fresh", False, MISTRAL),
    "llava-hf llava, new names": hub("new", False, LLAMA),
    "llava-hf llava, new names with vision_model": hub("newer", False, MISTRAL),
    "llava-hf llava, .bin shards": hub("old", False, LLAMA, form="pytorch_model.bin", shards=3),
    "llava-hf llava_next, old names": hub("old", True, MISTRAL, shards=2),
    "llava-hf llava_next, fresh names": hub("fresh", True, LLAMA),
    "llava-hf llava_next, new names": hub("new", True, MISTRAL),
    "llava-hf llava_next, new names with vision_model": hub("newer", True, V01),
    "liuhaotian v1": liuhaotian(linear=True, form="pytorch_model.bin",
                                missing=("mm_projector_type", "mm_vision_select_feature")),
    "liuhaotian v1.5": liuhaotian(form="pytorch_model.bin", shards=2),
    "liuhaotian v1.6": liuhaotian(tower=True, anyres=True, text=MISTRAL, shards=2),
    "mistral + clip": backbones(V01, shards=2, missing=("head_dim",)),
    "mistral with wide heads + clip": backbones(MISTRAL | {"head_dim": 14}),
    "vicuna + clip": backbones(LLAMA, form="pytorch_model.bin", missing=("head_dim", "sliding_window")),
    "mm_projector.bin": mm_projector,
    "LoRA over vicuna": lora(backbones(LLAMA), "adapter_model.safetensors"),
    "LoRA over v1.6": lora(liuhaotian(tower=True, anyres=True, text=MISTRAL), "adapter_model.bin"),
}
