"""What gainrl.py promises, each promise held against what knows the answer by another way.

The oracles are a double loop, arithmetic by hand, autograd, finite differences, chi-square and
`model.generate`; nothing here was recorded from the code under test. One tiny world is warmed up
for all tests that need a model with some skill; the others use small random Qwen2 models.

    python -m pytest -q test_gainrl.py        minutes on two cores; no GPU, no network
"""

import copy
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import gainrl

torch.set_num_threads(1)  # as the tiny preset does: on busy cores, threads that wait spin
HERE = Path(__file__).resolve().parent
GSM8K = HERE.parent / "shared" / "gsm8k"
QUESTIONS = [
    "Ann has 3 apples and buys 4 more. How many apples has she?",
    "What is 2+2?",  # word for word the prefix's own example
    "assistant",  # a word of the template
    "A box holds 12 pens. How many pens do 5 boxes hold?",
    "Größe in 東京: 5 😀 plus 7 👩‍👩‍👧 — how many?",
    "Ben walks 6 miles a day. How far does he walk in 7 days?",
    "x",
]
ROWS = [gainrl.tiny_problem(random.Random(k), distractors=k % 3) for k in range(40)]


def qwen2(vocabulary, seed=0, **other):
    """A small random Qwen2 whose next-token distribution is far from flat."""
    torch.manual_seed(seed)
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"initializer_range": 0.3, "max_position_embeddings": 2048, "eos_token_id": 1}
    shape |= {"tie_word_embeddings": False, **other}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape)).eval()


def bpe(template=gainrl.CHAT_TEMPLATE, splits=True, pad="<|endoftext|>", eos="<|im_end|>"):
    """A byte-level BPE as real models have it. splits=False lets its tokens cross words and line
    ends, so that a token can hold the end of the prefix and the start of the question at once."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    core.pre_tokenizer, core.decoder = level, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[gainrl.PAD, gainrl.END, gainrl.BEGIN],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    texts = ["user\n" + text + "\n" for text in QUESTIONS * 3 + [gainrl.SYSTEM_PROMPT]]
    core.train_from_iterator(texts, trainer)
    special = {"pad_token": pad, "eos_token": eos, "chat_template": template}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def tiny(**settings):
    return gainrl.Config(**{**gainrl.PRESETS["tiny"], **settings})


def score(model, tokenizer, questions, **options):
    return gainrl.score_prompts(model, gainrl.encode_prompts(tokenizer, questions), **options)


def cosine_means(hidden, prefix, question, include_self=True):
    """C_intra and C_inter of one row as the paper writes them: a cosine for each pair of tokens."""

    def mean(pairs):
        x = hidden.double()
        cosines = [F.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs]
        return sum(cosines) / len(cosines) if cosines else 0.0

    question, prefix = question.nonzero().flatten(), prefix.nonzero().flatten()
    intra = [(i, j) for i in question for j in question if include_self or i != j]
    return mean(intra), mean([(i, j) for i in question for j in prefix])


def is_draw_from(counts, probabilities):
    """Chi-square: whether counts can be draws from the probabilities. Cells that expect fewer than
    5 are one cell; the bound is five standard deviations, so that chance alone never fails."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    free = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    return statistic < free + 5 * math.sqrt(2 * free)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def complaint(capfd):
    """What the program itself says on stderr; a progress bar may stand before or after it."""
    (line,) = (part for part in capfd.readouterr().err.splitlines() if "gainrl.py: " in part)
    return line.partition("gainrl.py: ")[2]


