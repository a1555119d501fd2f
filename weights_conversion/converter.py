""" The conversion itself: read, describe, drop, resize, cast, write. """
import contextlib
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import timm
import torch
from safetensors import SafetensorError

import pvt_timm  # noqa: F401  registers the models
from pvt_timm.checkpoints import (
    Converted,
    Description,
    check_keys,
    describe,
    drop_parts,
    from_timm,
    map_to_timm,
    training_config,
    unwrap,
)
from pvt_timm.files import MAX_BYTES, read_checkpoint
from pvt_timm.labels import labels_in, read_labels
from pvt_timm.pvt import VARIANTS, find_variant, resize_pos_embeds

from .output import check_output, new_folder
from .report import Report, clean, trace
from .sources import Source, check_sha256, hash_in_name, known_file, open_source, sha256_of
from .targets import CLASS_ROW, WRITERS, Contents, default_cfg, variant_of, write_card

__all__ = ['DTYPES', 'PARTS', 'Loaded', 'VerificationError', 'convert', 'inspect']

StateDict = Dict[str, torch.Tensor]
PathLike = Union[str, 'os.PathLike[str]']
Size = Union[int, Sequence[int], None]

DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
PARTS = ('class_token', 'norm', 'head')
MIN_SIZE, MAX_SIZE = 32, 2048

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_POS_EMBED = 'stages.3.pos_embed'
_CLS_TOKEN = 'stages.3.cls_token'


class VerificationError(ValueError):
    """The outputs differ by more than the tolerance. `report` says where."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


@dataclass
class Loaded:
    """A checkpoint under timm's names, and what is known about it."""
    state_dict: StateDict  # the last position embedding has its class token row where the source has one
    info: Description
    source: Source
    converted: Converted
    report: Report  # filled as far as reading goes
    model_args: Dict[str, Any]  # what `timm.create_model` needs besides the name
    cfg: Dict[str, Any]  # preprocessing and labels for timm's `pretrained_cfg`


def inspect(source: PathLike, **options: Any) -> Report:
    """Say what a checkpoint is and how it would be mapped. Nothing is written.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        options: Those of `convert` on how to read a checkpoint.
    """
    with _load(source, **options) as loaded:
        loaded.report.mapped = trace(loaded.converted.mapped)
        return loaded.report


