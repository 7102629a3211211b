"""Convert the DQN replay logs of Atari (arXiv 1907.04543) into Minari's store.

    python datasets/dqn_replay.py Breakout --share 0.01            # download all, convert a part
    python datasets/dqn_replay.py breakout-run1-1pct               # the same
    python datasets/dqn_replay.py Pong --shards 0 1 --folder logs  # files fetched by hand
    python datasets/dqn_replay.py --list

Agarwal et al. logged all that a DQN saw of 60 games, in 5 runs each: 50 shards of 1M agent steps,
in <Game>/<run>/replay_logs/. They become `dqn-replay/<game>/run1-v0`; a part of them is named after
it, as `run1-1pct-v0` or `run1-shards-0-1-v0`. A shard is read and written piece by piece, and the
frames stay single: whoever needs stacks makes them.

Which 1 percent: `--share 0.01` takes the first hundredth of each shard, as CQL's authors do: play
of every age of the learner, in whole stretches. (d3rlpy samples single transitions of the shards.)

Episodes, after what Dopamine's buffer writes:
- A shard is the buffer whenever it was nearly full: its last row, and in the last shard all from
  `add_count` on, is of the round before. It is left out.
- Three rows of zeros come before every episode, for stacks; they are left out.
- A terminal ends an episode. What followed it was not recorded and is a frame of zeros, from which
  nobody bootstraps. Dopamine marks its limit of 27,000 steps as a terminal, too: such an episode is
  truncated here, without its last step, whose next frame is unknown.
- The end of a shard cuts an episode, which then has no end, again without its last step; the
  next shard's first rows are an episode of their own, whose length counts from there: one that
  reaches the limit of 27,000 steps in it stays a terminal.
- Rewards are as Dopamine kept them: clipped to [-1, 1]. Those of the environment are not.
- All this is counted, printed, and stored in the metadata as `counts`.

The environment is that of the logs: `ALE/<Game>-v5` with sticky actions (0.25), every fourth frame,
84 x 84 grey, no end at a lost life, 27,000 steps. `atari.csv` beside this file has the number of
actions of each game (ALE's minimal sets) and the returns that score 0 (random) and 100 (human): the
figures of DQN Zoo, as in ml-jku/RA-DT's src/envs/hn_scores.py; 5 games have none.
"""

import argparse
import csv
import dataclasses
import difflib
import functools
import gzip
import importlib.util
import itertools
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec, WrapperSpec
from minari.dataset.minari_storage import MinariStorage
from minari.storage import get_dataset_path

TABLE = Path(__file__).resolve().with_name("atari.csv")
URL_BASE = "https://storage.googleapis.com/atari-replay-datasets/dqn"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "stitch" / "dqn_replay"
COMMAND = "python datasets/dqn_replay.py"
BROKEN = (OSError, EOFError, ValueError, zlib.error, MemoryError)  # what a bad file raises
SHARDS = 50
FRAME = (84, 84)
PADDING = 3  # rows of zeros before an episode
LIMIT = 27_000  # agent steps of an episode
SKIP = 4  # frames of an agent's step
GZIP = 1  # level: on Breakout 4 takes twice as long for 72 percent of the size
# the logs' arrays: the types that they may have, and the shape of a row (None: a single number)
ARRAYS = {"observation": ("u1", FRAME), "action": ("i4 i8 u1", ()), "reward": ("f4 f8", ())}
ARRAYS |= {"terminal": ("u1 b1", ()), "add_count": ("i4 i8", None)}
STEPS = ("action", "reward", "terminal")

SPEC = importlib.util.spec_from_file_location("d4rl", TABLE.with_name("d4rl.py"))
d4rl = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(d4rl)
Problem = d4rl.D4RLError  # what is wrong and how to mend it, in one line


