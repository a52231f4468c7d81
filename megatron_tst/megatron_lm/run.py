"""A run with Megatron-LM's trainer."""

import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import set_global_variables
from torch import Tensor

from megatron_tst.checkpoint.changes import check_identity
from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.checkpoint.run_state import RunState
from megatron_tst.checkpoint.stock_arguments import find_foreign
from megatron_tst.config import RunConfig, UserError, check_sizes, dump_config
from megatron_tst.data.batches import BatchShape
from megatron_tst.data.build import RunData, SamplePlan, build_run_data
from megatron_tst.distributed import Device, any_rank, get_parallel_state, run_on_main_rank
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.megatron_lm.continuation import find_start, remember
from megatron_tst.megatron_lm.flags import complete, flag_parser, read_arguments
from megatron_tst.megatron_lm.forward import ForwardStep, StepSizes
from megatron_tst.megatron_lm.model import model_config
from megatron_tst.megatron_lm.monitor import Monitor
from megatron_tst.megatron_lm.samples import TrainSamples, ValidSamples, bytes_per_target
from megatron_tst.megatron_lm.settings import given_values, run_config
from megatron_tst.megatron_lm.stages import taking_part
from megatron_tst.megatron_lm.tokenizer import RunTokenizer, find_tokenizer
from megatron_tst.megatron_patches import Libraries, find_libraries
from megatron_tst.megatron_patches.versions import check_transformer_engine
from megatron_tst.model import loss_choice
from megatron_tst.shape import pad_vocabulary, resolve_shape, step_flops
from megatron_tst.superposition import Phase
from megatron_tst.telemetry import RunDirectory, start_log_screen, versions
from megatron_tst.telemetry.run_metrics import RunFacts

logger = logging.getLogger(__name__)


