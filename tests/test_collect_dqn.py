"""DQN's learning runs as data: the learner, the log, its parts, and the bundled sets."""

import dataclasses
import json

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load_tool

dqn = load_tool("datasets/collect_dqn.py")
doctor = load_tool("datasets/doctor.py")
BUNDLED = ("cartpole/uniform-10", "cartpole/medium", "minatar-breakout/uniform-10")
SHORT = dataclasses.replace(
    dqn.GAMES["minatar-asterix"],
    env_id="CartPole-v1",
    limit=None,
    warmup=100,
    exploration=400,
    memory=150,
    copy_every=50,
)


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch, own_store):  # noqa: ARG001 (which it follows)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))


@pytest.fixture
def short(monkeypatch):
    """CartPole with a schedule of a few hundred steps."""
    monkeypatch.setitem(dqn.GAMES, "cartpole", SHORT)
    monkeypatch.setattr(dqn, "EVALUATIONS", 3)
    monkeypatch.setattr(dqn, "MEDIUM_EPISODES", 4)


def read(name):
    """(episodes, metadata) of a set in the store."""
    data = minari.load_dataset(f"stitch/{name}-v0")
    return list(data.iterate_episodes()), data.storage.metadata


def check_error(capsys, *argv):
    assert dqn.main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- the learner


def test_update_is_mnihs():
    """One update's gradient against float64 arithmetic: Huber's loss of r + gamma max Q'(s')."""
    env = gym.make("CartPole-v1")
    learner = dqn.DQN(SHORT, env, 0, lambda _: None)
    learner.target.load_state_dict(dqn.Network(env).state_dict())
    for net in (learner.net, learner.target):
        net.double()
        net.forward = lambda obs, net=net: torch.nn.Sequential.forward(net, obs)
    generator = torch.Generator().manual_seed(1)
    obs, next_obs = 3 * torch.randn(2, 6, 4, generator=generator).double()
    action, terminated = torch.tensor([0, 1, 1, 0, 1, 0]), torch.tensor([0.0, 1, 0, 0, 1, 0])
    reward = 2 * torch.randn(6, generator=generator).double()

    def values(net, x):
        for i in (0, 2, 4):
            x = (x.clamp(min=0) if i else x) @ net[i].weight.T + net[i].bias
        return x

    target = reward + 0.99 * (1 - terminated) * values(learner.target, next_obs).max(1).values
    error = values(learner.net, obs)[torch.arange(6), action] - target.detach()
    loss = torch.where(error.abs() < 1, error**2 / 2, error.abs() - 0.5).mean()
    expected = torch.autograd.grad(loss, list(learner.net.parameters()))
    learner.update(obs, action, reward, next_obs, terminated)
    for parameter, grad in zip(learner.net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_epsilon_falls_to_its_end_and_the_memory_is_a_ring():
    env = gym.make("CartPole-v1")
    learner = dqn.DQN(SHORT, env, 0, lambda _: None)
    learner.net.greedy = lambda _: -1
    obs = env.reset(seed=0)[0]
    for steps, low, high in ((0, 1, 1), (200, 0.45, 0.6), (400, 0.02, 0.08), (9000, 0.02, 0.08)):
        learner.steps = steps
        assert low <= np.mean([learner.act(obs) >= 0 for _ in range(2000)]) <= high
    learner.steps = 0
    for number in range(151):
        learner.see(obs, 1, float(number), obs, False)
    assert learner.memory["reward"][:2].tolist() == [150, 1] and learner.steps == 151


def test_network_of_images_takes_young_and_tians_shape():
    box = gym.spaces.Box(0, 1, (10, 10, 4), bool)
    env = gym.Env()
    env.observation_space, env.action_space = box, gym.spaces.Discrete(3)
    net = dqn.Network(env)
    assert [tuple(p.shape) for p in net.parameters()][::2] == [(16, 4, 3, 3), (128, 1024), (3, 128)]
    assert 0 <= net.greedy(box.sample()) < 3


# ---- the log and its parts


@pytest.mark.usefixtures("short")
def test_log_repeats_itself_and_its_parts_are_of_it(tmp_path, capsys):
    words = ["cartpole", "log", "--steps", "600", "--seed", "1"]
    assert dqn.main(words) == 0
    assert dqn.main([*words, "--out", str(tmp_path / "again")]) == 0
    log, about = read("cartpole/log")
    again = json.loads((tmp_path / "again/data/metadata.json").read_text())
    assert again["fingerprint"] == about["fingerprint"]
    assert sum(len(e.rewards) for e in log) == about["total_steps"] == 600
    assert [point[0] for point in about["curve"]] == [200, 400, 600]
    assert about["ref_min_score"] < 60 and about["env_id"] == "CartPole-v1"
    assert not about["env_spec"] or gym.envs.registration.EnvSpec.from_json(about["env_spec"])
    replay(log[:3])

    assert dqn.main(["cartpole", "uniform-50"]) == 0
    part, _ = read("cartpole/uniform-50")
    ours = {e.observations.tobytes(): i for i, e in enumerate(log)}
    numbers = [ours[e.observations.tobytes()] for e in part]  # whole episodes of the log
    assert len(part) == round(len(log) / 2) and numbers[0] == 0 and numbers[-1] == len(log) - 1
    assert set(np.diff(numbers)) <= {1, 2, 3}

    assert dqn.main(["cartpole", "initial-10"]) == 0
    part, about = read("cartpole/initial-10")
    assert sum(len(e.rewards) for e in part) == about["total_steps"] == 60
    rewards, actions = (
        np.concatenate([getattr(e, key) for e in log])[:60] for key in ("rewards", "actions")
    )
    np.testing.assert_array_equal(np.concatenate([e.actions for e in part]), actions)
    np.testing.assert_array_equal(np.concatenate([e.rewards for e in part]), rewards)
    assert bool(part[-1].truncations[-1]) != bool(part[-1].terminations[-1])
    assert len(part[-1].observations) == len(part[-1].rewards) + 1

    assert dqn.main(["cartpole", "medium"]) == 0
    part, about = read("cartpole/medium")
    assert len(part) == 4 and about["epsilon"] == 0.05 and about["medium_step"] in (200, 400, 600)
    capsys.readouterr()
    log = minari.storage.get_dataset_path("stitch/cartpole/log-v0")
    (log / "policies.pt").write_bytes(b"no weights")
    assert "record the log again" in check_error(capsys, "cartpole", "uniform-1")


def replay(episodes):
    """The stored actions, played again, give what is stored."""
    env = gym.make("CartPole-v1")
    for i, episode in enumerate(episodes):
        obs, _ = env.reset(seed=None if i else 1)
        observations, rewards, terminated = [obs], [], False
        for action in episode.actions:
            obs, reward, terminated, *_ = env.step(action)
            observations.append(obs)
            rewards.append(reward)
        np.testing.assert_array_equal(episode.observations, np.stack(observations))
        np.testing.assert_array_equal(episode.rewards, rewards)
        assert episode.terminations[-1] == terminated


def test_initial_part_that_ends_with_an_episode_keeps_its_end():
    def episode(steps, terminated):
        return dqn.as_episode(np.zeros((steps + 1, 1)), [0] * steps, [1.0] * steps, terminated)

    log = [episode(10, True), episode(30, False), episode(60, True)]
    for tier, lengths, terminated in (
        ("initial-10", [10], True),
        ("initial-50", [10, 30, 10], False),
        ("uniform-50", [10, 60], True),
        ("uniform-1", [10], True),
    ):
        part = dqn.cut(log, tier)
        assert [len(e.rewards) for e in part] == lengths
        assert bool(part[-1].terminations[-1]) == terminated != bool(part[-1].truncations[-1])


def test_policies_are_those_of_the_curve():
    assert dqn.choose([(5, 10.0), (10, 42.0), (15, 58.0), (20, 100.0), (25, 30.0)]) == (10, 20)


# ---- errors


@pytest.mark.usefixtures("short")
def test_errors_are_one_line_and_keep_what_is_there(tmp_path, capsys):
    assert "cartpole log' first" in check_error(capsys, "cartpole", "uniform-10")
    (tmp_path / "old").mkdir()
    assert "exists" in check_error(capsys, "cartpole", "log", "--out", tmp_path / "old")
    assert "--steps 199: give at least 200" in check_error(
        capsys, "cartpole", "log", "--steps", 199
    )
    assert "--seed -1" in check_error(capsys, "cartpole", "log", "--seed", -1)
    assert "only with log" in check_error(capsys, "cartpole", "medium", "--steps", 900)
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("*.json"))


