"""Numbers of a report: what the rows of the store mean for an algorithm.

A group is what is compared: an algorithm (its label) on a dataset for some updates (and online
steps). A score of a seed is the mean of the final evaluation's episodes. Statistics over the tasks
of a suite follow Agarwal et al. (arXiv 2108.13264); their package rliable needs pandas below 3, and
its percentile intervals hold the truth in 75 to 90 % of the cases where there are four seeds (see
`interval`), so the bootstrap is SciPy's.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import store
from scipy import stats

GROUP = ["data", "label", "updates", "steps", "number"]
BUDGET = ["updates", "steps"]


@dataclass
class Scores:
    """Rows for each run, for each seed and evaluation, for each seed; all with their group.

    `evaluations` holds `value`, the mean score (return, where the data have no references) of an
    evaluation; `seeds` holds `last`, that of the final one, and `best`, an oracle's.
    """

    results: store.Results
    runs: pd.DataFrame
    evaluations: pd.DataFrame
    seeds: pd.DataFrame

    def groups(self, by=GROUP) -> list:
        """(name, rows of `seeds`) for each group, or for each value of other columns."""
        return list(self.seeds.groupby(list(by), sort=True))

    def episodes(self, rows: pd.DataFrame) -> list[np.ndarray]:
        """Values of the final episodes of each of some rows of `seeds`."""
        return [self.final[run, seed] for run, seed in zip(rows["run"], rows["seed"], strict=True)]

    @functools.cached_property
    def final(self) -> dict:
        """(run, seed) -> values of its final episodes."""
        rows = store.first_target(self.results.episodes[self.results.episodes["final"]])
        values = rows["score"].fillna(rows["return"])
        return {key: part.to_numpy() for key, part in values.groupby([rows["run"], rows["seed"]])}


def read(root: Path) -> Scores:
    """Of a store, or of the run folders below `root`. Raises store.StoreError."""
    results = store.read(root)
    runs = results.runs.assign(label=results.runs["label"].replace(store.NAMES))
    runs = runs.rename(columns={"dataset_id": "data", "num_updates": "updates"})
    runs = runs.rename(columns={"online_steps": "steps"})
    runs["unit"] = runs["run"].map(results.episodes.groupby("run")["score"].count() > 0)
    runs["unit"] = runs["unit"].map({True: "score", False: "return"})
    runs["number"] = numbers(runs, store.records(results.runs))
    runs["suite"] = [suite(*names) for names in zip(runs["data"], runs["env_id"], strict=True)]
    evaluations = evaluate(results.episodes, runs)
    by = [*GROUP, "seed"]
    keep = ["run", "suite", "unit", "last", "best"]
    final = evaluations[evaluations["final"]].rename(columns={"value": "last"})
    best = evaluations.groupby(by, as_index=False)["value"].max()
    seeds = final.merge(best.rename(columns={"value": "best"}), on=by)[[*by, *keep]]
    return Scores(results, runs, evaluations, seeds.sort_values(by, ignore_index=True))


def numbers(runs: pd.DataFrame, rows: list) -> list[int]:
    """0 for a run of a group's first settings, 1 for one of its second, ..."""
    kinds, found = {}, []
    for (*key, unit), row in zip(runs[[*GROUP[:4], "unit"]].to_numpy(), rows, strict=True):
        own, others = {**store.settings(row), "unit": unit}, kinds.setdefault(tuple(key), [])
        apart = [store.differences(own, other) for other in others]
        if [] not in apart:
            others.append(own)
            if apart:
                problem = f"differs from other runs of {key[1]} in {', '.join(apart[0])}"
                told = f"{row['run']} {problem}: a row of its own; --label names it"
                print(told, file=sys.stderr)
            apart.append([])
        found.append(apart.index([]))
    return found


