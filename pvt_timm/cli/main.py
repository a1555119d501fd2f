""" Command line: `python -m pvt_timm` or `pvt-timm`.

A user's error ends in one line on stderr and exit code 2. An error of the package itself shows its traceback.
"""
import argparse
import builtins
import contextlib
import importlib.util
import json
import logging
import os
import re
import sys
import types
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, List, Optional, Sequence, Tuple
from urllib.parse import urlsplit

import torch
from safetensors.torch import save

from ..files import save_atomically
from .pictures import draw_pyramid
from .predict import UserError, extract, load_model, open_image, predict, user_errors
from ..version import __version__
from .zoo import zoo

__all__ = ['main']

DEFAULT_MODEL = 'pvt_small'
DIGITS = Path(__file__).resolve().parents[1] / 'data' / 'digits'


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f'{self.prog}: error: {message} (see {self.prog} --help)\n')


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name, those of the process by default.

    Returns:
        Exit code: 0, or 2 after an error that the user can put right.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['run'] and len(argv) > 1 and not argv[1].startswith('-'):
        # before argparse sees it: everything after the script belongs to the script
        try:
            run_script(argv[1], argv[2:])
        except UserError as e:
            return _report(e)
        return 0
    for stream in (sys.stdout, sys.stderr):  # a file name may hold what the terminal cannot show
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors='backslashreplace')
    parser = build_parser()
    args = parser.parse_args(_join_img_size(argv))
    if args.command is None:
        parser.print_help()
        return 0
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # its retries and hints, the error itself follows
    try:
        code = args.func(args)
        sys.stdout.flush()
        return code or 0
    except UserError as e:
        return _report(e)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _report(e: Exception) -> int:
    print(f'pvt-timm: error: {" ".join(str(e).split())}', file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog='pvt-timm', description='Pyramid Vision Transformer (v1) for timm.')
    parser.add_argument('--version', action='version', version=f'pvt-timm {__version__}')
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', title='commands')
    for add_parser in (add_demo, add_list, add_predict, add_features, add_recipe, add_run):
        add_parser(subparsers)
    return parser


def _img_size(text: str) -> Tuple[int, int]:
    match = re.fullmatch(r'(\d+)(?:[x ,](\d+))?', text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected N or H W in pixels, got '{text}'")
    return int(match[1]), int(match[2] or match[1])


def _join_img_size(argv: List[str]) -> List[str]:
    """`--img-size H W` as one argument, so that it may stand before the images."""
    joined: List[str] = []
    for i, arg in enumerate(argv):
        follows = joined and re.fullmatch(r'\d+', joined[-1]) and re.fullmatch(r'\d+', arg)
        if i >= 2 and argv[i - 2] == '--img-size' and follows:
            joined[-1] += f'x{arg}'
        else:
            joined.append(arg)
    return joined


def _positive(text: str) -> int:
    if not re.fullmatch(r'\d+', text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 up, got '{text}'")
    return int(text)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--model', help='name with or without tag, see `list`, or hf-hub:OWNER/REPO '
        f'(default {DEFAULT_MODEL}, or what the checkpoint is)')
    parser.add_argument(
        '--checkpoint', metavar='FILE_OR_DIR', help='weights: a file of any known format, or a folder of timm or '
        'transformers (default the published ones)')
    parser.add_argument(
        '--img-size', type=_img_size, metavar='N | H W', help='size that the model sees (default that of its training)')


def _load(args: argparse.Namespace, dense: bool = False):
    model = args.model or (None if args.checkpoint else DEFAULT_MODEL)
    return load_model(model, args.checkpoint, dense=dense, img_size=args.img_size)


def _table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns of text, each aligned as its letter in `align` says (l or r)."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    lines = ('  '.join(
        cell.rjust(w) if a == 'r' else cell.ljust(w) for cell, w, a in zip(row, widths, align)) for row in rows)
    return '\n'.join(line.rstrip() for line in lines)


# list -----------------------------------------------------------------------------------------------------------------

def add_list(subparsers) -> None:
    parser = subparsers.add_parser('list', help='models, their cost, accuracy and where the weights come from')
    parser.add_argument('--json', action='store_true', help='for machines')
    parser.set_defaults(func=run_list)


