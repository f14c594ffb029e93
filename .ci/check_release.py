"""Fails unless a tag is the version, the changelog has it, and the repository's address is filled in.

python .ci/check_release.py v0.2.0
"""

import re
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
PLACEHOLDER = "OWNER/etmamba_timm"

version = re.findall(r'__version__ = "(.+)"', (REPO / "etmamba_timm/version.py").read_text(encoding="utf-8"))[0]
if sys.argv[1:] != [f"v{version}"]:
    sys.exit(f"the tag is {' '.join(sys.argv[1:])}, and the version {version}: tag v{version}, or set the version")
if f"\n## {version} - " not in (REPO / "CHANGELOG.md").read_text(encoding="utf-8"):
    sys.exit(f"CHANGELOG.md has no section {version}")
for name in ("setup.cfg", "CITATION.cff", "README.md", "hubconf.py"):
    if PLACEHOLDER in (REPO / name).read_text(encoding="utf-8"):
        sys.exit(f"{name} has {PLACEHOLDER}: write the repository's owner, there and in all other files")