def files(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def write_dataset(folder, train, test=ROWS[:8]):
    """A row may be a dict, or the raw text of its line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "tiny-world"
    gainrl.make_tiny_world(folder)
    return folder


@pytest.fixture(scope="session")
def skilled(world):
    return gainrl.load_model(str(world), torch.device("cpu"))


@pytest.fixture(scope="session")
def tokenizer():
    return bpe()


@pytest.fixture(scope="session")
def crossing():
    return bpe(splits=False)


@pytest.fixture(scope="session")
def model(tokenizer):
    return qwen2(len(tokenizer))


# --- Scores track gradient norms ------------------------------------------------------------------


def test_with_unit_inputs_and_one_upstream_gradient_the_squared_gradient_norm_is_c_intra():
    torch.manual_seed(0)
    L, D, K = 9, 12, 5
    x, g = F.normalize(torch.randn(L, D), dim=-1), torch.randn(K)
    w = torch.randn(D, K, requires_grad=True)
    (x @ w * g).sum().backward()  # dL/dy_i = g for each token i
    question = torch.ones(1, L, dtype=torch.bool)
    intra, _ = gainrl.angle_concentration(x[None], ~question, question)
    torch.testing.assert_close(w.grad.square().sum(), L**2 * g.square().sum() * intra[0])


def test_the_gradient_of_a_real_head_is_the_double_sum_over_token_pairs(model, tokenizer):
    ids = tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    x = model.base_model(ids).last_hidden_state[0].detach()
    y = model.lm_head(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(y[:-1], ids[0, 1:]), y)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()  # the model's own loss, not ours
    pairs = itertools.product(range(len(x)), repeat=2)
    double_sum = sum((x[i] @ x[j]) * (g[i] @ g[j]) for i, j in pairs)
    torch.testing.assert_close(model.lm_head.weight.grad.square().sum(), double_sum)
    model.zero_grad()


def ranks(x):
    """Rank by counting: how many are smaller, and half of the ties."""
    return (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x.norm() * y.norm())).item()


def test_spearman_is_the_pearson_correlation_of_ranks_and_ties_share_theirs():
    torch.manual_seed(0)
    x, y = torch.randint(0, 9, (50,)), torch.randn(50)
    assert gainrl.spearman(x, y) == pytest.approx(pearson(ranks(x), ranks(y)))
    assert gainrl.spearman(y, y.exp()) == pytest.approx(1)
    assert gainrl.spearman(y, -y) == pytest.approx(-1)
    assert gainrl.spearman(torch.ones(5), torch.arange(5)) == 0


def test_scores_track_gradient_norms_on_the_warmed_up_tiny_world(world, skilled):
    """The paper's claim, measured: a prompt of higher C has the longer gradient. Flat groups have
    none, and stay in. What is left of it at equal length is printed, whatever it is."""
    model, tokenizer = skilled
    n, config = 200, tiny()
    problems = gainrl.load_problems(tokenizer, str(world), "test", 400)[:n]
    scores = gainrl.score_prompts(model, [p["prompt"] for p in problems])
    torch.manual_seed(0)
    generator, norms = torch.Generator().manual_seed(0), {"GRPO loss": [], "up_proj": []}
    for problem in problems:
        done = gainrl.generate(model, tokenizer, [problem["prompt"]], config, 8, generator)
        rewards = torch.tensor([[gainrl.reward(t, problem["answer"]) for t in done.texts]])
        advantages = gainrl.group_advantages(rewards)[0]
        shape = done.completion_mask.shape[1], config.temperature, 8
        logprobs = gainrl.completion_logprobs(model, done.ids, done.attention_mask, *shape)
        loss, _ = gainrl.grpo_loss(logprobs, logprobs.detach(), advantages, done.completion_mask)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norms["GRPO loss"].append(torch.stack([g.norm() for g in grads]).norm())
        ids = torch.tensor([problem["prompt"].ids])
        up_proj = model.model.layers[-1].mlp.up_proj.weight
        (grad,) = torch.autograd.grad(model(ids, labels=ids).loss, [up_proj])
        norms["up_proj"].append(grad.norm())

    def interval(norm, shuffle=False):
        drawn = []
        for _ in range(1000):
            rows = torch.randint(n, (n,))
            other = rows[torch.randperm(n)] if shuffle else rows
            drawn.append(gainrl.spearman(scores.angle[other], norm[rows]))
        return torch.tensor(drawn).quantile(torch.tensor([0.025, 0.975])).tolist()

    measured = []
    for name, norm in norms.items():
        norm = torch.stack(norm)
        r, (low, high) = gainrl.spearman(scores.angle, norm), interval(norm)
        a, b = (gainrl.spearman(x, scores.tokens) for x in (scores.angle, norm))
        partial = (r - a * b) / math.sqrt((1 - a * a) * (1 - b * b))
        flat = (norm == 0).sum()
        print(f"C and the gradient norm of {name}: {r:.3f} [{low:.3f}, {high:.3f}], {flat} flat;")
        print(f"  given length {partial:.3f}; length with C {a:.3f}, with the norm {b:.3f}")
        measured.append((name, low, interval(norm, shuffle=True)))
    for name, low, (shuffled_low, shuffled_high) in measured:
        assert shuffled_low < 0 < shuffled_high, name
        assert low > 0, name


# --- Angle concentration --------------------------------------------------------------------------


def ragged(seed=0):
    """Three rows of prefix and question, padded on both sides with NaN: padding may be anything."""
    torch.manual_seed(seed)
    hidden = torch.randn(3, 14, 6) + 0.5
    prefix, question = torch.zeros(2, 3, 14, dtype=torch.bool)
    for row, (start, middle, end) in enumerate([(0, 4, 14), (3, 5, 11), (2, 8, 9)]):
        prefix[row, start:middle] = question[row, middle:end] = True
    hidden[~(prefix | question)] = math.nan
    return hidden, prefix, question


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_closed_form_is_the_mean_over_all_token_pairs(dtype, include_self):
    hidden, prefix, question = ragged()
    hidden = hidden.to(dtype)
    hidden[1, 6] = 0  # a zero vector has cosine 0 with every token, itself as well
    intra, inter = gainrl.angle_concentration(hidden, prefix, question, include_self)
    assert intra.dtype == inter.dtype == torch.float32
    assert intra.shape == inter.shape == (3,)
    for row in range(3):
        expected = cosine_means(hidden[row], prefix[row], question[row], include_self)
        assert (intra[row].item(), inter[row].item()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_masks_of_0_and_1_are_as_good_as_bool(dtype):
    hidden, prefix, question = ragged()
    expected = gainrl.angle_concentration(hidden, prefix, question)
    found = gainrl.angle_concentration(hidden, prefix.to(dtype), question.to(dtype))
    assert all(map(torch.equal, found, expected))


def test_the_order_of_tokens_within_a_segment_does_not_matter():
    hidden, prefix, question = ragged()
    before = gainrl.angle_concentration(hidden, prefix, question)
    hidden[0] = torch.cat([hidden[0, :4].flip(0), hidden[0, 4:][torch.randperm(10)]])
    torch.testing.assert_close(gainrl.angle_concentration(hidden, prefix, question), before)


def test_parallel_tokens_score_one_and_opposite_tokens_cancel():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[1.0, 2.0], [-3.0, -6.0]]])
    question = torch.ones(2, 2, dtype=torch.bool)
    intra, inter = gainrl.angle_concentration(hidden, ~question, question)
    torch.testing.assert_close(intra, torch.tensor([1.0, 0.0]))
    assert inter.tolist() == [0, 0]  # there is no prefix
    intra, _ = gainrl.angle_concentration(hidden, ~question, question, include_self=False)
    torch.testing.assert_close(intra, torch.tensor([1.0, -1.0]))


def test_a_question_of_one_token_is_only_itself():
    hidden, question = torch.randn(1, 1, 8), torch.ones(1, 1, dtype=torch.bool)
    with_self = gainrl.angle_concentration(hidden, ~question, question)[0]
    without = gainrl.angle_concentration(hidden, ~question, question, include_self=False)[0]
    assert with_self.item() == pytest.approx(1)
    assert without.item() == 0


def test_a_row_without_a_question_token_is_refused_by_name():
    hidden, prefix, question = ragged()
    question[1] = False
    with pytest.raises(ValueError, match="row 1"):
        gainrl.angle_concentration(hidden, prefix, question)


@pytest.mark.parametrize("curriculum", ["angle", "angle-unbiased"])
@pytest.mark.parametrize("kind", ["tokenizer", "crossing"])
def test_scores_with_a_reused_prefix_are_those_of_whole_prompts_run_alone(
    kind, curriculum, request
):
    tokenizer = request.getfixturevalue(kind)
    model = qwen2(len(tokenizer))
    include_self = curriculum == "angle"
    scores = score(model, tokenizer, QUESTIONS, batch_size=2, include_self=include_self)
    for row, (ids, start, end) in enumerate(gainrl.encode_prompts(tokenizer, QUESTIONS)):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([ids])).last_hidden_state[0]
        position = torch.arange(len(ids))
        spans = position < start, (start <= position) & (position < end)
        intra, inter = cosine_means(hidden, *spans, curriculum == "angle")
        found = [column[row].item() for column in scores]
        assert found == pytest.approx([intra, inter, intra + inter, end - start], abs=1e-5)


def test_batch_size_and_order_of_questions_change_no_score(model, tokenizer):
    questions = QUESTIONS * 2 + ["Cid has 5 cards.", "Dee has 6 eggs.", "Eve has 7 figs."]
    reference = score(model, tokenizer, questions)
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(0))
    shuffled = [questions[k] for k in order]
    for size in (1, 3):
        scores = score(model, tokenizer, shuffled, batch_size=size)
        for a, b in zip(scores, reference):
            torch.testing.assert_close(a, b[order], rtol=0, atol=1e-5)


def test_scoring_never_runs_the_head(model, tokenizer):
    handle = model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    score(model, tokenizer, QUESTIONS)
    handle.remove()


def test_a_score_that_is_not_finite_names_its_question(tokenizer):
    model, questions = qwen2(len(tokenizer)), ["Ann has 3.", "Zoe has 4.", "Ben has 5."]
    (poisoned,) = tokenizer("Z")["input_ids"]
    model.model.embed_tokens.weight.data[poisoned] = math.nan
    with pytest.raises(ValueError, match="question 1 is not finite"):
        score(model, tokenizer, questions)


# --- The curriculum -------------------------------------------------------------------------------


def test_probabilities_are_a_gaussian_over_positions():
    curriculum = gainrl.GaussianCurriculum(torch.rand(50), 4, sigma=5.0)
    curriculum.mean = 12.5
    density = [math.exp(-((k - 12.5) ** 2) / (2 * 5.0**2)) for k in range(50)]
    expected = [d / sum(density) for d in density]
    assert curriculum.probabilities().dtype == torch.float64
    assert curriculum.probabilities().tolist() == pytest.approx(expected, rel=1e-12)


def test_a_mean_far_from_all_data_still_gives_probabilities_and_full_batches():
    curriculum = gainrl.GaussianCurriculum(torch.rand(100), 40, sigma=1.0)
    curriculum.mean = 1e9
    probabilities = curriculum.probabilities()
    assert probabilities.isfinite().all() and probabilities.sum().item() == pytest.approx(1)
    assert probabilities.argmax() == 99
    batches = [curriculum.sample() for _ in range(20)]
    assert all(len(set(batch)) == 40 for batch in batches)


def test_first_draws_follow_the_probabilities():
    curriculum = gainrl.GaussianCurriculum(torch.arange(30), 1, sigma=6.0)
    curriculum.mean = 8.0
    drawn = torch.tensor([curriculum.sample()[0] for _ in range(5000)])
    counts = torch.zeros(30)
    counts[:] = torch.bincount(drawn, minlength=30)[curriculum.order]
    assert is_draw_from(counts, curriculum.probabilities())


def test_batches_are_draws_without_replacement():
    """P{i, j} = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j): the second comes from what is left."""
    curriculum = gainrl.GaussianCurriculum(-torch.arange(5), 2, sigma=1.5)
    p = curriculum.probabilities().tolist()
    pairs = list(itertools.combinations(range(5), 2))
    expected = [p[i] * p[j] * (1 / (1 - p[i]) + 1 / (1 - p[j])) for i, j in pairs]
    drawn = [pairs.index(tuple(sorted(curriculum.sample()))) for _ in range(5000)]
    assert is_draw_from(torch.bincount(torch.tensor(drawn), minlength=10), torch.tensor(expected))


def test_an_infinite_sigma_is_the_uniform_draw():
    curriculum = gainrl.GaussianCurriculum(torch.rand(40), 1, sigma=math.inf)
    curriculum.update(1.0, 2.0)
    assert curriculum.probabilities().tolist() == pytest.approx([1 / 40] * 40)
    drawn = torch.tensor([curriculum.sample()[0] for _ in range(4000)])
    assert is_draw_from(torch.bincount(drawn, minlength=40), torch.full((40,), 1 / 40))


def test_the_highest_score_comes_first_and_ties_keep_their_order():
    scores = torch.tensor([1, 3, 2, 3, 1, 3] * 20).float()
    by_hand = sorted(range(120), key=lambda k: (-scores[k], k))
    assert gainrl.GaussianCurriculum(scores, 2).order.tolist() == by_hand


def test_the_mean_moves_by_two_sigmoids():
    def S(z):
        return 2 / (1 + math.exp(-2 * z)) - 1

    curriculum, mean = gainrl.GaussianCurriculum(torch.rand(1000), 4, step=50.0), 0.0
    for accuracy, angle in [(0.9, 0.4), (0.2, 0.7), (0.5, 0.1)]:
        mean += 50 * (S(2 * (accuracy - 0.5)) + S(2 * angle))
        assert curriculum.update(accuracy, angle) == pytest.approx(mean)
    other = {"step": 10.0, "target": 0.2, "alpha": 3.0, "gamma": 0.5}
    curriculum = gainrl.GaussianCurriculum(torch.rand(1000), 4, **other)
    assert curriculum.update(0.6, 0.3) == pytest.approx(10 * (S(3 * 0.4) + S(0.5 * 0.3)))


def test_the_mean_never_goes_back_and_stops_at_the_last_position():
    curriculum = gainrl.GaussianCurriculum(torch.rand(20), 4, step=6.0)
    assert curriculum.update(0.0, -1.0) == 0
    means = [curriculum.update(1.0, 1e300) for _ in range(10)]
    assert means == sorted(means) and means[0] > 0 and means[-1] == 19
    assert curriculum.update(0.0, -1.0) == 19
    assert curriculum.update(1.0, 1.0) == 19


def test_after_load_state_dict_the_next_draws_are_bit_equal():
    scores = torch.rand(200)
    first = gainrl.GaussianCurriculum(scores, 8, seed=3)
    for _ in range(5):
        first.sample()
        first.update(0.7, 0.2)
    state = copy.deepcopy(first.state_dict())
    second = gainrl.GaussianCurriculum(scores, 8, seed=99)
    second.load_state_dict(state)
    for _ in range(5):
        assert second.sample() == first.sample()
        assert second.update(0.6, 0.1) == first.update(0.6, 0.1)


def test_draws_depend_on_the_seed_alone():
    def draws(seed):
        curriculum = gainrl.GaussianCurriculum(torch.arange(200), 8, seed=seed)
        torch.rand(1)  # the global generator has no part in it
        return [curriculum.sample() for _ in range(3)]

    assert draws(1) == draws(1) != draws(2)


def test_it_is_a_batch_sampler_of_a_data_loader():
    curriculum = gainrl.GaussianCurriculum(torch.rand(30), 5)
    loader = torch.utils.data.DataLoader(list(range(100, 130)), batch_sampler=curriculum)
    batches = list(itertools.islice(loader, 12))  # more than an epoch: it has no end
    assert all(len(set(batch.tolist())) == 5 for batch in batches)
    assert all(100 <= row < 130 for batch in batches for row in batch.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="score 2 is not finite"):
        gainrl.GaussianCurriculum([0.1, 0.2, bad, 0.3], 2)


@pytest.mark.parametrize("size", [0, 4])
def test_a_batch_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(ValueError, match="3 questions"):
        gainrl.GaussianCurriculum([0.1, 0.2, 0.3], size)


@pytest.mark.parametrize(
    "accuracy, angle", [(math.nan, 0), (1.1, 0), (-0.1, 0), (0.5, math.nan), (0.5, math.inf)]
)
def test_an_update_by_nonsense_is_refused(accuracy, angle):
    curriculum = gainrl.GaussianCurriculum([0.1, 0.2, 0.3], 2)
    with pytest.raises(ValueError):
        curriculum.update(accuracy, angle)
    assert curriculum.mean == 0


# --- The task -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "notation, number",
    [
        ("1000", "1000"),
        ("1,000", "1000"),
        ("$1000", "1000"),
        ("\\$1,000", "1000"),
        ("1{,}000", "1000"),
        ("1\\,000", "1000"),
        ("1\\!000", "1000"),
        ("1000.00", "1000"),
        ("1000.", "1000"),
        (" 1000 ", "1000"),
        ("01000", "1000"),
        ("+1000", "1000"),
        ("1,234,567", "1234567"),
        ("$1,234.50", "1234.5"),
        ("x = 7", "7"),
        ("50\\%", "50"),
        ("18\\text{ apples}", "18"),
        ("\\text{18 apples}", "18"),
        ("\\mathbf{18}", "18"),
        ("5 dollars.", "5"),
        ("-3", "-3"),
        ("- 3", "-3"),
        ("-\n3", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("-$3", "-3"),
        ("$-3$", "-3"),
        ("-0", "0"),
        ("0", "0"),
        ("0.00", "0"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("100", "100"),  # zeros before the point stay
        ("9" * 5000, "9" * 5000),
    ],
)
def test_one_number_is_one_answer_in_all_its_notations(notation, number):
    assert gainrl.extract_answer(f"So it is \\boxed{{{notation}}}.") == number
    if "\n" not in notation:
        assert gainrl.extract_answer(f"Some work.\n#### {notation}") == number


@pytest.mark.parametrize(
    "content",
    ["", " ", "none", "-", ".", "$", "1/2", "\\frac{1}{2}", "\\frac12", "3-5", "3 to 5", "1, 2"]
    + ["1,2", "1.2.3", "1e5", "2^{10}", "(1, 2)", "1 or 2", "\N{SUPERSCRIPT TWO}", "{", "NaN"],
)
def test_a_box_without_exactly_one_number_has_no_answer(content):
    """To choose one of several numbers would reward a guess."""
    assert gainrl.extract_answer(f"\\boxed{{{content}}}") is None


@pytest.mark.parametrize(
    "text, number",
    [
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{1}\n#### 2", "2"),
        ("#### 1\nso \\boxed{2}", "2"),
        ("\\boxed{1} no, \\boxed{}", None),
        ("\\boxed{1} no, \\boxed{2", "1"),  # the last one never closed
        ("\\boxed {4}", "4"),
        ("\\boxed{\\text{a} 5 \\text{b}}", "5"),
        ("####5", "5"),
        ("#### 5 apples\nand 6 pears", "5"),
        ("5", None),
        ("the answer is 5", None),
        ("", None),
        ("}{\\boxed", None),
        ("\x00\ud800 \\boxed{3}", "3"),
    ],
)
def test_the_last_marked_answer_counts_and_only_a_marked_one(text, number):
    assert gainrl.extract_answer(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" + " " * 200_000 + "}",
        "\\boxed{" * 20_000,
        "\\boxed{" * 20_000 + "}" * 20_000,
        "\\boxed{" + "{a}" * 50_000,
        "\\boxed{" + "{" * 100_000,
        "\\boxed" + " " * 200_000,
        "#" * 200_000,
        "####" + "- " * 100_000,
        "####" + "-" + " " * 200_000,
        "#### " + "1," * 100_000,
        "\\boxed{" + "1." * 100_000 + "}",
    ],
)
def test_no_completion_however_odd_or_long_takes_long(text):
    began = time.perf_counter()
    gainrl.reward(text, "#### 1")
    assert time.perf_counter() - began < 1


def test_every_gold_answer_of_a_gsm8k_shaped_sample_is_read():
    """Calculator notes and numbers in the work, the answer after ####, in all notations."""
    sample = {
        "Tom had <<6*12=72>>72 eggs.\n#### 72": "72",
        "She paid $<<3*4000=12000>>12,000 in 3 years.\n#### 12,000": "12000",
        "That leaves 5 - 8 = <<5-8=-3>>-3 degrees.\n#### -3": "-3",
        "Half of 5 is <<5/2=2.5>>2.5 cups.\n#### 2.5": "2.5",
        "It costs $1,250.00 in all.\n#### $1,250.00": "1250",
        "So 20% of 50 is <<50*.2=10>>10.\n#### 10%": "10",
        "Nothing is left.\n#### 0": "0",
        "It is 1 million.\n#### 1000000": "1000000",
        "Ends with a point.\n#### 18.": "18",
    }
    for gold, number in sample.items():
        assert gainrl.extract_answer(gold) == number
        assert gainrl.reward(f"Thus \\boxed{{{number}}}", gold) == 1
        assert gainrl.reward(f"Thus \\boxed{{{number}1}}", gold) == 0


