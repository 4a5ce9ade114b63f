"""GAIN-RL on several GPUs: our scores and curriculum in TRL's GRPOTrainer.

    pip install trl==1.16.0
    accelerate launch --multi_gpu --num_processes 8 -m extras.train_trl
    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 \\
        --main_process_ip HOST0 --main_process_port 29500 -m extras.train_trl
        (the same with --machine_rank 1 on the other host)

With --resume, the run continues from its last checkpoint. All hosts must see the same disk. Each
GPU adds 4 questions to a batch: 8 rows, times 4 micro-steps, divided by 8 completions.

How the curriculum fits in. TRL draws questions ahead of time, but never past the end of an epoch.
So here an epoch is one batch (TRL's log counts it as one), and each update moves the mean before
the next batch is drawn. All processes draw with the same seed and update with the same gathered
accuracy, so they draw the same questions. A killed and resumed run draws the questions of a run
without a kill, if the checkpoint lies between two batches. For this, keep save_steps a multiple of
num_iterations (1 here) and steps_per_generation at its default.

The C of a batch comes from the scores before training. gainrl.py measures it again with the current
weights, but ZeRO-3 and FSDP split the weights, and the trainer would have to collect them. In 20
steps of the tiny world the two C differed by up to 0.010, and the means by up to 6 of 2,000 ranks.

The tests run this file on CPUs with a tiny model: in one process, in two processes (DDP over gloo),
with evaluations, and with a kill and a resume. It has never run on GPUs, on several hosts, with
DeepSpeed, FSDP or vLLM, or with models too large for one GPU (each process scores the questions
with the whole model). In verl, curriculum samplers (AbstractCurriculumSampler,
data.sampler.class_path) exist up to release 0.7.1 and are gone in 0.8.0; we only read its code."""

import sys

import torch
from accelerate.utils import broadcast
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from gainrl import (
    GaussianCurriculum,
    build_messages,
    encode_prompts,
    load_model,
    reward,
    score_prompts,
)

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
DATASET = "openai/gsm8k"


class OneBatchEpochs(GaussianCurriculum):
    """The sampler of rows that TRL expects. One epoch is one batch: each question is repeated for
    its completions, and the batch is repeated for each micro-step and iteration."""

    def __init__(self, concentration, args):
        super().__init__(concentration, args.generation_batch_size // args.num_generations)
        self.args = args

    def __iter__(self):
        self.batch = self.sample()
        rows = [index for index in self.batch for _ in range(self.args.num_generations)]
        yield from rows * (self.args.num_iterations * self.args.steps_per_generation)

    def __len__(self):
        args = self.args
        return args.generation_batch_size * args.num_iterations * args.steps_per_generation


class CurriculumTrainer(GRPOTrainer):
    """A GRPOTrainer that draws from the curriculum, updates it with the rewards, and saves it."""

    def __init__(self, model, args, data, tokenizer, concentration):
        super().__init__(model, correct, args, data, processing_class=tokenizer)
        self.concentration = concentration
        self.curriculum = OneBatchEpochs(concentration, args)

    def _get_train_sampler(self, dataset=None):
        return self.curriculum

    def _calculate_rewards(self, *batch):
        rewards = super()._calculate_rewards(*batch)  # gathered from all processes
        if self.model.training:  # evaluations don't move the mean
            concentration = self.concentration[self.curriculum.batch].mean().item()
            self.curriculum.update(rewards.mean().item(), concentration)
        return rewards

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:  # in one process
            torch.save(self.curriculum.state_dict(), f"{output_dir}/curriculum.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        self.curriculum.load_state_dict(torch.load(f"{checkpoint}/curriculum.pt"))


def correct(completions, answer, **columns):
    """A reward function for TRL: 1.0 or 0.0 for each completion."""
    return [reward(chat[0]["content"], gold) for chat, gold in zip(completions, answer)]


def main():
    args = GRPOConfig(
        output_dir="runs/trl",
        max_steps=200,
        save_steps=10,
        gradient_accumulation_steps=4,
        max_completion_length=512,
    )
    data = load_dataset(DATASET, "main", split="train")
    data = data.map(lambda row: {"prompt": build_messages(row["question"])})
    model, tokenizer = load_model(MODEL, args.device)
    scores = score_prompts(model, encode_prompts(tokenizer, data["question"]))
    # All processes take the scores of the first one, because GPUs may round differently.
    concentration = broadcast(scores.concentration.to(args.device)).cpu()
    trainer = CurriculumTrainer(model, args, data, tokenizer, concentration)
    trainer.train(resume_from_checkpoint="--resume" in sys.argv)


if __name__ == "__main__":
    main()
