"""What comes in and what comes out: datasets as the agents see them, and evaluation."""

import dataclasses
import json
import math
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
import yaml
from conftest import (
    DISCRETE,
    SCRIPTS,
    TOY,
    load_script,
    toy_episode,
    toy_episodes,
    words,
    write_dataset,
)
from test_runs import agent_of, rows, saved


def load(script, dataset_id: str = TOY) -> tuple:
    """Episodes, action space, metadata."""
    cfg = script.TrainConfig(dataset_id=dataset_id, download=False)
    return script.load_dataset(cfg, agent_of(script))


def made(script, dataset_id: str = TOY, **settings) -> tuple:
    """A script's agent for a dataset, and the table that it draws from."""
    (episodes, space, metadata), cfg = load(script, dataset_id), script.TrainConfig(**settings)
    shape = {"frame_shape": metadata["frame_shape"]}
    agent = agent_of(script)(cfg, {**script.measure(episodes, space, cfg), **shape})
    return agent, agent.table(episodes)


def table_of(script, dataset_id: str = TOY, **settings) -> dict:
    """The table in NumPy."""
    return {name: v.numpy() for name, v in made(script, dataset_id, **settings)[1].items()}


# ---- data


def test_transitions_as_built_by_hand(iql):
    episodes, table, expected = load(iql)[0], table_of(iql), []
    for episode in toy_episodes():
        for t in range(len(episode.rewards)):
            row = (episode.observations[t], episode.actions[t] / 2, episode.rewards[t])
            expected.append((*row, episode.observations[t + 1], float(episode.terminations[t])))
    names = ("obs", "action", "reward", "next_obs", "terminated")
    assert table.keys() == set(names)
    for i, name in enumerate(names):
        np.testing.assert_array_equal(table[name], np.stack([row[i] for row in expected]))
        assert table[name].dtype == np.float32
    assert list(np.flatnonzero(table["terminated"])) == [29, 70]
    assert [len(each["reward"]) for each in episodes] == [30, 40, 1]
    assert [len(each["obs"]) for each in episodes] == [31, 41, 2]
    assert [each["truncated"].sum() for each in episodes] == [0, 1, 0]


class Watched(dict):
    """A batch that tells what is read of it."""

    def __getitem__(self, name):
        self.read.add(name)
        return super().__getitem__(name)


def test_the_table_holds_what_updates_read_and_no_more(script):
    """A row a step, or none where a next action is needed that is not there."""
    (agent, table), Watched.read = made(script, hidden_dim=16, batch_size=4), set()
    assert {len(values) for name, values in table.items() if name != "frames"} <= {70, 71}
    for step in (0, 10**6):  # some learn in phases
        batch, noise = next(script.batches(agent, table, step))
        metrics = agent.update(Watched(batch), noise, *agent.variant(step))
        assert all(x.shape == (1,) and not x.requires_grad for x in metrics.values())
    assert Watched.read == batch.keys()


@pytest.mark.parametrize("reverse", [False, True])
def test_dict_observations_are_flattened_in_the_order_of_their_keys(iql, reverse):
    rng, episodes, flat = np.random.default_rng(0), [], []
    box = {n: gym.spaces.Box(-np.inf, np.inf, (n,), np.float64) for n in (1, 2, 3)}
    vectors = {"observation": box[3], "achieved_goal": box[2]}
    sizes = dict(vectors)
    sizes["more"] = gym.spaces.Dict({"z": box[1], "a": box[1]})
    order = sorted(sizes, reverse=reverse)
    for steps in (4, 6):
        parts = {k: rng.normal(size=(steps + 1, box.shape[0])) for k, box in vectors.items()}
        parts["more"] = {key: rng.normal(size=(steps + 1, 1)) for key in ("z", "a")}
        episodes.append(toy_episode(rng, steps, True, observations={k: parts[k] for k in order}))
        nested = [parts["more"]["a"], parts["more"]["z"]]
        flat.append(np.concatenate([parts["achieved_goal"], *nested, parts["observation"]], 1))
    spaces = {"observation_space": gym.spaces.Dict({k: sizes[k] for k in order})}
    spaces["action_space"] = gym.spaces.Box(-2, 2, (1,))
    write_dataset(Path("store"), "maze-v0", episodes, env=None, **spaces)
    for episode, expected in zip(load(iql, "store/maze-v0")[0], flat, strict=True):
        np.testing.assert_array_equal(episode["obs"], expected)
    live = {k: {"z": [1.0], "a": [2.0]} if k == "more" else [3.0] for k in order}
    space = gym.spaces.Dict({**{k: box[1] for k in vectors}, "more": sizes["more"]})
    assert iql.flatten_obs(space, live).tolist() == [3.0, 2.0, 1.0, 3.0]


