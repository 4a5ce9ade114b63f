"""GAIN-RL in one file: GRPO that chooses its questions by the angles between token vectors.

GRPO samples a group of completions for each question and makes the correct ones more likely. A
group teaches something only if its rewards differ, so the choice of questions matters. GAIN-RL
("Angles Don't Lie", arXiv 2506.02281, NeurIPS 2025) chooses by a signal read from the model itself:

    1. Score   each question by its angle concentration C = C_intra + C_inter. C_intra is the mean
               cosine between the question's hidden states after the final norm. C_inter is the
               mean cosine between these and the states of the prefix, in front of every question.
    2. Rank    the questions by C, highest first.
    3. Train   on batches from a Gaussian over the ranks. Its mean mu starts at 0. High accuracy and
               C move it on: mu += n max(0, tanh(alpha (accuracy - beta)) + tanh(gamma C)).

    not to scale  rank 0, highest C     rank N - 1, lowest C
        batch 0   |###==--.                                |
        batch 10  |          .--==###==--.                 |
        batch 25  |                                .--==###| to the end of the run

The paper claims that aligned token vectors predict large gradients. Section 5 says what of this is
exact, and extras/STUDY.md tests the rest.

    python gainrl.py                             Qwen2.5-0.5B on GSM8K; without a GPU, a tiny model
    python gainrl.py --preset arithmetic         SmolLM2-135M on sums, in minutes on a CPU
    python gainrl.py --curriculum uniform        the baseline: plain GRPO

    symbol        meaning                            in the code       value (gsm8k preset)
    N             training questions                 len(problems)     7473
    P             questions in a batch               prompts_per_step  32
    G             completions of each question       group_size        8
    B             rows of a tensor; in a batch, P G  len(ids)          256
    T             tokens in the longest prompt       prompt_length     up to about 300
    L             most tokens in a completion        max_new_tokens    512
    D             size of a hidden state             hidden.shape[-1]  896
    C             angle concentration of a question  concentration     0.85 (with SmolLM2-135M)
    mu, sigma     mean and width of the Gaussian     mean, sigma       0 to N - 1, 1000 ranks
    n             unit of its moves                  stride            500 ranks
    beta          accuracy that adds no move         target_accuracy   0.5
    alpha, gamma  slopes of accuracy and C           alpha, gamma      2, 2

Deliberate choices in GRPO:

    - The loss is the mean over all tokens of a batch. The GRPO paper averages each completion
      first, so the tokens of long ones weigh less.
    - One optimizer update per batch (--updates), so the ratio is 1 and nothing is clipped.
    - One GPU trains and samples. For several, see extras/train_trl.py."""

# --- 1. Imports (to copy a single section, take those that its head names)

import argparse
import contextlib
import copy
import itertools
import json
import math
import os
import re
import shlex
import sys
import time
from collections import namedtuple
from dataclasses import KW_ONLY, asdict, dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

# --- 2. Configuration

TINY_WORLD = "extras/tiny-world"
ARITHMETIC = "extras/arithmetic"
PRESETS = {  # overrides of the defaults
    "gsm8k": {},
    "tiny": {
        "model": TINY_WORLD,
        "dataset": TINY_WORLD,
        "steps": 40,
        "prompts_per_step": 8,
        "max_new_tokens": 64,
        "micro_batch": 128,
        "lr": 3e-4,
        "kl_coef": 0.0,
        "eval_every": 10,
        "eval_examples": 256,
    },
    "arithmetic": {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "dataset": ARITHMETIC,
        "steps": 40,
        "prompts_per_step": 4,
        "max_new_tokens": 28,
        "lr": 1e-5,
        "kl_coef": 0.0,
        "eval_every": 20,
        "eval_examples": 200,
    },
}


def setting(default, help_text):
    shown = "" if default is None else " (default: %(default)s)"
    return field(default=default, metadata={"help": help_text + shown})


@dataclass
class Config:
    """All settings of a run. ValueError for numbers out of range and for contradictions."""

    preset: Literal[*PRESETS] = setting("gsm8k", "tiny if there is no GPU")
    model: str = setting("Qwen/Qwen2.5-0.5B-Instruct", "hub name or folder")
    dataset: str = setting("openai/gsm8k", "hub name or folder")
    curriculum: Literal["angle", "length", "shuffled", "uniform"] = setting("angle", "the order")
    steps: int = setting(200, "batches to train on; 0 only scores and ranks")
    prompts_per_step: int = setting(32, "P, questions per batch")
    group_size: int = setting(8, "G, completions per question")
    updates: int = setting(1, "optimizer updates per batch")
    max_new_tokens: int = setting(512, "L, tokens per completion")
    micro_batch: int = setting(32, "completions per backward pass; halved if memory runs out")
    temperature: float = setting(1.0, "of sampling; evaluation is greedy")
    lr: float = setting(1e-6, "learning rate, constant")
    clip_eps: float = setting(0.2, "epsilon of the clip")
    kl_coef: float = setting(0.001, "weight of the KL term")
    sigma: float | None = setting(None, "width of the Gaussian, in ranks (default: 0.134 N)")
    stride: float | None = setting(None, "n, unit of its moves, in ranks (default: 0.067 N)")
    target_accuracy: float = setting(0.5, "beta, the neutral accuracy")
    alpha: float = setting(2.0, "slope of accuracy in the moves")
    gamma: float = setting(2.0, "slope of C in the moves")
    seed: int = setting(0, "of draws and sampling")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps")
    eval_every: int = setting(50, "batches between evaluations")
    eval_examples: int = setting(512, "test questions per evaluation")
    checkpoint_every: int = setting(10, "batches between checkpoints")
    run_dir: str | None = setting(None, "directory to create (default: a name in runs/)")
    resume: str | None = setting(None, "run directory to continue")

    def __post_init__(self):
        lowest = {"group_size": 2, "temperature": 0.01, "lr": 1e-30, "stride": 1e-9, "sigma": 1e-3}
        may_be_0 = ("steps", "seed", "clip_eps", "kl_coef", "target_accuracy", "alpha", "gamma")
        for name, value in vars(self).items():
            low, high = lowest.get(name, 0 if name in may_be_0 else 1), 2**31
            if isinstance(value, int | float) and not low <= value <= high:  # also refuses NaN
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} {value}: must be from {low} to {high}")
        if self.model == TINY_WORLD and self.dataset != TINY_WORLD:
            raise ValueError("--dataset needs another --model: the tiny one knows only its words")
        if self.run_dir and Path(self.run_dir).exists():
            raise ValueError(f"--run-dir {self.run_dir} exists: use a new name or --resume")
        for name in ("model", "dataset"):  # absolute, so that --resume works in any directory
            path = getattr(self, name)
            if path not in (TINY_WORLD, ARITHMETIC) and Path(path).is_dir():
                setattr(self, name, os.path.abspath(path))


