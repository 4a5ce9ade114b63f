"""GAIN-RL in one file: GRPO that picks its training questions by the angles between token vectors.

From "Angles Don't Lie" (arXiv 2506.02281, NeurIPS 2025). Before training, one forward pass over
each question gives its angle concentration C = C_intra + C_inter. C_intra is the mean cosine
between the hidden states of the question's tokens; C_inter is the mean cosine between the
question's tokens and the prefix: what stands before the question in its prompt, which is a system
prompt and an example. The more all of them point one way, the larger the gradient that the question
can give. The questions are sorted by C, each batch is drawn from a Gaussian over the ranks, and the
Gaussian moves down the order as fast as the accuracy and the angle of the batches allow. The rest
is GRPO.

    python gainrl.py                              Qwen2.5-0.5B on GSM8K; without a GPU, a toy (tiny)
    python gainrl.py --curriculum uniform         plain GRPO, uniform draws; --help lists the others
    python gainrl.py --resume runs/tiny-angle-0   continue after Ctrl-C, a crash or kill -9

Where the paper's ideas are, in reading order:

    paper, 3     the signal C_intra, C_inter          angle_concentration, score_prompts
    paper, 4     sort by C                            GaussianCurriculum.order
                 draw from a Gaussian over ranks      GaussianCurriculum.sample
                 move it by accuracy and angle        GaussianCurriculum.update
    GRPO         sample, compare, update              generate, group_advantages, grpo_update
    all of it                                         train: the loop

Symbols, here and in the comments:

    N   questions in the data set              x_i      hidden state of token i after the final norm
    P   prompts in a batch                     u_i      x_i / |x_i|
    G   completions of each prompt             theta_ij angle between x_i and x_j
    B   rows: P, or P G with completions       C        C_intra + C_inter of a question
    T   tokens of a row                        mu       mean of the Gaussian, a rank in [0, N - 1]
    D   width of the hidden states             A        advantage of a completion

In the code `angle` is C too, a sum of mean cosines: high where the angles are small. The paper's n
is `curriculum_step`, its beta `target`, its mu `curriculum.mean`.

What of GRPO is left out, or chosen, and why:

    - Advantages are z-scores within the group, as in the GRPO paper.
    - The loss is a mean over all completion tokens of the batch. The GRPO paper's is a mean within
      each completion first, which lets the tokens of a long one count less.
    - One gradient step a batch (--updates): the policy that samples is the one that is updated, so
      the ratio is exactly 1, nothing is clipped and `clip_fraction` is 0. The loss is then minus
      the mean advantage of a token (plus the KL term), around 0, and measures no progress; its
      gradient is right.
    - AdamW without weight decay, at a constant rate; the gradient's norm is clipped to 1.
    - Rewards are 1 or 0, for the right number; there is no reward for format or length.
    - No overlong filter, no dynamic sampling, no entropy bonus: they would blur what the choice of
      questions does.
    - One GPU, and sampling by the same weights in the same process. For several GPUs see
      extras/train_trl.py.

Where the paper and the authors' code differ, this file does what the paper says: their code cuts
the cosine matrix at fixed places, which is not C, and lets the Gaussian run past the last rank
(README, "Where this differs from the released code"). The constants of the Gaussian are their
code's; two summaries of the paper give others (README, "The arms")."""

# --- 1. Imports -----------------------------------------------------------------------------------

import argparse
import contextlib
import copy
import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import typing
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import datasets
import filelock
import jinja2
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

# --- 2. Config ------------------------------------------------------------------------------------
TINY_WORLD = "runs/tiny-world"
CURRICULA = ("angle", "angle-unbiased", "length", "shuffled", "reversed", "uniform")
PRESETS = {  # what each changes of the defaults below, which are those of gsm8k
    "gsm8k": {"preset": "gsm8k"},
    "tiny": {
        "preset": "tiny",
        "model": TINY_WORLD,
        "dataset": TINY_WORLD,
        "steps": 30,
        "prompts_per_step": 16,
        "max_new_tokens": 64,
        "micro_batch": 128,
        "lr": 2e-4,
        "kl": 0.0,
        "eval_every": 10,
        "checkpoint_every": 1,
    },
}


def setting(default, description):
    return field(default=default, metadata={"description": description})


@dataclass
class Config:
    """Every setting of a run. `Config(**PRESETS["tiny"])` is what --preset tiny runs."""

    preset: str = setting(
        "gsm8k", "gsm8k or tiny; default: tiny without a GPU, unless --model or --dataset is given"
    )
    model: str = setting("Qwen/Qwen2.5-0.5B-Instruct", "hub name or local folder")
    dataset: str = setting(
        "openai/gsm8k", "a folder with train.jsonl and test.jsonl, or on the hub"
    )
    curriculum: str = setting("angle", "what picks the questions: " + ", ".join(CURRICULA))
    steps: int = setting(200, "batches to train on; 0 scores and ranks only")
    prompts_per_step: int = setting(32, "P, questions in a batch")
    completions_per_prompt: int = setting(8, "G, completions sampled for each question")
    updates: int = setting(1, "gradient steps on each batch")
    max_new_tokens: int = setting(512, "longest completion, in tokens")
    micro_batch: int = setting(8, "completions in a backward pass: changes memory, not results")
    score_batch: int = setting(64, "questions in a scoring pass: changes memory, not results")
    temperature: float = setting(1.0, "of sampling; evaluation is greedy")
    lr: float = setting(1e-6, "learning rate of AdamW, constant")
    clip: float = setting(0.2, "epsilon of the clipped ratio")
    kl: float = setting(0.001, "weight of the KL term; 0 keeps no reference model in memory")
    # If not given, the authors' 1000 and 500 of GSM8K's 7,473 questions, as shares of N.
    sigma: float | None = setting(None, "width of the Gaussian, in ranks; if not given, 0.134 N")
    curriculum_step: float | None = setting(
        None, "n, the unit of the Gaussian's move, in ranks; if not given, 0.067 N"
    )
    target: float = setting(0.5, "beta: accuracy above it speeds the Gaussian up, below it down")
    alpha: float = setting(2.0, "weight of the accuracy in the Gaussian's move")
    gamma: float = setting(2.0, "weight of C in the Gaussian's move")
    seed: int = setting(0, "of the draws and the sampling")
    device: str = setting("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps")
    eval_every: int = setting(50, "steps between evaluations")
    eval_examples: int = setting(512, "test questions in an evaluation: the first ones")
    checkpoint_every: int = setting(10, "steps between checkpoints")
    run_dir: str | None = setting(None, "for its files; if not given, runs/PRESET-CURRICULUM-SEED")
    resume: str | None = setting(None, "a run directory to continue, with its own settings")

    def __post_init__(self):
        if self.resume:
            self.run_dir = self.resume
        elif not self.run_dir:
            self.run_dir = f"runs/{self.preset}-{self.curriculum}-{self.seed}"


def check(config):
    """Raise ValueError for the first invalid setting, and name its flag."""

    def positive(value):
        return 0 < value < math.inf

    def positive_or_none(value):
        return value is None or positive(value)

    rules = [
        ("preset", config.preset in PRESETS, "one of " + ", ".join(PRESETS)),
        ("curriculum", config.curriculum in CURRICULA, "one of " + ", ".join(CURRICULA)),
        ("steps", config.steps >= 0, "0 or more"),
        ("prompts_per_step", config.prompts_per_step >= 1, "1 or more"),
        ("completions_per_prompt", config.completions_per_prompt >= 2, "2 or more, to compare"),
        ("updates", config.updates >= 1, "1 or more"),
        ("max_new_tokens", config.max_new_tokens >= 1, "1 or more"),
        ("micro_batch", config.micro_batch >= 1, "1 or more"),
        ("score_batch", config.score_batch >= 1, "1 or more"),
        ("temperature", positive(config.temperature), "above 0"),
        ("lr", positive(config.lr), "above 0"),
        ("clip", positive(config.clip), "above 0"),
        ("kl", 0 <= config.kl < math.inf, "0 or more"),
        ("sigma", positive_or_none(config.sigma), "above 0"),
        ("curriculum_step", positive_or_none(config.curriculum_step), "above 0"),
        ("target", 0 <= config.target <= 1, "between 0 and 1"),
        ("alpha", 0 <= config.alpha < math.inf, "0 or more"),
        ("gamma", 0 <= config.gamma < math.inf, "0 or more"),
        ("seed", config.seed >= 0, "0 or more"),
        ("eval_every", config.eval_every >= 1, "1 or more"),
        ("eval_examples", config.eval_examples >= 1, "1 or more"),
        ("checkpoint_every", config.checkpoint_every >= 1, "1 or more"),
    ]
    for name, holds, wanted in rules:
        if not holds:
            raise ValueError(f"{flag(name)} {getattr(config, name)}: must be {wanted}")
    if config.model == TINY_WORLD and config.dataset != TINY_WORLD:
        raise ValueError(
            "--dataset without --model: the tiny world's model knows only the words of its own data"
        )
    try:
        torch.zeros(1, device=config.device).item()
    except Exception as error:  # another one for each kind of device
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {config.device}: torch cannot use it ({reason})") from error


def flag(name):
    return "--" + name.replace("_", "-")


# --- 3. The signal: angle concentration (paper, section 3) ----------------------------------------
# To copy this section, take along:
#     import copy, inspect, os
#     from collections import namedtuple
#     import torch
#     import torch.nn.functional as F
#     from tqdm import tqdm
#
# For a linear layer Y = X W with token rows x_i and upstream gradients g_i,
#     |dL/dW|_F^2 = sum_ij (x_i . x_j)(g_i . g_j),   x_i . x_j = |x_i| |x_j| cos(theta_ij).
# The cosines are the part that a forward pass gives before there is any loss: token vectors that
# point one way allow a large gradient. The paper measures them once, after the final norm, to stand
# for all layers. That they predict gradients is its claim, which does not follow from the identity;
# extras/STUDY.md tests it.

