"""The page of a report: one HTML file that needs nothing else."""

import ast
import base64
import functools
import json
import re
import textwrap

import jinja2
import pandas as pd
import pictures
import scores as numbers
import store
from markupsafe import Markup, escape

# Settings that stand elsewhere on the page or say nothing about the algorithm.
ELSEWHERE = {*store.SEEDS_AND_MACHINE, "dataset_id", "env_id", "env_kwargs", "ref_min_score"}
ELSEWHERE |= {"ref_max_score", "num_updates", "online_steps", "max_envs"}


def build(scores: numbers.Scores, tables: dict) -> str:
    """The page. `tables` holds the report's: overview, runs, online, and suites by title."""
    folder = store.REPOSITORY / "tools"
    options = {"autoescape": True, "trim_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), **options)
    environment.filters["prose"] = prose
    main = pictures.main_panels(scores.evaluations)
    content = {name: html(tables[name]) for name in ("overview", "runs", "online")}
    content |= {"facts": facts(scores), "suites": suites(scores, tables["suites"])}
    content |= {"main": [curves(key, rows) for key, rows in main.items()]}
    content |= {"datasets": datasets(scores), "algorithms": algorithms(scores, tables["runs"])}
    return environment.get_template("page.html").render(content)


def html(table: pd.DataFrame) -> Markup:
    """Escaped by pandas; nothing where there are no rows."""
    return Markup("" if table.empty else table.to_html(index=False, border=0))


def prose(text: str) -> Markup:
    """With `names` as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def image(alt: str, svg: str) -> tuple:
    """Alternative text and the picture itself as an address."""
    return alt, f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def facts(scores: numbers.Scores) -> str:
    seeds, episodes = len(scores.seeds), len(scores.results.episodes)
    data, labels = scores.runs["data"].nunique(), scores.runs["label"].nunique()
    return f"{labels} algorithms, {data} datasets, {seeds} trained policies, {episodes:,} episodes."


def curves(key: tuple, rows: pd.DataFrame, title: str = "", **options) -> tuple:
    title = title or f"{key[0]}\n{numbers.length(*key[1:3])} updates"
    alt = f"Learning curves: {' '.join(title.split())}"
    lines = len(rows[["label", "number"]].drop_duplicates())
    return image(alt, pictures.svg(pictures.curves, lines, rows, title, **options))


def suites(scores: numbers.Scores, tables: dict) -> list[dict]:
    """Table and performance profiles of each suite; profiles of those that have all its tasks."""
    found = []
    known = numbers.compared(scores)
    for (name, *size), labels in known.items():
        title = f"{name}, {numbers.length(*size)} updates"  # as suite_tables calls it
        if title in tables:
            most = max(map(len, labels.values()))
            whole = {label: tasks for label, tasks in labels.items() if len(tasks) == most}
            drawn = pictures.svg(pictures.profiles, len(whole), whole, "performance profiles")
            images = [image(f"Performance profiles: {title}", drawn)]
            found.append({"title": title, "table": html(tables[title]), "images": images})
    return found


def datasets(scores: numbers.Scores) -> list[dict]:
    """Of each dataset its curves, and what a choice of a seed by episodes is worth."""
    found = {}
    policies = dict(list(scores.seeds.groupby(pictures.PANEL)))
    for key, rows in pictures.budgets(scores.evaluations).items():
        size = f"{numbers.length(*key[1:3])} updates"
        images = found.setdefault(key[0], [])
        images.append(curves(key, rows, size))
        named = policies[key].groupby(["label", "number"])
        own = {n[0] if not n[1] else f"{n[0]} ({n[1] + 1})": p for n, p in named if len(p) > 1}
        if own:
            own = {name: scores.episodes(part) for name, part in own.items()}
            title = f"choosing a seed, {size}"
            drawn = pictures.svg(pictures.choices, len(own), own, title, key[3])
            images.append(image(f"Expected score of the chosen seed: {key[0]}, {size}", drawn))
    return [{"name": name, "images": images} for name, images in found.items()]


def algorithms(scores: numbers.Scores, table: pd.DataFrame) -> list[dict]:
    """A part of the page for each label."""
    parts, rates = [], speeds(scores)
    for number, (label, runs) in enumerate(scores.runs.groupby("label"), 1):
        text, deviations = docstring(runs["script"].iloc[-1])
        apart, same = settings(runs)
        own = scores.evaluations[scores.evaluations["label"] == label]
        rows = table["algorithm"].str.fullmatch(rf"{re.escape(label)}( \(\d+\))?( \(return\))?")
        panels = pictures.budgets(own).items()
        part = {"label": label, "id": f"a{number}-" + re.sub(r"[^a-z0-9]+", "-", label.lower())}
        part |= {"color": pictures.look(label)["color"], "text": text, "deviations": deviations}
        part |= {"script": runs["script"].iloc[-1] if text else "", "results": html(table[rows])}
        part |= {"images": [curves(key, rows, seeds=True) for key, rows in panels]}
        part |= {"alone": html(alone(runs["script"].iloc[-1]))}
        part |= {"speed": html(speed(rates, runs)), "settings": html(apart), "same": same}
        part["commands"] = [
            (f"{run['data']}, {numbers.length(run['updates'], run['steps'])} updates", run)
            for run in store.records(runs.assign(commit=runs["commit"].map(numbers.short)))
        ]
        parts.append(part)
    return parts


def docstring(script: str) -> tuple:
    """Paragraphs ("p" or "pre", text) of a script's docstring, and its deviations (name, text)."""
    path = store.REPOSITORY / "algorithms" / f"{script}.py"
    if not script.isidentifier() or not path.is_file():
        return [], []
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    head, _, rest = text.partition("\n\nDeviations:\n")
    listed = re.split(r"\n\n(?!    D\d)", rest, maxsplit=1)[0]
    items = re.findall(r"^    (D\d+)  (.*?)(?=^    D\d|\Z)", listed, re.MULTILINE | re.DOTALL)
    paragraphs = [("pre" if p.startswith("  ") else "p", p) for p in head.split("\n\n")]
    shown = [(kind, textwrap.dedent(p)) for kind, p in paragraphs]
    return shown, [(name, " ".join(body.split())) for name, body in items]


def settings(runs: pd.DataFrame) -> tuple:
    """A column of settings for each run, those in which they differ; lines of the others."""
    configs = [json.loads(config) for config in runs["config"]]
    names = dict.fromkeys(n for config in configs for n in config if n not in ELSEWHERE)
    values = {n: [json.dumps(c[n]) if n in c else "" for c in configs] for n in names}
    apart = [n for n in names if len({v for v in values[n] if v}) > 1]
    same = [f"{n}: {max(values[n])}" for n in names if n not in apart]
    size = zip(runs["updates"], runs["steps"], strict=True)
    columns = {"data": [*runs["data"]], "updates": [numbers.length(*pair) for pair in size]}
    return pd.DataFrame({**columns, **{n: values[n] for n in apart}}), same


def speeds(scores: numbers.Scores) -> dict:
    """{run: the median of its updates a second before the switch}"""
    rows = scores.results.metrics
    rows = rows[rows["name"] == "time/updates_per_second"].merge(scores.runs[["run", "updates"]])
    return rows[rows["update"] <= rows["updates"]].groupby("run")["value"].median().to_dict()


def speed(rates: dict, runs: pd.DataFrame) -> pd.DataFrame:
    """How fast each run trained, and on what."""
    rows = []
    for run in store.records(runs):
        rate, versions = rates.get(run["run"]), json.loads(run["packages"])
        row = {"data": run["data"], "updates": numbers.length(run["updates"], run["steps"])}
        row |= {"seeds at once": str(run["num_seeds"])}
        row |= {"updates/s": f"{rate:.1f}" if rate else ""}
        row |= {"in all": f"{rate * run['num_seeds']:.1f}" if rate else ""}
        row |= {"training, min": f"{run['seconds'] / 60:.0f}", "machine": run["machine"]}
        row |= {
            "threads": f"{run['threads']:.0f}" if run["threads"] else "",
            "commit": numbers.short(run["commit"]),
        }
        row |= {"versions": ", ".join(f"{n} {v}" for n, v in versions.items())}
        rows.append(row)
    return pd.DataFrame(rows)


@functools.cache
def measured() -> pd.DataFrame:
    """What benchmarks/speed.py measured: rows of script, members, mode and updates a second."""
    path = store.RESULTS / "speed.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return pd.DataFrame(rows, columns=["algorithm", "members", "mode", "updates_per_second"])


def alone(script: str) -> pd.DataFrame:
    """Of a script its updates a second by population size, eager and compiled."""
    rows = measured()[measured()["algorithm"] == script]
    table = rows.pivot(index="members", columns="mode", values="updates_per_second")
    shown = table.map("{:.1f}".format).rename(columns="{}, updates/s".format)
    return (
        shown.rename_axis(columns=None).reset_index().rename(columns={"members": "seeds at once"})
    )
