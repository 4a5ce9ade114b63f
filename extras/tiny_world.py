"""Make a tiny world: a folder with a small chat model, its tokenizer and a data set.

The model is a Qwen2 with 135,000 parameters. The data set has the fields of GSM8K: short stories
about adding and subtracting, with worked answers. Together they stand in for a pretrained model and
GSM8K, so that `python gainrl.py` trains in seconds on a laptop. gainrl.py loads the folder like any
other model and data set.

A warm-up plays the role of pretraining. It teaches the model two ways to answer: to solve a
problem step by step, or to guess. GRPO can then reinforce the better one.

    python -m extras.tiny_world FOLDER [--seed S] [--distractors D] [--filler F] [--effort E]
                                       [--warmup STEPS] [--opening TEXT] [--n-train N] [--n-test N]

It takes about two minutes. The shipped folder, extras/tiny-world/, was made with

    python -m extras.tiny_world extras/tiny-world --effort 0.2

CPUs round differently, and the warm-up amplifies the differences: the same command on another CPU
makes another model. That is why the folder is shipped.
"""

import argparse
import json
import os
import random
import shutil
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from extras.common import run_command
from gainrl import build_messages, encode_prompts, run_backbone

NAMES = ["Ann", "Ben", "Cid", "Dee", "Eve", "Fay", "Gus", "Hal"]
THINGS = ["apples", "birds", "cards", "dolls", "eggs", "figs"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
LOSES = ["loses", "sells"]
GAINS = ["gets", "finds"]
LARGEST = 20  # every number is between 0 and LARGEST, and has its own token
WARM_UP_BATCH = 24
ROPE_THETA = 1000.0
IGNORED = -100  # cross_entropy ignores targets of this value
PAD, END, BEGIN = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)


def make_tiny_world(
    folder,
    distractors=5,
    filler=0,
    warmup=450,
    effort=0.75,
    seed=0,
    opening="",
    n_train=2000,
    n_test=1000,
):
    """Write train.jsonl, test.jsonl, a warmed-up model and its tokenizer to `folder`.

    If the folder exists, do nothing. distractors, filler: see tiny_problem. warmup: the number of
    warm-up steps. effort, opening: see warm_up. seed: for the problems, the initial weights and
    the warm-up."""
    folder = Path(folder)
    if folder.is_dir():
        return
    print(f"making the tiny world {folder}: data, model and {warmup} warm-up steps")
    rng = random.Random(seed)
    problems = {}  # keyed by question, so that no question is in both splits
    while len(problems) < n_train + n_test:
        problem = tiny_problem(rng, distractors, filler)
        problems[problem["question"]] = problem
    problems = list(problems.values())
    train_rows, test_rows = problems[:n_train], problems[n_train:]
    tokenizer = tiny_tokenizer(train_rows, opening)
    torch.manual_seed(seed)
    model = tiny_model(len(tokenizer))
    warm_up(model, tokenizer, train_rows, rng, warmup, effort, opening)

    # Write next to the target, then rename: a kill never leaves half a folder.
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    add_names_of_transformers_4(temporary)
    for name, rows in (("train", train_rows), ("test", test_rows)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (temporary / f"{name}.jsonl").write_text(lines)
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)  # another process has made this world in the meantime


def tiny_problem(rng, distractors=5, filler=0):
    """A problem of one to six steps, with the fields of GSM8K.

    Distractors are sentences about other people. They make the question longer without adding
    steps. A problem gets up to `distractors` of them, plus `filler` for each step it has fewer than
    six. With filler=1 all problems are about equally long. With filler=2 the problems with the
    fewest steps are the longest."""
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


