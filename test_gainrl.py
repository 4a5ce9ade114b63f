"""What gainrl.py promises, each promise checked against an independent oracle.

The largest oracle is the naive run of section 8: a second implementation of the whole method. No
expected value was recorded from the code under test.

    python -m pytest -q test_gainrl.py        a minute or two; no GPU, no network"""

import concurrent.futures
import copy
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import asdict, fields
from decimal import Decimal
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import gainrl
from extras.tiny_world import BEGIN, CHAT_TEMPLATE, END, PAD

torch.set_num_threads(1)  # as the tiny preset does: on busy cores, waiting threads spin
SHARED = Path(__file__).resolve().parent.parent / "shared"
WORLD = gainrl.find_folder(gainrl.TINY_WORLD)
ROOT = Path(gainrl.__file__).parent
README = (ROOT / "README.md").read_text()
QUESTIONS = [
    "Ann has 3 apples and buys 4 more. How many apples has she?",
    "What is 2+2?",  # the prefix's own example
    "assistant",  # a word of the template
    "A box holds 12 pens. How many pens do 5 boxes hold?",
    "Größe in 東京: 5 😀 plus 7 👩‍👩‍👧 — how many?",
    "x",
]
NAN, INF = math.nan, math.inf
END_TOKENS = list(range(1, 400, 9))  # many, so that a random model soon stops
RANDOM_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # makes the next-token distribution far from flat
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def random_model(vocab_size, seed=0, family="Qwen2", **settings):
    """A small model with random weights."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(vocab_size=vocab_size, **{**RANDOM_MODEL, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bpe_tokenizer(template=CHAT_TEMPLATE, splits=True, pad=PAD, end=END):
    """A byte-level BPE tokenizer, as real models have. With splits=False its tokens may cross words
    and line ends, so a token can hold the end of the prefix and the start of the question."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    core.pre_tokenizer = byte_level
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[PAD, END, BEGIN],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    texts = ["user\n" + text + "\n" for text in QUESTIONS * 3 + [gainrl.SYSTEM_PROMPT]]
    core.train_from_iterator(texts, trainer)
    # Like many tokenizers, it adds a token to each text. A rendered chat has its own.
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, chat_template=template
    )


TOKENIZER, CROSSING_TOKENIZER = bpe_tokenizer(), bpe_tokenizer(splits=False)
PROMPTS = gainrl.encode_prompts(TOKENIZER, QUESTIONS)
# Three models that all tests share and none trains. Completions of the second one end early.
MODEL = random_model(len(TOKENIZER))
STOPPING_MODEL = random_model(len(TOKENIZER), eos_token_id=END_TOKENS)
SKILLED_MODEL, WORLD_TOKENIZER = gainrl.load_model(gainrl.TINY_WORLD, "cpu")


def tiny_config(**settings):
    return gainrl.Config(**{"preset": "tiny", **gainrl.PRESETS["tiny"], **settings})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spy(monkeypatch, name):
    """A list that collects the positional arguments of every later call of gainrl.<name>."""
    calls, function = [], getattr(gainrl, name)

    def wrapper(*inputs, **named):
        calls.append(inputs)
        return function(*inputs, **named)

    monkeypatch.setattr(gainrl, name, wrapper)
    return calls


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- 1. The closed form against all token pairs ---------------------------------------------------


def cosine_means(hidden, prefix_mask, question_mask):
    """C_intra and C_inter of one row as the paper defines them, with one cosine per token pair."""
    x = hidden.double()

    def mean_cosine(first, second):
        pairs = itertools.product(first.nonzero().flatten(), second.nonzero().flatten())
        cosines = [F.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs]
        return sum(cosines) / len(cosines) if cosines else 0.0

    return mean_cosine(question_mask, question_mask), mean_cosine(question_mask, prefix_mask)


def ragged_rows():
    """Rows with a prefix and a question, padded on both sides with NaN. The third question has one
    token, and the last row has no prefix."""
    hidden = torch.randn(4, 14, 6, generator=seeded()) + 0.5
    position, spans = torch.arange(14), torch.tensor([(0, 4, 14), (3, 5, 11), (2, 8, 9), (3, 3, 8)])
    start, middle, end = spans.T[..., None]
    prefix_mask = (start <= position) & (position < middle)
    question_mask = (middle <= position) & (position < end)
    hidden[~(prefix_mask | question_mask)] = math.nan
    return hidden, prefix_mask, question_mask


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_closed_form_is_the_mean_over_all_token_pairs(dtype, mask_dtype):
    hidden, *masks = ragged_rows()
    hidden = hidden.to(dtype)
    hidden[1, 6] = 0  # a zero vector has cosine 0 with every vector, including itself
    intra, inter = gainrl.angle_concentration(hidden, *[mask.to(mask_dtype) for mask in masks])
    assert intra.dtype == inter.dtype == torch.float32
    assert intra.shape == inter.shape == (4,)
    for row in range(4):
        expected = cosine_means(hidden[row], *[mask[row] for mask in masks])
        assert (intra[row].item(), inter[row].item()) == pytest.approx(expected, abs=1e-6)
    masks[1][1] = False
    with pytest.raises(ValueError, match="row 1 has no question token"):
        gainrl.angle_concentration(hidden, *masks)


def test_equal_vectors_have_a_concentration_of_at_most_one():
    """Rounded sums of many equal unit vectors are longer than their number."""
    hidden = torch.randn(50, 1, 64, generator=seeded()).expand(-1, 300, -1)
    is_question = (torch.arange(300) >= 100).expand(50, -1)
    for values in gainrl.angle_concentration(hidden, ~is_question, is_question):
        assert values.max() == 1


# --- 2. Prompts and scores ------------------------------------------------------------------------

