"""datasets/doctor.py: every fault is planted into a clean toy set, and found; a clean one has none.

What is planted alters the file itself, for Minari's writer would refuse much of it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from conftest import (
    TOY_DISCRETE_ENV,
    TOY_ENV,
    contents,
    discrete_episodes,
    load_script,
    load_tool,
    toy_episode,
    words,
    write_dataset,
)
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.serialization import serialize_space
from PIL import Image

doctor = load_tool("datasets/doctor.py")
EPISODES, STEPS = 24, 40


def smooth_episode(rng, number: int, terminated: bool):
    """Observations that move a little at each step, as those of a robot."""
    walk = rng.normal(size=3) + 0.05 * rng.normal(size=(STEPS + 1, 3)).cumsum(0)
    # not every return is equal, and all lie between the references
    rewards = -1 - rng.uniform(0, 1, STEPS) * (1 + number / EPISODES) / 2
    arrays = {"observations": walk.astype(np.float32), "rewards": rewards.astype(np.float32)}
    return toy_episode(rng, STEPS, terminated, **arrays)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The data folder of a set with nothing wrong: even episodes terminate, odd are truncated."""
    rng, store = np.random.default_rng(0), tmp_path_factory.mktemp("clean")
    episodes = [smooth_episode(rng, i, terminated=i % 2 == 0) for i in range(EPISODES)]
    return write_dataset(store, "toy/walk-v0", episodes)


class Patient:
    """A copy of the clean set, to plant faults into."""

    env_id = "auto"

    def __init__(self, folder: Path):
        self.folder = folder

    def set(self, episode: int, **arrays):
        with h5py.File(self.folder / "main_data.hdf5", "r+") as file:
            for key, values in arrays.items():
                del file[f"episode_{episode}"][key]
                file[f"episode_{episode}"][key] = values

    def get(self, episode: int, key: str) -> np.ndarray:
        with h5py.File(self.folder / "main_data.hdf5") as file:
            return file[f"episode_{episode}"][key][()]

    def edit(self, episode: int, key: str, rows, values):
        array = self.get(episode, key)
        array[rows] = values
        self.set(episode, **{key: array})

    def everywhere(self, key: str, change):
        for episode in range(EPISODES):
            self.set(episode, **{key: change(self.get(episode, key))})

    def describe(self, **changes):
        """Change the metadata; None takes a key out."""
        path = self.folder / "metadata.json"
        metadata = json.loads(path.read_text()) | changes
        kept = {key: value for key, value in metadata.items() if value is not None}
        path.write_text(json.dumps(kept))

    def findings(self) -> list:
        return doctor.diagnose(self.load())

    def load(self):
        return doctor.load(str(self.folder), self.env_id)

    def notes(self) -> str:
        return "\n".join(doctor.notes(self.load()))

    def only(self, title: str) -> str:
        """The detail of the one finding, which has this title."""
        findings = self.findings()
        assert [finding.title for finding in findings] == [title]
        assert findings[0].effect and findings[0].mend
        return findings[0].detail


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where pictures go unasked; the working directory is another folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache" / "stitch" / "doctor"


@pytest.fixture
def blank(monkeypatch):
    """No picture but an empty file: a second less."""
    monkeypatch.setattr(doctor, "draw", lambda data, findings, path: path.touch())  # noqa: ARG005


@pytest.fixture
def patient(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "set" / "data")
    return Patient(tmp_path / "set" / "data")


# ---- command line


def test_clean_set_has_no_finding(patient, capsys):
    assert doctor.main([str(patient.folder.parent), "--out", "pictures"]) == 0
    out, err = capsys.readouterr()
    assert "nothing wrong found" in out and err == ""
    for part in ("toy/walk-v0", "Pendulum-v1", "24, 12 terminated, 12 truncated", "960"):
        assert part in out
    assert "-160.0 to -20.0" in out and "40 / 40 / 40" in out and "scores" in out
    returns = [patient.get(i, "rewards").astype(float).sum() for i in range(EPISODES)]
    assert f"{min(returns):,.6g} / {np.median(returns):,.6g} / {max(returns):,.6g}, mean" in out
    lowest = min(patient.get(i, "observations")[:, 2].min() for i in range(EPISODES))
    assert f"observation 2   {lowest:12.4g}" in out
    (picture,) = Path("pictures").iterdir()
    assert picture.name.endswith("-set-doctor.png")
    assert out.startswith(f"{patient.folder.parent} calls itself toy/walk-v0\n")
    assert out.splitlines()[-1] == f"picture: {picture}"
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) >= 800
        assert np.asarray(image.convert("L")).std() > 10  # not an empty page


@pytest.mark.usefixtures("blank")
def test_picture_goes_into_the_cache(patient, cache, capsys):
    before = contents(patient.folder.parent)
    assert doctor.main([str(patient.folder)]) == 0
    (picture,) = cache.iterdir()
    assert picture.name.endswith("-set-data-doctor.png")
    assert capsys.readouterr().out.splitlines()[-1] == f"picture: {picture}"
    assert not list(Path().iterdir()) and contents(patient.folder.parent) == before


