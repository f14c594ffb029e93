"""The package as a whole: importing it is quiet and light, and imports point one way."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import etmamba_timm

PACKAGE = Path(etmamba_timm.__file__).parent
# The parts of the package, and what each may import.
MAY_IMPORT = {
    "words": set(),
    "clip": set(),
    "files": set(),
    "features": {"files"},
    "ops": set(),
    "layers": {"ops"},
    "models": {"clip", "layers", "words"},
    "checkpoints": {"clip", "layers", "models", "ops", "words"},
    "zoo": {"checkpoints", "models"},
    "data": {"clip", "files", "words"},
    "views": {"data"},
    "predict": {"checkpoints", "data", "models", "views", "zoo", "words"},
    "runtime": {"checkpoints", "clip", "data", "models", "predict"},
    "export": {"checkpoints", "data", "models", "ops", "predict", "runtime"},
    "training": {"clip", "checkpoints", "data", "features", "files", "models", "predict", "views", "zoo", "words"},
    "seeing": {"clip", "checkpoints", "data", "files", "models", "predict", "training", "views", "words"},
    "cli": {
        "clip",
        "checkpoints",
        "data",
        "environment",
        "export",
        "features",
        "files",
        "models",
        "ops",
        "predict",
        "runtime",
        "seeing",
        "training",
        "version",
        "words",
        "zoo",
    },
    "__main__": {"cli"},
    "on_import": set(),
    "version": set(),
    "environment": {"ops", "version", "words"},
    "hf": {"checkpoints", "clip", "data", "models", "zoo", "words"},
    "__init__": {"on_import", "version", "zoo"},
}


def test_import_is_quiet_and_light(tmp_path):
    code = """
import sys, timm
before = set(sys.modules)  # old versions of torchvision, which timm imports, import av
import etmamba_timm
parts = ('data', 'predict', 'checkpoints.publish', 'checkpoints.convert', 'cli', 'training', 'seeing', 'hf', 'export')
parts = {'etmamba_timm.' + part for part in parts}
heavy = {'av', 'transformers', 'mamba_ssm', 'accelerate', 'tensorboard', 'matplotlib', 'sklearn'} | parts
print(*heavy & (set(sys.modules) - before), end='')
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "modules"),
    [
        (["--help"], {"torch", "numpy"}),
        (["--version"], {"torch", "numpy"}),
        (["train", "--help"], {"torch", "numpy"}),
        (["info", "--backends"], {"timm"}),
    ],
)
def test_what_a_command_does_without(tmp_path, arguments, modules):
    code = f"""
import sys, etmamba_command
sys.argv[1:] = {arguments}
try:
    status = etmamba_command.main()
except SystemExit as end:
    status = end.code
print(status, *{modules} & set(sys.modules), file=sys.stderr, end='')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "0"
    assert done.stdout
    assert ("label_smoothing=0.1" in done.stdout) == (arguments[0] == "train")


def test_the_command_knows_the_models(tmp_path):
    code = "import sys, etmamba_command; sys.exit(etmamba_command.main())"
    command = [sys.executable, "-c", code, "info", "etmamba_ti.mocap"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "etmamba_ti.mocap" in done.stdout


@pytest.mark.parametrize(("given", "policy"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_the_commands_threads_sleep_while_they_wait(tmp_path, given, policy):
    """Set before PyTorch is imported, which reads it."""
    code = """
import os, sys
class Check:
    def find_spec(self, name, *args):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), file=sys.stderr, end="")
            os._exit(0)
sys.meta_path.insert(0, Check())
import etmamba_command
sys.argv[1:] = ["info", "etmamba_ti"]
etmamba_command.main()
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stderr == policy


def test_imports_point_one_way():
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        part = relative.parts[0].removesuffix(".py")
        seen.add(part)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                absolute = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert not any(name.startswith("etmamba_timm") for name in absolute), (
                    f"{relative}: use a relative import"
                )
            if isinstance(node, ast.ImportFrom) and node.level:
                above = ("etmamba_timm", *relative.parts[:-1])[: len(relative.parts) + 1 - node.level]
                target = [*above[1:], *(node.module or "").split(".")]
                names = [target[0]] if target[0] else [alias.name for alias in node.names]
                for name in names:
                    imported = name if name in MAY_IMPORT else part
                    assert imported == part or imported in MAY_IMPORT[part], f"{relative} imports {name}"
    assert seen == set(MAY_IMPORT)


def test_contributing_shows_these_arrows():
    """Each part is in the tree, and reaches by its arrows all that it may import."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("    etmamba_timm/\n")[2].partition("    weights/")[0]
    lines = re.findall(r"^ {6}(\w+)(?:/|\.py) .*?(?: -> (.*))?$", tree, re.MULTILINE)
    arrows = {name: set(targets.split(", ")) - {""} for name, targets in lines}

    def reached(name: str) -> set:
        return arrows[name].union(*map(reached, arrows[name]))

    assert set(arrows) == set(MAY_IMPORT) - {"__init__", "__main__"}
    for name in arrows:
        assert arrows[name] <= MAY_IMPORT[name] <= reached(name), name


def test_only_the_command_line_prints():
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert path.parent.name == "cli" or not prints, path


def test_no_module_imports_itself_through_others():
    """At module level, imports for type annotations alone included."""
    modules = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    imports = {name: _imported(name, path, set(modules)) for name, path in modules.items()}
    done: set = set()

    def visit(name: tuple, way: list) -> None:
        assert name not in way, " -> ".join(".".join(part) for part in [*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(imports[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(modules):
        visit(name, [])
    assert ("data", "embedded") in imports["data", "annotations"]  # the test sees imports


def _imported(name: tuple, path: Path, modules: set) -> set:
    """The modules that a module imports at its top level; `from . import x` imports x, if x is a module."""
    todo: list = list(ast.parse(path.read_text()).body)
    found = set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*name[: len(name) - node.level], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                target = (*base, alias.name)
                possible = (target, (*target, "__init__"), base, (*base, "__init__"))
                found.add(next(other for other in possible if other in modules))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found
