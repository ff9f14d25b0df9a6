"""One transformer run, from cached tokens to its records, under Accelerate.

    python -m scaling.trainer RUN_FOLDER --tokens CACHE_FOLDER --tokenizer TOKENIZER_FOLDER

- The loop is read top to bottom in ``_train``; it is the only place with state.
- Step s is a pure function of (config, s): images, label drops, drop paths, learning rate. So a run
  that was killed and resumed equals one that was not, and nothing random needs saving.
- The global batch is fixed. Process r of W takes its share of the rows and splits it into
  micro-batches; the loss is divided by the global token count, so accumulation changes only rounding.
- No synchronisation inside the loop but at log points, where losses leave the device, and where
  several processes agree on leaving (``scaling.agreement``).
- When memory runs out the step is taken again in smaller micro-batches (``scaling.memory``); a run whose
  loss diverges is given up (``scaling.divergence``).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, KwargsHandler, gather_object
from safetensors.torch import save_file
from torch import Tensor, nn

from scaling import flops
from scaling.agreement import Agreement, same_start
from scaling.backends import choose_attention
from scaling.branches import ALONE, Sharing, branch_start, has_left, lines_to_share
from scaling.checkpoint import (
    Fill,
    NotFiniteError,
    Tensors,
    check_finite,
    forget_later,
    forget_newest,
    load_checkpoint,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
    sync_file,
)
from scaling.clock import Clock, device_name, host_memory, peak_memory
from scaling.compilation import compile_layers
from scaling.config import ConfigError, Device, LaunchConfig, Precision, RunConfig, from_dict
from scaling.data.cache import TokenCache, open_cache
from scaling.divergence import Divergence
from scaling.evaluation import evaluate
from scaling.families.registry import build, family_model
from scaling.feeding import kept_on_device
from scaling.generation import sample_grid
from scaling.layers.attention import back_end
from scaling.layers.block import Block
from scaling.lines import evaluation_record, training_record
from scaling.memory import out_of_memory
from scaling.objective import Objective
from scaling.process import DivergedError, Interrupted, JobProcess, recorded_failure, run_job
from scaling.records import RunFolder, finite, read_json
from scaling.schedule import learning_rate, weight_decay
from scaling.steps import step_scales
from scaling.tokenizer.vqvae import Tokenizer, load_tokenizer
from scaling.trackers.mirror import Mirror
from scaling.training_step import Batches, rehearse, train_step

EVAL_BATCH = 64
T = TypeVar("T")


def train(
    folder: RunFolder,
    config: RunConfig,
    launch: LaunchConfig,
    cache: TokenCache,
    tokenizer: Tokenizer,
    sharing: Sharing = ALONE,
) -> None:
    """Train the run in ``folder`` from its newest checkpoint to the end; every process calls it."""
    with recorded_failure(folder):
        accelerator = make_accelerator(config, launch)
    _train(accelerator, folder, config, launch, cache, tokenizer, sharing)
    # DDP's reducer must not be the last to let go of gloo's group: it would wait, holding Python's lock, for
    # the group's thread, which may be waiting for that lock. A rank then never ends.
    accelerator.free_memory()
    accelerator.end_training()


def _train(
    accelerator: Accelerator,
    folder: RunFolder,
    config: RunConfig,
    launch: LaunchConfig,
    cache: TokenCache,
    tokenizer: Tokenizer,
    sharing: Sharing,
) -> None:
    """``train``, on these processes; the loop."""
    with (
        JobProcess(folder, accelerator.is_main_process, accelerator.wait_for_everyone) as job,
        contextlib.ExitStack() as stack,
    ):
        if accelerator.is_main_process:
            folder.write_costs(flops.costs(config))
            if job.after_divergence:
                forget_newest(folder.checkpoints)  # finite, but perhaps on its way already
        accelerator.wait_for_everyone()
        attention = choose_attention(folder, config, launch, accelerator, sharing.trunk)
        launch = replace(launch, attention=attention)
        job.beat(attention=attention)
        state = State(config, launch, accelerator, tokenizer)
        start, shared = state.resume(folder, sharing.trunk)
        if job.after_divergence:
            forget_later(folder.branches, start)
            job.beat(go_back=False)
        total = config.total_steps
        train_split, val_split = cache.split("train"), cache.split("val")
        mirror = Mirror(accelerator, launch, folder, 0 if shared else start)
        for line in shared:
            mirror.log(line)
        kept = train_split if kept_on_device(config, launch, train_split, accelerator.device) else None
        batches = stack.enter_context(Batches(config, launch, accelerator, train_split, folder, kept))
        before = [r["loss_avg"] for r in folder.metrics("train") if r["step"] <= start]
        divergence = Divergence(config.model.vocab, accelerator.scaler is not None, before)
        eval_steps, snapshots = set(config.eval_steps), set(config.snapshot_steps.values())
        clock = Clock(launch.checkpoint_seconds, folder.status().get("seconds"))
        agreement, spent = Agreement(accelerator, start), flops.spent(config, start)
        if start < total and accelerator.num_processes > 1:
            rehearse(state, batches)
        for step in range(start, total):
            set_rates(state.optimizer, config, step)
            scales = step_scales(config.model, config.seed, step)
            sums = train_step(state, batches, step, scales)
            done, spent = step + 1, spent + flops.step_cost(config, scales)

            if done % launch.log_every == 0 or done == total:
                values = training_record(config, accelerator, sums, done, spent, train_split.images)
                speed = clock.lap(done - start) * config.train.batch
                job.beat(step=done, total_steps=total)
                divergence.look(values["loss_avg"], values["grad_norm"], done)
                mirror.log(values | {"images_per_second": speed})
                job.beat(loss=values["loss_avg"], images_per_second=speed, seconds=dict(clock.seconds))
            if done in eval_steps:
                with clock.paused("evaluation"):
                    measured = partial(
                        evaluate, config=config.model, quantizer=state.quantizer, split=val_split,
                        accelerator=accelerator, cached=config.tokenizer.scales,
                        images=config.evaluation.images, batch=launch.micro_batch or EVAL_BATCH,
                        on_batch=job.beat,
                    )  # fmt: skip
                    evaluation = state.with_weights(measured)
                record = evaluation_record(config, done, spent, train_split.images) | evaluation.record()
                if not finite(record["loss_avg"]):
                    raise DivergedError(f"the validation loss became {record['loss_avg']} at step {done}")
                mirror.log(record)
            if done in snapshots:
                with clock.paused("checkpoints"):
                    state.write_weights(folder.snapshot(done))
            if done in sharing.leave:
                with clock.paused("checkpoints"):
                    state.leave(folder, done)
            leave, due = agreement.ask(done, job.should_stop(), clock.checkpoint_due())
            if (leave or due) and done < total:
                with clock.paused("checkpoints"):
                    state.save(folder, done)
                clock.checkpointed()
                if leave:
                    raise Interrupted
        if start < total:
            with clock.paused("checkpoints"):
                state.save(folder, total)
        with clock.paused("samples"):
            finish(folder, config, launch, state, tokenizer)
        facts = machine_facts(config, launch, accelerator, clock) | {"tokens_on_device": kept is not None}
        job.beat(step=total, total_steps=total, micro_batch=batches.micro.size, **facts)
        mirror.close()
        accelerator.wait_for_everyone()


class State:
    """Model and optimiser of one run, saved and restored as named tensors."""

    def __init__(
        self, config: RunConfig, launch: LaunchConfig, accelerator: Accelerator, tokenizer: Tokenizer
    ) -> None:
        self.accelerator, self.config, self.tokenizer_hash = accelerator, config, tokenizer.content_hash
        self.quantizer = tokenizer.quantize.to(accelerator.device)
        torch.manual_seed(config.seed)
        self.bare = build(config.model, launch.attention)
        for block in self.bare.get_submodule("blocks").children():
            assert isinstance(block, Block)
            block.recompute = launch.recompute_activations
        if launch.compile:
            compile_layers(self.bare)
        objective, self._build = (
            Objective(family_model(self.bare)),
            partial(build, config.model, launch.attention),
        )
        self.sharded = launch.shard and accelerator.num_processes > 1
        if self.sharded:
            from scaling.sharding import shard

            shard(objective, self.bare, accelerator.device, accelerator.num_processes)
        self.names = dict(self.bare.named_parameters())
        groups = decay_groups(self.bare)
        train = config.train
        optimizer = torch.optim.AdamW(
            groups, lr=train.peak_lr, betas=train.betas, eps=train.eps, weight_decay=0.0, fused=True
        )
        if self.sharded:
            self.model, self.optimizer = objective, accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(objective, optimizer)
        self.model.train()

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may have a slice; every process calls it."""
        if not self.sharded:
            return tensor
        from scaling.sharding import whole

        return whole(tensor)

    def with_weights(self, action: Callable[[nn.Module], T]) -> T:
        """The action on the bare model with all its weights; every process calls it."""
        if not self.sharded:
            return action(self.bare)
        from scaling.sharding import whole_model

        return action(whole_model(self.bare, self._build, self.accelerator.device))

    def write_weights(self, target: Path) -> None:
        """``write_weights`` of the model (main process; the others help)."""

        def write(model: nn.Module) -> None:
            if self.accelerator.is_main_process:
                write_weights(model, target)

        self.with_weights(write)

    def save(self, folder: RunFolder, step: int) -> None:
        """Write the checkpoint of ``step`` (main process; the others wait).

        Raises:
            DivergedError: (in all of them) weights or moments are not finite any more.
        """
        tensors = self._tensors(step)
        if self.accelerator.is_main_process:
            folder.sync()  # lines behind the checkpoint would never be written again
            save_checkpoint(folder.checkpoints, step, tensors, self._facts(step))
        self.accelerator.wait_for_everyone()

    def leave(self, folder: RunFolder, step: int) -> None:
        """Write what shorter runs of this config start from, unless it is there (main process; the others
        wait). Raises as ``save``."""
        tensors = self._tensors(step)
        if self.accelerator.is_main_process and not has_left(folder, step):
            facts = self._facts(step) | {"lines": lines_to_share(folder)}
            save_checkpoint(folder.branches, step, tensors, facts, keep=None)
        self.accelerator.wait_for_everyone()

    def _facts(self, step: int) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "step": step,
            "tokenizer": self.tokenizer_hash,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def _tensors(self, step: int) -> Tensors:
        """Weights and moments, all of them finite; whole ones in the main process."""
        tensors = {
            "model": {n: t.detach() for n, t in self.bare.state_dict().items()},
            "optimizer": optimizer_tensors(self.optimizer.optimizer, self.names),
        }
        wrong, slices = "", tensors
        if self.sharded:
            from scaling.sharding import gathered, own

            slices = {group: {n: own(t) for n, t in values.items()} for group, values in tensors.items()}
        try:
            check_finite(slices)
        except NotFiniteError as error:
            wrong = str(error)
        if self.sharded:  # a number may be wrong in one process's slice alone
            wrong = next(filter(None, gather_object([wrong])), "")
        if wrong:
            raise DivergedError(f"after step {step} {wrong}")
        return gathered(tensors, keep=self.accelerator.is_main_process) if self.sharded else tensors

    def resume(self, folder: RunFolder, trunk: RunFolder | None) -> tuple[int, list[dict[str, Any]]]:
        """Restore the newest sound checkpoint, else what ``trunk`` has left, else nothing.

        Returns:
            The steps already done; the trunk's lines of metrics up to there, if it did them.

        Raises:
            ConfigError: the checkpoint was trained on tokens of another tokenizer.
            RecordsError: it could not be read, or another process has found another one.
        """
        checkpoint, lines = load_checkpoint(folder.checkpoints), list[dict[str, Any]]()
        resumed = checkpoint is not None
        if checkpoint is None and trunk is not None:
            checkpoint = branch_start(trunk, self.config)
            lines = checkpoint.state["lines"] if checkpoint else []
        same_start(self.accelerator, folder.checkpoints, checkpoint.step if checkpoint else 0)
        if self.accelerator.is_main_process and not resumed:
            spent = flops.spent(self.config, checkpoint.step) if checkpoint else None
            folder.write_shared(
                {"run": trunk.name, "step": checkpoint.step, "tokens": spent.tokens, "flops": spent.flops}
                if trunk and checkpoint and spent
                else None
            )
        if checkpoint is None:
            return 0, []
        trained_on = checkpoint.state["tokenizer"]
        if trained_on != self.tokenizer_hash:
            raise ConfigError(
                f"{folder.path} was trained on tokens of tokenizer {trained_on[:10]}, not of "
                f"{self.tokenizer_hash[:10]}; remove the run folder or restore the tokenizer"
            )
        fill: Fill = Tensor.copy_
        if self.sharded:
            from scaling.sharding import fill
        restore_module(self.bare, checkpoint.tensors["model"], fill)
        restore_optimizer(self.optimizer.optimizer, self.names, checkpoint.tensors["optimizer"], fill)
        if checkpoint.state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        return checkpoint.step, lines


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups as published: no weight decay for biases, vectors and position-like parameters."""
    no_decay: tuple[str, ...] = model.NO_DECAY  # type: ignore[assignment]
    groups: dict[float, list[nn.Parameter]] = {1.0: [], 0.0: []}
    for name, parameter in model.named_parameters():
        free = parameter.ndim == 1 or name.endswith("bias") or any(part in name for part in no_decay)
        groups[0.0 if free else 1.0].append(parameter)
    return [{"params": group, "decay": decay} for decay, group in groups.items() if group]


def set_rates(optimizer: Any, config: RunConfig, step: int) -> None:
    """Learning rate and weight decay of 0-based ``step``."""
    rate = learning_rate(config.train, step, config.total_steps)
    decay = weight_decay(config.train, step, config.total_steps)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = rate, decay * group["decay"]


def finish(
    folder: RunFolder, config: RunConfig, launch: LaunchConfig, state: State, tokenizer: Tokenizer
) -> None:
    """Leave the final weights and a picture of samples beside the numbers."""

    def leave(model: nn.Module) -> None:
        if not state.accelerator.is_main_process:
            return
        write_weights(model, folder.weights)
        if launch.sampling.images == 0:
            return
        model.eval()
        tokenizer.to(state.accelerator.device)
        try:
            sample_grid(
                family_model(model), tokenizer, launch.sampling, config.model.num_classes,
                folder.path / "samples.png",
            )  # fmt: skip
        except Exception as error:
            if not out_of_memory(error):
                raise
            print(
                "out of memory: no pictures are drawn; 'sample' can draw them from the weights",
                file=sys.stderr,
            )

    state.with_weights(leave)


def write_weights(model: nn.Module, target: Path) -> None:
    """Write a model's weights so that ``target`` is whole whenever it is there."""
    target.parent.mkdir(exist_ok=True)
    aside = target.with_suffix(".tmp")
    save_file({n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}, aside)
    sync_file(aside)
    aside.replace(target)


