""" The interface of a checkpoint format. Every format implements it, in a file of this folder. """
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from torch import nn

from .architecture import drop_parts
from .names import StateDict, Table, shown

if TYPE_CHECKING:
    from ..weights import Weights

__all__ = ['Format', 'NoReferenceError', 'Reference', 'Said', 'layer_norms', 'tuple_of']


@dataclass
class Said:
    """What one place, such as config.json, says about a model and its images.

    A field is None or empty if the place says nothing about it.
    """
    where: str  # the place, for messages: 'config.json' or the like
    overrides: bool = False  # whether it wins over places that say something else. Otherwise these are an error.
    architecture: Optional[str] = None  # name of a timm model
    tag: Optional[str] = None  # timm's name of the published weights that training started from, such as 'in1k'
    model_args: Dict[str, Any] = field(default_factory=dict)  # arguments of a timm model
    img_size: Optional[Tuple[int, int]] = None  # height and width of the images of training
    mean: Optional[Tuple[float, ...]] = None  # per channel, of images from 0 to 1
    std: Optional[Tuple[float, ...]] = None
    crop_pct: Optional[float] = None
    crop_mode: Optional[str] = None  # timm's: 'center', 'squash' or 'border'
    interpolation: Optional[str] = None  # timm's: 'bilinear', 'bicubic' and so on
    label_names: Optional[List[str]] = None
    palette: Optional[List[Any]] = None  # a colour per class
    problem_type: Optional[str] = None  # transformers': 'multi_label_classification' and so on
    license: Optional[str] = None
    origin_url: Optional[str] = None
    notes: List[str] = field(default_factory=list)  # settings of this place that are ignored, and why


@dataclass
class Reference:
    """A model of another library or of the original code, to compare outputs with."""
    name: str  # for the report, with a version
    format: str  # name of the format whose state dicts it loads
    model: nn.Module
    blocks: List[nn.Module]  # the last block of each stage
    norms: List[Any]  # the norms of patch embeddings and spatial reductions


class NoReferenceError(ValueError):
    """The code to compare with is not installed, or has no such model."""