def evaluate(episodes: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each seed and evaluation. Of a seed that was run twice the later run counts."""
    rows = store.first_target(episodes)
    rows = rows.assign(value=rows["score"].fillna(rows["return"]))
    where = ["run", "seed", "update", "environment_step", "final"]
    means = rows.groupby(where, sort=False, as_index=False)["value"].mean()
    known = runs[["run", *GROUP, "suite", "unit"]]
    means = means.merge(known, on="run")
    pairs = known.merge(means[["run", "seed"]].drop_duplicates(), on="run")
    old = pairs.duplicated([*GROUP, "seed"], keep="last")
    for run, seeds in pairs[old].groupby("run")["seed"]:
        print(f"{run}: a later run replaces its seeds {sorted(seeds)}", file=sys.stderr)
    return means.merge(pairs.loc[~old, ["run", "seed"]], on=["run", "seed"])


def length(updates: int, steps: int) -> str:
    """A budget in words."""
    return f"{updates:,}" + (f" + {steps:,} online" if steps else "")


def short(commit) -> str:
    """Eight digits of a commit, and whether files were changed since."""
    commit = commit if isinstance(commit, str) else "unknown"
    return commit[:8] + ("-dirty" if commit.endswith("-dirty") else "")


@functools.cache
def tasks() -> pd.DataFrame:
    return pd.read_csv(store.REPOSITORY / "datasets" / "tasks.csv")


@functools.cache
def suite(data: str, env_id: str) -> str:
    """Where data come from and D4RL's suite of their environment, or its family in Gymnasium."""
    name, known = env_id.rsplit("-v", 1)[0], tasks()
    same = known["suite"][known["eval_env"].str.rsplit("-v", n=1).str[0] == name]
    family = same.iloc[0] if len(same) else name.split("/")[0].split("_")[0]
    source = data.strip("/").split("/")[0]
    return f"{'bundled' if source == 'datasets' else source} {family}"


# ---- over the tasks of a suite: each task is an array of scores, one a seed


def iqm(*tasks, axis=-1):
    """Interquartile mean over all tasks and seeds."""
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def interval(tasks: list) -> Optional[tuple]:
    """95 % stratified bootstrap interval of `iqm`; None where a task has a single seed.

    Seeds are drawn anew within each task. With n seeds a task the percentiles of that are too
    narrow by sqrt((n - 1) / n) and know nothing of how uncertain their width is: so the bootstrap
    gives the standard error, made wider by that factor, and Student's t with n - 1 degrees of
    freedom, the least that Welch's rule allows, gives the rest. Tried with made-up seeds (4 or 8, 1
    to 6 tasks): 94 to 99 % hold the truth, but 85 to 93 % where the seeds of one or two tasks are
    of two kinds, good and bad ones (in one case of eight all four are of one kind, and nothing
    shows the other), and 90 to 92 % on two or three tasks with exponential tails.
    """
    seeds = min(map(len, tasks))
    if seeds < 2:
        return None
    draw = {"n_resamples": 2000, "vectorized": True, "method": "percentile"}
    found = stats.bootstrap(tasks, iqm, rng=np.random.default_rng(0), **draw)
    width = stats.t.ppf(0.975, seeds - 1) * np.sqrt(seeds / (seeds - 1)) * found.standard_error
    return iqm(*tasks) - width, iqm(*tasks) + width


def improvement(ours: list, theirs: list) -> tuple:
    """Probability that a seed of ours beats one of theirs, mean over tasks, with a 95 % interval.

    A draw counts half. The interval holds every probability p that is within 1.96 standard errors
    of what was seen, where p tells the error (Newcombe 2006, Statistics in Medicine 25: 559, method
    5): unlike a bootstrap it has a width where all seeds of one are better.
    """
    seen, p = [], np.linspace(0, 1, 1001)
    variance = np.zeros_like(p)
    for x, y in zip(ours, theirs, strict=True):
        seen.append(np.sign(np.subtract.outer(x, y)).mean() / 2 + 0.5)
        more = (len(x) + len(y)) / 2 - 1
        one = 1 + more * ((1 - p) / (2 - p) + p / (1 + p))
        variance += p * (1 - p) * one / (len(x) * len(y))
    mean = float(np.mean(seen))
    inside = p[np.abs(p - mean) <= 1.96 * np.sqrt(variance) / len(seen) + 1e-9]
    return mean, inside.min(), inside.max()


def profile(tasks: list, thresholds: np.ndarray) -> np.ndarray:
    """Share of seeds above each threshold, mean over tasks."""
    return np.mean([(task[:, None] > thresholds).mean(0) for task in tasks], 0)


def by_task(rows: pd.DataFrame) -> dict:
    """{task: the scores of its seeds}"""
    return {data: part["last"].to_numpy() for data, part in rows.groupby("data", sort=True)}


def compared(scores: Scores) -> dict:
    """{(suite, updates, steps): {label: {task: scores}}} of what has scores.

    Of algorithms with several settings on a task the first ones count. Labels that lack a task
    that others of their suite and budget have stand last.
    """
    found = {}
    rows = scores.seeds[(scores.seeds["unit"] == "score") & (scores.seeds["number"] == 0)]
    for (name, *budget), part in rows.groupby(["suite", *BUDGET], sort=True):
        labels = {label: by_task(own) for label, own in part.groupby("label")}
        order = {k: (len(v), iqm(*v.values())) for k, v in labels.items()}
        labels = dict(sorted(labels.items(), key=lambda item: order[item[0]], reverse=True))
        found[(name, *budget)] = labels
    return found


def shared(one: dict, other: dict) -> tuple:
    """The scores of the tasks that both have."""
    both = [task for task in one if task in other]
    return [one[task] for task in both], [other[task] for task in both]


# ---- over the policies of a dataset


def chosen(policies: list, budgets: list, draws: int = 500) -> np.ndarray:
    """Expected score of the policy chosen by n evaluation episodes, for each n of `budgets`.

    The episodes of a budget are spread evenly over the policies (over n of them at random where
    there are fewer episodes), the one with the best mean is taken, and its score is the mean of all
    its stored episodes: the online evaluation budget of Kurenkov and Kolesnikov (arXiv 2110.04156)
    counted in episodes. n = 1 is the mean policy; the last n is what an oracle would nearly take.
    """
    rng, values = np.random.default_rng(0), []
    means, size = np.array([policy.mean() for policy in policies]), (draws, len(policies))
    most = -(-max(budgets) // len(policies))
    played = [rng.choice(policy, (draws, most)).cumsum(1) for policy in policies]
    sums = np.stack(played, 1)  # [draws, policies, episodes]
    for n in budgets:
        each = n // len(policies) + (rng.random(size).argsort(1) < n % len(policies))
        found = np.take_along_axis(sums, np.maximum(each, 1)[..., None] - 1, 2)[..., 0]
        guess = np.where(each > 0, found / np.maximum(each, 1), -np.inf)
        guess += 1e-9 * rng.random(size)  # equals are drawn by lot
        values.append(means[guess.argmax(1)].mean())
    return np.array(values)


def online(evaluations: pd.DataFrame, switch: int) -> dict:
    """Of one seed: the value at the switch, `drop` and `regret`; None where it is not known."""
    at = evaluations["value"][evaluations["update"] == switch]
    later = evaluations[evaluations["update"] > switch]
    early = later["value"][later["environment_step"] <= 10_000]
    drop = max(0.0, at.iloc[-1] - early.min()) if len(at) and len(early) else None
    scored = len(later) and later["unit"].iloc[0] == "score"
    regret = float(1 - later["value"].mean() / 100) if scored else None
    return {"switch": at.iloc[-1] if len(at) else None, "drop": drop, "regret": regret}


# ---- published figures


@functools.cache
def published() -> dict:
    """(data, environment, label, updates, steps) -> published mean, its source."""
    known = tasks().rename(columns={"task": "d4rl"})[["d4rl", "minari_id", "eval_env"]]
    table = pd.read_csv(store.REPOSITORY / "benchmarks" / "published.csv")
    table = table.merge(known, left_on="task", right_on="d4rl")
    keys = zip(*(table[n] for n in ("minari_id", "eval_env", "algorithm", *BUDGET)), strict=True)
    return dict(zip(keys, zip(table["mean"], table["source"], strict=True), strict=True))


def published_for(run: dict) -> Optional[tuple]:
    """Of the same task, D4RL's own data, environment and budget, or None."""
    own = str(run["source"] or "").startswith("d4rl-hdf5") and run["unit"] == "score"
    if not own or isinstance(run["environment_differs"], str):
        return None
    return published().get(tuple(run[n] for n in ("data", "env_id", "label", *BUDGET)))
