"""LLaVA on Mistral-7B in one file: a picture goes in as 576 extra words, an answer comes out.

    picture [1, 3, 336, 336] --vision tower--> [1, 576, 1024] --projector--> [576, 4096]
                                                                                 | for <image>
    "[INST] <image>\\nWhat is it? [/INST]" --embed--> [1, T, 4096] --splice--> [1, T + 575, 4096]
                                                                                 |
                                      "A cat." <--sample-- [1, V] <--lm_head-- language model

Read it top to bottom: sizes (1), the language model (2), the vision tower (3), pictures of any
resolution and fewer tokens (4), LLaVA (5), published weights (6), words and pictures to tensors
(7), the command line (8). Shapes are written [like, this]:

    B  rows of a batch        N  tiles: the pictures, cut up      C  width of the residual stream
    T  tokens in a row        P  patches of a tile                D  width of one attention head
    S  slots of the cache     W  sliding window                   H  query heads, K key/value heads
    V  words in the vocabulary

Sources: LLaVA (arXiv:2304.08485), 1.5 (2310.03744), 1.6 (llava-vl.github.io), Mistral 7B
(2310.06825), CLIP (2103.00020), PruMerge (2403.15388). Where a paper and its released code
disagree, this file follows the code and says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageColor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

IGNORE = -100                                # the label of a token that is read but not learned


class UserError(ValueError):
    """A mistake of the user, in one sentence that the command line prints instead of a traceback."""


# ---------------------------------------------------------------------------------------------
# 1. Sizes. Fields are called what the published config.json files call them.


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer; the defaults are openai/clip-vit-large-patch14-336."""
    hidden_size: int = 1024                  # C
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16            # H
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5

    @property
    def side(self) -> int:                   # patches along one side of a tile: P = 24² = 576
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """A Mistral decoder, or with K = H and no window a LLaMA; the defaults are
    Mistral-7B-Instruct-v0.2, the language model of LLaVA-1.6."""
    model_type: str = "mistral"
    vocab_size: int = 32000                  # V
    hidden_size: int = 4096                  # C
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32            # H
    num_key_value_heads: int = 8             # K: each serves H / K = 4 query heads
    head_dim: int = 128                      # D
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6                  # 1e4 in v0.1
    sliding_window: int | None = None        # W: 4096 in v0.1, a token sees itself and 4095 others
    max_position_embeddings: int = 32768


@dataclass(frozen=True)
class LlavaConfig:
    """The whole: LLaVA-1.5's ways by default."""
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    vision_feature_layer: int = -2           # the tower's states before its last block
    image_token_id: int = 32000              # stands for one whole picture in input_ids
    projector: str = "mlp2x_gelu"            # or "linear": LLaVA 1
    image_mode: str = "pad"                  # or "crop": LLaVA 1; "anyres": LLaVA 1.6
    grids: tuple[tuple[int, int], ...] = ()  # AnyRes: the (width, height) to choose from, in order
    hf_preprocessing: bool = False           # its ways where they differ: rounded grids, white behind
    template: str = "mistral_instruct"       # or "v1": Vicuna; "plain": stage 1
    prune: str = "none"                      # or a name in PRUNING

    def __post_init__(self):
        if self.image_mode == "anyres" and not self.grids:               # as released
            tiles, S = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), self.vision.image_size
            object.__setattr__(self, "grids", tuple((S * w, S * h) for w, h in tiles))


# ---------------------------------------------------------------------------------------------
# 2. The language model


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)   # rounded before the weight: in bf16 the order shows


