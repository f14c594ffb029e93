"""Prints the lowest versions that setup.cfg allows, as constraints for pip."""

import configparser
from pathlib import Path

setup = configparser.ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
print(setup["options"]["install_requires"].strip().replace(">=", "=="))
