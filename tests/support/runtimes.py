""" Reads exported files with only their runtime, in a process without this package and timm. """
import subprocess
import sys
from pathlib import Path
from typing import List

import numpy as np
import torch

# A program that has nothing but the runtime: it reads images from a file and writes outputs to another.
READERS = {
    'onnx': '''
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
outputs = session.run(None, {'image': x})
''',
    'openvino': '''
import openvino
compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
outputs = list(compiled({'image': x}).values())
''',
    'openvino of one size': '''
import openvino
core = openvino.Core()
model = core.read_model(path)
model.reshape(x.shape)
compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
outputs = list(compiled({'image': x}).values())
''',
    'torch': '''
import torch
outputs = [output.detach().numpy() for output in torch.export.load(path).module()(torch.from_numpy(x))]
''',
    'executorch': '''
import torch
from executorch.runtime import Runtime
method = Runtime.get().load_program(path).load_method('forward')
outputs = [output.numpy() for output in method.execute([torch.from_numpy(x)])]
''',
}
READ = '''
import sys
import numpy as np
path, images, results = sys.argv[1:]
x = np.load(images)
{reader}
np.savez(results, *outputs)
assert not {{'pvt_timm', 'timm'}} & sys.modules.keys()
'''


def read_alone(target: str, path: Path, x: torch.Tensor, tmp_path: Path) -> List[torch.Tensor]:
    """Return the outputs of an exported file for images `x`, from a process that uses only the runtime."""
    np.save(tmp_path / 'images.npy', x.numpy())
    program = READ.format(reader=READERS[target])
    subprocess.run(
        [sys.executable, '-c', program, path, tmp_path / 'images.npy', tmp_path / 'results.npz'],
        check=True, cwd=tmp_path, timeout=300)
    with np.load(tmp_path / 'results.npz') as results:
        return [torch.from_numpy(results[name]) for name in results.files]
