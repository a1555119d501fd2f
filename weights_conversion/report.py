""" What a conversion did, for people and for machines. """
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

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
    """Account of a conversion or inspection.

    Attributes:
        source: Where the checkpoint came from, without credentials.
        file: Name of the file.
        bytes: Its size.
        sha256: Its hash.
        known: Pretrained tag whose public file it is, None if unknown.
        format: 'timm', 'timm_features', 'original', 'transformers' or 'mmdet'.
        wrappers: Keys that were opened to reach the weights.
        prefix: What stood before every name.
        weights: 'plain' or 'averaged' (EMA).
        other_weights: Where the file holds the other kind, None if it does not.
        variant: Name of the timm model.
        num_classes: Classes of the head, 0 without head.
        in_chans: Input channels.
        img_size: Image height and width of the position embeddings.
        class_token: Class token is there.
        class_row: The last position embedding has a row for the class token.
        norm: Final norm is there.
        head: Head is there.
        dtype: Type of the weights, as written.
        source_dtype: Type of the weights, as read.
        preprocessing: 'input_size', 'mean', 'std', 'crop_pct' and 'interpolation' that go with the weights.
        labels: Number of label names that came with it.
        parameters: Values in all tensors of the model.
        mapped: One row per kind of parameter: 'from', 'to', 'kind' (kept, renamed, merged, split) and 'count'.
        dropped: Source key, or 'group.*' of keys, to the reason why it is not in the output.
        warnings: What a user should know.
        to: Target format, None if nothing was converted.
        output: Folder that was written.
        files: Name to bytes of what was written.
        verification: Result of `--verify`, None if not asked for.
    """
    source: str
    file: str
    bytes: int
    sha256: str
    known: Optional[str] = None
    format: str = ''
    wrappers: Tuple[str, ...] = ()
    prefix: str = ''
    weights: str = 'plain'
    other_weights: Optional[str] = None
    variant: str = ''
    num_classes: int = 0
    in_chans: int = 3
    img_size: Tuple[int, int] = (224, 224)
    class_token: bool = True
    class_row: bool = True
    norm: bool = True
    head: bool = True
    dtype: str = ''
    source_dtype: str = ''
    preprocessing: Dict[str, Any] = field(default_factory=dict)
    labels: int = 0
    parameters: int = 0
    mapped: List[Dict[str, Any]] = field(default_factory=list)
    dropped: Dict[str, str] = field(default_factory=dict)
    warnings: List[str] = field(default_factory=list)
    to: Optional[str] = None
    output: Optional[str] = None
    files: Dict[str, int] = field(default_factory=dict)
    verification: Optional[Dict[str, Any]] = None

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
        lines = [f'{k:<8} {clean(v)}' for k, v in rows]
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


_NUMBERS = re.compile(
    r'(?<=^layers\.)\d+(?:(?<=.)\.1\.\d+)?|(?<=block\.)\d+\.\d+|(?<=stages\.)\d+|(?<=stages_)\d+|(?<=blocks\.)\d+'
    r'|(?<=block)\d+\.\d+|(?<=_embed)\d+|(?<=_embeddings\.)\d+|(?:weight|bias)$')


def _stars(m: 're.Match[str]') -> str:
    return '*' if not m.group().count('.') else '*.1.*' if m.group().count('.') == 2 else '*.*'


def _pattern(names: Iterable[str]) -> str:
    """Names with stars for what runs: the stage, the block, weight and bias."""
    return ' + '.join(_NUMBERS.sub(_stars, n) for n in names)


def trace(read: Pairs, written: Optional[Pairs] = None) -> List[Dict[str, Any]]:
    """Follow parameters from source to target.

    Args:
        read: (timm names, source names) that hold the same numbers.
        written: (target names, timm names), None if the target has timm's names.

    Returns:
        Rows for `Report.mapped`. What the target does not have is left out.
    """
    if written is None:
        links = [(tuple(timm), tuple(source)) for timm, source in read]
    else:
        reads = {name: (tuple(timm), tuple(source)) for timm, source in read for name in timm}
        writes = {name: (tuple(target), tuple(timm)) for target, timm in written for name in timm}
        links, seen = [], set()
        for first in writes:
            if first in seen:
                continue
            timm: Dict[str, None] = {}  # all timm names that hang together, in order
            todo = [first]
            while todo:
                name = todo.pop(0)
                if name not in timm:
                    timm[name] = None
                    todo += [*(reads[name][0] if name in reads else ()), *(writes[name][1] if name in writes else ())]
            seen |= set(timm)
            sources = dict.fromkeys(s for n in timm if n in reads for s in reads[n][1])
            targets = dict.fromkeys(t for n in timm if n in writes for t in writes[n][0])
            links.append((tuple(targets), tuple(sources)))
    rows: Dict[Tuple[str, str], Dict[str, Any]] = {}
    for target, source in links:
        key = (_pattern(source), _pattern(target))
        if key not in rows:
            kind = 'kept' if source == target else 'renamed'
            if len(source) > len(target):
                kind = 'merged'
            elif len(source) < len(target):
                kind = 'split'
            elif len(source) > 1 and source != target:
                kind = 'recut'
            rows[key] = {'from': key[0], 'to': key[1], 'kind': kind, 'count': 0}
        rows[key]['count'] += 1
    return list(rows.values())
