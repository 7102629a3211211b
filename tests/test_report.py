"""The report: means, spreads, joined seeds, README, pictures, page, errors."""

import html.parser
import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, contents, load_script, load_tool, words
from test_store import fake_run, store

report = load_tool("tools/report.py")
numbers, page, pictures = report.numbers, report.page, report.pictures


def rows(root) -> list[dict]:
    return report.results_table(numbers.read(root)).to_dict("records")


def test_a_row_holds_mean_and_spread_of_the_last_policies(tmp_path):
    fake_run(tmp_path / "a")
    wanted = {"data": "toy/data-v0", "algorithm": "IQL", "updates": "10", "seeds": "2"}
    wanted |= {"last": "20.0 ± 10.0", "best (oracle)": "30.0 ± 10.0", "episodes": "2"}
    assert rows(tmp_path) == [wanted | {"commit": "01234567"}]


def test_the_best_may_be_the_last(tmp_path):
    fake_run(tmp_path / "a", {5: (0.0, 40.0), 10: (10.0, 30.0)})
    assert rows(tmp_path)[0]["best (oracle)"] == "25.0 ± 15.0"


def test_what_scripts_write_is_reported(tmp_path):
    """Two runs of one script, offline and online; of run folders and of a store alike."""
    iql = load_script("iql")
    for name, changes in (("a", {}), ("b", {"seed": 5}), ("c", {"online_steps": 3})):
        assert iql.main(words(run_dir=f"runs/{name}", num_seeds=2, **changes)) == 0
    found = {row["updates"]: row["seeds"] for row in rows(tmp_path / "runs")}
    assert found == {"6": "4", "6 + 3 online": "2"}
    store.add([*(tmp_path / "runs").iterdir()], tmp_path / "store")
    read = [numbers.read(tmp_path / name) for name in ("runs", "store")]
    texts = [report.report_text(report.all_tables(scores)) for scores in read]
    assert texts[0] == texts[1] and "at the switch" in texts[0]


MARKED = [
    ({"environment_differs": "no pen is dropped"}, " (environment differs)"),
    ({"command": ["iql.py", "--vae_hidden_dim", "64"]}, "°"),
]


@pytest.mark.parametrize("facts, shown", MARKED, ids=["environment", "size"])
def test_a_run_that_is_not_as_its_config_says_so_in_every_table(tmp_path, facts, shown):
    for label in ("IQL", "BC"):
        fake_run(tmp_path / label, label=label, **facts)
    fake_run(tmp_path / "c", CURVE, config={"online_steps": 30_000}, **facts)
    scores = numbers.read(tmp_path)
    assert rows(tmp_path)[0]["last"] == f"20.0 ± 10.0{shown}"
    tables = report.all_tables(scores)
    tables["readme"] = report.main_tables(scores)["10"]
    found = [tables[name] for name in ("overview", "runs", "online", "readme")]
    for table in (*found, *tables["suites"].values()):
        assert all(shown in str(row) for row in table.to_dict("records"))
    assert tables["suites"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    fake_run(tmp_path / "a")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n" + "text\n" * 1000)
    readme.chmod(0o640)
    (tmp_path / "link.md").symlink_to(readme)
    arguments = [str(tmp_path), "--readme", str(tmp_path / "link.md")]
    assert report.main(arguments) == 0 and readme.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link.md").is_symlink()
    before, write = contents(tmp_path), report.Path.write_bytes

    def full(path, content):
        write(path, content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_bytes", full)
    capsys.readouterr()
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "report.md cannot be written" in error
    assert contents(tmp_path) == before


# The switch is at update 10; one environment step an update after it.
CURVE = {5: (60.0, 70.0), 10: (50.0, 60.0), 10_010: (20.0, 30.0), 10_011: (0.0, 10.0)}
CURVE[30_010] = (80.0, 90.0)


def online_run(folder, curve):
    return fake_run(folder, curve, label="CalQL", config={"online_steps": 30_000})


@pytest.mark.parametrize(
    "curve, wanted",
    [
        (CURVE, ("55.0 ± 5.0", "30.0 ± 0.0", "85.0 ± 5.0", "0.62")),
        (
            {10: (50, 50), 15: (60, 60), 20: (100, 100)},
            ("50.0 ± 0.0", "0.0 ± 0.0", "100.0 ± 0.0", "0.20"),
        ),
        ({30_010: (80, 90)}, ("", "", "85.0 ± 5.0", "0.15")),
    ],
    ids=["drops", "does not drop", "no evaluation at the switch"],
)
def test_online_runs_have_a_table_of_their_own(tmp_path, curve, wanted):
    online_run(tmp_path / "a", curve)
    fake_run(tmp_path / "b", label="CalQL")
    assert [row["updates"] for row in rows(tmp_path)] == ["10", "10 + 30,000 online"]
    (found,) = report.online_table(numbers.read(tmp_path)).to_dict("records")
    assert (found["data"], found["algorithm"]) == ("toy/data-v0", "Cal-QL")
    assert (found["at the switch"], found["drop"], found["last"], found["regret"]) == wanted


def returns_only(folder):
    """As of data without reference returns."""
    episodes = [row | {"score": None} for row in store.read_rows(folder / "episodes.jsonl")]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))


