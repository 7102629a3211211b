"""Every script trains, evaluates and leaves a whole run folder."""

import json
import re
from pathlib import Path

from conftest import TOY, words
from test_runs import rows


def test_run_leaves_a_whole_folder(script, capsys):
    assert script.main(words(num_seeds=2)) == 0
    names = {path.name for path in Path("run").iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "episodes.jsonl",
        "checkpoint.pt",
        "result.json",
        "lock",
    }
    result = json.loads(Path("run/result.json").read_text())
    assert result["dataset_id"] == TOY
    assert [row["seed"] for row in result["last"]] == [0, 1]
    assert "score" in capsys.readouterr().out
    logged = {name for row in rows("run/metrics.jsonl") for name in row if "train/" in name}
    assert logged and all(re.fullmatch(r"train/[a-z0-9_]+", name) for name in logged)
    assert not [name for name in logged if f"`{name}`" not in script.__doc__], "not explained"
