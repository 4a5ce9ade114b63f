"""GAIN-RL in one file: GRPO that picks its questions by the angles between their token vectors.

From "Angles Don't Lie" (arXiv 2506.02281). One prefill pass scores every training question by its
angle concentration C, the mean cosine between the hidden states of its tokens: the more they point
one way, the larger the gradient. Sort by C, draw each batch from a Gaussian over the ranks, and
move the Gaussian on as fast as the batch's accuracy and angle allow. The rest is plain GRPO.
    python gainrl.py                              Qwen2.5-0.5B on GSM8K; without a GPU, a tiny world
    python gainrl.py --curriculum uniform         plain GRPO; or angle-unbiased, length, shuffled
    python gainrl.py --resume runs/tiny-angle-0   go on after Ctrl-C, a crash or kill -9
Unlike the authors' code, C is the paper's definition and the Gaussian stops at the last rank."""

import copy
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import jinja2
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

# --- Config ---------------------------------------------------------------------------------------
UNBIASED = "angle-unbiased"
CURRICULA = ("angle", UNBIASED, "length", "shuffled", "uniform")
PRESETS = ("gsm8k", "tiny")
TINY_WORLD = "runs/tiny-world"
RESULT = "greedy accuracy {eval_accuracy:.3f} (95% {eval_low:.3f} to {eval_high:.3f})"
STEP, SIGMA = 500 / 7473, 1000 / 7473  # the authors' 500 and 1000 as shares of GSM8K


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run. A pair of defaults is one for each preset: (gsm8k, tiny)."""

    preset: str = option(None, "gsm8k or tiny; if not given, tiny where there is no GPU")
    model: str = option(("Qwen/Qwen2.5-0.5B-Instruct", TINY_WORLD), "hub name or local folder")
    dataset: str = option(("openai/gsm8k", TINY_WORLD), "hub name, or folder of {train,test}.jsonl")
    curriculum: str = option("angle", "what picks the questions: " + ", ".join(CURRICULA))
    steps: int = option((200, 30), "batches to train on; 0 scores and ranks only")
    prompts_per_step: int = option((32, 16), "P, questions in a batch")
    completions_per_prompt: int = option(8, "G, completions sampled for each question")
    updates: int = option(1, "gradient steps on each batch")
    max_new_tokens: int = option((512, 64), "longest completion, in tokens")
    micro_batch: int = option((8, 128), "completions in a backward pass: memory, not results")
    score_batch: int = option(64, "questions in a scoring pass: memory, not results")
    temperature: float = option(1.0, "of sampling; evaluation is greedy")
    lr: float = option((1e-6, 1e-4), "learning rate of AdamW, constant")
    clip: float = option(0.2, "epsilon of the clipped ratio")
    kl: float = option((0.001, 0.0), "weight of the KL term; 0 keeps no reference model in memory")
    sigma: float = option(SIGMA, "width of the Gaussian, as a share of the data set")
    curriculum_step: float = option(STEP, "n, the unit of the mean's step, as a share likewise")
    seed: int = option(0, "of the draws and the sampling")
    eval_every: int = option((50, 10), "steps between evaluations")
    eval_examples: int = option(512, "test questions in an evaluation: the first ones")
    checkpoint_every: int = option((10, 1), "steps between checkpoints")
    run_dir: str = option(None, "where the run is kept; runs/PRESET-CURRICULUM-SEED if not given")
    resume: str = option(None, "a run directory to go on with, configured as it was")

    def __post_init__(self):
        if self.preset is None:
            named = isinstance(self.model, str) or isinstance(self.dataset, str)
            self.preset = "gsm8k" if named or torch.cuda.is_available() else "tiny"
        for name, known in (("preset", PRESETS), ("curriculum", CURRICULA)):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)}: choose from {', '.join(known)}")
        least = {"steps": 0, "seed": 0, "kl": 0, "completions_per_prompt": 2}
        for name, kind in type(self).__annotations__.items():
            value, low = getattr(self, name), least.get(name, 1 if kind is int else 1e-12)
            if isinstance(value, tuple):
                value = value[PRESETS.index(self.preset)]
                setattr(self, name, value)
            if kind is not str and not low <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {low} or more")
        if self.model == TINY_WORLD != self.dataset:
            raise ValueError("the tiny world's model knows no other words: name a --model as well")
        default = f"runs/{self.preset}-{self.curriculum}-{self.seed}"
        self.run_dir = self.resume or self.run_dir or default


# --- The signal: angle concentration (paper, section 3) -------------------------------------------
# For Y = XW, tokens x_i and upstream gradients g_i, |dL/dW|_F^2 = sum_ij (x_i.x_j)(g_i.g_j).
# Layer norms fix |x_i|, so what a prompt itself brings to its gradient is its tokens' angles.
Scores = namedtuple("Scores", "intra inter angle tokens")


def angle_concentration(hidden, prefix_mask, question_mask, include_self=True):
    """C_intra and C_inter of the paper (section 3): two float32 tensors (B,), within [-1, 1].
        C_intra = mean of cos(theta_ij) over i, j in the question
        C_inter = mean of cos(theta_ij) over i in the question, j in the prefix
    hidden: (B, T, D), any float dtype. Masks: (B, T), bool or 0/1 of any dtype, disjoint; padding,
    on either side, is in neither. A zero vector has cosine 0 with all; C_inter without prefix is 0.
    include_self=False leaves out the i = j pairs. They add (1 - c)/L to the mean c of the others in
    L tokens and so favour short questions. A question of one token then has C_intra 0.
    ValueError names a row without a question token."""
    prefix_mask, question_mask = prefix_mask.bool(), question_mask.bool()
    if len(bad := (~question_mask.any(1)).nonzero()):
        raise ValueError(f"row {bad[0].item()} has no question token")
    unit = F.normalize(hidden.float(), dim=-1)  # float32: bfloat16 sums change ranks
    prefix = unit.masked_fill(~prefix_mask[..., None], 0).sum(1)  # a fill: padding may hold NaN
    unit = unit.masked_fill(~question_mask[..., None], 0)
    question, n, m = unit.sum(1), prefix_mask.sum(1), question_mask.sum(1)
    # sum_ij cos(theta_ij) = |sum_i u_i|^2: O(T D), where a T x T matrix takes O(T^2 D).
    intra, pairs = question.square().sum(1), m * m
    if not include_self:
        intra, pairs = intra - unit.square().sum((1, 2)), m * (m - 1)
    intra = torch.where(pairs > 0, intra / pairs, 0.0)
    inter = (question * prefix).sum(1) / (m * n).clamp(min=1)
    return intra.clamp(-1, 1), inter.clamp(-1, 1)


@torch.no_grad()
def score_prompts(model, tokenizer, questions, config):
    """Scores of N questions (strings): C_intra, C_inter, angle (their sum C) and tokens (the
    question's length), each (N,) on the CPU. ValueError names a question whose score is not finite.
    One prefill of the body, up to the question's last token: later ones cannot change its states.
    What all prompts begin with runs once. Questions of one length share a batch, unpadded."""
    prompts, device = encode_prompts(tokenizer, questions), model.device
    shared = os.path.commonprefix([prompt.ids[: prompt.start] for prompt in prompts])
    states, kept = model.base_model(torch.tensor([shared], device=device), use_cache=True)[:2]
    intra, inter = torch.zeros(2, len(prompts))
    for end in tqdm(sorted({p.end for p in prompts}), desc="scoring", unit="length", leave=False):
        alike = torch.tensor([i for i, p in enumerate(prompts) if p.end == end])
        for rows in alike.split(config.score_batch):
            batch = [prompts[i] for i in rows]
            ids = torch.tensor([p.ids[len(shared) : end] for p in batch], device=device)
            cache = copy.deepcopy(kept)
            cache.batch_repeat_interleave(len(batch))
            hidden = model.base_model(ids, None, None, cache, use_cache=True)[0]
            hidden = torch.cat([states.expand(len(batch), -1, -1), hidden], 1)
            start = torch.tensor([[p.start] for p in batch], device=device)
            before = torch.arange(end, device=device) < start
            pair = angle_concentration(hidden, before, ~before, config.curriculum != UNBIASED)
            intra[rows], inter[rows] = (c.cpu() for c in pair)
    if len(bad := (~torch.isfinite(intra + inter)).nonzero()):
        raise ValueError(f"question {bad[0].item()} has no finite score: {questions[bad[0]]:.60}")
    return Scores(intra, inter, intra + inter, torch.tensor([p.end - p.start for p in prompts]))


# --- The curriculum (paper, section 4) ------------------------------------------------------------
class GaussianCurriculum(torch.utils.data.Sampler):
    """Batches of data-set indices from a Gaussian that moves down the order of the scores.
    scores: (N,), highest first in `.order`, ties by index. step and sigma: shares of N (sigma = inf
    draws uniformly). Iterating yields batches without end: a `batch_sampler`. ValueError for
    N < batch_size and for a score that is not finite."""

    def __init__(
        self, scores, batch_size, *, step=STEP, sigma=SIGMA, target=0.5, alpha=2, gamma=2, seed=0
    ):
        scores = torch.as_tensor(scores)
        if len(bad := (~torch.isfinite(scores)).nonzero()):
            raise ValueError(f"score {bad[0].item()} is not finite")
        if not 1 <= batch_size <= len(scores):
            raise ValueError(f"only {len(scores)} questions: lower --prompts-per-step {batch_size}")
        self.order = scores.argsort(descending=True, stable=True)
        self.batch_size, self.mean = batch_size, 0.0
        self.step, self.sigma = step * len(scores), sigma * len(scores)
        self.target, self.alpha, self.gamma = target, alpha, gamma
        self.generator = torch.Generator().manual_seed(seed)

    def log_density(self):
        position = torch.arange(len(self.order), dtype=torch.float64)
        return -0.5 * ((position - self.mean) / self.sigma) ** 2

    def probabilities(self):
        """(N,) float64 over positions in the order; sums to 1 also where every density is 0."""
        return self.log_density().softmax(0)

    def sample(self):
        """batch_size distinct indices, by Gumbel top-k: the largest of log p + Gumbel noise."""
        noise = torch.empty(len(self.order), dtype=torch.float64)
        gumbel = -noise.exponential_(generator=self.generator).log()
        return self.order[(self.log_density() + gumbel).topk(self.batch_size).indices].tolist()

    def __iter__(self):
        while True:
            yield self.sample()

    def update(self, accuracy, angle):
        """Move the mean by the accuracy (0 to 1) and the mean C of the batch just trained on.
            mu <- mu + n S(alpha (accuracy - target)) + n S(gamma angle),  S(z) = 2 sigmoid(2z) - 1,
        where S(z) = tanh z. Never backwards, as in the authors' code; never past the last position,
        unlike it. Returns the mean. ValueError for NaN and for an accuracy outside [0, 1]."""
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


# --- The task: GSM8K's prompts, answers and reward ------------------------------------------------
SYSTEM_PROMPT = "Solve the problem step by step. Write the final number as \\boxed{number}."
EXAMPLE = ("What is 2+2?", "2 + 2 = 4. The answer is \\boxed{4}.")
PLACEHOLDER = "\ue000"  # a private-use character: in no template and no question
Prompt = namedtuple("Prompt", "ids start end")  # ids[:start] prefix, ids[start:end] the question


def build_messages(question):
    """The chat of one question: system prompt and one-shot example (the prefix), then itself."""
    chat = zip(("system", "user", "assistant", "user"), (SYSTEM_PROMPT, *EXAMPLE, question))
    return [{"role": role, "content": text} for role, text in chat]


def render_template(tokenizer):
    """The texts before and after a question. A template that refuses or drops the system role gets
    its text in the first user turn. ValueError for a tokenizer without template or offsets."""
    if not (tokenizer.is_fast and tokenizer.chat_template):
        lacks = "chat template: use an instruct model" if tokenizer.is_fast else "character offsets"
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no {lacks}")
    system, user, *rest = build_messages(PLACEHOLDER)
    merged = {"role": "user", "content": f"{SYSTEM_PROMPT}\n\n{user['content']}"}
    for chat in ([system, user, *rest], [merged, *rest]):
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:
            continue
        if SYSTEM_PROMPT in text and text.count(PLACEHOLDER) == 1:
            return text.split(PLACEHOLDER)
    raise ValueError(f"the template of {tokenizer.name_or_path} loses the prompt")


def question_span(offsets, begin, end):
    """(first, last + 1) of the tokens that touch characters [begin, end); ValueError if none."""
    touching = [k for k, (b, e) in enumerate(offsets) if b < end and e > begin]
    if not touching:
        raise ValueError("the tokenizer makes no token of the question")
    return touching[0], touching[-1] + 1


def encode_prompts(tokenizer, questions):
    """The Prompt of each question (strings)."""
    head, tail = render_template(tokenizer)
    texts = [head + question.strip() + tail for question in questions]
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    ends = [len(text) - len(tail) for text in texts]
    spans = (question_span(o, len(head), end) for o, end in zip(coded["offset_mapping"], ends))
    return [Prompt(ids, *span) for ids, span in zip(coded["input_ids"], spans)]


ANSWER = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|####([^\n]*)")
IGNORED = re.compile(r"\\?\$|\\[!,]|\{,\}|(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")  # $5, 1\,000, 1,000
NUMBER = re.compile(r"(?:-\s*)?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")


def extract_answer(text):
    """The number in the last `\\boxed{...}` or `#### ...`, in one canonical form, or None.
    "1,000", "$1000", "1000.00" and "1000." are all "1000". A box of several numbers (a fraction,
    a range, a list) has no answer: to choose one of them would reward a guess."""
    answers = ANSWER.findall(text)
    content = "".join(answers[-1] if answers else "").replace("\N{MINUS SIGN}", "-")
    numbers = NUMBER.findall(IGNORED.sub("", content))
    if len(numbers) != 1 or "frac" in content:
        return None
    whole, _, fraction = numbers[0].lstrip("-").strip().partition(".")  # text: int() has a limit
    number = (whole.lstrip("0") or "0") + ("." + fraction.rstrip("0")).rstrip(".")
    return "-" + number if numbers[0].startswith("-") and number != "0" else number


def reward(completion, gold):
    """1.0 if the completion's answer is the gold one (the data set's `answer` field), else 0.0."""
    return float(extract_answer(completion) in {extract_answer(gold)} - {None})


def load_problems(tokenizer, source, split, longest):
    """Rows of question and answer of SOURCE/split.jsonl or a hub data set, with their "index" and
    "prompt", if it has at most `longest` tokens. ValueError names file and line of a bad row."""
    path = Path(source, f"{split}.jsonl")
    try:
        local = Path(source).is_dir()
        rows = path.read_bytes().splitlines() if local else None
        rows = rows if local else list(datasets.load_dataset(source, "main", split=split))
    except Exception as error:  # the hub fails in too many ways to list
        raise ValueError(f"cannot read {path}: check folder or network ({error!r:.300})") from error
    for k, row in enumerate(rows := rows or [None]):
        try:
            rows[k] = row = json.loads(row) if isinstance(row, bytes) else row
            usable = row["question"].strip() and extract_answer(row["answer"])
        except (ValueError, TypeError, KeyError, AttributeError):
            usable = False
        if not usable:
            raise ValueError(f"{path}:{k + 1} needs a question and a numeric answer: {row!s:.99}")
    prompts = enumerate(encode_prompts(tokenizer, [row["question"] for row in rows]))
    kept = [rows[k] | {"index": k, "prompt": p} for k, p in prompts if len(p.ids) <= longest]
    if not kept:
        raise ValueError(f"no {split} prompt fits into the model's context: lower --max-new-tokens")
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} of {len(rows)} {split} prompts: over the context")
    return kept


# --- GRPO: completions, log-probabilities, advantages, loss ---------------------------------------
# B = P*G completions of up to L tokens after prompts of T: ids and attention_mask (B, T+L), mask
# (B, L) of the completion with its end token, B texts, and the mean C of the prompts as angle.
CHUNK = 256  # tokens whose logits are held at once
Completions = namedtuple("Completions", "ids attention_mask mask texts angle")


@torch.no_grad()
def generate(model, tokenizer, prompts, config, samples=1, generator=None):
    """`samples` Completions of each of P prompts at config.temperature, drawn from `generator`, or
    the greedy one without it. Prompts are prefilled once, their keys and values repeated. Of the
    model's generation_config only the end tokens count. FloatingPointError for a C not finite."""
    body, head, device = model.base_model, model.get_output_embeddings(), model.device
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([tokenizer.eos_token_id if ends is None else ends], device=device).flatten()
    width = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p.ids)) + p.ids for p in prompts], device=device)
    spans = [[len(p.ids) - width, p.start, p.end] for p in prompts]
    first, start, end = torch.tensor(spans, device=device).T[..., None]
    position = torch.arange(width, device=device) + first  # counts real tokens: padding is below 0
    mask, before = position >= 0, position < start
    question = mask & ~before & (position < end)
    hidden, cache = body(ids, mask, position.clamp(min=0), use_cache=True)[:2]
    pair = angle_concentration(hidden, mask & before, question, config.curriculum != UNBIASED)
    angle = sum(pair).mean().item()
    if not math.isfinite(angle):
        raise FloatingPointError("the model's hidden states are not finite")
    cache.batch_repeat_interleave(samples)
    hidden, ids, mask = (x.repeat_interleave(samples, 0) for x in (hidden[:, -1:], ids, mask))
    alive = torch.ones_like(mask[:, :1])
    for _ in range(config.max_new_tokens):
        p = (head(hidden[:, -1]).float() / config.temperature).softmax(-1)
        token = p.multinomial(1, generator=generator) if generator else p.argmax(1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, alive], 1)
        alive = alive & ~torch.isin(token, ends)
        if not alive.any():
            break
        position = mask.sum(1, keepdim=True) - 1
        hidden = body(token, mask, position, cache, use_cache=True)[0]  # by position: names vary
    kept = [row[keep].tolist() for row, keep in zip(ids[:, width:], mask[:, width:])]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return Completions(ids, mask, mask[:, width:], texts, angle)


