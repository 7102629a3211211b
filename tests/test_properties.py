"""Any input ends in a result or in one line: settings, datasets, run folders.

Hypothesis makes the inputs: some hundreds, the same ones each time. STITCH_THOROUGH=1 makes
thousands, other ones each time.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from conftest import SCRIPTS, TOY_ENV, contents, load_script, toy_episode, words, write_dataset
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from test_runs import crash_at, leaves, strict
from test_trust import load_tool

policy, report = load_tool("tools/policy.py"), load_tool("tools/report.py")
policy.load_script = load_script
SHORT_ENV = dataclasses.replace(TOY_ENV, max_episode_steps=3)
THOROUGH = os.environ.get("STITCH_THOROUGH") == "1"
IN_TURN = ["iql", "bc"] if THOROUGH else ["iql"]  # one will do for what the frame alone decides
TINY = {"num_updates": 2, "batch_size": 2, "hidden_dim": 4, "hidden_layers": 1, "eval_every": 1}
TINY |= {"eval_episodes": 1, "final_eval_episodes": 1, "log_every": 1, "checkpoint_every": 1}


def inputs(count: int, *strategies, thorough: int = 0):
    """Try `count` inputs, or `thorough` ones where it is asked for."""
    options = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    if not THOROUGH:
        options["phases"] = (Phase.explicit, Phase.generate)  # to shrink an input may take minutes
    options |= {"max_examples": (thorough or 10 * count) if THOROUGH else count}
    return lambda test: settings(derandomize=not THOROUGH, **options)(given(*strategies)(test))


def ends_well(main, argv, own=()) -> int:
    """A result or one line; no file has changed but those in the folders `own`."""

    def others():
        return {k: v for k, v in contents().items() if Path(k).parts[0] not in own}

    before = others()
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    err.flush()
    lines = err.buffer.getvalue().decode().splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    assert (code, told) in ((0, []), (2, lines[-1:])), (code, lines)
    assert others() == before
    return code


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    """A whole dataset of two episodes, of 5 steps and of one, played for 3 steps."""
    rng = np.random.default_rng(0)
    episodes = [toy_episode(rng, 5, True), toy_episode(rng, 1, False)]
    return write_dataset(tmp_path_factory.mktemp("small"), "small-v0", episodes, env=SHORT_ENV)


# ---- what anything may be

HUGE = (2**62, 10**30, -(2**63), 1e300, float("nan"), float("inf"), -0.0, 5e-324)
TEXTS = ("", " ", "nan", "1e3", "null", "true", "a:b", "../x", "a\0b", "\x85\u2028", "\udcff", "é")
TEXTS += ("$\\frac$", "%s{0}", "x" * 300, "os:system", "-v0", "toy/pendulum-v0", "no/where-v0")
text = st.sampled_from(TEXTS) | st.text(max_size=5)
scalar = st.none() | st.booleans() | st.integers(-3, 5) | st.sampled_from(HUGE)
scalar |= st.floats(-2, 2) | text
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)


# ---- settings

# One setting of each kind, and those that name places.
NAMES = ("gamma", "seed", "ref_min_score", "download", "normalize_obs", "label", "compile", "wandb")
NAMES += ("env_kwargs", "run_dir", "checkpoint", "resume", "env_id", "online_steps", "dataset_id")
WORDS = ("&a [1]", "*a", "!!python/object/apply:os.system [touch ran]", "!!python/name:os.x", "{a")
WORDS += ("2020-01-01", "2020-13-45", "2020-01-01 1:2:3", "0x" + "f" * 4000, "9" * 5000, "1:60")
WORDS += ("0o9", "08", "1_0", "_", ".", "~", "=", "<<", "yes", ".nan", "-.INF", "1e400", "1e-400")
WORDS += ("[1, 2", "[1, 2]", "{a: 1}", "{a: 1, a: 2}", "{1: 2}", "{[1]: 2}", "{{a}: 1}", "? a")
WORDS += ("|", ">", "|9", "'x", '"\\x', '"\\ud800"', '"\\0"', "!!binary x", "!!binary aGk=", "- b")
WORDS += ("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!float x", "!!int ''", "!!bool 3")
WORDS += ("!!timestamp x", "!!null x", "!x y", "! y", "---", "...", "%YAML 9.9", "%TAG ! !", "\t")
WORDS += ("@", "`", "#", ",", "]", "[" * 3000, "{a: " * 999, "\ufeff", "\x07", "2.5", "-", "--")
WORDS += ("0", "1", "1.0", "-1", "none", "None", "auto", "cpu", "true", "!!str 3", "!!seq {}")
word = st.sampled_from((*WORDS, *TEXTS)) | st.text(max_size=5)
name = st.sampled_from((*NAMES, *TEXTS[:6], "gama", "config"))
between = st.sampled_from((*6 * [": "], ":", " ", ": &b ", ": *b\n", ""))
line = st.tuples(name, between, word).map("".join)
FILES = {"one line": line, "lines": st.lists(line, max_size=4).map("\n".join)}
FILES = {kind: lines.map(lambda x: x.encode("utf-8", "replace")) for kind, lines in FILES.items()}
mapping = st.dictionaries(name, value, max_size=4)
FILES |= {"YAML": mapping.map(lambda x: yaml.safe_dump(x).encode())}
FILES |= {"JSON": (mapping | value).map(lambda x: json.dumps(x).encode())}
FILES |= {"bytes": st.binary(max_size=40)}
flag = st.tuples(st.sampled_from(("--", "-", "", "---")), name).map("".join)
flag |= st.tuples(flag, st.sampled_from(("=", "==")), word).map("".join)
flag |= st.tuples(st.just("--"), st.sampled_from(NAMES), st.integers(1, 9)).map(
    lambda x: f"--{x[1][: x[2]]}"  # an abbreviation
)
pair = st.tuples(st.sampled_from(NAMES).map("--{}".format), word)
COMMANDS = {"one setting": pair.map(list), "words": st.lists(flag | word, max_size=4)}
COMMANDS |= {"settings": st.lists(pair, max_size=3).map(lambda pairs: [*itertools.chain(*pairs)])}
NOWHERE = ["--dataset_id", "no/where-v0", "--fallback_dataset_id=", "--download", "false"]


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_settings(iql, kind):
    @inputs(50, FILES[kind])
    def check(content):
        Path("some.yaml").write_bytes(content)
        assert ends_well(iql.main, ["--config", "some.yaml", *NOWHERE]) == 2

    check()


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_line(iql, kind):
    @inputs(50, COMMANDS[kind])
    def check(argv):
        with contextlib.suppress(SystemExit):  # --help
            assert ends_well(iql.main, [*argv, *NOWHERE]) == 2

    check()


ONCE = ("gamma: 0x" + "f" * 4000, "env_kwargs: '!!bool 3'", "env_kwargs: '!!timestamp x'")
ONCE += ('run_dir: "run/a\\0b"', 'run_dir: "run/\\udcff"')


@pytest.mark.parametrize("line", ONCE, ids=range(len(ONCE)))
def test_settings_that_once_ended_in_a_traceback(iql, line):
    Path("some.yaml").write_text(line)
    argv = ["--config", "some.yaml", *words(**TINY)]
    if "run_dir" in line:
        at = argv.index("--run_dir")
        del argv[at : at + 2]
    ends_well(iql.main, argv, own=["run"])


LARGE = ("seed", "eval_seed", "eval_every", "log_every", "checkpoint_every", "max_envs")  # no sizes
LARGE += ("bc_updates", "behavior_updates", "warm_start", "warmup_updates")
PLACES = {
    "run_dir": text.filter(lambda x: ".." not in x).map("run/{}".format),
    "env_id": st.sampled_from(("none", "auto", "Pendulum-v1", "CartPole-v1", "nothing:X-v0"))
    | text,
    "env_kwargs": st.dictionaries(text, value, max_size=2) | word,
    "checkpoint": text,
    "target_returns": st.sampled_from(("100%", "50%, 3", "1e400", "nan%", "9" * 400)) | text,
}
FIXED = ("dataset_id", "fallback_dataset_id", "download", "device", "compile", "wandb")


def of_field(spec):
    """Values of a setting, mostly right ones that make a run of a moment."""
    low, high = spec.metadata.get("low"), spec.metadata.get("high")
    if spec.name in PLACES:
        return PLACES[spec.name]
    if "choices" in spec.metadata:
        return st.sampled_from(spec.metadata["choices"])
    if spec.type is bool:
        return st.booleans()
    if spec.type is str:
        return text
    if spec.type is int:
        return st.integers(0, 3) | (st.just(high) if spec.name in LARGE else st.integers(1, 3))
    ends = st.sampled_from((low, high, spec.default))
    return ends | st.floats(low, high) | st.floats(max(low, -2), min(high, 2))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_of_any_settings(name):
    script = load_script(name)
    fields = [f for f in script.TrainConfig.__dataclass_fields__.values() if f.name not in FIXED]
    one = st.sampled_from(fields).flatmap(
        lambda spec: st.tuples(st.just(spec.name), of_field(spec))
    )

    @inputs(4, st.lists(one, max_size=4).map(dict), thorough=60)
    def check(settings):
        argv = words(**{**TINY, **{k: v for k, v in settings.items() if k != "env_kwargs"}})
        more = {k: v for k, v in settings.items() if k == "env_kwargs"}
        Path("some.yaml").write_text(yaml.safe_dump(more or {"download": False}))
        argv += ["--config", "some.yaml", "--device", "cpu", "--compile", "false"]
        try:
            if ends_well(script.main, argv, own=["run"]) == 0:
                (result,) = Path("run").rglob("result.json")
                strict(result.read_text())
                folder = ["--run_dir", result.parent, "--resume", "true"]
                assert ends_well(script.main, folder) == 0
                report.report_text(report.all_tables(report.numbers.read(Path("run"))))
        finally:
            shutil.rmtree("run", ignore_errors=True)

    check()


# ---- datasets

SHAPES = ((), (0,), (1,), (5,), (6,), (5, 1), (6, 3), (5, 3), (6, 1), (5, 0), (1, 1), (6, 3, 1))
KINDS = ("?", "i1", "u8", "i8", "f2", "f4", "f8", ">f8", "c16", "S3", "O", "M8", "V2")
FILLS = (0, 1, -1, 1.5, 2, np.nan, np.inf, -np.inf, 1e30, 1e300, 2**63, "x")
SPACE = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-2.0], "high": [2.0]}
SPACES = [SPACE | change for change in (
    {"low": [0.0], "high": [2**40]},
    {"low": ["-inf"], "high": [float("inf")]},
    {"low": [2.0], "high": [-2.0]},
    {"dtype": "float64"},
    {"dtype": "int64"},
    {"dtype": "uint8"},
    {"dtype": "O"},
    {"shape": [], "low": -2.0, "high": 2.0},
    {"shape": [0], "low": [], "high": []},
    {"shape": [3], "low": 3 * [-9.0], "high": 3 * [9.0]},
    {"shape": [1, 1, 1], "low": [[[-2]]], "high": [[[2]]]},
    {"shape": [2, 2, 3], "low": [[[0] * 3] * 2] * 2, "high": 12 * [255], "dtype": "uint8"},
)]  # fmt: skip
SPACES += [{"type": "Discrete", "dtype": "int64", "start": 0, "n": n} for n in (1, 3, 0, 2**62)]
SPACES += [{"type": "MultiBinary", "n": n} for n in (3, [2, 2], 0, 2**62)]
SPACES += [{"type": "MultiDiscrete", "dtype": "int64", "nvec": [2, 2], "start": [0, 0]}]
SPACES += [{"type": "Text", "max_length": 3, "min_length": 1, "charset": "ab"}]
SPACES += [{"type": kind, "subspaces": []} for kind in ("Tuple", "Sequence", "Graph", "OneOf", "")]
SPACES += [{"type": "Tuple", "subspaces": [SPACE]}, {"type": "Dict", "subspaces": {"a": SPACE}}]
SPACES += [{"type": "Dict", "subspaces": {}}, {"type": "Dict", "subspaces": [SPACE]}]
WRAPPER = {"name": "ClipAction", "entry_point": "gymnasium.wrappers:ClipAction", "kwargs": {}}
LIMITS = (None, 0, 1, 7, -1, 2.5, "9", True, [], float("nan"))

json_text = value.map(json.dumps) | text
a_space = st.sampled_from(SPACES)
a_space |= st.tuples(a_space, st.sampled_from(sorted(SPACE)), value).map(
    lambda x: {**x[0], x[1]: x[2]}
)
wrapper = st.tuples(
    st.sampled_from((*load_script("iql").WRAPPERS, "Autoreset", "RecordVideo", "")), value
)
wrapper = wrapper.map(lambda x: {**WRAPPER, "name": x[0], "kwargs": x[1]}) | value
spec_change = st.one_of(
    st.tuples(st.just("id"), st.sampled_from(("CartPole-v1", "Acrobot-v1", "X-v0")) | value),
    st.tuples(
        st.just("kwargs"), st.dictionaries(st.sampled_from(("g", "max_episode_steps")), value)
    ),
    st.tuples(st.just("kwargs"), value),
    st.tuples(st.just("max_episode_steps"), st.sampled_from(LIMITS)),
    st.tuples(st.just("additional_wrappers"), st.lists(wrapper, max_size=2) | value),
    st.tuples(st.sampled_from(sorted(json.loads(SHORT_ENV.to_json()))), st.sampled_from(LIMITS)),
)
spec_text = spec_change.map(lambda x: json.dumps({**json.loads(SHORT_ENV.to_json()), x[0]: x[1]}))
METADATA = ("total_episodes", "total_steps", "data_format", "jpeg_encoding", "observation_space")
METADATA += ("action_space", "env_spec", "eval_env_spec", "ref_min_score", "ref_max_score")
METADATA += ("dataset_id", "minari_version", "environment_differs", "source", "fingerprint")
about = st.one_of(
    st.tuples(st.sampled_from(METADATA), value | json_text),
    st.tuples(st.sampled_from(("observation_space", "action_space")), a_space.map(json.dumps)),
    st.tuples(st.sampled_from(("env_spec", "eval_env_spec")), spec_text),
    st.tuples(st.sampled_from(METADATA), st.just("absent")),
)
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")
an_array = st.tuples(
    st.sampled_from(ARRAYS), st.sampled_from(SHAPES), st.sampled_from(KINDS), st.sampled_from(FILLS)
)
an_element = st.tuples(st.sampled_from(ARRAYS), st.integers(0, 5), st.sampled_from(FILLS))
LINKS = ("absent", "group", "empty", "dangling", "itself", "other file", "reference")
a_link = st.tuples(st.sampled_from(("", *ARRAYS, "infos", "infos/x")), st.sampled_from(LINKS))
a_link |= st.tuples(st.sampled_from(("", *ARRAYS)), st.just("parent"))  # Minari's infos take 6 s
a_cut = st.tuples(st.sampled_from(("metadata.json", "main_data.hdf5")), st.integers(0, 6000))
a_byte = st.tuples(st.just("metadata.json"), st.integers(0, 1500), st.binary(max_size=3))


def changed_set(good: Path) -> Path:
    """A copy to change, in place of the last one."""
    shutil.rmtree("set", ignore_errors=True)
    shutil.copytree(good, "set")
    return Path("set")


def put(group, name: str, content) -> None:
    """Replace what stands at a place of an HDF5 file."""
    if group.get(name, getlink=True) is not None:
        del group[name]
    if content is not None:
        group[name] = content


def trains_or_refuses(script, **options) -> int:
    """The changed dataset trains, or is refused."""
    argv = words(**{**TINY, "dataset_id": "set", "num_updates": 1, **options})
    try:
        return ends_well(script.main, [*argv, "--compile", "false"], own=["run"])
    finally:
        shutil.rmtree("run", ignore_errors=True)


@pytest.mark.parametrize("name", IN_TURN)
def test_metadata_of_any_kind(name, small_set):
    @inputs(60, about | st.lists(about, max_size=3))
    def check(changes):
        path = changed_set(small_set) / "metadata.json"
        metadata = json.loads(path.read_text())
        for key, new in [changes] if isinstance(changes, tuple) else changes:
            metadata[key] = new
            if new == "absent":
                del metadata[key]
        path.write_text(json.dumps(metadata))
        trains_or_refuses(load_script(name))

    check()


@pytest.mark.parametrize("name", IN_TURN)
def test_arrays_of_any_kind(name, small_set):
    @inputs(60, st.integers(0, 1), an_array | an_element | a_link, st.booleans())
    def check(number, change, vectors):
        data = changed_set(small_set)
        with h5py.File(data / "main_data.hdf5", "r+") as file:
            change_array(file, f"episode_{number}", change)
        if vectors:  # the same arrays as other observations
            metadata = json.loads((data / "metadata.json").read_text())
            wide = {**SPACE, "shape": [3], "low": 3 * [-9.0], "high": 3 * [9.0], "dtype": "float64"}
            metadata["observation_space"] = json.dumps(wide)
            (data / "metadata.json").write_text(json.dumps(metadata))
        trains_or_refuses(load_script(name), env_id="none")

    check()


def change_array(file: h5py.File, episode: str, change: tuple) -> None:
    """By an array (name, shape, dtype, fill), an element (name, row, value) or a link."""
    name = f"{episode}/{change[0]}".rstrip("/")
    if len(change) == 2:
        links = {
            "absent": lambda: None,
            "group": lambda: put(file, f"{name}/inner", np.zeros(5)),
            "empty": lambda: put(file, name, h5py.Empty("f4")),
            "dangling": lambda: put(file, name, h5py.SoftLink("/nothing")),
            "itself": lambda: put(file, name, h5py.SoftLink(f"/{name}")),
            "parent": lambda: put(file, name, file["/"]),
            "other file": lambda: put(file, name, h5py.ExternalLink("/etc/passwd", "/x")),
            "reference": lambda: put(file, name, file["/"].ref),
        }
        put(file, name, None)
        links[change[1]]()
    elif len(change) == 3:
        with contextlib.suppress(IndexError, ValueError, TypeError):  # no such row or value
            file[name][change[1]] = change[2]
    else:
        with contextlib.suppress(TypeError, ValueError), np.errstate(all="ignore"):
            shape, kind, fill = change[1:]
            put(file, name, np.full(shape, fill).astype(kind))


def test_big_endian_arrays(iql, small_set):
    data = changed_set(small_set)
    with h5py.File(data / "main_data.hdf5", "r+") as file:
        put(file, "episode_0/rewards", np.ones(5, ">f8"))
    assert trains_or_refuses(iql, env_id="none") == 0


def test_files_that_are_cut(iql, small_set):
    @inputs(30, a_cut | a_byte | st.binary(max_size=20))
    def check(change):
        data = changed_set(small_set)
        if isinstance(change, bytes):
            (data / "metadata.json").write_bytes(change)
        else:
            content = (data / change[0]).read_bytes()
            middle = b"".join(change[2:])
            rest = content[change[1] + len(middle) :] if middle else b""
            (data / change[0]).write_bytes(content[: change[1]] + middle + rest)
        trains_or_refuses(iql, env_id="none")

    check()


# ---- checkpoints and run folders

RESUME = ["--run_dir", "run", "--resume", "true"]
INTERRUPTED = {**TINY, "num_updates": 6, "log_every": 4, "checkpoint_every": 3, "num_seeds": 2}
tensor = st.tuples(
    st.sampled_from(((), (0,), (1,), (2,), (3,), (2, 3), (2, 3, 4), (2, 4, 1))),
    st.sampled_from((torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)),
    st.sampled_from((0, 1, -1, 1e30, float("nan"), float("inf"))),
).map(lambda x: torch.full(x[0], x[2], dtype=torch.float32).to(x[1]))
plain = value | tensor | st.dictionaries(text, tensor, max_size=2) | st.just("absent")


def places(content, path=()):
    """Paths of all that nested dicts and lists hold, the outer ones too."""
    yield path
    pairs = content.items() if isinstance(content, dict) else ()
    pairs = enumerate(content) if isinstance(content, list) else pairs
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def changed(content, path, new):
    """`content` with another value, or none, at a path."""
    if not path:
        return new
    content = content.copy()
    if isinstance(new, str) and new == "absent" and len(path) == 1:
        del content[path[0]]
    else:
        content[path[0]] = changed(content[path[0]], path[1:], new)
    return content


@pytest.fixture(scope="module", params=IN_TURN)
def interrupted(request, tmp_path_factory, small_set):
    """A script and the folder of its run that ended at update 5 of 6, saved at 3."""
    script, place = load_script(request.param), tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        crash_at(patch, script, words(**INTERRUPTED, dataset_id=small_set), 5)
    return script, place / "run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_set):
    """The folder of a whole run."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert load_script("iql").main(words(**INTERRUPTED, dataset_id=small_set)) == 0
    return place / "run"