@dataclass(frozen=True)
class Log:
    """A run of a game, or the part of it that is asked for."""

    game: str  # BeamRider, as ALE and the logs have it
    actions: int
    ref_min_score: float | None
    ref_max_score: float | None
    run: int = 1
    shards: tuple[int, ...] = ()  # empty: all
    share: float = 1.0  # of each shard, from its beginning

    @property
    def rom(self) -> str:
        """beam_rider, as ALE names it."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.game).lower()

    @property
    def minari_id(self) -> str:
        parts = [f"run{self.run}"]
        parts += [f"shards-{'-'.join(map(str, self.shards))}"] if self.shards else []
        parts += [f"{100 * self.share:g}pct".replace(".", "_")] if self.share < 1 else []
        return f"dqn-replay/{self.rom.replace('_', '-')}/{'-'.join(parts)}-v0"

    @property
    def place(self) -> str:
        return f"{self.game}/{self.run}/replay_logs"

    @property
    def env_spec(self) -> EnvSpec:
        kwargs = {"game": self.rom, "frameskip": 1, "repeat_action_probability": 0.25}
        kwargs |= {"full_action_space": False, "max_num_frames_per_episode": SKIP * LIMIT}
        name, seen = "AtariPreprocessing", {"noop_max": 0, "frame_skip": SKIP, "screen_size": 84}
        seen |= {"terminal_on_life_loss": False, "grayscale_obs": True, "scale_obs": False}
        return EnvSpec(
            f"ALE/{self.game}-v5",
            entry_point="ale_py.env:AtariEnv",
            max_episode_steps=SKIP * LIMIT,  # which counts what is below the wrapper: frames
            kwargs=kwargs,
            additional_wrappers=(WrapperSpec(name, f"gymnasium.wrappers:{name}", seen),),
        )


def read_table() -> dict[str, Log]:
    """Every game's run 1 by its name."""
    table = {}
    with TABLE.open(newline="") as file:
        for row in csv.DictReader(file):
            scores = (float(row[f"ref_{end}_score"] or "nan") for end in ("min", "max"))
            low, high = (None if np.isnan(score) else score for score in scores)
            table[row["game"]] = Log(row["game"], int(row["actions"]), low, high)
    return table


def find_game(name: str, table: dict[str, Log]) -> Log:
    """A game by its name, however it is written. Raises Problem with near names."""
    plain = {game.lower(): log for game, log in table.items()}
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    if word in plain:
        return plain[word]
    near = [plain[each].game for each in difflib.get_close_matches(word, plain)]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise Problem(f"{name} is no game of the logs: {hint}--list shows all")


# ---- a shard


def file_name(array: str, shard: int) -> str:
    stored = "" if array == "add_count" else "$store$_"
    return f"{stored}{array}_ckpt.{shard}.gz"


class Stream:
    """A gzipped .npy file, read row by row from its beginning. Raises Problem where it is broken.

    `types` and `inner` are as in ARRAYS.
    """

    def __init__(self, path: Path, types: str, inner: tuple | None):
        self.path = path
        if not path.is_file():
            raise Problem(f"{path} is not there: fetch it, or choose other --shards")
        with self.told():
            self.file = gzip.open(path)
            version = np.lib.format.read_magic(self.file)
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, fortran, self.dtype = read[version[0]](self.file)
        self.rows, self.inner = shape[0] if shape else 1, shape[1:]
        right = shape == () if inner is None else shape[1:] == inner and self.rows > 0
        known = self.dtype.str[1:] in types.split()
        if not right or not known or (fortran and len(shape) > 1):
            told = f"has numbers of type {self.dtype} and shape {shape}"
            raise Problem(f"{path} {told}: give the logs' own {path.name}")

    @contextmanager
    def told(self) -> Iterator[None]:
        try:
            yield
        except (*BROKEN, KeyError):
            text = f"{self.path} is no gzipped .npy file or is cut short"
            raise Problem(f"{text}: delete it and fetch it again") from None

    def read(self, rows: int, out: np.ndarray | None = None) -> np.ndarray:
        """The next rows [rows, *inner], into the array `out` where it is given."""
        with self.told():
            out = np.empty((rows, *self.inner), self.dtype) if out is None else out
            view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
            while done < len(view):
                got = self.file.readinto(view[done:])
                if not got:
                    raise EOFError
                done += got
        return out

    def finish(self) -> None:
        """Read what is left: gzip's checksum comes at the end."""
        with self.told():
            while self.file.read(1 << 20):
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def open_array(folder: Path, name: str, shard: int) -> Stream:
    return Stream(folder / file_name(name, shard), *ARRAYS[name])


