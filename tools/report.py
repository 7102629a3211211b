"""A table and a picture of run folders.

    python tools/report.py runs        # writes runs/report.md and runs/report.png
    python tools/report.py benchmarks/results --readme README.md     # fills the table there

The table holds the last policies, mean and standard deviation (ddof 0) over seeds of the final
evaluation; the best evaluation of each seed during training takes an oracle and stands apart. Runs
that went on online have a second table: `drop` is the score at the switch minus the worst of the
first 10,000 online steps (0: none is worse), `regret` the mean of 1 - score/100 over all online
evaluations. Lines in the picture are means over seeds, bands reach from the worst to the best seed;
a dashed line marks the switch.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

COLORS = (
    "#4477AA",
    "#EE6677",
    "#228833",
    "#CCBB44",
    "#66CCEE",
    "#AA3377",
    "#EE7733",
    "#882255",
    "#44AA99",
    "#000000",
    "#BBBBBB",
    "#332288",
    "#999933",
    "#117733",
    "#DDCC77",
)  # Tol, bright, and some of muted
NAMES = {"TD3BC": "TD3+BC", "CalQL": "Cal-QL"}  # of classes that cannot be called as their papers
DIFFERS = "environment_differs"  # set where D4RL's own environment was not to be had
# What runs that are joined may differ in.
SEEDS_AND_MACHINE = ("seed", "num_seeds", "fallback_dataset_id", "download", "log_every")
SEEDS_AND_MACHINE += ("checkpoint_every", "device", "compile", "wandb", "wandb_project", "label")
BEGIN, END = "<!-- results: written by tools/report.py -->", "<!-- end of results -->"


class ReportError(Exception):
    """Something the user can mend."""


def read_rows(path: Path) -> list[dict]:
    """The rows of metrics.jsonl or episodes.jsonl."""
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise ReportError(f"{path} has no whole rows ({error!r:.200}): move its run away") from None


def read(path: Path) -> dict:
    """A YAML or JSON file; {} where there is none."""
    parse = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ReportError(f"{path} cannot be read ({error!r:.200}): move its run away") from None


def about(result: dict, folder: Path) -> dict:
    """What runs have to share to be joined: settings, data, environment, whence they began."""
    settings = read(folder / "config.yaml").items()
    kept = {name: value for name, value in settings if name not in SEEDS_AND_MACHINE}
    facts = {name: result.get(name) for name in ("algorithm", "fingerprint", "env_id", DIFFERS)}
    started = {"from a checkpoint": bool(read(folder / "environment.json").get("checkpoint"))}
    return {**kept, **facts, **started}


def differences(one: dict, other: dict) -> list[str]:
    """Settings that a folder lacks are those of an older script: no difference."""
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def short(commit: Optional[str]) -> str:
    return (commit or "unknown")[:8] + ("-dirty" if (commit or "").endswith("-dirty") else "")


def read_runs(root: Path) -> dict:
    """{dataset: {(label, updates, online steps, number): group}} of finished runs below `root`.

    A group joins runs that differ in their seeds: "last" and "best" hold a value for each seed,
    "curve" one for each update and seed, "online" the online phase of each seed. Of a seed that was
    run twice the later folder counts. Runs of one label that differ in more than seeds have
    numbers, and rows of their own.
    """
    groups, kinds = {}, {}
    for path in sorted(root.rglob("result.json")):
        try:
            add_run(path.parent, groups, kinds)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{path.parent} lacks something ({error!r:.200})") from None
    return groups


def add_run(folder: Path, groups: dict, kinds: dict) -> None:
    """Join a run to its group."""
    result = read(folder / "result.json")
    if not result["last"]:
        return  # trained without an environment
    unit = "eval/score" if "eval/score" in result["last"][0] else "eval/return"
    settings = {**read(folder / "config.yaml"), **result}
    label, updates = NAMES.get(result["label"], result["label"]), int(result["num_updates"])
    steps = int(settings.get("online_steps", 0))
    key = (label, updates, steps)
    own = {**about(result, folder), "unit": unit}
    others = kinds.setdefault((result["dataset_id"], *key), [])
    apart = [differences(own, other) for other in others]
    if [] not in apart:
        others.append(own)
        if apart:
            problem = f"differs from other runs of {label} in {', '.join(apart[0])}"
            print(f"{folder} {problem}: a row of its own; --label names it", file=sys.stderr)
        apart.append([])
    new = {"last": {}, "best": {}, "curve": {}, "online": {}, "unit": unit, "commits": {}}
    group = groups.setdefault(result["dataset_id"], {}).setdefault((*key, apart.index([])), new)
    group["commits"][short(result["commit"])] = True
    again = group["last"].keys() & {row["seed"] for row in result["last"]}
    if again:
        print(f"{folder} replaces earlier runs of seeds {sorted(again)}", file=sys.stderr)
    group |= {"episodes": int(result["final_eval_episodes"]), "differs": result.get(DIFFERS)}
    group["last"] |= {row["seed"]: float(row[unit]) for row in result["last"]}
    evaluations = [row for row in read_rows(folder / "metrics.jsonl") if unit in row]
    for row in evaluations:
        group["curve"].setdefault(row["update"], {})[row["seed"]] = float(row[unit])
    for seed in (row["seed"] for row in result["last"]):
        its = [row for row in evaluations if row["seed"] == seed]
        if not its:
            raise ReportError(f"{folder}/metrics.jsonl has no evaluation of seed {seed}")
        group["best"][seed] = max(row[unit] for row in its)
        if steps:
            group["online"][seed] = online(its, unit, updates)


def online(evaluations: list, unit: str, switch: int) -> dict:
    """Of one seed: the value at the switch, `drop` and `regret`; None where it is not known."""
    at = [row[unit] for row in evaluations if row["update"] == switch][-1:]
    later = [row for row in evaluations if row["update"] > switch]
    early = [row[unit] for row in later if row["environment_step"] <= 10_000]
    regrets = [1 - row[unit] / 100 for row in later if unit == "eval/score"]
    drop = max(0, at[0] - min(early)) if at and early else None
    regret = float(np.mean(regrets)) if regrets else None
    return {"switch": at[0] if at else None, "drop": drop, "regret": regret}


def spread(values) -> str:
    values = list(values)
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


def length(updates: int, online_steps: int) -> str:
    return f"{updates:,}" + (f" + {online_steps:,} online" if online_steps else "")


def table(groups: dict) -> str:
    """Markdown, a row for each label, dataset and length; another table for what was online."""
    lines = [
        "| data | algorithm | updates | seeds | score, last | best (oracle) | episodes | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dataset, rows in sorted(groups.items()):
        for (label, *steps, _), group in sorted(rows.items(), key=order):
            differs = " (environment differs)" if group["differs"] else ""
            cells = (
                dataset,
                label if group["unit"] == "eval/score" else f"{label} (return)",
                length(*steps),
                len(group["last"]),
                spread(group["last"].values()) + differs,
                spread(group["best"].values()),
                group["episodes"],
                ", ".join(group["commits"]),
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n" + online_table(groups)


def online_table(groups: dict) -> str:
    """What went on online: scores at the switch and after it."""
    lines = [
        "\n| data | algorithm | updates | at the switch | drop | last | regret |",
        "|---|---|---|---|---|---|---|",
    ]
    for dataset, rows in sorted(groups.items()):
        for (label, *steps, _), group in sorted(rows.items(), key=order):
            seeds = group["online"].values()
            if not seeds:
                continue
            parts = {name: [seed[name] for seed in seeds] for name in ("switch", "drop", "regret")}
            known = {name: spread(v) if None not in v else "" for name, v in parts.items()}
            regret = f"{np.mean(parts['regret']):.2f}" if known["regret"] else ""
            last = spread(group["last"].values())
            cells = (dataset, label, length(*steps), known["switch"], known["drop"], last, regret)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def order(item) -> tuple:
    """Worst last score first, so that the baseline opens the list."""
    return np.mean(list(item[1]["last"].values())), item[0]


def picture(groups: dict, path: Path) -> None:
    """Learning curves, a panel for each dataset; runs that went on online have their own."""
    labels = sorted({label for rows in groups.values() for label, *_ in rows})
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    panels = {}
    for dataset, rows in sorted(groups.items()):
        for key, group in sorted(rows.items(), key=order):
            panels.setdefault((dataset, bool(key[2])), {})[key] = group
    size = (5.2 * len(panels), 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, ((dataset, online), rows) in zip(axes[0], panels.items(), strict=True):
        for (label, offline, *_), group in rows.items():
            if online:
                axis.axvline(offline, color=colors[label], linestyle="--", linewidth=1)
            updates = sorted(group["curve"])
            values = [list(group["curve"][u].values()) for u in updates]
            low, high = [min(v) for v in values], [max(v) for v in values]
            name = f"{label} ({len(group['last'])} seeds)"
            means = [np.mean(v) for v in values]
            axis.plot(updates, means, color=colors[label], label=name, marker=".")
            axis.fill_between(updates, low, high, color=colors[label], alpha=0.2, linewidth=0)
        unit = next(iter(rows.values()))["unit"].removeprefix("eval/")
        xlabel = "gradient updates" + (", online behind the dashed line" if online else "")
        axis.set(title=dataset, xlabel=xlabel, ylabel=f"evaluation {unit}")
        axis.grid(alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3}
        axis.legend(frameon=False, fontsize="small", **below)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def fill(readme: Path, text: str) -> None:
    """Replace what stands between the two marks of `readme`."""
    old = readme.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise ReportError(f"{readme} lacks the lines {BEGIN!r} and {END!r}: add them")
    head, rest = old.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{text}{END}{rest.split(END)[1]}", encoding="utf-8")


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("root", type=Path, help="a folder with run folders below it")
    parser.add_argument("--readme", type=Path, help="a file whose marked table is replaced")
    args = parser.parse_args(argv)
    try:
        groups = read_runs(args.root)
        if not groups:
            raise ReportError(
                f"no finished run below {args.root}: train first, for example make train"
            )
        text = table(groups)
        (args.root / "report.md").write_text(text, encoding="utf-8")
        picture(groups, args.root / "report.png")
        if args.readme:
            fill(args.readme, text)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\nalso in {args.root / 'report.md'}; curves: {args.root / 'report.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
