"""A probe: scikit-learn's linear classifier on the features of a frozen model, tested on videos left out.

python examples/sklearn_probe.py [FOLDER/<class>/*.mp4; by default a few generated videos]
"""

import sys
import tempfile
from pathlib import Path

import torch
from clips import generated_videos
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from etmamba_timm.data import read_folders
from etmamba_timm.predict import extract_features, load_model

videos = read_folders(sys.argv[1] if len(sys.argv) > 1 else generated_videos(Path(tempfile.mkdtemp())))
paths, labels = zip(*videos.samples, strict=True)
model = load_model("etmamba_ti.mocap")  # needs no network; for real video, "videomamba_m.k400_f8"
features = torch.stack([extract_features(model, path) for path in paths])
probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
accuracy = cross_val_score(probe, features.numpy(), labels, cv=4)  # each video is left out of one of four fits
print(f"accuracy on videos left out: {accuracy.mean():.2f} of {len(videos.classes)} classes")
