"""What does C correlate with in a model? Gradient norms, length and steps of real questions.

    python -m extras.smollm2                      makes the default model's folder
    python -m extras.signals --dataset DIR        a folder with train.jsonl; an hour on one core

For each question it measures C after every layer, and the norms of some gradients: of the gold
solution's loss, of the question's own, and of a GRPO loss with made-up advantages. The measurements
are kept in runs/signals, so a stopped command continues. STUDY.md has the table."""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import gainrl
from extras import smollm2
from extras.bench import describe_machine
from extras.common import read_jsonl, run_command
from extras.probe import spearman
from extras.study import GROUP_SIZE, bootstrap, count_steps, print_table

SAMPLED_TOKENS = 32  # length of the completions whose gradient is measured
LOSSES = {  # the losses whose gradient norms are measured
    "gold, mean": "gradient of the gold solution's loss, mean over tokens",
    "gold, sum": "gradient of the gold solution's loss, sum over tokens",
    "question": "gradient of the question's own loss, mean over tokens",
    "sampled": "gradient of the GRPO loss of eight samples, half of them with A = 1, half with -1",
}


def text_gradients(model, tokenizer, problem):
    """The gradient norms for the gold solution and for the question, by their keys in LOSSES."""
    prompt = problem["prompt"]
    gold = tokenizer(problem["answer"], add_special_tokens=False)["input_ids"]
    gold.append(tokenizer.eos_token_id)
    question = prompt.ids[: prompt.end]
    of_gold = gradient_norm(model, text_logprobs(model, prompt.ids + gold, len(gold)).mean())
    of_question = text_logprobs(model, question, prompt.end - prompt.start).mean()
    return {
        "gold, mean": of_gold,
        "gold, sum": len(gold) * of_gold,
        "question": gradient_norm(model, of_question),
    }


