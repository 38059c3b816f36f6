"""The stock Hugging Face Trainer with a tiny transformer made from a configuration: nothing is downloaded.

python docs/examples/hf_trainer.py
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from per_instance_accountant import FixedThresholds, PrivacyEngine, audit
from per_instance_accountant.integrations.transformers import IndividualPrivacyCallback


class Sentences(Dataset):
    """Made-up token sequences; the label says whether the first token is above the middle."""

    def __init__(self, size: int = 400) -> None:
        self.tokens = torch.randint(5, 60, (size, 12), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        tokens = self.tokens[row]
        return {"input_ids": tokens, "labels": (tokens[0] > 32).long()}


def main() -> None:
    """Two epochs with gradient accumulation; half of the people asked for a quarter of the influence."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=12,
    )
    model = BertForSequenceClassification(config)
    # All instances share one row of positions, which therefore has no gradient per instance.
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    args = TrainingArguments(
        output_dir="checkpoints",
        num_train_epochs=2,
        per_device_train_batch_size=10,
        gradient_accumulation_steps=4,
        max_grad_norm=0.0,
        learning_rate=2e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    dataset = Sentences()
    trainer = Trainer(model=model, args=args, train_dataset=dataset)
    thresholds = [0.25 if row % 2 else 1.0 for row in range(len(dataset))]
    engine = PrivacyEngine(
        accountant="rdp", ledger="sentences", charging=FixedThresholds(thresholds=thresholds)
    )
    privacy = IndividualPrivacyCallback(engine, delta=1e-3, noise_multiplier=1.0, max_grad_norm=1.0)
    privacy.attach(trainer)
    trainer.train()
    engine.close()
    epsilon = audit("sentences", delta=1e-3).epsilon
    print(f"epsilon {epsilon[0]:.2f} for threshold 1, {epsilon[1]:.2f} for threshold 1/4: CERTIFIED")


if __name__ == "__main__":
    main()
