""" Command line: `python -m pvt_timm` or `pvt-timm`. """
import logging
import runpy
import sys
from pathlib import Path
from typing import List, Optional, Sequence

from ..version import __version__
from .detect import add_detect, add_segment
from .errors import Parser, run_command
from .predict import add_demo, add_features, add_list, add_predict
from .train import add_run, add_train

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line `argv`, by default that of the process. Returns the exit code, see `run_command`."""
    parser = Parser(prog='pvt-timm', description='Pyramid Vision Transformer (v1) for timm.')
    parser.add_argument('--version', action='version', version=f'pvt-timm {__version__}')
    parser.set_defaults(func=lambda args: parser.print_help())
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', title='commands')
    for add in (add_demo, add_list, add_predict, add_features, add_detect, add_segment, add_train, add_run):
        add(subparsers)
    argv = list(sys.argv[1:] if argv is None else argv)
    own = 2 if argv[:1] in (['train'], ['run']) else len(argv)  # the rest belongs to the script
    args = parser.parse_args(join_img_size(argv[:own]))
    args.script_args = argv[own:]
    script: List[str] = []  # a command that starts one returns its command line
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # its retries and hints, the error itself follows
    code = run_command('pvt-timm', lambda: script.extend(args.func(args) or ()))
    if script:
        run_script(script)  # whose errors are its own
    return code


def join_img_size(argv: Sequence[str]) -> List[str]:
    """`--img-size H W` as one argument, so that it may stand before the images."""
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
