"""Fine-tune an ETMamba, or a classifier on its frozen features, with transformers' Trainer.

timm makes the model, and transformers loads the folder that it is saved in: any
folder or Hub id of this package would do.

python examples/transformers_trainer.py [--data FOLDER] [--freeze] [--model etmamba_ti --pretrained]
"""

import tempfile
from pathlib import Path

import timm
import torch
from clips import arguments, training_clips
from transformers import AutoModelForVideoClassification, PrinterCallback, Trainer, TrainingArguments

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.checkpoints import save_checkpoint

args = arguments()
torch.manual_seed(0)
data = training_clips(args)
classes = data.annotations.classes
folder = Path(tempfile.mkdtemp())
start = timm.create_model(
    args.model,
    pretrained=args.pretrained,
    num_classes=len(classes),
    num_frames=args.frames,
    img_size=args.size,
    **args.model_kwargs,
)
save_checkpoint(start, folder / "start", label_names=classes, stride=1)
model = AutoModelForVideoClassification.from_pretrained(folder / "start")
if args.freeze:
    model.requires_grad_(False)
    model.timm_model.get_classifier().requires_grad_(True)


def collate(items: list[dict]) -> dict:
    clips = torch.stack([item["clip"] for item in items]).transpose(1, 2)  # [B, C, T, H, W] -> [B, T, C, H, W]
    return {"pixel_values": clips, "labels": torch.tensor([item["label"] for item in items])}


training = TrainingArguments(
    output_dir=folder / "runs",
    num_train_epochs=args.epochs,
    per_device_train_batch_size=args.batch_size,
    learning_rate=args.lr,
    weight_decay=0.05,
    lr_scheduler_type="constant",
    logging_strategy="epoch",
    save_strategy="no",
    remove_unused_columns=False,  # 'clip' and 'label' aren't arguments of the model's forward
    report_to=[],
    disable_tqdm=True,
)
trainer = Trainer(model, training, data_collator=collate, train_dataset=data)
trainer.remove_callback(PrinterCallback)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"epoch {entry['epoch']:.0f}: loss {float(entry['loss']):.3f}")
predicted = trainer.predict(data)
print(f"accuracy on the training clips: {(predicted.predictions.argmax(1) == predicted.label_ids).mean():.2f}")
if args.output:
    model.save_pretrained(args.output)  # timm.create_model("local-dir:...", pretrained=True) reads it too
