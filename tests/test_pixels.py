"""Test that pixels, AnyRes grids and token counts are exactly those of transformers and LLaVA.

    LLAVA_TEST_PIXELS=200 python -m pytest tests/test_pixels.py      # on more random images
"""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import llava
from llava import LlavaConfig, Processor, TextConfig, VisionConfig
from tests.golden import HERE, hf_tiles, llava_grid, llava_window, make_image
from tests.layouts import GRIDS, write_tokenizer

MODES = ("RGB", "L", "CMYK", "1", "I;16", "P", "LA", "RGBA")              # the last three are transparent
RELEASED_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = [(200, 100), (423, 752), (861, 328), (1, 500), (176, 110), (205, 656), (352, 110), (799, 376),
         (893, 376), (987, 376), (336, 336), (1000, 300), (500, 1)]       # width x height


def make_config(image_mode: str, side=28, publisher="transformers", grids=GRIDS) -> LlavaConfig:
    """A config; `grids` are (height, width) as in transformers, or (width, height) as in LLaVA's code."""
    hf, patch_size = publisher == "transformers", 14 if side == 336 else 7
    grids = tuple((b, a) if hf else (a, b) for a, b in grids)
    return LlavaConfig(vision=VisionConfig(image_size=side, patch_size=patch_size), text=TextConfig(),
                       image_mode=image_mode, grids=grids, hf_preprocessing=hf)


