"""The tree shows the architecture: who may import whom, and that importing costs nothing but the imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Packages, and which of the others each may import.
PACKAGES = {
    "mmmamba": set(),
    "quantize": {"mmmamba"},
    "distill": {"mmmamba"},
    "app": {"mmmamba", "quantize"},
    "benchmarks": {"mmmamba", "quantize", "distill"},
}
# What would be a circle at import time and is imported inside a function alone: (file, the other package).
LAZY = {
    ("mmmamba/checkpoint.py", "quantize"),  # load_model(..., quantize=...)
    ("mmmamba/flags.py", "quantize.precision"),  # what `auto` means
}
# Modules of mmmamba: each may import what stands left of it ...
CHAIN = (
    ("config", "segments"),
    ("kernels",),
    ("layers", "state"),
    ("attention", "mixer"),
    ("model",),
    ("decoder",),
    ("decoder_cpu",),
    ("generate",),
)
# ... and these, which stand beside the chain, what is named here.
BESIDE = {
    "image": {"config"},
    "tokenizer": set(),
    "prompt": {"config", "tokenizer"},
    "keymap": {"config"},
    "packing": set(),
    "sampling": set(),
    "stored": {"packing"},
    "checkpoint": {"config", "keymap", "model", "packing", "stored"},
    "bundle": {"checkpoint", "keymap", "model", "packing", "stored"},
    "cost": {"config", "state"},
    "info": {"config", "cost", "keymap", "stored"},
    "conversation": {"generate", "image", "model", "prompt", "tokenizer"},
    "place": set(),
    "memory": set(),
    "talk": {"config", "prompt", "tokenizer"},
    "chart": set(),
    "sweep": {"chart", "config", "cost", "generate", "memory", "model", "prompt", "state", "talk", "tokenizer"},
    "together": {"generate", "model", "segments", "state"},
    "batch": {"generate", "image", "model", "prompt", "state", "together", "tokenizer"},
    "jsonl": {"batch", "generate"},
    "flags": {"info", "place"},
    "cli": {"batch", "checkpoint", "conversation", "flags", "generate", "image", "info", "jsonl"},
    "__main__": {"cli"},
    "__init__": {"checkpoint", "config", "conversation", "generate", "model", "state"},
}
FROM_THE_SIDE = {
    "kernels": {"packing"},
    "decoder": {"sampling"},
    "decoder_cpu": {"packing"},
    "generate": {"sampling", "tokenizer"},
}


def may_import() -> dict[str, set[str]]:
    allowed, left = dict(BESIDE), set()
    for level in CHAIN:
        allowed |= {name: left | FROM_THE_SIDE.get(name, set()) for name in level}
        left = left | set(level)
    return allowed


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too; relative imports made absolute."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_sit_on(package: str) -> None:
    forbidden = (PACKAGES.keys() | {"tests"}) - PACKAGES[package] - {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(package)
        for line, name in imports(path)
        if name.partition(".")[0] in forbidden
        and not any((str(path.relative_to(ROOT)), name.rpartition(".")[0]) == lazy for lazy in LAZY)
    ]
    assert not wrong


@pytest.mark.parametrize(("file", "module"), sorted(LAZY))
def test_lazy_imports_are_made_when_asked_for(file: str, module: str) -> None:
    """Inside a function, and really there: an exception that nobody needs any more is taken out."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = {id(n): n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == module}
    assert found
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    assert not found.keys() - inside


def test_entry_point_imports_the_app_alone() -> None:
    ours = {name.partition(".")[0] for _, name in imports(ROOT / "app.py")} & (PACKAGES.keys() | {"tests"})
    assert ours == {"app"}


def test_modules_import_only_what_stands_left_of_them() -> None:
    allowed = may_import()
    wrong = []
    for path in sources("mmmamba"):
        module = path.relative_to(ROOT / "mmmamba").with_suffix("").parts[0]
        assert module in allowed, f"{path.name} is new: say in CHAIN or BESIDE where mmmamba.{module} stands"
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top != "mmmamba" or target == module:
                continue
            if target not in allowed:
                target = "__init__"  # `from mmmamba import load_model`
            if target not in allowed[module]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


def test_the_model_needs_no_user_interface() -> None:
    """mmmamba runs where only torch and the readers of checkpoints are installed."""
    heavy = {"gradio", "transformers", "torchvision"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("mmmamba")
        for line, name in imports(path)
        if name.partition(".")[0] in heavy
    ]
    assert not wrong


# Imported when a scan, fused operators or a decoder are chosen on CUDA.
NEED_TRITON = {
    *(f"mmmamba/decoder/{name}.py" for name in ("check", "fused", "layers", "one_launch", "session", "workspace")),
    *(f"mmmamba/kernels/{name}.py" for name in ("gemm", "gemv", "pointwise", "rows", "sampler", "split_kv", "step")),
    *(f"mmmamba/kernels/{name}.py" for name in ("mixer_train", "ssd_op", "ssd_triton")),
    "benchmarks/decode_parts.py",
}

GUARDED_IMPORT = """
import os, runpy, sys

def guard(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "os.system"):
        raise SystemExit(f"{event} {args} while importing")
    if event == "open" and isinstance(args[0], str) and "checkpoints" in args[0].split(os.sep):
        raise SystemExit(f"{args[0]} opened while importing")

import importlib, gradio, torch  # what other packages do when imported is theirs to answer for
sys.addaudithook(guard)
for name in sys.argv[1:]:
    importlib.import_module(name)
runpy.run_path("app.py", run_name="imported")
import threading
left = [t.name for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
assert not left, f"threads started by importing: {left}"
assert torch.get_default_dtype() == torch.float32, "importing changed torch's default dtype"
print("done")
"""


def test_importing_does_no_work() -> None:
    """No network, no weights read, no threads: the page opens at once and tools can look at the modules."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("mmmamba", "quantize", "app", "benchmarks")
        for path in sources(package)
        if path.name != "__main__.py" and path.relative_to(ROOT).as_posix() not in NEED_TRITON
    ]
    done = subprocess.run(
        [sys.executable, "-c", GUARDED_IMPORT, *modules],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_versions_agree() -> None:
    """What a Space installs (README), what was tested (constraints.txt) and what is allowed (requirements.txt)."""
    constraints = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    front_matter = (ROOT / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert re.search(r"^sdk_version: (\S+)$", front_matter, re.MULTILINE)[1] == constraints["gradio"]
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-distill.txt"):
        named = re.findall(r"^([\w.-]+)>=", (ROOT / file).read_text(), re.MULTILINE)
        assert named
        assert not [name for name in named if name not in constraints]
        # These need a compiler, and a torch that is there already.
        assert not {"mamba-ssm", "causal-conv1d"} & set(named)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "mmmamba" / "__init__.py").read_text()