def completion_logprobs(model, ids, attention_mask, completion_length, temperature, samples=1):
    """log pi of the last `completion_length` of T tokens: float32 (B, completion_length), under the
    temperature that sampled them. Every `samples` rows have one prompt, whose keys and values are
    computed once, with their gradient. CHUNK tokens at a time, and again in the backward pass:
    the float32 logits of all tokens, (B, T, vocabulary), would take gigabytes."""
    body, head, L = model.base_model, model.get_output_embeddings(), completion_length
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)

    def logprobs(hidden, targets):
        return -F.cross_entropy(head(hidden).float() / temperature, targets, reduction="none")

    prompt = (x[::samples, :-L] for x in (ids, attention_mask, positions))
    hidden, cache = body(*prompt, use_cache=True)[:2]
    cache.batch_repeat_interleave(samples)
    rest = body(ids[:, -L:], attention_mask, positions[:, -L:], cache, use_cache=True)[0]
    hidden = torch.cat([hidden[:, -1:].repeat_interleave(samples, 0), rest[:, :-1]], 1)
    parts = zip(hidden.flatten(0, 1).split(CHUNK), ids[:, -L:].flatten().split(CHUNK))
    parts = [torch.utils.checkpoint.checkpoint(logprobs, *x, use_reentrant=False) for x in parts]
    return torch.cat(parts).view(len(ids), L)


