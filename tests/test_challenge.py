"""tools/challenge.py: the rule, the numbers, the pictures, and what goes wrong."""

import json
from concurrent.futures import Future
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import TOY_ENV, contents, load_tool, write_dataset
from minari.data_collector import EpisodeBuffer

TINY = {"batch_size": 8, "hidden_dim": 8, "compile": "false", "final_eval_episodes": 4}
SWING = "toy/swing-v0"


@pytest.fixture
def challenge(monkeypatch):
    """The tool, with tiny runs that train in this process."""
    tool = load_tool("tools/challenge.py")
    monkeypatch.setattr(tool.sweep, "local", lambda _, jobs: [train(tool, job) for job in jobs])
    monkeypatch.setattr(tool.sweep.signal, "signal", lambda *_: None)
    for name, value in TINY.items():
        monkeypatch.setitem(tool.RARELY, name, value)
    return tool


def train(tool, job) -> Future:
    """As tools/sweep.py's own processes do."""
    done = Future()
    script = tool.sweep.load_script(job.algorithm)
    done.set_result("" if script.main(job.command[2:]) == 0 else "it failed")
    return done


def swing(seed: int) -> EpisodeBuffer:
    """An episode of the toy environment under random actions."""
    env = gym.make(TOY_ENV)
    env.action_space.seed(seed)
    observations, steps = [env.reset(seed=seed)[0]], []
    while not (steps and any(steps[-1][2:])):
        action = env.action_space.sample()
        obs, *others, _ = env.step(action)
        observations.append(obs)
        steps.append((action, *others))
    names = ("actions", "rewards", "terminations", "truncations")
    columns = zip(names, zip(*steps, strict=True), strict=True)
    arrays = {name: np.array(values) for name, values in columns}
    return EpisodeBuffer(observations=np.array(observations), **arrays)


@pytest.fixture
def toy(challenge, monkeypatch):
    """The first exercise on six toy episodes, one of which begins elsewhere."""
    episodes = [swing(seed) for seed in range(6)]
    episodes[0].observations[0] = 50
    write_dataset(Path("store"), SWING, episodes)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(Path("store").resolve()))
    monkeypatch.setitem(challenge.EXERCISES["hopper"].settings, "dataset_id", SWING)
    return challenge


def is_picture(path) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG") and Path(path).stat().st_size > 10_000


# ---- the rule and the words


@pytest.mark.parametrize(
    "ours, theirs, said",
    [
        ([3, 4], [1, 2], "yes"),
        ([1, 2], [3, 4], "no"),
        ([1, 4], [2, 3], "undecided"),
        ([3, 5], [3, 1], "undecided"),
        ([3, 3], [3], "no"),  # as good is not better
        ([1.0], [0.0], "yes"),
    ],
)
def test_the_rule(challenge, ours, theirs, said):
    assert challenge.verdict(ours, theirs) == said


def evidence(challenge, **changes):
    rollouts = {("BC", 0): [1, 3], ("BC", 1): [2, 2], ("IQL", 0): [90, 100], ("IQL", 1): [40, 50]}
    facts = {"rollouts": rollouts, "recorded": np.array([0.0, 10, 60]), "episodes": []}
    facts |= {"references": (0.0, 200.0), "agents": {}, "spec": None}
    return challenge.Evidence(**{**facts, **changes})


def test_the_answer_is_of_the_seeds_means(challenge):
    text = challenge.answer(challenge.EXERCISES["hopper"], evidence(challenge))
    rows = {line[:42].strip(): line[42:].split() for line in text.splitlines()}
    assert rows["recorded episodes of a learner (3)"] == ["23.33", "60.00", "11.7"]
    assert rows["IQL, seed 0"] == ["95.00", "100.00", "47.5"]
    assert "Is IQL better than BC? yes (95.00, 45.00 against 2.00, 2.00)" in text
    assert "Is BC better than the best recorded episode? no (2.00, 2.00 against 60.00)" in text
    assert "Is IQL better than the best recorded episode? undecided (95.00, 45.00" in text


# ---- the whole command