def test_float64_data_is_the_same_data(iql):
    names = ("observations", "actions", "rewards")
    episodes = [
        dataclasses.replace(e, **{name: getattr(e, name).astype(np.float64) for name in names})
        for e in toy_episodes()
    ]
    spaces = {"observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)}
    spaces["action_space"] = gym.spaces.Box(-2, 2, (1,), np.float64)
    write_dataset(Path("store"), "wide-v0", episodes, **spaces)
    (one, _, about), (other, _, wide) = load(iql), load(iql, "store/wide-v0")
    assert about["fingerprint"] == wide["fingerprint"]
    for first, second in zip(one, other, strict=True):
        assert all(np.array_equal(first[k], v) for k, v in second.items())
        assert {k: v.dtype for k, v in second.items() if v.dtype != first[k].dtype}.keys() <= {
            "obs",
            "action",
            "reward",
        }
    assert iql.main(words(dataset_id="store/wide-v0")) == 0


def test_the_fingerprint_is_of_the_content_alone(iql):
    def fingerprint(name: str, script=iql) -> str:
        return load(script, name)[2]["fingerprint"]

    data = write_dataset(Path("store"), "own-v0", toy_episodes(), ref_max_score=-3.0)
    found = {fingerprint("store/own-v0")}
    assert found == {fingerprint(TOY)} == {fingerprint(TOY, load_script("dt"))}
    for array in ("observations", "actions", "rewards", "terminations", "truncations"):
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            at = 3 if array in ("observations", "actions", "rewards") else 39
            values = file[f"episode_1/{array}"]
            values[at] = ~values[at] if values.dtype == bool else values[at] / 2
        found.add(fingerprint("store/own-v0"))
    assert len(found) == 6
    episodes = toy_episodes()
    write_dataset(Path("store"), "order-v0", [episodes[1], episodes[0], episodes[2]])
    assert fingerprint("store/order-v0") not in found


def test_reward_transforms(iql):
    stored = np.concatenate([episode["reward"] for episode in load(iql)[0]])
    np.testing.assert_array_equal(table_of(iql)["reward"], stored)
    reward = table_of(iql, reward_scale=3.0, reward_shift=-1.0)["reward"]
    np.testing.assert_allclose(reward, 3 * stored - 1, rtol=1e-6)
    returns = [np.sum(e.rewards, dtype=np.float64) for e in toy_episodes()]
    spread = max(returns) - min(returns)
    options = {"reward_by_return_range": True, "reward_scale": 2.0, "reward_shift": -1.0}
    reward = table_of(iql, **options)["reward"]
    np.testing.assert_allclose(reward, 2000 * stored / spread - 1, rtol=1e-5)
    assert reward.dtype == np.float32


def test_observation_normalisation(iql):
    plain, table = table_of(iql), table_of(iql, normalize_obs=True)
    obs = plain["obs"].astype(np.float64)
    for name in ("obs", "next_obs"):
        expected = (plain[name] - obs.mean(0)) / (obs.std(0) + 1e-3)
        np.testing.assert_allclose(table[name], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(table["obs"].mean(0), 0, atol=1e-5)


def test_actions_beside_a_bound_by_rounding_are_clipped(iql):
    rng, edge = np.random.default_rng(0), np.float32(2 + 5e-6)
    actions = np.full((5, 1), edge)
    actions[3:] = -edge
    assert abs(actions).min() > 2
    write_dataset(Path("store"), "edge-v0", [toy_episode(rng, 5, True, actions=actions)])
    assert load(iql, "store/edge-v0")[0][0]["action"][:, 0].tolist() == [2, 2, 2, -2, -2]


@pytest.mark.parametrize("bound", [1e-6, 1.0])
def test_actions_far_beyond_a_bound_are_no_rounding(iql, refused, bound):
    rng, box = np.random.default_rng(0), gym.spaces.Box(-bound, bound, (1,), np.float64)
    spaces = {"env": None, "action_space": box}
    spaces["observation_space"] = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    for name, share in (("on-v0", 1 + 1e-6), ("off-v0", 1.01)):
        episode = toy_episode(rng, 5, True, actions=np.full((5, 1), share * bound))
        write_dataset(Path("store"), name, [episode], **spaces)
    assert (load(iql, "store/on-v0")[0][0]["action"] == bound).all()
    refused(iql, words(dataset_id="store/off-v0"), "action", "out of bounds")


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint32, np.float16, np.int64])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_rewards_of_any_type(iql, dtype):
    episode = toy_episode(np.random.default_rng(0), 5, True, rewards=np.ones(5, dtype))
    write_dataset(Path("store"), "own-v0", [episode])
    agent, table = made(iql, "store/own-v0", reward_scale=1e5)
    assert table["reward"].tolist() == [1e5] * 5 and table["reward"].dtype == torch.float32
    assert agent.return_range.tolist() == [5, 5]


