"""The README's Python code runs as written, and its tables of models are checked."""

import re
import shlex
from pathlib import Path

import pytest
import timm
from videos import write_video

from etmamba_timm.checkpoints import find_checkpoint
from etmamba_timm.cli import parser
from etmamba_timm.models import VARIANTS, count_cost

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


NETWORK = "# needs the network\n"


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if not s.startswith(NETWORK)])
def test_python_runs(snippet, tmp_path, monkeypatch):
    in_repo = "torch.hub" in snippet or '"weights/' in snippet
    monkeypatch.chdir(REPO if in_repo else tmp_path)
    if "clip.mp4" in snippet:
        write_video(tmp_path / "clip.mp4", num_frames=40)
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize("snippet", [s for s in SNIPPETS if s.startswith(NETWORK)])
def test_snippets_that_need_the_network_name_existing_weights(snippet):
    compile(snippet, "README.md", "exec")
    names = re.findall(r'create_model\("([\w.]+)", pretrained=True', snippet)
    assert names
    assert set(names) <= set(timm.list_pretrained("*mamba_*")) | set(VARIANTS)
    assert all(find_checkpoint(name).status in ("published", "warm start") for name in names)


def test_commands_are_the_parsers():
    """The parser accepts every `etmamba` command line of the README."""
    lines = re.findall(r"^(?:.*&& )?etmamba (.*?)(?: *#.*)?$", "\n".join(SHELL), re.MULTILINE)
    assert len(lines) > 6
    for line in lines:
        assert callable(parser().parse_args(shlex.split(line)).run)


def test_table_of_models():
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:STFP|–) .*) \|$", README, re.MULTILINE))
    assert set(rows) == set(VARIANTS)
    for name, row in rows.items():
        cost = count_cost(timm.create_model(name, device="meta"))
        expected = [f"{cost.params / 1e6:.2f} M"]
        expected += [f"{macs / 1e9:.1f} G" for macs in (cost.total_macs, cost.scan_macs, cost.videomamba_macs)]
        assert row.split(" | ")[2:] == expected


def test_table_of_folded_models():
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) M \| ([\d.]+) G \|$", README, re.MULTILINE)
    assert len(rows) == 3
    for name, params, macs in rows:
        cost = count_cost(timm.create_model(name, device="meta", folded=True))
        assert (f"{cost.params / 1e6:.2f}", f"{cost.macs / 1e9:.1f}") == (params, macs)