@pytest.mark.skipif(not GSM8K.is_dir(), reason="../shared/gsm8k is not beside this checkout")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gold_answer_of_the_real_gsm8k_is_read(split):
    for row in read(GSM8K / f"{split}.jsonl"):
        plain = row["answer"].rpartition("####")[2].replace(",", "")
        assert float(gainrl.extract_answer(row["answer"])) == float(plain.strip(" $"))


def test_two_missing_answers_never_agree():
    for text, gold in itertools.product(["", "no idea", "\\boxed{}", "####"], repeat=2):
        assert gainrl.reward(text, gold) == 0


TEMPLATES = {
    "ChatML": gainrl.CHAT_TEMPLATE,
    "refuses the system role": "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}<start>model\n",
    "drops the system role": "{% for m in messages %}{% if m.role != 'system' %}"
    "[{{ m.role }}] {{ m.content }} {% endif %}{% endfor %}[assistant] ",
    "trims the content": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}"
    "</{{ m.role }}>{% endfor %}<assistant>",
}


@pytest.mark.parametrize("kind", ["tokenizer", "crossing"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_question_span_is_the_fewest_tokens_that_hold_the_question(template, kind, request):
    """Held against the decoded text: the span has the whole question, one token less on either side
    has not; what stands before is the system prompt and the example, once."""
    tokenizer = copy.deepcopy(request.getfixturevalue(kind))
    tokenizer.chat_template = template
    for question, padded in zip(QUESTIONS, [" " + q + "\n" for q in QUESTIONS]):
        (prompt,) = gainrl.encode_prompts(tokenizer, [question])
        assert gainrl.encode_prompts(tokenizer, [padded]) == [prompt]
        ids, start, end = prompt
        text = tokenizer.decode
        assert question in text(ids[start:end])
        assert question not in text(ids[start + 1 : end])
        assert question not in text(ids[start : end - 1])
        before = text(ids[: start + 1])  # a token may hold the end of the prefix too
        assert before.count(gainrl.SYSTEM_PROMPT) == 1
        assert before.index(gainrl.SYSTEM_PROMPT) < before.index("What is 2+2?")
        assert gainrl.EXAMPLE_ANSWER in before
        assert "assistant" in text(ids[end - 1 :]) or "model" in text(ids[end - 1 :])
        if "system" in template and "raise" not in template and "!=" not in template:
            messages = gainrl.build_messages(question)
            assert text(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
        elif template in (TEMPLATES["trims the content"], gainrl.CHAT_TEMPLATE):
            messages, flags = gainrl.build_messages(question), {"add_generation_prompt": True}
            assert text(ids) == tokenizer.apply_chat_template(messages, tokenize=False, **flags)


def test_a_chat_is_system_prompt_example_and_question():
    roles = [message["role"] for message in gainrl.build_messages("Q")]
    assert roles == ["system", "user", "assistant", "user"]
    assert gainrl.build_messages("Q")[-1]["content"] == "Q"


def test_tokenizers_without_template_or_offsets_are_refused(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        gainrl.encode_prompts(without, ["Q"])
    with pytest.raises(ValueError, match="no character offsets"):
        gainrl.encode_prompts(transformers.ByT5Tokenizer(), ["Q"])
    without.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="loses"):
        gainrl.encode_prompts(without, ["Q"])


def test_tiny_problems_are_solved_by_their_own_sentences():
    """Replayed by hand: only sentences about the first person change the number."""
    sign = {"gets": 1, "finds": 1, "loses": -1, "sells": -1}
    for seed in range(200):
        row = gainrl.tiny_problem(random.Random(seed))
        first, *acts, _ = row["question"].split(". ")
        who, _, number, _ = first.split()
        number = int(number)
        for act in (act.split() for act in acts):
            if act[-3] == who:
                number += sign[act[-2]] * int(act[-1])
                assert 0 <= number <= gainrl.LARGEST
        assert gainrl.extract_answer(row["answer"]) == str(number)


# --- GRPO -----------------------------------------------------------------------------------------


def test_the_loss_by_hand_on_both_sides_of_the_clip():
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5], [1.1, 9.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0], [-3.0, -1.5], [-0.5, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [True, False]])  # 9.0 is past the end
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    loss, stats = gainrl.grpo_loss(old + ratio.log(), old, advantages, mask, clip=0.2)
    # A = 1: min(1.5, 1.2), min(0.5, 0.8); A = -1: min(-1.5, -1.2), min(-0.5, -0.8); A = 2: 2.2.
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5)
    assert stats == {"kl": 0.0, "clip_fraction": pytest.approx(2 / 5)}

    d = torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.4, 5.0]], dtype=torch.float64)
    logprobs = old + ratio.log()
    with_kl, stats = gainrl.grpo_loss(logprobs, old, advantages, mask, 0.2, logprobs + d, kl=0.5)
    k3 = sum(math.exp(x) - x - 1 for x in (0.1, -0.2, 0.0, 0.3, -0.4)) / 5
    assert stats["kl"] == pytest.approx(k3)
    assert with_kl.item() == pytest.approx(loss.item() + 0.5 * k3)


