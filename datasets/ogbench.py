"""Convert OGBench's npz files into Minari's store, each for a single task.

    python datasets/ogbench.py antmaze-large-navigate cube-single-play   # download and convert
    python datasets/ogbench.py scene-play-singletask-task4-v0 --file scene-play-v0.npz
    python datasets/ogbench.py --list

OGBench (arXiv 2410.20092) has five tasks for each of its environments. One of them, OGBench's
`antmaze-large-navigate-singletask-task1-v0`, becomes
`ogbench/antmaze-large-navigate/singletask-task1-v0`; without a number the default task is meant, as
in OGBench. `ogbench.csv` beside this file has the environments and the goals of their tasks, as the
ogbench package (1.2.2) sets them. The package itself is only needed to play.

Rewards
- A step earns minus the number of parts of the goal that its state, before the action, does not
  meet, and a state that meets all is done: OGBench's single-task rewards. A maze has one part (the
  agent within 0.5 m of the goal, a point mass 1 m), soccer too (the ball within 0.5 m); else every
  cube (within 4 cm), button, drawer and window (within 4 cm or its like) is one.

Episodes
- `terminals` mark the last state of a trajectory. What its action led to is unknown, so it is no
  step, as in OGBench's loader; all others are, in the file's order: the transitions are the same.
- OGBench's two flags stay apart: a step in a done state, of mask 0, is a termination and stops the
  bootstrap; the last step of a trajectory, its terminal, is a truncation, if it is not done.
- OGBench's trajectories go on after a done state. Minari's episodes cannot, so they are cut there,
  with the next observation kept; each further step in a done state is an episode of its own. What
  ranks or sums whole episodes (10% BC, returns-to-go) meets those, which OGBench does not have.
- Actions are clipped to [-1, 1]. Counts of all this are printed and stored in the metadata.

The -val.npz files, for the validation of goal-conditioned losses, are not used. OGBench reports the
share of episodes that succeed, and no reference returns.
"""

import argparse
import ast
import csv
import difflib
import hashlib
import importlib.util
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path

TABLE = Path(__file__).resolve().with_name("ogbench.csv")
URL_BASE = "https://rail.eecs.berkeley.edu/datasets/ogbench"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "stitch" / "ogbench"
COMMAND = "python datasets/ogbench.py"
SOURCE = "ogbench-npz"
# what a bad file raises
BROKEN = (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error)
BROKEN += (AttributeError, TypeError)  # of members that are no arrays, or not of numbers
ARM = 14  # entries of qpos before the first cube's
CUBE = 7  # of each cube: position, quaternion

SPEC = importlib.util.spec_from_file_location("d4rl", TABLE.with_name("d4rl.py"))
d4rl = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(d4rl)
Problem = d4rl.D4RLError  # what is wrong and how to mend it, in one line


@dataclass(frozen=True)
class Task:
    """A task of an environment and the data for it; the fields are the columns of ogbench.csv."""

    environment: str  # antmaze-large
    data: str  # navigate
    number: int  # 1 to 5
    obs_dim: int
    act_dim: int
    qpos_dim: int  # of the simulator's state
    max_episode_steps: int
    entry_point: str
    kwargs: dict
    goal: dict  # agent or ball: (x, y); cubes: [(x, y, z)]; buttons: their states; drawer, window

    @property
    def name(self) -> str:
        return f"{self.environment}-{self.data}-singletask-task{self.number}-v0"

    @property
    def file(self) -> str:
        return f"{self.environment}-{self.data}-v0.npz"

    @property
    def minari_id(self) -> str:
        return f"ogbench/{self.environment}-{self.data}/singletask-task{self.number}-v0"

    @property
    def env_spec(self) -> gym.envs.registration.EnvSpec:
        return gym.envs.registration.EnvSpec(
            f"{self.environment}-singletask-task{self.number}-v0",
            entry_point=self.entry_point,
            max_episode_steps=self.max_episode_steps,
            kwargs={**self.kwargs, "reward_task_id": self.number},
        )


