"""What the projects' ablations share."""

import pytest
import torch

from .ablation import ROWS, table
from .mocap.ablation import ABLATION


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_the_papers(row):
    """(a) no stem, two SSMs; (b) the stem; (c) EBS; (d) STCM; all of the recipe's width and depth."""
    model = ABLATION.create(row)
    has_stem = not isinstance(model.stem, torch.nn.Identity)
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()} | {n for n, _ in model.named_modules()}
    assert has_stem == (row != "a")
    assert ("A_b_log" in names) == (row in "ab")
    assert ("blocks.0.local" in names) == (row == "d")
    assert (model.embed_dim, len(model.blocks), model.num_classes) == (96, 8, len(ABLATION.classes))


def test_table_gives_means_and_spreads():
    rows = [
        {
            "row": row,
            "parameters": 1.5e6,
            "multiply_adds": 2e8,
            "step_ms_a_clip": ms,
            "test_top1": top1,
            "test_pairs": 0.5,
        }
        for row, ms in zip("abcd", (10, 11, 12, 25), strict=True)
        for top1 in (0.25, 0.35)
    ]
    lines = table(rows, {"test_top1": "test top-1", "test_pairs": "pairs"}).splitlines()
    assert lines[-1] == "| (d) `etmamba_ti` | 1.50 M | 200 M | 2.50 | 30.0% (25.0%–35.0%) | 50.0% (50.0%–50.0%) |"
    assert len(lines) == 6
