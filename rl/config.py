"""This file declares every knob of a run: strict, frozen, with units in the names and cross-field checks.

`rl/config_loading.py` reads YAML and overrides into `RunConfig`. What can be derived is not asked: see the properties.
"""

from __future__ import annotations

import shutil
from typing import Any, Literal

from pydantic import Field, model_validator

from rl.algorithm_config import AlgorithmSection, refusals
from rl.curriculum_config import CurriculumSection
from rl.section import Section
from rl.source_config import Source
from rl.trajectory import OVERLONG

BYTES_PER_TOKEN = 10  # at least: a 64-bit log-probability with its tag, and a token id


class RunSection(Section):
    """Which run this is, and how long it goes on."""

    name: str = Field(
        default="run", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_-]{0,40}$", description="first part of the run id"
    )
    seed: int = Field(default=0, ge=0, description="decides draws, sampling and shuffling")
    steps: int = Field(ge=1, description="optimizer steps, in all")
    dir: str = Field(default="runs", description="folder that holds the run directories")


class ModelSection(Section):
    """The policy and where it computes."""

    path: str = Field(min_length=1, description="Hugging Face id, directory, or gguf:<python package>/<file>")
    max_context_tokens: int = Field(default=512, ge=16, description="prompt and completion together, per sequence")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto takes cuda where an NVIDIA driver answers"
    )
    system_prompt: str | None = Field(default=None, description="a system message put before every prompt")
    head_dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="in which engine and learner multiply by the output head"
    )


class RewardFunction(Section):
    """One reward of the weighted sum."""

    use: str = Field(description="a registered name, module:function, or path/to/file.py:function")
    weight: float = Field(default=1.0, description="factor in the sum of a trajectory's reward")
    sources: tuple[str, ...] | None = Field(default=None, description="sources it judges; null for all")
    timeout_s: float = Field(
        default=10.0, gt=0, description="seconds of execution per completion before the child is killed"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the function")


class Overlong(Section):
    """A penalty that grows over the last tokens before rollout.max_tokens. DAPO, arXiv 2503.14476."""

    soft_tokens: int = Field(ge=1, description="tokens before the limit over which it grows from 0 to 1")
    weight: float = Field(default=1.0, gt=0, description="what a completion at the limit loses")


class RewardsSection(Section):
    """What a good answer is."""

    functions: dict[str, RewardFunction] = Field(min_length=1, description="reward part name -> function")
    workers: int = Field(default=1, ge=1, description="child processes that judge, per generator")
    max_failure_fraction: float = Field(
        default=0.2, ge=0, le=1, description="above this share of failures the run stops"
    )
    overlong: Overlong | None = Field(default=None, description="a penalty for nearly too long answers; null for none")


class RolloutSection(Section):
    """How a group is sampled."""

    group_size: int = Field(default=8, ge=1, description="completions per prompt")
    max_tokens: int = Field(default=48, ge=1, description="longest completion, in tokens")
    temperature: float = Field(
        default=1.0, gt=0, description="sampling temperature; the learner's logits are scaled alike"
    )
    first_answers: int | None = Field(
        default=None, ge=2, description="sample so many first, and the rest only if their rewards differ; null: all"
    )
    long_tail: Literal["continue", "drop"] = Field(
        default="continue", description="a group too old to be trained by now: finish it, or drop it where it stands"
    )
    order: Literal["arrival", "longest_first"] = Field(
        default="arrival", description="what an engine starts first of what waits: longest_first by believed length"
    )
    zero_advantage: Literal["drop", "keep"] = Field(
        default="drop", description="a group of equal rewards: leave it out, or let it count in its batch"
    )


class Guardrail(Section):
    """What is done about a metric that leaves its bounds."""

    metric: str = Field(description="a metric of each step, such as policy/effective_sample_fraction")
    above: float | None = Field(default=None, description="acts where the metric is above; give this or below")
    below: float | None = Field(default=None, description="acts where the metric is below")
    steps: int = Field(default=1, ge=1, description="steps in a row that it must be out of bounds")
    action: Literal["tighten_gate", "lower_step", "skip_step", "stop"] = Field(
        description="one version less of lag, a smaller step, no step, or the end of the run"
    )
    factor: float = Field(default=0.5, gt=0, lt=1, description="of lower_step: what is left of the learning rate")
    hold_steps: int = Field(default=10, ge=1, description="of tighten_gate: steps in bounds before one version returns")

    @model_validator(mode="after")
    def _has_one_bound(self) -> Guardrail:
        if (self.above is None) == (self.below is None):
            raise ValueError(f"a guardrail on {self.metric} needs exactly one of above and below")
        return self


class StalenessSection(Section):
    """How far behind a trajectory's policy may be."""

    max_lag: int = Field(default=2, ge=0, description="policy versions; 0 is exactly the synchronous loop")
    guardrails: dict[str, Guardrail] = Field(
        default_factory=dict, description="name -> what is done when a metric leaves its bounds"
    )


class LearnerSection(Section):
    """How the policy is optimised."""

    ranks: int = Field(default=1, ge=1, description="FSDP2 processes")
    groups_per_step: int = Field(default=8, ge=1, description="groups in one optimizer step")
    micro_batch_tokens: int = Field(default=2048, ge=16, description="padded tokens of one forward pass, per rank")
    packing: Literal["shared_prefix", "per_answer"] = Field(
        default="shared_prefix",
        description="a group's prompt computed once, or with every answer, for models that cannot take the mask",
    )
    checkpoint_activations: bool = Field(
        default=False, description="compute a block's activations again in backward: less memory, a third more work"
    )
    compile: bool = Field(default=False, description="torch.compile each block; pays on CUDA")
    lr: float = Field(default=1e-5, ge=0, description="AdamW learning rate after warm-up")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW moment decays")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW decoupled decay")
    max_grad_norm: float = Field(default=1.0, gt=0, description="global norm above which gradients are scaled down")
    compute_dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="of forward and backward")
    threads_per_rank: int | None = Field(default=None, ge=1, description="CPU threads; null shares the cores out")
    max_restarts: int = Field(default=3, ge=0, description="restarts in a row without a new step before the run fails")
    max_logprob_gap: float = Field(
        default=0.05, gt=0, description="largest mean |gap| to the engine before step 1, nats"
    )