def read_table() -> dict[str, list[Task]]:
    """The five tasks of each data set, by its name (antmaze-large-navigate), the default first."""
    table = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            environment, entry_point = row.pop("environment"), row.pop("entry_point")
            kinds = row.pop("data").split()
            values = {key: ast.literal_eval(text) for key, text in row.items()}
            default, goals = values.pop("default_task"), values.pop("goals")
            for data in kinds:
                words = {"environment": environment, "data": data, "entry_point": entry_point}
                tasks = [
                    Task(**words, **values, number=i, goal=goal) for i, goal in enumerate(goals, 1)
                ]
                tasks.insert(0, tasks.pop(default - 1))
                table[f"{environment}-{data}"] = tasks
    return table


def find_task(name: str, table: dict[str, list[Task]]) -> Task:
    """A task by OGBench's name, which may stop after the data. Raises Problem with near names."""
    data, number = re.fullmatch(r"(?s)(.*?)(?:-singletask(?:-task(\d))?)?(?:-v0)?", name).groups()
    for task in table.get(data, ()):
        if number in (None, str(task.number)):
            return task
    near = difflib.get_close_matches(data, table)
    hint = f"did you mean {' or '.join(near)}? " if near and data not in table else ""
    raise Problem(f"{name} is no task of OGBench's with states: {hint}--list shows all")


# ---- OGBench's file


def open_source(path: Path, task: Task) -> np.lib.npyio.NpzFile:
    """Open OGBench's file. Raises Problem unless it has the arrays that the task needs."""
    if not path.is_file():
        raise Problem(f"{path} is not a file: give OGBench's {task.file} with --file")
    try:
        file = np.load(path)
        names = set(file.files)
    except BROKEN:
        mend = f"delete it and fetch {URL_BASE}/{task.file} again"
        raise Problem(f"{path} is no npz file or is cut short: {mend}") from None
    for key in ("observations", "actions", "terminals", *state_keys(task)):
        if key not in names:
            file.close()
            raise Problem(f"{path} has no {key}: give OGBench's {task.file}")
    return file


def state_keys(task: Task) -> list[str]:
    """The arrays of the simulator's state that the goal is about."""
    keys = ["button_states"] if "buttons" in task.goal else []
    return keys if task.goal.keys() == {"buttons"} else ["qpos", *keys]


def read(file, path: Path, key: str, size: int, steps: int | None = None) -> np.ndarray:
    """A whole array [steps, size]. Raises Problem where it is another, or is not of numbers."""
    try:
        values = file[key]
        if values.dtype.kind not in "biuf":
            raise TypeError
        values = values.astype(values.dtype if values.dtype.kind == "f" else np.float32, copy=False)
    except BROKEN:
        raise Problem(f"{path}: {key} cannot be read: fetch {path.name} again") from None
    values = values[:, None] if values.ndim == 1 and size == 1 else values
    shape = (len(values) if steps is None and values.ndim else steps, size)
    if values.shape != shape:
        raise Problem(f"{path} has {key} of shape {values.shape} instead of {shape}")
    finite = (np.abs(values) <= np.finfo(np.float32).max).all(1)  # as it is stored
    if not finite.all():
        raise Problem(f"{path}: {key} is not finite at step {int(finite.argmin()):,}")
    return values


def goal_parts(task: Task, qpos: np.ndarray, buttons: np.ndarray) -> np.ndarray:
    """Which parts of the goal each state meets [N, parts], from qpos and button_states."""

    def near(first: int, place, tolerance: float) -> np.ndarray:
        gap = qpos[:, first : first + len(place)] - np.array(place, np.float64)
        return np.linalg.norm(gap, axis=-1) <= tolerance

    goal, parts = task.goal, []
    for body, first in (("agent", 0), ("ball", 15)):
        if body in goal:
            parts.append(near(first, goal[body], 1.0 if task.environment.startswith("p") else 0.5))
    cubes, wanted = goal.get("cubes", ()), goal.get("buttons", ())
    parts += [near(ARM + CUBE * i, place, 0.04) for i, place in enumerate(cubes)]
    parts += [buttons[:, i] == state for i, state in enumerate(wanted)]
    for i, thing in enumerate(("drawer", "window")):
        if thing in goal:
            parts.append(near(ARM + CUBE * len(cubes) + len(wanted) + i, (goal[thing],), 0.04))
    return np.stack(parts, -1)


