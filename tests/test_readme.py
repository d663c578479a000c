"""README.md and tests/RESULTS.md: every command runs in its toy form, and every link, symbol and table holds.

The names of published models and data stand for toy ones of the same layouts. .ci/run executes the commands
that need minutes or several processes."""

import ast
import functools
import json
import re
import runpy
import shlex
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import llava
from llava import Llava, LlavaConfig, Processor, TextConfig, VisionConfig
from tests import toy
from tests.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", ROOT / "tests/RESULTS.md")
README, RESULTS = (file.read_text(encoding="utf-8") for file in FILES)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README + RESULTS, re.S)
            for line in block.splitlines() if not line.startswith("python3 -m venv")]
BY_CI = ("python train.py", "pytest", "--study", "torchrun")     # .ci/run executes these, or their short form
BENCHMARKS = "data/toy/benchmarks"
TOY = {                                      # what a name in the README stands for in the toy form
    "openai/clip-vit-large-patch14-336": "data/toy/clip",
    "mistralai/Mistral-7B-Instruct-v0.2": "data/toy/mistral",
    "llava-hf/llava-v1.6-mistral-7b-hf": "runs/toy/stage2",
    "llava-hf/llava-1.5-7b-hf": "runs/toy/stage2",
    "blip_laion_cc_sft_558k.json": "data/toy/pretrain.json",
    "pretrain": "data/toy/pretrain",
    "data/ScienceQA": "data/toy/scienceqa",
    "data/ScienceQA/images/train": "data/toy/scienceqa/images/train",
    "data/ScienceQA/images/val": "data/toy/scienceqa/images/val",
    "cat.jpg": "data/toy/pretrain/00000.png",
    "data/toy/scienceqa/images/test/1373/image.png": "data/toy/pretrain/00000.png",
    "own.json": "data/toy/pretrain.json",
    "own_images": "data/toy/pretrain",
    "1000": "8",                             # --keep
    "int4": "int8",                          # the toy layers have 96 rows, and 4 bits need multiples of 64
    "captions.json": "data/toy/coco/captions_train2014.json",
    "captions_train2014.json": "data/toy/coco/captions_train2014.json",
    "instances_train2014.json": "data/toy/coco/instances_train2014.json",
    "llava_vqav2_mscoco_test-dev2015.jsonl": f"{BENCHMARKS}/vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
    "llava_vqav2_mscoco_test2015.jsonl": f"{BENCHMARKS}/vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
    "llava_textvqa_val_v051_ocr.jsonl": f"{BENCHMARKS}/textvqa/llava_textvqa_val_v051_ocr.jsonl",
    "TextVQA_0.5.1_val.json": f"{BENCHMARKS}/textvqa/TextVQA_0.5.1_val.json",
    "llava_pope_test.jsonl": f"{BENCHMARKS}/pope/llava_pope_test.jsonl",
    **{f"coco_pope_{name}.json": f"{BENCHMARKS}/pope/coco_pope_{name}.json"
       for name in ("random", "popular", "adversarial")},
    "llava_mme.jsonl": f"{BENCHMARKS}/mme/llava_mme.jsonl",
    "MME_Benchmark_release_version": f"{BENCHMARKS}/mme",
    "mmbench_dev_20230712.tsv": f"{BENCHMARKS}/mmbench/mmbench_dev_20230712.tsv",
    **{name: f"{BENCHMARKS}/llavabench/{name}"
       for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")},
    **dict.fromkeys(("images", "test2015", "train_images", "val2014"), f"{BENCHMARKS}/val2014"),
}


# ---------------------------------------------------------------------------------------------
# The commands


class Endpoint(BaseHTTPRequestHandler):
    """A local stand-in for both language models that the commands ask: LLaVA-Bench's judge and the teacher."""

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        asked = messages[-1]["content"]
        text = "8 6\nToy." if "[Assistant 1]" in asked else toy.teach(messages[0]["content"], asked)
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """Toy data of a few images, barely trained toy models, and a LLaVA put together from them."""
    folder, tokenizer = tmp_path_factory.mktemp("toy"), toy.make_tokenizer(size=600)
    data = folder / "data/toy"
    toy.write_scienceqa(data / "scienceqa", sizes=(("train", 40), ("val", 8), ("test", 12)))
    toy.write_captions(data / "pretrain", size=24)
    toy.write_coco(data / "coco", size=6)
    toy.write_benchmarks(data / "benchmarks", size=4)
    toy.write_clip(data / "clip", steps=2, size=64, batch=8)
    toy.write_language(data / "mistral", toy.MISTRAL, tokenizer, steps=2, batch=2)
    model = Llava.from_pretrained(vision=data / "clip", language=data / "mistral")
    model.save_pretrained(folder / "runs/toy/stage2")
    Processor.from_pretrained(data / "mistral", model.config).save_pretrained(folder / "runs/toy/stage2")
    return folder


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()


def left_to_ci(command: str) -> bool:
    return command in BY_CI or any(word in BY_CI for word in shlex.split(command))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not left_to_ci(c)])
