"""What gainrl.py promises, each promise held against what knows the answer by another way.

The oracles are a double loop, arithmetic by hand, autograd, finite differences, chi-square and
`model.generate`; nothing here was recorded from the code under test. Read in order it explains
GAIN-RL a second time: angle, scores, curriculum, task, GRPO, and whether the scores say something
about gradients. Then come whole runs, what stops them, and bad input.

One tiny world is warmed up for all tests that need a model with some skill; the others use small
random Qwen2 models.

    python -m pytest -q test_gainrl.py        minutes on two cores; no GPU, no network
"""

import builtins
import contextlib
import copy
import dis
import functools
import importlib.util
import itertools
import json
import math
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
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
ROWS = [gainrl.tiny_problem(random.Random(seed), distractors=seed % 3) for seed in range(40)]
END_TOKENS = list(range(1, 400, 9))  # many, so that a random model soon stops
RANDOM_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,  # so that its next-token distribution is far from flat
    "max_position_embeddings": 2048,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


# --- Builders and fixtures ------------------------------------------------------------------------


def random_model(vocab_size, seed=0, family="Qwen2", **settings):
    """A small model with random weights."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(vocab_size=vocab_size, **{**RANDOM_MODEL, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bpe_tokenizer(template=gainrl.CHAT_TEMPLATE, splits=True, pad=gainrl.PAD, end=gainrl.END):
    """A byte-level BPE as real models have it. splits=False lets its tokens cross words and line
    ends, so that a token can hold the end of the prefix and the start of the question at once."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    core.pre_tokenizer = byte_level
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[gainrl.PAD, gainrl.END, gainrl.BEGIN],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    texts = ["user\n" + text + "\n" for text in QUESTIONS * 3 + [gainrl.SYSTEM_PROMPT]]
    core.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=end, chat_template=template
    )


def tiny_config(**settings):
    return gainrl.Config(**{**gainrl.PRESETS["tiny"], **settings})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def score_questions(model, tokenizer, questions, **options):
    return gainrl.score_prompts(model, gainrl.encode_prompts(tokenizer, questions), **options)


def call_by_keyword_only(model):
    """A copy of a model whose body refuses arguments by position: their order is not the same in
    all models."""
    model = copy.deepcopy(model)
    plain_forward = model.base_model.forward

    @functools.wraps(plain_forward)
    def forward(*positional, **named):
        assert not positional
        return plain_forward(**named)

    model.base_model.forward = forward
    return model


def section_elsewhere(number, folder):
    """What another project gets that copies one section of gainrl.py: a module with the section and
    what its head says to take along, and nothing else."""
    source = Path(gainrl.__file__).read_text()
    sections = re.split(r"^(?=# --- [0-9]+\. )", source, flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"# --- {number}. "))
    _, _, head = section.partition("# To copy this section, take along:\n")
    imports = re.match(r"(#     .*\n)*", head).group().replace("#     ", "")
    assert imports
    path = folder / "elsewhere.py"
    path.write_text(imports + section)
    spec = importlib.util.spec_from_file_location("elsewhere", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    known = {*vars(module), *dir(builtins)}
    assert global_names(compile(imports + section, path, "exec")) <= known
    return module


def global_names(code):
    """The global names that the functions in a code object read, run or not."""
    instructions = dis.get_instructions(code)
    names = {line.argval for line in instructions if line.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return names


def cosine_means(hidden, prefix_mask, question_mask, include_self=True):
    """C_intra and C_inter of one row as the paper writes them: a cosine for each pair of tokens."""
    x = hidden.double()

    def mean_cosine(pairs):
        cosines = [F.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs]
        return sum(cosines) / len(cosines) if cosines else 0.0

    question = question_mask.nonzero().flatten().tolist()
    prefix = prefix_mask.nonzero().flatten().tolist()
    within = [(i, j) for i in question for j in question if include_self or i != j]
    across = [(i, j) for i in question for j in prefix]
    return mean_cosine(within), mean_cosine(across)


def ranks(x):
    """Rank by counting: how many are smaller, and half of the ties."""
    return (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x.norm() * y.norm())).item()


def is_draw_from(counts, probabilities):
    """Chi-square: whether counts can be draws from the probabilities. Cells that expect fewer than
    5 are one cell; the bound is five standard deviations, so that chance alone never fails."""
    counts, expected = counts.double(), probabilities.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


def never(*inputs, **options):
    pytest.fail("this must not be called")


def read_json(path):
    return json.loads(Path(path).read_text())


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_steps(run):
    return [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def read_evaluations(run):
    return [row for row in read_rows(run / "metrics.jsonl") if "eval_accuracy" in row]


def read_checkpoint(run):
    return torch.load(run / "checkpoint" / "state.pt", weights_only=True)


def without_times(run):
    times = ("seconds", "tokens_per_second")
    rows = read_rows(run / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in times} for row in rows]


def equal_weights(run, other):
    """Whether the checkpoints of two runs have the same weights, bit for bit."""
    weights, others = read_checkpoint(run)["model"], read_checkpoint(other)["model"]
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def file_contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def write_dataset(folder, train, test=ROWS[:8]):
    """A row may be a dict, or the raw text of its line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def command(*words):
    """The status of `python gainrl.py WORDS`, run in this process."""
    try:
        return gainrl.main([str(word) for word in words])
    except SystemExit as error:  # argparse's own: --help, and what it refuses
        return error.code


@contextlib.contextmanager
def process(*words):
    """`python gainrl.py WORDS` as a process of its own, which ends with the context."""
    argv = [sys.executable, gainrl.__file__, *[str(word) for word in words]]
    with subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=HERE
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def complaint(capfd):
    """The one line that says what was wrong; a progress bar may stand before or after it."""
    output = capfd.readouterr().err
    assert "Traceback" not in output
    (line,) = re.findall(r"(?:gainrl\.py|error): (.*)", output)
    return line


def refusal(capfd, *words):
    """The one line by which a command is refused, with status 2."""
    capfd.readouterr()
    assert command(*words) == 2
    return complaint(capfd)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "tiny-world"
    gainrl.make_tiny_world(folder)
    return folder


@pytest.fixture(scope="session")
def skilled(tiny_world):
    """The tiny world's model and tokenizer. Not to be trained: all tests share them."""
    return gainrl.load_model(str(tiny_world), torch.device("cpu"))


@pytest.fixture(scope="session")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def crossing_tokenizer():
    return bpe_tokenizer(splits=False)


@pytest.fixture(scope="session")
def model(tokenizer):
    return random_model(len(tokenizer))


@pytest.fixture(scope="session")
def stopping_model(tokenizer):
    return random_model(len(tokenizer), eos_token_id=END_TOKENS)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    return gainrl.encode_prompts(tokenizer, QUESTIONS)


@pytest.fixture
def rollout(stopping_model, tokenizer, prompts):
    """Four completions of each of two prompts, of different lengths."""
    config = tiny_config(max_new_tokens=12)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts[:2], config, 4, seeded(5))
    assert len(set(rollout.completion_mask.sum(1).tolist())) > 2
    return rollout


@pytest.fixture
def advantages():
    return torch.randn(2, 4, generator=seeded(2))


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("small"), ROWS)


@pytest.fixture(scope="session")
def small_run(tiny_world, small_dataset):
    """The flags of a run of seconds; a later flag replaces an earlier one."""
    sizes = "--prompts-per-step 4 --completions-per-prompt 4 --max-new-tokens 48 --eval-every 3"
    paths = ["--model", str(tiny_world), "--dataset", str(small_dataset)]
    return ["--preset", "tiny", "--device", "cpu", *paths, *sizes.split()]


@pytest.fixture(scope="session")
def whole_run(small_run, tmp_path_factory):
    """A run of eight steps that nothing interrupted: to read, not to write to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert command(*small_run, "--run-dir", run, "--steps", 8) == 0
    return run


@pytest.fixture
def copied_run(whole_run, tmp_path):
    """A copy of that run, to spoil."""
    return Path(shutil.copytree(whole_run, tmp_path / "copied"))


@pytest.fixture
def run(tmp_path):
    """Where a run is to be kept; nothing is there yet."""
    return tmp_path / "run"


# --- Angle concentration --------------------------------------------------------------------------


def ragged_rows():
    """Three rows of prefix and question, padded on both sides with NaN: padding may be anything."""
    hidden = torch.randn(3, 14, 6, generator=seeded()) + 0.5
    prefix_mask = torch.zeros(3, 14, dtype=torch.bool)
    question_mask = torch.zeros(3, 14, dtype=torch.bool)
    for row, (start, middle, end) in enumerate([(0, 4, 14), (3, 5, 11), (2, 8, 9)]):
        prefix_mask[row, start:middle] = True
        question_mask[row, middle:end] = True
    hidden[~(prefix_mask | question_mask)] = math.nan
    return hidden, prefix_mask, question_mask


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_closed_form_is_the_mean_over_all_token_pairs(dtype, include_self):
    hidden, prefix_mask, question_mask = ragged_rows()
    hidden = hidden.to(dtype)
    hidden[1, 6] = 0  # a zero vector has cosine 0 with every token, itself as well
    intra, inter = gainrl.angle_concentration(hidden, prefix_mask, question_mask, include_self)
    assert intra.dtype == inter.dtype == torch.float32
    assert intra.shape == inter.shape == (3,)
    for row in range(3):
        masks = prefix_mask[row], question_mask[row]
        expected = cosine_means(hidden[row], *masks, include_self)
        assert (intra[row].item(), inter[row].item()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_masks_of_0_and_1_are_as_good_as_bool(dtype):
    hidden, prefix_mask, question_mask = ragged_rows()
    expected = gainrl.angle_concentration(hidden, prefix_mask, question_mask)
    found = gainrl.angle_concentration(hidden, prefix_mask.to(dtype), question_mask.to(dtype))
    assert all(map(torch.equal, found, expected))


def test_the_order_of_tokens_within_a_segment_does_not_matter():
    hidden, prefix_mask, question_mask = ragged_rows()
    before = gainrl.angle_concentration(hidden, prefix_mask, question_mask)
    hidden[0] = torch.cat([hidden[0, :4].flip(0), hidden[0, 4:][torch.randperm(10)]])
    after = gainrl.angle_concentration(hidden, prefix_mask, question_mask)
    torch.testing.assert_close(after, before)


def test_parallel_tokens_score_one_and_opposite_tokens_cancel():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[1.0, 2.0], [-3.0, -6.0]]])
    question_mask = torch.ones(2, 2, dtype=torch.bool)
    intra, inter = gainrl.angle_concentration(hidden, ~question_mask, question_mask)
    torch.testing.assert_close(intra, torch.tensor([1.0, 0.0]))
    assert inter.tolist() == [0, 0]  # there is no prefix
    intra, _ = gainrl.angle_concentration(hidden, ~question_mask, question_mask, include_self=False)
    torch.testing.assert_close(intra, torch.tensor([1.0, -1.0]))


def test_a_question_of_one_token_is_only_itself():
    hidden, question_mask = torch.randn(1, 1, 8), torch.ones(1, 1, dtype=torch.bool)
    masks = ~question_mask, question_mask
    assert gainrl.angle_concentration(hidden, *masks)[0].item() == pytest.approx(1)
    assert gainrl.angle_concentration(hidden, *masks, include_self=False)[0].item() == 0


def test_a_row_without_a_question_token_is_refused_by_number():
    hidden, prefix_mask, question_mask = ragged_rows()
    question_mask[1] = False
    with pytest.raises(ValueError, match="row 1"):
        gainrl.angle_concentration(hidden, prefix_mask, question_mask)


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kind", ["tokenizer", "crossing_tokenizer"])
def test_scores_with_a_reused_prefix_are_those_of_whole_prompts_run_alone(
    kind, include_self, request
):
    tokenizer = request.getfixturevalue(kind)
    model = random_model(len(tokenizer))
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS)
    scores = gainrl.score_prompts(model, prompts, batch_size=2, include_self=include_self)
    for row, (ids, start, end) in enumerate(prompts):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        token = torch.arange(len(ids))
        masks = token < start, (start <= token) & (token < end)
        intra, inter = cosine_means(hidden, *masks, include_self)
        found = [column[row].item() for column in scores]
        assert found == pytest.approx([intra, inter, intra + inter, end - start], abs=1e-5)


def test_batch_size_and_order_of_questions_change_no_score(model, tokenizer):
    questions = QUESTIONS * 2 + ["Cid has 5 cards.", "Dee has 6 eggs.", "Eve has 7 figs."]
    expected = score_questions(model, tokenizer, questions)
    order = torch.randperm(len(questions), generator=seeded())
    shuffled = [questions[k] for k in order]
    for batch_size in (1, 3):
        scores = score_questions(model, tokenizer, shuffled, batch_size=batch_size)
        for found, column in zip(scores, expected):
            torch.testing.assert_close(found, column[order], rtol=0, atol=1e-5)


def test_scoring_never_runs_the_head(model, prompts):
    handle = model.lm_head.register_forward_hook(never)
    try:
        gainrl.score_prompts(model, prompts)
    finally:
        handle.remove()


def test_a_score_that_is_not_finite_is_refused_by_the_number_of_its_question(tokenizer):
    model = random_model(len(tokenizer))
    (poisoned,) = tokenizer("Z")["input_ids"]
    model.model.embed_tokens.weight.data[poisoned] = math.nan
    with pytest.raises(ValueError, match="question 1 is not finite"):
        score_questions(model, tokenizer, ["Ann has 3.", "Zoe has 4.", "Ben has 5."])


def test_section_3_works_elsewhere_with_what_its_head_says(model, prompts, tmp_path):
    elsewhere = section_elsewhere(3, tmp_path)
    ours, theirs = gainrl.score_prompts(model, prompts), elsewhere.score_prompts(model, prompts)
    assert all(map(torch.equal, ours, theirs))


# --- The curriculum -------------------------------------------------------------------------------


def test_probabilities_are_a_gaussian_over_ranks():
    curriculum = gainrl.GaussianCurriculum(torch.rand(50), 4, sigma=5.0)
    curriculum.mean = 12.5
    density = [math.exp(-((rank - 12.5) ** 2) / (2 * 5.0**2)) for rank in range(50)]
    expected = [value / sum(density) for value in density]
    assert curriculum.probabilities().dtype == torch.float64
    assert curriculum.probabilities().tolist() == pytest.approx(expected, rel=1e-12)


def test_a_mean_far_from_all_data_still_gives_probabilities_and_full_batches():
    curriculum = gainrl.GaussianCurriculum(torch.rand(100), 40, sigma=1.0)
    curriculum.mean = 1e9
    probabilities = curriculum.probabilities()
    assert probabilities.isfinite().all()
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.argmax() == 99
    batches = [curriculum.sample() for _ in range(20)]
    assert all(len(set(batch)) == 40 for batch in batches)


def test_first_draws_follow_the_probabilities():
    curriculum = gainrl.GaussianCurriculum(torch.arange(30), 1, sigma=6.0)
    curriculum.mean = 8.0
    drawn = torch.tensor([curriculum.sample()[0] for _ in range(5000)])
    counts = torch.bincount(drawn, minlength=30)[curriculum.order]
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
    by_hand = sorted(range(120), key=lambda index: (-scores[index], index))
    assert gainrl.GaussianCurriculum(scores, 2).order.tolist() == by_hand


def S(z):
    """The paper's move of the mean, by the sigmoid it is written with."""
    return 2 / (1 + math.exp(-2 * z)) - 1


