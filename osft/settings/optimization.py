"""What a user sets of the optimization, and of what holds the model's predictions where they were."""

from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from osft.settings import schedule
from osft.settings.base import Settings
from osft.settings.values import Boolean, Integer, Number, Numbers, Text

if TYPE_CHECKING:
    from torch.optim import Optimizer

DEFAULT_STIFFNESS = 10_000.0


class OptimizationSettings(Settings):
    """How the coefficients are learned."""

    model_config = ConfigDict(title="Optimization")

    effective_batch_size: Annotated[Integer, Field(ge=1)]
    """Samples per optimizer step, over all processes and accumulation steps."""

    max_tokens_per_gpu: Annotated[Integer, Field(ge=1)]
    """Hard bound on the tokens of one micro-batch of one process. The way to less memory, with no effect on the
    result: more micro-batches make up a step."""

    learning_rate: Annotated[Number, Field(ge=0.0)]
    """Peak learning rate of AdamW."""

    num_epochs: Annotated[Integer, Field(ge=1)] = 1
    """Passes over the training set."""

    max_steps: Annotated[Integer | None, Field(ge=1)] = None
    """Stop after this many optimizer steps, whatever num_epochs says."""

    lr_scheduler: Text = "cosine"
    """A learning-rate schedule by its name in `transformers` (`SchedulerType`): cosine, linear, constant,
    cosine_with_min_lr, …"""

    warmup_steps: Annotated[Integer, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0 to its peak."""

    lr_scheduler_kwargs: Annotated[dict[str, Any], AfterValidator(schedule.plain)] = {}  # noqa: RUF012 (pydantic copies it)
    """More arguments of the schedule, such as {"min_lr": "1e-6"}. Strings that are numbers, true or false become
    those."""

    weight_decay: Annotated[Number, Field(ge=0.0)] = 0.0
    """Decoupled weight decay of AdamW. It acts on the update, not on the model: it pulls back to the base model."""

    beta1: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.9
    """AdamW's decay of the gradient's first moment."""

    beta2: Annotated[Number, Field(ge=0.0, le=1.0)] = 0.95
    """AdamW's decay of the gradient's second moment."""

    eps: Annotated[Number, Field(ge=0.0)] = 1e-8
    """AdamW's term for numerical stability."""

    stiffness: Annotated[Number, Field(ge=0.0)] = DEFAULT_STIFFNESS
    """With protect="activations": how much the free directions are held back, each by the energy that it carries. After
    each optimizer step a coefficient of direction j is divided by 1 + learning_rate * stiffness * c_j, with c_j its
    curvature as a multiple of the model's mean and in units of the weights' size, so that one value serves all models:
    a direction of mean curvature can move a weight by about 1 / stiffness of its size. The mean is over all that is
    protected, which shares it: a later round learns as easily as the first. 0: not at all. The default was best of
    1,000, 3,000, 10,000 and 30,000 in benchmarks/results/frontier_cuda.md, and the optimum is broad."""

    max_grad_norm: Annotated[Number, Field(ge=0.0)] = 1.0
    """Clip the gradient's global 2-norm to this; 0 turns clipping off."""

    seed: Annotated[Integer, Field(ge=0)] = 42
    """Seed of the sample order. The same seed on the same machine gives the same losses, bit for bit on a CPU and, with
    deterministic, on CUDA. Dropout is off: with it the losses would depend on how the work is cut."""

    deterministic: Boolean = False
    """On CUDA, use algorithms that give the same result twice, where there are such; they are slower. Without, two runs
    differ in the last digits. A CPU's always do."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        schedule.check(
            self.lr_scheduler,
            self.lr_scheduler_kwargs,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
        )
        return self

    def make_scheduler(self, optimizer: "Optimizer", *, num_training_steps: int) -> Any:
        """The learning-rate schedule of these settings."""
        return schedule.make(
            self.lr_scheduler,
            self.lr_scheduler_kwargs,
            optimizer,
            warmup_steps=self.warmup_steps,
            num_training_steps=num_training_steps,
        )


class DriftSettings(Settings):
    """What holds the model's predictions where they were, beside the split."""

    model_config = ConfigDict(title="Drift")

    distill_weight: Annotated[Number, Field(ge=0.0)] = 0.0
    """Weight of self-distillation: adds distill_weight * KL(start || current), in nats per token of text that the model
    wrote itself before it was trained, to the loss. It needs no old data. 0: none."""

    distill_tokens: Annotated[Integer, Field(ge=2)] = 64
    """With distill_weight: tokens of that text in an optimizer step. Their share of a step's tokens is about what
    distillation costs in time."""

    fit_step: Boolean = False
    """When training ends, try the update at each of step_scales, with the exact weights, and write the model with the
    largest gain whose drift is at most max_step_drift (osft/training/fitting.py). The gain is measured on
    selection_samples training samples that are held out for it, the drift on text that the model wrote itself."""

    step_scales: Numbers = [0.25, 0.5, 0.75, 1.0]  # noqa: RUF012 (pydantic copies it)
    """With fit_step: the factors of the update that are tried, each in (0, 1]."""

    max_step_drift: Annotated[Number, Field(ge=0.0)] = 0.05
    """With fit_step: the most that the model may move, as KL(start || tuned) in nats per token."""

    selection_samples: Annotated[Integer, Field(ge=16)] = 64
    """With fit_step: training samples that are held out for it, by the hash of their prompt: at most a tenth of them,
    but 16 at least. Training, validation and evaluation do not use them."""

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if not self.step_scales or not all(0 < scale <= 1 for scale in self.step_scales):
            raise ValueError(f"step_scales must be factors in (0, 1], such as [0.5, 1.0], got {self.step_scales}")
        return self