def tiny_tokenizer(problems, opening=""):
    """A word-level tokenizer: every word, number and punctuation mark in the problems, the prompt
    and the opening gets its own token. Spaces are dropped."""
    tokens = tokenizers.Regex(r"\\boxed\{|[0-9]+|\w+|[^\w\s]")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=PAD))
    # With invert=True the regex matches the tokens, and what is between them is removed.
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokens, "removed", invert=True)
    texts = [f"{problem['question']} {problem['answer']}" for problem in problems]
    texts += [f"{message['role']} {message['content']}" for message in build_messages(".")]
    trainer = tokenizers.trainers.WordLevelTrainer(
        special_tokens=[PAD, END, BEGIN], show_progress=False
    )
    words.train_from_iterator([*texts, opening], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END)
    tokenizer.pad_token = PAD
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def add_names_of_transformers_4(folder):
    """Let transformers 4.57 read the folder too: it knows other names for two settings. Without
    rope_theta it would not complain, but run the model with a wrong base."""
    for name, key, value in (
        ("tokenizer_config.json", "tokenizer_class", "PreTrainedTokenizerFast"),
        ("config.json", "rope_theta", ROPE_THETA),
    ):
        settings = json.loads((folder / name).read_text()) | {key: value}
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")


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
        rope_parameters={"rope_theta": ROPE_THETA},
    )
    return transformers.Qwen2ForCausalLM(config)


def warm_up(model, tokenizer, problems, rng, steps, effort, opening=""):
    """Teach the model both to solve problems and to guess.

    These are supervised steps on worked solutions. In the last quarter, a problem with n steps
    keeps its solution with probability effort**n. Otherwise the target is a guess: the number the
    story starts with, which is mostly wrong. So the model learns to guess more often when a problem
    has more steps.

    opening: a few words that begin every completion, worked or guessed. The first token then does
    not show which of the two will follow."""
    questions = [problem["question"] for problem in problems]
    encoded = list(zip(encode_prompts(tokenizer, questions), problems))
    first = encoded[0][0]
    prefix = torch.tensor([first.ids[: first.start]])  # the same for all questions
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    # AdamW alone needs three times the steps, and Muon with the usual momentum (0.95) 1.5 times.
    optimizers = [
        torch.optim.Muon(matrices, 0.02, weight_decay=0.0, momentum=0.8),
        torch.optim.AdamW(others, 3e-3, weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, steps) for o in optimizers]
    for step in tqdm(range(steps), desc="warm-up", unit="step", leave=False):
        ids, targets = [], []
        for prompt, problem in rng.sample(encoded, WARM_UP_BATCH):
            solution, number = problem["answer"].split("#### ")
            n_steps = solution.count("=")
            if step >= 0.75 * steps and rng.random() > effort**n_steps:
                solution, number = "", solution.split()[1]
            completion = f"{opening} {solution}\\boxed{{{number}}}{END}"
            completion_ids = tokenizer(completion)["input_ids"]
            question_ids = prompt.ids[prompt.start :]  # with the end of the turn
            ids.append(torch.tensor(question_ids + completion_ids))
            targets.append(torch.tensor([IGNORED] * len(question_ids) + completion_ids))
        ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
        targets = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        _, cache = run_backbone(model, prefix)  # run once, then copied for every row
        cache.batch_repeat_interleave(len(ids))
        hidden, _ = run_backbone(model, ids, cache=cache)
        logits = model.lm_head(hidden)
        targets = F.pad(targets, (0, 1), value=IGNORED)[:, 1:]  # each token predicts the next one
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        for part in (*optimizers, *schedules):
            part.step()
        model.zero_grad()


def main():
    parser = argparse.ArgumentParser(
        prog="python -m extras.tiny_world",
        description=__doc__.partition("\n")[0],
        argument_default=argparse.SUPPRESS,  # the defaults are those of make_tiny_world
    )
    parser.add_argument("folder", help="nothing happens if it exists")
    parser.add_argument("--distractors", type=int, help="most distractors in a problem (5)")
    parser.add_argument("--filler", type=int, help="more of them per step short of six (0)")
    parser.add_argument("--warmup", type=int, help="warm-up steps (450)")
    parser.add_argument("--effort", type=float, help="lower: more guessing (0.75)")
    parser.add_argument("--seed", type=int, help="random seed (0)")
    parser.add_argument("--opening", help="words that begin every completion (none)")
    parser.add_argument("--n-train", type=int, help="training problems (2000)")
    parser.add_argument("--n-test", type=int, help="test problems (1000)")
    torch.set_num_threads(1)  # the matrices are too small to share between threads
    make_tiny_world(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_command(main, "extras.tiny_world")
