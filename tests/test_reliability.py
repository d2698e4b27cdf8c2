"""A fast slice of every promise in docs/reliability.md; `make soak` runs them to the full numbers."""

import os
import random

import pytest

import fromzero
from fromzero.recipe import Recipe
from fromzero.verify import first_difference
from tests import faults

pytestmark = [
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux's /proc"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # the children use one thread
]


def test_a_save_survives_a_failure_of_every_one_of_its_calls(tmp_path):
    outcomes = list(faults.saves_under_failures(tmp_path / "checkpoints"))
    assert len(outcomes) >= 2 * 7
    for n, _, found, error in outcomes:
        assert found >= 3, f"call {n}"
        assert error is not None or found == 4  # an error is never swallowed with the checkpoint


def test_no_power_loss_loses_an_acknowledged_checkpoint(tmp_path):
    states, lost = faults.power_loss(tmp_path, saves=4)
    assert states > 100
    assert not lost


@pytest.mark.parametrize("forgotten", ["fsync", "sync_folder"])
def test_the_simulated_power_loss_notices_a_forgotten_sync(forgotten, tmp_path):
    _, lost = faults.power_loss(tmp_path, saves=3, lose=(forgotten,))
    assert lost


def test_kills_in_the_middle_of_saves_lose_nothing(tmp_path):
    assert not faults.kill_saves(tmp_path, kills=25, seed=0)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(optimizer, tiny_images, tmp_path):
    recipe = Recipe.model_validate(
        {
            "epochs": 3,
            "batch_size": 48,
            "clean_train_images": 60,
            "network": {"channels": [[8], [12]], "block_dropout": 0.2, "dense": [16], "dense_dropout": 0.3},
            "optimizer": {"name": optimizer},
        }
    )
    straight = fromzero.train(recipe, tiny_images, runs_dir=tmp_path / "straight", threads=1)
    interruptions = 0
    for seed in range(2):
        run, interrupted, lost = faults.train_through_kills(
            recipe, tiny_images, tmp_path / str(seed), random.Random(seed), kills=4, seconds=0.15
        )
        assert not lost
        assert first_difference(straight, run) is None
        interruptions += interrupted
    assert interruptions
