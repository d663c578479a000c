"""What the publishers' code says: transformers, asked live by the tests where it is installed and
recorded for those who do not have it; and LLaVA's AnyRes, told again in plain steps.

    python tests/golden.py --record          # writes tests/golden.safetensors and tests/golden.json
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.layouts import GRIDS, IMAGE_ID, LAYOUTS, VISION, Case, named, write_tokenizer

HERE = Path(__file__).resolve().parent
FAMILIES = ("llava-hf llava, old names", "llava-hf llava_next, old names", "liuhaotian v1", "liuhaotian v1.6")
SIZES = [(50, 20), (28, 61), (90, 31), (56, 55)]                          # (height, width) of pictures
TILES = [3, 4, 4, 5]                         # of each with AnyRes, the squashed whole included
TEXTS = ("[INST] What is it? [/INST] A cat. </s>[INST] Is it? [/INST] Né! </s>",
         "USER: What is it? ASSISTANT: A cat.</s>USER: Is  it? ASSISTANT:")
IGNORE = -100


def batch(image_id: int, anyres: bool) -> dict:
    """Four right-padded rows with none, one, two pictures and one at the end; some words unlabelled."""
    noise = np.random.RandomState(0)
    ids = torch.from_numpy(noise.randint(3, 80, (4, 12)))
    ids[1, 3] = ids[2, 0] = ids[2, 5] = ids[3, 9] = image_id
    mask = torch.arange(12) < torch.tensor([7, 12, 9, 10])[:, None]
    labels = ids.masked_fill((ids == image_id) | ~mask | (torch.arange(12) % 4 == 1), IGNORE)
    images = [noise.standard_normal((tiles if anyres else 1, 3, 28, 28)) for tiles in TILES]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels,
            "images": [torch.from_numpy(image).float() for image in images], "image_sizes": SIZES}


def expanded(inputs: dict, counts: list[int], image_id: int, anyres: bool) -> dict:
    """The same batch as transformers wants it: an id per patch, tiles padded to the most."""
    left, ids, labels = iter(counts), [], []
    for row, learned, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]):
        repeats = torch.tensor([next(left) if token == image_id else 1 for token in row[mask].tolist()])
        ids.append(row[mask].repeat_interleave(repeats))
        labels.append(learned[mask].repeat_interleave(repeats))
    lengths = torch.tensor([len(row) for row in ids])
    ids, labels = pad_sequence(ids, True), pad_sequence(labels, True, IGNORE)
    result = {"input_ids": ids.masked_fill(ids == image_id, IMAGE_ID), "labels": labels,
              "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
    if anyres:
        return result | {"pixel_values": pad_sequence(inputs["images"], True),
                         "image_sizes": torch.tensor(inputs["image_sizes"])}
    return result | {"pixel_values": torch.cat(inputs["images"])}


# ---------------------------------------------------------------------------------------------
# LLaVA's own AnyRes, step by step


def llava_grid(width: int, height: int, grids) -> tuple[int, int]:
    """LLaVA's rule: most of the picture kept, then least wasted; a later grid must be strictly better."""
    best, kept, wasted = None, 0, math.inf
    for w, h in grids:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        if effective > kept or effective == kept and w * h - effective < wasted:
            best, kept, wasted = (w, h), effective, w * h - effective
    return best


def llava_window(width: int, height: int, grid, patch: int) -> tuple[int, int, int, int]:
    """First and last row, first and last column of a map that LLaVA's unpadding leaves."""
    columns, rows = grid[0] // patch, grid[1] // patch
    if width / height > columns / rows:
        scale_factor = columns / width
        cut = (rows - int(height * scale_factor)) // 2
        return cut, rows - cut, 0, columns
    scale_factor = rows / height
    cut = (columns - int(width * scale_factor)) // 2
    return 0, rows, cut, columns - cut


# ---------------------------------------------------------------------------------------------
# transformers


def reference(case: Case):
    """The case's weights in transformers' own model, by its names in memory."""
    import transformers as hf
    text = {k: v for k, v in case.text.items() if k not in ("model_type", "rope_theta", "sliding_window")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": case.text["rope_theta"]}
    if case.text["model_type"] == "mistral":
        text = hf.MistralConfig(**text, sliding_window=case.text["sliding_window"])
    else:
        text = hf.LlamaConfig(**text)
    tensors, linear = dict(case.tensors), "projector.2.weight" not in case.tensors
    if linear:                               # transformers always has two layers
        size = case.text["hidden_size"]
        tensors |= {"projector.2.weight": torch.eye(size), "projector.2.bias": torch.zeros(size)}
    family = "LlavaNext" if case.anyres else "Llava"
    model = getattr(hf, f"{family}ForConditionalGeneration")(getattr(hf, f"{family}Config")(
        text_config=text, vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=IMAGE_ID,
        projector_hidden_act="linear" if linear else "gelu",
        **({"image_grid_pinpoints": GRIDS} if case.anyres else {})))
    model.load_state_dict(named(tensors, "new"), strict=True)
    return model.eval()


def token_counts(anyres: bool) -> list[int]:
    """How many patches and newlines stand for each of SIZES, as transformers counts."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    counts = [16] * len(SIZES)
    for i, size in enumerate(SIZES if anyres else ()):
        height, width = select_best_resolution(size, GRIDS)
        kept = unpad_image(torch.empty(1, height // 7, width // 7), size)[0]
        counts[i] += kept.numel() + len(kept)
    return counts


def some(logits: Tensor, real: Tensor) -> Tensor:
    """Few numbers, from everywhere: every fifth real position, every ninth word."""
    return logits[real.bool()][::5, ::9].contiguous()


def picture(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack(((7 * x + 3 * y) % 256, (x * x // 16 + y) % 256, (x + 5 * y) % 256), -1)
                           .astype(np.uint8))


def pixels(mode: str, image: Image.Image, side: int, grids=GRIDS) -> Tensor:
    """uint8 [tiles, 3, side, side] as transformers' PIL processors cut them."""
    from transformers import models
    kind, more = {
        "crop": (models.clip.image_processing_pil_clip.CLIPImageProcessorPil, {}),
        "pad": (models.llava.image_processing_pil_llava.LlavaImageProcessorPil, {"do_pad": True}),
        "anyres": (models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil,
                   {"image_grid_pinpoints": grids})}[mode]
    processor = kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **more)
    whole = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.asarray(whole[0] if mode == "anyres" else whole).astype(np.uint8))


def ids(text: str, folder: Path) -> list[int]:
    from transformers import LlamaTokenizer
    return LlamaTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids


def record(scratch: Path) -> None:
    tensors = {}
    for family in FAMILIES:
        case = LAYOUTS[family](scratch / family)
        inputs = expanded(batch(IMAGE_ID, case.anyres), token_counts(case.anyres), IMAGE_ID, case.anyres)
        with torch.no_grad():
            out = reference(case)(**inputs)
        tensors[f"{family}: logits"] = some(out.logits, inputs["attention_mask"])
        tensors[f"{family}: loss"] = out.loss
    tensors |= {f"{mode}: pixels": pixels(mode, picture(61, 23), 14, [[14, 28], [28, 14]])
                for mode in ("crop", "pad", "anyres")}
    save_file(tensors, HERE / "golden.safetensors")
    words = {f"{text} legacy={legacy}": ids(text, write_tokenizer(scratch / f"{legacy}", legacy))
             for text in TEXTS for legacy in (True, False)}
    (HERE / "golden.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        record(Path(scratch))
