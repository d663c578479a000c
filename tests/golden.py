"""Reference results for the tests: transformers, computed where it is installed or else read from recorded
files, and LLaVA's AnyRes rules in plain steps.

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

from tests.layouts import GRIDS, IMAGE_ID, LAYOUTS, VISION, Case, rename_to_layout, write_tokenizer

HERE = Path(__file__).resolve().parent
FAMILIES = ("llava-hf llava, old names", "llava-hf llava_next, old names", "liuhaotian v1", "liuhaotian v1.6")
SIZES = [(50, 20), (28, 61), (90, 31), (56, 55)]                          # (height, width) of images
TILES = [3, 4, 4, 5]                         # per image with AnyRes, including the whole resized image
TEXTS = ("[INST] What is it? [/INST] A cat. </s>[INST] Is it? [/INST] Né! </s>",
         "USER: What is it? ASSISTANT: A cat.</s>USER: Is  it? ASSISTANT:")
IGNORE = -100


def make_batch(image_id: int, anyres: bool) -> dict:
    """Four right-padded rows with no image, one, two, and one at the end; some tokens are not supervised."""
    noise = np.random.RandomState(0)
    ids = torch.from_numpy(noise.randint(3, 80, (4, 12)))
    ids[1, 3] = ids[2, 0] = ids[2, 5] = ids[3, 9] = image_id
    mask = torch.arange(12) < torch.tensor([7, 12, 9, 10])[:, None]
    labels = ids.masked_fill((ids == image_id) | ~mask | (torch.arange(12) % 4 == 1), IGNORE)
    images = [noise.standard_normal((tiles if anyres else 1, 3, 28, 28)) for tiles in TILES]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels,
            "images": [torch.from_numpy(image).float() for image in images], "image_sizes": SIZES}


def to_hf_batch(inputs: dict, counts: list[int], image_id: int, anyres: bool) -> dict:
    """The same batch in the format of transformers: image i has counts[i] image ids. With AnyRes, tiles of
    zeros are appended, so that all images have the same number of tiles."""
    remaining, ids, labels = iter(counts), [], []
    for row, row_labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]):
        repeats = torch.tensor([next(remaining) if token == image_id else 1 for token in row[mask].tolist()])
        ids.append(row[mask].repeat_interleave(repeats))
        labels.append(row_labels[mask].repeat_interleave(repeats))
    lengths = torch.tensor([len(row) for row in ids])
    ids, labels = pad_sequence(ids, True), pad_sequence(labels, True, IGNORE)
    result = {"input_ids": ids.masked_fill(ids == image_id, IMAGE_ID), "labels": labels,
              "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
    if anyres:
        return result | {"pixel_values": pad_sequence(inputs["images"], True),
                         "image_sizes": torch.tensor(inputs["image_sizes"])}
    return result | {"pixel_values": torch.cat(inputs["images"])}


# ---------------------------------------------------------------------------------------------
# LLaVA's AnyRes rules, step by step


def llava_grid(width: int, height: int, grids) -> tuple[int, int]:
    """The (width, height) of `grids` that LLaVA chooses: the one that keeps the most pixels of the image. If
    several do, the one with the fewest unused pixels; if these are equal, too, the first."""
    best, most_kept, least_unused = None, 0, math.inf
    for w, h in grids:
        scale = min(w / width, h / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        unused = w * h - kept
        if kept > most_kept or kept == most_kept and unused < least_unused:
            best, most_kept, least_unused = (w, h), kept, unused
    return best


def llava_window(width: int, height: int, grid, patch: int) -> tuple[int, int, int, int]:
    """The patches that remain after LLaVA's unpadding: first row, end row, first column, end column."""
    columns, rows = grid[0] // patch, grid[1] // patch
    if width / height > columns / rows:
        scale = columns / width
        cut = (rows - int(height * scale)) // 2
        return cut, rows - cut, 0, columns
    scale = rows / height
    cut = (columns - int(width * scale)) // 2
    return 0, rows, cut, columns - cut


# ---------------------------------------------------------------------------------------------
# transformers


