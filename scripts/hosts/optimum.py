"""optimum's ORTModelForCausalLM writes tokens with an artifact: python optimum.py ARTIFACT '[1, 2, 3]' 20."""

import json
import sys
import time

sys.path.pop(0)  # this file has the package's name

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

directory, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
began = time.perf_counter()
model = ORTModelForCausalLM.from_pretrained(directory, session_options=settings)
loaded = time.perf_counter()
given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}
model.generate(**given, max_new_tokens=1, do_sample=False)
began_writing = time.perf_counter()
written = model.generate(**given, max_new_tokens=count, do_sample=False)
seconds = time.perf_counter() - began_writing
tokens = written[0, len(prompt) :].tolist()
print(json.dumps({"tokens": tokens, "load_seconds": loaded - began, "decode_seconds": seconds}))
