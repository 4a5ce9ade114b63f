"""Will a curriculum help this model on these questions? Ask before you train.

    python -m extras.probe                                   the tiny model and its questions
    python -m extras.probe --model FOLDER --dataset FOLDER   or names on the hub, as in gainrl.py

A group of completions is useful if its rewards differ. All others have no gradient. The probe
samples one group for each of 256 random questions and reports the share p of useful groups. It also
reports how well each signal of a forward pass predicts which groups are useful, and the speed-up
over uniform draws that this allows at the start of a run. Nothing is trained or written.

The rule behind it: a group with accuracy a has a signal proportional to u = 2 sqrt(a (1 - a)), and
u_mean is the mean of u over the useful groups. An update makes progress in proportion to
u_mean sqrt(p), so no choice of questions gains more than 1 / (u_mean sqrt(p)) times. This is a rule
of thumb. extras/STUDY.md derives it, tests it, and says where it fails."""

import argparse
import sys
import time
from collections import namedtuple

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

import gainrl
from extras.common import run_command

# --- Signals --------------------------------------------------------------------------------------
# What one forward pass over a prompt gives. intra, inter: C_intra, C_inter. hidden: (T, D), after
# the final norm. logprobs: (T, V), of the next token. prompt: a gainrl.Prompt, whose question has
# the tokens start to end.
ForwardPass = namedtuple("ForwardPass", "intra inter hidden logprobs prompt")


def shortness(view):
    """Minus the number of tokens in the question."""
    return float(view.prompt.start - view.prompt.end)


def predictability(view):
    """Minus the logarithm of the question's perplexity."""
    start, end = view.prompt.start, view.prompt.end
    targets = torch.tensor(view.prompt.ids[start:end], device=view.logprobs.device)
    return view.logprobs[start - 1 : end - 1].gather(1, targets[:, None]).mean().item()


def entropy(view):
    """The entropy of the first token of a completion, in nats."""
    return torch.distributions.Categorical(logits=view.logprobs[-1]).entropy().item()


# A curriculum starts with the questions of the highest signal. To add one, write a function.
SIGNALS = {
    "C": lambda view: view.intra + view.inter,
    "C_intra": lambda view: view.intra,
    "C_inter": lambda view: view.inter,
    "length, shortest first": shortness,
    "perplexity, lowest first": predictability,
    "entropy": entropy,
}


@torch.no_grad()
def measure_signals(model, prompts):
    """The signals of N Prompts by their name in SIGNALS: float64 tensors (N,)."""
    rows = []
    for prompt in tqdm(prompts, "signals", leave=False, disable=None):
        ids = torch.tensor([prompt.ids], device=model.device)
        with gainrl.mixed_precision(model.device):
            hidden, _ = gainrl.run_backbone(model, ids)
            logits = model.get_output_embeddings()(hidden)[0].float()
        is_prefix = torch.arange(prompt.end, device=model.device)[None] < prompt.start
        intra, inter = gainrl.angle_concentration(hidden[:, : prompt.end], is_prefix, ~is_prefix)
        logprobs = F.log_softmax(logits, dim=-1)
        view = ForwardPass(intra.item(), inter.item(), hidden[0], logprobs, prompt)
        rows.append([signal(view) for signal in SIGNALS.values()])
    return dict(zip(SIGNALS, torch.tensor(rows, dtype=torch.float64).unbind(1)))


# --- Groups ---------------------------------------------------------------------------------------


def sample_rewards(model, tokenizer, problems, config):
    """The rewards of one group of completions for each problem: (N, G)."""
    generator = torch.Generator(model.device).manual_seed(config.seed)
    rewards = []
    size = config.prompts_per_step
    for first in tqdm(range(0, len(problems), size), "sampling", leave=False, disable=None):
        batch = problems[first : first + size]
        prompts = [problem["prompt"] for problem in batch]
        rollout = gainrl.generate(model, tokenizer, prompts, config, config.group_size, generator)
        golds = [problem["answer"] for problem in batch for _ in range(config.group_size)]
        rewards += map(gainrl.reward, rollout.texts, golds)
    return torch.tensor(rewards).view(-1, config.group_size)


# --- Statistics -----------------------------------------------------------------------------------