def test_the_gradient_of_the_loss_equals_finite_differences():
    torch.manual_seed(0)
    old, reference, x = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    mask, advantages = torch.rand(3, 4) > 0.3, torch.randn(3, dtype=torch.float64)

    def loss(x):
        return gainrl.grpo_loss(x, old, advantages, mask, 0.2, reference, 0.3)[0]

    assert torch.autograd.gradcheck(loss, x.requires_grad_())
    x.grad = None
    loss(x).backward()
    assert (x.grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_an_infinity_behind_the_mask_changes_neither_loss_nor_gradient(dtype):
    """exp(200) is infinite in float32; a mask of 0 and 1 is as good as one of False and True."""
    mask, old = torch.tensor([[1, 0]]).to(dtype), torch.tensor([[0.0, -200.0]])
    for reference in (None, torch.tensor([[0.0, 200.0]])):
        x = torch.zeros(1, 2, requires_grad=True)
        loss, stats = gainrl.grpo_loss(x, old, torch.ones(1), mask, 0.2, reference, kl=1.0)
        loss.backward()
        assert loss.item() == -1 and x.grad.tolist() == [[-1, 0]]
        assert stats == {"kl": 0, "clip_fraction": 0}


def test_equal_policies_have_no_divergence_and_the_plain_policy_gradient():
    """On policy the ratio is 1 and nothing is clipped: the gradient is -A over the tokens."""
    x = torch.randn(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    advantages = torch.tensor([1.5, -0.5])
    same = x.detach()
    loss, stats = gainrl.grpo_loss(x, same, advantages, mask, 0.2, same, kl=1.0)
    loss.backward()
    assert stats == {"kl": 0.0, "clip_fraction": 0.0}
    torch.testing.assert_close(x.grad, -advantages[:, None].expand(2, 3) / 6)


def test_advantages_are_z_scores_within_each_group():
    rewards = [[1.0, 0.0, 0.0, 0.0], [0.2, 0.4, 0.9, 0.1]]
    advantages = gainrl.group_advantages(torch.tensor(rewards))
    for row, group in zip(advantages.tolist(), rewards):
        mean = sum(group) / 4
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        assert row == pytest.approx([(r - mean) / deviation for r in group], rel=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_advantage_exactly_zero(value):
    """0.1 has no exact mean: a division by its rounding error would be noise of size one."""
    advantages = gainrl.group_advantages(torch.full((2, 7), value))
    assert advantages.tolist() == [[0.0] * 7] * 2


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="2 or more"):
        gainrl.group_advantages(torch.ones(3, 1))


def padded_batch(vocabulary, extra=0):
    """Two prompts with completions of 5 tokens, padded on the left; and each row unpadded."""
    torch.manual_seed(1)
    rows = [torch.randint(3, vocabulary, (n,)) for n in (12, 9)]
    width = 12 + extra
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.bool)
    for k, row in enumerate(rows):
        ids[k, width - len(row) :], mask[k, width - len(row) :] = row, True
    return ids, mask, rows


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_log_softmax_of_all_logits_of_the_row_alone(model, temperature):
    ids, mask, rows = padded_batch(model.config.vocab_size)
    found = gainrl.completion_logprobs(model, ids, mask, 5, temperature)
    assert found.dtype == torch.float32 and found.shape == (2, 5)
    for k, row in enumerate(rows):
        table = (model(row[None]).logits[0].float() / temperature).log_softmax(-1)
        by_hand = [table[len(row) - 6 + t, row[len(row) - 5 + t]] for t in range(5)]
        torch.testing.assert_close(found[k], torch.stack(by_hand), rtol=0, atol=1e-5)


def test_more_padding_changes_no_logprob(model):
    short, long = (padded_batch(model.config.vocab_size, extra) for extra in (0, 7))
    a, b = (gainrl.completion_logprobs(model, *batch[:2], 5, 1.0) for batch in (short, long))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_chunks_change_neither_logprobs_nor_gradients_and_bound_the_logits(model, monkeypatch):
    ids, mask, _ = padded_batch(model.config.vocab_size)
    sizes, results = [], []
    hook = model.lm_head.register_forward_hook(lambda m, i, out: sizes.append(out.shape[:-1]))
    for chunk in (1024, 3, 1):
        sizes.clear()
        model.zero_grad()
        monkeypatch.setattr(gainrl, "LOGIT_CHUNK", chunk)
        logprobs = gainrl.completion_logprobs(model, ids, mask, 5, 0.8)
        (logprobs * torch.linspace(-1, 1, 10).view(2, 5)).sum().backward()
        assert all(math.prod(size) <= chunk for size in sizes)
        grads = [p.grad.clone() for p in model.parameters()]
        results.append([logprobs.detach(), *grads])
    hook.remove()
    model.zero_grad()
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_shared_prompt_changes_neither_logprobs_nor_gradients(model):
    """The keys and values of a prompt, computed once and repeated, against every row by itself."""
    ids, mask, _ = padded_batch(model.config.vocab_size)
    ids, mask = (x.repeat_interleave(3, 0) for x in (ids, mask))
    ids[:, -5:] = torch.arange(30).view(6, 5)  # prompts of three completions each
    results = []
    for samples in (1, 3):
        model.zero_grad()
        logprobs = gainrl.completion_logprobs(model, ids, mask, 5, 0.8, samples)
        (logprobs * torch.linspace(-1, 1, 30).view(6, 5)).sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


ENDS = list(range(1, 400, 9))  # many end tokens, so that a random model soon stops


@pytest.fixture(scope="session")
def stopping(tokenizer):
    return qwen2(len(tokenizer), eos_token_id=ENDS)


def test_greedy_completions_are_those_of_model_generate(stopping, tokenizer):
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS)
    done = gainrl.generate(stopping, tokenizer, prompts, tiny(max_new_tokens=24))
    lengths = set()
    for row, prompt in enumerate(prompts):
        plain = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
        ids = torch.tensor([prompt.ids])
        expected = stopping.generate(ids, attention_mask=torch.ones_like(ids), **plain)[0]
        completion = done.ids[row][-done.completion_mask.shape[1] :][done.completion_mask[row]]
        assert completion.tolist() == expected[len(prompt.ids) :].tolist()
        assert done.texts[row] == tokenizer.decode(completion, skip_special_tokens=True)
        assert done.ids[row][done.attention_mask[row]].tolist() == expected.tolist()
        lengths.add(len(completion))
    assert len(lengths) > 1  # else nothing was said about rows that stop at different steps


