"""Examine an offline dataset before training on it: one page of text, one picture, its faults.

    python datasets/doctor.py D4RL/hopper/medium-v2 datasets/hopper/medium-v0
    python datasets/doctor.py my/own/set-v0 --env_id mymodule:Mine-v0 --out pictures

An ID is a dataset in Minari's store (MINARI_DATASETS_PATH) or a folder that holds one. The picture
is <name>-doctor.png in the folder of --out, or else in ~/.cache/stitch/doctor; the last line says
where. A fault found is told with where it first shows, what it does to training and its mend. Exit
code: 0 nothing wrong, 1 something wrong, 2 a dataset that cannot be examined.

Looked for are the faults that D4RL's issues report (numbers in the checks below), and what makes
training fail or a score mean nothing. `CHECKS` at the end of the checks is the list. The training
scripts' own functions find, flatten and judge: what they refuse is never called fine here.

Conventions: an episode of T steps has T + 1 observations, and T actions, rewards and flags. Step t
leads from observation t to observation t + 1; steps and episodes count from 0. What an episode that
did not terminate led to may be unknown: its last observation is NaN then. Dict observations are
joined in the sorted order of their keys. Of images (uint8 or bool, of two dimensions or more) only
the mean brightness and a number that tells them apart are kept, so memory stays small.
"""

import argparse
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import gymnasium as gym
import h5py
import matplotlib
import numpy as np
from minari.dataset.minari_storage import MinariStorage

matplotlib.use("Agg")
from matplotlib import pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
# A change is a jump from 10 times the 99th percentile of its dimension's changes on, if it crosses
# a fifth of the dimension's range as well. Real Hopper and door data stay below 5 times; D4RL's
# resets and teleports lie mostly above, and the range keeps sudden contacts out.
JUMP, JUMP_RANGE = 10, 0.2
RESET = 3  # enough of a change where the observation is also exactly the next episode's first
ENOUGH = 100  # steps that a distribution of changes needs
GOAL_RADIUS = 0.45  # metres, of gymnasium-robotics' mazes
# Mean scores of D4RL's locomotion sets, v2, with wide margins: random 0 to 3, medium 41 to 62,
# medium-replay 15 to 27, full-replay 40 to 60, medium-expert 64 to 83, expert 88 to 108.
TIERS = {
    "medium-replay": (-10, 60),
    "medium-expert": (40, 120),
    "full-replay": (10, 100),
    "random": (-20, 20),
    "simple": (-10, 75),
    "medium": (20, 75),
    "expert": (80, 150),
}
LOCOMOTION = re.compile("hopper|halfcheetah|walker2d", re.IGNORECASE)
ROWS = {"observation": 14, "action": 6}  # of the table of ranges, before it is summarised
MOST_ACTIONS = 20  # of which it tells the shares; Atari has 18


class DoctorError(Exception):
    """What is wrong and how to mend it, in one line."""


@dataclass(frozen=True)
class Finding:
    """A fault in plain words."""

    title: str
    detail: str  # how many, and where first
    effect: str  # on training or on scores
    mend: str


