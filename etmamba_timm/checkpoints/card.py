"""The model card of a checkpoint: README.md of its Hub repository, from its config.json."""

from collections.abc import Mapping

from ..clip import Clip
from ..words import number_of
from .config import MULTILABEL

# Licences that the Hub has a name for.
KNOWN_LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit", "CC-BY-4.0": "cc-by-4.0", "CC-BY-NC-4.0": "cc-by-nc-4.0"}
NO_CLASSES = "none: features alone"


def model_card(title: str, config: Mapping, params: int, dtype: str, model_id: str | None = None) -> str:
    """The text of a model card.

    Args:
        title: its heading.
        config: the contents of config.json, with the blocks `clip`, `label_names` and `card`.
        params: number of the model's parameters.
        dtype: the dtype that most weights are stored in.
        model_id: the name that `timm.create_model` takes; None for a placeholder.
    """
    card, clip = config.get("card") or {}, Clip.from_config(config["clip"])
    cfg, several = config["pretrained_cfg"], config.get("problem_type") == MULTILABEL
    size = config.get("model_args", {}).get("img_size") or cfg.get("input_size", (3, 224, 224))[1:]
    height, width = (size, size) if isinstance(size, int) else size
    licence = card.get("licence") or cfg.get("license")
    rows = {
        "Architecture": f"`{config['architecture']}` of etmamba_timm",
        "Parameters": f"{params:,}; stored in {dtype}",
        "Clip": f"{number_of(clip.num_frames, 'frame')} of {height}×{width}, {clip.spacing}",
        "Classes": config.get("num_classes", cfg.get("num_classes")) or NO_CLASSES,
        "Scores": "of each class by itself, as a video may be of several (multi-label: sigmoid)" if several else None,
        "Source": card.get("source"),
        "Licence": licence or "not stated",
    }
    parts = [_front_matter(licence), f"# {title}\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in rows.items() if value is not None))
    parts.append(_usage(model_id or "local-dir:FOLDER", rows["Classes"] != NO_CLASSES))
    if card.get("recipe"):
        parts.append("## Recipe\n\n" + _listed(card["recipe"]))
    parts.append("## Figures\n\n" + (_figures(card["figures"]) if card.get("figures") else "None were measured.\n"))
    if config.get("label_names"):
        parts.append(f"## Classes\n\n{', '.join(map(str, config['label_names']))}\n")
    if card.get("notes"):
        parts.append(f"## Notes\n\n{card['notes']}\n")
    return "\n".join(parts)


def _front_matter(licence: str | None) -> str:
    known = KNOWN_LICENCES.get(licence or "")
    lines = ["---", "library_name: timm", "pipeline_tag: video-classification"]
    lines += ["tags:", "- video-classification", "- timm", "- etmamba_timm"]
    if known:
        lines.append(f"license: {known}")
    elif licence:
        lines += ["license: other", "license_name: see-this-card"]  # the Hub takes no words here
    return "\n".join([*lines, "---"]) + "\n"


def _usage(model_id: str, is_classifier: bool) -> str:
    text = (
        "## Use\n\n```python\nimport timm\nimport etmamba_timm  # registers the models\n\n"
        f'model = timm.create_model("{model_id}", pretrained=True).eval()\n```\n'
    )
    if is_classifier:
        text += (
            "\n```python\nimport etmamba_timm\nfrom transformers import pipeline\n\n"
            f'classify = pipeline("video-classification", model="{model_id.partition(":")[2] or "FOLDER"}")\n'
            'print(classify("clip.mp4"))\n```\n'
        )
    return text + (
        "\n`import etmamba_timm` comes first. Without it timm and transformers don't know the model; the upgrade that "
        "they advise\ndoesn't help.\n"
    )


def _listed(recipe: Mapping | str) -> str:
    if isinstance(recipe, str):
        return recipe + "\n"
    return "".join(f"- {key}: {value}\n" for key, value in recipe.items())


def _figures(figures: list[Mapping]) -> str:
    lines = ["| data | metric | value | views | whose |", "|---|---|---|---|---|"]
    for figure in figures:
        lines.append(
            f"| {figure['dataset']} | {figure['metric']} | {figure['value']} | {views(figure)} | {figure['whose']} |"
        )
    return "\n".join(lines) + "\n"


def views(figure: Mapping) -> str:
    """How a figure was measured: frames × crops × clips, or 'image'."""
    shown = figure.get("views")
    return f"{shown['frames']}×{shown['crops']}×{shown['clips']}" if shown else "image"
