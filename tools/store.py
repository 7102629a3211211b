"""The results store: finished runs as three tables that pandas reads.

    python tools/store.py RUN [RUN ...]     # puts the runs there or below into benchmarks/results
    python tools/store.py RUN --into DIR    # or into another store

    pandas.read_parquet("benchmarks/results/runs")      # a row a run: settings, data, machine
    pandas.read_parquet("benchmarks/results/episodes")  # a row an evaluation episode
    pandas.read_parquet("benchmarks/results/metrics")   # a row a logged value of training

The column `run` joins them. Each run has a file of its own in each table, which is written once:
git keeps every version of a binary file, and two branches that add runs do not meet in one file. To
take a run out, delete its three files. What is written was checked: every episode that the run's
settings ask for is there, finite and once, their means are those that the run told, no run of the
same settings holds the same seed, and no path of a machine stands in it.
"""

import argparse
import glob
import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
# Where runs may differ and still be of the same settings: seeds, machine, what changes no number.
SEEDS_AND_MACHINE = ("seed", "num_seeds", "fallback_dataset_id", "download", "log_every")
SEEDS_AND_MACHINE += ("checkpoint_every", "device", "compile", "wandb", "wandb_project", "label")
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "minari")
NAMES = {"TD3BC": "TD3+BC", "CalQL": "Cal-QL", "XQL": "X-QL", "SACN": "SAC-N"}  # as in their papers
NAMES |= {f"Discrete{name}": f"Discrete {name}" for name in ("CQL", "BCQ", "DT")}
TEXT, WHOLE, NUMBER, YES = pa.string(), pa.int64(), pa.float64(), pa.bool_()
SEED = {"run": TEXT, "seed": WHOLE, "update": WHOLE, "environment_step": WHOLE}
SCHEMAS = {
    "runs": {
        "run": TEXT,
        "label": TEXT,
        "algorithm": TEXT,  # the agent's class
        "script": TEXT,  # of algorithms/
        "dataset_id": TEXT,  # really used
        "fingerprint": TEXT,  # of the data
        "source": TEXT,  # of the data, as its metadata tell
        "env_id": TEXT,
        "environment_differs": TEXT,  # how it differs from D4RL's, else null
        "ref_min_score": NUMBER,  # returns of score 0 and 100
        "ref_max_score": NUMBER,
        "num_updates": WHOLE,  # offline
        "online_steps": WHOLE,
        "seed": WHOLE,  # the first
        "num_seeds": WHOLE,
        "final_eval_episodes": WHOLE,  # a seed
        "checkpoint": YES,  # went on from another run
        "seconds": NUMBER,  # of training, evaluation apart
        "commit": TEXT,
        "command": TEXT,
        "machine": TEXT,
        "threads": WHOLE,
        "packages": TEXT,  # JSON: versions
        "config": TEXT,  # JSON: every setting
        "env_spec": TEXT,  # JSON: the data's environment; null in older rows, and so below
        "began": WHOLE,  # ns since 1970
    },
    "episodes": {
        **SEED,
        "final": YES,  # of the last evaluation
        "target": NUMBER,  # return asked for, of sequence models, else null
        "episode": WHOLE,
        "return": NUMBER,
        "length": WHOLE,
        "score": NUMBER,  # null where the data have no reference returns
    },
    "metrics": {**SEED, "name": TEXT, "value": pa.float32()},
}
SCHEMAS = {table: pa.schema(list(columns.items())) for table, columns in SCHEMAS.items()}


class StoreError(Exception):
    """What is wrong with a run or the store and how to mend it, in one line."""


@dataclass
class Results:
    """Three tables with the columns of SCHEMAS, joined by `run`."""

    runs: pd.DataFrame
    episodes: pd.DataFrame
    metrics: pd.DataFrame

    def check_joined(self) -> None:
        """Raises StoreError where a run stands twice, lacks facts or is not in all tables."""
        again = self.runs["run"][self.runs["run"].duplicated()]
        require(again.empty, f"run {again.min()} is there twice: delete one of its files")
        known, played = set(self.runs["run"]), set(self.episodes["run"])
        for name in sorted(known ^ played | set(self.metrics["run"]) - known):
            lost = "episodes" if name in known else "row in runs"
            raise StoreError(f"run {name} has no {lost}: add it again, or delete its other files")
        for row in records(self.runs):
            check_facts(row)

    def check(self) -> None:
        """Raises StoreError where a run is not whole, or two hold the same seed."""
        self.check_joined()
        episodes = dict(list(self.episodes.groupby("run")))
        metrics = dict(list(self.metrics.groupby("run")))
        rows = records(self.runs)
        for i, row in enumerate(rows):
            check_run(row, episodes[row["run"]], metrics.get(row["run"], self.metrics[:0]))
            check_paths(row)
            for other in rows[:i]:
                check_apart(row, other)