def sampled_gradient(model, tokenizer, problem, seed):
    """The gradient norm of the GRPO loss of eight completions. Their advantages are 1 and -1 in
    turn, regardless of the answers: a small model solves too few questions for real rewards."""
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], "max_new_tokens": SAMPLED_TOKENS})
    generator = torch.Generator(model.device).manual_seed(seed)
    prompts = [problem["prompt"]]
    rollout = gainrl.generate(model, tokenizer, prompts, config, GROUP_SIZE, generator)
    advantages = torch.tensor([[1.0, -1.0]], device=model.device).repeat(1, GROUP_SIZE // 2)
    gainrl.compute_gradient(model, None, rollout, advantages, None, config)
    return torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item()


def text_logprobs(model, ids, n_tokens):
    """The log-probabilities of the last n_tokens of a text, (n_tokens,)."""
    ids = torch.tensor([ids], device=model.device)
    inputs = (ids, torch.ones_like(ids), n_tokens, 1.0, torch.zeros_like(ids[:, 0]))
    return gainrl.completion_logprobs(model, *inputs)[0]


def gradient_norm(model, loss):
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@torch.no_grad()
def concentration_by_layer(model, prompt):
    """Two lists of floats: C_intra and C_inter of the embeddings and of each layer's output. The
    last entry is measured after the final norm."""
    ids = torch.tensor([prompt.ids[: prompt.end]], device=model.device)
    prefix_mask = torch.arange(prompt.end, device=model.device)[None] < prompt.start
    states = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    pairs = [gainrl.angle_concentration(hidden, prefix_mask, ~prefix_mask) for hidden in states]
    return [intra.item() for intra, _ in pairs], [inter.item() for _, inter in pairs]


def measure_questions(model, tokenizer, problems, n_gradients, n_sampled, path):
    """A row for each problem, with text_gradients for the first n_gradients and sampled_gradient
    for the first n_sampled. Each row is written at once, so a stopped command continues there."""
    rows = read_jsonl(path) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for number in tqdm(range(len(rows), len(problems)), desc="questions"):
            problem = problems[number]
            intra, inter = concentration_by_layer(model, problem["prompt"])
            row = {
                "length": problem["prompt"].end - problem["prompt"].start,
                "steps": count_steps(problem["answer"]),
                "intra": intra,
                "inter": inter,
            }
            if number < n_gradients:
                row.update(text_gradients(model, tokenizer, problem))
            if number < n_sampled:
                row["sampled"] = sampled_gradient(model, tokenizer, problem, seed=number)
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    return rows


def column(rows, name):
    """The values of a measurement, from the rows that have it: (n,)."""
    return torch.tensor([float(row[name]) for row in rows if name in row])


def rank_correlation(x, y, given=None):
    """Spearman's correlation of two columns (n,) with its 95% bootstrap interval over questions, as
    text. With `given`, the partial correlation."""
    columns = (x, y) if given is None else (x, y, given)
    statistic = spearman if given is None else partial_spearman
    matrices = [column.double()[None] for column in columns]
    value, low, high = bootstrap(statistic, *matrices, draws=1000)
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def partial_spearman(x, y, given):
    """Spearman's correlation of x and y, controlled for `given`: (..., n) each, to (...)."""
    x_given, y_given = spearman(x, given), spearman(y, given)
    unexplained = (1 - x_given**2) * (1 - y_given**2)
    return (spearman(x, y) - x_given * y_given) / unexplained.clamp(min=1e-12).sqrt()


def signal_table(rows):
    """The rank correlations of C, its two parts and length with each measurement."""
    length = column(rows, "length")
    intra = torch.tensor([row["intra"][-1] for row in rows])
    inter = torch.tensor([row["inter"][-1] for row in rows])
    signals = {"C": intra + inter, "C_intra": intra, "C_inter": inter, "length": length}
    heads = ["Spearman's correlation of", "questions", *signals, "C given length", "length given C"]
    table = [heads]
    for name, title in (("length", "length"), ("steps", "steps of the solution"), *LOSSES.items()):
        target = column(rows, name)
        n = len(target)
        concentration, length = signals["C"][:n], signals["length"][:n]
        cells = [rank_correlation(signal[:n], target) for signal in signals.values()]
        if name == "length":
            table.append([title, n, *cells[:3], "", "", ""])
        else:
            cells.append(rank_correlation(concentration, target, length))
            cells.append(rank_correlation(length, target, concentration))
            table.append([title, n, *cells])
    return table


def depth_table(rows):
    """The mean of C after each layer, and its correlations."""
    length, gradient = column(rows, "length"), column(rows, "gold, mean")
    heads = ["after layer", "mean C_intra", "mean C_inter", "C and length"]
    table = [[*heads, "C and the gold solution's gradient"]]
    for depth in range(len(rows[0]["intra"])):
        intra = torch.tensor([row["intra"][depth] for row in rows])
        inter = torch.tensor([row["inter"][depth] for row in rows])
        concentration = intra + inter
        cells = [f"{intra.mean():.3f}", f"{inter.mean():.3f}"]
        cells.append(rank_correlation(concentration, length))
        cells.append(rank_correlation(concentration[: len(gradient)], gradient))
        table.append([depth, *cells])
    return table


def study_signals(args):
    """Measure the first questions of a data set and print the tables."""
    print(describe_machine(), end="\n\n", flush=True)
    folder = Path(args.model)
    if folder == smollm2.FOLDER:
        smollm2.unpack()
    model, tokenizer = gainrl.load_model(args.model, args.device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    longest = context - SAMPLED_TOKENS
    problems = gainrl.load_problems(tokenizer, args.dataset, "train", longest)[: args.questions]
    gainrl.check_model(model, problems[0]["prompt"])
    name = f"{folder.name}-{Path(args.dataset).resolve().name}"
    name += f"-{args.questions}-{args.gradients}-{args.sampled}.jsonl"
    path = Path("runs", "signals", name)
    rows = measure_questions(model, tokenizer, problems, args.gradients, args.sampled, path)
    print_table(f"Signals in {folder.name}", signal_table(rows))
    print_table("By depth", depth_table(rows))


# --- The command line -----------------------------------------------------------------------------


def three_or_more(text):
    """Parse a number of questions. A correlation needs at least three."""
    number = int(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"{number}: must be 3 or more")
    return number


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.signals", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default=str(smollm2.FOLDER),
        help="folder of a model (default: %(default)s, made by extras.smollm2)",
    )
    parser.add_argument("--dataset", required=True, help="folder with train.jsonl")
    for name, default, description in (
        ("--questions", 400, "questions to measure, the first ones"),
        ("--gradients", 240, "questions with gradients of the solution and of the question"),
        ("--sampled", 100, "questions with gradients of sampled completions"),
    ):
        description += f" (default: {default})"
        parser.add_argument(name, type=three_or_more, default=default, help=description)
    parser.add_argument("--device", default="cpu", help="an hour on a CPU, minutes on a GPU")
    args = parser.parse_args(argv)
    try:
        study_signals(args)
    except (ValueError, OSError) as error:
        print(f"extras.signals: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main, "extras.signals")
