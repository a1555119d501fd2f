"""What README.md shows can be typed as it stands."""
import re
import shlex
from pathlib import Path

import pytest

from pvt_timm.cli.main import build_parser, join_img_size
from pvt_timm.cli.predict import zoo

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')


def blocks(language, text=TEXT):
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def section(title):
    return re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', TEXT, re.MULTILINE | re.DOTALL)[1]


def test_opens_with_two_commands_that_set_up_everything():
    commands = [block.strip() for block in blocks('bash')[:2]]
    for command, ends in zip(commands, ('python -m pvt_timm demo', 'python -m pytest')):
        assert '\n' not in command and command.startswith('python3 -m venv ') and command.endswith(ends)
    # what .ci/run takes
    assert [line for line in TEXT.splitlines() if line.startswith('python3 -m venv ')] == commands


COMMANDS = [
    line for block in blocks('bash') for line in block.replace('\\\n', ' ').splitlines()
    if re.match(r'(python -m pvt_timm|pvt-timm) (?!run |train )', line)]


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_exist(command):
    argv = shlex.split(command, comments=True)
    argv = argv[3 if argv[0] == 'python' else 1:]
    build_parser().parse_args(join_img_size(argv))


def test_snippets_run():
    """Those on using the models, with the small one and without downloads."""
    code = ''.join(blocks('python', section('Use') + section('Features')))
    code = re.sub(r'pvt_(small|tiny|large)(\.\w+)?', 'test_pvt', code).replace('pretrained=True', 'pretrained=False')
    names = {}
    exec(compile(code, 'README.md', 'exec'), names)
    assert [tuple(f.shape[2:]) for f in names['features']] == [(200, 336), (100, 168), (50, 84), (25, 42)]


def test_table_holds_the_figures_of_list():
    for row in zoo():
        line = next(line for line in TEXT.splitlines() if line.startswith(f'| `{row["model"]}` |'))
        assert f'{row["macs"] / 1e9:.2f}' in line or row['classes'] == 0 or row['model'] == 'test_pvt'
        assert f'{row["params"] / 1e6:.2f} M' in line or row['classes'] == 0
        assert row['tag'] is None or f'`{row["tag"]}`' in line
        assert row['top1'] is None or str(row['top1']) in line


def test_links_to_files_exist():
    links = re.findall(r'\]\((?!https?:|#)([^)]+)\)', TEXT) + re.findall(r'src="(?!https?:)([^"]+)"', TEXT)
    assert links
    for link in links:
        assert (ROOT / link.partition('#')[0]).exists(), link
