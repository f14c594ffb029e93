"""Runs timm's own model tests (`tests/test_models.py` of its source distribution) on this package's names.

    python tests/timm_contract.py               every name
    python tests/timm_contract.py etmamba_ti    the names given

The source distribution of the timm that is installed is fetched with pip. Two of its lists are extended in a copy:
the models that are no convolutional nets (so that the tests know tokens are no maps), and the modules with
`forward_intermediates`. What is collected, passed, skipped and left out is printed.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import timm

import etmamba_timm

# What can't run, and why.
LEFT_OUT = {
    "test_model_forward_torchscript": "TorchScript can't compile the choice of the scan's backend",
    "test_model_forward_fx_torchscript": "TorchScript can't compile the choice of the scan's backend",
    "test_model_load_pretrained": "it fetches every checkpoint from the Hub",
}
# Prunes the model at each of its blocks: minutes a name.
SLOW = {"test_prune_intermediate_layers_contract": "slow, and left out of a quick run (timm's own runs skip it too)"}

HEADER = """
import etmamba_timm
_NAMES = {names!r}

def _ours(listing):
    return lambda *args, **kwargs: [m for m in listing(*args, **kwargs) if m.split('.')[0] in _NAMES]

list_models, list_pretrained = _ours(list_models), _ours(list_pretrained)
"""

CONFTEST = """
NAMES = {names!r}
LEFT_OUT = {left_out!r}

def pytest_collection_modifyitems(config, items):
    def name(item):
        return str(item.callspec.params.get('model_name')).split('.')[0] if hasattr(item, 'callspec') else None

    items[:] = [i for i in items if name(i) in NAMES and i.originalname not in LEFT_OUT]

def pytest_configure(config):
    config.addinivalue_line('markers', 'timeout: of pytest-timeout')
    for m in ('base', 'forward', 'backward', 'cfg', 'cfg_nonstd', 'torchscript', 'features', 'fxforward', 'fxbackward'):
        config.addinivalue_line('markers', m + ': of timm')
"""


def fetch(folder: Path) -> Path:
    """timm's `test_models.py`, of the version installed. Raises subprocess.CalledProcessError without a network."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "timm", f"timm=={timm.__version__}", "--dest", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        member = f"timm-{timm.__version__}/tests/test_models.py"
        return _write(folder / "original.py", archive.extractfile(member).read().decode())


def adapt(source: str, names: list[str]) -> str:
    """timm's tests, for our names: each of the three places must be there, or this is another timm than was read."""
    for old, new in (
        ("# models with forward_inter", HEADER.format(names=names) + "\n# models with forward_inter"),
        ("FEAT_INTER_FILTERS = [", "FEAT_INTER_FILTERS = ['zoo', "),
        ("NON_STD_FILTERS = [", "NON_STD_FILTERS = ['etmamba*', 'videomamba*', "),
        ("EXCLUDE_FEAT_FILTERS = NON_STD_FILTERS[:]", "EXCLUDE_FEAT_FILTERS = NON_STD_FILTERS[2:]"),
    ):
        lines = [line for line in source.splitlines() if line.startswith(old)]
        if len(lines) != 1:
            raise RuntimeError(f"timm {timm.__version__}: {old!r} starts {len(lines)} lines of its tests, not one")
        source = source.replace("\n" + old, "\n" + new, 1)
    return source


def run(names: list[str], folder: Path, quick: bool = False) -> subprocess.CompletedProcess:
    """Runs the tests for `names` in `folder`; the finished process' output is pytest's, and what is left out."""
    left_out = LEFT_OUT | (SLOW if quick else {})
    _write(folder / "test_models.py", adapt(fetch(folder).read_text(), names))
    _write(folder / "conftest.py", CONFTEST.format(names=names, left_out=list(left_out)))
    _write(folder / "pytest.ini", "[pytest]\n")
    options = ["-q", "-rs", "--durations=6", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, "test_models.py"]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done.stdout += "".join(f"left out: {test}: {reason}\n" for test, reason in left_out.items())
    return done


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(etmamba_timm.models.VARIANTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes a name")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = run(args.names, Path(folder), args.quick)
    print(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
