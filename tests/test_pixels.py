"""Pixels are those of the published preprocessing, to the last bit; so is what AnyRes chooses.

    LLAVA_TEST_PIXELS=200 python -m pytest tests/test_pixels.py      # on more random pictures
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
from tests.golden import HERE, llava_grid, llava_window, picture, pixels
from tests.layouts import GRIDS, write_tokenizer

MODES = ("RGB", "L", "CMYK", "1", "I;16", "P", "LA", "RGBA")              # the last three with transparency
RELEASED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = [(200, 100), (423, 752), (861, 328), (1, 500), (176, 110), (205, 656), (352, 110), (799, 376),
         (893, 376), (987, 376), (336, 336), (1000, 300), (500, 1)]       # width x height


def sizes(image_mode: str, side: int = 28, publisher: str = "transformers", grids=GRIDS) -> LlavaConfig:
    """The list of grids as each publisher reads it: transformers (height, width), LLaVA (width, height)."""
    theirs = publisher == "transformers"
    read = tuple((w, h) for h, w in grids) if theirs else tuple(map(tuple, grids))
    return LlavaConfig(vision=VisionConfig(image_size=side, patch_size=side // 24 if side == 336 else 7),
                       text=TextConfig(), image_mode=image_mode, grids=read, hf_preprocessing=theirs)


def random_picture(noise: np.random.RandomState, mode: str) -> Image.Image:
    width, height = (int(2 ** noise.uniform(0, 8)) for _ in range(2))
    values = noise.randint(0, 256, (height, width, 4)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise.randint(0, 65536, (height, width)).astype(np.uint16))
    if mode == "LA":
        return Image.fromarray(values).convert("LA")
    image = Image.fromarray(values[..., :3]).convert("RGBA" if mode == "RGBA" else mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(values[..., 3]))
    if mode == "P":
        image.info["transparency"] = int(noise.randint(256))
    return image


def colours(image: Image.Image) -> Image.Image:
    """What LLaVA's code reads: RGB, whatever the transparency; no trace of it is left in image.info."""
    return Image.fromarray(np.asarray(image.convert("RGB")))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """uint8 [tiles, 3, side, side] that the processor makes of a picture."""
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
def test_pixels_are_those_of_transformers_for_any_size_and_mode(mode, image_mode, ours):
    """Of pictures with transparency transformers sees the layer over white, LLaVA (pad) the colours alone."""
    pytest.importorskip("transformers", minversion="5")
    noise = np.random.RandomState(MODES.index(mode))
    for _ in range(int(os.environ.get("LLAVA_TEST_PIXELS", 3 * len(MODES))) // len(MODES)):
        image = random_picture(noise, mode)
        config = sizes(image_mode, publisher="liuhaotian" if image_mode == "pad" else "transformers")
        wanted = pixels(image_mode, image if config.hf_preprocessing else colours(image), 28)
        assert torch.equal(ours(image, config), wanted), (mode, image.size)


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_llavas_own_anyres_drops_transparency(mode, ours):
    image, config = random_picture(np.random.RandomState(3), mode), sizes("anyres", publisher="liuhaotian")
    assert torch.equal(ours(image, config), ours(colours(image), config))


@pytest.mark.parametrize("publisher", ["liuhaotian", "transformers"])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_any_mode_is_read_as_the_publisher_reads_it(mode, publisher, tmp_path, ours):
    file, config = tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), sizes("crop", publisher=publisher)
    random_picture(np.random.RandomState(7), mode).save(file)
    image = Image.open(file)
    assert image.mode == mode
    wanted = ours(image if config.hf_preprocessing else colours(image), config)
    assert torch.equal(ours(llava.open_image(file), config), wanted)


def test_of_an_animated_picture_the_first_frame_is_read(tmp_path):
    red, blue = (Image.new("RGB", (9, 9), color) for color in ("red", "blue"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue])
    assert llava.open_image(tmp_path / "a.gif").convert("RGB").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("image_mode", ["crop", "pad", "anyres"])
def test_pixels_are_the_recorded_ones(image_mode, ours):
    golden = load_file(HERE / "golden.safetensors")[f"{image_mode}: pixels"]
    config = sizes(image_mode, 14, grids=[[14, 28], [28, 14]])
    assert torch.equal(ours(picture(61, 23), config), golden)


def test_each_of_256_values_is_normalized_to_the_bit_as_transformers_does():
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    values = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    process = clip.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    wanted = process(Image.fromarray(values), return_tensors="np")["pixel_values"]
    found = llava.normalize(torch.from_numpy(values).permute(2, 0, 1)[None])
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), np.asarray(wanted))


@pytest.mark.parametrize("size, mode, mean, std, corner, middle", [
    ((640, 480), "crop", 0.186038, 1.007552, (-1.04774, 0.43904, -0.32839), (1.63837, -0.98670, 0.56747)),
    ((640, 480), "pad", 0.138761, 0.842115, (-0.01125, -0.01120, -0.00133), (-1.70467, 1.62465, 0.12665)),
    ((300, 1000), "crop", 0.187582, 1.055275, (-1.41270, -0.34137, 1.56287), (-0.66818, 1.69969, -1.06784)),
    ((300, 1000), "pad", 0.050579, 0.537396, (-0.01125, -0.01120, -0.00133), (-0.01125, -0.01120, -0.00133))])
def test_pixels_are_the_numbers_measured_in_the_published_code(size, mode, mean, std, corner, middle, ours):
    x = llava.normalize(ours(picture(*size), sizes(mode, 336)))[0]
    found = torch.tensor([x.mean(), x.std(), *x[:, 0, 0], *x[:, 168, 100]])
    torch.testing.assert_close(found, torch.tensor([mean, std, *corner, *middle]), atol=1e-5, rtol=0)


