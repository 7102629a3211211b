"""datasets/ogbench.py: files in OGBench's layout, made here; its own package where it is there."""

import json
import shutil

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import load_script, load_tool

ogbench = load_tool("datasets/ogbench.py")
TABLE = ogbench.read_table()
DEFAULTS = [  # of the FQL paper's table
    "antmaze-large-navigate-singletask-task1-v0",
    "antmaze-giant-navigate-singletask-task1-v0",
    "humanoidmaze-medium-navigate-singletask-task1-v0",
    "humanoidmaze-large-navigate-singletask-task1-v0",
    "antsoccer-arena-navigate-singletask-task4-v0",
    "cube-single-play-singletask-task2-v0",
    "cube-double-play-singletask-task2-v0",
    "scene-play-singletask-task2-v0",
    "puzzle-3x3-play-singletask-task4-v0",
    "puzzle-4x4-play-singletask-task4-v0",
]


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return tmp_path / "store"


def find(name):
    return ogbench.find_task(name, TABLE)


def write_file(path, name, lengths=(5, 1, 4), done=(), **overrides):
    """A file of trajectories with so many states, of which those in `done` meet the goal."""
    task, count, rng = find(name), sum(lengths), np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(count, task.obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (count, task.act_dim)).astype(np.float32),
        "terminals": np.isin(np.arange(count), np.cumsum(lengths) - 1),
        "qpos": (100 + rng.normal(size=(count, task.qpos_dim))).astype(np.float32),
        "qvel": np.zeros((count, 3), np.float32),
    }
    meet(task, arrays, list(done))
    arrays |= overrides
    np.savez(path, **{key: values for key, values in arrays.items() if values is not None})
    return arrays


def meet(task, arrays, rows):
    """Put the states of `rows` where the task wants them, and no other state."""
    goal, qpos = task.goal, arrays["qpos"]
    cubes = goal.get("cubes", [])
    places = [(14 + 7 * i, place) for i, place in enumerate(cubes)]
    places += [(first, goal[key]) for key, first in (("agent", 0), ("ball", 15)) if key in goal]
    if "buttons" in goal:
        buttons = np.tile(1 - np.array(goal["buttons"]), (len(qpos), 1))
        buttons[rows] = goal["buttons"]
        arrays["button_states"] = buttons
    if "drawer" in goal:
        places.append((14 + 7 * len(cubes) + len(goal["buttons"]), (goal["drawer"],)))
        places.append((15 + 7 * len(cubes) + len(goal["buttons"]), (goal["window"],)))
    for first, place in places:
        qpos[rows, first : first + len(place)] = place


def convert(tmp_path, name, *options, **kwargs):
    """(arrays of the file, episodes, metadata) of a planted file that was converted."""
    path = tmp_path / "file.npz"
    arrays = write_file(path, name, **kwargs)
    assert ogbench.main([name, "--force", "--file", str(path), *options]) == 0
    dataset = minari.load_dataset(find(name).minari_id)
    return arrays, list(dataset.iterate_episodes()), dataset.storage.metadata


def transitions(arrays, done):
    """The steps that OGBench's loader makes of the file: (obs, action, next_obs, done, cut)."""
    obs, actions, last = (arrays[key] for key in ("observations", "actions", "terminals"))
    steps = []
    for i in range(len(last)):
        if not last[i]:
            cut = bool(last[i + 1]) and i not in done
            steps.append((obs[i], actions[i], obs[i + 1], i in done, cut))
    return steps


def check_error(capsys, *argv, **kwargs):
    """Run a bad command: exit code 2 and one line on stderr, which is returned."""
    assert ogbench.main([str(word) for word in argv], **kwargs) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- the table