def test_the_command_runs(command, toy_folder, endpoint, monkeypatch):
    monkeypatch.chdir(toy_folder)
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint)
    monkeypatch.setattr("builtins.input", lambda _: "")      # an empty line ends a conversation
    words = [TOY.get(word, word) for word in shlex.split(command)[1:]]
    if words[0] == "train.py":
        words += ["--epochs", "1"]
    if "--model" in words and words[0] in ("llava.py", "eval.py"):        # toy models never end their answers
        words += ["--max-new-tokens", "8"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / words[0]), *words[1:]])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{command}: {end.code}"


def test_the_commands_that_pytest_leaves_out_are_in_ci():
    ci = (ROOT / ".ci/run").read_text().replace("\\\n", " ").splitlines()
    for command in filter(left_to_ci, COMMANDS):
        kind = next(word for word in BY_CI if word == command or word in shlex.split(command))
        assert any(line.startswith(command.split()[0]) and kind in line for line in ci), command


# ---------------------------------------------------------------------------------------------
# "Step through it"


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """{function: the text of its local variables' expression at its first return}, while an untrained toy model
    of the sizes that `python train.py` trains answers the README's question."""
    tokenizer = toy.make_tokenizer()
    text = TextConfig(vocab_size=tokenizer.get_vocab_size(), **toy.MISTRAL)
    model = Llava(LlavaConfig(toy.VISION, text, image_token_id=text.vocab_size)).eval()
    processor = Processor(tokenizer.to_str(), model.config)
    question = next(shlex.split(c)[-1] for c in COMMANDS if "--trace" in c)
    wanted, found = {}, {}
    for name, expression in step_rows().items():
        function = llava
        for part in name.split("."):
            function = getattr(function, part)
        wanted[function.__code__] = name, expression[0]

    def at_return(frame, event, _) -> None:
        name, expression = wanted.get(frame.f_code, (None, None))
        if event == "return" and name and name not in found:
            found[name] = eval(expression, {"list": list}, dict(frame.f_locals))

    image = toy.draw(toy.make_scene(toy.random.Random(0)), toy.random.Random(0))
    sys.setprofile(at_return)
    try:
        llava.stream_answer(model, processor, [{"role": "user", "content": f"<image>\n{question}"}], [image],
                            max_new_tokens=2)
    finally:
        sys.setprofile(None)
    return found


def step_rows() -> dict[str, tuple[str, str]]:
    """{function: (expression, value in the toy model)} of the README's table."""
    rows = re.findall(r"^\| `llava\.py: ([\w.]+)` \| `(.*?)`.* \| `(.*?)` \| `.*?` \|$", README, re.M)
    return {name: (expression, value) for name, expression, value in rows}


def test_the_five_places_to_stop_show_what_the_readme_says(answered):
    assert list(answered) == list(step_rows()) and len(answered) == 5, "in this order"
    for name, (_, value) in step_rows().items():
        shown = answered[name]
        if isinstance(shown, tuple) and isinstance(shown[0], list):
            shown = ", ".join(map(str, shown))
        assert str(shown) == value, name


