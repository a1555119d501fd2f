""" PVT v1 checkpoints: what a state dict is, and how it maps to timm's names and back.

Pure functions on dicts of tensors, no files, no network. There is one table per source. A row says which timm
parameters and which source parameters hold the same numbers, so the same row serves both directions.

Placeholders: {i} stage and {j} block counted from 0, {s} stage and {b} block counted from 1, {p} weight or bias.
"""
import logging
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch


__all__ = [
    'FORMATS', 'Converted', 'Description', 'check_keys', 'describe', 'detect', 'drop_parts', 'fit_to_model',
    'from_timm', 'map_to_timm', 'stage_grids', 'to_timm', 'unwrap',
]

_logger = logging.getLogger(__name__)

StateDict = Dict[str, torch.Tensor]

_POS_EMBED = 'stages.{i}.pos_embed'
_CLS_TOKEN = 'stages.3.cls_token'
_BLOCK = 'stages.{i}.blocks.{j}'

# A row is (timm parameters, source parameters[, 'conv1x1']). Where a side has several parameters they are stacked along
# dim 0 in the order given, `*2` is twice the rows of its neighbour. 'conv1x1' is a linear weight kept as a convolution.
_TIMM = (
    ('stages.{i}.pos_embed',                 'stages.{i}.pos_embed'),
    ('stages.3.cls_token',                   'stages.3.cls_token'),
    ('stages.{i}.patch_embed.proj.{p}',      'stages.{i}.patch_embed.proj.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'stages.{i}.patch_embed.norm.{p}'),
    ('stages.{i}.blocks.{j}.norm1.{p}',      'stages.{i}.blocks.{j}.norm1.{p}'),
    ('stages.{i}.blocks.{j}.attn.q.{p}',     'stages.{i}.blocks.{j}.attn.q.{p}'),
    ('stages.{i}.blocks.{j}.attn.kv.{p}',    'stages.{i}.blocks.{j}.attn.kv.{p}'),
    ('stages.{i}.blocks.{j}.attn.sr.{p}',    'stages.{i}.blocks.{j}.attn.sr.{p}'),
    ('stages.{i}.blocks.{j}.attn.norm.{p}',  'stages.{i}.blocks.{j}.attn.norm.{p}'),
    ('stages.{i}.blocks.{j}.attn.proj.{p}',  'stages.{i}.blocks.{j}.attn.proj.{p}'),
    ('stages.{i}.blocks.{j}.norm2.{p}',      'stages.{i}.blocks.{j}.norm2.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'stages.{i}.blocks.{j}.mlp.fc1.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'stages.{i}.blocks.{j}.mlp.fc2.{p}'),
    ('norm.{p}',                             'norm.{p}'),
    ('head.{p}',                             'head.{p}'),
)

# `features_only=True` models flatten the stages into their own names
_TIMM_FEATURES = tuple((timm, source.replace('stages.', 'stages_')) for timm, source in _TIMM)

_ORIGINAL = (
    # timm                                   classification/pvt.py, detection/pvt.py, segmentation/pvt.py
    ('stages.{i}.pos_embed',                 'pos_embed{s}'),
    ('stages.3.cls_token',                   'cls_token'),
    ('stages.{i}.patch_embed.proj.{p}',      'patch_embed{s}.proj.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'patch_embed{s}.norm.{p}'),
    ('stages.{i}.blocks.{j}.norm1.{p}',      'block{s}.{j}.norm1.{p}'),
    ('stages.{i}.blocks.{j}.attn.q.{p}',     'block{s}.{j}.attn.q.{p}'),
    ('stages.{i}.blocks.{j}.attn.kv.{p}',    'block{s}.{j}.attn.kv.{p}'),
    ('stages.{i}.blocks.{j}.attn.sr.{p}',    'block{s}.{j}.attn.sr.{p}'),
    ('stages.{i}.blocks.{j}.attn.norm.{p}',  'block{s}.{j}.attn.norm.{p}'),
    ('stages.{i}.blocks.{j}.attn.proj.{p}',  'block{s}.{j}.attn.proj.{p}'),
    ('stages.{i}.blocks.{j}.norm2.{p}',      'block{s}.{j}.norm2.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'block{s}.{j}.mlp.fc1.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'block{s}.{j}.mlp.fc2.{p}'),
    ('norm.{p}',                             'norm.{p}'),
    ('head.{p}',                             'head.{p}'),
)

_TRANSFORMERS = (
    # timm                                   transformers PvtForImageClassification
    ('stages.{i}.pos_embed',                 'pvt.encoder.patch_embeddings.{i}.position_embeddings'),
    ('stages.3.cls_token',                   'pvt.encoder.patch_embeddings.3.cls_token'),
    ('stages.{i}.patch_embed.proj.{p}',      'pvt.encoder.patch_embeddings.{i}.projection.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'pvt.encoder.patch_embeddings.{i}.layer_norm.{p}'),
    ('stages.{i}.blocks.{j}.norm1.{p}',      'pvt.encoder.block.{i}.{j}.layer_norm_1.{p}'),
    ('stages.{i}.blocks.{j}.attn.q.{p}',     'pvt.encoder.block.{i}.{j}.attention.self.query.{p}'),
    ('stages.{i}.blocks.{j}.attn.kv.{p}',   ('pvt.encoder.block.{i}.{j}.attention.self.key.{p}',
                                             'pvt.encoder.block.{i}.{j}.attention.self.value.{p}')),
    ('stages.{i}.blocks.{j}.attn.sr.{p}',    'pvt.encoder.block.{i}.{j}.attention.self.sequence_reduction.{p}'),
    ('stages.{i}.blocks.{j}.attn.norm.{p}',  'pvt.encoder.block.{i}.{j}.attention.self.layer_norm.{p}'),
    ('stages.{i}.blocks.{j}.attn.proj.{p}',  'pvt.encoder.block.{i}.{j}.attention.output.dense.{p}'),
    ('stages.{i}.blocks.{j}.norm2.{p}',      'pvt.encoder.block.{i}.{j}.layer_norm_2.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'pvt.encoder.block.{i}.{j}.mlp.dense1.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'pvt.encoder.block.{i}.{j}.mlp.dense2.{p}'),
    ('norm.{p}',                             'pvt.encoder.layer_norm.{p}'),
    ('head.{p}',                             'classifier.{p}'),
)

_MMDET = (
    # timm                                   mmdetection PyramidVisionTransformer (no class token, norm and head)
    ('stages.{i}.pos_embed',                 'layers.{i}.1.0.pos_embed'),
    ('stages.{i}.patch_embed.proj.{p}',      'layers.{i}.0.projection.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'layers.{i}.0.norm.{p}'),
    ('stages.{i}.blocks.{j}.norm1.{p}',      'layers.{i}.1.{b}.norm1.{p}'),
    (('stages.{i}.blocks.{j}.attn.q.{p}',
      'stages.{i}.blocks.{j}.attn.kv.{p}*2'), 'layers.{i}.1.{b}.attn.attn.in_proj_{p}'),
    ('stages.{i}.blocks.{j}.attn.sr.{p}',    'layers.{i}.1.{b}.attn.sr.{p}'),
    ('stages.{i}.blocks.{j}.attn.norm.{p}',  'layers.{i}.1.{b}.attn.norm.{p}'),
    ('stages.{i}.blocks.{j}.attn.proj.{p}',  'layers.{i}.1.{b}.attn.attn.out_proj.{p}'),
    ('stages.{i}.blocks.{j}.norm2.{p}',      'layers.{i}.1.{b}.norm2.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'layers.{i}.1.{b}.ffn.layers.0.{p}', 'conv1x1'),
    ('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'layers.{i}.1.{b}.ffn.layers.3.{p}', 'conv1x1'),
)

# format -> (table, the key that only this format has)
FORMATS = {
    'timm': (_TIMM, 'stages.0.patch_embed.proj.weight'),
    'timm_features': (_TIMM_FEATURES, 'stages_0.patch_embed.proj.weight'),
    'original': (_ORIGINAL, 'patch_embed1.proj.weight'),
    'transformers': (_TRANSFORMERS, 'pvt.encoder.patch_embeddings.0.projection.weight'),
    'mmdet': (_MMDET, 'layers.0.0.projection.weight'),
}
_TRANSFORMERS_BASE = 'encoder.patch_embeddings.0.projection.weight'  # PvtModel, without the 'pvt.' prefix

_WRAPPERS = ('model', 'state_dict')
_EMA_WRAPPERS = ('model_ema', 'state_dict_ema')
_PREFIX = re.compile(r'(?:(?:module|_orig_mod|backbone|model)\.)*')
_PLACEHOLDERS = {'i': r'(\d+)', 'j': r'(\d+)', 's': r'(\d+)', 'b': r'(\d+)', 'p': r'(weight|bias)'}


@dataclass(frozen=True)
class _Template:
    """A parameter name with placeholders, and its share of the rows of the stack it is in."""
    text: str
    rows: int
    regex: 're.Pattern[str]'
    names: Tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> '_Template':
        text, _, rows = text.partition('*')
        pieces = re.split(r'\{(\w)\}', text)
        names = tuple(pieces[1::2])
        regex = ''.join(_PLACEHOLDERS[x] if n % 2 else re.escape(x) for n, x in enumerate(pieces))
        return cls(text, int(rows or 1), re.compile(regex), names)

    def match(self, key: str) -> Optional[Tuple[Tuple[str, Any], ...]]:
        """Fields of `key` counted from 0, or None. Only a name that `format` gives back is a match (no '01')."""
        m = self.regex.fullmatch(key)
        if m is None:
            return None
        fields: Dict[str, Any] = {}
        for name, value in zip(self.names, m.groups()):
            if name == 'p':
                fields['p'] = value
            elif len(value) > 4:
                return None
            else:
                fields[{'s': 'i', 'b': 'j'}.get(name, name)] = int(value) - (name in 'sb')
        return tuple(sorted(fields.items())) if self.format(fields) == key else None

    def format(self, fields: Mapping[str, Any]) -> str:
        shifted = dict(fields, s=fields.get('i', 0) + 1, b=fields.get('j', 0) + 1)
        return re.sub(r'\{(\w)\}', lambda m: str(shifted[m.group(1)]), self.text)


@dataclass(frozen=True)
class _Rule:
    timm: Tuple[_Template, ...]
    source: Tuple[_Template, ...]
    conv1x1: bool


@cache
def _rules(fmt: str) -> Tuple[_Rule, ...]:
    def parse(side):
        return tuple(_Template.parse(text) for text in ((side,) if isinstance(side, str) else side))
    return tuple(_Rule(parse(row[0]), parse(row[1]), 'conv1x1' in row[2:]) for row in FORMATS[fmt][0])


@dataclass
class Converted:
    """A state dict under timm's names, and an account of every key of its source.

    Attributes:
        state_dict: Tensors under timm's names.
        format: Key of `FORMATS`.
        wrappers: Keys that were opened to reach the weights, outermost first.
        prefix: What stood before every name.
        mapped: (timm names, source names) that hold the same numbers.
        dropped: Source key to the reason why it is not in `state_dict`.
    """
    state_dict: StateDict
    format: str
    wrappers: Tuple[str, ...] = ()
    prefix: str = ''
    mapped: List[Tuple[Tuple[str, ...], Tuple[str, ...]]] = field(default_factory=list)
    dropped: Dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
    """What a state dict under timm's names says about its model.

    Attributes:
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        sr_ratios: Spatial reduction per stage.
        mlp_ratios: MLP hidden size over channels per stage.
        patch_size: Patch size of the first stage.
        in_chans: Input channels.
        num_classes: Classes of the head, 0 without head.
        class_token: The class token is there.
        class_row: The last position embedding starts with a row for the class token.
        norm: The final norm is there.
        grid_size: Height and width of the first stage's position embedding.
        dtype: Type of the patch embedding weight.
    """
    depths: Tuple[int, ...]
    embed_dims: Tuple[int, ...]
    sr_ratios: Tuple[int, ...]
    mlp_ratios: Tuple[float, ...]
    patch_size: int
    in_chans: int
    num_classes: int
    class_token: bool
    class_row: bool
    norm: bool
    grid_size: Tuple[int, int]
    dtype: torch.dtype

    @property
    def img_size(self) -> Tuple[int, int]:
        """Smallest height and width in pixels that give `grid_size`."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size


def stage_grids(grid_size: Tuple[int, int], num_stages: int = 4) -> List[Tuple[int, int]]:
    """Grids (height, width) of all stages, from that of the first one. Every stage halves and floors."""
    return [(grid_size[0] // 2 ** i, grid_size[1] // 2 ** i) for i in range(num_stages)]


def source_grid(
        counts: Sequence[int],
        hint: Optional[Tuple[int, int]] = None,
        class_row: Optional[bool] = None,
) -> Tuple[Tuple[int, int], int]:
    """Tell the grid that stored position embeddings were made for from how many rows they have.

    Args:
        counts: Rows of the position embedding of each stage.
        hint: Grid of the first stage to take if it fits.
        class_row: Whether the last one has a row for the class token, None to find out.

    Returns:
        Grid (height, width) of the first stage and the number of class token rows (0 or 1). Where the rows fit both a
        square and another grid, the square one.

    Raises:
        ValueError: No grid fits, or only non-square ones do and `hint` does not say which.
    """
    class_rows = (0, 1) if class_row is None else (int(class_row),)
    fits = []
    for h in range(1, counts[0] + 1) if counts[0] <= 2 ** 22 else ():
        if counts[0] % h:
            continue
        grids = [h_ * w_ for h_, w_ in stage_grids((h, counts[0] // h), len(counts))]
        rows = counts[-1] - grids[-1]
        if 0 not in grids and grids[:-1] == list(counts[:-1]) and rows in class_rows:
            fits.append(((h, counts[0] // h), rows))
    for grid, rows in fits:
        if hint is not None and grid == tuple(hint):
            return grid, rows
    for grid, rows in fits:
        if grid[0] == grid[1]:
            return grid, rows
    if fits:
        raise ValueError(
            f'Expected to know the image size of position embeddings with {list(counts)} rows: the grids '
            f'{[grid for grid, _ in fits[:4]]} fit. Pass img_size.')
    raise ValueError(f'Expected position embeddings that halve in height and width per stage, got {list(counts)} rows.')


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(map(str, names[:limit])) + more


def detect(keys: Iterable[str]) -> Tuple[str, str]:
    """Tell the format of a state dict by keys that only this format has.

    Args:
        keys: Names in the state dict.

    Returns:
        Format (key of `FORMATS`) and the prefix before every name.

    Raises:
        ValueError: No known format, or several models in one state dict.
    """
    keys = [k for k in keys if isinstance(k, str)]
    found = set()
    for key in keys:
        for fmt, (_, anchor) in FORMATS.items():
            if key.endswith(anchor):
                prefix = key[:-len(anchor)]
                if _PREFIX.fullmatch(prefix):
                    found.add((fmt, prefix))
        if key.endswith(_TRANSFORMERS_BASE):
            prefix = key[:-len(_TRANSFORMERS_BASE)]
            if _PREFIX.fullmatch(prefix):
                found.add(('transformers', prefix))
    if not found:
        raise ValueError(
            f'Expected a PVT v1 checkpoint (timm, original, transformers or mmdetection format), got keys '
            f'{_some(keys, 3) or "(none)"}.')
    if len(found) > 1:
        raise ValueError(
            'Expected one model in the checkpoint, got several: '
            + ', '.join(f'{fmt} under {prefix!r}' for fmt, prefix in sorted(found)) + '.')
    if any('dwconv' in k for k in keys):
        raise ValueError("Expected a PVT v1 checkpoint, got PVT v2 ('dwconv' weights): use timm's pvt_v2 models.")
    return found.pop()


def unwrap(
        checkpoint: Mapping[str, Any],
        use_ema: bool = False,
) -> Tuple[Mapping[str, Any], Tuple[str, ...], Dict[str, str]]:
    """Open the wrappers of training checkpoints.

    Args:
        checkpoint: What a checkpoint file holds.
        use_ema: Take the averaged weights ('model_ema', 'state_dict_ema') where both are there.

    Returns:
        The state dict, the keys opened, outermost first, and the keys left with the reason.

    Raises:
        ValueError: Not a mapping, or `use_ema` without averaged weights.
    """
    wrappers: List[str] = []
    left: Dict[str, str] = {}
    order = _EMA_WRAPPERS + _WRAPPERS if use_ema else _WRAPPERS + _EMA_WRAPPERS
    while True:
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f'Expected a state dict, got {type(checkpoint).__name__}.')
        inner = next((k for k in order if isinstance(checkpoint.get(k), Mapping)), None)
        if inner is None or len(wrappers) == 4:
            break
        left.update({'.'.join((*wrappers, str(k))): f'beside {inner!r}' for k in checkpoint if k != inner})
        wrappers.append(inner)
        checkpoint = checkpoint[inner]
    if use_ema and not any(w in _EMA_WRAPPERS for w in wrappers):
        raise ValueError(f"Expected averaged weights ({' or '.join(_EMA_WRAPPERS)}), the checkpoint has none.")
    return checkpoint, tuple(wrappers), left


def _conv1x1(x: torch.Tensor, names: Iterable[str]) -> torch.Tensor:
    if x.ndim == 1:
        return x  # bias
    if x.ndim != 4 or tuple(x.shape[2:]) != (1, 1):
        raise ValueError(f'Expected a 1x1 convolution weight for {_some(names)}, got shape {list(x.shape)}.')
    return x[:, :, 0, 0]


def _restack(tensors: List[torch.Tensor], from_names: List[str], to: Tuple[_Template, ...]) -> List[torch.Tensor]:
    """Join `tensors` along dim 0 and cut the result by the row shares of `to`."""
    if len(tensors) > 1 and len({tuple(x.shape[1:]) for x in tensors} | {x.ndim for x in tensors}) != 2:
        raise ValueError(f'Expected like shapes for {_some(from_names)}, got {[list(x.shape) for x in tensors]}.')
    if len({x.dtype for x in tensors}) > 1:
        raise ValueError(f'Expected one dtype for {_some(from_names)}, got {[x.dtype for x in tensors]}.')
    x = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    if len(to) == 1:
        return [x]
    shares = [t.rows for t in to]
    if x.ndim == 0 or x.shape[0] % sum(shares):
        raise ValueError(
            f'Expected rows in multiples of {sum(shares)} in {_some(from_names)}, got shape {list(x.shape)}.')
    unit = x.shape[0] // sum(shares)
    return [y.clone() for y in x.split([unit * n for n in shares])]


def _remap(state_dict: Mapping[str, Any], fmt: str, to_timm: bool) -> Tuple[StateDict, List, List[str]]:
    """Apply a table in one direction. Returns the tensors, pairs of (new names, old names) and keys without a row."""
    by_groups: Dict[Any, Dict[int, str]] = {}
    unknown = []
    for key in state_dict:
        for n, rule in enumerate(_rules(fmt)):
            side = rule.source if to_timm else rule.timm
            hit = next(((part, m) for part, t in enumerate(side) if (m := t.match(key)) is not None), None)
            if hit:
                by_groups.setdefault((n, hit[1]), {})[hit[0]] = key
                break
        else:
            unknown.append(key)

    out: StateDict = {}
    pairs = []
    missing = []
    for (n, fields), parts in by_groups.items():
        rule = _rules(fmt)[n]
        have, want = (rule.source, rule.timm) if to_timm else (rule.timm, rule.source)
        if len(parts) != len(have):
            missing += [t.format(dict(fields)) for part, t in enumerate(have) if part not in parts]
            continue
        old = [parts[part] for part in range(len(have))]
        tensors = [state_dict[k] for k in old]
        bad = [k for k, x in zip(old, tensors) if not isinstance(x, torch.Tensor)]
        if bad:
            raise ValueError(f'Expected tensors, got {type(state_dict[bad[0]]).__name__} for {_some(bad)}.')
        if len(have) > 1:  # their shares have to be kept, or the stack could not be cut again
            units = {x.shape[0] / t.rows if x.ndim else None for x, t in zip(tensors, have)}
            if len(units) > 1:
                raise ValueError(f'Expected like row counts for {_some(old)}, got {[list(x.shape) for x in tensors]}.')
        if rule.conv1x1 and to_timm:
            tensors = [_conv1x1(x, old) for x in tensors]
        new = [t.format(dict(fields)) for t in want]
        tensors = _restack(tensors, old, want)
        if rule.conv1x1 and not to_timm:
            tensors = [x[:, :, None, None] if x.ndim == 2 else x for x in tensors]
        out.update(zip(new, tensors))
        pairs.append((tuple(new), tuple(old)))
    if missing:
        raise ValueError(f'Missing in the checkpoint: {_some(missing)}.')
    return out, pairs, unknown


def to_timm(state_dict: Mapping[str, torch.Tensor], fmt: str) -> Tuple[StateDict, List]:
    """Map a state dict of format `fmt` (no wrapper, no prefix) to timm's names.

    Returns:
        The state dict, and pairs of (timm names, source names).

    Raises:
        ValueError: A key without a row in the table, half of a pair, or a shape that the row cannot take. All named.
    """
    out, pairs, unknown = _remap(state_dict, fmt, to_timm=True)
    if unknown:
        raise ValueError(f'Not part of a PVT v1 model in {fmt} format: {_some(unknown)}.')
    return out, pairs


def from_timm(state_dict: Mapping[str, torch.Tensor], fmt: str) -> Tuple[StateDict, List]:
    """Map a state dict under timm's names to format `fmt`.

    Returns:
        The state dict, and pairs of (source names, timm names).

    Raises:
        ValueError: The format has no place for a parameter, all named. `drop_parts` leaves out what it may.
    """
    out, pairs, unknown = _remap(state_dict, fmt, to_timm=False)
    if unknown:
        raise ValueError(f'The {fmt} format has no place for {_some(unknown)}.')
    return out, pairs


def map_to_timm(
        checkpoint: Mapping[str, Any],
        use_ema: bool = False,
        prefix: Optional[str] = None,
) -> Converted:
    """Map any PVT v1 checkpoint, wrapped or prefixed or neither, to timm's names.

    A key next to the backbone (neck, detection head, optimizer) is dropped and listed. A key inside of it that is no
    PVT v1 parameter is an error.

    Args:
        checkpoint: What a checkpoint file holds.
        use_ema: Take averaged weights where both are there.

    Raises:
        ValueError: Not a PVT v1 checkpoint. The message names what is wrong.
    """
    state_dict, wrappers, dropped = unwrap(checkpoint, use_ema)
    fmt, prefix = detect(state_dict)
    inner: Dict[str, Any] = {}
    for key, value in state_dict.items():
        if isinstance(key, str) and key.startswith(prefix):
            inner[key[len(prefix):]] = value
        else:
            dropped['.'.join((*wrappers, str(key)))] = f'not under {prefix!r}'
    if fmt == 'transformers' and _TRANSFORMERS_BASE in inner:
        inner = {k if k.startswith('classifier.') else f'pvt.{k}': v for k, v in inner.items()}
    out, pairs = to_timm(inner, fmt)
    return Converted(out, fmt, wrappers, prefix, pairs, dropped)


def _need(state_dict: Mapping[str, torch.Tensor], key: str, ndim: int) -> torch.Tensor:
    x = state_dict.get(key)
    if x is None:
        raise ValueError(f'Missing in the checkpoint: {key}.')
    if x.ndim != ndim or 0 in x.shape:
        raise ValueError(f'Expected {ndim} dimensions, none of them 0, for {key}, got shape {list(x.shape)}.')
    return x


def describe(state_dict: Mapping[str, torch.Tensor], img_size: Optional[Tuple[int, int]] = None) -> Description:
    """Read the architecture off a state dict under timm's names.

    Args:
        state_dict: Tensors under timm's names.
        img_size: Image size of the position embeddings, taken if it fits them, else a square one is.

    Raises:
        ValueError: A parameter that this needs is missing or has the wrong number of dimensions, or the sizes of the
            position embeddings belong to no image size.
    """
    depths = []
    for i in range(4):
        found = {int(m.group(1)) for m in (re.match(rf'stages\.{i}\.blocks\.(\d+)\.', k) for k in state_dict) if m}
        depth = max(found, default=-1) + 1
        if len(found) != depth or not depth:
            gap = next(j for j in range(depth + 1) if j not in found)
            raise ValueError(f'Missing in the checkpoint: stages.{i}.blocks.{gap}.')
        depths.append(depth)
    projs = [_need(state_dict, f'stages.{i}.patch_embed.proj.weight', 4) for i in range(4)]
    dims = tuple(x.shape[0] for x in projs)
    fc1s = [_need(state_dict, f'stages.{i}.blocks.0.mlp.fc1.weight', 2) for i in range(4)]
    sr_ratios = tuple(
        _need(state_dict, key, 4).shape[-1] if (key := f'stages.{i}.blocks.0.attn.sr.weight') in state_dict else 1
        for i in range(4))
    counts = [_need(state_dict, f'stages.{i}.pos_embed', 3).shape[1] for i in range(4)]
    class_token = _CLS_TOKEN in state_dict
    patch_size = projs[0].shape[-1]
    hint = (img_size[0] // patch_size, img_size[1] // patch_size) if img_size else None
    grid_size, prefix = source_grid(counts, hint, class_row=True if class_token else None)
    head = state_dict.get('head.weight')
    return Description(
        depths=tuple(depths),
        embed_dims=dims,
        sr_ratios=sr_ratios,
        mlp_ratios=tuple(x.shape[0] / d for x, d in zip(fc1s, dims)),
        patch_size=patch_size,
        in_chans=projs[0].shape[1],
        num_classes=head.shape[0] if head is not None and head.ndim else 0,
        class_token=class_token,
        class_row=bool(prefix),
        norm='norm.weight' in state_dict,
        grid_size=grid_size,
        dtype=projs[0].dtype,
    )


def drop_parts(state_dict: Mapping[str, torch.Tensor], parts: Iterable[str], class_row: bool = True) -> StateDict:
    """Leave out named parts of a state dict under timm's names.

    Args:
        state_dict: Tensors under timm's names.
        parts: Any of 'class_token' (with its row of the position embedding), 'norm', 'head'.
        class_row: Whether the last position embedding has a row for the class token (see `describe`).
    """
    out = dict(state_dict)
    for part in parts:
        if part == 'class_token':
            out.pop(_CLS_TOKEN, None)
            if class_row:
                out['stages.3.pos_embed'] = out['stages.3.pos_embed'][:, 1:]
        elif part in ('norm', 'head'):
            out = {k: v for k, v in out.items() if not k.startswith(f'{part}.')}
        else:
            raise ValueError(f"Expected 'class_token', 'norm' or 'head', got {part!r}.")
    return out


def fit_to_model(
        checkpoint: Mapping[str, Any],
        model: torch.nn.Module,
        prefix: Optional[str] = None,
) -> Tuple[StateDict, Description]:
    """Map any PVT v1 checkpoint to the names of a `PyramidVisionTransformer`, without the parts that it does not have.

    Args:
        checkpoint: What a checkpoint file holds.
        model: The model. Its class token, norm and head are looked at.
        prefix: See `map_to_timm`.

    Returns:
        The state dict, its position embeddings on their own grid, and what it says about its model.

    Raises:
        ValueError: Not a PVT v1 checkpoint, of another variant, or of a dense backbone where a classifier is wanted.
    """
    converted = map_to_timm(checkpoint, prefix=prefix)
    state_dict = converted.state_dict
    img_size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if img_size is not None:
        img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    patch_size = model.stages[0].patch_embed.patch_size
    model_size = tuple(n * patch_size for n in model.stages[0].grid_size)
    if img_size is None and converted.format.startswith('timm'):
        # A native checkpoint that fits the model's grid is taken at its word, that grid may be non-square.
        img_size = model_size
    try:
        info = describe(state_dict, img_size)
    except ValueError:
        info = describe(state_dict, model_size)  # no square grid fits, the model's may
    if (info.depths, info.embed_dims) != (tuple(model.depths), tuple(model.embed_dims)):
        raise ValueError(
            f'Expected a checkpoint with depths {tuple(model.depths)} and channels {tuple(model.embed_dims)}, got '
            f'{info.depths} and {info.embed_dims}.')
    if model.class_token and not info.class_token:
        raise ValueError(
            'Expected a checkpoint with class token, got the one of a dense backbone (detector, segmenter): '
            'create the model with features_only=True, or class_token=False and num_classes=0.')
    reference = model.state_dict()
    parts = [] if model.class_token or not (info.class_token or info.class_row) else ['class_token']
    parts += [part for part in ('norm', 'head') if f'{part}.weight' not in reference]
    return drop_parts(state_dict, parts, info.class_row), info


def check_keys(
        state_dict: Mapping[str, torch.Tensor],
        reference: Mapping[str, torch.Tensor],
        ignore: Iterable[str] = (),
        what: str = 'the checkpoint',
) -> None:
    """Refuse a state dict that does not have the names and shapes of another one.

    Args:
        state_dict: The state dict.
        reference: That of the model.
        ignore: Names that may be missing, extra or of another shape.
        what: What holds the state dict, for the message.

    Raises:
        ValueError: Names are missing or extra, or shapes differ. The first ones are named.
    """
    missing = [k for k in reference if k not in state_dict and k not in ignore]
    if missing:
        raise ValueError(f'Missing in {what}: {_some(missing)}.')
    extra = [k for k in state_dict if k not in reference and k not in ignore]
    if extra:
        raise ValueError(f'Not part of the model, in {what}: {_some(extra)}.')
    wrong = [f'{k} {list(state_dict[k].shape)} instead of {list(v.shape)}'
             for k, v in reference.items() if k not in ignore and state_dict[k].shape != v.shape]
    if wrong:
        raise ValueError(f'Wrong shape in {what}: {_some(wrong)}.')