# --- 3. The loop


def train(config):
    """Returns the Path of the run directory. ValueError for bad input, OSError for a failed write,
    FloatingPointError for divergence."""
    model, tokenizer, problems, test_problems = load_task(config)
    reference = copy.deepcopy(model) if config.kl_coef else None  # the weights before training
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    generator = torch.Generator(model.device).manual_seed(config.seed)

    # Score with untrained weights. A checkpoint then replaces weights, order and mean.
    scores = score_prompts(model, [problem["prompt"] for problem in problems])
    curriculum = make_curriculum(config, scores)
    parts = {"model": model, "optimizer": optimizer, "curriculum": curriculum}
    run = RunFolder(config, problems, scores, generator, parts)

    if config.steps and run.steps_done == 0:
        run.record_evaluation(0, evaluate(model, tokenizer, test_problems, config))
    for step in tqdm(range(run.steps_done + 1, config.steps + 1), "training", disable=None):
        began = time.perf_counter()
        # 1. Draw P questions from the Gaussian.
        mean = curriculum.mean  # update() below moves it
        batch = [problems[index] for index in curriculum.sample()]
        prompts = [problem["prompt"] for problem in batch]
        # 2. Sample G completions of each: (P, T) -> (P G, T + L). Measure C again, as it changes.
        rollout = generate(model, tokenizer, prompts, config, config.group_size, generator)
        # 3. Reward each completion and compare it with its group: (P, G).
        golds = [problem["answer"] for problem in batch for _ in range(config.group_size)]
        rewards = torch.tensor([*map(reward, rollout.texts, golds)]).view(-1, config.group_size)
        advantages = group_advantages(rewards)
        # 4. Update the policy with the clipped loss.
        stats = grpo_update(model, reference, optimizer, rollout, advantages, config)
        # 5. Move the Gaussian by the batch's accuracy and its C.
        curriculum.update(rewards.mean().item(), rollout.concentration)
        seconds = time.perf_counter() - began
        run.record_step(step, seconds, mean, batch, rollout, rewards, stats)
        if step % config.eval_every == 0 or step == config.steps:
            run.record_evaluation(step, evaluate(model, tokenizer, test_problems, config))
        if step % config.checkpoint_every == 0 or step == config.steps:
            run.save_checkpoint(step)

    if config.steps:
        run.finish(model, tokenizer)
    return run.path


# --- 4. The task: prompts, answers, reward
# Needs contextlib, re, Decimal, namedtuple.

# ids[:start] is the prefix (system prompt and worked example), ids[start:end] the question. A token
# across the border is in the question, so prefixes can differ by a token.
Prompt = namedtuple("Prompt", "ids start end")

SYSTEM_PROMPT = "Solve the problem step by step. Write the final number as \\boxed{number}."
EXAMPLE_QUESTION = "What is 2+2?"
EXAMPLE_ANSWER = "2 + 2 = 4. The answer is \\boxed{4}."
PLACEHOLDER = "\ue000"  # in no template


def encode_prompts(tokenizer, questions):
    """The Prompts of a list of questions. ValueError for a template that cannot be used."""
    name = tokenizer.name_or_path
    head, found, tail = render_chat(tokenizer, PLACEHOLDER).partition(PLACEHOLDER)
    if not found or PLACEHOLDER in tail:
        raise ValueError(f"the chat template of {name} drops or repeats the question")
    texts = [head + question.strip() + tail for question in questions]
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    prompts = []
    for text, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"]):
        begin, end = len(head), len(text) - len(tail)
        touching = [k for k, (left, right) in enumerate(offsets) if left < end and right > begin]
        if not touching:
            raise ValueError(f"the tokenizer of {name} drops a question")
        prompts.append(Prompt(ids, touching[0], touching[-1] + 1))
    return prompts


def render_chat(tokenizer, question):
    """The chat as text, with thinking switched off. If the template rejects or drops the system
    role, the system prompt joins the first user turn."""
    turns = build_messages(question)
    merged = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{EXAMPLE_QUESTION}"}
    for messages in (turns, [merged, *turns[2:]]):
        with contextlib.suppress(Exception):  # each template rejects in its own way
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            if SYSTEM_PROMPT in text:
                return text
    raise ValueError(f"{tokenizer.name_or_path} has no usable chat template")


def build_messages(question):
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": EXAMPLE_QUESTION},
        {"role": "assistant", "content": EXAMPLE_ANSWER},
        {"role": "user", "content": question},
    ]


def reward(completion, gold):
    """1.0 if the completion's number is that of `gold`, a row's "answer"; else 0.0."""
    answer = extract_answer(completion)
    return float(answer is not None and answer == extract_answer(gold, is_gold=True))


# Bare numbers only: 42  -8  2.50  1,000  1{,}000  $12  \$12  -$7  -\$7  30%  30\%  42.
NUMBER = (
    r"\s*(?P<minus>-?)(?:\\?\$)?"
    r"(?P<digits>(?:[0-9]+|[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+)(?:\.[0-9]+)?)(?:\\?%)?\.?\s*"
)


