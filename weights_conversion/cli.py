""" The command line: `python -m weights_conversion`, also `pvt-convert`. """
import argparse
import functools
import json
import signal
import sys
from typing import Any, Dict, List, Optional

from huggingface_hub.utils import disable_progress_bars, logging

from pvt_timm.cli.errors import Parser, clean, run_command
from pvt_timm.cli.network import check_source, check_upload
from pvt_timm.files import MAX_BYTES
from pvt_timm.weights import PARTS

from .converter import DTYPES, TARGETS, convert, inspect
from .detectors import convert_whole
from .output import check_output
from .upload import check_repo, publish, push

__all__ = ['main']

COMMANDS = ('convert', 'inspect', 'publish')
_OPTIONS_OF_WHOLE = ('source', 'output', 'to', 'prefix', 'force', 'max_bytes')  # that --whole supports


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 after one line on stderr that says what was wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    before = []  # options that are also accepted before the command
    while argv and argv[0] in ('--json', '--quiet', '-q', '--debug'):
        before.append(argv.pop(0))
    argv = [*argv[:1], *before, *argv[1:]]
    if not argv or argv[0] not in (*COMMANDS, '-h', '--help'):
        argv = ['convert', *argv]
    args = vars(_parser().parse_args(argv))
    run = args.pop('run')
    logging.set_verbosity_error()  # the hub's client would print a line for each attempt
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    as_json, quiet, debug = args.pop('json'), args.pop('quiet'), args.pop('debug')
    if quiet:
        disable_progress_bars()
    return run_command('pvt-convert', lambda: run(args, as_json, quiet), debug)


def _parser() -> Parser:
    parser = Parser(
        prog='pvt-convert',
        description='Convert any PVT v1 checkpoint to timm, or to the formats of the original code, transformers and '
                    'mmdetection.',
        epilog='`pvt-convert SOURCE ...` is the same as `pvt-convert convert SOURCE ...`.')
    commands = parser.add_subparsers(metavar='COMMAND', title='commands', required=True)
    printing = _printing_options()
    reading = _reading_options()
    uploading = _uploading_options()

    command = commands.add_parser(
        'convert', help='convert a checkpoint (the default)', parents=[reading, uploading, printing],
        description='Convert any PVT v1 checkpoint to timm, or to the formats of the original code, transformers and '
                    'mmdetection.')
    _add_convert_options(command)
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        'inspect', help='show what a checkpoint is, write nothing', parents=[reading, printing],
        description='Show what a PVT v1 checkpoint is. Nothing is written.')
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        'publish', help='convert and upload all public checkpoints', parents=[uploading, printing],
        description='Convert the public PVT v1 checkpoints to timm and upload them to the Hugging Face Hub.')
    _add_publish_options(command)
    command.set_defaults(run=_publish)
    return parser


def _printing_options() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument('--debug', action='store_true', help='print the traceback of an error before its one line')
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
    parser.add_argument('--quiet', '-q', action='store_true', help='no progress bar and no report')
    return parser


def _reading_options() -> Parser:
    parser = Parser(add_help=False)
    add = parser.add_argument
    add('source', metavar='SOURCE', help='file, folder, http(s) url, or hf-hub:owner/repo[@revision][:file]')
    add('--model', metavar='NAME', help='fail unless the checkpoint is of this model, e.g. pvt_small')
    add('--no-ema', dest='use_ema', action='store_false',
        help='use the plain weights if the file holds averaged ones too (default the averaged ones)')
    add('--prefix', help='part before the names of the weights, if the file holds several backbones')
    add('--source-size', metavar='N', type=int, nargs='+',
        help='image size (or height and width) that the position embeddings are for, if it is not known otherwise')
    add('--labels', metavar='FILE', help='names of the classes, one a line or JSON')
    add('--sha256', metavar='HEX', help='refuse a file with another hash (8 to 64 digits)')
    add('--max-bytes', metavar='N', type=int, default=MAX_BYTES,
        help=f'refuse larger files (default: {MAX_BYTES / 1e9:.1f} GB)')
    return parser


