"""How fast the scripts train, how close that comes to the machine, and where the time goes.

    python benchmarks/speed.py                                # every script, 1 to 8 members
    python benchmarks/speed.py iql cql --members 1 4 --modes eager --out /tmp/speed.json

Each script trains with its default settings on the bundled Hopper data (observations of 11, actions
of 3 numbers), by the updates of a run, evaluation apart. Windows of all variants of a script
alternate, so that a busy neighbour slows them alike; the medians are reported, with the threads and
the load beside them.

The yardstick is `products`: the matrix products of an update (forward and backward, attention
included), recorded in their order and shapes and made again with nothing between them; of two
updates in turn, as some policies move in every second one. `fraction` is their time divided by the
update's: 1 would be an update that costs nothing else. `shares` is a profile of the same loop; its
parts are named in SHARES, and "Python" is what no operator accounts for. `host_share` is the loop
without the agent's update: drawing and gathering batches, logging. `online_share` is what the
online phase takes besides updates, policy and environments. FLOPs are torch's own count. `--whole`
adds what a user waits for: the time from the command to the first update's row in the log, peak
memory, a short run with its evaluation, and environment steps.

The --out file is rewritten after each script; the tables are printed at the end, and with --readme
FILE they replace what stands between the marks there.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "speed.json"
DATA = "datasets/hopper/medium-replay-v0"
NUMBERED = "datasets/cartpole/uniform-10-v0"  # for scripts of numbered actions
BEGIN, END = "<!-- speed: written by benchmarks/speed.py -->", "<!-- end of speed -->"
MODES = {"eager": "false", "compiled": "true", "graphs": "graphs"}  # as `compile` has them
START = 10**6  # the first update that is measured: behind every phase of warming up
CYCLE = 2  # updates after which a script does the same again: policies may be delayed
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product")
# Operators by the part of an update that they belong to; the first that fits counts.
SHARES = {
    "products": ("mm", "bmm", "scaled_dot_product", "flash", "gemm"),
    "optimizer": ("_fused_adam", "_foreach"),
    "sampling": ("index", "randint", "random_", "uniform_", "normal_", "take", "gather"),
}


class SpeedError(Exception):
    """Something the user can mend."""


def load_script(name: str):
    """A script of algorithms/ as a module, loaded once."""
    key = f"algorithms.{name}"
    if key not in sys.modules:
        path = REPOSITORY / "algorithms" / f"{name}.py"
        if not path.is_file():
            raise SpeedError(f"there is no script {path}")
        spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def arguments(settings: dict) -> list:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- what is measured ----


def data_of(name: str) -> str:
    """The bundled set that a script is measured on."""
    return NUMBERED if hasattr(load_script(name), "DiscreteAgent") else DATA


class Training:
    """A script's run, made as the script makes it; without an environment unless `settings` ask."""

    def __init__(self, name: str, members: int, mode: str, device: str, folder: Path, **settings):
        module = load_script(name)
        words = {"dataset_id": data_of(name), "num_seeds": members, "num_updates": 10**7}
        words |= {"env_id": "none", "device": device, "compile": MODES[mode]}
        words |= {"run_dir": folder / f"{name}-{members}-{mode}", **settings}
        kinds = [c for c in vars(module).values() if isinstance(c, type)]
        (kind,) = [c for c in kinds if issubclass(c, module.Agent) and "update" in vars(c)]
        try:
            cfg = module.parse(module.TrainConfig, arguments(words))
            self.run = module.Run(cfg, kind.__name__)
            with contextlib.redirect_stdout(io.StringIO()):
                module.build(self.run, kind, getattr(module, "Online", None))
        except module.RunError as error:
            raise SpeedError(str(error)) from None
        self.run.step, self.device = START, self.run.agent.obs_mean.device
        self.members, self.mode, self.speeds = members, mode, []

    def update(self) -> None:
        self.run.update()
        self.run.window = {}

    def window(self, seconds: float) -> None:
        """Updates per second over some seconds, among the others' windows."""
        wait(self.device)
        count, began = 0, time.perf_counter()
        while count % CYCLE or time.perf_counter() - began < seconds:
            self.update()
            count += 1
        wait(self.device)
        self.speeds.append(count / (time.perf_counter() - began))


def host_seconds(training: Training) -> float:
    """What the loop takes for each update besides the agent's own work, a log row included."""
    run, count = training.run, training.run.cfg.log_every
    update, metrics = run.graph, dict.fromkeys(("loss", "q"), torch.zeros(training.members))
    run.graph, run.window = lambda *_: metrics, {}
    run.mark, run.logged = time.perf_counter(), run.step
    began = time.perf_counter()
    for _ in range(count):
        run.update()
    run.log_metrics()
    seconds, run.graph = time.perf_counter() - began, update
    return seconds / count


