"""datasets/d4rl.py: files in D4RL's layout, made here, from disk and from an unreliable server."""

import http.server
import json
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import contents, load_tool

DATASETS = Path(__file__).resolve().parents[1] / "datasets"
d4rl = load_tool("datasets/d4rl.py")
TASKS = d4rl.read_tasks()
MAZE_TASKS = [task for task in TASKS.values() if task.suite in ("maze2d", "antmaze")]


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "store"


def write_file(path, name, steps=10, terminal=(), timeout=(), with_next=True, **overrides):
    """A file in D4RL's layout with these terminal and timed-out rows; returns its arrays."""
    task, rng = TASKS[name], np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(steps, task.obs_dim)),
        "actions": rng.uniform(-1, 1, (steps, task.act_dim)),
        "rewards": rng.normal(size=steps),
    }
    for key, rows in (("terminals", terminal), ("timeouts", timeout)):
        arrays[key] = np.isin(np.arange(steps), rows)
    if with_next:
        following = np.roll(arrays["observations"], -1, 0)
        ends = np.union1d([*terminal, *timeout], [steps - 1]).astype(int)
        following[ends] += 100  # the true last next observation is nobody's observation
        arrays["next_observations"] = following
    arrays |= overrides
    with h5py.File(path, "w") as file:
        for key, values in arrays.items():
            if values is not None:
                values = np.asarray(values)
                kind = np.float32 if values.dtype == np.float64 else values.dtype
                file[key] = values.astype(kind)
    return {key: values for key, values in arrays.items() if values is not None}


def convert(tmp_path, name, **kwargs):
    """(arrays of the file, episodes, metadata) of a planted file that was converted."""
    path = tmp_path / "file.hdf5"
    arrays = write_file(path, name, **kwargs)
    assert d4rl.main([name, "--force", "--file", str(path)]) == 0
    dataset = minari.load_dataset(TASKS[name].minari_id)
    return arrays, list(dataset.iterate_episodes()), dataset.storage.metadata


def check_error(capsys, *argv, **kwargs):
    """Run a bad command: exit code 2 and one line on stderr, which is returned."""
    assert d4rl.main([str(word) for word in argv], **kwargs) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# ---- the table


def test_table_holds_the_current_tasks():
    suites = Counter(task.suite for task in TASKS.values())
    assert suites == {"locomotion": 18, "maze2d": 6, "antmaze": 6, "adroit": 12, "kitchen": 3}
    assert len({task.minari_id for task in TASKS.values()}) == 45
    assert len({Path(task.url).name for task in TASKS.values()}) == 45  # one name in the cache each
    for task in TASKS.values():
        robot, _, dataset = task.task.partition("-")
        assert task.minari_id == f"D4RL/{robot}/{dataset}"
        assert task.url.startswith(d4rl.URL_BASE) and task.url.endswith(".hdf5")
        assert task.ref_min_score < task.ref_max_score
        assert bool(task.note) == (task.suite != "locomotion")
        assert bool(task.hub_id) == bool(task.hub_relation)


def test_list_shows_tasks_and_store(tmp_path, capsys):
    convert(tmp_path, "hopper-medium-v2")
    capsys.readouterr()
    assert d4rl.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 46
    stored = [line.split() for line in lines if "D4RL/" in line]
    row = "hopper-medium-v2 locomotion 11 3 1000 -20.27 3234.30 D4RL/hopper/medium-v2"
    assert stored == [row.split()]


# ---- episodes


def test_true_next_observation_is_kept(tmp_path):
    arrays, episodes, metadata = convert(tmp_path, "hopper-medium-v2", terminal=[2], timeout=[5])
    observations, following = arrays["observations"], arrays["next_observations"]
    starts, ends = [0, 3, 6], [2, 5, 9]
    assert len(episodes) == 3
    for episode, start, end in zip(episodes, starts, ends, strict=True):
        expected = np.vstack([observations[start : end + 1], following[end]])
        np.testing.assert_allclose(episode.observations, expected, rtol=1e-6)
        np.testing.assert_allclose(episode.actions, arrays["actions"][start : end + 1], rtol=1e-6)
        np.testing.assert_allclose(episode.rewards, arrays["rewards"][start : end + 1], rtol=1e-6)
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert episode.rewards.dtype == np.float32
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
    assert [bool(episode.terminations[-1]) for episode in episodes] == [True, False, False]
    assert [bool(episode.truncations[-1]) for episode in episodes] == [False, True, False]
    counts = metadata["counts"]
    assert (counts["source_steps"], counts["steps"], counts["episodes"]) == (10, 10, 3)
    assert [counts[key] for key in d4rl.OUTCOMES] == [3, 1, 1, 0, 1]
    assert not any(counts[key] for key in d4rl.REPAIRS)


