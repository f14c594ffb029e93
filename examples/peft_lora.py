"""Fine-tune an ETMamba by LoRA: low-rank adapters on every linear layer, by peft, and a new classifier.

python examples/peft_lora.py [--data FOLDER] [--model etmamba_ti --pretrained]
"""

import timm
import torch
import torch.nn.functional as F
from clips import arguments, training_clips
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

import etmamba_timm  # noqa: F401 (registers the models)
from etmamba_timm.checkpoints import save_checkpoint
from etmamba_timm.data import collate

args = arguments(lr=0.003, can_freeze=False)  # adapters take a higher rate than the weights themselves
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
head = ["head"]  # trained as it is, without an adapter
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=head, modules_to_save=head)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
adapted = get_peft_model(model, config).to(device).train()
trained, total = adapted.get_nb_trainable_parameters()
print(f"{trained:,} of {total:,} parameters are trained")
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], args.lr)

for epoch in range(args.epochs):
    data.epoch = epoch  # other clips of the videos
    losses = []
    for batch in loader:
        loss = F.cross_entropy(adapted(batch["clip"].to(device)), batch["label"].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")

model = adapted.merge_and_unload().eval()  # an ETMamba again, as fast as before; adapted.save_pretrained keeps adapters
with torch.inference_mode():
    right = sum((model(b["clip"].to(device)).argmax(1).cpu() == b["label"]).sum().item() for b in loader)
print(f"accuracy on the training clips: {right / len(data):.2f}")
if args.output:
    save_checkpoint(model, args.output, label_names=data.annotations.classes, stride=1)