def test_action_spaces_that_are_not_symmetric(iql):
    low, high = np.array([-1.0, 2.0], np.float32), np.array([3.0, 4.0], np.float32)
    episodes, _, _ = load(iql)
    for episode in episodes:
        episode["action"] = np.tile(np.float32([0.0, 2.5]), (len(episode["reward"]), 1))
    cfg = iql.TrainConfig(hidden_dim=4)
    agent = iql.IQL(cfg, iql.measure(episodes, gym.spaces.Box(low, high), cfg))
    ends = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [5.0, -7.0]])
    expected = torch.tensor([[-1.0, 2.0], [1.0, 3.0], [3.0, 4.0], [3.0, 2.0]])
    assert torch.equal(agent.env_action(ends), expected)
    assert torch.equal(agent.rows(episodes[0])["action"][0], torch.tensor([-0.5, -0.5]))


def test_bc_keeps_the_best_episodes():
    bc, rng = load_script("bc"), np.random.default_rng(0)
    totals = [3.0, 9.0, 1.0, 9.0, 5.0, 9.0, -2.0, 4.0, 0.0, 2.0]
    episodes = []
    for number, total in enumerate(totals):
        rewards = np.zeros(number + 1, np.float32)
        rewards[-1] = total
        episodes.append(toy_episode(rng, number + 1, number % 2 == 0, rewards=rewards))
    write_dataset(Path("store"), "ten-v0", episodes)
    stored = load(bc, "store/ten-v0")[0]
    for fraction, kept in [
        (0.0, [1]),
        (0.1, [1]),
        (0.2, [1, 3]),
        (0.3, [1, 3, 5]),
        (0.4, [1, 3, 4, 5]),
        (0.7, [0, 1, 3, 4, 5, 7, 9]),
        (1.0, list(range(10))),
    ]:
        best = bc.BC.select(stored, bc.TrainConfig(top_fraction=fraction))
        assert [len(each["reward"]) - 1 for each in best] == kept
    hundred = [{"reward": np.array([float(i)])} for i in range(100)]
    for percent in range(1, 101):  # without an error of rounding
        cfg = bc.TrainConfig(top_fraction=percent / 100)
        assert len(bc.BC.select(hundred, cfg)) == percent
    assert bc.main(words(dataset_id="store/ten-v0", top_fraction=0.1)) == 0


# ---- random numbers


def test_random_numbers_are_drawn_in_chunks_that_do_not_show(iql):
    """A run that starts in the middle of a chunk goes on with its numbers; members are apart."""
    cfg = iql.TrainConfig(num_seeds=2, seed=5, batch_size=4, hidden_dim=4, actor_dropout=0.5)
    episodes, space, _ = load(iql)
    agent = iql.IQL(cfg, iql.measure(episodes, space, cfg))
    table = {"obs": torch.arange(71.0)}

    def drawn(first: int, count: int) -> list:
        source = iql.batches(agent, table, first)
        return [next(source) for _ in range(count)]

    whole = drawn(0, 70)
    for first in (1, 31, 32, 45):
        for (batch, noise), (other, more) in zip(drawn(first, 3), whole[first:], strict=False):
            assert torch.equal(batch["obs"], other["obs"])
            assert torch.equal(noise["kept"], more["kept"])
    seen = torch.stack([batch["obs"] for batch, _ in whole])
    assert len({tuple(row) for row in seen.flatten(0, 1).tolist()}) == 140  # nothing comes twice
    assert set(seen.flatten().tolist()) == set(range(71))