def uses(script, dataset_id: str) -> dict:
    """What is done with a run folder that somebody hands over."""
    start = {"dataset_id": dataset_id, "num_updates": 4, "run_dir": "more", "checkpoint": "run"}
    start = words(**{**INTERRUPTED, **start})
    return {
        "resume": (script.main, RESUME, "run"),
        "start": (script.main, start, "more"),
        "evaluate": (policy.main, ["evaluate", "run", "--episodes", 1, "--device", "cpu"], ""),
        "export": (policy.main, ["export", "run", "own/policy.pt2"], "own"),
        "report": (report.main, ["run"], "run"),
    }


def used(script, folder: Path, use: str, change) -> int:
    """Do with a copy of a run folder, after change(), what `use` says."""
    for name in ("run", "more", "own"):
        shutil.rmtree(name, ignore_errors=True)
    Path("own").mkdir()
    shutil.copytree(folder, "run")
    change()
    dataset_id = yaml.safe_load((folder / "config.yaml").read_text())["dataset_id"]
    main, argv, own = uses(script, dataset_id)[use]
    return ends_well(main, argv, own=[own])


@pytest.mark.parametrize(
    "use, count",
    [
        ("resume", 40),
        ("start", 10),
        ("evaluate", 20),
        ("export", 2),
    ],
)
def test_checkpoints_of_any_kind(interrupted, use, count):
    script, folder = interrupted
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    groups = [[p for p in places(content) if len(p) == 1 or p[:1] == (g,)] for g in content]
    path = st.sampled_from(groups).flatmap(st.sampled_from)

    @inputs(count, path, plain)
    def check(path, new):
        def change():
            torch.save(changed(content, path, new), "run/checkpoint.pt")

        if used(script, folder, use, change) == 0 and use == "resume":
            whole_rows()

    check()


