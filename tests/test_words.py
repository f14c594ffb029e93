"""Numbers with nouns, and words that are nearly right."""

import pytest

from etmamba_timm.cli import main
from etmamba_timm.words import did_you_mean, number_of


def test_number_of():
    words = ("file", "class", "patch", "epoch")
    assert [number_of(1, word) for word in words] == ["1 file", "1 class", "1 patch", "1 epoch"]
    assert [number_of(2, word) for word in words] == ["2 files", "2 classes", "2 patches", "2 epochs"]
    assert number_of(0, "file") == "0 files"


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