# One prompt: ids[:start] is the prefix (system prompt and example), ids[start:end] the question,
# and ids[end:] closes the user's turn. The prefix is the same text for all questions, but a token
# that spans its end and the question's beginning counts as question: so `start` may differ by one.
Prompt = namedtuple("Prompt", "ids start end")
Scores = namedtuple("Scores", "intra inter angle tokens")


def angle_concentration(hidden, prefix_mask, question_mask, include_self=True):
    """C_intra and C_inter of the paper (section 3): two float32 tensors (B,), within [-1, 1].

        C_intra = mean of cos(theta_ij) over i, j in the question
        C_inter = mean of cos(theta_ij) over i in the question, j in the prefix

    hidden: (B, T, D), any float dtype. Masks: (B, T), bool or 0/1 of any dtype, disjoint; padding,
    on either side, is in neither. A zero vector has cosine 0 with all. Without prefix C_inter is 0.
    include_self=False leaves out the i = j pairs, whose cosine is 1. In a question of k tokens
    whose other pairs have the mean c, the i = j pairs raise C_intra by (1 - c)/k, which favours
    short questions. Without them a question of one token has C_intra 0.
    ValueError names a row without a question token."""
    prefix_mask, question_mask = prefix_mask.bool(), question_mask.bool()
    empty_rows = (~question_mask.any(1)).nonzero()
    if len(empty_rows):
        raise ValueError(f"row {empty_rows[0].item()} has no question token")
    u = F.normalize(hidden.float(), dim=-1)  # in float32: sums in bfloat16 change ranks
    # Fill rather than multiply: padding may hold NaN.
    u_prefix = u.masked_fill(~prefix_mask[..., None], 0)
    u_question = u.masked_fill(~question_mask[..., None], 0)
    n_prefix = prefix_mask.sum(1)
    n_question = question_mask.sum(1)
    # sum_ij cos(theta_ij) = |sum_i u_i|^2: O(T D), where a T x T matrix takes O(T^2 D).
    prefix_sum = u_prefix.sum(1)
    question_sum = u_question.sum(1)
    intra = question_sum.square().sum(1)
    n_pairs = n_question * n_question
    if not include_self:
        intra = intra - u_question.square().sum((1, 2))
        n_pairs = n_question * (n_question - 1)
    intra = torch.where(n_pairs > 0, intra / n_pairs, 0.0)
    inter = (question_sum * prefix_sum).sum(1) / (n_question * n_prefix).clamp(min=1)
    return intra.clamp(-1, 1), inter.clamp(-1, 1)


def run_body(model, ids, attention_mask=None, position_ids=None, cache=None):
    """The hidden states after the final norm, (B, T, D), which enter `lm_head`, and the cache of
    keys and values that now holds these tokens too.

    The body is the model without its head. It is called by keyword, because the order of the
    arguments differs between models. ids: (B, T); attention_mask: (B, cached tokens + T), True for
    tokens that may be seen; or, ready to be added to the attention scores, (B, 1, T, cached tokens
    + T) of 0 for those and a very negative number for the others."""
    body = model.base_model
    # transformers 5.24 renamed the argument, and the output's field with it, model by model.
    renamed = "cache" in inspect.signature(body.forward).parameters
    cache_name = "cache" if renamed else "past_key_values"
    output = body(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        **{cache_name: cache},
    )
    return output.last_hidden_state, output[cache_name]


def mixed_precision(device):
    """A context in which a GPU multiplies matrices in bfloat16, if its hardware can; the weights
    stay float32, because bfloat16 would round away updates of 1e-6. Keep it around whole passes
    (weights are cast once in it) and never around an optimizer step (casts would be stale)."""
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def score_prompts(model, prompts, batch_size=64, include_self=True):
    """Scores of N Prompts: C_intra, C_inter, angle (their sum C) and tokens (the question's
    length), each (N,) on the CPU. Unweighted sum: paper, section 3.

    One forward pass of the body up to the question's last token: later tokens cannot change its
    states. The tokens that all prompts begin with are run once, and their cache is copied. Prompts
    whose questions end at one place share a batch, so nothing is padded. ValueError names, by its
    place in `prompts`, a question whose score is not finite; and is raised for prompts that do not
    begin with the same token."""
    device = model.device
    n_prompts = len(prompts)
    intra, inter = torch.zeros(n_prompts), torch.zeros(n_prompts)
    prefixes = [prompt.ids[: prompt.start] for prompt in prompts]
    shared_ids = os.path.commonprefix(prefixes)  # of any sequences, not only of paths
    if not shared_ids:
        raise ValueError("the prompts share no token to begin with")
    rows_by_end = {}
    for row, prompt in enumerate(prompts):
        rows_by_end.setdefault(prompt.end, []).append(row)

    with mixed_precision(device):
        shared_hidden, shared_cache = run_body(model, torch.tensor([shared_ids], device=device))
        for end in tqdm(sorted(rows_by_end), desc="scoring", unit="length", leave=False):
            for rows in torch.tensor(rows_by_end[end]).split(batch_size):
                batch = [prompts[row] for row in rows.tolist()]
                ids = [prompt.ids[len(shared_ids) : end] for prompt in batch]
                cache = copy.deepcopy(shared_cache)
                cache.batch_repeat_interleave(len(batch))
                hidden, _ = run_body(model, torch.tensor(ids, device=device), cache=cache)
                hidden = torch.cat([shared_hidden.expand(len(batch), -1, -1), hidden], dim=1)
                starts = torch.tensor([prompt.start for prompt in batch], device=device)
                prefix_mask = torch.arange(end, device=device) < starts[:, None]
                # Nothing is padded, and all rows end with their question: the rest is question.
                batch_intra, batch_inter = angle_concentration(
                    hidden, prefix_mask, ~prefix_mask, include_self
                )
                intra[rows] = batch_intra.cpu()
                inter[rows] = batch_inter.cpu()

    not_finite = (~torch.isfinite(intra + inter)).nonzero()
    if len(not_finite):
        raise ValueError(f"the score of question {not_finite[0].item()} is not finite")
    tokens = torch.tensor([prompt.end - prompt.start for prompt in prompts])
    return Scores(intra, inter, intra + inter, tokens)


def spearman(x, y):
    """Spearman's rank correlation of two (N,) tensors, where ties share their mean rank; 0 if x or
    y is constant."""
    ranks = []
    for values in (x, y):
        in_order = values.msort()
        n_below = torch.searchsorted(in_order, values)
        n_below_or_equal = torch.searchsorted(in_order, values, right=True)
        ranks.append((n_below + n_below_or_equal).double())  # twice the mean rank, less 1
    return torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num().item()


# --- 4. The curriculum (paper, section 4) ---------------------------------------------------------
# To copy this section, take along:
#     import math
#     import torch


