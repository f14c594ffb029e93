"""Weights from the Hub: the real huggingface_hub client, in processes of their own, against a server on loopback."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from etmamba_timm.checkpoints import CheckpointError
from etmamba_timm.checkpoints.fetch import verify
from etmamba_timm.checkpoints.save import save_checkpoint
from etmamba_timm.clip import Clip

GOLDEN = Path(__file__).parents[1] / "golden" / "videomamba_small_f4.safetensors"
SMALL = {"img_size": 32, "num_frames": 2, "embed_dim": 16, "depth": 2, "num_classes": 5}
LABELS = ["run", "jump", "roll", "kick", "punch"]
UPSTREAM = "videomamba_t16_k400_f8_res224.pth"  # what the tag videomamba_ti.k400_f8 asks the Hub for
START = """
import json, sys, time, timm, torch
import etmamba_timm
x = torch.ones(1, 3, 2, 32, 32)
def fault(**faults):
    import os, urllib.parse, urllib.request
    urllib.request.urlopen(os.environ['HF_ENDPOINT'] + '/faults?' + urllib.parse.quote(json.dumps(faults)))
def attempt(*args, create=timm.create_model, **kwargs):
    start = time.time()
    try:
        model = create(*args, pretrained=True, **kwargs).eval()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", f"[{time.time() - start:.1f}]", sep="\\n")
    else:
        print(json.dumps(model(x).tolist()))
        return model
"""


def golden_config() -> dict:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return {key: value for key, value in config.items() if key != "kernel_size"}


GOLDEN_TAG = (
    f"attempt('videomamba_ti.k400_f8', pretrained_cfg_overlay={{'num_classes': {golden_config()['num_classes']}}}, "
    f"**{golden_config()})\n"
)


def start(code: str, environment: dict) -> subprocess.Popen:
    home = Path(environment["HF_HOME"])
    home.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", START + code],
        cwd=home,  # not the repository's: Python looks there first
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> list[str]:
    """The lines that a process printed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()


def run(code: str, environment: dict) -> list[str]:
    return finish(start(code, environment))


def outputs(model) -> str:
    with torch.no_grad():
        return json.dumps(model.eval()(torch.ones(1, 3, 2, 32, 32)).tolist())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """Repositories of a Hub: me/tiny (two revisions), OpenGVLab/VideoMamba (golden weights), and some broken ones."""
    repos = tmp_path_factory.mktemp("repos")
    torch.manual_seed(0)
    main, old = (timm.create_model("etmamba_ti", **SMALL).eval() for _ in range(2))
    card = {"licence": "Apache-2.0"}
    save_checkpoint(main, repos / "me/tiny/main", label_names=LABELS, stride=3, card=card)
    save_checkpoint(old, repos / "me/tiny/v1", stride=3)
    for name in ("binary", "pickle", "cut", "unknown"):
        shutil.copytree(repos / "me/tiny/main", repos / "me" / name / "main")
    weights = repos / "me/binary/main/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    (repos / "me/pickle/main/model.safetensors").unlink()
    torch.save({"model": Path}, repos / "me/pickle/main/pytorch_model.bin")  # a class is enough to need code
    cut = repos / "me/cut/main/model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    config = repos / "me/unknown/main/config.json"
    config.write_text(config.read_text().replace("etmamba_ti", "etmamba_xl"))
    golden = {k: v for k, v in load_file(GOLDEN).items() if k.startswith("model.")}
    upstream = repos / "OpenGVLab/VideoMamba/main"
    upstream.mkdir(parents=True)
    torch.save({"module": golden}, upstream / UPSTREAM)
    return {"repos": repos, "main": main, "old": old}


@pytest.fixture
def hub(models):
    with HubServer(models["repos"]) as server:
        yield server


