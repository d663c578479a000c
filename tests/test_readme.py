"""Test README.md and tests/RESULTS.md: every command runs on toy data; every link, name and table is right.

Each published model or data set is replaced by a toy one of the same layout. .ci/run executes the commands
that need minutes or several processes."""

import ast
import functools
import json
import random
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
# .ci/run executes the commands that equal one of these or contain it as a word.
CI_COMMANDS = ("python train.py", "pytest", "--study", "torchrun")
BENCHMARKS = "data/toy/benchmarks"
TOY_ARGUMENTS = {                            # argument in the README -> argument of the test
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
    "int4": "int8",                          # int4 needs a multiple of 64 rows; the toy layers have 96
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
    """A local server in place of both language models that the commands use: the judge and the teacher."""

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        question = messages[-1]["content"]
        if "[Assistant 1]" in question:      # the judge
            text = "8 6\nToy."
        else:
            text = toy.make_reply(messages[0]["content"], question)
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    """Toy data with a few images, toy models after two training steps, and a LLaVA that consists of them."""
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


def runs_in_ci(command: str) -> bool:
    return command in CI_COMMANDS or any(word in CI_COMMANDS for word in shlex.split(command))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not runs_in_ci(c)])
def test_command_runs(command, toy_folder, endpoint, monkeypatch):
    monkeypatch.chdir(toy_folder)
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint)
    monkeypatch.setattr("builtins.input", lambda _: "")      # an empty line ends a conversation
    program, *flags = [TOY_ARGUMENTS.get(word, word) for word in shlex.split(command)[1:]]
    if program == "train.py":
        flags += ["--epochs", "1"]
    if "--model" in flags and program in ("llava.py", "eval.py"):
        flags += ["--max-new-tokens", "8"]   # after two training steps, no answer ends by itself
    monkeypatch.setattr(sys, "argv", [str(ROOT / program), *flags])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        assert not error.code, f"{command}: {error.code}"


def test_commands_that_pytest_does_not_run_are_in_ci():
    ci_lines = (ROOT / ".ci/run").read_text().replace("\\\n", " ").splitlines()
    for command in filter(runs_in_ci, COMMANDS):
        key = next(word for word in CI_COMMANDS if word == command or word in shlex.split(command))
        assert any(line.startswith(command.split()[0]) and key in line for line in ci_lines), command


# ---------------------------------------------------------------------------------------------
# "Step through it"


@pytest.fixture(scope="module")
def step_values():
    """{function: value of the README's expression when the function first returns}. An untrained toy model of
    the sizes that `python train.py` trains answers the README's question."""
    tokenizer = toy.make_tokenizer()
    text = TextConfig(vocab_size=tokenizer.get_vocab_size(), **toy.MISTRAL)
    model = Llava(LlavaConfig(toy.VISION, text, image_token_id=text.vocab_size)).eval()
    processor = Processor(tokenizer.to_str(), model.config)
    question = next(shlex.split(c)[-1] for c in COMMANDS if "--trace" in c)
    expressions, values = {}, {}
    for name, (expression, _) in read_step_table().items():
        function = llava
        for part in name.split("."):
            function = getattr(function, part)
        expressions[function.__code__] = name, expression

    def at_return(frame, event, _) -> None:
        name, expression = expressions.get(frame.f_code, (None, None))
        if event == "return" and name and name not in values:
            values[name] = eval(expression, {"list": list}, dict(frame.f_locals))

    image = toy.draw(toy.make_scene(random.Random(0)), random.Random(0))
    messages = [{"role": "user", "content": f"<image>\n{question}"}]
    sys.setprofile(at_return)
    try:
        llava.stream_answer(model, processor, messages, [image], max_new_tokens=2)
    finally:
        sys.setprofile(None)
    return values


def read_step_table() -> dict[str, tuple[str, str]]:
    """Return {function: (expression, value in the toy model)} of the README's table."""
    rows = re.findall(r"^\| `llava\.py: ([\w.]+)` \| `(.*?)`.* \| `(.*?)` \| `.*?` \|$", README, re.M)
    return {name: (expression, value) for name, expression, value in rows}


