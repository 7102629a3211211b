"""Convert D4RL's own HDF5 files, and others in their layout, into Minari's store.

    python datasets/d4rl.py hopper-medium-v2 antmaze-umaze      # download and convert
    python datasets/d4rl.py door-human-v1 --file door-human-v1.hdf5
    python datasets/d4rl.py --file mine.hdf5 --id mine/valve-v0 --env_id valve:Valve-v0
    python datasets/d4rl.py --list

A task becomes `D4RL/<robot>/<dataset>-vN`; `tasks.csv` beside this file is the table of tasks.

Files of your own, with `--id`
- Arrays: observations [N, obs_dim], actions [N, act_dim], rewards and terminals [N] or [N, 1], and
  perhaps timeouts and next_observations. They are stored as float32. With neither of the two only
  terminals end an episode.
- `--env_id` names the environment, whose action space the set takes: a registered id, or
  module:Id-v0, which imports the module. Without it the set names none, and its actions lie within
  [-1, 1] or, where they exceed that by more than rounding, within the smallest and largest of
  each component.
- `--ref_min_score` and `--ref_max_score` are the returns that score 0 and 100.

Episodes
- One ends at a terminal, at a timeout, at a jump (its `next_observations` is not the observation
  that follows, but for rounding: two recordings were joined there) and at the end of the file.
  Timeouts and jumps truncate; an episode that the file's end cuts (`unfinished`) has neither mark
  at its last step, for it lacks the rewards to come: its returns are too small.
- The last next observation is the file's where it has `next_observations`. Where it has none, that
  of an episode that did not terminate is unknown and stored as NaN; one that terminated repeats its
  last observation, which no bootstrap reads.
- A step that is terminal and timeout at once is a terminal. Actions are clipped to their space.
- All this is counted, printed, and stored in the metadata as `counts`.
- A file that reads elsewhere, by links or virtual or external arrays, is refused.

Mazes
- maze2d's x runs along the rows of the map and its y along the columns, antmaze's y runs down the
  rows. The environment's map is turned accordingly, not the data: actions stay as they are, and x
  and y are only shifted to today's origin, the centre of the maze.
- Agents in D4RL's mazes see no goal, and rewards belong to the evaluation goal, not to `infos/goal`
  (where the recording controller went; kept in the infos). So the environment hides the goal, and
  observations are D4RL's: antmaze x, y and the rest [29], maze2d x, y and velocities [4].
- Today's ant has five times the torque and half the time step of D4RL's. The environment undoes
  both: a fifth of 150 N m at full action, 10 frames of 0.01 s.

The metadata hold the environment, the reference scores, `source: d4rl-hdf5 <sha256>` (or `hdf5` for
your own) and, where today's environment still differs from D4RL's, a sentence in
`environment_differs`.
"""

import argparse
import ast
import bisect
import csv
import difflib
import errno
import hashlib
import http.client
import io
import json
import os
import re
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
from gymnasium.spaces.utils import flatdim
from gymnasium.wrappers import FilterObservation, FlattenObservation, RescaleAction
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path

TASKS = Path(__file__).resolve().with_name("tasks.csv")
URL_BASE = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "stitch" / "d4rl"
PAUSES = (2, 5, 15, 45, 120)  # seconds between attempts that brought nothing
TIMEOUT = 30  # seconds without a byte after which a connection is given up
COMMAND = "python datasets/d4rl.py"
SOURCE = "d4rl-hdf5"  # marks what was converted here in Minari's metadata
BATCH = 100_000  # steps held in memory at once
LOCAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG}
INTERRUPTED = "interrupted: the same command begins again, and goes on with a download"
OTHER_ENDS = ("truncations", "truncated", "timeout", "dones")  # what others call time limits
OUTCOMES = ("episodes", "terminated", "timed_out", "jumps", "unfinished")
REPAIRS = ("terminal_and_timeout", "unknown_last_observations", "repeated_last_observations")
REPAIRS += ("clipped_steps", "largest_excess")
# suite: how D4RL's axes turn the map, metres a cell, x and y of cell (1, 1) in D4RL's frame
# (maze2d's walls stand 0.2 m off the whole numbers)
MAZES = {"maze2d": (np.rot90, 1.0, 0.8), "antmaze": (np.flipud, 4.0, 0.0)}