def extract_answer(text, is_gold=False):
    """The number in the last `\\boxed{}`; if there is no box, or in gold answers, after the last
    `####`. A Decimal, or None. Words, units, fractions and boxes in braces are not read: an unread
    answer costs one reward, but a misread one teaches a mistake."""
    before, box, after = text.rpartition("\\boxed")
    if box and not is_gold:
        # Not inside a brace that opens before the box and closes after it: \boxed{\boxed{5} + 1}
        is_open = before.count("{") > before.count("}")
        is_nested = is_open and after.count("}") > after.count("{")
        match = None if is_nested else re.match(r"\{" + NUMBER + r"\}", after)
    else:
        _, hashes, after = text.rpartition("####")
        match = re.fullmatch(NUMBER, after) if hashes else None
    return Decimal(match["minus"] + re.sub("[,{}]", "", match["digits"])) if match else None


# --- 5. The signal: angle concentration (paper, section 3)
# Needs copy, os, torch, F, namedtuple, tqdm.
#
# For a linear layer Y = X W with token rows x_i, any loss, and its gradients g_i = d loss / d y_i,
#     |d loss / dW|_F^2 = sum_ij (x_i . x_j)(g_i . g_j)  with  x_i . x_j = |x_i| |x_j| cos(theta_ij).
# This is exact. C averages the cosines inside the question and between question and prefix, with
# equal weight, as the paper chooses. It leaves out the norms |x_i|, the g_i, and the pairs inside
# the prefix and with completion tokens. So it does not follow that C predicts the gradient of a
# GRPO loss. C is measured after the final norm, as a proxy for all layers: at lm_head itself, a
# GRPO loss has g_i = 0 for all of C's tokens.

Scores = namedtuple("Scores", "intra inter concentration tokens")  # (N,); tokens per question


def angle_concentration(hidden, prefix_mask, question_mask):
    """C_intra and C_inter of each row (paper, section 3): two float32 tensors (B,) in [-1, 1].

        C_intra = mean of cos(theta_ij) over i, j in the question (i = j included)
        C_inter = mean of cos(theta_ij) over i in the question, j in the prefix

    hidden: (B, T, D), any float dtype. Masks: (B, T), bool or 0/1; padding, on either side, is in
    neither. Without a prefix C_inter is 0. ValueError for a row without a question token."""
    prefix_mask, question_mask = prefix_mask.bool(), question_mask.bool()
    empty_rows = (~question_mask.any(1)).nonzero()
    if len(empty_rows):
        raise ValueError(f"row {empty_rows[0].item()} has no question token")
    u = F.normalize(hidden.float(), dim=-1)  # float32, because sums in bfloat16 change ranks
    # Not multiplied by the mask: padding may hold NaN.
    prefix_sum = u.masked_fill(~prefix_mask[..., None], 0).sum(1)
    question_sum = u.masked_fill(~question_mask[..., None], 0).sum(1)
    n_prefix = prefix_mask.sum(1)
    n_question = question_mask.sum(1)
    # sum_ij cos(theta_ij) = |sum_i u_i|^2: O(T D), not O(T^2 D) as for a T x T matrix.
    intra = question_sum.square().sum(1) / (n_question * n_question)
    inter = (question_sum * prefix_sum).sum(1) / (n_question * n_prefix).clamp(min=1)
    return intra.clamp(-1, 1), inter.clamp(-1, 1)


@torch.no_grad()
def score_prompts(model, prompts, batch_size=64):
    """Scores of N Prompts, on the CPU. C is C_intra + C_inter (paper, section 3). The shared prefix
    is run once. Prompts whose questions end at the same position share a batch, so nothing is
    padded."""
    device = model.device
    intra_inter = torch.zeros(2, len(prompts))
    shared_ids = os.path.commonprefix([prompt.ids[: prompt.start] for prompt in prompts])
    rows_by_end = {}
    for row, prompt in enumerate(prompts):
        rows_by_end.setdefault(prompt.end, []).append(row)

    with mixed_precision(device):
        shared_hidden, shared_cache = run_backbone(model, torch.tensor([shared_ids], device=device))
        for end in tqdm(sorted(rows_by_end), "scoring", leave=False, disable=None):
            for rows in torch.tensor(rows_by_end[end]).split(batch_size):
                batch = [prompts[row] for row in rows.tolist()]
                ids = [prompt.ids[len(shared_ids) : end] for prompt in batch]
                cache = copy.deepcopy(shared_cache)
                cache.batch_repeat_interleave(len(batch))
                hidden, _ = run_backbone(model, torch.tensor(ids, device=device), cache=cache)
                hidden = torch.cat([shared_hidden.expand(len(batch), -1, -1), hidden], dim=1)
                starts = torch.tensor([prompt.start for prompt in batch], device=device)
                prefix_mask = torch.arange(end, device=device) < starts[:, None]
                measured = angle_concentration(hidden, prefix_mask, ~prefix_mask)
                intra_inter[:, rows] = torch.stack(measured).cpu()

    tokens = torch.tensor([prompt.end - prompt.start for prompt in prompts])
    return Scores(*intra_inter, intra_inter.sum(0), tokens)


def run_backbone(model, ids, attention_mask=None, cache=None, position_ids=None):
    """The hidden states after the final norm, (B, T, D), and the cache including these T tokens.
    ids: (B, T). attention_mask: (B, cached tokens + T), False for padding. position_ids: by default
    from the mask. Older transformers call the cache past_key_values."""
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model.get_decoder()(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        cache=cache,
    )
    return output.last_hidden_state, output.cache