def convert(
        source: PathLike,
        output: PathLike,
        *,
        to: str = 'timm',
        drop: Sequence[str] = (),
        num_classes: Optional[int] = None,
        img_size: Size = None,
        dtype: Optional[str] = None,
        verify: bool = False,
        force: bool = False,
        keep_source: bool = False,
        about: Optional[str] = None,
        **options: Any,
) -> Report:
    """Convert a PVT v1 checkpoint.

    Args:
        source: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        output: Folder to write. It appears once it is complete.
        to: 'timm', 'original' (whai362/PVT), 'transformers' or 'mmdet'.
        drop: Parts to leave out: 'class_token', 'norm', 'head'.
        num_classes: Only 0 (leave out the head) or the number that the head has.
        img_size: Image size to resize the position embeddings to.
        dtype: 'float32', 'float16' or 'bfloat16', None to keep the types.
        verify: Compare outputs with the source's own implementation, and the written file with what was meant.
        force: Replace an earlier output.
        keep_source: Also copy the source file into the output.
        about: Text of the model card before the table of provenance, None for an example of use.
        options: How to read the checkpoint.
            `model`: name of the timm model that it has to be of. `use_ema` (True): as timm does, prefer averaged
            weights where the file holds both. `prefix`: what stands before the names, where the file holds several
            PVTs. `source_size`: image size of the position embeddings, where only non-square ones fit. `labels`: file
            with the names of the classes, instead of those that come with the checkpoint. `sha256`: hash (or its first
            8 or more digits) that the file must have. `max_bytes`: refuse a file that is larger or claims more.
            `progress`: show how far a download from a url is.

    Returns:
        What was done.

    Raises:
        ValueError: The source is no PVT v1 checkpoint, is damaged or refused, or does not fit what was asked for.
        OSError: Something cannot be read or written.
        Exception: What the clients raise where something cannot be downloaded.
    """
    for value, known, what in ((to, WRITERS, 'a target'), (dtype, (None, *DTYPES), 'a dtype'),
                               *((part, PARTS, 'parts to drop') for part in drop)):
        if value not in known:
            raise ValueError(f'Expected {what} in {tuple(known)}, got {value!r}.')
    new_size = _check_size(img_size)
    path = check_output(output, force)
    drop = list(dict.fromkeys(drop))

    with _load(source, **options) as loaded:
        report, info, cfg = loaded.report, loaded.info, loaded.cfg
        if num_classes == 0 and report.head and 'head' not in drop:
            drop.append('head')
        elif num_classes is not None and num_classes not in (0, report.num_classes):
            raise ValueError(
                f'Expected num_classes 0 or {report.num_classes}, which the head has, got {num_classes}. '
                f'A new head is made by timm.create_model(..., num_classes={num_classes}).')
        if new_size:
            cfg['input_size'] = (info.in_chans, *new_size)
        elif to == 'transformers' and _grid(cfg['input_size'][1:]) != info.grid_size:
            new_size = cfg['input_size'][1:]
            report.warnings.append(
                'position embeddings resized to {}x{} images, for which the model was trained: transformers takes '
                'images of their own size only'.format(*new_size))
        state_dict, class_row = _select(loaded, to, drop)
        grid = _grid(new_size) if new_size else info.grid_size
        if new_size:
            state_dict = resize_pos_embeds(state_dict, info.grid_size, grid, _has_row(info, state_dict))
        if dtype:
            state_dict = {k: _cast(k, v, DTYPES[dtype]) for k, v in state_dict.items()}
            class_row = None if class_row is None else _cast(CLASS_ROW, class_row, DTYPES[dtype])

        left = describe(state_dict, (4 * grid[0], 4 * grid[1]))
        if not left.num_classes:
            cfg.pop('label_names', None)
        contents = Contents(state_dict, class_row, left, _model_args(left, loaded.model_args), cfg, report, about)
        written = None
        if to != 'timm':
            contents.state_dict, written = from_timm(state_dict, to)
        report.mapped = trace(loaded.converted.mapped, written)
        sources = {t: s for ts, ss in loaded.converted.mapped for t in ts for s in ss}
        report.dropped.update({
            clean(sources.get(k, k)): 'asked for with --drop' for k in loaded.state_dict if k not in state_dict})
        report.to = to
        report.dtype = _dtype_name(state_dict)
        report.preprocessing['input_size'] = cfg['input_size']

        with new_folder(path, force) as folder:
            try:
                use = WRITERS[to](folder, contents)
            except (RuntimeError, SafetensorError) as e:  # how torch and safetensors report a full disk
                raise OSError(f'Cannot write to {path.parent}: {clean(e, 200)}') from e
            if keep_source:
                shutil.copyfile(loaded.source.file, folder / loaded.source.file.name)
            if verify:
                from . import verification
                report.verification = verification.verify(loaded, contents, folder, to)
                if not report.verification['passed']:
                    raise VerificationError('Verification failed, nothing was written.', report)
            write_card(folder, contents, use)
            report.files = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
        report.output = str(path)
        return report


# ---- read -----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _load(
        spec: PathLike,
        *,
        model: Optional[str] = None,
        use_ema: bool = True,
        prefix: Optional[str] = None,
        source_size: Size = None,
        labels: Optional[PathLike] = None,
        sha256: Optional[str] = None,
        max_bytes: int = MAX_BYTES,
        progress: bool = False,
) -> Iterator[Loaded]:
    size = _check_size(source_size, 'source_size')
    if model is not None and model not in VARIANTS:
        raise ValueError(f'Expected a model in {tuple(VARIANTS)}, got {model!r}.')
    with open_source(spec, progress) as source:
        found = sha256_of(source.file)
        if sha256 is not None:
            check_sha256(found, sha256)
        report = Report(
            clean(source.name), clean(source.file.name), source.file.stat().st_size, found, known_file(found))
        in_name = hash_in_name(source.file)
        if in_name and not found.startswith(in_name):
            report.warnings.append(
                f'the name of the file ends in {in_name}, its sha256 starts with {found[:8]}: it was changed, renamed '
                'or damaged')
        checkpoint = read_checkpoint(source.file, max_bytes)
        converted = map_to_timm(checkpoint, use_ema, prefix)
        trained = training_config(checkpoint)
        if converted.dropped:
            report.beside = _describe_heads(unwrap(checkpoint, use_ema)[0])
        del checkpoint
        loaded = _describe(source, converted, report, size, trained)
        if model is not None and report.variant != model:
            raise ValueError(f'Expected a checkpoint of {model}, this is one of {report.variant}.')
        _add_labels(loaded, trained, labels)
        yield loaded