def test_random_numbers_that_take_much_memory_come_in_shorter_chunks(iql, monkeypatch):
    """32 updates at once, at most 2^24 numbers a member, one update at least."""
    lengths, real = [], iql.random_numbers

    def watched(kind, size, g):
        lengths.append(size[0])
        return real(kind, (1, 1), g)

    monkeypatch.setattr(iql, "random_numbers", watched)
    cfg = iql.TrainConfig(batch_size=1, hidden_dim=4)
    episodes, space, _ = load(iql)
    agent = iql.IQL(cfg, iql.measure(episodes, space, cfg))
    table = {"obs": torch.zeros(9, 1)}
    for count, length in ((7, 32), (2**19 - 1, 32), (2**19, 31), (2**22 - 1, 4), (2**25, 1)):
        agent.noise_shapes = {"a": ("normal", (count,))}
        lengths.clear()
        next(iql.batches(agent, table, 0))
        assert set(lengths) == {length}, count


def test_random_booleans_are_independent_and_as_probable_as_asked(iql):
    """Four of them come from one number: none repeats its neighbours."""

    def booleans(p: float, seed: int) -> torch.Tensor:
        size = (1001, 401)  # no multiple of four
        return iql.random_numbers(p, size, torch.Generator().manual_seed(seed))

    flat = booleans(0.9, 0).flatten().double()
    noise = 5 / len(flat) ** 0.5
    assert abs(flat.mean() - 0.9) < 0.3 * noise
    for lag in range(1, 9):
        assert abs(torch.corrcoef(torch.stack([flat[:-lag], flat[lag:]]))[0, 1]) < noise
    lanes = flat[:-1].unflatten(0, (-1, 4)).mean(0)
    assert (lanes - 0.9).abs().max() < 0.6 * noise
    assert booleans(1 - 1e-9, 0).all() and booleans(1.0, 0).all()
    assert torch.equal(booleans(0.3, 1), booleans(0.3, 1))
    assert abs(booleans(0.3, 1).double().mean() - 0.3) < 0.5 * noise


# ---- evaluation


