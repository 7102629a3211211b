"""The article's exercise: BC and IQL learn from the same recordings; does IQL do better, and why?

    python tools/challenge.py hopper          # make train: a hopping robot
    python tools/challenge.py hopper maze     # make challenge: and a maze

The data are bundled. Each algorithm trains with two seeds, by tools/sweep.py with the command that
is printed, and ends with ten rollouts of every seed: 7 to 10 and 9 to 12 minutes on two idle cores.
Started again, this goes on where it stopped. OUT/<exercise>-<updates> holds the runs, and then
answer.txt, which is printed, and answer.png.

Whether one is better than the other is decided by the mean returns of the seeds: yes if all of
one's are above all of the other's, no if none is above any of them, else undecided.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import policy
import sweep
import torch
from torch import nn

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

ALGORITHMS = {"bc": "BC", "iql": "IQL"}  # folders of configs/ -> names
SCRIPTS = {name: sweep.load_script(folder) for folder, name in ALGORITHMS.items()}
COLORS = {"BC": "#EE6677", "IQL": "#4477AA", "recorded": "#BBBBBB"}
RARELY = {"eval_every": 10_000, "eval_episodes": 5, "checkpoint_every": 10_000}
RARELY |= {"final_eval_episodes": 10}
WHY = """\
Why Q-learning can beat the best trajectory, and cloning only by accident:
Cloning does what the recordings did most often at a state, well or badly, so it ends near their
average, or below it where its small errors add up. Q-learning first learns what each recorded
action is worth: its reward, and the value of the best that any recording did from there on. So
values pass from one episode into another where their ways cross, and the policy takes the best
part of each. Joined, these parts can be better than every episode; a copy of episodes cannot.
Where a clone does get further, its errors led it there."""


@dataclass
class Exercise:
    """What is learned from which data, and how its picture is drawn."""

    task: str  # of configs/<algorithm>/<task>.yaml
    updates: int
    recordings: str  # what they are, as a heading
    settings: dict  # besides those of the configs
    picture: Callable  # of Evidence, title and file


@dataclass
class Evidence:
    """What the finished runs show; keys are (algorithm, seed)."""

    rollouts: dict  # key -> returns of the final evaluation
    recorded: np.ndarray  # returns of the episodes that begin where rollouts do
    episodes: list  # of the data, all of them
    references: tuple  # returns that score 0 and 100
    agents: dict  # key -> the trained agent
    spec: gym.envs.registration.EnvSpec


# ---- what the runs show


def final_returns(folder: Path) -> list[float]:
    """Returns of a finished run's last evaluation."""
    path = folder / "episodes.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [float(row["return"]) for row in rows if row["final"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise sweep.SweepError(f"{path}: {error!r:.200}; move {folder} away") from None


def gather(folders: dict) -> Evidence:
    """Read finished runs {(algorithm, seed): folder} of one dataset, and that dataset."""
    agents = {}
    for key, folder in folders.items():
        saved = SCRIPTS[key[0]].read_checkpoint(folder)
        agents[key] = policy.restore(SCRIPTS[key[0]], saved)
    script, agent = SCRIPTS[key[0]], agents[key]  # any: they share data and environment
    spec, references = script.find_environment(agent.cfg, saved["about"], agent)
    episodes, *_ = script.load_dataset(agent.cfg)
    recorded = [float(e["reward"].sum()) for e in begin_alike(script, agent, spec, episodes)]
    rollouts = {key: final_returns(folder) for key, folder in folders.items()}
    return Evidence(rollouts, np.array(recorded), episodes, references, agents, spec)


def begin_alike(script, agent: nn.Module, spec, episodes: list) -> list:
    """The episodes that begin where the environment does: in the box of ten starts, and around."""
    env = gym.make(spec)
    starts = [script.env_step(env, seed=agent.cfg.eval_seed + i)[0] for i in range(10)]
    low, high = np.min(starts, 0), np.max(starts, 0)
    low, high = low - (high - low), high + (high - low)
    return [e for e in episodes if ((e["obs"][0] >= low) & (e["obs"][0] <= high)).all()]


def paths(script, agent: nn.Module, evidence: Evidence) -> list[np.ndarray]:
    """The final evaluation again: the observations [T, obs_dim] of each of its episodes."""
    seen, act = [], agent.act

    def watched(obs):
        seen.append(obs[0].numpy())
        return act(obs)

    agent.act = watched
    count = agent.cfg.final_eval_episodes
    rows = script.evaluate(agent, evidence.spec, evidence.references, count)
    return [np.stack(seen)[: row["length"], i] for i, row in enumerate(rows)]


