"""Collection: recording, packing, fingerprints, the tiers' rule, mazes, and the bundled sets."""

import itertools
import json
import signal
from collections import Counter

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load_tool, toy_episodes

collect = load_tool("datasets/collect.py")

BUNDLED = sorted(path.parents[1] for path in REPOSITORY.glob("datasets/*/*/data/metadata.json"))
ROBOTS = [path for path in BUNDLED if path.parent.name in (*collect.ENVIRONMENTS, "pointmaze")]
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
    collect.write(episodes, "stitch/toy/set-v0", target, ABOUT, gym.make("Pendulum-v1"))
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


def test_fingerprint_is_the_one_that_runs_store(tmp_path, iql):
    target = tmp_path / "set"
    collect.write(toy_episodes(), "stitch/toy/set-v0", target, ABOUT, gym.make("Pendulum-v1"))
    *_, metadata = iql.load_dataset(iql.TrainConfig(dataset_id="set"))
    assert metadata["fingerprint"] == collect.fingerprint(toy_episodes())


@pytest.mark.parametrize("folder", ROBOTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_bundled_set_is_what_its_metadata_says(folder, iql):
    episodes, _, loaded = iql.load_dataset(iql.TrainConfig(dataset_id=str(folder)))
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    assert loaded["fingerprint"] == metadata["fingerprint"]
    mean = np.mean([episode["reward"].sum() for episode in episodes])
    assert metadata["ref_min_score"] < mean < metadata["ref_max_score"]


def test_bundled_sets_stay_small():
    assert {path.name for path in BUNDLED} >= {"medium-v0", "medium-replay-v0"}
    files = [path for folder in BUNDLED for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 60e6


def test_errors_are_one_line_and_keep_what_is_there(tmp_path, capsys, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("kept")
    assert collect.main(["hopper", "medium", "--out", str(tmp_path / "old")]) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "old" / "file").read_text() == "kept"
    assert collect.main(["hopper", "random", "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err
    assert collect.main(["hopper", "medium-expert", "--steps", "1"]) == 2
    assert "at least 2" in capsys.readouterr().err
    for seed in ("-1", "99999999999999999999"):
        assert collect.main(["hopper", "random", "--seed", seed]) == 2
        assert f"--seed {seed}" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setattr(collect, "collect_tier", lambda *_: pytest.fail("it has begun"))
    assert collect.main(["hopper", "medium", "--out", str(tmp_path / "file" / "set")]) == 2
    assert "another --out" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(collect, "record_tier", lambda *_: signal.raise_signal(signal.SIGINT))
        assert collect.main(["hopper", "medium"]) == 130
    assert capsys.readouterr().err.startswith("interrupted")
    monkeypatch.setattr(collect, "POLICIES", tmp_path)
    assert collect.main(["hopper", "medium", "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "train" in error and error.count("\n") == 1


@pytest.mark.parametrize("robot, what", [("pointmaze", "train"), ("hopper", "umaze")])
def test_robots_name_what_they_have(robot, what, capsys, tmp_path):
    assert collect.main([robot, what, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {robot} has no {what}: give one of ")
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_replay_is_cut_where_asked(capsys, tmp_path, monkeypatch):
    recipe = {"env_id": "Pendulum-v1", "seed": 1, "medium_step": 300, "training_steps": 400}
    recipe |= {"algorithm": "SAC", "curve": [], "ref_min_score": -1.0, "ref_max_score": 1.0}
    torch.save({"recipe": recipe}, tmp_path / "hopper.pt")
    monkeypatch.setattr(collect, "POLICIES", tmp_path)
    monkeypatch.setitem(collect.ENVIRONMENTS, "hopper", "Pendulum-v1")
    for words, steps in (([], 300), (["--steps", "250"], 250)):
        target = tmp_path / f"set-{steps}"
        assert collect.main(["hopper", "medium-replay", *words, "--out", str(target)]) == 0
        metadata = json.loads((target / "data" / "metadata.json").read_text())
        assert metadata["total_steps"] == metadata["learner_steps"] == steps
    capsys.readouterr()
    target = str(tmp_path / "longer")
    assert collect.main(["hopper", "medium-replay", "--steps", "401", "--out", target]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --steps 401") and "at most" in error and error.count("\n") == 1


# ---- PointMaze


@pytest.fixture(scope="module")
def stitch(tmp_path_factory):
    """A small stitch set, collected by the command."""
    target = tmp_path_factory.mktemp("maze") / "stitch"
    words = ["pointmaze", "stitch", "--steps", "3500", "--out", str(target)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "MAZE_EPISODES", 5)
        assert collect.main(words) == 0
    return target


def maze_cells(env, observations) -> list[tuple]:
    cell = env.unwrapped.maze.cell_xy_to_rowcol
    return [tuple(cell(obs[:2]).tolist()) for obs in observations]


def test_scripts_evaluate_in_the_stored_maze(stitch, iql):
    cfg = iql.TrainConfig(dataset_id=str(stitch))
    episodes, space, metadata = iql.load_dataset(cfg)
    agent = iql.IQL(cfg, iql.measure(episodes, space, cfg))
    found, (low, high) = iql.find_environment(cfg, metadata, agent)
    env = gym.make(found)
    assert env.spec.max_episode_steps == 300
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        assert obs.shape == (4,) and maze_cells(env, [obs]) == [(4, 3)]
    assert low < high == 1.0
    episode = collect.walk(env, (4, 3), itertools.repeat((2, 5)), seed=0)
    assert episode.rewards.sum() == 1 and episode.terminations[-1]


def test_maze_data_follow_the_environment(stitch):
    """The stored actions, played again, give the stored observations, rewards and endings."""
    env, data = collect.maze_env("stitch"), minari.MinariDataset(stitch / "data")
    metadata = json.loads((stitch / "data" / "metadata.json").read_text())
    assert (data.total_steps, metadata["algorithm"]) == (3500, "waypoint controller")
    assert data.observation_space == gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    for i, episode in enumerate(data):
        start = maze_cells(env, episode.observations[:1])[0]
        assert start in (collect.TO_G if i % 9 == 8 else collect.TO_A)[0]
        obs, _ = env.reset(seed=i, options={"reset_cell": start})
        observations, rewards = [obs], []
        for action in episode.actions:
            obs, reward, terminated, _, _ = env.step(action)
            observations.append(obs)
            rewards.append(reward)
        np.testing.assert_array_equal(episode.observations, np.float32(observations))
        np.testing.assert_array_equal(episode.rewards, rewards)
        assert episode.terminations[-1] == terminated == episode.rewards.sum()


def test_no_stitch_episode_joins_start_and_goal():
    """In the bundled set eight of nine go from the start into A; only others reach the goal."""
    env, (_, _, start, goal) = collect.maze_env("stitch"), collect.MAZES["stitch"]
    episodes = list(minari.MinariDataset(REPOSITORY / "datasets/pointmaze/stitch-v0/data"))
    into_a, crossing, to_goal, reached = {(2, 1), (2, 2)}, (2, 3), {(2, 4), (2, 5)}, Counter()
    for i, episode in enumerate(episodes[:-1]):  # the last one is cut
        visited = set(maze_cells(env, episode.observations))
        assert not collect.joins(episode, env, goal)
        if i % 9 == 8:
            assert not visited & {start, *into_a}
            reached["goal"] += episode.terminations[-1] and {crossing, *to_goal} <= visited
        else:
            assert start in visited and not visited & {(1, 3), *to_goal}
            reached["A"] += {crossing, (2, 2)} <= visited
    assert reached["goal"] > len(episodes) / 9 * 0.5
    assert reached["A"] > len(episodes) * 8 / 9 * 0.9
    there = collect.walk(env, start, itertools.repeat(goal), seed=0)
    assert collect.joins(there, env, goal)


@pytest.mark.parametrize("name", collect.MAZES)
def test_controller_reaches_the_goal_of_every_maze(name):
    env, (_, _, start, goal) = collect.maze_env(name), collect.MAZES[name]
    for seed in range(3):
        assert collect.walk(env, start, itertools.repeat(goal), seed).terminations[-1]


def test_maze_walks_start_anywhere_and_repeat_themselves():
    env = collect.maze_env("umaze")
    first, second, other = (collect.walk_maze("umaze", env, 3000, seed) for seed in (5, 5, 6))
    assert collect.fingerprint(first) == collect.fingerprint(second) != collect.fingerprint(other)
    assert sum(len(e.rewards) for e in first) == 3000
    starts = set(maze_cells(env, [e.observations[0] for e in first]))
    assert len(starts) > 3 and (3, 1) not in starts  # nobody starts at the goal
    assert {bool(e.terminations[-1]) for e in first} == {False, True}


def test_training_anew_keeps_the_policies_that_are_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collect, "POLICIES", tmp_path)
    (tmp_path / "hopper.pt").write_bytes(b"kept")
    assert collect.main(["hopper", "train", "--steps", "1"]) == 2
    assert "hopper.pt exists" in capsys.readouterr().err
    assert (tmp_path / "hopper.pt").read_bytes() == b"kept"
