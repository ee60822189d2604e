"""experiments/fading.py: the margins that it draws, beside what can be said beforehand.

Run: pytest tests/test_fading.py
"""

import numpy as np
import pytest

from experiments import fading
from experiments.operators import average
from freqkv import FreqKVConfig, distinct, lowband, newest


@pytest.fixture
def margins(monkeypatch):
    """The margin and the share of attention after each round, with few slots and trials."""
    monkeypatch.setattr(fading, "SCHEDULE", FreqKVConfig(window=260, sinks=4, ratio=0.5))
    monkeypatch.setattr(fading, "TRIALS", 200)
    return lambda operator: fading.measure_margins(operator)


def test_a_mean_of_pairs_halves_the_margin_each_round(margins):
    measured, _ = margins(average)
    expected, _ = fading.predict_margins()
    # Of 200 planted tokens a few stand among the sinks' neighbours; all but noise is the same.
    np.testing.assert_allclose(measured[:6], expected[:6], rtol=0.03)


def test_the_low_band_is_near_the_mean_of_pairs(margins):
    low, _ = margins(lowband)
    expected, _ = fading.predict_margins()
    for rounds in range(1, 5):
        assert 0.75 < low[rounds] / expected[rounds] < 1.05


def test_what_is_selected_does_not_fade_and_what_is_evicted_goes_at_once(margins):
    kept, shares = margins(distinct)
    np.testing.assert_allclose(kept, fading.MARGIN, rtol=0.01)
    assert min(shares) > 0.99
    _, shares = margins(newest)
    assert shares[0] > 0.99
    assert 0.4 < shares[1] < 0.6  # half of the places are newer than what goes
    assert shares[3] < 0.05


def test_the_picture_and_the_table(outcome, margins, tmp_path):
    ran = outcome(fading, "--out", tmp_path / "x.png")
    assert ran.code == 0
    assert (tmp_path / "x.png").stat().st_size > 10_000
    lines = ran.out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines if "100%" in line][1:] == [
        "low band",
        "averages",
        "distinct",
    ]
