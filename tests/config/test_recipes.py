"""Default learning rate and warm-up of a run: they differ between new parameters and trained weights."""

import pytest

from smollm_jax.config import named_runs

CONTINUING = {"smollm2-135m-long": (3e-4, 500)}  # recipes for trained weights: peak and warm-up


@pytest.mark.parametrize("name", named_runs.RECIPES)
def test_trained_weights_get_a_low_peak_in_every_recipe(name):
    run = named_runs.by_name(name)
    recipe = run.resolve({}, trained=True)
    peak, warmup = CONTINUING.get(name, (3e-5, recipe.steps // 20))
    assert (recipe.learning_rate, recipe.warmup_steps) == (peak, max(warmup, 10))
    assert ("by default for trained weights" in run.explain({}, trained=True)) == (name not in CONTINUING)


def test_new_parameters_keep_their_peak_and_warmup():
    run = named_runs.by_name("demo")
    recipe = run.resolve({"steps": 12})
    assert (recipe.learning_rate, recipe.warmup_steps) == (1e-3, 0)
    assert run.explain({"steps": 12}) == "peak 0.001 and warm-up by default for new parameters"


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 1), (12, 6), (20, 10), (200, 10), (400, 20)])
def test_trained_weights_are_warmed_up_even_in_few_steps(steps, warmup, schedule):
    overrides = {"steps": steps, "schedule": schedule}
    assert named_runs.by_name("demo").resolve(overrides, trained=True).warmup_steps == warmup


@pytest.mark.parametrize("trained", [False, True])
def test_a_warmup_by_default_fits_before_a_long_decay(trained):
    overrides = {"steps": 200, "decay_fraction": 0.99}
    assert named_runs.by_name("demo").resolve(overrides, trained=trained).warmup_steps == 2


def test_flags_win_over_the_defaults_for_trained_weights():
    overrides = {"learning_rate": 2e-3, "warmup_steps": 0}
    recipe = named_runs.by_name("one-gpu-day").resolve(overrides, trained=True)
    assert (recipe.learning_rate, recipe.warmup_steps) == (2e-3, 0)
    assert named_runs.by_name("one-gpu-day").explain(overrides, trained=True) == ""