def rope(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [..., D/2] of the angle by which each position turns each pair of dimensions."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() * (1.0 / config.rope_theta**powers)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) of x [B, heads, T, D], the pairing of Hugging Face's files.
    Mistral's own consolidated files pair (2i, 2i + 1) and would have to be permuted first."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)                # [B, heads, T, D]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Query i sees the keys j with 0 <= i - j < window; q [B, H, T, D], k and v [B, K, T, D].

    Rows are padded on the right, where causality hides the padding: no mask is needed. Beyond the
    window the rows are cut into blocks of W tokens, so the cost grows with T instead of T². Each
    block reads the one before and itself through a band; for W = 3:    . x x x . .
                                                                        . . x x x .
                                                                        . . . x x x
    """
    T = q.shape[2]
    if window is None or T <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    blocks = [causal_attention(q[:, :, :window], k[:, :, :window], v[:, :, :window], None)]
    band = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).triu(1).tril(window)
    for i in range(window, T, window):
        n, seen = min(window, T - i), slice(i - window, i + window)       # the last may be short
        blocks.append(F.scaled_dot_product_attention(
            q[:, :, i:i + n], k[:, :, seen], v[:, :, seen], band[:n, :window + n], enable_gqa=True))
    return torch.cat(blocks, dim=2)                                       # [B, H, T, D]


class KVCache:
    """One layer's keys and values in S slots; the token at position p lives in slot p mod S.

    Without a window every position has its slot. With one S = W: a new token takes the slot of
    the token that just left the window. Keys are stored rotated, so slots need no order.
    """

    def __init__(self, slots: int, lengths: Tensor):
        self.slots, self.lengths = slots, lengths

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Store k, v [B, K, T, D] of right-padded prompts of `lengths` [B] tokens."""
        last, slot = self.lengths[:, None] - 1, torch.arange(self.slots, device=k.device)
        newest = (last - (last - slot) % self.slots).clamp(min=0)         # [B, S] position in slot
        index = newest[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.k, self.v = k.gather(2, index), v.gather(2, index)           # [B, K, S, D]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Store the one new token per row, at `positions` [B]; its q [B, H, 1, D] sees the cache."""
        rows, slot = torch.arange(len(k), device=k.device), positions % self.slots
        self.k[rows, :, slot], self.v[rows, :, slot] = k[:, :, 0], v[:, :, 0]
        filled = torch.arange(self.slots, device=k.device) <= positions[:, None]         # [B, S]
        groups = q.view(len(q), k.shape[1], -1, q.shape[3])               # [B, K, H/K, D]
        y = F.scaled_dot_product_attention(groups, self.k, self.v, filled[:, None, None])
        return y.view_as(q)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, K <= H key/value heads."""

    def __init__(self, config: TextConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim, self.window = D, config.sliding_window
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: Tensor, cos_sin, cache: KVCache | None, positions: Tensor | None, select) -> Tensor:
        q = rotate(split_heads(self.q_proj(x), self.head_dim), *cos_sin)  # [B, H, T, D]
        k = rotate(split_heads(self.k_proj(x), self.head_dim), *cos_sin)  # [B, K, T, D]
        v = split_heads(self.v_proj(x), self.head_dim)
        if positions is not None:            # one new token per row; the others are in the cache
            y = cache.attend(q, k, v, positions)
        else:
            y = causal_attention(q, k, v, self.window)
            if cache is not None:
                cache.fill(k, v)
        return self.o_proj(y.transpose(1, 2).flatten(2)[select])          # [B, T, C], in the last block [n, C]


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.input_layernorm = RMSNorm(C, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(C, config.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(C, inner, bias=False),
                                  "up_proj": nn.Linear(C, inner, bias=False),
                                  "down_proj": nn.Linear(inner, C, bias=False)})

    def forward(self, x: Tensor, cos_sin, cache=None, positions=None, select=...) -> Tensor:
        x = x[select] + self.self_attn(self.input_layernorm(x), cos_sin, cache, positions, select)
        y = self.post_attention_layernorm(x)
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)     # [..., inner]
        return x + self.mlp["down_proj"](y)


class LanguageModel(nn.Module):
    """Mistral or LLaMA. It reads embeddings, because patches have no ids, and leaves lm_head to the
    caller, because few positions need logits."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, caches: list[KVCache] | None = None, positions=None, select=...) -> Tensor:
        """x [B, T, C] -> normed hidden states [B, T, C]: whole rows, kept in `caches` if given;
        or with positions [B] the next token of each row, x [B, 1, C]. If only some states are
        select, an index (rows [n], columns [n]), [n, C]: the last block drops the others early."""
        where = torch.arange(x.shape[1], device=x.device) if positions is None else positions[:, None, None]
        cos_sin = rope(where, self.config, x.dtype)
        for i, layer in enumerate(self.layers):
            last = layer is self.layers[-1]
            x = layer(x, cos_sin, caches[i] if caches else None, positions, select if last else ...)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------
# 3. The vision tower


def quick_gelu(x: Tensor) -> Tensor:
    """What CLIP was trained with; up to 0.02 away from GELU."""
    return x * torch.sigmoid(1.702 * x)


class VisionLayer(nn.Module):
    """A pre-norm block in which every patch sees every patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.head_dim = C // config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(C, config.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(C, C) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(C, config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, inner), "fc2": nn.Linear(inner, C)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (split_heads(self.self_attn[name](y), self.head_dim)    # [N, H, 1+P, D]
                   for name in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](y)                             # [N, 1+P, C]
        return x + self.mlp["fc2"](quick_gelu(self.mlp["fc1"](self.layer_norm2(x))))


class VisionTower(nn.Module):
    """CLIP's ViT. LLaVA reads what enters the last block; that block and post_layernorm are kept
    because they belong to every checkpoint, and because PruMerge asks the last block."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, p = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=p, stride=p, bias=False)
        self.position_embedding = nn.Embedding(1 + config.side**2, C)
        self.pre_layrnorm = nn.LayerNorm(C, config.layer_norm_eps)        # sic, in every checkpoint
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(C, config.layer_norm_eps)

    def forward(self, pixels: Tensor, feature_layer: int = -2) -> Tensor:
        """pixels [N, 3, image_size, image_size] -> states [N, 1+P, C], the CLS token first;
        feature_layer -1 means after the last block, -2 before it."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)       # [N, P, C], row by row
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        x = self.pre_layrnorm(x + self.position_embedding.weight)         # [N, 1+P, C]
        for layer in self.layers[:len(self.layers) + 1 + feature_layer]:
            x = layer(x)
        return x


# ---------------------------------------------------------------------------------------------
# Weights in 8 and 4 bits

GROUP, FITS = 32, 5                          # int4: columns that share a scale; rounds of least squares


def pack_int4(q: Tensor, half: int) -> Tensor:
    """uint8 [I, O] of 0...15 -> [O / 2h, I, h]: a byte holds one of h rows and one of the next h."""
    low, high = q.unflatten(1, (-1, 2, half)).unbind(2)                   # [I, O / 2h, h] each
    return (low | high << 4).transpose(0, 1).contiguous()


@cache
def kernel_half() -> int | None:
    """The h of pack_int4 that torch's CPU kernel reads: 32 (AVX-512) or 16 (AVX2). None: there is no
    such kernel. This layout is internal to torch, so it is compared with torch's own packer."""
    q = (torch.arange(4096) // 7 % 16).view(64, 64)
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)          # not in old torch
    for half in (32, 16):
        if pack and torch.equal(pack_int4(q.byte().T, half).flatten(), pack(q.int(), 1).flatten()):
            return half
    return None


def unpack_tinygemm(packed: Tensor) -> Tensor:
    """int32 [O / 8, I / 128, 32, 4] of torch's CUDA kernel -> uint8 [I, O] of 0...15, in the order of
    PyTorch's int4mm.cu. Compared with an emulation of that file, never run on a GPU."""
    x = packed.view(torch.uint8).unflatten(3, (4, 2, 2)).unflatten(2, (8, 4))
    x = torch.stack((x & 15, x >> 4), -1)    # [O / 8, I / 128, 8, 4, 4, 2, 2, 2]
    return x.permute(1, 4, 6, 7, 3, 5, 0, 2).flatten(6).flatten(0, 5)


def quantize_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [O, I] -> uint8 [I, O] of 0...15, bf16 scales and middles [I / GROUP, O, 2] of groups:
    first from the range, then FITS times by least squares from what was rounded with the last ones."""
    w = w.T.contiguous().unflatten(0, (-1, GROUP))                        # [I / GROUP, GROUP, O]
    low, high, mean_w = w.amin(1), w.amax(1), w.mean(1)                   # aminmax is 10 times slower
    scale, middle = (high - low) / 15, low + (high - low) * 8 / 15
    q, product = torch.empty_like(w), torch.empty_like(w)
    for fit in range(1 + FITS):
        if fit > 0:
            mean_q = q.mean(1)
            covariance = torch.mul(q, w, out=product).mean(1) - mean_q * mean_w
            scale = covariance / (torch.mul(q, q, out=product).mean(1) - mean_q**2).clamp(min=1e-9)
            middle = mean_w - scale * mean_q
        scale, middle = scale.clamp(min=1e-9).bfloat16().float(), middle.bfloat16().float()
        torch.sub(w, middle[:, None], out=q).div_(scale[:, None]).round_().clamp_(-8, 7)
    return q.add_(8).byte().flatten(0, 1), torch.stack((scale, middle), -1).bfloat16()


class QuantizedLinear(nn.Module):
    """A frozen linear layer. 8 bits: W = q * scale of the row; 4 bits (5 with scales): W = (q - 8) *
    scale + middle of GROUP columns. Its buffers are no parameters and not in the state_dict. Few tokens
    in bf16 go to torch's kernels; all other products use blocks of dequantised rows."""

    def __init__(self, weight: Tensor, bits: int, device="cpu", name: str = "a layer"):
        super().__init__()
        self.bits, (self.out_features, self.in_features), device = bits, weight.shape, torch.device(device)
        if bits == 4 and (self.in_features % GROUP or self.out_features % 64):
            raise UserError(f"{name} is {list(weight.shape)}, but 4 bits need a multiple of 64 rows and "
                            f"of {GROUP} columns: use --quantize int8")
        self.tinygemm = (bits == 4 and device.type == "cuda" and torch.version.hip is None
                         and self.in_features % 128 == 0
                         and torch.cuda.get_device_capability(device) >= (8, 0))         # never run on a GPU
        kernel = device.type == "cpu" and (bits == 8 or kernel_half() is not None)
        self.few = 0                        # tokens for the kernel; with more, blocks are faster
        if kernel or self.tinygemm:
            self.few = 128 if self.tinygemm else 32 if bits == 4 else 16
        self.rows = max(1, 2**15 // self.in_features) * 64                # of a block that fits in a cache
        q, scale = zip(*[self.quantize(rows.to(device).float()) for rows in weight.split(128)])
        self.register_buffer("q", torch.cat(q), persistent=False)
        self.register_buffer("scale", torch.cat(scale, dim=0 if bits == 8 else 1), persistent=False)

    def quantize(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.bits == 8:
            scale = (w.abs().amax(1) / 127).clamp(min=1e-9).bfloat16()
            return (w / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale
        q, scale = quantize_int4(w)
        if self.tinygemm:
            pairs = (q[::2] << 4 | q[1::2]).T.contiguous()
            return torch.ops.aten._convert_weight_to_int4pack(pairs, 8), scale
        return pack_int4(q, kernel_half() or 32), scale

    def block(self, start: int, dtype: torch.dtype) -> Tensor:
        """Rows start ... start + rows of W, as columns [I, n]."""
        if self.bits == 8:
            q, scale = (t[start:start + self.rows].to(dtype) for t in (self.q, self.scale))
            return (q * scale[:, None]).T
        height = self.out_features // len(self.q)                         # rows that lie together in q
        q = self.q[start // height:(start + self.rows) // height]
        q = unpack_tinygemm(q) if self.tinygemm else torch.cat((q & 15, q >> 4), 2).transpose(0, 1)
        q = q.to(dtype, memory_format=torch.contiguous_format).view(-1, GROUP, q.shape[1:].numel())
        scale, middle = self.scale[:, None, start:start + self.rows].to(dtype).unbind(3)
        scale, offset = scale.contiguous(), middle - 8 * scale            # [I / GROUP, 1, n]
        return torch.addcmul(offset, q, scale, out=q).flatten(0, 1)

    def multiply_block(self, x: Tensor, start: int) -> Tensor:
        return x @ self.block(start, x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        learning, count = x.requires_grad and torch.is_grad_enabled(), x.shape[:-1].numel()
        if x.dtype == torch.bfloat16 and 0 < count <= self.few and not learning:
            y = x.flatten(0, -2).contiguous()
            if self.bits == 8:
                y = torch.ops.aten._weight_int8pack_mm(y, self.q, self.scale)
            elif self.tinygemm:
                y = torch.ops.aten._weight_int4pack_mm(y, self.q, GROUP, self.scale)
            else:
                q = self.q.view(self.out_features, -1)
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(y, q, GROUP, self.scale)
            return y.unflatten(0, x.shape[:-1])
        # without AVX-512 products in bf16 are 8 times slower than in float32
        slow = x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        wide, starts = x.float() if slow else x, range(0, self.out_features, self.rows)
        if learning:                         # backward dequantises each block again
            parts = [checkpoint(self.multiply_block, wide, start, use_reentrant=False) for start in starts]
        else:
            parts = [self.multiply_block(wide, start) for start in starts]
        return torch.cat(parts, -1).to(x.dtype)


def count_weights(module: nn.Module) -> tuple[int, int]:
    """How many weights a module has, and the bytes that they take with their scales."""
    count, size = sum(p.numel() for p in module.parameters()), sum(p.nbytes for p in module.parameters())
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            count += layer.out_features * layer.in_features
            size += layer.q.nbytes + layer.scale.nbytes
    return count, size


QUANTIZED = r"language_model\.(layers\..*_proj|lm_head)\.weight"


def place_tensor(model, state: dict, name: str, tensor: Tensor, quantize: str, device, dtype) -> None:
    """Put a tensor that was read into `state`, or quantised into a layer of the model."""
    if quantize == "none" or not re.fullmatch(QUANTIZED, name):
        tied = any(tensor.data_ptr() == other.data_ptr() for other in state.values())
        state[name] = tensor.to(device, dtype, copy=tied or quantize != "none")          # a copy: unmapped
        return
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"{name}: {quantize} works in bfloat16 and float32, not {dtype}: change --dtype")
    bits = 4 if quantize == "int4" and "lm_head" not in name else 8
    model.set_submodule(name.removesuffix(".weight"), QuantizedLinear(tensor, bits, device, name))


# ---------------------------------------------------------------------------------------------
# 4. Pictures of any resolution (AnyRes) and fewer tokens (PruMerge)


def choose_grid(size: tuple[int, int], grids) -> tuple[int, int]:
    """The (width, height) of `grids` in which most of a (height, width) picture survives, then the
    one that wastes least. Ties go to the earlier: LLaVA lists (width, height), transformers reads
    the same list as (height, width), so they treat some small pictures differently."""
    def merit(grid):
        scale = min(grid[0] / size[1], grid[1] / size[0])
        survives = min(int(size[1] * scale) * int(size[0] * scale), size[1] * size[0])
        return survives, survives - grid[0] * grid[1]

    return max(grids, key=merit)


def anyres_window(config: LlavaConfig, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that a (height, width) picture covers in the patches of its grid; what is
    left is black border. LLaVA truncates where transformers rounds to 7 decimals first."""
    columns, rows = (side // config.vision.patch_size for side in choose_grid(size, config.grids))
    wide = size[1] / size[0] > columns / rows
    exact = size[0] * (columns / size[1]) if wide else size[1] * (rows / size[0])
    covered = int(round(exact, 7) if config.hf_preprocessing else exact)
    y, x = ((rows - covered) // 2, 0) if wide else (0, (columns - covered) // 2)
    return slice(y, rows - y), slice(x, columns - x)


def count_image_tokens(config: LlavaConfig, size: tuple[int, int]) -> int:
    """How many tokens take the place of a (height, width) picture; with pruning, at most."""
    patches = config.vision.side**2
    if config.image_mode != "anyres":
        return patches
    rows, columns = (window.stop - window.start for window in anyres_window(config, size))
    return patches + rows * (columns + 1)


PRUNING = {                                  # the choices of --prune, as arguments of prumerge
    "prumerge": {},
    "prumerge+": {"plus": True},
    "prumerge-fixed": {"ratio": 1 / 8},      # the released training setting: 73 tokens a tile
    "prumerge+-fixed": {"plus": True, "ratio": 1 / 8},                    # and 145
    "prumerge-paper": {"paper": True},
}


def choose_patches(attention: Tensor, plus: bool = False, ratio: float | None = None,
                   paper: bool = False) -> Tensor:
    """The patches [m] to keep, by attention [P] strongest first: its outliers, or the share `ratio`;
    with `plus` then an even sample of the others. The paper keeps them in the picture's order."""
    P = len(attention)
    q1, q3 = attention.float().quantile(torch.tensor([0.25, 0.75], device=attention.device))
    count = int((attention > q3 + 1.5 * (q3 - q1)).sum()) if ratio is None else int(P * ratio)
    count = max(1, count)                    # without an outlier the released code crashes
    kept = attention.argsort(descending=True, stable=True)[:count]
    if plus and ratio is None:
        even = torch.arange(0, P - 1, max(1, P // count // 3), device=kept.device)
        kept = torch.cat((kept, even[~torch.isin(even, kept)]))
    elif plus:                               # as released: some are there twice
        even = torch.arange(P // count // 2, P - 1, P // count, device=kept.device)
        kept = torch.cat((kept, even))
    return kept.sort().values if paper else kept


def prumerge(attention: Tensor, keys: Tensor, plus: bool = False, ratio: float | None = None,
             paper: bool = False, neighbours: int = 32, in_order: bool = False,
             normalized: bool = False) -> Tensor:
    """PruMerge as a matrix [m + 1, P]: times a tile's features [P, C] it gives its tokens.

    attention [P]: what the CLS token pays to each patch; keys [P, C]. To each chosen patch is added
    the attention-weighted sum of its `neighbours` most similar patches, and one last token sums up
    all that were not chosen. So the released code; as the `paper` prints it, patches stay in order,
    keys are not normalised, a chosen patch weighs like its neighbours, and no token is added.
    """
    kept = choose_patches(attention, plus, ratio, paper)
    kept = kept.sort().values if in_order else kept
    own = torch.ones_like(attention)
    if paper:
        own = attention = attention / attention.sum()                     # CLS left out of the softmax
    directions = keys if paper else F.normalize(keys, dim=-1)
    similarity = (directions[kept] @ directions.T).scatter(1, kept[:, None], -torch.inf)
    near = similarity.topk(min(neighbours, len(keys) - 1)).indices        # [m, 32]
    mix = torch.zeros_like(similarity).scatter(1, near, attention[near])
    mix = mix.scatter(1, kept[:, None], own[kept, None])                  # [m, P]
    if not paper:
        mix = torch.cat((mix, attention.index_fill(0, kept, 0)[None]))
    return mix / mix.sum(1, keepdim=True) if normalized else mix


# ---------------------------------------------------------------------------------------------
# 5. LLaVA


class Llava(nn.Module):
    """CLIP's patches, projected into the language model's space and read as if they were words."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config, C = config, config.text.hidden_size
        self.vision_tower = VisionTower(config.vision)
        second = [nn.GELU(), nn.Linear(C, C)] if config.projector == "mlp2x_gelu" else []
        self.projector = nn.Sequential(nn.Linear(config.vision.hidden_size, C), *second)
        if config.image_mode == "anyres":
            self.image_newline = nn.Parameter(torch.randn(C) / C**0.5)
        self.language_model = LanguageModel(config.text)
        self.bases: list[str] = []           # folders or id@revision that the weights came from

    def encode_images(self, images: list[Tensor], image_sizes=None, prune: str | None = None):
        """One [n, C] per picture: the features that take the place of its id among the words.

        images: for each picture its tiles [tiles, 3, S, S], normalised, or in uint8 to be
        normalised here; image_sizes: the (height, width) it had; prune: None is the config's.
        """
        prune, like = prune or self.config.prune, self.vision_tower.class_embedding
        pixels = torch.cat(list(images)).to(like.device, non_blocking=True)              # [N, 3, S, S]
        pixels = normalize(pixels) if pixels.dtype == torch.uint8 else pixels
        states = self.vision_tower(pixels.to(like.dtype), self.config.vision_feature_layer)
        if prune == "none":
            tiles = iter(self.projector(states[:, 1:]))                   # N x [P, C], without CLS
        else:
            tiles = (self.projector(prumerge(*seen, **PRUNING[prune]) @ x)
                     for *seen, x in zip(*self.cls_attention(states), states[:, 1:]))
        pictures = [[next(tiles) for _ in image] for image in images]
        if self.config.image_mode == "anyres" and prune == "none":
            return [self.arrange_tiles(torch.stack(p), size) for p, size in zip(pictures, image_sizes)]
        return [torch.cat(picture) for picture in pictures]

    def cls_attention(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the CLS token pays to each patch [N, P] and the patches' keys [N, P, C] in the last
        block, whose q and k are taken as one head of width C, as in PruMerge's released code."""
        block = self.vision_tower.layers[-1]
        x = block.layer_norm1(states)                                     # as they enter that block
        q, k = block.self_attn["q_proj"](x[:, :1]), block.self_attn["k_proj"](x)
        attention = (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1)          # [N, 1, 1+P]
        return attention[:, 0, 1:], k[:, 1:]

    def arrange_tiles(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """AnyRes: tiles [1 + rows * columns, P, C] -> the squashed whole of the first one, then the
        others as one map, row by row, without black border, a newline after each row."""
        side, columns = self.config.vision.side, choose_grid(size, self.config.grids)[0]
        x = tiles[1:].unflatten(0, (-1, columns // self.config.vision.image_size))
        x = x.unflatten(2, (side, side)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        x = x[anyres_window(self.config, size)]                           # [rows, columns, C]
        x = torch.cat((x, self.image_newline.expand(len(x), 1, -1)), dim=1)
        return torch.cat((tiles[0], x.flatten(0, 1)))

    def splice(self, input_ids, images=None, image_sizes=None, attention_mask=None, labels=None):
        """Ids [B, T] -> embeddings [B, T', C] with the pictures' features in place of their ids;
        also the rows' lengths [B], and the labels [B, T'] with nothing to learn at pictures."""
        embed = self.language_model.embed_tokens
        input_ids, labels, attention_mask = (x if x is None else x.to(embed.weight.device)
                                             for x in (input_ids, labels, attention_mask))
        is_image = input_ids == self.config.image_token_id
        features = self.encode_images(images, image_sizes) if images else []
        if (marks := int(is_image.sum())) != len(features):
            raise UserError(f"{marks} <image> in the text, but {len(features)} pictures")
        counts = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        counts[is_image] = counts.new_tensor([len(f) for f in features])
        lengths = counts.sum(1)
        real = torch.arange(int(lengths.max()), device=counts.device) < lengths[:, None]  # [B, T']

        def stretch(values: Tensor, padding: int) -> Tensor:              # [B, T] -> [B, T']
            repeated = values.flatten().repeat_interleave(counts.flatten())
            return values.new_full(real.shape, padding).masked_scatter(real, repeated)

        slots = stretch(is_image, False)
        x = embed(stretch(input_ids.masked_fill(is_image, 0), 0))
        if features:
            x = x.masked_scatter(slots[..., None], torch.cat(features).to(x.dtype))
        if labels is not None:
            labels = stretch(labels, IGNORE).masked_fill(slots, IGNORE)
        return x, lengths, labels

    def forward(self, input_ids, images=None, image_sizes=None, attention_mask=None, labels=None):
        """Logits [B, T', V] over the spliced, right-padded rows; with labels their mean loss.

        input_ids [B, T] holds one image_token_id per picture, read row after row; attention_mask
        [B, T] is False on padding, which is on the right; labels [B, T] are shifted here. Only
        positions whose next token is learned get logits: they are few, and each costs V numbers.
        """
        x, _, labels = self.splice(input_ids, images, image_sizes, attention_mask, labels)
        if labels is None:
            return self.language_model.lm_head(self.language_model(x))
        rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        logits = self.language_model.lm_head(self.language_model(x, select=(rows, columns)))
        return F.cross_entropy(logits.float(), labels[rows, columns + 1])

    @torch.inference_mode()
    def generate_tokens(self, input_ids, images=None, image_sizes=None, attention_mask=None,
               max_new_tokens=256, temperature=0.0, top_p=1.0) -> Iterator[Tensor]:
        """The next token [B] of every row, max_new_tokens times. The rows, right-padded, may have
        any lengths and pictures: each goes on from its own position. Temperature 0 takes the
        likeliest token, others draw from the likeliest that together have probability top_p."""
        x, lengths, _ = self.splice(input_ids, images, image_sizes, attention_mask)
        window = self.config.text.sliding_window or sys.maxsize
        slots = min(int(lengths.max()) + max_new_tokens, window)
        caches = [KVCache(slots, lengths) for _ in self.language_model.layers]
        last = torch.arange(len(x), device=x.device), lengths - 1
        hidden = self.language_model(x, caches, select=last)              # [B, C]
        for i in range(max_new_tokens):
            token = sample(self.language_model.lm_head(hidden), temperature, top_p)
            yield token
            if i + 1 < max_new_tokens:
                x = self.language_model.embed_tokens(token)[:, None]                     # [B, 1, C]
                hidden = self.language_model(x, caches, positions=lengths + i)[:, 0]

    def generate(self, input_ids, images=None, image_sizes=None, eos_token_id: int | None = 2,
                 **decoding) -> Iterator[int]:
        """The answer to one row, token by token, up to eos_token_id (not yielded; None: no end)."""
        for token in self.generate_tokens(input_ids, images, image_sizes, **decoding):
            if token.item() == eos_token_id:
                return
            yield token.item()

    def generate_batch(self, input_ids, images=None, image_sizes=None, attention_mask=None,
                       eos_token_id: int | None = 2, **decoding) -> list[list[int]]:
        """What `generate` yields for each row, all rows at once."""
        rows, ended = [[] for _ in input_ids], [False] * len(input_ids)
        for tokens in self.generate_tokens(input_ids, images, image_sizes, attention_mask, **decoding):
            ended = [end or token == eos_token_id for end, token in zip(ended, tokens.tolist())]
            for row, end, token in zip(rows, ended, tokens.tolist()):
                row += [] if end else [token]
            if all(ended):
                break
        return rows

    @classmethod
    def from_pretrained(cls, path_or_repo_id=None, *, vision=None, language=None,
                        dtype=torch.bfloat16, device="cpu", quantize="none", **overrides) -> Llava:
        """Open a LLaVA of any publisher or a run folder; or a CLIP and a language model, between
        which the projector starts afresh. Each is a folder, a hub id or id@revision.

        quantize: "int8" or "int4" stores the language model's linear layers in 8 or 4 bits (lm_head
        in 8). `overrides` replace fields of LlavaConfig. Weights are mapped from disk and, where their
        type differs, cast one at a time: there is never a second copy in memory.
        """
        if quantize not in ("none", "int8", "int4"):
            raise UserError(f"quantize is {quantize!r}; it must be none, int8 or int4")
        if (path_or_repo_id is None) == (vision is None or language is None):
            raise UserError("name one LLaVA, or a vision tower and a language model")
        parts, stored, bases = {}, {}, []
        for source in [path_or_repo_id] if path_or_repo_id else [vision, language]:
            more, tensors, name = open_checkpoint(str(source))
            parts, stored, bases = parts | more, stored | tensors, [*bases, name]
        if missing := {"vision", "text"} - parts.keys():
            raise UserError(f"{bases[0]} holds no {' or '.join(missing)} model: name both halves")
        config, state = LlavaConfig(**parts | overrides), {}
        with torch.device("meta"):
            model = cls(config)
        if vision:                           # a LLaVA without layers lends its untrained projector
            empty = cls(replace(config, vision=replace(config.vision, num_hidden_layers=0),
                                text=replace(config.text, num_hidden_layers=0, vocab_size=1)))
            state = {n: t for n, t in empty.state_dict().items() if n.startswith(("projector", "image"))}
        check_tensors(model.state_dict(), state, stored, " and ".join(bases))
        state, opened = {name: tensor.to(device, dtype) for name, tensor in state.items()}, {}
        for name, tensor in tqdm(stored.items(), f"quantising to {quantize}", disable=quantize == "none"):
            on_disk = tensor.read(opened)
            place_tensor(model, state, name, on_disk, quantize, device, dtype)
            if state.get(name) is not on_disk:                            # a copy: unmap the file
                opened.clear()
        model.load_state_dict(state, assign=True)
        model.bases = bases
        return model

    def save_pretrained(self, folder, trained_only: bool = False) -> None:
        """Write llava-hf's layout (llava, or with AnyRes llava_next), which transformers opens.

        trained_only: just the weights that require a gradient, and in config.json the bases that
        hold the others: a run folder, which from_pretrained opens like any checkpoint.
        """
        if not trained_only and any(isinstance(module, QuantizedLinear) for module in self.modules()):
            raise UserError("weights in 8 or 4 bits are not saved: open the model without quantize first")
        folder, config = Path(folder), hub_config(self.config, whole=not trained_only)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "model.safetensors") as file:
            save_file(hub_tensors(self, config["text_config"]["vocab_size"], whole=not trained_only), file,
                      metadata={"format": "pt"})
        write_json(folder / "config.json", config | ({"bases": self.bases} if trained_only else {}))


# ---------------------------------------------------------------------------------------------
# 6. Published weights

# What a published name begins with, as a pattern, and what that becomes here; the first that fits
# counts. None: nothing that LLaVA needs.
FROM_PUBLISHED = (
    (r"(text_model|text_projection|visual_projection|logit_scale)\b", None),  # CLIP's other half
    (r".*\b(inv_freq|position_ids)$", None),                                  # buffers of old files
    (r"(model\.)?((vision_tower|vision_model)\.)+((embeddings|encoder)\.)?", "vision_tower."),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "projector.0."),        # llava-hf
    (r"(model\.)?multi_modal_projector\.linear_2\.", "projector.2."),
    (r"(model\.)?mm_projector\.(?=\d)", "projector."),                       # liuhaotian, MLP
    (r"(model\.)?mm_projector\.", "projector.0."),                           # liuhaotian, linear
    (r"(model\.)?image_newline", "image_newline"),
    (r"lm_head\.", "language_model.lm_head."),
    (r"(language_model\.model|model\.language_model|model)\.", "language_model."),
)
TO_HF = (                                    # and from here to llava-hf
    (r"vision_tower\.(?=layers)", "vision_tower.vision_model.encoder."),
    (r"vision_tower\.(?=\w+_embedding)", "vision_tower.vision_model.embeddings."),
    (r"vision_tower\.", "vision_tower.vision_model."),
    (r"projector\.0\.", "multi_modal_projector.linear_1."),
    (r"projector\.2\.", "multi_modal_projector.linear_2."),
    (r"language_model\.(?!lm_head)", "language_model.model."),
)
OURS = ("projector", "image_mode", "grids", "hf_preprocessing", "template", "prune")   # unknown to the hub
TEMPLATES = {"mistral": "mistral_instruct", "llama": "v1"}
# What transformers takes for granted where a config.json is silent. Beware: not the released models'
# values; and an absent sliding_window is 4096, while a null one is none.
HF_DEFAULTS = {
    "mistral": TextConfig(rms_norm_eps=1e-6, rope_theta=1e4, sliding_window=4096,
                          max_position_embeddings=131072),
    "llama": TextConfig("llama", intermediate_size=11008, num_key_value_heads=32, rms_norm_eps=1e-6,
                        rope_theta=1e4, max_position_embeddings=2048),
    "clip": VisionConfig(768, 3072, 12, 12, 224, 32),
}


def rename_key(name: str, table) -> str | None:
    for pattern, start in table:
        if match := re.match(pattern, name):
            return start and start + name[match.end():]
    return name


def fetch(source: str, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or what is needed of a hub id's files, from the hub
    or its cache (HF_HUB_OFFLINE=1: only from there)."""
    if Path(source).is_dir():
        return Path(source)
    repo, _, revision = source.partition("@")
    wanted = ["*.json"] + ["model*.safetensors", "adapter_model.*", "mm_projector.bin",
                           "non_lora_trainables.bin"] * weights
    try:
        for patterns in (wanted, ["pytorch_model*.bin"]):
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns,
                                            ignore_patterns="*/*"))
            if not weights or list(folder.glob("model*.safetensors")):
                break
        return folder
    except (OSError, ValueError) as error:
        raise OSError(f"{source} is no folder here and the hub does not give it: "
                      f"{first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(file: Path):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{file} is missing") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON, or not all of it: {error}") from None


def read_object(file: Path, *needed: str) -> dict:
    """A JSON object with the keys `needed`."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    if missing := [key for key in needed if key not in content]:
        raise UserError(f"{file} lacks {', '.join(missing)}")
    return content


def write_json(file: Path, content) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(file)) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A temporary name to write to, which takes the file's place only when all went well."""
    temporary = file.with_name(f".{file.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


class TensorRef(NamedTuple):
    """Where a tensor lies on disk, and what LoRA adds to it: scale * B [out, r] @ A [r, in]."""
    file: Path
    key: str
    shape: torch.Size
    lora: tuple[TensorRef, TensorRef, float] | None = None

    def read(self, opened: dict[Path, dict[str, Tensor]]) -> Tensor:
        """The tensor, mapped into memory; `opened` keeps the files that are."""
        if self.file not in opened:
            opened[self.file] = open_file(self.file)
        tensor = opened[self.file][self.key]
        if self.lora is None:
            return tensor
        a, b, scale = self.lora
        return tensor.float() + scale * (b.read(opened).float() @ a.read(opened).float())


def open_file(file: Path) -> dict[str, Tensor]:
    """A file's tensors, mapped into memory but not read. A pickle may hold tensors, never code."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in tensors.keys()}
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise OSError(f"{file} is missing") from None
    except UnpicklingError:
        raise OSError(f"{file} holds more than tensors, perhaps a program: it is not opened") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        raise OSError(f"{file} is damaged, or no file of tensors: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file} holds other things than tensors by name")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: small parts, and the model whole or in the shards of its index."""
    names = [name for name in ("adapter_model.safetensors", "adapter_model.bin", "mm_projector.bin",
                               "non_lora_trainables.bin") if (folder / name).exists()]
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (index := folder / f"{whole}.index.json").exists():
            shards = set(read_object(index, "weight_map")["weight_map"].values())
            return [folder / n for n in (*names, *sorted(shards))]
        if (folder / whole).exists():
            return [folder / n for n in (*names, whole)]
    return [folder / n for n in names]


def open_checkpoint(source: str, weights: bool = True) -> tuple[dict, dict[str, TensorRef], str]:
    """What a folder or hub id holds: fields of LlavaConfig, tensors by our names, its exact name.

    One that holds only a part (a projector, LoRA, a LLaVA without its tower) names its bases in its
    configs: they are opened first, and it is laid over them.
    """
    folder = fetch(source, weights)
    name = str(folder.resolve()) if Path(source).is_dir() else f"{source.partition('@')[0]}@{folder.name}"
    raw, adapter, own = read_object(folder / "config.json"), {}, {}
    if list(folder.glob("adapter_*")):
        adapter = read_object(folder / "adapter_config.json", "r", "lora_alpha", "base_model_name_or_path")
        require(adapter, folder / "adapter_config.json", use_rslora=(False,), use_dora=(False,))
    for file in weight_files(folder) if weights else []:
        for key, tensor in open_file(file).items():
            ours = rename_key(key.removeprefix("base_model.model."), FROM_PUBLISHED)
            own[ours] = TensorRef(file, key, tensor.shape)
    own.pop(None, None)
    bases = dict.fromkeys(raw.get("bases", []), weights)
    if "mm_vision_tower" in raw:             # liuhaotian: 1.6 brings its tower along, 1.5 does not
        stems = {".".join(n.split(".")[:2]) for n in own if "lora_" not in n}
        bases[raw["mm_vision_tower"]] = weights and "vision_tower.layers" not in stems
        if weights and "language_model.layers" not in stems:
            language = adapter.get("base_model_name_or_path") or raw.get("_name_or_path")
            if language is None:
                raise UserError(f"{folder} has no language model, its config.json no _name_or_path of one")
            bases[language] = True
    parts, stored = {}, {}
    for base, needed in bases.items():
        more, tensors, _ = open_checkpoint(base, needed)
        parts, stored = parts | more, stored | tensors
    parts |= read_config(raw, folder / "config.json")
    for key, tensor in own.items():
        if key.endswith("lora_A.weight"):
            target, b = key.replace("lora_A.", ""), own.get(key.replace("lora_A", "lora_B"))
            if b is None or target not in stored or (b.shape[0], tensor.shape[1]) != stored[target].shape:
                raise UserError(f"{tensor.file}: no lora_B, or no weight of the base, fits {tensor.key}")
            scale = adapter["lora_alpha"] / adapter["r"]
            stored[target] = stored[target]._replace(lora=(tensor, b, scale))
        elif not key.endswith("lora_B.weight"):
            stored[key] = tensor
    tied = raw.get("text_config", raw).get("tie_word_embeddings", False)  # transformers' default
    if tied and "language_model.embed_tokens.weight" in stored:
        stored.setdefault("language_model.lm_head.weight", stored["language_model.embed_tokens.weight"])
    if parts.get("projector") == "linear":   # llava-hf has a second layer, which then does nothing
        stored = {n: t for n, t in stored.items() if not n.startswith("projector.2.")}
    return parts, stored, name


def check_tensors(expected, fresh, stored: dict[str, TensorRef], where: str) -> None:
    """Every tensor is there, none is left over, all have the right shape; or one error lists them."""
    wrong = [f"{n} is missing" for n in expected if n not in stored and n not in fresh]
    wrong += [f"{n} is not part of the model" for n in stored if n not in expected]
    wrong += [f"{n} is {list(t.shape)} instead of {list(expected[n].shape)}"
              for n, t in stored.items() if n in expected and t.shape != expected[n].shape]
    if wrong:
        raise UserError(f"{where} does not hold the model its config describes: {'; '.join(wrong)}")


def read_config(raw: dict, file: Path) -> dict:
    """The fields of LlavaConfig that a publisher's config.json tells."""
    kind = raw.get("model_type", "")
    if "text_config" in raw and kind in ("llava", "llava_next"):         # llava-hf
        require(raw, file, vision_feature_select_strategy=("default",), vision_feature_layer=(-2, -1),
               projector_hidden_act=("gelu", "linear") if "llava.py" in raw else ("gelu",))
        kind_of_text = raw["text_config"].get("model_type", "llama")
        text = parse_config(kind_of_text, raw["text_config"], file, nested=True)
        if "vision_config" not in raw:
            raise UserError(f"{file} lacks vision_config")
        found = {"vision": parse_config("clip", raw["vision_config"], file, nested=True),
                 "image_token_id": raw.get("image_token_index", raw.get("image_token_id", 32000)),
                 "vision_feature_layer": raw.get("vision_feature_layer", -2),
                 "image_mode": "anyres" if kind == "llava_next" else "crop", "hf_preprocessing": True,
                 "grids": [(w, h) for h, w in raw.get("image_grid_pinpoints") or ()]}
    elif "mm_vision_tower" in raw:                                       # liuhaotian
        mode = raw.get("image_aspect_ratio", "square")
        require(raw, file, mm_vision_select_feature=("patch",), mm_use_im_start_end=(False,),
               mm_vision_select_layer=(-2, -1), mm_projector_type=("linear", "mlp2x_gelu"),
               image_aspect_ratio=("square", "pad", "anyres"),
               mm_patch_merge_type=("spatial_unpad",) if mode == "anyres" else ("flat",))
        text = parse_config("mistral" if "mistral" in kind else "llama", raw, file, nested=False)
        found = {"image_token_id": text.vocab_size,
                 "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
                 "projector": raw.get("mm_projector_type", "linear"),
                 "image_mode": "crop" if mode == "square" else mode,
                 "grids": json.loads(str(raw.get("image_grid_pinpoints") or []))}
    elif kind in TEMPLATES:
        text = parse_config(kind, raw, file, nested=False)
        found = {"image_token_id": text.vocab_size}
    elif kind in ("clip", "clip_vision_model"):
        return {"vision": parse_config("clip", raw.get("vision_config", raw), file, nested=kind == "clip")}
    else:
        raise UserError(f"{file}: model_type {kind!r} is none of llava, llava_next, mistral, llama and clip")
    found |= {"text": text, "template": TEMPLATES[text.model_type]} | raw.get("llava.py", {})
    return found | {"grids": tuple(map(tuple, found.get("grids", ())))}


def require(raw: dict, file: Path, **supported) -> None:
    for key, values in supported.items():
        if raw.get(key, values[0]) not in values:
            wanted = " or ".join(map(repr, values))
            raise UserError(f"{file}: {key} is {raw[key]!r}; only {wanted} works here")


def parse_config(kind: str, raw: dict, file: Path, nested: bool) -> TextConfig | VisionConfig:
    """The dataclass of a config; only a nested one may leave out sizes, as transformers does."""
    if kind not in HF_DEFAULTS:
        raise UserError(f"{file}: a language model of type {kind!r} is neither mistral nor llama")
    turns = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(raw | turns, file, rope_type=("default",), type=("default",),
           hidden_act=("quick_gelu",) if kind == "clip" else ("silu",))
    usual, found = HF_DEFAULTS[kind], {k: v for k, v in (raw | turns).items() if v is not None or "window" in k}
    if not nested:
        needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in needed if name not in found]:
            raise UserError(f"{file} lacks {', '.join(missing)}")
    if kind == "llama" and "num_attention_heads" in found:
        found = {"num_key_value_heads": found["num_attention_heads"]} | found
    if kind != "clip":
        heads = found.get("num_attention_heads", usual.num_attention_heads)
        found = {"head_dim": found.get("hidden_size", usual.hidden_size) // heads} | found
    return replace(usual, **{f.name: found[f.name] for f in fields(usual)
                              if f.name in found and f.name != "model_type"})


def hub_config(config: LlavaConfig, whole: bool) -> dict:
    """config.json as llava-hf writes it, for transformers 4 and 5, and what only this file knows."""
    anyres, rows = config.image_mode == "anyres", config.text.vocab_size
    if whole and config.image_token_id >= rows:              # <image> and <pad> get rows there
        rows = math.ceil((config.image_token_id + 2) / 64) * 64
    turns = {"rope_type": "default", "rope_theta": config.text.rope_theta}
    return {
        "architectures": [f"Llava{'Next' * anyres}ForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "image_token_index": config.image_token_id, "image_seq_length": config.vision.side**2,
        "image_grid_pinpoints": [(h, w) for w, h in config.grids],
        "projector_hidden_act": "linear" if config.projector == "linear" else "gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
        "text_config": {**asdict(config.text), "vocab_size": rows, "rope_parameters": turns,
                        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2},
        "vision_config": {**asdict(config.vision), "model_type": "clip_vision_model",
                          "hidden_act": "quick_gelu", "projection_dim": 768},
        "llava.py": {name: getattr(config, name) for name in OURS}}


def hub_tensors(model: Llava, rows: int, whole: bool) -> dict[str, Tensor]:
    tensors = {rename_key(name, TO_HF): p.detach().cpu().contiguous()
               for name, p in model.named_parameters() if whole or p.requires_grad}
    if whole and model.config.projector == "linear":         # llava-hf always has two layers
        one = tensors["multi_modal_projector.linear_1.bias"]
        tensors["multi_modal_projector.linear_2.weight"] = torch.eye(len(one), dtype=one.dtype)
        tensors["multi_modal_projector.linear_2.bias"] = torch.zeros_like(one)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight") * whole:
        words = tensors[name]                # new words get the mean row: never the likeliest
        mean = words.float().mean(0).to(words.dtype)
        tensors[name] = torch.cat((words, mean.expand(rows - len(words), -1)))
    return tensors


# ---------------------------------------------------------------------------------------------
# 7. Words and pictures to tensors

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(file: Path) -> Image.Image:
    """The first frame, as it is: how its mode becomes RGB depends on the publisher (to_rgb)."""
    try:
        with Image.open(file) as image:
            return image.copy()
    except FileNotFoundError:
        raise OSError(f"there is no picture {file}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"{file} is not a readable picture: {first_line(error)}") from None


def to_rgb(image: Image.Image, config: LlavaConfig) -> Image.Image:
    """transformers sees a transparent picture over white, LLaVA's code its colours alone."""
    if config.hf_preprocessing and ("A" in image.getbands() or "transparency" in image.info):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def cut_tiles(image: Image.Image, config: LlavaConfig) -> list[Image.Image]:
    """An RGB picture as squares of image_size; resized in 8 bits, bicubic, as CLIP was trained."""
    S, (w, h) = config.vision.image_size, image.size
    if config.image_mode == "pad":           # the mean colour around, truncated as LLaVA does
        canvas = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * mean) for mean in CLIP_MEAN))
        canvas.paste(image, ((canvas.width - w) // 2, (canvas.height - h) // 2))
        return [canvas.resize((S, S), Image.BICUBIC)]
    if config.image_mode == "crop":          # the middle
        w, h = (S, int(S * h / w)) if w <= h else (int(S * w / h), S)
        left, top = (w - S) // 2, (h - S) // 2
        return [image.resize((w, h), Image.BICUBIC).crop((left, top, left + S, top + S))]
    W, H = choose_grid((h, w), config.grids)
    inner = (W, min(math.ceil(h * (W / w)), H)) if W / w < H / h else (min(math.ceil(w * (H / h)), W), H)
    canvas = Image.new("RGB", (W, H))        # black around
    canvas.paste(image.resize(inner, Image.BICUBIC), ((W - inner[0]) // 2, (H - inner[1]) // 2))
    corners = [(x, y) for y in range(0, H, S) for x in range(0, W, S)]
    return [image.resize((S, S), Image.BICUBIC), *(canvas.crop((x, y, x + S, y + S)) for x, y in corners)]


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] -> float32 with the mean and spread that CLIP expects."""
    mean, std = (torch.tensor(c, device=pixels.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std       # times 1 / 255 would round half of the values away


def render(messages: list[dict], template: str) -> list[tuple[str, bool]]:
    """A conversation as pieces of text and whether the model is to learn them; "<image>" and "</s>"
    are pieces of their own. A lone <image> moves to the front of its message, as in LLaVA."""
    pieces = []
    for i, message in enumerate(messages):
        text, answers = message["content"], i % 2 == 1
        if message["role"] != ("assistant" if answers else "user"):
            raise UserError(f"message {i + 1} is the {message['role']}'s: user and assistant must alternate")
        if not answers and text.count("<image>") == 1:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        if template == "plain":              # stage 1: the picture and its caption, no question
            pieces += [(text + "\n", True)] if answers else [("<image>", False)] * text.count("<image>")
        elif answers:
            pieces += [(text + " " * (template == "mistral_instruct"), True), ("</s>", True)]
        else:
            start, end = ("[INST]", "[/INST]") if template == "mistral_instruct" else ("USER:", "ASSISTANT:")
            start = f"{SYSTEM} {start}" if template == "v1" and i == 0 else start
            text = f"{start} {text} {end}"
            pieces += [(piece, False) for piece in re.split("(<image>)", text)]
    return pieces


class Processor:
    """Conversations and pictures to tensors, ids back to words."""

    def __init__(self, tokenizer_json: str, config: LlavaConfig, legacy: bool = True):
        self.config, self.tokenizer_json, self.legacy = config, tokenizer_json, legacy
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.bos, self.eos = map(self.tokenizer.token_to_id, ("<s>", "</s>"))
        if None in (self.bos, self.eos):
            raise UserError("the tokenizer has no <s> or no </s>: it is not one of LLaMA or Mistral")
        self.tokenizer.normalizer = normalizers.Replace(" ", "\u2581")   # encode sets the first one
        self.tokenizer.pre_tokenizer = None

    @classmethod
    def from_pretrained(cls, path_or_repo_id, config: LlavaConfig | None = None) -> Processor:
        """The tokenizer of a folder or hub id; `config` is that of the model it is to serve."""
        folder = fetch(str(path_or_repo_id), weights=False)
        config = config or LlavaConfig(**open_checkpoint(str(path_or_repo_id), weights=False)[0])
        if not (folder / "tokenizer.json").exists():
            raise OSError(f"{path_or_repo_id} has no tokenizer.json: name a repository that has, such as "
                          "--tokenizer llava-hf/llava-1.5-7b-hf or mistralai/Mistral-7B-Instruct-v0.2")
        more = folder / "tokenizer_config.json"
        legacy = read_json(more).get("legacy") is not False if more.exists() else True
        try:
            return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), config, legacy)
        except Exception as error:           # tokenizers raises nothing more exact
            raise UserError(f"{folder / 'tokenizer.json'} does not work: {first_line(error)}") from None

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of a piece of text; SentencePiece puts a space before the first word of a text."""
        text = "\u2581" + text if first and text else text
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def pixels(self, image: Image.Image) -> Tensor:
        """uint8 [tiles, 3, image_size, image_size], to be normalised where the model is."""
        tiles = np.stack([np.asarray(tile) for tile in cut_tiles(to_rgb(image, self.config), self.config)])
        return torch.from_numpy(tiles).permute(0, 3, 1, 2)

    def tokenize(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Ids, and labels: the same ids where the assistant speaks or ends, elsewhere IGNORE."""
        ids, labels, ended = [self.bos], [IGNORE], False
        for text, learned in render(messages, self.config.template):
            if text == "<image>":
                piece = [self.config.image_token_id]
            elif text == "</s>":
                piece = [self.eos]
            else:                            # a text of its own; after </s> only to legacy tokenizers
                piece = self.encode(text, first=self.legacy or not ended)
            ended = text == "</s>"
            ids, labels = ids + piece, labels + (piece if learned else [IGNORE] * len(piece))
        return ids, labels

    def __call__(self, messages: list[dict], images=(), labels: bool = False) -> dict:
        """messages [{"role": "user" | "assistant", "content": "<image>\\nWhat is it?"}, ...] and PIL
        images in reading order -> input_ids [1, T], images, image_sizes and, if asked for, labels
        [1, T], all as Llava takes them."""
        ids, learned = self.tokenize(messages)
        if (marks := ids.count(self.config.image_token_id)) != len(images):
            raise UserError(f"{marks} <image> in the text, but {len(images)} pictures")
        inputs = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([learned]),
                  "images": [normalize(self.pixels(image)) for image in images],
                  "image_sizes": [(image.height, image.width) for image in images]}
        return inputs if labels else {k: v for k, v in inputs.items() if k != "labels"}

    def save_pretrained(self, folder) -> None:
        """The tokenizer, with <image> and <pad>, and what transformers' processors ask for."""
        S, crop = self.config.vision.image_size, self.config.image_mode == "crop"
        kind = "LlavaNext" if self.config.image_mode == "anyres" else "Llava"
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.add_special_tokens(["<image>", "<pad>"])
        files = {
            "tokenizer.json": json.loads(tokenizer.to_str()),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast", "legacy": self.legacy, "bos_token": "<s>",
                "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
            "preprocessor_config.json": {
                "image_processor_type": f"{kind}ImageProcessor", "size": {"shortest_edge": S},
                "crop_size": {"height": S, "width": S}, "do_pad": not crop, "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD, "image_grid_pinpoints": [(h, w) for w, h in self.config.grids]},
            "processor_config.json": {
                "processor_class": f"{kind}Processor", "patch_size": self.config.vision.patch_size,
                "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_json(Path(folder) / name, content)


def sample(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token [B] from logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0         # the likeliest tokens that together have top_p
    return order.gather(-1, torch.multinomial(p, 1))[:, 0]


# ---------------------------------------------------------------------------------------------
# 8. The command line


def command_line(main) -> None:
    """Run a program; a mistake of its user ends in one sentence and exit code 1."""
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that opens a model."""
    gpu = torch.cuda.is_available()
    parser.add_argument("--tokenizer", metavar="ID",
                        help="folder or hub id with the tokenizer.json, if the model has none")
    parser.add_argument("--image-mode", choices=("pad", "crop"), help="default: the model's")
    parser.add_argument("--template", choices=("plain", "mistral_instruct", "v1"),
                        help="default: the model's")
    parser.add_argument("--prune", choices=("none", *PRUNING),
                        help="merge the tokens of each picture (default: the model's)")
    parser.add_argument("--quantize", default="none", choices=("none", "int8", "int4"),
                        help="store the language model's linear layers in 8 or 4 bits")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        help="default: bfloat16 on a GPU or with --quantize, else float32")


def default_dtype(quantize: str) -> str:
    return "bfloat16" if torch.cuda.is_available() or quantize != "none" else "float32"


def load_model(args: argparse.Namespace) -> tuple[Llava, Processor]:
    chosen = {k: getattr(args, k) for k in ("image_mode", "prune", "template") if getattr(args, k)}
    args.dtype = args.dtype or default_dtype(args.quantize)
    model = Llava.from_pretrained(args.model, dtype=getattr(torch, args.dtype), device=args.device,
                                  quantize=args.quantize, **chosen)
    return model.eval(), Processor.from_pretrained(args.tokenizer or args.model, model.config)


def stream_answer(model: Llava, processor: Processor, messages, images, **decoding) -> str:
    """Print the answer to a conversation word by word, as it comes, and return it."""
    ids, text, shown = [], "", 0
    inputs = processor(messages, images)
    for token in model.generate(**inputs, eos_token_id=processor.eos, **decoding):
        ids.append(token)
        text = processor.decode(ids)
        if not text.endswith("\ufffd"):      # half a character waits for its other half
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(text[shown:])
    return text


def read_question() -> str:
    try:
        return input("> ").strip()           # an empty line ends the conversation
    except EOFError:
        return ""


def print_trace(model: Llava, inputs: dict) -> None:
    """Print the way of the picture and the words through the model while they go it: the prompt,
    then one word of the answer. A silent pass before counts FLOPs, which would spoil the clock."""
    tower, decoder = model.vision_tower, model.language_model
    parts = [tower.patch_embedding, tower.pre_layrnorm, *tower.layers, model.projector,
             decoder.embed_tokens, *decoder.layers, decoder.norm, decoder.lm_head]
    names = {module: name for name, module in model.named_modules() if module in parts}
    counter = FlopCounterMode(display=False, custom_mapping={             # unknown to torch 2.13
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        **dict.fromkeys((torch.ops.aten._weight_int8pack_mm, torch.ops.aten._weight_int4pack_mm_for_cpu,
                         torch.ops.aten._weight_int4pack_mm),
                        lambda x, *_, out_shape, **__: 2 * math.prod(x) * out_shape[-1])})
    flops, clock = [0], [0.0]                # when each part was done, in FLOPs and seconds

    def count(*_) -> None:
        flops.append(counter.get_total_flops())

    def show(module: nn.Module, _, y: Tensor) -> None:
        if y.is_cuda:
            torch.cuda.synchronize()
        clock.append(time.perf_counter())
        gflop, ms = (flops[len(clock) - 1] - flops[len(clock) - 2]) / 1e9, 1e3 * (clock[-1] - clock[-2])
        count, size = count_weights(module)
        row(names[module], y.shape, y.dtype, f"{count:,}", f"{gflop:.3f}", f"{ms:.2f}",
            f"{8 * size / max(1, count):.1f}", f"{size / 1e6:,.1f}")

    def row(stage: str, shape, *cells) -> None:
        cells = (f"{str(cell).removeprefix('torch.'):>14}" for cell in cells)
        print(f"{stage:33}{str(list(shape)):>20}", *cells, sep="")

    print(f"{'done':33}{'shape':>20}{'dtype':>14}{'parameters':>14}{'GFLOP':>14}{'ms':>14}"
          f"{'bits of each':>14}{'MB':>14}")
    for tiles, (height, width) in zip(inputs["images"], inputs["image_sizes"]):
        row(f"picture {width} x {height}", tiles.shape, tiles.dtype)
    row("words and <image>", inputs["input_ids"].shape, inputs["input_ids"].dtype)
    for hook, context in ((count, counter), (show, nullcontext())):
        hooks, clock[0] = [part.register_forward_hook(hook) for part in parts], time.perf_counter()
        with context:
            list(model.generate(**inputs, max_new_tokens=2, eos_token_id=None))
        for hook in hooks:
            hook.remove()
    print()


@torch.inference_mode()
def draw_kept_patches(model: Llava, tiles: Tensor) -> Image.Image:
    """What pruning does to the tiles uint8 [N, 3, S, S] of a picture, a row each. Left: kept patches
    clear, the others in the tint of the strongest that takes them in. Right: CLS's attention."""
    S, side, like = tiles.shape[-1], model.config.vision.side, model.vision_tower.class_embedding
    scale = math.ceil(336 / S)
    variant, canvas = PRUNING[model.config.prune], Image.new("RGB", (2 * S, len(tiles) * S))
    pixels = normalize(tiles.to(like.device)).to(like.dtype)
    states = model.vision_tower(pixels, model.config.vision_feature_layer)

    def enlarge(patches: Tensor) -> Image.Image:                          # [P] or [P, 3] of 0...255
        values = patches.byte().cpu().unflatten(0, (side, side)).numpy()
        return Image.fromarray(values).resize((S, S), Image.NEAREST)

    for i, (tile, attention, keys) in enumerate(zip(tiles, *model.cls_attention(states))):
        mix, kept = prumerge(attention, keys, **variant), choose_patches(attention, **variant)
        hues = torch.tensor([ImageColor.getrgb(f"hsl({137 * n % 360}, 80%, 50%)") for n in range(len(kept))])
        taken = mix[:len(kept)].cpu() > 0                                 # [m, P]
        tint = hues[taken.int().argmax(0)].where(taken.any(0)[:, None], torch.tensor(96))
        clear = torch.zeros(side**2).index_fill(0, kept.cpu(), 255)
        picture = Image.fromarray(tile.permute(1, 2, 0).cpu().numpy())
        dim = Image.blend(picture, enlarge(tint), 0.6)
        canvas.paste(Image.composite(picture, dim, enlarge(clear)), (0, i * S))
        canvas.paste(enlarge(255 * attention / attention.max()), (S, i * S))
    return canvas.resize((canvas.width * scale, canvas.height * scale), Image.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a LLaVA about pictures; without a prompt, talk to it.")
    add = parser.add_argument
    add("prompt", nargs="?", help="the question; without one a conversation begins")
    add("--model", required=True, metavar="ID",
        help="folder, run, or hub id such as llava-hf/llava-v1.6-mistral-7b-hf (or id@revision)")
    add("--image", nargs="+", action="extend", default=[], metavar="FILE",
        help="pictures to look at; what stands after the last one and is no file is the question")
    add("--max-new-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest word")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest, P in sum")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--trace", action="store_true", help="first show the way through the model, step by step")
    add("--show-kept", metavar="FILE", help="save a picture of what --prune keeps of the first one")
    add_model_flags(parser)
    args = parser.parse_args()
    if args.prompt is None and len(args.image) > 1 and not os.path.exists(args.image[-1]):
        args.prompt = args.image.pop()
    images = [open_image(file) for file in args.image]
    model, processor = load_model(args)
    if args.show_kept:
        if not images or model.config.prune == "none":
            parser.error("--show-kept needs an --image and a --prune")
        draw_kept_patches(model, processor.pixels(images[0])).save(args.show_kept)
    torch.manual_seed(args.seed)
    messages = []
    for question in [args.prompt] if args.prompt is not None else iter(read_question, ""):
        shown = "<image>\n" * len(images) if not messages and "<image>" not in question else ""
        messages.append({"role": "user", "content": shown + question})
        if args.trace and len(messages) == 1:
            print_trace(model, processor(messages, images))
        answer = stream_answer(model, processor, messages, images, max_new_tokens=args.max_new_tokens,
                     temperature=args.temperature, top_p=args.top_p)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    command_line(main)
