"""Run algorithms x tasks x seeds x settings: on this machine, a Ray cluster or Slurm.

    python tools/sweep.py sweep.yaml
    python tools/sweep.py --algorithms bc iql --tasks hopper-medium --seeds 0 1 2 3 --out runs/first
    python tools/sweep.py --algorithms iql --tasks hopper-medium --set tau=0.01,0.005 --out runs/t

The file holds `algorithms` (folders of configs/), `tasks` (their files), `seeds` (first seeds),
`settings` (field: value, or a list of values to try), `out` (a folder) and `slurm` (parameters of
submitit); what the command line says takes their place. A run lies in
OUT/<algorithm>/<task>/<values tried>/s<seed>, and what it prints beside it in s<seed>.log.

Started again, a sweep skips what is finished, goes on with what was interrupted and waits for runs
that an earlier start left behind. A run that fails is tried twice. Exit code: 0, 1 where runs
failed, 2 where the sweep makes no sense, 130 where it was interrupted.

    here              one process a core (--workers), one thread each
    --address A       a Ray cluster; this repository, OUT and the folder that this is started in lie
                      at the same paths everywhere
    --slurm           an array of Slurm jobs through submitit; the same
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pyrallis
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
# Scripts of those folders of configs/ that are not named as theirs.
SCRIPTS = {"bc_10": "bc", "sac_n": "edac", "lb_sac": "edac", "xql_c": "xql", "qr_dqn": "dqn"}
SCRIPTS |= {"rem": "dqn"}
# Settings that a finished run may have otherwise.
FREE = {"fallback_dataset_id", "download", "run_dir", "resume", "wandb", "wandb_project"}
OWN = {"seed": "seeds", "config": "algorithms and tasks", "run_dir": "out"}  # what gives them here
PAUSE = 0.5  # seconds between looks at the runs


class SweepError(Exception):
    """What is wrong with the sweep and how to mend it, in one line."""


@dataclass
class Job:
    """A run: its command, its folder, and how far it is."""

    algorithm: str
    folder: Path
    command: list  # of strings
    config: dict
    usual: dict  # what an older script, which lacks a setting, did
    updates: int  # in all
    here: str  # the folder that relative paths start from

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()

    def done(self) -> float:
        """The share of its updates that is logged."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
                whole = file.read().rpartition(b"\n")[0]  # a row may be in writing
                return json.loads(whole.splitlines()[-1])["update"] / self.updates
        except (OSError, ValueError, IndexError, KeyError, TypeError):
            return 0.0  # nothing is logged yet


