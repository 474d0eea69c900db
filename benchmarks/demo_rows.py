"""Write the rows of `qlora demo`: spoken requests, each with the one JSON command a home assistant should run for it.

    python -m benchmarks.demo_rows [DIRECTORY]

The package ships what this writes, in qlora_trainer/cli/demo_rows, which is also the default directory.

Fine-tuning is worth showing only where the score before is honestly low and the score after can be checked by a
program. A base model cannot know this command language (its actions, keys and their order are ours), and an answer is
right only as the exact string. Training and eval rows share no sentence frame and no slot value, not even a word
of one (messages apart, which are compared whole), so a right answer is understood and copied, never remembered.

Every sentence is our own: frames are in demo_frames.py, values in demo_values.py, and `demo_rows` only combines them.
Left out: requests that lack a value, and requests that are no command at all.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.demo_frames import ACTIONS
from benchmarks.demo_values import VALUES

SHIPPED = Path(__file__).parents[1] / "qlora_trainer" / "cli" / "demo_rows"

SYSTEM_MESSAGE = "Answer with a JSON command."

TRAIN_ROWS_PER_ACTION = 96
EVAL_ROWS_PER_ACTION = 10
_EVAL_SEED = "heldout"  # chose the shipped rows; another word would choose others

Row = dict[str, list[dict[str, str]]]


def demo_rows(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Make the training and the eval rows; equal seeds give equal rows.

    Args:
        seed: 0 for the shipped ones.

    Returns:
        Both lists, each row {"messages": [system, user, assistant]}.
    """
    train_frames = {name: action.train_frames for name, action in ACTIONS.items()}
    train_values = {slot: values.train for slot, values in VALUES.items()}
    eval_frames = {name: action.eval_frames for name, action in ACTIONS.items()}
    eval_values = {slot: values.eval for slot, values in VALUES.items()}
    return (
        _rows(train_frames, train_values, TRAIN_ROWS_PER_ACTION, f"train {seed}"),
        _rows(eval_frames, eval_values, EVAL_ROWS_PER_ACTION, f"{_EVAL_SEED} {seed}"),
    )


def _rows(
    frames: dict[str, tuple[str, ...]],
    values: dict[str, tuple[str | int, ...]],
    rows_per_action: int,
    seed: str,
) -> list[Row]:
    """Make different rows in a random order; an action's frames, and a slot's values, are used equally often."""
    next_frame = {name: _evenly(choices, f"{seed} {name}") for name, choices in frames.items()}
    next_value = {slot: _evenly(choices, f"{seed} {slot}") for slot, choices in values.items()}
    commands: dict[str, str] = {}
    for name, action in ACTIONS.items():
        wanted = len(commands) + rows_per_action
        while len(commands) < wanted:
            chosen = {slot: next(next_value[slot]) for slot in action.slots.values()}
            request = next(next_frame[name]).format(**chosen)
            command = {"action": name} | {key: chosen[slot] for key, slot in action.slots.items()}
            commands[request] = json.dumps(command, ensure_ascii=False, separators=(",", ":"))
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM_MESSAGE},
                {"role": "user", "content": request},
                {"role": "assistant", "content": answer},
            ]
        }
        for request, answer in commands.items()
    ]
    random.Random(seed).shuffle(rows)
    return rows


def _evenly(choices: tuple[Any, ...], seed: str) -> Iterator[Any]:
    """Yield choices without end: every one once, in a random order, before any comes again."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(choices, len(choices))


def write_demo_rows(directory: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl`.

    Args:
        directory: gets the files; made where it is missing.
        seed: 0 for the shipped ones.

    Returns:
        Their paths.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.jsonl", directory / "eval.jsonl"
    for path, rows in zip(paths, demo_rows(seed), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8", newline="\n")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=SHIPPED)
    for written in write_demo_rows(parser.parse_args().directory):
        print(written)