def _describe_heads(state_dict: Mapping[str, Any]) -> str:
    from pvt_timm.detection.openmmlab import describe_heads

    found = describe_heads(state_dict)
    return f'the rest of a {found[0]} for {found[1]} classes' if found else ''


def _describe(
        source: Source,
        converted: Converted,
        report: Report,
        source_size: Optional[Tuple[int, int]],
        trained: Dict[str, Any],
) -> Loaded:
    state_dict = converted.state_dict
    bad = [k for k, v in state_dict.items() if v.dtype not in _FLOATS or v.layout != torch.strided]
    if bad:
        raise ValueError(f'Expected floating point weights, {bad[0]} has type {state_dict[bad[0]].dtype}.')
    info = describe(state_dict, source_size or _configured_size(source.config) or trained.get('img_size'))
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
        info = describe(state_dict, (4 * info.grid_size[0], 4 * info.grid_size[1]))
    model_args = _configured_args(source.config, variant)
    _check_against_model(state_dict, info, _model_args(info, model_args))

    report.format = converted.format
    report.wrappers = tuple(map(clean, converted.wrappers))
    report.prefix = clean(converted.prefix)
    report.dropped = {clean(k): clean(v) for k, v in converted.dropped.items()}
    ema = ('model_ema', 'state_dict_ema')
    report.weights = 'averaged' if any(w in ema for w in converted.wrappers) else 'plain'
    others = ('model', 'state_dict') if report.weights == 'averaged' else ema
    report.other_weights = next((clean(k) for k in converted.dropped if k.rpartition('.')[2] in others), None)
    report.variant = variant
    for name in ('num_classes', 'in_chans', 'img_size', 'class_token', 'class_row', 'norm'):
        setattr(report, name, getattr(info, name))
    report.head = 'head.weight' in state_dict
    report.dtype = report.source_dtype = _dtype_name(state_dict)
    report.parameters = sum(v.numel() for v in state_dict.values())
    broken = [k for k, v in state_dict.items() if v.numel() and not _finite(v)]
    if broken:
        more = f' and {len(broken) - 3} more' if len(broken) > 3 else ''
        report.warnings.append(f'values that are not finite, kept as they are: {", ".join(broken[:3])}{more}')
    cfg = _configured_cfg(source, info, report, trained)
    report.preprocessing = {k: cfg[k] for k in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')}
    return Loaded(state_dict, info, source, converted, report, model_args, cfg)


def _finite(x: torch.Tensor) -> bool:
    low, high = torch.aminmax(x.detach())
    return math.isfinite(low) and math.isfinite(high)


def _read_class_row(file: Path, state_dict: StateDict) -> torch.Tensor:
    row = read_checkpoint(file, 2 ** 20).get(CLASS_ROW)
    like = state_dict[_POS_EMBED]
    if not isinstance(row, torch.Tensor) or row.shape != (1, 1, like.shape[2]) or row.dtype != like.dtype:
        raise ValueError(f'Expected {CLASS_ROW} of type {like.dtype} and width {like.shape[2]} in {file.name}: remove '
                         f'or replace that file.')
    return row


def _check_size(size: Size, name: str = 'img_size') -> Optional[Tuple[int, int]]:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and MIN_SIZE <= n <= MAX_SIZE for n in pair):
        raise ValueError(
            f'Expected {name} to be one or two numbers from {MIN_SIZE} to {MAX_SIZE}, got '
            f'{" ".join(map(str, pair))}.')
    return pair


