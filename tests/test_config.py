"""Settings: YAML files and the command line, and one line for each mistake in them."""

import ast
import dataclasses
import functools
import inspect
import re
import tokenize
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, TOY, contents, load_tool, words
from test_runs import rows

# ---- what is accepted


def parse(script, *argv):
    return script.parse(script.TrainConfig, list(argv))


def yaml_file(**settings) -> str:
    Path("some.yaml").write_text(yaml.safe_dump(settings))
    return "some.yaml"


def test_the_command_line_wins_over_the_file_in_either_order(script):
    path = yaml_file(dataset_id=TOY, seed=3, batch_size=5)
    first = parse(script, "--config", path, "--seed", "4")
    last = parse(script, "--seed", "4", "--config", path)
    assert first == last
    assert (first.dataset_id, first.seed, first.batch_size) == (TOY, 4, 5)
    assert first == parse(script, f"--config={path}", "--seed=4")
    assert parse(script) == script.TrainConfig()


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1000000", "1.0e6", "1000000.0"])
def test_spellings_of_a_whole_number(iql, text):
    Path("some.yaml").write_text(f"num_updates: {text}\n")
    for cfg in (parse(iql, "--num_updates", text), parse(iql, "--config", "some.yaml")):
        assert cfg.num_updates == 1_000_000
        assert type(cfg.num_updates) is int


def test_every_kind_of_field(iql):
    path = yaml_file(
        label="", ref_min_score=None, ref_max_score=5, env_kwargs={"g": 9.0}, gamma=1, compile=True
    )
    cfg = parse(iql, "--config", path)
    assert (cfg.label, cfg.ref_min_score, cfg.ref_max_score) == ("", None, 5.0)
    assert (cfg.env_kwargs, cfg.gamma, cfg.compile) == ({"g": 9.0}, 1.0, "true")
    assert type(cfg.gamma) is float and type(cfg.ref_max_score) is float
    cfg = parse(
        iql, "--label", "", "--run_dir=", "--ref_max_score", "null", "--env_kwargs", "{g: 9.0}"
    )
    assert (cfg.label, cfg.run_dir, cfg.ref_max_score) == ("", "", None)
    assert cfg.env_kwargs == {"g": 9.0}
    cfg = parse(iql, "--label", "10", "--ref_min_score", "-1e3", "--download", "FALSE")
    assert (cfg.label, cfg.ref_min_score, cfg.download) == ("10", -1000.0, False)
    assert parse(iql, "--label", "a=b", "--run_dir=x=y").run_dir == "x=y"
    kwargs = {"none": None, "small": 1e-7, "text": "it's\\n\n", "list": [True, {"a": 1}]}
    assert iql.TrainConfig(env_kwargs=kwargs).env_kwargs == kwargs
    assert parse(iql, "--config", yaml_file(env_kwargs=kwargs)).env_kwargs == kwargs


def test_python_takes_the_same_values(iql):
    cfg = iql.TrainConfig(gamma="0.9", num_seeds="3", seed=7, download="false")
    assert (cfg.gamma, cfg.num_seeds, cfg.download) == (0.9, 3, False)
    assert list(cfg.seeds) == [7, 8, 9]
    for wrong in ({"gamma": 2}, {"gamma": float("nan")}, {"seed": 2.5}, {"label": None}):
        with pytest.raises(iql.RunError, match=next(iter(wrong))):
            iql.TrainConfig(**wrong)


def test_every_number_has_a_range_with_its_ends_and_its_default_in_it(script):
    for spec in dataclasses.fields(script.TrainConfig):
        if spec.type not in (str, bool, dict):
            low, high = spec.metadata["low"], spec.metadata["high"]
            assert low < high and (spec.default is None or low <= spec.default <= high)
            for bound in (low, high):
                cfg = script.TrainConfig(**{spec.name: str(bound)})
                assert getattr(cfg, spec.name) == bound
        if spec.metadata.get("choices"):
            assert spec.default in spec.metadata["choices"]


# ---- what is refused, on the command line and in a file

