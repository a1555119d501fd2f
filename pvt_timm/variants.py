""" The variants of PVT: the arguments of their models, and their accuracy. """
from typing import Any, Dict, Optional, Tuple

__all__ = ['TOP1', 'VARIANTS', 'find_variant']

# Arguments of the model, by the name of its entrypoint. The entrypoints in pvt.py repeat those of the published
# variants, as in any file of timm.
VARIANTS: Dict[str, Dict[str, Any]] = {
    'pvt_tiny': dict(depths=(2, 2, 2, 2), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_small': dict(depths=(3, 4, 6, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_medium': dict(depths=(3, 4, 18, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_large': dict(depths=(3, 8, 27, 3), embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8)),
    'pvt_huge_v2': dict(depths=(3, 10, 60, 3), embed_dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12)),
    'test_pvt': dict(
        img_size=32,
        depths=(1, 2, 2, 1),
        embed_dims=(16, 32, 40, 64),
        num_heads=(1, 2, 5, 8),
        sr_ratios=(4, 2, 1, 1),
        mlp_ratios=(4., 4., 4., 4.),
    ),
}

# Top-1 accuracy of the pretrained tags in percent
TOP1: Dict[str, float] = {
    # on the validation set of ImageNet-1K, as published with the weights
    'pvt_tiny.in1k': 75.1,
    'pvt_small.in1k': 79.8,
    'pvt_medium.in1k': 81.2,
    'pvt_large.in1k': 81.7,
    # on the held-out digits
    'test_pvt.digits': 99.2,
}


def find_variant(depths: Tuple[int, ...], embed_dims: Tuple[int, ...]) -> Optional[str]:
    """Return the name of the variant with these depths and channels, None if there is none."""
    for name, args in VARIANTS.items():
        if args['depths'] == depths and args['embed_dims'] == embed_dims:
            return name
    return None
