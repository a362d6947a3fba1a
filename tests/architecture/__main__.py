"""`python -m tests.architecture`: the figures of this tree beside their bounds.

`--list RULE [FOLDER]` shows every place that a rule counts; `--lower` writes the bounds down to what this tree has.
"""

from __future__ import annotations

import argparse
import json

from tests.architecture import figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.architecture", description=__doc__)
    parser.add_argument("--list", nargs="+", metavar=("RULE", "FOLDER"), help=", ".join(figures.RULES))
    parser.add_argument("--lower", action="store_true", help="lower the bounds to the figures of this tree")
    arguments = parser.parse_args()
    if arguments.list:
        rule, *rooms = arguments.list
        for one in figures.findings()[rule]:
            if not rooms or one.room in rooms:
                print(f"{one.room:24} {one.where}: {one.what}")
        return
    now = figures.present()
    before = figures.committed() if figures.COMMITTED.exists() else None
    if arguments.lower:
        figures.COMMITTED.write_text(json.dumps(figures.lowered(now, before), indent=1) + "\n")
    for rule, rooms in now.items():
        bounds = (before or now).get(rule, {})
        total, bound = sum(rooms.values()), sum(bounds.values())
        print(f"{rule:24} {total:5} of {bound}")
        for word, changed in (("more", figures.risen(rooms, bounds)), ("fewer", figures.fallen(rooms, bounds))):
            for room, (was, is_now) in changed.items():
                print(f"    {word:5} in {room}: {is_now} of {was}")


if __name__ == "__main__":
    main()