class Format:
    """All that is known about one format of checkpoints.

    A subclass sets `name`, `table`, `first_weight` and `start`. It overrides the methods whose default does not fit.
    """
    name: str  # key of `FORMATS`
    table: Table  # names of the parameters: ours are timm's, theirs are the format's
    # Names that the weight of the first convolution may have. If a key ends in one of them, the checkpoint has this
    # format, and the part of the key before that name is the prefix of all names.
    first_weight: Tuple[str, ...]
    start: 're.Pattern[str]'  # how the names of a PVT's parameters start. Keys that start otherwise are not of the PVT.
    # Arguments of the timm model that have another value than the default in all models of this format
    model_args: Mapping[str, Any] = {}
    # Whether position embeddings are assumed to be for square images if their number of rows allows it
    prefers_square: bool = False
    is_target: bool = False  # whether checkpoints can be written in this format
    library: Optional[str] = None  # `library_name` on the hub

    def __init__(self) -> None:
        named = f'the format {type(self).__name__}'
        for attribute in ('name', 'table', 'first_weight', 'start'):
            if not hasattr(self, attribute):
                raise TypeError(f'{named} needs `{attribute}`')
        if isinstance(self.first_weight, str):
            raise TypeError(f'`first_weight` of {named} has to be a tuple of names')
        for method in ('write', 'how_to_load'):
            if self.is_target and getattr(type(self), method) is getattr(Format, method):
                raise TypeError(f'{named} is a target and needs `{method}`')

    def full_names(self, tensors: Dict[str, Any]) -> Dict[str, Any]:
        """Return the tensors under their full names. Some checkpoints lack a part, such as 'pvt.'."""
        return tensors

    def read_config(self, config: Mapping[str, Any]) -> Optional[Said]:
        """Return what a config.json says, None if it has no key that only configs of this format have.

        Raises:
            ValueError: The config asks for something that is not supported. The message names it.
        """
        return None

    def read_processor(self, config: Mapping[str, Any]) -> Optional[Said]:
        """Return what a preprocessor_config.json says, otherwise like `read_config`."""
        return None

    def read_meta(self, checkpoint: Mapping[str, Any]) -> Optional[Said]:
        """Return what the checkpoint file itself says beside the weights, otherwise like `read_config`."""
        return None

    def check_parts(self, weights: 'Weights', drop: Sequence[str]) -> List[str]:
        """Refuse weights that this format cannot store.

        By default it refuses every argument that changes what the model computes (see `Weights.refuse_args`), except
        the image size.

        Args:
            weights: The weights to write, before parts are left out.
            drop: The parts that will be left out: any of 'class_token', 'norm' and 'head'.

        Returns:
            Notes for the report about what will be different.

        Raises:
            ValueError: Something cannot be stored. The message names it and says what helps.
        """
        weights.refuse_args(self.name, but=('img_size',))
        return []

    def notes_on_images(self, weights: 'Weights') -> List[str]:
        """Return notes on what is lost in a format that stores only weights: preprocessing and problem type."""
        from timm.models import get_pretrained_cfg  # not at the top: timm itself may hold this file

        default: Any = get_pretrained_cfg(weights.variant)
        names = ('input_size', 'mean', 'std', 'crop_pct', 'crop_mode', 'interpolation')
        others = [f'{name} {shown(weights.preprocessing[name])}' for name in names
                  if tuple_of(weights.preprocessing[name]) != tuple_of(getattr(default, name))]
        notes = []
        if others:
            notes.append(f'the {self.name} format has no place for how images are prepared: {", ".join(others)}')
        if weights.problem_type:
            notes.append(f'the {self.name} format has no place for problem_type {shown(weights.problem_type)}')
        return notes

    def check_eps(self, weights: 'Weights', eps: float) -> List[str]:
        """Refuse weights whose norms in patch embeddings and spatial reductions have an eps other than 1e-5 and 1e-6.

        Args:
            eps: The eps of these norms in the code of this format, which cannot be changed.

        Returns:
            A note if the weights were trained with the other eps. The outputs then differ by about 1e-5.
        """
        theirs = weights.embed_norm_eps
        if theirs not in (1e-5, 1e-6):
            raise ValueError(f'The {self.name} format has no place for embed_norm_eps={theirs:g}.')
        if theirs == eps:
            return []
        return [f'the source has eps {theirs:g} in the norms of patch embeddings and spatial reductions, the code of '
                f'the {self.name} format has {eps:g}: outputs will differ a little']

    def required_size(self, weights: 'Weights') -> Optional[Tuple[int, int]]:
        """Return the image size that position embeddings have to be resized to for this format, None to keep theirs."""
        return None

    def check_size(self, img_size: Tuple[int, int]) -> None:
        """Refuse position embeddings of an image size (height, width) that the format cannot hold."""

    def take_parts(self, weights: 'Weights', drop: Sequence[str]) -> Tuple[StateDict, List[str]]:
        """Return the state dict under timm's names without the parts in `drop`, and notes for the report."""
        return drop_parts(weights.state_dict, drop, weights.info.class_row), []

    def write(self, folder: Path, weights: 'Weights', tensors: StateDict) -> None:
        """Write a checkpoint into `folder`: `tensors`, whose names are those of this format, and configs if any."""
        raise NotImplementedError

    def reference(self, weights: 'Weights') -> Reference:
        """Return the model, from the code that this format belongs to, that loads these weights.

        Raises:
            NoReferenceError: That code is not installed, or has no such model.
        """
        raise NoReferenceError(f'--verify has no model of the {self.name} format to compare with.')

    def how_to_load(self, weights: 'Weights') -> str:
        """A sentence for the card: how checkpoints of this format are loaded."""
        raise NotImplementedError


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def layer_norms(model: nn.Module, *ends: str) -> List[Any]:
    """Return the LayerNorms of a model whose names end in one of `ends`."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm) and name.endswith(ends)]