def test_a_missing_package_is_named(monkeypatch, capsys):
    """MinAtar is optional; so is Box2D."""

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(dqn.importlib, "import_module", absent)
    monkeypatch.setattr(gym.envs.registration, "registry", {})
    monkeypatch.setattr(gym, "registry", {})
    error = check_error(capsys, "minatar-asterix", "log")
    assert "MinAtar/Asterix-v1" in error and "pip install 'minatar'" in error


@pytest.mark.parametrize("game", dqn.GAMES)
def test_environments_start_and_have_a_limit(game):
    try:
        env = dqn.make(dqn.GAMES[game])
    except dqn.Problem as error:
        pytest.skip(str(error))
    assert env.spec.max_episode_steps in (500, 1000, 2500)
    assert dqn.Network(env).greedy(env.reset(seed=0)[0]) in env.action_space
    assert dqn.collect.requirements(env)[0].partition("==")[0] in ("gymnasium", "box2d", "MinAtar")


# ---- bundled sets


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_set_is_what_its_metadata_says(name):
    folder = REPOSITORY / "datasets" / f"{name}-v0"
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    episodes = list(minari.MinariDataset(folder / "data").iterate_episodes())
    assert dqn.collect.fingerprint(episodes) == metadata["fingerprint"]
    mean = np.mean([e.rewards.sum() for e in episodes])
    assert metadata["ref_min_score"] < mean < metadata["ref_max_score"]
    actions = np.concatenate([e.actions for e in episodes])
    assert len(np.unique(actions)) == metadata_actions(metadata)
    assert sum(path.stat().st_size for path in folder.rglob("*.hdf5")) < 8e6


def metadata_actions(metadata) -> int:
    return json.loads(metadata["action_space"])["n"]


@pytest.mark.parametrize("name", BUNDLED)
def test_doctor_finds_nothing_wrong_in_the_bundled_sets(name):
    if name.startswith("minatar"):
        pytest.importorskip("minatar")
    data = doctor.load(str(REPOSITORY / "datasets" / f"{name}-v0"))
    assert [finding.title for finding in doctor.diagnose(data)] == []