# ---- the answer


def verdict(ours, theirs) -> str:
    """Whether `ours` are better: the rule, set before any number was seen."""
    if min(ours) > max(theirs):
        return "yes"
    return "no" if max(ours) <= min(theirs) else "undecided"


def answer(exercise: Exercise, evidence: Evidence) -> str:
    """The numbers and what they say."""
    low, high = evidence.references
    lines = [f"{'':42}{'mean return':>12}{'best':>9}{'score':>8}"]
    shown = {f"{exercise.recordings} ({len(evidence.recorded)})": evidence.recorded}
    shown |= {f"{name}, seed {seed}": found for (name, seed), found in evidence.rollouts.items()}
    for name, found in shown.items():
        mean = np.mean(found)
        score = 100 * (mean - low) / (high - low)
        lines.append(f"{name:42}{mean:12,.2f}{max(found):9,.2f}{score:8.1f}")
    return "\n".join([*lines, "", *questions(evidence)])


def questions(evidence: Evidence) -> list[str]:
    """A line for each."""
    means = {name: [] for name in SCRIPTS}
    for (name, _), found in evidence.rollouts.items():
        means[name].append(float(np.mean(found)))
    best = [float(evidence.recorded.max())]
    asked = {"Is IQL better than BC?": (means["IQL"], means["BC"])}
    for name, own in means.items():
        asked[f"Is {name} better than the best recorded episode?"] = (own, best)
    lines = []
    for question, (ours, theirs) in asked.items():
        shown = (", ".join(f"{value:,.2f}" for value in values) for values in (ours, theirs))
        lines.append(f"{question} {verdict(ours, theirs)} ({' against '.join(shown)})")
    return lines


# ---- pictures