def online_share(name: str, args, folder: Path):
    """The part of the online phase that is bookkeeping, for four members; None: it has no such."""
    if not hasattr(load_script(name), "Online"):
        return None
    settings = {"num_updates": START, "online_steps": 10_000, "env_id": "auto"}
    training = Training(name, 4, "eager", args.device, folder, **settings)
    run, spent = training.run, 0.0

    def timed(function):
        def call(*given, **named):
            nonlocal spent
            began = time.perf_counter()
            result = function(*given, **named)
            wait(training.device)
            spent += time.perf_counter() - began
            return result

        return call

    def advance() -> None:
        run.online.play()
        for _ in range(run.cfg.updates_per_step):
            training.update()

    run.graph, run.agent.explore = timed(run.graph), timed(run.agent.explore)
    for env in run.online.envs:
        env.step, env.reset = timed(env.step), timed(env.reset)
    advance()
    spent, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < 10 * args.seconds:
        advance()
    return round(1 - spent / (time.perf_counter() - began), 4)


class Products(TorchDispatchMode):
    """The matrix products of updates, made again from random numbers of the same layout."""

    def __init__(self, training: Training):
        super().__init__()
        self.device, self.speeds, self.made, self.updates = training.device, [], {}, []
        for _ in range(CYCLE):
            self.updates.append([])
            with self:
                training.update()
        self.turns = itertools.cycle(self.updates)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__.split(".")[0].startswith(PRODUCTS):
            again = pytree.tree_map_only(torch.Tensor, self.like, (args, kwargs))
            self.updates[-1].append((func, *again))
        return func(*args, **kwargs)

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Random numbers laid out as `value`; equal layouts share theirs."""
        key = shape, strides, dtype = value.shape, value.stride(), value.dtype
        if key not in self.made:
            size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
            numbers = torch.zeros(size, dtype=dtype, device=value.device)
            if dtype.is_floating_point:
                numbers.normal_(std=0.1)
            self.made[key] = numbers.as_strided(shape, strides)  # rows may lie on each other
        return self.made[key]

    window = Training.window

    def update(self) -> None:
        for func, args, kwargs in next(self.turns):
            func(*args, **kwargs)


def count_flops(training: Training) -> float:
    """Floating point operations of one update of all members, by torch's counter; the mean."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(CYCLE):
            training.update()
    return counter.get_total_flops() / CYCLE


def profile(training: Training, updates: int) -> dict:
    """The share of each part of the loop's time."""
    cuda = training.device.type == "cuda"
    with torch.profiler.profile() as found:  # of the devices that there are
        began = time.perf_counter()
        for _ in range(updates):
            training.update()
        wait(training.device)
        elapsed = time.perf_counter() - began
    parts = dict.fromkeys([*SHARES, "elementwise", "Python"], 0.0)
    for event in found.key_averages():
        if not event.key.startswith("aten::"):
            continue  # the operators' own time is in those they call
        part = next((p for p, words in SHARES.items() if any(w in event.key for w in words)), None)
        time_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        parts[part or "elementwise"] += time_us / 1e6 / elapsed
    parts["Python"] = max(0.0, 1 - sum(parts.values()))
    return {part: round(share, 3) for part, share in parts.items()}


def cuda_memory(name: str, members: int, mode: str, args, folder: Path) -> float:
    """Peak MiB of one variant that is alone on the device, its data included."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats(args.device)
    before = torch.cuda.memory_allocated(args.device)
    training = Training(name, members, mode, args.device, folder / "memory")
    for _ in range(3):
        training.update()
    return (torch.cuda.max_memory_allocated(args.device) - before) / 2**20


def measure(name: str, args, folder: Path, say) -> list:
    """Rows of a script, one for each number of members and mode."""
    rows = []
    for members in args.members:
        say(f"{name}, {members} members")
        if args.device.startswith("cuda"):
            memory = {mode: cuda_memory(name, members, mode, args, folder) for mode in args.modes}
        variants = [Training(name, members, mode, args.device, folder) for mode in args.modes]
        eager = next((variant for variant in variants if variant.mode == "eager"), None)
        eager = eager or Training(name, members, "eager", args.device, folder)
        flops, products, host = count_flops(eager), Products(eager), host_seconds(eager)
        loads = []
        for _ in range(1 + args.rounds):  # the first warms caches and compiles
            for variant in [*variants, products]:
                variant.window(args.seconds)
            loads.append(os.getloadavg()[0])
        alone = statistics.median(products.speeds[1:])
        for variant in variants:
            speed = statistics.median(variant.speeds[1:])
            row = {"algorithm": name, "members": members, "mode": variant.mode}
            row |= {"updates_per_second": speed, "in_all": speed * members, "flops": flops}
            row |= {"gflops_per_second": flops * speed / 1e9, "fraction": speed / alone}
            row |= {"products_gflops_per_second": flops * alone / 1e9, "load": max(loads)}
            row["host_share"] = host * speed
            if args.device.startswith("cuda"):
                row["peak_memory_mib"] = memory[variant.mode]
            if variant.mode == "eager":
                row["shares"] = profile(variant, max(2, int(speed * args.seconds)))
            rows.append(row)
    return rows


# ---- what a user waits for ----


# Linux lends a process the peak memory of the one that starts it: a small one has to.
LAUNCHER = """
import os, subprocess, sys, time
log, first, done = sys.argv[1], 0, 0
began = time.perf_counter()
child = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
while not done:
    time.sleep(0.01)
    done, status, usage = os.wait4(child.pid, os.WNOHANG)
    if not first and os.path.isfile(log) and os.path.getsize(log):
        first = time.perf_counter() - began
