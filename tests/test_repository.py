"""The repository around the package: versions, workflows, templates, and how it installs."""

import configparser
import json
import re
import shlex
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import etmamba_timm
from etmamba_timm.cli import parser

REPO = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(REPO / "setup.cfg", encoding="utf-8")
CLASSIFIERS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in REPO.glob(".github/workflows/*.yml")}
COMMANDS = [
    pytest.param(line, id=f"{name}-{line[:40]}")
    for name, workflow in WORKFLOWS.items()
    for job in workflow["jobs"].values()
    for step in job["steps"]
    for line in step.get("run", "").splitlines()
]


def test_versions_agree():
    version = etmamba_timm.__version__
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text("utf-8"))
    latest = re.search(r"^## (\S+) - (\S+)$", (REPO / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert latest.groups() == (version, str(citation["date-released"]))
    assert str(citation["version"]) == version
    assert f"https://doi.org/{citation['references'][0]['doi']}" in SETUP["metadata"]["project_urls"]
    assert citation["repository-code"] == SETUP["metadata"]["url"]


def test_python_versions_agree():
    assert WORKFLOWS["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"] == CLASSIFIERS
    assert SETUP["options"]["python_requires"] == f">={CLASSIFIERS[0]}"
    [lowest] = [s["with"]["python-version"] for s in WORKFLOWS["ci.yml"]["jobs"]["lowest"]["steps"] if "with" in s]
    assert lowest == CLASSIFIERS[0]


@pytest.mark.parametrize("line", COMMANDS)
def test_workflows_call_what_exists(line):
    words = shlex.split(line.replace("$GITHUB_WORKSPACE/", ""))
    paths = [word for word in words if re.match(r"\.ci/|tests/|docs/", word)]
    assert all((REPO / path).exists() for path in paths)
    if Path(words[0]).name == "etmamba":
        assert callable(parser().parse_args(words[1:]).run)
    elif words[0] == ".ci/run":
        assert (REPO / ".ci/run").stat().st_mode & 0o100
    elif words[0] == "docker":
        assert (REPO / "Dockerfile").is_file()
    else:
        assert Path(words[0]).name in ("pip", "python", "pytest", "twine")
    for extras in re.findall(r"^\.\[(.+)\]$", "\n".join(words), re.MULTILINE):
        assert set(extras.split(",")) <= set(SETUP["options.extras_require"])


def test_the_container_has_what_it_runs():
    text = (REPO / "Dockerfile").read_text("utf-8")
    extras = {name for names in re.findall(r"'\.\[(.+?)\]'", text) for name in names.split(",")}
    assert {"demo", "test"} <= extras <= set(SETUP["options.extras_require"])
    commands = re.findall(r"docker run .*? etmamba-timm(?: (.*?))?(?: +#.*)?$", text, re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        assert callable(parser().parse_args(command.split() or json.loads(text.rpartition("\nCMD ")[2])).run)
    ignored = (REPO / ".dockerignore").read_text("utf-8").split()
    assert not set(ignored) & {"weights", "tests", "setup.py"}


def test_the_lowest_versions_are_those_of_the_metadata():
    done = subprocess.run([sys.executable, ".ci/lowest.py"], cwd=REPO, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert all(re.fullmatch(r"\w+==[\d.]+", line) for line in lines)
    assert [line.replace("==", ">=") for line in lines] == SETUP["options"]["install_requires"].split()


def test_a_release_needs_its_tag_a_changelog_and_an_address(tmp_path):
    files = ("etmamba_timm/version.py", "CHANGELOG.md", "setup.cfg", "CITATION.cff", "README.md", "hubconf.py")
    for name in (".ci/check_release.py", *files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = (REPO / name).read_text("utf-8")
        (tmp_path / name).write_text(text if ".ci" in name else text.replace("OWNER/", "someone/"), "utf-8")
    command = [sys.executable, str(tmp_path / ".ci/check_release.py")]

    def said(tag: str) -> str:
        done = subprocess.run([*command, tag], capture_output=True, text=True)
        assert (done.returncode == 0) == (done.stderr == "")
        return done.stderr

    assert said(f"v{etmamba_timm.__version__}") == ""
    assert "the version" in said("v9.9")
    (tmp_path / "hubconf.py").write_text("OWNER/etmamba_timm")
    assert "hubconf.py has OWNER/etmamba_timm" in said(f"v{etmamba_timm.__version__}")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n")
    assert "CHANGELOG.md has no section" in said(f"v{etmamba_timm.__version__}")


def test_only_publishing_may_ask_for_a_token():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
    jobs = {name: job for workflow in WORKFLOWS.values() for name, job in workflow["jobs"].items()}
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "build"


def test_templates():
    for path in REPO.glob(".github/ISSUE_TEMPLATE/*.yml"):
        form = yaml.safe_load(path.read_text("utf-8"))
        if path.name != "config.yml":
            assert {"name", "description", "body"} <= set(form)
            assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
            assert "etmamba info --environment" in form["body"][-1]["attributes"]["label"]
    assert yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]


def run(code: str, folder: Path) -> str:
    """What code prints in a Python without installed packages, started in a folder."""
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_readmes_links_and_pictures_work_on_pypi(tmp_path):
    """There, no file lies beside it: each link is an address, and names a file of this repository."""
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "etmamba_command.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    for name in ("etmamba_timm", "weights"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    text = next(tmp_path.glob("*.dist-info/METADATA")).read_text("utf-8")
    assert "\nDescription-Content-Type: text/markdown" in text
    url = SETUP["metadata"]["url"]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", text)
    ours = [(picture, link.removeprefix(url)) for picture, link in links if link.startswith(url + "/")]
    assert len(ours) > 15
    assert all(link.startswith("http") for _, link in links)
    for picture, link in ours:
        assert link.startswith("/raw/main/" if picture else "/blob/main/")
        assert (REPO / link.split("/main/")[1]).exists()


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
