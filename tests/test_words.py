"""Words become the ids that LLaVA was trained with, and only the assistant's are learned.

    LLAVA_TEST_TOKENIZER=FOLDER python -m pytest tests/test_words.py      # with Mistral's tokenizer.json
"""

import json
import os
from pathlib import Path

import pytest
import torch

from llava import IGNORE, SYSTEM, LlavaConfig, Processor, TextConfig, render
from tests.golden import HERE, TEXTS, ids
from tests.layouts import write_tokenizer
from tests.toy import make_tokenizer

REAL = os.environ.get("LLAVA_TEST_TOKENIZER")
TURNS = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."},
         {"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Black."}]
TEMPLATES = ("mistral_instruct", "v1", "plain")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """The toy tokenizer with a template, legacy or not."""
    tokenizer = make_tokenizer()

    def open_processor(template: str, legacy: bool | None = True) -> Processor:
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder, legacy)      # for its tokenizer_config.json
        tokenizer.save(str(folder / "tokenizer.json"))
        return Processor.from_pretrained(folder, sizes(template, tokenizer.get_vocab_size()))
    return open_processor


def sizes(template: str, words: int) -> LlavaConfig:
    return LlavaConfig(text=TextConfig(vocab_size=words), image_token_id=words, template=template)


def read(processor: Processor, messages: list[dict]) -> tuple[list[int], list[int]]:
    from PIL import Image
    count = sum(m["content"].count("<image>") for m in messages)
    inputs = processor(messages, [Image.new("RGB", (4, 4))] * count, labels=True)
    return inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()


def pieces(processor: Processor, tokens: list[int]) -> str:
    """Tokens as they are written in the vocabulary, in one string."""
    names = {processor.config.image_token_id: "<image>"}
    return "".join(names.get(t) or processor.tokenizer.id_to_token(t) for t in tokens if t != IGNORE)


# ---------------------------------------------------------------------------------------------
# Labels by construction


@pytest.mark.parametrize("template, text, learned", [
    ("mistral_instruct", "<s> [INST] <image> \nWhat is it? [/INST] A cat. </s>"
     " [INST] Colour? [/INST] Black. </s>", " A cat. </s> Black. </s>"),
    ("v1", f"<s> {SYSTEM} USER: <image> \nWhat is it? ASSISTANT: A cat.</s>"
     " USER: Colour? ASSISTANT: Black.</s>", " A cat.</s> Black.</s>")], ids=TEMPLATES[:2])
def test_a_template_is_written_out_and_its_answers_are_learned(template, text, learned, processor):
    p = processor(template)
    found, labels = read(p, TURNS)
    assert pieces(p, found) == text.replace(" ", "▁") and pieces(p, labels) == learned.replace(" ", "▁")
    assert all(label in (token, IGNORE) for token, label in zip(found, labels, strict=True))
    assert found[0] == 1 and found.count(1) == 1 and labels.count(1) == 0 and labels.count(2) == 2


def test_stage_1_reads_the_picture_and_learns_the_caption_and_its_end_of_line(processor):
    p = processor("plain")
    found, labels = read(p, TURNS[:2])
    assert pieces(p, found) == "<s><image>▁A▁cat.\n" and pieces(p, labels) == "▁A▁cat.\n"
    assert found[2:] == labels[2:] and 2 not in found           # never an end of text
    asked = [{"role": "user", "content": "Describe it.\n<image>"}, TURNS[1]]
    assert read(p, asked) == (found, labels)                    # the question is dropped


@pytest.mark.parametrize("template", TEMPLATES[:2])
def test_a_question_without_an_answer_ends_where_the_answer_begins(template, processor):
    p = processor(template)
    whole, labels = read(p, TURNS[:2])
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    found, none = read(p, TURNS[:1])
    assert found == whole[:start] and set(none) == {IGNORE}
    longer, _ = read(p, TURNS[:3])
    assert longer == read(p, TURNS)[0][:len(longer)]


@pytest.mark.parametrize("template, prompt", [
    ("mistral_instruct", "[INST] <image>\nQ [/INST]"), ("v1", f"{SYSTEM} USER: <image>\nQ ASSISTANT:")])
