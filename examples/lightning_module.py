"""Fine-tune an ETMamba, or a classifier on its frozen features, with Lightning.

python examples/lightning_module.py [--data FOLDER] [--freeze] [--model etmamba_ti --pretrained]
"""

import lightning as L
import timm
import torch
import torch.nn.functional as F
from clips import arguments, training_clips
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.data import collate


class Classifier(L.LightningModule):
    def __init__(self, model: torch.nn.Module, lr: float, freeze: bool) -> None:
        super().__init__()
        self.model, self.lr, self.freeze_backbone = model, lr, freeze
        if freeze:
            model.requires_grad_(False)
            model.get_classifier().requires_grad_(True)

    def on_train_epoch_start(self) -> None:
        self.trainer.train_dataloader.dataset.epoch = self.current_epoch  # other clips of the videos
        self.model.train(not self.freeze_backbone)

    def training_step(self, batch: dict) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch["clip"]), batch["label"])
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["label"]))
        return loss

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch + 1}: loss {self.trainer.callback_metrics['loss']:.3f}")

    def test_step(self, batch: dict) -> None:
        right = (self.model(batch["clip"]).argmax(1) == batch["label"]).float().mean()
        self.log("accuracy", right, batch_size=len(batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return create_optimizer_v2(self.model, "adamw", lr=self.lr, weight_decay=0.05)


args = arguments()
L.seed_everything(0, verbose=False)
data = training_clips(args)
model = timm.create_model(
    args.model,
    pretrained=args.pretrained,
    num_classes=len(data.annotations.classes),
    num_frames=args.frames,
    img_size=args.size,
    **args.model_kwargs,
)
trainer = L.Trainer(
    max_epochs=args.epochs,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
classifier = Classifier(model, args.lr, args.freeze)
loader = DataLoader(data, args.batch_size, shuffle=True, collate_fn=collate)
trainer.fit(classifier, loader)
figures = trainer.test(classifier, DataLoader(data, args.batch_size, collate_fn=collate), verbose=False)
print(f"accuracy on the training clips: {figures[0]['accuracy']:.2f}")
if args.output:
    save_checkpoint(model, args.output, label_names=data.annotations.classes, stride=1)
