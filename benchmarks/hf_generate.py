"""The shortest transformers script to a first token: `python hf_generate.py WEIGHTS PROMPT DTYPE DEVICE`.

Prints the prompt and the token, as generate.py does.
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

weights, prompt, dtype, device = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(weights)
model: Any = AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype))
model.to(device)
inputs = tokenizer(prompt, return_tensors="pt").to(device)
ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(prompt + tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]), flush=True)
