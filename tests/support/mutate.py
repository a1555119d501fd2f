""" Does a test notice? Change one place of the code at a time and run the tests of that file.

    python tests/support/mutate.py --sample 100 --jobs 2 --output mutants.json

draws a seeded sample from all places that `mutants` finds in the files of `TESTS`. A mutant that no test notices is
printed as a diff, to be argued or to be given a test. Linux and macOS (it forks, so that torch is imported once).
"""
import argparse
import ast
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

ROOT = Path(__file__).resolve().parents[2]

# file or folder -> tests that are run on its mutants, those that notice most first
TESTS: Dict[str, List[str]] = {
    'pvt_timm/pvt.py': ['tests/model', 'tests/native/test_native.py', 'tests/convert/test_checkpoints.py'],
    'pvt_timm/checkpoints.py': ['tests/convert/test_checkpoints.py', 'tests/model', 'tests/convert/test_convert.py'],
    'pvt_timm/files.py': ['tests/convert/test_files.py', 'tests/convert/test_convert.py', 'tests/cli/test_cli.py'],
    'pvt_timm/detection': ['tests/downstream'],
}
SECONDS = 420  # for the tests of a mutant; an endless loop counts as noticed

_SWAPS = {
    ast.Add: '-', ast.Sub: '+', ast.Mult: '+', ast.Div: '*', ast.FloorDiv: '*', ast.Mod: '*', ast.Pow: '*',
    ast.Eq: '!=', ast.NotEq: '==', ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.Is: 'is not',
    ast.IsNot: 'is', ast.In: 'not in', ast.NotIn: 'in', ast.And: 'or', ast.Or: 'and',
}


@dataclass
class Mutant:
    file: str
    line: int
    before: str
    after: str
    start: int  # in bytes, as ast counts columns
    end: int
    outcome: str = ''
    seconds: float = 0.


def mutants(path: Path) -> Iterator[Mutant]:
    """All places of a file that can be changed, one mutant each."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def position(node: ast.AST) -> Tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def make(start: int, end: int, after: str) -> Mutant:
        line = source[:start].count(b'\n') + 1
        return Mutant(str(path.relative_to(ROOT)), line, source[start:end].decode(), after, start, end)

    def between(left: ast.AST, right: ast.AST, op: ast.AST) -> Iterator[Mutant]:
        if type(op) in _SWAPS:
            yield make(position(left)[1], position(right)[0], f' {_SWAPS[type(op)]} ')

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            yield from between(node.left, node.right, node.op)
        elif isinstance(node, ast.Compare):
            yield from between(node.left, node.comparators[0], node.ops[0])
        elif isinstance(node, ast.BoolOp):
            yield from between(node.values[0], node.values[1], node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield make(*position(node), f'bool({ast.unparse(node.operand)})')
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield make(*position(node), str(not node.value))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield make(*position(node), repr(node.value + 1))
        elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
            yield make(*position(node), 'return None')
        elif isinstance(node, (ast.Raise, ast.Assign, ast.AugAssign, ast.Expr, ast.Delete)):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not docstring and node.col_offset:  # not at the top of a module
                yield make(*position(node), 'pass')


def _parses(mutant: Mutant) -> bool:
    source = (ROOT / mutant.file).read_bytes()
    try:
        ast.parse(source[:mutant.start] + mutant.after.encode() + source[mutant.end:])
    except SyntaxError:
        return False
    return mutant.before.split() != mutant.after.split()


def run(mutant: Mutant, tests: List[str]) -> Mutant:
    """Run the tests on a copy of the packages with the change in it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='mutant-') as folder:
        for package in ('pvt_timm', 'weights_conversion'):
            shutil.copytree(ROOT / package, Path(folder, package), ignore=shutil.ignore_patterns('__pycache__'))
        file = Path(folder, mutant.file)
        source = file.read_bytes()
        file.write_bytes(source[:mutant.start] + mutant.after.encode() + source[mutant.end:])
        pid = os.fork()
        if not pid:
            try:
                os.setsid()
                log = os.open(os.devnull, os.O_WRONLY)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.chdir(ROOT)
                os.environ['PYTHONPATH'] = folder
                os.environ['TMPDIR'] = tempfile.tempdir = folder
                sys.dont_write_bytecode = True
                sys.path[:] = [folder] + [p for p in sys.path if p not in ('', str(ROOT))]
                import pytest
                code = pytest.main(['-x', '-q', '-n', '0', '-p', 'no:cacheprovider', *tests])
                os._exit(int(code))
            except BaseException:
                os._exit(1)
        deadline = begin + SECONDS
        status = None
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(.2)
        else:
            status = None
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if status is None:
            os.waitpid(pid, 0)
    mutant.outcome = 'not noticed' if status == 0 else 'noticed'
    mutant.seconds = round(time.monotonic() - begin, 1)
    return mutant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sample', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--only', nargs='*', default=list(TESTS), help='of the files and folders in TESTS')
    parser.add_argument('--output', type=Path)
    args = parser.parse_args()
    import torch  # noqa: F401  imported once, before the forks
    import torchvision  # noqa: F401

    pool: List[Tuple[Mutant, List[str]]] = []
    for name in args.only:
        path = ROOT / name
        for file in sorted(path.glob('*.py')) if path.is_dir() else [path]:
            pool += [(m, TESTS[name]) for m in mutants(file) if _parses(m)]
    for name in args.only:  # without a change they have to pass
        path = ROOT / name
        file = next(path.glob('*.py')) if path.is_dir() else path
        if run(Mutant(str(file.relative_to(ROOT)), 0, '', '', 0, 0), TESTS[name]).outcome == 'noticed':
            sys.exit(f'The tests of {name} fail without a change: {", ".join(TESTS[name])}')
    sample = random.Random(args.seed).sample(pool, min(args.sample, len(pool)))
    print(f'{len(sample)} of {len(pool)} mutants')
    noticed = 0
    with ThreadPoolExecutor(args.jobs) as executor:
        for n, mutant in enumerate(executor.map(lambda pair: run(*pair), sample), 1):
            noticed += mutant.outcome == 'noticed'
            print(f'{n:4d} {mutant.outcome:<12} {mutant.seconds:6.1f} s  {mutant.file}:{mutant.line}', flush=True)
            if mutant.outcome != 'noticed':
                print(f'     - {mutant.before}\n     + {mutant.after}', flush=True)
    print(f'{noticed} of {len(sample)} noticed')
    if args.output:
        args.output.write_text(json.dumps([asdict(m) for m, _ in sample], indent=1), encoding='utf-8')


if __name__ == '__main__':
    main()
