"""A run's folder belongs to that run, and a failed start doesn't claim it."""

import json

import pytest

from etmamba_timm.training.run_folder import MODEL, RECIPE_FILE, RUN_FILE, SCORES, RunError, RunFolder

RUN, OTHER = {"model": "etmamba_m", "betas": (0.9, 0.999)}, {"model": "etmamba_ti", "betas": (0.9, 0.999)}


def test_the_same_run_goes_on_and_another_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(RUN, "recipe")
    (folder / "state-10").mkdir()
    folder.open(RUN, "recipe")
    with pytest.raises(RunError, match="model: 'etmamba_m' there, 'etmamba_ti' now"):
        folder.open(OTHER, "other recipe")
    assert (folder / RECIPE_FILE).read_text() == "recipe"


@pytest.mark.parametrize(
    "left", [[RECIPE_FILE, RUN_FILE], [RECIPE_FILE], [RECIPE_FILE, "." + RUN_FILE], ["." + RECIPE_FILE]]
)
def test_a_start_that_failed_is_replaced(left, tmp_path):
    folder = RunFolder(tmp_path)
    folder.open(RUN, "recipe")
    whole = (folder / RUN_FILE).read_text()
    for name in (RECIPE_FILE, RUN_FILE):
        (folder / name).unlink()
    for name in left:
        (folder / name).write_text(whole if name == RUN_FILE else "")
    folder.open(OTHER, "other recipe")
    assert (folder / RECIPE_FILE).read_text() == "other recipe"
    assert json.loads((folder / RUN_FILE).read_text())["model"] == "etmamba_ti"


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="contains no run"):
        RunFolder(tmp_path).open(RUN, "recipe")
    with pytest.raises(RunError, match="contains no run"):
        RunFolder(tmp_path / "thesis.tex").open(RUN, "recipe")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_more_epochs_may_bring_a_longer_warm_up(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(RUN | {"epochs": 3, "warmup_epochs": 0.3}, "recipe")
    (tmp_path / "run" / "state-1").mkdir()
    with pytest.raises(RunError, match="warmup_epochs: 0.3 there, 1 now"):
        folder.open(RUN | {"epochs": 3, "warmup_epochs": 1}, "other")
    folder.open(RUN | {"epochs": 20, "warmup_epochs": 1}, "more")


def test_more_epochs_go_on_and_fewer_do_not(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(RUN | {"epochs": 3}, "recipe")
    identifier = folder.id
    (folder / MODEL).mkdir()
    (folder / SCORES).write_text("")
    assert folder.is_finished()
    with pytest.raises(RunError, match="epochs: 3 there, 2 now"):
        folder.open(RUN | {"epochs": 2}, "fewer")
    with pytest.raises(RunError, match="epochs: 3 there, 4 now; model"):
        folder.open(OTHER | {"epochs": 4}, "other")
    assert folder.is_finished()
    folder.open(RUN | {"epochs": 4}, "more")
    assert (folder / RECIPE_FILE).read_text() == "more"
    assert (folder.id, folder.is_finished(), (folder / MODEL).exists()) == (identifier, False, True)
    folder.open(RUN | {"epochs": 4}, "more")
    folder.drop_model()
    assert not [path for path in folder.path.iterdir() if MODEL in path.name]


def test_a_setting_that_an_earlier_version_lacked_is_off_there(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open(RUN, "recipe")
    (folder / MODEL).mkdir()
    folder.open(RUN | {"new": 0.0, "newer": ""}, "recipe")
    with pytest.raises(RunError, match="new: None there, 0.5 now"):
        folder.open(RUN | {"new": 0.5}, "recipe")
