"""The encoding job as a process: exit codes, status, being interrupted, and the tokenizer's own tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scaling.config import DataConfig, LaunchConfig, TokenizerConfig, TokenizerRunConfig, TokenizerTrainConfig
from scaling.data import encode as encode_module
from scaling.data.cache import open_cache
from scaling.data.encode import batch_size, encoder, main
from scaling.data.sources import open_source
from scaling.data.transforms import view_array
from scaling.process import run_job
from scaling.records import RunFolder, write_json
from scaling.schema import to_dict
from scaling.tokenizer.vqvae import Tokenizer, save_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = TokenizerRunConfig(
    DataConfig(resolution=8, train_images=150, val_images=20, num_classes=18, views=2),
    TokenizerConfig(
        vocab=16, latent_channels=4, channels=32, multipliers=(1, 1, 1), res_blocks=1, scales=(1, 2), phis=1
    ),
    TokenizerTrainConfig(steps=1),
)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A cache's folder ready for the job, and a tokenizer's with random weights."""
    torch.manual_seed(0)
    save_tokenizer(Tokenizer(CONFIG.tokenizer), tmp_path / "tok" / "tokenizer", {})
    RunFolder(tmp_path / "tokens").create(to_dict(CONFIG))
    write_json(tmp_path / "tokens" / "launch.json", to_dict(LaunchConfig(device="cpu", threads=1)))
    return tmp_path / "tokens", tmp_path / "tok"


def command(tokens: Path, tokenizer: Path) -> list[str]:
    """How the scheduler starts the job."""
    return [sys.executable, "-m", "scaling.data.encode", str(tokens), "--tokenizer", str(tokenizer)]


def run(tokens: Path, tokenizer: Path) -> int:
    """The job in this process."""
    return run_job(lambda: main([str(tokens), "--tokenizer", str(tokenizer)]))


