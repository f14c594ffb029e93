"""The repository around the package: how it installs."""

import shutil
import site
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def run(code: str, folder: Path) -> str:
    """What code prints in a Python without installed packages, started in a folder."""
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_editable_installation_works_in_the_parent_folder(tmp_path):
    """There, Python finds the clone before the package, and both have one name."""
    clone, installed = tmp_path / "etmamba_timm", tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", "model.safetensors")
    for name in ("etmamba_timm", "weights"):
        shutil.copytree(REPO / name, clone / name, ignore=ignore)
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "etmamba_command.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, clone)
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, installed, "zip")

    assert run("import etmamba_timm; print(etmamba_timm.__file__)", tmp_path) == "None"  # without the installation
    code = f"""
import site, sys
site.addsitedir({str(installed)!r})
sys.path += {site.getsitepackages()!r}
import etmamba_command, etmamba_timm, runpy, timm
print(etmamba_timm.__file__)
print(timm.create_model('etmamba_ti.mocap', device='meta').num_classes)
sys.argv[1:] = ['--help']
runpy.run_module('etmamba_timm', run_name='__main__')
"""
    lines = run(code, tmp_path).splitlines()
    assert lines[:2] == [str(clone / "etmamba_timm" / "__init__.py"), "20"]
    assert lines[2].startswith("usage: etmamba ")