class D4RLError(Exception):
    """What is wrong and how to mend it, in one line."""


@dataclass(frozen=True)
class Task:
    """A row of tasks.csv, or a set of the user's, of suite "own".

    Cells are (row, column) in D4RL's map, None = any free cell.
    """

    task: str
    suite: str
    minari_id: str
    obs_dim: int = 0  # 0 = as the file has it
    act_dim: int = 0
    max_episode_steps: int | None = None  # None = as the environment has it
    ref_min_score: float | None = None
    ref_max_score: float | None = None
    url: str = ""
    eval_env: str = ""
    reset_cell: tuple[int, int] | None = None
    goal_cell: tuple[int, int] | None = None
    hub_id: str = ""
    hub_relation: str = ""
    note: str = ""  # what of today's environment differs from D4RL's

    @property
    def stored(self) -> str:
        """What Minari's store has under this task's id: nothing (""), "D4RL's" or "other" data."""
        path = get_dataset_path(self.minari_id) / "data" / "metadata.json"
        if not path.exists():
            return ""
        try:
            source = str(json.loads(path.read_bytes()).get("source"))
        except (ValueError, AttributeError):
            source = ""
        return "D4RL's" if source.startswith(SOURCE) else "other"


def read_tasks() -> dict[str, Task]:
    """The task table by task name (with version), in its order."""
    tasks = {}
    with TASKS.open(newline="") as file:
        for row in csv.DictReader(file):
            for key, kind in Task.__annotations__.items():
                if kind is not str:
                    row[key] = ast.literal_eval(row[key] or "None")
            tasks[row["task"]] = Task(**row)
    return tasks


def find_task(name: str, tasks: dict[str, Task]) -> Task:
    """A task by its name, with or without version. Raises D4RLError with the nearest names."""
    names = {task.rpartition("-v")[0]: task for task in tasks} | {task: task for task in tasks}
    if name in names:
        return tasks[names[name]]
    near = difflib.get_close_matches(name, tasks)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise D4RLError(f"{name} is not a current D4RL task: {hint}--list shows all")


class Progress:
    """A line now and then on stderr: how far, and how long still."""

    def __init__(self, what: str, unit: str, scale: float = 1):
        self.what, self.unit, self.scale = what, unit, scale
        self.start = self.last = time.monotonic()
        self.first = None  # a resumed file starts above 0
        self.every, self.end = (0.5, "\r") if sys.stderr.isatty() else (10, "\n")

    def __call__(self, count: int, total: int | None) -> None:
        now = time.monotonic()
        self.first = count if self.first is None else self.first
        if now - self.last < self.every:
            return
        self.last, rate = now, (count - self.first) / (now - self.start)
        text = f"{self.what}: {count / self.scale:,.0f}"
        if total:
            text += f" of {total / self.scale:,.0f}"
        text += f" {self.unit}"
        if total and rate > 0:
            text += f", {(total - count) / rate:,.0f} s left"
        print(text.ljust(79), end=self.end, file=sys.stderr, flush=True)


# ---- download