def test_prompts_are_the_published_strings(template, prompt):
    text = "".join(piece for piece, _ in render([{"role": "user", "content": "<image>\nQ"}], template))
    assert text == prompt
    text = "".join(piece for piece, _ in render(TURNS, template))
    assert "</s>USER:" in text or "</s>[INST]" in text          # no space after the end of an answer
    assert (" </s>" in text) == (template == "mistral_instruct")


def test_the_system_prompt_is_that_of_the_published_training_runs():
    assert SYSTEM == ("A chat between a curious user and an artificial intelligence assistant. "
                      "The assistant gives helpful, detailed, and polite answers to the user's questions.")


@pytest.mark.parametrize("content, shown", [
    ("What is it?\n<image>", "<image>\nWhat is it?"), ("What <image> is it?", "<image>\nWhat  is it?"),
    ("<image>", "<image>"), ("  <image>\nWhat is it? ", "<image>\nWhat is it?"),
    ("<image>What is it?", "<image>\nWhat is it?")])
def test_a_lone_picture_moves_to_the_front_of_its_message(content, shown):
    prompts = {"mistral_instruct": "[INST] {} [/INST]", "v1": SYSTEM + " USER: {} ASSISTANT:"}
    for template, prompt in prompts.items():
        text = "".join(piece for piece, _ in render([{"role": "user", "content": content}], template))
        assert text == prompt.format(shown)


def test_several_pictures_stay_where_they_are(processor):
    p = processor("mistral_instruct")
    found, _ = read(p, [{"role": "user", "content": "One <image> then <image> is it?"}])
    assert pieces(p, found) == "<s>▁[INST]▁One▁<image>▁▁then▁<image>▁▁is▁it?▁[/INST]"
    late, _ = read(p, [*TURNS[2:], {"role": "user", "content": "And <image>?"}])
    assert late.index(p.config.image_token_id) > late.index(2)


@pytest.mark.parametrize("template", TEMPLATES[:2])
def test_an_empty_question_beside_a_picture_is_sound(template, processor):
    p = processor(template)
    assert read(p, [{"role": "user", "content": "<image>"}, TURNS[1]])[0].count(p.config.image_token_id) == 1


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant", "assistant"]])
def test_roles_must_alternate(roles, processor):
    with pytest.raises(ValueError, match="alternate"):
        processor("v1")([{"role": role, "content": "Hi"} for role in roles])


# ---------------------------------------------------------------------------------------------
# Spaces before the first word


def test_only_a_legacy_tokenizer_puts_a_space_after_the_end_of_an_answer(processor):
    texts = [pieces(p := processor("v1", legacy), read(p, TURNS)[0]) for legacy in (True, None, False)]
    assert texts[0].count("</s>▁USER:") == 1 and texts[2].count("</s>USER:") == 1
    assert texts[0] == texts[1] == texts[2].replace("</s>USER", "</s>▁USER")      # where silent, legacy


@pytest.mark.parametrize("template", TEMPLATES[:2])
def test_legacy_or_not_the_same_tokens_are_learned(template, processor):
    old, new = (read(processor(template, legacy), TURNS)[1] for legacy in (True, False))
    assert [t for t in old if t != IGNORE] == [t for t in new if t != IGNORE]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template, text", [
    ("mistral_instruct", "[INST] {} [/INST] A cat. </s>[INST] Colour? [/INST] Black. </s>"),
    ("v1", SYSTEM + " USER: {} ASSISTANT: A cat.</s>USER: Colour? ASSISTANT: Black.</s>")])
def test_ids_are_what_transformers_makes_of_the_whole_string(template, text, legacy, tmp_path, processor):
    pytest.importorskip("transformers", minversion="5")
    p, asked = processor(template, legacy), "What  is\n the Größe of 猫?"
    write_tokenizer(tmp_path, legacy)
    (tmp_path / "tokenizer.json").write_text(p.tokenizer_json, encoding="utf-8")
    found, _ = read(p, [{"role": "user", "content": asked}, *TURNS[1:]])
    assert found == [1, *ids(text.format(asked), tmp_path)]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_recorded_ones(text, legacy, tmp_path):
    golden = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))[f"{text} legacy={legacy}"]
    p = Processor.from_pretrained(write_tokenizer(tmp_path, legacy), sizes("mistral_instruct", 400))
    if text.startswith("[INST]"):
        turns = ["What is it?", "A cat.", "Is it?", "Né!"]
    else:                                    # the golden text leaves v1's long system prompt out
        p, turns = Processor.from_pretrained(tmp_path, sizes("v1", 400)), ["What is it?", "A cat.", "Is  it?"]
    found, _ = read(p, [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)])
    start = len(p.encode(SYSTEM)) if text.startswith("USER") else 0
    assert found[0] == 1 and found[1 + start:] == golden