def test_the_mean_moves_by_two_sigmoids():
    curriculum, mean = gainrl.GaussianCurriculum(torch.rand(1000), 4, step=50.0), 0.0
    for accuracy, angle in [(0.9, 0.4), (0.2, 0.7), (0.5, 0.1)]:
        mean += 50 * (S(2 * (accuracy - 0.5)) + S(2 * angle))
        assert curriculum.update(accuracy, angle) == pytest.approx(mean)
    curriculum = gainrl.GaussianCurriculum(
        torch.rand(1000), 4, step=10.0, target=0.2, alpha=3.0, gamma=0.5
    )
    assert curriculum.update(0.6, 0.3) == pytest.approx(10 * (S(3 * 0.4) + S(0.5 * 0.3)))


def test_the_mean_never_goes_back_and_stops_at_the_last_rank():
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
    saved = copy.deepcopy(first.state_dict())
    second = gainrl.GaussianCurriculum(scores, 8, seed=99)
    second.load_state_dict(saved)
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
    assert all(100 <= value < 130 for batch in batches for value in batch.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="score 2 is not finite"):
        gainrl.GaussianCurriculum([0.1, 0.2, bad, 0.3], 2)


@pytest.mark.parametrize("batch_size", [0, 4])
def test_a_batch_that_cannot_be_drawn_is_refused(batch_size):
    with pytest.raises(ValueError, match="3 questions"):
        gainrl.GaussianCurriculum([0.1, 0.2, 0.3], batch_size)


@pytest.mark.parametrize("bad", [0, -1, math.nan])
@pytest.mark.parametrize("name", ["step", "sigma"])
def test_a_step_or_sigma_that_is_not_above_0_is_refused(name, bad):
    with pytest.raises(ValueError, match=f"{name} {bad}"):
        gainrl.GaussianCurriculum([0.1, 0.2, 0.3], 2, **{name: bad})


@pytest.mark.parametrize(
    "accuracy, angle", [(math.nan, 0), (1.1, 0), (-0.1, 0), (0.5, math.nan), (0.5, math.inf)]
)
def test_an_update_by_nonsense_is_refused(accuracy, angle):
    curriculum = gainrl.GaussianCurriculum([0.1, 0.2, 0.3], 2)
    with pytest.raises(ValueError):
        curriculum.update(accuracy, angle)
    assert curriculum.mean == 0


ANGLES = [0.4, 0.9, 0.1, 0.7, 0.7]
LENGTHS = [30, 10, 20, 50, 40]
ORDERS = {
    "angle": [1, 3, 4, 0, 2],
    "angle-unbiased": [1, 3, 4, 0, 2],
    "length": [1, 2, 0, 4, 3],
    "reversed": [2, 0, 3, 4, 1],
    "uniform": [1, 3, 4, 0, 2],
}


def make_curriculum(flags="", n_questions=7473, angles=None, lengths=None):
    """The curriculum of a command line, for scores that are given or random."""
    angles = torch.rand(n_questions) if angles is None else torch.tensor(angles)
    lengths = torch.arange(len(angles)) if lengths is None else torch.tensor(lengths)
    config = gainrl.parse_config(["--preset", "gsm8k", *flags.split()])
    return gainrl.make_curriculum(config, gainrl.Scores(angles, angles, angles, lengths))


@pytest.mark.parametrize("name, order", ORDERS.items())
def test_each_arm_sorts_by_its_own_score(name, order):
    """High C first, but `length` has short questions and `reversed` low C first."""
    flags = f"--curriculum {name} --prompts-per-step 2"
    curriculum = make_curriculum(flags, angles=ANGLES, lengths=LENGTHS)
    assert curriculum.order.tolist() == order
    assert math.isinf(curriculum.sigma) == (name == "uniform")


def test_the_shuffled_arm_is_a_permutation_by_the_seed_alone():
    def order(seed):
        return make_curriculum(f"--curriculum shuffled --seed {seed}").order.tolist()

    assert sorted(order(1)) == list(range(7473))
    assert order(1) == order(1) != order(2)
    assert abs(pearson(torch.tensor(order(1)).double(), torch.arange(7473.0).double())) < 0.06


def test_the_defaults_are_the_constants_of_the_released_code():
    """On GSM8K: n = 500, sigma = 1000, beta = 0.5, alpha = gamma = 2; other data sets in
    proportion."""
    curriculum = make_curriculum()
    assert curriculum.update(0.8, 0.3) == pytest.approx(500 * (S(2 * 0.3) + S(2 * 0.3)))
    curriculum.mean = 3000.0
    p = curriculum.probabilities()
    assert (p[4000] / p[3000]).item() == pytest.approx(math.exp(-0.5))
    small = make_curriculum(n_questions=747)
    assert small.update(0.8, 0.3) == pytest.approx(747 / 7473 * 1000 * S(2 * 0.3))
    assert small.sigma == pytest.approx(747 / 7473 * 1000)


def test_the_flags_of_the_curriculum_reach_it_in_ranks():
    curriculum = make_curriculum(
        "--curriculum-step 40 --sigma 300 --target 0.2 --alpha 3 --gamma 0.5"
    )
    assert curriculum.update(0.6, 0.3) == pytest.approx(40 * (S(3 * 0.4) + S(0.5 * 0.3)))
    curriculum.mean = 3000.0
    p = curriculum.probabilities()
    assert (p[3300] / p[3000]).item() == pytest.approx(math.exp(-0.5))


def test_section_4_works_elsewhere_with_what_its_head_says(tmp_path):
    scores = torch.rand(100)
    ours, theirs = gainrl.GaussianCurriculum, section_elsewhere(4, tmp_path).GaussianCurriculum
    batches = []
    for curriculum in (ours(scores, 8), theirs(scores, 8)):
        assert curriculum.update(0.9, 0.5) > 0
        batches.append(curriculum.sample())
    assert batches[0] == batches[1]


# --- The task: prompts, answers, reward -----------------------------------------------------------


def test_a_chat_is_system_prompt_example_and_question():
    roles = [message["role"] for message in gainrl.build_messages("Q")]
    assert roles == ["system", "user", "assistant", "user"]
    assert gainrl.build_messages("Q")[-1]["content"] == "Q"


# By name: the template, and what it is to make of the chat of the question Q, where SYSTEM and
# ANSWER stand for the system prompt and the example's answer.
TEMPLATES = {
    "ChatML": (
        gainrl.CHAT_TEMPLATE,
        (
            "<|im_start|>system\nSYSTEM<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
            "<|im_start|>assistant\nANSWER<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    ),
    "refuses the system role": (
        (
            "{% for m in messages %}"
            "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}<start>model:"
        ),
        (
            "<start>user\nSYSTEM\n\nWhat is 2+2?<end>\n<start>assistant\nANSWER<end>\n"
            "<start>user\nQ<end>\n<start>model:"
        ),
    ),
    "drops the system role": (
        (
            "{% for m in messages %}"
            "{% if m.role != 'system' %}[{{ m.role }}] {{ m.content }} {% endif %}"
            "{% endfor %}[assistant] "
        ),
        "[user] SYSTEM\n\nWhat is 2+2? [assistant] ANSWER [user] Q [assistant] ",
    ),
    "trims the content": (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }};{% endfor %}<assistant>",
        "<system>SYSTEM;<user>What is 2+2?;<assistant>ANSWER;<user>Q;<assistant>",
    ),
    "thinks unless it is told not to": (
        (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
            "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        ),
        "[system]SYSTEM[user]What is 2+2?[assistant]ANSWER[user]Q[assistant]<think></think>",
    ),
}
NO_MARKS = "{% for m in messages %}{{ m.content }} {% endfor %}"  # no token ends a turn


@pytest.mark.parametrize("kind", ["tokenizer", "crossing_tokenizer"])
@pytest.mark.parametrize("template, expected", TEMPLATES.values(), ids=TEMPLATES)
def test_a_prompt_is_the_chat_by_the_template_and_its_span_holds_just_the_question(
    template, expected, kind, request
):
    """Held against the decoded text: the span has the whole question, one token less on either side
    has not."""
    tokenizer = copy.deepcopy(request.getfixturevalue(kind))
    tokenizer.chat_template = template
    for question in QUESTIONS:
        (prompt,) = gainrl.encode_prompts(tokenizer, [question])
        assert gainrl.encode_prompts(tokenizer, [f" {question}\n"]) == [prompt]
        ids, start, end = prompt
        text = expected.replace("SYSTEM", gainrl.SYSTEM_PROMPT)
        text = text.replace("ANSWER", gainrl.EXAMPLE_ANSWER)
        head, tail = text.split("Q")
        assert tokenizer.decode(ids) == head + question + tail
        assert question in tokenizer.decode(ids[start:end])
        assert question not in tokenizer.decode(ids[start + 1 : end])
        assert question not in tokenizer.decode(ids[start : end - 1])
        before = tokenizer.decode(ids[: start + 1])  # a token may hold the end of the prefix too
        assert before.startswith(head)


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "no chat template"),
        ("{{ messages[0].content }}", "loses the question"),
        (gainrl.CHAT_TEMPLATE + "{{ messages[-1].content }}", "repeats"),
        ("{{ messages[-1].content }}", "loses the system prompt"),
        ("{{ raise_exception('never') }}", "never"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        (gainrl.CHAT_TEMPLATE.replace("m.content", "m.content | upper"), "system prompt"),
        (gainrl.CHAT_TEMPLATE.replace("m.content", "m.content.replace('many', 'few')"), "rewrites"),
    ],
)
def test_a_template_that_does_not_give_the_chat_is_refused_with_the_reason(
    tokenizer, template, reason
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason):
        gainrl.encode_prompts(tokenizer, ["How many x?"])


def test_a_tokenizer_without_character_offsets_is_refused():
    with pytest.raises(ValueError, match="no character offsets"):
        gainrl.encode_prompts(transformers.ByT5Tokenizer(), ["Q"])


def test_head_and_tail_of_an_earlier_rendering_replace_the_template(tokenizer):
    """So that a resumed run keeps the date that its template wrote into the prompts."""
    (prompt,) = gainrl.encode_prompts(tokenizer, ["Why?"], ("Today is Monday. ", " Answer:"))
    assert tokenizer.decode(prompt.ids) == "Today is Monday. Why? Answer:"
    assert tokenizer.decode(prompt.ids[prompt.start : prompt.end]).strip() == "Why?"