def require(condition, problem: str) -> None:
    if not condition:
        raise StoreError(problem)


def records(table: pd.DataFrame) -> list[dict]:
    """The rows, None where nothing is."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


# ---- a run folder as tables


def read_folder(folder: Path) -> Optional[Results]:
    """A finished run as tables of one run; None where nothing was played after its last update.

    Raises StoreError, which names the folder, where files are broken, rows miss or do not agree.
    """
    try:
        result = json.loads((folder / "result.json").read_bytes())
        if result["last"] == []:
            return None
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        about = json.loads((folder / "environment.json").read_bytes())
        names = ("episodes", "metrics")
        rows = {name: read_rows(folder / f"{name}.jsonl") for name in names}
        run = describe({**config, **about, **result}, config, rows["episodes"])
        run["checkpoint"] = bool(about.get("checkpoint"))
        run["env_spec"] = about.get("eval_env_spec") or about.get("env_spec")
        run["began"] = began(folder) or None
        episodes = [{"environment_step": 0, **row, "run": run["run"]} for row in rows["episodes"]]
        tables = {"runs": [run], "episodes": episodes, "metrics": values(run["run"], rows)}
        results = Results(**{name: frame(name, content) for name, content in tables.items()})
        check_facts(records(results.runs)[0])
        check_run(records(results.runs)[0], results.episodes, results.metrics)
        check_told(results.episodes, result["last"])
    except StoreError as error:
        raise StoreError(f"{folder}: {error}") from None
    except OSError as error:
        missing = f"{error.filename} cannot be read ({error.strerror})"
        raise StoreError(f"{missing}: a run has five files; move it away or train anew") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError) as error:
        raise StoreError(f"{folder} lacks something ({error!r:.200}): move it away") from None
    except (TypeError, ValueError, yaml.YAMLError, pa.ArrowException) as error:
        what = " ".join(f"{error!r:.200}".split())
        raise StoreError(f"{folder} cannot be read ({what}): move it away") from None
    return results


def read_rows(path: Path) -> list:
    """The rows of a file of JSON lines."""
    try:
        return [dict(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path.name} has no whole rows ({error!r:.200}): move it away") from None


def frame(table: str, rows: list) -> pd.DataFrame:
    return pa.Table.from_pylist(rows, SCHEMAS[table]).to_pandas()


def describe(facts: dict, config: dict, episodes: list) -> dict:
    """The row of a run, without paths of the machine it ran on."""
    packages = facts.get("packages") or {n: facts[n] for n in PACKAGES if n in facts}
    words = [str(word) for word in facts["command"]]
    names = [name for name in SCHEMAS["runs"].names if name not in ("env_spec", "began")]
    row = {name: facts.get(name) for name in names}
    row |= {"script": facts.get("script") or Path(words[0]).stem, "command": command(words)}
    row |= {"online_steps": facts.get("online_steps") or 0, "machine": machine(facts["machine"])}
    row |= {"packages": json.dumps(packages), "config": json.dumps(config, sort_keys=True)}
    content = json.dumps([row, episodes])
    slug = "-".join([facts["label"], *facts["dataset_id"].split("/")[-2:]]).lower()
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    row["run"] = f"{re.sub(r'[^a-z0-9.]+', '-', slug).strip('-.')}-{digest}"
    return row


def command(words: list) -> str:
    """The command line, its paths as from the repository, without what tells one folder apart."""
    parts = [x for word in words for x in (word.split("=", 1) if word[:2] == "--" else [word])]
    kept, words = [], iter(parts)
    for word in words:
        if word in ("--run_dir", "--resume"):
            next(words, None)
        else:
            inside = re.search(r".*/((?:algorithms|configs|datasets)/.*)", word)
            kept.append(inside[1] if inside else Path(word).name if word[:1] == "/" else word)
    return shlex.join(["python", *kept])


def machine(text: str) -> str:
    """Without the kernel's release, which can name a host."""
    return re.sub(r"^(\w+)-\S*?(x86_64|aarch64|arm64|AMD64)[^\s,]*", r"\1 \2", text)


def values(run: str, rows: dict) -> list:
    """Rows of `metrics`, without the means of episodes, which stand in `episodes`."""
    where = ("seed", "update")
    return [
        {"environment_step": row.get("environment_step", 0), **{n: row[n] for n in where}}
        | {"run": run, "name": name, "value": value}
        for row in rows["metrics"]
        for name, value in row.items()
        if "/" in name and not name.startswith("eval/")
    ]


