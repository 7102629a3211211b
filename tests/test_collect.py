"""Collection: recording, packing, fingerprints, the tiers' rule, and the bundled sets."""

import importlib.util
import json

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load_script, toy_episodes

spec = importlib.util.spec_from_file_location("collect", REPOSITORY / "datasets" / "collect.py")
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)

BUNDLED = sorted(path.parents[1] for path in REPOSITORY.glob("datasets/*/*/data/metadata.json"))
ABOUT = {
    "env_id": "Pendulum-v1",
    "algorithm": "SAC",
    "ref_min_score": -1.0,
    "ref_max_score": 1.0,
    "description": "toy",
}


def test_tiers_follow_the_curve():
    curve = [(5, 10.0), (10, 20.0), (15, 45.0), (20, 35.0), (25, 100.0), (30, 60.0)]
    assert collect.choose(curve) == (15, 25)  # the first within 33 to 50, the best
    with pytest.raises(collect.CollectError, match="33 to 50"):
        collect.choose([(5, 10.0), (10, 100.0)])


def test_recording_repeats_itself_and_keeps_the_true_last_observation():
    actor = collect.Actor(3, 1)
    first, second = (collect.record(actor, "Pendulum-v1", 250, seed=3) for _ in range(2))
    assert collect.fingerprint(first) == collect.fingerprint(second)
    assert collect.fingerprint(first) != collect.fingerprint(
        collect.record(actor, "Pendulum-v1", 250, seed=4)
    )
    assert [len(e.rewards) for e in first] == [200, 50]
    assert [e.observations.shape for e in first] == [(201, 3), (51, 3)]
    env = gym.make("Pendulum-v1")
    env.reset(seed=3)
    for action in first[0].actions:
        last, *_ = env.step(action)
    np.testing.assert_allclose(first[0].observations[-1], last, rtol=1e-6)
    assert first[0].truncations.tolist() == [False] * 199 + [True]
    assert not first[0].terminations.any()


def test_a_shorter_training_is_the_beginning_of_a_longer_one():
    torch.set_num_threads(1)
    seen = []
    short = collect.train_sac("Pendulum-v1", 5_030, seed=1)
    long = collect.train_sac("Pendulum-v1", 5_060, 1, lambda *at: seen.append(at[0]), 5_020)
    actions = [np.concatenate([e.actions for e in run]) for run in (short, long)]
    assert len(actions[1]) == 5_060 and seen == [5_020]
    np.testing.assert_array_equal(actions[0], actions[1][:5_030])


def test_sac_losses_match_their_equations():
    """One update against plain float64 arithmetic: critics, actor, temperature, targets."""
    torch.manual_seed(0)
    agent = collect.SAC(3, 2)
    for module in (agent.actor, agent.critic, agent.target):
        module.double()
    batch = {"obs": torch.randn(5, 3).double(), "action": torch.rand(5, 2).double() * 2 - 1}
    batch |= {"reward": torch.randn(5).double(), "next_obs": torch.randn(5, 3).double()}
    batch |= {"terminated": torch.tensor([0.0, 1, 0, 0, 1]).double()}

    def q(critic, i, obs, action):
        x = torch.cat([obs, action], -1)
        for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            x = (x.clamp(min=0) if layer else x) @ weight[i] + bias[i]
        return x[:, 0]

    def policy(actor, obs, noise):
        mean, log_std = actor.trunk(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        raw = mean + normal.scale * noise
        return raw.tanh(), (normal.log_prob(raw) - torch.log(1 - raw.tanh() ** 2)).sum(-1)

    before = {k: v.clone() for k, v in agent.target.state_dict().items()}
    torch.manual_seed(7)
    noise = [torch.randn(5, 2).double() for _ in range(2)]
    with torch.no_grad():
        action, log_prob = policy(agent.actor, batch["next_obs"], noise[0])
        both = [q(agent.target, i, batch["next_obs"], action) for i in range(2)]
        next_v = torch.minimum(*both) - log_prob  # alpha = exp(0) = 1
        target = batch["reward"] + 0.99 * (1 - batch["terminated"]) * next_v
    loss = sum(
        ((q(agent.critic, i, batch["obs"], batch["action"]) - target) ** 2).mean() for i in (0, 1)
    )
    critic_grads = torch.autograd.grad(loss, list(agent.critic.parameters()))
    steps = iter(noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: next(steps))
        agent.update(**batch)
    for parameter, grad in zip(agent.critic.parameters(), critic_grads, strict=True):
        torch.testing.assert_close(
            agent.critic_opt.state[parameter]["exp_avg"], 0.1 * grad, rtol=1e-6, atol=1e-12
        )
    for name, value in agent.target.state_dict().items():
        moved = before[name] + 0.005 * (agent.critic.state_dict()[name] - before[name])
        torch.testing.assert_close(value, moved, rtol=1e-9, atol=1e-12)


def test_written_sets_are_packed_and_whole(tmp_path):
    episodes = toy_episodes()
    target = tmp_path / "set"
    collect.write(episodes, "stitch/toy/set-v0", target, ABOUT)
    with h5py.File(target / "data" / "main_data.hdf5") as file:
        for array in (file["episode_0/observations"], file["episode_2/rewards"]):
            assert array.dtype == np.float32 and array.compression == "gzip"
            assert array.chunks == array.shape
    loaded = minari.MinariDataset(target / "data")
    assert loaded.total_steps == 71 and loaded.env_spec.id == "Pendulum-v1"
    for episode, original in zip(loaded, episodes, strict=True):
        np.testing.assert_array_equal(episode.observations, original.observations)
        np.testing.assert_array_equal(episode.terminations, original.terminations)
    assert list(tmp_path.iterdir()) == [target]  # nothing temporary is left


def test_fingerprint_is_the_one_that_scripts_print(tmp_path):
    target, iql = tmp_path / "set", load_script("iql")
    collect.write(toy_episodes(), "stitch/toy/set-v0", target, ABOUT)
    loaded = iql.load_dataset("set", target / "data")
    assert loaded.fingerprint == collect.fingerprint(toy_episodes())


@pytest.mark.parametrize("folder", BUNDLED, ids=lambda path: "/".join(path.parts[-2:]))
def test_bundled_set_is_what_its_metadata_says(folder):
    loaded = load_script("iql").load_dataset("bundled", folder / "data")
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    assert loaded.fingerprint == metadata["fingerprint"]
    assert metadata["ref_min_score"] < loaded.returns.mean() < metadata["ref_max_score"]


def test_bundled_sets_stay_small():
    assert {path.name for path in BUNDLED} >= {"medium-v0", "medium-replay-v0"}
    hopper = REPOSITORY / "datasets" / "hopper"
    assert sum(path.stat().st_size for path in hopper.rglob("*") if path.is_file()) < 30e6


def test_errors_are_one_line_and_keep_what_is_there(tmp_path, capsys, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("kept")
    assert collect.main(["hopper", "medium", "--out", str(tmp_path / "old")]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "old" / "file").read_text() == "kept"
    assert collect.main(["hopper", "random", "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err
    monkeypatch.setattr(collect, "POLICIES", tmp_path)
    assert collect.main(["hopper", "medium", "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "train" in error and error.count("\n") == 1


def test_training_anew_keeps_the_policies_that_are_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "POLICIES", tmp_path)
    (tmp_path / "hopper.pt").write_bytes(b"kept")
    assert collect.main(["hopper", "train", "--steps", "1"]) == 2
    assert "hopper.pt exists" in capsys.readouterr().err
    assert (tmp_path / "hopper.pt").read_bytes() == b"kept"
