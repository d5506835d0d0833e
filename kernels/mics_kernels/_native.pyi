"""Interface of csrc/bindings.cpp. Arrays and streams are addresses; 0 means None."""

class EvidentialCall:
    def __init__(
        self,
        *,
        input: int,
        dtype: str,
        labels: int,
        targets: int,
        present: int,
        weight: int,
        count: int,
        losses: int,
        fused: int,
        gradient: int,
        rows: int,
        views: int,
        classes: int,
        activation: str,
        kl_weight: float,
        kl_weight_on_gpu: int,
        ignore_index: int,
    ) -> None: ...

class FusionCall:
    def __init__(
        self,
        *,
        evidence: int,
        dtype: str,
        present: int,
        fused: int,
        outer: int,
        gradient: int,
        rows: int,
        views: int,
        classes: int,
    ) -> None: ...

class ConsistencyPair:
    def __init__(
        self,
        *,
        query: int,
        teacher: int,
        query_present: int,
        keys: int,
        keys_dtype: str,
        queue: int,
        queue_dtype: str,
        key_present: int,
        queue_ids: int,
        queue_length: int,
        losses: int,
        counted: int,
        gradient: int,
        temperature: int,
    ) -> None: ...

class ShiftCall:
    def __init__(
        self,
        *,
        features: int,
        dtype: str,
        moved: int,
        labels: int,
        shares: int,
        spread: int,
        directions: int,
        strengths: int,
        row_ids: int,
        seed: int,
        rows: int,
        dim: int,
        classes: int,
        rank: int,
        strength: float,
    ) -> None: ...

class MomentsCall:
    def __init__(
        self,
        *,
        features: int,
        dtype: str,
        labels: int,
        shares: int,
        weight: int,
        count: int,
        mean: int,
        m2: int,
        rows: int,
        dim: int,
        classes: int,
    ) -> None: ...

class MergeCall:
    def __init__(
        self,
        *,
        count: int,
        mean: int,
        m2: int,
        new_count: int,
        new_mean: int,
        new_m2: int,
        classes: int,
        dim: int,
        momentum: float,
    ) -> None: ...

class ShiftedLossCall:
    def __init__(
        self,
        *,
        logits: int,
        dtype: str,
        labels: int,
        table: int,
        strengths: int,
        losses: int,
        gradient: int,
        rows: int,
        classes: int,
        strength: float,
    ) -> None: ...

def build_info() -> dict[str, object]: ...
def use_instruction_set(name: str) -> bool: ...
def consistency_cpu(
    pairs: list[ConsistencyPair],
    *,
    key_ids: int,
    queries: int,
    keys: int,
    present_stride: int,
    dim: int,
    temperature: float,
    alpha: float,
    want_gradient: bool,
    threads: int,
) -> None: ...
def evidential_cpu(call: EvidentialCall, threads: int) -> None: ...
def fuse_evidence_cpu(call: FusionCall, threads: int) -> None: ...
def fuse_evidence_gradient_cpu(call: FusionCall, threads: int) -> None: ...
def shift_cpu(call: ShiftCall, threads: int) -> None: ...
def class_moments_cpu(call: MomentsCall, threads: int) -> None: ...
def merge_moments_cpu(call: MergeCall, threads: int) -> None: ...
def philox_uniforms_cpu(
    seed: int, row_ids: int, rows: int, columns: int, uniforms: int, threads: int
) -> None: ...
def shifted_loss_cpu(call: ShiftedLossCall, threads: int) -> None: ...
def philox_words_cpu(seed: int, offset: int, row: int, draws: int, words: int) -> None: ...
def count_labels_cuda(
    labels: int, rows: int, ignore_index: int, count: int, stream: int
) -> None: ...
def evidential_cuda(call: EvidentialCall, stream: int) -> None: ...
def fuse_evidence_cuda(call: FusionCall, stream: int) -> None: ...
def fuse_evidence_gradient_cuda(call: FusionCall, stream: int) -> None: ...
