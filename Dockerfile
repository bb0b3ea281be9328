# A small image that serves SmolLM2-135M-Instruct, and runs every `smollm` verb but those that need PyTorch.
#
#   docker build -t smollm .                          # for a CPU
#   docker build -t smollm --build-arg JAX=cuda13 .   # for an NVIDIA GPU (cuda12 for a driver that supports CUDA 12 only)
#   docker run --rm -v smollm-cache:/cache -p 8000:8000 -e SMOLLM_API_KEY smollm   # OpenAI's API, for who has the key
#   docker run --rm -v smollm-cache:/cache smollm generate \
#     --weights assets/SmolLM2-135M-Instruct --prompt "The capital of France is"
#   docker run --rm -v smollm-cache:/cache -v "$PWD":/work --user "$(id -u)" smollm train   # --gpus all for a GPU
#
# The volume /cache keeps the weights, the text and compiled programs. Commands write their results to /work.
FROM python:3.12-slim

# The extras are those that need no PyTorch, whose wheel would bring gigabytes of CUDA libraries.
ARG EXTRAS=data,export,gguf,plot,serve,web
ARG JAX=

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY smollm_jax smollm_jax
COPY smollm_torch smollm_torch
COPY smollm_parity smollm_parity
RUN pip install --no-cache-dir ".[${EXTRAS}${JAX:+,${JAX}}]"

# Any user may write to both folders: with --user the files in a mounted folder belong to the one who mounts it.
RUN useradd --create-home smollm && install --directory --mode 1777 /cache /work
USER smollm
ENV XDG_CACHE_HOME=/cache
VOLUME /cache
WORKDIR /work

ENTRYPOINT ["smollm"]
CMD ["serve", "--host", "0.0.0.0"]