def test_names_and_default_tasks():
    for name in DEFAULTS:
        data, _, rest = name.partition("-singletask-")
        task = find(name)
        for short in (data, f"{data}-v0", f"{data}-singletask-v0", f"{data}-singletask"):
            assert find(short) == task
        assert (task.name, task.file) == (name, f"{data}-v0.npz")
        assert task.minari_id == f"ogbench/{data}/singletask-{rest}"
        minari.dataset.minari_dataset.parse_dataset_id(task.minari_id)
        assert task.env_spec.id == f"{task.environment}-singletask-{rest}"
        assert TABLE[data][0] == task
        assert sorted(each.number for each in TABLE[data]) == [1, 2, 3, 4, 5]


def test_sizes():
    sizes = {find(name).environment: find(name).obs_dim for name in DEFAULTS}
    assert sizes["humanoidmaze-large"] == 69 and sizes["puzzle-4x4"] == 83 and len(sizes) == 10


def test_list_shows_data_and_store(tmp_path, capsys):
    convert(tmp_path, "scene-play-singletask-task3-v0")
    capsys.readouterr()
    assert ogbench.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(TABLE)
    stored = [line.split() for line in lines if "ogbench/" in line]
    assert stored == ["scene-play 40 5 750 task2 ogbench/scene-play/singletask-task3-v0".split()]


# ---- steps


@pytest.mark.parametrize("done", [(), (0,), (3,), (4,), (6, 7, 8), (1, 3, 9), range(10)])
def test_transitions_are_those_of_ogbenchs_loader(tmp_path, done):
    """Also where done states follow each other, end a trajectory, or are its last."""
    arrays, episodes, metadata = convert(tmp_path, "antmaze-large-navigate", done=done)
    steps = []
    for episode in episodes:
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
        obs, flags = episode.observations, (episode.terminations, episode.truncations)
        assert obs.dtype == episode.actions.dtype == episode.rewards.dtype == np.float32
        assert (episode.rewards == np.where(episode.terminations, 0, -1)).all()
        steps += zip(obs[:-1], episode.actions, obs[1:], *flags, strict=True)
    expected = transitions(arrays, done)
    assert len(expected) == 7
    for step, wanted in zip(steps, expected, strict=True):
        for value, right in zip(step, wanted, strict=True):
            np.testing.assert_array_equal(value, right)
    counts, ends = metadata["counts"], [step[3] or step[4] for step in expected]
    assert (counts["steps"], counts["source_steps"], counts["trajectories"]) == (7, 10, 2)
    assert counts["episodes"] == metadata["total_episodes"] == len(episodes) == sum(ends)
    assert counts["done"] == sum(step[3] for step in expected)


@pytest.mark.parametrize("name", DEFAULTS)
def test_rewards_count_the_unmet_parts(tmp_path, name):
    _, episodes, _ = convert(tmp_path, name, lengths=[4], done=[1])
    parts = {"cube-double": 2, "scene": 5, "puzzle-3x3": 9, "puzzle-4x4": 16}
    unmet = -parts.get(find(name).environment, 1)
    assert [episode.rewards.tolist() for episode in episodes] == [[unmet, 0], [unmet]]
    assert [bool(episode.terminations[-1]) for episode in episodes] == [True, False]
    assert [bool(episode.truncations[-1]) for episode in episodes] == [False, True]


def moved(name, column, distance):
    """Reward and mask of a state that moved off the goal: (reward, done)."""
    task = find(name)
    qpos = np.full((1, task.qpos_dim), 50.0)
    arrays = {"qpos": qpos}
    meet(task, arrays, [0])
    qpos[0, column] += distance
    parts = ogbench.goal_parts(task, qpos, arrays.get("button_states"))
    return parts.sum() - parts.size, bool(parts.all())


@pytest.mark.parametrize(
    ("name", "column", "inside", "outside"),
    [
        ("antmaze-large-navigate", 0, 0.49, 0.51),
        ("pointmaze-large-navigate", 1, 0.99, 1.01),
        ("humanoidmaze-medium-navigate", 1, -0.49, -0.51),
        ("antsoccer-arena-navigate", 16, 0.49, 0.51),
        ("cube-single-play", 16, 0.039, 0.041),
        ("cube-double-play", 21, 0.039, 0.041),
        ("scene-play", 14, 0.039, 0.041),
        ("scene-play", 23, 0.039, 0.041),  # drawer
        ("scene-play", 24, -0.039, -0.041),  # window
    ],
)
def test_tolerances(name, column, inside, outside):
    assert moved(name, column, inside) == (0, True)
    assert moved(name, column, outside) == (-1, False)


