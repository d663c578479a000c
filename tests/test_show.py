"""Tests of llava.py --trace (print_trace) and --show-kept (draw_kept_patches)."""

import numpy as np
import torch
from PIL import Image

import llava
from llava import Llava, LlavaConfig, TextConfig, VisionConfig, draw_kept_patches, print_trace

TEXT = TextConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                  num_attention_heads=3, num_key_value_heads=1, head_dim=8)
CONFIG = LlavaConfig(VisionConfig(16, 20, 3, 2, 24, 4), TEXT, image_token_id=50, prune="prumerge")


def test_trace_prints_shapes_parameters_and_flops_of_modules(capsys):
    torch.manual_seed(0)
    model = Llava(llava.replace(CONFIG, prune="none"))
    print_trace(model, {"input_ids": torch.tensor([[1, 50, 5, 6]]), "images": [torch.randn(1, 3, 24, 24)],
                        "image_sizes": [(24, 24)]})
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line]
    names = [row[0] for row in rows]
    assert names[1:3] == ["image 24 x 24", "input_ids"]
    assert names.count("language_model.layers.1") == 2, "prefill and one decode step"
    assert "vision_tower.layers.1" in names
    assert "vision_tower.layers.2" not in names, "the last vision layer is not run"
    first_layer = next(row for row in rows if row[0] == "language_model.layers.0")
    values = " ".join(first_layer).split()
    assert values[1:4] == ["[1,", "39,", "24]"], "36 image tokens and 3 text tokens"
    linear = 2 * 39 * (24 * 24 * 2 + 24 * 8 * 2 + 3 * 24 * 40)
    attention = 4 * 39 * 39 * 24
    assert float(values[6]) == round((linear + attention) / 1e9, 3)
    assert values[5] == f"{sum(p.numel() for p in model.language_model.layers[0].parameters()):,}"
    assert not any(module._forward_hooks for module in model.modules()), "all hooks are removed"


def test_show_kept_darkens_only_patches_that_are_not_kept():
    torch.manual_seed(3)
    model = Llava(CONFIG)
    tiles = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8)
    drawing = np.asarray(draw_kept_patches(model, tiles).resize((48, 24), Image.NEAREST))
    states = model.vision_tower(llava.normalize(tiles))
    kept = set(llava.choose_patches(model.cls_attention(states)[0][0]).tolist())
    original = tiles[0].permute(1, 2, 0).numpy()
    for patch in range(36):
        y, x = 4 * (patch // 6), 4 * (patch % 6)
        unchanged = (drawing[y:y + 4, x:x + 4] == original[y:y + 4, x:x + 4]).all()
        assert unchanged == (patch in kept), patch
    strongest = int(model.cls_attention(states)[0][0].argmax())
    attention = drawing[:, 24:, 0]                    # the right half shows the attention
    assert attention[4 * (strongest // 6), 4 * (strongest % 6)] == attention.max() == 255
