""" Adds an invented format to a copy of the package, as CONTRIBUTING.md says: a new file and one line in a list. """
import json
import shutil
import subprocess
import sys
from pathlib import Path

from pvt_timm.files import read_checkpoint
from tests.support import convert_files as files

ROOT = Path(__file__).resolve().parents[2]

# The file that somebody would write. Its checkpoints name everything otherwise, keep keys and values in two parameters
# and have one more note on the way out.
INVENTED = '''
""" An invented format. """
import re

from .architecture import drop_parts
from .format import Format
from .names import Row
from .writing import write_tensors


class InventedFormat(Format):
    name = 'invented'
    table = (
        Row('stages.{i}.pos_embed',              'tower.{s}.places'),
        Row('stages.3.cls_token',                'tower.token'),
        Row('stages.{i}.patch_embed.proj.{p}',   'tower.{s}.cut.{p}'),
        Row('stages.{i}.patch_embed.norm.{p}',   'tower.{s}.even.{p}'),
        Row('stages.{i}.blocks.{j}.attn.kv.{p}', ('tower.{s}.{b}.keys.{p}', 'tower.{s}.{b}.values.{p}'),
            our_pieces=(2,)),
        Row('stages.{i}.blocks.{j}.{layer}.{p}', 'tower.{s}.{b}.{layer}.{p}'),
        Row('norm.{p}',                          'last.{p}'),
        Row('head.{p}',                          'answer.{p}',
            to_ours=lambda x: x.flip(0), to_theirs=lambda x: x.flip(0)),
    )
    first_weight = ('tower.1.cut.weight',)
    start = re.compile(r'(?:tower|last|answer)\\\\b')
    is_target = True

    def take_parts(self, weights, drop):
        return drop_parts(weights.state_dict, drop, weights.info.class_row), ['towers count from 1']

    def write(self, folder, weights, tensors):
        write_tensors(tensors, folder / 'tower.pth')

    def how_to_load(self, weights):
        return '`Tower.load(FOLDER)`.'


FORMATS = [InventedFormat()]
'''.replace('\\\\b', '\\b')


PROGRAM = '''
import json, os, sys
import weights_conversion
from weights_conversion.cli import main

print(os.path.dirname(weights_conversion.__file__))
*conversions, last = json.loads(sys.argv[1])
for argv in conversions:
    code = main([*argv, '--quiet'])
    if code:
        sys.exit(code)
sys.exit(main(last))
'''


def test_one_file_and_one_line(tmp_path, client_env):
    for package in ('pvt_timm', 'weights_conversion'):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'pvt_timm' / 'formats' / 'invented.py').write_text(INVENTED)
    listing = tmp_path / 'pvt_timm' / 'formats' / '__init__.py'
    text = listing.read_text().replace("    'openmmlab',\n", "    'openmmlab',\n    'invented',\n")
    listing.write_text(text)
    assert text.count('invented') == 1

    # the commands that they would type, one after the other in a process that imports the copy
    source = files.save(files.make('original', num_classes=3), tmp_path / 'x.pth')
    commands = [
        [str(source), '--output', 'invented', '--to', 'invented'],
        ['invented', '--output', 'timm', '--prefix', ''],
        ['timm', '--output', 'back', '--to', 'invented'],
        ['timm', '--output', 'original', '--to', 'original'],
        ['inspect', 'invented'],
    ]
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, json.dumps(commands)], cwd=tmp_path, capture_output=True, text=True,
        env={**client_env, 'PYTHONPATH': str(tmp_path)})
    assert done.returncode == 0, done.stderr
    folder, out = done.stdout.split('\n', 1)
    assert Path(folder) == tmp_path / 'weights_conversion'
    assert 'format   invented' in out and 'class_token, norm, head; 3 classes' in out and 'tower.*.*.keys.*' in out
    card = (tmp_path / 'invented' / 'README.md').read_text()
    assert '`Tower.load(FOLDER)`' in card and 'towers count from 1' in card
    read = read_checkpoint
    assert files.same(read(tmp_path / 'back'), read(tmp_path / 'invented'))
    assert files.same(read(tmp_path / 'original'), read(source))