MISTAKES = [
    ("num_updates", "2.5", "whole number"),
    ("num_updates", "many", "whole number"),
    ("num_updates", "true", "whole number"),
    ("num_updates", "null", "whole number"),
    ("num_updates", "[1]", "whole number"),
    ("num_updates", "0", "from 1 to"),
    ("num_updates", "-3", "from 1 to"),
    ("num_updates", ".inf", "whole number"),
    ("num_updates", "9" * 400, "whole number"),
    ("gamma", "text", "number from 0 to 1"),
    ("gamma", "yes", "number"),
    ("gamma", ".nan", "number"),
    ("gamma", "nan", "number"),
    ("gamma", "-.inf", "number"),
    ("gamma", "inf", "number"),
    ("gamma", "1.01", "from 0 to 1"),
    ("gamma", "-0.01", "from 0 to 1"),
    ("gamma", "{}", "number"),
    ("gamma", "2020-13-45", "number"),
    ("ref_min_score", "low", "number"),
    ("ref_min_score", "nan", "number"),
    ("download", "maybe", "true or false"),
    ("download", "1", "true or false"),
    ("env_kwargs", "3", "mapping"),
    ("env_kwargs", "[1]", "mapping"),
    ("env_kwargs", "{a: [0.7, .inf]}", "plain"),
    ("env_kwargs", "{a: .nan}", "plain"),
    ("env_kwargs", "{a: 2020-01-01}", "plain"),
    ("env_kwargs", "{a: !!binary aGVsbG8=}", "plain"),
    ("compile", "sometimes", "one of"),
    ("wandb", "on line", "one of"),
]


@pytest.mark.parametrize("name, text, expected", MISTAKES)
def test_wrong_values(iql, refused, name, text, expected):
    refused(iql, [f"--{name}", text], name, expected)
    refused(iql, [f"--{name}={text}"], name, expected)
    Path("some.yaml").write_text(f"{name}: {text}\n")
    if text != "2020-13-45":  # there the file itself is broken
        refused(iql, ["--config", "some.yaml"], name, expected)


@pytest.mark.parametrize(
    "text", ["@", "[", "{a: 1", "a: b: c", "%", "*x", "!!python/name:os.getcwd"]
)
@pytest.mark.parametrize("name", ["gamma", "env_kwargs"])
def test_values_that_are_no_yaml(iql, refused, name, text):
    refused(iql, [f"--{name}", text], name)


def test_text_has_to_be_text(iql, refused):
    Path("some.yaml").write_text("label: 10\n")
    refused(iql, ["--config", "some.yaml"], "label", "quotes")
    Path("some.yaml").write_text("dataset_id: null\n")
    refused(iql, ["--config", "some.yaml"], "dataset_id")


@pytest.mark.parametrize("name", ["gama", "num_update", "xyzzy", "success_reward", "eval_only"])
def test_unknown_settings(iql, refused, name):
    refused(iql, [f"--{name}", "1"], name)
    refused(iql, ["--config", yaml_file(**{name: 1})], "some.yaml", name, "--help")


@pytest.mark.parametrize("flag", ["--gam", "--num_up", "--conf", "--config_path", "--data"])
def test_abbreviations_are_unknown_settings(iql, refused, flag):
    refused(iql, [flag, "0.9"], flag[2:])


def test_a_deeply_nested_value(iql, refused):
    assert len(refused(iql, ["--env_kwargs", "[" * 5000], "env_kwargs", "mapping")) < 300


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--gamma"], "--gamma"),
        (["--gamma", "--seed", "3"], "--gamma"),
        (["--seed", "3", "--gamma"], "--gamma"),
        (["--config"], "--config"),
        (["gamma", "0.9"], "gamma"),
        (["--seed", "3", "4"], "4"),
        (["-gamma", "0.9"], "-gamma"),
        (["--", "0.9"], "0.9"),
    ],
)
def test_flags_and_values_out_of_step(iql, refused, argv, name):
    refused(iql, argv, name)


