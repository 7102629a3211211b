"""Does a run over-fit its data? What it makes of episodes that it was not shown.

    python benchmarks/held_out.py split datasets/pointmaze/stitch-v0 DIR
    python algorithms/iql.py --config configs/iql/pointmaze-stitch.yaml --dataset_id DIR/train-v0
    python benchmarks/held_out.py ask RUN [RUN ...]    # a table in Markdown

Every tenth episode goes into DIR/held-v0, the others into DIR/train-v0. RUN is a run's folder, or a
checkpoint.pt, of a script with Q(s, a) of continuous actions; its data and those beside them are
asked for means over all steps (s, a):

    Q          of the critics
    Bellman    (r + gamma (1 - terminated) min_i Q_i(s', pi(s')) - Q(s, a))^2
    distance   |pi(s) - a|^2, of actions in [-1, 1]
    log std    of the Gaussian that explores, where there is one

Worse numbers on held-out episodes are over-fitting; where they are equal, a decline has another
cause.
"""

import argparse
import functools
import importlib
import json
import shutil
import sys
from pathlib import Path

import h5py
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN, HELD = "train-v0", "held-v0"
SMALL = 1e-3  # standard deviations, by which an action moves within its bounds
sys.path.append(str(REPOSITORY / "tools"))
policy = importlib.import_module("policy")


def split(frame, source: Path, place: Path) -> None:
    """Copy a dataset's episodes into two, as they are."""
    storage, about = source / "data" / "main_data.hdf5", source / "data" / "metadata.json"
    frame.check(storage.is_file() and about.is_file(), f"{source} is no folder of a Minari dataset")
    parts = [place / TRAIN, place / HELD]
    frame.check(not any(part.exists() for part in parts), f"{place} has both already, or one")
    metadata = json.loads(about.read_bytes())
    metadata.pop("fingerprint", None)  # of all episodes
    for part in parts:
        partial = part.with_name(f".{part.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "data").mkdir(parents=True)
        count, steps = copy(storage, partial / "data" / storage.name, part.name == HELD)
        own = {"dataset_id": f"held-out/{part.name}", "total_episodes": count, "total_steps": steps}
        (partial / "data" / about.name).write_text(json.dumps({**metadata, **own}))
        partial.rename(part)
        print(f"{part}: {count} episodes, {steps:,} steps")


def copy(source: Path, target: Path, held: bool) -> tuple[int, int]:
    """Every tenth episode, or all others; their number and that of their steps."""
    count = steps = 0
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        for i in range(len(old)):
            if (i % 10 == 9) == held:
                old.copy(f"episode_{i}", new, name=f"episode_{count}")
                new[f"episode_{count}"].attrs["id"] = count
                count, steps = count + 1, steps + len(old[f"episode_{i}/rewards"])
    return count, steps


@torch.no_grad()
def ask(script, agent, folder: Path) -> list:
    """(Q, Bellman, distance, log std) of each member on the dataset in a folder."""
    cfg, seeds = agent.cfg, agent.cfg.num_seeds
    episodes = script.load_dataset(script.dataclasses.replace(cfg, dataset_id=str(folder)))[0]
    cut = {"obs": slice(-1), "next_obs": slice(1, None)}
    raw = {k: torch.cat([torch.as_tensor(e["obs"][s]) for e in episodes]) for k, s in cut.items()}
    rows = [agent.rows(episode) for episode in episodes]
    names = ("action", "reward", "terminated")
    raw |= {k: torch.cat([torch.as_tensor(row[k]) for row in rows]) for k in names}
    many = {k: v.float().expand(seeds, *v.shape) for k, v in raw.items()}
    value = functools.partial(policy.q_values, agent)
    own, after = (agent.unit_action(agent.act(many[k])) for k in cut)
    q = value(agent.normalize(many["obs"]), many["action"])  # [S, critics, N]
    best = value(agent.normalize(many["next_obs"]), after).amin(1)
    target = many["reward"] + cfg.gamma * (1 - many["terminated"]) * best
    distance = (own - many["action"]).square().sum(-1)
    found = [q.mean(1), (target[:, None] - q).square().mean(1), distance, log_std(agent, many, own)]
    return torch.stack([x.mean(-1) for x in found], 1).tolist()


def log_std(agent, many: dict, own: torch.Tensor) -> torch.Tensor:
    """[S, N], NaN where no policy draws: how far a small noise moves its actions."""
    if not hasattr(agent, "explore"):
        return torch.full(own.shape[:2], torch.nan)
    moved = agent.unit_action(
        agent.explore(many["obs"], torch.full_like(own, -SMALL).copysign(-own))
    )
    return ((moved - own).abs() / SMALL).log().mean(-1)


def table(frame, run: Path, errors: list) -> str:
    """Two rows for each seed of a run."""
    script, saved = policy.opened(frame, run, errors)
    train = Path(saved["config"]["dataset_id"])
    held = train.with_name(HELD)
    there = train.name == TRAIN and held.is_dir()
    frame.check(
        there, f"{run} is of {train}: train it on {TRAIN} of `split`, which lies beside {HELD}"
    )
    agent = policy.restore(script, saved)
    right = hasattr(agent, "q") and hasattr(agent, "critic")
    frame.check(right, f"{script.__name__}.py has no Q(s, a) of one action to ask")
    found, lines = [ask(script, agent, folder) for folder in (train, held)], ""
    for i, seed in enumerate(agent.cfg.seeds):
        for name, rows in zip(("trained", "held out"), found, strict=True):
            q, bellman, distance, spread = rows[i]
            values = f"{q:.2f} | {bellman:.4f} | {distance:.3f} | {spread:.2f}"
            lines += (
                f"| {saved['about']['label']} | {seed} | {saved['step']:,} | {name} | {values} |\n"
            )
    return lines


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    ways = parser.add_subparsers(dest="way", required=True)
    splits, asks = (ways.add_parser(name, allow_abbrev=False) for name in ("split", "ask"))
    splits.add_argument("dataset", type=Path, help="its folder")
    splits.add_argument("place", type=Path, metavar="DIR")
    asks.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    frame = policy.load_script("iql")  # its blocks are those of all
    parser.error = splits.error = asks.error = functools.partial(frame.check, False)
    errors = [frame.RunError, OSError]
    try:
        args = parser.parse_args(argv)
        if args.way == "split":
            split(frame, args.dataset, args.place)
            return 0
        rows = "".join(table(frame, run, errors) for run in args.runs)
    except tuple(errors) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    names = ("run", "seed", "updates", "episodes", "Q", "Bellman", "distance", "log std")
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}\n{rows}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