print(first, time.perf_counter() - began, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def process(name: str, environment=(), **settings) -> tuple:
    """A script's process: seconds to its first log row, to its end; its peak memory in MiB."""
    script = REPOSITORY / f"algorithms/{name}.py"
    words = {"dataset_id": data_of(name), "num_seeds": 4}
    words |= {"env_id": "none", "log_every": 1, "compile": "false", **settings}
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-c", LAUNCHER, f"{folder}/run/metrics.jsonl", sys.executable]
        argv += [script, *arguments(words), "--run_dir", f"{folder}/run"]
        done = subprocess.run(argv, capture_output=True, env={**os.environ, **dict(environment)})
    if done.returncode:
        message = done.stderr.decode().strip().splitlines()
        raise SpeedError(f"{name} ended with {done.returncode}: {message[-1:]}")
    first, seconds, memory = map(float, done.stdout.split())
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return round(first, 2), round(seconds, 2), round(memory / unit)


def whole(name: str, args, folder: Path, say) -> dict:
    """First updates, memory by members, a short run with its evaluation, the online phase."""
    say(f"{name}, whole processes")
    first = {"num_updates": 1, "device": args.device}
    found = {"first_update_seconds": process(name, **first)[0], "peak_memory_mib": {}}
    for members in args.members:
        some = {**first, "num_updates": 4, "num_seeds": members}
        found["peak_memory_mib"][members] = process(name, **some)[2]
    if "compiled" in args.modes:
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{name}")}
        for state in ("cold", "warm"):
            seconds = process(name, cache, **first, compile="true")[0]
            found[f"first_compiled_update_seconds_{state}"] = seconds
    run = {"num_updates": 100, "device": args.device, "log_every": 100}
    run |= {"env_id": "auto", "final_eval_episodes": 10}
    found["run_of_100_updates_and_10_episodes_seconds"] = process(name, **run)[1]
    found["online_share"] = online_share(name, args, folder / "online")
    return found


def evaluation(device: str, folder: Path) -> dict:
    """Ten whole episodes of Hopper for four members; loading the bundled data."""
    settings = {"env_id": "auto", "env_kwargs": "{terminate_when_unhealthy: false}"}  # 1,000 steps
    run = Training("bc", 4, "eager", device, folder / "evaluation", **settings).run
    module, began = load_script("bc"), time.perf_counter()
    module.load_dataset(run.cfg)
    loading = time.perf_counter() - began
    module.evaluate(run.agent, run.spec, run.references, 1)
    began = time.perf_counter()
    rows = module.evaluate(run.agent, run.spec, run.references, 10)
    seconds, steps = time.perf_counter() - began, sum(row["length"] for row in rows)
    found = {"loading_seconds": loading, "evaluation_seconds": seconds, "episodes": len(rows)}
    return {**found, "environment_steps": steps, "steps_per_second": steps / seconds}


# ---- the report ----


def machine(device: str) -> dict:
    info = Path("/proc/cpuinfo")
    found = info.is_file() and re.search(r"^model name\s*: (.*)", info.read_text(), re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    if device.startswith("cuda"):
        try:
            name = torch.cuda.get_device_name(device)
        except (RuntimeError, AssertionError):
            raise SpeedError(f"device {device!r} is not to be had here: use cpu or cuda") from None
    git = ["git", "-C", REPOSITORY, "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    about = {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {**about, "torch": torch.__version__, "commit": commit}


def markdown(names: list, rows: list) -> str:
    head, *lines = [f"| {' | '.join(map(str, row))} |" for row in (names, *rows)]
    return "\n".join([head, "|---" * len(names) + "|", *lines]) + "\n"


def table(result: dict) -> str:
    """Markdown, a row for each script and number of members."""
    shown = [mode for mode in MODES if any(row["mode"] == mode for row in result["rows"])]
    groups, rows = {}, []
    for row in result["rows"]:
        groups.setdefault((row["algorithm"], row["members"]), {})[row["mode"]] = row
    for group, modes in groups.items():
        best = max(modes.values(), key=lambda row: row["fraction"])
        alone = best["updates_per_second"] / best["fraction"]
        speeds = [modes[mode]["updates_per_second"] for mode in shown]
        cells = [f"{x:.1f}" for x in (*speeds, best["in_all"], alone)]
        rows.append([*group, *cells, f"{best['fraction']:.2f}", f"{best['host_share']:.3f}"])
    names = ["script", "members", *shown, "in all", "products", "fraction", "host share"]
    about, load = result["machine"], max(row["load"] for row in result["rows"])
    words = f"{about['device']}, {about['threads']} threads, torch {about['torch']}"
    text = f"{markdown(names, rows)}\n{words}; highest load {load:.1f}.\n"
    return text + (whole_table(result) if result["whole"] else "")


def whole_table(result: dict) -> str:
    """Markdown, a row for each script's processes, and a sentence on evaluation."""
    names, rows = {"first_update_seconds": "first update, s"}, []
    names |= {f"first_compiled_update_seconds_{x}": f"compiled, {x}" for x in ("cold", "warm")}
    names["run_of_100_updates_and_10_episodes_seconds"] = "100 updates + 10 episodes, s"
    for script, found in result["whole"].items():
        cells = [f"{found[key]:.1f}" if key in found else "" for key in names]
        share, memory = found["online_share"], found["peak_memory_mib"]
        rows.append([script, *cells, "" if share is None else f"{share:.3f}", *memory.values()])
    names = ["script", *names.values(), "online bookkeeping"]
    names += [f"MiB, {count} member{'s' * (int(count) > 1)}" for count in memory]
    text = f"\n{markdown(names, rows)}"
    if found := result.get("evaluation"):
        played = f"{found['episodes']} whole Hopper episodes of four members together"
        took = f"{found['evaluation_seconds']:.1f} s, {found['steps_per_second']:,.0f} steps/s"
        loading = f"Loading the data: {found['loading_seconds']:.1f} s."
        text += f"\nEvaluation: {played} in {took}. {loading}\n"
    return text


def fill(readme: Path, text: str) -> None:
    """Replace what stands between the two marks of `readme`."""
    old = readme.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise SpeedError(f"{readme} lacks the lines {BEGIN!r} and {END!r}: add them")
    head, rest = old.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{text}{END}{rest.split(END)[1]}", encoding="utf-8")


def progress(total: int):
    """A function that prints a line with the time left."""
    began, counter = time.perf_counter(), itertools.count()

    def say(text: str) -> None:
        done = next(counter)
        left = (time.perf_counter() - began) / max(1, done) * (total - done) / 60
        print(f"{text}; {f'about {left:.1f} min left' if done else '? left'}", flush=True)

    return say


def main(argv=None) -> int:
    names = sorted(path.stem for path in (REPOSITORY / "algorithms").glob("*.py"))
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(names))
    parser.add_argument("--members", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: graphs on cuda alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=7, help="windows of each variant")
    parser.add_argument("--whole", action="store_true", help="also processes and evaluation")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, help="a file whose marked table is replaced")
    args = parser.parse_args(argv)
    args.modes = args.modes or list(MODES)[: 3 if args.device.startswith("cuda") else 2]
    if not all(number > 0 for number in (args.seconds, args.rounds, *args.members)):
        parser.error("--seconds, --rounds and --members are numbers above 0")
    scripts = args.scripts or names
    say = progress(len(scripts) * (len(args.members) + args.whole))
    try:
        if "graphs" in args.modes and not args.device.startswith("cuda"):
            raise SpeedError("--modes graphs is for cuda: leave it out, or add --device")
        result = {"machine": machine(args.device), "rows": [], "whole": {}}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in scripts:
                result["rows"] += measure(name, args, Path(folder), say)
                if args.whole:
                    result["whole"][name] = whole(name, args, Path(folder), say)
                    if name == scripts[-1]:
                        result["evaluation"] = evaluation(args.device, Path(folder))
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        text = table(result)
        if args.readme:
            fill(args.readme, text)
    except (SpeedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{text}\nalso in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
