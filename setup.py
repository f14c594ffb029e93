"""What setup.cfg can't say: how an editable installation finds the package, and the README as PyPI shows it."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheel(editable_wheel):
    """Adds this folder to `sys.path`, instead of setuptools' import hook for other layouts than one folder.

    The hook comes after `sys.path`. Where Python is started in the parent folder of a clone, it would find the clone
    first, which has the package's name but no `__init__.py`, and take it for a package without content. Within
    `sys.path`, a folder with `__init__.py` is preferred to those without, whatever their order.
    """

    def finalize_options(self) -> None:
        self.distribution.packages.remove("etmamba_timm.weights")  # `weights/` is found beside the package
        self.distribution.package_dir = {"": "."}
        super().finalize_options()


def long_description() -> str:
    """The README with links to the repository's pages and pictures, as PyPI doesn't have the files beside it."""
    here, config = Path(__file__).parent, ConfigParser()
    config.read(here / "setup.cfg", encoding="utf-8")
    url = config["metadata"]["url"]
    text = (here / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\g<1>{url}/raw/main/", text)
    return re.sub(r"\]\((?!https?:|#)", f"]({url}/blob/main/", text)


setup(cmdclass={"editable_wheel": EditableWheel}, long_description=long_description())
