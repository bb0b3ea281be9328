"""Flags of other tools, to suggest ours in an error message; they are not aliases.

The other tools are transformers' TrainingArguments, TRL, nanoGPT, litgpt, torchtitan, llama.cpp, mlx-lm, vLLM and
lm-eval.
"""

from typing import NamedTuple


class Names(NamedTuple):
    """Our flags for other tools' names, separated by spaces; the flags that the script has are suggested."""

    ours: str
    theirs: str
    note: str = ""  # shown with the suggestion; one that starts with "-" replaces it


class Absent(NamedTuple):
    """Advice for other tools' flags that have no counterpart in scripts with the flag `required_flag` ("": any)."""

    required_flag: str
    theirs: str
    advice: str


SYNONYMS = (
    Names("learning-rate", "lr peak-lr max-lr base-lr learn-rate"),
    Names(
        "steps",
        "max-steps num-steps n-steps total-steps train-steps training-steps num-train-steps iters max-iters num-iters "
        "iterations total-iters train-iters",
    ),
    Names("steps", "epochs epoch num-epochs num-train-epochs max-epochs n-epochs", "steps are counted, not epochs"),
    Names(
        "batch-size",
        "batch bs train-batch-size train-batch per-device-train-batch-size per-device-batch-size device-batch-size "
        "micro-batch-size global-batch-size total-batch-size mbs gbs b",
        "sequences a step, over all devices",
    ),
    Names(
        "gradient-accumulation-steps",
        "grad-accum grad-acc grad-accumulation grad-accum-steps grad-acc-steps gradient-accumulation accum accum-steps "
        "accumulation-steps accumulate-grad-batches gas micro-batches",
    ),
    Names(
        "sequence-length length",
        "seq-len seqlen seq-length max-seq-len max-seq-length max-sequence-length max-length block-size context-length "
        "ctx ctx-len ctx-size n-ctx context-size cutoff-len model-max-length max-model-len sequence-len c",
    ),
    Names("sequence-length", "length context"),
    Names(
        "max-new-tokens new-tokens",
        "n n-predict num-predict num-tokens max-gen-tokens max-completion-tokens max-output-tokens "
        "max-length max-len max-gen-len length gen-len tokens new-tokens",
    ),
    Names("steps", "n"),
    Names("schedule", "lr-scheduler-type lr-scheduler scheduler lr-schedule lr-decay-style scheduler-type decay"),
    Names(
        "warmup-steps", "warmup warmup-ratio num-warmup-steps warmup-iters lr-warmup-steps warm-up", "a number of steps"
    ),
    Names("decay-fraction", "decay-ratio cooldown-fraction cooldown decay-steps", "a share of the steps"),
    Names("weight-decay", "wd l2 decay-weight"),
    Names("adam-beta2", "beta2"),
    Names("lora-rank", "lora lora-r r rank peft use-peft use-lora", "a number, such as 16"),
    Names("lora-alpha", "alpha"),
    Names("lora-dropout", "dropout"),
    Names("lora-targets", "target-modules lora-target-modules lora-layers"),
    Names("adapter", "lora lora-path lora-adapter adapter-path peft peft-model"),
    Names("mask-documents", "packing document-mask reset-attention-mask intra-document-masking"),
    Names("out dst", "o output output-dir output-path output-file output-folder out-dir outdir out-path outfile"),
    Names("out dst", "save save-dir save-path save-to logdir log-dir logging-dir run-dir run-name ckpt-dir"),
    Names("out", "run name experiment exp-name"),
    Names(
        "weights src init-from preset like",
        "model model-path model-name model-name-or-path model-id model-dir model-file m hf-path pretrained "
        "pretrained-model base-model checkpoint checkpoint-dir checkpoint-file ckpt ckpt-path ckpt-dir load load-from "
        "weights-path init resume-from-checkpoint from-pretrained",
    ),
    Names("preset", "config model-config model-size model-type size arch"),
    Names("resume", "resume-from resume-from-checkpoint continue continue-from restart auto-resume load-checkpoint"),
    Names(
        "data sources text",
        "dataset datasets dataset-name dataset-path train-data train-file training-data data-dir data-path "
        "data-file data-files input-data corpus text text-file texts input input-file input-dir files file i d",
    ),
    Names("src", "input input-file input-dir input-path i from source in"),
    Names("prompt prompt-file", "p text input message question query instruction prompts user i"),
    Names("prompt-file", "f file input-file prompts-file"),
    Names("system", "sys system-prompt system-message system-prompt-file"),
    Names("history", "conversation messages session load-session"),
    Names("chat", "apply-chat-template chat-template chat-mode instruct conversation conv cnv use-chat-template"),
    Names("temperature", "t temp-scale sampling-temperature"),
    Names("temperature", "do-sample sample sampling greedy", "0 is greedy, more samples"),
    Names("top-k", "k topk"),
    Names("top-p", "topp nucleus nucleus-p p"),
    Names("min-p", "minp"),
    Names("repetition-penalty", "repeat-penalty rep-pen rep-penalty presence-penalty frequency-penalty penalty"),
    Names("stop", "stop-token stop-tokens stop-sequence stop-sequences stop-string stop-strings eos until"),
    Names("seed", "s random-seed rng-seed manual-seed data-seed sampling-seed"),
    Names("logprobs", "top-logprobs n-probs output-scores log-probs"),
    Names("json", "output-format format output-json as-json"),
    Names("tokenizer", "tokenizer-path tokenizer-name tokenizer-dir tokenizer-name-or-path tokenizer-file tok vocab"),
    Names("dtype type", "torch-dtype precision data-type dtypes mixed-precision amp quantize quantization q"),
    Names("dtype", "bf16 bfloat16 half fp16 float16 f16", "--dtype bfloat16"),
    Names("dtype", "fp32 float32 f32 full-precision no-half", "--dtype float32"),
    Names("type", "bf16 f16 fp16 f32 fp32 q8-0 outtype out-type ftype", "one of f32, f16, bf16, q8_0"),
    Names("to", "format outtype out-type output-format kind target convert-to"),
    Names("mesh", "tp dp fsdp ddp data-parallel tensor-parallel-size dp-size tp-size num-gpus n-gpus gpus devices"),
    Names("distributed", "multi-node multinode nnodes num-nodes nproc-per-node world-size"),
    Names("coordinator-address", "master-addr master-address coordinator rdzv-endpoint master-port"),
    Names("num-processes", "world-size nprocs num-hosts nnodes"),
    Names("process-id", "rank node-rank process-index"),
    Names("attention", "attn attn-implementation attn-impl flash-attn flash-attention use-flash-attention-2 fa"),
    Names("save-every", "save-steps save-interval save-freq checkpoint-every checkpoint-interval ckpt-every"),
    Names("save-every", "ckpt-interval save-strategy checkpointing-steps"),
    Names("eval-every", "eval-steps eval-interval eval-freq val-every val-interval validation-interval eval-iters"),
    Names("eval-every", "val-check-interval eval-strategy validate-every"),
    Names("log-every", "logging-steps log-interval log-freq log-steps logging-interval print-every"),
    Names("keep-checkpoints", "save-total-limit max-to-keep keep-last max-checkpoints keep-last-n"),
    Names("remat", "gradient-checkpointing grad-checkpointing activation-checkpointing checkpointing recompute"),
    Names("compare-with", "ref ref-model reference-model baseline compare"),
    Names("workers", "num-workers num-proc nproc n-workers jobs j threads processes"),
    Names("text-column", "column text-field text-key dataset-text-field field content-column key"),
    Names("shard-tokens", "shard-size tokens-per-shard shard max-shard-size"),
    Names("verify", "check validate checksum"),
    Names("every-checkpoint", "all-checkpoints checkpoints all-steps"),
    Names("stride", "overlap step-size"),
    Names("tasks", "task benchmarks evals"),
    Names("include", "include-path task-dir tasks-dir"),
    Names("num-fewshot", "fewshot few-shot shots n-shot nshot"),
    Names("limit", "max-samples num-samples n-samples max-examples samples"),
    Names("host", "address bind listen server-name hostname ip"),
    Names("port", "server-port listen-port p"),
    Names("loaded", "max-loaded keep-loaded cache-size"),
    Names("time-limit", "timeout max-time"),
    Names("queue", "max-queue queue-size max-requests"),
    Names("track tensorboard", "report-to wandb trackio use-wandb wandb-project logger tb log-to"),
    Names("source", "from provider"),
    Names("model", "repo repo-id name hub-model m model-name model-id weights checkpoint"),
    Names("assets", "out output output-dir dir folder target local-dir cache-dir o"),
    Names("rounds", "repeats repeat runs trials n iterations iters"),
    Names("against", "compare baseline versus vs"),
    Names("allow-unverified", "force no-verify skip-verify unsafe"),
    Names("memory", "vram gpu-memory ram limit"),
    Names("platform device", "backend"),
)
UNSUPPORTED = (
    Absent("device", "gpu gpus cuda accelerator", "--device names where it runs"),
    Absent(
        "",
        "device devices gpu gpus cuda cpu accelerator backend device-map ngl n-gpu-layers gpu-layers no-cuda use-cpu "
        "platform",
        "JAX takes the GPU where it finds one, and JAX_PLATFORMS=cpu before the command chooses the CPU",
    ),
    Absent("learning-rate", "optimizer optim opt", "the optimizer is AdamW"),
    Absent(
        "learning-rate",
        "beta1 beta2 adam-beta1 adam-beta2 betas eps adam-epsilon epsilon max-grad-norm grad-clip gradient-clip-val "
        "clip clip-grad clip-grad-norm grad-norm-clip min-lr end-lr label-smoothing dropout",
        "the recipe fixes it (smollm_jax/config/recipe.py)",
    ),
    Absent("learning-rate", "num-workers num-proc dataloader-num-workers", "prepare_data.py takes --workers"),
    Absent(
        "learning-rate",
        "lora lora-r lora-rank peft use-peft qlora",
        "finetune.py --lora-rank trains adapters",
    ),
    Absent(
        "learning-rate",
        "val-data validation-data eval-data valid-file validation-file",
        "--data's end is held out",
    ),
    Absent("max-new-tokens", "num-beams beams beam-size best-of", "there is no beam search"),
    Absent("prompt", "num-return-sequences num-samples n-samples", "give --prompt several times"),
    Absent("max-new-tokens", "stream streaming", "a single text is always shown as it comes"),
    Absent("prompt", "interactive", "scripts/chat.py talks in the terminal, scripts/app.py in the browser"),
    Absent("", "compile torch-compile jit no-compile", "programs are always compiled, and kept for the next start"),
    Absent("", "trust-remote-code", "code of a model is never run"),
    Absent("", "load-in-8bit load-in-4bit bnb", "weights are computed with in float32 or bfloat16"),
    Absent("host", "share public", "--host 0.0.0.0 lets others use the page, without a password"),
    Absent("", "verbose v quiet q silent log-level", "--debug shows the traceback of an error"),
    Absent("", "version", "pip show smollm-jax"),
)
