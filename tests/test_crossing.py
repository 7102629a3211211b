"""benchmarks/crossing.py: the data's steps into the maze's crossing, and what is asked there."""

import types
from pathlib import Path

import minari
import numpy as np
import torch
from conftest import REPOSITORY, load_script, load_tool, words

crossing = load_tool("benchmarks/crossing.py")
MAZE = str(REPOSITORY / "datasets" / "pointmaze" / "stitch-v0")
TINY = {"num_updates": 2, "num_seeds": 2, "hidden_dim": 8, "env_id": "auto"}
TINY |= {"eval_episodes": 1, "final_eval_episodes": 1}


def test_a_run_is_asked_at_the_datas_first_steps_in_the_crossing(capsys):
    script = load_script("td3_bc")
    assert script.main(words(dataset_id=MAZE, run_dir="run", label="mine", **TINY)) == 0
    saved = script.read_checkpoint("run")
    agent = crossing.policy.restore(script, saved)
    obs, action = crossing.arrivals(script, agent, saved["about"])
    # the crossing is one wide and lies around (0, 1 / 2); by hand, from what Minari reads
    expected = []
    for episode in minari.MinariDataset(f"{MAZE}/data").iterate_episodes():
        (x, y), steps = episode.observations[:-1, :2].T, len(episode.actions)
        inside = (abs(x) < 0.5) & (y >= 0) & (y < 1)
        stem = (abs(x) < 0.5) & (y >= -1) & (y < 0)
        for t in 1 + np.flatnonzero(stem[:-1] & inside[1:]):
            for i in range(t, min(t + 5, steps)):
                expected += [(episode.observations[i], episode.actions[i])] if inside[i] else []
    assert len(obs) == len(expected) > 1000
    for found, wanted in zip((obs, action), zip(*expected, strict=True), strict=True):
        np.testing.assert_array_equal(found, np.array(wanted, np.float32))
    capsys.readouterr()
    assert crossing.main(["run"]) == 0
    *_, first, second = capsys.readouterr().out.splitlines()
    data = f"{action[:, 0].mean():.2f}"
    assert [line.split(" | ")[0] for line in (first, second)] == ["| mine"] * 2
    assert all(line.endswith(f" | {data} | 0 | 0 |") for line in (first, second))


def test_the_two_ways_to_the_goal_are_told_apart(monkeypatch):
    """Of three episodes: straight, by the dead end, never there; and all by the dead end."""
    script = load_script("td3_bc")
    script.main(words(dataset_id=MAZE, run_dir="run", **TINY))
    saved = script.read_checkpoint("run")
    agent = crossing.policy.restore(script, saved)
    right, left = [(0, -1.5), (0, 0.5), (2, 0.5)], [(0, -1.5), (-0.6, 0.5), (2, 0.5)]
    walks = [(right, True), (left, True), (left, True), (left, True), (left, False), (left, True)]
    played = [{"obs": np.array(w), "terminated": np.array([False, end])} for w, end in walks]
    monkeypatch.setattr(crossing.policy, "play", lambda *_: played)
    found = crossing.ways(script, agent, saved["about"], 3)
    np.testing.assert_allclose(found, [[100 / 3, 100 / 3], [0, 100]])


def test_values_are_of_full_force_to_both_sides_by_the_smaller_critic():
    """Of critics 3 x - 10 and 2 (x + y), and a policy that goes half right."""
    agent = types.SimpleNamespace(cfg=types.SimpleNamespace(num_seeds=2), critic=None)
    agent.normalize = agent.unit_action = lambda x: x
    agent.act = lambda obs: torch.tensor([0.5, 0.1]).expand(*obs.shape[:2], 2)
    agent.q = lambda *args: torch.stack([3 * args[-1][..., 0] - 10, 2 * args[-1].sum(-1)], 1)
    assert crossing.ask(agent, torch.zeros(4, 4)) == [[6.0, 7.0, 0.5]] * 2


def test_other_runs_are_refused(refused):
    load_script("td3_bc").main(words(run_dir="other", env_id="none"))
    refused(crossing, ["other"], "stitch-v0")
    refused(crossing, ["other", "--episodes", "0"], "--episodes")
    refused(crossing, [], "RUN")
    load_script("bc").main(words(dataset_id=MAZE, run_dir="clone", **TINY))
    refused(crossing, ["clone"], "bc.py has no Q(s, a)")


def test_a_checkpoint_runs_nothing_and_its_environment_is_the_datas(refused):
    script = load_script("td3_bc")
    script.main(words(dataset_id=MAZE, run_dir="run", **TINY))
    Path("evil.py").write_text("raise SystemExit('code of a checkpoint runs')")
    saved = torch.load("run/checkpoint.pt")
    torch.save({**saved, "about": {**saved["about"], "script": f"{Path.cwd()}/evil"}}, "forged.pt")
    refused(crossing, ["forged.pt"], "is of a script", "which is not here")
    for env_id in ("evil:Pendulum-v1", "none", "Pendulum-v1"):
        torch.save({**saved, "config": {**saved["config"], "env_id": env_id}}, "other.pt")
        assert crossing.main(["other.pt"]) == 0
