"""What scripts of discrete actions share: frames stored once, their actions, their evaluation."""

import copy
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import DISCRETE, load_script, toy_episode, words, write_dataset
from test_data import load, made
from test_runs import rows

IMAGES = gym.spaces.Box(0, 255, (12, 10, 2), np.uint8)
SPACES = {"env": None, "observation_space": IMAGES, "action_space": gym.spaces.Discrete(3, start=2)}
LENGTHS = (5, 1, 7)


def image_episodes(dtype=np.uint8) -> list:
    """The number of an episode and of a step stand in the first two pixels."""
    rng, episodes = np.random.default_rng(0), []
    for number, steps in enumerate(LENGTHS):
        frames = rng.integers(0, 256, (steps + 1, 12, 10, 2)).astype(dtype)
        frames[:, 0, 0, 0], frames[:, 0, 0, 1] = number + 1, np.arange(steps + 1) + 1
        actions = rng.integers(2, 5, steps)
        changes = {"observations": frames, "actions": actions}
        episodes.append(toy_episode(rng, steps, number != 2, **changes))
    return episodes


@pytest.fixture(autouse=True)
def vectors(own_store, monkeypatch, discrete_store):  # noqa: ARG001
    """The store of discrete toy data is there unless a test writes its own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(discrete_store))


@pytest.fixture
def dqn():
    return load_script("dqn")


@pytest.fixture
def image_store(monkeypatch, tmp_path):
    write_dataset(Path("store"), "own/images-v0", image_episodes(), **SPACES)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))


@pytest.mark.usefixtures("image_store")
@pytest.mark.parametrize("stack", [1, 3])
def test_stacks_are_of_one_episode(dqn, stack):
    """Frames are kept once, as bytes; what lies before the episode's first is 0."""
    agent, table = made(dqn, "own/images-v0", frame_stack=stack, num_seeds=2, hidden_dim=4)
    assert table["frames"].dtype == torch.uint8
    assert table["frames"].shape == (sum(LENGTHS) + 3, 240)
    batch = agent.gather(table, torch.arange(sum(LENGTHS)).expand(2, -1))
    assert batch["obs"].shape == batch["next_obs"].shape == (2, 13, stack * 240)
    expected = {"obs": [], "next_obs": []}
    for episode in image_episodes():
        padded = np.concatenate([np.zeros((stack - 1, 240)), episode.observations.reshape(-1, 240)])
        stacks = np.stack([padded[i : i + stack] for i in range(len(padded) - stack + 1)])
        expected["obs"].append(stacks[:-1].reshape(-1, stack * 240))
        expected["next_obs"].append(stacks[1:].reshape(-1, stack * 240))
    for name, parts in expected.items():
        for member in range(2):
            np.testing.assert_array_equal(batch[name][member], np.concatenate(parts))
    actions = np.concatenate([episode.actions for episode in image_episodes()])
    np.testing.assert_array_equal(batch["action"][0], actions - 2)
    assert agent.num_actions == 3 and agent.env_action(batch["action"][..., None]).min() == 2
    assert list(np.flatnonzero(batch["terminated"][1])) == [4, 5]


def test_an_unknown_last_frame_leaves_its_step_out(dqn, monkeypatch, tmp_path):
    """As a converter marks it: NaN; the step before is kept, with the next frame that it has."""
    episodes, spaces = image_episodes(np.float32), {**SPACES}
    episodes[2].observations[-1] = np.nan
    spaces["observation_space"] = gym.spaces.Box(-np.inf, np.inf, (12, 10, 2), np.float32)
    write_dataset(Path("store"), "own/cut-v0", episodes, **spaces)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    agent, table = made(dqn, "own/cut-v0", hidden_dim=4)
    assert len(table["obs"]) == sum(LENGTHS) - 1
    batch = agent.gather(table, torch.tensor([[11]]))
    assert batch["next_obs"][0, 0, :2].tolist() == [3, 7]
    assert all(values.isfinite().all() for values in batch.values())


def test_rewards_are_clipped_after_scale_and_shift(dqn):
    _, table = made(dqn, reward_scale=2, reward_shift=0.5, clip_rewards=True)
    raw = np.concatenate([e["reward"] for e in load(dqn)[0]])
    np.testing.assert_allclose(table["reward"], np.clip(2 * raw + 0.5, -1, 1), rtol=1e-6)


