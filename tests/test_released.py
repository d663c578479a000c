"""Comparison with the authors' released code: ids, labels, pixels, spliced embeddings and merged tokens.

    git clone https://github.com/haotian-liu/LLaVA ../LLaVA
    git clone https://github.com/42Shawn/LLaVA-PruMerge ../PruMerge
    LLAVA_REPO=../LLaVA PRUMERGE_REPO=../PruMerge python -m pytest tests/test_released.py

Each test is skipped without its checkout. With LLAVA_TEST_TOKENIZER=FOLDER the tests use the tokenizer.json
of that folder instead of the toy one. The released code is imported unchanged; only modules that it imports
and does not use here (its trainer, matplotlib) are replaced by empty ones.
"""

import importlib
import os
import random
import sys
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import llava
from llava import IGNORE, Llava, LlavaConfig, Processor, TextConfig, VisionConfig
from tests import toy

transformers = pytest.importorskip("transformers")
LLAVA, PRUMERGE = os.environ.get("LLAVA_REPO"), os.environ.get("PRUMERGE_REPO")
needs_llava = pytest.mark.skipif(not LLAVA, reason="LLAVA_REPO names no checkout of haotian-liu/LLaVA")
needs_prumerge = pytest.mark.skipif(not PRUMERGE,
                                    reason="PRUMERGE_REPO names no checkout of 42Shawn/LLaVA-PruMerge")
RELEASED_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
THEIR_IMAGE_ID = -200                        # the released code's id of <image>


@contextmanager
def released(repository: str, **stubs: ModuleType):
    """A function that imports modules of the released package `llava`. Our llava.py has the same name and is
    removed from sys.modules in this context; `stubs` replace modules that the package imports."""
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "llava"}
    for name in ours:
        del sys.modules[name]
    replaced = {name: sys.modules.get(name) for name in stubs}
    for name in ("llava", "llava.model", "llava.train"):                  # without their __init__.py
        package = ModuleType(name)
        package.__path__ = [str(Path(repository, *name.split(".")))]
        sys.modules[name] = package
    sys.modules.update(stubs)
    try:
        yield importlib.import_module
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
            del sys.modules[name]
        for name, module in replaced.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        sys.modules.update(ours)


# ---------------------------------------------------------------------------------------------
# Ids and labels