def mid_ranks(values):
    """The ranks over the last dimension, from 0.5; ties share their mean rank. float64 (..., N)."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, values, right=end) for end in (False, True))
    return (below + up_to).double() / 2


def spearman(x, y):
    """Spearman's correlation over the last dimension: (..., N) each, to (...). It is 0 if one of
    them is constant."""
    ranks = [mid_ranks(values) for values in (x, y)]
    centered = [values - values.mean(-1, keepdim=True) for values in ranks]
    return torch.cosine_similarity(*centered, dim=-1)


def interval(drawn):
    """(low, high): the 95% percentile interval of bootstrap draws. NaN draws are left out."""
    return drawn.double().nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def strengths(rewards):
    """u = 2 sqrt(a (1 - a)) of each group, with a its accuracy: (..., G) -> (...), float64. 0 for a
    flat group, 1 if half of the completions are correct."""
    accuracy = rewards.double().mean(-1)
    return 2 * (accuracy * (1 - accuracy)).sqrt()


def progress(u, weights):
    """u_mean sqrt(p) of a batch: p is the share of useful groups, u_mean the mean u over these.
    u: (..., N). weights: the chance of each group to be drawn, (N,), with sum 1. NaN if no group is
    useful."""
    return (u * weights).sum(-1) / ((u > 0) * weights).sum(-1).sqrt()


def bound(u):
    """The most that a choice among these groups can gain: 1 / (u_mean sqrt(p))."""
    return 1 / progress(u, torch.full(u.shape[-1:], 1 / u.shape[-1]).double())


def auc(signal, u):
    """The probability that a useful group has a higher signal than another one; ties count half.
    signal, u: (..., N). NaN if all groups are useful or none is."""
    useful = u > 0
    n_useful = useful.sum(-1)
    wins = (mid_ranks(signal) * useful).sum(-1) - n_useful.double().square() / 2
    return wins / (n_useful * (useful.shape[-1] - n_useful))


def first_speedup(signal, u):
    """The predicted speed-up over uniform draws at the start of a curriculum: the progress() under
    the first weights of gainrl's Gaussian over the questions, highest signal first, divided by that
    of uniform draws. signal, u: (..., N). NaN if no group is useful."""
    curriculum = gainrl.GaussianCurriculum(torch.zeros(signal.shape[-1]), 1)
    in_order = u.gather(-1, signal.argsort(dim=-1, descending=True, stable=True))
    return progress(in_order, curriculum.probabilities()) * bound(u)


def estimate(statistic, *columns, draws=2000):
    """(value, low, high): the statistic of columns (N,) and its 95% bootstrap interval over
    questions."""
    n = len(columns[0])
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    drawn = statistic(*[column[rows] for column in columns])
    return statistic(*columns).item(), *interval(drawn)


# --- The report -----------------------------------------------------------------------------------


def measure(config, n_questions):
    """The signals, as from measure_signals(), and the rewards (N, G), of random questions."""
    model, tokenizer, problems, _ = gainrl.load_task(config)
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randperm(len(problems), generator=generator)[:n_questions]
    problems = [problems[index] for index in drawn.tolist()]
    signals = measure_signals(model, [problem["prompt"] for problem in problems])
    return signals, sample_rewards(model, tokenizer, problems, config)


def probe(config, n_questions):
    """Measure and print."""
    began = time.perf_counter()
    signals, rewards = measure(config, n_questions)
    u = strengths(rewards)
    n_useful, n_groups = (u > 0).sum().item(), len(u)
    low, high = gainrl.wilson_interval(n_useful, n_groups)
    shares = f"p = {n_useful / n_groups:.2f} [{low:.2f}, {high:.2f}]"
    print(f"useful groups      {n_useful} of {n_groups}: {shares}")
    print(f"accuracy           {rewards.mean():.2f}")
    if n_useful:
        print(f"u_mean             {u[u > 0].mean():.2f}")
        print(f"bound              {with_interval(*estimate(bound, u))}")
    print(f"completions        {rewards.numel()} in {time.perf_counter() - began:.0f} s")
    if 0 < n_useful < n_groups:
        print("\nsignal                     AUC                  speed-up at the start")
        verdicts = []
        for name, signal in signals.items():
            values = [estimate(statistic, signal, u) for statistic in (auc, first_speedup)]
            cells = [with_interval(*value) for value in values]
            print(f"{name:<26} {cells[0]:<20} {cells[1]}")
            verdicts.append(verdict(name, values[0], values[1][0]))
        print("", *verdicts, sep="\n")
    print(f"\n{conclude(u)}")


def with_interval(value, low, high):
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def verdict(name, auc_estimate, speedup):
    """What the AUC, as (value, low, high), and the speed-up at the start mean, in words."""
    _, low, high = auc_estimate
    where = "does not tell useful groups from others"
    if low > 0.5:
        where = "puts useful groups first"
    if high < 0.5:
        where = "puts useful groups last"
    flags = {"C": "--curriculum angle", "length, shortest first": "--curriculum length"}
    curriculum = flags.get(name, "an order by it")
    return f"{name} {where}: {curriculum} would start at {speedup:.2f} times the speed of uniform."


def conclude(u):
    """The closing sentence."""
    if not u.any():
        return (
            f"0 of {len(u)} groups are useful: nothing to learn here yet. Try easier questions, "
            "a better model or more completions per group."
        )
    return (
        "As a rule of thumb, a batch of the best groups, with half of their completions correct, "
        f"gains {bound(u):.2f} times as much as a random batch at the start, and less later."
    )


def main(argv=None):
    """Run a command line; returns its status: 0, or 2 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.probe",
        description=__doc__.partition("\n")[0],
        epilog="All other options are those of gainrl.py, such as --group-size and --temperature.",
        allow_abbrev=False,
    )
    parser.add_argument("--questions", type=int, default=256, help="default: %(default)s")
    args, others = parser.parse_known_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        if args.questions < 1:
            raise ValueError(f"--questions {args.questions}: must be at least 1")
        probe(gainrl.parse_config(others), args.questions)
        return 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not gainrl.is_out_of_memory(error):
            raise  # a bug
        print("extras.probe: " + " ".join(str(error).split())[:600], file=sys.stderr)
        return 2


if __name__ == "__main__":
    run_command(main, "extras.probe")
