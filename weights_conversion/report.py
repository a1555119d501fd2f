""" What a conversion did, for people and for machines. """
import re
from collections import Counter
from typing import Any, Dict, List, Optional

from pvt_timm.checkpoints import Pairs
from pvt_timm.cli.errors import clean

from .reading import Weights

__all__ = ['Report', 'trace']


class Report:
    """Account of an inspection or conversion. `--json` prints its attributes."""

    def __init__(self, weights: Weights, to: Optional[str] = None):
        source, converted, info = weights.source, weights.converted, weights.info
        self.source = clean(source.name)  # where the checkpoint came from, without credentials
        self.file = clean(source.file.name)
        self.bytes = source.file.stat().st_size
        self.sha256 = source.sha256
        self.known = source.known  # pretrained tag whose public file it is
        self.format = converted.format  # 'timm', 'timm_features', 'original', 'transformers' or 'mmdet'
        self.wrappers = tuple(map(clean, converted.wrappers))  # keys that were opened to reach the weights
        self.prefix = clean(converted.prefix)  # what stood before every name
        self.variant = weights.variant
        self.num_classes = info.num_classes
        self.in_chans = info.in_chans
        self.img_size = info.img_size  # of the position embeddings
        self.parts = weights.parts
        self.dtype = weights.dtype_name()  # as written
        self.preprocessing = {k: weights.cfg[k] for k in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')}
        self.labels = len(weights.cfg.get('label_names', ()))  # number of class names that came with it
        self.parameters = sum(v.numel() for v in weights.state_dict.values())
        self.mapped = trace(converted.mapped)
        self.dropped = {clean(k): clean(v) for k, v in converted.dropped.items()}  # key or group to the reason
        self.notes = list(weights.notes)  # what is odd about the source, and what was changed
        self.to = to  # target format, None if nothing was converted
        self.output: Optional[str] = None
        self.files: Dict[str, int] = {}  # name to bytes of what was written
        self.verification: Optional[Dict[str, Any]] = None  # see `verification.verify`, None if not asked for

    def to_text(self) -> str:
        """A summary and a table of what became of the keys."""
        pre = self.preprocessing
        rows = [
            ('source', self.source),
            ('file', f'{self.file}, {self.bytes:,} bytes'),
            ('sha256', self.sha256 + (f' ({self.known})' if self.known else '')),
            ('format', self.format + (f', in {" > ".join(self.wrappers)}' if self.wrappers else '')
             + (f', names start with {self.prefix!r}' if self.prefix else '')),
            ('model', f'{self.variant}, {self.parameters:,} values, {self.dtype}'),
            ('input', f'{self.in_chans} channels, position embeddings for {self.img_size[0]}x{self.img_size[1]}'),
            ('images', f'{"x".join(map(str, pre["input_size"][1:]))}, crop_pct {pre["crop_pct"]:g}, '
                       f'{pre["interpolation"]}, mean {list(pre["mean"])}, std {list(pre["std"])}'),
            ('parts', f'{", ".join(self.parts) or "backbone only"}; {self.num_classes} classes, '
                      f'{self.labels} label names'),
            *(('note', note) for note in self.notes),
            *([('written', f'{self.to} format: {self.output}')] if self.output else []),
            *(('', f'{name}, {size:,} bytes') for name, size in self.files.items()),
        ]
        lines = [f'{k:<8} {clean(v)}' for k, v in rows]
        wide = max((len(clean(row['from'], 90)) for row in self.mapped), default=0)
        lines += [f'\n{"from":<{wide}}  count  to'] if self.mapped else []
        lines += [f'{clean(row["from"], 90):<{wide}}  {row["count"]:>5}  {clean(row["to"], 160)}'
                  for row in self.mapped]
        lines += ['\ndropped'] if self.dropped else []
        lines += [f'{clean(k, 90):<45} {clean(why, 100)}' for k, why in self.dropped.items()]
        check = self.verification
        if check:
            lines += [f'\nverified against {check["reference"]} in float64: passed (tolerance {check["tolerance"]:g})',
                      f'{"largest difference":<24} {"as it ships":>12} {"original eps":>13}']
            lines += [f'{name:<24} {a:>12.1e} {b:>13.1e}' for name, (a, b) in check['differences'].items()]
        return '\n'.join(lines)


# what runs: the stage, the block, weight and bias
_RUNS = re.compile(r'(?<!ffn\.layers\.)\b\d+\b|(?<=block)\d+|(?<=embed)\d+|(?<=stages_)\d+|(?:weight|bias)$')


def trace(read: Pairs, written: Optional[Pairs] = None) -> List[Dict[str, Any]]:
    """Follow parameters from source to target, which has timm's names if nothing else was `written`.

    Returns:
        One row per kind of parameter: 'from', 'to' (joined by ' + ' where several are one, or one is several) and
        'count'. What the target does not have is left out.
    """
    sources = {name: source for timm, source in read for name in timm}
    links = [(dict.fromkeys(s for name in timm for s in sources.get(name, ())), target)
             for target, timm in written or [(timm, timm) for timm, _ in read]]
    rows = Counter(tuple(' + '.join(_RUNS.sub('*', name) for name in side) for side in link) for link in links)
    return [{'from': source, 'to': target, 'count': count} for (source, target), count in rows.items()]
