"""timm's own tests of a model, on one name; `.ci/run` has all of them, by `python tests/timm_contract.py`."""

import os
import subprocess

import pytest
import timm
import timm_contract


def test_timms_own_tests_pass(tmp_path):
    try:
        done = timm_contract.run(["etmamba_ti"], tmp_path, quick=True)
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"timm's source distribution can't be fetched: {error.stderr.strip().splitlines()[-1]}")
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert " failed" not in done.stdout
    more_tags = len(timm.list_pretrained("etmamba_ti.*")) - 1  # one of the tests is run for each tag
    assert f"{8 + more_tags} passed" in done.stdout