@pytest.mark.parametrize(
    "content, name",
    [
        (b"", "no settings"),
        (b"# gamma: 0.99\n", "no settings"),
        (b"- gamma\n- 0.99\n", "no settings"),
        (b"gamma\n", "no settings"),
        (b"{}\n", "no settings"),
        (b"gamma: [0.99\nseed: 3\n", "cannot be read"),
        (b"gamma: 0.99\n\tseed: 3\n", "cannot be read"),
        (b"gamma: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        (b"gamma: 0.99\n---\nseed: 3\n", "cannot be read"),
        (b"label: \xff\xfe\n", "cannot be read"),
        (b"\x00\x01\x02", "cannot be read"),
        (b"env_kwargs: " + b"[" * 1000, "cannot be read"),
        (b"gamma: 0.99\nseed: 3\ngamma: 0.9\n", "more than once"),
        (b"gamma : 0.99\n'gamma': 0.9\n", "more than once"),
        (b"env_kwargs:\n  g: 1.0\n  g: 2.0\n", "more than once"),
        (b"{seed: 3, seed: 4}\n", "more than once"),
        (b"3: 4\n", "3"),
        (b"[3]: 4\n", "some.yaml"),
    ],
)
def test_broken_files(iql, refused, content, name):
    Path("some.yaml").write_bytes(content)
    refused(iql, ["--config", "some.yaml"], "some.yaml", name)


def test_no_such_file(script, refused):
    refused(script, ["--config", "nowhere.yaml"], "nowhere.yaml")
    refused(script, ["--config", "."], "config")
    refused(script, ["--config", ""], "config")


# ---- help


def comments(config_class) -> dict[str, str]:
    """Field -> the comment within its lines, for a class and its parents."""
    found = {}
    for each in reversed(config_class.__mro__[:-1]):
        lines = inspect.getsource(each).splitlines(keepends=True)
        tokens = list(tokenize.generate_tokens(iter(lines).__next__))
        for node in ast.parse("".join(lines)).body[0].body:
            if isinstance(node, ast.AnnAssign):
                found[node.target.id] = " ".join(
                    token.string.lstrip("# ")
                    for token in tokens
                    if token.type == tokenize.COMMENT
                    and node.lineno <= token.start[0] <= node.end_lineno
                )
    return found


def test_help_explains_every_field(script, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # 6 s a script
    with pytest.raises(SystemExit) as end:
        script.main(["--seed", "3", "--help"])
    assert end.value.code in (0, None)
    out, err = capsys.readouterr()
    assert err == "" and contents() == {}
    shown = re.split(r"^  --(\w+)", out, flags=re.MULTILINE)
    shown = dict(zip(shown[1::2], shown[2::2], strict=True))
    explained = comments(script.TrainConfig)
    assert explained.keys() == {spec.name for spec in dataclasses.fields(script.TrainConfig)}
    for name, comment in explained.items():
        assert comment and "".join(comment.split()) in "".join(shown[name].split()), name


# ---- the config of a run


def test_the_config_of_a_run_runs_again_as_it_is(script):
    argv = words(label="again", env_id="none", env_kwargs="{g: 9.0}", num_seeds=2)
    assert script.main(argv) == 0
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    names = {spec.name for spec in dataclasses.fields(script.TrainConfig)}
    assert names - {"run_dir", "resume", "checkpoint"} <= saved.keys() <= names - {"run_dir"}
    assert script.main(["--config", "run/config.yaml", "--run_dir", "again"]) == 0
    assert Path("again/config.yaml").read_bytes() == Path("run/config.yaml").read_bytes()
    assert rows("again/metrics.jsonl") == rows("run/metrics.jsonl")


def test_configs_of_the_repository_are_read(script):
    """Each of them by its own script."""
    paths = sorted((REPOSITORY / "configs").glob("*/*.yaml"))
    assert len(paths) >= 823
    variants, name = load_tool("tools/sweep.py").SCRIPTS, Path(script.__file__).stem
    own = [path for path in paths if variants.get(path.parent.name, path.parent.name) == name]
    assert len(own) >= 6
    for path in own:
        assert script.TrainConfig(**script.read_yaml(path)).dataset_id
    assert parse(script, "--config", str(own[0])) == script.TrainConfig(**script.read_yaml(own[0]))


@pytest.mark.parametrize(
    "value", ["!!bool 3", "!!timestamp x", "!!int ''", "!!binary 3", "{[]: 1}"]
)
def test_tags_that_do_not_fit(iql, refused, value):
    refused(iql, words(env_kwargs=value), "env_kwargs")


def test_a_number_of_thousands_of_digits(iql, refused):
    Path("long.yaml").write_text(f"gamma: 0x{'f' * 4000}\n")
    refused(iql, words(config="long.yaml"), "gamma", "digits")


@pytest.mark.parametrize("name", ["run_dir", "label", "dataset_id"])
@pytest.mark.parametrize("text", ["a\udcff", "a\0b", "a\nb"])
def test_text_that_cannot_be_printed(iql, refused, name, text):
    """Of other bytes than UTF-8, with a NUL or with several lines."""
    refused(iql, words(**{name: text}), name)