def group_advantages(rewards):
    """z-scores within each group, (P, G) to (P, G); exactly 0 where all rewards are equal."""
    if rewards.shape[1] < 2:
        raise ValueError("a group of one has no advantage: G must be 2 or more")
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    std, mean = torch.std_mean(rewards.float(), 1, keepdim=True)
    return torch.where(flat, 0.0, (rewards - mean) / std)


def grpo_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, reference_logprobs=None, kl=0.0):
    """Clipped policy loss with an optional KL penalty: (loss, stats). advantages (B,), rest (B, L).
        loss = mean over the mask of -min(r A, clamp(r, 1 - clip, 1 + clip) A) + kl k3
        r = exp(logprobs - old_logprobs),  k3 = exp(d) - d - 1,  d = reference_logprobs - logprobs
    k3 is never negative and unbiased. stats: the floats kl and clip_fraction. mask: bool, or 0/1 of
    any dtype; what stands behind it, even an infinity, changes neither loss nor gradient."""
    mask = mask.bool()

    def mean(x):
        return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)

    # Masked before exp: a mask after it would leave 0 * inf = NaN in the gradient.
    ratio = torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = mean(-torch.minimum(ratio * advantages, clipped))
    stats = {"kl": 0.0, "clip_fraction": mean((ratio * advantages > clipped).float()).item()}
    if reference_logprobs is not None:
        d = torch.where(mask, reference_logprobs - logprobs, 0.0)
        k3 = mean(torch.exp(d) - d - 1)
        loss, stats["kl"] = loss + kl * k3, k3.item()
    return loss, stats