def test_unknown_last_observation_is_nan(tmp_path, capsys):
    arrays, episodes, metadata = convert(
        tmp_path, "door-human-v1", terminal=[2], timeout=[5, 6], with_next=False
    )
    starts, ends, unknown = [0, 3, 6, 7], [3, 6, 7, 10], np.full((1, 39), np.nan)
    lasts = [arrays["observations"][2:3], unknown, unknown, unknown]
    for episode, start, end, last in zip(episodes, starts, ends, lasts, strict=True):
        states = np.vstack([arrays["observations"][start:end], last]).astype(np.float32)
        np.testing.assert_array_equal(episode.observations, states)
        np.testing.assert_array_equal(episode.actions, np.float32(arrays["actions"][start:end]))
        np.testing.assert_array_equal(episode.rewards, np.float32(arrays["rewards"][start:end]))
    assert [bool(episode.terminations[-1]) for episode in episodes] == [True, False, False, False]
    assert [bool(episode.truncations[-1]) for episode in episodes] == [False, True, True, False]
    counts = metadata["counts"]
    assert counts["steps"] == 10 and counts["unknown_last_observations"] == 3
    assert counts["repeated_last_observations"] == 1
    assert [counts[key] for key in d4rl.OUTCOMES] == [4, 1, 2, 0, 1]
    assert "unknown last observations: 3" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["terminal", "timeout", None])
def test_only_the_files_end_leaves_an_episode_unfinished(tmp_path, end):
    _, episodes, metadata = convert(tmp_path, "hopper-medium-v2", **({end: [9]} if end else {}))
    assert bool(episodes[-1].terminations[-1]) == (end == "terminal")
    assert bool(episodes[-1].truncations[-1]) == (end == "timeout")
    assert metadata["counts"]["unfinished"] == (end is None)


def test_jump_ends_an_episode(tmp_path):
    following = write_file(tmp_path / "plain.hdf5", "hopper-medium-v2")["next_observations"]
    following[4] += 7
    _, episodes, metadata = convert(tmp_path, "hopper-medium-v2", next_observations=following)
    assert [len(episode.rewards) for episode in episodes] == [5, 5]
    np.testing.assert_allclose(episodes[0].observations[-1], following[4], rtol=1e-6)
    assert episodes[0].truncations[-1] and not episodes[0].terminations[-1]
    assert [metadata["counts"][key] for key in d4rl.OUTCOMES] == [2, 0, 0, 1, 1]


def test_a_file_without_an_end_is_one_episode_and_says_so(tmp_path, capsys):
    said = "nothing in the file ends an episode"
    _, episodes, _ = convert(tmp_path, "door-human-v1", with_next=False)
    assert said in capsys.readouterr().out and len(episodes) == 1
    convert(tmp_path, "door-human-v1", with_next=False, timeout=[9])
    convert(tmp_path, "door-human-v1", with_next=False, timeout=[4])
    assert said not in capsys.readouterr().out


def test_terminal_and_timeout_at_once_is_a_terminal(tmp_path):
    _, episodes, metadata = convert(tmp_path, "hopper-medium-v2", terminal=[4], timeout=[4])
    assert episodes[0].terminations[-1] and not episodes[0].truncations[-1]
    counts = metadata["counts"]
    assert (counts["terminal_and_timeout"], counts["terminated"], counts["timed_out"]) == (1, 1, 0)


def test_actions_are_clipped_and_counted(tmp_path):
    actions = np.zeros((10, 3))
    actions[2], actions[7, 1] = 1.25, -1.5
    _, episodes, metadata = convert(tmp_path, "hopper-medium-v2", actions=actions)
    np.testing.assert_array_equal(episodes[0].actions, actions.clip(-1, 1))
    assert metadata["counts"]["clipped_steps"] == 2
    assert metadata["counts"]["largest_excess"] == 0.5


@pytest.mark.parametrize("with_next", [True, False])
def test_small_batches_change_nothing(tmp_path, monkeypatch, with_next):
    layout = dict(steps=60, terminal=[0, 7, 19], timeout=[8, 40], with_next=with_next)
    _, whole, metadata = convert(tmp_path, "hopper-medium-v2", **layout)
    monkeypatch.setattr(d4rl, "BATCH", 5)
    _, parts, again = convert(tmp_path, "hopper-medium-v2", **layout)
    assert metadata["counts"] == again["counts"] and metadata["source"] == again["source"]
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.observations, other.observations)
        np.testing.assert_array_equal(one.actions, other.actions)
        np.testing.assert_array_equal(one.terminations, other.terminations)


def test_columns_and_float_flags_are_understood(tmp_path):
    flags = np.zeros((10, 1), np.float32)
    flags[3] = 1
    _, episodes, _ = convert(
        tmp_path, "hopper-medium-v2", rewards=np.arange(10.0)[:, None], terminals=flags
    )
    assert [episode.rewards.tolist() for episode in episodes] == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert episodes[0].terminations[-1]


def test_metadata(tmp_path):
    path = tmp_path / "hopper_medium-v2.hdf5"
    write_file(path, "hopper-medium-v2", terminal=[4])
    assert d4rl.main(["hopper-medium", "--file", str(path)]) == 0  # the version may be left out
    dataset = minari.load_dataset("D4RL/hopper/medium-v2")
    metadata = dataset.storage.metadata
    assert metadata["source"] == f"d4rl-hdf5 {d4rl.hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert metadata["source_file"] == "hopper_medium-v2.hdf5"
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)
    assert metadata["license"] == "CC BY 4.0" and "Justin Fu" in metadata["author"]
    assert "environment_differs" not in metadata
    assert dataset.total_steps == 10 and dataset.total_episodes == 2
    assert minari.get_normalized_score(dataset, np.array(3234.3)) == 1
    assert "D4RL/hopper/medium-v2" in minari.list_local_datasets()