def run_list(args: argparse.Namespace) -> None:
    rows = zoo()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        hosts = [f'hf-hub:{row["hf_hub_id"].partition("@")[0]}'] if row['hf_hub_id'] else []
        hosts += [urlsplit(row['url']).netloc] if row['url'] else []
        row['weights'] = 'in the package' if row['file'] else ' or '.join(hosts) or 'none'
    table = [('model', 'params', 'GMACs', 'at', 'top-1', 'weights')]
    for row in rows:
        table.append((
            f'{row["model"]}.{row["tag"]}' if row['tag'] else row['model'],
            f'{row["params"] / 1e6:.2f} M' if row['params'] >= 1e6 else f'{row["params"] / 1e3:.0f} k',
            f'{row["macs"] / 1e9:.2f}' if row['macs'] >= 1e7 else f'{row["macs"] / 1e9:.4f}',
            '{}x{}'.format(*row['img_size']),
            f'{row["top1"]:.1f}' if row['top1'] else '-',
            row['weights'],
        ))
    print(_table(table, 'lrrlrl'))
    print('\ntop-1: ImageNet-1K as published (test_pvt: held-out digits). retinanet_coco: backbones, no classifier.')


# predict --------------------------------------------------------------------------------------------------------------

def add_predict(subparsers) -> None:
    parser = subparsers.add_parser('predict', help='classify images')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    _add_model_arguments(parser)
    parser.add_argument('--topk', type=_positive, default=5, metavar='K', help='classes to show (default 5)')
    parser.add_argument('--json', action='store_true', help='for machines')
    parser.set_defaults(func=run_predict)


def run_predict(args: argparse.Namespace) -> None:
    for path in args.images:  # before weights are downloaded
        if not Path(path).exists():
            raise UserError(f'No such file: {path}')
    classifier = _load(args)
    results = []
    for path in args.images:
        image = open_image(path, classifier.data['input_size'][0])
        top = [
            dict(index=index, label=classifier.labels[index], probability=round(probability, 6))
            for index, probability in predict(classifier, image, args.topk)]
        results.append(dict(image=str(path), predictions=top))
        if not args.json:
            print(path)
            for item in top:
                print(f'  {item["probability"]:7.2%}  {item["label"]}', flush=True)
    if args.json:
        print(json.dumps(dict(
            model=classifier.name, img_size=classifier.data['input_size'][1:], images=results), indent=2))


# features -------------------------------------------------------------------------------------------------------------

def add_features(subparsers) -> None:
    parser = subparsers.add_parser('features', help='draw the feature pyramid of an image')
    parser.add_argument('image', metavar='IMAGE', help='image file')
    _add_model_arguments(parser)
    parser.add_argument('--output', required=True, metavar='FILE', help='picture to write (.png, .pdf, .svg ...)')
    parser.add_argument('--save', metavar='FILE', help='also write the features (.safetensors)')
    parser.set_defaults(func=run_features)


def run_features(args: argparse.Namespace) -> None:
    for path in filter(None, (args.output, args.save)):
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f'No such folder: {Path(path).parent}')
    if not Path(args.image).exists():
        raise UserError(f'No such file: {args.image}')
    classifier = _load(args, dense=True)
    image = open_image(args.image, classifier.data['input_size'][0])
    features, size = extract(classifier, image, args.img_size)
    _draw(args.output, image, features, size, classifier.name)
    print(f'{args.output}: {_shapes(features)}')
    if args.save:
        tensors = {f'stage{i}': f.contiguous() for i, f in enumerate(features)}
        with user_errors(f'Cannot write {args.save}: '):
            save_atomically(args.save, lambda f: f.write(save(tensors, metadata={'model': classifier.name})))
        print(f'{args.save}: {", ".join(tensors)}')


def _shapes(features: Sequence[torch.Tensor]) -> str:
    return ', '.join('x'.join(map(str, f.shape)) for f in features)


def _draw(output: Any, image, features: Sequence[torch.Tensor], size: Tuple[int, int], name: str, **kwargs) -> None:
    try:
        with user_errors(f'Cannot draw {output}: '):
            draw_pyramid(image, features, output, title=name, img_size=size, **kwargs)
    except ImportError as e:
        raise UserError(e) from e


# demo -----------------------------------------------------------------------------------------------------------------

def add_demo(subparsers) -> None:
    parser = subparsers.add_parser('demo', help='classify handwritten digits and draw their features, without network')
    parser.add_argument('--output', default='pvt_demo', metavar='DIR', help='folder to write to (default pvt_demo)')
    parser.set_defaults(func=run_demo)


