"""The sections of a recipe: what may be written in each, and what every key means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_serializer,
)

from distrain.config.durations import Duration
from distrain.config.values import (
    WHOLE,
    BatchSize,
    ByName,
    ComponentName,
    Count,
    Interval,
    NotNegative,
    OnOff,
    Positive,
    Share,
    Text,
    Time,
    TrainingInterval,
    object_spec,
)


def _kind_of_split(value: Any) -> str | None:
    if isinstance(value, FoldSplit) or (isinstance(value, dict) and value.keys() & {"fold", "of"}):
        return "<fold>"
    return "<fractions>" if isinstance(value, list) else "<files>" if isinstance(value, dict) else None


# --------------------------------------------------------------------------------------------------------------------
# The sections


class Section(BaseModel):
    """A mapping of the recipe with known keys."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        populate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
    )


class Component(Section):
    """Something built by name: a bare name, or a mapping of `name` and its arguments."""

    model_config = ConfigDict(extra="allow")
    name: ComponentName
    """A name from `distrain list`, `package.module:name`, or `path/to/file.py:name`."""

    @property
    def args(self) -> dict[str, Any]:
        """The keys besides those of the section itself."""
        return dict(self.model_extra or {})

    @model_serializer(mode="wrap")
    def _shortest(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        return self.name if type(self) is Component and not self.model_extra else handler(self)


ComponentField = Annotated[Component, ByName()]


class FoldSplit(Section):
    """Fold `fold` of `of` is held out for testing, the rest is for training (cross-validation)."""

    fold: Count
    """Which fold is held out, from 1."""
    of: Annotated[int, Field(ge=2, le=10**6), WHOLE]
    """How many folds the data is cut into."""


class TransformsSection(Section):
    """Transforms of the inputs, by their torchvision v2 names with their arguments."""

    train: list[ComponentField] = []
    """For the training split; random ones depend on (seed, epoch, sample id) alone."""
    eval: list[ComponentField] = []
    """For evaluation and prediction."""


SplitPlace = Annotated[Text, Field(description="The split's folder or file, or the argument that your own data gets.")]
Split = Annotated[
    Annotated[list[Positive], Tag("<fractions>")]
    | Annotated[FoldSplit, Tag("<fold>")]
    | Annotated[dict[Literal["train", "valid", "test"], SplitPlace], Tag("<files>")],
    Discriminator(_kind_of_split),
]


MIXES = ("mixup", "cutmix")


class MixSection(Section):
    """How samples are mixed in pairs."""

    alpha: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """The factor of a sample is drawn from the beta distribution (alpha, alpha); 1 is uniform."""
    prob: Share | None = None
    """Share of the samples that is mixed; None is all, or half of them where mixup and cutmix are both given."""


class DataSection(Component):
    """The data set, how it is split and how it is read. Further keys are arguments of the data set."""

    path: Text | None = None
    """A file or folder, relative to the recipe's folder."""
    split: Annotated[
        Split | None,
        Field(title="fractions as [0.8, 0.2], {fold: 1, of: 5}, {train: PATH, test: PATH}, or null"),
    ] = None
    """Fractions for [train, test] or [train, valid, test]; {fold, of}; or the folder or file of each split.
    None: the data set's default."""
    stratify: bool = False
    """Keep the share of each class the same in every split of fractions or folds."""
    transforms: TransformsSection = TransformsSection()
    """Transforms of the inputs."""
    workers: Annotated[int, Field(ge=0, le=256), WHOLE] = 0
    """Loader processes for each training process; 0 loads in the training process itself."""
    skip_corrupt: Annotated[int, Field(ge=0), WHOLE] = 0
    """The number of corrupt samples of a split that are skipped and counted. One more is an error."""
    fingerprint: Literal["auto", "full", "off"] = "auto"
    """How a resume or an evaluation recognises the data: auto by the names, sizes and a cheap sample of the files, full
    by their entire content; off does not check."""
    prepare: Annotated[Text, AfterValidator(object_spec)] | None = None
    """`path/to/file.py:name` of a function that rank 0 calls with `path` if nothing exists there."""
    mixup: MixSection | None = None
    """Mixes training samples with others: `factor * one + (1 - factor) * other`, inputs and targets."""
    cutmix: MixSection | None = None
    """Replaces a rectangle of a training image by that of another one, and mixes the targets by its area."""

    @model_serializer(mode="wrap")
    def _shortest(self, handler: Callable[[Any], dict[str, Any]]) -> Any:
        # recipes stored without these keys stay equal
        return {key: value for key, value in handler(self).items() if value is not None or key not in MIXES}


class LoraSection(Section):
    """Trains low-rank adapters beside layers of the model, which is frozen itself."""

    r: Annotated[int, Field(ge=1, le=2**16), WHOLE] = 8
    """The rank: each adapter is the product of two matrices with `r` columns and `r` rows."""
    alpha: Positive = 16.0
    """What an adapter gives is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are dropped in training; those of embeddings are kept."""
    targets: Annotated[Literal["all-linear"] | list[Text], Field(title="all-linear, or a list of names")] = "all-linear"
    """The layers with adapters: their names, the ends of names such as q_proj, or shell patterns; linear layers,
    embeddings and convolutions. all-linear: every linear layer but the one that makes a language model's logits."""
    train: list[Text] = []
    """Shell patterns over parameter names that are trained in full besides, such as 'classifier.*' for a new head."""
    bits: Literal[4, 8] | None = None
    """Keeps the frozen weights of the linear layers with adapters in 4 bits (NF4) or 8, by bitsandbytes (QLoRA)."""

    @model_serializer(mode="wrap")
    def _without_bits(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = handler(self)
        if self.bits is None:
            values.pop("bits", None)  # recipes stored without the key stay equal
        return values


class ModelSection(Component):
    """The model. Further keys are arguments of its class or function."""

    weights: Text | None = None
    """A local .safetensors or .pt state dict to start from, relative to the recipe's folder."""
    weights_strict: bool = True
    """Whether `weights` must hold exactly the model's tensors; otherwise matching ones are loaded, the rest listed."""
    lora: LoraSection | None = None
    """Low-rank adapters (LoRA) to train in place of the model; `lora: {}` takes the defaults."""

    @model_serializer(mode="wrap")
    def _without_lora(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = handler(self)
        if self.lora is None:
            values.pop("lora", None)  # recipes stored without the key stay equal
        return values


class BatchSection(Section):
    """Batch sizes in samples. Accumulation follows: global / (micro * processes)."""

    # not `alias`: type checkers would want BatchSection(global=...), which is not Python
    global_batch_size: BatchSize = Field(validation_alias="global", serialization_alias="global")
    """Samples in one optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: BatchSize | Literal["auto"] = Field(
        default="auto", validation_alias="micro", serialization_alias="micro"
    )
    """Samples in one forward pass of one process; auto finds the largest that fits, at most global / processes."""


LENGTHS = ("epochs", "steps", "tokens")


class ProfileSection(Section):
    """Has torch.profiler watch a few steps."""

    at: Count
    """The first step that is watched, from 1."""
    steps: Annotated[int, Field(ge=1, le=1000), WHOLE] = 5
    """How many are watched."""
    ranks: Literal["first", "all"] = "first"
    """Whose traces are written: those of rank 0, or of all ranks."""


class CompileSection(Section):
    """How torch.compile is called."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """What is paid for faster kernels: reduce-overhead records CUDA graphs, and max-autotune tries kernels out, for
    minutes."""
    fullgraph: bool = False
    """Whether it is an error that a part cannot be compiled; otherwise that part runs as it is."""
    dynamic: OnOff = "auto"
    """Whether code is compiled for sizes that vary; auto does so once a second size comes."""
    backend: Text = "inductor"
    """The compiler, by the name that torch knows it by."""


AnyCompile = Annotated[
    Annotated[OnOff, Tag("<word>")] | Annotated[CompileSection, Tag("<mapping>")],
    Discriminator(lambda value: "<mapping>" if isinstance(value, dict | CompileSection) else "<word>"),
]


class TrainSection(Section):
    """Length and precision of training. Exactly one of epochs, steps and tokens."""

    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Passes over the training split."""
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Annotated[int, Field(ge=1, le=10**18), WHOLE] | None = None
    """Tokens, for samples of a fixed length."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "fp8", "fp64"] = "auto"
    """Precision of the forward pass: auto is bf16 on GPUs that support it and fp32 elsewhere. Weights, optimizer state
    and gradient reductions are always fp32 (fp64 with fp64)."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights; evaluations, predictions and the export at a run's
    end use the average, and `distrain export` with --ema."""
    deterministic: bool | Literal["auto"] = "auto"
    """Whether only deterministic operations are allowed, which slows steps on GPUs; CPUs are always deterministic. auto
    is true in `distrain prove` and false elsewhere."""
    compile: AnyCompile = False
    """Whether the model and its loss are compiled together, with torch.compile. auto does so on a GPU that it has a
    compiler for, and runs what cannot be compiled as it is, with a warning; a mapping says how."""
    activation_checkpointing: bool | Text = False
    """Whether each block of the model keeps only its inputs and recomputes its activations in the backward pass: less
    memory for about a third more time, and the same numbers. A class name makes its instances the blocks."""
    profile: ProfileSection | None = None
    """Steps that are profiled: RUN/profile/ then has a trace for Perfetto and a table of the dearest operations."""

    @model_serializer(mode="wrap")
    def _without_profile(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = handler(self)
        if self.profile is None:
            values.pop("profile", None)  # recipes stored without the key stay equal
        return values

    @property
    def length(self) -> Duration:
        """The length of training as a duration."""
        for unit in LENGTHS:
            if (amount := getattr(self, unit)) is not None:
                return Duration(float(amount), unit)
        raise AssertionError("a recipe is validated to have one of them")


class TuneSection(Section):
    """Optimisations of speed. Each is `auto`, true or false; auto takes it where it pays and works.

    What each came to and why is in the banner and in effect.json. A key that is true where it cannot work is refused.
    """

    channels_last: OnOff = "auto"
    """Images and the weights of Conv2d with the channels last in memory, as tensor cores take them; auto: on a GPU
    under single and ddp, where the model, tried once, computes with it. Under a strategy that shards, true lays out the
    images alone. Checkpoints and exports do not change."""
    cudnn_benchmark: OnOff = "auto"
    """cuDNN tries its algorithms with each new shape and keeps the fastest, which takes seconds; auto: on a GPU where
    shapes are fixed and convolutions are not channels_last in bf16 or fp16, for which its first choice is as fast."""
    uint8_inputs: OnOff = "auto"
    """Images are sent to the GPU as bytes, and scaled and normalised there, where data.transforms end so; auto: on a
    GPU. The same numbers."""
    copy_stream: OnOff = "auto"
    """Batches of 1 MiB or more are copied to the GPU on a stream of their own, beside the step before; auto: on a
    GPU."""
    fused_optimizer: OnOff = "auto"
    """The optimizer's step as one kernel for all parameters, where its class has that; auto: Adam and AdamW, and on a
    GPU SGD. Others take torch's foreach kernels, a few for all parameters."""
    flash_attention: OnOff = "auto"
    """Whether scaled_dot_product_attention takes a kernel that holds no matrix of weights; auto: wherever torch has one
    for its inputs. true: an attention for which it has none is an error."""
    chunked_loss: OnOff = "auto"
    """The cross entropy of a language model in chunks of tokens, each with its part of the last layer, so that its
    logits are never whole; auto: where a micro-batch has more than 2^24 of them and the model's last layer is known."""
    tf32: OnOff = "auto"
    """Products of fp32 tensors in TF32 on tensor cores, ten bits of the mantissa; auto: for what stays fp32 under bf16,
    fp16 and fp8. Never under fp32 unless it is true."""
    cast_before_gather: OnOff = "auto"
    """fsdp2 casts weights before it gathers them (to bf16 or fp16) where the forward pass does nothing else with them:
    half the traffic and the same bits; auto: with autocast."""
    cast_before_reduce: OnOff = "auto"
    """fsdp2 reduces gradients in bf16: half the traffic, for sums of eight bits; auto: never."""
    prefetch: OnOff = "auto"
    """fsdp2 gathers a block's weights while the block before computes, for the memory of one more; auto: on GPUs."""
    reduce_every_micro: OnOff = "auto"
    """fsdp2 reduces gradients with each accumulated micro-batch, and not with the last of a step alone; auto: where
    whole gradients take more than 4 GiB, or weights are offloaded."""


class EarlyStopSection(Section):
    """Ends training when eval.best has not improved."""

    patience: Count
    """Evaluations without improvement before the run stops."""
    min_delta: NotNegative = 0.0
    """The least change that counts as an improvement."""


class EvalSection(Section):
    """When and how the model is evaluated: on the split `valid` if there is one, otherwise on `test`."""

    every: TrainingInterval | None = Duration(1, "epochs")
    """How often; None evaluates only at the end."""
    metrics: list[ComponentField] | None = None
    """Metrics by name beside the loss; None takes the usual ones of the task."""
    best: Text | None = None
    """The metric that decides which checkpoint is best, such as accuracy or -loss; None takes the loss."""
    batch: BatchSize | None = None
    """Samples in one forward pass of one process; None takes the micro batch size, or fewer where tune.chunked_loss is
    on and they would have more than 2^28 logits."""
    early_stop: EarlyStopSection | None = None
    """When to stop early; None trains to the end."""
    samples: Annotated[int, Field(ge=0, le=1024), WHOLE] = 0
    """How many samples are shown after each evaluation with what is predicted for them: pictures, tables or texts, in
    RUN/media and in every tracker."""

    @model_serializer(mode="wrap")
    def _without_samples(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # recipes stored without the key stay equal
        return {key: value for key, value in handler(self).items() if key != "samples" or value}


class CheckpointSection(Section):
    """When checkpoints are saved and which are kept."""

    every: Interval | None = Duration(10, "%")
    """How often, in training or in time; None saves only at the end."""
    keep: Count = 3
    """How many of the newest to keep."""
    keep_best: Annotated[int, Field(ge=0, le=10**12), WHOLE] = 1
    """How many of the best by eval.best to keep besides."""
    asynchronous: bool = Field(default=True, validation_alias="async", serialization_alias="async")
    """Whether files are written while training continues, from a copy in memory."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written, as on a full disk; the last one of an attempt must succeed."""
    frozen: Literal["auto", "reference", "store"] = "auto"
    """Whether checkpoints hold the weights that are not trained, or their hashes alone and where they come from: the
    initial weights, which whoever opens the checkpoint then needs. auto: reference where model.lora adapts weights from
    a file or folder, store elsewhere."""

    @model_serializer(mode="wrap")
    def _without_frozen(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # recipes stored without the key stay equal
        return {key: value for key, value in handler(self).items() if key != "frozen" or value != "auto"}


OnAnomaly = Literal["stop", "skip", "rollback"]


class AnomaliesSection(Section):
    """What to do about a step whose loss or gradient norm is NaN, infinite, or spikes.

    `stop` ends the run with its last checkpoint unchanged. `skip` consumes the step's samples and leaves the model and
    the optimizer unchanged. `rollback` returns to the newest checkpoint, and then skips the step.
    """

    nonfinite: OnAnomaly = "stop"
    """If the loss or gradient norm is NaN or infinite."""
    spike: OnAnomaly | None = None
    """If one of them exceeds `factor` times its median over `window` steps; None does not check."""
    factor: Annotated[float, Field(gt=1, le=1e18)] = 10.0
    """The multiple of the median that is a spike."""
    window: Annotated[int, Field(ge=2, le=10**4), WHOLE] = 50
    """Steps of the median, and of the limit `max_skips`."""
    max_skips: Annotated[int, Field(ge=1, le=10**4), WHOLE] = 5
    """How many of `window` consecutive steps may be skipped; one more stops the run."""

    @property
    def skips(self) -> bool:
        """Whether a step can be skipped."""
        return bool({self.nonfinite, self.spike} & {"skip", "rollback"})

    @property
    def unused(self) -> list[str]:
        """The keys that have no effect."""
        unused = ([] if self.skips else ["max_skips"]) + ([] if self.spike is not None else ["factor"])
        return [*unused, "window"] if len(unused) == 2 else unused

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.unused}


class WatchdogSection(Section):
    """Timeouts without progress after which a rank counts as hung; the run aborts and names the rank."""

    setup: Time | None = Duration(30, "minutes")
    """In one part of the set-up, or the first step, which may compile; None waits forever."""
    step: Time | None = Duration(10, "minutes")
    """In a part of a step: data loading, a forward or backward pass, the optimizer; or in a callback."""
    save: Time | None = Duration(30, "minutes")
    """In writing 16 MB of a checkpoint, or in putting it in its place."""
    evaluate: Time | None = Duration(10, "minutes")
    """In one batch of an evaluation, or in its metrics."""

    @property
    def collectives_s(self) -> float:
        """Timeout of collectives in seconds: longer than every limit here, so that the limit reports first."""
        limits = [each.seconds for each in (self.setup, self.step, self.save, self.evaluate) if each is not None]
        longest = max((each for each in limits if each is not None), default=0.0)
        return longest + 300.0 if len(limits) == 4 else max(longest + 300.0, 24 * 3600.0)


class LogSection(Section):
    """Trackers besides metrics.jsonl."""

    every: Interval = Duration(10, "steps")
    """How often a row of training metrics is written."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: not at all, to local files, or to the service."""
    project: Text = "distrain"
    """The Weights & Biases project."""
    tensorboard: bool = False
    """Whether TensorBoard event files are written."""
    trackers: list[ComponentField] = []
    """Further trackers, each with its arguments: mlflow, trackio, and your own."""
    artifacts: Literal["none", "export", "checkpoints"] = "none"
    """What wandb, MLflow and trackio keep of a finished run: the exported model, or its best and last checkpoint
    besides."""
    gpu_hour_price: Positive | None = None
    """What an hour of one GPU costs, in any currency: `distrain status` then says what the run has cost."""
    peak_tflops: Positive | None = None
    """What one device computes at most in train.precision, in 10^12 operations per second, for the `mfu` of training
    rows; None is what its data sheet says, for GPUs that distrain knows."""
    report: bool = False
    """Whether the run folder gets report.html at the end, and after a stop that no queue resumes; what
    `distrain report` writes."""

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        # recipes stored without these keys stay equal
        later: dict[str, Any] = {"trackers": [], "artifacts": "none", "gpu_hour_price": None, "peak_tflops": None}
        later["report"] = False
        return {key: value for key, value in handler(self).items() if key not in later or value != later[key]}
