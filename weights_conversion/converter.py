""" The conversion itself: read, describe, drop, resize, cast, write. """
import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg

import pvt_timm  # registers the models
from pvt_timm.checkpoints import (
    Converted,
    Description,
    describe,
    drop_parts,
    from_timm,
    map_to_timm,
)
from pvt_timm.pvt import VARIANTS, find_variant, resize_pos_embeds
from pvt_timm.files import MAX_BYTES, read_checkpoint

from . import targets
from .output import check_output, new_folder
from .report import Report, clean, trace
from .sources import CLASS_ROW_FILE, Progress, Source, check_sha256, hash_in_name, known_file, open_source, sha256_of

__all__ = ['DTYPES', 'PARTS', 'TARGETS', 'VerificationError', 'convert', 'inspect']

StateDict = Dict[str, torch.Tensor]

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
TARGETS = ('timm', 'original', 'transformers', 'mmdet')
PARTS = ('class_token', 'norm', 'head')
MIN_SIZE, MAX_SIZE = 32, 2048

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_POS_EMBED = 'stages.3.pos_embed'
_CLS_TOKEN = 'stages.3.cls_token'
_ROW = targets.CLASS_ROW


class VerificationError(ValueError):
    """The outputs differ by more than the tolerance. `report` says where."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


@dataclass
class Loaded:
    """A checkpoint under timm's names, and what is known about it.

    Attributes:
        state_dict: Tensors. The last position embedding has its class token row where the source has one.
        info: Architecture.
        source: Where it comes from.
        converted: How it was mapped.
        report: Filled as far as reading goes.
        model_args: What `timm.create_model` needs besides the name.
        cfg: Preprocessing and labels for timm's `pretrained_cfg`.
    """
    state_dict: StateDict
    info: Description
    source: Source
    converted: Converted
    report: Report
    model_args: Dict[str, Any] = field(default_factory=dict)
    cfg: Dict[str, Any] = field(default_factory=dict)


def inspect(
        source: Union[str, 'os.PathLike[str]'],
        *,
        model: Optional[str] = None,
        use_ema: bool = False,
        source_size: Union[int, Tuple[int, int], None] = None,
        sha256: Optional[str] = None,
        max_bytes: int = MAX_BYTES,
        progress: Optional[Progress] = None,
) -> Report:
    """Say what a checkpoint is and how it would be mapped. Nothing is written. Arguments as in `convert`."""
    with _load(source, model, use_ema, source_size, sha256, max_bytes, progress) as loaded:
        loaded.report.mapped = trace(loaded.converted.mapped)
        return loaded.report


def convert(
        source: Union[str, 'os.PathLike[str]'],
        output: Union[str, 'os.PathLike[str]'],
        *,
        to: str = 'timm',
        model: Optional[str] = None,
        use_ema: bool = False,
        drop: Sequence[str] = (),
        num_classes: Optional[int] = None,
        img_size: Union[int, Tuple[int, int], None] = None,
        source_size: Union[int, Tuple[int, int], None] = None,
        dtype: Optional[str] = None,
        sha256: Optional[str] = None,
        verify: bool = False,
        force: bool = False,
        max_bytes: int = MAX_BYTES,
        progress: Optional[Progress] = None,
) -> Report:
    """Convert a PVT v1 checkpoint.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        output: Folder to write. It appears once it is complete.
        to: 'timm', 'original' (whai362/PVT), 'transformers' or 'mmdet'.
        model: Name of the timm model that the checkpoint has to be of, None to find out.
        use_ema: Take averaged weights where the file holds both.
        drop: Parts to leave out: 'class_token', 'norm', 'head'.
        num_classes: Only 0 (leave out the head) or the number that the head has.
        img_size: Image size to resize the position embeddings to.
        source_size: Image size of the position embeddings, needed where only non-square ones fit.
        dtype: 'float32', 'float16' or 'bfloat16', None to keep the types.
        sha256: Hash (or its first 8 or more digits) that the file must have.
        verify: Compare outputs with the source's own implementation, and the written file with what was meant.
        force: Replace an earlier output.
        max_bytes: Refuse a source that is larger or claims more.
        progress: Shows how far downloads and hashes are.

    Returns:
        What was done.

    Raises:
        ValueError: The source is no PVT v1 checkpoint, is damaged or refused, or does not fit what was asked for.
        OSError: Something cannot be read, downloaded or written.
    """
    if to not in TARGETS:
        raise ValueError(f'Expected a target in {TARGETS}, got {to!r}.')
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'Expected a dtype in {tuple(DTYPES)}, got {dtype!r}.')
    unknown = [part for part in drop if part not in PARTS]
    if unknown:
        raise ValueError(f'Expected parts to drop in {PARTS}, got {unknown[0]!r}.')
    new_size = _check_size(img_size)
    output = check_output(output, force)

    with _load(source, model, use_ema, source_size, sha256, max_bytes, progress) as loaded:
        report = loaded.report
        drop = list(dict.fromkeys(drop))
        if num_classes == 0 and report.head and 'head' not in drop:
            drop.append('head')
        elif num_classes is not None and num_classes not in (0, report.num_classes):
            raise ValueError(
                f'Expected num_classes 0 or {report.num_classes}, which the head has, got {num_classes}. '
                f'A new head is made by timm.create_model(..., num_classes={num_classes}).')
        state_dict, class_row = _select(loaded, to, drop)
        size = _grid(new_size) if new_size else None
        if size:
            state_dict = resize_pos_embeds(state_dict, loaded.info.grid_size, size, _has_row(loaded.info, state_dict))
        if dtype:
            state_dict = {k: _cast(k, v, DTYPES[dtype]) for k, v in state_dict.items()}
            class_row = None if class_row is None else _cast(_ROW, class_row, DTYPES[dtype])

        left = describe(state_dict, tuple(4 * n for n in size or loaded.info.grid_size))
        plan = targets.Plan(
            state_dict=state_dict,
            class_row=class_row,
            info=left,
            model_args=_model_args(left, loaded.model_args),
            cfg=loaded.cfg if left.num_classes else {k: v for k, v in loaded.cfg.items() if k != 'label_names'},
            report=report,
        )
        written = None
        if to != 'timm':
            plan.state_dict, written = from_timm(state_dict, to)
        report.mapped = trace(loaded.converted.mapped, written)
        gone = [k for k in loaded.state_dict if k not in state_dict]
        sources = {t: s for ts, ss in loaded.converted.mapped for t in ts for s in ss}
        report.dropped.update({sources.get(k, k): 'asked for with --drop' for k in gone})
        report.to = to
        report.dtype = _dtype_name(state_dict)
        if plan.cfg.get('label_names') and to in ('original', 'mmdet'):
            report.warnings.append(f'the {to} format has no place for the label names')

        with new_folder(output, force) as folder:
            try:
                targets.WRITERS[to](folder, plan)
            except (RuntimeError, SafetensorError) as e:  # how torch and safetensors report a full disk
                raise OSError(f'Cannot write to {output.parent}: {clean(e, 200)}') from e
            if verify:
                from . import verification
                report.verification = verification.verify(loaded, plan, folder, to)
                if not report.verification['passed']:
                    raise VerificationError('Verification failed, nothing was written.', report)
            report.files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        report.output = str(output)
        return report


# ---- read -----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _load(
        spec: Union[str, 'os.PathLike[str]'],
        model: Optional[str],
        use_ema: bool,
        source_size: Union[int, Tuple[int, int], None],
        sha256: Optional[str],
        max_bytes: int,
        progress: Optional[Progress],
) -> Iterator[Loaded]:
    source_size = _check_size(source_size, 'source_size')
    if model is not None and model not in VARIANTS:
        raise ValueError(f'Expected a model in {tuple(VARIANTS)}, got {model!r}.')
    with open_source(spec, max_bytes, progress) as source:
        found = sha256_of(source.file, progress)
        if sha256 is not None:
            check_sha256(found, sha256)
        report = Report(
            source=clean(source.name),
            file=clean(source.file.name),
            bytes=source.file.stat().st_size,
            sha256=found,
            known=known_file(found),
        )
        if (hash_in_name(source.file) or found[:8]) != found[:8]:
            report.warnings.append(
                f'the name of the file ends in {hash_in_name(source.file)}, its sha256 starts with {found[:8]}: it was '
                f'changed, renamed or damaged')
        checkpoint = read_checkpoint(source.file, max_bytes)
        converted = map_to_timm(checkpoint, use_ema)
        loaded = _describe(source, converted, report, source_size)
        del checkpoint
        if model is not None and report.variant != model:
            raise ValueError(f'Expected a checkpoint of {model}, this is one of {report.variant}.')
        yield loaded


def _describe(
        source: Source,
        converted: Converted,
        report: Report,
        source_size: Optional[Tuple[int, int]],
) -> Loaded:
    state_dict = converted.state_dict
    bad = [k for k, v in state_dict.items() if v.dtype not in _FLOATS or v.layout != torch.strided]
    if bad:
        raise ValueError(f'Expected floating point weights, {bad[0]} has type {state_dict[bad[0]].dtype}.')
    hint = source_size or _configured_size(source.config)
    info = describe(state_dict, hint)
    if source_size and info.grid_size != _grid(source_size):
        raise ValueError(
            f'Expected position embeddings of {source_size[0]}x{source_size[1]} images, they have a grid of '
            f'{info.grid_size[0]}x{info.grid_size[1]} patches.')
    variant = find_variant(info.depths, info.embed_dims)
    if variant is None:
        raise ValueError(
            f'Expected the depths and channels of one of {", ".join(VARIANTS)}, got '
            f'{info.depths} and {info.embed_dims}.')
    if not info.class_token and not info.class_row and source.class_row is not None:
        state_dict = dict(state_dict)
        state_dict[_POS_EMBED] = torch.cat([_read_class_row(source.class_row, state_dict), state_dict[_POS_EMBED]], 1)
        info = describe(state_dict, tuple(4 * n for n in info.grid_size))

    loaded = Loaded(state_dict, info, source, converted, report)
    loaded.model_args = _configured_args(source.config, variant, report)
    loaded.cfg = _configured_cfg(source, info, report)
    _check_against_model(state_dict, info, _model_args(info, loaded.model_args))

    report.format = converted.format
    report.wrappers = tuple(map(clean, converted.wrappers))
    report.prefix = clean(converted.prefix)
    report.dropped = {clean(k): clean(v) for k, v in converted.dropped.items()}
    ema = ('model_ema', 'state_dict_ema')
    report.weights = 'averaged' if any(w in ema for w in converted.wrappers) else 'plain'
    others = [k for k in converted.dropped if k.rpartition('.')[2] in (
        ('model', 'state_dict') if report.weights == 'averaged' else ema)]
    report.other_weights = clean(others[0]) if others else None
    report.variant = variant
    report.num_classes = info.num_classes
    report.in_chans = info.in_chans
    report.img_size = info.img_size
    report.class_token = info.class_token
    report.class_row = info.class_row
    report.norm = info.norm
    report.head = 'head.weight' in state_dict
    report.dtype = report.source_dtype = _dtype_name(state_dict)
    report.labels = len(loaded.cfg.get('label_names', ()))
    report.parameters = sum(v.numel() for v in state_dict.values())
    broken = [k for k, v in state_dict.items() if v.numel() and not _finite(v)]
    if broken:
        more = f' and {len(broken) - 3} more' if len(broken) > 3 else ''
        report.warnings.append(f'values that are not finite, kept as they are: {", ".join(broken[:3])}{more}')
    return loaded


def _finite(x: torch.Tensor) -> bool:
    low, high = torch.aminmax(x.detach())
    return math.isfinite(low) and math.isfinite(high)


def _read_class_row(file: Path, state_dict: StateDict) -> torch.Tensor:
    row = read_checkpoint(file, 2 ** 20).get(_ROW)
    like = state_dict[_POS_EMBED]
    if not isinstance(row, torch.Tensor) or row.shape != (1, 1, like.shape[2]) or row.dtype != like.dtype:
        raise ValueError(f'Expected {_ROW} of type {like.dtype} and width {like.shape[2]} in {file.name}: remove or '
                         f'replace that file.')
    return row


def _check_size(size: Union[int, Sequence[int], None], name: str = 'img_size') -> Optional[Tuple[int, int]]:
    if size is None:
        return None
    size = (size, size) if isinstance(size, int) else tuple(size)
    if len(size) != 2 or not all(isinstance(n, int) and MIN_SIZE <= n <= MAX_SIZE for n in size):
        raise ValueError(
            f'Expected {name} to be one or two numbers from {MIN_SIZE} to {MAX_SIZE}, got '
            f'{" ".join(map(str, size))}.')
    return size


def _grid(size: Tuple[int, int]) -> Tuple[int, int]:
    return size[0] // 4, size[1] // 4


def _dtype_name(state_dict: StateDict) -> str:
    names = dict.fromkeys(str(v.dtype).removeprefix('torch.') for v in state_dict.values())
    return ', '.join(names)


# ---- what the files next to a checkpoint say ------------------------------------------------------------------------

def _configured_size(config: Dict[str, Any]) -> Optional[Tuple[int, int]]:
    """Image size in the configuration of timm or transformers."""
    args = config.get('model_args')
    size = args.get('img_size') if isinstance(args, dict) else config.get('image_size')
    try:
        return _check_size(size if isinstance(size, (int, list)) else None)
    except ValueError:
        return None


def _configured_args(config: Dict[str, Any], variant: str, report: Report) -> Dict[str, Any]:
    """Arguments that no state dict tells: the pooling of timm's configuration. Others have to be the known ones."""
    out: Dict[str, Any] = {}
    args = config.get('model_args')
    heads = args.get('num_heads') if isinstance(args, dict) else config.get('num_attention_heads')
    if isinstance(heads, list) and tuple(heads) != targets.num_heads(variant):
        raise ValueError(
            f'Expected {list(targets.num_heads(variant))} attention heads, as {variant} has, config.json says '
            f'{clean(heads, 60)}.')
    if isinstance(args, dict) and args.get('global_pool') in ('token', 'avg', ''):
        out['global_pool'] = args['global_pool']
    elif 'architecture' in config and config.get('global_pool') in ('avg', ''):
        out['global_pool'] = config['global_pool']
    if config.get('model_type') == 'pvt':
        if config.get('hidden_act', 'gelu') != 'gelu':
            raise ValueError(f"Expected the activation 'gelu', got {clean(config['hidden_act'], 40)!r} in config.json.")
        if config.get('layer_norm_eps', 1e-6) != 1e-6:
            report.warnings.append(
                f'config.json has layer_norm_eps {clean(config["layer_norm_eps"], 20)}; the timm model has the '
                f'original\'s 1e-6 in blocks')
    return out


