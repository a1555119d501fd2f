""" Put the family into a copy of the installed timm, as a pull request would: `python tests/merge_into_timm.py DIR`.

Writes `DIR/timm` and prints how its `pvt.py` differs from the one in this package: only in import lines, which `merge`
checks. The copy of timm gets `models/pvt.py`, the private folder `models/_pvt_formats/` with the formats of
checkpoints, which are not changed, and one line in `models/__init__.py`. Nothing of `pvt_timm` is imported there: the
formats import it only in functions that only the converter calls.
"""
import re
import shutil
import sys
from pathlib import Path
from typing import List, Tuple

import timm

PACKAGE = Path(__file__).resolve().parents[1] / 'pvt_timm'

# The one rule: an import names the place that a module has beside models/pvt.py of timm
PLACES = {
    'timm.models.': '.',
    '.formats.': '._pvt_formats.',
}
IMPORT = re.compile(r'from (\S+) (import .+)')


def moved(line: str) -> str:
    """Return a line of pvt.py as it has to be in timm."""
    for here, there in PLACES.items():
        if line.startswith(f'from {here}'):
            return line.replace(here, there, 1)
    return line


def changed_lines(before: str, after: str) -> List[Tuple[str, str]]:
    """Return pairs of the lines that differ, before and after.

    Raises:
        ValueError: A line differs in more than the place that it imports from.
    """
    old, new = before.splitlines(), after.splitlines()
    if len(old) != len(new):
        raise ValueError(f'Expected as many lines as before, {len(old)}, got {len(new)}.')
    changed = [(a, b) for a, b in zip(old, new) if a != b]
    for a, b in changed:
        was, now = IMPORT.fullmatch(a), IMPORT.fullmatch(b)
        if not was or not now or was[2] != now[2]:
            raise ValueError(f'Expected to change only where something is imported from, got {a!r} and {b!r}.')
    return changed


def merge(folder: Path) -> Path:
    """Write a copy of timm that has the models to `folder / 'timm'`, and return its path."""
    before = (PACKAGE / 'pvt.py').read_text(encoding='utf-8')
    after = ''.join(moved(line) for line in before.splitlines(keepends=True))
    changed_lines(before, after)
    formats = ''.join(file.read_text(encoding='utf-8') for file in (PACKAGE / 'formats').glob('*.py'))
    if re.search(r'^(?:from pvt_timm|import pvt_timm|from \.\.)', after + formats, re.MULTILINE):
        raise ValueError('Expected no import of pvt_timm in what timm would hold.')

    copy = Path(folder) / 'timm'
    without_caches = shutil.ignore_patterns('__pycache__')
    shutil.copytree(Path(timm.__file__).parent, copy, ignore=without_caches)
    (copy / 'models' / 'pvt.py').write_text(after, encoding='utf-8')
    shutil.copytree(PACKAGE / 'formats', copy / 'models' / '_pvt_formats', ignore=without_caches)
    init = copy / 'models' / '__init__.py'
    others = init.read_text(encoding='utf-8')
    init.write_text(others.replace('from .pvt_v2', 'from .pvt import *\nfrom .pvt_v2', 1), encoding='utf-8')
    return copy


if __name__ == '__main__':
    target = merge(Path(sys.argv[1]))
    merged = (target / 'models' / 'pvt.py').read_text(encoding='utf-8')
    for was, now in changed_lines((PACKAGE / 'pvt.py').read_text(encoding='utf-8'), merged):
        print(f'-{was}\n+{now}')
    print(target)
