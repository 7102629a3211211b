"""Every script trains, evaluates and leaves a whole run folder."""

import json
from pathlib import Path

from conftest import TOY, words


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
    }
    result = json.loads(Path("run/result.json").read_text())
    assert result["dataset_id"] == TOY
    assert [row["seed"] for row in result["last"]] == [0, 1]
    assert "score" in capsys.readouterr().out
