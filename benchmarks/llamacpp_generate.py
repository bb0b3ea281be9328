"""The shortest llama-cpp-python script to a first token: `python llamacpp_generate.py GGUF PROMPT`.

Prints the prompt and the token, as generate.py does.
"""

import os
import sys

from llama_cpp import Llama  # pyright: ignore[reportMissingImports]  # no dependency: installed by whoever measures it

weights, prompt = sys.argv[1:]
cores = len(os.sched_getaffinity(0))
llama = Llama(weights, n_gpu_layers=0, n_threads=cores, n_threads_batch=cores, verbose=False)
print(prompt + llama(prompt, max_tokens=1, temperature=0.0)["choices"][0]["text"], flush=True)
