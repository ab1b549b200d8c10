"""Imports point one way, heavy libraries load late, and every module can be the first one imported."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[1]

# A module may import from its own room and from the ones on the lines above; rooms on one line are strangers.
# A new room needs a place here and in docs/design/architecture.md.
ORDER = (
    ("display",),
    ("errors",),
    ("io",),
    ("config",),
    ("runtime",),
    ("tokenizers",),
    ("data",),
    ("prep",),
    ("scaffold",),
    ("kernels",),
    ("models",),
    ("generation",),
    ("evaluation",),
    ("training",),
    ("export",),
    ("hf",),
    ("serving",),
    ("api",),
    ("reports",),
    ("benchmarks",),
    ("gpu_suite",),
    ("experiments",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Rooms and modules that do their work without torch, and must load without it.
NEVER_TORCH = (
    "display",
    "errors",
    "io",
    "runtime.malloc",
    "runtime.signals",
    "runtime.folder_store",
    "runtime.processes",
    "runtime.resident_memory",
    "benchmarks.harness.isolated_process",
    "benchmarks.tokenization.bench",
    "runtime.streams",
    "runtime.consoles",
    "runtime.cores",
    "runtime.log",
    "runtime.progress",
    "config",
    "tokenizers",
    "data.unpacked",
    "data.corpus.documents",
    "data.corpus.files",
    "data.corpus.reading",
    "data.manifest",
    "data.order",
    "data.framing",
    "data.prefetch",
    "data.record_figures",
    "data.sharded_store",
    "data.shard_file",
    "data.memory_store",
    "data.stream",
    "prep",
    "reports.schemas",
    "scaffold",
    "serving.page",
    "serving.messages",
    "serving.engine_client",
    "serving.http_process",
    "serving.protocol",
    "generation.requests",
    "generation.row_text",
    "generation.detokenize",
    "generation.stop_texts",
    "experiments.plan",
    "experiments.plan_schema",
    "commands",
)
# Modules that need the extra `serve` to be imported; the command says so where it is missing.
OF_SERVE = (
    "psannlm.serving.answer",
    "psannlm.serving.app",
    "psannlm.serving.events",
    "psannlm.serving.metrics",
    "psannlm.serving.server",
    "psannlm.serving.service",
)
# Modules that extend classes of the extra `hf`, and need it to be imported.
OF_TRANSFORMERS = (
    "psannlm.hf",
    "psannlm.export.configuration_psannlm",
    "psannlm.export.modeling_psannlm",
    "psannlm.export.verify_child",
    "psannlm.export.gguf_verify_child",
)
# Modules of other distributions that come with a declared one and belong to its public face.
COMES_WITH = {
    "jinja2": ("markupsafe",),
    "pydantic": ("pydantic_core", "annotated_types", "typing_extensions"),
    "pyyaml": ("yaml",),
    "rich": (),
    "tokenizers": ("huggingface_hub",),
}


@dataclass(frozen=True)
class Import:
    """``target`` is a dotted name; ``is_late`` when it stands in a function or under TYPE_CHECKING."""

    target: str
    line: int
    is_late: bool


def module_name(path: Path) -> str:
    """The name under which a file of the repository is installed."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    if parts[0] == "commands":
        parts = ("psannlm", *parts)
    return ".".join(parts).removesuffix(".__init__")


def read_sources() -> dict[str, str]:
    files = [file for folder in ("psannlm", "commands", "psann") for file in (REPOSITORY / folder).rglob("*.py")]
    return {module_name(file): file.read_text(encoding="utf-8") for file in sorted(files)}


def imports_of(module: str, source: str, known: set[str]) -> Iterator[Import]:
    """Every import in ``source``, of names in ``known`` down to the module itself."""
    pending = [(node, False) for node in ast.parse(source).body]
    while pending:
        node, is_late = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, is_late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # A module's own package is one level up from it, or itself if it is a package.
                is_package = any(name.startswith(f"{module}.") for name in known)
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in known else base, node.lineno, is_late)
        else:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            pending += [(child, is_late or is_function or is_typing) for child in ast.iter_child_nodes(node)]


def read_graph(sources: Mapping[str, str]) -> dict[str, list[Import]]:
    known = set(sources)
    return {module: list(imports_of(module, source, known)) for module, source in sources.items()}


def room_of(module: str) -> str:
    """``psannlm.data.order`` is in ``data``; the package itself is ``psannlm``; the forwarding path is ``psann``."""
    parts = module.split(".")
    return parts[1] if parts[0] == "psannlm" and len(parts) > 1 else parts[0]


