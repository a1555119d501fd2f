""" PVT v1 checkpoints: what a state dict is, and how it maps to timm's names and back.

Pure functions on dicts of tensors, no files, no network. There is one table per source. A row says which timm
parameters and which source parameters hold the same numbers, so the same row serves both directions.

Placeholders: {i} stage and {j} block counted from 0, {s} stage and {b} block counted from 1, {p} weight or bias,
{layer} what timm and the original code name alike in a block.
"""
import argparse
import logging
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

import torch

__all__ = [
    'ANCHORS', 'FORMATS', 'Converted', 'Description', 'check_keys', 'describe', 'drop_parts', 'fit_to_model',
    'from_timm', 'map_to_timm', 'remap', 'stage_grids', 'training_config', 'unwrap',
]

_logger = logging.getLogger(__name__)

StateDict = Dict[str, torch.Tensor]
Pairs = List[Tuple[Tuple[str, ...], Tuple[str, ...]]]
Table = Tuple[Tuple[Any, ...], ...]
Grid = Tuple[int, int]  # height, width

# A row is (timm parameters, source parameters[, what is done to each on the way to timm and on the way back]). Where a
# side has several parameters they are stacked along dim 0 in the order given, `*2` is a stack of two.
_ORIGINAL = (
    # timm                                   classification/pvt.py, detection/pvt.py, segmentation/pvt.py
    ('stages.{i}.pos_embed',                 'pos_embed{s}'),
    ('stages.3.cls_token',                   'cls_token'),
    ('stages.{i}.patch_embed.proj.{p}',      'patch_embed{s}.proj.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'patch_embed{s}.norm.{p}'),
    ('stages.{i}.blocks.{j}.{layer}.{p}',    'block{s}.{j}.{layer}.{p}'),
    ('norm.{p}',                             'norm.{p}'),
    ('head.{p}',                             'head.{p}'),
)

_TIMM = tuple((row[0].replace('.3.', '.{i}.'),) * 2 for row in _ORIGINAL)

# `features_only=True` models flatten the stages into their own names
_TIMM_FEATURES = tuple((timm, source.replace('stages.', 'stages_')) for timm, source in _TIMM)

_TRANSFORMERS = (
    # timm                                   transformers PvtForImageClassification
    ('stages.{i}.pos_embed',                 'pvt.encoder.patch_embeddings.{i}.position_embeddings'),
    ('stages.3.cls_token',                   'pvt.encoder.patch_embeddings.3.cls_token'),
    ('stages.{i}.patch_embed.proj.{p}',      'pvt.encoder.patch_embeddings.{i}.projection.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'pvt.encoder.patch_embeddings.{i}.layer_norm.{p}'),
    ('stages.{i}.blocks.{j}.norm1.{p}',      'pvt.encoder.block.{i}.{j}.layer_norm_1.{p}'),
    ('stages.{i}.blocks.{j}.attn.q.{p}',     'pvt.encoder.block.{i}.{j}.attention.self.query.{p}'),
    ('stages.{i}.blocks.{j}.attn.kv.{p}*2', ('pvt.encoder.block.{i}.{j}.attention.self.key.{p}',
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

# A linear weight is a 1x1 convolution there. Other kernels stay, to be refused by their shape.
_CONV1X1 = (lambda x: x[:, :, 0, 0] if x.shape[2:] == (1, 1) else x, lambda x: x[..., None, None] if x.ndim == 2 else x)

_MMDET = (
    # timm                                   mmdetection PyramidVisionTransformer (no class token, norm and head)
    ('stages.{i}.pos_embed',                 'layers.{i}.1.0.pos_embed'),
    ('stages.{i}.patch_embed.proj.{p}',      'layers.{i}.0.projection.{p}'),
    ('stages.{i}.patch_embed.norm.{p}',      'layers.{i}.0.norm.{p}'),
    ('stages.{i}.blocks.{j}.norm1.{p}',      'layers.{i}.1.{b}.norm1.{p}'),
    (('stages.{i}.blocks.{j}.attn.q.{p}',
      'stages.{i}.blocks.{j}.attn.kv.{p}*2'), 'layers.{i}.1.{b}.attn.attn.in_proj_{p}*3'),
    ('stages.{i}.blocks.{j}.attn.sr.{p}',    'layers.{i}.1.{b}.attn.sr.{p}'),
    ('stages.{i}.blocks.{j}.attn.norm.{p}',  'layers.{i}.1.{b}.attn.norm.{p}'),
    ('stages.{i}.blocks.{j}.attn.proj.{p}',  'layers.{i}.1.{b}.attn.attn.out_proj.{p}'),
    ('stages.{i}.blocks.{j}.norm2.{p}',      'layers.{i}.1.{b}.norm2.{p}'),
    ('stages.{i}.blocks.{j}.mlp.fc1.{p}',    'layers.{i}.1.{b}.ffn.layers.0.{p}', _CONV1X1),
    ('stages.{i}.blocks.{j}.mlp.fc2.{p}',    'layers.{i}.1.{b}.ffn.layers.3.{p}', _CONV1X1),
)

_HEAD = r'head\.(?:weight|bias)'
# format -> (table, how its names start: others stand beside it)
FORMATS: Dict[str, Tuple[Table, str]] = {
    'timm': (_TIMM, rf'(?:stages|norm\d*|{_HEAD})\b'),
    'timm_features': (_TIMM_FEATURES, rf'(?:stages_\d+|norm\d*|{_HEAD})\b'),
    'original': (_ORIGINAL, rf'(?:pos_embed\d|cls_token|patch_embed\d|block\d|norm\d*|{_HEAD})\b'),
    'transformers': (_TRANSFORMERS, r'(?:pvt|encoder|classifier\.(?:weight|bias))\b'),
    'mmdet': (_MMDET, r'(?:layers|norm\d*)\b'),
}
# The first weight tells a format, after whatever stands before all names. transformers' PvtModel has no 'pvt.' there.
ANCHORS = {
    fmt: next(row[1] for row in table if row[0] == 'stages.{i}.patch_embed.proj.{p}').format(i=0, s=1, p='weight')
    for fmt, (table, _) in FORMATS.items()}
_anchors = '|'.join(f'(?P<{fmt}>{re.escape(anchor)})' for fmt, anchor in ANCHORS.items())
_ANCHOR = re.compile(rf'(|.*?\.)(?:{_anchors})'.replace(r'pvt\.', r'(?:pvt\.)?'))

_OTHER_FAMILIES = (
    (r'dwconv|\.ffn\.layers\.1\.weight$', "PVT v2 or SegFormer: see timm's pvt_v2 models"),
    (r'relative_position_bias_table', 'Swin'),
    (r'\.attn\.qkv\.|attention\.attention\.query\.', 'ViT'),
    (r'pos_block\.', 'Twins'),
    (r'layer1\.0\.conv1\.', 'ResNet'),
)

_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')  # in timm's order: averaged weights are preferred
_USUAL_PREFIX = re.compile(
    r'(?:(?:module|_orig_mod|model|net|timm_model|encoder\.model|backbone|body|model_state_dict)\.)*')
_PLACEHOLDERS = {
    **dict.fromkeys('ij', r'0|[1-9]\d{0,3}'),  # as it is written: no '01'
    **dict.fromkeys('sb', r'[1-9]\d{0,3}'),
    'p': 'weight|bias',
    'n': 'weight|bias|running_mean|running_var|num_batches_tracked',
    'layer': r'norm[12]|attn\.(?:q|kv|sr|norm|proj)|mlp\.fc[12]',
}


@dataclass
class Converted:
    """A state dict under timm's names, and an account of every key of its source."""
    state_dict: StateDict
    raw: StateDict  # the same weights under the names of the format
    beside: Dict[Any, Any]  # what stands beside them in the innermost dict, under its own names
    format: str  # key of `FORMATS`
    wrappers: Tuple[str, ...]  # keys that were opened to reach the weights, outermost first
    prefix: str  # what stood before every name
    mapped: Pairs  # (timm names, source names) that hold the same numbers
    dropped: Dict[str, str]  # key or group ('decoder.*') left out: how many or why


@dataclass(frozen=True)
class Description:
    """What a state dict under timm's names says about its model."""
    depths: Tuple[int, ...]
    embed_dims: Tuple[int, ...]
    sr_ratios: Tuple[int, ...]  # spatial reduction per stage
    mlp_ratios: Tuple[float, ...]
    patch_size: int  # of the first stage
    in_chans: int
    num_classes: int  # 0 without head
    class_token: bool
    class_row: bool  # the last position embedding starts with a row for the class token
    norm: bool  # the final norm is there
    grid_size: Grid  # of the first stage's position embedding
    dtype: torch.dtype  # of the first weight

    @property
    def img_size(self) -> Grid:
        """Smallest height and width in pixels that give `grid_size`."""
        return self.grid_size[0] * self.patch_size, self.grid_size[1] * self.patch_size


def stage_grids(grid_size: Grid, num_stages: int) -> List[Grid]:
    """Grids (height, width) of all stages, from that of the first one. Every stage halves and floors."""
    return [(grid_size[0] // 2 ** i, grid_size[1] // 2 ** i) for i in range(num_stages)]


def _some(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(map(str, names[:limit])) + more


def _choose(keys: Iterable[Any], prefix: Optional[str]) -> Tuple[str, str]:
    """Format and prefix of the one PVT among the keys, or of the one under `prefix`. Else what there is, is named."""
    keys = [k for k in keys if isinstance(k, str)]
    found = sorted({(m.lastgroup or '', m[1]) for m in map(_ANCHOR.fullmatch, keys) if m})
    if not found:
        other = next((name for pattern, name in _OTHER_FAMILIES if any(re.search(pattern, k) for k in keys)), None)
        raise ValueError(
            f'Expected a PVT v1 checkpoint (timm, original, transformers or mmdetection format), got '
            f'{other or f"keys {_some(keys, 3) or None}"}.')
    wanted = [x for x in found if prefix is None or x[1].rstrip('.') == prefix.rstrip('.')]
    if len(wanted) != 1:
        there = ', '.join(f'{before!r} ({fmt})' for fmt, before in found)
        what = 'one PVT in the checkpoint, got several' if prefix is None else f'a PVT under prefix {prefix!r}, got'
        raise ValueError(f'Expected {what}: {there}. Say with prefix= (--prefix) which one to take.')
    return wanted[0]


def unwrap(
        checkpoint: Mapping[str, Any], use_ema: bool = True,
) -> Tuple[Mapping[str, Any], Tuple[str, ...], Dict[str, str]]:
    """Open the wrappers of training checkpoints, with `use_ema` to averaged weights where both are there.

    Returns:
        The state dict, the keys opened, outermost first, and the keys left with the reason. What is in dicts under
        other names has the keys '{name}.{key}'.
    """
    wrappers: List[str] = []
    left: Dict[str, str] = {}
    order = _WRAPPERS if use_ema else _WRAPPERS[2:] + _WRAPPERS[:2]
    while True:
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f'Expected a state dict, got {type(checkpoint).__name__}.')
        inner = next((k for k in order if isinstance(checkpoint.get(k), Mapping) and checkpoint[k]), None)
        if inner is None or len(wrappers) == 4:
            break
        left.update({'.'.join((*wrappers, str(k))): f'beside {inner!r}' for k in checkpoint if k != inner})
        wrappers.append(inner)
        checkpoint = checkpoint[inner]
    flat: Dict[str, Any] = {}
    for key, value in checkpoint.items():
        if isinstance(value, Mapping) and value:
            flat.update({f'{key}.{k}': v for k, v in value.items()})
        else:
            flat[key] = value
    return flat, tuple(wrappers), left


def _side(side: Any) -> Tuple[List[str], List[int]]:
    """The templates of one side of a row, and of how many pieces each is a stack."""
    parts = [x.partition('*') for x in ((side,) if isinstance(side, str) else side)]
    return [template for template, _, _ in parts], [int(n or 1) for _, _, n in parts]


def _regex(template: str) -> 're.Pattern[str]':
    return re.compile(re.sub(r'\\\{(\w+)\\\}', lambda m: f'(?P<{m[1]}>{_PLACEHOLDERS[m[1]]})', re.escape(template)))


def _fill(templates: Iterable[str], match: 're.Match[str]') -> Tuple[str, ...]:
    fields: Dict[str, Any] = {k: int(v) if k in 'ijsb' else v for k, v in match.groupdict().items()}
    i, j = fields.get('i', fields.get('s', 1) - 1), fields.get('j', fields.get('b', 1) - 1)
    return tuple(t.format(**{**fields, 'i': i, 's': i + 1, 'j': j, 'b': j + 1}) for t in templates)


def _restack(
        tensors: List[torch.Tensor], names: Iterable[str], have: List[int], want: List[int]) -> List[torch.Tensor]:
    """Cut stacks of `have` pieces, which have to be alike, and join them to stacks of `want` pieces."""
    if len(have) == len(want) == 1:
        return tensors
    pieces = [y for x, n in zip(tensors, have) for y in torch.atleast_1d(x).tensor_split(n)]
    if len({(x.dtype, x.shape) for x in pieces}) > 1:
        raise ValueError(
            f'Expected types and shapes that fit together for {_some(names)}, got '
            f'{[(x.dtype, list(x.shape)) for x in tensors]}.')
    return [torch.cat([pieces.pop(0) for _ in range(n)]) for n in want]


def remap(state_dict: Mapping[str, Any], table: Table, to_timm: bool = True) -> Tuple[StateDict, Pairs, List[str]]:
    """Apply a table of names in one direction, to our names or from them.

    Returns:
        The tensors, pairs of (new names, old names), and the keys that no row has.
    """
    rows = [(_side(row[to_timm]), _side(row[not to_timm]), [ways[not to_timm] for ways in row[2:]]) for row in table]
    templates = [(_regex(template), row) for row in rows for template in row[0][0]]
    out: StateDict = {}
    pairs: Pairs = []
    done: Set[str] = set()
    unknown = []
    for key in state_dict:
        if key in done:
            continue
        found = next(((m, row) for regex, row in templates if (m := regex.fullmatch(key))), None)
        if found is None:
            unknown.append(key)
            continue
        match, ((have, have_pieces), (want, want_pieces), forms) = found
        old, new = _fill(have, match), _fill(want, match)
        missing = [k for k in old if k not in state_dict]
        if missing:
            raise ValueError(f'Missing in the checkpoint: {_some(missing)}.')
        tensors = [state_dict[k] for k in old]
        for k, x in zip(old, tensors):
            if not isinstance(x, torch.Tensor):
                cure = ' (make it one with torch.from_numpy)' if hasattr(x, '__array__') else ''
                raise ValueError(f'Expected a tensor for {k}, got {type(x).__name__}{cure}.')
        tensors = _restack(tensors, old, have_pieces, want_pieces)
        for form in forms:
            tensors = [form(x) if x.ndim else x for x in tensors]
        out.update(zip(new, tensors))
        pairs.append((new, old))
        done.update(old)
    return out, pairs, unknown


def from_timm(state_dict: Mapping[str, torch.Tensor], fmt: str) -> Tuple[StateDict, Pairs]:
    """Map a state dict under timm's names to format `fmt`, with pairs of (source names, timm names).

    What the format has no place for is refused. `drop_parts` leaves it out.
    """
    out, pairs, unknown = remap(state_dict, FORMATS[fmt][0], to_timm=False)
    if unknown:
        raise ValueError(f'The {fmt} format has no place for {_some(unknown)}.')
    return out, pairs


def map_to_timm(checkpoint: Mapping[str, Any], use_ema: bool = True, prefix: Optional[str] = None) -> Converted:
    """Map any PVT v1 checkpoint to timm's names: of any format, wrapped or not, inside of any model.

    What stands beside the PVT (neck, detection head, decoder, optimizer) is dropped and listed by group. A key inside
    of it that is no PVT v1 parameter is an error.

    Args:
        checkpoint: What a checkpoint file holds.
        use_ema: As in timm, prefer averaged weights where both are there.
        prefix: What stands before the names, needed where there are several PVTs.

    Raises:
        ValueError: Not a PVT v1 checkpoint. The message names what is wrong.
    """
    state_dict, wrappers, dropped = unwrap(checkpoint, use_ema)
    fmt, before = _choose(state_dict, prefix)
    inner = {k: k[len(before):] for k in state_dict if isinstance(k, str) and k.startswith(before)}
    parts = {k: name for k, name in inner.items() if re.match(FORMATS[fmt][1], name)}
    beside = {k: v for k, v in state_dict.items() if k not in parts}
    groups = sorted(Counter(_group(str(k), before) for k in beside).items())
    dropped.update({'.'.join((*wrappers, group)): f'{n} beside the PVT' for group, n in groups})
    usual = prefix is not None or not groups or _USUAL_PREFIX.fullmatch(before) and len(parts) == len(inner)
    _logger.log(
        logging.INFO if usual else logging.WARNING,
        f'Taken from the checkpoint: a PVT in {fmt} format under prefix {before!r}. Left out: '
        f'{", ".join(f"{group}: {n}" for group, n in groups) or "nothing"}.')
    base = f'{before}encoder.patch_embeddings.0.projection.weight' in parts  # transformers' PvtModel
    tensors = {f'pvt.{x}' if base and x.startswith('encoder.') else x: state_dict[k] for k, x in parts.items()}
    out, pairs, unknown = remap(tensors, FORMATS[fmt][0])
    if unknown:  # PVT v2 has PVT v1's names and more
        raise ValueError(f"Not part of a PVT v1 model in {fmt} format (for v2 see timm's pvt_v2): {_some(unknown)}.")
    return Converted(out, tensors, beside, fmt, wrappers, before, pairs, dropped)


def _group(key: str, prefix: str) -> str:
    """The first part of a key that is not in the prefix, as 'net.decoder.*'."""
    while not key.startswith(prefix):
        prefix = prefix[:prefix.rstrip('.').rfind('.') + 1]
    part, dot, _ = key[len(prefix):].partition('.')
    return f'{prefix}{part}.*' if dot else key


def training_config(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """What a checkpoint of timm's train.py, of Lightning or of OpenMMLab says about its training.

    Returns:
        Those of these that it says: 'img_size' ((height, width)), 'mean' and 'std' (a number per channel), 'crop_pct'
        (float), 'interpolation' and 'global_pool' (str), 'label_names' (list of str), 'palette' (a colour per name).
    """
    def settings(x: Any) -> Mapping[Any, Any]:
        x = vars(x) if isinstance(x, argparse.Namespace) else x
        return x if isinstance(x, Mapping) else {}

    groups = [settings(checkpoint.get(k)) for k in ('meta', 'hyper_parameters', 'args')]
    inner = [settings(v) for group in groups for v in group.values()]
    said = {k: v for group in (*reversed(inner), *groups) for k, v in group.items() if v is not None}

    def first(*names: str, of: Any = object) -> Any:
        return next((said[k] for k in names if k in said and isinstance(said[k], of)), None)

    def numbers(*names: str, low: float = 1e-9) -> Tuple[float, ...]:
        x = first(*names)
        try:
            values = tuple(float(v) for v in (x if hasattr(x, '__len__') else (x,)))
        except (TypeError, ValueError, OverflowError):
            return ()
        return values if len(values) <= 16 and all(low <= v < 2 ** 16 for v in values) else ()

    labels = first('label_names', 'class_names', 'classes', 'CLASSES', of=(list, tuple))
    found = {
        'img_size': tuple(map(int, (numbers('input_size', 'img_size', 'image_size', low=1) * 2)[-2:])),
        'mean': numbers('mean', low=0.),
        'std': numbers('std'),
        'crop_pct': next(iter(numbers('crop_pct')), None),
        'interpolation': first('interpolation', of=str),
        'global_pool': first('global_pool', 'gp', of=str),
        'label_names': [str(x) for x in labels or ()],
        'palette': first('palette', 'PALETTE', of=(list, tuple)),
    }
    return {k: v for k, v in found.items() if v}


def _need(state_dict: Mapping[str, torch.Tensor], key: str, ndim: int) -> torch.Tensor:
    x = state_dict.get(key)
    if x is None:
        raise ValueError(f'Missing in the checkpoint: {key}.')
    if x.ndim != ndim or 0 in x.shape:
        raise ValueError(f'Expected {ndim} dimensions, none of them 0, for {key}, got shape {list(x.shape)}.')
    return x


def describe(state_dict: Mapping[str, torch.Tensor], *img_sizes: Optional[Grid]) -> Description:
    """Read the architecture off a state dict under timm's names.

    Args:
        img_sizes: Image sizes to try for the position embeddings, in turn. None, also the last, is a square one.
    """
    matches = filter(None, (re.match(r'stages\.(\d+)\.blocks\.(\d+)\.', k) for k in state_dict))
    blocks = {(int(m[1]), int(m[2])) for m in matches}
    depths = Counter(i for i, _ in blocks)
    stages = range(max(depths, default=3) + 1)
    gap = next(((i, j) for i in stages for j in range(depths[i] or 1) if (i, j) not in blocks), None)
    if gap:
        raise ValueError('Missing in the checkpoint: stages.{}.blocks.{}.'.format(*gap))
    projs = [_need(state_dict, f'stages.{i}.patch_embed.proj.weight', 4) for i in stages]
    fc1s = [_need(state_dict, f'stages.{i}.blocks.0.mlp.fc1.weight', 2) for i in stages]
    srs = [f'stages.{i}.blocks.0.attn.sr.weight' for i in stages]
    counts = [_need(state_dict, f'stages.{i}.pos_embed', 3).shape[1] for i in stages]
    class_token = f'stages.{stages[-1]}.cls_token' in state_dict
    patch_size = projs[0].shape[-1]
    side = math.isqrt(counts[0])
    for size in (*img_sizes, None):
        grid_size = (size[0] // patch_size, size[1] // patch_size) if size else (side, side)
        *rows, last = (h * w for h, w in stage_grids(grid_size, len(counts)))
        class_rows = counts[-1] - last
        if last and rows == counts[:-1] and class_rows in ((1,) if class_token else (0, 1)):
            break
    else:
        raise ValueError(
            f'Expected position embeddings whose grid halves in height and width per stage, of square images or of the '
            f'size that is given, got {counts} rows. Pass img_size if they are of others.')
    head = any(k.startswith('head.') for k in state_dict)
    return Description(
        depths=tuple(depths[i] for i in stages),
        embed_dims=tuple(x.shape[0] for x in projs),
        sr_ratios=tuple(_need(state_dict, key, 4).shape[-1] if key in state_dict else 1 for key in srs),
        mlp_ratios=tuple(fc1.shape[0] / proj.shape[0] for fc1, proj in zip(fc1s, projs)),
        patch_size=patch_size,
        in_chans=projs[0].shape[1],
        num_classes=_need(state_dict, 'head.weight', 2).shape[0] if head else 0,
        class_token=class_token,
        class_row=bool(class_rows),
        norm='norm.weight' in state_dict,
        grid_size=grid_size,
        dtype=projs[0].dtype,
    )


def drop_parts(state_dict: Mapping[str, torch.Tensor], parts: Sequence[str], class_row: bool = True) -> StateDict:
    """Leave out parts of a state dict under timm's names.

    Args:
        parts: Any of 'class_token' (with its row of the position embedding), 'norm', 'head'.
        class_row: Whether the last position embedding has a row for the class token (see `describe`).
    """
    out = {k: v for k, v in state_dict.items() if k.partition('.')[0] not in parts}
    if 'class_token' in parts:
        out = {k: v for k, v in out.items() if not k.endswith('.cls_token')}
        if class_row:
            last = max(k for k in out if k.endswith('.pos_embed'))
            out[last] = out[last][:, 1:]
    return out


def fit_to_model(
        checkpoint: Mapping[str, Any], model: Any, prefix: Optional[str] = None) -> Tuple[StateDict, Description]:
    """Map any PVT v1 checkpoint to the names of a `PyramidVisionTransformer`, without the parts that it does not have.

    Returns:
        The state dict, its position embeddings on their own grid, and what it says about its model.
    """
    converted = map_to_timm(checkpoint, prefix=prefix)
    state_dict = converted.state_dict
    told = getattr(model, 'pretrained_model_args', {}).get('img_size')
    told = (told, told) if isinstance(told, int) else told
    height, width = (n * model.stages[0].patch_embed.patch_size for n in model.stages[0].grid_size)
    # A native checkpoint that fits the grid of the model is taken at its word, that grid may be non-square.
    native = (height, width) if converted.format.startswith('timm') else None
    info = describe(state_dict, told or native, None, (height, width))
    if model.class_token and not info.class_token:
        raise ValueError(
            'Expected a checkpoint with class token, got the one of a dense backbone (detector, segmenter): '
            'create the model with features_only=True, or class_token=False and num_classes=0.')
    reference = model.state_dict()
    parts = [] if model.class_token else ['class_token']
    parts += [part for part in ('norm', 'head') if f'{part}.weight' not in reference]
    return drop_parts(state_dict, parts, info.class_row), info


def check_keys(state_dict: StateDict, reference: StateDict, ignore: Iterable[str] = ()) -> None:
    """Refuse a state dict that does not have the names and shapes of `reference`, but for the names in `ignore`."""
    got, want = ({k: list(getattr(v, 'shape', ())) for k, v in x.items() if k not in ignore}
                 for x in (state_dict, reference))
    for what, names in (
            ('Missing', [k for k in want if k not in got]),
            ('Not part of the model,', [k for k in got if k not in want]),
            ('Wrong shape', [f'{k} {got[k]} instead of {n}' for k, n in want.items() if got.get(k, n) != n])):
        if names:
            raise ValueError(f'{what} in the checkpoint: {_some(names)}.')