# Each template, what it makes of a turn's role and content, and how it opens the completion.
EACH = "{% for m in messages %}"
EACH_BUT_SYSTEM = "{% for m in messages if m.role != 'system' %}"
TURN = EACH + "[{{ m.role }}]{{ m.content | trim }}{% endfor %}[assistant]"
NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
THINKING = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
TEMPLATES = {
    "ChatML": (CHAT_TEMPLATE, "<|im_start|>{}\n{}<|im_end|>\n", "<|im_start|>assistant\n"),
    "rejects the system role": (TURN.replace(EACH, EACH + NO_SYSTEM), "[{}]{}", "[assistant]"),
    "drops the system role": (TURN.replace(EACH, EACH_BUT_SYSTEM), "[{}]{}", "[assistant]"),
    "thinks unless told not to": (TURN + THINKING, "[{}]{}", "[assistant]<think></think>"),
}


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CROSSING_TOKENIZER], ids=["plain", "crossing"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_rendered_chat_and_its_span_holds_just_the_question(name, tokenizer):
    """Checked on the decoded text: the span contains the question, and one token less on either
    side does not."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, turn, opening = TEMPLATES[name]
    system, example = gainrl.SYSTEM_PROMPT, "What is 2+2?"
    head = turn.format("system", system) + turn.format("user", example)
    if "system role" in name:
        head = turn.format("user", f"{system}\n\n{example}")
    head += turn.format("assistant", gainrl.EXAMPLE_ANSWER)
    head, tail = (head + turn.format("user", "Q") + opening).split("Q")
    for question in QUESTIONS:
        (prompt,) = gainrl.encode_prompts(tokenizer, [question])
        assert gainrl.encode_prompts(tokenizer, [f" {question}\n"]) == [prompt]
        ids, start, end = prompt
        assert tokenizer.decode(ids) == head + question + tail
        assert question in tokenizer.decode(ids[start:end])
        assert question not in tokenizer.decode(ids[start + 1 : end])
        assert question not in tokenizer.decode(ids[start : end - 1])
        # The first token of the question may also hold the end of the prefix.
        assert tokenizer.decode(ids[: start + 1]).startswith(head)


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "no usable chat template"),
        ("{{ messages[0].content }}", "drops or repeats the question"),
        (CHAT_TEMPLATE + "{{ messages[-1].content }}", "drops or repeats the question"),
        ("{{ messages[-1].content }}", "chat template"),  # drops the system prompt
    ],
)
def test_a_template_that_does_not_give_the_chat_is_refused(template, reason):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        gainrl.encode_prompts(tokenizer, ["How many x?"])


@pytest.mark.parametrize("tokenizer", [TOKENIZER, CROSSING_TOKENIZER], ids=["plain", "crossing"])
def test_scores_with_a_reused_prefix_are_those_of_whole_prompts_run_alone(tokenizer):
    model = random_model(len(tokenizer))
    same_length = ["Cid has 5 cards.", "Dee has 6 eggs.", "Eve has 7 figs."]
    prompts = gainrl.encode_prompts(tokenizer, same_length + QUESTIONS)
    scores = gainrl.score_prompts(model, prompts, batch_size=2)
    for row, (ids, start, end) in enumerate(prompts):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        token = torch.arange(len(ids))
        intra, inter = cosine_means(hidden, token < start, (start <= token) & (token < end))
        found = [column[row].item() for column in scores]
        assert found == pytest.approx([intra, inter, intra + inter, end - start], abs=1e-5)


def test_scoring_runs_the_prefix_once_and_neither_the_head_nor_the_end_of_the_prompt(monkeypatch):
    calls, model = spy(monkeypatch, "run_backbone"), copy.deepcopy(MODEL)
    model.lm_head.register_forward_hook(lambda *call: pytest.fail("the head was run"))
    gainrl.score_prompts(model, PROMPTS)
    start = PROMPTS[0].start
    assert calls[0][1].shape == (1, start)
    n_tokens = sum(ids.numel() for _, ids in calls[1:])
    assert n_tokens == sum(prompt.end - start for prompt in PROMPTS)


# --- 3. Scores and gradient norms: what is exact, what is measured, what fails --------------------
# Exact: for Y = X W, |dL/dW|^2 is the sum of (x_i . x_j)(g_i . g_j) over all token pairs. Here g_i
# is the upstream gradient dL/dy_i.


def pair_sum(x, g):
    pairs = itertools.product(range(len(x)), repeat=2)
    return sum((x[i] @ x[j]) * (g[i] @ g[j]) for i, j in pairs)


def c_intra(x):
    ones = torch.ones(1, len(x))
    return gainrl.angle_concentration(x[None], 0 * ones, ones)[0].item()


def test_exact_the_language_model_gradient_of_a_real_head_is_the_double_sum():
    ids = TOKENIZER(QUESTIONS[0], return_tensors="pt")["input_ids"]
    x = MODEL.base_model(input_ids=ids).last_hidden_state[0].detach()
    y = MODEL.lm_head(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(y[:-1], ids[0, 1:]), y)
    loss = MODEL(input_ids=ids, labels=ids).loss  # the model's own loss
    (gradient,) = torch.autograd.grad(loss, MODEL.lm_head.weight)
    torch.testing.assert_close(gradient.square().sum(), pair_sum(x, g))


def test_exact_at_the_head_no_question_token_has_an_upstream_gradient_under_grpo():
    """Only the positions that predict completion tokens carry loss. So at the output head g is 0 at
    every token that C looks at, and C's pairs drop out of that layer's double sum."""
    prompt, config = PROMPTS[0], tiny_config(max_new_tokens=6)
    rollout = gainrl.generate(STOPPING_MODEL, TOKENIZER, [prompt], config, 1, seeded(3))
    last, ids = len(prompt.ids) - 1, rollout.ids[rollout.attention_mask]
    x = STOPPING_MODEL.base_model(input_ids=ids[None]).last_hidden_state[0].detach()
    y = STOPPING_MODEL.lm_head(x).detach().requires_grad_()  # of all positions
    logprobs = y[:-1].log_softmax(-1).gather(1, ids[1:, None])[last:].T
    mask = torch.ones_like(logprobs)
    loss, _ = gainrl.grpo_loss(logprobs, logprobs.detach(), torch.ones(1), mask)
    (g,) = torch.autograd.grad(loss, y)
    norms = g.norm(dim=1).tolist()
    print(f"|g| of the prompt: {max(norms[:last])}; before completion tokens: {norms[last:]}")
    assert len(norms) > last + 3 and prompt.end <= last
    assert set(norms[:last]) == {0.0} and min(norms[last:-1]) > 0


@pytest.mark.parametrize(
    "x, g, concentration, squared_norm",
    [
        ([[1, 0], [1, 0]], [[1, 0], [1, 0]], 1.0, 4.0),  # one shared g: T^2 |g|^2 C_intra
        ([[1, 0], [1, 0]], [[1, 0], [-1, 0]], 1.0, 0.0),  # the highest C and no gradient
        ([[1, 0], [0, 1]], [[1, 0], [-1, 0]], 0.5, 2.0),  # a lower C and a larger gradient
        ([[9, 0], [0, 9]], [[1, 0], [-1, 0]], 0.5, 162.0),  # C does not see lengths
    ],
)
def test_fails_c_is_not_a_gradient(x, g, concentration, squared_norm):
    """C knows only the directions of x. Upstream gradients and lengths decide as well."""
    x, g = torch.tensor(x).float(), torch.tensor(g).float()
    W = torch.randn(2, 2, requires_grad=True)
    (x @ W * g).sum().backward()
    assert c_intra(x) == pytest.approx(concentration)
    assert W.grad.square().sum().item() == pair_sum(x, g).item() == pytest.approx(squared_norm)


# --- 4. The curriculum ----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [6.0, math.inf])  # infinite: a uniform draw
def test_probabilities_are_a_gaussian_over_ranks_and_first_draws_follow_them(sigma):
    curriculum = gainrl.GaussianCurriculum(torch.rand(30), 1, sigma=sigma)
    curriculum.mean = 8.5
    density = [math.exp(-((rank - 8.5) ** 2) / (2 * sigma**2)) for rank in range(30)]
    expected = torch.tensor(density, dtype=torch.float64) / sum(density)
    assert curriculum.probabilities().dtype == torch.float64
    torch.testing.assert_close(curriculum.probabilities(), expected, rtol=1e-12, atol=0)
    drawn = torch.tensor([curriculum.sample()[0] for _ in range(5000)])
    counts = torch.bincount(drawn, minlength=30)[curriculum.order]
    margin = 5 * (5000 * expected * (1 - expected)).sqrt() + 1  # five standard deviations
    assert ((counts - 5000 * expected).abs() < margin).all()


def test_a_mean_far_from_all_ranks_still_fills_the_batches_of_a_data_loader():
    curriculum = gainrl.GaussianCurriculum(torch.rand(100), 40, sigma=1.0)
    curriculum.mean = 1e9
    probabilities = curriculum.probabilities()
    assert probabilities.isfinite().all() and probabilities.argmax() == 99
    loader = torch.utils.data.DataLoader(range(100), batch_sampler=curriculum)
    for batch in itertools.islice(loader, 20):  # more than an epoch: it has no end
        assert len(set(batch.tolist())) == 40


def test_the_mean_never_goes_back_stops_at_the_last_rank_and_ignores_invalid_updates():
    curriculum = gainrl.GaussianCurriculum(torch.rand(20), 4, stride=6.0)
    assert curriculum.update(0.0, -1.0) == 0
    means = [curriculum.update(1.0, 1e300) for _ in range(10)]
    assert means == sorted(means) and means[0] > 0 and means[-1] == 19
    for invalid in [(NAN, 0), (1.1, 0), (-0.1, 0), (0.5, NAN), (0.5, INF)]:
        with pytest.raises(ValueError):
            curriculum.update(*invalid)
    assert curriculum.update(0.0, -1.0) == curriculum.mean == 19


def test_after_load_state_dict_the_draws_continue():
    first, second = (gainrl.GaussianCurriculum(torch.rand(50), 8, seed=k) for k in range(2))
    first.sample(), first.update(0.7, 0.2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        assert first.sample() == second.sample()
        assert first.update(0.6, 0.1) == second.update(0.6, 0.1)


@pytest.mark.parametrize(
    "scores, batch_size, options, reason",
    [
        *[([0.1, bad, 0.3], 2, {}, "not finite") for bad in (NAN, INF, -INF)],
        *[([0.1, 0.2, 0.3], bad, {}, "3 questions") for bad in (0, 4)],
        *[([0.1, 0.2, 0.3], 2, {"stride": bad}, f"stride {bad}") for bad in (0, -1, NAN)],
        *[([0.1, 0.2, 0.3], 2, {"sigma": bad}, f"sigma {bad}") for bad in (0, -1, NAN)],
    ],
)
def test_invalid_arguments_of_the_curriculum_are_refused(scores, batch_size, options, reason):
    with pytest.raises(ValueError, match=reason):
        gainrl.GaussianCurriculum(scores, batch_size, **options)


def S(z):
    """tanh(z), written with the sigmoid as in the paper."""
    return 2 / (1 + math.exp(-2 * z)) - 1


def test_the_header_and_the_readme_show_the_defaults():
    config = asdict(gainrl.parse_config(["--preset", "gsm8k"]))
    rows = re.findall(r"^    \w+ .* (\w+) +([\d.]+)$", gainrl.__doc__, re.MULTILINE)
    shown = {name: float(value) for name, value in rows if name in config}
    names = ("prompts_per_step", "group_size", "max_new_tokens", "target_accuracy")
    assert shown == {name: config[name] for name in names}
    assert re.search("^    alpha, gamma .* 2, 2$", gainrl.__doc__, re.MULTILINE)
    names = ("alpha", "gamma", "lr", "kl_coef", "clip_eps", "updates", "steps")
    assert [config[name] for name in names] == [2, 2, 1e-6, 0.001, 0.2, 1, 200]
    text = " ".join(README.split())
    for phrase in ("32 questions a batch", "512 new tokens", "learning rate of 1e-6", "gamma = 2"):
        assert phrase in text


def test_n_and_sigma_are_500_and_1000_ranks_of_gsm8k_and_scale_with_the_data():
    assert "n = 500 and sigma = 1000 of GSM8K's 7,473 ranks" in " ".join(README.split())
    assert "500 ranks" in gainrl.__doc__ and "1000 ranks" in gainrl.__doc__
    for N in (7473, 747):
        curriculum = gainrl.GaussianCurriculum(torch.rand(N), 8)
        assert curriculum.sigma == pytest.approx(1000 * N / 7473)
        assert curriculum.update(0.8, 0.3) == pytest.approx(500 * N / 7473 * 2 * S(2 * 0.3))
    with pytest.raises(KeyError, match="angel"):
        gainrl.make_curriculum(tiny_config(curriculum="angel"), gainrl.Scores(*torch.rand(4, 40)))


# --- 5. Answers and rewards -----------------------------------------------------------------------

# `notation => number`, separated by two spaces. What is UNREAD means "no answer".
READ = r"""
42 => 42  0 => 0  007 => 7  9007199254740993 => 9007199254740993  0.1 => 0.1
-8.50 => -8.5  2.50 => 2.5  42. => 42  1,000. => 1000
1,000 => 1000  1{,}000 => 1000  -1,234,567.25 => -1234567.25
$12 => 12  \$12.50 => 12.5  -$7 => -7  -\$7 => -7  30% => 30  30\% => 30
"""
READ = [entry.split(" => ") for entry in re.split(r"  |\n", READ) if entry]
READ = {" 42\n": Decimal(42), **{notation: Decimal(number) for notation, number in READ}}
UNREAD = r"""
1,00  3,5  12,34,567  1000,000  1.000,00  1 000  1\,000  1'000  1.2.3  .5  5..  1e5  5²  \sqrt{4}
1/2  \frac{1}{2}  5!  2^3  5-3  40+2=42  x = -8  <5  ±5  5k  5 apples  5\text{ km/h}  5%%  $$5
3 to 5  3, 5  (1, 2)  3:30  1 2  5\\6  --8  +8  - 8  8-  -  −8  (8)  {8}  (8  five  #5  NaN  inf
\text{9}  "9"  ٣  ５  5٣  ⑤  .  $  ,  {}
"""
UNREAD = [notation for notation in re.split(r"  |\n", UNREAD) if notation]


@pytest.mark.parametrize("content, number", [*READ.items(), *[(row, None) for row in UNREAD]])
def test_a_bare_number_is_read_and_anything_else_is_no_answer(content, number):
    for text in (f"Thus \\boxed{{{content}}}, I say.", f"Work.\n#### {content}"):
        assert gainrl.extract_answer(text) == number
    gold = f"So \\boxed{{3}}.\n#### {content}"  # in a gold answer the box does not count
    assert gainrl.extract_answer(gold, is_gold=True) == number
    assert gainrl.reward(f"\\boxed{{{content}}}", gold) == (number is not None)


@pytest.mark.parametrize(
    "text, number",
    [
        ("\\boxed{1} no, \\boxed{2}", 2),  # the last box counts, and nothing replaces it
        ("\\boxed{1} no, \\boxed{2", None),
        ("\\boxed{1} is what stands in the \\boxed", None),
        ("\\boxed{3 oops. \\boxed{5}", 5),
        ("\\boxed{\\boxed{5}}", None),  # nested boxes
        ("\\boxed{2+\\boxed{5}}", None),
        ("\\boxed{\\boxed{5} + 1}", None),
        ("\\boxed{5}}", 5),
        ("\\boxed 5", None),
        ("\\boxed{1}\n#### 2", 1),  # #### counts only if there is no box
        ("\\boxed{}\n#### 2", None),
        ("#### 1\n####\n7", 7),
        ("#### 7\nand 8 pears", None),
        ("#### 7\n#### Step 3: check it", None),
        ("####", None),
        ("\ud800 \\boxed{7}", 7),
        ("", None),
    ],
)
def test_the_last_box_counts_or_else_the_text_after_the_last_hashes(text, number):
    assert gainrl.extract_answer(text) == number


def test_the_reward_is_one_for_the_right_number_and_missing_answers_never_agree():
    assert gainrl.reward("\\boxed{1,000.0}", "So she has 1000.\n#### 1,000") == 1.0
    for wrong in ("\\boxed{1001}", "\\boxed{-1000}", "\\boxed{1}", "\\boxed{1000.5}"):
        assert gainrl.reward(wrong, "#### 1000") == 0.0
    for missing in ["", "no idea", "\\boxed{}", "####"]:
        assert gainrl.reward(missing, missing) == gainrl.reward(missing, "#### 5") == 0.0


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not beside this checkout")
def test_collected_completions_are_never_misread_and_all_gold_answers_of_gsm8k_are_read():
    rows = read_rows(SHARED / "cases" / "answers.jsonl")
    for row in rows:
        number = gainrl.extract_answer(row["text"])
        assert number is None or number == Decimal(row["answer"]), row
    for split, n_rows in (("train", 7473), ("test", 1319)):
        answers = [row["answer"] for row in read_rows(SHARED / "gsm8k" / f"{split}.jsonl")]
        assert len(answers) == n_rows
        for answer in answers:
            plain = answer.rpartition("####")[2].replace(",", "").strip(" $")
            assert gainrl.extract_answer(answer, is_gold=True) == Decimal(plain)


STARTS = ["", "\\boxed", "\\boxed{", "\\boxed{5", "\\boxed{-", "{\\boxed{5}", "####", "#### 5"]
UNITS = [*"{}1#,.-$\\% a\n\ud800", "{}", "\\boxed", "\\boxed{", "\\boxed{1}"]
UNITS += ["#### ", "1,", ",000", "{,}000", "} ", " }", "1 ", "\\$"]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_no_text_however_odd_or_long_takes_long(unit):
    """100,000 characters take milliseconds. A pattern that backtracks would take minutes."""
    for start, end in itertools.product(STARTS, ["", "}", "!}"]):
        text = start + unit * (100_000 // len(unit)) + end
        began = time.perf_counter()
        gainrl.extract_answer(text)
        gainrl.extract_answer(text, is_gold=True)
        assert time.perf_counter() - began < 0.4, (start, end)


# --- 6. Loss, advantages, log-probabilities, sampling ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_an_infinity_behind_the_mask_affects_neither_loss_nor_gradient(dtype):
    """exp(200) is infinite in float32."""
    mask, old = torch.tensor([[1, 0]]).to(dtype), torch.tensor([[0.0, -200.0]])
    for reference in (None, torch.tensor([[0.0, 200.0]])):
        x = torch.zeros(1, 2, requires_grad=True)
        loss, stats = gainrl.grpo_loss(x, old, torch.ones(1), mask, 0.2, reference, kl_coef=1.0)
        loss.backward()
        assert loss.item() == -1 and x.grad.tolist() == [[-1, 0]]
        assert stats == {"kl": 0, "clip_fraction": 0}


def test_advantages_are_z_scores_within_each_group_and_exactly_zero_in_flat_groups():
    """0.1 has no exact mean: dividing by its rounding error would give noise of size one."""
    rewards = [[1.0, 0.0, 0.0, 0.0], [0.2, 0.3, 0.9, 0.1]]
    advantages = gainrl.group_advantages(torch.tensor(rewards))
    for row, group in zip(advantages.tolist(), rewards):
        mean = sum(group) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        assert row == pytest.approx([(r - mean) / deviation for r in group], rel=1e-5)
    for value in (0.0, 1.0, 0.1):
        assert (gainrl.group_advantages(torch.full((2, 7), value)) == 0).all()
    # A difference that float32 cannot see, and one whose square is 0.
    close = torch.tensor([[1.0, 1.0 + 1e-9], [0.0, 1e-200]], dtype=torch.float64)
    advantages = gainrl.group_advantages(close)
    assert advantages[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])
    assert advantages[1].isfinite().all()
    pair = gainrl.group_advantages(torch.tensor([[0, 1]]))  # integers
    assert pair.tolist() == [pytest.approx([-(0.5**0.5), 0.5**0.5])]


def test_the_logits_of_a_long_batch_are_not_kept_for_the_backward_pass(rollout, monkeypatch):
    monkeypatch.setattr(gainrl, "LOGIT_CHUNK", 8)
    shapes, length = [], rollout.completion_mask.shape[1]
    inputs = rollout.ids, rollout.attention_mask, length, 1.0, torch.arange(8) // 4
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: shapes.append(x.shape) or x, lambda x: x
    ):
        logprobs = gainrl.completion_logprobs(copy.deepcopy(STOPPING_MODEL), *inputs)
    assert logprobs.dtype == torch.float32 and rollout.completion_mask.sum() > 3 * 8
    assert len(shapes) > 20 and not any(shape[-1:] == (len(TOKENIZER),) for shape in shapes)


def test_finished_rows_leave_the_batch_and_a_cpu_uses_no_cuda_graph(monkeypatch):
    """The draws themselves are those of the naive run in section 8."""
    config = tiny_config(max_new_tokens=30, temperature=0.9)
    calls, decoded = spy(monkeypatch, "run_backbone"), spy(monkeypatch, "decode")
    rollout = gainrl.generate(STOPPING_MODEL, TOKENIZER, PROMPTS[:3], config, 4, seeded(4))
    assert len(decoded) == 1
    lengths, in_batch, sizes = rollout.completion_mask.sum(1), 12, []
    for n_tokens in range(1, 30):
        n_active = (lengths > n_tokens).sum().item()
        in_batch = n_active if n_active <= 7 / 8 * in_batch else in_batch
        sizes += [in_batch] if n_active else []
    assert [len(ids) for _, ids, *_ in calls] == [3, *sizes]
    assert len(set(sizes)) > 3


NO_MARKS = "{% for m in messages %}{{ m.content }} {% endfor %}"  # no special token ends a turn


@pytest.mark.parametrize(
    "of_generation, of_tokenizer, template, ends",
    [
        (1, END, CHAT_TEMPLATE, [1]),
        ([4, 5], END, CHAT_TEMPLATE, [1, 4, 5]),
        (0, PAD, CHAT_TEMPLATE, [0, 1]),  # a base model: only the template ends turns with 1
        (None, None, CHAT_TEMPLATE, [1]),
        (None, END, NO_MARKS, [1]),
    ],
)
def test_end_tokens_are_collected(of_generation, of_tokenizer, template, ends):
    tokenizer, model = bpe_tokenizer(template, end=of_tokenizer), copy.deepcopy(MODEL)
    model.generation_config.eos_token_id = of_generation
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS)
    assert gainrl.end_tokens(model, tokenizer, prompts[0]).tolist() == ends


def test_a_token_of_probability_zero_is_never_drawn(monkeypatch):
    """On MPS an exponential draw can be 0. 0/0 is NaN, which argmax would choose, and p/0 would beat
    all other tokens however small p is."""
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda draws, **options: draws.zero_())
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf], [0.0, -math.inf, -60.0, -9.0]])
    token = gainrl.next_token(logits, 1.0, seeded(), torch.arange(2), 2)
    assert token.tolist() == [[1], [0]]


def test_hidden_states_that_are_not_finite_stop_the_sampling():
    model = copy.deepcopy(MODEL)
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="new run with a lower --lr"):
        gainrl.generate(model, TOKENIZER, PROMPTS, tiny_config(max_new_tokens=2))


FAMILIES = ["Qwen2", "Qwen3", "Llama", "Mistral", "Phi3", "Olmo2", "SmolLM3", "StableLm"]
FAMILIES += ["GPT2", "GPTNeoX", "Bloom", "Starcoder2"]  # order their arguments differently
FAMILIES = {
    **{name: {} for name in FAMILIES},
    "Gemma3Text": {"sliding_window": 8},
    "GptOss": {"num_local_experts": 4, "sliding_window": 8},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_many_families_run_in_parts_as_in_one(family):
    """The oracle is the model's own forward pass over each whole row, alone."""
    model = random_model(len(TOKENIZER), family=family, **FAMILIES[family])
    gainrl.check_model(model, PROMPTS[0])  # compares log-probabilities
    rollout = gainrl.generate(model, TOKENIZER, PROMPTS[:3], tiny_config(max_new_tokens=5), 2)
    for ids, mask, in_completion in zip(*rollout[:3]):
        alone, n_tokens = ids[mask], in_completion.sum()
        greedy = model(input_ids=alone[None]).logits[0, -n_tokens - 1 : -1].argmax(-1)
        assert greedy.equal(alone[-n_tokens:])


# --- 7. The update --------------------------------------------------------------------------------


@pytest.fixture
def rollout():
    """Four completions of each of two prompts, of different lengths."""
    config = tiny_config(max_new_tokens=12)
    rollout = gainrl.generate(STOPPING_MODEL, TOKENIZER, PROMPTS[:2], config, 4, seeded(5))
    assert len(rollout.completion_mask.sum(1).unique()) > 2
    return rollout


ADVANTAGES = torch.randn(2, 4, generator=seeded(2))


def test_a_flat_batch_moves_the_weights_by_the_momentum_only(rollout):
    model, flat = copy.deepcopy(STOPPING_MODEL), torch.zeros(2, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    gainrl.grpo_update(model, None, optimizer, rollout, ADVANTAGES, tiny_config())
    by_hand, before = copy.deepcopy(model), copy.deepcopy(model)
    hand_optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.0)
    hand_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gainrl.grpo_update(model, None, optimizer, rollout, flat, tiny_config())
    for parameter in by_hand.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hand_optimizer.step()
    for a, b, old in zip(model.parameters(), by_hand.parameters(), before.parameters()):
        assert torch.equal(a, b) and not torch.equal(a, old)


def test_an_update_runs_active_rows_sorted_by_length_and_each_prompt_once(monkeypatch):
    """Three groups of four, one of them flat. Each micro-batch is as wide as its longest rows."""
    config = tiny_config(max_new_tokens=20, micro_batch=3)
    rollout = gainrl.generate(STOPPING_MODEL, TOKENIZER, PROMPTS[:3], config, 4, seeded(6))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(3, 1)
    advantages[1] = 0
    model, calls = copy.deepcopy(STOPPING_MODEL), spy(monkeypatch, "run_backbone")
    gainrl.compute_gradient(model, None, rollout, advantages, None, config)
    lengths = rollout.completion_mask.sum(1).tolist()
    active, expected = [0, 1, 2, 3, 8, 9, 10, 11], []
    active.sort(key=lambda row: lengths[row])
    for rows in (active[:3], active[3:6], active[6:]):
        prompts = [PROMPTS[group].ids for group in {row // 4 for row in rows}]
        expected += [(len(prompts), max(map(len, prompts))), (len(rows), lengths[rows[-1]])]
    assert [tuple(ids.shape) for _, ids, *_ in calls] == expected


def test_a_gradient_that_runs_out_of_memory_is_computed_in_smaller_micro_batches(
    rollout, monkeypatch, capsys
):
    """Simulated: up to `limit` rows fit at once. The tensors of a failed attempt must be gone."""
    completion_logprobs, failed = gainrl.completion_logprobs, []

    def limited(model, ids, *inputs):
        assert not any(reference() is not None for reference in failed)
        logprobs = completion_logprobs(model, ids, *inputs)
        if len(ids) > limit:
            failed.append(weakref.ref(logprobs))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logprobs

    monkeypatch.setattr(gainrl, "completion_logprobs", limited)
    results, steps = [], []
    for limit, micro_batch in ((8, 2), (3, 8)):
        model, config = copy.deepcopy(STOPPING_MODEL), tiny_config(micro_batch=micro_batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *inputs: steps.append(inputs))
        stats = gainrl.grpo_update(model, None, optimizer, rollout, ADVANTAGES, config)
        results.append([*map(torch.tensor, stats.values()), *model.parameters()])
    assert all(map(torch.equal, *results)) and config.micro_batch == 2 and len(steps) == 2
    assert re.findall(r"--micro-batch (\d)\n", capsys.readouterr().out) == ["4", "2"]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        gainrl.grpo_update(model, None, optimizer, rollout, ADVANTAGES, config)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(rollout):
    model = copy.deepcopy(STOPPING_MODEL)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="nan|inf"):
        gainrl.grpo_update(model, None, optimizer, rollout, ADVANTAGES, tiny_config())
    assert all(map(torch.equal, model.parameters(), STOPPING_MODEL.parameters()))


def test_weights_and_logits_stay_float32_under_bfloat16_products(rollout, monkeypatch):
    assert not gainrl.mixed_precision(torch.device("cpu"))._enabled
    dtypes, cross_entropy = [], F.cross_entropy
    monkeypatch.setattr(
        F, "cross_entropy", lambda x, *y, **z: dtypes.append(x.dtype) or cross_entropy(x, *y, **z)
    )
    norms, config = [], tiny_config(updates=2, kl_coef=0.1)
    for enabled in (False, True):
        context = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled)
        monkeypatch.setattr(gainrl, "mixed_precision", lambda device, new=context: new())
        model = copy.deepcopy(STOPPING_MODEL)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        inputs = model, STOPPING_MODEL, optimizer, rollout, ADVANTAGES, config
        norms.append(gainrl.grpo_update(*inputs)["grad_norm"])
        assert not torch.equal(model.lm_head.weight, STOPPING_MODEL.lm_head.weight)
    assert norms[0] != norms[1] == pytest.approx(norms[0], rel=0.1)
    assert set(dtypes) == {torch.float32}
    assert all(weight.grad is None for weight in STOPPING_MODEL.parameters())  # the reference


# --- 8. Whole runs --------------------------------------------------------------------------------
# The naive run: GAIN-RL without engineering. It takes one prompt and one completion at a time, and
# has no cache, padding, masks, chunks or micro-batches. With gainrl.py it shares the tokenizer, the
# chat template and the recipe of the random draws. Whatever gainrl.train wires together must agree
# with it: every row of every log, and the weights after the last update.


def naive_prompt(tokenizer, question):
    """ids, start, end: the question is ids[start:end], and ids[:start] is the prefix."""
    roles = ("system", "user", "assistant", "user")
    words = (gainrl.SYSTEM_PROMPT, gainrl.EXAMPLE_QUESTION, gainrl.EXAMPLE_ANSWER, question)
    turns = [{"role": role, "content": content} for role, content in zip(roles, words)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    prefix = text[: text.rindex(question)]
    parts = (text, prefix, prefix + question)
    ids, start, end = (tokenizer.encode(x, add_special_tokens=False) for x in parts)
    return ids, len(start), len(end)


def naive_concentration(model, prompt):
    """Section 3: C_intra and C_inter are means over the T x T matrix of cosines."""
    ids, start, end = prompt
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    x = states[-1][0]  # after the final norm
    cosines = F.cosine_similarity(x[:, None], x[None], dim=-1)
    return cosines[start:end, start:end].mean().item(), cosines[start:end, :start].mean().item()


def naive_draw(order, mean, sigma, P, generator):
    """Section 4: P questions from a Gaussian over the ranks, without replacement. These are the
    largest values of log p(rank) - log E, with E from Exponential(1)."""
    E = torch.empty(len(order), dtype=torch.float64).exponential_(generator=generator).tolist()
    keys = [-((k - mean) ** 2) / (2 * sigma**2) - math.log(E[k]) for k in range(len(order))]
    return [order[k] for k in sorted(range(len(order)), key=lambda k: -keys[k])[:P]]


@torch.no_grad()
def naive_completions(model, prompts, config, ends, generator=None):
    """The tokens after each prompt, up to an end token or L tokens: greedy without a generator."""
    rows = [[] for _ in prompts]
    for _ in range(config.max_new_tokens):
        live = [k for k, row in enumerate(rows) if not (row and row[-1] in ends)]
        if not live:
            break
        p = torch.ones(len(rows), model.config.vocab_size)  # finished rows draw too, for nothing
        for k in live:
            logits = model(input_ids=torch.tensor([prompts[k][0] + rows[k]])).logits[0, -1]
            p[k] = (logits / config.temperature).softmax(-1)
        tokens = p.multinomial(1, generator=generator)[:, 0] if generator else p.argmax(-1)
        for k in live:
            rows[k].append(tokens[k].item())
    return rows


def naive_logprobs(model, prompt, completion, temperature):
    """log pi(token | all tokens before it), for each token of the completion."""
    ids = torch.tensor(prompt[0] + completion)
    table = (model(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
    return table[:-1].gather(1, ids[1:, None])[-len(completion) :, 0]


def naive_update(model, reference, optimizer, rows, config):
    """GRPO. rows: a prompt, a completion and its advantage A each."""
    n_tokens, old_logprobs = sum(len(completion) for _, completion, _ in rows), []
    for update in range(config.updates):
        loss = kl = clipped = 0.0
        for k, (prompt, completion, A) in enumerate(rows):
            logprobs = naive_logprobs(model, prompt, completion, config.temperature)
            if update == 0:
                old_logprobs.append(logprobs.detach())
            r = (logprobs - old_logprobs[k]).exp()
            gain, clipped_gain = r * A, r.clamp(1 - config.clip_eps, 1 + config.clip_eps) * A
            loss = loss - torch.minimum(gain, clipped_gain).sum() / n_tokens
            clipped += (clipped_gain < gain).sum().item() / n_tokens
            if config.kl_coef:
                other = naive_logprobs(reference, prompt, completion, config.temperature)
                d = other.detach() - logprobs
                k3 = (d.exp() - d - 1).sum() / n_tokens
                loss, kl = loss + config.kl_coef * k3, kl + k3.item()
        optimizer.zero_grad()
        loss.backward()
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
        for p in model.parameters():
            p.grad /= max(1.0, norm)  # the gradient norm is at most 1
        optimizer.step()
    return {"loss": loss.item(), "kl": kl, "clip_fraction": clipped, "grad_norm": norm}


def naive_evaluation(model, tokenizer, problems, config, ends, read):
    prompts = [naive_prompt(tokenizer, row["question"]) for row in problems]
    texts = tokenizer.batch_decode(naive_completions(model, prompts, config, ends), True)
    n, z = len(problems), 1.96
    share = sum(read(text) == read(row["answer"]) for text, row in zip(texts, problems)) / n
    # The ends of Wilson's interval solve (share - p)^2 = z^2 p (1 - p) / n for p.
    root = z * math.sqrt(z * z + 4 * n * share * (1 - share))
    low, high = ((2 * n * share + z * z + sign * root) / (2 * (n + z * z)) for sign in (-1, 1))
    readable = sum(read(text) is not None for text in texts) / n
    names = ("eval_accuracy", "eval_low", "eval_high", "eval_format")
    return dict(zip(names, (share, low, high, readable)))


def naive_run(model, tokenizer, train_rows, test_rows, config, ends, read):
    """The rows of scores.jsonl, metrics.jsonl and samples.jsonl, and the trained model. read: the
    number in a text, or None."""
    N, G, generator, draws = len(train_rows), config.group_size, *map(seeded, [config.seed] * 2)
    model, reference = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    # 1. Score each question.
    prompts = [naive_prompt(tokenizer, row["question"]) for row in train_rows]
    scores, metrics, samples = [], [], []
    for index, prompt in enumerate(prompts):
        intra, inter = naive_concentration(model, prompt)
        row = {"index": index, "intra": intra, "inter": inter, "concentration": intra + inter}
        scores.append({**row, "tokens": prompt[2] - prompt[1]})
    # 2. Rank the questions: the highest key first, ties by index.
    keys = {
        "length": [-row["tokens"] for row in scores],
        "shuffled": torch.randperm(N, generator=seeded(config.seed)).tolist(),
    }.get(config.curriculum, [row["concentration"] for row in scores])
    order = sorted(range(N), key=lambda index: (-keys[index], index))
    # 3. Train on batches from a Gaussian over the ranks.
    n, sigma = config.stride or 500 / 7473 * N, config.sigma or 1000 / 7473 * N
    sigma, mean = INF if config.curriculum == "uniform" else sigma, 0.0
    for step in range(config.steps + 1):
        if step > 0:
            batch = naive_draw(order, mean, sigma, config.prompts_per_step, draws)
            C = sum(sum(naive_concentration(model, prompts[index])) for index in batch) / len(batch)
            questions = [index for index in batch for _ in range(G)]
            rows = [prompts[index] for index in questions]
            completions = naive_completions(model, rows, config, ends, generator)
            texts = tokenizer.batch_decode(completions, True)
            golds = [train_rows[index]["answer"] for index in questions]
            rewards = [float(read(text) == read(gold)) for text, gold in zip(texts, golds)]
            groups = [rewards[k : k + G] for k in range(0, len(rewards), G)]
            # Advantages are z-scores within a group. A flat group has none.
            advantages = []
            for group in groups:
                mu = sum(group) / G
                std = math.sqrt(sum((r - mu) ** 2 for r in group) / (G - 1))
                advantages += [(r - mu) / std if std else 0.0 for r in group]
            rows = list(zip(rows, completions, advantages))
            stats = naive_update(model, reference, optimizer, rows, config)
            accuracy = sum(rewards) / len(rewards)
            row = {"step": step, "accuracy": accuracy, "concentration": C, "mean": mean, **stats}
            row["useful_groups"] = sum(0 < sum(group) < G for group in groups) / len(groups)
            row["completion_length"] = sum(map(len, completions)) / len(completions)
            metrics.append(row)
            # mu <- mu + n max(0, tanh(alpha (accuracy - beta)) + tanh(gamma C)), at most N - 1
            move = S(config.alpha * (accuracy - config.target_accuracy)) + S(config.gamma * C)
            mean = min(mean + n * max(0, move), N - 1)
        if step % config.eval_every == 0 or step == config.steps:
            problems = test_rows[: config.eval_examples]
            result = naive_evaluation(model, tokenizer, problems, config, ends, read)
            metrics.append({"step": step, **result})
            if step > 0:
                group = [[text, reward] for text, reward in zip(texts, groups[0])]
                question = train_rows[batch[0]]["question"]
                samples.append({"step": step, "question": question, "completions": group})
    return scores, metrics, samples, model


ROWS = read_rows(WORLD / "train.jsonl")[:40]


def command(*words):
    """The status of `python gainrl.py WORDS`, run in this process."""
    try:
        return gainrl.main([str(word) for word in words])
    except SystemExit as error:  # argparse's own: --help, and what it refuses
        return error.code


def read_json(path):
    return json.loads(path.read_text())


def read_log(run, key):
    """The rows of metrics.jsonl that have a key: `loss` for steps, `eval_accuracy` otherwise."""
    return [row for row in read_rows(run / "metrics.jsonl") if key in row]


def read_checkpoint(run):
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def write_dataset(folder, train, test=ROWS[:8]):
    """A row is a dict or the raw text of its line."""
    folder.mkdir()
    for split, rows in (("train", train), ("test", test)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The flags of a run of seconds. A later flag replaces an earlier one."""
    data = write_dataset(tmp_path_factory.mktemp("small") / "data", ROWS)
    sizes = "--device cpu --prompts-per-step 4 --group-size 4 --max-new-tokens 40 --eval-every 3"
    sizes += " --checkpoint-every 1 --kl-coef 0.01"
    return f"--preset tiny --model {WORLD} --dataset {data} {sizes}".split()


@pytest.fixture(scope="session")
def whole_run(small_run, tmp_path_factory):
    """A run of eight steps that nothing interrupted. Read only."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert command(*small_run, "--run-dir", run, "--steps", 8) == 0
    return run


@pytest.fixture
def copied_run(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run, tmp_path / "copied"))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def whole_number(text):
    """The number after #### or in the last box, or None."""
    number = re.match(r"(?:\{|####) ?(-?\d+) ?(?:\}|$)", re.split(r"\\boxed|(?=####)", text)[-1])
    return number and int(number[1])


def toy_number(text, is_gold=False):
    """A random model writes no numbers, so the length of its text counts as one."""
    return whole_number(text) if "####" in text else [0, 1, 2, None][len(text) % 4]


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The settings of a short run of a small random model."""
    folder, rows = tmp_path_factory.mktemp("toy"), []
    for k in range(12):
        story = "Ann has 3 apples. " * (k % 4) + f"What is {k} plus {k * k}?"
        rows.append({"question": story, "answer": f"#### {k * 7 % 3}"})
    # Learned positions (GPT-2) show what rotary ones hide: whether padding counts.
    for name, family, train in (("one", "Qwen2", rows[:10]), ("other", "GPT2", rows[3:])):
        write_dataset(folder / name, train, rows[:2:-1])
        ends = END_TOKENS[1:]  # without the template's and the tokenizer's
        model = random_model(len(TOKENIZER), family=family, eos_token_id=ends)
        # What a hub model's generation_config may ask for is ignored.
        model.generation_config.update(do_sample=True, top_k=1, repetition_penalty=5.0)
        model.save_pretrained(folder / name)
        bpe_tokenizer(pad=END).save_pretrained(folder / name)  # an end token is not padding
    sizes = {"steps": 2, "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 7}
    sizes |= {"eval_every": 2, "eval_examples": 4, "lr": 1e-4, "kl_coef": 0.0, "device": "cpu"}
    return {**sizes, "model": str(folder / "one"), "dataset": str(folder / "one")}


def run_naively(config, tokenizer=TOKENIZER, ends=END_TOKENS, read=toy_number):
    model = transformers.AutoModelForCausalLM.from_pretrained(gainrl.find_folder(config.model))
    folder = gainrl.find_folder(config.dataset)
    splits = (read_rows(folder / "train.jsonl"), read_rows(folder / "test.jsonl"))
    return naive_run(model, tokenizer, *splits, config, ends, read)


def assert_agrees(run, config, naive):
    """Rows to 1e-4, weights to 1e-5."""
    *logs, model = naive
    for name, rows in zip(("scores", "metrics", "samples"), logs):
        found = read_rows(run / f"{name}.jsonl")
        for row in found:
            assert 0 < row.pop("seconds", 1) < 300
        if name == "samples":
            assert found == rows
        else:
            assert found == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in rows]
    weights = read_checkpoint(run)["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.data, rtol=0, atol=1e-5)


# A row for each setting: other values, and the logged value of the last step that they must change.
# The naive run takes the same values, so neither may ignore one.
KL = {"kl_coef": 0.5, "updates": 2, "clip_eps": 0.01, "lr": 5e-4}
SETTINGS = [
    ({}, None),
    ({"curriculum": "length"}, "grad_norm"),
    ({"curriculum": "shuffled", "seed": 3}, "grad_norm"),
    ({"curriculum": "uniform"}, "grad_norm"),
    ({"dataset": "other"}, "concentration"),
    ({"model": "other"}, "concentration"),
    ({"steps": 3}, "step"),
    ({"prompts_per_step": 4}, "grad_norm"),
    ({"group_size": 3}, "accuracy"),
    ({"updates": 3, "lr": 1e-3}, "clip_fraction"),
    (KL, "kl"),
    ({**KL, "clip_eps": 0.3}, "loss"),
    ({**KL, "micro_batch": 5, "temperature": 0.7, "max_new_tokens": 11}, "loss"),
    ({"max_new_tokens": 5}, "completion_length"),
    ({"temperature": 0.5}, "grad_norm"),
    ({"lr": 1e-3}, "grad_norm"),
    ({"sigma": 30.0}, "grad_norm"),
    ({"stride": 0.1}, "mean"),
    ({"target_accuracy": 0.9}, "mean"),
    ({"alpha": 0.1, "target_accuracy": 0.8}, "mean"),
    ({"gamma": 0.1}, "mean"),
    ({"seed": 3}, "concentration"),
    ({"eval_every": 1}, None),
    ({"eval_examples": 9, "group_size": 2}, "eval_accuracy"),  # two batches
]


@pytest.fixture(scope="session")
def naive_base(toy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
        return run_naively(gainrl.Config(**toy))


@pytest.mark.parametrize("settings, changes", SETTINGS, ids=str)
def test_a_run_agrees_with_the_naive_run(toy, naive_base, run, monkeypatch, settings, changes):
    for name in ("model", "dataset"):
        if name in settings:
            settings = {name: toy[name].replace("one", settings[name])}
    config = gainrl.Config(**{**toy, **settings}, run_dir=str(run))
    monkeypatch.setattr(gainrl, "extract_answer", toy_number)
    monkeypatch.setattr(gainrl, "LOGIT_CHUNK", 5)
    # With its own epsilon, AdamW turns the rounding of tiny gradients into steps of full size.
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
    gainrl.train(config)
    naive = run_naively(config) if settings else naive_base
    assert_agrees(run, config, naive)
    metrics, before = naive[1], naive_base[1]
    if changes:
        values = [[row[changes] for row in rows if changes in row] for rows in (metrics, before)]
        assert values[0][-1] != pytest.approx(values[1][-1], rel=1e-3, abs=1e-3)
    elif settings:
        assert len(metrics) > len(before)


def test_a_run_of_the_tiny_world_agrees_with_the_naive_run(small_run, run):
    """With real rewards: flat and useful groups, completions that end and some that do not."""
    sizes = "--steps 2 --lr 3e-5 --prompts-per-step 3 --eval-examples 6 --max-new-tokens 30"
    config = gainrl.parse_config([*small_run, *sizes.split(), "--run-dir", str(run)])
    gainrl.train(config)
    assert_agrees(run, config, run_naively(config, WORLD_TOKENIZER, [1], whole_number))


def test_every_setting_has_a_test(toy, run, monkeypatch):
    """Those that change no number are tested here."""
    tested = {name for settings, _ in SETTINGS for name in settings}
    others = {"preset", "device", "checkpoint_every", "run_dir", "resume"}
    assert tested | others == {field.name for field in fields(gainrl.Config)}
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr(gainrl, "extract_answer", toy_number)
    saved, updates = spy(monkeypatch, "write_atomically"), spy(monkeypatch, "completion_logprobs")
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    path = gainrl.train(gainrl.Config(**toy, preset="tiny", checkpoint_every=1))
    assert path == Path("runs/tiny-angle-0")
    assert [path.name for path, _ in saved].count("state.pt") == 2
    assert len(synced) == len(saved)  # against power cuts
    n_updates = len(updates)
    small = {**toy, "micro_batch": 2}
    gainrl.train(gainrl.Config(**small, checkpoint_every=9, run_dir=str(run)))
    assert [path.name for path, _ in saved].count("state.pt") == 3
    assert len(updates) - n_updates > n_updates
    assert gainrl.train(gainrl.Config(**toy, resume=str(run))) == run
    ends = read_json(run / "model" / "generation_config.json")["eos_token_id"]
    assert ends == END_TOKENS  # so that others stop where training did
    with pytest.raises(ValueError, match="abacus"):
        gainrl.train(gainrl.Config(**{**toy, "device": "abacus"}))


def test_flags_replace_the_settings_of_a_preset_and_help_names_each(monkeypatch, capsys):
    for words in ("--lr 3e-5 --group-size 4", "--lr=3e-5 --group_size=4"):
        config = gainrl.parse_config(["--preset", "tiny", *words.split()])
        assert config == tiny_config(lr=3e-5, group_size=4)
    cases = [(False, "", "tiny"), (True, "", "gsm8k"), (False, "--dataset some/data", "gsm8k")]
    for has_gpu, flags, preset in cases:
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=has_gpu: answer)
        assert gainrl.parse_config(flags.split()).preset == preset
    assert command("--preset", "gsm8k", "--help") == 0
    text = "".join(capsys.readouterr().out.split())  # without spaces: it may wrap anywhere
    for setting in fields(gainrl.Config):
        _, _, described = text.partition("--" + setting.name.replace("_", "-"))
        help_text = setting.metadata["help"] % {"default": setting.default}
        assert "".join(help_text.split()) in described
    assert "None" not in text  # which nobody can type


def test_a_run_directory_has_the_settings_the_weights_and_the_tokenizer(whole_run, small_run):
    names = "config.json scores.jsonl metrics.jsonl samples.jsonl checkpoint model"
    assert {path.name for path in whole_run.iterdir()} == set(names.split())
    assert [path.name for path in (whole_run / "checkpoint").iterdir()] == ["state.pt"]
    record, settings = read_json(whole_run / "config.json"), gainrl.parse_config(small_run)
    settings = {**asdict(settings), "steps": 8}
    assert record == {**settings, "run_dir": str(whole_run)}
    resumed = gainrl.parse_config(["--resume", str(whole_run)])
    assert asdict(resumed) == {**settings, "resume": str(whole_run)}

    folder, trained = whole_run / "model", read_checkpoint(whole_run)["model"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert not torch.equal(trained["lm_head.weight"], SKILLED_MODEL.lm_head.weight)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    questions = [row["question"] for row in ROWS]
    expected = gainrl.encode_prompts(WORLD_TOKENIZER, questions)
    assert gainrl.encode_prompts(tokenizer, questions) == expected


def pearson_of_ranks(x, y):
    """Spearman's correlation, each rank found by counting: smaller values, and half of ties."""
    pair = [(v[:, None] > v).double().sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y)]
    return torch.corrcoef(torch.stack(pair))[0, 1].item()


def test_without_steps_a_run_only_scores_and_ranks(small_run, tmp_path, run, capsys):
    long = {"question": "Ann has 3 apples. " * 200, "answer": "#### 3"}
    data = write_dataset(tmp_path / "data", [*ROWS[:5], "", long, *ROWS[5:], long, " \t", ""])
    assert command(*small_run, "--dataset", data, "--run-dir", run, "--steps", 0) == 0
    output = capsys.readouterr().out
    assert "2 train prompts" in output
    rows = read_rows(run / "scores.jsonl")  # index: the row in the file, blank lines not counted
    assert [row["index"] for row in rows] == [k for k in range(41) if k != 5]
    files = {path.name for path in run.iterdir()}
    assert files == {"config.json", "scores.jsonl"}  # nothing was trained
    tokens, C = (torch.tensor([row[name] for row in rows]) for name in ("tokens", "concentration"))
    assert f"rank and length: {pearson_of_ranks(-C, tokens):.2f}\n" in output
    assert gainrl.spearman(C, tokens) == pytest.approx(pearson_of_ranks(C, tokens))
    assert len(tokens.unique()) < 40
    assert gainrl.spearman(torch.ones(5), torch.arange(5)) == 0


def test_a_loaded_model_has_float32_weights_and_no_attention_of_cudnn(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    TOKENIZER.save_pretrained(tmp_path)
    for vocab_size, expected in ((400, [1]), (40_000, [])):  # small models need one thread only
        random_model(vocab_size).bfloat16().save_pretrained(tmp_path)
        torch.backends.cuda.enable_cudnn_sdp(True)
        model, _ = gainrl.load_model(str(tmp_path), "cpu")
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not model.training
        assert threads == expected
        threads.clear()


def test_the_context_ends_where_rotary_embeddings_switch(tmp_path, monkeypatch):
    """Beyond that length all keys are rotated differently, and cached ones would be wrong."""
    rope = {"rope_type": "longrope", "rope_theta": 1000.0, "factor": 4.0}
    rope["original_max_position_embeddings"] = 512  # max_position_embeddings is 2048
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    random_model(len(TOKENIZER), rope_parameters=rope).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    calls, data = spy(monkeypatch, "load_problems"), write_dataset(tmp_path / "data", ROWS[:8])
    gainrl.load_task(tiny_config(model=str(tmp_path), dataset=str(data)))
    assert [inputs[-1] for inputs in calls] == [512 - 64] * 2


# --- 9. Kills and resumes -------------------------------------------------------------------------


def without_times(run):
    rows = read_rows(run / "metrics.jsonl")
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


def assert_same_run(run, other):
    """Equal logs, and weights that are equal bit for bit."""
    assert without_times(run) == without_times(other)
    assert (run / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    weights, others = read_checkpoint(run)["model"], read_checkpoint(other)["model"]
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def file_contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capfd, *words, status=2):
    """The one line with which a command ends."""
    capfd.readouterr()
    assert command(*words) == status
    output = capfd.readouterr().err
    assert "Traceback" not in output
    (line,) = re.findall(r"(?:gainrl\.py|error): (.*)", output)
    return line


def test_the_printed_command_continues_a_killed_run_bit_for_bit(small_run, whole_run, tmp_path):
    """A lone gainrl.py, in a directory without extras/, is killed between two checkpoints. The log
    file shows evaluations at once and has no progress bars."""
    shutil.copy(gainrl.__file__, tmp_path / "gainrl.py")
    run, log = tmp_path / "my run", tmp_path / "log"
    # Past 8 steps there would be nothing to continue, so only the second command asks for 8.
    flags = [*small_run, "--run-dir", "my run", "--steps", "500", "--checkpoint-every", "2"]
    argv = [sys.executable, "gainrl.py", *flags]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide lines that are not flushed
    options = {"cwd": tmp_path, "env": environment}
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    with log.open("w") as file, subprocess.Popen(argv, stdout=file, stderr=file, **options) as p:
        while not (metrics.exists() and read_rows(metrics)[-1]["step"] >= 3):
            assert time.monotonic() < deadline and p.poll() is None, log.read_text()
            time.sleep(0.01)
        p.kill()
    assert read_rows(metrics)[-1]["step"] < 8
    text = log.read_text()
    assert "greedy accuracy" in text and "\r" not in text and "%|" not in text
    (printed,) = re.findall("^to continue after a stop: (.*)$", text, re.MULTILINE)
    options |= {"text": True, "stdout": subprocess.PIPE}
    done = subprocess.run(["sh", "-c", f"{printed} --steps 8"], check=True, **options)
    names = ("eval_accuracy", "eval_low", "eval_high")
    shown = [f"{row[name]:.3f}" for row in read_log(run, names[0])[::3] for name in names]
    assert re.findall(r"\d\.\d+", done.stdout.splitlines()[-1]) == shown  # before and after
    assert_same_run(run, whole_run)


@pytest.mark.parametrize(
    "owner, name, call", [(gainrl, "score_prompts", 1), (gainrl, "evaluate", 2), (os, "replace", 9)]
)
def test_ctrl_c_can_be_resumed(small_run, whole_run, run, monkeypatch, capfd, owner, name, call):
    """In an evaluation, and while a file is replaced. Before that, nothing is written."""
    function, calls = getattr(owner, name), []

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert refusal(capfd, *small_run, "--run-dir", run, "--steps", 8, status=130)
    assert (run / "config.json").exists() == run.exists() == (name != "score_prompts")
    words = ["--resume", run] if run.exists() else [*small_run, "--run-dir", run, "--steps", 8]
    assert command(*words) == 0
    assert_same_run(run, whole_run)


def test_nothing_is_ever_deleted(copied_run, monkeypatch):
    """It may be impossible: on Windows for open files, or for a mount point."""

    def refuse(path, **named):
        raise OSError("busy") if os.path.exists(path) else FileNotFoundError(path)

    for owner, name in ((os, "remove"), (os, "unlink"), (os, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, refuse)
    for name in ("checkpoint/state.pt.1.tmp", "metrics.jsonl.1.tmp"):
        (copied_run / name).write_bytes(b"left by a killed process")
    before = file_contents(copied_run)
    assert command("--resume", copied_run) == 0
    assert file_contents(copied_run).keys() == before.keys()


@pytest.mark.parametrize("name", ["runs/mine", None])
def test_of_twenty_starts_in_one_named_directory_one_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, barrier = tiny_config(run_dir=name), threading.Barrier(20)

    def start(_):
        barrier.wait()
        try:
            return str(gainrl.create_directory(config))
        except FileExistsError as error:
            return "runs/mine" in str(error)

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        started = sorted(pool.map(start, range(20)), key=str)
    expected = ["runs/tiny-angle-0", *[f"runs/tiny-angle-0-{k}" for k in range(2, 21)]]
    assert started == ([True] * 19 + ["runs/mine"] if name else sorted(expected))


def test_a_resumed_run_finds_its_folders_from_anywhere_and_accepts_moved_ones(
    copied_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WORLD, "moved")
    config = gainrl.Config(model="moved", dataset="moved")
    assert config.model == config.dataset == str(tmp_path / "moved")
    assert tiny_config().model == gainrl.TINY_WORLD  # so a clone can be moved
    settings = read_json(copied_run / "config.json")
    (copied_run / "config.json").write_text(json.dumps({**settings, "model": "/gone"}))
    assert command("--resume", "copied", "--model", "moved") == 0
    assert read_json(copied_run / "config.json")["model"] == str(tmp_path / "moved")


def test_only_memory_and_length_may_change_on_resume(copied_run, whole_run, capfd, monkeypatch):
    before, settings = file_contents(copied_run), read_json(copied_run / "config.json")
    others = {"preset": "gsm8k", "curriculum": "length", "sigma": 7.5, "stride": 7.5}
    others["target_accuracy"] = 0.25
    with monkeypatch.context() as patch:
        patch.setattr(gainrl, "load_model", None)  # refused before the model is loaded
        free = "steps micro_batch checkpoint_every run_dir resume"
        for name in settings.keys() - set(free.split()):
            value, flag = settings[name], "--" + name.replace("_", "-")
            other = others.get(name) or (value + "0" if isinstance(value, str) else value + 1)
            assert f"{flag} {value}" in refusal(capfd, "--resume", copied_run, flag, other)
        assert "--run-dir" in refusal(capfd, "--resume", copied_run, "--run-dir", "other")
    assert "--steps 7" in refusal(capfd, "--resume", copied_run, "--steps", 7)
    assert file_contents(copied_run) == before

    may_change = ["--micro-batch", 3, "--checkpoint-every", 4, "--steps", 9]
    assert command("--resume", copied_run, *may_change) == 0
    rows = without_times(whole_run)  # its last evaluation, at step 8, stays
    assert without_times(copied_run)[: len(rows)] == rows
    assert read_log(copied_run, "loss")[-1]["step"] == read_checkpoint(copied_run)["step"] == 9


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(copied_run, capfd):
    """The largest file that this process may write is half a checkpoint."""
    path = copied_run / "checkpoint" / "state.pt"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = refusal(capfd, "--resume", copied_run, "--steps", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in line and "--resume" in line
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [
        "state.pt"
    ]  # no rest of the failed one


CUDA_ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CPU_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")


@pytest.mark.parametrize("error", [CUDA_ERROR, CPU_ERROR, RuntimeError("a bug"), None])
def test_out_of_memory_and_a_nan_loss_give_one_line_and_a_bug_does_not(
    copied_run, monkeypatch, capfd, error
):
    update, words = gainrl.grpo_update, ["--resume", copied_run, "--steps", 9]

    def failing(model, reference, optimizer, rollout, advantages, config):
        if error:
            raise error
        return update(model, reference, optimizer, rollout, advantages + math.nan, config)

    monkeypatch.setattr(gainrl, "grpo_update", failing)
    if str(error) == "a bug":
        with pytest.raises(RuntimeError, match="a bug"):
            command(*words)
    else:
        named = "--prompts-per-step" if error else "--lr"
        assert f"start a new run with a lower {named}" in refusal(capfd, *words)
    assert read_checkpoint(copied_run)["step"] == 8


# --- 10. Bad input: one line that names it, status 2, nothing written -----------------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--curriculum best", "best"),
        ("--max-new-tokens 500", "--max-new-tokens leaves 12 tokens"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616"),
        ("--device abacus", "--device abacus"),
        ("--model no/such-model", "--model no/such-model"),
        ("--model ./no/such/dir", "no folder no/such/dir"),
        ("--dataset {file}", "no folder {file}"),
        ("--model {empty}", "--model {empty}"),
        ("--model extras/tiny-world", "--dataset needs another --model"),
        ("--dataset no/such-data", "--dataset no/such-data"),
        ("--run-dir {file}", "--run-dir {file}"),
        ("--prompts-per-step 41", "--prompts-per-step 41: there are 40 questions"),
        ("--resume {none}", "{none}"),
    ],
)
def test_bad_settings_are_refused_by_flag(small_run, tmp_path, capfd, monkeypatch, flags, named):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    paths = {name: tmp_path / name for name in ("empty", "file", "none")}
    paths["empty"].mkdir()
    paths["file"].write_text("")
    before = sorted(tmp_path.rglob("*"))
    words = [*small_run, "--run-dir", tmp_path / "run", *flags.format(**paths).split()]
    assert named.format(**paths) in refusal(capfd, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("setting", fields(gainrl.Config), ids=lambda setting: setting.name)
def test_every_number_out_of_range_is_refused_by_flag(setting):
    may_be_0 = ("steps", "seed", "clip_eps", "kl_coef", "target_accuracy", "alpha", "gamma")
    bad = [-1, 2**64, *([] if setting.name in may_be_0 else [0])]
    bad += [1] if setting.name == "group_size" else []
    if setting.type in (float, float | None):
        bad += [math.nan, math.inf, -math.inf]
    elif setting.type is not int:
        bad = []
    for value in bad:
        with pytest.raises(ValueError, match=f"--{setting.name.replace('_', '-')} {value}"):
            gainrl.Config(**{setting.name: value})


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "row",
    [
        '{"answer": "#### 1"}',
        '{"question": " \\n", "answer": "#### 1"}',
        '{"question": "Why?", "answer": ""}',
        '{"question": "Why?", "answer": "It is #### many"}',
        '{"question": "Why?", "answer": "It is \\\\boxed{7}"}',
        '{"question": 7, "answer": "#### 1"}',
        '{"question": "Why?", "answer": 7}',
        '{"question": "\\ud83d", "answer": "#### 1"}',  # half of a surrogate pair
        "[1, 2]",
        '{"question": "Wh',
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path, row, split):
    data = write_dataset(tmp_path / "data", [*ROWS[:2], "", row, *ROWS], [ROWS[0], "", "", row])
    with pytest.raises(ValueError, match=re.escape(f"{data}/{split}.jsonl:4: not UTF-8 JSON")):
        gainrl.load_problems(WORLD_TOKENIZER, str(data), split, 448)


def test_files_in_other_encodings_and_without_rows_are_refused_and_a_utf_8_mark_is_not(tmp_path):
    path = write_dataset(tmp_path / "data", ROWS[:3]) / "train.jsonl"
    text, inputs = path.read_text(), (WORLD_TOKENIZER, str(path.parent), "train", 448)
    utf_16 = [(text.encode(encoding), "jsonl:1: .* UTF-8") for encoding in ("utf-16", "utf-16-le")]
    for content, reason in [(b"", "no rows"), (b"\n \n", "no rows"), *utf_16]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            gainrl.load_problems(*inputs)
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(gainrl.load_problems(*inputs)) == 3


@pytest.mark.parametrize(
    "model, tokenizer, reason",
    [
        ({}, {"template": None}, "no usable chat template"),
        ({"eos_token_id": None}, {"end": None, "template": NO_MARKS}, "no end token"),
        ({"family": "Gemma2"}, {}, "its logits are not lm_head"),  # caps them
        ({"family": "Cohere"}, {}, "its logits are not lm_head"),  # scales them
        ({"family": "Mamba"}, {}, "cannot use --model"),  # has no keys and values
        ({"quantization_config": {"quant_method": "any"}}, {}, "quantized"),
    ],
)
def test_an_unusable_model_is_refused(small_run, tmp_path, run, capfd, model, tokenizer, reason):
    folder, tokenizer = tmp_path / "unusable", bpe_tokenizer(**tokenizer)
    tokenizer.save_pretrained(folder)
    random_model(len(tokenizer), **model).save_pretrained(folder)
    line = refusal(capfd, *small_run, "--model", folder, "--run-dir", run)
    assert reason in line and str(folder) in line
    assert not run.exists()


@pytest.mark.parametrize(
    "name, share", [("checkpoint/state.pt", 0.5), ("checkpoint/state.pt", 0), ("config.json", 0.5)]
)
def test_a_damaged_file_is_refused_and_nothing_changes(copied_run, capfd, name, share):
    content = (copied_run / name).read_bytes()
    (copied_run / name).write_bytes(content[: int(share * len(content))])
    before = file_contents(copied_run)
    line = refusal(capfd, "--resume", copied_run)
    assert str(copied_run if name == "config.json" else copied_run / name) in line
    assert file_contents(copied_run) == before