def test_a_share_of_the_evaluations_actions_is_random(dqn):
    """The same ones for the same seed, whoever plays."""

    class Taken(gym.Wrapper):
        def step(self, action):
            taken.append(int(action))
            return self.observation_space.low, 0.0, False, False, {}

    env, drawn, taken = Taken(gym.make("CartPole-v1")), [], []
    played, greedy = dqn.DiscreteSteps(env, 0.3), dqn.DiscreteSteps(env, 0.0)
    for seed in (0, 0, 1):
        taken.clear()
        played.reset(seed=seed)
        for _ in range(2000):
            played.step(7)
        drawn.append(taken[:])
    assert drawn[0] == drawn[1] != drawn[2]
    share = np.mean(np.array(drawn[0]) != 7)
    assert 0.27 < share < 0.33 and {*drawn[0]} == {0, 1, 7}
    played.reset(seed=0)  # the environment's own numbers, of the same seed, are others
    assert played.draws.random() != env.unwrapped.np_random.random()
    played.reset(seed=0)
    assert played.draws.random() != np.random.default_rng(0).random()
    greedy.reset(seed=0)
    taken.clear()
    for _ in range(100):
        greedy.step(7)
    assert {*taken} == {7}


class Ordered(gym.Env):
    inner = gym.spaces.Dict([("y", gym.spaces.Discrete(2)), ("b", gym.spaces.Discrete(2))])
    box = gym.spaces.Box(-9, 9, (2,), np.float32)
    observation_space = gym.spaces.Dict([("z", box), ("m", inner), ("a", box)])
    action_space = gym.spaces.Discrete(2)
    at = 0

    def seen(self):
        self.at += 1
        vector = np.full(2, self.at, np.float32)
        return {"z": vector, "m": {"y": 0, "b": 1}, "a": -vector}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.at = 0
        return self.seen(), {}

    def step(self, action):  # noqa: ARG002
        return self.seen(), 0.0, False, False, {}


@pytest.mark.parametrize("stack", [1, 2])
def test_dicts_are_played_in_the_order_of_the_data(dqn, monkeypatch, tmp_path, stack):
    """Sorted by their keys, at every depth, though the space has them in another order."""
    spec = gym.envs.registration.EnvSpec("Ordered-v0", f"{__name__}:Ordered", max_episode_steps=4)
    monkeypatch.setitem(gym.registry, spec.id, spec)
    at = np.arange(1, 6, dtype=np.float32)
    vectors, ones = np.stack([at, at], 1), np.ones(5, int)
    seen = {"z": vectors, "m": {"y": 0 * ones, "b": ones}, "a": -vectors}
    changes = {"observations": seen, "actions": np.array([0, 1, 0, 1])}
    episode = toy_episode(np.random.default_rng(0), 4, False, **changes)
    spaces = {"observation_space": Ordered.observation_space, "action_space": Ordered.action_space}
    write_dataset(tmp_path / "store", "own/ordered-v0", [episode], env=None, **spaces)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    cfg = dqn.TrainConfig(dataset_id="own/ordered-v0", env_id=spec.id, frame_stack=stack)
    episodes, space, about = dqn.load_dataset(cfg, dqn.DQN)
    units = {**dqn.measure(episodes, space, cfg), "frame_shape": about["frame_shape"]}
    played = gym.make(dqn.find_environment(cfg, about, dqn.DQN(cfg, units))[0])
    shown = dqn.env_step(played, seed=0)[0]
    expected = np.pad(episodes[0]["obs"], ((stack - 1, 0), (0, 0)))
    for i in range(4):
        np.testing.assert_array_equal(shown, expected[i : i + stack].ravel())
        shown = dqn.env_step(played, np.zeros(1))[0]
    assert episodes[0]["obs"][1].tolist() == [-2, -2, 0, 1, 1, 0, 2, 2]


def test_evaluation_plays_stacks_of_frames(dqn):
    """Twice the same, and otherwise with another share of random actions."""
    returns = []
    for i, epsilon in enumerate((0.0, 0.0, 1.0)):
        argv = words(frame_stack=3, eval_epsilon=epsilon, run_dir=f"run{i}", final_eval_episodes=8)
        assert dqn.main(argv) == 0
        returns.append([row["return"] for row in rows(f"run{i}/episodes.jsonl") if row["final"]])
    assert returns[0] == returns[1] != returns[2]


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize(
    "settings, words_of_it",
    [
        ({"encoder": "nature"}, ("encoder", "mlp")),
        ({"encoder": "lens"}, ("encoder", "minatar")),
        ({"reward_by_return_range": "true"}, ("reward_by_return_range",)),
        ({"frame_stack": 0}, ("frame_stack",)),
        ({"eval_epsilon": 2}, ("eval_epsilon",)),
        ({"env_id": "Acrobot-v1"}, ("Acrobot-v1",)),
        ({"env_id": "Pendulum-v1"}, ("Pendulum-v1", "Discrete")),
    ],
)
def test_settings_that_do_not_fit(name, refused, settings, words_of_it):
    refused(load_script(name), words(**settings), *words_of_it)