class Ends(gym.Env):
    """Episodes of 1 to 7 steps, by seed; an action counts; playing on after the end fails."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)
    seeds, alive, most = (), 0, 0

    def __init__(self):
        Ends.alive += 1
        Ends.most = max(Ends.most, Ends.alive)

    def close(self):
        Ends.alive -= 1

    def look(self):
        return np.array([math.sin(self.start), self.time, self.state])

    def reset(self, *, seed=None, options=None):  # noqa: ARG002
        self.start, self.time, self.state, self.over = seed, 0, 0.0, False
        Ends.seeds = (*Ends.seeds, seed)
        return self.look(), {}

    def step(self, action):
        assert not self.over, "stepped after the end"
        assert action in self.action_space
        self.time, self.state = self.time + 1, self.state + float(action.item())
        self.over = self.time == 1 + self.start % 7
        by_time = self.over and self.start % 2 == 1
        return self.look(), self.state + self.start, self.over and not by_time, by_time, {}


class DiscreteEnds(Ends):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def look(self):
        return np.array([*super().look(), 1.0])


class Breaks(Ends):
    def step(self, action):
        if self.start == 12:
            raise ValueError("a wheel came off")
        return super().step(action)


class Vague(Ends):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, math.nan, *rest


class Blind(Ends):
    def step(self, action):
        obs, *rest = super().step(action)
        return obs * math.nan, *rest


for kind in (Ends, DiscreteEnds, Breaks, Vague, Blind):
    gym.register(f"{kind.__name__}-v0", kind, disable_env_checker=True)


def policy_of(script, folder):
    """The agent of a run folder."""
    state, cfg = saved(folder)["agent"], yaml.safe_load(Path(folder, "config.yaml").read_text())
    agent = agent_of(script)(script.TrainConfig(**cfg), state)
    agent.load_state_dict(state)
    return agent


def plain_loop(agent, env, eval_seed: int, episodes: int, member: int) -> list[tuple]:
    """The reference: one episode after the other, one environment, one observation at a time."""
    found = []
    for i in range(episodes):
        obs, total, length, over = env.reset(seed=eval_seed + i)[0], 0.0, 0, False
        while not over:
            batch = torch.as_tensor(obs, dtype=torch.float32).expand(len(agent.cfg.seeds), 1, -1)
            action = agent.act(batch)[member, 0].numpy()
            action = action if isinstance(env.action_space, gym.spaces.Box) else action[0]
            obs, reward, terminated, truncated, _ = env.step(action)
            total, length, over = total + reward, length + 1, terminated or truncated
        found.append((total, length))
    return found


LOOPS = [(name, 3, f"{'Discrete' * (name in DISCRETE)}Ends-v0") for name in SCRIPTS]
LOOPS = [case for case in LOOPS if case[0] not in ("dt", "discrete_dt")]  # which have their own


@pytest.mark.parametrize(
    "name, seeds, env_id", [*LOOPS, ("iql", 1, "auto"), ("iql", 22, "Ends-v0")]
)
def test_evaluation_equals_a_plain_loop(name, seeds, env_id):
    """With 22 members two episodes of each fit into a wave of 64 environments."""
    script, given = load_script(name), {"num_seeds": seeds, "seed": 7, "env_id": env_id}
    given |= {"vae_hidden_dim": 8} if name == "bcq" else {}
    Ends.seeds, Ends.alive, Ends.most = (), 0, 0
    given |= {"eval_seed": 123, "final_eval_episodes": 5, "eval_episodes": 0, "hidden_dim": 4}
    given |= {"env_kwargs": "{g: 9.0}"} if env_id == "auto" else {}
    given |= {"eval_epsilon": 0} if name in DISCRETE else {}
    assert script.main(words(normalize_obs="true", **given)) == 0
    if env_id.endswith("Ends-v0"):
        assert {s for s in Ends.seeds if s} == {123, 124, 125, 126, 127}
        assert Ends.most <= 64 + 1 and Ends.alive <= 1  # the one that was looked at
    agent, spec = policy_of(script, "run"), minari.load_dataset(TOY).spec.env_spec
    env = gym.make(spec, g=9.0) if env_id == "auto" else gym.make(env_id)
    episodes = rows("run/episodes.jsonl")
    assert [(r["seed"], r["episode"]) for r in episodes] == [
        (s, i) for s in range(7, 7 + seeds) for i in range(5)
    ]
    for member in {0, seeds - 1}:
        played = [r for r in episodes if r["seed"] == 7 + member]
        expected = plain_loop(agent, env, 123, 5, member)
        assert [r["length"] for r in played] == [length for _, length in expected]
        returns = np.array([r["return"] for r in played])
        np.testing.assert_allclose(returns, [value for value, _ in expected], rtol=1e-4, atol=1e-4)
        assert len(set(returns)) == 5
        if env_id == "auto":
            scores = 100 * (returns + 160) / (-20 + 160)
            np.testing.assert_allclose([r["score"] for r in played], scores)
        else:
            assert {r["score"] for r in played} == {None}


@pytest.mark.parametrize("name", ["iql", "dt"])
def test_an_episode_depends_on_the_policy_and_its_seed_alone(name):
    """Not on the training seed, nor on how many others are played, nor on other members."""
    script = load_script(name)
    assert script.main(words(num_seeds=2, seed=3)) == 0
    agent, references, played = policy_of(script, "run"), (None, None), []
    spec = minari.load_dataset(TOY).spec.env_spec
    for seed, episodes in ((3, 40), (400, 3)):
        agent.cfg = script.TrainConfig(**{**saved("run")["config"], "seed": seed})
        found = script.evaluate(agent, spec, references, episodes)
        assert [row["seed"] for row in found] == [seed] * episodes + [seed + 1] * episodes
        played.append([row["return"] for row in found if row["episode"] < 3])
    assert played[0] == pytest.approx(played[1], rel=1e-5) and len(set(played[0])) == 6


@pytest.mark.parametrize(
    "env_id, reason",
    [("Vague-v0", "infinite"), ("Blind-v0", "infinite")],
)
def test_an_environment_that_fails_at_its_first_step(iql, refused, env_id, reason):
    """Nothing has been trained or written then."""
    refused(iql, words(env_id=env_id), env_id, reason)


@pytest.mark.parametrize("env_id, reason", [("Breaks-v0", "a wheel came off")])
def test_an_environment_that_fails_in_evaluation(iql, capsys, env_id, reason):
    argv = words(env_id=env_id, eval_seed=0, eval_episodes=0, final_eval_episodes=16)
    assert iql.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and reason in error
    assert saved("run")["step"] == 6 and not Path("run/result.json").exists()


def test_actions_and_statistics_by_hand(iql):
    """IQL's policy from the tensors of its checkpoint, in NumPy."""
    assert iql.main(words(num_seeds=3, normalize_obs="true")) == 0
    weights = {
        name: value.numpy().astype(np.float64) for name, value in saved("run")["agent"].items()
    }
    obs = np.concatenate([e.observations[:-1] for e in toy_episodes()]).astype(np.float64)
    np.testing.assert_allclose(weights["obs_mean"], obs.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights["obs_std"], obs.std(0) + 1e-3, rtol=1e-5)
    x = np.stack([(obs - obs.mean(0)) / (obs.std(0) + 1e-3)] * 3)
    for i in range(3):
        x = x @ weights[f"actor.mean.layers.{i}.weight"] + weights[f"actor.mean.layers.{i}.bias"]
        x = np.maximum(x, 0) if i < 2 else np.tanh(x)
    batch = torch.as_tensor(obs, dtype=torch.float32).expand(3, -1, -1)
    np.testing.assert_allclose(policy_of(iql, "run").act(batch), 2 * x, rtol=1e-4, atol=1e-5)