# ---------------------------------------------------------------------------------------------
# Symbols, links, tables, lengths


@functools.cache
def symbols(file: str) -> set[str]:
    """Functions, classes, methods and constants of a module, as `name` or `Class.name`."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_function_that_the_texts_name_exists():
    named = re.findall(r"`(\w+\.py): ([\w.]+)`", README + RESULTS)
    named += [(file, name) for name, file in re.findall(r"\[`([\w.]+)`\]\((\w+\.py)\)", README + RESULTS)]
    assert len(set(named)) > 30
    missing = [f"{file}: {name}" for file, name in named if name not in symbols(file)]
    assert not missing


def test_the_glossary_has_at_least_20_terms_and_each_has_its_function():
    glossary = RESULTS[RESULTS.index("## Glossary"):RESULTS.index("## Checkpoints")]
    rows = [line for line in glossary.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    assert all(re.fullmatch(r"\|[^|]+\|[^|]+\| `\w+\.py: [\w.]+` \|", row) for row in rows)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_link_leads_to_a_file_and_a_heading(file):
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (file.parent / path).resolve() if path else file
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_the_readme_has_at_most_230_lines_and_cites_the_paper_once():
    assert len(README.splitlines()) <= 230
    assert " ".join(README.split()).count("Miao, Gao, Das, Zhang 2024") == 1


def test_the_table_of_files_has_their_lengths_within_a_tenth():
    rows = re.findall(r"^\| \[(\w+\.py)\].*\| ([\d,]+) \|$", README, re.M)
    assert [file for file, _ in rows] == ["llava.py", "train.py", "eval.py", "prune.py"]
    for file, lines in rows:
        measured = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines.replace(",", "")) / measured - 1) < 0.1, f"{file} has {measured} lines"


def test_the_shapes_of_the_figure_are_those_of_the_published_model():
    drawn = (ROOT / "tests/pictures/architecture.svg").read_text(encoding="utf-8")
    with torch.device("meta"), torch.inference_mode():
        model, V = Llava(LlavaConfig()), VisionConfig()
        states = model.vision_tower(torch.empty(1, 3, V.image_size, V.image_size))
        image = model.projector(states[:, 1:])
        hidden = model.language_model(torch.empty(1, 8, image.shape[2]))[:, -1]
        logits = model.language_model.lm_head(hidden)
    for tensor in (states, states[:, 1:], image, hidden, logits):
        assert str(list(tensor.shape)) in drawn
    assert f"[1, T + {image.shape[1] - 1}, 4096]" in drawn
    for module in (model.vision_tower, model.projector, model.language_model.layers):
        assert f"{sum(p.numel() for p in module.parameters()) / 1e9:.2f} B weights" in drawn


def opens_and_saves() -> str:
    """The table of RESULTS.md, from the checkpoints on which test_layouts.py compares with transformers."""
    rows = ["| opens | from files | as | saves, for transformers |", "|---|---|---|---|"]
    for layout, build in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            case = build(Path(folder))
            model = Llava.from_pretrained(**case.source, dtype=torch.float32)
            files = {re.sub(r"-\d+-of-\d+", "-*", file.name) for source in case.source.values()
                     for file in Path(source).iterdir() if file.suffix in (".bin", ".safetensors")}
            model.save_pretrained(Path(folder, "saved"))
            saved = json.loads(Path(folder, "saved/config.json").read_text())["model_type"]
            made = f"{model.config.text.model_type}, {model.config.projector}, {model.config.image_mode}"
            files = ", ".join(f"`{file}`" for file in sorted(files))
            rows.append(f"| {layout} | {files} | {made} | `{saved}` |")
    return "\n".join(rows)


def test_the_table_of_layouts_is_what_opens_and_what_it_saves():
    assert opens_and_saves() in RESULTS, "python -m tests.test_readme prints the table as it is now"


if __name__ == "__main__":
    print(opens_and_saves())
