"""What the README says is true: its commands, its code, its table, its links."""

import functools
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SCRIPTS, load_script
from test_report import report

PAGES = [REPOSITORY / name for name in ("README.md", "benchmarks/README.md", "datasets/README.md")]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS[PAGES[0]]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", "".join(TEXTS.values()), re.DOTALL | re.MULTILINE)
SHELL = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
PYTHON = [shlex.split(line, comments=True) for line in SHELL if line.startswith("python ")]
RESULTS = REPOSITORY / "benchmarks" / "results"


@functools.cache
def help_of(script) -> str:
    """What a tool prints of itself."""
    argv = [sys.executable, script, "--help"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", PYTHON, ids=" ".join)
def test_command_names_what_exists(command, monkeypatch):
    """Every script is there and takes the arguments; training itself is not started."""
    script, arguments = REPOSITORY / command[1], command[2:]
    assert script.is_file()
    if script.parent.name != "algorithms":
        flags = [word for word in arguments if word.startswith("--")]
        assert all(flag in help_of(script) for flag in flags)
        return
    monkeypatch.chdir(REPOSITORY)
    module = load_script(script.stem)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            module.parse(module.TrainConfig, arguments)
        assert stop.value.code == 0
    elif "RUN" in " ".join(arguments):  # stands for a run folder of the reader's
        with pytest.raises(module.RunError, match=r"RUN|dataset_id"):
            module.train(module.IQL, module.parse(module.TrainConfig, arguments))
    else:
        module.parse(module.TrainConfig, arguments)


def test_own_data_lines_run(monkeypatch, tmp_path):
    """The recording code, and the training command after it, shortened."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    code = next(text for kind, text in BLOCKS if kind == "python" and "EpisodeBuffer" in text)
    assert len(code.splitlines()) <= 15
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    commands = [words for words in PYTHON if "mine/pendulum-v0" in words]
    short = ["--num_updates", "2", "--final_eval_episodes", "1", "--run_dir"]
    assert len(commands) == 2 and "none" in commands[1]
    for i, command in enumerate(commands):
        assert load_script("iql").main([*command[2:], *short, f"run{i}"]) == 0
        result = json.loads((tmp_path / f"run{i}/result.json").read_text())
        assert bool(result["last"]) == (i == 0)


def test_the_exported_policy_runs_as_shown():
    run = ["--dataset_id", "datasets/hopper/medium-replay-v0", "--env_id", "none"]
    iql = load_script("iql")
    assert iql.main([*run, "--num_updates", "1", "--hidden_dim", "8", "--run_dir", "RUN"]) == 0
    (export,) = [words for words in PYTHON if "export" in words]
    subprocess.run([sys.executable, REPOSITORY / export[1], *export[2:]], check=True)
    code = next(text for kind, text in BLOCKS if kind == "python" and "torch.export" in text)
    check = "import gymnasium; env = gymnasium.make('Hopper-v5'); env.reset(); env.step(action)"
    subprocess.run([sys.executable, "-I", "-c", f"{code}\n{check}"], check=True)


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_one_sitting_reads_it():
    assert README.count("\n") <= 220


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_its_row(name):
    """Its lines, and those outside of the shared blocks."""
    row = rf"\| \[{name}\.py\]\(algorithms/{name}\.py\)[^|]*\| ([\d,]+) \| (\d+) \|"
    text = (REPOSITORY / "algorithms" / f"{name}.py").read_text(encoding="utf-8")
    shared = re.findall(r"^# >>> shared: (\S+)\n.*?^# <<< shared: \1\n", text, re.S | re.M)
    own = re.sub(r"^# >>> shared: (\S+)\n.*?^# <<< shared: \1\n", "", text, flags=re.S | re.M)
    assert len(shared) >= 5
    found = {tuple(int(n.replace(",", "")) for n in pair) for pair in re.findall(row, README)}
    assert found == {(text.count("\n"), own.count("\n"))}


def test_tables_are_what_the_results_give():
    scores, parts = report.numbers.read(RESULTS), re.split(f"{report.BEGIN}\n|{report.END}", README)
    assert parts[1] == report.readme_text(scores)
    text = (RESULTS / "report.md").read_text(encoding="utf-8")
    assert text == report.report_text(report.all_tables(scores))