def run_demo(args: argparse.Namespace) -> None:
    from PIL import Image

    output = Path(args.output)
    with user_errors(f'Cannot write to {output}: '):
        output.mkdir(parents=True, exist_ok=True)
    files = sorted(DIGITS.glob('*.png'))  # named <label>_<index in scikit-learn's digits>.png
    labels = [int(file.name.partition('_')[0]) for file in files]
    classifier = load_model('test_pvt')
    images = [open_image(file) for file in files]
    top = [predict(classifier, image, 1)[0] for image in images]

    print(f'{classifier.name}: {len(files)} handwritten digits that were held out of its training\n')
    rows = [('digit', 'predicted', 'probability of each')]
    for digit in sorted(set(labels)):
        mine = [t for t, label in zip(top, labels) if label == digit]
        rows.append((
            str(digit), ' '.join(classifier.labels[index] for index, _ in mine),
            ' '.join(f'{probability:4.0%}' for _, probability in mine)))
    print(_table(rows, 'lll'))
    right = sum(index == label for (index, _), label in zip(top, labels))
    print(f'\n{right} of {len(files)} right')

    # One sheet, a column per digit: an image of another size and shape than the model was trained on.
    columns = sorted(set(labels))
    side = images[0].width
    sheet = Image.new('RGB', (side * len(columns), side * (len(files) // len(columns))))
    seen = dict.fromkeys(columns, 0)
    for image, label in zip(images, labels):
        sheet.paste(image, (columns.index(label) * side, seen[label] * side))
        seen[label] += 1
    backbone = load_model('test_pvt', dense=True)
    features, size = extract(backbone, sheet, (sheet.height, sheet.width))
    picture = output / 'pyramid.png'
    _draw(
        picture, sheet, features, size, backbone.name, cells=(sheet.height // side, len(columns)),
        note=f'{len(files)} handwritten digits, a column each for 0 to 9. At stride 32 a digit is one position.')
    print(f'Features of all of them as one image of {sheet.width}x{sheet.height}: {picture}')

    print(f'''
Next, with your own image (weights come from the Hugging Face Hub):
  python -m pvt_timm predict photo.jpg --model {DEFAULT_MODEL}
  python -m pvt_timm features photo.jpg --model {DEFAULT_MODEL} --output pyramid.png
or in Python:
  import timm, pvt_timm
  model = timm.create_model('{DEFAULT_MODEL}', pretrained=True, features_only=True)''')


# recipe ---------------------------------------------------------------------------------------------------------------

def add_recipe(subparsers) -> None:
    if importlib.util.find_spec('pvt_timm.recipes') is None:
        return
    from .. import recipes
    if hasattr(recipes, 'add_parser'):
        recipes.add_parser(subparsers)


# run ------------------------------------------------------------------------------------------------------------------

def add_run(subparsers) -> None:
    parser = subparsers.add_parser(
        'run', help='run a Python script with the models registered',
        usage='%(prog)s [-h] SCRIPT [ARGS ...]',
        description="Run a Python script, such as timm's validate.py, as `python SCRIPT ARGS ...` would, with the "
                    "models registered. For several processes: torchrun --nproc-per-node=2 -m pvt_timm run SCRIPT")
    parser.add_argument('script', metavar='SCRIPT', help='the script')
    parser.set_defaults(func=None)  # `main` runs it, only -h and a missing SCRIPT come here


def run_script(script: str, args: Sequence[str]) -> None:
    """Run a script as `__main__`, with `sys.argv` and `sys.path[0]` as Python would set them.

    Raises:
        UserError: There is no such script. What the script itself raises is left alone.
    """
    path = Path(script)
    if not path.exists():
        raise UserError(f'No such script: {script}')
    with user_errors(f'Cannot read the script {script}: '):
        source = path.read_bytes()
    sys.argv[:] = [script, *args]
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = str(path.resolve().parent)
    file = str(path.absolute())
    module = types.ModuleType('__main__')
    module.__dict__.update(
        __file__=file, __cached__=None, __builtins__=builtins, __loader__=SourceFileLoader('__main__', file))
    sys.modules['__main__'] = module  # stays, as exit handlers and pickle look it up
    exec(compile(source, file, 'exec', dont_inherit=True), module.__dict__)