def download(url: str, path: Path, look, command: str, pauses=PAUSES, timeout=TIMEOUT) -> None:
    """Fetch `url` to `path`, resuming what an earlier attempt left in `path`.part.

    `look(part)` opens what came, or raises D4RLError if it is not the file. After an attempt that
    brought nothing new it waits the next of `pauses` (seconds). D4RL's server refuses at times
    (403), so refusals are tried again too, but not a missing file, nor anything where its name is
    unknown (no network). Then, and once the pauses are used up, it raises D4RLError with the file
    to fetch by hand and the command that takes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    longest, waits = 0, iter(pauses)
    while True:
        try:
            fetch(url, part, timeout)
            with look(part):
                part.replace(path)
            return
        except (OSError, http.client.HTTPException, D4RLError) as error:
            if getattr(error, "errno", None) in LOCAL_ERRORS:
                raise
            if isinstance(error, D4RLError):  # whole, but not the file: a page of the server's
                part.unlink()
            size = part.stat().st_size if part.exists() else 0
            if size > longest:  # it moves on: patience starts anew
                longest, waits = size, iter(pauses)
            offline = isinstance(getattr(error, "reason", None), socket.gaierror)
            missing = getattr(error, "code", None) in (404, 410)
            pause = None if offline or missing else next(waits, None)
            reason = str(error) or type(error).__name__
        if pause is None:
            raise D4RLError(
                f"cannot download {path.name} ({reason}): fetch {url} by hand, then run {command}"
            )
        print(f"{path.name}: {reason}; again in {pause} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def fetch(url: str, part: Path, timeout: float) -> None:
    """One attempt: append to `part` what it lacks. Raises OSError if it is not whole afterwards."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()
            raise OSError(f"{part.name} is longer than the server's file") from None
        return  # nothing comes after what is here: it was whole
    with response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        total = None if response.length is None else have + response.length
        progress = Progress(f"downloading {part.stem}", "MB", 1e6)
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read1(1 << 20):
                have += file.write(block)
                progress(have, total)
    if total is not None and have != total:
        raise OSError(f"the connection ended at {have:,} of {total:,} bytes")


# ---- D4RL's file


@contextmanager
def open_source(path: Path, task: Task) -> Iterator[h5py.File]:
    """A file in D4RL's layout. Raises D4RLError unless it has the task's arrays, of its sizes."""
    own, name = task.suite == "own", Path(task.url).name
    if not path.is_file():
        mend = "a file in D4RL's layout" if own else f"D4RL's {name}"
        raise D4RLError(f"{path} is not a file: give {mend} with --file")
    try:
        file = h5py.File(path, "r")
    except OSError:
        mend = "write it again" if own else f"delete it and fetch {task.url} again"
        raise D4RLError(f"{path} is no HDF5 file or is cut short: {mend}") from None
    with file:
        refuse_links(file)
        problem = find_problem(file, task)
        if problem:
            mend = f"give D4RL's file of {task.task}, which is {name}"
            mend = "--help says which arrays a file has" if own else mend
            raise D4RLError(f"{path} {problem}: {mend}")
        yield file


def refuse_links(file: h5py.File) -> None:
    """Raise D4RLError where a file reads elsewhere or runs in a circle; nothing is followed there.

    That is at soft and external links, virtual arrays, arrays stored in other files, and groups
    reached twice.
    """
    links, groups = [], set()
    try:
        groups.add(h5py.h5o.get_info(file.id).addr)
        # every link once, and those of each group once; h5py cannot pass errors through it
        file.id.links.visit(lambda name, link: links.append((name, link.type)), info=True)
        for name, kind in links:
            fault = None if kind == h5py.h5l.TYPE_HARD else "a soft or external link"
            thing = None if fault else h5py.h5o.open(file.id, name)
            if isinstance(thing, h5py.h5g.GroupID):
                address = h5py.h5o.get_info(thing).addr
                fault = "a group reached twice" if address in groups else None
                groups.add(address)
            elif isinstance(thing, h5py.h5d.DatasetID):
                plan = thing.get_create_plist()
                elsewhere = plan.get_layout() == h5py.h5d.VIRTUAL or plan.get_external_count()
                fault = "an array stored elsewhere" if elsewhere else None
            if fault:
                text = f"{file.filename}: {name.decode(errors='replace')!r} is {fault}"
                raise D4RLError(f"{text}: write a file that holds its arrays itself")
    except (OSError, RuntimeError, KeyError, ValueError):
        raise D4RLError(f"{file.filename} is damaged: write or fetch it again") from None