@dataclass
class Data:
    """N steps of E whole episodes, float32; what else the file holds is in `broken`.

    Of images, `obs` has the mean brightness [N + E, 1], from 0 to 1, and `frames` stands for them.
    """

    name: str
    metadata: dict  # Minari's, with its spaces; of any content otherwise
    obs: np.ndarray  # [N + E, obs_dim], NaN where it is unknown
    actions: np.ndarray  # [N, act_dim]
    rewards: np.ndarray  # [N]
    terminated: np.ndarray  # [N], bool
    truncated: np.ndarray  # [N], bool
    starts: np.ndarray  # [E + 1], the first step of every episode, then N
    numbers: np.ndarray  # [E], their numbers in the file
    broken: list  # (episode number, kind of problem, detail) of the episodes left out
    refused: list  # what the training scripts say of the others that they refuse
    env_id: str = "auto"  # the environment to evaluate in, as the training scripts take it
    frames: np.ndarray | None = None  # [N + E] of images: equal numbers are equal frames
    pictures: dict | None = None  # of images: some, by what they show

    @cached_property
    def actions_known(self) -> int | None:
        """How many actions there are, if they are numbered."""
        space = self.metadata.get("action_space")
        return int(space.n) if isinstance(space, gym.spaces.Discrete) else None

    @cached_property
    def looks(self) -> np.ndarray:
        """[N + E], a number for every observation; equal ones have equal numbers."""
        return hash_rows(self.obs) if self.frames is None else self.frames

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @cached_property
    def last(self) -> np.ndarray:
        """[E], every episode's last step."""
        return self.starts[1:] - 1

    @cached_property
    def episode_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def before(self) -> np.ndarray:
        """[N], the row of `obs` that a step starts from; it leads to the next row."""
        return np.arange(len(self.rewards)) + self.episode_of

    @cached_property
    def returns(self) -> np.ndarray:
        return np.add.reduceat(self.rewards.astype(np.float64), self.starts[:-1])

    @cached_property
    def known(self) -> np.ndarray:
        """The observations without the unknown ones."""
        return self.obs[~np.isnan(self.obs).any(1)]

    @cached_property
    def unknown(self) -> np.ndarray:
        """[E], whether it is unknown what an episode's last step led to."""
        return np.isnan(self.obs[self.before[self.last] + 1, 0])

    @cached_property
    def open_end(self) -> np.ndarray:
        """[E], whether an episode's last step has neither flag."""
        return ~(self.terminated | self.truncated)[self.last]

    @cached_property
    def scores(self) -> np.ndarray | None:
        """[E], 100 (return - ref_min) / (ref_max - ref_min); None without usable references."""
        low, high = (self.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
        numbers = all(type(x) in (int, float) and abs(x) < 1e300 for x in (low, high))
        return 100 * (self.returns - low) / (high - low) if numbers and low < high else None

    @cached_property
    def changes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every step: its largest change in units of its dimension's 99th percentile, that
        dimension, and whether it is a jump [N]. Dimensions that hardly ever change do not count."""
        sizes, worst = np.zeros(len(self.rewards)), np.zeros(len(self.rewards), int)
        jumps, inner = np.zeros(len(self.rewards), bool), np.ones(len(self.rewards), bool)
        inner[self.last] = False
        if self.frames is not None:
            return sizes, worst, jumps  # a picture may change as it likes
        for column in range(self.obs.shape[1] if inner.sum() >= ENOUGH else 0):
            values = self.obs[:, column]
            change = np.abs(np.diff(values))[self.before]
            typical = np.quantile(change[inner], 0.99)
            if typical > 0:
                low, high = np.quantile(self.known[:, column], [0.001, 0.999])
                ratio = change / typical  # NaN at an unknown end
                jumps |= (ratio > JUMP) & (change > JUMP_RANGE * (high - low))
                worst[ratio > sizes] = column
                sizes = np.fmax(sizes, ratio)
        return sizes, worst, jumps

    @cached_property
    def hashes(self) -> np.ndarray:
        """[N], a number for every (observation, action, reward, next observation)."""
        looks = self.looks
        columns = [looks[self.before], looks[self.before + 1], hash_rows(self.actions)]
        return hash_rows(np.stack([*columns, hash_rows(self.rewards[:, None])], 1))

    @cached_property
    def environment(self) -> dict:
        """The stored specification of the environment; {} where it cannot be read."""
        spec = None
        with suppress(TypeError, ValueError, RecursionError):
            spec = json.loads(self.metadata.get("env_spec"))
        return spec if isinstance(spec, dict) else {}

    @cached_property
    def trial(self) -> tuple[str, str]:
        """What the scripts print as they try the environment, and why they refuse it."""
        space, seen = self.metadata["action_space"], self.metadata["observation_space"]
        frame, told = trainer(space), io.StringIO()
        space, size = frame.as_box(space), gym.spaces.flatdim(seen)
        if not isinstance(space, gym.spaces.Box):
            return "", ""  # no script takes such actions
        low, high = space.low.ravel().astype(float), space.high.ravel().astype(float)
        if not bounded(space):
            low, high = self.actions.min(0), self.actions.max(0)
        units = {"obs_mean": np.zeros(size), "obs_std": np.ones(size)}
        units |= {"action_center": (low + high) / 2, "action_half_range": (high - low) / 2}
        units |= {"return_range": np.zeros(2), "frame_shape": np.array(seen.shape or [size])}
        cfg = frame.TrainConfig(env_id=self.env_id)
        agent = getattr(frame, "DiscreteAgent", frame.Agent)(cfg, units)
        metadata = {**self.metadata, "longest_episode": int(self.lengths.max())}
        metadata |= {"ref_min_score": None, "ref_max_score": None}  # another check's
        try:
            with redirect_stderr(io.StringIO()), redirect_stdout(told), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old versions of environments ask to be replaced
                frame.find_environment(cfg, metadata, agent)
        except frame.RunError as error:
            return told.getvalue(), plain(error)
        return told.getvalue(), ""

    def where(self, steps: np.ndarray) -> str:
        """Of step indices: how many, in how many episodes, and the first."""
        episodes = np.unique(self.episode_of[steps])
        step = steps[0] - self.starts[episodes[0]]
        text = f"{count(len(steps), 'step')} in {count(len(episodes), 'episode')}"
        return f"{text}, first in episode {self.numbers[episodes[0]]} at step {step}"


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """[N, size] numbers of 4 or 8 bytes -> [N], 64 bits each; equal rows have equal ones."""
    words = np.ascontiguousarray(rows).view(f"u{rows.itemsize}")
    result = np.zeros(len(rows), np.uint64)
    for column in words.T:
        result = (result ^ column) * np.uint64(0x9E3779B97F4A7C15)
        result ^= result >> np.uint64(32)
    return result


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def plain(value) -> str:
    """Any value on one line, without control characters: metadata may hold anything."""
    text = "".join(char if char.isprintable() else " " for char in str(value)[:1000])
    return " ".join(text.split())[:300]


# ---- reading


@functools.cache
def script(place: str):
    """A file of this repository as a module: what it does is done by it alone."""
    path = REPOSITORY / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # finds itself there
    spec.loader.exec_module(module)
    return module


def trainer(actions: gym.Space | None = None):
    """A training script, for what all of them do that take such actions."""
    numbered = isinstance(actions, gym.spaces.Discrete)
    return script(f"algorithms/{'dqn' if numbered else 'bc'}.py")


def converter():
    return script("datasets/d4rl.py")


def is_image(space: gym.Space) -> bool:
    box = isinstance(space, gym.spaces.Box)
    return box and space.dtype in (np.uint8, bool) and len(space.shape) > 1


def look_at(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of images [T + 1, ...]: their mean brightness [T + 1, 1], and a number for each [T + 1]."""
    flat = np.ascontiguousarray(frames).reshape(len(frames), -1)
    bright = flat.mean(1, dtype=np.float64)[:, None] / (255 if frames.dtype == np.uint8 else 1)
    digests = (hashlib.blake2b(row, digest_size=8).digest() for row in flat)
    return bright, np.frombuffer(b"".join(digests), np.uint64)


def read_episode(stored: dict, spaces: tuple) -> tuple[dict, tuple]:
    """Minari's episode as the scripts read it, in float32, or what keeps it from being examined.

    Returns ({obs [T + 1, obs_dim], action [T, act_dim], the rest [T]}, (kind of problem, detail)),
    one of them empty. Images have obs and frames as in `Data`.
    """
    frame, (obs_space, action_space), arrays = trainer(), spaces, {}
    steps, act_dim = len(stored["rewards"]), math.prod(action_space.shape)
    shapes = {"obs": (steps + 1, gym.spaces.flatdim(obs_space)), "action": (steps, act_dim)}
    if steps == 0:
        return {}, ("empty episodes", "no step")
    if images := is_image(obs_space):
        seen, shapes["obs"] = stored["observations"], (steps + 1, 1)
        if (seen.dtype, seen.shape[1:]) != (obs_space.dtype, obs_space.shape):
            detail = f"{seen.dtype} of shape {seen.shape} in place of {plain(obs_space)}"
            return {}, ("images of another kind", detail)
        bright, frames = look_at(seen)
    for name, key in frame.NAMES.items():
        values, shape = stored[key], shapes.get(name, (steps,))
        if name == "obs":
            values = bright if images else frame.flatten_obs(obs_space, values)
        values = np.asarray(values)
        if len(values) != shape[0] or values.size != math.prod(shape):
            detail = f"{key} of shape {values.shape} where {shape} belongs to its rewards"
            return {}, ("inconsistent lengths", detail)
        arrays[name] = values.reshape(shape)
    for name, values in arrays.items():
        unknown = name == "obs" and not arrays["terminated"][-1] and np.isnan(values[-1]).all()
        if not (np.abs(values[:-1] if unknown else values) < 3e38).all():  # float32's range
            return {}, ("NaN or infinite values", f"in its {frame.NAMES[name]}")
        if name in ("terminated", "truncated") and not np.isin(values, (0, 1)).all():
            detail = f"{frame.NAMES[name]} hold {values[~np.isin(values, (0, 1))][0]}"
            return {}, ("flags that are neither 0 nor 1", detail)
    arrays = {name: values.astype(np.float32) for name, values in arrays.items()}
    return {**arrays, "frames": frames} if images else arrays, ()


def load(dataset_id: str, env_id: str = "auto") -> Data:
    """Read a whole dataset. Raises DoctorError where there is nothing to examine."""
    frame, about = trainer(), ""
    try:
        folder = frame.find_dataset(frame.TrainConfig(dataset_id=dataset_id, download=False))
        about = f"dataset {dataset_id}: "
        return read(dataset_id, folder, env_id)
    except (DoctorError, frame.RunError, converter().D4RLError) as error:
        raise DoctorError(f"{about}{plain(error)}") from None
    except Exception as error:  # h5py, Minari and gymnasium each have errors of their own
        if isinstance(error.__context__, KeyboardInterrupt):  # which h5py turns into another
            raise KeyboardInterrupt from None
        reason = f"cannot be read ({type(error).__name__} {plain(error)})"
        raise DoctorError(f"dataset {dataset_id} {reason}: collect or convert it again") from None


def read(dataset_id: str, folder: Path, env_id: str) -> Data:
    """A dataset's folder, joined. Raises whatever its libraries raise."""
    if not {"observation_space", "action_space"} <= MinariStorage.read_raw_metadata(folder).keys():
        raise DoctorError("it lacks its spaces, and Minari would run its environment: add them")
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            converter().refuse_links(file)  # before anything is read
    storage = MinariStorage.read(folder)
    metadata, obs, action = storage.metadata, storage.observation_space, storage.action_space
    if action.shape is None or not gym.spaces.flatdim(obs) * math.prod(action.shape):
        raise DoctorError(f"no vectors: observations {obs}, actions {action}")
    episodes, broken, refused, pictures = read_episodes(storage, dataset_id)
    if not episodes:
        reason = f"episode {broken[0][0]}: {broken[0][2]}" if broken else "it is empty"
        raise DoctorError(f"it has no whole episode ({reason}): collect or convert it again")
    joined = {name: np.concatenate([each[name] for each in episodes]) for name in episodes[0]}
    arrays = [joined[name] for name in ("obs", "action", "reward")]
    arrays += [joined[name] > 0 for name in ("terminated", "truncated")]
    arrays += [np.cumsum([0, *joined["steps"]]), joined["number"]]
    if isinstance(action, gym.spaces.Box) and trainer().has_image(obs):
        refused.append("scripts of continuous actions take no images")
    if all(len(each["reward"]) == 1 and np.isnan(each["obs"][-1]).all() for each in episodes):
        refused.append("of no step is it known what it led to")
    name = plain(metadata.get("dataset_id") or dataset_id)
    return Data(name, metadata, *arrays, broken, refused, env_id, joined.get("frames"), pictures)


def read_episodes(storage: MinariStorage, dataset_id: str) -> tuple[list, list, list, dict]:
    """The whole episodes, and `broken`, `refused` and `pictures` of `Data`."""
    pictures, best = {}, -math.inf
    spaces, total = (storage.observation_space, storage.action_space), storage.total_episodes
    frame, spoken, episodes, broken, refused = trainer(), time.monotonic(), [], [], []
    for number, stored in enumerate(storage.get_episodes(range(total))):
        arrays, problem = read_episode(stored, spaces)
        if problem:
            broken.append((number, *problem))
        else:
            episodes.append({"number": [number], "steps": [len(arrays["reward"])], **arrays})
            if "frames" in arrays:
                seen, gain = stored["observations"], float(arrays["reward"].sum())
                pictures.setdefault(f"first frame of episode {number}", seen[0].copy())
                if gain > best:  # of the best episode, which shows what play can lead to
                    best, middle = gain, len(seen) // 2
                    shown = f"episode {number}, frame {middle} (return {gain:,.4g})"
                    pictures = dict([*pictures.items()][:1]) | {shown: seen[middle].copy()}
            try:
                if isinstance(spaces[1], gym.spaces.Box):
                    frame.read_episode(stored, storage, f"episode {number}")
            except frame.RunError as error:
                refused.append(str(error))
        if time.monotonic() - spoken > 10:
            spoken = time.monotonic()
            print(f"reading {dataset_id}: {number:,} of {total:,} episodes", file=sys.stderr)
    return episodes, broken, refused, pictures


# ---- the checks: each yields its findings


def check_broken(data: Data) -> Iterator[Finding]:
    """Episodes that had to be left out, and totals that contradict the file."""
    for kind in sorted({kind for _, kind, _ in data.broken}):
        found = [(number, detail) for number, its, detail in data.broken if its == kind]
        yield Finding(
            kind,
            f"{count(len(found), 'episode')}, first episode {found[0][0]}: {found[0][1]}; left out "
            "of everything else here",
            "training stops at them, or its losses become NaN",
            "drop these episodes, or collect or convert the set again",
        )
    steps, total = data.metadata.get("total_steps"), len(data.rewards)
    if not data.broken and steps is not None and steps != total:
        yield Finding(
            "inconsistent lengths",
            f"the metadata count {plain(steps)} steps, the file holds {total}",
            "the set is not the one that was described: something was added or is missing",
            "collect or convert it again",
        )


def check_jumps(data: Data) -> Iterator[Finding]:
    """Teleports inside episodes (antmaze-*-diverse-v0, D4RL#77), two recordings joined."""
    sizes, worst, jumps = data.changes
    jumps = jumps.copy()
    jumps[data.last] = False  # a timeout's are another fault; a terminal's are never bootstrapped
    if jumps.any():
        steps = np.flatnonzero(jumps)
        yield Finding(
            "jumps inside episodes",
            f"{data.where(steps)}: dimension {worst[steps[0]]} changes by {sizes[steps[0]]:,.0f} "
            "times what 99 percent of its steps change",
            "values are bootstrapped from states that the action does not lead to",
            "end an episode at every jump and drop the step that jumps",
        )


def check_timeouts(data: Data) -> Iterator[Finding]:
    """A truncated episode's last observation that is the next episode's first, or unknown."""
    (sizes, _, jumps), ends = data.changes, ~data.terminated[data.last]
    looks = data.looks
    final = looks[data.before[data.last] + 1]
    following = np.append(final[:-1] == looks[data.before[data.starts[1:-1]]], False)
    jumps = ends & (jumps[data.last] | (following & (sizes[data.last] > RESET)))
    if jumps.any():
        yield Finding(
            "jumps at timeouts",
            f"{data.where(data.last[jumps])}: a truncated episode's last step jumps, in "
            f"{(jumps & following).sum():,} cases to the next episode's first observation",
            "a timeout is bootstrapped, here from the state after a reset: values leak between "
            "episodes",
            "drop these last steps, or convert from a source that has next_observations",
        )
    still = final == looks[data.before[data.last]]
    # a robot at rest repeats itself anywhere, so the share elsewhere is what to compare with
    same = (looks[1:] == looks[:-1])[data.before]
    elsewhere = (same.sum() - still.sum()) / max(1, len(same) - len(still))
    if (still & ends).sum() > 10 * elsewhere * ends.sum():
        yield Finding(
            "last observation repeated",
            f"{data.where(data.last[still & ends])}: a truncated episode's last observation "
            "repeats the one before, so its true next observation is unknown",
            "a timeout is bootstrapped, here from a state that leads back to itself",
            "drop these last steps",
        )


def check_flags(data: Data) -> Iterator[Finding]:
    """Terminations and truncations (takuseno/d3rlpy#463)."""
    inner = np.ones(len(data.rewards), bool)
    inner[data.last] = False
    flagged = data.terminated | data.truncated
    if (both := data.terminated & data.truncated).any():
        yield Finding(
            "terminal and timeout at once",
            data.where(np.flatnonzero(both)),
            "loaders disagree: one bootstraps these steps, the other does not",
            "keep the termination, clear the truncation",
        )
    if (middle := flagged & inner).any():
        yield Finding(
            "flags in the middle of an episode",
            data.where(np.flatnonzero(middle)),
            "training stops at them; where it does not, a step joins two episodes of the recording",
            "end an episode at every flag",
        )
    if data.open_end[:-1].any() or data.open_end.all():  # a recording may stop in its last one
        yield Finding(
            "episodes that end with neither flag",
            data.where(data.last[data.open_end]),
            "loaders that cut at flags join them with the next episode",
            "set the truncation of their last step",
        )


def maze_goal(data: Data) -> tuple[np.ndarray, float] | None:
    """Where a maze has its one goal, x and y [2], and the size of a cell, in metres."""
    kwargs = data.environment.get("kwargs")
    cells = np.array(kwargs.get("maze_map") if isinstance(kwargs, dict) else None, dtype=object)
    goals = np.argwhere(cells == "g") if cells.ndim == 2 else []
    if len(goals) != 1:
        return None
    scale = 4.0 if "ant" in str(data.environment["id"]).lower() else 1.0
    (row, column), (rows, columns) = goals[0], cells.shape
    return scale * np.array([column + 0.5 - columns / 2, rows / 2 - row - 0.5]), scale


def fit_circle(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre [2] and radius of the circle nearest to points [M, 2], by linear least squares."""
    shift = points.mean(0)
    local = (points - shift).astype(np.float64)
    design = np.column_stack([2 * local, np.ones(len(local))])
    x, y, rest = np.linalg.lstsq(design, (local**2).sum(1), rcond=None)[0]
    return shift + np.array([x, y]), float(np.sqrt(max(0, rest + x * x + y * y)))


def check_reward_shift(data: Data) -> Iterator[Finding]:
    """Rewards of a maze that belong to the position one step earlier (maze2d, D4RL#194).

    Where a reward switches, the agent crosses the goal's edge: between its positions after the two
    steps, or before them if rewards are late. A circle through the crossings shows which; a goal
    that is observed is compared directly.
    """
    space, name = data.metadata["observation_space"], str(data.environment.get("id"))
    observed = isinstance(space, gym.spaces.Dict) and "desired_goal" in space.keys()
    wide = data.obs.shape[1] >= (4 if observed else 2)
    if "maze" not in name.lower() or not wide or set(np.unique(data.rewards)) != {0, 1}:
        return
    goal = None if observed else maze_goal(data)
    if not observed and goal is None:
        return
    steps = np.flatnonzero(np.diff(data.rewards) != 0) + 1
    inside = data.episode_of[steps] == data.episode_of[steps - 1]
    steps = steps[inside & ~np.isnan(data.obs[data.before[steps] + 1, 0])]
    rows = data.before[steps][:, None] + [-1, 0, 1]  # before the first, between, after the second
    places = data.obs[rows, :2]
    if observed:  # sorted keys: achieved goal, then desired goal
        goals = data.obs[rows, 2:4]
        kept = (goals == goals[:, :1]).all((1, 2))  # the others switched because the goal moved
        steps, places = steps[kept], (places - goals)[kept]
    if len(steps) < 20:
        return
    errors, labels = [], data.rewards[steps[:, None] - [1, 0]] == 1
    for pair in (places[:, :2], places[:, 1:]):
        centre, radius = (0, GOAL_RADIUS) if observed else fit_circle(pair.mean(1))
        if not observed and np.abs(centre - goal[0]).max() > goal[1]:
            return  # these rewards belong to something else
        errors.append(((np.linalg.norm(pair - centre, axis=-1) <= radius) != labels).mean())
    early, late = errors
    if late > 0.1 and early < late / 3:
        yield Finding(
            "rewards one step late",
            f"at {len(steps):,} switches of the reward, distance to the goal "
            f"before the step misses {early:.1%} of the rewards, after it {late:.1%}; first in "
            f"episode {data.numbers[data.episode_of[steps[0]]]}",
            "the reward is credited to the action after the one that reached the goal",
            "move every reward one step back inside its episode and drop the last step",
        )


def check_observations(data: Data) -> Iterator[Finding]:
    """Dimensions that never change, rows of zeros (maze2d, D4RL#65); images that never do."""
    if data.frames is not None and len(np.unique(data.frames)) > 1:
        return  # most images have corners that never change
    constant = np.flatnonzero(data.known.min(0) == data.known.max(0))
    if len(constant):
        yield Finding(
            "constant observations",
            f"{count(len(constant), 'dimension')}, first dimension {constant[0]}, always "
            f"{data.obs[0, constant[0]]:.6g} (from episode {data.numbers[0]} on)",
            "they say nothing; normalised by their deviation of 0, a small change while acting "
            "becomes a huge input",
            "leave them out, or make sure that the environment keeps them as constant",
        )
    zero = ~data.obs.any(1)
    if data.obs.shape[1] > 1 and zero.any():
        episode = int(np.searchsorted(data.before[data.starts[:-1]], zero.argmax(), "right")) - 1
        yield Finding(
            "all-zero observations",
            f"{count(int(zero.sum()), 'observation')}, first in episode {data.numbers[episode]}",
            "a state that was never recorded: values there are noise that bootstrapping spreads",
            "drop the steps that start or end there",
        )


def beyond_bounds(space: gym.Space, actions: np.ndarray) -> np.ndarray:
    """How far actions [N, act_dim] lie outside of their space, or off its whole numbers."""
    if isinstance(space, gym.spaces.Discrete):
        outside = np.maximum(space.start - actions, actions - (space.start + space.n - 1))
        return np.maximum(outside, np.abs(actions - np.rint(actions)))
    if isinstance(space, gym.spaces.Box):
        return np.maximum(space.low.ravel() - actions, actions - space.high.ravel())
    return np.zeros_like(actions)


def bounded(space: gym.spaces.Box) -> bool:
    """Whether a policy's unit actions can be those of the space, as the scripts judge it."""
    return bool((np.abs([space.low, space.high], dtype=float) < 1e9).all())


def check_actions(data: Data) -> Iterator[Finding]:
    """Actions of another space than the scripts take, outside of it, or that never change."""
    space, refused = data.metadata["action_space"], "the training scripts refuse them"
    if not isinstance(space, (gym.spaces.Box, gym.spaces.Discrete)):
        detail, mend = f"they are of {plain(space)}", "collect them in a Box or a Discrete"
        yield Finding("actions that no script takes", detail, refused, mend)
    elif not data.actions_known and not bounded(space):
        mend = "train with --action_bounds data (smallest and largest), or store the true bounds"
        yield Finding("actions without bounds", f"they are of {plain(space)}", refused, mend)
    excess = beyond_bounds(space, data.actions)
    outside = np.flatnonzero((excess > 1e-5 * np.maximum(1, np.abs(data.actions))).any(1))
    if len(outside):
        effect = "a policy that is bounded cannot imitate them, and tanh likelihoods become NaN"
        yield Finding(
            "actions outside of the action space",
            f"{data.where(outside)}, by up to {excess.max():.3g}; the space is {plain(space)}",
            f"{refused}: they name no action" if data.actions_known else effect,
            "clip them, if the environment clipped them too",
        )
    constant = np.flatnonzero(data.actions.min(0) == data.actions.max(0))
    if len(constant):
        yield Finding(
            "constant actions",
            f"{count(len(constant), 'dimension')}, first dimension {constant[0]}, always "
            f"{data.actions[0, constant[0]]:.6g} (from episode {data.numbers[0]} on)",
            "nothing shows what any other action does there",
            "make sure that the actions were recorded; collect again",
        )


def tier_of(data: Data) -> str | None:
    """The tier that a locomotion set's name claims."""
    word = data.name.rpartition("-v")[0].rpartition("/")[2]
    found = (tier for tier in TIERS if re.search(rf"\b{tier}\b", word))
    return next(found, None) if LOCOMOTION.search(data.name) else None


def check_tier(data: Data) -> Iterator[Finding]:
    """A name that does not fit the returns (hopper-medium-v1 and -expert-v1 swapped, D4RL#76)."""
    tier = tier_of(data)
    if tier and data.scores is not None:
        (low, high), mean = TIERS[tier], data.scores.mean()
        if not low <= mean <= high:
            yield Finding(
                "the name does not fit the returns",
                f"the mean score is {mean:.1f}, but that of a set called {tier} is between {low} "
                f"and {high} (from episode {data.numbers[0]} on)",
                "results are compared with those on other data",
                "look for a swapped file or wrong references before you report any score",
            )


def check_references(data: Data) -> Iterator[Finding]:
    """Reference returns that give no score or are unlike the data (Minari#323)."""
    low, high = (data.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    mend = "set ref_min_score and ref_max_score: returns of a random and of an expert policy"
    if low is None and high is None:
        return  # a note
    if data.scores is None:
        detail = f"ref_min_score is {plain(low)}, ref_max_score {plain(high)}"
        effect = "scores are missing, upside down, infinite or NaN, or the evaluation fails"
        yield Finding("references that give no score", detail, effect, mend)
    elif data.actions_known:
        return  # a game's scores have no end: a DQN may be worth a hundred of the references
    elif data.scores.mean() < -50 or data.scores.max() > 250:
        best = data.scores.argmax()
        yield Finding(
            "references do not fit the returns",
            f"the mean score is {data.scores.mean():.1f}, the best {data.scores[best]:.1f} in "
            f"episode {data.numbers[best]}",
            "the references belong to another environment or time limit: scores compare to nothing",
            mend,
        )


def check_environment(data: Data) -> Iterator[Finding]:
    """An environment to evaluate in that is missing, does not build or has other sizes."""
    told, refusal = data.trial
    if refusal:
        other = "observations and actions" in refusal
        yield Finding(
            "the environment is another one" if other else "no environment to evaluate in",
            refusal,
            "policies can be trained (--env_id none) but not evaluated",
            "give the set an env_spec, or scripts and doctor an --env_id (yours: module:Id-v0)",
        )
    if "WARNING: actions" in told:
        detail = plain(told.partition("WARNING: ")[2].partition("WARNING: ")[0])
        effect = "policies play other actions than the data shows"
        yield Finding("the environment takes other actions", detail, effect, "store them as played")


def check_rewards(data: Data) -> Iterator[Finding]:
    """All zero (OfflineRL-Kit#14), terminal ones unlike the rest (D4RL#199), too large to train."""
    frame, rewards = trainer(), np.split(data.rewards, data.starts[1:-1])
    episodes = [{"obs": data.obs[:2], "reward": each} for each in rewards]  # obs: any
    try:
        with redirect_stdout(io.StringIO()):
            frame.measure(episodes, gym.spaces.Box(-1, 1), frame.TrainConfig())
    except frame.RunError as error:
        refused, mend = "the training scripts refuse them", "train with a small reward_scale"
        yield Finding("rewards too large", plain(error), refused, mend)
    if not data.rewards.any():
        yield Finding(
            "all rewards are zero",
            f"{count(len(data.rewards), 'step')}, from episode {data.numbers[0]} on",
            "there is nothing to learn but to imitate",
            "look at what the loader or converter did to the rewards; convert again",
        )
    ends = np.flatnonzero(data.terminated)
    values, counts = np.unique(data.rewards[ends], return_counts=True)
    rest = np.unique(data.rewards[~data.terminated])
    # where there are rewards on the way, too, a terminal has its own, or one by chance
    if len(rest) <= 1 and len(values) > 1 and counts.max() >= 0.95 * len(ends):
        unlike = ends[data.rewards[ends] != values[counts.argmax()]]
        yield Finding(
            "terminal rewards unlike the rest",
            f"{data.where(unlike)} terminate with {data.rewards[unlike[0]]:.6g}, the other "
            f"{counts.max():,} with {values[counts.argmax()]:.6g}",
            "a success counts as a failure or the reverse, in data with few successes",
            "set the reward that belongs there, or drop these episodes",
        )


def check_duplicates(data: Data) -> Iterator[Finding]:
    """Whole episodes that occur more than once, longer than what numbered actions may repeat.

    E random episodes of T steps from one start have E^2 / 2 pairs and n^T ways to go.
    """
    choices, by_chance = data.actions_known or 1, 0
    if choices > 1:
        by_chance = math.log(1000 * len(data.lengths) ** 2, choices)
    repeated = [each for each in duplicated_episodes(data) if data.lengths[each] > by_chance]
    if repeated:
        yield Finding(
            "duplicated episodes",
            f"{count(len(repeated), 'episode')} occurred before, first episode "
            f"{data.numbers[repeated[0]]}",
            "they weigh more than the rest, and a split of the set is no longer one",
            "keep one of each, unless the weight is meant",
        )


def duplicated_episodes(data: Data) -> list[int]:
    seen, repeated = set(), []
    for episode, (start, stop) in enumerate(zip(data.starts[:-1], data.starts[1:], strict=True)):
        content = data.hashes[start:stop].tobytes()
        repeated += [episode] if content in seen else []
        seen.add(content)
    return repeated


def diagnose(data: Data) -> list[Finding]:
    """All that is wrong; what the training scripts refuse is never fine."""
    findings = [finding for check in CHECKS for finding in check(data)]
    if data.refused and not findings:
        effect, mend = "training does not begin", "drop such episodes, or collect the set again"
        findings = [Finding("the training scripts refuse it", data.refused[0], effect, mend)]
    return findings


CHECKS = [check_broken, check_jumps, check_timeouts, check_flags, check_reward_shift]
CHECKS += [check_observations, check_actions, check_tier, check_references, check_environment]
CHECKS += [check_rewards, check_duplicates]


# ---- the page


def span(values: np.ndarray) -> str:
    return f"{values.min():,.6g} / {np.median(values):,.6g} / {values.max():,.6g}"


def notes(data: Data) -> Iterator[str]:
    """What is worth knowing but is no fault."""
    if differs := data.metadata.get("environment_differs"):
        yield f"environment differs: {plain(differs)}"
    if all(data.metadata.get(f"ref_{end}_score") is None for end in ("min", "max")):
        yield "no ref_min_score and ref_max_score: there are returns, but no scores"
    limits = (line for line in data.trial[0].splitlines() if "has no time limit" in line)
    yield from map(plain, limits)
    if number := int(data.unknown.sum()):
        ends = f"{count(number, 'episode')} without a known last observation (NaN)"
        yield f"{ends}: BC and DT learn from their last step, the other scripts leave it out"
    if data.open_end[-1]:
        number = data.numbers[-1]
        yield f"episode {number} has no end: the recording stopped in it, its return is not whole"
    space = data.metadata["action_space"]
    if isinstance(space, gym.spaces.Box):
        low, high = space.low.ravel(), space.high.ravel()
        share = ((data.actions <= low + 1e-6) | (data.actions >= high - 1e-6)).mean()
        yield f"{share:.1%} of the action components are at a bound of their space"
    if data.actions_known and len(unused := unused_actions(data)):
        listed = ", ".join(map(str, unused[:10])) + ("" if len(unused) <= 10 else ", ...")
        yield f"actions that never occur: {listed}"
    if data.frames is not None and (black := int((data.obs == 0).sum())):
        yield f"{count(black, 'frame')} of zeros (what followed a terminal may be unknown)"
    if len(data.returns) > 1 and np.ptp(data.returns) == 0 and np.ptp(data.rewards) > 0:
        yield "all episodes have the same return: training that weighs by return learns nothing"


def action_counts(data: Data) -> np.ndarray:
    """How often each of the numbered actions occurs, [n] (of many, those up to the largest)."""
    numbers = data.actions[:, 0] - data.metadata["action_space"].start
    known = numbers[(numbers >= 0) & (numbers < data.actions_known)].astype(np.int64)
    return np.bincount(known, minlength=min(data.actions_known, MOST_ACTIONS))[:MOST_ACTIONS]


def unused_actions(data: Data) -> np.ndarray:
    return np.flatnonzero(action_counts(data) == 0) + data.metadata["action_space"].start


def table(data: Data) -> Iterator[str]:
    """The ranges of observations and actions, a line a dimension, long ones summarised."""
    yield f"{'':16}{'min':>12}{'mean':>12}{'max':>12}{'deviation':>12}"
    kinds = {"observation" if data.frames is None else "brightness": data.known}
    kinds |= {} if data.actions_known else {"action": data.actions}
    for kind, values in kinds.items():
        total, mean = values.shape[1], values.mean(0, dtype=np.float64)
        rows = ROWS.get(kind, 1)
        columns = (values.min(0), mean, values.max(0), values.std(0, dtype=np.float64))
        shown = total if total <= rows else rows - 1
        for i in range(shown):
            yield f"{f'{kind} {i}':16}" + "".join(f"{column[i]:12.4g}" for column in columns)
        if shown < total:
            low, high = columns[0][shown:].min(), columns[2][shown:].max()
            yield f"{kind}s {shown} to {total - 1}: between {low:.4g} and {high:.4g}"
    if data.actions_known:
        shares = action_counts(data) / len(data.rewards)
        yield "action shares " + " ".join(f"{share:.1%}" for share in shares)


def page(data: Data) -> str:
    """The text on what the set is and holds."""
    meta, scores = data.metadata, data.scores
    references = " to ".join(plain(meta.get(f"ref_{end}_score")) for end in ("min", "max"))
    ends = f"{data.terminated.sum():,} terminated, {data.truncated.sum():,} truncated"
    copies = len(data.rewards) - len(np.unique(data.hashes))
    again = f"{count(copies, 'step')}, {count(len(duplicated_episodes(data)), 'whole episode')}"
    zeros = f"{(data.rewards == 0).mean():.1%} zeros"
    lines = {
        "source": plain(meta.get("source") or meta.get("code_permalink") or "not told"),
        "environment": plain(data.environment.get("id") or "none that can be read"),
        "references": references,
        "episodes": f"{len(data.lengths):,}, {ends}",
        "steps": f"{len(data.rewards):,}",
        "lengths": f"{span(data.lengths)} (min / median / max)",
        "returns": f"{span(data.returns)}, mean {data.returns.mean():,.6g}",
        "scores": "none" if scores is None else f"{span(scores)}, mean {scores.mean():,.6g}",
        "rewards": f"{data.rewards.min():.6g} to {data.rewards.max():.6g}, {zeros}",
        "seen before": again,
    }
    text = [data.name, "=" * len(data.name)]
    text += [f"{key:<12} {value}" for key, value in lines.items()]
    text += ["", *table(data), "", *(f"note: {note}" for note in notes(data))]
    return "\n".join(text)


def describe(findings: list[Finding]) -> str:
    """The list of findings."""
    if not findings:
        return "nothing wrong found"
    text = f"{count(len(findings), 'finding')}\n"
    for number, finding in enumerate(findings, 1):
        text += f"{number}. {finding.title}: {finding.detail}\n"
        text += f"   effect: {finding.effect}\n   mend:   {finding.mend}\n"
    return text.rstrip()


# ---- the picture


def draw(data: Data, findings: list[Finding], path: Path) -> None:
    """Save the picture: what is in the set, 2 x 3 panels."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    faults = count(len(findings), "finding") if findings else "nothing wrong found"
    episodes, steps = count(len(data.lengths), "episode"), count(len(data.rewards), "step")
    figure.suptitle(f"{data.name}: {episodes}, {steps}; {faults}", fontsize=15, parse_math=False)
    (returns, lengths, rewards), (obs, actions, changes) = axes
    draw_returns(returns, data)
    lengths.hist(data.lengths, bins=50, range=(0, 1.02 * data.lengths.max()), color="tab:blue")
    lengths.set(title="lengths", xlabel="steps", ylabel="episodes")
    draw_rewards(rewards, data)
    if data.actions_known:
        draw_counts(actions, data)
    else:
        draw_ranges(actions, data.actions, "actions")
    if data.pictures:
        for place, (title, frame) in zip((obs, changes), data.pictures.items(), strict=False):
            draw_frame(place, frame, title)
    else:
        draw_ranges(obs, data.known, "observations")
        draw_changes(changes, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font lacks letters of a name
        figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_returns(axes, data: Data) -> None:
    """How many episodes have which return."""
    low, high, size = data.returns.min(), data.returns.max(), np.abs(data.returns).max()
    margin = 0.01 * (high - low) + 1e-6 * size or 1  # 50 bins apart need more than rounding
    axes.hist(data.returns, bins=50, range=(low - margin, high + margin), color="tab:blue")
    axes.axvline(data.returns.mean(), color="black", label=f"mean {data.returns.mean():,.4g}")
    axes.set(title="returns", xlabel="undiscounted return", ylabel="episodes")
    axes.legend()


def draw_rewards(axes, data: Data) -> None:
    """Mean and range of the rewards along the data, in at most 200 pieces."""
    pieces = np.unique(np.linspace(0, len(data.rewards), 200, endpoint=False).astype(int))
    low, high = (f.reduceat(data.rewards, pieces) for f in (np.minimum, np.maximum))
    sums = np.add.reduceat(data.rewards.astype(np.float64), pieces)
    mean, x = sums / np.diff(pieces, append=len(data.rewards)), pieces / 1000
    axes.fill_between(x, low, high, color="tab:blue", alpha=0.25, label="min to max")
    axes.plot(x, mean, color="tab:blue", label="mean")
    axes.set(title="rewards along the data", xlabel="thousand steps", ylabel="reward")
    axes.legend()


def draw_ranges(axes, values: np.ndarray, title: str) -> None:
    """A bar from the 1st to the 99th percentile of every dimension, a line from min to max."""
    x, values = np.arange(values.shape[1]), values.clip(-1e30, 1e30)  # axes overflow beyond
    low, median, high = np.quantile(values, [0.01, 0.5, 0.99], 0)
    axes.vlines(x, values.min(0), values.max(0), color="tab:blue", lw=1, label="min to max")
    axes.bar(x, high - low, 0.6, low, color="tab:blue", alpha=0.5, label="98 percent")
    axes.plot(x, median, "_", color="black", label="median")
    if np.abs(values).max() > 20:
        axes.set_yscale("symlog", linthresh=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.use_sticky_edges = False  # leaves room around the bars
    axes.set(title=title, xlabel="dimension", ylabel="value")
    axes.margins(y=0.1)
    if title == "observations":  # the same in both, and it would hide bars
        axes.legend()


def draw_counts(axes, data: Data) -> None:
    """How often each of the numbered actions occurs."""
    counts = action_counts(data)
    axes.bar(np.arange(len(counts)) + data.metadata["action_space"].start, counts, color="tab:blue")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="actions", xlabel="action", ylabel="steps")


def draw_frame(axes, frame: np.ndarray, title: str) -> None:
    """An image: [H, W], or [H, W, 3] of colours; of other channels the last one that is set."""
    if frame.ndim > 2 and not (frame.dtype == np.uint8 and frame.shape[-1] == 3):
        planes = frame.reshape(*frame.shape[:2], -1) != 0
        frame = (planes * np.arange(1, planes.shape[-1] + 1)).max(-1)
    axes.imshow(frame, cmap="gray" if frame.dtype == np.uint8 else "viridis")
    axes.set(title=title, xticks=[], yticks=[])


def draw_changes(axes, data: Data) -> None:
    """How far the observations move at a step; jumps stand apart on the right."""
    sizes = data.changes[0]
    axes.hist(sizes.clip(0.01, 1000), bins=np.geomspace(0.01, 1000, 80), color="tab:blue")
    axes.axvline(JUMP, color="tab:red", ls="--", label="jumps lie beyond")
    axes.set(xscale="log", yscale="log", title="changes of the observations")
    axes.set(xlabel="largest change, in 99th percentiles of its dimension", ylabel="steps")
    axes.legend()


# ---- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DoctorError(f"{message}: --help shows how to call this")


def picture_folder() -> Path:
    """stitch/doctor in the user's cache. Raises DoctorError where the user has no home."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # which counts if it is absolute
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "stitch" / "doctor"
    except RuntimeError:
        raise DoctorError("there is no home folder for the picture: name one with --out") from None


@np.errstate(all="ignore")  # what overflows is infinite, and found
def examine(dataset_id: str, env_id: str, out: Path | None) -> int:
    """Print the page and the findings, save the picture; 0, 1 or, after an error, 2."""
    try:
        data = load(dataset_id, env_id)
        if data.name != dataset_id:  # two sets may say the same of themselves
            print(f"{plain(dataset_id)} calls itself {data.name}")
        print(page(data), flush=True)
        findings = diagnose(data)
        print(f"\n{describe(findings)}\n", flush=True)
        folder, name = out or picture_folder(), re.sub(r"[^\w.]+", "-", dataset_id, flags=re.A)
        path = folder / f"{name.strip('-.')[-100:] or 'dataset'}-doctor.png"
        folder.mkdir(parents=True, exist_ok=True)
        draw(data, findings, path)
    except DoctorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: no picture, {error}: choose another place with --out", file=sys.stderr)
        return 2
    print(f"picture: {path}", flush=True)
    return 1 if findings else 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 where something is wrong, 2 where a dataset cannot be examined."""
    parser = Parser(description="Examine an offline dataset before training on it.")
    parser.add_argument("ids", nargs="+", metavar="ID", help="an id in Minari's store, or a folder")
    parser.add_argument("--env_id", default="auto", help="as in the training scripts (auto)")
    parser.add_argument("--out", type=Path, help="folder of the pictures (~/.cache/stitch/doctor)")
    try:
        args = parser.parse_args(argv)
        return max([examine(dataset_id, args.env_id, args.out) for dataset_id in args.ids])
    except DoctorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose ogbench.py would stand in for the package
    sys.exit(main())
