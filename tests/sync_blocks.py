"""Copy the shared blocks of one script into every other script that has them.

python tests/sync_blocks.py algorithms/iql.py
"""

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^# >>> shared: ([^\n]+)\n(.*?)^# <<< shared: \1$", re.DOTALL | re.MULTILINE)
ALGORITHMS = Path(__file__).resolve().parents[1] / "algorithms"


def blocks(text: str) -> dict[str, str]:
    """Name -> body of every shared block of a script."""
    return {match[1]: match[2] for match in BLOCK.finditer(text)}


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not Path(argv[0]).is_file():
        print("error: name the script whose blocks are right", file=sys.stderr)
        return 2
    source = blocks(Path(argv[0]).read_text(encoding="utf-8"))
    for path in sorted(ALGORITHMS.glob("*.py")):
        old = path.read_text(encoding="utf-8")
        new = old
        for name in blocks(old).keys() & source.keys():
            begin, end = f"# >>> shared: {name}\n", f"# <<< shared: {name}\n"
            head, rest = new.split(begin)
            new = head + begin + source[name] + end + rest.split(end)[1]
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path.name}: brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