NOTATIONS = {  # kind: {content of the box: the answer}
    "plain": {"7": "7", " 7 ": "7", "\n7\n": "7", "0": "0", "007": "7", "+7": "7", "7.": "7"},
    "decimals": {"2.50": "2.5", ".5": "0.5", "7.00": "7", "0.0": "0", "-0.0": "0", "100": "100"},
    "thousands": {
        "2,500": "2500",
        "2{,}500": "2500",
        "2,\\!500": "2500",
        "2{,}\\!500": "2500",
        "2,\\,500": "2500",
        "2\\,500": "2500",
        "2\\ 500": "2500",
        "2\u2009500": "2500",
        "2\u202f500": "2500",
        "2 500 000": "2500000",
        "2,500,000.50": "2500000.5",
        "2'500": "2500",
    },
    "currency": {
        "$12": "12",
        "\\$12.50": "12.5",
        "12\\$": "12",
        "£12": "12",
        "12 €": "12",
        "₹12": "12",
        "¥1,200": "1200",
        "₽12": "12",
        "\\pounds 12": "12",
        "12 dollars": "12",
        "\\text{\\$}12\\text{ per hour}": "12",
    },
    "percent": {"30%": "30", "30\\%": "30", "30 \\%": "30", "30\\text{ percent}": "30"},
    "sign": {
        "-8": "-8",
        "- 8": "-8",
        "\u22128": "-8",
        "\u20138": "-8",
        "-\\text{8}": "-8",
        "{-}8": "-8",
        "\\text{-}8": "-8",
        "negative 8": "-8",
        "Minus $8": "-8",
        "-€8": "-8",
        "-\\$8": "-8",
        "\\$-8": "-8",
        "$-$8": "-8",
        "(-8)": "-8",
        "-\\left(8\\right)": "-8",
        "-8.50": "-8.5",
        "-8^\\circ": "-8",
        "-\\boxed{8}": "-8",
        "x = -8": "-8",
        "-08": "-8",
    },
    "wrappers": {
        "\\text{9}": "9",
        "\\mathbf{\\text{9}}": "9",
        "\\textbf{\\mathrm{\\$9{,}000}}": "9000",
        "{\\bf 9}": "9",
        "\\boldsymbol{9}": "9",
        "\\boxed{9}": "9",
        "\\text{\\boxed{9}}": "9",
        "\\fbox{9}": "9",
        "\\color{blue}{9}": "9",
        "\\text{\\text{\\text{\\text{\\text{9}}}}}": "9",
        "**9**": "9",
        "\\(9\\)": "9",
        "$$9$$": "9",
        "\u201c9\u201d": "9",
    },
    "unit": {
        "5 apples": "5",
        "5 \\text{ miles per hour}": "5",
        "5\\text{ km/h}": "5",
        "\\$5/\\text{hour}": "5",
        "5 cm": "5",
        "5cm": "5",
        "5 \\mathrm{m}": "5",
        "5 sq. ft.": "5",
        "5^{\\circ}\\text{C}": "5",
        "5°": "5",
        "5 (total)": "5",
        "5 times": "5",
        "5 points": "5",
        "5 months": "5",
        "5 pounds and": None,
    },
    "name": {"x = 5": "5", "\\text{Total} = 5": "5", "2x = 10": None, "x^2 = 9": None},
    "trail": {
        "5,": "5",
        "5;": "5",
        "5\\\\": "5",
        "\\text{5\\\\}": "5",
        "5 \\,": "5",
        "5<|im_end|>": "5",
        "5!": None,
    },
    "wrong grouping": dict.fromkeys(
        [
            "1,00",
            "3,5",
            "0,500",
            "12,34,567",
            "1,0000",
            "1,000,00",
            "1000,000",
            "1.000,00",
            "1,000 000",
            "1, 000",
            "1234,567",
        ]
    ),
    "operations": dict.fromkeys(
        [
            "1/2",
            "\\frac{1}{2}",
            "\\frac12",
            "2\\frac{1}{2}",
            "5!",
            "2^3",
            "5^{2}",
            "5²",
            "2½",
            "\\sqrt{4}",
        ]
        + [
            "\\sqrt4",
            "√4",
            "5\\pi",
            "5\\pm1",
            "\\pm 5",
            "±5",
            "5+3",
            "5-3",
            "5\\times2",
            "2\\cdot 3",
        ]
        + [
            "|5|",
            "\\log 5",
            "\\lfloor 5\\rfloor",
            "\\overline{5}",
            "0.\\overline{3}",
            "5_{10}",
            "5\\ldots",
            "5\\\\theta",
        ]
    ),
    "relations": dict.fromkeys(
        ["<5", ">5", "\\le 5", "\\geq 5", "\\ne 5", "≈5", "\\approx 5", "5+"]
    ),
    "factor": dict.fromkeys(
        [
            "5k",
            "5K",
            "5M",
            "5 M",
            "5bn",
            "5x",
            "5xy",
            "5i",
            "5\\text{ million}",
            "5 Million dollars",
        ]
        + ["5thousand", "5 dozen eggs", "a dozen", "5 hundred", "half of 5", "5 halves", "5 tenths"]
        + ["5 and a half", "5 squared", "5 factorial", "0.3 repeating", "5 times two", "5 over two"]
        + ["5 degrees below zero", "5 lakh", "5 gross", "5mln", "5 \\text{m}illion"]
    ),
    "two numbers": dict.fromkeys(
        [
            "1 2",
            "3 to 5",
            "3 or 5",
            "3, 5",
            "(1, 2)",
            "5 of 10",
            "5 m2",
            "3+2=5",
            "5(6)",
            "5$6",
            "3:30",
        ]
        + [
            "2:3",
            "2024-05-06",
            "5/6/2024",
            "1e5",
            "5 ft 3 in",
            "5°30'",
            "5\\\\6",
            "\\text{5\\\\}6",
            "1\\\\000",
            "1\\{,}000",
        ]
        + ["5 = 5", "1.2.3", "5 m^2", "5\\text{ cm}^{2}"]
    ),
    "signs": dict.fromkeys(["--8", "+-8", "-(-8)", "8-", "-", "\u20148", "minus -8", "8 negative"]),
    "words": dict.fromkeys(["five", "about 5", "the answer is 5", "5th", "5-year", "#5", "no 5"]),
    "other digits": dict.fromkeys(
        ["٣", "５", "五", "5٣", "1٬000", "⑤", "५", "5\u0305", "5\u200b6"]
    ),
    "brackets": {"[5]": "5", "((5))": "5", "(5": None, "5]": None, "(5]": None, "[5": None},
    "nothing": dict.fromkeys(
        ["", " ", ".", "$", ",", "-", "{}", "\\text{}", "\ud800", "\x00", "NaN"]
    ),
}
BOXES = [
    (kind, content, want) for kind, rows in NOTATIONS.items() for content, want in rows.items()
]


@pytest.mark.parametrize("kind, content, want", BOXES)
def test_what_a_box_holds_is_one_number_or_no_answer(kind, content, want):
    assert gainrl.extract_answer(f"Thus \\boxed{{{content}}}, I say.") == want


@pytest.mark.parametrize(
    "text, want",
    [
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{1} no, \\boxed{}", None),
        ("\\boxed{1} no, \\boxed{1/2}", None),
        ("\\boxed{1} no, \\boxed{2", None),
        ("\\boxed{1} is what stands in the \\boxed", None),
        ("\\boxed{1} no, \\boxed{\\text{2}", None),
        ("\\boxed{3 oops. \\boxed{5}", "5"),
        ("{\\boxed{5}", "5"),
        ("\\boxed{5}}", "5"),
        ("\\boxed{5\\}", None),
        ("\\boxed{5\\text{ cm\\}}", None),
        ("\\boxed{\\{5\\}}", None),
        ("\\boxed{1} \\boxed{2} \\boxed{3}", "3"),
        ("\\boxed {5}", "5"),
        ("\\boxed 5", "5"),
        ("$\\boxed 5$.", "5"),
        ("\\boxed -5", "-5"),
        ("\\boxed 5 or 6", None),
        ("\\boxed5/6", None),
        ("\\boxed{2+\\boxed{5}}", None),
        ("\\boxed{\\boxed{4} \\boxed{5}}", None),
        ("\\fbox{5}", None),
        ("boxed{5}", None),
        ("\\boxed{1}\n#### 2", "1"),
        ("\\boxed{}\n#### 2", None),
        ("\\boxed{3\n#### 2", None),
        ("#### 2\nso \\boxed{3}", "3"),
    ],
)
def test_the_last_box_counts_and_none_replaces_it(text, want):
    assert gainrl.extract_answer(text) == want


@pytest.mark.parametrize(
    "text, want",
    [
        ("Work.\n#### 1,000", "1000"),
        ("Monday: 3 + 4 = 7. #### 7", "7"),
        ("####7", "7"),
        ("####\n7\nmore", "7"),
        ("#### 7\r\n", "7"),
        ("#### $7.50", "7.5"),
        ("#### 7%", "7"),
        ("#### -7", "-7"),
        ("#### 7.", "7"),
        ("#### **7**", "7"),
        ("#### 7<|endoftext|>", "7"),
        ("#### 1\n#### 2", "2"),
        ("#### 7\nand 8 pears", "7"),
        ("#### 7\n#### Step 3: check it", "7"),
        ("#### 7\n#### 2. Multiply", None),
        ("#### 7\n#### 8 or 9", None),
        ("#### Step 3: add\n12 and", None),
        ("#### Step 3", None),
        ("#### 3) Add", None),
        ("#### 3)", None),
        ("#### Final answer: 7", None),
        ("#### 7 apples", None),
        ("#### 7 million", None),
        ("#### 7 (since 3 + 4 = 7)", None),
        ("#### 1/2", None),
        ("####", None),
        ("### 7", None),
        ("The answer is 7", None),
        ("", None),
    ],
)
def test_without_any_box_the_last_line_with_a_number_counts(text, want):
    assert gainrl.extract_answer(text) == want


def test_an_answer_is_text_and_may_be_longer_than_an_int():
    assert gainrl.extract_answer("\\boxed{" + "9" * 5000 + "}") == "9" * 5000
    assert gainrl.extract_answer("\\boxed{1" + ",000" * 1500 + "}") == "1" + "000" * 1500


def test_the_reward_is_one_for_the_gold_answer_and_missing_answers_never_agree():
    assert gainrl.reward("\\boxed{1,000.0}", "So she has 1000.\n#### 1,000") == 1.0
    assert gainrl.reward("\\boxed{1001}", "#### 1000") == 0.0
    assert gainrl.reward("\\boxed{-5}", "#### 5") == 0.0
    assert gainrl.reward("\\boxed{1}", "#### 1000") == 0.0
    for missing in ["", "no idea", "\\boxed{}", "####"]:
        assert gainrl.reward(missing, missing) == 0.0
        assert gainrl.reward(missing, "#### 5") == 0.0
    assert type(gainrl.reward("\\boxed{5}", "#### 5")) is float


STARTS = ["", "\\boxed", "\\boxed{", "\\boxed{5", "\\boxed{-", "\\boxed{5 a", "####", "#### 5"]
UNITS = "\\boxed{ \\boxed{1} \\boxed { } {} 1 # #### , 1, ,000 - $ ( () ' ~ "
UNITS += "\\ \\\\ \\, \\! a abc m/ . = x= * <| million"
UNITS = [*UNITS.split(), "\\text{", "\\color{", "\ud800", " ", "\n", " 000", "a ", "abc ", "#### "]


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_no_completion_however_odd_or_long_takes_long(unit):
    """100,000 characters take less than 50 ms; the bound leaves room for a busy machine, and a
    pattern that backtracks takes minutes."""
    for start, end in itertools.product(STARTS, ["", "}", "!}"]):
        text = start + unit * (100_000 // len(unit)) + end
        began = time.perf_counter()
        gainrl.extract_answer(text)
        assert time.perf_counter() - began < 0.5, (start, end)


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
    for row in read_rows(GSM8K / f"{split}.jsonl"):
        plain = row["answer"].rpartition("####")[2].replace(",", "")
        assert float(gainrl.extract_answer(row["answer"])) == float(plain.strip(" $"))


def test_tiny_problems_are_solved_by_their_own_sentences():
    """Replayed by hand: only sentences about the first person change the number."""
    sign = {"gets": 1, "finds": 1, "loses": -1, "sells": -1}
    for seed in range(200):
        row = gainrl.tiny_problem(random.Random(seed))
        first, *sentences, _ = row["question"].split(". ")
        who, _, number, _ = first.split()
        number = int(number)
        for sentence in sentences:
            *_, subject, verb, change = sentence.split()
            if subject == who:
                number += sign[verb] * int(change)
                assert 0 <= number <= gainrl.LARGEST
        assert gainrl.extract_answer(row["answer"]) == str(number)


def test_filler_makes_problems_of_few_steps_longer():
    """1: all about as long, a step's sentence being a word longer; 2: the fewest steps the
    longest."""
    for filler, longer in (
        (0, 5),
        (1, 1),
        (2, -3),
    ):  # words with each step: 5, and 4 less by filler
        lengths = {}
        for seed in range(300):
            row = gainrl.tiny_problem(random.Random(seed), distractors=0, filler=filler)
            lengths.setdefault(row["answer"].count("="), set()).add(len(row["question"].split()))
        one_step = 4 + 5 + 7 + 5 * 4 * filler  # the story's first sentence, one step, the question
        assert lengths == {1 + n: {one_step + longer * n} for n in range(6)}


def test_section_5_works_elsewhere_with_what_its_head_says(tokenizer, prompts, tmp_path):
    elsewhere = section_elsewhere(5, tmp_path)
    assert elsewhere.encode_prompts(tokenizer, QUESTIONS) == prompts
    assert elsewhere.reward("\\boxed{7}", "#### 7") == 1


# --- GRPO: loss and advantages --------------------------------------------------------------------


def test_the_loss_by_hand_on_both_sides_of_the_clip():
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5], [1.1, 9.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0], [-3.0, -1.5], [-0.5, -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, True], [True, False]])  # 9.0 is past the end
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    logprobs = old + ratio.log()
    loss, stats = gainrl.grpo_loss(logprobs, old, advantages, mask, clip=0.2)
    # A = 1: min(1.5, 1.2), min(0.5, 0.8); A = -1: min(-1.5, -1.2), min(-0.5, -0.8); A = 2: 2.2.
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 1.5 - 0.8 + 2.2) / 5)
    assert stats == {"kl": 0.0, "clip_fraction": pytest.approx(2 / 5)}

    d = torch.tensor([[0.1, -0.2], [0.0, 0.3], [-0.4, 5.0]], dtype=torch.float64)
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