def read_steps(task: Task, file, path: Path) -> dict[str, np.ndarray]:
    """The file's N states: observations, actions; rewards, done and last [N].

    `last` is the last state of a trajectory, from which no step is known.
    """
    last = d4rl.as_flags(read(file, path, "terminals", 1)[:, 0], f"{path}: terminals")
    if not last.any() or not last[-1]:
        raise Problem(f"{path} ends inside a trajectory: fetch {path.name} again")
    sizes = {"qpos": task.qpos_dim, "button_states": len(task.goal.get("buttons", ()))}
    states = [
        read(file, path, key, size, len(last)) if key in state_keys(task) else None
        for key, size in sizes.items()
    ]
    parts = goal_parts(task, *states)
    rewards, done = parts.sum(-1) - parts.shape[-1], parts.all(-1)
    steps = {"rewards": rewards.astype(np.float32), "done": done, "last": last}
    for key, size in (("observations", task.obs_dim), ("actions", task.act_dim)):
        steps[key] = read(file, path, key, size, len(last)).astype(np.float32, copy=False)
    return steps


def cut_episodes(steps: dict[str, np.ndarray], counts: Counter) -> Iterator[dict]:
    """The steps as episodes in Minari's layout; fills `counts`.

    observations [T+1, obs_dim], actions [T, act_dim], rewards, terminations, truncations [T].
    """
    last, done = steps["last"], steps["done"]
    excess = np.abs(steps["actions"][~last]).max(1, initial=0) - 1
    counts["clipped_steps"] = int((excess > 0).sum())
    counts["largest_excess"] = max(0.0, float(excess.max(initial=0)))
    counts["source_steps"] = len(last)
    ends = ~last & (done | np.roll(last, -1))
    start = 0
    for end in np.flatnonzero(ends).tolist():
        while last[start]:
            start += 1
        rows, start = slice(start, end + 1), end + 1
        length = end + 1 - rows.start
        terminations, truncations = np.zeros((2, length), bool)
        terminations[-1], truncations[-1] = done[end], not done[end]
        counts.update({"episodes": 1, "steps": length, "done": int(done[end])})
        counts["trajectories"] += int(last[end + 1])
        yield {
            "observations": steps["observations"][rows.start : end + 2],
            "actions": steps["actions"][rows].clip(-1, 1),
            "rewards": steps["rewards"][rows],
            "terminations": terminations,
            "truncations": truncations,
        }


# ---- Minari's store


def convert(task: Task, path: Path) -> dict:
    """Write OGBench's file as `task.minari_id` into Minari's store; returns the counts."""
    target = get_dataset_path(task.minari_id)
    if target.exists() and not is_stored(task):
        raise Problem(f"{target} is there and no dataset: move it away")
    with open_source(path, task) as file:
        steps = read_steps(task, file, path)
    counts = Counter(dict.fromkeys(("steps", "episodes", "trajectories", "done"), 0))
    with d4rl.replacing(target) as folder:
        storage = MinariStorage.new(
            folder,
            observation_space=gym.spaces.Box(-np.inf, np.inf, (task.obs_dim,), np.float64),
            action_space=gym.spaces.Box(-1.0, 1.0, (task.act_dim,), np.float32),
            env_spec=task.env_spec,
        )
        progress = d4rl.Progress(f"converting {task.name}", "steps")
        total = int((~steps["last"]).sum())
        d4rl.write_episodes(folder, cut_episodes(steps, counts), progress, total)
        if not counts["episodes"]:
            raise Problem(f"{path} has no step whose next observation is known: fetch it again")
        storage.update_metadata(metadata(task, path, dict(counts)))
        storage.update_metadata({"dataset_size": float(storage.get_size())})  # MB
    return counts


