""" Mutation testing: change one place of the code at a time (a mutant), and see whether the tests of its file fail.

    python tests/support/mutate.py --sample 100 --jobs 2

draws a random sample (with a fixed seed) of the places in the files of `TESTS` that `changed` can change. A mutant that
no test notices is printed. It then needs a test, or a reason why none is needed.
"""
import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

ROOT = Path(__file__).resolve().parents[2]

# file or folder -> tests that are run on its mutants, those that notice most first. None needs a checkout.
TESTS = {
    'pvt_timm/pvt.py': [
        'tests/model/test_model.py', 'tests/convert/test_checkpoints.py', 'tests/model/test_equivalence.py',
        'tests/model/test_pretrained.py',
        '-k', 'not 448 and not 256 and not 230 and not test_transformers and not offline'],
    'pvt_timm/formats': [
        'tests/convert/test_checkpoints.py', 'tests/convert/test_what_is_said.py', 'tests/model/test_pretrained.py',
        'tests/convert/test_convert.py', '-k', 'not offline and not medium and not large and not as_a_program'],
    'pvt_timm/weights.py': ['tests/convert/test_what_is_said.py', 'tests/convert/test_convert.py'],
    'pvt_timm/sources.py': ['tests/convert/test_convert.py', 'tests/convert/test_files.py'],
    'pvt_timm/cli': [
        'tests/cli/test_cli.py', 'tests/cli/test_pictures.py', 'tests/cli/test_detect.py', 'tests/cli/test_train.py',
        'tests/cli/test_labels.py', 'tests/export', 'tests/training/test_fit.py'],
    'weights_conversion': [
        'tests/convert/test_convert.py', 'tests/convert/test_what_is_said.py', 'tests/convert/test_complete_output.py',
        'tests/convert/test_publish.py'],
    'pvt_timm/files.py': ['tests/convert/test_files.py'],
    'pvt_timm/detection': ['tests/downstream/test_detection.py', 'tests/downstream/test_semantic_fpn.py'],
}
SECONDS = 600  # for the tests of a mutant; an endless loop counts as noticed

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}


def changed(node: Any, top: bool) -> Optional[ast.AST]:
    """Return a replacement of a node, None to keep it. Statements at the `top` of a module are kept."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        return ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(SWAPS[type(node.op)](), node.values)
    if isinstance(node, ast.Compare):
        return ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        return ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        return ast.Return(None)
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, (ast.Raise, ast.Assign, ast.AugAssign, ast.Expr, ast.Delete)) and not docstring and not top:
        return ast.Pass()
    return None


def mutants(file: Path) -> Iterator[Dict[str, Any]]:
    """Yield all changes of a file: the code before and after, and the `text` of the changed file."""
    tree = ast.parse(file.read_bytes())
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for i, node in enumerate(nodes):
                new = changed(node, parent is tree)
                if new is not None:
                    setattr(parent, name, [*nodes[:i], new, *nodes[i + 1:]] if isinstance(value, list) else new)
                    text = ast.unparse(ast.fix_missing_locations(tree))
                    setattr(parent, name, value)
                    yield dict(file=str(file.relative_to(ROOT)), line=node.lineno, before=ast.unparse(node),
                               after=ast.unparse(new), text=text)


def run(file: str, text: str, tests: List[str]) -> bool:
    """Return whether the tests fail on a copy of the repository in which `file` holds `text`."""
    with tempfile.TemporaryDirectory(prefix='mutant-') as folder:
        copy = Path(folder, 'copy')
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.*_cache', '__pycache__', '.venv'))
        (copy / file).write_text(text, encoding='utf-8')
        try:
            return subprocess.run(
                [sys.executable, '-m', 'pytest', '-x', '-q', '-n', '0', '-p', 'no:cacheprovider', *tests], cwd=copy,
                env={**os.environ, 'PYTHONPATH': str(copy), 'TMPDIR': folder, 'PVT_CHECKOUT': '', 'TIMM_CHECKOUT': ''},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS).returncode != 0
        except subprocess.TimeoutExpired:
            return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--sample', type=int, default=100)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--only', nargs='*', default=list(TESTS), help='of the files and folders in TESTS')
    args = parser.parse_args()

    pool = []
    for name in args.only:
        files = sorted((ROOT / name).rglob('*.py')) if (ROOT / name).is_dir() else [ROOT / name]
        pool += [dict(mutant, tests=TESTS[name]) for file in files for mutant in mutants(file)]
        if run(str(files[0].relative_to(ROOT)), files[0].read_text(encoding='utf-8'), TESTS[name]):
            sys.exit(f'The tests of {name} fail without a change: {", ".join(TESTS[name])}')
        print(f'{name}: the tests pass without a change', flush=True)
    sample = random.Random(args.seed).sample(pool, min(args.sample, len(pool)))
    print(f'{len(sample)} of {len(pool)} mutants', flush=True)
    with ThreadPoolExecutor(args.jobs) as executor:
        results = executor.map(lambda mutant: run(mutant['file'], mutant['text'], mutant['tests']), sample)
        for n, (mutant, noticed) in enumerate(zip(sample, results), 1):
            mutant['noticed'] = noticed
            print('{:4d} {:<12} {file}:{line}'.format(n, 'noticed' if noticed else 'not noticed', **mutant), flush=True)
            if not noticed:
                print(f'     - {mutant["before"]}\n     + {mutant["after"]}', flush=True)
    print(f'{sum(mutant["noticed"] for mutant in sample)} of {len(sample)} noticed')


if __name__ == '__main__':
    main()
