""" Names of classes in files: any names that are written are read again unchanged. """
import json

import pytest
import timm

from pvt_timm.labels import MAX_FILE, MAX_NAME, labels_in, labels_text, read_labels

PLAIN = [
    ['cat', 'dog'], ['äffchen', '三'], ['cat 2', 'a, b; c', '# x', '"quoted"', '[pad]'], ['LABEL_0', 'LABEL_1'], ['["']]
ODD = [
    ['cat ', 'dog'], [' cat', 'dog'], ['', 'dog'], [' ', '\t'], ['a\nb', 'c'], ['a\rb', 'c'], ['a\x0bb', '\x1c'],
    ['a\x85b', 'a\u2028b'], ['\ufeffcat', 'dog'], ['["a", "b"]'], ['["a"]', 'b\n'], ['caf\udce9', 'dog'],
]


@pytest.mark.parametrize('names', PLAIN + ODD)
@pytest.mark.parametrize('name', ['class_names.txt', 'names'])
def test_there_and_back(names, name, tmp_path):
    (tmp_path / name).write_bytes(labels_text(names))
    assert read_labels(tmp_path / name, len(names)) == names


@pytest.mark.parametrize('names', PLAIN)
def test_plain_names_are_a_class_map_of_timm(names, tmp_path):
    (tmp_path / 'class_names.txt').write_bytes(labels_text(names))
    found = timm.data.readers.class_map.load_class_map(str(tmp_path / 'class_names.txt'))
    assert found == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize('text', ['cat\ndog\n', 'cat\r\ndog', '\ncat \n\n\tdog\n\n', '["cat", "dog"]'])
@pytest.mark.parametrize('mark', ['', '\ufeff'])
def test_files_of_other_programs(text, mark, tmp_path):
    """Files of labels may have a byte order mark, blank lines, and blanks at the end of lines."""
    (tmp_path / 'names.txt').write_bytes((mark + text).encode())
    (tmp_path / 'names.json').write_bytes((mark + '{"id2label": {"0": "cat", "1": "dog"}}').encode())
    for name in ('names.txt', 'names.json'):
        assert read_labels(tmp_path / name) == ['cat', 'dog']


@pytest.mark.parametrize('content, says', [
    ('x' * (MAX_NAME + 1), f'{MAX_NAME} characters at most'),
    ('\n' * (MAX_FILE + 1), f'at most {MAX_FILE:,} bytes'),
    ('["a", ["b"]]', 'got list'), ('["a", {}]', 'got dict'), ('["a", null]', 'got NoneType'),
    (b'\xff\xfea\x00', 'utf-8'), ('', 'some classes'), ('[]', 'Expected'),
])
@pytest.mark.parametrize('suffix', ['.txt', '.json'])
def test_what_is_refused(content, says, suffix, tmp_path):
    if suffix == '.json' and content[:1] in ('x', '\n', ''):
        content = json.dumps([content]) if content else '{}'
    file = tmp_path / f'names{suffix}'
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if content == '[]' and suffix == '.txt':
        assert read_labels(file) == ['[]']  # a name
        return
    with pytest.raises(ValueError, match=says) as error:
        read_labels(file)
    assert str(file) in str(error.value)


def test_what_no_name_of_a_class_is():
    """Names of classes that are nested lists or too long are refused.

    As text, a list of lists would double its length with every level.
    """
    nested = 'x'
    for _ in range(60):
        nested = [nested, nested]
    for config in (nested, {'label_names': nested}, {'id2label': {'0': nested}}, {'0': nested}, ['x' * (MAX_NAME + 1)]):
        with pytest.raises(ValueError, match='name'):
            labels_in(config)
    with pytest.raises(ValueError, match='got list'):
        labels_in({'label_names': ['a'], 'label_descriptions': {'a': nested}})
    assert labels_in([1, 2.5, 'c']) == ['1', '2.5', 'c']