def test_padding_goes_around_the_picture_and_is_the_mean_colour(ours):
    image = Image.new("RGB", (28, 13), "white")
    tile = ours(image, sizes("pad"))[0]                         # 28 x 28: nothing is resized
    assert (tile[:, 7:20] == 255).all()                         # (28 - 13) // 2 = 7 rows above, 8 below
    for rows in (tile[:, :7], tile[:, 20:]):
        assert (rows == torch.tensor([122, 116, 104])[:, None, None]).all()


# ---------------------------------------------------------------------------------------------
# AnyRes


@pytest.mark.parametrize("size", SIZES)
def test_grid_window_and_count_are_llavas_own(size):
    config, (w, h) = sizes("anyres", 336, "liuhaotian", RELEASED), size
    grid = llava_grid(w, h, RELEASED)
    assert llava.choose_grid((h, w), config.grids) == grid
    rows, columns = llava.unpadded_patches(config, (h, w))
    top, bottom, left, right = llava_window(w, h, grid, 14)
    assert (rows.start, rows.stop, columns.start, columns.stop) == (top, bottom, left, right)
    assert llava.count_image_tokens(config, (h, w)) == 576 + (bottom - top) * (right - left + 1)


@pytest.mark.parametrize("size", SIZES)
def test_grid_window_and_count_are_those_of_transformers(size):
    utilities = pytest.importorskip("transformers.image_processing_utils")
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    config, (w, h) = sizes("anyres", 336, "transformers", RELEASED), size
    height, width = utilities.select_best_resolution((h, w), RELEASED)
    assert llava.choose_grid((h, w), config.grids) == (width, height)
    places = torch.arange(height // 14 * (width // 14)).view(1, height // 14, width // 14)
    kept = unpad_image(places, (h, w))[0]
    assert torch.equal(places[0][llava.unpadded_patches(config, (h, w))], kept)
    assert llava.count_image_tokens(config, (h, w)) == 576 + kept.numel() + len(kept)


@pytest.mark.parametrize("size, liuhaotian, transformers", [
    ((336, 336), 1176, 1176), ((640, 480), 2340, 2340), ((480, 640), 2352, 2352), ((1000, 300), 2182, 2182),
    ((300, 1000), 2232, 2232), ((500, 500), 2928, 2928), ((1024, 899), 2634, 2634),
    ((1920, 1080), 1948, 1948), ((1008, 336), 2328, 2328),
    ((450, 300), 1464, 1464), ((300, 450), 1476, 1476), ((200, 100), 876, 1752),
    ((100, 200), 1776, 888), ((1, 500), 624, 624), ((423, 752), 576 + 48 * 27, 576 + 48 * 29),
    ((861, 328), 576 + 24 * 63, 576 + 24 * 65)])
def test_pictures_have_the_published_number_of_tokens(size, liuhaotian, transformers):
    for publisher, count in (("liuhaotian", liuhaotian), ("transformers", transformers)):
        config = sizes("anyres", 336, publisher, RELEASED)
        assert llava.count_image_tokens(config, size[::-1]) == count, publisher


def test_the_released_grids_are_the_default_in_llavas_order():
    assert LlavaConfig(image_mode="anyres").grids == tuple(map(tuple, RELEASED))


def test_random_sizes_are_cut_as_each_publisher_cuts_them():
    utilities = pytest.importorskip("transformers.image_processing_utils")
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    noise, differ = np.random.RandomState(0), 0
    liuhaotian, transformers = (sizes("anyres", 336, who, RELEASED) for who in ("liuhaotian", "transformers"))
    for w, h in noise.randint(1, 1500, (1500, 2)).tolist():
        grid = llava_grid(w, h, RELEASED)
        top, bottom, left, right = llava_window(w, h, grid, 14)
        own = 576 + (bottom - top) * (right - left + 1)
        assert llava.count_image_tokens(liuhaotian, (h, w)) == own, (w, h)
        height, width = utilities.select_best_resolution((h, w), RELEASED)
        kept = unpad_image(torch.empty(1, height // 14, width // 14), (h, w))[0]
        other = 576 + kept.numel() + len(kept)
        assert llava.count_image_tokens(transformers, (h, w)) == other, (w, h)
        differ += own != other
    assert differ > 0                        # the publishers do disagree


@pytest.mark.parametrize("size", [*SIZES[:4], (90, 60)])
def test_anyres_tiles_are_a_squashed_whole_and_the_picture_centred_on_black(size):
    """LLaVA's own order of grids; the picture's size in the grid by exact fractions."""
    w, h = size
    image, config = picture(w, h), sizes("anyres", 28, "liuhaotian")
    W, H = llava_grid(w, h, GRIDS)
    if Fraction(W, w) < Fraction(H, h):
        inner = W, min(math.ceil(h * (W / w)), H)
    else:
        inner = min(math.ceil(w * (H / h)), W), H
    canvas = np.zeros((H, W, 3), np.uint8)
    top, left = (H - inner[1]) // 2, (W - inner[0]) // 2
    canvas[top:top + inner[1], left:left + inner[0]] = np.asarray(image.resize(inner, Image.BICUBIC))
    wanted = [np.asarray(image.resize((28, 28), Image.BICUBIC))]
    wanted += [canvas[y:y + 28, x:x + 28] for y in range(0, H, 28) for x in range(0, W, 28)]
    found = [np.asarray(tile) for tile in llava.cut_tiles(image, config)]
    assert np.array_equal(np.stack(found), np.stack(wanted))