def test_the_job_leaves_a_whole_cache_of_the_tokenizers_tokens(folders: tuple[Path, Path]) -> None:
    tokens, _ = folders
    done = subprocess.run(command(*folders), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    status = RunFolder(tokens).status()
    assert (status["state"], status["attempt"]) == ("done", 1)
    assert (status["step"], status["total_steps"]) == (170, 170)
    assert status["images_per_second"] > 0
    torch.manual_seed(0)
    tokenizer = Tokenizer(CONFIG.tokenizer).eval()
    cache = open_cache(tokens, tokenizer_hash=tokenizer.content_hash, scales=(1, 2), verify=True)
    source = open_source(CONFIG.data)
    crop = view_array(source.image("train", 149), CONFIG.data, (149, 1)).astype(np.float32)
    image_13HW = torch.from_numpy(crop / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = tokenizer.encode(image_13HW).numpy()
    np.testing.assert_array_equal(cache.split("train").tokens(np.array([149]), 1), expected)
    assert cache.split("train").labels[149] == source.label("train", 149)


def test_the_encoder_maps_black_and_white_to_minus_one_and_one() -> None:
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def encode(self, images: torch.Tensor, sizes: None) -> torch.Tensor:
            seen.append(images)
            return torch.full((len(images), 5), 65535)

    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1] = 255
    images[0, 1, 2, 0] = 255  # row 1, column 2, red
    tokens = encoder(Spy(), torch.device("cpu"))(images)  # type: ignore[arg-type]
    assert tokens.dtype == np.uint16
    assert int(tokens.max()) == 65535
    assert seen[0].shape == (2, 3, 4, 4)
    assert seen[0][0, 0, 1, 2] == 1
    assert seen[0][0].sum() == -46
    assert bool((seen[0][1] == 1).all())


def test_a_terminated_job_exits_3_and_ends_with_the_same_bytes(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, tokenizer_folder = folders
    monkeypatch.setattr(encode_module, "MAX_BATCH", 16)
    slow = (
        "import sys, time; from scaling.data import encode as e; from scaling.process import run_job\n"
        "real = e.encoder\n"
        "def encoder(*a):\n"
        "    f = real(*a)\n"
        "    return lambda x: (time.sleep(0.5), f(x))[1]\n"
        "e.encoder, e.MAX_BATCH = encoder, 16\n"
        "sys.exit(run_job(e.main))\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", slow, str(tokens), "--tokenizer", str(tokenizer_folder)], cwd=REPOSITORY
    )
    deadline = time.monotonic() + 60
    while RunFolder(tokens).status().get("step", 0) < 16 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 3
    status = RunFolder(tokens).status()
    assert status["state"] == "interrupted"
    assert 16 <= status["step"] < 170
    assert run(*folders) == 0
    unbroken = tmp_path / "unbroken"
    RunFolder(unbroken).create(to_dict(CONFIG))
    assert run(unbroken, tokenizer_folder) == 0
    for file in [*unbroken.glob("*.bin"), *unbroken.glob("*.npy"), unbroken / "manifest.json"]:
        assert (tokens / file.name).read_bytes() == file.read_bytes()


def test_wrong_folders_get_one_line_and_exit_2(
    folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens, tokenizer_folder = folders

    def refused(words: str, at: Path = tokens, tokenizer: Path = tokenizer_folder) -> None:
        capfd.readouterr()
        assert run(at, tokenizer) == 2
        told = capfd.readouterr().err
        assert words in told
        assert told.count("\n") == 1

    refused("config.json: no such file", at=tmp_path / "nowhere")
    refused("tokenizer.json: no such file", tokenizer=tmp_path / "nowhere")
    assert RunFolder(tokens).status()["state"] == "failed"
    assert "no such file" in RunFolder(tokens).status()["error"]
    assert run(tokens, tokenizer_folder) == 0
    assert "error" not in RunFolder(tokens).status()

    torch.manual_seed(1)
    save_tokenizer(Tokenizer(CONFIG.tokenizer), tmp_path / "retrained" / "tokenizer", {})
    refused("another tokenizer", tokenizer=tmp_path / "retrained")
    other = dataclasses.replace(CONFIG.tokenizer, vocab=8)
    save_tokenizer(Tokenizer(other), tmp_path / "other" / "tokenizer", {})
    refused("holds another tokenizer than", tokenizer=tmp_path / "other")
    with RunFolder(tokens).lock():
        refused("in use by another process")
    (tokens / "config.json").write_text(json.dumps(to_dict(CONFIG) | {"trian": {}}))
    refused("unknown key 'trian'; did you mean 'train'?")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_whole_cache_needs_its_images_no_more_and_a_damaged_one_asks_for_them(
    folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokens, _ = folders
    images = tmp_path / "images"
    for number in range(6):
        file = images / ("val" if number > 3 else "train") / "class" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(file)
    data = DataConfig("folder", path=str(images), resolution=8, train_images=4, val_images=2, num_classes=1)
    write_json(tokens / "config.json", to_dict(dataclasses.replace(CONFIG, data=data)))
    assert run(*folders) == 0
    images.rename(tmp_path / "away")
    RunFolder(tokens).set_status("interrupted")  # a check that was killed
    assert run(*folders) == 0
    assert RunFolder(tokens).status()["state"] == "done"

    shard = tokens / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    capfd.readouterr()
    assert run(*folders) == 2
    assert str(images) in capfd.readouterr().err
    (tmp_path / "away").rename(images)
    assert run(*folders) == 0
    assert shard.read_bytes() == whole


def test_a_gpu_that_is_not_there_is_told(
    folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    write_json(folders[0] / "launch.json", to_dict(LaunchConfig(device="cuda")))
    assert run(*folders) == 2
    assert "device is cuda, and torch finds no GPU here" in capfd.readouterr().err


def test_batches_fit_the_published_tokenizer() -> None:
    assert batch_size(256, "cpu") == 8
    assert batch_size(256, "cuda") == 64
    assert batch_size(8, "cpu") == encode_module.MAX_BATCH
    assert batch_size(4096, "cpu") == 1


@pytest.mark.slow
def test_two_processes_make_the_bytes_of_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, tokenizer_folder = folders
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    together = subprocess.run(
        [*launcher, "-m", "scaling.data.encode", str(tokens), "--tokenizer", str(tokenizer_folder)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert together.returncode == 0, together.stderr
    assert RunFolder(tokens).status()["state"] == "done"
    alone = tmp_path / "alone"
    RunFolder(alone).create(to_dict(CONFIG))
    assert run(alone, tokenizer_folder) == 0
    for file in [*alone.glob("*.bin"), *alone.glob("*.npy"), alone / "manifest.json"]:
        assert (tokens / file.name).read_bytes() == file.read_bytes()