def mixed_precision(device):
    """A context for bfloat16 matrix products, if the GPU has them. Weights stay float32, because
    bfloat16 rounds updates of 1e-6 away. Call optimizer.step() outside: autocast caches weights."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


# --- 6. The curriculum (paper, section 4)
# Needs math, dataclass, KW_ONLY, torch.


def make_curriculum(config, scores):
    """The GaussianCurriculum of a run. --curriculum sets the sort key, or an infinite width."""
    random = torch.Generator().manual_seed(config.seed)
    sort_by = {
        "angle": scores.concentration,
        "length": -scores.tokens,  # short questions first
        "shuffled": torch.randperm(len(scores.tokens), generator=random),
        "uniform": scores.concentration,  # every rank is equally likely
    }
    names = ("stride", "sigma", "target_accuracy", "alpha", "gamma", "seed")
    settings = {name: getattr(config, name) for name in names}
    if config.curriculum == "uniform":
        settings["sigma"] = math.inf
    return GaussianCurriculum(sort_by[config.curriculum], config.prompts_per_step, **settings)


@dataclass(eq=False)
class GaussianCurriculum(torch.utils.data.Sampler):
    """Draws batches of question indices from a Gaussian that moves over their ranks.

    scores: (N,). `.order`: highest first, ties by index. stride (the paper's n) and sigma: in
    ranks; None means 500/7473 and 1000/7473 of N, as in the authors' code for GSM8K. sigma = inf
    draws uniformly. ValueError for invalid input. Iterating yields batches without end. A
    DataLoader with this batch_sampler needs num_workers=0, because workers draw ahead of update().

    With SmolLM2-135M, GSM8K questions have a mean C of 0.85 and a standard deviation of 0.06, so
    tanh(2C) is about 0.93 and hardly varies. The C term is a steady drift; the accuracy does the
    steering."""

    scores: torch.Tensor
    batch_size: int
    _: KW_ONLY
    stride: float | None = None
    sigma: float | None = None
    target_accuracy: float = 0.5
    alpha: float = 2.0
    gamma: float = 2.0
    seed: int = 0

    def __post_init__(self):
        self.scores = torch.as_tensor(self.scores)
        N = len(self.scores)
        if not torch.isfinite(self.scores).all():
            raise ValueError("a score is not finite")
        if not 1 <= self.batch_size <= N:
            raise ValueError(f"--prompts-per-step {self.batch_size}: there are {N} questions")
        self.order = self.scores.argsort(descending=True, stable=True)
        self.mean = 0.0
        self.stride = 500 / 7473 * N if self.stride is None else self.stride
        self.sigma = 1000 / 7473 * N if self.sigma is None else self.sigma
        if not (self.stride > 0 and self.sigma > 0):
            raise ValueError(f"stride {self.stride} and sigma {self.sigma} must be above 0")
        self.generator = torch.Generator().manual_seed(self.seed)

    def log_density(self):
        rank = torch.arange(len(self.order), dtype=torch.float64)
        return -0.5 * ((rank - self.mean) / self.sigma) ** 2

    def probabilities(self):
        """The probability of each rank to be drawn first: (N,) float64. For plots."""
        return self.log_density().softmax(0)

    def sample(self):
        """batch_size distinct indices. The largest values of log p + Gumbel noise are a draw
        without replacement. Logarithms do not underflow far from the mean."""
        exponential = torch.empty(len(self.order), dtype=torch.float64)
        exponential.exponential_(generator=self.generator)
        gumbel = -exponential.log()
        ranks = (self.log_density() + gumbel).topk(self.batch_size).indices
        return self.order[ranks].tolist()

    def __iter__(self):
        while True:
            yield self.sample()

    def update(self, accuracy, concentration):
        """Move the mean after a batch with this accuracy and this mean C; returns the mean.

            mean <- mean + stride * max(0, tanh(alpha (accuracy - target)) + tanh(gamma C))

        It stops at the last rank. ValueError if the accuracy is not in [0, 1] or C not finite."""
        if not (0 <= accuracy <= 1 and math.isfinite(concentration)):
            raise ValueError(f"invalid accuracy {accuracy} or C {concentration}")
        move = math.tanh(self.alpha * (accuracy - self.target_accuracy))
        move += math.tanh(self.gamma * concentration)
        self.mean = min(self.mean + self.stride * max(move, 0.0), len(self.order) - 1.0)
        return self.mean

    def state_dict(self):
        return {"order": self.order, "mean": self.mean, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        if len(state["order"]) != len(self.order):
            raise ValueError(f"{len(self.order)} questions now, {len(state['order'])} before")
        self.order = state["order"]
        self.mean = state["mean"]
        self.generator.set_state(state["generator"])


# --- 7. GRPO: advantages, update, loss, log-probabilities, sampling
# Needs contextlib, math, torch, F, namedtuple, tqdm, section 5, a Config. On CUDA, first call
# torch.backends.cuda.enable_cudnn_sdp(False), as load_model does.
LOGIT_CHUNK = 512  # tokens whose logits are in memory at the same time

# G completions of each of P prompts: B = P G rows, those of a prompt next to each other.
#     ids, attention_mask    (B, T + L): T prompt tokens, padded on the left, L of completion
#     completion_mask        (B, L): True up to and including the end token
#     texts, concentration   the B completions as strings; the prompts' mean C now
Rollout = namedtuple("Rollout", "ids attention_mask completion_mask texts concentration")


def group_advantages(rewards):
    """z-scores of the rewards within each group, (P, G) -> (P, G), float. A flat group, whose
    rewards are all equal, gets zeros."""
    rewards = rewards * 1.0
    differences = rewards - rewards[:, :1]  # exactly 0 in a flat group
    std = differences.std(1, keepdim=True)
    return torch.where(std == 0, 0.0, (differences - differences.mean(1, keepdim=True)) / std)


def grpo_update(model, reference, optimizer, rollout, advantages, config):
    """config.updates optimizer updates on a Rollout; returns loss, grad_norm, kl and clip_fraction
    of the last one. advantages: (P, G). reference: None if config.kl_coef is 0. If memory runs out,
    config.micro_batch is halved and the gradient computed again. FloatingPointError, before that
    update, for a loss or gradient that is not finite."""
    old_logprobs = None
    for _ in range(config.updates):
        while True:
            try:
                old_logprobs, stats = compute_gradient(
                    model, reference, rollout, advantages, old_logprobs, config
                )
                break
            except RuntimeError as error:
                if config.micro_batch == 1 or not is_out_of_memory(error):
                    raise
            # Not in `except`: there the error keeps the failed tensors alive.
            config.micro_batch //= 2
            tqdm.write(f"out of memory: continuing with --micro-batch {config.micro_batch}")
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(stats["grad_norm"] + stats["loss"]):
            raise FloatingPointError(f"not finite, start a new run with a lower --lr: {stats}")
        optimizer.step()
        optimizer.zero_grad()
    return stats


def is_out_of_memory(error):
    message = str(error) if isinstance(error, RuntimeError) else ""
    return "out of memory" in message or "allocate memory" in message


def compute_gradient(model, reference, rollout, advantages, old_logprobs, config):
    """Set the gradient of grpo_loss; returns old_logprobs (B, L), and loss, kl and clip_fraction.
    advantages: (P, G). old_logprobs: None in the first update of a batch, which measures them.

    Micro-batches, weighted by their tokens, add up to the gradient of the batch. They hold rows of
    similar length. Without a KL term, rows of advantage 0 are skipped."""
    lengths = rollout.completion_mask.sum(1)
    n_tokens = lengths.sum().item()
    advantages = advantages.flatten().to(lengths.device)
    active_rows = lengths.argsort(stable=True)
    if not config.kl_coef:
        active_rows = active_rows[advantages[active_rows] != 0]
    # Zeros, not None: if no row is active, AdamW must still move by its momentum.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    all_old = torch.zeros(rollout.completion_mask.shape, device=rollout.ids.device)
    stats = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0}
    for first in range(0, len(active_rows), config.micro_batch):
        # msort: rows of a prompt are neighbors again, and share one run of it.
        rows = active_rows[first : first + config.micro_batch].msort()
        used = rollout.attention_mask[rows].any(0)  # columns that are not only padding
        ids = rollout.ids[rows][:, used]
        attention_mask = rollout.attention_mask[rows][:, used]
        length = lengths[rows].max().item()
        inputs = (ids, attention_mask, length, config.temperature, rows // config.group_size)
        logprobs = completion_logprobs(model, *inputs)
        old = logprobs.detach() if old_logprobs is None else old_logprobs[rows, :length]
        all_old[rows, :length] = old
        kl_terms = ()
        if config.kl_coef:
            with torch.no_grad():
                kl_terms = (completion_logprobs(reference, *inputs), config.kl_coef)
        inputs = (logprobs, old, advantages[rows], attention_mask[:, -length:], config.clip_eps)
        loss, loss_stats = grpo_loss(*inputs, *kl_terms)
        share = lengths[rows].sum().item() / n_tokens
        (loss * share).backward()
        for name, value in {"loss": loss.item(), **loss_stats}.items():
            stats[name] += share * value
    return all_old, stats


def grpo_loss(
    logprobs, old_logprobs, advantages, mask, clip_eps=0.2, reference_logprobs=None, kl_coef=0.0
):
    """The clipped policy loss with an optional KL penalty: (loss, stats).

        loss = mean over the mask of -min(r A, clamp(r, 1 - clip_eps, 1 + clip_eps) A) + kl_coef k3
        r = exp(logprobs - old_logprobs),  k3 = exp(d) - d - 1,  d = reference_logprobs - logprobs

    advantages: (B,), the others (B, L); mask: bool or 0/1. Masked-out values, even inf, affect
    neither loss nor gradient. stats: clip_fraction, the share of tokens whose policy gradient is
    clipped away, and kl, the mean of k3, which estimates KL(policy || reference)."""
    mask = mask.bool()
    # Masked before exp: exp(inf) has a NaN gradient even where it is masked later.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)

    def masked_mean(values):
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    ratio = torch.exp(log_ratio)
    gain = ratio * advantages[:, None]
    clipped_gain = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages[:, None]
    loss = masked_mean(-torch.minimum(gain, clipped_gain))
    stats = {"kl": 0.0, "clip_fraction": masked_mean((gain > clipped_gain).float()).item()}
    if reference_logprobs is not None:
        d = torch.where(mask, reference_logprobs - logprobs, 0.0)
        k3 = masked_mean(torch.exp(d) - d - 1)
        loss = loss + kl_coef * k3
        stats["kl"] = k3.item()
    return loss, stats


def completion_logprobs(model, ids, attention_mask, length, temperature, prompt_index):
    """Log-probabilities of the last `length` tokens of each row at the sampling temperature:
    float32 (B, length), 0 where attention_mask is False.

    ids, attention_mask: (B, T + length). prompt_index: (B,), each row's prompt, which neighbors
    share. Logits are computed for LOGIT_CHUNK tokens at a time, and again in the backward pass,
    because all of them would take gigabytes."""
    lm_head = model.get_output_embeddings()
    prompt_length = ids.shape[1] - length
    completion_mask = attention_mask[:, prompt_length:].bool()
    _, rows_per_prompt = prompt_index.unique_consecutive(return_counts=True)
    first_rows = rows_per_prompt.cumsum(0) - rows_per_prompt

    def token_logprobs(hidden, targets):
        logits = lm_head(hidden).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    with mixed_precision(model.device):
        prompt_hidden, cache = run_backbone(
            model, ids[first_rows, :prompt_length], attention_mask[first_rows, :prompt_length]
        )
        cache.batch_repeat_interleave(rows_per_prompt)  # gradients flow back through the cache
        completion_hidden, _ = run_backbone(model, ids[:, prompt_length:], attention_mask, cache)
        # The state before a token predicts it; the prompt's last state predicts the first.
        last_of_prompt = prompt_hidden[:, -1:].repeat_interleave(rows_per_prompt, dim=0)
        hidden = torch.cat([last_of_prompt, completion_hidden[:, :-1]], dim=1)
        hidden_chunks = hidden[completion_mask].split(LOGIT_CHUNK)
        target_chunks = ids[:, prompt_length:][completion_mask].split(LOGIT_CHUNK)
        chunks = [
            torch.utils.checkpoint.checkpoint(token_logprobs, *chunk, use_reentrant=False)
            for chunk in zip(hidden_chunks, target_chunks)
        ]
    logprobs = torch.zeros(completion_mask.shape, device=ids.device)
    logprobs[completion_mask] = torch.cat(chunks)
    return logprobs


@torch.no_grad()
def generate(model, tokenizer, prompts, config, group_size=1, generator=None):
    """A Rollout: group_size completions of each of P Prompts, sampled at config.temperature with a
    torch.Generator; greedy without one. Other settings of the generation_config, such as top_k, are
    ignored. FloatingPointError for NaN states."""
    device = model.device
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt.ids) for prompt in prompts], True, -1, padding_side="left"
    ).to(device)
    attention_mask = ids >= 0
    positions = attention_mask.cumsum(1) - 1  # -1 in the padding
    starts = torch.tensor([[prompt.start] for prompt in prompts], device=device)
    ends = torch.tensor([[prompt.end] for prompt in prompts], device=device)
    prefix_mask = attention_mask & (positions < starts)
    question_mask = (positions >= starts) & (positions < ends)
    ids = ids.clamp(min=0)
    length = config.max_new_tokens
    with mixed_precision(device):
        hidden, cache = run_backbone(model, ids, attention_mask)
        intra, inter = angle_concentration(hidden, prefix_mask, question_mask)
        concentration = (intra + inter).mean().item()
        if not math.isfinite(concentration):
            raise FloatingPointError("NaN states: start a new run with a lower --lr")

        cache.batch_repeat_interleave(group_size)
        hidden = hidden[:, -1].repeat_interleave(group_size, dim=0)
        # decode() writes the completions in place.
        ids = F.pad(ids, (0, length)).repeat_interleave(group_size, dim=0)
        attention_mask = F.pad(attention_mask, (0, length)).repeat_interleave(group_size, dim=0)
        end_ids = end_tokens(model, tokenizer, prompts[0])
        decode_rows = decode
        if device.type == "cuda":  # optional: faster, but draws differ
            with contextlib.suppress(ImportError):
                from extras.cuda_graph import decode as decode_rows
        decode_rows(model, cache, hidden, ids, attention_mask, end_ids, config, generator)

    completion_ids, completion_mask = ids[:, -length:], attention_mask[:, -length:]
    completions = [row[mask].tolist() for row, mask in zip(completion_ids, completion_mask)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollout(ids, attention_mask, completion_mask, texts, concentration)


def end_tokens(model, tokenizer, prompt):
    """The tokens that end a completion: those of the generation config, the tokenizer, and the chat
    template. ValueError if there are none."""
    ends = model.generation_config.eos_token_id  # or a list
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    special = {k for k, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends |= special.intersection(prompt.ids[prompt.end :][:1])  # what ends the question's turn
    if ends == {None}:
        raise ValueError(f"{model.name_or_path} has no end token")
    return torch.tensor(sorted(ends - {None}), device=model.device)


def decode(model, cache, hidden, ids, attention_mask, end_ids, config, generator):
    """Write completions to the last L columns of ids and attention_mask, (B, T + L). hidden: the
    prompts' last states, (B, D). Finished rows leave once they are 1/8 of the batch."""
    lm_head = model.get_output_embeddings()
    n_rows, length = ids.shape
    rows = torch.arange(n_rows, device=ids.device)  # still in the batch
    active = torch.ones_like(rows, dtype=torch.bool)  # which of them are not finished
    for column in range(length - config.max_new_tokens, length):
        token = next_token(lm_head(hidden), config.temperature, generator, rows, n_rows)
        ids[rows, column] = token.squeeze(1)
        attention_mask[rows, column] = active
        active = active & (token != end_ids).all(1)
        if column == length - 1 or not active.any():
            break
        if active.sum() <= 7 / 8 * len(rows):
            kept = active.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, active, token = rows[kept], active[kept], token[kept]
        seen = attention_mask[rows, : column + 1]
        hidden, cache = run_backbone(model, token, seen, cache)
        hidden = hidden[:, -1]


def next_token(logits, temperature, generator, rows, n_rows):
    """The next token of each row, (B, 1): the most likely one, or a draw if there is a generator:
    argmax of p / Exponential(1), as in torch.multinomial, which cannot be part of a CUDA graph.
    Drawing for all n_rows rows keeps draws the same when rows leave."""
    if generator is None:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits.float() / temperature).softmax(-1)
    exponentials = torch.empty(n_rows, logits.shape[-1], device=logits.device)
    exponentials.exponential_(generator=generator)
    exponentials.clamp_(min=2**-24)  # as CUDA does; on MPS, draws of 0 would make any token win
    return (probabilities / exponentials[rows]).argmax(-1, keepdim=True)


