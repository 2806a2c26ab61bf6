"""How much is too much? The engine's bounds in one place: no client can make it fall over."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """Each field's default suits a laptop; a test may shrink one to reach it."""

    body_bytes: int = 64 * MIB  # one request body, after decompression
    dense_cells: int = 16 * MIB  # cells of one tensor made dense from CSR
    data_per_request: int = 16_384  # datums of one forward_backward
    tokens_per_request: int = 4 * MIB
    samples_per_request: int = 1024
    logprob_cells: int = 4 * MIB  # tokens x k of one request, per kind of logprobs
    waiting_samples: int = 4096  # not yet admitted; beyond it each learner has an equal share
    active_sequences: int = 256  # sequences being decoded at once
    held_requests: int = 4096  # training requests of one model waiting for their turn
    gap_s: float = 10.0  # a missing sequence id is given up when its run was quiet for this long
    hold_s: float = 40.0  # one long poll of retrieve_future
    bulk_hold_s: float = 25.0  # one long poll of retrieve_futures
    keep_delivered_s: float = 60.0  # a fetched result stays this long, for a lost reply
    keep_results_bytes: int = 512 * MIB  # all finished results together
    adapter_bytes: int = 2048 * MIB  # live adapters with optimizer state; the rest is parked
    shelf_bytes: int = 512 * MIB  # sampler weights in memory; the rest is parked
    scratch_bytes: int = 8192 * MIB  # parked snapshots on disk; the oldest goes first
    silent_s: float = 3600.0  # a session without a heartbeat for this long has ended
    note_s: float = 60.0  # a run's record is at most so much older than its last request
    metadata_bytes: int = 64 * 1024  # one user_metadata mapping
    sample_slice_s: float = 0.05  # least time for sampling between two training requests
    # Sample calls begin together when all are asked for and the last one is this long ago,
    pause_s: float = 0.0015
    gather_s: float = 0.25  # unless the first would have to wait for longer than this
    # Those of one learner that end within this time are answered together, while others go on:
    together_s: float = 0.1