def _grid(size: Sequence[int]) -> Tuple[int, int]:
    return size[0] // 4, size[1] // 4


def _dtype_name(state_dict: StateDict) -> str:
    return ', '.join(dict.fromkeys(str(v.dtype).removeprefix('torch.') for v in state_dict.values()))


# ---- what is said about the weights: by their training, and by the files next to them --------------------------------

def _size_in(size: Any) -> Optional[Tuple[int, int]]:
    """Image size in a configuration, None if there is none that makes sense."""
    try:
        return _check_size(size if isinstance(size, (int, list, tuple)) else None)
    except ValueError:
        return None


def _configured_size(config: Dict[str, Any]) -> Optional[Tuple[int, int]]:
    """Size of the position embeddings in the configuration of timm or transformers."""
    args = config.get('model_args')
    return _size_in(args.get('img_size') if isinstance(args, dict) else config.get('image_size'))


def _configured_args(config: Dict[str, Any], variant: str) -> Dict[str, Any]:
    """Arguments that no state dict tells: the pooling of timm's configuration. Others have to be the known ones."""
    args = config.get('model_args')
    args = args if isinstance(args, dict) else {}
    heads = args.get('num_heads', config.get('num_attention_heads'))
    if isinstance(heads, list) and tuple(heads) != VARIANTS[variant]['num_heads']:
        raise ValueError(
            f'Expected {list(VARIANTS[variant]["num_heads"])} attention heads, as {variant} has, config.json says '
            f'{clean(heads, 60)}.')
    if config.get('hidden_act', 'gelu') != 'gelu':
        raise ValueError(f"Expected the activation 'gelu', got {clean(config['hidden_act'], 40)!r} in config.json.")
    pool = args.get('global_pool', config.get('global_pool'))
    return {'global_pool': pool} if pool in ('token', 'avg', '') else {}


def _configured_cfg(source: Source, info: Description, report: Report, trained: Dict[str, Any]) -> Dict[str, Any]:
    """Preprocessing: what training says, else what lies next to the checkpoint, else the model's default."""
    default = default_cfg(variant_of(info)).to_dict()
    given = source.config.get('pretrained_cfg')
    given = dict(given) if isinstance(given, dict) else {}
    given.update({ours: source.preprocessor[theirs] for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std'))
                  if theirs in source.preprocessor})
    given.update(trained)
    size = given.get('input_size')
    size = given.get('img_size') or (size[1:] if isinstance(size, (list, tuple)) else None)

    def per_channel(x: Any) -> bool:
        return isinstance(x, (list, tuple)) and len(x) in (1, info.in_chans) and all(map(_is_number, x))

    sound: Dict[str, Callable[[Any], bool]] = {
        'mean': per_channel,
        'std': per_channel,
        'crop_pct': lambda x: _is_number(x) and 0 < x <= 1,
        'crop_mode': ('center', 'squash', 'border').__contains__,
        'interpolation': ('bicubic', 'bilinear', 'nearest', 'lanczos', 'random').__contains__,
    }
    cfg = {key: given[key] if fits(given.get(key)) else default[key] for key, fits in sound.items()
           if fits(given.get(key)) or default.get(key) is not None}
    cfg['input_size'] = (info.in_chans, *(_size_in(size) or info.img_size))
    if not per_channel(cfg['mean']) or not per_channel(cfg['std']):
        cfg.update({k: (round(sum(cfg[k]) / len(cfg[k]), 6),) * info.in_chans for k in ('mean', 'std')})
        report.warnings.append(
            f'mean and std of {info.in_chans} channels are not known: wrote the average of the usual ones')
    for key in ('license', 'origin_url'):
        value = given.get(key, default.get(key) if report.known else None)  # else not ours to say
        if isinstance(value, str):
            cfg[key] = clean(value, 200)
    return cfg


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _add_labels(loaded: Loaded, trained: Dict[str, Any], file: Optional[PathLike]) -> None:
    """Names of the classes: from `file`, else what training keeps, else what config.json says."""
    count, report = loaded.info.num_classes, loaded.report
    names = None
    if file is not None:
        names = read_labels(file)
        if len(names) != count:
            raise ValueError(f'Expected the names of {count} classes in {file}, got {len(names)}.')
    elif count:
        try:
            names = trained.get('label_names') or loaded.source.labels or labels_in(loaded.source.config)
        except ValueError as e:
            report.warnings.append(f'left out the label names in config.json: {clean(e)}')
    if names and len(names) != count:
        report.warnings.append(f'left out {len(names)} label names, the head has {count} classes')
    elif names:
        loaded.cfg['label_names'] = names
        report.labels = len(names)