# --- 8. Evaluation

ACCURACY = "{eval_accuracy:.3f} (95% {eval_low:.3f} to {eval_high:.3f})"


def evaluate(model, tokenizer, problems, config):
    """Greedy accuracy, its 95% interval, and the share of readable answers."""
    batch_size = config.prompts_per_step * config.group_size
    texts = []
    for first in tqdm(range(0, len(problems), batch_size), "evaluating", leave=False, disable=None):
        prompts = [problem["prompt"] for problem in problems[first : first + batch_size]]
        texts += generate(model, tokenizer, prompts, config).texts
    correct = sum(reward(text, problem["answer"]) for text, problem in zip(texts, problems))
    low, high = wilson_interval(correct, len(problems))
    return {
        "eval_accuracy": correct / len(problems),
        "eval_low": low,
        "eval_high": high,
        "eval_format": sum(extract_answer(text) is not None for text in texts) / len(problems),
    }


def wilson_interval(successes, trials):
    """The 95% Wilson interval of a share."""
    z = 1.96
    n = trials + z**2
    center = (successes + z**2 / 2) / n
    half_width = z / n * math.sqrt(successes * (trials - successes) / trials + z**2 / 4)
    return max(0.0, center - half_width), min(1.0, center + half_width)


# --- 9. Plumbing: loading and files