@contextmanager
def open_shard(folder: Path, shard: int) -> Iterator[dict[str, Stream]]:
    """The arrays of a shard, at their first rows."""
    with ExitStack() as stack:
        streams = {}
        for name in ("observation", *STEPS):
            streams[name] = stack.enter_context(open_array(folder, name, shard))
        first = streams["action"]
        for stream in streams.values():
            if stream.rows != first.rows:
                told = f"{stream.path} has {stream.rows:,} rows, {first.path.name} {first.rows:,}"
                raise Problem(f"{told}: give files of one shard")
        yield streams


def fresh_rows(folder: Path, shard: int, rows: int) -> int:
    """How many rows are of the shard's own round of the buffer; all but one without add_count."""
    if not (folder / file_name("add_count", shard)).exists():
        return rows - 1
    with open_array(folder, "add_count", shard) as stream:
        return int(stream.read(1)[0]) % rows or rows


def read_shard(folder: Path, shard: int, log: Log, counts: Counter) -> Iterator[dict]:
    """A shard's episodes in Minari's layout; fills `counts`.

    observations [T+1, 84, 84] uint8; actions int64, rewards float32, terminations and truncations
    bool, all [T].
    """
    with open_shard(folder, shard) as streams:
        total = streams["action"].rows
        fresh = fresh_rows(folder, shard, total)
        rows = min(fresh, round(log.share * total))
        counts.update({"source_rows": rows, "stale_rows": total - fresh})
        steps = {name: streams[name].read(rows) for name in STEPS}
        for name in STEPS:
            streams[name].finish()
        check_steps(steps, streams, log)
        ends = steps["terminal"] != 0
        ends[-1:] = True
        start = 0
        for end in np.flatnonzero(ends).tolist():
            while start <= end:  # more than an episode can have, without an end, comes in pieces
                stop = min(end + 1, start + PADDING + LIMIT)
                part = {name: values[start:stop] for name, values in steps.items()}
                yield from cut_episode(streams["observation"], part, counts)
                start = stop
        if rows == fresh:  # else the rest may take a minute to read, and nothing of it is used
            streams["observation"].finish()


def check_steps(steps: dict, streams: dict, log: Log) -> None:
    """Raise Problem at the first row that the game or the logs cannot have."""
    faults = {
        "action": ~((steps["action"] >= 0) & (steps["action"] < log.actions)),
        "reward": ~np.isfinite(steps["reward"]),
        "terminal": ~np.isin(steps["terminal"], (0, 1)),
    }
    for name, wrong in faults.items():
        if wrong.any():
            row = int(wrong.argmax())
            told = f"{streams[name].path} has the {name} {steps[name][row]} in row {row:,}"
            known = f" of {log.actions} actions" if name == "action" else ""
            raise Problem(f"{told}{known}: give {log.game}'s own files, or fetch them again")


def cut_episode(frames: Stream, steps: dict, counts: Counter) -> Iterator[dict]:
    """One episode of the next rows of the stream, or none if nothing but padding remains."""
    length = len(steps["action"])
    obs = np.empty((length + 1, *FRAME), np.uint8)
    frames.read(length, obs[:-1])
    obs[-1] = 0
    blank = (steps["action"][:PADDING] == 0) & (steps["reward"][:PADDING] == 0)
    blank &= (steps["terminal"][:PADDING] == 0) & ~obs[: min(PADDING, length)].any((1, 2))
    skip = int(np.append(blank, False).argmin())
    counts["padding"] += skip
    terminated = bool(steps["terminal"][-1]) and length - skip < LIMIT
    stop = length if terminated else length - 1  # what followed the last row is unknown
    if stop <= skip:
        return
    how = "terminated" if terminated else "timed_out" if steps["terminal"][-1] else "cut"
    counts.update({"episodes": 1, "steps": stop - skip, how: 1})
    last = np.arange(skip, stop) == stop - 1
    yield {
        "observations": obs[skip : stop + 1],
        "actions": steps["action"][skip:stop].astype(np.int64),
        "rewards": steps["reward"][skip:stop].astype(np.float32),
        "terminations": last & terminated,
        "truncations": last & (how == "timed_out"),
    }