def test_what_the_goal_is_not_about_changes_nothing():
    for name, column in [("antsoccer-arena-navigate", 0), ("cube-single-play", 17)]:
        assert moved(name, column, 30.0) == (0, True)


def test_each_button_is_a_part():
    task = find("puzzle-3x3-play")
    buttons = np.tile(task.goal["buttons"], (2, 1))
    buttons[1, [0, 8]] = 1 - buttons[1, [0, 8]]
    parts = ogbench.goal_parts(task, None, buttons)
    assert (parts.sum(1) - 9).tolist() == [0, -2]


def test_other_tasks_of_the_data_have_their_own_goal(tmp_path):
    path = tmp_path / "file.npz"
    write_file(path, "antmaze-large-navigate-singletask-task3-v0", lengths=[4], done=[1])
    for number, done in ((1, 0), (3, 1)):
        name = f"antmaze-large-navigate-singletask-task{number}-v0"
        assert ogbench.main([name, "--file", str(path)]) == 0
        metadata = minari.load_dataset(find(name).minari_id).storage.metadata
        assert metadata["counts"]["done"] == done


def test_actions_are_clipped_and_counted(tmp_path, capsys):
    actions = np.zeros((4, 8), np.float32)
    actions[[0, 2, 3], 1] = 1.25, -1.5, 9  # the last one is no step
    _, (episode,), metadata = convert(
        tmp_path, "antmaze-large-navigate", lengths=[4], actions=actions
    )
    assert episode.actions[:, 1].tolist() == [1, 0, -1]
    counts = metadata["counts"]
    assert (counts["clipped_steps"], counts["largest_excess"]) == (2, 0.5)
    assert "clipped steps: 2, by 0.5" in capsys.readouterr().out


# ---- the set


def test_metadata_name_the_environment(tmp_path):
    _, _, metadata = convert(tmp_path, "cube-double-play")
    spec = json.loads(metadata["env_spec"])
    assert spec["id"] == "cube-double-singletask-task2-v0" and spec["max_episode_steps"] == 500
    assert spec["kwargs"]["reward_task_id"] == 2
    assert metadata["source"].startswith("ogbench-npz ")
    assert "ref_min_score" not in metadata and "ref_max_score" not in metadata


def test_a_script_reads_the_set(tmp_path):
    arrays, _, _ = convert(tmp_path, "antmaze-large-navigate", done=[1])
    script = load_script("rebrac")
    cfg = script.TrainConfig(dataset_id="ogbench/antmaze-large-navigate/singletask-task1-v0")
    episodes, space, _ = script.load_dataset(cfg)
    assert space == gym.spaces.Box(-1, 1, (8,), np.float32)
    terminated = np.concatenate([episode["terminated"] for episode in episodes])
    assert terminated.tolist() == [step[3] for step in transitions(arrays, [1])]
    run = ["--dataset_id", cfg.dataset_id, "--num_updates", "2", "--batch_size", "4"]
    assert script.main([*run, "--env_id", "none", "--hidden_dim", "8", "--run_dir", "run"]) == 0


def test_a_set_in_the_store_stays_until_forced(tmp_path, capsys):
    _, _, first = convert(tmp_path, "antmaze-large-navigate")
    path = tmp_path / "file.npz"
    write_file(path, "antmaze-large-navigate", lengths=[3])
    assert ogbench.main(["antmaze-large-navigate", "--file", str(path)]) == 0
    assert "--force" in capsys.readouterr().out
    dataset_id = first["dataset_id"]
    assert minari.load_dataset(dataset_id).total_steps == 7
    assert ogbench.main(["antmaze-large-navigate", "--file", str(path), "--force"]) == 0
    assert minari.load_dataset(dataset_id).total_steps == 2