def grpo_update(model, reference, optimizer, completions, advantages, config):
    """config.updates gradient steps on a batch; the loss, grad_norm and stats of the last.
    Micro-batches, weighted by their tokens, add up to the gradient of the whole batch.
    FloatingPointError, before its step is taken, for a loss or gradient that is not finite."""
    ids, attention_mask, mask = completions[:3]
    samples = math.gcd(config.micro_batch, config.completions_per_prompt)  # of one prompt, in a row
    old = []  # for each micro-batch, log-probs of the policy that sampled
    for _ in range(config.updates):
        stats = {"loss": 0.0, "kl": 0.0, "clip_fraction": 0.0}
        for k, rows in enumerate(torch.arange(len(ids)).split(config.micro_batch)):
            batch = ids[rows], attention_mask[rows], mask.shape[1], config.temperature, samples
            logprobs = completion_logprobs(model, *batch)
            with torch.no_grad():
                anchor = completion_logprobs(reference, *batch) if config.kl else None
            if k == len(old):  # in the first update the weights are those that sampled
                old.append(logprobs.detach())
            terms = logprobs, old[k], advantages[rows], mask[rows], config.clip, anchor, config.kl
            (loss, part), share = grpo_loss(*terms), (mask[rows].sum() / mask.sum()).item()
            (loss * share).backward()
            stats = {n: stats[n] + share * x for n, x in {**part, "loss": loss.item()}.items()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        if not math.isfinite(norm + stats["loss"]):
            raise FloatingPointError(f"loss {stats['loss']}, gradient {norm}: --lr is too high")
        optimizer.step()
        optimizer.zero_grad()  # now, so that sampling has the gradients' memory
    return {**stats, "grad_norm": norm}


# --- The tiny world: a data set and a chat model made in code, then loaded like any other ---------
NAMES = ["Ann", "Ben", "Cid", "Dee", "Eve", "Fay", "Gus", "Hal"]
THINGS = ["apples", "birds", "cards", "dolls", "eggs", "figs"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
VERBS = [["loses", "sells"], ["gets", "finds"]]
TOP = 20  # numbers are 0 to TOP, a token each
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}<|im_start|>assistant{{ '\n' }}"


def tiny_problem(rng, distractors=5):
    """A row like GSM8K's: one to six steps, and sentences on others that add length and no step."""
    who, *others = rng.sample(NAMES, 3)
    thing, number = rng.choice(THINGS), rng.randint(0, TOP)
    story, work = [f"{who} has {number} {thing}."], []
    for day in DAYS[: rng.randint(1, len(DAYS))]:
        change = rng.choice([c for c in range(-9, 10) if c and 0 <= number + c <= TOP])
        story.append(f"On {day} {who} {rng.choice(VERBS[change > 0])} {abs(change)}.")
        work.append(f"{day}: {number} {'-+'[change > 0]} {abs(change)} = {number + change}.")
        number += change
    for _ in range(rng.randint(0, distractors)):
        owns = f"{rng.choice(others)} has {rng.randint(0, TOP)} {rng.choice(THINGS)}."
        story.insert(rng.randint(1, len(story)), owns)
    question = " ".join([*story, f"How many {thing} does {who} have now?"])
    return {"question": question, "answer": " ".join([*work, f"#### {number}"])}


def make_tiny_world(folder, distractors=5, warmup=700, effort=0.75, seed=0):
    """Write train.jsonl, test.jsonl and a warmed-up Qwen2 of 135,000 parameters to `folder`, if it
    is not there. The warm-up shows worked solutions; in its last quarter all but a share
    effort^steps give way to a bare answer, the problem's first number. That leaves what RL needs:
    a policy that can solve problems and mostly does not bother, the less the longer they are."""
    folder, rng, rows = Path(folder), random.Random(seed), {}
    if folder.is_dir():
        return
    print(f"making the tiny world, {folder}: its data, its model and {warmup} warm-up steps")
    while len(rows) < 3000:  # by question: none is in both splits
        row = tiny_problem(rng, distractors)
        rows[row["question"]] = row
    train, test = list(rows.values())[:2000], list(rows.values())[2000:]
    signs = tokenizers.Regex(r"\\boxed\{|[0-9]+|\w+|[^\w\s]")  # a token each; spaces are none
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<|endoftext|>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(signs, "removed", invert=True)
    texts = [" ".join(row.values()) for row in (*train, *build_messages("."))]
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    words.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=SPECIAL[1])
    tokenizer.pad_token, tokenizer.chat_template = SPECIAL[0], CHATML
    torch.manual_seed(seed)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 160}
    shape |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"max_position_embeddings": 512, "tie_word_embeddings": True, "eos_token_id": 1}
    shape |= {"initializer_range": 0.1, "rope_parameters": {"rope_theta": 1000.0}}
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    head, tail = render_template(tokenizer)
    prefix = tokenizer(head, return_tensors="pt")["input_ids"]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    muon = torch.optim.Muon(matrices, 0.02, weight_decay=0.0)  # AdamW alone takes 3x the steps
    adamw = torch.optim.AdamW(others, 3e-3, weight_decay=0.0)
    decay = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, warmup) for o in (muon, adamw)]
    for step in tqdm(range(warmup), desc="warm-up", unit="step", leave=False):
        pairs = []
        for row in rng.sample(train, 24):
            work, number = row["answer"].split("#### ")
            if step >= 0.75 * warmup and rng.random() > effort ** work.count("="):
                work, number = "", work.split()[1]
            told = f"{work}\\boxed{{{number}}}<|im_end|>"
            pairs.append((row["question"] + tail, told))
        batch = tokenizer(pairs, padding=True, return_token_type_ids=True, return_tensors="pt")
        cache = model.base_model(prefix, use_cache=True)[1]  # once for all: they begin alike
        cache.batch_repeat_interleave(len(pairs))
        ids, learnt = batch["input_ids"], batch["token_type_ids"] > 0
        model(ids, None, None, cache, labels=ids.where(learnt, -100)).loss.backward()
        for part in (muon, adamw, *decay):
            part.step()
        model.zero_grad()
    aside = folder.with_name(f"{folder.name}-{os.getpid()}")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    write(aside / "test.jsonl", test)
    write(aside / "train.jsonl", train)
    if not folder.is_dir():  # another process may have made the same world meanwhile
        aside.rename(folder)


