"""Tests of Processor: token ids are those that LLaVA was trained with, and only answers are supervised.

    LLAVA_TEST_TOKENIZER=FOLDER python -m pytest tests/test_tokenize.py      # with Mistral's tokenizer.json
"""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava import IGNORE, SYSTEM, LlavaConfig, Processor, TextConfig, UserError, render
from tests.golden import HERE, TEXTS, hf_token_ids
from tests.layouts import write_tokenizer
from tests.toy import make_tokenizer

TOKENIZER_FOLDER = os.environ.get("LLAVA_TEST_TOKENIZER")
MESSAGES = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Black."}]
TEMPLATES = ("mistral_instruct", "v1", "plain")


@pytest.fixture(scope="module")
def open_processor(tmp_path_factory):
    """A function that opens the toy tokenizer with a template, legacy or not."""
    tokenizer = make_tokenizer()

    def open_with(template: str, legacy: bool | None = True) -> Processor:
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder, legacy)      # for its tokenizer_config.json
        tokenizer.save(str(folder / "tokenizer.json"))
        return Processor.from_pretrained(folder, make_config(template, tokenizer.get_vocab_size()))
    return open_with


def make_config(template: str, vocab_size: int) -> LlavaConfig:
    return LlavaConfig(text=TextConfig(vocab_size=vocab_size), image_token_id=vocab_size, template=template)


def tokenize(processor: Processor, messages: list[dict]) -> tuple[list[int], list[int]]:
    """input_ids and labels of a conversation, with a small image for each <image>."""
    count = sum(m["content"].count("<image>") for m in messages)
    inputs = processor(messages, [Image.new("RGB", (4, 4))] * count, labels=True)
    return inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()


def join_tokens(processor: Processor, ids: list[int]) -> str:
    """The tokens as they are written in the vocabulary, in one string; labels to ignore are left out."""
    names = {processor.config.image_token_id: "<image>"}
    return "".join(names[i] if i in names else processor.tokenizer.id_to_token(i) for i in ids if i != IGNORE)


def prompt_of(content: str, template: str) -> str:
    """The rendered prompt of one user message."""
    return "".join(text for text, _ in render([{"role": "user", "content": content}], template))


# ---------------------------------------------------------------------------------------------
# Templates and labels


@pytest.mark.parametrize("template, text, supervised", [
    ("mistral_instruct", "<s> [INST] <image> \nWhat is it? [/INST] A cat. </s>"
     " [INST] Colour? [/INST] Black. </s>", " A cat. </s> Black. </s>"),
    ("v1", f"<s> {SYSTEM} USER: <image> \nWhat is it? ASSISTANT: A cat.</s>"
     " USER: Colour? ASSISTANT: Black.</s>", " A cat.</s> Black.</s>")], ids=TEMPLATES[:2])
def test_conversation_is_rendered_and_its_answers_are_supervised(template, text, supervised, open_processor):
    processor = open_processor(template)
    ids, labels = tokenize(processor, MESSAGES)
    assert join_tokens(processor, ids) == text.replace(" ", "▁")
    assert join_tokens(processor, labels) == supervised.replace(" ", "▁")
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
    assert ids[0] == 1 and ids.count(1) == 1 and labels.count(1) == 0 and labels.count(2) == 2


def test_plain_template_supervises_the_caption_and_its_newline(open_processor):
    processor = open_processor("plain")
    ids, labels = tokenize(processor, MESSAGES[:2])
    assert join_tokens(processor, ids) == "<s><image>▁A▁cat.\n"
    assert join_tokens(processor, labels) == "▁A▁cat.\n"
    assert ids[2:] == labels[2:] and 2 not in ids               # no end of sequence: </s> has id 2
    with_question = [{"role": "user", "content": "Describe it.\n<image>"}, MESSAGES[1]]
    assert tokenize(processor, with_question) == (ids, labels)  # the question is dropped
    with pytest.raises(UserError, match="not for a conversation"):
        tokenize(processor, MESSAGES)        # a later question would be dropped, too


@pytest.mark.parametrize("template", TEMPLATES[:2])
def test_prompt_ends_where_the_answer_begins(template, open_processor):
    processor = open_processor(template)
    ids, labels = tokenize(processor, MESSAGES[:2])
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    prompt_ids, prompt_labels = tokenize(processor, MESSAGES[:1])
    assert prompt_ids == ids[:start] and set(prompt_labels) == {IGNORE}
    longer_ids, _ = tokenize(processor, MESSAGES[:3])
    assert longer_ids == tokenize(processor, MESSAGES)[0][:len(longer_ids)]


@pytest.mark.parametrize("template, prompt", [
    ("mistral_instruct", "[INST] <image>\nQ [/INST]"), ("v1", f"{SYSTEM} USER: <image>\nQ ASSISTANT:")])