class Run:
    """A run, from its arguments to its last checkpoint; it implements :class:`Stages`.

    Attributes:
        args: Megatron-LM's arguments, completed.
        config: settings of the run that correspond to the arguments.
    """

    def __init__(
        self, args: Namespace, config: RunConfig, tokenizer: RunTokenizer, device: Device, libraries: Libraries
    ) -> None:
        """Store everything that is known before the ranks join."""
        self.args, self.config = args, config
        self._tokenizer, self._device, self._libraries = tokenizer, device, libraries
        self._signals = StopSignals()
        assert config.logging.tst_run_dir
        self._directory = RunDirectory(Path(config.logging.tst_run_dir))
        self._folders = CheckpointFolders(Path(args.save))
        self._data: RunData | None = None

    def set_up(self) -> None:
        """Occupy the run's folders and find its start.

        Raises:
            UserError: if a folder belongs to another run, or the run cannot continue from the checkpoint.
            StoppedInSetUp: if a signal asks to stop.
        """
        self._signals.listen()
        self._ranks = get_parallel_state()
        if self._ranks.is_main:
            start_log_screen()
            # Megatron-LM prints every line that reaches the root logger.
            logging.getLogger("megatron_tst").propagate = False
        self._start = run_on_main_rank(self._take_place)
        self._signals.check()

    def _take_place(self) -> Any:
        self._directory.occupy()
        self._directory.occupy_checkpoints(self._folders.path)
        start = find_start(self.args, self.config)
        if start.state is not None and start.splits is not None:
            if start.state.vocab_size != self.config.model.vocab_size:
                raise UserError(
                    f"--vocab-size {self.config.model.vocab_size}: the checkpoint's vocabulary has "
                    f"{start.state.vocab_size} tokens"
                )
            check_identity(
                start.state,
                tokenizer_sha256=self._tokenizer.sha256,
                global_batch_size=self.args.global_batch_size,
            )
        goes_on = self.args.load is not None and not self.args.finetune
        if not (goes_on and Path(self.args.load).resolve() == self._folders.path.resolve()):
            self._directory.refuse_used()
            if steps := self._folders.steps():
                raise UserError(f"--save {self.args.save}: already holds a run's checkpoints, of the steps {steps}")
        self._directory.create(dump_config(self.config), start.step)
        self._directory.link_checkpoints(self._folders.path)
        return start

    def provide_data(self, _: Any, vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """Return the training and validation datasets; this is Megatron-LM's ``train_valid_test_datasets_provider``.

        Collective: every rank of the world calls it.
        """
        args, config = self.args, self.config
        if self._data is None:
            cache = Path(args.data_cache_path or self._directory.index_cache)
            plan = SamplePlan(self._tokenizer, args.seq_length, args.global_batch_size, args.seed, cache)  # type: ignore[arg-type]
            self._data = build_run_data(config.data, self._start.schedule, args.eval_iters, plan, self._start.splits)
            self._signals.check()
            text = {"tokenizer": self._tokenizer.sha256, "corpora": self._data.fingerprint}
            run_on_main_rank(lambda: self._directory.record_text(**text))
        vocab_size = config.model.vocab_size or 0
        is_read = self._ranks.owns_text
        train = TrainSamples(self._data.train, self._start.schedule, args.global_batch_size, vocab_size, is_read)
        valid = None
        if self._data.valid is None:
            args.eval_iters = 0
        else:
            # Each evaluation reads the same samples, so their number limits the number of batches.
            args.eval_iters = len(self._data.valid.phases[0]) // args.global_batch_size
            args.consumed_valid_samples = 0
            valid = ValidSamples(self._data.valid.phases[0], vocab_size, is_read)
        return train, valid, None

    def begin(self) -> None:
        """Open the metrics file and log the data of each phase."""
        self._signals.hold()
        assert self._data is not None
        args = self.args
        facts = RunFacts(
            schedule=self._start.schedule,
            objective=self.config.superposition.tst_objective,
            positions_per_step=args.global_batch_size * args.seq_length,
            flops_per_step=self._flops_per_step(),
            epochs=tuple(text.num_epochs for text in self._data.train.phases),
            world_size=self._ranks.world_size,
            device_name=self._device.name,
        )
        self._forward = ForwardStep(facts.schedule, self._ranks, self._batch_shape, self._sizes, self._check_losses)
        self._monitor = Monitor(
            facts,
            self._directory,
            self._ranks,
            log_interval=args.log_interval,
            first_step=self._start.step,
            gpu_hours=self._start.gpu_hours,
            bytes_per_target=self._bytes_per_target(),
        )
        for line in facts.describe_phases():
            logger.info(line)

    def _bytes_per_target(self) -> float | None:
        """Return the bytes of validation text per target, on the main rank; None elsewhere or if they are unknown."""
        assert self._data is not None
        sizes, text = self._tokenizer.token_bytes, self._data.valid
        if not self._ranks.is_main or sizes is None or text is None:
            return None
        return bytes_per_target(text.phases[0], sizes, self._masked_after)

    @property
    def _masked_after(self) -> int | None:
        return self._tokenizer.eod if self.args.eod_mask_loss else None

    def _flops_per_step(self) -> float:
        """Return the FLOPs of a step: the own trainer's count if it has such models, else Megatron-LM's."""
        args = self.args
        if args.hybrid_layer_pattern is None and not find_foreign(vars(args)):
            return step_flops(resolve_shape(self.config.model, parallel=self.config.parallel), args.global_batch_size)
        return float(training.num_floating_point_operations(args, args.global_batch_size))

    def stepped(
        self, step: int, losses: dict[str, Tensor], grad_norm: float, lr_by_group: dict[str, float], started_s: float
    ) -> None:
        """Record the metrics of a step."""
        self._monitor.record(step, losses, grad_norm, lr_by_group, started_s)

    def evaluated(self, losses: dict[str, Any]) -> None:
        """Record the metrics of an evaluation."""
        self._monitor.record_valid(losses)

    def is_save_due(self, step: int) -> bool:
        """Return whether a phase ends after ``step`` steps, since the checkpoint of a switch is always kept."""
        ends: tuple[int, ...] = self._start.schedule.ends
        return step in ends[:-1]  # at the end of the last phase Megatron-LM itself saves a checkpoint

    def is_stop_asked(self) -> bool:
        """Return whether a signal reached any rank, or metrics cannot be written.

        Collective: every rank of the world calls it.
        """
        return any(any_rank(self._signals.request is not None, self._monitor.failure is not None))

    def saving(self, step: int) -> None:
        """Store the state of the run in the checkpoint that is about to be written."""
        assert self._data is not None
        self._monitor.sync()
        schedule = self._start.schedule
        state = RunState(
            iteration=step,
            schedule=schedule,
            samples_per_phase=schedule.samples_per_phase(step, self.args.global_batch_size),
            global_batch_size=self.args.global_batch_size,
            vocab_size=self.config.model.vocab_size or 0,
            tokenizer=self._tokenizer.name,
            tokenizer_sha256=self._tokenizer.sha256,
            sources=[asdict(split) for split in self._data.splits],
            layout=self._ranks.layout,
            is_permanent=step in schedule.ends,
            versions=versions(),
            gpu_hours=self._monitor.gpu_hours,
        )
        remember(self.args, state, self.config)

    def saved(self, step: int) -> None:
        """Delete the checkpoints that --keep-last does not keep, and end a run whose metrics cannot be written.

        Collective: every rank of the world calls it.

        Raises:
            UserError: on every rank, if metrics cannot be written.
        """
        keep = self.config.checkpoint.keep_last
        if keep is not None and self._ranks.is_main:
            passing = [s for s in self._folders.steps() if s < step and s not in self._start.schedule.ends]
            for old in passing[: max(len(passing) + 1 - keep, 0)]:
                self._folders.remove(old)
        if not self.args.async_save:  # else the checkpoint is still being written
            self._monitor.check()

    @property
    def is_complete(self) -> bool:
        """Whether all steps of the schedule are done."""
        return bool(self._monitor.step >= self._start.schedule.num_steps)

    def forward_step(self, samples: Any, model: torch.nn.Module, *_: Any) -> Any:
        """Run the next micro-batch through the model; this is Megatron-LM's ``forward_step_func``."""
        return self._forward(samples, model)

    def _batch_shape(self, phase: Phase) -> BatchShape:
        settings, device = self.config.superposition, self._device.torch_device
        return BatchShape.of_phase(phase, settings, self.args.seq_length, self._masked_after, device)

    def _sizes(self, is_training: bool) -> StepSizes:
        args = self.args
        if is_training:
            return StepSizes(get_num_microbatches(), args.global_batch_size * args.seq_length)
        per_pass = args.eval_micro_batch_size * args.data_parallel_size
        return StepSizes(args.eval_global_batch_size // per_pass, args.eval_global_batch_size * args.seq_length)

    def _check_losses(self, losses: Tensor) -> None:
        if not self.args.check_for_nan_in_loss_and_grad:
            return
        for is_wrong, name in ((torch.isnan, "NaN"), (torch.isinf, "infinity")):
            get_rerun_state_machine().validate_result(
                result=losses.detach().sum(),
                rejection_func=is_wrong,
                message=f"the loss of a micro-batch is {name}",
                tolerance=0.0,
                fatal=True,
            )

    def train(self) -> bool:
        """Train to the end of the schedule, or until asked to stop; return whether the end was reached.

        Raises:
            UserError: if a setting, a checkpoint or a file cannot be used.
        """
        loss = loss_choice(self.config, self._libraries)
        model = model_config(self.args, self.config.model.vocab_size or 0, loss)
        container = pretrain_cfg_container_from_args(self.args, model)
        # Megatron-LM reads this attribute of the provider: it states that every rank builds its datasets.
        self.provide_data.__func__.is_distributed = True  # type: ignore[attr-defined]
        try:
            with taking_part(self, has_cuda=self._device.torch_device.type == "cuda"):
                training.pretrain(
                    container, self.provide_data, ModelType.encoder_or_decoder, self.forward_step, store=_own_store()
                )
        except SystemExit as stop:  # Megatron-LM raises this to stop a run early
            if stop.code:
                raise
        finally:
            self._directory.leave()
        return self.is_complete


def _own_store() -> dist.Store | None:
    """Return the store of a single process without torchrun's environment; None under torchrun."""
    return None if "RANK" in os.environ else dist.HashStore()


def prepare(argv: Sequence[str], device: Device) -> Run:
    """Create a run from its command line, before the ranks join.

    Raises:
        UserError: if a setting cannot be used or cannot be combined with bags.
        SystemExit: with code 0 after ``--help``.
    """
    libraries = find_libraries()
    check_transformer_engine(libraries.transformer_engine)
    args = read_arguments(argv, libraries, has_cuda=device.torch_device.type == "cuda")
    parser = flag_parser()
    args.tst_given = given_values(args, parser)
    _fill_in(args)
    tokenizer = find_tokenizer(args)
    vocab_size = max(args.vocab_size or 0, tokenizer.vocab_size)
    if args.vocab_size is not None and args.vocab_size < tokenizer.vocab_size:
        raise UserError(f"--vocab-size {args.vocab_size}: must be at least the tokenizer's {tokenizer.vocab_size}")
    if args.padded_vocab_size is None:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = pad_vocabulary(vocab_size, multiple)
    complete(args)
    config = run_config(args, parser, vocab_size)
    config = replace(config, training=replace(config.training, cross_entropy_fusion_impl=args.tst_loss))
    check_sizes(config)
    set_global_variables(args, build_tokenizer=False)
    return Run(args, config, tokenizer, device, libraries)


def _fill_in(args: Namespace) -> None:
    """Set arguments that Megatron-LM requires to the values that the own trainer would use."""
    args.tst_run_dir = args.tst_run_dir or args.save
    if args.tst_run_dir is None:
        raise UserError("--tst-run-dir None: must be given, or --save")
    if args.train_iters is None:
        raise UserError("--train-iters None: must be given")
    args.save = args.save or str(RunDirectory(Path(args.tst_run_dir)).checkpoints)
    args.save_interval = args.save_interval or args.train_iters
    # Learning rates follow from the current settings, as in the own trainer, so a prolonged run needs no extra flag.
    args.override_opt_param_scheduler = not args.use_checkpoint_opt_param_scheduler
    args.eval_interval = args.eval_interval or RunConfig().training.eval_interval
