""" Lists what a wheel and a source distribution hold, and fails if the wheel holds anything but the package. """
import re
import sys
import tarfile
import zipfile
from pathlib import Path

WHEEL = (  # everything in the wheel, and how many files
    (r'(pvt_timm|weights_conversion)/([a-z_]+/)?\w+\.py', None),
    (r'(pvt_timm|weights_conversion)/py\.typed', 2),
    (r'pvt_timm/data/digits/\d_\d{4}\.png', 40),
    (r'pvt_timm/recipes/\w+\.yaml', 6),
    (r'pvt_timm/weights/test_pvt_digits\.safetensors', 1),
    (r'pvt_timm-[^/]+\.dist-info/(licenses/LICENSE|METADATA|RECORD|WHEEL|entry_points\.txt|top_level\.txt)', 6),
)
SDIST = ('CHANGELOG.md', 'CITATION.cff', 'CONTRIBUTING.md', 'LICENSE', 'README.md', 'SECURITY.md', 'hubconf.py',
         'pyproject.toml', '.ci/run', '.github/workflows/ci.yml', 'benchmarks/README.md', 'tests/conftest.py')

for path in map(Path, sys.argv[1:]):
    if path.suffix == '.whl':
        names = zipfile.ZipFile(path).namelist()
        for pattern, count in WHEEL:
            found = [name for name in names if re.fullmatch(pattern, name)]
            assert found and count in (None, len(found)), f'Expected {count} of {pattern}, got {found}.'
        strange = [name for name in names if not any(re.fullmatch(pattern, name) for pattern, _ in WHEEL)]
        assert not strange, f'Expected nothing else in the wheel, got {strange}.'
        print('\n'.join(name for name in names if not name.endswith('.png')))
    else:
        names = [name.partition('/')[2] for name in tarfile.open(path).getnames()]
        missing = [name for name in SDIST if name not in names]
        assert not missing, f'Expected {missing} in {path.name}.'
    print(f'{path.name}: {len(names)} files, {path.stat().st_size:,} bytes')