@pytest.mark.usefixtures("blank")
def test_sets_that_call_themselves_the_same_get_pictures_of_their_own(patient, cache):
    mended = patient.folder.parent.with_name("mended")
    shutil.copytree(patient.folder.parent, mended)
    assert doctor.main([str(patient.folder.parent), str(mended)]) == 0
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_ctrl_c_is_no_fault_of_the_data(patient, monkeypatch, capsys, wrapped):
    """Cython turns an interruption that comes at a wrong instant into an error of its own."""

    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if wrapped:
                raise SystemError("returned a result with an exception set") from None
            raise

    monkeypatch.setattr(doctor, "read_episodes", interrupted)
    assert doctor.main([str(patient.folder)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("middle", [1e9, 1e-30, 0.0])
def test_picture_of_returns_that_hardly_differ(patient, middle):
    """NumPy refuses bins that rounding would join."""
    data = patient.load()
    data.returns = np.full(EPISODES, middle)
    data.returns[3] = np.nextafter(middle, np.inf)
    figure, axes = doctor.plt.subplots()
    doctor.draw_returns(axes, data)
    assert sum(bar.get_height() for bar in axes.patches) == EPISODES
    doctor.plt.close(figure)


@pytest.mark.parametrize("value", ["", "here"])
def test_cache_that_is_no_absolute_folder(value, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor.picture_folder() == tmp_path / ".cache" / "stitch" / "doctor"


@pytest.mark.usefixtures("blank")
def test_fault_is_told_with_effect_and_mend(patient, capsys):
    patient.edit(4, "truncations", -1, True)
    assert doctor.main([str(patient.folder)]) == 1
    out = capsys.readouterr().out
    assert "1. terminal and timeout at once: 1 step in 1 episode, first in episode 4 at step" in out
    assert "effect: loaders disagree" in out and "mend:   keep the termination" in out


@pytest.mark.usefixtures("blank")
def test_id_of_the_store_and_one_that_is_not_there(clean, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(clean.parents[2]))
    assert doctor.main(["no/such-v0", "toy/walk-v0"]) == 2
    out, err = capsys.readouterr()
    assert "nothing wrong found" in out and err.startswith("error: ")
    assert "no/such-v0 is not here" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["no/such-v0"], ["no/such-v0 is not here", "the store"]),
        (["D4RL/hopper/medium-v2"], ["python datasets/d4rl.py hopper-medium-v2"]),
        (["empty"], ["empty is not here"]),
        (["../set/data", "--out", "a-file"], ["a-file", "--out"]),
        ([], ["ID", "--help"]),
        (["set", "--bad"], ["--bad", "--help"]),
    ],
)
@pytest.mark.usefixtures("patient")
def test_errors_are_one_line(argv, words, capsys):
    Path("empty").mkdir()
    Path("a-file").touch()
    assert doctor.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error


def break_file(patient):
    (patient.folder / "main_data.hdf5").write_bytes(b"no HDF5")


def break_metadata(patient):
    (patient.folder / "metadata.json").write_text("{")


def break_episodes(patient):
    patient.everywhere("rewards", lambda rewards: rewards[:0])


