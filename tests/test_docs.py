"""README and docs/: Python blocks run as written, commands parse, tables and messages are the program's."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from videos import write_video

import etmamba_timm
from etmamba_timm.checkpoints import find_checkpoint
from etmamba_timm.cli import parser
from etmamba_timm.models import VARIANTS, count_cost
from etmamba_timm.training.evaluate import Scores

REPO = Path(__file__).parents[1]
PACKAGE = Path(etmamba_timm.__file__).parent
PAGES = {p.relative_to(REPO): p.read_text("utf-8") for p in (REPO / "README.md", *sorted(REPO.glob("docs/**/*.md")))}
SNIPPETS = [
    pytest.param(snippet, id=f"{page}-{i}")
    for page, text in PAGES.items()
    for i, snippet in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
NETWORK = "# needs the network\n"


def page(name: str) -> str:
    return PAGES[Path(name)]


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if not s.values[0].startswith(NETWORK)])
def test_python_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO if "torch.hub" in snippet or '"weights/' in snippet else tmp_path)
    if '"clip.mp4"' in snippet:
        write_video(tmp_path / "clip.mp4", num_frames=40)
    if '"clips"' in snippet:
        for name in ("jump", "run"):
            (tmp_path / "clips" / name).mkdir(parents=True)
            for i in range(4):
                write_video(tmp_path / "clips" / name / f"{i}.mp4", num_frames=20)
    if "read_checkpoint" in snippet:
        model = timm.create_model("etmamba_ti", num_classes=10, num_frames=8, img_size=64)
        torch.save(model.state_dict(), tmp_path / "last.pth")
    if "read_features" in snippet:
        from etmamba_timm.cli import main

        write_video(tmp_path / "clip.mp4", num_frames=20)
        assert main(["features", "clip.mp4", "--model", "etmamba_ti.mocap", "-o", "features.safetensors"]) == 0
    if "Scores.load" in snippet:
        classes = [str(i) for i in range(6)]
        scores = Scores(torch.eye(6), torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(6), 0, 0, classes)
        scores.save(tmp_path / "scores.safetensors")
    exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.values[0].startswith(NETWORK)])
def test_snippets_that_need_the_network_name_existing_weights(snippet):
    compile(snippet, "snippet", "exec")
    names = re.findall(r'create_model\("([\w.]+)", pretrained=True', snippet)
    assert names
    assert set(names) <= set(timm.list_pretrained("*mamba_*")) | set(VARIANTS)
    assert all(find_checkpoint(name).status in ("published", "warm start") for name in names)


def test_commands_are_the_parsers():
    """The parser accepts every `etmamba` command line of README and docs, in blocks and between backquotes."""
    shell = "\n".join(block for text in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    lines = re.findall(r"^(?:.*&& |[A-Z_]+=\S+ |.*-m )*etmamba(?:_timm)? (.*?)(?: *#.*)?$", shell, re.MULTILINE)
    assert len(lines) > 30
    for line in lines:
        assert callable(parser().parse_args(shlex.split(line)).run), line


def test_commands_page():
    spec = importlib.util.spec_from_file_location("commands", REPO / "docs" / "commands.py")
    commands = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(commands)
    assert page("docs/reference/commands.md") == commands.page(), "run: python docs/commands.py"


def test_links_of_the_readme():
    text = page("README.md")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert len(links) > 15
    assert all((REPO / link).exists() for link in links)
    assert len(text.splitlines()) <= 200


@pytest.mark.parametrize("name", ["README.md", "docs/models.md"])
def test_table_of_models(name):
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:STFP|–) .*) \|$", page(name), re.MULTILINE))
    assert set(rows) == set(VARIANTS)
    for model, row in rows.items():
        cost = count_cost(timm.create_model(model, device="meta"))
        expected = [f"{cost.params / 1e6:.2f} M"]
        expected += [f"{macs / 1e9:.1f} G" for macs in (cost.total_macs, cost.scan_macs, cost.videomamba_macs)]
        shown = row.split(" | ")[2:]
        assert len(shown) >= 2
        assert shown == expected[: len(shown)]


def test_table_of_folded_models():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) G \|$", page("docs/guides/speed.md"), re.MULTILINE)
    assert len(rows) == 3
    for name, params, macs in rows:
        cost = count_cost(timm.create_model(name, device="meta", folded=True))
        assert (f"{cost.params / 1e6:.2f}", f"{cost.macs / 1e9:.1f}") == (params, macs)


def messages() -> list[str]:
    """All texts of the package's source, with … for what is filled in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[srd]", "…", node.value))
    return found


def test_troubleshooting_has_the_programs_messages():
    text = page("docs/reference/troubleshooting.md")
    shown = re.findall(r"\*\*`(.+?)`\*\*(?! \((?:timm|PyTorch|huggingface_hub)'s)", text)
    assert len(shown) > 40
    source = messages()
    for message in shown:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))), re.DOTALL)
        assert any(map(pattern.search, source)), message


def test_environment_variables_are_all_listed():
    names = set()
    for path in (*PACKAGE.rglob("*.py"), REPO / "etmamba_command.py"):
        text = path.read_text("utf-8")
        names |= set(re.findall(r"environ\S*?[\[(]\"(\w+)\"", text)) | set(
            re.findall(r"\b(?:ETMAMBA|HF)_[A-Z_]+\b", text)
        )
    assert {"ETMAMBA_SCAN", "CXX", "HF_TOKEN", "OMP_WAIT_POLICY"} <= names
    listed = page("docs/reference/environment.md")
    assert not [name for name in names if f"`{name}`" not in listed]
