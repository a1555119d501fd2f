""" Windows paths, in all functions that take the name of a file: none is taken for a url or for something else.

On other systems a backslash and a colon may be part of a name, so a file of this name can be made there.
"""
import json
import os
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

import pytest
import torch

from pvt_timm import create_from_checkpoint
from pvt_timm.cli.main import main as pvt_timm_main
from pvt_timm.files import read_checkpoint
from pvt_timm.sources import open_source
from tests.support import convert_files as files
from tests.support.convert_files import run

NAMES = [r'C:\weights\new.pth', r'c:new.pth', r'\\server\share\new.pth', r'..\weights\new.pth', r'C:/weights\new.pth']


@pytest.fixture
def folder(tmp_path, monkeypatch):
    if os.path.sep == '\\':
        pytest.skip('needs a system on which a backslash is a letter')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', NAMES)
def test_weights_and_output(name, folder):
    """Paths with backslashes are read, written, and named in the report as they were given."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    source = files.make('original', fill=files.random_values)
    with open(name, 'wb') as f:  # given a name, torch takes a backslash for the end of a folder's name everywhere
        torch.save(source, f)
    output = name.replace('new.pth', 'new out')
    code, out, err = run(name, '--output', output, '--json')
    assert (code, err) == (0, '') and json.loads(out)['source'] == name
    assert {p.name for p in Path(output).iterdir()} >= {'model.safetensors', 'config.json'}
    code, out, err = run(output, '--output', f'{output} again', '--to', 'original')
    assert (code, err) == (0, '') and files.same(read_checkpoint(f'{output} again'), source)
    assert create_from_checkpoint(name).num_classes == 7


@pytest.mark.parametrize('name', NAMES)
def test_what_is_not_there_is_named(name, folder, capsys):
    """If the file does not exist, the error is one line with the path as it was given."""
    code, out, err = run(name, '--output', 'out')
    assert (code, out, err) == (2, '', f'pvt-convert: error: No such file or folder: {Path(name)}\n')
    assert pvt_timm_main(['predict', '--checkpoint', name, 'x.png']) == 2
    assert capsys.readouterr().err.count('\n') == 1
    assert not list(folder.iterdir())


@pytest.mark.parametrize('path', [
    r'a\..\..\x.pth', r'C:\x.pth', 'C%3A%5Cx.pth', '..%5C..%5Cx.pth', 'x.pth:stream', '%2e%2e%5cx.pth',
    r'\\server\share\x.pth'])
def test_no_name_of_a_url_leaves_its_folder(path, hub):
    """A url cannot name a file outside of the download folder, not even with a backslash or a drive."""
    hub.add_file(unquote(path), b'weights')
    with open_source(f'{hub.url}/{path}') as source:
        name = source.file.name
        assert source.file.read_bytes() == b'weights'
    assert PureWindowsPath(name).name == name and not PureWindowsPath(name).drive and name.strip('.') == name


@pytest.mark.parametrize('spec', [
    r'hf-hub:some\pvt', r'hf-hub:C:\some\pvt', r'hf-hub:some/pvt:C:\x.pth', r'hf-hub:some/pvt:..\x.pth',
    'file:///C:/x.pth'])
def test_no_spec_of_the_hub_holds_them(spec, hub):
    code, out, err = run('inspect', spec)
    assert (code, out, err.count('\n')) == (2, '', 1) and not hub.requests
