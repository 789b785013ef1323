"""onnxruntime alone writes tokens with an artifact: python python.py ARTIFACT '[1, 2, 3]' 20."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

directory, prompt, count = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
began = time.perf_counter()
session = onnxruntime.InferenceSession(directory / "model.onnx", settings)
loaded = time.perf_counter()
cache = {
    given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
    for given in session.get_inputs()
    if given.name.startswith("past_key_values.")
}
outputs = [given.name for given in session.get_outputs()]
tokens, fed, first = [], prompt, loaded
while len(tokens) < count:
    mask = np.ones((1, len(prompt) + len(tokens)), np.int64)
    feeds = {"input_ids": np.array([fed], np.int64), "attention_mask": mask, **cache}
    found = dict(zip(outputs, session.run(None, feeds), strict=True))
    fed = [int(found["logits"][0, -1].argmax())]
    tokens += fed
    cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
    first = time.perf_counter() if len(tokens) == 1 else first
seconds = time.perf_counter() - first
print(json.dumps({"tokens": tokens, "load_seconds": loaded - began, "decode_seconds": seconds}))
