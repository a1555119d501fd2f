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
    """Write README.md: `about`, by default how the weights are loaded, and the report.

    Args:
        folder: Where the converted files are.
        weights: What was written.
        report: Account of the conversion.
        about: Text before the report, in Markdown.
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
    if source.exists():  # folders of this machine are private
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