def is_allowed(importer: str, target: str) -> bool:
    """Whether a module of ours may import another one of ours."""
    here, there = room_of(importer), room_of(target)
    if here in RANK:
        # From the package itself only plain facts such as the version come.
        return there == "psannlm" or here == there or RANK.get(there, len(ORDER)) < RANK[here]
    if here == "commands":
        return there in RANK or there == "psannlm" or target == "psannlm.commands.options" or importer.endswith(".app")
    allowed = {
        "psannlm": ("psannlm.api",),
        "__main__": ("psannlm.commands.app",),
        "psann": ("psannlm", "psannlm.__main__"),
    }
    if here == "psann" and importer.count(".") > 1 and room_of(target) in ("config", "data", "models", "training"):
        return True  # the deeper paths of older documents name what these rooms hold
    return target in allowed[here]


def wrong_arrows(graph: Mapping[str, list[Import]]) -> list[str]:
    return [
        f"{importer}:{found.line} imports {found.target}"
        for importer, imports in graph.items()
        for found in imports
        if found.target.split(".")[0] in ("psannlm", "psann") and not is_allowed(importer, found.target)
    ]


def loaded_by(module: str, graph: Mapping[str, list[Import]]) -> set[str]:
    """Everything that importing ``module`` loads: ours down to the last, of others the distribution's top name."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in graph:
            pending += [found.target for found in graph[name] if not found.is_late]
            pending += [parent for parent in [name.rpartition(".")[0]] if parent in graph]
    return {name if name in graph else name.partition(".")[0] for name in seen}


@pytest.fixture(scope="module")
def graph() -> dict[str, list[Import]]:
    return read_graph(read_sources())


def test_import_order_lists_every_package(graph: dict[str, list[Import]]) -> None:
    rooms = {room_of(module) for module in graph}
    assert rooms == {*RANK, "psannlm", "__main__", "commands", "psann"}


def test_architecture_lists_packages_in_import_order() -> None:
    text = (REPOSITORY / "docs/design/architecture.md").read_text(encoding="utf-8")
    table = text.partition("<!-- import order: begin -->")[2].partition("<!-- import order: end -->")[0]
    rows = [line.split("|") for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[1]) for row in rows] == list(range(1, len(ORDER) + 1))
    assert tuple(tuple(re.findall(r"`(\w+)`", row[2])) for row in rows) == ORDER


def test_imports_point_one_way(graph: dict[str, list[Import]]) -> None:
    assert wrong_arrows(graph) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("psannlm.generation.x", "from psannlm.training.loop import run_steps"),
        ("psannlm.generation.x", "import psannlm.evaluation.tasks.packs"),
        ("psannlm.models.x", "def late():\n    from psannlm.evaluation.loss import evaluate"),
        ("psannlm.models.x", "from psannlm import evaluation"),
        ("psannlm.tokenizers.x", "from ..data import documents"),
        ("psannlm.io.x", "from psannlm.config.run import RunConfig"),
        ("psannlm.api", "from psannlm.commands.options import print_json"),
        ("psannlm.errors", "from psannlm.io.atomic import write_text"),
        ("psannlm.commands.train", "from psannlm.commands.generate import generate"),
        ("psannlm.commands.train", "import psann.lm"),
        ("psannlm.data.x", "if True:\n    try:\n        import psann.lm\n    finally:\n        pass"),
        ("psann.lm", "from psannlm.api import psannLM"),
    ],
)
def test_import_check_detects_a_wrong_direction(module: str, source: str) -> None:
    """The check itself: each of these breaks the order in another way."""
    graph = read_graph({**read_sources(), module: source})
    assert [arrow for arrow in wrong_arrows(graph) if arrow.startswith(f"{module}:")]


def test_modules_form_no_circle(graph: dict[str, list[Import]]) -> None:
    edges = {module: {found.target for found in imports if found.target in graph} for module, imports in graph.items()}
    edges["psannlm"] = set()  # its only import happens when a name is first asked for
    try:
        tuple(TopologicalSorter(edges).static_order())
    except CycleError as error:
        pytest.fail(f"modules that import each other: {' -> '.join(error.args[1])}")


def test_packages_without_torch_load_without_it(graph: dict[str, list[Import]]) -> None:
    names = [f"psannlm.{name}" for name in NEVER_TORCH]
    modules = [m for m in graph if any(m == name or m.startswith(f"{name}.") for name in names)]
    assert len(modules) > len(names)
    modules += ["psannlm", "psannlm.__main__", "psann.lm", "psann.lm.train.cli"]
    assert [module for module in modules if "torch" in loaded_by(module, graph)] == []


def test_tokenizers_and_config_name_torch_nowhere(graph: dict[str, list[Import]]) -> None:
    for module, imports in graph.items():
        if room_of(module) in ("tokenizers", "config"):
            assert not [found for found in imports if found.target.partition(".")[0] == "torch"], module


def test_torch_check_detects_torch(graph: dict[str, list[Import]]) -> None:
    assert "torch" in loaded_by("psannlm.models.transformer", graph)
    assert "torch" not in loaded_by("psannlm.io.run_metadata", graph), "imported in a function: late"


def test_modules_need_only_declared_dependencies(graph: dict[str, list[Import]]) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in project["dependencies"]}
    allowed = {*declared, *(module for name in declared for module in COMES_WITH.get(name, ()))}
    foreign = {
        (module, found.target.partition(".")[0])
        for module, imports in graph.items()
        if module not in (*OF_TRANSFORMERS, *OF_SERVE)
        for found in imports
        if found.target.partition(".")[0] not in {*sys.stdlib_module_names, "psannlm", "psann"}
    }
    assert sorted(pair for pair in foreign if pair[1].lower() not in allowed) == []


# torch is loaded once and each module then in a forked child, where none of ours is loaded yet.
_IMPORT_IN_ORDER = """
import importlib, json, sys
modules, absent = json.loads(sys.stdin.read())
sys.modules.update(dict.fromkeys(absent))
for module in modules:
    importlib.import_module(module)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_reverse", [False, True])
