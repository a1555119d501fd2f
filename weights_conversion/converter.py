""" Convert a checkpoint: choose its parts, resize its position embeddings, cast it, write it. """
import contextlib
import shutil
from pathlib import Path
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from timm.models import get_pretrained_cfg

from pvt_timm.cli.errors import clean
from pvt_timm.detection.openmmlab import describe_heads, heads_of
from pvt_timm.files import PathLike
from pvt_timm.formats import FORMATS
from pvt_timm.formats.architecture import Architecture, describe
from pvt_timm.formats.mapping import from_timm
from pvt_timm.pvt import resize_pos_embeds
from pvt_timm.weights import PARTS, Size, Weights, check_size, read_weights

from . import verification
from .card import write_card
from .output import KEPT_SOURCE, check_output, files_in, new_files
from .report import Report

__all__ = ['DTYPES', 'TARGETS', 'convert', 'inspect']

DTYPES = ('float32', 'float16', 'bfloat16')
TARGETS = tuple(name for name, fmt in FORMATS.items() if fmt.is_target)


def inspect(source: PathLike, **options: Any) -> Report:
    """Return a report on a checkpoint and on how its names would be mapped. Nothing is written.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        options: Those of `pvt_timm.weights.read_weights`.
    """
    with _read(source, **options) as weights:
        return Report(weights)


def convert(
        source: PathLike,
        output: PathLike,
        *,
        to: str = 'timm',
        drop: Sequence[str] = (),
        num_classes: Optional[int] = None,
        img_size: Size = None,
        dtype: Optional[str] = None,
        verify: Optional[bool] = False,
        force: bool = False,
        keep_source: bool = False,
        about: Optional[str] = None,
        **options: Any,
) -> Report:
    """Convert a PVT v1 checkpoint.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        output: Folder to write. Its files appear once all of them are complete.
        to: 'timm', 'original' (whai362/PVT), 'transformers' or 'mmdet'.
        drop: Parts to leave out: 'class_token', 'norm', 'head'.
        num_classes: Only 0 (leave out the head) or the number that the head has.
        img_size: Image size to resize the position embeddings to.
        dtype: 'float32', 'float16' or 'bfloat16', None to keep the types.
        verify: Whether to compare the outputs with those of the code that the source came from, and read the written
            file back. If None, this is done only if that code is installed.
        force: Whether files of the same names are replaced in a folder that is not empty. Its other files stay.
        keep_source: Whether the source file is copied into the folder `source` of the output.
        about: Text of the model card before the report. By default it says how the weights are loaded.
        options: Options for reading the checkpoint: `model`, `use_ema`, `prefix`, `source_size`, `labels`, `sha256` and
            `max_bytes` of `pvt_timm.weights.read_weights`.

    Raises:
        ValueError: The source is not a PVT v1 checkpoint, is damaged or refused, or does not fit the arguments. If it
            is a `VerificationError`, the outputs differ, and the message says by how much.
        OSError: A file cannot be read or written.
        Exception: Errors of the hub's client, if a download fails.
    """
    drop = [drop] if isinstance(drop, str) else drop
    for value, known in ((to, TARGETS), (dtype, (None, *DTYPES)), *((part, PARTS) for part in drop)):
        if value not in known:  # otherwise torch would cast to int8, and a misspelt part would be ignored
            raise ValueError(f'Expected one of {known}, got {value!r}.')
    new_size = check_size(img_size)
    path = check_output(output, force)

    with _read(source, **options) as weights:
        if num_classes not in (None, 0, weights.info.num_classes):
            raise ValueError(
                f'Expected num_classes 0 or {weights.info.num_classes}, which the head has, got {num_classes}. '
                f'A new head is made by timm.create_model(..., num_classes={num_classes}).')
        if num_classes == 0:
            drop = [*drop, 'head']
        target = _target(weights, to, [part for part in PARTS if part in drop], new_size, dtype)
        tensors, written = (target.for_model(), None) if to == 'timm' else from_timm(target.state_dict, to)
        report = Report(weights, target, to, written)

        read = [*weights.source.files, *([Path(options['labels'])] if options.get('labels') else [])]
        with new_files(path, force, read) as folder:
            try:
                FORMATS[to].write(folder, target, tensors)
            except (RuntimeError, OSError) as e:  # torch raises RuntimeError if the disk is full
                raise OSError(f'Cannot write to {path.parent}: {clean(e, 200)}') from e
            if keep_source:
                (folder / KEPT_SOURCE).mkdir()  # a separate folder, so that readers do not take it for the weights
                shutil.copyfile(weights.source.file, folder / KEPT_SOURCE / weights.source.file.name)
            if verify is not False:
                try:
                    report.verification = verification.verify(weights, target, tensors, folder, to)
                except verification.NoReferenceError:
                    if verify:
                        raise
            write_card(folder, target, report, about)
            report.files = files_in(folder)
        report.output = str(path)
        return report