def test_returns_stand_in_where_there_are_no_scores(tmp_path):
    returns_only(online_run(tmp_path / "a", CURVE))
    scores = numbers.read(tmp_path)
    (found,) = report.online_table(scores).to_dict("records")
    assert (found["algorithm"], found["last"]) == ("Cal-QL (return)", "850.0 ± 50.0")
    assert found["regret"] == "" and report.suite_tables(scores) == {}
    assert report.main([str(tmp_path)]) == 0


def test_a_run_without_an_environment_has_no_row(tmp_path):
    fake_run(tmp_path / "a", last=[])
    assert report.all_tables(numbers.read(tmp_path))["runs"].empty
    fake_run(tmp_path / "b", seeds=(2, 3))
    assert [row["seeds"] for row in rows(tmp_path)] == ["2"]


def test_two_evaluations_at_one_update_are_drawn(tmp_path):
    """Online, where the updates wait for the first steps: the later one counts."""
    folder = online_run(tmp_path / "a", CURVE)
    later = [r | {"environment_step": 3} for r in store.read_rows(folder / "episodes.jsonl")[4:8]]
    with open(folder / "episodes.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in later)
    assert report.main([str(tmp_path)]) == 0


def test_a_copy_of_a_run_counts_once(tmp_path):
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b")
    assert len(numbers.read(tmp_path).results.episodes) == 8 and rows(tmp_path)[0]["seeds"] == "2"


def test_runs_of_other_seeds_join_and_a_repeated_seed_counts_once(tmp_path, capsys):
    fake_run(tmp_path / "20260101", seeds=(0, 1))
    fake_run(tmp_path / "20260102", {5: (20, 10), 10: (50, 90)}, seeds=(1, 2))
    seeds = numbers.read(tmp_path).seeds
    assert seeds["last"].tolist() == [10, 50, 90] and seeds["best"].tolist() == [20, 50, 90]
    assert "a later run replaces its seeds [1]" in capsys.readouterr().err


def test_the_later_run_is_the_one_that_began_later(tmp_path):
    """Whatever its folder is called."""
    fake_run(tmp_path / "b", {10: (1, 2)}, about={"id": "a0"})
    fake_run(tmp_path / "a", {10: (91, 92)}, about={"id": "100"})
    assert numbers.read(tmp_path).seeds["last"].tolist() == [91, 92]


DIFFERENT = [
    ({"env_id": "Car-v0"}, "env_id"),
    ({"fingerprint": "ab"}, "fingerprint"),
    ({"algorithm": "BC"}, "algorithm"),
    ({"config": {"expectile": 0.9}}, "expectile"),
    ({"about": {"checkpoint": "runs/a"}}, "checkpoint"),
]


@pytest.mark.parametrize("change, name", DIFFERENT)
def test_runs_that_differ_in_more_than_seeds_are_not_joined(tmp_path, capsys, change, name):
    fake_run(tmp_path / "a", config={"expectile": 0.7})
    fake_run(
        tmp_path / "b", {10: (50, 50)}, seeds=(2, 3), **{"config": {"expectile": 0.7}, **change}
    )
    found = {row["algorithm"]: row["last"] for row in rows(tmp_path)}
    assert found == {"IQL": "20.0 ± 10.0", "IQL (2)": "50.0 ± 0.0"}
    assert f"differs from other runs of IQL in {name}: a row" in capsys.readouterr().err
    assert report.main([str(tmp_path)]) == 0


def test_joined_runs_name_each_commit(tmp_path, capsys):
    for seed, commit in enumerate(("a" * 40, "a" * 40, "b" * 40 + "-dirty", None)):
        newer = {"updates_per_step": 1} if seed == 1 else {}
        config = {"expectile": 0.7, "device": str(seed), **newer}
        fake_run(tmp_path / str(seed), {10: (1,)}, (seed,), config=config, commit=commit)
    (row,) = rows(tmp_path)
    assert (row["seeds"], row["commit"]) == ("4", "aaaaaaaa, bbbbbbbb-dirty, unknown")
    assert not capsys.readouterr().err
    text = page.build(numbers.read(tmp_path), report.all_tables(numbers.read(tmp_path)))
    assert all(f"commit <code>{x}</code>" in text for x in ("bbbbbbbb-dirty", "unknown"))


def test_the_overview_has_a_row_an_algorithm_and_a_column_a_dataset(tmp_path):
    """Equal budgets together, the longest first; as many seeds as are not four are told."""
    fake_run(tmp_path / "a", label="BC", seeds=range(4), scores={10: (1, 1, 1, 1)})
    fake_run(tmp_path / "b", label="IQL", dataset_id="datasets/hopper/medium-v0")
    fake_run(tmp_path / "c", {20: (3, 3)}, label="DT", num_updates=20)
    online_run(tmp_path / "d", CURVE)
    table = report.overview_table(numbers.read(tmp_path))
    assert list(table) == ["updates", "algorithm", "hopper/medium-v0", "toy/data-v0"]
    assert table["algorithm"].tolist() == ["DT", "BC", "IQL", "Cal-QL"]
    assert table["toy/data-v0"].tolist()[:3] == ["3.0 ± 0.0 (2 seeds)", "1.0 ± 0.0", ""]


def test_a_label_that_reads_like_second_settings_loses_no_row(tmp_path):
    for i, (label, tau) in enumerate([("IQL", 0.1), ("IQL", 0.2), ("IQL (2)", 0.1)]):
        fake_run(tmp_path / str(i), label=label, config={"tau": tau})
    assert len(report.overview_table(numbers.read(tmp_path))) == 3


def test_other_data_never_share_a_column(tmp_path):
    for i, data in enumerate(("datasets/a/b-v0", "D4RL/a/b-v0", "a/b-v0", "datasets/c/d-v0")):
        fake_run(tmp_path / str(i), {10: (i, i)}, dataset_id=data)
    (row,) = report.overview_table(numbers.read(tmp_path)).to_dict("records")
    names = {"datasets/a/b-v0": 0, "D4RL/a/b-v0": 1, "a/b-v0": 2, "c/d-v0": 3}
    assert {k: row[k] for k in names} == {k: f"{v:.1f} ± 0.0 (2 seeds)" for k, v in names.items()}


def test_the_readme_shows_the_two_budgets_that_most_was_compared_under(tmp_path):
    fake_run(tmp_path / "a", label="BC", seeds=range(4), scores={10: (1, 1, 1, 1)})
    fake_run(tmp_path / "b", label="IQL", dataset_id="datasets/hopper/medium-v0")
    fake_run(tmp_path / "c", {20: (3, 3)}, label="DT", num_updates=20, dataset_id="datasets/x-v0")
    (only, other) = report.main_tables(numbers.read(tmp_path)).items()
    assert (only[0], other[0]) == ("10", "20")
    assert list(only[1]) == ["algorithm", "hopper/medium-v0", "toy/data-v0"]
    assert list(other[1]) == ["algorithm", "x-v0"]
    assert only[1]["algorithm"].tolist() == ["BC", "IQL"]
    online_run(tmp_path / "d", CURVE)
    fake_run(tmp_path / "e", {20: (3, 3)}, label="BC", num_updates=20)
    scores = numbers.read(tmp_path)
    tables = report.main_tables(scores)
    assert list(tables) == ["20", "10"]  # as many: the longest first
    parts = [f"\nAfter {k} updates:\n\n{report.markdown(v)}" for k, v in tables.items()]
    assert report.readme_text(scores).endswith("".join(parts))


def test_published_figures_stand_beside_d4rl_alone(tmp_path):
    """Of the task, its data, its environment, as many updates."""
    own = {"dataset_id": "D4RL/hopper/medium-v2", "num_updates": 1_000_000, "env_id": "Hopper-v4"}
    own |= {"source": "d4rl-hdf5 0123"}
    others = [{"dataset_id": "datasets/hopper/medium-v0"}, {"num_updates": 50_000}]
    others += [
        {"env_id": "Hopper-v5"},
        {"source": "collected", "fingerprint": "g"},
        {"environment_differs": "a bit"},
    ]
    others += [{"config": {"online_steps": 10}}]
    for i, changes in enumerate([{}, *others]):
        fake_run(tmp_path / str(i), {1_000_000: (10, 30)}, **{**own, **changes})
    found = [row for row in rows(tmp_path) if row["published"]]
    (published,) = pd.read_csv(REPOSITORY / "benchmarks/published.csv").query(
        "task == 'hopper-medium-v2' and algorithm == 'IQL'"
    )["mean"]
    assert [row["difference"] for row in found] == [f"{20 - published:+.1f}"]
    assert found[0]["published"].startswith(f"{published:.1f} (tinkoff-ai/CORL")
    assert "published" not in report.results_table(numbers.read(REPOSITORY / "benchmarks/results"))


def test_every_published_figure_is_of_a_known_task():
    table = pd.read_csv(REPOSITORY / "benchmarks" / "published.csv")
    assert set(table["task"]) <= set(numbers.tasks()["task"])
    assert len(numbers.published()) == len(table) and table["source"].notna().all()


# ---- pictures and page


def test_an_algorithm_keeps_its_colour_and_no_two_share_one():
    labels = numbers.read(REPOSITORY / "benchmarks" / "results").runs["label"].unique()
    assert {pictures.look(label)["color"] for label in labels} <= {*pictures.COLORS.values()}
    assert len(set(pictures.COLORS.values())) == len(pictures.COLORS)
    assert pictures.look("Discrete CQL")["color"] == pictures.look("CQL")["color"]
    assert pictures.look("Mine") == pictures.look("Mine")


def test_a_panel_is_of_one_dataset_and_budget(tmp_path):
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", label="BC")
    fake_run(tmp_path / "c", {20: (3, 3)}, label="DT", num_updates=20)
    online_run(tmp_path / "d", CURVE)
    evaluations = numbers.read(tmp_path).evaluations
    panels = {
        key: sorted(set(rows["label"])) for key, rows in pictures.budgets(evaluations).items()
    }
    data = "toy/data-v0"
    assert panels == {
        (data, 10, 0, "score"): ["BC", "IQL"],
        (data, 20, 0, "score"): ["DT"],
        (data, 10, 30_000, "score"): ["Cal-QL"],
    }
    assert [key[:3] for key in pictures.main_panels(evaluations)] == [(data, 10, 0)]
    fake_run(tmp_path / "e", CURVE, label="CQL", config={"online_steps": 30_000})
    panels = pictures.main_panels(numbers.read(tmp_path).evaluations)
    assert [key[:3] for key in panels] == [(data, 10, 0), (data, 10, 30_000)]
    fake_run(tmp_path / "f", {20: (3, 3)}, label="EDAC", num_updates=20)
    fake_run(tmp_path / "g", label="CQL")  # 2 of 3: the longer one
    panels = pictures.main_panels(numbers.read(tmp_path).evaluations)
    assert [key[:3] for key in panels] == [(data, 20, 0), (data, 10, 30_000)]
    returns_only(fake_run(tmp_path / "h", label="BCQ"))  # returns never share a panel with scores
    panels = pictures.budgets(numbers.read(tmp_path).evaluations)
    assert set(panels[data, 10, 0, "return"]["label"]) == {"BCQ"}


def test_the_picture_shows_every_algorithm_of_its_panels(tmp_path):
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", label="BC", scores={5: (1, 2), 10: (3, 4)})
    assert report.main([str(tmp_path)]) == 0
    picture = pictures.plt.imread(tmp_path / "report.png")[..., :3]
    seen = set(map(tuple, np.unique((picture * 255).round().reshape(-1, 3), axis=0)))
    for label in ("BC", "IQL"):
        color = pictures.COLORS[label]
        assert tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) in seen