def test_models_of_the_hub(hub, models, tmp_path):
    """By name, by revision, in another cache, with changes, without safetensors; and what is refused."""
    code = f"""
model = attempt('hf-hub:me/tiny')
print(json.dumps([model.num_frames, model.clip.to_config(), model.pretrained_cfg['label_names'], model.img_size]))
attempt('hf-hub:me/tiny@v1')
attempt('hf-hub:me/tiny', cache_dir={str(tmp_path / "other")!r})
model = attempt('hf-hub:me/tiny', num_classes=2, num_frames=4)
print('label_names' in model.pretrained_cfg)
attempt('hf-hub:me/binary')
for name in ('me/tiny@v2', 'me/none', 'me/pickle', 'me/cut', 'me/unknown'):
    attempt('hf-hub:' + name)
"""
    lines = run(code, hub.environment(tmp_path / "home"))
    assert lines[0] == lines[3] == lines[6] == outputs(models["main"])
    assert json.loads(lines[1]) == [2, {"num_frames": 2, "stride": 3}, LABELS, [32, 32]]
    assert lines[2] == outputs(models["old"]) != lines[0]
    assert len(list((tmp_path / "other").glob("models--me--tiny/snapshots/*/model.safetensors"))) == 1
    assert (len(json.loads(lines[4])[0]), lines[5]) == (2, "False")
    told = "\n".join(lines[7:])
    assert "RevisionNotFoundError: 404" in told
    assert "RepositoryNotFoundError: 404" in told
    assert "pytorch_model.bin can't be read as a checkpoint: it is damaged, no file of weights" in told
    assert "weights_only=True blocked" in told
    assert "model.safetensors can't be read as a checkpoint: it is damaged, no file of weights" in told
    assert "RuntimeError: Unknown model (etmamba_xl)" in told


def test_a_tag_with_upstreams_file_agrees_with_upstream_online_and_off(hub, tmp_path):
    """Golden weights in upstream's form, fetched by the tag's name; then from the cache, with no network at all."""
    code = f"""
from safetensors.torch import load_file
golden = load_file({str(GOLDEN)!r})
x = golden['input']
model = {GOLDEN_TAG}
with torch.no_grad():
    print((model.forward_features(x)[:, 0] - golden['features']).abs().max().item())
    print((model(x) - golden['logits']).abs().max().item())
"""
    environment = hub.environment(tmp_path)
    online = run(code, environment)
    assert max(map(float, online[1:])) < 1e-4
    assert hub.files_asked("GET") == [UPSTREAM]
    hub.requests.clear()
    code += """attempt('videomamba_m.k400_f8')  # which isn't in the cache
from etmamba_timm.predict import load_model
attempt('hf-hub:me/tiny', create=lambda name, **_: load_model(name))"""
    for change in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}):
        *warm, tag, tag_seconds, source, source_seconds = run(code, environment | change)
        assert warm == online
        assert_tells(tag, "OpenGVLab/VideoMamba/videomamba_m16_k400_f8_res224.pth", environment | change)
        assert_tells(source, "me/tiny/config.json", environment | change)
        assert max(float(seconds.strip("[]")) for seconds in (tag_seconds, source_seconds)) < 4
    assert hub.requests == []


def test_a_hub_that_gives_nothing_is_an_error_within_seconds(hub, tmp_path):
    """Slow, failing, or breaking off in the middle of a file; nothing of it stays in the cache."""
    code = """
for faults in ({'delay': 60}, {'status': 503}):
    fault(**faults)
    attempt('videomamba_m.k400_f8')
fault(truncate=0)
attempt('videomamba_ti.k400_f8')
"""
    environment = hub.environment(tmp_path)
    slow, slow_seconds, failing, failing_seconds, cut, _ = run(code, environment)
    for message in (slow, failing):
        assert_tells(message, "OpenGVLab/VideoMamba/videomamba_m16_k400_f8_res224.pth", environment)
    assert "Timeout" in slow
    assert "503" in failing
    assert 4 < float(slow_seconds.strip("[]")) < 9
    assert float(failing_seconds.strip("[]")) < 4
    assert_tells(cut, f"OpenGVLab/VideoMamba/{UPSTREAM}", environment)
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1000]


def assert_tells(message: str, file: str, environment: dict) -> None:
    """A download's error names the file, the Hub, the cache, and what can be done."""
    assert message.startswith(f"DownloadError: {file} can't be fetched from {environment['HF_ENDPOINT']}")
    for told in (f"{environment['HF_HOME']}/hub", "HF_HUB_OFFLINE=1", "pretrained_cfg_overlay=dict(file=...)"):
        assert told in message


