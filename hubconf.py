""" The models for `torch.hub.load`: `torch.hub.load(DIR, 'pvt_small', source='local', pretrained=True)`. """
from pvt_timm import pvt_huge_v2, pvt_large, pvt_medium, pvt_small, pvt_tiny, test_pvt  # noqa: F401

dependencies = ['torch', 'timm', 'huggingface_hub', 'safetensors']