class GaussianCurriculum(torch.utils.data.Sampler):
    """Batches of indices into `scores`, from a Gaussian that moves down their order.

    scores: (N,); `.order` has the highest first, ties by index. step (the paper's n, the unit of
    its moves) and sigma are in ranks. None is 500/7473 and 1000/7473 of N, the constants of the
    authors' code for GSM8K. They are fast: mu reaches the last rank in some 25 batches, and the
    rest of a run draws from the lowest C. Two summaries of the paper give half the batch as n and
    0.5 as gamma, with which mu takes hundreds of batches: README, "The arms". sigma = inf draws
    uniformly. target is the paper's beta. Iterating yields batches without end: a `batch_sampler`.
    ValueError for N < batch_size, for a score that is not finite, and for a step or sigma that is
    not above 0."""

    def __init__(
        self,
        scores,
        batch_size,
        *,
        step=None,
        sigma=None,
        target=0.5,
        alpha=2.0,
        gamma=2.0,
        seed=0,
    ):
        scores = torch.as_tensor(scores)
        not_finite = (~torch.isfinite(scores)).nonzero()
        if len(not_finite):
            raise ValueError(f"score {not_finite[0].item()} is not finite")
        if not 1 <= batch_size <= len(scores):
            n_questions = f"{len(scores)} questions"
            raise ValueError(f"no batch of {batch_size} from {n_questions}: see --prompts-per-step")
        self.order = scores.argsort(descending=True, stable=True)
        self.batch_size = batch_size
        self.mean = 0.0
        self.step = 500 / 7473 * len(scores) if step is None else step
        self.sigma = 1000 / 7473 * len(scores) if sigma is None else sigma
        if not (self.step > 0 and self.sigma > 0):
            raise ValueError(f"step {self.step} and sigma {self.sigma} must be above 0")
        self.target, self.alpha, self.gamma = target, alpha, gamma
        self.generator = torch.Generator().manual_seed(seed)

    def log_density(self):
        rank = torch.arange(len(self.order), dtype=torch.float64)
        return -0.5 * ((rank - self.mean) / self.sigma) ** 2

    def probabilities(self):
        """(N,) float64 over ranks, to inspect or plot; sums to 1 even where every density rounds to
        0. sample() itself works on the logarithms."""
        return self.log_density().softmax(0)

    def sample(self):
        """batch_size distinct indices. Gumbel top-k: the largest of log p + Gumbel noise are a draw
        without replacement, and logarithms cannot underflow however far away the mean is."""
        exponential = torch.empty(len(self.order), dtype=torch.float64)
        exponential.exponential_(generator=self.generator)
        gumbel = -exponential.log()
        ranks = (self.log_density() + gumbel).topk(self.batch_size).indices
        return self.order[ranks].tolist()

    def __iter__(self):
        while True:
            yield self.sample()

    def update(self, accuracy, angle):
        """Move the mean by the accuracy (0 to 1) and the mean C of the batch just trained on:

            mu <- min(N - 1, mu + n max(0, S(alpha (accuracy - beta)) + S(gamma C)))

        with S(z) = 2 sigmoid(2z) - 1 = tanh(z). The max is from the authors' code: the mean never
        moves backwards. The min is ours: it stops at the last rank. Returns the mean. ValueError
        for NaN, and for an accuracy outside [0, 1]."""
        if not (0 <= accuracy <= 1 and math.isfinite(angle)):
            raise ValueError(f"accuracy {accuracy} must be in [0, 1] and angle {angle} finite")
        move = math.tanh(self.alpha * (accuracy - self.target)) + math.tanh(self.gamma * angle)
        self.mean = min(self.mean + self.step * max(move, 0.0), len(self.order) - 1.0)
        return self.mean

    def state_dict(self):
        return {"mean": self.mean, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.mean = state["mean"]
        self.generator.set_state(state["generator"])


def make_curriculum(config, scores):
    """The GaussianCurriculum of a run. The values of --curriculum, the arms of a comparison, differ
    in what is sorted. `uniform` has an infinitely wide Gaussian. `angle-unbiased` sorts as `angle`
    does: its scores were computed without the i = j pairs."""
    random_order = torch.randperm(
        len(scores.angle), generator=torch.Generator().manual_seed(config.seed)
    )
    sort_by = {
        "angle": scores.angle,
        "angle-unbiased": scores.angle,
        "length": -scores.tokens,  # short questions first
        "shuffled": random_order,
        "reversed": -scores.angle,
        "uniform": scores.angle,
    }
    return GaussianCurriculum(
        sort_by[config.curriculum],
        config.prompts_per_step,
        step=config.curriculum_step,
        sigma=math.inf if config.curriculum == "uniform" else config.sigma,
        target=config.target,
        alpha=config.alpha,
        gamma=config.gamma,
        seed=config.seed,
    )


# --- 5. The task: prompts, answers, reward --------------------------------------------------------
# To copy this section, take along:
#     import re
#     from collections import namedtuple
#     import jinja2
#     Prompt = namedtuple("Prompt", "ids start end")   # section 3 says what they are
SYSTEM_PROMPT = "Solve the problem step by step. Write the final number as \\boxed{number}."
EXAMPLE_QUESTION = "What is 2+2?"
EXAMPLE_ANSWER = "2 + 2 = 4. The answer is \\boxed{4}."
PLACEHOLDER = "\ue000"  # a private-use character: in no template and no question


def build_messages(question):
    """The chat of one question: system prompt and one-shot example (the prefix), then itself."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": EXAMPLE_QUESTION},
        {"role": "assistant", "content": EXAMPLE_ANSWER},
        {"role": "user", "content": question},
    ]


def render_chat(tokenizer, question):
    """The chat of one question by the tokenizer's template, up to where the completion begins.

    A template that refuses or drops the system role gets its text in the first user turn. Thinking
    is off (templates without such a switch ignore it): the completion is to be the answer.
    ValueError, with the template's own error, if that fails too."""
    system, first_turn, *other_turns = build_messages(question)
    merged_turn = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{first_turn['content']}"}
    for chat in ([system, first_turn, *other_turns], [merged_turn, *other_turns]):
        reason = "it loses the system prompt"
        try:
            text = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = repr(error)
            continue
        if SYSTEM_PROMPT in text:
            return text
    raise ValueError(f"the chat template of {tokenizer.name_or_path} cannot be used: {reason}")


def render_template(tokenizer):
    """The texts before and after a question, (head, tail), by the tokenizer's chat template.
    ValueError for a tokenizer without template or offsets, and for a template that fails."""
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} has no character offsets")
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {name} has no chat template: use an instruct model")
    text = render_chat(tokenizer, PLACEHOLDER)
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(f"the chat template of {name} loses the question or repeats it")
    head, tail = text.split(PLACEHOLDER)
    return head, tail


def encode_prompts(tokenizer, questions, template=None):
    """The Prompt of each question (strings).

    template: the (head, tail) that a resumed run has kept, because a template may write today's
    date. If None it is rendered now; ValueError then names a question that the template
    rewrites."""
    questions = [question.strip() for question in questions]
    head, tail = template or render_template(tokenizer)
    # Joined here, so that it is known where a question's characters are.
    texts = [head + question + tail for question in questions]
    if template is None:
        for question, text in zip(questions, texts):
            if render_chat(tokenizer, question) != text:
                name = tokenizer.name_or_path
                raise ValueError(
                    f"the chat template of {name} rewrites the question {question!r:.99}"
                )
    encoding = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    prompts = []
    for text, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"]):
        start, end = question_span(offsets, len(head), len(text) - len(tail))
        prompts.append(Prompt(ids, start, end))
    return prompts


def question_span(offsets, begin, end):
    """(first, last + 1) of the tokens that touch characters [begin, end); ValueError if none.
    offsets: the (begin, end) characters of each token."""
    touching = [
        token
        for token, (token_begin, token_end) in enumerate(offsets)
        if token_begin < end and token_end > begin
    ]
    if not touching:
        raise ValueError("the tokenizer makes no token of the question")
    return touching[0], touching[-1] + 1


def end_of_turn(tokenizer):
    """The token with which the chat template ends an assistant's turn: the first special token
    after the answer of the rendered example. None if there is none."""
    if not tokenizer.chat_template:
        return None
    head, _ = render_template(tokenizer)
    _, answer, after_answer = head.rpartition(EXAMPLE_ANSWER)
    if answer:
        for token in tokenizer(after_answer, add_special_tokens=False)["input_ids"]:
            if token in tokenizer.added_tokens_decoder:
                return token
    return None


# Read as numbers in a box: $1,000  1{,}000  \textbf{1000}  x = 1000 apples  -\$5  negative 5  50\%
# No answers, for there is more than one number to them: 1/2  3 million  2, 5  5!  2^5  \pm 5
# A line `#### 1,000` is read in the same way, but may have no words: it may be a heading.
BRACED = r"[^{}]*"  # a text without braces; after the loop, one with balanced braces, to depth 8
for _ in range(8):
    BRACED = rf"[^{{}}]*(?:\{{{BRACED}\}}[^{{}}]*)*"
BOX = re.compile(rf"\\boxed\s*(\{{{BRACED}\}}|[^\s{{}}\\][^\n{{}}\\]*|)")  # {42}, 42 or unclosed
LINE = re.compile(r"####[\s*]*([^\s*#A-Za-z].*)")  # not "#### Step 2"
# Typeset text shows no font commands and no braces, except \{ and \}: \textbf{1{,}000} reads 1,000.
FONT = r"boxed|[fm]box|emph|underline|boldsymbol|bm|bf|rm|displaystyle|(?:text|math)(?:[a-z]{2})?"
# Hidden are fonts, colours, braces that group, and \!, a space of negative width.
BRACE = r"(?<!\\)[{}]"  # {5} groups, \{5\} is shown
BRACE_IN_NEW_LINE = r"(?<=(?<!\\)\\\\)[{}]"  # \\{5}: two backslashes are a line break
HIDDEN = re.compile(
    rf"\\({FONT})(?![a-z])|\\(text)?color\{{[a-z]+\}}|{BRACE}|{BRACE_IN_NEW_LINE}|\\!"
)
# A GAP may stand between sign, number and unit, but not inside the number: 5(6) is not 56. Its last
# two symbols are end tokens that a model has spelled out as ordinary text.
SYMBOL = r"""(?:\\|\\left|\\right)?[$¢£¥\u20a0-\u20bf%°()\[\]"'`“”‘’]|\*\*|<\|\w+\|>|</s>"""
GAP = rf"(?:\s|~|\\[ ,:;]|\\\\(?![A-Za-z])|\^?\\(?:circ|degree|pounds|euro|q?quad)|{SYMBOL})*"
COMMA = r",(?:\\,)?|\\[ ,:;]|[ ~'’\uff0c\u00a0\u2009\u202f]"  # \u: a wide comma, narrow spaces
GROUPED = rf"[1-9][0-9]{{0,2}}(?P<comma>{COMMA})[0-9]{{3}}(?:(?P=comma)[0-9]{{3}})*"
NUMBER = rf"(?=\.?[0-9])(?P<number>(?:{GROUPED}|[0-9]*)(?:\.[0-9]+)?)"
MINUS = r"(?P<minus>[-\u2010-\u2013\u2212\uff0d]|(?i:minus|negative))"  # a dash may be a minus
SIGNED = rf"(?:(?:[A-Za-z]+{GAP})?={GAP})?(?:(?:\+|{MINUS}){GAP})?{NUMBER}"  # "x = -5", too
# A word is a unit, unless it changes the number, or is so short that it may be a factor: 5xy, 5k.
# Short units are those of SHORT, and letters alone only behind a space: 5 m, but not 5m.
# STEM: with any ending, as in twentieth, halves, billions. The others only as whole words: ten is
# also how tents begin. Up to twelve words may follow the number; more are a sentence.
COUNT = "two|three|four|fort|fi[fv]|six|seven|eigh|nin|tenth|elev|twe[ln]|thir"
SCALE = "hundred|thou|[a-z]*illion|dozen|lakh|crore|hal[fv]|quarter|recur|repeat"
STEM = f"(?:{COUNT}|{SCALE})[a-z]*"
WHOLE = "one|ten|mil|[mb]ln|grand|score|gross"
OPERATION = "and|plus|minus|negative|over|below|point|squared|cubed|factorial"
SHORT = "cm|mm|km|kg|mg|m[lL]|ft|in|yd|mi|lb|oz|hr|[aApP][mM]|sq|of|(?<![0-9])[mghsLCF]"
UNIT = rf"/?(?!(?i:{STEM}|{WHOLE}|{OPERATION})\b)(?:[A-Za-z]{{3,}}|{SHORT})(?![A-Za-z])\.?"
ANSWER = re.compile(rf"{GAP}{SIGNED}{GAP}(?P<unit>(?:{UNIT}{GAP}){{0,12}})(?:[.,;:]{GAP})?")