# ---- checks


def check_facts(run: dict) -> None:
    """What a row of `runs` has to tell."""
    where = f"run {run['run']}"
    for name in ("label", "algorithm", "script", "dataset_id", "env_id", "command", "machine"):
        known = isinstance(run[name], str) and run[name]
        require(known, f"{where}: {name} is empty: move the run away")
    for name in ("num_updates", "online_steps", "seed", "num_seeds", "seconds"):
        known = run[name] is not None and np.isfinite(run[name])
        require(known, f"{where}: {name} is not a finite number: move the run away")
    for name in ("config", "packages"):
        try:
            known = isinstance(json.loads(run[name]), dict)
        except (TypeError, ValueError, RecursionError):
            known = False
        require(known, f"{where}: {name} holds no names and values: move the run away")


def check_run(run: dict, episodes: pd.DataFrame, metrics: pd.DataFrame) -> None:
    """The tables of one run: whole, finite, and as its settings say."""
    for table in (episodes.drop(columns=["target", "score"]), metrics):
        numbers = table.select_dtypes("number").to_numpy(np.float64)
        require(np.isfinite(numbers).all(), "a logged value is not finite: move the run away")
    scored = np.isfinite(episodes["score"].to_numpy())
    require(scored.all() or episodes["score"].isna().all(), "some episodes lack a finite score")
    key = ["seed", "update", "environment_step", "final", "target", "episode"]
    require(not episodes.duplicated(key).any(), "an episode is there twice: move the run away")
    require(not episodes[[*key[:4], "length"]].isna().any(axis=None), "an episode lacks a number")
    final = first_target(episodes[episodes["final"]])
    found = final.groupby("seed").size().to_dict()
    wanted = range(run["seed"], run["seed"] + run["num_seeds"])
    asked = dict.fromkeys(wanted, run["final_eval_episodes"])
    require(found == asked, f"final episodes of its seeds are {found}, not {asked}: train anew")


def check_paths(run: dict) -> None:
    """Nothing names a place of one machine."""
    for name, value in run.items():
        path = isinstance(value, str) and re.search(r"(?:^|[\s\"'=])(/[\w.-][^\s\"']*)", value)
        told = f"{name} holds {path and path[1]}, a path of one machine: train from a relative one"
        require(not path, f"run {run['run']}: {told}")


def first_target(episodes: pd.DataFrame) -> pd.DataFrame:
    """Of a sequence model that was asked for several returns, the episodes of the first."""
    first = episodes.groupby(["run", "seed"])["target"].transform("first")
    return episodes[episodes["target"].eq(first) | episodes["target"].isna()]


def check_told(episodes: pd.DataFrame, last: list) -> None:
    """The means that a run told are those of its episodes."""
    final = first_target(episodes[episodes["final"]])
    means = final.groupby("seed")[["return", "length", "score"]].mean()
    for row in last:
        for name, mean in means.loc[row["seed"]].dropna().items():
            same = np.isclose(mean, row[f"eval/{name}"], rtol=1e-6)
            require(same, f"seed {row['seed']}: eval/{name} is not the mean of its episodes")


def settings(run: dict) -> dict:
    """What runs have to share to be joined: settings, data, environment, whence they began."""
    config = {k: v for k, v in json.loads(run["config"]).items() if k not in SEEDS_AND_MACHINE}
    names = ("algorithm", "fingerprint", "env_id", "environment_differs", "checkpoint")
    more = {"env_spec": run["env_spec"], "return of score 0": run["ref_min_score"]}
    more |= {"return of score 100": run["ref_max_score"]}
    known = {name: value for name, value in more.items() if value is not None}
    return {**config, **{name: run[name] for name in names}, **known}


def differences(one: dict, other: dict) -> list[str]:
    """Settings that one of them lacks are those of an older script: no difference."""
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def check_apart(run: dict, other: dict) -> None:
    """No seed stands twice under the same settings."""
    if NAMES.get(run["label"], run["label"]) != NAMES.get(other["label"], other["label"]):
        return
    if any(run[n] != other[n] for n in ("dataset_id", "num_updates", "online_steps")):
        return
    seeds = [set(range(r["seed"], r["seed"] + r["num_seeds"])) for r in (run, other)]
    both = sorted(seeds[0] & seeds[1])
    if both and not differences(settings(run), settings(other)):
        mend = f"delete {other['run']}.parquet in the three tables or train other seeds"
        raise StoreError(f"{run['run']}: seeds {both} of the same settings are stored: {mend}")


# ---- the store


def files(root: Path) -> dict:
    """{table: the runs that have a file there}"""
    return {table: {path.stem for path in (root / table).glob("*.parquet")} for table in SCHEMAS}


