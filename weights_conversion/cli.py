""" The command line: `python -m weights_conversion`, also `pvt-convert`. """
import argparse
import contextlib
import json
import signal
import sys
from dataclasses import asdict
from typing import List, Optional

__all__ = ['main']

_SOURCE_HELP = 'file, folder, http(s) url, or hf-hub:owner/repo[@revision][:file]'
_EPILOG = '''\
`pvt-convert inspect SOURCE` shows what a checkpoint is and writes nothing.
'''


def _size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise argparse.ArgumentTypeError(f'expected a number of pixels, got {text!r}')
    return int(text)


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from pvt_timm.version import __version__
        print(f'pvt-timm {__version__}')
        parser.exit()


def _parser(inspect: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='pvt-convert inspect' if inspect else 'pvt-convert',
        description='Show what a PVT v1 checkpoint is.' if inspect else
        'Convert any PVT v1 checkpoint to timm, or to the formats of the original code, transformers and mmdetection.',
        epilog='' if inspect else _EPILOG)
    parser.add_argument('source', metavar='SOURCE', help=_SOURCE_HELP)
    if not inspect:
        parser.add_argument('--output', '-o', metavar='DIR', required=True, help='folder to write')
        parser.add_argument('--to', choices=['timm', 'original', 'transformers', 'mmdet'], default='timm',
                            help='target format (default: timm)')
    parser.add_argument('--model', metavar='NAME', help='fail unless the checkpoint is of this model, e.g. pvt_small')
    parser.add_argument('--use-ema', action='store_true', help='take averaged weights where the file holds both')
    parser.add_argument('--source-size', metavar='N', type=_size, nargs='+',
                        help='image size (or height and width) of the position embeddings, if they do not tell')
    parser.add_argument('--sha256', metavar='HEX', help='refuse a file with another hash (8 to 64 digits)')
    parser.add_argument('--max-bytes', metavar='N', type=int, help='refuse larger files (default: 7.9 GB)')
    if not inspect:
        parser.add_argument('--drop', metavar='PART', nargs='+', default=[],
                            help='leave out parts: class_token, norm, head')
        parser.add_argument('--num-classes', metavar='N', type=int, help='0 leaves out the head')
        parser.add_argument('--img-size', metavar='N', type=_size, nargs='+',
                            help='resize the position embeddings to this image size (or height and width)')
        parser.add_argument('--dtype', choices=['float32', 'float16', 'bfloat16'], help='cast the weights')
        parser.add_argument('--verify', action='store_true',
                            help="compare outputs with the source's own implementation, fail if they differ")
        parser.add_argument('--force', action='store_true', help='replace an earlier output')
        parser.add_argument('--push', metavar='OWNER/REPO', help='upload the output to the Hugging Face Hub')
        parser.add_argument('--private', action='store_true', help='make the uploaded repository private')
        parser.add_argument('--dry-run', action='store_true', help='with --push: only show what would be uploaded')
    parser.add_argument('--json', action='store_true', help='print the report as JSON')
    parser.add_argument('--quiet', '-q', action='store_true', help='no progress bar and no report')
    parser.add_argument('--version', action=_Version, nargs=0, help="show the version and exit")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line. Returns the exit code: 0, or 2 after one line on stderr that says what was wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    inspecting = argv[:1] == ['inspect']
    args = _parser(inspecting).parse_args(argv[1:] if inspecting else argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors='backslashreplace')
    with _terminable():
        try:
            return _run(args, inspecting)
        except KeyboardInterrupt:
            return _fail('interrupted', 130)
        except MemoryError:
            return _fail('out of memory')
        except (ValueError, OSError) as e:
            report = getattr(e, 'report', None)
            if report is not None and not args.quiet:
                print(report.to_json() if args.json else report.to_text())
            return _fail(str(e) or type(e).__name__)


def _fail(message: str, code: int = 2) -> int:
    from .report import clean
    print(f'pvt-convert: error: {clean(message, 1000)}', file=sys.stderr)
    return code


@contextlib.contextmanager
def _terminable():
    """Let SIGTERM clean up as Ctrl-C does."""
    def stop(*_):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace, inspecting: bool) -> int:
    from pvt_timm.files import MAX_BYTES

    from .converter import convert, inspect
    from .hub import check_repo, push
    from .sources import Progress

    def pair(size):
        return size[0] if size and len(size) == 1 else tuple(size) if size else None

    common = dict(
        model=args.model,
        use_ema=args.use_ema,
        source_size=pair(args.source_size),
        sha256=args.sha256,
        max_bytes=MAX_BYTES if args.max_bytes is None else args.max_bytes,
        progress=Progress(args.quiet),
    )
    if inspecting:
        report = inspect(args.source, **common)
        print(report.to_json() if args.json else report.to_text())
        return 0
    if args.push:
        check_repo(args.push)
    elif args.private or args.dry_run:
        raise ValueError('Expected --push OWNER/REPO with --private or --dry-run.')
    report = convert(
        args.source,
        args.output,
        to=args.to,
        drop=[part for parts in args.drop for part in parts.split(',')],
        num_classes=args.num_classes,
        img_size=pair(args.img_size),
        dtype=args.dtype,
        verify=args.verify,
        force=args.force,
        **common,
    )
    pushed = push(args.output, args.push, private=args.private, dry_run=args.dry_run) if args.push else None
    if args.json:
        print(json.dumps({**asdict(report), 'push': pushed}, indent=2))
    elif not args.quiet:
        print(report.to_text())
        if pushed:
            done = 'would upload' if args.dry_run else 'uploaded'
            print(f'\n{done} {", ".join(pushed["files"])} to {pushed["url"] or args.push}')
    return 0