def is_stored(task: Task) -> bool:
    return (get_dataset_path(task.minari_id) / "data" / "metadata.json").exists()


def metadata(task: Task, path: Path, counts: dict) -> dict:
    """What Minari's metadata.json says of the set, beside its spaces and environment."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "dataset_id": task.minari_id,
        "minari_version": minari.__version__,
        "total_episodes": counts["episodes"],
        "total_steps": counts["steps"],
        "source": f"{SOURCE} {digest}",
        "source_file": path.name,
        "counts": counts,
        "author": {"Seohong Park", "Kevin Frans", "Benjamin Eysenbach", "Sergey Levine"},
        "code_permalink": "https://github.com/seohongpark/ogbench",
        "description": f"OGBench's {task.name} (arXiv 2410.20092), converted from its npz file.",
        "requirements": ["ogbench==1.2.2"],
    }


# ---- command line


def show_table(table: dict[str, list[Task]]) -> None:
    """Print the data sets, their default tasks and what is in the store."""
    columns = "{:<28} {:>4} {:>4} {:>6} {:>8}  {}\n"
    text = columns.format("data", "obs", "act", "limit", "default", "in the store as")
    for name, tasks in table.items():
        first, stored = tasks[0], [task.minari_id for task in tasks if is_stored(task)]
        sizes = (first.obs_dim, first.act_dim, first.max_episode_steps)
        text += columns.format(name, *sizes, f"task{first.number}", " ".join(stored) or "-")
    sys.stdout.write(text)


def report(task: Task, counts: dict) -> None:
    """Print what became of the file."""
    print(
        f"{task.minari_id}: {counts['steps']:,} steps of {counts['trajectories']:,} trajectories "
        f"({counts['source_steps']:,} states), {counts['done']:,} in a done state, "
        f"{counts['episodes']:,} episodes"
    )
    if counts["clipped_steps"]:
        print(f"  clipped steps: {counts['clipped_steps']:,}, by {counts['largest_excess']:.6g}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises Problem where it makes no sense."""
    parser = d4rl.Parser(description="Convert OGBench's npz files into Minari's store.")
    names = "antmaze-large-navigate, or one with -singletask-task3-v0 behind it"
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=names)
    parser.add_argument("--file", type=Path, help="OGBench's file, fetched by hand (for one task)")
    parser.add_argument("--list", action="store_true", help="show all data, and the store's")
    parser.add_argument("--url-base", default=URL_BASE, help="a mirror of %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="downloads (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a set that is in the store")
    args = parser.parse_args(argv)
    if not args.tasks and not args.list:
        parser.error("name a task")
    if args.file and len(args.tasks) != 1:
        parser.error("--file goes with one task")
    if not args.url_base.startswith(("http://", "https://")):
        parser.error("--url-base begins with http:// or https://")
    return args


def run(task: Task, args: argparse.Namespace, pauses: Iterable[float]) -> int:
    """Download and convert one task; returns 0 or 2, for the next task may still go well."""
    try:
        if is_stored(task) and not args.force:
            print(f"{task.minari_id} is in the store already; --force replaces it")
            return 0
        path = args.file or args.cache.expanduser() / task.file
        if not args.file and not path.exists():
            url = f"{args.url_base.rstrip('/')}/{task.file}"
            command = f"{COMMAND} {task.name} --file {path.name}"
            d4rl.download(url, path, lambda part: open_source(part, task), command, pauses)
        report(task, convert(task, path))
        return 0
    except (Problem, OSError) as error:
        return d4rl.fail(error)


def main(argv: list[str] | None = None, pauses: Iterable[float] = d4rl.PAUSES) -> int:
    """Exit code: 0, or 2 after an error (one line on stderr each), or 130 when interrupted."""
    try:
        args, table = parse(argv), read_table()
        tasks = [find_task(name, table) for name in args.tasks]
        if args.list:
            show_table(table)
        return max([run(task, args, pauses) for task in tasks], default=0)
    except (Problem, OSError) as error:
        return d4rl.fail(error)
    except KeyboardInterrupt:
        print(d4rl.INTERRUPTED, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