def extract_answer(text):
    """The number in the last `\\boxed{}` or, in a text without one, in the last line `#### number`:
    "1000" for "1,000", "$1000" or "1000.00". None if anything in there is not understood."""
    pattern = BOX if "\\boxed" in text else LINE
    found = pattern.findall(text)
    content = HIDDEN.sub("", found[-1] if found else "")  # an unclosed box is found as ""
    answer = ANSWER.fullmatch(content)
    balanced = all(content.count(a) == content.count(b) for a, b in ("()", "[]"))
    if answer is None or not balanced or (answer["unit"] and pattern is LINE):
        return None  # with a unit, the line may be a heading: #### 2 apples
    whole, _, fraction = re.sub("[^0-9.]", "", answer["number"]).partition(".")
    number = (whole.lstrip("0") or "0") + f".{fraction}".rstrip("0").rstrip(".")
    return "-" + number if answer["minus"] and number != "0" else number


def reward(completion, gold):
    """1.0 if the completion's answer is the gold one (the data set's `answer` field), else 0.0."""
    answer = extract_answer(completion)
    return float(answer is not None and answer == extract_answer(gold))


# --- 6. GRPO: completions, log-probabilities, advantages, loss ------------------------------------
# To copy this section, take along:
#     import inspect
#     import math
#     from collections import namedtuple
#     import torch
#     import torch.nn.functional as F
#     from transformers.cache_utils import DynamicLayer
#     from gainrl import angle_concentration, mixed_precision, run_body   # section 3
#     from gainrl import end_of_turn                                      # section 5
#     torch.backends.cuda.enable_cudnn_sdp(False)                         # load_model says why
LOGIT_CHUNK = 512  # tokens whose logits are in memory at once
LOOK_EVERY = 16  # steps between two looks at whether all completions have ended

# G completions of each of P prompts, B = P G rows; those of a prompt stand next to each other.
#     ids, attention_mask    (B, T): the padded prompts, and then the completions
#     completion_mask        (B, completion length): True up to the end token, which is included
#     texts                  B strings
#     angle                  the mean C of the P prompts, a float; None if not asked for
Rollout = namedtuple("Rollout", "ids attention_mask completion_mask texts angle")


