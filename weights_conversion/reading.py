""" Read a checkpoint with what lies beside it: the weights under timm's names, and all that is known about them. """
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import timm
import torch
from timm.models import get_pretrained_cfg

import pvt_timm  # noqa: F401  registers the models
from pvt_timm.checkpoints import (
    Converted, Description, StateDict, check_keys, describe, drop_parts, map_to_timm, training_config)
from pvt_timm.cli.errors import clean
from pvt_timm.files import MAX_BYTES, PathLike, read_checkpoint
from pvt_timm.labels import labels_beside, labels_in, read_labels
from pvt_timm.pvt import VARIANTS, find_variant

from .sources import Source, open_source

__all__ = ['CLASS_ROW', 'PARTS', 'POS_EMBED', 'Weights', 'check_size', 'read_weights']

Size = Union[int, Sequence[int], None]

CLASS_ROW = 'pos_embed4.class_row'
PARTS = ('class_token', 'norm', 'head')
POS_EMBED = 'stages.3.pos_embed'
MIN_SIZE, MAX_SIZE = 32, 2048

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos', 'random')


@dataclass
class Weights:
    """A checkpoint under timm's names, and what is known about it."""
    source: Source
    converted: Converted  # how it was mapped
    state_dict: StateDict  # the last position embedding has its class token row where the source has one
    info: Description
    variant: str  # name of the timm model
    pool: Any  # the pooling that is said to go with them, which no state dict tells
    cfg: Dict[str, Any]  # preprocessing and names of the classes, for timm's `pretrained_cfg`
    notes: List[str]  # what is odd about it

    @property
    def parts(self) -> List[str]:
        """Those of `PARTS` that it has."""
        has = (self.info.class_token, self.info.norm, self.info.num_classes)
        return [part for part, there in zip(PARTS, has) if there]

    @property
    def has_bare_row(self) -> bool:
        """Its last position embedding has a row for a class token that is not there, as in the original's detectors."""
        return self.info.class_row and not self.info.class_token

    @property
    def model_args(self) -> Dict[str, Any]:
        """Arguments for `timm.create_model` that differ from the defaults of the variant, but for num_classes."""
        info = self.info
        default: Any = get_pretrained_cfg(self.variant)
        args: Dict[str, Any] = {}
        if info.img_size != tuple(default.input_size[1:]):
            args['img_size'] = info.img_size[0] if info.img_size[0] == info.img_size[1] else list(info.img_size)
        if info.in_chans != 3:
            args['in_chans'] = info.in_chans
        if not info.class_token:
            args['class_token'] = False
        if info.class_token != info.norm:
            args['output_fmt'] = 'NLC' if info.norm else 'NCHW'
        if self.pool == '' or self.pool == 'avg' and info.class_token and info.norm:
            args['global_pool'] = self.pool
        return args

    def dtype_name(self) -> str:
        return ', '.join(dict.fromkeys(str(v.dtype).removeprefix('torch.') for v in self.state_dict.values()))

    def create_model(self, **kwargs: Any) -> Any:
        """A model that takes the weights, without them."""
        own = dict(self.model_args, num_classes=self.info.num_classes, weight_init='skip')
        return timm.create_model(self.variant, **{**own, **kwargs})

    def for_model(self) -> StateDict:
        """The state dict without the class token row of dense checkpoints, which no timm model has a place for."""
        return drop_parts(self.state_dict, ['class_token'] if self.has_bare_row else [])