# ---- today's environments

ONE_OF_EACH = ["walker2d-expert-v2", "halfcheetah-random-v2", "pen-human-v1", "kitchen-mixed-v0"]
ONE_OF_EACH += ["relocate-cloned-v1", "maze2d-medium-dense-v1", "antmaze-umaze-diverse-v2"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_stored_environment_fits_the_data(tmp_path, name):
    task = TASKS[name]
    goal = {"infos/goal": np.ones((10, 2))} if task in MAZE_TASKS else {}
    if task.suite == "kitchen":  # whose infos are an array, and which has no timeouts
        goal = {"infos": np.arange(10), "timeouts": None, "terminals": np.arange(10.0) % 5 == 4}
    _, episodes, metadata = convert(tmp_path, name, with_next=task.suite == "locomotion", **goal)
    dataset = minari.load_dataset(task.minari_id)
    env = dataset.recover_environment()
    assert env.spec.max_episode_steps == task.max_episode_steps
    env.reset(seed=0)
    observation, *_ = env.step(dataset.action_space.sample())
    assert dataset.action_space.shape == env.action_space.shape == (task.act_dim,)
    assert metadata.get("environment_differs", "") == task.note
    if task.suite == "kitchen":
        assert "bottom burner" in env.unwrapped.goal and len(episodes) == 2
        return
    assert env.observation_space == dataset.observation_space
    assert observation.shape == episodes[0].observations.shape[1:]


def d4rl_xy(task, cell):
    """Where D4RL has the centre of a cell, read off its two maze models."""
    row, column = cell
    return (row - 0.2, column - 0.2) if task.suite == "maze2d" else (4 * column - 4, 4 * row - 4)


@pytest.mark.parametrize("task", MAZE_TASKS, ids=lambda task: task.task)
def test_mazes_start_and_end_in_d4rls_cells(task):
    env = d4rl.build_env(task)
    env = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    shift = d4rl.maze_frame(task)[1]
    scale = 4 if task.suite == "antmaze" else 1
    observation, _ = env.reset(seed=0)
    goal = env.unwrapped.goal - shift
    assert np.abs(goal - d4rl_xy(task, task.goal_cell)).max() <= scale / 4
    if task.reset_cell:
        assert np.abs(observation[:2] - shift - d4rl_xy(task, task.reset_cell)).max() <= scale / 4
    else:
        starts = {env.reset(seed=seed)[0][:2].round().astype(int).tobytes() for seed in range(9)}
        assert len(starts) > 1
    maze = np.array(gym.spec(task.eval_env).kwargs["maze_map"])
    for cell in np.ndindex(maze.shape):  # every wall stands where D4RL's does
        seen = env.unwrapped.maze.cell_xy_to_rowcol(d4rl_xy(task, cell) + shift)
        assert (env.unwrapped.maze.maze_map[seen[0]][seen[1]] == 1) == (maze[cell] == 1)


def test_maze_observations_are_d4rls_but_for_the_origin(tmp_path):
    for name in ("maze2d-umaze-v1", "antmaze-large-play-v2"):
        goals = np.arange(20.0).reshape(10, 2)
        arrays, episodes, _ = convert(
            tmp_path, name, timeout=[4], with_next=False, **{"infos/goal": goals}
        )
        shift = d4rl.maze_frame(TASKS[name])[1]
        seen, expected = episodes[1].observations[:-1], arrays["observations"][5:]
        np.testing.assert_allclose(seen[:, :2], expected[:, :2] + shift, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(seen[:, 2:], expected[:, 2:], rtol=1e-6)
        np.testing.assert_allclose(episodes[1].actions, arrays["actions"][5:], rtol=1e-6)
        np.testing.assert_allclose(episodes[1].infos["goal"], goals[[*range(5, 10), 9]] + shift)


def test_ball_meets_maze2ds_walls_where_d4rl_has_them():
    task = TASKS["maze2d-umaze-v1"]
    env, shift = d4rl.build_env(task), d4rl.maze_frame(task)[1]
    env.reset(seed=0)
    env.unwrapped.point_env.set_state(np.array([3, 1]) + shift, np.zeros(2))
    reached = []
    for action in ([1, 0], [0, -1], [0, 1], [-1, 0]):  # D4RL's axes
        for _ in range(250):
            observation, *_ = env.step(np.array(action, np.float32))
        reached.append(observation[:2] - shift)
    corners = [(3.2, 1.0), (3.2, 0.4), (3.2, 3.2), (0.4, 3.2)]  # the extremes of D4RL's data
    np.testing.assert_allclose(reached, corners, atol=0.05)


def test_maze2d_goes_on_at_the_goal_and_antmaze_ends():
    env = d4rl.build_env(TASKS["maze2d-umaze-v1"])
    env.reset(seed=0)
    goal = env.unwrapped.goal.copy()
    env.unwrapped.point_env.set_state(goal, np.zeros(2))
    for _ in range(3):
        _, reward, terminated, _, _ = env.step(np.zeros(2, np.float32))
        assert reward == 1 and not terminated
    np.testing.assert_array_equal(env.unwrapped.goal, goal)

    env = d4rl.build_env(TASKS["antmaze-umaze-v2"])
    observation, _ = env.reset(seed=0)
    ant = env.unwrapped.ant_env
    state = ant.data.qpos.copy()
    np.testing.assert_allclose(observation, np.concatenate([state, ant.data.qvel]))
    state[:2] = env.unwrapped.goal
    ant.set_state(state, np.zeros_like(ant.data.qvel))
    _, reward, terminated, _, _ = env.step(np.zeros(8, np.float32))
    assert reward == 1 and terminated


def test_ant_is_as_strong_and_as_slow_as_d4rls():
    env = d4rl.build_env(TASKS["antmaze-umaze-v2"])
    env.reset(seed=0)
    env.step(np.ones(8, np.float32))
    ant = env.unwrapped.ant_env
    np.testing.assert_allclose(ant.data.ctrl * ant.model.actuator_gear[:, 0], 30)  # N m
    assert ant.dt == pytest.approx(0.1)  # 5 frames of 0.02 s there


# ---- download


class Server(http.server.ThreadingHTTPServer):
    """Answers request after request as `script` says, then faultlessly."""

    def __init__(self, content, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.script = content, list(script)
        self.ranges, self.released = [], threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        content, server = self.server.content, self.server
        server.ranges.append(self.headers["Range"])
        act = server.script.pop(0) if server.script else "serve"
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if isinstance(act, int):
            return self.send_error(act)
        if act == "page":
            content, start = b"<html>try again later</html>", 0
        if act == "no range":
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        faulty = act in ("truncate", "stall")
        self.wfile.write(content[start : start + 3000] if faulty else content[start:])
        if act == "stall":
            self.wfile.flush()
            server.released.wait(10)


@pytest.fixture
def serve(tmp_path):
    """serve(script) -> (server, arguments of the command line) for hopper-medium-v2."""
    servers = []

    def start(*script):
        write_file(tmp_path / "served.hdf5", "hopper-medium-v2", steps=100)
        server = Server((tmp_path / "served.hdf5").read_bytes(), script)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        base = f"http://127.0.0.1:{server.server_port}/"
        return server, ["hopper-medium-v2", "--url-base", base, "--cache", str(tmp_path / "cache")]

    yield start
    for server in servers:
        server.released.set()
        server.shutdown()
        server.server_close()


def check_download(tmp_path, server, argv, **kwargs):
    assert d4rl.main(argv, **kwargs) == 0
    cache = tmp_path / "cache"
    assert [path.name for path in cache.iterdir()] == ["hopper_medium-v2.hdf5"]
    assert (cache / "hopper_medium-v2.hdf5").read_bytes() == server.content
    assert minari.load_dataset("D4RL/hopper/medium-v2").total_steps == 100


def test_download_resumes_after_truncation(tmp_path, serve):
    server, argv = serve("truncate", "truncate")
    check_download(tmp_path, server, argv, pauses=[0])  # one pause: bytes that came renew it
    assert server.ranges == [None, "bytes=3000-", "bytes=6000-"]


def test_download_outlasts_refusals_and_pages(tmp_path, serve, capsys):
    server, argv = serve(403, 503, "page")
    check_download(tmp_path, server, argv, pauses=[0, 0, 0])
    error = capsys.readouterr().err
    assert "HTTP Error 403: Forbidden; again in 0 s" in error and error.count("again in") == 3


def test_download_gives_up_a_silent_connection(tmp_path, serve, capsys):
    server, argv = serve("stall")
    check_download(tmp_path, server, argv, pauses=[0], timeout=0.3)
    assert "timed out; again in 0 s" in capsys.readouterr().err
    assert server.ranges == [None, "bytes=3000-"]


def test_download_starts_over_where_the_server_cannot_resume(tmp_path, serve):
    server, argv = serve("truncate", "no range")
    check_download(tmp_path, server, argv, pauses=[0])


@pytest.mark.parametrize("surplus", [b"", b"another file's end"])
def test_download_of_a_whole_or_overlong_part(tmp_path, serve, surplus):
    server, argv = serve()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hopper_medium-v2.hdf5.part").write_bytes(server.content + surplus)
    check_download(tmp_path, server, argv, pauses=[0])
    assert len(server.ranges) == (2 if surplus else 1)


def test_endless_refusal_names_the_file_to_fetch(serve, capsys):
    server, argv = serve(*[403] * 9)
    assert d4rl.main(argv, pauses=[0, 0]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert len(server.ranges) == 3
    assert "gym_mujoco_v2/hopper_medium-v2.hdf5 by hand" in error and "403" in error
    assert "python datasets/d4rl.py hopper-medium-v2 --file hopper_medium-v2.hdf5" in error


def test_always_the_same_truncation_ends(serve, capsys):
    server, argv = serve("truncate", *["no range", "truncate"] * 5)
    server.content = server.content[:3000]  # whole for the server, but no whole HDF5 file
    assert d4rl.main(argv, pauses=[0]) == 2
    assert "is cut short" in capsys.readouterr().err and len(server.ranges) == 2


def test_missing_file_is_not_asked_for_again(serve, capsys):
    server, argv = serve(404)
    assert "404" in check_error(capsys, *argv, pauses=[0])
    assert len(server.ranges) == 1


def test_no_network_is_said_at_once(tmp_path, capsys, monkeypatch):
    def unknown(*_, **__):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", unknown)
    error = check_error(capsys, "door-human-v1", "--cache", tmp_path, pauses=[99])
    assert "not known" in error and "hand_dapg_v1/door-human-v1.hdf5 by hand" in error


def test_one_failing_task_does_not_stop_the_next(serve):
    _, argv = serve(404)
    assert d4rl.main(["hopper-expert-v2", *argv]) == 2
    assert minari.load_dataset("D4RL/hopper/medium-v2").total_steps == 100


# ---- errors


def test_bad_commands(capsys):
    assert "did you mean hopper-medium-v2" in check_error(capsys, "hopper-medum-v2")
    assert "hopper-medium-v2" in check_error(capsys, "hopper-medium-v0")
    assert "name a task" in check_error(capsys)
    files = check_error(capsys, "hopper-medium-v2", "hopper-expert-v2", "--file", "x.hdf5")
    assert "one task" in files
    assert "--url-base" in check_error(capsys, "hopper-medium-v2", "--url-base", "mirror")
    assert "--help" in check_error(capsys, "--wrong")


def not_finite(rows):
    values = np.zeros((10, 11))
    values[rows] = np.nan
    return values


BAD_FILES = {
    "has no actions": {"actions": None},
    "has no timeouts": {"timeouts": None},
    "has no rewards": {"rewards": np.zeros(0)},
    "(10, 17) instead of (10, 11)": {"observations": np.zeros((10, 17))},
    "(9,) instead of (10, 1)": {"terminals": np.zeros(9, bool)},
    "(8, 11) instead of (10, 11)": {"next_observations": np.zeros((8, 11))},
    "observations is not finite at step 6": {"observations": not_finite(6)},
    "rewards cannot be read": {"rewards": np.array([b"one"] * 10)},
}


@pytest.mark.parametrize("said", BAD_FILES)
def test_bad_files(tmp_path, store, capsys, said):
    path = tmp_path / "bad.hdf5"
    write_file(path, "hopper-medium-v2", **BAD_FILES[said])
    error = check_error(capsys, "hopper-medium-v2", "--file", path)
    assert said in error and str(path) in error
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_places_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    error = check_error(capsys, "hopper-medium-v2", "--cache", taken)
    assert str(taken) in error and "--cache" in error
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(taken))
    assert str(taken) in check_error(capsys, "hopper-medium-v2")
    assert str(taken) in check_error(capsys, "--list")


def test_absent_foreign_and_cut_files(tmp_path, capsys):
    path = tmp_path / "file.hdf5"
    assert "hopper_medium-v2.hdf5" in check_error(capsys, "hopper-medium-v2", "--file", path)
    path.write_text("<html>")
    assert "no HDF5 file" in check_error(capsys, "hopper-medium-v2", "--file", path)
    write_file(path, "hopper-medium-v2", steps=1000)
    path.write_bytes(path.read_bytes()[:20_000])
    assert "cut short" in check_error(capsys, "hopper-medium-v2", "--file", path)


def test_store_keeps_what_it_has(tmp_path, store, capsys):
    _, before, _ = convert(tmp_path, "hopper-medium-v2")
    bad = tmp_path / "bad.hdf5"
    write_file(bad, "hopper-medium-v2", observations=not_finite(9), with_next=False)
    check_error(capsys, "hopper-medium-v2", "--force", "--file", bad)
    write_file(bad, "hopper-medium-v2", steps=20)
    assert d4rl.main(["hopper-medium-v2", "--file", str(bad)]) == 0  # not replaced without --force
    assert "--force" in capsys.readouterr().out
    dataset = minari.load_dataset("D4RL/hopper/medium-v2")
    np.testing.assert_array_equal(dataset[0].observations, before[0].observations)
    assert d4rl.main(["hopper-medium-v2", "--force", "--file", str(bad)]) == 0
    assert minari.load_dataset("D4RL/hopper/medium-v2").total_steps == 20
    names = [path.name for path in (store / "D4RL" / "hopper").iterdir()]
    assert names == ["medium-v2"]  # nothing half-built is left
    raw = json.loads((store / "D4RL/hopper/medium-v2/data/metadata.json").read_text())
    assert raw["dataset_id"] == "D4RL/hopper/medium-v2"


def test_the_hubs_data_of_the_same_name_are_not_taken_for_d4rls(tmp_path, store, capsys):
    """Minari's hub gives re-created data names such as D4RL/antmaze/umaze-v2."""
    convert(tmp_path, "hopper-medium-v2")
    path = store / "D4RL/hopper/medium-v2/data/metadata.json"
    raw = json.loads(path.read_text())
    del raw["source"]
    path.write_text(json.dumps(raw))
    capsys.readouterr()
    argv = ["hopper-medium-v2", "--file", str(tmp_path / "file.hdf5")]
    error = check_error(capsys, *argv)
    assert "D4RL/hopper/medium-v2" in error and "--force" in error
    assert json.loads(path.read_text()) == raw
    assert d4rl.main(["--list"]) == 0
    assert "D4RL/hopper/medium-v2" not in capsys.readouterr().out
    assert d4rl.main([*argv, "--force"]) == 0
    assert json.loads(path.read_text())["source"].startswith("d4rl-hdf5 ")


# ---- files of the user's own

VALVE = """
import gymnasium as gym, numpy as np

class Valve(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (3,))
    action_space = gym.spaces.Box(np.float32([[-0.5, -2]]), np.float32([[0.5, 2]]))

class Broken(Valve):
    def __init__(self):
        raise RuntimeError("no\\ndevice")

gym.register("Valve-v0", f"{__name__}:Valve", max_episode_steps=40)
gym.register("Broken-v0", f"{__name__}:Broken")
gym.register("Unnamed-v0", Valve)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """own(*words, **arrays): the words that convert a file of 400 steps with these arrays."""
    (tmp_path / "own_valve.py").write_text(VALVE)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)

    def write(*words, **overrides):
        arrays = {
            "observations": rng.normal(size=(400, 3)),
            "actions": rng.uniform(-1, 1, (400, 2)),
            "rewards": rng.normal(size=400),
            "terminals": np.zeros(400, bool),
            "timeouts": np.arange(400) % 40 == 39,
        }
        with h5py.File(tmp_path / "own.hdf5", "w") as file:
            for key, values in (arrays | overrides).items():
                if values is not None:
                    file[key] = values
        return [*map(str, words), "--id", "mine/valve-v0", "--file", str(tmp_path / "own.hdf5")]

    yield write
    for name in ("Valve-v0", "Broken-v0", "Unnamed-v0"):
        gym.registry.pop(name, None)
    sys.modules.pop("own_valve", None)


def load_own():
    """(episodes, action space, raw metadata) of what was converted."""
    dataset = minari.load_dataset("mine/valve-v0")
    raw = json.loads(
        (minari.storage.get_dataset_path("mine/valve-v0") / "data/metadata.json").read_text()
    )
    return list(dataset.iterate_episodes()), dataset.action_space, raw


def test_own_file(own, capsys):
    """Case c33: an own recording in D4RL's layout."""
    assert d4rl.main(own()) == 0
    episodes, space, raw = load_own()
    assert [len(episode.rewards) for episode in episodes] == [40] * 10
    assert all(episode.truncations[-1] for episode in episodes)
    assert space == gym.spaces.Box(-1, 1, (2,), np.float32)
    absent = {"env_spec", "author", "license", "environment_differs"}
    assert not absent & raw.keys() and "ref_min_score" not in raw
    assert not raw["source"].startswith(d4rl.SOURCE) and raw["dataset_id"] == "mine/valve-v0"
    out = capsys.readouterr().out
    assert "mine/valve-v0: 400 of 400 steps, 10 episodes" in out and "actions" not in out
    assert "mine/valve-v0" in minari.list_local_datasets()


def test_own_file_without_timeouts_in_columns(own, capsys):
    column = {key: np.zeros((400, 1)) for key in ("rewards", "terminals")}
    column["terminals"][99::100] = 1
    assert d4rl.main(own(timeouts=None, actions=np.zeros(400), **column)) == 0
    episodes, space, _ = load_own()
    assert [bool(episode.terminations[-1]) for episode in episodes] == [True] * 4
    assert "only terminals end an episode" in capsys.readouterr().out
    words = ["--env_id", "own_valve:Valve-v0", "--force"]
    assert d4rl.main(own(*words, timeouts=None, **column)) == 0
    assert "only terminals end an episode" in capsys.readouterr().out
    assert space.shape == (1,) and episodes[0].actions.shape == (100, 1)


def test_own_actions_beyond_one_keep_their_extremes(own, capsys, monkeypatch):
    monkeypatch.setattr(d4rl, "BATCH", 7)
    actions = np.zeros((400, 2), np.float32)
    actions[3], actions[399] = (-3, 0.5), (0.25, 0.75)
    assert d4rl.main(own(actions=actions)) == 0
    episodes, space, raw = load_own()
    assert space == gym.spaces.Box(np.float32([-3, 0]), np.float32([0.25, 0.75]))
    np.testing.assert_array_equal(np.vstack([e.actions for e in episodes]), actions)
    assert raw["counts"]["clipped_steps"] == 0
    assert "actions from -3 to 0.75" in capsys.readouterr().out.splitlines()[0]


def test_own_actions_beyond_one_by_rounding_are_clipped(own, capsys):
    actions = np.full((400, 2), 0.3, np.float32)
    actions[7, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert d4rl.main(own(actions=actions)) == 0
    episodes, space, raw = load_own()
    assert space == gym.spaces.Box(-1, 1, (2,), np.float32) and episodes[0].actions[7, 0] == 1
    assert raw["counts"]["clipped_steps"] == 1 and "bounds" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [1e-8, 1])
def test_own_jumps_are_seen_at_any_scale(own, size):
    obs = size * np.random.default_rng(0).uniform(1, 2, size=(401, 3))
    following = obs[1:].copy()
    following[[99, 199]] *= 1.5
    following[300] += 5e-7 * size  # rounding
    assert d4rl.main(own(observations=obs[:-1], next_observations=following, timeouts=None)) == 0
    assert [len(episode.rewards) for episode in load_own()[0]] == [100, 100, 200]


def test_own_environment(own):
    actions = np.zeros((400, 2))
    actions[5], actions[6] = (0.75, 2), (0.5, -2.5)
    words = ["--env_id", "own_valve:Valve-v0", "--ref_min_score", "-2", "--ref_max_score", "30.5"]
    assert d4rl.main(own(*words, actions=actions)) == 0
    episodes, space, raw = load_own()
    assert space == gym.make("Valve-v0").action_space
    np.testing.assert_array_equal(episodes[0].actions[[5, 6]], [[[0.5, 2]], [[0.5, -2]]])
    assert (raw["counts"]["clipped_steps"], raw["counts"]["largest_excess"]) == (2, 0.5)
    spec = json.loads(raw["env_spec"])
    assert (spec["id"], spec["max_episode_steps"]) == ("Valve-v0", 40)
    assert (raw["ref_min_score"], raw["ref_max_score"]) == (-2, 30.5)
    assert d4rl.main(own("--env_id", "Valve-v0", "--force")) == 0  # it is registered by now


def test_own_environments_that_do_not_fit(own, capsys, store):
    said = {
        "Pendulum-v1": "Pendulum-v1 has [3, 1] observations and actions, the file [3, 2]",
        "CartPole-v1": "Discrete(2)",
        "Absent-v0": "Absent",
        "no_such_module:Valve-v0": "No module named 'no_such_module'",
        "own_valve:Broken-v0": "RuntimeError no device",
        "own_valve:Unnamed-v0": "own_valve:Unnamed-v0: ValueError",
        "leaves:Valve-v0": "SystemExit",
    }
    Path(own()[-1]).with_name("leaves.py").write_text("raise SystemExit")
    for name, text in said.items():
        assert text in check_error(capsys, *own("--env_id", name)), name
    assert not [path for path in store.rglob("*") if path.is_file()]


BAD_OWN_FILES = {
    "has no actions": {"actions": None},
    "has no rewards": {"rewards": None},
    "has no terminals": {"terminals": None},
    "has no observations": {"observations": h5py.Empty("f4")},
    "rewards of shape (400, 2) instead of (400, 1)": {"rewards": np.zeros((400, 2))},
    "actions of shape (399, 2) instead of (400, 2)": {"actions": np.zeros((399, 2))},
    "actions of shape (400, 0)": {"actions": np.zeros((400, 0))},
    "observations of shape (400, 4, 3)": {"observations": np.zeros((400, 4, 3))},
    "next_observations of shape (400, 2)": {"next_observations": np.zeros((400, 2))},
    "actions is not finite at step 7": {
        "actions": np.where(np.arange(800) == 15, np.inf, 0).reshape(400, 2)
    },
    "rewards is not finite at step 0": {"rewards": np.full(400, 1e300)},
    "observations cannot be read as numbers": {"observations": np.full((400, 3), b"one")},
    "terminals cannot be read as numbers": {"terminals": np.full(400, 1j)},
    "terminals is 0.5 at step 2": {"terminals": np.where(np.arange(400) == 2, 0.5, 0)},
    "timeouts is -1 at step 399": {"timeouts": np.where(np.arange(400) == 399, -1, 0)},
    **{
        f"has {name} and no timeouts": {name: np.zeros(400, bool), "timeouts": None}
        for name in ("truncations", "truncated", "timeout", "dones")
    },
}


@pytest.mark.filterwarnings("error")  # which would be a second line
@pytest.mark.parametrize("said", BAD_OWN_FILES)
def test_bad_own_files(own, store, capsys, said):
    assert said in check_error(capsys, *own(**BAD_OWN_FILES[said]))
    assert not [path for path in store.rglob("*") if path.is_file()]


def test_own_files_with_groups_for_arrays_or_nothing_at_all(own, tmp_path, capsys):
    words, path = own(observations=None), tmp_path / "own.hdf5"
    with h5py.File(path, "a") as file:
        file["observations/robot"] = np.zeros((400, 3))
    assert "has no observations" in check_error(capsys, *words)
    h5py.File(path, "w").close()
    assert "has no rewards" in check_error(capsys, *words)
    path.write_bytes(b"")
    assert "no HDF5 file" in check_error(capsys, *words)
    path.unlink()
    assert "is not a file" in check_error(capsys, *words)


@pytest.mark.parametrize("name", ["robot", "mine/robot"])
def test_own_id_without_version(capsys, name):
    assert f"{name}-v0" in check_error(capsys, "--file", "x", "--id", name)


@pytest.mark.parametrize(
    "name", ["", "/a-v0", "a/../b-v0", "a b-v0", "a-v0\n", "D4RL/a-v0", "a-v0/b-v0"]
)
def test_own_id_that_is_none(capsys, name):
    assert "mine/valve-v0" in check_error(capsys, "--file", "x", "--id", name)


def test_bad_own_commands(own, capsys):
    assert "no task" in check_error(capsys, *own("hopper-medium-v2"))
    assert "--file" in check_error(capsys, "--id", "mine/valve-v0")
    for words in (["--env_id", "Hopper-v5"], ["--ref_min_score", "0", "--ref_max_score", "1"]):
        assert "go with --id" in check_error(capsys, "hopper-medium-v2", *words)
    for low, high in (("1", "1"), ("2", "1"), ("nan", "1"), ("0", "inf")):
        error = check_error(capsys, *own("--ref_min_score", low, "--ref_max_score", high))
        assert "--ref_max_score" in error
    assert "go together" in check_error(capsys, *own("--ref_min_score", "0"))
    words = own("--ref_min_score", "-1e3", "--ref_max_score", "1")
    assert "after an =" in check_error(capsys, *words)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["amid the writing", "between the old set and the new one"])
def test_a_signal_leaves_the_store_as_it_was(own, store, capsys, monkeypatch, number, moment):
    assert d4rl.main(own()) == 0
    before, rename, capture = contents(store), Path.rename, capsys.readouterr
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert not capture().err

    def moved(self, to):
        if self.name == "new":
            signal.raise_signal(number)
        return rename(self, to)

    with monkeypatch.context() as patch:
        if moment == "amid the writing":
            patch.setattr(d4rl.Progress, "__call__", lambda *_: signal.raise_signal(number))
        else:
            patch.setattr(Path, "rename", moved)
        assert d4rl.main(own("--force", actions=np.zeros((400, 2)))) == 130
    assert capture().err == f"{d4rl.INTERRUPTED}\n" and contents(store) == before
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_what_a_kill_left_is_named(own, store, capsys):
    left = store / "mine" / ".stitch-abc"
    left.mkdir(parents=True)
    assert d4rl.main(own()) == 0
    assert f"{left} is of a process" in capsys.readouterr().out and left.is_dir()


def test_own_set_is_replaced_when_asked_and_nothing_else_is(own, store, capsys):
    assert d4rl.main(own()) == 0
    short = {"observations": np.zeros((5, 3)), "actions": np.zeros((5, 2)), "rewards": np.zeros(5)}
    short |= {"terminals": np.zeros(5), "timeouts": None}
    assert "--force" in check_error(capsys, *own(**short))
    assert len(load_own()[0]) == 10
    assert d4rl.main(own("--force", **short)) == 0
    assert len(load_own()[0]) == 1
    other = store / "notes-v0" / "paper.txt"
    other.parent.mkdir()
    other.write_text("not a dataset")
    words = own()
    words[words.index("mine/valve-v0")] = "notes-v0"
    assert "no dataset" in check_error(capsys, *words, "--force") and other.exists()


# ---- HDF5 that reads elsewhere


def plant(kind, file, folder):
    """Put an array that is not the file's own in `file`, or a circle."""
    with h5py.File(folder / "other.hdf5", "w") as other:
        other["array"] = np.zeros(400)
    if kind == "external":
        file["infos/planted"] = h5py.ExternalLink("other.hdf5", "/array")
    elif kind == "soft":
        file["infos/planted"] = h5py.SoftLink("/rewards")
    elif kind == "dangling":
        file["infos/planted"] = h5py.SoftLink("/infos/planted")
    elif kind == "virtual":
        layout = h5py.VirtualLayout((400,), float)
        layout[:] = h5py.VirtualSource(folder / "other.hdf5", "array", (400,))
        file.create_virtual_dataset("infos/planted", layout)
    elif kind == "stored":
        place = [(str(folder / "other.hdf5"), 0, 3200)]
        file.create_dataset("infos/planted", (400,), float, external=place)
    elif kind == "circle":
        file.create_group("infos/planted")
        file["infos/planted/up"] = file["infos"]
    else:
        file.create_group("infos")["planted"] = file["/"]


FOREIGN = ["external", "soft", "dangling", "virtual", "stored", "circle", "root"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_read_elsewhere_are_refused(own, tmp_path, store, capsys, kind):
    words = own()
    with h5py.File(tmp_path / "own.hdf5", "a") as file:
        plant(kind, file, tmp_path)
    error = check_error(capsys, *words)
    assert "'infos/planted" in error
    assert not [path for path in store.rglob("*") if path.is_file()]
    write_file(tmp_path / "task.hdf5", "hopper-medium-v2")
    with h5py.File(tmp_path / "task.hdf5", "a") as file:
        plant(kind, file, tmp_path)
    assert "planted" in check_error(capsys, "hopper-medium-v2", "--file", tmp_path / "task.hdf5")


def test_arrays_with_two_names_and_chunks_are_the_files_own(own, tmp_path):
    words = own()
    with h5py.File(tmp_path / "own.hdf5", "a") as file:
        file["infos/again"] = file["rewards"]
        file.create_dataset("infos/packed", data=np.zeros(400), compression="gzip")
        file["infos/type"] = np.dtype("f4")
    assert d4rl.main(words) == 0