@functools.cache
def load_script(name: str):
    """algorithms/NAME.py as a module."""
    path = REPOSITORY / "algorithms" / f"{name}.py"
    if not path.is_file():
        raise SweepError(f"algorithms: there is no {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(args) -> list[Job]:
    """Every run of the sweep. Raises SweepError where one of them could not begin."""
    tried = {k: v if isinstance(v, list) else [v] for k, v in args.settings.items()}
    cases = [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
    shown = [name for name, values in tried.items() if len(values) > 1]
    axes = (args.algorithms, args.tasks, cases, args.seeds)
    jobs, trained = [make_job(args.out, shown, *one) for one in itertools.product(*axes)], set()
    for job in jobs:
        first, count = job.config["seed"], job.config["num_seeds"]
        own = {(job.folder.parent, seed) for seed in range(first, first + count)}
        for folder, seed in sorted(own & trained):
            mend = f"name all once, and first seeds at least {count} apart (num_seeds)"
            raise SweepError(f"two runs train seed {seed} in {folder}: {mend}")
        trained |= own
    same = {}
    for job in jobs:
        settings = json.dumps({**job.config, "run_dir": ""}, sort_keys=True)
        other = same.setdefault((job.algorithm, settings), job.folder)
        if other != job.folder:
            raise SweepError(f"{job.folder} and {other} are the same settings: name each once")
    return jobs


def make_job(out: str, shown: list, algorithm: str, task: str, case: dict, seed: int) -> Job:
    """One run; its settings are read by its own script."""
    script = load_script(SCRIPTS.get(algorithm, algorithm))
    config = REPOSITORY / "configs" / algorithm / f"{task}.yaml"
    if not config.is_file():
        raise SweepError(f"tasks: there is no {config}")
    tried = ",".join(f"{name}={case[name]}" for name in shown).replace("/", "%2F")  # one folder
    folder = Path(out, algorithm, task, tried, f"s{seed}").resolve()
    try:
        for spec in (x for x in dataclasses.fields(script.TrainConfig) if x.name in case):
            script.checked(spec, case[spec.name])  # as a file's, before it becomes a word
        words = {"config": config, **case, "seed": seed, "run_dir": folder}
        line = [word for k, v in words.items() for word in (f"--{k}", as_word(v))]
        settings = script.parse(script.TrainConfig, line)
    except script.RunError as error:
        raise SweepError(f"{algorithm} on {task}: {error}") from None
    online = getattr(settings, "online_steps", 0) * getattr(settings, "updates_per_step", 0)
    updates, config = settings.num_updates + online, pyrallis.encode(settings)
    command = [sys.executable, script.__file__, *line, "--resume", "true"]
    usual = pyrallis.encode(script.TrainConfig())
    job = Job(algorithm, folder, command, config, usual, updates, os.getcwd())
    problem = difference(job) if job.finished else ""
    if problem:
        raise SweepError(problem)
    return job


def as_word(value) -> str:
    """A value of YAML as a word of the command line."""
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).strip()
    return "none" if value is None else str(value)


def stand_in(job: Job) -> str:
    """The dataset that a run was really trained on, where it is the fallback."""
    data = read(job.folder / "config.yaml").get("dataset_id")
    asked, fallback = job.config["dataset_id"], job.config["fallback_dataset_id"]
    return data if data == fallback != asked else ""


def difference(job: Job) -> str:
    """What tells the finished run in a job's folder from the job; "" where nothing does."""
    there, about = (read(job.folder / name) for name in ("config.yaml", "environment.json"))
    there, asked = {**job.usual, **there, "checkpoint": about.get("checkpoint") or ""}, job.config
    if stand_in(job):  # which leaves these
        env_id = "none" if asked["env_id"] == "none" else "auto"
        asked = {**asked, "dataset_id": there["dataset_id"], "env_id": env_id, "env_kwargs": {}}
        asked |= {"ref_min_score": None, "ref_max_score": None}
    for name in sorted(asked.keys() - FREE):
        if there.get(name) != asked[name]:
            what = f"{name} is {there.get(name)!r} there, not {asked[name]!r}"
            return f"{job.folder} holds another run ({what}): give another --out"
    return ""


CHILDREN = set()  # processes that train for this one
STOPPED = set()  # not empty once this is to end: no other run begins


def run(job: Job) -> str:
    """Train to the end; returns "" or, after two attempts, the last error. Signals end it early."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    for _ in range(2):
        wait_for_owner(job.folder)
        if job.finished:
            return difference(job)  # another sweep may have made it
        if STOPPED:
            return "not begun"
        with open(job.log, "a+b") as log:
            log.write(f"$ {shlex.join(job.command)}\n".encode())
            log.flush()
            start, options = log.tell(), {"stdout": log, "stderr": log, "env": environment}
            child = subprocess.Popen(job.command, cwd=job.here, **options)
            CHILDREN.add(child)
            if STOPPED:
                child.terminate()
            code = child.wait()
            CHILDREN.discard(child)
            log.seek(start)
            lines = log.read().decode(errors="replace").split("\n")
        error = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
        if code in (0, 130, -signal.SIGINT, -signal.SIGTERM):  # all but 0: stopped by a signal
            return error if code else ""
    return error


def wait_for_owner(folder: Path) -> None:
    """Wait for a process that an earlier sweep left behind and that still trains there."""
    if (folder / "lock").exists():
        with open(folder / "lock", "rb") as lock:
            while not STOPPED:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(PAUSE)


# ---- where runs are executed: each gives, of all jobs, what has done(), result() and cancel()


def local(args, jobs: list) -> list:
    pool = ThreadPoolExecutor(args.workers or os.cpu_count())
    return [pool.submit(run, job) for job in jobs]


def on_ray(args, jobs: list) -> list:
    with asked_for("ray", f"--address {args.address}"):
        import ray

        ray.init(address=args.address, log_to_driver=False, logging_level="ERROR")
    remote = ray.remote(num_cpus=1, num_gpus=args.gpus)(run)
    return [remote.remote(job).future() for job in jobs]


def on_slurm(args, jobs: list) -> list:
    with asked_for("submitit", f"--slurm {args.slurm} (slurm: {args.parameters})"):
        import submitit

        executor = submitit.AutoExecutor(folder=Path(args.out, "slurm"), cluster=args.slurm)
        executor.update_parameters(**args.parameters)
        return executor.map_array(run, jobs)


@contextlib.contextmanager
def asked_for(package: str, words: str):
    try:
        yield
    except ImportError:
        raise SweepError(f"this asks for: pip install {package}") from None
    except Exception as error:  # Ray and submitit have errors of all kinds
        raise SweepError(f"{words} does not start: {in_one_line(error)}") from None


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:300]}"


# ---- watching


class Watch:
    """How many runs are done, running and failed, and how long the rest may take."""

    def __init__(self, jobs: list, futures: list, skipped: int):
        self.pairs, self.skipped = list(zip(jobs, futures, strict=True)), skipped
        self.before = [job.done() for job in jobs]  # by earlier sweeps
        self.start, self.told = time.time(), 0.0
        # Number of a job -> time, (time, share done) of the first row, time, last error.
        self.began, self.first, self.ended, self.errors = {}, {}, {}, {}

    def look(self) -> bool:
        """Note what has begun and ended; whether all have."""
        for i, (job, future) in enumerate(self.pairs):
            if i not in self.began and job.log.exists() and job.log.stat().st_mtime >= self.start:
                self.began[i] = time.time()
            if i in self.began and i not in self.ended:
                share = job.done()
                self.before[i] = min(self.before[i], share)  # cut back to its checkpoint
                if share > self.before[i] and share < self.first.get(i, (0, 2))[1]:
                    self.first[i] = time.time(), share
            if i not in self.ended and future.done():
                self.ended[i] = time.time()
                error = outcome(future)
                self.errors |= {i: error} if error else {}
        return len(self.ended) == len(self.pairs)

    def seconds_left(self) -> float | None:
        """From what the runs of an algorithm took for the share of their updates that is done.

        The start of a run, in which it may compile, counts once it has ended.
        """
        whole, shares = {}, [job.done() for job, _ in self.pairs]
        for i, began in self.began.items():
            over = i in self.ended
            since, before = (began, self.before[i]) if over else self.first.get(i, (began, 1))
            share = (1 if over else shares[i]) - before
            if share > 0 and i not in self.errors:
                took = (self.ended.get(i, time.time()) - since) / share
                whole.setdefault(self.pairs[i][0].algorithm, []).append(took)
        if not whole:
            return None
        means = {name: sum(took) / len(took) for name, took in whole.items()}
        usual = sum(means.values()) / len(means)
        rest = [i for i in range(len(shares)) if i not in self.ended]
        left = sum((1 - shares[i]) * means.get(self.pairs[i][0].algorithm, usual) for i in rest)
        return left / max(1, len(self.began.keys() - self.ended.keys()))

    def tell(self) -> None:
        """A line on standard output, on a terminal the same one."""
        live, over = sys.stdout.isatty(), len(self.ended) == len(self.pairs)
        if not over and time.monotonic() - self.told < (1 if live else 30):
            return
        self.told, left = time.monotonic(), self.seconds_left()
        done = self.skipped + len(self.ended) - len(self.errors)
        running = len(self.began.keys() - self.ended.keys())
        text = f"{done} of {self.skipped + len(self.pairs)} done, {running} running, "
        text += f"{len(self.errors)} failed"
        text += "" if over or left is None else f", {timedelta(seconds=round(left))} left"
        say(text.ljust(79), "\r" if live and not over else "\n")


def say(text: str, end: str = "\n") -> None:
    """On standard output; where that is closed by now, the runs go on without a word."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def outcome(future) -> str:
    """The last error of a run, also where its machine was lost."""
    try:
        return future.result()
    except Exception as error:  # Ray and submitit have errors of their own
        return in_one_line(error)


def sweep(args) -> int:
    """Run what is not finished and wait for it."""
    jobs = plan(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    rest = [job for job in jobs if not job.finished]
    say(f"{len(jobs)} runs in {args.out}, {len(jobs) - len(rest)} of them finished")
    where = on_ray if args.address else on_slurm if args.slurm else local
    futures = []
    STOPPED.clear()
    try:
        futures += where(args, rest)
        watch = Watch(rest, futures, len(jobs) - len(rest))
        while not watch.look():
            watch.tell()
            time.sleep(PAUSE)
    except BaseException:
        STOPPED.add("by a signal or an error")
        for future in futures:
            future.cancel()
        for child in list(CHILDREN):
            child.terminate()  # it saves a checkpoint
        raise
    watch.tell()
    ended = [(stand_in(job), job.config["dataset_id"]) for job in jobs if job.finished]
    for (data, asked), count in Counter(ended).items():
        if data:
            mend = "once that is here, move them away to train anew"
            say(f"other data: {count} runs are of {data}, not of {asked}; {mend}")
    for i, error in watch.errors.items():
        print(f"failed: {rest[i].folder}: {error} (see {rest[i].log})", file=sys.stderr)
    return 1 if watch.errors else 0


# ---- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SweepError(f"{message}: --help shows how to call this")


def parse(argv) -> argparse.Namespace:
    """The sweep: the file's, with the command line's words in their place."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(description=__doc__, **style)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a YAML file")
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--algorithms", **several, metavar="A", help="folders of configs/")
    parser.add_argument("--tasks", **several, metavar="T", help="files there, without .yaml")
    parser.add_argument("--seeds", **several, type=int, metavar="S", help="first seeds (0)")
    parser.add_argument("--set", **several, metavar="FIELD=VALUE[,VALUE]", help="settings")
    parser.add_argument("--out", help="folder of the runs")
    parser.add_argument("--workers", type=int, help="runs at once on this machine (its cores)")
    parser.add_argument("--address", help="of a Ray cluster")
    parser.add_argument("--gpus", type=float, default=0, help="of a run on Ray, such as 0.25")
    parser.add_argument("--slurm", nargs="?", const="slurm", help="submit to Slurm")
    args = parser.parse_args(argv)
    if args.slurm and Path(args.slurm).suffix in (".yaml", ".yml"):
        raise SweepError(f"--slurm {args.slurm}: the file goes before --slurm")
    values = read_sweep(args.file) if args.file else {}
    if args.workers is not None and args.workers < 1:
        raise SweepError(f"--workers {args.workers}: at least 1 run goes at a time")
    pairs = [word.partition("=") for word in args.set or ()]
    for word, equals, _ in pairs:
        if not equals:
            raise SweepError(f"--set {word}: write it as FIELD=VALUE or FIELD=VALUE,VALUE")
    lists = {name: "," in text and text[0] != "{" for name, _, text in pairs}
    named = {name: text.split(",") if lists[name] else text for name, _, text in pairs}
    if len(named) < len(pairs):
        raise SweepError(f"--set: a field is named twice in {args.set}: write FIELD=VALUE,VALUE")
    args.settings = {**(values.get("settings") or {}), **named}
    args.parameters = values.get("slurm") or {}
    for name, usual in (("algorithms", []), ("tasks", []), ("seeds", [0]), ("out", "")):
        words = getattr(args, name)
        setattr(args, name, values.get(name, usual) if words is None else words)
        if not getattr(args, name):
            raise SweepError(f"{name}: nothing is named; --{name} or a line of the file does it")
    check_entries(args)
    return args


def check_entries(args) -> None:
    """Names are text, seeds whole numbers, and a setting has a value and no other place."""
    for name, kind in (("algorithms", str), ("tasks", str), ("seeds", int)):
        for entry in getattr(args, name):
            if type(entry) is not kind:
                wanted = "a whole number" if kind is int else "text"
                raise SweepError(f"{name}: {entry!r} is not {wanted}")
            if "/" in str(entry):
                raise SweepError(f"{name}: {entry} is a path, not a name of configs/")
    for name, value in args.settings.items():
        if name in OWN or name == "resume":
            raise SweepError(f"settings: {name} comes of {OWN.get(name, 'this tool')}")
        if value == []:
            raise SweepError(f"settings: {name} has no value to try")


def read(path: Path, loader=yaml.SafeLoader) -> dict:
    """A YAML file of names and values."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SweepError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SweepError(f"{path} holds no names and values, such as 'algorithms: [bc, iql]'")
    return values


def read_sweep(path: Path) -> dict:
    """A sweep's file."""
    values = read(path, load_script("iql").UniqueKeys)
    kinds = dict.fromkeys(("algorithms", "tasks", "seeds"), list)
    kinds |= {"settings": dict, "slurm": dict, "out": str}
    for name, value in values.items():
        if name not in kinds:
            raise SweepError(f"{path}: there is no {name}; --help says what there is")
        if not isinstance(value, kinds[name]):
            kind = {dict: "a mapping", str: "text", list: "a list"}[kinds[name]]
            raise SweepError(f"{path}: {name} is not {kind}")
    return values


def main(argv=None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return sweep(parse(argv))
    except (SweepError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
