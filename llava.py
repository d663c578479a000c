"""LLaVA on Mistral-7B in one file: images become tokens of a language model, which answers in text.

    image [1, 3, 336, 336] --vision tower--> [1, 577, 1024] --projector--> [576, 4096]     (without CLS)
                                                                              | in place of <image>
    "[INST] <image>\\nWhat is it? [/INST]" --embed--> [1, T, 4096] --splice--> [1, T + 575, 4096]
                                                                              |
                                    "A cat." <--sample-- [1, V] <--lm_head-- language model

The file reads from top to bottom: configurations (1), the language model (2), the vision tower (3),
weights in 8 and 4 bits (4), AnyRes tiling and token reduction (5), LLaVA (6), checkpoints (7),
preprocessing (8), the command line (9). A tile is one square input of the vision tower. Shapes are written
[like, this] with these letters:

    B  rows of a batch        N  tiles of all images          C  hidden size, of tower or language model
    T  tokens in a row        P  patches of a tile            D  size of one attention head
    S  slots of the KV cache  W  sliding window               H  query heads, K key/value heads
    V  vocabulary size        T' tokens after splicing           I inputs, O outputs of a layer

Sources: LLaVA (arXiv:2304.08485), LLaVA-1.5 (2310.03744), LLaVA-1.6 (llava-vl.github.io), Mistral 7B
(2310.06825), CLIP (2103.00020), PruMerge (2403.15388), DivPrune (2503.02175). Where a paper and its
released code differ, this file follows the code and says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
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
from tokenizers import Tokenizer, normalizers, processors
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

IGNORE = -100                                # the label of a token that is read but not learned


class UserError(ValueError):
    """A mistake of the user, in one sentence that the command line prints instead of a traceback."""


# ---------------------------------------------------------------------------------------------
# 1. Configurations. Fields have the names that the published config.json files use.

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
    Mistral-7B-Instruct-v0.2, the language model of LLaVA-1.6-Mistral-7B."""
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
    """Configuration of a whole LLaVA; the defaults are LLaVA-1.5's on a Mistral."""
    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    vision_feature_layer: int = -2           # the tower's hidden states before its last layer
    image_token_id: int = 32000              # the id of <image>: one whole image in input_ids
    projector: str = "mlp2x_gelu"            # or "linear": LLaVA 1
    image_mode: str = "pad"                  # or "crop": LLaVA 1; "anyres": LLaVA 1.6
    grids: tuple[tuple[int, int], ...] = ()  # AnyRes: (width, height) in pixels to choose from
    hf_preprocessing: bool = False           # Hugging Face's preprocessing where it differs from LLaVA's
    template: str = "mistral_instruct"       # or "v1": Vicuna; "plain": stage 1
    prune: str = "none"                      # or a name in PRUNING: fewer image tokens
    keep_tokens: int | None = None           # tokens to keep of each tile, for the methods of BUDGETED

    def __post_init__(self):
        size = self.vision.image_size
        if self.image_mode == "anyres":
            if not self.grids:               # as released
                tiles = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
                object.__setattr__(self, "grids", tuple((size * w, size * h) for w, h in tiles))
            if any(edge < 1 or edge % size for grid in self.grids for edge in grid):
                raise UserError(f"the sides of the AnyRes grids {self.grids} are not multiples of {size}")
        require(vars(self), "LlavaConfig", image_mode=("pad", "crop", "anyres"), prune=("none", *PRUNING),
                projector=("mlp2x_gelu", "linear"), template=("mistral_instruct", "v1", "plain"))
        check_token_budget(self)


# ---------------------------------------------------------------------------------------------
# 2. The language model

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        # F.rms_norm computes in float32 and casts; the weight comes after it, as in transformers.
        return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)


def rope(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary embeddings: cos and signed sin [..., D] of the rotation angles at `positions` [...]."""
    powers = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() * (1.0 / config.rope_theta**powers)            # [..., D/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of dimensions (i, i + D/2) of x [B, heads, T, D], as Hugging Face's files
    pair them: (a, b) -> (a cos - b sin, b cos + a sin). Mistral's own consolidated files pair
    (2i, 2i + 1) and would have to be permuted."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)                # [B, heads, T, D]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Query i sees the keys j with 0 <= i - j < window (None: all j <= i); q [B, H, T, D], k and v
    [B, K, T, D] -> like q. Padding is on the right: no query before it sees it, so no mask is needed. The
    cost grows with T² up to the window and with T beyond it (masked_attention: with T²)."""
    T, device = q.shape[2], q.device.type
    if window is None or T <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    cuda_flash_fits = (q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0
                       and (device != "cuda" or torch.cuda.get_device_capability(q.device) >= (8, 0)))
    if device == "cpu" or (device in ("cuda", "meta") and cuda_flash_fits):     # meta: traced like CUDA
        return SlidingWindow.apply(q, k, v, window)
    return masked_attention(q, k, v, window)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Like causal_attention, with an explicit mask [T, T], where no flash kernel fits: MPS, and CUDA if older
    than Ampere, in float32, or with D not a multiple of 8. Keys and values are repeated, because no fused
    kernel takes both a mask and K < H heads."""
    T, group = q.shape[2], q.shape[1] // k.shape[1]
    mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)   # [B, H, T, D]
    return F.scaled_dot_product_attention(q, k, v, mask)


class SlidingWindow(torch.autograd.Function):
    """Attention past the window as two causal triangles, each computed by the flash kernel.

    The rows are cut into blocks of W tokens. A query sees the keys marked `a` in its own block and `b` in
    the block before. For W = 4, queries down, keys across:

                  block 0    block 1    block 2
                  0 1 2 3    4 5 6 7    8 9 ..          `a`: query and key in the same block,
        query 3   a a a a                               a causal triangle.
        query 4   . b b b    a . . .                    `b`: queries 4, 5, 6 and keys 1, 2, 3. In the
        query 5   . . b b    a a . .                    order 6, 5, 4 and 3, 2, 1 it is causal, too:
        query 6   . . . b    a a a .                                  3 2 1
        query 7   . . . .    a a a a                       query 6    b . .
        query 8              . b b b    a . . .            query 5    b b .
        query 9              . . b b    a a . .            query 4    b b b

    All blocks of a batch are one batch of the kernel, so there are two calls of it for any T. A call gives
    the attention to its own keys and the log-sum-exp (lse) of its scores, which is the logarithm of the
    softmax's denominator. The two outputs are averaged by their shares of the common denominator.
    Backward calls the kernel's backward once per triangle, with the merged output and the merged lse:
    in it, exp(qk - lse) is then the common softmax, and the gradients are added.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, W: int) -> Tensor:
        blocks = [cut_blocks(x, W) for x in (q, k, v)]                    # [B, n, heads, W, D]
        out, lse, *random_state = flash(*blocks)
        if W > 1:                            # W = 1: there is no `b`, and the kernel rejects length 0
            out_b, lse_b, *_ = flash(*(x.flip(3) for x in triangle_b(*blocks)))
            out_a, lse_a = out[:, 1:, :, :-1], lse[:, 1:, :, :-1]         # views: out and lse change, too
            lse_b = lse_b.flip(3)
            share = (lse_b - lse_a).sigmoid()                             # of `b` in the denominator
            out_a.lerp_(out_b.flip(3), share[..., None].to(out.dtype))
            lse_a.copy_(torch.logaddexp(lse_a, lse_b))
        out = out.transpose(1, 2).flatten(2, 3)[:, :, :q.shape[2]]        # [B, H, T, D]
        ctx.save_for_backward(q, k, v, out, lse, *random_state)
        ctx.window = W
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        q, k, v, out, lse, *random_state = ctx.saved_tensors
        W, T = ctx.window, q.shape[2]
        q, k, v, out, grad = (cut_blocks(x, W) for x in (q, k, v, out, grad))       # lse is in blocks
        grads = flash_backward(grad, q, k, v, out, lse, *random_state)
        if W > 1:
            args_b = (grad[:, 1:, :, :-1], *triangle_b(q, k, v), out[:, 1:, :, :-1], lse[:, 1:, :, :-1])
            grads_b = flash_backward(*(x.flip(3) for x in args_b), *random_state)
            for view, part in zip(triangle_b(*grads), grads_b):
                view += part.flip(3)         # grads change, too
        return *(x.transpose(1, 2).flatten(2, 3)[:, :, :T] for x in grads), None


def cut_blocks(x: Tensor, W: int) -> Tensor:
    """[B, heads, T, D] -> [B, n, heads, W, D]; the last block is filled with zeros at its end."""
    if x.shape[2] % W:
        x = F.pad(x, (0, 0, 0, -x.shape[2] % W))
    return x.unflatten(2, (-1, W)).transpose(1, 2)


def triangle_b(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What triangle `b` reads of blocks [B, n, heads, W, D], as views [B, n - 1, heads, W - 1, D]."""
    return q[:, 1:, :, :-1], k[:, :-1, :, 1:], v[:, :-1, :, 1:]


def flash(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Causal attention in each block [B, n, heads, W, D] by the device's flash kernel: output, lse
    [B, n, H, W] and, on CUDA, two tensors of random state, which only dropout would use."""
    ops, args, random_state = torch.ops.aten, [x.flatten(0, 1) for x in (q, k, v)], []
    if q.device.type == "cpu":
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, True)
    else:
        out, lse, _, _, _, _, *random_state, _ = ops._scaled_dot_product_flash_attention(*args, 0.0, True)
    return [out.unflatten(0, q.shape[:2]), lse.unflatten(0, q.shape[:2]), *random_state]


def flash_backward(grad, q, k, v, out, lse, *random_state: Tensor) -> list[Tensor]:
    """The gradients of q, k and v, in their shapes, by the backward of the kernel that `flash` calls."""
    ops, W = torch.ops.aten, q.shape[3]
    args = [x.flatten(0, 1) for x in (grad, q, k, v, out, lse.contiguous())]
    if q.device.type == "cpu":
        grads = ops._scaled_dot_product_flash_attention_for_cpu_backward(*args, 0.0, True)
    else:                                    # no cumulative lengths: all rows have the same length W
        args += [None, None, W, W, 0.0, True, *random_state]
        grads = ops._scaled_dot_product_flash_attention_backward(*args)
    return [x.unflatten(0, q.shape[:2]) for x in grads]


class KVCache:
    """Keys and values of one layer in S slots; the token at position p is stored in slot p mod S. S is the
    final length, or W if that is less: then a new token overwrites the one that has just left the window.
    Keys are stored rotated, so the order of the slots has no effect."""

    def __init__(self, slots: int, lengths: Tensor, window: int | None):
        self.slots, self.lengths, self.window = slots, lengths, window

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention over right-padded prompts of `lengths` [B] tokens; stores k, v [B, K, T, D].
        Each slot gets the newest position that belongs to it. With S = 4 and a prompt of 6 tokens, the
        slots hold positions 4, 5, 2, 3. An unused slot gets a copy of position 0; decoding masks the slot."""
        last, slot = self.lengths[:, None] - 1, torch.arange(self.slots, device=k.device)
        newest = (last - (last - slot) % self.slots).clamp(min=0)         # [B, S]
        index = newest[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.k, self.v = k.gather(2, index), v.gather(2, index)           # [B, K, S, D]
        return causal_attention(q, k, v, self.window)

    def decode_step(self, q: Tensor, k: Tensor, v: Tensor, rows, slot, mask) -> Tensor:
        """Attention of one new token per row, q [B, H, 1, D], to itself and the cache. k, v [B, K, 1, D] are
        stored at (rows [B], slot [B]); mask [B, 1, 1, S] is 0 at the slots in use, elsewhere -inf. The H / K
        query heads of a key head become H / K query positions, so that keys need not be repeated."""
        self.k[rows, :, slot], self.v[rows, :, slot] = k[:, :, 0], v[:, :, 0]
        groups = q.view(len(q), k.shape[1], -1, q.shape[3])               # [B, K, H/K, D]
        return F.scaled_dot_product_attention(groups, self.k, self.v, mask).reshape(q.shape)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, K <= H key/value heads."""

    def __init__(self, config: TextConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], attend) -> Tensor:
        """x [B, T, C] -> [B, T, C]; attend(q, k, v) is causal attention, a prefill or a decode step."""
        q = rotate(split_heads(self.q_proj(x), self.head_dim), *cos_sin)  # [B, H, T, D]
        k = rotate(split_heads(self.k_proj(x), self.head_dim), *cos_sin)  # [B, K, T, D]
        v = split_heads(self.v_proj(x), self.head_dim)                    # [B, K, T, D]
        y = attend(q, k, v)                                               # [B, H, T, D]
        return self.o_proj(y.transpose(1, 2).flatten(2))


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

    def forward(self, x: Tensor, cos_sin, attend, select=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attend)
        if select is not None:               # the last layer: the other positions have no further use
            x = x[select]                                                 # [n, C]
        y = self.post_attention_layernorm(x)
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)     # [..., inner]
        return x + self.mlp["down_proj"](y)