def load_task(config):
    tqdm.write(f"preset {config.preset}, {config.curriculum}, seed {config.seed}, {config.device}")
    model, tokenizer = load_model(config.model, config.device)
    limits = model.config.get_text_config()
    context = getattr(limits, "max_position_embeddings", None) or math.inf
    # Past the original length, longrope rotates all keys anew, and cached keys are wrong.
    rope = getattr(limits, "rope_parameters", None) or {}
    longest = (rope.get("original_max_position_embeddings") or context) - config.max_new_tokens
    problems = load_problems(tokenizer, config.dataset, "train", longest)
    test_problems = load_problems(tokenizer, config.dataset, "test", longest)
    prompt = problems[0]["prompt"]
    check_model(model, prompt)
    # Saved in model/.
    model.generation_config.eos_token_id = end_tokens(model, tokenizer, prompt).tolist()
    return model, tokenizer, problems, test_problems[: config.eval_examples]


def load_model(name, device):
    """Model (float32, no dropout) and tokenizer of a hub name or folder, or ValueError."""
    with explain(f"cannot load --model {name} on --device {device}"):
        path = find_folder(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        # AutoTokenizer would replace the splitting rules of some models.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        quantized = hasattr(model.config, "quantization_config")
        if quantized or not all(weight.requires_grad for weight in model.parameters()):
            raise ValueError("quantized or frozen weights cannot be trained; merge a LoRA adapter")
        model = model.to(device).eval()
    # cuDNN's attention gives NaN gradients at some lengths (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if model.num_parameters() < 1e6:
        torch.set_num_threads(1)  # small matrices are slower with several threads
    return model, tokenizer


def find_folder(name):
    """The folder of a --model or --dataset; names on the hub stay. ValueError for other paths."""
    is_shipped = name in (TINY_WORLD, ARITHMETIC)
    folder = Path(__file__).parent / name if is_shipped else Path(name)
    if folder.is_dir():
        return folder
    if is_shipped or folder.is_file() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise ValueError(f"no folder {folder}; extras/ comes with a clone of the repository")
    return name


@torch.no_grad()
def check_model(model, prompt):
    """ValueError unless completion_logprobs gives the model's own log-probabilities."""
    with explain(f"cannot use --model {model.name_or_path}"), mixed_precision(model.device):
        ids = torch.tensor([prompt.ids], device=model.device)
        length = ids.shape[1] - prompt.start
        logits = model(input_ids=ids).logits[0, prompt.start - 1 : -1].float()
        own = -F.cross_entropy(logits, ids[0, prompt.start :], reduction="none")
        ids = F.pad(ids, (3, 0)).expand(2, -1)
        mask = torch.arange(ids.shape[1], device=model.device).expand(2, -1) >= 3
        ours = completion_logprobs(model, ids, mask, length, 1.0, ids[:, 0])  # of one prompt
        # SmolLM2-135M differs by up to 0.12 in bfloat16, and 1e-5 in float32.
        tolerance = 0.5 if torch.is_autocast_enabled(model.device.type) else 1e-3
        if not (ours - own).abs().max() <= tolerance:
            raise ValueError("its logits are not lm_head of its last states")


def load_problems(tokenizer, source, split, longest):
    """The rows of a split, as dictionaries with question, answer, index and prompt (a Prompt of at
    most `longest` tokens). ValueError for a bad row, with its file and line."""
    with explain(f"cannot load --dataset {source}"):
        path = Path(find_folder(source), f"{split}.jsonl")
        if path.parent.is_dir():
            lines = path.read_bytes().splitlines()
        else:
            import datasets  # imported here: it takes a second

            rows = datasets.load_dataset(source, "main", split=split)
            lines = [json.dumps(row).encode() for row in rows]
    rows = []
    for number, line in enumerate(lines, start=1):
        with explain(f"{path}:{number}: not UTF-8 JSON with question and answer: {line!r:.99}"):
            if line.strip():
                row = json.loads(line.decode("utf-8-sig"))
                row["question"].encode()  # fails for a lone surrogate
                gold = extract_answer(row["answer"], is_gold=True)
                if gold is None or not row["question"].strip():
                    raise ValueError("no question, or no number after ####")
                rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    prompts = encode_prompts(tokenizer, [row["question"] for row in rows])
    problems = [
        {**row, "index": index, "prompt": prompt}
        for index, (row, prompt) in enumerate(zip(rows, prompts))
        if len(prompt.ids) <= longest
    ]
    if not problems:
        raise ValueError(f"{path}: --max-new-tokens leaves {longest} tokens, too few for a prompt")
    if len(problems) < len(rows):
        tqdm.write(f"left out {len(rows) - len(problems)} {split} prompts: too long")
    return problems


class RunFolder:
    """The directory of a run. Its files are replaced as a whole, except in model/, so that a run can
    be stopped in any way."""

    def __init__(self, config, problems, scores, generator, parts):
        """Create the directory, or load the parts from the checkpoint of config.resume."""
        self.config = config
        self.generator = generator
        self.parts = parts
        self.logs = {"metrics": [], "samples": []}
        self.steps_done = 0
        self.path = Path(config.resume) if config.resume else create_directory(config)
        self.checkpoint = self.path / "checkpoint/state.pt"
        if self.checkpoint.exists():
            with explain(f"cannot use {self.checkpoint}"):
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
                generator.set_state(state["generator"])
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                self.logs = state["logs"]
                self.steps_done = state["step"]
        if self.steps_done > config.steps:
            raise ValueError(f"--steps {config.steps}: {self.steps_done} are done already")
        write_json(self.path / "config.json", asdict(config), indent=2)
        rows = [dict(zip(Scores._fields, row)) for row in zip(*(x.tolist() for x in scores))]
        rows = [{"index": problem["index"], **row} for problem, row in zip(problems, rows)]
        write_json(self.path / "scores.jsonl", *rows)
        correlation = spearman(parts["curriculum"].order.argsort(), scores.tokens)
        tqdm.write(f"Spearman of rank and length: {correlation:.2f}")  # near 1: a sort by length
        command = shlex.join(["python", __file__, f"--resume={self.path}"])
        tqdm.write(f"to continue after a stop: {command}")

    def record_step(self, step, seconds, mean, batch, rollout, rewards, stats):
        useful = rewards.amax(1) > rewards.amin(1)  # groups whose rewards differ
        row = {
            "step": step,
            "accuracy": rewards.mean().item(),
            "concentration": rollout.concentration,
            "mean": mean,
            **stats,
            "useful_groups": useful.float().mean().item(),
            "completion_length": rollout.completion_mask.sum().item() / len(rollout.texts),
            "seconds": seconds,
        }
        self.append("metrics", row)
        if step % self.config.eval_every == 0 or step == self.config.steps:
            group = list(zip(rollout.texts, rewards[0].tolist()))  # zip stops after one group
            row = {"step": step, "question": batch[0]["question"], "completions": group}
            self.append("samples", row)

    def record_evaluation(self, step, result):
        self.append("metrics", {"step": step, **result})
        tqdm.write(f"step {step:4}: greedy accuracy {ACCURACY.format(**result)}")

    def append(self, name, row):
        self.logs[name].append(row)
        write_json(self.path / f"{name}.jsonl", *self.logs[name])

    def save_checkpoint(self, step):
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state.update(step=step, logs=self.logs, generator=self.generator.get_state())
        write_atomically(self.checkpoint, lambda file: torch.save(state, file))

    def finish(self, model, tokenizer):
        """Write model/ and print the accuracy before and after."""
        with explain(f"cannot write {self.path}/model: make room, then --resume", OSError):
            model.save_pretrained(self.path / "model")
            tokenizer.save_pretrained(self.path / "model")
        rows = [row for row in self.logs["metrics"] if "eval_accuracy" in row]
        tqdm.write(f"before: {ACCURACY.format(**rows[0])}, after: {ACCURACY.format(**rows[-1])}")


def create_directory(config):
    """Create and return a new directory: --run-dir, or the first free name in runs/."""
    default = f"runs/{config.preset}-{config.curriculum}-{config.seed}"
    for k in itertools.count(1):
        path = Path(config.run_dir or (default if k == 1 else f"{default}-{k}"))
        try:
            path.mkdir(parents=True)  # atomic: one process gets it
            return path
        except FileExistsError:
            if config.run_dir:
                raise


def spearman(x, y):
    """Spearman's correlation, (N,) tensors. Rank: count of < plus <=, so that ties share one."""
    ranks = [
        sum(torch.searchsorted(values.msort(), values, right=right) for right in (False, True))
        for values in (x, y)
    ]
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].nan_to_num().item()


