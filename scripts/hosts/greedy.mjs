// Writes tokens with an artifact's graph and cache, the likeliest each time:
//     node greedy.mjs onnxruntime-node|onnxruntime-web ARTIFACT '[1, 2, 3]' 20
// Prints JSON: tokens, load_seconds, decode_seconds. Packages are those of the folder that $HOSTS names.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [backend, artifact, prompt, count] = process.argv.slice(2);
const ort = createRequire(join(process.env.HOSTS, "x.js"))(backend);
const file = join(artifact, "model.onnx");

const began = performance.now();
let session;
if (backend === "onnxruntime-node") {
  session = await ort.InferenceSession.create(file, { intraOpNumThreads: 1 });
} else {
  ort.env.wasm.numThreads = 1;
  const weights = { path: "model.safetensors", data: readFileSync(join(artifact, "model.safetensors")) };
  session = await ort.InferenceSession.create(readFileSync(file), { externalData: [weights] });
}
const loaded = performance.now();

const ids = JSON.parse(prompt);
const cache = {};
for (const { name, shape } of session.inputMetadata)
  if (name.startsWith("past_key_values."))
    cache[name] = new ort.Tensor("float32", [], [1, shape[1], 0, shape[3]]);
const int64 = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

const tokens = [];
let fed = ids;
let first = loaded;
while (tokens.length < Number(count)) {
  const past = ids.length + tokens.length;
  const outputs = await session.run({
    input_ids: int64(fed),
    attention_mask: int64(Array(past).fill(1)),
    ...cache,
  });
  const words = outputs.logits.dims.at(-1);
  const last = outputs.logits.data.subarray(-words);
  let best = 0;
  for (let i = 1; i < words; i++) if (last[i] > last[best]) best = i;
  tokens.push(best);
  fed = [best];
  for (const name in cache) cache[name] = outputs[name.replace("past_key_values", "present")];
  if (tokens.length === 1) first = performance.now();
}
console.log(JSON.stringify({
  tokens,
  load_seconds: (loaded - began) / 1000,
  decode_seconds: (performance.now() - first) / 1000,
}));