class GeneratorsSection(Section):
    """How many engines sample, and how each is built."""

    count: int = Field(default=1, ge=1, description="engines, one Ray actor each")
    max_sequences: int = Field(default=64, ge=1, description="sequences that one engine decodes together")
    tensor_parallel: int = Field(default=1, ge=1, description="devices per engine")
    kv_cache_gib: float = Field(default=1.0, gt=0, description="cache for keys and values on CPU, in GiB")
    gpu_memory_fraction: float = Field(default=0.85, gt=0, le=1, description="share of a GPU that an engine takes")
    threads: int | None = Field(default=None, ge=1, description="CPU threads per engine; null shares the cores out")
    max_restarts: int = Field(
        default=3, ge=0, description="restarts in a row without a finished group before a generator is quarantined"
    )


class BufferSection(Section):
    """Where trajectories wait."""

    redis: str | None = Field(
        default=None, description="redis://, rediss:// or redis+sentinel:// URL; null starts an embedded server"
    )
    max_bytes: int = Field(default=1 << 30, ge=1 << 16, description="payload bytes above which admission pauses")
    max_groups: int = Field(default=1 << 16, ge=1, description="waiting groups above which admission pauses")
    reconnect_deadline_s: float = Field(
        default=60.0, ge=0, description="how long a lost Redis is awaited before the run stops, resumably"
    )


class WeightsSection(Section):
    """How a new policy version reaches the generators."""

    backend: Literal["auto", "shared_memory", "nccl"] = Field(default="auto", description="auto: nccl on cuda")
    transport: Literal["auto", "dense", "delta"] = Field(
        default="auto", description="all weights, or those whose bits changed; auto takes the smaller"
    )
    every_steps: int = Field(default=1, ge=1, description="optimizer steps between deliveries; lag counts all steps")
    max_canary_gap: float = Field(
        default=0.25, gt=0, description="largest mean |gap| on the canary after an update, nats"
    )


