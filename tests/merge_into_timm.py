""" Put the family into a copy of the installed timm, as a pull request would: `python tests/merge_into_timm.py DIR`.

Writes `DIR/timm`. What it adds: `models/pvt.py` with timm's relative imports and timm's `Mlp`, its private sibling
`models/_pvt_formats/` with the formats of checkpoints, and one line in `models/__init__.py`. Nothing of `pvt_timm` is
imported there: what the formats import from it stands in functions that only the converter calls.
"""
import re
import shutil
import sys
from pathlib import Path

import timm

PACKAGE = Path(__file__).resolve().parents[1] / 'pvt_timm'
CHANGES = (  # of pvt.py
    ('from timm.models._', 'from ._'),
    ('from .formats.', 'from ._pvt_formats.'),
    ('from .sliced_mlp import SlicedMlp\n', ''),
    ('LayerNorm, LayerType,', 'LayerNorm, LayerType, Mlp,'),
    ('SlicedMlp', 'Mlp'),
)


def merge(folder: Path) -> Path:
    """Write `folder / 'timm'` and return it."""
    copy = Path(folder) / 'timm'
    shutil.copytree(Path(timm.__file__).parent, copy, ignore=shutil.ignore_patterns('__pycache__'))
    model = (PACKAGE / 'pvt.py').read_text()
    for old, new in CHANGES:
        if old not in model:
            raise ValueError(f'Expected {old!r} in pvt.py.')
        model = model.replace(old, new)
    formats = ''.join(file.read_text() for file in (PACKAGE / 'formats').glob('*.py'))
    if re.search(r'^(?:from pvt_timm|import pvt_timm|from \.\.)', model + formats, re.MULTILINE):
        raise ValueError('Expected no import of pvt_timm in what timm would hold.')
    (copy / 'models' / 'pvt.py').write_text(model)
    shutil.copytree(PACKAGE / 'formats', copy / 'models' / '_pvt_formats', ignore=shutil.ignore_patterns('__pycache__'))
    init = copy / 'models' / '__init__.py'
    init.write_text(init.read_text().replace('from .pvt_v2', 'from .pvt import *\nfrom .pvt_v2', 1))
    return copy


if __name__ == '__main__':
    print(merge(Path(sys.argv[1])))