def _configured_cfg(source: Source, info: Description, report: Report) -> Dict[str, Any]:
    """Preprocessing and labels, from what lies next to the checkpoint, else from the model's default."""
    config, cfg = source.config, {}
    default = get_pretrained_cfg(find_variant(info.depths, info.embed_dims)).to_dict()
    for key in ('interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'license', 'origin_url'):
        if default.get(key) is not None:
            cfg[key] = default[key]
    given = config.get('pretrained_cfg') if isinstance(config.get('pretrained_cfg'), dict) else {}
    given = {**given, **{k: v for k, v in config.items() if k in ('label_names', 'label_descriptions')}}
    pre = source.preprocessor
    if isinstance(pre.get('image_mean'), list) and isinstance(pre.get('image_std'), list):
        given = {**given, 'mean': pre['image_mean'], 'std': pre['image_std']}

    for key in ('mean', 'std'):
        values = given.get(key)
        if isinstance(values, list) and len(values) in (1, info.in_chans) and all(map(_is_number, values)):
            cfg[key] = tuple(map(float, values))
    if len(cfg['mean']) not in (1, info.in_chans) or len(cfg['std']) not in (1, info.in_chans):
        cfg.update({k: (round(sum(cfg[k]) / len(cfg[k]), 6),) * info.in_chans for k in ('mean', 'std')})
        report.warnings.append(
            f'mean and std of {info.in_chans} channels are not known: wrote the average of the usual ones')
    if _is_number(given.get('crop_pct')) and 0 < given['crop_pct'] <= 1:
        cfg['crop_pct'] = given['crop_pct']
    if given.get('interpolation') in ('bicubic', 'bilinear', 'nearest', 'lanczos', 'random'):
        cfg['interpolation'] = given['interpolation']
    if given.get('crop_mode') in ('center', 'squash', 'border'):
        cfg['crop_mode'] = given['crop_mode']
    if not report.known:  # not ours to say
        cfg.pop('license', None)
        cfg.pop('origin_url', None)
    for key in ('license', 'origin_url'):
        if isinstance(given.get(key), str):
            cfg[key] = clean(given[key], 200)

    labels = given.get('label_names')
    if not isinstance(labels, list):
        labels = _id2label(config.get('id2label'), info.num_classes)
    if labels and info.num_classes:
        if len(labels) == info.num_classes and all(isinstance(x, str) for x in labels):
            cfg['label_names'] = labels
        else:
            report.warnings.append(
                f'left out {len(labels)} label names in config.json, the head has {info.num_classes} classes')
    return cfg


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _id2label(id2label: Any, num_classes: int) -> Optional[List[str]]:
    """Names in the order of transformers' id2label, None without names of their own."""
    if not isinstance(id2label, dict) or not id2label:
        return None
    try:
        names = {int(k): v for k, v in id2label.items()}
    except ValueError:
        return [''] * (num_classes + 1)  # counts as labels that do not fit
    if sorted(names) != list(range(len(names))):
        return [''] * (num_classes + 1)
    labels = [names[i] for i in range(len(names))]
    return None if all(x == f'LABEL_{i}' for i, x in enumerate(labels)) else labels


# ---- choose ---------------------------------------------------------------------------------------------------------

def _has_row(info: Description, state_dict: StateDict) -> bool:
    """Whether the last position embedding, resized or not, still has its row for the class token."""
    grid = (info.grid_size[0] // 8) * (info.grid_size[1] // 8)
    return state_dict[_POS_EMBED].shape[1] == grid + 1


def _select(loaded: Loaded, to: str, drop: List[str]) -> Tuple[StateDict, Optional[torch.Tensor]]:
    """Take the parts that the target holds. Returns them, and the class token row that timm has no place for."""
    info, report = loaded.info, loaded.report
    have = [part for part, there in (
        ('class_token', info.class_token), ('norm', info.norm), ('head', report.head)) if there]
    if to == 'mmdet' and info.class_row and 'class_token' not in have:
        have.append('class_token')  # its row is still there
    left = [part for part in have if part not in drop]

    if to == 'mmdet' and left:
        raise ValueError(
            f'The mmdet format has no place for {", ".join(left)}: leave them out with --drop {" ".join(have)}.')
    if to == 'transformers' and ('class_token' not in left or 'norm' not in left):
        raise ValueError(
            'Expected a checkpoint with class token and final norm for the transformers format, ' + (
                'do not drop them.' if info.class_token and info.norm else 'this one lacks them, nothing is made up.'))
    if to == 'transformers' and info.grid_size[0] != info.grid_size[1]:
        raise ValueError(f'The transformers format holds square images only, got {info.img_size}.')
    if to == 'original':
        if not info.class_row:
            raise ValueError(
                'The original format has a class token row in pos_embed4 also where it has no class token. This '
                f'checkpoint lacks it (a folder converted from the original has it in {CLASS_ROW_FILE}), and nothing '
                'is made up.')
        if ('class_token' in left) != ('norm' in left) or 'head' in left and 'class_token' not in left:
            raise ValueError(
                f'The original format holds class token and norm together or neither, and a head only with them, this '
                f'would be {", ".join(left)}: leave them out with --drop {" ".join(have)}.')

    state_dict = drop_parts(loaded.state_dict, [p for p in drop if p != 'class_token'])
    class_row = None
    if 'class_token' in drop and to == 'original':
        state_dict.pop(_CLS_TOKEN, None)  # its position row stays, as in the original's dense checkpoints
    elif 'class_token' in drop:
        state_dict = drop_parts(state_dict, ['class_token'], info.class_row)
    elif to == 'timm' and info.class_row and not info.class_token:
        class_row = state_dict[_POS_EMBED][:, :1]
        state_dict = drop_parts(state_dict, ['class_token'])
    if 'norm' in drop and 'head' in left:
        raise ValueError('The head takes what the norm gives: leave out both with --drop norm head.')
    return state_dict, class_row


def _cast(key: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = x.to(dtype)
    if out.dtype != x.dtype and out.numel() and not _finite(out) and _finite(x):
        raise ValueError(f'{key} has values beyond the range of {str(dtype).removeprefix("torch.")}: use bfloat16.')
    return out


def _model_args(info: Description, given: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments for `timm.create_model` that differ from the defaults of the variant."""
    default = 32 if find_variant(info.depths, info.embed_dims) == 'test_pvt' else 224
    args: Dict[str, Any] = {}
    if info.grid_size != (default // 4, default // 4):
        args['img_size'] = info.img_size[0] if info.img_size[0] == info.img_size[1] else list(info.img_size)
    if info.in_chans != 3:
        args['in_chans'] = info.in_chans
    if not info.class_token:
        args['class_token'] = False
        if info.norm:
            args['output_fmt'] = 'NLC'
    elif not info.norm:
        args['output_fmt'] = 'NCHW'
    pool = given.get('global_pool')
    usual = 'token' if info.class_token and info.norm else 'avg'
    if pool is not None and pool != usual and (pool != 'token' or usual == 'token'):
        args['global_pool'] = pool
    return args


def _check_against_model(state_dict: StateDict, info: Description, model_args: Dict[str, Any]) -> None:
    """Compare names and shapes with the model that the checkpoint claims to be of."""
    if info.patch_size != 4:
        raise ValueError(f'Expected patches of 4x4 pixels, got {info.patch_size}x{info.patch_size}.')
    args = dict(model_args, img_size=info.img_size, num_classes=info.num_classes, weight_init='skip', device='meta')
    reference = timm.create_model(find_variant(info.depths, info.embed_dims), pretrained=False, **args).state_dict()
    if info.class_row and not info.class_token:
        state_dict = drop_parts(state_dict, ['class_token'])
    some = pvt_timm.checkpoints._some
    missing = [k for k in reference if k not in state_dict]
    if missing:
        raise ValueError(f'Missing in the checkpoint: {some(missing)}.')
    extra = [k for k in state_dict if k not in reference]
    if extra:
        raise ValueError(f'Not part of {find_variant(info.depths, info.embed_dims)}: {some(extra)}.')
    wrong = [f'{k} {list(state_dict[k].shape)} instead of {list(v.shape)}'
             for k, v in reference.items() if state_dict[k].shape != v.shape]
    if wrong:
        raise ValueError(f'Wrong shape in the checkpoint: {some(wrong)}.')
