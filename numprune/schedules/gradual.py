"""A callback for `transformers.Trainer` that removes units gradually during training."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from numprune.anatomy import read_anatomy
from numprune.axes import AXES, HIDDEN_SIZE
from numprune.blocks import Anatomy
from numprune.errors import InputError
from numprune.option_checks import check_options
from numprune.options import PruneOptions
from numprune.plans import Plan
from numprune.schedules.ramp import Ramp
from numprune.schedules.run import Run
from numprune.target import Target

logger = logging.getLogger(__name__)

Criterion = Literal["movement", "magnitude", "vib"]
Allocation = Literal["uniform", "global"]
WHOLE_UNITS = tuple(name for name, axis in AXES.items() if axis.part == "units")


class GradualPruning(TrainerCallback, ExportableState):
    """Removes KV groups, MLP channels and experts while `transformers.Trainer` trains.

    The removed share rises by the cubic schedule of Zhu and Gupta (arXiv 1710.01878). All units are ranked again each
    time, so a removed unit can come back. When training ends, the weights of the removed units are set to zero, and
    trained masks are multiplied into those of the others: `trainer.save_model` stores the trained model in the dense
    shapes, and `plan` cuts it.

    Its state is part of the Trainer's checkpoints, and `resume_from_checkpoint` continues from there.

    Args:
        ratio: share of the prunable parameters to remove.
        criterion: "movement", the sum of -w dL/dw over the steps (Sanh et al., NeurIPS 2020), or "magnitude", both over
            the weights that read a unit; "vib", masks with noise that are trained beside the weights on the same loss,
            as by `numprune learn`.
        allocation: "uniform" gives every layer the same sizes, "global" ranks the units of all layers together.
        begin: share of the training after which the first units are removed.
        end: share of the training after which the ratio is reached.
        every: update steps between removals.
        tolerance: how far the loss may exceed its lowest value, in its own unit. Beyond that, nothing is removed this
            time; beyond twice that, the last removal is undone. Postponed removals are made up until training ends.
            None: the loss has no influence.
        metric: the loss of `tolerance`: "loss", the mean training loss since the last removal, or a metric of
            `Trainer.evaluate` such as "eval_loss", which is then evaluated before each removal. Lower is better.
        axes: what may be removed, of "kv-groups", "channels" and "experts".
        keep: as in `PruneOptions`.
        floors: as in `PruneOptions`.
        target: the server's requirements on the sizes of the result.

    Raises:
        InputError: a value is invalid. Conflicts with the model, the Trainer's arguments or the checkpoint to resume
            from are refused when training begins.
    """

    def __init__(
        self,
        ratio: float,
        criterion: Criterion = "movement",
        *,
        allocation: Allocation = "uniform",
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 20,
        tolerance: float | None = None,
        metric: str = "loss",
        axes: Sequence[str] = WHOLE_UNITS,
        keep: Sequence[str] = (),
        floors: Mapping[str, float] | None = None,
        target: Target | None = None,
    ) -> None:
        for name, value, known in (
            ("criterion", criterion, get_args(Criterion)),
            ("allocation", allocation, get_args(Allocation)),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if not 0 < ratio < 1:
            raise InputError(f"ratio is {ratio}; it must be over 0 and under 1")
        if not 0 <= begin < end <= 1:
            raise InputError(f"begin is {begin} and end is {end}; they must be shares of the training, begin < end")
        if every < 1:
            raise InputError(f"every is {every}; it must be at least 1")
        if tolerance is not None and not 0 <= tolerance < float("inf"):
            raise InputError(f"tolerance is {tolerance}; it must be at least 0, and finite")
        if metric != "loss" and not metric.startswith("eval_"):
            raise InputError(
                f'metric is {metric!r}; it must be "loss" or a metric of the evaluation, such as eval_loss'
            )
        if metric != "loss" and tolerance is None:
            raise InputError(f"metric is {metric!r}, which nothing depends on without a tolerance; set one")
        if others := [name for name in axes if name in (*AXES, HIDDEN_SIZE) and name not in WHOLE_UNITS]:
            raise InputError(f"axes: only whole units can be removed; leave out {', '.join(others)}")
        self._options = PruneOptions(
            ratio, criterion, allocation, "none", target or Target(), tuple(axes), tuple(keep), dict(floors or {})
        )
        self._begin, self._end, self._every = begin, end, every
        self._tolerance, self._metric = tolerance, metric
        self._run: Run | None = None
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """The plan for pruning the trained model. Raises InputError until training has ended."""
        if self._plan is None:
            raise InputError("there is no plan yet: it is made when training ends")
        return self._plan

    def state(self) -> dict[str, Any]:
        """Return the state that the Trainer writes into a checkpoint."""
        return {"args": {}, "attributes": self._run.state() if self._run else {}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.restore_callback_states_from_checkpoint:
            raise InputError(
                "restore_callback_states_from_checkpoint would replace GradualPruning by another object; leave it out: "
                "the state is restored without it"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if self._run is not None:
            self._run.units.detach()  # of a training that did not end
        self._run = self._plan = None
        _check_model(model)
        anatomy = read_anatomy(model.config)
        self._check_arguments(args, anatomy)
        check_options(anatomy, self._options, planned=True)
        ramp = Ramp.of(state.max_steps, self._begin, self._end, self._every)
        settings = asdict(self._options) | {
            "begin": self._begin,
            "end": self._end,
            "every": self._every,
            "tolerance": self._tolerance,
            "metric": self._metric,
            "training steps": state.max_steps,
            "training seed": args.seed,
            "units": {block.name: block.units for block in anatomy.blocks},
        }
        layers = [model.get_submodule(path) for path in anatomy.layer_paths]
        run = Run(layers, anatomy, self._options, ramp, settings, state.max_steps, args.seed)
        if state.global_step:
            run.restore(self._stored(state), state.global_step)
        run.settle()
        run.units.attach()
        self._run = run

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._run is not None
        self._run.collect(state.global_step + 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._run is not None
        if self._run.waits_for_loss:
            raise InputError(f"metric is {self._metric!r}, and the evaluation did not give it")
        self._run.begin_step(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        run = self._run
        assert run is not None
        run.settle()
        self._log_before_saving(control)
        if not run.ramp.includes(state.global_step) or run.pace.done == run.ramp.times:
            return
        if self._tolerance is None:
            run.go_on(state.global_step)
            return
        run.waits_for_loss = True
        if self._metric == "loss":
            control.should_log = True
        else:
            control.should_evaluate = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log_before_saving(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        run = self._run
        if run is None or self._metric != "loss" or not logs or "loss" not in logs:
            return
        run.losses.add(logs["loss"], state.global_step)
        if run.waits_for_loss and self._tolerance is not None:
            run.judge(run.losses.take(), self._tolerance, state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        run = self._run
        if run and run.waits_for_loss and self._tolerance is not None and metrics and self._metric in metrics:
            run.judge(metrics[self._metric], self._tolerance, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self._run
        assert run is not None
        run.units.detach()
        run.units.fold()
        self._plan, self._run = run.plan(), None
        if run.pace.done < run.ramp.times:
            logger.warning(
                "training ended after %d of %d removals: %.1f %% of the prunable parameters are removed instead of "
                "%.1f %%",
                run.pace.done,
                run.ramp.times,
                100 * run.removed(),
                100 * self._options.ratio,
            )

    def _stored(self, state: TrainerState) -> Mapping[str, Any]:
        """Return this callback's state in the checkpoint to resume from. Raises InputError if there is none."""
        found = (state.stateful_callbacks or {}).get(type(self).__name__)
        if isinstance(found, list):
            raise InputError("callbacks: there are several GradualPruning; a Trainer can have one")
        if not found or not found["attributes"]:
            raise InputError(
                f"the checkpoint to resume from, of step {state.global_step}, was trained without GradualPruning; "
                "leave the callback out, or start again"
            )
        attributes: Mapping[str, Any] = found["attributes"]
        return attributes

    def _check_arguments(self, args: TrainingArguments, anatomy: Anatomy) -> None:
        if args.load_best_model_at_end:
            raise InputError(
                "load_best_model_at_end: the best step may come before units are removed; set it to False, and "
                "evaluate the result"
            )
        if args.fsdp or args.deepspeed:
            raise InputError("fsdp and deepspeed shard the weights that are pruned; train without them")
        if args.n_gpu > 1 and anatomy.of_kind("experts"):
            raise InputError(
                f"one process would train on {args.n_gpu} GPUs, which copies experts without their masks; start a "
                "process for each GPU with accelerate launch or torchrun"
            )
        if args.fp16 and self._options.criterion != "magnitude":
            raise InputError(
                f"fp16 scales the gradients that {self._options.criterion} uses; use bf16, or criterion magnitude"
            )
        if self._metric != "loss" and args.eval_strategy == "no":
            raise InputError(f"metric is {self._metric!r}, and eval_strategy is no; set it, and pass an eval_dataset")

    def _log_before_saving(self, control: TrainerControl) -> None:
        """Save the losses since the last log in the checkpoint, because a resuming Trainer starts counting again."""
        if control.should_save and self._tolerance is not None and self._metric == "loss":
            control.should_log = True


def _check_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"the model is a {type(model).__name__}; GradualPruning needs a model of transformers itself, without "
            "adapters around it"
        )
    if getattr(model.config, "quantization_config", None):
        raise InputError("the model is quantized; prune the unquantized checkpoint and quantize the result")
