""" Put the family into a copy of the installed timm, as a pull request would: `python tests/merge_into_timm.py DIR`.

Writes `DIR/timm`. What it adds: `models/pvt.py` with timm's relative imports and timm's `Mlp`, its private sibling
`models/_pvt_checkpoints.py`, and one line in `models/__init__.py`. Nothing of `pvt_timm` is imported there.
"""
import shutil
import sys
from pathlib import Path

import timm

PACKAGE = Path(__file__).resolve().parents[1] / 'pvt_timm'
CHANGES = (  # of pvt.py
    ('from timm.models._', 'from ._'),
    ('from .checkpoints import', 'from ._pvt_checkpoints import'),
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
    checkpoints = (PACKAGE / 'checkpoints.py').read_text()
    if 'pvt_timm' in model + checkpoints or '\nfrom .' in checkpoints:
        raise ValueError('Expected no import of pvt_timm in what timm would hold.')
    (copy / 'models' / 'pvt.py').write_text(model)
    (copy / 'models' / '_pvt_checkpoints.py').write_text(checkpoints)
    init = copy / 'models' / '__init__.py'
    init.write_text(init.read_text().replace('from .pvt_v2', 'from .pvt import *\nfrom .pvt_v2', 1))
    return copy


if __name__ == '__main__':
    print(merge(Path(sys.argv[1])))