def whole_rows() -> None:
    """What a run that has ended leaves can be read."""
    for log in ("metrics", "episodes"):
        for row in Path(f"run/{log}.jsonl").read_text().splitlines():
            strict(row)


WRONG = [("step", -1), ("step", 7), ("step", 3.5), ("step", "3"), ("seconds", float("nan"))]
WRONG += [("seconds", {}), ("window", []), ("window", {"value_loss": [torch.zeros(4, 1), 2]})]
WRONG += [("window", {"value_loss": [0.0, 1]}), ("sizes", {}), ("sizes", [1, 2])]
WRONG += [("sizes", {"metrics": 10**6, "episodes": 10**6}), ("about", {"label": torch.zeros(2)})]
WRONG += [("sizes", {"metrics": 0.0, "episodes": 0.0})]
WRONG = [("resume", *each) for each in WRONG]
WRONG += [("start", "step", -1), ("start", "step", None), ("start", "step", "3")]
WRONG += [("evaluate", "about", torch.zeros(2)), ("evaluate", "config", torch.zeros(2))]


@pytest.mark.parametrize("use, name, new", WRONG, ids=range(len(WRONG)))
def test_a_checkpoint_with_a_wrong_field_is_refused(interrupted, use, name, new):
    """Some trained on, and ended in a wrong number or in logs that were padded."""
    script, folder = interrupted
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    if isinstance(new, dict) and name in ("about", "window"):
        new = {**content[name], **new}

    def change():
        torch.save({**content, name: new}, "run/checkpoint.pt")

    assert used(script, folder, use, change) == 2