@pytest.fixture(scope="module")
def their_train():
    trainer = ModuleType("llava.train.llava_trainer")
    trainer.LLaVATrainer = object
    with released(LLAVA, **{"llava.train.llava_trainer": trainer}) as load:
        yield load("llava.train.train")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The text of tokenizer.json, and the same tokenizer opened with transformers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if source := os.environ.get("LLAVA_TEST_TOKENIZER"):
        (folder / "tokenizer.json").write_bytes(Path(source, "tokenizer.json").read_bytes())
    else:
        toy.make_tokenizer().save(str(folder / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<unk>")
    theirs.model_max_length, theirs.legacy = 4096, True
    return (folder / "tokenizer.json").read_text(), TokenizerWithBos(theirs)


class TokenizerWithBos:
    """A tokenizer that puts <s> before every text, as LLaMA's tokenizer does."""

    def __init__(self, tokenizer):
        self.inner = tokenizer
        self.bos_token_id, self.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
        self.legacy, self.model_max_length = True, 4096

    def __call__(self, text, return_tensors=None, **_):
        texts = [text] if isinstance(text, str) else text
        ids = [[self.bos_token_id, *self.inner(t, add_special_tokens=False).input_ids] for t in texts]
        if return_tensors:
            ids = torch.tensor(ids)
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)


def scienceqa_records(count: int = 60) -> list[dict]:
    rng = random.Random(7)
    problems = []
    for i in range(count):
        if i % 2:
            problems.append(toy.image_problem(toy.make_scene(rng), rng))
        else:
            problems.append(toy.text_problem(rng))
    return [toy.to_record(p | {"id": str(i), "split": "train"}) for i, p in enumerate(problems)]


@needs_llava
@pytest.mark.parametrize("template", ["mistral_instruct", "v1", "plain"])
def test_released_ids_and_labels(template, their_train, tokenizers):
    tokenizer_json, tokenizer = tokenizers
    text = TextConfig(vocab_size=tokenizer.inner.vocab_size)
    ours = Processor(tokenizer_json, LlavaConfig(text=text, image_token_id=THEIR_IMAGE_ID, template=template))
    conversation = their_train.conversation_lib
    conversation.default_conversation = conversation.conv_templates[template]
    data_args = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
    supervised = compared = 0
    for record in scienceqa_records():
        has_image = "image" in record
        if template == "plain" and not has_image:
            continue                         # the released code expects an image in every record of stage 1
        sources = [deepcopy(record["conversations"])]
        if has_image:
            sources = their_train.preprocess_multimodal(sources, data_args)
        theirs = their_train.preprocess(sources, tokenizer, has_image=has_image)
        messages = [{"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
                    for turn in record["conversations"]]
        ids, labels = ours.tokenize(messages)
        assert ids == theirs["input_ids"][0].tolist(), record["id"]
        assert labels == theirs["labels"][0].tolist(), record["id"]
        supervised += len(labels) - labels.count(IGNORE)
        compared += 1
    assert compared >= 30 and supervised > 5 * compared


# ---------------------------------------------------------------------------------------------
# Pixels and spliced embeddings


def random_images(count: int = 40) -> list[Image.Image]:
    noise = np.random.RandomState(5)
    sizes = noise.randint(20, 900, (count, 2)).tolist()
    sizes += [[336, 336], [672, 336], [1, 30], [999, 40], [335, 337]]
    return [Image.fromarray(noise.randint(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


def clip_processor(side: int = 336):
    processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return processor_class(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@needs_llava
@pytest.mark.parametrize("mode", ["pad", "crop", "anyres"])
def test_released_pixels(mode):
    config = LlavaConfig(image_mode=mode)
    processor = Processor(toy.make_tokenizer().to_str(), config)
    aspect_ratio = None if mode == "crop" else mode
    their_config = SimpleNamespace(image_aspect_ratio=aspect_ratio, image_grid_pinpoints=RELEASED_GRIDS)
    with released(LLAVA) as load:
        process = load("llava.mm_utils").process_images
        for image in random_images():
            expected = process([image], clip_processor(), their_config)[0]
            if mode != "anyres":
                expected = expected[None]
            actual = llava.normalize(processor.pixels(image))
            assert actual.shape == expected.shape, image.size
            # Two neighboring levels of a pixel (of 256) differ by 0.014.
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=str(image.size))


@needs_llava
@pytest.mark.parametrize("mode", ["pad", "crop", "anyres"])
def test_released_splice(mode):
    """Embeddings and labels of padded rows equal those of their prepare_inputs_labels_for_multimodal."""
    torch.manual_seed(0)
    vision = VisionConfig(16, 20, 2, 2, 28, 7)
    text = TextConfig(vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
                      num_attention_heads=3, num_key_value_heads=1, head_dim=8)
    grids = [(28, 56), (56, 28), (56, 56), (84, 28), (28, 84)]
    ours = Llava(LlavaConfig(vision, text, image_token_id=60, image_mode=mode, grids=tuple(grids))).eval()
    processor, noise = Processor(toy.make_tokenizer().to_str(), ours.config), np.random.RandomState(3)

    class Tower:
        num_patches_per_side, config = vision.side, SimpleNamespace(image_size=28)

        def __call__(self, images):
            return ours.vision_tower(images, -2)[:, 1:]

    with released(LLAVA) as load:
        arch = load("llava.model.llava_arch")
        parts = SimpleNamespace(get_vision_tower=Tower, mm_projector=ours.projector,
                                embed_tokens=ours.language_model.embed_tokens,
                                image_newline=getattr(ours, "image_newline", None))
        theirs = type("Model", (arch.LlavaMetaForCausalLM,), {"get_model": lambda self: parts})()
        theirs.model, theirs.device = parts, torch.device("cpu")
        theirs.config = SimpleNamespace(
            mm_patch_merge_type="spatial_unpad" if mode == "anyres" else "flat", image_aspect_ratio=mode,
            image_grid_pinpoints=[list(grid) for grid in grids])
        for _ in range(25):
            images = [Image.fromarray(noise.randint(0, 256, (*noise.randint(5, 120, 2), 3), np.uint8))
                      for _ in range(3)]
            pixels = [llava.normalize(processor.pixels(image)) for image in images]
            ids = torch.from_numpy(noise.randint(1, 60, (2, 12)))
            ids[0, [2, 7]] = ids[1, 5] = 60
            mask = torch.ones(2, 12, dtype=torch.bool)
            mask[1, 9:] = False
            labels = ids.masked_fill((ids == 60) | ~mask | (torch.arange(12) < 4), IGNORE)
            with torch.no_grad():
                *_, expected_x, expected_labels = theirs.prepare_inputs_labels_for_multimodal(
                    ids.masked_fill(ids == 60, THEIR_IMAGE_ID), None, mask, None, labels, pixels,
                    [image.size for image in images])
                sizes = [(image.height, image.width) for image in images]
                x, _, actual_labels = ours.splice(ids, pixels, sizes, mask, labels)
            assert x.shape == expected_x.shape and torch.equal(actual_labels, expected_labels), sizes
            torch.testing.assert_close(x, expected_x, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# PruMerge


@needs_prumerge
@pytest.mark.parametrize("name, method, options", [
    ("prumerge", "token_prune_merge_advanced", {"if_adaptive": True}),
    ("prumerge+", "token_prune_merge_advanced_plus", {"if_adaptive": True}),
    ("prumerge-fixed", "token_prune_merge_advanced", {"if_adaptive": False, "reduction_ratio": 1 / 8}),
    ("prumerge+-fixed", "token_prune_merge_advanced_plus", {"if_adaptive": False, "reduction_ratio": 1 / 8})])
def test_released_prumerge(name, method, options):
    """The merged tokens of 576 patches, in float64: rounding in float32 changes the order of nearly equal
    similarities. The tower has 24 layers because the released code names its layer 23."""
    vision = VisionConfig(48, 64, 24, 3, 336, 14)
    text = TextConfig(vocab_size=8, hidden_size=48, intermediate_size=8, num_hidden_layers=0,
                      num_attention_heads=1, num_key_value_heads=1, head_dim=48)
    torch.manual_seed(0)
    ours = Llava(LlavaConfig(vision, text, image_token_id=8, prune=name)).double().eval()
    for p in ours.vision_tower.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    ours.projector = nn.Identity()
    pyplot, matplotlib = ModuleType("matplotlib.pyplot"), ModuleType("matplotlib")
    matplotlib.pyplot = pyplot
    with released(PRUMERGE, matplotlib=matplotlib, **{"matplotlib.pyplot": pyplot}) as load:
        tower_class = load("llava.model.multimodal_encoder.clip_encoder").CLIPVisionTower
        theirs = tower_class.__new__(tower_class)
        nn.Module.__init__(theirs)
        theirs.select_layer, theirs.select_feature = -2, "patch"
        theirs.vision_tower = HiddenStates(ours.vision_tower)
        for seed in range(4):
            x = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(seed)).double()
            with torch.no_grad():
                expected = getattr(theirs, method)(x, **options)[0]
                actual = ours.encode_images([x], [(336, 336)])[0]
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
            assert len(actual) > 4


class HiddenStates(nn.Module):
    """Our vision tower with the attributes of transformers' CLIPVisionModel that the released code uses."""

    def __init__(self, tower):
        super().__init__()
        self.tower, self.device, self.dtype = tower, torch.device("cpu"), torch.float64
        layers = []
        for layer in tower.layers:
            q_proj, k_proj = layer.self_attn["q_proj"], layer.self_attn["k_proj"]
            layers.append(SimpleNamespace(self_attn=SimpleNamespace(q_proj=q_proj, k_proj=k_proj)))
        self.vision_model = SimpleNamespace(encoder=SimpleNamespace(layers=layers))

    def forward(self, images, output_hidden_states):
        states = self.tower(images, -2)
        last = self.tower.layers[-1]
        last(states)                         # calls the hooks of the released code on q_proj and k_proj
        return SimpleNamespace(hidden_states=[states, None])
