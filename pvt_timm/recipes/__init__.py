""" Training recipes for timm's train.py: YAML files for its --config. """
from pathlib import Path

__all__ = ['RECIPES']

RECIPES = {file.stem: file for file in sorted(Path(__file__).parent.glob('*.yaml'))}