class Reader(html.parser.HTMLParser):
    """What a page holds: ids, links, sources of pictures, text."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.tags, self.text = [], [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []
        assert tag != "img" or found["alt"]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else(tmp_path, monkeypatch):
    """No script, no file, no address but those of papers; its links lead to its own parts."""
    monkeypatch.setattr(pictures, "svg", lambda *_, **__: "<svg/>")  # drawn in other tests
    results = REPOSITORY / "benchmarks" / "results"
    before = contents(results)
    assert report.main([str(results), "--out", str(tmp_path)]) == 0
    assert contents(results) == before
    text = (tmp_path / "report.html").read_text()
    found = Reader(text)
    assert "script" not in found.tags and len(set(found.ids)) == len(found.ids)
    assert all(source.startswith("data:image/svg+xml") for source in found.sources)
    inside = [link[1:] for link in found.links if link.startswith("#")]
    assert set(inside) == set(found.ids) and len(inside) == len(found.ids)
    outside = {link for link in found.links if not link.startswith(("#", "data:"))}
    assert outside == {"https://arxiv.org/abs/2110.04156"} and "url(" not in text
    scores = numbers.read(results)
    for command in scores.runs["command"]:  # the command behind each number
        assert command in found.text
    for row in report.results_table(scores).to_dict("records"):
        assert row["last"] in found.text
    assert "L2_tau(u) = |tau - 1(u < 0)| u^2" in found.text and "D1" in found.text


def test_a_suite_shows_the_same_algorithms_in_table_and_picture(tmp_path, monkeypatch):
    """Also where one budget's name begins another's."""
    monkeypatch.setattr(pictures, "svg", lambda *words, **_: " ".join(words[2]))
    fake_run(tmp_path / "a", label="CQL")
    for label in ("BC", "IQL"):
        fake_run(tmp_path / label, CURVE, label=label, config={"online_steps": 30_000})
    scores = numbers.read(tmp_path)
    (suite,) = page.suites(scores, report.suite_tables(scores))
    assert suite["title"] == "toy Toy, 10 + 30,000 online updates"
    assert suite["images"] == [page.image(f"Performance profiles: {suite['title']}", "BC IQL")]
    assert all(label in str(suite["table"]) for label in ("BC", "IQL"))


def test_every_label_stands_in_the_legend(tmp_path):
    for label in ("_child1", "IQL"):
        fake_run(tmp_path / label, label=label)
    rows = numbers.read(tmp_path).evaluations
    for seeds in (True, False):
        drawn = pictures.svg(pictures.curves, 2, rows, "x", seeds=seeds)
        assert "_child1  20" in drawn and "IQL  20" in drawn


def test_a_choice_is_drawn_in_its_unit_without_tex():
    own = {"IQL": [np.array([1.0, 2.0]), np.array([3.0, 4.0])]}
    drawn = pictures.svg(pictures.choices, 1, own, "title", "return")
    assert ">return<" in drawn and "mathdefault" not in drawn


def test_names_are_text_on_the_page_and_in_tables(tmp_path):
    fake_run(tmp_path / "a", label="<b>&x", dataset_id="toy/<i>$\\frac$-v0", script="../../setup")
    fake_run(tmp_path / "b", label="$x_$ a|b")
    fake_run(tmp_path / "c", label="a b")
    fake_run(tmp_path / "d", {10: (77, 77)}, label="a b (mine)")
    fake_run(tmp_path / "e", label="a-b")
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    found = Reader(text)
    assert "<b>&x" in found.text and "toy/<i>" in found.text and "b" not in found.tags
    assert len(set(found.ids)) == len(found.ids)
    part = re.search(r'<section id="a\d+-a-b">(.*?)</section>', text, re.DOTALL)[1]
    assert "77.0" not in part
    assert "| $x_$ a\\|b |" in (tmp_path / "report.md").read_text()


def test_equations_and_deviations_are_read_from_every_script():
    for path in (REPOSITORY / "algorithms").glob("*.py"):
        text, deviations = page.docstring(path.stem)
        assert any(kind == "pre" and re.search(r"E[_\[]", part) for kind, part in text), path
        wanted = len(re.findall(r"(?m)^    D\d+  ", path.read_text()))
        assert [name for name, _ in deviations] == [f"D{i + 1}" for i in range(wanted)], path
        assert not any("train/" in part for _, part in text), path
    assert page.docstring("none") == ([], [])


def test_settings_that_differ_have_columns():
    configs = [{"tau": 0.1, "gamma": 1, "seed": 0}, {"tau": 0.2, "gamma": 1, "seed": 5}]
    runs = pd.DataFrame({"config": map(json.dumps, configs)})
    table, same = page.settings(runs.assign(data="a", updates=10, steps=0))
    assert table["tau"].tolist() == ["0.1", "0.2"] and same == ["gamma: 1"]
    assert list(table) == ["data", "updates", "tau"]


# ---- the command


def test_main_writes_tables_and_readme(tmp_path, capsys):
    fake_run(tmp_path / "runs" / "a")
    fake_run(tmp_path / "runs" / "b", {10: (1.0, 2.0)}, label="BC")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(tmp_path / "runs"), "--readme", str(readme)]) == 0
    text = (tmp_path / "runs" / "report.md").read_text()
    assert text.index("| BC |") < text.index("| IQL |")  # the weaker one first
    inside = report.readme_text(numbers.read(tmp_path / "runs"))
    assert readme.read_text() == f"before\n{report.BEGIN}\n{inside}{report.END}\nafter\n"
    table = report.markdown(report.results_table(numbers.read(tmp_path / "runs")))
    assert table in capsys.readouterr().out


BROKEN = [
    ("metrics.jsonl", None),
    ("metrics.jsonl", '{"update": 5, "seed"'),
    ("metrics.jsonl", "5\n"),
    ("metrics.jsonl", '{"train/loss": 5}\n'),
    ("episodes.jsonl", ""),
    ("episodes.jsonl", '{"update": 10, "seed": 0, "score": 5}\n'),
    ("result.json", ""),
    ("result.json", "[]"),
    ("result.json", "{}"),
    ("result.json", b"\xff"),
    ("result.json", {"last": 5}),
    ("result.json", {"last": [{"update": 10}]}),
    ("result.json", {"final_eval_episodes": None, "num_updates": "ten"}),
    ("config.yaml", "a: [\n"),
    ("config.yaml", None),
    ("environment.json", "{"),
]


@pytest.mark.parametrize("name, content", BROKEN)
def test_a_broken_run_is_one_line_that_names_it(tmp_path, capsys, name, content):
    path = fake_run(tmp_path / "a") / name
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path / "a") in error


def test_all_of_a_readme_but_the_marked_part_stays_to_the_byte(tmp_path):
    fake_run(tmp_path / "a")
    readme, marks = tmp_path / "README.md", (report.BEGIN.encode(), report.END.encode())
    for line in (b"\n", b"\r\n"):
        parts = [b"caf\xe9" + line + marks[0] + line, marks[1] + line + b"tail" + line]
        readme.write_bytes((b"old" + line).join(parts))
        assert report.main([str(tmp_path), "--readme", str(readme)]) == 0
        content = readme.read_bytes()
        assert content.startswith(parts[0]) and content.endswith(parts[1])
        assert b"| IQL |" in content and content.count(b"\n") == content.count(line)


MARKS = {
    "none": "nothing here\n",
    "the end again": f"{report.BEGIN}\n{report.END}\ntail {report.END}\n",
    "the beginning again": f"{report.BEGIN}\n{report.BEGIN}\n{report.END}\n",
    "turned round": f"{report.END}\n{report.BEGIN}\n",
}


@pytest.mark.parametrize("case", ["no runs", "a wrong flag", *MARKS])
def test_errors_are_one_line(case, tmp_path, capsys):
    arguments = [str(tmp_path)]
    if case == "a wrong flag":
        arguments += ["--redme", "README.md"]
    if case in MARKS:
        fake_run(tmp_path / "a")
        (tmp_path / "README.md").write_text(MARKS[case])
        arguments += ["--readme", str(tmp_path / "README.md")]
    before = contents(tmp_path)
    assert report.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert contents(tmp_path) == before