def find_problem(file: h5py.File, task: Task) -> str | None:
    """What is wrong with the names and shapes of the arrays."""
    others = [key for key in OTHER_ENDS if key in file and "timeouts" not in file]
    if task.suite == "own" and others:
        return f"has {others[0]} and no timeouts: call time limits so, zeros if there are none"
    required = ["observations", "actions", "rewards", "terminals"]
    # a demonstration of the kitchen ends in a terminal
    optional = ["next_observations"] + ["infos/goal"] * (task.suite in MAZES)
    (optional if task.suite in ("kitchen", "own") else required).append("timeouts")
    shapes = {key: getattr(file.get(key), "shape", None) for key in required + optional}
    steps = (shapes["rewards"] or (0,))[0]
    if not steps:
        return "has no rewards"
    sizes = {"observations": task.obs_dim, "actions": task.act_dim, "infos/goal": 2}
    for key in ("observations", "actions") if task.suite == "own" else ():
        sizes[key] = max(1, shapes[key][1]) if len(shapes[key] or ()) > 1 else 1
    sizes["next_observations"] = sizes["observations"]
    for key, shape in shapes.items():
        size = sizes.get(key, 1)
        if shape is None and key in required:
            return f"has no {key}"
        if shape not in (None, (steps, size)) and (size > 1 or shape != (steps,)):
            return f"has {key} of shape {shape} instead of {(steps, size)}"
    return None


def read(file: h5py.File, key: str, start: int, stop: int) -> np.ndarray:
    """Steps start to stop as float32 [steps, size]. Raises D4RLError at what is not a number."""
    mend = "mend it or fetch it again"
    try:
        if file[key].dtype.kind not in "biuf":
            raise TypeError
        with np.errstate(over="ignore"):
            values = np.asarray(file[key][start:stop], np.float32).reshape(stop - start, -1)
    except (OSError, ValueError, TypeError, RuntimeError, MemoryError):
        text = f"{file.filename}: {key} cannot be read as numbers from step {start:,} on: {mend}"
        raise D4RLError(text) from None
    finite = np.isfinite(values).all(1)
    if not finite.all():
        step = start + int(finite.argmin())
        raise D4RLError(f"{file.filename}: {key} is not finite at step {step:,}: {mend}")
    return values


def as_flags(values: np.ndarray, name: str) -> np.ndarray:
    """[N] booleans. Raises D4RLError at what is neither 0 nor 1."""
    flags = np.isin(values, (0, 1))
    if not flags.all():
        step = int(flags.argmin())
        raise D4RLError(f"{name} is {values[step]:g} at step {step:,}: write 0 or 1")
    return values > 0