def test_what_is_no_dataset_is_not_replaced(store, tmp_path, capsys):
    path, place = tmp_path / "file.npz", store / "ogbench/scene-play/singletask-task2-v0"
    write_file(path, "scene-play")
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    assert str(place) in check_error(capsys, "scene-play", "--file", path, "--force")
    assert (place / "notes.txt").read_text() == "mine"


# ---- download


def test_download_then_convert(tmp_path, monkeypatch):
    asked = []

    def fetch(url, part, timeout):
        asked.append((url, part.name, timeout))
        write_file(tmp_path / "served.npz", "scene-play")
        shutil.copy(tmp_path / "served.npz", part)

    monkeypatch.setattr(ogbench.d4rl, "fetch", fetch)
    argv = ["--url-base", "http://mirror/x/", "--cache", str(tmp_path / "cache")]
    assert ogbench.main(["scene-play", "scene-play-singletask-task1-v0", *argv]) == 0
    assert asked == [("http://mirror/x/scene-play-v0.npz", "scene-play-v0.npz.part", 30)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["scene-play-v0.npz"]
    for number in (1, 2):
        minari.load_dataset(f"ogbench/scene-play/singletask-task{number}-v0")


def test_a_page_in_place_of_the_file_names_what_to_fetch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        ogbench.d4rl, "fetch", lambda _url, part, _timeout: part.write_text("<html>")
    )
    assert ogbench.main(["scene-play", "--cache", str(tmp_path)], pauses=[0]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{ogbench.URL_BASE}/scene-play-v0.npz by hand" in error
    command = "python datasets/ogbench.py scene-play-singletask-task2-v0 --file scene-play-v0.npz"
    assert command in error
    assert not list(tmp_path.glob("*.part"))


# ---- errors


def test_bad_commands(capsys):
    assert "did you mean antmaze-large-navigate" in check_error(capsys, "antmaze-lrge-navigate")
    assert "--list" in check_error(capsys, "scene-play-singletask-task6-v0")
    assert "no task" in check_error(capsys, "visual-cube-single-play")
    assert "name a task" in check_error(capsys)
    assert "no task" in check_error(capsys, "scene\nplay")
    assert "one task" in check_error(capsys, "scene-play", "cube-single-play", "--file", "x")
    assert "--url-base" in check_error(capsys, "scene-play", "--url-base", "mirror")
    assert "--help" in check_error(capsys, "--wrong")


def holed(count, size, row):
    values = np.zeros((count, size), np.float32)
    values[row] = np.nan
    return values


BAD_FILES = {
    "has no actions": {"actions": None},
    "has no qpos": {"qpos": None},
    "has no button_states": {"button_states": None},
    "observations of shape (10, 41) instead of (10, 40)": {"observations": np.zeros((10, 41))},
    "qpos of shape (9, 25) instead of (10, 25)": {"qpos": np.zeros((9, 25))},
    "button_states of shape (10,) instead of (10, 2)": {"button_states": np.zeros(10)},
    "terminals of shape ()": {"terminals": np.array(1)},
    "ends inside a trajectory": {"terminals": np.arange(10) == 4},
    "observations is not finite at step 6": {"observations": holed(10, 40, 6)},
    "qpos is not finite at step 3": {"qpos": holed(10, 25, 3)},
    "actions cannot be read": {"actions": np.array([["one"] * 5] * 10)},
    "observations cannot be read": {"observations": np.array([{}] * 10, object)},
    "bad.npz: actions cannot be read": {"actions": np.array([["0.5"] * 5] * 10)},
    "qpos cannot be read": {"qpos": np.zeros((10, 25), complex)},
    "observations is not finite at step 0": {"observations": np.full((10, 40), 1e300)},
    "terminals is -1 at step 9": {"terminals": np.where(np.arange(10) == 9, -1, 0)},
    "no step whose next observation is known": {"terminals": np.ones(10, bool)},
}


@pytest.mark.parametrize("said", BAD_FILES)
def test_bad_files(tmp_path, store, capsys, said):
    path = tmp_path / "bad.npz"
    write_file(path, "scene-play", **BAD_FILES[said])
    error = check_error(capsys, "scene-play", "--file", path)
    assert said in error and str(path) in error
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_absent_foreign_and_cut_files(tmp_path, capsys):
    path = tmp_path / "file.npz"
    assert "scene-play-v0.npz" in check_error(capsys, "scene-play", "--file", path)
    write_file(path, "scene-play")
    content = path.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    for foreign in (b"<html>", b"", content[:-100], (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(foreign)
        assert "no npz file" in check_error(capsys, "scene-play", "--file", path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"x" * 50 + content[middle + 50 :])
    assert "cannot be read" in check_error(capsys, "scene-play", "--file", path)


# ---- the ogbench package


def package():
    return pytest.importorskip("ogbench", reason="pip install ogbench (requirements.txt)")


def packages_goal(info):
    """A goal of the package's task, in the table's words."""
    words = {"goal_xyzs": "cubes", "goal_button_states": "buttons"}
    if "goal_xy" in info:
        return {"ball" if "ball_init_xy" in info else "agent": info["goal_xy"]}
    goal = info.get("goal", info)  # the scene's
    words |= {"block_xyzs": "cubes", "button_states": "buttons"}
    words |= {"drawer_pos": "drawer", "window_pos": "window"}
    return {words[key]: value for key, value in goal.items() if key in words}


def test_the_table_is_the_packages():
    """The registered environments, the default tasks and all goals."""
    package()
    create = gym.envs.registration.load_env_creator
    for tasks in TABLE.values():
        first = tasks[0]
        infos = create(first.entry_point)(**first.env_spec.kwargs).task_infos
        default = create(first.entry_point)(**{**first.kwargs, "reward_task_id": 0})
        assert default._reward_task_id == first.number
        for task in tasks:
            assert task.env_spec == gym.spec(task.env_spec.id)
            theirs = packages_goal(infos[task.number - 1])
            assert theirs.keys() == task.goal.keys()
            for key, value in theirs.items():
                np.testing.assert_array_equal(task.goal[key], value)


@pytest.mark.parametrize("name", ["antmaze-giant-navigate-singletask-task2-v0", *DEFAULTS[4:8]])
def test_rewards_masks_and_steps_are_the_packages(tmp_path, name):
    relabel = package().relabel_utils.relabel_dataset
    task, path, rng = find(name), tmp_path / "file.npz", np.random.default_rng(1)
    every = {"lengths": [200, 150], "done": range(350)}
    arrays = write_file(path, name, **every)
    spread = rng.normal(0, 0.3 if "ant" in name else 0.03, (350, task.qpos_dim))
    qpos = (arrays["qpos"] + spread).astype(np.float32)
    _, episodes, _ = convert(tmp_path, name, **every, qpos=qpos)
    theirs = package().load_dataset(str(path), add_info=True)
    with gym.make(task.env_spec.id) as env:
        relabel(task.env_spec.id, env, theirs)
        assert env.observation_space.shape == (task.obs_dim,)
        assert env.action_space.shape == (task.act_dim,)
        env.reset(seed=0)
        assert env.step(env.action_space.sample())[4]["success"] in (0, False)
    ours = {
        "observations": np.concatenate([each.observations[:-1] for each in episodes]),
        "next_observations": np.concatenate([each.observations[1:] for each in episodes]),
        "actions": np.concatenate([each.actions for each in episodes]),
        "rewards": np.concatenate([each.rewards for each in episodes]),
        "masks": 1 - np.concatenate([each.terminations for each in episodes]),
        "terminals": np.concatenate([each.truncations for each in episodes]),
    }
    theirs["terminals"] *= theirs["masks"]  # what ends in a done state is no truncation here
    assert 5 < (theirs["masks"] == 0).sum() < 345
    for key, values in ours.items():
        np.testing.assert_array_equal(values, theirs[key], err_msg=key)