# --- GRPO: log-probabilities ----------------------------------------------------------------------
COMPLETION = 5  # tokens at the end of each row of padded_rows


def padded_rows(vocab_size, extra_padding=0):
    """Two rows padded on the left, (ids, attention_mask); and each row unpadded."""
    rows = [torch.randint(3, vocab_size, (length,), generator=seeded(1)) for length in (12, 9)]
    T = 12 + extra_padding
    ids, attention_mask = torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.bool)
    for k, row in enumerate(rows):
        ids[k, T - len(row) :] = row
        attention_mask[k, T - len(row) :] = True
    return ids, attention_mask, rows


def logprobs_and_gradients(model, ids, attention_mask, prompt_index=None):
    """Under temperature 0.8; the gradients are of a sum with weights that tell tokens apart."""
    logprobs = gainrl.completion_logprobs(model, ids, attention_mask, COMPLETION, 0.8, prompt_index)
    weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
    gradients = torch.autograd.grad((logprobs * weights).sum(), list(model.parameters()))
    return [logprobs.detach(), *gradients]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_log_softmax_of_all_logits_of_the_row_alone(model, temperature):
    ids, attention_mask, rows = padded_rows(model.config.vocab_size)
    found = gainrl.completion_logprobs(model, ids, attention_mask, COMPLETION, temperature)
    assert found.dtype == torch.float32 and found.shape == (2, COMPLETION)
    for k, row in enumerate(rows):
        logits = model(input_ids=row[None]).logits[0].float()
        table = (logits / temperature).log_softmax(-1)
        by_hand = [table[t - 1, row[t]] for t in range(len(row) - COMPLETION, len(row))]
        torch.testing.assert_close(found[k], torch.stack(by_hand), rtol=0, atol=1e-5)


def test_what_is_masked_has_no_logprob(model):
    """Its logits are not even computed."""
    ids, attention_mask, _ = padded_rows(model.config.vocab_size)
    whole = gainrl.completion_logprobs(model, ids, attention_mask, COMPLETION, temperature=1.0)
    attention_mask[1, -3:] = False
    found = gainrl.completion_logprobs(model, ids, attention_mask, COMPLETION, temperature=1.0)
    assert found[1, -3:].tolist() == [0, 0, 0]
    torch.testing.assert_close(found[1, :-3], whole[1, :-3], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0], whole[0], rtol=0, atol=1e-5)


def test_more_padding_changes_no_logprob(model):
    found = []
    for extra_padding in (0, 7):
        ids, attention_mask, _ = padded_rows(model.config.vocab_size, extra_padding)
        found.append(
            gainrl.completion_logprobs(model, ids, attention_mask, COMPLETION, temperature=1.0)
        )
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_chunks_change_neither_logprobs_nor_gradients_and_bound_the_logits(model, monkeypatch):
    ids, attention_mask, _ = padded_rows(model.config.vocab_size)
    n_tokens, results = [], []

    def note_size(module, inputs, logits):
        n_tokens.append(logits.shape[:-1].numel())

    handle = model.lm_head.register_forward_hook(note_size)
    try:
        for chunk in (1024, 3, 1):
            monkeypatch.setattr(gainrl, "LOGIT_CHUNK", chunk)
            n_tokens.clear()
            results.append(logprobs_and_gradients(model, ids, attention_mask))
            assert max(n_tokens) <= chunk
    finally:
        handle.remove()
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_shared_prompt_changes_neither_logprobs_nor_gradients(model):
    """The keys and values of a prompt, computed once and repeated, against every row by itself."""
    ids, attention_mask, _ = padded_rows(model.config.vocab_size)
    ids, attention_mask = ids.repeat_interleave(3, 0), attention_mask.repeat_interleave(3, 0)
    ids[:, -COMPLETION:] = torch.arange(30).view(6, COMPLETION)  # three completions of each prompt
    alone = logprobs_and_gradients(model, ids, attention_mask)
    shared = logprobs_and_gradients(model, ids, attention_mask, torch.arange(6) // 3)
    for a, b in zip(alone, shared):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# --- GRPO: sampling -------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_model_generate(stopping_model, tokenizer, prompts):
    config = tiny_config(max_new_tokens=24)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts, config)
    assert rollout.angle is None  # only sampling for training measures it
    lengths = set()
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.ids])
        (expected,) = stopping_model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        assert rollout.ids[row][rollout.attention_mask[row]].tolist() == expected.tolist()
        n_tokens = rollout.completion_mask[row].sum().item()
        assert n_tokens == len(expected) - len(prompt.ids)
        completion = expected[len(prompt.ids) :]
        assert rollout.texts[row] == tokenizer.decode(completion, skip_special_tokens=True)
        lengths.add(n_tokens)
    assert len(lengths) > 1  # else nothing was said about rows that stop at different steps


def test_a_completion_ends_with_its_first_end_token_also_where_pad_is_eos(stopping_model):
    """With pad = eos a mask made from token ids would drop the end token, and never teach it."""
    tokenizer = bpe_tokenizer(pad=gainrl.END)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    prompts = gainrl.encode_prompts(tokenizer, QUESTIONS[:3])
    config = tiny_config(max_new_tokens=30)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts, config, 8, seeded())
    completion_mask = rollout.completion_mask
    longest, n_ended = completion_mask.shape[1], 0
    completions = rollout.ids[:, -longest:].tolist()
    for ids, mask in zip(completions, completion_mask.tolist()):
        ends = [k for k, token in enumerate(ids) if token in END_TOKENS]
        length = ends[0] + 1 if ends else longest
        assert mask == [True] * length + [False] * (longest - length)
        n_ended += bool(ends)
    assert n_ended > 10
    # A loss that has the end token moves its log-probability; what comes after is no part of it.
    x = torch.zeros(completion_mask.shape, requires_grad=True)
    gainrl.grpo_loss(x, x.detach(), torch.ones(24), completion_mask)[0].backward()
    torch.testing.assert_close(x.grad, -completion_mask.float() / completion_mask.sum())


@pytest.mark.parametrize(
    "of_generation, of_tokenizer, ends",
    [
        (1, gainrl.END, [1]),
        ([4, 5], gainrl.END, [1, 4, 5]),
        (0, gainrl.PAD, [0, 1]),  # a base model: only its template ends turns by <|im_end|>
        (None, gainrl.PAD, [0, 1]),
        (None, None, [1]),
    ],
)
def test_completions_end_as_model_tokenizer_or_template_say(of_generation, of_tokenizer, ends):
    tokenizer = bpe_tokenizer(end=of_tokenizer)
    model = random_model(len(tokenizer))
    model.generation_config.eos_token_id = of_generation
    assert gainrl.end_tokens(model, tokenizer).tolist() == ends


def test_a_model_that_nothing_would_stop_is_refused():
    tokenizer = bpe_tokenizer(end=None, template=NO_MARKS)
    model = random_model(len(tokenizer))
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no end token"):
        gainrl.end_tokens(model, tokenizer)


def test_sampling_follows_the_softmax_and_inherits_nothing(tokenizer, prompts):
    """A hub model's generation_config may ask for top_k, top_p or a penalty: the log-probs of such
    samples would be wrong."""
    model = random_model(len(tokenizer))
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0
    )
    config = tiny_config(max_new_tokens=1, temperature=1.7)
    rollout = gainrl.generate(model, tokenizer, prompts[:2], config, 3000, seeded())
    for row, prompt in enumerate(prompts[:2]):
        drawn = rollout.ids[row * 3000 : (row + 1) * 3000, -1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1]
        counts = torch.bincount(drawn, minlength=len(logits))
        assert is_draw_from(counts, (logits / 1.7).softmax(-1))
        assert not is_draw_from(counts, logits.softmax(-1))


def test_samples_stand_beside_their_prompt_and_are_worth_their_logprobs(
    stopping_model, tokenizer, prompts
):
    """The log-probs of the sampled tokens, by sampling's own cached steps and by one full pass."""
    config = tiny_config(max_new_tokens=6)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts[:3], config, 4, seeded())
    rows = [ids[mask] for ids, mask in zip(rollout.ids, rollout.attention_mask)]
    for k, row in enumerate(rows):
        prompt_ids = prompts[k // 4].ids
        assert row[: len(prompt_ids)].tolist() == prompt_ids
    assert len(set(rollout.texts)) > 6
    logprobs = gainrl.completion_logprobs(
        stopping_model,
        rollout.ids,
        rollout.attention_mask,
        rollout.completion_mask.shape[1],
        temperature=1.0,
    )
    table = stopping_model(input_ids=rows[5][None]).logits[0].log_softmax(-1)
    n_tokens = rollout.completion_mask[5].sum().item()
    by_hand = table[-n_tokens - 1 : -1].gather(1, rows[5][-n_tokens:, None])[:, 0]
    found = logprobs[5][rollout.completion_mask[5]]
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5)


def plain_loop(model, prompts, config, group_size, generator):
    """Each row as a list of ids: without a cache, a mask or a batch, nothing left out."""
    rows = [list(prompt.ids) for prompt in prompts for _ in range(group_size)]
    alive = [True] * len(rows)
    for _ in range(config.max_new_tokens):
        logits = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows]
        logits = torch.stack(logits)
        if generator is None:
            tokens = logits.argmax(-1)
        else:
            probabilities = (logits / config.temperature).softmax(-1)
            tokens = probabilities.multinomial(1, generator=generator).squeeze(1)
        for k, token in enumerate(tokens.tolist()):
            if alive[k]:
                rows[k].append(token)
                alive[k] = token not in END_TOKENS
        if not any(alive):
            break
    return rows


def choose_decode(monkeypatch, name):
    """Let generate complete by gainrl.<name>, as it does on a GPU or on a CPU."""
    monkeypatch.setattr(gainrl, "decode_growing", getattr(gainrl, name))


DECODES = ["decode_growing", "decode_in_place"]


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("group_size, seed", [(1, None), (1, 3), (8, 4)])
@torch.no_grad()
def test_both_ways_to_decode_are_the_plain_loop(
    decode, group_size, seed, stopping_model, tokenizer, prompts, monkeypatch
):
    choose_decode(monkeypatch, decode)
    config = tiny_config(max_new_tokens=14, temperature=0.9)
    generators = [None, None] if seed is None else [seeded(seed), seeded(seed)]
    inputs = (stopping_model, prompts[:3], config, group_size)
    expected = plain_loop(*inputs, generators[0])
    rollout = gainrl.generate(
        stopping_model, tokenizer, prompts[:3], config, group_size, generators[1]
    )
    found = [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.attention_mask)]
    assert found == expected
    lengths = rollout.completion_mask.sum(1)
    assert lengths.min() < lengths.max() == rollout.completion_mask.shape[1]  # some ended early
    longest = max(len(prompt.ids) for prompt in prompts[:3])
    assert torch.equal(rollout.attention_mask[:, longest:], rollout.completion_mask)
    if seed is not None and lengths.max() == 14:
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("decode", DECODES)
def test_a_batch_that_has_ended_is_decoded_no_further(
    decode, stopping_model, tokenizer, prompts, monkeypatch
):
    choose_decode(monkeypatch, decode)
    monkeypatch.setattr(gainrl, "end_tokens", lambda model, tokenizer: torch.arange(len(tokenizer)))
    shapes, run_body = [], gainrl.run_body

    def note_shape(model, ids, *others):
        shapes.append(ids.shape)
        return run_body(model, ids, *others)

    monkeypatch.setattr(gainrl, "run_body", note_shape)
    config = tiny_config(max_new_tokens=60)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts, config, 2, seeded())
    assert rollout.completion_mask.shape == (2 * len(prompts), 1)
    assert rollout.completion_mask.all()
    at_most = {"decode_growing": 1, "decode_in_place": gainrl.LOOK_EVERY}  # passes
    assert len(shapes) <= at_most[decode]


