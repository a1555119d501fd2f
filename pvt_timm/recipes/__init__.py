""" Training recipes for timm's train.py: YAML files for its --config. """
from pathlib import Path
from typing import Any, Dict, List

import yaml

__all__ = ['load_recipe', 'recipe_names']


def recipe_names() -> List[str]:
    return sorted(file.stem for file in Path(__file__).parent.glob('*.yaml'))


def load_recipe(name: str) -> Dict[str, Any]:
    """What a recipe sets, by train.py's names.

    Raises:
        ValueError: There is no such recipe.
    """
    if name not in recipe_names():
        raise ValueError(f"Expected a recipe ({', '.join(recipe_names())}), got '{name}'.")
    return yaml.safe_load((Path(__file__).parent / f'{name}.yaml').read_text(encoding='utf-8'))
