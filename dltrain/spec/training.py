"""How it is trained: `batch`, `train`, `optim` and `engine` of a spec."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from dltrain.spec.base import Model

__all__ = ["BatchSpec", "BestSpec", "EngineSpec", "GroupSpec", "InitSpec", "OptimSpec", "TrainSpec"]

# Raw DeepSpeed keys that follow from the spec's own fields; a dot goes into a section.
_DEEPSPEED_OURS = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.micro",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "gradient_clipping": "optim.clip",
    "amp": "engine.precision",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "fp16.loss_scale": "engine.loss_scale",
    "zero_optimization.stage": "engine.zero",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "activation_checkpointing": "engine.activation_checkpointing",
    "zero_force_ds_cpu_optimizer": "optim.name",
}


class BatchSpec(Model):
    global_: int = Field(alias="global", ge=1)
    """Rows of one optimizer step over all workers."""
    micro: int | None = Field(default=None, ge=1)
    """Most rows of one forward pass on one worker; default: the worker's share of the global batch."""


class BestSpec(Model):
    metric: str = "loss"
    """A name that the task's `evaluate` returns."""
    mode: Literal["min", "max"] = "min"
    """Whether less or more is better."""


class InitSpec(Model):
    url: str
    """Weights to begin with: a safetensors file, a directory of them, or a run (its name or URL)."""
    step: str = "best"
    """Of a run: `best`, `newest` or a step."""
    strict: bool = True
    """Whether every parameter and buffer must be found, in its shape; else what is not found is said and left as
    `build` made it."""


class TrainSpec(Model):
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the training data. Give `epochs` or `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Give `epochs` or `steps`."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between evaluations; default: once an epoch. The end of the run is always evaluated."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the weights and of everything random in a step."""
    best: BestSpec = BestSpec()
    """Which evaluation is the best one; its checkpoint is kept."""
    early_stop: int | None = Field(default=None, ge=1)
    """Evaluations without a better one after which the run ends; default: never."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, per update; with it evaluation, `predict` and exports use
    the average. In the first updates it is less: (1 + n) / (10 + n) at most."""
    init_from: InitSpec | None = None
    """Weights to begin with, in place of those that `build` made; a URL or {url: ..., strict: false}."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, as patterns of their names: [embed.*, "*.bias"]."""
    compile: Literal[False, True, "default", "reduce-overhead", "max-autotune"] = False
    """torch.compile, and in which mode; the first steps take a minute or more."""
    deterministic: bool = False
    """Only operations of torch that give the same bits each time; those that can't raise an error."""

    @field_validator("init_from", mode="before")
    @classmethod
    def _url(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_end(self) -> TrainSpec:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else "both"
            raise ValueError(f"found {found} epochs and steps; give exactly one, it says when the run ends")
        return self


class GroupSpec(Model):
    match: tuple[str, ...]
    """Patterns of parameters' names, as in [embed.*, head.weight]; of several groups that match the first counts."""
    lr_scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Their learning rate is this times the schedule's."""
    weight_decay: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Their decay, biases and norms included; default: as everywhere."""

    @field_validator("match", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class OptimSpec(Model):
    name: Literal["adamw", "adam", "sgd", "lion", "task"] = "adamw"
    """The optimizer; `task`: the one that the task's `optimizer` makes."""
    lr: float = Field(gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Decoupled for adamw and lion, L2 for adam and sgd; not applied to biases and norms (one dimension)."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments; default: 0.9 and 0.999, for lion 0.9 and 0.99."""
    eps: float = Field(default=1e-8, gt=0)
    """adamw's and adam's epsilon."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """sgd's momentum."""
    nesterov: bool = False
    """sgd with Nesterov's momentum."""
    fused: bool | None = None
    """One kernel for the whole update, of adamw, adam and sgd; default: on GPUs, and for an offloaded optimizer."""
    groups: tuple[GroupSpec, ...] = ()
    """Parameters with a learning rate or a decay of their own."""
    schedule: Literal["constant", "cosine", "linear", "wsd", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up. constant: flat; cosine, linear: down to `final` at the run's last step; wsd:
    flat, then linear in the last `decay` of the run; inverse_sqrt: falls with the root of the step."""
    warmup: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """wsd: the share of the run's steps in which the rate falls."""
    final: float = Field(default=0.0, ge=0, le=1)
    """What cosine, linear and wsd end at, as a share of `lr`."""
    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest global gradient norm; default: no clipping."""
    networks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Where a task has several networks: name -> what is different for it, as in {discriminator: {lr: 1.0e-4}}."""

    @model_validator(mode="after")
    def _networks(self) -> OptimSpec:
        for name, changes in self.networks.items():
            if "networks" in changes:
                raise ValueError(f"networks.{name}: found networks within; give its settings directly")
            try:
                self.of(name)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ValueError(f"networks.{name}.{where}: found {first['input']!r}; {first['msg']}") from None
        return self

    def of(self, network: str) -> OptimSpec:
        """The settings of one network."""
        if network not in self.networks:
            return self
        return OptimSpec.model_validate({**self.model_dump(exclude={"networks"}), **self.networks[network]})

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float] | None) -> tuple[float, float] | None:
        if betas and not all(0 <= beta < 1 for beta in betas):
            raise ValueError("both must be >= 0 and < 1")
        return betas

    @model_validator(mode="after")
    def _momentum(self) -> OptimSpec:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: found true with momentum 0; set momentum, 0.9 for example")
        if self.fused and self.name in ("lion", "task"):
            raise ValueError(f"fused: found true with {self.name}; adamw, adam and sgd have fused kernels")
        return self


class EngineSpec(Model):
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over workers (0 nothing, 1 optimizer, 2 + gradients, 3 + weights)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward; the master weights are fp32 in any case."""
    loss_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """fp16: a fixed factor of the loss; default: found while training, halved at an overflow and doubled after a time
    without."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Kept in the host's memory instead of the GPU's: the optimizer's state (ZeRO 1-3), or the weights too (ZeRO 3)."""
    activation_checkpointing: tuple[str, ...] = ()
    """Modules whose activations are computed again in the backward pass instead of kept, as patterns of their names or
    names of their classes: [blocks.*] or [Block]."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys, merged into the generated JSON last."""

    @field_validator("deepspeed")
    @classmethod
    def _ours(cls, raw: dict[str, Any]) -> dict[str, Any]:
        found = [f"{name} (set {ours})" for name, ours in _DEEPSPEED_OURS.items() if _has(raw, name.split("."))]
        if found:
            raise ValueError(f"found {', '.join(found)}; these are derived from the spec's own fields")
        return raw

    @model_validator(mode="after")
    def _together(self) -> EngineSpec:
        if self.offload == "optimizer" and self.zero == 0:
            raise ValueError("offload: found optimizer with zero 0; offloading needs zero 1, 2 or 3")
        if self.offload == "all" and self.zero != 3:
            raise ValueError(f"offload: found all with zero {self.zero}; weights are offloaded with zero 3")
        if self.loss_scale is not None and self.precision != "fp16":
            raise ValueError(f"loss_scale: found {self.loss_scale:g} with {self.precision}; only fp16 needs one")
        return self


def _has(raw: Any, keys: list[str]) -> bool:
    head, *rest = keys
    if not isinstance(raw, dict) or head not in raw:
        return False
    return _has(raw[head], rest) if rest else True