def test_sums_of_metrics_are_copied(interrupted):
    """Adding to numbers that share memory, or that record gradients, is an error of torch."""
    script, folder = interrupted
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    window = {
        name: [total[:1].expand(len(total)).requires_grad_(), count]
        for name, (total, count) in content["window"].items()
    }
    assert window

    def change():
        torch.save({**content, "window": window}, "run/checkpoint.pt")

    assert used(script, folder, "resume", change) == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"3", b"\xa6", b'{"last": 3}'])
def test_a_result_that_cannot_be_read_is_refused(iql, finished, content):
    change = functools.partial(change_file, Path("run/result.json"), content)
    assert used(iql, finished, "resume", change) == 2


@pytest.mark.parametrize("log", ["metrics.jsonl", "episodes.jsonl"])
@pytest.mark.parametrize("size", [None, 0, 9])
def test_logs_that_lack_what_the_checkpoint_counts_on(interrupted, log, size):
    script, folder = interrupted

    def change():
        change_file(Path("run", log), "absent" if size is None else (size, b""))

    assert used(script, folder, "resume", change) == 2


FOLDER = ("checkpoint.pt", "config.yaml", "environment.json", "metrics.jsonl", "episodes.jsonl")
FOLDER += ("result.json",)
a_file = st.one_of(
    st.just("absent"),
    st.just("folder"),
    st.binary(max_size=20),
    st.tuples(st.integers(0, 5000), st.binary(max_size=3)),
    json_text.map(lambda x: x.encode("utf-8", "replace")),
    value.map(lambda x: yaml.safe_dump(x).encode()),
    line.map(lambda x: x.encode("utf-8", "replace")),
)


