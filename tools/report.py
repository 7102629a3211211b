"""Tables, a picture and a page of results.

    python tools/report.py                           # of the stored results, benchmarks/results
    python tools/report.py --readme README.md        # also fills the tables there
    python tools/report.py runs                      # of the run folders below runs/

Writes report.md (all tables), report.png (learning curves) and report.html (everything, a page that
opens from the disk) beside the results, or into --out.

`last` is the last policy: mean and standard deviation (ddof 0) over seeds of the final evaluation;
`best` picks each seed's best evaluation, takes an oracle and stands apart. Online, `drop` is the
score at the switch minus the worst of the first 10,000 steps (0: none is worse), `regret` the mean
of 1 - score/100 over all online evaluations. A suite's algorithms are compared where they had the
same number of updates: interquartile mean over tasks and seeds with its 95 % interval, and the
probability that a seed of one is better than a seed of the other (tools/scores.py says how). A
published figure stands beside a run on D4RL's own data in its environment and of its length only.
°: the command line, not the config, gave the size of the networks.
"""

import argparse
import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import page
import pandas as pd
import pictures
import scores as numbers
from scores import GROUP, length, short
from store import RESULTS, Parser, StoreError

BEGIN, END = "<!-- results: written by tools/report.py -->", "<!-- end of results -->"


def spread(values) -> str:
    values = list(values)
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


def named(label: str, number: int, unit: str = "score") -> str:
    """Of settings after the first, and of returns, the name says so."""
    return label + (f" ({number + 1})" if number else "") + (" (return)" if unit != "score" else "")


def marks(scores, seeds: pd.DataFrame) -> str:
    """Whether the command sized the networks, and the environment is not D4RL's in substance."""
    own = scores.runs[scores.runs["run"].isin(seeds["run"])]
    sized = own["command"].str.contains(r"--\w*hidden_").any()
    found = own["environment_differs"].notna().any()
    return ("°" if sized else "") + (" (environment differs)" if found else "")


def markdown(table: pd.DataFrame) -> str:
    """A table of strings in Markdown; nothing where it has no rows."""
    if table.empty:
        return ""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def short_names(data) -> dict:
    """Of datasets, without what most begin with; whole where two would be called the same."""
    names = {name: name.removeprefix("datasets/").removeprefix("D4RL/") for name in data}
    shown = list(names.values())
    return {name: one if shown.count(one) == 1 else name for name, one in names.items()}


def results_table(scores) -> pd.DataFrame:
    """A row for each group, the worst of a dataset first, so that the baseline opens the list."""
    rows, runs = [], scores.runs.set_index("run")
    for (data, label, *size, number), seeds in scores.groups():
        own = runs.loc[seeds["run"].unique()]
        run, last = own.iloc[0], spread(seeds["last"])
        known = numbers.published_for({**run, "label": label})
        row = {
            "data": data,
            "algorithm": named(label, number, run["unit"]),
            "updates": length(*size),
            "seeds": str(len(seeds)),
            "last": last + marks(scores, seeds),
            "best (oracle)": spread(seeds["best"]),
            "published": f"{known[0]:.1f} ({known[1]})" if known else "",
            "difference": f"{seeds['last'].mean() - known[0]:+.1f}" if known else "",
            "episodes": str(run["final_eval_episodes"]),
            "commit": ", ".join(dict.fromkeys(map(short, own["commit"]))),
        }
        rows.append(((data, seeds["last"].mean(), label), row))
    table = pd.DataFrame([row for _, row in sorted(rows, key=lambda pair: pair[0])])
    compared = any(row["published"] for _, row in rows)
    return table if compared or table.empty else table.drop(columns=["published", "difference"])


def overview_table(scores) -> pd.DataFrame:
    """A row for each algorithm and budget, a column for each dataset: the last policies."""
    cells, order, names = {}, {}, short_names(scores.seeds["data"].unique())
    for (data, label, *size, number), seeds in scores.groups():
        unit = seeds["unit"].iloc[0]
        key, name = (*size, label, number, unit), named(label, number, unit)
        row = cells.setdefault(key, {"updates": length(*size), "algorithm": name})
        few = f" ({len(seeds)} seeds)" if len(seeds) != 4 else ""
        row[names[data]] = spread(seeds["last"]) + few + marks(scores, seeds)
        order.setdefault(key, []).append(seeds["last"].mean())
    keys = sorted(cells, key=lambda k: (k[1] > 0, -k[0] - k[1], -len(order[k]), np.mean(order[k])))
    if not keys:
        return pd.DataFrame()
    table = pd.DataFrame([cells[key] for key in keys]).fillna("")
    return table[["updates", "algorithm", *sorted(table.columns.difference(table.columns[:2]))]]


def online_table(scores) -> pd.DataFrame:
    """What went on online: scores at the switch and after it."""
    rows, by = [], [*GROUP, "seed"]
    evaluations = dict(list(scores.evaluations[scores.evaluations["steps"] > 0].groupby(by)))
    for (data, label, updates, steps, number), seeds in scores.groups():
        if not steps:
            continue
        name = (data, label, updates, steps, number)
        found = [numbers.online(evaluations[(*name, seed)], updates) for seed in seeds["seed"]]
        known = {k: [one[k] for one in found if one[k] is not None] for k in found[0]}
        whole = {k: v if len(v) == len(found) else [] for k, v in known.items()}
        rows.append(
            {
                "data": data,
                "algorithm": named(label, number, seeds["unit"].iloc[0]),
                "updates": length(updates, steps),
                "at the switch": spread(whole["switch"]) if whole["switch"] else "",
                "drop": spread(whole["drop"]) if whole["drop"] else "",
                "last": spread(seeds["last"]) + marks(scores, seeds),
                "regret": f"{np.mean(whole['regret']):.2f}" if whole["regret"] else "",
            }
        )
    return pd.DataFrame(rows)