class EvaluationSection(Section):
    """Held-out accuracy, greedy by default."""

    every_steps: int = Field(default=10, ge=1, description="steps between evaluations; also before and after the run")
    prompts_per_level: int = Field(default=32, ge=1, description="held-out prompts of each source and level")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy")


class CheckpointSection(Section):
    """What survives."""

    every_steps: int = Field(default=10, ge=1, description="steps between checkpoints; also at the end")
    keep: int = Field(default=2, ge=1, description="complete checkpoints that stay on disk")
    memory_every_steps: int | None = Field(
        default=None, ge=1, description="steps between copies in shared memory, to roll back to when a rank dies"
    )


class MonitoringSection(Section):
    """Deadlines of every wait, in seconds, and what is kept to look at."""

    start_deadline_s: float = Field(default=600.0, gt=0, description="engines and ranks coming up")
    group_deadline_s: float = Field(default=600.0, gt=0, description="one group: sample, judge, publish")
    batch_deadline_s: float = Field(default=900.0, gt=0, description="a full batch being in the buffer")
    step_deadline_s: float = Field(default=900.0, gt=0, description="one optimizer step, or one checkpoint")
    update_deadline_s: float = Field(default=300.0, gt=0, description="one weight update on all generators")
    heartbeat_deadline_s: float = Field(
        default=60.0, gt=0, description="silence after which a process counts as hung, and is killed and restarted"
    )
    rollouts_per_step: int = Field(default=8, ge=0, description="groups written to rollouts/ for people, per step")