@contextlib.contextmanager
def _read(source: PathLike, **options: Any) -> Iterator[Weights]:
    """Do what `read_weights` does, and add a note if the weights are the backbone of a detector or segmenter."""
    with read_weights(source, **options) as weights:
        heads = describe_heads(heads_of(weights.converted)) if weights.converted.beside else None
        if heads:
            note = f'besides the backbone, the file holds the rest of a {heads[0]} for {heads[1]} classes'
            weights = replace(weights, notes=[note, *weights.notes])
        yield weights


def _target(
        weights: Weights, to: str, drop: List[str], size: Optional[Tuple[int, int]], dtype: Optional[str],
) -> Weights:
    """Return the weights to write, with notes on what was changed in them."""
    fmt, info = FORMATS[to], weights.info
    for part in ('class_token', 'norm'):
        if part in drop and info.num_classes and 'head' not in drop:
            raise ValueError(
                f'The head was trained on the output of the {part}: leave out both, with --drop {part} head.')
    notes = [*weights.notes, *fmt.check_parts(weights, drop)]
    if size is None:
        size = fmt.required_size(weights)
        if size:
            notes.append(f'the images that the model was trained with have another size than its position embeddings, '
                         f'which {to} does not allow')
    state_dict, changes = fmt.take_parts(weights, drop)
    notes += changes
    info = describe(state_dict, info.img_size)
    preprocessing = dict(weights.preprocessing)
    if size:
        grid = size[0] // info.patch_size, size[1] // info.patch_size
        state_dict = resize_pos_embeds(state_dict, info.grid_size, grid, info.class_row)
        notes.append('position embeddings resized (bilinear) from the grid of {}x{} to that of {}x{} images'
                     .format(*info.img_size, *size))
        info = replace(info, grid_size=grid)
        preprocessing['input_size'] = (info.in_chans, *size)
    fmt.check_size(info.img_size)
    if dtype and dtype != weights.dtype_name():
        state_dict = {key: _cast(key, value, getattr(torch, dtype)) for key, value in state_dict.items()}
        notes.append(f'cast from {weights.dtype_name()} to {dtype}')
        info = replace(info, dtype=getattr(torch, dtype))
    return replace(
        weights,
        state_dict=state_dict,
        info=info,
        args=_args_of(weights, info),
        preprocessing=preprocessing,
        label_names=weights.label_names if info.num_classes else [],
        problem_type=weights.problem_type if info.num_classes else None,
        origin=_origin(weights),
        notes=notes,
    )


def _args_of(weights: Weights, info: Architecture) -> Dict[str, Any]:
    """Return the arguments of the model. If class token or norm was left out, those that depend on them are removed."""
    args = dict(weights.args)
    if (info.class_token, info.norm) != (weights.info.class_token, weights.info.norm):
        args.pop('output_fmt', None)
        if args.get('global_pool') != '':
            args.pop('global_pool', None)
    return args


def _origin(weights: Weights) -> Dict[str, str]:
    """Return license and origin: as the checkpoint says or, for a public file, as they were published."""
    if weights.source.known is None:
        return weights.origin
    cfg: Any = get_pretrained_cfg(weights.source.known)
    return {'license': cfg.license, 'origin_url': cfg.origin_url, **weights.origin}


def _cast(key: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = x.to(dtype)
    if x.isfinite().all() and not out.isfinite().all():
        raise ValueError(f'{key} has values beyond the range of {str(dtype).removeprefix("torch.")}: use bfloat16.')
    return out