def read_ends(file: h5py.File, counts: Counter) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Where episodes end: (indices of their last steps, terminals [N], timeouts [N])."""
    steps = counts["source_steps"]
    flags = [
        as_flags(read(file, key, 0, steps)[:, 0], f"{file.filename}: {key}")
        for key in ("terminals", "timeouts")
        if key in file
    ]
    terminals, timeouts = [*flags, np.zeros(steps, bool)][:2]
    counts["terminal_and_timeout"] = int((terminals & timeouts).sum())
    last = terminals | timeouts
    last[-1] = True
    for start in range(0, steps - 1, BATCH) if "next_observations" in file else ():
        stop = min(start + BATCH, steps - 1)
        found = read(file, "next_observations", start, stop)
        following = read(file, "observations", start + 1, stop + 1)
        scale = np.abs([found, following]).max((0, 2)).clip(max=1)  # small ones differ by less
        last[start:stop] |= np.abs(found - following).max(1) > 1e-6 * scale
    return np.flatnonzero(last).tolist(), terminals, timeouts


def read_episodes(
    file: h5py.File, space: gym.spaces.Box, shift: np.ndarray | None, counts: Counter
) -> Iterator[dict]:
    """D4RL's steps as episodes in Minari's layout; fills `counts`.

    observations [T+1, obs_dim], actions [T, *their shape], rewards [T], float32; terminations and
    truncations [T], bool; infos/goal [T+1, 2] where the file has it. `shift` [2] moves x and y.
    """
    ends, terminals, timeouts = read_ends(file, counts)
    start = base = limit = 0
    for i, end in enumerate(ends):
        if end >= limit:  # the next batch: whole episodes, up to the one that passes BATCH steps
            base, limit = start, ends[bisect.bisect(ends, start + BATCH, i, len(ends) - 1)] + 1
            data = read_batch(file, base, limit, space, shift, counts)
        rows = slice(start - base, end + 1 - base)
        cut = "jumps" if end < len(terminals) - 1 else "unfinished"
        how = "terminated" if terminals[end] else "timed_out" if timeouts[end] else cut
        counts.update({"episodes": 1, "steps": end + 1 - start, how: 1})
        yield cut_episode({key: data[key][rows] for key in data}, how, counts)
        start = end + 1


def read_batch(file, start: int, stop: int, space, shift, counts: Counter) -> dict[str, np.ndarray]:
    """The arrays of steps start to stop, x and y shifted, actions clipped."""
    keys = ["observations", "actions", "rewards", "next_observations"]
    keys += ["infos/goal"] if shift is not None else []
    data = {key: read(file, key, start, stop) for key in keys if key in file}
    if shift is not None:
        for key in {"observations", "next_observations", "infos/goal"} & data.keys():
            data[key][:, :2] += shift.astype(np.float32)
    actions = data["actions"]
    low, high = (bound.reshape(-1).astype(np.float32) for bound in (space.low, space.high))
    excess = np.maximum(low - actions, actions - high).max(1)
    counts["clipped_steps"] += int((excess > 0).sum())
    counts["largest_excess"] = max(counts["largest_excess"], float(excess.max()))
    data["actions"] = actions.clip(low, high).reshape(-1, *space.shape)
    return data


def cut_episode(data: dict, how: str, counts: Counter) -> dict:
    """An episode's steps [T, ...] in Minari's layout; `how` it ended."""
    states = data["observations"]
    last = data.get("next_observations", states)[-1:]
    if "next_observations" not in data and how == "terminated":
        counts["repeated_last_observations"] += 1
    elif "next_observations" not in data:
        counts["unknown_last_observations"] += 1
        last = np.full_like(last, np.nan)
    terminations, truncations = np.zeros((2, len(states)), bool)
    terminations[-1] = how == "terminated"
    truncations[-1] = how in ("timed_out", "jumps")
    episode = {
        "observations": np.concatenate([states, last]),
        "actions": data["actions"],
        "rewards": data["rewards"][:, 0],
        "terminations": terminations,
        "truncations": truncations,
    }
    if "infos/goal" in data:
        goals = data["infos/goal"]
        episode["infos/goal"] = np.concatenate([goals, goals[-1:]])
    return episode


# ---- environments


def maze_frame(task: Task) -> tuple[list, np.ndarray]:
    """A maze in D4RL's axes: (map with its 'r' and 'g' cells, shift of x and y [2] in metres).

    PointMaze and AntMaze have x along the columns, y up the rows and the origin in the centre.
    """
    turn, scale, origin = MAZES[task.suite]
    cells = np.array(gym.spec(task.eval_env).kwargs["maze_map"], dtype=object)
    for cell, mark in ((task.reset_cell, "r"), (task.goal_cell, "g")):
        if cell is not None:
            cells[cell] = mark
    cells = turn(cells)
    rows, columns = cells.shape
    return cells.tolist(), scale * (1.5 - np.array([columns, rows]) / 2) - origin


def build_env(task: Task) -> gym.Env:
    """The environment of today, one of D4RL's wrapped so that it takes and gives what that did."""
    if task.suite != "locomotion":
        with redirect_stderr(io.StringIO()):  # it prints a notice of its own
            import gymnasium_robotics
        gym.register_envs(gymnasium_robotics)
    kwargs = {}
    if task.suite in MAZES:
        # a continuing task that keeps its target never ends before the limit, as maze2d
        kwargs = {"continuing_task": task.suite == "maze2d", "reset_target": False}
        kwargs["maze_map"] = maze_frame(task)[0]
    if task.suite == "antmaze":
        kwargs |= {"frame_skip": 10, "include_cfrc_ext_in_observation": False}
    if task.suite == "kitchen":
        last = "bottom burner" if "mixed" in task.task else "slide cabinet"
        kwargs["tasks_to_complete"] = ["microwave", "kettle", "light switch", last]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # v4 is out of date, and meant
        env = gym.make(task.eval_env, max_episode_steps=task.max_episode_steps, **kwargs)
    if task.suite == "maze2d":
        env = FlattenObservation(FilterObservation(env, ["observation"]))
    if task.suite == "antmaze":
        env = FlattenObservation(FilterObservation(env, ["achieved_goal", "observation"]))
        env = RescaleAction(env, -5, 5)
    return env