def machine_facts(
    config: RunConfig, launch: LaunchConfig, accelerator: Accelerator, clock: Clock
) -> dict[str, Any]:
    """What this machine took, for ``status.json``."""
    facts: dict[str, Any] = {
        "device": device_name(accelerator.device),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "precision": config.train.precision,
        "attention": back_end(launch.attention, accelerator.device),
        "peak_memory": peak_memory(accelerator.device),
        "host_memory": host_memory(),
        "seconds": dict(clock.seconds),
    }
    if clock.steps_per_second is not None:
        facts["images_per_second"] = clock.steps_per_second * config.train.batch
    return facts


def make_accelerator(config: RunConfig, launch: LaunchConfig) -> Accelerator:
    """Accelerate for this run's precision and device.

    Raises:
        ConfigError: as ``accelerator_on``; or fp16 and sharded.
    """
    precision = config.train.precision
    if launch.shard and precision == "fp16":
        raise ConfigError("launch.shard is not made for precision fp16, whose gradients are scaled; use bf16")
    # The model's buffers are constants: nothing to exchange before every step.
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if launch.shard:  # a cache of the weights in bf16 would keep all layers' at once
        handlers.append(AutocastKwargs(cache_enabled=False))
    return accelerator_on(launch.device, precision, kwargs_handlers=handlers)