def test_a_completion_ends_with_its_first_end_token_also_where_pad_is_eos(stopping):
    """With pad = eos a mask made from token ids would drop the end token, and never teach it."""
    tokenizer = bpe(pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS[:3])
    generator = torch.Generator().manual_seed(0)
    done = gainrl.generate(stopping, tokenizer, prompts, tiny(max_new_tokens=30), 8, generator)
    ended, width = 0, done.completion_mask.shape[1]
    for ids, mask in zip(done.ids[:, -width:].tolist(), done.completion_mask.tolist()):
        ends = [k for k, token in enumerate(ids) if token in ENDS]
        kept = ends[0] + 1 if ends else width
        assert mask == [True] * kept + [False] * (width - kept)
        ended += bool(ends)
    assert ended > 10
    # A loss that has the end token moves its log-probability; what comes after is no part of it.
    x = torch.zeros(done.completion_mask.shape, requires_grad=True)
    gainrl.grpo_loss(x, x.detach(), torch.ones(24), done.completion_mask)[0].backward()
    torch.testing.assert_close(x.grad, -done.completion_mask.float() / done.completion_mask.sum())


def test_sampling_follows_the_softmax_and_inherits_nothing(tokenizer):
    """A hub model's generation_config may ask for top_k, top_p or a penalty: the log-probs of such
    samples would be wrong."""
    model = qwen2(len(tokenizer))
    inherited = {"do_sample": True, "top_k": 1, "top_p": 0.1, "temperature": 0.01}
    model.generation_config.update(**inherited, repetition_penalty=5.0)
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS[:2])
    config, generator = tiny(max_new_tokens=1, temperature=1.7), torch.Generator().manual_seed(0)
    done = gainrl.generate(model, tokenizer, prompts, config, 3000, generator)
    for row, prompt in enumerate(prompts):
        drawn = done.ids[row * 3000 : (row + 1) * 3000, -1]
        chances = (model(torch.tensor([prompt.ids])).logits[0, -1] / 1.7).softmax(-1)
        counts = torch.bincount(drawn, minlength=len(chances))
        assert is_draw_from(counts, chances.detach())
        assert not is_draw_from(counts, (chances.detach().log() * 1.7).softmax(-1))


