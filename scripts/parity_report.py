"""Compare JAX, PyTorch and transformers on your weights: see smollm_parity/command.py.

python scripts/parity_report.py --weights assets/SmolLM2-135M-Instruct       # writes report/index.html
"""

from smollm_jax.runtime.program import run_main
from smollm_parity.command import main

if __name__ == "__main__":
    run_main(main)
