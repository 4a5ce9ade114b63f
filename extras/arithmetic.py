"""Make a data set of one-line arithmetic questions, such as "What is 54+47?".

The files have the format of GSM8K. SmolLM2-135M-Instruct, a small pretrained model, answers some of
the questions at first. A few minutes of training on a CPU teach it more of them.

Some long questions have small numbers ("What is 1+0+2+0+1?"), and some short ones have larger ones
("What is 47*8?"), so that length and difficulty can be told apart.

    python -m extras.arithmetic FOLDER [--seed S]

The shipped folder, extras/arithmetic/, was made with seed 0. Every machine makes the same files."""

import argparse
import json
import math
import random
from pathlib import Path

from extras.common import run_command

FORMS = ["What is {}?", "Compute {}.", "How much is {}?", "Find {}."]
KINDS = [  # weight (their sum is 100), operation, smallest and largest value of each number
    (12, "+", [(1, 9), (1, 9)]),
    (6, "+", [(10, 99), (1, 9)]),
    (14, "+", [(10, 99), (10, 99)]),
    (2, "+", [(100, 999), (100, 999)]),
    (10, "+", [(0, 9), (0, 9), (0, 9)]),
    (12, "+", [(0, 2), (0, 2), (0, 2), (0, 2), (0, 2)]),
    (8, "-", [(1, 9), (1, 9)]),
    (6, "-", [(10, 99), (1, 9)]),
    (2, "-", [(10, 99), (10, 99)]),
    (14, "*", [(2, 9), (2, 9)]),
    (12, "*", [(10, 99), (2, 9)]),
    (2, "*", [(1, 3), (1, 3), (1, 3), (1, 3)]),
]


def make_arithmetic(folder, seed=0, n_train=1000, n_test=500):
    """Write train.jsonl and test.jsonl to `folder`. No expression is in both files."""
    rng = random.Random(seed)
    weights = [weight for weight, _, _ in KINDS]
    names = {}  # the file of each expression
    files = {"train": {}, "test": {}}  # the rows of each file, keyed by question
    while len(files["train"]) < n_train or len(files["test"]) < n_test:
        _, operation, ranges = rng.choices(KINDS, weights)[0]
        numbers = [rng.randint(low, high) for low, high in ranges]
        if operation == "-":
            numbers.sort(reverse=True)  # so that no result is negative
        expression = operation.join(map(str, numbers))
        name = names.setdefault(expression, rng.choices(["train", "test"], [n_train, n_test])[0])
        question = rng.choice(FORMS).format(expression)
        result = calculate(operation, numbers)
        answer = f"{expression} = {result} #### {result}"
        files[name][question] = {"question": question, "answer": answer}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("train", n_train), ("test", n_test)):
        rows = rng.sample(list(files[name].values()), size)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def calculate(operation, numbers):
    if operation == "+":
        return sum(numbers)
    if operation == "-":
        return numbers[0] - sum(numbers[1:])
    return math.prod(numbers)


def main():
    summary = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m extras.arithmetic", description=summary)
    parser.add_argument("folder", help="gets train.jsonl and test.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    make_arithmetic(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main, "extras.arithmetic")