def change_file(path: Path, new) -> None:
    """Remove a file, make a folder of it, replace it, or cut it (with some bytes behind)."""
    old = path.read_bytes()
    path.unlink()
    if new == "folder":
        path.mkdir()
    elif new != "absent":
        path.write_bytes(old[: new[0]] + new[1] if isinstance(new, tuple) else new)


@pytest.mark.parametrize("use, count", [("resume", 20), ("report", 10), ("evaluate", 10)])
def test_files_of_a_run_that_are_broken(iql, finished, use, count):
    @inputs(count, st.sampled_from(FOLDER), a_file)
    def check(name, new):
        def change():
            change_file(Path("run", name), new)
            if use == "resume" and name != "result.json":  # as if interrupted
                Path("run/result.json").unlink()

        if used(iql, finished, use, change) == 0 and use == "resume":
            whole_rows()

    check()


@pytest.mark.parametrize("use", ["resume", "report"])
def test_results_and_rows_of_any_kind(iql, finished, use):
    """JSON and YAML that are whole, with other values."""
    files = {name: finished / name for name in FOLDER if name.endswith(".json")}
    content = {name: json.loads(path.read_text()) for name, path in files.items()}
    content["config.yaml"] = yaml.safe_load((finished / "config.yaml").read_text())
    for name in ("metrics.jsonl", "episodes.jsonl"):
        content[name] = list(map(json.loads, (finished / name).read_text().splitlines()))
    groups = [[p for p in places(content) if len(p) > 1 and p[0] == name] for name in content]

    @inputs(
        15 if use == "resume" else 8,
        st.sampled_from(groups).flatmap(st.sampled_from),
        value | st.just("absent"),
    )
    def check(path, new):
        def change():
            inner = changed(content[path[0]], path[1:], new)
            text = json.dumps(inner)
            if path[0].endswith("jsonl"):
                text = "".join(f"{json.dumps(row)}\n" for row in inner)
            Path("run", path[0]).write_text(text)
            if use == "resume" and path[0] != "result.json":
                Path("run/result.json").unlink()

        used(iql, finished, use, change)

    check()


