""" The conversion itself: choose, resize, cast, write. """
import shutil
from dataclasses import replace
from typing import Any, List, Optional, Sequence, Tuple

import torch
from timm.models import get_pretrained_cfg

from pvt_timm.checkpoints import StateDict, describe, drop_parts, from_timm
from pvt_timm.cli.errors import clean
from pvt_timm.files import PathLike
from pvt_timm.pvt import resize_pos_embeds

from . import verification
from .output import KEPT_SOURCE, check_output, files_in, new_files
from .reading import PARTS, POS_EMBED, Size, Weights, check_size, read_weights
from .report import Report, trace
from .targets import WRITERS, write_card

__all__ = ['DTYPES', 'convert', 'inspect']

DTYPES = ('float32', 'float16', 'bfloat16')


def inspect(source: PathLike, **options: Any) -> Report:
    """Say what a checkpoint is and how it would be mapped. Nothing is written.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        options: Those of `reading.read_weights`.
    """
    with read_weights(source, **options) as weights:
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
        verify: Compare outputs with the source's own implementation, and the written file with what was meant. None to
            do so where that implementation is installed.
        force: Replace files of the same names in a folder that is not empty. Nothing else in it is touched.
        keep_source: Also copy the source file into the folder `source` of the output.
        about: Text of the model card before the table of provenance, None for what loads it.
        options: How to read the checkpoint, those of `reading.read_weights`.

    Raises:
        ValueError: The source is no PVT v1 checkpoint, is damaged or refused, or does not fit what was asked for. A
            `VerificationError` says how far the outputs differ.
        OSError: Something cannot be read or written.
        Exception: What the clients raise where something cannot be downloaded.
    """
    for value, known in ((to, WRITERS), (dtype, (None, *DTYPES)), *((part, PARTS) for part in drop)):
        if value not in known:  # an int8 would be cast to, an unknown part left alone
            raise ValueError(f'Expected one of {tuple(known)}, got {value!r}.')
    new_size = check_size(img_size)
    path = check_output(output, force)

    with read_weights(source, **options) as weights:
        report = Report(weights, to)
        if num_classes not in (None, 0, weights.info.num_classes):
            raise ValueError(
                f'Expected num_classes 0 or {weights.info.num_classes}, which the head has, got {num_classes}. '
                f'A new head is made by timm.create_model(..., num_classes={num_classes}).')
        if num_classes == 0:
            drop = [*drop, 'head']
        target = _choose(weights, to, [part for part in PARTS if part in drop], new_size, dtype, report)
        tensors, written = (target.for_model(), None) if to == 'timm' else from_timm(target.state_dict, to)
        report.mapped = trace(weights.converted.mapped, written)
        report.dropped.update({name: 'asked for with --drop' for timm, sources in weights.converted.mapped
                               if not target.state_dict.keys() & set(timm) for name in sources})
        report.dtype = target.dtype_name()
        report.preprocessing['input_size'] = target.cfg['input_size']

        with new_files(path, force, weights.source.files) as folder:
            try:
                WRITERS[to](folder, target, tensors)
            except (RuntimeError, OSError) as e:  # torch reports a full disk by the first one
                raise OSError(f'Cannot write to {path.parent}: {clean(e, 200)}') from e
            if keep_source:
                (folder / KEPT_SOURCE).mkdir()  # where it is not taken for the weights
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


def _choose(
        weights: Weights, to: str, drop: List[str], size: Optional[Tuple[int, int]], dtype: Optional[str],
        report: Report,
) -> Weights:
    """What is to be written."""
    cfg = dict(weights.cfg)
    if report.known:  # else it is not ours to say
        default: Any = get_pretrained_cfg(report.known)
        cfg = {'license': default.license, 'origin_url': default.origin_url, **cfg}
    trained_size = cfg['input_size'][1:]
    if to == 'transformers' and size is None and [n // 4 for n in trained_size] != list(weights.info.grid_size):
        size = trained_size
        report.notes.append('the images that the model was trained with have another size than its position '
                            'embeddings, which transformers does not allow')
    state_dict = _take_parts(weights, to, drop, report)
    info = describe(state_dict, weights.info.img_size)
    if size:
        grid = size[0] // 4, size[1] // 4
        state_dict = resize_pos_embeds(state_dict, info.grid_size, grid, info.class_row)
        report.notes.append('position embeddings resized (bilinear) from the grid of {}x{} to that of {}x{} images'
                            .format(*info.img_size, *size))
        info, cfg['input_size'] = replace(info, grid_size=grid), (info.in_chans, *size)
    if to == 'transformers' and info.grid_size[0] != info.grid_size[1]:
        raise ValueError(f'The transformers format holds square images only, got {info.img_size}: say --img-size N.')
    if dtype and dtype != report.dtype:
        state_dict = {k: _cast(k, v, getattr(torch, dtype)) for k, v in state_dict.items()}
        report.notes.append(f'cast from {report.dtype} to {dtype}')
        info = replace(info, dtype=getattr(torch, dtype))
    if not info.num_classes:
        cfg.pop('label_names', None)
    return replace(weights, state_dict=state_dict, info=info, cfg=cfg)


def _take_parts(weights: Weights, to: str, drop: List[str], report: Report) -> StateDict:
    """The parts that the target holds."""
    info, have = weights.info, weights.parts
    if to == 'mmdet' and weights.has_bare_row:
        have = ['class_token', *have]  # its row is still there
    left = [part for part in have if part not in drop]
    cure = f'leave them out with --drop {" ".join(have)}.'
    if to == 'mmdet' and left:
        raise ValueError(f'The mmdet format has no place for {", ".join(left)}: {cure}')
    if to == 'transformers' and not {'class_token', 'norm'} <= set(left):
        raise ValueError('The transformers format needs a class token and a final norm, nothing is made up.')
    pool = weights.model_args.get('global_pool')
    if pool and 'head' in left and to == 'transformers':
        raise ValueError(f'The head takes global_pool={pool!r}, transformers always the class token: --drop head.')
    if pool and 'head' in left and to == 'original':
        report.notes.append(f'the head was trained with global_pool={pool!r}, the original code takes the class token')
    if to == 'original' and (
            ('class_token' in left) != ('norm' in left) or 'head' in left and 'class_token' not in left):
        raise ValueError(
            f'The original format holds class token and norm together or neither, and a head only with them, this '
            f'would be {", ".join(left)}: {cure}')
    if 'norm' in drop and 'head' in left:
        raise ValueError('The head takes what the norm gives: leave out both with --drop norm head.')

    state_dict = drop_parts(weights.state_dict, [part for part in drop if part != 'class_token'])
    pos_embed = state_dict[POS_EMBED]
    if to == 'original' and not info.class_row:
        state_dict[POS_EMBED] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], 1)
        report.notes.append(
            'pos_embed4 has a row of zeros at the place of the class token: the original format wants the row, this '
            'checkpoint has none, and the dense models of the original cut it away unread')
    elif to == 'original' and 'class_token' in drop:
        state_dict.pop('stages.3.cls_token', None)  # its position row stays, as in the original's dense checkpoints
    elif 'class_token' in drop:
        state_dict = drop_parts(state_dict, ['class_token'], info.class_row)
    return state_dict


def _cast(key: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = x.to(dtype)
    if x.isfinite().all() and not out.isfinite().all():
        raise ValueError(f'{key} has values beyond the range of {str(dtype).removeprefix("torch.")}: use bfloat16.')
    return out
