"""This file is one learner rank: it trains on leased groups, publishes policy versions, and keeps checkpoints.

Every public method is a collective, which all ranks call in the same order, but join and send, which are rank 0's, and
finish_save, which may be called while another runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from learners import batcher, checkpoint, optimizer, weight_sender
from learners.algorithms import find_algorithm
from learners.background_save import BackgroundSave
from learners.blocks import BlockOptions
from learners.gradient import BatchGradient
from learners.model import HeadDtype, Policy, join_ranks, load_policy, score_sequence
from learners.optimizer import NonFiniteGradient
from learners.policy_health import TokenFacts
from learners.reference import Reference
from learners.stopwatch import Stopwatch
from rl.algorithm_config import AlgorithmSection
from rl.config import Guardrail, LearnerSection
from rl.guardrails import STEP_ACTIONS, Guardrails, Trip
from rl.metrics import Metrics, last, mean, total
from rl.orders import StepOrder, StepReport
from rl.trajectory import Group, GroupEntry
from rl.weights import NcclGroup, WeightUpdate, digest_of

if TYPE_CHECKING:
    from learners.nccl_sender import NcclSender

Fetch = Callable[[Sequence[str]], list[Group]]


class LearnerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank is told once.

    model_dir is a local Hugging Face directory. rendezvous is a torch.distributed init method. max_tokens is the
    longest completion. canary_token_ids (two or more) is the sequence both sides score after a weight update. node
    names this machine in WeightUpdate. deadline_s bounds every collective. Of the guardrails a rank acts on those about
    the step in hand.
    """

    run_id: str
    model_dir: str
    device: Literal["cpu", "cuda"]
    rendezvous: str
    temperature: float
    max_tokens: int
    canary_token_ids: tuple[int, ...]
    node: str
    threads: int
    deadline_s: float
    learner: LearnerSection
    algorithm: AlgorithmSection
    head_dtype: HeadDtype = "bfloat16"
    guardrails: dict[str, Guardrail] = {}
    transport: Literal["auto", "dense", "delta"] = "auto"


