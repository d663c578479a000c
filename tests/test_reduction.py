"""Tests of token reduction with a token budget, --keep-tokens: random, pool, divprune and PruMerge."""

import math

import pytest
import torch
import torch.nn.functional as F

import llava
from llava import Llava, LlavaConfig, Processor, TextConfig, UserError, VisionConfig, replace
from tests.toy import write_random

TEXT = TextConfig(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
                  num_attention_heads=3, num_key_value_heads=1, head_dim=8)
CONFIG = LlavaConfig(VisionConfig(16, 20, 3, 2, 24, 4), TEXT, image_token_id=50)         # P = 36


def make_model(method, keep=None, **fields):
    torch.manual_seed(0)
    return Llava(replace(CONFIG, prune=method, keep_tokens=keep, **fields)).eval()


@pytest.mark.parametrize("keep", [1, 6, 9, 12, 20, 36])
def test_pool_is_the_mean_over_adaptive_regions(keep):
    x, (a, b) = torch.randn(36, 5), llava.pooled_size(keep)
    assert a * b == keep and a <= b and all(keep % i for i in range(a + 1, int(keep**0.5) + 1))
    expected = []
    for i in range(a):
        for j in range(b):                   # the regions of adaptive average pooling
            rows = range(6 * i // a, math.ceil(6 * (i + 1) / a))
            columns = range(6 * j // b, math.ceil(6 * (j + 1) / b))
            patches = [x[6 * row + column] for row in rows for column in columns]
            expected.append(sum(patches) / len(patches))
    torch.testing.assert_close(llava.pool_patches(x, keep), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [1, 2, 7, 36])
def test_divprune_is_greedy_max_min_selection_by_cosine_distance(keep):
    x = torch.randn(36, 5)
    unit = x / x.norm(dim=1, keepdim=True)
    distance = [[1 - float(a @ b) for b in unit] for a in unit]
    nearest = [min(d for j, d in enumerate(row) if j != i) for i, row in enumerate(distance)]
    chosen = [max(range(36), key=lambda i: nearest[i])]
    while len(chosen) < keep:
        others = [i for i in range(36) if i not in chosen]
        chosen.append(max(others, key=lambda i: min(distance[i][j] for j in chosen)))
    assert llava.diverse_patches(x, keep).tolist() == sorted(chosen)
    assert llava.farthest_points(unit, keep, start=chosen[0]).tolist() == chosen


def test_random_choice_depends_only_on_the_image():
    torch.manual_seed(0)
    tiles = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    model = make_model("random", 9)
    with torch.no_grad():
        reduced = model.encode_images([tiles[:1], tiles[1:]])
        full = model.encode_images([tiles[:1], tiles[1:]], prune="none")
        alone = model.encode_images([llava.normalize(tiles[1:])])[0]      # the second image, as floats
    assert torch.equal(reduced[1], alone)
    kept = []                                # for each image the indices of the kept patches
    for image_reduced, image_full in zip(reduced, full):
        kept.append([int((image_full - token).abs().amax(1).argmin()) for token in image_reduced])
    assert all(len(set(indices)) == 9 and indices == sorted(indices) for indices in kept)
    assert kept[0] != kept[1]


@pytest.mark.parametrize("method, keep", [("random", 5), ("pool", 6), ("divprune", 7), ("prumerge", 8),
                                          ("prumerge+", 9), ("prumerge", 36), ("prumerge+", 36)])
def test_every_tile_keeps_the_budget(method, keep):
    model = make_model(method, keep, image_mode="anyres")
    tiles = torch.randn(3, 3, 24, 24)        # a wide image: the whole image and its two parts
    with torch.no_grad():
        features = model.encode_images([tiles], [(24, 48)])[0]
        assert features.shape == (3 * keep, 24)
        assert llava.count_image_tokens(model.config, (24, 48)) == 3 * keep
        alone = [model.encode_images([tile[None]], [(24, 24)])[0] for tile in tiles]
    torch.testing.assert_close(features, torch.cat(alone))


def test_prumerge_keeps_the_strongest_patches_and_plus_adds_evenly_spaced_ones():
    attention, keys = torch.rand(36), torch.randn(36, 4)
    order = attention.argsort(descending=True)
    assert llava.choose_patches(attention, tokens=8).tolist() == order[:7].tolist()
    kept = llava.choose_patches(attention, plus=True, tokens=9).tolist()
    rest = sorted(set(range(36)) - set(order[:4].tolist()))
    assert kept == order[:4].tolist() + [rest[0], rest[8], rest[16], rest[24]]
    mix = llava.prumerge(attention, keys, tokens=8)
    assert mix.shape == (8, 36)
    attention_of_rest = attention.clone()
    attention_of_rest[order[:7]] = 0
    assert torch.equal(mix[-1], attention_of_rest)


@pytest.mark.parametrize("method", ["random", "pool", "divprune", "prumerge", "prumerge+"])
def test_model_with_token_reduction_trains_and_generates(method):
    model = make_model(method, 4)
    inputs = {"input_ids": torch.tensor([[1, 50, 5, 6]]), "images": [torch.randn(1, 3, 24, 24)],
              "image_sizes": [(24, 24)]}
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 50, -100)).backward()
    assert model.projector[0].weight.grad.abs().sum() > 0
    assert len(list(model.generate(**inputs, max_new_tokens=3, eos_token_id=None))) == 3