def test_samples_stand_beside_their_prompt_and_are_worth_their_logprobs(stopping, tokenizer):
    """The log-probs of the sampled tokens, by sampling's own cached steps and by one full pass."""
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS[:3])
    generator = torch.Generator().manual_seed(0)
    done = gainrl.generate(stopping, tokenizer, prompts, tiny(max_new_tokens=6), 4, generator)
    width = done.completion_mask.shape[1]
    for row in range(12):
        whole = done.ids[row][done.attention_mask[row]].tolist()
        assert whole[: len(prompts[row // 4].ids)] == prompts[row // 4].ids
    assert len(set(done.texts)) > 6
    logprobs = gainrl.completion_logprobs(stopping, done.ids, done.attention_mask, width, 1.0)
    alone = done.ids[5][done.attention_mask[5]]
    table = stopping(alone[None]).logits[0].log_softmax(-1)
    n = done.completion_mask[5].sum()
    by_hand = table[-n - 1 : -1].gather(1, alone[-n:, None])[:, 0]
    torch.testing.assert_close(logprobs[5][done.completion_mask[5]], by_hand, rtol=0, atol=1e-5)


def test_the_angle_of_a_batch_is_the_mean_score_of_its_prompts(model, tokenizer):
    for curriculum in ("angle", "angle-unbiased"):
        config = tiny(curriculum=curriculum, max_new_tokens=1)
        prompts = gainrl.encode_prompts(tokenizer, QUESTIONS)
        include_self = curriculum == "angle"
        generator = torch.Generator().manual_seed(0)
        done = gainrl.generate(model, tokenizer, prompts, config, 1, generator, include_self)
        scores = score(model, tokenizer, QUESTIONS, include_self=include_self)
        assert done.angle == pytest.approx(scores.angle.mean().item(), abs=1e-5)


@pytest.fixture
def batch(stopping, tokenizer):
    """Eight sampled completions of different lengths, with advantages, and a reference model."""
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS[:2])
    generator = torch.Generator().manual_seed(5)
    done = gainrl.generate(stopping, tokenizer, prompts, tiny(max_new_tokens=12), 4, generator)
    assert len(set(done.completion_mask.sum(1).tolist())) > 2
    torch.manual_seed(2)
    return done, torch.randn(8), qwen2(len(tokenizer), seed=7)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_micro_batches_give_the_update_of_the_whole_batch(stopping, batch, updates, scale):
    """The oracle is the textbook loop: one loss over the whole batch, autograd, the log-probs of
    the policy that sampled as the old ones in every update, and a gradient of length 1 at
    most."""
    done, advantages, reference = batch
    advantages, rate = advantages * scale, 0.05
    shape = done.ids, done.attention_mask, done.completion_mask.shape[1], 0.9
    settings = {"updates": updates, "kl": 0.01 * scale, "clip": 0.01, "temperature": 0.9}

    by_hand = copy.deepcopy(stopping)
    with torch.no_grad():
        old = gainrl.completion_logprobs(by_hand, *shape)
        anchor = gainrl.completion_logprobs(reference, *shape)
    for _ in range(updates):
        terms = gainrl.completion_logprobs(by_hand, *shape), old, advantages, done.completion_mask
        loss, stats = gainrl.grpo_loss(*terms, 0.01, anchor, 0.01 * scale)
        grads = torch.autograd.grad(loss, list(by_hand.parameters()))
        norm = torch.stack([g.norm() for g in grads]).norm().item()
        assert (norm > 1) == (scale > 1)  # so that both kinds of step are seen
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), grads):
                p -= rate * g / max(1.0, norm)

    for size in (3, 100):
        ours = copy.deepcopy(stopping)
        optimizer, config = torch.optim.SGD(ours.parameters(), lr=rate), tiny(**settings)
        config.micro_batch = size
        found = gainrl.grpo_update(ours, reference, optimizer, done, advantages, config)
        expected = {**stats, "loss": loss.item(), "grad_norm": norm}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        for a, b in zip(ours.parameters(), by_hand.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_reference_equal_to_the_policy_has_no_divergence(stopping, batch):
    done, advantages, _ = batch
    model, twin = copy.deepcopy(stopping), copy.deepcopy(stopping)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stats = gainrl.grpo_update(model, twin, optimizer, done, advantages, tiny(kl=0.5))
    assert stats["kl"] == 0 and stats["clip_fraction"] == 0


def test_flat_groups_change_no_weight(stopping, batch):
    model = copy.deepcopy(stopping)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    advantages = gainrl.group_advantages(torch.full((2, 4), 0.1)).flatten()
    stats = gainrl.grpo_update(model, None, optimizer, batch[0], advantages, tiny())
    assert stats["loss"] == 0 and stats["grad_norm"] == 0
    assert all(map(torch.equal, model.parameters(), stopping.parameters()))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_change(stopping, batch, what):
    done, advantages, _ = batch
    model = copy.deepcopy(stopping)
    if what == "loss":
        advantages = advantages.clone()
        advantages[-1] = math.nan
    else:
        model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="nan|inf|not finite"):
        gainrl.grpo_update(model, None, optimizer, done, advantages, tiny(micro_batch=3))
    assert all(map(torch.equal, model.parameters(), stopping.parameters()))


def test_the_interval_of_an_evaluation_is_wilsons(world, skilled):
    """Its ends are the p with (p' - p)^2 = z^2 p (1 - p) / n for the measured share p'."""
    problems = gainrl.load_problems(skilled[1], str(world), "test", 400)[:40]
    found = gainrl.evaluate(*skilled, problems, tiny())
    n, share = 40, found["eval_accuracy"]
    prompts = [problem["prompt"] for problem in problems]
    texts = gainrl.generate(*skilled, prompts, tiny()).texts
    assert share == sum(gainrl.reward(t, p["answer"]) for t, p in zip(texts, problems)) / n
    assert found["eval_format"] == sum("\\boxed{" in text for text in texts) / n
    assert found["eval_low"] < share < found["eval_high"]
    for p in (found["eval_low"], found["eval_high"]):
        assert (share - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n)


# --- End to end -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("small"), ROWS)


@pytest.fixture(scope="session")
def flags(world, small):
    """A run of seconds; a later flag replaces an earlier one."""
    sizes = "--prompts-per-step 4 --completions-per-prompt 4 --max-new-tokens 48 --eval-every 3"
    return ["--preset", "tiny", "--model", str(world), "--dataset", str(small), *sizes.split()]


@pytest.fixture(scope="session")
def whole(flags, tmp_path_factory):
    """A run of eight steps that nothing interrupted: read it, do not write to it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert not gainrl.main([*flags, "--run-dir", str(run), "--steps", "8"])
    return run


@pytest.fixture
def twin(whole, tmp_path):
    """A copy of that run, to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def timeless(run):
    times = ("seconds", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in read(run / "metrics.jsonl")]


def test_a_short_run_on_the_tiny_world_improves(world, tmp_path, capsys):
    run = tmp_path / "run"
    where = ["--preset", "tiny", "--model", str(world), "--dataset", str(world)]
    short = ["--run-dir", str(run), "--steps", "8", "--eval-every", "8", "--eval-examples", "300"]
    assert not gainrl.main([*where, *short])
    summary = json.loads((run / "summary.json").read_text())
    with capsys.disabled():
        print(f" {summary['accuracy_before']:.3f} to {summary['accuracy_after']:.3f}", end=" ")
    before, after = (row for row in read(run / "metrics.jsonl") if "eval_accuracy" in row)
    assert after["eval_low"] > before["eval_high"]


