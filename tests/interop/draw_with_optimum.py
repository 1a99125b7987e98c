"""Draw with optimum-onnx what the tests draw with quest-deploy, which is not imported here.

Usage: draw_with_optimum.py ONNX_DIR REQUEST.npz IMAGES.npz
"""

import json
import sys

import numpy as np
import torch
from optimum.onnxruntime import ORTDiffusionPipeline, ORTStableDiffusionPipeline

source, request, output = sys.argv[1:]
given = np.load(request)
settings = json.loads(str(given["settings"]))
pipeline = ORTDiffusionPipeline.from_pretrained(source)
assert isinstance(pipeline, ORTStableDiffusionPipeline), type(pipeline)
assert "quest_deploy" not in sys.modules
images = pipeline(latents=torch.from_numpy(given["latents"]), output_type="np", **settings).images
np.savez(output, images=images)