def test_rows_that_ended_leave_a_growing_batch(stopping_model, tokenizer, prompts, monkeypatch):
    sizes, run_body = [], gainrl.run_body

    def note_size(model, ids, *others):
        sizes.append(len(ids))
        return run_body(model, ids, *others)

    monkeypatch.setattr(gainrl, "run_body", note_size)
    config = tiny_config(max_new_tokens=40)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts[:3], config, 8, seeded())
    lengths = rollout.completion_mask.sum(1)
    in_batch = 24
    for n_tokens, size in enumerate(sizes[1:], start=1):
        n_alive = (lengths > n_tokens).sum().item()
        if n_alive <= in_batch / 2:
            in_batch = n_alive
        assert size == in_batch
    assert sizes[-1] < 12


def test_decoding_in_place_changes_neither_shapes_nor_places(
    stopping_model, tokenizer, prompts, monkeypatch
):
    """What a CUDA graph needs: all that enters a step lies where it lay in the step before."""
    choose_decode(monkeypatch, "decode_in_place")
    seen, run_body = [], gainrl.run_body

    def note_inputs(model, ids, attention_mask, position_ids, cache=None):
        if cache is not None:
            tensors = [ids, attention_mask, position_ids]
            tensors += [x for layer in cache.layers for x in (layer.keys, layer.values)]
            seen.append([(x.data_ptr(), x.shape, x.dtype) for x in tensors])
        return run_body(model, ids, attention_mask, position_ids, cache)

    monkeypatch.setattr(gainrl, "run_body", note_inputs)
    config = tiny_config(max_new_tokens=9)
    gainrl.generate(stopping_model, tokenizer, prompts[:3], config, 8, seeded())
    assert len(seen) == 8
    assert all(inputs == seen[0] for inputs in seen)
    _, bias_shape, _ = seen[0][1]
    assert bias_shape[:3] == (24, 1, 1) and bias_shape[3] % 16 == 0


def test_in_place_and_growing_agree_in_bfloat16(stopping_model, tokenizer, prompts, monkeypatch):
    """The keys that autocast leaves in float32 are rounded once, not in every step: the same."""
    monkeypatch.setattr(
        gainrl, "mixed_precision", lambda device: torch.autocast("cpu", torch.bfloat16)
    )
    dtypes, make_room = [], gainrl.make_room

    def note_dtypes(cache, *others):
        made = make_room(cache, *others)
        dtypes.extend((layer.keys.dtype, layer.values.dtype) for layer in cache.layers)
        return made

    monkeypatch.setattr(gainrl, "make_room", note_dtypes)
    config = tiny_config(max_new_tokens=20)
    texts = []
    for decode in DECODES:
        choose_decode(monkeypatch, decode)
        rollout = gainrl.generate(stopping_model, tokenizer, prompts, config, 8, seeded())
        texts.append(rollout.texts)
    same = [a == b for a, b in zip(*texts)]
    assert sum(same) >= 0.9 * len(same)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("include_self", [True, False])
def test_the_angle_of_a_batch_is_the_mean_score_of_its_prompts(
    model, tokenizer, prompts, include_self
):
    config = tiny_config(max_new_tokens=1)
    rollout = gainrl.generate(model, tokenizer, prompts, config, 1, seeded(), include_self)
    scores = gainrl.score_prompts(model, prompts, include_self=include_self)
    assert rollout.angle == pytest.approx(scores.angle.mean().item(), abs=1e-5)


