""" Map any checkpoint to timm's names, and back. Pure functions on dicts of tensors: no files, no network. """
import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import torch

from . import FORMATS
from .architecture import Architecture, describe, drop_parts
from .format import Format
from .names import NamePairs, StateDict, some_names, to_ours, to_theirs
from .values import shown
from .wrappers import unwrap

__all__ = ['Converted', 'fit_to_model', 'from_timm', 'map_to_timm']

_logger = logging.getLogger(__name__)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_OTHER_FAMILIES = (
    # pattern that is found in the keys of another family of models, name of the family
    (r'dwconv|\.ffn\.layers\.1\.weight$', "PVT v2 or SegFormer: see timm's pvt_v2 models"),
    (r'relative_position_bias_table', 'Swin'),
    (r'\.attn\.qkv\.|attention\.attention\.query\.', 'ViT'),
    (r'pos_block\.', 'Twins'),
    (r'layer1\.0\.conv1\.', 'ResNet'),
)
# Prefixes that well-known packages put before the names of a backbone. They cause no warning.
_USUAL_PREFIX = re.compile(
    r'(?:(?:module|_orig_mod|model|net|timm_model|encoder\.model|backbone|body|model_state_dict)\.)*')


@dataclass
class Converted:
    """A state dict under timm's names, and what became of every key of its source."""
    state_dict: StateDict
    raw: StateDict  # the same weights under the names of the format
    beside: Dict[Any, Any]  # entries of the innermost dict that are not weights of the PVT, under their names there
    format: str  # key of `FORMATS`
    wrappers: Tuple[str, ...]  # keys that were opened to reach the weights, outermost first
    prefix: str  # the part before every name
    mapped: NamePairs  # pairs of (timm names, source names) that hold the same numbers
    dropped: Dict[str, str]  # for every key or group of keys ('decoder.*') that was left out: how many, or why


def map_to_timm(
        checkpoint: Mapping[str, Any],
        use_ema: bool = True,
        prefix: Optional[str] = None,
        quiet: bool = False,
) -> Converted:
    """Map any PVT v1 checkpoint to timm's names: of any format, wrapped or not, inside of any model.

    Keys outside of the PVT (neck, detection head, decoder, optimizer) are dropped and listed by group. A key inside of
    the PVT that is no parameter of PVT v1 is an error.

    Args:
        checkpoint: Content of a checkpoint file.
        use_ema: Whether averaged weights are used if there are both averaged and plain ones, as in timm.
        prefix: The part before the names of the PVT. It is needed if there are several PVTs.
        quiet: Whether nothing is logged about keys that are left out.

    Raises:
        ValueError: It is not a PVT v1 checkpoint, or its weights are not floating point numbers. The message names what
            is wrong.
    """
    state_dict, wrappers, dropped = unwrap(checkpoint, use_ema)
    fmt, before = _choose(state_dict, prefix)
    parts: Dict[str, Any] = {}  # by their names without the prefix
    beside: Dict[Any, Any] = {}
    others_inside = 0  # keys under the prefix that are not of the PVT
    for key, value in state_dict.items():
        name = key[len(before):] if isinstance(key, str) and key.startswith(before) else None
        if name is not None and fmt.start.match(name):
            parts[name] = value
        else:
            beside[key] = value
            others_inside += name is not None
    groups = sorted(Counter(_group(str(key), before) for key in beside).items())
    dropped.update({'.'.join((*wrappers, group)): f'{n} beside the PVT' for group, n in groups})

    # No warning if the caller gave the prefix, if nothing was left out, or if the prefix is a usual one and nothing but
    # the PVT has it.
    usual = bool(_USUAL_PREFIX.fullmatch(before)) and not others_inside
    no_warning = prefix is not None or not groups or usual
    if not quiet:
        _logger.log(logging.INFO if no_warning else logging.WARNING, _account(fmt, before, groups))

    raw = fmt.full_names(parts)
    out, pairs, unknown = to_ours(raw, fmt.table)
    if unknown:  # PVT v2 has PVT v1's names and more
        raise ValueError(
            f"Not part of a PVT v1 model in {fmt.name} format (for v2 see timm's pvt_v2): {some_names(unknown)}.")
    for key, value in out.items():
        if value.dtype not in _FLOATS or value.layout != torch.strided:
            raise ValueError(f'Expected floating point weights, {key} has type {value.dtype}.')
    return Converted(out, raw, beside, fmt.name, wrappers, before, pairs, dropped)