# ---- nothing that a checkpoint or its folder says runs

ENTRY = TOY_ENV.to_json().replace("Pendulum-v1", "Own-v0").replace(TOY_ENV.entry_point, "evil:Env")
SHELL = ENTRY.replace("evil:Env", "os:system").replace(
    '"kwargs": {}', '"kwargs": {"command": "touch ran"}'
)
TAG = "!!python/object/apply:os.system [touch ran]"
CODE = ("evil:Own-v0", "evil", "os:system", "__import__('evil')", TAG, ENTRY, SHELL)
CODE += (ENTRY.replace("Own-v0", "evil:Own-v0"), "*[evil]", "!!python/module:evil")
USES = ("resume", "start", "evaluate")


class Reduced:
    """Imports `evil` when it is unpickled."""

    def __reduce__(self):
        return (__import__, ("evil",))


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Fails where the module `evil` was imported, or `touch ran` was run."""
    Path("evil.py").write_text("open('ran', 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    ran = Path("ran").exists() or "evil" in sys.modules
    sys.modules.pop("evil", None)
    assert not ran


@pytest.mark.usefixtures("evil")
def test_code_anywhere_in_a_checkpoint_does_not_run(interrupted):
    script, folder = interrupted
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    paths = [path for path, leaf in leaves(content) if leaf is None or isinstance(leaf, str)]
    paths += [("config", "env_kwargs"), ("about",), ("agent", "obs_mean")]

    @inputs(30, st.sampled_from(paths), st.sampled_from(CODE), st.sampled_from(USES))
    @example(("about", "env_spec"), ENTRY, "evaluate")
    @example(("about", "eval_env_spec"), SHELL, "evaluate")
    @example(("about", "env_id"), "evil:Own-v0", "evaluate")
    @example(("config", "env_id"), "evil:Own-v0", "evaluate")
    @example(("about", "script"), "evil", "evaluate")
    @example(("about", "algorithm"), "evil", "export")
    @example(("about", "label"), Reduced(), "resume")
    @example(("about", "label"), Reduced(), "start")
    @example(("about", "label"), Reduced(), "evaluate")
    @example(("about", "label"), Reduced(), "export")
    def check(path, code, use):
        def change():
            torch.save(changed(content, path, code), "run/checkpoint.pt")

        used(script, folder, use, change)
        assert sys.modules.pop("evil", None) is None

    check()


@pytest.mark.usefixtures("evil")
def test_code_anywhere_in_a_run_folder_does_not_run(interrupted):
    """As text and as YAML."""
    script, folder = interrupted
    config = yaml.safe_load((folder / "config.yaml").read_text())
    about = json.loads((folder / "environment.json").read_text())
    texts = [key for key, leaf in config.items() if isinstance(leaf, str | dict)]

    @inputs(20, st.sampled_from(texts), st.sampled_from(CODE), st.booleans(), st.sampled_from(USES))
    @example("env_kwargs", TAG, True, "resume")
    def check(key, code, raw, use):
        assume((key, code) != ("env_id", "evil:Own-v0"))  # the test below

        def change():
            lines = yaml.safe_dump({**config, key: code}).splitlines()
            lines = [f"{key}: {code}" if raw and x.startswith(f"{key}:") else x for x in lines]
            Path("run/config.yaml").write_text("\n".join(lines))
            planted = {name: code if isinstance(old, str) else old for name, old in about.items()}
            Path("run/environment.json").write_text(json.dumps(planted))

        used(script, folder, use, change)
        assert sys.modules.pop("evil", None) is None

    check()


@pytest.mark.usefixtures("evil")
def test_the_module_of_a_config_file_is_imported_on_the_users_own_word_only(interrupted):
    script, folder = interrupted

    def change():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        Path("run/config.yaml").write_text(yaml.safe_dump({**config, "env_id": "evil:Own-v0"}))

    used(script, folder, "resume", change)
    assert sys.modules.pop("evil", None) is None