def test_modules_import_in_any_order(is_reverse: bool, graph: dict[str, list[Import]]) -> None:
    """With the runtime dependencies alone: the optional ones are blocked, and a warning is an error.

    Two opposite orders are enough, since the modules form no circle.
    """
    absent = [
        "pyarrow",
        "zstandard",
        "transformers",
        "lm_eval",
        "tensorboard",
        "starlette",
        "uvicorn",
        "prometheus_client",
        "submitit",
        "pytest",
        "hypothesis",
    ]
    modules = sorted(module for module in graph if module not in ("psannlm.__main__", *OF_TRANSFORMERS, *OF_SERVE))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning:__main__", "-c", _IMPORT_IN_ORDER],
        input=json.dumps([modules[::-1] if is_reverse else modules, absent]),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr


_SCORE_GENERATE_AND_TRAIN = """
import sys, torch
from psannlm.config.model import ModelConfig
from psannlm.generation.engine import Engine
from psannlm.generation.generate import complete_ids
from psannlm.generation.requests import SamplingConfig
from psannlm.models.artifact import load_model, save_model
from psannlm.models.registry import build_model
from psannlm.config.run import config_from_mapping
from psannlm.tokenizers.resolve import fit_tokenizer
from psannlm.training.run import train

tokenizer = fit_tokenizer(["a wave is a wave"], "simple")
config = ModelConfig(base=sys.argv[1], d_model=16, n_layers=1, n_heads=2, vocab_size=tokenizer.vocab_size)
save_model("tiny.safetensors", build_model(config, seed=1), tokenizer)
loaded = load_model("tiny.safetensors")
ids = torch.tensor([tokenizer.encode("a wave")])
with torch.no_grad():
    loaded.model(ids, labels=ids)
complete_ids(Engine(loaded.model), tokenizer, [[1, 4]], max_new_tokens=4, sampling=SamplingConfig(seed=1))
open("corpus.txt", "w").write("a wave is a wave\\n" * 40)
data = {"sources": ["corpus.txt"], "tokenizer": "simple", "max_length": 16, "val_split": 0.1}
settings = {"batch_tokens": 64, "device": "cpu", "optimizer": sys.argv[2], "checkpoint_dir": "run", "max_steps": 4}
settings |= {"save_interval_steps": 2, "keep_checkpoints": 3}
run = config_from_mapping({"model": config.model_dump(exclude={"vocab_size"}), "data": data, "train": settings})
train(run)
train(run, resume="run/step_00000002")
print(*(name for name in ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp") if name in sys.modules))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("base", "optimizer"), [("waveresnet", "muon"), ("transformer", "adamw")])
def test_scoring_generating_and_training_load_no_compiler(base: str, optimizer: str, tmp_path: Path) -> None:
    """It takes as long to import as torch itself."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    code = [sys.executable, "-c", _SCORE_GENERATE_AND_TRAIN, base, optimizer]
    done = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.stdout.split(), done.returncode) == ([], 0), done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["train", "--help"], ["generate", "--help"], ["init", "--help"], ["schema", "--help"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    """What a person sees first must not wait for libraries that only the work needs."""
    code = (
        "import json, runpy, sys\n"
        "try:\n"
        "    runpy.run_module('psannlm', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    print(json.dumps([end.code, sorted({name.partition('.')[0] for name in sys.modules})]), file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    exit_code, loaded = json.loads(result.stderr)
    assert not exit_code
    assert "psannlm" in result.stdout
    heavy = {"torch", "numpy", "matplotlib", "sentencepiece", "tokenizers", "safetensors", "yaml"}
    assert heavy.intersection(loaded) == set()
