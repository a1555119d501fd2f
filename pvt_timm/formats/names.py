""" Tables of parameter names, and the functions that rename tensors by them, in both directions.

A table is a tuple of rows. A row says which parameters of ours and which of theirs hold the same numbers, so one table
serves both directions. Names are templates with these placeholders:

    {i} stage and {j} block, counted from 0
    {s} stage and {b} block, counted from 1
    {p} 'weight' or 'bias'
    {n} a parameter or buffer of a BatchNorm
    {layer} a layer of a block that both sides name alike
"""
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Set, Tuple

import torch

__all__ = ['NamePairs', 'Row', 'StateDict', 'Table', 'shown', 'some_names', 'to_ours', 'to_theirs']

StateDict = Dict[str, torch.Tensor]
# Pairs of (new names, old names) that hold the same numbers
NamePairs = List[Tuple[Tuple[str, ...], Tuple[str, ...]]]
TensorFn = Callable[[torch.Tensor], torch.Tensor]

_PLACEHOLDERS = {
    'i': r'0|[1-9]\d{0,3}',  # a number as it is written back: no '01'
    'j': r'0|[1-9]\d{0,3}',
    's': r'[1-9]\d{0,3}',
    'b': r'[1-9]\d{0,3}',
    'p': 'weight|bias',
    'n': 'weight|bias|running_mean|running_var|num_batches_tracked',
    'layer': r'norm[12]|attn\.(?:q|kv|sr|norm|proj)|mlp\.fc[12]',
}


@dataclass(frozen=True)
class Row:
    """Parameters that hold the same numbers on both sides.

    If one side has several names and the other side has one, the several tensors are joined along dimension 0, in the
    order of the names. In the other direction, the one tensor is cut into pieces. `our_pieces=(2,)` means that one
    tensor of ours holds two pieces. If a name fits several rows, the first of these rows is used.

    `to_ours` and `to_theirs` change values, for example transpose a weight. Both work on single tensors of theirs:
    `to_ours` gets each tensor as it is in the file, before anything is joined, and `to_theirs` undoes the change.
    A damaged file may hold any shape, so these functions return a tensor of an unexpected shape unchanged. It is
    refused later, in a message with its name.
    """
    ours: Tuple[str, ...]
    theirs: Tuple[str, ...]
    our_pieces: Tuple[int, ...]
    their_pieces: Tuple[int, ...]
    to_ours: Optional[TensorFn]  # changes each tensor of theirs on the way to ours, None for no change
    to_theirs: Optional[TensorFn]  # the same for the way back

    def __init__(
            self,
            ours: Any,
            theirs: Any,
            our_pieces: Tuple[int, ...] = (),
            their_pieces: Tuple[int, ...] = (),
            to_ours: Optional[TensorFn] = None,
            to_theirs: Optional[TensorFn] = None,
    ):
        """A single name may be given as a string. `our_pieces` and `their_pieces` default to one piece per tensor."""
        ours = (ours,) if isinstance(ours, str) else tuple(ours)
        theirs = (theirs,) if isinstance(theirs, str) else tuple(theirs)
        object.__setattr__(self, 'ours', ours)
        object.__setattr__(self, 'theirs', theirs)
        object.__setattr__(self, 'our_pieces', our_pieces or (1,) * len(ours))
        object.__setattr__(self, 'their_pieces', their_pieces or (1,) * len(theirs))
        object.__setattr__(self, 'to_ours', to_ours)
        object.__setattr__(self, 'to_theirs', to_theirs)
        assert sum(self.our_pieces) == sum(self.their_pieces), f'different numbers of pieces in {ours} and {theirs}'


Table = Tuple[Row, ...]


def to_ours(state_dict: Mapping[str, Any], table: Table) -> Tuple[StateDict, NamePairs, List[str]]:
    """Rename and restack tensors from their side of a table to ours.

    Returns:
        The tensors, pairs of (our names, their names), and the keys that no row has.

    Raises:
        ValueError: A value is not a tensor, or one of several tensors to join is missing or does not fit the others.
    """
    return _rename(state_dict, [
        _Step(row.theirs, row.their_pieces, row.ours, row.our_pieces, change_old=row.to_ours) for row in table])


def to_theirs(state_dict: Mapping[str, Any], table: Table) -> Tuple[StateDict, NamePairs, List[str]]:
    """Rename and restack tensors from our side of a table to theirs, otherwise as `to_ours`.

    Returns:
        The tensors, pairs of (their names, our names), and the keys that no row has.
    """
    return _rename(state_dict, [
        _Step(row.ours, row.our_pieces, row.theirs, row.their_pieces, change_new=row.to_theirs) for row in table])


def some_names(names: Iterable[Any], limit: int = 6) -> str:
    """Return the first `limit` names and how many more there are, for messages."""
    names = [str(name) for name in names]
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more


