""" The model card that a conversion writes. """
import copy
import re
from pathlib import Path
from typing import Optional

from huggingface_hub import ModelCard, ModelCardData

from pvt_timm.cli.errors import clean
from pvt_timm.formats import FORMATS
from pvt_timm.formats.timm import CLASS_ROW_FILE
from pvt_timm.version import __version__
from pvt_timm.weights import Weights

from .report import Report

__all__ = ['CARDS', 'write_card']

CARDS = Path(__file__).parent / 'cards'  # texts of model cards


def write_card(folder: Path, weights: Weights, report: Report, about: Optional[str]) -> None:
    """Write README.md, the model card: a text about the weights, then the report of the conversion.

    Args:
        folder: Folder with the converted files.
        weights: The weights that were written.
        report: Report of the conversion.
        about: Text before the report, in Markdown. By default it says how the weights are loaded.
    """
    fmt = FORMATS[str(report.to)]
    task = 'image-classification' if weights.info.num_classes else 'image-feature-extraction'
    licence = weights.origin.get('license', '')
    data = ModelCardData(
        library_name=fmt.library,
        pipeline_tag=task,
        tags=[task, *([fmt.library] if fmt.library else []), 'pvt'],
        license=licence if re.fullmatch(r'[a-z0-9.-]+', licence) else None,
    )
    shown, source = copy.copy(report), Path(weights.source.name)
    if source.exists():  # a path on this machine is private: only its last part is shown
        shown.source = clean(source.absolute().name)
    card = ModelCard.from_template(
        data,
        str(CARDS / 'converted.md'),
        about=about,
        to=report.to,
        variant=weights.variant,
        how_to_load=fmt.how_to_load(weights),
        version=__version__,
        report=shown.to_text(),
        class_row=(folder / CLASS_ROW_FILE).exists(),
    )
    (folder / 'README.md').write_text(str(card).rstrip('\n') + '\n', encoding='utf-8')
