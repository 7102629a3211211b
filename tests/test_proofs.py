"""The behavioural proofs: the command, its helpers at a tiny scale, and what is stored."""

import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TOY, contents, load_tool, toy_episode

FOLDER = REPOSITORY / "benchmarks" / "proofs"
prove = load_tool("benchmarks/proofs/prove.py")

NAMES = {
    "td3_bc_alpha",
    "discrete_narrow",
    "rem_wide",
    "brac_alpha",
    "awac_temperature",
    "bcq_support",
    "fql_peaks",
    "edac_diversity",
    "spot_peaks",
    "cql_pessimism",
    "xql_soft_maximum",
    "stitching",
    "dt_targets",
}
FIELDS = {"proof", "claim", "criterion", "holds", "numbers", "seeds", "runs", "commit", "seconds"}
STORED = sorted((FOLDER / "results").glob("*.json"))


@pytest.fixture
def tiny(toy_store):
    """Settings that make a run of a proof short."""
    size = {"num_updates": 4, "batch_size": 8, "hidden_dim": 8, "log_every": 2}
    return {"dataset_id": str(toy_store / TOY), **size}


@pytest.fixture
def lab(tmp_path, tiny):
    return prove.Lab(tmp_path / "lab", changes=tiny)


def test_every_proof_is_listed_with_its_claim_and_criterion(capsys):
    assert set(prove.PROOFS) == NAMES
    for name, about in prove.PROOFS.items():
        assert about.measure is getattr(prove, name)
        assert about.claim.endswith(".") and about.criterion.endswith(".") and about.seconds > 0
    with pytest.raises(SystemExit) as end:
        prove.main(["--help"])
    assert end.value.code == 0
    assert NAMES <= set(capsys.readouterr().out.replace(",", " ").split())


