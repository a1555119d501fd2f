""" The report of a conversion, as text and as JSON. """
import re
from collections import Counter
from typing import Any, Dict, List, Optional

from pvt_timm.cli.errors import clean
from pvt_timm.formats.names import NamePairs
from pvt_timm.weights import Weights

__all__ = ['Report', 'trace']


class Report:
    """Report on an inspection or conversion. `--json` prints its attributes.

    After a conversion it describes the model that was written. After an inspection it describes the source.
    """

    def __init__(
            self, weights: Weights, target: Optional[Weights] = None, to: Optional[str] = None,
            written: Optional[NamePairs] = None):
        """
        Args:
            weights: The source.
            target: The weights that are written, None for an inspection.
            to: The format that they are written in.
            written: Pairs of (names in that format, timm's names), None if they are the same.
        """
        source, converted = weights.source, weights.converted
        what = target or weights
        self.source = clean(source.name)  # where the checkpoint came from, without credentials
        self.file = clean(source.file.name)
        self.bytes = source.file.stat().st_size
        self.sha256 = source.sha256
        self.known = source.known  # name of the model and tag if this is their published file, such as pvt_tiny.in1k
        self.format = converted.format  # key of `FORMATS`
        self.wrappers = tuple(map(clean, converted.wrappers))  # keys that were opened to reach the weights
        self.prefix = clean(converted.prefix)  # the part before every name
        self.variant = what.variant
        self.model_args = what.model_args  # arguments of the timm model that differ from its defaults
        self.num_classes = what.info.num_classes
        self.problem_type = what.problem_type
        self.in_chans = what.info.in_chans
        self.img_size = what.info.img_size  # of the position embeddings
        self.parts = what.parts
        self.dtype = what.dtype_name()
        self.preprocessing = dict(what.preprocessing)
        self.labels = len(what.label_names)  # number of class names
        self.parameters = sum(v.numel() for v in what.state_dict.values())
        self.mapped = trace(converted.mapped, written)
        self.dropped = {clean(k): clean(v) for k, v in converted.dropped.items()}  # key or group to the reason
        if target is not None:
            for timm, names in converted.mapped:
                if not target.state_dict.keys() & set(timm):
                    self.dropped.update({clean(name): 'asked for with --drop' for name in names})
        self.notes = [clean(note, 500) for note in what.notes]  # what is unusual about the source, and what was changed
        self.to = to  # target format, None if nothing was converted
        self.output: Optional[str] = None
        self.files: Dict[str, int] = {}  # bytes of each written file, by its name
        self.verification: Optional[Dict[str, Any]] = None  # result of `verification.verify`, None without verification

    def to_text(self) -> str:
        """Return a summary, and a table of the source's keys: their new names, or why they were left out."""
        images = self.preprocessing
        size = 'x'.join(map(str, images['input_size'][1:]))
        wrapped = f', in {" > ".join(self.wrappers)}' if self.wrappers else ''
        prefixed = f', names start with {self.prefix!r}' if self.prefix else ''
        args = ', '.join(f'{name}={value!r}' for name, value in self.model_args.items())
        rows = [
            ('source', self.source),
            ('file', f'{self.file}, {self.bytes:,} bytes'),
            ('sha256', self.sha256 + (f' ({self.known})' if self.known else '')),
            ('format', f'{self.format}{wrapped}{prefixed}'),
            ('model', f'{self.variant}, {self.parameters:,} values, {self.dtype}' + (f', {args}' if args else '')),
            ('input', f'{self.in_chans} channels, position embeddings for {self.img_size[0]}x{self.img_size[1]}'),
            ('images', f'{size}, crop_pct {images["crop_pct"]:g}, {images["interpolation"]}, '
                       f'mean {list(images["mean"])}, std {list(images["std"])}'
                       + (f', crop_mode {images["crop_mode"]}' if images['crop_mode'] != 'center' else '')),
            ('parts', f'{", ".join(self.parts) or "backbone only"}; {self.num_classes} classes, '
                      f'{self.labels} label names' + (f', {self.problem_type}' if self.problem_type else '')),
            *(('note', note) for note in self.notes),
        ]
        if self.output:
            rows.append(('written', f'{self.to} format: {self.output}'))
        rows += [('', f'{name}, {size:,} bytes') for name, size in self.files.items()]
        lines = [f'{name:<8} {clean(value, 500)}' for name, value in rows]
        lines += self._table()
        lines += ['\ndropped'] if self.dropped else []
        lines += [f'{clean(key, 90):<45} {clean(why, 100)}' for key, why in self.dropped.items()]
        check = self.verification
        if check:
            lines += [f'\nverified against {check["reference"]} in float64: passed (tolerance {check["tolerance"]:g})',
                      f'{"largest difference":<24} {"as it ships":>12} {"our eps":>13}']
            lines += [f'{name:<24} {a:>12.1e} {b:>13.1e}' for name, (a, b) in check['differences'].items()]
        return '\n'.join(lines)

    def _table(self) -> List[str]:
        """Return a line per kind of parameter: its name in the source, how many there are, its name in the target."""
        if not self.mapped:
            return []
        width = max(len(clean(row['from'], 90)) for row in self.mapped)
        return [
            f'\n{"from":<{width}}  count  to',
            *(f'{clean(row["from"], 90):<{width}}  {row["count"]:>5}  {clean(row["to"], 160)}' for row in self.mapped),
        ]


# Parts of a name that differ between parameters of one kind: numbers of stages and blocks (as in 'stages.0', 'block1',
# 'embed1' and 'stages_0', but not the 3 of 'ffn.layers.3'), and weight or bias
_NUMBERS = re.compile(r'(?<!ffn\.layers\.)\b\d+\b|(?<=block)\d+|(?<=embed)\d+|(?<=stages_)\d+|(?:weight|bias)$')


def trace(read: NamePairs, written: Optional[NamePairs] = None) -> List[Dict[str, Any]]:
    """Follow parameters from source to target.

    Args:
        read: Pairs of (timm's names, names in the source).
        written: Pairs of (names in the target, timm's names), None if the target has timm's names.

    Returns:
        One row per kind of parameter: 'from' and 'to' (names) and 'count'. If several parameters of one side are one
        parameter of the other side, ' + ' is between their names. Parameters that the target does not have are left
        out.
    """
    sources = {name: source for timm, source in read for name in timm}
    links = [(timm, timm) for timm, _ in read] if written is None else written
    rows: Counter = Counter()
    for target, timm in links:
        origins = dict.fromkeys(source for name in timm for source in sources.get(name, ()))
        rows[_kind(origins), _kind(target)] += 1
    return [{'from': source, 'to': target, 'count': count} for (source, target), count in rows.items()]


def _kind(names: Any) -> str:
    return ' + '.join(_NUMBERS.sub('*', name) for name in names)