@pytest.mark.parametrize("harm", [break_file, break_metadata, break_episodes])
def test_unreadable_set_is_one_line(patient, harm, capsys):
    harm(patient)
    assert doctor.main([str(patient.folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(patient.folder) in error and "convert it again" in error
    assert not list(Path().iterdir())


# ---- files


def link_outside(file, secret):
    file["episode_3/rewards"] = h5py.ExternalLink(secret, "rewards")


def link_by_name(file, secret):  # noqa: ARG001
    file["episode_3/rewards"] = h5py.SoftLink("/episode_4/rewards")


def virtual_array(file, secret):
    layout = h5py.VirtualLayout((STEPS,), "f4")
    layout[:] = h5py.VirtualSource(secret, "rewards", (STEPS,))
    file.create_virtual_dataset("episode_3/rewards", layout)


def stored_outside(file, secret):
    where = [(secret, 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("episode_3/rewards", (STEPS,), "f4", external=where)


def circle(file, secret):  # noqa: ARG001
    file["episode_3/infos/again"] = file["episode_3"]
    file["episode_3/rewards"] = np.zeros(STEPS, np.float32)


@pytest.mark.parametrize(
    "plant", [link_outside, link_by_name, virtual_array, stored_outside, circle]
)
def test_file_that_reads_elsewhere(patient, plant, capsys, tmp_path):
    secret = tmp_path / "secret.hdf5"
    with h5py.File(secret, "w") as file:
        file["rewards"] = np.full(STEPS, 12345, np.float32)
    with h5py.File(patient.folder / "main_data.hdf5", "r+") as file:
        del file["episode_3/rewards"]
        plant(file, str(secret))
    assert doctor.main([str(patient.folder)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: dataset ") and err.count("\n") == 1 and "episode_3/" in err
    assert out == ""


@pytest.mark.usefixtures("blank")
def test_dataset_of_symbolic_links(patient, tmp_path):
    """As the Hugging Face cache keeps it: trainer and doctor read it where it lies."""
    linked, blobs = tmp_path / "snapshots" / "abc" / "data", tmp_path / "blobs"
    shutil.move(patient.folder, blobs)
    linked.mkdir(parents=True)
    for file in blobs.iterdir():
        (linked / file.name).symlink_to(Path("../../../blobs", file.name))
    assert doctor.main([str(linked.parent)]) == 0
    assert load_script("bc").main(words(dataset_id=str(linked.parent))) == 0


@pytest.mark.usefixtures("blank")
def test_arrow_format(patient, tmp_path):
    storage = MinariStorage.read(patient.folder)
    episodes = [EpisodeBuffer(**stored) for stored in storage.get_episodes(range(EPISODES))]
    folder = write_dataset(tmp_path / "store", "toy/walk-v0", episodes, data_format="arrow")
    assert not list(folder.glob("*.hdf5"))
    assert doctor.main([str(folder)]) == 0


def test_empty_episode(patient):
    for key in ("actions", "rewards", "terminations", "truncations"):
        patient.set(3, **{key: patient.get(3, key)[:0]})
    detail = patient.only("empty episodes")
    assert "1 episode, first episode 3" in detail


def test_inconsistent_lengths(patient):
    patient.set(2, rewards=patient.get(2, "rewards")[:-1])
    patient.set(7, observations=patient.get(7, "observations")[:-1])
    assert "2 episodes, first episode 2" in patient.only("inconsistent lengths")


def test_totals_that_contradict_the_file(patient):
    patient.describe(total_steps=EPISODES * STEPS + 5)
    assert "965 steps, the file holds 960" in patient.only("inconsistent lengths")


@pytest.mark.parametrize(
    ("key", "value"), [("observations", np.nan), ("actions", np.inf), ("rewards", -np.inf)]
)
def test_not_finite(patient, key, value):
    patient.edit(5, key, 7, value)
    detail = patient.only("NaN or infinite values")
    assert "first episode 5" in detail and key[:3] in detail


@pytest.mark.parametrize("key", ["terminations", "truncations"])
@pytest.mark.parametrize("value", [2.0, -1.0, 0.5])
def test_flags_that_are_no_flags(patient, key, value):
    patient.set(5, **{key: np.full(STEPS, value)})
    detail = patient.only("flags that are neither 0 nor 1")
    assert f"first episode 5: {key} hold {value}" in detail


def test_unknown_last_observations_are_a_note(patient, monkeypatch):
    page = doctor.page(patient.load()).splitlines()
    for episode in (3, 9):
        patient.edit(episode, "observations", -1, np.nan)
    data = patient.load()
    assert doctor.diagnose(data) == [] and data.unknown.sum() == 2
    assert "2 episodes without a known last observation (NaN)" in patient.notes()
    again = doctor.page(data).splitlines()
    assert len(again) == len(page) + 1 and not any("nan " in line for line in again)
    assert [line.split()[0] for line in page if line not in again] == ["observation"] * 3
    assert np.isfinite(data.changes[0]).all() and len(np.unique(data.hashes)) == EPISODES * STEPS
    figures, close = [], doctor.plt.close
    monkeypatch.setattr(doctor.plt, "close", figures.append)
    doctor.draw(data, [], Path("unknown.png"))
    bars = [bar for axes in figures[0].axes for bar in axes.patches]
    assert len(bars) > 100 and np.isfinite([bar.get_height() for bar in bars]).all()
    close(figures[0])


@pytest.mark.parametrize(
    ("episode", "rows"), [(3, np.s_[-1, 0]), (3, np.s_[:1]), (3, np.s_[-2:]), (4, np.s_[-1])]
)
def test_what_else_is_unknown_is_a_fault(patient, episode, rows):
    """Part of an observation, one that is not the last, or the last of an end that is known."""
    patient.edit(episode, "observations", rows, np.nan)
    assert f"first episode {episode}" in patient.only("NaN or infinite values")


def test_faults_are_found_beside_unknown_observations(patient):
    for episode in range(1, EPISODES, 2):
        patient.edit(episode, "observations", -1, np.nan)
    patient.everywhere("observations", lambda states: states * np.float32([1, 1, 0]) + 0.5)
    assert "first dimension 2" in patient.only("constant observations")
    states = patient.get(6, "observations")
    patient.set(6, observations=states + 10 * (np.arange(STEPS + 1) > 19)[:, None])
    assert "jumps inside episodes" in {finding.title for finding in patient.findings()}


# ---- jumps


def test_teleport_inside_an_episode(patient):
    states = patient.get(6, "observations")
    states[20:, 1] += 10
    patient.set(6, observations=states)
    detail = patient.only("jumps inside episodes")
    assert "1 step in 1 episode, first in episode 6 at step 19: dimension 1" in detail


def test_jump_at_a_terminal_is_no_fault(patient):
    patient.edit(4, "observations", -1, 10)
    assert patient.findings() == []


def test_timeout_leads_to_the_next_episode(patient):
    for episode in (3, 9):
        patient.edit(episode, "observations", -1, patient.get(episode + 1, "observations")[0])
    detail = patient.only("jumps at timeouts")
    assert "2 steps in 2 episodes, first in episode 3 at step 39" in detail
    assert "in 2 cases to the next episode's first" in detail


def test_timeout_jumps_elsewhere(patient):
    patient.edit(3, "observations", -1, 50)
    assert "in 0 cases" in patient.only("jumps at timeouts")


def test_goes_on_where_the_last_episode_stopped(patient):
    """A long recording cut into episodes: the next first observation is the true one."""
    end = patient.get(3, "observations")[-1]
    states = patient.get(4, "observations")
    patient.set(4, observations=states - states[0] + end)
    assert patient.findings() == []


def test_repeated_last_observation(patient):
    for episode in (4, 5):  # one terminates: what its last step led to is never bootstrapped
        patient.edit(episode, "observations", -1, patient.get(episode, "observations")[-2])
    detail = patient.only("last observation repeated")
    assert "1 step in 1 episode, first in episode 5" in detail


def test_robot_at_rest_repeats_itself(patient):
    def rest(states):
        states[25:] = states[25]
        return states

    patient.everywhere("observations", rest)
    assert patient.findings() == []


# ---- flags


def test_terminal_and_timeout_at_once(patient):
    patient.edit(2, "truncations", -1, True)
    assert "first in episode 2 at step 39" in patient.only("terminal and timeout at once")


@pytest.mark.parametrize("key", ["terminations", "truncations"])
def test_flag_in_the_middle(patient, key):
    patient.edit(3, key, 10, True)
    assert "first in episode 3 at step 10" in patient.only("flags in the middle of an episode")


def test_end_without_a_flag(patient):
    patient.edit(1, "truncations", -1, False)
    assert "first in episode 1" in patient.only("episodes that end with neither flag")
    assert "has no end" not in patient.notes()


def test_ends_that_were_all_lost(patient):
    for key in ("terminations", "truncations"):
        patient.everywhere(key, np.zeros_like)
    assert "24 steps in 24" in patient.only("episodes that end with neither flag")
    patient.describe(total_episodes=1, total_steps=STEPS)
    assert "1 step in 1" in patient.only("episodes that end with neither flag")


def test_recording_that_stopped_in_its_last_episode_is_a_note(patient):
    patient.edit(EPISODES - 1, "truncations", -1, False)
    assert patient.findings() == []
    assert f"episode {EPISODES - 1} has no end" in patient.notes()


# ---- rewards


def maze_data(late: bool, ends: bool = False, observed: bool = False, seed: int = 0):
    """Balls that cross a goal at (1, 1), the cell's centre, or stop there (`ends`)."""
    rng, episodes = np.random.default_rng(seed), []
    cells = [[1, 1, 1, 1, 1], [1, 0, 0, "g", 1], [1, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
    for _ in range(60):
        angle = rng.uniform(0, 2 * np.pi)
        way = np.stack([np.cos(angle), np.sin(angle)])
        aside = rng.uniform(-0.3, 0.3) * np.array([-way[1], way[0]])
        pace = np.linspace(-1.5, 1.5, 61)[:, None] + rng.uniform(0, 0.05)
        place = np.array([1, 1]) + pace * way + aside
        inside = np.linalg.norm(place - [1, 1], axis=1) <= doctor.GOAL_RADIUS
        stop = int(inside.argmax()) + 2 if ends else len(place)
        place, inside = place[:stop], inside[:stop]
        goal = np.ones_like(place) if observed else np.empty((len(place), 0))
        states = np.concatenate([place, goal, np.tile(way, (len(place), 1))], 1)
        episodes.append((states, inside[:-1] if late else inside[1:]))
    spec = gym.envs.registration.EnvSpec("PointMaze_Own-v0", entry_point="none:None")
    spec.kwargs = {"maze_map": cells}
    box = gym.spaces.Box(-np.inf, np.inf, (2,))
    names = ("achieved_goal", "desired_goal", "observation")
    space = gym.spaces.Dict({name: box for name in names}) if observed else box
    rewards = np.concatenate([rewards for _, rewards in episodes]).astype(np.float32)
    starts = np.cumsum([0, *(len(rewards) for _, rewards in episodes)])
    states = np.concatenate([states for states, _ in episodes]).astype(np.float32)
    flags = np.zeros((2, len(rewards)), bool)
    metadata = {"env_spec": spec.to_json(), "observation_space": space}
    actions = np.zeros((len(rewards), 2), np.float32)
    numbers = np.arange(len(episodes))
    return doctor.Data("maze", metadata, states, actions, rewards, *flags, starts, numbers, [], [])


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_late_rewards_of_a_maze(late, observed):
    findings = list(doctor.check_reward_shift(maze_data(late, observed=observed)))
    assert [finding.title for finding in findings] == ["rewards one step late"] * late
    if late:
        assert "120 switches" in findings[0].detail and "episode 0" in findings[0].detail


def test_late_rewards_beside_unknown_observations():
    data = maze_data(late=True)
    data.obs[data.before[data.last] + 1] = np.nan
    data.rewards[data.last[:9]] = 1  # whose places are unknown
    (finding,) = doctor.check_reward_shift(data)
    assert "at 120 switches" in finding.detail


def test_maze_without_places():
    data = maze_data(late=True, observed=True)
    data.obs = data.obs[:, :3]
    assert list(doctor.check_reward_shift(data)) == []


def test_maze_that_ends_at_its_goal():
    """Entries alone fit a smaller circle as well: nothing can be told unless the goal is seen."""
    assert list(doctor.check_reward_shift(maze_data(late=True, ends=True))) == []
    assert list(doctor.check_reward_shift(maze_data(late=False, ends=True, observed=True))) == []
    assert len(list(doctor.check_reward_shift(maze_data(late=True, ends=True, observed=True)))) == 1


def test_maze_whose_rewards_are_not_sparse_or_not_of_the_goal():
    dense, elsewhere = maze_data(late=True), maze_data(late=True)
    dense.rewards = dense.rewards * 0.5
    elsewhere.obs = elsewhere.obs - 3
    assert list(doctor.check_reward_shift(dense)) == []
    assert list(doctor.check_reward_shift(elsewhere)) == []


def test_all_rewards_zero(patient):
    patient.everywhere("rewards", lambda rewards: rewards * 0)
    patient.describe(ref_min_score=0.0, ref_max_score=1.0)
    assert "960 steps, from episode 0" in patient.only("all rewards are zero")


def test_terminal_reward_unlike_the_rest(patient):
    ends = [patient.get(i, "terminations") for i in range(EPISODES)]
    for episode, flags in enumerate(ends):
        truncated = np.zeros(STEPS, bool)
        flags[-1] = True  # 24 terminals, of which one has no success
        reward = flags * np.float32(episode != 8)
        patient.set(episode, rewards=reward, terminations=flags, truncations=truncated)
    patient.describe(ref_min_score=0.0, ref_max_score=1.0)
    detail = patient.only("terminal rewards unlike the rest")
    assert "first in episode 8 at step 39 terminate with 0, the other 23 with 1" in detail


def test_equal_returns_are_a_note(patient):
    rewards = np.where(np.arange(STEPS) % 2, -1, -2).astype(np.float32)
    patient.everywhere("rewards", lambda _: rewards)
    assert patient.findings() == []
    assert "same return" in patient.notes()


# ---- observations and actions


def test_constant_observation(patient):
    patient.everywhere("observations", lambda states: states * np.float32([1, 1, 0]) + 0.5)
    assert "1 dimension, first dimension 2, always 0.5" in patient.only("constant observations")


def test_all_zero_observation(patient):
    patient.edit(7, "observations", slice(None), patient.get(7, "observations") * 1e-3)
    patient.edit(7, "observations", [3, 4], 0)
    assert "2 observations, first in episode 7" in patient.only("all-zero observations")


def test_actions_outside_of_their_space(patient):
    patient.edit(5, "actions", [8, 9], 2.5)
    patient.edit(6, "actions", 0, 2 + 5e-6)  # rounding is no fault
    detail = patient.only("actions outside of the action space")
    assert "2 steps in 1 episode, first in episode 5 at step 8, by up to 0.5" in detail


def test_constant_actions(patient):
    patient.everywhere("actions", lambda actions: actions * 0 + 0.25)
    assert "first dimension 0, always 0.25" in patient.only("constant actions")


def test_saturated_actions_are_a_note(patient):
    patient.everywhere("actions", np.sign)
    patient.everywhere("actions", lambda actions: 2 * actions)
    assert patient.findings() == []
    assert "100.0% of the action components are at a bound of their space" in patient.notes()


def test_duplicated_episode(patient):
    for key in ("observations", "actions", "rewards", "terminations", "truncations"):
        patient.set(16, **{key: patient.get(2, key)})
    assert "1 episode occurred before, first episode 16" in patient.only("duplicated episodes")
    assert "40 steps, 1 whole episode" in doctor.page(patient.load())


# ---- what the metadata say


@pytest.mark.parametrize(
    ("name", "mean", "wrong"),
    [
        ("D4RL/hopper/medium-v1", 95, True),
        ("D4RL/hopper/medium-v2", 45, False),
        ("D4RL/hopper/expert-v1", 45, True),
        ("D4RL/walker2d/expert-v2", 107, False),
        ("D4RL/halfcheetah/random-v2", 40, True),
        ("D4RL/hopper/medium-replay-v2", 15, False),
        ("D4RL/hopper/medium-expert-v2", 15, True),
        ("D4RL/door/expert-v1", 20, False),  # the bands are locomotion's
    ],
)
def test_swapped_tiers(patient, name, mean, wrong):
    returns = [patient.get(i, "rewards").sum() for i in range(EPISODES)]
    low = float(np.mean(returns)) - mean
    patient.describe(dataset_id=name, ref_min_score=low, ref_max_score=low + 100)
    if wrong:
        detail = patient.only("the name does not fit the returns")
        assert f"the mean score is {mean}.0" in detail
    else:
        assert patient.findings() == []


def test_no_references_are_a_note(patient):
    patient.describe(ref_min_score=None, ref_max_score=None)
    assert patient.findings() == [] and "no scores" in patient.notes()


@pytest.mark.parametrize(
    "references",
    [
        {"ref_min_score": None},
        {"ref_max_score": None},
        {"ref_min_score": -20.0},  # equal to the other
        {"ref_min_score": 5.0},  # above it
        {"ref_min_score": "-160"},
        {"ref_max_score": [1, 2]},
        {"ref_max_score": True},
        {"ref_max_score": float("nan")},
        {"ref_max_score": 10**400},
    ],
)
def test_references_that_give_no_score(patient, references):
    patient.describe(**references)
    (value,) = references.values()
    assert str(value)[:300] in patient.only("references that give no score")


@pytest.mark.parametrize("references", [(-30.0, -20.0), (-1000.0, -990.0)])
def test_references_that_do_not_fit(patient, references):
    patient.describe(ref_min_score=references[0], ref_max_score=references[1])
    assert "mean score" in patient.only("references do not fit the returns")


def test_no_environment(patient):
    patient.describe(env_spec=None)
    assert "names no environment" in patient.only("no environment to evaluate in")


def test_environment_that_cannot_be_read(patient):
    patient.describe(env_spec="{}")
    assert "does not start" in patient.only("no environment to evaluate in")


def test_environment_that_does_not_build(patient):
    spec = gym.envs.registration.EnvSpec("Lost-v0", entry_point="no_such_package:Env")
    patient.describe(env_spec=spec.to_json())
    detail = patient.only("no environment to evaluate in")
    assert "does not start" in detail and "Lost" in detail and "no_such_package" not in detail


def test_environment_of_another_size(patient):
    patient.describe(env_spec=gym.spec("MountainCarContinuous-v0").to_json())
    assert "has (2, 1)" in patient.only("the environment is another one")


def test_environment_that_differs_is_a_note(patient):
    patient.describe(environment_differs="it has wind", env_spec=TOY_ENV.to_json())
    assert patient.findings() == []
    assert "environment differs: it has wind" in doctor.page(patient.load())


@pytest.mark.usefixtures("blank")
def test_environment_of_ones_own_module(patient, monkeypatch):
    text = "import gymnasium as gym\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
    Path("doctors_env.py").write_text(f"{text}gym.register('Doctors-v0', PendulumEnv)\n")
    monkeypatch.syspath_prepend(Path.cwd())
    patient.describe(env_spec=None)
    folder = str(patient.folder)
    assert [doctor.main([folder, "--env_id", name]) for name in ("auto", "none")] == [1, 0]
    assert doctor.main([folder, "--env_id", "doctors_env:Doctors-v0"]) == 0
    notes = list(doctor.notes(doctor.load(folder, "doctors_env:Doctors-v0")))
    assert any("Doctors-v0 has no time limit: 40 steps" in note for note in notes)


ODD = [-1, True, 1e308, float("nan"), 10**400, "", "os:system", "{", "null", "\ud800", "\x1b[31m\n"]
ODD += [[], [1, "a"], {"a": 1}, '{"id": 5}', '{"id": "Maze", "kwargs": []}', "[" * 900 + "]" * 900]
ODD += ['{"id": "Maze", "kwargs": {"maze_map": [[["g"]]]}}']


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_metadata_of_any_content(value, capsys, tmp_path):
    """A page, or one line."""
    rng = np.random.default_rng(0)
    rewards = (rng.integers(0, 2, 9).astype(np.float32) for _ in range(3))
    episodes = [toy_episode(rng, 9, True, rewards=each) for each in rewards]
    patient = Patient(write_dataset(tmp_path / "store", "toy/odd-v0", episodes))
    path = patient.folder / "metadata.json"
    metadata = {**json.loads(path.read_text()), "source": "s", "environment_differs": "e"}
    for key in metadata:
        path.write_text(json.dumps({**metadata, key: value}))
        code = doctor.main([str(patient.folder)])
        out, err = capsys.readouterr()
        assert err.count("\n") == (code == 2) and err[:7] == "error: "[: 7 * (code == 2)]
        assert all(char.isprintable() or char == "\n" for char in out + err)
    path.write_text(json.dumps(value))
    assert doctor.main([str(patient.folder)]) == 2


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("name", ["../../up-v0", "x" * 300, "-", "价值-v0"])
def test_name_of_any_content(patient, name, cache):
    patient.describe(dataset_id=name)
    assert doctor.main([str(patient.folder)]) == 0
    (picture,) = cache.iterdir()
    assert picture.name[0] != "-" and not list(Path().iterdir())


def test_name_that_fonts_and_formulas_lack(patient, capsys):
    patient.describe(dataset_id="价$b^{$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctor.main([str(patient.folder)]) == 0
    assert capsys.readouterr().err == ""


# ---- the training scripts say the same


def reshape(key: str, *shape: int):
    return lambda patient: patient.everywhere(key, lambda values: values.reshape(*shape))


def put(episode: int, key: str, rows, value):
    """Set a value in a wide enough type."""

    def harm(patient):
        values = patient.get(episode, key).astype(np.float64)
        values[rows] = value
        patient.set(episode, **{key: values})

    return harm


def forget(key: str, **changes):
    """Describe another set, without one of its arrays."""

    def harm(patient):
        patient.describe(**changes)
        if key:
            with h5py.File(patient.folder / "main_data.hdf5", "r+") as file:
                del file["episode_7"][key]

    return harm


def about(**changes):
    return forget("", **changes)


def hold(patient):
    patient.everywhere("observations", lambda states: states * np.float32([1, 1, 0]))


def lose_ends(patient):
    for key in ("terminations", "truncations"):
        patient.everywhere(key, np.zeros_like)


def empty(patient):
    for key in ("actions", "rewards", "terminations", "truncations"):
        patient.set(3, **{key: patient.get(3, key)[:0]})


BOX, WIDE = gym.spaces.Box, np.inf
ANOTHER = gym.spec("MountainCarContinuous-v0").to_json()
VERDICTS = {  # what is changed, the exit code of a training script, the doctor's
    "nothing": (about(), 0, 0),
    "no references": (about(ref_min_score=None, ref_max_score=None), 0, 0),
    "unknown last observation": (put(3, "observations", -1, np.nan), 0, 0),
    "recording that stopped": (put(EPISODES - 1, "truncations", -1, 0), 0, 0),
    "columns": (reshape("rewards", -1, 1), 0, 0),
    "deep columns": (reshape("terminations", -1, 1, 1), 0, 0),
    "observations of another rank": (reshape("observations", -1, 3, 1), 0, 0),
    "float64": (lambda patient: patient.everywhere("actions", np.float64), 0, 0),
    "action at its bound, rounded": (put(3, "actions", 5, 2 + 1e-5), 0, 0),
    "constant observation": (hold, 0, 1),
    "both ends": (put(2, "truncations", -1, 1), 0, 1),
    "no ends": (lose_ends, 0, 1),
    "equal references": (about(ref_min_score=-20.0), 0, 1),
    "half an end": (put(3, "truncations", -1, 0.5), 2, 1),
    "unknown terminal observation": (put(2, "observations", -1, np.nan), 2, 1),
    "unknown observation inside": (put(3, "observations", 5, np.nan), 2, 1),
    "partly unknown observation": (put(3, "observations", np.s_[-1, 1], np.nan), 2, 1),
    "infinite action": (put(3, "actions", 5, np.inf), 2, 1),
    "unknown reward": (put(3, "rewards", 5, np.nan), 2, 1),
    "unknown flag": (put(3, "truncations", -1, np.nan), 2, 1),
    "more than float32 holds": (put(3, "observations", 5, 1e39), 2, 1),
    "almost more": (put(3, "observations", 5, 3.2e38), 2, 1),
    "large rewards": (put(3, "rewards", 5, 1e20), 2, 1),
    "action outside": (put(3, "actions", 5, 2.1), 2, 1),
    "end inside": (put(3, "terminations", 5, 1), 2, 1),
    "half an end inside": (put(3, "terminations", 5, 0.5), 2, 1),
    "empty episode": (empty, 2, 1),
    "short array": (lambda patient: patient.set(3, rewards=np.zeros(STEPS - 1)), 2, 1),
    "long array": (lambda patient: patient.set(3, truncations=np.zeros(STEPS + 1)), 2, 1),
    "wide array": (lambda patient: patient.set(3, rewards=np.zeros((STEPS, 2))), 2, 1),
    "wide space": (about(observation_space=serialize_space(BOX(-WIDE, WIDE, (4,)))), 2, 2),
    "actions without bounds": (about(action_space=serialize_space(BOX(-WIDE, WIDE, (1,)))), 2, 1),
    "discrete actions": (about(action_space=serialize_space(gym.spaces.Discrete(5))), 2, 1),
    "several discrete actions": (
        about(action_space=serialize_space(gym.spaces.MultiDiscrete([5]))),
        2,
        1,
    ),
    "images": (about(observation_space=serialize_space(BOX(0, 255, (3, 1), np.uint8))), 2, 2),
    "no environment": (about(env_spec=None), 2, 1),
    "another environment": (about(env_spec=ANOTHER), 2, 1),
    "unregistered environment": (about(env_spec='{"id": "Lost-v0"}'), 2, 1),
    "no spaces": (about(observation_space=None), 2, 2),
    "no episodes": (about(total_episodes=0), 2, 2),
    "too many episodes": (about(total_episodes=EPISODES + 1), 2, 2),
    "missing array": (forget("rewards"), 2, 2),
    "text": (lambda patient: patient.set(3, rewards=["a"] * STEPS), 2, 2),
    "no HDF5": (break_file, 2, 2),
    "no JSON": (break_metadata, 2, 2),
    "no folder": (lambda patient: shutil.rmtree(patient.folder), 2, 2),
}


@pytest.mark.parametrize("harm, training, examination", VERDICTS.values(), ids=VERDICTS)
def test_verdicts_of_trainer_and_doctor(patient, harm, training, examination):
    """What the trainer refuses the doctor finds; what the doctor calls fine the trainer takes."""
    harm(patient)
    folder, short = str(patient.folder), {"num_updates": 1, "final_eval_episodes": 0}
    settings = {**short, "eval_episodes": 0, "eval_every": 1, "log_every": 1, "checkpoint_every": 1}
    assert load_script("bc").main(words(dataset_id=folder, **settings)) == training
    try:
        assert bool(patient.findings()) == examination
    except doctor.DoctorError:
        assert examination == 2


@pytest.mark.parametrize(
    ("case", "title", "part"),
    [
        ("large rewards", "rewards too large", "1e+20"),
        ("actions without bounds", "actions without bounds", "Box(-inf, inf, (1,), float32)"),
        ("discrete actions", "actions outside of the action space", "Discrete(5)"),
        ("several discrete actions", "actions that no script takes", "MultiDiscrete([5])"),
        ("almost more", "NaN or infinite values", "first episode 3"),
    ],
)
def test_refusals_are_told_by_their_own_name(patient, case, title, part):
    VERDICTS[case][0](patient)
    details = {finding.title: finding.detail for finding in patient.findings()}
    assert part in details[title]


def test_what_the_trainer_alone_refuses_is_found(patient, monkeypatch):
    frame = doctor.trainer()
    refuse = lambda _, __, where: frame.check(False, f"{where} is not to my taste")  # noqa: E731
    monkeypatch.setattr(frame, "read_episode", refuse)
    assert patient.only("the training scripts refuse it") == "episode 0 is not to my taste"


# ---- what it stands on


def test_hashes_tell_rows_apart():
    rows = np.random.default_rng(0).integers(0, 9, (2000, 4)).astype(np.float32)
    ours = len(np.unique(doctor.hash_rows(rows)))
    assert ours == len(np.unique(rows, axis=0)) < len(rows)
    assert len(np.unique(doctor.hash_rows(np.float32([[0, 1], [1, 0], [0, 0]])))) == 3


def test_long_tables_are_summarised():
    data = maze_data(late=False)
    data.obs = np.random.default_rng(0).normal(size=(len(data.obs), 60)).astype(np.float32)
    lines = list(doctor.table(data))
    assert len(lines) <= 1 + sum(doctor.ROWS.values())
    assert any(line.startswith("observations 13 to 59: between") for line in lines)


# ---- numbered actions and images


ACTIONS = 3


def frame_episode(rng, steps: int, terminated: bool) -> EpisodeBuffer:
    """A dot that drifts over a picture of 84 x 84, grey; rewards now and then."""
    frames, places = np.zeros((steps + 1, 84, 84), np.uint8), rng.integers(5, 79, 2)
    for frame in frames:
        places = (places + rng.integers(-1, 2, 2)).clip(0, 83)
        frame[tuple(places)], frame[3] = rng.integers(50, 256), 100
    arrays = {"observations": frames, "actions": rng.integers(0, ACTIONS, steps)}
    arrays["rewards"] = rng.choice(np.float32([-1, 0, 0, 0, 1]), steps)
    return toy_episode(rng, steps, terminated, **arrays)


def write_frames(folder: Path, episodes: list, space: gym.Space | None = None) -> Patient:
    """A set of images and numbered actions; it is not said of which environment."""
    space = space or BOX(0, 255, (84, 84), np.uint8)
    spaces = {"observation_space": space, "action_space": gym.spaces.Discrete(ACTIONS)}
    folder.mkdir()
    storage = MinariStorage.new(folder / "data", **spaces, env_spec=None, jpeg_encoding=False)
    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    arrays = ({key: getattr(episode, key) for key in keys} for episode in episodes)
    tool = doctor.converter()
    tool.write_episodes(folder / "data", arrays, tool.Progress("toy", "steps"), 0, gzip=1)
    about = {"dataset_id": "toy/frames-v0", "total_episodes": len(episodes)}
    about |= {"ref_min_score": 0.0, "ref_max_score": 1.0}  # returns of -10 are -1,000 of these
    storage.update_metadata({**about, "total_steps": sum(len(e.rewards) for e in episodes)})
    patient = Patient(folder / "data")
    patient.env_id = "none"
    return patient


@pytest.fixture
def frames(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [frame_episode(rng, STEPS, terminated=i % 2 == 0) for i in range(6)]
    for episode in episodes[::2]:
        episode.observations[-1] = 0  # what followed a terminal, of the replay logs
    return write_frames(tmp_path / "frames", episodes)


def test_images_with_numbered_actions_are_fine(frames):
    """Blank frames after a terminal, returns beyond the references: neither is a fault."""
    data = frames.load()
    assert doctor.diagnose(data) == []
    assert data.obs.shape == (6 * (STEPS + 1), 1) and data.obs.max() < 1
    page, shares = doctor.page(data), [f"{share:.1%}" for share in np.bincount(
        data.actions[:, 0].astype(int)) / len(data.actions)]  # fmt: skip
    assert "brightness 0" in page and "action shares " + " ".join(shares) in page
    assert "3 frames of zeros" in frames.notes()
    assert "seen before  0 steps, 0 whole episodes" in page


def test_images_are_for_numbered_actions(tmp_path):
    """As all scripts of other actions see it."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (STEPS + 1, 9, 9)).astype(np.uint8)
    episodes = [toy_episode(rng, STEPS, True, observations=frames + np.uint8(i)) for i in range(6)]
    about = {"observation_space": BOX(0, 255, (9, 9), np.uint8), "action_space": BOX(-2, 2, (1,))}
    options = {**about, "env": None, "ref_min_score": None, "ref_max_score": None}
    folder = write_dataset(tmp_path, "own/images-v0", episodes, **options)
    found = [finding.detail for finding in doctor.diagnose(doctor.load(str(folder), "none"))]
    assert found == ["scripts of continuous actions take no images"]
    settings = {"dataset_id": folder, "env_id": "none", "num_updates": 1}
    assert load_script("bc").main(words(**settings)) == 2


def test_a_set_without_a_known_step(tmp_path):
    """Each step a time limit, and nothing says what it led to."""
    rng, episodes = np.random.default_rng(0), []
    for _ in range(30):
        obs = np.float32([rng.normal(size=3), [np.nan] * 3])
        episodes.append(toy_episode(rng, 1, False, observations=obs))
    options = {"env": None, "ref_min_score": None, "ref_max_score": None}
    options |= {"observation_space": BOX(-np.inf, np.inf, (3,)), "action_space": BOX(-2, 2, (1,))}
    folder = write_dataset(tmp_path, "own/steps-v0", episodes, **options)
    found = doctor.diagnose(doctor.load(str(folder), "none"))
    assert any("what it led to" in finding.detail for finding in found)
    settings = {"dataset_id": folder, "env_id": "none", "num_updates": 1}
    assert load_script("iql").main(words(**settings)) == 2


@pytest.mark.parametrize("env_id, title", [("CartPole-v1", None), ("Acrobot-v1", "another one")])
def test_numbered_actions_are_tried_in_their_environment(tmp_path, env_id, title):
    """By the trainer of such actions."""
    folder = write_dataset(tmp_path, "own/numbers-v0", discrete_episodes(), env=TOY_DISCRETE_ENV)
    data = doctor.load(str(folder), env_id)
    found = [finding.title for finding in doctor.check_environment(data)]
    assert found == [] if title is None else title in found[0]


def test_the_package_ogbench_is_not_the_file_beside_the_doctor(tmp_path):
    """Run as a script it stands first on the path, and would hide the environments."""
    package = tmp_path / "packages" / "ogbench"
    package.mkdir(parents=True)
    place = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
    code = f"import gymnasium\ngymnasium.register('Bench-v0', '{place}', max_episode_steps=20)\n"
    (package / "__init__.py").write_text(code)
    spec = dataclasses.replace(TOY_DISCRETE_ENV, id="Bench-v0")
    folder = write_dataset(tmp_path, "own/bench-v0", discrete_episodes(), env=spec)
    argv = [sys.executable, doctor.__file__, str(folder), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert "no environment" not in done.stdout and "picture" in done.stdout, done.stderr


def test_images_of_bits_are_drawn(tmp_path, monkeypatch):
    """MinAtar's: [10, 10, C] of bool."""
    rng = np.random.default_rng(0)
    episodes = [toy_episode(rng, STEPS, True, observations=rng.random((STEPS + 1, 10, 10, 4)) < 0.1,
                            actions=rng.integers(0, 2, STEPS)) for _ in range(3)]  # fmt: skip
    patient = write_frames(tmp_path / "bits", episodes, BOX(0, 1, (10, 10, 4), bool))
    data = patient.load()
    assert doctor.diagnose(data) == []
    assert "actions that never occur: 2" in patient.notes()
    figures, close = [], doctor.plt.close
    monkeypatch.setattr(doctor.plt, "close", figures.append)
    doctor.draw(data, [], Path("bits.png"))
    titles = [axes.get_title() for axes in figures[0].axes]
    best = int(data.returns.argmax())
    assert "actions" in titles and "first frame of episode 0" in titles
    assert any(title.startswith(f"episode {best}, frame 20") for title in titles)
    shown = [axes.images[0].get_array() for axes in figures[0].axes if axes.images]
    expected = (episodes[0].observations[0] * np.arange(1, 5)).max(-1)
    assert len(shown) == 2 and (shown[0] == expected).all()
    close(figures[0])


def test_memory_does_not_grow_with_the_frames(tmp_path):
    rng = np.random.default_rng(0)
    patient = write_frames(tmp_path / "many", [frame_episode(rng, 200, True) for _ in range(12)])
    patient.load()  # what is imported and cached once
    tracemalloc.start()
    patient.load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * 200 * 84 * 84 < 12 * 200 * 84 * 84 / 3  # a few episodes' worth of twelve


@pytest.mark.parametrize("number", [-1, ACTIONS])
def test_actions_that_there_are_not(frames, number):
    frames.edit(3, "actions", 7, number)
    detail = frames.only("actions outside of the action space")
    assert "1 step in 1 episode, first in episode 3 at step 7" in detail and "Discrete(3)" in detail


@pytest.mark.parametrize(
    "change", [lambda x: x.astype(np.float32), lambda x: x[:, :80], lambda x: x[..., None]]
)
def test_images_of_another_kind(frames, change):
    frames.set(2, observations=change(frames.get(2, "observations")))
    assert "1 episode, first episode 2" in frames.only("images of another kind")


def test_images_that_are_one_too_few(frames):
    frames.set(2, observations=frames.get(2, "observations")[1:])
    assert "first episode 2" in frames.only("inconsistent lengths")


def test_images_that_never_change(frames):
    for episode in range(6):
        frames.edit(episode, "observations", np.s_[:], 9)
    titles = {finding.title for finding in frames.findings()}
    assert "constant observations" in titles


def test_last_image_repeated(frames):
    for episode in (1, 3, 5):  # the truncated ones
        frames.edit(episode, "observations", -1, frames.get(episode, "observations")[-2])
    assert "3 steps in 3 episodes" in frames.only("last observation repeated")


def test_episodes_of_numbered_actions_may_repeat_while_short(frames):
    for steps, findings in ((STEPS, ["duplicated episodes"]), (8, [])):
        for key in ("observations", "actions", "rewards", "terminations", "truncations"):
            last = frames.get(0, key)[-steps - (key == "observations") :]
            for episode in (0, 2):
                frames.set(episode, **{key: last})
        frames.describe(total_steps=None)
        assert [finding.title for finding in frames.findings()] == findings