def test_a_whole_proof_at_a_tiny_scale(tiny, tmp_path, monkeypatch, capsys):
    run_proof, store = prove.run_proof, os.environ["MINARI_DATASETS_PATH"]
    monkeypatch.setattr(prove, "run_proof", lambda name, say: run_proof(name, say, tiny))
    out = tmp_path / "new" / "folder"
    code = prove.main(["awac_temperature", "--out", str(out)])
    result = json.loads((out / "awac_temperature.json").read_text())
    assert result.keys() == FIELDS and len(result["runs"]) == 5
    assert code == (0 if result["holds"] else 1)
    (shares,) = result["numbers"].values()
    assert all(len(seeds) == 4 and 0 < min(seeds) <= max(seeds) <= 1 for seeds in shares.values())
    assert result["runs"][0]["command"].startswith("python algorithms/awac.py --download false")
    assert (out / "proofs.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "min left" in printed and f"| {result['claim']} |" in printed
    assert os.environ["MINARI_DATASETS_PATH"] == store


def test_a_claim_that_does_not_hold_is_stored_and_is_exit_code_1(tmp_path, monkeypatch, capsys):
    numbers = {"effective share of the samples": {"10": [0.5] * 4, "1": [0.6] * 4}}
    monkeypatch.setattr(prove.PROOFS["awac_temperature"], "measure", lambda _: numbers)
    assert prove.main(["awac_temperature", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "awac_temperature.json").read_text())
    assert result["holds"] is False and result["numbers"] == numbers
    assert "| NO |" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for argv, named in (
        (["nonsense", "--out", str(tmp_path / "new")], "nonsense"),
        (["awac_temperature", "nonsense", "--out", str(tmp_path / "new")], "awac_temperature"),
        (["awac_temperature", "--out", str(tmp_path / "file")], str(tmp_path / "file")),
    ):
        assert prove.main(argv) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("error: ") and named in line and len(line.splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_run_that_fails_is_named(lab):
    with pytest.raises(prove.ProofError, match="bc ended with exit code 2"):
        lab.train("bc", actor_lr=-1)


def test_values_of_a_policy_are_its_discounted_returns():
    """From the states of the observations: those of a real episode, played on from its middle."""

    class Push:
        cfg = SimpleNamespace(gamma=0.9)

        def act(self, obs):
            return 0.4 * torch.tanh(obs.sum(-1, keepdim=True))

    env, obs, rewards = prove.gym.make("Pendulum-v1"), [], []
    obs.append(env.reset(seed=3)[0])
    for _ in range(40):
        action = 2 * Push().act(torch.as_tensor(obs[-1])).numpy()
        step_obs, reward, *_ = env.step(action)
        obs.append(step_obs)
        rewards.append(reward)
    starts = torch.as_tensor(np.stack([obs[0], obs[10]])).unsqueeze(0)
    expected = [sum(0.9**t * r for t, r in enumerate(rewards[k : k + 30])) for k in (0, 10)]
    kept = starts.clone()
    found = prove.pendulum_values(Push(), starts, steps=30)
    assert found == pytest.approx([np.mean(expected)], rel=1e-3) and torch.equal(starts, kept)


def test_datasets_are_written_to_the_temporary_store():
    episodes = [toy_episode(np.random.default_rng(0), 5, True)]
    episodes[0].actions[:] = 0.5
    with prove.temporary_store() as folder:
        lab = prove.Lab(folder)
        assert lab.write_dataset("proofs/toy-v0", episodes, obs_dim=3, act_dim=1)
        obs = lab.observations("proofs/toy-v0")
        assert obs.shape == (4, 2000, 3)
        np.testing.assert_array_equal(obs[3, 0], episodes[0].observations[0])
        np.testing.assert_array_equal(obs[0, -1], episodes[0].observations[-2])
    assert not folder.exists()


def test_rank_correlation():
    assert math.isclose(prove.spearman([1, 2, 3, 4], [10, 20, 30, 35]), 1)
    assert math.isclose(prove.spearman([1, 2, 3, 4], [10, 30, 20, 35]), 0.8)
    assert math.isclose(prove.spearman([1, 2, 3, 4], [9, 7, 5, -1]), -1)
    assert prove.spearman(range(5), [9, 8, 5, 1, 2]) == -0.9  # and not beside it by rounding
    assert prove.spearman([1, 2, 3, 4], [7, 7, 7, 7]) == 0  # a policy that ignores its target


def test_criteria_fail_where_the_claim_is_wrong():
    def holds(name, **numbers):
        return prove.PROOFS[name].holds(
            {measure.replace("_", " "): values for measure, values in numbers.items()}
        )

    names = ("2.5", "0.25", "0.025", "0")
    for values, right in (([9, 3, 2, 0], True), ([9, 3, 4, 0], False), ([9, 3, 2, 1], False)):
        distance = {name: [v] * 4 for name, v in zip(names, values, strict=True)}
        assert holds("td3_bc_alpha", distance_to_BC=distance) is right
    for last, right in ((0.4, True), (2.0, False)):
        fall = {str(i): [v] * 4 for i, v in enumerate([9.0, 6.0, 3.0, last])}
        kl, distance = "KL divergence from b", {"0.1": [1.0] * 4, "1e4": [last / 9] * 4}
        assert prove.PROOFS["brac_alpha"].holds({kl: fall, "distance to b": distance}) is right
    for share, right in (([1.0, 0.0], True), ([0.9, 0.0], False), ([1.0, 0.3], False)):
        both = {name: [v] * 4 for name, v in zip(("BCQ", "TD3"), share, strict=True)}
        assert holds("bcq_support", share_on_the_support=both) is right
    found = {"BC": (0.0, 0.0), "FQL, alpha 100": (0.9, 0.5), "FQL, alpha 0.03": (0.95, 0.95)}
    for name, on, better, right in (
        ("BC", 0.0, 0.0, True),
        ("BC", 0.2, 0.1, False),
        ("FQL, alpha 100", 0.7, 0.5, False),
        ("FQL, alpha 100", 0.9, 0.8, False),
        ("FQL, alpha 100", 0.9, 0.2, False),
        ("FQL, alpha 0.03", 0.95, 0.8, False),
    ):
        shares = {**found, name: (on, better)}
        both = [{key: [pair[i]] * 4 for key, pair in shares.items()} for i in (0, 1)]
        assert (
            holds("fql_peaks", share_on_a_peak=both[0], share_on_the_better_peak=both[1]) is right
        )
    for cosine, pessimism, right in ((0.2, 3, True), (0.9, 3, False), (0.2, 1.4, False)):
        few = {"cosine, SAC-N": 0.8, "cosine, EDAC": cosine}
        few = {measure: {n: [v] * 4 for n in ("2", "5", "10")} for measure, v in few.items()}
        for name, factor in (("SAC-N", 1), ("EDAC", pessimism)):
            each = {str(n): [factor * n / 10] * 4 for n in (2, 5, 10)}
            few[f"pessimism, {name}"] = each
        assert prove.PROOFS["edac_diversity"].holds(few) is right
    for share, right in (
        ([0.9, 0.2, 0.7, 0.1], True),
        ([0.8, 0.2, 0.7, 0.1], False),
        ([0.9, 0.3, 0.7, 0.1], False),
        ([0.9, 0.2, 0.1, 0.8], False),
    ):
        one_is_off = {str(i): [[1.0, 0.0, 0.0, 0.0][i]] * 3 + [v] for i, v in enumerate(share)}
        assert holds("spot_peaks", share_on_the_better_peak=one_is_off) is right
    for cql, right in ((1.0, True), (3.0, False)):
        learned = {"CQL": [1.0, cql], "SAC": [9.0, 9.0]}
        true = {"CQL": [2.0, 2.0], "SAC": [2.0, 2.0]}
        assert holds("cql_pessimism", learned_value=learned, true_value=true) is right
    for fitted, exact, iql, right in (
        ([0.1, 0.4], [0.14, 0.4], 0.3, True),
        ([0.1, 0.4], [0.16, 0.4], 0.3, False),
        ([0.1, 0.4], [0.1, 0.4], 0.41, False),
        ([0.4, 0.39], [0.4, 0.4], 0.3, False),
    ):
        values = {"X-QL": fitted, "soft maximum": exact, "IQL": [0.0, iql, 0.5]}
        values = {name: {str(i): [v] * 4 for i, v in enumerate(x)} for name, x in values.items()}
        assert prove.PROOFS["xql_soft_maximum"].holds(values) is right
    for bc, right in ((0.0, True), (0.5, False)):
        reached = {"BC": [0.0, bc], "DT": [0.0, 0.0], "IQL": [1.0, 0.9]}
        name = "share of episodes that reach the goal"
        assert prove.PROOFS["stitching"].holds({name: reached}) is right
    for returns, right in (([1, 3, 2, 4], True), ([5, 5, 5, 5], False), ([4, 1, 3, 2], False)):
        achieved = {str(i): [v] * 4 for i, v in enumerate(returns)}
        assert holds("dt_targets", achieved_return=achieved) is right


@pytest.mark.parametrize("path", STORED, ids=[path.stem for path in STORED])
def test_stored_results(path):
    """Every stored verdict is the criterion's own of the stored numbers."""
    result = json.loads(path.read_text(encoding="utf-8"))
    about = prove.PROOFS[path.stem]
    assert result.keys() == FIELDS and result["proof"] == path.stem
    assert (result["claim"], result["criterion"]) == (about.claim, about.criterion)
    assert result["holds"] == about.holds(result["numbers"])
    assert result["seeds"] == [0, 1, 2, 3] and result["commit"] and result["seconds"] > 0
    for measure in result["numbers"].values():
        assert all(len(seeds) == 4 for seeds in measure.values())
    for run in result["runs"]:
        assert run["command"].startswith("python algorithms/") and "--run_dir" not in run["command"]
        assert len(run["fingerprint"]) == 16 and run["updates"] > 0 and run["seconds"] > 0