# ---- choose ---------------------------------------------------------------------------------------------------------

def _has_row(info: Description, state_dict: StateDict) -> bool:
    """Whether the last position embedding still has its row for the class token."""
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
    if to == 'original' and (
            ('class_token' in left) != ('norm' in left) or 'head' in left and 'class_token' not in left):
        raise ValueError(
            f'The original format holds class token and norm together or neither, and a head only with them, this '
            f'would be {", ".join(left)}: leave them out with --drop {" ".join(have)}.')
    if 'norm' in drop and 'head' in left:
        raise ValueError('The head takes what the norm gives: leave out both with --drop norm head.')

    state_dict = drop_parts(loaded.state_dict, [p for p in drop if p != 'class_token'])
    class_row = None
    if to == 'original' and not info.class_row:
        pos_embed = state_dict[_POS_EMBED]
        state_dict[_POS_EMBED] = torch.cat([torch.zeros_like(pos_embed[:, :1]), pos_embed], 1)
        report.warnings.append(
            'pos_embed4 has a row of zeros at the place of the class token: the original format wants the row, this '
            'checkpoint has none, and the dense models of the original cut it away unread')
    elif to == 'original' and 'class_token' in drop:
        state_dict.pop(_CLS_TOKEN, None)  # its position row stays, as in the original's dense checkpoints
    elif 'class_token' in drop:
        state_dict = drop_parts(state_dict, ['class_token'], info.class_row)
    elif to == 'timm' and info.class_row and not info.class_token:
        class_row = state_dict[_POS_EMBED][:, :1]
        state_dict = drop_parts(state_dict, ['class_token'])
    return state_dict, class_row


def _cast(key: str, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = x.to(dtype)
    if out.dtype != x.dtype and out.numel() and not _finite(out) and _finite(x):
        raise ValueError(f'{key} has values beyond the range of {str(dtype).removeprefix("torch.")}: use bfloat16.')
    return out


def _model_args(info: Description, given: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments for `timm.create_model` that differ from the defaults of the variant."""
    default = default_cfg(variant_of(info)).input_size[1:]
    args: Dict[str, Any] = {}
    if info.grid_size != _grid(default):
        args['img_size'] = info.img_size[0] if info.img_size[0] == info.img_size[1] else list(info.img_size)
    if info.in_chans != 3:
        args['in_chans'] = info.in_chans
    usual = 'token' if info.class_token and info.norm else 'avg'
    if not info.class_token:
        args['class_token'] = False
    if info.class_token != info.norm:
        args['output_fmt'] = 'NLC' if info.norm else 'NCHW'
    if given.get('global_pool', usual) not in (usual, 'token'):
        args['global_pool'] = given['global_pool']
    return args


def _check_against_model(state_dict: StateDict, info: Description, model_args: Dict[str, Any]) -> None:
    """Compare names and shapes with the model that the checkpoint claims to be of."""
    if info.patch_size != 4:
        raise ValueError(f'Expected patches of 4x4 pixels, got {info.patch_size}x{info.patch_size}.')
    args = dict(model_args, img_size=info.img_size, num_classes=info.num_classes, weight_init='skip', device='meta')
    reference = timm.create_model(variant_of(info), pretrained=False, **args).state_dict()
    if info.class_row and not info.class_token:
        state_dict = drop_parts(state_dict, ['class_token'])
    check_keys(state_dict, reference)
