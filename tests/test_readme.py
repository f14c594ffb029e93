"""The README's Python runs as it stands, and its table is recounted."""

import re
from pathlib import Path

import pytest
import timm
from videos import write_video

from etmamba_timm.models import VARIANTS, count_cost

REPO = Path(__file__).parents[1]
README = (REPO / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO if "torch.hub" in snippet else tmp_path)
    if "clip.mp4" in snippet:
        write_video(tmp_path / "clip.mp4", num_frames=40)
    exec(compile(snippet, "README.md", "exec"), {})


def test_table_of_models():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*M .*) \|$", README, re.MULTILINE))
    assert set(rows) == set(VARIANTS)
    for name, row in rows.items():
        cost = count_cost(timm.create_model(name, device="meta"))
        expected = [f"{cost.params / 1e6:.2f} M"]
        expected += [f"{macs / 1e9:.1f} G" for macs in (cost.total_macs, cost.scan_macs, cost.videomamba_macs)]
        assert row.split(" | ")[2:] == expected