def accelerator_on(device: Device, precision: Precision, **options: Any) -> Accelerator:
    """Accelerate on a kind of device, in a precision.

    Raises:
        ConfigError: a GPU was asked for and there is none, or fp16 without a GPU.
    """
    cpu = device == "cpu" or not torch.cuda.is_available()
    if device == "cuda" and cpu:
        raise ConfigError("device is cuda, but torch sees no GPU here")
    if precision == "fp16" and cpu:
        raise ConfigError("precision fp16 needs a GPU; use fp32 or bf16 on a CPU")
    if precision == "bf16" and cpu and not _fast_bf16():
        print(
            "warning: this CPU emulates bf16, many times slower than fp32; consider precision fp32",
            file=sys.stderr,
        )
    return Accelerator(cpu=cpu, mixed_precision="no" if precision == "fp32" else precision, **options)


def _fast_bf16() -> bool:
    """Whether this CPU has bf16 instructions, as far as torch can tell."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def main() -> None:
    """Parse the command line, open what the run stands on, train."""
    parser = argparse.ArgumentParser(prog="scaling.trainer", description="Train one run.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="the token cache's folder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer run's folder")
    parser.add_argument("--trunk", type=Path, help="folder of a longer run of the same config to start from")
    parser.add_argument(
        "--leave",
        type=int,
        nargs="+",
        default=[],
        help="steps after which to leave a checkpoint for shorter ones",
    )
    args = parser.parse_args()
    sharing = Sharing(RunFolder(args.trunk) if args.trunk else None, frozenset(args.leave))
    folder = RunFolder(args.folder)
    with recorded_failure(folder):
        config = from_dict(RunConfig, folder.config())
        launch = from_dict(LaunchConfig, read_json(folder.path / "launch.json"))
        if launch.threads is not None:
            torch.set_num_threads(launch.threads)
        torch.backends.cudnn.allow_tf32 = False  # φ decides tokens' inputs: the same on every device
        tokenizer = load_tokenizer(args.tokenizer / "tokenizer")
        cache = open_cache(args.tokens, tokenizer.content_hash, config.tokenizer.scales)
    train(folder, config, launch, cache, tokenizer, sharing)


if __name__ == "__main__":
    sys.exit(run_job(main))