@contextlib.contextmanager
def read_weights(
        spec: PathLike,
        *,
        model: Optional[str] = None,
        use_ema: bool = True,
        prefix: Optional[str] = None,
        source_size: Size = None,
        img_size: Optional[Tuple[int, int]] = None,
        labels: Optional[PathLike] = None,
        sha256: Optional[str] = None,
        max_bytes: int = MAX_BYTES,
) -> Iterator[Weights]:
    """Read a checkpoint in any known format, and what its training and the files beside it say.

    Args:
        spec: File, folder, http(s) url, or 'hf-hub:owner/repo[@revision][:file]'.
        model: Name of the timm model that it has to be of.
        use_ema: As timm does, prefer averaged weights where the file holds both.
        prefix: What stands before the names, where the file holds several PVTs.
        source_size: Image size of the position embeddings, where only non-square ones fit.
        img_size: Height and width to try where nothing else tells.
        labels: File with the names of the classes, instead of those that come with the checkpoint.
        sha256: Hash (or its first 8 or more digits) that the file must have.
        max_bytes: Refuse a file that is larger.

    Raises:
        What `convert` does for its source.
    """
    told = check_size(source_size, 'source_size')
    if model is not None and model not in VARIANTS:
        raise ValueError(f'Expected a model in {tuple(VARIANTS)}, got {model!r}.')
    with open_source(spec) as source:
        if sha256 is not None and (len(sha256) < 8 or not source.sha256.startswith(sha256.lower())):
            raise ValueError(f'Expected a file with sha256 {ascii(sha256)} (8 digits or more), got {source.sha256}: '
                             f'another one, or damaged.')
        checkpoint = read_checkpoint(source.file, max_bytes)
        converted = map_to_timm(checkpoint, use_ema, prefix)
        trained = training_config(checkpoint)
        notes = _notes(converted)
        del checkpoint

        state_dict, config = converted.state_dict, source.config
        args, beside = (x if isinstance(x, dict) else {} for x in map(config.get, ('model_args', 'pretrained_cfg')))
        theirs = {  # in the words of timm
            'mean': config.get('image_mean'), 'std': config.get('image_std'), 'img_size': config.get('image_size')}
        stored = training_config({'meta': args, 'args': theirs}).get('img_size')
        info = describe(state_dict, told or stored or trained.get('img_size') or img_size)
        if told and info.grid_size != (told[0] // 4, told[1] // 4):
            raise ValueError(
                f'Expected position embeddings of {told[0]}x{told[1]} images, they have a grid of '
                f'{info.grid_size[0]}x{info.grid_size[1]} patches.')
        if not info.class_token and not info.class_row and source.class_row is not None:
            row = _read_class_row(source.class_row, state_dict[POS_EMBED])
            state_dict = {**state_dict, POS_EMBED: torch.cat([row, state_dict[POS_EMBED]], 1)}
            info = describe(state_dict, info.img_size)
        variant = find_variant(info.depths, info.embed_dims)
        if variant is None:
            raise ValueError(
                f'Expected the depths and channels of one of {", ".join(VARIANTS)}, got '
                f'{info.depths} and {info.embed_dims}.')
        wanted = model or config.get('architecture', variant)
        if wanted != variant:
            raise ValueError(f'Expected a checkpoint of {clean(wanted, 60)}, but {source.file.name} holds {variant}.')
        _check_config(config, args, variant)
        pool = trained.get('global_pool') or args.get('global_pool', config.get('global_pool'))

        cfg = _preprocessing({**training_config({'meta': beside, 'args': theirs}), **trained}, info, variant, notes)
        cfg.update({key: clean(beside[key], 200) for key in ('crop_mode', 'license', 'origin_url')
                    if isinstance(beside.get(key), str)})
        names = _labels(source, trained, labels, info.num_classes, notes)
        cfg.update({'label_names': names} if names else {})
        weights = Weights(source, converted, state_dict, info, variant, pool, cfg, notes)
        check_keys(weights.for_model(), weights.create_model(device='meta').state_dict())
        yield weights


def check_size(size: Size, name: str = 'img_size') -> Optional[Tuple[int, int]]:
    """Height and width of a size of one or two numbers."""
    if size is None:
        return None
    pair = (size,) if isinstance(size, int) else tuple(size)
    pair = pair * 2 if len(pair) == 1 else pair
    if len(pair) != 2 or not all(isinstance(n, int) and MIN_SIZE <= n <= MAX_SIZE for n in pair):
        raise ValueError(
            f'Expected {name} to be one or two numbers from {MIN_SIZE} to {MAX_SIZE}, got {" ".join(map(str, pair))}.')
    return pair


# ---- what is said about the weights: by their training, and by the files next to them --------------------------------

def _notes(converted: Converted) -> List[str]:
    notes = []
    if converted.beside:
        from pvt_timm.detection.openmmlab import describe_heads, heads_of  # which needs torchvision's detectors

        heads = describe_heads(heads_of(converted))
        notes = [f'beside the backbone is the rest of a {heads[0]} for {heads[1]} classes'] if heads else []
    state_dict = converted.state_dict
    bad = [k for k, v in state_dict.items() if v.dtype not in _FLOATS or v.layout != torch.strided]
    if bad:
        raise ValueError(f'Expected floating point weights, {bad[0]} has type {state_dict[bad[0]].dtype}.')
    broken = [k for k, v in state_dict.items() if not v.isfinite().all()]
    if broken:
        more = f' and {len(broken) - 3} more' if len(broken) > 3 else ''
        notes.append(f'values that are not finite, kept as they are: {", ".join(broken[:3])}{more}')
    return notes


def _read_class_row(file: Path, like: torch.Tensor) -> torch.Tensor:
    row = read_checkpoint(file, 2 ** 20).get(CLASS_ROW)
    if not isinstance(row, torch.Tensor) or row.shape != (1, 1, like.shape[2]) or row.dtype != like.dtype:
        raise ValueError(f'Expected {CLASS_ROW} of type {like.dtype} and width {like.shape[2]} in {file.name}: remove '
                         f'or replace that file.')
    return row


def _check_config(config: Dict[str, Any], args: Dict[str, Any], variant: str) -> None:
    """Refuse an architecture that differs from the known one in what no state dict tells."""
    said = {'num_attention_heads': args.get('num_heads'), **config}
    for name, expected in (('num_attention_heads', list(VARIANTS[variant]['num_heads'])), ('hidden_act', 'gelu')):
        if said.get(name) not in (None, expected):
            raise ValueError(f'Expected {name} {expected}, as {variant} has, config.json says {clean(said[name], 60)}.')


def _preprocessing(said: Dict[str, Any], info: Description, variant: str, notes: List[str]) -> Dict[str, Any]:
    """What is said (see `training_config`), where it makes sense, else the model's default."""
    default: Any = get_pretrained_cfg(variant)
    cfg = {key: said.get(key, getattr(default, key)) for key in ('mean', 'std', 'crop_pct', 'interpolation')}
    for key, fits in (('crop_pct', cfg['crop_pct'] <= 1), ('interpolation', cfg['interpolation'] in _INTERPOLATIONS)):
        if not fits:
            notes.append(f'left out the {key} that is said to go with the weights: {clean(cfg[key], 60)}')
            cfg[key] = getattr(default, key)
    if any(len(cfg[key]) not in (1, info.in_chans) for key in ('mean', 'std')):
        notes.append(f'mean and std of {info.in_chans} channels are not known: took the average of the usual ones')
    for key in ('mean', 'std'):
        values = tuple(cfg[key])
        average = round(sum(values) / len(values), 6)
        cfg[key] = values if len(values) == info.in_chans else (average,) * info.in_chans
    size = said.get('img_size', info.img_size)
    size = size if all(MIN_SIZE <= n <= MAX_SIZE for n in size) else info.img_size
    cfg['input_size'] = (info.in_chans, *size)
    return cfg


def _labels(
        source: Source, trained: Dict[str, Any], file: Optional[PathLike], count: int, notes: List[str],
) -> Optional[List[str]]:
    """Names of the classes: from `file`, else what training keeps, else what config.json says."""
    if file is not None:
        return read_labels(file, count)
    try:
        names = labels_in(trained.get('label_names')) or labels_beside(source.file) or labels_in(source.config)
    except ValueError as e:
        notes.append(f'left out the label names that come with it: {clean(e)}')
        return None
    if names and count and len(names) != count:
        notes.append(f'left out {len(names)} label names, the head has {count} classes')
    return names if names and len(names) == count else None