def test_no_environment_no_evaluation(script):
    assert script.main(words(env_id="none")) == 0
    assert rows("run/episodes.jsonl") == []
    assert not [row for row in rows("run/metrics.jsonl") if "eval/return" in row]
    assert json.loads(Path("run/result.json").read_text())["last"] == []


def test_environments_as_older_gymnasiums_wrote_them(iql):
    """Sets on Minari's hub still have fields that Gymnasium 1.0 dropped."""
    path = write_dataset(Path("store"), "old-v0", toy_episodes()) / "metadata.json"
    metadata = json.loads(path.read_text())
    old = '"autoreset": false, "disable_env_checker"'
    metadata["env_spec"] = metadata["env_spec"].replace('"disable_env_checker"', old)
    assert "autoreset" in json.loads(metadata["env_spec"])
    path.write_text(json.dumps(metadata))
    assert iql.main(words(dataset_id="store/old-v0")) == 0
    assert json.loads(Path("run/result.json").read_text())["env_id"] == "Pendulum-v1"


def test_scores_are_null_without_references(iql):
    write_dataset(Path("store"), "bare-v0", toy_episodes(), ref_min_score=None, ref_max_score=None)
    for name, options in (("run", {}), ("half", {"ref_min_score": 3})):
        assert iql.main(words(dataset_id="store/bare-v0", run_dir=name, **options)) == 0
        assert {row["score"] for row in rows(f"{name}/episodes.jsonl")} == {None}
        assert not [row for row in rows(f"{name}/metrics.jsonl") if "eval/score" in row]


def test_what_the_metadata_say_of_data_and_environment_is_kept(iql):
    """Where the data come from, and what D4RL's environment had that today's lacks."""
    folder = write_dataset(Path("store"), "other-v0", toy_episodes())
    about = json.loads((folder / "metadata.json").read_text())
    said = {"environment_differs": "the pen may be dropped", "source": "d4rl-hdf5 0123"}
    (folder / "metadata.json").write_text(json.dumps({**about, **said}))
    assert iql.main(words(dataset_id="store/other-v0")) == 0
    for name in ("result", "environment"):
        assert json.loads(Path(f"run/{name}.json").read_text()).items() >= said.items()


