""" Training recipes for timm's train.py: YAML files for its --config. """
from pathlib import Path
from typing import Any, Dict, List

__all__ = ['load_recipe', 'recipe_names', 'recipe_path']


def recipe_names() -> List[str]:
    """Names of all recipes."""
    return sorted(file.stem for file in Path(__file__).parent.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        ValueError: There is no such recipe.
    """
    if name not in recipe_names():
        raise ValueError(f"Expected a recipe ({', '.join(recipe_names())}), got '{name}'.")
    return Path(__file__).parent / f'{name}.yaml'


def load_recipe(name: str) -> Dict[str, Any]:
    """What a recipe sets, by train.py's names."""
    import yaml
    return yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))