def suite_tables(scores) -> dict:
    """{title: table}: of each suite and budget that has two algorithms or more.

    Interquartile mean with its interval, then the probability of improvement over each other
    algorithm in percent, over the tasks that both have.
    """
    tables, by = {}, ["suite", "label", *numbers.BUDGET]
    known = dict(list(scores.seeds[scores.seeds["number"] == 0].groupby(by)))
    for (suite, *size), labels in numbers.compared(scores).items():
        if len(labels) < 2:
            continue
        wanted = len(set().union(*labels.values()))
        rows = []
        for label, tasks in labels.items():
            ends = numbers.interval([*tasks.values()])
            mean = f"{numbers.iqm(*tasks.values()):.1f}"
            mark = marks(scores, known[(suite, label, *size)])
            row = {"algorithm": label + mark, "tasks": f"{len(tasks)} of {wanted}"}
            row["IQM"] = mean + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")
            for other, theirs in labels.items():
                ours, against = numbers.shared(tasks, theirs)
                p = numbers.improvement(ours, against) if ours and other != label else None
                row[f"> {other}"] = (
                    "{:.0f} [{:.0f}, {:.0f}]".format(*np.multiply(p, 100)) if p else ""
                )
            rows.append(row)
        tables[f"{suite}, {length(*size)} updates"] = pd.DataFrame(rows)
    return tables


def main_tables(scores) -> dict:
    """{budget: scores} of the two budgets that most algorithms and datasets share."""
    cells = {(data, label, *size) for (data, label, *size, _), _ in scores.groups()}
    sizes = [tuple(size) for _, _, *size in cells]
    most = sorted(set(sizes), key=lambda size: (sizes.count(size), size), reverse=True)[:2]
    table, tables = overview_table(scores), {}
    for budget in (length(*size) for size in most):
        part = table[table["updates"] == budget].drop(columns="updates")
        tables[budget] = part.loc[:, (part != "").any()]
    return tables


def readme_text(scores) -> str:
    """The part between the marks of a README."""
    counts = sorted({*scores.runs["final_eval_episodes"]})
    episodes = f"{counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")
    text = f"Last policies, mean ± standard deviation over four seeds, {episodes} episodes each. "
    text += "°: networks sized by the command, not the config. "
    text += "Other budgets, online, best policies, commits, suites: "
    text += "[report.md](benchmarks/results/report.md).\n"
    for budget, table in main_tables(scores).items():
        text += f"\nAfter {budget} updates:\n\n{markdown(table)}"
    return text


def all_tables(scores) -> dict:
    tables = {"overview": overview_table(scores), "runs": results_table(scores)}
    return tables | {"online": online_table(scores), "suites": suite_tables(scores)}


def report_text(tables: dict) -> str:
    """All tables."""
    parts = ["# Results\n\nWritten by tools/report.py, whose first lines tell what is shown.\n"]
    parts += [f"## Overview\n\n{markdown(tables['overview'])}"]
    parts += [f"## Runs\n\n{markdown(tables['runs'])}"]
    if len(tables["online"]):
        parts += [f"## Online\n\n{markdown(tables['online'])}"]
    about = "Interquartile mean [95 % interval]; `> X`: probability of improvement over X in %."
    parts += [f"## {k}\n\n{about}\n\n{markdown(v)}" for k, v in tables["suites"].items()]
    return "\n".join(parts)


def filled(readme: Path, text: str) -> bytes:
    """`readme` with `text` between its two marks; all else stays to the byte."""
    old, marks = readme.read_bytes(), [mark.encode() for mark in (BEGIN, END)]
    if [old.count(mark) for mark in marks] != [1, 1] or old.find(marks[0]) > old.find(marks[1]):
        raise StoreError(f"{readme} needs {BEGIN!r} and below it {END!r}, each once")
    head, tail = old.partition(marks[0])[0], old.partition(marks[1])[2]
    line = b"\r\n" if b"\r\n" in old else b"\n"
    return head + f"{BEGIN}\n{text}{END}".encode().replace(b"\n", line) + tail


@contextlib.contextmanager
def replaced(path: Path):
    """A file to write that takes the place of `path` once it is whole."""
    path = path.resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.part")
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written, it is as it was ({error})") from None
    finally:
        partial.unlink(missing_ok=True)


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(description=__doc__, **style)
    parser.add_argument("root", type=Path, nargs="?", default=RESULTS, help="a store, or runs")
    parser.add_argument("--readme", type=Path, help="a file whose marked part is replaced")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (the root)")
    try:
        args = parser.parse_args(argv)
        out, scores = args.out or args.root, numbers.read(args.root)
        if scores.seeds.empty:
            problem = f"no finished run with a final evaluation below {args.root}"
            raise StoreError(f"{problem}: train first, for example make train")
        readme = filled(args.readme, readme_text(scores)) if args.readme else b""
        out.mkdir(parents=True, exist_ok=True)
        tables = all_tables(scores)
        files = {out / "report.md": report_text(tables).encode()}
        files |= {out / "report.html": page.build(scores, tables).encode()}
        files |= {args.readme: readme} if args.readme else {}
        for path, content in files.items():
            with replaced(path) as partial:
                partial.write_bytes(content)
        with replaced(out / "report.png") as partial:
            pictures.overview(scores.evaluations, partial)
    except (StoreError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'stopped'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    print(markdown(tables["runs"]))
    print(f"{out / 'report.html'} is the whole report; also report.md and report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