# ---- Minari's store


def convert(log: Log, folder: Path) -> dict:
    """Write the logs as `log.minari_id` into Minari's store; returns the counts."""
    target = get_dataset_path(log.minari_id)
    if target.exists() and not is_stored(log):
        raise Problem(f"{target} is there and no dataset: move it away")
    shards, total = log.shards or range(SHARDS), 0
    for shard in shards:  # what is missing is told before hours of work
        with open_shard(folder, shard) as streams:
            total += round(log.share * streams["action"].rows)
    counts = Counter(dict.fromkeys(("steps", "episodes", "terminated", "timed_out", "cut"), 0))
    counts["padding"] = 0
    with d4rl.replacing(target) as built:
        storage = MinariStorage.new(
            built,
            observation_space=gym.spaces.Box(0, 255, FRAME, np.uint8),
            action_space=gym.spaces.Discrete(log.actions),
            env_spec=log.env_spec,
            jpeg_encoding=False,  # which would lose what a frame is
        )
        episodes = (each for shard in shards for each in read_shard(folder, shard, log, counts))
        progress = d4rl.Progress(f"converting {log.game}", "steps")
        d4rl.write_episodes(built, episodes, progress, total, gzip=GZIP)
        if not counts["episodes"]:
            raise Problem(f"{folder} has no step in this part: give more --shards or --share")
        storage.update_metadata(metadata(log, dict(counts)))
        storage.update_metadata({"dataset_size": float(storage.get_size())})  # MB
    return counts


def is_stored(log: Log) -> bool:
    return (get_dataset_path(log.minari_id) / "data" / "metadata.json").exists()


def metadata(log: Log, counts: dict) -> dict:
    """What Minari's metadata.json says of the set, beside its spaces and environment."""
    scores = {"ref_min_score": log.ref_min_score, "ref_max_score": log.ref_max_score}
    return {
        "dataset_id": log.minari_id,
        "minari_version": minari.__version__,
        "total_episodes": counts["episodes"],
        "total_steps": counts["steps"],
        "source": f"dqn-replay {log.place}",
        "shards": list(log.shards or range(SHARDS)),
        "share": log.share,
        "counts": counts,
        "environment_differs": "the data's rewards are clipped to [-1, 1], so are their returns",
        "author": {"Rishabh Agarwal", "Dale Schuurmans", "Mohammad Norouzi"},
        "code_permalink": "https://github.com/google-research/batch_rl",
        "description": f"DQN's replay log of {log.game}, run {log.run} (arXiv 1907.04543).",
        "requirements": ["ale-py", "opencv-python"],
    } | (scores if log.ref_max_score is not None else {})


# ---- command line