class LanguageModel(nn.Module):
    """Mistral or LLaMA. It reads embeddings, because image features have no ids, and the caller applies
    lm_head, because few positions need logits."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor, select: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Embeddings x [B, T, C] -> hidden states [B, T, C] after the final norm; with
        `select` = (rows [n], columns [n]), only the states [n, C] of these positions."""
        attend = partial(causal_attention, window=self.config.sliding_window)
        positions = torch.arange(x.shape[1], device=x.device)
        return self.run_layers(x, positions, [attend] * len(self.layers), select)

    def prefill(self, x: Tensor, caches: list[KVCache], select) -> Tensor:
        """Like forward; also stores the keys and values of each layer in its cache."""
        positions = torch.arange(x.shape[1], device=x.device)
        return self.run_layers(x, positions, [cache.prefill for cache in caches], select)

    def decode_step(self, x: Tensor, caches: list[KVCache], positions: Tensor) -> Tensor:
        """One new token of each row, x [B, 1, C] at `positions` [B] -> hidden states [B, 1, C]."""
        slots, rows = caches[0].slots, torch.arange(len(x), device=x.device)
        unused = torch.arange(slots, device=x.device) > positions[:, None, None, None]   # [B, 1, 1, S]
        mask = torch.zeros_like(unused, dtype=x.dtype).masked_fill(unused, -torch.inf)
        where = {"rows": rows, "slot": positions % slots, "mask": mask}
        attends = [partial(cache.decode_step, **where) for cache in caches]
        return self.run_layers(x, positions[:, None, None], attends, None)        # [B, 1, 1]: for all heads

    def run_layers(self, x: Tensor, positions: Tensor, attends: list, select) -> Tensor:
        cos_sin = rope(positions, self.config, x.dtype)
        for layer, attend in zip(self.layers, attends):
            x = layer(x, cos_sin, attend, select if layer is self.layers[-1] else None)
        return self.norm(x)


class ReplayedStep:
    """A decode step on a GPU, recorded as a CUDA graph at its second call and replayed from then on: one
    launch instead of a thousand, which would take longer than the kernels of a 7B model themselves."""

    def __init__(self, step):
        self.step, self.calls = step, 0

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 1:                  # not recorded: short answers end here, kernels are loaded
            return self.step(x, positions=positions)
        if self.calls == 2:                  # recorded with static input tensors, which replays read
            self.x, self.positions, self.graph = x.clone(), positions.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.device(x.device), torch.cuda.graph(self.graph):
                self.output = self.step(self.x, positions=self.positions)
        self.x.copy_(x)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.output


def without_onednn(function):
    """Wrap `function` to run without oneDNN, for a single bf16 row on a CPU: torch's own kernel reads the
    weights nearly twice as fast as oneDNN's, which is made for many rows."""
    def call(*args, **kwargs):
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            return function(*args, **kwargs)
        finally:
            torch.backends.mkldnn.enabled = before

    return call


# ---------------------------------------------------------------------------------------------
# 3. The vision tower

def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation function; it differs from GELU by up to 0.02."""
    return x * torch.sigmoid(1.702 * x)


class VisionLayer(nn.Module):
    """A pre-norm transformer layer in which every patch attends to every patch."""

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
    """CLIP's ViT. LLaVA uses the input of the last layer; that layer and post_layernorm are kept
    because every checkpoint contains them, and because PruMerge uses the last layer's q and k."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        C, p = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=p, stride=p, bias=False)
        self.position_embedding = nn.Embedding(1 + config.side**2, C)
        self.pre_layrnorm = nn.LayerNorm(C, config.layer_norm_eps)        # spelt so in every checkpoint
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(C, config.layer_norm_eps)

    def forward(self, pixels: Tensor, feature_layer: int = -2) -> Tensor:
        """pixels [N, 3, image_size, image_size] -> hidden states [N, 1+P, C], the CLS token first;
        feature_layer -1 means after the last layer, -2 before it."""
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)       # [N, P, C], row by row
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        x = self.pre_layrnorm(x + self.position_embedding.weight)         # [N, 1+P, C]
        for layer in self.layers[:len(self.layers) + 1 + feature_layer]:
            x = layer(x)
        return x


# ---------------------------------------------------------------------------------------------
# 4. Weights in 8 and 4 bits of the language model

GROUP, FITS = 32, 5                          # int4: columns that share a scale; rounds of least squares


def pack_int4(q: Tensor, width: int) -> Tensor:
    """uint8 q [I, O] of 0...15 -> [O / 2w, I, w], with w = width: a byte holds the outputs o and o + w of
    an input, o in its low four bits."""
    low, high = q.unflatten(1, (-1, 2, width)).unbind(2)                  # [I, O / 2w, w] each
    return (low | high << 4).transpose(0, 1).contiguous()


@cache
def kernel_width() -> int | None:
    """The width of pack_int4 that torch's CPU kernel reads: 32 (AVX-512) or 16 (AVX2). None: there is no
    such kernel. This layout is internal to torch, so it is compared with torch's own packer."""
    q = (torch.arange(4096) // 7 % 16).view(64, 64)      # no two layouts pack this to equal bytes
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1).flatten()
    for width in (32, 16):
        if torch.equal(pack_int4(q.byte().T, width).flatten(), theirs):
            return width
    return None


def unpack_tinygemm(packed: Tensor) -> Tensor:
    """int32 [O / 8, I / 128, 32, 4] of torch's CUDA kernel -> uint8 [O, I] of 0...15. In PyTorch's int4mm.cu
    a value belongs to output 8 * O tile + row and to input 128 * I tile + 32 * word + 16 * byte + 8 * nibble
    + 2 * lane + pair."""
    x = packed.view(torch.uint8).unflatten(3, (4, 2, 2)).unflatten(2, (8, 4))
    x = torch.stack((x & 15, x >> 4), -1)    # O tile, I tile, row, lane, word, pair, byte, nibble
    return x.permute(0, 2, 1, 4, 6, 7, 3, 5).flatten(2).flatten(0, 1)


