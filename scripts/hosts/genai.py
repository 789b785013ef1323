"""onnxruntime-genai writes tokens with an artifact as it lies: python genai.py ARTIFACT '[1, 2, 3]' 20."""

import json
import sys
import time

import onnxruntime_genai as og

directory, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
began = time.perf_counter()
model = og.Model(directory)
loaded = time.perf_counter()
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=len(prompt) + count, do_sample=False)
generator = og.Generator(model, settings)
generator.append_tokens([prompt])
generator.generate_next_token()
first, tokens = time.perf_counter(), [int(generator.get_next_tokens()[0])]
while len(tokens) < count and not generator.is_done():
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
seconds = time.perf_counter() - first
print(json.dumps({"tokens": tokens, "load_seconds": loaded - began, "decode_seconds": seconds}))