def test_a_run_leaves_its_files_with_their_keys(whole, small, skilled, flags):
    assert {p.name for p in whole.iterdir()} == {
        *("config.json", "scores.jsonl", "metrics.jsonl", "samples.jsonl", "summary.json"),
        *("checkpoint", "model"),
    }
    config = json.loads((whole / "config.json").read_text())
    assert config["steps"] == 8 and config["dataset"] == str(small) and config["lr"] == 1e-4

    rows = read(whole / "scores.jsonl")
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    questions = [row["question"] for row in ROWS]
    scores = score(*skilled, questions)
    for name in ("intra", "inter", "angle", "tokens"):
        assert [r[name] for r in rows] == pytest.approx(getattr(scores, name).tolist(), abs=1e-5)

    rows = read(whole / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_accuracy" in row]
    keys = "step accuracy angle mean loss grad_norm useful_groups kl clip_fraction"
    keys += " completion_length seconds tokens_per_second"
    assert all(set(row) == set(keys.split()) for row in steps)
    assert [row["step"] for row in steps] == list(range(1, 9))
    keys = {"step", "eval_accuracy", "eval_low", "eval_high", "eval_format"}
    assert all(set(row) == keys for row in evaluations)
    assert [row["step"] for row in evaluations] == [0, 3, 6, 8]

    gold = {row["question"]: row["answer"] for row in ROWS}
    samples = read(whole / "samples.jsonl")
    assert [row["step"] for row in samples] == [3, 6]
    for row in samples:
        assert len(row["completions"]) == 4
        for text, reward in row["completions"]:
            assert reward == gainrl.reward(text, gold[row["question"]])

    summary = json.loads((whole / "summary.json").read_text())
    keys = "preset curriculum seed steps accuracy_before accuracy_after seconds"
    assert set(summary) == {*keys.split(), "rank_length_correlation"}
    assert summary["steps"] == 8
    assert summary["accuracy_before"] == evaluations[0]["eval_accuracy"]
    assert summary["accuracy_after"] == evaluations[-1]["eval_accuracy"]


def test_the_mean_of_a_run_follows_its_own_accuracy_and_angle(whole):
    """Replayed from the log: each row holds the mean that its batch was drawn with."""
    steps, mean = [row for row in read(whole / "metrics.jsonl") if "loss" in row], 0.0
    n = 500 / 7473 * len(ROWS)
    for row in steps:
        assert row["mean"] == pytest.approx(mean)
        move = math.tanh(2 * (row["accuracy"] - 0.5)) + math.tanh(2 * row["angle"])
        mean = min(mean + n * max(move, 0), len(ROWS) - 1)


@pytest.mark.parametrize("curriculum", gainrl.CURRICULA)
def test_each_curriculum_runs_and_ranks_by_its_own_score(flags, tmp_path, curriculum):
    run = tmp_path / "run"
    arm = ["--curriculum", curriculum, "--run-dir", str(run), "--steps", "2"]
    assert not gainrl.main([*flags, *arm])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["curriculum"] == curriculum and summary["steps"] == 2
    rows = read(run / "scores.jsonl")
    lengths = torch.tensor([row["tokens"] for row in rows])
    if curriculum == "shuffled":
        assert abs(summary["rank_length_correlation"]) < 0.5
    else:
        key = "tokens" if curriculum == "length" else "angle"
        sign = 1 if curriculum in ("length", "reversed") else -1  # what comes first: low or high
        order = sorted(range(len(rows)), key=lambda k: sign * rows[k][key])
        rank = torch.empty(len(rows))
        rank[order] = torch.arange(float(len(rows)))
        expected = pearson(ranks(rank), ranks(lengths))
        assert summary["rank_length_correlation"] == pytest.approx(expected)


def test_no_steps_is_scores_and_ranks_only(flags, tmp_path, capsys):
    run = tmp_path / "run"
    assert not gainrl.main([*flags, "--run-dir", str(run), "--steps", "0"])
    assert len(read(run / "scores.jsonl")) == len(ROWS)
    assert not (run / "metrics.jsonl").exists() and not (run / "checkpoint").exists()
    assert "Spearman" in capsys.readouterr().out


def started(argv, seen_step):
    """The program in a process of its own, once its metrics have the row of that step."""
    code = "import sys, gainrl; sys.exit(gainrl.main(sys.argv[1:]))"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": HERE}
    process = subprocess.Popen([sys.executable, "-c", code, *argv], **pipes)
    metrics = Path(argv[argv.index("--run-dir") + 1]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and read(metrics)[-1]["step"] >= seen_step):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("how", ["kill -9", "Ctrl-C"])
def test_a_stopped_run_goes_on_bit_for_bit(flags, whole, tmp_path, how):
    """Also where the kill comes between two checkpoints: the steps since are done again, with the
    same draws. Ctrl-C lets the step finish, leaves a checkpoint and says how to go on."""
    run = tmp_path / "run"
    # Past 8 steps there would be nothing to resume, so that 8 is asked for in the resume only.
    argv = [*flags, "--run-dir", str(run), "--steps", "500", "--checkpoint-every", "3"]
    process = started(argv, seen_step=2)
    process.send_signal(signal.SIGKILL if how == "kill -9" else signal.SIGINT)
    _, err = process.communicate(timeout=60)
    if how == "kill -9":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert f"--resume {run}" in err.splitlines()[-1]
        (last,) = read(run / "metrics.jsonl")[-1:]
        state = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
        assert state["step"] == last["step"]
    assert 2 <= read(run / "metrics.jsonl")[-1]["step"] < 8
    assert not gainrl.main(["--resume", str(run), "--steps", "8"])
    assert timeless(run) == timeless(whole)
    weights = [
        torch.load(r / "checkpoint" / "state.pt", weights_only=True)["model"] for r in (run, whole)
    ]
    assert all(map(torch.equal, *(w.values() for w in weights)))


def test_ctrl_c_during_an_evaluation_loses_no_step(flags, tmp_path, monkeypatch):
    evaluate, run, calls = gainrl.evaluate, tmp_path / "run", []
    plain = signal.getsignal(signal.SIGINT)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # the one after step 3
            signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    monkeypatch.setattr(gainrl, "evaluate", interrupted)
    rare = ["--steps", "50", "--checkpoint-every", "20", "--run-dir", str(run)]
    assert gainrl.main([*flags, *rare]) == 130
    state = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] >= 3
    assert signal.getsignal(signal.SIGINT) is plain