def test_budget_is_saved_with_the_model(tmp_path):
    make_model("divprune", 5).save_pretrained(tmp_path)
    config = Llava.from_pretrained(tmp_path, dtype=torch.float32).config
    assert (config.prune, config.keep_tokens) == ("divprune", 5)


@pytest.mark.parametrize("method, keep, message", [
    ("random", None, "needs --keep-tokens"), ("pool", None, "needs --keep-tokens"),
    ("divprune", None, "needs --keep-tokens"), ("none", 5, "--keep-tokens works with"),
    ("prumerge-fixed", 5, "--keep-tokens works with"), ("random", 37, "between 1 and the 36"),
    ("random", 0, "between 1 and the 36"), ("prumerge", 1, "between 2 and the 36"),
    ("pool", 13, "product of two numbers"), ("pool", 14, "product of two numbers"),
    ("some", 3, "prune is 'some'")])
def test_impossible_budget_raises_user_error(method, keep, message):
    with pytest.raises(UserError, match=message):
        make_model(method, keep)


def test_prumerge_on_the_last_vision_layer_raises_user_error():
    with pytest.raises(UserError, match="vision_feature_layer is -1"):     # PruMerge needs a later layer
        make_model("prumerge", vision_feature_layer=-1)


def test_flags_replace_the_method_and_budget_of_a_saved_model(tmp_path):
    write_random(tmp_path / "model")
    model = Llava.from_pretrained(tmp_path / "model", dtype=torch.float32, prune="random", keep_tokens=3)
    model.save_pretrained(tmp_path / "reduced")
    Processor.from_pretrained(tmp_path / "model", model.config).save_pretrained(tmp_path / "reduced")
    for flags, method, keep in (("", "random", 3), ("--prune none", "none", None),
                                ("--prune pool", "pool", 3), ("--keep-tokens 2", "random", 2),
                                ("--prune prumerge-fixed", "prumerge-fixed", None)):
        args = llava.parse_args(["--model", str(tmp_path / "reduced"), "What?", *flags.split()])
        loaded, _ = llava.load_model(args)
        assert (loaded.config.prune, loaded.config.keep_tokens) == (method, keep)
    with pytest.raises(UserError, match="--keep-tokens works with"):
        llava.load_model(llava.parse_args(["--model", str(tmp_path / "reduced"), "--prune", "none",
                                           "--keep-tokens", "3", "What?"]))


@pytest.mark.parametrize("method", llava.PRUMERGE)
@pytest.mark.parametrize("kind", ["equal", "random", "outliers"])
def test_prumerge_keeps_at_most_the_counted_tokens(method, kind):
    torch.manual_seed(1)
    equal, powers, outliers = torch.full((576,), 1e-3), torch.rand(576)**9, torch.rand(576)
    outliers[:143] += 100
    attention = {"equal": equal, "random": powers, "outliers": outliers}[kind]
    counted = llava.count_image_tokens(LlavaConfig(prune=method), (10, 10))
    tokens = len(llava.prumerge(attention, torch.randn(576, 3), **llava.PRUMERGE[method]))
    assert tokens <= counted
    if "fixed" in method:
        assert tokens == counted == {"prumerge-fixed": 73, "prumerge+-fixed": 145}[method]


def test_reduced_features_are_the_projected_kept_or_pooled_patches():
    model, x = make_model("random", 4), torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        states = model.vision_tower(x)[0, 1:]
        kept = llava.random_patches(x[0], 4, 36)
        torch.testing.assert_close(model.encode_images([x])[0], model.projector(states[kept]))
        torch.testing.assert_close(model.encode_images([x], prune="pool")[0],
                                   model.projector(llava.pool_patches(states, 4)))
        projected = F.normalize(model.projector(states), dim=1)
        assert len(set(llava.diverse_patches(projected, 4).tolist())) == 4
