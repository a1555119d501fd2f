""" Prints the section of CHANGELOG.md for a tag such as v0.1.0.

Fails unless the tag is the version, the section has a date, and pyproject.toml has the address of this repository.
"""
import os
import re
import sys
from pathlib import Path

tag = sys.argv[1]
root = Path(__file__).resolve().parents[1]
version = re.search(r"__version__ = '(.+)'", (root / 'pvt_timm' / 'version.py').read_text(encoding='utf-8'))[1]
if tag != f'v{version}':
    sys.exit(f'Expected the tag v{version}, the version in pvt_timm/version.py, got {tag}.')
project = (root / 'pyproject.toml').read_text(encoding='utf-8')
repository = re.search(r'^Repository = "https://github\.com/(.+)"', project, re.MULTILINE)[1]
here = os.environ.get('GITHUB_REPOSITORY', repository)  # OWNER/NAME, set on GitHub
if repository.startswith('OWNER/') or repository != here:
    sys.exit(f'Expected the address of this repository ({here}) as Repository in pyproject.toml, got {repository}.')
section = re.search(
    rf'^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## \[|^\[|\Z)',
    (root / 'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE | re.DOTALL)
if section is None:
    sys.exit(f'Expected a section "## [{version}] - YYYY-MM-DD" in CHANGELOG.md, got none.')
print(section[1].strip())
