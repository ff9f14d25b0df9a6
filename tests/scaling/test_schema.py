"""Strict reading of configurations: round trips, refusals that say where, hashes that mean identity."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import (
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TokenizerTrainConfig,
    TrainConfig,
    content_hash,
    from_dict,
    identity,
    to_dict,
)
from tests.scaling import tiny

RUN = tiny.run_config()
OLD_HASH = "3e35ae7f2fd319d695cab910af66b054962b760ad6a6f0e16171455796b92551"
"""Of the default tokenizer, before it could be scalable."""


def test_a_run_survives_json_unchanged() -> None:
    assert from_dict(RunConfig, to_dict(RUN)) == RUN


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (DataConfig, {"resolutoin": 32}, "unknown key 'resolutoin'; did you mean 'resolution'"),
        (DataConfig, {"zzz": 1}, "unknown key 'zzz'; known keys: source"),
        (DataConfig, {"resolution": "32"}, "resolution: expected a whole number, got '32'"),
        (DataConfig, {"resolution": True}, "expected a whole number, got True"),
        (DataConfig, {"resolution": 3.5}, "expected a whole number, got 3.5"),
        (DataConfig, {"source": "photo"}, "did you mean 'photos'"),
        (DataConfig, {"resolution": 0}, "must be positive"),
        (DataConfig, {"source": "folder"}, "data.path is needed"),
        (DataConfig, 7, "expected a mapping of keys, got 7"),
        (TokenizerConfig, {"scales": 3}, "scales: expected a list"),
        (TokenizerConfig, {"scales": [1, "2"]}, "scales.1: expected a whole number"),
        (TokenizerConfig, {"scales": [1, 3, 2]}, "must grow"),
        (TokenizerConfig, {"vocab": 70000}, "uint16"),
        (TokenizerConfig, {"channels": 48}, "multiple of norm_groups 32"),
        (TrainConfig, {}, "exactly one of train.steps, train.epochs, train.tokens; got none"),
        (TrainConfig, {"steps": 3, "epochs": 1}, "got steps, epochs"),
        (TrainConfig, {"steps": 3, "schedule": "lin_0"}, "did you mean 'lin0'"),
        (TrainConfig, {"steps": 3, "lr": "fast"}, "lr: expected a number, got 'fast'"),
        (TrainConfig, {"steps": 3, "betas": [0.9]}, "expected 2 values, got 1"),
        (LaunchConfig, {"sampling": {"imgaes": 3}}, "sampling.imgaes: unknown key 'imgaes'; did you mean"),
        (ModelConfig, {"depth": 2}, "missing key 'width'"),
        (LaunchConfig, {"runs_at_once": -1}, "launch.runs_at_once must be at least 1, got -1"),
        (LaunchConfig, {"runs_at_once": 0}, "launch.runs_at_once must be at least 1, got 0"),
        (LaunchConfig, {"sampling": {"top_p": 2.0}}, "sampling.top_p must be 0 to 1, got 2.0"),
        (DataConfig, {"seed": -1}, "data.seed must not be negative"),
        (TokenizerTrainConfig, {"log_every": 0}, "tokenizer_train.log_every must be at least 1"),
        (TokenizerTrainConfig, {"eval_images": 0}, "tokenizer_train.eval_images must be at least 1"),
        (TokenizerTrainConfig, {"autoencode_steps": 1000}, "must be 0 to steps - 1, got 1000"),
        (TokenizerTrainConfig, {"betas": [1.5, 0.9]}, "tokenizer_train.betas must be in [0, 1)"),
        (TrainConfig, {"steps": 1, "clip": -1.0}, "train.clip must be positive, got -1.0"),
        (TrainConfig, {"steps": 1, "weight_decay": -1}, "train.weight_decay must not be negative"),
        (EvaluationConfig, {"images": 0}, "evaluation.images must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(cls: type, data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, data)
    assert message in str(caught.value)


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert from_dict(TrainConfig, {"steps": 1, "lr": "2e-3"}).lr == 2e-3


def test_the_place_is_told_by_the_reader() -> None:
    with pytest.raises(ConfigError, match=r"^recipe.yaml:7: unknown key"):
        from_dict(DataConfig, {"pth": 1}, locate=lambda path: "recipe.yaml:7")


@given(st.integers(0, 2**31), st.floats(1e-6, 1.0), st.integers(1, 10_000))
def test_any_change_of_a_value_changes_the_id(seed: int, lr: float, steps: int) -> None:
    changed = dataclasses.replace(
        RUN, seed=seed, train=dataclasses.replace(RUN.train, lr=lr, steps=steps)
    )  # fmt: skip
    assert (changed.run_id == RUN.run_id) == (changed == RUN)
    assert from_dict(RunConfig, to_dict(changed)).run_id == changed.run_id


def test_where_data_lies_is_no_part_of_what_it_is() -> None:
    here, there = (DataConfig(source="parquet", path=p) for p in ("a", "b"))
    assert content_hash(here) == content_hash(there)
    assert content_hash(here) != content_hash(dataclasses.replace(here, flip=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": dataclasses.replace(RUN.tokenizer, scales=(1, 3))}, "the latent size 2 (= 8 px / 4)"),
        ({"data": dataclasses.replace(RUN.data, resolution=10)}, "of the tokenizer's downsampling 4"),
        ({"data": dataclasses.replace(RUN.data, train_images=None)}, "data.train_images is not known yet"),
        ({"data": dataclasses.replace(RUN.data, num_classes=9)}, "model.num_classes differs"),
        ({"model": dataclasses.replace(RUN.model, vocab=99)}, "model.vocab 99 differs from tokenizer.vocab"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(RUN, **change)
    assert message in str(caught.value)


@given(
    total=st.integers(1, 100_000), points=st.integers(1, 100), first=st.floats(1e-4, 0.9) | st.just(1.0)
)  # fmt: skip
def test_evaluations_are_evenly_spaced_in_log_flops(total: int, points: int, first: float) -> None:
    config = dataclasses.replace(
        RUN,
        train=dataclasses.replace(RUN.train, steps=total),
        evaluation=dataclasses.replace(RUN.evaluation, points=points, first=first),
    )
    steps = config.eval_steps
    assert steps[-1] == total
    assert list(steps) == sorted(set(steps))
    assert len(steps) <= points
    assert steps[0] >= 1
    if points > 2 and len(steps) == points:  # no two points fell on one step
        ratio = (total / max(1.0, first * total)) ** (1 / (points - 1))
        for one, other in pairwise(steps):
            assert other / one == pytest.approx(ratio, rel=1.01 / one)


@pytest.mark.parametrize(
    ("train", "steps"),
    [({"epochs": 2.0}, 8), ({"epochs": 0.01}, 1), ({"tokens": 8 * 5 * 3 + 1.0}, 4), ({"steps": 7}, 7)],
)  # fmt: skip
def test_length_in_steps(train: dict[str, float], steps: int) -> None:
    settings = {"steps": None, "batch": 8} | train
    assert tiny.run_config(**settings).total_steps == steps  # 30 images of 5 tokens


def test_one_dial() -> None:
    for depth in (1, 16, 30):
        model = ModelConfig.from_depth(depth)
        assert (model.width, model.heads) == (64 * depth, depth)
        assert model.drop_path == pytest.approx(0.1 * depth / 24)
        assert model.seq_len == 680


def test_a_field_that_came_later_leaves_older_hashes_alone() -> None:
    assert not {"quantizer", "z_channels"} & identity(TokenizerConfig()).keys()
    assert content_hash(TokenizerConfig()) == OLD_HASH
    scalable = TokenizerConfig(quantizer="scalable")
    assert identity(scalable)["quantizer"] == "scalable"
    assert from_dict(TokenizerConfig, to_dict(scalable)) == scalable


def test_what_one_family_knows_is_no_part_of_the_others() -> None:
    """Nor of an identity while it has its default, so that models from before it keep their ids."""
    plain, mamba = (ModelConfig.from_depth(1, family=f, ssm_state=8) for f in ("var", "flexvar-mamba"))
    assert plain == ModelConfig.from_depth(1)
    assert not {"step_schedule", "ssm_state", "ssm_expand", "ssm_conv"} & identity(plain).keys()
    assert {k: v for k, v in identity(mamba).items() if k in ("step_schedule", "ssm_state", "ssm_conv")} == {
        "step_schedule": "paper", "ssm_state": 8
    }  # fmt: skip
    with pytest.raises(ConfigError, match="ssm_conv 3 is for flexvar-mamba, flexvar has no scan"):
        dataclasses.replace(ModelConfig.from_depth(1, family="flexvar"), ssm_conv=3)


def test_what_does_nothing_changes_no_id() -> None:
    """Other values of it are other configs all the same, and are kept as they were given."""
    scalable = dataclasses.replace(RUN.tokenizer, quantizer="scalable")
    flexvar = dataclasses.replace(RUN.model, family="flexvar")
    other = dataclasses.replace(RUN, tokenizer=scalable, model=flexvar)
    assert RUN.train.lr is not None

    def ids(run: RunConfig) -> tuple[str, str]:
        return run.run_id, run.tokenizer_run.run_id

    def changed(run: RunConfig, section: str, **values: Any) -> tuple[str, str]:
        return ids(
            dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **values)})
        )

    for values in ({"entropy": 0.1}, {"random_sizes": 2}):
        assert changed(RUN, "tokenizer_train", **values) == ids(RUN)
        for one, two in zip(changed(other, "tokenizer_train", **values), ids(other), strict=True):
            assert one != two
    for values in ({"phis": 1}, {"phi_ratio": 0.25}):
        assert changed(other, "tokenizer", **values) == ids(other)
        assert changed(RUN, "tokenizer", **values)[1] != ids(RUN)[1]
    assert changed(RUN, "train", lr_base=0.5) == ids(RUN)
    free = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, lr=None))
    assert changed(free, "train", lr_base=0.5)[0] != ids(free)[0]
    assert from_dict(TrainConfig, to_dict(TrainConfig(steps=1, lr=1.0, lr_base=0.5))).lr_base == 0.5
