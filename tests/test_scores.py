"""Statistics of a report: against computations by hand, and intervals against the truth."""

import itertools

import numpy as np
import pytest
from conftest import load_tool
from scipy import stats
from test_store import fake_run

numbers = load_tool("tools/scores.py")


def test_iqm_is_the_mean_of_the_middle_half():
    tasks = [np.array([0.0, 1, 2, 100]), np.array([3.0, 4, 5, 6])]
    assert numbers.iqm(*tasks) == np.mean([2, 3, 4, 5])


def test_the_interval_is_the_bootstraps_error_made_wider():
    """Of one task with three seeds, every sample can be listed."""
    task = np.array([1.0, 2.0, 6.0])
    error = np.std([numbers.iqm(np.array(s)) for s in itertools.product(task, repeat=3)])
    width = stats.t.ppf(0.975, 2) * np.sqrt(3 / 2) * error
    low, high = numbers.interval([task])
    assert (low + high) / 2 == pytest.approx(numbers.iqm(task))
    assert (high - low) / 2 == pytest.approx(width, rel=0.05)
    assert numbers.interval([task, np.array([1.0])]) is None


KINDS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skew": lambda rng, size: rng.gamma(2, size=size) - 2,
    "tails": lambda rng, size: rng.standard_t(5, size=size),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count, seeds", [(1, 4), (3, 4), (6, 4)])
def test_intervals_hold_the_truth(kind, count, seeds):
    """Of tasks of other means and spreads, at least 93 % of those that say 95 %."""
    rng, places = np.random.default_rng(0), np.linspace(0, 60, count)[:, None]
    spreads = 10 + 5 * np.arange(count)[:, None]

    def draw(n):
        return places + spreads * KINDS[kind](rng, (n, count, seeds))

    truth = numbers.iqm(draw(30_000).ravel())
    inside = [low <= truth <= high for low, high in map(numbers.interval, map(list, draw(200)))]
    assert np.mean(inside) >= 0.93


def test_improvement_counts_pairs_and_halves_draws():
    ours, theirs = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0])
    mean, low, high = numbers.improvement([ours], [theirs])
    assert low < mean < high
    assert mean == pytest.approx(np.mean([[1, 0], [1, 0.5], [1, 1]]))
    back, *ends = numbers.improvement([theirs], [ours])
    assert back == pytest.approx(1 - mean) and ends == pytest.approx([1 - high, 1 - low])


def test_improvement_is_not_certain_where_all_seeds_are_better():
    mean, low, high = numbers.improvement([np.array([2.0, 3, 4, 5])], [np.zeros(4)])
    assert mean == high == 1 and 0.5 < low < 0.7


def test_more_tasks_make_the_interval_of_improvement_narrower():
    ours, theirs = np.array([1.0, 4.0]), np.array([2.0, 3.0])
    width = {n: np.diff(numbers.improvement([ours] * n, [theirs] * n)[1:])[0] for n in (10, 40)}
    assert width[10] == pytest.approx(2 * width[40], rel=0.1)


@pytest.mark.parametrize("count, shift", [*itertools.product((1, 3, 6), (0, 0.5, 1.5))])
def test_intervals_of_improvement_hold_the_truth(count, shift):
    rng, truth = np.random.default_rng(0), stats.norm.cdf(shift / np.sqrt(2))
    inside = []
    for _ in range(1000):
        ours, theirs = rng.normal(shift, 1, (count, 4)), rng.normal(0, 1, (count, 4))
        _, low, high = numbers.improvement(list(ours), list(theirs))
        inside.append(low - 5e-4 <= truth <= high + 5e-4)  # p stands on a grid of 1/1000
    assert np.mean(inside) >= 0.93


def test_profiles_weigh_tasks_alike():
    tasks = [np.array([1.0, 3.0]), np.array([5.0, 5.0, 5.0, 0.0])]
    assert numbers.profile(tasks, np.array([0.5, 2, 4, 9])).tolist() == [0.875, 0.625, 0.375, 0]


def test_the_choice_of_a_seed_by_episodes():
    """One episode: any of them. Many: the best, where they are told apart at all."""
    policies = [np.full(100, 10.0), np.full(100, 30.0), np.full(100, 20.0)]
    values = numbers.chosen(policies, [1, 2, 3, 300], draws=4000)
    # Two episodes are of two of the three: the better one is 30 twice and 20 once.
    assert values == pytest.approx([20, 80 / 3, 30, 30], abs=0.5)
    alike = [np.array([0.0, 100.0] * 50)] * 2  # luck chooses, and is worth nothing
    assert numbers.chosen(alike, [1, 20]).tolist() == [50, 50]


def test_equals_are_chosen_by_lot():
    rare, never = np.array([0.0] * 99 + [100.0]), np.zeros(100)
    for policies in ([rare, never], [never, rare]):
        assert 0.4 < numbers.chosen(policies, [2], draws=4000)[0] < 0.6


def test_a_noisy_choice_is_worth_its_true_mean():
    rng = np.random.default_rng(0)
    policies = [rng.normal(m, 50, 4000) for m in (0, 10)]
    means = [p.mean() for p in policies]
    (few, many) = numbers.chosen(policies, [2, 2000])
    sure = stats.norm.cdf((means[1] - means[0]) / np.sqrt(2 * 50**2))
    assert few == pytest.approx(means[0] + sure * (means[1] - means[0]), abs=0.8)
    assert many == pytest.approx(means[1], abs=0.2)


def test_suites_are_of_one_source_and_kind():
    assert numbers.suite("D4RL/hopper/medium-v2", "Hopper-v4") == "D4RL locomotion"
    assert numbers.suite("datasets/hopper/medium-v0", "Hopper-v5") == "bundled locomotion"
    assert numbers.suite("datasets/pointmaze/stitch-v0", "PointMaze_UMaze-v3") == "bundled maze2d"
    assert numbers.suite("mine/pong-v0", "ALE/Pong-v5") == "mine ALE"
    assert numbers.suite("datasets/cartpole/mixed-v0", "CartPole-v1") == "bundled CartPole"


def test_only_equal_budgets_and_one_suite_are_compared(tmp_path):
    one, two = "datasets/hopper/medium-v0", "datasets/hopper/expert-v0"
    for i, (label, data, updates) in enumerate(
        [
            ("BC", one, 10),
            ("BC", two, 10),
            ("IQL", one, 10),
            ("DT", one, 20),
            ("BC", "toy/a-v0", 10),
        ]
    ):
        own = {"label": label, "dataset_id": data, "num_updates": updates}
        fake_run(tmp_path / str(i), {updates: (i, i + 2)}, env_id="Hopper-v5", **own)
    found = numbers.compared(numbers.read(tmp_path))
    assert set(found) == {("bundled locomotion", n, 0) for n in (10, 20)} | {
        ("toy locomotion", 10, 0)
    }
    both = found["bundled locomotion", 10, 0]
    assert list(both) == ["BC", "IQL"] and list(both["BC"]) == [two, one]
    ours, theirs = numbers.shared(both["BC"], both["IQL"])
    assert [list(x) for x in (*ours, *theirs)] == [[0, 2], [2, 4]]