def build_own(task: Task, file: h5py.File, sizes: list) -> tuple[gym.Env | None, gym.spaces.Box]:
    """The environment that the user named, and its action space. Raises D4RLError.

    Without one the space is [-1, 1], or what the data fill where they exceed it.
    """
    if not {"timeouts", "next_observations"} & file.keys():
        print("no timeouts and no next_observations: only terminals end an episode")
    if task.eval_env:
        try:
            env = build_env(task)
            env.spec.to_json()  # as it will be stored
            space, obs_dim = env.action_space, flatdim(env.observation_space)
        except (Exception, SystemExit) as error:  # whatever a user's module may raise
            mend = "give a registered id, or module:Id-v0 with the module on PYTHONPATH"
            text = f"--env_id {task.eval_env}: {type(error).__name__} {error}"
            raise D4RLError(f"{text}: {mend}") from None
        theirs = [obs_dim, space.low.size if isinstance(space, gym.spaces.Box) else str(space)]
        if theirs != sizes:
            text = f"--env_id {task.eval_env} has {theirs} observations and actions"
            raise D4RLError(f"{text}, the file {sizes}: name the one that it was recorded in")
        return env, space
    steps = len(file["rewards"])
    batches = (read(file, "actions", at, min(at + BATCH, steps)) for at in range(0, steps, BATCH))
    low, high = zip(*((batch.min(0), batch.max(0)) for batch in batches), strict=True)
    low, high = np.min(low, 0), np.max(high, 0)
    least, most = low.min(), high.max()
    if least >= -1 - 1e-5 and most <= 1 + 1e-5:  # but for rounding, which is clipped
        return None, gym.spaces.Box(-1.0, 1.0, low.shape, np.float32)
    print(f"actions from {least:g} to {most:g}: the extremes of each component are its bounds")
    return None, gym.spaces.Box(low, high)


