""" Stands for `timm.models._input`, which timm before version 1.0.31 does not have.

This file has the same name, so that `pvt.py` can have the same import when it is a file of timm.
"""
from importlib.util import find_spec
from typing import Any, Optional, Sequence, Union

from torch import nn

__all__ = ['RECORDS_INPUT', 'update_model_input_size']

# Whether timm records the input size of a model, and adapts a first convolution from any number of channels
RECORDS_INPUT = find_spec('timm.models._input') is not None

if RECORDS_INPUT:
    from timm.models._input import update_model_input_size
else:
    def update_model_input_size(
            model: nn.Module,
            img_size: Optional[Union[int, Sequence[int]]],
            **model_args: Any,
    ) -> None:
        """Do nothing: there is no record to update."""
