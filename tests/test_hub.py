"""torch.hub in fresh processes outside the repository: by path, and from a clone in torch.hub's cache."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from etmamba_timm.models import VARIANTS

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A TORCH_HOME in which `torch.hub` finds owner/etmamba_timm:main as if it had cloned it."""
    home = tmp_path_factory.mktemp("torch_home")
    clone = home / "hub" / "owner_etmamba_timm_main"
    for name in ("etmamba_timm", "weights"):
        shutil.copytree(REPO / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "hubconf.py", clone)
    return home


def in_a_fresh_process(code: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, torch\n" + code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_clone_lists_the_models_and_the_transform_and_nothing_else(tmp_path, hub):
    code = "print(*torch.hub.list('owner/etmamba_timm:main', skip_validation=True, trust_repo=True))"
    assert set(in_a_fresh_process(code, tmp_path, TORCH_HOME=str(hub)).split()) == {*VARIANTS, "eval_transform"}


def test_a_clone_loads_and_runs_its_own_copy(tmp_path, hub):
    code = """
model = torch.hub.load('owner/etmamba_timm:main', 'etmamba_ti', skip_validation=True, trust_repo=True,
                       num_classes=10, depth=2, num_frames=2)
print(tuple(model(torch.zeros(1, 3, 2, 32, 32)).shape), sys.modules['etmamba_timm'].__file__)
"""
    out = in_a_fresh_process(code, tmp_path, TORCH_HOME=str(hub))
    assert out.startswith("(1, 10)")
    assert str(hub) in out


def test_a_path_loads_and_runs(tmp_path):
    code = f"""
before = list(sys.path)
model = torch.hub.load({str(REPO)!r}, 'videomamba_ti', source='local', num_classes=10, depth=2, num_frames=2)
assert sys.path == before
print(tuple(model(torch.zeros(1, 3, 2, 32, 32)).shape))
"""
    assert in_a_fresh_process(code, tmp_path).strip() == "(1, 10)"


def test_help_is_for_a_person(tmp_path, hub):
    code = f"""
for name in {list(VARIANTS)}:
    print(torch.hub.help('owner/etmamba_timm:main', name, skip_validation=True, trust_repo=True), end='|||')
"""
    texts = in_a_fresh_process(code, tmp_path, TORCH_HOME=str(hub)).split("|||")[: len(VARIANTS)]
    for name, text in zip(VARIANTS, texts, strict=True):
        family, size, *_ = name.split("_")
        assert f"{family}-{size}" in text.lower()
        assert "num_classes (int)" in text
        assert "Returns:" in text
    assert len(set(texts)) == len(VARIANTS)