class RunConfig(Section):
    """The whole configuration of a run. Only the composition root takes it as one."""

    run: RunSection
    model: ModelSection
    sources: dict[str, Source] = Field(min_length=1)
    rewards: RewardsSection
    curriculum: CurriculumSection = CurriculumSection()
    rollout: RolloutSection = RolloutSection()
    staleness: StalenessSection = StalenessSection()
    algorithm: AlgorithmSection = AlgorithmSection.model_validate({})
    learner: LearnerSection = LearnerSection()
    generators: GeneratorsSection = GeneratorsSection()
    buffer: BufferSection = BufferSection()
    weights: WeightsSection = WeightsSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    monitoring: MonitoringSection = MonitoringSection()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where models compute; derived without importing torch."""
        if self.model.device == "auto":
            return "cuda" if shutil.which("nvidia-smi") else "cpu"
        return self.model.device

    @property
    def weight_backend(self) -> Literal["shared_memory", "nccl"]:
        """The weight-transfer backend in use."""
        if self.weights.backend == "auto":
            return "nccl" if self.device == "cuda" else "shared_memory"
        return self.weights.backend

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that leaves room for a full completion."""
        return self.model.max_context_tokens - self.rollout.max_tokens

    @property
    def longest_row_tokens(self) -> int:
        """Tokens of the longest row that the learner can meet, every answer in it at full length."""
        answers = self.rollout.group_size if self.learner.packing == "shared_prefix" else 1
        return self.max_prompt_tokens + answers * self.rollout.max_tokens

    @property
    def trajectories_per_step(self) -> int:
        """Completions in one optimizer step."""
        return self.learner.groups_per_step * self.rollout.group_size

    @property
    def max_groups_ahead(self) -> int:
        """Groups that may be in flight and buffered together at one version."""
        return (self.staleness.max_lag + 1) * self.learner.groups_per_step

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size is {self.rollout.group_size}, but {self.algorithm.name} compares the answers of a "
                "group with each other; set rollout.group_size to 2 or more (8 is usual)"
            )
        if self.max_prompt_tokens < 1:
            raise ValueError(
                f"rollout.max_tokens {self.rollout.max_tokens} leaves no room for a prompt in model.max_context_tokens "
                f"{self.model.max_context_tokens}; lower the one or raise the other"
            )
        if self.learner.micro_batch_tokens < self.longest_row_tokens:
            answers = self.rollout.group_size if self.learner.packing == "shared_prefix" else 1
            raise ValueError(
                f"learner.micro_batch_tokens {self.learner.micro_batch_tokens} cannot hold the longest row of "
                f"{self.longest_row_tokens} tokens (learner.packing {self.learner.packing}: one prompt, answers: "
                f"{answers}); raise it to {self.longest_row_tokens}"
            )
        if self.learner.groups_per_step < self.learner.ranks:
            raise ValueError(
                f"learner.groups_per_step {self.learner.groups_per_step} is below learner.ranks {self.learner.ranks}: "
                "a rank would have nothing to do; raise groups_per_step or lower ranks"
            )
        if self.device == "cpu" and self.weight_backend == "nccl":
            raise ValueError("weights.backend nccl needs NVIDIA GPUs, but model.device is cpu; set it to auto")
        largest = self.rollout.group_size * self.rollout.max_tokens * BYTES_PER_TOKEN
        if largest > self.buffer.max_bytes:
            raise ValueError(
                f"buffer.max_bytes {self.buffer.max_bytes} cannot hold one group of {self.rollout.group_size} answers "
                f"of {self.rollout.max_tokens} tokens, which has {largest} bytes or more; raise it"
            )
        self._gate_admits()
        self._rollout_agrees()
        self._rewards_name_sources()
        weights = [function.weight for function in self.rewards.functions.values()]
        for reason in refusals(self.algorithm, self.staleness.max_lag, weights, self.rewards.overlong is not None):
            raise ValueError(reason)
        return self

    def _gate_admits(self) -> None:
        max_lag, every = self.staleness.max_lag, self.weights.every_steps
        tightens = any(rule.action == "tighten_gate" for rule in self.staleness.guardrails.values())
        if tightens and not max_lag:
            raise ValueError("a guardrail has the action tighten_gate, but staleness.max_lag is 0 already; delete it")
        if every > max_lag + 1:
            raise ValueError(
                f"weights.every_steps {every} is more than staleness.max_lag {max_lag} + 1: the learner would wait for "
                f"groups that only newer weights may sample; lower it to {max_lag + 1}, or raise max_lag to {every - 1}"
            )
        if tightens and every > 1:
            raise ValueError(
                f"a guardrail has the action tighten_gate, but with weights.every_steps {every} a tightened gate would "
                "admit nothing before weights come; set every_steps to 1, or delete the guardrail"
            )

    def _rollout_agrees(self) -> None:
        rollout, overlong = self.rollout, self.rewards.overlong
        if rollout.first_answers is not None and rollout.first_answers >= rollout.group_size:
            raise ValueError(
                f"rollout.first_answers {rollout.first_answers} leaves nothing of rollout.group_size "
                f"{rollout.group_size} for a second stage; lower it, or set it to null to sample the group at once"
            )
        if overlong is not None and overlong.soft_tokens > rollout.max_tokens:
            raise ValueError(
                f"rewards.overlong.soft_tokens {overlong.soft_tokens} is above rollout.max_tokens "
                f"{rollout.max_tokens}, so that no answer would go unpunished; lower it"
            )
        if OVERLONG in self.rewards.functions:
            raise ValueError(
                f"rewards.functions has a function named {OVERLONG}, which is what the penalty for length is called; "
                "name it otherwise, or use rewards.overlong in its place"
            )

    def _rewards_name_sources(self) -> None:
        judged: set[str] = set()
        for name, function in self.rewards.functions.items():
            for source in function.sources or ():
                if source not in self.sources:
                    raise ValueError(
                        f"rewards.functions.{name}.sources names {source!r}, which is no source; "
                        f"sources are {', '.join(self.sources)}"
                    )
            judged |= set(function.sources or self.sources)
        unjudged = set(self.sources) - judged
        if unjudged:
            raise ValueError(f"no reward judges source {', '.join(sorted(unjudged))}; name it in a reward's sources")
