"""Checkpoints: exact, and whole or not there."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scaling import checkpoint as module
from scaling.checkpoint import (
    Tensors,
    load_checkpoint,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)
from scaling.records import RecordsError


def tensors(value: float) -> Tensors:
    return {
        "model": {"w": torch.full((3, 2), value), "n": torch.tensor(7)},
        "other": {"b": torch.ones(2) > 0},
    }


def steps(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_saved_is_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    save_checkpoint(tmp_path, 12, tensors(1.5), {"a": [1, None]})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (12, {"a": [1, None]})
    assert found.tensors.keys() == {"model", "other"}
    for group, values in tensors(1.5).items():
        assert found.tensors[group].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(found.tensors[group][name], value)
            assert found.tensors[group][name].dtype == value.dtype


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save_checkpoint(tmp_path, step, tensors(step), {}, keep=2)
    assert steps(tmp_path) == ["step-000000010", "step-000000011"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 11


def test_a_step_may_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, tensors(1), {})
    save_checkpoint(tmp_path, 5, tensors(2), {})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.tensors["model"]["w"][0, 0] == 2


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {"x": 1})
    newest = save_checkpoint(tmp_path, 2, tensors(2), {"x": 2})
    content = bytearray((newest / file).read_bytes())
    if damage == "gone":
        (newest / file).unlink()
    elif damage == "cut":
        (newest / file).write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 0xFF
        (newest / file).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert str(newest) in caplog.text
    # The run goes on from step 1: what it passed over must not outlive the checkpoint it writes next.
    save_checkpoint(tmp_path, 1, tensors(1), {"x": 1})
    assert steps(tmp_path) == ["step-000000001"]


def test_nothing_is_left_when_all_are_damaged(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 1, tensors(1), {}) / "manifest.json").unlink()
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_costs_only_the_new_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save_checkpoint(tmp_path, 1, tensors(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 2, tensors(2), {})
    assert steps(tmp_path) == ["step-000000001"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_half_written_checkpoint_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def killed(_: Path) -> None:
        raise KilledError

    save_checkpoint(tmp_path, 1, tensors(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(module, "_sync_folder", killed)
        with pytest.raises(KilledError):
            save_checkpoint(tmp_path, 2, tensors(2), {})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    save_checkpoint(tmp_path, 2, tensors(2), {})
    assert steps(tmp_path) == ["step-000000001", "step-000000002"]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, end: int) -> None:
    for step in range(first, end):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 6, generator=generator)).square().sum().backward()
        optimizer.step()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


@given(st.booleans(), st.sampled_from([torch.optim.AdamW, torch.optim.Adam]), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_an_optimizer_goes_on_bit_for_bit(fused: bool, kind: type[torch.optim.Adam], at: int) -> None:
    whole = network()
    trained(whole, kind(whole.parameters(), lr=0.01, fused=fused), 0, 6)
    first = network()
    optimizer = kind(first.parameters(), lr=0.01, fused=fused)
    trained(first, optimizer, 0, at)
    saved = optimizer_tensors(optimizer, dict(first.named_parameters()))
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = kind(second.parameters(), lr=0.01, fused=fused)
    restore_optimizer(resumed, dict(second.named_parameters()), saved)
    trained(second, resumed, at, 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_loading_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    """Read from the kernel's own account, in a process of its own: 64 MiB in tensors of 4."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    values = {f"w{i}": torch.full((2**20,), float(i)) for i in range(16)}
    save_checkpoint(tmp_path, 1, {"model": values}, {})
    found = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 16 * 2**20


LOADING = """
import sys, torch
from torch import nn
from scaling.checkpoint import load_checkpoint, restore_module

def highest():
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

model = nn.Module()
for i in range(16):
    model.register_parameter(f"w{i}", nn.Parameter(torch.zeros(2**20)))
restore_module(model, model.state_dict())
open("/proc/self/clear_refs", "w").write("5")  # the highest is from now on
before = highest()
restore_module(model, load_checkpoint(sys.argv[1]).tensors["model"])
assert all(float(p[-1]) == i for i, p in enumerate(model.parameters()))
print(highest() - before)
"""


def test_a_module_takes_the_tensors_of_its_own_only() -> None:
    model, saved = network(), {name: value + 1 for name, value in network().state_dict().items()}
    restore_module(model, saved)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    with pytest.raises(RecordsError, match=r"another model: 1 tensors are only in one .* such as '0\.bias'"):
        restore_module(model, {name: value for name, value in saved.items() if name != "0.bias"})
    with pytest.raises(RecordsError, match=r"0\.weight is \(6, 5\), not \(5, 6\)"):
        restore_module(model, saved | {"0.weight": saved["0.weight"].T})


def test_state_of_another_model_is_refused() -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer, 0, 1)
    names = dict(model.named_parameters())
    saved = optimizer_tensors(optimizer, names)
    with pytest.raises(RecordsError, match=r"names '7\.weight'"):
        restore_optimizer(optimizer, names, {"exp_avg/7.weight": torch.zeros(5, 6)})
    with pytest.raises(RecordsError, match=r"exp_avg/0\.weight is \(6, 5\)"):
        restore_optimizer(optimizer, names, {"exp_avg/0.weight": saved["exp_avg/0.weight"].T})
    del names["0.weight"]
    with pytest.raises(ValueError, match="not among the names"):
        optimizer_tensors(optimizer, names)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), {})

    def unreadable(path: Path) -> dict[str, object]:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(module, "_digest", unreadable)
    with pytest.raises(RecordsError, match=r"step-000000002: the checkpoint could not be read"):
        load_checkpoint(tmp_path)