def returns_picture(evidence: Evidence, title: str, path: Path) -> None:
    """Rollouts as a strip for each seed, above how the recorded episodes are spread."""
    size = {"figsize": (8, 5), "height_ratios": [1, 1.2]}
    figure, (top, low) = plt.subplots(2, sharex=True, layout="constrained", **size)
    for i, ((name, _), found) in enumerate(evidence.rollouts.items()):
        top.plot(found, [i] * len(found), "o", color=COLORS[name], alpha=0.5)
        top.plot(np.mean(found), i, "|", color=COLORS[name], markersize=22, markeredgewidth=3)
    names = [f"{name}, seed {seed}" for name, seed in evidence.rollouts]
    top.set_yticks(range(len(names)), names)
    top.set(ylim=(len(names) - 0.5, -0.5), title=title)
    top.set_xlabel("ten rollouts of every trained seed; bar: their mean")
    low.hist(evidence.recorded, bins=50, color=COLORS["recorded"])
    low.set(ylabel="recorded episodes\n(log scale)", xlabel="return of an episode", yscale="log")
    for at, style in ((evidence.recorded.mean(), ":"), (evidence.recorded.max(), "--")):
        name = {":": " mean", "--": " best"}[style]
        for axis in (top, low):
            axis.axvline(at, color="black", linestyle=style, linewidth=1)
        low.text(at, 0.93, f"{name} {at:,.0f}", transform=low.get_xaxis_transform())
    low.set_xlim(right=1.15 * max(evidence.recorded.max(), *map(max, evidence.rollouts.values())))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def maze_picture(evidence: Evidence, title: str, path: Path) -> None:
    """The maze from above: recorded ways, and the rollouts of each algorithm."""
    maze = gym.make(evidence.spec).unwrapped.maze
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    figure.suptitle(title)
    for axis in axes:
        draw_walls(axis, maze)
    for episode in evidence.episodes:
        reached = episode["reward"].sum() > 0
        style = {"color": "#228833" if reached else COLORS["recorded"], "alpha": 0.4}
        axes[0].plot(*episode["obs"][:, :2].T, linewidth=0.6, zorder=2 + reached, **style)
    axes[0].set_title("recorded (green: reach G, not from S)")
    for axis, name in zip(axes[1:], SCRIPTS, strict=True):
        returns = [x for key, found in evidence.rollouts.items() if key[0] == name for x in found]
        reached = sum(x > 0 for x in returns)
        axis.set_title(f"{name}: {reached} of {len(returns)} rollouts reach G")
        for agent in (agent for key, agent in evidence.agents.items() if key[0] == name):
            for way in paths(SCRIPTS[name], agent, evidence):
                axis.plot(*way[:, :2].T, color=COLORS[name], alpha=0.6, linewidth=1.2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_walls(axis, maze) -> None:
    """Walls as squares, S and G where evaluation begins and ends."""
    side = maze.maze_size_scaling
    for i, row in enumerate(maze.maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                corner = maze.cell_rowcol_to_xy((i, j)) - side / 2
                axis.add_patch(plt.Rectangle(corner, side, side, color="#333333"))
    for letter, places in (("S", maze.unique_reset_locations), ("G", maze.unique_goal_locations)):
        axis.text(*places[0][:2], letter, ha="center", va="center", weight="bold", zorder=9)
    axis.set(aspect="equal")
    axis.axis("off")


EXERCISES = {
    "hopper": Exercise(
        task="hopper-medium-replay",
        updates=50_000,
        recordings="recorded episodes of a learner",
        settings={
            "dataset_id": "datasets/hopper/medium-replay-v0",
            "env_id": "auto",
            "ref_min_score": "null",
            "ref_max_score": "null",
        },
        picture=returns_picture,
    ),
    "maze": Exercise(
        task="pointmaze-stitch",
        updates=20_000,  # as in benchmarks/proofs
        recordings="recorded episodes from the start",
        settings={},
        picture=maze_picture,
    ),
}


# ---- the command


def sweep_words(exercise: Exercise, updates: int, out: Path, args) -> list[str]:
    """What follows `python tools/sweep.py`; the slower algorithm goes first, for an even end."""
    words = ["--algorithms", *reversed(ALGORITHMS), "--tasks", exercise.task]
    words += ["--seeds", *map(str, range(args.seeds)), "--out", str(out)]
    words += ["--workers", str(args.workers)] if args.workers else []
    settings = {**exercise.settings, **RARELY, "num_updates": updates}
    return [*words, "--set", *(f"{field}={value}" for field, value in settings.items())]


def solve(name: str, args) -> int:
    """Train what is not trained yet, then answer; returns the exit code."""
    exercise = EXERCISES[name]
    updates = args.updates or exercise.updates
    out = Path(args.out, f"{name}-{updates}")
    words = sweep_words(exercise, updates, out, args)
    head = f"{name.title()}, {updates:,} updates"
    print(f"\n{head}: python tools/sweep.py {shlex.join(words)}\n", flush=True)
    code = sweep.main(words)
    if code:
        return code
    jobs = {(x.algorithm, x.config["seed"]): x.folder for x in sweep.plan(sweep.parse(words))}
    order = sorted(jobs, key=lambda run: ([*ALGORITHMS].index(run[0]), run[1]))
    evidence = gather({(ALGORITHMS[name], seed): jobs[name, seed] for name, seed in order})
    text = f"{head}\n\n{answer(exercise, evidence)}\n"
    (out / "answer.txt").write_text(f"{text}\n{WHY}\n", encoding="utf-8")
    first = questions(evidence)[0].partition(" (")[0]
    exercise.picture(evidence, f"{head}. {first}", out / "answer.png")
    print(f"\n{text}\nPicture: {out / 'answer.png'}", flush=True)
    return 0


def whole(text: str) -> int:
    """1 or more; 1e6 and 1_000_000 are numbers, too."""
    if not (float(text).is_integer() and float(text) >= 1):
        raise ValueError(text)
    return int(float(text))


def parse(argv) -> argparse.Namespace:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = sweep.Parser(description=__doc__, **style)
    parser.add_argument("names", nargs="+", choices=EXERCISES, metavar="hopper | maze")
    parser.add_argument("--updates", type=whole, help="of each run, in place of the exercise's own")
    parser.add_argument("--seeds", type=whole, default=2, metavar="N", help="seeds of each (2)")
    parser.add_argument("--workers", type=whole, help="runs at once (one a core)")
    parser.add_argument("--out", default="runs", help="folder of the exercises (runs)")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    torch.set_num_threads(1)  # so that rollouts are bit for bit those of the runs
    known = (sweep.SweepError, OSError, *(script.RunError for script in SCRIPTS.values()))
    try:
        args = parse(argv)
        for name in args.names:
            code = solve(name, args)
            if code:
                return code
    except known as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    print(f"\n{WHY}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
