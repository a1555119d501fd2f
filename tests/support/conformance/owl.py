""" `test_pvt` with 1000 classes and weights on the hub, for timm's test that names a picture's class number. """
from timm.models import generate_default_cfgs, register_model

from pvt_timm.pvt import VARIANTS, PyramidVisionTransformer, _cfg, _create_pvt

VARIANTS['test_pvt_owl'] = VARIANTS['test_pvt']

default_cfgs = generate_default_cfgs({
    'test_pvt_owl.loopback': _cfg(hf_hub_id='timm/test_pvt_owl.loopback', input_size=(3, 32, 32), pool_size=(1, 1)),
})


@register_model
def test_pvt_owl(pretrained: bool = False, **kwargs) -> PyramidVisionTransformer:
    model_args = dict(img_size=32, sr_ratios=(4, 2, 1, 1), mlp_ratios=(4., 4., 4., 4.))
    return _create_pvt('test_pvt_owl', pretrained=pretrained, **dict(model_args, **kwargs))


test_pvt_owl.__test__ = False