def test_two_processes_at_once(hub, tmp_path):
    hub.faults["delay"] = 0.3
    processes = [start(GOLDEN_TAG, hub.environment(tmp_path)) for _ in range(2)]
    first, second = map(finish, processes)
    assert json.loads(first[0])
    assert first == second
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.fixture(scope="module")
def clone(models, tmp_path_factory) -> Path:
    """A copy of the package whose manifest has checkpoints of our own: local ones and some on the Hub."""
    repo, clone = Path(__file__).parents[2], tmp_path_factory.mktemp("clone")
    for name in ("etmamba_timm", "weights"):
        shutil.copytree(repo / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("hubconf.py", "setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, clone)
    shutil.copytree(models["repos"] / "me/tiny/main", clone / "weights" / "etmamba_ti.tiny")
    (clone / "weights/etmamba_ti.tiny/README.md").write_text("# tiny\n")
    weights = clone / "weights/etmamba_ti.tiny/model.safetensors"
    entry = {
        "architecture": "etmamba_ti",
        "status": "local",
        "source": {"folder": "etmamba_ti.tiny"},
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "size": weights.stat().st_size,
        "licence": "Apache-2.0",
        "num_frames": 2,
        "img_size": 32,
        "num_classes": 5,
        "labels": "config.json",
        "stride": 3,
        "trained_on": None,
        "started_from": None,
        "figures": [],
    }
    on_the_hub = entry | {"status": "published", "source": {"repo": "me/tiny", "file": "model.safetensors"}}
    manifest = {
        "etmamba_ti.tiny": entry,
        "etmamba_ti.bad": entry | {"sha256": "0" * 64},
        "etmamba_ti.gone": entry | {"source": {"folder": "nowhere"}},
        "etmamba_ti.hub": on_the_hub,
        "etmamba_ti.v1": on_the_hub | {"source": on_the_hub["source"] | {"revision": "v1"}, "sha256": None},
        **json.loads((clone / "weights/manifest.json").read_text()),
    }
    (clone / "weights/manifest.json").write_text(json.dumps(manifest))
    return clone


def test_tags_of_our_own(hub, clone, models, tmp_path):
    code = """
print(timm.list_pretrained('etmamba_ti.*')[:4] + [etmamba_timm.__file__])
for name in ('etmamba_ti', 'etmamba_ti.tiny', 'etmamba_ti.hub', 'etmamba_ti.v1'):
    model = attempt(name)
    labels = model.pretrained_cfg.get('label_names')
    print(json.dumps([model.num_frames, model.img_size, model.clip.to_config(), labels]))
    kept = model._model_args
    print(kept['embed_dim'], kept['num_frames'])
attempt('etmamba_ti.bad')
attempt('etmamba_ti.gone')
print(timm.create_model('etmamba_ti').num_classes)
"""
    lines = run(code, hub.environment(tmp_path, PYTHONPATH=str(clone)))
    tags = [f"etmamba_ti.{tag}" for tag in ("bad", "hub", "mocap", "tiny")]
    assert lines[0] == str([*tags, str(clone / "etmamba_timm/__init__.py")])
    for i, model in enumerate(("main", "main", "main", "old")):
        out, told, kept = lines[1 + 3 * i : 4 + 3 * i]
        assert out == outputs(models[model])
        labels = LABELS if model == "main" else None
        assert json.loads(told) == [2, [32, 32], {"num_frames": 2, "stride": 3}, labels]
        assert kept == "16 2"
    assert f"not {'0' * 64} as the manifest says: it is damaged or was replaced" in lines[13]
    assert lines[15].startswith("RuntimeError: No pretrained weights exist for etmamba_ti.")
    assert lines[17] == "400"


def test_torch_hub_one_liners(hub, clone, models, tmp_path):
    code = f"""
import os
os.chdir({str(tmp_path)!r})
model = torch.hub.load({str(clone)!r}, 'etmamba_ti', source='local', pretrained=True).eval()
print(json.dumps(model(x).tolist()))
for what in (model, 'etmamba_ti.tiny', 'videomamba_m.k400_f64_384'):
    print(torch.hub.load({str(clone)!r}, 'eval_transform', what, source='local'))
"""
    environment = hub.environment(tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=str(clone))
    lines = run(code, environment)
    assert lines[0] == outputs(models["main"])
    assert lines[1] == lines[2]
    assert "size=(32, 32)" in lines[1]
    assert "size=(384, 384)" in lines[3]


def test_a_variant_is_a_row(clone, tmp_path):
    """One row more in `VARIANTS`: timm and torch.hub build it, list it and describe it."""
    other = tmp_path / "clone"
    shutil.copytree(clone, other)
    with (other / "etmamba_timm/models/variants.py").open("a") as file:
        file.write('VARIANTS["etmamba_xs"] = {"embed_dim": 96, "depth": 2, "stem": "stfp", "block": "ebs"}\n')
    code = f"""
model = timm.create_model('etmamba_xs', num_classes=3)
print(model(torch.randn(1, 3, 2, 32, 32)).shape, model.embed_dim, model.pretrained_cfg['architecture'])
print(etmamba_timm.zoo.etmamba_xs.__name__, 'etmamba_xs' in etmamba_timm.zoo.__all__)
print(etmamba_timm.zoo.etmamba_xs.__doc__.splitlines()[0])
model = torch.hub.load({str(other)!r}, 'etmamba_xs', source='local', num_classes=3)
print(type(model).__name__, model.num_classes)
import hubconf
print(hubconf.etmamba_xs is etmamba_timm.zoo.etmamba_xs)
"""
    lines = run(code, {**os.environ, "PYTHONPATH": str(other), "HF_HOME": str(tmp_path / "home")})
    assert lines == [
        "torch.Size([1, 3]) 96 etmamba_xs",
        "etmamba_xs True",
        "ETMamba-Xs with the STFP stem and EBS blocks; width 96, depth 2.",
        "EtMamba 3",
        "True",
    ]


def test_a_wheel_carries_its_weights(hub, clone, models, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(clone)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    shipped = {str(path.relative_to(tmp_path / "site")) for path in (tmp_path / "site").rglob("*") if path.is_file()}
    sources = {str(p.relative_to(clone)) for p in (clone / "etmamba_timm").rglob("*") if p.suffix in (".py", ".cpp")}
    assert sources <= shipped
    names = ("model.safetensors", "config.json", "README.md")
    assert {f"etmamba_timm/weights/etmamba_ti.tiny/{name}" for name in names} <= shipped
    assert any(re.fullmatch(r"etmamba_timm/weights/sample_\w+\.mp4", name) for name in shipped)
    code = "attempt('etmamba_ti.tiny')\nprint(etmamba_timm.__file__)"
    out, file = run(code, hub.environment(tmp_path, HF_HUB_OFFLINE="1", PYTHONPATH=str(tmp_path / "site")))
    assert (out, file) == (outputs(models["main"]), str(tmp_path / "site/etmamba_timm/__init__.py"))


def test_the_sha256_is_verified(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    verify(path, hashlib.sha256(b"weights").hexdigest())
    verify(path, None)
    with pytest.raises(CheckpointError, match="delete it and try again"):
        verify(path, hashlib.sha256(b"others").hexdigest())


def test_an_unknown_tag_says_so():
    with pytest.raises(RuntimeError, match="videomamba_ti has no tag 'k401'; choose one of k400_f8, in1k,"):
        timm.create_model("videomamba_ti.k401", pretrained=True)


def test_a_tag_with_a_file_of_it_at_hand(tmp_path, caplog):
    """What the tag says of frames and classes holds, and the class names are known."""
    source = timm.create_model("videomamba_ti.k400_f8", img_size=32, embed_dim=16, depth=1).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    kwargs = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}
    small = {"img_size": 32, "embed_dim": 16, "depth": 1}
    model = timm.create_model("videomamba_ti.k400_f8", **kwargs, **small).eval()
    assert model.clip == Clip(8, "spread")
    assert model.pretrained_cfg["label_names"][0] == "abseiling"
    assert outputs(model) == outputs(source)
    assert "has positions of 4 patches, not 196 as videomamba_ti.k400_f8 promises" in caplog.text
    caplog.clear()
    unnamed = timm.create_model("videomamba_ti", **kwargs, **small)
    assert caplog.text == ""
    assert "label_names" not in unnamed.pretrained_cfg
    assert unnamed.clip == Clip(8)  # which the file tells


def test_a_tag_that_starts_from_videomamba(hub, tmp_path):
    """VideoMamba's checkpoint by a tag of ETMamba; ETMamba's own weights, by the same tag, stay as they are."""
    code = f"""
small = {golden_config()!r}
model = attempt('etmamba_ti.videomamba_k400_f8', **small)
print(bool(model.blocks[0].fusion.weight[:, small['embed_dim']:].any()), 'label_names' in model.pretrained_cfg)
torch.save(model.state_dict(), 'own.pth')
attempt('etmamba_ti.videomamba_k400_f8', pretrained_cfg_overlay=dict(file='own.pth'), **small)
attempt('etmamba_ti.videomamba_k400_f8', folded=True, **small)
"""
    started, told, own, folded, _ = run(code, hub.environment(tmp_path))
    assert told == "False False"  # Fuse starts as [I | 0]
    assert own == started
    assert "leave folded=True out, then call fold()" in folded
    assert hub.files_asked("GET") == [UPSTREAM]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
