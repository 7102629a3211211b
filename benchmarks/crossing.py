"""At the crossing of the bundled maze: where critics say to go, and where policies go.

    python benchmarks/crossing.py RUN [RUN ...] [--episodes 20]

RUN is a run's folder, or a checkpoint.pt, of a script with Q(s, a) on datasets/pointmaze/stitch-v0.
There eight of nine episodes come up the stem and turn left at the crossing, into a dead end; the
goal lies to the right. At the data's first steps in the crossing after the stem this asks the
smallest of the critics for the values of full force to the right and to the left.

    right - left    what going right is worth more, mean over those states
    mean |Q|        the size of the values, those of going right
    turn            the policy's own force to the right, -1 to 1, and that of the data
    straight        episodes in percent that are at the goal without having gone left
    detour          the same of those that went left first, and turned back, as no data do
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
STEM, CROSSING, FIRST = (3, 3), (2, 3), 5  # cells (row, column); steps after the arrival
LEFT = {(2, 2), (2, 1)}  # the dead end
sys.path.append(str(REPOSITORY / "tools"))
policy = importlib.import_module("policy")


def environment(script, agent, about: dict):
    """The spec of the data's maze."""
    cfg = dataclasses.replace(agent.cfg, env_id="auto", env_kwargs={})
    return script.find_environment(cfg, about, agent)[0]


def visited(maze, obs) -> list:
    """The cell (row, column) of each observation."""
    return [tuple(maze.cell_xy_to_rowcol(one[:2]).tolist()) for one in obs]


def arrivals(script, agent, about: dict) -> tuple:
    """Observations [N, obs_dim] and actions [N, act_dim] of the data's steps into the crossing."""
    maze, rows = script.gym.make(environment(script, agent, about)).unwrapped.maze, []
    for episode in script.load_dataset(agent.cfg, type(agent))[0]:
        cells = visited(maze, episode["obs"][:-1])
        ways = enumerate(itertools.pairwise(cells), 1)
        for i in (i for i, way in ways if way == (STEM, CROSSING)):
            steps = [t for t in range(i, i + FIRST) if cells[t : t + 1] == [CROSSING]]
            rows += [(episode["obs"][t], episode["action"][t]) for t in steps]
    return tuple(torch.as_tensor(np.array(part)).float() for part in zip(*rows, strict=True))


@torch.no_grad()
def ask(agent, obs: torch.Tensor) -> list:
    """(right - left, mean |Q|, turn) of each member."""
    many = obs.expand(agent.cfg.num_seeds, -1, -1)
    sides = (torch.tensor([x, 0.0]).expand(*many.shape[:2], 2) for x in (1.0, -1.0))
    values = (policy.q_values(agent, agent.normalize(many), side) for side in sides)
    right, left = (value.amin(1) for value in values)  # [S, N]
    turn = agent.unit_action(agent.act(many))[..., 0]
    return torch.stack([(right - left).mean(1), right.abs().mean(1), turn.mean(1)], 1).tolist()


def ways(script, agent, about: dict, episodes: int) -> list:
    """(straight, detour) of each member: its episodes at the goal by either way, in percent."""
    spec, seeds = environment(script, agent, about), agent.cfg.num_seeds
    maze, found = script.gym.make(spec).unwrapped.maze, []
    for episode in policy.play(script, agent, spec, episodes):
        left, there = not LEFT.isdisjoint(visited(maze, episode["obs"])), episode["terminated"][-1]
        found.append((there and not left, there and left))
    return (100 * np.reshape(found, (episodes, seeds, 2)).mean(0)).tolist()


def table(frame, run: Path, episodes: int, errors: list) -> str:
    """A row for each seed of a run."""
    script, saved = policy.opened(frame, run, errors)
    about, data = saved["about"], saved["config"]["dataset_id"]
    here = data.endswith("pointmaze/stitch-v0")
    frame.check(here, f"{run} is of {data}: this is about datasets/pointmaze/stitch-v0")
    agent = policy.restore(script, saved)
    frame.check(hasattr(agent, "q"), f"{script.__name__}.py has no Q(s, a) of one action to ask")
    obs, action = arrivals(script, agent, about)
    theirs, lines = agent.unit_action(action)[:, 0].mean(), ""
    rows = zip(agent.cfg.seeds, ask(agent, obs), ways(script, agent, about, episodes), strict=True)
    for seed, (apart, size, turn), (straight, detour) in rows:
        values = f"{apart:.2f} | {size:.1f} | {turn:.2f} | {theirs:.2f}"
        values += f" | {straight:.0f} | {detour:.0f}"
        lines += f"| {about['label']} | {seed} | {values} |\n"
    return lines


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--episodes", type=int, default=20, help="of each seed, to see their ways")
    frame = policy.load_script("iql")  # its blocks are those of all
    parser.error = functools.partial(frame.check, False)
    errors = [frame.RunError, OSError]
    try:
        args = parser.parse_args(argv)
        frame.check(args.episodes > 0, "--episodes: at least 1 is to be played")
        rows = "".join(table(frame, run, args.episodes, errors) for run in args.runs)
    except tuple(errors) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    names = ("run", "seed", "right - left", "mean \\|Q\\|", "turn", "the data's")
    names += ("straight, %", "detour, %")
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    print(rows, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
