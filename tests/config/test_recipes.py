"""What a run takes where no flag says otherwise: new parameters and trained weights want different rates."""

import pytest

from smollm_jax.config import named_runs

OWN = {"smollm2-135m-long": (3e-4, 500)}  # made for trained weights


@pytest.mark.parametrize("name", named_runs.RECIPES)
def test_trained_weights_get_a_low_peak_whatever_the_run_was_made_for(name):
    named = named_runs.named(name)
    recipe = named.resolve({}, trained=True)
    peak, warmup = OWN.get(name, (3e-5, recipe.steps // 20))
    assert (recipe.learning_rate, recipe.warmup_steps) == (peak, max(warmup, 10))
    assert ("by default for trained weights" in named.explain({}, trained=True)) == (name not in OWN)


def test_new_parameters_keep_their_peak_and_warmup():
    named = named_runs.named("demo")
    recipe = named.resolve({"steps": 12})
    assert (recipe.learning_rate, recipe.warmup_steps) == (1e-3, 0)
    assert named.explain({"steps": 12}) == "peak 0.001 and warm-up by default for new parameters"


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 1), (12, 6), (20, 10), (200, 10), (400, 20)])
def test_trained_weights_are_warmed_up_even_in_few_steps(steps, warmup, schedule):
    given = {"steps": steps, "schedule": schedule}
    assert named_runs.named("demo").resolve(given, trained=True).warmup_steps == warmup


@pytest.mark.parametrize("trained", [False, True])
def test_a_warmup_by_default_fits_before_a_long_decay(trained):
    given = {"steps": 200, "decay_fraction": 0.99}
    assert named_runs.named("demo").resolve(given, trained=trained).warmup_steps == 2


def test_flags_win_over_the_defaults_for_trained_weights():
    given = {"learning_rate": 2e-3, "warmup_steps": 0}
    recipe = named_runs.named("one-gpu-day").resolve(given, trained=True)
    assert (recipe.learning_rate, recipe.warmup_steps) == (2e-3, 0)
    assert named_runs.named("one-gpu-day").explain(given, trained=True) == ""