# ---- Minari's store


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """The folder to build a set in: hidden, beside its place, and moved there at the end.

    A failure leaves the store as it was, and a set that was there goes only at the end. SIGTERM
    interrupts as Ctrl-C does; what SIGKILL leaves behind is named.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(".stitch-*"):
        print(f"{path} is of a process that still runs or was killed: delete it if none does")
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with building(target) as folder:
            yield folder
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".stitch-") as folder:
        built, old = Path(folder) / "new", Path(folder) / "old"
        built.mkdir()
        yield built / "data"
        try:
            if target.exists():
                target.rename(old)
            built.rename(target)
        except BaseException:  # an interruption too
            if old.exists() and not target.exists():
                old.rename(target)
            raise


def write_episodes(
    folder: Path, episodes: Iterable[dict], progress: Progress, total: int, gzip: int | None = None
) -> None:
    """Write `main_data.hdf5`; `total` steps are to come. `gzip` (0 to 9) compresses each array.

    Minari's own writer makes arrays that can grow. That takes 2 ms and 15 kB an episode, 100 s and
    700 MB for hopper-random's 45,000 short ones; these have its names and places but a fixed size.
    """
    done = 0
    with h5py.File(folder / "main_data.hdf5", "w", libver="latest") as out:
        for number, episode in enumerate(episodes):
            group = out.create_group(f"episode_{number}")
            group.attrs["id"], group.attrs["total_steps"] = number, len(episode["rewards"])
            for key, values in episode.items():
                how = {} if gzip is None else {"chunks": values.shape, "shuffle": True}
                group.create_dataset(key, data=values, compression=gzip, **how)
            progress(done := done + len(episode["rewards"]), total)


def convert(task: Task, path: Path) -> dict:
    """Write D4RL's file as `task.minari_id` into Minari's store; returns the counts."""
    target = get_dataset_path(task.minari_id)
    if task.suite == "own" and target.exists() and not task.stored:
        raise D4RLError(f"{target} is there and no dataset: choose another --id")
    with open_source(path, task) as file, replacing(target) as folder:
        return build(task, file, path, folder)


def build(task: Task, file: h5py.File, path: Path, folder: Path) -> dict:
    """Write the whole set into `folder`; returns the counts."""
    sizes = [read(file, key, 0, 1).shape[1] for key in ("observations", "actions")]
    if task.suite == "own":
        env, space = build_own(task, file, sizes)
    else:
        env, space = build_env(task), gym.spaces.Box(-1.0, 1.0, sizes[1:], np.float32)
    storage = MinariStorage.new(
        folder,
        observation_space=gym.spaces.Box(-np.inf, np.inf, sizes[:1], np.float64),
        action_space=space,
        env_spec=env and env.spec,
    )
    if env:
        env.close()
    shift = maze_frame(task)[1] if task.suite in MAZES else None
    counts = Counter(dict.fromkeys(("source_steps", "steps", *OUTCOMES, *REPAIRS), 0))
    counts["source_steps"] = len(file["rewards"])
    progress = Progress(f"converting {task.task}", "steps")
    episodes = read_episodes(file, space, shift, counts)
    write_episodes(folder, episodes, progress, counts["source_steps"])
    storage.update_metadata(metadata(task, path, dict(counts)))
    storage.update_metadata({"dataset_size": float(storage.get_size())})  # MB
    return counts


def metadata(task: Task, path: Path, counts: dict) -> dict:
    """What Minari's metadata.json says of the set, beside its spaces and environment."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "dataset_id": task.minari_id,
        "minari_version": minari.__version__,
        "total_episodes": counts["episodes"],
        "total_steps": counts["steps"],
        "source_file": path.name,
        "counts": counts,
    }
    if task.ref_max_score is not None:
        about |= {"ref_min_score": task.ref_min_score, "ref_max_score": task.ref_max_score}
    if task.suite == "own":
        description = f"Converted from {path.name}, a file in D4RL's layout."
        return about | {"source": f"hdf5 {digest}", "description": description}
    robotics = [] if task.suite == "locomotion" else ["gymnasium-robotics>=1.4"]
    repository = "https://github.com/Farama-Foundation/D4RL/tree"
    return ({"environment_differs": task.note} if task.note else {}) | {
        **about,
        "source": f"{SOURCE} {digest}",
        "author": {"Justin Fu", "Aviral Kumar", "Ofir Nachum", "George Tucker", "Sergey Levine"},
        "license": "CC BY 4.0",
        "code_permalink": f"{repository}/89141a689b0353b0dac3da5cba60da4b1b16254d",
        "description": f"D4RL's {task.task} (arXiv 2004.07219), converted from its own HDF5 file.",
        "requirements": ["gymnasium>=1.0", "mujoco>=3.3,<3.17", *robotics],
    }


# ---- command line


def show_tasks(tasks: dict[str, Task]) -> None:
    """Print the table: what there is and what is in the store."""
    columns = "{:<28} {:<10} {:>4} {:>4} {:>6} {:>10} {:>10}  {}\n"
    heads = ("task", "suite", "obs", "act", "limit", "ref min", "ref max", "in the store as")
    text = columns.format(*heads)
    for task in tasks.values():
        sizes = (task.obs_dim, task.act_dim, task.max_episode_steps)
        references = (f"{task.ref_min_score:.2f}", f"{task.ref_max_score:.2f}")
        stored = task.minari_id if task.stored == "D4RL's" else "-"
        text += columns.format(task.task, task.suite, *sizes, *references, stored)
    sys.stdout.write(text)