def test_a_run_that_failed_to_write_its_scores_goes_on(flags, tmp_path, monkeypatch):
    write_jsonl, run = gainrl.write_jsonl, tmp_path / "run"

    def full(path, rows):
        if path.name == "scores.jsonl":
            raise OSError("no space")
        write_jsonl(path, rows)

    argv = [*flags, "--run-dir", str(run), "--steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(gainrl, "write_jsonl", full)
        assert gainrl.main(argv) == 2
    assert not gainrl.main(["--resume", str(run)])


def test_to_resume_a_finished_run_changes_nothing(twin):
    before = files(twin)
    state = torch.load(twin / "checkpoint" / "state.pt", weights_only=True)
    assert not gainrl.main(["--resume", str(twin)])
    after = files(twin)
    assert before.keys() == after.keys()
    for name in ("metrics.jsonl", "samples.jsonl", "scores.jsonl"):
        assert before[twin / name] == after[twin / name]
    again = torch.load(twin / "checkpoint" / "state.pt", weights_only=True)
    assert all(map(torch.equal, state["model"].values(), again["model"].values()))


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(twin, capfd):
    """A real write error, halfway through the file: the largest file this process may write is half
    a checkpoint (Python ignores SIGXFSZ, so that write() fails as on a full disk)."""
    path = twin / "checkpoint" / "state.pt"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert gainrl.main(["--resume", str(twin), "--steps", "10"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = complaint(capfd)
    assert str(path) in line and "--resume" in line
    assert path.read_bytes() == before
    assert not gainrl.main(["--resume", str(twin), "--steps", "9"])


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    flags, tmp_path, monkeypatch, capfd
):
    update, calls, run = gainrl.grpo_update, [], tmp_path / "run"

    def poisoned(model, reference, optimizer, done, advantages, config):
        calls.append(1)
        if len(calls) == 3:
            advantages = advantages + math.nan
        return update(model, reference, optimizer, done, advantages, config)

    monkeypatch.setattr(gainrl, "grpo_update", poisoned)
    assert gainrl.main([*flags, "--run-dir", str(run), "--steps", "5"]) == 2
    assert "nan" in complaint(capfd)
    state = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


# --- Bad input: one line that names the thing, exit status 2, nothing written ---------------------


def refusal(argv, capfd):
    """The one line that a refused command prints."""
    capfd.readouterr()
    try:
        status = gainrl.main([str(word) for word in argv])
    except SystemExit as error:  # argparse's own refusals, which print the usage first
        status = error.code
    lines = capfd.readouterr().err.strip().splitlines()
    assert status == 2
    assert len([line for line in lines if not line.startswith("usage:")]) == 1, lines
    return lines[-1]


@pytest.mark.parametrize(
    "change, named",
    [
        ("--completions-per-prompt 1", "--completions-per-prompt 1"),
        ("--steps -1", "--steps -1"),
        ("--sigma 0", "--sigma 0"),
        ("--sigma -1", "--sigma -1"),
        ("--sigma nan", "--sigma nan"),
        ("--temperature 0", "--temperature 0"),
        ("--temperature -1", "--temperature -1"),
        ("--temperature nan", "--temperature nan"),
        ("--lr 0", "--lr 0"),
        ("--lr -1", "--lr -1"),
        ("--lr nan", "--lr nan"),
        ("--lr inf", "--lr inf"),
        ("--lr much", "--lr"),
        ("--kl -1", "--kl -1"),
        ("--micro-batch 0", "--micro-batch 0"),
        ("--curriculum best", "--curriculum best"),
        ("--preset large", "--preset large"),
        ("--no-such-flag 1", "--no-such-flag"),
        ("--max-new-tokens 500", "--max-new-tokens"),
        ("--model no/such-model", "--model no/such-model"),
        ("--dataset no/such-data", "no/such-data"),
        ("--dataset {empty}", "{empty}/train.jsonl"),
        ("--model {empty}", "--model {empty}"),
        ("--resume {empty}", "{empty}"),
    ],
)
def test_bad_settings_are_refused(flags, tmp_path, capfd, monkeypatch, change, named):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (empty := tmp_path / "empty").mkdir()
    argv = [*flags, "--run-dir", tmp_path / "run", *change.format(empty=empty).split()]
    assert named.format(empty=empty) in refusal(argv, capfd)
    assert not (tmp_path / "run").exists() and not any(empty.iterdir())


GOOD = ROWS[0]
BAD_ROWS = {
    "no question": {"answer": "#### 1"},
    "no answer": {"question": "Why?"},
    "an empty question": {**GOOD, "question": " \n"},
    "an empty answer": {**GOOD, "answer": ""},
    "no number in the gold answer": {**GOOD, "answer": "It is #### many"},
    "no mark in the gold answer": {**GOOD, "answer": "It is 7"},
    "a question that is no text": {**GOOD, "question": 7},
    "an answer that is no text": {**GOOD, "answer": 7},
    "a list": "[1, 2]",
    "null": "null",
    "not JSON": '{"question": "Wh',
    "an empty line": "",
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_file_and_line(flags, tmp_path, capfd, row, split):
    rows = {"train": ROWS, "test": ROWS[:5]}
    rows[split] = [*rows[split][:2], row, *rows[split][2:]]
    data = write_dataset(tmp_path / "data", **rows)
    line = refusal([*flags, "--dataset", data, "--run-dir", tmp_path / "run"], capfd)
    assert f"{data}/{split}.jsonl:3 " in line
    assert not (tmp_path / "run").exists()


def test_fewer_questions_than_a_batch_are_refused(flags, tmp_path, capfd):
    run = tmp_path / "run"
    assert gainrl.main([*flags, "--prompts-per-step", "41", "--run-dir", str(run)]) == 2
    line = complaint(capfd)
    assert "40 questions" in line and "41" in line
    assert not run.exists()


def test_an_empty_data_set_and_a_missing_split_are_refused(flags, tmp_path, capfd):
    data, run = write_dataset(tmp_path / "data", []), tmp_path / "run"
    argv = [*flags, "--dataset", data, "--run-dir", run]
    assert f"{data}/train.jsonl" in refusal(argv, capfd)
    write_dataset(data, ROWS)
    (data / "test.jsonl").unlink()
    assert f"{data}/test.jsonl" in refusal(argv, capfd)
    assert not run.exists()


def test_a_few_prompts_too_long_for_the_context_are_dropped_and_counted(flags, tmp_path, capfd):
    long = {"question": "Ann has 3 apples. " * 200, "answer": "#### 3"}
    data, run = write_dataset(tmp_path / "data", [*ROWS[:5], long, *ROWS[5:], long]), tmp_path / "r"
    argv = [*flags, "--dataset", str(data), "--run-dir", str(run), "--steps", "0"]
    assert not gainrl.main(argv)
    assert "2 of 42 train prompts" in capfd.readouterr().out
    index = [row["index"] for row in read(run / "scores.jsonl")]
    assert index == [k for k in range(41) if k != 5]  # the rows of the file, not of what is left


def test_a_tokenizer_without_a_chat_template_is_refused(flags, skilled, tmp_path, capfd):
    model, tokenizer = skilled
    folder, tokenizer = tmp_path / "plain", copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    line = refusal([*flags, "--model", folder, "--run-dir", tmp_path / "run"], capfd)
    assert "no chat template" in line and str(folder) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut in half", "empty", "not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(twin, capfd, damage):
    path = twin / "checkpoint" / "state.pt"
    whole = path.read_bytes()
    parts = {"cut in half": whole[: len(whole) // 2], "empty": b"", "not a checkpoint": b"hello"}
    path.write_bytes(parts[damage])
    before = files(twin)
    assert str(path) in refusal(["--resume", twin], capfd)
    assert files(twin) == before


@pytest.mark.parametrize("change", ["--lr 1e-3", "--curriculum length", "--seed 1"])
def test_a_checkpoint_of_another_configuration_is_refused(twin, capfd, change):
    before = files(twin)
    line = refusal(["--resume", twin, *change.split()], capfd)
    assert str(twin) in line and change.split()[0] in line
    assert files(twin) == before


def test_a_checkpoint_of_other_questions_is_refused(twin, capfd, monkeypatch):
    """Its scores are those of the questions it was made with, in their order."""
    before, load = files(twin), gainrl.load_problems
    monkeypatch.setattr(gainrl, "load_problems", lambda *inputs: load(*inputs)[::-1])
    assert "other data" in refusal(["--resume", twin], capfd)
    assert files(twin) == before


def test_a_run_directory_that_holds_another_run_is_refused(flags, twin, tmp_path, capfd):
    before = files(twin)
    line = refusal([*flags, "--run-dir", twin], capfd)
    assert str(twin) in line and "--resume" in line
    assert str(tmp_path / "none") in refusal(["--resume", tmp_path / "none"], capfd)
    assert files(twin) == before and not (tmp_path / "none").exists()


def test_the_tiny_worlds_model_is_not_given_other_words(tmp_path, capfd):
    """Refused before anything is made: its vocabulary has the tiny world's words only."""
    argv = ["--preset", "tiny", "--dataset", os.fspath(tmp_path), "--run-dir", tmp_path / "run"]
    assert "--model" in refusal(argv, capfd)
