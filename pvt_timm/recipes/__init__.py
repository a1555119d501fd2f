""" Training recipes: YAML files for --config of timm's train.py, and of `pvt-timm detector` and `segmenter`. """
from pathlib import Path
from typing import Dict

__all__ = ['DETECTOR_RECIPES', 'RECIPES', 'SEGMENTER_RECIPES']


def _in(folder: Path) -> Dict[str, Path]:
    return {file.stem: file for file in sorted(folder.glob('*.yaml'))}


RECIPES = _in(Path(__file__).parent)
DETECTOR_RECIPES = _in(Path(__file__).parent / 'detection')
SEGMENTER_RECIPES = _in(Path(__file__).parent / 'segmentation')