def show_table(table: dict[str, Log]) -> None:
    """Print the games."""
    columns = "{:<18} {:>7} {:>10} {:>10}\n"
    text = columns.format("game", "actions", "ref min", "ref max")
    for log in table.values():
        scores = ("-" if x is None else f"{x:.1f}" for x in (log.ref_min_score, log.ref_max_score))
        text += columns.format(log.game, log.actions, *scores)
    sys.stdout.write(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises Problem where it makes no sense."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = d4rl.Parser(description=__doc__, **style)
    parser.add_argument("game", nargs="?", metavar="GAME", help="Breakout, or space-invaders")
    parser.add_argument("--folder", type=Path, help="the logs, fetched by hand: the folder of the "
                        "files, or one with <Game>/<run>/replay_logs in it")  # fmt: skip
    parser.add_argument("--run", type=int, default=1, help="1 to 5 (1)")
    parser.add_argument("--shards", type=int, nargs="+", default=[], help="of 0 to 49 (all)")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of each shard, from its start (1)"
    )
    parser.add_argument("--list", action="store_true", help="show the games")
    parser.add_argument("--url-base", default=URL_BASE, help="a mirror of %(default)s")
    parser.add_argument("--cache", type=Path, default=CACHE, help="downloads (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a set that is in the store")
    args = parser.parse_args(argv)
    part = r"([\w-]+?)-run(\d)(?:-shards-(\d+(?:-\d+)*))?(?:-(\d+(?:_\d+)?)pct)?(?:-v0)?"
    named = re.fullmatch(part, args.game or "")
    if named:  # as scripts call a set that is missing
        args.game, args.run = named[1], int(named[2])
        args.shards = [int(shard) for shard in named[3].split("-")] if named[3] else args.shards
        args.share = float(named[4].replace("_", ".")) / 100 if named[4] else args.share
    if not args.game and not args.list:
        parser.error("name a game")
    if not 1 <= args.run <= 5:
        parser.error(f"--run {args.run}: the logs have runs 1 to 5")
    if not all(0 <= shard < SHARDS for shard in args.shards):
        parser.error(f"--shards {' '.join(map(str, args.shards))}: a run has shards 0 to 49")
    if not 0 < args.share <= 1:
        parser.error(f"--share {args.share:g}: give more than 0 and at most 1")
    if not args.url_base.startswith(("http://", "https://")):
        parser.error("--url-base begins with http:// or https://")
    return args


def fetch(log: Log, args: argparse.Namespace, pauses: Iterable[float], timeout: float) -> Path:
    """Download what the cache lacks; returns the folder of the files."""
    folder = args.cache.expanduser() / log.place
    for shard, name in itertools.product(log.shards or range(SHARDS), ARRAYS):
        path = folder / file_name(name, shard)
        if not path.exists():
            url = f"{args.url_base.rstrip('/')}/{log.place}/{path.name}"
            look = functools.partial(lambda name, part: Stream(part, *ARRAYS[name]), name)
            command = f"{COMMAND} {log.game} with --folder and the folder of the files"
            d4rl.download(url, path, look, command, pauses, timeout)
    return folder


def run(log: Log, args: argparse.Namespace, pauses: Iterable[float], timeout: float) -> None:
    """Download and convert."""
    if is_stored(log) and not args.force:
        print(f"{log.minari_id} is in the store already; --force replaces it")
        return
    if args.folder:
        inner = args.folder / log.place
        folder = inner if inner.is_dir() else args.folder
    else:
        folder = fetch(log, args, pauses, timeout)
    counts = convert(log, folder)
    keys = ("episodes", "terminated", "timed_out", "cut", "padding", "stale_rows")
    words = ", ".join(f"{counts[key]:,} {key.replace('_', ' ')}" for key in keys)
    steps = f"{counts['steps']:,} steps of {counts['source_rows']:,} rows"
    print(f"{log.minari_id}: {steps}, {words}")


def main(
    argv: list[str] | None = None,
    pauses: Iterable[float] = d4rl.PAUSES,
    timeout: float = d4rl.TIMEOUT,
) -> int:
    """Exit code: 0, or 2 after an error (one line on stderr), or 130 when interrupted."""
    try:
        args, table = parse(argv), read_table()
        if args.list:
            show_table(table)
        if args.game:
            part = {"run": args.run, "shards": tuple(sorted(set(args.shards)))}
            log = find_game(args.game, table)
            run(dataclasses.replace(log, **part, share=args.share), args, pauses, timeout)
        return 0
    except (Problem, OSError) as error:
        return d4rl.fail(error)
    except KeyboardInterrupt:
        print(d4rl.INTERRUPTED, file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
