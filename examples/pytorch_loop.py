"""Fine-tune an ETMamba, or a classifier on its frozen features, in a plain PyTorch loop.

python examples/pytorch_loop.py [--data FOLDER] [--freeze] [--model etmamba_ti --pretrained]
"""

import timm
import torch
import torch.nn.functional as F
from clips import arguments, training_clips
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.data import collate

args = arguments()
torch.manual_seed(0)
data = training_clips(args)
loader = DataLoader(data, args.batch_size, shuffle=True, collate_fn=collate)
model = timm.create_model(
    args.model,
    pretrained=args.pretrained,
    num_classes=len(data.annotations.classes),
    num_frames=args.frames,
    img_size=args.size,
    **args.model_kwargs,
)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model.to(device).train()
if args.freeze:
    model.requires_grad_(False).eval()
    model.get_classifier().requires_grad_(True)
optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=0.05)  # leaves out what is frozen

for epoch in range(args.epochs):
    data.epoch = epoch  # other clips of the videos
    losses = []
    for batch in loader:
        loss = F.cross_entropy(model(batch["clip"].to(device)), batch["label"].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")

model.eval()
with torch.inference_mode():
    right = sum((model(b["clip"].to(device)).argmax(1).cpu() == b["label"]).sum().item() for b in loader)
print(f"accuracy on the training clips: {right / len(data):.2f}")
if args.output:
    save_checkpoint(model, args.output, label_names=data.annotations.classes, stride=1)