@contextlib.contextmanager
def explain(message, kind=ValueError):
    """Re-raise any error except out of memory as `kind`, with a message."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise kind(f"{message} ({type(error).__name__}: {error!s:.300})") from error


def write_atomically(path, write):
    """Let write() make a temporary file, then rename it: `path` is never half a file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with explain(f"cannot write {path}: make room, then --resume", OSError):
        path.parent.mkdir(exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # against power cuts
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path, *values, indent=None):
    text = "".join(json.dumps(value, indent=indent) + "\n" for value in values)
    write_atomically(path, lambda file: file.write_text(text))


# --- 10. The command line


def parse_config(argv=None):
    """The Config of a command line: a preset's or a resumed run's settings, replaced by flags.
    ValueError if a resumed run would change its results."""
    options = {"allow_abbrev": False, "formatter_class": argparse.HelpFormatter}
    parser = transformers.HfArgumentParser(Config, usage="gainrl.py [options]", **options)
    unset = argparse.Namespace(**{setting.name: None for setting in fields(Config)})
    given = {k: v for k, v in vars(parser.parse_args(argv, unset)).items() if v is not None}
    if "resume" in given:
        with explain(f"cannot resume {given['resume']}"):
            recorded = json.loads(Path(given["resume"], "config.json").read_bytes())
            settings = {name: recorded[name] for name in vars(unset)}
        settings["run_dir"] = None
        for name in given.keys() - {"steps", "micro_batch", "checkpoint_every", "resume"}:
            old, new = settings[name], given[name]
            is_moved = os.path.isabs(str(old)) and Path(new).is_dir()
            if new != old and not is_moved:
                raise ValueError(f"the resumed run keeps --{name.replace('_', '-')} {old}")
    else:
        is_tiny = not (given.keys() & {"model", "dataset"} or torch.cuda.is_available())
        preset = given.get("preset", "tiny" if is_tiny else "gsm8k")
        settings = {"preset": preset, **PRESETS[preset]}
    return Config(**{**settings, **given})


def main(argv=None):
    """Returns the status: 0, 2 after an error, 130 after Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    try:
        train(parse_config(argv))
        return 0
    except KeyboardInterrupt:
        tqdm.write("gainrl.py: stopped", sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        message = str(error)
        if is_out_of_memory(error):
            advice = "start a new run with a lower --prompts-per-step or --max-new-tokens"
            message = f"out of memory: {advice} ({message})"
        elif isinstance(error, RuntimeError):
            raise  # a bug
        tqdm.write("gainrl.py: " + " ".join(message.split())[:600], sys.stderr)
        return 2


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere:
        # A closed stream is None.
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
        # Logs show each line at once, and a path that the console cannot print ends no run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        sys.exit(main())
