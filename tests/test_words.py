"""Counts in messages agree with their nouns."""

import ast
import re
from pathlib import Path

import pytest

import etmamba_timm
from etmamba_timm.cli import main
from etmamba_timm.words import did_you_mean, number_of

PACKAGE = Path(etmamba_timm.__file__).parent
NOUNS = "videos files classes clips frames views epochs updates channels tensors weights names positions patches"
NEVER_ONE = {  # texts whose number is never 1 where they are used, or that only programs read
    "… clips of each video",
    "the gradients of … updates in a row",
    "looks like … labels",
    "kernels take up to … channels",
    "… frames …",
    "×… patches",
    "names the parts",
}


def test_number_of():
    words = ("file", "class", "patch", "epoch")
    assert [number_of(1, word) for word in words] == ["1 file", "1 class", "1 patch", "1 epoch"]
    assert [number_of(2, word) for word in words] == ["2 files", "2 classes", "2 patches", "2 epochs"]
    assert number_of(0, "file") == "0 files"


def test_no_message_counts_past_number_of():
    """'1 files' can't come from a text with a number before a plural, but for '2 of 3 files' and the like."""
    plural = re.compile(
        rf"(?<!of )(?<!of the )… (?:(?:other|more|wanted|label|training) )?(?:{NOUNS.replace(' ', '|')})\b"
    )
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value.replace("%d", "…")
            else:
                continue
            found += [f"{path.name}: {text}" for _ in plural.finditer(text)]
    assert [text for text in found if not any(known in text for known in NEVER_ONE)] == []


@pytest.mark.parametrize(
    ("command", "meant"),
    [
        (["train", "--data", ".", "-o", "run", "--set", "epoch=5", "--dry-run"], "did you mean epochs?"),
        (["predict", "clip.mp4", "--model", "etmanba_ti"], "did you mean etmamba_ti?"),
    ],
)
def test_a_word_that_is_nearly_right(command, meant, capsys):
    assert main(command) == 2
    assert meant in capsys.readouterr().err
    assert did_you_mean(["xyz"], ["epochs"]) == ""
