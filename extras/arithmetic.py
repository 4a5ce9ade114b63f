"""Make one-line questions such as "What is 54+47?" in GSM8K's format, for --preset arithmetic.

    python -m extras.arithmetic FOLDER [--seed S]

A question is a sum, a difference or a product of two to five numbers. How many numbers it has and
how large they are is drawn independently, so long questions are not always harder than short ones.
The shipped folder, extras/arithmetic/, was made with the default seed."""

import argparse
import functools
import json
import operator
import random
from pathlib import Path

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
FORMS = ["What is {}?", "How much is {}?", "Compute {}."]
N_TRAIN, N_TEST = 1000, 500


def make_questions(seed=0):
    """The rows of train.jsonl and of test.jsonl. No expression is in both."""
    rng = random.Random(seed)
    rows = {}  # by expression
    while len(rows) < N_TRAIN + N_TEST:
        numbers, sign = draw_expression(rng)
        expression = sign.join(map(str, numbers))
        result = functools.reduce(OPERATIONS[sign], numbers)
        if result >= 0:
            question = rng.choice(FORMS).format(expression)
            answer = f"{expression} = {result}\n#### {result}"
            rows.setdefault(expression, {"question": question, "answer": answer})
    rows = list(rows.values())
    rng.shuffle(rows)
    return rows[:N_TRAIN], rows[N_TRAIN:]


def draw_expression(rng):
    """The numbers of a question and the sign between them."""
    (sign,) = rng.choices("+-*", weights=[5, 3, 2])
    if sign == "*":
        return [rng.randint(0, rng.choice([9, 20, 99])), rng.randint(0, 9)], sign
    (n_numbers,) = rng.choices([2, 3, 4, 5], weights=[6, 2, 1, 1])
    (largest,) = rng.choices([2, 9, 20, 99, 999], weights=[1, 2, 3, 3, 1])
    return [rng.randint(0, largest) for _ in range(n_numbers)], sign


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.arithmetic", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where train.jsonl and test.jsonl go")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(("train", "test"), make_questions(args.seed)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.folder / f"{split}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