def test_bytes_come_back_as_the_text_they_were(processor):
    p = processor("v1")
    for text in ("A cat.", "Größe 猫\nzwei Zeilen", "two  spaces"):
        assert p.decode(p.encode(text)) == text


def test_what_is_saved_opens_as_the_same_processor(tmp_path, processor):
    for legacy in (True, False):
        p = processor("v1", legacy)
        p.save_pretrained(tmp_path)
        again = Processor.from_pretrained(tmp_path, p.config)
        assert read(again, TURNS) == read(p, TURNS)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids_of = {token["content"]: token["id"] for token in vocabulary}
    assert ids_of["<image>"] == p.config.image_token_id == ids_of["<pad>"] - 1


@pytest.mark.parametrize("anyres", [False, True])
def test_what_is_saved_is_a_processor_to_transformers(anyres, tmp_path):
    """transformers expands <image> itself; the ids around it and the count are ours."""
    hf = pytest.importorskip("transformers", minversion="5")
    from PIL import Image

    from llava import Llava, VisionConfig, count_image_tokens
    from tests.layouts import MISTRAL
    write_tokenizer(tmp_path / "words")
    words = len(json.loads((tmp_path / "words/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    text = TextConfig(**MISTRAL | {"vocab_size": words})
    config = LlavaConfig(VisionConfig(24, 44, 3, 3, 28, 7), text, image_token_id=words, hf_preprocessing=True,
                         image_mode="anyres" if anyres else "pad")
    ours = Processor.from_pretrained(tmp_path / "words", config)
    Llava(config).save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    theirs = hf.AutoProcessor.from_pretrained(tmp_path, use_fast=False)
    image = Image.effect_noise((50, 20), 80).convert("RGB")
    wanted = theirs(text="<s>[INST] <image>\nWhat is it? [/INST]", images=image, return_tensors="pt",
                    add_special_tokens=False)
    inputs = ours(TURNS[:1], [image])
    count = count_image_tokens(config, (20, 50))
    assert (wanted["input_ids"] == words).sum() == count
    ids, = inputs["input_ids"]
    assert torch.equal(wanted["input_ids"][0], ids.repeat_interleave(torch.where(ids == words, count, 1)))
    assert (wanted["pixel_values"].view_as(inputs["images"][0]) - inputs["images"][0]).abs().max() < 1e-6


def test_a_folder_without_a_tokenizer_json_is_told_what_to_do(tmp_path):
    with pytest.raises(OSError, match="--tokenizer") as error:
        Processor.from_pretrained(tmp_path, sizes("v1", 400))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_broken_tokenizer_is_one_sentence_that_names_it(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises((OSError, ValueError), match="tokenizer") as error:
        Processor.from_pretrained(tmp_path, sizes("v1", 400))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# The real tokenizer


@pytest.mark.skipif(not REAL, reason="LLAVA_TEST_TOKENIZER names no folder with Mistral's tokenizer.json")
@pytest.mark.parametrize("template, messages, wanted, learned", [
    ("mistral_instruct", TURNS,
     "1 733 16289 28793 28705 -200 28705 13 3195 349 378 28804 733 28748 16289 28793 330 5255 28723 28705 2 "
     "733 16289 28793 1888 423 28804 733 28748 16289 28793 4777 28723 28705 2",
     [*range(16, 21), *range(31, 35)]),
    ("mistral_instruct", [{"role": "user", "content": "<image>\nWhat is shown in this image?"}],
     "1 733 16289 28793 28705 -200 28705 13 3195 349 4894 297 456 3469 28804 733 28748 16289 28793", []),
    ("plain", TURNS[:2], "1 -200 330 5255 28723 13", [2, 3, 4, 5])])
def test_ids_and_labels_are_the_published_ones(template, messages, wanted, learned):
    p = Processor.from_pretrained(Path(REAL), sizes(template, 32000))
    found, labels = read(p, messages)
    assert [-200 if token == 32000 else token for token in found] == list(map(int, wanted.split()))
    assert [i for i, label in enumerate(labels) if label != IGNORE] == learned