def test_references_and_environment_of_a_config_hold_for_its_own_dataset_only(iql, capsys):
    own = {"ref_min_score": 0.0, "ref_max_score": 100.0, "env_kwargs": {"g": 0.1}}
    settings = {**own, "fallback_dataset_id": TOY}
    Path("own.yaml").write_text(yaml.safe_dump({**settings, "dataset_id": TOY}))
    Path("other.yaml").write_text(yaml.safe_dump({**settings, "dataset_id": "D4RL/nowhere-v2"}))
    argv = words()[2:]  # without the dataset
    assert iql.main([*argv, "--config", "own.yaml"]) == 0
    assert "WARNING" not in capsys.readouterr().err
    for row in rows("run/episodes.jsonl"):
        assert row["score"] == pytest.approx(row["return"])

    assert iql.main([*argv, "--config", "other.yaml", "--run_dir", "other"]) == 0
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "NOT comparable" in warning
    assert "python datasets/d4rl.py nowhere-v2" in warning
    assert TOY in warning and "D4RL/nowhere-v2" in warning
    config = yaml.safe_load(Path("other/config.yaml").read_text())
    assert (config["dataset_id"], config["fallback_dataset_id"]) == (TOY, "")
    assert (config["ref_min_score"], config["env_kwargs"]) == (None, {})
    assert json.loads(Path("other/result.json").read_text())["dataset_id"] == TOY
    assert iql.main(words(run_dir="plain")) == 0
    assert rows("other/episodes.jsonl") == rows("plain/episodes.jsonl")
    assert rows("run/episodes.jsonl") != rows("plain/episodes.jsonl")
    assert iql.main([*argv, "--config", "other.yaml", "--run_dir", "other"]) == 0  # finished


def test_a_dataset_is_found_from_anywhere(iql, monkeypatch):
    """Folders are also looked for beside the scripts; so is a set's inner folder."""
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    for name in ("store/own-v0", "store/own-v0/data", data, data.parent.resolve()):
        cfg = iql.TrainConfig(dataset_id=str(name), download=False)
        assert iql.find_dataset(cfg).resolve() == data.resolve()
    with monkeypatch.context() as patch:
        patch.setattr(iql, "SCRIPT", Path("/iql.py"))  # in a container
        assert iql.find_dataset(cfg).resolve() == data.resolve()
    bundled = "datasets/hopper/medium-replay-v0"
    folder = iql.find_dataset(iql.TrainConfig(dataset_id=bundled))
    assert (folder / "metadata.json").is_file() and bundled in str(folder)


def test_what_followed_a_last_step_or_an_end_may_be_unknown(capsys):
    """Of an episode that the recording cuts, DT knows no return; of NaN no script learns values."""
    rng = np.random.default_rng(0)
    timed_out, cut, whole = (toy_episode(rng, steps, False) for steps in (5, 7, 9))
    timed_out.observations[-1] = np.nan
    cut.truncations[-1] = False
    write_dataset(Path("store"), "own-v0", [timed_out, cut, whole])
    line = words(dataset_id="store/own-v0", num_updates=1, env_id="none")
    kept = {"bc": "21 transitions, 3", "iql": "21 transitions, 3", "dt": "14 transitions, 2"}
    for name, told in kept.items():
        assert load_script(name).main([*line, "--run_dir", name]) == 0
        out = capsys.readouterr().out
        assert told in out
        assert ("1 steps are left out" in out) == (name == "iql")
        assert ("1 episodes without an end are left out" in out) == (name == "dt")
    write_dataset(Path("store"), "cut-v0", [cut])
    line[1] = "store/cut-v0"
    assert load_script("dt").main([*line, "--run_dir", "cut"]) == 2
    assert "no episode of the data ends" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["much", math.nan])
def test_reference_returns_that_are_no_numbers(iql, refused, value):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    about = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**about, "ref_min_score": value}))
    refused(iql, words(dataset_id="store/own-v0"), "ref_min_score")


@pytest.mark.parametrize("value", [2, 0.5])
def test_flags_that_are_neither_0_nor_1(iql, refused, value):
    data = write_dataset(Path("store"), "own-v0", toy_episodes())
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        flags = file["episode_0/terminations"][:] * value
        del file["episode_0/terminations"]
        file["episode_0/terminations"] = flags
    refused(iql, words(dataset_id="store/own-v0"), "episode 0", "terminated")


def test_what_a_terminal_step_led_to_is_known(iql, refused):
    episode = toy_episode(np.random.default_rng(0), 5, True)
    episode.observations[-1] = np.nan
    write_dataset(Path("store"), "own-v0", [episode])
    refused(iql, words(dataset_id="store/own-v0"), "episode 0", "obs", "NaN")