@pytest.mark.usefixtures("image_store")
def test_images_too_small_for_the_encoder(dqn, refused):
    given = {"dataset_id": "own/images-v0", "env_id": "none"}
    refused(dqn, words(encoder="nature", **given), "nature", "too small")
    normal = {"encoder": "minatar", "normalize_obs": "true"}
    refused(dqn, words(**normal, **given), "normalize_obs")
    assert dqn.main(words(encoder="minatar", **given)) == 0


@pytest.mark.usefixtures("image_store")
def test_continuous_scripts_take_neither(iql, refused):
    refused(iql, words(dataset_id="own/images-v0"), "Discrete(3", "Box")


def test_memory_that_does_not_suffice(dqn, refused, monkeypatch):
    """As torch says it on any device: a RuntimeError."""

    def full(*_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(dqn.DQN, "rows", full)
    refused(dqn, words(), "memory", "can't allocate")


def test_an_environment_that_lacks_actions_of_the_data(dqn, refused, monkeypatch, tmp_path):
    """Their numbers mean nothing to it: none is played in place of another."""
    changes = {"observations": np.zeros((6, 4)), "actions": np.array([0, 1, 2, 1, 0])}
    spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)}
    spaces["action_space"] = gym.spaces.Discrete(3)
    episode = toy_episode(np.random.default_rng(0), 5, True, **changes)
    write_dataset(Path("store"), "own/three-v0", [episode], env=None, **spaces)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    refused(dqn, words(dataset_id="own/three-v0", env_id="CartPole-v1"), "CartPole-v1", "actions")


def test_frames_are_in_memory_once(dqn):
    """Each episode's are given back when they have been copied."""
    episodes = load(dqn)[0]
    agent, _ = made(dqn)
    agent.table(episodes)
    assert episodes == [{}, {}, {}]


def test_actions_that_are_no_whole_numbers(dqn, refused, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    changes = {"observations": rng.normal(size=(6, 4)), "actions": np.array([0, 1, 0.5, 1, 0])}
    spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)}
    spaces["action_space"] = gym.spaces.Discrete(2)
    episode = toy_episode(rng, 5, True, **changes)
    write_dataset(Path("store"), "own/half-v0", [episode], env=None, **spaces)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    refused(dqn, words(dataset_id="own/half-v0", env_id="none"), "whole numbers", "doctor")


@pytest.mark.parametrize("game", ["MinAtar/Breakout-v1", "ALE/Breakout-v5"])
def test_games_of_optional_packages(dqn, game, monkeypatch, tmp_path, capsys):
    """Trained on a few frames of them, evaluated in them: stacked, with sticky actions."""
    pytest.importorskip({"M": "minatar", "A": "ale_py"}[game[0]])
    atari = game.startswith("ALE")
    if atari:
        pytest.importorskip("cv2")
        kwargs = {"frameskip": 1, "repeat_action_probability": 0.25}
        spec = gym.envs.registration.WrapperSpec
        skip = {"noop_max": 0, "frame_skip": 4, "screen_size": 84}
        place = "gymnasium.wrappers:AtariPreprocessing"
    else:
        pytest.importorskip("minatar.gym").register_envs()
    spec_ = copy.deepcopy(gym.spec(game))
    if atari:
        spec_.kwargs = {**spec_.kwargs, **kwargs}
        spec_.additional_wrappers = (spec("AtariPreprocessing", place, skip),)
    spec_.max_episode_steps = 12
    env, rng, episodes = gym.make(spec_), np.random.default_rng(0), []
    for seed in range(2):
        frames, actions, rewards = [env.reset(seed=seed)[0]], [], []
        for _ in range(6):
            actions.append(rng.integers(env.action_space.n))
            obs, reward, *_ = env.step(actions[-1])
            frames.append(obs)
            rewards.append(reward)
        changes = {"observations": np.stack(frames), "actions": np.array(actions)}
        changes["rewards"] = np.array(rewards, np.float32)
        episodes.append(toy_episode(rng, 6, False, **changes))
    write_dataset(Path("store"), "own/game-v0", episodes, env=spec_, ref_min_score=0.0)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    assert minari.load_dataset("own/game-v0").spec.env_spec.id == game
    see = {"encoder": "nature" if atari else "minatar", "frame_stack": 4, "num_updates": 2}
    more = {"eval_episodes": 0, "final_eval_episodes": 1, "num_seeds": 2}
    assert dqn.main(words(dataset_id="own/game-v0", **see, **more)) == 0, capsys.readouterr().err
    assert {row["length"] for row in rows("run/episodes.jsonl")} <= {*range(1, 13)}
