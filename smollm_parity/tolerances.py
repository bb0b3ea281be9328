"""Every tolerance of the parity tests, with the measurement it comes from. Never loosened without a new one here.

Relative to the largest number of the reference unless said otherwise. "Measured" is on the real SmolLM2-135M-Instruct
weights (dequantised Q4_1) and real text, on x86-64 CPUs; bounds leave room for other CPUs, not for bugs: the mutants
(`mutant_list.py`) show that a bug is far outside them.
"""

import json
import os
from pathlib import Path

# Rung 1, float64, JAX against the twin. float64 rounding is 1.1e-16; measured 1.4e-14 (logits) and 1.1e-13
# (gradients) at T = 512.
FLOAT64_LOGITS = 1e-10
FLOAT64_GRADIENTS = 1e-9  # per tensor, norm of the difference over the norm

# Rung 2, float32 against the float64 truth: JAX's error over transformers' (eager), at every layer and at the logits.
# Measured on 256 first tokens (the attention sink, where errors are largest) and on the other tokens of eight texts:
# at most 0.83 (RMS) and 1.08 (largest); other samples gave up to 0.95 and 1.21.
FLOAT32_RMS_RATIO = 1.5
FLOAT32_MAX_RATIO = 2.0
# The difference of two float32 models: each is about 4e-6 off the truth (HF eager 1.7e-4 absolute at a largest logit
# of 40). Measured 2.8e-6 to 4.2e-6.
FLOAT32_LOGITS = 1e-5
# Where the best and second token of transformers are further apart than this (absolute), noise cannot swap them.
ARGMAX_MARGIN = 1e-3

# Rung 3, bfloat16 against the truth: JAX's KL over transformers'. Measured 0.6; a KL is quadratic in the noise, and
# two equal implementations differ by a third either way on 512 tokens (the twin: 0.63).
BFLOAT16_KL_RATIO = 1.2
# Share of argmaxes equal to the truth's: measured JAX 0.984, transformers 0.949.
BFLOAT16_PERPLEXITY = 0.01  # relative: measured 2.1e-3
BFLOAT16_ARGMAX_LOSS = 0.02  # JAX may be this much below transformers

# bfloat16 operands with float32 results, a CPU's way to train, over transformers under autocast.
AUTOCAST_KL_RATIO = 1.0
AUTOCAST_GRADIENT_RATIO = 1.0

# Rung 4, one module on inputs of any size, against the twin in float64 and transformers in float32: measured 4e-15
# and 9.2e-7.
MODULE_FLOAT64 = 1e-12
MODULE_FLOAT32 = 5e-6
# Attention on inputs with one number of 3,000: scores of some hundreds, whose float32 rounding (400 x 2**-24) is the
# relative error of a softmax weight. Measured 9.0e-6.
MODULE_FLOAT32_HUGE = 5e-5

# Rung 5, float32 gradients, per tensor, against the float64 truth: measured JAX 8.3e-5 at worst, transformers 1.1e-3
# (torch sums the norms' gradients over tokens in one float32 accumulator). JAX against transformers: the sum.
FLOAT32_GRADIENTS = 3e-4
FLOAT32_GRADIENTS_BETWEEN = 3e-3
# The mean loss, relative: measured JAX 2.6e-8, torch 2.3e-6 (its float32 mean).
FLOAT32_LOSS = 1e-6
FLOAT32_LOSS_BETWEEN = 5e-6

# Rung 6, one AdamW step in float64, parameters compared: measured 3e-16. torch clips by max / (norm + 1e-6).
ADAMW_STEP = 1e-13
TORCH_CLIP = 1e-6

# Rung 7, training from the same weights on the same batches, relative, at every step.
TRAINING_FLOAT64 = 1e-12  # 100 steps: only the order of sums differs. Measured 4.4e-15
TRAINING_FLOAT64_SHORT = 1e-13  # 10 steps: measured 4.4e-16 (loss) and 3.8e-15 (gradient norm)
TRAINING_FLOAT32_SHORT = 3e-6  # 10 steps: measured 1.8e-7 (loss) and 7.6e-7 (gradient norm)
TRAINING_FLOAT32_FULL = 2e-5  # 10 steps at the full shape: measured 1.7e-6 from fresh, 3.6e-6 from the real weights
# 100 steps: JAX's error against float64 over the twin's, RMS over the steps and over three orders of the twin's
# channels. Measured 0.92 (1.3e-7 over 1.4e-7); nine orders of the twin lay between 1.0e-7 and 2.0e-7, 0.7 to 1.4 of
# that. Before, it was the largest difference of JAX and one twin over one reordering's, at most 3: a ratio of two
# extremes of the one step (46) where the curve is steep, 3.1 on a CPU with AVX2 although JAX is nearer the truth there.
TRAINING_FLOAT32_RATIO = 2.0
TRAINING_BFLOAT16 = 3e-3  # 10 steps, tiny shape: a bfloat16 rounding is 2**-9 = 2e-3

# Rung 9, packed documents against separate ones, float32: sums over more keys, most of them masked.
PACKED_LOGITS = 1e-5

# What a smaller type of GGUF loses of the weights, RMS: at most half a step, which q8_0 has 127 of for the largest of
# each 32 numbers (32**0.5 / 254). Measured 1.9e-4, 1.4e-3 and 5.2e-3.
GGUF_LOSS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 2.3e-2}

# Rung 11, against transformers in float32, relative: a text's loss and sums over a few tokens.
QUALITY = 1e-5
LOGLIKELIHOOD = 1e-5

# Rung 12, 20 steps of fine-tuning at the tiny shape from the same weights on the same batches, against TRL, relative.
FINETUNING_FLOAT32 = 2e-5
FINETUNING_FLOAT64 = 1e-9
PACKED_LOSS = 1e-6
LORA_LOGITS = 1e-5  # of the largest logit, against peft
PREFERENCE_LOGPS = 1e-5  # of the chosen answers' log-probability, or of the reward that it is
PREFERENCE_GRADIENTS = 1e-4  # per tensor, norm of the difference over the norm
LORA_GRADIENTS = 1e-4  # per tensor of the adapter, norm of the difference over the norm


def within(measured: float, bound: float, what: str) -> None:
    """Asserts measured <= bound, and leaves a line in the file $SMOLLM_MEASURED names, for reports of margins."""
    measured, bound = float(measured), float(bound)
    if path := os.environ.get("SMOLLM_MEASURED"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, "measured": measured, "bound": bound}) + "\n")
    print(f"{what}: {measured:.2e} (bound {bound:.1e})")
    assert measured <= bound, f"{what}: {measured:.3e} exceeds {bound:.1e}"  # a NaN is not <= anything