def test_prompts_equal_the_published_strings(template, prompt):
    assert prompt_of("<image>\nQ", template) == prompt
    text = "".join(part for part, _ in render(MESSAGES, template))
    assert "</s>USER:" in text or "</s>[INST]" in text          # no space after the end of an answer
    assert (" </s>" in text) == (template == "mistral_instruct")


def test_system_prompt_is_that_of_the_published_training():
    assert SYSTEM == ("A chat between a curious user and an artificial intelligence assistant. "
                      "The assistant gives helpful, detailed, and polite answers to the user's questions.")


@pytest.mark.parametrize("content, expected", [
    ("What is it?\n<image>", "<image>\nWhat is it?"), ("What <image> is it?", "<image>\nWhat  is it?"),
    ("<image>", "<image>"), ("  <image>\nWhat is it? ", "<image>\nWhat is it?"),
    ("<image>What is it?", "<image>\nWhat is it?")])
def test_single_image_moves_to_the_start_of_its_message(content, expected):
    assert prompt_of(content, "mistral_instruct") == f"[INST] {expected} [/INST]"
    assert prompt_of(content, "v1") == f"{SYSTEM} USER: {expected} ASSISTANT:"


def test_several_images_keep_their_positions(open_processor):
    processor = open_processor("mistral_instruct")
    ids, _ = tokenize(processor, [{"role": "user", "content": "One <image> then <image> is it?"}])
    assert join_tokens(processor, ids) == "<s>▁[INST]▁One▁<image>▁▁then▁<image>▁▁is▁it?▁[/INST]"
    ids, _ = tokenize(processor, [*MESSAGES[2:], {"role": "user", "content": "And <image>?"}])
    assert ids.index(processor.config.image_token_id) > ids.index(2)


def test_names_of_added_tokens_are_text_in_a_text(open_processor, tmp_path):
    """The tokenizer of a saved model has ids for <image> and <pad> that its embedding may not have."""
    processor = open_processor("mistral_instruct")
    processor.save_pretrained(tmp_path)
    saved = Processor.from_pretrained(tmp_path, processor.config)
    assert json.loads(saved.tokenizer_json)["added_tokens"][-1]["content"] == "<pad>"
    for text in ("What does <pad> mean?", "It is <image>."):
        assert saved.encode(text) == processor.encode(text)
        assert max(saved.encode(text)) < processor.config.image_token_id


@pytest.mark.parametrize("template", TEMPLATES[:2])
def test_message_may_consist_of_an_image_only(template, open_processor):
    processor = open_processor(template)
    ids, _ = tokenize(processor, [{"role": "user", "content": "<image>"}, MESSAGES[1]])
    assert ids.count(processor.config.image_token_id) == 1


@pytest.mark.parametrize("roles", [["assistant"], ["user", "user"], ["user", "assistant", "assistant"]])
def test_roles_must_alternate(roles, open_processor):
    with pytest.raises(ValueError, match="alternate"):
        open_processor("v1")([{"role": role, "content": "Hi"} for role in roles])


# ---------------------------------------------------------------------------------------------
# Legacy tokenizers, recorded ids, saving


def test_only_legacy_tokenizers_add_a_space_after_an_answer(open_processor):
    texts = []
    for legacy in (True, None, False):       # None: tokenizer_config.json has no such key
        processor = open_processor("v1", legacy)
        texts.append(join_tokens(processor, tokenize(processor, MESSAGES)[0]))
    assert texts[0].count("</s>▁USER:") == 1 and texts[2].count("</s>USER:") == 1
    assert texts[0] == texts[1] == texts[2].replace("</s>USER", "</s>▁USER")


@pytest.mark.parametrize("template", TEMPLATES[:2])
def test_legacy_does_not_change_the_supervised_tokens(template, open_processor):
    _, old_labels = tokenize(open_processor(template, True), MESSAGES)
    _, new_labels = tokenize(open_processor(template, False), MESSAGES)
    assert [t for t in old_labels if t != IGNORE] == [t for t in new_labels if t != IGNORE]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("template, text", [
    ("mistral_instruct", "[INST] {} [/INST] A cat. </s>[INST] Colour? [/INST] Black. </s>"),
    ("v1", SYSTEM + " USER: {} ASSISTANT: A cat.</s>USER: Colour? ASSISTANT: Black.</s>")])
def test_ids_equal_those_of_transformers(template, text, legacy, tmp_path, open_processor):
    pytest.importorskip("transformers", minversion="5")
    processor, question = open_processor(template, legacy), "What  is\n the Größe of 猫?"
    write_tokenizer(tmp_path, legacy)
    (tmp_path / "tokenizer.json").write_text(processor.tokenizer_json, encoding="utf-8")
    ids, _ = tokenize(processor, [{"role": "user", "content": question}, *MESSAGES[1:]])
    assert ids == [1, *hf_token_ids(text.format(question), tmp_path)]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_recorded_ones(text, legacy, tmp_path):
    recorded = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))[f"{text} legacy={legacy}"]
    write_tokenizer(tmp_path, legacy)
    if text.startswith("[INST]"):
        template, contents = "mistral_instruct", ["What is it?", "A cat.", "Is it?", "Né!"]
    else:
        template, contents = "v1", ["What is it?", "A cat.", "Is  it?"]
    processor = Processor.from_pretrained(tmp_path, make_config(template, 400))
    roles = ("user", "assistant") * 2
    ids, _ = tokenize(processor, [{"role": role, "content": text} for role, text in zip(roles, contents)])
    start = 1                                # after <s>
    if template == "v1":                     # the recorded text has no system prompt
        start += len(processor.encode(SYSTEM))
    assert ids[0] == 1 and ids[start:] == recorded