def shown(value: Any, limit: int = 60) -> str:
    """Return a value as text for a message: short, in one line, without characters that control a terminal."""
    text = ascii(value) if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        if all(isinstance(x, (int, float, str)) for x in value):
            text = ascii(list(value))
    return text if len(text) <= limit else text[:limit - 3] + '...'


@dataclass
class _Step:
    """A row in one direction: from the old names, whose tensors are read, to the new names."""
    old: Tuple[str, ...]
    old_pieces: Tuple[int, ...]
    new: Tuple[str, ...]
    new_pieces: Tuple[int, ...]
    change_old: Optional[TensorFn] = None
    change_new: Optional[TensorFn] = None


def _rename(state_dict: Mapping[str, Any], steps: List[_Step]) -> Tuple[StateDict, NamePairs, List[str]]:
    patterns = [(_pattern(template), step) for step in steps for template in step.old]
    out: StateDict = {}
    pairs: NamePairs = []
    unknown: List[str] = []
    done: Set[str] = set()
    for key in state_dict:
        if key in done:
            continue
        match, step = _find(key, patterns)
        if match is None:
            unknown.append(key)
            continue
        old = tuple(_fill(template, match) for template in step.old)
        new = tuple(_fill(template, match) for template in step.new)
        tensors = _change(_take(state_dict, old), old, step.change_old)
        tensors = _change(_restack(tensors, old, step), new, step.change_new)
        out.update(zip(new, tensors))
        pairs.append((new, old))
        done.update(old)
    return out, pairs, unknown


def _change(tensors: List[torch.Tensor], names: Tuple[str, ...], change: Optional[TensorFn]) -> List[torch.Tensor]:
    if change is None:
        return tensors
    changed = []
    for name, tensor in zip(names, tensors):
        try:
            changed.append(change(tensor) if tensor.ndim else tensor)  # a single number has no axes to change
        except (RuntimeError, IndexError) as e:
            raise ValueError(f'Cannot change {name} of shape {list(tensor.shape)}: {e}') from e
    return changed


def _find(key: str, patterns: List[Tuple['re.Pattern[str]', _Step]]) -> Tuple[Optional['re.Match[str]'], Any]:
    for pattern, step in patterns:
        match = pattern.fullmatch(key)
        if match:
            return match, step
    return None, None


def _pattern(template: str) -> 're.Pattern[str]':
    seen: Set[str] = set()

    def group(match: 're.Match[str]') -> str:
        name = match[1]
        if name not in _PLACEHOLDERS:
            raise ValueError(f'Expected placeholders in {tuple(_PLACEHOLDERS)}, got {name!r} in {template!r}.')
        if name in seen:  # it has to match the same text again
            return f'(?P={name})'
        seen.add(name)
        return f'(?P<{name}>{_PLACEHOLDERS[name]})'

    return re.compile(re.sub(r'\\\{(\w+)\\\}', group, re.escape(template)))  # `re.escape` turns '{i}' into '\{i\}'


def _fill(template: str, match: 're.Match[str]') -> str:
    """Return a template filled with the text that its placeholders matched.

    Each side may count stages and blocks from 0 or from 1.
    """
    fields: Dict[str, Any] = match.groupdict()
    for from_0, from_1 in (('i', 's'), ('j', 'b')):
        if from_0 in fields:
            fields[from_1] = int(fields[from_0]) + 1
        elif from_1 in fields:
            fields[from_0] = int(fields[from_1]) - 1
    return template.format(**fields)


def _take(state_dict: Mapping[str, Any], names: Tuple[str, ...]) -> List[torch.Tensor]:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(f'Missing in the checkpoint: {some_names(missing)}.')
    for name in names:
        value = state_dict[name]
        if not isinstance(value, torch.Tensor):
            cure = ' (make it one with torch.from_numpy)' if hasattr(value, '__array__') else ''
            raise ValueError(f'Expected a tensor for {name}, got {type(value).__name__}{cure}.')
    return [state_dict[name] for name in names]


def _restack(tensors: List[torch.Tensor], names: Tuple[str, ...], step: _Step) -> List[torch.Tensor]:
    """Cut the tensors of one side into pieces of one shape and type, and join these to tensors of the other side."""
    if len(step.old) == len(step.new) == 1:
        return tensors
    pieces: List[torch.Tensor] = []
    for tensor, count in zip(tensors, step.old_pieces):
        pieces += torch.atleast_1d(tensor).tensor_split(count)
    if len({(piece.dtype, piece.shape) for piece in pieces}) > 1:
        raise ValueError(
            f'Expected types and shapes that fit together for {some_names(names)}, got '
            f'{[(x.dtype, list(x.shape)) for x in tensors]}.')
    joined = []
    for count in step.new_pieces:
        joined.append(torch.cat(pieces[:count]))
        pieces = pieces[count:]
    return joined