def quantize_int4(w: Tensor) -> tuple[Tensor, Tensor]:
    """float32 w [O, I] -> uint8 q [I, O] of 0...15 and bf16 (scale, middle) [I / GROUP, O, 2], such that
    w is about (q - 8) * scale + middle: q = 8 stands for middle. Both first follow from the range of each
    group. Then FITS times: fit both to the present q by least squares, and round again."""
    w = w.T.contiguous().unflatten(0, (-1, GROUP))                        # [I / GROUP, GROUP, O]
    low, high, mean_w = w.amin(1), w.amax(1), w.mean(1)                   # aminmax is 10 times slower
    scale, middle = (high - low) / 15, low + (high - low) * 8 / 15
    q, product = torch.empty_like(w), torch.empty_like(w)                 # here q is -8...7
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
    """A frozen linear layer. 8 bits: weight = q * scale, with one scale per row. 4 bits: weight = (q - 8) *
    scale + middle, with one bf16 pair per GROUP columns: 1 more bit per weight. The buffers are not in the
    state_dict. Up to `kernel_tokens` tokens in bf16 are multiplied by torch's kernel. Otherwise (more
    tokens, another dtype, a gradient) blocks of `block_rows` rows are dequantized and multiplied in turn."""

    def __init__(self, weight: Tensor, bits: int, device="cpu", name: str = "a layer"):
        super().__init__()
        self.bits, device = bits, torch.device(device)
        self.out_features, self.in_features = weight.shape
        if bits == 4 and (self.in_features % GROUP or self.out_features % 64):
            raise UserError(f"{name} is {list(weight.shape)}, but 4 bits need a multiple of 64 rows and "
                            f"of {GROUP} columns: use --quantize int8")
        self.tinygemm = (bits == 4 and device.type == "cuda" and torch.version.hip is None
                         and self.in_features % 128 == 0
                         and torch.cuda.get_device_capability(device) >= (8, 0))
        # torch's 8-bit CPU kernel reads 16 columns at once; with other widths it reads past the weight's end.
        fits = self.in_features % 16 == 0 if bits == 8 else kernel_width() is not None
        self.kernel_tokens = 0               # with more tokens than this, blocks are faster
        if self.tinygemm:
            self.kernel_tokens = 128
        elif device.type == "cpu" and fits:
            self.kernel_tokens = 32 if bits == 4 else 16
        self.block_rows = self.out_features
        if device.type == "cpu":
            self.block_rows = max(1, 2**17 // self.in_features) * 64      # 16 MB in bf16: a cache's size
        pieces = weight.split(128 if device.type == "cpu" else 1024)      # small temporary tensors
        q, scale = zip(*[self.quantize(rows.to(device).float()) for rows in pieces])
        self.register_buffer("q", torch.cat(q), persistent=False)         # scale: [O], int4 [I / GROUP, O, 2]
        self.register_buffer("scale", torch.cat(scale, dim=0 if bits == 8 else 1), persistent=False)

    def quantize(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.bits == 8:
            scale = (w.abs().amax(1) / 127).clamp(min=1e-9).bfloat16()
            return (w / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale     # [O, I], [O]
        q, scale = quantize_int4(w)                                       # scale: [I / GROUP, O, 2]
        if self.tinygemm:                    # a byte holds two inputs; torch's innerKTiles is 8
            nibbles = (q[::2] << 4 | q[1::2]).T.contiguous()
            return torch.ops.aten._convert_weight_to_int4pack(nibbles, 8), scale     # [O / 8, I / 128, 32, 4]
        return pack_int4(q, kernel_width() or 32), scale                  # [O / 2w, I, w]

    def block(self, start: int, dtype: torch.dtype) -> Tensor:
        """Rows start ... start + block_rows of the weight, transposed: [I, n]; at 8 bits not yet scaled."""
        if self.bits == 8:
            return self.q[start:start + self.block_rows].to(dtype).T
        height = self.out_features // len(self.q)                         # outputs of one q[i]: 2w or 8
        q = self.q[start // height:(start + self.block_rows) // height]
        if self.tinygemm:
            q = unpack_tinygemm(q).to(dtype).T                            # [I, n]
        else:
            q = torch.cat((q & 15, q >> 4), 2).transpose(0, 1)
            q = q.to(dtype, memory_format=torch.contiguous_format).flatten(1)
        q = q.unflatten(0, (-1, GROUP))                                   # [I / GROUP, GROUP, n]
        scale, middle = self.scale[:, None, start:start + self.block_rows].to(dtype).unbind(3)
        scale, offset = scale.contiguous(), middle - 8 * scale            # [I / GROUP, 1, n]
        return torch.addcmul(offset, q, scale, out=q).flatten(0, 1)

    def multiply_block(self, x: Tensor, start: int) -> Tensor:
        y = x @ self.block(start, x.dtype)
        if self.bits == 8:                   # scaled here: the product is smaller than the block
            y *= self.scale[start:start + self.block_rows].to(x.dtype)
        return y

    def forward(self, x: Tensor) -> Tensor:
        needs_grad, tokens = x.requires_grad and torch.is_grad_enabled(), x.shape[:-1].numel()
        if x.dtype == torch.bfloat16 and 0 < tokens <= self.kernel_tokens and not needs_grad:
            y = x.flatten(0, -2).contiguous()
            if self.bits == 8:
                y = torch.ops.aten._weight_int8pack_mm(y, self.q, self.scale)
            elif self.tinygemm:
                y = torch.ops.aten._weight_int4pack_mm(y, self.q, GROUP, self.scale)
            else:
                q = self.q.view(self.out_features, -1)
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(y, q, GROUP, self.scale)
            return y.unflatten(0, x.shape[:-1])
        # A CPU without AVX-512 multiplies bf16 matrices 8 times slower than float32 ones.
        slow = x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
        inputs, starts = x.float() if slow else x, range(0, self.out_features, self.block_rows)
        if needs_grad:                       # backward dequantizes each block again
            parts = [checkpoint(self.multiply_block, inputs, start, use_reentrant=False) for start in starts]
        else:
            parts = [self.multiply_block(inputs, start) for start in starts]
        return torch.cat(parts, -1).to(x.dtype)


def count_weights(module: nn.Module) -> tuple[int, int]:
    """How many weights a module has, and the bytes that they take with their scales."""
    quantized = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    count = sum(p.numel() for p in module.parameters())
    count += sum(layer.out_features * layer.in_features for layer in quantized)
    return count, sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


QUANTIZED = r"language_model\.(layers\..*_proj|lm_head)\.weight"


def place_tensor(model, state: dict, name: str, tensor: Tensor, quantize: str, device, dtype) -> None:
    """Store a tensor in `state`, or quantize it into a layer of the model."""
    if quantize == "none" or not re.fullmatch(QUANTIZED, name):
        # With quantize a copy, so that no tensor keeps its file mapped.
        state[name] = tensor.to(device, dtype, copy=quantize != "none")
        return
    # In int4 lm_head has 8 bits: its errors go straight into the logits.
    bits = 4 if quantize == "int4" and "lm_head" not in name else 8
    model.set_submodule(name.removesuffix(".weight"), QuantizedLinear(tensor, bits, device, name))


# ---------------------------------------------------------------------------------------------
# 5. AnyRes tiling and token reduction

def choose_grid(size: tuple[int, int], grids) -> tuple[int, int]:
    """The (width, height) of `grids` that keeps the most pixels of a (height, width) image; of equals the
    smallest, then the first. transformers reads the pairs as (height, width); read_hf_config swaps each of
    them, but not their order, so a tie can end otherwise than in LLaVA."""
    height, width = size

    def merit(grid):
        scale = min(grid[0] / width, grid[1] / height)
        return min(int(width * scale) * int(height * scale), width * height), -grid[0] * grid[1]

    return max(grids, key=merit)


def unpadded_patches(config: LlavaConfig, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns that a (height, width) image covers in the patches of its grid; the rest is
    black padding. LLaVA truncates where transformers rounds to 7 decimals first."""
    columns, rows = (edge // config.vision.patch_size for edge in choose_grid(size, config.grids))
    wide = size[1] / size[0] > columns / rows
    exact = size[0] * (columns / size[1]) if wide else size[1] * (rows / size[0])
    covered = int(round(exact, 7) if config.hf_preprocessing else exact)
    y, x = ((rows - covered) // 2, 0) if wide else (0, (columns - covered) // 2)
    return slice(y, rows - y), slice(x, columns - x)


def count_tiles(config: LlavaConfig, size: tuple[int, int]) -> int:
    """How many tiles a (height, width) image is cut into."""
    if config.image_mode != "anyres":
        return 1
    return 1 + math.prod(choose_grid(size, config.grids)) // config.vision.image_size**2


def count_image_tokens(config: LlavaConfig, size: tuple[int, int]) -> int:
    """How many tokens replace a (height, width) image; with PruMerge, whose number varies, at most."""
    if config.prune != "none":
        return count_tiles(config, size) * max_tile_tokens(config)
    if config.image_mode != "anyres":
        return config.vision.side**2
    rows, columns = (part.stop - part.start for part in unpadded_patches(config, size))
    return config.vision.side**2 + rows * (columns + 1)


PRUMERGE = {                                 # arguments of prumerge
    "prumerge": {},
    "prumerge+": {"plus": True},
    "prumerge-fixed": {"ratio": 1 / 8},      # the released training setting: 73 tokens a tile
    "prumerge+-fixed": {"plus": True, "ratio": 1 / 8},                    # 145 tokens a tile
    "prumerge-paper": {"paper": True},
}
PRUNING = (*PRUMERGE, "random", "pool", "divprune")                       # the choices of --prune
BUDGETED = ("prumerge", "prumerge+", "random", "pool", "divprune")        # those that take --keep-tokens


def check_token_budget(config: LlavaConfig) -> None:
    """Raise UserError where `prune` and `keep_tokens` do not fit together."""
    name, keep, side = config.prune, config.keep_tokens, config.vision.side
    least = 2 if name in PRUMERGE else 1     # PruMerge adds one token for the patches it does not keep
    if name in PRUMERGE and config.vision_feature_layer != -2:
        raise UserError(f"--prune {name} uses attention in the tower's last layer, so the features must be "
                        f"its input (-2), but vision_feature_layer is {config.vision_feature_layer}")
    if keep is None and name in ("random", "pool", "divprune"):
        raise UserError(f"--prune {name} needs --keep-tokens N, the number of tokens to keep of each tile")
    if keep is not None and name not in BUDGETED:
        raise UserError(f"--keep-tokens works with --prune {', '.join(BUDGETED)}, not with {name}")
    if keep is not None and not (isinstance(keep, int) and least <= keep <= side**2):
        raise UserError(f"--keep-tokens {keep} is not between {least} and the {side**2} patches of a tile")
    if name == "pool" and max(pooled_size(keep)) > side:
        raise UserError(f"--prune pool needs --keep-tokens that is a product of two numbers up to {side}, "
                        f"such as {math.isqrt(keep)**2} instead of {keep}")


def max_tile_tokens(config: LlavaConfig) -> int:
    """An upper bound of a tile's tokens after reduction. PruMerge's outliers exceed the third quartile, so
    they are at most a quarter of the patches; `plus` can add all others. One token is for those not kept."""
    patches, variant = config.vision.side**2, PRUMERGE.get(config.prune, {})
    if config.keep_tokens is not None:
        return config.keep_tokens
    if "ratio" in variant:
        return len(choose_patches(torch.zeros(patches), **variant)) + 1   # the same for any attention
    return patches + 1 if "plus" in variant else max(1, patches // 4) + 1


def choose_patches(attention: Tensor, plus: bool = False, ratio: float | None = None,
                   paper: bool = False, tokens: int | None = None) -> Tensor:
    """PruMerge's choice: indices [m] of patches by attention [P], strongest first: tokens - 1 of them, else
    the share `ratio`, else the outliers (> q3 + 1.5 (q3 - q1)). `plus` adds evenly spaced ones: with `tokens`
    in place of the weaker half, with `ratio` perhaps repeating some. `paper` sorts the indices."""
    P, order = len(attention), attention.argsort(descending=True, stable=True)
    if tokens is not None:
        sampled = (tokens - 1) // 2 if plus else 0
        strongest, rest = order[:tokens - 1 - sampled], order[tokens - 1 - sampled:].sort().values
        spaced = torch.arange(sampled, device=rest.device) * len(rest) // max(1, sampled)
        return torch.cat((strongest, rest[spaced]))
    q1, q3 = attention.float().quantile(torch.tensor([0.25, 0.75], device=attention.device))
    outliers = int((attention > q3 + 1.5 * (q3 - q1)).sum())
    count = max(1, outliers if ratio is None else int(P * ratio))         # for 0 the released code crashes
    kept = order[:count]
    if plus and ratio is None:               # spacing and end as released
        even = torch.arange(0, P - 1, max(1, P // count // 3), device=kept.device)
        kept = torch.cat((kept, even[~torch.isin(even, kept)]))
    elif plus:                               # as released: it may repeat some of the strongest patches
        kept = torch.cat((kept, torch.arange(P // count // 2, P - 1, P // count, device=kept.device)))
    return kept.sort().values if paper else kept


def prumerge(attention: Tensor, keys: Tensor, plus: bool = False, ratio: float | None = None,
             paper: bool = False, tokens: int | None = None) -> Tensor:
    """PruMerge as a matrix [m + 1, P]: its product with a tile's features [P, C] gives the tokens.
    attention [P]: of the CLS token to each patch; keys [P, C]; tokens: the number of all tokens. To each
    chosen patch the attention-weighted sum of its 32 most similar patches is added. The last token is that
    sum over all patches not chosen. This is the released code for one tile; the `paper` does not normalize
    keys, weights a chosen patch by its attention, like its neighbors, and has no last token."""
    kept = choose_patches(attention, plus, ratio, paper, tokens)
    weight_of_kept, directions = torch.ones_like(attention), F.normalize(keys, dim=-1)
    if paper:
        weight_of_kept = attention = attention / attention.sum()          # softmax without CLS
        directions = keys
    rest = torch.ones_like(attention).index_fill(0, kept, 0).nonzero()[:, 0]
    # If `kept` repeats r patches, the released code leaves out the first r of the rest: m + rest = P again.
    rest = rest[len(kept) + len(rest) - len(keys):]
    order = torch.cat((kept, rest))                                       # [P]
    similarity = directions[kept] @ directions[order].T                   # [m, P], columns as in `order`
    similarity.fill_diagonal_(-torch.inf)                                 # row i and column i: kept[i] itself
    near = order[similarity.topk(min(32, len(keys) - 1)).indices]         # [m, 32]
    mix = attention.new_zeros(len(kept), len(keys))                       # [m, P], columns are patches
    mix = mix.scatter_add(1, near, attention[near]).scatter_add(1, kept[:, None], weight_of_kept[kept, None])
    if paper:
        return mix
    return torch.cat((mix, torch.zeros_like(attention).index_put((rest,), attention[rest])[None]))


def random_patches(pixels: Tensor, keep: int, patches: int) -> Tensor:
    """`keep` of `patches` indices at random, in the image's order. The seed is the CRC-32 of the tile's uint8
    pixels, recovered from the normalized [3, size, size]: a tile always gets the same choice."""
    mean, std = (torch.tensor(c, device=pixels.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    eight_bits = ((pixels.float() * std + mean) * 255).round().to(torch.uint8)
    generator = torch.Generator().manual_seed(zlib.crc32(eight_bits.cpu().numpy().tobytes()))
    return torch.randperm(patches, generator=generator)[:keep].sort().values.to(pixels.device)


def pooled_size(keep: int) -> tuple[int, int]:
    """The rows and columns a x b = keep that are nearest to a square, a <= b."""
    a = next(a for a in range(math.isqrt(keep), 0, -1) if keep % a == 0)
    return a, keep // a


def pool_patches(features: Tensor, keep: int) -> Tensor:
    """Average pooling of neighboring patches: [P, C], P a square, -> [keep, C]."""
    side = math.isqrt(len(features))
    image = features.T.unflatten(1, (side, side))                         # [C, side, side]
    return F.adaptive_avg_pool2d(image, pooled_size(keep)).flatten(1).T


def diverse_patches(features: Tensor, keep: int) -> Tensor:
    """DivPrune: sorted indices [keep] of features [P, C] whose smallest cosine distance is greedily
    maximized. It starts with the feature whose nearest neighbor is farthest."""
    x = F.normalize(features.float(), dim=-1)
    start = int((x @ x.T).fill_diagonal_(-torch.inf).amax(1).argmin())
    return farthest_points(x, keep, start).sort().values.to(features.device)


def farthest_points(x: Tensor, k: int, start: int | None = None) -> Tensor:
    """Greedy max-min selection (Gonzalez 1985): indices [k] of x [n, C] in the order of selection, each the
    point farthest from its nearest selected point, the lowest index of equals; start None is the point
    nearest the mean. One matrix-vector product per selection: |a - b|² = |a|² - 2ab + |b|². To reduce
    cancellation x[center] becomes the origin, not the mean, whose rounding makes equal distances differ."""
    if not 0 < k <= len(x):
        raise UserError(f"{k} of {len(x)} points cannot be selected")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if len(bad := (~x.isfinite().all(1)).nonzero()):
        raise UserError(f"the features of point {int(bad[0])} are not finite")
    center = int(torch.linalg.vector_norm(x - x.mean(0), dim=1).argmin())
    x = x - x[center]
    squares, selected = x.square().sum(1), []
    pick = center if start is None else start
    nearest = torch.full_like(squares, math.inf)                          # [n] squared distances
    for _ in tqdm(range(k), desc="selecting", leave=False, delay=2):
        selected.append(pick)
        sums = squares + squares[pick]
        distances = torch.addmv(sums, x, x[pick], alpha=-2)
        close = (distances < 32 * torch.finfo(x.dtype).eps * sums).nonzero()[:, 0]   # mostly rounding errors
        distances[close] = (x[close] - x[pick]).square().sum(1)
        nearest = torch.minimum(nearest, distances)
        nearest[pick] = -1                   # never again, not even among duplicates
        pick = int(nearest.argmax())
    return torch.tensor(selected)


# ---------------------------------------------------------------------------------------------
# 6. LLaVA

class Llava(nn.Module):
    """A language model that reads the projected patches of an image in place of its id."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config, C = config, config.text.hidden_size
        self.vision_tower = VisionTower(config.vision)
        self.projector = nn.Sequential(nn.Linear(config.vision.hidden_size, C))
        if config.projector == "mlp2x_gelu":
            self.projector.extend([nn.GELU(), nn.Linear(C, C)])
        if config.image_mode == "anyres":
            self.image_newline = nn.Parameter(torch.randn(C) / C**0.5)
        self.language_model = LanguageModel(config.text)
        self.bases: list[str] = []           # folders or id@revision that the weights came from

    def encode_images(self, images: list[Tensor], image_sizes=None, prune: str | None = None) -> list[Tensor]:
        """One [n, C] per image: the features that replace its id among the token embeddings. images: the
        tiles [tiles, 3, size, size] of each image, normalized or in uint8; image_sizes: its original (height,
        width); prune: a name in PRUNING or "none", None: the config's."""
        prune = self.config.prune if prune is None else prune
        like = self.vision_tower.class_embedding                          # its device and dtype
        pixels = torch.cat(list(images)).to(like.device)                  # [N, 3, size, size]
        if pixels.dtype == torch.uint8:
            pixels = normalize(pixels)
        states = self.vision_tower(pixels.to(like.dtype), self.config.vision_feature_layer)
        if prune == "none":
            projected = self.projector(states[:, 1:])                     # [N, P, C], without CLS
        else:
            projected = self.reduce_tiles(pixels, states, prune)          # N times [n, C]
        features, start = [], 0
        for i, tiles in enumerate(images):
            parts = projected[start:start + len(tiles)]
            if self.config.image_mode == "anyres" and prune == "none":
                features.append(self.arrange_tiles(parts, image_sizes[i]))
            else:
                features.append(torch.cat(list(parts)))
            start += len(tiles)
        return features

    def reduce_tiles(self, pixels: Tensor, states: Tensor, prune: str) -> list[Tensor]:
        """The projected tokens [n, C] that the method `prune` keeps of each tile, from its pixels
        [N, 3, size, size] and the tower's states [N, 1+P, C]."""
        config = replace(self.config, prune=prune)                        # calls check_token_budget
        keep, projected = config.keep_tokens, []
        attention, keys = self.cls_attention(states) if prune in PRUMERGE else (None, None)
        for i, patches in enumerate(states[:, 1:]):                       # [P, C]
            if prune == "random":
                patches = patches[random_patches(pixels[i], keep, len(patches))]
            elif prune == "pool":
                patches = pool_patches(patches, keep)
            elif prune in PRUMERGE:
                patches = prumerge(attention[i], keys[i], tokens=keep, **PRUMERGE[prune]) @ patches
            tokens = self.projector(patches)
            if prune == "divprune":
                tokens = tokens[diverse_patches(tokens.detach(), keep)]
            projected.append(tokens)
        return projected

    def cls_attention(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [N, P] of the CLS token to each patch, and the keys [N, P, C], in the tower's last layer,
        which reads `states`. q and k form one head of width C, as in PruMerge's code."""
        layer = self.vision_tower.layers[-1]
        x = layer.layer_norm1(states)
        q, k = layer.self_attn["q_proj"](x[:, :1]), layer.self_attn["k_proj"](x)
        attention = (q @ k.mT * k.shape[-1] ** -0.5).softmax(-1)          # [N, 1, 1+P]
        return attention[:, 0, 1:], k[:, 1:]

    def arrange_tiles(self, tiles: Tensor, size: tuple[int, int]) -> Tensor:
        """AnyRes: tiles [1 + n, P, C], the whole image and its n parts -> the tokens of the first; then those
        of the parts as one map, row by row, without padding and with a newline after each row."""
        if len(tiles) == 1:                  # as in LLaVA's code; cut_tiles never gives only one
            return torch.cat((tiles[0], self.image_newline[None]))
        side, width = self.config.vision.side, choose_grid(size, self.config.grids)[0]   # patches, pixels
        x = tiles[1:].unflatten(0, (-1, width // self.config.vision.image_size))
        x = x.unflatten(2, (side, side)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        x = x[unpadded_patches(self.config, size)]                        # [rows, columns, C] of patches
        x = torch.cat((x, self.image_newline.expand(len(x), 1, -1)), dim=1)
        return torch.cat((tiles[0], x.flatten(0, 1)))

    def splice(self, input_ids, images=None, image_sizes=None, attention_mask=None, labels=None):
        """Replace each image id by the features of its image. input_ids [B, T] -> embeddings [B, T', C],
        right-padded with zeros; the rows' lengths [B]; and the labels [B, T'], IGNORE at image tokens, at
        padding, and everywhere if none are given. Ids, mask and labels may stay on the CPU, where they are
        read without waiting for a GPU."""
        embed = self.language_model.embed_tokens
        is_image = input_ids == self.config.image_token_id
        if (marks := int(is_image.sum())) != len(images or ()):
            raise UserError(f"the text has {marks} <image>, but {len(images or ())} images are given")
        features = self.encode_images(images, image_sizes) if images else []
        ids = input_ids.masked_fill(is_image, 0)                          # the image id can be V or more
        if (ids >= embed.num_embeddings).any():
            raise UserError(f"the token id {int(ids.max())} is not among the model's {embed.num_embeddings}: "
                            "the tokenizer is that of another model")
        text = embed(ids.to(embed.weight.device))                         # [B, T, C]
        if labels is None:
            labels = torch.full_like(input_ids, IGNORE)
        rows, label_rows, used = [], [], 0
        for b, row in enumerate(text.unbind()):
            length = len(row) if attention_mask is None else int(attention_mask[b].sum())
            parts, label_parts, start = [], [], 0
            for position in is_image[b].nonzero()[:, 0].tolist():
                parts += [row[start:position], features[used].to(row.dtype)]
                label_parts += [labels[b, start:position], labels.new_full((len(features[used]),), IGNORE)]
                start, used = position + 1, used + 1
            rows.append(torch.cat([*parts, row[start:length]]))
            label_rows.append(torch.cat([*label_parts, labels[b, start:length]]))
        lengths = torch.tensor([len(row) for row in rows], device=text.device)
        labels = pad_sequence(label_rows, batch_first=True, padding_value=IGNORE)
        return pad_sequence(rows, batch_first=True), lengths, labels

    def forward(self, input_ids, images=None, image_sizes=None, attention_mask=None, labels=None):
        """Logits [B, T', V] over the spliced, right-padded rows; with labels, only the mean loss. input_ids
        [B, T] has one image_token_id per image, in reading order; attention_mask [B, T] is False at
        padding, which is on the right; labels [B, T] are shifted here. With labels, logits are computed
        only at positions whose next token is supervised: each costs V numbers."""
        x, _, spliced_labels = self.splice(input_ids, images, image_sizes, attention_mask, labels)
        if labels is None:
            return self.language_model.lm_head(self.language_model(x))
        rows, columns = (spliced_labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        if len(rows) == 0:
            raise UserError(f"all labels are {IGNORE}, so there is nothing to learn: a record needs an "
                            "answer within --max-length")
        targets = spliced_labels[rows, columns + 1].to(x.device)
        select = rows.to(x.device), columns.to(x.device)
        logits = self.language_model.lm_head(self.language_model(x, select=select))      # [n, V]
        return F.cross_entropy(logits.float(), targets)

    @torch.inference_mode()
    def generate_tokens(self, input_ids, images=None, image_sizes=None, attention_mask=None,
                        max_new_tokens=256, temperature=0.0, top_p=1.0) -> Iterator[Tensor]:
        """Yield the next token [B] of every row, max_new_tokens times; see `sample` for temperature and
        top_p. The rows are right-padded; each continues at its own position."""
        x, lengths, _ = self.splice(input_ids, images, image_sizes, attention_mask)
        window = self.config.text.sliding_window
        slots = min(x.shape[1] + max_new_tokens, window or sys.maxsize)
        caches = [KVCache(slots, lengths, window) for _ in self.language_model.layers]
        last = torch.arange(len(x), device=x.device), lengths - 1
        hidden = self.language_model.prefill(x, caches, select=last)      # [B, C]
        decode_step = partial(self.language_model.decode_step, caches=caches)
        lm_head = self.language_model.lm_head
        if x.is_cuda:
            decode_step = ReplayedStep(decode_step)
        elif x.device.type == "cpu" and x.dtype == torch.bfloat16 and len(x) == 1:
            decode_step, lm_head = without_onednn(decode_step), without_onednn(lm_head)
        for i in range(max_new_tokens):
            token = sample(lm_head(hidden), temperature, top_p)
            yield token
            if i + 1 < max_new_tokens:
                x = self.language_model.embed_tokens(token)[:, None]                     # [B, 1, C]
                hidden = decode_step(x, positions=lengths + i)[:, 0]

    def generate(self, input_ids, images=None, image_sizes=None, eos_token_id: int | None = 2,
                 **sampling) -> Iterator[int]:
        """Yield the answer to one row token by token, up to eos_token_id (excluded; None: no end).
        `sampling`: max_new_tokens, temperature, top_p."""
        for tokens in self.generate_tokens(input_ids, images, image_sizes, **sampling):
            token = tokens.item()
            if token == eos_token_id:
                return
            yield token

    def generate_batch(self, input_ids, images=None, image_sizes=None, attention_mask=None,
                       eos_token_id: int | None = 2, **sampling) -> list[list[int]]:
        """What `generate` yields for each row, computed for all rows at once."""
        answers, active = [[] for _ in input_ids], set(range(len(input_ids)))
        for tokens in self.generate_tokens(input_ids, images, image_sizes, attention_mask, **sampling):
            tokens = tokens.tolist()
            active -= {row for row in active if tokens[row] == eos_token_id}
            for row in active:
                answers[row].append(tokens[row])
            if not active:
                break
        return answers

    @classmethod
    def from_pretrained(cls, path_or_repo_id=None, *, vision=None, language=None, dtype=torch.bfloat16,
                        device="cpu", quantize: str = "none", base=(), **overrides) -> Llava:
        """Open a LLaVA as llava-hf or liuhaotian publishes it, a run folder (see save_pretrained), or a CLIP
        and a language model with a newly initialized projector. Each is a folder, a hub id or id@revision.
        dtype None keeps the dtype of the files. quantize: "none", "int8" or "int4", see section 4. `base`:
        new places of a run folder's bases, in its order. `overrides` replace fields of LlavaConfig. Files are
        mapped and tensors cast, moved or quantized one at a time: there is never a second copy in memory."""
        if quantize not in ("none", "int8", "int4"):
            raise UserError(f"quantize is {quantize!r}; it must be none, int8 or int4")
        if quantize != "none" and dtype not in (torch.bfloat16, torch.float32):
            raise UserError(f"the layers of language_model in {quantize} work in bfloat16 and float32, not "
                            f"{dtype}: use --dtype bfloat16")
        sources = [source for source in (path_or_repo_id, vision, language) if source is not None]
        if sources not in ([path_or_repo_id], [vision, language]):
            raise UserError("name one LLaVA, or a vision tower and a language model")
        found, stored, bases = open_checkpoints(sources, moved=base)
        config, state = LlavaConfig(**found | overrides), {}
        with torch.device("meta"):
            model = cls(config)
        if vision:
            state = fresh_connector(config)
        elif config.image_mode == "anyres" and found.get("image_mode") != "anyres":      # an override
            state = {"image_newline": fresh_connector(config)["image_newline"]}
        if config.image_mode != "anyres":
            stored.pop("image_newline", None)                             # unused without AnyRes
        check_tensors(model.state_dict(), state, stored, " and ".join(bases))
        state = {name: tensor.to(device, dtype) for name, tensor in state.items()}
        for name in tqdm(list(stored), desc="opening", delay=2, leave=False):
            tensor = stored.pop(name).read(dtype)        # popped: a file is unmapped with its last tensor
            place_tensor(model, state, name, tensor, quantize, device, dtype)
        model.load_state_dict(state, assign=True)
        model.bases = bases
        return model

    def save_pretrained(self, folder, whole: bool = True, shard_bytes: int = 5 * 10**9) -> None:
        """Write the layout of llava-hf (llava, or with AnyRes llava_next), which transformers opens; in
        shards with an index if it is larger than shard_bytes. whole=False writes a run folder: only the
        trainable parameters, and in config.json the bases that hold the others."""
        if whole and any(isinstance(module, QuantizedLinear) for module in self.modules()):
            raise UserError("weights in 8 or 4 bits are not saved: open the model without quantize first")
        folder, config = Path(folder), hf_config(self.config, whole)
        if not whole:
            config["bases"] = self.bases
        folder.mkdir(parents=True, exist_ok=True)
        save_sharded(folder / "model.safetensors", self.hf_tensors(whole), shard_bytes)
        write_json(folder / "config.json", config)

    def hf_tensors(self, whole: bool) -> Iterator[tuple[str, Tensor]]:
        """Names of llava-hf and tensors on the CPU, one at a time; all, or the trainable parameters.
        Tensors that FSDP has sharded are gathered: then every process must iterate."""
        rows = hf_config(self.config, whole)["text_config"]["vocab_size"]
        for name, p in self.named_parameters():
            if not whole and not p.requires_grad:
                continue
            tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
            tensor = tensor.detach().cpu().contiguous()
            # Rows of <image> and <pad> are the mean row: their logit is the mean logit, never the largest.
            if whole and name in ("language_model.embed_tokens.weight", "language_model.lm_head.weight"):
                mean = tensor.float().mean(0).to(tensor.dtype)
                tensor = torch.cat((tensor, mean.expand(rows - len(tensor), -1)))
            yield rename_key(name, TO_HF), tensor
        if whole and self.config.projector == "linear":      # llava-hf always has a second layer
            bias = self.projector[0].bias.detach().cpu()
            yield "multi_modal_projector.linear_2.weight", torch.eye(len(bias), dtype=bias.dtype)
            yield "multi_modal_projector.linear_2.bias", torch.zeros(len(bias), dtype=bias.dtype)


def sample(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token [B] from logits [B, V]: the most probable one at temperature 0, otherwise a random one."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0         # keep the most probable tokens that together have top_p
    return order.gather(-1, torch.multinomial(p, 1))[:, 0]


def fresh_connector(config: LlavaConfig) -> dict[str, Tensor]:
    """Newly initialized tensors of the projector and, with AnyRes, image_newline."""
    small = Llava(replace(config, vision=replace(config.vision, num_hidden_layers=0),
                          text=replace(config.text, num_hidden_layers=0, vocab_size=1)))
    return {name: tensor for name, tensor in small.state_dict().items()
            if name.startswith(("projector.", "image_newline"))}


# ---------------------------------------------------------------------------------------------
# 7. Checkpoints: published layouts in, llava-hf's layout out

# Pattern at the start of a published key -> its replacement here. The first matching pattern wins;
# None: LLaVA does not need the tensor.
FROM_PUBLISHED = (
    (r"(text_model|text_projection|visual_projection|logit_scale)\b", None),  # CLIP's text side, loss
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
TO_HF = (                                    # from the names here to those of llava-hf
    (r"vision_tower\.(?=layers)", "vision_tower.vision_model.encoder."),
    (r"vision_tower\.(?=\w+_embedding)", "vision_tower.vision_model.embeddings."),
    (r"vision_tower\.", "vision_tower.vision_model."),
    (r"projector\.0\.", "multi_modal_projector.linear_1."),
    (r"projector\.2\.", "multi_modal_projector.linear_2."),
    (r"language_model\.(?!lm_head)", "language_model.model."),
)
# Files of a checkpoint that has only a part of the weights.
PARTS = ("adapter_model.safetensors", "adapter_model.bin", "mm_projector.bin", "non_lora_trainables.bin")
# Fields of LlavaConfig that llava-hf's keys do not fully determine; hf_config saves them as "llava.py".
EXTRA_FIELDS = ("projector", "image_mode", "grids", "hf_preprocessing", "template", "prune", "keep_tokens")
TEMPLATE_OF = {"mistral": "mistral_instruct", "llama": "v1"}
# Defaults of transformers for keys that config.json does not have: AnyRes grids as (height, width), and the
# fields of each part. They are not the values of the released models; for Mistral a missing sliding_window
# means 4096, a null one means none.
HF_GRIDS = {"llava": (), "llava_next": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))}
HF_DEFAULTS = {
    "mistral": TextConfig(rms_norm_eps=1e-6, rope_theta=1e4, sliding_window=4096,
                          max_position_embeddings=131072),
    "llama": TextConfig("llama", intermediate_size=11008, num_key_value_heads=32, rms_norm_eps=1e-6,
                        rope_theta=1e4, max_position_embeddings=2048),
    "clip": VisionConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                         num_attention_heads=12, image_size=224, patch_size=32),
}


def rename_key(name: str, table) -> str | None:
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return None if replacement is None else replacement + name[match.end():]
    return name


def fetch(source: str, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or the needed top-level files of a hub repository,
    downloaded or from the cache (HF_HUB_OFFLINE=1: only from the cache). Raises OSError."""
    if Path(source).is_dir():
        return Path(source)
    repo, _, revision = source.partition("@")
    download = partial(snapshot_download, repo, revision=revision or None, ignore_patterns="*/*")
    patterns = ["*.json", "model*.safetensors", *PARTS] if weights else ["*.json"]
    try:
        folder = Path(download(allow_patterns=patterns))
        if weights and not list(folder.glob("model*.safetensors")):
            download(allow_patterns=["pytorch_model*.bin"])
        return folder
    except Exception as error:               # OSError, and what httpx and hf_xet raise
        raise OSError(f"{source} is not a local folder and could not be downloaded: "
                      f"{first_line(error)}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(file: Path):
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OSError(f"{file} is missing") from None
    except (ValueError, RecursionError) as error:
        hint = ", perhaps it is JSON Lines" if "Extra data" in str(error) else ", or is cut off"
        raise UserError(f"{file} is not valid JSON{hint}: {first_line(error)}") from None


def require(raw: dict, where: Path | str, *keys: str, **supported) -> dict:
    """Return `raw`; raise UserError unless it is a JSON object with these keys and, where it has a key
    of `supported`, with one of the supported values."""
    if not isinstance(raw, dict):
        raise UserError(f"{where} is not a JSON object")
    if missing := [key for key in keys if key not in raw]:
        raise UserError(f"{where} has no {', '.join(missing)}")
    for key, values in supported.items():
        if key in raw and raw[key] not in values:
            wanted = " or ".join(map(repr, values))
            raise UserError(f"{where}: {key} is {raw[key]!r}; only {wanted} is supported")
    return raw


def write_json(file: Path, content) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(file)) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A temporary file name to write to; it replaces `file` only if the block succeeds."""
    if file.exists() and not file.is_file():         # a device such as /dev/stdout: written as it is
        yield file
        return
    file = file.resolve()                    # the file that a link names
    temporary = file.with_name(f".{file.name}.part")
    temporary.unlink(missing_ok=True)        # of a killed run: os.link in train.py needs a free name
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


class StoredTensor(NamedTuple):
    """A memory-mapped tensor of a checkpoint, and each LoRA over it as (a [r, I], b [O, r], scale)."""
    tensor: Tensor
    loras: list[tuple[Tensor, Tensor, float]]

    def read(self, dtype: torch.dtype | None) -> Tensor:
        """Without LoRA the tensor as stored, still mapped; with LoRA the sum, in `dtype` (None: its own)."""
        if not self.loras:
            return self.tensor
        change = sum(scale * (b.float() @ a.float()) for a, b, scale in self.loras)
        return (self.tensor.float() + change).to(dtype or self.tensor.dtype)


def open_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped. A pickle may contain tensors only: code is never run."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {key: tensors.get_tensor(key) for key in tensors.keys()}
        zipped = zipfile.is_zipfile(file)    # torch's format since 1.6; files of the older one are read
        tensors = torch.load(file, map_location="cpu", mmap=zipped, weights_only=True)
    except FileNotFoundError:
        raise OSError(f"{file} is missing") from None
    except UnpicklingError:
        raise OSError(f"{file} contains more than tensors, perhaps code: it is not opened") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise OSError(f"{file} is damaged or not a file of tensors: {first_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file} is not a dictionary of named tensors")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint: parts such as a projector, and the model in one file or in shards."""
    parts = [folder / name for name in PARTS if (folder / name).exists()]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := folder / f"{name}.index.json").exists():
            shards = require(read_json(index), index, "weight_map")["weight_map"]
            if not isinstance(shards, dict) or any(Path(str(x)).name != x for x in shards.values()):
                raise UserError(f"{index}: weight_map names something that is not a file of the same folder")
            return parts + [folder / shard for shard in sorted(set(shards.values()))]
        if (folder / name).exists():
            return parts + [folder / name]
    return parts


def open_checkpoint(source: str, weights: bool = True, moved=(), dependents=()
                    ) -> tuple[dict, dict[str, StoredTensor], str]:
    """Return the LlavaConfig fields, the tensors by the names here, and the folder's path or id@commit. A
    checkpoint that is only a part (a run folder, a projector, LoRA, a LLaVA without its tower) names its
    bases in its configs. They are opened first, and its own tensors and fields replace theirs. Without
    `weights` only configs are read. `moved`: new places of a run folder's bases; `dependents`: the
    checkpoints that are being opened and need this one."""
    folder = fetch(source, weights)
    name = str(folder.resolve())
    if not Path(source).is_dir():            # the hub's cache names a folder after its commit
        name = f"{source.partition('@')[0]}@{folder.name}"
    if name in dependents:
        raise UserError(f"{name} is named as a base of itself in its config.json")
    config_file, adapter, tensors = folder / "config.json", read_adapter(folder), {}
    raw = require(read_json(config_file), config_file)
    check_types(raw, config_file)
    for file in weight_files(folder) if weights else []:
        for key, tensor in open_file(file).items():
            if ours := rename_key(key.removeprefix("base_model.model."), FROM_PUBLISHED):
                tensors[ours] = tensor
    bases = name_bases(folder, raw, adapter, tensors, weights, list(moved))
    movable = "bases" in raw and not dependents          # --base names the bases of the opened folder
    remedy = "give the new place of every base with --base" if movable else f"correct {config_file}"
    found, stored = open_bases(folder, bases, remedy, (*dependents, name))
    own = read_config(raw, config_file)
    for part in ("vision", "text"):
        if "bases" in raw and found.get(part, own[part]) != own[part]:
            raise UserError(f"{folder} was trained on a base with another {part} model than "
                            f"{' and '.join(moved or raw['bases'])}")
    found |= own
    stored |= {key: StoredTensor(tensor, []) for key, tensor in tensors.items() if "lora_" not in key}
    add_lora(stored, tensors, adapter, folder)
    embedding = stored.get("language_model.embed_tokens.weight")
    if embedding is not None and raw.get("text_config", raw).get("tie_word_embeddings", False):
        copy = StoredTensor(embedding.tensor.clone(), [])    # tied, but each may be trained
        stored.setdefault("language_model.lm_head.weight", copy)
    if found.get("projector") == "linear":   # the second layer that hf_tensors adds is the identity
        check_identity(tensors.get("projector.2.weight"), tensors.get("projector.2.bias"), folder)
        stored = {key: t for key, t in stored.items() if not key.startswith("projector.2.")}
    return found, stored, name


def check_identity(weight: Tensor | None, bias: Tensor | None, folder: Path) -> None:
    trained = weight is not None and not torch.equal(weight, torch.eye(*weight.shape, dtype=weight.dtype))
    if trained or bias is not None and bias.any():
        raise UserError(f"{folder}: the second layer of its linear projector is not the identity")


def open_bases(folder: Path, bases: dict[str, bool], remedy: str, dependents
               ) -> tuple[dict, dict[str, StoredTensor]]:
    """The fields and tensors of all bases of `folder`, see open_checkpoint."""
    found, stored = {}, {}
    for base, needed in bases.items():
        try:
            base_fields, base_stored, _ = open_checkpoint(base, needed, dependents=dependents)
        except OSError as error:
            if Path(base).is_dir():          # it is there: the error names what is wrong in it
                raise
            raise OSError(f"{folder} needs its base {base}, which is named in its config and cannot be "
                          f"opened ({first_line(error)}): {remedy}") from None
        found, stored = found | base_fields, stored | base_stored
    return found, stored


def open_checkpoints(sources: list, weights: bool = True, moved=()
                     ) -> tuple[dict, dict[str, StoredTensor], list[str]]:
    """Like open_checkpoint, of one LLaVA, or of a vision tower and a language model."""
    found, stored, names = {}, {}, []
    for source in sources:
        more, tensors, name = open_checkpoint(str(source), weights, moved)
        if len(sources) > 1 and {"vision", "text"} <= more.keys():
            raise UserError(f"{source} is a whole LLaVA, which is named alone, not a part of one")
        found, stored, names = found | more, stored | tensors, [*names, name]
    if missing := {"vision", "text"} - found.keys():
        raise UserError(f"there is no {' or '.join(missing)} model in {' and '.join(names)}: name both, "
                        "a vision tower and a language model, which train.py makes a LLaVA of")
    return found, stored, names


def read_adapter(folder: Path) -> dict:
    """The adapter_config.json of a folder with LoRA, as PEFT writes it; {} without LoRA."""
    if not list(folder.glob("adapter_*")):
        return {}
    file = folder / "adapter_config.json"
    adapter = require(read_json(file), file, "r", "lora_alpha", "base_model_name_or_path",
                      use_rslora=(False,), use_dora=(False,), lora_bias=(False,),
                      rank_pattern=({}, None), alpha_pattern=({}, None))
    if not all(isinstance(adapter[x], int | float) and adapter[x] > 0 for x in ("r", "lora_alpha")):
        raise UserError(f"{file}: r and lora_alpha must be positive numbers")
    return adapter


def add_lora(stored: dict[str, StoredTensor], own: dict[str, Tensor], adapter: dict, folder: Path) -> None:
    """Add the LoRA tensors of `own` to the stored tensors that they change."""
    pairs = {key: key.replace("lora_A", "lora_B") for key in own if key.endswith("lora_A.weight")}
    known = {*pairs, *pairs.values()}
    if unknown := [key for key in own if "lora_" in key and (key not in known or not adapter)]:
        raise UserError(f"{folder}: {unknown[0]} is not a LoRA as PEFT saves it, with adapter_config.json")
    for key_a, key_b in pairs.items():
        a, b, target = own[key_a], own.get(key_b), key_a.replace("lora_A.", "")
        if b is None or target not in stored or (b.shape[0], a.shape[1]) != stored[target].tensor.shape:
            raise UserError(f"{folder}: {key_a} has no matching lora_B, or no matching weight in the base")
        stored[target].loras.append((a, b, adapter["lora_alpha"] / adapter["r"]))        # after a base's own


def name_bases(folder: Path, raw: dict, adapter: dict, own: dict[str, Tensor], weights: bool,
               moved: list[str]) -> dict[str, bool]:
    """The checkpoints that complete `folder`, each with whether its weights are needed."""
    named = list(map(str, raw.get("bases", [])))
    if moved and len(moved) != len(named):
        raise UserError(f"{folder} has {len(named)} bases ({', '.join(named) or 'none'}), but --base names "
                        f"{len(moved)}: name each once, in this order")
    bases = dict.fromkeys(moved or named, weights)
    if "mm_vision_tower" in raw:             # liuhaotian: 1.6 contains the tower's weights, not its config
        complete = {key.split(".")[0] for key in own if ".layers." in key and "lora_" not in key}
        bases[raw["mm_vision_tower"]] = weights and "vision_tower" not in complete
        if weights and "language_model" not in complete:
            if not adapter.get("base_model_name_or_path"):
                require(raw, folder / "config.json", "_name_or_path")
            bases[adapter.get("base_model_name_or_path") or raw["_name_or_path"]] = True
    return bases


def check_tensors(expected, fresh, stored: dict[str, StoredTensor], where: str) -> None:
    """Raise one UserError that lists all tensors that are missing, unexpected or of the wrong shape."""
    wrong = [f"{n} is missing" for n in expected if n not in stored and n not in fresh]
    for n, t in stored.items():
        if n not in expected:
            wrong.append(f"{n} is not part of the model")
        elif t.tensor.shape != expected[n].shape:
            wrong.append(f"{n} is {list(t.tensor.shape)} instead of {list(expected[n].shape)}")
    if wrong:
        raise UserError(f"{where} does not contain the model that its config describes: {'; '.join(wrong)}")


def read_config(raw: dict, file: Path) -> dict:
    """The fields of LlavaConfig that a publisher's config.json determines."""
    kind = raw.get("model_type", "")
    if kind in ("clip", "clip_vision_model"):
        return {"vision": parse_config("clip", raw.get("vision_config", raw), file, nested=kind == "clip")}
    if "text_config" in raw and kind in ("llava", "llava_next"):
        found = read_hf_config(raw, file)
    elif "mm_vision_tower" in raw:
        found = read_liuhaotian_config(raw, file)
    elif kind in TEMPLATE_OF:
        text = parse_config(kind, raw, file, nested=False)
        found = {"text": text, "image_token_id": text.vocab_size}
    else:
        raise UserError(f"{file}: model_type {kind!r} is none of llava, llava_next, mistral, llama and clip")
    ours = raw.get("llava.py", {})
    if unknown := ours.keys() - EXTRA_FIELDS:
        raise UserError(f"{file}: llava.py has no field {min(unknown)}")
    found = {"template": TEMPLATE_OF[found["text"].model_type]} | found | ours
    return found | {"grids": tuple(read_grids(found.get("grids"), file))}


def read_grids(grids, file: Path) -> list[tuple[int, int]]:
    try:                                     # liuhaotian's files also have them as a text
        return [(int(a), int(b)) for a, b in (json.loads(grids) if isinstance(grids, str) else grids or ())]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: the AnyRes grids {grids!r} are not pairs of whole numbers") from None


def check_types(raw: dict, file: Path) -> None:
    """Raise UserError for a key whose value has the wrong JSON type."""
    types = {"model_type": str, "mm_vision_tower": str, "bases": list, "image_token_index": int,
             "image_token_id": int, "text_config": dict, "vision_config": dict, "llava.py": dict,
             "rope_parameters": dict | None, "rope_scaling": dict | None}
    for key, type_ in types.items():
        if key in raw and not isinstance(raw[key], type_):
            raise UserError(f"{file}: {key} is {raw[key]!r}, which is of the wrong type")


def read_hf_config(raw: dict, file: Path) -> dict:
    require(raw, file, "vision_config", vision_feature_select_strategy=("default",),
            vision_feature_layer=(-2, -1),
            projector_hidden_act=("gelu", "linear") if "llava.py" in raw else ("gelu",))
    kind = raw["model_type"]
    text = require(raw["text_config"], f"{file}, text_config", model_type=("mistral", "llama"))
    return {"text": parse_config(text.get("model_type", "llama"), text, file, nested=True),
            "vision": parse_config("clip", raw["vision_config"], file, nested=True),
            "image_token_id": raw.get("image_token_index", raw.get("image_token_id", 32000)),
            "vision_feature_layer": raw.get("vision_feature_layer", -2), "hf_preprocessing": True,
            "image_mode": "anyres" if kind == "llava_next" else "crop",
            "grids": [(w, h) for h, w in read_grids(raw.get("image_grid_pinpoints", HF_GRIDS[kind]), file)]}


def read_liuhaotian_config(raw: dict, file: Path) -> dict:
    mode = raw.get("image_aspect_ratio", "square")
    require(raw, file, mm_vision_select_feature=("patch",), mm_use_im_start_end=(False,),
            mm_vision_select_layer=(-2, -1), mm_projector_type=("linear", "mlp2x_gelu"),
            image_aspect_ratio=("square", "pad", "anyres"),
            mm_patch_merge_type=("spatial_unpad",) if mode == "anyres" else ("flat",))
    kind = "mistral" if "mistral" in raw.get("model_type", "") else "llama"
    text = parse_config(kind, raw, file, nested=False)
    return {"text": text, "image_token_id": text.vocab_size,
            "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
            "projector": raw.get("mm_projector_type", "linear"),
            "image_mode": "crop" if mode == "square" else mode,
            "grids": raw.get("image_grid_pinpoints")}


def parse_config(kind: str, raw: dict, file: Path, nested: bool) -> TextConfig | VisionConfig:
    """The dataclass of a config.json; only a nested config may leave out sizes, as in transformers."""
    check_types(raw, file)
    default = HF_DEFAULTS[kind]
    # transformers 5 nests rope_theta and rope_type in rope_parameters, older files a type in rope_scaling.
    raw = raw | (raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    require(raw, file, rope_type=("default",), type=("default",),
            hidden_act=("quick_gelu",) if kind == "clip" else ("silu",))
    found = {name: raw[name] for name in vars(default) if name in raw and name != "model_type"
             and (raw[name] is not None or name == "sliding_window")}
    if not nested:
        require(found, file, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for name, value in found.items():
        types, what = (int,), "whole number"
        if isinstance(getattr(default, name), float):
            types, what = (int, float), "number"
        if value is not None and (type(value) not in types or not 0 < value < math.inf):
            raise UserError(f"{file}: {name} is {value!r}; it must be a positive {what}")
    heads = found.get("num_attention_heads", default.num_attention_heads)
    if kind == "llama":
        found.setdefault("num_key_value_heads", heads)
    if kind != "clip":
        found.setdefault("head_dim", found.get("hidden_size", default.hidden_size) // heads)
    config = replace(default, **found)
    if kind != "clip" and config.head_dim % 2:
        raise UserError(f"{file}: head_dim is {config.head_dim}, but rotary embeddings need an even size")
    large, small = (("hidden_size", "num_attention_heads") if kind == "clip" else
                    ("num_attention_heads", "num_key_value_heads"))
    a, b = getattr(config, large), getattr(config, small)
    if a % b:
        raise UserError(f"{file}: {large} is {a}, which is not a multiple of {small}, {b}")
    return config


def hf_config(config: LlavaConfig, whole: bool) -> dict:
    """llava-hf's config.json for transformers 4 and 5, with EXTRA_FIELDS; if `whole`, rows for <image>."""
    anyres, text = config.image_mode == "anyres", asdict(config.text)
    if whole and config.image_token_id >= config.text.vocab_size:         # + <image>, <pad>, rounded up
        text["vocab_size"] = math.ceil((config.image_token_id + 2) / 64) * 64
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.text.rope_theta},
             "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    return {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "model_type": "llava_next" if anyres else "llava",
        "image_token_index": config.image_token_id, "image_seq_length": config.vision.side**2,
        "image_grid_pinpoints": [(h, w) for w, h in config.grids],
        "projector_hidden_act": "linear" if config.projector == "linear" else "gelu",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False, "text_config": text,
        "vision_config": {**asdict(config.vision), "model_type": "clip_vision_model",
                          "hidden_act": "quick_gelu", "projection_dim": 768},
        "llava.py": {name: getattr(config, name) for name in EXTRA_FIELDS}}


def save_sharded(file: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write named tensors to a safetensors file, or if they exceed shard_bytes to shards with an index, as
    the hub does. Tensors are taken one at a time, so host memory holds one shard more than the model itself.
    All files get their names only when the last shard is written."""
    parts, shard, size, part_of, total = [], {}, 0, {}, 0
    index = file.with_name(f"{file.name}.index.json")

    def write_part() -> None:
        parts.append(file.with_name(f".{file.stem}.{len(parts) + 1}.part"))
        save_file(shard, parts[-1], metadata={"format": "pt"})
        mask = os.umask(0)                   # safetensors makes files for their owner alone
        os.umask(mask)
        parts[-1].chmod(0o666 & ~mask)
        part_of.update(dict.fromkeys(shard, len(parts) - 1))
        shard.clear()

    try:
        for name, tensor in tqdm(tensors, desc=f"saving {file.stem}", unit="tensor", delay=2, leave=False):
            if shard and size + tensor.nbytes > shard_bytes:
                write_part()
                size = 0
            shard[name], size, total = tensor, size + tensor.nbytes, total + tensor.nbytes
        write_part()
        if len(parts) == 1:
            os.replace(parts[0], file)
            index.unlink(missing_ok=True)    # the index of earlier shards
            return
        names = [f"{file.stem}-{i + 1:05}-of-{len(parts):05}{file.suffix}" for i in range(len(parts))]
        for part, name in zip(parts, names):
            os.replace(part, file.with_name(name))
        write_json(index, {"metadata": {"total_size": total},
                           "weight_map": {key: names[i] for key, i in part_of.items()}})
        file.unlink(missing_ok=True)         # an earlier single file, which transformers would prefer
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# 8. Preprocessing: images and conversations to tensors

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(file: Path) -> Image.Image:
    """The first frame in its own mode: cut_tiles converts it, differently for each publisher. OSError if it
    is missing, damaged, or so large or so narrow that, decoded and padded, it could fill the memory."""
    try:
        with Image.open(file) as image:
            if max(image.size) > min(13_000, 500 * min(image.size)):      # 0.5 GB as a padded square
                raise ValueError(f"{image.width} x {image.height} pixels are too many or too narrow")
            if image.format == "EPS":
                raise ValueError("EPS is a program, which is not executed")
            return image.copy()
    except FileNotFoundError:
        raise OSError(f"there is no image {file}") from None
    except MemoryError:                      # is not the image's fault
        raise
    except Exception as error:               # Pillow's decoders raise errors of many types
        raise OSError(f"{file} is not a readable image: {first_line(error)}") from None


def is_writable_image(file) -> bool:
    return Image.registered_extensions().get(Path(file).suffix.lower()) in Image.SAVE


def cut_tiles(image: Image.Image, config: LlavaConfig) -> list[Image.Image]:
    """An image as RGB squares of image_size, with AnyRes the whole image first; resized bicubically in
    8 bits, as for CLIP's training."""
    # transformers shows a transparent image on white; LLaVA's code drops the transparency.
    if config.hf_preprocessing and ("A" in image.getbands() or "transparency" in image.info):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    size, (w, h) = config.vision.image_size, image.size
    if config.image_mode == "pad":           # to a square of CLIP's mean color, int() as in LLaVA
        canvas = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * mean) for mean in CLIP_MEAN))
        canvas.paste(image, ((canvas.width - w) // 2, (canvas.height - h) // 2))
        return [canvas.resize((size, size), Image.BICUBIC)]
    if config.image_mode == "crop":          # the center
        w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        left, top = (w - size) // 2, (h - size) // 2
        return [image.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size))]
    width, height = choose_grid((h, w), config.grids)
    if width / w < height / h:               # the grid's width decides the scale
        inner = width, min(math.ceil(h * (width / w)), height)
    else:
        inner = min(math.ceil(w * (height / h)), width), height
    canvas = Image.new("RGB", (width, height))                            # black
    canvas.paste(image.resize(inner, Image.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    corners = [(x, y) for y in range(0, height, size) for x in range(0, width, size)]
    tiles = [canvas.crop((x, y, x + size, y + size)) for x, y in corners]
    return [image.resize((size, size), Image.BICUBIC), *tiles]


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, size, size] -> float32 with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(c, device=pixels.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return (pixels.float() / 255 - mean) / std       # multiplying by 1 / 255 would differ in the last bit


SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


def render(messages: list[dict], template: str) -> list[tuple[str, bool]]:
    """Text pieces of a conversation, each with whether it is supervised; "<image>" and "</s>" are pieces of
    their own. As in LLaVA's code, a single <image> moves to the front of its message, and an answer ends
    with a line break (plain), " </s>" (mistral_instruct) or "</s>" (v1)."""
    pieces = []
    if template == "plain" and len(messages) > 2:
        raise UserError("the template plain is for one image and its caption, not for a conversation: use "
                        "--template mistral_instruct or v1")
    for i, message in enumerate(messages):
        text, role = message["content"], ("user", "assistant")[i % 2]
        if message["role"] != role:
            raise UserError(f"message {i + 1} has the role {message['role']}: user and assistant alternate")
        if role == "assistant":
            pieces.append((text + {"plain": "\n", "mistral_instruct": " ", "v1": ""}[template], True))
            if template != "plain":
                pieces.append(("</s>", True))
            continue
        if text.count("<image>") == 1:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        if template == "plain":              # stage 1: the image and its caption, no question
            text = "<image>" * text.count("<image>")
        elif template == "mistral_instruct":
            text = f"[INST] {text} [/INST]"
        else:
            system = f"{SYSTEM} " if i == 0 else ""
            text = f"{system}USER: {text} ASSISTANT:"
        pieces += [(piece, False) for piece in re.split("(<image>)", text)]
    return pieces


class Processor:
    """Conversations and images to tensors, token ids to text. The template of a run of stage 1, "plain", has
    no question: to ask one, open the run with template="v1" or "mistral_instruct"."""

    def __init__(self, tokenizer_json: str, config: LlavaConfig, legacy: bool = True):
        self.config, self.tokenizer_json, self.legacy = config, tokenizer_json, legacy
        try:
            raw = json.loads(tokenizer_json) # drop <image> and <pad>: in a question they are plain text
            raw["added_tokens"] = [t for t in raw.get("added_tokens", ()) if t["id"] < config.image_token_id]
            self.tokenizer = Tokenizer.from_str(json.dumps(raw))
        except Exception as error:           # tokenizers raises nothing more specific
            raise UserError(f"the tokenizer cannot be read: {first_line(error)}") from None
        self.bos, self.eos = map(self.tokenizer.token_to_id, ("<s>", "</s>"))
        if None in (self.bos, self.eos):
            raise UserError("the tokenizer has no <s> or no </s>: it is not one of LLaMA or Mistral")
        self.tokenizer.normalizer = normalizers.Replace(" ", "\u2581")   # self.encode adds the first one
        self.tokenizer.pre_tokenizer = None

    @classmethod
    def from_pretrained(cls, path_or_repo_id, config: LlavaConfig | None = None) -> Processor:
        """The processor of a folder or hub id; `config`: its model's, None: that of the same folder."""
        folder, settings = fetch(str(path_or_repo_id), weights=False), {}
        file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if config is None:
            config = LlavaConfig(**open_checkpoint(str(path_or_repo_id), weights=False)[0])
        if not file.exists():
            example = {"mistral": "mistralai/Mistral-7B-Instruct-v0.2", "llama": "llava-hf/llava-1.5-7b-hf"}
            raise OSError(f"{path_or_repo_id} has no tokenizer.json: name a repository of the same language "
                          f"model that has it, such as --tokenizer {example[config.text.model_type]}")
        if settings_file.exists():
            settings = require(read_json(settings_file), settings_file)
        try:
            return cls(file.read_text(encoding="utf-8"), config, settings.get("legacy") is not False)
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {first_line(error)}") from None

    def encode(self, text: str, prefix_space: bool = True) -> list[int]:
        """Token ids of a text, with a space in front, as SentencePiece has it."""
        if prefix_space and text:
            text = "\u2581" + text
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError(f"{text!r} has half of a surrogate pair, which is no character") from None

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def pixels(self, image: Image.Image) -> Tensor:
        """uint8 [tiles, 3, image_size, image_size]; in train.py encode_images normalizes them."""
        tiles = np.stack([np.asarray(tile) for tile in cut_tiles(image, self.config)])
        return torch.from_numpy(tiles).permute(0, 3, 1, 2)

    def tokenize(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Token ids, and labels: the ids of the assistant's text and of its end, elsewhere IGNORE."""
        ids, labels, ended = [self.bos], [IGNORE], False
        special = {"<image>": self.config.image_token_id, "</s>": self.eos}
        for text, supervised in render(messages, self.config.template):
            if text in special:
                piece = [special[text]]
            else:                            # legacy tokenizers add a space after </s>, too
                piece = self.encode(text, prefix_space=self.legacy or not ended)
            ended = text == "</s>"
            ids += piece
            labels += piece if supervised else [IGNORE] * len(piece)
        return ids, labels

    def __call__(self, messages: list[dict], images=(), labels: bool = False) -> dict:
        """messages [{"role": "user" | "assistant", "content": "<image>\\nWhat is it?"}, ...] and PIL
        images in reading order -> input_ids [1, T], images, image_sizes and, if asked for, labels
        [1, T], all as Llava takes them."""
        ids, targets = self.tokenize(messages)
        if (marks := ids.count(self.config.image_token_id)) != len(images):
            raise UserError(f"the text has {marks} <image>, but {len(images)} images are given")
        inputs = {"input_ids": torch.tensor([ids]),
                  "images": [normalize(self.pixels(image)) for image in images],
                  "image_sizes": [(image.height, image.width) for image in images]}
        if labels:
            inputs["labels"] = torch.tensor([targets])
        return inputs

    def save_pretrained(self, folder) -> None:
        """Write the tokenizer, with <image> and <pad>, and the files that transformers' processors need."""
        size, mode = self.config.vision.image_size, self.config.image_mode
        kind = "LlavaNext" if mode == "anyres" else "Llava"
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        gap = range(tokenizer.get_vocab_size(), self.config.image_token_id)          # ids without a token
        tokenizer.add_special_tokens([*(f"<unused{i}>" for i in gap), "<image>", "<pad>"])
        if tokenizer.encode("").ids != [self.bos]:           # then transformers would begin without <s>
            tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", self.bos)])
        write_json(Path(folder) / "tokenizer.json", json.loads(tokenizer.to_str()))
        write_json(Path(folder) / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "legacy": self.legacy, "bos_token": "<s>",
            "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"})
        write_json(Path(folder) / "preprocessor_config.json", {
            "image_processor_type": f"{kind}ImageProcessor", "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size}, "do_pad": mode != "crop", "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD, "image_grid_pinpoints": [(h, w) for w, h in self.config.grids]})
        write_json(Path(folder) / "processor_config.json", {
            "processor_class": f"{kind}Processor", "patch_size": self.config.vision.patch_size,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"})


# ---------------------------------------------------------------------------------------------
# 9. The command line

def command_line(main) -> None:
    """Run a program; a mistake of its user ends with one sentence and exit code 1."""
    program = Path(sys.argv[0]).name
    try:
        main()
    except BrokenPipeError:                  # the reader of the output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())       # for what is still buffered
        sys.exit(141)
    except (UserError, OSError, SafetensorError) as error:
        sys.exit(f"{program}: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{program}: the device is out of memory ({first_line(error)}): use --quantize int4, "
                 "--image-mode pad or a smaller --batch-size")
    except KeyboardInterrupt:
        sys.exit(130)


def check_outputs(parser: argparse.ArgumentParser, outputs: Iterable, inputs: Iterable) -> None:
    """Exit with code 2 if a file to write is also named by another flag; OSError if it is a folder."""
    written, read = ([os.path.abspath(file) for file in files if file] for files in (outputs, inputs))
    for file in written:
        if (written + read).count(file) > 1:
            parser.error(f"{file} is named by another flag, too, and would be overwritten")
        if os.path.isdir(file):
            raise OSError(f"{file} is a folder, not the name of a file to write")


def number(kind: type, least: float, most: float = math.inf):
    """An argparse type: an int or float from `least` to `most`."""
    def parse(text: str) -> int | float:
        value = kind(text)                   # argparse reports the ValueError
        if not least <= value <= most or value == math.inf:
            limit = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"          # argparse prints it
    return parse


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that opens a model."""
    add = parser.add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--tokenizer", metavar="ID", help="folder or hub id with the tokenizer.json, if the model has none")
    add("--base", action="append", default=[], metavar="ID",
        help="new place of a base that a run folder names; once for each, in the order of its config.json")
    add("--image-mode", choices=("pad", "crop"), help="default: the model's")
    add("--template", choices=("plain", "mistral_instruct", "v1"),
        help="default: the model's; after stage 1, whose template has no question, its language model's")
    add("--prune", choices=("none", *PRUNING), help="reduce the tokens of each tile (default: the model's)")
    add("--keep-tokens", type=number(int, 1), metavar="N",
        help=f"tokens to keep of each tile, with --prune {', '.join(BUDGETED)}")
    add("--quantize", default="none", choices=("none", "int8", "int4"),
        help="store the linear layers of the language model in 8 or 4 bits (default: %(default)s)")
    add("--device", default=device, choices=devices(), help="default: %(default)s")
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="default: bfloat16 with --quantize or on a GPU that has it, float16 on others, float32 on a CPU")


def devices() -> list[str]:
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(["cuda"] if gpus else []), *mps, *gpus]


def default_dtype(device: str, quantize: str) -> str:
    has_bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    if quantize != "none" or has_bf16:
        return "bfloat16"
    return "float32" if device == "cpu" else "float16"


def load_model(args: argparse.Namespace) -> tuple[Llava, Processor]:
    """The model and the processor that the flags of add_model_flags name; sets args.dtype."""
    args.dtype = args.dtype or default_dtype(args.device, args.quantize)
    model = Llava.from_pretrained(args.model, dtype=getattr(torch, args.dtype), device=args.device,
                                  quantize=args.quantize, base=args.base, **config_overrides(args))
    if args.template is None and model.config.template == "plain":        # of stage 1: it drops the question
        model.config = replace(model.config, template=TEMPLATE_OF[model.config.text.model_type])
    return model.eval(), Processor.from_pretrained(args.tokenizer or args.model, model.config)


def config_overrides(args: argparse.Namespace) -> dict:
    """The fields of LlavaConfig that flags replace; a --prune that takes no budget drops the model's."""
    names = ("projector", "image_mode", "template", "prune", "keep_tokens")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    return given if given.get("prune") in (None, *BUDGETED) else {"keep_tokens": None} | given


def stream_answer(model: Llava, processor: Processor, messages, images, **sampling) -> str:
    """Print the answer to a conversation while it is generated, and return it."""
    ids, text, shown, limit = [], "", 0, model.config.text.max_position_embeddings
    inputs = processor(messages, images)
    image_tokens = sum(count_image_tokens(model.config, size) - 1 for size in inputs["image_sizes"])
    if (tokens := inputs["input_ids"].shape[1] + image_tokens) > limit:
        print(f"the conversation has {tokens} tokens, but the model was made for {limit}: the answer may be "
              "useless", file=sys.stderr)
    for token in model.generate(**inputs, eos_token_id=processor.eos, **sampling):
        ids.append(token)
        text = processor.decode(ids)
        if not text.endswith("\ufffd"):      # an incomplete UTF-8 character waits for its other bytes
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(text[shown:])
    return text


def read_question() -> str:
    try:
        return input("> ").strip()           # an empty line ends the conversation
    except EOFError:
        return ""


def record_calls(model: Llava, inputs: dict, modules, reading) -> tuple[list, np.ndarray]:
    """Calls (module, output) of `modules` in the prefill and one decode step, and for each the increase of
    reading() between the end of the previous call and its own end."""
    calls, readings = [], []

    def record(module: nn.Module, _, y: Tensor) -> None:
        if y.device.type != "cpu":
            torch.accelerator.synchronize(y.device)
        calls.append((module, y))
        readings.append(reading())

    with ExitStack() as hooks:               # it removes them at its end
        for module in modules:
            hooks.enter_context(module.register_forward_hook(record))
        readings.append(reading())           # before the first module
        list(model.generate(**inputs, max_new_tokens=2, eos_token_id=None))
    return calls, np.diff(readings)


def print_trace(model: Llava, inputs: dict) -> None:
    """Print shape, dtype, parameters, FLOPs and time of every layer, and the attention kernels."""
    pattern = r"projector|\w+\.(patch_embedding|pre_layrnorm|embed_tokens|layers\.\d+|norm|lm_head)"
    name_of = {module: name for name, module in model.named_modules() if re.fullmatch(pattern, name)}
    ops = torch.ops.aten
    cpu_attention = ops._scaled_dot_product_flash_attention_for_cpu
    packed = ops._weight_int8pack_mm, ops._weight_int4pack_mm_for_cpu, ops._weight_int4pack_mm
    counter = FlopCounterMode(display=False, custom_mapping={             # not known to torch 2.13
        cpu_attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),           # of these shapes
        **dict.fromkeys(packed, lambda shape, *_, out_shape, **__: 2 * math.prod(shape) * out_shape[-1])})

    def print_row(name: str, shape, *cells) -> None:
        cells = (f"{str(cell).removeprefix('torch.'):>14}" for cell in cells)
        print(f"{name:33}{str(shape):>20}", *cells, sep="")

    with counter:                            # in a pass of its own, because counting slows it down
        calls, flops = record_calls(model, inputs, name_of, counter.get_total_flops)
    _, seconds = record_calls(model, inputs, name_of, time.perf_counter)
    print_row("module", "shape", "dtype", "parameters", "GFLOP", "ms", "bits of each", "MB")
    for tiles, (height, width) in zip(inputs["images"], inputs["image_sizes"]):
        print_row(f"image {width} x {height}", list(tiles.shape), tiles.dtype)
    print_row("input_ids", list(inputs["input_ids"].shape), inputs["input_ids"].dtype)
    for (module, y), gflop, ms in zip(calls, flops / 1e9, 1e3 * seconds):
        weights, size = count_weights(module)
        print_row(name_of[module], list(y.shape), y.dtype, f"{weights:,}", f"{gflop:.3f}", f"{ms:.2f}",
                  f"{8 * size / max(1, weights):.1f}", f"{size / 1e6:,.1f}")
    kernels = {str(op) for op in counter.get_flop_counts()["Global"] if "attention" in str(op)}
    print(f"attention kernels: {', '.join(sorted(kernels)) or 'none'}\n")


@torch.inference_mode()
def draw_kept_patches(model: Llava, tiles: Tensor) -> Image.Image:
    """What token reduction keeps of the tiles of an image, uint8 [N, 3, size, size], one row a tile. Left:
    kept patches clear, the others dark, with PruMerge in the color of the first kept patch that they are
    merged into. Right: the attention of the CLS token."""
    size, side, config = tiles.shape[-1], model.config.vision.side, model.config
    like, keep = model.vision_tower.class_embedding, config.keep_tokens
    pixels, canvas = normalize(tiles.to(like.device)), Image.new("RGB", (2 * size, len(tiles) * size))
    states = model.vision_tower(pixels.to(like.dtype), config.vision_feature_layer)
    attentions, all_keys = model.cls_attention(model.vision_tower(pixels.to(like.dtype)))

    def enlarge(patches: Tensor) -> Image.Image:                          # [P] or [P, 3] of 0...255
        values = patches.byte().cpu().unflatten(0, (side, side)).numpy()
        return Image.fromarray(values).resize((size, size), Image.NEAREST)

    for i, (tile, attention, keys) in enumerate(zip(tiles, attentions, all_keys)):
        colors = torch.full((side**2, 3), 96)
        if config.prune == "random":
            kept = random_patches(pixels[i], keep, side**2)
        elif config.prune == "divprune":
            kept = diverse_patches(model.projector(states[i, 1:]), keep)
        else:
            variant = PRUMERGE[config.prune]
            kept = choose_patches(attention, tokens=keep, **variant)
            merged = prumerge(attention, keys, tokens=keep, **variant)[:len(kept)].cpu() > 0     # [m, P]
            hues = [ImageColor.getrgb(f"hsl({137 * n % 360}, 80%, 50%)") for n in range(len(kept))]
            colors = torch.tensor(hues)[merged.int().argmax(0)].where(merged.any(0)[:, None], colors)
        mask = torch.zeros(side**2).index_fill(0, kept.cpu(), 255)
        image = Image.fromarray(tile.permute(1, 2, 0).cpu().numpy())
        dark = Image.blend(image, enlarge(colors), 0.6)
        canvas.paste(Image.composite(image, dark, enlarge(mask)), (0, i * size))
        canvas.paste(enlarge(255 * attention / attention.max()), (size, i * size))
    scale = math.ceil(336 / size)
    return canvas.resize((canvas.width * scale, canvas.height * scale), Image.NEAREST)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a LLaVA about images, or have a conversation.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("prompt", nargs="?", help="the question; without one a conversation begins, which an empty line ends")
    add("--model", required=True, metavar="ID",
        help="folder, run folder, or hub id such as llava-hf/llava-v1.6-mistral-7b-hf (or id@revision)")
    add("--image", nargs="+", action="extend", default=[], metavar="FILE",
        help="images; the question may follow the last one")
    add("--max-new-tokens", type=number(int, 1), default=512, metavar="N", help="default: %(default)s")
    add("--temperature", type=number(float, 0), default=0.0, metavar="T",
        help="0, the default, is greedy: always the most probable token")
    add("--top-p", type=number(float, 1e-9, 1), default=1.0, metavar="P",
        help="sample from the most probable tokens that together have probability P (default: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the sampling (default: %(default)s)")
    add("--trace", action="store_true", help="first print shape, FLOPs and time of every layer")
    add("--show-kept", metavar="FILE", help="save an image of what --prune keeps of the first image")
    add("--save", type=Path, metavar="DIR",
        help="write the whole model (a run folder with its bases, LoRA merged) for transformers, and stop; "
             "of the flags below only --dtype, --base and --tokenizer count")
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.prompt is None and len(args.image) > 1:
        last = args.image[-1]                # the question, unless it looks like a file name
        if not os.path.exists(last) and Path(last).suffix.lower() not in Image.registered_extensions():
            args.prompt = args.image.pop()
    if args.save and (args.prompt or args.image):
        parser.error("--save writes the model and asks nothing: leave out the question and --image")
    check_outputs(parser, [args.show_kept], args.image)
    if args.show_kept and not (args.image and is_writable_image(args.show_kept)):
        parser.error("--show-kept needs an --image, and as its own value an image file such as kept.png")
    return args


def save_whole(args: argparse.Namespace) -> None:
    """--save: the model and the processor as one folder, in the dtype of the files or --dtype."""
    if args.save.exists() and any(args.save.iterdir()):
        raise UserError(f"{args.save} is not empty: name a new folder for --save")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = Llava.from_pretrained(args.model, dtype=dtype, base=args.base)
    processor = Processor.from_pretrained(args.tokenizer or args.model, model.config)
    model.save_pretrained(args.save)
    processor.save_pretrained(args.save)
    print(f"{args.save}: {sum(p.numel() for p in model.parameters()):,} parameters, for transformers")
    if model.config.prune != "none":
        print(f"transformers has no --prune {model.config.prune}: there the model reads all image tokens")


def main() -> None:
    args = parse_args()
    if args.save:
        return save_whole(args)
    images = [open_image(file) for file in args.image]
    model, processor = load_model(args)
    if args.show_kept:
        if model.config.prune in ("none", "pool"):
            raise UserError("--show-kept needs a --prune that keeps patches: all but none and pool do")
        draw_kept_patches(model, processor.pixels(images[0])).save(args.show_kept)
    torch.manual_seed(args.seed)
    sampling = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p")}
    messages, question = [], args.prompt or read_question()
    while question:
        if not messages and "<image>" not in question:
            question = "<image>\n" * len(images) + question
        messages.append({"role": "user", "content": question})
        if args.trace and len(messages) == 1:
            print_trace(model, processor(messages, images))
        try:
            answer = stream_answer(model, processor, messages, images, **sampling)
            messages.append({"role": "assistant", "content": answer})
        except UserError as error:
            if args.prompt:
                raise
            print(error, file=sys.stderr)    # the conversation goes on without this question
            messages.pop()
        question = "" if args.prompt else read_question()


if __name__ == "__main__":
    command_line(main)