def test_train_then_answer_with_a_picture(toy, capsys):
    """The picture's place is told, and a second start trains nothing."""
    argv = ["hopper", "--updates", "2", "--seeds", "1", "--out", "out"]
    assert toy.main(argv) == 0
    said, error = capsys.readouterr()
    assert "WARNING" not in said + error
    assert "recorded episodes of a learner (5)" in said  # not the one that begins elsewhere
    assert "Picture: out/hopper-2/answer.png" in said and is_picture("out/hopper-2/answer.png")
    assert Path("out/hopper-2/answer.txt").read_text().split("\n\n")[-1] in said
    rows = [json.loads(x) for x in open("out/hopper-2/iql/hopper-medium-replay/s0/episodes.jsonl")]
    assert len(rows) == TINY["final_eval_episodes"]
    assert f"{np.mean([row['return'] for row in rows]):,.2f}" in said
    result = Path("out/hopper-2/bc/hopper-medium-replay/s0/result.json")
    before = result.stat().st_mtime_ns
    assert toy.main(argv) == 0
    assert result.stat().st_mtime_ns == before
    assert "2 of them finished" in capsys.readouterr().out


def test_the_maze_shows_the_rollouts_that_counted(challenge, monkeypatch, capsys):
    shown = {}

    def picture(evidence, title, path):
        shown.update(title=title, evidence=evidence)
        draw(evidence, title, path)

    draw = challenge.EXERCISES["maze"].picture
    monkeypatch.setattr(challenge.EXERCISES["maze"], "picture", picture)
    assert challenge.main(["maze", "--updates", "2", "--seeds", "1"]) == 0
    assert is_picture("runs/maze-2/answer.png")
    said = capsys.readouterr().out
    assert "recorded episodes from the start (712)" in said and "Why Q-learning" in said
    assert shown["title"].startswith("Maze, 2 updates. Is IQL better than BC? ")
    found, script = shown["evidence"], challenge.SCRIPTS["BC"]
    agent = challenge.policy.restore(
        script, script.read_checkpoint("runs/maze-2/bc/pointmaze-stitch/s0")
    )
    ways = challenge.paths(script, agent, found)
    rows = [json.loads(x) for x in open("runs/maze-2/bc/pointmaze-stitch/s0/episodes.jsonl")]
    assert [len(way) for way in ways] == [row["length"] for row in rows]
    starts = [gym.make(found.spec).reset(seed=10_000 + i)[0] for i in range(len(ways))]
    assert np.allclose([way[0] for way in ways], starts, atol=1e-6)


def test_the_exercises_themselves_can_begin(challenge):
    """Every run is planned on bundled data, so that nothing warns of other data."""
    for name, exercise in challenge.EXERCISES.items():
        args = challenge.parse([name])
        words = challenge.sweep_words(exercise, exercise.updates, Path("out"), args)
        jobs = challenge.sweep.plan(challenge.sweep.parse(words))
        assert [(job.algorithm, job.config["seed"]) for job in jobs] == [
            ("iql", 0),
            ("iql", 1),
            ("bc", 0),
            ("bc", 1),
        ]
        for job in jobs:
            assert job.config["dataset_id"].startswith("datasets/")
            assert job.config["env_id"] == "auto" and job.config["ref_min_score"] is None
            assert job.config["num_updates"] == exercise.updates


# ---- what goes wrong


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "hopper | maze"),
        (["walker"], "walker"),
        (["hopper", "--updates", "0"], "--updates"),
        (["hopper", "--updates", "inf"], "--updates"),
        (["hopper", "--updates", "1e11"], "num_updates"),
        (["hopper", "--seeds", "1.5"], "--seeds"),
        (["maze", "--workers", "none"], "--workers"),
        (["maze", "--set", "tau=1"], "--set"),
    ],
)
def test_bad_input_is_one_line(challenge, refused, argv, named):
    refused(challenge, argv, named)


@pytest.mark.parametrize("text", ["{", '{"final": true}\n', "[]\n", "\0"])
def test_a_broken_log_of_a_finished_run(toy, refused, text):
    argv = ["hopper", "--updates", "2", "--seeds", "1", "--out", "out"]
    assert toy.main(argv) == 0
    path = Path("out/hopper-2/bc/hopper-medium-replay/s0/episodes.jsonl")
    path.write_text(text)
    refused(toy, argv, path)


def test_runs_that_fail_are_told(challenge, monkeypatch, capsys):
    failed = Future()
    failed.set_result("error: the disk is full")
    monkeypatch.setattr(challenge.sweep, "local", lambda _, jobs: [failed for _ in jobs])
    assert challenge.main(["hopper", "--updates", "2"]) == 1
    assert capsys.readouterr().err.count("the disk is full") == 4
    assert not list(Path().rglob("answer.*"))


def test_an_interrupted_one_says_how_to_go_on(challenge, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(challenge, "gather", interrupted)
    monkeypatch.setattr(challenge.sweep, "main", lambda _: 0)
    before = contents()
    assert challenge.main(["hopper"]) == 130
    assert "goes on" in capsys.readouterr().err and contents() == before