def _uploading_options() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument('--private', action='store_true', help='make an uploaded repository private')
    parser.add_argument('--dry-run', action='store_true', help='write the output, but only show what would be uploaded')
    return parser


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--output', '-o', metavar='DIR', required=True, help='folder to write')
    add('--to', choices=TARGETS, default='timm', help='target format (default: timm)')
    add('--whole', action='store_true',
        help='with --to mmdet or original: convert the whole detector or segmenter, not only its backbone')
    add('--drop', metavar='PART', nargs='+', choices=PARTS, default=[], help=f'parts to leave out: {", ".join(PARTS)}')
    add('--num-classes', metavar='N', type=int, help='0 leaves out the head')
    add('--img-size', metavar='N', type=int, nargs='+',
        help='resize the position embeddings to this image size (or height and width)')
    add('--dtype', choices=DTYPES, help='cast the weights')
    add('--verify', action='store_true',
        help="compare outputs with the source's own implementation, fail if they differ")
    add('--force', action='store_true', help='replace files of the same names in the folder. Other files stay')
    add('--push', metavar='OWNER/REPO', help='upload the output to the Hugging Face Hub')


def _add_publish_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--to', metavar='OWNER', required=True, help='user or organisation on the hub')
    add('--only', metavar='NAME', nargs='+', default=[], help='publish only these checkpoints, e.g. pvt_small.in1k')
    add('--output', '-o', metavar='DIR', default='published',
        help='folder to write a folder for each checkpoint into (%(default)s)')
    add('--measured', metavar='FILE', help='results of benchmarks/training/imagenet.py, to put into the model cards')


def _inspect(args: Dict[str, Any], as_json: bool, quiet: bool) -> None:
    check_source(args['source'], 'SOURCE')
    report = inspect(**args)
    if as_json:
        print(json.dumps(vars(report), indent=2))
    elif not quiet:
        print(report.to_text())


def _convert(args: Dict[str, Any], as_json: bool, quiet: bool) -> None:
    repo, private, dry_run = (args.pop(key) for key in ('push', 'private', 'dry_run'))
    if repo is not None:
        check_repo(repo)
        if not dry_run:
            check_upload(repo)
    elif private or dry_run:
        raise ValueError('Expected --push OWNER/REPO with --private or --dry-run.')
    whole = args.pop('whole')
    if whole:
        _refuse_options_of_classifiers(args)
    check_output(args['output'], args['force'])
    check_source(args['source'], 'SOURCE')
    if whole:
        _convert_whole(args, as_json, quiet)
        return
    report = convert(**args)
    pushed = push(args['output'], repo, files=list(report.files), private=private, dry_run=dry_run) if repo else None
    if as_json:
        print(json.dumps({**vars(report), 'push': pushed}, indent=2))
    elif not quiet:
        print(report.to_text())
        if pushed:
            done = 'would upload' if dry_run else 'uploaded'
            print(f'\n{done} {", ".join(pushed["files"])} to {pushed["url"] or repo}')


def _refuse_options_of_classifiers(args: Dict[str, Any]) -> None:
    usual = vars(_parser().parse_args(['convert', args['source'], '--output', args['output']]))
    others = [name for name, value in args.items() if name not in _OPTIONS_OF_WHOLE and value != usual[name]]
    if others:
        raise ValueError(f'Expected no --{others[0].replace("_", "-")} with --whole, which does not support it.')


def _convert_whole(args: Dict[str, Any], as_json: bool, quiet: bool) -> None:
    report = convert_whole(**{name: args[name] for name in _OPTIONS_OF_WHOLE})
    if as_json:
        print(json.dumps(report, indent=2))
    elif not quiet:
        names = ', '.join(report['categories'][:8]) + (', ...' if len(report['categories']) > 8 else '')
        print(clean(f'{report["kind"]} on {report["model"]}, {report["num_classes"]} classes' + (
            f' ({names})' if names else ''), 1000))
        print(f'written to {clean(report["output"], 4096)}: ' + ', '.join(
            f'{name}, {size:,} bytes' for name, size in report['files'].items()))


def _publish(args: Dict[str, Any], as_json: bool, quiet: bool) -> None:
    say = (lambda line: None) if quiet or as_json else functools.partial(print, flush=True)
    results = publish(args.pop('to'), say=say, **args)
    if as_json:
        print(json.dumps(results, indent=2))