# --- Train, evaluate, checkpoint ------------------------------------------------------------------
def load_model(name, device):
    """Model and tokenizer. Weights float32, passes bfloat16 on a GPU that has it; no dropout."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        # tokenizer.json as it is: AutoTokenizer swaps in its own splitting rules for some models.
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    except Exception as error:  # the hub fails in too many ways to list
        hint = "check name and network, name a local folder, or run --preset tiny"
        raise ValueError(f"cannot load --model {name}: {hint} ({error!r:.300})") from error
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        for part in (model.base_model, model.get_output_embeddings()):
            part.forward = torch.autocast("cuda", torch.bfloat16)(part.forward)
    return model.to(device).eval(), tokenizer


def evaluate(model, tokenizer, problems, config):
    """Greedy accuracy with its 95% Wilson interval, and the share of completions with an answer."""
    texts, size = [], config.prompts_per_step * config.completions_per_prompt
    for k in tqdm(range(0, len(problems), size), desc="evaluating", leave=False):
        prompts = [problem["prompt"] for problem in problems[k : k + size]]
        texts += generate(model, tokenizer, prompts, config).texts
    n, right = len(problems), sum(reward(t, p["answer"]) for t, p in zip(texts, problems))
    share, zz = right / n, 1.96**2 / n
    half = 1.96 * math.sqrt(share * (1 - share) / n + zz / n / 4)
    low, high = ((share + zz / 2 + side * half) / (1 + zz) for side in (-1, 1))
    answered = sum(extract_answer(text) is not None for text in texts) / n
    return {"eval_accuracy": share, "eval_low": low, "eval_high": high, "eval_format": answered}


def spearman(x, y):
    """Spearman's rank correlation, where ties share their mean rank; 0 if x or y is constant."""
    find = torch.searchsorted
    ranks = [find(v.msort(), v) + find(v.msort(), v, right=True) for v in (x, y)]
    return torch.corrcoef(torch.stack(ranks).double())[0, 1].nan_to_num().item()


