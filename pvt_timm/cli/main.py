""" Command line: `python -m pvt_timm` or `pvt-timm`. """
import argparse
import logging
import runpy
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from ..digits import write_digits
from ..recipes import RECIPES
from ..version import __version__
from .classifiers import DEFAULT_MODEL
from .detect import run_detect, run_segment
from .embed import add_embed_options, run_embed
from .errors import Parser, clean, filled, run_command
from .export import add_export_options, run_export
from .features import add_features_options, run_features
from .many import add_images, add_many_options, add_output_options, whole_number
from .predict import run_demo, run_list, run_predict
from .train import run_run, run_train
from .training import add_training

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv`, by default that of the process. Returns the exit code, see `run_command`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    start = 1 if argv[:1] == ['--debug'] else 0
    has_script = argv[start:start + 1] in (['train'], ['run'])
    own = start + 2 if has_script else len(argv)  # arguments after a script belong to the script
    args = _parser().parse_args(join_img_size(argv[:own]))
    args.script_args = argv[own:]
    script: List[str] = []  # command line of the script to run, which `train` and `run` return
    # hides messages about retries, and hints. The error itself is printed by `run_command`
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)

    def command() -> int:
        result = args.func(args)
        if isinstance(result, int):
            return result
        script.extend(result or ())
        return 0

    code = run_command('pvt-timm', command, args.debug)
    if script:
        run_script(script)  # outside of `run_command`: Python reports the script's errors as usual
    return code


def _parser() -> Parser:
    parser = Parser(prog='pvt-timm', description='Pyramid Vision Transformer (v1) for timm.')
    parser.add_argument('--version', action='version', version=f'pvt-timm {__version__}')
    debug: Dict[str, Any] = dict(action='store_true', help='print the traceback of an error before its one line')
    parser.add_argument('--debug', **debug)
    parser.set_defaults(func=lambda args: parser.print_help())
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', title='commands')

    def add(name: str, func: Callable[[argparse.Namespace], Any], what: str, **kwargs: Any) -> Any:
        command = subparsers.add_parser(name, help=what, **kwargs)
        command.set_defaults(func=func)
        if name not in ('train', 'run'):  # these accept --debug only before their name
            command.add_argument('--debug', **debug, default=argparse.SUPPRESS)
        return command

    images = Parser(add_help=False)
    add_images(images)
    images.add_argument(
        '--json', action='store_true', help='print the results as one JSON document. The result of each image is '
        'printed as soon as it is computed. After an error the exit code is 2, and what was printed is not a complete '
        'document')
    model = Parser(add_help=False)
    model.add_argument(
        '--model', type=filled, help='name of a model, with or without tag (see `list`), or hf-hub:OWNER/REPO '
        f'(default {DEFAULT_MODEL}, or the model of the checkpoint)')
    model.add_argument(
        '--checkpoint', type=filled, metavar='SOURCE', help='weights: a file of any supported format, a folder of timm '
        'or transformers, a url, or hf-hub:OWNER/REPO[@REVISION][:FILE] (default: the published weights)')
    model.add_argument(
        '--prefix', help='part before the names of the weights, such as encoder.model., if the checkpoint holds '
        'several models')
    model.add_argument(
        '--img-size', type=image_size, metavar='N | H W', help="size of the model's input (default that of training)")
    drawn = Parser(add_help=False)
    drawn.add_argument(
        '--prefix', help="part before the names of the backbone's weights, if the file holds several backbones")
    add_output_options(
        drawn, 'folder for pictures, one per image, or file for the results in place of printing them, or both (give '
        '--output twice). Formats of the file', metavar='DIR|FILE', action='append',
        more='. Only .jsonl holds masks, and images in which nothing was found')

    demo = add('demo', run_demo, 'classify handwritten digits and draw their features, without network')
    demo.add_argument(
        '--output', type=folder, default='pvt_demo', metavar='DIR', help='folder to write to (default pvt_demo)')
    digits = add('digits', lambda args: print(f'{clean(write_digits(args.folder), 4096)}: train and validation'),
                 "write scikit-learn's handwritten digits as an image folder, to train on")
    digits.add_argument('folder', type=filled, metavar='FOLDER', help='folder to write train/ and validation/ into')
    add('list', run_list, 'models, their cost, accuracy and where the weights come from')
    predict = add('predict', run_predict, 'classify images', parents=[images, model])
    predict.add_argument(
        '--labels', type=filled, metavar='FILE', help='names of the classes: one a line, or JSON (default those that '
        'the weights come with)')
    predict.add_argument('--topk', type=whole_number, default=5, metavar='K', help='classes to show (default 5)')
    add_output_options(predict)
    add_many_options(predict)
    add_features_options(add('features', run_features, 'draw or save feature maps of images', parents=[model]))
    add_embed_options(add('embed', run_embed, 'compute one vector per image', parents=[model]))
    add_export_options(add('export', run_export, 'write a model as a file for another runtime', parents=[model]))
    detect = add('detect', run_detect, 'find the objects in images', parents=[images, drawn])
    which = detect.add_mutually_exclusive_group()
    which.add_argument(
        '--model', type=filled, default='pvt_small',
        help="pvt_tiny, pvt_small (default) or pvt_medium, for OpenMMLab's RetinaNet on it, trained on COCO")
    which.add_argument(
        '--checkpoint', type=filled, metavar='FILE',
        help='a RetinaNet, Faster R-CNN or Mask R-CNN, from `detector fit`, from mmdetection or from the original code')
    detect.add_argument(
        '--format', choices=('plain', 'coco'), default='plain',
        help="format of --json: plain (default), where labels count from 0, or COCO's results format. There the ids of "
        "categories are COCO's if the classes are COCO's 80, otherwise 1, 2, 3... The ids of images are the numbers in "
        'their file names if each name is a different number, otherwise 1, 2, 3... With --skip-errors and '
        'ids 1, 2, 3..., all results are printed at the end')
    add_many_options(
        detect, 1, '. Images of different sizes always go one by one, as padding them to one size would change results')
    detect.add_argument(
        '--threshold', type=score, default=0.5, help='lowest score of an object, 0 to 1 (default 0.5)')
    segment = add(
        'segment', run_segment, 'assign a class to every pixel of images', parents=[images, drawn])
    segment.add_argument(
        '--checkpoint', type=filled, required=True, metavar='FILE',
        help='a Semantic FPN, from `segmenter fit`, from mmsegmentation or from the original code')
    add_many_options(segment, 1, '. Images of different sizes always go one by one')
    add_training(subparsers)
    train = add(
        'train', run_train, "run timm's train.py, and continue after a crash", usage='%(prog)s [-h] SCRIPT [ARGS ...]',
        description="Run timm's train.py with ARGS. It knows the PVT models. --config also takes the name of a recipe "
                    f'({", ".join(RECIPES)}). Device and mixed precision are chosen for the machine unless ARGS '
                    'set them. If the folder of the experiment holds a checkpoint, training continues after its last '
                    'epoch (--resume FILE chooses another checkpoint). The names of the classes are saved in this '
                    'folder. Grey images of 16 bits are read as by `predict`.')
    train.add_argument('script', metavar='SCRIPT', help="timm's train.py")
    run = add(
        'run', run_run, 'run a Python script that knows the PVT models', usage='%(prog)s [-h] SCRIPT [ARGS ...]',
        description="Run a Python script, such as timm's validate.py, as `python SCRIPT ARGS ...` would. It "
                    'knows the PVT models. Datasets of timm read grey images of 16 bits as `predict` does. validate.py '
                    'runs on the device of the machine unless ARGS have --device. For several processes: '
                    'torchrun --nproc-per-node=2 -m pvt_timm run SCRIPT')
    run.add_argument('script', metavar='SCRIPT', help='the script')
    return parser


def folder(text: str) -> Path:
    """Return the path of a folder. Empty text is refused: `Path` would take it for the current folder."""
    return Path(filled(text))


def score(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.
    if not 0 <= number <= 1:  # true for nan too
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got '{text}'")
    return number


def image_size(text: str) -> Tuple[int, int]:
    """Parse 'N' or 'HxW' into height and width."""
    height, _, width = text.partition('x')
    try:
        return whole_number(height), whole_number(width or height)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f"expected one or two whole numbers from 1, got '{text}'") from e


def join_img_size(argv: Sequence[str]) -> List[str]:
    """Join `--img-size H W` into `--img-size HxW`, so that the option can be given before the images."""
    joined: List[str] = []
    for arg in argv:
        if joined[-2:-1] == ['--img-size'] and joined[-1].isdecimal() and arg.isdecimal():
            joined[-1] += f'x{arg}'
        else:
            joined.append(arg)
    return joined


def run_script(argv: Sequence[str]) -> None:
    """Run a script as `__main__`, with `sys.argv` and `sys.path[0]` as Python would set them."""
    sys.argv[:] = argv
    if not getattr(sys.flags, 'safe_path', False):
        sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(str(Path(argv[0]).absolute()), run_name='__main__')
