""" What a conversion did, for people and for machines. """
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Optional, Sequence, Tuple

__all__ = ['Report', 'clean', 'trace']

Pairs = Sequence[Tuple[Sequence[str], Sequence[str]]]


def clean(text: Any, limit: int = 300) -> str:
    """Text from elsewhere as one printable line."""
    text = str(text)[:4 * limit]
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape', 'backslashreplace').decode() for c in text)
    text = text.encode('utf-8', 'backslashreplace').decode()
    return text if len(text) <= limit else text[:limit - 3] + '...'


@dataclass
class Report:
    """Account of a conversion or inspection."""
    source: str  # where the checkpoint came from, without credentials
    file: str
    bytes: int
    sha256: str
    known: Optional[str] = None  # pretrained tag whose public file it is
    format: str = ''  # 'timm', 'timm_features', 'original', 'transformers' or 'mmdet'
    wrappers: Tuple[str, ...] = ()  # keys that were opened to reach the weights
    prefix: str = ''  # what stood before every name
    beside: str = ''  # what the file holds beside the backbone, as far as it is known
    weights: str = 'plain'  # or 'averaged' (EMA)
    other_weights: Optional[str] = None  # where the file holds the other kind
    variant: str = ''  # name of the timm model
    num_classes: int = 0
    in_chans: int = 3
    img_size: Tuple[int, int] = (224, 224)  # of the position embeddings
    class_token: bool = True
    class_row: bool = True  # the last position embedding has a row for the class token
    norm: bool = True
    head: bool = True
    dtype: str = ''  # as written
    source_dtype: str = ''  # as read
    preprocessing: Dict[str, Any] = field(default_factory=dict)  # input_size, mean, std, crop_pct, interpolation
    labels: int = 0  # number of class names that came with it
    parameters: int = 0  # values in all tensors of the model
    mapped: List[Dict[str, Any]] = field(default_factory=list)  # see `trace`
    dropped: Dict[str, str] = field(default_factory=dict)  # source key, or 'group.*', to the reason
    warnings: List[str] = field(default_factory=list)
    to: Optional[str] = None  # target format, None if nothing was converted
    output: Optional[str] = None
    files: Dict[str, int] = field(default_factory=dict)  # name to bytes of what was written
    verification: Optional[Dict[str, Any]] = None  # result of `--verify`, None if not asked for

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """A summary and a table of what became of the keys."""
        parts = [name for name in ('class token', 'norm', 'head') if getattr(self, name.replace(' ', '_'))]
        pre = self.preprocessing
        rows = [
            ('source', self.source),
            ('file', f'{self.file}, {self.bytes:,} bytes'),
            ('sha256', self.sha256 + (f' ({self.known})' if self.known else '')),
            ('format', self.format + (f', in {" > ".join(self.wrappers)}' if self.wrappers else '')
             + (f', names start with {self.prefix!r}' if self.prefix else '')),
            ('beside', self.beside),
            ('weights', self.weights + (f' (others are in {self.other_weights})' if self.other_weights else '')),
            ('model', f'{self.variant}, {self.parameters:,} values, {self.dtype}'),
            ('input', f'{self.in_chans} channels, position embeddings for {self.img_size[0]}x{self.img_size[1]}'),
            ('images', f'{"x".join(map(str, pre["input_size"][1:]))}, crop_pct {pre["crop_pct"]:g}, '
                       f'{pre["interpolation"]}, mean {list(pre["mean"])}, std {list(pre["std"])}'),
            ('parts', f'{", ".join(parts) or "backbone only"}; {self.num_classes} classes'
             + (f', {self.labels} label names' if self.labels else '')),
        ]
        if self.output:
            rows.append(('written', f'{self.to} format: {self.output}'))
            rows += [('', f'{name}, {size:,} bytes') for name, size in self.files.items()]
        rows += [('warning', w) for w in self.warnings]
        lines = [f'{k:<8} {clean(v)}' for k, v in rows if v]
        if self.mapped:
            wide = max(len(clean(row['from'], 90)) for row in self.mapped)
            lines += ['', f'{"from":<{wide}}  {"count":>5}  {"":<7}  to']
            lines += [f'{clean(row["from"], 90):<{wide}}  {row["count"]:>5}  {row["kind"]:<7}  {clean(row["to"], 160)}'
                      for row in self.mapped]
        if self.dropped:
            lines += ['', 'dropped', *(f'{clean(k, 90):<45} {clean(why, 100)}' for k, why in self.dropped.items())]
        if self.verification:
            lines += ['', *_verification_lines(self.verification)]
        return '\n'.join(lines)


def _verification_lines(result: Dict[str, Any]) -> List[str]:
    lines = [f'verified against {result["reference"]}, {result["images"]} images of '
             f'{result["size"][0]}x{result["size"][1]}, float64: '
             f'{"passed" if result["passed"] else "FAILED"} (tolerance {result["tolerance"]:g} {result["measure"]})']
    for run in result['runs']:
        lines.append(f'  {run["name"]}')
        lines.append(f'    {"":<8} {"max absolute":>14} {"max relative":>14}')
        lines += [f'    {r["name"]:<8} {r["absolute"]:>14.3e} {r["relative"]:>14.3e}' for r in run['differences']]
    return lines


# what runs: the stage, the block, weight and bias
_RUNS = re.compile(r'(?<!ffn\.layers\.)\b\d+\b|(?<=block)\d+|(?<=embed)\d+|(?<=stages_)\d+|(?:weight|bias)$')


def _pattern(names: Sequence[str]) -> str:
    return ' + '.join(_RUNS.sub('*', name) for name in names)


def trace(read: Pairs, written: Optional[Pairs] = None) -> List[Dict[str, Any]]:
    """Follow parameters from source to target.

    Args:
        read: (timm names, source names) that hold the same numbers.
        written: (target names, timm names), None if the target has timm's names.

    Returns:
        One row per kind of parameter: 'from', 'to', 'kind' (kept, renamed, merged, split) and 'count'. What the target
        does not have is left out.
    """
    links = [(tuple(source), tuple(timm)) for timm, source in read]
    if written is not None:
        sources = {name: source for timm, source in read for name in timm}
        links = [(tuple(dict.fromkeys(s for name in timm for s in sources.get(name, ()))), tuple(target))
                 for target, timm in written]
    uses = Counter(s for source, _ in links for s in source)
    rows: Dict[Tuple[str, str], Dict[str, Any]] = {}
    for source, target in links:
        key = _pattern(source), _pattern(target)
        if len(source) != len(target):
            kind = 'merged' if len(source) > len(target) else 'split'
        elif any(uses[s] > 1 for s in source):
            kind = 'split'
        else:
            kind = 'kept' if source == target else 'renamed'
        row = rows.setdefault(key, {'from': key[0], 'to': key[1], 'kind': kind, 'count': 0})
        row['count'] += 1
    return list(rows.values())