def write(path, content):
    """Replace a file, whole or not at all: a list by JSON lines, anything else by torch.save."""
    aside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            aside.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            torch.save(content, aside)
        aside.replace(path)
    except Exception as error:  # a full disk is another error in each library
        aside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: make room, then --resume ({error!r:.300})") from error


def train(config):
    """Score, rank, train, evaluate; returns what summary.json holds. ValueError for bad input,
    OSError for a failed write, FloatingPointError for a loss not finite, KeyboardInterrupt."""
    began, arm, size = time.perf_counter(), config.curriculum, config.completions_per_prompt
    run, device = Path(config.run_dir), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not config.resume and run.exists() and any(run.iterdir()):
        raise ValueError(f"{run} holds a run: go on with --resume {run}, or name another --run-dir")
    print(f"preset {config.preset}, curriculum {arm}, seed {config.seed}, on {device}")
    if config.preset == "tiny":
        torch.set_num_threads(1)  # its matrices are too small to share, and idle threads spin
    if TINY_WORLD in (config.model, config.dataset):
        make_tiny_world(TINY_WORLD)
    model, tokenizer = load_model(config.model, device)
    reference = load_model(config.model, device)[0] if config.kl else None
    longest = getattr(model.config, "max_position_embeddings", math.inf) - config.max_new_tokens
    problems = load_problems(tokenizer, config.dataset, "train", longest)
    tests = load_problems(tokenizer, config.dataset, "test", longest)[: config.eval_examples]
    data = hashlib.sha256(repr(problems + tests).encode()).hexdigest()
    settings = asdict(config) | {"device": device.type, "data set": data}
    state, path = None, run / "checkpoint" / "state.pt"
    if config.resume and path.exists():  # otherwise it was stopped before its first checkpoint
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            differ = {k for k, v in settings.items() if state["config"].get(k) != v}
        except Exception as error:  # a damaged file fails in too many ways to list
            raise ValueError(f"{path} is damaged: remove to start over ({error!r:.300})") from error
        if differ := differ - {"steps", "run_dir", "resume"}:
            raise ValueError(f"{path} has another {', '.join(sorted(differ))}: leave it as it was")
    clock, asked = time.perf_counter(), [p["question"] for p in problems]
    scores = Scores(*state["scores"]) if state else score_prompts(model, tokenizer, asked, config)
    # The arms differ in what is sorted (length: short first), and `uniform` in an endless Gaussian.
    chance = torch.randperm(len(problems), generator=torch.Generator().manual_seed(config.seed))
    sort_by = {"length": -scores.tokens, "shuffled": chance}.get(arm, scores.angle)
    shape = {"step": config.curriculum_step, "seed": config.seed}
    shape["sigma"] = math.inf if arm == "uniform" else config.sigma
    curriculum = GaussianCurriculum(sort_by, config.prompts_per_step, **shape)
    write(run / "config.json", [asdict(config)])  # from here on, --resume goes on
    table = zip((p["index"] for p in problems), *(column.tolist() for column in scores))
    write(run / "scores.jsonl", [dict(zip(("index", *Scores._fields), row)) for row in table])
    by_length = spearman(curriculum.order.argsort(), scores.tokens)
    took = f"{time.perf_counter() - clock:.1f} s; Spearman of rank and length {by_length:.2f}"
    print(f"scored and ranked {len(problems)} questions in {took}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    generator, step = torch.Generator(device).manual_seed(config.seed), 0
    parts = {"model": model, "optimizer": optimizer, "curriculum": curriculum}
    logs = {"metrics": [], "samples": []}
    if state:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        step, logs, began = state["step"], state["logs"], began - state["seconds"]
    # Ctrl-C lets the step at hand finish; a second one stops at once.
    stop, plain = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda *_: stop.append(signal.signal(signal.SIGINT, plain)))
    bar = tqdm(total=config.steps, initial=step, unit="step")
    while config.steps:  # with --steps 0, only scores and ranks
        last = step >= config.steps
        evaluated = "eval_accuracy" in (logs["metrics"] or [{}])[-1]  # before it was stopped
        if (step % config.eval_every == 0 or last) and not evaluated:
            logs["metrics"].append({"step": step, **evaluate(model, tokenizer, tests, config)})
            tqdm.write(f"step {step}: {RESULT.format(**logs['metrics'][-1])}")
        for name, rows in logs.items():
            write(run / f"{name}.jsonl", rows)
        if step % config.checkpoint_every == 0 or last or stop:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "config": settings, "logs": logs, "scores": list(scores)}
            state |= {"seconds": time.perf_counter() - began, "generator": generator.get_state()}
            write(path, state)
        if last or stop:
            break
        step, clock = step + 1, time.perf_counter()
        batch = [problems[k] for k in curriculum.sample()]
        done = generate(model, tokenizer, [p["prompt"] for p in batch], config, size, generator)
        gold = [p["answer"] for p in batch for _ in range(size)]
        rewards = torch.tensor([reward(*pair) for pair in zip(done.texts, gold)]).view(-1, size)
        advantages = group_advantages(rewards).flatten().to(device)
        tokens, accuracy = done.mask.sum().item(), rewards.mean().item()
        row = {"step": step, "reward": accuracy, "accuracy": accuracy, "angle": done.angle}
        row |= grpo_update(model, reference, optimizer, done, advantages, config)
        row |= {"mean": curriculum.mean, "completion_length": tokens / len(done.ids)}
        row["useful_groups"] = (rewards.amax(1) > rewards.amin(1)).float().mean().item()
        row["seconds"] = time.perf_counter() - clock
        curriculum.update(accuracy, done.angle)
        logs["metrics"].append(row | {"tokens_per_second": tokens / row["seconds"]})
        bar.update()
        bar.set_postfix(accuracy=accuracy, mean=curriculum.mean, loss=row["loss"])
        if step % config.eval_every == 0:
            tried = [*zip(done.texts[:size], rewards[0].tolist())]
            row = {"step": step, "question": batch[0]["question"], "completions": tried}
            logs["samples"].append(row)
    bar.close()
    signal.signal(signal.SIGINT, plain)
    if stop and step < config.steps:
        raise KeyboardInterrupt
    summary = {"preset": config.preset, "curriculum": arm, "seed": config.seed, "steps": step}
    summary |= {"seconds": time.perf_counter() - began, "rank_length_correlation": by_length}
    summary |= {"accuracy_before": None, "accuracy_after": None}
    results = [row for row in logs["metrics"] if "eval_accuracy" in row]
    for when, row in zip(("before", "after"), results[:1] + results[-1:]):
        print(f"{when:7}{row['step']:5} steps: {RESULT.format(**row)}")
        summary[f"accuracy_{when}"] = row["eval_accuracy"]
    write(run / "summary.json", [summary])
    return summary


def main(argv=None):
    """The command line; its status is 2 for what could not be done, and 130 after Ctrl-C."""
    parser = transformers.HfArgumentParser(Config, usage="gainrl.py [options]", allow_abbrev=False)
    transformers.utils.logging.disable_progress_bar()
    resume = parser.parse_args(argv).resume
    try:
        if resume:
            try:
                parser.set_defaults(**json.loads(Path(resume, "config.json").read_text()))
            except (OSError, ValueError) as error:
                raise ValueError(f"--resume {resume} names no run: start one ({error})") from error
        config = Config(**vars(parser.parse_args(argv)))
        train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        tqdm.write(f"gainrl.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        tqdm.write(f"stopped: once scored, --resume {config.run_dir} goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