# --- GRPO: the update -----------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("kl", [0.0, 0.01])
def test_micro_batches_give_the_update_of_the_whole_batch(
    stopping_model, tokenizer, rollout, advantages, updates, scale, kl
):
    """The oracle is the textbook loop: one loss over the whole batch, autograd, the log-probs of
    the policy that sampled as the old ones in every update, and a gradient of length 1 at most.
    One group is flat, and another has a row without advantage: they count in the mean over the
    tokens all the same."""
    lr, kl = 0.05, kl * scale
    advantages = advantages * scale
    advantages[0] = 0
    advantages[1, 2] = 0
    reference = random_model(len(tokenizer), seed=7)

    def whole_batch_logprobs(policy):
        completion_length = rollout.completion_mask.shape[1]
        return gainrl.completion_logprobs(
            policy, rollout.ids, rollout.attention_mask, completion_length, 0.9
        )

    by_hand = copy.deepcopy(stopping_model)
    old_logprobs = whole_batch_logprobs(by_hand).detach()
    reference_logprobs = whole_batch_logprobs(reference).detach() if kl else None
    for _ in range(updates):
        loss, stats = gainrl.grpo_loss(
            whole_batch_logprobs(by_hand),
            old_logprobs,
            advantages.flatten(),
            rollout.completion_mask,
            0.01,
            reference_logprobs,
            kl,
        )
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        assert (norm > 1) == (scale > 1)  # so that both kinds of step are seen
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients):
                parameter -= lr * gradient / max(1.0, norm)
    expected = {**stats, "loss": loss.item(), "grad_norm": norm}

    for micro_batch in (3, 100):
        model = copy.deepcopy(stopping_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        config = tiny_config(
            updates=updates,
            kl=kl,
            clip=0.01,
            temperature=0.9,
            completions_per_prompt=4,
            micro_batch=micro_batch,
        )
        found = gainrl.grpo_update(model, reference, optimizer, rollout, advantages, config)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
        for a, b in zip(model.parameters(), by_hand.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_reference_equal_to_the_policy_has_no_divergence(stopping_model, rollout, advantages):
    model, reference = copy.deepcopy(stopping_model), copy.deepcopy(stopping_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = tiny_config(kl=0.5)
    stats = gainrl.grpo_update(model, reference, optimizer, rollout, advantages, config)
    assert stats["kl"] == 0 and stats["clip_fraction"] == 0


def test_flat_groups_change_no_weight(stopping_model, rollout):
    model = copy.deepcopy(stopping_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    advantages = gainrl.group_advantages(torch.full((2, 4), 0.1))
    stats = gainrl.grpo_update(model, None, optimizer, rollout, advantages, tiny_config())
    assert stats["loss"] == 0 and stats["grad_norm"] == 0
    assert all(map(torch.equal, model.parameters(), stopping_model.parameters()))


def test_a_flat_batch_still_moves_by_the_momentum(stopping_model, rollout, advantages):
    """As AdamW does with gradients of zero; without gradients it would stand still."""
    model = copy.deepcopy(stopping_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    gainrl.grpo_update(model, None, optimizer, rollout, advantages, tiny_config())
    by_hand = copy.deepcopy(model)
    hand_optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01, weight_decay=0.0)
    hand_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    flat = torch.zeros_like(advantages)
    stats = gainrl.grpo_update(model, None, optimizer, rollout, flat, tiny_config())
    assert set(stats.values()) == {0.0}
    for parameter in by_hand.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = copy.deepcopy(by_hand)
    hand_optimizer.step()
    for a, b, old in zip(model.parameters(), by_hand.parameters(), before.parameters()):
        assert torch.equal(a, b) and not torch.equal(a, old)


@pytest.mark.parametrize("kl", [0.0, 0.01])
def test_an_update_runs_no_row_without_advantage_and_no_column_of_padding(
    stopping_model, tokenizer, prompts, kl, monkeypatch
):
    """Three micro-batches of a group each: one is flat, the others have lengths of their own."""
    config = tiny_config(max_new_tokens=20, micro_batch=4, completions_per_prompt=4, kl=kl)
    rollout = gainrl.generate(stopping_model, tokenizer, prompts[:3], config, 4, seeded(6))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(3, 1)
    advantages[1] = 0
    shapes, run_body = [], gainrl.run_body

    def note_shape(model, ids, *others):
        shapes.append(tuple(ids.shape))
        return run_body(model, ids, *others)

    monkeypatch.setattr(gainrl, "run_body", note_shape)
    model = copy.deepcopy(stopping_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gainrl.grpo_update(model, stopping_model, optimizer, rollout, advantages, config)
    expected = []
    for group in (0, 1, 2):
        if kl or group != 1:
            longest = rollout.completion_mask[4 * group : 4 * group + 4].sum(1).max().item()
            of_policy = [(1, len(prompts[group].ids)), (4, longest)]
            expected += of_policy * (2 if kl else 1)  # and the same for the reference
    assert shapes == expected
    assert len({width for _, width in shapes}) == len(set(shapes)) > 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_weights_change(
    stopping_model, rollout, advantages, what
):
    model = copy.deepcopy(stopping_model)
    if what == "loss":
        advantages[1, 3] = math.nan
    else:
        model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = tiny_config(micro_batch=3)
    with pytest.raises(FloatingPointError, match="nan|inf|not finite"):
        gainrl.grpo_update(model, None, optimizer, rollout, advantages, config)
    assert all(map(torch.equal, model.parameters(), stopping_model.parameters()))


def test_hidden_states_that_are_not_finite_stop_the_sampling(tokenizer, prompts):
    model = random_model(len(tokenizer))
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        gainrl.generate(model, tokenizer, prompts, tiny_config(max_new_tokens=2))


FAMILIES = {  # settings beyond RANDOM_MODEL; GPT-2 and its kin have another order of arguments
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Mistral": {},
    "Gemma3Text": {"sliding_window": 8},
    "Phi3": {},
    "Olmo2": {},
    "SmolLM3": {},
    "StableLm": {},
    "GptOss": {"num_local_experts": 4, "sliding_window": 8},
    "GPT2": {},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Bloom": {},
    "Starcoder2": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_can_be_decoded_in_place_is_known_and_is_the_same(
    family, tokenizer, prompts, monkeypatch
):
    """Sliding windows drop tokens, and Bloom counts its positions in a mask of two dimensions."""
    model = random_model(len(tokenizer), family=family, **FAMILIES[family])
    _, cache = gainrl.run_body(model, torch.tensor([prompts[0].ids]))
    fits = gainrl.fits_in_place(model, cache)
    assert fits == (family not in ("Mistral", "Gemma3Text", "GptOss", "Bloom"))
    if fits:
        config = tiny_config(max_new_tokens=8)
        growing = gainrl.generate(model, tokenizer, prompts[:3], config)
        choose_decode(monkeypatch, "decode_in_place")
        in_place = gainrl.generate(model, tokenizer, prompts[:3], config)
        assert in_place.texts == growing.texts


def test_a_model_that_passes_over_a_mask_of_four_dimensions_is_refused(tokenizer, prompts):
    model = random_model(len(tokenizer))

    def forget_mask(body, inputs, named):
        mask = named["attention_mask"]
        if mask is not None and mask.ndim == 4:
            named["attention_mask"] = None
        return inputs, named

    model.base_model.register_forward_pre_hook(forget_mask, with_kwargs=True)
    with pytest.raises(ValueError, match="its logits are not lm_head of its last hidden states"):
        gainrl.check_model(model, prompts)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_many_families_are_run_in_parts_as_in_one(family, tokenizer, prompts):
    """The oracle is the model's own forward pass over each whole row, alone."""
    model = random_model(len(tokenizer), family=family, **FAMILIES[family])
    gainrl.check_model(model, prompts)
    rollout = gainrl.generate(model, tokenizer, prompts[:3], tiny_config(max_new_tokens=5), 2)
    length = rollout.completion_mask.shape[1]
    logprobs = gainrl.completion_logprobs(
        model, rollout.ids, rollout.attention_mask, length, 1.0, torch.arange(6) // 2
    )
    for row in range(6):
        alone = rollout.ids[row][rollout.attention_mask[row]]
        n_tokens = rollout.completion_mask[row].sum()
        table = model(input_ids=alone[None]).logits[0].log_softmax(-1)[-n_tokens - 1 : -1]
        by_hand = table.gather(1, alone[-n_tokens:, None])[:, 0]
        found = logprobs[row][rollout.completion_mask[row]]
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-4)
        assert table.argmax(-1).equal(alone[-n_tokens:])  # the greedy completion
    scores = gainrl.score_prompts(model, prompts)
    for row, prompt in enumerate(prompts):
        hidden = model.base_model(input_ids=torch.tensor([prompt.ids])).last_hidden_state
        rank = torch.arange(len(prompt.ids))[None]
        question = (rank >= prompt.start) & (rank < prompt.end)
        intra, inter = gainrl.angle_concentration(hidden, rank < prompt.start, question)
        assert scores.angle[row].item() == pytest.approx((intra + inter).item(), abs=1e-4)


def test_models_are_never_called_by_position(stopping_model, tokenizer, prompts):
    """Scores, completions and log-probs are those of the model as it is."""
    by_keyword = call_by_keyword_only(stopping_model)
    found = []
    for model in (stopping_model, by_keyword):
        config = tiny_config(max_new_tokens=6)
        rollout = gainrl.generate(model, tokenizer, prompts[:3], config, 2, seeded())
        length = rollout.completion_mask.shape[1]
        logprobs = gainrl.completion_logprobs(
            model, rollout.ids, rollout.attention_mask, length, 1.0, torch.arange(6) // 2
        )
        gainrl.check_model(model, prompts)
        found.append([*gainrl.score_prompts(model, prompts), rollout.ids, logprobs])
    assert all(map(torch.equal, *found))


def test_section_6_works_elsewhere_with_what_its_head_says(
    stopping_model, tokenizer, prompts, tmp_path
):
    elsewhere, config = section_elsewhere(6, tmp_path), tiny_config(max_new_tokens=6, kl=0.1)
    steps = []
    for code in (gainrl, elsewhere):
        model = copy.deepcopy(stopping_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rollout = code.generate(model, tokenizer, prompts[:2], config, 4, seeded())
        advantages = code.group_advantages(torch.eye(2, 4))
        stats = code.grpo_update(model, stopping_model, optimizer, rollout, advantages, config)
        steps.append([stats, *[parameter.sum().item() for parameter in model.parameters()]])
    assert steps[0] == steps[1]
    assert steps[0][0]["grad_norm"] > 0


# --- Statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("successes", [0, 1, 20, 40])
def test_the_ends_of_wilsons_interval_are_the_shares_at_the_edge_of_the_test(successes):
    """The p with (p' - p)^2 = z^2 p (1 - p) / n for the measured share p'."""
    share = successes / 40
    low, high = gainrl.wilson_interval(successes, 40)
    assert 0 <= low <= share <= high <= 1 and low < high
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 40, abs=1e-12)


def test_an_evaluation_is_greedy_accuracy_with_its_interval(tiny_world, skilled):
    model, tokenizer = skilled
    problems = gainrl.load_problems(tokenizer, str(tiny_world), "test", 400)[:40]
    config = tiny_config(prompts_per_step=4, completions_per_prompt=4)  # batches of 16
    found = gainrl.evaluate(model, tokenizer, problems, config)
    prompts = [problem["prompt"] for problem in problems]
    texts = gainrl.generate(model, tokenizer, prompts, tiny_config()).texts
    rewards = [gainrl.reward(text, row["answer"]) for text, row in zip(texts, problems)]
    low, high = gainrl.wilson_interval(sum(rewards), 40)
    assert found == {
        "eval_accuracy": sum(rewards) / 40,
        "eval_low": low,
        "eval_high": high,
        "eval_format": sum("\\boxed{" in text for text in texts) / 40,
    }


def test_spearman_is_the_pearson_correlation_of_ranks_and_ties_share_theirs():
    torch.manual_seed(0)
    x, y = torch.randint(0, 9, (50,)), torch.randn(50)
    assert gainrl.spearman(x, y) == pytest.approx(pearson(ranks(x), ranks(y)))
    assert gainrl.spearman(y, y.exp()) == pytest.approx(1)
    assert gainrl.spearman(y, -y) == pytest.approx(-1)
    assert gainrl.spearman(torch.ones(5), torch.arange(5)) == 0


# --- Scores track gradient norms ------------------------------------------------------------------


def test_with_unit_inputs_and_one_upstream_gradient_the_squared_gradient_norm_is_c_intra():
    torch.manual_seed(0)
    T, D, width_out = 9, 12, 5
    x, g = F.normalize(torch.randn(T, D), dim=-1), torch.randn(width_out)
    W = torch.randn(D, width_out, requires_grad=True)
    (x @ W * g).sum().backward()  # dL/dy_i = g for each token i
    question_mask = torch.ones(1, T, dtype=torch.bool)
    intra, _ = gainrl.angle_concentration(x[None], ~question_mask, question_mask)
    torch.testing.assert_close(W.grad.square().sum(), T**2 * g.square().sum() * intra[0])


def test_the_gradient_of_a_real_head_is_the_double_sum_over_token_pairs(model, tokenizer):
    ids = tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    x = model.base_model(input_ids=ids).last_hidden_state[0].detach()
    y = model.lm_head(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(y[:-1], ids[0, 1:]), y)
    loss = model(input_ids=ids, labels=ids).loss  # the model's own loss, not ours
    (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
    pairs = itertools.product(range(len(x)), repeat=2)
    double_sum = sum((x[i] @ x[j]) * (g[i] @ g[j]) for i, j in pairs)
    torch.testing.assert_close(gradient.square().sum(), double_sum)


def gradient_norms(model, tokenizer, problem, generator):
    """Of one problem: the norm of the GRPO gradient of 8 completions over all weights, and of the
    language-model loss of its prompt over the last up-projection."""
    config = tiny_config()
    prompt = problem["prompt"]
    rollout = gainrl.generate(model, tokenizer, [prompt], config, 8, generator)
    advantages = gainrl.group_advantages(gainrl.reward_rollout(rollout, [problem]))
    rows = torch.arange(8)
    loss, _, _ = gainrl.micro_batch_loss(model, None, rollout, advantages, rows, None, config)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    ids = torch.tensor([prompt.ids])
    up_proj = model.model.layers[-1].mlp.up_proj.weight
    (up_gradient,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, [up_proj])
    grpo_norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    return grpo_norm, up_gradient.norm()


def test_scores_track_gradient_norms_on_the_warmed_up_tiny_world(tiny_world, skilled):
    """The paper's claim, measured: a prompt of higher C has the longer gradient. Flat groups have
    none, and stay in. What is left of it at equal length is printed, whatever it is."""
    model, tokenizer = skilled
    n_problems = 200
    problems = gainrl.load_problems(tokenizer, str(tiny_world), "test", 400)[:n_problems]
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    generator = seeded()
    pairs = [gradient_norms(model, tokenizer, problem, generator) for problem in problems]
    torch.manual_seed(0)

    def interval(norm, shuffle=False):
        """95% of the bootstrap; shuffled, of what there is without any connection."""
        correlations = []
        for _ in range(1000):
            rows = torch.randint(n_problems, (n_problems,))
            others = rows[torch.randperm(n_problems)] if shuffle else rows
            correlations.append(gainrl.spearman(scores.angle[others], norm[rows]))
        return torch.tensor(correlations).quantile(torch.tensor([0.025, 0.975])).tolist()

    for name, norms in zip(("the GRPO loss", "up_proj"), zip(*pairs)):
        norm = torch.stack(norms)
        r, (low, high) = gainrl.spearman(scores.angle, norm), interval(norm)
        a, b = gainrl.spearman(scores.angle, scores.tokens), gainrl.spearman(norm, scores.tokens)
        partial = (r - a * b) / math.sqrt((1 - a * a) * (1 - b * b))
        n_flat = (norm == 0).sum()
        print(f"C and the gradient norm of {name}: {r:.3f} [{low:.3f}, {high:.3f}], {n_flat} flat;")
        print(f"  given length {partial:.3f}; length with C {a:.3f}, with the norm {b:.3f}")
        shuffled_low, shuffled_high = interval(norm, shuffle=True)
        assert shuffled_low < 0 < shuffled_high, name
        assert low > 0, name


# --- The command line -----------------------------------------------------------------------------


def test_a_preset_is_its_settings_and_a_named_flag_replaces_one():
    assert gainrl.parse_config(["--preset", "gsm8k"]) == gainrl.Config()
    assert gainrl.parse_config(["--preset", "tiny"]) == tiny_config()
    named = gainrl.parse_config(["--preset", "tiny", "--lr", "3e-5", "--curriculum", "length"])
    assert named == tiny_config(lr=3e-5, curriculum="length")
    assert named.run_dir == "runs/tiny-length-0"


@pytest.mark.parametrize(
    "has_gpu, flags, preset",
    [
        (False, [], "tiny"),
        (True, [], "gsm8k"),
        (False, ["--model", "some/model"], "gsm8k"),
        (False, ["--dataset", "some/data"], "gsm8k"),
    ],
)
def test_without_a_gpu_it_is_the_tiny_world_that_runs(has_gpu, flags, preset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert gainrl.parse_config(flags).preset == preset


def test_help_names_each_flag_with_its_default(capsys):
    assert command("--help") == 0
    text = "".join(capsys.readouterr().out.split())  # without spaces: it is wrapped anywhere
    for setting in gainrl.Config.__dataclass_fields__.values():
        described = text.partition(gainrl.flag(setting.name) + setting.name.upper())[2]
        assert described.startswith("".join(setting.metadata["description"].split()))
        if setting.default is not None and setting.name != "preset":  # it depends on the machine
            assert f"(default:{setting.default}" in described


# --- End to end -----------------------------------------------------------------------------------


def test_a_short_run_on_the_tiny_world_improves(tiny_world, run, capsys):
    paths = ["--preset", "tiny", "--device", "cpu", "--model", tiny_world, "--dataset", tiny_world]
    short = ["--run-dir", run, "--steps", 8, "--eval-every", 8, "--eval-examples", 300]
    assert command(*paths, *short) == 0
    before, after = read_evaluations(run)
    with capsys.disabled():
        print(f" {before['eval_accuracy']:.3f} to {after['eval_accuracy']:.3f}", end=" ")
    assert after["eval_low"] > before["eval_high"]


def test_a_run_leaves_its_files(whole_run):
    names = "config.json scores.jsonl metrics.jsonl samples.jsonl summary.json checkpoint model"
    assert {path.name for path in whole_run.iterdir()} == set(names.split())
    assert [path.name for path in (whole_run / "checkpoint").iterdir()] == ["state.pt"]


def test_scores_jsonl_has_a_line_for_each_question(whole_run, skilled):
    rows = read_rows(whole_run / "scores.jsonl")
    assert [row["index"] for row in rows] == list(range(len(ROWS)))
    scores = score_questions(*skilled, [row["question"] for row in ROWS])
    for name, column in scores._asdict().items():
        assert [row[name] for row in rows] == pytest.approx(column.tolist(), abs=1e-5)


def test_metrics_jsonl_has_a_line_for_each_step_and_evaluation(whole_run):
    steps, evaluations = read_steps(whole_run), read_evaluations(whole_run)
    keys = "step accuracy angle mean loss grad_norm useful_groups kl clip_fraction "
    keys += "completion_length seconds tokens_per_second"
    assert all(set(row) == set(keys.split()) for row in steps)
    assert [row["step"] for row in steps] == list(range(1, 9))
    keys = {"step", "eval_accuracy", "eval_low", "eval_high", "eval_format"}
    assert all(set(row) == keys for row in evaluations)
    assert [row["step"] for row in evaluations] == [0, 3, 6, 8]


def test_samples_jsonl_has_completions_with_their_rewards(whole_run):
    gold = {row["question"]: row["answer"] for row in ROWS}
    samples = read_rows(whole_run / "samples.jsonl")
    assert [row["step"] for row in samples] == [3, 6]
    for row in samples:
        assert len(row["completions"]) == 4
        for text, reward in row["completions"]:
            assert reward == gainrl.reward(text, gold[row["question"]])


def test_summary_json_has_the_accuracy_before_and_after(whole_run):
    summary, evaluations = read_json(whole_run / "summary.json"), read_evaluations(whole_run)
    keys = "preset curriculum seed steps seconds rank_length_correlation "
    keys += "accuracy_before accuracy_after"
    assert set(summary) == set(keys.split())
    assert summary["steps"] == 8
    assert summary["accuracy_before"] == evaluations[0]["eval_accuracy"]
    assert summary["accuracy_after"] == evaluations[-1]["eval_accuracy"]


def test_config_json_has_all_settings_and_a_resumed_run_has_the_same(
    whole_run, small_run, small_dataset
):
    record = read_json(whole_run / "config.json")
    settings = gainrl.parse_config([*small_run, "--run-dir", str(whole_run), "--steps", "8"])
    assert settings.lr == 2e-4 and settings.dataset == str(small_dataset)
    for name, value in vars(settings).items():
        if name not in ("run_dir", "resume"):  # a run may be moved
            assert record[name] == value
    resumed = gainrl.parse_config(["--resume", str(whole_run)])
    assert vars(resumed) == {**vars(settings), "resume": str(whole_run)}


def test_the_mean_of_a_run_follows_its_own_accuracy_and_angle(whole_run):
    """Replayed from the log: each row holds the mean that its batch was drawn with."""
    mean = 0.0
    for row in read_steps(whole_run):
        assert row["mean"] == pytest.approx(mean)
        move = S(2 * (row["accuracy"] - 0.5)) + S(2 * row["angle"])
        mean = min(mean + 500 / 7473 * len(ROWS) * max(move, 0), len(ROWS) - 1)
    assert mean > 0


def test_model_holds_the_trained_weights_for_from_pretrained(whole_run, skilled):
    """Its greedy completions by transformers alone are those of the checkpoint's weights."""
    folder = whole_run / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    # Not AutoTokenizer: it splits the words of any Qwen2 as Qwen2.5 does, the tiny world's too.
    loaded_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    trained, tokenizer = copy.deepcopy(skilled[0]), skilled[1]
    before = trained.state_dict()["lm_head.weight"].clone()
    trained.load_state_dict(read_checkpoint(whole_run)["model"])
    assert not torch.equal(before, loaded.lm_head.weight)

    prompts = gainrl.encode_prompts(tokenizer, [row["question"] for row in ROWS[:5]])
    rollout = gainrl.generate(trained, tokenizer, prompts, tiny_config())
    for row, text in zip(ROWS, rollout.texts):
        inputs = loaded_tokenizer.apply_chat_template(
            gainrl.build_messages(row["question"]),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        (ids,) = loaded.generate(**inputs, do_sample=False, max_new_tokens=64)
        completion = ids[inputs["input_ids"].shape[1] :]
        assert loaded_tokenizer.decode(completion, skip_special_tokens=True) == text


@pytest.mark.parametrize("curriculum", gainrl.CURRICULA)
def test_each_curriculum_runs_and_ranks_by_its_own_score(small_run, run, curriculum):
    assert command(*small_run, "--curriculum", curriculum, "--run-dir", run, "--steps", 2) == 0
    summary = read_json(run / "summary.json")
    assert summary["curriculum"] == curriculum and summary["steps"] == 2
    rows = read_rows(run / "scores.jsonl")
    lengths = torch.tensor([row["tokens"] for row in rows])
    if curriculum == "shuffled":
        assert abs(summary["rank_length_correlation"]) < 0.5
        return
    score = "tokens" if curriculum == "length" else "angle"
    first = 1 if curriculum in ("length", "reversed") else -1  # the low ones, or the high ones
    order = sorted(range(len(rows)), key=lambda index: first * rows[index][score])
    rank = torch.empty(len(rows))
    rank[order] = torch.arange(float(len(rows)))
    expected = pearson(ranks(rank), ranks(lengths))
    assert summary["rank_length_correlation"] == pytest.approx(expected)


def test_only_angle_unbiased_leaves_out_the_pairs_of_a_token_with_itself(small_run, whole_run, run):
    arm = ["--curriculum", "angle-unbiased", "--run-dir", run, "--steps", 0]
    assert command(*small_run, *arm) == 0
    for biased, row in zip(read_rows(whole_run / "scores.jsonl"), read_rows(run / "scores.jsonl")):
        n = row["tokens"]
        assert biased["intra"] == pytest.approx((n * (n - 1) * row["intra"] + n) / n**2, abs=1e-5)


def test_a_run_with_a_reference_and_two_updates_logs_divergence_and_clipping(small_run, run):
    """The first update is on policy; the second is not, and each step is measured at its last."""
    more = ["--kl", 0.1, "--updates", 2, "--lr", 1e-3, "--steps", 2]
    assert command(*small_run, "--run-dir", run, *more) == 0
    steps = read_steps(run)
    assert all(row["kl"] > 0 for row in steps)
    assert any(row["clip_fraction"] > 0 for row in steps)


def test_no_steps_is_scores_and_ranks_only(small_run, run, capsys):
    assert command(*small_run, "--run-dir", run, "--steps", 0) == 0
    assert len(read_rows(run / "scores.jsonl")) == len(ROWS)
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "scores.jsonl", "summary.json"}
    assert "Spearman" in capsys.readouterr().out


def test_a_few_prompts_too_long_for_the_context_are_dropped_and_counted(
    small_run, tmp_path, run, capsys
):
    long = {"question": "Ann has 3 apples. " * 200, "answer": "#### 3"}
    data = write_dataset(tmp_path / "data", [*ROWS[:5], long, *ROWS[5:], long])
    assert command(*small_run, "--dataset", data, "--run-dir", run, "--steps", 0) == 0
    assert "2 of 42 train prompts" in capsys.readouterr().out
    index = [row["index"] for row in read_rows(run / "scores.jsonl")]
    assert index == [k for k in range(41) if k != 5]  # the rows of the file, not of what is left


# --- What stops a run, and how it is resumed ------------------------------------------------------


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_resumed_bit_for_bit(small_run, whole_run, run, stop):
    """Also where the kill comes between two checkpoints: the steps since are done again, with the
    same draws. Ctrl-C and SIGTERM let the step finish, leave a checkpoint and say how to resume."""
    # Past 8 steps there would be nothing to resume, so that 8 is asked for in the resume only.
    flags = ["--run-dir", run, "--steps", 500, "--checkpoint-every", 2]
    with process(*small_run, *flags) as training:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and read_rows(metrics)[-1]["step"] >= 3)
        training.send_signal(stop)
        _, output = training.communicate(timeout=120)
    last_step = read_rows(metrics)[-1]["step"]
    assert 3 <= last_step < 8
    if stop == signal.SIGKILL:
        assert training.returncode == -signal.SIGKILL
    else:
        assert training.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[stop]
        assert f"python gainrl.py --resume {run}" in output.splitlines()[-1]
        assert read_checkpoint(run)["step"] == last_step
        assert not (run / ".lock").exists()
    assert command("--resume", run, "--steps", 8) == 0
    assert without_times(run) == without_times(whole_run)
    assert equal_weights(run, whole_run)


def test_a_run_killed_before_its_first_checkpoint_starts_over(copied_run, whole_run, monkeypatch):
    """Its questions are not scored again: the weights that they were scored under are the same."""
    shutil.rmtree(copied_run / "checkpoint")
    monkeypatch.setattr(gainrl, "score_prompts", never)
    assert command("--resume", copied_run) == 0
    assert without_times(copied_run) == without_times(whole_run)
    assert equal_weights(copied_run, whole_run)


def test_a_resumed_run_reads_the_scores_that_it_wrote(copied_run, monkeypatch):
    """The curriculum of a resumed run ranks by scores.jsonl, not by new scores."""
    rows = read_rows(copied_run / "scores.jsonl")
    for row in rows:
        row["angle"] = row["index"] / 100
    (copied_run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, make = [], gainrl.make_curriculum

    def note_order(config, scores):
        seen.append(make(config, scores))
        return seen[-1]

    monkeypatch.setattr(gainrl, "make_curriculum", note_order)
    monkeypatch.setattr(gainrl, "score_prompts", never)
    assert command("--resume", copied_run) == 0
    assert seen[0].order.tolist() == list(range(len(ROWS)))[::-1]


def test_what_changes_memory_or_length_only_may_differ_on_resume(copied_run, whole_run):
    may_differ = ["--micro-batch", 3, "--score-batch", 5, "--checkpoint-every", 4]
    assert command("--resume", copied_run, "--steps", 9, *may_differ) == 0
    rows = without_times(copied_run)
    assert rows[: len(without_times(whole_run))] == without_times(whole_run)
    assert read_steps(copied_run)[-1]["step"] == 9
    assert read_checkpoint(copied_run)["step"] == 9
    assert read_json(copied_run / "config.json")["micro_batch"] == 3


def test_a_run_may_be_moved(copied_run, tmp_path):
    moved = copied_run.rename(tmp_path / "moved")
    assert command("--resume", moved, "--steps", 9) == 0
    assert read_checkpoint(moved)["step"] == 9
    assert not copied_run.exists()


def test_to_resume_a_finished_run_changes_nothing(copied_run, whole_run):
    """But what a killed process left half written is removed."""
    (copied_run / "checkpoint" / "state.pt.1.tmp").write_bytes(b"half")
    (copied_run / "model.1.tmp").mkdir()
    before = file_contents(whole_run)
    assert command("--resume", copied_run) == 0
    assert {path.name for path in copied_run.rglob("*")} == {
        path.name for path in whole_run.rglob("*")
    }
    for path, content in before.items():
        if path.name != "summary.json":  # has the seconds
            assert (copied_run / path.relative_to(whole_run)).read_bytes() == content


def test_a_resumed_run_keeps_the_prompts_of_its_template_as_they_were(
    small_run, tiny_world, tmp_path, run, monkeypatch
):
    """A template may write today's date into them."""
    folder = Path(shutil.copytree(tiny_world, tmp_path / "dated"))
    template = folder / "chat_template.jinja"
    template.write_text("Monday " + gainrl.CHAT_TEMPLATE)
    flags = [*small_run, "--model", folder, "--run-dir", run]
    assert command(*flags, "--steps", 1) == 0
    template.write_text("Tuesday " + gainrl.CHAT_TEMPLATE)
    generate, seen = gainrl.generate, []

    def note_prompts(model, tokenizer, prompts, *others):
        seen.extend(prompts)
        return generate(model, tokenizer, prompts, *others)

    monkeypatch.setattr(gainrl, "generate", note_prompts)
    assert command("--resume", run, "--steps", 2) == 0
    tokenizer = gainrl.load_model(folder, torch.device("cpu"))[1]
    questions = [row["question"] for row in ROWS]
    today, kept = gainrl.encode_prompts(tokenizer, questions), read_json(run / "config.json")
    then = gainrl.encode_prompts(tokenizer, questions, kept["template"])
    assert kept["template"][0].startswith("Monday ")
    assert seen and all(prompt in then and prompt not in today for prompt in seen)


@pytest.mark.parametrize("how", ["start", "resume"])
def test_of_two_processes_in_one_directory_one_runs_and_one_is_refused(
    small_run, copied_run, run, how
):
    if how == "start":
        words = [*small_run, "--run-dir", run, "--steps", 500]
    else:
        run = copied_run
        words = ["--resume", run, "--steps", 500]
    with process(*words) as one, process(*words) as other:
        wait_until(lambda: one.poll() is not None or other.poll() is not None)
        refused, running = (one, other) if one.poll() is not None else (other, one)
        assert running.poll() is None
        assert refused.returncode == 2
        assert f"another process is running in {run}" in refused.communicate()[1]
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=120)
        assert running.returncode == 143
    assert not (run / ".lock").exists()


def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_graceful_stop_notes_the_first_signal_and_leaves_the_second_as_usual(signum):
    usual = handlers()
    with gainrl.GracefulStop() as stop:
        assert not stop.signum
        assert all(handler not in usual for handler in handlers())
        signal.raise_signal(signum)
        assert stop.signum == signum
        assert handlers() == usual
    assert handlers() == usual


def test_the_handlers_of_signals_are_restored_after_an_exception_too():
    usual = handlers()
    with gainrl.GracefulStop():
        pass
    assert handlers() == usual
    with pytest.raises(ZeroDivisionError), gainrl.GracefulStop():
        raise ZeroDivisionError
    assert handlers() == usual


def test_ctrl_c_during_an_evaluation_loses_no_step(small_run, run, monkeypatch):
    evaluate, usual, calls = gainrl.evaluate, handlers(), []

    def interrupted(*inputs):
        calls.append(inputs)
        if len(calls) == 2:  # the one after step 3
            signal.raise_signal(signal.SIGINT)
        return evaluate(*inputs)

    monkeypatch.setattr(gainrl, "evaluate", interrupted)
    rare = ["--steps", 50, "--checkpoint-every", 20, "--run-dir", run]
    assert command(*small_run, *rare) == 130
    assert read_checkpoint(run)["step"] >= 3
    assert handlers() == usual


def test_a_kill_while_config_json_is_written_leaves_a_directory_to_start_in(small_run, run):
    run.mkdir()
    (run / "config.json.123.tmp").write_text("{")
    (run / ".lock").touch()
    assert command(*small_run, "--run-dir", run, "--steps", 0) == 0
    assert not list(run.glob("*.tmp"))


def test_ctrl_c_in_the_last_step_stops_before_the_last_evaluation(small_run, run, monkeypatch):
    grpo_update = gainrl.grpo_update

    def interrupted(*inputs):
        signal.raise_signal(signal.SIGINT)
        return grpo_update(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(gainrl, "grpo_update", interrupted)
        assert command(*small_run, "--run-dir", run, "--steps", 1) == 130
    assert [row["step"] for row in read_evaluations(run)] == [0]
    assert command("--resume", run) == 0
    assert [row["step"] for row in read_evaluations(run)] == [0, 1]


@pytest.mark.parametrize(
    "signum, handler, status",
    [  # as in `python gainrl.py`; a test run in the background may have another one
        (signal.SIGINT, signal.default_int_handler, 130),
        (signal.SIGTERM, gainrl.stop_at_once, 143),
    ],
)
def test_a_signal_before_the_first_step_stops_at_once_and_leaves_no_directory(
    small_run, run, monkeypatch, capfd, signum, handler, status
):
    def interrupted(*inputs):
        signal.raise_signal(signum)

    usual = signal.signal(signum, handler)
    monkeypatch.setattr(gainrl, "score_prompts", interrupted)
    try:
        assert command(*small_run, "--run-dir", run) == status
    finally:
        signal.signal(signum, usual)
    assert "start again" in complaint(capfd)
    assert not run.exists()


def test_a_run_that_failed_to_write_its_scores_is_resumed(small_run, run, monkeypatch):
    write_jsonl = gainrl.write_jsonl

    def full_disk(path, rows):
        if path.name == "scores.jsonl":
            raise OSError("no space")
        write_jsonl(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(gainrl, "write_jsonl", full_disk)
        assert command(*small_run, "--run-dir", run, "--steps", 1) == 2
    assert command("--resume", run) == 0
    assert len(read_rows(run / "scores.jsonl")) == len(ROWS)


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(copied_run, capfd):
    """A real write error, halfway through the file: the largest file this process may write is half
    a checkpoint (Python ignores SIGXFSZ, so that write() fails as on a full disk)."""
    path = copied_run / "checkpoint" / "state.pt"
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        line = refusal(capfd, "--resume", copied_run, "--steps", 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in line and "--resume" in line
    assert path.read_bytes() == before
    assert not list(copied_run.rglob("*.tmp"))
    assert command("--resume", copied_run, "--steps", 9) == 0


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    small_run, run, monkeypatch, capfd
):
    update, calls = gainrl.grpo_update, []

    def poisoned(model, reference, optimizer, rollout, advantages, config):
        calls.append(rollout)
        if len(calls) == 3:
            advantages = advantages + math.nan
        return update(model, reference, optimizer, rollout, advantages, config)

    monkeypatch.setattr(gainrl, "grpo_update", poisoned)
    assert "nan" in refusal(capfd, *small_run, "--run-dir", run, "--steps", 5)
    checkpoint = read_checkpoint(run)
    assert checkpoint["step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_out_of_memory_names_what_to_lower_and_how_to_resume(copied_run, monkeypatch, capfd):
    def out_of_memory(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gainrl, "grpo_update", out_of_memory)
    line = refusal(capfd, "--resume", copied_run, "--steps", 9)
    assert "--micro-batch" in line and f"--resume {copied_run}" in line
    assert read_checkpoint(copied_run)["step"] == 8


# --- Bad input: one line that names the thing, exit status 2, nothing written ---------------------


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--preset large", "--preset large"),
        ("--curriculum best", "--curriculum best"),
        ("--steps -1", "--steps -1"),
        ("--prompts-per-step 0", "--prompts-per-step 0"),
        ("--prompts-per-step 41", "batch of 41 from 40 questions: see --prompts-per-step"),
        ("--completions-per-prompt 1", "--completions-per-prompt 1"),
        ("--updates 0", "--updates 0"),
        ("--max-new-tokens 0", "--max-new-tokens 0"),
        ("--max-new-tokens 500", "--max-new-tokens"),
        ("--micro-batch 0", "--micro-batch 0"),
        ("--score-batch 0", "--score-batch 0"),
        ("--temperature 0", "--temperature 0"),
        ("--temperature -1", "--temperature -1"),
        ("--temperature nan", "--temperature nan"),
        ("--lr 0", "--lr 0"),
        ("--lr -1", "--lr -1"),
        ("--lr nan", "--lr nan"),
        ("--lr inf", "--lr inf"),
        ("--lr much", "--lr"),
        ("--clip 0", "--clip 0"),
        ("--kl -1", "--kl -1"),
        ("--kl nan", "--kl nan"),
        ("--sigma 0", "--sigma 0"),
        ("--sigma -1", "--sigma -1"),
        ("--sigma nan", "--sigma nan"),
        ("--curriculum-step 0", "--curriculum-step 0"),
        ("--curriculum-step inf", "--curriculum-step inf"),
        ("--target 1.5", "--target 1.5"),
        ("--target nan", "--target nan"),
        ("--alpha -1", "--alpha -1"),
        ("--gamma inf", "--gamma inf"),
        ("--seed -1", "--seed -1"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device abacus", "--device abacus"),
        ("--eval-every 0", "--eval-every 0"),
        ("--eval-examples 0", "--eval-examples 0"),
        ("--checkpoint-every 0", "--checkpoint-every 0"),
        ("--no-such-flag 1", "--no-such-flag"),
        ("--model no/such-model", "--model no/such-model"),
        ("--model {empty}", "--model {empty}"),
        ("--dataset no/such-data", "no/such-data"),
        ("--dataset {empty}", "{empty}/train.jsonl"),
        ("--run-dir {file}", "--run-dir {file}"),
        ("--resume {none}", "--resume and --run-dir"),
    ],
)
def test_bad_settings_are_refused_by_flag(small_run, tmp_path, capfd, monkeypatch, flags, named):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    paths = {name: tmp_path / name for name in ("empty", "file", "none")}
    paths["empty"].mkdir()
    paths["file"].write_text("")
    before = sorted(tmp_path.rglob("*"))
    words = [*small_run, "--run-dir", tmp_path / "run", *flags.format(**paths).split()]
    assert named.format(**paths) in refusal(capfd, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("folder", ["empty", "none"])
def test_what_is_no_run_is_not_resumed(tmp_path, capfd, folder):
    (tmp_path / "empty").mkdir()
    line = refusal(capfd, "--resume", tmp_path / folder)
    assert f"--resume {tmp_path / folder} names no run" in line
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


GOOD_ROW = ROWS[0]
BAD_ROWS = {
    "no question": ({"answer": "#### 1"}, "question"),
    "no answer": ({"question": "Why?"}, "answer"),
    "an empty question": ({**GOOD_ROW, "question": " \n"}, "question"),
    "an empty answer": ({**GOOD_ROW, "answer": ""}, "answer"),
    "no number in the gold answer": ({**GOOD_ROW, "answer": "It is #### many"}, "answer"),
    "no mark in the gold answer": ({**GOOD_ROW, "answer": "It is 7"}, "answer"),
    "a question that is no text": ({**GOOD_ROW, "question": 7}, "question"),
    "an answer that is no text": ({**GOOD_ROW, "answer": 7}, "answer"),
    "half of a surrogate pair": ('{"question": "\\ud83d", "answer": "#### 1"}', "surrogate"),
    "a list": ("[1, 2]", "object"),
    "null": ("null", "object"),
    "not JSON": ('{"question": "Wh', "not JSON"),
    "an empty line": ("", "not JSON"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("row, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_file_line_and_reason(
    small_run, tmp_path, run, capfd, row, reason, split
):
    rows = {"train": ROWS, "test": ROWS[:5]}
    rows[split] = [*rows[split][:2], row, *rows[split][2:]]
    data = write_dataset(tmp_path / "data", **rows)
    line = refusal(capfd, *small_run, "--dataset", data, "--run-dir", run)
    assert f"{data}/{split}.jsonl:3 " in line and reason in line
    assert not run.exists()


def test_an_empty_data_set_and_a_missing_split_are_refused(small_run, tmp_path, run, capfd):
    data = write_dataset(tmp_path / "data", train=[])
    words = [*small_run, "--dataset", data, "--run-dir", run]
    assert f"{data}/train.jsonl" in refusal(capfd, *words)
    write_dataset(data, ROWS)
    (data / "test.jsonl").unlink()
    assert f"{data}/test.jsonl" in refusal(capfd, *words)
    assert not run.exists()


def test_the_tiny_worlds_model_is_not_given_other_words(tmp_path, run, capfd):
    """Refused before anything is made: its vocabulary has the tiny world's words only."""
    words = ["--preset", "tiny", "--dataset", tmp_path, "--run-dir", run]
    assert "--model" in refusal(capfd, *words)
    assert not run.exists()


@pytest.mark.parametrize(
    "model_settings, tokenizer_settings, reason",
    [
        ({}, {"template": None}, "no chat template"),
        ({"eos_token_id": None}, {"end": None, "template": NO_MARKS}, "no end token"),
        ({"family": "Gemma2"}, {}, "its logits are not lm_head"),  # caps them
        ({"family": "Cohere"}, {}, "its logits are not lm_head"),  # scales them
        ({"family": "Mamba"}, {}, "it cannot be run in parts"),  # has no keys and values
        ({"quantization_config": {"quant_method": "any"}}, {}, "is quantised"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_the_reason(
    small_run, tmp_path, run, capfd, monkeypatch, model_settings, tokenizer_settings, reason
):
    """Before any work: nothing is scored, and nothing written."""
    folder = tmp_path / "unusable"
    tokenizer = bpe_tokenizer(**tokenizer_settings)
    tokenizer.save_pretrained(folder)
    random_model(len(tokenizer), **model_settings).save_pretrained(folder)
    monkeypatch.setattr(gainrl, "score_prompts", never)
    line = refusal(capfd, *small_run, "--model", folder, "--run-dir", run)
    assert reason in line and str(folder) in line
    assert not run.exists()


@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
def test_the_context_ends_where_rotary_embeddings_would_switch(tokenizer, rope_type):
    """From there on all keys are turned differently, and cached ones would be wrong."""
    rope = {
        "rope_type": rope_type,
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    if rope_type == "longrope":
        rope = {**rope, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    switching = random_model(len(tokenizer), rope_parameters=rope)
    assert gainrl.context_limit(switching) == 512
    assert gainrl.context_limit(random_model(len(tokenizer))) == 2048


@pytest.mark.parametrize("damage", ["cut in half", "empty", "not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(copied_run, capfd, damage):
    path = copied_run / "checkpoint" / "state.pt"
    whole = path.read_bytes()
    damaged = {"cut in half": whole[: len(whole) // 2], "empty": b"", "not a checkpoint": b"hello"}
    path.write_bytes(damaged[damage])
    before = file_contents(copied_run)
    assert str(path) in refusal(capfd, "--resume", copied_run)
    assert file_contents(copied_run) == before


@pytest.mark.parametrize("damage", ["a key less", "a line less"])
def test_damaged_scores_are_refused(copied_run, capfd, damage):
    path = copied_run / "scores.jsonl"
    text = path.read_text()
    damaged = {
        "a key less": text.replace("intra", "outer", 1),
        "a line less": text[: text.rindex("{")],
    }
    path.write_text(damaged[damage])
    before = file_contents(copied_run)
    assert str(path) in refusal(capfd, "--resume", copied_run)
    assert file_contents(copied_run) == before


@pytest.mark.parametrize(
    "flags", ["--lr 1e-3", "--curriculum length", "--seed 1", "--dataset other", "--device cpu:0"]
)
def test_other_settings_are_refused_by_flag_before_the_model_is_loaded(
    copied_run, capfd, monkeypatch, flags
):
    monkeypatch.setattr(gainrl, "load_model", never)
    before = file_contents(copied_run)
    line = refusal(capfd, "--resume", copied_run, *flags.split())
    assert str(copied_run) in line and flags.split()[0] in line
    assert file_contents(copied_run) == before


def test_the_checkpoint_of_a_device_that_is_not_here_is_refused(copied_run, capfd, monkeypatch):
    """The state of a GPU's random numbers is none for the CPU's."""
    monkeypatch.setattr(gainrl, "load_model", never)
    record = read_json(copied_run / "config.json")
    (copied_run / "config.json").write_text(json.dumps({**record, "device": "cuda:99"}))
    assert "--device cuda:99" in refusal(capfd, "--resume", copied_run)


def test_a_checkpoint_of_other_questions_is_refused(copied_run, capfd, monkeypatch):
    """Its scores are those of the questions it was made with, in their order."""
    before, load_problems = file_contents(copied_run), gainrl.load_problems
    monkeypatch.setattr(gainrl, "load_problems", lambda *inputs: load_problems(*inputs)[::-1])
    assert "other data" in refusal(capfd, "--resume", copied_run)
    assert file_contents(copied_run) == before


def test_a_run_of_another_version_is_refused_by_the_settings_it_lacks(copied_run, capfd):
    record = read_json(copied_run / "config.json")
    del record["gamma"]
    (copied_run / "config.json").write_text(json.dumps(record))
    line = refusal(capfd, "--resume", copied_run)
    assert "gamma" in line and str(copied_run / "config.json") in line


def test_a_directory_that_holds_another_run_is_refused(small_run, copied_run, capfd):
    before = file_contents(copied_run)
    line = refusal(capfd, *small_run, "--run-dir", copied_run)
    assert str(copied_run) in line and "--resume" in line
    assert file_contents(copied_run) == before


def test_a_directory_of_something_else_is_refused_and_left_as_it_is(small_run, tmp_path, capfd):
    """Also what looks like the leftovers of a kill, here and below."""
    for name in ("notes.txt", "draft.tmp", "data.12.tmp", "tiny-world.34.tmp/model.56.tmp"):
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("mine")
    before = file_contents(tmp_path / "work")
    line = refusal(capfd, *small_run, "--run-dir", tmp_path / "work")
    assert "is not empty" in line and "--resume" not in line
    assert len(before) == 4 and file_contents(tmp_path / "work") == before
