"""benchmarks/held_out.py: the split, and what is asked of a run on both parts."""

import json
import types
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, load_script, load_tool, words

held_out = load_tool("benchmarks/held_out.py")
MAZE = REPOSITORY / "datasets" / "pointmaze" / "stitch-v0"
TINY = {"num_updates": 2, "num_seeds": 2, "hidden_dim": 8, "env_id": "none"}


@pytest.fixture
def parts():
    assert held_out.main(["split", str(MAZE), "parts"]) == 0
    return [Path("parts") / name for name in (held_out.TRAIN, held_out.HELD)]


@pytest.fixture
def small(parts):
    """A set of twenty episodes, split; of each third one the end is not known."""
    for part, count in zip(parts, (18, 2), strict=True):
        with h5py.File(part / "data/main_data.hdf5", "r+") as file:
            for i in range(len(file)):
                if i >= count:
                    del file[f"episode_{i}"]
                elif i % 3 == 1:
                    file[f"episode_{i}/observations"][-1] = np.nan
        path = part / "data/metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "total_episodes": count}))
    return parts


def read(folder):
    episodes = minari.MinariDataset(folder / "data").iterate_episodes()
    return [
        np.concatenate([e.observations[:-1], e.actions, e.rewards[:, None]], 1) for e in episodes
    ]


def test_every_tenth_episode_is_held_out(parts):
    train, held, whole = (read(folder) for folder in (*parts, MAZE))
    assert [len(train), len(held)] == [720, 80]
    for i, episode in enumerate(whole):
        part = held if i % 10 == 9 else train
        np.testing.assert_array_equal(episode, part.pop(0))
    assert "fingerprint" not in json.loads((parts[1] / "data/metadata.json").read_text())


def test_both_parts_are_asked(parts, capsys):
    """Against a computation by hand, for a policy whose log_std is a parameter."""
    script = load_script("iql")
    line = words(dataset_id=str(parts[0]), run_dir="run", label="mine", reward_shift=-1.0, **TINY)
    assert script.main(line) == 0
    capsys.readouterr()
    assert held_out.main(["ask", "run"]) == 0
    rows = [line.strip("|").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [[cell.strip() for cell in row[:4]] for row in rows] == [
        ["mine", seed, "2", part] for seed in "01" for part in ("trained", "held out")
    ]
    agent = held_out.policy.restore(script, script.read_checkpoint("run"))
    for part, folder in enumerate(parts):
        q, bellman, distance = [], [], []
        for e in minari.MinariDataset(folder / "data").iterate_episodes():
            obs = torch.as_tensor(e.observations).expand(2, -1, -1)
            action = torch.as_tensor(e.actions).float().expand(2, -1, -1)
            policy, obs = agent.act(obs), agent.normalize(obs)
            here = agent.q(agent.critic, obs[:, :-1], action)
            after = agent.q(agent.critic, obs[:, 1:], policy[:, 1:]).amin(1)
            over = torch.as_tensor(e.terminations)
            target = torch.as_tensor(e.rewards) - 1 + agent.cfg.gamma * after.where(~over, 0)
            q.append(here.mean(1))
            bellman.append((target[:, None] - here).square().mean(1))
            distance.append((policy[:, :-1] - action).square().sum(-1))
        wanted = [torch.cat(x, -1).mean(-1) for x in (q, bellman, distance)]
        wanted.append(agent.actor.log_std[:, 0].mean(-1))
        for seed in range(2):
            found = [float(cell) for cell in rows[2 * seed + part][4:]]
            assert found == pytest.approx([float(x[seed]) for x in wanted], abs=0.006)


def test_an_end_has_no_value_behind_it():
    """Of critics x and x + 1 and a policy of 0.5: one step that goes on, one that ends."""
    agent = types.SimpleNamespace(cfg=types.SimpleNamespace(num_seeds=2), critic=None)
    agent.obs_std, agent.obs_mean, agent.unit_action = 2.0, 1.0, lambda x: x
    agent.act = lambda obs: torch.full_like(obs, 0.5)
    agent.q = lambda *args: torch.stack([args[1][..., 0], args[1][..., 0] + 1], 1)
    columns = ([[3.0], [3.0]], [[0.5], [1.0]], [1.0, 1.0], [[5.0], [5.0]], [0.0, 1.0])
    found = held_out.totals(agent, 0.5, *map(torch.tensor, columns))
    assert found[:3].T.tolist() == [[7.0, 0.25 + 6.5, 0.25]] * 2 and found[3].isnan().all()


SCRIPTS = ("awac", "rebrac", "fql", "cal_ql", "bcq", "spot")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_kind_of_policy_and_table(name, small, capsys):
    """Rows that are left out, several actions a state, no Gaussian; an end that is not known."""
    script = load_script(name)
    changes = {"dataset_id": str(small[0]), "run_dir": "run", **TINY}
    assert (
        script.main(words(**{k: v for k, v in changes.items() if hasattr(script.TrainConfig, k)}))
        == 0
    )
    capsys.readouterr()
    assert held_out.main(["ask", "run"]) == 0
    rows = [
        x.strip("|").split(" | ")[4:] for x in capsys.readouterr().out.splitlines() if x[:1] == "|"
    ]
    values = np.array([[float(cell.strip(" |")) for cell in row] for row in rows[2:]])
    assert values.shape == (4, 4) and np.isfinite(values[:, :3]).all()
    assert np.isfinite(values[:, 3]).all() == (name in ("awac", "cal_ql"))


def test_what_is_refused(small, parts, refused):
    refused(held_out, ["split", str(small[1]), "more"], "fewer than ten")
    refused(held_out, ["split", str(MAZE), "parts"], "parts/train-v0 exists")
    refused(held_out, ["split", "parts", "other"], "parts is no folder")
    refused(held_out, ["ask", "nowhere"], "nowhere")
    refused(held_out, [], "way")
    load_script("td3_bc").main(words(run_dir="other", env_id="none"))
    refused(held_out, ["ask", "other"], "is of", "train-v0")
    load_script("bc").main(words(dataset_id=str(parts[0]), run_dir="clone", **TINY))
    refused(held_out, ["ask", "clone"], "bc.py has no Q(s, a)")
    clone = Path("parts") / held_out.TRAIN / "data/metadata.json"
    load_script("td3_bc").main(words(dataset_id=str(parts[0]), run_dir="run", **TINY))
    with h5py.File(clone.with_name("main_data.hdf5"), "r+") as file:
        file["episode_0/rewards"][0] = 5
    refused(held_out, ["ask", "run"], "is not what run was trained on")
    clone.write_text("{")
    refused(held_out, ["split", str(parts[0]), "more"], "cannot be read", "JSONDecodeError")
