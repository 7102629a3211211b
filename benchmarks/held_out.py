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
    log std    of a Gaussian policy, before the tanh of those that have one

Worse numbers on held-out episodes are over-fitting. Equal ones speak against it, at the data's own
actions; of other actions they say nothing.
"""

import argparse
import dataclasses
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
PART = 1000  # steps at once: BCQ rates a hundred actions of each
sys.path.append(str(REPOSITORY / "tools"))
policy = importlib.import_module("policy")


def split(frame, source: Path, place: Path) -> None:
    """Copy a dataset's episodes into two, as they are."""
    storage, about = source / "data" / "main_data.hdf5", source / "data" / "metadata.json"
    there = storage.is_file() and about.is_file()
    frame.check(there, f"{source} is no folder of a Minari dataset (data/{storage.name})")
    parts = [place / TRAIN, place / HELD]
    for part in parts:
        frame.check(not part.exists(), f"{part} exists: remove it or name another DIR")
    with frame.explained(f"{source} cannot be read"):
        metadata = json.loads(about.read_bytes())
        metadata.pop("fingerprint", None)  # of all episodes
        with h5py.File(storage) as file:
            frame.check(len(file) >= 10, f"{source} has fewer than ten episodes: none is held out")
        for part in parts:
            partial = part.with_name(f".{part.name}.part")
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "data").mkdir(parents=True)
            sizes = copy(storage, partial / "data" / storage.name, part.name == HELD)
            own = {"dataset_id": f"held-out/{part.name}", **sizes}
            (partial / "data" / about.name).write_text(json.dumps({**metadata, **own}))
        for part in parts:
            part.with_name(f".{part.name}.part").rename(part)


def copy(source: Path, target: Path, held: bool) -> dict:
    """Every tenth episode, or all others; how many, and how many steps."""
    count = steps = 0
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        for i in range(len(old)):
            if (i % 10 == 9) == held:
                old.copy(f"episode_{i}", new, name=f"episode_{count}")
                new[f"episode_{count}"].attrs["id"] = count
                count, steps = count + 1, steps + len(old[f"episode_{i}/rewards"])
    return {"total_episodes": count, "total_steps": steps}


@torch.no_grad()
def ask(agent, gamma: float, episodes: list) -> list:
    """(Q, Bellman, distance, log std) of each member, means over the steps of some episodes."""
    table = agent.table(episodes)
    names = ("obs", "action", "reward", "next_obs", "terminated")
    parts = zip(*(table[name].split(PART) for name in names), strict=True)
    sums = sum(totals(agent, gamma, *part) for part in parts)
    return (sums / len(table["reward"])).T.tolist()


def totals(agent, gamma, obs, action, reward, next_obs, terminated) -> torch.Tensor:
    """Of N steps, rows of the table: [4, S] sums over them."""
    seeds = agent.cfg.num_seeds
    obs, action, next_obs = (x.expand(seeds, *x.shape) for x in (obs, action, next_obs))
    raw = (x * agent.obs_std + agent.obs_mean for x in (obs, next_obs))
    own, after = (agent.unit_action(agent.act(x)) for x in raw)
    q = policy.q_values(agent, obs, action)  # [S, critics, N]
    best = policy.q_values(agent, next_obs, after).amin(1)
    target = reward + gamma * (1 - terminated) * best
    found = [q.mean(1), (target[:, None] - q).square().mean(1), (own - action).square().sum(-1)]
    found.append(log_std(agent, obs).mean(-1).expand_as(best))
    return torch.stack([x.double().sum(-1) for x in found])


def log_std(agent, obs: torch.Tensor) -> torch.Tensor:
    """[S, N or 1, act_dim], of normalised obs; NaN where the policy is no Gaussian."""
    actor = getattr(agent, "actor", None)
    if hasattr(actor, "log_std"):  # IQL's, of all states
        return actor.log_std
    given = actor(obs) if type(actor).__name__.endswith("Policy") else None
    return given[1] if isinstance(given, tuple) else obs.new_full((len(obs), 1, 1), torch.nan)


def table(frame, run: Path, errors: list) -> str:
    """Two rows for each seed of a run."""
    script, saved = policy.opened(frame, run, errors)
    agent = policy.restore(script, saved)
    right = hasattr(agent, "q") and hasattr(agent, "critic")
    frame.check(right, f"{script.__name__}.py has no Q(s, a) of one action to ask")
    train = script.find_dataset(agent.cfg).parent
    held, mend = train.with_name(HELD), f"train it on {TRAIN} of `split`, which lies beside {HELD}"
    frame.check(train.name == TRAIN and held.is_dir(), f"{run} is of {train}: {mend}")
    config = functools.partial(dataclasses.replace, agent.cfg)
    both = [script.load_dataset(config(dataset_id=str(place))) for place in (train, held)]
    same = both[0][2]["fingerprint"] == saved["about"].get("fingerprint")
    frame.check(same, f"{train} is not what {run} was trained on: {mend}")
    gamma, lines = policy.discount(agent.cfg, saved), ""
    found = [ask(agent, gamma, episodes) for episodes, *_ in both]
    label, updates = saved["about"]["label"], f"{saved['step']:,}"
    for i, seed in enumerate(agent.cfg.seeds):
        for name, rows in zip(("trained", "held out"), found, strict=True):
            cells = "{:.2f} | {:.4f} | {:.3f} | {:.2f}".format(*rows[i])
            lines += f"| {label} | {seed} | {updates} | {name} | {cells} |\n"
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