def from_timm(state_dict: Mapping[str, torch.Tensor], fmt: str) -> Tuple[StateDict, NamePairs]:
    """Map a state dict under timm's names to format `fmt`, with pairs of (source names, timm names).

    Parameters that the format cannot store are refused. `drop_parts` leaves them out before.
    """
    out, pairs, unknown = to_theirs(state_dict, FORMATS[fmt].table)
    if unknown:
        raise ValueError(f'The {fmt} format has no place for {some_names(unknown)}.')
    return out, pairs


def fit_to_model(checkpoint: Mapping[str, Any], model: Any) -> Tuple[StateDict, Architecture, str]:
    """Map any PVT v1 checkpoint to the names of a `PyramidVisionTransformer`, without the parts that the model lacks.

    Returns:
        The state dict (its position embeddings are not resized), the architecture that it describes, and the name of
        the checkpoint's format.
    """
    converted = map_to_timm(checkpoint)
    state_dict = converted.state_dict
    told = getattr(model, 'pretrained_model_args', {}).get('img_size')  # what a config on the hub says
    patch_size = model.stages[0].patch_embed.patch_size
    height, width = (n * patch_size for n in model.stages[0].grid_size)
    info = describe(
        state_dict,
        img_size=(told, told) if isinstance(told, int) else told,
        other_sizes=[(height, width)],
        prefer_square=FORMATS[converted.format].prefers_square,
    )
    all_stages = len(info.depths) == len(model.depths)  # otherwise the caller compares the depths and names them
    if all_stages and model.class_token and not info.class_token:
        raise ValueError(
            'Expected a checkpoint with class token, got the one of a dense backbone (detector, segmenter): '
            'create the model with features_only=True, or class_token=False and num_classes=0.')
    reference = model.state_dict()
    parts = [] if model.class_token else ['class_token']
    parts += [part for part in ('norm', 'head') if f'{part}.weight' not in reference]
    return drop_parts(state_dict, parts, info.class_row), info, converted.format


def _choose(keys: Iterable[Any], prefix: Optional[str]) -> Tuple[Format, str]:
    """Return format and prefix of the only PVT among the keys, or of the one under `prefix`.

    Raises:
        ValueError: There is none, or there are several. The message lists what was found.
    """
    names = [key for key in keys if isinstance(key, str)]
    found: List[Tuple[str, str]] = sorted({at for at in map(_recognise, names) if at})
    if not found:
        other = next((family for pattern, family in _OTHER_FAMILIES if any(re.search(pattern, k) for k in names)), None)
        raise ValueError(
            f'Expected a PVT v1 checkpoint in one of the formats {", ".join(FORMATS)}, got '
            f'{other or f"keys {some_names(names, 3) or None}"}.')
    wanted = [at for at in found if prefix is None or at[0].rstrip('.') == prefix.rstrip('.')]
    if len(wanted) != 1:
        there = ', '.join(f'{before!r} ({fmt})' for before, fmt in found)
        what = 'one PVT in the checkpoint, got several' if prefix is None else f'a PVT under prefix {prefix!r}, got'
        raise ValueError(
            f'Expected {what}: {there}. Say which one to take with --prefix, or with prefix= of '
            f'pvt_timm.create_from_checkpoint.')
    before, name = wanted[0]
    return FORMATS[name], before


def _recognise(key: str) -> Optional[Tuple[str, str]]:
    """Return (prefix, format) if the key is a prefix and the name of the first weight of a format, else None."""
    found: List[Tuple[str, str]] = []
    for fmt in FORMATS.values():
        for weight in fmt.first_weight:
            before = key[:len(key) - len(weight)]
            if key.endswith(weight) and (not before or before.endswith('.')):
                found.append((before, fmt.name))
    # The key may end in several of these names. The longest one counts: it leaves the shortest prefix.
    return min(found, key=lambda at: len(at[0]), default=None)


def _group(key: str, prefix: str) -> str:
    """The group of a key outside of the PVT, such as 'net.decoder.*': its parts up to the first one not in `prefix`."""
    while not key.startswith(prefix):
        prefix = prefix[:prefix.rstrip('.').rfind('.') + 1]
    part, dot, _ = key[len(prefix):].partition('.')
    return f'{prefix}{part}.*' if dot else key


def _account(fmt: Format, prefix: str, groups: List[Tuple[str, int]]) -> str:
    """Return a message for the log: what was taken from a checkpoint and what was left out."""
    under = f' under the prefix {shown(prefix)}' if prefix else ''
    text = f'Taken from the checkpoint: a PVT in {fmt.name} format{under}.'
    if not groups:
        return f'{text} Nothing was left out.'
    left_out = ', '.join(f'{ascii(group)[1:-1]}: {n}' for group, n in groups)
    return f'{text} Left out: {left_out}.'