def left_pad(prompts):
    """P Prompts as one batch whose rows end together: ids, attention_mask, prefix_mask and
    question_mask, each (P, T) on the CPU; the masks are bool."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention_mask = torch.zeros(ids.shape, dtype=torch.bool)
    prefix_mask = torch.zeros(ids.shape, dtype=torch.bool)
    question_mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        first = longest - len(prompt.ids)
        ids[row, first:] = torch.tensor(prompt.ids)
        attention_mask[row, first:] = True
        prefix_mask[row, first : first + prompt.start] = True
        question_mask[row, first + prompt.start : first + prompt.end] = True
    return ids, attention_mask, prefix_mask, question_mask


def end_tokens(model, tokenizer):
    """The tokens that end a completion, (E,) on the model's device: those of the generation config,
    the tokenizer's, and the one with which the chat template ends a turn, which a base model's
    generation config does not know. ValueError if there is none."""
    of_generation = model.generation_config.eos_token_id  # an id, a list or None
    ends = of_generation if isinstance(of_generation, list) else [of_generation]
    ends = {*ends, tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}
    if not ends:
        raise ValueError(f"{model.name_or_path} has no end token: completions would never end")
    return torch.tensor(sorted(ends), device=model.device)


def choose_token(logits, temperature, generator, rows, n_rows):
    """The next token of each row, (B, 1): the likeliest, or a draw if there is a generator.

    The draw is argmax of p / Exponential(1): torch.multinomial draws so too, but first checks p,
    and the host would wait for the GPU's answer. The exponentials are drawn for all n_rows rows of
    the batch, and those of `rows` are used: so leaving rows out changes no other draw."""
    if generator is None:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits.float() / temperature).softmax(-1)
    exponentials = torch.empty(n_rows, logits.shape[-1], device=logits.device)
    exponentials.exponential_(generator=generator)
    return (probabilities / exponentials[rows]).argmax(-1, keepdim=True)


@torch.no_grad()
def generate(model, tokenizer, prompts, config, group_size=1, generator=None, include_self=True):
    """A Rollout: `group_size` completions of each of P Prompts at config.temperature, drawn from
    `generator`; or, without one, the greedy completion, with angle None: only training needs it.

    Each prompt runs once, and its keys and values are repeated. Of the model's generation_config
    only the end tokens count: top_k, top_p or a penalty would make the log-probs of the samples
    wrong. FloatingPointError if the hidden states are not finite."""
    padded = [tensor.to(model.device) for tensor in left_pad(prompts)]
    ids, attention_mask, prefix_mask, question_mask = padded
    prompt_length = ids.shape[1]
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)  # padding does not count
    angle = None
    with mixed_precision(model.device):
        hidden, cache = run_body(model, ids, attention_mask, position_ids)
        if not hidden[:, -1].isfinite().all():
            raise FloatingPointError("the model's hidden states are not finite")
        if generator is not None:
            intra, inter = angle_concentration(hidden, prefix_mask, question_mask, include_self)
            angle = (intra + inter).mean().item()

        cache.batch_repeat_interleave(group_size)
        hidden = hidden[:, -1].repeat_interleave(group_size, dim=0)
        # With room for the completions, which the loops below write in place.
        ids = F.pad(ids, (0, config.max_new_tokens)).repeat_interleave(group_size, dim=0)
        attention_mask = F.pad(attention_mask, (0, config.max_new_tokens))
        attention_mask = attention_mask.repeat_interleave(group_size, dim=0)
        on_gpu = model.device.type == "cuda"
        decode = decode_in_place if on_gpu and fits_in_place(model, cache) else decode_growing
        ends = end_tokens(model, tokenizer)
        decode(model, cache, hidden, ids, attention_mask, ends, config, generator)

    used = attention_mask.any(0)  # columns; all of them, if a completion has max_new_tokens
    ids, attention_mask = ids[:, used], attention_mask[:, used]
    completion_ids, completion_mask = ids[:, prompt_length:], attention_mask[:, prompt_length:]
    completions = [row[mask].tolist() for row, mask in zip(completion_ids, completion_mask)]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollout(ids, attention_mask, completion_mask, texts, angle)


def decode_growing(model, cache, hidden, ids, attention_mask, ends, config, generator):
    """Complete the rows: write up to max_new_tokens tokens to the last columns of ids, and set
    attention_mask True there; both (B, T). hidden: (B, D), the prompts' last states.

    The cache grows by a token a step. Once half of the rows in the batch have ended, these leave
    it."""
    lm_head = model.get_output_embeddings()
    n_rows, length = ids.shape
    rows = torch.arange(n_rows, device=ids.device)  # those still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)  # those of them that have not ended
    for column in range(length - config.max_new_tokens, length):
        token = choose_token(lm_head(hidden), config.temperature, generator, rows, n_rows)
        ids[rows, column] = token.squeeze(1)
        attention_mask[rows, column] = alive
        alive = alive & (token != ends).all(1)
        n_alive = alive.sum()
        if n_alive == 0 or column == length - 1:
            break
        if n_alive <= len(rows) / 2:
            kept = alive.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, alive, token = rows[kept], alive[kept], token[kept]
        seen = attention_mask[rows, : column + 1]
        position_ids = seen.sum(1, keepdim=True) - 1
        hidden, cache = run_body(model, token, seen, position_ids, cache)
        hidden = hidden[:, -1]


def fits_in_place(model, cache):
    """Whether decode_in_place can run the model: it takes positions rather than count them, its
    forward pass never makes the host wait for the GPU (a CUDA graph cannot record that), and its
    cache keeps all tokens."""
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    never_waits = model._can_compile_fullgraph  # as transformers says
    # Layers with a sliding window, and those without attention, are of other types.
    keeps_all = all(type(layer) is DynamicLayer for layer in cache.layers)
    return takes_positions and never_waits and keeps_all


class InPlaceLayer(DynamicLayer):
    """A layer of a cache with room for `room` tokens more. The keys and values of each next token
    are written in place. Where, says `column`: a tensor (1,), an index, which all layers share."""

    def __init__(self, layer, room, column):
        super().__init__()
        # With autocast, the rotary embedding makes keys float32, and each product would round them
        # again to the dtype of the values. They are rounded once, here.
        self.keys = F.pad(layer.keys.to(layer.values.dtype), (0, 0, 0, room))
        self.values = F.pad(layer.values, (0, 0, 0, room))
        self.column = column
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        self.keys.index_copy_(2, self.column, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, values.to(self.values.dtype))
        return self.keys, self.values


def make_room(cache, attention_mask, room):
    """Give a cache of the tokens in attention_mask, (B, T), room for `room` tokens more.

    Returns two tensors, to be changed in place before each token: `column` (1,), where its keys and
    values go; and `bias` (B, 1, 1, T + room), which attention adds to its q k: 0 for what it sees,
    the least number for padding and for columns that are still empty."""
    column = torch.tensor([attention_mask.shape[1]], device=attention_mask.device)
    cache.layers = [InPlaceLayer(layer, room, column) for layer in cache.layers]
    dtype = cache.layers[0].values.dtype
    least = torch.finfo(dtype).min
    bias = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    bias = F.pad(bias.masked_fill(~attention_mask, least), (0, room), value=least)
    return column, bias[:, None, None]  # a mask of four dimensions goes to attention as it is


def decode_in_place(model, cache, hidden, ids, attention_mask, ends, config, generator):
    """What decode_growing does, by steps that a GPU can replay as one graph.

    Launching the thousand kernels of a step takes the host longer than the GPU needs to run them.
    A CUDA graph is a recording of a step, launched at once; but it repeats the very same kernels
    on the very same memory. So nothing here changes its shape or place, what changes from step to
    step is in tensors, and the host looks at none of them but every LOOK_EVERY steps. Rows that
    have ended stay in the batch; what they write, attention_mask leaves out."""
    lm_head = model.get_output_embeddings()
    n_rows, length = ids.shape
    spare = -length % 16  # attention kernels want a cache whose length is a multiple of 16
    room = config.max_new_tokens + spare
    column, bias = make_room(cache, attention_mask[:, : length - config.max_new_tokens], room)
    position_ids = attention_mask.sum(1, keepdim=True) - 1
    token = torch.empty_like(position_ids)
    alive = torch.ones_like(token, dtype=torch.bool)

    def write_token(hidden):
        logits = lm_head(hidden)
        token.copy_(choose_token(logits, config.temperature, generator, slice(None), n_rows))
        ids.index_copy_(1, column, token)
        attention_mask.index_copy_(1, column, alive)
        alive.logical_and_((token != ends).all(1, keepdim=True))

    def step():
        bias.index_fill_(3, column, 0.0)
        position_ids.add_(1)
        hidden, _ = run_body(model, token, bias, position_ids, cache)
        column.add_(1)
        write_token(hidden[:, -1])

    write_token(hidden)
    for n_tokens in range(1, config.max_new_tokens):
        if n_tokens % LOOK_EVERY == 0 and not alive.any():
            break
        # Step 1 was a warm-up for what is set up only once. (A CPU, where only tests run this
        # function, has no graphs.)
        if n_tokens == 2 and ids.is_cuda:
            step = record(step, generator)
        step()


def record(step, generator):
    """A function that does what step() does, by replaying a CUDA graph of it."""
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()  # recorded, not run
    return graph.replay


def completion_logprobs(
    model, ids, attention_mask, completion_length, temperature, prompt_index=None
):
    """log pi of the last `completion_length` tokens of each row under the temperature that sampled
    them: float32 (B, completion_length), with 0 where attention_mask is 0.

    ids, attention_mask: (B, T). prompt_index: (B,), the same number for neighbours with the same
    prompt, whose keys and values are computed once, with their gradient; None if no rows share one.
    The logits of LOGIT_CHUNK tokens are made at a time, and once more in the backward pass: all of
    them, (B, T, vocabulary), take gigabytes."""
    lm_head = model.get_output_embeddings()
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    prompt_length = ids.shape[1] - completion_length
    completion_mask = attention_mask[:, prompt_length:].bool()
    if prompt_index is None:
        prompt_index = torch.arange(len(ids), device=ids.device)
    _, n_sharing = prompt_index.unique_consecutive(return_counts=True)
    prompt_rows = n_sharing.cumsum(0) - n_sharing  # the first row of each prompt

    def token_logprobs(hidden, targets):
        logits = lm_head(hidden).float() / temperature
        return -F.cross_entropy(logits, targets, reduction="none")

    with mixed_precision(model.device):
        prompt_hidden, cache = run_body(
            model,
            ids[prompt_rows, :prompt_length],
            attention_mask[prompt_rows, :prompt_length],
            position_ids[prompt_rows, :prompt_length],
        )
        cache.batch_repeat_interleave(n_sharing)  # a number for each prompt
        completion_hidden, _ = run_body(
            model, ids[:, prompt_length:], attention_mask, position_ids[:, prompt_length:], cache
        )
        # A token is predicted by the state before it: the first one by the prompt's last state.
        last_of_prompt = prompt_hidden[:, -1:].repeat_interleave(n_sharing, dim=0)
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


def group_advantages(rewards):
    """z-scores within each group, (P, G) to (P, G); exactly 0 where all rewards of a group are
    equal: such a group teaches nothing. ValueError for groups of one."""
    if rewards.shape[1] < 2:
        raise ValueError("a group of one has no advantage: G must be 2 or more")
    mean = rewards.float().mean(1, keepdim=True)
    std = rewards.float().std(1, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(flat, 0.0, (rewards - mean) / std)


def grpo_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, reference_logprobs=None, kl=0.0):
    """Clipped policy loss with an optional KL penalty: (loss, stats).

        loss = mean over the mask of -min(r A, clamp(r, 1 - clip, 1 + clip) A) + kl k3
        r = exp(logprobs - old_logprobs),  k3 = exp(d) - d - 1,  d = reference_logprobs - logprobs

    advantages: (B,), the rest (B, completion length); mask: bool or 0/1 of any dtype. What it
    leaves out, even an infinity, changes neither loss nor gradient. k3, the "low-variance"
    estimator of the authors' scripts, is never negative, and over samples of the policy its mean is
    KL(policy || reference). stats: two floats, kl (the mean of k3, before it is weighted) and
    clip_fraction."""
    mask = mask.bool()
    # Masked before exp: the gradient of exp(inf) would be NaN even where a later mask drops it.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)

    def mean(values):
        return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

    ratio = torch.exp(log_ratio)
    advantages = advantages[:, None]
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    loss = mean(-torch.minimum(ratio * advantages, clipped_ratio * advantages))
    was_clipped = ratio * advantages > clipped_ratio * advantages
    stats = {"kl": 0.0, "clip_fraction": mean(was_clipped.float()).item()}
    if reference_logprobs is not None:
        d = torch.where(mask, reference_logprobs - logprobs, 0.0)
        k3 = mean(torch.exp(d) - d - 1)
        loss = loss + kl * k3
        stats["kl"] = k3.item()
    return loss, stats


def trim(rollout, rows):
    """ids, attention_mask and completion_mask of some rows of a Rollout, without the columns that
    are padding in all of these rows."""
    attention_mask = rollout.attention_mask[rows]
    used = attention_mask.any(0)
    prompt_length = rollout.ids.shape[1] - rollout.completion_mask.shape[1]
    completion_mask = rollout.completion_mask[rows][:, used[prompt_length:]]
    return rollout.ids[rows][:, used], attention_mask[:, used], completion_mask


def micro_batch_loss(model, reference, rollout, advantages, rows, old_logprobs, config):
    """grpo_loss of some rows of a Rollout: (loss, stats, old_logprobs). advantages: (P, G), of all
    rows. old_logprobs: those of these rows under the policy that sampled; None while the weights
    are still the ones that sampled: then the pass itself gives them."""
    ids, attention_mask, completion_mask = trim(rollout, rows)
    prompt_index = rows // advantages.shape[1]
    inputs = (ids, attention_mask, completion_mask.shape[1], config.temperature, prompt_index)
    logprobs = completion_logprobs(model, *inputs)
    reference_logprobs = None
    if config.kl:
        with torch.no_grad():
            reference_logprobs = completion_logprobs(reference, *inputs)
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    loss, stats = grpo_loss(
        logprobs,
        old_logprobs,
        advantages.flatten()[rows],
        completion_mask,
        config.clip,
        reference_logprobs,
        config.kl,
    )
    return loss, stats, old_logprobs


def grpo_update(model, reference, optimizer, rollout, advantages, config):
    """config.updates gradient steps on a Rollout; the loss, grad_norm, kl and clip_fraction of the
    last one. advantages: (P, G). reference may be None if config.kl is 0.

    Micro-batches, weighted by their tokens, add up to the gradient of the whole batch. Without kl,
    completions whose advantage is 0 have no gradient, and are left out of the work.
    FloatingPointError, before its step is taken, for a loss or gradient that is not finite."""
    n_tokens = rollout.completion_mask.sum().item()
    advantages = advantages.to(rollout.ids.device)
    worked_rows = torch.arange(advantages.numel(), device=rollout.ids.device)
    if not config.kl:
        worked_rows = worked_rows[advantages.flatten() != 0]
    micro_batches = [rows for rows in worked_rows.split(config.micro_batch) if len(rows)]
    old_logprobs = [None] * len(micro_batches)
    for _ in range(config.updates):
        stats = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0}
        # Zeros, not None: AdamW skips parameters whose grad is None. So a batch in which all
        # advantages are 0 does what it would do if its rows were not left out: a step by AdamW's
        # momentum.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for number, rows in enumerate(micro_batches):
            loss, loss_stats, old_logprobs[number] = micro_batch_loss(
                model, reference, rollout, advantages, rows, old_logprobs[number], config
            )
            share = rollout.completion_mask[rows].sum().item() / n_tokens
            (loss * share).backward()
            stats["loss"] += share * loss.item()
            stats["kl"] += share * loss_stats["kl"]
            stats["clip_fraction"] += share * loss_stats["clip_fraction"]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(grad_norm + stats["loss"]):
            raise FloatingPointError(
                f"loss {stats['loss']}, gradient norm {grad_norm}: --lr is too high"
            )
        optimizer.step()
        optimizer.zero_grad()  # here, to free the gradients' memory before sampling
    stats["grad_norm"] = grad_norm
    return stats


# --- 7. Train and evaluate ------------------------------------------------------------------------


def train(config):
    """Score, rank, train, evaluate; returns what summary.json holds.

    ValueError for bad input, OSError for a failed write, FloatingPointError for a loss that is not
    finite, Stopped after Ctrl-C or SIGTERM."""
    check(config)
    with RunFolder(config) as run:
        model, tokenizer, problems, test_problems = load_task(config, run)
        reference = copy.deepcopy(model) if config.kl else None  # the weights before any step
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
        generator = torch.Generator(model.device).manual_seed(config.seed)
        include_self = config.curriculum != "angle-unbiased"
        G = config.completions_per_prompt

        # Score every question once, in all arms, under the weights that training starts from.
        scores = run.load_scores(len(problems))
        if scores is None:
            prompts = [problem["prompt"] for problem in problems]
            scores = score_prompts(model, prompts, config.score_batch, include_self)
        curriculum = make_curriculum(config, scores)
        step = run.load_checkpoint(model, optimizer, curriculum, generator)
        run.begin(problems, scores, curriculum)  # writes, now that all could be read

        with GracefulStop() as stop, tqdm(total=config.steps, initial=step, unit="step") as bar:
            while step < config.steps and not stop.signum:
                if step % config.eval_every == 0 and not run.evaluated(step):
                    run.record_evaluation(step, evaluate(model, tokenizer, test_problems, config))
                began = time.perf_counter()
                mu = curriculum.mean  # of this batch: update() moves it
                # 1. Draw P questions from the Gaussian over the ranks.
                batch = [problems[index] for index in curriculum.sample()]
                prompts = [problem["prompt"] for problem in batch]
                # 2. Sample G completions of each; the same pass gives C under the current weights.
                rollout = generate(model, tokenizer, prompts, config, G, generator, include_self)
                # 3. Reward each completion, and compare it with its group.
                rewards = reward_rollout(rollout, batch)  # (P, G)
                advantages = group_advantages(rewards)
                # 4. A clipped policy-gradient step.
                stats = grpo_update(model, reference, optimizer, rollout, advantages, config)
                # 5. Move the Gaussian by how well the batch went and how concentrated it was.
                curriculum.update(rewards.mean().item(), rollout.angle)
                step += 1
                run.record_step(step, began, mu, batch, rollout, rewards, stats)
                if step % config.checkpoint_every == 0:
                    run.save_checkpoint(step, model, optimizer, curriculum, generator)
                bar.update()
                bar.set_postfix(accuracy=rewards.mean().item(), mu=mu)

        if step:  # not with --steps 0, which only scores and ranks
            run.save_checkpoint(step, model, optimizer, curriculum, generator)
        if stop.signum:
            raise Stopped(stop.signum)
        if step and not run.evaluated(step):
            run.record_evaluation(step, evaluate(model, tokenizer, test_problems, config))
        return run.finish(step, model, tokenizer)


def reward_rollout(rollout, batch):
    """The rewards (P, G) of a Rollout for its P problems."""
    group_size = len(rollout.texts) // len(batch)
    rewards = [
        reward(text, batch[row // group_size]["answer"]) for row, text in enumerate(rollout.texts)
    ]
    return torch.tensor(rewards).view(len(batch), group_size)


def evaluate(model, tokenizer, problems, config):
    """Greedy accuracy with its 95% interval, and the share of completions that have an answer."""
    batch_size = config.prompts_per_step * config.completions_per_prompt
    texts = []
    for first in tqdm(range(0, len(problems), batch_size), desc="evaluating", leave=False):
        prompts = [problem["prompt"] for problem in problems[first : first + batch_size]]
        texts += generate(model, tokenizer, prompts, config).texts
    correct = sum(reward(text, problem["answer"]) for text, problem in zip(texts, problems))
    answered = sum(extract_answer(text) is not None for text in texts)
    low, high = wilson_interval(correct, len(problems))
    return {
        "eval_accuracy": correct / len(problems),
        "eval_low": low,
        "eval_high": high,
        "eval_format": answered / len(problems),
    }


def wilson_interval(successes, trials, z=1.96):
    """The 95% Wilson interval of a share: sensible near 0 and 1, unlike the normal one."""
    share = successes / trials
    center = share + z**2 / (2 * trials)
    half_width = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max(0.0, (center - half_width) / scale), min(1.0, (center + half_width) / scale)


# --- 8. Plumbing: models, data, files, signals. Nothing of GAIN-RL or GRPO is below ---------------


def load_task(config, run):
    """Model, tokenizer, training and test problems: loaded, and checked before any work is done."""
    print(
        f"preset {config.preset}, curriculum {config.curriculum}, seed {config.seed}, "
        f"on {config.device}"
    )
    if config.preset == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share, and idle threads spin
    if TINY_WORLD in (config.model, config.dataset):
        make_tiny_world(TINY_WORLD)
    model, tokenizer = load_model(config.model, torch.device(config.device))
    longest = context_limit(model) - config.max_new_tokens
    problems = load_problems(tokenizer, config.dataset, "train", longest, run.template)
    test_problems = load_problems(tokenizer, config.dataset, "test", longest, run.template)
    test_problems = test_problems[: config.eval_examples]
    check_model(model, [problem["prompt"] for problem in problems])
    end_tokens(model, tokenizer)  # now, rather than after scoring, if there is none
    run.check_data(problems + test_problems, run.template or render_template(tokenizer))
    return model, tokenizer, problems, test_problems


def load_model(name, device):
    """Model and tokenizer of a hub name or local folder. Weights float32; no dropout. ValueError if
    they cannot be loaded, or if the weights are quantised, which can be neither trained nor
    saved."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        # tokenizer.json as it is: AutoTokenizer swaps in its own splitting rules for some models.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:  # the hub fails in too many ways to list
        hint = "check name and network, name a local folder, or run --preset tiny"
        if Path(name).is_dir():
            hint = f"wanted are config.json, model.safetensors and tokenizer.json, {contents(name)}"
        raise ValueError(f"cannot load --model {name}: {hint} ({error!r:.300})") from error
    if hasattr(model.config, "quantization_config"):
        raise ValueError(f"--model {name} is quantised: take the model that it was made from")
    # cuDNN's attention has NaN gradients for some lengths of masked rows (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return model.to(device).eval(), tokenizer


