"""The variants: four rows of the paper's ablation in three sizes, as constructor arguments."""

SIZES = {
    "ti": {"embed_dim": 192, "depth": 24},
    "s": {"embed_dim": 384, "depth": 24},
    "m": {"embed_dim": 576, "depth": 32},
}
# The rows of the paper's Table 5; {} is the size.
ROWS = {
    "videomamba_{}": {"stem": "none", "block": "bimamba"},  # (a)
    "videomamba_{}_stfp": {"stem": "stfp", "block": "bimamba"},  # (b)
    "etmamba_{}_ebs": {"stem": "stfp", "block": "ebs"},  # (c)
    "etmamba_{}": {"stem": "stfp", "block": "stcm"},  # (d)
}
VARIANTS = {row.format(size): {**SIZES[size], **ROWS[row]} for row in ROWS for size in SIZES}