def test_step_table_shows_the_values_and_the_order_of_a_run(step_values):
    assert list(step_values) == list(read_step_table()) and len(step_values) == 5, "in this order"
    for name, (_, expected) in read_step_table().items():
        value = step_values[name]
        if isinstance(value, tuple) and isinstance(value[0], list):
            value = ", ".join(map(str, value))
        assert str(value) == expected, name


# ---------------------------------------------------------------------------------------------
# Names, links, tables, lengths


@functools.cache
def defined_names(file: str) -> set[str]:
    """Return the functions, classes, methods and constants of a module, as `name` or `Class.name`."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_every_function_that_is_mentioned_exists():
    named = re.findall(r"`(\w+\.py): ([\w.]+)`", README + RESULTS)
    named += [(file, name) for name, file in re.findall(r"\[`([\w.]+)`\]\((\w+\.py)\)", README + RESULTS)]
    assert len(set(named)) > 30
    missing = [f"{file}: {name}" for file, name in named if name not in defined_names(file)]
    assert not missing


def test_glossary_has_at_least_20_terms_each_with_a_function():
    glossary = RESULTS[RESULTS.index("## Glossary"):RESULTS.index("## Checkpoints")]
    rows = [line for line in glossary.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    assert all(re.fullmatch(r"\|[^|]+\|[^|]+\| `\w+\.py: [\w.]+` \|", row) for row in rows)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_link_leads_to_an_existing_file_and_heading(file):
    for target in re.findall(r"\]\((?!https:)([^)]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked_file = (file.parent / path).resolve() if path else file
        assert linked_file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked_file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}


def test_readme_has_at_most_230_lines_and_cites_the_paper_once():
    assert len(README.splitlines()) <= 230
    assert " ".join(README.split()).count("Miao, Gao, Das, Zhang 2024") == 1


def test_table_of_files_states_line_counts_within_10_percent():
    rows = re.findall(r"^\| \[(\w+\.py)\].*\| ([\d,]+) \|$", README, re.M)
    assert [file for file, _ in rows] == ["llava.py", "train.py", "eval.py", "prune.py"]
    for file, stated in rows:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(int(stated.replace(",", "")) / lines - 1) < 0.1, f"{file} has {lines} lines"


def test_figure_shows_the_shapes_and_sizes_of_the_published_model():
    svg = (ROOT / "tests/pictures/architecture.svg").read_text(encoding="utf-8")
    size = VisionConfig().image_size
    with torch.device("meta"), torch.inference_mode():
        model = Llava(LlavaConfig())
        states = model.vision_tower(torch.empty(1, 3, size, size))
        image = model.projector(states[:, 1:])
        hidden = model.language_model(torch.empty(1, 8, image.shape[2]))[:, -1]
        logits = model.language_model.lm_head(hidden)
    for tensor in (states, states[:, 1:], image, hidden, logits):
        assert str(list(tensor.shape)) in svg
    assert f"[1, T + {image.shape[1] - 1}, 4096]" in svg
    for module in (model.vision_tower, model.projector, model.language_model.layers):
        assert f"{sum(p.numel() for p in module.parameters()) / 1e9:.2f} B weights" in svg


def layout_table() -> str:
    """Return the table of checkpoints in RESULTS.md, made from those that test_layouts.py compares."""
    rows = ["| opens | from files | as | saves, for transformers |", "|---|---|---|---|"]
    for layout, build in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            sources = build(Path(folder)).source
            model = Llava.from_pretrained(**sources, dtype=torch.float32)
            files = {re.sub(r"-\d+-of-\d+", "-*", file.name) for source in sources.values()
                     for file in Path(source).iterdir() if file.suffix in (".bin", ".safetensors")}
            model.save_pretrained(Path(folder, "saved"))
            saved = json.loads(Path(folder, "saved/config.json").read_text())["model_type"]
        opened_as = f"{model.config.text.model_type}, {model.config.projector}, {model.config.image_mode}"
        names = ", ".join(f"`{file}`" for file in sorted(files))
        rows.append(f"| {layout} | {names} | {opened_as} | `{saved}` |")
    return "\n".join(rows)


def test_table_of_checkpoints_is_up_to_date():
    assert layout_table() in RESULTS, "python -m tests.test_readme prints the current table"


if __name__ == "__main__":
    print(layout_table())