def random_image(generator: np.random.RandomState, mode: str) -> Image.Image:
    width, height = (int(2 ** generator.uniform(0, 8)) for _ in range(2))
    values = generator.randint(0, 256, (height, width, 4)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(generator.randint(0, 65536, (height, width)).astype(np.uint16))
    if mode == "LA":
        return Image.fromarray(values).convert("LA")
    image = Image.fromarray(values[..., :3]).convert("RGBA" if mode == "RGBA" else mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(values[..., 3]))
    if mode == "P":
        image.info["transparency"] = int(generator.randint(256))
    return image


def drop_transparency(image: Image.Image) -> Image.Image:
    """The RGB values that LLaVA's code uses; image.info does not contain the transparency any more."""
    return Image.fromarray(np.asarray(image.convert("RGB")))


@pytest.fixture(scope="module")
def process_image(tmp_path_factory):
    """A function that returns the pixels of the processor for an image, uint8 [tiles, 3, side, side]."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    mean, std = (torch.tensor(x)[:, None, None] for x in (llava.CLIP_MEAN, llava.CLIP_STD))

    def process(image: Image.Image, config: LlavaConfig) -> torch.Tensor:
        processor = Processor.from_pretrained(folder, config)
        x = processor([{"role": "user", "content": "<image>"}], [image])["images"][0]
        assert x.dtype == torch.float32
        return ((x * std + mean) * 255).round().to(torch.uint8)
    return process


@pytest.mark.parametrize("image_mode", ["crop", "pad", "anyres"])
@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_those_of_transformers_for_any_size_and_mode(mode, image_mode, process_image):
    """transformers puts a transparent image on white; LLaVA's code (pad) drops the transparency."""
    pytest.importorskip("transformers", minversion="5")
    generator = np.random.RandomState(MODES.index(mode))
    config = make_config(image_mode, publisher="liuhaotian" if image_mode == "pad" else "transformers")
    for _ in range(int(os.environ.get("LLAVA_TEST_PIXELS", 3 * len(MODES))) // len(MODES)):
        image = random_image(generator, mode)
        expected = hf_tiles(image_mode, image if config.hf_preprocessing else drop_transparency(image), 28)
        assert torch.equal(process_image(image, config), expected), (mode, image.size)


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_liuhaotians_anyres_drops_transparency(mode, process_image):
    config = make_config("anyres", publisher="liuhaotian")
    image = random_image(np.random.RandomState(3), mode)
    assert torch.equal(process_image(image, config), process_image(drop_transparency(image), config))


@pytest.mark.parametrize("publisher", ["liuhaotian", "transformers"])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_any_mode_is_read_as_its_publisher_reads_it(mode, publisher, tmp_path, process_image):
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    config = make_config("crop", publisher=publisher)
    random_image(np.random.RandomState(7), mode).save(file)
    image = Image.open(file)
    assert image.mode == mode
    expected = process_image(image if config.hf_preprocessing else drop_transparency(image), config)
    assert torch.equal(process_image(llava.open_image(file), config), expected)


def test_the_first_frame_of_an_animated_image_is_read(tmp_path):
    red, blue = (Image.new("RGB", (9, 9), color) for color in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert llava.open_image(tmp_path / "a.gif").convert("RGB").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("image_mode", ["crop", "pad", "anyres"])
def test_pixels_are_the_recorded_ones(image_mode, process_image):
    golden = load_file(HERE / "golden.safetensors")[f"{image_mode}: pixels"]
    config = make_config(image_mode, 14, grids=[[14, 28], [28, 14]])
    assert torch.equal(process_image(make_image(61, 23), config), golden)


def test_all_256_values_are_normalized_bit_identically_to_transformers():
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    process = clip.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    expected = process(Image.fromarray(values), return_tensors="np")["pixel_values"]
    actual = llava.normalize(torch.from_numpy(values).permute(2, 0, 1)[None])
    assert actual.dtype == torch.float32 and np.array_equal(actual.numpy(), np.asarray(expected))


@pytest.mark.parametrize("size, image_mode, mean, std, corner, middle", [
    ((640, 480), "crop", 0.186038, 1.007552, (-1.04774, 0.43904, -0.32839), (1.63837, -0.98670, 0.56747)),
    ((640, 480), "pad", 0.138761, 0.842115, (-0.01125, -0.01120, -0.00133), (-1.70467, 1.62465, 0.12665)),
    ((300, 1000), "crop", 0.187582, 1.055275, (-1.41270, -0.34137, 1.56287), (-0.66818, 1.69969, -1.06784)),
    ((300, 1000), "pad", 0.050579, 0.537396, (-0.01125, -0.01120, -0.00133), (-0.01125, -0.01120, -0.00133))])
def test_pixels_have_the_values_measured_with_the_published_code(
        size, image_mode, mean, std, corner, middle, process_image):
    x = llava.normalize(process_image(make_image(*size), make_config(image_mode, 336)))[0]
    actual = torch.tensor([x.mean(), x.std(), *x[:, 0, 0], *x[:, 168, 100]])
    torch.testing.assert_close(actual, torch.tensor([mean, std, *corner, *middle]), atol=1e-5, rtol=0)


def test_padding_surrounds_the_image_and_has_the_mean_color(process_image):
    image = Image.new("RGB", (28, 13), "white")
    tile = process_image(image, make_config("pad"))[0]          # 28 x 28: nothing is resized
    assert (tile[:, 7:20] == 255).all()                         # (28 - 13) // 2 = 7 rows above, 8 below
    for rows in (tile[:, :7], tile[:, 20:]):
        assert (rows == torch.tensor([122, 116, 104])[:, None, None]).all()


# ---------------------------------------------------------------------------------------------
# AnyRes


@pytest.mark.parametrize("size", SIZES)
def test_grid_unpadding_and_token_count_are_those_of_liuhaotian(size):
    config, (w, h) = make_config("anyres", 336, "liuhaotian", RELEASED_GRIDS), size
    grid = llava_grid(w, h, RELEASED_GRIDS)
    assert llava.choose_grid((h, w), config.grids) == grid
    rows, columns = llava.unpadded_patches(config, (h, w))
    top, bottom, left, right = llava_window(w, h, grid, 14)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (top, bottom, left, right)
    assert llava.count_image_tokens(config, (h, w)) == 576 + (bottom - top) * (right - left + 1)


@pytest.mark.parametrize("size", SIZES)
def test_grid_unpadding_and_token_count_are_those_of_transformers(size):
    utilities = pytest.importorskip("transformers.image_processing_utils")
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    config, (w, h) = make_config("anyres", 336, "transformers", RELEASED_GRIDS), size
    height, width = utilities.select_best_resolution((h, w), RELEASED_GRIDS)
    assert llava.choose_grid((h, w), config.grids) == (width, height)
    patches = torch.arange(height // 14 * (width // 14)).view(1, height // 14, width // 14)
    kept = unpad_image(patches, (h, w))[0]
    assert torch.equal(patches[0][llava.unpadded_patches(config, (h, w))], kept)
    assert llava.count_image_tokens(config, (h, w)) == 576 + kept.numel() + len(kept)


@pytest.mark.parametrize("size, liuhaotian, transformers", [
    ((336, 336), 1176, 1176), ((640, 480), 2340, 2340), ((480, 640), 2352, 2352), ((1000, 300), 2182, 2182),
    ((300, 1000), 2232, 2232), ((500, 500), 2928, 2928), ((1024, 899), 2634, 2634),
    ((1920, 1080), 1948, 1948), ((1008, 336), 2328, 2328),
    ((450, 300), 1464, 1464), ((300, 450), 1476, 1476), ((200, 100), 876, 1752),
    ((100, 200), 1776, 888), ((1, 500), 624, 624), ((423, 752), 576 + 48 * 27, 576 + 48 * 29),
    ((861, 328), 576 + 24 * 63, 576 + 24 * 65)])
def test_number_of_image_tokens_is_the_published_one(size, liuhaotian, transformers):
    for publisher, count in (("liuhaotian", liuhaotian), ("transformers", transformers)):
        config = make_config("anyres", 336, publisher, RELEASED_GRIDS)
        assert llava.count_image_tokens(config, size[::-1]) == count, publisher


def test_default_grids_are_the_released_ones_in_their_order():
    assert LlavaConfig(image_mode="anyres").grids == tuple(map(tuple, RELEASED_GRIDS))


def test_token_counts_of_random_sizes_are_those_of_each_publisher():
    utilities = pytest.importorskip("transformers.image_processing_utils")
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    generator, differences = np.random.RandomState(0), 0
    liuhaotian = make_config("anyres", 336, "liuhaotian", RELEASED_GRIDS)
    transformers = make_config("anyres", 336, "transformers", RELEASED_GRIDS)
    for w, h in generator.randint(1, 1500, (1500, 2)).tolist():
        grid = llava_grid(w, h, RELEASED_GRIDS)
        top, bottom, left, right = llava_window(w, h, grid, 14)
        count = 576 + (bottom - top) * (right - left + 1)
        assert llava.count_image_tokens(liuhaotian, (h, w)) == count, (w, h)
        height, width = utilities.select_best_resolution((h, w), RELEASED_GRIDS)
        kept = unpad_image(torch.empty(1, height // 14, width // 14), (h, w))[0]
        hf_count = 576 + kept.numel() + len(kept)
        assert llava.count_image_tokens(transformers, (h, w)) == hf_count, (w, h)
        if count != hf_count:
            differences += 1
    assert differences > 0


@pytest.mark.parametrize("size", [*SIZES[:4], (90, 60)])
def test_anyres_tiles_are_the_resized_image_and_parts_of_it_on_black(size):
    """The expected tiles are cut here. Exact fractions decide which side of the image fills the grid."""
    w, h = size
    image, config = make_image(w, h), make_config("anyres", 28, "liuhaotian")
    W, H = llava_grid(w, h, GRIDS)
    if Fraction(W, w) < Fraction(H, h):
        inner = W, min(math.ceil(h * (W / w)), H)
    else:
        inner = min(math.ceil(w * (H / h)), W), H
    canvas = np.zeros((H, W, 3), np.uint8)
    top, left = (H - inner[1]) // 2, (W - inner[0]) // 2
    canvas[top:top + inner[1], left:left + inner[0]] = np.asarray(image.resize(inner, Image.BICUBIC))
    expected = [np.asarray(image.resize((28, 28), Image.BICUBIC))]
    expected += [canvas[y:y + 28, x:x + 28] for y in range(0, H, 28) for x in range(0, W, 28)]
    tiles = [np.asarray(tile) for tile in llava.cut_tiles(image, config)]
    assert np.array_equal(np.stack(tiles), np.stack(expected))
