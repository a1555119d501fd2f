""" Runs pytest like on Windows, as far as Linux can do that: `python -m tests.support.other_system [pytest arguments]`.

- `sitecustomize.py` beside this file removes modules and functions of POSIX, /proc and /dev, and symbolic links.
- The locale has the encoding cp1252, as Windows in Western Europe. glibc's `localedef`, which is part of every Debian,
  makes it from a table in Python.

It cannot show problems with backslashes in paths, with files that cannot be replaced while they are open, and with the
shell.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

ENCODING = 'cp1252'


def make_locale(folder: Path) -> Dict[str, str]:
    """Write a locale with `ENCODING` into a folder. Return an environment that uses it."""
    rows = []
    for number in range(256):
        try:
            character = bytes([number]).decode(ENCODING)
        except UnicodeDecodeError:  # five numbers have none
            continue
        rows.append(f'<U{ord(character):04X}> /x{number:02x} CHARACTER')
    charmap, source = folder / 'charmap', folder / 'source'
    head = f'<code_set_name> {ENCODING.upper()}\n<mb_cur_min> 1\n<mb_cur_max> 1\n<comment_char> %\n<escape_char> /\n'
    charmap.write_text(head + '\n'.join(['CHARMAP', *rows, 'END CHARMAP', '']), encoding='ascii')
    source.write_text('comment_char %\nescape_char /\nLC_CTYPE\nEND LC_CTYPE\n', encoding='ascii')
    # its exit code is 1, as it warns that the locale describes characters alone
    command = ['localedef', '-c', '-f', str(charmap), '-i', str(source), str(folder / 'test.CP1252')]
    subprocess.run(command, stderr=subprocess.DEVNULL)
    return {
        'LOCPATH': str(folder), 'LC_ALL': 'test.CP1252', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0',
        'PYTHONWARNDEFAULTENCODING': '1',  # pyproject.toml makes it an error where the package forgets one
        'HF_HUB_DISABLE_SYMLINKS_WARNING': '1',  # that of a cache without links, which the hub's client prints
        'PYTHONWARNINGS': 'ignore::EncodingWarning',  # and in programs that tests start it is no second line on stderr
    }


def main(args: List[str]) -> int:
    with tempfile.TemporaryDirectory(prefix='pvt_timm_locale_') as folder:
        path = filter(None, [str(Path(__file__).resolve().parent), os.environ.get('PYTHONPATH')])
        env = {**os.environ, **make_locale(Path(folder)), 'PYTHONPATH': os.pathsep.join(path)}
        check = 'import locale, os; print(locale.getpreferredencoding(), hasattr(os, "fork"))'
        command = [sys.executable, '-c', check]
        found = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        if found.lower().split() != [ENCODING, 'false']:
            print(f'Expected a Python with {ENCODING} and without os.fork, got {found}', file=sys.stderr)
            return 2
        return subprocess.run([sys.executable, '-m', 'pytest', *args], env=env).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