def test_decode_inverts_encode(open_processor):
    processor = open_processor("v1")
    for text in ("A cat.", "Größe 猫\nzwei Zeilen", "two  spaces"):
        assert processor.decode(processor.encode(text)) == text


def test_saved_processor_opens_as_the_same_processor(tmp_path, open_processor):
    for legacy in (True, False):
        processor = open_processor("v1", legacy)
        processor.save_pretrained(tmp_path)
        reopened = Processor.from_pretrained(tmp_path, processor.config)
        assert tokenize(reopened, MESSAGES) == tokenize(processor, MESSAGES)
    added = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    id_of = {token["content"]: token["id"] for token in added}
    assert id_of["<image>"] == processor.config.image_token_id == id_of["<pad>"] - 1


@pytest.mark.parametrize("anyres", [False, True])
def test_transformers_opens_the_saved_processor(anyres, tmp_path):
    """transformers expands <image> itself; the other ids, the number of image tokens and the pixels agree."""
    hf = pytest.importorskip("transformers", minversion="5")
    from llava import Llava, VisionConfig, count_image_tokens
    from tests.layouts import MISTRAL
    write_tokenizer(tmp_path / "words")
    vocab = json.loads((tmp_path / "words/tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    image_id = len(vocab)
    text = TextConfig(**MISTRAL | {"vocab_size": image_id})
    config = LlavaConfig(VisionConfig(24, 44, 3, 3, 28, 7), text, image_token_id=image_id,
                         hf_preprocessing=True, image_mode="anyres" if anyres else "pad")
    ours = Processor.from_pretrained(tmp_path / "words", config)
    Llava(config).save_pretrained(tmp_path)
    ours.save_pretrained(tmp_path)
    theirs = hf.AutoProcessor.from_pretrained(tmp_path, use_fast=False)
    image = Image.effect_noise((50, 20), 80).convert("RGB")
    expected = theirs(text="<s>[INST] <image>\nWhat is it? [/INST]", images=image, return_tensors="pt",
                      add_special_tokens=False)
    inputs = ours(MESSAGES[:1], [image])
    count = count_image_tokens(config, (20, 50))
    assert (expected["input_ids"] == image_id).sum() == count
    (ids,), pixels = inputs["input_ids"], inputs["images"][0]
    repeats = torch.where(ids == image_id, count, 1)
    assert torch.equal(expected["input_ids"][0], ids.repeat_interleave(repeats))
    assert (expected["pixel_values"].view_as(pixels) - pixels).abs().max() < 1e-6


def test_error_for_a_missing_tokenizer_json_names_the_flag(tmp_path):
    with pytest.raises(OSError, match="--tokenizer") as error:
        Processor.from_pretrained(tmp_path, make_config("v1", 400))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_error_for_an_invalid_tokenizer_json_is_one_line(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises((OSError, ValueError), match="tokenizer") as error:
        Processor.from_pretrained(tmp_path, make_config("v1", 400))
    assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Mistral's tokenizer


@pytest.mark.skipif(not TOKENIZER_FOLDER,
                    reason="LLAVA_TEST_TOKENIZER names no folder with Mistral's tokenizer.json")
@pytest.mark.parametrize("template, messages, expected, supervised", [
    ("mistral_instruct", MESSAGES,
     "1 733 16289 28793 28705 -200 28705 13 3195 349 378 28804 733 28748 16289 28793 330 5255 28723 28705 2 "
     "733 16289 28793 1888 423 28804 733 28748 16289 28793 4777 28723 28705 2",
     [*range(16, 21), *range(31, 35)]),
    ("mistral_instruct", [{"role": "user", "content": "<image>\nWhat is shown in this image?"}],
     "1 733 16289 28793 28705 -200 28705 13 3195 349 4894 297 456 3469 28804 733 28748 16289 28793", []),
    ("plain", MESSAGES[:2], "1 -200 330 5255 28723 13", [2, 3, 4, 5])])
def test_real_tokenizer_gives_the_published_ids_and_labels(template, messages, expected, supervised):
    processor = Processor.from_pretrained(Path(TOKENIZER_FOLDER), make_config(template, 32000))
    ids, labels = tokenize(processor, messages)
    assert [-200 if token == 32000 else token for token in ids] == list(map(int, expected.split()))
    assert [i for i, label in enumerate(labels) if label != IGNORE] == supervised