def build_hf_model(case: Case):
    """The model of transformers with the weights of the case."""
    import transformers as hf
    text = {k: v for k, v in case.text.items() if k not in ("model_type", "rope_theta", "sliding_window")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": case.text["rope_theta"]}
    if case.text["model_type"] == "mistral":
        text = hf.MistralConfig(**text, sliding_window=case.text["sliding_window"])
    else:
        text = hf.LlamaConfig(**text)
    tensors, linear = dict(case.tensors), "projector.2.weight" not in case.tensors
    if linear:                               # the projector of transformers always has two layers
        size = case.text["hidden_size"]
        tensors |= {"projector.2.weight": torch.eye(size), "projector.2.bias": torch.zeros(size)}
    family = "LlavaNext" if case.anyres else "Llava"
    grids = {"image_grid_pinpoints": GRIDS} if case.anyres else {}
    config = getattr(hf, f"{family}Config")(
        text_config=text, vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=IMAGE_ID,
        projector_hidden_act="linear" if linear else "gelu", **grids)
    model = getattr(hf, f"{family}ForConditionalGeneration")(config)
    model.load_state_dict(rename_to_layout(tensors, "new"), strict=True)
    return model.eval()


def token_counts(anyres: bool) -> list[int]:
    """The number of tokens (patches and newlines) of an image of each of SIZES in transformers."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    counts = [16] * len(SIZES)
    for i, size in enumerate(SIZES if anyres else ()):
        height, width = select_best_resolution(size, GRIDS)
        kept = unpad_image(torch.empty(1, height // 7, width // 7), size)[0]
        counts[i] += kept.numel() + len(kept)
    return counts


def sample_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """A sample of the logits [B, T, V]: every fifth position that is not padding, every ninth token id."""
    return logits[mask.bool()][::5, ::9].contiguous()


def make_image(width: int, height: int) -> Image.Image:
    """An image whose colors vary with the position."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = (7 * x + 3 * y) % 256, (x * x // 16 + y) % 256, (x + 5 * y) % 256
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def hf_tiles(mode: str, image: Image.Image, side: int, grids=GRIDS) -> Tensor:
    """The tiles of an image, uint8 [tiles, 3, side, side], from the PIL processors of transformers."""
    from transformers import models
    processor_class, options = {
        "crop": (models.clip.image_processing_pil_clip.CLIPImageProcessorPil, {}),
        "pad": (models.llava.image_processing_pil_llava.LlavaImageProcessorPil, {"do_pad": True}),
        "anyres": (models.llava_next.image_processing_pil_llava_next.LlavaNextImageProcessorPil,
                   {"image_grid_pinpoints": grids})}[mode]
    processor = processor_class(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                **options)
    tiles = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.asarray(tiles[0] if mode == "anyres" else tiles).astype(np.uint8))


def hf_token_ids(text: str, folder: Path) -> list[int]:
    """The token ids of a text from the tokenizer of transformers."""
    from transformers import LlamaTokenizer
    return LlamaTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids


def record(scratch: Path) -> None:
    """Write golden.safetensors and golden.json; the checkpoints are written to `scratch`."""
    tensors = {}
    for family in FAMILIES:
        case = LAYOUTS[family](scratch / family)
        inputs = make_batch(IMAGE_ID, case.anyres)
        inputs = to_hf_batch(inputs, token_counts(case.anyres), IMAGE_ID, case.anyres)
        with torch.no_grad():
            out = build_hf_model(case)(**inputs)
        tensors[f"{family}: logits"] = sample_logits(out.logits, inputs["attention_mask"])
        tensors[f"{family}: loss"] = out.loss
    tensors |= {f"{mode}: pixels": hf_tiles(mode, make_image(61, 23), 14, [[14, 28], [28, 14]])
                for mode in ("crop", "pad", "anyres")}
    save_file(tensors, HERE / "golden.safetensors")
    token_ids = {f"{text} legacy={legacy}": hf_token_ids(text, write_tokenizer(scratch / f"{legacy}", legacy))
                 for text in TEXTS for legacy in (True, False)}
    (HERE / "golden.json").write_text(json.dumps(token_ids, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        record(Path(scratch))
