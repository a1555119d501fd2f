""" Lists what a wheel holds. Fails unless that is the packages, whole and alone; a source distribution holds more. """
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for name in ('pvt_timm', 'weights_conversion') for file in (ROOT / name).rglob('*') if file.is_file()]
DOCS = ('README.md', 'DETECTION.md', 'EXPORT.md')  # which are read on the web
PACKAGES = [file.relative_to(ROOT).as_posix() for file in FILES if file.name not in DOCS and file.suffix != '.pyc']
BESIDES = ['CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'README.md', 'SECURITY.md', 'hubconf.py',
           'pyproject.toml', '.ci/run', '.github/workflows/ci.yml', 'benchmarks/README.md', 'tests/conftest.py']

for path in map(Path, sys.argv[1:]):
    if path.suffix == '.whl':
        names = [name for name in zipfile.ZipFile(path).namelist() if '.dist-info/' not in name]
        differ = set(names) ^ set(PACKAGES)
        assert not differ, f'Expected in {path.name} what the packages hold, got a difference in {differ}.'
        pictures = [name for name in names if name.endswith('.png')]
        assert len(pictures) == 40 and all(name.startswith('pvt_timm/data/digits/') for name in pictures), pictures
        print('\n'.join(name for name in names if name not in pictures))
    else:
        names = [name.partition('/')[2] for name in tarfile.open(path).getnames()]
        missing = [name for name in PACKAGES + BESIDES if name not in names]
        assert not missing, f'Expected {missing} in {path.name}.'
    print(f'{path.name}: {len(names)} files, {path.stat().st_size:,} bytes')