class Learner:
    """One rank. fetch gets the groups of the given ids, in that order."""

    def __init__(
        self,
        settings: LearnerSettings,
        rank: int,
        world_size: int,
        fetch: Fetch,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the model and join the other ranks. dtype, for tests, replaces both master and compute dtype."""
        assert len(settings.canary_token_ids) >= 2, "the first token of a canary has no log-probability"
        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._rank = rank
        self._world_size = world_size
        self._fetch = fetch
        self._algorithm = find_algorithm(settings.algorithm)
        self._joined = join_ranks(settings.rendezvous, rank, world_size, settings.device, settings.deadline_s)
        self._device = torch.device(settings.device, torch.cuda.current_device() if settings.device == "cuda" else None)
        self._compute_dtype = dtype or getattr(torch, settings.learner.compute_dtype)
        self.policy = self._load_policy(dtype or torch.float32)
        reference = settings.algorithm.kl
        self._reference = (
            Reference(reference, self._load_policy, dtype or torch.float32, self._compute_dtype) if reference else None
        )
        self._guardrails = Guardrails(settings.guardrails, STEP_ACTIONS)
        options = settings.learner
        self._optimizer = optimizer.adamw(self.policy.parameters(), options.betas, options.weight_decay)
        num_bytes = sum(parameter.numel() for parameter in self.policy.parameters()) * self._compute_dtype.itemsize
        self._files = weight_sender.SharedMemoryFiles(settings.run_id, num_bytes, settings.transport)
        self._saves = BackgroundSave(settings.model_dir, self._compute_dtype, settings.deadline_s)
        self._stopwatch = Stopwatch(settings.device)
        self._gradient = BatchGradient(
            self.policy, self._reference, self._algorithm, settings.temperature, self._stopwatch
        )
        self._steps_done = 0
        self._gate_is_due = False
        self._moved = False
        self._nccl: NcclSender | None = None
        self._to_send: tuple[int, dict[str, Tensor]] = (0, {})

    def step(self, order: StepOrder) -> StepReport:
        """One optimizer step on a batch. The metrics cover all ranks and come from rank 0; the others report none.

        A batch without any gradient makes none, but a version all the same. What is averaged over tokens covers those
        that were computed. seconds covers everything since the last report, publishing and checkpoints included.

        Raises ValueError for the first step's gate, a payload that is not what its entry promised, or a batch with
        nothing to train on; NonFiniteGradient. The weights have not moved then.
        """
        plan = self.plan(order.entries)
        with self._stopwatch.measure("fetch"):
            groups = self._fetch_mine(order.entries, plan)
        metrics = self.accumulate_gradient(order, plan, groups)
        with self._stopwatch.measure("step"):
            moved, trips = self._move(metrics) if plan.computed_tokens else self._stay()
        return StepReport(
            step=order.step,
            version=order.version + 1,
            metrics=metrics | moved if self._rank == 0 else {},
            batch_digest=self._batch_digest(order.entries, plan, groups),
            num_tokens=plan.num_tokens,
            seconds=self._stopwatch.take(),
            trips=trips,
        )

    def plan(self, entries: Sequence[GroupEntry]) -> batcher.BatchPlan:
        """Who trains what of a batch. Raises ValueError where there is nothing to train on, or a row too long."""
        return self._plan_for(entries, self._world_size)

    def _plan_for(self, entries: Sequence[GroupEntry], ranks: int) -> batcher.BatchPlan:
        options = self._settings.learner
        advantages = self._algorithm.advantages([entry.rewards for entry in entries])
        weights = batcher.weigh(entries, self._algorithm.aggregation, self._settings.max_tokens)
        hidden_size = self.policy.model.get_output_embeddings().weight.shape[1]
        limits = batcher.RowLimits(options.micro_batch_tokens, hidden_size, options.packing)
        return batcher.plan_batch(entries, advantages, weights, ranks, limits)

    def accumulate_gradient(self, order: StepOrder, plan: batcher.BatchPlan, groups: dict[int, Group]) -> Metrics:
        """Forward and backward of this rank's micro-batches; leaves the batch's gradient, summed over ranks, in place.

        groups are this rank's, by their index in the order. Raises ValueError where the first step's gate closes, which
        is that of the first batch with something to compute.
        """
        self._optimizer.zero_grad(set_to_none=True)  # a step that raised has left its own
        shares = plan.shares(self._rank, groups)
        facts, metrics = self._gradient.accumulate(shares, plan.rank_tokens, order.version)
        due = order.first or self._gate_is_due
        self._gate_is_due = due and not plan.computed_tokens
        if due and plan.computed_tokens:
            self._first_step_gate(facts, order.version)
        return metrics | {"learner/trained/tokens": total(plan.num_tokens)}

    def _move(self, metrics: Metrics) -> tuple[Metrics, tuple[Trip, ...]]:
        """The optimizer step, unless a guardrail skips it. All ranks decide alike, since the metrics cover all of them.

        For how many steps a metric has been out of bounds is not saved: after a restart the count begins at 0.
        """
        options = self._settings.learner
        lr = optimizer.warmed_up(options.lr, self._steps_done, options.warmup_steps)
        failure: NonFiniteGradient | None = None
        try:
            grad_norm = optimizer.clip_gradients(self.policy.parameters(), options.max_grad_norm)
        except NonFiniteGradient as error:
            failure, grad_norm = error, math.nan
        trips = self._guardrails.judge(metrics | {"learner/grad_norm": mean(grad_norm)})
        skipped = any(trip.action == "skip_step" for trip in trips)
        if failure is not None and not skipped:
            raise failure
        for trip in trips:
            lr *= trip.factor if trip.action == "lower_step" else 1.0
        if skipped:
            lr = 0.0
            self._optimizer.zero_grad(set_to_none=True)
        else:
            optimizer.apply_step(self._optimizer, lr)
            self._steps_done += 1
            if self._reference is not None:
                self._reference.follow(self.policy)
        self._moved = lr > 0 and grad_norm > 0
        return self._move_metrics(grad_norm, lr, skipped), trips

    def _stay(self) -> tuple[Metrics, tuple[Trip, ...]]:
        """No step, where nothing has a gradient: AdamW would go on by its momentum. No guardrail has a say in it."""
        self._moved = False
        return self._move_metrics(0.0, 0.0, skipped=False), ()

    def _move_metrics(self, grad_norm: float, lr: float, skipped: bool) -> Metrics:
        return {
            "learner/grad_norm": mean(grad_norm),
            "learner/lr": last(lr),
            "learner/ranks": last(self._world_size),  # a replay lays the batch out for as many
            "learner/skipped_step": mean(skipped),
        }

    def publish(self, version: int) -> WeightUpdate | None:
        """Gather the weights and offer them as this version: in shared memory, or for `send` once the rank has joined.

        Rank 0 describes the version; the others give None.
        """
        with self._stopwatch.measure("gather"):
            outgoing = self._begin_publishing(version) if self._rank == 0 else None
            weight_sender.fill(outgoing, self.policy.model, self._compute_dtype)
        with self._stopwatch.measure("canary"):
            canary_logprobs = score_sequence(self.policy, self._settings.canary_token_ids)
        if outgoing is None:
            return None
        with self._stopwatch.measure("send"):
            written = self._files.finish(outgoing)
        self._to_send = (version, outgoing.tensors)
        return WeightUpdate(
            **msgspec.structs.asdict(written),
            backend="nccl" if self._nccl else "shared_memory",
            canary_token_ids=self._settings.canary_token_ids,
            canary_logprobs=canary_logprobs,
            node=self._settings.node,
            moved=self._moved,
            delta_here=self._settings.transport == "delta",
        )

    def join(self, group: NcclGroup) -> None:
        """Meet the engines of the nccl backend; returns when the whole group has met. Rank 0 only."""
        from learners.nccl_sender import NcclSender  # it imports vLLM, which other backends have no use for here

        self._nccl = NcclSender(group)

    def send(self, version: int) -> None:
        """Broadcast the version last published over nccl; the engines must be receiving. Rank 0 only."""
        published, tensors = self._to_send
        assert self._nccl is not None and published == version, f"version {published} is published, not {version}"
        with self._stopwatch.measure("send"):
            self._nccl.send({name: tensor.to(self._device) for name, tensor in tensors.items()})
        self._to_send = (version, {})

    def begin_save(self, folder: str, export: bool) -> None:
        """Copy the state aside, to be written while training goes on; one save at a time, until finish_save.

        folder/state is a sharded checkpoint that any number of ranks can load, folder/export the policy as a Hugging
        Face directory, verified by reading it back.
        """
        with self._stopwatch.measure("checkpoint"):
            state = checkpoint.state_of(self.policy.model, self._optimizer, self._steps_done, self._extra_state)
            self._saves.begin(folder, state, export)

    def finish_save(self) -> None:
        """Wait until the save is on disk; any thread may. Raises OSError on a full disk, and the next save is free."""
        self._saves.finish()

    def load(self, directory: str) -> None:
        """Continue from the state of a checkpoint. Raises ValueError where it is incomplete or of another model."""
        with self._stopwatch.measure("checkpoint"):
            found = checkpoint.load_state(directory, self.policy.model, self._optimizer, self._extra_state)
            self._steps_done = found

    def close(self) -> None:
        """Remove this run's files from shared memory and leave the process group, if this learner entered it."""
        if self._rank == 0:
            self._files.remove()
        if self._nccl:
            self._nccl.close()
        self._saves.close()
        if self._joined:
            dist.destroy_process_group()
            self._joined = False

    @property
    def _extra_state(self) -> checkpoint.Extra:
        return {"reference": self._reference.state if self._reference else {}}

    def _load_policy(self, master: torch.dtype) -> Policy:
        settings, options = self._settings, self._settings.learner
        blocks = BlockOptions(options.packing, options.checkpoint_activations, options.compile)
        dtypes = (master, self._compute_dtype, settings.head_dtype)
        return load_policy(settings.model_dir, settings.device, *dtypes, blocks)

    def _fetch_mine(self, entries: Sequence[GroupEntry], plan: batcher.BatchPlan) -> dict[int, Group]:
        wanted = plan.groups_of(self._rank)
        groups = self._fetch([entries[index].group_id for index in wanted]) if wanted else []
        for index, group in zip(wanted, groups, strict=True):
            batcher.check_payload(entries[index], group)
        return dict(zip(wanted, groups, strict=True))

    def _first_step_gate(self, facts: TokenFacts, version: int) -> None:
        gap, allowed = facts.current_gap(), self._settings.learner.max_logprob_gap
        if gap is not None and not gap <= allowed:
            raise ValueError(
                f"before the first optimizer step, learner and engine disagree by {gap:.4f} nats per token on what "
                f"version {version} sampled; allowed are {allowed} (learner.max_logprob_gap). Importance weights would "
                "be wrong, so nothing was trained. See that both load the same model.path in the same dtype, and that "
                "the engine reports log-probabilities at rollout.temperature"
            )

    def _begin_publishing(self, version: int) -> weight_sender.Outgoing:
        if self._nccl:
            return weight_sender.Outgoing(version)
        return self._files.begin(version, weight_sender.plan_weights(self.policy.model, self._compute_dtype))

    def _whole_weights(self) -> dict[str, Tensor]:
        """All weights in the compute dtype on rank 0; nothing on the others."""
        return dict(weight_sender.gather_weights(self.policy.model, self._compute_dtype, keep=self._rank == 0))

    def _batch_digest(self, entries: Sequence[GroupEntry], plan: batcher.BatchPlan, groups: dict[int, Group]) -> str:
        """A digest of all that the gradient depends on, over all ranks: prompts, answers, log-probs, versions, rewards.

        Of a group that nobody computes that is its entry: lengths and rewards. Group ids carry the run's and stay out:
        two runs of one seed that train on the same have the same digest.
        """
        contents = {index: _content_of(group) for index, group in groups.items()}
        if self._rank == 0:
            computed = {index for rank in range(len(plan.micro_batches)) for index in plan.groups_of(rank)}
            left_out = set(range(len(entries))) - computed
            contents |= {index: (entries[index].completion_tokens, entries[index].rewards) for index in left_out}
        digests = torch.zeros(len(entries), 2, dtype=torch.int64, device=self._device)
        for index, content in contents.items():
            found = digest_of(msgspec.msgpack.encode(content))
            digests[index] = torch.frombuffer(bytearray.fromhex(found), dtype=torch.int64)
        dist.all_reduce(digests)  # every group is one rank's, so the sum is a union
        return digest_of(digests.cpu().numpy().tobytes())


def _content_of(group: Group) -> tuple[object, ...]:
    answers = [
        (t.reward, each.token_ids, each.logprobs, each.spans, each.finish_reason)
        for t in group.trajectories
        for each in (t.completion,)
    ]
    return group.prompt.token_ids, answers
