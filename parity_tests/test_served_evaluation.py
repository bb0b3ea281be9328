"""lm-evaluation-harness gets the same answers from our server, through its `local-completions`, as from our engine."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from smollm_jax.commands import serve
from smollm_jax.evaluation.lm_eval_model import SmolLMHarness
from smollm_jax.generation.engine import Engine
from tests.api_server import serving


def instances(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(arguments)]


@pytest.mark.slow
def test_the_harness_gets_the_same_answers_from_the_server(weights_path, text_path):
    words = (text_path / "1861-Lincoln-1.txt").read_text(encoding="utf-8").split()
    choices = [(" ".join(words[i : i + 40]), " " + " ".join(words[j : j + 4])) for i in (0, 90) for j in (40, 130)]
    choices.append(("The capital of France is", " Paris"))
    scored = instances("loglikelihood", choices)
    written = instances(
        "generate_until", [(choice[0], {"until": ["."], "max_gen_toks": 12}) for choice in choices[::2]]
    )
    ours = SmolLMHarness(Engine.load(weights_path), quiet=True)
    with serving(serve.Flags(weights=weights_path, slots=4, context=256)) as url:
        theirs = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model=weights_path.name,
            tokenizer_backend="huggingface",
            tokenizer=str(weights_path),
            max_length=256,
            tokenized_requests=True,
        )
        for (logprob, greedy), (other, other_greedy) in zip(
            ours.loglikelihood(scored), theirs.loglikelihood(scored, disable_tqdm=True), strict=True
        ):
            assert logprob == pytest.approx(other, abs=1e-4)
            assert greedy == other_greedy
        assert any(greedy for _, greedy in ours.loglikelihood(scored))
        texts = theirs.generate_until(written, disable_tqdm=True)
        assert [text.partition(".")[0] for text in texts] == ours.generate_until(written)
