"""Stage 1 as a job: what it leaves, and that neither kills nor processes change it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from scaling.checkpoint import Checkpoint, load_checkpoint
from scaling.config import AdversarialConfig, ConfigError, DataConfig, LaunchConfig, TokenizerRunConfig
from scaling.process import INTERRUPTED, REFUSED, Interrupted, JobProcess
from scaling.records import RecordsError, RunFolder
from scaling.tokenizer import stage1, training
from scaling.tokenizer.feed import train_images
from scaling.tokenizer.vqvae import facts_of, load_tokenizer
from tests.scaling.tokenizer import tiny

ADVERSARIAL = AdversarialConfig(weight=0.5, start=3, channels=32, layers=2)
LAUNCH = LaunchConfig(device="cpu", threads=1)


class Stopped(JobProcess):
    """A job that is asked to leave once ``after`` steps are done."""

    after = 10**9
    steps = 0

    def should_stop(self) -> bool:
        self.steps += 1
        return self.steps >= self.after


def train(
    path: Path, config: TokenizerRunConfig, launch: LaunchConfig = LAUNCH, stop: int = 10**9
) -> RunFolder:
    folder = tiny.run_folder(path, config, launch)
    accelerator = training.make_accelerator(launch)
    with Stopped(folder) as job:
        job.after = stop
        training.train_tokenizer(config, launch, folder, accelerator, job, tiny.Waves())
    return folder


def outcome(folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict[str, Any]]:
    """Metrics without the speed, weights, facts."""
    lines = [{k: v for k, v in r.items() if k != "images_per_second"} for r in folder.metrics()]
    weights = load_file(folder.path / "tokenizer" / "weights.safetensors")
    return lines, weights, facts_of(folder.path / "tokenizer")


def same(a: RunFolder, b: RunFolder) -> None:
    lines, weights, facts = outcome(a)
    other_lines, other_weights, other_facts = outcome(b)
    assert lines == other_lines
    assert facts == other_facts
    assert all(torch.equal(v, other_weights[k]) for k, v in weights.items())


@pytest.fixture(scope="module")
def adversarial() -> TokenizerRunConfig:
    return tiny.variant(adversarial=ADVERSARIAL)


@pytest.fixture(scope="module")
def scalable() -> TokenizerRunConfig:
    train = dataclasses.replace(tiny.SCALABLE.train, adversarial=ADVERSARIAL)
    return dataclasses.replace(tiny.SCALABLE, train=train)


@pytest.fixture(scope="module")
def unbroken_scalable(tmp_path_factory: pytest.TempPathFactory, scalable: TokenizerRunConfig) -> RunFolder:
    return train(tmp_path_factory.mktemp("scalable") / "run", scalable)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, adversarial: TokenizerRunConfig) -> RunFolder:
    return train(tmp_path_factory.mktemp("unbroken") / "run", adversarial)


def test_what_a_run_leaves(unbroken: RunFolder) -> None:
    assert unbroken.status()["state"] == "done"
    assert unbroken.status()["step"] == unbroken.status()["total_steps"] == 8
    logged, evaluated = unbroken.metrics("train"), unbroken.metrics("eval")
    assert [r["step"] for r in logged] == [2, 4, 6, 8]
    assert [r["step"] for r in evaluated] == [4, 8]
    for record in logged:
        assert len(record["usage_scales"]) == len(record["perplexity_scales"]) == 3
        assert all(0 < u <= 1 for u in record["usage_scales"])
        assert record["loss"] > 0
        assert record["lr"] > 0
    facts = facts_of(unbroken.path / "tokenizer")
    assert {k: evaluated[-1][k] for k in ("psnr", "ssim", "usage_scales", "usage")} == {
        k: facts[k] for k in ("psnr", "ssim", "usage_scales", "usage")
    }
    assert (facts["steps"], facts["eval_images"], facts["data_fingerprint"]) == (8, 6, "waves")
    tokenizer = load_tokenizer(unbroken.path / "tokenizer")
    again = training.evaluate(
        tokenizer,
        training.validation_images(tiny.Waves(), tiny.DATA, 6),
        4,
        torch.device("cpu"),
    )
    assert again["psnr"] == facts["psnr"]
    with Image.open(unbroken.path / "reconstructions.png") as picture:
        assert picture.width > 6 * 96


def test_a_scalable_run_is_measured_at_every_size(unbroken_scalable: RunFolder) -> None:
    facts = facts_of(unbroken_scalable.path / "tokenizer")
    assert facts["psnr_scales"][-1] == facts["psnr"]
    assert len(facts["psnr_scales"]) == len(facts["usage_scales"]) == 3
    assert all(p > 0 for p in facts["psnr_scales"])
    # 4 and 8 pixels are no place for a window of 11.
    assert facts["ssim_scales"] == [None, None, facts["ssim"]]
    logged = unbroken_scalable.metrics("train")
    assert logged[0]["entropy"] == 0
    assert all(record["entropy"] != 0 for record in logged[1:])
    # Two steps, one smaller size in each: not every size was seen between two logs, the last always.
    assert any(0 in record["usage_scales"] for record in logged[1:])
    assert all(record["usage_scales"][-1] > 0 for record in logged[1:])
    tokenizer = load_tokenizer(unbroken_scalable.path / "tokenizer")
    originals = training.to_device(
        training.validation_images(tiny.Waves(), tiny.DATA, 6), torch.device("cpu")
    )
    small = tokenizer.decode_features(
        tokenizer.quantize.cumulative_features(tokenizer.encode(originals))[1]
    ).clamp(-1, 1)
    target = torch.nn.functional.avg_pool2d(originals, 2)
    psnr = -10 * ((small - target) / 2).square().mean((1, 2, 3)).log10()
    assert float(psnr.mean()) == pytest.approx(facts["psnr_scales"][1], abs=0.05)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_scalable_interrupted_and_resumed_is_unbroken(
    tmp_path: Path, scalable: TokenizerRunConfig, unbroken_scalable: RunFolder, stop: int
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "run", scalable, stop=stop)
    same(train(tmp_path / "run", scalable), unbroken_scalable)


def test_every_pixel_of_every_reconstruction_weighs_the_same() -> None:
    trained = stage1.Stage1(tiny.SCALABLE, training.make_accelerator(LAUNCH))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rebuilds = [torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 16, 16)]
    terms = trained._reconstruction_terms(images, rebuilds)
    small = torch.nn.functional.avg_pool2d(images, 4)
    squares = torch.cat([(small - 1).square().flatten(), images.square().flatten()])
    torch.testing.assert_close(terms["pixel_l2"], squares.mean())
    assert terms["perceptual"] == 0


def test_terms_that_are_off_are_said_to_be_off(
    unbroken: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert all(r["perceptual"] is None for r in unbroken.metrics("train"))
    assert facts_of(unbroken.path / "tokenizer")["perceptual"] == "off"
    assert facts_of(unbroken.path / "tokenizer")["adversarial"] == "on"
    folder = train(tmp_path / "run", tiny.variant(steps=1))
    assert "the perceptual term is off" in caplog.text
    (record,) = folder.metrics("train")
    assert record["perceptual"] is record["adversarial"] is record["discriminator"] is None


def test_the_adversarial_term_begins_at_its_start(unbroken: RunFolder) -> None:
    first, *later = unbroken.metrics("train")
    assert first["discriminator"] == 0
    assert all(r["discriminator"] > 0 and r["adversarial_weight"] > 0 for r in later)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_interrupted_and_resumed_is_unbroken(
    tmp_path: Path, adversarial: TokenizerRunConfig, unbroken: RunFolder, stop: int
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path / "run", adversarial, stop=stop)
    folder = RunFolder(tmp_path / "run")
    assert folder.status()["state"] == "interrupted"
    saved = load_checkpoint(folder.checkpoints)
    assert saved is not None
    assert saved.step == stop
    same(train(tmp_path / "run", adversarial), unbroken)


@pytest.mark.parametrize("dies_in", [2, 6, 7])
def test_killed_between_checkpoints_and_resumed_is_unbroken(
    tmp_path: Path,
    adversarial: TokenizerRunConfig,
    unbroken: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    dies_in: int,
) -> None:
    class KilledError(BaseException):
        pass

    step = stage1.Stage1.step

    def deadly(self: stage1.Stage1, number: int, *rest: Any) -> None:
        if number == dies_in:
            raise KilledError
        step(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage1.Stage1, "step", deadly)
        with pytest.raises(KilledError):
            train(tmp_path / "run", adversarial)
    same(train(tmp_path / "run", adversarial), unbroken)


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_interrupted_around_the_seeding_and_resumed_is_unbroken(tmp_path: Path, stop: int) -> None:
    config = tiny.variant(autoencode_steps=3, log_every=1)
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", config, stop=stop)
    broken, whole = train(tmp_path / "broken", config), train(tmp_path / "whole", config)
    same(broken, whole)
    assert [r["vq"] > 0 for r in whole.metrics("train")] == [False] * 3 + [True] * 5


def test_checkpoints_by_the_clock_change_nothing(
    tmp_path: Path, adversarial: TokenizerRunConfig, unbroken: RunFolder
) -> None:
    same(train(tmp_path / "run", adversarial, dataclasses.replace(LAUNCH, checkpoint_seconds=0.0)), unbroken)


def close(a: RunFolder, b: RunFolder) -> None:
    """Equal but for rounding: losses, codes, and the averaged gradients (Adam's first moment).

    Weights are not compared: a bias before a group norm has no gradient but rounding noise, and Adam
    makes full steps of it.
    """
    for record, other in zip(a.metrics("train"), b.metrics("train"), strict=True):
        assert record.keys() == other.keys()
        for term in ("loss", "vq", "entropy", "adversarial", "discriminator", "adversarial_weight"):
            known = record[term]
            assert other[term] == (None if known is None else pytest.approx(known, rel=1e-3))
        assert other["usage_scales"] == record["usage_scales"]
        assert other["codes_revived"] == record["codes_revived"]
    ours, theirs = (load_checkpoint(folder.checkpoints) for folder in (a, b))
    assert ours is not None
    assert theirs is not None
    for group in ("optimizer", "discriminator_optimizer"):
        moments = {k: v for k, v in ours.tensors[group].items() if k.startswith("exp_avg/")}
        largest = max(float(v.norm()) for v in moments.values())
        for name, value in moments.items():
            difference = float((theirs.tensors[group][name] - value).norm())
            assert difference < 1e-2 * float(value.norm()) + 1e-5 * largest, name


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("kind", ["adversarial", "scalable"])
def test_micro_batches_make_the_step_of_the_whole_batch(
    request: pytest.FixtureRequest, kind: str, micro_batch: int
) -> None:
    config: TokenizerRunConfig = request.getfixturevalue(kind)
    accelerator, source = training.make_accelerator(LAUNCH), tiny.Waves()
    whole, divided = (stage1.Stage1(config, accelerator) for _ in range(2))
    for step in range(6):
        # Each step from the same state: over many, rounding decides argmins and grows.
        state = {group: {k: v.clone() for k, v in t.items()} for group, t in whole.tensors().items()}
        divided.restore(Checkpoint(step, state, whole.state()))
        images = training.to_device(train_images(source, tiny.DATA, 0, 4, step), accelerator.device)
        whole.step(step, images, None)
        divided.step(step, images, micro_batch)
        assert torch.equal(whole.hits_logged_KV, divided.hits_logged_KV)
        assert whole.revived == divided.revived
        torch.testing.assert_close(divided.sums, whole.sums, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(divided.weight, whole.weight, rtol=1e-4, atol=0)
        for one, other in (
            (whole.tokenizer, divided.tokenizer),
            (whole.discriminator, divided.discriminator),
        ):
            assert one is not None
            assert other is not None
            gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
            largest = max(float(g.norm()) for g in gradients.values()) if gradients else 0.0
            for name, parameter in other.named_parameters():
                if name in gradients:
                    assert parameter.grad is not None
                    difference = float((parameter.grad - gradients[name]).norm())
                    assert difference <= 1e-3 * float(gradients[name].norm()) + 1e-5 * largest, name


def process(module: list[str], folder: Path) -> list[str]:
    return [sys.executable, *module, str(folder)]


PLAIN = ["-m", "scaling.tokenizer.training"]
PHOTOS = dataclasses.replace(
    tiny.RUN, data=DataConfig(resolution=16, train_images=30, val_images=10, num_classes=18)
)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}


def run(module: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        process(module, folder), env=environment(), capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("base", [tiny.RUN, tiny.SCALABLE], ids=["residual", "scalable"])
def test_two_processes_train_what_one_does(tmp_path: Path, base: TokenizerRunConfig) -> None:
    # Few steps: over many, rounding decides argmins and grows.
    few = dataclasses.replace(
        base.train,
        steps=4,
        log_every=1,
        revive_every=2,
        adversarial=dataclasses.replace(ADVERSARIAL, start=1),
    )
    config = dataclasses.replace(base, data=PHOTOS.data, train=few)
    one, two = (tiny.run_folder(tmp_path / n, config, LAUNCH) for n in ("one", "two"))
    two_ranks = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *PLAIN]
    for module, folder in ((PLAIN, one), (two_ranks, two)):
        ended = run(module, folder.path)
        assert ended.returncode == 0, ended.stderr
    close(one, two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_goes_on_where_it_was(tmp_path: Path, number: int) -> None:
    config = dataclasses.replace(PHOTOS, train=dataclasses.replace(tiny.TRAIN, steps=30, checkpoint_every=5))
    killed, whole = (tiny.run_folder(tmp_path / n, config, LAUNCH) for n in ("killed", "whole"))
    job = subprocess.Popen(process(PLAIN, killed.path), env=environment(), stderr=subprocess.DEVNULL)
    while not killed.checkpoints.exists() and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(number)
    code = job.wait(timeout=60)
    assert code == (INTERRUPTED if number == signal.SIGTERM else -number)
    assert not (killed.path / "tokenizer").exists()
    for folder in (killed, whole):
        ended = run(PLAIN, folder.path)
        assert ended.returncode == 0, ended.stderr
    same(killed, whole)
    assert killed.status()["attempt"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": dataclasses.replace(tiny.TOKENIZER, scales=(1, 2))}, "must end at the latent size 4"),
        ({"data": dataclasses.replace(tiny.DATA, resolution=18)}, r"latent size 4\.5"),
        (
            {
                "data": dataclasses.replace(tiny.DATA, resolution=8),
                "tokenizer": dataclasses.replace(tiny.TOKENIZER, scales=(1, 2)),
            },
            "at least 11",
        ),
        ({"train": dataclasses.replace(tiny.TRAIN, entropy=0.1)}, "entropy is a term of the scalable"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training.check(dataclasses.replace(tiny.RUN, **change), 1)
    with pytest.raises(ConfigError, match="batch 4 cannot be shared evenly by 3 processes"):
        training.check(tiny.RUN, 3)


def test_divergence_ends_with_one_clear_line(tmp_path: Path) -> None:
    config = dataclasses.replace(PHOTOS, train=dataclasses.replace(tiny.TRAIN, lr=1e30, warmup=0))
    folder = tiny.run_folder(tmp_path / "run", config, LAUNCH)
    ended = run(PLAIN, folder.path)
    assert ended.returncode == REFUSED
    assert "loss is not finite" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert "lower tokenizer_train.lr" in folder.status()["error"]


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    ended = run(PLAIN, tmp_path)
    assert ended.returncode == REFUSED
    assert ended.stderr.strip().endswith("config.json: no such file")


def test_the_loss_falls(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", tiny.variant(steps=60, log_every=10, lr=2e-3))
    losses = [r["pixel_l2"] for r in folder.metrics("train")]
    assert losses[-1] < 0.5 * losses[0]
    assert json.loads((folder.path / "status.json").read_text())["state"] == "done"


def test_processes_that_found_different_checkpoints_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "gather", lambda self, mine: torch.tensor([int(mine), 4]))
    with pytest.raises(RecordsError, match=r"different checkpoints \(steps 0, 4 by process\)"):
        train(tmp_path / "run", tiny.RUN)
    assert RunFolder(tmp_path / "run").metrics() == []