def report(task: Task, counts: dict) -> None:
    """Print what became of the file."""
    steps = f"{task.minari_id}: {counts['steps']:,} of {counts['source_steps']:,} steps"
    print(", ".join([steps, *(f"{counts[key]:,} {key.replace('_', ' ')}" for key in OUTCOMES)]))
    for key in REPAIRS:
        if counts[key]:
            print(f"  {key.replace('_', ' ')}: {counts[key]:,.6g}")
    if counts["episodes"] == counts["unfinished"]:
        print("  nothing in the file ends an episode: the whole of it is one")
    if task.note:
        print(f"  environment differs: {task.note}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        hint = " (a negative one after an =)" if "expected one argument" in message else ""
        raise D4RLError(f"{message}{hint}: --help shows how to call this")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises D4RLError where it makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help="hopper-medium-v2 or hopper-medium"
    )
    parser.add_argument("--file", type=Path, help="D4RL's file, fetched by hand, or your own")
    parser.add_argument("--id", help="Minari id for a file of your own, such as mine/valve-v0")
    parser.add_argument("--env_id", default="", help="its environment: Id-v0 or module:Id-v0")
    parser.add_argument("--ref_min_score", type=float, help="its return that scores 0")
    parser.add_argument("--ref_max_score", type=float, help="its return that scores 100")
    parser.add_argument(
        "--list", action="store_true", help="show all tasks, and those in the store"
    )
    parser.add_argument("--url-base", default=URL_BASE, help="a mirror of %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="downloads (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a set that is in the store")
    args = parser.parse_args(argv)
    scores = [args.ref_min_score, args.ref_max_score]
    if args.id is not None:
        check_own(parser, args)
    elif args.env_id or scores != [None, None]:
        parser.error("--env_id and reference scores go with --id")
    elif not args.tasks and not args.list:
        parser.error("name a task")
    elif args.file and len(args.tasks) != 1:
        parser.error("--file goes with one task, or with --id")
    if not args.url_base.startswith(("http://", "https://")):
        parser.error("--url-base begins with http:// or https://")
    return args


def check_own(parser: Parser, args: argparse.Namespace) -> None:
    """Whether the words about a set of the user's own make sense."""
    valid = re.compile(r"(?!D4RL/|.*-v\d+/)([\w-]+/)*[\w-]+-v\d+").fullmatch
    if not valid(args.id):
        like = f"{args.id}-v0" if valid(f"{args.id}-v0") else "mine/valve-v0"
        parser.error(f"--id {args.id} is no Minari id outside of D4RL/ and other sets, like {like}")
    if args.tasks or not args.file:
        parser.error("--id goes with --file and no task")
    scores = [args.ref_min_score, args.ref_max_score]
    if scores != [None, None] and (None in scores or not -1e9 <= scores[0] < scores[1] <= 1e9):
        parser.error("--ref_min_score and --ref_max_score go together, the smaller one first")


def main(
    argv: list[str] | None = None, pauses: Iterable[float] = PAUSES, timeout: float = TIMEOUT
) -> int:
    """Exit code: 0, or 2 after an error (one line on stderr each), or 130 when interrupted."""
    try:
        args, table = parse(argv), read_tasks()
        tasks = [find_task(name, table) for name in args.tasks]
        if args.id:
            scores = {"ref_min_score": args.ref_min_score, "ref_max_score": args.ref_max_score}
            tasks = [Task(args.id, "own", args.id, eval_env=args.env_id, **scores)]
        if args.list:
            show_tasks(table)
        return max([run(task, args, pauses, timeout) for task in tasks], default=0)
    except (D4RLError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130


def run(task: Task, args: argparse.Namespace, pauses: Iterable[float], timeout: float) -> int:
    """Download and convert one task; returns 0 or 2, for the next task may still go well."""
    try:
        if task.stored and not args.force:
            text = f"{task.minari_id} is in the store already; --force replaces it"
            if task.stored == "other" and task.suite != "own":
                text += " (not D4RL's own data: Minari's hub re-created some under the same names)"
            if task.stored == "other" or task.suite == "own":
                raise D4RLError(text)
            print(text)
            return 0
        url = task.url.replace(URL_BASE, args.url_base.rstrip("/"))
        path = args.file or args.cache.expanduser() / Path(url).name
        if not args.file and not path.exists():
            command = f"{COMMAND} {task.task} --file {path.name}"
            download(url, path, lambda part: open_source(part, task), command, pauses, timeout)
        report(task, convert(task, path))
        return 0
    except (D4RLError, OSError) as error:
        return fail(error)


def fail(error: Exception) -> int:
    """Say what is wrong in one line."""
    mend = ": choose another place with --cache or MINARI_DATASETS_PATH"
    text = f"error: {error}{mend if isinstance(error, OSError) else ''}"
    print(*text.split(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