def context_limit(model):
    """The tokens that prompt and completion may have together.

    Rotary embeddings of the types longrope and dynamic turn all keys differently once a text is
    longer than original_max_position_embeddings; cached keys would be wrong from there on."""
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None) or math.inf]
    # rope_parameters is a dictionary with a rope_type (which transformers fills in); or, in models
    # with several types of layers, it holds one for each type.
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [parameters] if "rope_type" in parameters else parameters.values()
    for rope in per_layer_type:
        if rope["rope_type"] in ("longrope", "dynamic"):
            limits.append(rope["original_max_position_embeddings"])
    return min(limits)


def check_model(model, prompts):
    """ValueError unless this file computes the model's own logits, tried on the first prompt. It
    finds what a list of models would miss: caps and scales behind lm_head, bodies with other
    arguments, caches that cannot be repeated."""
    who = f"--model {model.name_or_path} ({type(model).__name__}) cannot be used"
    try:
        difference = logits_difference(model, prompts[0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kind of model has its own
        raise ValueError(f"{who}: it cannot be run in parts ({error!r:.300})") from error
    if not difference <= 1e-3:
        reason = f"its logits are not lm_head of its last hidden states ({difference:.1%} off)"
        raise ValueError(f"{who}: {reason}")


@torch.no_grad()
def logits_difference(model, prompt):
    """The largest difference between two ways to the logits of a question, as a share of the
    largest logit: the model's own forward pass; and what this file does, lm_head of the body's last
    hidden states, with padding on the left, the prefix cached, its cache repeated, the question run
    on top, and its last token written in place. In float32, even on a GPU."""
    n_samples, n_padding = 2, 3
    ids = torch.tensor([prompt.ids], device=model.device)
    own = model(input_ids=ids).logits[:, prompt.start :].float()

    padded_ids = F.pad(ids, (n_padding, 0)).expand(n_samples, -1)
    mask = F.pad(torch.ones_like(ids), (n_padding, 0)).bool().expand(n_samples, -1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    split = n_padding + prompt.start
    _, cache = run_body(model, padded_ids[:1, :split], mask[:1, :split], position_ids[:1, :split])
    cache.batch_repeat_interleave(n_samples)
    hidden, cache = run_body(model, padded_ids[:, split:], mask, position_ids[:, split:], cache)
    if fits_in_place(model, cache):  # the last token once more, as decode_in_place has it
        cache.crop(-1)
        column, bias = make_room(cache, mask[:, :-1], room=1)
        bias.index_fill_(3, column, 0.0)
        last_hidden, _ = run_body(model, padded_ids[:, -1:], bias, position_ids[:, -1:], cache)
        hidden = torch.cat([hidden[:, :-1], last_hidden], dim=1)
    ours = model.get_output_embeddings()(hidden).float()
    return ((ours - own).abs().max() / own.abs().max()).item()


def load_problems(tokenizer, source, split, longest, template=None):
    """The rows of a split, each with question, answer, its index in the data set and its Prompt;
    without those whose prompt has more than `longest` tokens. ValueError for a bad row, by file and
    line."""
    if Path(source).is_dir():
        path = Path(source, f"{split}.jsonl")
        rows = read_jsonl(path)
    else:
        path = f"{source}, split {split}"
        rows = load_hub_rows(source, split)
    if not rows:
        raise ValueError(f"{path} is empty: it needs a line for each problem")
    for number, row in enumerate(rows, start=1):
        fault = find_fault(row)
        if fault:
            raise ValueError(f"{path}:{number} {fault}: {row!s:.99}")
    prompts = encode_prompts(tokenizer, [row["question"] for row in rows], template)
    problems = [
        {**row, "index": index, "prompt": prompt}
        for index, (row, prompt) in enumerate(zip(rows, prompts))
        if len(prompt.ids) <= longest
    ]
    if not problems:
        raise ValueError(f"no {split} prompt fits into the model's context: lower --max-new-tokens")
    n_dropped = len(rows) - len(problems)
    if n_dropped:
        print(f"dropped {n_dropped} of {len(rows)} {split} prompts: over the context")
    return problems


def load_hub_rows(source, split):
    """The rows of a split of a data set of the hub, in its configuration "main" (GSM8K's)."""
    try:
        return list(datasets.load_dataset(source, "main", split=split))
    except Exception as error:  # the hub fails in too many ways to list
        hint = "check the name and the network, or name a folder with train.jsonl and test.jsonl"
        raise ValueError(f"cannot load --dataset {source}: {hint} ({error!r:.300})") from error


def find_fault(row):
    """What is wrong with a row of a data set, or None."""
    if not isinstance(row, dict):
        return "is not an object with question and answer"
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        return "has no question"
    if not isinstance(answer, str) or extract_answer(answer) is None:
        return "has no answer that ends in #### and a number"
    if re.search("[\ud800-\udfff]", question):
        return "has half of a surrogate pair in its question, which is no text"
    return None


# On --resume these may differ: they change memory or length, and results by no more than rounding.
# The device is not among them: another one draws other random numbers.
MAY_CHANGE = ("steps", "micro_batch", "score_batch", "checkpoint_every")


class RunFolder:
    """The directory of one run: what it leaves there, and how it is resumed.

        config.json      the settings, and what else a resumed run must share
        scores.jsonl     a line for each question
        metrics.jsonl    a line for each step and each evaluation
        samples.jsonl    completions to read
        checkpoint/      weights, optimizer, curriculum and random numbers after a step
        summary.json     at the end, with model/: a folder for `from_pretrained`

    Entering it as a context claims the directory for this process; ValueError if another process
    has it, if it holds another run, or if a resumed run has other settings."""

    def __init__(self, config):
        self.config = config
        self.path = Path(config.run_dir)
        self.lock = filelock.FileLock(self.path / ".lock")  # freed however the process ends
        self.settings = asdict(config)
        # A run may be moved: where it is, is none of its settings.
        del self.settings["run_dir"], self.settings["resume"]
        self.template = None
        self.metrics, self.samples = [], []
        self.saved_step = None  # of the checkpoint
        self.began = time.perf_counter()

    def __enter__(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise ValueError(f"another process is running in {self.path}") from error
        except (OSError, NotImplementedError) as error:  # read-only; a file; no file locks
            raise ValueError(f"cannot use --run-dir {self.path} ({error})") from error
        try:
            self.claim()
        except ValueError:
            self.__exit__()
            raise
        return self

    def claim(self):
        """Refuse a directory that holds something else; remove what a kill left half-written."""
        half_written = "*.[0-9]*.tmp"  # see write_atomically
        leftovers = {*self.path.glob(half_written), *self.path.glob(f"checkpoint/{half_written}")}
        others = set(self.path.iterdir()) - leftovers - {self.path / ".lock"}
        if others and not self.config.resume:
            hint = "name another --run-dir"
            if (self.path / "config.json").exists():
                hint = f"continue its run with --resume {self.path}, or {hint}"
            raise ValueError(f"{self.path} is not empty: {hint}")
        if self.config.resume:
            recorded = read_record(self.path)
            for name, value in self.settings.items():
                if name not in MAY_CHANGE and recorded[name] != value:
                    raise ValueError(
                        f"{flag(name)} {value}: {self.path} was started with {recorded[name]}, "
                        "and a resumed run keeps it"
                    )
            self.settings = {**recorded, **self.settings}  # with the hash of the data
            self.template = recorded["template"]
        for leftover in leftovers:
            remove(leftover)

    def __exit__(self, *exception):
        """Give the directory back, without a trace if nothing was written."""
        # Delete first, then release. Another process may hold the deleted file open and get its
        # lock now; FileLock then sees that the file is gone, and starts again with a new one.
        Path(self.lock.lock_file).unlink(missing_ok=True)
        self.lock.release()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def check_data(self, problems, template):
        """ValueError if a resumed run has other questions or answers than it was started with.
        Notes their hash, and the rendered template, for config.json."""
        texts = [[problem["question"], problem["answer"]] for problem in problems]
        data_hash = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        if self.settings.get("data_sha256", data_hash) != data_hash:
            raise ValueError(f"{self.path} was started with other data: leave it as it was")
        self.settings["data_sha256"] = data_hash
        self.settings["template"] = template

    def load_scores(self, n_questions):
        """The Scores of a resumed run; None if it was stopped before they were written."""
        path = self.path / "scores.jsonl"
        if not path.exists():
            return None
        rows = read_jsonl(path)
        try:
            columns = {name: [row[name] for row in rows] for name in Scores._fields}
            scores = Scores(**{name: torch.tensor(values) for name, values in columns.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: remove it to score again ({error!r})") from error
        if len(rows) != n_questions:
            raise ValueError(f"{path} has {len(rows)} lines, not {n_questions}: remove it")
        return scores

    def begin(self, problems, scores, curriculum):
        """Write settings and scores: from here on the run can be resumed."""
        rank_of_question = curriculum.order.argsort()  # the inverse of the order
        self.rank_length_correlation = spearman(rank_of_question, scores.tokens)
        write_json(self.path / "config.json", self.settings)
        rows = []
        for place, problem in enumerate(problems):
            values = {name: column[place].item() for name, column in scores._asdict().items()}
            rows.append({"index": problem["index"], **values})
        write_jsonl(self.path / "scores.jsonl", rows)
        print(
            f"ranked {len(problems)} questions; "
            f"Spearman of rank and length {self.rank_length_correlation:.2f}"
        )

    def load_checkpoint(self, model, optimizer, curriculum, generator):
        """Put a resumed run back where its checkpoint was; the number of steps it has done."""
        path = self.path / "checkpoint" / "state.pt"
        if not path.exists():
            return 0
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            curriculum.load_state_dict(checkpoint["curriculum"])
            generator.set_state(checkpoint["generator"])
            self.saved_step = checkpoint["step"]
            self.began -= checkpoint["seconds"]
        except Exception as error:  # a damaged file fails in too many ways to list
            raise ValueError(f"{path} is damaged: remove to start over ({error!r:.300})") from error
        self.metrics = self.read_until_checkpoint("metrics.jsonl")
        self.samples = self.read_until_checkpoint("samples.jsonl")
        return self.saved_step

    def read_until_checkpoint(self, name):
        """The rows of a log without the steps after the checkpoint, which are done once more."""
        path = self.path / name
        if not path.exists():
            return []
        return [row for row in read_jsonl(path) if row["step"] <= self.saved_step]

    def save_checkpoint(self, step, model, optimizer, curriculum, generator):
        if step == self.saved_step:
            return
        checkpoint = {
            "step": step,
            "seconds": time.perf_counter() - self.began,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "curriculum": curriculum.state_dict(),
            "generator": generator.get_state(),
        }
        with write_atomically(self.path / "checkpoint" / "state.pt") as temporary:
            torch.save(checkpoint, temporary)
        self.saved_step = step

    def record_step(self, step, began, mu, batch, rollout, rewards, stats):
        """Add a step to metrics.jsonl, and now and then a group of completions to samples.jsonl."""
        seconds = time.perf_counter() - began
        n_tokens = rollout.completion_mask.sum().item()
        useful = rewards.amax(1) > rewards.amin(1)  # groups whose rewards differ
        row = {
            "step": step,
            "accuracy": rewards.mean().item(),
            "angle": rollout.angle,
            "mean": mu,  # of the Gaussian that this batch was drawn from
            **stats,
            "useful_groups": useful.float().mean().item(),
            "completion_length": n_tokens / len(rollout.texts),
            "seconds": seconds,
            "tokens_per_second": n_tokens / seconds,
        }
        self.metrics.append(row)
        write_jsonl(self.path / "metrics.jsonl", self.metrics)
        if step % self.config.eval_every == 0:
            group = list(zip(rollout.texts, rewards[0].tolist()))  # of the first question
            sample = {"step": step, "question": batch[0]["question"], "completions": group}
            self.samples.append(sample)
            write_jsonl(self.path / "samples.jsonl", self.samples)

    def record_evaluation(self, step, result):
        self.metrics.append({"step": step, **result})
        write_jsonl(self.path / "metrics.jsonl", self.metrics)
        tqdm.write(f"step {step}: {describe(result)}")

    def evaluations(self):
        return [row for row in self.metrics if "eval_accuracy" in row]

    def evaluated(self, step):
        return any(row["step"] == step for row in self.evaluations())

    def finish(self, step, model, tokenizer):
        """Write model/ (if it was trained) and summary.json; return the summary."""
        if step:
            with write_atomically(self.path / "model") as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        summary = {
            "preset": self.config.preset,
            "curriculum": self.config.curriculum,
            "seed": self.config.seed,
            "steps": step,
            "seconds": time.perf_counter() - self.began,
            "rank_length_correlation": self.rank_length_correlation,
            "accuracy_before": None,
            "accuracy_after": None,
        }
        evaluations = self.evaluations()
        if evaluations:
            before, after = evaluations[0], evaluations[-1]
            summary["accuracy_before"] = before["eval_accuracy"]
            summary["accuracy_after"] = after["eval_accuracy"]
            print(f"before {before['step']:5} steps: {describe(before)}")
            print(f"after  {after['step']:5} steps: {describe(after)}")
        write_json(self.path / "summary.json", summary)
        return summary


def describe(evaluation):
    return (
        f"greedy accuracy {evaluation['eval_accuracy']:.3f} "
        f"(95% {evaluation['eval_low']:.3f} to {evaluation['eval_high']:.3f})"
    )


def read_record(run_dir):
    """What config.json of a run holds: all settings, and what else a resumed run must share."""
    path = Path(run_dir, "config.json")
    try:
        record = json.loads(path.read_bytes())
        names = {known.name for known in fields(Config)} - {"run_dir", "resume"}
        missing = names - set(record)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--resume {run_dir} names no run: start one ({error})") from error
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: made by another version")
    return record


class GracefulStop:
    """A context in which Ctrl-C and SIGTERM (a cluster that wants its machine back) only set
    `.signum`, so that the loop can finish its step. The second one acts as usual."""

    def __init__(self):
        self.signum = None

    def __enter__(self):
        self.usual = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for signum in self.usual:
            signal.signal(signum, self.request)
        return self

    def request(self, signum, frame):
        self.signum = signum
        self.restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    def restore(self):
        for signum, handler in self.usual.items():
            signal.signal(signum, handler)

    def __exit__(self, *exception):
        self.restore()


class Stopped(KeyboardInterrupt):
    """Training was asked by a signal to stop, and did."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


def stop_at_once(signum, frame):
    """The handler of SIGTERM outside the training loop, which has GracefulStop. Installed where
    this file is run as a program, at its end."""
    raise Stopped(signum)


@contextlib.contextmanager
def write_atomically(path):
    """A temporary path to write to. It takes the place of `path` once it is whole, so that a kill
    never leaves half a file. OSError if that fails: on a full disk, say."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            remove(path)  # only an empty directory can be replaced
        temporary.replace(path)
    except Exception as error:  # a full disk is another error in each library
        raise OSError(f"cannot write {path}: make room, then --resume ({error!r:.300})") from error
    finally:
        remove(temporary)


def remove(path):
    """A file or a directory with all that is in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def contents(folder):
    """What a folder holds, for a message about what it lacks."""
    names = sorted(entry.name for entry in Path(folder).iterdir())
    return f"there are {', '.join(names[:9]) or 'no files'}"


def write_json(path, value):
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_jsonl(path, rows):
    with write_atomically(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path):
    """The rows of a file of JSON lines. ValueError names file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}, {contents(path.parent)} ({error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON: {line[:99]!r}") from error
    return rows


# --- 9. The tiny world: a data set and a chat model made in code, then loaded like any other ------
NAMES = ["Ann", "Ben", "Cid", "Dee", "Eve", "Fay", "Gus", "Hal"]
THINGS = ["apples", "birds", "cards", "dolls", "eggs", "figs"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
LOSES = ["loses", "sells"]
GAINS = ["gets", "finds"]
LARGEST = 20  # numbers are 0 to LARGEST, a token each
N_TRAIN, N_TEST = 2000, 1000
WARM_UP_BATCH = 24
PAD, END, BEGIN = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)


def make_tiny_world(folder, distractors=5, filler=0, warmup=450, effort=0.75, seed=0):
    """Write train.jsonl, test.jsonl and a warmed-up Qwen2 of 135,000 parameters to `folder`, if it
    is not there. distractors, filler: see tiny_problem; warmup: steps of the warm-up; effort: see
    warm_up."""
    folder = Path(folder)
    if folder.is_dir():
        return
    print(f"making the tiny world, {folder}: its data, its model and {warmup} warm-up steps")
    rng = random.Random(seed)
    problems = {}  # by question: none is in both splits
    while len(problems) < N_TRAIN + N_TEST:
        problem = tiny_problem(rng, distractors, filler)
        problems[problem["question"]] = problem
    problems = list(problems.values())
    train_rows, test_rows = problems[:N_TRAIN], problems[N_TRAIN:]
    tokenizer = tiny_tokenizer(train_rows)
    torch.manual_seed(seed)
    model = tiny_model(len(tokenizer))
    warm_up(model, tokenizer, train_rows, rng, warmup, effort)

    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_jsonl(temporary / "train.jsonl", train_rows)
    write_jsonl(temporary / "test.jsonl", test_rows)
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        remove(temporary)  # another process has made the same world meanwhile


def tiny_problem(rng, distractors=5, filler=0):
    """A row like GSM8K's, of one to six steps. Sentences about other people add length and no step:
    up to `distractors` of them, and `filler` more for each step that the problem has less than six.
    With filler 1 all problems are about equally long, with 2 those with the fewest steps are the
    longest."""
    who, *others = rng.sample(NAMES, 3)
    thing = rng.choice(THINGS)
    number = rng.randint(0, LARGEST)
    story, solution = [f"{who} has {number} {thing}."], []
    for day in DAYS[: rng.randint(1, len(DAYS))]:
        changes = [c for c in range(-9, 10) if c != 0 and 0 <= number + c <= LARGEST]
        change = rng.choice(changes)
        verb = rng.choice(GAINS if change > 0 else LOSES)
        sign = "+" if change > 0 else "-"
        story.append(f"On {day} {who} {verb} {abs(change)}.")
        solution.append(f"{day}: {number} {sign} {abs(change)} = {number + change}.")
        number += change
    n_distractors = rng.randint(0, distractors) + filler * (len(DAYS) - len(solution))
    for _ in range(n_distractors):
        sentence = f"{rng.choice(others)} has {rng.randint(0, LARGEST)} {rng.choice(THINGS)}."
        story.insert(rng.randint(1, len(story)), sentence)
    question = " ".join([*story, f"How many {thing} does {who} have now?"])
    return {"question": question, "answer": " ".join([*solution, f"#### {number}"])}


def tiny_tokenizer(problems):
    """A tokenizer with one token for each word, number and sign of the problems and the prompt."""
    tokens = tokenizers.Regex(r"\\boxed\{|[0-9]+|\w+|[^\w\s]")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=PAD))
    # What lies between the tokens, the spaces, is removed.
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokens, "removed", invert=True)
    texts = [f"{problem['question']} {problem['answer']}" for problem in problems]
    texts += [f"{message['role']} {message['content']}" for message in build_messages(".")]
    trainer = tokenizers.trainers.WordLevelTrainer(
        special_tokens=[PAD, END, BEGIN], show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END)
    tokenizer.pad_token = PAD
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(vocab_size):
    """A Qwen2 with random weights, drawn from torch's global generator."""
    config = transformers.Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,  # END, the second token of tiny_tokenizer
        initializer_range=0.1,
        rope_parameters={"rope_theta": 1000.0},
    )
    return transformers.Qwen2ForCausalLM(config)


def warm_up(model, tokenizer, problems, rng, steps, effort):
    """Teach the model both to solve problems and to guess: GRPO can then reinforce the better way.

    Supervised steps on worked solutions. In the last quarter a problem with n steps keeps its
    solution with probability effort**n. Otherwise it gets a guess, the number that the story starts
    with, which is mostly wrong: so the model guesses more often where a problem has more steps."""
    head, tail = render_template(tokenizer)
    prefix = tokenizer(head, return_tensors="pt")["input_ids"]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    # AdamW alone takes three times the steps; Muon with the usual momentum, 0.95, 1.5 times.
    optimizers = [
        torch.optim.Muon(matrices, 0.02, weight_decay=0.0, momentum=0.8),
        torch.optim.AdamW(others, 3e-3, weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, steps) for o in optimizers]
    for step in tqdm(range(steps), desc="warm-up", unit="step", leave=False):
        pairs = []
        for problem in rng.sample(problems, WARM_UP_BATCH):
            solution, number = problem["answer"].split("#### ")
            n_steps = solution.count("=")
            if step >= 0.75 * steps and rng.random() > effort**n_steps:
                solution, number = "", solution.split()[1]
            pairs.append((problem["question"] + tail, f"{solution}\\boxed{{{number}}}{END}"))
        batch = tokenizer(pairs, padding=True, return_token_type_ids=True, return_tensors="pt")
        ids = batch["input_ids"]
        is_completion = batch["token_type_ids"] == 1  # the second text of a pair; padding has 0
        _, cache = run_body(model, prefix)  # once for all: they begin alike
        cache.batch_repeat_interleave(len(pairs))
        hidden, _ = run_body(model, ids, cache=cache)
        logits = model.lm_head(hidden)
        targets = F.pad(ids.where(is_completion, -100), (0, 1), value=-100)[:, 1:]  # -100: no loss
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()


# --- 10. The command line -------------------------------------------------------------------------


def parse_config(argv=None):
    """The Config of a command line.

    The parser leaves out what was not named, so that named flags override the preset's settings,
    or those of the run to be resumed, and nothing else does."""
    parser = argparse.ArgumentParser(
        usage="gainrl.py [options]",
        description=__doc__.split("\n\n")[1],
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for known in fields(Config):
        alternatives = typing.get_args(known.type)  # of `float | None`: float, NoneType
        value_type = alternatives[0] if alternatives else known.type
        help_text = known.metadata["description"]
        if known.default is not None and known.name != "preset":
            help_text += f" (default: {known.default}"
            if known.name in PRESETS["tiny"]:
                help_text += f"; tiny: {PRESETS['tiny'][known.name]}"
            help_text += ")"
        parser.add_argument(flag(known.name), type=value_type, help=help_text)
    named = vars(parser.parse_args(argv))

    if "resume" in named and "run_dir" in named:
        raise ValueError("--resume and --run-dir name two directories: leave one out")
    if "resume" in named:
        names = {known.name for known in fields(Config)}
        record = read_record(named["resume"])
        base = {name: value for name, value in record.items() if name in names}
    else:
        preset = named.get("preset") or default_preset(named)
        base = PRESETS.get(preset, {})  # check() refuses an unknown name
    return Config(**{**base, **named})


def default_preset(named):
    """gsm8k where there is a GPU, or if a model or a data set was named; tiny otherwise."""
    if "model" in named or "dataset" in named or torch.cuda.is_available():
        return "gsm8k"
    try:
        torch.cuda.init()  # to learn the reason: is_available() gives none
    except (RuntimeError, AssertionError) as error:  # an old driver, or torch without CUDA
        print(f"no GPU ({error}): --preset tiny")
    return "tiny"


def main(argv=None):
    """The command line. Its status: 0; 2 for what could not be done; 128 + the signal, if stopped
    by one (130 after Ctrl-C, 143 after SIGTERM)."""
    transformers.utils.logging.disable_progress_bar()
    run_dir = None
    try:
        config = parse_config(argv)
        run_dir = config.run_dir
        train(config)
        return 0
    except torch.OutOfMemoryError as error:
        hint = (
            "lower --micro-batch or --score-batch, or, if it was sampling, start another run with "
            "a lower --prompts-per-step"
        )
        reason = str(error).partition("\n")[0]
        report(f"out of memory: {hint}; {how_to_continue(run_dir)} ({reason:.200})")
        return 2
    except (ValueError, OSError, FloatingPointError) as error:
        report(error)
        return 2
    except KeyboardInterrupt as error:
        report(f"stopped; {how_to_continue(run_dir)}")
        return 128 + getattr(error, "signum", signal.SIGINT)


def how_to_continue(run_dir):
    if run_dir and Path(run_dir, "config.json").exists():
        return f"continue with: python gainrl.py --resume {run_dir}"
    return "nothing was saved yet: start again"


def report(message):
    tqdm.write(f"gainrl.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop_at_once)  # until the training loop handles it
    sys.exit(main())