def is_store(root: Path) -> bool:
    return all(files(root).values())


def read(root: Path) -> Results:
    """The store at `root`, or the finished runs below it. Raises StoreError."""
    if not is_store(root):
        return collect(finished(root))
    there = files(root)
    for table, names in there.items():
        for name in sorted(set().union(*there.values()) - names):
            lost = f"run {name} has no file in {table}"
            raise StoreError(f"{lost}: add it again, or delete its other files")
    results = Results(**{table: read_table(root, table) for table in SCHEMAS})
    order = {"key": lambda times: times.fillna(0), "kind": "stable", "ignore_index": True}
    results.runs = results.runs.sort_values("began", **order)  # the oldest first, as `collect`
    results.check_joined()
    return results


def finished(root: Path) -> list[Path]:
    """The folders of finished runs there and below, also behind links."""
    found = glob.iglob("**/result.json", root_dir=root, recursive=True, include_hidden=True)
    return sorted((root / path).parent for path in found)


def read_table(root: Path, table: str) -> pd.DataFrame:
    try:
        return pd.read_parquet(root / table, schema=compact(table))
    except (OSError, ValueError, pa.ArrowException) as error:
        what = " ".join(str(error).split())
        raise StoreError(f"{root} cannot be read ({what:.300}): restore it from git") from None


def compact(table: str) -> pa.Schema:
    """A table's columns, with words that stand in many rows as categories."""
    schema = SCHEMAS[table]
    for name in ("run", "name") if table != "runs" else ():
        if name in schema.names:
            words = pa.field(name, pa.dictionary(pa.int32(), TEXT))
            schema = schema.set(schema.get_field_index(name), words)
    return schema


def collect(folders: list) -> Results:
    """Run folders as one set of tables, the oldest first; copies and what has no final evaluation
    are left out.
    """
    parts = {}
    for results in map(read_folder, sorted(folders, key=began)):
        if results is not None:
            parts[results.runs["run"][0]] = results
    empty = Results(**{name: frame(name, []) for name in SCHEMAS})
    names = {
        n: [getattr(part, n) for part in parts.values()] or [getattr(empty, n)] for n in SCHEMAS
    }
    return Results(**{name: pd.concat(frames, ignore_index=True) for name, frames in names.items()})


def began(folder: Path) -> int:
    """When a run began, in ns; 0 for one that does not tell."""
    try:
        return int(json.loads((folder / "environment.json").read_bytes())["id"], 16)
    except (OSError, LookupError, RecursionError, TypeError, ValueError):
        return 0


def add(places: list, root: Path) -> list[str]:
    """Put the finished runs in some folders, or below them, into the store at `root`: all or none.

    Returns the names of those that are new. Raises StoreError.
    """
    new = {}
    for place in places:
        folders = finished(place)
        require(folders, f"{place} holds no finished run: train it")
        for folder in folders:
            results = read_folder(folder)
            why = "env_id is none, or final_eval_episodes is 0"
            require(results, f"{folder} has no final evaluation ({why}): nothing to store")
            new[results.runs["run"][0]] = results
    whole = set.intersection(*files(root).values())  # what was cut off between two tables is not
    rows = records(read_table(root, "runs")) if whole else []
    rows = [row for row in rows if row["run"] in whole]
    for row in rows:
        check_facts(row)
    for name in new.keys() & {row["run"] for row in rows}:
        del new[name]
    for results in new.values():
        (row,) = records(results.runs)
        check_paths(row)
        for other in rows:
            check_apart(row, other)
        rows.append(row)
    for name, results in new.items():
        write(results, name, root)
    return list(new)


def write(results: Results, name: str, root: Path) -> None:
    """A file in each table, `runs` last: a run without its row there is not whole."""
    for table in ("episodes", "metrics", "runs"):
        content = pa.Table.from_pandas(getattr(results, table), SCHEMAS[table], False)
        (root / table).mkdir(parents=True, exist_ok=True)
        partial = root / table / f".{name}.part"  # pandas skips a name that starts so
        plain = content.replace_schema_metadata()  # pandas' notes are longer than a row
        small = {"write_statistics": False, "store_schema": False, "compression_level": 19}
        pq.write_table(plain, partial, compression="zstd", **small)
        partial.replace(root / table / f"{name}.parquet")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise StoreError(f"{message}: --help shows how to call this")


def main(argv=None) -> int:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = Parser(description=__doc__, **style)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder of runs")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="DIR", help="the store")
    try:
        args = parser.parse_args(argv)
        new = add(args.runs, args.into)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(new)} runs are new in {args.into}", *new, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
